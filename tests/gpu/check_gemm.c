/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check_gemm.c - y = x W^T against the CPU, row by row in any company, and its speed.
 *
 * Inputs are random signs times magnitudes in [0, 1), so the magnitudes of k products sum to k / 4
 * on average and to no more than k.
 */
#include "check.h"

#include "tests/twin/twin.h"

struct gemm_case {
    int m, n, k;
    bool bias, accumulate, f32;
    int pad;                    /* more than a row's length between rows */
};

static void check_case(struct gpu_check *c, const struct gemm_case *t, kn_mat *g, kn_mat *h)
{
    int64_t ldx = t->k + t->pad, ldy = t->n + t->pad;
    size_t nx = (size_t)(t->m * ldx), ny = (size_t)(t->m * ldy);
    struct pair x = pair_new(c, nx), y = pair_new(c, ny);
    float *bias = malloc((size_t)t->n * sizeof *bias), *got = NULL, *yf = NULL;
    for (int i = 0; i < t->n; i++)
        bias[i] = round_bf16(rnd_float());
    float *dbias = dev_put(c, bias, (size_t)t->n * sizeof *bias);
    if (t->f32)
        yf = dev_put(c, y.cpu, ny * sizeof *y.cpu);
    struct kn_gemm a = { .y = t->f32 ? (void *)yf : y.gpu, .x = x.gpu, .w = g, .m = t->m,
                         .bias = t->bias ? dbias : NULL, .ldx = ldx, .ldy = ldy,
                         .accumulate = t->accumulate, .y_f32 = t->f32 }, b = a;
    b.y = y.cpu, b.x = x.cpu, b.w = h, b.bias = t->bias ? bias : NULL;
    lm_status st = kn_op_gemm(c->gs, &a);
    must(kn_op_gemm(c->cs, &b), "gemm");
    if (t->f32) {
        got = malloc((ny + 1) * sizeof *got);
        dev_get(c, got, yf, ny * sizeof *got);
        dev_free(c, yf);
    } else {
        got = pair_get(c, &y);
    }
    /* adding bias and old y, at most 1, in float32 rounds by 2^-24, at most 4 times: in this too */
    double e = excess(got, y.cpu, NULL, ny, t->f32 ? F32_SUM : OUT_ULP, F32_SUM * t->k / 4);
    check_that(c, st == LM_OK && e <= 1, "gemm m=%d n=%d k=%d%s%s%s%s: %.2f of the tolerance",
               t->m, t->n, t->k, t->bias ? " bias" : "", t->accumulate ? " accumulate" : "",
               t->f32 ? " float32" : "", t->pad ? " strided" : "", e);
    pair_free(c, &x);
    pair_free(c, &y);
    dev_free(c, dbias);
    free(bias);
    free(got);
}

/* The same row alone among zeros and among strangers, at the same row count: the same bits. */
static void check_row(struct gpu_check *c, int m, int n, int k, kn_mat *g)
{
    struct pair x = pair_new(c, (size_t)m * (size_t)k), z = pair_new(c, (size_t)m * (size_t)k);
    size_t row = (size_t)k * 2;
    int at = m / 2;
    must(kn_copy(c->gs, (char *)z.gpu + (size_t)at * row, (char *)x.gpu + (size_t)at * row, row),
         "copy");
    struct pair y1 = pair_new(c, (size_t)m * (size_t)n), y2 = pair_new(c, (size_t)m * (size_t)n);
    struct kn_gemm a = { .y = y1.gpu, .x = x.gpu, .w = g, .m = m, .ldx = k, .ldy = n }, b = a;
    b.y = y2.gpu, b.x = z.gpu;
    must(kn_op_gemm(c->gs, &a), "gemm");
    must(kn_op_gemm(c->gs, &b), "gemm");
    float *r1 = pair_get(c, &y1), *r2 = pair_get(c, &y2);
    size_t o = (size_t)at * (size_t)n;
    check_that(c, !memcmp(r1 + o, r2 + o, (size_t)n * sizeof *r1),
               "gemm m=%d n=%d k=%d: a row's bits do not depend on its neighbours", m, n, k);
    pair_free(c, &x);
    pair_free(c, &z);
    pair_free(c, &y1);
    pair_free(c, &y2);
    free(r1);
    free(r2);
}

