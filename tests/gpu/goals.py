#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""goals.py RESULTS.jsonl FIRST_LINE [full]: holds a run's figures against their goals.

Reads the figures that gpu-check.sh and its programs left from FIRST_LINE (0: the first) on, prints
a line for each goal that has a figure, and appends each trace's floor to the file. The goals are for
one H200. Those that are ratios of figures of one run (shares of bandwidth, taxes) hold on any card;
those in milliseconds, requests a second and seconds to the first token are judged on an H200 only,
elsewhere told. With "full" a goal without a figure is a miss, too, on an H200. A trace that did not
complete every request is no missed goal but a failure.

    ok - NAME: VALUE (at-least|at-most GOAL)
    MISSED NAME VALUE GOAL
    # NAME: VALUE, goal of an H200: GOAL, not judged on this card

Exit status: 0 all reached, 1 a failure, 3 goals missed and nothing else. Standard library only.
"""
import json
import re
import sys

# hidden, feed-forward, layers, heads, kv heads, vocabulary: ops/shapes
SHAPES = {
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256),
}

# trace, adapters, ranks: requests/s on an H200, share of its own base
TRACES = {
    ("llama-2-7b", 0, "8"): (36, None),
    ("llama-2-7b", 32, "8"): (33, None),
    ("llama-2-7b", 100, "8"): (33, 0.92),
    ("llama-2-7b", 100, "8,16,32,64"): (31, 0.86),
    ("llama-2-7b", 1000, "8,16,32,64"): (27, 0.75),
    ("llama-3.1-8b", 0, "8"): (53, None),
    ("llama-3.1-8b", 32, "8"): (48, None),
    ("llama-3.1-8b", 100, "8"): (48, None),
}
PEFT = {32: (0.26, 120), 100: (0.12, 250)}      # transformers + PEFT, requests/s on an H200; goal

# Floor of a trace at 256 running: seconds of prefill and of decode's GEMMs, on an H200 and on an
# H100, and bytes of K and V that are read. An H200's whole floor is given: 23.7 and 14.9 s.
FLOORS = {"llama-2-7b": (23.7, 4.2 + 6.1, 56e12), "llama-3.1-8b": (14.9, 4.5 + 7.7, 14e12)}


def weight_bytes(shape):
    """Bytes of bf16 weights that a step reads: all but the embedding table."""
    hidden, ffn, layers, heads, kv, vocab = SHAPES[shape]
    head = hidden // heads
    layer = hidden * hidden * 2 + 2 * hidden * kv * head + 3 * hidden * ffn
    return 2 * (layers * layer + vocab * hidden)


def adapter_bytes(shape, ranks):
    """Mean bytes of an adapter on q, k, v and o."""
    hidden, _, layers, heads, kv, _ = SHAPES[shape]
    both_ways = 2 * (hidden + hidden) + 2 * (hidden + kv * hidden // heads)
    ranks = [int(r) for r in ranks.split(",")]
    return 2 * both_ways * layers * sum(ranks) / len(ranks)


class Run:
    def __init__(self, path, first, full):
        with open(path, encoding="utf-8") as f:
            self.lines = [json.loads(text) for text in f.readlines()[first:] if text.strip()]
        self.path, self.full = path, full
        self.missed, self.failures, self.met = [], 0, 0
        self.device = next((d["device"] for d in self.lines if "device" in d), "an unknown card")
        self.h200 = "H200" in self.device
        ceilings = [d["value"] for d in self.named("ceiling: ") if d["unit"] == "GB/s"]
        self.bandwidth = max(ceilings, default=0) * 1e9

    def named(self, start):
        return [d for d in self.lines if str(d.get("name", "")).startswith(start)]

    def value(self, run, name):
        found = [d["value"] for d in self.lines
                 if d.get("run") == run and d.get("name") == name]
        return found[-1] if found else None

    def figure(self, name, value, unit, **more):
        d = {"run": "goals", "name": name, "value": round(value, 4), "unit": unit, **more}
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(d) + "\n")
        rest = ", ".join(f"{k} {v}" for k, v in more.items())
        print(f"# {name}: {value:.4g} {unit}{', ' + rest if rest else ''}")

    def judge(self, name, value, how, goal, unit="", absolute=False):
        """One goal; `absolute`: on an H200 only."""
        unit = f" {unit}" if unit else ""
        if value is None:
            if self.full and self.h200:
                self.missed.append(name)
                print(f"MISSED {name} (no figure) {goal:g}{unit}")
            elif self.full:
                print(f"# {name}: no figure; goal: {goal:g}{unit}")
            return
        if absolute and not self.h200:
            print(f"# {name}: {value:.4g}{unit}, goal of an H200: {goal:g}, not judged on this card")
        elif value >= goal if how == "at-least" else value <= goal:
            self.met += 1
            print(f"ok - {name}: {value:.4g}{unit} ({how} {goal:g})")
        else:
            self.missed.append(name)
            print(f"MISSED {name} {value:.4g}{unit} {goal:g}")

    def operations(self):
        """Shares of this card's ceilings."""
        for kind in ("attention decode", "attention prefill, ", "lora_shrink ", "lora_expand "):
            if not self.named(kind):
                self.judge(kind.strip(" ,") + ", shares", None, "at-least", 1)
        for d in self.named("attention decode"):
            if d["mb"] >= 128:
                self.judge(d["name"] + ", share", d["share"], "at-least", 0.85)
        for d in self.named("attention prefill, "):     # in bf16
            if re.match(r"attention prefill, \d+ x 2048 of ", d["name"]):
                self.judge(d["name"] + ", share of the GEMM's rate", d["share"], "at-least", 0.5)
        for d in self.named("lora_shrink ") + self.named("lora_expand "):
            if "prefill" in d["name"]:
                continue
            if d["mb"] >= 64:
                self.judge(d["name"] + ", share", d["share"], "at-least", 0.7)
            else:
                self.judge(d["name"] + ", time allowed / taken", d["goal"], "at-least", 1)

    def steps(self):
        shape = "llama-2-7b"
        one = self.value(f"decode {shape}, batch 32", "decode_batch1_step")
        if one is not None and self.bandwidth:
            one /= weight_bytes(shape) / self.bandwidth * 1e3
        elif one is not None:
            print("# this run has not measured the card's bandwidth: batch 1 cannot be held to it")
            one = None
        self.judge(f"decode {shape}, batch 1, x weight bytes / bandwidth", one, "at-most", 1.2)
        self.judge(f"decode {shape}, batch 256",
                   self.value(f"decode {shape}, batch 256", "decode_base_step"), "at-most", 10, "ms",
                   absolute=True)
        name = "decode llama-3.1-8b, batch 32, 32 adapters"
        self.judge(name, self.value(name, "decode_adapters_step"), "at-most", 5.3, "ms",
                   absolute=True)
        self.judge("speed of an adapter-free batch beside 100 adapters",
                   self.value("idle adapters, llama-2-7b", "idle_adapters"), "at-least", 0.99)

    def starts(self):
        for shape in SHAPES:
            if shape == "llama-2-7b" or self.value(f"first token, {shape}", "start_to_first_token"):
                self.judge(f"first token, {shape}, made-up weights",
                           self.value(f"first token, {shape}", "start_to_first_token"), "at-most", 5,
                           "s", absolute=True)
        disk = self.value("load llama-2-7b from the disk", "first_token_over_reading")
        if disk is None and self.full:
            print("# load llama-2-7b from the disk: not measured on this machine")
        elif disk is not None:
            self.judge("load llama-2-7b from the disk, x reading its bytes", disk, "at-most", 1.3)
        cached = self.value("load llama-2-7b from the page cache", "first_token_over_reading")
        if cached is not None:
            print(f"# load llama-2-7b from the page cache: {cached:.3g} x reading its bytes, "
                  "the goal is for a disk")

    def complete(self, d):
        good = d["completed"] == d["requests"] and d["failed"] == 0 and d["late"] == 0
        if not good:
            self.failures += 1
            print(f"not ok - {d['run']}: {d['completed']} of {d['requests']} completed, "
                  f"{d['failed']} failed, {d['late']} late")

    def floor(self, d, shape, n, ranks):
        """A trace beside its floor, and that with the adapters' own bytes."""
        whole, rest, kv = FLOORS[shape]
        if not self.h200 and not self.bandwidth:
            return
        floor = whole if self.h200 else rest + kv / self.bandwidth
        more = {"floor_s": round(floor, 2)}
        if n and self.bandwidth:
            moved = d["steps"] * d["adapters_per_step"] * adapter_bytes(shape, ranks)
            more["adapters_tb"] = round(moved / 1e12, 3)
            more["floor_with_adapters_s"] = round(floor + moved / self.bandwidth, 2)
            more["of_that"] = round((floor + moved / self.bandwidth) / d["seconds"], 3)
        self.figure(d["run"] + ", of the floor", floor / d["seconds"], "x", **more)

    def traces(self):
        runs = {d["run"]: d for d in self.lines if str(d.get("run", "")).startswith("trace ")}
        for d in runs.values():
            self.complete(d)
        for (shape, n, ranks), (goal, tax) in TRACES.items():
            name = f"trace {shape}, {n} adapters of rank {ranks}"
            d, base = runs.get(name), runs.get(f"trace {shape}, 0 adapters of rank 8")
            rate = d["requests_per_s"] if d else None
            self.judge(name, rate, "at-least", goal, "requests/s", absolute=True)
            if tax:
                both = d is not None and base is not None
                self.judge(name + ", of its base", rate / base["requests_per_s"] if both else None,
                           "at-least", tax)
            if d:
                self.floor(d, shape, n, ranks)
            if shape == "llama-2-7b" and ranks == "8" and n in PEFT and self.h200:
                peer, times = PEFT[n]
                self.judge(name + ", x transformers + PEFT", rate / peer if d else None, "at-least",
                           times)

    def time(self):
        for d in self.lines:
            if d.get("run") != "gpu-check":
                continue
            if str(d["name"]).startswith("seconds_"):
                part = d["name"][len("seconds_"):]
                self.judge(f"seconds that PART={part} takes", d["value"], "at-most", d["goal"])
            elif d["name"] == "left_out" and self.h200:
                self.missed.append(f"left out: {d['what']}")
                print(f"MISSED left out for want of time: {d['what']}")

    def verdict(self):
        self.operations()
        self.steps()
        self.starts()
        self.traces()
        self.time()
        print(f"# on {self.device}: {self.met} goals reached, {len(self.missed)} missed, "
              f"{self.failures} traces incomplete")
        if self.missed:
            print(f"{len(self.missed)} goals missed: " + "; ".join(self.missed))
        return 1 if self.failures else 3 if self.missed else 0


if __name__ == "__main__":
    sys.exit(Run(sys.argv[1], int(sys.argv[2]), "full" in sys.argv[3:]).verdict())
