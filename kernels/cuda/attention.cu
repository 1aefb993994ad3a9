/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attention.cu - paged attention: what the host can check, and which kernels a step needs.
 *
 * Sequences with one query token go to attn_decode.cu, the others to attn_prefill.cu, or on Hopper
 * to attn_tma.cu (bf16, head_dim 64 and 128) or attn_wgmma.cu (E4M3, head_dim 128): the choice is
 * each sequence's own, so a mixed step launches both and each kernel passes over what is not its.
 *
 * Geometry comes from the host hints alone (n_seqs, n_tok, max_q, max_kv), so a captured graph
 * serves every step whose numbers do not exceed those of the capture.
 *
 * Scratch of a stream, from its start: arrival counters (zero between operations; whoever arrives
 * last puts his back to zero), then partial outputs. CUDA_SCRATCH_BYTES bounds how many splits a
 * batch bucket may have.
 */
#include "kernels/cuda/attn.cuh"

#define CTAS_PER_SM 2           /* decode blocks that fit at head_dim 128 */
#define MAX_SPLITS 64
#define PACK_UNITS 1024         /* rows and kv heads from which a warp each fills the device */
#define SPLIT_COST 0.05         /* a block's start and merge, in times of an unsplit block */

extern "C" size_t cuda_kv_block_bytes(kn_device *dev, enum kn_kv kv, int block_tokens,
                                      int kv_heads, int head_dim)
{
    (void)dev;
    size_t n = (size_t)2 * (size_t)block_tokens * (size_t)kv_heads * (size_t)head_dim *
               (kv == KN_KV_E4M3 ? 1 : 2);
    return LM_DIV_UP(n, 64) * 64;
}

extern "C" cudaError_t cuda_attention_init(const struct cuda_device *d)
{
    cudaError_t e = cuda_attn_decode_init(d);
    if (e == cudaSuccess)
        e = cuda_attn_prefill_init();
    if (e == cudaSuccess && d->cc == 90)
        e = cuda_attn_wgmma_init();
    return e == cudaSuccess && d->cc == 90 ? cuda_attn_tma_init() : e;
}

static int log2_of(int x)
{
    int n = 0;
    while (1 << n < x)
        n++;
    return n;
}

static const char *fault_of(const struct kn_attention *a)
{
    if (a->n_seqs < 0 || a->n_tok < 0 || !a->q_start || !a->kv_len || !a->block_table || !a->out ||
        !a->qkv)
        return "null pointer or negative count";
    if (a->q_heads <= 0 || a->kv_heads <= 0 || a->q_heads % a->kv_heads || a->head_dim <= 0 ||
        a->block_tokens <= 0 || a->max_q < 0 || a->max_kv < a->max_q)
        return "bad head shape";
    if (!cuda_pool_valid(&a->pool, a->layer) ||
        (int64_t)cuda_kv_block_bytes(NULL, a->pool.kv, a->block_tokens, a->kv_heads,
                                     a->head_dim) > a->pool.block_bytes)
        return "the pool's blocks are too small, or the layer is outside of it";
    if ((int64_t)LM_DIV_UP(a->max_kv, a->block_tokens) > a->table_ld)
        return "max_kv is longer than a block table";
    if (a->ld % 8 || (uintptr_t)a->qkv % 16 || (uintptr_t)a->out % 4)
        return "rows that are not 16-byte aligned";
    return NULL;
}

/* Blocks come in waves of `slots`; splitting in n makes a wave last 1/n, and more of them. */
static int cheapest_splits(int64_t items, int64_t slots)
{
    int best = 1;
    double least = 0;
    for (int n = 1; n <= MAX_SPLITS; n++) {
        double cost = (double)LM_DIV_UP(items * n, slots) * (1.0 / n + SPLIT_COST);
        if (n == 1 || cost < least)
            best = n, least = cost;
    }
    return best;
}

/* A row's splits may follow the bucket, not the number of its neighbours. Below the GEMM's first
 * bucket of eight they are 1, 2, 4 and 8: few sequences need many splits to fill the device. */
static int seq_bucket(int n)
{
    for (int b = 1; b <= 8; b *= 2)
        if (n <= b)
            return b;
    return cuda_bucket(n);
}

/* Splits for this bucket, and where partial results go. */
static void plan_splits(struct cuda_stream *st, struct attn_launch *p)
{
    const struct kn_attention *a = &p->a;
    const int group = a->q_heads / a->kv_heads;
    const int64_t items = (int64_t)seq_bucket(a->n_seqs) * a->kv_heads * p->row_tiles;
    const int64_t rows = items * LM_MIN(group, 16);
    const int64_t room = (int64_t)(CUDA_SCRATCH_BYTES - CUDA_COUNTER_BYTES);
    int64_t fit = room / (rows * (a->head_dim + 2) * (int64_t)sizeof(float));
    if ((size_t)items * sizeof(unsigned) > CUDA_COUNTER_BYTES)
        fit = 1;
    p->want_splits = cheapest_splits(items, (int64_t)st->dev->sms * CTAS_PER_SM);
    const int64_t units = (int64_t)cuda_bucket(a->n_seqs) * a->kv_heads * p->row_tiles;
    p->alone_tiles = units < PACK_UNITS ? 0 : DECODE_MIN_TILES;
    p->cap_splits = (int)LM_MAX(1, LM_MIN(fit, MAX_SPLITS));
    p->arrived = (unsigned *)st->scratch;
    p->part_ml = (float2 *)((char *)st->scratch + CUDA_COUNTER_BYTES);
    p->part = (float *)(p->part_ml + rows * p->cap_splits);
}

extern "C" lm_status cuda_op_attention(kn_stream *s, const struct kn_attention *a)
{
    struct cuda_stream *st = cuda_stream_of(s);
    if (a->n_seqs == 0 || a->n_tok == 0 || a->max_q == 0)
        return LM_OK;
    const char *fault = fault_of(a);
    if (fault)
        return cuda_refuse("attention", fault);
    if (a->block_tokens & (a->block_tokens - 1) || a->n_seqs > 65535)
        return LM_UNSUPPORTED;
    struct attn_launch p = {};
    p.a = *a;
    p.fault = st->dev->fault;
    p.bt_shift = log2_of(a->block_tokens);
    p.scale_log2 = a->scale * LOG2_E;
    p.row_tiles = LM_DIV_UP(a->q_heads / a->kv_heads, 16);
    plan_splits(st, &p);
    int keys = a->window > 0 ? LM_MIN(a->max_kv, a->window + 15) : a->max_kv;
    lm_status rc = cuda_attn_decode(st, &p, LM_DIV_UP(keys, 16));
    if (rc != LM_OK || a->max_q == 1)
        return rc;
    if (cuda_attn_tma_fits(st, &p)) {
        rc = cuda_attn_tma(st, &p);
        if (rc != LM_UNSUPPORTED)
            return rc;
    }
    return cuda_attn_wgmma_fits(st, &p) ? cuda_attn_wgmma(st, &p) : cuda_attn_prefill(st, &p);
}
