/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cancels.h - request ids that were cancelled, and the live prompts by their ids.
 *
 * An order to cancel and its prompt may meet anywhere: the prompt may still lie in the topic, wait
 * here, run in the engine, or be answered already. So orders are remembered, and each prompt is
 * entered under its id when it is decoded:
 *
 *   order first     the prompt finds it when it enters, and never reaches the engine
 *   prompt first    the order finds the prompt, marks it, and cancels it in the engine if it is
 *                   there; whoever holds it otherwise sees the mark
 *
 * An order concerns prompts that were produced before it, so that an id may be used again
 * afterwards; of several orders for one id the latest counts. "Before" is by the records'
 * timestamps, which are by the clocks of two clients: so a prompt that is stamped up to `skew_ms`
 * later is concerned, too. Orders are forgotten after `retention_ms`, and the oldest when there are
 * CANCELS_MAX.
 *
 * Ownership: jobs are borrowed; they leave before they end. Threads: any, one lock.
 */
#ifndef LORAMILL_WORKER_CANCELS_H
#define LORAMILL_WORKER_CANCELS_H

#include "worker/job.h"

enum { CANCELS_MAX = 100000 };

typedef struct cancels cancels;

cancels *cancels_new(int64_t retention_ms, int64_t skew_ms);    /* NULL: out of memory */
void cancels_free(cancels *c);                  /* NULL is allowed */

/* The job has its prompt: enters it, once. True: it is cancelled already. */
bool cancels_enter(cancels *c, struct job *j);
void cancels_leave(cancels *c, struct job *j);  /* nothing when it never entered */

/* An order of `when_ms` (wall clock), now `now_ms`. Marks the live prompts with this id, and calls
 * `running` for each whose engine handle is known. */
struct cancels_met { int marked, later; };      /* of those that are live; `later`: not concerned */
struct cancels_met cancels_order(cancels *c, const char *id, int64_t when_ms, int64_t now_ms,
                                 void (*running)(void *ctx, uint64_t handle), void *ctx);

size_t cancels_count(cancels *c);               /* orders remembered; tests only */

#endif
