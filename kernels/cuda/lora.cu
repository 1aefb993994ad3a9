/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lora.cu - shrink and expand for many adapters of many ranks, straight from the pool's cells.
 *
 * Steps of few tokens go to lora_few.cu. Here are the steps with prefill, whose segments have tens
 * to thousands of tokens each: segmented matrix products on tensor cores, with work that follows
 * each module's true rank, to the next 8 rows. A token's result is the same sum in the same order
 * however many others share its adapter.
 *
 * Shrink: h = x A^T. A block takes one token tile, one part and NG * 8 rows of A; its eight warps
 * deal out the features, 64 at a time, and are added up in shared memory in order. A comes through
 * a ring of cp.async slots, the first of them before the wait for the GEMM in front. The order of
 * features inside a product is ours to choose, so each lane takes 16 bytes of A and of x and never
 * shuffles (see feature_mma()).
 *
 * Expand: y += scale h B. A warp keeps 64 output features of B in shared memory and walks the
 * tokens of its tile. B is transposed on the way to registers by ldmatrix; h is float32 and goes in
 * as the sum of two bf16, high and low, in two products. Segments of adapters too wide for that go
 * to lora_few.cu's kernel, in a launch of its own that only steps which have such see: each kernel
 * passes over what is the other's, so a row's way follows from its own adapter.
 *
 * Geometry: token tiles are a bound from n_tok and n_segs; blocks without work leave early.
 */
#include "kernels/cuda/lora.cuh"

#include <limits.h>

/* ---- shrink ---------------------------------------------------------------------------- */

#define SHRINK_WARPS 8
#define SHRINK_CHUNKS 256       /* chunk addresses kept in shared memory */
#define SPAN 64                 /* features a ring slot holds: 128 bytes of each of its rows */

/* MT token tiles of 16 by NG * 8 rows of A; a warp keeps RING slots of A on their way, and takes x
 * for AHEAD of them at a time. */
template <int MT_, int NG_, int RING_, int AHEAD_> struct shrink_shape {
    static constexpr int MT = MT_, NG = NG_, RING = RING_, AHEAD = AHEAD_;
    static constexpr int SLOT_BYTES = NG * 8 * SPAN * 2;
    static constexpr int SMEM = SHRINK_WARPS * RING * SLOT_BYTES;
    static_assert(SMEM >= SHRINK_WARPS * MT * 16 * NG * 8 * 4, "the sums go over the rings");
};

/* Where this block works. */
struct shrink_work {
    const struct lora_launch *p;
    const struct kn_lora_seg *seg;
    int tok0, n_tok;            /* tile's first row of x; rows of it */
    int j0;                     /* first rank row */
    struct lora_view v;
    const uint16_t **chunks;    /* in shared memory */
    bool wide;                  /* A allows 16-byte loads */
    int spans, n_slots;         /* spans a chunk; in all */
    unsigned char *ring;        /* this warp's */
    int warp, lane;
};

__device__ static inline const uint16_t *chunk_of(const struct shrink_work *k, int c)
{
    return c < SHRINK_CHUNKS ? k->chunks[c] : lora_chunk(&k->v, c, k->p->fault);
}

/* A lane's 16 bytes in a slot: rows alternate halves, so that reading two rows' first halves at
 * once (feature_mma) meets no bank twice. */
__device__ static inline int slot_at(int row, int piece)
{
    return row * SPAN * 2 + (piece ^ (row & 1) << 2) * 16;
}

/* Starts the copy of the warp's i-th span of features, as one group. */
template <class S> __device__ static inline void load_slot(const struct shrink_work *k, int i)
{
    const int width = k->v.m.width, b = k->warp + i * SHRINK_WARPS, c = b / k->spans;
    const int piece = k->lane % 8, off = (b - c * k->spans) * SPAN + piece * 8;
    if (b < k->n_slots) {
        const uint16_t *chunk = chunk_of(k, c);
        unsigned char *slot = k->ring + i % S::RING * S::SLOT_BYTES;
#pragma unroll
        for (int r = k->lane / 8; r < S::NG * 8; r += 4) {
            int j = k->j0 + r;
            bool valid = chunk && j < k->v.rank && off < width;
            const uint16_t *src = valid ? chunk + j * width + off : (const uint16_t *)k->p->a.x;
            if (k->wide)
                cp_async16(slot + slot_at(r, piece), src, valid);
            else
                *(uint4 *)(slot + slot_at(r, piece)) = load8(src, valid ? width - off : 0, false);
        }
    }
    cp_async_commit();
}

