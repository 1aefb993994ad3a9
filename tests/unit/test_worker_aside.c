/* SPDX-License-Identifier: Apache-2.0 */
/* test_worker_aside.c - how often a topic that took nothing is tried, and with how much. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "worker/aside.h"

enum { SECOND = 1000000, BASE_MS = 50, MOST_MS = 15000 };

static struct aside a;

static struct job *job_for(const char *topic, const char *notice)
{
    struct job *j = lm_calloc(1, sizeof *j);
    j->out.topic = topic;
    if (notice) {
        j->notice = lm_calloc(1, sizeof *j->notice);
        j->notice->topic = notice;
    }
    return j;
}

static void free_job(struct job *j)
{
    free(j->notice);
    free(j);
}

static int drop_all(void **state)
{
    (void)state;
    a.rest_us = 0;
    for (struct job *j = aside_take_all(&a), *next; j; j = next) {
        next = j->next;
        free_job(j);
    }
    return 0;
}

static struct aside_topic *add(const char *topic, int n)
{
    while (n--)
        assert_int_equal(aside_add(&a, topic, job_for(topic, NULL), 0), LM_OK);
    struct aside_topic *t = aside_due(&a, 0);
    assert_non_null(t);
    return t;
}

static void a_job_is_kept_if_one_of_its_records_is_for_the_topic(void **state)
{
    (void)state;
    struct job *other = job_for("t", "u");
    assert_false(aside_keep(&a, other, 0));
    struct aside_topic *t = add("x", 1);
    assert_false(aside_keep(&a, other, 0));
    free_job(other);
    assert_true(aside_keep(&a, job_for("x", NULL), 0));
    assert_true(aside_keep(&a, job_for("dead", "x"), 0));
    assert_int_equal(t->jobs.length, 3);
}

/* One, two, four ... as long as they are taken; between two tries the others have a turn. */
static void tries_grow(void **state)
{
    (void)state;
    struct aside_topic *t = add("x", 9);
    size_t n = 1;
    for (int64_t now = 0; n < 8; n *= 2, now += 1000) {
        assert_int_equal(t->width, n);
        for (size_t i = 0; i < n; i++)
            free_job(job_chain_pop(&t->jobs));
        aside_tried(&a, t, true, now, SECOND, now + 400, BASE_MS, MOST_MS);
        assert_int_equal(t->due_us, now + 800);
    }
    free_job(job_chain_pop(&t->jobs));
    free_job(job_chain_pop(&t->jobs));
    aside_tried(&a, t, true, 0, SECOND, 1, BASE_MS, MOST_MS);
    assert_null(a.topics);              /* nobody waits: it is as any other */
}

/* A failed one is followed by a rest of four times its length, of all topics, and its backoff. */
static void a_failed_try_is_followed_by_a_rest(void **state)
{
    (void)state;
    const int64_t most = 10 * SECOND;
    struct aside_topic *t = add("x", 9);
    assert_int_equal(aside_add(&a, "y", job_for("y", NULL), 0), LM_OK);
    aside_tried(&a, t, false, 0, most, 3 * SECOND, BASE_MS, MOST_MS);
    assert_null(aside_due(&a, 15 * SECOND - 1));
    assert_in_range(aside_wait_ms(&a, 3 * SECOND, 20000), 12000, 12000);
    assert_non_null(aside_due(&a, 15 * SECOND));
    for (int i = 1; i < 5; i++) {
        aside_tried(&a, t, false, 0, SECOND, 0, BASE_MS, MOST_MS);
        assert_in_range(t->due_us, BASE_MS * 500 << i, BASE_MS * 1000 << i);
    }
    for (int i = 0; i < 100; i++)
        aside_tried(&a, t, false, 0, SECOND, 0, BASE_MS, MOST_MS);
    assert_in_range(t->due_us, MOST_MS * 500, MOST_MS * 1000);
}

/* A second, then two, and now and then all that a transaction has; what was enough is kept. */
static void a_try_has_its_time(void **state)
{
    (void)state;
    const int64_t most = 10 * SECOND;
    struct aside_topic *t = add("x", 99);
    assert_int_equal(aside_limit_us(t, most), SECOND);
    for (int i = 1; i < 40; i++) {
        aside_tried(&a, t, false, 0, aside_limit_us(t, most), 0, BASE_MS, MOST_MS);
        assert_int_equal(aside_limit_us(t, most), i % 8 == 7 ? most : 2 * SECOND);
    }
    assert_int_equal(aside_limit_us(t, most), most);
    aside_tried(&a, t, true, 0, most, 0, BASE_MS, MOST_MS);
    assert_int_equal(aside_limit_us(t, most), most);
    assert_int_equal(t->width, 2);
    aside_tried(&a, t, true, 0, most, 0, BASE_MS, MOST_MS);
    aside_tried(&a, t, false, 0, most, 0, BASE_MS, MOST_MS);    /* too many for its time: */
    assert_int_equal(t->width, 2);                              /* half as many */
    assert_int_equal(aside_limit_us(t, most), most);
    assert_int_equal(aside_limit_us(t, SECOND / 2), SECOND / 2);
}

/* The brokers were gone for ten minutes, in the middle of a try: that is not the topic's fault.
 * With a new client all are due. */
static void an_outage_is_followed_by_no_longer_rest(void **state)
{
    (void)state;
    struct aside_topic *t = add("x", 1);
    aside_tried(&a, t, false, 0, SECOND, 600 * SECOND, BASE_MS, MOST_MS);
    assert_null(aside_due(&a, 604 * SECOND - 1));
    assert_ptr_equal(aside_due(&a, 604 * SECOND), t);
    aside_all_due(&a, 601 * SECOND);
    assert_ptr_equal(aside_due(&a, 601 * SECOND), t);
}

