/* SPDX-License-Identifier: Apache-2.0 */
/*
 * model_config.h - config.json and generation_config.json, read into plain numbers.
 *
 * Accepts what transformers 4 and 5 write (rope_theta + rope_scaling, or rope_parameters;
 * torch_dtype or dtype). A field that changes the maths and that we do not implement is refused by
 * name; fields that don't (initializer_range, use_cache, ...) are ignored. Sizes are bounded.
 */
#ifndef LORAMILL_ENGINE_MODEL_CONFIG_H
#define LORAMILL_ENGINE_MODEL_CONFIG_H

#include "kernels/kernels.h"

enum rope_type { ROPE_DEFAULT, ROPE_LINEAR, ROPE_DYNAMIC, ROPE_LLAMA3, ROPE_YARN };

struct model_config {
    char architecture[64];      /* "LlamaForCausalLM" */
    char model_type[32];        /* "llama", "mistral", "qwen2", "qwen3" */
    int hidden, ffn, n_layers, q_heads, kv_heads, head_dim, vocab, max_position;
    float rms_eps;
    bool tied_embeddings;       /* lm_head shares embed_tokens */
    bool qkv_bias;              /* Qwen2 */
    bool qk_norm;               /* Qwen3 */
    enum kn_dtype dtype;        /* stored weights, as the config says; the files decide */
    /* Sliding window of each layer, 0 for full attention; [n_layers], owned. */
    int *window;

    enum rope_type rope;
    float rope_theta;
    float *inv_freq;            /* [head_dim / 2], scaling applied, owned */
    float attention_factor;     /* yarn: on cos and sin; else 1 */
    float dyn_factor;           /* ROPE_DYNAMIC */
    int dyn_max;

    int32_t bos_id;             /* -1: none */
    int32_t eos_ids[16];        /* config.json and generation_config.json together */
    int n_eos;

    /* generation_config.json: sampling defaults, NaN / -1 where silent. */
    float gen_temperature, gen_top_p, gen_min_p, gen_repetition_penalty;
    int gen_top_k, gen_max_new_tokens;
    bool gen_do_sample_false;   /* "do_sample": false or absent: HF's default is greedy */
};

/* Reads dir/config.json (demanded) and dir/generation_config.json (optional). Errors name file and
 * field: LM_NOT_FOUND, LM_FORMAT, LM_INVALID (a value out of range), LM_UNSUPPORTED (a field or
 * value that we don't implement), LM_NOMEM. On failure *out is released. */
lm_status model_config_load(const char *dir, struct model_config *out, struct lm_err *err);
/* One file that is a config.json, whatever its name; nothing else of the model. */
lm_status model_config_load_file(const char *path, struct model_config *out, struct lm_err *err);
/* The same over text; `generation` may be NULL. */
lm_status model_config_parse(const char *config, size_t config_n, const char *generation,
                             size_t generation_n, struct model_config *out, struct lm_err *err);
void model_config_release(struct model_config *c);

#endif
