/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_dlq_retry.h - sends dead letters back, each once.
 *
 * Letters go out in transactions, of which each commits the marks (dlq_marks.h) of its letters too:
 * so whenever this process dies, a letter is either sent and marked or neither, and a second retry
 * sends the rest. Two at once share the transactional id: the later one fences the earlier off. A
 * letter that is refused (too large for its topic, ...) costs its transaction; then those beside it
 * go one by one, so that it alone stays behind. A letter is printed once it is committed.
 *
 * Threads: main thread only.
 */
#ifndef LORAMILL_WORKER_TOOLS_CMD_DLQ_RETRY_H
#define LORAMILL_WORKER_TOOLS_CMD_DLQ_RETRY_H

#include "worker/tools/cli.h"
#include "worker/tools/dlq_marks.h"

struct dlq_retry;

/* sent: committed. failed: refused, and named. unknown: no answer came to their commit. */
struct dlq_retry_counts { uint64_t sent, failed, unknown; };

/* The marks of topics.dead_letters, by a consumer or producer. The caller frees them. */
lm_status dlq_retry_marks(struct cli_kafka *k, const struct config *c, dlq_marks **out,
                          struct lm_err *err);

/* Opens a producer, fences off an earlier retry that is still at work, and reads the marks with
 * `reader`. `anyway`: a letter for whose mark there is no room goes out without one. */
lm_status dlq_retry_new(const struct config *c, struct cli_kafka *reader, bool anyway,
                        struct dlq_retry **out, struct lm_err *err);
void dlq_retry_free(struct dlq_retry *r);       /* NULL is fine; what was not sent is dropped */

struct cli_kafka *dlq_retry_kafka(struct dlq_retry *r);         /* to ask for topics */
dlq_marks *dlq_retry_marked(struct dlq_retry *r);               /* ours */

/* Takes a copy of a letter, and sends all that it has when that is enough. `from`: the first offset
 * behind the letter before it. An error ends the retry. */
lm_status dlq_retry_add(struct dlq_retry *r, const rd_kafka_message_t *m, int64_t from,
                        const char *topic, const char *code, const char *id, struct lm_err *err);
lm_status dlq_retry_finish(struct dlq_retry *r, struct lm_err *err);    /* sends the rest */
struct dlq_retry_counts dlq_retry_counts(const struct dlq_retry *r);

/* "2:17 -> topic, cause, id", as a line of tab-separated fields. */
void dlq_retry_print(int partition, int64_t offset, const char *topic, const char *code,
                     const char *id);

#endif
