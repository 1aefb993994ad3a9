/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_ledger.c - the ledger by example, then against a naive model over random histories:
 * assign, revoke, deliver with gaps, cut and rewind, finish out of order, finish late with a stale
 * epoch, commit. The model keeps every delivered offset in a flat array and computes each answer
 * anew. One history is long, for what takes many operations to come about; two million are short,
 * each from an empty ledger, for all the ways to begin.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "worker/ledger.h"

static int dropped;

static void count_drop(void *ctx, int64_t offset, void *user)
{
    (void)ctx;
    (void)offset;
    (void)user;
    dropped++;
}

static struct ledger_ref assign(ledger *l, int32_t partition, int64_t committed)
{
    struct ledger_ref ref;
    assert_int_equal(ledger_assign(l, "prompts", partition, committed, &ref), LM_OK);
    return ref;
}

static void deliver(ledger *l, struct ledger_ref ref, int64_t offset)
{
    assert_int_equal(ledger_deliver(l, ref, offset, NULL), LM_OK);
}

static void finish(ledger *l, struct ledger_ref ref, int64_t offset)
{
    assert_int_equal(ledger_complete(l, ref, offset, NULL), LM_OK);
}

/* The offset to commit, map or no map; LEDGER_NONE when its value is not new. */
static int64_t commit_value(const ledger *l, struct ledger_ref ref)
{
    struct ledger_commit c;
    struct ledger_info info;
    if (!ledger_due(l, ref, false, &c) || !ledger_get(l, ref, &info))
        return LEDGER_NONE;
    return c.offset > info.committed ? c.offset : LEDGER_NONE;
}

static void accept(ledger *l, struct ledger_ref ref, int64_t value)
{
    struct ledger_commit c = { 0 };
    ledger_due(l, ref, false, &c);
    c.ref = ref;
    c.offset = value;
    c.version = 0;
    ledger_committed(l, &c);
}

static void test_watermark_skips_gaps(void **state)
{
    (void)state;
    ledger *l = ledger_new(NULL, NULL, OFFSET_MAP_MAX);
    struct ledger_ref r = assign(l, 0, 10);
    assert_int_equal(commit_value(l, r), LEDGER_NONE);
    static const int64_t offsets[] = { 10, 11, 14, 15, 19 };
    for (size_t i = 0; i < LM_COUNT(offsets); i++)
        deliver(l, r, offsets[i]);
    finish(l, r, 14);
    finish(l, r, 19);
    assert_int_equal(commit_value(l, r), LEDGER_NONE);   /* 10 is unfinished and committed */
    finish(l, r, 10);
    assert_int_equal(commit_value(l, r), 11);
    finish(l, r, 11);
    assert_int_equal(commit_value(l, r), 15);            /* not 12: nothing is there */
    finish(l, r, 15);
    assert_int_equal(commit_value(l, r), 20);
    ledger_free(l);
}

static void test_idle_commits_position(void **state)
{
    (void)state;
    ledger *l = ledger_new(NULL, NULL, OFFSET_MAP_MAX);
    struct ledger_ref r = assign(l, 0, LEDGER_NONE);
    ledger_position(l, r, 7);
    assert_int_equal(commit_value(l, r), LEDGER_NONE);   /* nothing confirms it */
    deliver(l, r, 10);
    ledger_position(l, r, 11);
    assert_int_equal(commit_value(l, r), 10);    /* in flight: nothing beyond its head */
    finish(l, r, 10);
    ledger_position(l, r, 12);                          /* past a transaction marker at 11 */
    assert_int_equal(commit_value(l, r), 12);
    accept(l, r, 12);
    assert_int_equal(commit_value(l, r), LEDGER_NONE);
    ledger_free(l);
}

