/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attn_wgmma.cuh - the two products of attention on Hopper's asynchronous tensor cores, which both
 * prefill kernels start. A shape S says how K and V lie in shared memory: S::PANEL bytes from a
 * panel of 64 dims to the next, S::EIGHT from 8 keys to the next 8. Each returns with its product
 * on the way; the caller waits (wgmma.cuh).
 */
#ifndef LORAMILL_KERNELS_ATTN_WGMMA_CUH
#define LORAMILL_KERNELS_ATTN_WGMMA_CUH

#include "kernels/cuda/wgmma.cuh"

#if defined(KN_EMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* s [64, KEYS] = this group's rows of q by k. */
template <class S>
__device__ static inline void start_scores(float (&s)[S::KEYS / 8][4], const unsigned char *q,
                                           const unsigned char *k)
{
    wgmma_begin();
#pragma unroll
    for (int ks = 0; ks < S::HD / 16; ks++)
        wgmma_ss(s, wgmma_desc(q + ks / 4 * S::ROWS * 128 + ks % 4 * 32, 16, 1024),
                 wgmma_desc(k + ks / 4 * S::PANEL + ks % 4 * 32, 16, S::EIGHT), ks > 0);
    wgmma_commit();
}

/* o [64, HD] += weights by v. */
template <class S>
__device__ static inline void start_values(float (&o)[S::HD / 8][4],
                                           const uint32_t (&w)[S::KEYS / 16][4],
                                           const unsigned char *v)
{
    wgmma_begin();
#pragma unroll
    for (int ks = 0; ks < S::KEYS / 16; ks++)
        wgmma_rs(o, w[ks], wgmma_desc(v + ks * 2 * S::EIGHT, S::PANEL, S::EIGHT));
    wgmma_commit();
}

#endif

#endif
