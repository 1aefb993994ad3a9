/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gemm_few.cuh - what becomes of a sum of x W^T, for our own products of few rows (gemm_few.cu,
 * gemm_mixed.cu, gemm_tma.cu): the warps of a block have parts of it, which meet in shared memory
 * and are added in order.
 */
#ifndef LORAMILL_KERNELS_GEMM_FEW_CUH
#define LORAMILL_KERNELS_GEMM_FEW_CUH

#include "kernels/cuda/prim.cuh"

struct few_out {
    void *y;                    /* rows of ldy; float32 or bf16 */
    const float *bias;
    int64_t ldy;
    bool accumulate, f32;
};

#define FEW_TILE_ROWS 16        /* of W, a warp's fragment */

/* A warp's fragments [NT][8 tokens, FEW_TILE_ROWS] to sums [warps][NT * 8][FEW_TILE_ROWS]. */
template <int NT>
__device__ static inline void few_leave(float *sums, const float acc[NT][4], int warp, int lane)
{
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int c = 0; c < 4; c++)
            sums[(warp * NT * 8 + j * 8 + 2 * t + (c & 1)) * FEW_TILE_ROWS + g + (c & 2) * 4] =
                acc[j][c];
}

/* The warps' sum of one element, added in order; rows of sums are `ld` long. */
template <int NT, int WARPS>
__device__ static inline float few_sum(const float *sums, int ld, int tok, int row)
{
    float v = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++)
        v += sums[(w * NT * 8 + tok) * ld + row];
    return v;
}

__device__ static inline void few_store(const struct few_out *o, int tok, int row, float v)
{
    const int64_t at = tok * o->ldy + row;
    v += o->bias ? o->bias[row] : 0.0f;
    if (o->f32) {
        float *y = (float *)o->y + at;
        *y = v + (o->accumulate ? *y : 0.0f);
    } else {
        bf16 *y = (bf16 *)o->y + at;
        *y = __float2bfloat16(v + (o->accumulate ? __bfloat162float(*y) : 0.0f));
    }
}

/* A tile of W's rows, from row0 of n on, for m tokens: sums times scale (NULL: 1) to y. */
template <int NT, int WARPS>
__device__ static inline void few_finish(const struct few_out *o, int m, int n, const float *scale,
                                         const float *sums, int row0)
{
    for (int i = (int)threadIdx.x; i < NT * 8 * FEW_TILE_ROWS; i += WARPS * 32) {
        const int tok = i / FEW_TILE_ROWS, row = i % FEW_TILE_ROWS;
        if (tok >= m || row0 + row >= n)
            continue;
        const float v = few_sum<NT, WARPS>(sums, FEW_TILE_ROWS, tok, row);
        few_store(o, tok, row0 + row, scale ? v * scale[row0 + row] : v);
    }
}

/* silu(gate) * up of both rounded to bf16, as memory would hold them. */
__device__ static inline void few_store_gate_up(const struct few_out *o, int tok, int row,
                                                float gate, float up)
{
    const float g = __bfloat162float(__float2bfloat16(gate));
    const float u = __bfloat162float(__float2bfloat16(up));
    ((bf16 *)o->y)[tok * o->ldy + row] = __float2bfloat16(silu_mul_of(g, u));
}

#endif
