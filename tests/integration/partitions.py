# SPDX-License-Identifier: Apache-2.0
"""partitions.py BOOTSTRAP COMMAND ...

  big GROUP TOPIC BYTES            commit with so many bytes of metadata; exit 1 when it is refused
  delete TOPIC OFFSET              delete partition 0's records below OFFSET
  grow TOPIC NEW                   one partition more for TOPIC, and a topic NEW, with a prompt in each
  attempts MAX-MS, deadline MAX-MS prompts whose engine fails for a while, or for good; TAP
  streams TOPIC                    streamed replies whose first generation fails at its end; TAP
"""
import json
import sys
import time

import trouble as t
from confluent_kafka import KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic
from delivery import client
from trouble import Reader, body, check, header, send


def big(group, topic, size):
    c = client(t.bootstrap, group)
    text = "x" * (int(size) - 1)        # Python's client sends the NUL at the end, too
    try:
        c.commit(offsets=[TopicPartition(topic, 0, 0, text)], asynchronous=False)
    except KafkaException as e:
        print("#", e.args[0].name())
        t.failed = True
    c.close()


def delete(topic, offset):
    admin = AdminClient({"bootstrap.servers": t.bootstrap})
    list(admin.delete_records([TopicPartition(topic, 0, int(offset))]).values())[0].result(20)


def grow(topic, new):
    admin = AdminClient({"bootstrap.servers": t.bootstrap})
    last = len(admin.list_topics(topic, timeout=10).topics[topic].partitions)
    admin.create_partitions([NewPartitions(topic, last + 1)])[topic].result(20)
    admin.create_topics([NewTopic(new, 1)])[new].result(20)
    # Straight to the partitions, which this client has not heard of yet either.
    for name, partition in ((topic, last), (new, 0)):
        end = time.time() + 20
        while not send_to(name, partition) and time.time() < end:
            time.sleep(0.2)


def send_to(topic, partition):
    sent = []
    p = Producer({"bootstrap.servers": t.bootstrap, "log_level": 3, "message.timeout.ms": 5000})
    p.produce(topic, json.dumps({"id": f"{topic}-{partition}", "prompt": "x"}), partition=partition,
              on_delivery=lambda e, m: e or sent.append(m))
    p.flush(10)
    return sent


def retries():
    """FAIL-2 heals; FAIL-99 never does within the worker's limit: a dead letter then. How long that took."""
    r = Reader("replies", "dead")
    start = time.time() * 1000
    send([({"id": "heals", "prompt": "FAIL-2"}, []), ({"id": "never", "prompt": "FAIL-99"}, []),
          ({"id": "well", "prompt": "x"}, [])])
    got = r.until(lambda s: len(s) == 3)
    done = {(header(m, "loramill-request-id") or json.loads(m.value())["id"].encode()).decode(): m
            for m in got}
    check("what heals is answered, and its neighbour", len(got) == 3
          and done["heals"].topic() == done["well"].topic() == "replies"
          and body(done["heals"])["choices"][0]["text"] == "FAIL-2", sorted(done))
    dead = done["never"]
    took = dead.timestamp()[1] - start
    check(f"what does not is a dead letter, out_of_memory, after {took:.0f} ms",
          dead.topic() == "dead" and header(dead, "loramill-error-code") == b"out_of_memory")
    return took


def attempts(max_ms):
    took, limit = retries(), float(max_ms)
    check(f"long before the deadline of {limit:.0f} ms", took < limit)


def deadline(max_ms):
    took, limit = retries(), float(max_ms)
    # backoff is at most 200 ms; the rest is a busy machine
    check(f"at the deadline of {limit:.0f} ms", limit - 250 <= took <= limit + 8000)


def streams(topic):
    """What was streamed of a generation that failed stays where it is; the next one is streamed anew, from 0
    and together, to a partition of its own choice, which may be the same (of twelve)."""
    moved = 0
    for n in t.attempts():
        moved += streams_once(topic, [f"s-{n}-{i}" for i in range(8)])
        if moved:
            break
    check(f"the second generation need not be where the first was ({moved} are not)", moved > 0)


def streams_once(topic, ids):
    r = Reader(topic, "dead")
    send([({"id": i, "prompt": "BREAKS ->", "stream": True,
            "params": {"max_tokens": 60, "ignore_eos": True}}, []) for i in ids])
    finals = lambda s: [m for m in s if not header(m, "loramill-part")]
    got = r.until(lambda s: len(finals(s)) >= len(ids))
    check("each is answered, in the second attempt", sorted(body(m)["id"] for m in finals(got)) == ids
          and all(m.topic() == topic for m in got), len(finals(got)))
    moved = 0
    for i in ids:
        runs = {}
        for m in got:
            d = body(m)
            if d["id"] == i:
                runs.setdefault(d["stream"]["generation"], []).append((m.partition(), d))
        where = [{p for p, _ in x} for x in runs.values()]
        last = next(x for x in runs.values() if x[-1][1]["stream"]["final"])
        text = "".join(d["choices"][0]["text"] for _, d in last[:-1])
        check(f"{i}: two generations, each in order from 0 in one partition, the second one whole", len(runs) == 2
              and all([d["stream"]["seq"] for _, d in x] == list(range(len(x))) for x in runs.values())
              and all(len(p) == 1 for p in where) and text == last[-1][1]["choices"][0]["text"] != "",
              (where, len(last)))
        moved += len(set.union(*where)) > 1
    return moved


if __name__ == "__main__":
    globals()[sys.argv[2]](*sys.argv[3:])
    sys.exit(1 if t.failed else 0)
