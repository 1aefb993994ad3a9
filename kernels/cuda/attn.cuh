/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attn.cuh - what the kernels that touch KV blocks share.
 *
 * A KV block of one layer holds, for each kv head in turn, K [block_tokens][head_dim] and then
 * V [block_tokens][head_dim], both bf16, or E4M3 if kn_pool.kv says so: EB is the bytes of an
 * element, 2 or 1. So the tokens of one block and head are one run of memory, and a row is
 * head_dim * EB / 16 pieces of 16 bytes. block_tokens is a power of two.
 *
 * In shared memory a tile is [key][head_dim], its pieces permuted within a row (tile_at) so that
 * the eight rows that ldmatrix reads at once lie in eight different bank groups.
 *
 * E4M3 is widened (exactly, prim.cuh) where it meets a product: decode makes float16 of fragments
 * on their way from shared memory to registers, prefill bf16 of whole tiles within shared memory,
 * once for all of a block's rows.
 *
 * Slots that were never written may hold anything, NaN included: rows outside of a sequence's
 * visible range are not read but filled with zeros, and their scores are masked.
 */
#ifndef LORAMILL_KERNELS_ATTN_CUH
#define LORAMILL_KERNELS_ATTN_CUH

#include "kernels/cuda/prim.cuh"

/* X(head_dim): the instances. Others are LM_UNSUPPORTED. */
#define CUDA_HEAD_DIMS(X) X(16) X(32) X(64) X(80) X(96) X(112) X(128) X(192) X(256)

#define LOG2_E 1.4426950408889634f

/* Where piece `piece` of row `key` lies in a tile, in bytes. */
template <int HD, int EB = 2> __device__ static inline int tile_at(int key, int piece)
{
    constexpr int P = HD * EB / 16;
    constexpr int SHIFT = P % 8 == 0 ? 0 : P % 4 == 0 ? 1 : 2;
    constexpr int MASK = P % 8 == 0 ? 7 : P % 4 == 0 ? 3 : P % 2 == 0 ? 1 : 0;
    static_assert(HD % 16 == 0, "rows are whole pieces");
    return (key * P + (piece ^ ((key >> SHIFT) & MASK))) * 16;
}

struct attn_launch {
    struct kn_attention a;
    int32_t *fault;
    int bt_shift;               /* log2(block_tokens) */
    float scale_log2;           /* scale * log2(e): weights are 2^x */
    /* decode */
    int row_tiles;              /* ceil(group / 16) */
    int want_splits, cap_splits;        /* see decode_splits() */
    int alone_tiles;            /* rows of up to so many are a warp's, others a block's */
    float *part;                /* [item][cap_splits][rows_cap][head_dim] unnormalised outputs */
    float2 *part_ml;            /* [item][cap_splits][rows_cap] maximum and sum */
    unsigned *arrived;          /* [item] */
};

/* Bytes from the start of a block to K of this head; V follows block_tokens rows later. */
template <int EB>
__device__ static inline int64_t kv_head_at(const struct kn_attention *a, int kv_head)
{
    return (int64_t)kv_head * 2 * a->block_tokens * a->head_dim * EB;
}

/* One sequence's visible keys for query rows [first query position .. last]: the first position
 * that any of them sees. */
__device__ static inline int first_visible(const struct kn_attention *a, int pos)
{
    return a->window > 0 ? max(0, pos - a->window + 1) : 0;
}

/* Block id of a position, checked; a bad one is reported and replaced by block 0. */
__device__ static inline int block_of(const struct attn_launch *p, const int32_t *table, int pos)
{
    int id = table[pos >> p->bt_shift];
    if ((unsigned)id >= (unsigned)p->a.pool.num_blocks) {
        cuda_report(p->fault, CUDA_FAULT_BLOCK);
        return 0;
    }
    return id;
}

/* Once a device: kernels that use more than 48 KiB of shared memory must ask for it. */
cudaError_t cuda_attn_decode_init(const struct cuda_device *d);
cudaError_t cuda_attn_prefill_init(void);
/* Where the device is of the kind they are for. */
cudaError_t cuda_attn_wgmma_init(void);
cudaError_t cuda_attn_tma_init(void);

lm_status cuda_attn_decode(struct cuda_stream *st, const struct attn_launch *p, int max_tiles);
lm_status cuda_attn_prefill(struct cuda_stream *st, const struct attn_launch *p);
/* The same on Hopper, for the head sizes that fit. */
bool cuda_attn_wgmma_fits(const struct cuda_stream *st, const struct attn_launch *p);
lm_status cuda_attn_wgmma(struct cuda_stream *st, const struct attn_launch *p);
/* The same with a warp of its own for copies, for bf16 pools in blocks of 8 tokens and more. */
bool cuda_attn_tma_fits(const struct cuda_stream *st, const struct attn_launch *p);
lm_status cuda_attn_tma(struct cuda_stream *st, const struct attn_launch *p);

/*
 * How a decode row's keys are divided, from its own length and the batch bucket only, so that
 * neighbours change nothing: `tiles` tiles of 16 keys give this many splits. Enough to fill the
 * device (want), none shorter than 16 tiles; never longer than 128 tiles while the cap allows.
 * Rows that are a warp's are not divided.
 */
#define DECODE_MIN_TILES 16
#define DECODE_MAX_TILES 128

__host__ __device__ static inline int decode_splits(const struct attn_launch *p, int tiles)
{
    if (tiles <= p->alone_tiles)
        return 1;
    int fill = (tiles + DECODE_MIN_TILES - 1) / DECODE_MIN_TILES;
    int longest = (tiles + DECODE_MAX_TILES - 1) / DECODE_MAX_TILES;
    int n = fill < p->want_splits ? fill : p->want_splits;
    n = n > longest ? n : longest;
    n = n < p->cap_splits ? n : p->cap_splits;
    if (n <= 1)
        return 1;
    int per = (tiles + n - 1) / n;
    return (tiles + per - 1) / per;     /* no empty ones */
}

/* How many kv heads a warp takes in turn where rows are a warp's: about 8 tiles' worth. */
#define DECODE_RUN_TILES 8

__host__ __device__ static inline int decode_run(int tiles)
{
    int n = 1;
    while (n < DECODE_RUN_TILES && n * 2 * tiles <= DECODE_RUN_TILES)
        n *= 2;
    return n;
}

#endif
