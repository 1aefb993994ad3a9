/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lora.cu - shrink and expand for many adapters of many ranks, straight from the pool's cells.
 *
 * Both run on tensor cores with tokens as the 16 rows of a tile: a decode step's single token
 * wastes 15 of them, which costs nothing where memory is the limit, and the same instructions in
 * the same order serve a prefill's hundreds, so a token's result does not depend on how many others
 * share its adapter. Work follows each module's true rank, to the next 8 rows.
 *
 * Shrink: h = x A^T. A block takes one token tile, one part and NG * 8 rows of A; its eight warps
 * deal out the features, 32 at a time, and are added up in shared memory in order. The order of
 * features inside a product is ours to choose, so each lane loads 16 bytes of A and of x at a time
 * and never shuffles (see feature_mma()).
 *
 * Expand: y += scale h B. A warp takes 64 output features of one part: its rows of B come by
 * cp.async into shared memory, before the wait for the shrink, and are transposed on the way to
 * registers by ldmatrix. h is float32 and goes in as the sum of two bf16, high and low, in two
 * products.
 *
 * Geometry: token tiles are a bound from n_tok and n_segs; blocks without work leave early.
 */
#include "kernels/cuda/lora.cuh"

/* ---- shrink ---------------------------------------------------------------------------- */

#define SHRINK_WARPS 8
#define SHRINK_CHUNKS 256       /* chunk addresses kept in shared memory */

/* Where this block works. */
struct shrink_work {
    const struct lora_launch *p;
    const struct kn_lora_seg *seg;
    int tok0, n_tok;            /* tile's first row of x; rows of it */
    int j0;                     /* first rank row */
    struct lora_view v;
    const uint16_t **chunks;    /* in shared memory */
    bool wide;                  /* A allows 16-byte loads */
    int pieces, n_blocks;       /* 32-feature blocks a chunk, and in all */
};

/* Eight features of A's row and where they are in x. */
template <int MT, int NG> struct shrink_load {
    uint4 w[NG];
    int feature, n;             /* x's features feature .. feature + n - 1 */
};

template <int MT, int NG>
__device__ static inline void load_weights(const struct shrink_work *k, int block, int lane,
                                           struct shrink_load<MT, NG> *l)
{
    const int width = k->v.m.width, c = block / k->pieces;
    const int off = (block - c * k->pieces) * 32 + lane % 4 * 8;
    const bool any = block < k->n_blocks && off < width;
    const uint16_t *chunk = NULL;
    if (any)
        chunk = c < SHRINK_CHUNKS ? k->chunks[c] : lora_chunk(&k->v, c, k->p->fault);
    l->feature = c * width + off;
    l->n = chunk ? min(min(width - off, 8), k->p->a.in - l->feature) : 0;
#pragma unroll
    for (int i = 0; i < NG; i++) {
        int j = k->j0 + i * 8 + lane / 4;
        if (chunk && j < k->v.rank && k->wide)
            l->w[i] = load_once(chunk + j * width + off);
        else
            l->w[i] = load8(chunk + j * width + off, chunk && j < k->v.rank ? width - off : 0,
                            false);
    }
}

/* acc += x A^T over 32 features: lane (g, t) holds features 8t .. 8t+7 of row g, on both sides; two
 * products of 16 take features 8t .. 8t+3 and 8t+4 .. 8t+7 of every t. */
template <int MT, int NG>
__device__ static inline void feature_mma(float acc[MT][NG][4], const uint4 lo[MT],
                                          const uint4 hi[MT], const uint4 w[NG])
{
#pragma unroll
    for (int i = 0; i < NG; i++) {
        const uint32_t b0[2] = { w[i].x, w[i].y }, b1[2] = { w[i].z, w[i].w };
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const uint32_t a0[4] = { lo[m].x, hi[m].x, lo[m].y, hi[m].y };
            const uint32_t a1[4] = { lo[m].z, hi[m].z, lo[m].w, hi[m].w };
            mma_bf16(acc[m][i], a0, b0);
            mma_bf16(acc[m][i], a1, b1);
        }
    }
}

