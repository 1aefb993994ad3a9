/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gemm.c - y = x W^T through cuBLASLt.
 */
#include "kernels/cuda/cuda_int.h"

#include <cublasLt.h>

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
    return lm_calloc(1, 1);
}

void cuda_plans_free(struct cuda_plans *p)
{
    (void)p;
}

lm_status cuda_mat_fill(kn_mat *m, uint64_t seed, float scale, struct lm_err *err)
{
    (void)m, (void)seed, (void)scale;
    return lm_err_set(err, LM_UNSUPPORTED, "not yet");
}
