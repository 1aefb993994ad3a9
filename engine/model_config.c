/* SPDX-License-Identifier: Apache-2.0 */
/*
 * model_config.c - config.json and generation_config.json; see model_config.h.
 *
 * The served families are one table (struct family): what transformers assumes where a config is
 * silent, and which parts of the block they have. The order of reading matters only where one
 * field bounds another: family, sizes, windows, RoPE. Fields that we neither read nor may ignore
 * are sorted out first, by model_config_fields.c, so that a foreign model is refused for what it
 * is and not for a number that happens to be missing.
 */
#include "engine/model_config.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/model_config_internal.h"

#define MAX_CONFIG_BYTES (4u << 20)
#define MAX_HIDDEN (1 << 16)
#define MAX_FFN (1 << 20)
#define MAX_LAYERS 1024
#define MAX_HEADS 1024
#define MAX_HEAD_DIM 1024
#define MAX_VOCAB (1 << 22)
#define MAX_POSITIONS (1 << 24)

struct family {
    const char *model_type, *architecture;
    int kv_heads;               /* where the config is silent; 0: as many as query heads */
    int head_dim;               /* 0: hidden / heads */
    int max_position;
    int window;                 /* Mistral's sliding_window where the key is absent */
    bool window_layers;         /* use_sliding_window, max_window_layers and layer_types count */
    bool qkv_bias, qk_norm;
};

static const struct family families[] = {
    { .model_type = "llama", .architecture = "LlamaForCausalLM", .max_position = 2048 },
    { .model_type = "mistral", .architecture = "MistralForCausalLM", .kv_heads = 8,
      .max_position = 4096 * 32, .window = 4096 },
    { .model_type = "qwen2", .architecture = "Qwen2ForCausalLM", .kv_heads = 32,
      .max_position = 32768, .window_layers = true, .qkv_bias = true },
    { .model_type = "qwen3", .architecture = "Qwen3ForCausalLM", .kv_heads = 32, .head_dim = 128,
      .max_position = 32768, .window_layers = true, .qk_norm = true },
};

/* ---- family ---------------------------------------------------------------------------- */

static const struct family *family_of(const char *model_type)
{
    for (size_t i = 0; i < LM_COUNT(families); i++)
        if (strcmp(model_type, families[i].model_type) == 0)
            return &families[i];
    return NULL;
}

/* "architectures" may be absent, but must not contradict model_type. */
static lm_status check_architecture(const struct ju *j, const struct family *f)
{
    if (!ju_has(j, "architectures"))
        return LM_OK;
    const json_t *list = json_object_get(j->obj, "architectures");
    const char *name = json_string_value(json_array_get(list, 0));
    if (!name || json_array_size(list) != 1)
        return ju_bad_type(j, "architectures", "a list of one name");
    if (strcmp(name, f->architecture) != 0)
        return lm_err_set(j->err, LM_UNSUPPORTED, "%s: architecture \"%.64s\" is not supported"
                          " (for model_type %s: %s)", j->file, name, f->model_type,
                          f->architecture);
    return LM_OK;
}

static lm_status read_family(const struct ju *j, const struct family **out)
{
    const char *type = NULL;
    lm_status s = ju_str(j, "model_type", &type);
    if (s)
        return s;
    if (!type)
        return ju_missing(j, "model_type");
    *out = family_of(type);
    if (!*out)
        return lm_err_set(j->err, LM_UNSUPPORTED, "%s: model_type \"%.32s\" is not supported"
                          " (llama, mistral, qwen2 and qwen3 are)", j->file, type);
    return check_architecture(j, *out);
}

/* ---- sizes ----------------------------------------------------------------------------- */

static lm_status need_int(const struct ju *j, const char *key, int max, int *out)
{
    if (!ju_has(j, key))
        return ju_missing(j, key);
    return ju_int32(j, key, 1, max, out);
}

