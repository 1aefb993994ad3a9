/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rows.cu - operations on each token's row alone: embed, rmsnorm, silu_mul, gather_rows; and feed,
 * which moves single ids.
 *
 * All are bound by memory or, at decode, by the time to start. Rows move in 16-byte vectors where
 * lengths and addresses allow, else element by element (VEC 8 and 1). A row belongs to one block
 * and sums in an order that depends on its length only, so neighbours change nothing.
 */
#include "kernels/cuda/prim.cuh"

#define NORM_VECS 4             /* vectors a thread keeps in registers */
#define NORM_MAX_HIDDEN (1024 * 8 * NORM_VECS)

/* VEC bf16 that move as one. */
template <int VEC> struct alignas(VEC * sizeof(bf16)) pack {
    bf16 v[VEC];
};

static bool vectors_fit(int64_t n, const void *a, const void *b, const void *c = nullptr)
{
    return n % 8 == 0 && ((uintptr_t)a | (uintptr_t)b | (uintptr_t)c) % 16 == 0;
}

static int threads_for(int64_t items, int max)
{
    int t = (int)LM_MIN((int64_t)max, (items + 31) / 32 * 32);
    return LM_MAX(t, 32);
}

/* ---- copies of rows -------------------------------------------------------------------- */

template <int VEC>
__global__ static void
copy_rows(bf16 *out, const bf16 *in, const int32_t *idx, int limit, int hidden,
                          int32_t *fault)
{
    cuda_wait_prior();
    int64_t from = idx[blockIdx.x];
    bool bad = from < 0 || from >= limit;
    if (bad && threadIdx.x == 0)
        cuda_report(fault, CUDA_FAULT_TOKEN);
    auto *dst = (pack<VEC> *)(out + (int64_t)blockIdx.x * hidden);
    auto *src = (const pack<VEC> *)(in + (bad ? 0 : from) * hidden);
    for (int i = threadIdx.x; i < hidden / VEC; i += blockDim.x)
        dst[i] = bad ? pack<VEC>{} : src[i];
}

/* The same from a table in float16. */
__global__ static void embed_f16(uint16_t *out, const uint16_t *in, const int32_t *idx, int limit,
                                 int hidden, int32_t *fault)
{
    cuda_wait_prior();
    int64_t from = idx[blockIdx.x];
    bool bad = from < 0 || from >= limit;
    if (bad && threadIdx.x == 0)
        cuda_report(fault, CUDA_FAULT_TOKEN);
    uint16_t *dst = out + (int64_t)blockIdx.x * hidden;
    const uint16_t *src = in + (bad ? 0 : from) * hidden;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x)
        dst[i] = bad ? 0 : (uint16_t)bf16_pack(f16_lo(src[i]), 0);
}

static lm_status launch_copy(struct cuda_stream *st, const char *op, void *out, const void *in,
                             const int32_t *idx, int limit, int n, int hidden)
{
    bool wide = vectors_fit(hidden, out, in);
    auto *kernel = wide ? copy_rows<8> : copy_rows<1>;
    return cuda_launch(st, op, kernel, dim3(n), dim3(threads_for(wide ? hidden / 8 : hidden, 256)),
                       0, (bf16 *)out, (const bf16 *)in, idx, limit, hidden, st->dev->fault);
}

extern "C" lm_status cuda_op_embed(kn_stream *s, const struct kn_embed *a)
{
    if (a->table && a->table->dtype == KN_E4M3)
        return LM_UNSUPPORTED;
    if (a->n < 0 || !a->table || a->table->cols != a->hidden || (a->n && (!a->out || !a->ids)))
        return cuda_refuse("embed", "null pointer, or hidden differs from the table's columns");
    if (a->n == 0)
        return LM_OK;
    struct cuda_stream *st = cuda_stream_of(s);
    if (a->table->dtype == KN_F16)
        return cuda_launch(st, "embed", embed_f16, dim3(a->n), dim3(threads_for(a->hidden, 256)), 0,
                           (uint16_t *)a->out, (const uint16_t *)cuda_mat_of(a->table)->data,
                           a->ids, a->table->rows, a->hidden, st->dev->fault);
    return launch_copy(st, "embed", a->out, cuda_mat_of(a->table)->data, a->ids,
                       a->table->rows, a->n, a->hidden);
}

extern "C" lm_status cuda_op_gather_rows(kn_stream *s, const struct kn_gather_rows *a)
{
    if (a->n < 0 || a->hidden <= 0 || (a->n && (!a->out || !a->x || !a->idx)))
        return cuda_refuse("gather_rows", "null pointer or bad shape");
    if (a->n == 0)
        return LM_OK;
    return launch_copy(cuda_stream_of(s), "gather_rows", a->out, a->x, a->idx, INT32_MAX, a->n,
                       a->hidden);
}