/* Weights in float16 and E4M3: against the twin, and a row in any company. */
static void check_mixed(struct gpu_check *c)
{
    static const int ms[] = { 8, 16, 32, 64, 200 };
    static const enum kn_dtype types[] = { KN_F16, KN_E4M3 };
    struct lm_err err;
    struct twin t;
    if (check_that(c, twin_open(&t, c->cuda, c->cpu), "gemm in other types: streams")) {
        check_that(c, twin_gemm_fp8(&t), "gemm in E4M3 equals its CPU twin");
        check_that(c, twin_gemm_x_e4m3(&t), "gemm in E4M3 of x in E4M3 equals its CPU twin");
        check_that(c, twin_gemm_f16(&t), "gemm and embed in float16 equal their CPU twins");
        check_that(c, twin_company(&t), "gemm: a row's bits do not depend on how many there are");
    }
    twin_close(&t);
    for (int i = 0; i < 2; i++) {
        kn_mat *w = NULL;
        kn_stream *own = NULL, *was = c->gs;
        must(kn_mat_new(c->cuda, types[i], 4096, 1024, &w, &err), "mat_new");
        must(kn_mat_fill(w, 7, 1, &err), "mat_fill");
        must(kn_stream_new(c->cuda, &own, &err), "stream_new");     /* it knows of FP8 weights */
        c->gs = own;
        for (size_t k = 0; k < LM_COUNT(ms); k++)
            check_row(c, ms[k], 4096, 1024, w);
        c->gs = was;
        kn_stream_free(own);
        kn_mat_free(w);
    }
}

/* As prefill has them: many rows, before and after cuBLASLt's algorithms were measured. */
static void check_many(struct gpu_check *c)
{
    enum { M = 2048, N = 1000, K = 4096 };
    kn_mat *g, *h;
    kn_stream *own = NULL, *was = c->gs;
    struct lm_err err;
    mats_new(c, N, K, 1, &g, &h);
    void *x = dev_new(c, (size_t)M * K * 2), *y = dev_new(c, (size_t)M * N * 2);
    must(kn_stream_new(c->cuda, &own, &err), "stream_new");
    const struct kn_gemm a = { .y = y, .x = x, .w = g, .m = M, .ldx = K, .ldy = N };
    const kn_mat *all[] = { g };
    for (int tuned = 0; tuned < 2; tuned++) {
        if (tuned)
            must(kn_gemm_tune(own, &a, all, 1), "gemm_tune");
        c->gs = own;
        printf("# products of many rows, %s:\n", tuned ? "tuned" : "not tuned");
        check_case(c, &(struct gemm_case){ 300, N, K, .bias = true }, g, h);
        check_case(c, &(struct gemm_case){ 300, N, K, .accumulate = true, .pad = 8 }, g, h);
        check_case(c, &(struct gemm_case){ M, N, K, .f32 = tuned == 0 }, g, h);
        check_row(c, 300, N, K, g);
        c->gs = was;
    }
    kn_stream_free(own);
    dev_free(c, x);
    dev_free(c, y);
    kn_mat_free(g);
    kn_mat_free(h);
}

