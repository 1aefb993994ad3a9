/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ops.c - every operation: what it would move and multiply, priced, and put on its stream.
 *
 * The few that others depend on really happen, on small buffers: sampled ids, and tokens fed from
 * one step to the next. Arguments are checked as a device would, so that a bug above is found here.
 *
 * An embedding begins a step: there the host pays for its graph's launch and its planning, and at
 * the first attention for its sequences.
 */
#include "kernels/sim/sim_int.h"

#include <math.h>

static double act_size(const struct sim_device *d)
{
    return (double)kn_dtype_size(d->d.act);
}

/* Element-wise work on `bytes` of device memory. */
static lm_status stream_op(kn_stream *st, double bytes)
{
    struct sim_stream *s = sim_stream_of(st);
    pthread_mutex_lock(&s->dev->mu);
    sim_enqueue(s, SIM_OTHER, sim_stream_ns(&s->dev->d, bytes));
    pthread_mutex_unlock(&s->dev->mu);
    return LM_OK;
}

lm_status sim_op_embed(kn_stream *st, const struct kn_embed *a)
{
    struct sim_stream *s = sim_stream_of(st);
    struct sim_device *d = s->dev;
    if (a->n < 0 || a->hidden != a->table->cols || (a->n && (!a->out || !a->ids)))
        return sim_refuse("embed", "bad argument");
    pthread_mutex_lock(&d->mu);
    double us = d->d.step_us + (d->d.graph ? d->d.launch_us : 0);
    d->host_ns += llround(us * 1000);
    d->count.steps++;
    sim_enqueue(s, SIM_OTHER, sim_stream_ns(&d->d, 2 * act_size(d) * a->n * a->hidden));
    pthread_mutex_unlock(&d->mu);
    return LM_OK;
}

/* Sums the partial results of a group, `bytes` on each. Locked. */
static void reduce(struct sim_stream *s, double bytes)
{
    const struct sim_desc *desc = &s->dev->d;
    if (desc->tp_world <= 1)
        return;
    s->dev->count.comm_bytes +=
        llround(2 * (desc->tp_world - 1) / desc->tp_world * bytes);
    sim_enqueue(s, SIM_COMM, sim_reduce_ns(desc, bytes));
}

lm_status sim_op_rmsnorm(kn_stream *st, const struct kn_rmsnorm *a)
{
    struct sim_stream *s = sim_stream_of(st);
    if (a->n < 0 || a->hidden < 1 || (a->n && (!a->out || !a->x || !a->weight)))
        return sim_refuse("rmsnorm", "bad argument");
    double bytes = act_size(s->dev) * a->n * a->hidden;
    pthread_mutex_lock(&s->dev->mu);
    if (a->residual)
        reduce(s, bytes);
    sim_enqueue(s, SIM_OTHER, sim_stream_ns(&s->dev->d, bytes * (a->residual ? 4 : 2)));
    pthread_mutex_unlock(&s->dev->mu);
    return LM_OK;
}

lm_status sim_op_gemm(kn_stream *st, const struct kn_gemm *a)
{
    struct sim_stream *s = sim_stream_of(st);
    if (a->m < 0 || !a->w || (a->m && (!a->y || !a->x)) || a->ldx < a->w->cols ||
        a->ldy < a->w->rows)
        return sim_refuse("gemm", "bad argument");
    size_t bytes = kn_mat_bytes(a->w);
    pthread_mutex_lock(&s->dev->mu);
    s->dev->count.weight_bytes += (int64_t)bytes;
    sim_enqueue(s, SIM_GEMM, sim_gemm_ns(&s->dev->d, a->m, a->w->rows, a->w->cols, (double)bytes));
    pthread_mutex_unlock(&s->dev->mu);
    return LM_OK;
}

lm_status sim_op_rope_kv(kn_stream *st, const struct kn_rope_kv *a)
{
    struct sim_stream *s = sim_stream_of(st);
    if (a->n < 0 || (a->n && (!a->qkv || !a->pos || !a->slot)) || a->layer < 0 ||
        a->layer >= a->pool.n_layers)
        return sim_refuse("rope_kv", "bad argument");
    double kv = sim_kv_token_bytes(&s->dev->d, a->pool.kv, a->kv_heads, a->head_dim) * a->n;
    double qk = 2.0 * (a->q_heads + a->kv_heads) * a->head_dim * act_size(s->dev) * a->n;
    pthread_mutex_lock(&s->dev->mu);
    s->dev->count.kv_write_bytes += llround(kv);
    sim_enqueue(s, SIM_OTHER,
                sim_stream_ns(&s->dev->d, (qk + 2 * kv) / s->dev->d.tp_world));
    pthread_mutex_unlock(&s->dev->mu);
    return LM_OK;
}

