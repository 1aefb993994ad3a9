# SPDX-License-Identifier: Apache-2.0
"""prompts.py: what kafka_ratio.py and worker_cost.py send, about 1 KiB each."""
import io
import json

import fastavro
from confluent_kafka import Producer


def fill(bootstrap, n, schema_text, schema_id):
    """The same n prompts to p-json and, in the registry's wire format, to p-avro."""
    schema = fastavro.parse_schema(json.loads(schema_text))
    frame = b"\0" + schema_id.to_bytes(4, "big")
    p = Producer({"bootstrap.servers": bootstrap, "linger.ms": 20, "compression.type": "lz4"})
    for i in range(n):
        d = {"id": f"m{i}", "prompt": "x" * 920, "params": {"max_tokens": 8},
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
