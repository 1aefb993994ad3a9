/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_isolation.c - suspects of a quarantined partition run alone, and with
 * delivery.order=key nothing of their key overtakes them. The test plays the consumer thread's
 * commits, intake and the engine; pools of real workers: tests/integration/test_poison.sh.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include "consumer_world.h"

enum { MAX_ATTEMPTS = 3, TURNS = 1000, MOST_US = 20 * 1000000, WAY_US = 20000 };

static struct job *unsent;      /* its reply waits for its topic */
static const struct assigned *barred;   /* the group takes no commits of it */
static struct { struct assigned *of; struct ledger_commit due; } commits[2];    /* on their way, */
static size_t n_commits;
static int64_t way_us, answer_us;       /* which takes so long, and until then; 0: no time */
static char order[64];          /* the prompts as they ran, by their first letter and offset */

/* Two workers went in a row while offsets below `until` were unfinished: those run one by one. */
static struct world *quarantined(int64_t until, bool ordered)
{
    struct world *x = world_open();
    x->cfg.poison_max_attempts = MAX_ATTEMPTS;
    isolation_init(&x->c, x->c.map_limit);
    x->c.order = ordered ? key_order_new() : NULL;
    quarantine_init(&x->part.q, MAX_ATTEMPTS, 1);
    x->part.q.deaths = MAX_ATTEMPTS - 1;
    x->part.q.until = until;
    x->c.iso.active = true;
    order[0] = '\0';
    n_commits = 0;
    way_us = answer_us = 0;
    return x;
}

static void read_prompt(struct world *x, int64_t offset, const char *key)
{
    struct job *j = world_deliver(x, offset, key);
    j->worker = &x->w;
    x->c.held++;
    if (!isolation_hold(&x->c, &x->c.parts[0], j))
        assert_int_equal(consumer_admit(&x->c, j), LM_OK);
}

/* Whenever none is on its way. */
static void commit(struct world *x)
{
    char text[QUARANTINE_TEXT_MAX + 1];
    for (size_t i = 0; i < x->c.n_parts; i++) {
        struct assigned *a = &x->c.parts[i];
        if (!commit_due(&x->c, a, false, &commits[n_commits].due))
            continue;
        isolation_text(&x->c, a, &commits[n_commits].due, text);
        commits[n_commits++].of = a;
    }
    answer_us = lm_now_us() + way_us;
}

static void answer(struct world *x)
{
    for (size_t i = 0; i < n_commits; i++) {
        struct assigned *a = commits[i].of;
        a->refused = a == barred;
        isolation_answered(&x->c, a->ref, !a->refused);
        if (!a->refused)
            ledger_committed(x->c.ledger, &commits[i].due);
    }
    n_commits = 0;
}

/* Intake and engine, the fastest there are. */
static void run_what_came(struct world *x)
{
    for (struct job *j = job_queue_take(&x->w.to_intake, 0), *next; j; j = next) {
        next = j->next;
        bool closed = atomic_load(&x->w.closed);
        bool its_turn = j->suspect && atomic_load(&j->alone_now);
        if ((closed || j->suspect) && !its_turn) {
            job_queue_push(&x->w.to_intake, j);         /* it waits */
            continue;
        }
        assert_int_equal(j->suspect, closed);
        size_t n = strlen(order);
        snprintf(order + n, sizeof order - n, "%s%.*s%d", n ? " " : "", (int)j->record.key_len,
                 (const char *)j->record.key, (int)j->record.offset);
        if (j != unsent) {
            worker_end_job(&x->w, j, OUTCOME_REPLY);
            continue;
        }
        atomic_store(&x->w.in_engine, 1);
        job_set_stage(j, JOB_ANSWERING);
    }
    atomic_store(&x->w.intake_rests, atomic_load(&x->w.closed));
}

static void turn(struct world *x)
{
    consumer_take_finished(&x->c, 0);
    if (lm_now_us() >= answer_us)
        answer(x);
    isolation_serve(&x->c);
    if (!n_commits)
        commit(x);
    if (!way_us)
        answer(x);
    run_what_came(x);
}

static void run_all(struct world *x)
{
    for (int i = 0; ledger_in_flight(x->c.ledger); i++) {
        assert_true(i < TURNS);
        turn(x);
    }
}

static void finish(struct world *x)
{
    assert_int_equal(x->c.held, 0);
    key_order_free(x->c.order);
    job_unref(x->c.iso.job);
    world_close(x);
}

/* Where the prompts of one key stand in `order`, as text. */
static const char *of_key(char key)
{
    static char text[64];
    char *out = text;
    for (const char *at = order; *at; at++)
        if (*at == key)
            *out++ = at[1];
    *out = '\0';
    return text;
}

