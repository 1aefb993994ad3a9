# SPDX-License-Identifier: Apache-2.0
"""The prompts and the oracle of the chaos suite.

  chaos.py produce BOOTSTRAP OVER COUNT RATE JOURNAL [REGISTRY]
      Prompts c-0, c-1, ... to `prompts` until COUNT are sent or the file OVER is there: JSON and
      (with a registry) Avro, base model and adapters, one in 25 bad, one in 40 long, one in 20 for an
      adapter that nobody has had yet, one in 50 with its reply in `side`, a topic that the suite
      deletes. Each forty in a row have an Avro schema that was never used before. JOURNAL gets a
      line for each prompt that the brokers hold.
  chaos.py watch BOOTSTRAP GROUP JOURNAL DONE SECONDS MODE CONDEMNED ENGINE
      Reads the outcomes with read_committed while the faults happen. Every few seconds: whatever
      the group has committed, offset or map, must have its outcome. When the file DONE is there,
      waits up to SECONDS for the rest. MODE exactly-once: each id once. At-least-once: repeats are
      of one kind. Each completion must be of the adapter that its prompt names, and whole. What was
      generated twice is work.py's; so is whether prompts that kill nobody were rightly taken for
      poison: they go to the file CONDEMNED, a line each.
  chaos.py try_answers
      That completions of a wrong adapter, and half of one, are found, on some that are made up.

The map's text is decoded here by a second implementation, from worker/offset_map.h.
"""
import base64
import collections
import hashlib
import io
import json
import os
import queue
import random
import re
import sys
import threading
import time

import fastavro
import xxhash
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition

ADAPTERS = "tests/models/storefront-adapters"
TEXT = "event: order_placed"    # of all prompts
SAME_SCHEMA = 40        # prompts in a row


def client(bootstrap, group, **more):
    return Consumer({"bootstrap.servers": bootstrap, "group.id": group, "log_level": 0,
                     "enable.auto.commit": False, "auto.offset.reset": "earliest",
                     "isolation.level": "read_committed", "socket.timeout.ms": 10000, **more})


# ---- prompts ---------------------------------------------------------------------------------

def adapter_ids():
    return sorted(os.path.relpath(d, ADAPTERS) for d, _, files in os.walk(ADAPTERS)
                  if "adapter_config.json" in files)


class Schemas:
    """Avro prompts, and for each SAME_SCHEMA of all prompts a schema that no worker can know: another
    `doc` makes another one. So whoever reads on needs the registry, all the time. A thread registers
    them ahead, for the faults take the registry away from it too; what has none then goes as JSON."""
    AHEAD = 200

    def __init__(self, url):
        from confluent_kafka.schema_registry import SchemaRegistryClient
        from confluent_kafka.serialization import MessageField, SerializationContext
        self.registry = SchemaRegistryClient({"url": url})
        self.context = SerializationContext("prompts", MessageField.VALUE)
        self.ready, self.turn, self.encoder = queue.Queue(self.AHEAD), -1, None
        self.used = self.without = 0
        threading.Thread(target=self.register, daemon=True).start()
        while self.ready.empty():
            time.sleep(0.1)

    def register(self):
        from confluent_kafka.schema_registry.avro import AvroSerializer
        schema, n = json.load(open("schemas/prompt.avsc", encoding="utf-8")), 0
        while True:
            try:
                e = AvroSerializer(self.registry, json.dumps({**schema, "doc": f"number {n}"}))
                e({"id": "x", "prompt": "x"}, self.context)
            except Exception:                           # it is away
                time.sleep(0.5)
                continue
            self.ready.put(e)
            n += 1

    def encode(self, p, i):
        if i // SAME_SCHEMA != self.turn:
            self.turn = i // SAME_SCHEMA
            self.encoder = None if self.ready.empty() else self.ready.get()
            self.used += self.encoder is not None
            self.without += self.encoder is None
        return self.encoder and self.encoder(p, self.context)


def is_bad(i):
    return i % 25 == 3


def is_side(i):
    return i % 50 == 7