static void test_commit_is_monotonic(void **state)
{
    (void)state;
    ledger *l = ledger_new(NULL, NULL, OFFSET_MAP_MAX);
    struct ledger_ref r = assign(l, 0, 100);
    deliver(l, r, 100);
    deliver(l, r, 101);
    finish(l, r, 100);
    accept(l, r, 101);
    accept(l, r, 90);
    struct ledger_info info;
    assert_true(ledger_get(l, r, &info));
    assert_int_equal(info.committed, 101);
    assert_int_equal(info.in_flight, 1);
    ledger_free(l);
}

static void test_stale_epoch_changes_nothing(void **state)
{
    (void)state;
    dropped = 0;
    ledger *l = ledger_new(count_drop, NULL, OFFSET_MAP_MAX);
    struct ledger_ref old = assign(l, 3, 0);
    deliver(l, old, 0);
    deliver(l, old, 1);
    finish(l, old, 1);
    assert_int_equal(ledger_revoke(l, old), LM_OK);
    assert_int_equal(dropped, 1);
    assert_int_equal(ledger_revoke(l, old), LM_CANCELLED);
    struct ledger_ref now = assign(l, 3, 0);
    assert_int_equal(now.slot, old.slot);
    deliver(l, now, 0);
    assert_int_equal(ledger_complete(l, old, 0, NULL), LM_CANCELLED);
    accept(l, old, 50);
    ledger_position(l, old, 50);
    assert_int_equal(commit_value(l, old), LEDGER_NONE);
    assert_int_equal(commit_value(l, now), LEDGER_NONE);
    assert_int_equal(ledger_in_flight(l), 1);
    assert_int_equal(ledger_complete(l, now, 5, NULL), LM_NOT_FOUND);
    finish(l, now, 0);
    assert_int_equal(ledger_complete(l, now, 0, NULL), LM_NOT_FOUND);
    assert_int_equal(commit_value(l, now), 1);
    ledger_free(l);
}

static void test_rewind_starts_over(void **state)
{
    (void)state;
    dropped = 0;
    ledger *l = ledger_new(count_drop, NULL, OFFSET_MAP_MAX);
    struct ledger_ref r = assign(l, 0, 500);
    deliver(l, r, 500);
    deliver(l, r, 501);
    struct ledger_ref old = r;
    assert_int_equal(ledger_deliver(l, r, 501, NULL), LM_STATE);
    assert_int_equal(ledger_deliver(l, r, 0, NULL), LM_STATE);  /* the topic was made again */
    assert_int_equal(ledger_rewind(l, &r), LM_OK);
    assert_int_equal(ledger_rewind(l, &old), LM_CANCELLED);
    deliver(l, r, 0);
    assert_true(r.epoch != old.epoch);
    assert_int_equal(dropped, 2);
    assert_int_equal(ledger_complete(l, old, 500, NULL), LM_CANCELLED);
    finish(l, r, 0);
    assert_int_equal(commit_value(l, r), 1);
    r = assign(l, 1, 500);
    assert_int_equal(ledger_deliver(l, r, 20, NULL), LM_STATE);     /* below what was committed */
    assert_int_equal(ledger_rewind(l, &r), LM_OK);
    deliver(l, r, 20);
    finish(l, r, 20);
    assert_int_equal(commit_value(l, r), 21);
    ledger_free(l);
}

/* A log that lost its end and was written on: what is unfinished before that holds the watermark,
 * what comes at offsets that were there before is another record. */
