/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gemm.c - y = x W^T: our own kernels for few rows (gemm_tma.cu, gemm_few.cu, gemm_mixed.cu),
 * cuBLASLt for the rest.
 *
 * cuBLAS thinks in columns: y^T [n, m] = W [n, k] x^T [k, m], where row-major W is a k x n matrix
 * taken transposed, and row-major x and y are k x m and n x m as they are.
 *
 * The choice of an algorithm is made once for each shape and bucket of m, and kept in the stream
 * (one thread uses a stream, so there is no lock). The bucket, not m, picks it: a row comes out the
 * same whatever the number of its neighbours inside a bucket. cuda_gemm_tune() measures what the
 * heuristics propose, before the first step; without it their first proposal is taken. They are off
 * by 5 to 15 % for one shape in five on Hopper, most often by splitting a long k. Where a product
 * comes in slices of rows, whether it does follows from the bucket, too, and all of them go by the
 * choice for the first: a row's neighbours decide which slice it is in, and how many rows the last
 * one has. Where strides are odd, an algorithm may do for a bucket's rows and not for fewer, so it
 * must be one that does for every number of them.
 *
 * Parts of a split k are added in float32 only: rounded to bf16 before they meet, they would cost
 * more than the result's own rounding.
 *
 * cuBLASLt rounds a product to bf16 before it adds what was there. With a bias, or onto an old y,
 * the product goes to the stream's scratch as float32 instead, and one pass adds all and rounds
 * once.
 *
 * cuBLASLt multiplies equal types. Beside W in float16, x becomes float16 in the scratch, by rows
 * with a scale (gemm_mixed.cu), and the product float32 there, which a last pass scales and rounds:
 * 4 bytes a number of x and 8 a number of y are moved beyond what bf16 moves.
 *
 * Beside W in E4M3, if the caller lets x be rounded, x becomes E4M3 and cuBLASLt applies both
 * scales (outer vectors, a feature of sm_90). If not, x of up to SPLIT_MAX rows becomes two numbers
 * of E4M3 each, the second what the first leaves: twice the rows in one product, which reads W once
 * and multiplies at twice bf16's rate, and whose halves are added in float32. With more rows that
 * costs more than widening W to bf16 does, in slices of its rows. Where the heuristics know no
 * algorithm in E4M3, W is widened, and the stream remembers.
 */
#include "kernels/cuda/cuda_int.h"

#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

#define E4M3_MIN 32             /* rows of x beyond which it may become E4M3 */
#define SPLIT_MAX 256           /* rows of x up to which it may come in two parts */
#define PLANS 1024              /* a power of two; a full table is emptied and filled anew */

struct plan {
    int m, n, k;                /* m: the bucket; 0: an empty place */
    int64_t ldx, ldy;
    enum kn_dtype t;            /* of W and x */
    bool f32, onto;
    uint32_t align;             /* bytes that x and y are aligned to, 2 to 256 */
    cublasLtMatmulAlgo_t algo;
};

struct cuda_plans {
    int used;
    bool no_e4m3;               /* cuBLASLt doesn't multiply by outer scales here */
    struct plan plan[PLANS];
};

lm_status cuda_blas_new(struct cuda_device *d, struct lm_err *err)
{
    cublasLtHandle_t h = NULL;
    if (cublasLtCreate(&h) != CUBLAS_STATUS_SUCCESS)
        return lm_err_set(err, LM_DEVICE, "cuBLASLt cannot start on CUDA device %d", d->index);
    d->blas = h;
    return LM_OK;
}

void cuda_blas_free(struct cuda_device *d)
{
    if (d->blas)
        cublasLtDestroy(d->blas);
    d->blas = NULL;
}

struct cuda_plans *cuda_plans_new(void)
{
    return lm_calloc(1, sizeof(struct cuda_plans));
}

void cuda_plans_free(struct cuda_plans *p)
{
    free(p);
}

/* ---- plans ----------------------------------------------------------------------------- */

static unsigned slot_of(const struct plan *p)
{
    uint64_t h = (uint64_t)(unsigned)p->m * 0x9e3779b97f4a7c15u;
    h = (h ^ (uint64_t)(unsigned)p->n) * 0xbf58476d1ce4e5b9u;
    h = (h ^ (h >> 29) ^ (uint64_t)(unsigned)p->k) * 0x94d049bb133111ebu;
    h = (h ^ (h >> 31) ^ (uint64_t)p->ldx ^ (uint64_t)p->ldy << 20) * 0x9e3779b97f4a7c15u;
    return (unsigned)(h >> 40) + (unsigned)p->f32 * 7 + (unsigned)p->onto * 13 +
           (unsigned)p->t * 29;
}

