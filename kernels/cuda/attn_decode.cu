/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attn_decode.cu - paged attention for sequences with one query token (flash decoding).
 *
 * Bound by reading K and V once. The work of a sequence is its units: a kv head and up to 16 of the
 * query heads that share it. A block of four warps takes one unit and one split of the keys. Its
 * warps take tiles of 16 keys in turn and never wait for each other: each has its own ring of
 * STAGES tiles in shared memory, filled by cp.async while it works on others, and its own running
 * maximum, sum and output. At the end the four are merged in shared memory; with several splits the
 * block that arrives last merges those, always in the same order.
 *
 * Where there are units enough (attn_launch.alone_tiles), short ones are a warp's each: 100 keys
 * are a tile or two for each of four warps, whose start, merging and end then cost more than the
 * reading, and meanwhile nothing is read. A warp alone keeps its ring full, and takes several units
 * of a sequence if they are very short (decode_run()): the ring runs on from one into the next, and
 * so do the queries.
 *
 * Products are K q^T and V^T p: keys, then dims, are the 16 rows of a tensor-core tile, query heads
 * its 8 columns. Grouped heads share every load, and few heads waste little. Why tensor cores at
 * a single query: not for their flops but because scores need no horizontal sums and bf16 no
 * conversion.
 *
 * E4M3 (EB 1) becomes float16, two numbers an instruction on Hopper. There is no ldmatrix for
 * bytes, but for pairs of them, and which 16 dims of K a product takes together, and which row is
 * which dim of V, is ours to choose: of a key a lane gets four neighbouring dims (and the query's
 * to match), of V two neighbouring dims of two keys, whose bytes are regrouped by dim first. Tiles
 * are half as large, and twice as many warps work on them: what limits is not the reading alone.
 */
#include "kernels/cuda/attn.cuh"

#define WARPS 4
#define TILE 16                 /* keys; and query heads of a block at most */

/* Weights are 2^(score - m). Where a score exceeds m by more than CEILING, m is set to LIFT below
 * the largest: finding that and rescaling cost more than a tile's weights, so scores that are a
 * little larger do not matter. Weights of at most 2^15 are float16's too, down to 2^-31 of the
 * largest. */
#define LIFT 7.0f
#define CEILING 15.0f

/* NQ: columns of 8 query heads. */
template <int HD, int EB, int NQ> struct decode_shape {
    static constexpr int TILE_BYTES = TILE * HD * EB;
    static constexpr int STAGES = HD * EB > 256 ? 2 : HD > 128 ? 4 : 3;
    static constexpr int RING = STAGES * 2 * TILE_BYTES;        /* K and V, a warp */
    static constexpr int LD = HD + 4;                           /* floats; 4: banks */
    static constexpr int OUT = NQ * 8 * LD * 4;                 /* a warp's output, over its ring */
    static constexpr int WARP_BYTES = RING > OUT ? RING : OUT;
    static constexpr int SMEM = WARPS * WARP_BYTES;
    /* Blocks that an SM is to have room for. */
    static constexpr int BLOCKS = NQ == 1 && HD <= 128 ? 4 / EB : 1;
};

/* What a warp knows of its share: units (a kv head and up to 16 of its query heads) in turn, of
 * each the same tiles. Loading runs ahead of computing, from one unit into the next. */
template <int HD, int EB> struct decode_warp {
    const struct attn_launch *p;
    const int32_t *table;
    const char *layer, *base;   /* pool block 0 of the layer; there K of the unit being loaded */
    unsigned char *ring;
    int lane, lo, len;          /* keys lo .. len-1 are visible */
    int pos0, n_tiles, step;    /* tile i starts at pos0 + i * step */
    int unit, end;              /* being loaded, and where to stop */
    int at, slot;               /* the next tile to load, and where to */
    int id;                     /* see fetch_ids() */
};