/* None of its jobs could be sent, for want of room in a map: no failure, and then all of them go,
 * for one of them may be what moves the map on. */
static void a_try_of_nothing_tells_nothing(void **state)
{
    (void)state;
    struct aside_topic *t = add("x", 9);
    t->width = 4;
    aside_waits(&a, t, SECOND);
    assert_true(t->whole);
    assert_int_equal(t->width, 4);
    assert_int_equal(t->failures, 0);
    assert_in_range(t->due_us, SECOND, 2 * SECOND);
    aside_tried(&a, t, false, 0, SECOND, 0, BASE_MS, MOST_MS);
    assert_false(t->whole);
}

static void refuse(const char *topic, int64_t now_us)
{
    struct job *j = job_for(topic, NULL);
    assert_int_equal(aside_add(&a, topic, j, now_us), LM_OK);
    struct aside_topic *t = aside_due(&a, now_us);
    assert_non_null(t);
    t->forbidden = true;
    free_job(job_chain_pop(&t->jobs));
    aside_tried(&a, t, true, now_us, SECOND, now_us, BASE_MS, MOST_MS);
}

/* One that we may not write to is remembered for a minute, and what comes for it is tried alone. */
static void a_forbidden_topic_is_remembered(void **state)
{
    (void)state;
    refuse("x", 0);
    assert_non_null(a.topics);
    assert_int_equal(aside_wait_ms(&a, 59 * SECOND, 5000), 5000);
    assert_null(aside_due(&a, 59 * SECOND));
    assert_true(aside_keep(&a, job_for("x", NULL), 59 * SECOND));
    struct aside_topic *t = aside_due(&a, 59 * SECOND);
    assert_non_null(t);
    free_job(job_chain_pop(&t->jobs));
    aside_tried(&a, t, true, 59 * SECOND, SECOND, 59 * SECOND, BASE_MS, MOST_MS);
    assert_null(aside_due(&a, 118 * SECOND));
    assert_non_null(a.topics);
    assert_null(aside_due(&a, 119 * SECOND));
    assert_null(a.topics);
}

/* ... but prompts may name any number of them. */
static void only_so_many_are_remembered(void **state)
{
    (void)state;
    char names[1000][16];
    for (int i = 0; i < 1000; i++) {
        snprintf(names[i], sizeof names[i], "x%d", i);
        refuse(names[i], i);
    }
    int n = 0;
    for (const struct aside_topic *t = a.topics; t; t = t->next)
        n++;
    assert_in_range(n, 10, 100);
}

/* A dead letter waits with its notice for a topic that is still to be tried, and for no other. */
static void a_notice_waits_for_the_first_look_only(void **state)
{
    (void)state;
    struct job *j = job_for("dead", "x");
    assert_false(aside_spares(&a, j));
    struct aside_topic *t = add("x", 1);
    assert_false(aside_spares(&a, j));
    aside_looked(t, 0, BASE_MS, MOST_MS);
    assert_true(aside_spares(&a, j));
    assert_true(aside_is_for(t, j));
    free_job(j);
    j = job_for("x", NULL);
    assert_false(aside_spares(&a, j));
    assert_true(aside_is_for(t, j));
    free_job(j);
}

/* Leaders are asked for each second at most, and at least. */
static void looks_are_cheap_and_go_on(void **state)
{
    (void)state;
    struct aside_topic *t = add("x", 1);
    for (int i = 0; i < 100; i++) {
        aside_looked(t, SECOND, BASE_MS, MOST_MS);
        assert_in_range(t->due_us, SECOND + BASE_MS * 500, 2 * SECOND);
    }
    assert_in_range(t->due_us, SECOND + SECOND / 2, 2 * SECOND);
    assert_null(aside_due(&a, SECOND));
    assert_in_range(aside_wait_ms(&a, SECOND, 5000), 500, 1000);
    assert_int_equal(aside_wait_ms(&a, SECOND, 100), 100);
    assert_int_equal(aside_wait_ms(&a, 3 * SECOND, 100), 0);
    assert_ptr_equal(aside_due(&a, 2 * SECOND), t);
}

/* No topic's turn comes before that of one that waits for longer. */
static void who_is_due_longest_is_tried_first(void **state)
{
    (void)state;
    struct aside_topic *x = add("x", 1);
    aside_looked(x, 0, BASE_MS, MOST_MS);
    struct aside_topic *y = add("y", 1);
    aside_looked(y, 5 * SECOND, BASE_MS, MOST_MS);
    assert_ptr_equal(aside_due(&a, 9 * SECOND), x);
    aside_looked(x, 9 * SECOND, BASE_MS, MOST_MS);
    assert_ptr_equal(aside_due(&a, 20 * SECOND), y);
}

#define TEST(f) cmocka_unit_test_teardown(f, drop_all)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_job_is_kept_if_one_of_its_records_is_for_the_topic), TEST(tries_grow),
        TEST(a_failed_try_is_followed_by_a_rest), TEST(a_try_has_its_time),
        TEST(looks_are_cheap_and_go_on),
        TEST(who_is_due_longest_is_tried_first), TEST(an_outage_is_followed_by_no_longer_rest),
        TEST(a_try_of_nothing_tells_nothing), TEST(a_forbidden_topic_is_remembered),
        TEST(only_so_many_are_remembered), TEST(a_notice_waits_for_the_first_look_only),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