/* ---- rmsnorm --------------------------------------------------------------------------- */

__device__ static inline float block_sum(float v)
{
    __shared__ float part[32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
    for (int w = 16; w > 0; w >>= 1)
        v += __shfl_xor_sync(~0u, v, w);
    if (lane == 0)
        part[warp] = v;
    __syncthreads();
    v = lane < warps ? part[lane] : 0.0f;
    for (int w = 16; w > 0; w >>= 1)
        v += __shfl_xor_sync(~0u, v, w);
    return v;
}

/* The row stays in registers between the two passes: one read, one write. The norm is taken of the
 * exact sum x + residual; what is stored of it is rounded. */
template <int VEC>
__global__ static void
rmsnorm(bf16 *out, const bf16 *x, bf16 *residual, const float *weight, int hidden,
                        float eps)
{
    constexpr int KEEP = NORM_VECS * 8 / VEC;
    const int64_t at = (int64_t)blockIdx.x * hidden;
    float v[KEEP][VEC], sum = 0;
    cuda_wait_prior();
#pragma unroll
    for (int k = 0; k < KEEP; k++) {
        int i = (threadIdx.x + k * blockDim.x) * VEC;
        if (i >= hidden)
            break;
        pack<VEC> p = *(const pack<VEC> *)(x + at + i);
        for (int j = 0; j < VEC; j++)
            v[k][j] = __bfloat162float(p.v[j]);
        if (residual) {
            pack<VEC> r = *(const pack<VEC> *)(residual + at + i);
            for (int j = 0; j < VEC; j++) {
                v[k][j] += __bfloat162float(r.v[j]);
                r.v[j] = __float2bfloat16(v[k][j]);
            }
            *(pack<VEC> *)(residual + at + i) = r;
        }
        for (int j = 0; j < VEC; j++)
            sum += v[k][j] * v[k][j];
    }
    float scale = rsqrtf(block_sum(sum) / hidden + eps);
    cuda_allow_next();
#pragma unroll
    for (int k = 0; k < KEEP; k++) {
        int i = (threadIdx.x + k * blockDim.x) * VEC;
        if (i >= hidden)
            break;
        pack<VEC> p;
        for (int j = 0; j < VEC; j++)
            p.v[j] = __float2bfloat16(v[k][j] * scale * weight[i + j]);
        *(pack<VEC> *)(out + at + i) = p;
    }
}

#define FEW_ROWS 512            /* up to which the time to start is what counts */
#define FEW_THREADS 512
#define FEW_VECS 2              /* a thread's, of 8 elements */

/* The same sums for few rows: everything that the norm reads is under way at once, weights, which
 * come from memory where all else is in L2, before the wait for the kernel in front. */
__global__ static void __launch_bounds__(FEW_THREADS)
rmsnorm_few(bf16 *out, const bf16 *x, bf16 *residual, const float *weight, int hidden, float eps)
{
    const int64_t at = (int64_t)blockIdx.x * hidden;
    alignas(16) float w[FEW_VECS][8];
    pack<8> p[FEW_VECS] = {}, r[FEW_VECS] = {};
    float v[FEW_VECS][8], sum = 0;
    cuda_allow_next();          /* a product that reads weights ahead (gemm_tma.cu) */
#pragma unroll
    for (int k = 0; k < FEW_VECS; k++) {
        int i = (threadIdx.x + k * blockDim.x) * 8;
        if (i >= hidden)
            break;
        *(float4 *)w[k] = *(const float4 *)(weight + i);
        *(float4 *)(w[k] + 4) = *(const float4 *)(weight + i + 4);
    }
    cuda_wait_prior();
#pragma unroll
    for (int k = 0; k < FEW_VECS; k++) {
        int i = (threadIdx.x + k * blockDim.x) * 8;
        if (i >= hidden)
            break;
        p[k] = *(const pack<8> *)(x + at + i);
        if (residual)
            r[k] = *(const pack<8> *)(residual + at + i);
    }
#pragma unroll
    for (int k = 0; k < FEW_VECS; k++) {
        int i = (threadIdx.x + k * blockDim.x) * 8;
        if (i >= hidden)
            break;
        for (int j = 0; j < 8; j++) {
            v[k][j] = __bfloat162float(p[k].v[j]);
            if (residual) {
                v[k][j] += __bfloat162float(r[k].v[j]);
                r[k].v[j] = __float2bfloat16(v[k][j]);
            }
            sum += v[k][j] * v[k][j];
        }
        if (residual)
            *(pack<8> *)(residual + at + i) = r[k];
    }
    float scale = rsqrtf(block_sum(sum) / hidden + eps);
#pragma unroll
    for (int k = 0; k < FEW_VECS; k++) {
        int i = (threadIdx.x + k * blockDim.x) * 8;
        if (i >= hidden)
            break;
        for (int j = 0; j < 8; j++)
            p[k].v[j] = __float2bfloat16(v[k][j] * scale * w[k][j]);
        *(pack<8> *)(out + at + i) = p[k];
    }
}

extern "C" lm_status cuda_op_rmsnorm(kn_stream *s, const struct kn_rmsnorm *a)
{
    if (a->n < 0 || a->hidden <= 0 || (a->n && (!a->out || !a->x || !a->weight)))
        return cuda_refuse("rmsnorm", "null pointer or bad shape");
    bool wide = vectors_fit(a->hidden, a->out, a->x, a->residual);
    if (a->hidden > NORM_MAX_HIDDEN)
        return LM_UNSUPPORTED;
    if (a->n == 0)
        return LM_OK;
    /* At least two vectors a thread: fewer warps meet at the barrier. */
    int items = wide ? LM_DIV_UP(a->hidden, 16) : LM_DIV_UP(a->hidden, 4);
    const bool few = wide && a->n <= FEW_ROWS && (uintptr_t)a->weight % 16 == 0 &&
                     a->hidden <= FEW_THREADS * FEW_VECS * 8;
    auto *kernel = few ? rmsnorm_few : wide ? rmsnorm<8> : rmsnorm<1>;
    return cuda_launch(cuda_stream_of(s), "rmsnorm", kernel, dim3(a->n),
                       dim3(threads_for(items, 1024)), 0, (bf16 *)a->out, (const bf16 *)a->x,
                       (bf16 *)a->residual, a->weight, a->hidden, a->eps);
}

/* ---- silu_mul -------------------------------------------------------------------------- */

#define SILU_THREADS 128
#define SILU_VECS 2             /* a thread's, all on their way at once */

template <int VEC>
__global__ static void __launch_bounds__(SILU_THREADS)
silu_mul(bf16 *out, const bf16 *gate_up, int f)
{
    const bf16 *gate = gate_up + (int64_t)blockIdx.x * 2 * f;
    pack<VEC> g[SILU_VECS] = {}, u[SILU_VECS] = {};
    int col[SILU_VECS];
    cuda_wait_prior();
#pragma unroll
    for (int k = 0; k < SILU_VECS; k++) {
        col[k] = (int)((blockIdx.y * SILU_VECS + k) * SILU_THREADS + threadIdx.x) * VEC;
        if (col[k] < f) {
            g[k] = *(const pack<VEC> *)(gate + col[k]);
            u[k] = *(const pack<VEC> *)(gate + f + col[k]);
        }
    }
#pragma unroll
    for (int k = 0; k < SILU_VECS; k++) {
        if (col[k] >= f)
            break;
        for (int j = 0; j < VEC; j++)
            g[k].v[j] = __float2bfloat16(silu_mul_of(__bfloat162float(g[k].v[j]),
                                                     __bfloat162float(u[k].v[j])));
        *(pack<VEC> *)(out + (int64_t)blockIdx.x * f + col[k]) = g[k];
    }
}

extern "C" lm_status cuda_op_silu_mul(kn_stream *s, const struct kn_silu_mul *a)
{
    if (a->n < 0 || a->f <= 0 || (a->n && (!a->out || !a->gate_up)))
        return cuda_refuse("silu_mul", "null pointer or bad shape");
    if (a->n == 0)
        return LM_OK;
    bool wide = vectors_fit(a->f, a->out, a->gate_up);
    auto *kernel = wide ? silu_mul<8> : silu_mul<1>;
    const int vecs = wide ? a->f / 8 : a->f;
    dim3 grid((unsigned)a->n, (unsigned)LM_DIV_UP(vecs, SILU_THREADS * SILU_VECS));
    return cuda_launch(cuda_stream_of(s), "silu_mul", kernel, grid, dim3(SILU_THREADS), 0,
                       (bf16 *)a->out, (const bf16 *)a->gate_up, a->f);
}

/* ---- feed ------------------------------------------------------------------------------ */

__global__ static void feed(int32_t *dst, const int32_t *dst_idx, const int32_t *src,
                     const int32_t *src_idx, int n, int32_t *fault)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    cuda_wait_prior();
    if (i >= n)
        return;
    if (dst_idx[i] < 0 || src_idx[i] < 0)
        cuda_report(fault, CUDA_FAULT_TOKEN);
    else
        dst[dst_idx[i]] = src[src_idx[i]];
}

