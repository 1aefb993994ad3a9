# SPDX-License-Identifier: Apache-2.0
"""record.py record BOOTSTRAP REGISTRY|'' TEST SEEN   what loramill produced in a test, against schemas/
record.py summary SEEN                             after all tests: was every kind of message seen?

`record` reads every topic of the test's broker (read_committed) and holds each message that loramill
wrote, told by its headers, against its schema:

  replies in JSON    field by field against schemas/completion.avsc: types, nothing missing,
                     nothing more
  replies in Avro    the schema under their id is schemas/completion.avsc, and the datum is whole
  dead letters       the headers that docs/messages.md lists, all of them, and what they hold; or the
                     few that it lists for a prompt that is too large with the others
  submitted prompts  (`loramill submit`: a content-type and no other header) as JSON against
                     schemas/prompt.avsc
  prompts sent back  (`loramill dlq retry`: an attempt and no cause) where they came from, and none of
                     the headers that say why
  orders to cancel   (`loramill cancel`: a key and no headers) for the prompt that is their key

Bad prompts that a test submits on purpose are those of which a dead letter says that they can't be read.
A reply in Avro with no registry to read it by is an offence, and so is any other record in Avro with a
reply's headers. One JSON line for each kind and test goes
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
OTHERS = DEAD, SUBMITTED, SENT_BACK, ORDER = ("dead letter", "submitted prompt", "prompt sent back",
                                              "order to cancel")
CUT = "dead letter with few headers"
REQUIRED = [f"{kind}, {encoding}" for kind in REPLIES for encoding in ("JSON", "Avro")] + list(OTHERS)
SCHEMA = json.load(open("schemas/completion.avsc", encoding="utf-8"))
PROMPT = json.load(open("schemas/prompt.avsc", encoding="utf-8"))
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
    if schema != SCHEMA:
        return None, "the schema under its id is not schemas/completion.avsc"
    body = io.BytesIO(value[5:])
    doc = fastavro.schemaless_reader(body, fastavro.parse_schema(schema))
    rest = len(body.read())
    return doc, f"{rest} bytes behind its end" if rest else None


SPRING, CONNECT = "kafka_dlt-", "__connect.errors."
ORIGIN = [SPRING + n for n in ("original-topic", "original-partition", "original-offset")]
LENGTHS = {SPRING + "original-partition": 4, SPRING + "original-offset": 8, SPRING + "original-timestamp": 8}
FEW = [*ORIGIN, "loramill-error-code", "loramill-error-message", "loramill-attempt"]
# What says why, and goes when the prompt is sent back.
WHY = ["loramill-worker", *[SPRING + "exception-" + n for n in ("fqcn", "cause-fqcn", "message", "stacktrace")],
       *[CONNECT + n for n in ("topic", "partition", "offset", "connector.name", "task.id", "stage", "class.name",
                               "exception.class.name", "exception.message", "exception.stacktrace")]]
ALL = FEW + WHY + [SPRING + n for n in ("original-timestamp", "original-timestamp-type",
                                        "original-consumer-group")]


def number(text):
    return text.isascii() and text.isdigit()


def wrong_lengths(headers):
    return next((f"{n} has {len(headers[n])} bytes" for n, size in LENGTHS.items()
                 if n in headers and len(headers[n]) != size), None)


def is_few(headers):
    return not any(n in headers for n in WHY)


def check_dead(headers):
    few = is_few(headers)
    missing = [n for n in (FEW if few else ALL) if n not in headers]
    if missing:
        return f"lacks {missing}"
    code, message = headers["loramill-error-code"], headers["loramill-error-message"]
    same = {} if few else {
        SPRING + "exception-fqcn": b"loramill." + code, SPRING + "exception-cause-fqcn": b"loramill." + code,
        SPRING + "exception-message": message, CONNECT + "exception.class.name": b"loramill." + code,
        CONNECT + "exception.message": message, CONNECT + "task.id": headers["loramill-worker"]}
    numbers = ["loramill-attempt"] + ([] if few else [CONNECT + "partition", CONNECT + "offset"])
    return (wrong_lengths(headers)
            or next((f"{n} is {headers[n]!r}, not {v!r}" for n, v in same.items() if headers[n] != v), None)
            or next((f"{n} is {headers[n]!r}" for n in numbers if not number(headers[n])), None)
            or (None if code and message else "no cause"))


def check_sent_back(headers):
    missing = [n for n in ORIGIN if n not in headers]
    told = [n for n in (*WHY, "loramill-error-message") if n in headers]
    return (f"lacks {missing}" if missing else f"still has {told}" if told else wrong_lengths(headers)
            or (None if number(headers["loramill-attempt"]) else f"attempt {headers['loramill-attempt']!r}"))


def read_json(value):
    """(the document, what is wrong)"""
    try:
        return json.loads(value), None
    except ValueError as e:
        return None, str(e)


def check_submitted(value):
    doc, wrong = read_json(value)
    return wrong or fits(doc, PROMPT)


def is_order(m):
    doc, _ = read_json(m.value() or b"") if m.key() and not m.headers() else (None, None)
    return isinstance(doc, dict) and "cancel" in doc


def look(m, registry, cache):
    """(kind, what is wrong), or (None, None) for what loramill did not write."""
    headers, value = {n: v or b"" for n, v in m.headers() or []}, m.value() or b""
    if "loramill-error-code" in headers and SPRING + "original-topic" in headers:
        return CUT if is_few(headers) else DEAD, check_dead(headers)
    if "loramill-request-id" not in headers:
        if "loramill-attempt" in headers:
            return SENT_BACK, check_sent_back(headers)
        if headers == {"content-type": b"application/json"}:
            return SUBMITTED, check_submitted(value)
        if is_order(m):
            return ORDER, None if json.loads(value) == {"cancel": m.key().decode()} else f"is {value[:200]}"
        return None, None
    if value[:1] == b"\0":
        if not registry:
            return "reply, Avro", "no registry to read it by"
        doc, wrong = read_avro(value, registry, cache)
        return (f"{kind_of(doc)}, Avro" if doc else "reply, Avro"), wrong
    doc, wrong = read_json(value)
    return (f"{kind_of(doc)}, JSON", fits(doc, SCHEMA)) if not wrong else ("reply, JSON", wrong)


def refused(m):
    """Where the record lies of which this dead letter says that it can't be read. (The origin may be the
    sender's, as one keeps the first, and then it is any bytes, or none.)"""
    h = dict(m.headers())
    if h.get("loramill-error-code") not in (b"malformed", b"invalid") or any(h.get(n) is None for n in ORIGIN):
        return None
    topic, partition, offset = (h[n] for n in ORIGIN)
    return topic.decode(errors="replace"), int.from_bytes(partition, "big"), int.from_bytes(offset, "big")


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
    counts, offences, cache, bad = collections.Counter(), {}, {}, set()
    for m in read(c, spans):
        kind, wrong = look(m, registry, cache)
        if kind:
            counts[kind] += 1
        if kind in (DEAD, CUT):
            bad.add(refused(m))
        if wrong:
            offences[m.topic(), m.partition(), m.offset()] = kind, wrong
    c.close()
    for where in [w for w, (kind, _) in offences.items() if kind == SUBMITTED and w in bad]:
        del offences[where]
        counts[SUBMITTED] -= 1
    unread += sum(end - at for at, end in spans.values())
    write(seen, test, counts, {"records": unread, "partitions": dark})
    for (topic, partition, offset), (kind, wrong) in list(offences.items())[:10]:
        print(f"# {kind} at {topic}[{partition}]@{offset}: {wrong}")
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
