# SPDX-License-Identifier: Apache-2.0
"""prompts.py: what kafka_ratio.py and worker_cost.py send, about 1 KiB each.

By default 920 characters of text: common words at random, the frequent ones more often, which lz4
halves as it does prose. TEXT=x sends the letter x 920 times instead, which is hardly stored,
compressed or sent by anybody: what is left is the clients' own cost.
"""
import io
import json
import os
import random
import sys

import fastavro
from confluent_kafka import Producer


SIZE, TEXT_SIZE, STEP = 920, 1 << 22, 7919
WORDS = """the of and to in a is that for it as was with be by on not he his but at are this have from or had an they
which one you were all her she there would their we him been has when who will no more if out so up said what its about
than into them can only other time new some could these two may first then do any like my now over such our man me even
most made after also well many must before back through years where much your way down should because long each just
state those people too little good world make very year still see own work men day get here old between both under last
never life being while part place home since right until small house found around number without water again letter
order thank please dear customer answer question week month price send sent write wrote friend kind regards""".split()


def texts():
    """A function from a prompt's number to its text, the same in every run."""
    what = os.environ.get("TEXT") or "words"
    if what == "x":
        return lambda i: "x" * SIZE
    if what != "words":
        sys.exit(f"TEXT must be words or x, not {what}")
    words = random.Random(1).choices(WORDS, [1 / (k + 2) for k in range(len(WORDS))], k=TEXT_SIZE // 3)
    text = " ".join(words)[:TEXT_SIZE]
    return lambda i: text[i * STEP % (TEXT_SIZE - SIZE):][:SIZE]


def fill(bootstrap, n, schema_text, schema_id):
    """The same n prompts to p-json and, in the registry's wire format, to p-avro."""
    schema = fastavro.parse_schema(json.loads(schema_text))
    frame = b"\0" + schema_id.to_bytes(4, "big")
    p = Producer({"bootstrap.servers": bootstrap, "linger.ms": 20, "compression.type": "lz4"})
    text = texts()
    for i in range(n):
        d = {"id": f"m{i}", "prompt": text(i), "params": {"max_tokens": 8},
             "metadata": {"i": str(i)}}
        out = io.BytesIO(frame)
        out.seek(0, 2)
        fastavro.schemaless_writer(out, schema, d)
        for name, value in (("p-json", json.dumps(d).encode()), ("p-avro", out.getvalue())):
            while True:
                try:
                    p.produce(name, key=str(i), value=value)
                    break
                except BufferError:
                    p.poll(0.1)
        p.poll(0)
    p.flush(120)