static bool same_shape(const struct plan *a, const struct plan *b)
{
    return a->m == b->m && a->n == b->n && a->k == b->k && a->ldx == b->ldx && a->ldy == b->ldy &&
           a->t == b->t && a->f32 == b->f32 && a->onto == b->onto && a->align == b->align;
}

/* What cuBLASLt wants to know of one product; lives on the caller's stack. */
struct product {
    cublasLtMatmulDescOpaque_t op;
    cublasLtMatrixLayoutOpaque_t w, x, y;
};

/* Scales of W's rows and of x's, device memory; E4M3 only. */
struct scales {
    const float *w, *x;
};

static bool describe_scales(struct product *p, const struct scales *s)
{
    const int32_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    cublasLtMatmulDesc_t op = &p->op;
    return cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode,
                                          sizeof mode) == 0 &&
           cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode,
                                          sizeof mode) == 0 &&
           cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &s->w,
                                          sizeof s->w) == 0 &&
           cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &s->x,
                                          sizeof s->x) == 0;
}

static bool describe(struct product *p, const struct plan *shape, int m, const struct scales *s)
{
    static const cudaDataType_t types[] = { [KN_BF16] = CUDA_R_16BF, [KN_F16] = CUDA_R_16F,
                                            [KN_E4M3] = CUDA_R_8F_E4M3 };
    const cudaDataType_t in = types[shape->t], out = shape->f32 ? CUDA_R_32F : CUDA_R_16BF;
    uint64_t n = (uint64_t)shape->n, k = (uint64_t)shape->k;
    cublasOperation_t trans = CUBLAS_OP_T;
    return cublasLtMatmulDescInit(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F) == 0 &&
           cublasLtMatmulDescSetAttribute(&p->op, CUBLASLT_MATMUL_DESC_TRANSA, &trans,
                                          sizeof trans) == 0 &&
           cublasLtMatrixLayoutInit(&p->w, in, k, n, (int64_t)k) == 0 &&
           cublasLtMatrixLayoutInit(&p->x, in, k, (uint64_t)m, shape->ldx) == 0 &&
           cublasLtMatrixLayoutInit(&p->y, out, n, (uint64_t)m, shape->ldy) == 0 &&
           (shape->t != KN_E4M3 || describe_scales(p, s));
}

static bool prefer(cublasLtMatmulPreference_t pref, uint32_t align)
{
    static const cublasLtMatmulPreferenceAttributes_t of[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
    };
    const size_t room = CUDA_GEMM_WS_BYTES;
    const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;    /* or none at all */
    bool ok = cublasLtMatmulPreferenceInit(pref) == 0 &&
              cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                   &room, sizeof room) == 0 &&
              cublasLtMatmulPreferenceSetAttribute(
                  pref, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes) == 0;
    for (size_t i = 0; i < LM_COUNT(of); i++)
        ok = ok && cublasLtMatmulPreferenceSetAttribute(pref, of[i], &align, sizeof align) == 0;
    return ok;
}

static uint32_t align_of(const void *x, const void *y)
{
    uintptr_t bits = (uintptr_t)x | (uintptr_t)y | 256;
    return (uint32_t)(bits & -bits);
}

/* Up to `max` proposals, the likeliest first. */
static int proposals(struct cuda_stream *st, const struct plan *p, const struct scales *s,
                     cublasLtMatmulHeuristicResult_t *found, int max)
{
    struct product d;
    cublasLtMatmulPreferenceOpaque_t pref;
    int n = 0;
    if (!describe(&d, p, p->m, s) || !prefer(&pref, p->align) ||
        cublasLtMatmulAlgoGetHeuristic(st->dev->blas, &d.op, &d.w, &d.x, &d.y, &d.y, &pref, max,
                                       found, &n) != 0)
        return 0;
    return n;
}

/* Do rows begin at addresses that 16-byte loads don't like? */
static bool is_odd(const struct plan *p)
{
    const size_t y = p->f32 ? sizeof(float) : sizeof(uint16_t);
    return p->align < 16 || (size_t)p->ldx * kn_dtype_size(p->t) % 16 || (size_t)p->ldy * y % 16;
}

