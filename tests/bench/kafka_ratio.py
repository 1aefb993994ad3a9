# SPDX-License-Identifier: Apache-2.0
"""kafka_ratio.py BOOTSTRAP REGISTRY LORAMILL LOOP RUN N: the worker beside a minimal client loop.

N prompts of about 1 KiB (prompts.py), in JSON and in Avro, lie in their topics. A round measures each of

  loop          tests/bench/kafka_loop.c: consume, produce as it came
  json, avro    one worker with the echo engine, at-least-once
  exactly-once  the same with JSON and delivery.mode=exactly-once

once, in an order that turns by one from round to round; each reads all of one topic as a new group
and writes to a new topic. The clock runs from the first record there to the last, by the broker's
timestamps, so start-up is not counted. KAFKA_ROUNDS says how many rounds: an odd number (default
5), so that a median is a round that was measured and not an average of two.

Prints one JSON line a figure:

  value, peer   medians over the rounds of its messages a second, and of those of what it is
                measured beside (the loop; exactly-once: json)
  ratio         the median of the rounds' ratios, each of two rates of one round. It is what to
                compare, since the rates are this machine's and its neighbours'; it need not be
                value / peer, whose medians may be of different rounds
  value_spread, peer_spread, ratio_spread     lowest and highest round
  rounds        each round's [value, peer], in order
"""
import json
import os
import statistics
import subprocess
import sys
import time

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient

import prompts

bootstrap, registry_url, loramill, loop, run, n = sys.argv[1:6] + [int(sys.argv[6])]
ROUNDS, PARTITIONS = int(os.environ.get("KAFKA_ROUNDS") or 5), 4
if ROUNDS < 1 or ROUNDS % 2 == 0:
    sys.exit(f"KAFKA_ROUNDS must be odd, so that the median is one of the rounds; not {ROUNDS}")
admin = AdminClient({"bootstrap.servers": bootstrap})


def topic(name):
    admin.create_topics([NewTopic(name, PARTITIONS, config={
        "message.timestamp.type": "LogAppendTime"})])[name].result(20)
    return name


def fill():
    text = open("schemas/prompt.avsc", encoding="utf-8").read()
    number = SchemaRegistryClient({"url": registry_url}).register_schema("p-avro-value",
                                                                        Schema(text, "AVRO"))
    prompts.fill(bootstrap, n, text, number)


def measure(name, command, to):
    log = open(f"{run}/{to}.log", "w", encoding="utf-8")
    child = subprocess.Popen(command, stderr=log, stdout=log)
    c = Consumer({"bootstrap.servers": bootstrap, "group.id": "reader-" + to})
    c.assign([TopicPartition(to, i, 0) for i in range(PARTITIONS)])
    seen, first, last, end = 0, None, None, time.time() + 300
    while seen < n and time.time() < end and child.poll() is None:
        for m in c.consume(2000, timeout=1):
            if not m.error():
                t = m.timestamp()[1]
                first, last, seen = min(first or t, t), max(last or t, t), seen + 1
    c.close()
    child.terminate()
    status = child.wait(60)
    assert seen == n and status == 0, f"{name}: {seen} of {n}, status {status}; see {log.name}"
    return n / max(last - first, 1) * 1000


def worker(source, to, mode):
    path = f"{run}/{to}.properties"
    with open(path, "w", encoding="utf-8") as f:
        f.write(f"engine.mode=echo\ntopics.prompts={source}\ntopics.replies={to}\n"
                f"topics.dead_letters=dead\ngroup.id=g-{to}\nkafka.bootstrap.servers={bootstrap}\n"
                f"http.port=0\nregistry.url={registry_url}\ndelivery.mode={mode}\n"
                f"journal.dir={run}/journal\nlog.level=warn\n")
        if mode == "exactly-once":
            f.write(f"transaction.id=t-{to}\n")
    return [loramill, "worker", "-c", path]


for t in ("p-json", "p-avro", "dead"):
    topic(t)
fill()
rates = {"loop": [], "json": [], "avro": [], "exactly-once": []}
names = list(rates)
for i in range(ROUNDS):
    for name in names[i % len(names):] + names[:i % len(names)]:
        to = topic(f"r-{name}-{i}")
        source = "p-avro" if name == "avro" else "p-json"
        command = ([loop, bootstrap, "g-" + to, source, to] if name == "loop" else
                   worker(source, to, "exactly-once" if name == "exactly-once" else
                          "at-least-once"))
        rates[name].append(measure(name, command, to))
        print(f"== round {i + 1} of {ROUNDS}, {name}: {rates[name][-1]:.0f} messages/s",
              file=sys.stderr)


def spread(values, digits):
    return [round(min(values), digits), round(max(values), digits)]


for name in ("json", "avro", "exactly-once"):
    ours, beside = rates[name], rates["json" if name == "exactly-once" else "loop"]
    ratios = [a / b for a, b in zip(ours, beside)]
    print(json.dumps({
        "name": f"kafka_{name}", "unit": "messages/s", "value": round(statistics.median(ours)),
        "value_spread": spread(ours, None), "peer": round(statistics.median(beside)),
        "peer_spread": spread(beside, None), "ratio": round(statistics.median(ratios), 3),
        "ratio_spread": spread(ratios, 3),
        "rounds": [[round(a), round(b)] for a, b in zip(ours, beside)]}))
