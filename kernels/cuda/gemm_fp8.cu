/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gemm_fp8.cu - y = x W^T with W in E4M3 and a scale for each of its rows; x stays bf16.
 *
 * Few rows are bound by reading W once, which is half of what bf16 takes: gemm_few.cu's plan, with
 * bytes. A block takes 16 rows of W, its warps chunks of k in turn, with two chunks in flight in
 * registers. A lane loads 16 neighbouring numbers of two rows and widens them to bf16 (exact); the
 * order of k inside a chunk is free, so in step s of 0 .. 3 the fragment's columns 2t, 2t+1, 2t+8,
 * 2t+9 are columns 16t + 4s + 0..3 of the chunk. Sums are float32 over the unscaled numbers, and
 * are multiplied by the row's scale at the end. A row of y is summed in an order that depends on k
 * alone.
 *
 * Many rows are bound by arithmetic: rows of W are widened to bf16, scale and all (rounded once
 * more), and go to cuBLASLt (gemm.c).
 */
#include "kernels/cuda/prim.cuh"

#define WARPS 16
#define TILE_ROWS 16            /* of W, a block */
#define CHUNK 64                /* columns that four lanes load at once */
#define UNROLL 2                /* chunks that a warp takes at once */
#define FEW_MAX 32              /* rows of x */

struct few8 {
    const uint8_t *w;
    const float *scale;
    const uint16_t *x;
    void *y;
    const float *bias;
    int64_t ldx, ldy;
    int m, n, k;
    bool accumulate, f32;
};

/* Two rows of W; `left` is what is left of a row from this lane's first column on. */
__device__ static inline void load_chunks(uint4 w[UNROLL][2], const uint8_t *lo, const uint8_t *hi,
                                          int k0, int left)
{
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        int at = k0 + u * CHUNK;
        w[u][0] = at < left ? load_once(lo + at) : make_uint4(0, 0, 0, 0);
        w[u][1] = at < left ? load_once(hi + at) : make_uint4(0, 0, 0, 0);
    }
}

__device__ static inline void widen_step(uint32_t a[4], uint32_t lo, uint32_t hi)
{
    a[0] = e4m3_pair(lo, lo, 0, 1);
    a[1] = e4m3_pair(hi, hi, 0, 1);
    a[2] = e4m3_pair(lo, lo, 2, 3);
    a[3] = e4m3_pair(hi, hi, 2, 3);
}

template <int NT>
__device__ static inline void use_chunks(float acc[NT][4], const uint4 w[UNROLL][2],
                                         const uint16_t *const x[NT], int k0, int left, int k_all)
{
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        const int at = k0 + u * CHUNK;
        if (at >= k_all)        /* the same in all lanes */
            break;
        uint32_t a[4][4];
        widen_step(a[0], w[u][0].x, w[u][1].x);
        widen_step(a[1], w[u][0].y, w[u][1].y);
        widen_step(a[2], w[u][0].z, w[u][1].z);
        widen_step(a[3], w[u][0].w, w[u][1].w);
#pragma unroll
        for (int j = 0; j < NT; j++) {
            uint4 b0 = make_uint4(0, 0, 0, 0), b1 = b0;
            if (x[j] && at < left) {
                b0 = *(const uint4 *)(x[j] + at);
                b1 = *(const uint4 *)(x[j] + at + 8);
            }
            const uint32_t b[4][2] = { { b0.x, b0.y }, { b0.z, b0.w }, { b1.x, b1.y },
                                       { b1.z, b1.w } };
#pragma unroll
            for (int s = 0; s < 4; s++)
                mma_bf16(acc[j], a[s], b[s]);
        }
    }
}

/* The warps' sums, added in order, to y. */
template <int NT>
__device__ static inline void finish(const struct few8 &a, const float *sums, int row0)
{
    for (int i = (int)threadIdx.x; i < NT * 8 * TILE_ROWS; i += WARPS * 32) {
        int tok = i / TILE_ROWS, row = i % TILE_ROWS;
        if (tok >= a.m || row0 + row >= a.n)
            continue;
        float v = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            v += sums[(w * NT * 8 + tok) * TILE_ROWS + row];
        v = v * a.scale[row0 + row] + (a.bias ? a.bias[row0 + row] : 0.0f);
        int64_t at = tok * a.ldy + row0 + row;
        if (a.f32) {
            float *y = (float *)a.y + at;
            *y = v + (a.accumulate ? *y : 0.0f);
        } else {
            uint16_t *y = (uint16_t *)a.y + at;
            *y = (uint16_t)bf16_pack(v + (a.accumulate ? bf16_lo(*y) : 0.0f), 0);
        }
    }
}

