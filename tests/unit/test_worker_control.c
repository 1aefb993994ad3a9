/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_control.c - when the worker has read the orders to cancel that were there at its
 * start, and that it says so if it may not. The real thread of control.c, over a client library
 * that says what the test has written.
 * What orders do: test_worker_cancels.c, tests/integration/test_trouble.sh.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "worker/cancels.h"
#include "worker/worker.h"

/* ---- the client library ----------------------------------------------------------------- */

enum { END = -1, ORDER = -2, FORBIDDEN = -3 };  /* else nothing comes */

static const struct { int what, partition; } *script;
static atomic_int said;                 /* of the script */

rd_kafka_resp_err_t rd_kafka_metadata(rd_kafka_t *rk, int all, rd_kafka_topic_t *only,
                                      const struct rd_kafka_metadata **out, int timeout_ms)
{
    (void)rk;
    (void)all;
    (void)only;
    (void)timeout_ms;
    static rd_kafka_metadata_topic_t topic = { .partition_cnt = 2 };
    static rd_kafka_metadata_t md = { .topic_cnt = 1, .topics = &topic };
    *out = &md;
    return RD_KAFKA_RESP_ERR_NO_ERROR;
}

void rd_kafka_metadata_destroy(const struct rd_kafka_metadata *md)
{
    (void)md;
}

rd_kafka_resp_err_t rd_kafka_offsets_for_times(rd_kafka_t *rk, rd_kafka_topic_partition_list_t *l,
                                               int timeout_ms)
{
    (void)rk;
    (void)l;
    (void)timeout_ms;
    return RD_KAFKA_RESP_ERR_NO_ERROR;
}

rd_kafka_resp_err_t rd_kafka_assign(rd_kafka_t *rk, const rd_kafka_topic_partition_list_t *l)
{
    (void)rk;
    (void)l;
    return RD_KAFKA_RESP_ERR_NO_ERROR;
}

rd_kafka_message_t *rd_kafka_consumer_poll(rd_kafka_t *rk, int timeout_ms)
{
    static rd_kafka_message_t m;
    static char order[] = "{\"cancel\": \"a\"}";
    (void)rk;
    int at = atomic_load(&said);
    if (!script[at].what) {
        nanosleep(&(struct timespec){ .tv_nsec = timeout_ms * 10000 }, NULL);
        return NULL;
    }
    atomic_store(&said, at + 1);
    m = (rd_kafka_message_t){ .partition = script[at].partition, .payload = order,
                              .len = sizeof order - 1 };
    if (script[at].what != ORDER)
        m = (rd_kafka_message_t){ .partition = script[at].partition, .err =
            script[at].what == END ? RD_KAFKA_RESP_ERR__PARTITION_EOF :
                                     RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED };
    return &m;
}

void rd_kafka_message_destroy(rd_kafka_message_t *m)
{
    (void)m;
}

/* Older than what is to be remembered: such an order is taken only once all is read. */
int64_t rd_kafka_message_timestamp(const rd_kafka_message_t *m, rd_kafka_timestamp_type_t *type)
{
    (void)m;
    (void)type;
    return 1;
}

/* ---- tests ------------------------------------------------------------------------------ */

/* Orders taken by the time that the worker goes on. */
static unsigned long long taken(const void *what)
{
    struct config cfg;
    struct lm_err err;
    static struct worker w;
    assert_int_equal(config_init(&cfg, &err), LM_OK);
    assert_int_equal(config_set(&cfg, "topics.control=control", &err), LM_OK);
    assert_int_equal(config_set(&cfg, "kafka.bootstrap.servers=127.0.0.1:1", &err), LM_OK);
    w = (struct worker){ .cfg = &cfg };
    job_queue_init(&w.to_intake);
    w.credentials = credentials_new(&cfg);
    w.cancels = cancels_new(1000, 0);
    script = what;
    atomic_store(&said, 0);
    assert_int_equal(control_new(&w, &w.control, &err), LM_OK);
    control_wait(w.control);
    control_stop(w.control);
    control_free(w.control);
    unsigned long long n = (unsigned long long)atomic_load(&w.metrics.cancel_orders);
    cancels_free(w.cancels);
    credentials_free(w.credentials);
    job_queue_release(&w.to_intake);
    config_release(&cfg);
    return n;
}

/* It has got something meanwhile, say. The other one is not read yet. */
static void the_end_of_one_partition_counts_once(void **state)
{
    static const struct { int what, partition; } twice[] = {
        { END, 0 }, { END, 0 }, { END, 0 }, { ORDER, 1 }, { END, 1 }, { 0, 0 },
    };
    (void)state;
    assert_int_equal(taken(twice), 0);
}

static void the_ends_of_all_do(void **state)
{
    static const struct { int what, partition; } all[] = {
        { END, 1 }, { END, 0 }, { 0, 0 },
    };
    (void)state;
    int64_t start = lm_now_us();
    assert_int_equal(taken(all), 0);
    assert_true(lm_now_us() - start < 10 * 1000000ll);  /* it waits no longer than that */
}

static atomic_int warnings;

static void count_warnings(void *ctx, enum lm_level level, const char *component, const char *line)
{
    (void)ctx;
    if (level == LM_WARN && !strcmp(component, "control") && strstr(line, "authorization failed"))
        atomic_fetch_add(&warnings, 1);
}

/* The client says it again and again; nobody would know why no order is obeyed. */
static void a_topic_that_may_not_be_read_is_said(void **state)
{
    static const struct { int what, partition; } forbidden[] = {
        { FORBIDDEN, 0 }, { FORBIDDEN, 1 }, { FORBIDDEN, 0 }, { END, 0 }, { END, 1 }, { 0, 0 },
    };
    (void)state;
    lm_log_set_sink(count_warnings, NULL);
    assert_int_equal(taken(forbidden), 0);
    assert_int_equal(atomic_load(&warnings), 1);
    lm_log_set_sink(NULL, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_end_of_one_partition_counts_once),
        cmocka_unit_test(the_ends_of_all_do),
        cmocka_unit_test(a_topic_that_may_not_be_read_is_said),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
