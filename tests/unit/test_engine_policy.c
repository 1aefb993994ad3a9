/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine_policy.c - the scheduler's policies through the engine's own face, on a simulated
 * device: what grouping saves, what early abort serves in time, and that neither changes what ends.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine_fixture.h"

#define SHAPE "ops/shapes/llama-2-7b.json"
#define H200 "ops/devices/h200.json"
#define QKVO 0xfu

static engine *open_sim(const struct engine_policy *p, int max_seqs, size_t pool_bytes)
{
    struct engine_config c = { .shape = SHAPE, .sim = H200, .manual = true, .max_waiting = 4096,
                               .policy = p, .max_seqs = max_seqs, .pool_bytes = pool_bytes,
                               .host_adapter_bytes = (size_t)16 << 30 };
    engine *e = NULL;
    struct lm_err err = { 0 };
    if (engine_open(&c, &e, &err) != LM_OK)
        fail_msg("%s", err.msg);
    return e;
}

static int32_t ids[512];

static void submit(engine *e, engine_adapter *a, int n_prompt, int n_out, int64_t first_by_ms)
{
    struct engine_request r = fixture_request("r", ids, n_prompt);
    struct lm_err err = { 0 };
    engine_handle h;
    r.adapter = a;
    r.params.max_tokens = n_out;
    r.params.ignore_eos = true;
    r.first_token_by_ms = first_by_ms;
    if (engine_submit(e, &r, &h, &err) != LM_OK)
        fail_msg("%s", err.msg);
}

static void pump(engine *e, int64_t until_us)
{
    struct lm_err err = { 0 };
    bool idle;
    if (engine_pump(e, until_us, &idle, &err) != LM_OK)
        fail_msg("%s", err.msg);
    if (idle && until_us != INT64_MAX && engine_now_us(e) < until_us)
        assert_int_equal(engine_advance(e, until_us), LM_OK);
}

/* How many of those that ended had their first token within `us`; counts the expired. */
static int collect(engine *e, int n, int64_t us, int *expired)
{
    int in_time = 0;
    *expired = 0;
    for (int i = 0; i < n; i++) {
        struct engine_event ev;
        assert_int_equal(engine_poll(e, &ev, 1, 0, NULL), 1);
        const struct engine_result *r = ev.result;
        *expired += r->choices[0].reason == ENGINE_EXPIRED;
        in_time += r->choices[0].n_tokens > 0 && r->first_token_us <= us;
        engine_result_free(ev.result);
    }
    return in_time;
}

/* ---- grouping -------------------------------------------------------------------------- */

struct cost {
    double adapters, seconds;
};

static struct cost backlog(bool group)
{
    enum { N = 64, EACH = 8 };
    struct engine_policy p;
    struct engine_stats st;
    int expired;
    engine_policy_default(&p);
    p.group = group;
    engine *e = open_sim(&p, 32, 0);
    for (int i = 0; i < N * EACH; i++) {
        char id[16];
        struct lm_err err = { 0 };
        engine_adapter *a = NULL;
        snprintf(id, sizeof id, "a%d", (i * 37) % N);
        assert_int_equal(engine_adapter_dummy(e, id, 16, QKVO, &a, &err), LM_OK);
        submit(e, a, 20 + i % 50, 20 + i % 30, 0);
        engine_adapter_unref(a);
    }
    pump(e, INT64_MAX);
    engine_stats(e, &st);
    assert_int_equal(st.finished, N * EACH);
    collect(e, N * EACH, 0, &expired);
    assert_int_equal(expired, 0);
    struct cost c = { (double)st.step_adapters / (double)st.steps,
                      (double)engine_now_us(e) / 1e6 };
    engine_close(e);
    return c;
}

static void grouping_meets_a_third_of_the_adapters(void **state)
{
    (void)state;
    struct cost on = backlog(true), off = backlog(false);
    print_message("grouped: %.1f adapters a step, %.3f s; else %.1f, %.3f s\n", on.adapters,
                  on.seconds, off.adapters, off.seconds);
    assert_true(3 * on.adapters <= off.adapters);
    assert_true(on.seconds <= off.seconds);
}

/* ---- early abort ----------------------------------------------------------------------- */

/* Steps are measured first: 16 prompts. */
static void warm_up(engine *e)
{
    int expired;
    for (int i = 0; i < 16; i++)
        submit(e, NULL, 100 + 20 * i, 8, 0);
    pump(e, INT64_MAX);
    collect(e, 16, 0, &expired);
}

static void the_hopeless_end_at_once(void **state)
{
    (void)state;
    struct engine_policy p;
    struct engine_stats st;
    int expired;
    engine_policy_default(&p);
    for (int abort = 1; abort >= 0; abort--) {
        p.early_abort = abort;
        engine *e = open_sim(&p, 4, 0);
        warm_up(e);
        int64_t t0 = engine_now_us(e), by_ms = engine_wall_ms(e) + 3;
        for (int i = 0; i < 5; i++)
            submit(e, NULL, 500, 100, i < 4 ? 0 : by_ms);
        pump(e, t0 + 1);
        engine_stats(e, &st);
        assert_int_equal(st.early_aborts, abort);       /* 500 tokens take longer than 3 ms */
        pump(e, INT64_MAX);
        engine_stats(e, &st);
        assert_int_equal(st.early_aborts, abort);
        collect(e, 5, 0, &expired);
        assert_int_equal(expired, 1);                   /* the deadline itself holds anyway */
        engine_close(e);
    }
}

static uint64_t rng;

static double uniform(void)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (double)(rng >> 11) * 0x1p-53;
}

/* Four times what can be served, in bursts, each with 300 ms to its first token. */
static int overload(bool abort, int *expired)
{
    enum { N = 800, SLO_MS = 300 };
    struct engine_policy p;
    engine_policy_default(&p);
    p.early_abort = abort;
    engine *e = open_sim(&p, 16, 0);
    warm_up(e);
    rng = 88172645463325252u;
    int64_t t = engine_now_us(e);
    for (int i = 0; i < N; i++) {
        t += uniform() < 0.8 ? 0 : (int64_t)(uniform() * 80000);
        pump(e, t);
        /* Without early abort they are served late, as others would. */
        submit(e, NULL, 50 + (int)(uniform() * 300), 20 + (int)(uniform() * 100),
               abort ? engine_wall_ms(e) + SLO_MS : 0);
    }
    pump(e, INT64_MAX);
    int in_time = collect(e, N, SLO_MS * 1000, expired);
    engine_close(e);
    return in_time;
}

static void overload_serves_who_still_can(void **state)
{
    (void)state;
    int expired, none;
    int with = overload(true, &expired), without = overload(false, &none);
    print_message("in time: %d with early abort (%d ended), %d without\n", with, expired, without);
    assert_int_equal(none, 0);
    assert_true(with >= 2 * without);
    assert_true(with + expired >= 796);         /* who was admitted was in time, but for a few */
}

int main(void)
{
    for (size_t i = 0; i < LM_COUNT(ids); i++)
        ids[i] = 5 + (int32_t)(i * 7919 % 20000);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(grouping_meets_a_third_of_the_adapters),
        cmocka_unit_test(the_hopeless_end_at_once),
        cmocka_unit_test(overload_serves_who_still_can),
    };
    return cmocka_run_group_tests_name("engine_policy", tests, NULL, NULL);
}
