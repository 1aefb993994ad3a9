/* SPDX-License-Identifier: Apache-2.0 */
/*
 * forward.c - the layers of Llama, Mistral, Qwen2 and Qwen3, which differ in data only: biases,
 * head norms, windows.
 *
 *     res = embed(ids)
 *     for each layer:
 *         x   = norm(res)                     (from the second on: res += tmp before the norm)
 *         qkv = x Wqkv (+ bias) + lora_qkv(x)
 *         rope, write K and V to the pool, paged attention      -> attn
 *         tmp = attn Wo + lora_o(attn)        (all-reduce over the group)
 *         x   = norm(res += tmp)
 *         gu  = x Wgu + lora_gate_up(x);  act = silu(gate) * up
 *         tmp = act Wdown + lora_down(act)    (all-reduce over the group)
 *     x = norm(res += tmp), rows that need logits only -> logits -> sample
 *
 * Logits are float32 [rows, vocab]: with a vocabulary of 128k and every prompt row scored they
 * would take a gigabyte, so rows go through in slabs. Each slab reads the head's weights again, so
 * an accelerator, for which those are the cost, takes larger ones: 256 decoding rows are one slab.
 * All slabs of a step have equally many rows, a number that the bucket of its rows decides, and the
 * last one begins early instead of being smaller: which slab a row is in depends on its neighbours,
 * and how it is computed must not.
 *
 * Decode steps are recorded, and run again as recorded (kn_graph_run): hundreds of short
 * operations, whose starts a small batch waits for, become one. step.c pads a decode step to a size
 * and lays it out so that the next of that size has the same addresses and counts: struct
 * step_batch, all that operations are told of a step, is the key. The first steps of about a size
 * (within a power of two, with adapters or without) go piece by piece, so that what a backend
 * prepares at first use is ready when recording begins; so does a step whose recording the device
 * has no room for, and those after it for a while.
 *
 * LoRA rides behind each base GEMM on the rows of its segments only; modules that no adapter of the
 * step targets are not launched. Its workspace is sized once, for lora_rows: the planner keeps to
 * them, so that no rank ever asks for device memory.
 */
#include "engine/forward.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LOGIT_SLAB_BYTES ((size_t)64 << 20)
#define DEVICE_LOGIT_SLAB_BYTES ((size_t)160 << 20)
#define MIN_SLAB_ROWS 16
#define GRAPH_WARM_STEPS 2      /* of about a size, before any of it is recorded */
#define GRAPH_REST_STEPS 64     /* not recorded after one that there was no room for */

struct forward {
    struct forward_params p;
    int q_heads, kv_heads, ffn;         /* of this shard */
    int q_dim, qkv_dim;
    int slab_rows;
    void *res, *x, *qkv, *attn, *tmp, *gate_up, *act, *rows_x;
    float *logits;
    float *inv_freq;            /* [head_dim / 2] */
    float *h;                   /* LoRA intermediates, [lora_rows * 3] */
    void *sample_ws;
    struct step_output out;
    int seen[2][32];            /* decode steps, by LoRA or not and by size's logarithm */
    int rest;                   /* so many that would be recorded go piece by piece */
};

/* Stops at the first failure and says which operation it was. */
#define TRY(call)                                                                              \
    do {                                                                                       \
        lm_status st_ = (call);                                                                \
        if (st_ != LM_OK)                                                                      \
            return st_;                                                                        \
    } while (0)

/* ---- buffers --------------------------------------------------------------------------- */

struct want_buffer {
    void **p;
    size_t bytes;
};

static lm_status allocate(struct forward *f, const struct want_buffer *w, size_t n,
                          struct lm_err *err)
{
    for (size_t i = 0; i < n; i++) {
        lm_status st = kn_alloc(f->p.dev, w[i].bytes, w[i].p, err);
        if (st != LM_OK)
            return lm_err_prefix(err, "step buffers");
    }
    return LM_OK;
}

