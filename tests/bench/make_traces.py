#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""make_traces.py DIR [NAME...]: request traces for `loramill bench --trace`. Needs numpy.

The first families are S-LoRA's own (arXiv 2311.03285, Sheng et al.; benchmarks/trace.py), number for
number: numpy's legacy generator, seed 42, drawn in the order adapters, input lengths, output lengths,
gaps. Their published statistics are asserted below before anything is written. alpha = 1 is uniform
popularity; rank of adapter j is ranks[j % len]. A prompt of k times "Hello " is k + 1 tokens.

The others are ours: saturating rates, a backlog at t = 0, and a Zipf law over a million adapters.
Without names all are written; --list prints the names.
"""
import os
import sys

import numpy as np

S1, S2, S4, S6 = (8,), (64, 32, 16, 8), (64, 32, 16), (64,)


def slora(n, ranks, rate, seconds, cv=1.0, alpha=1.0, lin=(8, 512), lout=(8, 512), seed=42):
    """Rows (arrival, adapter, rank, input, output); the exclusive upper ends are theirs."""
    np.random.seed(seed)
    total = int(rate * seconds)
    adapter = (np.random.power(alpha, total) * n).astype(int)
    ilen = np.random.randint(lin[0], lin[1], total)
    olen = np.random.randint(lout[0], lout[1], total)
    gaps = np.random.gamma(1 / (cv * cv), cv * cv / rate, total)
    if n == 0:
        adapter[:] = -1
    return list(zip(np.cumsum(gaps), adapter, [ranks[a % len(ranks)] if n else 0 for a in adapter],
                    ilen, olen))


def backlog(requests, n, ranks, lin=(8, 512), lout=(8, 512), seed=42):
    """All at t = 0, in random order of adapters."""
    rng = np.random.RandomState(seed)
    adapter = rng.randint(0, n, requests)
    return list(zip(np.zeros(requests), adapter, [ranks[a % len(ranks)] for a in adapter],
                    rng.randint(lin[0], lin[1], requests), rng.randint(lout[0], lout[1], requests)))


def zipf(requests, n, s, rate, ranks, seed=42):
    """Popularity of the k-th adapter ~ k^-s over n; which is k-th is shuffled; Poisson arrivals.
    Prompts and outputs are short, as in chat: 8..256 and 8..128."""
    rng = np.random.RandomState(seed)
    cdf = np.cumsum(np.arange(1, n + 1, dtype=float) ** -s)
    place = rng.permutation(n)
    adapter = place[np.searchsorted(cdf, rng.uniform(0, cdf[-1], requests))]
    return list(zip(np.cumsum(rng.exponential(1 / rate, requests)), adapter,
                    [ranks[a % len(ranks)] for a in adapter], rng.randint(8, 257, requests),
                    rng.randint(8, 129, requests)))


def check():
    """What S-LoRA's generator is known to give: N, last arrival, distinct adapters, share of the most
    popular, mean input and output, first request."""
    want = [
        (slora(200, S2, 2, 300), 600, 301.00, 187, .013, 255.7, 259.1, (74, 12, 410, .1598)),
        (slora(200, S2, 2, 300, alpha=.6), 600, 301.00, 188, .048, 255.7, 259.1,
         (38, 12, 410, .1598)),
        (slora(200, S2, 2, 300, alpha=.3), 600, 301.00, 163, .225, 255.7, 259.1,
         (7, 12, 410, .1598)),
        (slora(200, S2, 2, 300, alpha=.1), 600, 301.00, 107, .570, 255.7, 259.1,
         (0, 12, 410, .1598)),
        (slora(200, S2, 2.5, 300), 750, 288.06, 191, .012, 264.4, 264.6, (74, 442, 97, .5028)),
        (slora(200, S2, 10, 300), 3000, 284.94, 200, .008, 265.5, 252.7, (74, 378, 228, .1422)),
        (slora(400, S4, 6, 300), 1800, 293.72, 396, .007, 259.4, 260.7, (149, 140, 491, .0275)),
        (slora(5, S1, 10, 120), 1200, 124.99, 5, .217, 262.3, 263.2, (1, 388, 268, .0503)),
        (slora(100, S1, 10, 120), 1200, 124.99, 100, .018, 262.3, 263.2, (37, 388, 268, .0503)),
        (slora(1000, S1, 10, 120), 1200, 124.99, 704, .006, 262.3, 263.2, (374, 388, 268, .0503)),
        (slora(2000, S1, 10, 120), 1200, 124.99, 907, .004, 262.3, 263.2, (749, 388, 268, .0503)),
        (slora(32, S2, 2, 120), 240, 120.30, 32, .050, 263.4, 252.2, (11, 227, 387, .4389)),
        (slora(5, S2, 2, 60), 120, 56.07, 5, .267, 281.7, 256.7, (1, 510, 158, 1.5296)),
        (slora(1000, S2, 20, 60, alpha=.8), 1200, 62.49, 688, .006, 262.3, 263.2,
         (293, 388, 268, .0252)),
    ]
    for rows, n, last, distinct, top, mean_in, mean_out, first in want:
        t, a, _, i, o = (np.array(c) for c in zip(*rows))
        got = (len(rows), len(set(a)), a[0], i[0], o[0])
        assert got == (n, distinct) + first[:3], (got, n, distinct, first)
        for value, given, half in ((t[-1], last, .005), (np.bincount(a).max() / n, top, .0005),
                                   (i.mean(), mean_in, .05), (o.mean(), mean_out, .05),
                                   (t[0], first[3], .00005)):
            assert abs(value - given) <= half * 1.001, (value, given, first)
    for rate, last in ((1, 299.54), (2, 301.00), (4, 312.47), (8, 293.93)):
        assert round(slora(400, S4, rate, 300)[-1][0], 2) == last


def traces():
    """Name to a function that makes it."""
    t = {}
    for n in (1, 5, 20, 50, 100, 200):
        t[f"a10g-s1-n{n}"] = lambda n=n: slora(n, S1, 2, 300)
        t[f"a10g-s2-n{n}"] = lambda n=n: slora(n, S2, 2, 300)
    for n in (0, 1, 20, 50, 100, 200):
        t[f"a100-80-s2-n{n}"] = lambda n=n: slora(n, S2, 10, 300)
        t[f"a100-40-s4-n{n}"] = lambda n=n: slora(n, S4, 2, 300)
    for n in (0, 1, 100, 200, 400, 1000):
        t[f"a100-80-s4-n{n}"] = lambda n=n: slora(n, S4, 6, 300)
    for name, ranks in (("s1", S1), ("s2", S2), ("s4", S4)):
        for n in (2, 5, 100, 1000, 2000):
            t[f"table3-{name}-n{n}"] = lambda n=n, r=ranks: slora(n, r, 10, 120)
            t[f"saturated-{name}-n{n}"] = lambda n=n, r=ranks: slora(n, r, 60, 60)
    for rate in (1, 1.5, 2, 2.5):
        t[f"a10g-s1-r{rate}"] = lambda r=rate: slora(200, S1, r, 300)
        t[f"a10g-s2-r{rate}"] = lambda r=rate: slora(200, S2, r, 300)
    for rate in (1, 2, 4, 6, 8):
        t[f"a100-80-s4-r{rate}"] = lambda r=rate: slora(400, S4, r, 300)
    for cv in (1, 2, 4, 6, 8):
        t[f"a10g-s1-cv{cv}"] = lambda cv=cv: slora(200, S1, 2, 300, cv=cv)
        t[f"a10g-s2-cv{cv}"] = lambda cv=cv: slora(200, S2, 2, 300, cv=cv)
        t[f"a100-80-s4-cv{cv}"] = lambda cv=cv: slora(400, S4, 6, 300, cv=cv)
    for alpha in (.1, .3, .6, 1):
        t[f"a10g-s2-a{alpha}"] = lambda a=alpha: slora(200, S2, 2, 300, alpha=a)
        t[f"table3-s2-n2000-a{alpha}"] = lambda a=alpha: slora(2000, S2, 10, 120, alpha=a)
    for n in (0, 10, 100):
        t[f"s6-n{n}"] = lambda n=n: slora(n, S6, 4, 120)
    t["merge-n1"] = lambda: slora(1, S2, 2, 60)
    t["merge-n5"] = lambda: slora(5, S2, 2, 60)
    t["backlog-n250"] = lambda: backlog(5000, 250, S2)
    t["labels-n2000"] = lambda: backlog(4000, 2000, S2, (32, 256), (1, 9))
    t["zipf-million"] = lambda: zipf(200000, 1000000, 1.0, 40, S2)
    return t


def write(path, rows):
    with open(path, "w") as f:
        f.write("id,arrival,adapter,rank,prompt_len,output_len\n")
        for i, (arrival, adapter, rank, ilen, olen) in enumerate(rows):
            f.write(f"{i},{arrival:.6f},{adapter},{rank},{ilen + 1},{olen}\n")


def main(argv):
    all_traces = traces()
    if argv[1:] == ["--list"]:
        print("\n".join(all_traces))
        return 0
    if len(argv) < 2 or argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    check()
    os.makedirs(argv[1], exist_ok=True)
    for name in argv[2:] or all_traces:
        if name not in all_traces:
            print(f"make_traces.py: no trace '{name}'; --list names them", file=sys.stderr)
            return 2
        write(os.path.join(argv[1], name + ".csv"), all_traces[name]())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
