/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_model_config.c - configs of both transformers generations give the same numbers, RoPE equals
 * the reference in tests/golden/rope.json, and what we don't implement is refused by name.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/json_util.h"
#include "engine/model_config.h"

#define FAMILIES "tests/fixtures/families/"

static const char *base_text =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"hidden_size\":64,"
    "\"intermediate_size\":128,\"num_hidden_layers\":3,\"num_attention_heads\":4,"
    "\"num_key_value_heads\":2,\"vocab_size\":320,\"torch_dtype\":\"bfloat16\"}";

/* base_text with the members of `patch` put over it; a member of value "DROP" is taken out. */
static lm_status load_patched(const char *patch, const char *generation, struct model_config *c,
                              struct lm_err *err)
{
    json_t *v = json_loads(base_text, 0, NULL), *p = json_loads(patch, 0, NULL);
    assert_non_null(p);
    json_object_update(v, p);
    const char *key;
    json_t *x;
    json_object_foreach(p, key, x)
        if (json_is_string(x) && strcmp(json_string_value(x), "DROP") == 0)
            json_object_del(v, key);
    char *text = json_dumps(v, JSON_COMPACT);
    lm_status s = model_config_parse(text, strlen(text), generation,
                                     generation ? strlen(generation) : 0, c, err);
    free(text);
    json_decref(v);
    json_decref(p);
    return s;
}

static void load(const char *name, struct model_config *c)
{
    char dir[128];
    struct lm_err err = { 0 };
    snprintf(dir, sizeof dir, FAMILIES "%s/model", name);
    if (model_config_load(dir, c, &err))
        fail_msg("%s", err.msg);
}

static void reads_families(void **state)
{
    (void)state;
    struct model_config c;
    load("llama2", &c);
    assert_string_equal(c.architecture, "LlamaForCausalLM");
    assert_int_equal(c.kv_heads, 4);
    assert_int_equal(c.dtype, KN_BF16);
    assert_int_equal(c.window[1], 0);
    assert_int_equal(c.bos_id, 1);
    assert_false(c.gen_do_sample_false);
    assert_true(c.gen_temperature == 0.6f && c.gen_top_p == 0.9f && isnan(c.gen_min_p));
    assert_int_equal(c.gen_top_k, -1);
    model_config_release(&c);

    load("llama3", &c);
    assert_int_equal(c.rope, ROPE_LLAMA3);
    assert_int_equal(c.n_eos, 3);
    assert_int_equal(c.eos_ids[2], 7);
    assert_true(c.gen_do_sample_false);
    model_config_release(&c);

    load("mistral", &c);
    assert_int_equal(c.window[0], 16);
    assert_int_equal(c.head_dim, 32);
    assert_int_equal(c.dtype, KN_F16);
    model_config_release(&c);

    load("qwen2", &c);
    assert_true(c.qkv_bias && !c.qk_norm);
    assert_int_equal(c.window[1], 0);
    assert_true(c.rope_theta == 1e6f);
    assert_int_equal(c.gen_top_k, 20);
    model_config_release(&c);

    load("qwen2-window", &c);
    assert_int_equal(c.window[0], 0);
    assert_int_equal(c.window[1], 12);
    assert_int_equal(c.window[2], 12);
    model_config_release(&c);

    load("qwen3", &c);
    assert_true(c.qk_norm && !c.qkv_bias);
    assert_int_equal(c.window[0], 20);
    assert_int_equal(c.window[1], 0);
    model_config_release(&c);

    load("tied", &c);
    assert_true(c.tied_embeddings);
    model_config_release(&c);

    load("rope-dynamic", &c);
    assert_int_equal(c.rope, ROPE_DYNAMIC);
    assert_int_equal(c.dyn_max, 48);
    assert_true(c.dyn_factor == 4.0f);
    model_config_release(&c);
}

/* ---- RoPE ------------------------------------------------------------------------------ */

static float from_bits(json_int_t u)
{
    uint32_t x = (uint32_t)u;
    float f;
    memcpy(&f, &x, sizeof f);
    return f;
}

static void check_rope_case(const json_t *item)
{
    const char *name = json_string_value(json_object_get(item, "name"));
    char *text = json_dumps(json_object_get(item, "config"), 0);
    struct model_config c;
    struct lm_err err = { 0 };
    if (model_config_parse(text, strlen(text), NULL, 0, &c, &err))
        fail_msg("%s: %s", name, err.msg);
    double factor = json_number_value(json_object_get(item, "attention_factor"));
    if (fabs(c.attention_factor - factor) > 1e-6 * factor)
        fail_msg("%s: attention factor %g, expected %g", name, c.attention_factor, factor);
    const json_t *bits = json_object_get(item, "inv_freq_bits");
    assert_int_equal(json_array_size(bits), c.head_dim / 2);
    for (int i = 0; i < c.head_dim / 2; i++) {
        float want = from_bits(json_integer_value(json_array_get(bits, (size_t)i)));
        /* Two roundings of slack: pow differs by one between libraries. */
        if (fabsf(c.inv_freq[i] - want) > 3e-7f * want)
            fail_msg("%s: inv_freq[%d] %.9g, expected %.9g", name, i, c.inv_freq[i], want);
    }
    model_config_release(&c);
    free(text);
}

