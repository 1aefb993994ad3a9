/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The marks of dead letters that were sent back, held against a plain array of flags, through
 * commits and what a broker gives back.
 */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <setjmp.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "rnd.h"
#include "worker/tools/dlq_marks.h"

enum { SPAN = 300 };

/* What a broker keeps of a partition. */
struct kept { int64_t offset; char map[OFFSET_MAP_MAX + 1]; };

static dlq_marks *reload(const struct kept *k)
{
    dlq_marks *m = dlq_marks_new(1, OFFSET_MAP_MAX);
    dlq_marks_load(m, 0, k->offset, k->map, strlen(k->map));
    return m;
}

static void expect(const dlq_marks *m, const bool *sent, int from)
{
    for (int i = from; i < SPAN; i++)
        if (dlq_marks_has(m, 0, i) != sent[i])
            fail_msg("offset %d: expected %d", i, sent[i]);
}

static void commit(dlq_marks *m, struct kept *k)
{
    if (dlq_marks_commit(m, 0, &k->offset, k->map))
        dlq_marks_committed(m);
    int64_t offset;
    char map[OFFSET_MAP_MAX + 1];
    assert_false(dlq_marks_commit(m, 0, &offset, map));
}

/* Random ranges are marked, retention takes what is old, commits come and go. */
static void test_against_flags(void **state)
{
    (void)state;
    for (int round = 0; round < 400; round++) {
        bool sent[SPAN] = { false };
        struct kept kept = { .offset = -1 };
        int begin = 0;
        dlq_marks *m = reload(&kept);
        for (int step = 0; step < 60; step++) {
            int from = begin + rnd(SPAN - begin);
            int length = 1 + rnd(4), to = LM_MIN(from + length, SPAN);
            dlq_marks *next = dlq_marks_copy(m);
            assert_int_equal(dlq_marks_add(next, 0, from, to), LM_OK);
            bool aborted = rnd(4) == 0;
            dlq_marks_free(aborted ? next : m);
            m = aborted ? m : next;
            for (int i = from; i < to && !aborted; i++)
                sent[i] = true;
            if (rnd(8) == 0) {
                int more = rnd(20);
                begin = LM_MIN(begin + more, SPAN - 1);
                dlq_marks_begin(m, 0, begin);
            }
            expect(m, sent, begin);
            if (rnd(8) == 0) {
                commit(m, &kept);
                dlq_marks_free(m);
                m = reload(&kept);
                expect(m, sent, begin);
            }
        }
        dlq_marks_free(m);
    }
}

/* Whatever a group has committed that is none of ours: nothing is marked but what is before it. */
static void test_not_ours(void **state)
{
    (void)state;
    static const char *const maps[] = { "", "hello", "lm1:", "lm1:AAAA", "lm2:AAAAAAAA" };
    for (size_t i = 0; i < LM_COUNT(maps); i++) {
        dlq_marks *m = dlq_marks_new(2, OFFSET_MAP_MAX);
        dlq_marks_load(m, 1, 5, maps[i], strlen(maps[i]));
        assert_true(dlq_marks_has(m, 1, 4));
        assert_false(dlq_marks_has(m, 1, 5));
        assert_false(dlq_marks_has(m, 0, 0));
        assert_false(dlq_marks_has(m, 2, 0));   /* there is no such partition */
        assert_int_equal(dlq_marks_add(m, 2, 0, 1), LM_TOO_LARGE);
        dlq_marks_free(m);
    }
}

/* Letters far apart fill the map; the one for which there is no room changes nothing, and what is
 * there survives a commit, also after the log's beginning has moved. */
static void test_full(void **state)
{
    (void)state;
    struct kept kept = { .offset = -1 };
    dlq_marks *m = reload(&kept);
    int n = 0;
    while (!dlq_marks_add(m, 0, 1000 + 1000 * (int64_t)n, 1001 + 1000 * (int64_t)n))
        n++;
    assert_in_range(n, 500, 3000);
    assert_false(dlq_marks_has(m, 0, 1000 + 1000 * (int64_t)n));
    dlq_marks_begin(m, 0, 999);
    commit(m, &kept);
    assert_in_range(strlen(kept.map), OFFSET_MAP_MAX - 40, OFFSET_MAP_MAX);
    dlq_marks_free(m);
    m = reload(&kept);
    for (int i = 0; i < n; i++) {
        assert_true(dlq_marks_has(m, 0, 1000 + 1000 * (int64_t)i));
        assert_false(dlq_marks_has(m, 0, 1001 + 1000 * (int64_t)i));
    }
    /* The ones in between make room. */
    assert_int_equal(dlq_marks_add(m, 0, 999, 500000), LM_OK);
    assert_int_equal(dlq_marks_add(m, 0, 5000000, 5000001), LM_OK);
    dlq_marks_free(m);
}

/* commit.map_max_bytes holds, also 0: then only what follows the base is marked. */
static void test_limit(void **state)
{
    (void)state;
    int64_t offset;
    char map[OFFSET_MAP_MAX + 1];
    dlq_marks *m = dlq_marks_new(1, 100);
    int n = 0;
    while (!dlq_marks_add(m, 0, 1000 + 1000 * (int64_t)n, 1001 + 1000 * (int64_t)n))
        n++;
    assert_true(dlq_marks_commit(m, 0, &offset, map));
    assert_in_range(strlen(map), 100 - 40, 100);
    dlq_marks_free(m);
    m = dlq_marks_new(1, 0);
    assert_int_equal(dlq_marks_add(m, 0, 5, 6), LM_TOO_LARGE);
    assert_int_equal(dlq_marks_add(m, 0, 0, 5), LM_OK);
    assert_int_equal(dlq_marks_add(m, 0, 5, 6), LM_OK);
    assert_true(dlq_marks_commit(m, 0, &offset, map));
    assert_int_equal(offset, 6);
    assert_string_equal(map, "");
    dlq_marks_free(m);
}

/* What was read is committed once more with the next marks, and not again. */
static void test_renewal(void **state)
{
    (void)state;
    int64_t offset;
    char map[OFFSET_MAP_MAX + 1];
    dlq_marks *m = dlq_marks_new(2, OFFSET_MAP_MAX);
    dlq_marks_load(m, 0, 9, "", 0);
    dlq_marks_load(m, 1, -1, NULL, 0);
    assert_true(dlq_marks_commit(m, 0, &offset, map));
    assert_int_equal(offset, 9);
    assert_false(dlq_marks_commit(m, 1, &offset, map));
    dlq_marks_committed(m);
    assert_false(dlq_marks_commit(m, 0, &offset, map));
    dlq_marks_free(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_flags), cmocka_unit_test(test_not_ours),
        cmocka_unit_test(test_full), cmocka_unit_test(test_renewal),
        cmocka_unit_test(test_limit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
