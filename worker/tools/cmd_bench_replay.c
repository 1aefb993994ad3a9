/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_bench_replay.c - replays a trace through the engine's public interface, in real or simulated
 * time.
 *
 *   arrival --> adapter in host memory? --yes--------------------------> submit --> result
 *                     |                                                    ^
 *                     no --> a queue of fetches, --fetches at once --> stand-in made
 *
 * as the worker and its store would: one fetch for all who want the same adapter. Without a store
 * (--fetch-latency-ms and --fetch-gbps both 0) a stand-in is made on the spot. Adapters leave host
 * memory by the engine's own budget; when it is full of adapters in use, a stand-in waits until a
 * request has ended.
 *
 * Simulated time passes in engine_pump(), up to the next arrival or fetch; when the engine is idle
 * it is moved there. In real time the engine has its thread and this loop sleeps in engine_poll().
 *
 * Memory: some 64 bytes a request of the trace and 12 an adapter of it, however many are known.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/tools/cmd_bench.h"

#define SAMPLE_US 500000        /* the pool is looked at this often */
#define RETRY_US 1000           /* and when something waits for others to end, this often */
#define EVENTS 256
#define HUGE_HOST ((size_t)1 << 50)

/* A queue of small numbers. */
struct ring {
    int32_t *at;
    int cap, head, n;
};

struct fetch {
    int32_t adapter;
    int64_t ready_us;
};

struct runner {
    struct replay *out;
    const struct bench_args *a;
    const struct trace *t;
    engine *e;
    int64_t t0_us, t0_wall_ms;  /* the engine's clocks at the start */
    int next;                   /* arrival */
    int open;                   /* submitted, not ended */
    struct ring ready;          /* requests that may be submitted; nearly always empty */
    int32_t *first, *last;      /* [n_adapters] who waits for it, -1: nobody */
    struct ring fetches;        /* adapters to fetch */
    struct fetch *active;       /* [a->fetches] */
    int n_active;
    struct ring arrived;        /* adapters fetched, for whom there was no host memory yet */
    size_t rank_bytes[4097];    /* of an adapter of that rank; 0: not known yet */
    int32_t *ids;               /* [max_prompt] */
    int64_t sampled_us;
    struct lm_err *err;
};

/* ---- queues ---------------------------------------------------------------------------- */

static lm_status ring_push(struct ring *r, int32_t v)
{
    if (r->n == r->cap) {
        int cap = r->cap ? r->cap * 2 : 256;
        int32_t *p = lm_reallocarray(NULL, (size_t)cap, sizeof *p);
        if (!p)
            return LM_NOMEM;
        for (int i = 0; i < r->n; i++)
            p[i] = r->at[(r->head + i) % r->cap];
        free(r->at);
        *r = (struct ring){ p, cap, 0, r->n };
    }
    r->at[(r->head + r->n++) % r->cap] = v;
    return LM_OK;
}

static int32_t ring_pop(struct ring *r)
{
    int32_t v = r->at[r->head];
    r->head = (r->head + 1) % r->cap;
    r->n--;
    return v;
}

/* ---- the clock ------------------------------------------------------------------------- */

static int64_t now_us(const struct runner *r)
{
    return engine_now_us(r->e) - r->t0_us;
}

static int64_t next_event_us(const struct runner *r)
{
    int64_t at = r->next < r->t->n ? r->t->item[r->next].arrival_us : INT64_MAX;
    for (int i = 0; i < r->n_active; i++)
        at = LM_MIN(at, r->active[i].ready_us);
    return at;
}

/* ---- submitting ------------------------------------------------------------------------ */

static void adapter_name(int32_t adapter, char id[32])
{
    snprintf(id, 32, "adapter-%d", adapter);
}

static int stand_in_rank(const struct runner *r, int32_t request)
{
    return LM_MAX(r->t->item[request].rank, r->a->pad_rank);
}

