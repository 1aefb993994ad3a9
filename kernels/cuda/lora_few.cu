/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lora_few.cu - shrink and expand for steps of few tokens: gather matrix-vector products.
 *
 * A decode step reads each adapter for one token or a handful, so bytes and latency are all there
 * is. Tensor cores would spend most of their instructions on empty rows (measured: SPEED.md); plain
 * float32 arithmetic needs a shift or a mask and one multiply-add for each weight, a tenth of what
 * the memory takes. Weights go from the pool straight to registers, 16 bytes a lane, and as many of
 * them as registers allow are asked for before the wait for the kernel in front.
 *
 * Shrink: a block takes up to T tokens of one segment, one part and 8 rows of A; a thread owns
 * groups of 8 features. Expand: a warp takes up to T tokens and 256 output features, 8 a lane; h of
 * those tokens goes through shared memory. Each result is summed in an order that depends on the
 * adapter alone.
 *
 * Code that no layout of ours needs is kept small and out of line (loops over elements that are not
 * unrolled). These kernels run for 2 to 10 us and start cold: their instructions come from memory
 * like everything else, and 140 KB of them cost more than the adapter did (SPEED.md).
 */
#include "kernels/cuda/lora.cuh"

#define ROWS 8                  /* of A a block */
#define SHORT_ROW 6144          /* features up to which a block has 256 threads, else 512 */
#define FEW_CHUNKS 256          /* chunk addresses kept in shared memory */

/* acc += w * x over the eight elements of 16 bytes. */
__device__ static inline float dot8(const uint4 w, const uint4 x, float acc)
{
    acc = fmaf(bf16_lo(w.x), bf16_lo(x.x), acc);
    acc = fmaf(bf16_hi(w.x), bf16_hi(x.x), acc);
    acc = fmaf(bf16_lo(w.y), bf16_lo(x.y), acc);
    acc = fmaf(bf16_hi(w.y), bf16_hi(x.y), acc);
    acc = fmaf(bf16_lo(w.z), bf16_lo(x.z), acc);
    acc = fmaf(bf16_hi(w.z), bf16_hi(x.z), acc);
    acc = fmaf(bf16_lo(w.w), bf16_lo(x.w), acc);
    return fmaf(bf16_hi(w.w), bf16_hi(x.w), acc);
}

/* ---- shrink ---------------------------------------------------------------------------- */

struct few_shrink {
    const struct lora_launch *p;
    const struct kn_lora_seg *seg;
    struct lora_view v;
    int tok0, n_tok, j0, rows;  /* rows of A here, at most ROWS */
    const uint16_t **chunks;
    int groups, n_groups;       /* of 8 features: a chunk, in all */
    bool wide;
};

/* Group i of features: its place in A, and in x. */
struct feature_group {
    const uint16_t *a;          /* row j0's; NULL beyond the end */
    int feature, n, left;       /* x's features; how many, of x and of the chunk's row */
};

__device__ static inline struct feature_group group_at(const struct few_shrink *k, int i)
{
    struct feature_group g = { NULL, 0, 0, 0 };
    const int width = k->v.m.width, c = i / k->groups, off = (i - c * k->groups) * 8;
    if (i >= k->n_groups)
        return g;
    const uint16_t *chunk = c < FEW_CHUNKS ? k->chunks[c] : lora_chunk(&k->v, c, k->p->fault);
    g.feature = c * width + off;
    g.left = min(8, width - off);
    g.n = min(g.left, k->p->a.in - g.feature);
    g.a = chunk ? chunk + k->j0 * width + off : NULL;
    return g;
}

__device__ static inline void load_rows(const struct few_shrink *k, const struct feature_group *g,
                                        uint4 w[ROWS])
{
    const int width = k->v.m.width;
#pragma unroll
    for (int j = 0; j < ROWS; j++)
        w[j] = make_uint4(0, 0, 0, 0);
    if (!g->a)
        return;
    if (__builtin_expect(k->wide, true)) {
#pragma unroll
        for (int j = 0; j < ROWS; j++)
            if (j < k->rows)
                w[j] = load_once(g->a + j * width);
        return;
    }
#pragma unroll 1
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < ROWS; j++)
            w[j] = push_element(w[j], i < g->left && j < k->rows ? g->a[j * width + i] : 0);
}

