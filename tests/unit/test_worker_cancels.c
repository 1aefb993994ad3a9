/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_cancels.c - orders and prompts meet in either order, by id and by time, and nothing
 * is left when they have gone.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "worker/cancels.h"

struct case_ { struct prompt prompt; struct job job; };

static void make(struct case_ *c, const char *id, int64_t when_ms, uint64_t handle)
{
    memset(c, 0, sizeof *c);
    c->prompt.id = id;
    c->job.prompt = &c->prompt;
    c->job.record.timestamp_ms = when_ms;
    atomic_store(&c->job.handle, handle);
}

static void count_handle(void *ctx, uint64_t handle)
{
    *(uint64_t *)ctx += handle;
}

static void test_order_first(void **state)
{
    (void)state;
    uint64_t sum = 0;
    struct case_ before, after, untimed, other;
    cancels *c = cancels_new(1000, 0);
    assert_int_equal(cancels_order(c, "a", 500, 500, count_handle, &sum).marked, 0);
    make(&before, "a", 500, 0);
    make(&after, "a", 501, 0);
    make(&untimed, "a", -1, 0);
    make(&other, "b", 1, 0);
    assert_true(cancels_enter(c, &before.job));
    assert_true(cancels_enter(c, &before.job));         /* twice is once */
    assert_false(cancels_enter(c, &after.job));
    assert_true(cancels_enter(c, &untimed.job));
    assert_false(cancels_enter(c, &other.job));
    cancels_leave(c, &after.job);
    cancels_leave(c, &before.job);
    cancels_leave(c, &before.job);
    cancels_leave(c, &other.job);
    cancels_leave(c, &untimed.job);
    assert_int_equal(sum, 0);
    cancels_free(c);
}

static void test_prompt_first(void **state)
{
    (void)state;
    uint64_t sum = 0;
    struct case_ runs, waits, gone;
    cancels *c = cancels_new(1000, 0);
    make(&runs, "a", 10, 7);
    make(&waits, "a", 10, 0);
    make(&gone, "a", 10, 9);
    assert_false(cancels_enter(c, &runs.job));
    assert_false(cancels_enter(c, &waits.job));
    assert_false(cancels_enter(c, &gone.job));
    cancels_leave(c, &gone.job);
    assert_int_equal(cancels_order(c, "a", 9, 20, count_handle, &sum).marked, 0);
    assert_int_equal(cancels_order(c, "a", 20, 20, count_handle, &sum).marked, 2);
    assert_int_equal(cancels_order(c, "a", 21, 21, count_handle, &sum).marked, 0);
    assert_int_equal(sum, 7);
    assert_true(atomic_load(&waits.job.cancelled));
    assert_false(atomic_load(&gone.job.cancelled));
    cancels_leave(c, &runs.job);
    cancels_leave(c, &waits.job);
    cancels_free(c);
}

static void test_orders_are_forgotten(void **state)
{
    (void)state;
    uint64_t sum = 0;
    char id[16];
    struct case_ j;
    cancels *c = cancels_new(1000, 0);
    cancels_order(c, "old", 0, 0, count_handle, &sum);
    cancels_order(c, "young", 0, 900, count_handle, &sum);
    cancels_order(c, "x", 0, 1000, count_handle, &sum);
    assert_int_equal(cancels_count(c), 2);
    make(&j, "old", -1, 0);
    assert_false(cancels_enter(c, &j.job));
    cancels_leave(c, &j.job);
    for (int i = 0; i < CANCELS_MAX + 100; i++) {
        snprintf(id, sizeof id, "%d", i);
        cancels_order(c, id, 0, 1000, count_handle, &sum);
    }
    assert_int_equal(cancels_count(c), CANCELS_MAX);
    make(&j, "50", -1, 0);
    assert_false(cancels_enter(c, &j.job));
    cancels_leave(c, &j.job);
    make(&j, id, -1, 0);
    assert_true(cancels_enter(c, &j.job));
    cancels_leave(c, &j.job);
    cancels_free(c);
    cancels_free(NULL);
}

/* The same id over and over is one entry, whose age is that of the latest order: what else is
 * remembered stays, and no lookup gets dearer. */
static void test_one_entry_an_id(void **state)
{
    (void)state;
    uint64_t sum = 0;
    struct case_ j;
    cancels *c = cancels_new(1000, 0);
    cancels_order(c, "other", 5, 5, count_handle, &sum);
    for (int i = 0; i < CANCELS_MAX + 100; i++)
        cancels_order(c, "a", i % 50, 10, count_handle, &sum);
    assert_int_equal(cancels_count(c), 2);
    make(&j, "other", 5, 0);
    assert_true(cancels_enter(c, &j.job));
    cancels_leave(c, &j.job);
    make(&j, "a", 49, 0);               /* the latest by its time, not the last */
    assert_true(cancels_enter(c, &j.job));
    cancels_leave(c, &j.job);
    make(&j, "a", 50, 0);
    assert_false(cancels_enter(c, &j.job));
    cancels_leave(c, &j.job);
    cancels_order(c, "a", 50, 1000, count_handle, &sum);
    cancels_order(c, "new", 1100, 1100, count_handle, &sum);
    assert_int_equal(cancels_count(c), 2);              /* "other" is forgotten, "a" is not */
    make(&j, "a", 50, 0);
    assert_true(cancels_enter(c, &j.job));
    cancels_leave(c, &j.job);
    cancels_free(c);
}

/* Two clients' clocks: an order also means what is stamped a little later, and says how many it did
 * not mean. */
static void test_clocks_apart(void **state)
{
    (void)state;
    uint64_t sum = 0;
    struct case_ soon, late, end;
    cancels *c = cancels_new(1000, 60);
    make(&soon, "a", 160, 1);
    make(&late, "a", 161, 2);
    make(&end, "a", INT64_MAX, 4);
    assert_false(cancels_enter(c, &soon.job));
    assert_false(cancels_enter(c, &late.job));
    assert_false(cancels_enter(c, &end.job));
    struct cancels_met met = cancels_order(c, "a", 100, 100, count_handle, &sum);
    assert_int_equal(met.marked, 1);
    assert_int_equal(met.later, 2);
    assert_int_equal(sum, 1);
    cancels_leave(c, &soon.job);
    assert_true(cancels_enter(c, &soon.job));           /* and if the order was first */
    assert_false(cancels_enter(c, &late.job));
    met = cancels_order(c, "a", 101, 101, count_handle, &sum);
    assert_int_equal(met.marked, 1);
    assert_int_equal(met.later, 1);
    cancels_leave(c, &soon.job);
    cancels_leave(c, &late.job);
    cancels_leave(c, &end.job);
    cancels_free(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_order_first), cmocka_unit_test(test_prompt_first),
        cmocka_unit_test(test_orders_are_forgotten), cmocka_unit_test(test_one_entry_an_id),
        cmocka_unit_test(test_clocks_apart),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
