/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_adapter.c - settings resolve as PEFT resolves them (tests/golden/plans.json), images hold
 * the tensors exactly where kernels.h says, and what we don't serve is refused with its reason.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <math.h>
#include <unistd.h>

#include "engine/adapter.h"
#include "engine/adapter_internal.h"
#include "tests/unit/safetensors_build.h"

#define FAMILIES "tests/fixtures/families/"

static struct model_config tiny_config(void)
{
    static const char *text =
        "{\"model_type\":\"llama\",\"hidden_size\":64,\"intermediate_size\":128,"
        "\"num_hidden_layers\":3,\"num_attention_heads\":4,\"num_key_value_heads\":2,"
        "\"vocab_size\":32}";
    struct model_config c;
    assert_int_equal(model_config_parse(text, strlen(text), NULL, 0, &c, NULL), LM_OK);
    return c;
}

/* ---- settings against PEFT ------------------------------------------------------------- */

static json_t *full_settings(const json_t *settings)
{
    json_t *v = json_pack("{s:s,s:i,s:i}", "peft_type", "LORA", "r", 4, "lora_alpha", 8);
    json_object_update(v, (json_t *)settings);
    return v;
}

/* Does PEFT's plan reach beyond the layers' linear modules? Then we must refuse. */
static bool beyond_layers(const json_t *plan)
{
    const char *name;
    json_t *v;
    json_object_foreach((json_t *)plan, name, v)
        if (strncmp(name, "model.layers.", 13) != 0)
            return true;
    return false;
}

static void compare_plan(const json_t *want, const struct adapter_plan *plan, const char *settings)
{
    size_t n = 0;
    for (int l = 0; l < plan->n_layers; l++) {
        for (int m = 0; m < KN_MODULES; m++) {
            const struct adapter_slot *s = &plan->slots[l][m];
            char name[96];
            snprintf(name, sizeof name, "model.layers.%d.%s", l, adapter_module_path[m]);
            const json_t *w = json_object_get(want, name);
            int rank = (int)json_integer_value(json_array_get(w, 0));
            float scale = (float)json_number_value(json_array_get(w, 1));
            if (s->rank != rank || s->scale != scale)
                fail_msg("%s: %s: rank %d scale %g, PEFT has %d and %g", settings, name, s->rank,
                         s->scale, rank, scale);
            n += s->rank != 0;
        }
    }
    assert_int_equal(n, json_object_size(want));
}

static void resolves_as_peft_does(void **state)
{
    (void)state;
    struct model_config cfg = tiny_config();
    json_t *file = json_load_file("tests/golden/plans.json", 0, NULL);
    json_t *cases = json_object_get(file, "cases");
    size_t agreed = 0, refused = 0;
    for (size_t i = 0; i < json_array_size(cases); i++) {
        json_t *item = json_array_get(cases, i), *want = json_object_get(item, "plan");
        json_t *settings = full_settings(json_object_get(item, "settings"));
        char *text = json_dumps(settings, 0);
        struct adapter_plan plan;
        struct lm_err err = { 0 };
        lm_status s = adapter_config_resolve(text, strlen(text), &cfg, &plan, &err);
        if (json_is_null(want) || beyond_layers(want)) {
            if (s == LM_OK || !err.msg[0])
                fail_msg("%s: must be refused", text);
            refused++;
        } else {
            if (s)
                fail_msg("%s: %s", text, err.msg);
            compare_plan(want, &plan, text);
            adapter_plan_release(&plan);
            agreed++;
        }
        free(text);
        json_decref(settings);
    }
    assert_true(agreed >= 40 && refused >= 15);
    json_decref(file);
    model_config_release(&cfg);
}

/* ---- images ---------------------------------------------------------------------------- */

