/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_kernels_util.h - what the kernel tests share: a deterministic generator, comparison against
 * a double-precision reference, and the loop over instruction sets and thread counts.
 */
#ifndef LORAMILL_TEST_KERNELS_UTIL_H
#define LORAMILL_TEST_KERNELS_UTIL_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>

#include <cmocka.h>

#include "kernels/cpu/cpu_int.h"

/* xorshift64*: tests must not depend on libc's rand. */
static inline uint64_t rnd(void)
{
    static uint64_t x = 88172645463325252u;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    return x * 2685821657736338717u;
}

static inline float rnd_float(void)     /* [-1, 1) */
{
    return (float)((double)(rnd() >> 11) * 0x1p-52 - 1.0);
}

static inline int rnd_int(int lo, int hi)       /* both included */
{
    return lo + (int)(rnd() % (uint64_t)(hi - lo + 1));
}

static inline float *rnd_floats(size_t n)
{
    float *p = malloc((n + 1) * sizeof *p);
    assert_non_null(p);
    for (size_t i = 0; i < n; i++)
        p[i] = rnd_float();
    return p;
}

/* |got - want| <= tol * scale, where scale is the sum of the magnitudes that went into want (at
 * least 1e-3): float rounding grows with those, not with the result. */
static inline void near(const char *what, int i, int j, float got, double want, double scale,
                        double tol)
{
    double limit = tol * fmax(scale, 1e-3);
    if (!(fabs((double)got - want) <= limit)) {
        print_error("%s [%d, %d]: %.9g, expected %.9g within %.3g\n", what, i, j, (double)got,
                    want, limit);
        fail();
    }
}

struct env {
    kn_device *dev;
    kn_stream *s;
    enum cpu_isa isa;
    int threads;
};

static inline struct env env_open(enum cpu_isa isa, int threads)
{
    struct env e = { .isa = isa, .threads = threads };
    struct lm_err err = { 0 };
    struct kn_open_params p = { .threads = threads };
    kn_cpu_force_isa(isa);
    if (kn_open("cpu", &p, &e.dev, &err) || kn_stream_new(e.dev, &e.s, &err))
        fail_msg("%s", err.msg);
    kn_cpu_force_isa(CPU_ISA_COUNT);
    return e;
}

static inline void env_close(struct env *e)
{
    kn_stream_free(e->s);
    kn_close(e->dev);
}

/* Runs fn on every instruction set that this machine has, with 1 and 3 threads. */
static inline void each_env(void (*fn)(struct env *))
{
    for (int isa = 0; isa < CPU_ISA_COUNT; isa++)
        for (int threads = 1; threads <= 3; threads += 2) {
            if (!cpu_isa_runs((enum cpu_isa)isa))
                continue;
            struct env e = env_open((enum cpu_isa)isa, threads);
            fn(&e);
            env_close(&e);
        }
}

static inline void *dev_alloc(struct env *e, size_t bytes)
{
    void *p;
    assert_int_equal(kn_alloc(e->dev, bytes, &p, NULL), LM_OK);
    return p;
}

#endif