void check_gemm(struct gpu_check *c)
{
    static const int shapes[][2] = { { 40, 24 }, { 33, 72 }, { 192, 512 }, { 1000, 4096 },
                                     { 4096, 1016 }, { 37, 11008 } };
    static const int ms[] = { 1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65, 133 };
    for (size_t s = 0; s < LM_COUNT(shapes); s++) {
        kn_mat *g, *h;
        int n = shapes[s][0], k = shapes[s][1];
        mats_new(c, n, k, 1, &g, &h);
        for (size_t i = 0; i < LM_COUNT(ms); i++) {
            struct gemm_case t = { ms[i], n, k, false, false, false, 0 };
            t.bias = i % 3 == 1;
            t.accumulate = (i + s) % 4 == 2;
            t.f32 = (i + s) % 5 == 3;
            t.pad = (i + s) % 3 == 2 ? 8 : 0;
            check_case(c, &t, g, h);
            if (ms[i] > 1)
                check_row(c, ms[i], n, k, g);
        }
        kn_mat_free(g);
        kn_mat_free(h);
    }
    check_many(c);
    check_mixed(c);
    struct twin t;
    if (check_that(c, twin_open(&t, c->cuda, c->cpu), "gate_up: streams"))
        check_that(c, twin_gate_up(&t) && twin_gate_up_boxes(&t),
                   "gate_up equals a product and its activation");
    twin_close(&t);
}

/* ---- speed ----------------------------------------------------------------------------- */

/* As the engine runs it: tuned, on random numbers, weights colder than L2 holds. */

#define COPIES 8                /* of the weight: more than L2 holds */

struct gemm_run {
    struct kn_gemm a;
    kn_mat *w[COPIES];
    void *out;                  /* gate_up's, [m, f] */
    int f;
};

struct bench_kind {
    const char *name;
    enum kn_dtype t;
    bool x_e4m3;
    const int *ms, n_ms;
    void *out;                  /* not NULL: gate_up is measured there */
};

static lm_status one_gemm(struct gpu_check *c, void *ctx, int i)
{
    struct gemm_run *r = ctx;
    r->a.w = r->w[i % COPIES];
    return kn_op_gemm(c->gs, &r->a);
}

static lm_status one_gate_up(struct gpu_check *c, void *ctx, int i)
{
    struct gemm_run *r = ctx;
    r->a.w = r->w[i % COPIES];
    const struct kn_gate_up a = { r->a, r->out };
    return kn_op_gate_up(c->gs, &a);
}

static lm_status one_gemm_silu(struct gpu_check *c, void *ctx, int i)
{
    struct gemm_run *r = ctx;
    const struct kn_silu_mul silu = { r->out, r->a.y, r->a.m, r->f };
    lm_status st = one_gemm(c, ctx, i);
    return st == LM_OK ? kn_op_silu_mul(c->gs, &silu) : st;
}

/* The feed-forward's first product with its activation, in one and in two. */
static void bench_gate_up(struct gpu_check *c, struct gemm_run *r, int n, int k)
{
    static const int ms[] = { 1, 8, 256 };
    for (size_t i = 0; i < LM_COUNT(ms); i++) {
        char name[64];
        r->a.m = ms[i], r->a.ldx = k, r->a.ldy = n;
        double bytes = 2.0 * ((double)n * k + (double)ms[i] * (n / 2 + k));
        double one = time_op(c, one_gate_up, r, 3 * COPIES);
        double two = time_op(c, one_gemm_silu, r, 3 * COPIES);
        snprintf(name, sizeof name, "gate_up m=%d, %d x %d", ms[i], n, k);
        double flops = 2.0 * ms[i] * n * k;
        figure(c, name, one, "us",
               "\"two_launches_us\": %.1f, \"gbps\": %.0f, \"share\": %.2f", two,
               bytes / one / 1e3, fmax(bytes / one / 1e3 / c->gbps, flops / one / 1e6 / c->tflops));
    }
}

static void bench_rows_of(struct gpu_check *c, const struct bench_kind *b, struct gemm_run *r,
                          int m)
{
    const int n = (int)r->a.ldy, k = (int)r->a.ldx;
    const double size = b->t == KN_E4M3 ? 1 : 2;
    char name[80];
    r->a.m = m;
    double us = time_op(c, one_gemm, r, m > 1000 ? COPIES : 3 * COPIES);
    double bytes = size * n * k + 2.0 * m * (n + k), flops = 2.0 * m * n * k;
    snprintf(name, sizeof name, "gemm%s m=%d, %d x %d", b->name, m, n, k);
    figure(c, name, us, "us", "\"gbps\": %.0f, \"tflops\": %.1f, \"share\": %.2f",
           bytes / us / 1e3, flops / us / 1e6,
           fmax(bytes / us / 1e3 / c->gbps, flops / us / 1e6 / c->tflops));
}

