/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attn_prefill.cuh - what the three prefill kernels share: finding work, copies, masks, softmax.
 *
 * A work item is one kv head and S::ROWS rows of one sequence; a row is a query token and one of
 * the kv head's query heads, heads innermost, so that grouped heads share every load of K and V.
 *
 * The host cannot see how a step's tokens fall to sequences, so the grid is a bound from n_tok and
 * n_seqs, and blocks find their items by scanning q_start (32 sequences a step). Items of one
 * sequence come last rows first: those have the most keys.
 *
 * A shape S says: HD, EB (bytes of an element in the pool), ROWS and THREADS of a block, MT 16-row
 * tiles a warp, KEYS of a tile, and at<rows>(row, piece), where 16 bytes of a tile of that many
 * rows lie in shared memory.
 *
 * Tiles in shared memory are bf16. Those of a bf16 pool are copied to where they are used, into two
 * buffers in turn. Those of an E4M3 pool land in a staging buffer; each thread widens what it has
 * copied itself (so it waits for nobody) into the one tile, which nobody reads then: between the
 * last read of a K tile and the next write lies the barrier of V, and the other way round.
 */
#ifndef LORAMILL_KERNELS_ATTN_PREFILL_CUH
#define LORAMILL_KERNELS_ATTN_PREFILL_CUH

#include "kernels/cuda/attn.cuh"

struct prefill_item {
    int seq, row0, kv_head;
    int tok0, n_rows;           /* of the sequence: its first query token; tokens * group */
    int pos0;                   /* position of its first query token */
};

/* Finds item `index`; false beyond the last. All lanes of a warp together. */
__device__ static inline bool find_item(const struct kn_attention *a, int rows, int index,
                                        struct prefill_item *it)
{
    const int lane = (int)threadIdx.x % 32, group = a->q_heads / a->kv_heads;
    const int want = index / a->kv_heads;
    int before = 0;
    for (int s0 = 0; s0 < a->n_seqs; s0 += 32) {
        int s = s0 + lane, n_q = 0;
        if (s < a->n_seqs)
            n_q = a->q_start[s + 1] - a->q_start[s];
        int tiles = n_q > 1 ? (n_q * group + rows - 1) / rows : 0, sum = tiles;
        for (int d = 1; d < 32; d *= 2) {
            int up = __shfl_up_sync(FULL_MASK, sum, d);
            sum += lane >= d ? up : 0;
        }
        unsigned reached = __ballot_sync(FULL_MASK, before + sum > want);
        if (reached) {
            int src = __ffs((int)reached) - 1;
            int end = before + __shfl_sync(FULL_MASK, sum, src);
            it->seq = s0 + src;
            it->row0 = (end - 1 - want) * rows;
            it->kv_head = index % a->kv_heads;
            it->tok0 = a->q_start[it->seq];
            n_q = a->q_start[it->seq + 1] - it->tok0;
            it->n_rows = n_q * group;
            it->pos0 = a->kv_len[it->seq] - n_q;
            return true;
        }
        before += __shfl_sync(FULL_MASK, sum, 31);
    }
    return false;
}

__device__ static inline bool item_fits(const struct attn_launch *p, const struct prefill_item *it)
{
    int end = it->pos0 + it->n_rows / (p->a.q_heads / p->a.kv_heads);
    if (it->pos0 >= 0 && (end - 1) >> p->bt_shift < p->a.table_ld)
        return true;
    cuda_report(p->fault, CUDA_FAULT_BLOCK);
    return false;
}

/* The keys of an item: n tiles from `start` on, of which [lo, end) are visible to some row. */
struct prefill_keys {
    int start, lo, end, n;
    int low, lo_high;           /* last key of the first row; first key of the last row */
};

template <class S>
__device__ static inline struct prefill_keys keys_of(const struct kn_attention *a,
                                                     const struct prefill_item *it)
{
    const int group = a->q_heads / a->kv_heads;
    const int high = it->pos0 + (min(it->row0 + S::ROWS, it->n_rows) - 1) / group;
    struct prefill_keys r;
    r.low = it->pos0 + it->row0 / group;
    r.lo = first_visible(a, r.low);
    r.lo_high = first_visible(a, high);
    r.start = r.lo & ~(S::KEYS - 1);
    r.end = high + 1;
    r.n = (r.end - r.start + S::KEYS - 1) / S::KEYS;
    return r;
}

template <class S> __device__ static inline bool needs_mask(const struct prefill_keys *r, int pos0)
{
    return pos0 + S::KEYS - 1 > r->low || pos0 < r->lo_high;
}