static lm_status allocate_all(struct forward *f, enum kn_dtype act_type, struct lm_err *err)
{
    const struct model_config *c = f->p.model;
    size_t t = (size_t)f->p.max_tokens, act = t * kn_dtype_size(act_type), f32 = sizeof(float);
    void *logits, *id, *logprob, *top_id, *top_logprob, *inv_freq, *h;
    size_t top = t * KN_MAX_TOP_LOGPROBS;
    const struct want_buffer want[] = {
        { &f->res, act * (size_t)c->hidden }, { &f->x, act * (size_t)c->hidden },
        { &f->qkv, act * (size_t)f->qkv_dim }, { &f->attn, act * (size_t)f->q_dim },
        { &f->tmp, act * (size_t)c->hidden }, { &f->gate_up, act * 2 * (size_t)f->ffn },
        { &f->act, act * (size_t)f->ffn }, { &f->rows_x, act * (size_t)c->hidden },
        { &logits, (size_t)f->slab_rows * (size_t)c->vocab * f32 },
        { &id, t * sizeof(int32_t) }, { &logprob, t * f32 },
        { &top_id, top * sizeof(int32_t) }, { &top_logprob, top * f32 },
        { &inv_freq, (size_t)c->head_dim / 2 * f32 }, { &h, (size_t)f->p.lora_rows * 3 * f32 },
        { &f->sample_ws, kn_sample_workspace(f->p.dev, f->slab_rows, c->vocab) },
    };
    logits = id = logprob = top_id = top_logprob = inv_freq = h = NULL;
    lm_status st = allocate(f, want, LM_COUNT(want), err);
    f->logits = logits;
    f->out = (struct step_output){ id, logprob, top_id, top_logprob };
    f->inv_freq = inv_freq;
    f->h = h;
    return st;
}

static lm_status upload_inv_freq(struct forward *f, struct lm_err *err)
{
    size_t bytes = (size_t)f->p.model->head_dim / 2 * sizeof(float);
    void *pinned = NULL;
    kn_stream *s = NULL;
    lm_status st = kn_host_alloc(f->p.dev, bytes, &pinned, err);
    if (st == LM_OK)
        st = kn_stream_new(f->p.dev, &s, err);
    if (st == LM_OK) {
        for (int i = 0; i < f->p.model->head_dim / 2; i++)
            ((float *)pinned)[i] = f->p.model->inv_freq[i];
        st = kn_copy_in(s, f->inv_freq, pinned, bytes);
        if (st != LM_OK)
            lm_err_set(err, st, "the rotary frequencies: the copy to the device failed");
    }
    if (st == LM_OK)
        st = kn_stream_sync(s, err);
    if (s)
        kn_stream_free(s);
    kn_host_free(f->p.dev, pinned);
    return st;
}

lm_status forward_new(const struct forward_params *p, struct forward **out, struct lm_err *err)
{
    struct forward *f = lm_calloc(1, sizeof *f);
    if (!f)
        return lm_err_set(err, LM_NOMEM, "no memory for the step");
    const struct model_config *c = p->model;
    struct kn_props props;
    kn_props(p->dev, &props);
    f->p = *p;
    f->q_heads = c->q_heads / p->shard.world;
    f->kv_heads = c->kv_heads / p->shard.world;
    f->ffn = c->ffn / p->shard.world;
    f->q_dim = f->q_heads * c->head_dim;
    f->qkv_dim = f->q_dim + 2 * f->kv_heads * c->head_dim;
    size_t slab = props.in_call ? LOGIT_SLAB_BYTES : DEVICE_LOGIT_SLAB_BYTES;
    size_t fit = slab / ((size_t)c->vocab * sizeof(float));
    f->slab_rows = (int)LM_MIN(LM_MAX(fit, MIN_SLAB_ROWS), (size_t)p->max_tokens);
    lm_status st = allocate_all(f, props.act, err);
    if (st == LM_OK)
        st = upload_inv_freq(f, err);
    if (st != LM_OK) {
        forward_free(f);
        return st;
    }
    *out = f;
    return LM_OK;
}

void forward_free(struct forward *f)
{
    if (!f)
        return;
    void *const all[] = {
        f->res, f->x, f->qkv, f->attn, f->tmp, f->gate_up, f->act, f->rows_x, f->logits,
        f->out.id, f->out.logprob, f->out.top_id, f->out.top_logprob, f->inv_freq, f->sample_ws,
        f->h,
    };
    for (size_t i = 0; i < LM_COUNT(all); i++)
        kn_free(f->p.dev, all[i]);
    free(f);
}

const struct step_output *forward_output(const struct forward *f)
{
    return &f->out;
}

/* ---- tuning ---------------------------------------------------------------------------- */

typedef kn_mat *pick_mat(const struct layer_weights *w);
static kn_mat *pick_qkv(const struct layer_weights *w) { return w->qkv; }
static kn_mat *pick_o(const struct layer_weights *w) { return w->o; }
static kn_mat *pick_gate_up(const struct layer_weights *w) { return w->gate_up; }
static kn_mat *pick_down(const struct layer_weights *w) { return w->down; }

static lm_status tune_layers(struct forward *f, kn_stream *s, const struct kn_gemm *a,
                             const kn_mat **w, pick_mat *pick)
{
    const struct weights *all = f->p.weights;
    for (int l = 0; l < all->n_layers; l++)
        w[l] = pick(&all->layer[l]);
    return kn_gemm_tune(s, a, w, all->n_layers);
}

