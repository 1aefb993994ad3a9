#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Reference results of transformers + PEFT in float32, for the engine's golden tests.

    python make_golden.py [rope|plans|families|shipped]...   default: all

Writes, for each model, golden.safetensors beside its folder (families: tests/fixtures/families/NAME;
the shipped models: tests/golden/NAME.safetensors). Names are "VARIANT/CASE/WHAT", VARIANT being
"base" or an adapter's id (which may have slashes of its own), CASE a number, WHAT one of

    prompt            I32 [L]       token ids
    prompt_logprobs   F32 [L]       log p(prompt[i] | prompt[:i]); the first is NaN
    greedy            I32 [64]      the most probable tokens after the prompt, no stopping
    greedy_logprobs   F32 [64]      their log-probabilities
    at                I32 [P]       indices i in prompt + greedy; the distribution of token i + 1 is
    full              F32 [P, V]    log-probabilities of the whole vocabulary (families), or
    top_ids           I32 [P, 20]   the 20 most probable tokens, best first (shipped models), with
    top               F32 [P, 20]   their log-probabilities

Weights are read in their stored dtype and widened to float32, which is exact. The prompt goes
through in one forward pass, then tokens one by one with the KV cache, as generate() does. Prompts
are drawn at random (shipped models: from the text they were made for) until the best two logits of
every greedy step are at least GAP apart, so that equal maths gives equal tokens.

Dynamic NTK scaling depends on how long the sequence was when a token was computed, and transformers
never rotates cached keys again. What generate() does, and so what these files hold: every token of a
prompt of length L is rotated with the base for length max(L, max_position_embeddings), the
generated token at position p with the base for max(p + 1, max_position_embeddings). transformers
keeps the longest length of earlier calls in the module; each case starts from a fresh state.

rope.json holds inverse frequencies and attention factors for RoPE settings of every kind; plans.json
what PEFT makes of adapter settings: rank and scale of every module, or null where it refuses.
"""
import json
import os
import re
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from peft import PeftModel  # noqa: E402
from peft import __version__ as peft_version  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
FAMILIES = os.path.join(HERE, "..", "fixtures", "families")
MODELS = os.path.join(HERE, "..", "models")
LENGTHS = (5, 37, 70)
STEPS = 64
GAP = 0.02
TOP = 20


def fresh_rope(model):
    """Forget the sequence lengths that dynamic RoPE has seen."""
    for m in model.modules():
        if hasattr(m, "max_seq_len_cached") and hasattr(m, "original_inv_freq"):
            m.max_seq_len_cached = m.original_max_seq_len
            m.inv_freq = m.original_inv_freq.clone()


@torch.no_grad()
def run(model, prompt):
    """Logits of the whole prompt [L, V], of the greedy steps [64, V], and the tokens."""
    fresh_rope(model)
    cache = DynamicCache(config=model.config)
    logits = model(torch.tensor([prompt]), past_key_values=cache, use_cache=True).logits[0].float()
    steps, tokens = [logits[-1]], []
    for i in range(STEPS):
        tokens.append(int(steps[-1].argmax()))
        best = steps[-1].topk(2).values
        if best[0] - best[1] < GAP:
            return None
        if i + 1 < STEPS:
            out = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
            steps.append(out.logits[0, -1].float())
    return logits, torch.stack(steps), tokens


def case(model, draw, full):
    for _ in range(2000):
        prompt = draw()
        result = run(model, prompt)
        if result:
            break
    else:
        raise SystemExit("no prompt with well separated greedy tokens; lower GAP")
    logits, steps, tokens = result
    lp = torch.cat([logits, steps[1:]]).log_softmax(-1)         # row i: distribution of token i + 1
    n = len(prompt)
    every = torch.tensor(prompt + tokens)
    chosen = lp[torch.arange(n + STEPS - 1), every[1:]]
    at = sorted({0, n - 1, n + STEPS // 2})
    out = {
        "prompt": np.array(prompt, np.int32),
        "prompt_logprobs": np.concatenate([[np.nan], chosen[: n - 1]]).astype(np.float32),
        "greedy": np.array(tokens, np.int32),
        "greedy_logprobs": chosen[n - 1:].numpy(),
    }
    out["at"] = np.array(at, np.int32)
    if full:
        out["full"] = lp[at].numpy()
    else:
        top = lp[at].topk(TOP)
        out["top"], out["top_ids"] = top.values.numpy(), top.indices.numpy().astype(np.int32)
    return out


def random_prompts(vocab, gen):
    def draw(n):
        return torch.randint(3, vocab, (n,), generator=gen).tolist()
    return draw


def text_prompts(folder, gen):
    """Windows of the orders that the shipped models answer, tokenised by the model's tokenizer."""
    from tokenizers import Tokenizer
    tok = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    with open(os.path.join(MODELS, "orders.txt"), encoding="utf-8") as f:
        lines = [line.rstrip("\n") for line in f if line.strip()]

    def draw(n):
        at = int(torch.randint(0, len(lines) - 8, (1,), generator=gen))
        return tok.encode("\n".join(lines[at: at + 8])).ids[:n]
    return draw


