/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine_scale.c - a step costs as much with 100,000 known adapters as with 10.
 *
 * Two engines of a 7B shape on a simulated device, pumped by hand, one with 10 adapters in host
 * memory and one with 100,000, answer the same requests for adapters that both have. Three claims:
 *   counted   steps, uploads, evictions and the simulated clock are the same to the microsecond
 *   timed     processor time of the engine thread per step is the same within a factor of RATIO,
 *             the best of several rounds of each, taken in turns (a scan over what is known would
 *             make it thousands)
 *   looked up finding an adapter by id, and submitting for it, likewise
 */
#include "engine_fixture.h"

#include "cpu_clock.h"

#define MANY 100000
#define FEW 10
#define ROUNDS 7
#define SEQS 32
#define RATIO 1.5               /* caches are colder among a hundred megabytes of adapters */

struct side {
    engine *e;
    int n;
    engine_adapter **a;
    double step_ns, submit_ns;  /* the best round's */
    uint64_t steps;
    int64_t clock_us;
};

/* Ranks of 8 to 64 in turn; used are those at a few places spread over all. */
static void open_side(struct side *s, int n)
{
    struct engine_config cfg = {
        .shape = "ops/shapes/llama-2-7b.json", .sim = "ops/devices/h200.json", .manual = true,
        .pool_bytes = (size_t)16 << 30, .host_adapter_bytes = SIZE_MAX / 2,
        .max_waiting = 256,
    };
    *s = (struct side){ .e = fixture_engine(&cfg), .n = n, .step_ns = 1e18, .submit_ns = 1e18 };
    s->a = calloc((size_t)n, sizeof *s->a);
    assert_non_null(s->a);
    for (int i = 0; i < n; i++) {
        char id[32];
        snprintf(id, sizeof id, "tenant/%d", i);
        CHECK(engine_adapter_dummy(s->e, id, 8 << i % FEW % 4, 0x7f, &s->a[i], err));
    }
}

static void close_side(struct side *s)
{
    for (int i = 0; i < s->n; i++)
        engine_adapter_unref(s->a[i]);
    free(s->a);
    engine_close(s->e);
}

/* The k-th of ten adapters: the same ranks on both sides. */
static int place_of(const struct side *s, int k)
{
    return k + (s->n / FEW - 1) * k / (FEW - 1) * FEW;
}

static void submit_all(struct side *s, int round)
{
    int32_t prompt[40];
    int64_t t0 = cpu_ns();
    for (int i = 0; i < SEQS; i++) {
        char id[32];
        for (int t = 0; t < 40; t++)
            prompt[t] = 100 + t + i * 50 + round * 2000;
        struct engine_request r = fixture_request("scale", prompt, 40);
        snprintf(id, sizeof id, "tenant/%d", place_of(s, i % FEW));
        r.adapter = engine_adapter_find(s->e, id);
        assert_non_null(r.adapter);
        r.params.max_tokens = 100;
        r.params.ignore_eos = true;
        fixture_submit(s->e, &r);
        engine_adapter_unref(r.adapter);
    }
    s->submit_ns = LM_MIN(s->submit_ns, (double)(cpu_ns() - t0) / SEQS);
}

static void round_of(struct side *s, int round)
{
    struct engine_stats st;
    struct engine_event ev;
    bool idle = false;
    submit_all(s, round);
    int64_t t0 = cpu_ns();
    CHECK(engine_pump(s->e, INT64_MAX, &idle, err));
    int64_t spent = cpu_ns() - t0;
    assert_true(idle);
    for (int i = 0; i < SEQS; i++) {
        assert_int_equal(engine_poll(s->e, &ev, 1, 0, NULL), 1);
        assert_int_equal(ev.result->status, LM_OK);
        engine_result_free(ev.result);
    }
    engine_stats(s->e, &st);
    s->step_ns = LM_MIN(s->step_ns, (double)spent / (double)(st.steps - s->steps));
    s->steps = st.steps;
    s->clock_us = engine_now_us(s->e);
}

static void known_adapters_cost_nothing(void **state)
{
    (void)state;
    struct side few, many;
    struct engine_stats f, m;
    open_side(&few, FEW);
    open_side(&many, MANY);
    engine_stats(many.e, &m);
    assert_int_equal(m.adapters_host, MANY);
    assert_int_equal(place_of(&many, FEW - 1), MANY - 1);
    for (int i = 0; i < ROUNDS; i++) {
        round_of(&few, i);
        round_of(&many, i);
        assert_true(few.steps == many.steps);
    }
    engine_stats(few.e, &f);
    engine_stats(many.e, &m);
    print_message("%d known: %.1f us of processor time a step, %.1f us a submit; %d known: %.1f, "
                  "%.1f; ratios %.2f, %.2f\n", FEW, few.step_ns / 1e3, few.submit_ns / 1e3, MANY,
                  many.step_ns / 1e3, many.submit_ns / 1e3, many.step_ns / few.step_ns,
                  many.submit_ns / few.submit_ns);
    assert_true(f.adapter_loads == m.adapter_loads && f.adapter_loads == FEW);
    assert_true(f.adapter_evictions == m.adapter_evictions && f.preemptions == m.preemptions);
    assert_true(f.step_adapters == m.step_adapters && f.adapter_bytes == m.adapter_bytes);
    assert_true(few.clock_us == many.clock_us);
    assert_true(many.step_ns < RATIO * few.step_ns);
    assert_true(many.submit_ns < 2 * RATIO * few.submit_ns);
    close_side(&few);
    close_side(&many);
}

int main(void)
{
    lm_log_set_level(LM_WARN);
    const struct CMUnitTest tests[] = { cmocka_unit_test(known_adapters_cost_nothing) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
