/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_consumer.c - how long the consumer thread waits while others wait for it, that it
 * commits while a revocation drains, before a join and again after one that refused it, that a
 * topic whose commits are refused holds up no other, that it asks for offsets when no transaction
 * is about to change them; and when a record is said to have come. The test plays that thread, or
 * the client under it. What a group makes of it: tests/integration/test_flow.sh,
 * test_partitions.sh.
 */
#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#include <cmocka.h>

#include "consumer_world.h"

static struct job *running;     /* ends when the first commit comes; NULL: none does */
static int commits_meanwhile;
static rd_kafka_resp_err_t refusal = RD_KAFKA_RESP_ERR__WAIT_COORD;     /* of all commits */
static char metadata[128];      /* of the first of them */

/* With `plays_group` a commit waits for the answers here, in order; the last one comes again. */
static bool plays_group, lost;
static const rd_kafka_resp_err_t *answers;
static const char *barred;      /* the group takes no commits of this topic; NULL: of all */
static int n_commits, library = 0x020f01ff;
static char committed_topic[16];        /* of the last one's first partition */
static struct {
    void (*cb)(rd_kafka_t *, rd_kafka_resp_err_t, rd_kafka_topic_partition_list_t *, void *);
    void *opaque;
    rd_kafka_topic_partition_list_t *offsets;
} waits[4];
static size_t n_waits;

int rd_kafka_version(void)
{
    return library;
}

int rd_kafka_assignment_lost(rd_kafka_t *rk)
{
    (void)rk;
    return lost;
}

/* As librdkafka tells it: what is refused of one is refused of all in the request. */
static rd_kafka_resp_err_t answer_to(rd_kafka_topic_partition_list_t *l)
{
    rd_kafka_resp_err_t e = *answers;
    answers += !!*answers;
    for (int i = 0; barred && i < l->cnt; i++)
        if (!strcmp(l->elems[i].topic, barred))
            e = RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
    for (int i = 0; i < l->cnt; i++)
        l->elems[i].err = e;
    return e;
}

int rd_kafka_queue_poll_callback(rd_kafka_queue_t *q, int timeout_ms)
{
    (void)q;
    if (!n_waits) {
        nanosleep(&(struct timespec){ .tv_nsec = timeout_ms % 1000 * 1000000 }, NULL);
        return 0;
    }
    __typeof__(waits[0]) first = waits[0];
    memmove(waits, waits + 1, --n_waits * sizeof *waits);
    first.cb(NULL, answer_to(first.offsets), first.offsets, first.opaque);
    rd_kafka_topic_partition_list_destroy(first.offsets);
    return 1;
}

/* Wins over the shared library's: there is no broker. */
rd_kafka_resp_err_t rd_kafka_commit_queue(rd_kafka_t *rk,
                                          const rd_kafka_topic_partition_list_t *offsets,
                                          rd_kafka_queue_t *q, void (*cb)(
                                          rd_kafka_t *, rd_kafka_resp_err_t,
                                          rd_kafka_topic_partition_list_t *, void *),
                                          void *opaque)
{
    (void)rk;
    (void)q;
    const rd_kafka_topic_partition_t *p = &offsets->elems[0];
    if (plays_group) {
        assert_true(n_waits < LM_COUNT(waits));
        for (size_t i = 0; i < n_waits; i++)    /* no topic overtakes itself */
            for (int k = 0; k < offsets->cnt; k++)
                assert_null(rd_kafka_topic_partition_list_find(
                    waits[i].offsets, offsets->elems[k].topic, offsets->elems[k].partition));
        waits[n_waits].cb = cb;
        waits[n_waits].opaque = opaque;
        waits[n_waits++].offsets = rd_kafka_topic_partition_list_copy(offsets);
        n_commits++;
        snprintf(committed_topic, sizeof committed_topic, "%s", p->topic);
        return RD_KAFKA_RESP_ERR_NO_ERROR;
    }
    if (running && atomic_load(&running->stage) == JOB_RUNNING) {
        if (!commits_meanwhile++)
            snprintf(metadata, sizeof metadata, "%lld:%.*s", (long long)p->offset,
                     (int)p->metadata_size, p->metadata ? (const char *)p->metadata : "");
        job_set_stage(running, JOB_READY);
    }
    return refusal;
}

static atomic_bool transaction_over;    /* the one that holds the offset of the partition */
static atomic_int asked_before, asked_after;

static const char *kept;        /* the group's metadata of each partition; NULL: none */
static struct world *polled;
static atomic_llong handed_over;       /* to intake, when the group was asked */
static int answers_left = -1;   /* then it is silent; negative: it never is */

rd_kafka_resp_err_t rd_kafka_committed(rd_kafka_t *rk, rd_kafka_topic_partition_list_t *l,
                                       int timeout_ms)
{
    (void)rk;
    (void)timeout_ms;
    atomic_fetch_add(atomic_load(&transaction_over) ? &asked_after : &asked_before, 1);
    if (polled)
        atomic_store(&handed_over, atomic_load(&polled->w.metrics.backlog));
    for (int i = 0; i < l->cnt; i++)
        l->elems[i].offset = RD_KAFKA_OFFSET_INVALID;
    if (!answers_left)
        return RD_KAFKA_RESP_ERR__TIMED_OUT;
    answers_left -= answers_left > 0;
    for (int i = 0; i < l->cnt; i++) {
        if (barred && !strcmp(l->elems[i].topic, barred)) {
            l->elems[i].err = RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
            continue;
        }
        l->elems[i].offset = 1;
        free(l->elems[i].metadata);
        l->elems[i].metadata = kept ? strdup(kept) : NULL;
        l->elems[i].metadata_size = kept ? strlen(kept) : 0;
    }
    return RD_KAFKA_RESP_ERR_NO_ERROR;
}

/* ---- a client with two records, and a rebalance between them -------------------------------- */

static void assign(struct world *x, const char *topic, int partition);

static int polls;
static int64_t first_offset;
static bool rebalances = true;  /* between the two */
static int64_t second_from_us;  /* the second one comes then, or later */

static rd_kafka_message_t records[2];
static rd_kafka_headers_t *sent_headers;

