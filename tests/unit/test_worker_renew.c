/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_renew.c - at-least-once: what becomes of records that wait in a client which keeps to
 * a leader of before, and of those behind them. The real producer thread, and real clients of a
 * broker that never says a word, so that records stay in them; that one is stuck, and who leads, is
 * the test's to say. On real brokers: tests/integration/test_brokers.sh; how it is
 * noticed: test_worker_leaders.c.
 */
#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "silent_server.h"
#include "worker/producer_int.h"

enum { MOST_US = 20 * 1000000, OLD_RECORDS = 3, ALL = 4, JOBS = 1000 };

static struct config cfg;
static struct worker w;
static producer *p;
static struct lease *lease;
static struct job *jobs[JOBS];
static int broker;

/* ---- the client library ----------------------------------------------------------------- */

static rd_kafka_t *_Atomic stuck;             /* NULL: none is */
static atomic_int in_new_at_end = -1;   /* records, when the old one is destroyed */
static int polls_after_end;             /* of the old one, before it is told to give all back */
static bool given_back;
static atomic_int woken;                /* the producer thread, out of its poll */
static atomic_bool begun;               /* `p` is there */
static atomic_int refused;              /* batches, from now on: that many verdicts */
static atomic_bool time_passes;         /* as much as batches wait for before they grow */
static atomic_llong batch;              /* batch.size, and for how long */
static atomic_llong batch_wait_us;

static void look_at_batches(const rd_kafka_t *rk)
{
    if (rk == p->rk && !p->renewing && atomic_load(&refused) > 0) {
        p->batch.shrink = true;
        atomic_fetch_sub(&refused, 1);
    }
    if (atomic_load(&time_passes) && p->batch.most)
        p->batch.grow_at_us = 0;
    atomic_store(&batch_wait_us, p->batch.grow_wait_us);
    atomic_store(&batch, p->batch.bytes);
}

static atomic_int clients_to_fail;

/* These win over the shared library's. */
rd_kafka_t *rd_kafka_new(rd_kafka_type_t type, rd_kafka_conf_t *conf, char *why, size_t size)
{
    rd_kafka_t *(*real)(rd_kafka_type_t, rd_kafka_conf_t *, char *, size_t) =
        (__typeof__(real))dlsym(RTLD_NEXT, "rd_kafka_new");
    if (atomic_load(&clients_to_fail) == 0)
        return real(type, conf, why, size);
    atomic_fetch_sub(&clients_to_fail, 1);
    snprintf(why, size, "no threads");
    return NULL;
}

int rd_kafka_poll(rd_kafka_t *rk, int timeout_ms)
{
    int (*real)(rd_kafka_t *, int) = (__typeof__(real))dlsym(RTLD_NEXT, "rd_kafka_poll");
    if (rk == stuck && !p->renewing) {
        p->stuck[0] = (struct stuck){ .topic = "replies", .partition = 0, .leader = 1 };
        p->n_stuck = 1;
    }
    if (atomic_load(&begun))
        look_at_batches(rk);
    polls_after_end += rk == stuck && p && atomic_load(&p->end) && !given_back;
    return real(rk, timeout_ms);
}

rd_kafka_resp_err_t rd_kafka_purge(rd_kafka_t *rk, int flags)
{
    rd_kafka_resp_err_t (*real)(rd_kafka_t *, int) =
        (__typeof__(real))dlsym(RTLD_NEXT, "rd_kafka_purge");
    given_back |= rk == stuck;
    return real(rk, flags);
}

rd_kafka_resp_err_t rd_kafka_metadata(rd_kafka_t *rk, int all, rd_kafka_topic_t *only,
                                      const struct rd_kafka_metadata **out, int timeout_ms)
{
    static char topic[] = "replies";
    static rd_kafka_metadata_partition_t part = { .id = 0, .leader = 2 };
    static rd_kafka_metadata_topic_t t = { .topic = topic, .partition_cnt = 1,
                                           .partitions = &part };
    static rd_kafka_metadata_t md = { .topic_cnt = 1, .topics = &t };
    (void)rk;
    (void)all;
    (void)only;
    (void)timeout_ms;
    *out = &md;
    return RD_KAFKA_RESP_ERR_NO_ERROR;
}

void rd_kafka_metadata_destroy(const struct rd_kafka_metadata *md)
{
    (void)md;
}

void rd_kafka_queue_yield(rd_kafka_queue_t *q)
{
    void (*real)(rd_kafka_queue_t *) = (__typeof__(real))dlsym(RTLD_NEXT, "rd_kafka_queue_yield");
    atomic_fetch_add(&woken, 1);
    real(q);
}

