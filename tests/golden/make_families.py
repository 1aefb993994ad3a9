#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/fixtures/families: tiny random models of every family that we serve, with adapters.

Each family is a folder model/ as Hugging Face lays it out (config.json written by hand, in the style
of transformers 4 or 5) and a folder adapters/ of PEFT folders. Weights are Gaussian, scaled so that
attention is far from uniform and logits spread widely: a wrong frequency, window, bias or scale then
moves log-probabilities by far more than the tests' tolerance. The seed of a family is its name.

    python make_families.py [NAME...]       then make_golden.py
"""
import hashlib
import json
import math
import os
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "..", "fixtures", "families")
VOCAB, HIDDEN, FFN = 320, 64, 128
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_config(kind, layers=2, heads=4, kv=2, **more):
    c = {
        "architectures": [{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                           "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]],
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": HIDDEN, "initializer_range": 0.02, "intermediate_size": FFN,
        "max_position_embeddings": 256, "model_type": kind, "num_attention_heads": heads,
        "num_hidden_layers": layers, "num_key_value_heads": kv, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "use_cache": True, "vocab_size": VOCAB,
    }
    c.update(more)
    return c


def v4(c, dtype, theta=10000.0, scaling=None):
    return {**c, "torch_dtype": dtype, "rope_theta": theta, "rope_scaling": scaling,
            "transformers_version": "4.46.3"}


def v5(c, dtype, **rope):
    return {**c, "dtype": dtype, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                     **rope}, "transformers_version": "5.23.0"}


# name: (config, shards, generation_config, adapters); an adapter: (LoraConfig arguments, dtype,
# keys to overwrite in the saved adapter_config.json because PEFT resolves them when it saves)
def lora(dtype="float32", rewrite=None, **kw):
    return (kw, dtype, rewrite or {})


FAMILIES = {
    "llama2": (
        v4(base_config("llama", kv=4, pretraining_tp=1, attention_bias=False, mlp_bias=False),
           "bfloat16"), 1, {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True,
                            "temperature": 0.6, "top_p": 0.9},
        {"list": lora(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
         "patterns": lora(r=4, lora_alpha=4, target_modules=LINEAR,
                          rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7,
                                        "mlp.down_proj": 3},
                          alpha_pattern={r"^model\.layers\.0\..*": 6, "v_proj": 1.5}),
         "regex-rslora": lora(dtype="bfloat16", r=8, lora_alpha=4, use_rslora=True,
                              target_modules=r"model\.layers\.\d+\.(self_attn\.[qko]_proj|"
                                             r"mlp\.(up|down)_proj)")}),
    "llama3": (
        v5(base_config("llama", eos_token_id=[2, 5], head_dim=16, attention_bias=False,
                       mlp_bias=False), "bfloat16", rope_type="llama3", factor=8.0,
           low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64), 1,
        {"bos_token_id": 1, "eos_token_id": [2, 5, 7]},
        {"all-linear": lora(r=4, lora_alpha=6, target_modules="all-linear",
                            rewrite={"target_modules": "all-linear"}),
         "layers": lora(r=16, lora_alpha=16, target_modules=["k_proj", "gate_proj"],
                        layers_to_transform=[1]),
         "exclude-list": lora(dtype="float16", r=3, lora_alpha=5, target_modules=LINEAR,
                              exclude_modules=["layers.0.mlp.up_proj", "o_proj"])}),
    "mistral": (
        v4(base_config("mistral", sliding_window=16, head_dim=32, heads=2, kv=1), "float16"), 1,
        None,
        {"fan-in": lora(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "down_proj"],
                        rewrite={"fan_in_fan_out": True}),
         "layers-pattern": lora(r=5, lora_alpha=5, target_modules=["v_proj", "up_proj"],
                                layers_to_transform=0, layers_pattern="layers",
                                use_rslora=True)}),
    "qwen2": (
        v4(base_config("qwen2", max_window_layers=2, sliding_window=32768,
                       use_sliding_window=False), "bfloat16", theta=1000000.0), 3,
        {"eos_token_id": [2, 3], "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8,
         "repetition_penalty": 1.05},
        {"all-linear-exclude": lora(r=8, lora_alpha=8, target_modules="all-linear",
                                    exclude_modules=r"model\.layers\.0\..*",
                                    rewrite={"target_modules": "all-linear"}),
         "list": lora(dtype="bfloat16", r=2, lora_alpha=4, target_modules=["q_proj", "k_proj",
                                                                           "v_proj"])}),
    "qwen2-window": (
        v4(base_config("qwen2", layers=3, max_window_layers=1, sliding_window=12,
                       use_sliding_window=True), "float32"), 1, None,
        {"full-names": lora(r=4, lora_alpha=8,
                            target_modules=["model.layers.0.self_attn.q_proj",
                                            "model.layers.2.mlp.down_proj"])}),
    "qwen3": (
        v5(base_config("qwen3", head_dim=32, attention_bias=False, use_sliding_window=True,
                       sliding_window=20, max_window_layers=0,
                       layer_types=["sliding_attention", "full_attention"]), "bfloat16",
           rope_theta=1000000.0), 1, None,
        {"patterns-rslora": lora(r=4, lora_alpha=3, use_rslora=True, target_modules=LINEAR,
                                 rank_pattern={r"(self_attn\.)?[qk]_proj": 6},
                                 alpha_pattern={"gate_proj": 9}),
         "attention": lora(r=12, lora_alpha=12,
                           target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])}),
    "tied": (
        v5(base_config("llama", tie_word_embeddings=True, head_dim=16), "bfloat16",
           rope_theta=500000.0), 1, None,
        {"mlp": lora(r=4, lora_alpha=8, target_modules=["gate_proj", "up_proj", "down_proj"]),
         "regex": lora(r=4, lora_alpha=8, target_modules=r".*\.1\.self_attn\.(q|v)_proj")}),
    "rope-linear": (
        v4(base_config("llama"), "bfloat16", scaling={"type": "linear", "factor": 4.0}), 1, None,
        {"list": lora(r=4, lora_alpha=8, target_modules=["k_proj", "q_proj"])}),
    "rope-dynamic": (
        v4(base_config("llama", max_position_embeddings=48), "bfloat16",
           scaling={"rope_type": "dynamic", "factor": 4.0}), 1, None,
        {"list": lora(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])}),
    "rope-yarn": (
        v5(base_config("llama"), "bfloat16", rope_type="yarn", factor=8.0,
           original_max_position_embeddings=32, beta_fast=8.0, beta_slow=1.0), 1, None,
        {"list": lora(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])}),
}


def gauss(gen, rows, cols, gain):
    return torch.randn(rows, cols, generator=gen) * (gain / math.sqrt(cols))


def make_weights(c, gen):
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    dim = c.get("head_dim") or HIDDEN // heads
    w = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=gen) * 0.5,
         "model.norm.weight": 1 + 0.2 * torch.randn(HIDDEN, generator=gen)}
    if not c["tie_word_embeddings"]:
        w["lm_head.weight"] = gauss(gen, VOCAB, HIDDEN, 4.0)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes = {"self_attn.q_proj": (heads * dim, HIDDEN, 1.6), "self_attn.k_proj":
                  (kv * dim, HIDDEN, 1.6), "self_attn.v_proj": (kv * dim, HIDDEN, 1.5),
                  "self_attn.o_proj": (HIDDEN, heads * dim, 1.5), "mlp.gate_proj":
                  (FFN, HIDDEN, 1.5), "mlp.up_proj": (FFN, HIDDEN, 1.2), "mlp.down_proj":
                  (HIDDEN, FFN, 1.2)}
        for name, (rows, cols, gain) in shapes.items():
            w[f"{p}{name}.weight"] = gauss(gen, rows, cols, gain)
            if c["model_type"] == "qwen2" and name[10:] in ("q_proj", "k_proj", "v_proj"):
                w[f"{p}{name}.bias"] = 0.7 * torch.randn(rows, generator=gen)
        for n in ("input_layernorm", "post_attention_layernorm"):
            w[f"{p}{n}.weight"] = 1 + 0.2 * torch.randn(HIDDEN, generator=gen)
        if c["model_type"] == "qwen3":
            for n in ("q_norm", "k_norm"):
                w[f"{p}self_attn.{n}.weight"] = 1.3 + 0.4 * torch.randn(dim, generator=gen)
    return w


def write_json(path, value):
    with open(path, "w") as f:
        json.dump(value, f, indent=2)
        f.write("\n")


def write_model(folder, c, shards, generation, gen):
    os.makedirs(folder)
    write_json(os.path.join(folder, "config.json"), c)
    if generation:
        write_json(os.path.join(folder, "generation_config.json"), generation)
    dtype = DTYPES[c.get("dtype") or c["torch_dtype"]]
    w = {k: v.to(dtype).contiguous() for k, v in make_weights(c, gen).items()}
    if shards == 1:
        save_file(w, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        return
    names, index = sorted(w), {}
    for s in range(shards):
        part = names[s::shards]
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: w[n] for n in part}, os.path.join(folder, file), metadata={"format": "pt"})
        index.update({n: file for n in part})
    total = sum(t.numel() * t.element_size() for t in w.values())
    write_json(os.path.join(folder, "model.safetensors.index.json"),
               {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})


def write_adapter(folder, model_folder, settings, dtype, rewrite, gen):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, p in sorted(peft.named_parameters()):
        if "lora_A" in name:
            p.data = torch.randn(p.shape, generator=gen) / math.sqrt(p.shape[1])
        elif "lora_B" in name:
            p.data = torch.randn(p.shape, generator=gen) * (0.6 / math.sqrt(p.shape[1]))
    for module in peft.modules():
        if hasattr(module, "lora_A") and hasattr(module, "weight"):
            module.to(DTYPES[dtype])
    peft.peft_config["default"].base_model_name_or_path = os.path.basename(
        os.path.dirname(model_folder))
    peft.save_pretrained(folder, save_embedding_layers=False)
    os.remove(os.path.join(folder, "README.md"))
    path = os.path.join(folder, "adapter_config.json")
    with open(path) as f:
        c = json.load(f)
    c.update(rewrite)
    for key in ("target_modules", "exclude_modules"):       # PEFT keeps sets: fix their order
        if isinstance(c[key], list):
            c[key].sort()
    write_json(path, c)


def main():
    torch.set_num_threads(1)
    for name in sys.argv[1:] or FAMILIES:
        c, shards, generation, adapters = FAMILIES[name]
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        gen = torch.Generator().manual_seed(seed)
        folder = os.path.join(OUT, name)
        shutil.rmtree(folder, ignore_errors=True)
        model = os.path.join(folder, "model")
        write_model(model, c, shards, generation, gen)
        for adapter, (settings, dtype, rewrite) in adapters.items():
            write_adapter(os.path.join(folder, "adapters", adapter), model, settings, dtype,
                          rewrite, gen)
        for path, _, files in os.walk(folder):          # safetensors writes them for their owner
            for f in files:
                os.chmod(os.path.join(path, f), 0o644)
        print(name)


if __name__ == "__main__":
    main()