static float element(const void *p, enum kn_dtype t, int64_t i)
{
    uint32_t u;
    float f;
    if (t == KN_F32)
        return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    if (t == KN_BF16) {
        u = (uint32_t)h << 16;
        memcpy(&f, &u, sizeof f);
        return f;
    }
    int e = h >> 10 & 31;
    f = e ? ldexpf(1.0f + (float)(h & 1023) / 1024, e - 15) : ldexpf((float)(h & 1023), -24);
    return h & 0x8000 ? -f : f;
}

/* Element (j, i) of a packed matrix, found as the comment in kernels.h tells. */
static float packed(const struct adapter_image *img, const struct kn_lora_matrix *m,
                    enum kn_dtype t, int64_t j, int64_t i)
{
    int64_t k = i / m->width, cell = m->cell, at = m->offset + k * m->chunk_bytes;
    if (k >= m->first_n) {
        cell = m->cell + 1 + (k - m->first_n) / m->per_cell;
        at = (k - m->first_n) % m->per_cell * m->chunk_bytes;
    }
    assert_true(cell < img->n_cells && at + m->chunk_bytes <= img->cell_bytes);
    assert_int_equal(at % 16, 0);
    return element(img->cells + cell * img->cell_bytes + at, t, j * m->width + i % m->width);
}

static void compare_matrix(const struct adapter_image *img, const struct kn_lora_matrix *m,
                           enum kn_dtype t, const struct st_tensor *src, bool is_a)
{
    int64_t rank = src->shape[is_a ? 0 : 1], n = src->shape[is_a ? 1 : 0];
    float tolerance = t == KN_F32 ? 0 : t == KN_F16 ? 0x1p-11f : 0x1p-8f;
    assert_true(m->width > 0);
    for (int64_t j = 0; j < rank; j++) {
        for (int64_t i = 0; i < n; i++) {
            float want = element(src->data, src->dtype, is_a ? j * n + i : i * rank + j);
            float got = packed(img, m, t, j, i);
            if (!(fabsf(got - want) <= tolerance * fabsf(want) + (t == KN_F16 ? 0x1p-24f : 0)))
                fail_msg("%s [%d, %d]: %g, expected %g", src->name, (int)j, (int)i, got, want);
        }
        for (int64_t i = n; i % m->width; i++)          /* padding */
            assert_true(packed(img, m, t, j, i) == 0);
    }
}

static const struct st_tensor *tensor_of(const safetensors *st, int layer, int m, char which)
{
    char name[160];
    snprintf(name, sizeof name, "base_model.model.model.layers.%d.%s.lora_%c.weight", layer,
             adapter_module_path[m], which);
    return safetensors_find(st, name);
}

static void compare_image(const struct adapter_image *img, const struct model_config *cfg,
                          enum kn_dtype t, const safetensors *st)
{
    int64_t rows = img->cell_bytes / (int64_t)sizeof(struct kn_lora_row);
    int used = 0, top[KN_MODULES] = { 0 };
    for (int l = 0; l < cfg->n_layers; l++) {
        struct kn_lora_row row;
        memcpy(&row, img->cells + l / rows * img->cell_bytes + l % rows * (int64_t)sizeof row,
               sizeof row);
        for (int m = 0; m < KN_MODULES; m++) {
            const struct st_tensor *a = tensor_of(st, l, m, 'A'), *b = tensor_of(st, l, m, 'B');
            const struct kn_lora_entry *e = &row.module[m];
            assert_int_equal(e->rank, a ? a->shape[0] : 0);
            assert_true(e->rank <= img->rank_max);
            top[m] = LM_MAX(top[m], e->rank);
            if (!a)
                continue;
            assert_true(e->scale > 0);
            compare_matrix(img, &e->a, t, a, true);
            compare_matrix(img, &e->b, t, b, false);
            used += 2;
        }
    }
    assert_int_equal(used, safetensors_count(st));
    assert_memory_equal(top, img->module_rank, sizeof top);
}

