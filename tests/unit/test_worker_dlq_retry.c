/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Letters that go back through a broker which refuses their marks, on librdkafka's mock cluster.
 */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <setjmp.h>
#include <cmocka.h>
#include <string.h>

#include "worker/tools/cli_group.h"
#include "worker/tools/cmd_dlq_retry.h"

#include <librdkafka/rdkafka_mock.h>

enum { LETTERS = 5, LARGE = 8000, FETCH = 1, ADD_OFFSETS_TO_TXN = 25, TXN_OFFSET_COMMIT = 28 };

struct rig {
    rd_kafka_t *broker;
    rd_kafka_mock_cluster_t *cluster;
    struct config config;
    struct cli_kafka reader;
    struct dlq_retry *retry;
    lm_status st;
    struct lm_err err;
};

static void quiet(const rd_kafka_t *rk, int level, const char *facility, const char *text)
{
    (void)rk, (void)level, (void)facility, (void)text;
}

static void set(struct rig *r, const char *key, const char *value)
{
    char line[300];
    snprintf(line, sizeof line, "%s=%s", key, value);
    if (config_set(&r->config, line, &r->err))
        fail_msg("%s", r->err.msg);
}

/* LETTERS in one partition; the third is large. */
static void write_letters(struct rig *r)
{
    static char bytes[LARGE];
    struct cli_kafka k = { 0 };
    assert_int_equal(cli_kafka_open(&k, &r->config, RD_KAFKA_PRODUCER, &r->err), LM_OK);
    for (int i = 0; i < LETTERS; i++) {
        assert_int_equal(rd_kafka_producev(k.rk, RD_KAFKA_V_TOPIC("letters"),
            RD_KAFKA_V_VALUE(bytes, i == 2 ? LARGE : 1), RD_KAFKA_V_END), 0);
        assert_int_equal(rd_kafka_flush(k.rk, 20000), 0);       /* a batch each */
    }
    cli_kafka_close(&k);
}

static void start(struct rig *r)
{
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    *r = (struct rig){ 0 };
    rd_kafka_conf_set_log_cb(conf, quiet);
    r->broker = rd_kafka_new(RD_KAFKA_PRODUCER, conf, NULL, 0);
    r->cluster = rd_kafka_mock_cluster_new(r->broker, 1);
    rd_kafka_mock_topic_create(r->cluster, "letters", 1, 1);
    rd_kafka_mock_topic_create(r->cluster, "target", 1, 1);
    assert_int_equal(config_init(&r->config, &r->err), LM_OK);
    set(r, "kafka.bootstrap.servers", rd_kafka_mock_cluster_bootstraps(r->cluster));
    set(r, "topics.dead_letters", "letters");
    write_letters(r);
}

static void stop(struct rig *r)
{
    dlq_retry_free(r->retry);
    cli_kafka_close(&r->reader);
    config_release(&r->config);
    rd_kafka_mock_cluster_destroy(r->cluster);
    rd_kafka_destroy(r->broker);
}

static bool add(void *user, const rd_kafka_message_t *m)
{
    struct rig *r = user;
    r->st = dlq_retry_add(r->retry, m, m->offset, "target", "invalid", "id", &r->err);
    return !r->st;
}

static struct dlq_retry_counts send_all(struct rig *r)
{
    if (cli_kafka_open(&r->reader, &r->config, RD_KAFKA_CONSUMER, &r->err) ||
        dlq_retry_new(&r->config, &r->reader, false, &r->retry, &r->err) ||
        cli_scan(&r->reader, "letters", -1, add, r, &r->err))
        fail_msg("%s", r->err.msg);
    assert_int_equal(r->st, LM_OK);
    r->st = dlq_retry_finish(r->retry, &r->err);
    return dlq_retry_counts(r->retry);
}

static void commit_as(struct rig *r, const char *group, const rd_kafka_topic_partition_list_t *l)
{
    char why[256];
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    rd_kafka_conf_set(conf, "bootstrap.servers", rd_kafka_mock_cluster_bootstraps(r->cluster), NULL,
                      0);
    rd_kafka_conf_set(conf, "group.id", group, NULL, 0);
    rd_kafka_t *rk = rd_kafka_new(RD_KAFKA_CONSUMER, conf, why, sizeof why);
    assert_non_null(rk);
    assert_int_equal(rd_kafka_commit(rk, l, 0), RD_KAFKA_RESP_ERR_NO_ERROR);
    rd_kafka_destroy(rk);
}

static bool count(void *user, const rd_kafka_message_t *m)
{
    (void)m;
    ++*(int *)user;
    return true;
}

static void refuse(struct rig *r, int request, rd_kafka_resp_err_t e, size_t times)
{
    rd_kafka_resp_err_t errors[64];
    for (size_t i = 0; i < times; i++)
        errors[i] = e;
    rd_kafka_mock_push_request_errors_array(r->cluster, (int16_t)request, times, errors);
}