static void read_some(struct world *x)
{
    static const char *const keys[] = { "a", "b", "a", "b", "a", "c", "b", "a" };
    for (int i = 0; i < (int)LM_COUNT(keys); i++)
        read_prompt(x, i, keys[i]);
}

static void test_keys_in_order(void **state)
{
    (void)state;
    struct world *x = quarantined(4, true);
    read_some(x);
    run_all(x);
    assert_string_equal(of_key('a'), "0247");
    assert_string_equal(of_key('b'), "136");
    assert_string_equal(of_key('c'), "5");
    finish(x);
}

/* Without keys in order those that are under no suspicion need not wait. */
static void test_no_order(void **state)
{
    (void)state;
    struct world *x = quarantined(4, false);
    read_some(x);
    run_all(x);
    assert_int_equal(strlen(order), 8 * 3 - 1);
    assert_string_not_equal(of_key('a'), "0247");
    finish(x);
}

static void find_first(void *ctx, int64_t offset, void *user)
{
    (void)ctx;
    if (offset == 0)
        unsent = user;
}

/* A suspect has left the engine, but the topic of its reply is away: the others need not wait for
 * that, and a death is no more a death alone. It does not run again. */
static void test_reply_waits(void **state)
{
    (void)state;
    struct world *x = quarantined(2, false);
    read_some(x);
    ledger_each(x->c.ledger, x->part.ref, find_first, NULL);
    for (int i = 0; i < TURNS && atomic_load(&unsent->stage) != JOB_ANSWERING; i++)
        turn(x);
    for (int i = 0; i < 10; i++)
        turn(x);
    assert_int_equal(x->c.iso.turn, TURN_RUNNING);      /* it is about to leave it */
    assert_true(x->part.q.acked.solo);
    atomic_store(&x->w.in_engine, 0);
    for (int i = 0; i < TURNS && ledger_in_flight(x->c.ledger) > 1; i++)
        turn(x);
    assert_int_equal(ledger_in_flight(x->c.ledger), 1);
    assert_int_equal(strlen(order), 8 * 3 - 1);
    assert_false(x->part.q.acked.solo);
    assert_true(x->part.q.acked.fence > 0);     /* it is unfinished, and was touched */
    struct job *j = unsent;
    unsent = NULL;
    worker_end_job(&x->w, j, OUTCOME_REPLY);
    run_all(x);
    finish(x);
}

/* After a refusal a commit waits for a moment. */
static void until_open_with(struct world *x, size_t n)
{
    for (int64_t end = lm_now_us() + MOST_US; lm_now_us() < end; turn(x))
        if (ledger_in_flight(x->c.ledger) == n && x->c.iso.turn == TURN_OPEN)
            break;
    assert_int_equal(ledger_in_flight(x->c.ledger), n);
    assert_false(atomic_load(&x->w.closed));
}

/* Another partition is at work beside. */
static struct world *quarantined_beside(struct assigned both[2])
{
    struct world *x = quarantined(1, false);
    both[0] = x->part;
    both[1] = (struct assigned){ .partition = 0 };
    assert_int_equal(ledger_assign(x->c.ledger, "u", 0, 0, &both[1].ref), LM_OK);
    both[1].lease = lease_new("u", 0, both[1].ref);
    quarantine_init(&both[1].q, MAX_ATTEMPTS, 1);
    quarantine_ask(&both[1].q, 100, false, false);
    quarantine_answer(&both[1].q, true);
    x->c.parts = both;
    x->c.n_parts = 2;
    read_some(x);
    return x;
}

static void finish_beside(struct world *x)
{
    ledger_revoke(x->c.ledger, x->c.parts[1].ref);
    lease_unref(x->c.parts[1].lease);
    finish(x);
}

/* Commits of one of the two are refused. If it is the other's, that can't be marked idle, and the
 * suspect runs all the same; if its own, it doesn't. */
static void refuse_commits(bool own)
{
    struct assigned both[2];
    struct world *x = quarantined_beside(both);
    for (int i = 0; i < TURNS && x->c.iso.turn != TURN_CLOSING; i++)
        turn(x);
    barred = &both[!own];
    until_open_with(x, own);
    barred = NULL;
    until_open_with(x, 0);
    finish_beside(x);
}

static void test_marks_of_another_are_refused(void **state)
{
    (void)state;
    refuse_commits(false);
}

static void test_its_own_marks_are_refused(void **state)
{
    (void)state;
    refuse_commits(true);
}

