/* SPDX-License-Identifier: Apache-2.0 */
/*
 * prefix.h - finished KV blocks, found again by what they hold.
 *
 * A full block's KV depends on the adapter version and on every token up to its end, so a block is
 * known by (parent block, adapter version, its own tokens). Sequences that share a prompt's
 * beginning, the choices of one request, and a sequence that is recomputed after a preemption take
 * such blocks instead of computing them. Never shared across adapters or their versions.
 *
 * The cache holds one reference on each of its blocks; a block that only the cache holds is idle
 * and stays until someone needs the room (evict.c), or its version goes (prefix_forget()).
 *
 * Threads: belongs to the engine thread.
 */
#ifndef LORAMILL_ENGINE_PREFIX_H
#define LORAMILL_ENGINE_PREFIX_H

#include "engine/evict.h"

struct prefix_entry {
    uint64_t hash;
    struct evict_version *version;
    int32_t parent;             /* block before it, -1 for the first */
    int32_t chain;              /* next in the bucket, -1 */
    int32_t prev, next;         /* its version's queue of its class; -1 */
    struct evict_age idle_since;
    uint8_t hits;               /* times found; stays at 255 */
    bool cached, idle;
};

struct prefix {
    struct pool *pool;
    struct evict *evict;
    int block_tokens;
    struct prefix_entry *entry; /* [n_blocks], by block id */
    int32_t *tokens;            /* [n_blocks * block_tokens] */
    int32_t *bucket;            /* [n_buckets], a power of two */
    uint32_t n_buckets;
    int32_t n_cached, n_idle;
    bool enabled;
};

lm_status prefix_init(struct prefix *p, struct pool *pool, struct evict *evict, int block_tokens,
                      bool enabled, struct lm_err *err);
void prefix_release(struct prefix *p);

/* How many leading full blocks of `tokens` are cached, at most `max`; *n_idle of them are idle.
 * Everywhere, version NULL is the base model. */
int prefix_match(const struct prefix *p, const struct evict_version *v, const int32_t *tokens,
                 int max, int *n_idle);

/* The same, and takes a reference on each; ids go to blocks[0 ..). */
int prefix_acquire(struct prefix *p, struct evict_version *v, const int32_t *tokens, int max,
                   int32_t *blocks);

/* Offers a block whose KV is complete: `parent` is the block before it, already offered. Returns
 * the block to go on with, which is another one where the cache already had this content: then the
 * caller's reference has moved to it. */
int32_t prefix_offer(struct prefix *p, struct evict_version *v, int32_t parent,
                     const int32_t *tokens, int32_t block);

/* Drops a sequence's reference on any KV block, cached or not. Within a sequence the last block
 * goes first, so that the idle list has children before parents. */
void prefix_unref(struct prefix *p, int32_t block);

/* Would dropping one reference make room? */
bool prefix_frees(const struct prefix *p, int32_t block);

/* Frees the head of one of a version's queues, which has one. For evict.c. */
void prefix_evict_head(struct prefix *p, struct evict_queue *q);

/* The version is gone, and no sequence of it is left: frees all its blocks. */
void prefix_forget(struct prefix *p, struct evict_version *v);

lm_status prefix_check(const struct prefix *p, struct lm_err *err);

#endif
