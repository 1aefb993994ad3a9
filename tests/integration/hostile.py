# SPDX-License-Identifier: Apache-2.0
"""hostile.py BOOTSTRAP CASE ...: messages made to harm, and what may be seen of the others.

  poison PID REGISTRY-DIR    each kind of bad message is a dead letter with the record as it came and
                             both header families; thousands of bombs leave memory as it was
  private MARKER             prompts, good and bad, that all hold MARKER
  adapters N                 N prompts, each for an adapter of its own that is nowhere
  spans FILE                 what a collector got (otlp_collector.py) of those of `private`
  metrics PORT               every name on /metrics is in docs/operations.md, and the reverse
"""
import collections
import io
import json
import os
import re
import struct
import sys
import time
import urllib.request

import fastavro

import trouble as t
from trouble import Reader, body, check, header, send

PROMPT = json.load(open("schemas/prompt.avsc", encoding="utf-8"))
GUID = "8f3f6e0a-52c4-4d0c-9a3e-0b1c2d3e4f50"
SCHEMAS = {
    1: PROMPT,
    2: {"type": "record", "name": "Bomb", "fields": [
        {"name": "id", "type": "string"},
        {"name": "nothing", "type": {"type": "array", "items": "null"}}]},
    3: {"type": "record", "name": "Node", "fields": [
        {"name": "next", "type": ["null", "Node"]}]},
    4: {"type": "array", "items": "null"},
    5: {"type": "record", "name": "Text", "fields": [{"name": "id", "type": "string"},
                                                     {"name": "prompt", "type": "string"}]},
}


def write_registry(folder):
    """A registry in files: what GET /schemas/ids/N and /schemas/guids/GUID answer."""
    for kind in ("ids", "guids"):
        os.makedirs(f"{folder}/schemas/{kind}", exist_ok=True)
    for number, schema in SCHEMAS.items():
        with open(f"{folder}/schemas/ids/{number}", "w", encoding="utf-8") as f:
            json.dump({"schema": json.dumps(schema)}, f)
    with open(f"{folder}/schemas/guids/{GUID}", "w", encoding="utf-8") as f:
        json.dump({"schema": json.dumps(PROMPT)}, f)
    with open(f"{folder}/not-found", "w", encoding="utf-8") as f:
        json.dump({"error_code": 40403, "message": "Schema not found"}, f)


def varint(n):
    n, out = n << 1, b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def text(s):
    return varint(len(s)) + s


def framed(number, data):
    return b"\0" + struct.pack(">i", number) + data


def resident(pid):
    with open(f"/proc/{pid}/statm", encoding="utf-8") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def good_avro(i):
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(PROMPT), {"id": i, "prompt": "x"})
    return out.getvalue()


BOMB = text(b"bomb") + varint(10 ** 8) + b"\0"
RECURSION = b"\2" * 200000
CLAIM = text(b"claim") + varint(2 << 20) + b"short"