/* Is a tile of keys within one block? Tiles begin at multiples of 16. */
template <int HD, int EB>
__device__ static inline bool whole_blocks(const struct decode_warp<HD, EB> *w)
{
    return w->p->bt_shift >= 4;
}

/* Looks up blocks before tile `at` is loaded: of the 32 tiles from there on, if a tile has one, and
 * they serve the units that follow too; else of the keys of tile `at`. */
template <int HD, int EB>
__device__ static inline void fetch_ids(struct decode_warp<HD, EB> *w, bool first)
{
    if (w->unit >= w->end)
        return;
    if (!whole_blocks(w)) {
        const int pos = w->pos0 + w->at * w->step + (w->lane & 15);
        w->id = pos >= w->lo && pos < w->len ? block_of(w->p, w->table, pos) : 0;
    } else if (first || (w->at % 32 == 0 && w->n_tiles > 32)) {
        const int tile = w->at + w->lane;
        w->id = tile < w->n_tiles ? block_of(w->p, w->table, w->pos0 + tile * w->step) : 0;
    }
}

template <int HD, int EB> __device__ static inline void load_unit(struct decode_warp<HD, EB> *w)
{
    w->base = w->layer + kv_head_at<EB>(&w->p->a, w->unit / w->p->row_tiles);
}

/* Starts the copies of the keys of tile `at` to k, and of their values to behind them. */
template <int HD, int EB>
__device__ static inline void copy_tile(const struct decode_warp<HD, EB> *w, unsigned char *k)
{
    constexpr int P = HD * EB / 16, N = TILE * P;
    const struct kn_attention *a = &w->p->a;
    const int pos0 = w->pos0 + w->at * w->step;
    const int64_t v = (int64_t)a->block_tokens * (HD * EB);
    const bool whole = whole_blocks(w);
    const int64_t id = __shfl_sync(FULL_MASK, w->id, w->at % 32);
    if (whole && pos0 >= w->lo && pos0 + TILE <= w->len) {
        const char *src = w->base + id * a->pool.block_bytes +          /* one run of memory */
                          (pos0 & (a->block_tokens - 1)) * (HD * EB) + w->lane * 16;
#pragma unroll
        for (int j = 0; j < (N + 31) / 32; j++) {
            const int at = j * 32 + w->lane;
            if (N % 32 && at >= N)
                break;
            unsigned char *dst = k + tile_at<HD, EB>(at / P, at % P);
            cp_async16(dst, src + j * 512, true);
            cp_async16(dst + TILE * HD * EB, src + v + j * 512, true);
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < (N + 31) / 32; j++) {
        const int at = j * 32 + w->lane, key = at / P, piece = at % P, pos = pos0 + key;
        const int64_t own = __shfl_sync(FULL_MASK, w->id, key);
        if (N % 32 && at >= N)
            break;
        const char *src = w->base + (whole ? id : own) * a->pool.block_bytes +
                          (pos & (a->block_tokens - 1)) * (HD * EB) + piece * 16;
        const bool valid = pos >= w->lo && pos < w->len;
        unsigned char *dst = k + tile_at<HD, EB>(key, piece);
        cp_async16(dst, src, valid);
        cp_async16(dst + TILE * HD * EB, src + v, valid);
    }
}

/* Starts the copies of the next tile, as one group; beyond the last an empty group keeps the
 * count. */
template <int HD, int EB, int NQ>
__device__ static inline void load_next(struct decode_warp<HD, EB> *w)
{
    typedef struct decode_shape<HD, EB, NQ> S;
    if (w->unit < w->end) {
        copy_tile(w, w->ring + w->slot * (2 * S::TILE_BYTES));
        w->slot = w->slot + 1 == S::STAGES ? 0 : w->slot + 1;
        if (++w->at == w->n_tiles) {
            w->at = 0;
            w->unit++;
            load_unit(w);
        }
        fetch_ids(w, false);
    }
    cp_async_commit();
}

/* Running softmax of a unit's query heads, which are columns: 8n + 2t and the next one are this
 * lane's, and in o of every 16 dims two. */
template <int HD, int NQ> struct decode_acc {
    float o[NQ][HD / 16][4];
    float m[NQ][2], l[NQ][2];   /* l: this lane's keys only, summed over the column at the end */
};

template <int HD, int NQ> __device__ static inline void clear(struct decode_acc<HD, NQ> *acc)
{
#pragma unroll
    for (int n = 0; n < NQ; n++) {
#pragma unroll
        for (int d = 0; d < HD / 16; d++)
            acc->o[n][d][0] = acc->o[n][d][1] = acc->o[n][d][2] = acc->o[n][d][3] = 0;
        acc->m[n][0] = acc->m[n][1] = -INFINITY;
        acc->l[n][0] = acc->l[n][1] = 0;
    }
}

/* A unit's query heads as they lie in memory, and as B operands with what scores are to be
 * multiplied by. */
template <int HD, int NQ> struct decode_query {
    uint32_t raw[NQ][HD / 8], b[NQ][HD / 8];
    float scale[NQ][2];
};

template <int EB> __device__ static inline void mma_half(float c[4], const uint32_t a[4],
                                                         const uint32_t b[2])
{
    if constexpr (EB == 2)
        mma_bf16(c, a, b);
    else
        mma_f16(c, a, b);
}

/* 32 dims of the tile's keys as A operands, or 16 if they are the last. Columns 2t 2t+1 and 2t+8
 * 2t+9 of a product are those dims in bf16, and 4t .. 4t+3 in E4M3. */
template <int HD, int EB>
__device__ static inline void key_fragments(uint32_t a[2][4], const unsigned char *k, int pair,
                                            int lane)
{
    constexpr int P = HD * EB / 16;
    if constexpr (EB == 2) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            ldmatrix(a[i], k + tile_at<HD>(lane & 15, min(4 * pair + 2 * i + (lane >> 4), P - 1)));
    } else {
        uint32_t u[4];
        ldmatrix(u, k + tile_at<HD, 1>(lane & 15, min(2 * pair + (lane >> 4), P - 1)));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            a[i / 2][i % 2] = e4m3_f16_lo(u[i]);
            a[i / 2][i % 2 + 2] = e4m3_f16_hi(u[i]);
        }
    }
}