static void test_a_cut_keeps_what_lies_before(void **state)
{
    (void)state;
    static int jobs[10], again;
    struct ledger_commit c;
    void *user;
    dropped = 0;
    ledger *l = ledger_new(count_drop, NULL, OFFSET_MAP_MAX);
    struct ledger_ref r = assign(l, 0, 0);
    for (int64_t i = 0; i < 10; i++)
        assert_int_equal(ledger_deliver(l, r, i, &jobs[i]), LM_OK);
    for (int64_t i = 3; i < 8; i++)
        finish(l, r, i);                        /* 0, 1, 2 and 8, 9 are at work */
    accept(l, r, 0);
    assert_int_equal(ledger_cut(l, r, 0), LM_NOT_FOUND);
    assert_int_equal(ledger_deliver(l, r, 6, &again), LM_STATE);
    assert_int_equal(ledger_cut(l, r, 6), LM_OK);
    assert_int_equal(dropped, 2);
    assert_true(ledger_due(l, r, false, &c));   /* a map without 6 and 7 */
    assert_int_equal(c.offset, 0);
    assert_int_equal(ledger_deliver(l, r, 6, &again), LM_OK);
    assert_null(ledger_user(l, r, 8));
    assert_ptr_equal(ledger_user(l, r, 6), &again);
    assert_ptr_equal(ledger_user(l, r, 2), &jobs[2]);
    assert_int_equal(ledger_complete(l, r, 8, NULL), LM_NOT_FOUND);
    finish(l, r, 0);
    finish(l, r, 2);
    assert_int_equal(commit_value(l, r), 1);
    finish(l, r, 1);
    assert_int_equal(commit_value(l, r), 6);
    assert_int_equal(ledger_complete(l, r, 6, &user), LM_OK);
    assert_ptr_equal(user, &again);
    assert_int_equal(commit_value(l, r), 7);
    assert_int_equal(ledger_cut(l, r, 3), LM_NOT_FOUND);
    ledger_revoke(l, r);
    assert_int_equal(ledger_cut(l, r, 3), LM_CANCELLED);
    assert_null(ledger_user(l, r, 6));
    assert_int_equal(dropped, 2);
    ledger_free(l);
}

/* Nor is a record of before a reason to pass over the new one at its offset. */
static void test_a_cut_ends_what_was_restored(void **state)
{
    (void)state;
    static const struct offset_range known[] = { { 2, 4 }, { 6, 9 }, { 12, 14 } };
    ledger *l = ledger_new(NULL, NULL, OFFSET_MAP_MAX);
    struct ledger_ref r = assign(l, 0, 0);
    assert_int_equal(ledger_restore(l, r, known, 3), LM_OK);
    for (int64_t i = 0; i < 9; i++)
        if (!ledger_skip(l, r, i))
            deliver(l, r, i);
    assert_int_equal(ledger_cut(l, r, 7), LM_OK);
    for (int64_t i = 7; i < 14; i++) {
        assert_false(ledger_skip(l, r, i));
        deliver(l, r, i);
    }
    struct ledger_info info;
    assert_true(ledger_get(l, r, &info));
    assert_int_equal(info.in_flight, 2 + 2 + 7);
    ledger_free(l);
}

/* A transaction has offsets beyond what is unfinished, until its jobs are completed. When the log
 * is cut meanwhile, the group has an offset beyond the cut: new records come below it, and the next
 * commit goes back. */
static void cut_a_transaction(bool committed_before)
{
    struct ledger_commit c, next;
    ledger *l = ledger_new(NULL, NULL, OFFSET_MAP_MAX);
    struct ledger_ref r = assign(l, 0, 0);
    for (int64_t i = 0; i < 10; i++) {
        deliver(l, r, i);
        assert_int_equal(ledger_stage(l, r, i, true), LM_OK);
    }
    assert_true(ledger_due(l, r, true, &c));
    assert_int_equal(c.offset, 10);
    if (committed_before)
        ledger_committed(l, &c);
    assert_int_equal(ledger_cut(l, r, 6), LM_OK);
    if (!committed_before)
        ledger_committed(l, &c);
    for (int64_t i = 6; i < 9; i++)
        deliver(l, r, i);
    for (int64_t i = 0; i < 6; i++)
        finish(l, r, i);
    assert_true(ledger_due(l, r, true, &next));
    assert_int_equal(next.offset, 6);
    ledger_committed(l, &next);
    assert_false(ledger_due(l, r, true, &next));
    ledger_free(l);
}

static void test_a_cut_goes_back_behind_a_transaction(void **state)
{
    (void)state;
    cut_a_transaction(true);
    cut_a_transaction(false);
}

