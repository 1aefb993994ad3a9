/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sched.c - three passes, each in rank order, over one budget of blocks and one of tokens.
 *
 *  1. Decodes. A sequence whose next token needs a new block and finds none takes it from the last
 *     in rank (youngest, lowest priority): that one is preempted, and recomputes later. The first
 *     in rank never yields, so something always advances.
 *  2. Prefills under way: the next chunk each, while tokens last. Their blocks were taken when they
 *     were admitted.
 *  3. Admission, unless something was preempted: whoever fits, with all blocks of its prompt and a
 *     reserve for those that decode. Who does not fit, or whose adapter is still on its way, is
 *     passed over and blocks nobody, until it was overtaken SCHED_MAX_BYPASS times. A wanted
 *     adapter that is not resident is loaded if it and its sequence fit, and both are charged, so
 *     that the room is still there when the upload has passed.
 *
 * Why every admitted request ends: engine_submit() let in only what fits an empty pool. The first
 * in rank is never preempted while another could be; when it runs alone, all other blocks are
 * reclaimable.
 *
 * Block arithmetic is pessimistic where sharing makes it inexact (a block held by two victims
 * counts for neither), so a plan can always be applied.
 */
#include "engine/sched.h"

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

/* ---- plan ------------------------------------------------------------------------------ */

lm_status plan_init(struct plan *p, int max_seqs, struct lm_err *err)
{
    size_t n = (size_t)max_seqs;
    *p = (struct plan){ .cap_seqs = max_seqs };
    p->item = lm_calloc(n, sizeof *p->item);
    p->preempt = lm_calloc(n, sizeof *p->preempt);
    p->admit = lm_calloc(n, sizeof *p->admit);
    p->overtaken = lm_calloc(SCHED_LOOKAHEAD, sizeof *p->overtaken);
    p->load = lm_calloc(SCHED_LOOKAHEAD, sizeof *p->load);
    p->charged = lm_calloc(SCHED_LOOKAHEAD, sizeof *p->charged);
    if (p->item && p->preempt && p->admit && p->overtaken && p->load && p->charged)
        return LM_OK;
    plan_release(p);
    return lm_err_set(err, LM_NOMEM, "no memory for plans of %d sequences", max_seqs);
}

void plan_release(struct plan *p)
{
    free(p->item);
    free(p->preempt);
    free(p->admit);
    free(p->overtaken);
    free(p->load);
    free(p->charged);
    *p = (struct plan){ 0 };
}

static void add_item(struct plan *p, struct seq *s, int n_tok)
{
    p->item[p->n_items++] = (struct plan_item){ s, n_tok };
    p->n_tok += n_tok;
    p->tokens -= n_tok;
    if (s->req->adapter)
        p->lora_rows -= (int64_t)n_tok * s->req->adapter->image.rank_max;
}

/* How many of `n` tokens the step still takes. */
static int fit_tokens(const struct plan *p, const struct seq *s, int n)
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

/* Preempts from the end of the list until `need` blocks are there or only [0, keep) is left.
 * Returns the new end. */
static int preempt_for(const struct sched_view *v, struct plan *p, int need, int keep, int end)
{
    while (p->budget < need && end > keep) {
        struct seq *victim = v->running.at[--end];
        p->budget += blocks_freed_by(v, victim);
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
        if (!is_decode(s) || s->resuming || seq_is_ending(s) || fit_tokens(p, s, 1) == 0)
            continue;
        int need = blocks_for(seq_length(s), v->block_tokens) - s->n_blocks;
        if (need > p->budget)
            end = preempt_for(v, p, need, i + 1, end);
        if (need > p->budget) {
            /* Everyone behind has gone. The last in rank goes too; the first waits a step, as
             * what the others held becomes exact only when this plan is applied. */
            if (i > 0)
                end = preempt_for(v, p, need, i, end);
            break;
        }
        p->budget -= LM_MAX(need, 0);
        add_item(p, s, 1);
    }
    return end;
}

/* ---- 2: prefills under way ------------------------------------------------------------- */

static void plan_prefills(const struct sched_view *v, struct plan *p, int end)
{
    for (int i = 0; i < end && p->tokens > 0; i++) {
        struct seq *s = v->running.at[i];
        int n = is_decode(s) || s->resuming ? 0 : fit_tokens(p, s, s->n_tokens - s->n_computed);
        if (n > 0)
            add_item(p, s, n);
    }
}

/* ---- 3: admission ---------------------------------------------------------------------- */

