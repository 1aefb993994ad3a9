/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool.c - a small fork-join pool for operations that last microseconds.
 *
 * The caller posts a job, works on it like everyone else, and leaves when it is done. Items are
 * claimed from one counter, so a helper that is asleep, or that the kernel has put aside, costs
 * nothing: the caller takes its share. That matters on a machine with more runnable threads than
 * cores, which is what two workers on two cores are.
 *
 *             post: fields, then state = OPEN, then seq + 1, wake sleepers
 *     IDLE ------------------------------------------------------------> OPEN, active = 0
 *      ^                                                                  |  helper: active + 1
 *      |  active = 0                         caller finds no more items   v
 *     CLOSED, active = n  <----------------------------------------- OPEN, active = n
 *
 * Invariants
 *  1. The job's fields are written only in IDLE, and read only by the poster or by a helper that
 *     raised `active` while OPEN was set; both orders go through `state`.
 *  2. One job at a time: `busy` is held from post to join. Another stream that finds it taken runs
 *     its operation alone instead of waiting.
 *  3. A helper that sleeps has seen the `seq` it sleeps on, and `sleepers` was raised before it
 *     looked for the last time, so no post is missed.
 *
 * Threads: helpers are created by cpu_pool_new and joined by cpu_pool_free.
 */
#include "kernels/cpu/cpu_int.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define STATE_OPEN 0x80000000u
#define STATE_WAITING 0x40000000u       /* the caller sleeps until active is 0 */

/* A helper looks for work this long before it sleeps: longer than the gaps between the operations
 * of a step, so that one wake-up serves a whole forward pass. */
#define SPIN_US 40
/* The caller waits this long for the last helper before it sleeps. */
#define JOIN_SPINS 2000
/* Below this much work a job is not worth the two cache-line exchanges (about 1 us), or, when
 * helpers sleep, the wake-up call (several us). See docs/kernels.md for the measurement. */
#define MIN_WORK_NS 4000
#define MIN_WAKE_NS 12000

struct helper {
    struct cpu_pool *pool;
    pthread_t thread;
    int slot;
};

struct cpu_pool {
    _Alignas(64) atomic_uint state;
    _Alignas(64) atomic_int next;       /* first unclaimed item */
    _Alignas(64) atomic_uint seq;       /* jobs posted; helpers sleep on it */
    atomic_int sleepers;
    atomic_bool stop;
    _Alignas(64) pthread_mutex_t busy;
    cpu_range_fn *fn;
    void *ctx;
    int n, grain;
    int n_helpers;
    struct helper *helpers;
};

