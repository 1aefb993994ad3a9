/* SPDX-License-Identifier: Apache-2.0 */
/*
 * delivery.h - delivery reports judged: is a job done, sent again, or another outcome?
 *
 * Threads: the producer thread's.
 */
#ifndef LORAMILL_WORKER_DELIVERY_H
#define LORAMILL_WORKER_DELIVERY_H

#include "worker/worker.h"

/* All that was sent has its report: is the job done? Then delivery_give(), behind all at hand. */
void delivery_judge(producer *p, struct job *j);
/* Its transaction has committed, so it is, whatever its reports say: they may have died with an old
 * producer. Then delivery_give() likewise. */
void delivery_done(producer *p, struct job *j);
/* Those of one poll, or of one transaction, together: a lock and a look at the clock for all. */
void delivery_give(producer *p);

/* Its notice has failed: true if it never can be delivered. The job goes on without it. */
bool delivery_spare_notice(producer *p, struct job *j);
/* Its notice is for a topic that takes no records for now: the job goes on without it. */
void delivery_leave_notice(producer *p, struct job *j);

/* Was this very record refused? Else it only shared the fate of its transaction, or of a broker.
 * NULL: no. */
bool delivery_refused(const struct outgoing *o);

#endif
