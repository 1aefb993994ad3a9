/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine_edge.c - sizes, moments and orders that are one off: each of these once broke the
 * engine, or would without the line that it guards.
 */
#include "engine_fixture.h"

#include "engine/core.h"

#define SHAPE "ops/shapes/llama-2-7b.json"
#define H200 "ops/devices/h200.json"

static int32_t ids[512];

static struct engine_result *finished(engine *e)
{
    struct engine_event ev;
    assert_int_equal(engine_poll(e, &ev, 1, 0, NULL), 1);
    assert_int_equal(ev.kind, ENGINE_FINISHED);
    return ev.result;
}

/* ---- sizes ----------------------------------------------------------------------------- */

/* A prompt that is only scored is computed to its last token, so it has a block for that, too. */
static void scored_prompts_of_any_length(void **state)
{
    (void)state;
    for (int ahead = 0; ahead < 2; ahead++) {
        core_force_pipeline(ahead);
        struct engine_config cfg = fixture_config(SPM_TINY);
        cfg.block_tokens = 8;
        cfg.max_step_tokens = 12;
        engine *e = fixture_engine(&cfg);
        for (int n = 1; n <= 41; n++) {
            struct engine_request r = fixture_request("scored", ids, n);
            r.params.max_tokens = 0;
            r.params.echo = true;
            r.params.logprobs = 1;
            struct engine_result *got = fixture_run(e, &r);
            assert_int_equal(got->choices[0].n_logprobs, n);
            engine_result_free(got);
        }
        engine_close(e);
    }
    core_force_pipeline(false);
}

static void max_tokens_without_bound(void **state)
{
    (void)state;
    struct engine_config cfg = fixture_config(SPM_TINY);
    cfg.max_model_len = 64;
    engine *e = fixture_engine(&cfg);
    struct engine_request r = fixture_request("endless", ids, 20);
    r.params.max_tokens = INT_MAX;
    r.params.ignore_eos = true;
    struct engine_result *got = fixture_run(e, &r);
    assert_int_equal(got->choices[0].n_tokens, 44);
    engine_result_free(got);
    engine_close(e);
}

/* ---- deadlines ------------------------------------------------------------------------- */

static engine *open_sim(const struct engine_policy *p, int max_seqs, size_t pool_bytes)
{
    struct engine_config c = { .shape = SHAPE, .sim = H200, .manual = true, .policy = p,
                               .max_seqs = max_seqs, .pool_bytes = pool_bytes };
    return fixture_engine(&c);
}

static void pump(engine *e, int64_t until_us)
{
    bool idle;
    CHECK(engine_pump(e, until_us, &idle, err));
}

/* The first choice has begun in time, so the second, which waits for its turn, isn't late. */
static void the_first_token_of_any_choice_counts(void **state)
{
    (void)state;
    struct engine_policy p;
    engine_policy_default(&p);
    for (int abort = 0; abort < 2; abort++) {
        p.early_abort = abort;
        engine *e = open_sim(&p, 1, 0);
        struct engine_request r = fixture_request("two", ids, 64);
        engine_handle h;
        r.params.n = 2;
        r.params.max_tokens = 100;
        r.params.ignore_eos = true;
        r.first_token_by_ms = engine_wall_ms(e) + 100;
        CHECK(engine_submit(e, &r, &h, err));
        pump(e, INT64_MAX);
        struct engine_result *got = finished(e);
        assert_true(got->first_token_us < 100000 && got->finished_us > 200000);
        for (int i = 0; i < 2; i++)
            assert_int_equal(got->choices[i].reason, ENGINE_LENGTH);
        engine_result_free(got);
        engine_close(e);
    }
}

/* A device that once hung for a minute is not believed to be that slow for ever: what is refused
 * on a measurement is refused on a fresh one only. */
static void one_slow_step_does_not_refuse_for_ever(void **state)
{
    (void)state;
    engine *e = open_sim(NULL, 4, 0);
    struct engine_request r = fixture_request("r", ids, 64);
    engine_handle h;
    int served = 0;
    r.params.max_tokens = 50;
    r.params.ignore_eos = true;
    CHECK(engine_submit(e, &r, &h, err));
    pump(e, INT64_MAX);
    engine_result_free(finished(e));
    CHECK(engine_submit(e, &r, &h, err));
    pump(e, engine_now_us(e) + 1);      /* a step is under way */
    assert_int_equal(engine_advance(e, engine_now_us(e) + 60000000), LM_OK);
    pump(e, INT64_MAX);
    engine_result_free(finished(e));
    for (int i = 0; i < 60; i++) {
        assert_int_equal(engine_advance(e, engine_now_us(e) + 1000000), LM_OK);
        r.first_token_by_ms = engine_wall_ms(e) + 100;
        CHECK(engine_submit(e, &r, &h, err));
        pump(e, INT64_MAX);
        struct engine_result *got = finished(e);
        served += got->choices[0].reason == ENGINE_LENGTH;
        engine_result_free(got);
    }
    print_message("%d of 60 were served\n", served);
    assert_true(served > 40);
    engine_close(e);
}

int main(void)
{
    lm_log_set_level(LM_WARN);
    for (size_t i = 0; i < LM_COUNT(ids); i++)
        ids[i] = 5 + (int32_t)(i * 7919 % 700);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(scored_prompts_of_any_length),
        cmocka_unit_test(max_tokens_without_bound),
        cmocka_unit_test(the_first_token_of_any_choice_counts),
        cmocka_unit_test(one_slow_step_does_not_refuse_for_ever),
    };
    return cmocka_run_group_tests_name("engine_edge", tests, NULL, NULL);
}