def make(i, rng, ids, schemas):
    p = {"id": f"c-{i}", "prompt": TEXT,
         "params": {"max_tokens": rng.randint(1, 4 if i % 3 else 24), "temperature": 0.0}}
    if i % 2:
        p["adapter"] = rng.choice(ids)
    if i % 20 == 9:             # one that nobody has had: for it the store is needed
        p["adapter"] = f"fresh-{i}/{p['adapter']}"
    if i % 40 == 11:            # slow: those behind it are finished first, and the offset map has work
        p["params"] |= {"max_tokens": 300, "ignore_eos": True}
    if is_side(i):
        p["reply_topic"] = "side"
    elif is_bad(i):
        p["no_such_field"] = True
    elif schemas and i % 20 in (4, 15) and (record := schemas.encode(p, i)):
        return record
    return json.dumps(p).encode()


def produce(bootstrap, over, count, rate, journal, registry=None):
    rng, ids = random.Random(11), adapter_ids()
    schemas = Schemas(registry) if registry else None
    p = Producer({"bootstrap.servers": bootstrap, "linger.ms": 20, "enable.idempotence": True,
                  "delivery.timeout.ms": 300000, "log_level": 0})
    with open(journal, "w", encoding="utf-8", buffering=1) as f:
        def sent(i):
            def report(error, m):
                if not error:
                    f.write(json.dumps([f"c-{i}", m.partition(), m.offset()]) + "\n")
            return report
        start, i = time.time(), 0
        while i < int(count) and not os.path.exists(over):
            p.produce("prompts", key=str(i % 97), value=make(i, rng, ids, schemas),
                      headers=[("test-id", f"c-{i}".encode())], on_delivery=sent(i))
            i += 1
            p.poll(0)
            while i > (time.time() - start) * float(rate):
                p.poll(0.02)
        left = p.flush(300)
    print(f"# {i} prompts sent, {left} unconfirmed")
    if not schemas:
        return 0
    return 0 if say(schemas.used > schemas.without,
                    f"Avro prompts had {schemas.used} schemas, none of them used before (for "
                    f"{schemas.without} more the registry was away)") else 1


# ---- the oracle ------------------------------------------------------------------------------

def varint(data, at):
    value = shift = 0
    while True:
        b = data[at]
        at, value, shift = at + 1, value | (b & 127) << shift, shift + 7
        if b < 128:
            return value, at


def map_payload(text):
    """What the map's checksum confirms. The client hands metadata over as a C string although it has
    a length and no end, so whatever lies behind it in memory may follow: the map ends where its
    checksum says so."""
    body = re.match(r"[A-Za-z0-9_-]*", text).group()
    for n in range(len(body), 0, -1):
        if n % 4 == 1:
            continue
        data = base64.urlsafe_b64decode(body[:n] + "=" * (-n % 4))
        if xxhash.xxh32_intdigest(data[:-4]) == int.from_bytes(data[-4:], "little"):
            return data[:-4]
    raise ValueError(f"no map whose checksum holds in {text!r}")


def decode_map(text, offset):
    """The finished offsets beyond `offset`; none when the map is another's."""
    if not text or not text.startswith("lm1:"):
        return set()
    data = map_payload(text[4:])
    base, at = varint(data, 1)
    assert base == offset, f"map for {base} beside {offset}"
    found, end = set(), base
    if data[0] == 1:
        skip, at = varint(data, at)
        return {base + skip + 8 * k + bit for k, b in enumerate(data[at:]) for bit in range(8)
                if b >> bit & 1}
    while at < len(data):
        skip, at = varint(data, at)
        run, at = varint(data, at)
        found.update(range(end + skip, end + skip + run))
        end += skip + run
    return found


def outcome_id(m):
    h = dict(m.headers() or [])
    return (h.get("test-id") or h.get("loramill-request-id") or b"").decode()


# ---- who answered ----------------------------------------------------------------------------

def decode(value, schema):
    if value[:1] != b"\0":
        return json.loads(value)
    return fastavro.schemaless_reader(io.BytesIO(value[5:]), schema, schema)


def schema_of(name):
    return fastavro.parse_schema(json.load(open(f"schemas/{name}.avsc", encoding="utf-8")))


def digest_of(adapter):
    h = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with open(f"{ADAPTERS}/{adapter}/{name}", "rb") as f:
            data = f.read()
        h.update(name.encode() + b"\0" + len(data).to_bytes(8, "big") + data)
    return "sha256:" + h.hexdigest()


