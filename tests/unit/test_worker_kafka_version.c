/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_kafka_version.c - what the worker makes of an old librdkafka, or an old broker. This
 * program defines rd_kafka_version() itself, which wins over the shared library's, so any version
 * can be played.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "worker/group_protocol.h"
#include "worker/kafka_conf.h"

static int version;
static char logged[4096];

int rd_kafka_version(void)
{
    return version;
}

static void keep(void *ctx, enum lm_level level, const char *component, const char *line)
{
    (void)ctx;
    (void)component;
    if (level <= LM_WARN && strlen(logged) + strlen(line) + 2 < sizeof logged)
        strcat(strcat(logged, line), "\n");
}

static lm_status check(int v, const char *property, struct lm_err *err)
{
    struct config c;
    struct lm_err same;
    assert_int_equal(config_init(&c, err), LM_OK);
    assert_int_equal(config_set(&c, property, err), LM_OK);
    version = v;
    logged[0] = 0;
    lm_status st = kafka_conf_check(&c, &same);     /* what --check does; it has nothing to log */
    assert_string_equal(logged, "");
    assert_int_equal(kafka_check_library(&c, err), st);
    if (st)
        assert_string_equal(err->msg, same.msg);
    config_release(&c);
    return st;
}

#define ALO "delivery.mode=at-least-once"
#define EOS "delivery.mode=exactly-once"
#define KIP_848 "kafka.consumer.group.protocol=consumer"

static void test_versions(void **state)
{
    (void)state;
    struct lm_err err;
    lm_log_set_sink(keep, NULL);
    assert_int_equal(check(0x01090000, ALO, &err), LM_UNSUPPORTED);
    assert_int_equal(check(0x020002ff, ALO, &err), LM_OK);      /* Debian 12 */
    assert_non_null(strstr(logged, "at-least-once without the offset map"));
    assert_false(kafka_has_offset_map());
    assert_int_equal(check(0x020002ff, EOS, &err), LM_UNSUPPORTED);
    assert_non_null(strstr(err.msg, "delivery.mode=exactly-once needs librdkafka 2.2"));
    assert_int_equal(check(0x020101ff, EOS, &err), LM_UNSUPPORTED);
    assert_int_equal(check(0x020200ff, EOS, &err), LM_OK);
    assert_true(kafka_has_offset_map());
    assert_non_null(strstr(logged, "known faults in rebalances"));
    assert_int_equal(check(0x020c00ff, EOS, &err), LM_OK);
    assert_string_equal(logged, "");
}

/* Below 2.12 it was a preview, of a protocol that Kafka 4.0 does not speak. */
static void test_new_protocol(void **state)
{
    (void)state;
    struct lm_err err;
    lm_log_set_sink(keep, NULL);
    static const int old[] = { 0x020002ff, 0x020601ff, 0x020b01ff };
    for (size_t i = 0; i < LM_COUNT(old); i++) {
        assert_int_equal(check(old[i], KIP_848, &err), LM_UNSUPPORTED);
        assert_non_null(strstr(err.msg, "kafka.group.protocol=consumer needs librdkafka 2.12"));
        assert_int_equal(check(old[i], "kafka.group.protocol=classic", &err), LM_OK);
    }
    assert_int_equal(check(0x020c00ff, KIP_848, &err), LM_OK);
    assert_int_equal(check(0x020f01ff, "kafka.group.protocol=Consumer", &err), LM_OK);
    assert_string_equal(logged, "");
}

/* An old broker: its coordinator answers, and is sent no heartbeat in 10 s awake. */
static void test_old_broker(void **state)
{
    (void)state;
    struct group_protocol g = { 0 };
    int64_t now = 1000000;
    for (int i = 0; i < 1000; i++)      /* a silent one is waited for */
        assert_false(group_protocol_missing(&g, now += 100000));
    atomic_store(&g.answered, true);
    for (int i = 0; i < 50; i++)
        assert_false(group_protocol_missing(&g, now += 100000));
    now += 3600 * 1000000LL;            /* SIGSTOP */
    for (int i = 0; i < 500; i++)
        assert_false(group_protocol_missing(&g, now += 10000));
    assert_true(group_protocol_missing(&g, now += 100000));
    atomic_store(&g.spoken, true);
    assert_false(group_protocol_missing(&g, now += 100000));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_versions), cmocka_unit_test(test_new_protocol),
        cmocka_unit_test(test_old_broker),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
