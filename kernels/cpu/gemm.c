/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gemm.c - y = x W^T, shared out by panels of the weight (mat.c).
 *
 * Two ways, by the number of rows:
 *   few    bandwidth counts: our own tiles stream the weights once, as they are stored
 *   many   arithmetic counts: a strip of panels is widened to float32 in cache and handed to
 *          OpenBLAS, which this file uses single-threaded, from our own threads
 * The widening costs a row of arithmetic or so, and is shared by all rows of x.
 *
 * `work` given to cpu_parallel is nanoseconds on one thread, from bench_kernels on one core.
 */
#include <cblas.h>
#include <string.h>

#include "kernels/cpu/cpu_int.h"

#define GEMM_ROWS 96            /* rows of x a job item takes: 12-row tiles, x block in L2 */
#define BLAS_MIN_ROWS 128       /* from here on widening is below 1 % of the arithmetic */
#define STRIP_PANELS 8          /* 256 columns of y */
#define STRIP_DEPTH 512         /* 512 KiB of float32 a strip: half of a common L2 */

size_t cpu_gemm_scratch_floats(void)
{
    return (size_t)STRIP_PANELS * CPU_PANEL * STRIP_DEPTH;
}

struct gemm_job {
    const struct kn_gemm *a;
    const struct cpu_mat *w;
    const struct cpu_vec *v;
    int row_blocks, block_rows;         /* own tiles */
    int strip;                          /* BLAS: panels an item takes */
    float *scratch;                     /* BLAS: cpu_gemm_scratch_floats() a slot */
};

/* ---- own tiles ------------------------------------------------------------------------- */

/* Items run over row blocks within a panel, so that a panel read once serves them all. */
static void gemm_range(void *ctx, int slot, int begin, int end)
{
    const struct gemm_job *j = ctx;
    const struct kn_gemm *a = j->a;
    (void)slot;
    for (int i = begin; i < end; i++) {
        int panel = i / j->row_blocks, m0 = i % j->row_blocks * j->block_rows;
        int n0 = panel * CPU_PANEL;
        struct cpu_gemm_panel g = {
            .y = (float *)a->y + m0 * a->ldy + n0,
            .x = (const float *)a->x + m0 * a->ldx,
            .panel = j->w->data + (size_t)panel * j->w->panel_bytes,
            .bias = a->bias ? a->bias + n0 : NULL,
            .scale = j->w->scale ? j->w->scale + n0 : NULL,
            .ldx = a->ldx, .ldy = a->ldy,
            .m = LM_MIN(j->block_rows, a->m - m0),
            .k = a->w->cols,
            .cols = LM_MIN(CPU_PANEL, a->w->rows - n0),
            .accumulate = a->accumulate,
        };
        j->v->gemm[a->w->dtype](&g);
    }
}

static void gemm_few(struct cpu_stream *st, struct gemm_job *j, int64_t work)
{
    j->row_blocks = LM_DIV_UP(j->a->m, GEMM_ROWS);
    j->block_rows = LM_DIV_UP(j->a->m, j->row_blocks);
    int items = j->w->panels * j->row_blocks;
    cpu_parallel(st, items, LM_MAX(1, items / (st->dev->threads * 8)), work, gemm_range, j);
}

/* ---- OpenBLAS -------------------------------------------------------------------------- */

/* One column of a panel, 32 weights in the order of mat.c, to float32 in natural order. */
static void widen(float *restrict out, const uint8_t *restrict in, enum kn_dtype t)
{
    uint32_t lanes[CPU_PANEL];
    if (t == KN_F32) {
        memcpy(out, in, CPU_PANEL * sizeof *out);
    } else if (t == KN_F16) {
        uint16_t half[CPU_PANEL];
        memcpy(half, in, sizeof half);
        for (int i = 0; i < CPU_PANEL; i++)
            out[i] = cpu_f16_to_f32(half[i]);
    } else {
        uint32_t pairs[CPU_PANEL / 2];
        memcpy(pairs, in, sizeof pairs);
        for (int i = 0; i < CPU_PANEL / 2; i++) {
            lanes[i] = pairs[i] << 16;
            lanes[CPU_PANEL / 2 + i] = pairs[i] & 0xffff0000u;
        }
        memcpy(out, lanes, sizeof lanes);
    }
}