/* All threads together. */
template <int THREADS>
__device__ static inline void find_groups(struct few_shrink *k, const uint16_t **chunks)
{
    const int width = k->v.m.width, n_chunks = (k->p->a.in + width - 1) / width;
    k->chunks = chunks;
    k->wide = width % 8 == 0;
    k->groups = (width + 7) / 8;
    k->n_groups = n_chunks * k->groups;
    for (int c = (int)threadIdx.x; c < min(n_chunks, FEW_CHUNKS); c += THREADS)
        chunks[c] = lora_chunk(&k->v, c, k->p->fault);
    __syncthreads();
}

/* A thread's sums of its groups, U of them on their way at a time; it stands for A threads, whose
 * sums stay apart: the order of a sum is that of A * THREADS threads. */
template <int T, int U, int A, int THREADS>
__device__ static inline void sum_groups(const struct few_shrink *k, float acc[A][T][ROWS])
{
    static_assert(A == 1 || A == U, "the groups on their way are of a thread each");
    const struct kn_lora *a = &k->p->a;
    struct feature_group g[U];
    uint4 w[U][ROWS];
#pragma unroll
    for (int u = 0; u < U; u++) {
        g[u] = group_at(k, (int)threadIdx.x + u * THREADS);
        load_rows(k, &g[u], w[u]);
    }
    cuda_wait_prior();
    for (int i = (int)threadIdx.x; i < k->n_groups; i += U * THREADS) {
        uint4 x[U][T];
#pragma unroll
        for (int u = 0; u < U; u++)
#pragma unroll
            for (int t = 0; t < T; t++)
                x[u][t] = load8((const uint16_t *)a->x + (k->tok0 + t) * a->ldx + g[u].feature,
                                t < k->n_tok ? g[u].n : 0, k->p->aligned && k->wide);
#pragma unroll
        for (int u = 0; u < U; u++) {
#pragma unroll
            for (int t = 0; t < T; t++) {
                if (t >= k->n_tok)
                    break;
#pragma unroll
                for (int j = 0; j < ROWS; j++)
                    acc[u % A][t][j] = dot8(w[u][j], x[u][t], acc[u % A][t][j]);
            }
            g[u] = group_at(k, i + (U + u) * THREADS);
            load_rows(k, &g[u], w[u]);
        }
    }
}

/* Sums 8 values over the warp; lane l ends with the sum of value (l >> 2) & 7, bits reversed. */
__device__ static inline float warp_sum8(const float v[ROWS], int lane)
{
    float a[4], b[2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float keep = lane & 16 ? v[i + 4] : v[i], give = lane & 16 ? v[i] : v[i + 4];
        a[i] = keep + __shfl_xor_sync(FULL_MASK, give, 16);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float keep = lane & 8 ? a[i + 2] : a[i], give = lane & 8 ? a[i] : a[i + 2];
        b[i] = keep + __shfl_xor_sync(FULL_MASK, give, 8);
    }
    float keep = lane & 4 ? b[1] : b[0], give = lane & 4 ? b[0] : b[1];
    float c = keep + __shfl_xor_sync(FULL_MASK, give, 4);
    return quad_sum(c);
}

template <int T, int U, int A, int THREADS, int RESIDENT>
__global__ static void __launch_bounds__(THREADS, RESIDENT) shrink_few_kernel(
    const __grid_constant__ struct lora_launch p)
{
    __shared__ const uint16_t *chunks[FEW_CHUNKS];
    __shared__ float sum[A * THREADS / 32][T][ROWS];
    const struct kn_lora *a = &p.a;
    const int part = p.active[blockIdx.y], lane = (int)threadIdx.x % 32;
    struct few_shrink k;
    int seg, tok;
    cuda_allow_next();
    bool work = lora_find_tile(&p, T, (int)blockIdx.z, &seg, &tok);
    k.p = &p;
    k.v.rank = 0;
    k.j0 = (int)blockIdx.x * ROWS;
    if (work) {
        k.seg = &a->batch.segs[seg];
        k.tok0 = k.seg->tok0 + tok;
        k.n_tok = min(T, k.seg->n_tok - tok);
        work = k.n_tok > 0 && k.j0 < k.seg->rank_max;
    }
    if (!work) {
        cuda_wait_prior();
        return;
    }
    bool targeted = lora_find(&a->pool, a->layer, a->batch.block_ids + k.seg->block0,
                              a->part[part].module, k.seg->rank_max, false, p.fault, &k.v);
    k.rows = targeted ? min(ROWS, k.v.rank - k.j0) : 0;
    float acc[A][T][ROWS] = {};
    if (k.rows > 0) {
        find_groups<THREADS>(&k, chunks);
        sum_groups<T, U, A, THREADS>(&k, acc);
    }
    cuda_wait_prior();
#pragma unroll
    for (int i = 0; i < A * T; i++) {
        float s = warp_sum8(acc[i / T][i % T], lane);
        if (lane % 4 == 0)      /* the row whose bits 2, 1, 0 are the lane's bits 4, 3, 2 */
            sum[(i / T * THREADS + (int)threadIdx.x) / 32][i % T][lane >> 2] = s;
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < T * ROWS; i += THREADS) {
        int t = i / ROWS, j = k.j0 + i % ROWS;
        if (t >= k.n_tok || j >= k.seg->rank_max)
            continue;
        float h = 0;
        for (int w = 0; w < A * THREADS / 32; w++)
            h += sum[w][t][i % ROWS];
        int64_t row = k.seg->h0 + (int64_t)(k.tok0 + t - k.seg->tok0) * k.seg->rank_max;
        a->h[a->n_parts * row + (int64_t)part * k.seg->rank_max + j] = h;
    }
}

