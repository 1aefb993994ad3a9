/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_merge.c - merged mode: the judge's rules one by one, on a clock of its own; then engines
 * that merge whenever one adapter is alone. What they say merged is what they say unmerged, to the
 * weights' tolerance, and after unmerging the base model's log-probabilities are the same bit for
 * bit.
 */
#include "engine_fixture.h"

#include "engine/core.h"
#include "engine/merge.h"

/* ---- the judge ------------------------------------------------------------------------- */

static struct merge_judge new_judge(void)
{
    return (struct merge_judge){ .lim = { .after_us = 1000, .steps = 4, .min_gain = 0.1 } };
}

static void steps(struct merge_judge *j, bool merged, int n, int64_t us, int times)
{
    for (int i = 0; i < times; i++)
        merge_judge_step(j, merged, n, us);
}

static void an_owner_must_last(void **state)
{
    (void)state;
    struct merge_judge j = new_judge();
    assert_int_equal(merge_judge(&j, 7, false, 0), MERGE_STAY);
    steps(&j, false, 8, 100, 10);
    assert_int_equal(merge_judge(&j, 7, false, 999), MERGE_STAY);
    assert_int_equal(merge_judge(&j, 0, false, 1000), MERGE_STAY);      /* someone else came */
    assert_int_equal(merge_judge(&j, 7, false, 1001), MERGE_STAY);
    assert_int_equal(merge_judge(&j, 9, false, 1500), MERGE_STAY);      /* another one */
    assert_int_equal(merge_judge(&j, 9, false, 2600), MERGE_STAY);      /* but nothing measured */
    steps(&j, false, 8, 100, 4);
    assert_int_equal(merge_judge(&j, 9, false, 2601), MERGE_DO);
    assert_int_equal(j.state, MERGE_TRIAL);
}

static void start_trial(struct merge_judge *j)
{
    *j = new_judge();
    merge_judge(j, 7, false, 0);
    steps(j, false, 8, 100, 10);
    steps(j, false, 64, 1000, 10);
    assert_int_equal(merge_judge(j, 7, false, 1000), MERGE_DO);
}

static void a_gain_keeps_it(void **state)
{
    (void)state;
    struct merge_judge j;
    start_trial(&j);
    steps(&j, true, 40, 10, 10);        /* another size: says nothing */
    assert_int_equal(merge_judge(&j, 7, false, 1001), MERGE_STAY);
    assert_int_equal(j.state, MERGE_TRIAL);
    steps(&j, true, 9, 85, 4);
    assert_int_equal(merge_judge(&j, 0, false, 1002), MERGE_STAY);      /* others only wait */
    assert_int_equal(j.state, MERGE_ON);
    assert_int_equal(merge_judge(&j, 0, true, 1003), MERGE_UNDO);       /* one runs */
    assert_int_equal(j.state, MERGE_OFF);
    assert_int_equal(merge_judge(&j, 7, false, 1004), MERGE_STAY);      /* from the beginning */
}

static void no_gain_is_not_tried_again(void **state)
{
    (void)state;
    struct merge_judge j;
    start_trial(&j);
    steps(&j, true, 8, 95, 4);
    assert_int_equal(merge_judge(&j, 7, false, 1001), MERGE_UNDO);
    steps(&j, false, 8, 100, 10);
    assert_int_equal(merge_judge(&j, 7, false, 9000), MERGE_STAY);
    assert_int_equal(merge_judge(&j, 8, false, 9001), MERGE_STAY);
    steps(&j, false, 8, 100, 10);
    assert_int_equal(merge_judge(&j, 8, false, 19001), MERGE_DO);
}

static void a_trial_ends_for_others(void **state)
{
    (void)state;
    struct merge_judge j;
    start_trial(&j);
    assert_int_equal(merge_judge(&j, 0, true, 1001), MERGE_UNDO);
    assert_int_equal(j.rejected, 0);
}

/* ---- the engine ------------------------------------------------------------------------ */

/*
 * A model of each dtype. With float32 weights merging is a reordering of sums, so the engine's own
 * bound holds, and proves that every module went where it belongs. Else it rounds each targeted
 * weight once more, by up to the dtype's unit roundoff u (test_kernels_lora holds it to that).
 *
 * What that may do to an answer is measured on the same model, prompt and adapter, as the largest
 * move of a log-probability between `weights` and `other`: the finer of the two rounded at load to
 * the rougher, with `times` u as unit roundoff. To first order answers move in proportion to that,
 * and merging rounds some of the weights where loading rounded all of them. Both are draws of one
 * kind, so one largest move is held against ROUNDINGS of the other.
 */