/* x for one span: feature 32 * half + 8t .. of rows g (lo) and g + 8 (hi) of each token tile. */
template <class S> struct shrink_x {
    uint4 lo[2][S::MT], hi[2][S::MT];
};

template <class S>
__device__ static inline void load_x(const struct shrink_work *k, int i, struct shrink_x<S> *x)
{
    const struct kn_lora *a = &k->p->a;
    const int width = k->v.m.width, b = k->warp + i * SHRINK_WARPS, c = b / k->spans;
    const bool aligned = k->p->aligned && k->wide;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int off = (b - c * k->spans) * SPAN + half * 32 + k->lane % 4 * 8;
        const int n = b < k->n_slots ? min(min(width - off, 8), a->in - c * width - off) : 0;
#pragma unroll
        for (int m = 0; m < S::MT; m++) {
            const int r = m * 16 + k->lane / 4;
            const uint16_t *row = (const uint16_t *)a->x + (k->tok0 + r) * a->ldx + c * width + off;
            x->lo[half][m] = load8(row, r < k->n_tok ? n : 0, aligned);
            x->hi[half][m] = load8(row + 8 * a->ldx, r + 8 < k->n_tok ? n : 0, aligned);
        }
    }
}

/* acc += x A^T over a span: lane (g, t) holds features 8t .. 8t+7 of row g of both, for each half;
 * two products of 16 take features 8t .. 8t+3 and 8t+4 .. 8t+7 of every t. */
template <class S>
__device__ static inline void feature_mma(float acc[S::MT][S::NG][4], const struct shrink_x<S> *x,
                                          const unsigned char *slot, int lane)
{
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < S::NG; i++) {
            const uint4 w = *(const uint4 *)(slot + slot_at(i * 8 + lane / 4, half * 4 + lane % 4));
            const uint32_t b0[2] = { w.x, w.y }, b1[2] = { w.z, w.w };
#pragma unroll
            for (int m = 0; m < S::MT; m++) {
                const uint4 lo = x->lo[half][m], hi = x->hi[half][m];
                const uint32_t a0[4] = { lo.x, hi.x, lo.y, hi.y };
                const uint32_t a1[4] = { lo.z, hi.z, lo.w, hi.w };
                mma_bf16(acc[m][i], a0, b0);
                mma_bf16(acc[m][i], a1, b1);
            }
        }
}

/* The warp's share of the features. A comes before the wait, x only after it. */
template <class S>
__device__ static inline void shrink_features(const struct shrink_work *k,
                                              float acc[S::MT][S::NG][4])
{
    const int n = (k->n_slots - k->warp + SHRINK_WARPS - 1) / SHRINK_WARPS;
    for (int i = 0; i < S::RING; i++)
        load_slot<S>(k, i);
    cuda_wait_prior();
    for (int i0 = 0; i0 < n; i0 += S::AHEAD) {
        struct shrink_x<S> x[S::AHEAD];
#pragma unroll
        for (int u = 0; u < S::AHEAD; u++)
            load_x<S>(k, i0 + u, &x[u]);
#pragma unroll
        for (int u = 0; u < S::AHEAD; u++) {
            if (i0 + u >= n)
                break;
            cp_async_wait<S::RING - 1>();
            __syncwarp();
            feature_mma<S>(acc, &x[u], k->ring + (i0 + u) % S::RING * S::SLOT_BYTES, k->lane);
            __syncwarp();
            load_slot<S>(k, i0 + u + S::RING);
        }
    }
    cp_async_wait<0>();
}