template <class S>
static dim3 prefill_grid(const struct cuda_stream *st, const struct attn_launch *p)
{
    const struct kn_attention *a = &p->a;
    int64_t rows = (int64_t)a->n_tok * (a->q_heads / a->kv_heads);
    int64_t tiles = rows / S::ROWS + LM_MIN(a->n_seqs, LM_MAX(1, a->n_tok / 2));
    return dim3((unsigned)LM_MIN(tiles * a->kv_heads, (int64_t)st->dev->sms * 64));
}

/* ---- copies ---------------------------------------------------------------------------- */

template <class S>
__device__ static inline void load_query(const struct kn_attention *a,
                                         const struct prefill_item *it, unsigned char *q)
{
    constexpr int P = S::HD / 8;
    const int group = a->q_heads / a->kv_heads;
    for (int i = (int)threadIdx.x; i < S::ROWS * P; i += S::THREADS) {
        int r = i / P, piece = i % P, row = it->row0 + r;
        bool valid = row < it->n_rows;
        int64_t tok = it->tok0 + (valid ? row / group : 0);
        int head = it->kv_head * group + (valid ? row % group : 0);
        const uint16_t *src = (const uint16_t *)a->qkv + tok * a->ld + head * S::HD + piece * 8;
        cp_async16(q + S::template at<S::ROWS>(r, piece), src, valid);
    }
}

/* Shared memory, in bytes: the query, tiles of K, tiles of V, staging buffers for both. */
template <class S> struct prefill_smem {
    static constexpr int BUFFERS = S::EB == 2 ? 2 : 1;
    static constexpr int QUERY = S::ROWS * S::HD * 2;
    static constexpr int TILE = S::KEYS * S::HD * 2;
    static constexpr int STAGE = S::EB == 2 ? 0 : S::KEYS * S::HD;
    static constexpr int V = QUERY + BUFFERS * TILE, STAGES = V + BUFFERS * TILE;
    static constexpr int BYTES = STAGES + 2 * STAGE;
    /* From a tile's first buffer to where tile i is used, and from that or the staging buffer to
     * where it is copied. */
    __device__ static inline int at(int i) { return BUFFERS == 2 ? (i & 1) * TILE : 0; }
};

/* Keys [pos0, pos0 + KEYS) of K, or of V; zeros outside of what the item sees. */
template <class S>
__device__ static inline void load_keys(const struct attn_launch *p, const struct prefill_item *it,
                                        unsigned char *dst, int pos0,
                                        const struct prefill_keys *r, bool values)
{
    constexpr int P = S::HD * S::EB / 16, N = S::KEYS * P;
    const struct kn_attention *a = &p->a;
    const int32_t *table = a->block_table + it->seq * a->table_ld;
    const char *base = cuda_pool_block(&a->pool, a->layer, 0) + kv_head_at<S::EB>(a, it->kv_head) +
                       (values ? (int64_t)a->block_tokens * (S::HD * S::EB) : 0);
#pragma unroll
    for (int j = 0; j < (N + S::THREADS - 1) / S::THREADS; j++) {
        int i = j * S::THREADS + (int)threadIdx.x, key = i / P, piece = i % P, pos = pos0 + key;
        if (N % S::THREADS && i >= N)
            break;
        bool valid = pos >= r->lo && pos < r->end;
        int64_t id = valid ? block_of(p, table, pos) : 0;
        const char *src = base + id * a->pool.block_bytes +
                          (pos & (a->block_tokens - 1)) * (S::HD * S::EB) + piece * 16;
        cp_async16(dst + (S::EB == 2 ? S::template at<S::KEYS>(key, piece) : i * 16), src, valid);
    }
}

/* E4M3 only: what this thread has copied goes from the staging buffer into the tile. Of the two
 * halves of its 16 numbers the second goes first in every other group of four threads, so that
 * eight threads write to eight different bank groups. */
template <class S>
__device__ static inline void widen_keys(unsigned char *tile, const unsigned char *stage)
{
    constexpr int P = S::HD / 16, N = S::KEYS * P;
#pragma unroll
    for (int j = 0; j < (N + S::THREADS - 1) / S::THREADS; j++) {
        const int i = j * S::THREADS + (int)threadIdx.x, key = i / P, piece = i % P;
        const int turn = piece >> 2 & 1;
        if (N % S::THREADS && i >= N)
            break;
        const uint4 u = *(const uint4 *)(stage + i * 16);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t x = h ^ turn ? u.z : u.x, y = h ^ turn ? u.w : u.y;
            *(uint4 *)(tile + S::template at<S::KEYS>(key, 2 * piece + (h ^ turn))) =
                make_uint4(e4m3_pair(x, x, 0, 1), e4m3_pair(x, x, 2, 3), e4m3_pair(y, y, 0, 1),
                           e4m3_pair(y, y, 2, 3));
        }
    }
}

/* This thread's copies of a tile have landed but for the LEFT newest groups; the tile is not ready
 * before a barrier. */
