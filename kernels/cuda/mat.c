/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mat.c - base weights on the device: bf16 or float16, row-major; or E4M3 with a scale for each
 * row.
 *
 * float16 is kept as it is; float32 becomes bf16, the activations' dtype, rounded once to nearest
 * even on the way (as a bf16 run of any framework does). kn_mat.dtype says so. KN_E4M3 is asked for
 * by name: rows are scaled and rounded here, on the uploading thread.
 *
 * Pinned numbers of the matrix's own type (pinned: what the engine's uploading threads read files
 * into) are sent off as they lie. All else goes through pinned buffers of our own, converted on the
 * way if it must be, each sent while the next is being filled. Lanes let several threads upload at
 * once, each with a stream of its own, and a pair of buffers once it needs them; a lane is taken
 * under the lock and used without it.
 */
#include "kernels/cuda/cuda_int.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/convert.h"

#define LANES 16                /* the engine's uploading threads, at most */
#define BUFFER_BYTES ((size_t)8 << 20)

struct lane {
    cudaStream_t s;
    void *buffer[2];            /* pinned; both made when first needed */
    cudaEvent_t sent[2];
    bool taken;
};

struct cuda_staging {
    pthread_mutex_t lock;
    pthread_cond_t freed;
    struct lane lane[LANES];
};

/* ---- lanes ----------------------------------------------------------------------------- */

static void lane_clear(struct lane *l)
{
    for (int i = 0; i < 2; i++) {
        if (l->buffer[i])
            cudaFreeHost(l->buffer[i]);
        if (l->sent[i])
            cudaEventDestroy(l->sent[i]);
    }
    if (l->s)
        cudaStreamDestroy(l->s);
    *l = (struct lane){ .taken = l->taken };
}

/* Pinning takes time, and what is pinned already needs no buffers. */
static cudaError_t lane_buffers(struct lane *l)
{
    cudaError_t e = cudaSuccess;
    for (int i = 0; i < 2 && e == cudaSuccess; i++) {
        if (!l->sent[i])
            e = cudaEventCreateWithFlags(&l->sent[i], cudaEventDisableTiming);
        if (e == cudaSuccess && !l->buffer[i])
            e = cudaHostAlloc(&l->buffer[i], BUFFER_BYTES, cudaHostAllocPortable);
    }
    return e;
}

lm_status cuda_staging_new(struct cuda_device *d, struct lm_err *err)
{
    struct cuda_staging *g = lm_calloc(1, sizeof *g);
    if (!g)
        return lm_err_set(err, LM_NOMEM, "out of memory for staging buffers");
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->freed, NULL);
    d->staging = g;
    return LM_OK;
}

void cuda_staging_free(struct cuda_device *d)
{
    if (!d->staging)
        return;
    for (int i = 0; i < LANES; i++)
        lane_clear(&d->staging->lane[i]);
    pthread_mutex_destroy(&d->staging->lock);
    pthread_cond_destroy(&d->staging->freed);
    free(d->staging);
    d->staging = NULL;
}

static struct lane *free_lane(struct cuda_staging *g)
{
    for (int i = 0; i < LANES; i++)
        if (!g->lane[i].taken)
            return &g->lane[i];
    return NULL;
}

static lm_status lane_take(struct cuda_device *d, struct lane **out)
{
    struct cuda_staging *g = d->staging;
    pthread_mutex_lock(&g->lock);
    struct lane *l;
    while (!(l = free_lane(g)))
        pthread_cond_wait(&g->freed, &g->lock);
    l->taken = true;
    pthread_mutex_unlock(&g->lock);
    *out = l;
    if (l->s)
        return LM_OK;
    return cuda_check(d, "making a stream for uploads",
                      cudaStreamCreateWithFlags(&l->s, cudaStreamNonBlocking));
}

static void lane_give(struct cuda_device *d, struct lane *l)
{
    pthread_mutex_lock(&d->staging->lock);
    l->taken = false;
    pthread_cond_signal(&d->staging->freed);
    pthread_mutex_unlock(&d->staging->lock);
}

/* ---- life ------------------------------------------------------------------------------ */

static size_t scales_at(const kn_mat *m)
{
    return LM_DIV_UP((size_t)m->rows * (size_t)m->cols, 256) * 256;
}

/* To its end: cudaMemset() only starts it, on a stream that uploads don't wait for. */
static cudaError_t clear_matrix(const struct cuda_mat *m)
{
    cudaError_t e = cudaMemset(m->data, 0, cuda_mat_bytes(&m->base));
    return e == cudaSuccess ? cudaStreamSynchronize(cudaStreamLegacy) : e;
}

