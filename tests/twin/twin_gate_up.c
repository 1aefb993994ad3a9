/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gate_up, the product for few rows with its activation, against the two operations that it is: the
 * same bits. Those are held against sums on the host: y is rounded to bf16 once, 2^-8 |y|, and
 * float32 sums add 2e-6 of the sum of |x w|. Row counts above what the fused kernel takes go the
 * long way, and must give the same too; the emulated device has no such products.
 */
#include "tests/twin/twin.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct gate_up_case {
    int m, f, k;
};

static void check_product(struct twin *c, const struct gate_up_case *g, const float *y,
                          const float *x, const float *w)
{
    for (int i = 0; i < g->m; i++)
        for (int j = 0; j < 2 * g->f; j += g->f > 1000 ? 61 : 1) {
            double sum = 0, mag = 0;
            for (int l = 0; l < g->k; l++) {
                double p = (double)x[i * g->k + l] * (double)w[j * g->k + l];
                sum += p;
                mag += fabs(p);
            }
            twin_near(c, "y", i, j, y[i * 2 * g->f + j], (float)sum,
                      0x1p-8 * fabs(sum) + 2e-6 * mag);
        }
}

static void compare(struct twin *c, const struct gate_up_case *g)
{
    struct side *s = &c->gpu;
    struct lm_err err = { 0 };
    const size_t n_y = (size_t)g->m * 2 * (size_t)g->f, n_x = (size_t)g->m * (size_t)g->k;
    const size_t n_w = 2 * (size_t)g->f * (size_t)g->k;
    kn_mat *m = NULL;
    twin_case(c, "gate_up: %d x %d x %d", g->m, g->f, g->k);
    float *w = tw_floats(n_w), *x = tw_floats(n_x), *y = malloc(n_y * sizeof *y);
    float *out[2] = { malloc(n_y * sizeof *y), malloc(n_y * sizeof *y) };
    twin_status(c, kn_mat_new(s->dev, KN_BF16, 2 * g->f, g->k, &m, &err), LM_OK, "mat_new");
    twin_status(c, kn_mat_upload(m, 0, 0, 2 * g->f, g->k, w, KN_F32, (size_t)g->k, &err), LM_OK,
                "mat_upload");
    struct kn_gate_up a = {
        { .y = side_new(c, s, n_y * 2), .x = side_put_act(c, s, x, n_x), .w = m, .m = g->m,
          .ldx = g->k, .ldy = 2 * g->f },
        side_new(c, s, n_y),
    };
    twin_status(c, kn_op_gate_up(s->s, &a), LM_OK, "gate_up");
    side_get_act(c, s, a.out, out[0], n_y / 2);
    struct kn_silu_mul silu = { side_new(c, s, n_y), a.gemm.y, g->m, g->f };
    twin_status(c, kn_op_gemm(s->s, &a.gemm), LM_OK, "gemm");
    twin_status(c, kn_op_silu_mul(s->s, &silu), LM_OK, "silu_mul");
    side_get_act(c, s, silu.out, out[1], n_y / 2);
    side_get_act(c, s, a.gemm.y, y, n_y);
    check_product(c, g, y, x, w);
    if (memcmp(out[0], out[1], n_y / 2 * sizeof *y))
        twin_fail(c, "differs from the product and its activation");
    kn_mat_free(m);
    free(w), free(x), free(y), free(out[0]), free(out[1]);
}

bool twin_gate_up(struct twin *c)
{
    static const int ms[] = { 1, 2, 7, 8 }, ks[] = { 8, 40, 64, 1000, 2056 };
    for (size_t i = 0; i < LM_COUNT(ms); i++)
        for (size_t j = 0; j < LM_COUNT(ks); j++)
            compare(c, &(struct gate_up_case){ ms[i], tw_int(1, 40), ks[j] });
    if (!c->slow) {
        compare(c, &(struct gate_up_case){ 8, 128, 4096 });
        compare(c, &(struct gate_up_case){ 1, 11008, 4096 });
        compare(c, &(struct gate_up_case){ 5, 14336, 4096 });
        compare(c, &(struct gate_up_case){ 40, 1024, 512 });
    }
    return twin_end(c, "gate_up");
}

/* Rows and columns as Hopper's kernel has them: shares of all its sizes on 8 SMs and on a real
 * device's, more than one round of them, ragged ends; k in whole boxes of 64. */
bool twin_gate_up_boxes(struct twin *c)
{
    static const struct gate_up_case cases[] = {
        { 1, 8, 64 }, { 3, 41, 128 }, { 8, 130, 1088 }, { 9, 200, 320 }, { 16, 300, 192 },
        { 17, 520, 128 }, { 25, 600, 64 }, { 32, 1030, 192 }, { 2, 1000, 576 },
    };
    for (size_t i = 0; i < LM_COUNT(cases); i++)
        compare(c, &cases[i]);
    if (!c->slow) {
        compare(c, &(struct gate_up_case){ 32, 14336, 4096 });
        compare(c, &(struct gate_up_case){ 12, 2048, 11008 });
        compare(c, &(struct gate_up_case){ 20, 6144, 4096 });
        compare(c, &(struct gate_up_case){ 7, 64128, 1024 });
    }
    return twin_end(c, "gate_up in boxes");
}