/* Adds the warps up in order; rows of h beyond the module's rank become zero. */
template <class S>
__device__ static inline void shrink_write(const struct shrink_work *k, int part, const float *sum,
                                           bool targeted)
{
    constexpr int COLS = S::NG * 8, TILE = S::MT * 16 * COLS;
    const struct kn_lora *a = &k->p->a;
    for (int i = (int)threadIdx.x; i < TILE; i += SHRINK_WARPS * 32) {
        int r = i / COLS, j = k->j0 + i % COLS;
        if (r >= k->n_tok || j >= k->seg->rank_max)
            continue;
        float h = 0;
        if (targeted && j < k->v.rank)
            for (int w = 0; w < SHRINK_WARPS; w++)
                h += sum[w * TILE + i];
        int64_t row = k->seg->h0 + (int64_t)(k->tok0 + r - k->seg->tok0) * k->seg->rank_max;
        a->h[a->n_parts * row + (int64_t)part * k->seg->rank_max + j] = h;
    }
}

template <class S>
__device__ static inline void leave_sums(float *sum, const float acc[S::MT][S::NG][4], int warp,
                                         int lane)
{
    constexpr int COLS = S::NG * 8;
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int i = 0; i < S::NG; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                sum[(warp * S::MT * 16 + m * 16 + lane / 4 + e / 2 * 8) * COLS + i * 8 +
                    lane % 4 * 2 + e % 2] = acc[m][i][e];
}

template <class S>
__global__ static void __launch_bounds__(SHRINK_WARPS * 32) shrink_kernel(
    const __grid_constant__ struct lora_launch p)
{
    DYNAMIC_SMEM(smem);
    __shared__ const uint16_t *chunks[SHRINK_CHUNKS];
    const struct kn_lora *a = &p.a;
    const int part = p.active[blockIdx.y];
    struct shrink_work k;
    int seg, tok;
    cuda_allow_next();
    bool work = lora_find_tile(&p, S::MT * 16, (int)blockIdx.z, &seg, &tok);
    k.p = &p;
    k.v.rank = 0;
    k.j0 = (int)blockIdx.x * S::NG * 8;
    k.warp = (int)threadIdx.x / 32, k.lane = (int)threadIdx.x % 32;
    if (work) {
        k.seg = &a->batch.segs[seg];
        k.tok0 = k.seg->tok0 + tok;
        k.n_tok = min(S::MT * 16, k.seg->n_tok - tok);
        work = k.n_tok > 0 && k.j0 < k.seg->rank_max;
    }
    if (!work) {
        cuda_wait_prior();
        return;
    }
    bool targeted = lora_find(&a->pool, a->layer, a->batch.block_ids + k.seg->block0,
                              a->part[part].module, k.seg->rank_max, false, p.fault, &k.v);
    float acc[S::MT][S::NG][4] = {};
    if (targeted && k.j0 < k.v.rank) {
        const int n_chunks = (a->in + k.v.m.width - 1) / k.v.m.width;
        k.chunks = chunks;
        k.wide = k.v.m.width % 8 == 0;
        k.spans = (k.v.m.width + SPAN - 1) / SPAN;
        k.n_slots = n_chunks * k.spans;
        k.ring = smem + k.warp * S::RING * S::SLOT_BYTES;
        for (int c = (int)threadIdx.x; c < min(n_chunks, SHRINK_CHUNKS); c += SHRINK_WARPS * 32)
            chunks[c] = lora_chunk(&k.v, c, p.fault);
        __syncthreads();
        shrink_features<S>(&k, acc);
        __syncthreads();        /* rings are free: the sums go over them */
    }
    cuda_wait_prior();
    leave_sums<S>((float *)smem, acc, k.warp, k.lane);
    __syncthreads();
    shrink_write<S>(&k, part, (const float *)smem, targeted);
}

/* ---- expand ---------------------------------------------------------------------------- */

#define EXPAND_WARPS 4
#define SLAB 64                 /* output features of a tile: 128 bytes of a row of B */
#define UNIT_BYTES (16 * SLAB * 2)      /* 16 rank rows of a slab */
#define STATIONARY_MAX 384      /* rank rows for which the long kernel keeps a slab of B */

struct expand_work {
    const struct lora_launch *p;
    const struct kn_lora_seg *seg;
    struct lora_view v;
    int tok0, n_tok, part;
    int slab;                   /* this warp's, of the part */
    int out, steps;             /* columns of the part; 16-row steps of the rank */
    unsigned char *b;           /* this warp's shared memory */
    int lane;
};

