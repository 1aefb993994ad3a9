/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine_fault.c - every allocation fails once.
 *
 * This program's own malloc family stands before the C library's: it can make the Nth call fail and
 * counts what is live. Two loops:
 *   run     an engine is open; loading an adapter, submitting, running and polling go through with
 *           the Nth allocation failing, for N = 1, 2, ... until none fires
 *   open    the same for opening an engine
 * The first is done twice: in a roomy pool, and with two steps in flight in a tight one, where
 * sequences are preempted, swapped out and brought back.
 * Whatever fails must be told (LM_NOMEM, or a result that says so), every accepted request ends
 * exactly once, the engine serves the next request as if nothing had been, and closing gives back
 * every allocation.
 *
 * Only calls from this program's own code fail: how libraries bear it is their affair (libcrypto
 * 3.0 leaks when fetching a digest fails).
 *
 * Sanitizers bring their own allocator, so under them nothing is made to fail.
 */
#include "engine_fixture.h"

#include "engine/core.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>

#define SAL "tests/models/spm-tiny-adapters/captain-sal"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define INTERPOSED 0
#else
#define INTERPOSED 1
#endif

static atomic_long fail_at;     /* the Nth call from now fails; 0 and below: none */
static atomic_long live;
static atomic_bool fired;

#if INTERPOSED
extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *p, size_t n);
extern void *__libc_memalign(size_t align, size_t n);
extern void __libc_free(void *p);
int posix_memalign(void **out, size_t align, size_t n);
void *aligned_alloc(size_t align, size_t n);

extern const char __executable_start, etext;

static bool fails(const void *caller)
{
    if (atomic_load_explicit(&fail_at, memory_order_relaxed) <= 0)
        return false;
    if ((uintptr_t)caller < (uintptr_t)&__executable_start || (uintptr_t)caller > (uintptr_t)&etext)
        return false;
    if (atomic_fetch_sub(&fail_at, 1) != 1)
        return false;
    atomic_store(&fired, true);
    errno = ENOMEM;
    return true;
}

static void *counted(void *p)
{
    if (p)
        atomic_fetch_add(&live, 1);
    return p;
}

void *malloc(size_t n)
{
    return fails(__builtin_return_address(0)) ? NULL : counted(__libc_malloc(n));
}

void *calloc(size_t n, size_t size)
{
    return fails(__builtin_return_address(0)) ? NULL : counted(__libc_calloc(n, size));
}

void *realloc(void *p, size_t n)
{
    if (fails(__builtin_return_address(0)))
        return NULL;
    void *q = __libc_realloc(p, n);
    return p ? q : counted(q);
}

int posix_memalign(void **out, size_t align, size_t n)
{
    void *p = fails(__builtin_return_address(0)) ? NULL : counted(__libc_memalign(align, n));
    if (p)
        *out = p;
    return p ? 0 : ENOMEM;
}

void *aligned_alloc(size_t align, size_t n)
{
    return fails(__builtin_return_address(0)) ? NULL : counted(__libc_memalign(align, n));
}

void free(void *p)
{
    if (p)
        atomic_fetch_sub(&live, 1);
    __libc_free(p);
}
#endif

static void arm(long n)
{
    atomic_store(&fired, false);
    atomic_store(&fail_at, n);
}

static bool disarm(void)
{
    atomic_store(&fail_at, 0);
    return atomic_load(&fired);
}

static bool tight;              /* a pool that makes them preempt and swap */
static uint64_t swaps;

static lm_status open_engine(engine **e, struct lm_err *err)
{
    struct engine_config cfg = fixture_config(SPM_TINY);
    struct engine_policy policy;
    engine_policy_default(&policy);
    cfg.pool_bytes = (size_t)4 << 20;
    cfg.max_seqs = 8;
    cfg.max_step_tokens = 32;
    cfg.policy = &policy;
    if (tight) {
        policy.preempt = ENGINE_PREEMPT_SWAP;
        policy.prefix_cache = false;
        cfg.block_tokens = 8;
        cfg.pool_bytes = (size_t)110 << 10;     /* 12 blocks */
    }
    return engine_open(&cfg, e, err);
}

static const int32_t ids[20] = { 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20 };

static struct engine_request demanding(engine_adapter *a)
{
    static const int32_t stop = 3;
    struct engine_request r = fixture_request("fault", ids, 20);
    r.adapter = a;
    r.stream = true;
    r.params.max_tokens = 12;
    r.params.n = 2;
    r.params.logprobs = 2;
    r.params.echo = true;
    r.params.ignore_eos = true;
    r.params.stop[0] = "not there";
    r.params.n_stop = 1;
    r.params.stop_token_ids = &stop;
    r.params.n_stop_token_ids = 1;
    return r;
}

