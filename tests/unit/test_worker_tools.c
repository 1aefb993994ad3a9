/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What `status`, `reset` and `dlq` ask of a broker, against the one of `loramill dev`. Groups that
 * it can't describe are made by hand here; tests/integration/test_tools.sh has a real broker.
 */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <setjmp.h>
#include <cmocka.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "worker/tools/cli_group.h"
#include "worker/tools/commands.h"
#include "worker/tools/dev_broker.h"

enum { PARTS = 40, LETTERS = 600 };

static dev_broker *broker;
static struct config config;

static void open_kafka(struct cli_kafka *k, rd_kafka_type_t type)
{
    struct lm_err err;
    if (cli_kafka_open(k, &config, type, &err))
        fail_msg("%s", err.msg);
}

/* Three records into each partition, a millisecond apart; the partitions a second. */
static void produce(const char *topic, int64_t ms)
{
    struct cli_kafka k = { 0 };
    open_kafka(&k, RD_KAFKA_PRODUCER);
    for (int i = 0; i < 3 * PARTS; i++)
        assert_int_equal(rd_kafka_producev(k.rk, RD_KAFKA_V_TOPIC(topic),
            RD_KAFKA_V_PARTITION(i % PARTS), RD_KAFKA_V_VALUE((void *)(uintptr_t)"x", 1),
            RD_KAFKA_V_TIMESTAMP(ms + 1000 * (i % PARTS) + i / PARTS), RD_KAFKA_V_END), 0);
    assert_int_equal(rd_kafka_flush(k.rk, 20000), 0);
    cli_kafka_close(&k);
}

static bool note_letter(void *user, const rd_kafka_message_t *m)
{
    bool *seen = user;
    int i;
    rd_kafka_headers_t *h;
    assert_int_equal(m->len, sizeof i);
    memcpy(&i, m->payload, sizeof i);
    assert_in_range(i, 0, LETTERS - 1);
    assert_false(seen[i]);
    seen[i] = true;
    assert_int_equal(rd_kafka_message_headers(m, &h), 0);
    assert_int_equal(rd_kafka_header_cnt(h), 1);        /* without the one that says why */
    return true;
}

static struct group_part part_at(const char *topic, int partition, int64_t committed, int64_t high)
{
    struct group_part p = { .partition = partition, .committed = committed, .high = high,
                            .oldest_ms = -1 };
    snprintf(p.topic, sizeof p.topic, "%s", topic);
    return p;
}

/* Every partition that lags gets the time of its first unfinished record; the others get none. */
static void test_oldest(void **state)
{
    (void)state;
    static const int64_t committed[] = { -1, 0, 1, 3 };
    struct cli_kafka k = { .one_each = true };
    struct group_part parts[PARTS];
    struct group g = { .parts = parts, .n_parts = PARTS };
    int64_t t0 = 1700000000000;
    assert_int_equal(dev_broker_topic(broker, "oldest", PARTS, NULL), LM_OK);
    produce("oldest", t0);
    for (int i = 0; i < PARTS; i++)
        parts[i] = part_at("oldest", i, committed[i % 4], 3);
    open_kafka(&k, RD_KAFKA_CONSUMER);
    cli_group_oldest(&k, &g);
    for (int i = 0; i < PARTS; i++) {
        int64_t first = LM_MAX(parts[i].committed, 0);
        assert_int_equal(parts[i].oldest_ms, first == 3 ? -1 : t0 + 1000 * i + first);
    }
    cli_kafka_close(&k);
}

/* Of a move that the broker refuses in part each refused partition has its reason. */
static void test_move_refused_in_part(void **state)
{
    (void)state;
    struct lm_err err;
    struct cli_kafka k = { 0 };
    struct group_part parts[4];
    struct group g = { .parts = parts, .n_parts = 4 };
    const int64_t target[4] = { 1, 2, 3, -1 };
    const char *refused[4] = { NULL };
    assert_int_equal(dev_broker_topic(broker, "move", 2, NULL), LM_OK);
    parts[0] = part_at("move", 0, 0, 3);
    parts[1] = part_at("move", 7, 0, 3);        /* there is none */
    parts[2] = part_at("move", 1, 0, 3);
    parts[3] = part_at("move", 8, 0, 3);        /* nor this, but it is not to be moved */
    open_kafka(&k, RD_KAFKA_CONSUMER);
    assert_int_equal(cli_group_move(&k, "move-group", &g, target, refused, &err), LM_NET);
    assert_string_equal(err.msg, "2 of 3 partitions were moved");
    assert_null(refused[0]);
    assert_non_null(refused[1]);
    assert_null(refused[2]);
    assert_null(refused[3]);
    cli_kafka_close(&k);
}

