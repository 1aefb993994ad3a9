# SPDX-License-Identifier: Apache-2.0
"""Numbered prompts in, outcomes out: what the delivery tests ask of a broker.

  delivery.py produce BOOTSTRAP TOPIC FIRST COUNT [ADAPTER EVERY]   ids p-FIRST..; every EVERYth
                                                        names ADAPTER; key = number modulo 50
  delivery.py wait BOOTSTRAP TOPICS COUNT SECONDS       until COUNT distinct ids have an outcome
  delivery.py verify BOOTSTRAP TOPICS FIRST COUNT REPEATS   TAP: each id has outcomes, of one kind, none
                                                        half made (for prompts without a deadline or
                                                        an order to cancel), and at most REPEATS come
                                                        twice (all: -1)
  delivery.py try                                       TAP: that verify finds what is half made
  delivery.py age BOOTSTRAP TOPICS MS                   TAP: what was answered twice had its first
                                                        answer less than MS before its worker's last,
                                                        not counting when that answered nothing
  delivery.py count BOOTSTRAP TOPICS PREFIX N           exit 0 when N records' ids begin so
  delivery.py committed BOOTSTRAP GROUP TOPIC PARTITION     prints "OFFSET METADATA"
  delivery.py commit BOOTSTRAP GROUP TOPIC PARTITION OFFSET METADATA    the group must be empty
  delivery.py order BOOTSTRAP TOPICS COUNT              TAP: replies of a key come in order
  delivery.py whole BOOTSTRAP TOPICS COUNT TOKENS       TAP: COUNT ids have one reply each, with as many
                                                        tokens, ended by length
  delivery.py workers BOOTSTRAP TOPICS                  prints who wrote the replies

TOPICS is comma-separated. Everything is read with read_committed.
"""
import collections
import json
import re
import sys
import time

from confluent_kafka import Consumer, Producer, TopicPartition


def client(bootstrap, group, **more):
    return Consumer({"bootstrap.servers": bootstrap, "group.id": group, "log_level": 3,
                     "enable.auto.commit": False, "auto.offset.reset": "earliest",
                     "isolation.level": "read_committed", **more})


def produce(bootstrap, topic, first, count, adapter=None, every="0"):
    errors = []
    p = Producer({"bootstrap.servers": bootstrap, "linger.ms": 5, "enable.idempotence": True,
                  "partitioner": "murmur2_random", "queue.buffering.max.messages": 200000})
    for i in range(int(first), int(first) + int(count)):
        prompt = {"id": f"p-{i}", "prompt": f"number {i}"}
        if adapter and i % int(every) == 0:
            prompt["adapter"] = adapter
        while True:
            try:
                p.produce(topic, key=str(i % 50), value=json.dumps(prompt).encode(),
                          on_delivery=lambda e, m: e and errors.append(e))
                break
            except BufferError:
                p.poll(0.1)
        p.poll(0)
    left = p.flush(60)
    assert not errors and not left, (errors[:3], left)


def partitions(c, topics):
    """A broker that has just started may not know its topics yet (2.8 with ZooKeeper)."""
    for _ in range(60):
        md = c.list_topics(timeout=10)
        if all(t in md.topics and md.topics[t].partitions for t in topics.split(",")):
            break
        time.sleep(0.5)
    return [TopicPartition(t, p, 0) for t in topics.split(",") for p in md.topics[t].partitions]


def record_id(m):
    return json.loads(m.value())["id"]


def read_all(bootstrap, topics):
    """Every committed record of the topics up to their ends now."""
    c = client(bootstrap, "oracle", **{"enable.partition.eof": True})
    open_parts = partitions(c, topics)
    c.assign(open_parts)
    left, idle = len(open_parts), 0
    while left and idle < 15:
        messages = c.consume(1000, timeout=1.0)
        idle = 0 if messages else idle + 1
        for m in messages:
            if m.error():
                left -= m.error().name() == "_PARTITION_EOF"
            else:
                yield m
    c.close()


def wait(bootstrap, topics, count, seconds):
    c, seen, start = client(bootstrap, "oracle"), set(), time.time()
    c.assign(partitions(c, topics))
    while time.time() - start < float(seconds):
        for m in c.consume(1000, timeout=0.2):
            if not m.error():
                seen.add(record_id(m))
        if len(seen) >= int(count):
            print(f"# {len(seen)} outcomes after {time.time() - start:.1f} s")
            return 0
    print(f"# only {len(seen)} of {count} outcomes after {seconds} s")
    return 1


