# SPDX-License-Identifier: Apache-2.0
"""record.py record BOOTSTRAP REGISTRY|'' TEST SEEN   what a test's workers produced, against schemas/
record.py summary SEEN                             after all tests: was every kind of message seen?

`record` reads every topic of the test's broker (read_committed) and holds each message that a worker
wrote against its schema:

  replies in JSON    field by field against schemas/completion.avsc: types, nothing missing,
                     nothing more
  replies in Avro    the schema under their id is schemas/completion.avsc, and the datum is whole
  dead letters       the headers that docs/messages.md lists, with their lengths

A reply in Avro with no registry to read it by is an offence. One JSON line for each kind and test goes
into SEEN, and one for what was not looked at: records before the last LIMIT of a partition or after
SECONDS of reading, and partitions that nobody leads. Exit 1 on any offence, or when no broker answers: a
test leaves its brokers to be read. Topics that a test has deleted are gone, and so not seen.

`summary` fails for each kind of REQUIRED that no test has produced, and says what was not looked at.
"""
import collections
import io
import json
import sys
import time
import urllib.request

LIMIT = 100000
SECONDS = 30
REPLIES = ("completion", "part", "final record", "claim", "error reply")
REQUIRED = [f"{kind}, {encoding}" for kind in REPLIES for encoding in ("JSON", "Avro")] + ["dead letter"]
SCHEMA = json.load(open("schemas/completion.avsc", encoding="utf-8"))
PRIMITIVE = {"string": str, "int": int, "long": int, "boolean": bool, "null": type(None)}


def fits(value, schema, path=""):
    """None, or what is wrong."""
    if isinstance(schema, list):
        wrong = [fits(value, s, path) for s in schema]
        return None if None in wrong else wrong[-1]
    kind = schema["type"] if isinstance(schema, dict) else schema
    if kind == "record":
        if not isinstance(value, dict):
            return f"{path or 'top'} is no object"
        names = {f["name"] for f in schema["fields"]}
        if set(value) - names:
            return f"{path}{sorted(set(value) - names)} is not in the schema"
        for f in schema["fields"]:
            if f["name"] in value:
                bad = fits(value[f["name"]], f["type"], f"{path}{f['name']}.")
                if bad:
                    return bad
            elif "default" not in f:
                return f"{path}{f['name']} is missing"
        return None
    if kind == "array":
        if not isinstance(value, list):
            return f"{path} is no array"
        return next(filter(None, (fits(v, schema["items"], path + "[].") for v in value)), None)
    if kind == "map":
        if not isinstance(value, dict):
            return f"{path} is no map"
        return next(filter(None, (fits(v, schema["values"], path + "{}.")
                                  for v in value.values())), None)
    if kind in ("double", "float"):
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        good = isinstance(value, PRIMITIVE[kind]) and (kind == "boolean"
                                                       or not isinstance(value, bool))
    return None if good else f"{path} is {value!r}, not {kind}"


def kind_of(doc):
    if doc.get("error"):
        return "error reply"
    if doc.get("claim"):
        return "claim"
    if doc.get("stream"):
        return "final record" if doc["stream"]["final"] else "part"
    return "completion"


def read_avro(value, registry, cache):
    import fastavro
    number = int.from_bytes(value[1:5], "big")
    if number not in cache:
        with urllib.request.urlopen(f"{registry}/schemas/ids/{number}", timeout=10) as r:
            cache[number] = json.loads(json.load(r)["schema"])
    schema = cache[number]
    if schema.get("namespace") != "loramill" or schema["name"] != "Completion":
        return None, None
    if schema != SCHEMA:
        return None, "the schema under its id is not schemas/completion.avsc"
    body = io.BytesIO(value[5:])
    doc = fastavro.schemaless_reader(body, fastavro.parse_schema(schema))
    rest = len(body.read())
    return doc, f"{rest} bytes behind its end" if rest else None


LENGTHS = {"kafka_dlt-original-partition": 4, "kafka_dlt-original-offset": 8}
NEEDED = ["kafka_dlt-original-topic", "loramill-error-code", "loramill-error-message",
          "loramill-attempt", *LENGTHS]


def check_dead(headers):
    missing = [n for n in NEEDED if n not in headers]
    if missing:
        return f"lacks {missing}"
    return next((f"{n} has {len(headers[n])} bytes" for n, size in LENGTHS.items()
                 if len(headers[n]) != size), None)