extern "C" lm_status cuda_op_feed(kn_stream *s, const struct kn_feed *a)
{
    struct cuda_stream *st = cuda_stream_of(s);
    if (a->n < 0 || (a->n && (!a->dst || !a->dst_idx || !a->src || !a->src_idx)))
        return cuda_refuse("feed", "null pointer or negative count");
    if (a->n == 0)
        return LM_OK;
    return cuda_launch(st, "feed", feed, dim3(LM_DIV_UP(a->n, 128)), dim3(128), 0, a->dst,
                       a->dst_idx, a->src, a->src_idx, a->n, st->dev->fault);
}

/* ---- small copies ---------------------------------------------------------------------- */

#define COPY_THREADS 128

/* A step's metadata and results: pinned memory has the same address here. It starts a microsecond
 * behind the kernel before it; the copy engine takes five to eight, as does what follows it. */
template <typename T>
__global__ static void copy_words(T *dst, const T *src, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    cuda_wait_prior();
    if (i < n)
        dst[i] = src[i];
}

template <typename T>
static lm_status launch_words(struct cuda_stream *st, const char *op, void *dst, const void *src,
                              size_t bytes)
{
    const int n = (int)(bytes / sizeof(T));
    return cuda_launch(st, op, copy_words<T>, dim3((unsigned)LM_DIV_UP(n, COPY_THREADS)),
                       dim3(COPY_THREADS), 0, (T *)dst, (const T *)src, n);
}

