# SPDX-License-Identifier: Apache-2.0
"""interop.py BOOTSTRAP REGISTRY: clients of other ecosystems, on the wire.

  evolution  four versions of a prompt schema, written by Java (stored bytes) and by Python's
             serializer, with ids before the value and in a header, mixed in one topic
  spring     request/reply headers as ReplyingKafkaTemplate fills them, echoed byte for byte
  keys       replies land where Java's producer would have put them
  python     AvroDeserializer reads the Avro replies with the schema that the worker registered

Topics: prompts (4 partitions), replies (7), asked (8), dead. The worker runs the echo engine.
"""
import json
import random
import sys

import trouble as t
from confluent_kafka import Producer
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from trouble import Reader, check, header

bootstrap, registry_url = sys.argv[1:3]
java = json.load(open("tests/fixtures/java/java_cases.json", encoding="utf-8"))
registry = SchemaRegistryClient({"url": registry_url})
producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 1})


def take(r, n, seconds=60):
    """The next n records of a reader."""
    before = len(r.seen)
    return r.until(lambda s: len(s) - before >= n, seconds)[before:]


def evolution_and_python():
    cases = java["prompts"]
    ids = [registry.register_schema("prompts-value", Schema(c["schema"], "AVRO")) for c in cases]
    check(f"four versions are registered (ids {sorted(set(ids))})", len(set(ids)) == 4)
    sent = {}

    def send(i, value, headers=()):
        sent[i] = True
        producer.produce("prompts", key=i, value=value, headers=list(headers))

    def rename(case, new):        # a string's length is its zig-zag byte; ids here have one length
        raw = bytes.fromhex(case["hex"])
        old = case["json"]["id"].encode()
        assert len(old) == len(new) and raw.count(old) == 1
        return raw.replace(old, new.encode())

    rng = random.Random(4)
    rounds = [(n, i) for n in range(30) for i in range(len(cases))]
    rng.shuffle(rounds)
    r = Reader("replies", "dead")
    for n, i in rounds:
        name = f"{'abcde'[i]}-{n:04d}"[:6]
        framing = n % 2
        body = rename(cases[i], name)
        frame = b"\0" + ids[i].to_bytes(4, "big")
        if framing:
            send(name, body, [("__value_schema_id", frame)])
        else:
            send(name, frame + body)
    for i, c in enumerate(cases):           # the same data by Python's own serializer
        encode = AvroSerializer(registry, c["schema"], conf={"auto.register.schemas": False,
                                                             "use.latest.version": False})
        datum = {"from_tomorrow": None, "adapter": None, "priority": 0, **c["json"],
                 "id": f"python-{i}"}
        if "params" in datum:
            datum["params"] = {"stop": None, "max_tokens": None, **datum["params"]}
        try:
            value = encode(datum, SerializationContext("prompts", MessageField.VALUE))
        except Exception as e:              # says which case it was
            check(f"Python's serializer writes {c['name']}", False, e)
            continue
        send(f"python-{i}", value)
    producer.flush(30)
    got = take(r, len(sent))
    dead = [header(m, "loramill-error-message") for m in got if m.topic() == "dead"]
    check(f"all {len(sent)} are answered, none is a dead letter", len(got) == len(sent) and not dead,
          (len(got), dead[:2]))
    decode = AvroDeserializer(registry)
    replies = {m.key().decode(): decode(m.value(), SerializationContext("replies",
                                                                        MessageField.VALUE))
               for m in got if m.topic() == "replies"}
    texts = {"a": "eins: Grüße, 世界 🙂", "b": "zwei", "c": "drei", "d": "vier", "e": "fünf"}
    wrong = [(i, d["choices"][0]["text"]) for i, d in replies.items()
             if d["id"] != i or d["choices"][0]["text"]
             != texts["abcde"[int(i[7:])] if i.startswith("python") else i[0]]]
    check("each answer is to its own prompt (Python's deserializer)", not wrong, wrong[:3])
    meta = [d["metadata"] for i, d in replies.items() if i[0] == "d"]
    check("fields of the newest version arrive", meta and all(m == {"order": "4711"} for m in meta))


def spring():
    r = Reader("asked")
    for i, s in enumerate(java["spring"]):
        producer.produce("prompts", key=f"spring-{i}", value=json.dumps(
            {"id": f"spring-{i}", "prompt": "x"}).encode(), headers=[
                (s["correlation_header"], bytes.fromhex(s["correlation"])),
                (s["topic_header"], b"asked"),
                (s["partition_header"], bytes.fromhex(s["partition"]))])
    producer.flush(30)
    got = {m.key().decode(): m for m in take(r, len(java["spring"]))}
    for i, s in enumerate(java["spring"]):
        m = got.get(f"spring-{i}")
        check(f"Spring's correlation id {s['correlation']} comes back byte for byte, to partition 7",
              m is not None and m.partition() == 7
              and header(m, s["correlation_header"]) == bytes.fromhex(s["correlation"]))


def keys():
    r = Reader("replies")
    for i, k in enumerate(java["keys"]):
        producer.produce("prompts", key=bytes.fromhex(k["hex"]), partition=i % 4,
                         value=json.dumps({"id": f"key-{i}", "prompt": "x"}).encode())
    producer.flush(30)
    want = {f"key-{i}": k["7"] for i, k in enumerate(java["keys"]) if k["hex"]}
    got = {json.loads(m.value())["id"]: m.partition() for m in take(r, len(java["keys"]))}
    wrong = {i: (got.get(i), p) for i, p in want.items() if got.get(i) != p}
    check(f"{len(want)} keys lie where kafka-clients would have put them", not wrong, wrong)


evolution_and_python()
spring()
keys()
sys.exit(1 if t.failed else 0)
