/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attn_tma.cu - prefill attention on Hopper (sm_90a; after FlashAttention-3, arXiv 2407.08608), for
 * head_dim 64 and 128 and bf16 pools in blocks of at least 8 tokens.
 *
 * One block an SM stays for all its items. Its warps divide the work:
 *     warps 0, 1       fetch K and V, tile by tile, through a tensor map of the pool
 *     warps 2, 3       fetch the query rows of the item after; warp 2 also takes items, each block
 *                      as fast as it can, from a counter that all blocks share
 *     warps 4 to 11    two groups of four that own 64 rows each: products and softmax. They have
 *                      most of the registers
 * They meet at barriers in shared memory only: each of two slots for K, for V and for query rows is
 * full for its readers and then empty for its writer, so copies run up to two tiles ahead, across
 * the end of an item. Scores of the next tile are started before the values of this one, so a
 * softmax has products beside it, its own group's and the other's.
 *
 * The copy engine is busy with small boxes: pages are as good as random in the pool, and a page of
 * 16 tokens is 4 KiB of K. So a page is one box whatever head_dim is, and each lane asks for one:
 * when a warp asked for them in turn, for K and V, that was what limited the kernel (SPEED.md).
 *
 * The maximum that weights are relative to lags behind the true one by up to LAG powers of two
 * (weights and their sum grow by 2^LAG at most, which float32 and bf16 hold without loss), so that
 * output is rarely rescaled.
 *
 * Pages that no row of an item sees, and pages whose id is wrong (reported, never followed), are
 * asked for beyond the tensor's end: zeros. What a page holds behind the sequence's end may be NaN:
 * scores there are masked, values are overwritten with zeros once they have landed.
 */
#include "kernels/cuda/attn_prefill.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/attn_wgmma.cuh"

template <int HD_> struct tma_shape {
    static constexpr int HD = HD_, EB = 2, MT = 1, KEYS = 128, LAG = 8;
    static constexpr int WARPS = 8, THREADS = 128 + 32 * WARPS, ROWS = 16 * WARPS;
    /* Registers a thread of those that fetch, and of those that compute: 64 Ki in all. */
    static constexpr int FEW = 56, MANY = 224;
    /* Query rows lie in panels of 64 dims, one after the other. */
    template <int N> __device__ static inline int at(int row, int piece)
    {
        return piece / 8 * N * 128 + row * 128 + ((piece ^ row) & 7) * 16;
    }
    /* K and V as boxes land: 8 rows of the first panel, the same 8 of the second, the next 8. */
    static constexpr int PANELS = HD / 64, PANEL = 1024, EIGHT = PANELS * PANEL;
};

#define SLOTS 2
#define QUERY_THREADS 64

struct tma_sync {
    uint64_t k_full[SLOTS], k_empty[SLOTS], v_full[SLOTS], v_empty[SLOTS];
    uint64_t q_full[SLOTS], q_empty[SLOTS], item_full[SLOTS];
    uint64_t landed;            /* V with an end to be cleared */
    struct prefill_item item[SLOTS];    /* seq < 0: no more */
};

template <class S> struct tma_smem {
    static constexpr int QUERY = S::ROWS * S::HD * 2, TILE = S::KEYS * S::HD * 2;
    static constexpr int K = SLOTS * QUERY, V = K + SLOTS * TILE, SYNC = V + SLOTS * TILE;
    static constexpr int BYTES = SYNC + (int)sizeof(struct tma_sync);
};

#if defined(KN_EMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <class S> __device__ static inline struct tma_sync *make_barriers(unsigned char *at)
{
    struct tma_sync *y = (struct tma_sync *)at;
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; i++) {
            mbar_init(&y->k_full[i], 1), mbar_init(&y->k_empty[i], S::WARPS);
            mbar_init(&y->v_full[i], 1), mbar_init(&y->v_empty[i], S::WARPS);
            mbar_init(&y->q_full[i], QUERY_THREADS), mbar_init(&y->q_empty[i], S::WARPS + 2);
            mbar_init(&y->item_full[i], 1);
        }
        mbar_init(&y->landed, 1);
        mbar_made();
    }
    __syncthreads();
    return y;
}

/* One arrival a warp; what it has read, it reads no more. */
__device__ static inline void warp_leaves(uint64_t *bar)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        mbar_arrive(bar);
}

/* ---- warps 2 and 3: items and query rows -------------------------------------------------- */