extern "C" lm_status cuda_copy_small(struct cuda_stream *st, const char *op, void *dst,
                                     const void *src, size_t bytes)
{
    const uintptr_t bits = (uintptr_t)dst | (uintptr_t)src | bytes;
    if (bytes > CUDA_COPY_SMALL || bits % 4)
        return LM_UNSUPPORTED;
    return bits % 16 ? launch_words<uint32_t>(st, op, dst, src, bytes)
                     : launch_words<uint4>(st, op, dst, src, bytes);
}

/* ---- filling a weight ------------------------------------------------------------------ */

#ifndef KN_EMU                  /* a plain launch, which host C++ has no syntax for */

/* Element (r, c) is a function of the seed and its place alone: the same on every backend. */
__device__ static inline float fill_value(int64_t i, int cols, uint64_t seed)
{
    uint64_t r = (uint64_t)(i / cols), c = (uint64_t)(i % cols);
    uint64_t z = seed + (r << 32 | c) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return (float)(z >> 40) * 0x1p-23f - 1.0f;
}

template <bool F16>
__global__ static void fill(uint16_t *out, int64_t n, int cols, uint64_t seed, float scale)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        float v = fill_value(i, cols, seed) * scale;
        out[i] = (uint16_t)(F16 ? f16_pack(v, 0) : bf16_pack(v, 0));
    }
}

/* E4M3: every row's scale is that of the largest number there can be. */
__global__ static void fill_e4m3(uint8_t *out, float *scales, int64_t n, int cols, uint64_t seed,
                                 float scale)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        out[i] = (uint8_t)e4m3_bits(fill_value(i, cols, seed) * 448);
        if (i % cols == 0)
            scales[i / cols] = scale / 448;
    }
}

extern "C" lm_status cuda_mat_fill(kn_mat *m, uint64_t seed, float scale, struct lm_err *err)
{
    struct cuda_device *d = cuda_mat_of(m)->dev;
    cudaSetDevice(d->index);
    int64_t n = (int64_t)m->rows * m->cols;
    const struct cuda_mat *w = cuda_mat_of(m);
    const unsigned grid = (unsigned)LM_MIN((n + 255) / 256, 65536);
    if (w->scale)
        fill_e4m3<<<grid, 256>>>((uint8_t *)w->data, w->scale, n, m->cols, seed, scale);
    else if (m->dtype == KN_F16)
        fill<true><<<grid, 256>>>((uint16_t *)w->data, n, m->cols, seed, scale);
    else
        fill<false><<<grid, 256>>>((uint16_t *)w->data, n, m->cols, seed, scale);
    cudaError_t e = cudaGetLastError();
    if (e == cudaSuccess)
        e = cudaDeviceSynchronize();
    if (cuda_check(d, "filling a matrix", e) != LM_OK)
        return lm_err_set(err, LM_DEVICE, "filling a matrix of %d x %d failed", m->rows, m->cols);
    return LM_OK;
}
#endif
