/* SPDX-License-Identifier: Apache-2.0 */
/*
 * loop.c - the engine thread: news, plan, apply, step, results; again.
 *
 *     mailbox_take     new requests join `waiting` in rank order
 *     sweep            cancelled and expired ones end
 *     residency_poll   uploads that have passed; swap_poll: KV that is back from host memory
 *     sched_plan       pure
 *     apply_plan       preempt, pin, load, admit, grow (apply.c)
 *     merge_judge      is one adapter to be merged into the weights, or taken out again (merge.c)
 *     step_launch      layout, enqueue (step.c)
 *     step_finish      wait for the oldest in flight; then tokens to text, ends, events (finish.c)
 *
 * With depth 2 a turn launches step t+1 and then finishes step t, so that planning, layout and text
 * happen while the device computes:
 *
 *     host     plan t+1 | launch t+1 | wait t | finish t | plan t+2 | launch t+2 | wait t+1 ...
 *     device   ------ step t ---------------->|---------- step t+1 --------------------->|
 *
 * Plans are made on projected state: what was launched counts as computed, a token under way as
 * there (seq.pending). A sequence that ends in step t has computed one token in vain. Blocks change
 * hands without waiting: whatever writes them next is ordered behind by streams and events. Where
 * operations complete inside the call there is nothing to overlap, and the depth is 1.
 *
 * Between two steps nothing is locked unless there is news, a request ends, or a streamed one has
 * new text (the mailbox's lock, for each); and nothing is allocated unless a request ends, text is
 * wanted as it goes, an adapter is uploaded for the first time, or a buffer meets a new record.
 *
 * One turn is make_turn(). Either a thread of its own makes turns until the mailbox says stop
 * (core_run), or the caller does (core_pump): the same engine, without a thread, for tests and for
 * simulated time. Then waiting for the device is what moves the clock.
 *
 * No memory for an upload's or a step's bookkeeping ends the requests concerned, or is waited out.
 *
 * Failure: a step or upload that fails leaves the device in an unknown state. Every live request
 * ends with ENGINE_ERROR and that status, the mailbox refuses new ones, and the thread only waits
 * to be stopped; the process should end.
 */
#include "engine/core_int.h"

#include <unistd.h>

/* A machine out of memory for a second is given up. */
#define STARVED_STEPS 100
#define STARVED_REST_US 10000

/* ---- clocks ---------------------------------------------------------------------------- */

int64_t core_now_us(const struct core *c)
{
    return kn_now_us(c->p.dev);
}

int64_t core_wall_ms(const struct core *c)
{
    return c->virtual_time ? core_now_us(c) / 1000 : lm_wall_ms();
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
    queue_join(&c->queue, r);
    for (int i = 0; i < r->n_seqs; i++)
        finish_enter_waiting(c, &r->seqs[i]);
    end_idle_choices(c, r);
}

static void intake(struct core *c, struct request *list)
{
    for (struct request *r = list, *next; r; r = next) {
        next = r->next;
        intake_one(c, r);
    }
}

static void sweep_cancelled(struct core *c)
{
    struct request *r;
    while ((r = mailbox_next_cancelled(c->mail)) != NULL)
        finish_request(c, r, ENGINE_CANCELLED, LM_OK, "");
}

/* Of those that wait, ends those whose deadline has passed. */
static void sweep_late(struct core *c, int64_t now_ms)
{
    struct tree_node *a;
    while ((a = tree_first(&c->queue.by_deadline)) != NULL) {
        struct seq *s = queue_by_deadline(a);
        if (s->queued.deadline_ms > now_ms)
            return;
        estimate_left(&c->estimate, true, core_now_us(c));
        finish_request(c, s->req, ENGINE_EXPIRED, LM_OK, "");
    }
}

/* Of those that run, ends the expired. Ending one may take others of its sequences out of the list,
 * so the walk starts over. */