static void check_adapter(const char *dir, const struct model_config *cfg)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/" ADAPTER_WEIGHTS_FILE, dir);
    safetensors *st = NULL;
    assert_int_equal(safetensors_open(path, &st, NULL), LM_OK);
    static const int64_t cells[] = { 4096, 400, 1040, 65536 };
    for (int t = KN_F32; t <= KN_BF16; t++) {
        for (size_t i = 0; i < LM_COUNT(cells); i++) {
            struct adapter_image img;
            struct lm_err err = { 0 };
            if (adapter_parse(dir, cfg, (enum kn_dtype)t, cells[i], 1 << 20, NULL, &img, &err))
                fail_msg("%s", err.msg);
            compare_image(&img, cfg, (enum kn_dtype)t, st);
            char digest[ENGINE_DIGEST_CHARS];
            assert_int_equal(adapter_digest(dir, digest, NULL), LM_OK);
            assert_string_equal(digest, img.digest);
            adapter_image_release(&img, NULL);
        }
    }
    safetensors_close(st);
}

static int check_family(const char *family)
{
    char path[600];
    struct model_config cfg;
    int n = 0;
    snprintf(path, sizeof path, FAMILIES "%s/model", family);
    assert_int_equal(model_config_load(path, &cfg, NULL), LM_OK);
    snprintf(path, sizeof path, FAMILIES "%s/adapters", family);
    DIR *d = opendir(path);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) {
        if (e->d_name[0] == '.')
            continue;
        char dir[900];
        snprintf(dir, sizeof dir, "%s/%s", path, e->d_name);
        check_adapter(dir, &cfg);
        n++;
    }
    closedir(d);
    model_config_release(&cfg);
    return n;
}

static void packs_every_fixture(void **state)
{
    (void)state;
    int n = 0;
    DIR *d = opendir(FAMILIES);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));)
        if (e->d_name[0] != '.')
            n += check_family(e->d_name);
    closedir(d);
    assert_true(n >= 18);
}

static void chunk_widths(void **state)
{
    (void)state;
    assert_int_equal(adapter_chunk_width(16, 4096, 2, 65536), 256);
    assert_int_equal(adapter_chunk_width(1, 4096, 2, 65536), 512);
    assert_int_equal(adapter_chunk_width(8, 40, 4, 65536), 48);      /* not wider than the matrix */
    assert_int_equal(adapter_chunk_width(64, 4096, 4, 4096), 16);    /* one chunk a cell */
    assert_int_equal(adapter_chunk_width(128, 4096, 4, 4096), 8);
    assert_int_equal(adapter_chunk_width(256, 4096, 4, 4096), 4);
    assert_int_equal(adapter_chunk_width(257, 4096, 4, 4096), 0);    /* does not fit */
    for (int rank = 1; rank <= 64; rank++)
        for (int64_t n = 1; n < 600; n += 37) {
            int w = adapter_chunk_width(rank, n, 4, 4096);
            assert_true(w >= 4 && w % 4 == 0 && (int64_t)rank * w * 4 <= 4096);
        }
}

/* The digest of two known files: sha256 over name, NUL, size, content. */
static void digest_is_as_documented(void **state)
{
    (void)state;
    char dir[] = "/tmp/loramill-ad-XXXXXX", path[128], digest[ENGINE_DIGEST_CHARS];
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/" ADAPTER_CONFIG_FILE, dir);
    write_text(path, "{}");
    assert_int_equal(adapter_digest(dir, digest, NULL), LM_NOT_FOUND);
    char weights[128];
    snprintf(weights, sizeof weights, "%s/" ADAPTER_WEIGHTS_FILE, dir);
    write_text(weights, "abc");
    assert_int_equal(adapter_digest(dir, digest, NULL), LM_OK);
    assert_string_equal(digest, "sha256:"
        "dbe12a21ab56a6cfcc7796eafa95266b4ccc42b3ba494b6ddc748ea851aec1fa");
    unlink(path);
    unlink(weights);
    rmdir(dir);
}

/* ---- refusals -------------------------------------------------------------------------- */

static char dir[64];
static struct model_config cfg;