static void test_partitions_are_apart(void **state)
{
    (void)state;
    ledger *l = ledger_new(NULL, NULL, OFFSET_MAP_MAX);
    struct ledger_ref a = assign(l, 0, 0), b, found;
    assert_int_equal(ledger_assign(l, "other", 0, 0, &b), LM_OK);
    deliver(l, a, 0);
    deliver(l, b, 7);
    finish(l, b, 7);
    assert_int_equal(commit_value(l, a), LEDGER_NONE);
    assert_int_equal(commit_value(l, b), 8);
    assert_int_equal(ledger_find(l, "other", 0, &found), LM_OK);
    assert_int_equal(found.slot, b.slot);
    assert_int_equal(ledger_find(l, "other", 1, &found), LM_NOT_FOUND);
    ledger_free(l);
}

static void test_refuses_nonsense(void **state)
{
    (void)state;
    ledger *l = ledger_new(NULL, NULL, OFFSET_MAP_MAX);
    struct ledger_ref r = assign(l, 0, 0), wild = { 99, 1 };
    assert_int_equal(ledger_deliver(l, r, -5, NULL), LM_INVALID);
    assert_int_equal(ledger_deliver(l, wild, 1, NULL), LM_CANCELLED);
    assert_int_equal(ledger_complete(l, wild, 1, NULL), LM_CANCELLED);
    ledger_position(l, r, -1001);
    assert_int_equal(commit_value(l, r), LEDGER_NONE);
    ledger_free(l);
}

/* ---- against a naive model --------------------------------------------------------------- */

enum { PARTS = 5, MODEL_MAX = 4096, STALE_MAX = 64, OPERATIONS = 2000000, HISTORIES = 2000000,
       SHORT = 16 };

struct model {
    bool assigned;
    struct ledger_ref ref;
    int64_t offsets[MODEL_MAX];
    bool finished[MODEL_MAX];
    int n;
    int64_t next;               /* where the log stands */
    int64_t base, position, committed;
};

static uint64_t rng = 88172645463325252ull;

static uint32_t pick(uint32_t n)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (uint32_t)(rng >> 16) % n;
}

static int64_t model_watermark(const struct model *m)
{
    for (int i = 0; i < m->n; i++)
        if (!m->finished[i])
            return m->offsets[i];
    int64_t mark = m->n ? m->offsets[m->n - 1] + 1 : LEDGER_NONE;
    if ((m->n || m->base != LEDGER_NONE) && m->position > mark)
        mark = m->position;
    return mark;
}

static int64_t model_commit(const struct model *m)
{
    int64_t mark = model_watermark(m);
    return mark > m->committed ? mark : LEDGER_NONE;
}

static void model_start(struct model *m, int64_t committed)
{
    m->n = 0;
    m->assigned = true;
    m->base = m->committed = committed;
    m->position = LEDGER_NONE;
}

static void check_part(ledger *l, const struct model *m)
{
    assert_int_equal(commit_value(l, m->ref), model_commit(m));
    struct ledger_info info;
    assert_true(ledger_get(l, m->ref, &info));
    size_t unfinished = 0;
    for (int i = 0; i < m->n; i++)
        unfinished += !m->finished[i];
    assert_int_equal(info.in_flight, unfinished);
    assert_int_equal(info.watermark, model_watermark(m));
    assert_int_equal(info.committed, m->committed);
}

/* Below it nothing may come: it is not above the last one, or it is committed. */
static int64_t model_floor(const struct model *m)
{
    return LM_MAX(m->n ? m->offsets[m->n - 1] + 1 : 0, m->committed);
}

/* How many entries lie before an offset; 0 also when none of them is unfinished. */
static int model_before(const struct model *m, int64_t offset)
{
    int n = 0;
    bool unfinished = false;
    for (; n < m->n && m->offsets[n] < offset; n++)
        unfinished |= !m->finished[n];
    return unfinished ? n : 0;
}