static void sweep_running(struct core *c, int64_t now_ms)
{
    c->next_deadline_ms = INT64_MAX;
    for (int i = 0; i < c->running.n;) {
        struct request *r = c->running.at[i]->req;
        int64_t deadline = request_deadline(r);
        if (deadline && deadline <= now_ms) {
            finish_request(c, r, ENGINE_EXPIRED, LM_OK, "");
            i = 0;
        } else {
            if (deadline)
                c->next_deadline_ms = LM_MIN(c->next_deadline_ms, deadline);
            i++;
        }
    }
}

static void sweep(struct core *c, bool cancels)
{
    if (cancels)
        sweep_cancelled(c);
    bool waits = c->queue.by_deadline.n > 0;
    if (!waits && c->next_deadline_ms == INT64_MAX)
        return;
    int64_t now = core_wall_ms(c);
    if (now >= c->next_deadline_ms)
        sweep_running(c, now);
    if (waits)
        sweep_late(c, now);
}

static void drop_adapter(void *ctx, engine_adapter *a)
{
    struct core *c = ctx;
    residency_drop(&c->tier, a);
    prefix_forget(&c->prefix, &a->version);
}

/* ---- the thread ------------------------------------------------------------------------ */

static struct seq *first_waiting(const struct core *c)
{
    return queue_by_age(tree_first(&c->queue.by_age));
}

