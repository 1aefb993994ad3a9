# SPDX-License-Identifier: Apache-2.0
"""A job as the tests see it: prompts produced by a plain Python client, outcomes read back.

  job.py make N ADAPTERS-DIR ORDERS FILE      write N prompts (JSON lines, about 2 % of them bad)
  job.py produce BOOTSTRAP TOPIC FILE [FROM [TO]]     produce them, or some; key = the line's customer
  job.py watch BOOTSTRAP REPLIES DEAD N SECONDS   wait until N outcomes are there
  job.py verify BOOTSTRAP REPLIES DEAD PROMPTS-TOPIC FILE     TAP lines; exit 1 on any failure

The oracle of `verify`: every produced record has an outcome (a reply or a dead letter); repeats are
of one kind and carry the record's id (at-least-once); a reply is for the adapter that was asked
for; a dead letter holds the original key, value and headers.
"""
import collections
import itertools
import json
import os
import random
import struct
import sys
import time

from confluent_kafka import Producer
from delivery import client, partitions

BAD = {
    "unknown-adapter": lambda p: json.dumps({**p, "adapter": "no-such-voice"}),
    "empty-adapter": lambda p: json.dumps({**p, "adapter": ""}),
    "typo": lambda p: json.dumps({**p, "adaptor": p["adapter"]}),
    "two-prompts": lambda p: json.dumps({**p, "messages": [{"role": "user", "content": "hi"}]}),
    "not-json": lambda p: '{"id": "' + p["id"] + '", ',
    "bad-param": lambda p: json.dumps({**p, "params": {"temperature": "hot"}}),
    "traversal": lambda p: json.dumps({**p, "adapter": "../../etc/passwd"}),
}


def adapter_ids(root):
    found = []
    for d, _, files in os.walk(root):
        if "adapter_config.json" in files:
            found.append(os.path.relpath(d, root))
    return sorted(found)


