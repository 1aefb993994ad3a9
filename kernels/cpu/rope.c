/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rope.c - rotary embedding (arXiv 2104.09864), optional per-head norm, and the write of K and V.
 *
 * The angle is pos * inv_freq in float32, as the models' own code computes it; sines are taken for
 * each token once and serve all its heads. K goes into the pool transposed, see attention.c.
 */
#include "kernels/cpu/cpu_int.h"

#include <math.h>
#include <string.h>

struct rope_job {
    const struct kn_rope_kv *a;
    const struct cpu_vec *v;
};

/* Dynamic NTK: the base grows with the sequence; rare, so it may be slow. */
static const float *token_freq(const struct kn_rope_kv *a, int i, float *own)
{
    if (!a->dyn_len || a->dyn_len[i] <= a->dyn_max)
        return a->inv_freq;
    double d = a->head_dim;
    double grow = (double)a->dyn_factor * a->dyn_len[i] / a->dyn_max - (a->dyn_factor - 1.0);
    double base = a->dyn_base * pow(grow, d / (d - 2.0));
    for (int j = 0; j < a->head_dim / 2; j++)
        own[j] = (float)(1.0 / pow(base, 2.0 * j / d));
    return own;
}

static void write_head(float *head, int64_t lanes, int64_t in_block, int hd, const float *k,
                       const float *v)
{
    for (int d = 0; d < hd; d++)
        head[d * lanes + in_block] = k[d];
    memcpy(head + lanes * hd + in_block * hd, v, (size_t)hd * sizeof(float));
}

static void write_head_e4m3(uint8_t *head, int64_t lanes, int64_t in_block, int hd, const float *k,
                            const float *v)
{
    for (int d = 0; d < hd; d++)
        head[d * lanes + in_block] = cpu_f32_to_e4m3(k[d]);
    for (int d = 0; d < hd; d++)
        head[(lanes + in_block) * hd + d] = cpu_f32_to_e4m3(v[d]);
}

static void write_kv(const struct kn_rope_kv *a, int64_t slot, const float *k, const float *v)
{
    const int hd = a->head_dim;
    const int64_t lanes = cpu_kv_lanes(a->block_tokens);
    const int64_t in_block = slot % a->block_tokens;
    char *head = cpu_pool_block(&a->pool, a->layer, slot / a->block_tokens);
    for (int h = 0; h < a->kv_heads; h++, k += hd, v += hd) {
        if (a->pool.kv == KN_KV_E4M3)
            write_head_e4m3((uint8_t *)head, lanes, in_block, hd, k, v);
        else
            write_head((float *)head, lanes, in_block, hd, k, v);
        head += cpu_kv_head_elems(a->block_tokens, hd) * cpu_kv_elem(a->pool.kv);
    }
}

static void rotate_heads(const struct rope_job *j, float *x, int heads, const float *norm,
                         const float *c, const float *s)
{
    const int hd = j->a->head_dim;
    for (int h = 0; h < heads; h++, x += hd) {
        if (norm)
            j->v->rmsnorm(x, x, norm, hd, j->a->norm_eps);
        j->v->rotate(x, c, s, hd / 2);
    }
}

static void rope_range(void *ctx, int slot, int begin, int end)
{
    const struct rope_job *j = ctx;
    const struct kn_rope_kv *a = j->a;
    float c[CPU_MAX_HEAD_DIM / 2], s[CPU_MAX_HEAD_DIM / 2], own[CPU_MAX_HEAD_DIM / 2];
    (void)slot;
    for (int i = begin; i < end; i++) {
        float *q = (float *)a->qkv + i * a->ld;
        float *k = q + (int64_t)a->q_heads * a->head_dim;
        const float *v = k + (int64_t)a->kv_heads * a->head_dim;
        j->v->sincos(c, s, token_freq(a, i, own), a->head_dim / 2, (float)a->pos[i],
                     a->attention_factor);
        rotate_heads(j, q, a->q_heads, a->q_norm, c, s);
        rotate_heads(j, k, a->kv_heads, a->k_norm, c, s);
        if (a->slot[i] >= 0)
            write_kv(a, a->slot[i], k, v);
    }
}

static const char *rope_fault(const struct kn_rope_kv *a)
{
    if (a->n < 0 || (a->n && (!a->qkv || !a->pos || !a->slot || !a->inv_freq)))
        return "null pointer or negative count";
    if (a->q_heads <= 0 || a->kv_heads <= 0 || a->q_heads % a->kv_heads || a->head_dim <= 0 ||
        a->head_dim % 2 || a->block_tokens <= 0)
        return "bad head shape";
    if (a->n > 1 && a->ld < (int64_t)(a->q_heads + 2 * a->kv_heads) * a->head_dim)
        return "row stride is shorter than a row";
    if (!cpu_pool_valid(&a->pool, a->layer) ||
        (int64_t)cpu_kv_block_bytes(NULL, a->pool.kv, a->block_tokens, a->kv_heads, a->head_dim) >
            a->pool.block_bytes)
        return "the pool's blocks are too small, or the layer is outside of it";
    if (a->dyn_len && (a->dyn_max <= 0 || a->head_dim <= 2))
        return "dynamic scaling without a limit";
    for (int i = 0; i < a->n; i++)
        if (a->slot[i] >= (int64_t)a->pool.num_blocks * a->block_tokens)
            return "slot outside of the pool";
    return NULL;
}

lm_status cpu_op_rope_kv(kn_stream *s, const struct kn_rope_kv *a)
{
    const char *fault = rope_fault(a);
    if (fault)
        return cpu_refuse("rope_kv", fault);
    if (a->head_dim > CPU_MAX_HEAD_DIM)
        return LM_UNSUPPORTED;
    struct cpu_stream *st = cpu_stream_of(s);
    struct rope_job j = { a, st->dev->v };
    int64_t work = (int64_t)a->n * (a->q_heads + 3 * a->kv_heads) * a->head_dim / 4;
    cpu_parallel(st, a->n, LM_MAX(1, a->n / (st->dev->threads * 4)), work, rope_range, &j);
    return LM_OK;
}
