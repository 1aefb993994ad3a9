#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# What a partition can bear. A map of finished offsets that grows to its limit, and one that is damaged;
# records deleted that were not read yet; partitions that go and come back while they are paused; workers
# that come and go all the time; order by key while prompts wait and heal; prompts that the engine fails
# again and again, also when half of their reply was streamed; partitions added to a topic that is read, and
# new topics of a pattern.
. "$(dirname "$0")/../infra/lib.sh"
infra_begin partitions
kafka_start 1 || die "the broker started"
p() { "$PYTHON" tests/integration/partitions.py "$BOOTSTRAP" "$@"; }
STORE_PORT=$(free_ports 1) HTTP=$(free_ports 1)
ADAPTER=$(adapter_ids tests/models/storefront-adapters | head -1)
topic_create replies 2; topic_create dead 1
cat > "$RUN/worker.properties" <<P
engine.mode=echo
adapters.url=http://127.0.0.1:$STORE_PORT/{adapter}
adapters.cache_dir=$RUN/cache
topics.replies=replies
topics.dead_letters=dead
commit.interval_ms=200
retry.backoff_ms=50
retry.backoff_max_ms=200
poison.max_attempts=0
http.address=127.0.0.1
kafka.bootstrap.servers=$BOOTSTRAP
kafka.session.timeout.ms=6000
kafka.heartbeat.interval.ms=500
P
MODEL=(engine.mode=model "model.path=$PWD/tests/models/storefront" backend=cpu threads=1)
# worker NAME TOPIC [KEY=VALUE]...; the topic is the group too; $W is its pid
worker() {
    start_worker "worker-$1" "worker.name=$1" "topics.prompts=$2" "group.id=$2" http.port=0 "${@:3}"
    wait_until 60 grep -qE "assigned $2" "$RUN/worker-$1.log" || die "worker $1 has partitions"
}
# The store: prompts that name an adapter wait until it is there.
store_up() { nginx_start tests/models/storefront-adapters "$STORE_PORT" || die "nginx started"; S=$!; }
store_down() { kill -TERM "$S"; wait "$S" 2> /dev/null; rm -rf "$RUN/cache"; }

# 1. The map: every second prompt waits, so each offset costs a bit. At three quarters of 4,096 bytes
# reading stops; nothing is refused by the broker, and a crash repeats nothing that the map holds.
topic_create map 1
d produce map 0 40000 "$ADAPTER" 2
worker map map "http.port=$HTTP" in_flight.max_messages=100000 intake.max_messages=100000
braked() { [ "$(metric partition_offset_metadata_bytes)" -ge 3072 ] && a=$(metric consumed_records_total) && sleep 1 && [ "$a" -eq "$(metric consumed_records_total)" ]; }
check "a map near its limit stops reading" wait_until 60 braked
read_on=$(metric consumed_records_total) bytes=$(metric partition_offset_metadata_bytes)
check "$read_on of 40000 are read, the map has $bytes bytes" [ "$read_on" -lt 40000 -a "$bytes" -le 4096 ]
check "no commit was refused" [ "$(metric commit_failures_total)" -eq 0 ]
read -r offset map <<< "$(d committed map map 0)"
check "the broker holds the map (${#map} bytes)" [ "${#map}" -ge 3072 -a "${#map}" -le 4096 ]
kill -9 -- "-$W"; wait "$W" 2> /dev/null
store_up
worker map2 map "http.port=$HTTP" in_flight.max_messages=100000 intake.max_messages=100000
check "the next worker answers the rest" d wait replies 40000 180
d verify replies 0 40000 0 || FAILED=1
check "and the lag is zero" wait_until 60 lag_is_zero map map
stop "$W" "it"
# What the limit is at the broker; then a damaged map, which is ignored and said so.
check "4,096 bytes are taken" p big limit map 4096
big_refused() { ! p big limit map 4097; }
check "4,097 are refused" big_refused
d commit map map 0 39000 "${map:0:100}$([ "${map:100:1}" = A ] && echo B || echo A)${map:101}"
worker damaged map
d produce map 40000 1
check "a damaged map does no harm" d wait replies 40001 90
check "and is named" grep -q 'offset map is damaged' "$RUN/worker-damaged.log"
check "the prompts behind the offset ran again" wait_until 60 lag_is_zero map map
stop "$W" "it"
# Back and forth with the tool: what lies behind the group's offset runs again, no more and no less.
repeats() { d verify replies 0 40001 -1 | sed -n 's/.* \([0-9]*\) repeats.*/\1/p'; }
n=$(repeats)
printf '%s\n' topics.prompts=map group.id=map engine.mode=echo "kafka.bootstrap.servers=$BOOTSTRAP" > "$RUN/reset.properties"
for to in 39901 40001 39951; do
    "$LORAMILL" reset -c "$RUN/reset.properties" --to $to --partition 0 --yes > "$RUN/reset.out" || not_ok "reset to $to"
    worker "reset$to" map
    n=$((n + 40001 - to))
    is_n() { [ "$(repeats)" -eq $n ]; }
    check "reset to $to: what lies behind it runs again" wait_until 60 is_n
    stop "$W" "it"
