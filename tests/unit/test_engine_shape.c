/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine_shape.c - engines made of a shape alone, adapters made of a rank alone, and simulated
 * time: what `loramill bench` stands on.
 */
#include "engine_fixture.h"

#include <unistd.h>

#include "engine/dummy.h"

#define TINY "tests/models/spm-tiny/config.json"
#define H200 "ops/devices/h200.json"
#define QKVO 0xfu

static engine *open_shape(const char *shape, const char *sim, size_t host_bytes)
{
    struct engine_config c = { .shape = shape, .sim = sim, .backend = sim ? NULL : "cpu",
                               .threads = 1, .manual = sim != NULL, .max_waiting = 64,
                               .host_adapter_bytes = host_bytes,
                               .pool_bytes = sim ? 0 : 4 << 20 };
    engine *e = NULL;
    struct lm_err err = { 0 };
    if (engine_open(&c, &e, &err) != LM_OK)
        fail_msg("%s: %s", shape, err.msg);
    return e;
}

static engine_adapter *dummy(engine *e, const char *id, int rank, unsigned modules)
{
    engine_adapter *a = NULL;
    struct lm_err err = { 0 };
    if (engine_adapter_dummy(e, id, rank, modules, &a, &err) != LM_OK)
        fail_msg("%s", err.msg);
    return a;
}

static const int32_t ids[] = { 5, 6, 7, 8, 9 };

static struct engine_request ids_request(engine_adapter *a, int max_tokens)
{
    struct engine_request r = fixture_request("shape", ids, (int)LM_COUNT(ids));
    r.adapter = a;
    r.params.max_tokens = max_tokens;
    r.params.ignore_eos = true;
    return r;
}

/* Pumps a simulated engine until the one request has ended. */
static struct engine_result *pump_one(engine *e, const struct engine_request *r)
{
    struct lm_err err = { 0 };
    engine_handle h;
    struct engine_event ev;
    bool idle = false;
    assert_int_equal(engine_submit(e, r, &h, &err), LM_OK);
    if (engine_pump(e, INT64_MAX, &idle, &err) != LM_OK)
        fail_msg("%s", err.msg);
    assert_true(idle);
    assert_int_equal(engine_poll(e, &ev, 1, 0, NULL), 1);
    assert_int_equal(ev.kind, ENGINE_FINISHED);
    return ev.result;
}

/* ---- shapes ---------------------------------------------------------------------------- */

static void shapes_have_their_sizes(void **state)
{
    (void)state;
    static const struct { const char *name; double billions; } want[] = {
        { "llama-7b", 6.738 }, { "llama-13b", 13.016 }, { "llama-2-7b", 6.738 },
        { "llama-2-13b", 13.016 }, { "llama-3.1-8b", 8.030 }, { "llama-3.1-70b", 70.554 },
        { "mistral-7b", 7.248 }, { "qwen2.5-7b", 7.616 }, { "llama-30b-m", 30.4 },
        { "llama-70b-m", 70.3 },
    };
    for (size_t i = 0; i < LM_COUNT(want); i++) {
        char path[128];
        struct engine_info info;
        snprintf(path, sizeof path, "ops/shapes/%s.json", want[i].name);
        if (want[i].billions > 60)      /* larger than the device */
            continue;
        engine *e = open_shape(path, H200, 0);
        engine_info(e, &info);
        double got = (double)info.weight_bytes / 2e9;
        if (got < want[i].billions * 0.999 || got > want[i].billions * 1.001)
            fail_msg("%s: %.3f billion weights, not %.3f", path, got, want[i].billions);
        assert_string_equal(info.model_name, want[i].name);
        assert_null(info.chat_family);
        engine_close(e);
    }
}

static void too_large_a_shape_is_refused(void **state)
{
    (void)state;
    struct engine_config c = { .shape = "ops/shapes/llama-70b-m.json", .sim = H200,
                               .manual = true };
    engine *e = NULL;
    struct lm_err err = { 0 };
    assert_int_equal(engine_open(&c, &e, &err), LM_NOMEM);
    assert_non_null(strstr(err.msg, "left of the simulated device"));
}