rd_kafka_message_t *rd_kafka_consumer_poll(rd_kafka_t *rk, int timeout_ms)
{
    (void)rk;
    (void)timeout_ms;
    if (!polled || polls == 2) {
        if (polled)
            atomic_store(&polled->w.stopping, true);
        return NULL;
    }
    if (polls == 1 && rebalances) {
        assign(polled, "other", 0);
        second_from_us = lm_now_us();
    }
    static char key[] = "k", value[] = "prompt";
    records[polls] = (rd_kafka_message_t){ .offset = first_offset + polls, .key = key, .key_len = 1,
                                           .payload = value, .len = 6 };
    return &records[polls++];
}

/* What the client itself says, at its close, is the library's. */
void rd_kafka_message_destroy(rd_kafka_message_t *message)
{
    void (*real)(rd_kafka_message_t *) =
        (__typeof__(real))dlsym(RTLD_NEXT, "rd_kafka_message_destroy");
    if (message != &records[0] && message != &records[1])
        real(message);
}

const char *rd_kafka_topic_name(const rd_kafka_topic_t *t)
{
    (void)t;
    return "t";
}

int64_t rd_kafka_message_timestamp(const rd_kafka_message_t *message,
                                   rd_kafka_timestamp_type_t *type)
{
    (void)message;
    *type = RD_KAFKA_TIMESTAMP_NOT_AVAILABLE;
    return -1;
}

rd_kafka_resp_err_t rd_kafka_message_headers(const rd_kafka_message_t *message,
                                             rd_kafka_headers_t **h)
{
    (void)message;
    if (!sent_headers)
        return RD_KAFKA_RESP_ERR__NOENT;
    *h = sent_headers;
    return RD_KAFKA_RESP_ERR_NO_ERROR;
}

/* ---- the worker ------------------------------------------------------------------------- */

/* A world whose consumer may lose its partition and get others. */
static struct world *open_world(const char *poll_ms)
{
    static char none[] = "";
    struct world *x = world_open_polled(poll_ms);
    x->c.parts = lm_calloc(1, sizeof *x->c.parts);
    *x->c.parts = x->part;
    lease_ref(x->part.lease);
    x->c.commit_queue = rd_kafka_queue_new(x->c.rk);
    x->cfg.topics_priorities = none;
    x->w.consumer = &x->c;
    return x;
}

static void close_world(struct world *x)
{
    while (x->c.n_parts)
        rebalance_remove(&x->c, &x->c.parts[0]);
    free(x->w.metrics.parts);
    free(x->c.parts);
    free(x->c.pending);
    rd_kafka_queue_destroy(x->c.commit_queue);
    world_close(x);
}

/* With an offset: a client that is destroyed while it is to ask for one leaks its request. */
static void rebalance(struct world *x, rd_kafka_resp_err_t what, const char *topic, int partition)
{
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(1);
    rd_kafka_topic_partition_list_add(l, topic, partition)->offset = 0;
    rebalance_cb(x->c.rk, what, l, &x->c);
    rd_kafka_topic_partition_list_destroy(l);
}

static void assign(struct world *x, const char *topic, int partition)
{
    rebalance(x, RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS, topic, partition);
}

/* The producer thread asks, and has its answer. */
static void ask(struct world *x, struct stage *s, enum staging_what what)
{
    x->c.staging.asked = s;
    x->c.staging.what = what;
    staging_serve(&x->c);
}

static struct job *deliver(struct world *x, int64_t offset, const char *key)
{
    struct job *j = world_deliver(x, offset, key);
    j->worker = &x->w;
    x->c.held++;
    return j;
}

/* Intake and engine, the fastest there are. True: there was one. */
static bool run_one(struct world *x)
{
    struct job *j = job_queue_take(&x->w.to_intake, 0);
    if (!j)
        return false;
    assert_null(j->next);
    worker_end_job(&x->w, j, OUTCOME_REPLY);
    return true;
}

/* delivery.order=key: who waits for the one before it waits for this thread, 10 ms at most. */
static void a_key_does_not_wait_for_records(void **state)
{
    (void)state;
    struct world *x = world_open();
    x->c.order = key_order_new();
    int idle = consumer_poll_ms(&x->c);
    assert_in_range(idle, 50, 1000);
    for (int i = 0; i < 3; i++)
        assert_int_equal(consumer_admit(&x->c, deliver(x, i, "k")), LM_OK);
    for (int i = 0; i < 3; i++) {
        assert_in_range(consumer_poll_ms(&x->c), 1, i < 2 ? 10 : idle);
        assert_true(run_one(x));
        consumer_take_finished(&x->c, 0);
    }
    assert_false(run_one(x));
    assert_int_equal(consumer_poll_ms(&x->c), idle);
    key_order_free(x->c.order);
    world_close(x);
}

static void suspects_do_not_either(void **state)
{
    (void)state;
    struct world *x = world_open();
    x->c.iso.busy = true;
    assert_in_range(consumer_poll_ms(&x->c), 1, 10);
    world_close(x);
}

/* All partitions go at once, and one prompt runs on: what ends meanwhile is committed meanwhile,
 * by the map, for a worker that is killed in the drain must not repeat it. */
static void an_eager_revocation_commits_while_it_drains(void **state)
{
    (void)state;
    struct world *x = open_world(NULL);
    x->cfg.revoke_drain_ms = 60000;
    x->cfg.commit_interval_ms = 1;
    running = deliver(x, 0, NULL);
    job_set_stage(running, JOB_RUNNING);
    struct job *other = deliver(x, 1, NULL);
    job_set_stage(other, JOB_RUNNING);
    worker_end_job(&x->w, other, OUTCOME_REPLY);
    int64_t start = lm_now_us();
    rebalance(x, RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS, "t", 0);
    assert_true(lm_now_us() - start < 50000000);        /* the last commit comes after the drain */
    assert_int_equal(commits_meanwhile, 1);
    assert_non_null(strstr(metadata, "0:"));
    assert_true(strlen(metadata) > 4);  /* it has a map */
    assert_true(atomic_load(&x->w.sweep_intake));
    job_unref(running);
    running = NULL;
    close_world(x);
}

struct transaction { struct world *x; struct stage s; bool committed, outlasts_the_wait; };

