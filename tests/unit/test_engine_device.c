/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine_device.c - every call on the device fails once.
 *
 * The linker puts this program's __wrap_kn_X before every function of kernels.h that can fail
 * (the Makefile has the list): the Nth call from now fails, with LM_NOMEM if it asks for something,
 * else with LM_DEVICE, and then passes nothing on. Two loops, for N = 1, 2, ... until none fires:
 *   open    opening an engine: it fails with a reason, or was none the worse
 *   run     an engine in a tight pool, which loads, preempts, swaps, evicts and merges: what fails,
 *           every request ends exactly once, with a reason; no sequence is left holding a block; a
 *           device that failed is told to submit and poll, one that only lacked memory serves on
 * In both, every object and every byte taken of the device is given back by closing.
 *
 * Engines are pumped by hand, so the Nth call is the same one each time. Sanitizers are slow: under
 * them every seventh N is tried.
 */
#include "engine_fixture.h"

#include "engine/core.h"
#include "kernels/kernels.h"

#define ADAPTERS "tests/models/spm-tiny-adapters"
#define REQUESTS 4
#define OUTPUT 10

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define STRIDE 7
#else
#define STRIDE 1
#endif

static long fail_at;            /* the Nth call from now fails; 0 and below: none */
static long live;               /* objects and pieces of memory */
static bool fired;

static bool fails(void)
{
    if (fail_at <= 0 || --fail_at > 0)
        return false;
    fired = true;
    return true;
}

/* What gives something back, and what takes it. */
#define TAKES(name, last, params, args)                                                        \
    lm_status __real_kn_##name params;                                                         \
    lm_status __wrap_kn_##name params;                                                         \
    lm_status __wrap_kn_##name params                                                          \
    {                                                                                          \
        if (fails())                                                                           \
            return lm_err_set(last, LM_NOMEM, "no memory on the device, says the test");       \
        lm_status st = __real_kn_##name args;                                                  \
        live += st == LM_OK;                                                                   \
        return st;                                                                             \
    }

#define GIVES(name, params, args, what)                                                        \
    void __real_kn_##name params;                                                              \
    void __wrap_kn_##name params;                                                              \
    void __wrap_kn_##name params                                                               \
    {                                                                                          \
        live -= (what) != NULL;                                                                \
        __real_kn_##name args;                                                                 \
    }

#define DOES(name, params, args)                                                               \
    lm_status __real_kn_##name params;                                                         \
    lm_status __wrap_kn_##name params;                                                         \
    lm_status __wrap_kn_##name params                                                          \
    {                                                                                          \
        return fails() ? LM_DEVICE : __real_kn_##name args;                                    \
    }

TAKES(alloc, err, (kn_device *d, size_t n, void **o, struct lm_err *err), (d, n, o, err))
TAKES(host_alloc, err, (kn_device *d, size_t n, void **o, struct lm_err *err), (d, n, o, err))
TAKES(stream_new, err, (kn_device *d, kn_stream **o, struct lm_err *err), (d, o, err))
TAKES(event_new, err, (kn_device *d, kn_event **o, struct lm_err *err), (d, o, err))
TAKES(mat_new, err, (kn_device *d, enum kn_dtype t, int r, int c, kn_mat **o, struct lm_err *err),
      (d, t, r, c, o, err))
GIVES(free, (kn_device *d, void *p), (d, p), p)
GIVES(host_free, (kn_device *d, void *p), (d, p), p)
GIVES(stream_free, (kn_stream *s), (s), s)
GIVES(event_free, (kn_event *e), (e), e)
GIVES(mat_free, (kn_mat *m), (m), m)

DOES(copy_in, (kn_stream *s, void *d, const void *f, size_t n), (s, d, f, n))
DOES(copy_out, (kn_stream *s, void *d, const void *f, size_t n), (s, d, f, n))
DOES(copy, (kn_stream *s, void *d, const void *f, size_t n), (s, d, f, n))
DOES(zero, (kn_stream *s, void *d, size_t n), (s, d, n))
DOES(scatter_cells, (kn_stream *s, void *b, const int64_t *o, int n, size_t c, const void *f),
     (s, b, o, n, c, f))
DOES(gather_cells, (kn_stream *s, void *d, const void *b, const int64_t *o, int n, size_t c),
     (s, d, b, o, n, c))
DOES(mat_save, (kn_stream *s, void *d, const kn_mat *m), (s, d, m))
DOES(mat_restore, (kn_stream *s, kn_mat *m, const void *f), (s, m, f))
DOES(event_record, (kn_event *e, kn_stream *s), (e, s))
DOES(event_wait, (kn_stream *s, kn_event *e), (s, e))
DOES(event_query, (kn_event *e), (e))

