/* SPDX-License-Identifier: Apache-2.0 */
/*
 * schema_cache.h - writers' schemas by id or GUID: fetched once, vetted once, kept.
 *
 * What an id means never changes, so plans stay until the 1,024 places are full; then the least
 * recently used goes, refusals first. An id that the registry doesn't know is remembered for 10 s
 * (it may be registered in a moment); a schema that we refuse is remembered as long as a plan.
 * Retriable failures are not remembered here (registry.h holds off by itself).
 *
 * Without a registry of its own it asks nobody: schema_cache_find() says what is missing, and who
 * has asked (schema_asker.h) lets it learn the answer.
 *
 * Threads: one at a time, the one that the registry handle belongs to.
 */
#ifndef LORAMILL_WORKER_CODEC_SCHEMA_CACHE_H
#define LORAMILL_WORKER_CODEC_SCHEMA_CACHE_H

#include "worker/codec/avro_plan.h"
#include "worker/codec/registry.h"

struct schema_key {
    bool is_guid;
    int32_t id;                 /* when not a GUID */
    unsigned char guid[16];
};

typedef struct schema_cache schema_cache;

bool schema_key_equal(const struct schema_key *a, const struct schema_key *b);

schema_cache *schema_cache_new(registry *r);    /* borrows r, or NULL; NULL: out of memory */
void schema_cache_free(schema_cache *c);        /* NULL is allowed */

/* The plan is borrowed, until the next call. */
lm_status schema_cache_get(schema_cache *c, const struct schema_key *key,
                           struct avro_plan **out, struct lm_err *err);

/* The same without asking: LM_BUSY when it isn't here. */
lm_status schema_cache_find(schema_cache *c, const struct schema_key *key,
                            struct avro_plan **out, struct lm_err *err);

/* What the registry answers: the schema's text or, NULL, the status and message of `why`. Keeps
 * what is to be kept, and answers as schema_cache_get() does. */
lm_status schema_cache_learn(schema_cache *c, const struct schema_key *key, const char *text,
                             const struct lm_err *why, struct avro_plan **out, struct lm_err *err);

#endif