static bool runs(struct cuda_stream *st, const struct plan *p, int m, const struct scales *s,
                 const cublasLtMatmulAlgo_t *algo)
{
    struct product d;
    cublasLtMatmulHeuristicResult_t r;
    return describe(&d, p, m, s) &&
           cublasLtMatmulAlgoCheck(st->dev->blas, &d.op, &d.w, &d.x, &d.y, &d.y, algo, &r) == 0 &&
           r.workspaceSize <= CUDA_GEMM_WS_BYTES;
}

/* Does it do for all numbers of rows that the bucket has? Only odd strides make one doubt. */
static bool serves_bucket(struct cuda_stream *st, const struct plan *p, const struct scales *s,
                          const cublasLtMatmulHeuristicResult_t *found)
{
    bool ok = found->state == CUBLAS_STATUS_SUCCESS;
    for (int m = p->m; m > 0 && cuda_bucket(m) == p->m && ok && is_odd(p); m--)
        ok = runs(st, p, m, s, &found->algo);
    return ok;
}

#define PROPOSALS 8

/* The first proposal, for p->m rows; or the first that serves the whole bucket of them. */
static bool ask(struct cuda_stream *st, struct plan *p, const struct scales *s, bool bucket)
{
    cublasLtMatmulHeuristicResult_t found[PROPOSALS];
    const int n = proposals(st, p, s, found, bucket && is_odd(p) ? PROPOSALS : 1);
    for (int i = 0; i < n; i++)
        if (bucket ? serves_bucket(st, p, s, &found[i])
                   : found[i].state == CUBLAS_STATUS_SUCCESS) {
            p->algo = found[i].algo;
            return true;
        }
    return false;
}

static struct plan *plan_for(struct cuda_stream *st, const struct plan *want,
                             const struct scales *s)
{
    struct cuda_plans *t = st->plans;
    if (t->used > PLANS * 3 / 4) {
        memset(t->plan, 0, sizeof t->plan);
        t->used = 0;
    }
    unsigned i = slot_of(want) % PLANS;
    while (t->plan[i].m && !same_shape(&t->plan[i], want))
        i = (i + 1) % PLANS;
    if (t->plan[i].m)
        return &t->plan[i];
    t->plan[i] = *want;
    if (!ask(st, &t->plan[i], s, true)) {
        t->plan[i].m = 0;
        return NULL;
    }
    t->used++;
    return &t->plan[i];
}

/* ---- products -------------------------------------------------------------------------- */

/* A product as cuBLASLt gets it: x of W's dtype. */
struct job {
    struct kn_gemm a;
    const float *x_scale;       /* [m], device memory: W and x are E4M3; else NULL */
    int rows;                   /* that a plan is for: m, or that of the first of its slices */
};

static struct scales scales_of(const struct job *j)
{
    return (struct scales){ cuda_mat_of(j->a.w)->scale, j->x_scale };
}

static cublasStatus_t run_plan(struct cuda_stream *st, const struct job *j, const struct plan *p)
{
    struct product d;
    const struct scales s = scales_of(j);
    const struct kn_gemm *a = &j->a;
    const float one = 1, beta = p->onto ? 1 : 0;
    if (!describe(&d, p, a->m, &s))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    return cublasLtMatmul(st->dev->blas, &d.op, &one, cuda_mat_of(a->w)->data, &d.w, a->x, &d.x,
                          &beta, a->y, &d.y, a->y, &d.y, &p->algo, st->gemm_ws,
                          CUDA_GEMM_WS_BYTES, st->s);
}

static struct plan shape_of(const struct job *j, bool onto)
{
    const struct kn_gemm *a = &j->a;
    return (struct plan){ .m = cuda_bucket(j->rows), .n = a->w->rows, .k = a->w->cols,
                          .ldx = a->ldx, .ldy = a->ldy, .t = a->w->dtype, .f32 = a->y_f32,
                          .onto = onto, .align = align_of(a->x, a->y) };
}