class Answers:
    """Whose the completions are, and whether they are whole. Of the adapter that the prompt named says
    the record, by id and digest; the text says it too: all prompts have one text and temperature 0, so
    each adapter has one answer to them, of which every completion is the beginning, and with the
    shipped model no two have the same. It is looked at as far as VOICE: sums over other batches round
    otherwise, and far into a text that might turn the scales somewhere.

    Nothing here ends a generation before its time, no deadline and no order to cancel. So `length`
    has as many tokens as its prompt allows; `stop` has at most as many, is none that was to ignore its
    end, and its adapter says no more elsewhere. That a completion has as many tokens as it says shows
    its text: of one adapter equal numbers are equal texts, and more tokens are no less text. An echo
    is the prompt's text."""
    VOICE = 40

    def __init__(self):
        self.schema = schema_of("completion")
        self.digests = {None: None} | {a: digest_of(a) for a in adapter_ids()}
        self.by = collections.defaultdict(set)      # id: adapters
        self.ends = collections.defaultdict(set)    # id: (finish reason, tokens, characters)
        self.texts = {}                             # adapter: the longest
        self.sizes = collections.defaultdict(dict)  # adapter: {tokens: text}
        self.bad = []

    def take(self, i, value):
        r = decode(value, self.schema)
        self.by[i].add(r["adapter"])
        source = source_of(r["adapter"])
        choice, tokens = r["choices"][0], r["usage"]["completion_tokens"]
        text = choice["text"][:self.VOICE].rstrip("\ufffd")      # a character's first half
        self.ends[i].add((choice["finish_reason"], tokens, len(choice["text"])))
        known = self.texts.setdefault(source, text)
        if r["id"] != i or r["adapter_digest"] != self.digests.get(source):
            self.bad.append(f"{i}: {r['id']}, adapter {r['adapter']}, {r['adapter_digest']}")
        elif not known.startswith(text) and not text.startswith(known):
            self.bad.append(f"{i}: adapter {source} says {text!r}, and {known!r} before")
        elif self.sizes[source].setdefault(tokens, text) != text:
            self.bad.append(f"{i}: adapter {source} says {text!r} in {tokens} tokens, and "
                            f"{self.sizes[source][tokens]!r} before")
        self.texts[source] = max(known, text, key=len)

    def wrong(self, prompts, engine):
        """What is wrong; prompts: {id: prompt}."""
        whole = [t for t in self.texts.values() if len(t) == self.VOICE]
        alike = collections.Counter(whole).most_common(1) if engine == "model" else []
        named = {i: p["adapter"] for i, p in prompts.items()}
        return self.bad + [f"{i}: {named[i]} was asked, {by} answered" for i, by in self.by.items()
                           if i in named and by != {named[i]}] + \
            [f"{n} adapters say {text!r}" for text, n in alike if n > 1]

    def half_made(self, prompts, engine):
        ended = echo_ended if engine == "echo" else model_ended
        ends = [(i, prompts[i], *end) for i, ends in self.ends.items() if i in prompts for end in ends]
        bad = [f"{i}: {reason} after {tokens} tokens, of {p['params']}"
               for i, p, reason, tokens, size in ends if not ended(p["params"], reason, tokens, size)]
        return bad if engine == "echo" else bad + self.too_short(ends)

    def too_short(self, ends):
        bad, longest = [], collections.Counter()    # what each adapter says where it may stop
        for _, p, _, tokens, _ in ends:
            if not p["params"].get("ignore_eos"):
                longest[source_of(p["adapter"])] = max(longest[source_of(p["adapter"])], tokens)
        for i, p, reason, tokens, size in ends:
            if reason == "stop" and size < self.VOICE and tokens < longest[source_of(p["adapter"])]:
                bad.append(f"{i}: stop after {tokens} tokens, and not elsewhere")
        for source, texts in self.sizes.items():
            by_tokens = sorted(texts.items())
            bad += [f"adapter {source} says {y!r} in {n} tokens, and {x!r} in {m}"
                    for (m, x), (n, y) in zip(by_tokens, by_tokens[1:]) if len(y) < len(x)]
        return bad