static void rope_equals_reference(void **state)
{
    (void)state;
    json_t *v = json_load_file("tests/golden/rope.json", 0, NULL);
    json_t *cases = json_object_get(v, "cases");
    assert_true(json_array_size(cases) >= 60);
    for (size_t i = 0; i < json_array_size(cases); i++)
        check_rope_case(json_array_get(cases, i));
    json_decref(v);
}

/* ---- what else is accepted ------------------------------------------------------------- */

static const char *const good_patches[] = {
    "{\"architectures\":null}",
    "{\"architectures\":\"DROP\",\"rope_scaling\":null,\"rope_theta\":10000}",
    "{\"rope_scaling\":{},\"pretraining_tp\":4,\"attention_bias\":false,\"mlp_bias\":false}",
    "{\"rope_parameters\":{\"rope_theta\":5e5,\"rope_type\":\"default\"},\"dtype\":\"float32\"}",
    "{\"num_experts\":0,\"quantization_config\":null,\"final_logit_softcapping\":null}",
    "{\"an_unheard_of_field\":{\"x\":1},\"logit_scale\":1.0,\"partial_rotary_factor\":1.0}",
    "{\"layer_types\":[\"full_attention\",\"full_attention\",\"full_attention\"]}",
    "{\"torch_dtype\":\"torch.float16\",\"hidden_act\":\"swish\",\"eos_token_id\":[2,2,3]}",
    "{\"is_llama_config\":true,\"rope_interleaved\":false,\"transformers.js_config\":{\"a\":1}}",
    "{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4,\"finetuned\":true,\"long_factor\":null}}",
};

static void accepts_harmless(void **state)
{
    (void)state;
    lm_log_set_level(LM_ERROR);
    for (size_t i = 0; i < LM_COUNT(good_patches); i++) {
        struct model_config c;
        struct lm_err err = { 0 };
        if (load_patched(good_patches[i], NULL, &c, &err))
            fail_msg("%s: %s", good_patches[i], err.msg);
        model_config_release(&c);
    }
    lm_log_set_level(LM_INFO);
}

static void defaults_are_the_family_s(void **state)
{
    (void)state;
    struct model_config c;
    assert_int_equal(load_patched("{\"num_key_value_heads\":null}", NULL, &c, NULL), LM_OK);
    assert_int_equal(c.kv_heads, 4);
    assert_int_equal(c.head_dim, 16);
    assert_int_equal(c.max_position, 2048);
    assert_true(c.rms_eps == 1e-6f && c.rope_theta == 10000.0f);
    assert_int_equal(c.n_eos, 0);
    assert_int_equal(c.bos_id, -1);
    model_config_release(&c);
    const char *mistral = "{\"model_type\":\"mistral\",\"architectures\":[\"MistralForCausalLM\"],"
                          "\"num_attention_heads\":16,\"num_key_value_heads\":\"DROP\"}";
    assert_int_equal(load_patched(mistral, NULL, &c, NULL), LM_OK);
    assert_int_equal(c.kv_heads, 8);
    assert_int_equal(c.window[2], 4096);
    model_config_release(&c);
    const char *qwen3 = "{\"model_type\":\"qwen3\",\"architectures\":[\"Qwen3ForCausalLM\"],"
                        "\"use_sliding_window\":false,\"sliding_window\":8}";
    assert_int_equal(load_patched(qwen3, NULL, &c, NULL), LM_OK);
    assert_int_equal(c.head_dim, 128);
    assert_int_equal(c.window[0], 0);
    model_config_release(&c);
}

/* ---- what is refused ------------------------------------------------------------------- */

struct bad {
    const char *patch;
    lm_status status;
    const char *says;
};

