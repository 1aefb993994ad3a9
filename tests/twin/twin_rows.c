/* SPDX-License-Identifier: Apache-2.0 */
/*
 * twin_rows.c - rmsnorm, silu_mul, gather_rows and feed against the CPU, at ragged sizes. A result
 * is rounded to bf16 once, so it may be off by its unit roundoff, 2^-8, and a hair for the sums.
 */
#include "tests/twin/twin.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ROUNDOFF (0x1p-8 * 1.01)

static void compare(struct twin *c, const char *what, const void *gpu, const void *cpu, int n,
                    int width)
{
    size_t all = (size_t)n * (size_t)width;
    float *g = malloc(all * sizeof *g), *h = malloc(all * sizeof *h);
    side_get_act(c, &c->gpu, gpu, g, all);
    side_get_act(c, &c->cpu, cpu, h, all);
    for (size_t i = 0; i < all; i++)
        twin_near(c, what, (int64_t)i / width, (int64_t)i % width, g[i], h[i],
                  ROUNDOFF * fabs((double)h[i]) + 1e-6);
    free(g);
    free(h);
}

static void check_norm(struct twin *c, int n, int hidden, bool residual)
{
    size_t all = (size_t)n * (size_t)hidden;
    float *x = tw_floats(all), *r = tw_floats(all), *w = tw_floats((size_t)hidden);
    struct kn_rmsnorm a[2];
    struct side *side[2] = { &c->gpu, &c->cpu };
    twin_case(c, "rmsnorm of %d x %d%s", n, hidden, residual ? " with residual" : "");
    for (int i = 0; i < 2; i++) {
        a[i] = (struct kn_rmsnorm){ .x = side_put_act(c, side[i], x, all), .n = n,
                                    .hidden = hidden, .eps = 1e-5f };
        a[i].out = side_put_act(c, side[i], x, all);
        a[i].residual = residual ? side_put_act(c, side[i], r, all) : NULL;
        a[i].weight = side_put(c, side[i], w, (size_t)hidden * sizeof *w);
        twin_status(c, kn_op_rmsnorm(side[i]->s, &a[i]), LM_OK, "rmsnorm");
    }
    compare(c, "out", a[0].out, a[1].out, n, hidden);
    if (residual)
        compare(c, "residual", a[0].residual, a[1].residual, n, hidden);
    free(x);
    free(r);
    free(w);
}

static void check_silu(struct twin *c, int n, int f)
{
    size_t all = (size_t)n * (size_t)f;
    float *x = tw_floats(2 * all);
    struct kn_silu_mul a[2];
    struct side *side[2] = { &c->gpu, &c->cpu };
    twin_case(c, "silu_mul of %d x %d", n, f);
    for (int i = 0; i < 2; i++) {
        a[i] = (struct kn_silu_mul){ .gate_up = side_put_act(c, side[i], x, 2 * all), .n = n,
                                     .f = f };
        a[i].out = side_put_act(c, side[i], x, all);
        twin_status(c, kn_op_silu_mul(side[i]->s, &a[i]), LM_OK, "silu_mul");
    }
    compare(c, "out", a[0].out, a[1].out, n, f);
    free(x);
}

static void check_gather(struct twin *c, int n, int hidden)
{
    size_t all = (size_t)n * (size_t)hidden;
    float *x = tw_floats(all);
    int32_t *idx = malloc((size_t)n * sizeof *idx);
    struct kn_gather_rows a[2];
    struct side *side[2] = { &c->gpu, &c->cpu };
    twin_case(c, "gather_rows of %d x %d", n, hidden);
    for (int i = 0; i < n; i++)
        idx[i] = tw_int(0, n - 1);
    for (int i = 0; i < 2; i++) {
        a[i] = (struct kn_gather_rows){ .x = side_put_act(c, side[i], x, all), .n = n,
                                        .hidden = hidden };
        a[i].idx = side_put(c, side[i], idx, (size_t)n * sizeof *idx);
        a[i].out = side_new(c, side[i], all * sizeof(float));
        twin_status(c, kn_op_gather_rows(side[i]->s, &a[i]), LM_OK, "gather_rows");
    }
    compare(c, "out", a[0].out, a[1].out, n, hidden);
    free(x);
    free(idx);
}

static void check_feed(struct twin *c, int n)
{
    int32_t v[400] = { 0 }, at[100], from[100], got[2][400];
    struct side *side[2] = { &c->gpu, &c->cpu };
    twin_case(c, "feed of %d", n);
    for (int i = 0; i < n; i++) {
        at[i] = 2 * (n - 1 - i) + 1;
        from[i] = tw_int(0, n - 1);
    }
    for (int i = 200; i < 400; i++)
        v[i] = (int32_t)tw_rnd();
    for (int i = 0; i < 2; i++) {
        int32_t *d = side_put(c, side[i], v, sizeof v);
        struct kn_feed a = { d, side_put(c, side[i], at, sizeof at), d + 200,
                             side_put(c, side[i], from, sizeof from), n };
        twin_status(c, kn_op_feed(side[i]->s, &a), LM_OK, "feed");
        side_get(c, side[i], d, got[i], sizeof v);
    }
    if (memcmp(got[0], got[1], sizeof v) != 0)
        twin_fail(c, "fed values differ");
}

bool twin_rows(struct twin *c)
{
    static const int sizes[] = { 1, 7, 8, 40, 192, 1000, 4096, 8192 };
    for (size_t i = 0; i < LM_COUNT(sizes); i++) {
        check_norm(c, i % 2 ? 5 : 3, sizes[i], i % 3 > 0);
        check_silu(c, i % 2 ? 33 : 2, sizes[i]);
        check_gather(c, i % 2 ? 9 : 1, sizes[i]);
    }
    check_feed(c, 1);
    check_feed(c, 100);
    return twin_end(c, "rows");
}