/* What the file may say for workers does not keep a retry from its work. */
static void test_settings_of_workers(void **state)
{
    (void)state;
    struct rig r;
    start(&r);
    set(&r, "kafka.socket.timeout.ms", "60000");
    set(&r, "kafka.message.timeout.ms", "300000");
    assert_int_equal(send_all(&r).sent, LETTERS);
    assert_int_equal(r.st, LM_OK);
    stop(&r);
}

/* A coordinator that is away for longer than the client itself asks again: the same batch goes
 * again, and no letter is given up for it. */
static void test_coordinator_away(void **state)
{
    (void)state;
    struct rig r;
    start(&r);
    refuse(&r, TXN_OFFSET_COMMIT, RD_KAFKA_RESP_ERR_COORDINATOR_NOT_AVAILABLE, 9);
    struct dlq_retry_counts n = send_all(&r);
    assert_int_equal(r.st, LM_OK);
    assert_int_equal(n.sent, LETTERS);
    assert_int_equal(n.failed, 0);
    stop(&r);
}

/* A right that is missing is missing for all letters: one transaction, and it says what. */
static void test_not_allowed(void **state)
{
    (void)state;
    static const struct { int request; rd_kafka_resp_err_t e; } refusals[] = {
        { ADD_OFFSETS_TO_TXN, RD_KAFKA_RESP_ERR_GROUP_AUTHORIZATION_FAILED },
        { TXN_OFFSET_COMMIT, RD_KAFKA_RESP_ERR_GROUP_AUTHORIZATION_FAILED },
        { TXN_OFFSET_COMMIT, RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED },
        { ADD_OFFSETS_TO_TXN, RD_KAFKA_RESP_ERR_TRANSACTIONAL_ID_AUTHORIZATION_FAILED },
    };
    for (size_t i = 0; i < LM_COUNT(refusals); i++) {
        struct rig r;
        start(&r);
        refuse(&r, refusals[i].request, refusals[i].e, 1);
        struct dlq_retry_counts n = send_all(&r);
        assert_int_equal(r.st, LM_NET);
        assert_non_null(strstr(r.err.msg, "uthoriz"));
        assert_int_equal(n.sent + n.failed + n.unknown, 0);
        stop(&r);
    }
}

/* A letter that the client's queue never takes is refused; the others go. */
static void test_larger_than_the_queue(void **state)
{
    (void)state;
    struct rig r;
    start(&r);
    set(&r, "kafka.queue.buffering.max.kbytes", "4");
    struct dlq_retry_counts n = send_all(&r);
    assert_int_equal(r.st, LM_OK);
    assert_int_equal(n.sent, LETTERS - 1);
    assert_int_equal(n.failed, 1);
    stop(&r);
}

/* Marks of a topic of the same name that was longer: nobody knows what was sent of this one. */
static void test_marks_of_another_topic(void **state)
{
    (void)state;
    struct rig r;
    start(&r);
    char map[OFFSET_MAP_MAX + 1];
    struct cli_kafka k = { .transactional_id = NULL };
    dlq_marks *m;
    set(&r, "group.id", "old");
    assert_int_equal(cli_kafka_open(&k, &r.config, RD_KAFKA_CONSUMER, &r.err), LM_OK);
    for (int at = LETTERS; at <= LETTERS + 1; at++) {
        rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(1);
        rd_kafka_topic_partition_list_add(l, "letters", 0)->offset = at;
        commit_as(&r, "old-dlq-retry", l);
        rd_kafka_topic_partition_list_destroy(l);
        assert_int_equal(dlq_retry_marks(&k, &r.config, &m, &r.err), LM_OK);
        assert_int_equal(dlq_marks_has(m, 0, 0), at == LETTERS);
        int64_t offset = -1;
        assert_true(dlq_marks_commit(m, 0, &offset, map));
        assert_int_equal(offset, at == LETTERS ? LETTERS : 0);
        dlq_marks_free(m);
    }
    cli_kafka_close(&k);
    assert_int_equal(send_all(&r).sent, LETTERS);
    stop(&r);
}

/* A topic that is made anew while it is read: what comes again was there before, or never. */
static void test_offsets_that_go_back(void **state)
{
    (void)state;
    struct rig r;
    int seen = 0;
    static const rd_kafka_resp_err_t errors[] = { 0, 0, RD_KAFKA_RESP_ERR_OFFSET_OUT_OF_RANGE };
    start(&r);
    assert_int_equal(cli_kafka_open(&r.reader, &r.config, RD_KAFKA_CONSUMER, &r.err), LM_OK);
    rd_kafka_mock_push_request_errors_array(r.cluster, FETCH, LM_COUNT(errors), errors);
    assert_int_equal(cli_scan(&r.reader, "letters", -1, count, &seen, &r.err), LM_STATE);
    assert_non_null(strstr(r.err.msg, "topic 'letters' [0] was made anew"));
    assert_int_equal(seen, 2);
    stop(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_settings_of_workers), cmocka_unit_test(test_coordinator_away),
        cmocka_unit_test(test_not_allowed), cmocka_unit_test(test_larger_than_the_queue),
        cmocka_unit_test(test_marks_of_another_topic), cmocka_unit_test(test_offsets_that_go_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
