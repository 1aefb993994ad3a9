/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attn_decode.cu - paged attention for sequences with one query token (flash decoding).
 *
 * Bound by reading K and V once. A block of four warps takes one sequence, one kv head (up to 16 of
 * its query heads, which are the 16 rows of a tensor-core tile: grouped heads share every load) and
 * one split of the keys. Its warps take tiles of 16 keys in turn and never wait for each other:
 * each has its own ring of STAGES tiles in shared memory, filled by cp.async two tiles ahead of the
 * one at work, and its own running maximum, sum and output. At the end the four are merged in
 * shared memory; with several splits the block that arrives last merges those, always in the same
 * order.
 *
 * Where there are sequences enough (attn_launch.pack), short ones are a warp's each, four heads to
 * a block: 100 keys are a tile or two for each of four warps, whose start, merging and end then
 * cost more than the reading, and meanwhile nothing is read. A warp alone keeps its ring full, and
 * eight of them on an SM are never all at their ends at once.
 *
 * Why tensor cores at a single row: not for their flops but because scores need no horizontal sums
 * and bf16 no conversion; 15 of 16 rows idle cost nothing beside memory.
 *
 * E4M3 (EB 1): there is no ldmatrix for bytes, but which 16 dims of K a product takes together, and
 * which output column is which dim of V, is ours to choose. A lane takes four neighbouring dims of
 * a key in one word (and the query's to match), and of V four neighbouring dims of each of its four
 * keys, whose bytes are regrouped by dim as they are widened. Tiles are half as large, so the ring
 * has twice as many.
 */
#include "kernels/cuda/attn.cuh"

#define WARPS 4
#define TILE 16                 /* keys */

template <int HD, int EB> struct decode_shape {
    static constexpr int STAGES = (HD > 128 ? 2 : 3) * (2 / EB);
    static constexpr int TILE_BYTES = TILE * HD * EB;
    static constexpr int RING = STAGES * 2 * TILE_BYTES;        /* K and V, a warp */
    static constexpr int OUT = TILE * HD * 4;                   /* a warp's output, over its ring */
    static constexpr int SMEM = WARPS * (RING > OUT ? RING : OUT);
};

/* What a warp knows of its share. */
template <int HD, int EB> struct decode_warp {
    const struct attn_launch *p;
    const int32_t *table;
    const char *base;           /* pool block 0 of the layer, this head's K */
    unsigned char *ring;
    int lane, lo, len;          /* keys lo .. len-1 are visible */
    int pos0, n_tiles, step;    /* tile i starts at pos0 + i * step */
    int id;                     /* lane k < 16: block of key k of the next tile to load */
};

template <int HD, int EB>
__device__ static inline void fetch_ids(struct decode_warp<HD, EB> *w, int i)
{
    int pos = w->pos0 + i * w->step + (w->lane & 15);
    w->id = i < w->n_tiles && pos >= w->lo && pos < w->len ? block_of(w->p, w->table, pos) : 0;
}

/* Starts the copies of tile i, as one group; beyond the last an empty group keeps the count. */
template <int HD, int EB>
__device__ static inline void load_tile(struct decode_warp<HD, EB> *w, int i)
{
    constexpr int P = HD * EB / 16, N = TILE * P;
    typedef struct decode_shape<HD, EB> S;
    const struct kn_attention *a = &w->p->a;
    if (i < w->n_tiles) {
        unsigned char *k = w->ring + i % S::STAGES * 2 * S::TILE_BYTES;
        const int pos0 = w->pos0 + i * w->step;
#pragma unroll
        for (int j = 0; j < (N + 31) / 32; j++) {
            int at = j * 32 + w->lane, key = at / P, piece = at % P, pos = pos0 + key;
            int64_t id = __shfl_sync(FULL_MASK, w->id, key);
            if (N % 32 && at >= N)
                break;
            const char *src = w->base + id * a->pool.block_bytes +
                              (pos & (a->block_tokens - 1)) * (HD * EB) + piece * 16;
            bool valid = pos >= w->lo && pos < w->len;
            int dst = tile_at<HD, EB>(key, piece);
            cp_async16(k + dst, src, valid);
            cp_async16(k + S::TILE_BYTES + dst, src + (int64_t)a->block_tokens * (HD * EB), valid);
        }
        fetch_ids(w, i + 1);
    }
    cp_async_commit();
}

/* Running softmax of two rows (g and g + 8) of a warp's tile. */
template <int HD> struct decode_acc {
    float o[HD / 8][4];
    float m[2], l[2];           /* l: this lane's columns only, summed over the quad at the end */
};

/* The tile's keys as B operands, 16 dims: b[0] b[1] keys 0-7, b[2] b[3] keys 8-15. Rows 2t 2t+1 and
 * 2t+8 2t+9 of a product are those dims in bf16, and 4t .. 4t+3 in E4M3. */
template <int HD, int EB>
__device__ static inline void key_fragments(uint32_t b[4], const unsigned char *k, int ks, int lane)
{
    if constexpr (EB == 2) {
        const int row = (lane >> 4) * 8 + (lane & 7);
        ldmatrix(b, k + tile_at<HD>(row, 2 * ks + (lane >> 3 & 1)));
    } else {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const unsigned char *at = k + tile_at<HD, 1>(n * 8 + lane / 4, ks) + lane % 4 * 4;
            const uint32_t u = *(const uint32_t *)at;
            b[2 * n] = e4m3_pair(u, u, 0, 1);
            b[2 * n + 1] = e4m3_pair(u, u, 2, 3);
        }
    }
}