static const struct bad bad_patches[] = {
    { "{\"model_type\":\"DROP\"}", LM_FORMAT, "model_type is missing" },
    { "{\"model_type\":\"gemma2\"}", LM_UNSUPPORTED, "model_type \"gemma2\"" },
    { "{\"model_type\":\"mixtral\"}", LM_UNSUPPORTED, "model_type \"mixtral\"" },
    { "{\"architectures\":[\"LlamaForSequenceClassification\"]}", LM_UNSUPPORTED,
      "architecture \"LlamaForSequenceClassification\"" },
    { "{\"architectures\":[]}", LM_FORMAT, "architectures is []" },
    { "{\"hidden_size\":\"DROP\"}", LM_FORMAT, "hidden_size is missing" },
    { "{\"hidden_size\":0}", LM_INVALID, "hidden_size is 0" },
    { "{\"hidden_size\":-64}", LM_INVALID, "hidden_size is -64" },
    { "{\"hidden_size\":64.5}", LM_FORMAT, "hidden_size is 64.5, expected an integer" },
    { "{\"hidden_size\":1000000000000}", LM_INVALID, "hidden_size is 1000000000000" },
    { "{\"hidden_size\":66}", LM_INVALID, "hidden_size 66 is not a multiple" },
    { "{\"num_key_value_heads\":3}", LM_INVALID, "not a multiple of num_key_value_heads 3" },
    { "{\"head_dim\":15}", LM_UNSUPPORTED, "head_dim 15" },
    { "{\"num_hidden_layers\":100000}", LM_INVALID, "num_hidden_layers is 100000" },
    { "{\"vocab_size\":\"many\"}", LM_FORMAT, "vocab_size is \"many\"" },
    { "{\"rms_norm_eps\":-1}", LM_INVALID, "rms_norm_eps is -1" },
    { "{\"tie_word_embeddings\":1}", LM_FORMAT, "tie_word_embeddings is 1, expected true" },
    { "{\"hidden_act\":\"gelu\"}", LM_UNSUPPORTED, "hidden_act \"gelu\"" },
    { "{\"torch_dtype\":\"float64\"}", LM_UNSUPPORTED, "dtype \"float64\"" },
    { "{\"attention_bias\":true}", LM_UNSUPPORTED, "attention_bias = true" },
    { "{\"mlp_bias\":true}", LM_UNSUPPORTED, "mlp_bias = true" },
    { "{\"quantization_config\":{\"quant_method\":\"awq\"}}", LM_UNSUPPORTED,
      "quantization_config = {\"quant_method\":\"awq\"}" },
    { "{\"num_local_experts\":8}", LM_UNSUPPORTED, "num_local_experts = 8" },
    { "{\"moe_intermediate_size\":64}", LM_UNSUPPORTED, "moe_intermediate_size" },
    { "{\"final_logit_softcapping\":30.0}", LM_UNSUPPORTED, "final_logit_softcapping = 30.0" },
    { "{\"logit_scale\":0.0625}", LM_UNSUPPORTED, "logit_scale = 0.0625" },
    { "{\"no_rope_layers\":[1,0]}", LM_UNSUPPORTED, "no_rope_layers" },
    { "{\"vision_config\":{\"a\":1}}", LM_UNSUPPORTED, "vision_config" },
    { "{\"dual_chunk_attention_config\":{\"chunk_size\":8}}", LM_UNSUPPORTED,
      "dual_chunk_attention_config" },
    { "{\"is_causal\":false}", LM_UNSUPPORTED, "is_causal = false" },
    { "{\"embedding_multiplier\":0}", LM_UNSUPPORTED, "embedding_multiplier = 0" },
    { "{\"clip_qkv\":8}", LM_UNSUPPORTED, "clip_qkv = 8" },
    { "{\"sliding_window\":16}", LM_UNSUPPORTED, "sliding_window is set" },
    { "{\"layer_types\":[\"full_attention\"]}", LM_FORMAT, "not a list of 3 names" },
    { "{\"layer_types\":[\"full_attention\",\"full_attention\",\"chunked_attention\"]}",
      LM_UNSUPPORTED, "layer_types[2] \"chunked_attention\"" },
    { "{\"layer_types\":[\"sliding_attention\",\"full_attention\",\"full_attention\"]}",
      LM_INVALID, "layer_types[0] is sliding_attention, but no" },
    { "{\"partial_rotary_factor\":0.5}", LM_UNSUPPORTED, "partial_rotary_factor 0.5" },
    { "{\"rope_theta\":0}", LM_INVALID, "rope_theta is 0" },
    { "{\"rope_scaling\":4}", LM_FORMAT, "rope_scaling is 4" },
    { "{\"rope_scaling\":{\"type\":\"longrope\",\"factor\":2}}", LM_UNSUPPORTED, "\"longrope\"" },
    { "{\"rope_scaling\":{\"type\":\"longrope\",\"short_factor\":[1]}}", LM_UNSUPPORTED,
      "rope_scaling.short_factor" },
    { "{\"rope_scaling\":{\"rope_type\":\"mrope\",\"mrope_section\":[1,2]}}", LM_UNSUPPORTED,
      "rope_scaling.mrope_section" },
    { "{\"rope_scaling\":{\"type\":\"linear\"}}", LM_FORMAT, "rope_scaling.factor is missing" },
    { "{\"rope_scaling\":{\"type\":\"linear\",\"factor\":-2}}", LM_INVALID, "rope_scaling.factor" },
    { "{\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1}}",
      LM_FORMAT, "high_freq_factor is missing" },
    { "{\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,"
      "\"high_freq_factor\":4}}", LM_INVALID, "high_freq_factor 4 must be above" },
    { "{\"rope_parameters\":{\"full_attention\":{\"rope_type\":\"default\"}}}", LM_UNSUPPORTED,
      "rope_parameters.full_attention" },
    { "{\"rope_parameters\":{\"partial_rotary_factor\":0.25}}", LM_UNSUPPORTED,
      "rope_parameters.partial_rotary_factor 0.25" },
    { "{\"eos_token_id\":\"</s>\"}", LM_FORMAT, "eos_token_id is \"</s>\"" },
    { "{\"eos_token_id\":[1,-2]}", LM_FORMAT, "eos_token_id is [1,-2]" },
    { "{\"eos_token_id\":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]}", LM_UNSUPPORTED,
      "more than 16 ids" },
    { "{\"bos_token_id\":-5}", LM_INVALID, "bos_token_id is -5" },
};