template <int MT, int NG, int U>
__device__ static inline void shrink_features(const struct shrink_work *k, float acc[MT][NG][4],
                                              int warp, int lane)
{
    const struct kn_lora *a = &k->p->a;
    const int g = lane / 4;
    struct shrink_load<MT, NG> next[U];
#pragma unroll
    for (int u = 0; u < U; u++)
        load_weights<MT, NG>(k, warp + u * SHRINK_WARPS, lane, &next[u]);
    cuda_wait_prior();
    for (int b = warp; b < k->n_blocks; b += U * SHRINK_WARPS) {
        struct shrink_load<MT, NG> now[U];
        uint4 lo[U][MT], hi[U][MT];
#pragma unroll
        for (int u = 0; u < U; u++) {
            now[u] = next[u];
#pragma unroll
            for (int m = 0; m < MT; m++) {
                int r = m * 16 + g;
                const uint16_t *x = (const uint16_t *)a->x + (k->tok0 + r) * a->ldx +
                                    now[u].feature;
                lo[u][m] = load8(x, r < k->n_tok ? now[u].n : 0, k->p->aligned && k->wide);
                hi[u][m] = load8(x + 8 * a->ldx, r + 8 < k->n_tok ? now[u].n : 0,
                                 k->p->aligned && k->wide);
            }
        }
#pragma unroll
        for (int u = 0; u < U; u++)
            load_weights<MT, NG>(k, b + (U + u) * SHRINK_WARPS, lane, &next[u]);
#pragma unroll
        for (int u = 0; u < U; u++)
            feature_mma<MT, NG>(acc, lo[u], hi[u], now[u].w);
    }
}

/* Adds the warps up in order; rows of h beyond the module's rank become zero. */
template <int MT, int NG>
__device__ static inline void shrink_write(const struct shrink_work *k, int part,
                                           float (*sum)[MT * 16][NG * 8], bool targeted)
{
    const struct kn_lora *a = &k->p->a;
    for (int i = (int)threadIdx.x; i < MT * 16 * NG * 8; i += SHRINK_WARPS * 32) {
        int r = i / (NG * 8), j = k->j0 + i % (NG * 8);
        if (r >= k->n_tok || j >= k->seg->rank_max)
            continue;
        float h = 0;
        if (targeted && j < k->v.rank)
            for (int w = 0; w < SHRINK_WARPS; w++)
                h += sum[w][r][i % (NG * 8)];
        int64_t row = k->seg->h0 + (int64_t)(k->tok0 + r - k->seg->tok0) * k->seg->rank_max;
        a->h[a->n_parts * row + (int64_t)part * k->seg->rank_max + j] = h;
    }
}

template <int MT, int NG, int U>
__global__ static void __launch_bounds__(SHRINK_WARPS * 32, MT == 1 ? 2 : 1) shrink_kernel(
    const __grid_constant__ struct lora_launch p)
{
    __shared__ const uint16_t *chunks[SHRINK_CHUNKS];
    __shared__ float sum[SHRINK_WARPS][MT * 16][NG * 8];
    const struct kn_lora *a = &p.a;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int part = p.active[blockIdx.y];
    struct shrink_work k;
    int seg, tok;
    cuda_allow_next();
    bool work = lora_find_tile(&p, MT * 16, (int)blockIdx.z, &seg, &tok);
    k.p = &p;
    k.v.rank = 0;
    k.j0 = (int)blockIdx.x * NG * 8;
    if (work) {
        k.seg = &a->batch.segs[seg];
        k.tok0 = k.seg->tok0 + tok;
        k.n_tok = min(MT * 16, k.seg->n_tok - tok);
        work = k.n_tok > 0 && k.j0 < k.seg->rank_max;
    }
    if (!work) {
        cuda_wait_prior();
        return;
    }
    bool targeted = lora_find(&a->pool, a->layer, a->batch.block_ids + k.seg->block0,
                              a->part[part].module, k.seg->rank_max, false, p.fault, &k.v);
    float acc[MT][NG][4] = {};
    if (targeted && k.j0 < k.v.rank) {
        const int n_chunks = (a->in + k.v.m.width - 1) / k.v.m.width;
        k.chunks = chunks;
        k.wide = k.v.m.width % 8 == 0;
        k.pieces = (k.v.m.width + 31) / 32;
        k.n_blocks = n_chunks * k.pieces;
        for (int c = (int)threadIdx.x; c < min(n_chunks, SHRINK_CHUNKS); c += SHRINK_WARPS * 32)
            chunks[c] = lora_chunk(&k.v, c, p.fault);
        __syncthreads();
        shrink_features<MT, NG, U>(&k, acc, warp, lane);
    }
    cuda_wait_prior();
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < NG; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                sum[warp][m * 16 + lane / 4 + e / 2 * 8][i * 8 + lane % 4 * 2 + e % 2] =
                    acc[m][i][e];
    __syncthreads();
    shrink_write<MT, NG>(&k, part, sum, targeted);
}

/* ---- expand ---------------------------------------------------------------------------- */

#define EXPAND_WARPS 4
#define SLAB 64                 /* output features a warp */

struct expand_work {
    const struct lora_launch *p;
    const struct kn_lora_seg *seg;
    struct lora_view v;
    int tok0, n_tok, part;
    int col0, out;              /* slab's first column of the part; columns of the part */
    unsigned char *b;           /* smem_rows rows of 128 bytes, pieces permuted */
};

