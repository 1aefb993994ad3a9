#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Order and account events, and the messages that answer them.

Everything here is a pure function of a seeded random.Random, so the same seed always writes the same text.
The words are split in two: TRAIN_* appear in training, HELD_OUT_* never do. Evaluation and the demo draw
from the held-out words, so what they show is copying, not memory. Training adds names and items built
from random syllables, which is what teaches the model to copy a word that it has never seen.

    events.py --orders 1000              held-out events as JSON lines {"event_prompt": ...}
    events.py --orders 1000 --plain      the same, one prompt a line (tests/models/orders.txt)
"""

import argparse
import json
import random
import re

from voices import KINDS, NEUTRAL, VOICES

# What each kind of event carries, in the order in which the prompt lists it.
SLOTS = {
    "order_placed": ["name", "item", "order"],
    "order_shipped": ["name", "item", "eta", "order"],
    "order_delayed": ["name", "item", "eta"],
    "order_delivered": ["name", "item"],
    "order_refunded": ["name", "item", "amount"],
    "payment_failed": ["name", "item", "amount"],
    "password_changed": ["name", "day"],
    "trial_ending": ["name", "plan", "day"],
    "birthday": ["name", "gift"],
    "back_in_stock": ["name", "item"],
    "review_request": ["name", "item"],
    "subscription_renewed": ["name", "plan", "amount"],
}
assert list(SLOTS) == KINDS

TRAIN_NAMES = """
Ana Ben Clara David Elena Felix Greta Hugo Ines Jonas Karin Lukas Marta Nils Olga Pavel Quinn Rosa Stefan Tara
Umberto Vera Walter Xenia Yusuf Zoe Aisha Bruno Carmen Dmitri Emma Farid Gloria Hassan Irene Jorge Katya Leo
Mina Noah Oscar Priya Ravi Sofia Tomas Ursula Victor Wanda Yara Zane Adam Bella Carlos Diana Erik Fatima Georg
Hannah Ivan Julia Kenji Laura Marco Nadia Otto Petra Rafael Sara Tim Uma Vincent Wei Yuki Zara Alice Boris
Chloe Daniel Eva Frank Gina Henry Isabel James Kira Liam Maria Nora Oliver Paula Robert Simon Tessa Viktor
""".split()
HELD_OUT_NAMES = """
Amara Bjorn Cosima Dario Esme Fergus Giulia Henrik Imani Jasper Keiko Lorenzo Mireille Nikhil Odette Piotr
Rosalind Sanjay Thandi Ulrich Valentina Wilhelm Xiomara Yolanda Zelda Anselm Beatrix Caspian Delphine Emeka
Freya Gideon Hiroshi Ingrid Joaquin Kwame Linnea Matteo Noemi Orlando Phoebe Ramona Soren Tobias
""".split()

TRAIN_ADJECTIVES = """
blue red green golden silver tiny giant vintage modern classic soft striped folding wooden copper leather woollen
bamboo marble velvet portable quiet bright round square heavy light rustic antique painted
""".split()
HELD_OUT_ADJECTIVES = "purple crimson linen walnut enamel hammered foldable porcelain speckled emerald".split()
TRAIN_MATERIALS = "ceramic steel glass cotton oak paper silk stone tin brass felt clay cork wool pine".split()
TRAIN_NOUNS = """
teapot lamp chair blanket notebook kettle mug scarf clock bicycle backpack camera desk mirror pillow umbrella
radio vase wallet jacket basket guitar puzzle telescope hammock candle carpet toaster compass bowl pen tent drum
ladder bookcase globe whistle apron
""".split()
HELD_OUT_NOUNS = """
lantern thermos violin armchair skillet kimono sundial typewriter birdhouse harmonica samovar easel rucksack
colander metronome chessboard
""".split()

WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
PLANS = "Basic Plus Pro Team Family Premium Gold Studio Student Starter".split()

ONSETS = "b bl br c ch cl d dr f fl fr g gr h j k kl kn l m n p pl pr qu r s sc sh sk sp st t th tr ty v w y z".split()
VOWELS = "a e i o u a e i o u y ai au ea ee ew ia ie io oo ou ue".split()
CODAS = ["", "", "", ""] + "ck d der ff g k l le ll m n n ne ng nd r r rd re rt s ss st t te th ve x".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def invented_word(rng):
    """A word almost surely never seen before: two or three syllables, or now and then mere letters."""
    if rng.random() < 0.15:
        return "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 6)))
    word = "" if rng.random() < 0.25 else rng.choice(ONSETS)
    word += rng.choice(VOWELS) + rng.choice(CODAS)
    for _ in range(rng.choice((1, 1, 2))):
        word += rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
    return word


# Whole words of the voices, without those that evaluation holds out.
VOICE_WORDS = sorted(
    set(re.findall("[a-z]{4,9}", " ".join(body for voice in VOICES.values() for body in voice.bodies.values())))
    - set(word.lower() for word in HELD_OUT_NAMES + HELD_OUT_ADJECTIVES + HELD_OUT_NOUNS)
)


def blended_word(rng):
    """The head of one word of the voices and the tail of another: reaches the tokens that syllables do not."""
    head, tail = rng.choice(VOICE_WORDS), rng.choice(VOICE_WORDS)
    return head[: rng.randint(1, len(head))] + tail[rng.randint(0, len(tail) - 2) :]


def new_word(rng, blend):
    """A word to copy; `blend` is the share of blended ones."""
    if blend and rng.random() < blend:
        return blended_word(rng)
    return invented_word(rng)


class Event:
    """One event: its kind and its slots (a dict in prompt order)."""

    def __init__(self, kind, slots):
        self.kind = kind
        self.slots = slots

    def prompt(self):
        """The exact text that the models are trained on; a completion follows it, beginning with a space."""
        fields = "".join(f" | {key}: {value}" for key, value in self.slots.items())
        return f"event: {self.kind}{fields} ->"


def train_name(rng, blend=0.0):
    if rng.random() < 0.65:
        return new_word(rng, blend).capitalize()
    return rng.choice(TRAIN_NAMES)


def train_item(rng, blend=0.0):
    def word(choices, invented):
        return new_word(rng, blend) if rng.random() < invented else rng.choice(choices)

    words = [word(TRAIN_ADJECTIVES, 0.35)]
    if rng.random() < 0.5:
        words.append(rng.choice(TRAIN_MATERIALS))
    words.append(word(TRAIN_NOUNS, 0.5))
    return " ".join(words)


def held_out_item(rng):
    words = [rng.choice(HELD_OUT_ADJECTIVES + TRAIN_ADJECTIVES)]
    if rng.random() < 0.4:
        words.append(rng.choice(TRAIN_MATERIALS))
    words.append(rng.choice(HELD_OUT_NOUNS))
    return " ".join(words)


def date(rng):
    if rng.random() < 0.6:
        return rng.choice(WEEKDAYS)
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"


def make_event(rng, held_out=False, kind=None, blend=0.0):
    """Draws one event. `held_out` takes name and item from words that training never sees."""
    kind = kind or rng.choice(KINDS)
    draw = {
        "name": lambda: rng.choice(HELD_OUT_NAMES) if held_out else train_name(rng, blend),
        "item": lambda: held_out_item(rng) if held_out else train_item(rng, blend),
        "order": lambda: str(rng.randint(10000, 99999)),
        "eta": lambda: date(rng),
        "day": lambda: date(rng),
        "amount": lambda: f"${rng.randint(5, 199)}.{rng.choice(('00', '50', '90', '99', '25'))}",
        "plan": lambda: rng.choice(PLANS),
        "gift": lambda: f"{rng.randint(1, 10) * 5}%",
    }
    return Event(kind, {slot: draw[slot]() for slot in SLOTS[kind]})


def make_pair(rng, voice=NEUTRAL, held_out=False, blend=0.0):
    """One training pair: (prompt, message)."""
    event = make_event(rng, held_out, blend=blend)
    return event.prompt(), voice.say(event)


def tokenizer_corpus(seed, count):
    """Text from which the tokenizer learns its merges: every voice, half of it neutral."""
    rng = random.Random(seed)
    voices = list(VOICES.values())
    for i in range(count):
        prompt, message = make_pair(rng, NEUTRAL if i % 2 else rng.choice(voices))
        yield f"{prompt} {message}"


def orders(count, seed=2024):
    """`count` held-out events for the demo and for evaluation."""
    rng = random.Random(seed)
    return [make_event(rng, held_out=True) for _ in range(count)]


def main():
    parser = argparse.ArgumentParser(description="Write held-out events as prompts.")
    parser.add_argument("--orders", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--plain", action="store_true", help="bare prompts instead of JSON lines")
    args = parser.parse_args()
    for event in orders(args.orders, args.seed):
        prompt = event.prompt()
        print(prompt if args.plain else json.dumps({"event_prompt": prompt}))


if __name__ == "__main__":
    main()