static void in_dir(const char *name, char *out, size_t n)
{
    snprintf(out, n, "%s/%s", dir, name);
}

static int setup(void **state)
{
    (void)state;
    snprintf(dir, sizeof dir, "/tmp/loramill-ad-XXXXXX");
    cfg = tiny_config();
    return mkdtemp(dir) ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    char path[160];
    in_dir(ADAPTER_CONFIG_FILE, path, sizeof path);
    unlink(path);
    in_dir(ADAPTER_WEIGHTS_FILE, path, sizeof path);
    unlink(path);
    model_config_release(&cfg);
    return rmdir(dir);
}

static void write_config(const char *patch)
{
    json_t *v = json_loads("{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":8,\"bias\":\"none\","
                           "\"target_modules\":[\"q_proj\"]}", 0, NULL);
    json_t *p = json_loads(patch, 0, NULL);
    assert_non_null(p);
    json_object_update(v, p);
    char path[160];
    in_dir(ADAPTER_CONFIG_FILE, path, sizeof path);
    assert_int_equal(json_dump_file(v, path, 0), 0);
    json_decref(p);
    json_decref(v);
}

#define PRE "base_model.model."
#define Q(l) PRE "model.layers." #l ".self_attn.q_proj"

/* What the default config demands, except that tensor `skip` is left out. */
static void add_good(struct st_writer *w, const char *skip)
{
    for (int l = 0; l < 3; l++) {
        char name[128];
        snprintf(name, sizeof name, PRE "model.layers.%d.self_attn.q_proj.lora_A.weight", l);
        if (!skip || strcmp(name, skip) != 0)
            st_writer_add(w, name, "F32", 4, 64, 0.5f);
        snprintf(name, sizeof name, PRE "model.layers.%d.self_attn.q_proj.lora_B.weight", l);
        if (!skip || strcmp(name, skip) != 0)
            st_writer_add(w, name, "F32", 64, 4, 0.25f);
    }
}

static void save_weights(struct st_writer *w)
{
    char path[160];
    in_dir(ADAPTER_WEIGHTS_FILE, path, sizeof path);
    st_writer_save(w, path);
}

static void expect(lm_status want, const char *says, const char *what)
{
    struct adapter_image img;
    struct lm_err err = { 0 };
    lm_status s = adapter_parse(dir, &cfg, KN_F32, 4096, 1 << 20, NULL, &img, &err);
    if (s != want || !strstr(err.msg, says) || (s && !strstr(err.msg, dir)))
        fail_msg("%s: status %d, \"%s\", expected \"%s\"", what, s, err.msg, says);
    if (!s)
        adapter_image_release(&img, NULL);
}

struct bad {
    const char *patch;
    lm_status status;
    const char *says;
};