static bool is_charged(const struct plan *p, const struct engine_adapter *a)
{
    for (int i = 0; i < p->n_charged; i++)
        if (p->charged[i] == a)
            return true;
    return false;
}

/* Blocks that relying on this adapter takes out of the budget: an idle one is no longer
 * reclaimable, one in host memory needs its own. */
static int adapter_cost(const struct plan *p, const struct engine_adapter *a)
{
    if (!a || a->res.state == RES_LOADING || a->res.users > 0 || is_charged(p, a))
        return 0;
    return a->n_blocks;
}

static void charge(struct plan *p, struct engine_adapter *a, int cost, int blocks)
{
    p->budget -= cost + blocks;
    if (cost > 0)
        p->charged[p->n_charged++] = a;
}

/* Blocks that admitting `s` takes out of the budget, given what the prefix cache has: matched
 * blocks are not taken, but the idle ones among them are no longer reclaimable. */
static int admission_blocks(const struct sched_view *v, const struct plan *p, const struct seq *s,
                            int cost, int reserve)
{
    int need = blocks_for(s->n_tokens, v->block_tokens);
    if (need + cost + reserve <= p->budget)
        return need;            /* fits even without: no need to look */
    int idle, max = seq_cacheable_blocks(s, v->block_tokens);
    int hit = prefix_match(v->prefix, seq_version(s), seq_tokens(s), max, &idle);
    return need - hit + idle;
}

/* Choices after the first wait for its prompt, which they then find in the prefix cache. */
static bool waits_for_leader(const struct seq *s)
{
    const struct seq *leader = &s->req->seqs[0];
    return s->index > 0 && leader->state != SEQ_DONE && leader->n_computed < s->n_prompt &&
           s->n_tokens == s->n_prompt;
}

/* Room that admission leaves to those that run: half a block each, which lasts them half a block's
 * tokens before anyone must be preempted. None when nothing runs, so that whatever fits an empty
 * pool is admitted to one. */
static int decode_reserve(const struct plan *p, int n_running)
{
    return LM_DIV_UP(n_running + p->n_admit, 2);
}

enum verdict { ADMIT, PASS, NO_ROOM };

static enum verdict consider(const struct sched_view *v, struct plan *p, struct seq *s,
                             int n_running)
{
    struct engine_adapter *a = s->req->adapter;
    p->n_unready += a && a->res.state != RES_RESIDENT;
    if (waits_for_leader(s) || (a && a->res.state == RES_LOADING))
        return PASS;
    int cost = adapter_cost(p, a);
    int reserve = decode_reserve(p, n_running);
    int blocks = admission_blocks(v, p, s, cost, reserve);
    if (blocks + cost + reserve > p->budget)
        return NO_ROOM;
    charge(p, a, cost, blocks);
    if (!a || a->res.state == RES_RESIDENT)
        return ADMIT;
    if (cost > 0)
        p->load[p->n_load++] = a;
    return PASS;
}

static void plan_admissions(const struct sched_view *v, struct plan *p, int n_running)
{
    int looked = LM_MIN(v->waiting.n, SCHED_LOOKAHEAD), passed = 0, ahead = 0;
    for (int i = 0; i < looked; i++) {
        struct seq *s = v->waiting.at[i];
        /* The batch is full: those next in line get their adapters meanwhile. */
        bool full = n_running + p->n_admit >= v->max_seqs || p->tokens == 0;
        if (full && ahead++ == SCHED_PREFETCH)
            break;
        enum verdict verdict = consider(v, p, s, n_running);
        if (verdict == ADMIT && !full) {
            p->admit[p->n_admit++] = s;
            p->n_overtaken = passed;
            int n = fit_tokens(p, s, s->n_tokens);
            if (n > 0 && !s->n_swapped)         /* its KV must come back first */
                add_item(p, s, n);
        } else if (verdict == NO_ROOM) {
            if (full || s->bypassed >= SCHED_MAX_BYPASS)
                break;
            p->overtaken[passed++] = s;
        }
    }
}

void sched_plan(const struct sched_view *v, struct plan *p)
{
    p->n_items = p->n_preempt = p->n_admit = p->n_overtaken = p->n_load = p->n_tok = 0;
    p->n_charged = p->n_unready = 0;
    p->budget = v->reclaimable;
    p->tokens = v->max_step_tokens;
    p->lora_rows = v->lora_rows;
    int end = plan_decodes(v, p);
    plan_prefills(v, p, end);
    if (p->n_preempt == 0)
        plan_admissions(v, p, end);
}
