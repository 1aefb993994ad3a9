# SPDX-License-Identifier: Apache-2.0
"""avro_client.py BOOTSTRAP REGISTRY PROMPTS REPLIES: a client from the ecosystem talks Avro to us.

confluent-kafka's AvroSerializer (fastavro beneath) registers schemas/prompt.avsc and produces
prompts; its AvroDeserializer reads the replies with the schema that the worker registered. Prints
TAP lines; exit 1 on any failure.
"""
import json
import sys
import uuid

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

bootstrap, registry_url, prompts_topic, replies_topic = sys.argv[1:]
registry = SchemaRegistryClient({"url": registry_url})
schema = open("schemas/prompt.avsc", encoding="utf-8").read()
encode = AvroSerializer(registry, schema)
decode = AvroDeserializer(registry)
failed = False


def check(what, good):
    global failed
    print("ok" if good else "not ok", "-", what)
    failed = failed or not good


def optional(field):
    return isinstance(field["type"], list) and "null" in field["type"] or "default" in field


required = [f["name"] for f in json.loads(schema)["fields"] if not optional(f)]
check(f"only id is required by the schema (required: {required})", required == ["id"])

run = uuid.uuid4().hex[:8]
prompts = [
    {"id": f"{run}-0", "adapter": None, "prompt": "event: order_placed"},
    {"id": f"{run}-1", "adapter": "ADAPTER", "prompt": "event: order_placed",
     "params": {"max_tokens": 8, "temperature": 0.0, "stop": ["\n"], "logprobs": 2},
     "metadata": {"k": "välue"}},
    {"id": f"{run}-2", "messages": [{"role": "user", "content": "event: order_placed"}]},
    {"id": f"{run}-3", "prompt_token_ids": [5, 6, 7], "params": {"max_tokens": 3, "n": 2}},
]
adapter = sys.stdin.readline().strip()
for p in prompts:
    if p.get("adapter"):
        p["adapter"] = adapter

producer = Producer({"bootstrap.servers": bootstrap})
context = SerializationContext(prompts_topic, MessageField.VALUE)
for p in prompts:
    producer.produce(prompts_topic, key=p["id"], value=encode(p, context))
producer.produce(prompts_topic, key=f"{run}-json", value=json.dumps(
    {"id": f"{run}-json", "prompt": "event: order_placed", "params": {"max_tokens": 2}}).encode())
producer.flush(30)

consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": run})
n = len(consumer.list_topics(replies_topic, timeout=10).topics[replies_topic].partitions)
consumer.assign([TopicPartition(replies_topic, i, 0) for i in range(n)])
replies, raw, idle = {}, {}, 0
while len(replies) < len(prompts) + 1 and idle < 60:
    m = consumer.poll(1)
    if m is None or m.error():
        idle += 1
        continue
    key = m.key().decode()
    raw[key] = m
    replies[key] = (json.loads(m.value()) if m.value()[:1] == b"{" else
                    decode(m.value(), SerializationContext(replies_topic, MessageField.VALUE)))
consumer.close()

check(f"every prompt is answered ({len(replies)})", len(replies) == len(prompts) + 1)
for p in prompts:
    r = replies.get(p["id"])
    if not r:
        check(f"{p['id']} has a reply", False)
        continue
    check(f"{p['id']} comes back as Avro", raw[p["id"]].value()[:1] == b"\x00")
    check(f"{p['id']} carries its id and adapter",
          r["id"] == p["id"] and r["adapter"] == p.get("adapter"))
    want = p.get("params", {}).get("n", 1)
    check(f"{p['id']} has {want} choice(s) and a digest only with an adapter",
          len(r["choices"]) == want and (r["adapter_digest"] is None) == (p.get("adapter") is None))
    check(f"{p['id']} counts tokens", r["usage"]["completion_tokens"] > 0)
if f"{run}-1" in replies:
    r = replies[f"{run}-1"]
    check("logprobs arrive", r["choices"][0]["logprobs"]["token_logprobs"][0] <= 0)
    check("metadata comes back", r["metadata"] == {"k": "välue"})
check("a JSON prompt is answered in JSON", raw.get(f"{run}-json") is not None
      and raw[f"{run}-json"].value()[:1] == b"{")
sys.exit(1 if failed else 0)
