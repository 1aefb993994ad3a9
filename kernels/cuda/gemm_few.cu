/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gemm_few.cu - y = x W^T for few rows of x, and what a bias adds to a product.
 *
 * On Hopper few rows go to gemm_tma.cu where k allows; this is the way of everything else.
 *
 * Few rows are bound by reading W once. A block of WARPS warps takes 16 rows of W; its warps take
 * chunks of k in turn and their sums meet in shared memory. Each warp keeps two chunks of U * 32
 * columns in flight in registers, straight from global memory: no shared memory, no barrier on the
 * way. The first chunk is asked for before the kernel waits for its predecessor, since nobody on
 * this stream writes weights (kn_lora_merge wants a stream of its own for that reason): the start
 * of the read hides behind the end of whatever ran before.
 *
 * Tensor cores do the sums because 16 x 8 products cost no more than one: W is the 16 x 16 operand,
 * x^T the 16 x 8 one (8 rows of x a tile). The order of k inside a chunk is free as long as both
 * agree, so a thread loads 16 contiguous bytes of its rows and calls them what the fragments want:
 * in step s of 0, 1, the fragment's columns 2t, 2t+1, 2t+8, 2t+9 are columns 8t + 4s + 0..3.
 *
 * A row of y is summed in an order that depends on k alone: the same bits for every m served here.
 *
 * gate_up: a block's 16 rows of W are 8 of gate and the 8 of up that meet them in silu(gate) * up,
 * so the product never leaves the block and a launch is saved. Both are rounded to bf16 first, as
 * they are where they go through memory: the result is that of the two operations, to the last bit.
 */
#include "kernels/cuda/gemm_few.cuh"

/* ---- bias ------------------------------------------------------------------------------ */

__device__ static inline float load(const bf16 *p) { return __bfloat162float(*p); }
__device__ static inline void store(bf16 *p, float v) { *p = __float2bfloat16(v); }

#define MAX_GRID_Y 65535        /* rows a launch */

__global__ static void bias_rows(float *y, int64_t ldy, const float *bias, int n, bool onto)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    cuda_allow_next();
    cuda_wait_prior();
    if (i >= n)
        return;
    float *p = y + blockIdx.y * ldy + i;
    *p = onto ? *p + bias[i] : bias[i];
}

extern "C" lm_status cuda_bias_rows(struct cuda_stream *st, const struct kn_gemm *a)
{
    lm_status rc = LM_OK;
    for (int m0 = 0; m0 < a->m && rc == LM_OK; m0 += MAX_GRID_Y)
        rc = cuda_launch(st, "gemm bias", bias_rows,
                         dim3(LM_DIV_UP(a->w->rows, 256), LM_MIN(MAX_GRID_Y, a->m - m0)),
                         dim3(256), 0, (float *)a->y + m0 * a->ldy, a->ldy, a->bias, a->w->rows,
                         a->accumulate);
    return rc;
}

__global__ static void add_product(bf16 *y, int64_t ldy, const float *product, const float *bias,
                                   int n, bool onto)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    cuda_allow_next();
    cuda_wait_prior();
    if (i >= n)
        return;
    float v = product[(int64_t)blockIdx.y * n + i] + (bias ? bias[i] : 0.0f);
    bf16 *p = y + blockIdx.y * ldy + i;
    store(p, v + (onto ? load(p) : 0.0f));
}

extern "C" lm_status cuda_add_product(struct cuda_stream *st, const struct kn_gemm *a,
                                      const float *product)
{
    lm_status rc = LM_OK;
    for (int m0 = 0; m0 < a->m && rc == LM_OK; m0 += MAX_GRID_Y)
        rc = cuda_launch(st, "gemm bias", add_product,
                         dim3(LM_DIV_UP(a->w->rows, 256), LM_MIN(MAX_GRID_Y, a->m - m0)),
                         dim3(256), 0, (bf16 *)a->y + m0 * a->ldy, a->ldy,
                         product + (int64_t)m0 * a->w->rows, a->bias, a->w->rows, a->accumulate);
    return rc;
}

/* ---- few rows -------------------------------------------------------------------------- */

struct few {
    const bf16 *w, *x;
    struct few_out out;
    int64_t ldx;
    int m, n, k;
};

/* Two rows of W, 16 bytes of each for every 32 columns of the chunk at k0; k is what is left of a
 * row from this lane's first column on. */
template <int U>
__device__ static inline void load_chunk(uint4 w[U][2], const bf16 *lo, const bf16 *hi, int k0,
                                         int k)
{
#pragma unroll
    for (int u = 0; u < U; u++) {
        int at = k0 + u * 32;
        bool in = at < k;
        w[u][0] = in ? load_weights(lo + at) : make_uint4(0, 0, 0, 0);
        w[u][1] = in ? load_weights(hi + at) : make_uint4(0, 0, 0, 0);
    }
}

template <int NT, int U>
__device__ static inline void use_chunk(float acc[NT][4], const uint4 w[U][2],
                                        const bf16 *const x[NT], int k0, int k, int k_all)
{
#pragma unroll
    for (int u = 0; u < U; u++) {
        int at = k0 + u * 32;
        if (at >= k_all)        /* the same in all lanes */
            break;
#pragma unroll
        for (int j = 0; j < NT; j++) {
            uint4 b = x[j] && at < k ? *(const uint4 *)(x[j] + at) : make_uint4(0, 0, 0, 0);
            const uint32_t a0[4] = { w[u][0].x, w[u][1].x, w[u][0].y, w[u][1].y };
            const uint32_t a1[4] = { w[u][0].z, w[u][1].z, w[u][0].w, w[u][1].w };
            const uint32_t b0[2] = { b.x, b.y }, b1[2] = { b.z, b.w };
            mma_bf16(acc[j], a0, b0);
            mma_bf16(acc[j], a1, b1);
        }
    }
}