/* s [16 keys, 8 NQ query heads] = K q^T, scaled to powers of two, masked to [lo, len). Even and odd
 * products are summed apart: they wait for each other. */
template <int HD, int EB, int NQ>
__device__ static inline void tile_scores(const struct decode_warp<HD, EB> *w, float s[NQ][4],
                                          const struct decode_query<HD, NQ> *q,
                                          const unsigned char *k, int pos0)
{
    float odd[NQ][4];
#pragma unroll
    for (int n = 0; n < NQ; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            s[n][e] = odd[n][e] = 0;
#pragma unroll
    for (int pair = 0; pair < (HD + 31) / 32; pair++) {
        uint32_t a[2][4];
        key_fragments<HD, EB>(a, k, pair, w->lane);
#pragma unroll
        for (int n = 0; n < NQ; n++) {
            mma_half<EB>(s[n], a[0], q->b[n] + 4 * pair);
            if (2 * pair + 1 < HD / 16)
                mma_half<EB>(odd[n], a[1], q->b[n] + 4 * pair + 2);
        }
    }
    const int pos = pos0 + w->lane / 4;
    const bool whole = pos0 >= w->lo && pos0 + TILE <= w->len;
#pragma unroll
    for (int n = 0; n < NQ; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            s[n][e] = (s[n][e] + odd[n][e]) * q->scale[n][e & 1];
    if (whole)
        return;
#pragma unroll
    for (int e = 0; e < 4; e++)
        if (pos + (e >> 1) * 8 < w->lo || pos + (e >> 1) * 8 >= w->len)
#pragma unroll
            for (int n = 0; n < NQ; n++)
                s[n][e] = -INFINITY;
}

/* The largest, or the sum, of a column: lanes of the same t. */
__device__ static inline float column_max(float x)
{
#pragma unroll
    for (int i = 4; i < 32; i *= 2)
        x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, i));
    return x;
}

