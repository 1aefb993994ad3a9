# SPDX-License-Identifier: Apache-2.0
"""trouble.py BOOTSTRAP CASE ...: what a worker does in trouble, seen by a plain Python client.

Each case produces its prompts, reads the outcomes, prints TAP lines and exits 1 on any failure.
Topics: prompts, replies, asked (allowed as a reply topic), secret (not allowed), dead, control.
"""
import functools
import io
import json
import os
import sys
import time
import urllib.request
import uuid

from confluent_kafka import KafkaError, Producer, TopicPartition
from delivery import client, partitions

ALL = 1 << 60
# Seconds of work; of engine.max_seqs=64 all.
LONG = {"max_tokens": 460, "ignore_eos": True, "n": 64, "temperature": 1}
bootstrap = sys.argv[1]
failed = False


def check(what, good, detail=None):
    global failed
    print("ok" if good else "not ok", "-", what, "" if good or detail is None else f"({detail})")
    failed = failed or not good


def header(m, name):
    return dict(m.headers() or []).get(name)


class Reader:
    """What comes into some topics from now on, or with what is there: all, or the last `before` of a
    partition."""

    def __init__(self, *topics, before=0):
        self.c = client(bootstrap, uuid.uuid4().hex, **{"enable.partition.eof": True})
        self.parts = partitions(self.c, ",".join(topics))
        for tp in self.parts:
            low, high = self.c.get_watermark_offsets(tp, timeout=30)
            tp.offset = max(low, high - before)
        self.c.assign(self.parts)
        self.at = {(tp.topic, tp.partition): tp.offset for tp in self.parts}
        self.seen = []

    def until(self, done, seconds=120):
        """All records so far, once done(records) holds or the time is over."""
        end = time.time() + seconds
        while time.time() < end and not done(self.seen):
            for m in self.c.consume(100, timeout=0.2):
                if not m.error():
                    self.at[m.topic(), m.partition()] = m.offset() + 1
                    self.seen.append(m)
                elif m.error().code() == KafkaError._PARTITION_EOF:
                    self.at[m.topic(), m.partition()] = m.offset()
        return self.seen

    def rest(self):
        """The same, with all that is there now; what was sent before may need a moment to be there."""
        time.sleep(0.5)
        ends = {(tp.topic, tp.partition): self.c.get_watermark_offsets(tp, timeout=30)[1] for tp in self.parts}
        return self.until(lambda s: all(self.at[where] >= end for where, end in ends.items()), 30)


def send(records, topic="prompts", ahead_s=0):
    """records: (value, headers[, key[, partition]]); a value that is not bytes goes as JSON. Without a
    partition it is the key's, and without a key any. As by a clock that is `ahead_s` fast."""
    p = Producer({"bootstrap.servers": bootstrap, "linger.ms": 1})
    for value, headers, *where in records:
        if value is not None and not isinstance(value, bytes):
            value = json.dumps(value).encode()
        key, partition = (where + [None, -1][len(where):])[:2]
        p.produce(topic, value=value, headers=headers, key=key, partition=partition,
                  timestamp=int(1000 * (time.time() + ahead_s)))
    p.flush(30)


@functools.cache
def schema(number):
    with urllib.request.urlopen(f"{os.environ['REGISTRY']}/schemas/ids/{number}", timeout=10) as r:
        return json.loads(json.load(r)["schema"])


def decode(value):
    """A completion in JSON, or in Avro with a schema's id; what it has not is absent in both."""
    if value[:1] != b"\0":
        return json.loads(value)
    import fastavro
    doc = fastavro.schemaless_reader(io.BytesIO(value[5:]), schema(int.from_bytes(value[1:5], "big")))
    return {name: x for name, x in doc.items() if x is not None}


def body(m):
    return decode(m.value())


def attempts(n=5):
    """Some claims are about what is under way when something else happens, which a machine that stands
    still for seconds may miss. Such a case says which attempts were none, and makes another."""
    for i in range(n):
        yield i
    check(f"one of {n} attempts was in time", False)


def stream():
    """Parts in order, their text is the final record's, several choices, several prompts at once."""
    r = Reader("replies", "dead")
    run = uuid.uuid4().hex[:6]
    prompts = [{"id": f"{run}-{i}", "prompt": "event: order_placed | name: Ana ->", "stream": True,
                "params": {"max_tokens": 400, "n": 1 + i % 2, "ignore_eos": True, "temperature": 1}}
               for i in range(8)]
    prompts.append({"id": f"{run}-whole", "prompt": "event: order_placed ->",
                    "params": {"max_tokens": 8}})
    send([(p, [("kafka_correlationId", b"\0" + p["id"].encode())], p["id"]) for p in prompts])

    def finals(records):
        return [m for m in records if body(m).get("stream", {}).get("final", True)]

    got = r.until(lambda s: len(finals(s)) == len(prompts))
    check("every prompt has one final record", len(finals(got)) == len(prompts), len(finals(got)))
    n_parts = 0
    for p in prompts:
        mine = [m for m in got if m.key().decode() == p["id"]]
        docs = [body(m) for m in mine]
        final, parts = docs[-1], docs[:-1]
        n_parts += len(parts)
        if not p.get("stream"):
            check("a prompt that did not ask gets no parts", not parts and "stream" not in final)
            continue
        n = p["params"]["n"]
        texts = ["".join(c["text"] for d in parts for c in d["choices"] if c["index"] == i)
                 for i in range(n)]
        good = (len({m.partition() for m in mine}) == 1 and final["stream"]["final"]
                and [d["stream"]["seq"] for d in parts] == list(range(len(parts)))
                and final["stream"]["seq"] == len(parts)
                and {d["stream"]["generation"] for d in docs} == {final["stream"]["generation"]}
                and texts == [c["text"] for c in final["choices"]]
                and all(c["finish_reason"] == "part" for d in parts for c in d["choices"])
                and all(header(m, "kafka_correlationId") == b"\0" + p["id"].encode() for m in mine)
                and [header(m, "loramill-part") for m in mine]
                == [str(i).encode() for i in range(len(parts))] + [None])
        check(f"{p['id']}: {len(parts)} parts in order are the text of the final record", good,
              [d["stream"] for d in docs])
    check(f"there were parts ({n_parts})", n_parts >= 16)


