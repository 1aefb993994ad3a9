/* SPDX-License-Identifier: Apache-2.0 */
/*
 * emu_backend.cc - a kn_backend whose memory is the CPU backend's and whose operations are the CUDA
 * backend's own launchers and kernels, run by emu.cc. For tests only.
 */
#include "tests/emu/emu_backend.h"

#include "kernels/cuda/hopper.cuh"

#include <stdlib.h>
#include <string.h>

static struct kn_backend backend;
static int32_t fault_word;

extern "C" lm_status cuda_refuse(const char *, const char *)
{
    return LM_INVALID;
}

extern "C" lm_status cuda_check(struct cuda_device *, const char *, cudaError_t)
{
    return LM_OK;
}

/* An emulated map is the tensor itself. */
extern "C" bool cuda_tensor_map_make(struct cuda_device *, struct cuda_tensor_map *map,
                                     const struct cuda_tensor *t)
{
    memcpy(map, t, sizeof *t);
    return true;
}

static void emu_close(kn_device *dev)
{
    free(dev);
}

static void emu_props(kn_device *, struct kn_props *out)
{
    memset(out, 0, sizeof *out);
    out->act = out->kv = out->lora = KN_BF16;
    out->in_call = true;
}

static lm_status emu_stream_new(kn_device *dev, kn_stream **out, struct lm_err *)
{
    struct cuda_stream *st = (struct cuda_stream *)calloc(1, sizeof *st);
    st->base.be = &backend;
    st->dev = cuda_device_of(dev);
    st->scratch = calloc(1, CUDA_SCRATCH_BYTES);
    *out = &st->base;
    return LM_OK;
}

static void emu_stream_free(kn_stream *s)
{
    free(cuda_stream_of(s)->scratch);
    free(s);
}

static lm_status emu_stream_sync(kn_stream *, struct lm_err *)
{
    return fault_word ? LM_DEVICE : LM_OK;
}

/* ---- weights: the CUDA backend's layout and kernels, in bf16 for few rows of x only ------ */

static lm_status emu_mat_new(kn_device *dev, enum kn_dtype t, int rows, int cols, kn_mat **out,
                             struct lm_err *err)
{
    if (t == KN_F32)
        return kn_backend_cpu.mat_new(dev, t, rows, cols, out, err);
    struct cuda_mat *m = (struct cuda_mat *)calloc(1, sizeof *m);
    m->base = { &backend, t, rows, cols };
    m->dev = cuda_device_of(dev);
    m->data = aligned_alloc(256, LM_DIV_UP((size_t)rows * (size_t)cols * 2, 256) * 256);
    m->scale = t == KN_E4M3 ? (float *)calloc((size_t)rows, sizeof(float)) : NULL;
    *out = &m->base;
    return LM_OK;
}

static void emu_mat_free(kn_mat *base)
{
    struct cuda_mat *m = (struct cuda_mat *)base;
    free(m->data);
    free(m->scale);
    free(m);
}

static void put_scaled(struct cuda_mat *m, int r, const float *row)
{
    const int cols = m->base.cols;
    float most = 0;
    for (int c = 0; c < cols; c++)
        most = fmaxf(most, fabsf(row[c]));
    m->scale[r] = most > 0 ? most / 448 : 1;
    for (int c = 0; c < cols; c++)
        ((uint8_t *)m->data)[(size_t)r * (size_t)cols + (size_t)c] =
            (uint8_t)e4m3_bits(row[c] / m->scale[r]);
}

/* Whole rows of float32 only. */
static lm_status emu_mat_upload(kn_mat *base, int row0, int, int rows, int cols, const void *src,
                                enum kn_dtype, size_t ld, struct lm_err *)
{
    struct cuda_mat *m = (struct cuda_mat *)base;
    for (int r = 0; r < rows; r++) {
        const float *row = (const float *)src + (size_t)r * ld;
        uint16_t *half = (uint16_t *)m->data + (size_t)(row0 + r) * (size_t)cols;
        if (m->scale)
            put_scaled(m, row0 + r, row);
        for (int c = 0; !m->scale && c < cols; c++)
            half[c] = (uint16_t)(base->dtype == KN_F16 ? f16_pack(row[c], 0)
                                                       : bf16_pack(row[c], 0));
    }
    return LM_OK;
}

/* What cuBLASLt does with the widened rows, a slice of 48 at a time. */
static void multiply_widened(struct cuda_stream *st, const struct kn_gemm *a)
{
    const struct cuda_mat *w = cuda_mat_of(a->w);
    const int k = w->base.cols;
    uint16_t *wide = (uint16_t *)aligned_alloc(256, (size_t)48 * (size_t)k * 2 + 256);
    for (int n0 = 0; n0 < w->base.rows; n0 += 48) {
        const int n = min(48, w->base.rows - n0);
        cuda_widen_rows(st, w, n0, n, wide);
        for (int i = 0; i < a->m; i++)
            for (int j = 0; j < n; j++) {
                uint16_t *y = (uint16_t *)a->y + i * a->ldy + n0 + j;
                float v = 0;
                for (int l = 0; l < k; l++)
                    v += bf16_lo(((const uint16_t *)a->x)[i * a->ldx + l]) *
                         bf16_lo(wide[j * k + l]);
                v += a->bias ? a->bias[n0 + j] : 0;
                *y = (uint16_t)bf16_pack(v + (a->accumulate ? bf16_lo(*y) : 0), 0);
            }
    }
    free(wide);
}

