#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What bf16 costs transformers itself on the golden fixtures: writes tests/gpu/bf16_errors.json.

    python3 tests/gpu/bf16_errors.py        from the top of the tree; a GPU is used where there is one

For each suite the base model runs in bf16 on every base case's prompt and greedy tokens at once;
log-probabilities (float32 log_softmax of its logits) are compared with the float32 reference. Needs
torch, transformers and safetensors.
"""
import json
import sys

import safetensors.torch
import torch
import transformers

FAMILIES = ["llama2", "llama3", "mistral", "qwen2", "qwen2-window", "qwen3", "tied", "rope-linear",
            "rope-yarn"]
SHIPPED = ["spm-tiny", "storefront"]


def run(model_dir, golden, device):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    model = model.to(device).eval()
    tensors = safetensors.torch.load_file(golden)
    errors, agreed, greedy = [], 0, 0
    for name in sorted(tensors):
        if not (name.startswith("base/") and name.endswith("/prompt")):
            continue
        case = name[: -len("prompt")]
        prompt, made = tensors[name], tensors[case + "greedy"]
        want = torch.cat([tensors[case + "prompt_logprobs"], tensors[case + "greedy_logprobs"]])
        ids = torch.cat([prompt, made]).long().to(device)
        with torch.no_grad():
            logits = model(ids[None]).logits[0].float()
        logprobs = torch.log_softmax(logits, -1)
        got = logprobs[:-1].gather(1, ids[1:, None])[:, 0].cpu()
        errors.append((got - want[1:]).abs())
        best = logits[len(prompt) - 1 : -1].argmax(-1).cpu()
        agreed += int((best == made).sum())
        greedy += len(made)
    e = torch.cat(errors)
    return {"largest": float(e.max()), "median": float(e.median()), "agreement": agreed / greedy,
            "tokens": len(e)}


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = {}
    suites = [(n, f"tests/fixtures/families/{n}/model", f"tests/fixtures/families/{n}/golden.safetensors")
              for n in FAMILIES]
    suites += [(n, f"tests/models/{n}", f"tests/golden/{n}.safetensors") for n in SHIPPED]
    for name, model, golden in suites:
        try:
            out[name] = run(model, golden, device)
            print(name, out[name], flush=True)
        except Exception as e:
            print(f"{name}: {e}", file=sys.stderr)
    where = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
    out["made_with"] = f"torch {torch.__version__}, transformers {transformers.__version__}, {where}"
    path = sys.argv[1] if len(sys.argv) > 1 else "tests/gpu/bf16_errors.json"
    with open(path, "w") as f:
        json.dump(out, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    main()