def stream_dies(pid, run):
    """A worker that is killed between two parts of a reply. It is stopped first: a reply that had ended
    by then is another prompt's turn, and of the last one there is no end when the worker dies."""
    import signal
    for i in attempts():
        r = Reader("replies")
        send([({"id": f"{run}-{i}", "prompt": "event ->", "stream": True, "params": LONG}, [])],
             "streamed")
        r.until(lambda s: len(s) >= 3)
        os.killpg(int(pid), signal.SIGSTOP)
        got = r.rest()
        ended = not all(header(m, "loramill-part") for m in got)
        os.killpg(int(pid), signal.SIGCONT if ended else signal.SIGKILL)
        if not ended:
            check("parts came before the kill, and no end", len(got) >= 3, len(got))
            return


def stream_heir():
    """What comes of its prompt: the parts of two runs, told apart, and one final record. The prompt has no
    key, so that its replies' partition is the worker's choice: one for all parts of a run."""
    r = Reader("replies", before=ALL)
    run = body(Reader("streamed", before=1).until(lambda s: s)[0])["id"]
    mine = lambda s: [(body(m), m.partition()) for m in s if body(m)["id"] == run]
    r.until(lambda s: any(d["stream"]["final"] for d, _ in mine(s)))
    runs = {}
    for d, partition in mine(r.rest()):
        runs.setdefault(d["stream"]["generation"], []).append((d, partition))
    final = [d for x in runs.values() for d, _ in x if d["stream"]["final"]]
    check("one final record", len(final) == 1, len(final))
    check("two generations, each with its parts in order from 0", len(runs) == 2 and all(
        [d["stream"]["seq"] for d, _ in x] == list(range(len(x))) for x in runs.values()),
        [[d["stream"]["seq"] for d, _ in x][:20] for x in runs.values()])
    check("each in one partition", all(len({p for _, p in x}) == 1 for x in runs.values()))
    last = [d for d, _ in runs[final[0]["stream"]["generation"]][:-1]]
    texts = [("".join(x["text"] for d in last for x in d["choices"] if x["index"] == c["index"]), c["text"])
             for c in final[0]["choices"]]
    check("the last one's are the text of the final record", len(last) > 0 and
          all(parts == whole for parts, whole in texts),
          [len(last)] + [(parts, whole) for parts, whole in texts if parts != whole][:2])


def java_partition(key, n):
    """Where Java clients put a record with this key, of n partitions: by murmur2."""
    m, bits = 0x5bd1e995, 0xffffffff
    h = 0x9747b28c ^ len(key)
    whole = len(key) // 4 * 4
    for i in range(0, whole, 4):
        k = int.from_bytes(key[i:i + 4], "little") * m & bits
        h = h * m & bits ^ (k ^ k >> 24) * m & bits
    if key[whole:]:
        h = (h ^ int.from_bytes(key[whole:], "little")) * m & bits
    h = (h ^ h >> 13) * m & bits
    return ((h ^ h >> 15) & 0x7fffffff) % n


def texts_of(docs):
    """The text of each choice, from the parts of a reply."""
    texts = {}
    for c in (c for d in docs for c in d["choices"]):
        texts[c["index"]] = texts.get(c["index"], "") + c["text"]
    return texts


def going_away(n):
    """Four keys, one of them none, and their partitions: of n, all different, and none is 0, the one that
    stays. The worker's partitioner=murmur2 puts what has no key where an empty one belongs."""
    keys = {java_partition(b"", n): None}
    for i in range(1000):
        key = f"key {i}".encode()
        keys.setdefault(java_partition(key, n), key)
    assert keys.pop(0, None) and None in keys.values()
    return [(key, p) for p, key in keys.items()][:4]


def stream_shrinks(pid, run):
    """A topic is made again with one partition of twelve while parts of four replies go to others of them.
    The prompts name no partition, so that the worker, who chose, may choose anew; it chooses by key, and
    the keys are such that all are of partitions that go away. The worker stands still meanwhile: it sees
    the new topic only. A reply of which it may have had all texts by then has no parts to come: such an
    attempt is none."""
    import signal
    from confluent_kafka.admin import AdminClient, NewTopic
    topic, chosen = "shrinking", going_away(12)
    final = lambda s: sorted(body(m)["id"] for m in s if not header(m, "loramill-part"))
    for n in attempts(10):
        r = Reader(topic)
        ids = [f"{run}-{n}-{i}" for i in range(4)]
        send([({"id": i, "prompt": "event ->", "stream": True, "params": {**LONG, "n": 16}}, [], key)
              for i, (key, _) in zip(ids, chosen)], "streamed")
        r.until(lambda s: {body(m)["id"] for m in s} >= set(ids))
        os.killpg(int(pid), signal.SIGSTOP)
        begun = {i: [m for m in r.rest() if body(m)["id"] == i] for i in ids}
        # A token has a character at least, all but always: so many are far from the end.
        longest = max((len(t) for x in begun.values() for t in texts_of(map(body, x)).values()), default=0)
        print(f"# attempt {n}: stopped after {longest} characters of {LONG['max_tokens']} tokens")
        if longest < LONG["max_tokens"] * 3 // 4 and not final(r.seen):
            break
        os.killpg(int(pid), signal.SIGCONT)
        r.until(lambda s: final(s) == ids)
    check("each has begun, in a partition of its key, which goes away",
          [{m.partition() for m in begun[i]} for i in ids] == [{p} for _, p in chosen],
          [[m.partition() for m in x] for x in begun.values()])
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 3})
    admin.delete_topics([topic])[topic].result(20)
    while True:
        try:
            admin.create_topics([NewTopic(topic, 1)])[topic].result(20)
            break
        except Exception:                       # it is there still
            time.sleep(0.1)
    while topic not in admin.list_topics(timeout=10).topics:
        time.sleep(0.1)
    os.killpg(int(pid), signal.SIGCONT)
    r = Reader(topic, before=ALL)
    got = r.until(lambda s: len(final(s)) == len(ids), 90)
    check("each has one final record in the new topic", final(got) == ids, final(got))
    for i in ids:
        docs = [body(m) for m in got if body(m)["id"] == i]
        whole, rest = docs[-1], docs[:-1]
        seqs = [d["stream"]["seq"] for d in docs]
        texts = texts_of(rest)
        check(f"{i}: parts {seqs[0]} to {seqs[-1] - 1} in order, the end of the final record's text",
              seqs == list(range(seqs[0], seqs[0] + len(docs))) and len(rest) > 0
              and len({d["stream"]["generation"] for d in docs}) == 1
              and all(c["text"].endswith(texts.get(c["index"], "")) for c in whole["choices"]), seqs)