/* Which part and slab task `index` is; false beyond the last. */
__device__ static inline bool find_slab(int index, struct expand_work *w)
{
    const struct lora_launch *p = w->p;
    for (int i = 0; i < p->n_active; i++) {
        if (index < p->slabs[i]) {
            w->part = p->active[i];
            w->slab = index;
            w->out = p->a.part[w->part].out;
            return true;
        }
        index -= p->slabs[i];
    }
    return false;
}

/* Copies rows k0 .. k0 + rows - 1 of B for a slab to dst, pieces permuted as ldmatrix likes them;
 * zeros beyond the rank. */
__device__ static inline void load_b(const struct expand_work *w, int slab, int k0, int rows,
                                     unsigned char *dst)
{
    const int width = w->v.m.width, piece = w->lane % 8, col = slab * SLAB + piece * 8;
    const int c = col / width;
    const bool wide = width % 8 == 0;
    const uint16_t *chunk = wide && col < w->out ? lora_chunk(&w->v, c, w->p->fault) : NULL;
    for (int r = w->lane / 8; r < rows; r += 4) {
        unsigned char *at = dst + (r * 8 + (piece ^ (r & 7))) * 16;
        int j = k0 + r;
        if (wide) {
            bool valid = chunk && j < w->v.rank;
            const uint16_t *src = valid ? chunk + j * width + col - c * width
                                        : (const uint16_t *)w->p->a.y;
            cp_async16(at, src, valid);
            continue;
        }
        for (int e = 0; e < 8; e++) {
            int i = col + e;
            const uint16_t *one = j < w->v.rank && i < w->out
                                      ? lora_chunk(&w->v, i / width, w->p->fault) : NULL;
            ((uint16_t *)at)[e] = one ? one[j * width + i % width] : 0;
        }
    }
}

/* h of rows g and g + 8 of a token tile, ranks k .. k + 15, as it lies in the A operand. */
__device__ static inline void load_h(const struct expand_work *w, int m, int k, float h[8])
{
    const struct kn_lora *a = &w->p->a;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int r = m * 16 + w->lane / 4 + (i & 1) * 8, j = k + (i >> 1) * 8 + w->lane % 4 * 2;
        int64_t row = w->seg->h0 + (int64_t)(w->tok0 + r - w->seg->tok0) * w->seg->rank_max;
        const float *src = a->h + a->n_parts * row + (int64_t)w->part * w->seg->rank_max + j;
        h[2 * i] = r < w->n_tok && j < w->v.rank ? src[0] : 0;
        h[2 * i + 1] = r < w->n_tok && j + 1 < w->v.rank ? src[1] : 0;
    }
}

/* acc [16 tokens, 64 features] += h B over 16 ranks; h goes in as two bf16, high and low. */
__device__ static inline void expand_mma(float acc[SLAB / 8][4], const float h[8],
                                         const unsigned char *b, int lane)
{
    const int r = lane & 15;
    uint32_t hi[4], lo[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        hi[i] = bf16_pack(h[2 * i], h[2 * i + 1]);
        lo[i] = bf16_pack(h[2 * i] - bf16_lo(hi[i]), h[2 * i + 1] - bf16_hi(hi[i]));
    }
#pragma unroll
    for (int n = 0; n < SLAB / 8; n += 2) {
        uint32_t f[4];
        ldmatrix_trans(f, b + (r * 8 + ((n + (lane >> 4)) ^ (r & 7))) * 16);
        mma_bf16(acc[n], hi, f);
        mma_bf16(acc[n], lo, f);
        mma_bf16(acc[n + 1], hi, f + 2);
        mma_bf16(acc[n + 1], lo, f + 2);
    }
}

/*
 * y in the order of its lanes: of the pair of 8-column tiles 2i and 2i + 1, an even t has columns
 * 4 (t / 2) .. + 3 of the first, an odd one those of the second, so that four lanes read 32 bytes
 * in a row. [pair][row g, row g + 8].
 */
struct expand_y {
    uint2 v[SLAB / 16][2];
};

