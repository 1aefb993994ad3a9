/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_log.c - what many records say while something is away is one warning in ten seconds,
 * with the number of the others.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "worker/log.h"

static int lines[LM_DEBUG + 1];
static char last_warning[256];

static void count(void *ctx, enum lm_level level, const char *component, const char *line)
{
    (void)ctx;
    lines[level]++;
    assert_string_equal(component, "store");
    if (level == LM_WARN)
        snprintf(last_warning, sizeof last_warning, "%s", line);
}

static void say(struct log_seldom *s, int from, int to)
{
    for (int i = from; i < to; i++)
        log_seldom(s, "store", "prompt %d waits", i);
}

static void test_seldom(void **state)
{
    (void)state;
    struct log_seldom s = { 0 };
    lm_log_set_level(LM_DEBUG);
    lm_log_set_sink(count, NULL);
    say(&s, 0, 1000);
    assert_int_equal(lines[LM_WARN], 1);
    assert_int_equal(lines[LM_DEBUG], 999);
    assert_string_equal(last_warning, "prompt 0 waits");
    assert_in_range(atomic_load(&s.next_us), lm_now_us() + 5000000, lm_now_us() + 10000000);
    atomic_store(&s.next_us, lm_now_us());      /* ten seconds later */
    say(&s, 1000, 1010);
    assert_int_equal(lines[LM_WARN], 2);
    assert_string_equal(last_warning, "prompt 1000 waits (and 999 more such since the last)");
    atomic_store(&s.next_us, lm_now_us());
    say(&s, 1010, 1011);
    assert_string_equal(last_warning, "prompt 1010 waits (and 9 more such since the last)");
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_seldom) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
