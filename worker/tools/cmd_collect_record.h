/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_collect_record.h - what a collector reads out of one record, and the line it makes of it.
 *
 * Replies are JSON or Avro (docs/messages.md). Dead letters are prompts with headers that say why;
 * our own names and both families in use elsewhere are understood (binary numbers under
 * kafka_dlt-*, text under __connect.errors.*), so that dead letters of other tools can be read too.
 * Nothing in a record is trusted: a header that is missing or odd reads as unknown.
 */
#ifndef LORAMILL_WORKER_TOOLS_CMD_COLLECT_RECORD_H
#define LORAMILL_WORKER_TOOLS_CMD_COLLECT_RECORD_H

#include <jansson.h>
#include <librdkafka/rdkafka.h>
#include "worker/codec/codec.h"
#include "worker/config.h"
#include "worker/tools/cmd_collect_outcomes.h"

/* A codec for what the deployment's workers write, and for prompts that were too large for them. */
lm_status collected_codec(const struct config *c, codec **out, struct lm_err *err);

/* All headers of a record, for codec_detect() and codec_decode_tree(); malloc'ed, of bytes that are
 * the record's; NULL with *n 0 for none. */
struct header *collected_headers(const rd_kafka_message_t *m, int *n);

/* ---- replies ---------------------------------------------------------------------------- */

struct collected_reply {
    json_t *root;
    const char *id;             /* in root */
    size_t id_len;
    bool as_it_came;            /* the record's value is the line */
    bool outcome;               /* not a part of a streamed reply, nor a notice of a dead letter */
};

/* Disposition LM_DO_RETRY: the registry does not answer. */
lm_status collected_reply_read(codec *c, const rd_kafka_message_t *m, struct collected_reply *r,
                               struct lm_err *err);
void collected_reply_release(struct collected_reply *r);
/* malloc'ed, or NULL */
char *collected_reply_line(const struct collected_reply *r, const rd_kafka_message_t *m);

/* ---- dead letters ----------------------------------------------------------------------- */

struct collected_letter {
    json_t *prompt;             /* NULL when the value is not JSON */
    const char *id;             /* in prompt; NULL when it has none */
    char code[64], message[512];
    char topic[256];            /* where the prompt was; "" when the headers don't say */
    int64_t partition, offset, attempt;     /* -1: the headers don't say */
    char source[320];           /* "topic/3/17": the prompt's place, else the dead letter's own */
};

void collected_letter_read(const rd_kafka_message_t *m, struct collected_letter *d);
void collected_letter_release(struct collected_letter *d);
/* What `collect` writes of it; NULL: out of memory. As a line malloc'ed. */
json_t *collected_letter_json(const struct collected_letter *d, const rd_kafka_message_t *m);
char *collected_letter_line(const struct collected_letter *d, const rd_kafka_message_t *m);

/* ---- sums over a job -------------------------------------------------------------------- */

struct collected_sum;
struct collected_sum *collected_sum_new(void);
void collected_sum_free(struct collected_sum *t);
void collected_sum_reply(struct collected_sum *t, const struct collected_reply *r,
                         const rd_kafka_message_t *m);
void collected_sum_dead_letter(struct collected_sum *t, const struct collected_letter *d,
                               const rd_kafka_message_t *m);
/* {"answered", "dead_lettered", "missing", "repeated", "prompt_tokens", "completion_tokens",
 *  "first_ms", "last_ms", "adapters": {name: replies}, "workers": {name: replies},
 *  "finish_reasons": {reason: choices}, "causes": {code: dead letters}} */
lm_status collected_sum_write(const struct collected_sum *t, const struct outcome_counts *n,
                              const char *path, struct lm_err *err);

#endif
