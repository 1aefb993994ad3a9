/* SPDX-License-Identifier: Apache-2.0 */
/*
 * evict.h - the one policy that decides what leaves the pool when room is needed.
 *
 * Idle content is registered here in queues: one for each adapter's weights, and a few for each
 * adapter version's cached prefixes, by how often they were found. prefix.c and residency.c own the
 * queues' contents and report what changes; this module keeps them in a heap by what it would cost
 * to lose their head (evict.c derives it), and so finds the next to leave in O(log versions).
 *
 * Threads: belongs to the engine thread.
 */
#ifndef LORAMILL_ENGINE_EVICT_H
#define LORAMILL_ENGINE_EVICT_H

#include "engine/pool.h"

struct prefix;
struct residency_tier;

enum evict_kind { EVICT_PREFIX, EVICT_ADAPTER, EVICT_KINDS };

/* Cached blocks by how often they were found again: never, 1 to 3 times, more often. */
#define EVICT_CLASSES 3

/* When something became idle: the policy's level then, and a tick, for those of one level. */
struct evict_age {
    double level;
    uint64_t tick;
};

/* Idle content of one kind and class of one version; the head leaves first. */
struct evict_queue {
    struct evict_age age;       /* of the head */
    double worth;               /* weights: expected uses */
    double score;               /* in the heap; the lowest leaves */
    int32_t at;                 /* place in the heap, 0: not in it, as it is empty */
    int32_t blocks;             /* pool blocks in it */
    int32_t head, tail;         /* prefix.c's list, -1 */
    uint8_t kind, cls;
    bool wanted;                /* someone waits for it */
};

/* What may leave the pool of one adapter version; part of it, or, for the base model, of
 * struct evict. */
struct evict_version {
    uint64_t serial;            /* 0: base model */
    int waiting;                /* sequences */
    int32_t n_cached;           /* blocks of the prefix cache, idle or not */
    struct evict_queue prefix[EVICT_CLASSES];
    struct evict_queue weights;
};

/* Microseconds to get back what was lost. */
struct evict_costs {
    double prefill_block;       /* compute one block's tokens again */
    double copy_block;          /* upload one block of an adapter */
    double copy_fixed;          /* of each upload, whatever its size */
};

struct evict_heap {
    struct evict_queue **at;    /* [cap + 1], from 1 */
    int n, cap;
};

struct evict {
    struct evict_heap heap[EVICT_KINDS];
    struct evict_version base;
    struct evict_age now;       /* level: score of the dearest that has left */
    double found;               /* share of cached blocks that are found at least once */
    struct evict_costs measured, used;
    double found_used;
    int32_t blocks[2];          /* idle ones: unwanted, wanted */
    int32_t cap[EVICT_KINDS];   /* split pool: blocks that KV, and adapters, may take; 0: unified */
    int slots;                  /* adapters in the pool at most, 0: any */
    int64_t rebuilds;
};

/* The pool has n_blocks; no more queues than that are ever filled. */
lm_status evict_init(struct evict *e, int32_t n_blocks, struct lm_err *err);
void evict_release(struct evict *e);
/* For measuring what a unified pool buys (struct engine_policy): splits it, limits adapters. */
void evict_limit(struct evict *e, int32_t n_blocks, int adapter_percent, int slots);
void evict_version_init(struct evict_version *v, uint64_t serial);

/* ---- reports --------------------------------------------------------------------------- */

/* The age of what becomes idle now. */
static inline struct evict_age evict_now(struct evict *e)
{
    e->now.tick++;
    return e->now;
}

/* The queue's head or size is another: its blocks, and the head's age. Empty: it leaves. */
void evict_update(struct evict *e, struct evict_queue *q, int32_t blocks, struct evict_age age);
/* So many more (or fewer) sequences wait for this version; NULL: the base model. */
void evict_waiting(struct evict *e, struct evict_version *v, int by);
/* A cached block was found for the first time, or left without ever having been. */
void evict_saw(struct evict *e, bool found);
void evict_measured_prefill(struct evict *e, double us_per_block);
/* An upload of one block, and one of n. */
void evict_measured_copy(struct evict *e, double us_one, double us_n, int n);

/* ---- choosing -------------------------------------------------------------------------- */

/* The next of this kind to leave, NULL: nothing is idle. */
static inline struct evict_queue *evict_least(const struct evict *e, enum evict_kind kind)
{
    return e->heap[kind].n > 0 ? e->heap[kind].at[1] : NULL;
}

struct evict_version *evict_version_of(struct evict_queue *q);

/* Blocks that could be free at once: free ones and idle content. */
int evict_reclaimable(const struct prefix *p, const struct residency_tier *t);
/* The same without what someone waits for: what a prefetch may take. */
int evict_spare(const struct prefix *p, const struct residency_tier *t);

/* Evicts until `n` blocks are free. LM_BUSY when nothing idle is left before that. */
lm_status evict_until(struct prefix *p, struct residency_tier *t, int n);
/* The same for KV blocks (EVICT_PREFIX) or an adapter of `n` blocks, within the limits of a split
 * pool. */
lm_status evict_for(struct prefix *p, struct residency_tier *t, enum evict_kind kind, int n);
/* The largest `n` that evict_for() would find; 0 for adapters when all slots are in use. */
int evict_room(const struct prefix *p, const struct residency_tier *t, enum evict_kind kind);
/* Evicts one item of this kind; false when none is idle. */
bool evict_kind(struct prefix *p, struct residency_tier *t, enum evict_kind kind);

/* Each heap is one, and what is counted is in it: LM_INTERNAL names what is broken. */
lm_status evict_check(const struct evict *e, struct lm_err *err);

#endif
