#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Offsets that are not there: transactional prompts with aborted ones between and markers at the end, a
# compacted topic, records deleted while they are read, a topic deleted and made again. Everything
# that exists is answered, and an idle group's lag is zero. Then two workers with one
# group.instance.id, in both group protocols: one of them ends with status 1, and says why.
. "$(dirname "$0")/../infra/lib.sh"
: "${PROTOCOLS:=classic consumer}" "${MODES:=at-least-once exactly-once}"
infra_begin gaps
kafka_start 1 || die "the broker started"
topic_create replies 2; topic_create dead 1
topic_create txn 2; topic_create compacted 1 cleanup.policy=compact segment.ms=500 \
    min.cleanable.dirty.ratio=0.01 max.compaction.lag.ms=1000
topic_create deleted 1
cat > "$RUN/worker.properties" <<P
engine.mode=echo
topics.replies=replies
topics.dead_letters=dead
commit.interval_ms=200
http.port=0
kafka.bootstrap.servers=$BOOTSTRAP
kafka.topic.metadata.refresh.interval.ms=1000
P
worker() {      # NAME PROPERTY...
    N=$((${N:-0} + 1))
    start_worker "worker-$1.$N" "worker.name=$1" "group.id=$1" $(group_properties) "${@:2}"
}
end() { kill -TERM "$W"; wait "$W"; check "$1: status 0 (got $?)" [ $? -eq 0 ]; }

"$PYTHON" - "$BOOTSTRAP" <<'P'
import json, sys, time
from confluent_kafka import Producer
p = Producer({"bootstrap.servers": sys.argv[1], "transactional.id": "t"})
p.init_transactions()
for n in range(20):                 # every third transaction is aborted
    p.begin_transaction()
    for i in range(10):
        p.produce("txn", json.dumps({"id": f"{'no' if n % 3 == 2 else 't'}-{n}-{i}", "prompt": "x"}))
    p.abort_transaction() if n % 3 == 2 else p.commit_transaction()
q = Producer({"bootstrap.servers": sys.argv[1]})
for i in range(400):                # 40 keys: most of it is compacted away
    q.produce("compacted", json.dumps({"id": f"k-{i}", "prompt": "x"}), key=str(i % 40))
    if i % 100 == 99:
        q.flush(10); time.sleep(0.7)
q.produce("compacted", json.dumps({"id": "k-last", "prompt": "x"}), key="last")
assert q.flush(10) == 0
P
if part txn; then
for mode in $MODES; do
    worker "txn" topics.prompts=txn "delivery.mode=$mode" "group.id=txn-$mode"
    have() { d count replies t- "$1"; }
    check "$mode: committed prompts are answered" wait_until 60 \
        have $([ $mode = exactly-once ] && echo 280 || echo 140)
    check "$mode: the lag of an idle group is zero, past the markers" wait_until 60 lag_is_zero "txn-$mode" txn 2
    check "$mode: aborted prompts are not" d count replies no- 0
    end "$mode"
done
fi

if part compacted; then
sleep 3                             # the cleaner has had its time
worker compacted topics.prompts=compacted
last() { d count replies k-last 1; }
check "a compacted topic is read to its end" wait_until 60 last
check "and its lag is zero" wait_until 60 lag_is_zero compacted compacted
end compacted
fi

if part deleted; then
d produce deleted 0 3000
worker deleted topics.prompts=deleted
wait_until 60 d count replies p-2999 1
d produce deleted 3000 1000
"$PYTHON" - "$BOOTSTRAP" <<'P'
import sys
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
admin = AdminClient({"bootstrap.servers": sys.argv[1]})
list(admin.delete_records([TopicPartition("deleted", 0, 2500)]).values())[0].result(20)
P
check "deleted records do no harm" wait_until 60 d count replies p-3999 1
check "and leave no lag" wait_until 60 lag_is_zero deleted deleted
"$PYTHON" tests/infra/kafka_admin.py "$BOOTSTRAP" delete deleted; sleep 2
topic_create deleted 1
d produce deleted 5000 100
check "a topic that was made again is read from its beginning" wait_until 60 d count replies p-5099 1
check "and committed there" wait_until 60 lag_is_zero deleted deleted
end deleted
fi

topic_create twins 2
if part twins; then
for GROUP_PROTOCOL in $PROTOCOLS; do
    protocol=$GROUP_PROTOCOL
    worker "twin-$protocol" topics.prompts=twins kafka.consumer.group.instance.id=one
    A=$W
    wait_until 60 grep -q 'assigned twins' "$RUN/worker-twin-$protocol.$N.log"
    worker "twin-$protocol" topics.prompts=twins kafka.consumer.group.instance.id=one
    B=$W
    one_ends() { ended "$A" || ended "$B"; }
    check "$protocol: one of two with the same group.instance.id ends" wait_until 60 one_ends
    if ended "$A"; then L=$A W=$B; else L=$B W=$A; fi
    one_ends || kill -9 "$L"
    wait "$L"; st=$?
    check "$protocol: with status 1 (got $st)" [ "$st" -eq 1 ]
    end "$protocol: the other"
done
fi
