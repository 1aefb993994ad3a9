/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gemm_few.cuh - what becomes of a sum of x W^T, for our own products of few rows (gemm_few.cu,
 * gemm_tma.cu).
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

/* silu(gate) * up of both rounded to bf16, as memory would hold them. */
__device__ static inline void few_store_gate_up(const struct few_out *o, int tok, int row,
                                                float gate, float up)
{
    const float g = __bfloat162float(__float2bfloat16(gate));
    const float u = __bfloat162float(__float2bfloat16(up));
    ((bf16 *)o->y)[tok * o->ldy + row] = __float2bfloat16(silu_mul_of(g, u));
}

#endif