static lm_status read_heads(const struct ju *j, const struct family *f, struct model_config *c)
{
    /* Absent means the family's default, null means one per query head. */
    bool absent = !json_object_get(j->obj, "num_key_value_heads");
    c->kv_heads = absent && f->kv_heads ? f->kv_heads : c->q_heads;
    absent = !json_object_get(j->obj, "head_dim");
    c->head_dim = absent && f->head_dim ? f->head_dim : 0;
    lm_status s;
    if ((s = ju_int32(j, "num_key_value_heads", 1, MAX_HEADS, &c->kv_heads)) ||
        (s = ju_int32(j, "head_dim", 2, MAX_HEAD_DIM, &c->head_dim)))
        return s;
    if (c->q_heads % c->kv_heads)
        return lm_err_set(j->err, LM_INVALID, "%s: num_attention_heads %d is not a multiple of"
                          " num_key_value_heads %d", j->file, c->q_heads, c->kv_heads);
    if (c->head_dim == 0) {
        if (c->hidden % c->q_heads)
            return lm_err_set(j->err, LM_INVALID, "%s: hidden_size %d is not a multiple of"
                              " num_attention_heads %d", j->file, c->hidden, c->q_heads);
        c->head_dim = c->hidden / c->q_heads;
    }
    if (c->head_dim % 2 || c->head_dim > MAX_HEAD_DIM)
        return lm_err_set(j->err, LM_UNSUPPORTED, "%s: head_dim %d is not an even number up to %d",
                          j->file, c->head_dim, MAX_HEAD_DIM);
    return LM_OK;
}

static lm_status read_sizes(const struct ju *j, const struct family *f, struct model_config *c)
{
    double eps = 1e-6;
    c->max_position = f->max_position;
    lm_status s;
    if ((s = need_int(j, "hidden_size", MAX_HIDDEN, &c->hidden)) ||
        (s = need_int(j, "intermediate_size", MAX_FFN, &c->ffn)) ||
        (s = need_int(j, "num_hidden_layers", MAX_LAYERS, &c->n_layers)) ||
        (s = need_int(j, "num_attention_heads", MAX_HEADS, &c->q_heads)) ||
        (s = need_int(j, "vocab_size", MAX_VOCAB, &c->vocab)) ||
        (s = ju_int32(j, "max_position_embeddings", 1, MAX_POSITIONS, &c->max_position)) ||
        (s = ju_num(j, "rms_norm_eps", 0, 1, &eps)) ||
        (s = ju_bool(j, "tie_word_embeddings", &c->tied_embeddings)))
        return s;
    c->rms_eps = (float)eps;
    return read_heads(j, f, c);
}

static lm_status read_act(const struct ju *j)
{
    const char *act = "silu";
    lm_status s = ju_str(j, "hidden_act", &act);
    if (!s && strcmp(act, "silu") && strcmp(act, "swish"))
        s = lm_err_set(j->err, LM_UNSUPPORTED, "%s: hidden_act \"%.32s\" is not supported (only"
                       " silu)", j->file, act);
    return s;
}

static lm_status read_dtype(const struct ju *j, struct model_config *c)
{
    static const char *const names[] = { "float32", "float16", "bfloat16" };
    static const enum kn_dtype types[] = { KN_F32, KN_F16, KN_BF16 };
    const char *name = "float32";
    lm_status s = ju_str(j, "torch_dtype", &name);
    if (!s)
        s = ju_str(j, "dtype", &name);
    if (s)
        return s;
    if (strncmp(name, "torch.", 6) == 0)
        name += 6;
    for (size_t i = 0; i < LM_COUNT(names); i++) {
        if (strcmp(name, names[i]) == 0 || strcmp(name, "auto") == 0) {
            c->dtype = types[i];
            return LM_OK;
        }
    }
    return lm_err_set(j->err, LM_UNSUPPORTED, "%s: dtype \"%.32s\" is not supported (float32,"
                      " float16 and bfloat16 are)", j->file, name);
}

/* ---- windows --------------------------------------------------------------------------- */

/* layer_types, if present, must say what `window` says; for Qwen it is what says it. */
static lm_status apply_layer_types(const struct ju *j, const struct family *f, int window,
                                   struct model_config *c)
{
    const json_t *types = json_object_get(j->obj, "layer_types");
    if (!json_is_array(types) || json_array_size(types) != (size_t)c->n_layers)
        return lm_err_set(j->err, LM_FORMAT, "%s: layer_types is not a list of %d names", j->file,
                          c->n_layers);
    for (int i = 0; i < c->n_layers; i++) {
        const char *t = json_string_value(json_array_get(types, (size_t)i));
        bool sliding = t && strcmp(t, "sliding_attention") == 0;
        if (!sliding && (!t || strcmp(t, "full_attention") != 0))
            return lm_err_set(j->err, LM_UNSUPPORTED, "%s: layer_types[%d] \"%.32s\" is not"
                              " supported (full_attention and sliding_attention are)", j->file, i,
                              t ? t : "?");
        if (sliding && window == 0)
            return lm_err_set(j->err, LM_INVALID, "%s: layer_types[%d] is sliding_attention, but no"
                              " sliding window is in use", j->file, i);
        if (!f->window_layers && sliding != (c->window[i] != 0))
            return lm_err_set(j->err, LM_UNSUPPORTED, "%s: layer_types[%d] \"%.32s\" differs from"
                              " what model_type %s computes", j->file, i, t, f->model_type);
        c->window[i] = sliding ? window : 0;
    }
    return LM_OK;
}