__device__ static inline uint16_t *y_at(const struct expand_work *w, int m, int slab, int pair,
                                        int row, int *col)
{
    const struct kn_lora *a = &w->p->a;
    const int t = w->lane % 4;
    *col = slab * SLAB + (2 * pair + (t & 1)) * 8 + (t >> 1) * 4;
    return (uint16_t *)a->y + (w->tok0 + m * 16 + w->lane / 4 + row * 8) * a->ldy +
           a->part[w->part].y_col + *col;
}

__device__ static inline void load_y(const struct expand_work *w, int m, int slab,
                                     struct expand_y *y)
{
#pragma unroll
    for (int i = 0; i < SLAB / 16; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int col;
            const uint16_t *at = y_at(w, m, slab, i, r, &col);
            y->v[i][r] = make_uint2(0, 0);
            if (m * 16 + w->lane / 4 + r * 8 >= w->n_tok)
                continue;
            if (w->p->aligned && col + 4 <= w->out) {
                y->v[i][r] = *(const uint2 *)at;
                continue;
            }
            for (int e = 0; e < 4; e++)
                if (col + e < w->out)
                    (e < 2 ? y->v[i][r].x : y->v[i][r].y) |= (uint32_t)at[e] << (e & 1) * 16;
        }
}

/* y = y + scale * acc, rounded once. */
__device__ static inline void store_y(const struct expand_work *w, int m, int slab,
                                      const struct expand_y *y, const float acc[SLAB / 8][4])
{
    const bool odd = w->lane & 1;
#pragma unroll
    for (int i = 0; i < SLAB / 16; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float *a = acc[2 * i] + 2 * r, *b = acc[2 * i + 1] + 2 * r;
            float x0 = __shfl_xor_sync(FULL_MASK, odd ? a[0] : b[0], 1);
            float x1 = __shfl_xor_sync(FULL_MASK, odd ? a[1] : b[1], 1);
            float v0 = odd ? x0 : a[0], v1 = odd ? x1 : a[1];
            float v2 = odd ? b[0] : x0, v3 = odd ? b[1] : x1;
            const uint2 old = y->v[i][r];
            uint2 sum = make_uint2(bf16_pack(bf16_lo(old.x) + w->v.scale * v0,
                                             bf16_hi(old.x) + w->v.scale * v1),
                                   bf16_pack(bf16_lo(old.y) + w->v.scale * v2,
                                             bf16_hi(old.y) + w->v.scale * v3));
            int col;
            uint16_t *at = y_at(w, m, slab, i, r, &col);
            if (m * 16 + w->lane / 4 + r * 8 >= w->n_tok)
                continue;
            if (w->p->aligned && col + 4 <= w->out) {
                *(uint2 *)at = sum;
                continue;
            }
            for (int e = 0; e < 4; e++)
                if (col + e < w->out)
                    at[e] = (uint16_t)((e < 2 ? sum.x : sum.y) >> (e & 1) * 16);
        }
}

__device__ static inline void clear(float acc[SLAB / 8][4])
{
#pragma unroll
    for (int n = 0; n < SLAB / 8; n++)
        acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
}

/* The segment's token tile, and the adapter's B for the warp's part; false: nothing to do. */
__device__ static inline bool start_expand(struct expand_work *w, int tile)
{
    const struct kn_lora *a = &w->p->a;
    int seg, tok;
    if (!lora_find_tile(w->p, tile, (int)blockIdx.y, &seg, &tok))
        return false;
    w->seg = &a->batch.segs[seg];
    w->tok0 = w->seg->tok0 + tok;
    w->n_tok = lora_is_ours(w->p, w->seg) ? min(tile, w->seg->n_tok - tok) : 0;
    const int task = (int)(blockIdx.x * EXPAND_WARPS + threadIdx.x / 32);
    if (w->n_tok <= 0 || !find_slab(task, w))
        return false;
    if (!lora_find(&a->pool, a->layer, a->batch.block_ids + w->seg->block0,
                   a->part[w->part].module, w->seg->rank_max, true, w->p->fault, &w->v))
        return false;
    w->steps = (w->v.rank + 15) / 16;
    return true;
}

