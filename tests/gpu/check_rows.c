/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check_rows.c - embed, rmsnorm, silu_mul, gather_rows and feed against the CPU.
 */
#include "check.h"

static const int sizes[] = { 1, 7, 8, 40, 192, 1000, 4096, 5120, 8192 };

static void compare(struct gpu_check *c, const struct pair *out, const float *mag, double sum_tol,
                    const char *what, int n, int hidden)
{
    float *got = pair_get(c, out);
    double x = excess(got, out->cpu, mag, out->n, OUT_ULP, sum_tol);
    check_that(c, x <= 1, "%s [%d, %d]: %.2f of the tolerance", what, n, hidden, x);
    free(got);
}

static void check_embed(struct gpu_check *c, int n, int hidden)
{
    kn_mat *g, *h;
    const int vocab = 50;
    int32_t ids[133];
    mats_new(c, vocab, hidden, 1, &g, &h);
    for (int i = 0; i < n; i++)
        ids[i] = rnd_int(0, vocab - 1);
    int32_t *dids = dev_put(c, ids, sizeof ids);
    struct pair out = pair_new(c, (size_t)n * (size_t)hidden);
    struct kn_embed a = { out.gpu, g, dids, n, hidden }, b = { out.cpu, h, ids, n, hidden };
    must(kn_op_embed(c->gs, &a), "embed");
    must(kn_op_embed(c->cs, &b), "embed");
    compare(c, &out, NULL, 0, "embed", n, hidden);
    struct pair rows = pair_new(c, (size_t)n * (size_t)hidden);
    for (int i = 0; i < n; i++)
        ids[i] = rnd_int(0, n - 1);
    int32_t *idx = dev_put(c, ids, sizeof ids);
    struct kn_gather_rows p = { rows.gpu, out.gpu, idx, n, hidden };
    struct kn_gather_rows q = { rows.cpu, out.cpu, ids, n, hidden };
    must(kn_op_gather_rows(c->gs, &p), "gather_rows");
    must(kn_op_gather_rows(c->cs, &q), "gather_rows");
    compare(c, &rows, NULL, 0, "gather_rows", n, hidden);
    pair_free(c, &rows);
    pair_free(c, &out);
    dev_free(c, dids);
    dev_free(c, idx);
    kn_mat_free(g);
    kn_mat_free(h);
}

static void check_norm(struct gpu_check *c, int n, int hidden, bool residual, bool alias)
{
    struct pair x = pair_new(c, (size_t)n * (size_t)hidden), r = pair_new(c, x.n);
    struct pair out = alias ? x : pair_new(c, x.n);
    float *w = malloc((size_t)hidden * sizeof *w), *mag = malloc(x.n * sizeof *mag);
    for (int i = 0; i < hidden; i++)
        w[i] = 1 + rnd_float() / 2;
    float *dw = dev_put(c, w, (size_t)hidden * sizeof *w);
    struct kn_rmsnorm a = { out.gpu, x.gpu, residual ? r.gpu : NULL, dw, n, hidden, 1e-5f };
    struct kn_rmsnorm b = { out.cpu, x.cpu, residual ? r.cpu : NULL, w, n, hidden, 1e-5f };
    must(kn_op_rmsnorm(c->gs, &a), "rmsnorm");
    must(kn_op_rmsnorm(c->cs, &b), "rmsnorm");
    /* the norm's scale carries the relative error of a float32 sum and of rsqrt */
    for (size_t i = 0; i < out.n; i++)
        mag[i] = fabsf(out.cpu[i]);
    compare(c, &out, mag, 2 * F32_SUM, "rmsnorm", n, hidden);
    free(mag);
    if (residual)
        compare(c, &r, NULL, 0, "rmsnorm's residual", n, hidden);
    pair_free(c, &x);
    pair_free(c, &r);
    if (!alias)
        pair_free(c, &out);
    dev_free(c, dw);
    free(w);
}