/* ---- expand ---------------------------------------------------------------------------- */

#define EXPAND_WARPS 4
#define COLS 256                /* output features a warp */
#define BATCH 8                 /* rank rows on their way; ROWS */

struct few_expand {
    const struct lora_launch *p;
    const struct kn_lora_seg *seg;
    struct lora_view v;
    int tok0, n_tok, part, out;
    int col;                    /* the lane's first column of the part */
    const uint16_t *b;          /* B's row 0 at col; NULL: beyond the part, or one by one */
};

/* Where B lies at the lane's columns, if it can be read 16 bytes at a time. */
__device__ static inline void find_b(struct few_expand *w)
{
    const int c = w->col / w->v.m.width;
    w->b = NULL;
    if (w->v.m.width % 8 == 0 && w->col < w->out) {
        const uint16_t *chunk = lora_chunk(&w->v, c, w->p->fault);
        w->b = chunk ? chunk + w->col - c * w->v.m.width : NULL;
    }
}

/* Row j at the lane's columns, where find_b() found them. */
__device__ static inline uint4 load_b(const struct few_expand *w, int j)
{
    return j < w->v.rank ? load_once(w->b + j * w->v.m.width) : make_uint4(0, 0, 0, 0);
}

/* Rows j0 .. j0 + 7; element by element where the layout asks for it, which none of our own does:
 * that part is for being small. */
__device__ static inline void load_b8(const struct few_expand *w, int j0, uint4 b[BATCH])
{
    const int width = w->v.m.width;
#pragma unroll
    for (int j = 0; j < BATCH; j++)
        b[j] = make_uint4(0, 0, 0, 0);
    if (__builtin_expect(w->b != NULL, true)) {
#pragma unroll
        for (int j = 0; j < BATCH; j++)
            b[j] = load_b(w, j0 + j);
        return;
    }
    if (w->col >= w->out)
        return;
#pragma unroll 1
    for (int i = w->col; i < w->col + 8; i++) {
        const uint16_t *chunk = i < w->out ? lora_chunk(&w->v, i / width, w->p->fault) : NULL;
#pragma unroll
        for (int j = 0; j < BATCH; j++)
            b[j] = push_element(b[j], chunk && j0 + j < w->v.rank
                                          ? chunk[(j0 + j) * width + i % width] : 0);
    }
}

__device__ static inline void add_row(float acc[8], const uint4 b, float h)
{
    acc[0] = fmaf(bf16_lo(b.x), h, acc[0]), acc[1] = fmaf(bf16_hi(b.x), h, acc[1]);
    acc[2] = fmaf(bf16_lo(b.y), h, acc[2]), acc[3] = fmaf(bf16_hi(b.y), h, acc[3]);
    acc[4] = fmaf(bf16_lo(b.z), h, acc[4]), acc[5] = fmaf(bf16_hi(b.z), h, acc[5]);
    acc[6] = fmaf(bf16_lo(b.w), h, acc[6]), acc[7] = fmaf(bf16_hi(b.w), h, acc[7]);
}

__device__ static inline uint16_t *few_y(const struct few_expand *w, int t)
{
    const struct kn_lora *a = &w->p->a;
    return (uint16_t *)a->y + (w->tok0 + t) * a->ldy + a->part[w->part].y_col + w->col;
}