__device__ static inline float column_sum(float x)
{
#pragma unroll
    for (int i = 4; i < 32; i *= 2)
        x += __shfl_xor_sync(FULL_MASK, x, i);
    return x;
}

/* New maxima, to which what was summed so far is rescaled. */
template <int HD, int NQ>
__device__ static inline void raise_maxima(struct decode_acc<HD, NQ> *acc, const float s[NQ][4])
{
#pragma unroll
    for (int n = 0; n < NQ; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float m = fmaxf(acc->m[n][e], column_max(fmaxf(s[n][e], s[n][2 + e])) - LIFT);
            const float keep = exp2_fast(acc->m[n][e] - m);
            acc->m[n][e] = m;
            acc->l[n][e] *= keep;
#pragma unroll
            for (int d = 0; d < HD / 16; d++)
                acc->o[n][d][e] *= keep, acc->o[n][d][2 + e] *= keep;
        }
}

/* Scores become weights, as B operands. */
template <int HD, int EB, int NQ>
__device__ static inline void soften(struct decode_acc<HD, NQ> *acc, float s[NQ][4],
                                     uint32_t p[NQ][2])
{
    bool higher = false;
#pragma unroll
    for (int n = 0; n < NQ; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
            higher |= fmaxf(s[n][e], s[n][2 + e]) > acc->m[n][e] + CEILING;
    if (__any_sync(FULL_MASK, higher))
        raise_maxima<HD, NQ>(acc, s);
#pragma unroll
    for (int n = 0; n < NQ; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++)
            s[n][e] = exp2_fast(s[n][e] - acc->m[n][e & 1]);
        acc->l[n][0] += s[n][0] + s[n][2];
        acc->l[n][1] += s[n][1] + s[n][3];
#pragma unroll
        for (int i = 0; i < 2; i++)
            p[n][i] = transpose8(EB == 2 ? bf16_pack(s[n][2 * i], s[n][2 * i + 1])
                                         : f16_pack(s[n][2 * i], s[n][2 * i + 1]));
    }
}

/* 32 dims of the tile's values as A operands, or 16 if they are the last. Rows g and g + 8 of a
 * product are those dims in bf16, and 2g and 2g + 1 in E4M3. */
template <int HD, int EB>
__device__ static inline void value_fragments(uint32_t a[2][4], const unsigned char *v, int pair,
                                              int lane)
{
    constexpr int P = HD * EB / 16;
    if constexpr (EB == 2) {
        const int key = (lane >> 4) * 8 + (lane & 7);
#pragma unroll
        for (int i = 0; i < 2; i++)
            ldmatrix_trans(a[i], v + tile_at<HD>(key, min(4 * pair + 2 * i + (lane >> 3 & 1),
                                                          P - 1)));
    } else {
        uint32_t u[4];
        ldmatrix_trans(u, v + tile_at<HD, 1>(lane & 15, min(2 * pair + (lane >> 4), P - 1)));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t by_dim = __byte_perm(u[i], 0, 0x3120);
            a[i / 2][i % 2 * 2] = e4m3_f16_lo(by_dim);
            a[i / 2][i % 2 * 2 + 1] = e4m3_f16_hi(by_dim);
        }
    }
}

template <int HD, int EB, int NQ>
__device__ static inline void add_values(struct decode_acc<HD, NQ> *acc, const uint32_t p[NQ][2],
                                         const unsigned char *v, int lane)
{
#pragma unroll
    for (int pair = 0; pair < (HD + 31) / 32; pair++) {
        uint32_t a[2][4];
        value_fragments<HD, EB>(a, v, pair, lane);
#pragma unroll
        for (int n = 0; n < NQ; n++) {
            mma_half<EB>(acc->o[n][2 * pair], a[0], p[n]);
            if (2 * pair + 1 < HD / 16)
                mma_half<EB>(acc->o[n][2 * pair + 1], a[1], p[n]);
        }
    }
}

