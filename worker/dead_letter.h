/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dead_letter.h - the record that says why a prompt was not answered. Key, value and headers are
 * the prompt's own, byte for byte and in order; ours are added behind them.
 *
 * Three families, so that the ecosystem's tools read it without help:
 *   Spring        kafka_dlt-original-*, kafka_dlt-exception-*     partition int32, offset and
 *                 timestamp int64, big-endian; the rest UTF-8
 *   Connect       __connect.errors.*                              UTF-8 throughout
 *   loramill      loramill-error-code, -error-message, -attempt, -worker
 *
 * A dead letter that was sent back for a retry and fails again keeps its first `original` headers:
 * they say where it came from. Its newest `exception` ones are added last, and the last counts.
 */
#ifndef LORAMILL_WORKER_DEAD_LETTER_H
#define LORAMILL_WORKER_DEAD_LETTER_H

#include "worker/job.h"

struct dead_letter_from { const char *worker, *group, *stage; };

/* All headers of the dead letter: the record's, then ours. LM_NOMEM. */
lm_status dead_letter_headers(struct header_list *out, const struct record *r, const char *topic,
                              int32_t partition, const struct lm_err *why,
                              const struct dead_letter_from *from);

#endif