/* y = y + scale * acc, rounded once. */
__device__ static inline void write_y(const struct few_expand *w, int t, const uint4 old,
                                      const float acc[8])
{
    const float s = w->v.scale;
    uint16_t *y = few_y(w, t);
    const uint4 sum = make_uint4(
        bf16_pack(bf16_lo(old.x) + s * acc[0], bf16_hi(old.x) + s * acc[1]),
        bf16_pack(bf16_lo(old.y) + s * acc[2], bf16_hi(old.y) + s * acc[3]),
        bf16_pack(bf16_lo(old.z) + s * acc[4], bf16_hi(old.z) + s * acc[5]),
        bf16_pack(bf16_lo(old.w) + s * acc[6], bf16_hi(old.w) + s * acc[7]));
    if (w->p->aligned && w->col + 8 <= w->out) {
        *(uint4 *)y = sum;
        return;
    }
    const uint32_t e[4] = { sum.x, sum.y, sum.z, sum.w };
    for (int i = 0; i < 8; i++)
        if (w->col + i < w->out)
            y[i] = (uint16_t)(e[i / 2] >> (i % 2 * 16));
}

/* Which part and columns task `index` is; false beyond the last. */
__device__ static inline bool find_columns(int index, struct few_expand *w)
{
    const struct lora_launch *p = w->p;
    for (int i = 0; i < p->n_active; i++) {
        if (index < p->slabs[i]) {
            w->part = p->active[i];
            w->out = p->a.part[w->part].out;
            w->col = index * COLS + (int)threadIdx.x % 32 * 8;
            return true;
        }
        index -= p->slabs[i];
    }
    return false;
}

/* Puts h of the warp's tokens into shared memory, [T][rank]. */
template <int T>
__device__ static inline void stage_h(const struct few_expand *w, float *h)
{
    const struct kn_lora *a = &w->p->a;
    for (int i = (int)threadIdx.x % 32; i < w->n_tok * w->v.rank; i += 32) {
        const int t = T == 1 ? 0 : i / w->v.rank, j = i - t * w->v.rank;
        int64_t row = w->seg->h0 + (int64_t)(w->tok0 + t - w->seg->tok0) * w->seg->rank_max;
        h[t * w->p->smem_rows + j] =
            a->h[a->n_parts * row + (int64_t)w->part * w->seg->rank_max + j];
    }
    __syncwarp();
}

template <int T>
__device__ static inline void expand_columns(const struct few_expand *w, float *h)
{
    float acc[T][8] = {};
    uint4 b[BATCH], y[T];
    load_b8(w, 0, b);
    cuda_wait_prior();
#pragma unroll
    for (int t = 0; t < T; t++)
        y[t] = load8(few_y(w, t), t < w->n_tok ? min(8, w->out - w->col) : 0, w->p->aligned);
    stage_h<T>(w, h);
    for (int j0 = 0; j0 < w->v.rank; j0 += BATCH) {
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const uint4 row = b[j];
            if (w->b)
                b[j] = load_b(w, j0 + BATCH + j);
#pragma unroll
            for (int t = 0; t < T; t++)
                if (t < w->n_tok && j0 + j < w->v.rank)
                    add_row(acc[t], row, h[t * w->p->smem_rows + j0 + j]);
        }
        if (!w->b)
            load_b8(w, j0 + BATCH, b);
    }
#pragma unroll
    for (int t = 0; t < T; t++)
        if (t < w->n_tok)
            write_y(w, t, y[t], acc[t]);
}

template <int T, int RESIDENT>
__global__ static void __launch_bounds__(EXPAND_WARPS * 32, RESIDENT) expand_few_kernel(
    const __grid_constant__ struct lora_launch p)
{
    DYNAMIC_SMEM(smem);
    const struct kn_lora *a = &p.a;
    struct few_expand w;
    int seg, tok;
    cuda_allow_next();
    w.p = &p;
    bool work = lora_find_tile(&p, T, (int)blockIdx.y, &seg, &tok) &&
                find_columns((int)(blockIdx.x * EXPAND_WARPS + threadIdx.x / 32), &w);
    if (work) {
        w.seg = &a->batch.segs[seg];
        w.tok0 = w.seg->tok0 + tok;
        w.n_tok = min(T, w.seg->n_tok - tok);
        work = w.n_tok > 0 && lora_is_ours(&p, w.seg) &&
               lora_find(&a->pool, a->layer, a->batch.block_ids + w.seg->block0,
                         a->part[w.part].module, w.seg->rank_max, true, p.fault, &w.v);
    }
    if (!work) {
        cuda_wait_prior();
        return;
    }
    find_b(&w);
    expand_columns<T>(&w, (float *)smem + threadIdx.x / 32 * T * p.smem_rows);
}