static void futex_wait(atomic_uint *word, unsigned value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(atomic_uint *word, int n)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void claim_items(struct cpu_pool *p, int slot)
{
    for (;;) {
        int begin = atomic_fetch_add_explicit(&p->next, p->grain, memory_order_relaxed);
        if (begin >= p->n)
            return;
        p->fn(p->ctx, slot, begin, LM_MIN(p->n, begin + p->grain));
    }
}

/* ---- helpers --------------------------------------------------------------------------- */

static bool spin_for_job(struct cpu_pool *p, unsigned seen)
{
    int64_t until = lm_now_us() + SPIN_US;
    do {
        for (int i = 0; i < 32; i++) {
            if (atomic_load_explicit(&p->seq, memory_order_acquire) != seen)
                return true;
            relax();
        }
    } while (lm_now_us() < until);
    return false;
}

static unsigned wait_for_job(struct cpu_pool *p, unsigned seen)
{
    while (!spin_for_job(p, seen)) {
        atomic_fetch_add(&p->sleepers, 1);
        if (atomic_load(&p->seq) == seen)
            futex_wait(&p->seq, seen);
        atomic_fetch_sub(&p->sleepers, 1);
    }
    return atomic_load(&p->seq);
}

static bool enter(struct cpu_pool *p)
{
    unsigned s = atomic_load_explicit(&p->state, memory_order_relaxed);
    while (s & STATE_OPEN)
        if (atomic_compare_exchange_weak_explicit(&p->state, &s, s + 1, memory_order_acquire,
                                                  memory_order_relaxed))
            return true;
    return false;
}

static void leave(struct cpu_pool *p)
{
    unsigned before = atomic_fetch_sub_explicit(&p->state, 1, memory_order_release);
    if (before == (STATE_WAITING | 1))
        futex_wake(&p->state, 1);
}

static void *helper_main(void *arg)
{
    struct helper *h = arg;
    struct cpu_pool *p = h->pool;
    unsigned seen = 0;
    for (;;) {
        seen = wait_for_job(p, seen);
        if (atomic_load(&p->stop))
            return NULL;
        if (enter(p)) {
            claim_items(p, h->slot);
            leave(p);
        }
    }
}

/* ---- the caller ------------------------------------------------------------------------ */

static void post(struct cpu_pool *p)
{
    atomic_store_explicit(&p->next, 0, memory_order_relaxed);
    atomic_store_explicit(&p->state, STATE_OPEN, memory_order_release);
    atomic_fetch_add(&p->seq, 1);
    if (atomic_load(&p->sleepers) > 0)
        futex_wake(&p->seq, LM_DIV_UP(p->n, p->grain) - 1);
}

static void join(struct cpu_pool *p)
{
    unsigned s = atomic_fetch_and_explicit(&p->state, ~STATE_OPEN, memory_order_acquire);
    s &= ~STATE_OPEN;
    for (int i = 0; s != 0 && i < JOIN_SPINS; i++) {
        relax();
        s = atomic_load_explicit(&p->state, memory_order_acquire);
    }
    if (s != 0)
        s = atomic_fetch_or(&p->state, STATE_WAITING) | STATE_WAITING;
    while ((s & ~STATE_WAITING) != 0) {
        futex_wait(&p->state, s);
        s = atomic_load_explicit(&p->state, memory_order_acquire);
    }
    atomic_store_explicit(&p->state, 0, memory_order_relaxed);
}

static bool worth_sharing(struct cpu_pool *p, int n, int grain, int64_t work)
{
    if (p->n_helpers == 0 || n <= grain || work < MIN_WORK_NS)
        return false;
    int asleep = atomic_load_explicit(&p->sleepers, memory_order_relaxed);
    return work >= MIN_WAKE_NS || asleep < p->n_helpers;
}

void cpu_parallel(struct cpu_stream *s, int n, int grain, int64_t work, cpu_range_fn *fn,
                  void *ctx)
{
    struct cpu_pool *p = s->dev->pool;
    if (n <= 0)
        return;
    if (!worth_sharing(p, n, grain, work) || pthread_mutex_trylock(&p->busy)) {
        fn(ctx, 0, 0, n);
        return;
    }
    p->fn = fn;
    p->ctx = ctx;
    p->n = n;
    p->grain = grain;
    post(p);
    claim_items(p, 0);
    join(p);
    pthread_mutex_unlock(&p->busy);
}

/* ---- life ------------------------------------------------------------------------------ */

static int start_helpers(struct cpu_pool *p, int n)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);   /* signals belong to the program's own threads */
    int rc = 0;
    for (int i = 0; i < n && !rc; i++) {
        p->helpers[i] = (struct helper){ .pool = p, .slot = i + 1 };
        rc = pthread_create(&p->helpers[i].thread, NULL, helper_main, &p->helpers[i]);
        p->n_helpers += !rc;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return rc;
}

lm_status cpu_pool_new(int threads, struct cpu_pool **out, struct lm_err *err)
{
    struct cpu_pool *p = cpu_aligned_alloc(sizeof *p);
    if (!p)
        return lm_err_set(err, LM_NOMEM, "out of memory for the thread pool");
    memset(p, 0, sizeof *p);
    pthread_mutex_init(&p->busy, NULL);
    p->helpers = lm_calloc((size_t)threads, sizeof *p->helpers);
    int rc = p->helpers ? start_helpers(p, threads - 1) : 0;
    if (rc || !p->helpers) {
        cpu_pool_free(p);
        return lm_err_set(err, LM_NOMEM, "cannot start %d compute threads: %s", threads,
                          rc ? strerror(rc) : "out of memory");
    }
    *out = p;
    return LM_OK;
}

void cpu_pool_free(struct cpu_pool *p)
{
    if (!p)
        return;
    atomic_store(&p->stop, true);
    atomic_fetch_add(&p->seq, 1);
    futex_wake(&p->seq, p->n_helpers);
    for (int i = 0; i < p->n_helpers; i++)
        pthread_join(p->helpers[i].thread, NULL);
    pthread_mutex_destroy(&p->busy);
    free(p->helpers);
    free(p);
}
