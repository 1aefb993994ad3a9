/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_quarantine.c - marks by example; then a simulated pool over random histories: owners
 * start, finish, commit (some commits fail, applied or not), hand over in order or die, of poison
 * prompts or of nothing in particular. What holds always:
 *
 *   - what is in an engine lies below the fence of the mark that is committed
 *   - every prompt ends, and poison ends as poison
 *   - nothing else does, unless workers died twice while the committed mark named it alone
 *   - without deaths of another cause, a poison prompt costs at most max + 1 workers
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "worker/consumer_int.h"
#include "worker/quarantine.h"

/* ---- text ------------------------------------------------------------------------------- */

/* Field by field: padding has any value. */
static void same(const struct quarantine_mark *a, const struct quarantine_mark *b)
{
    assert_int_equal(a->fence, b->fence);
    assert_int_equal(a->until, b->until);
    assert_int_equal(a->suspect, b->suspect);
    assert_int_equal(a->owner, b->owner);
    assert_int_equal(a->deaths, b->deaths);
    assert_int_equal(a->alone, b->alone);
    assert_int_equal(a->idle, b->idle);
    assert_int_equal(a->solo, b->solo);
}

static void test_text(void **state)
{
    (void)state;
    char text[QUARANTINE_TEXT_MAX + 1];
    struct quarantine_mark got;
    const struct quarantine_mark m = { .fence = 300, .until = 290, .suspect = 101, .owner = 0xabcd,
                                       .deaths = 3, .alone = 1, .solo = true };
    size_t n = quarantine_text(&m, 100, text);
    assert_int_equal(n, strlen(text));
    assert_string_equal(text, "lq1:64.c8.be.2.3.1.abcd.2.bedf6bd8");
    assert_int_equal(quarantine_parse(text, n, 100, &got), LM_OK);
    same(&got, &m);
    assert_int_equal(quarantine_parse(text, n, 99, &got), LM_MISMATCH);
    for (size_t i = 4; i < n; i++) {            /* each character counts */
        char was = text[i];
        text[i] = was == '0' ? '1' : '0';
        assert_int_equal(quarantine_parse(text, n, 100, &got), LM_FORMAT);
        text[i] = was;
        assert_int_equal(quarantine_parse(text, i, 100, &got), LM_FORMAT);
    }
    assert_int_equal(quarantine_parse("lm1:AMCEPQIBAqcCJ3a-kw", 22, 1, &got), LM_NOT_FOUND);
    assert_int_equal(quarantine_parse("", 0, 1, &got), LM_NOT_FOUND);
}

static void test_extremes(void **state)
{
    (void)state;
    char text[QUARANTINE_TEXT_MAX + 1];
    struct quarantine_mark got;
    struct quarantine_mark m = { .fence = INT64_MAX, .until = INT64_MAX, .suspect = INT64_MAX - 1,
                                 .owner = UINT32_MAX, .deaths = 1000, .alone = 1000, .idle = true };
    size_t n = quarantine_text(&m, 0, text);
    assert_true(n <= QUARANTINE_TEXT_MAX);
    assert_int_equal(quarantine_parse(text, n, 0, &got), LM_OK);
    same(&got, &m);
    m.deaths = 0;                               /* idle, and nobody suspected: nothing to say */
    assert_int_equal(quarantine_text(&m, 0, text), 0);
    m = (struct quarantine_mark){ .fence = -1, .until = -1, .suspect = -1 };
    assert_true(quarantine_text(&m, 50, text) > 0);
    assert_int_equal(quarantine_parse(text, strlen(text), 50, &got), LM_OK);
    assert_int_equal(got.fence, 50);            /* nothing at or beyond 50 was started */
    assert_int_equal(got.suspect, -1);
}

/* ---- one partition, one pool ------------------------------------------------------------ */

enum { RECORDS = 60, MAX_ENGINE = 12 };
enum fate { OPEN, IN_ENGINE, DONE, REFUSED };