static lm_status read_window_size(const struct ju *j, const struct family *f, int *window)
{
    bool absent = !json_object_get(j->obj, "sliding_window");
    bool use = f->window > 0;
    *window = absent ? f->window : 0;
    if (f->window_layers && absent)
        *window = 4096;
    lm_status s = ju_int32(j, "sliding_window", 1, MAX_POSITIONS, window);
    if (!s && f->window_layers)
        s = ju_bool(j, "use_sliding_window", &use);
    if (s)
        return s;
    if (!f->window_layers && !f->window && *window)
        return lm_err_set(j->err, LM_UNSUPPORTED, "%s: sliding_window is set, but model_type %s has"
                          " none", j->file, f->model_type);
    if (!use)
        *window = 0;
    return LM_OK;
}

static lm_status read_windows(const struct ju *j, const struct family *f, struct model_config *c)
{
    int window = 0, first = f->window_layers ? 28 : 0;
    lm_status s = read_window_size(j, f, &window);
    if (!s && f->window_layers)
        s = ju_int32(j, "max_window_layers", 0, 1 << 20, &first);
    if (s)
        return s;
    c->window = lm_calloc((size_t)c->n_layers, sizeof *c->window);
    if (!c->window)
        return lm_err_set(j->err, LM_NOMEM, "%s: no memory", j->file);
    for (int i = first; i < c->n_layers; i++)
        c->window[i] = window;
    return ju_has(j, "layer_types") ? apply_layer_types(j, f, window, c) : LM_OK;
}

/* ---- special tokens -------------------------------------------------------------------- */

static lm_status add_eos(const struct ju *j, const json_t *v, struct model_config *c)
{
    if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > INT32_MAX)
        return ju_bad_type(j, "eos_token_id", "a token id or a list of them");
    int32_t id = (int32_t)json_integer_value(v);
    for (int i = 0; i < c->n_eos; i++)
        if (c->eos_ids[i] == id)
            return LM_OK;
    if (c->n_eos == (int)LM_COUNT(c->eos_ids))
        return lm_err_set(j->err, LM_UNSUPPORTED, "%s: eos_token_id lists more than %zu ids",
                          j->file, LM_COUNT(c->eos_ids));
    c->eos_ids[c->n_eos++] = id;
    return LM_OK;
}

/* eos_token_id (an id or a list), appended to c->eos_ids without duplicates. */
static lm_status read_eos(const struct ju *j, struct model_config *c)
{
    const json_t *v = json_object_get(j->obj, "eos_token_id");
    if (!ju_has(j, "eos_token_id"))
        return LM_OK;
    if (!json_is_array(v))
        return add_eos(j, v, c);
    for (size_t i = 0; i < json_array_size(v); i++) {
        lm_status s = add_eos(j, json_array_get(v, i), c);
        if (s)
            return s;
    }
    return LM_OK;
}

/* ---- the two files --------------------------------------------------------------------- */

static lm_status read_config(const struct ju *j, struct model_config *c)
{
    const struct family *f = NULL;
    int bos = -1;
    lm_status s;
    if ((s = read_family(j, &f)) || (s = model_config_check_fields(j)) ||
        (s = read_sizes(j, f, c)) || (s = read_act(j)) || (s = read_dtype(j, c)) ||
        (s = read_windows(j, f, c)) || (s = model_config_rope(j, c)) ||
        (s = ju_int32(j, "bos_token_id", 0, INT32_MAX, &bos)) || (s = read_eos(j, c)))
        return s;
    snprintf(c->architecture, sizeof c->architecture, "%s", f->architecture);
    snprintf(c->model_type, sizeof c->model_type, "%s", f->model_type);
    c->qkv_bias = f->qkv_bias;
    c->qk_norm = f->qk_norm;
    c->bos_id = bos;
    return LM_OK;
}