def half_made(value):
    """Is it a completion whose generation ended before its time? A dead letter has no choices; an
    echo is whole when its tokens are those of its text."""
    r = json.loads(value)
    choices, tokens = r.get("choices", []), r.get("usage", {}).get("completion_tokens", 0)
    if choices and r["model"] == "echo":
        sizes = [-(-len(c["text"].encode()) // 4) for c in choices]
        return sum(sizes) != tokens or any(c["finish_reason"] != "stop" for c in choices)
    return any(c["finish_reason"] not in ("stop", "length") or not tokens for c in choices)


def try_it():
    def found(reason, tokens, model="storefront", text="number 7"):
        return half_made(json.dumps({"model": model, "usage": {"completion_tokens": tokens},
                                     "choices": [{"text": text, "finish_reason": reason}]}))
    good = not (found("length", 5) or found("stop", 5) or found("stop", 2, "echo") or
                half_made('{"id": "p-7", "prompt": "number 7"}'))
    bad = all((found("cancelled", 5), found("expired", 5), found("part", 5), found("length", 0),
               found("length", 2, "echo"), found("stop", 2, "echo", "num")))
    print("ok" if good and bad else "not ok", "- what is half made is found, and nothing else")
    return 0 if good and bad else 1


def verify(bootstrap, topics, first, count, repeats):
    got, half = collections.defaultdict(list), []
    for m in read_all(bootstrap, topics):
        got[record_id(m)].append(m.topic())
        if half_made(m.value()):
            half.append(m.value()[:200])
    want = {f"p-{i}" for i in range(int(first), int(first) + int(count))}
    lost = sorted(want - set(got))
    strange = sorted(set(got) - want)
    mixed = sorted(i for i in got if len(set(got[i])) > 1)
    extra = sum(len(x) - 1 for x in got.values())
    print(f"# {len(got)} ids, {sum(map(len, got.values()))} outcomes, {extra} repeats; lost "
          f"{lost[:5]}, strange {strange[:5]}, mixed {mixed[:5]}, half made {half[:5]}")
    limit = int(repeats)
    good = not lost and not strange and not mixed and not half
    print("ok" if good else "not ok", "- every id has its outcome, of one kind and whole")
    few = limit < 0 or extra <= limit
    print("ok" if few else "not ok", f"- at most {limit} repeats" if limit >= 0 else "- repeats are "
          "allowed")
    return 0 if good and few else 1


def at_work(times, start):
    """How long somebody was at work since then who answered at these times: between two answers for 50 ms at
    most. A machine that stands still adds nothing to what a crash repeats."""
    later = sorted(t for t in times if t >= start)
    return sum(min(b - a, 50) for a, b in zip(later, later[1:]))


def age(bootstrap, topics, ms):
    first, times, repeats, oldest = {}, collections.defaultdict(set), 0, 0
    records = [(json.loads(m.value()), m.timestamp()[1]) for m in read_all(bootstrap, topics)]
    for r, t in records:
        times[r["worker"]].add(t)
    again = collections.defaultdict(list)
    for r, t in records:
        if r["id"] in first:
            worker, at = first[r["id"]]
            repeats += 1
            again[worker].append(at)
        else:
            first[r["id"]] = r["worker"], t
    oldest = max((at_work(times[w], min(x)) for w, x in again.items()), default=0)
    print(f"# {repeats} repeats; the oldest was answered {oldest} ms before its worker ended")
    good = oldest <= int(ms)
    print("ok" if good else "not ok", f"- only the last {ms} ms of a killed worker run again")
    return 0 if good else 1


def count(bootstrap, topics, prefix, n):
    return sum(record_id(m).startswith(prefix) for m in read_all(bootstrap, topics)) != int(n)


def committed(bootstrap, group, topic, partition):
    """The client reads metadata up to a NUL that librdkafka does not put there (2.15.1,
    rd_kafka_topic_partition_list_update): what follows is cut off, and asked again where it is no
    text."""
    for _ in range(50):
        try:
            c = client(bootstrap, group)
            got = c.committed([TopicPartition(topic, int(partition))], timeout=10)[0]
            print(got.offset, re.match(r"[ -~]*", got.metadata or "")[0])
            return 0
        except UnicodeDecodeError:
            continue
    return 1


def commit(bootstrap, group, topic, partition, offset, metadata):
    c = client(bootstrap, group)
    c.commit(offsets=[TopicPartition(topic, int(partition), int(offset), metadata)],
             asynchronous=False)
    c.close()
    return 0


def order(bootstrap, topics, count):
    last, bad, n = {}, [], 0
    for m in read_all(bootstrap, topics):
        number, key = int(record_id(m)[2:]), m.key()
        n += 1
        if last.get(key, -1) >= number:
            bad.append((key, last[key], number))
        last[key] = number
    good = not bad and n == int(count)
    print(f"# {n} replies, {len(last)} keys; out of order {bad[:5]}")
    print("ok" if good else "not ok", "- replies of a key come in the order of its prompts")
    return 0 if good else 1


def whole(bootstrap, topics, count, tokens):
    got = [json.loads(m.value()) for m in read_all(bootstrap, topics)]
    cut = [(d["id"], d["usage"]["completion_tokens"], sorted({c["finish_reason"] for c in d["choices"]}))
           for d in got if d["usage"]["completion_tokens"] != int(tokens)
           or {c["finish_reason"] for c in d["choices"]} != {"length"}]
    ids = {d["id"] for d in got}
    print(f"# {len(got)} replies, {len(ids)} ids; cut off {cut[:5]}")
    good = not cut and len(got) == len(ids) == int(count)
    print("ok" if good else "not ok", f"- each is answered once, with all of its {tokens} tokens")
    return 0 if good else 1


def workers(bootstrap, topics):
    print(*sorted({json.loads(m.value())["worker"] for m in read_all(bootstrap, topics)}))
    return 0


if __name__ == "__main__":
    command = "try_it" if sys.argv[1] == "try" else sys.argv[1]
    sys.exit(globals()[command](*sys.argv[2:]))
