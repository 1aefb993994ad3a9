/* SPDX-License-Identifier: Apache-2.0 */
/*
 * schema_asker.h - a worker's questions to the schema registry, asked by a thread of its own.
 *
 * A registry may be slow or silent. Only what needs its answer waits then: prompts whose schema is
 * not known yet, and replies in Avro until the reply schema has its id. No thread of the worker's
 * does, but for the moment that schema_asker_reply_id() is given.
 *
 *   (nothing) --want--> WANTED --> ASKED --answer--> ANSWERED --take--> (nothing)
 *       ^                            |
 *       +--- the registry is away ---+   who waited is told so, and may want it again
 *
 * Questions are asked one at a time, in the order in which they came; that for the reply schema's
 * id is put before the others. An answer is the schema's text, or why there is none for good; it is
 * kept until it is taken, or until 1,024 questions are here and the oldest answers make room.
 *
 * Who waits is a pointer. Each gets done() once, from the asker's thread or from within
 * schema_asker_stop(): it hands over, and calls nothing of this module.
 *
 * Threads: any.
 */
#ifndef LORAMILL_WORKER_CODEC_SCHEMA_ASKER_H
#define LORAMILL_WORKER_CODEC_SCHEMA_ASKER_H

#include "worker/codec/registry.h"
#include "worker/codec/schema_cache.h"

typedef struct schema_asker schema_asker;

/* trouble NULL: there is an answer, to be taken. Else why not, and a later try may succeed;
 * LM_CANCELLED: no more questions are asked. */
typedef void schema_asker_done(void *user, const struct lm_err *trouble);

/* The schema of replies, whose id is asked for: borrowed. */
struct reply_schema { const char *subject, *text; bool create; };

/* `cfg` is read now, except for `stop`, which is the asker's. */
lm_status schema_asker_new(const struct registry_config *cfg, const struct reply_schema *replies,
                           schema_asker_done *done, schema_asker **out, struct lm_err *err);
/* After schema_asker_stop(), if anybody may wait. A question in the air is given up: about a
 * second. NULL is allowed. */
void schema_asker_free(schema_asker *a);

/* LM_OK: its answer lies here. LM_BUSY: it is asked for, and `user` gets done(). A status that can
 * heal: neither, with the reason in *err. */
lm_status schema_asker_want(schema_asker *a, const struct schema_key *key, void *user,
                            struct lm_err *err);

/* False: no answer is here. Else *text is the schema, the caller's to free, or NULL and *why is the
 * registry's refusal. */
bool schema_asker_take(schema_asker *a, const struct schema_key *key, char **text,
                       struct lm_err *why);

/* The id of the reply schema, waiting wait_ms from when it was wanted at most: LM_NET then, and the
 * answer is here later. */
lm_status schema_asker_reply_id(schema_asker *a, int wait_ms, int32_t *id, struct lm_err *err);

/* No more questions for prompts' schemas: who waits is told at once. Replies go on. */
void schema_asker_stop(schema_asker *a);

#endif