static void bench_shape(struct gpu_check *c, const struct bench_kind *b, void *y, const void *x,
                        int n, int k)
{
    struct gemm_run r = { .a = { .y = y, .x = x, .ldx = k, .ldy = n, .x_e4m3 = b->x_e4m3 } };
    const kn_mat *all[COPIES];
    struct lm_err err;
    kn_stream *own = NULL, *was = c->gs;
    for (int i = 0; i < COPIES; i++) {
        must(kn_mat_new(c->cuda, b->t, n, k, &r.w[i], &err), "mat_new");
        must(kn_mat_fill(r.w[i], 1 + (uint64_t)i, 1, &err), "mat_fill");
        all[i] = r.w[i];
    }
    must(kn_stream_new(c->cuda, &own, &err), "stream_new");
    c->gs = own;
    r.a.m = b->ms[b->n_ms - 1];
    must(kn_gemm_tune(own, &r.a, all, COPIES), "gemm_tune");
    for (int i = 0; i < b->n_ms; i++)
        bench_rows_of(c, b, &r, b->ms[i]);
    if (b->out && (n == 22016 || n == 28672)) {
        r.out = b->out, r.f = n / 2;
        bench_gate_up(c, &r, n, k);
    }
    c->gs = was;
    kn_stream_free(own);
    for (int i = 0; i < COPIES; i++)
        kn_mat_free(r.w[i]);
}

void bench_gemm(struct gpu_check *c)
{
    static const int shapes[][2] = { { 4096, 4096 }, { 12288, 4096 }, { 6144, 4096 },
                                     { 22016, 4096 }, { 28672, 4096 }, { 4096, 11008 },
                                     { 4096, 14336 }, { 32000, 4096 } };
    static const int ms[] = { 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 4096 };
    void *x = dev_new(c, (size_t)4096 * 14336 * 2), *y = dev_new(c, (size_t)4096 * 32000 * 2);
    void *out = dev_new(c, (size_t)256 * 14336 * 2);
    const struct bench_kind kind = { "", KN_BF16, false, ms, LM_COUNT(ms), out };
    fill_random(c, x, 4096, 14336);
    for (size_t s = 0; s < LM_COUNT(shapes); s++)
        bench_shape(c, &kind, y, x, shapes[s][0], shapes[s][1]);
    dev_free(c, x);
    dev_free(c, y);
    dev_free(c, out);
}

/* Weights of other types than x, beside bf16 in the same run. */
void bench_gemm_mixed(struct gpu_check *c)
{
    static const int shapes[][2] = { { 4096, 4096 }, { 12288, 4096 }, { 22016, 4096 },
                                     { 4096, 11008 } };
    static const int ms[] = { 1, 8, 16, 32, 64, 128, 256, 512, 2048 };
    static const struct bench_kind kinds[] = {
        { " beside", KN_BF16, false, ms, LM_COUNT(ms), NULL },
        { " in float16", KN_F16, false, ms, LM_COUNT(ms), NULL },
        { " in E4M3", KN_E4M3, false, ms, LM_COUNT(ms), NULL },
        { " in E4M3, x too,", KN_E4M3, true, ms, LM_COUNT(ms), NULL },
    };
    void *x = dev_new(c, (size_t)2048 * 11008 * 2), *y = dev_new(c, (size_t)2048 * 22016 * 2);
    fill_random(c, x, 2048, 11008);
    for (size_t s = 0; s < LM_COUNT(shapes); s++)
        for (size_t i = 0; i < LM_COUNT(kinds); i++)
            bench_shape(c, &kinds[i], y, x, shapes[s][0], shapes[s][1]);
    dev_free(c, x);
    dev_free(c, y);
}
