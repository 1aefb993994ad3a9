/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool.c - a stack of free ids and a reference count for each block.
 *
 * Invariants, which pool_check() verifies:
 *  1. free_ids[0 .. n_free) are distinct ids in [0, n_blocks), each with refs 0 and owner FREE.
 *  2. Every other id has refs >= 1 and an owner that is not FREE.
 *  3. count[o] is the number of blocks of owner o; they sum to n_blocks; count[FREE] = n_free.
 *
 * A stack, not a queue: the block freed last is the one whose lines are likeliest still in a cache,
 * and both ends of the operation are one store. Nothing here allocates after pool_init().
 */
#include "engine/pool.h"

#include <assert.h>
#include <stdlib.h>

lm_status pool_init(struct pool *p, int32_t n_blocks, struct lm_err *err)
{
    *p = (struct pool){ .n_blocks = n_blocks, .n_free = n_blocks };
    if (n_blocks < 1)
        return lm_err_set(err, LM_INVALID, "pool: %d blocks; at least one is needed", n_blocks);
    p->free_ids = lm_reallocarray(NULL, (size_t)n_blocks, sizeof *p->free_ids);
    p->refs = lm_calloc((size_t)n_blocks, sizeof *p->refs);
    p->owner = lm_calloc((size_t)n_blocks, sizeof *p->owner);
    if (!p->free_ids || !p->refs || !p->owner) {
        pool_release(p);
        return lm_err_set(err, LM_NOMEM, "pool: no memory for the book of %d blocks", n_blocks);
    }
    for (int32_t i = 0; i < n_blocks; i++)
        p->free_ids[i] = n_blocks - 1 - i;      /* so that low ids go first */
    p->count[POOL_FREE] = n_blocks;
    return LM_OK;
}

void pool_release(struct pool *p)
{
    free(p->free_ids);
    free(p->refs);
    free(p->owner);
    *p = (struct pool){ 0 };
}

lm_status pool_take(struct pool *p, enum pool_owner owner, int32_t n, int32_t *ids)
{
    assert(owner != POOL_FREE && n >= 0);
    if (n > p->n_free)
        return LM_BUSY;
    for (int32_t i = 0; i < n; i++) {
        int32_t id = p->free_ids[--p->n_free];
        p->refs[id] = 1;
        p->owner[id] = (uint8_t)owner;
        ids[i] = id;
    }
    p->count[POOL_FREE] -= n;
    p->count[owner] += n;
    return LM_OK;
}

void pool_ref(struct pool *p, int32_t id)
{
    assert(id >= 0 && id < p->n_blocks && p->refs[id] > 0);
    p->refs[id]++;
}

bool pool_unref(struct pool *p, int32_t id)
{
    assert(id >= 0 && id < p->n_blocks && p->refs[id] > 0);
    if (--p->refs[id] > 0)
        return false;
    p->count[p->owner[id]]--;
    p->count[POOL_FREE]++;
    p->owner[id] = POOL_FREE;
    p->free_ids[p->n_free++] = id;
    return true;
}

lm_status pool_check(const struct pool *p, struct lm_err *err)
{
    int32_t count[POOL_OWNERS] = { 0 };
    for (int32_t id = 0; id < p->n_blocks; id++) {
        if (p->owner[id] >= POOL_OWNERS)
            return lm_err_set(err, LM_INTERNAL, "pool: block %d has owner %d", id, p->owner[id]);
        if ((p->owner[id] == POOL_FREE) != (p->refs[id] == 0) || p->refs[id] < 0)
            return lm_err_set(err, LM_INTERNAL, "pool: block %d, owner %d, has %d references", id,
                              p->owner[id], p->refs[id]);
        count[p->owner[id]]++;
    }
    for (int o = 0; o < POOL_OWNERS; o++)
        if (count[o] != p->count[o])
            return lm_err_set(err, LM_INTERNAL, "pool: owner %d has %d blocks, the book says %d", o,
                              count[o], p->count[o]);
    if (p->n_free != count[POOL_FREE])
        return lm_err_set(err, LM_INTERNAL, "pool: %d blocks on the free list, %d are free",
                          p->n_free, count[POOL_FREE]);
    uint8_t *seen = lm_calloc((size_t)p->n_blocks, 1);
    if (!seen)
        return lm_err_set(err, LM_NOMEM, "pool: no memory to check itself");
    lm_status st = LM_OK;
    for (int32_t i = 0; i < p->n_free && st == LM_OK; i++) {
        int32_t id = p->free_ids[i];
        if (id < 0 || id >= p->n_blocks || p->owner[id] != POOL_FREE || seen[id]++)
            st = lm_err_set(err, LM_INTERNAL, "pool: free list entry %d names block %d wrongly", i,
                            id);
    }
    free(seen);
    return st;
}