/* s [16 rows, 16 keys] = q K^T, scaled to powers of two, masked to [lo, len). */
template <int HD, int EB>
__device__ static inline void tile_scores(const struct decode_warp<HD, EB> *w, float s[2][4],
                                          const uint32_t q[HD / 16][4], const unsigned char *k,
                                          int pos0)
{
    const int lane = w->lane;
#pragma unroll
    for (int n = 0; n < 2; n++)
        s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
    for (int ks = 0; ks < HD / 16; ks++) {
        uint32_t b[4];
        key_fragments<HD, EB>(b, k, ks, lane);
        mma_bf16(s[0], q[ks], b);
        mma_bf16(s[1], q[ks], b + 2);
    }
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int pos = pos0 + n * 8 + (lane & 3) * 2 + (e & 1);
            s[n][e] = pos >= w->lo && pos < w->len ? s[n][e] * w->p->scale_log2 : -INFINITY;
        }
}

/* Scores become weights; what was summed so far is rescaled to the new maximum. */
template <int HD>
__device__ static inline void soften(struct decode_acc<HD> *acc, float s[2][4], uint32_t p[4])
{
    float keep[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float m = fmaxf(fmaxf(s[0][2 * r], s[0][2 * r + 1]), fmaxf(s[1][2 * r], s[1][2 * r + 1]));
        m = fmaxf(acc->m[r], quad_max(m));
        keep[r] = exp2_fast(acc->m[r] - m);
        acc->m[r] = m;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            s[n][2 * r] = exp2_fast(s[n][2 * r] - m);
            s[n][2 * r + 1] = exp2_fast(s[n][2 * r + 1] - m);
            sum += s[n][2 * r] + s[n][2 * r + 1];
        }
        acc->l[r] = acc->l[r] * keep[r] + sum;
    }
    if (__any_sync(FULL_MASK, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
        for (int d = 0; d < HD / 8; d++) {
            acc->o[d][0] *= keep[0], acc->o[d][1] *= keep[0];
            acc->o[d][2] *= keep[1], acc->o[d][3] *= keep[1];
        }
    }
    p[0] = bf16_pack(s[0][0], s[0][1]);
    p[1] = bf16_pack(s[0][2], s[0][3]);
    p[2] = bf16_pack(s[1][0], s[1][1]);
    p[3] = bf16_pack(s[1][2], s[1][3]);
}

template <int HD>
__device__ static inline void add_values(struct decode_acc<HD> *acc, const uint32_t p[4],
                                         const unsigned char *v, int lane)
{
    const int row = (lane >> 3 & 1) * 8 + (lane & 7);
#pragma unroll
    for (int d = 0; d < HD / 16; d++) {
        uint32_t b[4];
        ldmatrix_trans(b, v + tile_at<HD>(row, 2 * d + (lane >> 4)));
        mma_bf16(acc->o[2 * d], p, b);
        mma_bf16(acc->o[2 * d + 1], p, b + 2);
    }
}

/* Dims of V that a lane takes of a key at once, and products of 8 columns that they serve: column c
 * of product n = W j + i is dim 8 W j + W c + i. */
template <int HD> struct value_width {
    static constexpr int W = HD % 32 == 0 ? 4 : 2;
};

