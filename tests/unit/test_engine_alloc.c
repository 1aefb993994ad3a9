/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine_alloc.c - once it is warm the step path allocates nothing, takes no lock, and makes
 * no system call that blocks.
 *
 * By hand: a manual engine, so that this thread is the engine's and nothing else runs. Sequences
 * whose text nobody waits for; over WINDOW steps there is not one allocation (this program's malloc
 * family counts), not one pthread_mutex_lock() by our code, and the thread gave the processor away
 * not once (ru_nvcsw: the kernel's own count of blocking). With one step in flight and with two.
 *
 * By thread: the engine's own, and sequences that want text as they go.
 *
 * This program's own malloc, calloc and realloc stand before the C library's and count calls made
 * off the main thread while `counting` is on: the engine thread is then in the middle of decoding
 * a mixed batch, with no request coming or ending. What remains is text that outgrows a buffer of
 * its streaming decoder: each of its stages doubles its own, so in WINDOW steps every sequence may
 * do so for the text and for two stages, where a single allocation a token would make 1,600.
 *
 * On a loaded machine the main thread is late: the steps that count come after the last sequence
 * did, the bound is for as many as lay between switching on and off, and a batch that ended too
 * soon is done again.
 *
 * Sanitizers bring their own allocator, so under them the test only runs the batch.
 */
#include "engine_fixture.h"

#include "engine/core.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define COUNTS 0
#else
#define COUNTS 1
#endif

static atomic_bool counting;    /* calls off the main thread */
static atomic_bool counting_all;
static atomic_int allocations, locks;

#if COUNTS
extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *p, size_t n);

static void count(void)
{
    if (atomic_load_explicit(&counting_all, memory_order_relaxed) ||
        (atomic_load_explicit(&counting, memory_order_relaxed) && syscall(SYS_gettid) != getpid()))
        atomic_fetch_add(&allocations, 1);
}

extern const char __executable_start, etext;

/* Locks inside libraries (OpenBLAS takes one for its buffers) are their affair. */
int pthread_mutex_lock(pthread_mutex_t *mu)
{
    static int (*real)(pthread_mutex_t *);
    uintptr_t caller = (uintptr_t)__builtin_return_address(0);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "pthread_mutex_lock");
    if (atomic_load_explicit(&counting_all, memory_order_relaxed) &&
        caller >= (uintptr_t)&__executable_start && caller <= (uintptr_t)&etext)
        atomic_fetch_add(&locks, 1);
    return real(mu);
}

void *malloc(size_t n)
{
    count();
    return __libc_malloc(n);
}

void *calloc(size_t n, size_t size)
{
    count();
    return __libc_calloc(n, size);
}

void *realloc(void *p, size_t n)
{
    count();
    return __libc_realloc(p, n);
}
#endif

#define SEQS 16
#define WINDOW 100      /* steps */

static struct engine_stats stats(engine *e)
{
    struct engine_stats st;
    engine_stats(e, &st);
    return st;
}

/* Waits until the whole batch runs; false when a sequence ended before the last one came. */
static bool wait_for_batch(engine *e, uint64_t finished)
{
    int64_t until = lm_now_us() + 60 * 1000000;
    struct engine_stats st;
    while ((st = stats(e)).running < SEQS && st.finished == finished && lm_now_us() < until)
        usleep(100);
    return st.running == SEQS;
}

/* False when the step will not come: the batch has ended. */
static bool wait_for_step(engine *e, uint64_t n)
{
    int64_t until = lm_now_us() + 60 * 1000000;
    struct engine_stats st;
    while ((st = stats(e)).steps < n && st.running == SEQS && lm_now_us() < until)
        usleep(100);
    return st.steps >= n && st.running == SEQS;
}

static void submit_all(engine *e, engine_adapter *const a[3], bool as_it_goes)
{
    int32_t ids[20];
    for (int i = 0; i < 20; i++)
        ids[i] = 20 + i;
    for (int i = 0; i < SEQS; i++) {
        struct engine_request r = fixture_request("alloc", ids, 20);
        r.adapter = a[i % 3];
        r.params.max_tokens = 480;
        r.params.ignore_eos = true;
        r.params.temperature = i % 2 ? 1.0f : 0;
        r.params.repetition_penalty = i % 4 ? 1.0f : 1.1f;
        if (as_it_goes) {
            r.params.stop[0] = "nowhere to be found";
            r.params.n_stop = 1;
        }
        fixture_submit(e, &r);
    }
}