static void no_defaults(struct model_config *c)
{
    c->bos_id = -1;
    c->gen_temperature = c->gen_top_p = c->gen_min_p = c->gen_repetition_penalty = NAN;
    c->gen_top_k = c->gen_max_new_tokens = -1;
    c->gen_do_sample_false = true;
}

static lm_status gen_float(const struct ju *j, const char *key, double lo, double hi, float *out)
{
    double x = NAN;
    lm_status s = ju_num(j, key, lo, hi, &x);
    if (!s)
        *out = (float)x;
    return s;
}

static lm_status read_generation(const struct ju *j, struct model_config *c)
{
    bool sample = false;
    int bos = c->bos_id;
    lm_status s;
    if ((s = ju_bool(j, "do_sample", &sample)) ||
        (s = gen_float(j, "temperature", 0, 1e6, &c->gen_temperature)) ||
        (s = gen_float(j, "top_p", 1e-9, 1, &c->gen_top_p)) ||
        (s = gen_float(j, "min_p", 0, 1, &c->gen_min_p)) ||
        (s = gen_float(j, "repetition_penalty", 1e-6, 1e6, &c->gen_repetition_penalty)) ||
        (s = ju_int32(j, "top_k", 0, INT32_MAX, &c->gen_top_k)) ||
        (s = ju_int32(j, "max_new_tokens", 1, INT32_MAX, &c->gen_max_new_tokens)) ||
        (s = ju_int32(j, "bos_token_id", 0, INT32_MAX, &bos)))
        return s;
    c->gen_do_sample_false = !sample;
    c->bos_id = bos;
    return read_eos(j, c);
}

static lm_status parse_one(const char *text, size_t n, const char *file,
                           lm_status (*reader)(const struct ju *, struct model_config *),
                           struct model_config *c, struct lm_err *err)
{
    json_t *v = NULL;
    lm_status s = ju_parse(text, n, file, &v, err);
    if (s)
        return s;
    struct ju j = { .obj = v, .file = file, .path = "", .err = err };
    s = reader(&j, c);
    json_decref(v);
    return s;
}

lm_status model_config_parse(const char *config, size_t config_n, const char *generation,
                             size_t generation_n, struct model_config *out, struct lm_err *err)
{
    memset(out, 0, sizeof *out);
    no_defaults(out);
    lm_status s = parse_one(config, config_n, "config.json", read_config, out, err);
    if (!s && generation)
        s = parse_one(generation, generation_n, "generation_config.json", read_generation, out,
                      err);
    if (s)
        model_config_release(out);
    return s;
}

lm_status model_config_load(const char *dir, struct model_config *out, struct lm_err *err)
{
    memset(out, 0, sizeof *out);
    char *path = ju_join(dir, "config.json"), *gen_path = ju_join(dir, "generation_config.json");
    char *text = NULL, *gen = NULL;
    size_t n = 0, gen_n = 0;
    lm_status s = path && gen_path ? LM_OK : lm_err_set(err, LM_NOMEM, "%s: no memory", dir);
    if (!s)
        s = ju_read_file(path, MAX_CONFIG_BYTES, &text, &n, err);
    if (!s) {
        s = ju_read_file(gen_path, MAX_CONFIG_BYTES, &gen, &gen_n, err);
        if (s == LM_NOT_FOUND)
            s = LM_OK;
    }
    if (!s) {
        s = model_config_parse(text, n, gen, gen_n, out, err);
        if (s)
            lm_err_prefix(err, "%s", dir);
    }
    free(text);
    free(gen);
    free(path);
    free(gen_path);
    return s;
}

lm_status model_config_load_file(const char *path, struct model_config *out, struct lm_err *err)
{
    char *text = NULL;
    size_t n = 0;
    memset(out, 0, sizeof *out);
    lm_status s = ju_read_file(path, MAX_CONFIG_BYTES, &text, &n, err);
    if (!s) {
        s = model_config_parse(text, n, NULL, 0, out, err);
        if (s)
            lm_err_prefix(err, "%s", path);
    }
    free(text);
    return s;
}

void model_config_release(struct model_config *c)
{
    free(c->window);
    free(c->inv_freq);
    c->window = NULL;
    c->inv_freq = NULL;
}