/* Many tokens: a warp keeps its slab of B and walks the tile's tokens, y and h one step ahead. */
#define LONG_TILE 128

__global__ static void __launch_bounds__(EXPAND_WARPS * 32) expand_kernel(
    const __grid_constant__ struct lora_launch p)
{
    DYNAMIC_SMEM(smem);
    struct expand_work w;
    cuda_allow_next();
    w.p = &p;
    w.lane = (int)threadIdx.x % 32;
    w.b = smem + threadIdx.x / 32 * p.smem_rows * SLAB * 2;
    if (!start_expand(&w, LONG_TILE)) {
        cuda_wait_prior();
        return;
    }
    load_b(&w, w.slab, 0, w.steps * 16, w.b);
    cp_async_commit();
    cuda_wait_prior();
    struct expand_y y, next_y;
    float next_h[8];
    load_h(&w, 0, 0, next_h);
    load_y(&w, 0, w.slab, &next_y);
    cp_async_wait<0>();
    __syncwarp();
    for (int m = 0; m * 16 < w.n_tok; m++) {
        float acc[SLAB / 8][4];
        clear(acc);
        y = next_y;
        if ((m + 1) * 16 < w.n_tok)
            load_y(&w, m + 1, w.slab, &next_y);
        for (int s = 0; s < w.steps; s++) {
            float h[8];
#pragma unroll
            for (int i = 0; i < 8; i++)
                h[i] = next_h[i];
            if (s + 1 < w.steps)
                load_h(&w, m, (s + 1) * 16, next_h);
            else
                load_h(&w, m + 1, 0, next_h);
            expand_mma(acc, h, w.b + s * UNIT_BYTES, w.lane);
        }
        store_y(&w, m, w.slab, &y, acc);
    }
}

/* ---- host ------------------------------------------------------------------------------ */

#define LONG_STEP 512           /* rows of x from which tiles are taller */

static const char *fault_of(const struct kn_lora *a)
{
    const struct kn_lora_batch *b = &a->batch;
    if (!a->h || !b->segs || !b->block_ids || a->in < 0 || a->n_parts < 1 || a->n_parts > 3)
        return "null pointer or bad part count";
    if (!cuda_pool_valid(&a->pool, a->layer))
        return "bad pool, or the layer is outside of it";
    for (int p = 0; p < a->n_parts; p++)
        if ((unsigned)a->part[p].module >= KN_MODULES || a->part[p].out <= 0 ||
            a->part[p].y_col < 0)
            return "bad part";
    if (b->max_seg_tok < 0 || b->max_rank < 0 || b->max_seg_tok > b->n_tok)
        return "bad host hints";
    return NULL;
}

/* Fills the launch; n_active 0 means that there is nothing to do. */
static lm_status prepare(struct cuda_stream *st, const struct kn_lora *a, const char *op,
                         struct lora_launch *p)
{
    *p = lora_launch();
    if (a->batch.n_segs <= 0)
        return a->batch.n_segs == 0 ? LM_OK : cuda_refuse(op, "negative segment count");
    const char *fault = fault_of(a);
    if (fault)
        return cuda_refuse(op, fault);
    p->a = *a;
    p->fault = st->dev->fault;
    if (a->batch.max_rank == 0 || a->batch.max_seg_tok == 0)
        return LM_OK;
    for (int i = 0; i < a->n_parts; i++) {
        const struct kn_lora_load *load = &a->batch.load[a->part[i].module];
        if (load->rank_sum <= 0 && load->rank_tok <= 0)
            continue;
        p->slabs[p->n_active] = LM_DIV_UP(a->part[i].out, SLAB);
        p->active[p->n_active++] = i;
    }
    return LM_OK;
}

typedef struct shrink_shape<2, 1, 8, 1> shrink_long;    /* rank 8 and below */
typedef struct shrink_shape<2, 4, 2, 1> shrink_wide;

template <class S> static lm_status launch_shrink(struct cuda_stream *st, struct lora_launch *p)
{
    dim3 grid((unsigned)LM_DIV_UP(p->a.batch.max_rank, S::NG * 8), (unsigned)p->n_active,
              lora_token_tiles(p, S::MT * 16));
    return cuda_launch(st, "lora_shrink", shrink_kernel<S>, grid, dim3(SHRINK_WARPS * 32), S::SMEM,
                       *p);
}

