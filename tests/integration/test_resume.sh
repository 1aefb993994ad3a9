#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# What a crash repeats. One partition whose every tenth prompt waits for an adapter store that is
# away: finished and unfinished offsets alternate, as under long and short generations. SIGKILL, and
# the next worker runs the unfinished ones only. Then metadata that is no map, and a group that is
# moved by hand: the prompts run again from where the group stands, and nothing is lost.
# Runs alone: bounds in ms what a crash repeats.
. "$(dirname "$0")/../infra/lib.sh"
infra_begin resume
"$PYTHON" tests/integration/delivery.py try || FAILED=1
kafka_start 1 || die "the broker started"
topic_create prompts 1; topic_create replies 1; topic_create dead 1
port=$(free_ports 1)
ADAPTER=$(adapter_ids tests/models/storefront-adapters | head -1)

cat > "$RUN/worker.properties" <<P
engine.mode=echo
adapters.url=http://127.0.0.1:$port/{adapter}
adapters.cache_dir=$RUN/cache
topics.prompts=prompts
topics.replies=replies
topics.dead_letters=dead
group.id=resume
commit.interval_ms=200
retry.backoff_ms=50
retry.backoff_max_ms=300
http.port=0
kafka.bootstrap.servers=$BOOTSTRAP
$(group_properties)
P
crash() { kill -9 -- "-$W"; wait "$W" 2>/dev/null; }

d produce prompts 0 2000 "$ADAPTER" 10
worker 1
check "all but the waiting prompts are answered" d wait replies,dead 1800 60
in_map() {
    "$LORAMILL" status -c "$RUN/worker.properties" --json --no-metrics |
        jq -e '.partitions[0] | .committed == 0 and .lag == 200 and .finished_beyond == 1800'
}
if [ "$OFFSET_MAP" = 1 ]; then check "they are committed" wait_until 30 in_map; else sleep 1; fi
read -r offset map <<< "$(d committed resume prompts 0)"
check "the group stands at the first unfinished prompt ($offset)" [ "$offset" -eq 0 ]
if [ "$OFFSET_MAP" = 1 ]; then
    check "the rest is in the metadata, ${#map} bytes" [ "${map%%:*}" = lm1 -a ${#map} -le 4096 ]
else
    check "there is no metadata" [ -z "$map" ]
    said=$(grep -c "can't keep offset metadata: at-least-once without the offset map" "$RUN/worker-1.log")
    check "which was said once (got $said)" [ "$said" -eq 1 ]
fi
crash
worker 2
d produce prompts 2000 1 > /dev/null
check "the next worker reads on" d wait replies,dead 1801 60
sleep 1
d verify replies,dead 0 1 0 > "$RUN/verify.log"
[ "$OFFSET_MAP" = 0 ] ||
    check "nothing that was finished runs again" grep -q ' 0 repeats' "$RUN/verify.log"

# The store comes back: the 200 prompts that waited through two workers are answered.
nginx_start tests/models/storefront-adapters "$port" || die "nginx started"
check "prompts that waited are answered" d wait replies,dead 2001 60
# A mark (worker/quarantine.h) is there as long as the worker is at work.
at_end() { read -r offset map <<< "$(d committed resume prompts 0)"; [ "$offset" -eq "$1" ] && [[ $map != lm1:* ]]; }
check "then the group stands at the end, without a map" wait_until 60 at_end 2001
# Without the map, what the first worker had answered comes again, once.
d verify replies,dead 0 2001 $([ "$OFFSET_MAP" = 1 ] && echo 0 || echo 1800) || FAILED=1

# Killed in the middle of work: what runs twice was finished less than one commit interval before.
d produce prompts 2001 30000
for i in 1 2 3; do
    sleep 0.$((RANDOM % 5 + 3))
    crash
    worker "kill$i"
    wait_until 60 grep -q 'assigned prompts' "$RUN/worker-kill$i.log" || die "the next worker has its partition"
done
check "the job ends" d wait replies,dead 32001 180
check "the group stands at the end again" wait_until 60 at_end 32001
d verify replies,dead 0 32001 -1 || FAILED=1
# 200 ms between commits, and as much again for the commit to be answered on a busy machine.
if [ "$OFFSET_MAP" = 0 ]; then
    kill -TERM "$W"; wait "$W"
    check "SIGTERM ends it with status 0 (got $?)" [ $? -eq 0 ]
    exit 0
fi
d age replies 400 || FAILED=1

# Metadata of another tool, then a group that is moved back with the map left in place.
kill -TERM "$W"; wait "$W"
check "SIGTERM ends it with status 0 (got $?)" [ $? -eq 0 ]
d commit resume prompts 0 31001 'some other tool'
worker foreign
d produce prompts 32001 1
check "foreign metadata is ignored" d wait replies,dead 32002 60
check "and said so" grep -q 'commit metadata is ignored: not an offset map' "$RUN/worker-foreign.log"
kill -TERM "$W"; wait "$W"
d verify replies,dead 0 32002 -1 > "$RUN/before.log"
d commit resume prompts 0 31902 "$(printf 'lm1:AMCEPQIBAqcCJ3a-kw')"
worker moved
again() { d verify replies,dead 0 32002 -1 > "$RUN/after.log"
          [ $(($(repeats after) - $(repeats before))) -eq 100 ]; }
repeats() { sed -n 's/.* \([0-9]*\) repeats.*/\1/p' "$RUN/$1.log"; }
check "a moved group runs exactly what lies behind its offset, map or no map" wait_until 90 again
check "and says why the map is not believed" grep -q 'is for offset 1000000, the group is at 31902' \
    "$RUN/worker-moved.log"
