/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_config.c - adapter_config.json resolved into a plan, as the PEFT library resolves it.
 *
 * PEFT walks the module names of the model ("model.layers.0.self_attn.q_proj", "lm_head", norms
 * and containers too) and asks for each: is it excluded, is it targeted, which rank, which alpha.
 * We build the same list of names and ask the same questions, in the same order:
 *   exclude_modules   a string is a full-match regex; a list matches a whole name or a dotted tail
 *   target_modules    "all-linear" (any case) is every linear module but lm_head; another string is
 *                     a full-match regex; a list matches a whole name, or a dotted tail, the tail
 *                     then subject to layers_to_transform / layers_pattern; null is PEFT's default
 *                     for the served families, q_proj and v_proj
 *   rank_pattern,     the first key, in the file's order, for which re.match("(.*\.)?(KEY)$")
 *   alpha_pattern     holds; else r and lora_alpha
 *   scale             alpha / r, or alpha / sqrt(r) with use_rslora
 * fan_in_fan_out tells how a base weight is stored; our bases store linear layers one way, PEFT
 * overrides the flag for them, and A and B are not affected: it is accepted and has no effect.
 *
 * Anything that makes more of an adapter than A and B beside linear layers is refused by name. A
 * key that we have never heard of is ignored if switched off (null, false, 0, empty), else refused.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "engine/adapter_internal.h"

#define MAX_LIST 16384
#define MAX_PATTERNS 8192
#define NAME_MAX_CHARS 96
#define MAX_RESOLVE_US (20 * 1000000LL)

const char *const adapter_module_path[KN_MODULES] = {
    [KN_Q] = "self_attn.q_proj", [KN_K] = "self_attn.k_proj", [KN_V] = "self_attn.v_proj",
    [KN_O] = "self_attn.o_proj", [KN_GATE] = "mlp.gate_proj", [KN_UP] = "mlp.up_proj",
    [KN_DOWN] = "mlp.down_proj",
};

/* ---- which keys may be there ----------------------------------------------------------- */

static const char *const used_keys[] = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias",
    "init_lora_weights", "fan_in_fan_out",
};

/* Training, bookkeeping, or options of initialisers that init_lora_weights decides about. */
static const char *const harmless_keys[] = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "lora_dropout", "lora_ga_config", "megatron_core", "merge_weights",
    "model_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    "unsloth_fixed", "unsloth_version", "velora_config",
};

static lm_status check_keys(const struct ju *j)
{
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)j->obj, key, v) {
        if (ju_name_in(key, used_keys, LM_COUNT(used_keys)) ||
            ju_name_in(key, harmless_keys, LM_COUNT(harmless_keys)) || ju_is_off(v))
            continue;
        char b[64];
        return lm_err_set(j->err, LM_UNSUPPORTED, "%s: %.64s = %s is not supported", j->file, key,
                          ju_brief(v, b, sizeof b));
    }
    return LM_OK;
}

/* Initialisers that leave the base model as it was. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change
 * it: their adapters are right only beside that changed base, unless PEFT converted them when
 * saving, in which case it wrote "init_lora_weights": true. */
static lm_status check_init(const struct ju *j)
{
    static const char *const plain[] = { "gaussian", "orthogonal", "eva", "mica" };
    const json_t *v = json_object_get(j->obj, "init_lora_weights");
    if (!ju_has(j, "init_lora_weights") || json_is_boolean(v))
        return LM_OK;
    const char *name = json_string_value(v);
    if (!name)
        return ju_bad_type(j, "init_lora_weights", "true, false or a name");
    if (ju_name_in(name, plain, LM_COUNT(plain)))
        return LM_OK;
    return lm_err_set(j->err, LM_UNSUPPORTED, "%s: init_lora_weights \"%.32s\" changes the base"
                      " model; convert the adapter with PEFT's"
                      " path_initial_model_for_weight_conversion", j->file, name);
}