lm_status cuda_mat_new(kn_device *dev, enum kn_dtype t, int rows, int cols, kn_mat **out,
                       struct lm_err *err)
{
    if (t == KN_E4M3 && cols % 16)
        return lm_err_set(err, LM_UNSUPPORTED, "a matrix of %d x %d in FP8: the CUDA backend needs "
                                               "a multiple of 16 columns", rows, cols);
    if (rows <= 0 || cols <= 0 || (unsigned)t > KN_E4M3)
        return lm_err_set(err, LM_INVALID, "matrix of %d x %d, dtype %d: not a shape", rows, cols,
                          (int)t);
    struct cuda_mat *m = lm_calloc(1, sizeof *m);
    if (!m)
        return lm_err_set(err, LM_NOMEM, "out of memory for a matrix");
    m->base = (struct kn_mat){ .be = &kn_backend_cuda, .rows = rows, .cols = cols,
                               .dtype = t == KN_F32 ? KN_BF16 : t };
    m->dev = cuda_device_of(dev);
    if (t == KN_E4M3)
        __atomic_store_n(&m->dev->fp8_weights, 1, __ATOMIC_RELAXED);
    lm_status st = kn_alloc(dev, cuda_mat_bytes(&m->base), &m->data, err);
    if (st == LM_OK && cuda_check(m->dev, "clearing a matrix", clear_matrix(m)) != LM_OK)
        st = lm_err_set(err, LM_DEVICE, "cannot clear a matrix of %d x %d", rows, cols);
    if (st != LM_OK) {
        kn_free(dev, m->data);
        free(m);
        return st;
    }
    if (t == KN_E4M3)
        m->scale = (float *)((char *)m->data + scales_at(&m->base));
    *out = &m->base;
    return LM_OK;
}

void cuda_mat_free(kn_mat *m)
{
    kn_free(&cuda_mat_of(m)->dev->base, cuda_mat_of(m)->data);
    free(m);
}

size_t cuda_mat_bytes(const kn_mat *m)
{
    if (m->dtype == KN_E4M3)
        return scales_at(m) + (size_t)m->rows * sizeof(float);
    return (size_t)m->rows * (size_t)m->cols * sizeof(uint16_t);
}

/* ---- filling --------------------------------------------------------------------------- */

struct rect {
    int row0, col0, rows, cols;
    const void *src;
    enum kn_dtype t;
    size_t ld;
};

/* Columns [c0, c0 + cols) of rows [r0, r0 + rows) of the rectangle, through one buffer. */
static cudaError_t send(struct cuda_mat *m, struct lane *l, int which, const struct rect *r,
                        int r0, int rows, int c0, int cols)
{
    uint16_t *buffer = l->buffer[which];
    size_t width = (size_t)cols * sizeof *buffer, pitch = (size_t)m->base.cols * sizeof *buffer;
    void (*const convert)(uint16_t *restrict, const void *, size_t, size_t, enum kn_dtype) =
        m->base.dtype == KN_F16 ? conv_row_f16 : conv_row;
    cudaError_t e = cudaEventSynchronize(l->sent[which]);
    if (e != cudaSuccess)
        return e;
    for (int i = 0; i < rows; i++)
        convert(buffer + (size_t)i * (size_t)cols, r->src, (size_t)(r0 + i) * r->ld + (size_t)c0,
                (size_t)cols, r->t);
    uint16_t *dst = (uint16_t *)m->data + (size_t)(r->row0 + r0) * (size_t)m->base.cols +
                    (size_t)(r->col0 + c0);
    e = cudaMemcpy2DAsync(dst, pitch, buffer, width, width, (size_t)rows, cudaMemcpyHostToDevice,
                          l->s);
    return e == cudaSuccess ? cudaEventRecord(l->sent[which], l->s) : e;
}

/* From where it lies: it is pinned, and of the matrix's type. */
static cudaError_t send_pinned(struct cuda_mat *m, struct lane *l, const struct rect *r)
{
    const size_t elem = sizeof(uint16_t), pitch = (size_t)m->base.cols * elem;
    uint16_t *dst = (uint16_t *)m->data + (size_t)r->row0 * (size_t)m->base.cols + (size_t)r->col0;
    const size_t width = (size_t)r->cols * elem;
    cudaError_t e = width == pitch && r->ld == (size_t)r->cols
        ? cudaMemcpyAsync(dst, r->src, width * (size_t)r->rows, cudaMemcpyHostToDevice, l->s)
        : cudaMemcpy2DAsync(dst, pitch, r->src, r->ld * elem, width, (size_t)r->rows,
                            cudaMemcpyHostToDevice, l->s);
    cudaError_t waited = cudaStreamSynchronize(l->s);
    return e == cudaSuccess ? waited : e;
}

static bool is_pinned(const void *p)
{
    struct cudaPointerAttributes a = { 0 };
    if (cudaPointerGetAttributes(&a, p) == cudaSuccess)
        return a.type == cudaMemoryTypeHost;
    cudaGetLastError();
    return false;
}