static void close_outcome(struct runner *r, int32_t i, enum outcome_state state)
{
    struct outcome *o = &r->out->outcome[i];
    o->state = state;
    o->end_us = now_us(r) - r->t->item[i].arrival_us;
    r->out->end_us = LM_MAX(r->out->end_us, now_us(r));
}

/* LM_BUSY: not now. What the engine refuses for good is an outcome like others. */
static lm_status submit(struct runner *r, int32_t i, engine_adapter *adapter)
{
    const struct trace_item *it = &r->t->item[i];
    char id[32];
    struct engine_request q = { .id = id, .token_ids = r->ids, .n_token_ids = it->prompt,
                                .adapter = adapter, .user = (void *)(intptr_t)i };
    snprintf(id, sizeof id, "trace-%d", i);
    for (int t = 0; t < it->prompt; t++)
        r->ids[t] = trace_token(i, t, r->out->info.vocab_size);
    engine_params_default(&q.params);
    q.params.max_tokens = it->output;
    q.params.temperature = 0;
    q.params.ignore_eos = true;
    q.params.set |= ENGINE_SET_TEMPERATURE | ENGINE_SET_MAX_TOKENS;
    if (r->a->abort_late)
        q.first_token_by_ms = r->t0_wall_ms + it->arrival_us / 1000 +
                              (int64_t)(r->a->slo_s * 1000);
    engine_handle h;
    lm_status st = engine_submit(r->e, &q, &h, r->err);
    if (st == LM_BUSY)
        return st;
    if (st == LM_OK) {
        r->out->outcome[i].submit_us = now_us(r) - it->arrival_us;
        r->open++;
        return LM_OK;
    }
    if (!r->out->error[0])
        snprintf(r->out->error, sizeof r->out->error, "%.255s", r->err->msg);
    close_outcome(r, i, REPLAY_FAILED);
    return LM_OK;
}

/* All that wait for an adapter, which is at hand. */
static lm_status submit_waiters(struct runner *r, int32_t adapter, engine_adapter *a)
{
    lm_status st = LM_OK;
    for (int32_t i = r->first[adapter]; i >= 0 && st == LM_OK; i = r->out->outcome[i].next) {
        st = submit(r, i, a);
        if (st == LM_BUSY)
            st = ring_push(&r->ready, i);
    }
    r->first[adapter] = r->last[adapter] = -1;
    return st;
}

static lm_status make_stand_in(struct runner *r, int32_t adapter, int rank, engine_adapter **out)
{
    char id[32];
    adapter_name(adapter, id);
    lm_status st = engine_adapter_dummy(r->e, id, rank, r->a->modules, out, r->err);
    if (st == LM_OK)
        r->rank_bytes[rank] = engine_adapter_bytes(*out);
    return st;
}

static lm_status adapter_arrived(struct runner *r, int32_t adapter)
{
    engine_adapter *a = NULL;
    lm_status st = make_stand_in(r, adapter, stand_in_rank(r, r->first[adapter]), &a);
    if (st == LM_BUSY)
        return ring_push(&r->arrived, adapter);
    if (st == LM_OK)
        st = submit_waiters(r, adapter, a);
    engine_adapter_unref(a);
    return st;
}

/* ---- the store ------------------------------------------------------------------------- */

static bool has_store(const struct runner *r)
{
    return r->a->fetch_ms > 0 || r->a->fetch_gbps > 0;
}

/* Bytes of an adapter of this rank: made once to see. */
static size_t bytes_of_rank(struct runner *r, int rank)
{
    engine_adapter *a = NULL;
    if (!r->rank_bytes[rank] &&
        engine_adapter_dummy(r->e, "probe", rank, r->a->modules, &a, NULL) == LM_OK)
        r->rank_bytes[rank] = engine_adapter_bytes(a);
    engine_adapter_unref(a);
    return r->rank_bytes[rank];
}

