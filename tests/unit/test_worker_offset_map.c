/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_offset_map.c - the offset map's text: round trips of random ranges, what a limit does
 * to them, and everything hostile that a metadata field may hold. Then whole histories of a
 * partition, crash after crash, through ledger and map against a model that remembers each record's
 * truth: nothing is skipped that was not finished, and nothing is repeated that a commit held.
 *
 * LORAMILL_HISTORIES is the number of histories (default 1,000,000).
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "worker/ledger.h"

static uint64_t rng = 0x9e3779b97f4a7c15ull;

static uint32_t pick(uint32_t n)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (uint32_t)(rng >> 20) % n;
}

static void encode(int64_t base, const struct offset_range *r, size_t n, char *out)
{
    size_t covered;
    size_t len = offset_map_encode(base, r, n, OFFSET_MAP_MAX, out, &covered);
    assert_int_equal(covered, n);
    assert_int_equal(len, strlen(out));
    assert_int_equal(len, offset_map_size(base, r, n));
}

static lm_status decode(const char *text, int64_t base)
{
    struct offset_range *r;
    size_t n;
    struct lm_err err = { 0 };
    lm_status st = offset_map_decode(text, strlen(text), base, &r, &n, &err);
    assert_true(st == LM_OK ? n > 0 : err.msg[0] && !r && !n);
    free(r);
    return st;
}

static void test_text_is_fixed(void **state)
{
    (void)state;
    char text[OFFSET_MAP_MAX + 1];
    static const struct offset_range one[] = { { 1000002, 1000003 }, { 1000005, 1000300 } };
    encode(1000000, one, 2, text);
    assert_string_equal(text, "lm1:AMCEPQIBAqcCJ3a-kw");    /* written by this version for ever */
    assert_int_equal(decode(text, 1000000), LM_OK);
    assert_int_equal(offset_map_size(5, one, 0), 0);
}

/* ---- round trips ------------------------------------------------------------------------ */

static size_t random_ranges(int64_t base, struct offset_range *r, size_t max)
{
    size_t n = 1 + pick((uint32_t)max);
    uint32_t gap = 1u << pick(12), run = 1u << pick(12);
    int64_t at = base + pick(2) * pick(gap);
    for (size_t i = 0; i < n; i++) {
        r[i].from = at;
        r[i].to = at + 1 + pick(run);
        at = r[i].to + 1 + pick(gap);
    }
    return n;
}

static void test_round_trips(void **state)
{
    (void)state;
    struct offset_range r[200], *back;
    char text[OFFSET_MAP_MAX + 1];
    struct lm_err err;
    size_t n_back;
    for (int i = 0; i < 100000; i++) {
        int64_t base = pick(3) ? pick(1u << 30) : (int64_t)1 << pick(62);
        size_t n = random_ranges(base, r, 200), covered;
        size_t limit = pick(4) ? OFFSET_MAP_MAX : pick(OFFSET_MAP_MAX);
        size_t len = offset_map_encode(base, r, n, limit, text, &covered);
        assert_true(len <= limit && len == strlen(text) && covered <= n);
        assert_true((covered == 0) == (len == 0));
        assert_true(covered == n || offset_map_size(base, r, n) + 4 > limit);
        if (!len)
            continue;
        assert_int_equal(offset_map_decode(text, len, base, &back, &n_back, &err), LM_OK);
        assert_int_equal(n_back, covered);
        assert_memory_equal(back, r, covered * sizeof *r);
        free(back);
    }
}

static void test_worst_cases_fit(void **state)
{
    (void)state;
    static struct offset_range r[12000];
    char text[OFFSET_MAP_MAX + 1];
    for (int i = 0; i < 12000; i++)     /* every other offset: bits take it */
        r[i] = (struct offset_range){ 2 * i + 1, 2 * i + 2 };
    encode(0, r, 12000, text);
    size_t covered, len;
    for (int i = 0; i < 12000; i++)     /* sparse and single: runs, cut at the far end */
        r[i] = (struct offset_range){ 1000 * i + 1, 1000 * i + 2 };
    len = offset_map_encode(0, r, 12000, OFFSET_MAP_MAX, text, &covered);
    assert_in_range(len, OFFSET_MAP_MAX - 4, OFFSET_MAP_MAX);
    assert_in_range(covered, 1000, 11999);
    r[0] = (struct offset_range){ 1, INT64_MAX };
    encode(0, r, 1, text);
    assert_int_equal(decode(text, 0), LM_OK);
}