def errors():
    """A waiting requester is told of a dead letter; nobody else is."""
    r = Reader("replies", "asked", "dead", "secret")
    run = uuid.uuid4().hex[:6]
    corr = b"\x00\xff" + run.encode()
    send([({"id": f"{run}-a", "prompt": "x", "adapter": "nobody"}, [("kafka_correlationId", corr)]),
          ({"id": f"{run}-b", "prompt": "x", "tpyo": 1, "reply_topic": "asked"},
           [("kafka_replyTopic", b"asked"), ("kafka_replyPartition", b"\0\0\0\1")]),
          ({"id": f"{run}-c", "prompt": "x", "adapter": "nobody"}, []),
          (b"not json", [("correlation-id", b"n")]),
          ({"id": f"{run}-d", "prompt": "x"}, [("kafka_replyTopic", b"secret"),
                                               ("kafka_correlationId", corr)])])
    got = r.until(lambda s: len(s) >= 8)
    got = r.until(lambda s: len(s) > 8, 2)
    dead = [m for m in got if m.topic() == "dead"]
    notes = {header(m, "loramill-request-id").decode(): m for m in got if m.topic() != "dead"}
    check("five dead letters", len(dead) == 5, len(dead))
    check("a topic that is there and not allowed is denied, and gets nothing",
          [header(m, "loramill-error-code") for m in dead if header(m, "kafka_replyTopic") == b"secret"]
          == [b"denied"] and "secret" not in {m.topic() for m in got}, [m.topic() for m in got])
    check("three error replies, none for nobody or a forbidden topic",
          set(notes) == {f"{run}-a", f"{run}-b", ""}, list(notes))
    a, b = body(notes[f"{run}-a"]), notes[f"{run}-b"]
    check("it says why, in body and headers", a["error"]["code"] == "not_found" and a["choices"] == []
          and header(notes[f"{run}-a"], "loramill-error-code") == b"not_found"
          and header(notes[f"{run}-a"], "kafka_correlationId") == corr, a)
    check("it goes where the prompt asked", b.topic() == "asked" and b.partition() == 1)
    check("a prompt that can't be read gets one too",
          body(notes[""])["error"]["code"] == "malformed"
          and header(notes[""], "correlation-id") == b"n")


def cancel(loramill, properties):
    """An order finds its prompt in the topic, in the queue and in the engine, although the clock of who sent
    the prompts is fast; an id can come back, control.skew_ms later."""
    import subprocess
    r = Reader("replies", "dead")
    run = uuid.uuid4().hex[:6]

    def order(*ids):
        done = subprocess.run([loramill, "cancel", "-c", properties, *ids], capture_output=True,
                              text=True)
        check(f"loramill cancel ends with 0: {done.stderr.strip()}", done.returncode == 0)

    def finish(records):
        return {body(m)["id"]: body(m)["choices"][0]["finish_reason"] for m in records}

    # engine.max_waiting=4: one runs, three wait in the engine, the others before
    for attempt in attempts():
        ids = [f"{run}-{attempt}-{i}" for i in range(8)]
        send([({"id": i, "prompt": "event: order_placed ->", "params": LONG, "stream": i == ids[0]},
               [], "same") for i in ids], ahead_s=5)
        r.until(lambda s: any(body(m)["id"] == ids[0] for m in s))
        order(ids[0], ids[3], ids[7], "nobody-has-this")
        ordered = 1000 * time.time()
        final = lambda s: [m for m in s if body(m)["id"] in ids and not header(m, "loramill-part")]
        outcomes = final(r.until(lambda s: len(final(s)) == 8, 180))
        got = finish(outcomes)
        # An order takes a moment on its way.
        if not [m for m in outcomes if body(m)["id"] == ids[0] and got[ids[0]] == "length"
                and m.timestamp()[1] < ordered + 2000]:
            break
    check("cancelled in the engine, in its queue and before it; the others are answered",
          [got.get(i) for i in ids] == ["cancelled", "length", "length", "cancelled", "length",
                                        "length", "length", "cancelled"], got)
    again = Reader("replies", "dead")
    send([({"id": ids[0], "prompt": "event: order_placed ->", "params": {"max_tokens": 2}}, [])],
         ahead_s=61)
    got = finish(again.until(len))
    check("a cancelled id can be used again", got in ({ids[0]: "length"}, {ids[0]: "stop"}), got)
    send([(b"what is this", []), ({"cancel": 7}, []), ({"cancel": "x", "more": 1}, [])], "control")