/* The producer thread, whose transaction takes a while: the group is asked before its end if it
 * outlasts the wait for it, however slow the machine. */
static void *end_transaction(void *arg)
{
    struct transaction *t = arg;
    int64_t end = lm_now_us() + (t->outlasts_the_wait ? 60 * 1000000 : 200000);
    while (!atomic_load(&asked_before) && lm_now_us() < end)
        nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
    atomic_store(&transaction_over, true);
    staging_settle(&t->x->c, &t->s, t->committed);
    return NULL;
}

/* A partition is lost and comes back while the transaction with its offset is under way: what the
 * group says of it before the end is not what it will say. */
static void offsets_are_asked_for_after_a_transaction(bool same_partition, bool committed,
                                                      bool in_time)
{
    struct world *x = open_world(in_time ? NULL : "400");
    x->c.exactly_once = true;
    struct job *j = deliver(x, 0, NULL);
    struct job *jobs[] = { j };
    enum stage_verdict verdicts[1];
    struct transaction t = { .x = x, .s = { .jobs = jobs, .verdicts = verdicts, .n = 1 },
                             .committed = committed,
                             .outlasts_the_wait = !same_partition || !in_time };
    ask(x, &t.s, STAGING_STAGE);
    assert_int_equal(t.s.n_commits, 1);
    rebalance_remove(&x->c, &x->c.parts[0]);
    atomic_store(&asked_before, 0);
    atomic_store(&asked_after, 0);
    atomic_store(&transaction_over, false);
    pthread_t producer;
    assert_int_equal(pthread_create(&producer, NULL, end_transaction, &t), 0);
    assign(x, "t", same_partition ? 0 : 1);
    assert_int_equal(atomic_load(&asked_before), t.outlasts_the_wait ? 1 : 0);
    assert_int_equal(atomic_load(&asked_after), t.outlasts_the_wait ? 0 : 1);
    while (!atomic_load(&transaction_over) || x->c.staging.open)
        staging_serve(&x->c);
    pthread_join(producer, NULL);
    stage_release(&t.s);
    job_unref(j);
    close_world(x);
}

static void a_partition_that_comes_back_waits_for_its_transaction(void **state)
{
    (void)state;
    offsets_are_asked_for_after_a_transaction(true, true, true);
    offsets_are_asked_for_after_a_transaction(true, false, true);
}

/* Of the poll interval the wait takes a quarter, and leaves time for the answer. */
static void but_not_for_ever(void **state)
{
    (void)state;
    offsets_are_asked_for_after_a_transaction(true, true, false);
}

static void another_partition_does_not(void **state)
{
    (void)state;
    offsets_are_asked_for_after_a_transaction(false, true, true);
}

#ifdef __SANITIZE_THREAD__
/*
 * A consumer that is destroyed with an assignment which it has just got makes librdkafka 2.15.1
 * take three of its own locks in both orders, in rd_kafka_destroy() and in its main thread. None of
 * them is ours, nor is one of ours held there. Off in this program only: elsewhere a cycle through
 * one of our locks and the library's must be seen.
 */
const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void)
{
    return "deadlock:librdkafka.so.1";
}
#endif

/* What a transaction that found the consumer closed had staged is released by then. */
static void an_assignment_at_the_close_reads_nothing_that_is_gone(void **state)
{
    (void)state;
    struct world *x = open_world(NULL);
    x->c.exactly_once = true;
    struct job *j = deliver(x, 0, NULL);
    struct job *jobs[] = { j };
    enum stage_verdict verdicts[1];
    struct stage s = { .jobs = jobs, .verdicts = verdicts, .n = 1 };
    ask(x, &s, STAGING_STAGE);
    assert_int_equal(s.n_commits, 1);
    atomic_store(&x->w.stopping, true);
    staging_close(&x->c);
    staging_settle(&x->c, &s, true);   /* too late */
    stage_release(&s);
    assign(x, "t", 0);
    job_unref(j);
    close_world(x);
}

/* Counts, and asks the client. */
static int assign_calls;

rd_kafka_resp_err_t rd_kafka_assign(rd_kafka_t *rk, const rd_kafka_topic_partition_list_t *l)
{
    rd_kafka_resp_err_t (*real)(rd_kafka_t *, const rd_kafka_topic_partition_list_t *) =
        (__typeof__(real))dlsym(RTLD_NEXT, "rd_kafka_assign");
    assign_calls++;
    return real(rk, l);
}

/* Nor is it taken, or answered, once the worker leaves: the client revokes all next. Except where
 * there is nothing to revoke. */
static void an_assignment_is_not_taken_by_who_leaves(void **state)
{
    (void)state;
    struct world *x = open_world(NULL);
    rd_kafka_topic_partition_list_t *nothing = rd_kafka_topic_partition_list_new(0);
    x->c.closing = true;
    assign_calls = 0;
    assign(x, "other", 0);
    rebalance_cb(x->c.rk, RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS, nothing, &x->c);
    assert_int_equal(assign_calls, 0);
    assert_int_equal(x->c.n_parts, 1);
    rebalance(x, RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS, "t", 0);
    assert_int_equal(assign_calls, 1);
    assert_int_equal(x->c.n_parts, 0);
    rebalance_cb(x->c.rk, RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS, nothing, &x->c);
    assert_int_equal(assign_calls, 2);
    rd_kafka_topic_partition_list_destroy(nothing);
    close_world(x);
}

/* What intake goes by when it counts what a prompt may generate. What of lower topics that leaves
 * pauses those, and not the most urgent. */
static void the_most_urgent_topic_is_known(void **state)
{
    (void)state;
    char priorities[] = "other=3";
    struct world *x = open_world(NULL);
    x->cfg.intake_max_messages = x->cfg.intake_max_bytes = x->cfg.in_flight_max_messages = 1000;
    x->cfg.intake_max_tokens = 4000;
    x->cfg.topics_priorities = priorities;
    assign(x, "other", 0);
    assert_int_equal(atomic_load(&x->w.most_urgent), 3);
    struct job *j = deliver(x, 0, NULL);        /* of "t" */
    worker_count_generation(&x->w, j, 100, 100);
    assert_int_equal(atomic_load(&x->w.metrics.held_tokens), 200);
    atomic_fetch_add(&x->w.metrics.held_tokens, 2750);
    worker_count_generation(&x->w, j, 100, 400);
    assert_int_equal(atomic_load(&x->w.metrics.held_tokens), 3000);
    admission_control(&x->c);
    assert_true(x->c.full[1]);
    assert_false(x->c.full[0]);
    rebalance(x, RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS, "other", 0);
    admission_apply(&x->c);
    assert_int_equal(atomic_load(&x->w.most_urgent), 0);
    worker_count_generation(&x->w, j, 100, 400);        /* nothing is more urgent */
    assert_int_equal(atomic_load(&x->w.metrics.held_tokens), 3250);
    job_unref(j);
    close_world(x);
}

