/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_kafka_version.c - what the worker makes of an old librdkafka. This program defines
 * rd_kafka_version() itself, which wins over the shared library's, so any version can be played.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

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

static lm_status check(int v, const char *mode, struct lm_err *err)
{
    struct config c;
    assert_int_equal(config_init(&c, err), LM_OK);
    assert_int_equal(config_set(&c, mode, err), LM_OK);
    version = v;
    logged[0] = 0;
    lm_status st = kafka_check_library(&c, err);
    config_release(&c);
    return st;
}

#define ALO "delivery.mode=at-least-once"
#define EOS "delivery.mode=exactly-once"

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

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_versions) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
