/* SPDX-License-Identifier: Apache-2.0 */
/*
 * prefix.c - a hash table over block ids.
 *
 * Invariants
 *  1. An entry is found by its exact key: a hash selects the bucket, then serial, parent and tokens
 *     are compared, so a collision can never hand one tenant another's KV.
 *  2. Whoever holds a cached block holds its parent: acquire walks from the first block, and
 *     offer() moves the caller to the cached twin instead of leaving two.
 *  3. Hence a block is idle only if all its cached children are idle; and as a sequence drops its
 *     last block first, children stand before parents in the idle list. The head is always a leaf,
 *     so evicting the head never leaves a child whose parent id could come to mean another block.
 *  4. n_idle blocks have exactly one reference, the cache's own.
 */
#include "engine/prefix.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

lm_status prefix_init(struct prefix *p, struct pool *pool, int block_tokens, bool enabled,
                      struct lm_err *err)
{
    *p = (struct prefix){ .pool = pool, .block_tokens = block_tokens, .enabled = enabled,
                          .idle_head = -1, .idle_tail = -1 };
    size_t n = (size_t)pool->n_blocks;
    p->n_buckets = 1;
    while (p->n_buckets < n)
        p->n_buckets *= 2;
    p->entry = lm_calloc(n, sizeof *p->entry);
    p->tokens = lm_calloc(n * (size_t)block_tokens, sizeof *p->tokens);
    p->bucket = lm_reallocarray(NULL, p->n_buckets, sizeof *p->bucket);
    if (!p->entry || !p->tokens || !p->bucket) {
        prefix_release(p);
        return lm_err_set(err, LM_NOMEM, "no memory for the prefix cache of %zu blocks", n);
    }
    memset(p->bucket, 0xff, p->n_buckets * sizeof *p->bucket);
    return LM_OK;
}

void prefix_release(struct prefix *p)
{
    free(p->entry);
    free(p->tokens);
    free(p->bucket);
    *p = (struct prefix){ 0 };
}

/* ---- keys ------------------------------------------------------------------------------ */

static uint64_t key_hash(const struct prefix *p, uint64_t serial, int32_t parent,
                         const int32_t *tokens)
{
    uint64_t seed = serial * 0x9e3779b97f4a7c15u ^ (uint32_t)(parent + 1);
    return XXH3_64bits_withSeed(tokens, (size_t)p->block_tokens * sizeof *tokens, seed);
}

static int32_t *block_tokens_of(const struct prefix *p, int32_t block)
{
    return p->tokens + (size_t)block * (size_t)p->block_tokens;
}

static int32_t find(const struct prefix *p, uint64_t hash, uint64_t serial, int32_t parent,
                    const int32_t *tokens)
{
    size_t bytes = (size_t)p->block_tokens * sizeof *tokens;
    for (int32_t b = p->bucket[hash & (p->n_buckets - 1)]; b >= 0; b = p->entry[b].chain) {
        const struct prefix_entry *e = &p->entry[b];
        if (e->hash == hash && e->serial == serial && e->parent == parent &&
            !memcmp(block_tokens_of(p, b), tokens, bytes))
            return b;
    }
    return -1;
}

/* ---- idle list ------------------------------------------------------------------------- */

static void idle_remove(struct prefix *p, int32_t b)
{
    struct prefix_entry *e = &p->entry[b];
    if (!e->idle)
        return;
    *(e->prev >= 0 ? &p->entry[e->prev].next : &p->idle_head) = e->next;
    *(e->next >= 0 ? &p->entry[e->next].prev : &p->idle_tail) = e->prev;
    e->idle = false;
    p->n_idle--;
}

static void idle_append(struct prefix *p, int32_t b)
{
    struct prefix_entry *e = &p->entry[b];
    e->prev = p->idle_tail;
    e->next = -1;
    *(e->prev >= 0 ? &p->entry[e->prev].next : &p->idle_head) = b;
    p->idle_tail = b;
    e->idle = true;
    e->idle_since = p->clock;
    p->n_idle++;
}

/* ---- taking ---------------------------------------------------------------------------- */