/* Rows 0-7 of the tile are of gate, 8-15 the same of up; y is [m, n / 2]. */
template <int NT, int WARPS>
__device__ static inline void finish_gate_up(const struct few &a, const float *sums, int row0)
{
    for (int i = threadIdx.x; i < NT * 8 * 8; i += WARPS * 32) {
        int tok = i / 8, row = i % 8;
        if (tok >= a.m || row0 + row >= a.n / 2)
            continue;
        few_store_gate_up(&a.out, tok, row0 + row,
                          few_sum<NT, WARPS>(sums, FEW_TILE_ROWS, tok, row),
                          few_sum<NT, WARPS>(sums, FEW_TILE_ROWS, tok, row + 8));
    }
}

template <int NT, int U, int WARPS, int RESIDENT, bool GATE_UP>
__global__ static void __launch_bounds__(WARPS * 32, RESIDENT) gemm_few(const struct few a)
{
    __shared__ float sums[WARPS * NT * 8 * FEW_TILE_ROWS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row0 = blockIdx.x * (GATE_UP ? 8 : FEW_TILE_ROWS), n = GATE_UP ? a.n / 2 : a.n;
    const int step = U * 32 * WARPS, k = a.k - t * 8;
    const int lo_row = min(row0 + g, n - 1);
    const int hi_row = GATE_UP ? n + lo_row : min(row0 + g + 8, n - 1);
    const bf16 *lo = a.w + (int64_t)lo_row * a.k + t * 8, *hi = a.w + (int64_t)hi_row * a.k + t * 8;
    const bf16 *x[NT];
    float acc[NT][4] = {};
    uint4 w0[U][2], w1[U][2];
    int k0 = warp * U * 32;
#pragma unroll
    for (int j = 0; j < NT; j++)
        x[j] = g + 8 * j < a.m ? a.x + (int64_t)(g + 8 * j) * a.ldx + t * 8 : nullptr;
    cuda_allow_next();
    load_chunk<U>(w0, lo, hi, k0, k);
    cuda_wait_prior();
    while (k0 < a.k) {
        load_chunk<U>(w1, lo, hi, k0 + step, k);
        use_chunk<NT, U>(acc, w0, x, k0, k, a.k);
        load_chunk<U>(w0, lo, hi, k0 + 2 * step, k);
        use_chunk<NT, U>(acc, w1, x, k0 + step, k, a.k);
        k0 += 2 * step;
    }
    few_leave<NT>(sums, acc, warp, lane);
    __syncthreads();
    if (GATE_UP)
        finish_gate_up<NT, WARPS>(a, sums, row0);
    else
        few_finish<NT, WARPS>(&a.out, a.m, a.n, NULL, sums, row0);
}

#define FEW_MAX 8               /* rows of x up to which this measures faster than cuBLASLt */

static bool few_fits(const struct kn_gemm *a)
{
    return a->m <= FEW_MAX && a->w->cols % 8 == 0 && a->ldx % 8 == 0 && (uintptr_t)a->x % 16 == 0;
}

extern "C" bool cuda_gemm_few_fits(struct cuda_stream *st, const struct kn_gemm *a)
{
    return few_fits(a) || cuda_gemm_tma_fits(st, a);
}

/* y is `out`, of gate_up or of the product itself. */
static lm_status multiply_few(struct cuda_stream *st, const struct kn_gemm *a, void *out,
                              bool gate_up)
{
    if (cuda_gemm_tma_fits(st, a)) {
        lm_status rc = cuda_gemm_tma(st, a, out, gate_up);
        if (rc != LM_UNSUPPORTED || !few_fits(a))
            return rc;
    }
    const int n = a->w->rows;
    const struct few f = { (const bf16 *)cuda_mat_of(a->w)->data, (const bf16 *)a->x,
                           { out, a->bias, gate_up ? n / 2 : a->ldy, a->accumulate, a->y_f32 },
                           a->ldx, a->m, n, a->w->cols };
    return gate_up ? cuda_launch(st, "gate_up", gemm_few<1, 2, 16, 2, true>,
                                 dim3((unsigned)LM_DIV_UP(n / 2, 8)), dim3(16 * 32), 0, f)
                   : cuda_launch(st, "gemm", gemm_few<1, 2, 16, 2, false>,
                                 dim3((unsigned)LM_DIV_UP(n, FEW_TILE_ROWS)), dim3(16 * 32), 0, f);
}

extern "C" lm_status cuda_gemm_few(struct cuda_stream *st, const struct kn_gemm *a)
{
    return multiply_few(st, a, a->y, false);
}

extern "C" lm_status cuda_op_gate_up(kn_stream *s, const struct kn_gate_up *a)
{
    struct cuda_stream *st = cuda_stream_of(s);
    const struct kn_gemm *g = &a->gemm;
    if (g->m < 0 || !g->w || (g->m && (!a->out || !g->x)) || g->w->rows % 2)
        return cuda_refuse("gate_up", "null pointer, negative row count or odd weight");
    if (g->m > 1 && g->ldx < g->w->cols)
        return cuda_refuse("gate_up", "a row stride is shorter than a row");
    if (g->m == 0)
        return LM_OK;
    if (g->w->dtype != KN_BF16 || g->bias || g->accumulate || g->y_f32 ||
        !cuda_gemm_few_fits(st, g))
        return LM_UNSUPPORTED;
    struct kn_gemm own = *g;
    own.ldx = LM_MAX(g->ldx, g->w->cols);
    return multiply_few(st, &own, a->out, true);
}
