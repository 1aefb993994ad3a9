# SPDX-License-Identifier: Apache-2.0
"""kafka_echo.py BOOTSTRAP LORAMILL RUN N: prompts a second through one worker that echoes.

N prompts of about 300 bytes are on the topic before the worker starts; the clock runs from the
first reply's broker timestamp to the last's, so that start-up is not counted. Prints one JSON line.
"""
import json
import subprocess
import sys
import time

from confluent_kafka import Consumer, Producer, TopicPartition

bootstrap, loramill, run, n = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
p = Producer({"bootstrap.servers": bootstrap, "linger.ms": 20})
for i in range(n):
    p.produce("prompts", key=str(i), value=json.dumps(
        {"id": f"m{i}", "prompt": "x" * 200, "params": {"max_tokens": 8}, "metadata": {"i": str(i)}}))
    p.poll(0)
p.flush(60)
with open(f"{run}/echo.properties", "w", encoding="utf-8") as f:
    f.write(f"engine.mode=echo\ntopics.prompts=prompts\ntopics.replies=replies\n"
            f"topics.dead_letters=dead\ngroup.id=echo\nkafka.bootstrap.servers={bootstrap}\n")
log = open(f"{run}/echo.log", "w", encoding="utf-8")
worker = subprocess.Popen([loramill, "worker", "-c", f"{run}/echo.properties"], stderr=log, stdout=log)
c = Consumer({"bootstrap.servers": bootstrap, "group.id": "reader"})
parts = c.list_topics("replies", timeout=10).topics["replies"].partitions
c.assign([TopicPartition("replies", i, 0) for i in parts])
seen, first, last, end = 0, None, None, time.time() + 180
while seen < n and time.time() < end and worker.poll() is None:
    for m in c.consume(1000, timeout=1):
        if not m.error():
            t = m.timestamp()[1]
            first, last, seen = min(first or t, t), max(last or t, t), seen + 1
worker.terminate()
status = worker.wait(30)
assert seen == n, f"{seen} of {n} replies; see {run}/echo.log"
assert status == 0, f"the worker ended with {status}"
print(json.dumps({"name": "kafka_echo", "value": round(n / max(last - first, 1) * 1000, 1),
                  "unit": "messages/s", "peer": None, "ratio": None}))
