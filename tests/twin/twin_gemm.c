/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Products with weights in float16 and E4M3 against the CPU twin; embedding from float16.
 *
 * Both sides round (E4M3: scale and round) the same float32 rows to the same numbers, and hold the
 * same x. Tolerance: y is rounded once to bf16, 2^-8 |y|, or not at all in float32; float32 sums
 * add 2e-6 of the sum of |x w| on either side. On top of that,
 *   E4M3, many rows of x     weights are widened to bf16 and rounded again: 2^-8 of that sum; or x
 *                            is split, which is exact but for the sums' 2^-10 (below);
 *   x in E4M3 too            the twin gets x as the device should round it, so only sums differ;
 *                            but tensor cores align the products of 32 columns to the largest and
 *                            keep 13 bits behind it, for up to 128 columns before float32 takes
 *                            over: for magnitudes spread evenly, 2^-12 of the sum, and 2^-10 is
 *                            allowed.
 * A device need not round x: then all of a case is near what x as it is gives.
 *
 * A bias and an old y may be far larger than the product, or cancel, so what adding them costs is
 * counted at their own size: each float32 addition rounds by 2^-24 of its result, which is at most
 * the sum of |x w|, |bias| and |old y|. The device adds them to a finished sum, two additions; the
 * twin may add a product in pieces of TWIN_PIECE columns and more onto them, so two and one for
 * each piece.
 */
#include "tests/twin/twin.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SUMS 4e-6
#define TWIN_PIECE 128
#define HALF_ULP 0x1p-24        /* of float32 */

struct gemm_case {
    int m, n, k;
    bool bias, accumulate, y_f32, x_e4m3;
    enum kn_dtype t;
    int spread;                 /* rows of x are 2^-spread to 2^spread times as large */
};

struct gemm_data {
    float *w, *x, *y, *bias;
    int ldx, ldy;
};

/* y afterwards, [m, ldy]. */
static float *run_side(struct twin *c, struct side *s, const struct gemm_case *g,
                       const struct gemm_data *d)
{
    struct lm_err err = { 0 };
    kn_mat *w = NULL;
    kn_stream *own = NULL;
    const size_t rows = (size_t)g->m, n_y = rows * (size_t)d->ldy;
    float *out = calloc(n_y + 1, sizeof *out);
    if (!twin_status(c, kn_mat_new(s->dev, g->t, g->n, g->k, &w, &err), LM_OK, "mat_new") ||
        !twin_status(c, kn_mat_upload(w, 0, 0, g->n, g->k, d->w, KN_F32, (size_t)g->k, &err), LM_OK,
                     "mat_upload") ||
        !twin_status(c, kn_stream_new(s->dev, &own, &err), LM_OK, "stream_new"))
        return out;
    struct kn_gemm a = {
        .x = side_put_act(c, s, d->x, rows * (size_t)d->ldx), .w = w, .m = g->m, .ldx = d->ldx,
        .bias = g->bias ? side_put(c, s, d->bias, (size_t)g->n * sizeof(float)) : NULL,
        .ldy = d->ldy, .accumulate = g->accumulate, .y_f32 = g->y_f32, .x_e4m3 = g->x_e4m3,
    };
    a.y = g->y_f32 ? side_put(c, s, d->y, n_y * sizeof(float)) : side_put_act(c, s, d->y, n_y);
    twin_status(c, kn_op_gemm(own, &a), LM_OK, "gemm");
    twin_status(c, kn_stream_sync(own, &err), LM_OK, "sync");
    if (g->y_f32)
        side_get(c, s, a.y, out, n_y * sizeof(float));
    else
        side_get_act(c, s, a.y, out, n_y);
    kn_stream_free(own);
    kn_mat_free(w);
    return out;
}

