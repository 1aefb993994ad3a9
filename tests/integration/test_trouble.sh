#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# What a worker does in trouble, and beside the plain road: streamed replies, error replies,
# cancellation, expiry, replies too large for the broker, poison prompts, outages. Each case is a
# function of trouble.py against a real broker, store and worker.
. "$(dirname "$0")/../infra/lib.sh"
infra_begin trouble
kafka_start 1 || die "the broker started"
nginx_start tests/models/storefront-adapters || die "nginx started"
topic_create prompts 2; topic_create replies 2; topic_create asked 2; topic_create secret 2; topic_create dead 1
topic_create control 1; topic_create streamed 1
cat > "$RUN/worker.properties" <<P
model.path=$PWD/tests/models/storefront
backend=cpu
threads=1
adapters.url=$STORE/{adapter}
adapters.cache_dir=$RUN/cache
topics.replies_allowed=asked
topics.dead_letters=dead
group.id=trouble
commit.interval_ms=200
retry.backoff_ms=50
retry.backoff_max_ms=1000
kafka.bootstrap.servers=$BOOTSTRAP
kafka.session.timeout.ms=6000
kafka.heartbeat.interval.ms=500
journal.dir=$RUN/journal
P
HTTP=$(free_ports 1)
# worker NAME [KEY=VALUE]...: starts one; $W is its pid. /readyz is 200 once the worker has asked to
# join its group; the answer, its partitions, comes later, and the cases below build on it.
worker() {
    start_worker "worker-$1" "http.port=$HTTP" "worker.name=$1" "${@:2}"
    wait_until 90 curl -sf "http://127.0.0.1:$HTTP/readyz" || die "worker $1 is ready"
    wait_until 90 assigned || die "worker $1 has its partitions"
}
assigned() { [ "$(metric 'rebalances_total{event="assign"}')" -ge 1 ]; }
orders() { [ "$(metric cancel_orders_total)" -ge "$1" ]; }
# One has been let through, by its partition's mark, and waits for its adapter; so many wait for it.
waits_with() { [ "$(metric intake_backlog_records)" = 1 ] && [ "$(metric in_flight_records)" = $((1 + $1)) ]; }
shrinking_made() { topic_create shrinking 12; [ "$("$PYTHON" tests/infra/kafka_admin.py "$BOOTSTRAP" leaders shrinking | wc -w)" = 12 ]; }
case_() { "$PYTHON" tests/integration/trouble.py "$BOOTSTRAP" "$@" || FAILED=1; }

if part stream; then
worker stream stream.interval_ms=20 errors.reply=true
case_ stream
case_ errors
dead_letters() { n=$(metric 'records_total{outcome="dead_letter"}'); [ "$n" "$1" 5 ]; }
wait_until 60 dead_letters -ge; check "a dead letter with its notice counts once ($n)" dead_letters -eq
stop "$W" "the worker"
fi

if part stream; then
# Another group, which has finished what the first one has.
"$LORAMILL" reset -c "$RUN/worker.properties" --set group.id=trouble-once --to latest --yes > "$RUN/reset.out" 2>&1 \
    || die "a group at the end of its topic"
worker stream-once stream.interval_ms=20 errors.reply=true delivery.mode=exactly-once group.id=trouble-once
case_ stream
case_ errors
stop "$W" "the worker"
# Killed between two parts: the next worker's parts begin again, as another generation.
for mode in at-least-once exactly-once; do
    dying=(stream.interval_ms=20 "delivery.mode=$mode" "group.id=dying-$mode" topics.prompts=streamed
           poison.max_attempts=0 kafka.session.timeout.ms=2500 kafka.heartbeat.interval.ms=300)
    worker "dies-$mode" "${dying[@]}"
    case_ stream_dies "$W" "dies-$mode"; wait "$W" 2> /dev/null
    worker "heir-$mode" "${dying[@]}"
    case_ stream_heir
    stop "$W" "the heir"
done
fi

if part shrinks; then
# A stream's reply topic is made again with fewer partitions: what follows stays together all the same.
for mode in at-least-once exactly-once; do
    "$PYTHON" tests/infra/kafka_admin.py "$BOOTSTRAP" delete shrinking > /dev/null 2>&1
    wait_until 60 shrinking_made || die "a topic of twelve partitions"
    shrinks=(stream.interval_ms=20 "delivery.mode=$mode" "group.id=shrinks-$mode" topics.prompts=streamed
             topics.replies=shrinking kafka.producer.partitioner=murmur2
             kafka.session.timeout.ms=45000 kafka.producer.transaction.timeout.ms=45000)
    "$LORAMILL" reset -c "$RUN/worker.properties" "${shrinks[@]/#/--set=}" --to latest --yes > "$RUN/reset.out" 2>&1 ||
        die "a group at the end of its topic"
    worker "shrinks-$mode" "${shrinks[@]}"
    case_ stream_shrinks "$W" "shrinks-$mode"
    check "$mode: the partition that is gone was noticed" has 'the partition of its parts is no more' "worker-shrinks-$mode"
    stop "$W" "the worker"
