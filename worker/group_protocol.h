/* SPDX-License-Identifier: Apache-2.0 */
/*
 * group_protocol.h - does the group's coordinator speak KIP-848 (kafka.group.protocol=consumer)?
 *
 * librdkafka doesn't tell: when a coordinator has no ConsumerGroupHeartbeat, as every broker before
 * Kafka 4.0, it asks for the next coordinator, finds the same, and so on without a word. So the
 * requests are watched, by interceptors. A coordinator that has named its requests (the answer to
 * ApiVersions) and then is never sent a heartbeat has none. A broker that is away names nothing,
 * and is waited for as ever.
 */
#ifndef LORAMILL_WORKER_GROUP_PROTOCOL_H
#define LORAMILL_WORKER_GROUP_PROTOCOL_H

#include <librdkafka/rdkafka.h>
#include <stdatomic.h>

#include "kernels/base.h"

/* All zero to begin with. librdkafka's threads write the flags, the rest is the caller's. */
struct group_protocol {
    atomic_bool answered;       /* the coordinator has said what it can do */
    atomic_bool spoken;         /* a heartbeat was sent: it can */
    int waited;
    int64_t looked_us;
};

/* Watches the handle that is made from `conf`; *g must outlive it. */
void group_protocol_watch(rd_kafka_conf_t *conf, struct group_protocol *g);

/* To be called often while the handle is polled: true when there is no hope left, 10 s after the
 * coordinator's answer. Time in which the process was stopped doesn't count. */
bool group_protocol_missing(struct group_protocol *g, int64_t now_us);

#endif
