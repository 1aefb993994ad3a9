/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A stand-in for the CUDA runtime's header: just enough for kernels/cuda/ to compile as C++ for the
 * host and run under the emulator of emu.cc. It is found before the real one by -Itests/emu.
 *
 * Every CUDA thread is a fiber; blocks run one after the other. A fiber runs until it meets a
 * barrier or a warp-wide instruction, so a missing barrier shows as a wrong result rather than as a
 * race that is won by luck, and asynchronous copies land only when they are waited for. All 32
 * lanes must take part in every warp-wide instruction; a barrier that not all reach is reported
 * with the block's number.
 */
#ifndef LORAMILL_TEST_EMU_RUNTIME_H
#define LORAMILL_TEST_EMU_RUNTIME_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

/* The emulated backend lives beside the real one: its symbols have names of their own. */
#define cuda_refuse emu_refuse
#define cuda_check emu_check
#define cuda_kv_block_bytes emu_kv_block_bytes
#define cuda_op_rope_kv emu_op_rope_kv
#define cuda_op_attention emu_op_attention
#define cuda_op_lora_shrink emu_op_lora_shrink
#define cuda_op_lora_expand emu_op_lora_expand
#define cuda_op_gate_up emu_op_gate_up
#define cuda_op_sample emu_op_sample
#define cuda_op_embed emu_op_embed
#define cuda_op_rmsnorm emu_op_rmsnorm
#define cuda_op_silu_mul emu_op_silu_mul
#define cuda_op_gather_rows emu_op_gather_rows
#define cuda_op_feed emu_op_feed
#define cuda_sample_workspace emu_sample_workspace
#define cuda_attention_init emu_attention_init
#define cuda_lora_init emu_lora_init
#define cuda_lora_few_init emu_lora_few_init
#define cuda_lora_shrink_few emu_lora_shrink_few
#define cuda_lora_expand_few emu_lora_expand_few
#define cuda_attn_decode emu_attn_decode
#define cuda_gemm_few emu_gemm_few
#define cuda_gemm_few_fits emu_gemm_few_fits
#define cuda_gemm_tma emu_gemm_tma
#define cuda_gemm_tma_fits emu_gemm_tma_fits
#define cuda_gemm_init emu_gemm_init
#define cuda_bias_rows emu_bias_rows
#define cuda_add_product emu_add_product
#define cuda_gemm_mixed emu_gemm_mixed
#define cuda_gemm_mixed_fits emu_gemm_mixed_fits
#define cuda_widen_rows emu_widen_rows
#define cuda_convert_x emu_convert_x
#define cuda_unscale emu_unscale
#define cuda_op_lora_merge emu_op_lora_merge
#define cuda_attn_prefill emu_attn_prefill
#define cuda_attn_wgmma emu_attn_wgmma
#define cuda_attn_wgmma_fits emu_attn_wgmma_fits
#define cuda_attn_wgmma_init emu_attn_wgmma_init
#define cuda_attn_tma emu_attn_tma
#define cuda_attn_tma_fits emu_attn_tma_fits
#define cuda_attn_tma_init emu_attn_tma_init
#define cuda_tensor_map_make emu_tensor_map_make
#define cuda_attn_decode_init emu_attn_decode_init
#define cuda_attn_prefill_init emu_attn_prefill_init

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

typedef int cudaError_t;
typedef void *cudaStream_t;
typedef void *cudaEvent_t;
enum { cudaSuccess = 0 };
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize,
    cudaFuncAttributePreferredSharedMemoryCarveout
};

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return { x, y }; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    return { x, y, z, w };
}
static inline float2 make_float2(float x, float y) { return { x, y }; }

/* ---- the running thread ---------------------------------------------------------------- */

extern dim3 threadIdx, blockIdx, blockDim, gridDim;
unsigned char *emu_dynamic_smem(void);
void emu_barrier(void);                                 /* of the block */

/* All lanes of the warp hand in `size` bytes; the last to come computes all results. */
typedef void emu_warp_fn(const void *in[32], void *out[32], void *arg);
void emu_warp(const void *in, size_t in_size, void *out, size_t out_size, emu_warp_fn *fn,
              void *arg);
void emu_copy_later(void *dst, const void *src, size_t n);      /* src NULL: zeros */
void emu_copy_commit(void);
void emu_copy_wait(int left);

