#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# SIGTERM when nothing answers. Workers whose brokers fall silent for ever at one request, in each
# phase of a transaction and of the group, are told to end, all at once: they do inside the budget,
# with status 0, and when the brokers are back their successors answer what is left, nothing twice.
# Then a schema registry that is silent, which only its prompts notice: nothing else waits, an end does not,
# and a death while one waits says nothing about it.
# Then workers that are told at any moment; what all of them were sent is answered.
# Then engines that hang while their worker ends: status 1, and the next worker knows the suspects.
. "$(dirname "$0")/../infra/lib.sh"
infra_begin shutdown
# Transactions that last too long are ended soon, for the phase find-out.
KAFKA_EXTRA=transaction.abort.timed.out.transaction.cleanup.interval.ms=500
PROXIED=1 kafka_start 1 || die "the broker started"
echo pass > "$RUN/proxy.mode"
spawn "$RUN/proxy.log" "$PYTHON" tests/chaos/proxy.py "$RUN/proxy.mode" "${PROXIES[@]}"
topic_create replies 1; topic_create replies-alo 1; topic_create dead 1
cat > "$RUN/worker.properties" <<W
engine.mode=echo
topics.replies=replies
topics.dead_letters=dead
delivery.mode=exactly-once
commit.interval_ms=200
drain.timeout_ms=1000
http.port=0
journal.dir=$RUN/journal
kafka.bootstrap.servers=$PROXY_BOOTSTRAP
kafka.session.timeout.ms=6000
kafka.heartbeat.interval.ms=500
W
worker() {      # NAME LOG [PROPERTY]...
    start_worker "$2" "worker.name=$1" "group.id=$1" "topics.prompts=$1" "${@:3}"
}

# PHASE:KEY of the request that is answered no more. find-out: the end of a transaction comes so late that
# the broker has aborted it; a new producer is made, and asks what the group holds (offset fetch).
PHASES=(assign:9 init:22 produce:0 add-offsets:25 offsets:28 end:26 find-out:9 leave:13 alo-produce:0
        alo-commit:8)
# s: the drain's 1, 6 to leave the group, 5 until librdkafka is left alone; with at-least-once 5 for the last
# commit; and a busy machine's.
budget() { case $1 in alo-*) echo 26 ;; *) echo 20 ;; esac; }
declare -A PID
more() {
    case $1 in
    alo-*) echo delivery.mode=at-least-once topics.replies=replies-alo ;;
    find-out) echo kafka.producer.transaction.timeout.ms=2000 kafka.producer.socket.timeout.ms=2000 ;;
    esac
}
rules() {
    local p
    for p in "${PHASES[@]}"; do echo "hang-at ${p#*:} ${p%:*}"; done
    printf 'late 26 find-out 4000\n%.0s' 1 2   # it is sent again after 2 s
}
for p in "${PHASES[@]}"; do topic_create "${p%:*}" 1; done
# A phase that is passed at work needs a worker at work first, and prompts then.
sent=0 alo=100000
for p in "${PHASES[@]}"; do
    name=${p%:*}
    [ "$name" = assign ] || [ "$name" = init ] && continue
    worker "$name" "first-$name" $(more "$name"); PID[$name]=$W