static void do_deliver(ledger *l, struct model *m)
{
    int64_t offset = m->next + (pick(4) ? 0 : pick(50)), floor = model_floor(m);
    bool rewind = floor > 0 && pick(2000) == 0;
    if (rewind) {
        int64_t most = pick(2) ? 3 : 100;
        offset = floor - 1 - pick((uint32_t)LM_MIN(floor, most));
        assert_int_equal(ledger_deliver(l, m->ref, offset, m), LM_STATE);
        int before = model_before(m, offset);
        assert_int_equal(ledger_cut(l, m->ref, offset), before ? LM_OK : LM_NOT_FOUND);
        if (!before) {
            assert_int_equal(ledger_rewind(l, &m->ref), LM_OK);
            model_start(m, LEDGER_NONE);
        } else {
            m->n = before;
            m->position = LEDGER_NONE;
        }
    }
    assert_int_equal(ledger_deliver(l, m->ref, offset, m), LM_OK);
    m->offsets[m->n] = offset;
    m->finished[m->n++] = false;
    m->next = offset + 1;
}

static void do_finish(ledger *l, struct model *m)
{
    if (!m->n)
        return;
    /* Mostly near the head, as engines do; sometimes anywhere, sometimes twice. */
    int i = pick(8) ? 0 : (int)pick((uint32_t)m->n);
    while (i < m->n && m->finished[i] && pick(50))
        i++;
    if (i == m->n)
        return;
    void *user = NULL;
    lm_status st = ledger_complete(l, m->ref, m->offsets[i], &user);
    assert_int_equal(st, m->finished[i] ? LM_NOT_FOUND : LM_OK);
    assert_true(m->finished[i] || user == m);
    m->finished[i] = true;
}

static void do_commit(ledger *l, struct model *m)
{
    if (m->n && pick(2)) {
        m->position = m->next + pick(3);
        ledger_position(l, m->ref, m->position);
        m->next = m->position;
    }
    int64_t value = commit_value(l, m->ref);
    assert_int_equal(value, model_commit(m));
    if (value != LEDGER_NONE && pick(4)) {
        accept(l, m->ref, value);
        m->committed = value;
    }
    /* What the promise comes to: nothing unfinished lies below the committed offset. */
    for (int i = 0; i < m->n; i++)
        assert_true(m->finished[i] || m->offsets[i] >= m->committed);
    /* The model may forget what no answer depends on. */
    int keep = 0;
    while (keep < m->n - 1 && m->finished[keep])
        keep++;
    memmove(m->offsets, m->offsets + keep, (size_t)(m->n - keep) * sizeof *m->offsets);
    memmove(m->finished, m->finished + keep, (size_t)(m->n - keep) * sizeof *m->finished);
    m->n -= keep;
}

/* One history; a partition is taken away once in `keeps` times that it might be. */
static void play(long operations, uint32_t parts, uint32_t keeps)
{
    static struct model models[PARTS];
    struct { struct ledger_ref ref; int64_t offset; } stale[STALE_MAX];
    int n_stale = 0;
    ledger *l = ledger_new(NULL, NULL, OFFSET_MAP_MAX);
    for (uint32_t k = 0; k < parts; k++) {
        models[k].assigned = false;
        models[k].n = 0;
        models[k].next = pick(3) ? 0 : pick(1000);
    }
    for (long op = 0; op < operations; op++) {
        int32_t k = (int32_t)pick(parts);
        struct model *m = &models[k];
        if (!m->assigned || m->n >= MODEL_MAX - 1) {
            model_start(m, pick(4) ? m->next : LEDGER_NONE);
            assert_int_equal(ledger_assign(l, "t", k, m->base, &m->ref), LM_OK);
        }
        switch (pick(16)) {
        case 0: case 1: case 2: case 3: case 4: case 5:
            do_deliver(l, m);
            break;
        case 6: case 7: case 8: case 9: case 10: case 11: case 12:
            do_finish(l, m);
            break;
        case 13: case 14:
            do_commit(l, m);
            break;
        default:
            if (pick(keeps) == 0) {
                if (m->n)
                    stale[n_stale++ % STALE_MAX].ref = m->ref,
                    stale[(n_stale - 1) % STALE_MAX].offset = m->offsets[m->n - 1];
                assert_int_equal(ledger_revoke(l, m->ref), LM_OK);
                m->assigned = false;
                continue;
            }
            if (n_stale) {
                uint32_t s = pick((uint32_t)LM_MIN(n_stale, STALE_MAX));
                assert_int_equal(ledger_complete(l, stale[s].ref, stale[s].offset, NULL),
                                 LM_CANCELLED);
            }
        }
        if (m->n < 64 || op % 64 == 0)
            check_part(l, m);
    }
    ledger_free(l);
}