/* Barrier objects in shared memory, and copies that land when one of them is waited for. */
void emu_mbar_init(uint64_t *bar, int arrivals);
void emu_mbar_arrive(uint64_t *bar, int expect_bytes);
void emu_mbar_wait(uint64_t *bar, int parity);
void emu_bulk_copy(uint64_t *bar, int bytes, bool aligned, std::function<void()> land);

static inline void __syncthreads(void) { emu_barrier(); }
static inline void __threadfence(void) {}

template <typename T> static inline T emu_shuffle(T v, int from, int xor_mask)
{
    struct in { T v; int from; } i = { v, from };
    T out;
    emu_warp(&i, sizeof i, &out, sizeof out, [](const void *ins[32], void *outs[32], void *arg) {
        for (int l = 0; l < 32; l++) {
            int m = *(int *)arg, f = m ? l ^ m : ((const struct in *)ins[l])->from & 31;
            *(T *)outs[l] = ((const struct in *)ins[f])->v;
        }
    }, &xor_mask);
    return out;
}
template <typename T> static inline T __shfl_sync(unsigned, T v, int lane)
{
    return emu_shuffle(v, lane, 0);
}
template <typename T> static inline T __shfl_xor_sync(unsigned, T v, int mask)
{
    return emu_shuffle(v, 0, mask);
}
template <typename T> static inline T __shfl_up_sync(unsigned, T v, int by)
{
    int lane = (int)threadIdx.x % 32;
    return emu_shuffle(v, lane >= by ? lane - by : lane, 0);
}
static inline unsigned __ballot_sync(unsigned, int p)
{
    unsigned out;
    emu_warp(&p, sizeof p, &out, sizeof out, [](const void *ins[32], void *outs[32], void *) {
        unsigned all = 0;
        for (int l = 0; l < 32; l++)
            all |= (unsigned)(*(const int *)ins[l] != 0) << l;
        for (int l = 0; l < 32; l++)
            *(unsigned *)outs[l] = all;
    }, NULL);
    return out;
}
static inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
static inline void __syncwarp(unsigned m = 0xffffffffu) { (void)__ballot_sync(m, 0); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __syncthreads_or(int p)
{
    static int any;
    emu_barrier();
    any = 0;
    emu_barrier();
    any |= p != 0;
    emu_barrier();
    return any;
}

static inline unsigned atomicInc(unsigned *p, unsigned limit)
{
    unsigned old = *p;
    *p = old >= limit ? 0 : old + 1;
    return old;
}
template <typename T> static inline T atomicAdd(T *p, T v)
{
    T old = *p;
    *p = old + v;
    return old;
}
template <typename T> static inline T atomicExch(T *p, T v)
{
    T old = *p;
    *p = v;
    return old;
}
static inline uint64_t __float2ull_rz(float f) { return (uint64_t)f; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __uint_as_float(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}
static inline uint32_t __float_as_uint(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}
static inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t s)
{
    uint64_t all = (uint64_t)y << 32 | x;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++)
        r |= (uint32_t)(all >> (s >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return r;
}
static inline float __ldcg(const float *p) { return *p; }
template <typename T> static inline T __ldcs(const T *p) { return *p; }
template <typename T> static inline T __ldg(const T *p) { return *p; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
#define __expf(x) expf(x)       /* libm has an internal of that name */
static inline float __fdividef(float a, float b) { return a / b; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
static inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
static inline uint64_t min(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* ---- launching ------------------------------------------------------------------------- */

enum { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
    int id;
    struct { int programmaticStreamSerializationAllowed; } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};
void emu_launch(dim3 grid, dim3 block, size_t smem, const std::function<void()> &body);
template <typename... P>
static inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *c, void (*kernel)(P...),
                                             P... args)
{
    emu_launch(c->gridDim, c->blockDim, c->dynamicSmemBytes, [&] { kernel(args...); });
    return cudaSuccess;
}
template <typename K> static inline cudaError_t cudaFuncSetAttribute(K, cudaFuncAttribute, int)
{
    return cudaSuccess;
}
static inline cudaError_t cudaMemsetAsync(void *p, int v, size_t n, cudaStream_t)
{
    memset(p, v, n);
    return cudaSuccess;
}
#endif
