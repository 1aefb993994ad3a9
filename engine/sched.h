/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sched.h - what the next step computes: a plan, made by a pure function of const state.
 *
 * Continuous batching with chunked prefill: one step mixes a token of every decoding sequence with
 * chunks of prompts, up to max_step_tokens. sched_plan() reads the state and writes only the plan;
 * apply.c applies it. So the policy is tested without a device, and plans are made while the device
 * is busy with the step before: on projected state, where what was launched counts as computed and
 * a token under way as there (seq_length()).
 *
 * Rank: priority (higher first), then arrival, then choice. The running list is kept in it.
 *
 * Threads: belongs to the engine thread.
 */
#ifndef LORAMILL_ENGINE_SCHED_H
#define LORAMILL_ENGINE_SCHED_H

#include "engine/adapters.h"
#include "engine/estimate.h"
#include "engine/prefix.h"
#include "engine/queue.h"

/* Waiting sequences looked at in one plan: the cost of planning stays bounded however long the
 * queue is, and this many cover any batch and its prefetches. */
#define SCHED_LOOKAHEAD 512

/* Of those next in line, how many have their adapters loaded while the batch itself is full. */
#define SCHED_PREFETCH 64

/* One admission in so many goes to who has waited longer than max_wait_ms, whatever its rank. */
#define SCHED_AGED_SHARE 4

/* Grouping and fairness: a tenant may be served before its turn, because its adapter is in the
 * batch, until its counter is so many full steps' tokens above the least. */
#define SCHED_FAIR_STEPS 8

/* More than any pool, and far from overflow. */
#define SCHED_NO_LIMIT (1 << 30)

struct seq_list {               /* in rank order */
    struct seq **at;
    int n, cap;
};

lm_status seq_list_reserve(struct seq_list *l, int n);
/* Room must be reserved. The `n` sequences are neighbours in rank, as one request's choices are. */
void seq_list_insert(struct seq_list *l, struct seq *s, int n);
void seq_list_remove(struct seq_list *l, const struct seq *s);
void seq_list_release(struct seq_list *l);

struct sched_view {
    struct seq_list running;
    const struct queue *queue;
    const struct prefix *prefix;
    const struct estimate *estimate;
    const struct engine_policy *policy;
    struct evict_costs costs;   /* of a block: to compute it, to copy it */
    int reclaimable;            /* free blocks, and blocks of idle adapters and prefixes */
    int spare;                  /* the same without what someone waits for */
    int kv_room, adapter_room;  /* what either may take: in a split pool its half */
    int n_loading;              /* adapters on their way */
    int swap_blocks;            /* host memory for the KV of so many blocks */
    int block_tokens, max_seqs, max_step_tokens;
    int64_t lora_rows;          /* workspace: bounds the sum of n_tok * rank_max */
    int64_t now_us, now_ms;     /* the engine's clock, and the one that deadlines are held to */
};

struct plan_item {
    struct seq *seq;
    int n_tok;                  /* next n_tok positions after seq->n_computed */
};

struct plan_passed {            /* so many later ones are admitted before it */
    struct seq *seq;
    int by;
};

struct sched_scratch;

struct plan {
    struct plan_item *item;     /* [max_seqs], decodes first */
    struct seq **preempt;       /* [max_seqs] back to waiting, blocks freed */
    bool *swap;                 /* [max_seqs] of those: its KV is copied to host memory before */
    struct seq **admit;         /* [max_seqs] to running; an item may follow, but for those whose
                                 * KV must come back from host memory first */
    struct seq **expire;        /* [SCHED_LOOKAHEAD] can't be in time any more; none has siblings
                                 * that run */
    struct plan_passed *passed; /* [SCHED_LOOKAHEAD] */
    struct engine_adapter **load;       /* [SCHED_LOOKAHEAD] uploads to start */
    struct engine_adapter **charged;    /* [..] idle or loaded ones it relies on */
    int n_items, n_preempt, n_admit, n_expire, n_passed, n_load, n_charged;
    int n_tok;
    int n_unready;              /* waiting ones looked at whose adapter is not in blocks */

    /* scratch of sched_plan() */
    int budget, kv_budget, adapter_budget, slots;       /* blocks, adapters that still fit */
    int spare, swap_budget;     /* blocks that prefetches, and swaps, may take */
    int tokens;                 /* tokens left */
    int64_t lora_rows;          /* workspace left */
    int64_t prefill_ahead;      /* prompt tokens of those that run, not yet computed */
    struct sched_scratch *scratch;
};

lm_status plan_init(struct plan *p, int max_seqs, struct lm_err *err);
void plan_release(struct plan *p);

/* Nothing to carry out. */
static inline bool plan_is_empty(const struct plan *p)
{
    return p->n_items + p->n_preempt + p->n_admit + p->n_expire + p->n_load == 0;
}

/* Never fails, never allocates. */
void sched_plan(const struct sched_view *v, struct plan *p);

static inline int blocks_for(int n_tokens, int block_tokens)
{
    return LM_DIV_UP(n_tokens, block_tokens);
}

/* Leading full blocks that may come from the prefix cache: at least one token is computed, since
 * its logits are wanted; and all of them when the prompt is scored. */
int seq_cacheable_blocks(const struct seq *s, int block_tokens);
/* NULL: the base model. */
struct evict_version *seq_version(const struct seq *s);

#endif
