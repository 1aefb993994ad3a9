/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gemm_few.cu - y = x W^T for few rows, and the start of y from a bias.
 */
#include "kernels/cuda/cuda_int.h"

/* ---- bias ------------------------------------------------------------------------------ */

__device__ static inline float load(const bf16 *p) { return __bfloat162float(*p); }
__device__ static inline float load(const float *p) { return *p; }
__device__ static inline void store(bf16 *p, float v) { *p = __float2bfloat16(v); }
__device__ static inline void store(float *p, float v) { *p = v; }

template <typename T>
__global__ void bias_rows(T *y, int64_t ldy, const float *bias, int n, bool onto)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    cuda_wait_prior();
    if (i >= n)
        return;
    T *p = y + blockIdx.y * ldy + i;
    store(p, onto ? load(p) + bias[i] : bias[i]);
}

extern "C" lm_status cuda_bias_rows(struct cuda_stream *st, const struct kn_gemm *a)
{
    const int most = 65535;     /* rows a launch, gridDim.y */
    lm_status rc = LM_OK;
    for (int m0 = 0; m0 < a->m && rc == LM_OK; m0 += most) {
        dim3 grid(LM_DIV_UP(a->w->rows, 256), LM_MIN(most, a->m - m0));
        if (a->y_f32)
            rc = cuda_launch(st, "gemm bias", bias_rows<float>, grid, dim3(256), 0,
                             (float *)a->y + m0 * a->ldy, a->ldy, a->bias, a->w->rows,
                             a->accumulate);
        else
            rc = cuda_launch(st, "gemm bias", bias_rows<bf16>, grid, dim3(256), 0,
                             (bf16 *)a->y + m0 * a->ldy, a->ldy, a->bias, a->w->rows,
                             a->accumulate);
    }
    return rc;
}

extern "C" bool cuda_gemm_few_fits(struct cuda_stream *st, const struct kn_gemm *a)
{
    (void)st, (void)a;
    return false;
}

extern "C" lm_status cuda_gemm_few(struct cuda_stream *st, const struct kn_gemm *a)
{
    (void)st, (void)a;
    return LM_UNSUPPORTED;
}