/* The nearest number of E4M3, ties to even, by its definition. */
static float to_e4m3(float v)
{
    int e;
    (void)frexpf(v, &e);
    const int unit = LM_MAX(e - 4, -9);
    const float r = ldexpf(rintf(ldexpf(v, -unit)), unit);
    return fabsf(r) > 448 ? copysignf(448, r) : r;
}

/* x as W's rows are kept. */
static float *rounded_x(const struct gemm_case *g, const struct gemm_data *d)
{
    float *x = calloc((size_t)g->m * (size_t)d->ldx + 1, sizeof *x);
    for (int i = 0; i < g->m; i++) {
        const float *row = d->x + i * d->ldx;
        float most = 0;
        for (int l = 0; l < g->k; l++)
            most = LM_MAX(most, fabsf(row[l]));
        const float scale = most > 0 ? LM_MAX(most / 448, FLT_MIN) : 1;
        for (int l = 0; l < g->k; l++)
            x[i * d->ldx + l] = to_e4m3(row[l] / scale) * scale;
    }
    return x;
}

/* What y [i, j] may be off by: its rounding, what its sums cost, and what adding to them does. */
static double tolerance(const struct gemm_case *g, const struct gemm_data *d, int i, int j,
                        double want, double of_sum)
{
    const int both = 2 * (g->bias + g->accumulate), pieces = LM_DIV_UP(g->k, TWIN_PIECE);
    double mag = 0, onto = 0;
    if (j >= g->n)
        return 0;               /* not ours to change */
    for (int l = 0; l < g->k; l++)
        mag += fabs((double)d->x[i * d->ldx + l] * (double)d->w[j * g->k + l]);
    if (g->bias)
        onto += fabs((double)d->bias[j]);
    if (g->accumulate)
        onto += fabs((double)d->y[i * d->ldy + j]);
    const double adding = both ? (both + pieces) * HALF_ULP * (mag + onto) : 0;
    const double sum = mag * of_sum + adding + 1e-30;
    return sum + (g->y_f32 ? 2 * HALF_ULP : 0x1p-8) * (fabs(want) + sum);
}

/* How far beyond the tolerance, 0 if within; `say`: reports what is. */
static double judge(struct twin *c, const struct gemm_case *g, const struct gemm_data *d,
                    const float *got, const float *want, double of_sum, bool say)
{
    /* Of a large product, one element in some: their tolerances take as long as they do. */
    const int every = (int64_t)g->m * g->n * g->k > 100000000 ? 61 : 1;
    double worst = 0;
    for (int i = 0; i < g->m; i++)
        for (int j = i % every; j < d->ldy; j += every) {
            double w = (double)want[i * d->ldy + j];
            double tol = tolerance(g, d, i, j, w, of_sum);
            double off = fabs((double)got[i * d->ldy + j] - w);
            worst = fmax(worst, off <= tol ? 0 : off / (tol + 1e-30));
            if (say)
                twin_near(c, "y", i, j, got[i * d->ldy + j], want[i * d->ldy + j], tol);
        }
    return worst;
}

static void make_data(const struct gemm_case *g, struct gemm_data *d)
{
    *d = (struct gemm_data){ .ldx = (g->k + 15) / 8 * 8 + g->m % 2 * (g->t == KN_F16),
                             .ldy = g->n + (g->x_e4m3 ? 8 : 3) };
    d->w = tw_floats((size_t)g->n * (size_t)g->k);
    d->x = tw_floats((size_t)g->m * (size_t)d->ldx);
    d->y = tw_floats((size_t)g->m * (size_t)d->ldy);
    d->bias = tw_floats((size_t)g->n);
    for (int j = 0; j < g->n; j++)              /* scales that differ, and a row of zeros */
        for (int l = 0; l < g->k; l++)
            d->w[j * g->k + l] *= j == 5 ? 0.0f : ldexpf(1.3f, j % 9 - 6);
    for (int i = 0; g->spread && i < g->m; i++)
        for (int l = 0; l < g->k; l++)
            d->x[i * d->ldx + l] *= i == 3 ? 0.0f : ldexpf(1, i * 37 % (2 * g->spread) - g->spread -
                                                              (l % 7 == 2) * 20);
}