static void start_fetches(struct runner *r)
{
    while (r->fetches.n > 0 && r->n_active < r->a->fetches) {
        int32_t adapter = ring_pop(&r->fetches);
        double us = r->a->fetch_ms * 1000;
        if (r->a->fetch_gbps > 0)
            us += (double)bytes_of_rank(r, stand_in_rank(r, r->first[adapter])) /
                  (r->a->fetch_gbps * 1000);
        r->active[r->n_active++] = (struct fetch){ adapter, now_us(r) + (int64_t)us };
        r->out->fetched++;
    }
}

static lm_status finish_fetches(struct runner *r)
{
    lm_status st = LM_OK;
    int64_t now = now_us(r);
    for (int i = 0; i < r->n_active && st == LM_OK;) {
        if (r->active[i].ready_us > now) {
            i++;
            continue;
        }
        int32_t adapter = r->active[i].adapter;
        r->active[i] = r->active[--r->n_active];
        st = adapter_arrived(r, adapter);
    }
    start_fetches(r);
    return st;
}

/* Host memory was full of adapters in use: try again now that something has ended. */
static lm_status retry_arrived(struct runner *r)
{
    lm_status st = LM_OK;
    for (int n = r->arrived.n; n > 0 && st == LM_OK; n--)
        st = adapter_arrived(r, ring_pop(&r->arrived));
    return st;
}

static lm_status retry_ready(struct runner *r)
{
    lm_status st = LM_OK;
    while (r->ready.n > 0 && st == LM_OK) {
        int32_t i = r->ready.at[r->ready.head], adapter = r->t->item[i].adapter;
        engine_adapter *a = NULL;
        if (adapter >= 0)
            st = make_stand_in(r, adapter, stand_in_rank(r, i), &a);
        if (st == LM_OK)
            st = submit(r, i, a);
        engine_adapter_unref(a);
        if (st == LM_OK)
            ring_pop(&r->ready);
    }
    return st == LM_BUSY ? LM_OK : st;
}

/* ---- arrivals -------------------------------------------------------------------------- */

static lm_status wait_for_adapter(struct runner *r, int32_t i)
{
    int32_t adapter = r->t->item[i].adapter;
    bool first = r->first[adapter] < 0;
    *(first ? &r->first[adapter] : &r->out->outcome[r->last[adapter]].next) = i;
    r->last[adapter] = i;
    if (!first)
        return LM_OK;
    return has_store(r) ? ring_push(&r->fetches, adapter) : adapter_arrived(r, adapter);
}

static lm_status arrive(struct runner *r, int32_t i)
{
    int32_t adapter = r->t->item[i].adapter;
    engine_adapter *a = NULL;
    lm_status st;
    r->out->outcome[i].next = -1;
    if (adapter >= 0) {
        char id[32];
        adapter_name(adapter, id);
        a = engine_adapter_find(r->e, id);
        if (!a)
            return wait_for_adapter(r, i);
    }
    st = r->ready.n > 0 ? LM_BUSY : submit(r, i, a);
    engine_adapter_unref(a);
    return st == LM_BUSY ? ring_push(&r->ready, i) : st;
}

static lm_status take_arrivals(struct runner *r)
{
    lm_status st = LM_OK;
    while (r->next < r->t->n && r->t->item[r->next].arrival_us <= now_us(r) && st == LM_OK)
        st = arrive(r, r->next++);
    start_fetches(r);
    return st;
}

/* ---- results --------------------------------------------------------------------------- */

static void take_result(struct runner *r, const struct engine_event *ev)
{
    int32_t i = (int32_t)(intptr_t)ev->user;
    struct outcome *o = &r->out->outcome[i];
    const struct engine_result *res = ev->result;
    enum engine_reason reason = res->n_choices ? res->choices[0].reason : ENGINE_ERROR;
    o->state = reason == ENGINE_EXPIRED ? REPLAY_LATE
             : reason == ENGINE_ERROR ? REPLAY_FAILED : REPLAY_DONE;
    o->tokens = res->completion_tokens;
    o->admit_us = o->submit_us + res->queued_us;
    o->first_us = res->first_token_us ? o->submit_us + res->first_token_us : 0;
    o->end_us = o->submit_us + res->finished_us;
    r->out->end_us = LM_MAX(r->out->end_us, r->t->item[i].arrival_us + o->end_us);
    if (o->state == REPLAY_FAILED && !r->out->error[0])
        snprintf(r->out->error, sizeof r->out->error, "%s", res->error);
    r->open--;
}

