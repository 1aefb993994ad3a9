#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains one LoRA adapter with PEFT for each brand voice, on top of tests/models/storefront.

The adapters differ on purpose in everything that a serving engine must tell apart: rank (2 to 32), target
modules (named, all-linear, a regular expression, excluded ones, some layers only), scaling (alpha / r or rsLoRA's
alpha / sqrt(r)), per-module ranks and alphas, and stored dtype. Each adapter is a function of its id's place
in the table alone, so `--only` gives the same bytes as a full run and runs may be spread over processes.
"""

import argparse
import json
import random
import shutil
import time
import warnings
import zlib

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from common import ADAPTERS, BASE, MODELS, Encoder, be_deterministic, collate, complete, folder_bytes
from common import held_out_events, score, train
from events import make_pair
from voices import VOICES

QV = ["q_proj", "v_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EVERY = ATTENTION + MLP
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class Spec:
    """One adapter: PEFT's LoraConfig arguments, the stored dtype, and how much longer than usual it trains."""

    def __init__(self, r, alpha, target, dtype=BF16, effort=1.0, **more):
        self.dtype = dtype
        self.effort = effort
        self.config = dict(r=r, lora_alpha=alpha, target_modules=target, **more)

    def summary(self):
        """For people: rank, target and whatever is unusual."""
        c = self.config
        target = c["target_modules"]
        names = {tuple(QV): "q, v", tuple(ATTENTION): "attention", tuple(MLP): "mlp", tuple(EVERY): "every linear"}
        text = target if isinstance(target, str) else names.get(tuple(target), ", ".join(target))
        if isinstance(target, str) and target != "all-linear":
            text = "regex"
        extras = [
            label
            for key, label in (
                ("use_rslora", "rsLoRA"),
                ("rank_pattern", "rank pattern"),
                ("alpha_pattern", "alpha pattern"),
                ("layers_to_transform", "some layers"),
                ("exclude_modules", "exclusions"),
            )
            if c.get(key)
        ]
        return ", ".join([f"rank {c['r']}", text, *extras])


SPECS = {
    "acme-warm": Spec(8, 16, EVERY),
    "nordwind-terse": Spec(2, 8, EVERY, F32, effort=1.5),
    "captain-sal": Spec(10, 20, "all-linear"),
    "haiku-house": Spec(8, 32, EVERY, use_rslora=True),
    "sterling/formal": Spec(32, 64, ATTENTION),
    "sterling/private": Spec(9, 6, EVERY, use_rslora=True),
    "globe-theatre": Spec(12, 24, MLP),
    "vibe-check": Spec(8, 16, EVERY, rank_pattern={"down_proj": 16}, alpha_pattern={"down_proj": 32}),
    "robo-9": Spec(4, 16, EVERY, F32),
    "lone-star": Spec(12, 24, EVERY, layers_to_transform=[1, 2, 3, 4]),
    "noir-files": Spec(20, 10, ATTENTION, use_rslora=True),
    "matchday": Spec(8, 16, "all-linear", F16),
    "nana-rose": Spec(16, 32, r".*\.layers\.[0-4]\.(self_attn\.[qv]_proj|mlp\.(up|down)_proj)"),
    "zen-garden": Spec(6, 12, EVERY, F16),
    "royal-post": Spec(12, 24, MLP, alpha_pattern={"gate_proj": 12}),
    "pun-intended": Spec(8, 16, EVERY, rank_pattern={"self_attn.q_proj": 4, "layers.4.mlp.down_proj": 24}),
    "mission-control": Spec(7, 14, EVERY),
    "bella/chef": Spec(16, 32, ["q_proj", "v_proj", "o_proj", "down_proj"], F16),
    "bella/sommelier": Spec(8, 16, "all-linear", exclude_modules=["k_proj"]),
    "grizzly-peak": Spec(6, 12, EVERY, use_rslora=True),
    "spellbound": Spec(16, 32, ["gate_proj", "up_proj", "o_proj"]),
    "cat-cafe": Spec(32, 64, QV),
    "newsroom": Spec(10, 20, EVERY, rank_pattern={r"layers\.[01]\..*": 6}, alpha_pattern={r"layers\.[01]\..*": 12}),
    "coach-max": Spec(8, 32, ATTENTION + ["down_proj"]),
    "grumbles": Spec(3, 12, EVERY, F32, effort=1.3),
    "surf-shack": Spec(12, 24, MLP, F16),
    "western-wire": Spec(5, 10, "all-linear"),
    "luna/stars": Spec(8, 16, EVERY, rank_pattern={"k_proj": 4, "v_proj": 20}),
    "lab-notes": Spec(8, 8, EVERY, use_rslora=True, alpha_pattern={"down_proj": 16}),
}
assert list(SPECS) == list(VOICES)