/* A world that writes no maps, whose partition "other" had one when it came: 3 to 5 are done. */
static struct world *open_with_a_map(struct assigned **a)
{
    struct world *x = open_world(NULL);
    const struct offset_range finished = { 3, 6 };
    char text[OFFSET_MAP_MAX + 1];
    size_t covered;
    assert_true(offset_map_encode(1, &finished, 1, OFFSET_MAP_MAX, text, &covered) > 0);
    kept = text;
    x->c.exactly_once = true;
    x->c.map_limit = 0;
    ledger_set_map_limit(x->c.ledger, 0);
    assign(x, "other", 0);
    kept = NULL;
    *a = consumer_find(&x->c, "other", 0);
    assert_non_null(*a);
    return x;
}

/* One topic of those assigned may not be read any more: the others' maps are no less known. Nor is
 * the group asked again and again, without a pause. */
static void costs_no_other_its_map(int answered)
{
    const struct offset_range finished = { 3, 5 };
    char text[OFFSET_MAP_MAX + 1];
    size_t covered;
    struct world *x = open_world("400");
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(2);
    offset_map_encode(1, &finished, 1, OFFSET_MAP_MAX, text, &covered);
    kept = text;
    barred = "refused";
    answers_left = answered;
    int asked = atomic_load(&asked_before) + atomic_load(&asked_after);
    rd_kafka_topic_partition_list_add(l, "good", 0)->offset = 0;
    rd_kafka_topic_partition_list_add(l, "refused", 0)->offset = 0;
    rebalance_cb(x->c.rk, RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS, l, &x->c);
    rd_kafka_topic_partition_list_destroy(l);
    asked = atomic_load(&asked_before) + atomic_load(&asked_after) - asked;
    assert_in_range(asked, 1, 2);       /* in 200 ms */
    const struct assigned *good = consumer_find(&x->c, "good", 0);
    assert_true(ledger_skip(x->c.ledger, good->ref, 3));
    assert_false(ledger_skip(x->c.ledger, good->ref, 5));
    assert_false(ledger_skip(x->c.ledger, consumer_find(&x->c, "refused", 0)->ref, 3));
    kept = barred = NULL;
    answers_left = -1;
    close_world(x);
}

static void a_refused_topic_costs_no_other_its_map(void **state)
{
    (void)state;
    costs_no_other_its_map(-1);
}

/* The last question, for its sake, has what is left of the time. */
static void nor_when_the_last_question_has_no_answer(void **state)
{
    (void)state;
    costs_no_other_its_map(1);
}

/* commit.map_max_bytes=0: what the map of an earlier run holds was answered all the same. */
static void a_map_is_read_also_where_none_is_written(void **state)
{
    (void)state;
    struct assigned *a;
    struct world *x = open_with_a_map(&a);
    for (int64_t offset = 1; offset < 7; offset++)
        assert_int_equal(ledger_skip(x->c.ledger, a->ref, offset), offset >= 3 && offset < 6);
    close_world(x);
}

/* And commits hand it on, unless the broker takes none: then they go without. */
static void what_a_map_held_is_handed_on_where_the_broker_takes_it(void **state)
{
    (void)state;
    struct assigned *a;
    struct world *x = open_with_a_map(&a);
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(1);
    const struct ledger_commit due = { .ref = a->ref, .offset = 2 };
    size_t before = OFFSET_MAP_MAX, size;
    for (int tries = 0; before; before = size) {
        x->c.longest = 0;
        commit_add_offset(&x->c, a, &due, true, l);
        size = l->elems[tries].metadata_size;
        assert_true(tries ? size < before : size > 0);
        commit_too_long(&x->c);
        tries++;
    }
    rd_kafka_topic_partition_list_destroy(l);
    close_world(x);
}

/* Nor does it make room for anything else: what lies beyond the watermark waits. */
static void a_transaction_hands_on_what_a_map_held(void **state)
{
    static const int64_t at[] = { 1, 2, 7 };
    (void)state;
    struct assigned *a;
    struct world *x = open_with_a_map(&a);
    struct job *jobs[3];
    enum stage_verdict verdicts[3] = { STAGE_GONE, STAGE_GONE, STAGE_GONE };
    for (int i = 0; i < 3; i++) {
        struct record r = { .offset = at[i] };
        assert_int_equal(job_new(a->lease, &r, &jobs[i]), LM_OK);
        for (int64_t offset = 3; offset < 6 && i == 2; offset++)
            assert_true(ledger_skip(x->c.ledger, a->ref, offset));
        assert_int_equal(ledger_deliver(x->c.ledger, a->ref, at[i], job_ref(jobs[i])), LM_OK);
    }
    struct job *ended[] = { jobs[0], jobs[2] };
    struct stage s = { .jobs = ended, .verdicts = verdicts, .n = 2 };
    ask(x, &s, STAGING_STAGE);
    assert_int_equal(verdicts[0], STAGE_IN);
    assert_int_equal(verdicts[1], STAGE_WAIT);
    assert_false(s.lost);
    assert_int_equal(s.offsets->cnt, 1);
    const rd_kafka_topic_partition_t *p = &s.offsets->elems[0];
    struct offset_range *r;
    struct lm_err err;
    size_t n;
    assert_int_equal(p->offset, 2);
    assert_int_equal(offset_map_decode(p->metadata, p->metadata_size, 2, &r, &n, &err), LM_OK);
    assert_int_equal(n, 1);
    assert_int_equal(r->from, 3);
    assert_int_equal(r->to, 6);
    free(r);
    ask(x, &s, STAGING_ABORTED);
    stage_release(&s);
    for (int i = 0; i < 3; i++)
        job_unref(jobs[i]);
    close_world(x);
}