static float number_at(const void *p, int64_t i, enum kn_dtype t)
{
    if (t == KN_F16)
        return f16_lo(((const uint16_t *)p)[i]);
    const uint32_t b = ((const uint8_t *)p)[i];
    return bf16_lo(e4m3_pair(b, b, 0, 0));
}

/* What cuBLASLt does with x as W is; `split`: in two parts. */
static void multiply_converted(struct cuda_stream *st, const struct kn_gemm *a, bool split)
{
    const struct cuda_mat *w = cuda_mat_of(a->w);
    const int k = w->base.cols, n = w->base.rows, ld = (k + 15) / 16 * 16;
    const enum kn_dtype t = w->base.dtype;
    const int m = split ? 2 * a->m : a->m;
    const size_t rows = (size_t)m;
    void *x = calloc(rows * (size_t)ld + 1, 2);
    float *scale = (float *)malloc((rows + 1) * sizeof(float));
    float *one = (float *)malloc((rows + 1) * sizeof(float));
    float *product = (float *)aligned_alloc(16, (rows * (size_t)n * 4 + 31) / 16 * 16);
    cuda_convert_x(st, a, x, ld, scale, split);
    for (int i = 0; i < m; i++) {
        one[i] = 1;
        for (int j = 0; j < n; j++) {
            float v = 0;
            for (int l = 0; l < k; l++)
                v += number_at(x, (int64_t)i * ld + l, t) *
                     number_at(w->data, (int64_t)j * k + l, t);
            product[i * n + j] = w->scale ? v * scale[i] * w->scale[j] : v;
        }
    }
    cuda_unscale(st, a, product, split ? NULL : w->scale ? one : scale);
    free(x), free(scale), free(one), free(product);
}

static lm_status emu_gemm(kn_stream *s, const struct kn_gemm *a)
{
    struct cuda_stream *st = cuda_stream_of(s);
    if (a->w->dtype == KN_F32)
        return kn_backend_cpu.gemm(s, a);
    if (a->w->dtype == KN_BF16)
        return cuda_gemm_few_fits(st, a) ? cuda_gemm_few(st, a) : LM_UNSUPPORTED;
    if (cuda_gemm_mixed_fits(a))
        return cuda_gemm_mixed(st, a);
    const bool split = a->w->dtype == KN_E4M3 && !a->x_e4m3 && a->w->rows % 16 == 0;
    if (a->w->dtype == KN_F16 || a->x_e4m3 || split)
        multiply_converted(st, a, split);
    else
        multiply_widened(st, a);
    return LM_OK;
}

static lm_status emu_embed(kn_stream *s, const struct kn_embed *a)
{
    return a->table->be == &backend ? cuda_op_embed(s, a) : kn_backend_cpu.embed(s, a);
}

static lm_status emu_merge(kn_stream *s, const struct kn_lora_merge *a)
{
    return a->w->be == &backend ? cuda_op_lora_merge(s, a) : kn_backend_cpu.lora_merge(s, a);
}

extern "C" int emu_take_fault(void)
{
    int fault = fault_word;
    fault_word = 0;
    return fault;
}

extern "C" kn_device *emu_device_new(int sms, int cc)
{
    backend = kn_backend_cpu;
    backend.name = "emu";
    backend.close = emu_close;
    backend.props = emu_props;
    backend.stream_new = emu_stream_new;
    backend.stream_free = emu_stream_free;
    backend.stream_sync = emu_stream_sync;
    backend.kv_block_bytes = cuda_kv_block_bytes;
    backend.sample_workspace = cuda_sample_workspace;
    backend.sample = cuda_op_sample;
    backend.mat_new = emu_mat_new;
    backend.mat_free = emu_mat_free;
    backend.mat_upload = emu_mat_upload;
    backend.gemm = emu_gemm;
    backend.embed = emu_embed;
    backend.lora_merge = emu_merge;
    backend.rmsnorm = cuda_op_rmsnorm;
    backend.silu_mul = cuda_op_silu_mul;
    backend.gather_rows = cuda_op_gather_rows;
    backend.feed = cuda_op_feed;
    backend.rope_kv = cuda_op_rope_kv;
    backend.attention = cuda_op_attention;
    backend.lora_shrink = cuda_op_lora_shrink;
    backend.lora_expand = cuda_op_lora_expand;
    backend.gate_up = cuda_op_gate_up;
    struct cuda_device *d = (struct cuda_device *)calloc(1, sizeof *d);
    d->base.be = &backend;
    d->fault = d->fault_host = &fault_word;
    d->sms = sms;
    d->cc = cc;
    d->smem_block = 227 << 10;
    return &d->base;
}