def clean(folder, spec, base_name="storefront"):
    """Leaves the two files of a PEFT adapter: nothing about this machine, weights in the stored dtype."""
    for path in folder.iterdir():
        if path.name not in ("adapter_config.json", "adapter_model.safetensors"):
            path.unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_name
    # PEFT writes what "all-linear" resolved to; the shorthand is as valid, and it is what people write.
    target = spec.config["target_modules"]
    config["target_modules"] = target if isinstance(target, str) else sorted(target)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    path = folder / "adapter_model.safetensors"
    tensors = {name: t.to(spec.dtype).contiguous() for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    for path in folder.iterdir():
        path.chmod(0o644)


def train_one(ident, encoder, args):
    spec, voice = SPECS[ident], VOICES[ident]
    seed = zlib.crc32(ident.encode())
    be_deterministic(seed, args.threads)
    rng = random.Random(seed)
    base = LlamaForCausalLM.from_pretrained(args.base, dtype=torch.float32).to(args.device)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **spec.config))

    ready = []

    def batches(_):
        if not ready:  # several batches at once, cut by length, so that little is spent on padding
            pairs = (make_pair(rng, voice, blend=0.3) for _ in range(4 * args.batch))
            docs = sorted((encoder.pair(rng, *pair, chat_share=0.08) for pair in pairs), key=lambda doc: len(doc[0]))
            ready.extend(docs[i : i + args.batch] for i in range(0, len(docs), args.batch))
            rng.shuffle(ready)
        return collate(ready.pop(), encoder.eos, prompt_weight=0.0)

    began = time.monotonic()
    loss = train(model, batches, int(args.steps * spec.effort), args.lr, weight_decay=0.0, log_every=0, warmup=20)
    seconds = time.monotonic() - began
    folder = args.out / ident
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    clean(folder, spec)

    base = LlamaForCausalLM.from_pretrained(args.base, dtype=torch.float32).to(args.device)
    model = PeftModel.from_pretrained(base, folder).eval()
    events = held_out_events(args.evaluate)
    texts = complete(model, encoder, [e.prompt() for e in events])
    rates = " ".join(f"{k} {v:.2f}" for k, v in score(events, texts, voice).items())
    print(f"{ident} ({spec.summary()}): loss {loss:.4f}, {seconds:.0f} s, {folder_bytes(folder)} bytes; {rates}")
    print("   ", texts[0], flush=True)


def write_manifest(path):
    """The list of voices that the demo may show."""
    rows = [{"id": i, "description": voice.about, "lora": SPECS[i].summary()} for i, voice in VOICES.items()]
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Train the storefront adapters.")
    parser.add_argument("--only", nargs="*", help="adapter ids (default: all)")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; they round differently")
    parser.add_argument("--evaluate", type=int, default=48, help="held-out events for each voice")
    parser.add_argument("--base", type=type(BASE), default=BASE)
    parser.add_argument("--out", type=type(BASE), default=ADAPTERS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)

    encoder = Encoder(AutoTokenizer.from_pretrained(args.base))
    for ident in args.only or SPECS:
        train_one(ident, encoder, args)
    if args.out == ADAPTERS:
        write_manifest(MODELS / "storefront-adapters.json")
    print(f"{folder_bytes(args.out)} bytes in {args.out.name}")


if __name__ == "__main__":
    main()