/* Within 20 bytes three runs have room beside the offset 127, and not beside 128. */
static void a_map_that_has_room_no_more_loses_what_was_sent(void **state)
{
    (void)state;
    struct world *x = open_world(NULL);
    x->c.exactly_once = true;
    x->c.map_limit = 20;
    ledger_set_map_limit(x->c.ledger, 20);
    static const int at[] = { 127, 128, 228, 229, 328, 329, 428, 429 };
    struct job *all[8];
    for (int i = 0; i < 8; i++)
        all[i] = deliver(x, at[i], NULL);
    struct job *jobs[] = { all[2], all[4], all[6], all[0] };
    enum stage_verdict verdicts[4] = { STAGE_GONE, STAGE_GONE, STAGE_GONE, STAGE_GONE };
    struct stage s = { .jobs = jobs, .verdicts = verdicts, .n = 3, .more = true };
    ask(x, &s, STAGING_STAGE);
    for (int i = 0; i < 3; i++)
        assert_int_equal(verdicts[i], STAGE_IN);
    assert_false(s.lost);
    s.from = 3;
    s.n = 4;
    s.more = false;
    ask(x, &s, STAGING_STAGE);
    assert_int_equal(verdicts[3], STAGE_IN);
    assert_true(s.lost);
    ask(x, &s, STAGING_ABORTED);
    stage_release(&s);
    for (int i = 0; i < 8; i++)
        job_unref(all[i]);
    close_world(x);
}

/* What is read is what config_check() has looked at, also with a tab in the list. */
static void expect_subscription(rd_kafka_t *rk, const char *one, const char *two)
{
    rd_kafka_topic_partition_list_t *l;
    assert_int_equal(rd_kafka_subscription(rk, &l), 0);
    assert_int_equal(l->cnt, 2);
    assert_non_null(rd_kafka_topic_partition_list_find(l, one, RD_KAFKA_PARTITION_UA));
    assert_non_null(rd_kafka_topic_partition_list_find(l, two, RD_KAFKA_PARTITION_UA));
    rd_kafka_topic_partition_list_destroy(l);
}

/* Records that come together have one stamp, but not when a rebalance was between them: what its
 * wait took is no part of what the second one's intake took. Nor does the first one wait for it.
 * And of both the bytes that came are counted, no others. */
static void a_rebalance_ends_the_stamp_of_a_burst(void **state)
{
    (void)state;
    char topics[] = "t,\t^x[y z]";
    struct lm_err err;
    struct world *x = open_world(NULL);
    x->cfg.topics_prompts = topics;
    x->cfg.commit_interval_ms = 3600000;
    x->cfg.intake_max_messages = x->cfg.intake_max_bytes = x->cfg.intake_max_tokens = 1000000;
    x->cfg.in_flight_max_messages = 1000000;
    sent_headers = rd_kafka_headers_new(1);
    rd_kafka_header_add(sent_headers, "name", -1, "xyz", 3);
    polled = x;
    assert_int_equal(consumer_start(&x->c, &err), LM_OK);
    expect_subscription(x->c.rk, "t", "^x[y z]");
    struct job *j[2] = { NULL };
    for (int i = 0; i < 2;) {
        struct job *all = job_queue_take(&x->w.to_intake, 100);
        for (; all; all = all->next)
            j[i++] = all;
    }
    assert_true(j[0]->received_us <= second_from_us);
    assert_true(j[1]->received_us >= second_from_us);
    assert_int_equal(atomic_load(&handed_over), 1);
    for (int i = 0; i < 2; i++)
        worker_end_job(&x->w, j[i], OUTCOME_DROPPED);
    consumer_join(&x->c);
    assert_int_equal(atomic_load(&x->w.metrics.consumed_bytes), 2 * (1 + 6 + 4 + 3));
    rd_kafka_headers_destroy(sent_headers);
    sent_headers = NULL;
    consumer_take_finished(&x->c, 0);
    polled = NULL;
    close_world(x);
}

/* What is let go while it is ours would wait for ever, and all behind it: the worker ends, and the
 * next one reads it again. */
static void nothing_of_ours_is_let_go(void **state)
{
    enum { OURS, REVOKED, UNKNOWN, ENDING, CASES };
    (void)state;
    for (int i = 0; i < CASES; i++) {
        struct world *x = open_world(NULL);
        struct job *j = deliver(x, 0, NULL);
        atomic_store(&j->lease->revoked, i == REVOKED);
        atomic_store(&x->w.stopping, i == ENDING);
        if (i == UNKNOWN)
            rebalance_remove(&x->c, &x->c.parts[0]);
        worker_end_job(&x->w, j, OUTCOME_DROPPED);
        consumer_take_finished(&x->c, 0);
        assert_int_equal(atomic_load(&x->w.failed), i == OURS ? LM_INTERNAL : LM_OK);
        assert_int_equal(x->c.held, 0);
        close_world(x);
    }
}

/* ---- a log that goes back ----------------------------------------------------------------- */

/* One that lost its end (unclean leader election): the client reads on where it was cut off. What
 * is at work from before that does not come again, so no commit passes it, and in exactly-once mode
 * its outcome goes into a transaction; what is at work from behind is not the record that is there
 * now. */
