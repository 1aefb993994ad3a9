/* SPDX-License-Identifier: Apache-2.0 */
/*
 * schema_cache.h - writers' schemas by id or GUID: fetched once, vetted once, kept.
 *
 * What an id means never changes, so plans stay until the 1,024 places are full; then the least
 * recently used goes, refusals first. An id that the registry doesn't know is remembered for 10 s
 * (it may be registered in a moment); a schema that we refuse is remembered as long as a plan.
 * Retriable failures are not remembered here (registry.h holds off by itself).
 *
 * Threads: one at a time, the one that the registry handle belongs to.
 */
#ifndef LORAMILL_WORKER_SCHEMA_CACHE_H
#define LORAMILL_WORKER_SCHEMA_CACHE_H

#include "worker/avro_plan.h"
#include "worker/registry.h"

struct schema_key {
    bool is_guid;
    int32_t id;                 /* when not a GUID */
    unsigned char guid[16];
};

typedef struct schema_cache schema_cache;

schema_cache *schema_cache_new(registry *r);    /* borrows r; NULL: out of memory */
void schema_cache_free(schema_cache *c);        /* NULL is allowed */

/* The plan is borrowed, until the next call. */
lm_status schema_cache_get(schema_cache *c, const struct schema_key *key,
                           struct avro_plan **out, struct lm_err *err);

#endif
