/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attn_wgmma.cu - prefill attention on Hopper's asynchronous tensor cores (sm_90a; after
 * FlashAttention-3, arXiv 2407.08608), head_dim 128, E4M3 pools: bf16 pools have attn_tma.cu.
 *
 * Two groups of four warps own 64 rows each. Scores are products of Q and K in shared memory, the
 * weights stay in registers as the left side of the second product, V is read transposed. All
 * threads copy: K of the next tile while scores are computed, V while values are.
 */
#include "kernels/cuda/attn_prefill.cuh"
#include "kernels/cuda/attn_wgmma.cuh"

template <int HD_, int EB_> struct wgmma_shape {
    static constexpr int HD = HD_, EB = EB_, WARPS = 8, THREADS = WARPS * 32, MT = 1;
    static constexpr int ROWS = WARPS * 16;
    static constexpr int KEYS = 128;
    /* K and V in shared memory: from panel to panel, from 8 keys to the next. */
    static constexpr int PANEL = KEYS * 128, EIGHT = 1024;
    /* Panels of 64 dims, one after the other. */
    template <int N> __device__ static inline int at(int row, int piece)
    {
        return piece / 8 * N * 128 + row * 128 + ((piece ^ row) & 7) * 16;
    }
};

#if defined(KN_EMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* A tile whose copies are all but the newest LEFT groups is there, this thread's part and everyone
 * else's. */
template <class S, int LEFT>
__device__ static inline void tile_ready(unsigned char *tile, const unsigned char *stage)
{
    tile_landed<S, LEFT>(tile, stage);
    wgmma_writes_done();
    __syncthreads();
}

template <class S>
__device__ static inline void run_item(const struct attn_launch *p, const struct prefill_item *it,
                                       unsigned char *smem)
{
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
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
    q += warp / 4 * 64 * 128;
    for (int i = 0; i < r.n; i++) {
        const int pos0 = r.start + i * S::KEYS, next = M::at(i + 1);
        float s[1][S::KEYS / 8][4], keep[1][2];
        uint32_t w[S::KEYS / 16][4];
        tile_ready<S, 1>(k + M::at(i), k_copy);
        start_scores<S>(s[0], q, k + M::at(i));
        if (i + 1 < r.n)
            load_keys<S>(p, it, k_copy + next, pos0 + S::KEYS, &r, false);
        cp_async_commit();
        wgmma_wait<0>();
        if (needs_mask<S>(&r, pos0))
            mask<S>(&acc, s, pos0, lane);
        soften<S>(&acc, s, p->scale_log2, keep);
        rescale<S>(&acc, keep);
        pack<S::KEYS / 8>(w, s[0]);
        tile_ready<S, 1>(v + M::at(i), v_copy);
        start_values<S>(acc.o[0], w, v + M::at(i));
        if (i + 1 < r.n)
            load_keys<S>(p, it, v_copy + next, pos0 + S::KEYS, &r, true);
        cp_async_commit();
        wgmma_wait<0>();
    }
    cp_async_wait<0>();
    write_rows<S>(&p->a, it, &acc, warp, lane);
    __syncthreads();            /* the next item's copies overwrite q, k and v */
}
#endif

template <class S>
__global__ static void __launch_bounds__(S::THREADS, 1) wgmma_kernel(
    const __grid_constant__ struct attn_launch p)
{
#if defined(KN_EMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    DYNAMIC_SMEM(raw);
    unsigned char *smem = raw + (-(int)smem_addr(raw) & 1023);
    struct prefill_item it;
    cuda_allow_next();
    bool more = find_item(&p.a, S::ROWS, (int)blockIdx.x, &it);
    cuda_wait_prior();
    for (int i = (int)blockIdx.x; more;) {
        if (item_fits(&p, &it))
            run_item<S>(&p, &it, smem);
        i += (int)gridDim.x;
        more = find_item(&p.a, S::ROWS, i, &it);
    }
#else
    __trap();                   /* a build without sm_90a: a failed device, no wrong tokens */
#endif
}

template <class S> static constexpr int smem_bytes(void)
{
    return prefill_smem<S>::BYTES + 1024;       /* to align by hand */
}

template <class S> static lm_status launch(struct cuda_stream *st, const struct attn_launch *p)
{
    return cuda_launch(st, "attention (wgmma)", wgmma_kernel<S>, prefill_grid<S>(st, p),
                       dim3(S::THREADS), smem_bytes<S>(), *p);
}

/* At head_dim 64 mma.sync is as fast (SPEED.md). */
bool cuda_attn_wgmma_fits(const struct cuda_stream *st, const struct attn_launch *p)
{
    return st->dev->cc == 90 && p->a.head_dim == 128 && p->a.pool.kv == KN_KV_E4M3;
}

template <class S> static cudaError_t allow(void)
{
    return cudaFuncSetAttribute(wgmma_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                smem_bytes<S>());
}

cudaError_t cuda_attn_wgmma_init(void)
{
    return allow<struct wgmma_shape<128, 1>>();
}

lm_status cuda_attn_wgmma(struct cuda_stream *st, const struct attn_launch *p)
{
    return launch<struct wgmma_shape<128, 1>>(st, p);
}