done
fi

echo "topics.control=control" >> "$RUN/worker.properties"
if part cancel; then
case_ cancel_before "$LORAMILL" "$RUN/worker.properties" send before
worker cancel engine.max_seqs=64 engine.max_waiting=4
case_ cancel_before "$LORAMILL" "$RUN/worker.properties" look before
case_ cancel "$LORAMILL" "$RUN/worker.properties"
check "orders that are none are ignored" wait_until 60 grep -q 'control \[0\] @.* is no' "$RUN/worker-cancel.log"
stop "$W" "the worker"
check "and said once in a while, not each" [ "$(grep -c 'control \[0\] @.* is no' "$RUN/worker-cancel.log")" = 1 ]

# Held by the order of its key; two deaths later, by quarantine too. A static member that was killed has
# its partitions back at once.
held=(engine.mode=echo delivery.order=key "adapters.url=http://127.0.0.1:$(free_ports 1)/{adapter}"
      "adapters.cache_dir=$RUN/cache-held" kafka.group.instance.id=held drain.timeout_ms=1000)
worker held-1 "${held[@]}"
case_ cancel_held send held
check "the order to cancel is read" wait_until 60 orders 1
check "and its prompt is held" wait_until 60 waits_with 2
kill -9 -- "-$W"; wait "$W" 2> /dev/null
worker held-2 "${held[@]}"
check "the prompts are read again" wait_until 60 waits_with 2
kill -9 -- "-$W"; wait "$W" 2> /dev/null
worker held-3 "${held[@]}"
check "they are in quarantine" wait_until 60 has '(2 such in a row)' worker-held-3
case_ cancel_held end held
stop "$W" "the worker"
fi

if part expiry; then
worker expiry deadline.default_ms=500 engine.max_seqs=64 stream.interval_ms=20
case_ expiry
stop "$W" "the worker"
worker late engine.max_seqs=64 engine.max_waiting=1 engine.early_abort=false
case_ expiry_under_way
case_ expiry_in_line
stop "$W" "the worker"
SILENT=$(free_ports 1)
spawn "$RUN/silent.log" "$PYTHON" -c '
import socket, sys, time
s = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=50)
print("silent", flush=True); time.sleep(600)' "$SILENT"
wait_until 60 grep -q silent "$RUN/silent.log" || die "a store that says nothing"
worker silent engine.mode=echo "adapters.url=http://127.0.0.1:$SILENT/{adapter}" "adapters.cache_dir=$RUN/cache-silent"
case_ silent_store
stop "$W" "the worker"
fi

if part blocking; then
worker blocking blocked.warn_ms=1000
case_ blocking "$HTTP" "$RUN/worker-blocking.log"
stop "$W" "the worker"
fi

if part head; then
worker head engine.mode=echo "adapters.url=http://127.0.0.1:$(free_ports 1)/{adapter}" "adapters.cache_dir=$RUN/cache-head"
case_ head trouble
stop "$W" "the worker"
fi

if part outage; then
registry_start || die "the registry started"
export REGISTRY
R=$(tail -1 "$RUN/pids")
nginx_run nginx-outage tests/models/storefront-adapters "$(free_ports 1)" ''
N=$(tail -1 "$RUN/pids")
ids=$(adapter_ids tests/models/storefront-adapters | head -6 | paste -sd,)
worker outage "adapters.url=$STORE/{adapter}" "adapters.cache_dir=$RUN/cache-outage" "registry.url=$REGISTRY"
before=$(metric 'rebalances_total{event="assign"}')
case_ outage "$N" "$R" "${OUTAGE:-20}" "$ids"
check "without a rebalance" [ "$before" = "$(metric 'rebalances_total{event="assign"}')" ]
check "the waiting was counted as retries ($(metric retries_total))" [ "$(metric retries_total)" -gt 0 ]
stop "$W" "the worker"
fi