/* How many cases the device rounded x in. */
static int x_rounded;

static void compare(struct twin *c, const struct gemm_case *g)
{
    struct gemm_data d;
    const bool e4m3 = g->t == KN_E4M3, many = g->m > 32;
    twin_case(c, "gemm in %s%s: %d x %d x %d%s%s%s%s", kn_dtype_name(g->t),
              g->x_e4m3 ? ", x too" : "", g->m, g->n, g->k, g->bias ? ", bias" : "",
              g->accumulate ? ", onto y" : "", g->y_f32 ? ", to float32" : "",
              g->spread ? ", rows apart" : "");
    make_data(g, &d);
    float *got = run_side(c, &c->gpu, g, &d), *x = d.x;
    float *want = NULL;
    double of_sum = SUMS + (e4m3 && many ? 0x1p-8 : 0);
    if (g->x_e4m3) {
        d.x = rounded_x(g, &d);
        want = run_side(c, &c->cpu, g, &d);
        const double near_e4m3 = SUMS + 0x1p-10;
        if (judge(c, g, &d, got, want, near_e4m3, false) <= 0)
            x_rounded++, of_sum = near_e4m3;
        else
            free(want), want = NULL;
        free(d.x);
        d.x = x;
    }
    if (!want)
        want = run_side(c, &c->cpu, g, &d);
    (void)judge(c, g, &d, got, want, of_sum, true);
    free(got), free(want), free(d.w), free(d.x), free(d.y), free(d.bias);
}

bool twin_gemm_fp8(struct twin *c)
{
    static const int ms[] = { 1, 2, 7, 8, 9, 16, 17, 32, 33, 70 };
    static const int ks[] = { 16, 48, 64, 80, 1024, 2064, 4112 };
    static const int many[] = { 33, 56, 57, 130, 300 };
    const enum kn_dtype t = KN_E4M3;
    for (size_t i = 0; i < LM_COUNT(ms); i++)
        for (size_t j = 0; j < LM_COUNT(ks); j++) {
            if (c->slow && (ks[j] > 3000 || ks[j] * ms[i] > 20000) && (i + j) % 4)
                continue;
            compare(c, &(struct gemm_case){ ms[i], tw_int(1, 70), ks[j], (i + j) % 2,
                                            (i + j) % 3 == 0, .t = t });
        }
    for (size_t i = 0; i < LM_COUNT(many); i++)        /* where x may come in two parts */
        for (int j = 0; j < 4; j++)
            compare(c, &(struct gemm_case){ many[i], 16 * tw_int(1, 5), ks[j], j % 2, j / 2,
                                            (i + (size_t)j) % 3 == 0, .t = t,
                                            .spread = j % 3 ? 0 : 30 });
    if (!c->slow) {
        compare(c, &(struct gemm_case){ 1, 12288, 4096, true, .t = t });
        compare(c, &(struct gemm_case){ 24, 4096, 11008, .accumulate = true, .t = t });
        compare(c, &(struct gemm_case){ 100, 11008, 4096, .t = t });
        compare(c, &(struct gemm_case){ 300, 11008, 4096, .t = t });    /* slices */
        compare(c, &(struct gemm_case){ 256, 40000, 64, true, true, .t = t });  /* of x */
    }
    return twin_end(c, "gemm in E4M3");
}