/* ---- hostile metadata --------------------------------------------------------------------- */

static void test_foreign_text(void **state)
{
    (void)state;
    char text[OFFSET_MAP_MAX + 200];
    static const struct offset_range r[] = { { 12, 13 }, { 20, 900 } };
    encode(10, r, 2, text);
    assert_int_equal(decode(text, 11), LM_MISMATCH);        /* the group was moved */
    text[2] = '2';
    assert_int_equal(decode(text, 10), LM_UNSUPPORTED);
    static const char *const other[] = { "", "l", "lm1", "consumer-1@host", "{\"offset\":12}",
                                         "bf,1,2,3", "LM1:AAAA", "\xff\xfe\x01" };
    for (size_t i = 0; i < LM_COUNT(other); i++)
        assert_int_equal(decode(other[i], 10), LM_NOT_FOUND);
    assert_int_equal(decode("lm1:", 10), LM_FORMAT);
    assert_int_equal(decode("lm1:A", 10), LM_FORMAT);
    assert_int_equal(decode("lm1:AAAAAAAAAAAA", 10), LM_FORMAT);
    assert_int_equal(decode("lm1:AAAA AAAA", 10), LM_FORMAT);
    memset(text, 'A', sizeof text - 1);
    text[sizeof text - 1] = 0;
    memcpy(text, "lm1:", 4);
    assert_int_equal(decode(text, 10), LM_FORMAT);          /* longer than any that is written */
}

static void test_damaged_text(void **state)
{
    (void)state;
    char text[OFFSET_MAP_MAX + 1], bad[OFFSET_MAP_MAX + 1];
    struct offset_range r[100];
    for (int i = 0; i < 300; i++) {
        int64_t base = pick(100000);
        encode(base, r, random_ranges(base, r, 100), text);
        size_t len = strlen(text);
        for (size_t cut = 0; cut < len; cut += 1 + len / 64) {      /* truncated */
            memcpy(bad, text, cut);
            bad[cut] = 0;
            assert_int_not_equal(decode(bad, base), LM_OK);
        }
        for (int k = 0; k < 64; k++) {                              /* one character changed */
            strcpy(bad, text);
            size_t at = pick((uint32_t)len);
            bad[at] = (char)(bad[at] == 'Q' ? 'R' : 'Q');
            assert_int_not_equal(decode(bad, base), LM_OK);
        }
    }
}

/* Payloads with a good checksum and nonsense inside: what a bug or a forger would write. */
static void test_forged_payloads(void **state)
{
    (void)state;
    char text[OFFSET_MAP_MAX + 1];
    struct offset_range r[40], *back;
    struct lm_err err;
    size_t n, accepted = 0;
    for (int i = 0; i < 200000; i++) {
        /* A map for another base differs from ours in one varint; the base asked for is random. */
        int64_t base = pick(8), other = pick(2) ? base : INT64_MAX - pick(300);
        size_t m = random_ranges(base, r, 40);
        encode(base, r, m, text);
        lm_status st = offset_map_decode(text, strlen(text), other, &back, &n, &err);
        assert_int_equal(st, other == base ? LM_OK : LM_MISMATCH);
        for (size_t k = 0; k < n; k++)
            assert_true(back[k].from >= base && back[k].from < back[k].to &&
                        (!k || back[k - 1].to <= back[k].from));
        accepted += !st;
        free(back);
    }
    assert_true(accepted > 0);
}

/* ---- histories ---------------------------------------------------------------------------- */

enum { LOG_MAX = 48, OPERATIONS = 60, IN_FLIGHT_MAX = 20 };

/* One partition: its log, what is true of each record, and what the broker holds for the group. */
struct world {
    ledger *l;
    struct ledger_ref ref;
    int64_t offsets[LOG_MAX];
    int n;                      /* records of the log */
    int next;                   /* to be delivered */
    bool finished[LOG_MAX];     /* the truth: its outcome is durable */
    bool done[LOG_MAX];         /* as far as this assignment can know */
    bool held[LOG_MAX];         /* done, as of the last accepted commit */
    bool in_flight[LOG_MAX], staged[LOG_MAX];
    int64_t committed;
    char map[OFFSET_MAP_MAX + 1];
    bool strict;                /* exactly-once: outcomes become durable by transactions only */
};