/* A group of four has the room, and answers. */
static void a_group_holds_a_large_shape(void **state)
{
    (void)state;
    engine *e = open_shape("ops/shapes/llama-3.1-70b.json", "ops/devices/a100-80-x4.json", 0);
    struct engine_request r = ids_request(NULL, 11);
    struct engine_result *res = pump_one(e, &r);
    assert_int_equal(res->choices[0].n_tokens, 11);
    /* 141 GB of weights over four devices of 1.6 TB/s: 22 ms, and two reductions a layer. */
    assert_in_range((res->finished_us - res->first_token_us) / 10, 22000, 35000);
    engine_result_free(res);
    engine_close(e);
}

static void bad_combinations(void **state)
{
    (void)state;
    struct engine_config c = { .shape = TINY, .model_dir = "tests/models/spm-tiny" };
    engine *e = NULL;
    struct lm_err err = { 0 };
    assert_int_equal(engine_open(&c, &e, &err), LM_INVALID);
    assert_non_null(strstr(err.msg, "both given"));
    c = (struct engine_config){ .shape = TINY, .sim = H200, .backend = "cpu" };
    assert_int_equal(engine_open(&c, &e, &err), LM_INVALID);
    assert_non_null(strstr(err.msg, "backend 'sim'"));
    c = (struct engine_config){ .shape = "ops/shapes/none.json" };
    assert_int_equal(engine_open(&c, &e, &err), LM_NOT_FOUND);
}

static void ids_in_and_out_on_the_cpu(void **state)
{
    (void)state;
    engine *e = open_shape(TINY, NULL, 0);
    engine_adapter *a = dummy(e, "stand-in", 8, 0x7f);
    struct engine_request r = ids_request(NULL, 20), with = ids_request(a, 20);
    struct engine_result *base = fixture_run(e, &r), *lora = fixture_run(e, &with);
    assert_int_equal(base->status, LM_OK);
    assert_int_equal(base->choices[0].n_tokens, 20);
    assert_int_equal(base->choices[0].reason, ENGINE_LENGTH);
    assert_string_equal(base->choices[0].text, "");
    assert_int_equal(lora->choices[0].n_tokens, 20);
    with.params.logprobs = 2;
    struct engine_result *scored = fixture_run(e, &with);
    assert_int_equal(scored->choices[0].n_logprobs, 20);
    assert_true(isfinite(scored->choices[0].logprobs[7].logprob));
    assert_string_equal(scored->choices[0].logprobs[7].text, "");
    engine_result_free(base);
    engine_result_free(lora);
    engine_result_free(scored);
    engine_adapter_unref(a);
    engine_close(e);
}

static void text_needs_a_tokenizer(void **state)
{
    (void)state;
    engine *e = open_shape(TINY, NULL, 0);
    struct engine_request r = fixture_request("text", NULL, 0);
    struct lm_err err = { 0 };
    engine_handle h;
    r.prompt = "words";
    r.prompt_len = 5;
    assert_int_equal(engine_submit(e, &r, &h, &err), LM_UNSUPPORTED);
    assert_non_null(strstr(err.msg, "no tokenizer"));
    r = ids_request(NULL, 5);
    r.params.stop[0] = "x";
    r.params.n_stop = 1;
    assert_int_equal(engine_submit(e, &r, &h, &err), LM_UNSUPPORTED);
    r.params.n_stop = 0;
    r.params.echo = true;
    assert_int_equal(engine_submit(e, &r, &h, &err), LM_UNSUPPORTED);
    engine_close(e);
}

/* ---- stand-ins for adapters ------------------------------------------------------------ */

static void *heap_alloc(void *ctx, size_t bytes)
{
    (void)ctx;
    return malloc(bytes);
}

static void heap_free(void *ctx, void *p)
{
    (void)ctx;
    free(p);
}