/* The next item that makes sense, or seq = -1. All lanes of a warp. */
template <class S>
__device__ static inline void take_item(const struct attn_launch *p, unsigned *counter, int *index,
                                        struct prefill_item *it)
{
    bool good = false;
    do {
        if (!find_item(&p->a, S::ROWS, *index, it)) {
            it->seq = -1;
            return;
        }
        good = item_fits(p, it);
        unsigned taken = 0;
        if (threadIdx.x % 32 == 0)
            taken = atomicAdd(counter, 1u);
        *index = (int)(gridDim.x + __shfl_sync(FULL_MASK, taken, 0));
    } while (!good);
}

/* One piece of every STEP-th row of the item, by thread t. */
template <class S>
__device__ static inline void copy_query(const struct kn_attention *a,
                                         const struct prefill_item *it, unsigned char *q, int t)
{
    constexpr int P = S::HD / 8, STEP = QUERY_THREADS / P;
    const int group = a->q_heads / a->kv_heads, piece = t % P;
    int row = it->row0 + t / P, tok = row / group, head = row % group;
    for (int r = t / P; r < S::ROWS; r += STEP, row += STEP) {
        const bool valid = row < it->n_rows;
        const int64_t at = it->tok0 + (valid ? tok : 0);
        const uint16_t *src = (const uint16_t *)a->qkv + at * a->ld +
                              (it->kv_head * group + head) * S::HD + piece * 8;
        cp_async16(q + S::template at<S::ROWS>(r, piece), src, valid);
        tok += STEP / group, head += STEP % group;
        if (head >= group)
            head -= group, tok++;
    }
}

/* Whoever is the last block to find nothing puts the counters back to zero. */
__device__ static inline void leave_counter(unsigned *counter)
{
    if (atomicInc(counter + 1, gridDim.x - 1) == gridDim.x - 1)
        atomicExch(counter, 0u);
}

template <class S>
__device__ static inline void fetch_queries(const struct attn_launch *p, unsigned *counter,
                                            struct tma_sync *y, unsigned char *smem)
{
    const int t = (int)threadIdx.x - 64;
    int index = (int)blockIdx.x;
    for (int n = 0;; n++) {
        const int slot = n & 1, turn = n >> 1 & 1;
        struct prefill_item it;
        if (t < 32) {
            take_item<S>(p, counter, &index, &it);
            mbar_wait(&y->q_empty[slot], turn ^ 1);
            if (t == 0) {
                y->item[slot] = it;
                mbar_arrive(&y->item_full[slot]);
            }
        }
        mbar_wait(&y->item_full[slot], turn);
        it = y->item[slot];
        if (it.seq >= 0)
            copy_query<S>(&p->a, &it, smem + slot * tma_smem<S>::QUERY, t);
        cp_async_commit();
        cp_async_wait<0>();
        wgmma_writes_done();
        mbar_arrive(&y->q_full[slot]);
        if (it.seq < 0)
            break;
    }
    if (t == 0)
        leave_counter(counter);
}

/* ---- warps 0 and 1: K and V --------------------------------------------------------------- */

/* Lane i: where the tensor has page i of the tile from pos0 on. */
template <class S>
__device__ static inline int page_of(const struct attn_launch *p, const struct prefill_item *it,
                                     const struct prefill_keys *r, int pos0, int box)
{
    const struct kn_attention *a = &p->a;
    const int lane = (int)threadIdx.x % 32, pos = pos0 + lane * box;
    const int nowhere = a->pool.n_layers * a->pool.num_blocks;
    if (lane * box >= S::KEYS || pos >= r->end || pos + box <= r->lo)
        return nowhere;
    const int id = a->block_table[it->seq * a->table_ld + (pos >> p->bt_shift)];
    if ((unsigned)id < (unsigned)a->pool.num_blocks)
        return a->layer * a->pool.num_blocks + id;
    cuda_report(p->fault, CUDA_FAULT_BLOCK);
    return nowhere;
}

/* K or V of a tile, from row `row` of each page on: a page for each lane. */
template <class S>
__device__ static inline void fetch_tile(const struct cuda_tensor_map *map, unsigned char *tile,
                                         uint64_t *full, int page, int box, int row)
{
    const int lane = (int)threadIdx.x % 32;
    if (lane == 0)
        mbar_expect(full, tma_smem<S>::TILE);
    __syncwarp();
    if (lane * box < S::KEYS)
        tma_load(tile + lane * box * S::HD * 2, map, full, row / 8, page);
}

