/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sched.c - three passes over one budget of blocks, one of tokens and one of LoRA workspace.
 *
 *  1. Decodes, in rank order. A sequence whose next token needs a new block and finds none takes it
 *     from the last in rank (youngest, lowest priority): that one is preempted, and is computed
 *     again later, or copied to host memory and back, whichever costs less. The first in rank never
 *     yields, so something always advances.
 *  2. Prefills under way: the next chunk each, while tokens last. Their blocks were taken when they
 *     were admitted.
 *  3. Admission (sched_admit.c), unless something was preempted.
 *
 * Why every admitted request ends: engine_submit() let in only what fits an empty pool. The first
 * in rank is never preempted while another could be; when it runs alone, all other blocks are
 * reclaimable.
 *
 * Block arithmetic is pessimistic where sharing makes it inexact (a block held by two victims
 * counts for neither), so a plan can always be applied.
 */
#include "engine/sched_int.h"

#include <stdlib.h>
#include <string.h>

/* ---- lists in rank order --------------------------------------------------------------- */

lm_status seq_list_reserve(struct seq_list *l, int n)
{
    if (n <= l->cap)
        return LM_OK;
    int cap = LM_MAX(n, l->cap * 2);
    void *p = lm_reallocarray(l->at, (size_t)cap, sizeof *l->at);
    if (!p)
        return LM_NOMEM;
    l->at = p;
    l->cap = cap;
    return LM_OK;
}

