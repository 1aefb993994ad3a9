/* SPDX-License-Identifier: Apache-2.0 */
/*
 * prim.cuh - the few instructions that CUDA C++ has no word for, and bf16 as plain bits.
 *
 * Kernels that use only these and the common intrinsics also run in the host emulator of tests/emu,
 * which supplies its own versions (KN_EMU): indexing is tested without a device.
 *
 * Fragments of mma.m16n8k16 (PTX ISA, "Matrix Fragments"), with g = lane / 4 and t = lane % 4:
 *     A [16][16]   a[0] row g, columns 2t 2t+1    a[1] row g+8    a[2], a[3] the same, columns + 8
 *     B [16][8]    b[0] rows 2t 2t+1, column g    b[1] rows + 8
 *     C [16][8]    c[0] c[1] row g, columns 2t 2t+1               c[2] c[3] row g+8
 * of mma.m16n8k8 in tf32 the same C, and
 *     A [16][8]    a[0] row g, column t           a[1] row g+8    a[2], a[3] the same, column + 4
 *     B [8][8]     b[0] row t, column g           b[1] row + 4
 */
#ifndef LORAMILL_KERNELS_PRIM_CUH
#define LORAMILL_KERNELS_PRIM_CUH

#include "kernels/cuda/cuda_int.h"

#define FULL_MASK 0xffffffffu

__device__ static inline float bf16_lo(uint32_t pair)
{
    return __uint_as_float(pair << 16);
}

__device__ static inline float bf16_hi(uint32_t pair)
{
    return __uint_as_float(pair & 0xffff0000u);
}

#ifdef KN_EMU
#include "tests/emu/prim_emu.h"
#else

/* Two floats, rounded to nearest even; `lo` comes first in memory. */
__device__ static inline uint32_t bf16_pack(float lo, float hi)
{
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

/* Two products of bf16, rounded to nearest even; subnormal numbers count. */
__device__ static inline uint32_t bf16_mul(uint32_t x, uint32_t y)
{
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(y), "r"(0x80008000u));
    return r;
}

__device__ static inline float exp2_fast(float x)
{
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

__device__ static inline uint32_t smem_addr(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* Four 8x8 matrices of 16-bit elements; lanes 8i .. 8i+7 give the rows of matrix i. */
__device__ static inline void ldmatrix(uint32_t r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_addr(row)) : "memory");
}

__device__ static inline void ldmatrix_trans(uint32_t r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_addr(row)) : "memory");
}

__device__ static inline void mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ static inline void mma_f16(float c[4], const uint32_t a[4], const uint32_t b[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* An 8x8 matrix of 16-bit elements, lane 4g + t with row g, columns 2t 2t+1: now of the columns. */
__device__ static inline uint32_t transpose8(uint32_t x)
{
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}

/* Two halves of float16; `lo` comes first in memory. Packing rounds to nearest even. */
__device__ static inline float f16_lo(uint32_t pair)
{
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"((uint16_t)pair));
    return r;
}

__device__ static inline float f16_hi(uint32_t pair)
{
    return f16_lo(pair >> 16);
}

__device__ static inline uint32_t f16_pack(float lo, float hi)
{
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

__device__ static inline uint32_t f16_mul(uint32_t x, uint32_t y)
{
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
    return r;
}

/* Floats whose last 13 bits are zero. */
__device__ static inline void mma_tf32(float c[4], const uint32_t a[4], const uint32_t b[2])
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* 16 bytes to shared memory behind the thread's back; zeros when !valid (src is then not read). */
__device__ static inline void cp_async16(void *dst, const void *src, bool valid)
{
    int n = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(smem_addr(dst)), "l"(src), "r"(n) : "memory");
}

__device__ static inline void cp_async_commit(void)
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Until at most N of this thread's groups are under way. */
template <int N> __device__ static inline void cp_async_wait(void)
{
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

/* 16 bytes that nobody writes during the kernel and nobody reads twice. */
__device__ static inline uint4 load_once(const void *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

/* The same of a weight that lies in one run with its neighbours: whole lines come to L2. */
__device__ static inline uint4 load_weights(const void *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

/* A float that another block may just have written. */
__device__ static inline float load_l2(const float *p)
{
    return __ldcg(p);
}

#define DYNAMIC_SMEM(name) extern __shared__ __align__(128) unsigned char name[]
#endif

/* Two numbers of KN_E4M3 in bits 8-15 and 24-31 (whatever the others are) as a pair of bf16. With
 * its bits moved to where bf16 has them, a number is 2^120 times too small. */
__device__ static inline uint32_t e4m3_widen(uint32_t w)
{
    return bf16_mul((w >> 4 & 0x07f007f0u) | (w & 0x80008000u), 0x7b807b80u);
}

/* Bytes `i` and `j` of the eight in x (0-3) and y (4-7), widened. */
__device__ static inline uint32_t e4m3_pair(uint32_t x, uint32_t y, int i, int j)
{
    return e4m3_widen(__byte_perm(x, y, (unsigned)(i << 4 | j << 12)));
}

/* The two numbers of KN_E4M3 in the low half of w, or in the high one, as a pair of float16. With
 * its bits moved to where float16 has them, a number is 2^8 times too small. */
__device__ static inline uint32_t e4m3_f16_lo(uint32_t w)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint32_t r;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"((uint16_t)w));
    return r;
#else
    w = __byte_perm(w, 0, 0x1404);
    return f16_mul((w >> 1 & 0x3f803f80u) | (w & 0x80008000u), 0x5c005c00u);
#endif
}

__device__ static inline uint32_t e4m3_f16_hi(uint32_t w)
{
    return e4m3_f16_lo(w >> 16);
}

__device__ static inline uint32_t e4m3_bits(float f)
{
    uint32_t u = __float_as_uint(f), sign = u >> 24 & 0x80, mag = u & 0x7fffffff;
    if (mag > 0x7f800000)
        return sign | 0x7f;
    if (mag >= 0x43e00000)                      /* 448 */
        return sign | 0x7e;
    if (mag < 0x3c800000)                       /* subnormal: the adder rounds to 2^-9 */
        return sign | (__float_as_uint(__uint_as_float(mag) + 16384.0f) -
                       __float_as_uint(16384.0f));
    return sign | (mag + 0x7ffff + (mag >> 20 & 1) - 0x3c000000) >> 20;
}

/* Two floats to the nearest numbers of KN_E4M3, saturating; `lo` comes first in memory. */
__device__ static inline uint16_t e4m3_pack(float lo, float hi)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(hi), "f"(lo));
    return r;
#else
    return (uint16_t)(e4m3_bits(lo) | e4m3_bits(hi) << 8);
#endif
}

__device__ static inline float silu_mul_of(float gate, float up)
{
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

__device__ static inline float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 2));
}

__device__ static inline float quad_sum(float x)
{
    x += __shfl_xor_sync(FULL_MASK, x, 1);
    return x + __shfl_xor_sync(FULL_MASK, x, 2);
}

__device__ static inline float warp_sum(float x)
{
    for (int i = 16; i > 0; i /= 2)
        x += __shfl_xor_sync(FULL_MASK, x, i);
    return x;
}

#endif