/* More letters than a transaction holds go to where they came from, each once and as it was. */
static void test_retry(void **state)
{
    (void)state;
    struct cli_kafka k = { 0 };
    char brokers[300];
    char *argv[] = { (char *)(uintptr_t)"dlq", (char *)(uintptr_t)"retry",
                     (char *)(uintptr_t)"--set", brokers, (char *)(uintptr_t)"--set",
                     (char *)(uintptr_t)"topics.dead_letters=letters", (char *)(uintptr_t)"--to",
                     (char *)(uintptr_t)"target", (char *)(uintptr_t)"--yes", NULL };
    assert_int_equal(dev_broker_topic(broker, "letters", 2, NULL), LM_OK);
    assert_int_equal(dev_broker_topic(broker, "target", 1, NULL), LM_OK);
    open_kafka(&k, RD_KAFKA_PRODUCER);
    for (int i = 0; i < LETTERS; i++)
        assert_int_equal(rd_kafka_producev(k.rk, RD_KAFKA_V_TOPIC("letters"),
            RD_KAFKA_V_MSGFLAGS(RD_KAFKA_MSG_F_COPY), RD_KAFKA_V_PARTITION(i % 2),
            RD_KAFKA_V_VALUE(&i, sizeof i), RD_KAFKA_V_KEY("", 0),
            RD_KAFKA_V_HEADER("loramill-error-code", "invalid", 7),
            RD_KAFKA_V_HEADER("x", NULL, 0), RD_KAFKA_V_END), 0);
    assert_int_equal(rd_kafka_flush(k.rk, 20000), 0);
    cli_kafka_close(&k);
    snprintf(brokers, sizeof brokers, "kafka.bootstrap.servers=%s", dev_broker_address(broker));
    assert_int_equal(cmd_dlq(LM_COUNT(argv) - 1, argv), CLI_OK);
    struct lm_err err;
    bool seen[LETTERS] = { false };
    open_kafka(&k, RD_KAFKA_CONSUMER);
    assert_int_equal(cli_scan(&k, "target", -1, note_letter, seen, &err), LM_OK);
    for (int i = 0; i < LETTERS; i++)
        assert_true(seen[i]);
    cli_kafka_close(&k);
}

/* What a command writes to standard output; malloc'ed. */
static char *output_of(int (*command)(int, char **), int argc, char **argv)
{
    FILE *to = tmpfile();
    fflush(stdout);
    int kept = dup(STDOUT_FILENO);
    dup2(fileno(to), STDOUT_FILENO);
    int status = command(argc, argv);
    fflush(stdout);
    dup2(kept, STDOUT_FILENO);
    close(kept);
    assert_int_equal(status, CLI_OK);
    long n = ftell(to);
    char *text = calloc(1, (size_t)n + 1);
    rewind(to);
    assert_int_equal(fread(text, 1, (size_t)n, to), n);
    fclose(to);
    return text;
}

/* A value as deep as can be read is within another in the line that is written of it. */
static void test_list_of_a_deep_letter(void **state)
{
    (void)state;
    enum { DEPTH = JSON_PARSER_MAX_DEPTH };
    struct cli_kafka k = { 0 };
    char brokers[300], value[2 * DEPTH + 64];
    char *argv[] = { (char *)(uintptr_t)"dlq", (char *)(uintptr_t)"list", (char *)(uintptr_t)"-j",
                     (char *)(uintptr_t)"--set", brokers, (char *)(uintptr_t)"--set",
                     (char *)(uintptr_t)"topics.dead_letters=deep", NULL };
    int n = snprintf(value, sizeof value, "{\"id\":\"deep\",\"x\":");
    memset(value + n, '[', DEPTH - 1);
    memset(value + n + DEPTH - 1, ']', DEPTH - 1);
    n += 2 * (DEPTH - 1);
    value[n++] = '}';
    assert_int_equal(dev_broker_topic(broker, "deep", 1, NULL), LM_OK);
    open_kafka(&k, RD_KAFKA_PRODUCER);
    assert_int_equal(rd_kafka_producev(k.rk, RD_KAFKA_V_TOPIC("deep"),
        RD_KAFKA_V_VALUE(value, (size_t)n), RD_KAFKA_V_END), 0);
    assert_int_equal(rd_kafka_flush(k.rk, 20000), 0);
    cli_kafka_close(&k);
    snprintf(brokers, sizeof brokers, "kafka.bootstrap.servers=%s", dev_broker_address(broker));
    char *line = output_of(cmd_dlq, LM_COUNT(argv) - 1, argv);
    assert_int_equal(strncmp(line, "{\"id\":\"deep\"", 12), 0);
    assert_non_null(memmem(line, strlen(line), value, (size_t)n));
    assert_non_null(strstr(line, "\"sent_back\":false}\n"));
    free(line);
}

int main(void)
{
    struct lm_err err;
    char set[300];
    if (dev_broker_new(1, &broker, &err) || config_init(&config, &err)) {
        fprintf(stderr, "no broker: %s\n", err.msg);
        return 1;
    }
    snprintf(set, sizeof set, "kafka.bootstrap.servers=%s", dev_broker_address(broker));
    if (config_set(&config, set, &err))
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_oldest),
        cmocka_unit_test(test_move_refused_in_part),
        cmocka_unit_test(test_retry),
        cmocka_unit_test(test_list_of_a_deep_letter),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    config_release(&config);
    dev_broker_free(broker);
    return failed;
}