static void sizes_are_those_of_packed_ones(void **state)
{
    (void)state;
    struct model_config m;
    assert_int_equal(model_config_load_file(TINY, &m, NULL), LM_OK);
    for (int rank = 1; rank <= 40; rank += 13) {
        for (unsigned modules = 1; modules < 0x80; modules += 18) {
            struct adapter_image sized = { 0 }, packed = { 0 };
            struct adapter_alloc heap = { .alloc = heap_alloc, .free = heap_free };
            assert_int_equal(dummy_image(&m, rank, modules, KN_F32, 8192, NULL, &sized, NULL),
                             LM_OK);
            assert_int_equal(dummy_image(&m, rank, modules, KN_F32, 8192, &heap, &packed, NULL),
                             LM_OK);
            assert_null(sized.cells);
            assert_int_equal(sized.n_cells, packed.n_cells);
            assert_int_equal(sized.rank_max, rank);
            assert_memory_equal(sized.module_rank, packed.module_rank, sizeof sized.module_rank);
            for (int i = 0; i < KN_MODULES; i++)
                assert_int_equal(sized.module_rank[i], modules >> i & 1 ? rank : 0);
            adapter_image_release(&packed, &heap);
        }
    }
    model_config_release(&m);
}

static void bad_stand_ins(void **state)
{
    (void)state;
    engine *e = open_shape("ops/shapes/llama-7b.json", H200, 0);
    engine_adapter *a;
    struct lm_err err = { 0 };
    assert_int_equal(engine_adapter_dummy(e, "a", 0, QKVO, &a, &err), LM_INVALID);
    assert_non_null(strstr(err.msg, "stand-in 'a'"));
    assert_int_equal(engine_adapter_dummy(e, "a", 8, 0, &a, &err), LM_INVALID);
    assert_int_equal(engine_adapter_dummy(e, "a", 8, 0x80, &a, &err), LM_INVALID);
    assert_int_equal(engine_adapter_dummy(e, "../a", 8, QKVO, &a, &err), LM_INVALID);
    engine_close(e);
}

/* rank 8 on q, k, v and o of llama-7b: 16 MiB of weights, S-LoRA's figure, and little more. */
static void many_are_known_within_the_budget(void **state)
{
    (void)state;
    enum { KNOWN = 20000, FIT = 100 };
    engine *e = open_shape("ops/shapes/llama-7b.json", H200, 0);
    engine_adapter *a = dummy(e, "one", 8, QKVO);
    size_t bytes = engine_adapter_bytes(a);
    assert_in_range(bytes, 16 << 20, (16 << 20) + (1 << 20));
    engine_adapter_unref(a);
    engine_close(e);

    e = open_shape("ops/shapes/llama-7b.json", H200, bytes * FIT);
    for (int i = 0; i < KNOWN; i++) {
        char id[32];
        snprintf(id, sizeof id, "adapter-%d", i);
        engine_adapter_unref(dummy(e, id, 8, QKVO));
    }
    struct engine_stats s;
    engine_stats(e, &s);
    assert_int_equal(s.adapters_host, FIT);
    assert_null(engine_adapter_find(e, "adapter-0"));
    a = engine_adapter_find(e, "adapter-19999");
    assert_non_null(a);
    engine_adapter *same = dummy(e, "adapter-19999", 8, QKVO);
    assert_ptr_equal(a, same);
    engine_adapter *other = dummy(e, "adapter-19999", 16, QKVO);    /* a new version */
    assert_ptr_not_equal(a, other);
    engine_adapter_unref(a);
    engine_adapter_unref(same);
    engine_adapter_unref(other);
    engine_close(e);
}

#define MANY 1000
#define MIXED 4                 /* ranks: 8, 16, 32, 64 */
#define AT_ONCE 40

/* Requests for adapters i0 .. i0 + AT_ONCE - 1; the log-probability of each first token. */
static void run_some(engine *e, engine_adapter **a, int i0, float *score)
{
    struct lm_err err = { 0 };
    engine_handle h;
    for (int i = i0; i < i0 + AT_ONCE; i++) {
        struct engine_request r = ids_request(a[i], 3);
        r.params.logprobs = 1;
        r.user = (void *)(intptr_t)i;
        if (engine_submit(e, &r, &h, &err) != LM_OK)
            fail_msg("%s", err.msg);
    }
    for (int n = 0; n < AT_ONCE; n++) {
        struct engine_event ev = fixture_finished(e);
        assert_int_equal(ev.result->status, LM_OK);
        score[(intptr_t)ev.user] = ev.result->choices[0].logprobs[0].logprob;
        engine_result_free(ev.result);
    }
}

