# SPDX-License-Identifier: Apache-2.0
"""kafka_admin.py BOOTSTRAP COMMAND ...: what the tests ask of a broker, through confluent-kafka.

  brokers N                         exit 0 when N brokers answer
  in_sync N                         the same, and every replica of every partition is in sync
  coordinators GROUP ID...          the brokers that coordinate the group and the transactions
  create TOPIC PARTITIONS [K=V]...  make a topic (fine when it is there)
  delete TOPIC                      delete a topic
  dump TOPIC                        one JSON line a record: key, value, headers (hex where binary)
  leaders TOPIC                     print the brokers that lead its partitions
  elect                             make every partition's preferred broker its leader again
  scram USER PASSWORD               set a user's SCRAM-SHA-512 password
  acl grant|revoke USER OPERATION TOPIC    make or delete an ACL
  lag GROUP TOPIC                   print committed offset and end offset of each partition
  hold PID...                       print "ready"; after a line on stdin stop these processes at a moment when
                                    no transaction is between its end and its markers, and print "held".
                                    They have stood still for 2 s at most then, which is no sleep yet to a worker
"""
import json
import os
import signal
import sys
import time

from confluent_kafka import (Consumer, ConsumerGroupTopicPartitions, ElectionType, KafkaError,
                             TopicPartition)
from confluent_kafka.admin import (AclBinding, AclBindingFilter, AclOperation, AclPermissionType,
                                   AdminClient, NewTopic, ResourcePatternType, ResourceType,
                                   ScramCredentialInfo, ScramMechanism,
                                   UserScramCredentialUpsertion)

PREPARE_COMMIT, PREPARE_ABORT = 2, 3    # of TransactionState
QUIET = {"log_level": 0, "socket.timeout.ms": 5000}


def brokers(bootstrap, n):
    md = AdminClient({"bootstrap.servers": bootstrap, **QUIET}).list_topics(timeout=3)
    return 0 if len(md.brokers) == int(n) else 1


def in_sync(bootstrap, n):
    md = AdminClient({"bootstrap.servers": bootstrap, **QUIET}).list_topics(timeout=3)
    behind = [p for t in md.topics.values() for p in t.partitions.values()
              if p.leader < 0 or len(p.isrs) < len(p.replicas)]
    return 0 if len(md.brokers) == int(n) and not behind else 1


def coordinators(bootstrap, group, *ids):
    topics = AdminClient({"bootstrap.servers": bootstrap, **QUIET}).list_topics(timeout=5).topics

    def leader(topic, name):
        h, partitions = 0, topics[topic].partitions
        for ch in name:
            h = (31 * h + ord(ch)) & 0xffffffff         # String.hashCode(), and then abs()
        return partitions[min(h, 2 ** 32 - h) % len(partitions)].leader
    print(leader("__consumer_offsets", group),
          *(leader("__transaction_state", i) for i in ids if "__transaction_state" in topics))
    return 0


def create(bootstrap, topic, partitions, *config):
    admin = AdminClient({"bootstrap.servers": bootstrap, **QUIET})
    new = NewTopic(topic, int(partitions), config=dict(c.split("=", 1) for c in config))
    end = time.time() + 60
    while True:
        try:
            admin.create_topics([new])[topic].result(20)
            return 0
        except Exception as e:
            code = e.args[0].code()
            if code == KafkaError.TOPIC_ALREADY_EXISTS:
                return 0
            # A broker that takes its time may have made it, or not.
            if code not in (KafkaError._TIMED_OUT, KafkaError.REQUEST_TIMED_OUT) or time.time() > end:
                raise


def delete(bootstrap, topic):
    admin = AdminClient({"bootstrap.servers": bootstrap, **QUIET})     # must outlive the answer
    admin.delete_topics([topic])[topic].result(20)
    return 0


def text(b):
    if b is None:
        return None
    try:
        return b.decode()
    except UnicodeDecodeError:
        return {"hex": b.hex()}