/* Rows k0 .. of B for this slab, zeros beyond the rank; one group of copies. */
__device__ static inline void load_slab(const struct expand_work *w, int k0, int lane)
{
    const int width = w->v.m.width, piece = lane % 8, col = w->col0 + piece * 8;
    const int rows = min(w->p->smem_rows, (w->v.rank - k0 + 15) / 16 * 16);
    const bool wide = width % 8 == 0;
    const int c = col / width;
    const uint16_t *chunk = wide && col < w->out ? lora_chunk(&w->v, c, w->p->fault) : NULL;
    for (int r = lane / 8; r < rows; r += 4) {
        unsigned char *dst = w->b + (r * 8 + (piece ^ (r & 7))) * 16;
        int j = k0 + r;
        if (wide) {
            cp_async16(dst, chunk + (chunk ? j * width + col - c * width : 0),
                       chunk && j < w->v.rank);
            continue;
        }
        for (int e = 0; e < 8; e++) {
            int i = col + e;
            const uint16_t *one = j < w->v.rank && i < w->out
                                      ? lora_chunk(&w->v, i / width, w->p->fault) : NULL;
            ((uint16_t *)dst)[e] = one ? one[j * width + i % width] : 0;
        }
    }
    cp_async_commit();
}

/* h of rows g and g + 8 of a token tile, ranks k .. k + 15, as the A operand: high, low parts. */
__device__ static inline void load_h(const struct expand_work *w, int m, int k, int lane,
                                     uint32_t hi[4], uint32_t lo[4])
{
    const struct kn_lora *a = &w->p->a;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int r = m * 16 + lane / 4 + (i & 1) * 8, j = k + (i >> 1) * 8 + lane % 4 * 2;
        int64_t row = w->seg->h0 + (int64_t)(w->tok0 + r - w->seg->tok0) * w->seg->rank_max;
        const float *h = a->h + a->n_parts * row + (int64_t)w->part * w->seg->rank_max + j;
        float x = r < w->n_tok && j < w->v.rank ? h[0] : 0;
        float y = r < w->n_tok && j + 1 < w->v.rank ? h[1] : 0;
        hi[i] = bf16_pack(x, y);
        lo[i] = bf16_pack(x - bf16_lo(hi[i]), y - bf16_hi(hi[i]));
    }
}

template <int MT>
__device__ static inline void expand_rows(const struct expand_work *w, int k0,
                                          float acc[MT][SLAB / 8][4], int lane)
{
    const int end = min(k0 + w->p->smem_rows, w->v.rank);
    for (int k = k0; k < end; k += 16) {
        uint32_t hi[MT][4], lo[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
            load_h(w, m, k, lane, hi[m], lo[m]);
        const int r = k - k0 + (lane & 15);
#pragma unroll
        for (int n = 0; n < SLAB / 8; n += 2) {
            uint32_t b[4];
            ldmatrix_trans(b, w->b + (r * 8 + ((n + (lane >> 4)) ^ (r & 7))) * 16);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_bf16(acc[m][n], hi[m], b);
                mma_bf16(acc[m][n], lo[m], b);
                mma_bf16(acc[m][n + 1], hi[m], b + 2);
                mma_bf16(acc[m][n + 1], lo[m], b + 2);
            }
        }
    }
}

/* y += scale * acc, two neighbouring columns a lane. */
__device__ static inline void add_pair(const struct expand_work *w, int r, int col, float x,
                                       float y)
{
    const struct kn_lora *a = &w->p->a;
    if (r >= w->n_tok || col >= w->out)
        return;
    uint16_t *at = (uint16_t *)a->y + (w->tok0 + r) * a->ldy + a->part[w->part].y_col + col;
    const bool both = col + 1 < w->out;
    if (w->p->aligned && both) {
        uint32_t old = *(const uint32_t *)at;
        *(uint32_t *)at = bf16_pack(bf16_lo(old) + w->v.scale * x, bf16_hi(old) + w->v.scale * y);
        return;
    }
    uint32_t old = at[0] | (uint32_t)(both ? at[1] : 0) << 16;
    uint32_t sum = bf16_pack(bf16_lo(old) + w->v.scale * x, bf16_hi(old) + w->v.scale * y);
    at[0] = (uint16_t)sum;
    if (both)
        at[1] = (uint16_t)(sum >> 16);
}