/* Those of a rank share their bytes in host memory, so they are made at once; in a pool of a few
 * dozen each comes, answers as its like do, and goes. */
static void a_thousand_of_mixed_ranks(void **state)
{
    (void)state;
    static engine_adapter *a[MANY];
    static float score[MANY];
    struct engine_stats s;
    engine *e = open_shape(TINY, NULL, (size_t)1 << 40);
    for (int i = 0; i < MANY; i++) {
        char id[32];
        snprintf(id, sizeof id, "adapter-%d", i);
        a[i] = dummy(e, id, 8 << i % MIXED, QKVO);
    }
    engine_stats(e, &s);
    assert_int_equal(s.adapters_host, MANY);
    for (int i = 0; i < MANY; i += AT_ONCE)
        run_some(e, a, i, score);
    for (int i = MIXED; i < MANY; i++)
        assert_float_equal(score[i], score[i % MIXED], 1e-4);
    engine_stats(e, &s);
    assert_true(s.adapter_loads >= MANY && s.adapter_evictions > MANY / 2);
    for (int i = 0; i < MANY; i++)
        engine_adapter_unref(a[i]);
    engine_close(e);
}

/* ---- simulated time -------------------------------------------------------------------- */

static void time_is_what_the_device_takes(void **state)
{
    (void)state;
    engine *e = open_shape("ops/shapes/llama-2-7b.json", H200, 0);
    struct engine_request r = ids_request(NULL, 101);
    struct engine_result *res = pump_one(e, &r);
    assert_int_equal(res->choices[0].n_tokens, 101);
    double step_us = (double)(res->finished_us - res->first_token_us) / 100;
    /* 13.2 GB of weights take 3.7 ms, measured; a step of one token adds some hundred launches. */
    if (step_us < 3700 || step_us > 4800)
        fail_msg("a step takes %.0f us", step_us);
    engine_result_free(res);
    engine_close(e);
}

static void runs_repeat_exactly(void **state)
{
    (void)state;
    int64_t end[2];
    int32_t last[2];
    for (int i = 0; i < 2; i++) {
        engine *e = open_shape("ops/shapes/llama-3.1-8b.json", H200, 0);
        engine_adapter *a = dummy(e, "a", 32, 0x7f);
        struct engine_request r = ids_request(a, 50);
        struct engine_result *res = pump_one(e, &r);
        end[i] = engine_now_us(e);
        last[i] = res->choices[0].token_ids[49];
        assert_true(res->adapter_us > 0);
        engine_result_free(res);
        engine_adapter_unref(a);
        engine_close(e);
    }
    assert_int_equal(end[0], end[1]);
    assert_int_equal(last[0], last[1]);
}

static void deadlines_are_simulated_too(void **state)
{
    (void)state;
    engine *e = open_shape("ops/shapes/llama-2-7b.json", H200, 0);
    struct engine_request r = ids_request(NULL, 1000);
    assert_int_equal(engine_advance(e, 5000000), LM_OK);
    assert_int_equal(engine_now_us(e), 5000000);
    assert_int_equal(engine_wall_ms(e), 5000);
    r.deadline_ms = 5500;               /* some 120 tokens */
    struct engine_result *res = pump_one(e, &r);
    assert_int_equal(res->choices[0].reason, ENGINE_EXPIRED);
    assert_in_range(res->choices[0].n_tokens, 50, 140);
    assert_in_range(engine_now_us(e), 5500000, 5520000);
    engine_result_free(res);
    engine_close(e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shapes_have_their_sizes),
        cmocka_unit_test(too_large_a_shape_is_refused),
        cmocka_unit_test(a_group_holds_a_large_shape),
        cmocka_unit_test(bad_combinations),
        cmocka_unit_test(ids_in_and_out_on_the_cpu),
        cmocka_unit_test(text_needs_a_tokenizer),
        cmocka_unit_test(sizes_are_those_of_packed_ones),
        cmocka_unit_test(bad_stand_ins),
        cmocka_unit_test(many_are_known_within_the_budget),
        cmocka_unit_test(a_thousand_of_mixed_ranks),
        cmocka_unit_test(time_is_what_the_device_takes),
        cmocka_unit_test(runs_repeat_exactly),
        cmocka_unit_test(deadlines_are_simulated_too),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