static const struct bad bad_configs[] = {
    { "{\"peft_type\":null}", LM_FORMAT, "peft_type is missing" },
    { "{\"peft_type\":\"LOHA\"}", LM_UNSUPPORTED, "peft_type \"LOHA\"" },
    { "{\"bias\":\"all\"}", LM_UNSUPPORTED, "bias \"all\"" },
    { "{\"bias\":\"lora_only\"}", LM_UNSUPPORTED, "bias \"lora_only\"" },
    { "{\"use_dora\":true}", LM_UNSUPPORTED, "use_dora = true" },
    { "{\"modules_to_save\":[\"lm_head\"]}", LM_UNSUPPORTED, "modules_to_save = [\"lm_head\"]" },
    { "{\"lora_bias\":true}", LM_UNSUPPORTED, "lora_bias = true" },
    { "{\"megatron_config\":{\"tp\":2}}", LM_UNSUPPORTED, "megatron_config" },
    { "{\"layer_replication\":[[0,2]]}", LM_UNSUPPORTED, "layer_replication" },
    { "{\"alora_invocation_tokens\":[5]}", LM_UNSUPPORTED, "alora_invocation_tokens = [5]" },
    { "{\"trainable_token_indices\":[5]}", LM_UNSUPPORTED, "trainable_token_indices" },
    { "{\"target_parameters\":[\"x\"]}", LM_UNSUPPORTED, "target_parameters" },
    { "{\"use_qalora\":true}", LM_UNSUPPORTED, "use_qalora" },
    { "{\"use_bdlora\":{\"nblocks\":2}}", LM_UNSUPPORTED, "use_bdlora" },
    { "{\"arrow_config\":{\"top_k\":3}}", LM_UNSUPPORTED, "arrow_config" },
    { "{\"kasa_config\":{\"beta\":1}}", LM_UNSUPPORTED, "kasa_config" },
    { "{\"monteclora_config\":{\"a\":1}}", LM_UNSUPPORTED, "monteclora_config" },
    { "{\"some_new_maths\":0.5}", LM_UNSUPPORTED, "some_new_maths = 0.5" },
    { "{\"init_lora_weights\":\"pissa\"}", LM_UNSUPPORTED, "init_lora_weights \"pissa\"" },
    { "{\"init_lora_weights\":\"pissa_niter_4\"}", LM_UNSUPPORTED, "\"pissa_niter_4\" changes" },
    { "{\"init_lora_weights\":\"olora\"}", LM_UNSUPPORTED, "\"olora\"" },
    { "{\"init_lora_weights\":\"loftq\"}", LM_UNSUPPORTED, "\"loftq\"" },
    { "{\"init_lora_weights\":3}", LM_FORMAT, "init_lora_weights is 3" },
    { "{\"r\":0}", LM_INVALID, "r is 0" },
    { "{\"r\":-8}", LM_INVALID, "r is -8" },
    { "{\"r\":100000}", LM_INVALID, "r is 100000" },
    { "{\"r\":4.5}", LM_FORMAT, "r is 4.5, expected an integer" },
    { "{\"r\":\"4\"}", LM_FORMAT, "r is \"4\"" },
    { "{\"lora_alpha\":-1}", LM_INVALID, "lora_alpha is -1" },
    { "{\"lora_alpha\":\"8\"}", LM_FORMAT, "lora_alpha is \"8\"" },
    { "{\"use_rslora\":1}", LM_FORMAT, "use_rslora is 1" },
    { "{\"fan_in_fan_out\":\"no\"}", LM_FORMAT, "fan_in_fan_out is \"no\"" },
    { "{\"target_modules\":{\"q\":1}}", LM_FORMAT, "target_modules is {\"q\":1}" },
    { "{\"target_modules\":[\"q_proj\",3]}", LM_FORMAT, "expected a string or a list of strings" },
    { "{\"target_modules\":\"(q_proj\"}", LM_FORMAT, "\"(q_proj\" is not a regular expression" },
    { "{\"target_modules\":\"(.*.*)+(.*.*)+[^a-z_0-9.]\"}", LM_INVALID, "match limit exceeded" },
    { "{\"target_modules\":[\"lm_head\",\"q_proj\"]}", LM_UNSUPPORTED, "selects lm_head" },
    { "{\"target_modules\":[\"embed_tokens\"]}", LM_UNSUPPORTED, "selects model.embed_tokens" },
    { "{\"target_modules\":[\"mlp\"]}", LM_UNSUPPORTED, "selects model.layers.0.mlp" },
    { "{\"target_modules\":[\"c_attn\"]}", LM_MISMATCH, "select no module" },
    { "{\"exclude_modules\":7}", LM_FORMAT, "exclude_modules is 7" },
    { "{\"exclude_modules\":\"[\"}", LM_FORMAT, "exclude_modules" },
    { "{\"rank_pattern\":[1]}", LM_FORMAT, "rank_pattern is [1]" },
    { "{\"rank_pattern\":{\"q_proj\":0}}", LM_INVALID, "rank_pattern.q_proj is 0" },
    { "{\"rank_pattern\":{\"q_proj\":\"x\"}}", LM_FORMAT, "rank_pattern.q_proj is \"x\"" },
    { "{\"rank_pattern\":{\"*\":4}}", LM_FORMAT, "rank_pattern: " },
    { "{\"rank_pattern\":{\"q_proj\":null}}", LM_FORMAT, "rank_pattern.q_proj is null" },
    { "{\"alpha_pattern\":{\"q_proj\":-2}}", LM_INVALID, "alpha_pattern.q_proj is -2" },
    { "{\"layers_to_transform\":\"all\"}", LM_FORMAT, "layers_to_transform is \"all\"" },
    { "{\"layers_to_transform\":[1.5]}", LM_FORMAT, "layers_to_transform is [1.5]" },
    { "{\"layers_pattern\":\"layers\"}", LM_INVALID, "layers_pattern needs" },
    { "{\"layers_to_transform\":[0],\"layers_pattern\":[3]}", LM_FORMAT, "layers_pattern is [3]" },
    { "{\"layers_to_transform\":[0],\"layers_pattern\":\"(\"}", LM_FORMAT, "layers_pattern: " },
    { "{\"target_modules\":\".*q_proj\",\"layers_to_transform\":[0]}", LM_INVALID,
      "cannot be used when target_modules is a string" },
};