lm_status forward_tune(struct forward *f, kn_stream *s, struct lm_err *err)
{
    const struct model_config *c = f->p.model;
    const struct weights *all = f->p.weights;
    const int m = f->p.max_tokens;
    const struct { struct kn_gemm a; pick_mat *pick; } layer[] = {
        { { .y = f->qkv, .x = f->x, .m = m, .ldx = c->hidden, .ldy = f->qkv_dim }, pick_qkv },
        { { .y = f->tmp, .x = f->attn, .m = m, .ldx = f->q_dim, .ldy = c->hidden }, pick_o },
        { { .y = f->gate_up, .x = f->x, .m = m, .ldx = c->hidden, .ldy = 2 * f->ffn },
          pick_gate_up },
        { { .y = f->tmp, .x = f->act, .m = m, .ldx = f->ffn, .ldy = c->hidden }, pick_down },
    };
    const struct kn_gemm head = { .y = f->logits, .x = f->rows_x, .m = f->slab_rows,
                                  .ldx = c->hidden, .ldy = c->vocab, .y_f32 = true };
    const kn_mat **w = lm_calloc((size_t)LM_MAX(all->n_layers, 1), sizeof *w);
    if (!w)
        return lm_err_set(err, LM_NOMEM, "no memory for measuring");
    lm_status st = LM_OK;
    for (size_t i = 0; i < LM_COUNT(layer) && st == LM_OK && all->n_layers > 0; i++) {
        struct kn_gemm a = layer[i].a;
        a.x_e4m3 = f->p.x_e4m3;
        st = tune_layers(f, s, &a, w, layer[i].pick);
    }
    w[0] = all->lm_head;
    if (st == LM_OK)
        st = kn_gemm_tune(s, &head, w, 1);
    free(w);
    return st == LM_OK ? LM_OK : lm_err_set(err, st, "measuring products failed: %s",
                                            lm_status_text(st));
}

/* ---- the pieces of a layer ------------------------------------------------------------- */

struct run {
    struct forward *f;
    kn_stream *s;
    const struct kn_pool *pool;
    const struct step_batch *b;
    int layer;
};

static lm_status norm(const struct run *r, const void *x, void *residual, const float *weight)
{
    const struct model_config *c = r->f->p.model;
    struct kn_rmsnorm a = {
        .out = r->f->x, .x = x, .residual = residual, .weight = weight, .n = r->b->n_tok,
        .hidden = c->hidden, .eps = c->rms_eps,
    };
    return kn_op_rmsnorm(r->s, &a);
}

static lm_status gemm(const struct run *r, void *y, int64_t ldy, const void *x, int64_t ldx,
                      const kn_mat *w, const float *bias)
{
    struct kn_gemm a = { .y = y, .x = x, .w = w, .bias = bias, .m = r->b->n_tok, .ldx = ldx,
                         .ldy = ldy, .x_e4m3 = r->f->p.x_e4m3 };
    return kn_op_gemm(r->s, &a);
}

/* Modules that no adapter of the step targets are left out. */
static lm_status lora(const struct run *r, void *y, int64_t ldy, const void *x, int in,
                      const struct kn_lora_part *part, int n_parts)
{
    const struct kn_lora_batch *b = &r->b->lora;
    struct kn_lora a = {
        .h = r->f->h, .x = x, .y = y, .ldx = in, .ldy = ldy, .in = in, .pool = *r->pool,
        .layer = r->layer, .batch = *b,
    };
    for (int i = 0; i < n_parts; i++)
        if (b->load[part[i].module].rank_sum > 0)
            a.part[a.n_parts++] = part[i];
    if (a.n_parts == 0)
        return LM_OK;
    TRY(kn_op_lora_shrink(r->s, &a));
    return kn_op_lora_expand(r->s, &a);
}

static lm_status reduce(const struct run *r)
{
    const struct forward *f = r->f;
    if (!f->p.comm)
        return LM_OK;
    struct kn_props props;
    kn_props(f->p.dev, &props);
    return kn_all_reduce_sum(r->s, f->p.comm, f->tmp,
                             (size_t)r->b->n_tok * (size_t)f->p.model->hidden, props.act);
}

