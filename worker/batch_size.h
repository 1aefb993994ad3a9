/* SPDX-License-Identifier: Apache-2.0 */
/*
 * batch_size.h - the client library's batch.size, while brokers refuse batches.
 *
 * MSG_SIZE_TOO_LARGE is the broker's verdict on a whole batch, so a small reply may be condemned
 * with its neighbours. A reply above batch.size travels alone, and its verdict is its own; a
 * smaller one goes again with smaller batches, a new client's, and is believed at BATCH_LEAST only,
 * after a few tries more. It may itself have been what was too large, so batches grow again step
 * by step: when none was refused for ten minutes, and nothing is on its way that a new client
 * could overtake. Where that proves wrong the next try waits twice as long, a day at most.
 *
 * Threads: the producer thread's.
 */
#ifndef LORAMILL_WORKER_BATCH_SIZE_H
#define LORAMILL_WORKER_BATCH_SIZE_H

#include "kernels/base.h"

struct batch_size {
    int64_t full;               /* as configured */
    int64_t bytes;              /* as the client has it */
    int64_t most;               /* for the next client, since brokers have refused such; 0: full */
    bool shrink;                /* it is to be less */
    char topic[256];            /* which asks for that; the caller's to fill */
    bool grown;                 /* the last change of it was to more */
    int64_t grow_at_us, grow_wait_us;
};

/* A record of `len` bytes, key and headers included, was refused, after `attempts` others: is that
 * verdict its own? Else the next client gets smaller batches, unless the report comes from an `old`
 * one, being let go. */
bool batch_size_believe(struct batch_size *b, size_t len, int attempts, bool old);

/* May there be something to change? */
static inline bool batch_size_pending(const struct batch_size *b)
{
    return b->shrink || b->most;
}

/* The next client gets another. True: it is to be made. `idle`: nothing is on its way. */
bool batch_size_change(struct batch_size *b, bool idle, int64_t now_us);

#endif
