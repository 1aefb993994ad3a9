/* SPDX-License-Identifier: Apache-2.0 */
/*
 * apply.c - a plan becomes true: the only place where blocks change hands.
 *
 * Order: preempt (swapping KV out), pin, grow, bring swapped KV back, load. Adapters and prefixes
 * that the plan relies on are pinned before anything is evicted, so that making room can't take
 * them away.
 *
 * No memory for an upload's bookkeeping ends the requests that wait for it; what goes wrong with a
 * device or with the books is for the caller to act on.
 *
 * Threads: the engine thread.
 */
#include "engine/core_int.h"

static lm_status preempt(struct core *c, struct seq *s, bool swap)
{
    lm_status st = LM_OK;
    if (swap) {
        st = swap_out(&c->swap, s, c->p.block_tokens, c->tier.step_done, c->stream);
        COUNT(c, swap_outs, 1);
    }
    finish_leave_running(c, s);
    finish_enter_waiting(c, s);
    s->req->preemptions++;
    COUNT(c, preemptions, 1);
    return st;
}

/* It is served: what its tenant, and those who estimate, should know. */
static void note_admission(struct core *c, struct seq *s)
{
    int64_t now = core_now_us(c), most = c->p.policy.max_wait_ms * 1000;
    queue_admitted(&c->queue, most > 0 && now - s->queued.since_us > most);
    if (s->queued.deadline_ms)
        estimate_left(&c->estimate, false, now);
    if (request_deadline(s->req))
        c->next_deadline_ms = LM_MIN(c->next_deadline_ms, request_deadline(s->req));
    if (!s->queued.charged)
        queue_charge(&c->queue, s->req, (uint64_t)s->n_prompt);
    s->queued.charged = true;
}

/* Of its adapter's last upload, what fell into the request's life. */
static int64_t upload_waited_for(const struct request *r)
{
    if (!r->adapter)
        return 0;
    const struct residency *res = &r->adapter->res;
    return LM_MAX(res->ready_us - LM_MAX(res->load_us, r->submit_us), 0);
}

/* Takes the sequence's references before anything is evicted. */
static void pin(struct core *c, struct seq *s)
{
    struct request *r = s->req;
    int max = seq_cacheable_blocks(s, c->p.block_tokens);
    note_admission(c, s);
    finish_leave_waiting(c, s);
    s->state = SEQ_RUNNING;
    seq_list_insert(&c->running, s, 1);
    s->n_blocks = prefix_acquire(&c->prefix, seq_version(s), s->tokens, max, s->blocks);
    s->n_hashed = s->n_blocks;
    s->prefix_tail = s->n_blocks ? s->blocks[s->n_blocks - 1] : -1;
    s->n_computed = s->n_blocks * c->p.block_tokens;
    COUNT(c, prefix_hit_tokens, LM_MIN(s->n_computed, s->n_prompt));
    if (!r->admit_us) {
        r->admit_us = core_now_us(c);
        r->cached_tokens = s->n_computed;
        r->adapter_wait_us = upload_waited_for(r);
    }
    if (r->adapter) {
        COUNT(c, adapter_hits, r->submit_us >= r->adapter->res.ready_us);
        residency_use(&c->tier, r->adapter);
    }
}

static lm_status grow(struct core *c, struct seq *s, int n_tokens, struct lm_err *err)
{
    int need = blocks_for(n_tokens, c->p.block_tokens) - s->n_blocks;
    if (need <= 0)
        return LM_OK;
    lm_status st = evict_for(&c->prefix, &c->tier, EVICT_PREFIX, need);
    if (st == LM_OK)
        st = pool_take(&c->pool, POOL_KV, need, s->blocks + s->n_blocks);
    if (st != LM_OK)
        return lm_err_set(err, LM_INTERNAL, "request '%s' was planned into %d blocks; %d are free",
                          s->req->id, need, c->pool.n_free);
    s->n_blocks += need;
    return LM_OK;
}

/* An admitted one's KV comes back from host memory, as far as the prefix cache had not got it. */
static lm_status bring_back(struct core *c, struct seq *s)
{
    if (s->swapped_tokens <= s->n_computed) {
        swap_forget(&c->swap, s);
        return LM_OK;
    }
    s->n_computed = s->swapped_tokens;
    COUNT(c, swap_ins, 1);
    return swap_in(&c->swap, s, s->n_hashed, c->tier.step_done);
}