static lm_status multiply(struct cuda_stream *st, const struct job *j, bool onto)
{
    const struct kn_gemm *a = &j->a;
    const struct scales s = scales_of(j);
    struct plan want = shape_of(j, onto);
    const struct plan *p = plan_for(st, &want, &s);
    cublasStatus_t rc = p ? run_plan(st, j, p) : CUBLAS_STATUS_NOT_SUPPORTED;
    if (rc == CUBLAS_STATUS_NOT_SUPPORTED && is_odd(&want)) {
        want.m = a->m;          /* none serves the bucket: better this row count's own than none */
        rc = ask(st, &want, &s, false) ? run_plan(st, j, &want) : rc;
    }
    if (rc == CUBLAS_STATUS_SUCCESS)
        return cuda_check(st->dev, "gemm", cudaSuccess);
    if (rc == CUBLAS_STATUS_NOT_SUPPORTED && j->x_scale)
        return LM_UNSUPPORTED;  /* there is another way */
    lm_log(LM_ERROR, "kernels", "gemm: cuBLASLt: %s (m=%d n=%d k=%d)",
           cublasLtGetStatusString(rc), a->m, want.n, want.k);
    return rc == CUBLAS_STATUS_NOT_SUPPORTED ? LM_UNSUPPORTED
                                             : cuda_failed(st->dev, "gemm", cudaErrorUnknown);
}

static bool e4m3_multiplies(const struct cuda_stream *st, const struct kn_gemm *a)
{
    return a->w->dtype == KN_E4M3 && a->m > E4M3_MIN && st->dev->cc >= 89 &&
           !st->plans->no_e4m3 && a->w->rows % 16 == 0;
}

/* Whether this product would go to cuBLASLt in E4M3, x rounded. */
static bool e4m3_fits(const struct cuda_stream *st, const struct kn_gemm *a)
{
    return a->x_e4m3 && e4m3_multiplies(st, a) && !(a->y_f32 && (a->bias || a->accumulate));
}

/* The same of x in two parts, which is exact. */
static bool split_fits(const struct cuda_stream *st, const struct kn_gemm *a)
{
    return !a->x_e4m3 && a->m <= SPLIT_MAX && e4m3_multiplies(st, a);
}

/* What lies in the scratch, behind its counters, for a slice of m rows. */
struct room {
    int m;
    float *scales, *product;
    void *x;
    int64_t ldx;
    bool split;
};

/* For as many rows of `a` as fit, all of them only if all of their bucket would: x converted to W's
 * dtype (unless it is that already), and the product in float32 if it is wanted; twice, if x comes
 * in two parts. m 0: not even one fits. */
static struct room room_for(struct cuda_stream *st, const struct kn_gemm *a, bool product,
                            bool split)
{
    const size_t gap = 256, avail = CUDA_SCRATCH_BYTES - CUDA_COUNTER_BYTES - 3 * gap;
    const enum kn_dtype t = a->w->dtype;
    struct room r = { .ldx = t == KN_BF16 ? 0 : LM_DIV_UP(a->w->cols, 16) * 16,
                      .split = split };
    const size_t parts = split ? 2 : 1, scales = parts * sizeof(float);
    const size_t x_row = parts * (size_t)r.ldx * kn_dtype_size(t);
    const size_t y_row = product ? parts * (size_t)a->w->rows * sizeof(float) : 0;
    const size_t row = x_row + y_row + scales;
    const size_t all = (size_t)cuda_bucket(a->m), fit = LM_MIN(avail / row, all);
    const bool tiles = fit < all && fit > 128;
    r.m = LM_MIN((int)(tiles ? fit / 128 * 128 : fit), a->m);
    char *at = (char *)st->scratch + CUDA_COUNTER_BYTES;
    r.scales = (float *)(void *)at;
    at += LM_DIV_UP((size_t)r.m * scales, gap) * gap;
    r.x = at;
    at += LM_DIV_UP((size_t)r.m * x_row, gap) * gap;
    r.product = (float *)(void *)at;
    return r;
}

/* Rows [m0, m0 + m) of `a`. */
static struct kn_gemm rows_of(const struct kn_gemm *a, int m0, int m)
{
    struct kn_gemm part = *a;
    part.m = m;
    part.x = (const uint16_t *)a->x + m0 * a->ldx;
    part.y = (char *)a->y + (size_t)m0 * (size_t)a->ldy * (a->y_f32 ? 4 : 2);
    return part;
}