/* Zeros in rows [from, to) of a tile that has landed. */
template <class S>
__device__ static inline void clear_rows(unsigned char *tile, int from, int to)
{
    for (int i = from * 8 + (int)threadIdx.x % 32; i < to * 8; i += 32)
#pragma unroll
        for (int x = 0; x < S::PANELS; x++)
            *(uint4 *)(tile + i / 64 * S::EIGHT + x * S::PANEL + i % 64 * 16) =
                make_uint4(0, 0, 0, 0);
    wgmma_writes_done();
}

template <class S, bool VALUES>
__device__ static inline void fetch_keys(const struct attn_launch *p,
                                         const struct cuda_tensor_map *map, struct tma_sync *y,
                                         unsigned char *smem)
{
    typedef struct tma_smem<S> M;
    const struct kn_attention *a = &p->a;
    const int bt = a->block_tokens, box = min(bt, S::KEYS);
    uint64_t *full = VALUES ? y->v_full : y->k_full, *empty = VALUES ? y->v_empty : y->k_empty;
    int clears = 0;
    for (int n = 0, t = 0;; n++) {
        mbar_wait(&y->item_full[n & 1], n >> 1 & 1);
        const struct prefill_item it = y->item[n & 1];
        if (it.seq < 0)
            break;
        const struct prefill_keys r = keys_of<S>(a, &it);
        const int len = it.pos0 + it.n_rows / (a->q_heads / a->kv_heads);
        const int first = (it.kv_head * 2 + VALUES) * bt;
        for (int i = 0; i < r.n; i++, t++) {
            const int pos0 = r.start + i * S::KEYS, slot = t & 1, turn = t >> 1 & 1;
            const int page = page_of<S>(p, &it, &r, pos0, box), row = first + (pos0 & (bt - 1));
            unsigned char *tile = smem + (VALUES ? M::V : M::K) + slot * M::TILE;
            mbar_wait(&empty[slot], turn ^ 1);
            if (!VALUES || len >= pos0 + S::KEYS || (len & (box - 1)) == 0) {
                fetch_tile<S>(map, tile, &full[slot], page, box, row);
                continue;
            }
            fetch_tile<S>(map, tile, &y->landed, page, box, row);
            mbar_wait(&y->landed, clears++ & 1);
            clear_rows<S>(tile, len - pos0, (len - pos0 + box - 1) & -box);
            warp_leaves(&full[slot]);
        }
        warp_leaves(&y->q_empty[n & 1]);
    }
}

/* ---- warps 4 to 11: attention -------------------------------------------------------------- */

/* As soften(), but the maximum moves only when it is behind by more than LAG. */
template <class S>
__device__ static inline void soften_lazily(struct prefill_acc<S> *acc, float s[][S::KEYS / 8][4],
                                            float scale, float keep[][2])
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float m = -INFINITY, sum = 0;
#pragma unroll
        for (int n = 0; n < S::KEYS / 8; n++)
            m = fmaxf(m, fmaxf(s[0][n][2 * r], s[0][n][2 * r + 1]));
        m = quad_max(m) * scale;
        keep[0][r] = 1;
        if (m > acc->m[0][r] + S::LAG) {
            keep[0][r] = exp2_fast(acc->m[0][r] - m);
            acc->m[0][r] = m;
        }
        const float sub = acc->m[0][r] == -INFINITY ? 0 : acc->m[0][r];
#pragma unroll
        for (int n = 0; n < S::KEYS / 8; n++)
#pragma unroll
            for (int e = 2 * r; e < 2 * r + 2; e++) {
                s[0][n][e] = exp2_fast(fmaf(s[0][n][e], scale, -sub));
                sum += s[0][n][e];
            }
        acc->l[0][r] = acc->l[0][r] * keep[0][r] + sum;
    }
}

template <class S>
__device__ static inline void soften_tile(const struct attn_launch *p, const struct prefill_keys *r,
                                          struct prefill_acc<S> *acc, float s[][S::KEYS / 8][4],
                                          float keep[][2], int pos0)
{
    if (needs_mask<S>(r, pos0))
        mask<S>(acc, s, pos0, (int)threadIdx.x % 32);
    soften_lazily<S>(acc, s, p->scale_log2, keep);
}

template <class S>
__device__ static inline void rescale_lazily(struct prefill_acc<S> *acc, const float keep[][2])
{
    if (__any_sync(FULL_MASK, keep[0][0] != 1 || keep[0][1] != 1))
        rescale<S>(acc, keep);
}