/* A commit whose answer is not here yet. */
struct flight {
    bool on, applied;
    enum fate fate[RECORDS];
    int64_t base;
    struct quarantine_mark mark;
};

struct pool {
    struct flight flight;
    int max;
    bool accidents;             /* workers die of other causes too */
    enum fate fate[RECORDS], committed[RECORDS];
    bool poison[RECORDS];
    int alone_deaths[RECORDS];  /* by our own account */
    int64_t end;                /* of the log, so far */
    int64_t base;
    char text[QUARANTINE_TEXT_MAX + 1];
    int deaths, owners;
    struct quarantine q;
    int64_t delivered;
    int in_engine, turns;
};

static bool chance(int percent)
{
    return rand() % 100 < percent;
}

static int64_t watermark(const struct pool *p)
{
    int64_t at = p->base;
    while (at < RECORDS && p->fate[at] >= DONE)
        at++;
    return at;
}

static int64_t fence_for(struct pool *p, int64_t solo)
{
    if (solo >= 0)
        return LM_MAX(quarantine_fence(&p->q), solo + 1);
    if (quarantine_level(&p->q) == QUARANTINE_FREE)
        return quarantine_reserve(&p->q, p->delivered - 1);
    int64_t fence = quarantine_fence(&p->q);
    for (int64_t o = p->base, room = 3 - p->in_engine; o < p->delivered && room > 0; o++)
        if (p->fate[o] == OPEN && o >= fence) {
            fence = o + 1;
            room--;
        }
    return fence;
}

/* The commit under way reaches the broker, if it has not yet. */
static void apply(struct pool *p)
{
    struct flight *f = &p->flight;
    if (!f->on || f->applied)
        return;
    f->applied = true;
    memcpy(p->committed, f->fate, sizeof f->fate);
    p->base = f->base;
    quarantine_text(&f->mark, f->base, p->text);
}

/* Its answer comes, unless it gets lost, or the commit itself. */
static bool settle(struct pool *p)
{
    if (!p->flight.on)
        return false;
    if (!chance(10))
        apply(p);
    bool told = p->flight.applied && !chance(5);
    quarantine_answer(&p->q, told);
    p->flight.on = false;
    return told;
}

static void send_commit(struct pool *p, bool idle, int64_t solo)
{
    settle(p);
    quarantine_progress(&p->q, watermark(p));
    quarantine_ask(&p->q, fence_for(p, solo), idle, solo >= 0);
    p->flight = (struct flight){ .on = true, .base = watermark(p), .mark = p->q.asked };
    memcpy(p->flight.fate, p->fate, sizeof p->fate);
    if (chance(50))
        apply(p);
}

static bool commit(struct pool *p, bool idle, int64_t solo)
{
    send_commit(p, idle, solo);
    return settle(p);
}

static void check_fence(const struct pool *p)
{
    struct quarantine_mark m;
    int n = 0;
    for (int64_t o = 0; o < RECORDS; o++)
        n += p->fate[o] == IN_ENGINE;
    if (!n)
        return;
    assert_int_equal(quarantine_parse(p->text, strlen(p->text), p->base, &m), LM_OK);
    assert_false(m.idle);
    for (int64_t o = 0; o < RECORDS; o++)
        if (p->fate[o] == IN_ENGINE)
            assert_true(o < m.fence);
}

static void die(struct pool *p)
{
    struct quarantine_mark m;
    if (chance(50))
        apply(p);
    if (!quarantine_parse(p->text, strlen(p->text), p->base, &m) && m.solo)
        p->alone_deaths[m.suspect]++;
    p->deaths++;
}

/* True: the worker is dead. */
static bool run_alone(struct pool *p, int64_t o)
{
    if (p->in_engine)
        return false;
    quarantine_single_out(&p->q, o);
    if (!commit(p, false, o) || watermark(p) > o)
        return false;
    p->fate[o] = IN_ENGINE;
    p->in_engine = 1;
    check_fence(p);
    if (p->poison[o] || (p->accidents && chance(5))) {
        die(p);
        return true;
    }
    p->fate[o] = DONE;
    p->in_engine = 0;
    return false;
}

