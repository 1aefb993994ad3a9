/* SPDX-License-Identifier: Apache-2.0 */
/*
 * weights.c - every tensor that the architecture has is demanded, and every tensor that the files
 * have must be demanded: a checkpoint that differs from its config in either direction would run
 * and give plausible nonsense, so it is refused by the tensor's name.
 *
 * Without files (`st` NULL, weights_fill()) the same walk makes every tensor up, so that what is
 * measured has exactly the shapes of what is served.
 *
 * The walk itself makes the matrices and reads the vectors, which are small; matrices are filled by
 * the threads of upload.c, which start when the walk has found nothing wrong.
 *
 * Two exceptions, both harmless: rotary_emb.inv_freq buffers, which old checkpoints carry and the
 * config determines; and lm_head.weight beside tied embeddings, which some exporters write twice.
 */
#include "engine/weights.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/safetensors.h"
#include "engine/upload.h"

/* Of made-up values: activations neither die out nor overflow over a hundred layers. */
#define FILL_SCALE 0.02f

struct loader {
    const struct model_config *cfg;
    struct shard shard;
    enum weights_as as;
    safetensors *st;            /* NULL: tensors are made up */
    struct st_tensor stand_in;  /* what want() answers then */
    uint64_t seed;
    struct weights *w;
    kn_stream *stream;
    upload *upload;             /* of matrices; NULL without files */
    float *staging;             /* pinned, staging_n floats */
    float *raw;                 /* as many, as stored */
    int staging_n;
    const struct st_tensor **used;
    int n_used, cap_used;
    struct lm_err *err;
};

/* ---- finding and checking -------------------------------------------------------------- */

static lm_status check_shape(const struct loader *l, const struct st_tensor *t, int rows, int cols)
{
    if (!t->is_float)
        return lm_err_set(l->err, LM_UNSUPPORTED,
                          "tensor '%s' is %s; weights must be F32, F16 or BF16 (quantised models "
                          "are not supported)", t->name, t->dtype_name);
    bool ok = cols ? t->n_dims == 2 && t->shape[0] == rows && t->shape[1] == cols
                   : t->n_dims == 1 && t->shape[0] == rows;
    if (ok)
        return LM_OK;
    char got[128] = "";
    for (int i = 0, at = 0; i < t->n_dims && at < (int)sizeof got; i++)
        at += snprintf(got + at, sizeof got - (size_t)at, "%s%lld", i ? ", " : "",
                       (long long)t->shape[i]);
    if (cols)
        return lm_err_set(l->err, LM_MISMATCH, "tensor '%s' has shape [%s]; config.json asks for "
                                               "[%d, %d]", t->name, got, rows, cols);
    return lm_err_set(l->err, LM_MISMATCH, "tensor '%s' has shape [%s]; config.json asks for [%d]",
                      t->name, got, rows);
}

static lm_status stand_in(struct loader *l, int rows, int cols, const struct st_tensor **out)
{
    l->stand_in = (struct st_tensor){ .name = "made up", .dtype = l->cfg->dtype, .is_float = true };
    l->w->bytes += (size_t)rows * (size_t)LM_MAX(cols, 1) * kn_dtype_size(l->cfg->dtype);
    *out = &l->stand_in;
    return LM_OK;
}

/* `layer` < 0: a tensor outside the layers. cols 0: a vector. */
static lm_status want(struct loader *l, int layer, const char *suffix, int rows, int cols,
                      const struct st_tensor **out)
{
    char name[160];
    if (layer >= 0)
        snprintf(name, sizeof name, "model.layers.%d.%s", layer, suffix);
    else
        snprintf(name, sizeof name, "%s", suffix);
    if (!l->st)
        return stand_in(l, rows, cols, out);
    const struct st_tensor *t = safetensors_find(l->st, name);
    if (!t)
        return lm_err_set(l->err, LM_MISMATCH, "tensor '%s' is missing; a %s of %d layers has it",
                          name, l->cfg->architecture, l->cfg->n_layers);
    if (l->n_used == l->cap_used) {
        int cap = LM_MAX(256, l->cap_used * 2);
        void *p = lm_reallocarray(l->used, (size_t)cap, sizeof *l->used);
        if (!p)
            return lm_err_set(l->err, LM_NOMEM, "no memory for the list of tensors");
        l->used = p;
        l->cap_used = cap;
    }
    l->used[l->n_used++] = t;
    l->w->bytes += t->bytes;
    *out = t;
    return check_shape(l, t, rows, cols);
}

static bool is_used(const struct loader *l, const struct st_tensor *t)
{
    for (int i = 0; i < l->n_used; i++)
        if (l->used[i] == t)
            return true;
    return false;
}