if part avro; then
# The same in Avro: parts, final records, error replies and claims.
[ -n "${REGISTRY:-}" ] || registry_start || die "the registry started"
export REGISTRY
mkdir -p "$RUN/objects-avro"
nginx_run nginx-avro "$RUN/objects-avro" "$(free_ports 1)" 'dav_methods PUT;'
worker avro replies.encoding=avro "registry.url=$REGISTRY" stream.interval_ms=20 errors.reply=true \
    replies.too_large=claim "replies.claim_url=$STORE/{object}" replies.claim_above=100000
case_ stream
case_ errors
case_ claims claim application/avro
stop "$W" "the worker"
fi

if part registry; then
P=$(free_ports 1)
worker registry engine.mode=echo engine.hang_timeout_ms=2000 "registry.url=http://127.0.0.1:$P"
case_ registry "$P"
stop "$W" "the worker"
fi

if part batches; then
topic_create many 2; topic_create modest 2 max.message.bytes=300000
for mode in at-least-once exactly-once; do
    worker "batches-$mode" engine.mode=echo "delivery.mode=$mode" "group.id=batches-$mode" topics.prompts=many \
        topics.replies=modest topics.replies_allowed=
    case_ batches 4000 4000
    check "the log names the remedy" wait_until 60 grep -q 'see kafka.producer.batch.size' "$RUN/worker-batches-$mode.log"
    stop "$W" "the worker"
done
fi

if part claim; then
worker refuse
case_ claims refuse
stop "$W" "the worker"
mkdir -p "$RUN/objects"
nginx_put "$RUN/objects"
worker claim replies.too_large=claim "replies.claim_url=$STORE/{object}" replies.claim_above=500M
case_ claims claim
check "an object for the claim" [ "$(ls "$RUN/objects" | wc -l)" = 1 ]
stop "$W" "the worker"

mkdir "$RUN/s3"; echo 503 > "$RUN/s3/.mode"; : > "$RUN/s3/.log"
S3=$(free_ports 1); topic_create tiny 1 max.message.bytes=2000; topic_create claimable 1
spawn "$RUN/s3.log" "$PYTHON" tests/infra/s3_store.py "$RUN/s3" "$S3" AKIDTEST 'secret/+key'
claimer() {     # NAME SECRET [KEY=VALUE]...
    worker "$1" engine.mode=echo delivery.mode=exactly-once group.id=claims topics.prompts=claimable \
        topics.replies_allowed=tiny replies.too_large=claim "replies.claim_url=http://127.0.0.1:$S3/{object}" \
        replies.claim_above=4000 replies.claim_s3_region=eu-test replies.claim_s3_key=AKIDTEST \
        "replies.claim_s3_secret=$2" drain.timeout_ms=1000 "${@:3}"
}
run=$(head -c 3 /dev/urandom | od -An -tx1 | tr -d ' \n')
claimer claim-a 'secret/+key' transaction.interval_ms=300
case_ claims_once away "$RUN/s3" "$run"
aborted=$(metric transaction_aborts_total)
check "there were aborted transactions ($aborted)" [ "${aborted:-0}" -gt 0 ]
case_ claims_once hang "$RUN/s3" "$run"
SECONDS=0; stop "$W" "the worker"
check "a store that hangs does not hold up the shutdown ($SECONDS s)" [ "$SECONDS" -lt 20 ]
echo ok > "$RUN/s3/.mode"
claimer claim-b 'another key'
check "a wrong secret is refused, waited for and said" wait_until 90 grep -q 'HTTP 403; trying again, its offset waits' "$RUN/worker-claim-b.log"
stop "$W" "the worker"
claimer claim-c 'secret/+key' transaction.interval_ms=30000
case_ claims_once kill "$RUN/s3" "$run"
kill -9 -- "-$W"; wait "$W" 2> /dev/null
claimer claim-d 'secret/+key'
case_ claims_once after "$RUN/s3" "$run"
stop "$W" "the worker"
fi

if part poison; then
# A supervisor that starts the worker again whenever it dies, as Kubernetes would.
cat > "$RUN/supervise" <<P
while :; do
    "$BUILD/tests/integration/poison_worker" -c "$RUN/worker.properties" --set engine.mode=echo \\
        --set engine.hang_timeout_ms=1000 --set http.port=0 --set worker.name=poison \\
        --set kafka.group.instance.id=p && exit 0
done
P
spawn "$RUN/poison.log" bash "$RUN/supervise"; S=$!
case_ poison "$RUN/poison.log"
check "a journal of the living only" [ "$(ls "$RUN"/journal/*.journal | wc -l)" = 1 ]
pkill -TERM -P "$S" poison_worker; wait "$S"
check "an orderly end leaves no journal" [ -z "$(ls "$RUN/journal" | grep journal)" ]
fi