void rd_kafka_destroy(rd_kafka_t *rk)
{
    void (*real)(rd_kafka_t *) = (__typeof__(real))dlsym(RTLD_NEXT, "rd_kafka_destroy");
    if (rk == stuck)
        atomic_store(&in_new_at_end, rd_kafka_outq_len(p->rk));
    real(rk);
}

/* ---- the worker ------------------------------------------------------------------------- */

static int begin(void **state)
{
    struct lm_err err;
    char address[64];
    int port;
    (void)state;
    broker = listen_silently(&port);
    snprintf(address, sizeof address, "kafka.bootstrap.servers=127.0.0.1:%d", port);
    if (config_init(&cfg, &err) || config_set(&cfg, address, &err))
        return -1;
    memset(&w, 0, sizeof w);
    w.cfg = &cfg;
    w.credentials = credentials_new(&cfg);
    snprintf(w.name, sizeof w.name, "w");
    job_queue_init(&w.done);
    metrics_init(&w.metrics);
    stuck = NULL;
    given_back = false;
    polls_after_end = 0;
    atomic_store(&woken, 0);
    atomic_store(&refused, 0);
    atomic_store(&clients_to_fail, 0);
    atomic_store(&batch, 0);
    atomic_store(&time_passes, false);
    atomic_store(&in_new_at_end, -1);
    lease = lease_new("t", 0, (struct ledger_ref){ 0 });
    if (producer_new(&w, &p, &err))
        return -1;
    atomic_store(&begun, true);
    return 0;
}

static void send_to(int i, const char *topic)
{
    static char text[] = "text";
    struct record r = { .offset = i };
    assert_int_equal(job_new(lease, &r, &jobs[i]), LM_OK);
    jobs[i]->outcome = OUTCOME_REPLY;
    jobs[i]->out = (struct outgoing){ .topic = topic, .partition = 0, .value = text,
                                      .len = sizeof text };
    producer_send(p, jobs[i]);
}

static void send_one(int i)
{
    send_to(i, "replies");
}

/* How many records the client of now has; -1: it is still the old one. */
static int in_new(const rd_kafka_t *old)
{
    pthread_mutex_lock(&p->swap);
    int n = p->rk == old ? -1 : rd_kafka_outq_len(p->rk);
    pthread_mutex_unlock(&p->swap);
    return n;
}

static void until_in_new(const rd_kafka_t *old, int n)
{
    const struct timespec tick = { 0, 1000000 };
    for (int64_t end = lm_now_us() + MOST_US; in_new(old) != n; nanosleep(&tick, NULL))
        if (lm_now_us() > end)
            fail_msg("the new client has %d records, not %d", in_new(old), n);
}

/* Those behind the first are held back for a moment. */
static void wait_for_held(rd_kafka_t *rk)
{
    const struct timespec tick = { 0, 1000000 };
    for (int64_t end = lm_now_us() + MOST_US; rd_kafka_outq_len(rk) < OLD_RECORDS;
         nanosleep(&tick, NULL))
        assert_true(lm_now_us() < end);
}

/* The old client gets records and turns out to be stuck; the new one is there. */
static rd_kafka_t *replace_client(void)
{
    rd_kafka_t *old = p->rk;
    for (int i = 0; i < OLD_RECORDS; i++)
        send_one(i);
    wait_for_held(old);
    stuck = old;
    until_in_new(old, 0);
    return old;
}

/* All jobs come back unanswered when the worker ends. */
static void all_are_dropped(int n)
{
    assert_true(producer_stop(p));
    for (struct job *j = job_queue_take(&w.done, 0), *next; j; j = next, n--) {
        next = j->next;
        assert_int_equal(j->outcome, OUTCOME_DROPPED);
        job_unref(j);
    }
    assert_int_equal(n, 0);
}

static int end(void **state)
{
    (void)state;
    atomic_store(&begun, false);
    producer_free(p);
    lease_unref(lease);
    job_queue_release(&w.done);
    metrics_release(&w.metrics);
    credentials_free(w.credentials);
    config_release(&cfg);
    close(broker);
    return 0;
}

/* ---- tests ------------------------------------------------------------------------------ */

/* New records need not wait for it; the old ones must, for the old client may read them until it is
 * gone. */
static void what_was_not_delivered_goes_with_the_new_client(void **state)
{
    (void)state;
    rd_kafka_t *old = replace_client();
    send_one(OLD_RECORDS);
    until_in_new(old, 1);
    until_in_new(old, ALL);
    assert_int_equal(atomic_load(&in_new_at_end), 1);
    assert_int_equal(atomic_load(&w.metrics.producer_rebuilds), 1);
    assert_int_equal(atomic_load(&w.failed), LM_OK);
    all_are_dropped(ALL);
}

