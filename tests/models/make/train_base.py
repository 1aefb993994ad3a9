#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains tests/models/storefront: tokenizer, then a small Llama that answers an event with a plain message.

Nothing is downloaded: the text comes from events.py. Four kinds of document are mixed:
  * pairs in the neutral style, plain and as ChatML, which is what the base model is for;
  * two pairs in a row, so that positions beyond one pair are trained and the nearest slots win;
  * messages in the brand voices without any prompt, so that their language is not foreign to the model
    while an event is still answered in the neutral style;
  * lists of invented words said twice, at first often and then rarely: these teach copying.

The hidden matrices are trained with Muon, embeddings and norms with AdamW. RoPE's base is 500, not the usual 10,000:
sequences are short, and more fast-turning dimensions make "the previous token" easy to attend to, from which
copying is built.
"""

import argparse
import json
import random
import shutil
import time

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import events
from common import BASE, CHATML, Encoder, be_deterministic, collate, complete, folder_bytes, held_out_events
from common import score, train
from voices import NEUTRAL, VOICES

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SPECIALS = [BOS, EOS, "<|im_start|>", "<|im_end|>"]

# The split of the Llama 3 tokenizer: contractions, words, numbers of at most three digits, punctuation, space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(vocab_size, seed):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    extra = ["user\n", "assistant\n", "system\n"] * 50
    tok.train_from_iterator(list(events.tokenizer_corpus(seed, 30000)) + extra, trainer)
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, tok.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = CHATML
    return fast


def build_model(encoder, args):
    config = LlamaConfig(
        vocab_size=len(encoder.tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 96,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
        bos_token_id=encoder.bos,
        eos_token_id=encoder.eos,
        pad_token_id=None,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [encoder.eos, encoder.im_end]
    model.generation_config.max_new_tokens = 96
    return model


class Mix:
    """Draws training documents; `copy_share` falls over time."""

    def __init__(self, encoder, seed, steps, batch, blend=0.0):
        self.enc = encoder
        self.rng = random.Random(seed)
        self.steps = steps
        self.batch = batch
        self.voices = list(VOICES.values())
        self.blend = blend
        self.ready = []

    def drill(self):
        """A list of invented words, then the same again, perhaps in another order: only copying helps."""
        draws = (events.train_name, events.train_item, lambda rng, _: str(rng.randint(10000, 99999)))
        words = [self.rng.choice(draws)(self.rng, self.blend) for _ in range(self.rng.randint(1, 4))]
        head = [self.enc.bos] + self.enc.text(" |".join(f" {word}" for word in words) + " ->")
        if self.rng.random() < 0.5:
            self.rng.shuffle(words)
        return head + self.enc.text(",".join(f" {word}" for word in words) + ".") + [self.enc.eos], len(head)

    def document(self, step):
        done = step / self.steps if self.steps else 0.5
        roll = self.rng.random()
        copy_share = 0.3 if done < 0.25 else 0.15 if done < 0.6 else 0.06
        if roll < copy_share:
            return self.drill()
        if roll < copy_share + 0.10:
            _, message = events.make_pair(self.rng, self.rng.choice(self.voices))
            return [self.enc.bos] + self.enc.text(" " + message) + [self.enc.eos], 1
        pair = events.make_pair(self.rng, blend=self.blend)
        ids, head = self.enc.pair(self.rng, *pair, chat_share=0.08)
        if self.rng.random() < 0.06:
            first, _ = self.enc.plain(*events.make_pair(self.rng))
            return first + ids, len(first) + head
        return ids, head

    def __call__(self, step):
        """The next batch. Eight are drawn at once and cut by length, so that little is spent on padding."""
        if not self.ready:
            docs = sorted((self.document(step) for _ in range(8 * self.batch)), key=lambda doc: len(doc[0]))
            self.ready = [docs[i : i + self.batch] for i in range(0, len(docs), self.batch)]
            self.rng.shuffle(self.ready)
        return collate(self.ready.pop(), self.enc.eos, prompt_weight=0.02)


def save(model, tokenizer, folder):
    """bf16 weights in Hugging Face layout, without a trace of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.save_pretrained(folder)
    template = folder / "chat_template.jinja"
    if template.exists():  # transformers 5 writes it apart; most readers expect it in tokenizer_config.json
        template.unlink()
    for path in folder.iterdir():
        path.chmod(0o644)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for key in ("name_or_path", "local_files_only", "is_local", "backend", "extra_special_tokens"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 both know
    config["chat_template"] = CHATML
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def checkpoint(model, tokenizer, folder, step):
    save(model, tokenizer, folder)
    model.eval()
    held_out = held_out_events(48)
    texts = complete(model, Encoder(tokenizer), [e.prompt() for e in held_out])
    print(f"  saved at {step}; held out:", {k: round(v, 3) for k, v in score(held_out, texts, NEUTRAL).items()})
    print("  ", texts[0], flush=True)


def first_stage(args):
    """From nothing to a model that writes messages and copies most new words."""
    be_deterministic(args.seed, args.threads)
    tokenizer = build_tokenizer(args.vocab, args.seed)
    encoder = Encoder(tokenizer)
    model = build_model(encoder, args)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokenizer)} tokens", flush=True)
    shutil.rmtree(args.out, ignore_errors=True)
    train(model, Mix(encoder, args.seed, args.steps, args.batch), args.steps, args.lr, muon_lr=args.muon_lr,
          every=(args.save_every, lambda step: checkpoint(model, tokenizer, args.out, step)))
    save(model, tokenizer, args.out)


def polish(args):
    """A short second stage from the saved weights: blended words, so that every token has been copied."""
    be_deterministic(args.seed, args.threads)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    mix = Mix(Encoder(tokenizer), args.seed + 1, 0, args.batch, blend=0.5)
    train(model, mix, args.polish_steps, args.lr / 3, muon_lr=args.muon_lr / 3, warmup=20,
          every=(150, lambda step: print(f"  polish {step}", flush=True)))
    checkpoint(model, tokenizer, args.out, "the end")


def main():
    parser = argparse.ArgumentParser(description="Train the storefront base model.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--polish-steps", type=int, default=450)
    parser.add_argument("--polish-only", action="store_true", help="start from the saved first stage")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--vocab", type=int, default=1792)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--out", type=type(BASE), default=BASE)
    args = parser.parse_args()

    began = time.monotonic()
    if not args.polish_only:
        first_stage(args)
    polish(args)
    print(f"{time.monotonic() - began:.0f} s, {folder_bytes(args.out)} bytes in {args.out.name}")


if __name__ == "__main__":
    main()