/* `a` with its x converted, and its product to scratch if that is wanted. */
static lm_status convert(struct cuda_stream *st, const struct kn_gemm *a, const struct room *r,
                         bool product, struct job *out)
{
    const int parts = r->split ? 2 : 1;
    *out = (struct job){ *a, a->w->dtype == KN_E4M3 ? r->scales : NULL, r->m * parts };
    out->a.m = a->m * parts;
    if (product) {
        out->a.y = r->product;
        out->a.y_f32 = true;
        out->a.ldy = a->w->rows;
    }
    if (a->w->dtype == KN_BF16)
        return LM_OK;
    out->a.x = r->x;
    out->a.ldx = r->ldx;
    return cuda_convert_x(st, a, r->x, r->ldx, r->scales, r->split);
}

/* In slices of rows that fit the scratch; y is written by what comes after the product. */
static lm_status multiply_then_add(struct cuda_stream *st, const struct kn_gemm *a)
{
    const struct room r = room_for(st, a, true, split_fits(st, a));
    lm_status rc = r.m > 0 ? LM_OK : LM_UNSUPPORTED;
    for (int m0 = 0; m0 < a->m && rc == LM_OK; m0 += r.m) {
        const struct kn_gemm part = rows_of(a, m0, LM_MIN(r.m, a->m - m0));
        struct job j;
        rc = convert(st, &part, &r, true, &j);
        if (rc == LM_OK)
            rc = multiply(st, &j, false);
        if (rc == LM_OK)
            rc = a->w->dtype == KN_F16 || r.split
                     ? cuda_unscale(st, &part, r.product, r.split ? NULL : r.scales)
                     : cuda_add_product(st, &part, r.product);
    }
    return rc;
}

/* W and x in bf16. Strides are the caller's word no more. */
static lm_status product(struct cuda_stream *st, const struct kn_gemm *a)
{
    const struct job whole = { *a, NULL, a->m };
    if (!a->bias && !a->accumulate)
        return multiply(st, &whole, false);
    if (a->y_f32) {             /* float32 adds up as it is */
        lm_status rc = a->bias ? cuda_bias_rows(st, a) : LM_OK;
        return rc == LM_OK ? multiply(st, &whole, true) : rc;
    }
    return multiply_then_add(st, a);
}

/* Rows of W in a slice, as even as whole tiles allow; 0: not even a tile fits. */
static int slice_rows(const struct kn_gemm *a)
{
    const int fit = (int)(CUDA_WIDE_BYTES / 2 / (size_t)a->w->cols) / 128 * 128;
    const int slices = fit > 0 ? LM_DIV_UP(a->w->rows, fit) : 0;
    return slices ? LM_DIV_UP(LM_DIV_UP(a->w->rows, slices), 128) * 128 : 0;
}

/* W in E4M3 as bf16, in slices of its rows. */
static lm_status product_widened(struct cuda_stream *st, const struct kn_gemm *a)
{
    const struct cuda_mat *w = cuda_mat_of(a->w);
    const int fit = slice_rows(a);
    if (!st->wide)
        return cuda_refuse("gemm", "the stream was made before the device had weights in FP8");
    lm_status rc = fit > 0 ? LM_OK : LM_UNSUPPORTED;
    for (int n0 = 0; n0 < a->w->rows && rc == LM_OK; n0 += fit) {
        struct cuda_mat part = { .base = *a->w, .dev = w->dev, .data = st->wide };
        struct kn_gemm g = *a;
        part.base.dtype = KN_BF16;
        part.base.rows = LM_MIN(fit, a->w->rows - n0);
        g.w = &part.base;
        g.y = (char *)a->y + (size_t)n0 * (a->y_f32 ? sizeof(float) : sizeof(uint16_t));
        g.bias = a->bias ? a->bias + n0 : NULL;
        rc = cuda_widen_rows(st, w, n0, part.base.rows, st->wide);
        if (rc == LM_OK)
            rc = product(st, &g);
    }
    return rc;
}

/* W and x in E4M3, in slices of rows of x. */
static lm_status product_e4m3(struct cuda_stream *st, const struct kn_gemm *a)
{
    if (a->bias || a->accumulate)
        return a->y_f32 ? LM_UNSUPPORTED : multiply_then_add(st, a);
    const struct room r = room_for(st, a, false, false);
    lm_status rc = r.m > 0 ? LM_OK : LM_UNSUPPORTED;
    for (int m0 = 0; m0 < a->m && rc == LM_OK; m0 += r.m) {
        const struct kn_gemm part = rows_of(a, m0, LM_MIN(r.m, a->m - m0));
        struct job j;
        rc = convert(st, &part, &r, false, &j);
        if (rc == LM_OK)
            rc = multiply(st, &j, false);
    }
    return rc;
}