static void test_against_model(void **state)
{
    (void)state;
    play(OPERATIONS, PARTS, 200);
}

static void test_many_histories_against_model(void **state)
{
    (void)state;
    for (int i = 0; i < HISTORIES; i++)
        play(1 + pick(SHORT), 1 + pick(2), 2);
}

/* What the commit would say now holds these ranges, and is accepted. */
static void expect_handed_on(ledger *l, struct ledger_ref ref, int64_t offset,
                             const struct offset_range *r, size_t n)
{
    struct ledger_commit c;
    struct lm_err err;
    struct offset_range *got = NULL;
    char text[OFFSET_MAP_MAX + 1];
    size_t n_got = 0;
    assert_true(ledger_due(l, ref, false, &c));
    assert_int_equal(c.offset, offset);
    size_t len = ledger_map(l, &c, false, text, NULL);
    assert_int_equal(len > 0, n > 0);
    if (len)
        assert_int_equal(offset_map_decode(text, len, offset, &got, &n_got, &err), LM_OK);
    assert_int_equal(n_got, n);
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(got[i].from, r[i].from);
        assert_int_equal(got[i].to, r[i].to);
    }
    free(got);
    ledger_committed(l, &c);
}

/* Where no maps are written, what an earlier owner's holds is handed on until the watermark has
 * passed it, whether it has been delivered or not; what has finished since is not. */
static void test_restored_ranges_are_handed_on(void **state)
{
    (void)state;
    static const struct offset_range known[] = { { 3, 6 }, { 9, 10 } };
    ledger *l = ledger_new(NULL, NULL, 0);
    struct ledger_ref ref = assign(l, 0, 1);
    struct ledger_commit c;
    assert_int_equal(ledger_restore(l, ref, known, 2), LM_OK);
    deliver(l, ref, 1);
    deliver(l, ref, 2);
    finish(l, ref, 1);
    expect_handed_on(l, ref, 2, known, 2);
    for (int64_t offset = 3; offset < 6; offset++)
        assert_true(ledger_skip(l, ref, offset));
    for (int64_t offset = 6; offset < 9; offset++)
        deliver(l, ref, offset);
    assert_true(ledger_skip(l, ref, 9));
    deliver(l, ref, 10);
    finish(l, ref, 7);
    assert_false(ledger_due(l, ref, false, &c));
    finish(l, ref, 2);
    expect_handed_on(l, ref, 6, &known[1], 1);
    finish(l, ref, 6);
    expect_handed_on(l, ref, 8, &known[1], 1);
    finish(l, ref, 8);
    expect_handed_on(l, ref, 10, NULL, 0);
    ledger_free(l);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_watermark_skips_gaps),
        cmocka_unit_test(test_idle_commits_position),
        cmocka_unit_test(test_commit_is_monotonic),
        cmocka_unit_test(test_stale_epoch_changes_nothing),
        cmocka_unit_test(test_rewind_starts_over),
        cmocka_unit_test(test_a_cut_keeps_what_lies_before),
        cmocka_unit_test(test_a_cut_ends_what_was_restored),
        cmocka_unit_test(test_a_cut_goes_back_behind_a_transaction),
        cmocka_unit_test(test_partitions_are_apart),
        cmocka_unit_test(test_refuses_nonsense),
        cmocka_unit_test(test_restored_ranges_are_handed_on),
        cmocka_unit_test(test_against_model),
        cmocka_unit_test(test_many_histories_against_model),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
