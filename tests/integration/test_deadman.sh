#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# max.poll.interval.ms is a dead-man switch and no limit of generations: prompts that take ten times as
# long cause no rebalance. A worker that is stopped for longer than its session loses its partitions to
# another; when it wakes it commits nothing that is not its own any more, and goes on. And a commit that
# the group has overtaken (ILLEGAL_GENERATION) is survived.
. "$(dirname "$0")/../infra/lib.sh"
infra_begin deadman
kafka_start 1 || die "the broker started"
read -r NOBODY HTTP <<< "$(free_ports 2)"       # nobody listens: prompts that name an adapter wait
topic_create long 2; topic_create fast 2; topic_create replies 1; topic_create dead 1
cat > "$RUN/worker.properties" <<P
engine.mode=echo
adapters.url=http://127.0.0.1:$NOBODY/{adapter}
adapters.cache_dir=$RUN/cache
topics.replies=replies
topics.dead_letters=dead
retry.backoff_max_ms=500
http.address=127.0.0.1
poison.max_attempts=0
kafka.bootstrap.servers=$BOOTSTRAP
P

# Under KIP-848 the interval may be shorter than the session. These prompts take 30 s.
worker long topics.prompts=long group.id=long "http.port=$HTTP" drain.timeout_ms=0 \
    kafka.consumer.group.protocol=consumer kafka.max.poll.interval.ms=3000 revoke.drain_ms=500
LONG=$W
d produce long 0 20 acme 1
wait_until 60 has 'assigned long' worker-long || die "a worker has partitions"
before=$(metric 'rebalances_total{event="assign"}') start=$SECONDS

# Meanwhile: stopped with work that it has finished and not committed.
common=(topics.prompts=fast group.id=fast http.port=0 kafka.session.timeout.ms=10000
        kafka.heartbeat.interval.ms=500)
worker old "${common[@]}" commit.interval_ms=60000; OLD=$W
wait_until 60 has 'assigned fast' worker-old || die "the first worker has partitions"
d produce fast 1000 2000
check "the first worker answers" d wait replies 2000 60
kill -STOP "$OLD"
worker new "${common[@]}" commit.interval_ms=200; NEW=$W
check "its partitions move when it is stopped" wait_until 60 has 'assigned fast \[1\]' worker-new
d produce fast 3000 500
check "and the other one answers on" d wait replies 2500 60
stands() { for p in 0 1; do d committed fast fast $p; done | awk '{ n += $1 } END { print n }'; }
at_end() { [ "$(stands)" = 2500 ]; }
check "and commits to the end" wait_until 60 at_end
kill -CONT "$OLD"
stays() { local t; for t in $(seq 8); do at_end || return 1; sleep 0.3; done; }
check "the one that wakes sets nothing back" stays
check "it has noticed" wait_until 60 has 'lost fast\|commit refused\|revoked fast' worker-old
check "and lives" kill -0 "$OLD"

# It stops again, and the group waits for it to join with a third. What the second one commits meanwhile
# stands behind its own JoinGroup, and comes to the broker when its generation has passed.
again() { [ "$(grep -c 'assigned fast' "$RUN/worker-old.log")" -ge 3 ]; }
check "the one that woke takes a partition again" wait_until 60 again
kill -STOP "$OLD"
worker third "${common[@]}" commit.interval_ms=200; THIRD=$W
sent=2500
overtaken() {
    has 'commit refused: .*generation id is not valid' worker-new && return
    d produce fast $((1000 + sent)) 20; sent=$((sent + 20)); return 1
}
check "a commit comes too late for its generation (ILLEGAL_GENERATION)" wait_until 40 overtaken
check "all the same everything is answered" d wait replies $sent 60
check "by who lives on" kill -0 "$NEW"
kill -CONT "$OLD"
stop "$THIRD" "the third"
stop "$NEW" "the other"
d produce fast $((1000 + sent)) 100
check "and the first one takes its partitions again" d wait replies $((sent + 100)) 60
d verify replies 1000 $((sent + 100)) -1 || FAILED=1
stop "$OLD" "the first"

[ $((SECONDS - start)) -ge 30 ] || sleep $((30 - SECONDS + start))
took=$((SECONDS - start))
check "prompts that take ten times max.poll.interval.ms cause no rebalance ($before)" \
    [ "$(metric 'rebalances_total{event="assign"}')" = "$before" ]
check "and are still at work ($(metric in_flight_records))" [ "$(metric in_flight_records)" = 20 ]
# One a component in 10 s, of what a component says; every try of every prompt would be hundreds.
lines=$(grep -c 'WARN .*\(intake\|store\): ' "$RUN/worker-long.log")
check "their store is away, and the log says it now and then ($lines lines in $took s)" \
    [ "$lines" -ge 1 -a "$lines" -le $((2 * (3 + took / 10))) ]
stop "$LONG" "the one with long prompts"
