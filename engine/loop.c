/* SPDX-License-Identifier: Apache-2.0 */
/*
 * loop.c - the engine thread: news, plan, apply, step, results; again.
 *
 *     mailbox_take     new requests join `waiting` in rank order
 *     sweep            cancelled and expired ones end
 *     residency_poll   uploads that have passed
 *     sched_plan       pure
 *     apply            preempt, pin, load, admit, grow: the only place where blocks change hands
 *     step             launch, wait, commit; then tokens to text, ends, events
 *
 * Between two steps nothing is locked unless there is news, and nothing is allocated unless a
 * request ends, an adapter is uploaded for the first time, or a buffer meets a new record.
 *
 * apply() pins before it evicts: adapters and prefixes that the plan relies on leave the idle lists
 * first, so that making room can't take them away.
 *
 * No memory for an upload's or a step's bookkeeping ends the requests concerned, or is waited out.
 *
 * Failure: a step or upload that fails leaves the device in an unknown state. Every live request
 * ends with ENGINE_ERROR and that status, the mailbox refuses new ones, and the thread only waits
 * to be stopped; the process should end.
 */
#include "engine/core_int.h"

#include <stdio.h>
#include <unistd.h>

/* A machine out of memory for a second is given up. */
#define STARVED_STEPS 100
#define STARVED_REST_US 10000

/* ---- ends of sequences and requests ---------------------------------------------------- */

static void release_blocks(struct core *c, struct seq *s)
{
    for (int i = s->n_blocks - 1; i >= 0; i--)
        prefix_unref(&c->prefix, s->blocks[i]);
    s->n_blocks = s->n_hashed = s->n_computed = 0;
    s->prefix_tail = -1;
}

/* RUNNING to anything else: blocks, adapter and place in the list. */
static void leave_running(struct core *c, struct seq *s)
{
    seq_list_remove(&c->running, s);
    release_blocks(c, s);
    if (s->req->adapter)
        residency_unuse(&c->tier, s->req->adapter);
}

static void leave_waiting(struct core *c, struct seq *s)
{
    seq_list_remove(&c->waiting, s);
    c->waiting_prompt_tokens -= (uint64_t)s->n_prompt;
}

static void post_stream(struct core *c, struct seq *s, bool final)
{
    const char *text;
    size_t len;
    if (!s->req->stream)
        return;
    output_stream_text(s, final, &text, &len);
    if (len > 0 && mailbox_post_text(c->mail, s, text, len) != LM_OK)
        s->text_sent -= len;    /* no memory: it comes with the next piece, or with the result */
}

static void post_result(struct core *c, struct request *r)
{
    struct engine_result *res = output_result(r, c->p.tok);
    COUNT(c, finished, res->status == LM_OK);
    COUNT(c, failed, res->status != LM_OK);
    mailbox_post_result(c->mail, r, res);
    request_free(r);
}

/* The first failure is what the result tells. */
static void note_failure(struct request *r, lm_status st, const char *why)
{
    if (st == LM_OK || r->result->status != LM_OK)
        return;
    r->result->status = st;
    snprintf(r->result->error, sizeof r->result->error, "%s", why);
}

/* Any state to DONE; the last one of a request posts its result and frees it. */
static void finish_seq(struct core *c, struct seq *s, enum engine_reason reason)
{
    struct request *r = s->req;
    if (s->state == SEQ_RUNNING)
        leave_running(c, s);
    else if (s->state == SEQ_WAITING)
        leave_waiting(c, s);
    s->state = SEQ_DONE;
    s->reason = reason;
    post_stream(c, s, true);
    if (--r->n_live == 0)
        post_result(c, r);
}

/* Ends what is left of a request before its time. */
static void end_request(struct core *c, struct request *r, enum engine_reason reason,
                        lm_status status, const char *why)
{
    int n = r->n_seqs;
    note_failure(r, status, why);
    for (int i = 0; i < n; i++) {
        struct seq *s = &r->seqs[i];
        if (s->state == SEQ_DONE)
            continue;
        bool last = r->n_live == 1;
        output_flush(s);
        finish_seq(c, s, reason);
        if (last)               /* the request is gone */
            return;
    }
}