def look(m, registry, cache):
    """(kind, what is wrong), or (None, None) for what no worker wrote."""
    headers, value = dict(m.headers() or []), m.value() or b""
    if "loramill-error-code" in headers and "kafka_dlt-original-topic" in headers:
        return "dead letter", check_dead(headers)
    if "loramill-request-id" not in headers:
        return None, None
    if value[:1] == b"\0":
        if not registry:
            return "reply, Avro", "no registry to read it by"
        doc, wrong = read_avro(value, registry, cache)
        return (f"{kind_of(doc)}, Avro" if doc else "reply, Avro" if wrong else None), wrong
    try:
        doc = json.loads(value)
    except ValueError as e:
        return "reply, JSON", str(e)
    return f"{kind_of(doc)}, JSON", fits(doc, SCHEMA)


def ends(c, parts):
    """{(topic, partition): (first offset to read, end)} of those that somebody leads, and how many records
    lie before them."""
    spans, before = {}, 0
    for topic, partition in parts:
        try:
            low, high = c.get_watermark_offsets(TopicPartition(topic, partition), timeout=5)
        except KafkaException:
            continue
        spans[topic, partition] = max(low, high - LIMIT), high
        before += max(0, high - LIMIT - low)
    return spans, before


def read(c, spans):
    """Yields what is there. Afterwards `spans` has what is left: nothing, if all went well."""
    c.assign([TopicPartition(t, p, first) for (t, p), (first, _) in spans.items()])
    idle, end = 0, time.monotonic() + SECONDS
    while spans and idle < 10 and time.monotonic() < end:
        ms = c.consume(1000, timeout=1)
        idle = 0 if ms else idle + 1
        for m in ms:
            where = m.topic(), m.partition()
            if not m.error():
                if where in spans:
                    spans[where] = m.offset() + 1, spans[where][1]
                yield m
            elif m.error().code() == KafkaError._PARTITION_EOF:
                spans.pop(where, None)


def write(seen, test, counts, unread):
    with open(seen, "a", encoding="utf-8") as f:
        for kind, n in sorted(counts.items()):
            f.write(json.dumps({"test": test, "kind": kind, "records": n}) + "\n")
        if any(unread.values()):
            f.write(json.dumps({"test": test, "unread": unread}) + "\n")


def record(bootstrap, registry, test, seen):
    c = Consumer({"bootstrap.servers": bootstrap, "group.id": "record", "log_level": 0,
                  "enable.auto.commit": False, "enable.partition.eof": True})
    try:
        topics = c.list_topics(timeout=20).topics
    except KafkaException:
        print("# no broker is left to read the messages from")
        return 1
    parts = [(t, p) for t, md in topics.items() if not t.startswith("__") for p in md.partitions]
    spans, unread = ends(c, parts)
    dark = len(parts) - len(spans)
    counts, offences, cache = collections.Counter(), [], {}
    for m in read(c, spans):
        kind, wrong = look(m, registry, cache)
        if kind:
            counts[kind] += 1
        if wrong:
            offences.append(f"{kind} at {m.topic()}[{m.partition()}]@{m.offset()}: {wrong}")
    c.close()
    unread += sum(end - at for at, end in spans.values())
    write(seen, test, counts, {"records": unread, "partitions": dark})
    for o in offences[:10]:
        print("#", o)
    print("# recorded:", ", ".join(f"{n} x {k}" for k, n in sorted(counts.items())) or "nothing")
    if unread or dark:
        print(f"# not looked at: {unread} records, {dark} partitions")
    return 1 if offences else 0


def summary(seen):
    counts, unread, where, tests = collections.Counter(), collections.Counter(), set(), set()
    for line in open(seen, encoding="utf-8"):
        x = json.loads(line)
        tests.add(x["test"])
        if "unread" in x:
            unread.update(x["unread"])
            where.add(x["test"])
        else:
            counts[x["kind"]] += x["records"]
    for kind in REQUIRED:
        print("ok" if counts[kind] else "not ok", f"- {kind}: {counts[kind]} records fit schemas/")
    print(f"# of {len(tests)} tests; not looked at: {unread['records']} records, {unread['partitions']} "
          "partitions" + (f", of {', '.join(sorted(where))}" if where else ""))
    return int(not all(counts[kind] for kind in REQUIRED))


if __name__ == "__main__":
    if sys.argv[1] == "record":         # the summary is a plain Python's
        from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
    sys.exit({"record": record, "summary": summary}[sys.argv[1]](*sys.argv[2:]))