/* The slots, by the number of the tile since the start. */
template <class S> struct tile_ring {
    struct tma_sync *y;
    unsigned char *smem;
    __device__ inline const unsigned char *k(int t) const
    {
        mbar_wait(&y->k_full[t & 1], t >> 1 & 1);
        return smem + tma_smem<S>::K + (t & 1) * tma_smem<S>::TILE;
    }
    __device__ inline const unsigned char *v(int t) const
    {
        mbar_wait(&y->v_full[t & 1], t >> 1 & 1);
        return smem + tma_smem<S>::V + (t & 1) * tma_smem<S>::TILE;
    }
    __device__ inline void k_done(int t) const { warp_leaves(&y->k_empty[t & 1]); }
    __device__ inline void v_done(int t) const { warp_leaves(&y->v_empty[t & 1]); }
};

/* All tiles of an item, scores a tile ahead of values. The compiler moves a wait for products up to
 * the start of its basic block, ahead of the softmax that is to run beside them: what waits for the
 * next tile's K, a loop, keeps them apart. */
template <class S>
__device__ static inline void attend(const struct attn_launch *p, const struct prefill_keys *r,
                                     struct prefill_acc<S> *acc, const unsigned char *q,
                                     const struct tile_ring<S> *ring, int t)
{
    float s[1][S::KEYS / 8][4], keep[1][2];
    uint32_t w[S::KEYS / 16][4];
    const unsigned char *k = ring->k(t);
    start_scores<S>(s[0], q, k);
    wgmma_wait<0>();
    ring->k_done(t);
    soften_tile<S>(p, r, acc, s, keep, r->start);
    pack<S::KEYS / 8>(w, s[0]);
    if (r->n > 1)
        k = ring->k(t + 1);
    for (int i = 1; i < r->n; i++, t++) {
        start_scores<S>(s[0], q, k);
        start_values<S>(acc->o[0], w, ring->v(t));
        wgmma_wait<1>();
        ring->k_done(t + 1);
        soften_tile<S>(p, r, acc, s, keep, r->start + i * S::KEYS);
        wgmma_hold(s[0]);
        if (i + 1 < r->n)
            k = ring->k(t + 2);
        wgmma_wait<0>();
        ring->v_done(t);
        rescale_lazily<S>(acc, keep);
        pack<S::KEYS / 8>(w, s[0]);
    }
    start_values<S>(acc->o[0], w, ring->v(t));
    wgmma_wait<0>();
    ring->v_done(t);
}

/* Lane i of four has words x[0..3]; afterwards those that were x[i] of lanes 0 to 3. */
__device__ static inline void quad_transpose(uint32_t x[4], int lane)
{
#pragma unroll
    for (int b = 1; b <= 2; b *= 2)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (!(j & b)) {
                const bool high = lane & b;
                const uint32_t got = __shfl_xor_sync(FULL_MASK, high ? x[j] : x[j | b], b);
                x[j] = high ? got : x[j];
                x[j | b] = high ? x[j | b] : got;
            }
}