/* W in float16 or E4M3. */
static lm_status product_mixed(struct cuda_stream *st, const struct kn_gemm *a)
{
    const bool split = split_fits(st, a);
    if (split || e4m3_fits(st, a)) {
        lm_status rc = split ? multiply_then_add(st, a) : product_e4m3(st, a);
        if (rc != LM_UNSUPPORTED)
            return rc;
        lm_log(LM_WARN, "kernels", "gemm: cuBLASLt has no product in FP8 for m=%d n=%d k=%d; "
                                   "weights are widened from now on", a->m, a->w->rows, a->w->cols);
        st->plans->no_e4m3 = true;
    }
    if (cuda_gemm_mixed_fits(a))
        return cuda_gemm_mixed(st, a);
    return a->w->dtype == KN_F16 ? multiply_then_add(st, a) : product_widened(st, a);
}

lm_status cuda_op_gemm(kn_stream *s, const struct kn_gemm *a)
{
    struct cuda_stream *st = cuda_stream_of(s);
    if (a->m < 0 || !a->w || (a->m && (!a->y || !a->x)))
        return cuda_refuse("gemm", "null pointer or negative row count");
    if (a->m > 1 && (a->ldx < a->w->cols || a->ldy < a->w->rows))
        return cuda_refuse("gemm", "a row stride is shorter than a row");
    if (a->m == 0)
        return LM_OK;
    struct kn_gemm own = *a;
    own.ldx = LM_MAX(a->ldx, a->w->cols);       /* one row may say what it likes */
    own.ldy = LM_MAX(a->ldy, a->w->rows);
    if (own.w->dtype != KN_BF16)
        return product_mixed(st, &own);
    lm_status rc = cuda_gemm_few_fits(st, &own) ? cuda_gemm_few(st, &own) : LM_UNSUPPORTED;
    return rc == LM_UNSUPPORTED ? product(st, &own) : rc;
}

/* ---- tuning ---------------------------------------------------------------------------- */

#define TUNE_RUNS 4
#define TUNE_LONG ((int64_t)1 << 34)    /* multiply-adds that take 50 us or more: once is enough */
#define TUNE_GAIN 0.97f         /* another than the first must win by 3 %, or noise would choose */

struct tuning {
    struct cuda_stream *st;
    struct job j;
    const kn_mat *const *w;
    int n_w, at;
    cudaEvent_t from, to;
    int buckets;
    int64_t asking_us;          /* for proposals; the rest of the time is measuring */
};

/* Milliseconds of a few products, each on the next weight; negative when it does not run. */
static float time_plan(struct tuning *t, const struct plan *p)
{
    const int runs = (int64_t)p->m * p->n * p->k < TUNE_LONG ? TUNE_RUNS : 1;
    float ms = -1;
    t->j.a.w = t->w[t->at % t->n_w];
    if (run_plan(t->st, &t->j, p) != CUBLAS_STATUS_SUCCESS ||
        cudaEventRecord(t->from, t->st->s) != cudaSuccess)
        return -1;
    for (int i = 0; i < runs; i++) {
        t->j.a.w = t->w[++t->at % t->n_w];
        if (run_plan(t->st, &t->j, p) != CUBLAS_STATUS_SUCCESS)
            return -1;
    }
    if (cudaEventRecord(t->to, t->st->s) != cudaSuccess ||
        cudaEventSynchronize(t->to) != cudaSuccess ||
        cudaEventElapsedTime(&ms, t->from, t->to) != cudaSuccess)
        return -1;
    return ms;
}

static void tune_bucket(struct tuning *t)
{
    cublasLtMatmulHeuristicResult_t found[PROPOSALS];
    const struct scales s = scales_of(&t->j);
    struct plan want = shape_of(&t->j, false), try = want;
    int64_t t0 = lm_now_us();
    struct plan *p = plan_for(t->st, &want, &s);
    int n = p ? proposals(t->st, &want, &s, found, PROPOSALS) : 0;
    t->asking_us += lm_now_us() - t0;
    t->buckets++;
    if (!p && t->j.x_scale)     /* from the first step on, not from the first that meets it */
        t->st->plans->no_e4m3 = true;
    float best = n > 1 ? time_plan(t, p) * TUNE_GAIN : -1;
    for (int i = 1; i < n && best > 0; i++) {
        try.algo = found[i].algo;
        float ms = serves_bucket(t->st, &want, &s, &found[i]) ? time_plan(t, &try) : -1;
        if (ms > 0 && ms < best) {
            best = ms;
            p->algo = try.algo;
        }
    }
}