template <int HD>
__device__ static inline void add_values_e4m3(struct decode_acc<HD> *acc, const uint32_t p[4],
                                              const unsigned char *v, int lane)
{
    constexpr int W = value_width<HD>::W;
#pragma unroll
    for (int j = 0; j < HD / 8 / W; j++) {
        const int d = (8 * j + lane / 4) * W;
        uint32_t u[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int key = lane % 4 * 2 + (i & 1) + (i >> 1) * 8;
            const unsigned char *at = v + tile_at<HD, 1>(key, d / 16) + d % 16;
            u[i] = W == 4 ? *(const uint32_t *)at : *(const uint16_t *)at;
        }
#pragma unroll
        for (int i = 0; i < W; i++) {
            const uint32_t b[2] = { e4m3_pair(u[0], u[1], i, 4 + i),
                                    e4m3_pair(u[2], u[3], i, 4 + i) };
            mma_bf16(acc->o[W * j + i], p, b);
        }
    }
}

template <int HD, int EB>
__device__ static inline void run_tiles(struct decode_warp<HD, EB> *w, struct decode_acc<HD> *acc,
                                        const uint32_t q[HD / 16][4])
{
    typedef struct decode_shape<HD, EB> S;
    for (int i = 0; i < w->n_tiles; i++) {
        const unsigned char *k = w->ring + i % S::STAGES * 2 * S::TILE_BYTES;
        float s[2][4];
        uint32_t p[4];
        cp_async_wait<S::STAGES - 1>();
        __syncwarp();
        tile_scores<HD, EB>(w, s, q, k, w->pos0 + i * w->step);
        soften<HD>(acc, s, p);
        if (EB == 2)
            add_values<HD>(acc, p, k + S::TILE_BYTES, w->lane);
        else
            add_values_e4m3<HD>(acc, p, k + S::TILE_BYTES, w->lane);
        __syncwarp();
        load_tile(w, i + S::STAGES);
    }
    cp_async_wait<0>();
}

/* Rows 0 .. n-1 of the group's heads as the A operand, its dims in the order of key_fragments();
 * the rest are zero. */
template <int HD, int EB>
__device__ static inline void load_query(uint32_t q[HD / 16][4], const uint16_t *head0, int n,
                                         int lane)
{
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int ks = 0; ks < HD / 16; ks++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = g + (i & 1) * 8;
            int d = ks * 16 + (EB == 2 ? (i >> 1) * 8 + t * 2 : t * 4 + (i >> 1) * 2);
            q[ks][i] = row < n ? *(const uint32_t *)(head0 + row * HD + d) : 0;
        }
}

/* One row's place among partial results. */
struct decode_item {
    int item, rows, rows_cap, splits, split;
    uint16_t *out;              /* row r's output starts at out + r * head_dim */
};

/* The warps' results, left in shared memory, become the block's: the output itself, or a partial
 * one. Fixed order: warp 0 to 3. */
template <int HD>
__device__ static inline void merge_warps(const struct attn_launch *p, const struct decode_item *it,
                                          const float *o, const float (*ml)[TILE][2])
{
    const int64_t part = ((int64_t)it->item * p->cap_splits + it->split) * it->rows_cap;
    for (int i = (int)threadIdx.x; i < it->rows * HD / 2; i += WARPS * 32) {
        int row = i / (HD / 2), d = i % (HD / 2) * 2;
        float m = -INFINITY, l = 0, x = 0, y = 0;
        for (int w = 0; w < WARPS; w++)
            m = fmaxf(m, ml[w][row][0]);
        for (int w = 0; w < WARPS; w++) {
            float f = exp2_fast(ml[w][row][0] - m);
            l += f * ml[w][row][1];
            x += f * o[(w * TILE + row) * HD + d];
            y += f * o[(w * TILE + row) * HD + d + 1];
        }
        if (it->splits == 1) {
            *(uint32_t *)(it->out + row * HD + d) = bf16_pack(x / l, y / l);
        } else {
            float *dst = p->part + (part + row) * HD + d;
            dst[0] = x, dst[1] = y;
            if (d == 0)
                p->part_ml[part + row] = make_float2(m, l);
        }
    }
}

