/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gemm_mixed.cu - y = x W^T where W is not bf16 as x is: float16, or E4M3 with a scale for each
 * row.
 *
 * Few rows are bound by reading W once: gemm_few.cu's plan, for other numbers. A block takes 16 RT
 * rows of W, its warps chunks of k in turn, with two chunks in flight in registers. A lane loads 16
 * neighbouring bytes of each of its rows and widens them to what the tensor cores take beside x:
 *
 *   E4M3     to bf16. The order of k inside a chunk is free, so in step s of 0 .. 3 the fragment's
 *            columns 2t, 2t+1, 2t+8, 2t+9 are columns 16t + 4s + 0..3 of the chunk.
 *   float16  to tf32, whose 11 significant bits and 8 of exponent hold every float16 and bf16: x
 *            is widened too. In step s of 0 .. 3 the fragment's columns t and t+4 are columns
 *            8t + 2s and 8t + 2s + 1.
 *
 * Both are exact. Sums are float32; E4M3's are multiplied by the row's scale at the end. Rows of y
 * are summed in an order that depends on k and on which of the three sizes below serves m. More
 * rows of W a block mean fewer blocks that read all of x, which costs more than W itself from 16
 * rows of x on.
 *
 * Many rows are bound by arithmetic, and go to cuBLASLt (gemm.c), which multiplies equal types:
 *
 *   widen_rows   rows of W in E4M3 as bf16, scale and all (rounded once more);
 *   convert_x    rows of x as float16, or as E4M3; each divided by a scale of its own. E4M3: the
 *                largest magnitude / 448, as rows of W have it. float16: a power of two that takes
 *                the largest number to [2^14, 2^15), so that none is too large for float16, and all
 *                down to 2^-28 of the largest are exact; what is smaller is off by 2^-40 of the
 *                largest at most;
 *                Or as two numbers of E4M3, x = s a + s/32 b: s is a power of two that takes the
 *                largest to [2^7, 2^8), a is x / s rounded to 4 significant bits, and what is left
 *                of bf16's 8 fits b's 4. Exact down to 2^-14 of the largest, smaller ones are off
 *                by 2^-22 of it at most;
 *   unscale      the product, times the row's scale (or the products of both parts), plus what else
 *                is to be added, rounded once.
 */
#include "kernels/cuda/gemm_few.cuh"

#include <float.h>

#define WARPS 16
#define FEW_MAX 32              /* rows of x */

/* A lane's 16 bytes of W: `LANE` numbers; four lanes load a chunk. */
struct weight_e4m3 {
    enum { BYTES = 1, LANE = 16, CHUNK = 4 * LANE, X_VECS = 2 };
    uint32_t a[4][4];
    __device__ inline void widen_row(int hi, uint4 w)
    {
        const uint32_t v[4] = { w.x, w.y, w.z, w.w };
#pragma unroll
        for (int s = 0; s < 4; s++) {
            a[s][hi] = e4m3_pair(v[s], v[s], 0, 1);
            a[s][2 + hi] = e4m3_pair(v[s], v[s], 2, 3);
        }
    }
    __device__ inline void multiply(float acc[4], const uint4 x[X_VECS]) const
    {
        const uint32_t b[4][2] = { { x[0].x, x[0].y }, { x[0].z, x[0].w },
                                   { x[1].x, x[1].y }, { x[1].z, x[1].w } };
#pragma unroll
        for (int s = 0; s < 4; s++)
            mma_bf16(acc, a[s], b[s]);
    }
};

struct weight_f16 {
    enum { BYTES = 2, LANE = 8, CHUNK = 4 * LANE, X_VECS = 1 };
    uint32_t a[4][4];
    __device__ inline void widen_row(int hi, uint4 w)
    {
        const uint32_t v[4] = { w.x, w.y, w.z, w.w };
#pragma unroll
        for (int s = 0; s < 4; s++) {
            a[s][hi] = __float_as_uint(f16_lo(v[s]));
            a[s][2 + hi] = __float_as_uint(f16_hi(v[s]));
        }
    }
    __device__ inline void multiply(float acc[4], const uint4 x[X_VECS]) const
    {
        const uint32_t v[4] = { x[0].x, x[0].y, x[0].z, x[0].w };
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const uint32_t b[2] = { __float_as_uint(bf16_lo(v[s])),
                                    __float_as_uint(bf16_hi(v[s])) };
            mma_tf32(acc, a[s], b);
        }
    }
};