/* The unit whose first tile lies in slot `slot`, which moves on. */
template <int HD, int EB, int NQ>
__device__ static inline void run_tiles(struct decode_warp<HD, EB> *w,
                                        struct decode_acc<HD, NQ> *acc,
                                        const struct decode_query<HD, NQ> *q, int *slot)
{
    typedef struct decode_shape<HD, EB, NQ> S;
    for (int i = 0; i < w->n_tiles; i++) {
        const unsigned char *k = w->ring + *slot * (2 * S::TILE_BYTES);
        float s[NQ][4];
        uint32_t p[NQ][2];
        cp_async_wait<S::STAGES - 1>();
        __syncwarp();
        tile_scores<HD, EB, NQ>(w, s, q, k, w->pos0 + i * w->step);
        soften<HD, EB, NQ>(acc, s, p);
        add_values<HD, EB, NQ>(acc, p, k + S::TILE_BYTES, w->lane);
        __syncwarp();
        load_next<HD, EB, NQ>(w);
        *slot = *slot + 1 == S::STAGES ? 0 : *slot + 1;
    }
}

/* Query heads 0 .. n-1 from head0 on, their dims in the order of key_fragments(); others are
 * zero. */
template <int HD, int EB, int NQ>
__device__ static inline void load_query(struct decode_query<HD, NQ> *q, const uint16_t *head0,
                                         int n, int lane)
{
    const int t = lane & 3;
#pragma unroll
    for (int c = 0; c < NQ; c++) {
        const int row = c * 8 + lane / 4;
        const uint16_t *src = head0 + row * HD;
#pragma unroll
        for (int ks = 0; ks < HD / 16; ks++) {
            uint32_t *raw = q->raw[c] + 2 * ks;
            if (row >= n) {
                raw[0] = raw[1] = 0;
            } else if (EB == 2) {
                raw[0] = *(const uint32_t *)(src + ks * 16 + t * 2);
                raw[1] = *(const uint32_t *)(src + ks * 16 + t * 2 + 8);
            } else {
                const uint2 u = *(const uint2 *)(src + ks * 16 + t * 4);
                raw[0] = u.x, raw[1] = u.y;
            }
        }
    }
}

/* What was loaded becomes operands. Float16 has fewer exponents than bf16: a row is multiplied by
 * the power of two that takes its largest number to between 2^14 and 2^15, then numbers down to
 * 2^-28 of that are exact, and smaller ones off by 2^-40 of it. */
template <int HD, int EB, int NQ>
__device__ static inline void take_query(struct decode_query<HD, NQ> *q, float scale, int lane)
{
#pragma unroll
    for (int c = 0; c < NQ; c++) {
        if (EB == 2) {
#pragma unroll
            for (int i = 0; i < HD / 8; i++)
                q->b[c][i] = q->raw[c][i];
            q->scale[c][0] = q->scale[c][1] = scale;
            continue;
        }
        float top = 0;
#pragma unroll
        for (int i = 0; i < HD / 8; i++)
            top = fmaxf(top, fmaxf(fabsf(bf16_lo(q->raw[c][i])), fabsf(bf16_hi(q->raw[c][i]))));
        top = quad_max(top);
        const uint32_t exponent = LM_MAX(__float_as_uint(top) >> 23, 15u);
        const float f = __uint_as_float((268 - exponent) << 23);
        const float back = __uint_as_float((exponent - 14) << 23);
#pragma unroll
        for (int i = 0; i < HD / 8; i++)
            q->b[c][i] = f16_pack(bf16_lo(q->raw[c][i]) * f, bf16_hi(q->raw[c][i]) * f);
#pragma unroll
        for (int e = 0; e < 2; e++)
            q->scale[c][e] = scale * __shfl_sync(FULL_MASK, back, ((lane & 3) * 2 + e) * 4);
    }
}

