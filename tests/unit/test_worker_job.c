/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_job.c - the list of jobs that wait for their time: who comes out when and in which
 * order, by random histories beside an array; and that what is due is found as fast among many that
 * are not. That a job's failure is one without memory, too.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "tests/unit/cpu_clock.h"
#include "tests/unit/rnd.h"
#include "worker/job.h"

/* ---- random histories ------------------------------------------------------------------- */

enum { JOBS = 200, STEPS = 200000, LATEST_US = 50000 };

static struct job jobs[JOBS];
static bool waits[JOBS];                /* the model, with each job's due_us */
static struct job_list list;

static size_t n_due(int64_t now)
{
    size_t n = 0;
    for (int i = 0; i < JOBS; i++)
        n += waits[i] && jobs[i].due_us <= now;
    return n;
}

static int expected_wait_ms(int64_t now, int cap)
{
    int64_t first = INT64_MAX / 2;
    for (int i = 0; i < JOBS; i++)
        if (waits[i])
            first = LM_MIN(first, jobs[i].due_us);
    return (int)LM_MAX(0, LM_MIN((first - now + 999) / 1000, cap));
}

/* They leave the model; who was due by `now` and no one else, in order if it is one. */
static void expect_chain(struct job *j, size_t n, int64_t now, bool ordered)
{
    for (int64_t before = INT64_MIN; j; j = j->next, n--) {
        assert_true(waits[j - jobs]);
        assert_true(j->due_us <= now && (!ordered || j->due_us >= before));
        assert_true(n > 0);
        before = j->due_us;
        waits[j - jobs] = false;
    }
    assert_int_equal(n, 0);
}

static void test_random_histories(void **state)
{
    (void)state;
    int64_t now = 0;
    for (int i = 0; i < STEPS; i++) {
        int k = rnd(JOBS), what = rnd(1000);
        if (what == 0) {
            expect_chain(job_list_take_all(&list), n_due(INT64_MAX), INT64_MAX, false);
        } else if (what < 300) {
            now += rnd(LATEST_US / 50);
            size_t n = n_due(now);
            expect_chain(job_list_take_due(&list, now), n, now, true);
        } else if (!waits[k]) {
            waits[k] = true;
            job_list_add(&list, &jobs[k], now + rnd(LATEST_US) / 100 * 100);    /* equals, too */
        }
        assert_int_equal(job_list_wait_ms(&list, now, 40), expected_wait_ms(now, 40));
    }
    expect_chain(job_list_take_all(&list), n_due(INT64_MAX), INT64_MAX, false);
    assert_null(job_list_take_due(&list, INT64_MAX));
    assert_null(job_list_take_all(&list));
}

/* ---- cost ------------------------------------------------------------------------------- */

/* CPU nanoseconds of one retry, where n wait for up to n ticks and each that is due waits anew. */
static int64_t ns_a_retry(int n)
{
    enum { RETRIES = 5000 };
    struct job *all = calloc((size_t)n, sizeof *all);
    struct job_list l = { 0 };
    assert_non_null(all);
    for (int i = 0; i < n; i++)
        job_list_add(&l, &all[i], rnd(n));
    int64_t start = cpu_ns();
    int done = 0;
    for (int64_t now = 0; done < RETRIES; now++)
        for (struct job *j = job_list_take_due(&l, now), *next; j; j = next, done++) {
            next = j->next;
            job_list_add(&l, j, now + 1 + rnd(n));
        }
    int64_t spent = (cpu_ns() - start) / done;
    free(all);
    return spent;
}

/* A list that is looked through takes 200 times as long, and much more, as 20,000 jobs do not fit
 * the caches. The steps of a tree are as its height, twice as many, of which these make some 20. */
static void test_cost_of_many(void **state)
{
    (void)state;
    int64_t few = INT64_MAX, many = INT64_MAX;
    for (int i = 0; i < 3; i++) {
        few = LM_MIN(few, ns_a_retry(100));
        many = LM_MIN(many, ns_a_retry(20000));
    }
    print_message("%lld ns a retry among 100, %lld among 20,000\n", (long long)few,
                  (long long)many);
    assert_true(many < 100 * few);
}

/* ---- failures --------------------------------------------------------------------------- */

static bool no_memory;

void *__real_lm_malloc(size_t size);
void *__wrap_lm_malloc(size_t size);
void *__wrap_lm_malloc(size_t size)
{
    return no_memory ? NULL : __real_lm_malloc(size);
}

static void test_a_failure_without_memory(void **state)
{
    (void)state;
    struct job j = { 0 };
    struct lm_err away = { LM_NET, "the store is away" }, other = { LM_NOT_FOUND, "no such" }, why;
    assert_int_equal(job_failure(&j, &why), LM_OK);
    no_memory = true;
    job_fail(&j, &away);
    assert_int_equal(job_failure(&j, &why), LM_NET);
    assert_int_equal(why.code, LM_NET);
    assert_string_equal(why.msg, lm_status_text(LM_NET));
    no_memory = false;
    job_fail(&j, &away);
    assert_int_equal(job_failure(&j, &why), LM_NET);
    assert_string_equal(why.msg, "the store is away");
    no_memory = true;                   /* it needs none any more */
    job_fail(&j, &other);
    assert_int_equal(job_failure(&j, &why), LM_NOT_FOUND);
    assert_string_equal(why.msg, "no such");
    no_memory = false;
    job_fail(&j, NULL);
    assert_int_equal(job_failure(&j, &why), LM_OK);
    assert_null(j.err);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_histories), cmocka_unit_test(test_cost_of_many),
        cmocka_unit_test(test_a_failure_without_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