def cancel_before(loramill, properties, step, run):
    """Prompts and an order are there before the worker starts."""
    if step == "send":
        send([({"id": f"{run}-a", "prompt": "x", "params": {"max_tokens": 400}}, []),
              ({"id": f"{run}-b", "prompt": "x", "params": {"max_tokens": 2}}, [])])
        time.sleep(0.05)
        send([({"cancel": f"{run}-a"}, [])], "control")
        return
    r = Reader("replies", before=ALL)
    mine = lambda s: {body(m)["id"]: body(m) for m in s if body(m)["id"].startswith(run)}
    got = mine(r.until(lambda s: len(mine(s)) == 2))
    a = got.get(f"{run}-a")
    check("an order that was there first is obeyed without the engine",
          a and a["choices"][0]["finish_reason"] == "cancelled" and a["choices"][0]["text"] == ""
          and a["usage"]["completion_tokens"] == 0, a)


def cancel_held(step, run):
    """With delivery.order=key, c waits for b, which waits for a, which waits for an adapter that nobody
    serves. b is cancelled where it is held: by the order of its key, and then by quarantine, when two
    workers have died. In the end a is cancelled too, and what was held goes its way in order. d is of the
    other partition: read again with the others, it would wait behind a in quarantine."""
    r = Reader("replies", "dead")
    mine = lambda s: [body(m) for m in s if (header(m, "loramill-request-id") or b"").startswith(run.encode())]
    if step == "send":
        send([({"id": f"{run}-a", "prompt": "x", "adapter": "away"}, [], "one key", 0),
              ({"id": f"{run}-b", "prompt": "x"}, [], "one key", 0),
              ({"id": f"{run}-c", "prompt": "x"}, [], "one key", 0),
              ({"id": f"{run}-d", "prompt": "x"}, [], None, 1)])
        got = mine(r.until(lambda s: mine(s)))
        check("what is not of that key is answered", [d["id"] for d in got] == [f"{run}-d"], got)
        send([({"cancel": f"{run}-b"}, [])], "control")
        return
    send([({"cancel": f"{run}-a"}, [])], "control")
    got = mine(r.until(lambda s: len(mine(s)) == 3))
    check("cancelled where it was held, after the one before it, and the next is answered",
          [(d["id"][-1], d["choices"][0]["finish_reason"], d["usage"]["completion_tokens"]) for d in got]
          == [("a", "cancelled", 0), ("b", "cancelled", 0), ("c", "stop", 1)], got)
    got = mine(r.until(lambda s: len(mine(s)) > 3, 1))
    check("each has one outcome", len(got) == 3, got)


def expiry():
    """A deadline ends a prompt wherever it is, as a completion."""
    r = Reader("replies", "dead")
    run = uuid.uuid4().hex[:6]
    far = int(time.time() * 1000) + 600000
    send([({"id": f"{run}-past", "prompt": "x", "deadline_ms": far - 600001}, [])]
         + [({"id": f"{run}-default{i}", "prompt": "x", "params": LONG}, []) for i in range(3)]
         + [({"id": f"{run}-fine", "prompt": "x", "deadline_ms": far, "params": {"max_tokens": 2}}, [])])
    got = {body(m)["id"][7:]: body(m) for m in r.until(lambda s: len(s) == 5)}
    reason = {i: d["choices"][0]["finish_reason"] for i, d in got.items()}
    early = ("past", "default0", "default1", "default2")
    check("past and default deadlines expire, a long one does not", {i: reason.get(i) for i in early}
          == dict.fromkeys(early, "expired") and reason.get("fine") in ("stop", "length"), reason)
    first_token(run)


def expiry_under_way():
    """What there was is in the completion: the deadline must be later than the first token and earlier
    than the last, which takes a machine some attempts to find. The worker ends no prompt early."""
    wait, run = 1000, uuid.uuid4().hex[:6]
    for i in attempts(10):
        r = Reader("replies", "dead")
        send([({"id": f"{run}-soon{i}", "prompt": "x", "deadline_ms": int(time.time() * 1000) + wait,
                "params": LONG}, [])])
        c = [body(m)["choices"][0] for m in r.until(len)]
        if c and c[0]["finish_reason"] == "expired" and c[0]["text"]:
            check("too short a deadline expires, and what there was is in the completion", True)
            return
        check("what ends by no deadline is whole, what is empty has expired", c and c[0]["finish_reason"]
              == ("length" if c[0]["text"] else "expired"), c)
        wait = wait * 2 // 3 if c and c[0]["text"] else wait * 2


def expiry_in_line():
    """Behind a full engine and behind others who wait for it: a deadline ends its prompt all the same,
    and an order to cancel ends those before it."""
    r = Reader("replies", "dead")
    run = uuid.uuid4().hex[:6]
    longs = [f"{run}-long{i}" for i in range(4)]
    send([({"id": i, "prompt": "x", "params": LONG}, [], "line") for i in longs]
         + [({"id": f"{run}-late", "prompt": "x", "deadline_ms": int(time.time() * 1000) + 500,
              "params": {"max_tokens": 2}}, [], "line")])
    reasons = lambda s: {body(m)["id"]: body(m)["choices"][0]["finish_reason"] for m in s}
    got = reasons(r.until(lambda s: f"{run}-late" in reasons(s)))
    check("expired before its turn", got.get(f"{run}-late") == "expired" and not set(longs[2:]) & set(got), got)
    send([({"cancel": i}, []) for i in longs], "control")
    got = reasons(r.until(lambda s: len(s) == 5))
    check("those before it are cancelled", [got.get(i) for i in longs[2:]] == ["cancelled"] * 2, got)