done
assigned() { [ "$(grep -l 'assigned ' "$RUN"/first-*.log | wc -l)" = $((${#PHASES[@]} - 2)) ]; }
check "workers are at work" wait_until 60 assigned
sleep 1                         # init_transactions() is over
rules > "$RUN/proxy.new"; mv "$RUN/proxy.new" "$RUN/proxy.mode"; sleep 0.5
# A hundred prompts for each, at one moment.
jobs=()
for p in "${PHASES[@]}"; do
    name=${p%:*}
    case $name in
    alo-*) jobs+=("$name:$alo"); alo=$((alo + 100)) ;;
    *) jobs+=("$name:$sent"); sent=$((sent + 100)) ;;
    esac
done
worker assign first-assign; PID[assign]=$W
worker init first-init; PID[init]=$W
"$PYTHON" - "$BOOTSTRAP" "${jobs[@]}" <<'Q' || die "prompts sent"
import json, sys
from confluent_kafka import Producer
p = Producer({"bootstrap.servers": sys.argv[1]})
for topic, first in (job.split(":") for job in sys.argv[2:]):
    for i in range(int(first), int(first) + 100):
        p.produce(topic, json.dumps({"id": f"p-{i}", "prompt": f"number {i}"}))
assert not p.flush(20)
Q
came() { grep -q "request $1 of $2 has come" "$RUN/proxy.log"; }
for p in "${PHASES[@]}"; do
    [ "$p" = leave:13 ] || wait_until 60 came "${p#*:}" "${p%:*}" || not_ok "the request of $p came"
done
start=$SECONDS
for name in "${!PID[@]}"; do kill -TERM "${PID[$name]}"; done
for p in "${PHASES[@]}"; do
    name=${p%:*}
    wait "${PID[$name]}"; st=$?
    check "silent brokers, $name: status 0 (got $st) after $((SECONDS - start)) s" \
        [ $st -eq 0 -a $((SECONDS - start)) -le "$(budget "$name")" ]
done
check "one had made a new producer, to find out" grep -q 'a new producer finds out' "$RUN/first-find-out.log"
came 13 leave || not_ok "the worker wanted to leave the group"
echo pass > "$RUN/proxy.mode"
for p in "${PHASES[@]}"; do
    name=${p%:*}
    worker "$name" "second-$name" $(more "$name"); PID[$name]=$W
done
check "the next workers answer what is left" d wait replies "$sent" 90
check "and the others" d wait replies-alo $((alo - 100000)) 60
d verify replies,dead 0 "$sent" 0 || FAILED=1
d verify replies-alo 100000 $((alo - 100000)) -1 || FAILED=1
for name in "${!PID[@]}"; do kill -TERM "${PID[$name]}"; done
good=0
for name in "${!PID[@]}"; do wait "${PID[$name]}" && good=$((good + 1)); done
check "they end with status 0 ($good)" [ $good = ${#PHASES[@]} ]

# Registries that take every question and answer none.
SILENT=$(free_ports 2)
spawn "$RUN/silent.log" "$PYTHON" -c '
import signal, socket, sys
taken = [socket.create_server(("127.0.0.1", int(p)), backlog=64) for p in sys.argv[1:]]
print("silent", flush=True)
signal.pause()' $SILENT
wait_until 60 grep -q silent "$RUN/silent.log" || die "registries that are silent"
topic_create schemaless 1
registry_worker() {
    worker schemaless "$1" delivery.mode=at-least-once drain.timeout_ms=10000 engine.hang_timeout_ms=4000 \
        "registry.url=$(printf 'http://127.0.0.1:%s,' $SILENT | sed 's/,$//')"
    wait_until 60 grep -q 'assigned ' "$RUN/$1.log" || not_ok "$1 is at work"
}
plain() {       # ID: a prompt in Avro, and one in JSON behind it
    "$PYTHON" - "$BOOTSTRAP" "$1" <<'Q'
import json, sys
from confluent_kafka import Producer
p = Producer({"bootstrap.servers": sys.argv[1]})
p.produce("schemaless", b"\0\0\0\0\7\2\2x")
p.produce("schemaless", json.dumps({"id": f"p-{sys.argv[2]}", "prompt": f"number {sys.argv[2]}"}))
assert not p.flush(20)
Q
}
registry_worker registry-killed; KILLED=$W
plain "$sent"
start=$SECONDS
check "a prompt that needs no registry is answered" d wait replies $((sent + 1)) 30
check "and at once ($((SECONDS - start)) s)" [ $((SECONDS - start)) -le 8 ]
kill -9 -- "-$KILLED"; wait "$KILLED" 2> /dev/null
registry_worker registry
plain $((sent + 1))
check "so it is by the next worker" d wait replies $((sent + 2)) 30
sleep 5                         # more than engine.hang_timeout_ms
start=$SECONDS
kill -TERM "$W"; wait "$W"; st=$?
check "silent registry: status 0 (got $st) after $((SECONDS - start)) s" [ $st -eq 0 -a $((SECONDS - start)) -le 9 ]
died() { has 'died with\|to dead:' registry; }
check "nobody has died of waiting for it" [ "$(died && echo yes)" != yes ]

# At the start it is waited for, for eleven seconds; the signal may be handed to any thread of a library's.
worker schemaless starting replies.encoding=avro "registry.url=$(printf 'http://127.0.0.1:%s,' $SILENT | sed 's/,$//')"
check "a start says whom it asks" wait_until 60 has "asking the schema registry http://127.0.0.1:${SILENT%% *}," starting
start=$SECONDS
kill -TERM "$W"; wait "$W"; st=$?
check "while it starts: status 0 (got $st) after $((SECONDS - start)) s" [ $st -eq 0 -a $((SECONDS - start)) -le 8 ]

# Workers of one group, of both modes, told to end at any moment from their first word on: at the start, while
# partitions come and go, and at work: a thousand prompts a second come all the time, so whoever gets partitions
# finds some waiting.
topic_create any 4; topic_create any-replies 1
"$PYTHON" - "$BOOTSTRAP" "$RUN/any-end" > "$RUN/any-sent" <<'Q' &
import json, os, sys, time
from confluent_kafka import Producer
p, n = Producer({"bootstrap.servers": sys.argv[1]}), 0
while not os.path.exists(sys.argv[2]):
    for i in range(n, n + 50):
        p.produce("any", json.dumps({"id": f"p-{i}", "prompt": "x"}))
    n += 50
    p.poll(0)
    time.sleep(0.05)
assert not p.flush(30)
print(n)
Q
LOAD=$!
MODES=(at-least-once exactly-once)
any_moment() {  # N: one of them, and its status
    start_worker "any-$1" "worker.name=any-$1" group.id=any topics.prompts=any topics.replies=any-replies \
        "delivery.mode=${MODES[$1 % 2]}"
    until [ -s "$RUN/any-$1.log" ]; do sleep 0.02; done
    sleep "0.$((RANDOM % 10))"
    kill -TERM "$W"; wait "$W"; echo "any-$1: $?" >> "$RUN/any-moment"
}
for round in 0 5 10 15; do
    for i in 1 2 3 4 5; do any_moment $((round + i)) & ENDING[i]=$!; sleep 0.2; done
    wait "${ENDING[@]}"
done
touch "$RUN/any-end"; wait "$LOAD" || die "prompts sent"
n=$(cat "$RUN/any-sent")
bad=$(grep -v ': 0$' "$RUN/any-moment")
check "told to end at any moment: status 0, all 20 (others: ${bad:-none})" \
    [ "$(grep -c ': 0$' "$RUN/any-moment")" = 20 ]
start_worker any-last worker.name=any-last group.id=any topics.prompts=any topics.replies=any-replies \
    delivery.mode=at-least-once
check "what they have left of $n prompts is answered by the next" d wait any-replies "$n" 180
d verify any-replies 0 "$n" -1 || FAILED=1
check "and nothing of it is unfinished" wait_until 60 lag_is_zero any any 4
stop "$W" "the next"

# Engines that hang: one is found before its drain ends, the other has a drain too short to tell.
declare -A HUNG MOST=([hung-in-drain]=25 [hung-at-end]=30)
hang() {        # NAME PROPERTY...
    local name=$1; shift
    topic_create "$name" 1
    worker "$name" "$name" log.level=debug "$@"
    HUNG[$name]=$W
    "$PYTHON" - "$BOOTSTRAP" "$name" <<'Q'
import json, sys
from confluent_kafka import Producer
p = Producer({"bootstrap.servers": sys.argv[1]})
p.produce(sys.argv[2], json.dumps({"id": "h", "prompt": "POISON-HANG"}))
assert not p.flush(20)
Q
}
PROGRAM=("$BUILD/tests/integration/poison_worker")
hang hung-in-drain engine.hang_timeout_ms=6000 drain.timeout_ms=60000
hang hung-at-end engine.hang_timeout_ms=60000 drain.timeout_ms=500
for name in "${!HUNG[@]}"; do
    wait_until 60 grep -q ' runs$' "$RUN/$name.log" || not_ok "$name: its prompt runs"
done
start=$SECONDS
kill -TERM "${HUNG[@]}"
for name in hung-in-drain hung-at-end; do
    wait "${HUNG[$name]}"; st=$?
    check "$name: status 1 (got $st) after $((SECONDS - start)) s" \
        [ $st -eq 1 -a $((SECONDS - start)) -le "${MOST[$name]}" ]
    check "$name: the log says so" grep -q 'the engine hangs for' "$RUN/$name.log"
done
PROGRAM=("$LORAMILL" worker)
topic_create nothing 1
worker nothing after
suspects() { [ "$(cat "$RUN"/*.log | grep -c 'died with 1 prompts in the engine (hung)')" = 2 ]; }
check "the next worker knows the suspects" wait_until 60 suspects
kill -TERM "$W"; wait "$W"; check "and ends with status 0 (got $?)" [ $? -eq 0 ]