template <int NT>
__global__ static void __launch_bounds__(WARPS * 32, NT == 1 ? 2 : 1) gemm_few8(
    const __grid_constant__ struct few8 a)
{
    __shared__ float sums[WARPS * NT * 8 * TILE_ROWS];
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, g = lane / 4;
    const int t = lane % 4, row0 = (int)blockIdx.x * TILE_ROWS, left = a.k - t * 16;
    const int step = UNROLL * CHUNK * WARPS;
    const uint8_t *lo = a.w + (int64_t)min(row0 + g, a.n - 1) * a.k + t * 16;
    const uint8_t *hi = a.w + (int64_t)min(row0 + g + 8, a.n - 1) * a.k + t * 16;
    const uint16_t *x[NT];
    float acc[NT][4];
    uint4 w0[UNROLL][2], w1[UNROLL][2];
#pragma unroll
    for (int j = 0; j < NT; j++) {
        x[j] = g + 8 * j < a.m ? a.x + (int64_t)(g + 8 * j) * a.ldx + t * 16 : NULL;
        acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0;
    }
    cuda_allow_next();
    load_chunks(w0, lo, hi, warp * UNROLL * CHUNK, left);
    cuda_wait_prior();
    for (int k0 = warp * UNROLL * CHUNK; k0 < a.k; k0 += 2 * step) {
        load_chunks(w1, lo, hi, k0 + step, left);
        use_chunks<NT>(acc, w0, x, k0, left, a.k);
        load_chunks(w0, lo, hi, k0 + 2 * step, left);
        use_chunks<NT>(acc, w1, x, k0 + step, left, a.k);
    }
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int c = 0; c < 4; c++)
            sums[(warp * NT * 8 + j * 8 + 2 * t + (c & 1)) * TILE_ROWS + g + (c & 2) * 4] =
                acc[j][c];
    __syncthreads();
    finish<NT>(a, sums, row0);
}

extern "C" bool cuda_gemm_few8_fits(const struct kn_gemm *a)
{
    return a->m <= FEW_MAX && a->ldx % 8 == 0 && (uintptr_t)a->x % 16 == 0;
}

extern "C" lm_status cuda_gemm_few8(struct cuda_stream *st, const struct kn_gemm *a)
{
    const struct cuda_mat *w = cuda_mat_of(a->w);
    struct few8 f = { (const uint8_t *)w->data, w->scale, (const uint16_t *)a->x, a->y, a->bias,
                      a->ldx, a->ldy, a->m, a->w->rows, a->w->cols, a->accumulate, a->y_f32 };
    auto *kernel = f.m <= 8 ? gemm_few8<1> : f.m <= 16 ? gemm_few8<2> : gemm_few8<4>;
    return cuda_launch(st, "gemm (fp8)", kernel, dim3((unsigned)LM_DIV_UP(f.n, TILE_ROWS)),
                       dim3(WARPS * 32), 0, f);
}

/* ---- many rows ------------------------------------------------------------------------- */

__device__ static inline uint32_t scaled(uint32_t pair, float scale)
{
    return bf16_pack(bf16_lo(pair) * scale, bf16_hi(pair) * scale);
}

/* out [n, k] bf16 = w [n, k] * scale, 16 numbers a thread. */
__global__ static void widen_rows(uint16_t *out, const uint8_t *w, const float *scale, int64_t n16,
                                  int k16)
{
    int64_t i = (int64_t)blockIdx.x * 256 + (int)threadIdx.x;
    cuda_wait_prior();          /* the product before this one still reads `out` */
    if (i >= n16)
        return;
    const uint4 u = load_once(w + i * 16);
    const float s = scale[i / k16];
    const uint32_t v[4] = { u.x, u.y, u.z, u.w };
    uint32_t o[8];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        o[2 * j] = scaled(e4m3_pair(v[j], v[j], 0, 1), s);
        o[2 * j + 1] = scaled(e4m3_pair(v[j], v[j], 2, 3), s);
    }
    uint4 *dst = (uint4 *)(out + i * 16);
    dst[0] = make_uint4(o[0], o[1], o[2], o[3]);
    dst[1] = make_uint4(o[4], o[5], o[6], o[7]);
}

extern "C" lm_status cuda_widen_rows(struct cuda_stream *st, const struct cuda_mat *w, int row0,
                                     int rows, void *out)
{
    const int64_t cols = w->base.cols, n16 = rows * cols / 16;
    return cuda_launch(st, "gemm (widening fp8)", widen_rows,
                       dim3((unsigned)LM_DIV_UP(n16, 256)), dim3(256), 0, (uint16_t *)out,
                       (const uint8_t *)w->data + row0 * cols, w->scale + row0, n16,
                       (int)(cols / 16));
}