static void refuses_by_name(void **state)
{
    (void)state;
    for (size_t i = 0; i < LM_COUNT(bad_patches); i++) {
        const struct bad *b = &bad_patches[i];
        struct model_config c;
        struct lm_err err = { 0 };
        lm_status s = load_patched(b->patch, NULL, &c, &err);
        if (s != b->status || !strstr(err.msg, b->says) || !strstr(err.msg, "config.json"))
            fail_msg("%s: status %d, \"%s\"", b->patch, s, err.msg);
    }
}

static const struct bad bad_generation[] = {
    { "[1]", LM_FORMAT, "generation_config.json: a JSON object" },
    { "{\"temperature\":-1}", LM_INVALID, "temperature is -1" },
    { "{\"temperature\":\"hot\"}", LM_FORMAT, "temperature is \"hot\"" },
    { "{\"top_p\":0}", LM_INVALID, "top_p is 0" },
    { "{\"top_p\":1.5}", LM_INVALID, "top_p is 1.5" },
    { "{\"top_k\":1.5}", LM_FORMAT, "top_k is 1.5" },
    { "{\"do_sample\":\"yes\"}", LM_FORMAT, "do_sample is \"yes\"" },
    { "{\"repetition_penalty\":0}", LM_INVALID, "repetition_penalty is 0" },
    { "{\"eos_token_id\":{}}", LM_FORMAT, "generation_config.json: eos_token_id is {}" },
};

static void refuses_bad_generation(void **state)
{
    (void)state;
    for (size_t i = 0; i < LM_COUNT(bad_generation); i++) {
        const struct bad *b = &bad_generation[i];
        struct model_config c;
        struct lm_err err = { 0 };
        lm_status s = load_patched("{}", b->patch, &c, &err);
        if (s != b->status || !strstr(err.msg, b->says))
            fail_msg("%s: status %d, \"%s\"", b->patch, s, err.msg);
    }
}

static void refuses_bad_text(void **state)
{
    (void)state;
    static const struct bad texts[] = {
        { "", LM_FORMAT, "config.json: line 1" },
        { "{\"a\":1,\"a\":2}", LM_FORMAT, "duplicate object key" },
        { "{\"a\":NaN}", LM_FORMAT, "config.json: line 1" },
        { "null", LM_FORMAT, "a JSON object is expected" },
        { "{\"a\":\"\xff\"}", LM_FORMAT, "unable to decode byte 0xff" },
        { "{\"a\":\"\\u0000\"}", LM_FORMAT, "u0000" },
    };
    struct model_config c;
    struct lm_err err = { 0 };
    for (size_t i = 0; i < LM_COUNT(texts); i++) {
        lm_status s = model_config_parse(texts[i].patch, strlen(texts[i].patch), NULL, 0, &c, &err);
        if (s != texts[i].status || !strstr(err.msg, texts[i].says))
            fail_msg("%s: status %d, \"%s\"", texts[i].patch, s, err.msg);
    }
    assert_int_equal(model_config_load("tests/none", &c, &err), LM_NOT_FOUND);
    assert_non_null(strstr(err.msg, "tests/none/config.json"));
    /* Nesting deeper than any stack should follow. */
    size_t n = 1 << 20;
    char *deep = malloc(n);
    memset(deep, '[', n);
    assert_int_equal(model_config_parse(deep, n, NULL, 0, &c, &err), LM_FORMAT);
    free(deep);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_families),
        cmocka_unit_test(rope_equals_reference),
        cmocka_unit_test(accepts_harmless),
        cmocka_unit_test(defaults_are_the_family_s),
        cmocka_unit_test(refuses_by_name),
        cmocka_unit_test(refuses_bad_generation),
        cmocka_unit_test(refuses_bad_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