static void refuses_configs(void **state)
{
    (void)state;
    struct st_writer w = { 0 };
    add_good(&w, NULL);
    save_weights(&w);
    write_config("{}");
    expect(LM_OK, "", "the unpatched config");
    for (size_t i = 0; i < LM_COUNT(bad_configs); i++) {
        write_config(bad_configs[i].patch);
        expect(bad_configs[i].status, bad_configs[i].says, bad_configs[i].patch);
    }
}

static void accepts_harmless_keys(void **state)
{
    (void)state;
    static const char *const good[] = {
        "{\"task_type\":\"SEQ_2_SEQ_LM\",\"lora_dropout\":0.1,\"revision\":\"main\"}",
        "{\"init_lora_weights\":\"gaussian\",\"fan_in_fan_out\":true,\"inference_mode\":false}",
        "{\"init_lora_weights\":\"eva\",\"eva_config\":{\"rho\":2.0},\"loftq_config\":{}}",
        "{\"modules_to_save\":[],\"some_new_switch\":false,\"another\":null,\"third\":{}}",
        "{\"megatron_core\":\"megatron.core\",\"qalora_group_size\":16,\"auto_mapping\":{\"a\":1}}",
    };
    struct st_writer w = { 0 };
    add_good(&w, NULL);
    save_weights(&w);
    for (size_t i = 0; i < LM_COUNT(good); i++) {
        write_config(good[i]);
        expect(LM_OK, "", good[i]);
    }
}

/* One tensor out, one tensor in. */
struct bad_tensor {
    const char *skip, *name, *dtype;
    int rows, cols;
    float value;
    lm_status status;
    const char *says;
};