static void fail_all(struct core *c, lm_status st, const char *why)
{
    if (c->failed == LM_OK)
        lm_log(LM_ERROR, "engine", "%s; every request ends with this error", why);
    c->failed = st;
    step_abandon(c->step);
    while (c->running.n > 0)
        finish_request(c, c->running.at[0]->req, ENGINE_ERROR, st, why);
    while (c->queue.n > 0)
        finish_request(c, first_waiting(c)->req, ENGINE_ERROR, st, why);
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

/* Merges, unmerges, or leaves it, as the judge says; the step that follows fits what is in the
 * weights then. */
static lm_status adjust_merge(struct core *c, struct lm_err *err)
{
    const struct plan *p = &c->plan;
    const struct engine_adapter *a = p->item[0].seq->req->adapter;
    bool sole = a && a->res.users == c->running.n && a->version.waiting == c->queue.n;
    bool foreign = false;
    for (int i = 0; c->merge.serial && i < p->n_items && !foreign; i++) {
        const struct engine_adapter *other = p->item[i].seq->req->adapter;
        foreign = !other || other->version.serial != c->merge.serial;
    }
    lm_status st = LM_OK;
    switch (merge_judge(&c->merge.judge, sole ? a->version.serial : 0, foreign, core_now_us(c))) {
    case MERGE_DO:
        lm_log(LM_INFO, "engine", "adapter '%s' is merged into the weights", a->id);
        st = merge_do(&c->merge, c->stream, &c->memory, a);
        if (st == LM_OK)        /* its blocks are read until then, whatever becomes of the step */
            st = kn_event_record(c->tier.step_done, c->stream);
        break;
    case MERGE_UNDO:
        lm_log(LM_INFO, "engine", "the weights are the base model's again");
        st = merge_undo(&c->merge, c->stream);
        break;
    case MERGE_STAY:
        break;
    }
    step_set_merged(c->step, c->merge.serial);
    return st == LM_OK ? LM_OK : lm_err_set(err, st, "merging an adapter failed");
}

static lm_status launch(struct core *c, struct lm_err *err)
{
    int64_t t0 = core_now_us(c);
    lm_status st = merge_enabled(&c->merge) ? adjust_merge(c, err) : LM_OK;
    if (st != LM_OK)
        return st;
    st = step_launch(c->step, c->forward, c->stream, &c->memory, c->plan.item,
                               c->plan.n_items, err);
    if (st == LM_OK && (st = kn_event_record(c->tier.step_done, c->stream)) != LM_OK)
        lm_err_set(err, st, "no event after a step: %s", lm_status_text(st));
    if (st == LM_NOMEM && ++c->starved < STARVED_STEPS)
        return rest(err);
    if (st != LM_OK)
        return st;
    int64_t t1 = core_now_us(c), layout = step_layout_us(c->step);
    c->starved = 0;
    finish_launch(c, &c->plan);
    COUNT(c, steps, 1);
    COUNT(c, merged_steps, c->merge.serial != 0);
    COUNT(c, step_us, t1 - t0 - layout);
    COUNT(c, host_us, layout + core_now_us(c) - t1);
    return LM_OK;
}

/* What steps cost, for those who decide by it. The device was at it since it was launched, or since
 * the step before had passed. */
static void note_step(struct core *c, const struct step_results *res, int64_t before_us)
{
    int64_t us = c->step_done_us - LM_MAX(res->launched_us, before_us);
    int n_tok = res->n_prefill + res->n_decode;
    if (before_us)              /* a device may take its time over its first step */
        estimate_step(&c->estimate, res->n_prefill, us, c->step_done_us);
    if (res->n_prefill == 0 && merge_enabled(&c->merge))
        merge_judge_step(&c->merge.judge, res->merged, res->n_items, us);
    if (n_tok >= 2 * res->n_items && us > 0)        /* mostly prefill */
        evict_measured_prefill(&c->evict, (double)us / n_tok * c->p.block_tokens);
}

/* Waits for the oldest step in flight and acts on what came of it. */
static lm_status finish(struct core *c, struct lm_err *err)
{
    struct step_results res;
    int64_t t0 = core_now_us(c), before = c->step_done_us;
    lm_status st = step_finish(c->step, &res, err);
    if (st != LM_OK)
        return st;
    c->step_done_us = core_now_us(c);
    note_step(c, &res, before);
    finish_step(c, &res);
    COUNT(c, step_us, c->step_done_us - t0);
    COUNT(c, host_us, core_now_us(c) - c->step_done_us);
    return LM_OK;
}

static void publish(struct core *c)
{
    GAUGE(c, waiting, c->queue.n);
    GAUGE(c, running, c->running.n);
    GAUGE(c, loading, c->plan.n_unready);
    GAUGE(c, free_blocks, c->pool.n_free);
    GAUGE(c, kv_blocks, c->pool.count[POOL_KV]);
    GAUGE(c, adapter_blocks, c->pool.count[POOL_ADAPTER]);
    GAUGE(c, adapters_resident, c->tier.n_resident);
    GAUGE(c, adapter_evictions, c->tier.evictions);
    GAUGE(c, swap_bytes, c->swap.bytes);
    GAUGE(c, merges, c->merge.merges);
    GAUGE(c, waiting_prompt_tokens, c->queue.prompt_tokens);
}

static void make_plan(struct core *c)
{
    int64_t t0 = core_now_us(c);
    queue_settle(&c->queue);
    struct sched_view v = {
        .running = c->running, .queue = &c->queue, .prefix = &c->prefix,
        .estimate = &c->estimate, .policy = &c->p.policy, .costs = c->evict.measured,
        .reclaimable = evict_reclaimable(&c->prefix, &c->tier),
        .spare = evict_spare(&c->prefix, &c->tier),
        .kv_room = evict_room(&c->prefix, &c->tier, EVICT_PREFIX),
        .adapter_room = evict_room(&c->prefix, &c->tier, EVICT_ADAPTER),
        .swap_blocks = c->swap.n_free,
        .n_loading = c->tier.n_loading, .now_us = t0, .now_ms = core_wall_ms(c),
        .block_tokens = c->p.block_tokens, .max_seqs = c->p.max_seqs,
        .max_step_tokens = c->p.max_step_tokens, .lora_rows = c->lora_rows,
    };
    sched_plan(&v, &c->plan);
    COUNT(c, host_us, core_now_us(c) - t0);
}

/* Carries the plan out and launches its step. */
static lm_status carry_out(struct core *c, struct lm_err *err)
{
    int64_t t0 = core_now_us(c);
    lm_status st = apply_plan(c, &c->plan, err);
    COUNT(c, host_us, core_now_us(c) - t0);
    return st == LM_OK && c->plan.n_items > 0 ? launch(c, err) : st;
}

/* Nothing to compute: the device is waited for, or nobody wants anything. */
static lm_status wait_or_idle(struct core *c, bool *idle, struct lm_err *err)
{
    if (c->tier.n_loading > 0)
        return residency_wait(&c->tier, err);
    if (c->swap.n_batches > 0)
        return swap_wait(&c->swap, err);
    if (c->running.n + c->queue.n > 0)
        return lm_err_set(err, LM_INTERNAL, "%d sequences run and %d wait, and none can advance; "
                                            "%d of %d blocks are free", c->running.n,
                          c->queue.n, c->pool.n_free, c->pool.n_blocks);
    *idle = true;
    return LM_OK;
}

/* One turn. At most one step is in flight when it begins. *idle: there was nothing to do. */
static lm_status turn(struct core *c, bool *idle, struct lm_err *err)
{
    *idle = false;
    int before = step_in_flight(c->step);
    lm_status st = residency_poll(&c->tier, err);
    if (st == LM_OK)
        st = swap_poll(&c->swap, err);
    if (st != LM_OK)
        return st;
    make_plan(c);
    apply_expire(c, &c->plan);
    if (!apply_open_admitted(c, &c->plan))
        return LM_OK;
    bool empty = plan_is_empty(&c->plan);
    if (!empty)
        st = carry_out(c, err);
    int keep = step_in_flight(c->step) > before ? c->depth - 1 : 0;
    while (st == LM_OK && step_in_flight(c->step) > keep)
        st = finish(c, err);
    return st == LM_OK && empty && before == 0 ? wait_or_idle(c, idle, err) : st;
}

/* What has come since the last turn; with wait_ms, sleeps until there is something. */
static void take_news(struct core *c, int wait_ms, bool *stop)
{
    bool cancels;
    intake(c, mailbox_take(c->mail, wait_ms, stop, &cancels));
    if (*stop)
        return;
    sweep(c, cancels);
    adapters_reap(c->reg, drop_adapter, c);
}

/* With `wait_ms` other than 0 first sleeps until there is news (-1: for ever). *idle: nothing can
 * be done until there is; *stop: the mailbox says so. After a failure, its status. */
static lm_status make_turn(struct core *c, int wait_ms, bool *idle, bool *stop, struct lm_err *err)
{
    *idle = true;
    take_news(c, wait_ms, stop);
    lm_status st = c->failed;
    if (*stop)
        return LM_OK;
    if (st != LM_OK) {
        lm_err_set(err, st, "the device has failed");
    } else {
        st = turn(c, idle, err);
        if (CORE_CHECKS && st == LM_OK)
            st = core_check(c, err);
    }
    if (st != LM_OK) {
        *idle = true;
        fail_all(c, st, err->msg);
    }
    publish(c);
    return st;
}

void core_begin(struct core *c, mailbox *mail, adapters *reg)
{
    c->mail = mail;
    c->reg = reg;
}

void core_run(struct core *c)
{
    bool stop = false, idle = false;
    struct lm_err err;
    while (!stop)
        make_turn(c, idle ? -1 : 0, &idle, &stop, &err);
    core_drop(c);
}

lm_status core_pump(struct core *c, int64_t until_us, bool *idle, struct lm_err *err)
{
    bool stop = false;
    lm_status st = LM_OK;
    *idle = false;
    while (st == LM_OK && !*idle && !stop && core_now_us(c) < until_us)
        st = make_turn(c, 0, idle, &stop, err);
    return st;
}

void core_drop(struct core *c)
{
    step_abandon(c->step);
    while (c->running.n > 0)
        finish_request(c, c->running.at[0]->req, ENGINE_CANCELLED, LM_OK, "");
    while (c->queue.n > 0)
        finish_request(c, first_waiting(c)->req, ENGINE_CANCELLED, LM_OK, "");
    while (c->tier.loading.head)
        residency_drop(&c->tier, c->tier.loading.head);
    while (residency_evict(&c->tier)) {
    }
}
