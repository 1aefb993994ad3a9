/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the tools make of brokers that refuse: which word of theirs reaches the one who asked, and
 * how often they are asked again. On librdkafka's mock cluster.
 */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "folder.h"
#include "worker/tools/cli_group.h"
#include "worker/tools/commands.h"

#include <librdkafka/rdkafka_mock.h>

enum { PRODUCE = 0, FETCH = 1, METADATA = 3, LETTERS = 8 };

struct rig {
    rd_kafka_t *broker;
    rd_kafka_mock_cluster_t *cluster;
    char config[96], said[96], out[96];
};

static void quiet(const rd_kafka_t *rk, int level, const char *facility, const char *text)
{
    (void)rk, (void)level, (void)facility, (void)text;
}

static void start(struct rig *r)
{
    char text[512];
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    *r = (struct rig){ .broker = NULL };
    snprintf(r->config, sizeof r->config, "%s/properties", dir);
    snprintf(r->said, sizeof r->said, "%s/said", dir);
    snprintf(r->out, sizeof r->out, "%s/out", dir);
    rd_kafka_conf_set_log_cb(conf, quiet);
    r->broker = rd_kafka_new(RD_KAFKA_PRODUCER, conf, NULL, 0);
    r->cluster = rd_kafka_mock_cluster_new(r->broker, 1);
    rd_kafka_mock_topic_create(r->cluster, "prompts", 1, 1);
    rd_kafka_mock_topic_create(r->cluster, "replies", 1, 1);
    rd_kafka_mock_topic_create(r->cluster, "letters", 1, 1);
    snprintf(text, sizeof text, "kafka.bootstrap.servers=%s\ntopics.prompts=prompts,gone\n"
             "topics.replies=replies\ntopics.dead_letters=letters\n",
             rd_kafka_mock_cluster_bootstraps(r->cluster));
    write_file(r->config, text);
}

static void stop(struct rig *r)
{
    rd_kafka_mock_cluster_destroy(r->cluster);
    rd_kafka_destroy(r->broker);
}

/* Each time that it is asked. */
static void refuse(struct rig *r, int request, rd_kafka_resp_err_t e)
{
    rd_kafka_resp_err_t errors[2000];
    for (size_t i = 0; i < LM_COUNT(errors); i++)
        errors[i] = e;
    rd_kafka_mock_push_request_errors_array(r->cluster, (int16_t)request, LM_COUNT(errors), errors);
}

