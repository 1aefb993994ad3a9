#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# The main job against a real broker and a real store: 2,000 prompts over all adapters (2 % bad), two
# workers, one killed with SIGKILL half-way, a third joins (a rebalance) and has a share of what comes
# then: every prompt is answered or dead-lettered, none lost, lag ends at zero, and SIGTERM ends a
# worker with status 0.
. "$(dirname "$0")/../infra/lib.sh"
N=${N:-2000}
infra_begin delivery
kafka_start 1 || die "the broker started"
nginx_start tests/models/storefront-adapters || die "nginx started"
topic_create prompts 6; topic_create replies 3; topic_create dead 1

cat > "$RUN/worker.properties" <<P
model.path=$PWD/tests/models/storefront
backend=cpu
threads=1
adapters.url=$STORE/{adapter}
adapters.cache_dir=$RUN/cache
topics.prompts=prompts
topics.replies=replies
topics.dead_letters=dead
group.id=delivery
commit.interval_ms=500
kafka.bootstrap.servers=$BOOTSTRAP
$(group_properties)
P

worker a; A=$W
worker b; B=$W
for w in a b; do wait_until 60 has 'assigned prompts' "worker-$w" || die "worker $w has partitions"; done
"$PYTHON" tests/integration/job.py make "$N" tests/models/storefront-adapters tests/models/orders.txt "$RUN/job"
produce() { "$PYTHON" tests/integration/job.py produce "$BOOTSTRAP" prompts "$RUN/job" "$@" || die "prompts produced"; }
produce 0 $((N * 8 / 10))

check "the job gets half-way" "$PYTHON" tests/integration/job.py watch "$BOOTSTRAP" replies dead $((N * 4 / 10)) 180
kill -9 -- "-$A"
worker c; C=$W
wait_until 60 has 'assigned prompts' worker-c || die "worker c has partitions"
produce $((N * 8 / 10))
check "the job ends although a worker was killed" \
    "$PYTHON" tests/integration/job.py watch "$BOOTSTRAP" replies dead "$N" 240
"$PYTHON" tests/integration/job.py verify "$BOOTSTRAP" replies dead prompts "$RUN/job" || FAILED=1

check "committed offsets reach the end of every partition" wait_until 60 lag_is_zero delivery prompts 6

for w in "$B" "$C"; do
    kill -TERM "$w"
    wait "$w"; st=$?
    check "SIGTERM ends a worker with status 0 (got $st)" [ "$st" -eq 0 ]
done
served=$(d workers replies)
check "all three have answered prompts ($served)" [ "$served" = 'a b c' ]
no_error() { ! grep -lE 'ERROR|Sanitizer' "$RUN"/worker-[bc].log; }
check "no worker logged an error" no_error
