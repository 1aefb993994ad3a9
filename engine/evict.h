/* SPDX-License-Identifier: Apache-2.0 */
/*
 * evict.h - the one policy that decides what leaves the pool when room is needed.
 */
#ifndef LORAMILL_ENGINE_EVICT_H
#define LORAMILL_ENGINE_EVICT_H

#include "engine/prefix.h"
#include "engine/residency.h"

/* Blocks that could be free at once: free ones and those of idle adapters and cached prefixes. */
static inline int evict_reclaimable(const struct prefix *p, const struct residency_tier *t)
{
    return p->pool->n_free + p->n_idle + t->idle_blocks;
}

/* Evicts until `n` blocks are free. LM_BUSY when nothing idle is left before that. */
lm_status evict_until(struct prefix *p, struct residency_tier *t, int n);

#endif
