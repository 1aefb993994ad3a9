#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Other ecosystems' clients: Java's bytes (stored), Python's serializers, Spring's headers, kcat.
. "$(dirname "$0")/../infra/lib.sh"
infra_begin interop
kafka_start 1 || die "the broker started"
registry_start || die "the registry started"
topic_create prompts 4; topic_create replies 7; topic_create asked 8; topic_create dead 1
cat > "$RUN/worker.properties" <<P
engine.mode=echo
http.port=0
journal.dir=$RUN/journal
topics.replies_allowed=asked
topics.dead_letters=dead
registry.url=$REGISTRY
group.id=interop
kafka.bootstrap.servers=$BOOTSTRAP
P
spawn "$RUN/worker.log" "$LORAMILL" worker -c "$RUN/worker.properties"; W=$!
"$PYTHON" tests/integration/interop.py "$BOOTSTRAP" "$REGISTRY" || FAILED=1

# kcat, where people look first: a prompt written with it, replies and dead letters read with it.
echo 'k1|{"id": "from-kcat", "prompt": "hello kcat"}' | kcat -q -P -b "$BOOTSTRAP" -t prompts -K '|' -H kafka_correlationId=kc-1
echo 'k2|nonsense' | kcat -q -P -b "$BOOTSTRAP" -t prompts -K '|'
reply() { kcat -q -C -e -b "$BOOTSTRAP" -t replies -f '%k|%h|%s\n' | grep -aF '"id":"from-kcat"' > "$RUN/kcat"; }
check "kcat reads the reply to its prompt" wait_until 60 reply
check "key and correlation id came back" grep -qaE '^k1\|.*kafka_correlationId=kc-1.*"text":"hello kcat"' "$RUN/kcat"
dead() { kcat -q -C -e -b "$BOOTSTRAP" -t dead -f '%k|%h|%s\n' | grep -aF 'loramill-error-code=malformed' > "$RUN/kcat-dead"; }
check "kcat reads the dead letter, with its cause" wait_until 60 dead
check "value and key are as they were" grep -qaE '^k2\|.*\|nonsense$' "$RUN/kcat-dead"
kill -TERM "$W"; wait "$W"; check "worker ends with status 0 (got $?)" [ $? -eq 0 ]
