/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_spans.c - which traceparent is one, and that a collector which never answers costs a
 * bounded number of prompts' spans and no time; and which times spans tell. What a collector
 * gets: tests/integration/ test_hostile.sh.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

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

/* Connections are taken by the system, and nobody reads from them. */
static int listen_silently(char *url, size_t size)
{
    struct sockaddr_in at = { .sin_family = AF_INET };
    socklen_t len = sizeof at;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 16) ||
        getsockname(fd, (struct sockaddr *)&at, &len))
        abort();
    snprintf(url, size, "http://127.0.0.1:%d/v1/traces", ntohs(at.sin_port));
    return fd;
}

static struct job *prompt_with(struct lease *lease, const char *traceparent)
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
    static char none[] = "";
    char url[64], group[] = "g";
    struct config cfg = { .traces_otlp_url = url, .traces_auth_header = none,
                          .traces_ca_file = none, .group_id = group };
    struct worker w = { .cfg = &cfg, .name = "w" };
    struct lm_err err;
    spans *s;
    int fd = listen_silently(url, sizeof url);
    struct lease *lease = lease_new("t", 0, (struct ledger_ref){ 0 });
    struct job *followed = prompt_with(lease, GOOD);
    struct job *not_sampled = prompt_with(lease, "00-" TRACE "-" PARENT "-00");
    struct job *damaged = prompt_with(lease, "00-" TRACE);
    metrics_init(&w.metrics);
    assert_int_equal(spans_new(&w, &s, &err), LM_OK);
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
    spans_free(s);
    spans_end(NULL, followed, OUTCOME_REPLY);
    job_unref(followed);
    job_unref(not_sampled);
    job_unref(damaged);
    lease_unref(lease);
    metrics_release(&w.metrics);
    close(fd);
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
    static char none[] = "";
    char url[64], group[] = "g";
    struct config cfg = { .traces_otlp_url = url, .traces_auth_header = none,
                          .traces_ca_file = none, .group_id = group };
    struct worker w = { .cfg = &cfg, .name = "w" };
    struct lm_err err;
    const char *end = NULL;
    spans *s;
    json_t *o;
    size_t n;
    int fd = listen_silently(url, sizeof url);
    struct lease *lease = lease_new("t", 0, (struct ledger_ref){ 0 });
    struct job *j = prompt_with(lease, GOOD);
    metrics_init(&w.metrics);
    assert_int_equal(spans_new(&w, &s, &err), LM_OK);
    do {                                /* the sending thread may have been faster */
        atomic_store(&wall_s, 1700000000);
        spans_end(s, j, OUTCOME_REPLY);
        atomic_store(&wall_s, 1700003600);
    } while (!(o = spans_take(s, &n)));
    atomic_store(&wall_s, 0);
    assert_int_equal(json_unpack(o, "{s:[{s:[{s:[{s:s}]}]}]}", "resourceSpans", "scopeSpans",
                                 "spans", "endTimeUnixNano", &end), 0);
    assert_string_equal(end, "1700000000123456000");
    json_decref(o);
    spans_free(s);
    job_unref(j);
    lease_unref(lease);
    metrics_release(&w.metrics);
    close(fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_what_is_a_context), cmocka_unit_test(test_a_silent_collector),
        cmocka_unit_test(test_the_clock_is_set_meanwhile),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
