/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sched.h - what the next step computes: a plan, made by a pure function of const state.
 *
 * Continuous batching with chunked prefill: one step mixes a token of every decoding sequence with
 * chunks of prompts, up to max_step_tokens. sched_plan() reads the state and writes only the plan;
 * apply.c applies it. So the policy is tested without a device, and can later be planned while the
 * device is busy with the step before.
 *
 * Rank: priority (higher first), then arrival, then choice. Both lists are kept in rank order.
 */
#ifndef LORAMILL_ENGINE_SCHED_H
#define LORAMILL_ENGINE_SCHED_H

#include "engine/adapters.h"
#include "engine/prefix.h"
#include "engine/queue.h"

/* A waiting sequence that was overtaken this often is overtaken no more: until it is admitted,
 * nobody behind it is. A thousand short requests may slip by a long one; a starving one waits for
 * what runs and for nothing else. */
#define SCHED_MAX_BYPASS 1000

/* Waiting sequences looked at in one plan: the cost of planning stays bounded however long the
 * queue is, and this many cover any batch and its prefetches. */
#define SCHED_LOOKAHEAD 512

/* Of them, how many have their adapters loaded while the batch itself is full. */
#define SCHED_PREFETCH 32

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
    struct seq_list running, waiting;
    const struct prefix *prefix;
    int reclaimable;            /* free blocks, and blocks of idle adapters and prefixes */
    int block_tokens, max_seqs, max_step_tokens;
    int64_t lora_rows;          /* workspace: bounds the sum of n_tok * rank_max */
};

struct plan_item {
    struct seq *seq;
    int n_tok;                  /* next n_tok positions after seq->n_computed */
};

struct plan {
    struct plan_item *item;     /* [max_seqs], decodes first */
    struct seq **preempt;       /* [max_seqs] back to waiting, blocks freed */
    struct seq **admit;         /* [max_seqs] to running; an item may follow */
    struct seq **overtaken;     /* [SCHED_LOOKAHEAD] waiting ones that a later one passed */
    struct engine_adapter **load;       /* [SCHED_LOOKAHEAD] uploads to start */
    struct engine_adapter **charged;    /* [SCHED_LOOKAHEAD] idle or loaded ones it relies on */
    int n_items, n_preempt, n_admit, n_overtaken, n_load, n_charged;
    int n_tok;
    int n_unready;              /* waiting ones looked at whose adapter is not in blocks */

    /* scratch of sched_plan() */
    int budget, tokens;         /* blocks and tokens left */
    int64_t lora_rows;          /* workspace left */
    int cap_seqs;
};

lm_status plan_init(struct plan *p, int max_seqs, struct lm_err *err);
void plan_release(struct plan *p);

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