def make(n, adapters_dir, orders, out):
    rng = random.Random(7)
    ids = adapter_ids(adapters_dir)
    events = [line.rstrip("\n") for line in open(orders, encoding="utf-8") if line.strip()]
    kinds = sorted(BAD)
    with open(out, "w", encoding="utf-8") as f:
        for i in range(int(n)):
            p = {"id": f"job-{i:05d}", "adapter": ids[i % len(ids)], "prompt": rng.choice(events),
                 "params": {"max_tokens": rng.randint(4, 24), "temperature": 0},
                 "metadata": {"customer": str(i % 97)}}
            if i % 10 == 9:
                del p["adapter"]                    # the base model, on purpose
            bad = kinds[(i // 50) % len(kinds)] if i % 50 == 25 else None
            value = BAD[bad]({**p, "adapter": ids[0]}) if bad else json.dumps(p)
            f.write(json.dumps({"id": p["id"], "key": str(i % 97), "bad": bad, "value": value,
                                "adapter": p.get("adapter")}) + "\n")


def lines(path):
    return [json.loads(x) for x in open(path, encoding="utf-8")]


def produce(bootstrap, topic, path, first=0, last=None):
    """The job's prompts, or those from `first` to before `last`."""
    errors = []
    p = Producer({"bootstrap.servers": bootstrap, "linger.ms": 5, "enable.idempotence": True})
    for x in itertools.islice(lines(path), int(first), last and int(last)):
        p.produce(topic, key=x["key"], value=x["value"].encode(),
                  on_delivery=lambda e, m: e and errors.append(e),
                  headers=[("test-id", x["id"].encode()), ("raw", b"\x00\xff\x01"),
                           ("kafka_correlationId", b"c\x00" + x["id"].encode()),
                           ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")])
        p.poll(0)
    p.flush(60)
    assert not errors, errors[:3]


class Tail:
    """Everything in some topics, from the beginning, with read_committed."""

    def __init__(self, bootstrap, topics):
        self.c = client(bootstrap, "oracle")
        self.c.assign(partitions(self.c, ",".join(topics)))

    def read(self, seconds):
        end = time.time() + seconds
        while time.time() < end:
            for m in self.c.consume(500, timeout=0.5):
                if not m.error():
                    yield m
                    end = max(end, time.time() + 1.0)


def header(m, name):
    return dict(m.headers() or []).get(name)


def outcome_id(m):
    return (header(m, "test-id") or header(m, "kafka_correlationId")[2:]).decode()


def watch(bootstrap, replies, dead, n, seconds):
    tail, seen, start = Tail(bootstrap, [replies, dead]), set(), time.time()
    while time.time() - start < float(seconds):
        for m in tail.read(0.5):
            seen.add(outcome_id(m))
            if len(seen) >= int(n):
                print(f"# {len(seen)} outcomes after {time.time() - start:.1f} s")
                return 0
    print(f"# only {len(seen)} of {n} outcomes after {seconds} s")
    return 1


def verify(bootstrap, replies, dead, prompts, path):
    want = {x["id"]: x for x in lines(path)}
    got = collections.defaultdict(list)
    for m in Tail(bootstrap, [replies, dead]).read(5):
        got[outcome_id(m)].append(m)
    bad = []

    def fail(i, what):
        bad.append(f"{i}: {what}")

    for i, x in want.items():
        if not got[i]:
            fail(i, "no outcome: lost")
        for m in got[i]:
            if (m.key() or b"").decode() != x["key"]:
                fail(i, f"key {m.key()!r}, expected {x['key']!r}")
            (check_dead if m.topic() == dead else check_reply)(i, x, m, fail, prompts)
        if len({m.topic() for m in got[i]}) > 1:
            fail(i, "both a reply and a dead letter")
    for i in set(got) - set(want):
        fail(i, "an outcome that nobody asked for")
    repeats = sum(len(v) - 1 for v in got.values())
    n_dead = sum(v[0].topic() == dead for v in got.values())
    print(f"# {len(want)} prompts, {len(got) - n_dead} answered, {n_dead} dead-lettered, "
          f"{repeats} repeats")
    for b in bad[:20]:
        print("#", b)
    print("not ok" if bad else "ok", "- every prompt has its outcome, nothing lost, nothing mixed up")
    return 1 if bad else 0


def check_reply(i, x, m, fail, _):
    r = json.loads(m.value())
    if x["bad"]:
        fail(i, f"answered although bad ({x['bad']})")
    if r["id"] != i or r.get("adapter") != x["adapter"]:
        fail(i, f"reply is for {r['id']} and adapter {r.get('adapter')}, expected {x['adapter']}")
    if (r["adapter_digest"] is None) != (x["adapter"] is None):
        fail(i, f"adapter_digest is {r['adapter_digest']}")
    finish = r["choices"][0]["finish_reason"]
    if r["usage"]["completion_tokens"] < 1 or finish not in ("stop", "length"):
        fail(i, f"usage {r['usage']}, finish {finish}")
    if header(m, "kafka_correlationId") != b"c\x00" + i.encode():
        fail(i, f"correlation id {header(m, 'kafka_correlationId')!r}")
    if not (header(m, "traceparent") or b"").startswith(b"00-0af7651916cd43dd8448eb211c80319c-"):
        fail(i, "traceparent is gone")


def check_dead(i, x, m, fail, prompts):
    if not x["bad"]:
        fail(i, f"dead-lettered: {header(m, 'loramill-error-message')}")
    if m.value() != x["value"].encode():
        fail(i, "value changed")
    h = dict(m.headers())
    if h.get("raw") != b"\x00\xff\x01":
        fail(i, "an original header changed")
    if (h.get("kafka_dlt-original-topic") != prompts.encode()
            or len(h.get("kafka_dlt-original-offset", b"")) != 8):
        fail(i, "no kafka_dlt-original-* headers")
    if h.get("__connect.errors.topic") != prompts.encode():
        fail(i, "no __connect.errors.* headers")
    if struct.unpack(">q", h["kafka_dlt-original-offset"])[0] != int(h["__connect.errors.offset"]):
        fail(i, "the two header families disagree on the offset")
    if not h.get("loramill-error-code") or not h.get("loramill-error-message"):
        fail(i, "no cause")


if __name__ == "__main__":
    commands = {"make": make, "produce": produce, "watch": watch, "verify": verify}
    sys.exit(commands[sys.argv[1]](*sys.argv[2:]))
