/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_progress.c - the progress bar against a clock of our own and a stream in memory.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "worker/tools/progress.h"

static int64_t clock_us;

static int64_t fake_now(void)
{
    return clock_us;
}

struct screen {
    char *text;
    size_t size;
    FILE *out;
    progress *p;
};

static void open_screen(struct screen *s, enum progress_style style, uint64_t total, int columns)
{
    clock_us = 1000000;
    s->out = open_memstream(&s->text, &s->size);
    assert_non_null(s->out);
    struct progress_config cfg = { .out = s->out, .label = "submit", .unit = "prompts",
                                   .total = total, .style = style, .columns = columns,
                                   .now_us = fake_now };
    s->p = progress_new(&cfg);
    assert_non_null(s->p);
}

static void close_screen(struct screen *s)
{
    progress_free(s->p);
    fclose(s->out);
    free(s->text);
}

/* What stands on the terminal's current line. */
static const char *last_line(struct screen *s)
{
    fflush(s->out);
    const char *cr = strrchr(s->text, '\r');
    return cr ? cr + 1 : s->text;
}

static void advance(struct screen *s, int64_t us, uint64_t done)
{
    clock_us += us;
    progress_set(s->p, done);
}

static void test_counts(void **state)
{
    (void)state;
    char b[32];
    assert_string_equal(progress_count(b, 0), "0");
    assert_string_equal(progress_count(b, 999), "999");
    assert_string_equal(progress_count(b, 1000), "1,000");
    assert_string_equal(progress_count(b, 1234567), "1,234,567");
    assert_string_equal(progress_count(b, UINT64_MAX), "18,446,744,073,709,551,615");
}

static void test_clocks(void **state)
{
    (void)state;
    char b[32];
    assert_string_equal(progress_clock(b, 7.4), "0:07");
    assert_string_equal(progress_clock(b, 754), "12:34");
    assert_string_equal(progress_clock(b, 11045), "3:04:05");
    assert_string_equal(progress_clock(b, -1), "-:--");
    assert_string_equal(progress_clock(b, 1e18), "-:--");
}

static void test_bar_shows_share_rate_and_eta(void **state)
{
    (void)state;
    struct screen s;
    open_screen(&s, PROGRESS_BAR, 1000, 100);
    for (int i = 1; i <= 10; i++)
        advance(&s, 200000, (uint64_t)i * 50);
    const char *line = last_line(&s);
    assert_non_null(strstr(line, "[###############---------------]"));
    assert_non_null(strstr(line, "500/1,000   50%  250 prompts/s  ETA 0:02"));
    close_screen(&s);
}

static void test_bar_is_not_redrawn_too_often(void **state)
{
    (void)state;
    struct screen s;
    open_screen(&s, PROGRESS_BAR, 100000, 80);
    for (int i = 0; i < 10000; i++)
        advance(&s, 100, (uint64_t)i);
    fflush(s.out);
    int draws = 0;
    for (const char *c = s.text; *c; c++)
        draws += *c == '\r';
    assert_in_range(draws, 9, 11);
    close_screen(&s);
}

static void test_bar_fits_narrow_terminals(void **state)
{
    (void)state;
    for (int columns = 40; columns <= 120; columns++) {
        struct screen s;
        open_screen(&s, PROGRESS_BAR, 1000000, columns);
        progress_note(s.p, "%d refused, and a note that goes on for quite some time", 3);
        advance(&s, 1000000, 123456);
        const char *line = last_line(&s);
        const char *end = strstr(line, "\033[K");
        assert_non_null(end);
        assert_true(end - line < columns);
        close_screen(&s);
    }
}

static void test_lines_every_five_seconds(void **state)
{
    (void)state;
    struct screen s;
    open_screen(&s, PROGRESS_LINES, 100, 0);
    for (int i = 1; i <= 12; i++)
        advance(&s, 1000000, (uint64_t)i);
    progress_finish(s.p);
    fflush(s.out);
    int lines = 0;
    for (const char *c = s.text; *c; c++)
        lines += *c == '\n';
    assert_int_equal(lines, 3);
    assert_null(strchr(s.text, '\r'));
    assert_non_null(strstr(s.text, "12/100   12%  1.00 prompts/s  in 0:12\n"));
    close_screen(&s);
}

static void test_unknown_total(void **state)
{
    (void)state;
    struct screen s;
    open_screen(&s, PROGRESS_BAR, 0, 80);
    advance(&s, 2000000, 5000);
    assert_non_null(strstr(last_line(&s), "submit  5,000  2,500 prompts/s  in 0:02"));
    close_screen(&s);
}

static void test_rate_follows_a_change(void **state)
{
    (void)state;
    struct screen s;
    open_screen(&s, PROGRESS_BAR, 1000000, 100);
    uint64_t done = 0;
    for (int i = 0; i < 100; i++)
        advance(&s, 100000, done += 10);
    assert_non_null(strstr(last_line(&s), " 100 prompts/s"));
    for (int i = 0; i < 400; i++)
        advance(&s, 100000, done += 100);
    assert_non_null(strstr(last_line(&s), " 1,000 prompts/s"));
    close_screen(&s);
}

static void test_stalled_work_has_no_eta(void **state)
{
    (void)state;
    struct screen s;
    open_screen(&s, PROGRESS_BAR, 100, 100);
    advance(&s, 1000000, 0);
    assert_non_null(strstr(last_line(&s), "ETA -:--"));
    close_screen(&s);
}

/* Nor has work of which the first hundredth is not done: a worker may still load its model. */
static void test_early_work_has_no_eta(void **state)
{
    (void)state;
    struct screen s;
    open_screen(&s, PROGRESS_BAR, 1000, 100);
    advance(&s, 1000000, 9);
    assert_non_null(strstr(last_line(&s), "ETA -:--"));
    advance(&s, 1000000, 10);
    assert_null(strstr(last_line(&s), "ETA -:--"));
    close_screen(&s);
}

static void test_say_stays_above_the_bar(void **state)
{
    (void)state;
    struct screen s;
    open_screen(&s, PROGRESS_BAR, 100, 100);
    advance(&s, 1000000, 50);
    progress_say(s.p, "line %d: bad", 7);
    fflush(s.out);
    assert_non_null(strstr(s.text, "\r\033[Kline 7: bad\n\rsubmit"));
    close_screen(&s);
}

static void test_silent_and_null(void **state)
{
    (void)state;
    struct screen s;
    open_screen(&s, PROGRESS_SILENT, 100, 100);
    advance(&s, 60000000, 50);
    progress_finish(s.p);
    fflush(s.out);
    assert_int_equal(s.size, 0);
    close_screen(&s);
    progress_set(NULL, 1);
    progress_note(NULL, "x");
    progress_finish(NULL);
    progress_free(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_counts),
        cmocka_unit_test(test_clocks),
        cmocka_unit_test(test_bar_shows_share_rate_and_eta),
        cmocka_unit_test(test_bar_is_not_redrawn_too_often),
        cmocka_unit_test(test_bar_fits_narrow_terminals),
        cmocka_unit_test(test_lines_every_five_seconds),
        cmocka_unit_test(test_unknown_total),
        cmocka_unit_test(test_rate_follows_a_change),
        cmocka_unit_test(test_stalled_work_has_no_eta),
        cmocka_unit_test(test_early_work_has_no_eta),
        cmocka_unit_test(test_say_stays_above_the_bar),
        cmocka_unit_test(test_silent_and_null),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
