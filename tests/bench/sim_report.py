#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""sim_report.py [--jobs N] [PART...]: what each idea of the engine buys, on the simulated device.

Writes traces (make_traces.py, so numpy is needed), replays them with S-LoRA's own policy
(tests/bench/slora.c) and with ours (`loramill bench`), and writes docs/policies.md with its plots in
docs/figures. Build first: make && make build/tests/bench/slora. Parts: fit, table3, saturated, sweep,
rate, ablation, backlog, abort, skew, preempt, merge, large, million; default all, which takes some minutes.

Every run's JSON is kept in build/sim-report; a part that is not named takes its runs from there.
"""
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import make_traces

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.path.join(TOP, "build")
OUT = os.path.join(BUILD, "sim-report")
FIGURES = os.path.join(TOP, "docs", "figures")

# Hardware of the paper's runs: device, shape, cells of S-LoRA's pool (bytes: 2 * L * H * 2 each).
HARDWARE = {
    "a10g": ("a10g", "llama-7b", 14500), "a100-80-7b": ("a100-80", "llama-7b", 125000),
    "a100-80-13b": ("a100-80", "llama-13b", 65000), "a100-40": ("a100-40", "llama-13b", 14000),
}
CELL = {"llama-7b": 32 * 4096 * 4, "llama-13b": 40 * 5120 * 4}

# trace: (hardware, requests/s, mean latency s, mean first token s, attainment), from the results
# that S-LoRA's authors committed (benchmarks/paper; github.com/S-LoRA/S-LoRA at c1ddf48).
PUBLISHED = {
    "table3-s1-n5": ("a100-80-7b", 8.046, 20.8, .60, 1.000),
    "table3-s1-n100": ("a100-80-7b", 7.992, 21.6, .62, 1.000),
    "table3-s1-n1000": ("a100-80-7b", 7.641, 25.9, 1.90, .921),
    "table3-s1-n2000": ("a100-80-7b", 7.607, 26.2, 2.02, .899),
    "table3-s2-n5": ("a100-80-7b", 7.485, 29.1, 2.66, .765),
    "table3-s2-n100": ("a100-80-7b", 7.290, 30.7, 4.21, .650),
    "table3-s2-n1000": ("a100-80-7b", 6.693, 38.1, 10.54, .469),
    "table3-s2-n2000": ("a100-80-7b", 6.727, 37.9, 10.65, .448),
    "table3-s4-n2": ("a100-80-13b", 4.491, 80.0, 50.5, .177),
    "table3-s4-n5": ("a100-80-13b", 4.430, 82.2, 54.8, .133),
    "table3-s4-n100": ("a100-80-13b", 4.283, 84.7, 58.6, .137),
    "table3-s4-n1000": ("a100-80-13b", 3.903, 98.1, 72.1, .123),
    "a100-80-s2-n0": ("a100-80-7b", 9.641, 22.2, .92, 1.000),
    "a100-80-s4-n0": ("a100-80-13b", 5.586, 25.2, 2.85, .846),
    "a100-80-s4-r1": ("a100-80-13b", .942, 15.3, .36, 1.000),
    "a100-80-s4-r2": ("a100-80-13b", 1.838, 17.2, .50, 1.000),
    "a100-80-s4-r4": ("a100-80-13b", 3.539, 23.0, .74, 1.000),
    "a100-80-s4-r6": ("a100-80-13b", 4.012, 86.3, 60.0, .102),
    "a100-80-s4-r8": ("a100-80-13b", 4.017, 163.2, 136.5, .059),
    "a10g-s1-n1": ("a10g", 1.831, 18.1, 3.36, .715),
    "a10g-s1-n20": ("a10g", 1.812, 19.0, 4.33, .612),
    "a10g-s1-n200": ("a10g", 1.775, 21.1, 6.29, .503),
    "a10g-s2-n1": ("a10g", 1.744, 24.2, 8.16, .493),
    "a10g-s2-n20": ("a10g", 1.680, 28.6, 13.41, .445),
    "a10g-s2-n200": ("a10g", 1.576, 38.8, 23.58, .272),
    "a10g-s2-r1": ("a10g", .961, 12.2, .32, 1.000),
    "a10g-s2-r1.5": ("a10g", 1.364, 15.5, 1.17, .978),
    "a10g-s2-r2": ("a10g", 1.575, 38.9, 23.63, .272),
    "a10g-s2-r2.5": ("a10g", 1.536, 102.9, 87.41, .055),
    "merge-n5": ("a10g", 1.421, None, None, None),
    "a100-40-s4-n1": ("a100-40", 1.671, 28.7, 12.25, .452),
    "a100-40-s4-n20": ("a100-40", 1.523, 43.1, 27.22, .240),
    "a100-40-s4-n200": ("a100-40", 1.408, 58.7, 42.98, .118),
}

# Attainment within 6 s by cv 1, 2, 4, 6, 8: their FCFS, their early abort.
ABORT = {
    "a10g-s1": ("a10g", (.517, .477, .562, .518, .480), (.942, .898, .815, .758, .743)),
    "a10g-s2": ("a10g", (.270, .263, .433, .408, .315), (.858, .817, .743, .690, .637)),
    "a100-80-s4": ("a100-80-13b", (.101, .101, .099, .279, .136),
                   (.719, .719, .685, .660, .562)),
}
CVS = (1, 2, 4, 6, 8)


# ---- running -----------------------------------------------------------------------------------

class Runs:
    """Runs commands side by side, each once; results by name."""

    def __init__(self, jobs, fresh):
        self.pool, self.futures, self.fresh = ThreadPoolExecutor(jobs), {}, fresh

    def _run(self, name, argv):
        path = os.path.join(OUT, name + ".json")
        if os.path.exists(path) and name.split("/")[0] not in self.fresh:
            with open(path) as f:
                return json.load(f)
        done = subprocess.run(argv, cwd=TOP, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(argv)}\n{done.stderr}")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as f:
            f.write(done.stdout)
        return json.loads(done.stdout)

    def start(self, name, argv):
        self.futures[name] = self.pool.submit(self._run, name, argv)

    def __getitem__(self, name):
        return self.futures[name].result()


def trace(name):
    path = os.path.join(OUT, "traces", name + ".csv")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        make_traces.write(path, make_traces.traces()[name]())
    return path


def theirs(hardware, name, *more):
    device, shape, cells = HARDWARE[hardware]
    return [f"{BUILD}/tests/bench/slora", "--sim", f"ops/devices/{device}.json", "--shape",
            f"ops/shapes/{shape}.json", "--cells", str(cells), "--trace", trace(name), *more]


def ours(hardware, name, *more, device=None):
    """On the same prices and with the same bytes for KV cache and adapters."""
    own, shape, cells = HARDWARE[hardware]
    return [f"{BUILD}/loramill", "bench", "--json", "--sim", f"ops/devices/{device or own}.json",
            "--shape", f"ops/shapes/{shape}.json", "--pool-bytes", str(cells * CELL[shape]),
            "--max-seqs", "512", "--max-step-tokens", "2048", "--trace", trace(name), *more]


# ---- plots -------------------------------------------------------------------------------------

COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7d5ba6", "#888888", "#b8860b")


def nice(top):
    step = 10 ** math.floor(math.log10(top)) if top > 0 else 1
    for m in (0.2, 0.5, 1, 2):
        if top / (step * m) <= 6:
            return step * m
    return step * 2


class Plot:
    """A small line or bar chart as SVG: no library, the same bytes for the same figures."""
    W, H, L, B, T = 560, 300, 58, 46, 30

    def __init__(self, title, xlabel, ylabel, xs, top):
        self.xs, self.top = xs, top * 1.08 or 1
        self.body = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.W} {self.H + 40}" '
            f'font-family="sans-serif" font-size="11">',
            f'<rect width="{self.W}" height="{self.H + 40}" fill="white"/>',
            f'<text x="{self.W / 2}" y="18" text-anchor="middle" font-size="13">{title}</text>',
            f'<text x="{(self.L + self.W) / 2}" y="{self.H - 6}" text-anchor="middle">{xlabel}</text>',
            f'<text transform="translate(14 {self.H / 2}) rotate(-90)" text-anchor="middle">'
            f'{ylabel}</text>']
        step = nice(self.top)
        for k in range(int(self.top / step) + 1):
            y = self.y(k * step)
            self.body.append(f'<line x1="{self.L}" x2="{self.W - 12}" y1="{y:.1f}" y2="{y:.1f}" '
                             f'stroke="#ddd"/><text x="{self.L - 6}" y="{y + 4:.1f}" '
                             f'text-anchor="end">{k * step:g}</text>')
        for i, x in enumerate(xs):
            self.body.append(f'<text x="{self.x(i):.1f}" y="{self.H - self.B + 16}" '
                             f'text-anchor="middle">{x}</text>')
        self.n = 0

    def x(self, i):
        return self.L + (i + .5) * (self.W - 12 - self.L) / len(self.xs)

    def y(self, v):
        return self.H - self.B - v / self.top * (self.H - self.B - self.T)

    def legend(self, label, colour):
        x = 10 + (self.n % 3) * 184
        y = self.H + 10 + self.n // 3 * 15
        self.body.append(f'<rect x="{x}" y="{y - 8}" width="10" height="10" fill="{colour}"/>'
                         f'<text x="{x + 14}" y="{y + 1}">{label}</text>')
        self.n += 1

    def line(self, label, ys, dashed=False):
        colour = COLOURS[self.n % len(COLOURS)]
        at = [(self.x(i), self.y(v)) for i, v in enumerate(ys) if v is not None]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.body.append(f'<polyline points="{points}" fill="none" stroke="{colour}" '
                         f'stroke-width="2"{dash}/>')
        self.body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at]
        self.legend(label, colour)

    def bars(self, ys):
        w = (self.W - 12 - self.L) / len(self.xs) * .6
        for i, v in enumerate(ys):
            self.body.append(
                f'<rect x="{self.x(i) - w / 2:.1f}" y="{self.y(v):.1f}" width="{w:.1f}" '
                f'height="{self.y(0) - self.y(v):.1f}" fill="{COLOURS[0] if i == 0 else COLOURS[4]}"/>'
                f'<text x="{self.x(i):.1f}" y="{self.y(v) - 4:.1f}" text-anchor="middle">{v:.3g}</text>')

    def save(self, name):
        os.makedirs(FIGURES, exist_ok=True)
        with open(os.path.join(FIGURES, name + ".svg"), "w") as f:
            f.write("\n".join(self.body) + "\n</svg>\n")
        return f"![{name}](figures/{name}.svg)\n"


def table(head, rows):
    out = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join(out + ["| " + " | ".join(str(c) for c in r) + " |" for r in rows]) + "\n"


def percent(x):
    return f"{100 * x:.1f} %"


# ---- parts: each starts its runs, then tells ---------------------------------------------------

def fit(runs):
    for name, (hw, *_) in PUBLISHED.items():
        runs.start(f"fit/{name}", theirs(hw, name))
    yield
    rows, worst = [], {}
    for name, (hw, thr, lat, ttft, att) in PUBLISHED.items():
        r = runs[f"fit/{name}"]
        err = r["requests_per_s"] / thr - 1
        worst.setdefault(hw, []).append(err)
        rows.append((name, thr, f"{r['requests_per_s']:.3f}", f"{100 * err:+.1f} %", lat or "–",
                     f"{r['latency_s']:.1f}", ttft or "–", f"{r['ttft_s']:.2f}",
                     "–" if att is None else att, f"{r['attainment']:.3f}"))
    yield ("## How well the devices are calibrated\n\n"
           "S-LoRA's own policy (`tests/bench/slora.c`) on the simulated devices against the results "
           "that its authors published. Few parameters a device are fitted (launch, sequence and PCIe "
           "costs, attention, LoRA gather); the rest is the data sheet.\n\n"
           + table(("trace", "requests/s, published", "simulated", "error", "latency s", "sim.",
                    "first token s", "sim.", "attainment", "sim."), rows)
           + "\nWorst error in throughput: "
           + ", ".join(f"{hw} {percent(max(map(abs, e)))}" for hw, e in worst.items()) + ".\n")


def kv_tokens(name):
    """Tokens that a running sequence of this trace holds on average, over its decode steps."""
    with open(trace(name)) as f:
        lengths = [tuple(map(int, line.split(",")[4:6])) for line in f.readlines()[1:]]
    return sum(o * (p + o / 2) for p, o in lengths) / sum(o for _, o in lengths)


def start_floor(runs, name, hardware, five, r):
    """What n = 5 does with the pool that this run's adapters leave, if their own bytes are all that
    they cost: a sequence needs its KV cache and, of adapters, its share of those in its step.
    Lengths and arrivals are the same for every n."""
    device, shape, cells = HARDWARE[hardware]
    kv = kv_tokens(five) * CELL[shape]
    adapter = r["adapter_gb"] * 1e9 / max(r["adapter_loads"], 1)
    share = adapter * r["adapters_per_step"] / r["seqs_per_step"]
    argv = ours(hardware, five)
    argv[argv.index("--pool-bytes") + 1] = str(int(cells * CELL[shape] * kv / (kv + share)))
    runs.start(name, argv)


TABLE3 = {"s1": ("a100-80-7b", (5, 100, 1000, 2000)), "s2": ("a100-80-7b", (5, 100, 1000, 2000)),
          "s4": ("a100-80-13b", (5, 100, 1000, 2000))}


def table3_row(runs, s, n, ns):
    name = f"table3-{s}-n{n}"
    p = PUBLISHED.get(name, (None, "–", None, "–", None))
    a, b, c = (runs[f"table3/{who}-{name}"] for who in ("slora", "ours", "own"))
    first = runs[f"table3/ours-table3-{s}-n{ns[0]}"]["requests_per_s"]
    floor = runs[f"table3/floor-{name}"]["requests_per_s"]
    return (s.upper(), n, p[1], f"{a['requests_per_s']:.2f}", f"{b['requests_per_s']:.2f}",
            percent(b["requests_per_s"] / first), percent(b["requests_per_s"] / floor),
            p[3], f"{a['ttft_s']:.2f}", f"{b['ttft_s']['mean']:.2f}", f"{b['ttft_s']['p99']:.2f}",
            f"{b['token_ms']['mean']:.0f}", f"{c['requests_per_s']:.2f}",
            f"{c['ttft_s']['p99']:.2f}")


def table3(runs):
    for s, (hw, ns) in TABLE3.items():
        for n in ns:
            name = f"table3-{s}-n{n}"
            runs.start(f"table3/slora-{name}", theirs(hw, name))
            runs.start(f"table3/ours-{name}", ours(hw, name))
            runs.start(f"table3/own-{name}", ours(hw, name, device=HARDWARE[hw][0] + "-own"))
    yield
    for s, (hw, ns) in TABLE3.items():
        for n in ns:
            start_floor(runs, f"table3/floor-table3-{s}-n{n}", hw, f"table3-{s}-n5",
                        runs[f"table3/ours-table3-{s}-n{n}"])
    rows = [table3_row(runs, s, n, ns) for s, (_, ns) in TABLE3.items() for n in ns]
    ns = TABLE3["s2"][1]
    plot = Plot("A100-80, 7B, setting S2, 10 requests/s", "adapters",
                "seconds to the first token, mean", ns,
                max(PUBLISHED[f"table3-s2-n{n}"][3] for n in ns))
    plot.line("S-LoRA, published", [PUBLISHED[f"table3-s2-n{n}"][3] for n in ns], True)
    plot.line("S-LoRA, simulated", [runs[f"table3/slora-table3-s2-n{n}"]["ttft_s"] for n in ns])
    plot.line("loramill, same prices",
              [runs[f"table3/ours-table3-s2-n{n}"]["ttft_s"]["mean"] for n in ns])
    yield ("## The paper's Table 3: 10 requests/s on an A100-80\n\n"
           "Ours pays the same prices for every launch, sequence and byte, S-LoRA's Python included, "
           "so the difference is policy. S1 and S2 can be served at this rate; S4 (13B) can't: there "
           "the floor says what is left when the adapters' own bytes have their room (next section). "
           "The last two columns take what our engine asks of a host (`a100-80-own.json`, an "
           "estimate).\n\n"
           + table(("setting", "n", "S-LoRA, published", "S-LoRA, sim.", "ours", "of n = 5",
                    "of the floor", "first token s, published", "S-LoRA, sim.", "ours", "P99",
                    "ours, ms a token", "own host costs", "P99 first token s"), rows)
           + "\n" + plot.save("table3-s2"))


SWEEPS = {
    "a10g-s1": ("a10g", (1, 20, 50, 100, 200), (1.831, 1.812, 1.788, 1.781, 1.775)),
    "a10g-s2": ("a10g", (1, 20, 50, 100, 200), (1.744, 1.680, 1.606, 1.593, 1.576)),
    "a100-80-s4": ("a100-80-13b", (1, 100, 200, 400, 1000), (4.429, 4.301, 4.172, 4.056, 3.960)),
    "a100-40-s4": ("a100-40", (1, 20, 50, 100, 200), (1.671, 1.523, 1.445, 1.411, 1.408)),
}


def sweep(runs):
    for s, (hw, ns, _) in SWEEPS.items():
        for n in ns:
            runs.start(f"sweep/slora-{s}-n{n}", theirs(hw, f"{s}-n{n}"))
            runs.start(f"sweep/ours-{s}-n{n}", ours(hw, f"{s}-n{n}"))
    yield
    rows = []
    for s, (_, ns, published) in SWEEPS.items():
        for n, p in zip(ns, published):
            t, r = runs[f"sweep/slora-{s}-n{n}"], runs[f"sweep/ours-{s}-n{n}"]
            rows.append((s, n, p, f"{t['requests_per_s']:.3f}", f"{r['requests_per_s']:.3f}",
                         f"{t['ttft_s']:.2f}", f"{r['ttft_s']['mean']:.2f}",
                         f"{t['latency_s']:.1f}", f"{r['latency_s']['mean']:.1f}"))
    yield ("## The paper's Figure 5: number of adapters\n\n"
           + table(("setting", "n", "S-LoRA, published", "S-LoRA, sim.", "ours",
                    "first token s, S-LoRA sim.", "ours", "latency s, S-LoRA sim.", "ours"), rows))


SATURATED = {"s1": "a100-80-7b", "s2": "a100-80-7b", "s4": "a100-80-13b"}


def saturated(runs):
    ns = (5, 100, 1000, 2000)
    for s, hw in SATURATED.items():
        for n in ns:
            runs.start(f"saturated/ours-{s}-n{n}", ours(hw, f"saturated-{s}-n{n}"))
            runs.start(f"saturated/slora-{s}-n{n}", theirs(hw, f"saturated-{s}-n{n}"))
    yield
    for s, hw in SATURATED.items():
        for n in ns:
            start_floor(runs, f"saturated/floor-{s}-n{n}", hw, f"saturated-{s}-n5",
                        runs[f"saturated/ours-{s}-n{n}"])
    rows = []
    for s in SATURATED:
        base = runs[f"saturated/ours-{s}-n5"]
        for n in ns:
            r, t = runs[f"saturated/ours-{s}-n{n}"], runs[f"saturated/slora-{s}-n{n}"]
            floor = runs[f"saturated/floor-{s}-n{n}"]
            rows.append((s.upper(), n, f"{t['requests_per_s']:.2f}", f"{r['requests_per_s']:.2f}",
                         percent(r["requests_per_s"] / base["requests_per_s"]),
                         f"{floor['requests_per_s']:.2f}",
                         percent(r["requests_per_s"] / floor["requests_per_s"]),
                         f"{r['adapters_per_step']:.0f}", f"{r['seqs_per_step']:.0f}",
                         f"{r['adapter_gb']:.0f}"))
    yield ("## Saturated: 60 requests/s for a minute\n\n"
           "The floor is what n = 5 does with the pool that adapters leave, if their own bytes were all "
           "that they cost: a sequence needs its KV cache and its share of the adapters in its "
           "step.\n\n"
           + table(("setting", "n", "S-LoRA, sim.", "ours", "of n = 5", "floor", "of the floor",
                    "adapters a step", "sequences a step", "GB loaded"), rows))


def rate(runs):
    rates = (1, 1.5, 2, 2.5)
    for r in rates:
        runs.start(f"rate/slora-{r}", theirs("a10g", f"a10g-s2-r{r}"))
        runs.start(f"rate/ours-{r}", ours("a10g", f"a10g-s2-r{r}"))
    yield
    plot = Plot("A10G, 7B, setting S2, 200 adapters", "requests/s offered",
                "seconds to the first token, mean", rates, 90)
    plot.line("S-LoRA, published", [PUBLISHED[f"a10g-s2-r{r}"][3] for r in rates], True)
    plot.line("S-LoRA, simulated", [runs[f"rate/slora-{r}"]["ttft_s"] for r in rates])
    plot.line("loramill, same prices", [runs[f"rate/ours-{r}"]["ttft_s"]["mean"] for r in rates])
    rows = [(r, PUBLISHED[f"a10g-s2-r{r}"][1], f"{runs[f'rate/slora-{r}']['requests_per_s']:.3f}",
             f"{runs[f'rate/ours-{r}']['requests_per_s']:.3f}", PUBLISHED[f"a10g-s2-r{r}"][3],
             f"{runs[f'rate/slora-{r}']['ttft_s']:.2f}",
             f"{runs[f'rate/ours-{r}']['ttft_s']['mean']:.2f}") for r in rates]
    yield ("## Offered rate, A10G, S2, 200 adapters\n\n" + plot.save("rate-a10g-s2") + "\n"
           + table(("offered", "S-LoRA, published", "S-LoRA, sim.", "ours",
                    "first token s, published", "S-LoRA, sim.", "ours"), rows))


ABLATIONS = (
    ("all of it", "all of it", ()),
    ("split pool, half and half", "split pool", ("--split-pool", "50")),
    ("rank padded to 64", "padded", ("--pad-rank", "64")),
    ("32 slots", "32 slots", ("--slots", "32")),
    ("no prefetch", "no prefetch", ("--no-prefetch",)),
    ("FCFS, no grouping", "FCFS", ("--fcfs",)),
    ("no pipelining", "no pipeline", ("--no-pipeline",)),
)


def ablation(runs):
    cases = {"a10g": ("a10g", "a10g-s2-n200", ()),
             "saturated": ("a100-80-7b", "saturated-s2-n2000", ()),
             "labels": ("a100-80-7b", "labels-n2000", ("--max-seqs", "16"))}
    for case, (hw, name, extra) in cases.items():
        for i, (_, _, options) in enumerate(ABLATIONS):
            runs.start(f"ablation/{case}-{i}", ours(hw, name, *extra, *options))
    yield
    text = ""
    for case, (hw, name, extra) in cases.items():
        rs = [runs[f"ablation/{case}-{i}"] for i in range(len(ABLATIONS))]
        plot = Plot(f"{name}: requests/s", "", "requests/s",
                    [short for _, short, _ in ABLATIONS],
                    max(r["requests_per_s"] for r in rs))
        plot.bars([r["requests_per_s"] for r in rs])
        rows = [(label, f"{r['requests_per_s']:.3f}",
                 percent(r["requests_per_s"] / rs[0]["requests_per_s"]),
                 f"{r['ttft_s']['mean']:.2f}", f"{r['ttft_s']['p99']:.2f}",
                 f"{r['token_ms']['mean']:.1f}", f"{r['adapters_per_step']:.1f}",
                 f"{r['seqs_per_step']:.1f}", f"{r['adapter_gb']:.0f}", r["preemptions"])
                for (label, _, _), r in zip(ABLATIONS, rs)]
        about = {"labels": "4,000 requests at once for 2,000 adapters, 1 to 8 tokens each, 16 sequences "
                           "a step: as short as the loads that they wait for.\n\n"}
        text += (f"### `{name}` on {HARDWARE[hw][0]}\n\n" + about.get(case, "") + plot.save(f"ablation-{case}") + "\n"
                 + table(("", "requests/s", "of all", "first token s", "P99", "ms a token",
                          "adapters a step", "sequences a step", "GB loaded", "preempted"), rows)
                 + "\n")
    yield "## What each idea buys\n\n" + text


BACKLOG = (
    ("FCFS", ("--fcfs",)), ("grouping", ()), ("overtaken 300 times at most", ("--max-overtaken", "300")),
    ("1,000 times", ("--max-overtaken", "1000")), ("3,000 times", ("--max-overtaken", "3000")),
)


def backlog(runs):
    for i, (_, options) in enumerate(BACKLOG):
        runs.start(f"backlog/{i}", ours("a100-80-7b", "backlog-n250", "--max-seqs", "128", *options))
    yield
    rs = [runs[f"backlog/{i}"] for i in range(len(BACKLOG))]
    rows = [(label, f"{r['requests_per_s']:.3f}", f"{r['adapters_per_step']:.1f}",
             f"{rs[0]['adapters_per_step'] / r['adapters_per_step']:.1f}",
             f"{r['seqs_per_step']:.1f}", f"{r['wait_s']['p99']:.1f}", f"{r['wait_s']['max']:.1f}")
            for (label, _), r in zip(BACKLOG, rs)]
    yield ("## Grouping a backlog\n\n"
           "5,000 requests at once for 250 adapters (20 each), A100-80, 7B, S2, 128 sequences. Every "
           "waiting request counts how many later ones were admitted before it; past the bound it "
           "goes first.\n\n"
           + table(("", "requests/s", "adapters a step", "times fewer", "sequences a step",
                    "P99 wait s", "longest"), rows))


def abort(runs):
    for case, (hw, _, _) in ABORT.items():
        for cv in CVS:
            name = f"{case}-cv{cv}"
            runs.start(f"abort/slora-{name}", theirs(hw, name, "--queue", "abort"))
            runs.start(f"abort/ours-{name}", ours(hw, name, "--slo-ttft", "6"))
            runs.start(f"abort/none-{name}", ours(hw, name, "--slo-ttft", "6", "--no-early-abort"))
    yield
    text = ""
    for case, (hw, fcfs, theirs_) in ABORT.items():
        mine = [runs[f"abort/ours-{case}-cv{cv}"] for cv in CVS]
        sim = [runs[f"abort/slora-{case}-cv{cv}"] for cv in CVS]
        none = [runs[f"abort/none-{case}-cv{cv}"] for cv in CVS]
        plot = Plot(f"{case}: first token within 6 s", "coefficient of variation of the gaps",
                    "share of all requests", CVS, 1)
        plot.line("S-LoRA FCFS, published", fcfs, True)
        plot.line("S-LoRA abort, published", theirs_, True)
        plot.line("S-LoRA abort, simulated", [r["attainment"] for r in sim])
        plot.line("loramill", [r["attainment"] for r in mine])
        plot.line("loramill, no abort", [r["attainment"] for r in none])
        rows = [(cv, theirs_[i], f"{sim[i]['attainment']:.3f}", f"{mine[i]['attainment']:.3f}",
                 f"{sim[i]['satisfaction']:.3f}", f"{mine[i]['satisfaction']:.3f}",
                 f"{none[i]['attainment']:.3f}", sim[i]["aborted"], mine[i]["late"])
                for i, cv in enumerate(CVS)]
        text += (f"### {case}\n\n" + plot.save(f"abort-{case}") + "\n"
                 + table(("cv", "S-LoRA abort, published", "S-LoRA abort, sim.", "ours",
                          "satisfaction, S-LoRA sim.", "ours", "ours without abort",
                          "aborted, S-LoRA sim.", "ours"), rows) + "\n")
    yield "## Early abort: first token within 6 s\n\n" + text


def skew(runs):
    alphas = (.1, .3, .6, 1)
    for a in alphas:
        name = f"table3-s2-n2000-a{a}"
        runs.start(f"skew/slora-{a}", theirs("a100-80-7b", name))
        runs.start(f"skew/ours-{a}", ours("a100-80-7b", name))
    yield
    rows = []
    for a in alphas:
        r, t = runs[f"skew/ours-{a}"], runs[f"skew/slora-{a}"]
        rows.append((a, f"{t['requests_per_s']:.3f}", f"{r['requests_per_s']:.3f}",
                     f"{t['ttft_s']:.2f}", f"{r['ttft_s']['mean']:.2f}", f"{t['pcie_gb']:.0f}",
                     f"{r['adapter_gb']:.0f}"))
    yield ("## Skewed popularity: 2,000 adapters, S2, 10 requests/s, A100-80\n\n"
           "alpha 1 is uniform; smaller is more skewed.\n\n"
           + table(("alpha", "S-LoRA, sim.", "ours", "first token s, S-LoRA sim.", "ours",
                    "GB over PCIe, S-LoRA sim.", "ours"), rows))


def million(runs):
    runs.start("million/zipf", [
        f"{BUILD}/loramill", "bench", "--json", "--sim", "ops/devices/h200.json", "--shape",
        "ops/shapes/llama-3.1-8b.json", "--trace", trace("zipf-million"), "--slo-ttft", "6",
        "--host-adapter-bytes", "64G", "--fetch-latency-ms", "20", "--fetch-gbps", "1",
        "--fetches", "32"])
    yield
    r = runs["million/zipf"]
    rows = [(f"{r['requests']:,}", f"{r['fetched']:,}", f"{r['requests_per_s']:.1f}",
             f"{r['ttft_s']['p50']:.3f} / {r['ttft_s']['p99']:.3f}",
             f"{r['token_ms']['p50']:.1f} / {r['token_ms']['p99']:.1f}",
             f"{r['adapters_per_step']:.1f}", f"{100 * r['adapter_share']:.0f} %",
             f"{r['seconds']:.0f}")]
    yield ("## A million adapters\n\n"
           "Zipf's law (exponent 1), 40 requests/s, llama-3.1-8b on an H200, ranks 8 to 64, 64 GiB of "
           "host memory, a store with 20 ms and 1 GB/s a fetch.\n\n"
           + table(("requests", "fetched from the store", "requests/s", "first token s, P50 / P99",
                    "ms a token, P50 / P99", "adapters a step", "pool in adapters",
                    "seconds of traffic"), rows))


def preempt(runs):
    for device in ("a10g", "a10g-own"):
        for how in ("recompute", "swap", "cheaper"):
            runs.start(f"preempt/{device}-{how}",
                       ours("a10g", "a10g-s2-r2.5", "--preempt", how, device=device))
    yield
    rows = []
    for device in ("a10g", "a10g-own"):
        for how in ("recompute", "swap", "cheaper"):
            r = runs[f"preempt/{device}-{how}"]
            rows.append((device, how, f"{r['requests_per_s']:.3f}", f"{r['ttft_s']['mean']:.1f}",
                         f"{r['token_ms']['mean']:.1f}", f"{r['token_ms']['p99']:.0f}",
                         r["preemptions"], r["swap_outs"], f"{r['swap_gb']:.1f}"))
    yield ("## Preemption by recompute or by swapping\n\n"
           "A10G, S2, 200 adapters, 2.5 requests/s: more than it can serve, in a small pool. The two "
           "devices differ in their PCIe rate as S-LoRA's loader got it and as the card has it.\n\n"
           + table(("device", "preemption", "requests/s", "first token s", "ms a token", "P99",
                    "preempted", "swapped", "GB swapped"), rows))


def merge(runs):
    cases = (("base", "n0", ()), ("one adapter", "n1", ()), ("one adapter, merged", "n1",
                                                             ("--merge",)))
    for device in ("a100-80", "a100-80-own"):
        for label, n, options in cases:
            runs.start(f"merge/{device}-{label}", ours("a100-80-7b", f"a100-80-s2-{n}", *options,
                                                       device=device))
    yield
    rows = []
    for device in ("a100-80", "a100-80-own"):
        for label, _, _ in cases:
            r = runs[f"merge/{device}-{label}"]
            rows.append((device, label, f"{r['requests_per_s']:.3f}", f"{r['ttft_s']['mean']:.2f}",
                         f"{r['token_ms']['mean']:.1f}", f"{r['seqs_per_step']:.0f}", r["merges"]))
    yield ("## Merged mode, and what LoRA itself costs\n\n"
           "A100-80, 7B, 10 requests/s for 300 s, none or one adapter of rank 64 (S-LoRA's published "
           "9.641 and 7.737 requests/s).\n\n"
           + table(("device", "", "requests/s", "first token s", "ms a token", "sequences a step",
                    "merges"), rows))


def large(runs):
    for shape in ("llama-70b-m", "llama-3.1-70b"):
        for n in (0, 10, 100):
            runs.start(f"large/{shape}-n{n}", [
                f"{BUILD}/loramill", "bench", "--json", "--sim", "ops/devices/a100-80-x4.json",
                "--shape", f"ops/shapes/{shape}.json", "--max-seqs", "256", "--trace",
                trace(f"s6-n{n}")])
    yield
    rows = []
    for shape in ("llama-70b-m", "llama-3.1-70b"):
        for n in (0, 10, 100):
            r = runs[f"large/{shape}-n{n}"]
            rows.append((shape, n, f"{r['requests_per_s']:.2f}", f"{r['ttft_s']['mean']:.2f}",
                         f"{r['ttft_s']['p99']:.2f}", f"{r['token_ms']['mean']:.1f}",
                         f"{r['seqs_per_step']:.0f}", f"{r['adapter_gb']:.0f}"))
    yield ("## 70B on four devices\n\n"
           "S-LoRA's 70B stand-in (full multi-head attention) and llama-3.1-70b, rank 64, 4 requests/s "
           "for 120 s, a group of four A100-80 as one device.\n\n"
           + table(("shape", "adapters", "requests/s", "first token s", "P99", "ms a token",
                    "sequences a step", "GB loaded"), rows))


PARTS = (fit, table3, saturated, sweep, rate, ablation, backlog, abort, skew, preempt, merge, large,
         million)


HEAD = """# What each policy buys

Made by `tests/bench/sim_report.py`; do not edit. Figures come from the simulated device
([simulator.md](simulator.md)): the engine is the real one, time is what the device's description
says. Compare within a table, not with other hardware.

S-LoRA's columns are its published results and its own policy on the same simulated device
(`tests/bench/slora.c`), with the same bytes for KV cache and adapters as ours.

"""


def main(argv):
    jobs, names = 2, []
    args = iter(argv[1:])
    for a in args:
        if a == "--jobs":
            jobs = int(next(args))
        elif a in [p.__name__ for p in PARTS]:
            names.append(a)
        else:
            print(__doc__, file=sys.stderr)
            return 2
    make_traces.check()
    runs = Runs(jobs, names or [p.__name__ for p in PARTS])
    started = [p(runs) for p in PARTS]
    for p in started:
        next(p)
    text = HEAD + "\n".join(next(p) for p in started)
    with open(os.path.join(TOP, "docs", "policies.md"), "w") as f:
        f.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