/* ---- attention ------------------------------------------------------------------------- */

/* Positions that queries kv-q .. kv-1 see together, each at most `window` (0: all). */
static double pairs_of(double q, double kv, int window)
{
    double first = kv - q + 1;
    if (!window || kv <= window)
        return q * (first + kv) / 2;
    if (first >= window)
        return q * window;
    double below = window - first;              /* those whose sight still grows */
    return below * (first + window - 1) / 2 + (q - below) * window;
}

static void sum_attention(const struct kn_attention *a, struct sim_attention_load *l)
{
    *l = (struct sim_attention_load){ 0 };
    for (int i = 0; i < a->n_seqs; i++) {
        double q = a->q_start[i + 1] - a->q_start[i], kv = a->kv_len[i];
        double seen = a->window ? fmin(kv, a->window + q - 1) : kv;
        if (q <= 1) {
            l->decode_kv += seen;
            continue;
        }
        l->chunk_kv += seen * ceil(q / SIM_QUERY_TILE);
        l->pairs += pairs_of(q, kv, a->window);
    }
}

lm_status sim_op_attention(kn_stream *st, const struct kn_attention *a)
{
    struct sim_stream *s = sim_stream_of(st);
    struct sim_device *d = s->dev;
    struct sim_memo *m = &d->attn;
    if (a->n_seqs < 0 || (a->n_seqs && (!a->q_start || !a->kv_len || !a->out || !a->qkv)) ||
        a->layer < 0 || a->layer >= a->pool.n_layers)
        return sim_refuse("attention", "bad argument");
    pthread_mutex_lock(&d->mu);
    if (m->gen != d->mem_gen || m->key[0] != a->q_start || m->key[1] != a->kv_len ||
        m->n != a->n_seqs || m->window != a->window) {
        *m = (struct sim_memo){ .gen = d->mem_gen, .key = { a->q_start, a->kv_len },
                                .n = a->n_seqs, .window = a->window };
        sum_attention(a, &m->load);
    }
    if (a->layer == 0)
        d->host_ns += llround(d->d.seq_us * 1000 * a->n_seqs);
    d->count.kv_read_bytes += llround((m->load.decode_kv + m->load.chunk_kv) *
                                      sim_kv_token_bytes(&d->d, a->pool.kv, a->kv_heads,
                                                         a->head_dim));
    sim_enqueue(s, SIM_ATTENTION, sim_attention_ns(&d->d, a, &m->load));
    pthread_mutex_unlock(&d->mu);
    return LM_OK;
}

/* ---- LoRA ------------------------------------------------------------------------------ */

static bool has_loads(const struct kn_lora_batch *b)
{
    for (int i = 0; i < KN_MODULES; i++)
        if (b->load[i].rank_sum > 0)
            return true;
    return false;
}

/* Tokens that are in a segment. Locked. */
static double segment_tokens(struct sim_device *d, const struct kn_lora_batch *b)
{
    struct sim_memo *m = &d->segs;
    if (m->gen == d->mem_gen && m->key[0] == b->segs && m->n == b->n_segs)
        return m->seg_tok;
    *m = (struct sim_memo){ .gen = d->mem_gen, .key = { b->segs }, .n = b->n_segs };
    for (int i = 0; i < b->n_segs; i++)
        m->seg_tok += b->segs[i].n_tok;
    return m->seg_tok;
}

/* Without the step's hints: every adapter is taken to target every part with its largest rank. */
static struct kn_lora_load load_of(const struct kn_lora_batch *b, enum kn_module module, bool hints)
{
    if (hints)
        return b->load[module];
    struct kn_lora_load l = { 0, 0 };
    for (int i = 0; i < b->n_segs; i++) {
        l.rank_sum += b->segs[i].rank_max;
        l.rank_tok += b->segs[i].rank_max * b->segs[i].n_tok;
    }
    return l;
}

