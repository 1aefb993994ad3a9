/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_sched_sim.c - plans carried out over simulated time, without a device: nobody starves, every
 * request ends, tenants get their shares, grouping meets fewer adapters, and what planning costs.
 *
 * A step takes 20 ms, 50 us a prompt token and 100 us an adapter; an upload takes three steps.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>

#include "cpu_clock.h"
#include "sched_world.h"

#define RND_SEED 88172645463325252u
#include "rnd.h"

#define LOAD_STEPS 3

/* ---- a world in motion ----------------------------------------------------------------- */

struct run {
    struct world *w;
    int n_adapters;
    int ready_at[MAX_ADAPTERS]; /* step in which an upload has passed */
    int32_t *adapter_blocks;    /* [n_adapters][64] */
    int64_t *admitted_us;       /* [cap], -1: not yet */
    int64_t *arrived_us;
    int steps, finished, expired, preempted;
    int64_t adapters;           /* distinct ones, summed over steps */
    int64_t tokens;
};

static struct run *run_new(int cap, int n_adapters, int n_blocks, int max_seqs, int max_tokens)
{
    struct run *r = calloc(1, sizeof *r);
    assert_non_null(r);
    r->w = world_sized(cap, n_blocks, max_seqs, max_tokens);
    r->n_adapters = n_adapters;
    r->adapter_blocks = calloc((size_t)n_adapters * 64, sizeof *r->adapter_blocks);
    r->admitted_us = calloc((size_t)cap, sizeof *r->admitted_us);
    r->arrived_us = calloc((size_t)cap, sizeof *r->arrived_us);
    assert_true(r->adapter_blocks && r->admitted_us && r->arrived_us);
    for (int i = 0; i < n_adapters; i++)
        add_adapter(r->w, i, RES_HOST, 1 + i % 4, 0)->res.blocks = r->adapter_blocks + i * 64;
    return r;
}

static void run_free(struct run *r)
{
    world_free(r->w);
    free(r->adapter_blocks);
    free(r->admitted_us);
    free(r->arrived_us);
    free(r);
}

static struct seq *arrive(struct run *r, int n_prompt, struct spec x)
{
    x.since_us = r->w->view.now_us;
    struct seq *s = add_waiting_as(r->w, n_prompt, &x);
    r->admitted_us[s - r->w->seq] = -1;
    r->arrived_us[s - r->w->seq] = r->w->view.now_us;
    return s;
}

static void give_blocks(struct run *r, int32_t *blocks, int n)
{
    for (int i = 0; i < n; i++)
        pool_unref(&r->w->pool, blocks[i]);
}

/* Idle adapters' blocks, which leave when someone needs the room. */
static int idle_blocks(const struct run *r)
{
    int n = 0;
    for (int i = 0; i < r->n_adapters; i++) {
        const struct engine_adapter *a = &r->w->adapter[i];
        n += a->res.state == RES_RESIDENT && a->res.users == 0 ? a->n_blocks : 0;
    }
    return n;
}

static bool is_charged(const struct plan *p, const struct engine_adapter *a)
{
    for (int i = 0; i < p->n_charged; i++)
        if (p->charged[i] == a)
            return true;
    return false;
}

static void take_blocks(struct run *r, enum pool_owner kind, int n, int32_t *out)
{
    for (int i = 0; i < r->n_adapters && r->w->pool.n_free < n; i++) {
        struct engine_adapter *a = &r->w->adapter[i];
        if (a->res.state != RES_RESIDENT || a->res.users > 0 || is_charged(&r->w->plan, a))
            continue;
        give_blocks(r, a->res.blocks, a->n_blocks);
        a->res.state = RES_HOST;
    }
    assert_int_equal(pool_take(&r->w->pool, kind, n, out), LM_OK);
}

static void grow(struct run *r, struct seq *s, int n_tokens)
{
    int n = blocks_for(n_tokens, BT) - s->n_blocks;
    if (n <= 0)
        return;
    take_blocks(r, POOL_KV, n, s->blocks + s->n_blocks);
    s->n_blocks += n;
}

static void stop_running(struct run *r, struct seq *s)
{
    seq_list_remove(&r->w->view.running, s);
    give_blocks(r, s->blocks, s->n_blocks);
    s->n_blocks = s->n_computed = 0;
    if (s->req->adapter)
        s->req->adapter->res.users--;
}

static void end(struct run *r, struct seq *s)
{
    s->state = SEQ_DONE;
    queue_leave(&r->w->queue, s->req);
}