static const struct bad_tensor bad_tensors[] = {
    { Q(1) ".lora_A.weight", NULL, NULL, 0, 0, 0, LM_MISMATCH,
      "layers.1.self_attn.q_proj.lora_A.weight is missing" },
    { Q(2) ".lora_B.weight", NULL, NULL, 0, 0, 0, LM_MISMATCH, "q_proj.lora_B.weight is missing" },
    { Q(0) ".lora_A.weight", Q(0) ".lora_A.weight", "F32", 4, 4096, 1, LM_MISMATCH,
      "lora_A.weight has shape [4, 4096], expected [4, 64]" },
    { Q(0) ".lora_B.weight", Q(0) ".lora_B.weight", "F32", 32, 4, 1, LM_MISMATCH,
      "lora_B.weight has shape [32, 4], expected [64, 4]" },
    { Q(0) ".lora_A.weight", Q(0) ".lora_A.weight", "F32", 8, 64, 1, LM_MISMATCH,
      "has shape [8, 64], expected [4, 64] (rank 4" },
    { Q(0) ".lora_A.weight", Q(0) ".lora_A.weight", "F32", 4, 64, INFINITY, LM_INVALID,
      "q_proj.lora_A.weight has an element that is not finite" },
    { Q(2) ".lora_B.weight", Q(2) ".lora_B.weight", "F32", 64, 4, NAN, LM_INVALID,
      "q_proj.lora_B.weight has an element that is not finite" },
    { Q(0) ".lora_A.weight", Q(0) ".lora_A.weight", "I16", 4, 32, 1, LM_UNSUPPORTED,
      "has dtype I16" },
    { NULL, PRE "model.layers.0.self_attn.k_proj.lora_A.weight", "F32", 4, 64, 1, LM_MISMATCH,
      "k_proj.lora_A.weight is of no module that" },
    { NULL, PRE "model.layers.3.self_attn.q_proj.lora_A.weight", "F32", 4, 64, 1, LM_MISMATCH,
      "is for layer 3, the base model has 3 layers" },
    { NULL, Q(0) ".lora_magnitude_vector", "F32", 1, 64, 1, LM_UNSUPPORTED, "DoRA" },
    { NULL, Q(0) ".lora_B.bias", "F32", 1, 64, 1, LM_UNSUPPORTED, "LoRA bias" },
    { NULL, PRE "model.embed_tokens.lora_embedding_A", "F32", 4, 32, 1, LM_UNSUPPORTED,
      "adapts an embedding" },
    { NULL, PRE "model.embed_tokens.weight", "F32", 32, 64, 1, LM_UNSUPPORTED, "is an embedding" },
    { NULL, PRE "lm_head.modules_to_save.weight", "F32", 32, 64, 1, LM_UNSUPPORTED,
      "modules_to_save" },
    { NULL, PRE "lm_head.weight", "F32", 32, 64, 1, LM_UNSUPPORTED, "belongs to lm_head" },
    { NULL, "something", "F32", 1, 1, 1, LM_MISMATCH, "tensor something is of no module" },
};

static void refuses_tensors(void **state)
{
    (void)state;
    write_config("{}");
    for (size_t i = 0; i < LM_COUNT(bad_tensors); i++) {
        const struct bad_tensor *b = &bad_tensors[i];
        struct st_writer w = { 0 };
        add_good(&w, b->skip);
        if (b->name)
            st_writer_add(&w, b->name, b->dtype, b->rows, b->cols, b->value);
        save_weights(&w);
        expect(b->status, b->says, b->says);
    }
}

static void refuses_files(void **state)
{
    (void)state;
    char path[160];
    struct lm_err err;
    struct adapter_image img;
    expect(LM_NOT_FOUND, ADAPTER_CONFIG_FILE, "an empty folder");
    write_config("{}");
    expect(LM_NOT_FOUND, ADAPTER_WEIGHTS_FILE, "no weights");
    in_dir(ADAPTER_WEIGHTS_FILE, path, sizeof path);
    write_text(path, "PK\003\004 a pickle in disguise");
    expect(LM_TOO_LARGE, "is it a safetensors file?", "not safetensors");
    write_text(path, "");
    expect(LM_FORMAT, "too short", "empty weights");
    struct st_writer w = { 0 };
    add_good(&w, NULL);
    save_weights(&w);
    assert_int_equal(adapter_parse(dir, &cfg, KN_F32, 4096, 5000, NULL, &img, &err), LM_TOO_LARGE);
    assert_non_null(strstr(err.msg, "the limit is 5000"));
    assert_int_equal(adapter_parse(dir, &cfg, KN_F32, 384, 1 << 20, NULL, &img, &err), LM_INVALID);
    assert_non_null(strstr(err.msg, "cannot hold adapters"));
    in_dir(ADAPTER_CONFIG_FILE, path, sizeof path);
    write_text(path, "{\"peft_type\":\"LORA\",}");
    expect(LM_FORMAT, ADAPTER_CONFIG_FILE ": line 1", "bad JSON");
    write_text(path, "[]");
    expect(LM_FORMAT, "a JSON object is expected", "a list");
}

