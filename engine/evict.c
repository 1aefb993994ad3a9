/* SPDX-License-Identifier: Apache-2.0 */
/*
 * evict.c - least recently used first, over both kinds of idle content.
 *
 * What is idle costs nothing until someone needs its blocks, so nothing leaves early. Adapters and
 * cached prefixes age on one clock (steps). On a tie the prefix goes: it frees one block at the
 * cost of 16 tokens' prefill at most, an adapter frees many at the cost of a copy.
 */
#include "engine/evict.h"

static bool evict_one(struct prefix *p, struct residency_tier *t)
{
    bool has_prefix = p->idle_head >= 0, has_adapter = t->idle.head != NULL;
    if (has_prefix && has_adapter &&
        t->idle.head->res.idle_since < p->entry[p->idle_head].idle_since)
        return residency_evict(t);
    return has_prefix ? prefix_evict(p) : residency_evict(t);
}

lm_status evict_until(struct prefix *p, struct residency_tier *t, int n)
{
    while (p->pool->n_free < n)
        if (!evict_one(p, t))
            return LM_BUSY;
    return LM_OK;
}