static bool start_one(struct pool *p)
{
    int64_t o = p->base;
    while (o < p->delivered && p->fate[o] != OPEN)
        o++;
    if (o >= p->delivered)
        return false;
    if (quarantine_condemns(&p->q, o)) {
        assert_true(p->poison[o] || p->alone_deaths[o] >= 2);
        p->fate[o] = REFUSED;
        return false;
    }
    if (quarantine_suspects(&p->q, o))
        return run_alone(p, o);
    if (p->in_engine < MAX_ENGINE && quarantine_may_start(&p->q, o)) {
        p->fate[o] = IN_ENGINE;
        p->in_engine++;
    } else if (!quarantine_may_start(&p->q, o)) {
        commit(p, false, -1);
    }
    return false;
}

/* True: a poison prompt was there. */
static bool finish_some(struct pool *p)
{
    for (int64_t o = 0; o < RECORDS; o++) {
        if (p->fate[o] != IN_ENGINE || !chance(40))
            continue;
        if (p->poison[o]) {
            die(p);
            return true;
        }
        p->fate[o] = DONE;
        p->in_engine--;
    }
    return false;
}

/* What a worker did and did not commit is undone with it. */
static void next_owner(struct pool *p)
{
    struct quarantine_mark m;
    p->flight.on = false;
    memcpy(p->fate, p->committed, sizeof p->fate);
    for (int64_t o = 0; o < RECORDS; o++)
        if (p->fate[o] == IN_ENGINE)
            p->fate[o] = OPEN;
    p->in_engine = 0;
    p->delivered = p->base;
    p->owners++;
    quarantine_init(&p->q, p->max, (uint32_t)p->owners);
    lm_status st = quarantine_parse(p->text, strlen(p->text), p->base, &m);
    assert_true(st == LM_OK || st == LM_NOT_FOUND);
    quarantine_adopt(&p->q, st ? NULL : &m, p->base);
}

/* One owner, from its assignment to its death or its orderly end. */
static void live(struct pool *p)
{
    next_owner(p);
    for (;;) {
        if (p->end < RECORDS && chance(60))
            p->end++;
        if (p->delivered < p->end && chance(80))
            p->delivered++;
        quarantine_progress(&p->q, watermark(p));
        if (start_one(p) || finish_some(p))
            return;
        check_fence(p);
        if (chance(20))
            send_commit(p, false, -1);
        if (chance(30))
            settle(p);
        if (p->accidents && chance(1)) {
            die(p);
            return;
        }
        if (chance(2) || watermark(p) == RECORDS) {
            p->in_engine = 0;   /* handed back */
            for (int64_t o = 0; o < RECORDS; o++)
                if (p->fate[o] == IN_ENGINE)
                    p->fate[o] = OPEN;
            while (!commit(p, true, -1))
                ;
            return;
        }
    }
}

static void one_history(int max, int n_poison, bool accidents)
{
    struct pool p = { .max = max, .accidents = accidents };
    int poison = 0;
    for (int i = 0; i < n_poison; i++)
        p.poison[rand() % RECORDS] = true;
    for (int64_t o = 0; o < RECORDS; o++)
        poison += p.poison[o];
    while (p.base < RECORDS) {
        live(&p);
        assert_true(p.owners < 2000);
    }
    for (int64_t o = 0; o < RECORDS; o++)
        assert_true(p.committed[o] == (p.poison[o] ? REFUSED : DONE) ||
                    (p.alone_deaths[o] >= 2 && p.committed[o] == REFUSED));
    if (!accidents)
        assert_true(p.deaths <= poison * (max + 1));
}

static void test_pool(void **state)
{
    (void)state;
    srand(11);
    for (int i = 0; i < 8000; i++)
        one_history(2 + i % 4, i % 3, false);
}

