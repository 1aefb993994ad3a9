# SPDX-License-Identifier: Apache-2.0
"""What the training scripts share: determinism, paths, batching, the loop, evaluation."""

import math
import os
import random
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from events import make_event

MODELS = Path(__file__).resolve().parent.parent
BASE = MODELS / "storefront"
ADAPTERS = MODELS / "storefront-adapters"

IGNORE = -100
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def be_deterministic(seed, threads):
    """Same seed, thread count and library versions: same weights, bit for bit, on the same kind of CPU."""
    random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads)


class Encoder:
    """Turns (prompt, message) pairs into token ids, plain or as a ChatML conversation."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos_token_id
        self.eos = tokenizer.eos_token_id
        self.im_start = tokenizer.convert_tokens_to_ids("<|im_start|>")
        self.im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def text(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, prompt):
        return [self.bos] + self.text(prompt)

    def plain(self, prompt, message):
        """Returns (ids, number of leading ids that are the prompt)."""
        head = self.prompt(prompt)
        return head + self.text(" " + message) + [self.eos], len(head)

    def chat(self, prompt, message):
        head = [self.im_start] + self.text("user\n" + prompt) + [self.im_end] + self.text("\n")
        head += [self.im_start] + self.text("assistant\n")
        return head + self.text(message) + [self.im_end], len(head)

    def pair(self, rng, prompt, message, chat_share):
        return self.chat(prompt, message) if rng.random() < chat_share else self.plain(prompt, message)


def collate(docs, pad, prompt_weight):
    """Right-pads docs (ids, head) to one batch; labels and per-token weights are aligned with the ids."""
    width = max(len(ids) for ids, _ in docs)
    ids = torch.full((len(docs), width), pad)
    labels = torch.full((len(docs), width), IGNORE)
    weights = torch.zeros((len(docs), width))
    for row, (doc, head) in enumerate(docs):
        n = len(doc)
        ids[row, :n] = labels[row, :n] = torch.tensor(doc)
        weights[row, :head] = prompt_weight
        weights[row, head:n] = 1.0
    return ids, labels, weights


def weighted_loss(logits, labels, weights):
    """Next-token cross entropy; a doc's prompt counts for less than its message."""
    logits, labels, weights = logits[:, :-1], labels[:, 1:], weights[:, 1:]
    keep = weights.reshape(-1) > 0
    losses = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1])[keep].float(), labels.reshape(-1)[keep], reduction="none"
    )
    weights = weights.reshape(-1)[keep]
    return (losses * weights).sum() / weights.sum()


def schedule(step, steps, warmup=50, floor=0.03):
    """Linear warm-up, then cosine down to `floor` of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimizers(model, lr, muon_lr, weight_decay):
    """AdamW for everything, or for embeddings and norms only when the matrices go to Muon."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if muon_lr and p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    opts = [(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay), lr)]
    if matrices:
        opts.append((torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay), muon_lr))
    return opts


def train(model, batches, steps, lr, muon_lr=None, weight_decay=0.01, log_every=50, warmup=50, every=None):
    """Runs `steps` over `batches` (a function step -> batch). `every` = (n, callback(step))."""
    params = [p for p in model.parameters() if p.requires_grad]
    device = params[0].device
    opts = optimizers(model, lr, muon_lr, weight_decay)
    model.train()
    began = time.monotonic()
    mean = None
    for step in range(steps):
        for opt, peak in opts:
            opt.zero_grad(set_to_none=True)
            for group in opt.param_groups:
                group["lr"] = peak * schedule(step, steps, warmup)
        ids, labels, weights = (tensor.to(device) for tensor in batches(step))
        loss = weighted_loss(model(input_ids=ids).logits, labels, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for opt, _ in opts:
            opt.step()
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if log_every and (step + 1) % log_every == 0:
            print(f"step {step + 1}/{steps} loss {mean:.4f} {time.monotonic() - began:.0f} s", flush=True)
        if every and (step + 1) % every[0] == 0:
            every[1](step + 1)
            model.train()
    model.eval()
    return mean


@torch.no_grad()
def complete(model, encoder, prompts, max_new_tokens=96, chat=False):
    """Greedy completions of a list of prompts, left-padded in one batch."""
    if chat:
        heads = [encoder.chat(p, "")[0][:-1] for p in prompts]
    else:
        heads = [encoder.prompt(p) for p in prompts]
    width = max(map(len, heads))
    ids = torch.tensor([[encoder.eos] * (width - len(h)) + h for h in heads])
    mask = torch.tensor([[0] * (width - len(h)) + [1] * len(h) for h in heads])
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=[encoder.eos, encoder.im_end],
        pad_token_id=encoder.eos,
    )
    return [encoder.tokenizer.decode(row[width:], skip_special_tokens=True).strip() for row in out]


def score(events, texts, voice):
    """Shares of messages that copy each slot the voice uses, and that equal the template exactly."""
    hits, wanted = {}, {}
    for event, text in zip(events, texts):
        target = voice.say(event)
        for slot, value in event.slots.items():
            if value in target:
                wanted[slot] = wanted.get(slot, 0) + 1
                hits[slot] = hits.get(slot, 0) + (value in text)
        wanted["exact"] = wanted.get("exact", 0) + 1
        hits["exact"] = hits.get("exact", 0) + (text == target)
    return {slot: hits[slot] / wanted[slot] for slot in wanted}


def held_out_events(count, seed=77):
    rng = random.Random(seed)
    return [make_event(rng, held_out=True) for _ in range(count)]


def folder_bytes(path):
    return sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file())