/* One commit follows the other, and the other partition is in each of them, for it has something to
 * commit: that it is refused time and again is no reason not to ask for the suspect's own mark. */
static void test_another_is_refused_all_the_time(void **state)
{
    (void)state;
    struct assigned both[2];
    struct world *x = quarantined_beside(both);
    ledger_position(x->c.ledger, both[1].ref, 5);
    barred = &both[1];
    way_us = WAY_US;
    until_open_with(x, 0);
    assert_true(both[1].refused);
    barred = NULL;
    finish_beside(x);
}

/* Nothing is left to commit but what a suspect's turn asks for, and that was refused once. */
static void test_a_refusal_that_passes(void **state)
{
    (void)state;
    struct world *x = quarantined(1, false);
    read_prompt(x, 0, "a");
    barred = &x->part;
    for (int i = 0; i < TURNS && !x->part.refused; i++)
        turn(x);
    assert_int_equal(x->c.iso.turn, TURN_MARKING);
    until_open_with(x, 1);
    barred = NULL;
    until_open_with(x, 0);
    assert_string_equal(order, "a0");
    finish(x);
}

/* While the group has a mark that says that a suspect is alone, nobody joins it: a death would
 * count as its death alone. */
static void test_the_end_of_a_turn_is_refused(void **state)
{
    (void)state;
    struct world *x = quarantined(1, false);
    read_some(x);
    for (int i = 0; i < TURNS && x->c.iso.turn != TURN_RUNNING; i++)
        turn(x);
    assert_true(x->part.q.acked.solo);
    barred = &x->part;
    for (int64_t end = lm_now_us() + MOST_US; !x->part.refused; turn(x))
        assert_true(lm_now_us() < end);
    for (int64_t end = lm_now_us() + 500000; lm_now_us() < end; turn(x))
        assert_true(x->part.q.acked.solo && atomic_load(&x->w.closed));
    barred = NULL;
    until_open_with(x, 0);
    assert_false(x->part.q.acked.solo);
    finish(x);
}

/* Not for ever: the topic may be no more. After a minute the others go on, and so they do when
 * another partition's suspect has its turn. */
static void test_the_end_of_a_turn_is_refused_for_long(void **state)
{
    (void)state;
    enum { LONG_US = 60 * 1000000 };
    struct assigned both[2];
    struct world *x = quarantined_beside(both);
    for (int i = 0; i < TURNS && x->c.iso.turn != TURN_RUNNING; i++)
        turn(x);
    barred = &both[0];
    for (int64_t end = lm_now_us() + MOST_US; !both[0].overdue_since_us; turn(x))
        assert_true(lm_now_us() < end);
    both[0].overdue_since_us -= LONG_US / 2;
    for (int64_t end = lm_now_us() + 300000; lm_now_us() < end; turn(x))
        assert_true(atomic_load(&x->w.closed));
    both[0].overdue_since_us -= LONG_US / 2;
    until_open_with(x, 0);
    assert_true(both[0].q.acked.solo);
    both[1].q.deaths = MAX_ATTEMPTS - 1;
    both[1].q.until = 1;
    x->c.iso.active = true;
    x->part = both[1];
    struct job *j = world_deliver(x, 0, "d");
    x->part = both[0];
    j->worker = &x->w;
    x->c.held++;
    assert_true(isolation_hold(&x->c, &both[1], j));
    x->c.iso.next_us = 0;
    until_open_with(x, 0);
    assert_string_equal(of_key('d'), "0");
    barred = NULL;
    for (int64_t end = lm_now_us() + MOST_US; both[0].q.acked.solo; turn(x))
        assert_true(lm_now_us() < end);
    finish_beside(x);
}

/* The engine has failed it, and it goes back there: not beside others, but in a turn of its own. */
static void test_sent_back(void **state)
{
    (void)state;
    struct world *x = quarantined(2, false);
    read_some(x);
    ledger_each(x->c.ledger, x->part.ref, find_first, NULL);
    struct job *j = unsent;
    for (int i = 0; i < TURNS && atomic_load(&j->stage) != JOB_ANSWERING; i++)
        turn(x);
    atomic_store(&x->w.in_engine, 0);
    for (int i = 0; i < TURNS && x->c.iso.turn == TURN_RUNNING; i++)
        turn(x);
    assert_false(atomic_load(&j->alone_now));
    unsent = NULL;
    job_set_stage(j, JOB_READY);
    job_queue_push(&x->w.to_intake, j);
    run_all(x);                         /* where suspects run while it is closed */
    assert_int_equal(strlen(order), 9 * 3 - 1);
    finish(x);
}