def poison_cases():
    whole = good_avro("avro")
    guid = b"\1" + bytes.fromhex(GUID.replace("-", ""))
    unknown = b"\1" + bytes(16)
    bad = {
        "bad magic": (b"\7" + struct.pack(">i", 1) + whole, []),
        "two bytes": (b"\0\0", []),
        "cut in the middle": (framed(1, whole[:len(whole) // 2]), []),
        "bytes left over": (framed(1, whole + b"\0"), []),
        "unknown schema id": (framed(99, whole), []),
        "unknown GUID": (whole, [("__value_schema_id", unknown)]),
        "short GUID": (whole, [("__value_schema_id", guid[:9])]),
        "array bomb": (framed(2, BOMB), []),
        "five-byte array bomb": (framed(4, varint(10 ** 8) + b"\0"), []),
        "200 KB of recursion": (framed(3, RECURSION), []),
        "a claim of 2 MB": (framed(5, CLAIM), []),
        "a claim of 2^62": (framed(5, text(b"claim") + varint(2 ** 62)), []),
        "a negative length": (framed(5, b"\1"), []),
        "200 KB of brackets": (b"[" * 200000, []),
        "a tombstone": (None, []),
        "nothing": (b"", []),
        "not UTF-8": (b'{"id": "x", "prompt": "\xff\xfe"}', []),
    }
    good = {"an id": (framed(1, good_avro("good-id")), []),
            "a GUID": (good_avro("good-guid"), [("__value_schema_id", guid)])}
    return bad, good


def poison(pid):
    pid = int(pid)
    bad, good = poison_cases()
    r = Reader("replies", "dead")
    sent = {f"case {n}".encode(): (name, value, headers)
            for n, (name, (value, headers)) in enumerate(bad.items())}
    extra = [("odd", b"\0\xff")]
    send([(v, h + extra, k) for k, (_, v, h) in sent.items()]
         + [(v, h, b"good") for v, h in good.values()])
    got = r.until(lambda s: len(s) == len(bad) + len(good))
    dead = {m.key(): m for m in got if m.topic() == "dead"}
    for key, (name, value, headers) in sent.items():
        m = dead.get(key)               # false when it has no value
        h = dict(m.headers()) if m is not None else {}
        check(f"{name}: {h.get('loramill-error-code', b'no dead letter').decode()}: "
              f"{h.get('loramill-error-message', b'').decode()[:90]}",
              m is not None and m.value() == value
              and all(h.get(k) == v for k, v in headers + extra)
              and h.get("loramill-error-code") in (b"malformed", b"not_found", b"unsupported",
                                                   b"too_large", b"invalid")
              and len(h.get("kafka_dlt-original-offset", b"")) == 8
              and h.get("__connect.errors.topic") == b"prompts")
    ids = sorted(body(m)["id"] for m in got if m.topic() == "replies")
    check("their neighbours are answered, by schema id and by GUID", ids == ["good-guid", "good-id"],
          ids)
    bombs = [framed(2, BOMB), framed(4, varint(10 ** 8) + b"\0"), framed(5, CLAIM),
             framed(3, RECURSION)]

    def throw(n):
        r.seen.clear()
        send([(b, []) for b in bombs[:3] for _ in range(n)] + [(bombs[3], [])] * (n // 10))
        return len(r.until(lambda s: len(s) == 3 * n + n // 10)) == 3 * n + n // 10

    check("a first thousand of bombs", throw(300))
    before = resident(pid)
    check("two thousand more", throw(600))
    after = resident(pid)
    # Each leaked bomb would cost 381 MB, each leaked claim 2 MB; the client's own buffers move 16 MB.
    check(f"memory is as it was ({before / 1e6:.0f} MB, then {after / 1e6:.0f} MB)",
          after - before < 24e6)
    r.seen.clear()
    send([({"id": "after", "prompt": "x"}, [])])
    check("the worker lives", [body(m)["id"] for m in r.until(lambda s: s)] == ["after"])


def private_records(marker):
    """Good prompts and every way that text may stand in a bad one."""
    chat = lambda message: {"id": "private-chat", "messages": [message]}
    text = marker + " where no text belongs"    # a word alone has the form of a name, which is shown
    ask = lambda more: {"id": "private-more", "prompt": "x", **more}
    return [
        {"id": "private-1", "prompt": marker, "metadata": {"note": marker}},
        {"id": "private-2", "prompt": marker, "params": {"temperature": "hot"}},
        {"id": "private-3", "prompt": marker, "adapter": "nobody"},
        {"id": "private-4", "messages": [{"role": "user", "content": marker}], "prompt": marker},
        {"id": "private-5", "prompt": [marker]},
        {"id": "private-6", "prompt": marker, "params": {"stop": [marker, 7]}},
        {"id": "private-7", "prompt": marker, "metadata": {"note": [marker]}},
        ('{"id": "private-8", "prompt": "' + marker + '" ' + marker + '}').encode(),
        ('{"id": "private-9", "prompt": "' + marker + '"').encode(),
        ('{"id": "private-10", "prompt": "' + marker).encode(),
        marker.encode(),
        {"id": "private-11", "prompt": "x", "context": marker},
        {"id": "private-12", "prompt": "x", "context": [[marker], 7]},
        {"id": "private-13", "messages": marker},
        chat(marker), chat([marker]),
        chat({"role": marker, "content": "user"}),
        chat({"role": "user", "content": {"text": marker}}),
        chat({"role": "user", "content": [{"type": "text", "text": marker}]}),
        {"id": "private-14", "prompt_token_ids": marker},
        {"id": "private-15", "prompt_token_ids": [1, marker]},
        {"id": "private-16", "prompt": "x", "params": marker},
        {"id": "private-17", "prompt": "x", "params": {"stop_token_ids": [marker]}},
        {"id": "private-18", "prompt": "x", "params": {"stop": {marker: 1}}},
        {"id": "private-19", "prompt": "x", "metadata": marker},
        {"id": "private-20", "prompt": "x", "priority": marker * 5},
        ask({"priority": text}), ask({"deadline_ms": text}), ask({"stream": text}),
        ask({"adapter": text}), ask({"reply_topic": text}), ask({text: 1}),
        ask({"params": {"temperature": text}}), ask({"params": {text: 1}}),
        ask({"metadata": {text: 1}}), ask({"metadata": {text * 20: "x"}}),
        ('{"id": "private-21", "%s": 1, "%s": 2}' % (text, text)).encode(),
        ('{"id": "private-22", "%s\\u0000": 1}' % text).encode(),
        chat({"role": "user", "content": "x", text: 1}),
    ]


def private(marker):
    r = Reader("replies", "dead")
    records = private_records(marker)
    trace = [("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
             ("tracestate", b"vendor=1"), ("kafka_correlationId", b"c")]
    send([(v, trace) for v in records])
    got = r.until(lambda s: len(s) == 2 * len(records) - 1)        # with their error replies
    replies = [m for m in got if m.topic() == "replies"]
    check("all have their outcome", len(got) == 2 * len(records) - 1, len(got))
    check("each reply is linked to the trace of its prompt, byte for byte",
          all(header(m, k) == v for m in replies for k, v in trace))


SPANS = {       # by the first word of a name: kind, attributes
    "process": (5, {"messaging.system", "messaging.operation.name", "messaging.operation.type",
                    "messaging.destination.name", "messaging.destination.partition.id",
                    "messaging.kafka.offset", "messaging.consumer.group.name", "messaging.client.id",
                    "loramill.outcome"}),
    "send": (4, {"messaging.system", "messaging.operation.name", "messaging.operation.type",
                 "messaging.destination.name"}),
    "text_completion": (1, {"gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model",
                            "gen_ai.usage.input_tokens", "gen_ai.usage.cache_read.input_tokens",
                            "gen_ai.usage.output_tokens"}),
}


def spans(path):
    """What the collector got of the prompts of private(), the only ones with a traceparent: of each
    what was done with it, by names and attributes that are an interface, in the trace of its sender."""
    n_prompts = len(private_records("x"))
    end, got = time.time() + 20, []
    while time.time() < end and len(got) < 2 * n_prompts + 1:
        time.sleep(0.1)
        got = [json.loads(x) for x in open(path, encoding="utf-8")] if os.path.exists(path) else []
    names = collections.Counter(s["name"].split()[0] for s in got)
    check("spans: a process and a send of each prompt, and one generation", names
          == {"process": n_prompts, "send": n_prompts, "text_completion": 1}, names)
    by_id = {s["spanId"]: s for s in got}
    attributes = lambda s: {a["key"]: a["value"] for a in s["attributes"]}
    roots = [s for s in got if s["name"] == "process prompts"]
    check("their ids are unique, and all are of the sender's trace", len(by_id) == len(got) and all(
        s["traceId"] == "0af7651916cd43dd8448eb211c80319c" for s in got))
    check("what was done with the prompt is the sender's child, and linked to it", len(roots) == n_prompts
          and all(s["parentSpanId"] == "b7ad6b7169203331" and s["links"] == [
              {"traceId": s["traceId"], "spanId": s["parentSpanId"]}] for s in roots))
    check("the rest are children of that, and within its time", all(
        by_id[s["parentSpanId"]] in roots
        and int(by_id[s["parentSpanId"]]["startTimeUnixNano"]) <= int(s["startTimeUnixNano"])
        <= int(s["endTimeUnixNano"]) <= int(by_id[s["parentSpanId"]]["endTimeUnixNano"])
        for s in got if s not in roots))
    now = time.time() * 1e9
    check("they are of this hour", all(now - 3600e9 < int(s["startTimeUnixNano"]) < now for s in got))
    wrong = [s for s in got if (s["kind"], set(attributes(s)) - {"error.type"}) != SPANS[s["name"].split()[0]]]
    check("kinds and attributes are the documented ones", not wrong, wrong[:1])
    bad = [s for s in roots if attributes(s)["loramill.outcome"]["stringValue"] == "dead_letter"]
    check("dead letters are errors, with their code; the others are not", len(bad) == n_prompts - 1 and all(
        ("error.type" in attributes(s), s.get("status")) == ((True, {"code": 2}) if s in bad else (False, None))
        for s in got if s in roots))
    told = open("docs/operations.md", encoding="utf-8").read()
    check("and all of them are documented", all(f"`{a}`" in told for _, x in SPANS.values() for a in x))
    check("the resource is the worker", all({a["key"] for a in s["resource"]} == {
        "service.name", "service.version", "service.instance.id"} for s in got))


def adapters(n):
    r = Reader("replies", "dead")
    send([({"id": f"a-{i}", "prompt": "x", "adapter": f"tenant-{i}/voice"}, [])
          for i in range(int(n))])
    got = r.until(lambda s: len(s) == int(n), 120)
    check(f"{n} adapters that are nowhere: as many dead letters", len(got) == int(n)
          and all(header(m, "loramill-error-code") == b"not_found" for m in got), len(got))


def metrics(port):
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    have = set(re.findall(r"^# TYPE loramill_(\S+) ", page, re.M))
    table = open("docs/operations.md", encoding="utf-8").read()
    table = table[table.index("## Metrics"):table.index("Worth an alert")]
    told = set()
    for row in re.findall(r"^\| (`[^|]+) \|", table, re.M):
        told |= {re.sub(r"\{.*", "", name) for name in re.findall(r"`([^`]+)`", row)}
    check(f"the {len(have)} metrics are the documented ones", have == told,
          (sorted(have - told), sorted(told - have)))
    samples = [x for x in page.splitlines() if x and x[0] != "#"]
    check(f"no label grows with adapters ({len(samples)} samples)", "tenant-" not in page
          and len(samples) < 400, len(samples))
    labels = set(re.findall(r"[{,](\w+)=", page))
    check(f"labels are {sorted(labels)}", labels <= {"version", "worker", "group", "model", "outcome",
                                                     "reason", "event", "topic", "partition", "le",
                                                     "client"})


if __name__ == "__main__":
    globals()[sys.argv[2]](*sys.argv[3:])
    sys.exit(1 if t.failed else 0)
