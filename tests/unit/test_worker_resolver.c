/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_resolver.c - a name that nobody answers for holds up nobody's end: spans, claims,
 * adapters, schemas. Each must be gone while the system's resolver still tries.
 */
#include <netdb.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "worker/codec/registry.h"
#include "worker/spans.h"
#include "worker/store/fetch.h"
#include "worker/worker.h"

enum { TRIES_S = 20 };          /* for so long the resolver tries; the others need 4 s at most */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;
static int asking;
static bool enough;

/* Wins over the system's. */
int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints,
                struct addrinfo **found)
{
    (void)name, (void)service, (void)hints, (void)found;
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += TRIES_S;
    pthread_mutex_lock(&lock);
    asking++;
    pthread_cond_broadcast(&moved);
    while (!enough && !pthread_cond_timedwait(&moved, &lock, &end))
        ;
    asking--;
    pthread_cond_broadcast(&moved);
    pthread_mutex_unlock(&lock);
    return EAI_AGAIN;
}

static int now_asking(void)
{
    pthread_mutex_lock(&lock);
    int n = asking;
    pthread_mutex_unlock(&lock);
    return n;
}

static void until_asked(void)
{
    pthread_mutex_lock(&lock);
    while (!asking)
        pthread_cond_wait(&moved, &lock);
    pthread_mutex_unlock(&lock);
}

static int let_them_end(void **state)
{
    (void)state;
    pthread_mutex_lock(&lock);
    enough = true;
    pthread_cond_broadcast(&moved);
    while (asking)
        pthread_cond_wait(&moved, &lock);
    enough = false;
    pthread_mutex_unlock(&lock);
    return 0;
}

static void test_spans(void **state)
{
    (void)state;
    static char none[] = "", url[] = "http://nobody.example:4318/v1/traces", group[] = "g";
    static const char context[] = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    struct config cfg = { .traces_otlp_url = url, .traces_auth_header = none,
                          .traces_ca_file = none, .group_id = group };
    struct worker w = { .cfg = &cfg, .name = "w" };
    struct lease *lease = lease_new("t", 0, (struct ledger_ref){ 0 });
    struct header h = { "traceparent", context, strlen(context) };
    struct record r = { .headers = &h, .n_headers = 1 };
    struct lm_err err;
    struct job *j;
    spans *s;
    metrics_init(&w.metrics);
    assert_int_equal(job_new(lease, &r, &j), LM_OK);
    assert_int_equal(spans_new(&w, &s, &err), LM_OK);
    spans_end(s, j, OUTCOME_REPLY);
    until_asked();
    spans_free(s);
    assert_true(now_asking());
    job_unref(j);
    lease_unref(lease);
    metrics_release(&w.metrics);
}

static void test_claims(void **state)
{
    (void)state;
    static char none[] = "", url[] = "http://nobody.example/{object}", text[] = "a reply";
    struct config cfg = { .claim_url = url, .claim_auth_header = none, .claim_s3_region = none,
                          .adapters_ca_file = none };
    struct worker w = { .cfg = &cfg, .name = "w" };
    struct lease *lease = lease_new("t", 0, (struct ledger_ref){ 0 });
    struct record r = { .offset = 0 };
    struct lm_err err;
    struct job *j;
    claims *c;
    metrics_init(&w.metrics);
    job_queue_init(&w.done);
    assert_int_equal(job_new(lease, &r, &j), LM_OK);
    j->out.value = text;
    j->out.len = sizeof text;
    assert_int_equal(claims_new(&w, &c, &err), LM_OK);
    claims_put(c, j);
    until_asked();
    atomic_store(&w.ending, true);
    claims_free(c);
    assert_true(now_asking());
    assert_ptr_equal(job_queue_take(&w.done, 0), j);    /* it runs again elsewhere */
    assert_int_equal(j->outcome, OUTCOME_DROPPED);
    job_unref(j);
    job_queue_release(&w.done);
    lease_unref(lease);
    metrics_release(&w.metrics);
}

static void not_yet(void *ctx, struct fetch *file)
{
    (void)ctx;
    (void)file;
    abort();
}

static void test_adapters(void **state)
{
    (void)state;
    struct fetcher_config cfg = { .connect_timeout_ms = 60000, .stall_timeout_ms = 60000 };
    FILE *to = tmpfile();
    struct fetch file = { .url = "http://nobody.example/x", .fd = fileno(to), .max_bytes = 1,
                          .total = FETCH_UNKNOWN };
    struct lm_err err;
    fetcher *f;
    assert_int_equal(fetcher_new(&cfg, &f, &err), LM_OK);
    assert_int_equal(fetch_start(f, &file, &err), LM_OK);
    while (!now_asking())
        fetcher_run(f, 10, not_yet, NULL);
    fetcher_free(f);
    assert_true(now_asking());
    fclose(to);
}

static void test_schemas(void **state)
{
    (void)state;
    struct registry_config cfg = { .url = "http://nobody.example", .connect_ms = 300,
                                   .total_ms = 300 };
    struct lm_err err;
    registry *r;
    char *text = NULL;
    assert_int_equal(registry_new(&cfg, &r, &err), LM_OK);
    assert_int_equal(registry_by_id(r, 1, &text, &err), LM_NET);
    registry_free(r);
    assert_true(now_asking());
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_spans, let_them_end),
        cmocka_unit_test_teardown(test_claims, let_them_end),
        cmocka_unit_test_teardown(test_adapters, let_them_end),
        cmocka_unit_test_teardown(test_schemas, let_them_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