static void a_log_that_lost_its_end_loses_nothing_before(void **state)
{
    (void)state;
    struct lm_err err;
    static char topics[] = "t";
    struct world *x = open_world(NULL);
    struct job *old[6], *jobs[6], *read[2];
    enum stage_verdict verdicts[6];
    struct stage s = { .jobs = jobs, .verdicts = verdicts, .n = 6 };
    x->cfg.topics_prompts = topics;
    x->cfg.commit_interval_ms = 3600000;
    x->cfg.intake_max_messages = x->cfg.intake_max_bytes = x->cfg.intake_max_tokens = 1000000;
    x->cfg.in_flight_max_messages = 1000000;
    x->c.exactly_once = true;
    for (int i = 0; i < 6; i++)
        old[i] = deliver(x, i, NULL);
    polls = 0;
    first_offset = 4;
    rebalances = false;
    polled = x;
    assert_int_equal(consumer_start(&x->c, &err), LM_OK);
    for (int i = 0; i < 2;)
        for (struct job *j = job_queue_take(&x->w.to_intake, 100), *next; j; j = next) {
            next = j->next;
            read[i++] = j;
        }
    consumer_join(&x->c);
    polled = NULL;
    x->c.staging.closed = false;
    for (int i = 0; i < 6; i++)
        jobs[i] = i == 3 ? read[0] : old[i];
    ask(x, &s, STAGING_STAGE);
    for (int i = 0; i < 6; i++)
        assert_int_equal(verdicts[i], i < 4 ? STAGE_IN : STAGE_GONE);
    assert_int_equal(s.n_commits, 1);
    assert_int_equal(s.commits[0].offset, 3);   /* not beyond the old 3, with a map of the new 4 */
    ask(x, &s, STAGING_ABORTED);
    stage_release(&s);
    worker_end_job(&x->w, old[4], OUTCOME_REPLY);
    worker_end_job(&x->w, old[5], OUTCOME_REPLY);
    consumer_take_finished(&x->c, 0);
    assert_int_equal(ledger_in_flight(x->c.ledger), 6);
    for (int i = 0; i < 4; i++)
        worker_end_job(&x->w, old[i], OUTCOME_REPLY);
    consumer_take_finished(&x->c, 0);
    assert_int_equal(ledger_in_flight(x->c.ledger), 2);
    for (int i = 0; i < 2; i++)
        worker_end_job(&x->w, read[i], OUTCOME_REPLY);
    consumer_take_finished(&x->c, 0);
    assert_int_equal(ledger_in_flight(x->c.ledger), 0);
    assert_int_equal(x->c.held, 0);
    first_offset = 0;
    rebalances = true;
    close_world(x);
}

static void count_warnings(void *ctx, enum lm_level level, const char *component, const char *line)
{
    (void)component;
    (void)line;
    *(int *)ctx += level == LM_WARN;
}

/* What the next rebalance heals is no warning, by the errors of either group protocol. */
static void a_commit_of_a_stale_member_warns_of_nothing(void **state)
{
    enum { STALE_MEMBER_EPOCH = 113 };  /* KIP-848's, which older headers have not */
    static const struct { int e, warnings; } row[] = {
        { RD_KAFKA_RESP_ERR_ILLEGAL_GENERATION, 0 }, { RD_KAFKA_RESP_ERR_UNKNOWN_MEMBER_ID, 0 },
        { STALE_MEMBER_EPOCH, 0 }, { RD_KAFKA_RESP_ERR_GROUP_AUTHORIZATION_FAILED, 1 },
    };
    (void)state;
    struct world *x = open_world(NULL);
    worker_end_job(&x->w, deliver(x, 0, NULL), OUTCOME_REPLY);
    consumer_take_finished(&x->c, 0);
    for (size_t i = 0; i < LM_COUNT(row); i++) {
        int warnings = 0;
        refusal = (rd_kafka_resp_err_t)row[i].e;
        lm_log_set_sink(count_warnings, &warnings);
        commit_start(&x->c);
        lm_log_set_sink(NULL, NULL);
        assert_int_equal(atomic_load(&x->w.metrics.commit_failures), i + 1);
        assert_int_equal(warnings, row[i].warnings);
    }
    refusal = RD_KAFKA_RESP_ERR__WAIT_COORD;
    close_world(x);
}

/* ---- commits that meet a rebalance -------------------------------------------------------- */

/* A world with something to commit, and an interval that does not end. */
static struct world *open_group(const rd_kafka_resp_err_t *in_order)
{
    struct world *x = open_world(NULL);
    x->cfg.commit_interval_ms = x->cfg.revoke_drain_ms = 3600000;
    x->c.next_commit_us = INT64_MAX;
    plays_group = true;
    n_commits = 0;
    answers = in_order;
    worker_end_job(&x->w, deliver(x, 0, NULL), OUTCOME_REPLY);
    consumer_take_finished(&x->c, 0);
    return x;
}

static void close_group(struct world *x)
{
    plays_group = lost = false;
    barred = NULL;
    while (n_waits)
        rd_kafka_topic_partition_list_destroy(waits[--n_waits].offsets);
    library = 0x020f01ff;
    close_world(x);
}

static int64_t committed_offset(const struct world *x)
{
    struct ledger_info info;
    assert_true(ledger_get(x->c.ledger, x->c.parts[0].ref, &info));
    return info.committed;
}

/* Turns of the loop for so long, or until the group has taken a commit. */
static void turn(struct world *x, int ms)
{
    int64_t end = lm_now_us() + ms * 1000;
    while (lm_now_us() < end && committed_offset(x) != 1) {
        commit_serve(&x->c, 0);
        commit_tick(&x->c);
        nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
    }
}

static const rd_kafka_resp_err_t joining[] = {
    RD_KAFKA_RESP_ERR_ILLEGAL_GENERATION, RD_KAFKA_RESP_ERR_REBALANCE_IN_PROGRESS,
    (rd_kafka_resp_err_t)113 /* STALE_MEMBER_EPOCH */, RD_KAFKA_RESP_ERR_NO_ERROR,
};

/* Its topic may not be read any more, say: nobody waits for its marks then (isolation.c). */
static void a_partition_whose_commits_are_refused_is_known(void **state)
{
    static const rd_kafka_resp_err_t then_taken[] = {
        RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED, RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT,
        RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART, RD_KAFKA_RESP_ERR_NO_ERROR,
    };
    (void)state;
    struct world *x = open_group(then_taken);
    for (size_t i = 0; i < LM_COUNT(then_taken); i++) {
        commit_start(&x->c);
        commit_serve(&x->c, 0);
        assert_int_equal(x->c.parts[0].refused, i % 2 == 0);
    }
    assert_int_equal(committed_offset(x), 1);
    close_group(x);
}

/* Two partitions with something to commit, of two topics: the second one's is `other`. */
static void finish_one_each(struct world *x, int64_t offset)
{
    for (int i = 0; i < 2; i++) {
        x->part = x->c.parts[i];
        worker_end_job(&x->w, deliver(x, offset, NULL), OUTCOME_REPLY);
    }
    x->part = x->c.parts[0];
    consumer_take_finished(&x->c, 0);
}

