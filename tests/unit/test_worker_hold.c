/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_hold.c - who is held back behind records on their way, and until when; by the test's
 * own clock. With a client library: test_worker_renew.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "worker/hold.h"

enum { JOBS = 8, ALWAYS = 100 };        /* ms that a thread with nothing to do sleeps */

static struct hold hold;
static struct job jobs[JOBS];
static bool wake;

static char usual[] = "replies", other[] = "side", third[] = "third";

static int begin(void **state)
{
    (void)state;
    memset(jobs, 0, sizeof jobs);
    for (int i = 0; i < JOBS; i++)
        jobs[i].out.topic = usual;
    hold_init(&hold, usual);
    return 0;
}

static int end(void **state)
{
    (void)state;
    hold_release(&hold);
    return 0;
}

/* Sends it or holds it back. True: it was held back. */
static bool come(int i, int64_t now_us)
{
    if (hold_back(&hold, &jobs[i], now_us, &wake))
        return true;
    hold_sent(&hold, &jobs[i].out, now_us);
    return false;
}

/* They leave. */
static int take(int64_t now_us)
{
    int n = 0;
    for (struct job *j = hold_take(&hold, now_us, false), *next; j; j = next, n++) {
        next = j->next;
        hold_sent(&hold, &j->out, now_us);
    }
    return n;
}

static void report(int i)
{
    hold_reported(&hold, &jobs[i].out);
}

static void what_comes_alone_leaves_at_once(void **state)
{
    (void)state;
    assert_false(come(0, 1000));
    report(0);
    assert_false(come(1, 1001));
    report(1);
    assert_int_equal(take(1002), 0);
}

static void those_behind_it_leave_together_with_its_report(void **state)
{
    (void)state;
    assert_false(come(0, 1000));
    for (int i = 1; i < 4; i++)
        assert_true(come(i, 1000 + i));
    assert_int_equal(take(2000), 0);
    report(0);
    assert_true(come(4, 2000));         /* nobody passes those that wait */
    assert_int_equal(take(2001), 4);
    assert_true(come(5, 2002));
    for (int i = 1; i < 5; i++) {
        assert_int_equal(take(2003), 0);
        report(i);
    }
    assert_int_equal(take(2004), 1);
}

/* Counted from the last that left: who comes later is held for less. */
static void nothing_is_held_for_longer(void **state)
{
    (void)state;
    come(0, 1000);
    assert_true(come(1, 1000 + HOLD_US - 1));
    assert_int_equal(take(1000 + HOLD_US - 1), 0);
    assert_int_equal(take(1000 + HOLD_US), 1);
}

static void who_is_stuck_is_forgotten(void **state)
{
    (void)state;
    int64_t now = 1000;
    come(0, now);
    now += HOLD_US;
    assert_false(come(1, now));         /* a new flight */
    assert_true(come(2, now + 1));
    report(1);
    assert_int_equal(take(now + 2), 1);
    assert_true(come(3, now + 3));
    report(0);                          /* of the flight before the last, at last */
    assert_int_equal(take(now + 4), 0);
    report(2);
    assert_int_equal(take(now + 5), 1);
}

/* Those that were held back behind it have a flight of their own. */
static void who_is_stuck_holds_back_once(void **state)
{
    (void)state;
    come(0, 1000);
    assert_true(come(1, 1001));
    assert_int_equal(take(1000 + HOLD_US), 1);
    report(1);
    assert_false(come(2, 1002 + HOLD_US));
}

static void a_stuck_topic_holds_back_no_other(void **state)
{
    (void)state;
    jobs[0].out.topic = jobs[3].out.topic = other;
    jobs[2].out.topic = third;
    come(0, 1000);
    assert_false(come(1, 1001));
    assert_false(come(2, 1001));
    assert_true(come(3, 1002));
    report(1);
    assert_false(come(4, 1003));
    assert_int_equal(take(1004), 0);
    report(0);
    assert_int_equal(take(1005), 1);
}

static void order_of_a_topic_is_kept(void **state)
{
    (void)state;
    jobs[1].out.topic = jobs[3].out.topic = jobs[5].out.topic = other;
    come(0, 1000);
    come(1, 1000);
    for (int i = 2; i < 6; i++)
        assert_true(come(i, 1001));
    int last[2] = { 0, 0 }, n = 0;
    for (struct job *j = hold_take(&hold, 1002, true); j; j = j->next, n++) {
        int i = (int)(j - jobs);
        assert_true(i > last[i % 2]);
        last[i % 2] = i;
    }
    assert_int_equal(n, 4);
}

static void the_thread_sleeps_until_then(void **state)
{
    (void)state;
    assert_int_equal(hold_wait_ms(&hold, 1000, ALWAYS), ALWAYS);
    come(0, 1000);
    assert_int_equal(hold_wait_ms(&hold, 6000, ALWAYS), (HOLD_US - 5000) / 1000);
    assert_int_equal(hold_wait_ms(&hold, 6000, 3), 3);
    assert_true(come(1, 7000));
    assert_false(wake);                 /* it looks again by then */
    assert_int_equal(hold_wait_ms(&hold, 500 + HOLD_US, ALWAYS), 1);
    assert_int_equal(hold_wait_ms(&hold, 9000 + HOLD_US, ALWAYS), 0);
    assert_int_equal(take(9000 + HOLD_US), 1);
    assert_int_equal(hold_wait_ms(&hold, 9000 + HOLD_US, ALWAYS), HOLD_US / 1000);
    assert_int_equal(hold_wait_ms(&hold, 9000 + 3 * HOLD_US, ALWAYS), ALWAYS);
}

static void a_thread_that_sleeps_for_longer_is_woken(void **state)
{
    (void)state;
    hold_wait_ms(&hold, 1000, ALWAYS);
    assert_false(come(0, 1001));
    assert_false(wake);
    assert_true(come(1, 1002));
    assert_true(wake);
    assert_true(come(2, 1003));
    assert_false(wake);                 /* it was */
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, begin, end)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(what_comes_alone_leaves_at_once), TEST(nothing_is_held_for_longer),
        TEST(those_behind_it_leave_together_with_its_report), TEST(who_is_stuck_is_forgotten),
        TEST(who_is_stuck_holds_back_once), TEST(a_stuck_topic_holds_back_no_other),
        TEST(order_of_a_topic_is_kept), TEST(the_thread_sleeps_until_then),
        TEST(a_thread_that_sleeps_for_longer_is_woken),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