/* Which part and slab warp `slab` of the row of all slabs is; false beyond its end. */
__device__ static inline bool find_slab(const struct lora_launch *p, int slab,
                                        struct expand_work *w)
{
    for (int i = 0; i < p->n_active; i++)
        if (slab < p->slab0[i + 1]) {
            w->part = p->active[i];
            w->col0 = (slab - p->slab0[i]) * SLAB;
            w->out = p->a.part[w->part].out;
            return true;
        }
    return false;
}

template <int MT>
__global__ static void __launch_bounds__(EXPAND_WARPS * 32) expand_kernel(
    const __grid_constant__ struct lora_launch p)
{
    DYNAMIC_SMEM(smem);
    const struct kn_lora *a = &p.a;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    struct expand_work w;
    int seg, tok;
    cuda_allow_next();
    bool work = lora_find_tile(&p, MT * 16, (int)blockIdx.y, &seg, &tok) &&
                find_slab(&p, (int)blockIdx.x * EXPAND_WARPS + warp, &w);
    w.p = &p;
    w.b = smem + warp * p.smem_rows * SLAB * 2;
    if (work) {
        w.seg = &a->batch.segs[seg];
        w.tok0 = w.seg->tok0 + tok;
        w.n_tok = min(MT * 16, w.seg->n_tok - tok);
        work = w.n_tok > 0 &&
               lora_find(&a->pool, a->layer, a->batch.block_ids + w.seg->block0,
                         a->part[w.part].module, w.seg->rank_max, true, p.fault, &w.v);
    }
    if (!work) {
        cuda_wait_prior();
        return;
    }
    float acc[MT][SLAB / 8][4] = {};
    load_slab(&w, 0, lane);
    cuda_wait_prior();
    for (int k0 = 0; k0 < w.v.rank; k0 += p.smem_rows) {
        if (k0) {
            __syncwarp();
            load_slab(&w, k0, lane);
        }
        cp_async_wait<0>();
        __syncwarp();
        expand_rows<MT>(&w, k0, acc, lane);
    }
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < SLAB / 8; n++) {
            int r = m * 16 + lane / 4, col = w.col0 + n * 8 + lane % 4 * 2;
            add_pair(&w, r, col, acc[m][n][0], acc[m][n][1]);
            add_pair(&w, r + 8, col, acc[m][n][2], acc[m][n][3]);
        }
}

/* ---- host ------------------------------------------------------------------------------ */

#define LONG_STEP 512           /* rows of x from which tiles are taller */
#define SMEM_ROWS 64

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
        p->active[p->n_active++] = i;
        p->slab0[p->n_active] = p->slab0[p->n_active - 1] + LM_DIV_UP(a->part[i].out, SLAB);
    }
    return LM_OK;
}

static unsigned token_tiles(struct lora_launch *p, int tile)
{
    const struct kn_lora_batch *b = &p->a.batch;
    p->one_tile = b->max_seg_tok <= tile;
    return (unsigned)(p->one_tile ? b->n_segs : b->n_tok / tile + b->n_segs);
}

template <int MT, int NG, int U>
static lm_status launch_shrink(struct cuda_stream *st, struct lora_launch *p)
{
    dim3 grid((unsigned)LM_DIV_UP(p->a.batch.max_rank, NG * 8), (unsigned)p->n_active,
              token_tiles(p, MT * 16));
    return cuda_launch(st, "lora_shrink", shrink_kernel<MT, NG, U>, grid,
                       dim3(SHRINK_WARPS * 32), 0, *p);
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
        return launch_shrink<1, 1, 4>(st, &p);
    return a->batch.max_rank <= 8 ? launch_shrink<2, 1, 4>(st, &p)
                                  : launch_shrink<2, 4, 2>(st, &p);
}

template <int MT> static lm_status launch_expand(struct cuda_stream *st, struct lora_launch *p)
{
    dim3 grid((unsigned)LM_DIV_UP(p->slab0[p->n_active], EXPAND_WARPS),
              token_tiles(p, MT * 16));
    p->smem_rows = LM_MIN(SMEM_ROWS, LM_DIV_UP(p->a.batch.max_rank, 16) * 16);
    return cuda_launch(st, "lora_expand", expand_kernel<MT>, grid, dim3(EXPAND_WARPS * 32),
                       (size_t)(EXPAND_WARPS * p->smem_rows * SLAB * 2), *p);
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
    p.aligned = a->ldy % 2 == 0 && (uintptr_t)a->y % 4 == 0;
    for (int i = 0; i < a->n_parts; i++)
        p.aligned = p.aligned && a->part[i].y_col % 2 == 0;
    return a->batch.n_tok <= LONG_STEP ? launch_expand<1>(st, &p) : launch_expand<4>(st, &p);
}

extern "C" cudaError_t cuda_lora_init(void)
{
    return cudaSuccess;         /* nothing here uses more than 48 KiB of shared memory */
}