static void make_log(struct world *x)
{
    int64_t at = pick(2) ? 0 : pick(1u << 20);
    x->n = 1 + (int)pick(LOG_MAX);
    for (int i = 0; i < x->n; i++) {
        at += pick(5) ? 0 : pick(2) ? 1 + pick(3) : pick(3000);     /* markers; compaction */
        x->offsets[i] = at++;
    }
    x->committed = pick(2) ? LEDGER_NONE : x->offsets[0];
    x->strict = pick(2);
}

static bool in_ranges(const struct offset_range *r, size_t n, int64_t offset)
{
    for (size_t i = 0; i < n; i++)
        if (offset >= r[i].from && offset < r[i].to)
            return true;
    return false;
}

/* What a commit holds must be exactly what was finished when it was made. */
static void check_map(const struct world *x, const struct offset_range *r, size_t n)
{
    for (int i = 0; i < x->n; i++) {
        bool held = x->offsets[i] < x->committed || in_ranges(r, n, x->offsets[i]);
        assert_true(!held || x->finished[i]);
        assert_int_equal(held, x->held[i]);
    }
}

static void begin_assignment(struct world *x)
{
    struct offset_range *r = NULL;
    struct lm_err err;
    size_t n = 0;
    assert_int_equal(ledger_assign(x->l, "t", 0, x->committed, &x->ref), LM_OK);
    if (x->map[0]) {
        assert_int_equal(offset_map_decode(x->map, strlen(x->map), x->committed, &r, &n, &err),
                         LM_OK);
        assert_int_equal(ledger_restore(x->l, x->ref, r, n), LM_OK);
    }
    check_map(x, r, n);
    free(r);
    memset(x->in_flight, 0, sizeof x->in_flight);
    memset(x->staged, 0, sizeof x->staged);
    memcpy(x->done, x->held, sizeof x->done);
    for (x->next = 0; x->next < x->n && x->offsets[x->next] < x->committed;)
        x->next++;
}

static void do_deliver(struct world *x)
{
    int i = x->next;
    size_t in_flight = ledger_in_flight(x->l);
    if (i == x->n || in_flight >= IN_FLIGHT_MAX)
        return;
    x->next++;
    bool skipped = ledger_skip(x->l, x->ref, x->offsets[i]);
    assert_int_equal(skipped, x->held[i]);
    if (skipped)
        return;
    assert_int_equal(ledger_deliver(x->l, x->ref, x->offsets[i], NULL), LM_OK);
    x->in_flight[i] = true;
}

static int some(const bool *set, int n)
{
    for (int tries = 0; n && tries < 8; tries++) {
        int i = (int)pick((uint32_t)n);
        if (set[i])
            return i;
    }
    return -1;
}

static void complete(struct world *x, int i)
{
    assert_int_equal(ledger_complete(x->l, x->ref, x->offsets[i], NULL), LM_OK);
    x->in_flight[i] = x->staged[i] = false;
    x->finished[i] = x->done[i] = true;
}

/* The broker takes the commit: this is what the next owner will find. */
static void accept(struct world *x, const struct ledger_commit *c, const char *map)
{
    assert_true(c->offset >= x->committed);
    x->committed = c->offset;
    strcpy(x->map, map);
    for (int i = 0; i < x->n; i++) {
        x->held[i] = x->done[i] || x->staged[i];
        assert_true(x->offsets[i] >= c->offset || x->held[i]);
    }
}

static void do_commit(struct world *x)
{
    char map[OFFSET_MAP_MAX + 1];
    struct ledger_commit c;
    bool whole;
    if (!ledger_due(x->l, x->ref, false, &c))
        return;
    ledger_map(x->l, &c, false, map, &whole);
    assert_true(whole);
    if (!pick(4))
        return;                 /* refused */
    accept(x, &c, map);
    if (pick(8))                /* else the answer is lost on its way */
        ledger_committed(x->l, &c);
}