/* One row's place among partial results. */
struct decode_item {
    int item, rows, rows_cap, splits, split;
    uint16_t *out;              /* row r's output starts at out + r * head_dim */
};

/* The warps' results, left in shared memory, become the block's: the output itself, or a partial
 * one. Fixed order: warp 0 to 3. */
template <int HD, int NQ, int LD, int WLD>
__device__ static inline void merge_warps(const struct attn_launch *p, const struct decode_item *it,
                                          const float *o, const float (*ml)[NQ * 8][2])
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
            x += f * o[w * WLD + row * LD + d];
            y += f * o[w * WLD + row * LD + d + 1];
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
template <int HD, int EB, int NQ, int LD>
__device__ static inline void leave_result(const struct decode_acc<HD, NQ> *acc, float *o,
                                           float (*ml)[2], int rows, int lane)
{
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < NQ; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float l = column_sum(acc->l[n][e]);
            const int row = n * 8 + t * 2 + e;
            if (g == 0)
                ml[row][0] = acc->m[n][e], ml[row][1] = l;
            if (row >= rows)
                continue;
#pragma unroll
            for (int d = 0; d < HD / 16; d++) {
                float *at = o + row * LD + d * 16;
                at[EB == 2 ? g : 2 * g] = acc->o[n][d][e];
                at[EB == 2 ? g + 8 : 2 * g + 1] = acc->o[n][d][2 + e];
            }
        }
}

/* Units that were this warp's alone: their output, row r's at out + r * head_dim. */
template <int HD, int EB, int NQ>
__device__ static inline void write_alone(const struct decode_acc<HD, NQ> *acc, uint16_t *out,
                                          int rows, int lane)
{
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < NQ; n++) {
        float f[2];
#pragma unroll
        for (int e = 0; e < 2; e++)
            f[e] = __fdividef(1.0f, column_sum(acc->l[n][e]));
#pragma unroll
        for (int d = 0; d < HD / 16; d++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float *o = acc->o[n][d];
                if (EB == 2) {
                    const uint32_t x = transpose8(bf16_pack(o[2 * i] * f[0], o[2 * i + 1] * f[1]));
                    if (n * 8 + g < rows)
                        *(uint32_t *)(out + (n * 8 + g) * HD + d * 16 + i * 8 + t * 2) = x;
                } else if (n * 8 + t * 2 + i < rows) {
                    *(uint32_t *)(out + (n * 8 + t * 2 + i) * HD + d * 16 + g * 2) =
                        bf16_pack(o[i] * f[i], o[2 + i] * f[i]);
                }
            }
    }
}

/* Asks for the query heads of a unit. */
template <int HD, int EB, int NQ>
__device__ static inline void load_queries(const struct attn_launch *p,
                                           struct decode_query<HD, NQ> *q, int tok, int unit,
                                           int lane)
{
    const struct kn_attention *a = &p->a;
    const int group = a->q_heads / a->kv_heads, row0 = unit % p->row_tiles * TILE;
    const int head = unit / p->row_tiles * group + row0;
    load_query<HD, EB, NQ>(q, (const uint16_t *)a->qkv + tok * a->ld + head * HD,
                           min(TILE, group - row0), lane);
}