/* Runs a command; what it writes to standard error is in `said`. */
static int run(struct rig *r, int (*command)(int, char **), char *said, size_t size, ...)
{
    char *argv[16] = { (char *)(uintptr_t)"loramill" };
    int argc = 1, kept = dup(2);
    va_list ap;
    va_start(ap, size);
    while ((argv[argc] = va_arg(ap, char *)))
        argc++;
    va_end(ap);
    fflush(stderr);
    int to = open(r->said, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    dup2(to, 2);
    int status = command(argc, argv);
    fflush(stderr);
    dup2(kept, 2);
    close(kept);
    ssize_t n = pread(to, said, size - 1, 0);
    said[n > 0 ? n : 0] = '\0';
    close(to);
    return status;
}

static void expect(const char *said, const char *part)
{
    if (!strstr(said, part))
        fail_msg("\"%s\" is not in:\n%s", part, said);
}

/* Three of four came from a topic that is gone. */
static void write_letters(struct rig *r, const char *to, int n)
{
    struct config config;
    struct lm_err err;
    char line[200];
    struct cli_kafka k = { 0 };
    assert_int_equal(config_init(&config, &err), LM_OK);
    snprintf(line, sizeof line, "kafka.bootstrap.servers=%s",
             rd_kafka_mock_cluster_bootstraps(r->cluster));
    assert_int_equal(config_set(&config, line, &err), LM_OK);
    assert_int_equal(cli_kafka_open(&k, &config, RD_KAFKA_PRODUCER, &err), LM_OK);
    for (int i = 0; i < n; i++) {
        const char *topic = i % 4 == 3 ? "prompts" : "gone";
        assert_int_equal(rd_kafka_producev(k.rk, RD_KAFKA_V_TOPIC(to),
            RD_KAFKA_V_VALUE((void *)(uintptr_t)"x", 1),
            RD_KAFKA_V_HEADER("kafka_dlt-original-topic", topic, -1), RD_KAFKA_V_END), 0);
    }
    assert_int_equal(rd_kafka_flush(k.rk, 20000), 0);
    cli_kafka_close(&k);
    config_release(&config);
}

/* ---- a right that is missing ------------------------------------------------------------ */

/* Nothing ever comes from a topic that may not be read: that is no time to wait in silence. */
static void test_collect_may_not_read(void **state)
{
    (void)state;
    struct rig r;
    char said[4096];
    start(&r);
    write_letters(&r, "replies", 1);
    refuse(&r, FETCH, RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED);
    int status = run(&r, cmd_collect, said, sizeof said, "-c", r.config, "-o", r.out, "-n", "1",
                     "-t", "60", "--quiet", NULL);
    assert_int_equal(status, 1);
    expect(said, "Topic authorization failed");
    assert_null(strstr(said, "gave up"));
    stop(&r);
}

static void test_dlq_may_not_read(void **state)
{
    (void)state;
    struct rig r;
    char said[4096];
    start(&r);
    write_letters(&r, "letters", 1);
    refuse(&r, FETCH, RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED);
    int status = run(&r, cmd_dlq, said, sizeof said, "list", "-c", r.config, NULL);
    assert_int_equal(status, 1);
    expect(said, "topic 'letters'");
    expect(said, "Topic authorization failed");
    assert_null(strstr(said, "no answer"));
    stop(&r);
}

/* Whoever answers that something is not allowed has answered. */
static void test_submit_may_not_describe(void **state)
{
    (void)state;
    struct rig r;
    char said[4096];
    start(&r);
    rd_kafka_mock_topic_set_error(r.cluster, "prompts",
                                  RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED);
    write_file(r.out, "{\"id\":\"a\",\"prompt\":\"p\"}\n");
    int status = run(&r, cmd_submit, said, sizeof said, "-c", r.config, "--set",
                     "topics.prompts=prompts", "-i", r.out, "--quiet", NULL);
    assert_int_equal(status, 1);
    expect(said, "topic 'prompts': Broker: Topic authorization failed");
    stop(&r);
}

/* A batch that is too large for its topic is refused with all its lines, which need not be. */
static void test_submit_of_batches_that_are_refused(void **state)
{
    (void)state;
    struct rig r;
    char said[4096];
    start(&r);
    static const rd_kafka_resp_err_t errors[] = { RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE, 0,
                                                  RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE };
    rd_kafka_mock_push_request_errors_array(r.cluster, PRODUCE, LM_COUNT(errors), errors);
    write_file(r.out, "{\"id\":\"a\",\"prompt\":\"p\"}\n{\"id\":\"b\",\"prompt\":\"p\"}\n"
               "{\"id\":\"c\",\"prompt\":\"p\"}\n");
    int status = run(&r, cmd_submit, said, sizeof said, "-c", r.config, "--set",
                     "topics.prompts=prompts", "--set", "kafka.linger.ms=20000", "-i", r.out,
                     "--quiet", NULL);
    assert_int_equal(status, 1);
    expect(said, ":2: not delivered: Broker: Message size too large");
    expect(said, "submit: 3 lines: 2 delivered, 0 refused, 1 not delivered");
    stop(&r);
}

/* It is waited for, but not in silence. */
static void test_collect_without_a_leader(void **state)
{
    (void)state;
    struct rig r;
    char said[4096];
    start(&r);
    rd_kafka_mock_partition_set_leader(r.cluster, "replies", 0, -1);
    int status = run(&r, cmd_collect, said, sizeof said, "-c", r.config, "-o", r.out, "-t", "1",
                     "--quiet", NULL);
    assert_int_equal(status, 1);
    expect(said, "replies[0]: no broker leads it now");
    stop(&r);
}

/* ---- letters of a topic that is gone ---------------------------------------------------- */

static int metadata_requests(struct rig *r)
{
    size_t n;
    int found = 0;
    rd_kafka_mock_request_t **all = rd_kafka_mock_get_requests(r->cluster, &n);
    for (size_t i = 0; i < n; i++)
        found += rd_kafka_mock_request_api_key(all[i]) == METADATA;
    rd_kafka_mock_request_destroy_array(all, n);
    return found;
}

/* Some seconds go by until a topic counts as not there. That is so once, not for each letter; those
 * of other topics between them go back. */
static void test_retry_to_a_topic_that_is_gone(void **state)
{
    (void)state;
    struct rig r;
    char said[4096];
    start(&r);
    rd_kafka_mock_topic_set_error(r.cluster, "gone", RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART);
    write_letters(&r, "letters", LETTERS);
    rd_kafka_mock_start_request_tracking(r.cluster);
    int status = run(&r, cmd_dlq, said, sizeof said, "retry", "-c", r.config, "--yes", "--limit",
                     "1", NULL);
    int one = metadata_requests(&r);
    assert_int_equal(status, 1);
    rd_kafka_mock_clear_requests(r.cluster);
    status = run(&r, cmd_dlq, said, sizeof said, "retry", "-c", r.config, "--yes", NULL);
    int all = metadata_requests(&r);
    rd_kafka_mock_stop_request_tracking(r.cluster);
    assert_int_equal(status, 1);
    expect(said, "0:0 can't be sent back: the broker has no topic 'gone'");
    expect(said, "dlq: 2 sent back, 6 not");
    if (all >= 2 * one)
        fail_msg("%d requests for metadata, and %d of one letter", all, one);
    stop(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_collect_may_not_read), cmocka_unit_test(test_dlq_may_not_read),
        cmocka_unit_test(test_submit_may_not_describe),
        cmocka_unit_test(test_submit_of_batches_that_are_refused),
        cmocka_unit_test(test_collect_without_a_leader),
        cmocka_unit_test(test_retry_to_a_topic_that_is_gone),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