def golden(model_dir, adapters_dir, out, full, prompts, lengths):
    names = sorted(os.path.relpath(path, adapters_dir) for path, _, files in os.walk(adapters_dir)
                   if "adapter_config.json" in files)
    tensors = {}
    for v, name in enumerate(["base"] + names):
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="eager").eval()
        if name != "base":
            model = PeftModel.from_pretrained(model, os.path.join(adapters_dir, name),
                                              autocast_adapter_dtype=False).float().eval()
        gen = torch.Generator().manual_seed(1000 + v)
        draw = prompts(model.config.vocab_size, gen)
        # Many shipped adapters: one prompt length each, in turn, and all for the base.
        which = lengths if full or name == "base" else [lengths[v % len(lengths)]]
        for i, n in enumerate(which):
            for what, value in case(model, lambda n=n: draw(n), full).items():
                tensors[f"{name}/{i}/{what}"] = np.ascontiguousarray(value)
        print(os.path.relpath(model_dir, os.path.join(HERE, "..")), name, flush=True)
    save_file(tensors, out, metadata={
        "torch": torch.__version__.split("+")[0], "transformers": transformers.__version__,
        "peft": peft_version})
    os.chmod(out, 0o644)


def families():
    for name in sorted(os.listdir(FAMILIES)):
        folder = os.path.join(FAMILIES, name)
        if not os.path.isdir(os.path.join(folder, "model")):
            continue
        golden(os.path.join(folder, "model"), os.path.join(folder, "adapters"),
               os.path.join(folder, "golden.safetensors"), True, random_prompts, LENGTHS)


def shipped():
    for name in ("storefront", "spm-tiny"):
        folder = os.path.join(MODELS, name)
        if not os.path.exists(os.path.join(folder, "config.json")):
            print(f"{name}: not there yet, passed over")
            continue
        golden(folder, os.path.join(MODELS, f"{name}-adapters"),
               os.path.join(HERE, f"{name}.safetensors"), False,
               lambda vocab, gen, folder=folder: text_prompts(folder, gen), LENGTHS)


# ---- RoPE alone ---------------------------------------------------------------------------------

ROPE_CASES = {
    "default": {}, "linear": {"rope_type": "linear", "factor": 4.0},
    "linear-v4": {"type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3-3.1-8b": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                      "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "llama3-3.2-1b": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                      "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn-qwen": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-betas": {"rope_type": "yarn", "factor": 16.0, "beta_fast": 20, "beta_slow": 2.5,
                   "original_max_position_embeddings": 4096},
    "yarn-mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.3,
                    "original_max_position_embeddings": 4096},
    "yarn-attention-factor": {"rope_type": "yarn", "factor": 40.0, "attention_factor": 0.75,
                              "mscale": 0.5, "mscale_all_dim": 1.3,
                              "original_max_position_embeddings": 4096},
    "yarn-not-truncated": {"rope_type": "yarn", "factor": 8.0, "truncate": False,
                           "original_max_position_embeddings": 8192},
    "yarn-no-original": {"rope_type": "yarn", "factor": 2.0},
}


def rope():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding
    default = LlamaRotaryEmbedding.compute_default_rope_parameters
    cases = []
    for name, scaling in ROPE_CASES.items():
        for dim, theta in ((64, 500000.0), (128, 10000.0), (80, 1e6)):
            base = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                    "hidden_size": 4 * dim, "intermediate_size": 64, "num_hidden_layers": 1,
                    "num_attention_heads": 4, "vocab_size": 32, "max_position_embeddings": 131072}
            v4 = {**base, "rope_theta": theta, "rope_scaling": scaling or None}
            v5 = {**base, "rope_parameters": {"rope_type": "default", **scaling,
                                              "rope_theta": theta}}
            if "type" in scaling:
                v5["rope_parameters"]["rope_type"] = scaling["type"]
            for style, config in (("v4", v4), ("v5", v5)):
                c = LlamaConfig.from_dict(json.loads(json.dumps(config)))
                kind = c.rope_parameters["rope_type"]
                fn = ROPE_INIT_FUNCTIONS.get(kind, default)
                inv, factor = fn(c)
                # float32 as the bits of an integer: exact in any JSON reader
                bits = inv.numpy().astype(np.float32).view(np.uint32).tolist()
                cases.append({"name": f"{name}/{dim}/{style}", "config": config,
                              "attention_factor": factor, "inv_freq_bits": bits})
    text = json.dumps({"transformers": transformers.__version__, "cases": cases})
    with open(os.path.join(HERE, "rope.json"), "w") as f:
        f.write(re.sub(r'(\{"name")', r"\n\1", text) + "\n")