static lm_status rope(const struct run *r, const struct layer_weights *w)
{
    const struct forward *f = r->f;
    const struct model_config *c = f->p.model;
    struct kn_rope_kv a = {
        .qkv = f->qkv, .ld = f->qkv_dim, .pos = r->b->pos, .slot = r->b->slot,
        .inv_freq = f->inv_freq, .attention_factor = c->attention_factor,
        .dyn_len = r->b->dyn_len, .dyn_base = c->rope_theta, .dyn_factor = c->dyn_factor,
        .dyn_max = c->dyn_max, .q_norm = w->q_norm, .k_norm = w->k_norm, .norm_eps = c->rms_eps,
        .pool = *r->pool, .layer = r->layer, .block_tokens = f->p.block_tokens,
        .n = r->b->n_tok, .q_heads = f->q_heads, .kv_heads = f->kv_heads,
        .head_dim = c->head_dim,
    };
    return kn_op_rope_kv(r->s, &a);
}

static lm_status attend(const struct run *r)
{
    const struct forward *f = r->f;
    const struct model_config *c = f->p.model;
    const struct step_batch *b = r->b;
    struct kn_attention a = {
        .out = f->attn, .qkv = f->qkv, .ld = f->qkv_dim, .q_start = b->q_start,
        .kv_len = b->kv_len, .block_table = b->block_table, .table_ld = b->table_ld,
        .n_seqs = b->n_seqs, .n_tok = b->n_tok, .max_q = b->max_q, .max_kv = b->max_kv,
        .pool = *r->pool, .layer = r->layer, .block_tokens = f->p.block_tokens,
        .q_heads = f->q_heads, .kv_heads = f->kv_heads, .head_dim = c->head_dim,
        .window = c->window ? c->window[r->layer] : 0,
        .scale = 1.0f / sqrtf((float)c->head_dim),
    };
    return kn_op_attention(r->s, &a);
}

static lm_status attention_half(const struct run *r, const struct layer_weights *w)
{
    const struct forward *f = r->f;
    const struct model_config *c = f->p.model;
    int kv_dim = f->kv_heads * c->head_dim;
    const struct kn_lora_part qkv[3] = {
        { KN_Q, 0, f->q_dim }, { KN_K, f->q_dim, kv_dim }, { KN_V, f->q_dim + kv_dim, kv_dim },
    };
    const struct kn_lora_part o = { KN_O, 0, c->hidden };
    TRY(gemm(r, f->qkv, f->qkv_dim, f->x, c->hidden, w->qkv, w->qkv_bias));
    TRY(lora(r, f->qkv, f->qkv_dim, f->x, c->hidden, qkv, 3));
    TRY(rope(r, w));
    TRY(attend(r));
    TRY(gemm(r, f->tmp, c->hidden, f->attn, f->q_dim, w->o, NULL));
    TRY(lora(r, f->tmp, c->hidden, f->attn, f->q_dim, &o, 1));
    return reduce(r);
}

static lm_status ffn_half(const struct run *r, const struct layer_weights *w)
{
    const struct forward *f = r->f;
    const struct model_config *c = f->p.model;
    const struct kn_lora_part gate_up[2] = { { KN_GATE, 0, f->ffn }, { KN_UP, f->ffn, f->ffn } };
    const struct kn_lora_part down = { KN_DOWN, 0, c->hidden };
    const struct kn_lora_load *load = r->b->lora.load;
    const struct kn_silu_mul silu = { f->act, f->gate_up, r->b->n_tok, f->ffn };
    const struct kn_gate_up both = {
        { .y = f->gate_up, .x = f->x, .w = w->gate_up, .m = r->b->n_tok, .ldx = c->hidden,
          .ldy = 2 * f->ffn, .x_e4m3 = f->p.x_e4m3 },
        f->act,
    };
    if (load[KN_GATE].rank_sum > 0 || load[KN_UP].rank_sum > 0) {
        TRY(kn_op_gemm(r->s, &both.gemm));
        TRY(lora(r, f->gate_up, 2 * f->ffn, f->x, c->hidden, gate_up, 2));
        TRY(kn_op_silu_mul(r->s, &silu));
    } else {
        TRY(kn_op_gate_up(r->s, &both));
    }
    TRY(gemm(r, f->tmp, c->hidden, f->act, f->ffn, w->down, NULL));
    TRY(lora(r, f->tmp, c->hidden, f->act, f->ffn, &down, 1));
    return reduce(r);
}

/* Rows of a slab, if so many need logits. */
static int slab_height(const struct forward *f, int n_rows)
{
    const int all = LM_MAX(kn_graph_rows(f->p.dev, n_rows), n_rows);
    const int slabs = LM_DIV_UP(all, f->slab_rows);
    return LM_MIN(LM_DIV_UP(all, slabs), n_rows);
}

/* Rows [r0, r0 + n) of those that need logits: hidden state to logits, and from `fresh` on to ids;
 * those before have theirs. */