static void check_silu(struct gpu_check *c, int n, int f)
{
    float *v = malloc((size_t)n * 2 * (size_t)f * sizeof *v);
    for (int i = 0; i < n * 2 * f; i++)
        v[i] = 12 * rnd_float();
    struct pair in = pair_of(c, v, (size_t)n * 2 * (size_t)f);
    struct pair out = pair_new(c, (size_t)n * (size_t)f);
    struct kn_silu_mul a = { out.gpu, in.gpu, n, f }, b = { out.cpu, in.cpu, n, f };
    must(kn_op_silu_mul(c->gs, &a), "silu_mul");
    must(kn_op_silu_mul(c->cs, &b), "silu_mul");
    compare(c, &out, NULL, 1e-7, "silu_mul", n, f);
    pair_free(c, &in);
    pair_free(c, &out);
    free(v);
}

static void check_feed(struct gpu_check *c, int n)
{
    int32_t dst[600] = { 0 }, at[300], src[300], from[300], got[600];
    for (int i = 0; i < n; i++) {
        at[i] = 2 * ((i * 7) % n) + 1;          /* distinct: 7 and n have no common factor */
        src[i] = (int32_t)rnd();
        from[i] = rnd_int(0, n - 1);
    }
    int32_t *d = dev_put(c, dst, sizeof dst), *da = dev_put(c, at, sizeof at);
    int32_t *ds = dev_put(c, src, sizeof src), *df = dev_put(c, from, sizeof from);
    struct kn_feed a = { d, da, ds, df, n }, b = { dst, at, src, from, n };
    must(kn_op_feed(c->gs, &a), "feed");
    must(kn_op_feed(c->cs, &b), "feed");
    dev_get(c, got, d, sizeof got);
    check_that(c, !memcmp(got, dst, sizeof got), "feed of %d", n);
    dev_free(c, d);
    dev_free(c, da);
    dev_free(c, ds);
    dev_free(c, df);
}

void check_rows(struct gpu_check *c)
{
    for (size_t i = 0; i < LM_COUNT(sizes); i++) {
        check_embed(c, i % 2 ? 133 : 3, sizes[i]);
        check_norm(c, i % 2 ? 5 : 33, sizes[i], i % 3 > 0, i % 4 == 1);
        check_silu(c, i % 2 ? 33 : 2, sizes[i]);
    }
    check_norm(c, 2, 32768, true, false);
    check_feed(c, 1);
    check_feed(c, 300 - 1);
}

/* ---- speed ----------------------------------------------------------------------------- */

struct norm_run {
    struct kn_rmsnorm norm;
    struct kn_silu_mul silu;
};

static lm_status one_norm(struct gpu_check *c, void *ctx, int i)
{
    (void)i;
    return kn_op_rmsnorm(c->gs, &((struct norm_run *)ctx)->norm);
}

static lm_status one_silu(struct gpu_check *c, void *ctx, int i)
{
    (void)i;
    return kn_op_silu_mul(c->gs, &((struct norm_run *)ctx)->silu);
}

void bench_rows(struct gpu_check *c)
{
    const int hidden = 4096, f = 11008, most = 8192;
    void *x = dev_new(c, (size_t)most * 2 * (size_t)f * 2), *r = dev_new(c, (size_t)most * 8192);
    void *out = dev_new(c, (size_t)most * (size_t)f * 2);
    float *w = dev_new(c, 4 * 4096);
    const int rows[] = { 1, 256, 8192 };
    for (size_t i = 0; i < LM_COUNT(rows); i++) {
        int n = rows[i];
        struct norm_run run = { { out, x, r, w, n, hidden, 1e-5f }, { out, x, n, f } };
        char name[64];
        double us = time_op(c, one_norm, &run, 50), bytes = (double)n * hidden * 2 * 4;
        snprintf(name, sizeof name, "rmsnorm + residual, %d x %d", n, hidden);
        figure(c, name, us, "us", "\"gbps\": %.0f, \"share\": %.2f", bytes / us / 1e3,
               bytes / us / 1e3 / c->gbps);
        us = time_op(c, one_silu, &run, 50);
        bytes = (double)n * f * 2 * 3;
        snprintf(name, sizeof name, "silu_mul, %d x %d", n, f);
        figure(c, name, us, "us", "\"gbps\": %.0f, \"share\": %.2f", bytes / us / 1e3,
               bytes / us / 1e3 / c->gbps);
    }
    dev_free(c, x);
    dev_free(c, r);
    dev_free(c, out);
    dev_free(c, w);
}