def dump(bootstrap, topic):
    c = Consumer({"bootstrap.servers": bootstrap, "group.id": "dump", "enable.partition.eof": True,
                  "enable.auto.commit": False, **QUIET})
    parts = c.list_topics(topic, timeout=5).topics[topic].partitions
    c.assign([TopicPartition(topic, p, 0) for p in parts])
    ends = 0
    while ends < len(parts):
        m = c.poll(5)
        if m is None:
            return 1
        if m.error():
            ends += m.error().code() == KafkaError._PARTITION_EOF
            continue
        print(json.dumps({"partition": m.partition(), "offset": m.offset(), "key": text(m.key()),
                          "value": text(m.value()),
                          "headers": {k: text(v) for k, v in m.headers() or []}}))
    c.close()
    return 0


def lag(bootstrap, group, topic):
    admin = AdminClient({"bootstrap.servers": bootstrap, **QUIET})
    parts = sorted(admin.list_topics(topic, timeout=5).topics[topic].partitions)
    want = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, p) for p in parts])
    got = admin.list_consumer_group_offsets([want])[group].result(10).topic_partitions
    c = Consumer({"bootstrap.servers": bootstrap, "group.id": "lag-reader", **QUIET})
    for tp in got:
        low, high = c.get_watermark_offsets(TopicPartition(topic, tp.partition), timeout=5)
        print(tp.partition, tp.offset, low, high)
    c.close()
    return 0


def hold(bootstrap, *pids):
    topic, state = "__transaction_state", {}
    c = Consumer({"bootstrap.servers": bootstrap, "group.id": "hold", "enable.partition.eof": True,
                  "enable.auto.commit": False, **QUIET})
    parts = c.list_topics(topic, timeout=20).topics[topic].partitions
    c.assign([TopicPartition(topic, p, 0) for p in parts])
    unread = set(parts)

    def read(timeout):
        ms = c.consume(1000, timeout=timeout)
        for m in ms:
            if not m.error():           # version, the producer's id and epoch, timeout; then the state
                state[m.key()] = m.value()[16] if m.value() else 0
            elif m.error().code() == KafkaError._PARTITION_EOF:
                unread.discard(m.partition())
        return ms

    def signal_all(what):
        for pid in pids:
            os.kill(int(pid), what)

    while unread:
        read(1)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(20):
        signal_all(signal.SIGSTOP)
        start = time.monotonic()
        while read(0.5):
            pass
        if not {PREPARE_COMMIT, PREPARE_ABORT} & set(state.values()) and time.monotonic() - start < 2:
            print("held", flush=True)
            return 0
        signal_all(signal.SIGCONT)
        time.sleep(0.1)
    return 1


def leaders(bootstrap, topic):
    admin = AdminClient({"bootstrap.servers": bootstrap, **QUIET})
    parts = admin.list_topics(topic, timeout=5).topics[topic].partitions
    print(*(p.leader for _, p in sorted(parts.items())))
    return 0


def elect(bootstrap):
    admin = AdminClient({"bootstrap.servers": bootstrap, **QUIET})
    admin.elect_leaders(ElectionType.PREFERRED, None).result(20)
    return 0


def scram(bootstrap, user, password):
    admin = AdminClient({"bootstrap.servers": bootstrap, **QUIET})
    want = UserScramCredentialUpsertion(user, ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096),
                                        password.encode())
    admin.alter_user_scram_credentials([want])[user].result(10)
    return 0


def acl(bootstrap, what, user, operation, topic):
    admin = AdminClient({"bootstrap.servers": bootstrap, **QUIET})
    kind = (ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, f"User:{user}", "*",
            AclOperation[operation.upper()], AclPermissionType.ALLOW)
    calls = (admin.create_acls([AclBinding(*kind)]) if what == "grant"
             else admin.delete_acls([AclBindingFilter(*kind)]))
    for call in calls.values():
        call.result(10)
    return 0


if __name__ == "__main__":
    commands = (brokers, in_sync, coordinators, leaders, elect, create, delete, dump, lag, hold, scram, acl)
    sys.exit({f.__name__: f for f in commands}[sys.argv[2]](sys.argv[1], *sys.argv[3:]))