struct model {
    const char *name, *dir, *adapter[2];
    enum engine_weights weights;        /* of the engines that are compared */
    enum engine_weights other;
    double times;               /* 0: the bound is SUMS */
};

#define SUMS 1e-4
#define ROUNDINGS 2

static const struct model models[] = {
    { "float32", "tests/fixtures/families/qwen2-window/model",
      { "tests/fixtures/families/qwen2-window/adapters/full-names",
        "tests/fixtures/families/qwen2-window/adapters/full-names" },
      ENGINE_WEIGHTS_AUTO, ENGINE_WEIGHTS_AUTO, 0 },
    { "float16", SPM_TINY, { "tests/models/spm-tiny-adapters/captain-sal",
                             "tests/models/spm-tiny-adapters/nordwind-terse" },
      ENGINE_WEIGHTS_AUTO, ENGINE_WEIGHTS_BF16, 8 },
    { "bfloat16", "tests/fixtures/families/mistral/model",      /* stored in float16 */
      { "tests/fixtures/families/mistral/adapters/fan-in",
        "tests/fixtures/families/mistral/adapters/layers-pattern" },
      ENGINE_WEIGHTS_BF16, ENGINE_WEIGHTS_AUTO, 1 },
    { "bfloat16, two ranks", "tests/fixtures/families/llama2/model",
      { "tests/fixtures/families/llama2/adapters/list",
        "tests/fixtures/families/llama2/adapters/patterns" },
      ENGINE_WEIGHTS_AUTO, ENGINE_WEIGHTS_FP8, 16 },
};

#define LONG 120                /* tokens */

static const int32_t ids[6] = { 40, 41, 42, 43, 44, 45 };

static struct engine_request request(engine_adapter *a, int max_tokens)
{
    struct engine_request r = fixture_request("merge", ids, 6);
    r.adapter = a;
    r.params.max_tokens = max_tokens;
    r.params.ignore_eos = true;
    r.params.logprobs = 2;
    r.params.echo = true;
    return r;
}

static struct engine_result *ask(engine *e, engine_adapter *a)
{
    struct engine_request r = request(a, 24);
    return fixture_run(e, &r);
}

/* Log-probabilities equal within `tol`, 0: bit for bit; until a token differs, which may only be
 * where the best two are nearer than that. Frees both. */
static void same(struct engine_result *a, struct engine_result *b, double tol)
{
    const struct engine_choice *x = &a->choices[0], *y = &b->choices[0];
    int n = 0;
    assert_int_equal(x->n_logprobs, y->n_logprobs);
    for (int i = 1; i < x->n_logprobs; i++) {
        const struct engine_token *t = &x->logprobs[i], *u = &y->logprobs[i];
        if (t->id != u->id) {
            assert_true((double)t->top[0].logprob - (double)t->top[1].logprob <= 2 * tol);
            break;
        }
        if (fabs((double)t->logprob - (double)u->logprob) > tol)
            fail_msg("token %d: %.9g, %.9g, tolerance %g", i, (double)t->logprob,
                     (double)u->logprob, tol);
        n++;
    }
    assert_true(n >= 6);
    engine_result_free(a);
    engine_result_free(b);
}

static uint64_t merged_steps(engine *e, uint64_t *merges)
{
    struct engine_stats st;
    engine_stats(e, &st);
    *merges = st.merges;
    return st.merged_steps;
}

struct pair {
    struct fixture_dir dir;
    engine *plain, *merging;
    engine_adapter *a[2], *b[2];        /* the former's, the latter's */
    double tol[2];              /* with each adapter */
};

static engine *open_engine(const char *dir, bool merge, enum engine_weights weights)
{
    struct engine_policy policy;
    struct engine_config cfg = fixture_config(dir);
    engine_policy_default(&policy);
    policy.merge = merge;
    policy.prefix_cache = false;
    cfg.policy = &policy;
    cfg.weights = weights;
    core_force_merge(merge);
    engine *e = fixture_engine(&cfg);
    core_force_merge(false);
    return e;
}

/* The largest move of a log-probability, as far as the words are the same. Frees both. */
static double largest_move(struct engine_result *a, struct engine_result *b)
{
    const struct engine_choice *x = &a->choices[0], *y = &b->choices[0];
    double most = 0;
    for (int i = 1; i < x->n_logprobs && x->logprobs[i].id == y->logprobs[i].id; i++)
        most = fmax(most, fabs((double)x->logprobs[i].logprob - (double)y->logprobs[i].logprob));
    engine_result_free(a);
    engine_result_free(b);
    return most;
}

