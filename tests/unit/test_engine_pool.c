/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine_pool.c - one pool for both kinds, in a running engine.
 *
 *   swing     one engine, never restarted: its pool is driven to over 90 % adapters, then to over
 *             90 % KV cache that running sequences hold, and back, twice; everything is answered as
 *             by a roomy engine
 *   refusals  what can never fit is refused with the numbers, what just fits is served, and a split
 *             pool (for measuring) keeps to its halves
 *   prefixes  what is found counts in prefix_hit_tokens; n > 1 computes its prompt once; versions
 *             and a switched-off cache find nothing; scored prompts are computed in full
 *
 * Engines are pumped by hand, turn by turn, so peaks are exact.
 */
#include "engine_fixture.h"

#define ADAPTERS "tests/models/spm-tiny-adapters"
#define POOL 64
#define IDS 24
#define LONG 480                /* tokens: 30 blocks */

static struct engine_info info;
static struct engine_stats peak;

static engine *open_pool(int blocks, const struct engine_policy *policy)
{
    struct engine_config cfg = fixture_config(SPM_TINY);
    engine *e = fixture_engine(&cfg);
    engine_info(e, &info);
    size_t row = info.block_bytes * (size_t)info.n_layers;
    engine_close(e);
    cfg.pool_bytes = row * (size_t)blocks;
    cfg.manual = true;
    cfg.policy = policy;
    e = fixture_engine(&cfg);
    engine_info(e, &info);
    assert_int_equal(info.pool_blocks, blocks);
    return e;
}

/* Turn by turn until nothing is left to do; keeps the peaks of both kinds. */
static void pump(engine *e)
{
    struct engine_stats st;
    peak = (struct engine_stats){ 0 };
    for (bool idle = false; !idle;) {
        CHECK(engine_pump(e, engine_now_us(e) + 1, &idle, err));
        engine_stats(e, &st);
        peak.adapter_blocks = LM_MAX(peak.adapter_blocks, st.adapter_blocks);
        peak.kv_blocks = LM_MAX(peak.kv_blocks, st.kv_blocks);
        peak.running = LM_MAX(peak.running, st.running);
    }
}

static struct engine_result *next_result(engine *e)
{
    struct engine_event ev;
    assert_int_equal(engine_poll(e, &ev, 1, 0, NULL), 1);
    assert_int_equal(ev.kind, ENGINE_FINISHED);
    if (ev.result->status != LM_OK)
        fail_msg("%s", ev.result->error);
    return ev.result;
}

static struct engine_result *run(engine *e, const struct engine_request *r)
{
    fixture_submit(e, r);
    pump(e);
    return next_result(e);
}

static int32_t prompt[512];

static void make_prompt(int salt)
{
    for (int i = 0; i < 512; i++)
        prompt[i] = 5 + (i * 7 + i / 13 + salt * 101) % 700;
}

static struct engine_request request(engine_adapter *a, int n_prompt, int max_tokens)
{
    struct engine_request r = fixture_request("pool", prompt, n_prompt);
    r.adapter = a;
    r.params.max_tokens = max_tokens;
    r.params.ignore_eos = true;
    return r;
}

/* ---- swing ----------------------------------------------------------------------------- */

struct answer {
    int32_t id[32];
    int n;
};

static void keep(struct answer *a, struct engine_result *r)
{
    a->n = r->choices[0].n_tokens;
    assert_in_range(a->n, 1, 32);
    memcpy(a->id, r->choices[0].token_ids, (size_t)a->n * sizeof *a->id);
    engine_result_free(r);
}

static void same(const struct answer *want, struct engine_result *r)
{
    assert_int_equal(r->choices[0].n_tokens, want->n);
    assert_memory_equal(r->choices[0].token_ids, want->id, (size_t)want->n * sizeof *want->id);
    engine_result_free(r);
}

static void load_all(engine *e, engine_adapter **a)
{
    char id[32];
    for (int i = 0; i < IDS; i++) {
        snprintf(id, sizeof id, "tenant/%d", i);
        CHECK(engine_adapter_load(e, id, i % 2 ? ADAPTERS "/captain-sal" : ADAPTERS
                                  "/nordwind-terse", &a[i], err));
    }
}

/* One after the other; idle once its request has ended, each stays until someone needs the room. */
static void fill_with_adapters(engine *e, engine_adapter *const *a, const struct answer *want)
{
    struct engine_stats st;
    for (int i = 0; i < IDS; i++) {
        make_prompt(i % 4);
        struct engine_request r = request(a[i], 6, 5);
        same(&want[i % 4], run(e, &r));
    }
    engine_stats(e, &st);
    print_message("%d of %d blocks hold adapters\n", st.adapter_blocks, POOL);
    assert_true(st.adapter_blocks * 10 > POOL * 9);
}