/* ---- few rows -------------------------------------------------------------------------- */

struct few {
    const uint8_t *w;
    const float *scale;         /* NULL: 1 */
    const uint16_t *x;
    struct few_out out;
    int64_t ldx;
    int m, n, k;
};

/* U chunks of a lane's rows; `left` is what is left of a row from the lane's first column on. */
template <class W, int RT, int U>
__device__ static inline void load_chunks(uint4 w[U][RT][2], const uint8_t *const row[RT][2],
                                          int k0, int left)
{
#pragma unroll
    for (int u = 0; u < U; u++) {
        const int at = k0 + u * W::CHUNK;
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                w[u][r][h] = at < left ? load_once(row[r][h] + at * W::BYTES)
                                       : make_uint4(0, 0, 0, 0);
    }
}

template <class W, int NT, int RT, int U>
__device__ static inline void use_chunks(float acc[RT][NT][4], const uint4 w[U][RT][2],
                                         const uint16_t *const x[NT], int k0, int left, int k_all)
{
#pragma unroll
    for (int u = 0; u < U; u++) {
        const int at = k0 + u * W::CHUNK;
        if (at >= k_all)        /* the same in all lanes */
            break;
        W wide[RT];
#pragma unroll
        for (int r = 0; r < RT; r++) {
            wide[r].widen_row(0, w[u][r][0]);
            wide[r].widen_row(1, w[u][r][1]);
        }
#pragma unroll
        for (int j = 0; j < NT; j++) {
            uint4 b[W::X_VECS];
#pragma unroll
            for (int v = 0; v < W::X_VECS; v++)
                b[v] = x[j] && at < left ? *(const uint4 *)(x[j] + at + v * 8)
                                         : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int r = 0; r < RT; r++)
                wide[r].multiply(acc[r][j], b);
        }
    }
}