/* ---- host ------------------------------------------------------------------------------ */

template <int T, int U, int THREADS, int RESIDENT = 512 / THREADS, int A = 1>
static lm_status launch_shrink(struct cuda_stream *st, struct lora_launch *p)
{
    dim3 grid((unsigned)LM_DIV_UP(p->a.batch.max_rank, ROWS), (unsigned)p->n_active,
              lora_token_tiles(p, T));
    return cuda_launch(st, "lora_shrink", shrink_few_kernel<T, U, A, THREADS, RESIDENT>, grid,
                       dim3(THREADS), 0, *p);
}

lm_status cuda_lora_shrink_few(struct cuda_stream *st, struct lora_launch *p)
{
    const bool wide = p->a.in > SHORT_ROW;
    const int blocks = LM_DIV_UP(p->a.batch.max_rank, ROWS) * p->n_active * p->a.batch.n_segs;
    /* A third block an SM, each with half as much on its way, where two would leave a tail. For two
     * tokens it has half the threads, or registers would not do. */
    if (p->a.batch.max_seg_tok <= 2 && !wide && blocks > 2 * st->dev->sms &&
        blocks <= 3 * st->dev->sms)
        return p->a.batch.max_seg_tok == 1 ? launch_shrink<1, 1, 256, 3>(st, p)
                                           : launch_shrink<2, 2, 128, 3, 2>(st, p);
    if (p->a.batch.max_seg_tok == 1)
        return wide ? launch_shrink<1, 2, 512>(st, p) : launch_shrink<1, 2, 256>(st, p);
    if (p->a.batch.max_seg_tok == 2)
        return wide ? launch_shrink<2, 1, 512>(st, p) : launch_shrink<2, 1, 256>(st, p);
    return wide ? launch_shrink<4, 1, 512>(st, p) : launch_shrink<4, 1, 256>(st, p);
}

template <int T, int RESIDENT>
static lm_status launch_expand(struct cuda_stream *st, struct lora_launch *p, int blocks)
{
    dim3 grid((unsigned)blocks, lora_token_tiles(p, T));
    p->smem_rows = p->a.batch.max_rank;
    return cuda_launch(st, "lora_expand", expand_few_kernel<T, RESIDENT>, grid,
                       dim3(EXPAND_WARPS * 32),
                       (size_t)(EXPAND_WARPS * T * p->smem_rows) * sizeof(float), *p);
}

#define RANK_MAX 4096           /* whose h fits a warp's shared memory */

cudaError_t cuda_lora_few_init(void)
{
    return cudaFuncSetAttribute(expand_few_kernel<1, 6>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                EXPAND_WARPS * RANK_MAX * (int)sizeof(float));
}

/* A tile of tokens' blocks: each warp of one has a slab of columns. */
static int expand_blocks(struct lora_launch *p)
{
    int tasks = 0;
    for (int i = 0; i < p->n_active; i++) {
        p->slabs[i] = LM_DIV_UP(p->a.part[p->active[i]].out, COLS);
        tasks += p->slabs[i];
    }
    return LM_DIV_UP(tasks, EXPAND_WARPS);
}

lm_status cuda_lora_expand_few(struct cuda_stream *st, struct lora_launch *p)
{
    const struct kn_lora_batch *b = &p->a.batch;
    if (b->max_rank > RANK_MAX)
        return LM_UNSUPPORTED;
    const int blocks = expand_blocks(p), all = blocks * b->n_segs, sms = st->dev->sms;
    /* Four tokens' h of a rank up to 512 fit without asking for more shared memory. */
    if (b->max_rank > 512)
        return launch_expand<1, 6>(st, p, blocks);
    /* A seventh block an SM spills a little, which is less than a tail costs. */
    if (b->max_seg_tok == 1)
        return all > 6 * sms && all <= 7 * sms ? launch_expand<1, 7>(st, p, blocks)
                                               : launch_expand<1, 6>(st, p, blocks);
    return b->max_seg_tok == 2 ? launch_expand<2, 5>(st, p, blocks)
                               : launch_expand<4, 4>(st, p, blocks);
}