static void admit(struct run *r, struct seq *s)
{
    struct world *w = r->w;
    int64_t most = w->policy.max_wait_ms * 1000, now = w->view.now_us;
    queue_admitted(&w->queue, most > 0 && now - s->queued.since_us > most);
    if (!s->queued.charged)
        queue_charge(&w->queue, s->req, (uint64_t)s->n_prompt);
    s->queued.charged = true;
    if (r->admitted_us[s - w->seq] < 0)
        r->admitted_us[s - w->seq] = now;
    estimate_left(&w->estimate, false, now);
    queue_remove(&w->queue, s, now);
    s->state = SEQ_RUNNING;
    seq_list_insert(&w->view.running, s, 1);
    if (s->req->adapter)
        s->req->adapter->res.users++;
}

static void apply(struct run *r, const struct plan *p)
{
    struct world *w = r->w;
    int64_t now = w->view.now_us;
    for (int i = 0; i < p->n_expire; i++) {
        estimate_left(&w->estimate, true, now);
        queue_remove(&w->queue, p->expire[i], now);
        end(r, p->expire[i]);
        r->expired++;
    }
    for (int i = 0; i < p->n_preempt; i++) {
        stop_running(r, p->preempt[i]);
        p->preempt[i]->state = SEQ_WAITING;
        queue_insert(&w->queue, p->preempt[i], now);
        r->preempted++;
    }
    for (int i = 0; i < p->n_passed; i++)
        queue_overtaken(&w->queue, p->passed[i].seq, p->passed[i].by, w->policy.max_overtaken);
    for (int i = 0; i < p->n_admit; i++)
        admit(r, p->admit[i]);
    for (int i = 0; i < p->n_admit; i++)
        grow(r, p->admit[i], p->admit[i]->n_tokens);
    for (int i = 0; i < p->n_items; i++)
        grow(r, p->item[i].seq, p->item[i].seq->n_computed + p->item[i].n_tok);
    for (int i = 0; i < p->n_load; i++) {
        struct engine_adapter *a = p->load[i];
        take_blocks(r, POOL_ADAPTER, a->n_blocks, a->res.blocks);
        a->res.state = RES_LOADING;
        r->ready_at[a - w->adapter] = r->steps + LOAD_STEPS;
        w->view.n_loading++;
    }
}

/* Tokens come, sequences end. Returns the prompt tokens of the step. */
static int compute(struct run *r, const struct plan *p)
{
    struct world *w = r->w;
    int prompt = 0;
    for (int i = 0; i < p->n_items; i++) {
        struct seq *s = p->item[i].seq;
        bool decode = s->n_computed >= s->n_prompt;
        prompt += decode ? 0 : p->item[i].n_tok;
        s->n_computed += p->item[i].n_tok;
        if (s->n_computed < s->n_tokens)
            continue;
        s->n_tokens++;
        r->tokens++;
        queue_charge(&w->queue, s->req, TENANTS_OUTPUT_WEIGHT);
        if (!s->req->first_token_us)
            s->req->first_token_us = w->view.now_us + 1;
        if (s->n_tokens == s->cap_tokens) {
            stop_running(r, s);
            end(r, s);
            r->finished++;
        }
    }
    return prompt;
}

static int distinct(const struct run *r, const struct plan *p)
{
    static int seen[MAX_ADAPTERS], mark;
    int n = 0;
    mark++;
    for (int i = 0; i < p->n_items; i++) {
        const struct engine_adapter *a = p->item[i].seq->req->adapter;
        if (a && seen[a - r->w->adapter] != mark) {
            seen[a - r->w->adapter] = mark;
            n++;
        }
    }
    return n;
}

/* False: nothing was left to do. */
static bool step(struct run *r)
{
    struct world *w = r->w;
    for (int i = 0; i < r->n_adapters; i++) {
        if (w->adapter[i].res.state == RES_LOADING && r->ready_at[i] <= r->steps) {
            w->adapter[i].res.state = RES_RESIDENT;
            w->view.n_loading--;
        }
    }
    const struct plan *p = plan(w, idle_blocks(r));
    if (plan_is_empty(p) && w->view.n_loading == 0) {
        assert_int_equal(w->queue.n + w->view.running.n, 0);    /* or they would wait for ever */
        return false;
    }
    int n = distinct(r, p);
    r->adapters += n;
    apply(r, p);
    int prompt = compute(r, p);
    int64_t us = 20000 + 50 * prompt + 100 * n;
    estimate_step(&w->estimate, prompt, us, w->view.now_us + us);
    w->view.now_us += us;
    w->view.now_ms = w->view.now_us / 1000;
    r->steps++;
    return true;
}

static void run_out(struct run *r, int limit)
{
    while (step(r))
        assert_true(r->steps < limit);
}

