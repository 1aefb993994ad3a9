#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# What brokers do to a worker, one thing after the other, three nodes, a worker of each delivery mode: a
# reply topic has no leader, the group's and the transactions' coordinator is killed, a partition's leader is moved, the network hangs,
# a reply topic is made again, all brokers are away. Every time all prompts that were sent before and during it are answered, nothing
# is a dead letter, /livez stays 200, and the workers of the start are those of the end.
#
#   DOWN=20        seconds without any broker       (make soak: 300)
#   PARTITION=8    seconds without a network        (make soak: 30)
. "$(dirname "$0")/../infra/lib.sh"
: "${DOWN:=20}" "${PARTITION:=8}"
infra_begin brokers
PROXIED=1 kafka_start 3 || die "three brokers started"
echo pass > "$RUN/proxy.mode"
spawn "$RUN/proxy.log" "$PYTHON" tests/chaos/proxy.py "$RUN/proxy.mode" "${PROXIES[@]}"
admin() { "$PYTHON" tests/infra/kafka_admin.py "$BOOTSTRAP" "$@"; }
MODES="at-least-once exactly-once"
topic_create dead 1
# A topic: broker $2 leads its first partition, and so on.
led_by() {              # NAME LEADER...
    "$PYTHON" - "$BOOTSTRAP" "$@" <<'P'
import sys
from confluent_kafka.admin import AdminClient, NewTopic
name, leaders = sys.argv[2], list(map(int, sys.argv[3:]))
replicas = [[b] + [o for o in leaders if o != b] for b in leaders]
a = AdminClient({"bootstrap.servers": sys.argv[1]})
a.create_topics([NewTopic(name, len(leaders), replica_assignment=replicas)])[name].result(20)
P
}
declare -A W PORT
read -r "PORT[at-least-once]" "PORT[exactly-once]" <<< "$(free_ports 2)"
for mode in $MODES; do
    topic_create "$mode" 3; topic_create "$mode-replies" 3; led_by "side-$mode" 1 2 3; led_by "down-$mode" 3
    printf '%s\n' engine.mode=echo "topics.prompts=$mode" "topics.replies=$mode-replies" \
        topics.dead_letters=dead "topics.replies_allowed=side-$mode,down-$mode" "group.id=$mode" "worker.name=$mode" "delivery.mode=$mode" \
        "http.port=${PORT[$mode]}" "journal.dir=$RUN/journal" commit.interval_ms=300 \
        retry.backoff_max_ms=1000 "kafka.bootstrap.servers=$PROXY_BOOTSTRAP" \
        kafka.session.timeout.ms=6000 kafka.heartbeat.interval.ms=500 \
        kafka.reconnect.backoff.max.ms=1000 kafka.socket.timeout.ms=6000 > "$RUN/$mode.properties"
    spawn "$RUN/worker-$mode.log" "$LORAMILL" worker -c "$RUN/$mode.properties"; W[$mode]=$!
done
N=0 MORE=500
# Prompts for both workers.
send() { local m; for m in $MODES; do d produce "$m" $N $MORE || FAILED=1; done; N=$((N + MORE)); }
# Prompts for both, with replies to PREFIX-MODE.
to() {                  # PREFIX FIRST COUNT
    "$PYTHON" - "$BOOTSTRAP" "$@" $MODES <<'P'
import json, sys
from confluent_kafka import Producer
p, (prefix, first, count) = Producer({"bootstrap.servers": sys.argv[1]}), sys.argv[2:5]
for mode in sys.argv[5:]:
    for i in range(int(first), int(first) + int(count)):
        p.produce(mode, json.dumps({"id": f"p-{i}", "prompt": "x", "reply_topic": f"{prefix}-{mode}"}),
                  key=str(i))
assert not p.flush(20)
P
}
livez() { curl -sf -o /dev/null "http://127.0.0.1:${PORT[$1]}/livez"; }
alive() { local m; for m in $MODES; do check "$m: /livez is 200 while $1" livez "$m"; done; }
answered() {
    local m
    for m in $MODES; do check "$m: all is answered: $1" d wait "$m-replies" $N 120; done
}
all_brokers() { admin in_sync 3; }
broker_pid() { cat "$RUN/kafka/n$1/pid"; }
again() { kafka_node "$1"; check "broker $1 is back" wait_until 180 all_brokers; }
kill_broker() { kill -9 -- "-$(broker_pid "$1")"; }

