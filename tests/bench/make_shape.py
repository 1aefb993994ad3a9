# SPDX-License-Identifier: Apache-2.0
"""make_shape.py NAME DIR ADAPTERS-DIR N: a real-sized model with random bf16 weights, and N adapters.

Writes a Hugging Face folder of the named shape and N PEFT adapters (ranks 8 and 16 in turn, on
q, k, v and o), for measuring; nothing sensible can be generated with it. Done once: a folder that
is complete is left alone.
"""
import json
import os
import sys

import torch
from safetensors.torch import save_file

SHAPES = {
    "llama-3.2-1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=64,
                         vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0,
                         tie_word_embeddings=True,
                         rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
                                           original_max_position_embeddings=8192,
                                           rope_type="llama3")),
}


def weights(c, gen):
    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float32).mul_(0.02).bfloat16()

    h, f, d = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    t = {"model.embed_tokens.weight": rand(c["vocab_size"], h),
         "model.norm.weight": torch.ones(h, dtype=torch.bfloat16)}
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name, rows, cols in (("self_attn.q_proj", q, h), ("self_attn.k_proj", kv, h),
                                 ("self_attn.v_proj", kv, h), ("self_attn.o_proj", h, q),
                                 ("mlp.gate_proj", f, h), ("mlp.up_proj", f, h),
                                 ("mlp.down_proj", h, f)):
            t[p + name + ".weight"] = rand(rows, cols)
        for name in ("input_layernorm", "post_attention_layernorm"):
            t[p + name + ".weight"] = torch.ones(h, dtype=torch.bfloat16)
    return t


def adapter(c, j, gen):
    r = (8, 16)[j % 2]
    h, d = c["hidden_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    t = {}
    for i in range(c["num_hidden_layers"]):
        for name, rows, cols in (("q_proj", q, h), ("k_proj", kv, h), ("v_proj", kv, h),
                                 ("o_proj", h, q)):
            p = f"base_model.model.model.layers.{i}.self_attn.{name}."
            t[p + "lora_A.weight"] = torch.randn(r, cols, generator=gen).mul_(0.02).bfloat16()
            t[p + "lora_B.weight"] = torch.randn(rows, r, generator=gen).mul_(0.02).bfloat16()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r,
              "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "bias": "none",
              "lora_dropout": 0.0, "fan_in_fan_out": False, "base_model_name_or_path": "random"}
    return config, t


def tokenizer(vocab):
    """The smallest tokenizer file with the right vocabulary: prompts are token ids here."""
    alphabet = sorted(set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256)))
    chars = [chr(b) for b in alphabet] + [chr(256 + i) for i in range(256 - len(alphabet))]
    v = {c: i for i, c in enumerate(chars)}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
            "normalizer": None, "post_processor": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                              "use_regex": True},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                        "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "byte_fallback": False, "ignore_merges": False, "vocab": v, "merges": []}}


def main(name, model_dir, adapters_dir, n):
    if os.path.exists(os.path.join(adapters_dir, ".complete")):
        return
    gen = torch.Generator().manual_seed(1)
    c = dict(SHAPES[name])
    os.makedirs(model_dir, exist_ok=True)
    save_file(weights(c, gen), os.path.join(model_dir, "model.safetensors"), {"format": "pt"})
    c.update(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu",
             rms_norm_eps=1e-5, torch_dtype="bfloat16", bos_token_id=0, eos_token_id=1,
             attention_bias=False, mlp_bias=False)
    json.dump(c, open(os.path.join(model_dir, "config.json"), "w"), indent=1)
    json.dump(tokenizer(c["vocab_size"]), open(os.path.join(model_dir, "tokenizer.json"), "w"))
    for j in range(n):
        d = os.path.join(adapters_dir, f"a{j:03d}")
        os.makedirs(d, exist_ok=True)
        config, t = adapter(c, j, gen)
        json.dump(config, open(os.path.join(d, "adapter_config.json"), "w"), indent=1)
        save_file(t, os.path.join(d, "adapter_model.safetensors"), {"format": "pt"})
    open(os.path.join(adapters_dir, ".complete"), "w").close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