static lm_status lora_op(kn_stream *st, const struct kn_lora *a, bool shrink)
{
    struct sim_stream *s = sim_stream_of(st);
    struct sim_device *d = s->dev;
    struct sim_lora_load l = { 0 };
    bool hints = has_loads(&a->batch);
    double width = 0, ranks = 0;
    if (a->n_parts < 1 || a->n_parts > 3 || a->layer < 0 || a->layer >= a->pool.n_layers ||
        (a->batch.n_segs && (!a->batch.segs || !a->h)))
        return sim_refuse(shrink ? "lora_shrink" : "lora_expand", "bad argument");
    if (a->batch.n_segs == 0)
        return LM_OK;
    pthread_mutex_lock(&d->mu);
    for (int i = 0; i < a->n_parts; i++) {
        struct kn_lora_load part = load_of(&a->batch, a->part[i].module, hints);
        double w = shrink ? a->in : a->part[i].out;
        l.rank_sum += part.rank_sum * w;
        l.rank_tok += part.rank_tok * w;
        ranks += part.rank_tok;
        width += part.rank_sum > 0 ? w : 0;
    }
    if (ranks > 0) {
        l.rows = segment_tokens(d, &a->batch) * (shrink ? a->in : 2 * width);
        d->count.lora_bytes += llround(l.rank_sum * (double)kn_dtype_size(d->d.lora));
        sim_enqueue(s, SIM_LORA,
                    sim_lora_ns(&d->d, &l, shrink ? d->d.shrink_share : d->d.expand_share));
        if (shrink)
            reduce(s, ranks * sizeof(float));
    }
    pthread_mutex_unlock(&d->mu);
    return LM_OK;
}

lm_status sim_op_lora_shrink(kn_stream *s, const struct kn_lora *a)
{
    return lora_op(s, a, true);
}

lm_status sim_op_lora_expand(kn_stream *s, const struct kn_lora *a)
{
    return lora_op(s, a, false);
}

/* Reads and writes the rows of the weight that it changes. */
lm_status sim_op_lora_merge(kn_stream *s, const struct kn_lora_merge *a)
{
    if (!a->w || a->row0 < 0 || a->row0 + a->out > a->w->rows || a->in != a->w->cols)
        return sim_refuse("lora_merge", "bad argument");
    return stream_op(s, 2.0 * a->in * a->out * (double)kn_dtype_size(a->w->dtype));
}

/* ---- rows ------------------------------------------------------------------------------ */

lm_status sim_op_silu_mul(kn_stream *s, const struct kn_silu_mul *a)
{
    const struct sim_device *d = sim_stream_of(s)->dev;
    if (a->n < 0 || (a->n && (!a->out || !a->gate_up)))
        return sim_refuse("silu_mul", "bad argument");
    return stream_op(s, 3 * act_size(d) * a->n * a->f / d->d.tp_world);
}

lm_status sim_op_gather_rows(kn_stream *s, const struct kn_gather_rows *a)
{
    if (a->n < 0 || (a->n && (!a->out || !a->x || !a->idx)))
        return sim_refuse("gather_rows", "bad argument");
    return stream_op(s, 2 * act_size(sim_stream_of(s)->dev) * a->n * a->hidden);
}

lm_status sim_op_feed(kn_stream *st, const struct kn_feed *a)
{
    if (a->n < 0 || (a->n && (!a->dst || !a->dst_idx || !a->src || !a->src_idx)))
        return sim_refuse("feed", "bad argument");
    for (int i = 0; i < a->n; i++)
        a->dst[a->dst_idx[i]] = a->src[a->src_idx[i]];
    return stream_op(st, 4.0 * (double)sizeof *a->dst * a->n);
}

static int32_t draw(const struct kn_sample_row *r, int vocab)
{
    uint64_t z = r->seed + (r->counter + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return (int32_t)(z % (uint64_t)vocab);
}

/* Alternatives are the ids that follow, and every log-probability is that of a uniform draw. */
static void sample_row(const struct kn_sample *a, int i)
{
    const struct kn_sample_row *r = &a->rows[i];
    float logprob = -logf((float)a->vocab);
    a->out_id[i] = r->forced >= 0 ? r->forced : draw(r, a->vocab);
    a->out_logprob[i] = r->want_logprob ? logprob : NAN;
    for (int k = 0; k < r->top_logprobs; k++) {
        int at = i * KN_MAX_TOP_LOGPROBS + k;
        a->top_id[at] = (a->out_id[i] + k) % a->vocab;
        a->top_logprob[at] = logprob;
    }
}

lm_status sim_op_sample(kn_stream *s, const struct kn_sample *a)
{
    if (a->n < 0 || a->vocab < 1 || (a->n && (!a->logits || !a->rows || !a->out_id)))
        return sim_refuse("sample", "bad argument");
    for (int i = 0; i < a->n; i++)
        sample_row(a, i);
    return stream_op(s, 2.0 * (double)sizeof(float) * a->n * a->vocab);
}