static lm_status take_results(struct runner *r, int timeout_ms)
{
    struct engine_event ev[EVENTS];
    lm_status state = LM_OK;
    int n;
    do {
        n = engine_poll(r->e, ev, EVENTS, timeout_ms, &state);
        for (int i = 0; i < n; i++) {
            free(ev[i].text);
            if (ev[i].kind == ENGINE_FINISHED) {
                take_result(r, &ev[i]);
                engine_result_free(ev[i].result);
            }
        }
        timeout_ms = 0;
    } while (n == EVENTS);
    return state == LM_OK ? LM_OK : lm_err_set(r->err, state, "the engine stopped: %s",
                                               lm_status_text(state));
}

/* ---- looking at the pool --------------------------------------------------------------- */

static void sample(struct runner *r)
{
    struct occupancy *p = &r->out->pool;
    struct engine_stats s;
    int64_t now = now_us(r);
    double dt = (double)(now - r->sampled_us) / 1e6;
    if (dt <= 0)
        return;
    engine_stats(r->e, &s);
    r->sampled_us = now;
    p->seconds += dt;
    p->kv += dt * s.kv_blocks;
    p->adapters += dt * s.adapter_blocks;
    p->resident += dt * s.adapters_resident;
    p->max_kv = LM_MAX(p->max_kv, s.kv_blocks);
    p->max_adapters = LM_MAX(p->max_adapters, s.adapter_blocks);
    p->max_resident = LM_MAX(p->max_resident, s.adapters_resident);
    p->max_waiting = LM_MAX(p->max_waiting, s.waiting);
}

/* ---- the loop -------------------------------------------------------------------------- */

/* Simulated: lets the engine work until the next event, or moves time there if it has none. */
static lm_status pump(struct runner *r)
{
    int64_t wait = r->ready.n + r->arrived.n > 0 ? RETRY_US : SAMPLE_US;
    int64_t event = next_event_us(r), until = LM_MIN(event, now_us(r) + wait);
    bool idle = false;
    lm_status st = engine_pump(r->e, until + r->t0_us, &idle, r->err);
    if (st == LM_OK)
        st = take_results(r, 0);
    if (st != LM_OK || !idle || r->ready.n > 0 || r->arrived.n > 0)
        return st;
    if (event != INT64_MAX)
        return engine_advance(r->e, event + r->t0_us);
    return r->open == 0 ? LM_OK : lm_err_set(r->err, LM_INTERNAL, "the engine is idle, and %d "
                                             "requests have no result", r->open);
}

/* Real: sleeps until there is a result or something to submit. */
static lm_status sleep_on_results(struct runner *r)
{
    int64_t wait = r->ready.n + r->arrived.n > 0 ? RETRY_US : SAMPLE_US;
    int64_t us = LM_MIN(next_event_us(r) - now_us(r), wait);
    return take_results(r, us > 0 ? (int)(us / 1000) : 0);
}

static bool finished(const struct runner *r)
{
    return r->next == r->t->n && r->open == 0 && r->ready.n == 0 && r->fetches.n == 0 &&
           r->n_active == 0 && r->arrived.n == 0;
}

static lm_status run(struct runner *r)
{
    lm_status st = LM_OK;
    while (st == LM_OK && !finished(r)) {
        st = finish_fetches(r);
        if (st == LM_OK)
            st = retry_arrived(r);
        if (st == LM_OK)
            st = retry_ready(r);
        if (st == LM_OK)
            st = take_arrivals(r);
        if (st == LM_OK)
            st = r->a->sim ? pump(r) : sleep_on_results(r);
        if (now_us(r) - r->sampled_us >= SAMPLE_US)
            sample(r);
    }
    sample(r);
    return st;
}

