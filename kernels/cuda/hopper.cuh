/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hopper.cuh - how warps of one block divide their work on sm_90 (PTX ISA: mbarrier,
 * cp.async.bulk.tensor, setmaxnreg).
 *
 * A barrier object (mbar) lies in shared memory and goes from phase to phase: a phase ends when as
 * many arrivals as it was made for have come, and all bytes that were announced with mbar_expect()
 * have landed. mbar_wait(bar, parity) waits for the end of the phase of that parity; a new barrier
 * is in phase 0, and a wait for parity 1 returns at once. So a ring's slot that is used for the
 * n-th time is full after parity n & 1, and free for it after parity ~n & 1.
 *
 * tma_load() has the copy engine of the SM fetch a box of a tensor of five dimensions, the first of
 * which is 64 elements of 2 bytes: 128 bytes in shared memory, swizzled as wgmma.cuh wants it, then
 * the next. What lies outside of the tensor is zeros, and counts as bytes all the same. Copies are
 * of the asynchronous proxy, like wgmma's reads: no fence is needed in between.
 */
#ifndef LORAMILL_KERNELS_HOPPER_CUH
#define LORAMILL_KERNELS_HOPPER_CUH

#include "kernels/cuda/prim.cuh"

#ifdef KN_EMU
#include "tests/emu/hopper_emu.h"
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ static inline void mbar_init(uint64_t *bar, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 :: "r"(smem_addr(bar)), "r"(arrivals) : "memory");
}

/* By the thread that made them, before the barrier that tells others of them. */
__device__ static inline void mbar_made(void)
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ static inline void mbar_arrive(uint64_t *bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(smem_addr(bar)) : "memory");
}

/* Arrives, and announces so many bytes. */
__device__ static inline void mbar_expect(uint64_t *bar, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(smem_addr(bar)), "r"(bytes) : "memory");
}

__device__ static inline void mbar_wait(uint64_t *bar, int parity)
{
    uint32_t done;
    do
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
                     "selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(smem_addr(bar)), "r"(parity) : "memory");
    while (!done);
}

/* The box from 0, 0, 0, y, z on. */
__device__ static inline void tma_load(void *dst, const struct cuda_tensor_map *map, uint64_t *bar,
                                       int y, int z)
{
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %3, %3, %4, %5}], [%2];"
                 :: "r"(smem_addr(dst)), "l"(map), "r"(smem_addr(bar)), "r"(0), "r"(y), "r"(z)
                 : "memory");
}

/* This warpgroup's registers a thread from now on, all four warps together; N: a multiple of 8. */
template <int N> __device__ static inline void registers_less(void)
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N));
}

template <int N> __device__ static inline void registers_more(void)
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N));
}
#endif
#endif