template <class W, int NT, int RT, int U>
__global__ static void __launch_bounds__(WARPS * 32, NT == 1 ? 2 : 1) gemm_mixed(
    const __grid_constant__ struct few a)
{
    __shared__ float sums[WARPS * NT * 8 * FEW_TILE_ROWS];
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, g = lane / 4;
    const int t = lane % 4, row0 = (int)blockIdx.x * FEW_TILE_ROWS * RT, left = a.k - t * W::LANE;
    const int step = U * W::CHUNK * WARPS, first = warp * U * W::CHUNK;
    const uint8_t *row[RT][2];
    const uint16_t *x[NT];
    float acc[RT][NT][4];
    uint4 w0[U][RT][2], w1[U][RT][2];
#pragma unroll
    for (int r = 0; r < RT; r++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            row[r][h] = a.w + ((int64_t)min(row0 + r * FEW_TILE_ROWS + h * 8 + g, a.n - 1) * a.k +
                               t * W::LANE) * W::BYTES;
#pragma unroll
    for (int j = 0; j < NT; j++) {
        x[j] = g + 8 * j < a.m ? a.x + (int64_t)(g + 8 * j) * a.ldx + t * W::LANE : NULL;
#pragma unroll
        for (int r = 0; r < RT; r++)
            acc[r][j][0] = acc[r][j][1] = acc[r][j][2] = acc[r][j][3] = 0;
    }
    cuda_allow_next();
    load_chunks<W, RT, U>(w0, row, first, left);
    cuda_wait_prior();
    for (int k0 = first; k0 < a.k; k0 += 2 * step) {
        load_chunks<W, RT, U>(w1, row, k0 + step, left);
        use_chunks<W, NT, RT, U>(acc, w0, x, k0, left, a.k);
        load_chunks<W, RT, U>(w0, row, k0 + 2 * step, left);
        use_chunks<W, NT, RT, U>(acc, w1, x, k0 + step, left, a.k);
    }
#pragma unroll
    for (int r = 0; r < RT; r++) {
        if (r > 0)
            __syncthreads();    /* all have read the sums before */
        few_leave<NT>(sums, acc[r], warp, lane);
        __syncthreads();
        few_finish<NT, WARPS>(&a.out, a.m, a.n, a.scale, sums, row0 + r * FEW_TILE_ROWS);
    }
}

extern "C" bool cuda_gemm_mixed_fits(const struct kn_gemm *a)
{
    return a->m <= FEW_MAX && a->ldx % 8 == 0 && (uintptr_t)a->x % 16 == 0 &&
           a->w->cols % (a->w->dtype == KN_E4M3 ? 16 : 8) == 0;
}

template <class W> static lm_status launch_few(struct cuda_stream *st, const struct few &f)
{
    const int rt = f.m <= 8 ? 1 : 2;
    auto *kernel = f.m <= 8 ? gemm_mixed<W, 1, 1, 2>
                            : f.m <= 16 ? gemm_mixed<W, 2, 2, 1> : gemm_mixed<W, 4, 2, 1>;
    return cuda_launch(st, "gemm (mixed)", kernel,
                       dim3((unsigned)LM_DIV_UP(f.n, FEW_TILE_ROWS * rt)), dim3(WARPS * 32), 0, f);
}

extern "C" lm_status cuda_gemm_mixed(struct cuda_stream *st, const struct kn_gemm *a)
{
    const struct cuda_mat *w = cuda_mat_of(a->w);
    const struct few f = { (const uint8_t *)w->data, w->scale, (const uint16_t *)a->x,
                           { a->y, a->bias, a->ldy, a->accumulate, a->y_f32 }, a->ldx, a->m,
                           a->w->rows, a->w->cols };
    return a->w->dtype == KN_E4M3 ? launch_few<weight_e4m3>(st, f) : launch_few<weight_f16>(st, f);
}

/* ---- W as bf16 ------------------------------------------------------------------------- */

__device__ static inline uint32_t scaled(uint32_t pair, float scale)
{
    return bf16_pack(bf16_lo(pair) * scale, bf16_hi(pair) * scale);
}

/* out [n, k] bf16 = w [n, k] * scale. A thread makes 8 numbers, twice, so that a warp's stores are
 * in one piece; it reads before the wait, as nothing else writes weights. */
__global__ static void __launch_bounds__(256) widen_rows(uint16_t *out, const uint8_t *w,
                                                         const float *scale, unsigned n8,
                                                         unsigned k8)
{
    const unsigned first = blockIdx.x * 512 + threadIdx.x;
    uint2 u[2];
    float s[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const unsigned i = min(first + h * 256, n8 - 1);
        u[h] = __ldcs((const uint2 *)w + i);
        s[h] = scale[i / k8];
    }
    cuda_wait_prior();          /* the product before this one still reads `out` */
#pragma unroll
    for (int h = 0; h < 2; h++)
        if (first + h * 256 < n8)
            ((uint4 *)out)[first + h * 256] =
                make_uint4(scaled(e4m3_pair(u[h].x, u[h].x, 0, 1), s[h]),
                           scaled(e4m3_pair(u[h].x, u[h].x, 2, 3), s[h]),
                           scaled(e4m3_pair(u[h].y, u[h].y, 0, 1), s[h]),
                           scaled(e4m3_pair(u[h].y, u[h].y, 2, 3), s[h]));
}

extern "C" lm_status cuda_widen_rows(struct cuda_stream *st, const struct cuda_mat *w, int row0,
                                     int rows, void *out)
{
    const int64_t cols = w->base.cols, n8 = rows * cols / 8;
    return cuda_launch(st, "gemm (widening fp8)", widen_rows, dim3((unsigned)LM_DIV_UP(n8, 512)),
                       dim3(256), 0, (uint16_t *)out, (const uint8_t *)w->data + row0 * cols,
                       w->scale + row0, (unsigned)n8, (unsigned)(cols / 8));
}

/* ---- x as W is ------------------------------------------------------------------------- */

#define CONVERT_THREADS 256
#define SPLIT_BITS 5            /* what the second part of x is scaled by */

enum x_as { X_F16, X_E4M3, X_SPLIT };

/* Of the row's largest magnitude, as its bits in bf16. */
template <x_as AS> __device__ static inline float scale_for(uint32_t most)
{
    if (most >= 0x7f80u)        /* not a number, or infinite: it stays visible */
        return AS == X_F16 ? 1.0f : bf16_lo(most);
    if (most == 0)
        return 1.0f;
    if (AS == X_E4M3)
        return fmaxf(bf16_lo(most) / 448.0f, FLT_MIN);
    const int e = max((int)(most >> 7), 1) - 127 - (AS == X_F16 ? 14 : 7);
    return __uint_as_float((uint32_t)(max(e, -126 + SPLIT_BITS) + 127) << 23);
}

/* `rest`: pairs from the first part of x to the second. */
template <x_as AS>
__device__ static inline void convert_pair(void *out, int64_t pair, uint32_t x, float scale,
                                           int64_t rest)
{
    const float lo = bf16_lo(x) / scale, hi = bf16_hi(x) / scale;
    if (AS == X_F16) {
        ((uint32_t *)out)[pair] = f16_pack(lo, hi);
        return;
    }
    const uint16_t first = e4m3_pack(lo, hi);
    ((uint16_t *)out)[pair] = first;
    if (AS == X_SPLIT) {
        const uint32_t w = e4m3_pair(first, first, 0, 1);
        ((uint16_t *)out)[pair + rest] = e4m3_pack((lo - bf16_lo(w)) * (1 << SPLIT_BITS),
                                                   (hi - bf16_hi(w)) * (1 << SPLIT_BITS));
    }
}

/* A block a row: out [m, ldo] = x / scale [m]; split, [2 m, ldo] and [2 m]. `vec`: 8 numbers of a
 * row are 16 aligned bytes. */
template <x_as AS>
__global__ static void __launch_bounds__(CONVERT_THREADS) convert_x(
    void *out, float *scales, const uint16_t *x, int64_t ldx, int64_t ldo, int k, bool vec)
{
    __shared__ uint32_t part[CONVERT_THREADS / 32];
    const int tid = (int)threadIdx.x;
    const uint16_t *row = x + blockIdx.x * ldx;
    const int n8 = vec ? k / 8 : 0;
    uint32_t most = 0;
    cuda_allow_next();
    cuda_wait_prior();
    for (int i = tid; i < n8; i += CONVERT_THREADS) {
        const uint4 v = ((const uint4 *)row)[i];
        const uint32_t p[4] = { v.x, v.y, v.z, v.w };
        for (int j = 0; j < 4; j++)
            most = max(most, max(p[j] & 0x7fffu, p[j] >> 16 & 0x7fffu));
    }
    for (int i = n8 * 8 + tid; i < k; i += CONVERT_THREADS)
        most = max(most, row[i] & 0x7fffu);
    for (int i = 16; i > 0; i /= 2)
        most = max(most, __shfl_xor_sync(FULL_MASK, most, i));
    if (tid % 32 == 0)
        part[tid / 32] = most;
    __syncthreads();
    for (int w = 0; w < CONVERT_THREADS / 32; w++)
        most = max(most, part[w]);
    const float scale = scale_for<AS>(most);
    const int64_t at = blockIdx.x * ldo / 2, rest = gridDim.x * ldo / 2;        /* in pairs */
    if (tid == 0)
        scales[blockIdx.x] = scale;
    if (AS == X_SPLIT && tid == 0)
        scales[gridDim.x + blockIdx.x] = scale / (1 << SPLIT_BITS);
    for (int i = tid; i < n8; i += CONVERT_THREADS) {
        const uint4 v = ((const uint4 *)row)[i];
        const uint32_t p[4] = { v.x, v.y, v.z, v.w };
        for (int j = 0; j < 4; j++)
            convert_pair<AS>(out, at + i * 4 + j, p[j], scale, rest);
    }
    for (int i = n8 * 8 + tid * 2; i < k; i += CONVERT_THREADS * 2)
        convert_pair<AS>(out, at + i / 2, row[i] | (i + 1 < k ? (uint32_t)row[i + 1] << 16 : 0),
                         scale, rest);
}

extern "C" lm_status cuda_convert_x(struct cuda_stream *st, const struct kn_gemm *a, void *out,
                                    int64_t ldo, float *scales, bool split)
{
    const bool vec = a->ldx % 8 == 0 && (uintptr_t)a->x % 16 == 0;
    auto *kernel = split ? convert_x<X_SPLIT>
                         : a->w->dtype == KN_E4M3 ? convert_x<X_E4M3> : convert_x<X_F16>;
    return cuda_launch(st, "gemm (converting x)", kernel, dim3((unsigned)a->m),
                       dim3(CONVERT_THREADS), 0, out, scales, (const uint16_t *)a->x, a->ldx, ldo,
                       a->w->cols, vec);
}

/* ---- what becomes of the product ------------------------------------------------------- */

#define MAX_GRID_Y 65535        /* rows a launch */

struct unscale_launch {
    void *y;
    const float *product, *scale, *bias;
    const float *rest;          /* NULL, or a product to be added, and no scale */
    int64_t ldy;
    int n;
    bool onto, f32;
};

/* Four numbers a thread, where rows are aligned; else one. */
template <int VEC>
__global__ static void unscale(const __grid_constant__ struct unscale_launch a)
{
    const int i = ((int)blockIdx.x * 256 + (int)threadIdx.x) * VEC, row = (int)blockIdx.y;
    alignas(16) float v[VEC], r[VEC] = {};
    cuda_allow_next();
    cuda_wait_prior();
    if (i >= a.n)
        return;
    const int64_t at = (int64_t)row * a.n + i;
    const float s = a.rest ? 1.0f : a.scale[row];
    if (VEC == 4)
        *(float4 *)v = *(const float4 *)(a.product + at);
    else
        v[0] = a.product[at];
    if (VEC == 4 && a.rest)
        *(float4 *)r = *(const float4 *)(a.rest + at);
    else if (a.rest)
        r[0] = a.rest[at];
#pragma unroll
    for (int j = 0; j < VEC; j++)
        v[j] = v[j] * s + r[j] + (a.bias ? a.bias[i + j] : 0.0f);
    if (a.f32) {
        float *y = (float *)a.y + row * a.ldy + i;
#pragma unroll
        for (int j = 0; j < VEC; j++)
            v[j] += a.onto ? y[j] : 0.0f;
        if (VEC == 4)
            *(float4 *)y = *(float4 *)v;
        else
            *y = v[0];
        return;
    }
    uint16_t *y = (uint16_t *)a.y + row * a.ldy + i;
#pragma unroll
    for (int j = 0; j < VEC; j++)
        v[j] += a.onto ? bf16_lo(y[j]) : 0.0f;
    if (VEC == 4)
        *(uint2 *)y = make_uint2(bf16_pack(v[0], v[1]), bf16_pack(v[2], v[3]));
    else
        *y = (uint16_t)bf16_pack(v[0], 0);
}

extern "C" lm_status cuda_unscale(struct cuda_stream *st, const struct kn_gemm *a,
                                  const float *product, const float *scale)
{
    const int n = a->w->rows, size = a->y_f32 ? 4 : 2;
    const bool vec = n % 4 == 0 && a->ldy % 4 == 0 && (uintptr_t)a->y % (unsigned)(size * 4) == 0;
    auto *kernel = vec ? unscale<4> : unscale<1>;
    lm_status rc = LM_OK;
    for (int m0 = 0; m0 < a->m && rc == LM_OK; m0 += MAX_GRID_Y) {
        const float *p = product + (int64_t)m0 * n, *rest = scale ? NULL : p + (int64_t)a->m * n;
        struct unscale_launch u = { (char *)a->y + m0 * a->ldy * size, p, scale ? scale + m0 : NULL,
                                    a->bias, rest, a->ldy, n, a->accumulate, a->y_f32 };
        rc = cuda_launch(st, "gemm (scaling)", kernel,
                         dim3((unsigned)LM_DIV_UP(n, vec ? 1024 : 256),
                              (unsigned)LM_MIN(MAX_GRID_Y, a->m - m0)), dim3(256), 0, u);
    }
    return rc;
}
