#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes tests/models/spm-tiny and its adapters: the other kind of files that a Llama engine meets.

Where storefront is a byte-level BPE model in one bf16 file, written as transformers 5 writes it, this one has
  * a SentencePiece BPE tokenizer with byte fallback, converted the way Llama 2's was: every split of a piece into
    two pieces is a merge, merges are strings, there is no pre-tokenizer;
  * a Mistral configuration (sliding window, untied head) with the key names of transformers 4;
  * float16 weights in several shards with an index.
It is trained for a moment only: enough for its logits to have clear winners, not for its prose.
"""

import argparse
import io
import json
import random
import shutil
import warnings

import sentencepiece
import torch
from peft import LoraConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

import events
from common import MODELS, be_deterministic, collate, folder_bytes, train
from train_adapters import ATTENTION, F16, F32, MLP, Spec, clean
from voices import NEUTRAL, VOICES

MODEL = MODELS / "spm-tiny"
ADAPTERS = MODELS / "spm-tiny-adapters"

# Llama 2's chat format, said our way: system text goes inside the first instruction.
LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% set content = system + message['content'] if loop.index0 == 0 else message['content'] %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)

TINY_SPECS = {
    "captain-sal": Spec(4, 8, ["q_proj", "v_proj"], F32),
    "nordwind-terse": Spec(6, 12, ATTENTION + MLP, F16, use_rslora=True, rank_pattern={"down_proj": 3}),
}


def corpus(seed, count):
    rng = random.Random(seed)
    styles = [NEUTRAL] + list(VOICES.values())
    return [" ".join(events.make_pair(rng, rng.choice(styles))) for _ in range(count)]


def train_pieces(seed, vocab_size):
    """Returns SentencePiece's pieces in id order, with their scores."""
    blob = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(seed, 8000)),
        model_writer=blob,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.999,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=blob.getvalue())
    return [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.get_piece_size())]


def merges_of(pieces):
    """Every pair of pieces that joins to a piece, best piece first; ties keep the order of the left halves."""
    vocab = {piece: index for index, (piece, _) in enumerate(pieces)}
    merges = []
    for piece, score in pieces[259:]:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [(a, b) for a, b in splits if a in vocab and b in vocab]
        merges += [(score, a, b) for a, b in sorted(splits, key=lambda ab: (vocab[ab[0]], vocab[ab[1]]))]
    merges.sort(key=lambda merge: -merge[0])
    return [f"{a} {b}" for _, a, b in merges]


def tokenizer_json(pieces):
    """The tokenizer.json that converting such a SentencePiece model for Llama 2 gives."""
    special = [
        {"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, c in enumerate(("<unk>", "<s>", "</s>"))
    ]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                bos,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: index for index, (piece, _) in enumerate(pieces)},
            "merges": merges_of(pieces),
        },
    }


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def build_config(vocab_size):
    return MistralConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=48,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.08,
    )


def batches_of(tokenizer, seed, styles, batch=8):
    rng = random.Random(seed)

    def draw(_):
        texts = [" ".join(events.make_pair(rng, rng.choice(styles))) for _ in range(batch)]
        docs = [(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id], 1) for text in texts]
        return collate(docs, tokenizer.eos_token_id, prompt_weight=0.0)

    return draw


def as_version_4(path):
    """Renames the keys that transformers 5 renamed, so that files of both generations are covered."""
    config = json.loads(path.read_text())
    config.pop("transformers_version")
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    write_json(path, dict(sorted(config.items())))


def main():
    parser = argparse.ArgumentParser(description="Make spm-tiny and its adapters.")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)

    be_deterministic(args.seed, args.threads)
    shutil.rmtree(MODEL, ignore_errors=True)
    shutil.rmtree(ADAPTERS, ignore_errors=True)
    MODEL.mkdir()
    pieces = train_pieces(args.seed, 768)
    write_json(MODEL / "tokenizer.json", tokenizer_json(pieces))
    write_json(
        MODEL / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "chat_template": LLAMA2_CHAT,
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "model_max_length": 512,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
        },
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)

    model = MistralForCausalLM(build_config(len(pieces)))
    train(model, batches_of(tokenizer, args.seed, [NEUTRAL]), args.steps, lr=4e-3)
    model.half().save_pretrained(MODEL, max_shard_size="150KB")
    as_version_4(MODEL / "config.json")
    for path in MODEL.iterdir():
        path.chmod(0o644)

    for ident, spec in TINY_SPECS.items():
        be_deterministic(args.seed, args.threads)
        base = MistralForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **spec.config))
        train(tuned, batches_of(tokenizer, args.seed, [VOICES[ident]]), args.steps // 3, lr=4e-3, warmup=10)
        tuned.save_pretrained(ADAPTERS / ident)
        clean(ADAPTERS / ident, spec, base_name="spm-tiny")
    print(f"{folder_bytes(MODEL)} bytes in {MODEL.name}, {folder_bytes(ADAPTERS)} in {ADAPTERS.name}")


if __name__ == "__main__":
    main()
