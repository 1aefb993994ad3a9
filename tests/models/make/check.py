#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the shipped models with unchanged transformers and PEFT: they load, they are small, they copy.

Prints one order in six voices and, for the base and each adapter, how often held-out names and items are
copied exactly. Exits 1 when an assertion fails.
"""

import argparse
import json
import math
import re
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import events
from common import ADAPTERS, BASE, MODELS, Encoder, complete, folder_bytes, held_out_events, score
from make_spm_tiny import ADAPTERS as TINY_ADAPTERS
from make_spm_tiny import MODEL as TINY
from train_adapters import SPECS
from voices import NEUTRAL, VOICES

SHOWN = ["acme-warm", "nordwind-terse", "captain-sal", "sterling/formal", "vibe-check", "western-wire"]
BASE_LIMIT = ADAPTERS_LIMIT = 8 * 1000 * 1000
TINY_LIMIT = 1500 * 1000


def check_folder(path, limit):
    size = folder_bytes(path)
    print(f"{path.name}: {size} bytes, limit {limit}")
    assert size <= limit, path
    for file in path.rglob("*.json"):
        assert not re.search(r'"/\w+/', file.read_text()), f"{file}: an absolute path"


def check_copying(label, model, encoder, voice, count, least):
    held_out = held_out_events(count)
    rates = score(held_out, complete(model, encoder, [e.prompt() for e in held_out]), voice)
    print(f"  {label:18}", " ".join(f"{k} {v:.0%}" for k, v in sorted(rates.items())))
    for slot in ("name", "item"):
        assert rates[slot] >= least, (label, slot, rates[slot])
    return rates


def check_storefront(count):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    encoder = Encoder(tokenizer)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    for line in (MODELS / "orders.txt").read_text().splitlines():
        assert tokenizer.decode(tokenizer(line)["input_ids"], skip_special_tokens=True) == line
    check_copying("base", base, encoder, NEUTRAL, 480, 0.9)

    event = next(e for e in events.orders(1000) if e.kind == "order_shipped")
    print(f"\n  {event.prompt()}")
    print(f"  {'base':18} {complete(base, encoder, [event.prompt()])[0]}")
    print(f"  {'base, as chat':18} {complete(base, encoder, [event.prompt()], chat=True)[0]}")
    model = PeftModel.from_pretrained(base, ADAPTERS / next(iter(SPECS)), adapter_name="0")
    names = {ident: str(index) for index, ident in enumerate(SPECS)}
    for ident, name in list(names.items())[1:]:
        model.load_adapter(ADAPTERS / ident, adapter_name=name)
    model.eval()
    for ident in SHOWN:
        model.set_adapter(names[ident])
        print(f"  {ident:18} {complete(model, encoder, [event.prompt()])[0]}")
    print()
    for ident in SPECS:
        model.set_adapter(names[ident])
        check_copying(ident, model, encoder, VOICES[ident], count, 0.85)
    manifest = json.loads((MODELS / "storefront-adapters.json").read_text())
    assert [row["id"] for row in manifest] == list(SPECS) and len(manifest) >= 24


def check_tiny():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for text in ("Hello  world", "naïve café – 漢字 🙂", " leading", "tab\tnew\nline", ""):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1 and tokenizer.decode(ids, skip_special_tokens=True) == text, text
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    wanted = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == wanted
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    ids = tokenizer("event: birthday | name: Ana | gift: 20% ->", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = model(ids).logits
        for folder in sorted(TINY_ADAPTERS.iterdir()):
            tuned = PeftModel.from_pretrained(model, folder).eval()
            moved = (tuned(ids).logits - plain).abs().max().item()
            assert math.isfinite(moved) and moved > 0.1, folder
            print(f"  spm-tiny with {folder.name}: logits move by up to {moved:.2f}")
            model = tuned.unload()


def main():
    parser = argparse.ArgumentParser(description="Check the shipped models.")
    parser.add_argument("--count", type=int, default=64, help="held-out events for each adapter")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    check_folder(BASE, BASE_LIMIT)
    check_folder(ADAPTERS, ADAPTERS_LIMIT)
    check_folder(TINY, TINY_LIMIT - folder_bytes(TINY_ADAPTERS))
    check_folder(TINY_ADAPTERS, TINY_LIMIT)
    check_tiny()
    check_storefront(args.count)
    print("models: ok")


if __name__ == "__main__":
    main()
