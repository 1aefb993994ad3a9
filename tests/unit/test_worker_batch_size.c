/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_batch_size.c - whose a broker's verdict on a batch is, and how large the next ones
 * are.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "worker/batch_size.h"

#define MINUTES (60 * INT64_C(1000000))

/* The client is replaced, as producer.c does it. */
static void renew(struct batch_size *b)
{
    b->bytes = b->most ? b->most : b->full;
}

static void test_who_is_believed(void **state)
{
    (void)state;
    struct batch_size b = { .full = 1000000, .bytes = 1000000 };
    assert_true(batch_size_believe(&b, 1000001, 0, false));     /* it travelled alone */
    assert_false(b.shrink);
    assert_false(batch_size_believe(&b, 1000000, 100, true));   /* of the client of before */
    assert_false(batch_size_pending(&b));
    assert_false(batch_size_believe(&b, 1, 100, false));
    assert_true(b.shrink && batch_size_pending(&b));
    b = (struct batch_size){ .full = 16384, .bytes = 16384 };
    assert_false(batch_size_believe(&b, 1, 4, false));
    assert_false(b.shrink);
    assert_true(batch_size_believe(&b, 1, 5, false));
}

/* A quarter at a time, 16 KiB at least; back the same way, and up to what is configured. */
static void test_down_and_up(void **state)
{
    (void)state;
    struct batch_size b = { .full = 1000000, .bytes = 1000000 };
    static const int64_t down[] = { 250000, 62500, 16384 }, up[] = { 65536, 262144, 1000000 };
    int64_t now = 1;
    for (size_t i = 0; i < LM_COUNT(down); i++, renew(&b)) {
        b.shrink = true;
        assert_true(batch_size_change(&b, false, now));
        assert_int_equal(b.most, down[i]);
    }
    for (size_t i = 0; i < LM_COUNT(up); i++) {
        assert_false(batch_size_change(&b, true, now + 10 * MINUTES - 1));
        now += 10 * MINUTES;
        assert_false(batch_size_change(&b, false, now));        /* a new client could overtake */
        assert_true(batch_size_change(&b, true, now));
        renew(&b);
        assert_int_equal(b.bytes, up[i]);
    }
    assert_false(batch_size_pending(&b));
}

/* Each time that growing proves wrong the next try waits twice as long, a day at most. */
static void test_tries_become_rare(void **state)
{
    (void)state;
    struct batch_size b = { .full = 100000, .bytes = 100000, .shrink = true };
    int64_t now = 1, wait = 10 * MINUTES;
    assert_true(batch_size_change(&b, true, now));
    for (int i = 0; i < 10; i++) {
        renew(&b);
        now += wait;
        assert_false(batch_size_change(&b, true, now - 1));
        assert_true(batch_size_change(&b, true, now));
        renew(&b);
        assert_int_equal(b.bytes, 100000);
        b.shrink = true;
        assert_true(batch_size_change(&b, true, ++now));
        wait = LM_MIN(2 * wait, 24 * 60 * MINUTES);
    }
    renew(&b);                          /* one that holds, for as long as it had to wait */
    assert_true(batch_size_change(&b, true, now += wait));
    renew(&b);
    b.shrink = true;
    assert_true(batch_size_change(&b, true, now += wait));
    renew(&b);
    assert_true(batch_size_change(&b, true, now + 10 * MINUTES));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_who_is_believed),
        cmocka_unit_test(test_down_and_up),
        cmocka_unit_test(test_tries_become_rare),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