static void widen_scaled(float *restrict out, const uint8_t *restrict in, const struct cpu_vec *v,
                         const float *restrict scale)
{
    v->widen_e4m3(out, in, CPU_PANEL, 1, CPU_PANEL);
    for (int i = 0; i < CPU_PANEL; i++)
        out[i] *= scale[i];
}

/* Columns [k0, k0 + depth) of panels [p0, p0 + panels) as [depth][panels * CPU_PANEL]. */
static void widen_strip(float *out, const struct cpu_mat *w, const struct cpu_vec *v, int p0,
                        int panels, int k0, int depth)
{
    size_t column = CPU_PANEL * kn_dtype_size(w->base.dtype);
    for (int p = 0; p < panels; p++) {
        const uint8_t *in = w->data + (size_t)(p0 + p) * w->panel_bytes + (size_t)k0 * column;
        for (int k = 0; k < depth; k++) {
            float *to = out + ((size_t)k * (size_t)panels + (size_t)p) * CPU_PANEL;
            if (w->scale)
                widen_scaled(to, in + (size_t)k * column, v, w->scale + (p0 + p) * CPU_PANEL);
            else
                widen(to, in + (size_t)k * column, w->base.dtype);
        }
    }
}

static void start_rows(const struct kn_gemm *a, int n0, int cols)
{
    for (int r = 0; r < a->m; r++) {
        float *y = (float *)a->y + r * a->ldy + n0;
        if (a->bias && a->accumulate)
            for (int i = 0; i < cols; i++)
                y[i] += a->bias[n0 + i];
        else if (a->bias)
            memcpy(y, a->bias + n0, (size_t)cols * sizeof *y);
    }
}

static void blas_range(void *ctx, int slot, int begin, int end)
{
    const struct gemm_job *j = ctx;
    const struct kn_gemm *a = j->a;
    float *strip = j->scratch + (size_t)slot * cpu_gemm_scratch_floats();
    for (int i = begin; i < end; i++) {
        int p0 = i * j->strip, panels = LM_MIN(j->strip, j->w->panels - p0);
        int n0 = p0 * CPU_PANEL, cols = LM_MIN(panels * CPU_PANEL, a->w->rows - n0);
        start_rows(a, n0, cols);
        for (int k0 = 0; k0 < a->w->cols; k0 += STRIP_DEPTH) {
            int depth = LM_MIN(STRIP_DEPTH, a->w->cols - k0);
            widen_strip(strip, j->w, j->v, p0, panels, k0, depth);
            bool onto = k0 > 0 || a->accumulate || a->bias;
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, a->m, cols, depth, 1.0f,
                        (const float *)a->x + k0, (int)a->ldx, strip, panels * CPU_PANEL,
                        onto ? 1.0f : 0.0f, (float *)a->y + n0, (int)a->ldy);
        }
    }
}

static void gemm_many(struct cpu_stream *st, struct gemm_job *j, int64_t work)
{
    j->scratch = st->gemm_scratch;
    j->strip = LM_MAX(1, LM_MIN(STRIP_PANELS, j->w->panels / (st->dev->threads * 2)));
    cpu_parallel(st, LM_DIV_UP(j->w->panels, j->strip), 1, work, blas_range, j);
}

/* ---- the operation --------------------------------------------------------------------- */

lm_status cpu_op_gemm(kn_stream *s, const struct kn_gemm *a)
{
    if (a->m < 0 || !a->w || (a->m && (!a->y || !a->x)))
        return cpu_refuse("gemm", "null pointer or negative row count");
    if (a->m > 1 && (a->ldx < a->w->cols || a->ldy < a->w->rows))
        return cpu_refuse("gemm", "a row stride is shorter than a row");
    if (!a->m)
        return LM_OK;
    struct cpu_stream *st = cpu_stream_of(s);
    struct gemm_job j = { .a = a, .w = cpu_mat_of(a->w), .v = st->dev->v };
    int64_t work = LM_MAX((int64_t)a->m * a->w->rows * a->w->cols / 50,
                          (int64_t)j.w->panel_bytes * j.w->panels / 60);
    if (a->m < BLAS_MIN_ROWS || a->ldx > INT32_MAX || a->ldy > INT32_MAX)
        gemm_few(st, &j, work);
    else
        gemm_many(st, &j, work);
    return LM_OK;
}