template <int HD>
__device__ static inline void merge_splits(const struct attn_launch *p,
                                           const struct decode_item *it)
{
    const int64_t stride = it->rows_cap, part = (int64_t)it->item * p->cap_splits * stride;
    const float *ml = (const float *)p->part_ml;
    for (int i = (int)threadIdx.x; i < it->rows * HD / 2; i += WARPS * 32) {
        int row = i / (HD / 2), d = i % (HD / 2) * 2;
        float m = -INFINITY, l = 0, x = 0, y = 0;
#pragma unroll 8
        for (int s = 0; s < it->splits; s++)
            m = fmaxf(m, load_l2(ml + (part + s * stride + row) * 2));
#pragma unroll 8
        for (int s = 0; s < it->splits; s++) {
            const int64_t at = part + s * stride + row;
            float f = exp2_fast(load_l2(ml + at * 2) - m);
            l += f * load_l2(ml + at * 2 + 1);
            x += f * load_l2(p->part + at * HD + d);
            y += f * load_l2(p->part + at * HD + d + 1);
        }
        *(uint32_t *)(it->out + row * HD + d) = bf16_pack(x / l, y / l);
    }
}

/* Leaves the warp's output and sums where merge_warps() finds them. */
template <int HD, int EB>
__device__ static inline void leave_result(struct decode_acc<HD> *acc, float *o, float (*ml)[2],
                                           int rows, int lane)
{
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float l = quad_sum(acc->l[r]);
        int row = g + r * 8;
        if (t == 0)
            ml[row][0] = acc->m[r], ml[row][1] = l;
        if (row >= rows)
            continue;
        constexpr int W = EB == 2 ? 1 : value_width<HD>::W;
#pragma unroll
        for (int d = 0; d < HD / 8; d++) {
            float *at = o + row * HD + d / W * W * 8 + d % W;
            if (EB == 2)
                *(float2 *)(at + t * 2) = make_float2(acc->o[d][2 * r], acc->o[d][2 * r + 1]);
            else
                at[t * 2 * W] = acc->o[d][2 * r], at[(t * 2 + 1) * W] = acc->o[d][2 * r + 1];
        }
    }
}

/* A row that was this warp's alone: its output. */
template <int HD>
__device__ static inline void write_alone(const struct decode_item *it, const float *o,
                                          const float (*ml)[2], int lane)
{
    for (int i = lane; i < it->rows * HD / 2; i += 32) {
        int row = i / (HD / 2), d = i % (HD / 2) * 2;
        float l = ml[row][1];
        *(uint32_t *)(it->out + row * HD + d) =
            bf16_pack(o[row * HD + d] / l, o[row * HD + d + 1] / l);
    }
}

template <int HD, int EB>
__global__ static void __launch_bounds__(WARPS * 32) decode_kernel(
    const __grid_constant__ struct attn_launch p)
{
    typedef struct decode_shape<HD, EB> S;
    DYNAMIC_SMEM(smem);
    __shared__ float ml[WARPS][TILE][2];
    __shared__ int last;
    const struct kn_attention *a = &p.a;
    const int seq = (int)blockIdx.z, warp = (int)threadIdx.x / 32;
    const int group = a->q_heads / a->kv_heads;
    const int tok = a->q_start[seq], len = a->kv_len[seq];
    cuda_allow_next();
    struct decode_warp<HD, EB> w;
    w.lo = first_visible(a, len - 1);
    const int start = w.lo & ~(TILE - 1), tiles = (len - start + TILE - 1) / TILE;
    struct decode_item it;
    it.splits = decode_splits(tiles, p.want_splits, p.cap_splits);
    it.split = (int)blockIdx.x;
    const bool fits = (len - 1) >> p.bt_shift < a->table_ld;
    if (!fits)
        cuda_report(p.fault, CUDA_FAULT_BLOCK);
    const bool alone = p.pack && tiles <= DECODE_MIN_TILES;
    const int unit = (int)blockIdx.y * (alone ? WARPS : 1) + (alone ? warp : 0);
    const int kv_head = unit / p.row_tiles, row0 = unit % p.row_tiles * TILE;
    if (a->q_start[seq + 1] - tok != 1 || len < 1 || !fits || it.split >= it.splits ||
        kv_head >= a->kv_heads) {
        cuda_wait_prior();      /* the next kernel counts on the one before us being done */
        return;
    }
    const int per = (tiles + it.splits - 1) / it.splits, tile0 = it.split * per;
    w.p = &p;
    w.lane = (int)threadIdx.x % 32;
    w.len = len;
    w.table = a->block_table + seq * a->table_ld;
    w.base = cuda_pool_block(&a->pool, a->layer, 0) + kv_head_at<EB>(a, kv_head);
    w.ring = smem + warp * S::RING;
    w.step = alone ? TILE : WARPS * TILE;
    w.pos0 = start + (tile0 + (alone ? 0 : warp)) * TILE;
    w.n_tiles = alone ? tiles : max(0, (min(per, tiles - tile0) - warp + WARPS - 1) / WARPS);
    fetch_ids(&w, 0);
    cuda_wait_prior();
    for (int i = 0; i < S::STAGES; i++)
        load_tile(&w, i);

    it.rows = min(TILE, group - row0);
    it.rows_cap = min(TILE, group);
    it.item = seq * a->kv_heads * p.row_tiles + unit;
    const int head = kv_head * group + row0;
    it.out = (uint16_t *)a->out + ((int64_t)tok * a->q_heads + head) * HD;
    uint32_t q[HD / 16][4];
    load_query<HD, EB>(q, (const uint16_t *)a->qkv + tok * a->ld + head * HD, it.rows, w.lane);
    struct decode_acc<HD> acc;
#pragma unroll
    for (int d = 0; d < HD / 8; d++)
        acc.o[d][0] = acc.o[d][1] = acc.o[d][2] = acc.o[d][3] = 0;
    acc.m[0] = acc.m[1] = -INFINITY;
    acc.l[0] = acc.l[1] = 0;
    run_tiles<HD, EB>(&w, &acc, q);

    if (alone) {
        __syncwarp();
        leave_result<HD, EB>(&acc, (float *)w.ring, ml[warp], it.rows, w.lane);
        __syncwarp();
        write_alone<HD>(&it, (const float *)w.ring, ml[warp], w.lane);
        return;
    }
    __syncthreads();            /* every ring is free: outputs go over them */
    float *o = (float *)smem;
    leave_result<HD, EB>(&acc, o + warp * TILE * HD, ml[warp], it.rows, w.lane);
    __syncthreads();
    merge_warps<HD>(&p, &it, o, ml);
    if (it.splits == 1)
        return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        last = atomicInc(p.arrived + it.item, (unsigned)it.splits - 1) ==
               (unsigned)it.splits - 1;
    __syncthreads();
    if (!last)
        return;
    __threadfence();
    merge_splits<HD>(&p, &it);
}