def silent_store():
    """The store takes connections and says nothing: what waits for it ends by deadline and by order, long
    before the store is given up, and who needs no adapter is answered."""
    r = Reader("replies", "dead")
    run = uuid.uuid4().hex[:6]
    sent = int(time.time() * 1000)
    send([({"id": f"{run}-late", "prompt": "x", "adapter": "a/b", "deadline_ms": sent + 1000}, []),
          ({"id": f"{run}-order", "prompt": "x", "adapter": "a/c"}, []),
          ({"id": f"{run}-stays", "prompt": "x", "adapter": "a/b"}, []),
          ({"id": f"{run}-free", "prompt": "x"}, [])])
    got = lambda s: {body(m)["id"][7:]: (body(m)["choices"][0]["finish_reason"], m.timestamp()[1] - sent)
                     for m in s}
    seen = got(r.until(lambda s: "free" in got(s)))
    check("who needs no adapter is answered", seen.get("free", ("",))[0] == "stop", seen)
    send([({"cancel": f"{run}-order"}, [])], "control")
    seen = got(r.until(lambda s: len(s) == 3, 25))
    check("expired and cancelled while their adapters are fetched", seen.get("late", ("",))[0] == "expired"
          and seen.get("order", ("",))[0] == "cancelled" and seen["late"][1] > 1000, seen)
    send([({"cancel": f"{run}-stays"}, [])], "control")
    seen = got(r.until(lambda s: len(s) == 4, 25))
    check("who had no deadline waited on", seen.get("stays", ("",))[0] == "cancelled", seen)


def first_token(run):
    """A prompt that has not begun by first_token_by_ms ends, in the queue of a full engine as well;
    one that has begun goes on. If that one ended before the other's time, it was none."""
    far = int(time.time() * 1000) + 600000
    final = lambda s: {body(m)["id"].split("-")[2]: m for m in s if not header(m, "loramill-part")}
    for i in attempts():
        r = Reader("replies", "dead")
        now = int(time.time() * 1000)
        send([({"id": f"{run}-{i}-begun", "prompt": "x", "deadline_ms": far, "stream": True,
                "params": LONG, "first_token_by_ms": now + 30000}, [], "same"),
              ({"id": f"{run}-{i}-past", "prompt": "x", "deadline_ms": far, "first_token_by_ms": now - 1},
               [], "same")])
        parts = r.until(lambda s: any(header(m, "loramill-part") for m in s))
        by = int(time.time() * 1000) + 100
        # These wait for the one that has begun, for a second or more.
        send([({"id": f"{run}-{i}-waits", "prompt": "x", "deadline_ms": far, "first_token_by_ms": by,
                "params": {"max_tokens": 2}}, [], "same"),
              ({"id": f"{run}-{i}-served", "prompt": "x", "deadline_ms": far, "first_token_by_ms": far,
                "params": {"max_tokens": 2, "ignore_eos": True}}, [], "same")])
        got = final(r.until(lambda s: len(final(s)) == 4))
        if "begun" not in got or got["begun"].timestamp()[1] > by + 200:
            break
    got = {k: body(m)["choices"][0] for k, m in got.items()}
    reason = {k: c["finish_reason"] for k, c in got.items()}
    check("first_token_by_ms ends what has not begun, and nothing else", len(parts) > 0 and reason
          == {"begun": "length", "past": "expired", "waits": "expired", "served": "length"}, reason)
    check("what ended so had no text", got["waits"]["text"] == got["past"]["text"] == "")


def claims(kind, content_type="application/json"):
    """Replies that the broker would not take."""
    import hashlib
    r = Reader("replies", "dead")
    run = uuid.uuid4().hex[:6]
    big = {"max_tokens": 200, "ignore_eos": True, "n": 100, "logprobs": 5}
    send([({"id": f"{run}-{i}", "prompt": "event ->", "params": p}, [("kafka_correlationId", b"c")])
          for i, p in enumerate([big, {"max_tokens": 3}])])
    got = {header(m, "loramill-request-id") or body(m)["id"].encode(): m
           for m in r.until(lambda s: len(s) == 2)}
    m = got.get(f"{run}-0".encode())
    if kind == "refuse":
        check("too large, and configured so: a dead letter that names the sizes", m.topic() == "dead"
              and header(m, "loramill-error-code") == b"too_large"
              and b"max.message.bytes" in header(m, "loramill-error-message"), m.headers())
        return
    d = body(m)
    check("the reply says where", m.topic() == "replies" and "claim" in d and d["choices"][5]["text"]
          == "" and d["usage"]["completion_tokens"] > 100, str(d)[:300])
    whole = urllib.request.urlopen(d["claim"]["url"]).read()
    check("the object is what it says", len(whole) == d["claim"]["bytes"]
          and hashlib.sha256(whole).hexdigest() == d["claim"]["sha256"]
          and d["claim"]["content_type"] == content_type)
    doc = decode(whole)
    check("it is the whole reply", doc["id"] == d["id"] and len(doc["choices"]) == 100
          and all(c["text"] and c["logprobs"] for c in doc["choices"]) and "claim" not in doc)
    check("correlation id and a small neighbour are as ever", header(m, "kafka_correlationId") == b"c"
          and "claim" not in body(got[f"{run}-1".encode()]))


