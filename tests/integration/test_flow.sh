#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# What is read, when, and in which order: budgets in messages and tokens, urgent topics, prompts that
# wait for longer than max.poll.interval.ms, order by key through kills, the KIP-848 protocol, a
# cooperative revocation that leaves kept partitions alone, and what is handed back because it can't be finished.
# Runs alone: bounds in ms what a crash repeats.
. "$(dirname "$0")/../infra/lib.sh"
infra_begin flow
kafka_start 1 || die "the broker started"
STORE_PORT=$(free_ports 1)      # nobody listens: prompts that name an adapter wait
HTTP=$(free_ports 1)
cat > "$RUN/worker.properties" <<P
engine.mode=echo
adapters.url=http://127.0.0.1:$STORE_PORT/{adapter}
adapters.cache_dir=$RUN/cache
topics.replies=replies
topics.dead_letters=dead
commit.interval_ms=200
retry.backoff_ms=50
retry.backoff_max_ms=500
http.address=127.0.0.1
http.port=$HTTP
kafka.bootstrap.servers=$BOOTSTRAP
P
# worker NAME [KEY=VALUE]...; $W is its pid
worker() { start_worker "worker-$1" "worker.name=$1" $(group_properties) "${@:2}"; }
topic_create replies 2; topic_create dead 1

# 1. Budgets. 5,000 prompts that can't run yet: the intake holds three quarters of its 200, for there
# is a more urgent topic, whose prompts are read and answered.
if part budget; then
topic_create bulk 2; topic_create urgent 1
d produce bulk 0 5000 acme 1
worker budget topics.prompts=bulk,urgent topics.priorities=urgent=10 intake.max_messages=200 \
    group.id=budget kafka.max.poll.interval.ms=6000 revoke.drain_ms=2000
is_paused() { [ "$(metric intake_paused)" = 1 ] && [ "$(metric in_flight_records)" -ge 150 ]; }
check "a full intake pauses" wait_until 60 is_paused
before=$(metric 'rebalances_total{event="assign"}')
d produce urgent 100000 500
d verify replies 100000 0 0 > /dev/null
check "urgent prompts are answered all the same" d wait replies 500 90
sleep 13
held=$(metric in_flight_records)
check "the others hold about three quarters of the budget ($held of 200)" \
    [ "$held" -ge 150 -a "$held" -le 200 ]
check "prompts that wait for twice max.poll.interval.ms cause no rebalance" \
    [ "$(metric 'rebalances_total{event="assign"}')" = "$before" ]
