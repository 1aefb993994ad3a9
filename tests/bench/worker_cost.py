# SPDX-License-Identifier: Apache-2.0
"""worker_cost.py LORAMILL LOOP RUN N: what a message costs a worker, beside a minimal client loop.

N prompts of about 1 KiB through the embedded broker of `loramill dev` and one worker with the echo
engine, in JSON and in Avro; and through tests/bench/kafka_loop.c. Unlike messages a second this can
be compared on a machine with other work: prints one JSON line a figure, microseconds of CPU a
message (user and system, start and end of the process left out as far as it goes), with each
thread's share; or with COST=instructions thousands of instructions by callgrind, start-up counted.
"""
import glob
import http.server
import json
import os
import subprocess
import sys
import threading
import time

from confluent_kafka import Consumer, Producer, TopicPartition

import prompts

loramill, loop, run, n = sys.argv[1:4] + [int(sys.argv[4])]
INSTRUCTIONS = os.environ.get("COST") == "instructions"
schemas = []


class Registry(http.server.BaseHTTPRequestHandler):
    """As much of a schema registry as a worker asks for."""

    def answer(self, body):
        body = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer({"schema": schemas[int(self.path.split("?")[0].split("/")[3]) - 1]})

    def do_POST(self):
        schema = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["schema"]
        if schema not in schemas:
            schemas.append(schema)
        self.answer({"id": schemas.index(schema) + 1, "version": 1, "schema": schema,
                     "subject": self.path.split("/")[2]})

    def log_message(self, *args):
        pass


def start_broker():
    child = subprocess.Popen([loramill, "dev", "--dir", f"{run}/dev"], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    path = f"{run}/dev/loramill.properties"
    while not os.path.exists(path):
        time.sleep(0.05)
    lines = open(path, encoding="utf-8").read().splitlines()
    return child, next(x.split("=", 1)[1] for x in lines
                       if x.startswith("kafka.bootstrap.servers="))


def fill(bootstrap):
    schemas.append(open("schemas/prompt.avsc", encoding="utf-8").read())
    p = Producer({"bootstrap.servers": bootstrap})
    for name in ("dead", "r-loop", "r-json", "r-avro"):
        p.list_topics(name, timeout=10)         # makes it
    prompts.fill(bootstrap, n, schemas[0], 1)


def command(name, bootstrap, registry):
    source = "p-avro" if name == "avro" else "p-json"
    if name == "loop":
        return [loop, bootstrap, "g-loop", source, "r-loop"]
    path = f"{run}/{name}.properties"
    with open(path, "w", encoding="utf-8") as f:
        f.write(f"engine.mode=echo\ntopics.prompts={source}\ntopics.replies=r-{name}\n"
                f"topics.dead_letters=dead\ngroup.id=g-{name}\nhttp.port=0\nlog.level=warn\n"
                f"kafka.bootstrap.servers={bootstrap}\nregistry.url={registry}\n"
                f"journal.dir={run}/journal\n")
    return [loramill, "worker", "-c", path]


def threads(pid):
    """Microseconds of CPU of each thread, most first."""
    all = []
    for task in glob.glob(f"/proc/{pid}/task/*"):
        try:
            spent = int(open(f"{task}/schedstat", encoding="ascii").read().split()[0])
            all.append((spent / 1000, open(f"{task}/comm", encoding="utf-8").read().strip()))
        except FileNotFoundError:
            pass
    return sorted(all, reverse=True)


def measure(name, bootstrap, registry):
    out = f"{run}/{name}.cg"
    before = ["valgrind", "--quiet", "--tool=callgrind", "--separate-threads=yes",
              f"--callgrind-out-file={out}"] if INSTRUCTIONS else []
    with open(f"{run}/{name}.log", "w", encoding="utf-8") as log:
        child = subprocess.Popen(before + command(name, bootstrap, registry), stderr=log,
                                 stdout=log)
    c = Consumer({"bootstrap.servers": bootstrap, "group.id": "reader-" + name})
    c.assign([TopicPartition("r-" + name, i, 0) for i in range(4)])
    seen, end = 0, time.time() + 300
    while seen < n and time.time() < end and child.poll() is None:
        seen += sum(not m.error() for m in c.consume(5000, timeout=1))
    c.close()
    spent = threads(child.pid)
    child.terminate()
    status = child.wait(60)
    assert status == 0 and seen == n, f"{name}: status {status}, {seen} of {n}; see {log.name}"
    if not INSTRUCTIONS:
        return {"unit": "us", "value": round(sum(s for s, _ in spent) / n, 2),
                "threads": [[t, round(s / n, 2)] for s, t in spent if s / n >= 0.05]}
    counts = [line.split() for part in glob.glob(out + "-*")
              for line in open(part, encoding="utf-8", errors="replace")
              if line.startswith("summary:")]
    return {"unit": "1000 instructions",
            "value": round(sum(int(count[1]) for count in counts) / n / 1000, 1)}


os.makedirs(run, exist_ok=True)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=server.serve_forever, daemon=True).start()
broker, address = start_broker()
try:
    fill(address)
    for what in ("loop", "json", "avro"):
        print(json.dumps({"name": f"worker_cost_{what}", **measure(
            what, address, f"http://127.0.0.1:{server.server_port}")}), flush=True)
finally:
    broker.terminate()