static void stage_some(struct world *x)
{
    for (int k = (int)pick(6); k > 0; k--) {
        int i = some(x->in_flight, x->n);
        if (i < 0 || x->staged[i])
            continue;
        assert_int_equal(ledger_stage(x->l, x->ref, x->offsets[i], true), LM_OK);
        assert_int_equal(ledger_stage(x->l, x->ref, x->offsets[i], true), LM_STATE);
        x->staged[i] = true;
    }
}

/* The transaction commits or aborts, or the process dies when the broker has taken it. In this mode
 * no outcome may become durable twice. */
static void do_transaction(struct world *x)
{
    char map[OFFSET_MAP_MAX + 1];
    struct ledger_commit c;
    stage_some(x);
    bool due = ledger_due(x->l, x->ref, true, &c), good = due && pick(3), whole;
    if (due)
        ledger_map(x->l, &c, true, map, &whole);
    if (good)
        accept(x, &c, map);
    for (int i = 0; i < x->n; i++) {
        if (!x->staged[i])
            continue;
        assert_true(due && !x->finished[i]);
        if (good) {
            complete(x, i);
        } else {
            assert_int_equal(ledger_stage(x->l, x->ref, x->offsets[i], false), LM_OK);
            x->staged[i] = false;
        }
    }
    if (good && pick(10)) {
        ledger_committed(x->l, &c);
        assert_false(ledger_due(x->l, x->ref, true, &c));
    } else if (good) {
        begin_assignment(x);
    }
}

static void step(struct world *x)
{
    int i;
    switch (pick(10)) {
    case 0: case 1: case 2: case 3:
        do_deliver(x);
        break;
    case 4: case 5: case 6:
        i = some(x->in_flight, x->n);
        if (i >= 0 && !x->strict)
            complete(x, i);
        else if (x->strict)
            do_transaction(x);
        break;
    case 7: case 8:
        if (x->strict)
            do_transaction(x);
        else
            do_commit(x);
        break;
    default:
        if (pick(3) == 0)
            begin_assignment(x);
    }
    size_t in_flight = 0;
    for (i = 0; i < x->n; i++)
        in_flight += x->in_flight[i];
    assert_int_equal(ledger_in_flight(x->l), in_flight);
}

static void test_histories(void **state)
{
    (void)state;
    const char *asked = getenv("LORAMILL_HISTORIES");
    long histories = asked ? strtol(asked, NULL, 10) : 1000000;
    for (long h = 0; h < histories; h++) {
        struct world x = { .l = ledger_new(NULL, NULL, OFFSET_MAP_MAX) };
        make_log(&x);
        begin_assignment(&x);
        for (int k = 0; k < OPERATIONS; k++)
            step(&x);
        ledger_free(x.l);
    }
}

/* ---- the brake, and memory ----------------------------------------------------------------- */

static void test_crowded(void **state)
{
    (void)state;
    ledger *l = ledger_new(NULL, NULL, OFFSET_MAP_MAX);
    struct ledger_ref r;
    struct ledger_info info;
    char map[OFFSET_MAP_MAX + 1];
    assert_int_equal(ledger_assign(l, "t", 0, 0, &r), LM_OK);
    assert_int_equal(ledger_deliver(l, r, 0, NULL), LM_OK);     /* the head never ends */
    int64_t offset = 1;
    for (; !ledger_crowded(l, r, false) && offset < 200000; offset += 997) {
        assert_int_equal(ledger_deliver(l, r, offset, NULL), LM_OK);
        assert_int_equal(ledger_complete(l, r, offset, NULL), LM_OK);
        assert_int_equal(ledger_deliver(l, r, offset + 1, NULL), LM_OK);
    }
    struct ledger_commit c;
    bool whole;
    if (offset < 200000)
        fail_msg("crowded at %lld although small", (long long)offset);
    for (; !ledger_crowded(l, r, false) && offset < 20000000; offset += 997) {
        assert_int_equal(ledger_deliver(l, r, offset, NULL), LM_OK);
        assert_int_equal(ledger_complete(l, r, offset, NULL), LM_OK);
        assert_int_equal(ledger_deliver(l, r, offset + 1, NULL), LM_OK);
    }
    assert_true(ledger_due(l, r, false, &c));
    assert_in_range(ledger_map(l, &c, false, map, &whole), OFFSET_MAP_MAX / 4 * 3, OFFSET_MAP_MAX);
    assert_true(whole);
    assert_true(ledger_crowded(l, r, true));
    assert_int_equal(ledger_complete(l, r, 0, NULL), LM_OK);
    for (int64_t o = 1; o < offset; o += 997)
        assert_int_equal(ledger_complete(l, r, o + 1, NULL), LM_OK);
    assert_false(ledger_crowded(l, r, true));
    assert_true(ledger_get(l, r, &info) && info.in_flight == 0 && info.beyond == 0);
    ledger_free(l);
}