static lm_status check_kind(const struct ju *j)
{
    const char *type = NULL, *bias = "none";
    bool fan = false;
    lm_status s;
    if ((s = ju_str(j, "peft_type", &type)) || (s = ju_str(j, "bias", &bias)) ||
        (s = ju_bool(j, "fan_in_fan_out", &fan)))
        return s;
    if (!type)
        return ju_missing(j, "peft_type");
    if (strcmp(type, "LORA") != 0)
        return lm_err_set(j->err, LM_UNSUPPORTED, "%s: peft_type \"%.32s\" is not supported (only"
                          " LORA)", j->file, type);
    if (strcmp(bias, "none") != 0)
        return lm_err_set(j->err, LM_UNSUPPORTED, "%s: bias \"%.32s\" is not supported (only"
                          " none)", j->file, bias);
    return check_init(j);
}

/* ---- matchers -------------------------------------------------------------------------- */

/* target_modules or exclude_modules. */
struct matcher {
    const json_t *list;         /* or NULL */
    adapter_regex *regex;       /* or NULL */
    bool all_linear, none;
};

static bool tail_matches(const char *name, const char *tail)
{
    size_t n = strlen(name), t = strlen(tail);
    return n > t && name[n - t - 1] == '.' && strcmp(name + n - t, tail) == 0;
}

static lm_status matcher_init(const struct ju *j, const char *key, struct matcher *m)
{
    const json_t *v = json_object_get(j->obj, key);
    m->none = !ju_has(j, key);
    if (m->none)
        return LM_OK;
    if (json_is_string(v)) {
        const char *text = json_string_value(v);
        if (strcmp(key, "target_modules") == 0 && strcasecmp(text, "all-linear") == 0) {
            m->all_linear = true;
            return LM_OK;
        }
        char what[96];
        snprintf(what, sizeof what, "%s: %s", j->file, key);
        return adapter_regex_new("", text, "", what, &m->regex, j->err);
    }
    if (!json_is_array(v) || json_array_size(v) > MAX_LIST)
        return ju_bad_type(j, key, "a string or a list of strings");
    for (size_t i = 0; i < json_array_size(v); i++)
        if (!json_is_string(json_array_get(v, i)))
            return ju_bad_type(j, key, "a string or a list of strings");
    m->list = v;
    return LM_OK;
}

enum hit { MISS, HIT, TAIL_HIT };

static lm_status matcher_run(const struct matcher *m, const char *name, enum hit *hit,
                             struct lm_err *err)
{
    *hit = MISS;
    if (m->regex) {
        bool yes = false;
        lm_status s = adapter_regex_match(m->regex, name, true, &yes, err);
        *hit = yes ? HIT : MISS;
        return s;
    }
    for (size_t i = 0; i < json_array_size(m->list); i++) {
        const char *t = json_string_value(json_array_get(m->list, i));
        if (strcmp(name, t) == 0) {
            *hit = HIT;
            return LM_OK;
        }
        if (tail_matches(name, t))
            *hit = TAIL_HIT;
    }
    return LM_OK;
}

/* layers_to_transform and layers_pattern. */
struct layer_filter {
    const json_t *layers;       /* an integer, a list of them, or NULL: no filter */
    adapter_regex **patterns;
    size_t n_patterns;
};

static lm_status add_layer_pattern(const struct ju *j, struct layer_filter *f, const json_t *v)
{
    const char *text = json_string_value(v);
    if (!text)
        return ju_bad_type(j, "layers_pattern", "a string or a list of strings");
    adapter_regex *r = NULL;
    lm_status s = adapter_regex_new("(?:^|.*?\\.)", text, "\\.(?P<idx>\\d+)\\.",
                                    ADAPTER_CONFIG_FILE ": layers_pattern", &r, j->err);
    if (!s)
        f->patterns[f->n_patterns++] = r;
    return s;
}