#define TELLS(name, params, args)                                                              \
    lm_status __real_kn_##name params;                                                         \
    lm_status __wrap_kn_##name params;                                                         \
    lm_status __wrap_kn_##name params                                                          \
    {                                                                                          \
        if (fails())                                                                           \
            return lm_err_set(err, LM_DEVICE, "the device failed, says the test");             \
        return __real_kn_##name args;                                                          \
    }

TELLS(stream_sync, (kn_stream *s, struct lm_err *err), (s, err))
TELLS(event_sync, (kn_event *e, struct lm_err *err), (e, err))
TELLS(mat_upload, (kn_mat *m, int r0, int c0, int r, int c, const void *f, enum kn_dtype t,
                   size_t ld, struct lm_err *err), (m, r0, c0, r, c, f, t, ld, err))

#define X(op, type) DOES(op_##op, (kn_stream *s, const struct kn_##type *a), (s, a))
KN_OPS(X)
KN_FUSED_OPS(X)
#undef X

/* ---- opening --------------------------------------------------------------------------- */

static struct engine_policy policy;
static size_t pool_bytes = (size_t)1 << 20;

static lm_status open_engine(engine **e, struct lm_err *err)
{
    struct engine_config cfg = fixture_config(SPM_TINY);
    cfg.pool_bytes = pool_bytes;
    cfg.block_tokens = 8;
    cfg.max_seqs = 6;
    cfg.max_step_tokens = 24;
    cfg.manual = true;
    cfg.policy = &policy;
    return engine_open(&cfg, e, err);
}

static void opening(void **state)
{
    (void)state;
    long n = 0, failed = 0;
    engine_policy_default(&policy);
    for (bool hit = true; hit;) {
        engine *e = NULL;
        struct lm_err err = { 0 };
        fired = false;
        fail_at = ++n;
        lm_status st = open_engine(&e, &err);
        fail_at = 0;
        hit = fired;
        failed += st != LM_OK;
        if (st == LM_OK)
            engine_close(e);
        else if (!hit || !err.msg[0] || (st != LM_NOMEM && st != LM_DEVICE))
            fail_msg("call %ld failed: status %d, '%s'", n, st, err.msg);
        if (live != 0)
            fail_msg("call %ld failed: %ld objects are left", n, live);
    }
    print_message("%ld calls failed in turn, %ld openings with them\n", n - 1, failed);
    assert_true(n > 50 && failed == n - 1);
}

/* ---- running --------------------------------------------------------------------------- */

static int32_t prompt[64];
static uint64_t preemptions, swaps, evictions, merges;

/* Requests from..to-1 of the mix, their adapters loaded first; how many were accepted. */
static int submit(engine *e, int from, int to)
{
    int accepted = 0;
    for (int i = from; i < to; i++) {
        engine_adapter *a = NULL;
        struct lm_err err = { 0 };
        engine_handle h;
        lm_status st = LM_OK;
        if (i % 3)
            st = engine_adapter_load(e, i % 3 == 1 ? "sal" : "terse", i % 3 == 1
                                     ? ADAPTERS "/captain-sal" : ADAPTERS "/nordwind-terse", &a,
                                     &err);
        if (st != LM_OK && (st != LM_NOMEM || !err.msg[0]))
            fail_msg("loading: status %d, '%s'", st, err.msg);
        struct engine_request r = fixture_request("device", prompt, 7 + i * 3);
        r.adapter = a;
        r.params.max_tokens = OUTPUT;
        r.params.ignore_eos = true;
        r.params.n = 1 + i % 2;
        r.params.repetition_penalty = i == 2 ? 1.1f : 1;
        r.priority = i % 2;
        if (st == LM_OK)
            accepted += engine_submit(e, &r, &h, &err) == LM_OK;
        engine_adapter_unref(a);
    }
    return accepted;
}

static lm_status take_results(engine *e, int accepted)
{
    struct engine_event ev;
    lm_status state = LM_OK, failure = LM_OK;
    int ended = 0;
    while (engine_poll(e, &ev, 1, 0, &state) == 1) {
        const struct engine_result *r = ev.result;
        assert_int_equal(ev.kind, ENGINE_FINISHED);
        assert_true(r->status == LM_OK || r->error[0]);
        for (int i = 0; i < r->n_choices; i++)
            assert_true(r->status != LM_OK || r->choices[i].n_tokens == OUTPUT);
        if (r->status != LM_OK)
            failure = r->status;
        engine_result_free(ev.result);
        ended++;
    }
    assert_int_equal(ended, accepted);
    return state != LM_OK ? state : failure;
}