/* ---- news ------------------------------------------------------------------------------ */

/* Ends choices that have nothing to compute: without max_tokens only the first one's prompt is
 * scored, and only if log-probabilities are wanted and there is a second token to score. */
static void end_idle_choices(struct core *c, struct request *r)
{
    int n = r->n_seqs, scored = r->score_prompt && r->prompt.n > 1;
    if (r->params.max_tokens > 0)
        return;
    for (int i = n - 1; i >= scored; i--)
        finish_seq(c, &r->seqs[i], ENGINE_LENGTH);
}

static void intake_one(struct core *c, struct request *r)
{
    if (seq_list_reserve(&c->waiting, c->waiting.n + r->n_seqs) != LM_OK) {
        note_failure(r, LM_NOMEM, "no memory to queue the request");
        for (int i = 0; i < r->n_seqs; i++) {
            r->seqs[i].state = SEQ_DONE;
            r->seqs[i].reason = ENGINE_ERROR;
        }
        post_result(c, r);
        return;
    }
    seq_list_insert(&c->waiting, r->seqs, r->n_seqs);
    c->waiting_prompt_tokens += (uint64_t)r->prompt.n * (uint64_t)r->n_seqs;
    if (r->deadline_ms)
        c->next_deadline_ms = LM_MIN(c->next_deadline_ms, r->deadline_ms);
    end_idle_choices(c, r);
}

static void intake(struct core *c, struct request *list)
{
    for (struct request *r = list, *next; r; r = next) {
        next = r->next;
        intake_one(c, r);
    }
}

/* Ends cancelled and expired requests of one list. Ending one removes sequences of it from both
 * lists, so the walk starts over at the same index. */
static void sweep_list(struct core *c, struct seq_list *l, int64_t now_ms)
{
    for (int i = 0; i < l->n;) {
        struct request *r = l->at[i]->req;
        if (mailbox_is_cancelled(c->mail, r->handle)) {
            end_request(c, r, ENGINE_CANCELLED, LM_OK, "");
            i = 0;
        } else if (r->deadline_ms && r->deadline_ms <= now_ms) {
            end_request(c, r, ENGINE_EXPIRED, LM_OK, "");
            i = 0;
        } else {
            if (r->deadline_ms)
                c->next_deadline_ms = LM_MIN(c->next_deadline_ms, r->deadline_ms);
            i++;
        }
    }
}

static void sweep(struct core *c, bool cancels)
{
    if (!cancels && c->next_deadline_ms == INT64_MAX)
        return;
    int64_t now = lm_wall_ms();
    if (!cancels && now < c->next_deadline_ms)
        return;
    c->next_deadline_ms = INT64_MAX;
    sweep_list(c, &c->running, now);
    sweep_list(c, &c->waiting, now);
}

static void drop_adapter(void *ctx, engine_adapter *a)
{
    struct core *c = ctx;
    residency_drop(&c->tier, a);
}

/* ---- apply ----------------------------------------------------------------------------- */

static void preempt(struct core *c, struct seq *s)
{
    leave_running(c, s);
    s->state = SEQ_WAITING;
    seq_list_insert(&c->waiting, s, 1);
    c->waiting_prompt_tokens += (uint64_t)s->n_prompt;
    s->req->preemptions++;
    COUNT(c, preemptions, 1);
}

/* Takes the sequence's references before anything is evicted. */
static void pin(struct core *c, struct seq *s)
{
    struct request *r = s->req;
    int max = seq_cacheable_blocks(s, c->p.block_tokens);
    leave_waiting(c, s);
    s->state = SEQ_RUNNING;
    seq_list_insert(&c->running, s, 1);
    s->n_blocks = prefix_acquire(&c->prefix, seq_version(s), s->tokens, max, s->blocks);
    s->n_hashed = s->n_blocks;
    s->prefix_tail = s->n_blocks ? s->blocks[s->n_blocks - 1] : -1;
    s->n_computed = s->n_blocks * c->p.block_tokens;
    if (r->adapter) {
        COUNT(c, adapter_hits, r->adapter_since_us == 0);
        residency_use(&c->tier, r->adapter);
    }
    if (!r->admit_us) {
        r->admit_us = lm_now_us();
        r->cached_tokens = s->n_computed;
        if (r->adapter_since_us)
            r->adapter_wait_us = r->admit_us - r->adapter_since_us;
    }
}