static bool is_harmless(const struct loader *l, const char *name)
{
    static const char buffer[] = "rotary_emb.inv_freq";
    size_t n = strlen(name), k = sizeof buffer - 1;
    if (n >= k && !strcmp(name + n - k, buffer))
        return true;
    return l->cfg->tied_embeddings && !strcmp(name, "lm_head.weight");
}

static lm_status check_extra(const struct loader *l)
{
    int n = safetensors_count(l->st);
    for (int i = 0; i < n && n != l->n_used; i++) {
        const struct st_tensor *t = safetensors_at(l->st, i);
        if (!is_used(l, t) && !is_harmless(l, t->name))
            return lm_err_set(l->err, LM_MISMATCH,
                              "tensor '%s' is not part of a %s with this config.json; the model "
                              "would be computed without it", t->name, l->cfg->architecture);
    }
    return LM_OK;
}

/* ---- vectors --------------------------------------------------------------------------- */

static float half_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = h >> 10 & 31, man = h & 1023, bits;
    if (exp == 0) {             /* zero and subnormals: man * 2^-24 */
        float f = (float)man * 0x1p-24f;
        return sign ? -f : f;
    }
    bits = sign | (exp == 31 ? 255u : exp + 112) << 23 | man << 13;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static float load_float(const void *raw, enum kn_dtype t, int i)
{
    if (t == KN_F32)
        return ((const float *)raw)[i];
    uint16_t half = ((const uint16_t *)raw)[i];
    if (t == KN_F16)
        return half_to_float(half);
    uint32_t bits = (uint32_t)half << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* Elements [first, first + n) of `t` to dst[at]. */
static lm_status upload_floats(struct loader *l, const struct st_tensor *t, int first, int n,
                               float *dst, int at)
{
    const size_t elem = kn_dtype_size(t->dtype);
    lm_status st = LM_OK;
    if (l->st)
        st = safetensors_read(l->st, t, (size_t)first * elem, (size_t)n * elem, l->raw, l->err);
    for (int i = 0; i < n && st == LM_OK; i++) {
        l->staging[i] = l->st ? load_float(l->raw, t->dtype, i) : 1;    /* a norm's weight */
        if (!isfinite(l->staging[i]))
            return lm_err_set(l->err, LM_INVALID, "tensor '%s': element %d is not finite", t->name,
                              first + i);
    }
    if (st != LM_OK)
        return st;
    st = kn_copy_in(l->stream, dst + at, l->staging, (size_t)n * sizeof(float));
    if (st != LM_OK)
        return lm_err_set(l->err, st, "tensor '%s': the copy to the device failed", t->name);
    return kn_stream_sync(l->stream, l->err);
}

static lm_status new_vector(struct loader *l, int n, float **out)
{
    void *p = NULL;
    lm_status st = kn_alloc(l->w->dev, (size_t)n * sizeof(float), &p, l->err);
    *out = p;
    return st;
}

static lm_status load_vector(struct loader *l, int layer, const char *suffix, int n, float **out)
{
    const struct st_tensor *t;
    lm_status st = want(l, layer, suffix, n, 0, &t);
    if (st == LM_OK)
        st = new_vector(l, n, out);
    return st == LM_OK ? upload_floats(l, t, 0, n, *out, 0) : st;
}

/* ---- matrices -------------------------------------------------------------------------- */

/* What a matrix's numbers become; layer < 0: embeddings and head. */
static enum kn_dtype kept_as(const struct loader *l, int layer, enum kn_dtype stored)
{
    struct kn_props props;
    switch (l->as) {
    case WEIGHTS_STORED: return stored;
    case WEIGHTS_BF16: return KN_BF16;
    case WEIGHTS_FP8: break;
    }
    if (layer >= 0)
        return KN_E4M3;
    kn_props(l->w->dev, &props);
    return props.act == KN_BF16 ? KN_BF16 : stored;
}

/* A matrix from up to three tensors stacked by rows; each gives its shard of rows or columns. */
struct part {
    const char *suffix;
    int rows, cols;             /* of the whole tensor */
    bool split_cols;
};

static lm_status load_matrix(struct loader *l, int layer, const struct part *part, int n_parts,
                             kn_mat **out)
{
    const struct st_tensor *t[3];
    int world = l->shard.world, rank = l->shard.rank, rows = 0, cols = 0;
    const size_t before = l->w->bytes;
    enum kn_dtype dtype = KN_F32;
    for (int i = 0; i < n_parts; i++) {
        lm_status st = want(l, layer, part[i].suffix, part[i].rows, part[i].cols, &t[i]);
        if (st != LM_OK)
            return st;
        rows += part[i].split_cols ? part[i].rows : part[i].rows / world;
        cols = part[i].split_cols ? part[i].cols / world : part[i].cols;
        dtype = i == 0 || t[i]->dtype == dtype ? t[i]->dtype : KN_F32;
    }
    dtype = kept_as(l, layer, dtype);
    lm_status st = kn_mat_new(l->w->dev, dtype, rows, cols, out, l->err);
    if (st == LM_OK && l->as != WEIGHTS_STORED)
        l->w->bytes = before + kn_mat_bytes(*out);
    if (st == LM_OK && !l->st)
        return kn_mat_fill(*out, ++l->seed, FILL_SCALE, l->err);
    int row0 = 0;
    for (int i = 0; st == LM_OK && i < n_parts; i++) {
        const bool by_cols = part[i].split_cols;
        int n = by_cols ? part[i].rows : part[i].rows / world;
        const struct upload_rect r = {
            .to = *out, .row0 = row0, .from = t[i], .row = by_cols ? 0 : rank * n, .rows = n,
            .col = by_cols ? rank * cols : 0, .cols = cols,
        };
        st = upload_add(l->upload, &r, l->err);
        row0 += n;
    }
    return st;
}

static lm_status load_bias(struct loader *l, int layer, float **out)
{
    const struct model_config *c = l->cfg;
    int q = c->q_heads * c->head_dim, kv = c->kv_heads * c->head_dim, at = 0;
    const struct part part[3] = {
        { "self_attn.q_proj.bias", q, 0, false },
        { "self_attn.k_proj.bias", kv, 0, false },
        { "self_attn.v_proj.bias", kv, 0, false },
    };
    lm_status st = new_vector(l, (q + 2 * kv) / l->shard.world, out);
    for (int i = 0; st == LM_OK && i < 3; i++) {
        const struct st_tensor *t;
        int n = part[i].rows / l->shard.world;
        st = want(l, layer, part[i].suffix, part[i].rows, 0, &t);
        if (st == LM_OK)
            st = upload_floats(l, t, l->shard.rank * n, n, *out, at);
        at += n;
    }
    return st;
}

static lm_status load_attention(struct loader *l, int i, struct layer_weights *w)
{
    const struct model_config *c = l->cfg;
    int q = c->q_heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    const struct part qkv[3] = {
        { "self_attn.q_proj.weight", q, c->hidden, false },
        { "self_attn.k_proj.weight", kv, c->hidden, false },
        { "self_attn.v_proj.weight", kv, c->hidden, false },
    };
    const struct part o = { "self_attn.o_proj.weight", c->hidden, q, true };
    lm_status st = load_matrix(l, i, qkv, 3, &w->qkv);
    if (st == LM_OK)
        st = load_matrix(l, i, &o, 1, &w->o);
    if (st == LM_OK && c->qkv_bias)
        st = load_bias(l, i, &w->qkv_bias);
    if (st == LM_OK && c->qk_norm)
        st = load_vector(l, i, "self_attn.q_norm.weight", c->head_dim, &w->q_norm);
    if (st == LM_OK && c->qk_norm)
        st = load_vector(l, i, "self_attn.k_norm.weight", c->head_dim, &w->k_norm);
    return st;
}

static lm_status load_layer(struct loader *l, int i, struct layer_weights *w)
{
    const struct model_config *c = l->cfg;
    const struct part gate_up[2] = {
        { "mlp.gate_proj.weight", c->ffn, c->hidden, false },
        { "mlp.up_proj.weight", c->ffn, c->hidden, false },
    };
    const struct part down = { "mlp.down_proj.weight", c->hidden, c->ffn, true };
    lm_status st = load_attention(l, i, w);
    if (st == LM_OK)
        st = load_matrix(l, i, gate_up, 2, &w->gate_up);
    if (st == LM_OK)
        st = load_matrix(l, i, &down, 1, &w->down);
    if (st == LM_OK)
        st = load_vector(l, i, "input_layernorm.weight", c->hidden, &w->attn_norm);
    if (st == LM_OK)
        st = load_vector(l, i, "post_attention_layernorm.weight", c->hidden, &w->ffn_norm);
    return st;
}

static lm_status load_ends(struct loader *l)
{
    const struct model_config *c = l->cfg;
    /* Every rank embeds alone: a gather of rows is cheaper than a reduction. */
    const struct part embed = { "model.embed_tokens.weight", c->vocab, c->hidden, false };
    const struct part head = { "lm_head.weight", c->vocab, c->hidden, false };
    struct shard mine = l->shard;
    l->shard = (struct shard){ 0, 1 };
    lm_status st = load_matrix(l, -1, &embed, 1, &l->w->embed);
    l->shard = mine;
    if (st == LM_OK && (!c->tied_embeddings || mine.world > 1)) {
        const struct part tied = { embed.suffix, c->vocab, c->hidden, false };
        st = load_matrix(l, -1, c->tied_embeddings ? &tied : &head, 1, &l->w->lm_head);
    } else if (st == LM_OK) {
        l->w->lm_head = l->w->embed;
    }
    if (st == LM_OK)
        st = load_vector(l, -1, "model.norm.weight", c->hidden, &l->w->final_norm);
    return st;
}

/* ---- all of it ------------------------------------------------------------------------- */

static lm_status check_shard(const struct model_config *c, struct shard s, struct lm_err *err)
{
    if (s.world < 1 || s.rank < 0 || s.rank >= s.world)
        return lm_err_set(err, LM_INVALID, "shard %d of %d", s.rank, s.world);
    if (c->q_heads % s.world || c->kv_heads % s.world || c->ffn % s.world || c->vocab % s.world)
        return lm_err_set(err, LM_UNSUPPORTED,
                          "%d devices don't divide %d query heads, %d key-value heads, %d "
                          "feed-forward columns and a vocabulary of %d", s.world, c->q_heads,
                          c->kv_heads, c->ffn, c->vocab);
    return LM_OK;
}

static lm_status load_all(struct loader *l)
{
    const struct model_config *c = l->cfg;
    l->staging_n = LM_MAX(c->hidden, (c->q_heads + 2 * c->kv_heads) * c->head_dim);
    void *staging = NULL;
    lm_status st = kn_host_alloc(l->w->dev, (size_t)l->staging_n * sizeof(float), &staging, l->err);
    l->staging = staging;
    l->raw = lm_calloc((size_t)l->staging_n, sizeof *l->raw);
    if (st == LM_OK && !l->raw)
        st = lm_err_set(l->err, LM_NOMEM, "no memory for %d numbers", l->staging_n);
    if (st == LM_OK)
        st = kn_stream_new(l->w->dev, &l->stream, l->err);
    l->w->layer = lm_calloc((size_t)c->n_layers, sizeof *l->w->layer);
    if (st == LM_OK && !l->w->layer)
        st = lm_err_set(l->err, LM_NOMEM, "no memory for %d layers", c->n_layers);
    if (st != LM_OK)
        return st;
    l->w->n_layers = c->n_layers;
    st = load_ends(l);
    for (int i = 0; st == LM_OK && i < c->n_layers; i++)
        st = load_layer(l, i, &l->w->layer[i]);
    return st == LM_OK && l->st ? check_extra(l) : st;
}

/* `files` NULL: without. */
static lm_status make(safetensors *files, const struct model_config *cfg, kn_device *dev,
                      struct shard shard, enum weights_as as, struct weights *out,
                      struct lm_err *err)
{
    *out = (struct weights){ .dev = dev, .files = files };
    struct loader l = { .cfg = cfg, .shard = shard, .as = as, .st = files, .w = out, .err = err };
    lm_status st = check_shard(cfg, shard, err);
    if (st == LM_OK && files)
        st = upload_new(files, dev, &out->upload, err);
    l.upload = out->upload;
    if (st == LM_OK)
        st = load_all(&l);
    if (l.stream)
        kn_stream_free(l.stream);
    kn_host_free(dev, l.staging);
    free(l.raw);
    free(l.used);
    if (st != LM_OK)
        weights_release(out);
    else if (out->upload)
        upload_start(out->upload);
    return st;
}

static void close_files(struct weights *w)
{
    upload_free(w->upload);
    safetensors_close(w->files);
    w->upload = NULL;
    w->files = NULL;
}

lm_status weights_wait(struct weights *w, struct lm_err *err)
{
    lm_status st = w->upload ? upload_wait(w->upload, err) : LM_OK;
    close_files(w);
    return st;
}

lm_status weights_load(safetensors *files, const struct model_config *cfg, kn_device *dev,
                       struct shard shard, enum weights_as as, struct weights *out,
                       struct lm_err *err)
{
    return make(files, cfg, dev, shard, as, out, err);
}

lm_status weights_fill(const struct model_config *cfg, kn_device *dev, struct shard shard,
                       enum weights_as as, struct weights *out, struct lm_err *err)
{
    return make(NULL, cfg, dev, shard, as, out, err);
}

static void layer_release(kn_device *dev, struct layer_weights *w)
{
    kn_mat_free(w->qkv);
    kn_mat_free(w->o);
    kn_mat_free(w->gate_up);
    kn_mat_free(w->down);
    kn_free(dev, w->qkv_bias);
    kn_free(dev, w->attn_norm);
    kn_free(dev, w->ffn_norm);
    kn_free(dev, w->q_norm);
    kn_free(dev, w->k_norm);
}

void weights_release(struct weights *w)
{
    close_files(w);
    for (int i = 0; i < w->n_layers; i++)
        layer_release(w->dev, &w->layer[i]);
    free(w->layer);
    if (w->lm_head != w->embed)
        kn_mat_free(w->lm_head);
    kn_mat_free(w->embed);
    kn_free(w->dev, w->final_norm);
    *w = (struct weights){ 0 };
}