/* ---- the brake holds, whoever reads and whatever ends ---------------------------------------- */

/* A reader as fast as can be: it asks after each record, and has so many more on their way when it
 * is told to stop. */
struct reader {
    ledger *l;
    struct ledger_ref r;
    int64_t next, *open;        /* [n_open], delivered and not finished */
    size_t n_open;
    uint32_t gap;
    bool stopped;
};
enum { READER_MAX = 40000 };

static void fetch_one(struct reader *x)
{
    x->next += x->gap > 1 ? 1 + pick(x->gap) : 1;
    assert_int_equal(ledger_deliver(x->l, x->r, x->next, NULL), LM_OK);
    x->open[x->n_open++] = x->next;
}

static void fetch_until_stopped(struct reader *x, size_t most)
{
    for (size_t n = 0; !x->stopped && n < most && x->n_open < READER_MAX - LEDGER_BURST; n++) {
        fetch_one(x);
        if (ledger_crowded(x->l, x->r, false)) {
            x->stopped = true;
            for (uint32_t k = pick(LEDGER_BURST + 1); k > 0; k--)
                fetch_one(x);
        }
    }
}

/* From the head, from the tail, every second, or anywhere. */
static void finish_some(struct reader *x, uint32_t how, size_t n)
{
    for (size_t k = 0; k < n && x->n_open > 1; k++) {
        size_t last = x->n_open - 1;
        size_t at = how == 0 ? 0 : how == 1 ? last : how == 2 ? LM_MIN(k + 1, last)
                                                              : pick((uint32_t)x->n_open);
        assert_int_equal(ledger_complete(x->l, x->r, x->open[at], NULL), LM_OK);
        memmove(x->open + at, x->open + at + 1, (--x->n_open - at) * sizeof *x->open);
    }
}

static size_t whole_map(struct reader *x)
{
    char map[OFFSET_MAP_MAX + 1];
    struct ledger_commit c;
    bool whole = true;
    ledger_due(x->l, x->r, false, &c);
    size_t len = ledger_map(x->l, &c, false, map, &whole);
    if (!whole)
        fail_msg("cut: %zu open up to %lld", x->n_open, (long long)x->next);
    return len;
}

/* Every second waits, and the others end in any rhythm: the map is never cut, and the brake comes
 * late enough for it to be three quarters full. */
static void test_every_second_waits(void **state)
{
    (void)state;
    static int64_t open[READER_MAX];
    for (size_t rhythm = 1; rhythm < 10000; rhythm = rhythm * 3 + pick(3)) {
        struct reader x = { .l = ledger_new(NULL, NULL, OFFSET_MAP_MAX), .open = open, .next = -1 };
        assert_int_equal(ledger_assign(x.l, "t", 0, 0, &x.r), LM_OK);
        for (size_t done = 0; !x.stopped && x.next < 1000000; done = x.n_open) {
            fetch_until_stopped(&x, rhythm);
            size_t kept = done;
            for (size_t i = done; i < x.n_open; i++)
                if (x.open[i] % 2)
                    assert_int_equal(ledger_complete(x.l, x.r, x.open[i], NULL), LM_OK);
                else
                    x.open[kept++] = x.open[i];
            x.n_open = kept;
            whole_map(&x);
        }
        assert_true(x.stopped);
        assert_in_range(whole_map(&x), OFFSET_MAP_MAX / 4 * 3 - 8, OFFSET_MAP_MAX);
        assert_in_range(x.next, 15000, 25000);
        ledger_free(x.l);
    }
}