static lm_status sample_slab(const struct run *r, int r0, int n, int fresh)
{
    const struct forward *f = r->f;
    const struct model_config *c = f->p.model;
    const struct kn_gather_rows gather = { f->rows_x, f->x, r->b->row_idx + r0, n, c->hidden };
    const struct kn_gemm head = {
        .y = f->logits, .x = f->rows_x, .w = f->p.weights->lm_head, .m = n, .ldx = c->hidden,
        .ldy = c->vocab, .y_f32 = true,
    };
    const struct kn_sample sample = {
        .logits = f->logits + (size_t)(fresh - r0) * (size_t)c->vocab,
        .rows = r->b->rows + fresh, .history = r->b->history,
        .out_id = f->out.id + fresh, .out_logprob = f->out.logprob + fresh,
        .top_id = f->out.top_id + (size_t)fresh * KN_MAX_TOP_LOGPROBS,
        .top_logprob = f->out.top_logprob + (size_t)fresh * KN_MAX_TOP_LOGPROBS,
        .workspace = f->sample_ws, .n = r0 + n - fresh, .vocab = c->vocab, .ld = c->vocab,
    };
    TRY(kn_op_gather_rows(r->s, &gather));
    TRY(kn_op_gemm(r->s, &head));
    return kn_op_sample(r->s, &sample);
}

static lm_status run_layers(struct forward *f, kn_stream *s, const struct kn_pool *pool,
                            const struct step_batch *b)
{
    const struct weights *w = f->p.weights;
    struct run r = { f, s, pool, b, 0 };
    const struct kn_embed embed = { f->res, w->embed, b->ids, b->n_tok, f->p.model->hidden };
    TRY(kn_op_embed(s, &embed));
    for (r.layer = 0; r.layer < w->n_layers; r.layer++) {
        const struct layer_weights *lw = &w->layer[r.layer];
        TRY(r.layer == 0 ? norm(&r, f->res, NULL, lw->attn_norm)
                         : norm(&r, f->tmp, f->res, lw->attn_norm));
        TRY(attention_half(&r, lw));
        TRY(norm(&r, f->tmp, f->res, lw->ffn_norm));
        TRY(ffn_half(&r, lw));
    }
    if (b->n_rows == 0)
        return LM_OK;
    TRY(norm(&r, f->tmp, f->res, w->final_norm));
    const int rows = slab_height(f, b->n_rows);
    for (int r0 = 0; r0 < b->n_rows; r0 += rows)
        TRY(sample_slab(&r, LM_MIN(r0, b->n_rows - rows), rows, r0));
    return LM_OK;
}

/* ---- recorded steps -------------------------------------------------------------------- */

/* All that the operations are told and that another step may be told otherwise. */
struct graph_key {
    struct step_batch batch;
    struct kn_pool pool;
};
_Static_assert(sizeof(struct graph_key) <= KN_GRAPH_KEY_BYTES, "a backend keeps so long a key");

/* About as large as some that have been met before, and no time of rest. */
static bool is_warm(struct forward *f, const struct step_batch *b)
{
    int *seen = &f->seen[b->lora.n_segs > 0][31 - __builtin_clz((unsigned)b->n_tok)];
    if (*seen < GRAPH_WARM_STEPS)
        (*seen)++;
    else if (f->rest > 0)
        f->rest--;
    else
        return true;
    return false;
}

static lm_status record(struct forward *f, kn_stream *s, const struct kn_pool *pool,
                        const struct step_batch *b, const struct graph_key *key)
{
    TRY(kn_graph_begin(s));
    lm_status st = run_layers(f, s, pool, b);
    if (st != LM_OK) {
        kn_graph_end(s, NULL, 0);       /* half a step, never to be run */
        return st;
    }
    st = kn_graph_end(s, key, sizeof *key);
    if (st != LM_NOMEM)
        return st;
    f->rest = GRAPH_REST_STEPS;
    return run_layers(f, s, pool, b);
}

lm_status forward_run(struct forward *f, kn_stream *s, const struct kn_pool *pool,
                      const struct step_batch *b)
{
    struct graph_key key;
    if (!b->repeats || b->n_tok == 0 || f->p.comm)
        return run_layers(f, s, pool, b);
    memset(&key, 0, sizeof key);        /* what lies between members counts, too */
    memcpy(&key.batch, b, sizeof *b);
    memcpy(&key.pool, pool, sizeof *pool);
    lm_status st = kn_graph_run(s, &key, sizeof key);
    if (st != LM_NOT_FOUND)
        return st;
    return is_warm(f, b) ? record(f, s, pool, b, &key) : run_layers(f, s, pool, b);
}
