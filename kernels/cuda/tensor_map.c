/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tensor_map.c - tensor maps, which only the driver can write.
 *
 * The binary does not link libcuda: its one function is asked for through the runtime when a device
 * opens. Writing a map is arithmetic on the host, some hundred nanoseconds; it neither allocates
 * nor synchronises, so operations do it when they launch, and a graph keeps the map it was captured
 * with.
 */
#include "kernels/cuda/cuda_int.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <string.h>

void cuda_tensor_map_init(struct cuda_device *d)
{
    enum cudaDriverEntryPointQueryResult found;
    void *fn = NULL;
    d->encode = NULL;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000, cudaEnableDefault,
                                         &found) == cudaSuccess &&
        found == cudaDriverEntryPointSuccess)
        d->encode = fn;
    else
        cudaGetLastError();     /* the runtime keeps it otherwise */
}

bool cuda_tensor_map_make(struct cuda_device *d, struct cuda_tensor_map *map,
                          const struct cuda_tensor *t)
{
    PFN_cuTensorMapEncodeTiled_v12000 encode = (PFN_cuTensorMapEncodeTiled_v12000)d->encode;
    cuuint64_t size[5], stride[5];
    cuuint32_t box[5], each[5];
    CUtensorMap m;
    _Static_assert(sizeof m == sizeof *map, "a tensor map has 128 bytes");
    for (int i = 0; i < 5; i++) {
        size[i] = (cuuint64_t)t->size[i];
        stride[i] = (cuuint64_t)t->stride[i];
        box[i] = (cuuint32_t)t->box[i];
        each[i] = 1;
    }
    if (!encode ||
        encode(&m, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, (void *)t->base, size, stride + 1, box,
               each, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
        return false;
    memcpy(map, &m, sizeof m);
    return true;
}
