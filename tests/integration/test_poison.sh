#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# A prompt that kills the engine, in a pool of three hosts that share nothing: every start of a
# worker has a journal folder of its own, as if the node of the last one had been lost. The pool
# finds it by what the commits say (worker/quarantine.h): after at most poison.max_attempts + 1
# deaths it is a dead letter, the others are answered. In both delivery modes, side by side; with
# exactly-once the replies of a key come in the order of its prompts besides.
. "$(dirname "$0")/../infra/lib.sh"
infra_begin poison
kafka_start 1 || die "the broker started"
MODES="at-least-once exactly-once"
for mode in $MODES; do
    order=none; [ $mode = exactly-once ] && order=key
    topic_create "prompts-$mode" 3; topic_create "replies-$mode" 1; topic_create "dead-$mode" 1
    cat > "$RUN/$mode.properties" <<P
engine.mode=echo
http.port=0
group.id=pool-$mode
delivery.mode=$mode
delivery.order=$order
topics.prompts=prompts-$mode
topics.replies=replies-$mode
topics.dead_letters=dead-$mode
commit.interval_ms=200
kafka.bootstrap.servers=$BOOTSTRAP
kafka.session.timeout.ms=4000
kafka.heartbeat.interval.ms=500
kafka.auto.offset.reset=earliest
P
    # A host: a supervisor that starts the worker again whenever it ends, as Kubernetes would.
    for host in 1 2 3; do
        cat > "$RUN/host-$mode-$host" <<P
for start in 1 2 3 4 5 6 7 8; do
    [ -e "$RUN/stop" ] && break
    "$BUILD/tests/integration/poison_worker" -c "$RUN/$mode.properties" \\
        --set worker.name=host-$host --set "journal.dir=$RUN/journal-$mode-$host-\$start"
done
P
        spawn "$RUN/$mode-$host.log" bash "$RUN/host-$mode-$host"
        HOSTS+=("$!")
    done
done
ready() { [ "$(starts)" -ge 6 ]; }
starts() { cat "$RUN"/*-?.log | grep -c 'reading prompts'; }
wait_until 60 ready || die "the workers started"
for mode in $MODES; do
    "$PYTHON" tests/integration/trouble.py "$BOOTSTRAP" pool "$mode" "$RUN/$mode"-?.log &
    CASES+=("$!")
done
for c in "${CASES[@]}"; do wait "$c" || FAILED=1; done

# What ends in order adds to no count: a rolling restart, one host of each pool at a time. (A dead
# owner's mark whose partition has had no prompt since is read again, and counts the same again.)
went() { cat "$RUN"/*-?.log | grep -c '([2-9] such in a row)'; }
restarted() { [ "$(starts)" -ge $((s + 2)) ]; }
before=$(went)
for i in 0 1 2; do
    s=$(starts)
    pkill -TERM -P "${HOSTS[i]}" poison_worker; pkill -TERM -P "${HOSTS[i + 3]}" poison_worker
    check "host $((i + 1)) has begun again" wait_until 60 restarted
done
for mode in $MODES; do
    "$PYTHON" tests/integration/trouble.py "$BOOTSTRAP" pool_after "$mode" || FAILED=1
done
check "restarts in order add up to no suspicion ($(went) were counted, $before before)" [ "$(went)" = "$before" ]
touch "$RUN/stop"
for h in "${HOSTS[@]}"; do pkill -TERM -P "$h" poison_worker; wait "$h"; done
