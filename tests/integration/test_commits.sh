#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# delivery.mode=exactly-once when the ends of transactions go astray: a commit whose answer is lost, one
# that comes to the broker when it has long been sent again, and a worker that is stopped in the middle of
# one while its twin takes its transactional.id. A read_committed reader sees each id once. And one that dies
# in the middle of one: who waits for its offsets goes on committing what it has finished itself. All of it
# on a broker that takes no commit metadata as long as the workers would send: they send less, and say so once.
# At last, at least once, commits that a rebalance refuses.
. "$(dirname "$0")/../infra/lib.sh"
infra_begin commits
KAFKA_EXTRA=offset.metadata.max.bytes=30 PROXIED=1 kafka_start 1 || die "the broker started"
topic_create astray 2; topic_create astray-replies 1; topic_create dead 1
cat > "$RUN/worker.properties" <<P
engine.mode=echo
delivery.mode=exactly-once
transaction.interval_ms=20
topics.prompts=astray
topics.replies=astray-replies
topics.dead_letters=dead
group.id=astray
worker.name=astray
commit.interval_ms=300
http.port=0
kafka.bootstrap.servers=$BOOTSTRAP
kafka.session.timeout.ms=6000
kafka.heartbeat.interval.ms=500
kafka.producer.socket.timeout.ms=2000
P

# The end of a transaction (EndTxn is 26) goes astray in a proxy: its answer is lost; then it is held
# up for 6 s, while the client gives it up after 2 s, sends it again, and goes on with later ones.
echo pass > "$RUN/proxy.mode"
spawn "$RUN/proxy.log" "$PYTHON" tests/chaos/proxy.py "$RUN/proxy.mode" "${PROXIES[@]}"
load() {            # COUNT: a hundred a second
    "$PYTHON" - "$BOOTSTRAP" "$1" <<'P'
import json, sys, time
from confluent_kafka import Producer
p = Producer({"bootstrap.servers": sys.argv[1], "linger.ms": 0})
for i in range(int(sys.argv[2])):
    p.produce("astray", json.dumps({"id": f"p-{i}", "prompt": "x"}), key=str(i))
    p.poll(0)
    time.sleep(0.01)
assert not p.flush(20)
P
}
start_worker worker-astray "kafka.bootstrap.servers=$PROXY_BOOTSTRAP"
wait_until 60 has 'assigned astray' worker-astray || die "the worker has partitions"
load 1500 & L=$!
sleep 2; echo "lose 26 astray" > "$RUN/proxy.mode"
wait_until 60 has 'gone to the broker' proxy || not_ok "a commit's answer was lost"
sleep 1; : > "$RUN/proxy.log"; echo "late 26 astray 6000" > "$RUN/proxy.mode"
wait_until 60 has 'gone to the broker' proxy || not_ok "a commit came late"
wait "$L"
check "commits that go astray: all is answered" d wait astray-replies 1500 90
check "a new producer fenced the copies" has 'a new producer fences what may come late' worker-astray
check "the worker lives" kill -0 "$W"
once() { [ "$(grep -c 'WARN .*the broker takes no commit metadata' "$RUN/worker-astray.log")" = 1 ]; }
check "and has said once that the broker takes less metadata" once
d verify astray-replies 0 1500 0 > "$RUN/verify.log" || FAILED=1
cat "$RUN/verify.log"

# Stopped in the middle of a commit: its EndTxn is on its way when the twin begins.
: > "$RUN/proxy.log"; echo "hang-at 26 astray" > "$RUN/proxy.mode"
d produce astray 1500 500
wait_until 60 has 'has come' proxy || not_ok "a commit was under way"
kill -STOP "$W"; OLD=$W
start_worker worker-astray-twin; TWIN=$W
check "stopped in a commit: the twin answers all" d wait astray-replies 2000 90
echo pass > "$RUN/proxy.mode"; sleep 1; kill -CONT "$OLD"
check "the old one ends when it wakes" wait_until 90 ended "$OLD"
wait "$OLD"; st=$?
check "with status 1 (got $st)" [ $st -eq 1 ]
check "fenced" has "another worker has this one's transactional.id" worker-astray
d produce astray 2000 200
check "the twin goes on" d wait astray-replies 2200 90
d verify astray-replies 0 2200 0 > "$RUN/verify.log" || FAILED=1
cat "$RUN/verify.log"
stop "$TWIN" "the twin"