def claims_once(step, folder, run):
    """The same in exactly-once mode, with an S3 store that is away, refuses, and comes back."""
    def mode(text):
        open(folder + "/.mode", "w", encoding="utf-8").write(text)

    def objects():
        return {n for n in os.listdir(folder) if n[0] != "." and not n.endswith(".new")}

    def puts(status):       # (when, object)
        rows = [line.split() for line in open(folder + "/.log", encoding="utf-8")]
        return [(int(r[0]), r[2]) for r in rows if r[1] == status]

    params = {"max_tokens": 5000}

    def prompt(name):
        return {"id": f"{run}-{name}", "prompt": os.urandom(2500).hex(), "params": params}

    r = Reader("replies", "tiny", "dead")
    if step == "away":
        send([(prompt(i), [], "one") for i in range(3)], "claimable")
        for status in ("503", "403"):
            mode(status)
            r.until(lambda s: len(puts(status)) >= 3)
        early = r.until(lambda s: False, 0.5)
        check("no outcome while the store is away or refuses", not early and not objects()
              and puts("503") and puts("403"), (len(early), objects()))
        mode("ok")
        r.until(lambda s: len(s) >= 3)
        # "tiny" is smaller than claim_above and larger than its topic takes: the broker refuses it,
        # which aborts the transaction that the others are in.
        send([(prompt("3"), [], "one"), (prompt("4"), [], "one"),
              ({"id": f"{run}-tiny", "prompt": os.urandom(1100).hex(), "params": params,
                "reply_topic": "tiny"}, [], "one")], "claimable")
        r.until(lambda s: len(s) >= 6)
        got = r.until(lambda s: len(s) > 6, 1.5)
        docs = {body(m)["id"][7:]: (m, body(m)) for m in got if m.topic() != "dead"}
        check("each is answered, once", len(got) == 6 and set(docs) == {"0", "1", "2", "3", "4", "tiny"},
              [(m.topic(), m.value()[:80]) for m in got])
        durable = dict((name, t) for t, name in reversed(puts("200")))
        names = {d["claim"]["sha256"] for _, d in docs.values()}
        check("its object was there before its reply", all(
            durable.get(d["claim"]["sha256"], 1 << 60) <= m.timestamp()[1] for m, d in docs.values()))
        check("an aborted transaction uploads nothing again", sorted(n for _, n in puts("200"))
              == sorted(names) == sorted(objects()), (puts("200"), names))
    elif step == "kill":
        send([(prompt("killed"), [], "one")], "claimable")
        there, end = False, time.time() + 30
        while not there and time.time() < end:
            there = any(f"{run}-killed" in open(f"{folder}/{n}", encoding="utf-8").read()
                        for n in objects())
            time.sleep(0.02)
        check("the object is there, its reply is not committed", there and not r.until(
            lambda s: False, 0.5))
    elif step == "hang":
        mode("hang")
        send([(prompt("hung"), [], "one")], "claimable")
        time.sleep(1.5)
    elif step == "after":
        r = Reader("replies", "tiny", "dead", before=ALL)
        # There are 20,000 other replies: only ours are read as JSON, each time.
        mine = lambda s: [body(m) for m in s if m.topic() != "dead" and run.encode() in m.value()
                          and body(m)["id"][:6] == run]
        got = mine(r.until(lambda s: len(mine(s)) == 8))
        got = mine(r.until(lambda s: len(mine(s)) > 8, 1.5))
        check("what was killed or hung is answered once", sorted(d["id"][7:] for d in got)
              == ["0", "1", "2", "3", "4", "hung", "killed", "tiny"], [d["id"] for d in got])
        check("each reply's object is there", {d["claim"]["sha256"] for d in got} <= objects())
        check("nothing is a dead letter", not [m for m in r.seen if m.topic() == "dead"
                                               and run.encode() in (m.value() or b"")])


def poison(log):
    """Prompts that kill or hang the engine end as dead letters, their neighbours as replies."""
    r = Reader("replies", "dead")
    run = uuid.uuid4().hex[:6]
    bad = {f"{run}-kill": "POISON-KILL", f"{run}-hang": "POISON-HANG"}
    prompts = [{"id": f"{run}-{i}", "prompt": f"good {i}"} for i in range(60)]
    prompts[20:20] = [{"id": i, "prompt": p} for i, p in bad.items()]
    send([(p, [], "one partition", 0) for p in prompts])
    send([({"id": f"{run}-other", "prompt": "good"}, [], None, 1)])
    seen = lambda s: {header(m, "loramill-request-id") or body(m)["id"].encode(): m for m in s}
    got = seen(r.until(lambda s: len(seen(s)) == len(prompts) + 1, 240))
    check("every prompt has its outcome", len(got) == len(prompts) + 1, len(got))
    dead = {i.decode(): header(m, "loramill-error-code") for i, m in got.items()
            if m.topic() == "dead"}
    check("only the poison is dead-lettered, as poison", dead == dict.fromkeys(bad, b"poison"), dead)
    starts = open(log).read().count("reading prompts as group")
    # each dies 3 to 4 times (journal.h), of which both may share the first two; the last start lives
    check(f"the bound on deaths holds ({starts - 1} deaths, two poison prompts)",
          4 <= starts - 1 <= 2 * 4)


def pool_outcomes(mode, r, prompts, seconds):
    def outcomes(records):
        got = {}
        for m in records:
            i = (header(m, "loramill-request-id") or body(m)["id"].encode()).decode()
            got.setdefault(i, []).append(m)
        return got

    got = outcomes(r.until(lambda s: len(outcomes(s)) >= len(prompts), seconds))
    check(f"{mode}: every prompt has its outcome", set(got) == {p["id"] for p in prompts},
          len(got))
    mixed = [i for i, x in got.items() if len({m.topic() for m in x}) > 1]
    check(f"{mode}: and of one kind", not mixed, mixed)
    if mode == "exactly-once":
        twice = [i for i, x in got.items() if len(x) > 1]
        check(f"{mode}: and only one", not twice, twice)
    return got