/* The engine has ended everything: no sequence holds a block. Without a prefix cache, no KV. */
static void check_blocks(engine *e)
{
    struct engine_stats st;
    engine_stats(e, &st);
    assert_int_equal(st.running + st.waiting, 0);
    assert_int_equal(st.kv_blocks, 0);
    assert_int_equal(st.free_blocks + st.adapter_blocks, st.pool_blocks);
    preemptions += st.preemptions;
    swaps += st.swap_outs;
    evictions += st.adapter_evictions;
    merges += st.merges;
}

static void check_serves(engine *e)
{
    bool idle;
    struct engine_request r = fixture_request("after", prompt, 20);
    r.params.max_tokens = OUTPUT;
    r.params.ignore_eos = true;
    fixture_submit(e, &r);
    CHECK(engine_pump(e, INT64_MAX, &idle, err));
    assert_int_equal(take_results(e, 1), LM_OK);
}

static void check_refuses(engine *e)
{
    struct lm_err err = { 0 };
    engine_handle h;
    struct engine_request r = fixture_request("after", prompt, 20);
    assert_int_equal(engine_submit(e, &r, &h, &err), LM_DEVICE);
    assert_true(err.msg[0]);
}

/* One engine's life with the Nth call of its use failing. False when none fired. */
static bool live_through(long n, long *broken)
{
    engine *e = NULL;
    struct lm_err err = { 0 };
    bool idle = false;
    CHECK(open_engine(&e, err));
    fired = false;
    fail_at = n;
    int accepted = policy.merge ? submit(e, 1, 2) : submit(e, 0, REQUESTS);
    lm_status pumped = engine_pump(e, INT64_MAX, &idle, &err);
    if (policy.merge && pumped == LM_OK) {      /* an adapter alone, then another and the base */
        accepted += submit(e, 2, REQUESTS);
        pumped = engine_pump(e, INT64_MAX, &idle, &err);
    }
    bool hit = fired;
    fail_at = 0;
    if (pumped != LM_OK)
        assert_true(hit && err.msg[0]);
    lm_status seen = take_results(e, accepted);
    check_blocks(e);
    if (pumped == LM_OK)
        check_serves(e);
    else
        check_refuses(e);
    assert_true(seen == LM_OK || seen == LM_NOMEM || seen == LM_DEVICE);
    *broken += pumped != LM_OK;
    engine_close(e);
    if (live != 0)
        fail_msg("call %ld failed: %ld objects are left", n, live);
    return hit;
}

static void run_with(bool pipeline, enum engine_preempt preempt)
{
    long n = 1, broken = 0;
    engine_policy_default(&policy);
    policy.prefix_cache = false;
    policy.preempt = preempt;
    core_force_pipeline(pipeline);
    preemptions = swaps = evictions = 0;
    while (live_through(n, &broken))
        n += STRIDE;
    core_force_pipeline(false);
    print_message("%ld calls failed in turn, %ld devices with them; in all %llu preemptions, %llu "
                  "swaps, %llu evictions\n", (n - 1) / STRIDE, broken,
                  (unsigned long long)preemptions, (unsigned long long)swaps,
                  (unsigned long long)evictions);
    assert_true(n > 500 && broken > 400 / STRIDE);
    assert_true(preemptions > 0 && evictions > 0);
}

/* Blocks for the largest request and a few more. */
static void make_tight(void)
{
    struct engine_info info;
    engine *e = NULL;
    engine_policy_default(&policy);
    pool_bytes = (size_t)1 << 20;
    CHECK(open_engine(&e, err));
    engine_info(e, &info);
    pool_bytes = info.block_bytes * (size_t)info.n_layers * 12;
    engine_close(e);
    for (int i = 0; i < 64; i++)
        prompt[i] = 5 + i * 11 % 700;
}

static void running(void **state)
{
    (void)state;
    make_tight();
    run_with(false, ENGINE_PREEMPT_RECOMPUTE);
}

static void running_pipelined(void **state)
{
    (void)state;
    make_tight();
    run_with(true, ENGINE_PREEMPT_SWAP);
}

static void running_merged(void **state)
{
    (void)state;
    long n = 1, broken = 0;
    make_tight();
    policy.prefix_cache = false;
    policy.merge = true;
    core_force_merge(true);
    merges = 0;
    while (live_through(n, &broken))
        n += STRIDE;
    core_force_merge(false);
    print_message("%ld calls failed in turn, %ld devices with them; in all %llu merges\n",
                  (n - 1) / STRIDE, broken, (unsigned long long)merges);
    assert_true(n > 500 && broken > 400 / STRIDE && merges > 400 / STRIDE);
}

int main(void)
{
    lm_log_set_level((enum lm_level)-1);        /* it is meant to fail */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(opening),
        cmocka_unit_test(running),
        cmocka_unit_test(running_pipelined),
        cmocka_unit_test(running_merged),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