static struct world *open_topics(void)
{
    static const rd_kafka_resp_err_t taken[] = { RD_KAFKA_RESP_ERR_NO_ERROR };
    struct world *x = open_group(taken);
    assign(x, "other", 0);
    while (commit_serve(&x->c, 0), n_waits)
        ;
    finish_one_each(x, 1);
    n_commits = 0;
    return x;
}

static int64_t committed_of(const struct world *x, int part)
{
    struct ledger_info info;
    assert_true(ledger_get(x->c.ledger, x->c.parts[part].ref, &info));
    return info.committed;
}

char *__real_lm_strdup(const char *s);
char *__wrap_lm_strdup(const char *s);
static bool no_memory;          /* for the next text */

char *__wrap_lm_strdup(const char *s)
{
    bool fails = no_memory;
    no_memory = false;
    return fails ? NULL : __real_lm_strdup(s);
}

/* An offset without the map that belongs to it would take back what the last one said. */
static void without_memory_for_its_map_an_offset_waits(void **state)
{
    (void)state;
    struct world *x = open_topics();
    struct job *first = deliver(x, 2, NULL);
    worker_end_job(&x->w, deliver(x, 3, NULL), OUTCOME_REPLY);
    consumer_take_finished(&x->c, 0);
    no_memory = true;
    commit_start(&x->c);
    assert_false(no_memory);
    assert_int_equal(n_waits, 1);               /* the other topic's has none */
    assert_int_equal(waits[0].offsets->cnt, 1);
    assert_string_equal(waits[0].offsets->elems[0].topic, "other");
    commit_serve(&x->c, 0);
    assert_int_equal(committed_of(x, 1), 2);
    commit_start(&x->c);
    assert_int_equal(n_waits, 1);
    assert_int_equal(waits[0].offsets->elems[0].offset, 2);
    assert_true(waits[0].offsets->elems[0].metadata_size > 0);
    commit_serve(&x->c, 0);
    assert_int_equal(committed_of(x, 0), 2);
    job_unref(first);
    close_group(x);
}

/* Nor is a topic that is no more, or not to be read any more, a reason to take the others' commits
 * for refused: their marks and maps wait for them, and so do prompts. Which one it is tells a
 * request of its own, at once. */
static void a_topic_that_is_refused_is_refused_alone(void **state)
{
    (void)state;
    struct world *x = open_topics();
    barred = "other";
    commit_start(&x->c);
    for (int i = 0; i < 10; i++) {
        commit_serve(&x->c, 0);
        commit_tick(&x->c);                     /* the interval does not end */
    }
    assert_int_equal(committed_of(x, 0), 2);
    assert_int_equal(committed_of(x, 1), 1);
    assert_false(x->c.parts[0].refused);
    assert_true(x->c.parts[1].refused);
    assert_int_equal(n_commits, 3);
    finish_one_each(x, 2);
    commit_start(&x->c);
    assert_int_equal(n_commits, 5);
    commit_serve(&x->c, 0);
    commit_serve(&x->c, 0);
    assert_int_equal(committed_of(x, 0), 3);
    assert_int_equal(committed_of(x, 1), 1);
    barred = NULL;
    for (int i = 3; i < 5; i++) {               /* once it is taken they go together again */
        finish_one_each(x, i);
        commit_start(&x->c);
        commit_serve(&x->c, 0);
        commit_serve(&x->c, 0);
        assert_int_equal(committed_of(x, 0), i + 1);
        assert_int_equal(committed_of(x, 1), i + 1);
        assert_false(x->c.parts[1].refused);
    }
    assert_int_equal(n_commits, 8);
    close_group(x);
}

/* The group refuses what it was sent of "t" for that, and "other" for itself; the client gives the
 * last one's to the request. Returns the length of the first one's metadata. */
static size_t refuse_both(struct world *x, rd_kafka_resp_err_t e)
{
    commit_start(&x->c);
    assert_int_equal(n_waits, 1);
    rd_kafka_topic_partition_list_t *l = waits[0].offsets;
    rd_kafka_topic_partition_t *first = rd_kafka_topic_partition_list_find(l, "t", 0);
    first->err = e;
    rd_kafka_topic_partition_list_find(l, "other", 0)->err =
        RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
    size_t len = first->metadata_size;
    n_waits = 0;
    waits[0].cb(NULL, e, l, waits[0].opaque);
    rd_kafka_topic_partition_list_destroy(l);
    return len;
}

/* What the others are refused for is heard, whatever the request holds besides. */
static void nor_is_what_else_is_refused_overlooked(void **state)
{
    (void)state;
    struct world *x = open_topics();
    struct job *first = deliver(x, 2, NULL);
    worker_end_job(&x->w, deliver(x, 3, NULL), OUTCOME_REPLY);
    consumer_take_finished(&x->c, 0);
    refuse_both(x, RD_KAFKA_RESP_ERR_REBALANCE_IN_PROGRESS);
    assert_in_range(x->c.again_ms, 1, 160);     /* it goes again soon */
    size_t sent = refuse_both(x, RD_KAFKA_RESP_ERR_OFFSET_METADATA_TOO_LARGE);
    assert_in_range(sent, 1, OFFSET_MAP_MAX);
    assert_in_range(x->c.map_limit, 0, sent - 1);
    assert_true(x->c.parts[1].refused);
    job_unref(first);
    close_group(x);
}

/* The last commit doesn't end in doubt either. */
static void nor_at_the_end(void **state)
{
    (void)state;
    struct world *x = open_topics();
    barred = "t";
    commit_now(&x->c);
    assert_int_equal(committed_of(x, 0), 1);
    assert_int_equal(committed_of(x, 1), 2);
    assert_int_equal(n_commits, 3);
    close_group(x);
}