def pool(mode, *logs):
    """One poison prompt, several hosts that share no journal: it ends, the pool lives on."""
    r = Reader(f"replies-{mode}", f"dead-{mode}")
    run = uuid.uuid4().hex[:6]
    prompts = [{"id": f"{run}-{i}", "prompt": f"good {i}"} for i in range(120)]
    prompts[40:40] = [{"id": f"{run}-kill", "prompt": "POISON-KILL"}]
    send([(p, [], "same") for p in prompts], f"prompts-{mode}")
    others = [{"id": f"{run}-o{i}", "prompt": f"good {i}"} for i in range(60)]
    send([(p, [], f"key {i}") for i, p in enumerate(others)], f"prompts-{mode}")
    got = pool_outcomes(mode, r, prompts + others, 240)
    dead = {i: [header(m, "loramill-error-code") for m in x] for i, x in got.items()
            if x[0].topic() == f"dead-{mode}"}
    check(f"{mode}: only the poison is dead-lettered, as poison", dead == {f"{run}-kill": [b"poison"]},
          dead)
    if mode == "exactly-once":
        seen = [body(m)["id"] for m in r.seen if m.topic() == f"replies-{mode}"]
        wanted = [p["id"] for p in prompts if p["id"] != f"{run}-kill"]
        check(f"{mode}: a key's replies are in its prompts' order",
              [i for i in seen if i in set(wanted)] == wanted)
    deaths = sum(open(log).read().count("reading prompts") for log in logs) - len(logs)
    check(f"{mode}: it took {deaths} deaths, at most 4", 2 <= deaths <= 4)


def pool_after(mode):
    """More prompts for a pool that was restarted in order."""
    r = Reader(f"replies-{mode}", f"dead-{mode}")
    prompts = [{"id": uuid.uuid4().hex, "prompt": "good"} for _ in range(60)]
    send([(p, [], p["id"]) for p in prompts], f"prompts-{mode}")
    got = pool_outcomes(mode, r, prompts, 120)
    check(f"{mode}: all are answered", all(x[0].topic() == f"replies-{mode}" for x in got.values()))


def said_to_block(log):
    """(when in ms, of how many) the worker first said that a prompt in the engine holds up others."""
    import datetime
    import re
    m = re.search(r"^(\S+)Z .* prompts \[[01]\] @[0-9]+ is unfinished for [0-9]+ s \(in the engine\) "
                  r"and holds up ([0-9]+) finished", open(log, encoding="utf-8").read(), re.M)
    at = datetime.datetime.fromisoformat(m[1]).replace(tzinfo=datetime.timezone.utc) if m else None
    return (1000 * at.timestamp(), int(m[2])) if m else (0, -1)


def blocking(port, log):
    """A slow prompt at the head of a partition: named, measured, and nobody waits for it."""
    r = Reader("replies", "dead")
    run = uuid.uuid4().hex[:6]
    slow = {"max_tokens": 480, "ignore_eos": True, "n": 128, "temperature": 1}
    send([({"id": f"{run}-slow", "prompt": "x", "params": slow}, [], "same")]
         + [({"id": f"{run}-{i}", "prompt": "x", "params": {"max_tokens": 1}}, [], "same")
            for i in range(100)])
    ids = [body(m)["id"] for m in r.until(lambda s: len(s) == 100)]
    check("a hundred later ones are answered before it", len(ids) == 100 and f"{run}-slow" not in ids)
    ended = lambda: f"{run}-slow" in [body(m)["id"] for m in r.seen]
    worst, end = 0, time.time() + 150   # a machine with other work to do
    while time.time() < end and not ended():
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        worst = max([worst] + [float(x.split()[-1]) for x in page.splitlines()
                               if x.startswith("loramill_partition_blocked_seconds{")])
        r.until(lambda s: False, 0.3)
    check(f"the metric shows its age ({worst} s)", worst > 1)
    check("it is answered in the end", ended())
    left, end = [""], time.time() + 60
    while left and time.time() < end:
        time.sleep(0.2)
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        left = [x for x in page.splitlines() if x.startswith("loramill_partition_blocked_seconds{")
                and not x.endswith(" 0.000")]
    check("and nothing when it has ended", not left, left)
    at, n = said_to_block(log)
    replies = [m.timestamp()[1] for m in r.seen]
    # A reply counts once it is acknowledged, some time after its timestamp: up to seconds.
    check(f"the log names it and how many are finished behind it, {n} of 100",
          sum(t < at - 3000 for t in replies) <= n <= sum(t <= at for t in replies) and n > 0, replies)


def head(group):
    """A prompt that can't be served at the head of a partition, and 10,000 good ones behind it. The
    other partition has 10,000 and no such head: the same worker at the same time, so that the two
    latencies can be compared on any machine. New ones are sent as others are answered, so that what is
    compared is never the length of a queue."""
    n, at_once = 10000, 300
    r = Reader("replies", "dead")
    run = uuid.uuid4().hex[:6]
    p = Producer({"bootstrap.servers": bootstrap, "linger.ms": 1})
    start = time.time()
    bad = {"id": f"{run}-bad", "prompt": "x", "adapter": "away"}
    p.produce("prompts", partition=0, value=json.dumps(bad).encode())
    for i in range(n):
        for part in (0, 1):
            p.produce("prompts", partition=part, key=str(part),
                      value=json.dumps({"id": f"{run}-{part}-{i}", "prompt": "good",
                                        "metadata": {"at": str(time.time())}}).encode())
        if i % 25 == 24:
            p.poll(0)
            sent = 2 * (i + 1)
            if len(r.until(lambda s: len(s) > sent - at_once)) <= sent - at_once:
                break
    p.flush(30)
    mine = lambda s: [m for m in s if (header(m, "loramill-request-id") or b"").startswith(run.encode())]
    got = mine(r.until(lambda s: len(s) >= 2 * n))
    check(f"the {2 * n} others are answered while it waits ({time.time() - start:.1f} s)",
          len(got) == 2 * n and f"{run}-bad" not in {body(m)["id"] for m in got}, len(got))
    late = [[], []]
    for m in got:
        d = body(m)
        late[int(d["id"].split("-")[1])].append(m.timestamp()[1] - 1000 * float(d["metadata"]["at"]))
    mid, top = [[sorted(x)[int(q * len(x))] for x in late] for q in (0.5, 0.99)]
    check(f"behind it they are as fast: median {mid[0]:.0f} ms, p99 {top[0]:.0f} ms; without it "
          f"{mid[1]:.0f} ms, {top[1]:.0f} ms", mid[0] < 1.5 * mid[1] + 20 and top[0] < 1.5 * top[1] + 50)
    c = client(bootstrap, group)
    where = [TopicPartition("prompts", part) for part in (0, 1)]
    ends = [c.get_watermark_offsets(tp, timeout=10)[1] for tp in where]
    lag = lambda: [e - tp.offset for e, tp in zip(ends, c.committed(where, timeout=10))]
    held = lag()
    send([({"cancel": f"{run}-bad"}, [])], "control")
    got = mine(r.until(lambda s: len(s) > 2 * n))
    check("it ends when it is cancelled", [body(m)["choices"][0]["finish_reason"] for m in got
                                           if body(m)["id"] == f"{run}-bad"] == ["cancelled"])
    end = time.time() + 60
    while lag() != [0, 0] and time.time() < end:
        time.sleep(0.1)
    check(f"the lag that it held up ({held[0]}) is gone then", held[0] > n and lag() == [0, 0], lag())