static lm_status layer_filter_init(const struct ju *j, bool string_targets, struct layer_filter *f)
{
    const json_t *layers = json_object_get(j->obj, "layers_to_transform");
    const json_t *pattern = json_object_get(j->obj, "layers_pattern");
    bool has_layers = ju_has(j, "layers_to_transform");
    if (string_targets && (has_layers || ju_has(j, "layers_pattern")))
        return lm_err_set(j->err, LM_INVALID, "%s: layers_to_transform and layers_pattern cannot be"
                          " used when target_modules is a string", j->file);
    if (!ju_is_off(pattern) && !has_layers)
        return lm_err_set(j->err, LM_INVALID, "%s: layers_pattern needs layers_to_transform",
                          j->file);
    if (!has_layers || (json_is_array(layers) && json_array_size(layers) == 0))
        return LM_OK;
    if (json_array_size(layers) > MAX_LIST)
        return ju_bad_type(j, "layers_to_transform", "an integer or a short list of integers");
    for (size_t i = 0; i < json_array_size(layers); i++)
        if (!json_is_integer(json_array_get(layers, i)))
            return ju_bad_type(j, "layers_to_transform", "an integer or a list of integers");
    if (!json_is_array(layers) && !json_is_integer(layers))
        return ju_bad_type(j, "layers_to_transform", "an integer or a list of integers");
    f->layers = layers;
    if (ju_is_off(pattern))
        return LM_OK;
    size_t n = json_is_array(pattern) ? json_array_size(pattern) : 1;
    if (n > 64)
        return ju_bad_type(j, "layers_pattern", "at most 64 patterns");
    f->patterns = lm_calloc(n, sizeof *f->patterns);
    if (!f->patterns)
        return lm_err_set(j->err, LM_NOMEM, "%s: no memory", j->file);
    lm_status s = LM_OK;
    for (size_t i = 0; i < n && !s; i++)
        s = add_layer_pattern(j, f, json_is_array(pattern) ? json_array_get(pattern, i) : pattern);
    return s;
}

/* The layer index that PEFT reads out of the name; -1 if none. */
static lm_status layer_index(const struct layer_filter *f, const char *name, int layer, int *out,
                             struct lm_err *err)
{
    *out = layer;
    for (size_t i = 0; i < f->n_patterns; i++) {
        bool hit = false;
        lm_status s = adapter_regex_match(f->patterns[i], name, false, &hit, err);
        if (s)
            return s;
        *out = hit ? adapter_regex_group_int(f->patterns[i], "idx") : -1;
        if (hit)
            return LM_OK;
    }
    return LM_OK;
}

static lm_status layer_filter_run(const struct layer_filter *f, const char *name, int layer,
                                  bool *keep, struct lm_err *err)
{
    *keep = true;
    if (!f->layers)
        return LM_OK;
    int index = -1;
    lm_status s = layer_index(f, name, layer, &index, err);
    if (s)
        return s;
    *keep = false;
    if (index < 0)
        return LM_OK;
    if (json_is_integer(f->layers))
        *keep = json_integer_value(f->layers) == index;
    for (size_t i = 0; i < json_array_size(f->layers) && !*keep; i++)
        *keep = json_integer_value(json_array_get(f->layers, i)) == index;
    return LM_OK;
}

/* rank_pattern or alpha_pattern. */
struct pattern_map {
    adapter_regex **keys;
    double *values;
    size_t n;
};

static lm_status pattern_value(const struct ju *sub, const char *key, bool integer, double *out)
{
    if (!ju_has(sub, key))
        return ju_bad_type(sub, key, "a number");
    if (!integer)
        return ju_num(sub, key, 0, 1e9, out);
    int64_t r = 0;
    lm_status s = ju_int(sub, key, 1, ADAPTER_MAX_RANK, &r);
    *out = (double)r;
    return s;
}

static lm_status pattern_map_init(const struct ju *j, const char *key, bool integer,
                                  struct pattern_map *m)
{
    const json_t *v = json_object_get(j->obj, key);
    if (ju_is_off(v))
        return LM_OK;
    if (!json_is_object(v) || json_object_size(v) > MAX_PATTERNS)
        return ju_bad_type(j, key, "an object of patterns");
    char what[96], path[64];
    snprintf(what, sizeof what, "%s: %s", j->file, key);
    snprintf(path, sizeof path, "%s.", key);
    struct ju sub = { .obj = v, .file = j->file, .path = path, .err = j->err };
    m->keys = lm_calloc(json_object_size(v), sizeof *m->keys);
    m->values = lm_calloc(json_object_size(v), sizeof *m->values);
    if (!m->keys || !m->values)
        return lm_err_set(j->err, LM_NOMEM, "%s: no memory", j->file);
    const char *pattern;
    json_t *value;
    json_object_foreach((json_t *)v, pattern, value) {
        lm_status s = pattern_value(&sub, pattern, integer, &m->values[m->n]);
        if (!s)
            s = adapter_regex_new("(.*\\.)?(", pattern, ")$", what, &m->keys[m->n], j->err);
        if (s)
            return s;
        m->n++;
    }
    return LM_OK;
}

