/* SPDX-License-Identifier: Apache-2.0 */
/*
 * outcome.h - the two ways a prompt can end, as records, and the parts of a streamed reply.
 *
 * Threads: whoever has the job.
 */
#ifndef LORAMILL_WORKER_OUTCOME_H
#define LORAMILL_WORKER_OUTCOME_H

#include "worker/worker.h"

/* Encodes j->result and produces the reply; a failure that can't heal becomes a dead letter.
 * Returns LM_OK when the job has gone on its way, else a status that can heal (the caller keeps the
 * job). */
lm_status outcome_reply(struct worker *w, struct job *j);

/* The reply lies in the object store: produces the record that says so. As outcome_reply(). */
lm_status outcome_claimed(struct worker *w, struct job *j, const struct completion_claim *claim);

/* Encodes `text` as the next part of j's streamed reply and produces it; it comes back through
 * w->parts. A status that can heal: nothing was sent. Takes nothing over. */
lm_status outcome_part(struct worker *w, struct job *j, const struct engine_result *text);

/* Produces the dead letter; the offset is finished once it is acknowledged. `stage` names the part
 * of the worker that refused it. */
void outcome_dead_letter(struct worker *w, struct job *j, const struct lm_err *why,
                         const char *stage);

/* The broker finds this dead letter too large: makes it smaller and produces it again. False: it is
 * as small as it gets. */
bool outcome_trim(struct worker *w, struct job *j);

/* The reply is acknowledged. The producer thread's. */
void outcome_count(struct worker *w, const struct reply_tally *t);

/* A result with one empty choice that ended for `reason`, for a prompt that never reached the
 * engine. NULL: out of memory. */
struct engine_result *outcome_empty_result(enum engine_reason reason);

#endif