# Killed in the middle of a commit: the offsets of its partition can't be had until the broker ends that
# transaction. The worker that gets the partition commits meanwhile what it finishes of the one that it keeps:
# within a try to get them, not over several (each is twice as long as the last, and leaves a line in the log).
topic_create heir 2; topic_create heir-replies 1
ADAPTER=$(adapter_ids tests/models/storefront-adapters | head -1)
port=$(free_ports 1)
heir() {            # NAME BOOTSTRAP [TRANSACTION-TIMEOUT]
    start_worker "worker-$1" "worker.name=$1" "kafka.bootstrap.servers=$2" topics.prompts=heir \
        topics.replies=heir-replies group.id=heir "adapters.url=http://127.0.0.1:$port/{adapter}" \
        "adapters.cache_dir=$RUN/cache" retry.backoff_ms=50 retry.backoff_max_ms=100 \
        "kafka.producer.transaction.timeout.ms=${3:-10000}" \
        commit.map_max_bytes=0 poison.max_attempts=0    # no metadata: the first is taken
    wait_until 90 has 'assigned heir' "worker-$1" || die "worker $1 has partitions"
}
tries() { grep -c 'committed offsets: ' "$RUN/worker-heir.log"; }
has_tried() { [ "$(tries)" -ge "$1" ]; }
prompts() {         # PARTITION COUNT [ADAPTER]
    "$PYTHON" - "$BOOTSTRAP" "$@" <<'P'
import json, os, sys
from confluent_kafka import Producer
p = Producer({"bootstrap.servers": sys.argv[1]})
for i in range(int(sys.argv[3])):
    p.produce(os.environ.get("TOPIC", "heir"), json.dumps({"id": f"h-{sys.argv[2]}-{i}", "prompt": "x"} |
              ({"adapter": sys.argv[4]} if sys.argv[4:] else {})), partition=int(sys.argv[2]))
assert not p.flush(20)
P
}
heir heir "$BOOTSTRAP"; HEIR=$W
: > "$RUN/proxy.log"; echo "hang-at 26 dies" > "$RUN/proxy.mode"; sleep 0.5
heir dies "$PROXY_BOOTSTRAP" 60000; DIES=$W
his=$(sed -n 's/.* assigned heir \[\(.\)\].*/\1/p' "$RUN/worker-dies.log" | head -1) kept=$((1 - his))
prompts $kept 50 "$ADAPTER"                         # they wait: the store is away
prompts "$his" 50
wait_until 60 has 'has come' proxy || not_ok "a commit was under way"
kill -9 -- "-$DIES"; wait "$DIES" 2> /dev/null
check "the heir asks for the offsets of the dead" wait_until 60 has_tried 3
nginx_start tests/models/storefront-adapters "$port" || die "nginx started"
before=$(tries)
is_committed() { [[ "$(d committed heir heir $kept)" == "50 "* ]]; }     # his open transaction hides the replies
check "and commits what it finishes" wait_until 60 is_committed
n=$(($(tries) - before))
waits() { [ $n -le 1 ] && ! has "assigned heir \[$his\]" worker-heir-since; }
sed '1,/revoked heir/d' "$RUN/worker-heir.log" > "$RUN/worker-heir-since.log"
check "while it waits for them ($n tries later)" waits
kill -9 -- "-$HEIR"

# At least once a member that joins its group commits nothing until the group answers, here until the session
# of one that was killed has ended. What was refused goes again then, and not an interval later.
topic_create joins 2; topic_create joins-replies 1
member() {          # NAME
    start_worker "worker-$1" "worker.name=$1" delivery.mode=at-least-once topics.prompts=joins \
        topics.replies=joins-replies group.id=joins commit.interval_ms=2000 log.level=debug \
        kafka.consumer.debug=cgrp kafka.session.timeout.ms=8000 commit.map_max_bytes=0 poison.max_attempts=0
}
has_one() { has 'assigned joins' "worker-$1"; }
member stays; STAYS=$W
wait_until 60 has_one stays || die "the first worker has partitions"
member goes; GOES=$W
wait_until 60 has_one goes || die "the second worker has a partition"
his=$(sed -n 's/.* assigned joins \[\(.\)\].*/\1/p' "$RUN/worker-goes.log" | head -1) kept=$((1 - his))
kill -9 -- "-$GOES"; wait "$GOES" 2> /dev/null
joins() { grep -c -- '-> wait-join' "$RUN/worker-stays.log"; }
before=$(joins)
member comes; COMES=$W
joins_again() { [ "$(joins)" -gt "$before" ]; }
wait_until 60 joins_again || not_ok "who stays joins again"
TOPIC=joins prompts "$kept" 50
all_committed() { [[ "$(d committed joins joins "$kept")" == "$1 "* ]]; }
check "a commit that waits behind a join" wait_until 60 all_committed 50
"$PYTHON" - "$RUN/worker-stays.log" <<'P' || FAILED=1
import re, sys, time
answers, gaps, since = [], [], None
for line in open(sys.argv[1]):
    if m := re.match(r"(\S+)\.(\d{3})Z .* consumer: offset commit (answered|refused)", line):
        when = time.mktime(time.strptime(m[1], "%Y-%m-%dT%H:%M:%S")) + int(m[2]) / 1000
        if m[3] == "answered":
            answers.append([when, True])
        else:
            answers[-1][1] = False                  # its line comes after that
for when, taken in answers:
    if not taken:
        since = since or when
    elif since:
        gaps.append(when - since)
        since = None
good = gaps and max(gaps) < 1 and not since
print(f"{'ok' if good else 'not ok'} - is refused when that is over, and goes again at once, not 2 s later ({gaps})")
sys.exit(not good)
P

# Nor does a worker give its last commit up that ends meanwhile: it waits for the group.
kill -9 -- "-$COMES"; wait "$COMES" 2> /dev/null
before=$(joins)
member next; NEXT=$W
wait_until 60 joins_again || not_ok "who stays joins once more"
TOPIC=joins prompts "$kept" 50
sleep 3                                             # a commit may wait for 5 s
stop "$STAYS" "who ends in a join"
check "and has committed what it finished" all_committed 100
stop "$NEXT" "the next one"