/* Two sequences that hold 31 blocks each when they end. */
static void fill_with_kv(engine *e, const struct answer want[2])
{
    for (int i = 0; i < 2; i++) {
        make_prompt(50 + i);
        struct engine_request r = request(NULL, LONG, 16);
        fixture_submit(e, &r);
    }
    pump(e);
    print_message("%d of %d blocks held KV of %d sequences\n", peak.kv_blocks, POOL, peak.running);
    assert_true(peak.kv_blocks * 10 > POOL * 9);
    assert_int_equal(peak.running, 2);
    struct engine_result *first = next_result(e), *second = next_result(e);
    bool swapped = first->choices[0].token_ids[0] != want[0].id[0];
    same(&want[swapped], first);
    same(&want[!swapped], second);
}

static void swing(void **state)
{
    (void)state;
    struct engine_policy policy;
    engine_policy_default(&policy);
    policy.prefix_cache = false;        /* or prompts, dear to compute, outlive idle adapters */
    engine *roomy = open_pool(1024, NULL), *e = open_pool(POOL, &policy);
    engine_adapter *a[IDS], *b[IDS];
    struct answer small[4], large[2];
    struct engine_stats st;
    load_all(roomy, b);
    load_all(e, a);
    for (int i = 0; i < 4; i++) {
        make_prompt(i);
        struct engine_request r = request(b[i], 6, 5);
        keep(&small[i], run(roomy, &r));
    }
    for (int i = 0; i < 2; i++) {
        make_prompt(50 + i);
        struct engine_request r = request(NULL, LONG, 16);
        keep(&large[i], run(roomy, &r));
    }
    for (int round = 0; round < 2; round++) {
        fill_with_adapters(e, a, small);
        fill_with_kv(e, large);
    }
    fill_with_adapters(e, a, small);
    engine_stats(e, &st);
    assert_int_equal(st.failed, 0);
    assert_true(st.adapter_evictions > IDS);
    for (int i = 0; i < IDS; i++) {
        engine_adapter_unref(a[i]);
        engine_adapter_unref(b[i]);
    }
    engine_close(e);
    engine_close(roomy);
}

/* ---- refusals -------------------------------------------------------------------------- */

static void expect_too_large(engine *e, const struct engine_request *r, const char *numbers)
{
    struct lm_err err = { 0 };
    engine_handle h;
    assert_int_equal(engine_submit(e, r, &h, &err), LM_TOO_LARGE);
    if (!strstr(err.msg, numbers))
        fail_msg("'%s' does not say '%s'", err.msg, numbers);
}

static void what_never_fits_is_refused_with_the_numbers(void **state)
{
    (void)state;
    engine *e = open_pool(12, NULL);
    engine_adapter *a;
    struct lm_err err = { 0 };
    char numbers[128];
    make_prompt(1);
    CHECK(engine_adapter_load(e, "sal", ADAPTERS "/nordwind-terse", &a, err));
    int lora = (int)LM_DIV_UP(engine_adapter_bytes(a), info.block_bytes * (size_t)info.n_layers);
    int room = 12 - lora;
    /* The last token's KV is never read: room * 16 + 1 tokens just fit. */
    struct engine_request r = request(a, 5, room * 16 + 1 - 5);
    engine_result_free(run(e, &r));
    r.params.max_tokens++;
    snprintf(numbers, sizeof numbers, "need %d blocks of KV cache and the adapter %d; the pool has "
             "12", room + 1, lora);
    expect_too_large(e, &r, numbers);
    r.adapter = NULL;
    engine_result_free(run(e, &r));
    engine_adapter_unref(a);
    engine_close(e);
    e = open_pool(lora - 1, NULL);
    assert_int_equal(engine_adapter_load(e, "sal", ADAPTERS "/nordwind-terse", &a, &err),
                     LM_TOO_LARGE);
    snprintf(numbers, sizeof numbers, "needs %d blocks of the pool, which has %d", lora, lora - 1);
    assert_non_null(strstr(err.msg, numbers));
    engine_close(e);
}