static lm_status grow(struct core *c, struct seq *s, int n_tokens, struct lm_err *err)
{
    int need = blocks_for(n_tokens, c->p.block_tokens) - s->n_blocks;
    if (need <= 0)
        return LM_OK;
    lm_status st = evict_until(&c->prefix, &c->tier, need);
    if (st == LM_OK)
        st = pool_take(&c->pool, POOL_KV, need, s->blocks + s->n_blocks);
    if (st != LM_OK)
        return lm_err_set(err, LM_INTERNAL, "request '%s' was planned into %d blocks; %d are free",
                          s->req->id, need, c->pool.n_free);
    s->n_blocks += need;
    return LM_OK;
}

static lm_status load_adapter(struct core *c, struct engine_adapter *a, struct lm_err *err)
{
    lm_status st = forward_reserve_rank(c->forward, a->image.rank_max, err);
    if (st == LM_OK && evict_until(&c->prefix, &c->tier, a->n_blocks) != LM_OK)
        st = lm_err_set(err, LM_INTERNAL, "adapter '%s' was planned into %d blocks; %d are free",
                        a->id, a->n_blocks, c->pool.n_free);
    if (st == LM_OK)
        st = residency_load(&c->tier, a, err);
    COUNT(c, adapter_loads, st == LM_OK);
    return st;
}

/* There was no memory to load it (nothing was enqueued): those who wait for it are told, the others
 * don't notice. */
static void refuse_waiters(struct core *c, const struct engine_adapter *a, const char *why)
{
    lm_log(LM_WARN, "engine", "%s; requests for it end with this error", why);
    for (int i = 0; i < c->waiting.n;) {
        struct request *r = c->waiting.at[i]->req;
        if (r->adapter == a) {
            end_request(c, r, ENGINE_ERROR, LM_NOMEM, why);
            i = 0;
        } else {
            i++;
        }
    }
}

/* Those who wait for weights, for their timings. Only when an upload starts. */
static void note_adapter_waits(struct core *c)
{
    int64_t now = lm_now_us();
    for (int i = 0; i < c->waiting.n; i++) {
        struct request *r = c->waiting.at[i]->req;
        if (r->adapter && r->adapter->res.state == RES_LOADING && !r->adapter_since_us)
            r->adapter_since_us = now;
    }
}

/* False when one of them got no memory: its request has ended, and the plan is void. */
static bool open_admitted(struct core *c, const struct plan *p)
{
    for (int i = 0; i < p->n_admit; i++) {
        if (seq_open(p->admit[i]) != LM_OK) {
            end_request(c, p->admit[i]->req, ENGINE_ERROR, LM_NOMEM, "no memory for a choice");
            return false;
        }
    }
    return true;
}

static lm_status apply(struct core *c, struct plan *p, struct lm_err *err)
{
    lm_status st = LM_OK;
    for (int i = 0; i < p->n_preempt; i++)
        preempt(c, p->preempt[i]);
    for (int i = 0; i < p->n_overtaken; i++)
        p->overtaken[i]->bypassed++;
    for (int i = 0; i < p->n_admit; i++)
        pin(c, p->admit[i]);
    for (int i = 0; i < p->n_charged; i++)
        residency_touch(&c->tier, p->charged[i]);
    for (int i = 0; st == LM_OK && i < p->n_admit; i++)
        st = grow(c, p->admit[i], p->admit[i]->n_tokens, err);
    for (int i = 0; st == LM_OK && i < p->n_items; i++) {
        struct plan_item *it = &p->item[i];
        /* What the prefix cache had need not be computed. */
        it->n_tok = LM_MIN(it->n_tok, it->seq->n_tokens - it->seq->n_computed);
        st = grow(c, it->seq, it->seq->n_computed + it->n_tok, err);
    }
    for (int i = 0; st == LM_OK && i < p->n_load; i++) {
        st = load_adapter(c, p->load[i], err);
        if (st == LM_NOMEM) {
            refuse_waiters(c, p->load[i], err->msg);
            st = LM_OK;
        }
    }
    if (p->n_load > 0)
        note_adapter_waits(c);
    return st;
}