static lm_status load_adapter(struct core *c, struct engine_adapter *a, struct lm_err *err)
{
    lm_status st = LM_OK;
    if (evict_for(&c->prefix, &c->tier, EVICT_ADAPTER, a->n_blocks) != LM_OK)
        st = lm_err_set(err, LM_INTERNAL, "adapter '%s' was planned into %d blocks; %d are free",
                        a->id, a->n_blocks, c->pool.n_free);
    if (st == LM_OK)
        st = residency_load(&c->tier, a, err);
    COUNT(c, adapter_loads, st == LM_OK);
    COUNT(c, adapter_bytes, st == LM_OK ? engine_adapter_bytes(a) : 0);
    return st;
}

/* There was no memory to load it (nothing was enqueued): those who wait for it are told, the others
 * don't notice. */
static void refuse_waiters(struct core *c, const struct engine_adapter *a, const char *why)
{
    const struct tree *lane = queue_lane(&c->queue, a);
    lm_log(LM_WARN, "engine", "%s; requests for it end with this error", why);
    while (lane->n > 0)
        finish_request(c, queue_in_lane(tree_first(lane))->req, ENGINE_ERROR, LM_NOMEM, why);
}

/* Those that can't be in time any more. None of their sequences runs or is admitted. */
void apply_expire(struct core *c, const struct plan *p)
{
    for (int i = 0; i < p->n_expire; i++) {
        estimate_left(&c->estimate, true, core_now_us(c));
        finish_request(c, p->expire[i]->req, ENGINE_EXPIRED, LM_OK, "");
    }
    COUNT(c, early_aborts, p->n_expire);
}

/* False when one of them got no memory: its request has ended, and the plan is void. */
bool apply_open_admitted(struct core *c, const struct plan *p)
{
    for (int i = 0; i < p->n_admit; i++) {
        if (seq_open(p->admit[i]) != LM_OK) {
            finish_request(c, p->admit[i]->req, ENGINE_ERROR, LM_NOMEM, "no memory for a choice");
            return false;
        }
    }
    return true;
}

lm_status apply_plan(struct core *c, struct plan *p, struct lm_err *err)
{
    lm_status st = LM_OK;
    for (int i = 0; st == LM_OK && i < p->n_preempt; i++)
        st = preempt(c, p->preempt[i], p->swap[i]);
    if (st != LM_OK)
        return lm_err_set(err, st, "copying KV to host memory failed");
    for (int i = 0; i < p->n_passed; i++)
        queue_overtaken(&c->queue, p->passed[i].seq, p->passed[i].by, c->p.policy.max_overtaken);
    for (int i = 0; i < p->n_admit; i++)
        pin(c, p->admit[i]);
    for (int i = 0; i < p->n_charged; i++)
        residency_touch(&c->tier, p->charged[i]);
    for (int i = 0; st == LM_OK && i < p->n_admit; i++)
        st = grow(c, p->admit[i], p->admit[i]->n_tokens, err);
    for (int i = 0; st == LM_OK && i < p->n_admit; i++)
        if (p->admit[i]->n_swapped && bring_back(c, p->admit[i]) != LM_OK)
            st = lm_err_set(err, LM_DEVICE, "copying KV from host memory failed");
    if (st == LM_OK && swap_flush(&c->swap) != LM_OK)
        st = lm_err_set(err, LM_DEVICE, "copying KV from host memory failed");
    for (int i = 0; st == LM_OK && i < p->n_items; i++) {
        struct plan_item *it = &p->item[i];
        /* What the prefix cache had need not be computed. */
        it->n_tok = LM_MIN(it->n_tok, seq_length(it->seq) - it->seq->n_computed);
        st = grow(c, it->seq, it->seq->n_computed + it->n_tok, err);
    }
    for (int i = 0; st == LM_OK && i < p->n_load; i++) {
        st = load_adapter(c, p->load[i], err);
        if (st == LM_NOMEM) {
            refuse_waiters(c, p->load[i], err->msg);
            st = LM_OK;
        }
    }
    return st;
}
