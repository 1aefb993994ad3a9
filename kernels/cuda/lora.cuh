/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lora.cuh - finding an adapter's matrices in the pool (see struct kn_lora_matrix).
 *
 * The way is seg -> block id -> directory row -> block id of a chunk: four dependent loads. All of
 * it, and the weights themselves, is older than the kernel before, so it is done before
 * cuda_wait_prior() and hides behind that kernel's tail.
 *
 * A directory that makes no sense is reported and its segment left alone; the host then refuses the
 * step, so the base model's answer is never passed off as the adapter's.
 */
#ifndef LORAMILL_KERNELS_LORA_CUH
#define LORAMILL_KERNELS_LORA_CUH

#include "kernels/cuda/prim.cuh"

struct lora_launch {
    struct kn_lora a;
    int32_t *fault;
    int n_active;               /* parts that some adapter of the step targets */
    int active[3];
    int slabs[3];               /* expand: column slabs of each active part */
    bool aligned;               /* rows of x or y allow vector loads */
    bool one_tile;              /* every segment is one token tile: no search */
    int smem_rows;              /* expand: rank rows that a warp keeps in shared memory */
    int rank_from, rank_to;     /* expand: segments of other ranks are another launch's */
};

/* A matrix of one module of one adapter. */
struct lora_view {
    const struct kn_pool *pool;
    const int32_t *ids;         /* the adapter's block table */
    struct kn_lora_matrix m;
    int rank;
    float scale;
};

__device__ static inline const char *cell_at(const struct kn_pool *pool, const int32_t *ids,
                                             int cell, int32_t *fault)
{
    int id = ids[cell / pool->n_layers];
    if ((unsigned)id >= (unsigned)pool->num_blocks) {
        cuda_report(fault, CUDA_FAULT_ADAPTER);
        return NULL;
    }
    return cuda_pool_block(pool, cell % pool->n_layers, id);
}

__device__ static inline bool matrix_valid(const struct kn_lora_matrix *m, int rank,
                                           int64_t cell_bytes)
{
    if (m->width <= 0 || m->cell < 0 || m->offset < 0 || m->first_n < 0 || m->per_cell < 0 ||
        m->chunk_bytes < (int64_t)rank * m->width * 2 || (m->chunk_bytes | m->offset) % 16)
        return false;
    return m->offset + (int64_t)m->first_n * m->chunk_bytes <= cell_bytes &&
           (int64_t)m->per_cell * m->chunk_bytes <= cell_bytes;
}

/* False: not targeted, or damaged (reported). `b` picks B. */
__device__ static inline bool lora_find(const struct kn_pool *pool, int layer, const int32_t *ids,
                                        enum kn_module module, int rank_max, bool b,
                                        int32_t *fault, struct lora_view *v)
{
    const int per_cell = (int)(pool->block_bytes / (int64_t)sizeof(struct kn_lora_row));
    const char *cell = per_cell ? cell_at(pool, ids, layer / per_cell, fault) : NULL;
    if (!cell)
        return false;
    const struct kn_lora_entry *e =
        &((const struct kn_lora_row *)cell)[layer % per_cell].module[module];
    v->pool = pool;
    v->ids = ids;
    v->rank = e->rank;
    v->scale = e->scale;
    v->m = b ? e->b : e->a;
    if (v->rank == 0)
        return false;
    if (v->rank < 0 || v->rank > rank_max || !matrix_valid(&v->m, v->rank, pool->block_bytes)) {
        cuda_report(fault, CUDA_FAULT_ADAPTER);
        return false;
    }
    return true;
}

/* The [rank][width] elements of chunk c; NULL (reported) when the directory leads nowhere. */
__device__ static inline const uint16_t *lora_chunk(const struct lora_view *v, int c,
                                                    int32_t *fault)
{
    int cell = v->m.cell, at = v->m.offset + c * v->m.chunk_bytes;
    if (c >= v->m.first_n) {
        if (v->m.per_cell == 0) {
            cuda_report(fault, CUDA_FAULT_ADAPTER);
            return NULL;
        }
        c -= v->m.first_n;
        cell += 1 + c / v->m.per_cell;
        at = c % v->m.per_cell * v->m.chunk_bytes;
    }
    const char *p = cell_at(v->pool, v->ids, cell, fault);
    return p ? (const uint16_t *)(p + at) : NULL;
}

/* Token tile `index` of all segments' tiles of `tile` tokens: which segment, which of its tokens.
 * False beyond the last. All lanes of a warp together. */
__device__ static inline bool lora_find_tile(const struct lora_launch *p, int tile, int index,
                                             int *seg, int *tok)
{
    const struct kn_lora_batch *b = &p->a.batch;
    const int lane = (int)threadIdx.x % 32;
    *seg = index, *tok = 0;
    if (p->one_tile)
        return index < b->n_segs;
    int before = 0;
    for (int s0 = 0; s0 < b->n_segs; s0 += 32) {
        int s = s0 + lane, n = s < b->n_segs ? (b->segs[s].n_tok + tile - 1) / tile : 0, sum = n;
        for (int d = 1; d < 32; d *= 2) {
            int up = __shfl_up_sync(FULL_MASK, sum, d);
            sum += lane >= d ? up : 0;
        }
        unsigned reached = __ballot_sync(FULL_MASK, before + sum > index);
        if (reached) {
            int src = __ffs((int)reached) - 1;
            int first = before + __shfl_sync(FULL_MASK, sum - n, src);
            *seg = s0 + src;
            *tok = (index - first) * tile;
            return true;
        }
        before += __shfl_sync(FULL_MASK, sum, 31);
    }
    return false;
}

/* A segment's way is its own adapter's, whatever else the step has. */
__device__ static inline bool lora_is_ours(const struct lora_launch *p,
                                           const struct kn_lora_seg *seg)
{
    return seg->rank_max >= p->rank_from && seg->rank_max <= p->rank_to;
}

/* Token tiles that a step of these hints can have at most. */
static inline unsigned lora_token_tiles(struct lora_launch *p, int tile)
{
    const struct kn_lora_batch *b = &p->a.batch;
    p->one_tile = b->max_seg_tok <= tile;
    return (unsigned)(p->one_tile ? b->n_segs : b->n_tok / tile + b->n_segs);
}

/* Steps of few tokens, and of many what is too wide to keep in shared memory; the launch is
 * prepared but for geometry. */
lm_status cuda_lora_shrink_few(struct cuda_stream *st, struct lora_launch *p);
lm_status cuda_lora_expand_few(struct cuda_stream *st, struct lora_launch *p);
cudaError_t cuda_lora_few_init(void);

/* Seven elements move down, `e` comes last. */
__device__ static inline uint4 push_element(const uint4 v, uint32_t e)
{
    return make_uint4(v.x >> 16 | v.y << 16, v.y >> 16 | v.z << 16, v.z >> 16 | v.w << 16,
                      v.w >> 16 | e << 16);
}

/* Eight elements, zeros beyond n. */
__device__ static inline uint4 load8(const uint16_t *p, int n, bool aligned)
{
    if (n <= 0)
        return make_uint4(0, 0, 0, 0);
    if (aligned && n >= 8)
        return *(const uint4 *)p;
    uint4 v = make_uint4(0, 0, 0, 0);
#pragma unroll 1                /* rare: that the code is small is what counts */
    for (int i = 0; i < 8; i++)
        v = push_element(v, i < n ? p[i] : 0);
    return v;
}

#endif
