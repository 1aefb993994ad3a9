# SPDX-License-Identifier: Apache-2.0
"""memory.py: a million prompts through one worker, and what that does to its memory.

  memory.py fill BOOTSTRAP TOPIC N              N prompts of 1 KiB
  memory.py watch PID PORT N SECONDS            TAP; exit 1 when memory is not flat

`watch` samples the resident set of PID and the completions that its /metrics counts, ten times a second,
until N are complete. Judged is what comes after the first tenth, when buffers, arenas and the
client library's queues have their size:

  slope   least squares, below 16 bytes a message: a block of 32 bytes that leaks once a message makes twice
          that. Smaller ones are LeakSanitizer's to find.
  spread  of the tenths' medians the largest is at most 16 MiB above the smallest: so much the client
          library may hold of what it has fetched (queued.max.messages.kbytes), now more, now less.
"""
import json
import os
import random
import statistics
import sys
import time
import urllib.request

SLOPE_MAX, SPREAD_MAX = 16.0, 16 << 20


def fill(bootstrap, topic, n):
    from confluent_kafka import Producer
    p = Producer({"bootstrap.servers": bootstrap, "linger.ms": 20, "compression.type": "lz4",
                  "queue.buffering.max.messages": 200000})
    rng, errors = random.Random(1), []
    texts = [rng.randbytes(460).hex() for _ in range(1000)]
    for i in range(int(n)):
        value = json.dumps({"id": f"m-{i:07d}", "prompt": texts[i % len(texts)],
                            "params": {"max_tokens": 8}, "metadata": {"number": str(i)}}).encode()
        while True:
            try:
                p.produce(topic, key=str(i), value=value,
                          on_delivery=lambda e, m: e and errors.append(e))
                break
            except BufferError:
                p.poll(0.1)
        if i % 1000 == 0:
            p.poll(0)
    assert p.flush(120) == 0 and not errors, errors[:3]
    print(f"# {n} prompts, the last one of {len(value)} bytes")
    return 0


def resident(pid):
    with open(f"/proc/{pid}/statm", encoding="utf-8") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def completed(port):
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    for line in page.splitlines():
        if line.startswith('loramill_records_total{outcome="completed"}'):
            return int(line.split()[-1])
    return 0


def slope(points):
    mx, my = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    return (sum((x - mx) * (y - my) for x, y in points)
            / sum((x - mx) ** 2 for x, _ in points))


def watch(pid, port, n, seconds):
    n, samples, start = int(n), [], time.time()
    while time.time() - start < float(seconds) and (not samples or samples[-1][0] < n):
        time.sleep(0.1)
        samples.append((completed(port), resident(pid)))
    took = time.time() - start
    step = max(1, len(samples) // 20)
    for done, rss in samples[::step]:
        print(f"# {done:8d} done, {rss / 1e6:7.1f} MB")
    warm = [s for s in samples if s[0] >= n // 10]
    good = samples[-1][0] >= n and len(warm) >= 10
    print("ok" if good else "not ok", f"- {samples[-1][0]} of {n} are complete after {took:.0f} s, "
          f"{len(warm)} samples")
    if not good:
        return 1
    tenths = [[r for d, r in warm if d * 10 // n == t] for t in range(1, 10)]
    medians = [statistics.median(t) for t in tenths if t]
    low, high, rate = min(medians), max(medians), slope(warm)
    print(f"# single samples from {min(r for _, r in warm) / 1e6:.1f} to "
          f"{max(r for _, r in warm) / 1e6:.1f} MB")
    print(f"# medians of the tenths {' '.join(f'{m / 1e6:.1f}' for m in medians)} MB, ratio "
          f"{high / low:.3f}, slope {rate:+.2f} bytes a message")
    flat = rate < SLOPE_MAX and high - low <= SPREAD_MAX
    print("ok" if flat else "not ok", f"- memory is flat: slope below {SLOPE_MAX:.0f} bytes a message, "
          f"spread {(high - low) / 1e6:.1f} MB, at most {SPREAD_MAX / 1e6:.1f}")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))
