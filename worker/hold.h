/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hold.h - at-least-once: what is held back behind records on their way to the brokers.
 *
 * librdkafka (2.15.1) sends a partition's batches one after the other, and its thread polls without
 * a pause while what waits behind one is older than linger.ms. What is held back until those before
 * it have their reports leaves together, in larger batches, which cost both sides less. A record
 * that comes while nothing is on its way leaves at once, so an idle worker answers no later.
 *
 * Each topic has a *road*: topics.replies one of its own, the others share HOLD_ROADS - 1 by
 * their names. What was sent on a road and has no report yet is its *flight*:
 *
 *   nothing in flight             the next one leaves at once
 *   the last left < HOLD_US ago   the next ones are held back, until all of the flight have their
 *                                 reports, and HOLD_US after that last one in any case
 *   it left before that           what is still in flight is stuck, or its broker is slow: it is
 *                                 forgotten, and a new flight begins
 *
 * So nothing is held for longer than HOLD_US, and a partition that takes nothing (its leader is
 * away) costs other topics nothing, unless their names meet; on its own topic what is sent within
 * HOLD_US after a record of it waits for the rest of that time.
 *
 * The thread that polls for reports sleeps no longer than hold_wait_ms(). It may be asleep for
 * longer when a flight begins: who is first held back behind it is told to wake it.
 *
 * Threads: hold_wait_ms() and hold_take() the producer thread only, the others any: whoever hands a
 * record to the client library learns at once that it was not taken. The lock is for what is held,
 * not for the counts, and no other is taken under it.
 */
#ifndef LORAMILL_WORKER_HOLD_H
#define LORAMILL_WORKER_HOLD_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "worker/job.h"

enum { HOLD_US = 20000, HOLD_ROADS = 16 };

struct hold_road {
    atomic_ullong flight;       /* its number; in the lower half, records without a report */
    atomic_llong sent_us;       /* the last of them */
    struct job_chain held;      /* under the lock, */
    int64_t until_us;           /* at the latest */
};

struct hold {
    const char *usual;          /* topics.replies, by address */
    pthread_mutex_t lock;
    int64_t awake_us;           /* under it: when the producer thread wakes by itself */
    struct hold_road roads[HOLD_ROADS];
};

void hold_init(struct hold *h, const char *usual);
void hold_release(struct hold *h);

/* True: the job is kept until hold_take(). `wake`: and the producer thread is to be woken. */
bool hold_back(struct hold *h, struct job *j, int64_t now_us, bool *wake);
/* A record is about to be handed to the client library. */
void hold_sent(struct hold *h, struct outgoing *o, int64_t now_us);
/* It has its report, or was not taken. */
void hold_reported(struct hold *h, struct outgoing *o);

/* What may go now; `all`: in any case. A chain, those of a road in their order; NULL: nothing. */
struct job *hold_take(struct hold *h, int64_t now_us, bool all);
/* How long the thread that calls hold_take() may sleep, `cap` at most. */
int hold_wait_ms(struct hold *h, int64_t now_us, int cap);

#endif