extern "C" lm_status cuda_op_lora_shrink(kn_stream *s, const struct kn_lora *a)
{
    struct cuda_stream *st = cuda_stream_of(s);
    struct lora_launch p;
    if (a->batch.n_segs > 0 && (!a->x || (a->batch.n_tok > 1 && a->ldx < a->in)))
        return cuda_refuse("lora_shrink", "no x, or a row stride shorter than a row");
    lm_status rc = prepare(st, a, "lora_shrink", &p);
    if (rc != LM_OK || p.n_active == 0)
        return rc;
    p.aligned = a->ldx % 8 == 0 && (uintptr_t)a->x % 16 == 0;
    if (a->batch.n_tok <= LONG_STEP)
        return cuda_lora_shrink_few(st, &p);
    return a->batch.max_rank <= 8 ? launch_shrink<shrink_long>(st, &p)
                                  : launch_shrink<shrink_wide>(st, &p);
}

/* Bytes of B that a block keeps of so many rank rows. */
static size_t stationary_bytes(int ranks)
{
    return (size_t)(EXPAND_WARPS * LM_DIV_UP(ranks, 16) * 16 * SLAB * 2);
}

/* The widest adapters whose B a block may keep on this device. */
static int stationary_max(const struct cuda_device *d)
{
    const int fit = (int)(d->smem_block / stationary_bytes(16)) * 16;
    return LM_MIN(fit, STATIONARY_MAX);
}

static lm_status launch_expand(struct cuda_stream *st, struct lora_launch p)
{
    int tasks = 0;
    for (int i = 0; i < p.n_active; i++)
        tasks += p.slabs[i];
    dim3 grid((unsigned)LM_DIV_UP(tasks, EXPAND_WARPS), lora_token_tiles(&p, LONG_TILE));
    p.smem_rows = LM_MIN(LM_DIV_UP(p.a.batch.max_rank, 16) * 16, p.rank_to);
    return cuda_launch(st, "lora_expand", expand_kernel, grid, dim3(EXPAND_WARPS * 32),
                       stationary_bytes(p.smem_rows), p);
}

/* Does every row of y, at every part, allow loads of `unit` elements? */
static bool y_aligned(const struct kn_lora *a, int unit)
{
    bool aligned = a->ldy % unit == 0 && (uintptr_t)a->y % 16 == 0;
    for (int i = 0; i < a->n_parts; i++)
        aligned = aligned && a->part[i].y_col % unit == 0;
    return aligned;
}

extern "C" lm_status cuda_op_lora_expand(kn_stream *s, const struct kn_lora *a)
{
    struct cuda_stream *st = cuda_stream_of(s);
    struct lora_launch p;
    if (a->batch.n_segs > 0 && !a->y)
        return cuda_refuse("lora_expand", "no y");
    lm_status rc = prepare(st, a, "lora_expand", &p);
    if (rc != LM_OK || p.n_active == 0)
        return rc;
    const int widest = a->batch.n_tok <= LONG_STEP ? 0 : stationary_max(st->dev);
    if (widest > 0) {
        p.rank_from = 0, p.rank_to = widest;
        p.aligned = y_aligned(a, 4);
        rc = launch_expand(st, p);
    }
    if (rc != LM_OK || a->batch.max_rank <= widest)
        return rc;
    p.rank_from = widest + 1, p.rank_to = INT_MAX;
    p.aligned = y_aligned(a, 8);
    return cuda_lora_expand_few(st, &p);
}

template <class S> static cudaError_t allow_shrink(void)
{
    return cudaFuncSetAttribute(shrink_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                S::SMEM);
}

extern "C" cudaError_t cuda_lora_init(const struct cuda_device *d)
{
    cudaError_t e = allow_shrink<shrink_long>();
    if (e == cudaSuccess)
        e = allow_shrink<shrink_wide>();
    if (e == cudaSuccess)
        e = cuda_lora_few_init();
    if (e == cudaSuccess)
        e = cudaFuncSetAttribute(expand_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 (int)stationary_bytes(stationary_max(d)));
    return e;
}