int prefix_match(const struct prefix *p, uint64_t serial, const int32_t *tokens, int max,
                 int *n_idle)
{
    int n = 0;
    int32_t parent = -1;
    *n_idle = 0;
    for (; p->enabled && n < max; n++) {
        const int32_t *t = tokens + (size_t)n * (size_t)p->block_tokens;
        int32_t b = find(p, key_hash(p, serial, parent, t), serial, parent, t);
        if (b < 0)
            break;
        *n_idle += p->entry[b].idle;
        parent = b;
    }
    return n;
}

int prefix_acquire(struct prefix *p, uint64_t serial, const int32_t *tokens, int max,
                   int32_t *blocks)
{
    int n = 0;
    int32_t parent = -1;
    for (; p->enabled && n < max; n++) {
        const int32_t *t = tokens + (size_t)n * (size_t)p->block_tokens;
        int32_t b = find(p, key_hash(p, serial, parent, t), serial, parent, t);
        if (b < 0)
            break;
        idle_remove(p, b);
        pool_ref(p->pool, b);
        blocks[n] = parent = b;
    }
    return n;
}

int32_t prefix_offer(struct prefix *p, uint64_t serial, int32_t parent, const int32_t *tokens,
                     int32_t block)
{
    struct prefix_entry *e = &p->entry[block];
    if (!p->enabled || e->cached)
        return block;
    uint64_t hash = key_hash(p, serial, parent, tokens);
    int32_t twin = find(p, hash, serial, parent, tokens);
    if (twin >= 0) {
        idle_remove(p, twin);
        pool_ref(p->pool, twin);
        pool_unref(p->pool, block);
        return twin;
    }
    int32_t *bucket = &p->bucket[hash & (p->n_buckets - 1)];
    *e = (struct prefix_entry){ .hash = hash, .serial = serial, .parent = parent,
                                .chain = *bucket, .cached = true };
    *bucket = block;
    memcpy(block_tokens_of(p, block), tokens, (size_t)p->block_tokens * sizeof *tokens);
    pool_ref(p->pool, block);
    p->n_cached++;
    return block;
}

/* ---- giving back ----------------------------------------------------------------------- */

void prefix_unref(struct prefix *p, int32_t block)
{
    bool freed = pool_unref(p->pool, block);
    if (!freed && p->entry[block].cached && pool_refs(p->pool, block) == 1)
        idle_append(p, block);
}

bool prefix_frees(const struct prefix *p, int32_t block)
{
    return pool_refs(p->pool, block) == 1 + p->entry[block].cached;
}

bool prefix_evict(struct prefix *p)
{
    int32_t b = p->idle_head;
    if (b < 0)
        return false;
    struct prefix_entry *e = &p->entry[b];
    idle_remove(p, b);
    int32_t *at = &p->bucket[e->hash & (p->n_buckets - 1)];
    while (*at != b)
        at = &p->entry[*at].chain;
    *at = e->chain;
    e->cached = false;
    p->n_cached--;
    bool freed = pool_unref(p->pool, b);
    assert(freed);
    return freed;
}

lm_status prefix_check(const struct prefix *p, struct lm_err *err)
{
    int32_t cached = 0, idle = 0;
    for (int32_t b = 0; b < p->pool->n_blocks; b++) {
        const struct prefix_entry *e = &p->entry[b];
        cached += e->cached;
        idle += e->idle;
        bool only_ours = e->cached && pool_refs(p->pool, b) == 1;
        if (e->idle != only_ours)
            return lm_err_set(err, LM_INTERNAL, "prefix cache: block %d with %d references is %s",
                              b, pool_refs(p->pool, b), e->idle ? "idle" : "not idle");
        if (e->cached && e->parent >= 0 && !p->entry[e->parent].cached)
            return lm_err_set(err, LM_INTERNAL, "prefix cache: block %d lost its parent %d", b,
                              e->parent);
        if (e->cached && e->parent >= 0 && !e->idle && p->entry[e->parent].idle)
            return lm_err_set(err, LM_INTERNAL, "prefix cache: block %d is held, its parent %d is "
                                                "idle", b, e->parent);
    }
    if (cached != p->n_cached || idle != p->n_idle)
        return lm_err_set(err, LM_INTERNAL, "prefix cache: %d cached and %d idle blocks, the book "
                                            "says %d and %d", cached, idle, p->n_cached, p->n_idle);
    return LM_OK;
}