static int by_value(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static int64_t p99_wait_us(const struct run *r)
{
    int n = r->w->n;
    int64_t *wait = calloc((size_t)n, sizeof *wait);
    assert_non_null(wait);
    for (int i = 0; i < n; i++)
        wait[i] = r->admitted_us[i] - r->arrived_us[i];
    qsort(wait, (size_t)n, sizeof *wait, by_value);
    int64_t p99 = wait[n * 99 / 100];
    free(wait);
    return p99;
}

/* ---- grouping -------------------------------------------------------------------------- */

/* A backlog of 8 a head for 128 adapters, in random order, 64 seats. */
static struct run *backlog(bool group, int64_t max_wait_ms)
{
    enum { EACH = 8, N = 128 };
    struct run *r = run_new(N * EACH, N, 4000, 64, 512);
    int who[N * EACH];
    r->w->policy.group = group;
    r->w->policy.max_wait_ms = max_wait_ms;
    for (int i = 0; i < N * EACH; i++)
        who[i] = i / EACH;
    rng = 88172645463325252u;
    for (int i = N * EACH - 1; i > 0; i--) {
        int k = rnd(i + 1), t = who[i];
        who[i] = who[k];
        who[k] = t;
    }
    for (int i = 0; i < N * EACH; i++)
        arrive(r, 20 + rnd(100), (struct spec){ .adapter = &r->w->adapter[who[i]],
                                                .max_tokens = 20 + rnd(100) });
    run_out(r, 1000000);
    assert_int_equal(r->finished, N * EACH);
    return r;
}

static void grouping_meets_a_third_of_the_adapters(void **state)
{
    (void)state;
    struct run *off = backlog(false, 600000);
    int64_t bound_ms = off->w->view.now_us / 1000;      /* what the whole backlog takes */
    struct run *on = backlog(true, bound_ms);
    double a = (double)on->adapters / on->steps, b = (double)off->adapters / off->steps;
    print_message("adapters a step %.1f, without grouping %.1f; seconds %.1f, %.1f; "
                  "P99 wait %.1f s, %.1f s\n", a, b, (double)on->w->view.now_us / 1e6,
                  (double)off->w->view.now_us / 1e6, (double)p99_wait_us(on) / 1e6,
                  (double)p99_wait_us(off) / 1e6);
    assert_true(3 * a <= b);
    assert_true(on->w->view.now_us <= off->w->view.now_us);
    assert_true(p99_wait_us(on) <= bound_ms * 1000);
    run_free(on);
    run_free(off);
}

/* ---- starvation ------------------------------------------------------------------------ */

/* Two of adapter 0 arrive for each that can be served; one of adapter 1 waits among them. */
static void being_overtaken_has_a_bound(void **state)
{
    (void)state;
    struct run *r = run_new(6000, 2, 400, 4, 128);
    r->w->policy.max_overtaken = 100;
    for (int i = 0; i < 8; i++)
        arrive(r, 20, (struct spec){ .adapter = &r->w->adapter[0] });
    for (int i = 0; i < 40; i++)
        step(r);
    struct seq *other = arrive(r, 20, (struct spec){ .adapter = &r->w->adapter[1] });
    int before = r->finished;
    while (r->admitted_us[other - r->w->seq] < 0 && r->w->n < 5990) {
        arrive(r, 20, (struct spec){ .adapter = &r->w->adapter[0] });
        step(r);
    }
    assert_true(r->admitted_us[other - r->w->seq] >= 0);
    int passed = r->finished - before;
    print_message("served before it: %d\n", passed);
    assert_true(passed >= 90 && passed <= 100 + 2 * 4);
    run_free(r);
}

/* A flood of higher priority, more than can be served. */
static void age_beats_any_priority(void **state)
{
    (void)state;
    struct run *r = run_new(6000, 1, 400, 4, 128);
    r->w->policy.max_wait_ms = 5000;
    for (int i = 0; i < 8; i++)
        arrive(r, 20, (struct spec){ .priority = 9 });
    step(r);
    struct seq *low = arrive(r, 20, (struct spec){ .priority = 0 });
    while (r->admitted_us[low - r->w->seq] < 0 && r->w->n < 5990) {
        arrive(r, 20, (struct spec){ .priority = 9 });
        step(r);
    }
    int64_t waited = r->admitted_us[low - r->w->seq] - r->arrived_us[low - r->w->seq];
    print_message("it waited %.1f s\n", (double)waited / 1e6);
    assert_true(waited > 5000000 && waited < 7000000);
    run_free(r);
}

/* ---- fairness -------------------------------------------------------------------------- */

static void tenants_share_alike(void **state)
{
    (void)state;
    struct run *r = run_new(4000, 4, 2000, 16, 128);
    static const char *name[] = { "greedy", "modest" };
    int done[2] = { 0 };
    for (int i = 0; i < 3000; i++)              /* nine in ten are the greedy one's */
        arrive(r, 32, (struct spec){ .tenant = name[i % 10 == 9], .max_tokens = 32,
                                     .adapter = &r->w->adapter[i % 10 == 9] });
    for (int i = 0; i < 1200; i++)
        step(r);
    for (int i = 0; i < 3000; i++)
        done[i % 10 == 9] += r->admitted_us[i] >= 0;
    print_message("served: %d of the greedy one's, %d of the modest one's\n", done[0], done[1]);
    /* A request is 32 + 2 * 32 virtual tokens; the slack is SCHED_FAIR_STEPS * 128, and 16 seats'
     * output is not yet counted. */
    int slack = (SCHED_FAIR_STEPS * 128 + 16 * 64) / 96 + 1;
    assert_true(done[1] > 150 && abs(done[0] - done[1]) <= slack + 16);
    run_free(r);
}

/* ---- everything at once ---------------------------------------------------------------- */

static void random_run(void)
{
    struct run *r = run_new(400, 1 + rnd(20), 40 + rnd(300), 1 + rnd(24), 32 + rnd(200));
    struct engine_policy *p = &r->w->policy;
    static const char *tenants[] = { NULL, "a", "b", "c" };
    p->group = rnd(2);
    p->max_overtaken = 1 + rnd(100);
    p->max_wait_ms = rnd(2) ? 1 + rnd(5000) : 0;
    p->early_abort = rnd(2);
    p->prefetch = rnd(2);
    p->adapter_slots = rnd(3) ? 0 : 1 + rnd(4);
    if (p->adapter_slots)
        p->prefetch = false;
    int total = 50 + rnd(300), left = total;
    while (left > 0) {
        for (int i = rnd(4); i > 0 && left > 0; i--, left--) {
            int64_t now = r->w->view.now_ms;
            arrive(r, 1 + rnd(200), (struct spec){
                .priority = rnd(3), .max_tokens = 1 + rnd(60), .tenant = tenants[rnd(4)],
                .adapter = rnd(3) ? &r->w->adapter[rnd(r->n_adapters)] : NULL,
                .deadline_ms = rnd(3) ? 0 : now + 1 + rnd(20000),
                .first_by_ms = rnd(3) ? 0 : now + 1 + rnd(4000) });
        }
        step(r);
    }
    run_out(r, 200000);
    assert_int_equal(r->finished + r->expired, total);
    assert_int_equal(r->w->pool.n_free + idle_blocks(r), r->w->pool.n_blocks);
    assert_int_equal(r->w->queue.n, 0);
    run_free(r);
}

static void everything_ends(void **state)
{
    (void)state;
    for (int i = 0; i < 1000; i++)
        random_run();
}

/* ---- cost ------------------------------------------------------------------------------ */

/* 512 decode with 256 adapters; 100,000 wait, also for adapters that are in the batch. */
static double planning_us(int running, int waiting)
{
    struct run *r = run_new(512 + waiting, 256, 8000, 512, 2048);
    struct world *w = r->w;
    for (int i = 0; i < 256; i++)
        w->adapter[i].res.state = RES_RESIDENT;
    for (int i = 0; i < running; i++) {
        struct seq *s = add_decode(w, 0, 100 + i % 16);
        s->req->adapter = &w->adapter[i % 256];
        s->req->adapter->res.users++;
    }
    for (int i = 0; i < waiting; i++)
        arrive(r, 100, (struct spec){ .adapter = &w->adapter[rnd(256)], .tenant = "t" });
    enum { TURNS = 400 };
    plan(w, 0);
    int64_t t0 = cpu_ns();
    for (int i = 0; i < TURNS; i++)
        sched_plan(&w->view, &w->plan);
    double us = (double)(cpu_ns() - t0) / 1e3 / TURNS;
    w->view.running.n = 0;
    run_free(r);
    return us;
}

static void planning_is_cheap(void **state)
{
    (void)state;
    double full = planning_us(512, 1000), seats = planning_us(448, 1000);
    double long_queue = planning_us(448, 20000);
    print_message("us a plan: %.1f of a full batch, %.1f with 64 admitted, %.1f with 20,000 "
                  "waiting\n", full, seats, long_queue);
    /* Bounded by the lookahead: a queue twenty times as long may cost cache misses, not more. */
    assert_true(long_queue < 6 * seats);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(grouping_meets_a_third_of_the_adapters),
        cmocka_unit_test(being_overtaken_has_a_bound),
        cmocka_unit_test(age_beats_any_priority),
        cmocka_unit_test(tenants_share_alike),
        cmocka_unit_test(everything_ends),
        cmocka_unit_test(planning_is_cheap),
    };
    return cmocka_run_group_tests_name("sched_sim", tests, NULL, NULL);
}