def batches(n, least):
    """Replies that a topic takes each, and not in the batches that are configured: none is refused."""
    r = Reader("modest", "dead")
    run = uuid.uuid4().hex[:6]
    send([({"id": f"{run}-{i}", "prompt": os.urandom(int(least) // 2).hex(),
            "params": {"max_tokens": 20000}}, []) for i in range(int(n))], "many")
    ids, dead = set(), []

    def done(records):
        for m in records:
            if m.topic() == "dead":
                dead.append(m)
            elif body(m)["id"].startswith(run):
                ids.add(body(m)["id"])
        records.clear()
        return len(ids) + len(dead) >= int(n)

    r.until(done)
    check("no good reply becomes a dead letter", not dead, (len(dead), dead and dead[0].headers()))
    check(f"all {n} replies are there", len(ids) == int(n), len(ids))


def registry(port):
    """A registry that takes its time to say that it knows no such schema, of which there are many: the
    worker lives, and who needs no registry does not wait."""
    import http.server
    import threading
    n = 12

    class Slow(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            time.sleep(0.3)
            text = b'{"error_code": 40403, "message": "none"}'
            self.send_response(404)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    r = Reader("replies", "dead")
    run = uuid.uuid4().hex[:6]
    send([(b"\0" + (1000 + i).to_bytes(4, "big") + b"\2\2x", [], b"k") for i in range(n)]
         + [({"id": run, "prompt": "x"}, [], b"k")])
    got = r.until(lambda s: len(s) > n)
    dead = [m for m in got if m.topic() == "dead"]
    check("each of unknown schema is a dead letter", len(dead) == n
          and {header(m, "loramill-error-code") for m in dead} == {b"not_found"}, len(dead))
    answered = [m.timestamp()[1] for m in got if m.topic() == "replies"]
    later = [m for m in dead if answered and m.timestamp()[1] > answered[0]]
    check(f"the prompt behind them has not waited for them ({len(later)} of {n} ended later)",
          len(later) >= n // 2, len(got))


def in_new_schema(subject, doc):
    """A prompt in Avro, in a schema that is registered just now."""
    import fastavro
    fields = [{"name": name, "type": "string"} for name in doc]
    written = {"type": "record", "name": "Late", "fields": fields}
    ask = urllib.request.Request(f"{os.environ['REGISTRY']}/subjects/{subject}/versions", method="POST",
                                 data=json.dumps({"schema": json.dumps(written)}).encode(),
                                 headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(ask, timeout=20) as answer:
        number = json.load(answer)["id"]
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(written), doc)
    return b"\0" + number.to_bytes(4, "big") + out.getvalue()


def outage(pid_store, pid_registry, seconds, adapters):
    """Store and registry stand still for a while: everything waits, nothing is dead-lettered."""
    import signal
    ids = adapters.split(",")
    r = Reader("replies", "dead")
    run = uuid.uuid4().hex[:6]
    pids = [int(pid_store), int(pid_registry)]
    avro = in_new_schema(f"{run}-value", {"id": f"{run}-avro", "prompt": "event ->"})
    for p in pids:
        os.kill(p, signal.SIGSTOP)
    # Schemas that the worker has not seen need the registry, the adapters need the store.
    send([({"id": f"{run}-{i}", "adapter": a, "prompt": "event ->", "params": {"max_tokens": 2}}, [])
          for i, a in enumerate(ids)])
    send([(avro, []), (b"\0" + (1 << 30).to_bytes(4, "big") + b"?", [])])
    n = len(ids) + 2
    got = list(r.until(lambda s: False, float(seconds)))
    check(f"nothing ends while they are away ({len(got)} of {n})", not got, got[:1])
    for p in pids:
        os.kill(p, signal.SIGCONT)
    got = r.until(lambda s: len(s) >= n)
    dead = [m for m in got if m.topic() == "dead"]
    replies = {body(m)["id"]: m for m in got if m.topic() != "dead"}
    check("all are answered when they are back", set(replies) == {f"{run}-{i}" for i in range(len(ids))}
          | {f"{run}-avro"}, list(replies))
    m = replies.get(f"{run}-avro")
    check("also the one in a schema that had to be asked for, and in Avro", m is not None and m.value()[:1] == b"\0"
          and body(m)["choices"][0]["finish_reason"] in ("stop", "length"), m and m.value())
    # The other schema exists nowhere: that is a fault of the prompt, and known only now.
    check("only the prompt without a schema is dead-lettered", [header(m, "loramill-error-code") for m in dead]
          == [b"not_found"], [m.headers() for m in dead])


if __name__ == "__main__":
    globals()[sys.argv[2]](*sys.argv[3:])
    sys.exit(1 if failed else 0)