/* A worker that ends meanwhile does not wait for it. */
static void an_end_cuts_the_drain_short(void **state)
{
    (void)state;
    replace_client();
    all_are_dropped(OLD_RECORDS);
    assert_int_equal(atomic_load(&in_new_at_end), 0);
    assert_in_range(polls_after_end, 0, 2);
}

/* No report ever comes: what is not held back is with the client when producer_send() returns. */
static void a_stuck_record_holds_no_other_topic_back(void **state)
{
    const struct timespec some = { 0, 2 * HOLD_US * INT64_C(1000) };
    (void)state;
    send_to(0, "side");
    nanosleep(&some, NULL);
    send_one(1);
    assert_int_equal(rd_kafka_outq_len(p->rk), 2);
    nanosleep(&some, NULL);
    send_to(2, "side");
    assert_int_equal(rd_kafka_outq_len(p->rk), 3);
    all_are_dropped(3);
}

static void until_batch_is(long long bytes)
{
    const struct timespec tick = { 0, 1000000 };
    for (int64_t until = lm_now_us() + MOST_US; atomic_load(&batch) != bytes;
         nanosleep(&tick, NULL))
        if (lm_now_us() > until)
            fail_msg("batches have %lld bytes, not %lld", atomic_load(&batch), bytes);
}

static void batches_that_were_refused_grow_again(void **state)
{
    (void)state;
    atomic_store(&refused, 2);
    until_batch_is(62500);
    assert_int_equal(atomic_load(&batch_wait_us), 600 * 1000000);
    atomic_store(&time_passes, true);
    until_batch_is(1000000);
    assert_int_equal(atomic_load(&w.metrics.producer_rebuilds), 4);
    all_are_dropped(0);
}

/* Refused at once when they had grown, so the next time is later. */
static void batches_that_grew_in_vain_wait_longer(void **state)
{
    (void)state;
    atomic_store(&refused, 1);
    until_batch_is(250000);
    atomic_store(&time_passes, true);
    until_batch_is(1000000);
    atomic_store(&time_passes, false);
    atomic_store(&refused, 1);
    until_batch_is(250000);
    assert_int_equal(atomic_load(&batch_wait_us), 1200 * 1000000);
    all_are_dropped(0);
}

/* Else its verdicts on large batches would be believed as those on small ones. */
static void a_client_that_stays_keeps_its_batches(void **state)
{
    const struct timespec tick = { 0, 1000000 };
    (void)state;
    atomic_store(&clients_to_fail, 1);
    atomic_store(&refused, 1);
    for (int64_t until = lm_now_us() + MOST_US; atomic_load(&clients_to_fail);
         nanosleep(&tick, NULL))
        assert_true(lm_now_us() < until);
    atomic_store(&batch, 0);            /* until it is looked at again */
    until_batch_is(1000000);
    assert_int_equal(atomic_load(&w.metrics.producer_rebuilds), 0);
    atomic_store(&refused, 1);
    until_batch_is(250000);
    all_are_dropped(0);
}

/* A new client could overtake it. */
static void batches_do_not_grow_while_something_is_on_its_way(void **state)
{
    const struct timespec some = { 0, 300 * 1000000 };
    (void)state;
    atomic_store(&refused, 1);
    until_batch_is(250000);
    send_one(0);
    atomic_store(&time_passes, true);
    nanosleep(&some, NULL);
    assert_int_equal(atomic_load(&batch), 250000);
    all_are_dropped(1);
}

/* Its time with us begins when it was answered. */
static void what_is_held_back_counts_as_on_its_way(void **state)
{
    (void)state;
    send_one(0);
    int64_t before = lm_now_us();
    send_one(1);
    assert_in_range(jobs[1]->out.handed_us, before, lm_now_us());
    all_are_dropped(2);
}

/* Pairs, until one comes while the thread sleeps for longer than the second may be held back. */
static void the_thread_is_woken_for_what_is_held_back(void **state)
{
    const struct timespec some = { 0, 2 * HOLD_US * INT64_C(1000) };
    (void)state;
    int n = 0;
    for (int64_t until = lm_now_us() + MOST_US; !atomic_load(&woken); nanosleep(&some, NULL)) {
        assert_true(lm_now_us() < until && n < JOBS);
        send_one(n++);
        send_one(n++);
    }
    all_are_dropped(n);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, begin, end)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(what_was_not_delivered_goes_with_the_new_client), TEST(an_end_cuts_the_drain_short),
        TEST(a_stuck_record_holds_no_other_topic_back),
        TEST(what_is_held_back_counts_as_on_its_way),
        TEST(batches_that_were_refused_grow_again), TEST(batches_that_grew_in_vain_wait_longer),
        TEST(a_client_that_stays_keeps_its_batches),
        TEST(batches_do_not_grow_while_something_is_on_its_way),
        TEST(the_thread_is_woken_for_what_is_held_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
