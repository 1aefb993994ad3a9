/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lora_merge.cu - adds an adapter's product to a base weight: w += scale * B^T A.
 *
 * Done once when a stream is given a merged adapter, so plain arithmetic in float32 will do:
 * a block takes 32 rows by 256 columns, a thread four rows by eight columns; each A is read once
 * for four rows and each B is a broadcast. The weight is read and rounded once.
 */
#include "kernels/cuda/lora.cuh"

#define WARPS 8
#define ROWS 4                  /* a warp */
#define COLS 256

struct merge_launch {
    struct kn_lora_merge a;
    uint16_t *w;
    int64_t ld;
    bool f16;                   /* the weight's numbers; else bf16 */
    int rank_cap;               /* of what a directory may say */
    int32_t *fault;
};

__global__ static void __launch_bounds__(WARPS * 32) merge_kernel(
    const __grid_constant__ struct merge_launch p)
{
    const struct kn_lora_merge *a = &p.a;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int i0 = ((int)blockIdx.y * WARPS + warp) * ROWS, k0 = (int)blockIdx.x * COLS + lane * 8;
    struct lora_view va, vb;
    cuda_wait_prior();
    if (!lora_find(&a->pool, a->layer, a->block_ids, a->module, p.rank_cap, false, p.fault, &va) ||
        !lora_find(&a->pool, a->layer, a->block_ids, a->module, p.rank_cap, true, p.fault, &vb) ||
        k0 >= a->in)
        return;
    const uint16_t *cols[8], *rows[ROWS];
    for (int e = 0; e < 8; e++) {
        int k = min(k0 + e, a->in - 1), c = k / va.m.width;
        cols[e] = lora_chunk(&va, c, p.fault);
        if (!cols[e])
            return;
        cols[e] += k - c * va.m.width;
    }
    for (int r = 0; r < ROWS; r++) {
        int i = min(i0 + r, a->out - 1), c = i / vb.m.width;
        rows[r] = lora_chunk(&vb, c, p.fault);
        if (!rows[r])
            return;
        rows[r] += i - c * vb.m.width;
    }
    float acc[ROWS][8] = {};
    for (int j = 0; j < va.rank; j++) {
        float x[8];
        for (int e = 0; e < 8; e++)
            x[e] = bf16_lo(cols[e][j * va.m.width]);
        for (int r = 0; r < ROWS; r++) {
            float b = bf16_lo(rows[r][j * vb.m.width]);
            for (int e = 0; e < 8; e++)
                acc[r][e] = fmaf(b, x[e], acc[r][e]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int e = 0; e < 8; e++) {
            if (i0 + r >= a->out || k0 + e >= a->in)
                continue;
            uint16_t *w = p.w + (a->row0 + i0 + r) * p.ld + k0 + e;
            const float sum = (p.f16 ? f16_lo(*w) : bf16_lo(*w)) + va.scale * acc[r][e];
            *w = (uint16_t)(p.f16 ? f16_pack(sum, 0) : bf16_pack(sum, 0));
        }
}

extern "C" lm_status cuda_op_lora_merge(kn_stream *s, const struct kn_lora_merge *a)
{
    struct cuda_stream *st = cuda_stream_of(s);
    if (!a->w || !a->block_ids || (unsigned)a->module >= KN_MODULES || a->in <= 0 || a->out <= 0)
        return cuda_refuse("lora_merge", "null pointer or bad shape");
    if (!cuda_pool_valid(&a->pool, a->layer))
        return cuda_refuse("lora_merge", "bad pool, or the layer is outside of it");
    if (a->row0 < 0 || a->in != a->w->cols || a->out > a->w->rows - a->row0)
        return cuda_refuse("lora_merge", "the product does not fit the weight");
    struct merge_launch p = {};
    p.a = *a;
    p.w = (uint16_t *)cuda_mat_of(a->w)->data;
    p.ld = a->w->cols;
    p.f16 = a->w->dtype == KN_F16;
    p.rank_cap = INT32_MAX;
    p.fault = st->dev->fault;
    if (a->w->dtype == KN_E4M3)
        return LM_UNSUPPORTED;
    return cuda_launch(st, "lora_merge", merge_kernel,
                       dim3((unsigned)LM_DIV_UP(a->in, COLS),
                            (unsigned)LM_DIV_UP(a->out, WARPS * ROWS)), dim3(WARPS * 32), 0, p);
}