/* ---- after a step ---------------------------------------------------------------------- */

/* Offers blocks that this step completed to the prefix cache. */
static void offer_blocks(struct core *c, struct seq *s)
{
    int bt = c->p.block_tokens;
    while ((s->n_hashed + 1) * bt <= s->n_computed) {
        int i = s->n_hashed++;
        s->blocks[i] = prefix_offer(&c->prefix, seq_version(s), s->prefix_tail,
                                    s->tokens + (size_t)i * (size_t)bt, s->blocks[i]);
        s->prefix_tail = s->blocks[i];
    }
}

static void commit(struct core *c, const struct plan *p)
{
    for (int i = 0; i < p->n_items; i++) {
        struct seq *s = p->item[i].seq;
        bool decode = s->n_computed >= s->n_prompt;
        COUNT(c, decode_tokens, decode ? p->item[i].n_tok : 0);
        COUNT(c, prefill_tokens, decode ? 0 : p->item[i].n_tok);
        s->n_computed += p->item[i].n_tok;
        s->req->steps++;
        offer_blocks(c, s);
    }
}

static bool scoring_done(const struct seq *s)
{
    const struct request *r = s->req;
    return r->params.max_tokens == 0 && r->prompt_scores.n >= s->n_prompt - 1;
}

/* One row's outcome. True when the sequence ended; it may be freed then. */
static bool take_row(struct core *c, const struct step_row *row)
{
    struct seq *s = row->seq;
    struct request *r = s->req;
    bool done = false;
    lm_status st;
    if (row->is_prompt) {
        st = output_push_prompt_score(r, &row->got);
        if (st == LM_OK && scoring_done(s)) {
            s->reason = ENGINE_LENGTH;
            done = true;
        }
    } else {
        st = output_push(s, &row->got, c->p.model, &done);
        if (!r->first_token_us)
            r->first_token_us = lm_now_us();
        if (st == LM_OK && !done)
            post_stream(c, s, false);
    }
    if (st != LM_OK)
        note_failure(r, st, "no memory for the output");
    if (st != LM_OK || done)
        finish_seq(c, s, st == LM_OK ? s->reason : ENGINE_ERROR);
    return st != LM_OK || done;
}

/* Rows of one sequence stand together; once it has ended, what is left of them is void. */
static void take_rows(struct core *c, const struct step_row *row, int n)
{
    for (int i = 0; i < n;) {
        const struct seq *s = row[i].seq;
        bool ended = false;
        for (; i < n && row[i].seq == s; i++)
            ended = ended || take_row(c, &row[i]);
    }
}

/* ---- the thread ------------------------------------------------------------------------ */

static void fail_all(struct core *c, lm_status st, const char *why)
{
    lm_log(LM_ERROR, "engine", "%s; every request ends with this error", why);
    c->failed = st;
    while (c->running.n > 0)
        end_request(c, c->running.at[0]->req, ENGINE_ERROR, st, why);
    while (c->waiting.n > 0)
        end_request(c, c->waiting.at[0]->req, ENGINE_ERROR, st, why);
    mailbox_fail(c->mail, st);
}

/* No memory for a larger step's metadata, so nothing was launched: the plan's blocks are there, its
 * tokens are not computed, and the next turn plans the same again. */
static lm_status rest(const struct lm_err *err)
{
    lm_log(LM_WARN, "engine", "%s; trying again", err->msg);
    usleep(STARVED_REST_US);
    return LM_OK;
}

static lm_status run_step(struct core *c, struct lm_err *err)
{
    const struct step_row *rows = NULL;
    int n_rows = 0;
    int64_t t0 = lm_now_us();
    lm_status st = step_launch(c->step, c->forward, c->stream, &c->memory, c->plan.item,
                               c->plan.n_items, err);
    if (st == LM_OK)
        st = kn_event_record(c->tier.step_done, c->stream);
    if (st == LM_OK)
        st = step_finish(c->step, c->stream, &rows, &n_rows, err);
    int64_t t1 = lm_now_us();
    if (st == LM_NOMEM && ++c->starved < STARVED_STEPS)
        return rest(err);
    if (st != LM_OK)
        return st;
    c->starved = 0;
    commit(c, &c->plan);
    take_rows(c, rows, n_rows);
    c->tier.clock++;
    c->prefix.clock++;
    COUNT(c, steps, 1);
    COUNT(c, step_us, t1 - t0 - step_layout_us(c->step));
    COUNT(c, host_us, step_layout_us(c->step) + lm_now_us() - t1);
    return LM_OK;
}