/* A warp's units one after the other; returns with the last one's sums, or writes them all. */
template <int HD, int EB, int NQ>
__device__ static inline void run_units(struct decode_warp<HD, EB> *w,
                                        struct decode_acc<HD, NQ> *acc, int tok, bool alone)
{
    typedef struct decode_shape<HD, EB, NQ> S;
    constexpr bool AHEAD = HD * NQ <= 128;      /* registers for the next unit's queries */
    const struct attn_launch *p = w->p;
    const int group = p->a.q_heads / p->a.kv_heads;
    uint16_t *out = (uint16_t *)p->a.out + (int64_t)tok * p->a.q_heads * HD;
    struct decode_query<HD, NQ> q;
    int unit = w->unit, slot = 0;
    const int end = w->end;
    for (int i = 0; i < S::STAGES; i++)
        load_next<HD, EB, NQ>(w);
    clear(acc);
    load_queries<HD, EB, NQ>(p, &q, tok, min(unit, p->a.kv_heads * p->row_tiles - 1), w->lane);
    for (; unit < end; unit++) {
        take_query<HD, EB, NQ>(&q, p->scale_log2, w->lane);
        if (AHEAD && unit + 1 < end)
            load_queries<HD, EB, NQ>(p, &q, tok, unit + 1, w->lane);
        run_tiles<HD, EB, NQ>(w, acc, &q, &slot);
        if (alone) {
            const int row0 = unit % p->row_tiles * TILE;
            const int head = unit / p->row_tiles * group + row0;
            write_alone<HD, EB, NQ>(acc, out + head * HD, min(TILE, group - row0), w->lane);
            clear(acc);
        }
        if (!AHEAD && unit + 1 < end)
            load_queries<HD, EB, NQ>(p, &q, tok, unit + 1, w->lane);
    }
    cp_async_wait<0>();
}