/* Counts over at least WINDOW steps of a batch; returns how many, 0 if the batch ended too soon. */
static uint64_t count_steps(engine *e, engine_adapter *const a[3])
{
    uint64_t finished = stats(e).finished;
    submit_all(e, a, true);
    if (!wait_for_batch(e, finished) || !wait_for_step(e, stats(e).steps + 200))
        return 0;
    atomic_store(&allocations, 0);
    uint64_t from = stats(e).steps;
    atomic_store(&counting, true);
    bool all = wait_for_step(e, from + WINDOW);
    atomic_store(&counting, false);
    struct engine_stats st = stats(e);
    return all && st.running == SEQS ? st.steps - from : 0;
}

static void load_adapters(engine *e, engine_adapter *a[3])
{
    static const char *const dirs[] = { "tests/models/spm-tiny-adapters/captain-sal",
                                        "tests/models/spm-tiny-adapters/nordwind-terse" };
    for (int i = 0; i < 2; i++)
        CHECK(engine_adapter_load(e, i ? "terse" : "sal", dirs[i], &a[i], err));
}

/* Turns until so many steps have been launched; counts in the turns alone. */
static void pump_to(engine *e, uint64_t steps, bool count)
{
    bool idle = false;
    while (stats(e).steps < steps) {
        atomic_store(&counting_all, count);
        CHECK(engine_pump(e, engine_now_us(e) + 1, &idle, err));
        atomic_store(&counting_all, false);
    }
    assert_false(idle);
}

static long voluntary_switches(void)
{
    struct rusage ru;
    getrusage(RUSAGE_THREAD, &ru);
    return ru.ru_nvcsw;
}

static void watch_by_hand(bool pipelined)
{
    struct engine_config cfg = fixture_config(SPM_TINY);
    engine_adapter *a[3] = { NULL };
    cfg.manual = true;
    core_force_pipeline(pipelined);
    engine *e = fixture_engine(&cfg);
    core_force_pipeline(false);
    load_adapters(e, a);
    submit_all(e, a, false);
    pump_to(e, 250, false);     /* warm; and 480 steps are coming */
    atomic_store(&allocations, 0);
    atomic_store(&locks, 0);
    long before = voluntary_switches();
    pump_to(e, 250 + WINDOW, COUNTS);
    long switches = voluntary_switches() - before;
    assert_int_equal(stats(e).running, SEQS);
    print_message("%d allocations, %d locks, %ld times blocked in %d steps of %d sequences, %s\n",
                  atomic_load(&allocations), atomic_load(&locks), switches, WINDOW, SEQS,
                  pipelined ? "planned ahead" : "one by one");
    assert_int_equal(atomic_load(&allocations), 0);
    assert_int_equal(atomic_load(&locks), 0);
    assert_true(switches == 0 || !COUNTS);
    engine_adapter_unref(a[0]);
    engine_adapter_unref(a[1]);
    engine_close(e);
}

static void a_warm_step_only_computes(void **state)
{
    (void)state;
    watch_by_hand(false);
    watch_by_hand(true);
}

static void a_warm_step_allocates_nothing(void **state)
{
    (void)state;
    struct engine_config cfg = fixture_config(SPM_TINY);
    engine *e = fixture_engine(&cfg);
    engine_adapter *a[3] = { NULL };
    load_adapters(e, a);
    uint64_t n = 0;
    for (int tries = 0; n == 0 && tries < 20; tries++) {
        n = count_steps(e, a);
        for (int i = 0; i < SEQS && n == 0; i++)
            engine_result_free(fixture_finished(e).result);
    }
    assert_true(n >= WINDOW);
    print_message("%d allocations in %d steps of %d sequences\n", atomic_load(&allocations), (int)n,
                  SEQS);
    assert_true((uint64_t)atomic_load(&allocations) <= 3 * SEQS * n / WINDOW);
    engine_adapter_unref(a[0]);
    engine_adapter_unref(a[1]);
    engine_close(e);
}

int main(void)
{
    lm_log_set_level(LM_WARN);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_warm_step_only_computes),
        cmocka_unit_test(a_warm_step_allocates_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
