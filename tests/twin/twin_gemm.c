/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Products with weights in E4M3 against the CPU twin.
 *
 * Both sides scale and round the same float32 rows to the same bytes, and hold the same x.
 * Tolerance: y is rounded once to bf16, 2^-8 |y|; where many rows of x go through weights widened
 * to bf16, those are rounded again, 2^-8 of the sum of |x w|; float32 sums add 2e-6 of it on
 * either side.
 */
#include "tests/twin/twin.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct gemm_case {
    int m, n, k;
    bool bias, accumulate;
};

struct gemm_data {
    float *w, *x, *y, *bias;
    int ldx, ldy;
};

/* y afterwards, [m, ldy]; NULL after a failure. */
static float *run_side(struct twin *c, struct side *s, const struct gemm_case *g,
                       const struct gemm_data *d)
{
    struct lm_err err = { 0 };
    kn_mat *w = NULL;
    kn_stream *own = NULL;
    const size_t rows = (size_t)g->m, n_y = rows * (size_t)d->ldy;
    float *out = calloc(n_y + 1, sizeof *out);
    if (!twin_status(c, kn_mat_new(s->dev, KN_E4M3, g->n, g->k, &w, &err), LM_OK, "mat_new") ||
        !twin_status(c, kn_mat_upload(w, 0, 0, g->n, g->k, d->w, KN_F32, (size_t)g->k, &err), LM_OK,
                     "mat_upload") ||
        !twin_status(c, kn_stream_new(s->dev, &own, &err), LM_OK, "stream_new"))
        return out;
    struct kn_gemm a = {
        .y = side_put_act(c, s, d->y, n_y), .x = side_put_act(c, s, d->x, rows * (size_t)d->ldx),
        .w = w, .bias = g->bias ? side_put(c, s, d->bias, (size_t)g->n * sizeof(float)) : NULL,
        .m = g->m, .ldx = d->ldx, .ldy = d->ldy, .accumulate = g->accumulate,
    };
    twin_status(c, kn_op_gemm(own, &a), LM_OK, "gemm");
    twin_status(c, kn_stream_sync(own, &err), LM_OK, "sync");
    side_get_act(c, s, a.y, out, n_y);
    kn_stream_free(own);
    kn_mat_free(w);
    return out;
}

static void compare(struct twin *c, const struct gemm_case *g)
{
    struct gemm_data d = { .ldx = (g->k + 15) / 8 * 8, .ldy = g->n + 3 };
    twin_case(c, "gemm in E4M3: %d x %d x %d%s%s", g->m, g->n, g->k, g->bias ? ", bias" : "",
              g->accumulate ? ", onto y" : "");
    d.w = tw_floats((size_t)g->n * (size_t)g->k);
    d.x = tw_floats((size_t)g->m * (size_t)d.ldx);
    d.y = tw_floats((size_t)g->m * (size_t)d.ldy);
    d.bias = tw_floats((size_t)g->n);
    for (int j = 0; j < g->n; j++)              /* scales that differ, and a row of zeros */
        for (int l = 0; l < g->k; l++)
            d.w[j * g->k + l] *= j == 5 ? 0.0f : ldexpf(1.3f, j % 9 - 6);
    float *got = run_side(c, &c->gpu, g, &d), *want = run_side(c, &c->cpu, g, &d);
    /* Of a large product, one element in some: their tolerances take as long as they do. */
    const int every = (int64_t)g->m * g->n * g->k > 100000000 ? 61 : 1;
    for (int i = 0; i < g->m; i++)
        for (int j = i % every; j < d.ldy; j += every) {
            float w = want[i * d.ldy + j];
            double mag = 0;
            for (int l = 0; l < g->k && j < g->n; l++)
                mag += fabs((double)d.x[i * d.ldx + l] * (double)d.w[j * g->k + l]);
            double tol = j >= g->n ? 0 : 0x1p-8 * fabs((double)w) + mag * (0x1p-8 + 4e-6) + 1e-7;
            twin_near(c, "y", i, j, got[i * d.ldy + j], w, tol);
        }
    free(got), free(want), free(d.w), free(d.x), free(d.y), free(d.bias);
}

bool twin_gemm_fp8(struct twin *c)
{
    static const int ms[] = { 1, 2, 7, 8, 9, 16, 17, 32, 33, 70 };
    static const int ks[] = { 16, 48, 64, 80, 1024, 2064, 4112 };
    for (size_t i = 0; i < LM_COUNT(ms); i++)
        for (size_t j = 0; j < LM_COUNT(ks); j++) {
            if (c->slow && (ks[j] > 3000 || ks[j] * ms[i] > 20000) && (i + j) % 4)
                continue;
            compare(c, &(struct gemm_case){ ms[i], tw_int(1, 70), ks[j], (i + j) % 2,
                                            (i + j) % 3 == 0 });
        }
    if (!c->slow) {
        compare(c, &(struct gemm_case){ 1, 12288, 4096, true, false });
        compare(c, &(struct gemm_case){ 24, 4096, 11008, false, true });
        compare(c, &(struct gemm_case){ 100, 11008, 4096, false, false });      /* two slices */
    }
    return twin_end(c, "gemm in E4M3");
}