/* In real time, making a stand-in takes time that a worker would not spend here: do it before. */
static lm_status make_all(struct runner *r)
{
    engine_adapter *a;
    lm_status st = LM_OK;
    size_t bytes = 0;
    for (int i = 0; i < r->t->n && st == LM_OK && !has_store(r); i++) {
        const struct trace_item *it = &r->t->item[i];
        char id[32];
        if (it->adapter < 0)
            continue;
        adapter_name(it->adapter, id);
        a = engine_adapter_find(r->e, id);
        if (!a) {
            st = make_stand_in(r, it->adapter, stand_in_rank(r, i), &a);
            bytes += st == LM_OK ? engine_adapter_bytes(a) : 0;
        }
        engine_adapter_unref(a);
        if (bytes > r->a->host_adapter_bytes)
            break;
    }
    return st;
}

/* ---- warming up ------------------------------------------------------------------------ */

#define WARM_PROMPT 64
#define WARM_OUTPUT 16
#define WARM_FIRST 1000000000   /* its prompts are no request's of the trace */

static lm_status submit_warm(struct runner *r, int i)
{
    const struct trace_item *it = &r->t->item[i % r->t->n];
    int32_t ids[WARM_PROMPT];
    char id[32];
    struct engine_request q = { .id = id, .token_ids = ids, .n_token_ids = WARM_PROMPT };
    engine_handle h;
    lm_status st = LM_OK;
    snprintf(id, sizeof id, "warm-%d", i);
    for (int t = 0; t < WARM_PROMPT; t++)
        ids[t] = trace_token(WARM_FIRST + i, t, r->out->info.vocab_size);
    engine_params_default(&q.params);
    q.params.max_tokens = WARM_OUTPUT;
    q.params.temperature = 0;
    q.params.ignore_eos = true;
    q.params.set |= ENGINE_SET_TEMPERATURE | ENGINE_SET_MAX_TOKENS;
    if (it->adapter >= 0)
        st = make_stand_in(r, it->adapter, stand_in_rank(r, i % r->t->n), &q.adapter);
    if (st == LM_OK)
        st = engine_submit(r->e, &q, &h, r->err);
    engine_adapter_unref(q.adapter);
    return st;
}

/* Libraries, clocks and graphs of a real device settle on requests that are not reported. */
static lm_status warm_up(struct runner *r)
{
    lm_status st = LM_OK, state = LM_OK;
    for (int i = 0; i < r->a->warm_up && st == LM_OK; i++)
        st = submit_warm(r, i);
    for (int done = 0; done < r->a->warm_up && st == LM_OK && state == LM_OK;) {
        struct engine_event ev[EVENTS];
        bool idle;
        if (r->a->sim)
            st = engine_pump(r->e, INT64_MAX, &idle, r->err);
        int n = engine_poll(r->e, ev, EVENTS, r->a->sim ? 0 : 1000, &state);
        for (int i = 0; i < n; i++) {
            free(ev[i].text);
            engine_result_free(ev[i].result);
            done += ev[i].kind == ENGINE_FINISHED;
        }
    }
    if (st == LM_OK && state != LM_OK)
        st = lm_err_set(r->err, state, "the engine stopped: %s", lm_status_text(state));
    return st;
}

/* Counters since the warm-up; gauges stay. */
static void subtract(struct engine_stats *s, const struct engine_stats *before)
{
    uint64_t *const now[] = {
        &s->steps, &s->prefill_tokens, &s->decode_tokens, &s->finished, &s->failed,
        &s->preemptions, &s->adapter_loads, &s->adapter_evictions, &s->adapter_hits, &s->step_us,
        &s->host_us, &s->step_adapters, &s->step_seqs, &s->early_aborts, &s->swap_outs,
        &s->swap_ins, &s->swap_bytes, &s->adapter_bytes, &s->prefix_hit_tokens, &s->merges,
        &s->merged_steps,
    };
    for (size_t i = 0; i < LM_COUNT(now); i++) {
        size_t at = (size_t)((char *)now[i] - (char *)s);
        *now[i] -= *(const uint64_t *)((const char *)before + at);
    }
}