/* Nothing ends for long (a store is away), then all does, in an order made to split the map. */
static void test_brake_holds(void **state)
{
    (void)state;
    static int64_t open[READER_MAX];
    for (int h = 0; h < 300; h++) {
        size_t limit = OFFSET_MAP_MAX - pick(2) * 3000;
        struct reader x = { .l = ledger_new(NULL, NULL, limit), .open = open, .next = -1,
                            .gap = (uint32_t[]){ 1, 2, 5, 100 }[pick(4)] };
        assert_int_equal(ledger_assign(x.l, "t", 0, 0, &x.r), LM_OK);
        for (int round = 0; round < 6; round++) {
            fetch_until_stopped(&x, pick(3) ? pick(300) : READER_MAX);
            for (uint32_t k = pick(12); k > 0; k--) {
                finish_some(&x, pick(4), pick(2) ? pick(10) : x.n_open / (2 + pick(3)));
                whole_map(&x);
            }
            x.stopped = x.stopped && ledger_crowded(x.l, x.r, true);
        }
        ledger_free(x.l);
    }
}

/* One that never ends, and much behind it: the brake lets a reader go on for as long as little is
 * in flight. */
static void test_one_stuck_does_not_brake(void **state)
{
    (void)state;
    static int64_t open[READER_MAX];
    struct reader x = { .l = ledger_new(NULL, NULL, OFFSET_MAP_MAX), .open = open, .next = -1 };
    assert_int_equal(ledger_assign(x.l, "t", 0, 0, &x.r), LM_OK);
    for (int i = 0; i < 2000; i++) {
        fetch_until_stopped(&x, 1000 - x.n_open);
        assert_false(x.stopped);
        while (x.n_open > 500) {
            size_t at = 1 + pick(100);
            assert_int_equal(ledger_complete(x.l, x.r, x.open[at], NULL), LM_OK);
            memmove(x.open + at, x.open + at + 1, (--x.n_open - at) * sizeof *x.open);
        }
    }
    assert_true(x.next > 900000);
    ledger_free(x.l);
}

static void test_runs_are_merged(void **state)
{
    (void)state;
    ledger *l = ledger_new(NULL, NULL, OFFSET_MAP_MAX);
    struct ledger_ref r;
    struct ledger_info info;
    assert_int_equal(ledger_assign(l, "t", 0, 0, &r), LM_OK);
    assert_int_equal(ledger_deliver(l, r, 0, NULL), LM_OK);
    for (int64_t o = 1; o < 2000000; o++) {
        assert_int_equal(ledger_deliver(l, r, o, NULL), LM_OK);
        assert_int_equal(ledger_complete(l, r, o, NULL), LM_OK);
    }
    assert_true(ledger_get(l, r, &info));
    assert_true(info.beyond < 128);     /* two million finished prompts, one stuck: no memory */
    assert_int_equal(ledger_complete(l, r, 0, NULL), LM_OK);
    struct ledger_commit c;
    assert_true(ledger_due(l, r, false, &c) && c.offset == 2000000);
    ledger_free(l);
}

static void test_no_map_when_off(void **state)
{
    (void)state;
    ledger *l = ledger_new(NULL, NULL, 0);
    struct ledger_ref r;
    struct ledger_commit c;
    assert_int_equal(ledger_assign(l, "t", 0, 0, &r), LM_OK);
    assert_int_equal(ledger_deliver(l, r, 0, NULL), LM_OK);
    assert_int_equal(ledger_deliver(l, r, 1, NULL), LM_OK);
    assert_int_equal(ledger_complete(l, r, 1, NULL), LM_OK);
    assert_false(ledger_due(l, r, false, &c));
    assert_false(ledger_crowded(l, r, false));
    ledger_free(l);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_text_is_fixed),
        cmocka_unit_test(test_round_trips),
        cmocka_unit_test(test_worst_cases_fit),
        cmocka_unit_test(test_foreign_text),
        cmocka_unit_test(test_damaged_text),
        cmocka_unit_test(test_forged_payloads),
        cmocka_unit_test(test_histories),
        cmocka_unit_test(test_crowded),
        cmocka_unit_test(test_every_second_waits),
        cmocka_unit_test(test_brake_holds),
        cmocka_unit_test(test_one_stuck_does_not_brake),
        cmocka_unit_test(test_runs_are_merged),
        cmocka_unit_test(test_no_map_when_off),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