/* First index whose sequence does not go before `s`. */
static int list_position(const struct seq_list *l, const struct seq *s)
{
    int lo = 0, hi = l->n;
    while (lo < hi) {
        int mid = lo + (hi - lo) / 2;
        if (seq_before(l->at[mid], s))
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

void seq_list_insert(struct seq_list *l, struct seq *s, int n)
{
    int i = list_position(l, s);
    memmove(l->at + i + n, l->at + i, (size_t)(l->n - i) * sizeof *l->at);
    for (int k = 0; k < n; k++)
        l->at[i + k] = &s[k];
    l->n += n;
}

void seq_list_remove(struct seq_list *l, const struct seq *s)
{
    int i = list_position(l, s);
    if (i == l->n || l->at[i] != s)
        return;
    memmove(l->at + i, l->at + i + 1, (size_t)(l->n - i - 1) * sizeof *l->at);
    l->n--;
}

void seq_list_release(struct seq_list *l)
{
    free(l->at);
    *l = (struct seq_list){ 0 };
}

/* ---- tables ---------------------------------------------------------------------------- */

static bool known_init(struct known_table *t, size_t n)
{
    size_t cap = 64;
    while (cap < 2 * n)
        cap *= 2;
    t->at = lm_calloc(cap, sizeof *t->at);
    t->mask = (uint32_t)cap - 1;
    t->stamp = 0;
    return t->at != NULL;
}

/* A stamp of 0 is nobody's; when they run out, the table is emptied by hand. */
static void known_clear(struct known_table *t)
{
    if (++t->stamp == 0) {
        memset(t->at, 0, ((size_t)t->mask + 1) * sizeof *t->at);
        t->stamp = 1;
    }
}

static struct known *known_place(const struct known_table *t, const void *key)
{
    uint64_t h = (uint64_t)(uintptr_t)key * 0x9e3779b97f4a7c15u;
    uint32_t i = (uint32_t)(h >> 32) & t->mask;
    while (t->at[i].stamp == t->stamp && t->at[i].key != key)
        i = (i + 1) & t->mask;
    return &t->at[i];
}

struct known *known_find(const struct known_table *t, const void *key)
{
    struct known *k = known_place(t, key);
    return k->stamp == t->stamp ? k : NULL;
}

struct known *known_get(struct known_table *t, const void *key)
{
    struct known *k = known_place(t, key);
    if (k->stamp != t->stamp)
        *k = (struct known){ .key = key, .stamp = t->stamp };
    return k;
}

/* ---- plan ------------------------------------------------------------------------------ */

static void scratch_free(struct sched_scratch *x)
{
    if (!x)
        return;
    free(x->seqs.at);
    free(x->adapters.at);
    free(x->turn);
    free(x->order);
    free(x->lane);
    free(x);
}

/* A plan looks at 2 * SCHED_LOOKAHEAD waiting sequences at most, and their siblings when they
 * expire; adapters are theirs and those of the running. */
static struct sched_scratch *scratch_new(size_t max_seqs)
{
    struct sched_scratch *x = lm_calloc(1, sizeof *x);
    if (!x)
        return NULL;
    x->cap_lanes = (int)max_seqs + 2 * SCHED_LOOKAHEAD;
    x->turn = lm_calloc(MAX_READS, sizeof *x->turn);
    x->order = lm_calloc(SCHED_LOOKAHEAD, sizeof *x->order);
    x->lane = lm_calloc((size_t)x->cap_lanes, sizeof *x->lane);
    if (x->turn && x->order && x->lane && known_init(&x->seqs, 4 * SCHED_LOOKAHEAD) &&
        known_init(&x->adapters, max_seqs + 4 * SCHED_LOOKAHEAD))
        return x;
    scratch_free(x);
    return NULL;
}

lm_status plan_init(struct plan *p, int max_seqs, struct lm_err *err)
{
    size_t n = (size_t)max_seqs;
    *p = (struct plan){ 0 };
    p->item = lm_calloc(n, sizeof *p->item);
    p->preempt = lm_calloc(n, sizeof *p->preempt);
    p->swap = lm_calloc(n, sizeof *p->swap);
    p->admit = lm_calloc(n, sizeof *p->admit);
    p->expire = lm_calloc(SCHED_LOOKAHEAD, sizeof *p->expire);
    p->passed = lm_calloc(SCHED_LOOKAHEAD, sizeof *p->passed);
    p->load = lm_calloc(2 * SCHED_LOOKAHEAD, sizeof *p->load);
    p->charged = lm_calloc(2 * SCHED_LOOKAHEAD, sizeof *p->charged);
    p->scratch = scratch_new(n);
    if (p->item && p->preempt && p->swap && p->admit && p->expire && p->passed && p->load &&
        p->charged && p->scratch)
        return LM_OK;
    plan_release(p);
    return lm_err_set(err, LM_NOMEM, "no memory for plans of %d sequences", max_seqs);
}

void plan_release(struct plan *p)
{
    free(p->item);
    free(p->preempt);
    free(p->swap);
    free(p->admit);
    free(p->expire);
    free(p->passed);
    free(p->load);
    free(p->charged);
    scratch_free(p->scratch);
    *p = (struct plan){ 0 };
}

void plan_add_item(struct plan *p, struct seq *s, int n_tok)
{
    p->item[p->n_items++] = (struct plan_item){ s, n_tok };
    p->n_tok += n_tok;
    p->tokens -= n_tok;
    if (s->req->adapter)
        p->lora_rows -= (int64_t)n_tok * s->req->adapter->image.rank_max;
}

int plan_fit_tokens(const struct plan *p, const struct seq *s, int n)
{
    const struct engine_adapter *a = s->req->adapter;
    if (a && a->image.rank_max > 0)
        n = (int)LM_MIN(n, p->lora_rows / a->image.rank_max);
    return LM_MIN(n, p->tokens);
}

static bool is_decode(const struct seq *s)
{
    return s->n_computed == seq_length(s) - 1 && seq_length(s) > s->n_prompt;
}

int seq_cacheable_blocks(const struct seq *s, int block_tokens)
{
    if (s->req->score_prompt && s->index == 0 && s->req->prompt_scores.n < s->n_prompt - 1)
        return 0;
    return (s->n_tokens - 1) / block_tokens;
}

struct evict_version *seq_version(const struct seq *s)
{
    return s->req->adapter ? &s->req->adapter->version : NULL;
}

/* ---- 1: decodes ------------------------------------------------------------------------ */

static int blocks_freed_by(const struct sched_view *v, const struct seq *s)
{
    int n = 0;
    for (int i = 0; i < s->n_blocks; i++)
        n += prefix_frees(v->prefix, s->blocks[i]);
    return n;
}

static int kv_room(const struct plan *p)
{
    return LM_MIN(p->budget, p->kv_budget);
}

/* By what it costs to have its KV back: those blocks computed again that nobody else keeps, or all
 * copied out and in. What is in host memory already, or needs no more steps, is not copied. */
static bool should_swap(const struct sched_view *v, const struct plan *p, const struct seq *s,
                        int freed)
{
    const struct evict_costs *cost = &v->costs;
    int n = blocks_for(s->n_computed, v->block_tokens);
    if (v->policy->preempt == ENGINE_PREEMPT_RECOMPUTE || n == 0 || n > p->swap_budget ||
        s->n_swapped || seq_is_ending(s))
        return false;
    return v->policy->preempt == ENGINE_PREEMPT_SWAP ||
           2 * (cost->copy_fixed + n * cost->copy_block) < LM_MIN(n, freed) * cost->prefill_block;
}

/* Preempts from the end of the list until `need` blocks are there or only [0, keep) is left.
 * Returns the new end. */
static int preempt_for(const struct sched_view *v, struct plan *p, int need, int keep, int end)
{
    while (kv_room(p) < need && end > keep) {
        struct seq *victim = v->running.at[--end];
        int n = blocks_freed_by(v, victim);
        bool swap = should_swap(v, p, victim, n);
        p->budget += n;
        p->kv_budget += n;
        p->swap_budget -= swap ? blocks_for(victim->n_computed, v->block_tokens) : 0;
        p->swap[p->n_preempt] = swap;
        p->preempt[p->n_preempt++] = victim;
    }
    return end;
}

/* Returns how many of the running list remain; the others were preempted. */
static int plan_decodes(const struct sched_view *v, struct plan *p)
{
    int end = v->running.n;
    for (int i = 0; i < end && p->tokens > 0; i++) {
        struct seq *s = v->running.at[i];
        if (!is_decode(s) || s->resuming || seq_is_ending(s) || plan_fit_tokens(p, s, 1) == 0)
            continue;
        int need = blocks_for(seq_length(s), v->block_tokens) - s->n_blocks;
        if (need > kv_room(p))
            end = preempt_for(v, p, need, i + 1, end);
        if (need > kv_room(p)) {
            /* Everyone behind has gone. The last in rank goes too; the first waits a step, as
             * what the others held becomes exact only when this plan is applied. */
            if (i > 0)
                end = preempt_for(v, p, need, i, end);
            break;
        }
        p->budget -= LM_MAX(need, 0);
        p->kv_budget -= LM_MAX(need, 0);
        plan_add_item(p, s, 1);
    }
    return end;
}

/* ---- 2: prefills under way ------------------------------------------------------------- */

static void plan_prefills(const struct sched_view *v, struct plan *p, int end)
{
    for (int i = 0; i < end; i++) {
        struct seq *s = v->running.at[i];
        int todo = s->n_tokens - s->n_computed;
        if (is_decode(s) || s->resuming || todo <= 0)
            continue;
        p->prefill_ahead += todo;
        int n = plan_fit_tokens(p, s, todo);
        if (n > 0)
            plan_add_item(p, s, n);
    }
}

/* ---- all ------------------------------------------------------------------------------- */

static void plan_clear(const struct sched_view *v, struct plan *p)
{
    p->n_items = p->n_preempt = p->n_admit = p->n_expire = p->n_passed = p->n_load = 0;
    p->n_charged = p->n_tok = p->n_unready = 0;
    p->budget = v->reclaimable;
    p->spare = v->spare;
    p->swap_budget = v->swap_blocks;
    p->kv_budget = v->kv_room;
    p->adapter_budget = v->adapter_room;
    p->slots = v->policy->adapter_slots > 0 ? v->policy->adapter_slots - v->n_loading
                                            : SCHED_NO_LIMIT;
    p->tokens = v->max_step_tokens;
    p->lora_rows = v->lora_rows;
    p->prefill_ahead = 0;
    known_clear(&p->scratch->seqs);
    known_clear(&p->scratch->adapters);
}

void sched_plan(const struct sched_view *v, struct plan *p)
{
    plan_clear(v, p);
    int end = plan_decodes(v, p);
    plan_prefills(v, p, end);
    if (v->queue->n == 0)
        return;
    plan_expiries(v, p);
    if (p->n_preempt == 0)
        plan_admissions(v, p, end);
}
