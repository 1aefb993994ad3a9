/* SPDX-License-Identifier: Apache-2.0 */
/*
 * unanswered.h - requests of a transactional producer that may still be on their way.
 *
 * When a request is not answered, because its connection broke or it took too long, librdkafka
 * sends it again, up to a point, and tells nobody. A transaction can so end well while the first
 * copy of its EndTxn lies in some queue; and as the first version of the transaction protocol has
 * one epoch for many transactions, that copy, arriving late, would end a later one in its middle.
 * (Jepsen found that in Kafka and Bufstream. Here it cost replies: the later transaction's records
 * were refused, its offsets committed; tests/integration/test_commits.sh.) What fences it is a new
 * epoch, which is to say a new producer.
 *
 * So an interceptor notes when a request of a transaction gets no answer. One is enough: the next
 * transaction begins with a new producer (transaction_client.c).
 *
 * It counts answers to EndTxn as well, which the client library keeps to itself while they say that
 * it is to ask again (transaction_client.c).
 *
 * Threads: noted on librdkafka's, asked on the producer thread.
 */
#ifndef LORAMILL_WORKER_UNANSWERED_H
#define LORAMILL_WORKER_UNANSWERED_H

#include <stdatomic.h>
#include <stdbool.h>

#include <librdkafka/rdkafka.h>

struct unanswered {
    atomic_bool any;
    atomic_uint ends;           /* answers to requests that a transaction end, whatever they say */
};

/* Notes for the client that is made of `conf`, and which must not outlive `u`; none so far. */
void unanswered_watch(struct unanswered *u, rd_kafka_conf_t *conf);

#endif
