/* SPDX-License-Identifier: Apache-2.0 */
/*
 * consumer_world.h - what the consumer thread has around it, for tests that play that thread: a
 * worker, a client that knows no broker, a ledger, and one partition.
 */
#ifndef LORAMILL_TESTS_UNIT_CONSUMER_WORLD_H
#define LORAMILL_TESTS_UNIT_CONSUMER_WORLD_H

#include <stdlib.h>
#include <string.h>

#include "worker/consumer_int.h"

struct world {
    struct config cfg;
    struct worker w;
    struct consumer c;
    struct assigned part;
};

static void world_drop_job(void *ctx, int64_t offset, void *user)
{
    (void)ctx;
    (void)offset;
    job_unref(user);
}

/* `poll_ms`: max.poll.interval.ms; NULL: the library's. */
static inline struct world *world_open_polled(const char *poll_ms)
{
    char why[128];
    struct world *x = lm_calloc(1, sizeof *x);
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    rd_kafka_conf_set(conf, "group.id", "g", why, sizeof why);
    if (poll_ms) {
        rd_kafka_conf_set(conf, "session.timeout.ms", poll_ms, why, sizeof why);
        rd_kafka_conf_set(conf, "max.poll.interval.ms", poll_ms, why, sizeof why);
    }
    x->w.cfg = &x->cfg;
    job_queue_init(&x->w.to_intake);
    job_queue_init(&x->w.done);
    x->c = (struct consumer){ .w = &x->w, .parts = &x->part, .n_parts = 1, .map_limit = 4096,
                              .rk = rd_kafka_new(RD_KAFKA_CONSUMER, conf, why, sizeof why),
                              .ledger = ledger_new(world_drop_job, NULL, 4096) };
    x->c.queue = rd_kafka_queue_get_consumer(x->c.rk);
    staging_init(&x->c.staging);
    ledger_assign(x->c.ledger, "t", 0, 0, &x->part.ref);
    x->part.lease = lease_new("t", 0, x->part.ref);
    return x;
}

static inline struct world *world_open(void)
{
    return world_open_polled(NULL);
}

/* A prompt of the partition, in the ledger; the caller has a reference. */
static struct job *world_deliver(struct world *x, int64_t offset, const char *key)
{
    struct job *j = NULL;
    struct record r = { .key = key, .key_len = key ? strlen(key) : 0, .offset = offset };
    job_new(x->part.lease, &r, &j);
    ledger_deliver(x->c.ledger, x->part.ref, offset, job_ref(j));
    return j;
}

static void world_close(struct world *x)
{
    ledger_free(x->c.ledger);
    lease_unref(x->part.lease);
    rd_kafka_queue_destroy(x->c.queue);
    rd_kafka_destroy(x->c.rk);
    staging_release(&x->c.staging);
    job_queue_release(&x->w.to_intake);
    job_queue_release(&x->w.done);
    free(x);
}

#endif
