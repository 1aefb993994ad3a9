/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dev_broker.h - a Kafka broker inside this process, for trying things out and for tests.
 *
 * It is librdkafka's mock cluster: real sockets, real protocol, consumer groups; everything is in
 * memory, at most 5 MiB a partition (older records go), gone when it is freed. It knows no
 * transactions worth the name, no TLS, no access control. Never for anything that matters.
 *
 * Threads: librdkafka's own; the functions here may be called from any one thread at a time.
 */
#ifndef LORAMILL_WORKER_TOOLS_DEV_BROKER_H
#define LORAMILL_WORKER_TOOLS_DEV_BROKER_H

#include "kernels/base.h"

typedef struct dev_broker dev_broker;

lm_status dev_broker_new(int brokers, dev_broker **out, struct lm_err *err);
void dev_broker_free(dev_broker *b);
const char *dev_broker_address(const dev_broker *b);    /* bootstrap servers; lives with `b` */
lm_status dev_broker_topic(dev_broker *b, const char *name, int partitions, struct lm_err *err);

#endif