/* May a block have the rings, and the little that is declared beside them? */
template <int HD, int EB> static bool rings_fit(const struct cuda_device *d)
{
    return (size_t)decode_shape<HD, EB>::SMEM + 1024 <= d->smem_block;
}

template <int HD, int EB>
static lm_status launch(struct cuda_stream *st, const struct attn_launch *p, int max_tiles)
{
    if (!rings_fit<HD, EB>(st->dev))
        return LM_UNSUPPORTED;
    /* The most splits that any sequence of at most max_tiles tiles may have. */
    int splits = 1;
    for (int t = max_tiles; t > 0 && t > max_tiles - DECODE_MAX_TILES; t--)
        splits = LM_MAX(splits, decode_splits(t, p->want_splits, p->cap_splits));
    const int units = p->a.kv_heads * p->row_tiles;
    const bool all_alone = p->pack && max_tiles <= DECODE_MIN_TILES;
    dim3 grid((unsigned)LM_MIN(splits, p->cap_splits),
              (unsigned)(all_alone ? LM_DIV_UP(units, WARPS) : units), (unsigned)p->a.n_seqs);
    return cuda_launch(st, "attention (decode)", decode_kernel<HD, EB>, grid,
                       dim3(WARPS * 32), decode_shape<HD, EB>::SMEM, *p);
}

template <int HD, int EB> static cudaError_t allow(const struct cuda_device *d)
{
    if (!rings_fit<HD, EB>(d))
        return cudaSuccess;
    return cudaFuncSetAttribute(decode_kernel<HD, EB>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                decode_shape<HD, EB>::SMEM);
}

cudaError_t cuda_attn_decode_init(const struct cuda_device *d)
{
    cudaError_t e = cudaSuccess;
#define X(hd)                                                                                  \
    if (e == cudaSuccess)                                                                      \
        e = allow<hd, 2>(d);                                                                   \
    if (e == cudaSuccess)                                                                      \
        e = allow<hd, 1>(d);
    CUDA_HEAD_DIMS(X)
#undef X
    return e;
}

lm_status cuda_attn_decode(struct cuda_stream *st, const struct attn_launch *p, int max_tiles)
{
    switch (p->a.head_dim) {
#define X(hd)                                                                                  \
    case hd:                                                                                   \
        return p->a.pool.kv == KN_KV_E4M3 ? launch<hd, 1>(st, p, max_tiles)                    \
                                          : launch<hd, 2>(st, p, max_tiles);
        CUDA_HEAD_DIMS(X)
#undef X
    }
    return LM_UNSUPPORTED;
}
