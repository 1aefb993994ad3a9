#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# delivery.mode=exactly-once on a real broker: two workers, one of them killed with SIGKILL again and
# again, the broker killed and started again in the middle; a worker stopped in mid-flight whose twin
# takes its transactional.id. A read_committed reader sees each id once.
# Runs alone: each kill must come amid work, and the work must end in time.
. "$(dirname "$0")/../infra/lib.sh"
N=${N:-30000}
infra_begin exactly-once
kafka_start 1 || die "the broker started"
topic_create prompts 4; topic_create replies 2; topic_create dead 1
topic_create small 1 max.message.bytes=2000
cat > "$RUN/worker.properties" <<P
engine.mode=echo
delivery.mode=exactly-once
topics.prompts=prompts
topics.replies=replies
topics.dead_letters=dead
topics.replies_allowed=small,absent
group.id=eos
commit.interval_ms=300
retry.backoff_ms=50
retry.backoff_max_ms=500
http.port=0
kafka.bootstrap.servers=$BOOTSTRAP
kafka.reconnect.backoff.max.ms=1000
$(group_properties)
P
worker() { start_worker "worker-$2" "worker.name=$1"; }         # NAME LOG
# An old librdkafka can't, and says so before it has read anything.
if [ "$OFFSET_MAP" = 0 ]; then
    reason='delivery.mode=exactly-once needs librdkafka 2.2 or newer'
    "$LORAMILL" worker -c "$RUN/worker.properties" --check > "$RUN/check.log" 2>&1
    check "--check refuses exactly-once with status 2 (got $?)" [ $? -eq 2 ]
    check "by name" grep -q "$reason" "$RUN/check.log"
    worker a refused
    wait $!
    check "a worker ends with status 2 (got $?)" [ $? -eq 2 ]
    check "and says why" grep -q "$reason" "$RUN/worker-refused.log"
    exit 0
fi
worker a a0; A=$!
worker b b0; B=$!
d produce prompts 0 "$N"
for i in 1 2 3 4; do
    sleep 0.$((RANDOM % 9))
    kill -9 -- "-$A"; wait "$A" 2>/dev/null
    worker a "a$i"; A=$!
    wait_until 60 grep -q 'assigned prompts' "$RUN/worker-a$i.log" || die "worker a$i has partitions"
    d produce prompts $((N + i * 2000 - 2000)) 2000
done
check "the job ends although a worker was killed four times" d wait replies,dead $((N + 8000)) 180
d verify replies,dead 0 $((N + 8000)) 0 || FAILED=1

# The broker goes away in the middle of transactions, for longer than one may last.
# The workers hold still first, so that none is between the decision to commit and its markers:
# Kafka 4.3.1, killed there, forgets the markers when it is back, and the transaction hangs
# (docs/matrix.md). What is open stays open.
broker=$(cat "$RUN/kafka/n1/pid")
will_hold "$A" "$B"
d produce prompts $((N + 8000)) 4000
check "workers hold still, between no decision and its markers" hold
kill -9 -- "-$broker"
kill -CONT "$A" "$B"
sleep 12
kafka_node 1
wait_until 180 kafka_ready 1
check "and although the broker was away for 12 s" d wait replies,dead $((N + 12000)) 180
d verify replies,dead 0 $((N + 12000)) 0 || FAILED=1
check "no worker gave up" kill -0 "$A" "$B"

# Refused records: one too large for its topic, and one for a topic that is not there.
"$PYTHON" - "$BOOTSTRAP" <<'P'
import json, os, sys
from confluent_kafka import Producer
p = Producer({"bootstrap.servers": sys.argv[1]})
for i, topic in ((0, "small"), (1, "absent")):
    p.produce("prompts", json.dumps({"id": f"refused-{i}", "prompt": os.urandom(2000).hex(),
                                     "params": {"max_tokens": 4000}, "reply_topic": topic}))
assert not p.flush(20)
P
d produce prompts $((N + 12000)) 100
refused() { d count dead refused- 2; }
check "refused replies are dead letters" wait_until 90 refused
check "and hold nobody up" d wait replies $((N + 12100)) 60

# Each tenth of 600 wants a partition or a topic that is not there, and the workers know that: the
# client library refuses these on the spot. They are dead letters, and the others wait for none.
"$PYTHON" - "$BOOTSTRAP" $((N + 12100)) <<'P'
import json, sys
from confluent_kafka import Producer
p, first = Producer({"bootstrap.servers": sys.argv[1]}), int(sys.argv[2])
for i in range(600):
    prompt, headers = {"id": f"p-{first + i - i // 10 - 1}", "prompt": f"number {i}"}, []
    if i % 10 == 0:
        prompt["id"] = f"refused-{2 + i}"
        if i % 20:
            prompt["reply_topic"] = "absent"
        else:
            headers = [("kafka_replyPartition", (7).to_bytes(4, "big"))]
    p.produce("prompts", json.dumps(prompt), headers=headers)
assert not p.flush(20)
P
check "each tenth prompt is refused, the others are answered" d wait replies $((N + 12640)) 60
check "and those refused are dead letters" d wait dead 62 60
N=$((N + 540))

# A zombie: stopped with work in hand until its twin has taken over, then woken.
d produce prompts $((N + 12100)) 8000
kill -STOP "$A"
worker a twin; T=$!
check "the twin and the other worker answer all" d wait replies $((N + 20100)) 180
kill -CONT "$A"
zombie_ends() { ! kill -0 "$A" 2>/dev/null || ! kill -0 "$T" 2>/dev/null; }
d produce prompts $((N + 20100)) 2000
check "one of two with the same transactional.id ends" wait_until 90 zombie_ends
if ended "$A"; then wait "$A"; else wait "$T"; fi; st=$?
check "with status 1 (got $st)" [ $st -eq 1 ]
check "the job ends" d wait replies $((N + 22100)) 180
d verify replies 0 $((N + 22100)) 0 || FAILED=1