static lm_status pattern_map_run(const struct pattern_map *m, const char *name, double *value,
                                 struct lm_err *err)
{
    for (size_t i = 0; i < m->n; i++) {
        bool hit = false;
        lm_status s = adapter_regex_match(m->keys[i], name, false, &hit, err);
        if (s)
            return s;
        if (hit) {
            *value = m->values[i];
            return LM_OK;
        }
    }
    return LM_OK;
}

static void pattern_map_free(struct pattern_map *m)
{
    for (size_t i = 0; i < m->n; i++)
        adapter_regex_free(m->keys[i]);
    free(m->keys);
    free(m->values);
}

/* ---- resolution ------------------------------------------------------------------------ */

struct resolver {
    struct ju j;
    struct matcher target, exclude;
    struct layer_filter layers;
    struct pattern_map ranks, alphas;
    int rank;
    double alpha;
    bool rslora;
    const struct model_config *cfg;
    struct adapter_plan *plan;
    int n_targeted;
};

static lm_status read_settings(struct resolver *r)
{
    struct ju *j = &r->j;
    lm_status s;
    if ((s = check_kind(j)) || (s = check_keys(j)))
        return s;
    r->rank = 8;
    r->alpha = 8;
    if ((s = ju_int32(j, "r", 1, ADAPTER_MAX_RANK, &r->rank)) ||
        (s = ju_num(j, "lora_alpha", 0, 1e9, &r->alpha)) ||
        (s = ju_bool(j, "use_rslora", &r->rslora)) ||
        (s = matcher_init(j, "target_modules", &r->target)) ||
        (s = matcher_init(j, "exclude_modules", &r->exclude)))
        return s;
    bool string_targets = r->target.regex || r->target.all_linear;
    if ((s = layer_filter_init(j, string_targets, &r->layers)) ||
        (s = pattern_map_init(j, "rank_pattern", true, &r->ranks)))
        return s;
    return pattern_map_init(j, "alpha_pattern", false, &r->alphas);
}

/* PEFT's default where target_modules is null. */
static bool is_default_target(enum kn_module m)
{
    return m == KN_Q || m == KN_V;
}

/* `m` is KN_MODULES for a module that is not linear, `layer` -1 outside the layers. */
static lm_status is_targeted(const struct resolver *r, const char *name, int layer,
                             enum kn_module m, bool *yes)
{
    enum hit hit = MISS;
    lm_status s = r->exclude.none ? LM_OK : matcher_run(&r->exclude, name, &hit, r->j.err);
    *yes = false;
    if (s || hit != MISS)
        return s;
    if (r->target.all_linear) {
        *yes = m != KN_MODULES;
        return LM_OK;
    }
    if (r->target.none)
        hit = m != KN_MODULES && is_default_target(m) ? TAIL_HIT : MISS;
    else
        s = matcher_run(&r->target, name, &hit, r->j.err);
    if (s || hit == MISS)
        return s;
    if (hit == TAIL_HIT)
        return layer_filter_run(&r->layers, name, layer, yes, r->j.err);
    *yes = true;
    return LM_OK;
}

static lm_status visit_linear(struct resolver *r, int layer, enum kn_module m)
{
    char name[NAME_MAX_CHARS];
    snprintf(name, sizeof name, "model.layers.%d.%s", layer, adapter_module_path[m]);
    bool yes = false;
    lm_status s = is_targeted(r, name, layer, m, &yes);
    if (s || !yes)
        return s;
    double rank = r->rank, alpha = r->alpha;
    if ((s = pattern_map_run(&r->ranks, name, &rank, r->j.err)) ||
        (s = pattern_map_run(&r->alphas, name, &alpha, r->j.err)))
        return s;
    struct adapter_slot *slot = &r->plan->slots[layer][m];
    slot->rank = (int)rank;
    slot->scale = (float)(alpha / (r->rslora ? sqrt(rank) : rank));
    r->n_targeted++;
    return LM_OK;
}