/* All that is left but the stated reserve; the device has 141 GB, says its description. */
static void the_pool_takes_what_is_left(void **state)
{
    (void)state;
    struct engine_config cfg = { .shape = "ops/shapes/llama-2-7b.json", .manual = true,
                                 .sim = "ops/devices/h200.json" };
    engine *e = fixture_engine(&cfg);
    engine_info(e, &info);
    double total = 141e9, block = (double)info.block_bytes * info.n_layers;
    double pool = block * info.pool_blocks, reserve = (double)info.pool_reserve;
    print_message("of 141 GB: weights %.1f, pool %.1f, reserve %.1f\n",
                  (double)info.weight_bytes / 1e9, pool / 1e9, reserve / 1e9);
    assert_true(reserve >= total / 50 + 256 * 1048576.0 - 1);
    assert_true(reserve < total / 50 + 256 * 1048576.0 + block);
    assert_true(pool + reserve + (double)info.weight_bytes <= total);
    assert_true(pool + reserve + (double)info.weight_bytes > 0.98 * total);
    engine_close(e);
    cfg.pool_bytes = (size_t)1 << 30;
    e = fixture_engine(&cfg);
    engine_info(e, &info);
    assert_int_equal(info.pool_blocks, (1 << 30) / (int)block);
    engine_close(e);
    cfg.pool_bytes = 1000;
    struct lm_err err = { 0 };
    assert_int_equal(engine_open(&cfg, &e, &err), LM_TOO_LARGE);
    assert_non_null(strstr(err.msg, "a pool of 1000 bytes holds no block"));
}

/* ---- prefixes -------------------------------------------------------------------------- */

static uint64_t hits(engine *e)
{
    struct engine_stats st;
    engine_stats(e, &st);
    return st.prefix_hit_tokens;
}

static int hits_of(engine *e, const struct engine_request *r)
{
    uint64_t before = hits(e);
    engine_result_free(run(e, r));
    return (int)(hits(e) - before);
}

static void prompts_are_computed_once_per_version(void **state)
{
    (void)state;
    engine *e = open_pool(POOL, NULL);
    engine_adapter *a, *b;
    CHECK(engine_adapter_load(e, "voice", ADAPTERS "/captain-sal", &a, err));
    make_prompt(3);
    struct engine_request r = request(a, 70, 4);
    assert_int_equal(hits_of(e, &r), 0);
    assert_int_equal(hits_of(e, &r), 64);
    CHECK(engine_adapter_load(e, "voice", ADAPTERS "/nordwind-terse", &b, err));
    r.adapter = b;
    assert_int_equal(hits_of(e, &r), 0);        /* another version of the same id */
    r.adapter = NULL;
    assert_int_equal(hits_of(e, &r), 0);
    r.adapter = a;
    assert_int_equal(hits_of(e, &r), 64);       /* who holds the old one still finds it */
    r.params.echo = true;
    r.params.logprobs = 0;
    assert_int_equal(hits_of(e, &r), 0);        /* its logits are wanted */
    make_prompt(4);
    r = request(b, 70, 4);
    r.params.n = 4;
    assert_int_equal(hits_of(e, &r), 3 * 64);
    engine_adapter_unref(a);
    engine_adapter_unref(b);
    engine_close(e);
}

static void switched_off_nothing_is_found(void **state)
{
    (void)state;
    struct engine_policy policy;
    engine_policy_default(&policy);
    policy.prefix_cache = false;
    engine *e = open_pool(POOL, &policy);
    make_prompt(3);
    struct engine_request r = request(NULL, 70, 4);
    assert_int_equal(hits_of(e, &r), 0);
    assert_int_equal(hits_of(e, &r), 0);
    engine_close(e);
}

/* A version that is gone takes its prefixes along, at once. */
static void a_gone_version_leaves_no_prefix(void **state)
{
    (void)state;
    engine *e = open_pool(POOL, NULL);
    engine_adapter *a, *b;
    struct engine_stats st;
    bool idle;
    CHECK(engine_adapter_load(e, "voice", ADAPTERS "/captain-sal", &a, err));
    make_prompt(3);
    struct engine_request r = request(a, 70, 4);
    engine_result_free(run(e, &r));
    engine_stats(e, &st);
    assert_true(st.kv_blocks >= 4 && st.adapter_blocks > 0);
    CHECK(engine_adapter_load(e, "voice", ADAPTERS "/nordwind-terse", &b, err));
    engine_adapter_unref(a);
    CHECK(engine_pump(e, INT64_MAX, &idle, err));
    engine_stats(e, &st);
    assert_int_equal(st.kv_blocks, 0);
    assert_int_equal(st.adapter_blocks, 0);
    assert_int_equal(st.free_blocks, POOL);
    engine_adapter_unref(b);
    engine_close(e);
}

int main(void)
{
    lm_log_set_level(LM_WARN);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(swing),
        cmocka_unit_test(what_never_fits_is_refused_with_the_numbers),
        cmocka_unit_test(the_pool_takes_what_is_left),
        cmocka_unit_test(prompts_are_computed_once_per_version),
        cmocka_unit_test(switched_off_nothing_is_found),
        cmocka_unit_test(a_gone_version_leaves_no_prefix),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