/* ---- set-up ---------------------------------------------------------------------------- */

static lm_status open_engine(struct runner *r)
{
    const struct bench_args *a = r->a;
    struct engine_config c = {
        .model_dir = a->model, .shape = a->shape, .backend = a->backend, .sim = a->sim,
        .threads = a->threads, .pool_bytes = a->pool_bytes, .block_tokens = a->block_tokens,
        .kv = a->kv, .weights = a->weights, .shape_layers = a->layers,
        .max_seqs = a->max_seqs, .max_step_tokens = a->max_step_tokens,
        .max_waiting = LM_MIN(LM_MAX(LM_MAX(r->t->n, a->warm_up), 1024), 1 << 18),
        .policy = &a->policy, .host_adapter_bytes = a->host_adapter_bytes,
        .manual = a->sim != NULL,
    };
    if (!c.host_adapter_bytes && a->sim)
        c.host_adapter_bytes = HUGE_HOST;
    return engine_open(&c, &r->e, r->err);
}

static lm_status allocate(struct runner *r)
{
    size_t n = (size_t)LM_MAX(r->t->n_adapters, 1);
    r->out->outcome = lm_calloc((size_t)r->t->n, sizeof *r->out->outcome);
    r->first = lm_reallocarray(NULL, n, sizeof *r->first);
    r->last = lm_reallocarray(NULL, n, sizeof *r->last);
    r->active = lm_calloc((size_t)r->a->fetches, sizeof *r->active);
    r->ids = lm_calloc((size_t)r->t->max_prompt, sizeof *r->ids);
    if (!r->out->outcome || !r->first || !r->last || !r->active || !r->ids)
        return lm_err_set(r->err, LM_NOMEM, "no memory for %d requests", r->t->n);
    memset(r->first, -1, n * sizeof *r->first);
    memset(r->last, -1, n * sizeof *r->last);
    return LM_OK;
}

static void release(struct runner *r)
{
    free(r->ready.at);
    free(r->fetches.at);
    free(r->arrived.at);
    free(r->first);
    free(r->last);
    free(r->active);
    free(r->ids);
}

lm_status bench_replay(const struct bench_args *a, const struct trace *t, struct replay *out,
                       struct lm_err *err)
{
    *out = (struct replay){ .args = a, .trace = t };
    struct runner *r = lm_calloc(1, sizeof *r);
    if (!r)
        return lm_err_set(err, LM_NOMEM, "no memory for a replay");
    *r = (struct runner){ .out = out, .a = a, .t = t, .err = err };
    lm_status st = open_engine(r);
    if (st == LM_OK)
        st = allocate(r);
    if (st == LM_OK)
        engine_info(r->e, &out->info);
    if (st == LM_OK && !a->sim)
        st = make_all(r);
    if (st == LM_OK)
        st = warm_up(r);
    if (st == LM_OK) {
        struct engine_stats before;
        engine_stats(r->e, &before);
        int64_t began = lm_now_us();
        r->t0_us = engine_now_us(r->e);
        r->t0_wall_ms = engine_wall_ms(r->e);
        st = run(r);
        out->wall_us = lm_now_us() - began;
        engine_stats(r->e, &out->stats);
        subtract(&out->stats, &before);
    }
    if (st == LM_OK)
        bench_report(out);      /* the engine's strings are in it */
    if (st == LM_OK && a->outcomes)
        st = bench_outcomes(out, a->outcomes, err);
    if (r->e)
        engine_close(r->e);
    release(r);
    free(r);
    return st;
}
