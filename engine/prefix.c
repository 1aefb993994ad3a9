/* SPDX-License-Identifier: Apache-2.0 */
/*
 * prefix.c - a hash table over block ids.
 *
 * Invariants
 *  1. An entry is found by its exact key: a hash selects the bucket, then version, parent and
 *     tokens are compared, so a collision can never hand one tenant another's KV.
 *  2. Whoever holds a cached block holds its parent: acquire walks from the first block, and
 *     offer() moves the caller to the cached twin instead of leaving two.
 *  3. Hence a block is idle only if all its cached children are idle, and as a sequence drops its
 *     last block first, it becomes idle no earlier than they. It was found whenever one of them
 *     was, so its class is no lower. The eviction order follows from class and age, so the block
 *     that leaves next is a leaf, and no child is left whose parent id could come to mean another
 *     block.
 *  4. n_idle blocks have exactly one reference, the cache's own, and stand in the queue of their
 *     version and class.
 *  5. A version that is freed has no cached block: prefix_forget() came before.
 */
#include "engine/prefix.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

lm_status prefix_init(struct prefix *p, struct pool *pool, struct evict *evict, int block_tokens,
                      bool enabled, struct lm_err *err)
{
    *p = (struct prefix){ .pool = pool, .evict = evict, .block_tokens = block_tokens,
                          .enabled = enabled };
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

static uint64_t key_hash(const struct prefix *p, const struct evict_version *v, int32_t parent,
                         const int32_t *tokens)
{
    uint64_t seed = v->serial * 0x9e3779b97f4a7c15u ^ (uint32_t)(parent + 1);
    return XXH3_64bits_withSeed(tokens, (size_t)p->block_tokens * sizeof *tokens, seed);
}

static int32_t *block_tokens_of(const struct prefix *p, int32_t block)
{
    return p->tokens + (size_t)block * (size_t)p->block_tokens;
}

static int32_t find(const struct prefix *p, uint64_t hash, const struct evict_version *v,
                    int32_t parent, const int32_t *tokens)
{
    size_t bytes = (size_t)p->block_tokens * sizeof *tokens;
    for (int32_t b = p->bucket[hash & (p->n_buckets - 1)]; b >= 0; b = p->entry[b].chain) {
        const struct prefix_entry *e = &p->entry[b];
        if (e->hash == hash && e->version == v && e->parent == parent &&
            !memcmp(block_tokens_of(p, b), tokens, bytes))
            return b;
    }
    return -1;
}

/* ---- queues of idle blocks ------------------------------------------------------------- */

static struct evict_queue *queue_of(const struct prefix_entry *e)
{
    return &e->version->prefix[e->hits == 0 ? 0 : e->hits < 4 ? 1 : 2];
}

static void report(struct prefix *p, struct evict_queue *q, int32_t blocks)
{
    struct evict_age none = { 0 };
    evict_update(p->evict, q, blocks, q->head >= 0 ? p->entry[q->head].idle_since : none);
}

static void idle_remove(struct prefix *p, int32_t b)
{
    struct prefix_entry *e = &p->entry[b];
    if (!e->idle)
        return;
    struct evict_queue *q = queue_of(e);
    *(e->prev >= 0 ? &p->entry[e->prev].next : &q->head) = e->next;
    *(e->next >= 0 ? &p->entry[e->next].prev : &q->tail) = e->prev;
    e->idle = false;
    p->n_idle--;
    report(p, q, q->blocks - 1);
}

static void idle_append(struct prefix *p, int32_t b)
{
    struct prefix_entry *e = &p->entry[b];
    struct evict_queue *q = queue_of(e);
    e->prev = q->tail;
    e->next = -1;
    *(e->prev >= 0 ? &p->entry[e->prev].next : &q->head) = b;
    q->tail = b;
    e->idle = true;
    e->idle_since = evict_now(p->evict);
    p->n_idle++;
    report(p, q, q->blocks + 1);
}

/* ---- taking ---------------------------------------------------------------------------- */

int prefix_match(const struct prefix *p, const struct evict_version *v, const int32_t *tokens,
                 int max, int *n_idle)
{
    int n = 0;
    int32_t parent = -1;
    v = v ? v : &p->evict->base;
    *n_idle = 0;
    for (; p->enabled && v->n_cached > 0 && n < max; n++) {
        const int32_t *t = tokens + (size_t)n * (size_t)p->block_tokens;
        int32_t b = find(p, key_hash(p, v, parent, t), v, parent, t);
        if (b < 0)
            break;
        *n_idle += p->entry[b].idle;
        parent = b;
    }
    return n;
}

static void found(struct prefix *p, int32_t b)
{
    struct prefix_entry *e = &p->entry[b];
    idle_remove(p, b);
    pool_ref(p->pool, b);
    if (e->hits == 0)
        evict_saw(p->evict, true);
    e->hits += e->hits < UINT8_MAX;
}

int prefix_acquire(struct prefix *p, struct evict_version *v, const int32_t *tokens, int max,
                   int32_t *blocks)
{
    int n = 0;
    int32_t parent = -1;
    v = v ? v : &p->evict->base;
    for (; p->enabled && n < max; n++) {
        const int32_t *t = tokens + (size_t)n * (size_t)p->block_tokens;
        int32_t b = find(p, key_hash(p, v, parent, t), v, parent, t);
        if (b < 0)
            break;
        found(p, b);
        blocks[n] = parent = b;
    }
    return n;
}

/* The caller's reference moves to the block that was there first. No hit: its parents have none. */
static int32_t use_twin(struct prefix *p, int32_t twin, int32_t block)
{
    idle_remove(p, twin);
    pool_ref(p->pool, twin);
    pool_unref(p->pool, block);
    return twin;
}

int32_t prefix_offer(struct prefix *p, struct evict_version *v, int32_t parent,
                     const int32_t *tokens, int32_t block)
{
    struct prefix_entry *e = &p->entry[block];
    if (!p->enabled || e->cached)
        return block;
    v = v ? v : &p->evict->base;
    uint64_t hash = key_hash(p, v, parent, tokens);
    int32_t twin = find(p, hash, v, parent, tokens);
    if (twin >= 0)
        return use_twin(p, twin, block);
    int32_t *bucket = &p->bucket[hash & (p->n_buckets - 1)];
    *e = (struct prefix_entry){ .hash = hash, .version = v, .parent = parent,
                                .chain = *bucket, .cached = true };
    *bucket = block;
    memcpy(block_tokens_of(p, block), tokens, (size_t)p->block_tokens * sizeof *tokens);
    pool_ref(p->pool, block);
    p->n_cached++;
    v->n_cached++;
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

static void leave_bucket(struct prefix *p, int32_t b)
{
    int32_t *at = &p->bucket[p->entry[b].hash & (p->n_buckets - 1)];
    while (*at != b)
        at = &p->entry[*at].chain;
    *at = p->entry[b].chain;
}

void prefix_evict_head(struct prefix *p, struct evict_queue *q)
{
    int32_t b = q->head;
    struct prefix_entry *e = &p->entry[b];
    idle_remove(p, b);
    leave_bucket(p, b);
    e->cached = false;
    p->n_cached--;
    e->version->n_cached--;
    bool freed = pool_unref(p->pool, b);
    assert(freed);
    (void)freed;
    if (e->hits == 0)
        evict_saw(p->evict, false);
}

void prefix_forget(struct prefix *p, struct evict_version *v)
{
    for (int c = 0; c < EVICT_CLASSES; c++)
        while (v->prefix[c].head >= 0)
            prefix_evict_head(p, &v->prefix[c]);
    assert(v->n_cached == 0);
}

static lm_status check_parent(const struct prefix *p, int32_t b, struct lm_err *err)
{
    const struct prefix_entry *e = &p->entry[b], *up = &p->entry[LM_MAX(e->parent, 0)];
    if (e->parent < 0)
        return LM_OK;
    if (!up->cached || up->version != e->version)
        return lm_err_set(err, LM_INTERNAL, "prefix cache: block %d lost its parent %d", b,
                          e->parent);
    if (!e->idle && up->idle)
        return lm_err_set(err, LM_INTERNAL, "prefix cache: block %d is held, its parent %d is "
                                            "idle", b, e->parent);
    if (up->hits < e->hits || (up->idle && up->idle_since.tick < e->idle_since.tick))
        return lm_err_set(err, LM_INTERNAL, "prefix cache: block %d would outlive its parent %d", b,
                          e->parent);
    return LM_OK;
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
        lm_status st = e->cached ? check_parent(p, b, err) : LM_OK;
        if (st != LM_OK)
            return st;
    }
    if (cached != p->n_cached || idle != p->n_idle)
        return lm_err_set(err, LM_INTERNAL, "prefix cache: %d cached and %d idle blocks, the book "
                                            "says %d and %d", cached, idle, p->n_cached, p->n_idle);
    return LM_OK;
}