/* A rank that no block can hold, and a value that float16 cannot. */
static void refuses_what_the_pool_cannot_hold(void **state)
{
    (void)state;
    struct adapter_image img;
    struct lm_err err;
    struct st_writer w = { 0 };
    for (int l = 0; l < 3; l++) {
        char name[128];
        snprintf(name, sizeof name, PRE "model.layers.%d.self_attn.q_proj.lora_A.weight", l);
        st_writer_add(&w, name, "F32", 60, 64, 70000.0f);
        snprintf(name, sizeof name, PRE "model.layers.%d.self_attn.q_proj.lora_B.weight", l);
        st_writer_add(&w, name, "F32", 64, 60, 0.5f);
    }
    save_weights(&w);
    write_config("{\"r\":60}");
    assert_int_equal(adapter_parse(dir, &cfg, KN_F32, 800, 1 << 20, NULL, &img, &err),
                     LM_TOO_LARGE);
    assert_non_null(strstr(err.msg, "rank 60 does not fit a pool block of 800 bytes"));
    assert_int_equal(adapter_parse(dir, &cfg, KN_F16, 4096, 1 << 20, NULL, &img, &err),
                     LM_INVALID);
    assert_non_null(strstr(err.msg, "too large for"));
    assert_int_equal(adapter_parse(dir, &cfg, KN_BF16, 4096, 1 << 20, NULL, &img, &err), LM_OK);
    adapter_image_release(&img, NULL);
}

static int live;

static void *counting_alloc(void *ctx, size_t bytes)
{
    if (*(bool *)ctx)
        return NULL;
    live++;
    return malloc(bytes);
}

static void counting_free(void *ctx, void *p)
{
    (void)ctx;
    live--;
    free(p);
}

/* The image comes from the caller's allocator and goes back to it, on failure too. */
static void uses_the_callers_memory(void **state)
{
    (void)state;
    bool fail = false;
    struct adapter_alloc alloc = { &fail, counting_alloc, counting_free };
    struct adapter_image img;
    struct lm_err err;
    struct st_writer w = { 0 };
    write_config("{}");
    add_good(&w, NULL);
    save_weights(&w);
    assert_int_equal(adapter_parse(dir, &cfg, KN_F32, 4096, 1 << 20, &alloc, &img, &err), LM_OK);
    assert_int_equal(live, 1);
    adapter_image_release(&img, &alloc);
    assert_int_equal(live, 0);
    add_good(&w, Q(0) ".lora_A.weight");
    st_writer_add(&w, Q(0) ".lora_A.weight", "F32", 4, 64, NAN);
    save_weights(&w);
    assert_int_equal(adapter_parse(dir, &cfg, KN_F32, 4096, 1 << 20, &alloc, &img, &err),
                     LM_INVALID);
    assert_int_equal(live, 0);
    fail = true;
    assert_int_equal(adapter_parse(dir, &cfg, KN_F32, 4096, 1 << 20, &alloc, &img, &err), LM_NOMEM);
    assert_null(img.cells);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(resolves_as_peft_does),
        cmocka_unit_test(packs_every_fixture),
        cmocka_unit_test(chunk_widths),
        cmocka_unit_test(digest_is_as_documented),
        cmocka_unit_test_setup_teardown(refuses_configs, setup, teardown),
        cmocka_unit_test_setup_teardown(accepts_harmless_keys, setup, teardown),
        cmocka_unit_test_setup_teardown(refuses_tensors, setup, teardown),
        cmocka_unit_test_setup_teardown(refuses_files, setup, teardown),
        cmocka_unit_test_setup_teardown(refuses_what_the_pool_cannot_hold, setup, teardown),
        cmocka_unit_test_setup_teardown(uses_the_callers_memory, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