/* A module that exists but that no adapter of ours may touch. */
static lm_status visit_other(const struct resolver *r, const char *name, int layer)
{
    bool yes = false;
    lm_status s = is_targeted(r, name, layer, KN_MODULES, &yes);
    if (!s && yes)
        s = lm_err_set(r->j.err, LM_UNSUPPORTED, "%s: target_modules selects %s; adapters are"
                       " supported on the linear modules of the layers only", r->j.file, name);
    return s;
}

static lm_status visit_layer(struct resolver *r, int layer)
{
    static const char *const others[] = {
        "", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm", ".post_attention_layernorm",
    };
    static const char *const qk[] = { ".self_attn.q_norm", ".self_attn.k_norm" };
    char name[NAME_MAX_CHARS];
    lm_status s = LM_OK;
    for (int m = 0; m < KN_MODULES && !s; m++)
        s = visit_linear(r, layer, (enum kn_module)m);
    for (size_t i = 0; i < LM_COUNT(others) && !s; i++) {
        snprintf(name, sizeof name, "model.layers.%d%s", layer, others[i]);
        s = visit_other(r, name, layer);
    }
    for (size_t i = 0; i < LM_COUNT(qk) && !s && r->cfg->qk_norm; i++) {
        snprintf(name, sizeof name, "model.layers.%d%s", layer, qk[i]);
        s = visit_other(r, name, layer);
    }
    return s;
}

static lm_status visit_all(struct resolver *r)
{
    static const char *const outside[] = {
        "model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head",
    };
    lm_status s = LM_OK;
    for (size_t i = 0; i < LM_COUNT(outside) && !s; i++)
        s = visit_other(r, outside[i], -1);
    int64_t start = lm_now_us();
    for (int l = 0; l < r->cfg->n_layers && !s; l++) {
        s = visit_layer(r, l);
        /* Thousands of slow patterns, each within its limit, must not hold a loader for hours. */
        if (!s && lm_now_us() - start > MAX_RESOLVE_US)
            s = lm_err_set(r->j.err, LM_INVALID, "%s: its patterns take too long to match",
                           r->j.file);
    }
    if (!s && r->n_targeted == 0)
        s = lm_err_set(r->j.err, LM_MISMATCH, "%s: target_modules, exclude_modules and"
                       " layers_to_transform together select no module of the model", r->j.file);
    return s;
}

static void resolver_release(struct resolver *r)
{
    adapter_regex_free(r->target.regex);
    adapter_regex_free(r->exclude.regex);
    for (size_t i = 0; i < r->layers.n_patterns; i++)
        adapter_regex_free(r->layers.patterns[i]);
    free(r->layers.patterns);
    pattern_map_free(&r->ranks);
    pattern_map_free(&r->alphas);
}

lm_status adapter_config_resolve(const char *text, size_t n, const struct model_config *cfg,
                                 struct adapter_plan *out, struct lm_err *err)
{
    json_t *v = NULL;
    memset(out, 0, sizeof *out);
    lm_status s = ju_parse(text, n, ADAPTER_CONFIG_FILE, &v, err);
    if (s)
        return s;
    struct resolver r = { .j = { .obj = v, .file = ADAPTER_CONFIG_FILE, .path = "", .err = err },
                          .cfg = cfg, .plan = out };
    out->n_layers = cfg->n_layers;
    out->slots = lm_calloc((size_t)cfg->n_layers, sizeof *out->slots);
    if (!out->slots)
        s = lm_err_set(err, LM_NOMEM, "%s: no memory", ADAPTER_CONFIG_FILE);
    if (!s)
        s = read_settings(&r);
    if (!s)
        s = visit_all(&r);
    resolver_release(&r);
    json_decref(v);
    if (s)
        adapter_plan_release(out);
    return s;
}

void adapter_plan_release(struct adapter_plan *p)
{
    free(p->slots);
    p->slots = NULL;
}
