/* SPDX-License-Identifier: Apache-2.0 */
/*
 * client_stats.h - what librdkafka says about its own work (statistics.interval.ms), as metrics: is
 * it the brokers that are slow, or we?
 *
 * The library hands over a JSON text every interval; of its hundreds of numbers those few are kept
 * that tell a slow or failing broker from a slow worker. Sums and maxima over all brokers and
 * partitions: no label names one of them, for there may be thousands.
 *
 * Threads: client_stats_take() and client_stats_read() run on the thread that polls the client, in
 * its callback; client_stats_write() on any.
 */
#ifndef LORAMILL_WORKER_CLIENT_STATS_H
#define LORAMILL_WORKER_CLIENT_STATS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include <jansson.h>

/* A number of it; 0 where there is none. */
static inline long long stats_number(const json_t *o, const char *key)
{
    return (long long)json_number_value(json_object_get(o, key));
}

enum client_stat {
    CLIENT_RTT_US,              /* highest 99th percentile of a broker's round trip */
    CLIENT_THROTTLE_MS,         /* highest average of a broker's throttling */
    CLIENT_REQUEST_TIMEOUTS, CLIENT_REQUEST_RETRIES, CLIENT_CONNECTS,  /* sums over brokers */
    CLIENT_WAITING_RECORDS,     /* producer: not acknowledged; consumer: fetched and not read */
    CLIENT_WAITING_BYTES,
    CLIENT_STATS
};

/* Zeros: nothing is known yet. */
struct client_stats { atomic_llong values[CLIENT_STATS]; };

/* Reads the library's text. False: it is not what we know; nothing changes. */
bool client_stats_take(struct client_stats *s, const char *json, size_t len);
bool client_stats_read(struct client_stats *s, const json_t *root);     /* the same, parsed */

/* Prometheus text, label client="consumer" and "producer". */
void client_stats_write(const struct client_stats *consumer, const struct client_stats *producer,
                        FILE *f);

#endif