/* It does not wait for its next interval, and after it is taken the interval is the interval. */
static void a_commit_that_meets_a_rebalance_goes_again_soon(void **state)
{
    (void)state;
    struct world *x = open_group(joining);
    commit_start(&x->c);
    assert_int_equal(n_commits, 1);
    turn(x, 10000);
    assert_int_equal(n_commits, 4);
    assert_int_equal(committed_offset(x), 1);
    assert_int_equal(atomic_load(&x->w.metrics.commit_failures), 3);
    assert_in_range(consumer_poll_ms(&x->c), 50, 1000);
    worker_end_job(&x->w, deliver(x, 1, NULL), OUTCOME_REPLY);
    consumer_take_finished(&x->c, 0);
    for (int i = 0; i < 50; i++)
        commit_tick(&x->c);
    assert_int_equal(n_commits, 4);
    close_group(x);
}

/* The pauses grow, to a bound; meanwhile the thread looks often enough. */
static void but_not_without_a_pause(void **state)
{
    static const rd_kafka_resp_err_t always[] = { RD_KAFKA_RESP_ERR_REBALANCE_IN_PROGRESS };
    (void)state;
    struct world *x = open_group(always);
    int64_t most = 0;
    for (int i = 0; i < 10; i++) {
        x->c.next_commit_us = INT64_MAX;
        answers = always;
        commit_start(&x->c);
        commit_serve(&x->c, 0);
        int64_t ms = (x->c.next_commit_us - lm_now_us()) / 1000;
        assert_true(x->c.again_ms >= 20 && x->c.again_ms <= 160 && ms <= x->c.again_ms);
        assert_true(x->c.again_ms > most || most == 160);
        assert_in_range(consumer_poll_ms(&x->c), 1, 10);
        most = x->c.again_ms;
    }
    close_group(x);
}

/* What else is refused, for itself, takes nothing from that. */
static void a_topic_that_is_refused_gives_up_no_other(void **state)
{
    (void)state;
    struct world *x = open_topics();
    barred = "other";
    commit_now(&x->c);
    assert_true(x->c.parts[1].apart);
    finish_one_each(x, 2);
    answers = joining;
    commit_now(&x->c);
    assert_int_equal(committed_of(x, 0), 3);
    assert_int_equal(x->c.again_ms, 0);
    close_group(x);
}

/* Librdkafka below 2.10 would lose its partitions by it. */
static void an_old_library_waits_for_the_interval(void **state)
{
    (void)state;
    struct world *x = open_group(joining);
    library = 0x020901ff;
    commit_start(&x->c);
    turn(x, 300);
    assert_int_equal(n_commits, 1);
    x->c.next_commit_us = 0;
    turn(x, 300);
    assert_int_equal(n_commits, 2);
    close_group(x);
}

/* The last commits, of a worker that ends or of a partition that goes, do not give up either. */
static void the_last_commit_goes_until_it_is_taken(void **state)
{
    (void)state;
    struct world *x = open_group(joining);
    commit_now(&x->c);
    assert_int_equal(n_commits, 4);
    assert_int_equal(committed_offset(x), 1);
    commit_now(&x->c);                          /* there is nothing to say */
    assert_int_equal(n_commits, 4);
    close_group(x);
}

/* Its new owner commits. An empty group would believe anybody. */
static void nobody_commits_what_is_lost(void **state)
{
    (void)state;
    struct world *x = open_group(joining);
    commit_start(&x->c);
    lost = true;
    turn(x, 100);
    commit_now(&x->c);
    assert_int_equal(n_commits, 1);
    close_group(x);
}

/* After either callback the client may join, and until that is over nothing is committed. */
static void what_stays_is_committed_before_a_join(void **state)
{
    (void)state;
    struct world *x = open_group(&joining[3]);
    assign(x, "other", 0);
    assert_int_equal(n_commits, 1);
    commit_serve(&x->c, 0);
    assert_int_equal(committed_offset(x), 1);
    worker_end_job(&x->w, deliver(x, 1, NULL), OUTCOME_REPLY);
    consumer_take_finished(&x->c, 0);
    rebalance(x, RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS, "other", 0);
    assert_int_equal(n_commits, 2);
    assert_string_equal(committed_topic, "t");
    assert_int_equal(committed_offset(x), 2);
    close_group(x);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_key_does_not_wait_for_records), cmocka_unit_test(suspects_do_not_either),
        cmocka_unit_test(an_eager_revocation_commits_while_it_drains),
        cmocka_unit_test(a_partition_that_comes_back_waits_for_its_transaction),
        cmocka_unit_test(but_not_for_ever),
        cmocka_unit_test(a_rebalance_ends_the_stamp_of_a_burst),
        cmocka_unit_test(another_partition_does_not),
        cmocka_unit_test(nothing_of_ours_is_let_go),
        cmocka_unit_test(a_log_that_lost_its_end_loses_nothing_before),
        cmocka_unit_test(the_most_urgent_topic_is_known),
        cmocka_unit_test(a_refused_topic_costs_no_other_its_map),
        cmocka_unit_test(nor_when_the_last_question_has_no_answer),
        cmocka_unit_test(a_map_is_read_also_where_none_is_written),
        cmocka_unit_test(what_a_map_held_is_handed_on_where_the_broker_takes_it),
        cmocka_unit_test(a_transaction_hands_on_what_a_map_held),
        cmocka_unit_test(a_map_that_has_room_no_more_loses_what_was_sent),
        cmocka_unit_test(an_assignment_at_the_close_reads_nothing_that_is_gone),
        cmocka_unit_test(an_assignment_is_not_taken_by_who_leaves),
        cmocka_unit_test(a_commit_of_a_stale_member_warns_of_nothing),
        cmocka_unit_test(a_partition_whose_commits_are_refused_is_known),
        cmocka_unit_test(a_topic_that_is_refused_is_refused_alone),
        cmocka_unit_test(without_memory_for_its_map_an_offset_waits),
        cmocka_unit_test(nor_is_what_else_is_refused_overlooked),
        cmocka_unit_test(nor_at_the_end),
        cmocka_unit_test(a_topic_that_is_refused_gives_up_no_other),
        cmocka_unit_test(a_commit_that_meets_a_rebalance_goes_again_soon),
        cmocka_unit_test(but_not_without_a_pause),
        cmocka_unit_test(an_old_library_waits_for_the_interval),
        cmocka_unit_test(the_last_commit_goes_until_it_is_taken),
        cmocka_unit_test(nobody_commits_what_is_lost),
        cmocka_unit_test(what_stays_is_committed_before_a_join),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
