# SPDX-License-Identifier: Apache-2.0
"""partitions.py BOOTSTRAP COMMAND ...

  big GROUP TOPIC BYTES            commit with so many bytes of metadata; exit 1 when it is refused
  delete TOPIC OFFSET              delete partition 0's records below OFFSET
  retries MAX-MS                   prompts whose engine fails for a while, or for good; TAP
"""
import json
import sys
import time

import trouble as t
from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from trouble import Reader, body, check, header, send


def big(group, topic, size):
    c = Consumer({"bootstrap.servers": t.bootstrap, "group.id": group, "log_level": 3})
    text = "x" * (int(size) - 1)        # Python's client sends the NUL at the end, too
    try:
        c.commit(offsets=[TopicPartition(topic, 0, 0, text)], asynchronous=False)
    except KafkaException as e:
        print("#", e.args[0].name())
        t.failed = True
    c.close()


def delete(topic, offset):
    admin = AdminClient({"bootstrap.servers": t.bootstrap})
    list(admin.delete_records([TopicPartition(topic, 0, int(offset))]).values())[0].result(20)


def retries(n, max_ms):
    """FAIL-2 heals; FAIL-99 never does within `n` attempts or `max_ms`: a dead letter then."""
    r = Reader("replies", "dead")
    start = time.time() * 1000
    send([({"id": "heals", "prompt": "FAIL-2"}, []), ({"id": "never", "prompt": "FAIL-99"}, []),
          ({"id": "well", "prompt": "x"}, [])])
    got = r.until(lambda s: len(s) == 3, 60)
    done = {(header(m, "loramill-request-id") or json.loads(m.value())["id"].encode()).decode(): m
            for m in got}
    check("what heals is answered, and its neighbour", len(got) == 3
          and done["heals"].topic() == done["well"].topic() == "replies"
          and body(done["heals"])["choices"][0]["text"] == "FAIL-2", sorted(done))
    dead = done["never"]
    took = dead.timestamp()[1] - start
    check(f"what does not is a dead letter, out_of_memory, after {took:.0f} ms",
          dead.topic() == "dead" and header(dead, "loramill-error-code") == b"out_of_memory")
    return took, int(n), float(max_ms)


def attempts(n, max_ms):
    took, _, limit = retries(n, max_ms)
    check(f"long before the deadline of {limit:.0f} ms", took < limit)


def deadline(n, max_ms):
    took, _, limit = retries(n, max_ms)
    # backoff is at most 200 ms; the rest is a busy machine
    check(f"at the deadline of {limit:.0f} ms", limit - 250 <= took <= limit + 3000)


if __name__ == "__main__":
    globals()[sys.argv[2]](*sys.argv[3:])
    sys.exit(1 if t.failed else 0)