/* x in E4M3 as well: above 32 rows, and only where the device multiplies such. */
bool twin_gemm_x_e4m3(struct twin *c)
{
    static const int ms[] = { 16, 33, 64, 130 };
    static const int ks[] = { 16, 64, 1040 };
    int many = 0;
    x_rounded = 0;
    for (size_t i = 0; i < LM_COUNT(ms); i++)
        for (size_t j = 0; j < LM_COUNT(ks); j++) {
            const struct gemm_case g = { ms[i], 16 * tw_int(1, 6), ks[j], (i + j) % 2,
                                         (i + j) % 3 == 0, .x_e4m3 = true, .t = KN_E4M3,
                                         .spread = (i + j) % 2 ? 30 : 0 };
            many += ms[i] > 32;
            compare(c, &g);
        }
    if (!c->slow) {             /* the second in two slices */
        compare(c, &(struct gemm_case){ 300, 4096, 4096, .x_e4m3 = true, .t = KN_E4M3 });
        compare(c, &(struct gemm_case){ 150, 128000, 64, true, true, .x_e4m3 = true,
                                        .t = KN_E4M3 });
        many += 2;
    }
    printf("# x was rounded in %d of %d products of more than 32 rows\n", x_rounded, many);
    return twin_end(c, "gemm in E4M3 of x in E4M3");
}

static void embed_f16(struct twin *c, int rows, int hidden)
{
    struct side *side[2] = { &c->gpu, &c->cpu };
    struct lm_err err = { 0 };
    const int n = 5;
    const int32_t ids[] = { rows - 1, 0, rows / 2, 0, 1 };
    float *w = tw_floats((size_t)rows * (size_t)hidden), *got[2];
    twin_case(c, "embed from float16, %d x %d", rows, hidden);
    for (int i = 0; i < rows * hidden; i++)
        w[i] *= ldexpf(1.3f, i % 20 - 16);
    for (int i = 0; i < 2; i++) {
        struct side *s = side[i];
        const size_t all = (size_t)n * (size_t)hidden;
        kn_mat *m = NULL;
        twin_status(c, kn_mat_new(s->dev, KN_F16, rows, hidden, &m, &err), LM_OK, "mat_new");
        twin_status(c, kn_mat_upload(m, 0, 0, rows, hidden, w, KN_F32, (size_t)hidden, &err), LM_OK,
                    "mat_upload");
        struct kn_embed a = { side_new(c, s, all * sizeof(float)), m,
                              side_put(c, s, ids, sizeof ids), n, hidden };
        twin_status(c, kn_op_embed(s->s, &a), LM_OK, "embed");
        got[i] = malloc(all * sizeof(float));
        side_get_act(c, s, a.out, got[i], all);
        kn_mat_free(m);
    }
    for (int i = 0; i < n * hidden; i++)        /* the twin's is float32, and rounds nothing */
        twin_near(c, "out", i / hidden, i % hidden, got[0][i], tw_round(got[1][i]), 0);
    free(w), free(got[0]), free(got[1]);
}

bool twin_gemm_f16(struct twin *c)
{
    static const int ms[] = { 1, 2, 7, 8, 9, 16, 17, 32, 33, 70, 129 };
    static const int ks[] = { 8, 24, 64, 104, 1024, 2056, 4112 };
    const enum kn_dtype t = KN_F16;
    for (size_t i = 0; i < LM_COUNT(ms); i++)
        for (size_t j = 0; j < LM_COUNT(ks); j++) {
            if (c->slow && (ks[j] > 3000 || ks[j] * ms[i] > 20000) && (i + j) % 4)
                continue;
            compare(c, &(struct gemm_case){ ms[i], tw_int(1, 70), ks[j], (i + j) % 2,
                                            (i + j) % 3 == 0, (i + j) % 5 < 2, .t = t,
                                            .spread = (i + j) % 2 ? 40 : 0 });
        }
    if (!c->slow) {
        compare(c, &(struct gemm_case){ 1, 12288, 4096, true, .t = t });
        compare(c, &(struct gemm_case){ 24, 4096, 11008, .accumulate = true, .t = t });
        compare(c, &(struct gemm_case){ 150, 128000, 64, .y_f32 = true, .t = t });  /* two slices */
    }
    embed_f16(c, 40, 64);
    embed_f16(c, 9, 1000);
    return twin_end(c, "gemm and embed in float16");
}