static cudaError_t send_all(struct cuda_mat *m, struct lane *l, const struct rect *r)
{
    if (r->t == m->base.dtype && is_pinned(r->src))
        return send_pinned(m, l, r);
    const int room = (int)(BUFFER_BYTES / sizeof(uint16_t));
    const int cols_a_go = LM_MIN(r->cols, room), rows_a_go = room / cols_a_go;
    int which = 0;
    cudaError_t e = lane_buffers(l);
    for (int r0 = 0; r0 < r->rows && e == cudaSuccess; r0 += rows_a_go)
        for (int c0 = 0; c0 < r->cols && e == cudaSuccess; c0 += cols_a_go, which ^= 1)
            e = send(m, l, which, r, r0, LM_MIN(rows_a_go, r->rows - r0), c0,
                     LM_MIN(cols_a_go, r->cols - c0));
    cudaError_t waited = cudaStreamSynchronize(l->s);
    return e == cudaSuccess ? waited : e;
}

/* Whole rows in E4M3: a buffer holds some, and their scales at its end. *bad: the row that cannot
 * be, else -1. */
static cudaError_t send_scaled(struct cuda_mat *m, struct lane *l, const struct rect *r, int *bad)
{
    const size_t cols = (size_t)m->base.cols;
    const int fit = (int)LM_MIN(BUFFER_BYTES / (cols + sizeof(float)), (size_t)INT32_MAX);
    cudaError_t e = fit > 0 ? lane_buffers(l) : cudaErrorInvalidValue;
    *bad = -1;
    for (int r0 = 0, which = 0; r0 < r->rows && e == cudaSuccess && *bad < 0;
         r0 += fit, which ^= 1) {
        const int n = LM_MIN(fit, r->rows - r0), row0 = r->row0 + r0;
        uint8_t *out = l->buffer[which];
        float *scale = (float *)(void *)(out + BUFFER_BYTES) - fit;
        e = cudaEventSynchronize(l->sent[which]);
        for (int i = 0; i < n && e == cudaSuccess && *bad < 0; i++)
            if (!conv_scaled_row(out + (size_t)i * cols, scale + i, r->src,
                                 (size_t)(r0 + i) * r->ld, cols, r->t))
                *bad = row0 + i;
        if (e == cudaSuccess)
            e = cudaMemcpyAsync((uint8_t *)m->data + (size_t)row0 * cols, out, (size_t)n * cols,
                                cudaMemcpyHostToDevice, l->s);
        if (e == cudaSuccess)
            e = cudaMemcpyAsync(m->scale + row0, scale, (size_t)n * sizeof *scale,
                                cudaMemcpyHostToDevice, l->s);
        if (e == cudaSuccess)
            e = cudaEventRecord(l->sent[which], l->s);
    }
    cudaError_t waited = cudaStreamSynchronize(l->s);
    return e == cudaSuccess ? waited : e;
}

lm_status cuda_mat_upload(kn_mat *base, int row0, int col0, int rows, int cols, const void *src,
                          enum kn_dtype src_t, size_t src_ld, struct lm_err *err)
{
    struct cuda_mat *m = (struct cuda_mat *)base;
    if (row0 < 0 || col0 < 0 || rows < 0 || cols < 0 || rows > base->rows - row0 ||
        cols > base->cols - col0 || src_ld < (size_t)cols || (unsigned)src_t > KN_BF16 || !src)
        return lm_err_set(err, LM_INVALID,
                          "upload of %d x %d at (%d, %d) does not fit a matrix of %d x %d", rows,
                          cols, row0, col0, base->rows, base->cols);
    if (m->scale && (col0 || cols != base->cols))
        return lm_err_set(err, LM_UNSUPPORTED, "a matrix in E4M3 is uploaded by whole rows: its "
                                               "scales are theirs");
    if (!rows || !cols)
        return LM_OK;
    cudaSetDevice(m->dev->index);
    struct rect r = { row0, col0, rows, cols, src, src_t, src_ld };
    struct lane *l;
    lm_status st = lane_take(m->dev, &l);
    int bad = -1;
    if (st == LM_OK)
        st = cuda_check(m->dev, "uploading a matrix",
                        m->scale ? send_scaled(m, l, &r, &bad) : send_all(m, l, &r));
    lane_give(m->dev, l);
    if (st == LM_OK && bad >= 0)
        return lm_err_set(err, LM_INVALID, "row %d of a matrix of %d x %d holds a number that is "
                                           "not finite", bad, base->rows, base->cols);
    return st == LM_OK ? LM_OK
                       : lm_err_set(err, st, "uploading a matrix of %d x %d to device %d failed",
                                    rows, cols, m->dev->index);
}

/* ---- whole matrices -------------------------------------------------------------------- */

lm_status cuda_mat_save(kn_stream *s, void *dst, const kn_mat *m)
{
    return kn_copy_out(s, dst, cuda_mat_of(m)->data, cuda_mat_bytes(m));
}

lm_status cuda_mat_restore(kn_stream *s, kn_mat *m, const void *src)
{
    return kn_copy_in(s, cuda_mat_of(m)->data, src, cuda_mat_bytes(m));
}