/* As write_rows(), 16 bytes a store: o's column blocks d .. d + 3, one for each lane of four. */
template <class S>
__device__ static inline void write_pieces(const struct kn_attention *a,
                                           const struct prefill_item *it,
                                           const struct prefill_acc<S> *acc, int warp, int lane)
{
    const int group = a->q_heads / a->kv_heads;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = it->row0 + warp * 16 + r * 8 + lane / 4;
        const float inv = 1.0f / quad_sum(acc->l[0][r]);
        const int64_t tok = it->tok0 + row / group;
        const int head = it->kv_head * group + row % group;
        uint16_t *out = (uint16_t *)a->out + (tok * a->q_heads + head) * S::HD + lane % 4 * 8;
#pragma unroll
        for (int d = 0; d < S::HD / 8; d += 4) {
            uint32_t x[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                x[j] = bf16_pack(acc->o[0][d + j][2 * r] * inv, acc->o[0][d + j][2 * r + 1] * inv);
            quad_transpose(x, lane);
            if (row < it->n_rows)
                *(uint4 *)(out + d * 8) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
}

template <class S>
__device__ static inline void attend_items(const struct attn_launch *p, struct tma_sync *y,
                                           unsigned char *smem)
{
    const int warp = (int)threadIdx.x / 32 - 4, lane = (int)threadIdx.x % 32;
    const struct tile_ring<S> ring = { y, smem };
    for (int n = 0, t = 0;; n++) {
        const int slot = n & 1;
        mbar_wait(&y->q_full[slot], n >> 1 & 1);
        const struct prefill_item it = y->item[slot];
        if (it.seq < 0)
            break;
        const struct prefill_keys r = keys_of<S>(&p->a, &it);
        const unsigned char *q = smem + slot * tma_smem<S>::QUERY + warp / 4 * 64 * 128;
        struct prefill_acc<S> acc;
        start_rows<S>(&p->a, &it, &acc, warp, lane);
        attend<S>(p, &r, &acc, q, &ring, t);
        t += r.n;
        warp_leaves(&y->q_empty[slot]);
        write_pieces<S>(&p->a, &it, &acc, warp, lane);
    }
}
#endif

template <class S>
__global__ static void __launch_bounds__(S::THREADS, 1) tma_kernel(
    const __grid_constant__ struct attn_launch p,
    const __grid_constant__ struct cuda_tensor_map map, unsigned *counter)
{
#if defined(KN_EMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    DYNAMIC_SMEM(raw);
    unsigned char *smem = raw + (-(int)smem_addr(raw) & 1023);
    cuda_allow_next();
    struct tma_sync *y = make_barriers<S>(smem + tma_smem<S>::SYNC);
    cuda_wait_prior();
    const int warp = (int)threadIdx.x / 32;
    if (warp < 4) {
        registers_less<S::FEW>();
        if (warp == 0)
            fetch_keys<S, false>(&p, &map, y, smem);
        else if (warp == 1)
            fetch_keys<S, true>(&p, &map, y, smem);
        else
            fetch_queries<S>(&p, counter, y, smem);
    } else {
        registers_more<S::MANY>();
        attend_items<S>(&p, y, smem);
    }
#else
    __trap();                   /* a build without sm_90a: a failed device, no wrong tokens */
#endif
}

template <class S> static constexpr int smem_bytes(void)
{
    return tma_smem<S>::BYTES + 1024;       /* to align by hand */
}

template <class S> static lm_status launch(struct cuda_stream *st, const struct attn_launch *p)
{
    const struct kn_attention *a = &p->a;
    const int64_t rows = (int64_t)a->kv_heads * 2 * a->block_tokens;
    const struct cuda_tensor pool = {
        .base = a->pool.base,
        .size = { 64, 8, S::PANELS, rows / 8, (int64_t)a->pool.n_layers * a->pool.num_blocks },
        .stride = { 2, S::HD * 2, 128, S::HD * 16, a->pool.block_bytes },
        .box = { 64, 8, S::PANELS, LM_MIN(a->block_tokens, S::KEYS) / 8, 1 },
    };
    struct cuda_tensor_map map;
    if (!cuda_tensor_map_make(st->dev, &map, &pool))
        return LM_UNSUPPORTED;
    dim3 grid = prefill_grid<S>(st, p);
    grid.x = LM_MIN(grid.x, (unsigned)st->dev->sms);
    unsigned *counter = (unsigned *)((char *)st->scratch + CUDA_COUNTER_BYTES) - 2;
    return cuda_launch(st, "attention (tma)", tma_kernel<S>, grid, dim3(S::THREADS),
                       smem_bytes<S>(), *p, map, counter);
}

bool cuda_attn_tma_fits(const struct cuda_stream *st, const struct attn_launch *p)
{
    const struct kn_attention *a = &p->a;
    return st->dev->cc == 90 && (a->head_dim == 128 || a->head_dim == 64) &&
           a->pool.kv == KN_KV_NATIVE && a->block_tokens >= 8 && (uintptr_t)a->out % 16 == 0 &&
           (uintptr_t)a->pool.base % 16 == 0 &&
           (int64_t)a->pool.n_layers * a->pool.num_blocks < INT32_MAX &&
           (int64_t)a->kv_heads * 2 * a->block_tokens < INT32_MAX;
}

template <class S> static cudaError_t allow(void)
{
    return cudaFuncSetAttribute(tma_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                smem_bytes<S>());
}

cudaError_t cuda_attn_tma_init(void)
{
    cudaError_t e = allow<struct tma_shape<128>>();
    return e == cudaSuccess ? allow<struct tma_shape<64>>() : e;
}

lm_status cuda_attn_tma(struct cuda_stream *st, const struct attn_launch *p)
{
    return p->a.head_dim == 128 ? launch<struct tma_shape<128>>(st, p)
                                : launch<struct tma_shape<64>>(st, p);
}