static void publish(struct core *c)
{
    GAUGE(c, waiting, c->waiting.n);
    GAUGE(c, running, c->running.n);
    GAUGE(c, loading, c->plan.n_unready);
    GAUGE(c, free_blocks, c->pool.n_free);
    GAUGE(c, kv_blocks, c->pool.count[POOL_KV]);
    GAUGE(c, adapter_blocks, c->pool.count[POOL_ADAPTER]);
    GAUGE(c, adapters_resident, c->tier.n_resident);
    GAUGE(c, adapter_evictions, c->tier.evictions);
    GAUGE(c, waiting_prompt_tokens, c->waiting_prompt_tokens);
}

static void make_plan(struct core *c)
{
    int64_t t0 = lm_now_us();
    struct sched_view v = {
        .running = c->running, .waiting = c->waiting, .prefix = &c->prefix,
        .reclaimable = evict_reclaimable(&c->prefix, &c->tier),
        .block_tokens = c->p.block_tokens, .max_seqs = c->p.max_seqs,
        .max_step_tokens = c->p.max_step_tokens,
    };
    sched_plan(&v, &c->plan);
    COUNT(c, host_us, lm_now_us() - t0);
}

static bool plan_is_empty(const struct plan *p)
{
    return p->n_items + p->n_preempt + p->n_admit + p->n_load == 0;
}

/* One turn. *idle: there was nothing to do. */
static lm_status turn(struct core *c, bool *idle, struct lm_err *err)
{
    *idle = false;
    lm_status st = residency_poll(&c->tier, err);
    if (st != LM_OK)
        return st;
    make_plan(c);
    if (!open_admitted(c, &c->plan))
        return LM_OK;
    if (!plan_is_empty(&c->plan)) {
        int64_t t0 = lm_now_us();
        st = apply(c, &c->plan, err);
        COUNT(c, host_us, lm_now_us() - t0);
        return st == LM_OK && c->plan.n_items > 0 ? run_step(c, err) : st;
    }
    if (c->tier.n_loading > 0)
        return residency_wait(&c->tier, err);
    if (c->running.n + c->waiting.n > 0)
        return lm_err_set(err, LM_INTERNAL, "%d sequences run and %d wait, and none can advance; "
                                            "%d of %d blocks are free", c->running.n,
                          c->waiting.n, c->pool.n_free, c->pool.n_blocks);
    *idle = true;
    return LM_OK;
}

static void drop_everything(struct core *c)
{
    while (c->running.n > 0)
        end_request(c, c->running.at[0]->req, ENGINE_CANCELLED, LM_OK, "");
    while (c->waiting.n > 0)
        end_request(c, c->waiting.at[0]->req, ENGINE_CANCELLED, LM_OK, "");
    while (c->tier.loading.head)
        residency_drop(&c->tier, c->tier.loading.head);
    while (residency_evict(&c->tier)) {
    }
}

void core_run(struct core *c, mailbox *mail, adapters *reg)
{
    bool stop = false, cancels, idle = false;
    struct lm_err err;
    c->mail = mail;
    c->reg = reg;
    for (;;) {
        struct request *list = mailbox_take(mail, idle || c->failed ? -1 : 0, &stop, &cancels);
        intake(c, list);
        if (stop)
            break;
        sweep(c, cancels);
        adapters_reap(reg, drop_adapter, c);
        if (!c->failed) {
            lm_status st = turn(c, &idle, &err);
            if (CORE_CHECKS && st == LM_OK)
                st = core_check(c, &err);
            if (st != LM_OK)
                fail_all(c, st, err.msg);
        } else if (c->waiting.n > 0) {
            fail_all(c, c->failed, "the device has failed");
        }
        publish(c);
    }
    drop_everything(c);
}