/* Of W in E4M3 as bf16: the slices' heights are two at most. */
static lm_status tune_widened(struct tuning *t, const struct kn_gemm *a)
{
    const int fit = slice_rows(a), left = fit && a->w->rows > fit ? a->w->rows % fit : 0;
    struct cuda_mat part = { .base = *a->w, .dev = t->st->dev, .data = t->st->wide };
    const kn_mat *const one = &part.base, *const *w = t->w;
    const int heights[] = { LM_MIN(fit, a->w->rows), left }, n_w = t->n_w;
    if (!fit || !t->st->wide)
        return LM_OK;           /* the product itself will say so */
    lm_status rc = cuda_widen_rows(t->st, cuda_mat_of(a->w), 0, heights[0], part.data);
    part.base.dtype = KN_BF16;
    t->w = &one;
    t->n_w = 1;
    for (int i = 0; i < 2 && heights[i] && rc == LM_OK; i++) {
        part.base.rows = heights[i];
        t->j = (struct job){ *a, NULL, a->m };
        t->j.a.w = one;
        tune_bucket(t);
    }
    t->w = w;
    t->n_w = n_w;
    return rc;
}

/* Whether cuBLASLt has no part in this product. */
static bool is_ours(struct cuda_stream *st, const struct kn_gemm *a)
{
    return a->w->dtype == KN_BF16 ? cuda_gemm_few_fits(st, a)
                                  : !e4m3_fits(st, a) && cuda_gemm_mixed_fits(a);
}

/* Of `a` with m rows, if cuBLASLt does that, on operands as the operation would make them. */
static lm_status tune_rows(struct tuning *t, const struct kn_gemm *a, int m)
{
    struct kn_gemm g = *a;
    g.m = m;
    g.w = t->w[0];
    if (is_ours(t->st, &g))
        return LM_OK;
    const bool f16 = g.w->dtype == KN_F16, split = split_fits(t->st, &g);
    if (g.w->dtype == KN_E4M3 && !split && !e4m3_fits(t->st, &g))
        return tune_widened(t, &g);
    const struct room r = room_for(t->st, &g, f16 || split, split);
    if (g.w->dtype != KN_BF16 && r.m < m) {
        if (cuda_bucket(r.m) != m)
            return LM_OK;       /* so many come in slices of fewer */
        g.m = r.m;
    }
    lm_status rc = convert(t->st, &g, &r, f16 || split, &t->j);
    if (rc == LM_OK)
        tune_bucket(t);
    return rc;
}

lm_status cuda_gemm_tune(kn_stream *s, const struct kn_gemm *a, const kn_mat *const *w, int n_w)
{
    struct tuning t = { .st = cuda_stream_of(s), .w = w, .n_w = n_w };
    struct cuda_device *d = t.st->dev;
    int64_t t0 = lm_now_us();
    if (a->m <= 0 || n_w <= 0 || a->bias || a->accumulate || !a->x || !a->y)
        return cuda_refuse("gemm_tune", "nothing to measure, or a bias");
    cudaError_t e = cudaEventCreate(&t.from);
    if (e == cudaSuccess)
        e = cudaEventCreate(&t.to);
    lm_status rc = LM_OK;
    for (int m = 1; m <= a->m && e == cudaSuccess && rc == LM_OK; m = cuda_bucket(m) + 1)
        rc = tune_rows(&t, a, LM_MIN(cuda_bucket(m), a->m));
    cudaGetLastError();         /* a proposal that did not run is no failure; a broken stream is */
    if (e == cudaSuccess)
        e = cudaStreamSynchronize(t.st->s);
    if (t.from)
        cudaEventDestroy(t.from);
    if (t.to)
        cudaEventDestroy(t.to);
    lm_log(LM_DEBUG, "kernels", "products with %d x %d, %d sizes: %.0f ms to ask for algorithms, "
           "%.0f ms to measure them", w[0]->rows, w[0]->cols, t.buckets,
           (double)t.asking_us / 1e3, (double)(lm_now_us() - t0 - t.asking_us) / 1e3);
    return rc == LM_OK ? cuda_check(d, "gemm_tune", e) : rc;
}