template <class S, int LEFT>
__device__ static inline void tile_landed(unsigned char *tile, const unsigned char *stage)
{
    cp_async_wait<LEFT>();
    if (S::EB == 1)
        widen_keys<S>(tile, stage);
}

/* ---- softmax --------------------------------------------------------------------------- */

template <class S> struct prefill_acc {
    float o[S::MT][S::HD / 8][4];
    float m[S::MT][2], l[S::MT][2];
    int first[S::MT][2], last[S::MT][2];        /* positions that the row sees */
};

/* Hides what the rows may not see of the keys from pos0 on. */
template <class S>
__device__ static inline void mask(const struct prefill_acc<S> *acc, float s[][S::KEYS / 8][4],
                                   int pos0, int lane)
{
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int n = 0; n < S::KEYS / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int pos = pos0 + n * 8 + (lane & 3) * 2 + (e & 1), r = e >> 1;
                if (pos < acc->first[m][r] || pos > acc->last[m][r])
                    s[m][n][e] = -INFINITY;
            }
}

/* Scores become weights; `keep` is what the output so far must be multiplied with. A row that has
 * seen no key yet keeps a maximum of -inf. */
template <class S>
__device__ static inline void soften(struct prefill_acc<S> *acc, float s[][S::KEYS / 8][4],
                                     float scale, float keep[][2])
{
#pragma unroll
    for (int mt = 0; mt < S::MT; mt++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float m = -INFINITY;
#pragma unroll
            for (int n = 0; n < S::KEYS / 8; n++)
                m = fmaxf(m, fmaxf(s[mt][n][2 * r], s[mt][n][2 * r + 1]));
            m = fmaxf(acc->m[mt][r], quad_max(m) * scale);
            const float sub = m == -INFINITY ? 0 : m;
            float sum = 0;
            keep[mt][r] = exp2_fast(acc->m[mt][r] - sub);
            acc->m[mt][r] = m;
#pragma unroll
            for (int n = 0; n < S::KEYS / 8; n++)
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; e++) {
                    s[mt][n][e] = exp2_fast(fmaf(s[mt][n][e], scale, -sub));
                    sum += s[mt][n][e];
                }
            acc->l[mt][r] = acc->l[mt][r] * keep[mt][r] + sum;
        }
}

template <class S>
__device__ static inline void rescale(struct prefill_acc<S> *acc, const float keep[][2])
{
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int d = 0; d < S::HD / 8; d++) {
            acc->o[m][d][0] *= keep[m][0], acc->o[m][d][1] *= keep[m][0];
            acc->o[m][d][2] *= keep[m][1], acc->o[m][d][3] *= keep[m][1];
        }
}

/* Weights as the left side of a product by wgmma. */
template <int NT>
__device__ static inline void pack(uint32_t (&w)[NT / 2][4], const float (&s)[NT][4])
{
#pragma unroll
    for (int k = 0; k < NT / 2; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *x = s[2 * k + (i >> 1)] + (i & 1) * 2;
            w[k][i] = bf16_pack(x[0], x[1]);
        }
}

template <class S>
__device__ static inline void start_rows(const struct kn_attention *a,
                                         const struct prefill_item *it,
                                         struct prefill_acc<S> *acc, int warp, int lane)
{
    const int group = a->q_heads / a->kv_heads;
#pragma unroll
    for (int m = 0; m < S::MT; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = it->row0 + (warp * S::MT + m) * 16 + r * 8 + lane / 4;
            acc->last[m][r] = it->pos0 + min(row, it->n_rows - 1) / group;
            acc->first[m][r] = first_visible(a, acc->last[m][r]);
            acc->m[m][r] = -INFINITY;
            acc->l[m][r] = 0;
        }
#pragma unroll
        for (int d = 0; d < S::HD / 8; d++)
            acc->o[m][d][0] = acc->o[m][d][1] = acc->o[m][d][2] = acc->o[m][d][3] = 0;
    }
}

template <class S>
__device__ static inline void write_rows(const struct kn_attention *a,
                                         const struct prefill_item *it,
                                         const struct prefill_acc<S> *acc, int warp, int lane)
{
    const int group = a->q_heads / a->kv_heads;
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = it->row0 + (warp * S::MT + m) * 16 + r * 8 + lane / 4;
            float inv = 1.0f / quad_sum(acc->l[m][r]);
            if (row >= it->n_rows)
                continue;
            int64_t tok = it->tok0 + row / group;
            int head = it->kv_head * group + row % group;
            uint16_t *out = (uint16_t *)a->out + (tok * a->q_heads + head) * S::HD + lane % 4 * 2;
#pragma unroll
            for (int d = 0; d < S::HD / 8; d++)
                *(uint32_t *)(out + d * 8) = bf16_pack(acc->o[m][d][2 * r] * inv,
                                                       acc->o[m][d][2 * r + 1] * inv);
        }
}

#endif
