#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Messages made to harm, one kind after the other, and then by the thousand: each is a dead letter as it
# came, the process lives and its memory stays as it was. And what the world may see of the others:
# documented metrics whose number does not grow with adapters, traces linked and their spans, no prompt's text anywhere.
. "$(dirname "$0")/../infra/lib.sh"
infra_begin hostile
kafka_start 1 || die "the broker started"
topic_create prompts 1; topic_create replies 1; topic_create dead 1
mkdir -p "$RUN/registry" "$RUN/store"
h() { "$PYTHON" tests/integration/hostile.py "$BOOTSTRAP" "$@"; }
h write_registry "$RUN/registry" || die "schemas written"
nginx_run registry "$RUN/registry" "$(free_ports 1)" 'default_type application/json; error_page 404 /not-found;' ||
    die "the registry started"
REGISTRY=$STORE
nginx_run store "$RUN/store" "$(free_ports 1)" ''
read -r PORT OTLP <<< "$(free_ports 2)"
spawn "$RUN/otlp.log" "$PYTHON" tests/infra/otlp_collector.py "$OTLP" "$RUN/spans"
cat > "$RUN/worker.properties" <<P
engine.mode=echo
adapters.url=$STORE/{adapter}
adapters.cache_dir=$RUN/cache
registry.url=$REGISTRY
replies.encoding=json
topics.dead_letters=dead
group.id=hostile
errors.reply=true
commit.interval_ms=200
http.port=$PORT
log.level=debug
traces.otlp_url=http://127.0.0.1:$OTLP/v1/traces
journal.dir=$RUN/journal
kafka.bootstrap.servers=$BOOTSTRAP
P
spawn "$RUN/worker.log" "$LORAMILL" worker -c "$RUN/worker.properties"; W=$!
wait_until 60 curl -sf "http://127.0.0.1:$PORT/readyz" || die "the worker is ready"
h poison "$W" || FAILED=1
h metrics "$PORT" || FAILED=1
before=$(curl -s "http://127.0.0.1:$PORT/metrics" | wc -l)
h adapters 10000 || FAILED=1
after=$(curl -s "http://127.0.0.1:$PORT/metrics" | wc -l)
check "10,000 adapters add no line to /metrics ($before, then $after)" [ "$before" -eq "$after" ]
h metrics "$PORT" || FAILED=1
MARKER=Zx7Private$RANDOM$RANDOM
h private "$MARKER" || FAILED=1
h spans "$RUN/spans" || FAILED=1
curl -s "http://127.0.0.1:$PORT/metrics" > "$RUN/metrics"
unseen() { ! grep -qE "$MARKER|private-" "$RUN/spans" && ! grep -q "$MARKER" "$RUN/worker.log" "$RUN/metrics"; }
check "no prompt's text in log, metrics or spans, at level debug" unseen
grep -a "$MARKER" "$RUN/worker.log" "$RUN/metrics" "$RUN/spans" | head -5
check "lag is zero" wait_until 60 lag_is_zero hostile prompts
kill -TERM "$W"; wait "$W"; check "the worker ends with status 0 (got $?)" [ $? -eq 0 ]
