/* SPDX-License-Identifier: Apache-2.0 */
/*
 * leaders.h - notices that the client library keeps to a leader that a partition has no more.
 *
 * librdkafka (2.15.1) takes metadata whose leader epoch is lower than the one it knows for
 * outdated. When a topic is deleted and made again, the epochs of the new one begin at 0; if the
 * old one's leaders had changed, by a rolling restart for example, and the client has not seen the
 * topic missing, it sends to the old leader for ever, and is told each time that it leads no more.
 *
 *   statistics ----leaders_stuck()----> partitions with records that wait, of which none was
 *   (each 10 s)                         acknowledged for ten seconds
 *   the brokers ---leaders_moved()----> is it another one that leads?
 *
 * Only a client that is both stuck and wrong is to be replaced: neither brokers that are away nor
 * a topic that takes no records are reasons, for a new client would fare no better.
 *
 * With kafka.statistics.interval.ms=0 nothing is noticed.
 *
 * Threads: the producer thread's.
 */
#ifndef LORAMILL_WORKER_LEADERS_H
#define LORAMILL_WORKER_LEADERS_H

#include <stdbool.h>
#include <stddef.h>

#include <jansson.h>
#include <librdkafka/rdkafka.h>

enum {
    LEADERS_STUCK_MOST = 16,
    LEADERS_STUCK_US = 9500000,         /* between two of the default interval, at the least */
};

/* What waited, the last that was acknowledged of it, and since when. */
struct leaders { json_t *last; };

struct stuck {
    char topic[256];
    int32_t partition, leader;          /* -1: the client knows none */
};

/* Reads a producer's statistics. Returns how many were found, at most `most`. */
size_t leaders_stuck(struct leaders *l, const json_t *stats, struct stuck *out, size_t most);
void leaders_release(struct leaders *l);

/* The index of the first that another broker leads, `n`: none, or nobody says so. Asks the brokers
 * once, about all topics that the client knows, and waits for a second at most. */
size_t leaders_moved(rd_kafka_t *rk, const struct stuck *s, size_t n);
/* Its judgement. */
bool leaders_differ(const struct stuck *s, const rd_kafka_metadata_t *md);

#endif