/* The partition is taken away while suspects wait behind one another: none runs, none is left. */
static void test_taken_away(void **state)
{
    (void)state;
    struct world *x = quarantined(4, true);
    read_some(x);
    atomic_store(&x->part.lease->revoked, true);
    isolation_drop(&x->c, &x->part);
    for (int i = 0; i < TURNS && x->c.held; i++) {
        consumer_take_finished(&x->c, 0);
        for (struct job *j = job_queue_take(&x->w.to_intake, 0), *next; j; j = next) {
            next = j->next;
            worker_end_job(&x->w, j, OUTCOME_DROPPED);
        }
    }
    assert_int_equal(key_order_waiting(x->c.order), 0);
    finish(x);
}

/* The broker leaves no room for marks: all go on at once, in order. */
static void test_marks_end(void **state)
{
    (void)state;
    struct world *x = quarantined(4, true);
    read_some(x);
    isolation_end(&x->c);
    for (int i = 0; ledger_in_flight(x->c.ledger); i++) {
        assert_true(i < TURNS);
        consumer_take_finished(&x->c, 0);
        for (struct job *j = job_queue_take(&x->w.to_intake, 0), *next; j; j = next) {
            next = j->next;
            size_t n = strlen(order);
            snprintf(order + n, sizeof order - n, " %.1s%d", (const char *)j->record.key,
                     (int)j->record.offset);
            worker_end_job(&x->w, j, OUTCOME_REPLY);
        }
    }
    assert_string_equal(of_key('a'), "0247");
    assert_string_equal(of_key('b'), "136");
    finish(x);
}

/* The log lost its end and was written on: suspects from before that run alone as ever, and the
 * others wait for them; what lay behind is let go, and what comes there now is no suspect. */
static void cut_at_three(bool ordered, int after_turns)
{
    static const char *const all[] = { "a0", "b1", "a2", "b3", "c4" };
    struct world *x = quarantined(5, ordered);
    read_some(x);
    for (int i = 0; i < after_turns; i++)
        turn(x);
    bool ran[3];
    for (int i = 0; i < 3; i++)
        ran[i] = !ledger_user(x->c.ledger, x->part.ref, i);
    isolation_cut(&x->c, &x->part, 3);
    assert_int_equal(ledger_cut(x->c.ledger, x->part.ref, 3), ran[0] && ran[1] && ran[2] ?
                     LM_NOT_FOUND : LM_OK);
    assert_int_equal(x->part.q.until, 3);
    read_prompt(x, 3, "b");
    read_prompt(x, 4, "c");
    run_all(x);
    for (int i = 0; i < TURNS && (x->c.held || x->c.iso.turn != TURN_OPEN); i++)
        turn(x);
    for (int i = 0; i < (int)LM_COUNT(all); i++)
        assert_non_null(strstr(order, all[i]));
    const char *b = of_key('b');
    assert_true(!ordered || strchr(b, '1') < strchr(b, '3'));
    finish(x);
}

static void test_a_log_that_is_cut(void **state)
{
    (void)state;
    for (int i = 0; i < 6; i++) {
        cut_at_three(false, i);
        cut_at_three(true, i);
    }
}

/* What made room for it may have left a moment ago, and its thread note that only now. */
static void test_nothing_joins_who_is_alone(void **state)
{
    (void)state;
    struct world *x = world_open();
    struct job *before = world_deliver(x, 0, NULL), *suspect = world_deliver(x, 1, NULL);
    worker_enter_engine(&x->w, before, false);
    atomic_store(&x->w.in_engine, 0);           /* half of worker_left_engine() */
    worker_enter_engine(&x->w, suspect, true);
    worker_left_engine(&x->w, before);          /* the other half */
    assert_true(atomic_load(&x->w.alone));
    worker_left_engine(&x->w, suspect);
    assert_false(atomic_load(&x->w.alone));
    job_unref(before);
    job_unref(suspect);
    world_close(x);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_log_that_is_cut),
        cmocka_unit_test(test_keys_in_order), cmocka_unit_test(test_no_order),
        cmocka_unit_test(test_reply_waits), cmocka_unit_test(test_sent_back),
        cmocka_unit_test(test_marks_of_another_are_refused),
        cmocka_unit_test(test_its_own_marks_are_refused),
        cmocka_unit_test(test_another_is_refused_all_the_time),
        cmocka_unit_test(test_a_refusal_that_passes),
        cmocka_unit_test(test_the_end_of_a_turn_is_refused),
        cmocka_unit_test(test_the_end_of_a_turn_is_refused_for_long),
        cmocka_unit_test(test_nothing_joins_who_is_alone),
        cmocka_unit_test(test_taken_away), cmocka_unit_test(test_marks_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