stop "$W" "a worker whose prompts wait"
for budget in tokens=2000 bytes=50000; do
    of=${budget%=*} most=${budget#*=}
    worker "$of" topics.prompts=bulk "group.id=$of" "intake.max_$of=$most"
    is_full() { [ "$(metric intake_paused)" = 1 ] && [ "$(metric "in_flight_$of")" -ge "$most" ]; }
    check "so does one that holds its $of' budget" wait_until 60 is_full
    sleep 1
    held=$(metric in_flight_records) is=$(metric "in_flight_$of")
    check "and holds little more ($is $of, $held prompts)" [ "$is" -le $((2 * most)) -a "$held" -lt 5000 ]
    kill -9 -- "-$W"; wait "$W" 2>/dev/null
done
fi

# 2. Order by key, exactly once, with a worker that is killed and one that joins: no reply of a key
# comes before an earlier one.
if part order; then
topic_create keyed 4; topic_create ordered 1
common=(topics.prompts=keyed topics.replies=ordered group.id=keyed delivery.order=key
        delivery.mode=exactly-once transaction.interval_ms=20 http.port=0)
worker key1 "${common[@]}"; K1=$W
d produce keyed 0 3000
worker key2 "${common[@]}"; K2=$W
sleep 4
kill -9 -- "-$K1"; wait "$K1" 2>/dev/null
worker key3 "${common[@]}"; K3=$W
check "keyed prompts are answered" d wait ordered 3000 120
d order ordered 3000 || FAILED=1
stop "$K2" "a worker with keys"; stop "$K3" "its neighbour"
fi

# 3. KIP-848: the same promises under group.protocol=consumer.
if part kip848; then
topic_create new 4; topic_create newreplies 1
start_new() {
    GROUP_PROTOCOL=consumer worker "$1" topics.prompts=new topics.replies=newreplies group.id=new \
        http.port=0
}
start_new n1; N1=$W
start_new n2; N2=$W
d produce new 0 60000 &
P=$!
d wait newreplies 4000 60 > /dev/null
kill -9 -- "-$N1"; wait "$N1" 2>/dev/null
start_new n3; N3=$W
wait "$P"
check "KIP-848: the job ends although a worker was killed" d wait newreplies 60000 120
d verify newreplies 0 60000 -1 || FAILED=1
d age newreplies 400 || FAILED=1
stop "$N2" "a worker"; stop "$N3" "its neighbour"
fi

# 4. A cooperative revocation. Long generations run on all partitions; another worker joins. What it
# takes is drained.
MODEL=(engine.mode=model "model.path=$PWD/tests/models/storefront" backend=cpu threads=1)
if part drain; then
topic_create long 4; topic_create longreplies 1
worker long1 "${MODEL[@]}" \
    topics.prompts=long topics.replies=longreplies group.id=long revoke.drain_ms=60000 \
    engine.max_seqs=4 engine.max_waiting=8 intake.max_messages=8
L1=$W
"$PYTHON" - "$BOOTSTRAP" <<'P'
import json, sys
from confluent_kafka import Producer
p = Producer({"bootstrap.servers": sys.argv[1]})
for i in range(400):
    p.produce("long", json.dumps({"id": f"p-{i}", "prompt": "Dear customer", "params": {
        "max_tokens": 150, "ignore_eos": True, "temperature": 0}}), partition=i % 4)
assert not p.flush(20)
P
check "long prompts run" d wait longreplies 4 90
worker long2 "${MODEL[@]}" topics.prompts=long topics.replies=longreplies group.id=long http.port=0
L2=$W
# Below 2.10 librdkafka may lose them all instead (docs/matrix.md), and has given partitions up, too.
revoked() { grep -q 'revoked long' "$RUN/worker-long1.log" ||
            { [ "$REBALANCES" = 0 ] && grep -q 'lost long' "$RUN/worker-long1.log"; }; }
check "the second worker makes the first give partitions up" wait_until 60 revoked
check "all is answered" d wait longreplies 400 180
# Without the offset map, what was finished behind a prompt that had not started runs again. And below 2.10
# librdkafka may lose what the first worker keeps (docs/matrix.md): the second one's then.
d verify longreplies 0 400 $([ "$REBALANCES" = 1 ] && echo 0 || echo -1) || FAILED=1
not_cut() { ! grep -q 'unfinished prompts are handed back' "$RUN/worker-long1.log"; }
check "no running prompt was cut off" not_cut
stop "$L1" "the first worker"
stop "$L2" "the second worker"
fi

# 5. What a worker keeps is not interrupted. A generation runs on each of two partitions and ends when it is told
# to; another worker joins. That of the partition that stays is answered and committed while the other one is not
# let go. New prompts of it are read when that is over: the client library fetches nothing before.
if part kept; then
topic_create kept 2; topic_create keptreplies 1
export HELD_UNTIL=$RUN/told
PROGRAM=("$BUILD/tests/integration/poison_worker")
kept() {            # NAME [KEY=VALUE]...
    worker "$1" topics.prompts=kept topics.replies=keptreplies group.id=kept revoke.drain_ms=60000 log.level=debug "${@:2}"
}
to_partition() {    # ID PROMPT PARTITION
    "$PYTHON" - "$BOOTSTRAP" "$@" <<'P'
import json, sys
from confluent_kafka import Producer
p = Producer({"bootstrap.servers": sys.argv[1]})
p.produce("kept", json.dumps({"id": f"p-{sys.argv[2]}", "prompt": sys.argv[3]}), partition=int(sys.argv[4]))
assert not p.flush(20)
P
}
kept kept1; K1=$W
to_partition 0 HELD-0 0; to_partition 1 HELD-1 1
both_run() { [ "$(grep -c 'kept \[.\] @0 runs$' "$RUN/worker-kept1.log")" = 2 ]; }
check "a generation on each of two partitions" wait_until 60 both_run
kept kept2 http.port=0; K2=$W
check "another worker takes one of them" wait_until 60 has 'revoked kept' worker-kept1
gone=$(sed -n 's/.* revoked kept \[\(.\)\].*/\1/p' "$RUN/worker-kept1.log") stays=$((1 - gone))
to_partition 2 "number 2" $stays
touch "$HELD_UNTIL-$stays"
check "that of the one that stays is answered" d wait keptreplies 1 90
is_committed() { [[ "$(d committed kept kept $stays)" == 1* ]]; }
check "and committed" wait_until 60 is_committed
waits() { [ "$(metric rebalance_drain_seconds_count)" = 0 ] && ! has 'assigned kept' worker-kept2; }
check "while the other one is not let go, for its generation goes on" waits
touch "$HELD_UNTIL-$gone"
check "when that ends it goes" wait_until 60 has "assigned kept \[$gone\]" worker-kept2
check "and all is answered" d wait keptreplies 3 90
d verify keptreplies 0 3 0 || FAILED=1
not_back() { ! has 'handed back$' worker-kept1; }
check "nothing is handed back" not_back
stop "$K1" "the first worker"; stop "$K2" "the second worker"
PROGRAM=("$LORAMILL" worker)
fi

# 6. What can't be finished in time is handed back: a generation that outlasts drain.timeout_ms when its worker
# ends, and one that outlasts revoke.drain_ms when its partition goes. It is no outcome, however much there is of
# it: the next worker generates all of it.
if part handback; then
topic_create cut 2; topic_create cutreplies 1
cut() {             # NAME [KEY=VALUE]...
    worker "$1" "${MODEL[@]}" topics.prompts=cut topics.replies=cutreplies group.id=cut engine.max_seqs=64 \
        log.level=debug http.port=0 "${@:2}"
}
"$PYTHON" - "$BOOTSTRAP" <<'P' || die "prompts sent"
import json, sys
from confluent_kafka import Producer
p = Producer({"bootstrap.servers": sys.argv[1]})
for i in range(4):                      # each is as much as the engine runs at once
    p.produce("cut", json.dumps({"id": f"p-{i}", "prompt": "event ->", "params": {
        "max_tokens": 460, "n": 64, "ignore_eos": True, "temperature": 1}}), partition=i % 2)
assert not p.flush(20)
P
all_run() { [ "$(grep -c 'cut \[.\] @[0-9]* runs$' "$RUN/worker-$1.log")" = 4 ]; }
handed_back() { has ' [1-9][0-9]* unfinished prompts are handed back' "worker-$1"; }
cut cut1 drain.timeout_ms=500
check "generations of seconds run" wait_until 60 all_run cut1
start=$SECONDS
stop "$W" "a worker that may drain for half a second"
check "after $((SECONDS - start)) s, and hands back" [ $((SECONDS - start)) -le 14 ]
check "what it could not finish: $(grep -o '[0-9]* unfinished prompts' "$RUN/worker-cut1.log")" handed_back cut1
cut cut2 revoke.drain_ms=500; C2=$W
check "the next worker runs them" wait_until 60 all_run cut2
cut cut3; C3=$W
check "of which another one gets a partition" wait_until 60 has 'assigned cut' worker-cut3
check "what the one before could not finish: $(grep -o '[0-9]* unfinished prompts' "$RUN/worker-cut2.log")" handed_back cut2
check "all is answered" d wait cutreplies 4 300
d whole cutreplies 4 $((64 * 460)) || FAILED=1
stop "$C2" "the next worker"; stop "$C3" "the other one"
fi
