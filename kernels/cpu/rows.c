/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rows.c - operations that treat each token's row alone: embed, rmsnorm, silu_mul, gather_rows;
 * and feed, which moves single ids.
 *
 * `work` given to cpu_parallel is nanoseconds on one thread, from bench_kernels on one core.
 */
#include "kernels/cpu/cpu_int.h"

#include <string.h>

static int rows_grain(int n, int threads)
{
    return LM_MAX(1, n / (threads * 4));
}

/* ---- embed ----------------------------------------------------------------------------- */

static void embed_range(void *ctx, int slot, int begin, int end)
{
    const struct kn_embed *a = ctx;
    (void)slot;
    for (int i = begin; i < end; i++)
        cpu_mat_row(cpu_mat_of(a->table), a->ids[i], (float *)a->out + (int64_t)i * a->hidden);
}

lm_status cpu_op_embed(kn_stream *s, const struct kn_embed *a)
{
    if (a->n < 0 || !a->table || a->table->cols != a->hidden || (a->n && (!a->out || !a->ids)))
        return cpu_refuse("embed", "null pointer, or hidden differs from the table's columns");
    for (int i = 0; i < a->n; i++)
        if (a->ids[i] < 0 || a->ids[i] >= a->table->rows)
            return cpu_refuse("embed", "token id outside of the table");
    struct cpu_stream *st = cpu_stream_of(s);
    cpu_parallel(st, a->n, rows_grain(a->n, st->dev->threads), (int64_t)a->n * a->hidden * 2,
                 embed_range, (void *)a);
    return LM_OK;
}

/* ---- rmsnorm --------------------------------------------------------------------------- */

struct norm_job {
    const struct kn_rmsnorm *a;
    const struct cpu_vec *v;
};

static void rmsnorm_range(void *ctx, int slot, int begin, int end)
{
    const struct norm_job *j = ctx;
    const struct kn_rmsnorm *a = j->a;
    (void)slot;
    for (int i = begin; i < end; i++) {
        int64_t at = (int64_t)i * a->hidden;
        const float *x = (const float *)a->x + at;
        if (a->residual) {
            float *r = (float *)a->residual + at;
            j->v->add(r, x, a->hidden);
            x = r;
        }
        j->v->rmsnorm((float *)a->out + at, x, a->weight, a->hidden, a->eps);
    }
}

lm_status cpu_op_rmsnorm(kn_stream *s, const struct kn_rmsnorm *a)
{
    if (a->n < 0 || a->hidden <= 0 || (a->n && (!a->out || !a->x || !a->weight)))
        return cpu_refuse("rmsnorm", "null pointer or bad shape");
    struct cpu_stream *st = cpu_stream_of(s);
    struct norm_job j = { a, st->dev->v };
    cpu_parallel(st, a->n, rows_grain(a->n, st->dev->threads), (int64_t)a->n * a->hidden / 8,
                 rmsnorm_range, &j);
    return LM_OK;
}

/* ---- silu_mul -------------------------------------------------------------------------- */

struct silu_job {
    const struct kn_silu_mul *a;
    const struct cpu_vec *v;
};

static void silu_range(void *ctx, int slot, int begin, int end)
{
    const struct silu_job *j = ctx;
    const struct kn_silu_mul *a = j->a;
    (void)slot;
    for (int i = begin; i < end; i++) {
        const float *gate = (const float *)a->gate_up + (int64_t)i * 2 * a->f;
        j->v->silu_mul((float *)a->out + (int64_t)i * a->f, gate, gate + a->f, a->f);
    }
}

lm_status cpu_op_silu_mul(kn_stream *s, const struct kn_silu_mul *a)
{
    if (a->n < 0 || a->f <= 0 || (a->n && (!a->out || !a->gate_up)))
        return cpu_refuse("silu_mul", "null pointer or bad shape");
    struct cpu_stream *st = cpu_stream_of(s);
    struct silu_job j = { a, st->dev->v };
    cpu_parallel(st, a->n, rows_grain(a->n, st->dev->threads), (int64_t)a->n * a->f / 2,
                 silu_range, &j);
    return LM_OK;
}

/* ---- gather_rows ----------------------------------------------------------------------- */

lm_status cpu_op_gather_rows(kn_stream *s, const struct kn_gather_rows *a)
{
    (void)s;
    if (a->n < 0 || a->hidden <= 0 || (a->n && (!a->out || !a->x || !a->idx)))
        return cpu_refuse("gather_rows", "null pointer or bad shape");
    for (int i = 0; i < a->n; i++) {
        if (a->idx[i] < 0)
            return cpu_refuse("gather_rows", "negative row");
        memcpy((float *)a->out + (int64_t)i * a->hidden,
               (const float *)a->x + (int64_t)a->idx[i] * a->hidden,
               (size_t)a->hidden * sizeof(float));
    }
    return LM_OK;
}

/* ---- feed ------------------------------------------------------------------------------ */

lm_status cpu_op_feed(kn_stream *s, const struct kn_feed *a)
{
    (void)s;
    if (a->n < 0 || (a->n && (!a->dst || !a->dst_idx || !a->src || !a->src_idx)))
        return cpu_refuse("feed", "null pointer or negative count");
    for (int i = 0; i < a->n; i++) {
        if (a->dst_idx[i] < 0 || a->src_idx[i] < 0)
            return cpu_refuse("feed", "negative index");
        a->dst[a->dst_idx[i]] = a->src[a->src_idx[i]];
    }
    return LM_OK;
}
