/* SPDX-License-Identifier: Apache-2.0 */
/*
 * client_stats.c - see client_stats.h. The format is librdkafka's STATISTICS.md; a field that is
 * missing, as in other versions, counts as zero.
 */
#include "worker/client_stats.h"

#include "worker/metrics.h"

static long long larger(long long a, long long b)
{
    return a > b ? a : b;
}

static void add_brokers(const json_t *brokers, long long v[CLIENT_STATS])
{
    const char *name;
    json_t *b;
    json_object_foreach((json_t *)(uintptr_t)brokers, name, b) {
        v[CLIENT_RTT_US] = larger(v[CLIENT_RTT_US], stats_number(json_object_get(b, "rtt"), "p99"));
        v[CLIENT_THROTTLE_MS] = larger(v[CLIENT_THROTTLE_MS],
                                       stats_number(json_object_get(b, "throttle"), "avg"));
        v[CLIENT_REQUEST_TIMEOUTS] += stats_number(b, "req_timeouts");
        v[CLIENT_REQUEST_RETRIES] += stats_number(b, "txretries");
        v[CLIENT_CONNECTS] += stats_number(b, "connects");
    }
}

/* Prefetched, over all partitions. */
static void add_fetched(const json_t *topics, long long v[CLIENT_STATS])
{
    const char *name, *id;
    json_t *t, *p;
    json_object_foreach((json_t *)(uintptr_t)topics, name, t)
        json_object_foreach(json_object_get(t, "partitions"), id, p) {
            v[CLIENT_WAITING_RECORDS] += stats_number(p, "fetchq_cnt");
            v[CLIENT_WAITING_BYTES] += stats_number(p, "fetchq_size");
        }
}

bool client_stats_read(struct client_stats *s, const json_t *root)
{
    long long v[CLIENT_STATS] = { 0 };
    const json_t *brokers = json_object_get(root, "brokers");
    bool good = json_is_object(brokers);
    if (good) {
        add_brokers(brokers, v);
        add_fetched(json_object_get(root, "topics"), v);
        v[CLIENT_WAITING_RECORDS] += stats_number(root, "msg_cnt");
        v[CLIENT_WAITING_BYTES] += stats_number(root, "msg_size");
        for (int i = 0; i < CLIENT_STATS; i++)
            atomic_store_explicit(&s->values[i], v[i], memory_order_relaxed);
    }
    return good;
}

bool client_stats_take(struct client_stats *s, const char *json, size_t len)
{
    json_t *root = json_loadb(json, len, 0, NULL);
    bool good = client_stats_read(s, root);
    json_decref(root);
    return good;
}

static const struct row { const char *name, *type, *help; double unit; } rows[CLIENT_STATS] = {
    { "loramill_kafka_broker_rtt_seconds", "gauge", "Round trips to brokers, 99th percentile of "
      "the slowest broker.", 1e-6 },
    { "loramill_kafka_throttle_seconds", "gauge", "Average time for which the brokers' quotas "
      "hold requests up, of the strictest broker.", 1e-3 },
    { "loramill_kafka_request_timeouts_total", "counter", "Requests that a broker did not "
      "answer in time.", 1 },
    { "loramill_kafka_request_retries_total", "counter", "Requests sent again.", 1 },
    { "loramill_kafka_connects_total", "counter", "Connections made to brokers.", 1 },
    { "loramill_kafka_waiting_records", "gauge", "Producer: not acknowledged yet. Consumer: "
      "fetched and not read yet.", 1 },
    { "loramill_kafka_waiting_bytes", "gauge", "Bytes of those.", 1 },
};

void client_stats_write(const struct client_stats *consumer, const struct client_stats *producer,
                        FILE *f)
{
    const struct { const char *label; const struct client_stats *s; } both[] = {
        { "consumer", consumer }, { "producer", producer },
    };
    for (int i = 0; i < CLIENT_STATS; i++) {
        metrics_help(f, rows[i].name, rows[i].type, rows[i].help);
        for (size_t k = 0; k < LM_COUNT(both); k++) {
            long long v = atomic_load_explicit(&both[k].s->values[i], memory_order_relaxed);
            fprintf(f, rows[i].unit == 1 ? "%s{client=\"%s\"} %.0f\n" : "%s{client=\"%s\"} %.6f\n",
                    rows[i].name, both[k].label, (double)v * rows[i].unit);
        }
    }
}