/* What roundings of the weights do to answers with each adapter. */
static void measure(struct pair *p, const struct model *m)
{
    engine *other = open_engine(p->dir.path, false, m->other);
    for (int i = 0; i < 2; i++) {
        engine_adapter *a;
        CHECK(engine_adapter_load(other, i ? "b" : "a", m->adapter[i], &a, err));
        struct engine_request r = request(p->a[i], LONG), s = request(a, LONG);
        double move = largest_move(fixture_run(p->plain, &r), fixture_run(other, &s)) / m->times;
        p->tol[i] = SUMS + ROUNDINGS * move;
        print_message("%s, adapter %d: %g allowed\n", m->name, i, p->tol[i]);
        engine_adapter_unref(a);
    }
    engine_close(other);
}

static void pair_open(struct pair *p, const struct model *m)
{
    *p = (struct pair){ .dir = fixture_open(m->dir), .tol = { SUMS, SUMS } };
    p->plain = open_engine(p->dir.path, false, m->weights);
    p->merging = open_engine(p->dir.path, true, m->weights);
    for (int i = 0; i < 2; i++) {
        CHECK(engine_adapter_load(p->plain, i ? "b" : "a", m->adapter[i], &p->a[i], err));
        CHECK(engine_adapter_load(p->merging, i ? "b" : "a", m->adapter[i], &p->b[i], err));
    }
    if (m->times > 0)
        measure(p, m);
}

static void pair_close(struct pair *p)
{
    for (int i = 0; i < 2; i++) {
        engine_adapter_unref(p->a[i]);
        engine_adapter_unref(p->b[i]);
    }
    engine_close(p->plain);
    engine_close(p->merging);
    fixture_close(&p->dir);
}

static void merged_says_the_same(void **state)
{
    const struct model *m = *state;
    struct pair p;
    uint64_t merges, before, after;
    pair_open(&p, m);
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < 2; i++) {
            before = merged_steps(p.merging, &merges);
            same(ask(p.plain, p.a[i]), ask(p.merging, p.b[i]), p.tol[i]);
            after = merged_steps(p.merging, &merges);
            assert_int_equal(merges, (uint64_t)(round * 2 + i + 1));
            assert_true(after >= before + 23);  /* the first one takes the other adapter out */
        }
        same(ask(p.plain, NULL), ask(p.merging, NULL), 0);      /* not a bit is left */
        assert_int_equal(merged_steps(p.merging, &merges), after);
    }
    pair_close(&p);
}

/* An owner is merged while it runs alone; the base model comes in the middle, both go on. */
static void company_comes_and_goes(void **state)
{
    const struct model *m = *state;
    struct pair p;
    uint64_t merges, steps_merged = 0;
    pair_open(&p, m);
    struct engine_request r = request(p.a[0], LONG);
    struct engine_result *want = fixture_run(p.plain, &r), *got = NULL;
    r.adapter = p.b[0];
    engine_handle h = fixture_submit(p.merging, &r);
    while (steps_merged < 20)
        steps_merged = merged_steps(p.merging, &merges);
    struct engine_request other = request(NULL, 4);
    fixture_submit(p.merging, &other);
    for (int i = 0; i < 2; i++) {
        struct engine_event ev = fixture_finished(p.merging);
        if (ev.handle == h)
            got = ev.result;
        else
            same(fixture_run(p.plain, &other), ev.result, SUMS);        /* in company */
    }
    same(want, got, p.tol[0]);
    pair_close(&p);
}

#define MODEL(test, i) { #test, test, NULL, NULL, (void *)(uintptr_t)&models[i] }

static int pipelined(void **state)
{
    (void)state;
    core_force_pipeline(true);
    return 0;
}

int main(void)
{
    lm_log_set_level(LM_WARN);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_owner_must_last),
        cmocka_unit_test(a_gain_keeps_it),
        cmocka_unit_test(no_gain_is_not_tried_again),
        cmocka_unit_test(a_trial_ends_for_others),
        MODEL(merged_says_the_same, 0),
        MODEL(merged_says_the_same, 1),
        MODEL(merged_says_the_same, 2),
        MODEL(merged_says_the_same, 3),
        MODEL(company_comes_and_goes, 0),
        MODEL(company_comes_and_goes, 1),
        MODEL(company_comes_and_goes, 2),
        MODEL(company_comes_and_goes, 3),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    return failed + cmocka_run_group_tests_name("pipelined", tests, pipelined, NULL);
}
