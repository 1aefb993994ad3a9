/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Products at every number of rows of a bucket: a row has the same bits however many are with it,
 * and wherever it stands among them (rule 5 of kernels.h).
 *
 * The bucket's full number of rows is the measure. Then come fewer of them, from the front and from
 * the back. No twin and no tolerance: bits are compared. The emulated device has our own products
 * only, those of few rows.
 */
#include "tests/twin/twin.h"

#include <stdlib.h>
#include <string.h>

struct company {
    enum kn_dtype t;
    int n, k, odd;              /* odd: more than a row's length between rows */
    bool bias, accumulate, y_f32;
};

struct bed {
    struct twin *c;
    struct company g;
    kn_stream *s;
    kn_mat *w;
    float *x, *y, *bias;        /* x and y of a bucket's rows */
    int ldx, ldy;
};

static bool bed_open(struct bed *b, struct twin *c, const struct company *g, int rows)
{
    struct lm_err err = { 0 };
    *b = (struct bed){ .c = c, .g = *g, .ldx = g->k + g->odd, .ldy = g->n + g->odd };
    float *w = tw_floats((size_t)g->n * (size_t)g->k);
    b->x = tw_floats((size_t)rows * (size_t)b->ldx);
    b->y = tw_floats((size_t)rows * (size_t)b->ldy);
    b->bias = tw_floats((size_t)g->n);
    bool ok = twin_status(c, kn_mat_new(c->gpu.dev, g->t, g->n, g->k, &b->w, &err), LM_OK,
                          "mat_new") &&
              twin_status(c, kn_mat_upload(b->w, 0, 0, g->n, g->k, w, KN_F32, (size_t)g->k, &err),
                          LM_OK, "mat_upload") &&
              twin_status(c, kn_stream_new(c->gpu.dev, &b->s, &err), LM_OK, "stream_new");
    free(w);
    return ok;
}

static void bed_close(struct bed *b)
{
    if (b->s)
        kn_stream_free(b->s);
    if (b->w)
        kn_mat_free(b->w);
    free(b->x), free(b->y), free(b->bias);
}

/* y of rows [from, from + m), by themselves. */
static float *multiply(struct bed *b, int from, int m)
{
    struct twin *c = b->c;
    struct side *s = &c->gpu;
    const struct company *g = &b->g;
    const size_t n_x = (size_t)m * (size_t)b->ldx, n_y = (size_t)m * (size_t)b->ldy;
    const float *y = b->y + (size_t)from * (size_t)b->ldy;
    float *out = calloc(n_y + 1, sizeof *out);
    struct kn_gemm a = {
        .x = side_put_act(c, s, b->x + (size_t)from * (size_t)b->ldx, n_x), .w = b->w, .m = m,
        .y = g->y_f32 ? side_put(c, s, y, n_y * sizeof *y) : side_put_act(c, s, y, n_y),
        .ldx = b->ldx, .ldy = b->ldy, .accumulate = g->accumulate, .y_f32 = g->y_f32,
        .bias = g->bias ? side_put(c, s, b->bias, (size_t)g->n * sizeof *b->bias) : NULL,
    };
    struct lm_err err = { 0 };
    twin_status(c, kn_op_gemm(b->s, &a), LM_OK, "gemm");
    twin_status(c, kn_stream_sync(b->s, &err), LM_OK, "sync");
    if (g->y_f32)
        side_get(c, s, a.y, out, n_y * sizeof *out);
    else
        side_get_act(c, s, a.y, out, n_y);
    return out;
}

static void check_part(struct bed *b, const float *all, int from, int m)
{
    float *got = multiply(b, from, m);
    if (memcmp(got, all + (size_t)from * (size_t)b->ldy,
               (size_t)m * (size_t)b->ldy * sizeof *got))
        twin_fail(b->c, "rows %d to %d differ by themselves", from, from + m - 1);
    free(got);
}

/* Row counts lo to hi are one bucket. */
static void check_bucket(struct twin *c, const struct company *g, int lo, int hi)
{
    struct bed b;
    twin_case(c, "gemm in %s, %d x %d%s%s%s%s: %d to %d rows", kn_dtype_name(g->t), g->n, g->k,
              g->odd ? ", strided" : "", g->bias ? ", bias" : "", g->accumulate ? ", onto y" : "",
              g->y_f32 ? ", to float32" : "", lo, hi);
    if (bed_open(&b, c, g, hi)) {
        float *all = multiply(&b, 0, hi);
        const int step = LM_MAX(1, (hi - lo) / 4);
        for (int m = lo; m < hi; m += step) {
            check_part(&b, all, 0, m);
            check_part(&b, all, hi - m, m);
        }
        free(all);
    }
    bed_close(&b);
}

bool twin_company(struct twin *c)
{
    static const int few[][2] = { { 1, 8 }, { 9, 16 }, { 17, 24 }, { 25, 32 } };
    static const int many[][2] = { { 57, 64 }, { 65, 80 }, { 225, 256 }, { 321, 352 },
                                   { 513, 576 } };
    static const struct company of[] = {
        { .t = KN_BF16, .n = 96, .k = 192 },
        { .t = KN_BF16, .n = 130, .k = 320, .odd = 8, .bias = true, .accumulate = true },
        { .t = KN_BF16, .n = 72, .k = 64, .y_f32 = true },
        { .t = KN_F16, .n = 70, .k = 104, .bias = true },
        { .t = KN_E4M3, .n = 64, .k = 144, .accumulate = true },
    };
    static const struct {
        struct company g;
        int lo, hi;
    } rare[] = {
        { { .t = KN_BF16, .n = 33, .k = 75, .odd = 1 }, 1, 8 },
        { { .t = KN_BF16, .n = 33, .k = 75, .odd = 1 }, 113, 128 },
        { { .t = KN_BF16, .n = 1000, .k = 4090, .odd = 1, .bias = true }, 9, 16 },
        { { .t = KN_BF16, .n = 1000, .k = 4090, .odd = 1, .bias = true }, 129, 144 },
        /* The scratch holds the bucket's fewest rows, not all: slices for any number of them. */
        { { .t = KN_BF16, .n = 128000, .k = 64, .bias = true }, 129, 144 },
        { { .t = KN_E4M3, .n = 40000, .k = 64, .bias = true }, 193, 224 },
    };
    for (size_t i = 0; i < LM_COUNT(of); i++) {
        for (size_t j = 0; j < LM_COUNT(few); j++)
            if (!c->slow || of[i].t != KN_BF16 || few[j][1] <= c->own_rows)
                check_bucket(c, &of[i], few[j][0], few[j][1]);
        for (size_t j = 0; j < LM_COUNT(many) && !c->slow; j++)
            check_bucket(c, &of[i], many[j][0], many[j][1]);
    }
    for (size_t i = 0; i < LM_COUNT(rare) && !c->slow; i++)
        check_bucket(c, &rare[i].g, rare[i].lo, rare[i].hi);
    return twin_end(c, "gemm, company");
}
