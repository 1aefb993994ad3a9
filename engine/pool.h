/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool.h - the unified pool's book: which block is free, who owns it, how many hold it.
 *
 * A block is an id. Block b of layer l lies at base + (l * num_blocks + b) * block_bytes; this
 * module knows ids only, so it is tested without a device. KV cache and adapter weights draw from
 * the same free list (S-LoRA, arXiv 2311.03285, section 5), hence no memory is reserved for either
 * and nothing fragments: any free block serves any purpose.
 *
 * A block is born with one reference; whoever shares it (a cached prefix, a second sequence) adds
 * one; at zero it returns to the free list.
 *
 * Threads: belongs to the engine thread.
 */
#ifndef LORAMILL_ENGINE_POOL_H
#define LORAMILL_ENGINE_POOL_H

#include "kernels/base.h"

enum pool_owner { POOL_FREE, POOL_KV, POOL_ADAPTER, POOL_OWNERS };

struct pool {
    int32_t n_blocks;
    int32_t n_free;
    int32_t *free_ids;          /* [n_blocks], a stack; the first n_free are free */
    int32_t *refs;              /* [n_blocks] */
    uint8_t *owner;             /* [n_blocks], enum pool_owner */
    int32_t count[POOL_OWNERS]; /* blocks by owner */
};

lm_status pool_init(struct pool *p, int32_t n_blocks, struct lm_err *err);
void pool_release(struct pool *p);

/* Takes `n` blocks, each with one reference: all of them, or LM_BUSY and none. */
lm_status pool_take(struct pool *p, enum pool_owner owner, int32_t n, int32_t *ids);
void pool_ref(struct pool *p, int32_t id);
/* Drops one reference; true when the block became free. */
bool pool_unref(struct pool *p, int32_t id);

static inline int32_t pool_refs(const struct pool *p, int32_t id)
{
    return p->refs[id];
}

/* Checks every invariant that pool.c lists, in O(n_blocks): LM_INTERNAL names the broken one. */
lm_status pool_check(const struct pool *p, struct lm_err *err);

#endif
