/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_client_stats.c - librdkafka's statistics, read: a text of the form that its
 * STATISTICS.md gives, texts of other forms, and the page that comes of it.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "worker/client_stats.h"

static const char sample[] =
    "{ \"name\": \"w#consumer-1\", \"client_id\": \"w\", \"type\": \"consumer\", \"ts\": 501648,"
    "  \"msg_cnt\": 22710, \"msg_size\": 704010,"
    "  \"brokers\": {"
    "    \"a:9092/1\": { \"txretries\": 3, \"req_timeouts\": 2, \"connects\": 5,"
    "      \"rtt\": { \"p50\": 400, \"p99\": 1500 }, \"throttle\": { \"avg\": 0 } },"
    "    \"b:9092/2\": { \"txretries\": 1, \"req_timeouts\": 0, \"connects\": 2,"
    "      \"rtt\": { \"p50\": 90, \"p99\": 250000 }, \"throttle\": { \"avg\": 20 } },"
    "    \"GroupCoordinator\": { \"connects\": 1 } },"
    "  \"topics\": { \"prompts\": { \"partitions\": {"
    "    \"0\": { \"fetchq_cnt\": 10, \"fetchq_size\": 1000 },"
    "    \"1\": { \"fetchq_cnt\": 5, \"fetchq_size\": 500 }, \"-1\": { } } } } }";

static void sums_and_maxima(void **state)
{
    (void)state;
    static const long long want[CLIENT_STATS] = { 250000, 20, 2, 4, 8, 22725, 705510 };
    struct client_stats s = { 0 };
    assert_true(client_stats_take(&s, sample, sizeof sample - 1));
    for (int i = 0; i < CLIENT_STATS; i++)
        assert_int_equal(atomic_load(&s.values[i]), want[i]);
}

static void other_texts_change_nothing(void **state)
{
    (void)state;
    static const char *const texts[] = { "", "{", "[]", "7", "{}", "{\"brokers\": 3}" };
    struct client_stats s = { 0 };
    assert_true(client_stats_take(&s, sample, sizeof sample - 1));
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        assert_false(client_stats_take(&s, texts[i], strlen(texts[i])));
    assert_int_equal(atomic_load(&s.values[CLIENT_CONNECTS]), 8);
    static const char odd[] = "{\"brokers\": {\"a\": 1, \"b\": {\"connects\": \"x\"}}, "
                              "\"topics\": []}";
    assert_true(client_stats_take(&s, odd, sizeof odd - 1));
    assert_int_equal(atomic_load(&s.values[CLIENT_CONNECTS]), 0);
}

static void page_has_both_clients(void **state)
{
    (void)state;
    struct client_stats c = { 0 }, p = { 0 };
    char *text = NULL;
    size_t n = 0;
    assert_true(client_stats_take(&c, sample, sizeof sample - 1));
    FILE *f = open_memstream(&text, &n);
    client_stats_write(&c, &p, f);
    fclose(f);
    static const char *const lines[] = {
        "# TYPE loramill_kafka_broker_rtt_seconds gauge\n",
        "loramill_kafka_broker_rtt_seconds{client=\"consumer\"} 0.250000\n",
        "loramill_kafka_broker_rtt_seconds{client=\"producer\"} 0.000000\n",
        "loramill_kafka_throttle_seconds{client=\"consumer\"} 0.020000\n",
        "loramill_kafka_connects_total{client=\"consumer\"} 8\n",
        "loramill_kafka_waiting_bytes{client=\"consumer\"} 705510\n",
    };
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++)
        if (!strstr(text, lines[i]))
            fail_msg("no '%s' in:\n%s", lines[i], text);
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sums_and_maxima), cmocka_unit_test(other_texts_change_nothing),
        cmocka_unit_test(page_has_both_clients),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