static void test_pool_with_accidents(void **state)
{
    (void)state;
    srand(12);
    for (int i = 0; i < 8000; i++)
        one_history(2 + i % 4, i % 2, true);
}

/* ---- by example ------------------------------------------------------------------------- */

static const struct quarantine_mark at_work = { .fence = 150, .until = -1, .suspect = -1,
                                                .owner = 1 };

static struct quarantine adopt(const struct quarantine_mark *m, int64_t base, bool died)
{
    struct quarantine q;
    quarantine_init(&q, 3, 7);
    assert_int_equal(quarantine_adopt(&q, m, base), died);
    return q;
}

static void test_what_is_a_death(void **state)
{
    (void)state;
    struct quarantine_mark m = at_work;
    struct quarantine q = adopt(NULL, 100, false);
    assert_int_equal(quarantine_level(&q), QUARANTINE_FREE);
    assert_false(quarantine_may_start(&q, 100));        /* first a fence */
    q = adopt(&m, 100, true);
    assert_int_equal(quarantine_level(&q), QUARANTINE_BY_WINDOW);
    assert_int_equal(q.until, 150);
    adopt(&m, 150, false);                              /* nothing was started */
    m.idle = true;
    adopt(&m, 100, false);
    m.idle = false;
    m.owner = 7;                                        /* we are not dead */
    adopt(&m, 100, false);
    m = (struct quarantine_mark){ .fence = 120, .until = 110, .suspect = -1, .deaths = 1 };
    q = adopt(&m, 110, true);                           /* past the old suspects: new ones */
    assert_int_equal(q.deaths, 1);
    q = adopt(&m, 109, true);
    assert_int_equal(q.deaths, 2);
    assert_int_equal(q.until, 110);
    m.idle = true;                                      /* in order: the count stays */
    q = adopt(&m, 109, false);
    assert_int_equal(q.deaths, 1);
}

static void test_off(void **state)
{
    (void)state;
    struct quarantine q;
    quarantine_init(&q, 0, 7);
    assert_false(quarantine_adopt(&q, &at_work, 100));
    assert_true(quarantine_may_start(&q, INT64_MAX));
}

static void test_reserve_follows_the_pace(void **state)
{
    (void)state;
    struct quarantine q;
    quarantine_init(&q, 3, 7);
    assert_int_equal(quarantine_reserve(&q, 1000), 1001 + QUARANTINE_RESERVE_MIN);
    assert_int_equal(quarantine_reserve(&q, 1010), 1011 + QUARANTINE_RESERVE_MIN);
    assert_int_equal(quarantine_reserve(&q, 2010), 2011 + 4000);
    assert_int_equal(quarantine_reserve(&q, INT64_MAX), INT64_MAX);
}

/* What a commit will set free is in the intake's budget; what waits for suspects is not. */
static void test_held_prompts_count(void **state)
{
    (void)state;
    struct assigned parts[2] = { { .partition = 0 }, { .partition = 1 } };
    struct job jobs[3] = { 0 };
    consumer c = { .parts = parts, .n_parts = 2 };
    for (int i = 0; i < 2; i++)
        quarantine_init(&parts[i].q, 3, 7);
    assert_int_equal(isolation_waiting(&c), 0);
    for (int i = 0; i < 3; i++) {
        jobs[i].record.offset = 20 + i;
        assert_true(isolation_hold(&c, &parts[i % 2], &jobs[i]));
    }
    assert_int_equal(isolation_waiting(&c), 3);
    parts[1].q.deaths = 1;
    assert_int_equal(isolation_waiting(&c), 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_text),
        cmocka_unit_test(test_extremes),
        cmocka_unit_test(test_what_is_a_death),
        cmocka_unit_test(test_off),
        cmocka_unit_test(test_reserve_follows_the_pace),
        cmocka_unit_test(test_held_prompts_count),
        cmocka_unit_test(test_pool),
        cmocka_unit_test(test_pool_with_accidents),
    };
    return cmocka_run_group_tests_name("quarantine", tests, NULL, NULL);
}
