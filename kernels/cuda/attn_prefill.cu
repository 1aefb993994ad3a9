/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attn_prefill.cu - paged attention for sequences with several query tokens (FlashAttention-2,
 * arXiv 2307.08691), by mma.sync: any device from sm_80 on, any head_dim. Hopper's own kernels for
 * the common head sizes are in attn_tma.cu and attn_wgmma.cu.
 *
 * Four warps own 16 * MT rows each, and walk the keys together in tiles: scores, softmax, values.
 * K of the next tile is under way while scores are computed, V while the softmax is; masks (causal
 * edge, window, end) are applied only in the tiles that they touch.
 */
#include "kernels/cuda/attn_prefill.cuh"

template <int HD_, int EB_> struct mma_shape {
    static constexpr int HD = HD_, EB = EB_, WARPS = 4, THREADS = WARPS * 32;
    static constexpr int MT = HD > 128 ? 1 : 2;         /* 16-row tiles a warp */
    static constexpr int ROWS = WARPS * 16 * MT;
    static constexpr int KEYS = HD > 128 ? 32 : 64;     /* a tile */
    template <int N> __device__ static inline int at(int row, int piece)
    {
        return tile_at<HD>(row, piece);
    }
};

template <class S>
__device__ static inline void scores(float s[][S::KEYS / 8][4], const unsigned char *q,
                                     const unsigned char *k, int warp, int lane)
{
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int n = 0; n < S::KEYS / 8; n++)
            s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
#pragma unroll
    for (int ks = 0; ks < S::HD / 16; ks++) {
        uint32_t a[S::MT][4];
#pragma unroll
        for (int m = 0; m < S::MT; m++)
            ldmatrix(a[m], q + tile_at<S::HD>((warp * S::MT + m) * 16 + (lane & 15),
                                           2 * ks + (lane >> 4)));
#pragma unroll
        for (int n = 0; n < S::KEYS / 8; n += 2) {
            uint32_t b[4];
            ldmatrix(b, k + tile_at<S::HD>(n * 8 + (lane >> 4) * 8 + (lane & 7),
                                        2 * ks + (lane >> 3 & 1)));
#pragma unroll
            for (int m = 0; m < S::MT; m++) {
                mma_bf16(s[m][n], a[m], b);
                mma_bf16(s[m][n + 1], a[m], b + 2);
            }
        }
    }
}

template <class S>
__device__ static inline void add_values(struct prefill_acc<S> *acc,
                                         const float s[][S::KEYS / 8][4], const unsigned char *v,
                                         int lane)
{
#pragma unroll
    for (int ks = 0; ks < S::KEYS / 8 / 2; ks++) {
        uint32_t p[S::MT][4];
#pragma unroll
        for (int m = 0; m < S::MT; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *x = s[m][2 * ks + (i >> 1)] + (i & 1) * 2;
                p[m][i] = bf16_pack(x[0], x[1]);
            }
#pragma unroll
        for (int d = 0; d < S::HD / 16; d++) {
            uint32_t b[4];
            ldmatrix_trans(b, v + tile_at<S::HD>(ks * 16 + (lane & 15), 2 * d + (lane >> 4)));
#pragma unroll
            for (int m = 0; m < S::MT; m++) {
                mma_bf16(acc->o[m][2 * d], p[m], b);
                mma_bf16(acc->o[m][2 * d + 1], p[m], b + 2);
            }
        }
    }
}

/* ---- the kernel ------------------------------------------------------------------------ */

/* The item's keys, tile by tile. Two barriers a tile: before its K is read, which is also when
 * nobody reads the V before it any more, and before its V is read, likewise for K. */