def source_of(adapter):
    return adapter and re.sub(r"^fresh-\d+/", "", adapter)


def model_ended(params, reason, tokens, _):
    """Is that an end that the generation may have had?"""
    if reason == "length":
        return tokens == params["max_tokens"]
    return reason == "stop" and 0 < tokens <= params["max_tokens"] and not params.get("ignore_eos")


def echo_ended(_, reason, tokens, size):
    return reason == "stop" and size == len(TEXT) and tokens == -(-len(TEXT) // 4)


def try_answers():
    """Four completions of a model whose tokens are letters."""
    x, y = adapter_ids()[:2]
    named = {"c-0": None, "c-1": x, "c-2": f"fresh-2/{x}", "c-3": y}
    texts = {None: "n" * 50, x: "x" * 50, y: "y" * 50}

    def prompts(**params):
        return {i: {"adapter": a, "params": {"max_tokens": 45 + int(i[2:])} |
                    (params if i == "c-2" else {})} for i, a in named.items()}

    def answered(changed):
        a = Answers()
        for i, adapter in named.items():
            source = adapter and adapter.removeprefix("fresh-2/")
            r = {"id": i, "adapter": adapter, "adapter_digest": a.digests[source],
                 **says(texts[source][:45 + int(i[2:])])}
            a.take(i, json.dumps(r | changed if i == "c-2" else r).encode())
        return a

    def tried(engine="model", **changed):
        return len(answered(changed).wrong(prompts(), engine))

    def says(text, tokens=None, reason="length"):
        return {"choices": [{"text": text, "finish_reason": reason}],
                "usage": {"completion_tokens": len(text) if tokens is None else tokens}}

    def half(r, engine="model", **params):
        a = answered(r)
        found = a.bad + a.half_made(prompts(**params), engine)
        return len([b for b in found if engine == "model" or b.startswith("c-2: stop") or
                    b.startswith("c-2: length")])

    short = {**says(texts[x][:3]), "adapter_digest": digest_of(x)}
    good = [say(tried() == 0 and tried(**short) == 0, "completions of the right adapters are right"),
            say(tried(adapter=None) and tried(adapter=y) and tried(adapter=x) and tried(id="c-1"),
                "another adapter, none, or another prompt is found"),
            say(tried(adapter_digest=digest_of(y)) == tried(adapter_digest=None) == 1,
                "other files are found"),
            say(tried(**says(texts[y])) == tried(**says(texts[None][:3])) == 1,
                "another adapter's text is found"),
            say(not half({}) and not half(says("x" * 45, reason="stop")) and
                not half(says("x" * 9), max_tokens=9) and not half(says(TEXT, 5, "stop"), "echo"),
                "whole generations are whole"),
            say(all(half(says("x" * 9, reason=r)) for r in ("cancelled", "expired", "part", "length")) and
                half(says("x" * 9, reason="stop")) and half(says("x" * 48, reason="stop")) and
                half(says("", reason="stop")) and half(says("x" * 47, reason="stop"), ignore_eos=True),
                "one that ended before its time is found"),
            say(half(says("x" * 9, 47)) == half(says("x" * 9, 46), max_tokens=46) == 1,
                "and one that says that it did not"),
            say(all(half(r, "echo") for r in (says(TEXT, 4, "stop"), says(TEXT[:3], 5, "stop"),
                                              says(TEXT, 5))), "and half an echo")]
    texts[y] = texts[None]
    good += [say(tried() == 1 and tried("echo") == 0,
                 "an adapter that speaks as the base model always does is found")]
    return 0 if all(good) else 1


# ---- outcomes --------------------------------------------------------------------------------

class Journal:
    def __init__(self, path):
        self.path, self.at, self.where = path, 0, {}
        self.prompts = {}           # id: what of it the answer shows
        self.somewhere = set()      # held, but the brokers' answer was lost and with it the offset

    def read(self):
        if not os.path.exists(self.path):
            return
        with open(self.path, encoding="utf-8") as f:
            f.seek(self.at)
            while (line := f.readline()).endswith("\n"):
                i, p, o = json.loads(line)
                if o is None:
                    self.somewhere.add(i)
                else:
                    self.where[(p, o)] = i
                self.at = f.tell()

    def read_topic(self, bootstrap):
        """What the topic holds, in place of what the producer was told: after a broker's death an
        offset may be unknown to it, and a prompt may be there twice."""
        c = client(bootstrap, "oracle", **{"enable.partition.eof": True})
        left = set(c.list_topics("prompts", timeout=20).topics["prompts"].partitions)
        c.assign([TopicPartition("prompts", p, 0) for p in left])
        where, stop, schema = {}, time.time() + 120, schema_of("prompt")
        while left:
            assert time.time() < stop, "the prompts can't be read"
            for m in c.consume(5000, timeout=0.5):
                if not m.error():
                    i = dict(m.headers())["test-id"].decode()
                    where[(m.partition(), m.offset())] = i
                    p = decode(m.value(), schema)
                    self.prompts[i] = {"adapter": p.get("adapter"), "params": p["params"]}
                elif m.error().code() == KafkaError._PARTITION_EOF:
                    left.discard(m.partition())
        c.close()
        told = self.somewhere | set(self.where.values())
        self.where, self.somewhere = where, set()
        return sorted(told - set(where.values()))

    def ids(self):
        return {i for i in self.somewhere | set(self.where.values()) if not is_side(int(i[2:]))}


class Oracle:
    def __init__(self, bootstrap, group, journal):
        self.c = client(bootstrap, "oracle")
        self.name = group
        self.ask_anew(bootstrap)
        self.journal = Journal(journal)
        self.got = collections.defaultdict(list)        # id: topics
        self.answers = Answers()
        self.poison = {}            # id: [partition, offset, when it was written, and condemned]
        self.samples, self.bad = 0, []
        while True:
            try:
                md = self.c.list_topics(timeout=5).topics
                break
            except Exception:                           # the brokers are having a bad time
                time.sleep(1)
        self.parts = [TopicPartition(t, p, 0) for t in ("replies", "dead") for p in md[t].partitions]
        self.prompts = [TopicPartition("prompts", p) for p in md["prompts"].partitions]
        self.c.assign(self.parts)

    def ask_anew(self, bootstrap):
        """Clients that only ask keep to a leader or coordinator that has gone for a long time."""
        self.bootstrap = bootstrap
        self.group = client(bootstrap, self.name)
        # Its ends are those of all that is written, open transactions included.
        self.raw = client(bootstrap, "oracle", **{"isolation.level": "read_uncommitted"})

    def take(self, timeout):
        messages = [m for m in self.c.consume(2000, timeout=timeout) if not m.error()]
        for m in messages:
            self.got[outcome_id(m)].append(m.topic())
            if m.topic() == "dead":
                self.note_poison(m)
            else:
                self.answers.take(outcome_id(m), m.value())
        return len(messages)

    def note_poison(self, m):
        h = dict(m.headers())
        if h["loramill-error-code"] == b"poison":
            at, offset, written = (int.from_bytes(h[f"kafka_dlt-original-{x}"], "big")
                                   for x in ("partition", "offset", "timestamp"))
            where = [at, offset, written / 1000, m.timestamp()[1] / 1000]
            self.poison.setdefault(outcome_id(m), where)

    def read_to_end(self, seconds):
        """All that is written now, once it is committed or aborted: a transaction is durable before
        each partition's leader has its marker. False: the brokers don't say, or take too long."""
        try:
            ends = {(p.topic, p.partition): self.raw.get_watermark_offsets(p, timeout=5)[1]
                    for p in self.parts}
        except Exception:
            self.ask_anew(self.bootstrap)
            return False
        stop = time.time() + seconds
        while time.time() < stop:
            self.take(0.2)
            at = {(p.topic, p.partition): p.offset for p in self.c.position(self.parts)}
            if all(at[k] >= ends[k] or ends[k] == 0 for k in ends):
                return True
        return False

    def sample(self):
        """Nothing is committed that has no outcome."""
        try:
            committed = self.group.committed(self.prompts, timeout=5)
            held = {p.partition: (p.offset, p.metadata) for p in committed}
        except Exception:                       # or what follows the metadata (see map_payload) is no text
            self.ask_anew(self.bootstrap)
            return None
        if not self.read_to_end(25):
            return None
        self.journal.read()
        held = {p: (offset, decode_map(text, offset)) for p, (offset, text) in held.items()}
        for (p, o), i in self.journal.where.items():
            offset, beyond = held[p]
            if (o < offset or o in beyond) and i not in self.got and not is_side(int(i[2:])):
                self.bad.append(f"{i} at {p}@{o} is committed ({offset}) and has no outcome")
        self.samples += 1
        return committed

    def at_end(self):
        committed = self.sample()
        if not committed:
            return False
        last = collections.defaultdict(lambda: -1)
        for p, o in self.journal.where:
            last[p] = max(last[p], o)
        return all(p.offset > last[p.partition] and not (p.metadata or "").startswith("lm1:")
                   for p in committed)


def say(good, what):
    print("ok" if good else "not ok", "-", what, flush=True)
    return good


def watch(bootstrap, group, journal, done, seconds, mode, condemned, engine):
    o, deadline, next_sample = Oracle(bootstrap, group, journal), None, 0
    while not deadline or time.time() < deadline:
        o.take(0.5)
        if time.time() > next_sample:
            o.sample()
            next_sample = time.time() + 8
        if deadline is None and os.path.exists(done):
            deadline = time.time() + float(seconds)
        o.journal.read()
        if deadline and o.journal.ids() <= set(o.got):
            break
    last = time.time() - deadline + float(seconds)
    missing = o.journal.read_topic(bootstrap)
    settled, stop = False, time.time() + 60
    while not settled and time.time() < stop:
        settled = o.at_end()
    ids = o.journal.ids()
    copies = collections.Counter(o.journal.where.values())
    lost = sorted(i for i in ids if len(o.got.get(i, [])) < copies[i])
    strange = sorted(set(o.got) - set(copies))
    mixed = sorted(i for i in o.got if len(set(o.got[i])) > 1)
    innocent = {i: where for i, where in o.poison.items() if not is_bad(int(i[2:]))}
    wrong = sorted(i for i in (ids & set(o.got)) - set(innocent)
                   if ("dead" in o.got[i]) != is_bad(int(i[2:])))
    with open(condemned, "w", encoding="utf-8") as f:
        f.writelines(json.dumps([i, *where]) + "\n" for i, where in sorted(innocent.items()))
    again = sorted(i for i in o.got if len(o.got[i]) > max(copies[i], 1))
    print(f"# {len(ids)} prompts, {sum(x[0] == 'dead' for x in o.got.values())} dead letters, "
          f"{len(innocent)} of them for bad luck, {len(copies) - len(ids)} excluded (their replies went to the topic that was deleted)")
    print(f"# {len(again)} outcomes come again, {sum(copies.values()) - len(copies)} prompts are in their "
          f"topic twice; {o.samples} samples of what was committed; the last outcome was read {last:.0f} s "
          "after the last fault")
    answered = o.answers.wrong(o.journal.prompts, engine)
    half = o.answers.half_made(o.journal.prompts, engine)
    reasons = collections.Counter(reason for ends in o.answers.ends.values() for reason, *_ in ends)
    print("# finish reasons:", ", ".join(f"{r} {n}" for r, n in sorted(reasons.items())))
    for b in (lost, missing, strange, mixed, wrong, again, o.bad, answered, half):
        if b:
            print("#", b[:5])
    good = [say(not missing, "the brokers hold every prompt that they confirmed"),
            say(ids and not lost, f"every prompt has its outcome ({len(lost)} lost)"),
            say(not strange and not mixed, "nothing else, and of one kind"),
            say(not wrong, f"bad prompts, and no others, are dead letters ({len(wrong)} wrong)"),
            say(o.answers.by and not answered, "every completion is of the adapter that its prompt names "
                f"({len(answered)} are not, of {len(o.answers.texts)} adapters)"),
            say(o.answers.ends and not half, "every completion is whole: stop or length, with the "
                f"tokens that its prompt asks for ({len(half)} are not)"),
            say(mode != "exactly-once" or not again, f"{mode}: {len(again)} ids come again"),
            say(not o.bad and o.samples > 1, "nothing was committed before its outcome was durable"),
            say(settled, "the group ends at the end of every partition, without a map")]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))
