/* SPDX-License-Identifier: Apache-2.0 */
/*
 * blame.h - exactly-once: which records of an aborted transaction would hold up the next one?
 *
 * A report tells of its own record. The coordinator, which refuses a topic that we may not write
 * to, does not say which one that is: in a transaction of many it may be each that has taken
 * nothing, and in a try of one topic (aside.h) it is that, or a notice's.
 *
 * Threads: the producer thread's.
 */
#ifndef LORAMILL_WORKER_BLAME_H
#define LORAMILL_WORKER_BLAME_H

#include "worker/staging.h"

/* Was any record not taken in time? */
bool blame_timed_out(const struct stage *s);
/* Which of the job's records would hold up the next transaction; NULL: neither. `code`: for what it
 * was aborted, 0: not known. */
const struct outgoing *blame_held_up(const struct stage *s, rd_kafka_resp_err_t code,
                                     const struct job *j);
/* After a try of `topic`: a record that is at fault gets the error; a notice that did not arrive,
 * while its dead letter did, is left out. */
void blame_of_try(producer *p, const char *topic, rd_kafka_resp_err_t code, struct job *j);

#endif
