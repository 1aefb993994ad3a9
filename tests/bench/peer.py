# SPDX-License-Identifier: Apache-2.0
"""peer.py MODEL ADAPTERS-DIR|- BATCH PROMPT TOKENS REPEAT DTYPE: transformers + PEFT, as figures.

The same work as `loramill bench`: prompts from the trace formula, greedy, end-of-sequence ignored;
prefill of one long prompt; decode of one sequence; decode of BATCH sequences, each with its own
adapter, by switching adapters between single sequences (what PEFT users do) and by PEFT's mixed
batch (`adapter_names`). Decode rates leave out the first tokens: the time of TOKENS tokens less
the time of one. One JSON line a figure; every figure is the best of REPEAT runs.
"""
import json
import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM

model_dir, adapters_dir, batch, prompt_len, tokens, repeat, dtype = sys.argv[1:]
batch, prompt_len, tokens, repeat = int(batch), int(prompt_len), int(tokens), int(repeat)
torch.set_num_threads(os.cpu_count())
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
vocab = model.config.vocab_size


def token(i, t):
    return 10 + (i * 7919 + t * 104729 + (i ^ t) * 31) % (vocab - 20)


def prompt(i, n):
    return torch.tensor([[token(i, t) for t in range(n)]])


def figure(name, value):
    print(json.dumps({"name": name, "value": value, "unit": "tokens/s"}), flush=True)


def fastest(work):
    took = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return min(took)


def decode(name, sequences, work):
    """work(n) generates n tokens of each of the sequences."""
    took = fastest(lambda: work(tokens)) - fastest(lambda: work(1))
    figure(name, sequences * (tokens - 1) / took)


@torch.inference_mode()
def generate(m, ids, n, **kw):
    return m.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0,
                      attention_mask=torch.ones_like(ids), **kw)


long = min(model.config.max_position_embeddings - 1, 512)
generate(model, prompt(0, 8), 2)
figure("prefill", long / fastest(lambda: generate(model, prompt(0, long), 1)))
decode("decode_batch1", 1, lambda n: generate(model, prompt(0, prompt_len), n))
many = torch.cat([prompt(i, prompt_len) for i in range(batch)])
decode("decode_base", batch, lambda n: generate(model, many, n))

if adapters_dir != "-":
    from peft import PeftModel

    dirs = sorted(d for d, _, f in os.walk(adapters_dir) if "adapter_config.json" in f)
    m = PeftModel.from_pretrained(model, dirs[0], adapter_name="a0").eval()
    for i, d in enumerate(dirs[1:], 1):
        m.load_adapter(d, adapter_name=f"a{i}")
    repeat = 1

    def switching(n):
        for i in range(batch):
            m.set_adapter(f"a{i % len(dirs)}")
            generate(m, prompt(i, prompt_len), n)

    decode("decode_adapters", batch, switching)
    names = [f"a{i % len(dirs)}" for i in range(batch)]
    try:
        decode("decode_adapters_mixed", batch,
               lambda n: generate(m, many, n, adapter_names=names))
    except Exception as e:      # PEFT refuses some combinations in one batch
        print(f"# mixed batch: {type(e).__name__}: {e}", file=sys.stderr)
