/* SPDX-License-Identifier: Apache-2.0 */
/*
 * wgmma.cuh - Hopper's asynchronous tensor-core products (PTX ISA, "wgmma").
 *
 * Four warps together multiply 64 rows by N columns over 16 of K. B, and A if it is not in
 * registers, lie in shared memory in panels of 64 elements (128 bytes) a row, 128-byte swizzled:
 * piece c of row r at panel + r * 128 + ((c ^ r % 8) * 16), panels aligned to 1,024 bytes. A
 * descriptor says where; `lead` and `stride` are bytes:
 *     rows are M or N ("K-major")    stride from 8 rows to the next 8; lead unused
 *     rows are K (transposed B)      stride from 8 rows to the next 8; lead from panel to panel
 * The result lies in registers as mma.sync's does: d[n] is the 8 columns from 8n on, warp w has
 * rows 16w .. 16w + 15.
 *
 * Order: writes to shared memory, wgmma_writes_done() by the writers, a barrier, wgmma_begin(),
 * products, wgmma_commit(), wgmma_wait(). Registers of a product are not touched in between.
 */
#ifndef LORAMILL_KERNELS_WGMMA_CUH
#define LORAMILL_KERNELS_WGMMA_CUH

#include "kernels/cuda/prim.cuh"

__device__ static inline uint64_t wgmma_desc(const void *p, int lead, int stride)
{
    return (uint64_t)(smem_addr(p) >> 4 & 0x3fff) | (uint64_t)(lead >> 4) << 16 |
           (uint64_t)(stride >> 4) << 32 | (uint64_t)1 << 62;
}

#ifdef KN_EMU
#include "tests/emu/wgmma_emu.h"
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ static inline void wgmma_writes_done(void)
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ static inline void wgmma_begin(void)
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ static inline void wgmma_commit(void)
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N> __device__ static inline void wgmma_wait(void)
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}

/* The compiler has these numbers ready before it goes on. */
template <int NT> __device__ static inline void wgmma_hold(float (&d)[NT][4])
{
#pragma unroll
    for (int i = 0; i < NT; i++)
        asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]));
}

#define W4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define W16(i) W4(i), W4(i + 1), W4(i + 2), W4(i + 3)

/* d [64, 64] = or += A B, both in shared memory, K-major. */
__device__ static inline void wgmma_ss(float (&d)[8][4], uint64_t a, uint64_t b, int add)
{
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; "
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31"
                 "}, %32, %33, p, 1, 1, 0, 0; }"
                 : W16(0), W16(4)
                 : "l"(a), "l"(b), "r"(add));
}

/* d [64, 64] += A B: A in registers, B's rows are K. */
__device__ static inline void wgmma_rs(float (&d)[8][4], const uint32_t a[4], uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31"
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : W16(0), W16(4)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* d [64, 128] = or += A B, both in shared memory, K-major. */
__device__ static inline void wgmma_ss(float (&d)[16][4], uint64_t a, uint64_t b, int add)
{
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; "
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, "
                 "%40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, "
                 "%56, %57, %58, %59, %60, %61, %62, %63"
                 "}, %64, %65, p, 1, 1, 0, 0; }"
                 : W16(0), W16(4), W16(8), W16(12)
                 : "l"(a), "l"(b), "r"(add));
}

/* d [64, 128] += A B: A in registers, B's rows are K. */
__device__ static inline void wgmma_rs(float (&d)[16][4], const uint32_t a[4], uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, "
                 "%40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, "
                 "%56, %57, %58, %59, %60, %61, %62, %63"
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : W16(0), W16(4), W16(8), W16(12)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef W16
#undef W4
#endif
#endif