# ---- adapter settings alone ---------------------------------------------------------------------

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PLAN_CASES = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": None},
    {"target_modules": []},
    {"target_modules": ["nothing_like_it"]},
    {"target_modules": ["q_proj", "dense"]},
    {"target_modules": ["proj"]},
    {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
    {"target_modules": ["1.self_attn.q_proj", "layers.2.mlp.up_proj"]},
    {"target_modules": ["model.layers.0.mlp.gate_proj", "k_proj"]},
    {"target_modules": ["lm_head"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["self_attn"]},
    {"target_modules": ["input_layernorm"]},
    {"target_modules": "all-linear"},
    {"target_modules": "All-Linear", "exclude_modules": ["o_proj", "2.mlp.down_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    {"target_modules": "all-linear", "exclude_modules": r"mlp"},
    {"target_modules": "all-linear", "layers_to_transform": [0]},
    {"target_modules": "q_proj"},
    {"target_modules": r".*q_proj"},
    {"target_modules": r".*\.(q|k)_proj$"},
    {"target_modules": r"^model\.layers\.[02]\.self_attn\.(?:q|v)_proj"},
    {"target_modules": r"(?P<head>.*)\.layers\.(?!1)\d+\.mlp\.(?:gate|up)_proj"},
    {"target_modules": r".*(?<=self_attn)\.[ko]_proj"},
    {"target_modules": r".*q_pro|.*v_proj"},
    {"target_modules": r"(?i).*Q_PROJ"},
    {"target_modules": r".*\.(\w)_proj"},
    {"target_modules": r"[^.]+(\.[^.]+){2}\.mlp\.\w+_proj"},
    {"target_modules":                                  # what a well-known trainer writes
     r"(?:.*?(?:vision|image|visual|patch|embed|encoder|language|text).*?(?:self_attn|attention|attn|"
     r"mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
     r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
     r"(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)))"},
    {"target_modules": r".*q_proj", "layers_to_transform": [0]},
    {"target_modules": r".*q_proj", "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
    {"target_modules": ALL, "exclude_modules": ["self_attn.q_proj", "layers.1.mlp.up_proj", "proj"]},
    {"target_modules": ALL, "exclude_modules": ["model.layers.2.mlp.up_proj"]},
    {"target_modules": ALL, "exclude_modules": r"model\.layers\.(0|1)\..*"},
    {"target_modules": ALL, "exclude_modules": []},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 2, 99]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [99]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "lay.*"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": []},
    {"target_modules": ["q_proj"], "layers_pattern": "layers"},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]},
    {"target_modules": None, "layers_to_transform": [2]},
    {"target_modules": ALL, "use_rslora": True, "r": 9, "lora_alpha": 6},
    {"target_modules": ALL, "lora_alpha": 0.5, "r": 3},
    {"target_modules": ALL, "rank_pattern": {"q_proj": 2, "down_proj": 5}},
    {"target_modules": ALL, "rank_pattern": {"_proj": 2, "q_pro": 3, "proj": 4}},
    {"target_modules": ALL, "rank_pattern": {r".*_proj": 2, "q_proj": 9}},
    {"target_modules": ALL, "rank_pattern": {"q_proj": 9, r".*_proj": 2}},
    {"target_modules": ALL, "rank_pattern": {r"^model\.layers\.0\..*": 6}},
    {"target_modules": ALL, "rank_pattern": {"model.layers.1.mlp.up_proj": 6, "mlp.up_proj": 7}},
    {"target_modules": ALL, "rank_pattern": {r"layers\.[12]\.self_attn\.\w_proj": 6}},
    {"target_modules": ALL, "rank_pattern": {"q|k_proj": 6}},
    {"target_modules": ALL, "alpha_pattern": {"v_proj": 1, r"(gate|up)_proj": 32.5},
     "rank_pattern": {"v_proj": 3}},
    {"target_modules": ALL, "alpha_pattern": {r"0\.self_attn\..*": 4}, "use_rslora": True},
    {"target_modules": ALL, "fan_in_fan_out": True},
    {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    {"target_modules": ["q_proj"], "init_lora_weights": False},
    {"target_modules": ["q_proj"], "r": 0},
    {"target_modules": ["q_proj"], "r": -4},
    {"target_modules": "*q_proj"},
]


def plan_of(model, settings):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    try:
        peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    except Exception as e:          # whatever PEFT raises is a refusal
        print("refused:", settings, "--", str(e)[:80])
        return None
    return {n.removeprefix("base_model.model."): [m.r["default"], m.scaling["default"]]
            for n, m in peft.named_modules() if isinstance(m, LoraLayer)}


def plans():
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, vocab_size=32,
                         num_attention_heads=4, num_key_value_heads=2)
    cases = [{"settings": c, "plan": plan_of(LlamaForCausalLM(config), c)} for c in PLAN_CASES]
    with open(os.path.join(HERE, "plans.json"), "w") as f:
        text = json.dumps({"peft": peft_version, "cases": cases})
        f.write(re.sub(r'(\{"settings")', r"\n\1", text) + "\n")


def main():
    torch.set_num_threads(1)
    for what in sys.argv[1:] or ("rope", "plans", "families", "shipped"):
        {"rope": rope, "plans": plans, "families": families, "shipped": shipped}[what]()


if __name__ == "__main__":
    main()
