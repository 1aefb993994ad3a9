#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""fit_device.py DEVICE [ROUNDS]: fits ops/devices/DEVICE.json to S-LoRA's published results.

A random walk over the six parameters that no data sheet has, each round one to three of them by a
log-normal factor; what lowers the error stays. Error: squared logarithms of the ratios of throughput
(weight 30), mean latency (1) and mean time to the first token (0.05) over the runs of sim_report.py
on that device. Prints each improvement, and the description at the end; nothing is written in place.
"""
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import sim_report

FREE = ("launch_us", "step_us", "seq_us", "decode_share", "lora_token_gbps", "in_gbps")


def error(device, runs, pool):
    with tempfile.NamedTemporaryFile("w", suffix=".json") as f:
        json.dump(device, f)
        f.flush()

        def one(name):
            hw = sim_report.PUBLISHED[name][0]
            argv = sim_report.theirs(hw, name)
            argv[argv.index("--sim") + 1] = f.name
            return json.loads(subprocess.run(argv, cwd=sim_report.TOP, capture_output=True,
                                             check=True).stdout)
        total = 0
        for name, r in zip(runs, pool.map(one, runs)):
            _, thr, latency, ttft, _ = sim_report.PUBLISHED[name]
            total += 30 * math.log(r["requests_per_s"] / thr) ** 2
            if latency:
                total += math.log(r["latency_s"] / latency) ** 2
                total += .05 * math.log(max(r["ttft_s"], .2) / max(ttft, .2)) ** 2
        return total


def main(argv):
    if len(argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    with open(os.path.join(sim_report.TOP, "ops", "devices", argv[1] + ".json")) as f:
        best = json.load(f)
    runs = [n for n, p in sim_report.PUBLISHED.items() if sim_report.HARDWARE[p[0]][0] == argv[1]]
    with ThreadPoolExecutor(2) as pool:
        least, step = error(best, runs, pool), .5
        for i in range(int(argv[2]) if len(argv) == 3 else 100):
            tried = dict(best)
            for key in random.sample(FREE, random.choice((1, 2, 3))):
                tried[key] = best[key] * math.exp(random.gauss(0, step))
            tried["decode_share"] = min(tried["decode_share"], .95)
            e = error(tried, runs, pool)
            step = min(.6, step * 1.2) if e < least else max(.05, step * .96)
            if e < least:
                best, least = tried, e
                print(i, round(least, 3), {k: float(f"{best[k]:.3g}") for k in FREE}, flush=True)
    print(json.dumps(best))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