done
store_down

# 2. Records deleted before they were read: reading goes on at what is left.
topic_create gone 1; topic_create gone-replies 1
d produce gone 0 3000 "$ADAPTER" 1
worker gone gone topics.replies=gone-replies intake.max_messages=20 "http.port=$HTTP"
# What it has read is answered too, so it must have read before they are deleted.
is_full() { [ "$(metric intake_paused)" = 1 ]; }
check "intake is full" wait_until 60 is_full
read_on=$(metric consumed_records_total)
p delete gone 2500
store_up
check "what is left is read, and the $read_on before are answered" d wait gone-replies $((read_on + 500)) 60
check "and nothing lags behind" wait_until 60 lag_is_zero gone gone
stop "$W" "it"; store_down

# 3. Partitions are paused (intake is full), go to another worker and come back: they flow.
topic_create paused 2; topic_create paused-replies 1
d produce paused 0 2000 "$ADAPTER" 1
worker p1 paused topics.replies=paused-replies intake.max_messages=50 "http.port=$HTTP" revoke.drain_ms=500; A=$W
check "intake is paused" wait_until 60 is_full
worker p2 paused topics.replies=paused-replies intake.max_messages=50 drain.timeout_ms=500
stop "$W" "the worker that came"
back() { [ "$(metric partitions_assigned)" = 2 ]; }
check "the partitions are back" wait_until 60 back
store_up
check "they flow" d wait paused-replies 2000 90
stop "$A" "the worker that stayed"; store_down

# 4. Workers come and go, generations take about a second: all is answered once, and what a worker keeps
# is never cut off.
topic_create loop 6; topic_create loop-replies 1
LONG=("${MODEL[@]}" revoke.drain_ms=60000
      topics.replies=loop-replies engine.max_seqs=4 engine.max_waiting=8 intake.max_messages=8)
"$PYTHON" - "$BOOTSTRAP" <<'P'
import json, sys
from confluent_kafka import Producer
p = Producer({"bootstrap.servers": sys.argv[1]})
for i in range(240):
    p.produce("loop", json.dumps({"id": f"p-{i}", "prompt": "Dear customer", "params": {
        "max_tokens": 150, "ignore_eos": True, "temperature": 0}}), partition=i % 6)
assert not p.flush(20)
P
worker l1 loop "${LONG[@]}"; A=$W
for i in 1 2 3; do
    worker "l2-$i" loop "${LONG[@]}"; sleep 1
    stop "$W" "guest $i"
done
check "all is answered" d wait loop-replies 240 120
d verify loop-replies 0 240 0 || FAILED=1
not_cut() { [ "$(grep -c 'revoked loop' "$RUN/worker-l1.log")" -ge 3 ] && ! grep -q 'handed back' "$RUN/worker-l1.log"; }
check "three revocations cut nothing off" not_cut
stop "$A" "the worker that stayed"

# 5. Order by key, at-least-once, while prompts of every key wait for the store and heal.
topic_create keyed 2; topic_create ordered 1
d produce keyed 0 1500 "$ADAPTER" 7
worker keyed keyed topics.replies=ordered delivery.order=key
sleep 2; store_up
check "keyed prompts are answered" d wait ordered 1500 90
d order ordered 1500 || FAILED=1
stop "$W" "it"; store_down

# 6. A partition more, and a topic that matches a pattern, while workers run as they are by default. Both
# protocols at once: each looks every 10 s, then the group has to settle.
topic_create grown 1
sed -i '/session.timeout\|heartbeat/d' "$RUN/worker.properties"
for GROUP_PROTOCOL in classic consumer; do
    topic_create "live-$GROUP_PROTOCOL" 1
    mapfile -t group < <(group_properties)
    worker "grow-$GROUP_PROTOCOL" "live-$GROUP_PROTOCOL" topics.replies=grown "${group[@]}" \
        "topics.prompts=live-$GROUP_PROTOCOL,^rx-$GROUP_PROTOCOL-.*"
    GROWN+=("$W")
done
for protocol in classic consumer; do p grow "live-$protocol" "rx-$protocol-1"; done
check "new partitions and topics are read" d wait grown 4 90
for W in "${GROWN[@]}"; do stop "$W" "it"; done
printf '%s\n' kafka.session.timeout.ms=6000 kafka.heartbeat.interval.ms=500 >> "$RUN/worker.properties"

# 7. The engine fails: limits of attempts and of time.
topic_create prompts 1; topic_create asked 1
PROGRAM=("$BUILD/tests/integration/poison_worker")
worker attempts prompts retry.max_attempts=5 "http.port=$HTTP"
p attempts 30000 || FAILED=1
check "after five attempts, of which four were retries, beside two of what heals ($(metric retries_total))" \
    [ "$(metric retries_total)" = 6 ]
stop "$W" "it"
worker deadline prompts retry.max_attempts=1000 retry.deadline_ms=2000
p deadline 2000 || FAILED=1
stop "$W" "it"
topic_create parts 12
worker broken prompts "${MODEL[@]}" topics.replies=parts stream.interval_ms=20
p streams parts || FAILED=1
stop "$W" "it"
