#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# A Python client (confluent-kafka, fastavro) produces Avro prompts through a real schema registry
# and reads Avro replies; JSON prompts on the same topic are answered in JSON.
. "$(dirname "$0")/../infra/lib.sh"
infra_begin avro-client
kafka_start 1 || die "the broker started"
registry_start || die "the registry started"
nginx_start tests/models/storefront-adapters || die "nginx started"
topic_create prompts 2; topic_create replies 2; topic_create dead 1
cat > "$RUN/worker.properties" <<P
model.path=$PWD/tests/models/storefront
backend=cpu
adapters.url=$STORE/{adapter}
adapters.cache_dir=$RUN/cache
topics.prompts=prompts
topics.replies=replies
topics.dead_letters=dead
registry.url=$REGISTRY
registry.auto_register=true
group.id=avro
kafka.bootstrap.servers=$BOOTSTRAP
P
spawn "$RUN/worker.log" "$LORAMILL" worker -c "$RUN/worker.properties"
adapter=$(adapter_ids tests/models/storefront-adapters | head -1)
"$PYTHON" tests/integration/avro_client.py "$BOOTSTRAP" "$REGISTRY" prompts replies <<< "$adapter" || FAILED=1