template <int HD, int EB, int NQ>
__global__ static void __launch_bounds__(WARPS * 32, (decode_shape<HD, EB, NQ>::BLOCKS))
    decode_kernel(const __grid_constant__ struct attn_launch p)
{
    typedef struct decode_shape<HD, EB, NQ> S;
    DYNAMIC_SMEM(smem);
    __shared__ float ml[WARPS][NQ * 8][2];
    __shared__ int last;
    const struct kn_attention *a = &p.a;
    const int seq = (int)blockIdx.z, warp = (int)threadIdx.x / 32;
    const int group = a->q_heads / a->kv_heads, units = a->kv_heads * p.row_tiles;
    const int tok = a->q_start[seq], len = a->kv_len[seq];
    cuda_allow_next();
    struct decode_warp<HD, EB> w;
    w.lo = first_visible(a, len - 1);
    const int start = w.lo & ~(TILE - 1), tiles = (len - start + TILE - 1) / TILE;
    struct decode_item it;
    it.splits = decode_splits(&p, tiles);
    it.split = (int)blockIdx.x;
    const bool fits = (len - 1) >> p.bt_shift < a->table_ld;
    if (!fits)
        cuda_report(p.fault, CUDA_FAULT_BLOCK);
    const bool alone = tiles <= p.alone_tiles;
    const int run = alone ? decode_run(tiles) : 1;
    const int first = (int)blockIdx.y * (alone ? WARPS * run : 1);
    if (a->q_start[seq + 1] - tok != 1 || len < 1 || !fits || it.split >= it.splits ||
        first >= units) {
        cuda_wait_prior();      /* the next kernel counts on the one before us being done */
        return;
    }
    const int per = (tiles + it.splits - 1) / it.splits, tile0 = it.split * per;
    w.p = &p;
    w.lane = (int)threadIdx.x % 32;
    w.len = len;
    w.table = a->block_table + seq * a->table_ld;
    w.layer = cuda_pool_block(&a->pool, a->layer, 0);
    w.ring = smem + warp * S::WARP_BYTES;
    w.step = alone ? TILE : WARPS * TILE;
    w.pos0 = start + (tile0 + (alone ? 0 : warp)) * TILE;
    w.n_tiles = alone ? tiles : max(0, (min(per, tiles - tile0) - warp + WARPS - 1) / WARPS);
    w.unit = first + (alone ? warp * run : 0);
    w.end = w.n_tiles == 0 ? w.unit : min(w.unit + run, units);
    w.at = w.slot = 0;
    load_unit(&w);
    w.id = 0;
    fetch_ids(&w, true);
    cuda_wait_prior();
    struct decode_acc<HD, NQ> acc;
    run_units<HD, EB, NQ>(&w, &acc, tok, alone);
    if (alone)
        return;

    const int row0 = first % p.row_tiles * TILE, head = first / p.row_tiles * group + row0;
    it.rows = min(TILE, group - row0);
    it.rows_cap = min(TILE, group);
    it.item = seq * units + first;
    it.out = (uint16_t *)a->out + ((int64_t)tok * a->q_heads + head) * HD;
    __syncwarp();               /* the ring is free: the output goes over it */
    leave_result<HD, EB, NQ, S::LD>(&acc, (float *)w.ring, ml[warp], it.rows, w.lane);
    __syncthreads();
    merge_warps<HD, NQ, S::LD, S::WARP_BYTES / 4>(&p, &it, (const float *)smem, ml);
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
template <int HD, int EB, int NQ> static bool rings_fit(const struct cuda_device *d)
{
    return (size_t)decode_shape<HD, EB, NQ>::SMEM + 1024 <= d->smem_block;
}

template <int HD, int EB, int NQ>
static lm_status launch(struct cuda_stream *st, const struct attn_launch *p, int max_tiles)
{
    if (!rings_fit<HD, EB, NQ>(st->dev))
        return LM_UNSUPPORTED;
    /* The most splits that any sequence of at most max_tiles tiles may have. */
    int splits = 1;
    for (int t = max_tiles; t > 0 && t > max_tiles - DECODE_MAX_TILES; t--)
        splits = LM_MAX(splits, decode_splits(p, t));
    int units = p->a.kv_heads * p->row_tiles;
    if (max_tiles <= p->alone_tiles)
        units = LM_DIV_UP(units, WARPS * decode_run(max_tiles));
    dim3 grid((unsigned)LM_MIN(splits, p->cap_splits), (unsigned)units, (unsigned)p->a.n_seqs);
    return cuda_launch(st, "attention (decode)", decode_kernel<HD, EB, NQ>, grid,
                       dim3(WARPS * 32), decode_shape<HD, EB, NQ>::SMEM, *p);
}

template <int HD, int EB, int NQ> static cudaError_t allow(const struct cuda_device *d)
{
    if (!rings_fit<HD, EB, NQ>(d))
        return cudaSuccess;
    return cudaFuncSetAttribute(decode_kernel<HD, EB, NQ>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                decode_shape<HD, EB, NQ>::SMEM);
}

template <int HD> static cudaError_t allow_all(const struct cuda_device *d)
{
    cudaError_t e = allow<HD, 2, 1>(d);
    if (e == cudaSuccess)
        e = allow<HD, 2, 2>(d);
    if (e == cudaSuccess)
        e = allow<HD, 1, 1>(d);
    return e == cudaSuccess ? allow<HD, 1, 2>(d) : e;
}

template <int HD>
static lm_status launch_for(struct cuda_stream *st, const struct attn_launch *p, int max_tiles)
{
    const bool few = p->a.q_heads / p->a.kv_heads <= 8;
    if (p->a.pool.kv == KN_KV_E4M3)
        return few ? launch<HD, 1, 1>(st, p, max_tiles) : launch<HD, 1, 2>(st, p, max_tiles);
    return few ? launch<HD, 2, 1>(st, p, max_tiles) : launch<HD, 2, 2>(st, p, max_tiles);
}

cudaError_t cuda_attn_decode_init(const struct cuda_device *d)
{
    cudaError_t e = cudaSuccess;
#define X(hd)                                                                                  \
    if (e == cudaSuccess)                                                                      \
        e = allow_all<hd>(d);
    CUDA_HEAD_DIMS(X)
#undef X
    return e;
}

lm_status cuda_attn_decode(struct cuda_stream *st, const struct attn_launch *p, int max_tiles)
{
    switch (p->a.head_dim) {
#define X(hd)                                                                                  \
    case hd:                                                                                   \
        return launch_for<hd>(st, p, max_tiles);
        CUDA_HEAD_DIMS(X)
#undef X
    }
    return LM_UNSUPPORTED;
}
