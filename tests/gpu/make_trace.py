#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""make_trace.py N [RANKS] [REQUESTS]: the offline trace of `make gpu-check PART=trace`, as CSV.

All requests at t = 0; prompt and output lengths uniform in 8..512, adapters uniform over N (0: base
model only), rank of adapter j is RANKS[j % len] (default 8). Lengths and adapters come from streams of
their own, so runs with different N differ in the adapters only. Standard library only.
"""
import random
import sys

SEED, LENGTHS = 42, (8, 512)


def main():
    n = int(sys.argv[1])
    ranks = [int(r) for r in (sys.argv[2] if len(sys.argv) > 2 else "8").split(",")]
    requests = int(sys.argv[3]) if len(sys.argv) > 3 else 1000
    length, adapter = (random.Random(f"{SEED}/{name}") for name in ("len", "adapter"))
    lo, hi = LENGTHS
    print("id,arrival,adapter,rank,prompt_len,output_len")
    for i in range(requests):
        prompt, output = (lo + int(length.random() * (hi - lo + 1)) for _ in range(2))
        a = min(n - 1, int(n * adapter.random())) if n else -1
        print(f"{i},0.000000,{a},{ranks[a % len(ranks)] if n else 0},{prompt},{output}")


if __name__ == "__main__":
    main()
