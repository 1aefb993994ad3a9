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
 * A prompt that the broker took may be too large for the dead-letter topic once our headers are
 * behind it. As it would block its partition for ever, it is then trimmed, step by step:
 *   brief   ours are shortened to where it came from and why
 *   bare    value, headers and a key above DEAD_LETTER_KEY_MAX are left out as well;
 *           loramill-omitted says so, and the `original` headers where the prompt lies
 *
 * A dead letter that was sent back for a retry and fails again keeps its first `original` headers:
 * they say where it came from. Its newest `exception` ones are added last, and the last counts.
 *
 * Threads: whoever has the job.
 */
#ifndef LORAMILL_WORKER_DEAD_LETTER_H
#define LORAMILL_WORKER_DEAD_LETTER_H

#include "worker/job.h"

enum dead_letter_trim { DEAD_LETTER_WHOLE, DEAD_LETTER_BRIEF, DEAD_LETTER_BARE };

enum { DEAD_LETTER_KEY_MAX = 1024 };

struct dead_letter_from { const char *worker, *group, *stage; };

/* All headers of the dead letter: the record's, then ours. LM_NOMEM. */
lm_status dead_letter_headers(struct header_list *out, const struct record *r, const char *topic,
                              int32_t partition, const struct lm_err *why,
                              const struct dead_letter_from *from);

/* The same for one that is too large. Brief: the record's headers and few of ours; bare: few of
 * ours. LM_NOMEM. */
lm_status dead_letter_trimmed(struct header_list *out, const struct record *r, const char *topic,
                              int32_t partition, const struct lm_err *why,
                              enum dead_letter_trim trim);

#endif