send; answered "nothing has happened yet"
# The only replica of a reply topic goes away: what is for it waits, and nothing else. Exactly-once: one
# transaction finds out, 10 s, and can't end, so another id goes on.
to down 0 5
for mode in $MODES; do check "$mode: replies to a topic of one replica" d wait "down-$mode" 5 90; done
kill_broker 3
to down 5 5; send; answered "a reply topic has no leader"
send; answered "it still has none"
again 3
for mode in $MODES; do
    check "$mode: what waited for it is answered" d wait "down-$mode" 10 90
    d verify "down-$mode" 0 10 $([ $mode = exactly-once ] && echo 0 || echo -1) || FAILED=1
done
for mode in $MODES; do
    coordinators() { who=$(admin coordinators "$mode" exactly-once-exactly-once); }
    wait_until 60 coordinators || die "the coordinators are known"
    read -r c t <<< "$who"
    [ $mode = exactly-once ] && c=$t
    kill_broker "$c"
    send; answered "the coordinator of $mode, broker $c, was killed"
    again "$c"
done
# What the killed brokers led is led by others; each gets it back, with nobody dying.
leaders() { admin leaders exactly-once-replies && admin leaders at-least-once-replies && admin leaders exactly-once; }
before=$(leaders) || die "who leads is known"
send; admin elect
moved() { local now; now=$(leaders) && [ "$now" != "$before" ]; }
check "leaders are moved" wait_until 60 moved
send; answered "leaders were moved"

# A reply topic is deleted and made again with other leaders, and the producer sees only the new one. The
# leader epochs of the old one were higher, for its leaders had changed: librdkafka (2.15.1) keeps to them.
# Exactly-once: a transaction may time out, 10 s. At-least-once: the statistics of 20 s tell.
to side 0 30
for mode in $MODES; do check "$mode: replies to a topic of their own" d wait "side-$mode" 30 90; done
for mode in $MODES; do kill -STOP -- "-${W[$mode]}"; done
for mode in $MODES; do admin delete "side-$mode"; done
sleep 2
for mode in $MODES; do wait_until 60 led_by "side-$mode" 2 3 1 || not_ok "$mode: the topic is made again"; done
for mode in $MODES; do kill -CONT -- "-${W[$mode]}"; done
to side 30 30; send
for mode in $MODES; do check "$mode: the same when it was made again" d wait "side-$mode" 30 90; done
answered "a reply topic was made again"
for mode in $MODES; do
    d verify "side-$mode" 30 30 $([ $mode = exactly-once ] && echo 0 || echo -1) || FAILED=1
done

echo hang > "$RUN/proxy.mode"
send; sleep "$PARTITION"; alive "the network hangs for $PARTITION s"
echo cut > "$RUN/proxy.mode"; sleep 2; echo pass > "$RUN/proxy.mode"
answered "the network was away"

will_hold "${W[@]}"
send
check "workers hold still, between no decision and its markers" hold
for b in 1 2 3; do kill_broker $b; done
for mode in $MODES; do kill -CONT -- "-${W[$mode]}"; done
sleep "$DOWN"; alive "all brokers are away for $DOWN s"
for b in 1 2 3; do kafka_node $b; done
check "all brokers are back" wait_until 240 all_brokers
send; answered "all brokers were away"

for mode in $MODES; do
    d verify "$mode-replies" 0 $N $([ $mode = exactly-once ] && echo 0 || echo -1) || FAILED=1
    check "$mode: the lag is zero" wait_until 60 lag_is_zero "$mode" "$mode" 3
    kill -TERM "${W[$mode]}"; wait "${W[$mode]}"
    check "$mode: the worker of the start ends with status 0 (got $?)" [ $? -eq 0 ]
done
check "nothing became a dead letter" d count dead p- 0
