/* SPDX-License-Identifier: Apache-2.0 */
/*
 * model_config_fields.c - which fields of config.json may be passed over, and which may not.
 *
 * Every field falls in one of four groups:
 *   read      model_config.c and model_config_rope.c interpret it
 *   harmless  it has no effect on inference of the served families: passed over
 *   danger    other architectures or options use it to change the maths: refused by name, unless
 *             its value is the one that changes nothing
 *   unknown   its name contains a word that spells trouble ("expert", "softcap", ...): as danger;
 *             else passed over with a warning in the log
 */
#include <string.h>

#include "engine/model_config_internal.h"

static const char *const read_fields[] = {
    "architectures", "attention_bias", "bos_token_id", "dtype", "eos_token_id", "head_dim",
    "hidden_act", "hidden_size", "intermediate_size", "layer_types", "max_position_embeddings",
    "max_window_layers", "mlp_bias", "model_type", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "original_max_position_embeddings", "partial_rotary_factor",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window",
    "tie_word_embeddings", "torch_dtype", "use_sliding_window", "vocab_size",
};

static const char *const harmless_fields[] = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash",
    "_flash_attn_2_enabled", "_from_model_config", "_name_or_path", "_sliding_window_pattern",
    "adapter_path", "attention_dropout", "attn_implementation", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "chunk_size_feed_forward", "custom_pipelines", "dropout",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "embd_pdrop", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing",
    "hidden_dropout", "id2label", "initializer_range", "is_decoder", "keys_to_ignore_at_inference",
    "label2id", "length_penalty", "max_length", "max_new_tokens", "max_sequence_length",
    "min_length", "model_name", "model_max_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_labels", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token", "pad_token_id", "prefix",
    "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty",
    "resid_pdrop", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "tokenizer_model_max_length", "tokenizer_padding_side", "top_k", "top_p",
    "torchscript", "training_args", "transformers_version", "transformers.js_config",
    "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
};

/* What a dangerous field may hold without changing anything, besides null. */
enum neutral { OFF, ONE, TRUE_ONLY, NEVER };

static const struct danger {
    const char *name;
    enum neutral neutral;
} danger_fields[] = {
    { "quantization_config", OFF }, { "compression_config", OFF }, { "attention_bias", OFF },
    { "mlp_bias", OFF }, { "use_bias", OFF }, { "bias", OFF }, { "lm_head_bias", OFF },
    { "qkv_bias", NEVER }, { "no_bias", TRUE_ONLY }, { "alibi", OFF }, { "use_alibi", OFF },
    { "clip_qkv", OFF }, { "qk_layernorm", OFF }, { "use_qk_norm", OFF }, { "qk_norm", OFF },
    { "parallel_attn", OFF }, { "use_parallel_residual", OFF }, { "parallel_residual", OFF },
    { "attn_logit_softcapping", OFF }, { "final_logit_softcapping", OFF },
    { "query_pre_attn_scalar", OFF }, { "attn_scale", ONE }, { "logit_scale", ONE },
    { "logits_scaling", ONE }, { "embedding_multiplier", ONE }, { "residual_multiplier", ONE },
    { "attention_multiplier", OFF }, { "scale_emb", ONE }, { "scale_depth", OFF },
    { "dim_model_base", OFF }, { "mup_width_multiplier", ONE }, { "layer_norm_type", OFF },
    { "norm_type", OFF }, { "no_rope_layers", OFF }, { "no_rope_layer_interval", OFF },
    { "attention_chunk_size", OFF }, { "attn_temperature_tuning", OFF },
    { "llama_4_scaling", OFF }, { "rope_interleaved", OFF }, { "rope_traditional", OFF },
    { "rope_ratio", ONE }, { "rope_local_base_freq", OFF }, { "rotary_pct", ONE },
    { "rotary_dim", OFF }, { "global_attn_every_n_layers", OFF }, { "local_attention", OFF },
    { "dual_chunk_attention_config", OFF }, { "attention_window", OFF },
    { "cross_attention_layers", OFF }, { "add_cross_attention", OFF },
    { "is_encoder_decoder", OFF }, { "cross_attention_hidden_size", OFF },
    { "vision_config", OFF }, { "text_config", OFF }, { "audio_config", OFF },
    { "kv_lora_rank", OFF }, { "q_lora_rank", OFF }, { "qk_rope_head_dim", OFF },
    { "v_head_dim", OFF }, { "use_mla", OFF }, { "ssm_cfg", OFF }, { "mamba_d_state", OFF },
    { "linear_attention", OFF }, { "num_kv_shared_layers", OFF }, { "use_cla", OFF },
    { "pruned_heads", OFF }, { "is_causal", TRUE_ONLY }, { "use_bidirectional_attention", OFF },
    { "diffusion", OFF }, { "block_configs", OFF }, { "attention_sinks", OFF },
    { "sink_token_length", OFF },
};

static const char *const danger_words[] = {
    "expert", "moe", "softcap", "multiplier", "quantiz", "alibi", "router", "rope", "rotary",
    "window", "_bias", "scaling", "mamba", "ssm_",
};

static bool is_neutral(const json_t *v, enum neutral n)
{
    if (json_is_null(v))
        return true;
    if (n == NEVER)
        return false;
    if (n == TRUE_ONLY)
        return json_is_true(v);
    if (n == ONE && json_is_number(v))
        return json_number_value(v) == 1;
    return ju_is_off(v);
}

static bool sounds_dangerous(const char *name)
{
    for (size_t i = 0; i < LM_COUNT(danger_words); i++)
        if (strstr(name, danger_words[i]))
            return true;
    return false;
}

static lm_status refuse(const struct ju *j, const char *name, const json_t *v)
{
    char b[64];
    return lm_err_set(j->err, LM_UNSUPPORTED, "%s: %s%.64s = %s changes the model's maths in a way"
                      " that is not supported", j->file, j->path, name, ju_brief(v, b, sizeof b));
}

static lm_status check_field(const struct ju *j, const char *name, const json_t *v)
{
    for (size_t i = 0; i < LM_COUNT(danger_fields); i++)
        if (strcmp(name, danger_fields[i].name) == 0)
            return is_neutral(v, danger_fields[i].neutral) ? LM_OK : refuse(j, name, v);
    if (ju_name_in(name, read_fields, LM_COUNT(read_fields)) ||
        ju_name_in(name, harmless_fields, LM_COUNT(harmless_fields)) || ju_is_off(v))
        return LM_OK;
    if (sounds_dangerous(name))
        return refuse(j, name, v);
    lm_log(LM_WARN, "engine", "%s: unknown field %.64s is ignored", j->file, name);
    return LM_OK;
}

lm_status model_config_check_fields(const struct ju *j)
{
    const char *name;
    json_t *v;
    json_object_foreach((json_t *)j->obj, name, v) {
        lm_status s = check_field(j, name, v);
        if (s)
            return s;
    }
    return LM_OK;
}