template <class S>
__device__ static inline void run_item(const struct attn_launch *p, const struct prefill_item *it,
                                       unsigned char *smem, int warp, int lane)
{
    typedef struct prefill_smem<S> M;
    unsigned char *q = smem, *k = smem + M::QUERY, *v = k + M::BUFFERS * M::TILE;
    unsigned char *k_copy = S::EB == 2 ? k : smem + M::STAGES;
    unsigned char *v_copy = S::EB == 2 ? v : k_copy + M::STAGE;
    struct prefill_acc<S> acc;
    start_rows<S>(&p->a, it, &acc, warp, lane);
    const struct prefill_keys r = keys_of<S>(&p->a, it);
    load_query<S>(&p->a, it, q);
    load_keys<S>(p, it, k_copy, r.start, &r, false);
    cp_async_commit();
    load_keys<S>(p, it, v_copy, r.start, &r, true);
    cp_async_commit();
    for (int i = 0; i < r.n; i++) {
        const int pos0 = r.start + i * S::KEYS, next = M::at(i + 1);
        float s[S::MT][S::KEYS / 8][4], keep[S::MT][2];
        tile_landed<S, 1>(k + M::at(i), k_copy);
        __syncthreads();
        if (i + 1 < r.n)
            load_keys<S>(p, it, k_copy + next, pos0 + S::KEYS, &r, false);
        cp_async_commit();
        scores<S>(s, q, k + M::at(i), warp, lane);
        if (needs_mask<S>(&r, pos0))
            mask<S>(&acc, s, pos0, lane);
        soften<S>(&acc, s, p->scale_log2, keep);
        rescale<S>(&acc, keep);
        tile_landed<S, 1>(v + M::at(i), v_copy);
        __syncthreads();
        if (i + 1 < r.n)
            load_keys<S>(p, it, v_copy + next, pos0 + S::KEYS, &r, true);
        cp_async_commit();
        add_values<S>(&acc, s, v + M::at(i), lane);
    }
    cp_async_wait<0>();
    write_rows<S>(&p->a, it, &acc, warp, lane);
    __syncthreads();            /* the next item's copies overwrite q, k and v */
}

template <class S>
__global__ static void __launch_bounds__(S::THREADS) prefill_kernel(
    const __grid_constant__ struct attn_launch p)
{
    DYNAMIC_SMEM(smem);
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    struct prefill_item it;
    cuda_allow_next();
    bool more = find_item(&p.a, S::ROWS, (int)blockIdx.x, &it);
    cuda_wait_prior();
    for (int i = (int)blockIdx.x; more;) {
        if (item_fits(&p, &it))
            run_item<S>(&p, &it, smem, warp, lane);
        i += (int)gridDim.x;
        more = find_item(&p.a, S::ROWS, i, &it);
    }
}

template <class S> static lm_status launch(struct cuda_stream *st, const struct attn_launch *p)
{
    return cuda_launch(st, "attention (prefill)", prefill_kernel<S>, prefill_grid<S>(st, p),
                       dim3(S::THREADS), prefill_smem<S>::BYTES, *p);
}

template <class S> static cudaError_t allow(void)
{
    return cudaFuncSetAttribute(prefill_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                prefill_smem<S>::BYTES);
}

cudaError_t cuda_attn_prefill_init(void)
{
    cudaError_t e = cudaSuccess;
#define X(hd)                                                                                  \
    if (e == cudaSuccess)                                                                      \
        e = allow<struct mma_shape<hd, 2>>();                                                  \
    if (e == cudaSuccess)                                                                      \
        e = allow<struct mma_shape<hd, 1>>();
    CUDA_HEAD_DIMS(X)
#undef X
    return e;
}

lm_status cuda_attn_prefill(struct cuda_stream *st, const struct attn_launch *p)
{
    switch (p->a.head_dim) {
#define X(hd)                                                                                  \
    case hd:                                                                                   \
        return p->a.pool.kv == KN_KV_E4M3 ? launch<struct mma_shape<hd, 1>>(st, p)             \
                                          : launch<struct mma_shape<hd, 2>>(st, p);
        CUDA_HEAD_DIMS(X)
#undef X
    }
    return LM_UNSUPPORTED;
}
