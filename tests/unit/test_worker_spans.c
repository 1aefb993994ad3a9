/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_spans.c - which traceparent is one, and that a collector which never answers costs a
 * bounded number of prompts' spans and no time; and which times spans tell. What a collector
 * gets: tests/integration/ test_hostile.sh.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "silent_server.h"
#include "worker/spans.h"
#include "worker/worker.h"

#define TRACE "0af7651916cd43dd8448eb211c80319c"
#define PARENT "b7ad6b7169203331"
#define GOOD "00-" TRACE "-" PARENT "-01"

static void test_what_is_a_context(void **state)
{
    (void)state;
    static const struct { const char *text; bool good, sampled; } rows[] = {
        { GOOD, true, true },
        { "00-" TRACE "-" PARENT "-00", true, false },
        { "00-" TRACE "-" PARENT "-03", true, true },
        { "cc-" TRACE "-" PARENT "-01", true, true },           /* a later version */
        { "cc-" TRACE "-" PARENT "-01-what-will-be", true, true },
        { "cc-" TRACE "-" PARENT "-01.what", false, false },
        { "00-" TRACE "-" PARENT "-01-more", false, false },
        { "ff-" TRACE "-" PARENT "-01", false, false },
        { "00-00000000000000000000000000000000-" PARENT "-01", false, false },
        { "00-" TRACE "-0000000000000000-01", false, false },
        { "00-0AF7651916CD43DD8448EB211C80319C-" PARENT "-01", false, false },
        { "00-" TRACE "-" PARENT "-0", false, false },
        { "00-" TRACE "-" PARENT "-0g", false, false },
        { "0x-" TRACE "-" PARENT "-01", false, false },
        { "00_" TRACE "-" PARENT "-01", false, false },
        { "00-" TRACE "_" PARENT "-01", false, false },
        { "00-" TRACE "-" PARENT "_01", false, false },
        { "", false, false },
    };
    for (size_t i = 0; i < LM_COUNT(rows); i++) {
        struct span_context c = { .sampled = false };
        bool good = span_context_parse(rows[i].text, strlen(rows[i].text), &c);
        if (good != rows[i].good || (good && c.sampled != rows[i].sampled))
            fail_msg("%s", rows[i].text);
        if (good)
            assert_true(c.trace[0] == 0x0a && c.trace[15] == 0x9c && c.parent[0] == 0xb7 &&
                        c.parent[7] == 0x31);
    }
    struct span_context c;
    assert_false(span_context_parse(NULL, 0, &c));
}

/* ---- a worker whose collector never answers ----------------------------------------------- */

static struct config cfg;
static struct worker w;
static struct lease *lease;
static spans *s;
static int collector;

static int begin(void **state)
{
    (void)state;
    static char none[] = "", group[] = "g", url[64];
    struct lm_err err;
    int port;
    collector = listen_silently(&port);
    snprintf(url, sizeof url, "http://127.0.0.1:%d/v1/traces", port);
    cfg = (struct config){ .traces_otlp_url = url, .traces_auth_header = none,
                           .traces_ca_file = none, .group_id = group };
    memset(&w, 0, sizeof w);
    w.cfg = &cfg;
    snprintf(w.name, sizeof w.name, "w");
    metrics_init(&w.metrics);
    lease = lease_new("t", 0, (struct ledger_ref){ 0 });
    return spans_new(&w, &s, &err);
}

static int end(void **state)
{
    (void)state;
    spans_free(s);
    lease_unref(lease);
    metrics_release(&w.metrics);
    close(collector);
    return 0;
}

static struct job *prompt_with(const char *traceparent)
{
    struct job *j = NULL;
    struct header h = { "traceparent", traceparent, strlen(traceparent) };
    struct record r = { .headers = &h, .n_headers = 1 };
    assert_int_equal(job_new(lease, &r, &j), LM_OK);
    return j;
}

/* One batch is with the collector, SPANS_MAX wait, the rest is dropped; so is all in the end. */
static void test_a_silent_collector(void **state)
{
    (void)state;
    enum { SENT = SPANS_MAX + SPANS_BATCH + 1000 };
    struct job *followed = prompt_with(GOOD);
    struct job *not_sampled = prompt_with("00-" TRACE "-" PARENT "-00");
    struct job *damaged = prompt_with("00-" TRACE);
    for (int i = 0; i < SENT; i++) {
        spans_end(s, followed, OUTCOME_REPLY);
        spans_end(s, not_sampled, OUTCOME_REPLY);
        spans_end(s, damaged, OUTCOME_REPLY);
    }
    assert_in_range(atomic_load(&w.metrics.traces_dropped), 1000, 1000 + SPANS_BATCH);
    spans_stop(s);
    assert_int_equal(atomic_load(&w.metrics.traces_dropped), SENT);
    assert_int_equal(atomic_load(&w.metrics.traces), 0);
    spans_end(s, followed, OUTCOME_REPLY);          /* too late: dropped as well */
    assert_int_equal(atomic_load(&w.metrics.traces_dropped), SENT + 1);
    spans_end(NULL, followed, OUTCOME_REPLY);
    job_unref(followed);
    job_unref(not_sampled);
    job_unref(damaged);
}

/* A clock of the wall that stands, for who asks here. */
static _Atomic time_t wall_s;

int clock_gettime(clockid_t which, struct timespec *at)
{
    time_t s = atomic_load(&wall_s);
    if (which != CLOCK_REALTIME || !s)
        return (int)syscall(SYS_clock_gettime, which, at);
    *at = (struct timespec){ .tv_sec = s, .tv_nsec = 123456789 };
    return 0;
}

/* A prompt's times are those of its end: a clock that is set while spans wait moves none. */
static void test_the_clock_is_set_meanwhile(void **state)
{
    (void)state;
    struct job *j = prompt_with(GOOD);
    const char *at = NULL;
    json_t *o;
    size_t n;
    do {                                /* the sending thread may have been faster */
        atomic_store(&wall_s, 1700000000);
        spans_end(s, j, OUTCOME_REPLY);
        atomic_store(&wall_s, 1700003600);
    } while (!(o = spans_take(s, &n)));
    atomic_store(&wall_s, 0);
    assert_int_equal(json_unpack(o, "{s:[{s:[{s:[{s:s}]}]}]}", "resourceSpans", "scopeSpans",
                                 "spans", "endTimeUnixNano", &at), 0);
    assert_string_equal(at, "1700000000123456000");
    json_decref(o);
    job_unref(j);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_what_is_a_context),
        cmocka_unit_test_setup_teardown(test_a_silent_collector, begin, end),
        cmocka_unit_test_setup_teardown(test_the_clock_is_set_meanwhile, begin, end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