/* Load, submit twice, poll both. Counts results; a failure must carry a reason. */
static void use(engine *e)
{
    engine_adapter *a = NULL;
    struct lm_err err = { 0 };
    int accepted = 0, ended = 0;
    lm_status st = engine_adapter_load(e, "sal", SAL, &a, &err);
    assert_true(st == LM_OK || (st == LM_NOMEM && err.msg[0]) || st == LM_INTERNAL);
    for (int i = 0; i < 2; i++) {
        struct engine_request r = demanding(i ? NULL : a);
        engine_handle h;
        st = engine_submit(e, &r, &h, &err);
        assert_true(st == LM_OK || (st == LM_NOMEM && err.msg[0]));
        accepted += st == LM_OK;
    }
    while (ended < accepted) {
        struct engine_event ev = fixture_finished(e);
        assert_true(ev.result->status == LM_OK || ev.result->status == LM_NOMEM);
        assert_true(ev.result->status == LM_OK || ev.result->error[0]);
        engine_result_free(ev.result);
        ended++;
    }
    engine_adapter_unref(a);
}

static void check_still_serves(engine *e)
{
    struct engine_request r = fixture_request("after", ids, 20);
    r.params.max_tokens = 8;
    r.params.ignore_eos = true;
    struct engine_result *res = fixture_run(e, &r);
    assert_int_equal(res->choices[0].n_tokens, 8);
    engine_result_free(res);
}

/* Once all has ended, no sequence holds a block; without a prefix cache, there is no KV then. */
static void check_blocks(engine *e)
{
    struct engine_stats st;
    for (int tries = 0; tries < 5000; tries++) {        /* the gauges follow within a turn */
        engine_stats(e, &st);
        if (st.running + st.waiting + (tight ? st.kv_blocks : 0) == 0)
            break;
        usleep(1000);
    }
    assert_int_equal(st.running + st.waiting, 0);
    assert_true(!tight || st.kv_blocks == 0);
    assert_int_equal(st.free_blocks + st.kv_blocks + st.adapter_blocks, st.pool_blocks);
    swaps += st.swap_outs;
}

/* One engine's life with the Nth allocation of its use failing. False when none fired. */
static bool live_through(long n)
{
    engine *e = NULL;
    CHECK(open_engine(&e, err));
    arm(n);
    use(e);
    bool hit = disarm();
    check_still_serves(e);
    check_blocks(e);
    engine_close(e);
    return hit;
}

static void running(void **state)
{
    (void)state;
    live_through(0);            /* libraries make what they keep for ever */
    long before = atomic_load(&live), n = 1;
    while (live_through(n)) {
        if (atomic_load(&live) != before) {
            /* A library's error state, made once and kept? Then not a second time. */
            before = atomic_load(&live);
            live_through(n);
            if (atomic_load(&live) != before)
                fail_msg("allocation %ld failed: %ld more are live than before", n,
                         atomic_load(&live) - before);
        }
        n++;
    }
    print_message("%ld allocations failed in turn\n", n - 1);
    assert_true(n > 100 || !INTERPOSED);
}

static void opening(void **state)
{
    (void)state;
    long before = atomic_load(&live), n = 0, failed = 0;
    for (bool hit = true; hit;) {
        engine *e = NULL;
        struct lm_err err = { 0 };
        arm(++n);
        lm_status st = open_engine(&e, &err);
        hit = disarm();
        if (st == LM_OK)
            engine_close(e);
        else
            assert_true(hit && err.msg[0]);
        failed += st != LM_OK;
        if (atomic_load(&live) != before)
            fail_msg("allocation %ld failed: %ld more are live than before", n,
                     atomic_load(&live) - before);
    }
    print_message("%ld allocations failed in turn, %ld openings with them\n", n - 1, failed);
}

static void running_tight_and_pipelined(void **state)
{
    core_force_pipeline(true);
    tight = true;
    swaps = 0;
    running(state);
    print_message("in all %llu sequences were swapped out\n", (unsigned long long)swaps);
    assert_true(swaps > (INTERPOSED ? 100 : 0));    /* one run, or one for each failure */
    tight = false;
    core_force_pipeline(false);
}

int main(void)
{
    lm_log_set_level(LM_ERROR);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(running),
        cmocka_unit_test(running_tight_and_pipelined),
        cmocka_unit_test(opening),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
