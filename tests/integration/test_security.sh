#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# kafka.* reaches librdkafka: TLS, mutual TLS, SASL with SCRAM-SHA-512 and OAUTHBEARER over TLS, each at
# a listener of a real broker that demands it. The wrong authority, the wrong host name, no client
# certificate and the wrong password are refused, and no secret is in a log at level debug.
. "$(dirname "$0")/../infra/lib.sh"
infra_begin security
PASSWORD=s3cret-$RANDOM$RANDOM
pki() {
    cd "$RUN" || exit 1
    local ca
    for ca in ca other; do
        openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj "/CN=$ca" -keyout $ca.key -out $ca.pem
    done
    local who san
    for who in broker:IP:127.0.0.1 worker:DNS:worker; do
        san=${who#*:} who=${who%%:*}
        openssl req -newkey rsa:2048 -nodes -subj "/CN=$who" -keyout $who.key -out $who.csr
        openssl x509 -req -in $who.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out $who.crt \
            -extfile <(echo "subjectAltName=$san")
        cat $who.key $who.crt > $who.pem
    done
}
(pki) > "$RUN/openssl.log" 2>&1 || die "certificates"
read -ra P <<< "$(free_ports 4)"
KAFKA_LISTENERS=",TLS://127.0.0.1:${P[0]},MTLS://127.0.0.1:${P[1]},SCRAM://127.0.0.1:${P[2]},OAUTH://127.0.0.1:${P[3]}"
KAFKA_MAP=",TLS:SSL,MTLS:SSL,SCRAM:SASL_SSL,OAUTH:SASL_SSL"
KAFKA_EXTRA="ssl.keystore.type=PEM
ssl.keystore.location=$RUN/broker.pem
ssl.truststore.type=PEM
ssl.truststore.location=$RUN/ca.pem
listener.name.mtls.ssl.client.auth=required
listener.name.scram.sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.scram.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.oauth.sasl.enabled.mechanisms=OAUTHBEARER
listener.name.oauth.oauthbearer.sasl.jaas.config=org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub=\"broker\";"
KAFKA_FORMAT="--add-scram SCRAM-SHA-512=[name=worker,password=$PASSWORD]"
kafka_start 1 || die "the broker started"
d() { local c=$1; shift; "$PYTHON" tests/integration/delivery.py "$c" "$BOOTSTRAP" "$@"; }
topic_create dead 1

# worker NAME PORT-INDEX PROPERTY...; its own topics, so that each answers for itself; $W is its pid
worker() {
    local name=$1 port=${P[$2]}; shift 2
    printf '%s\n' engine.mode=echo "topics.prompts=$name" "topics.replies=$name-replies" \
        topics.dead_letters=dead "group.id=$name" "worker.name=$name" http.port=0 log.level=debug \
        drain.timeout_ms=1000 "kafka.bootstrap.servers=${HOST:-127.0.0.1}:$port" \
        "kafka.ssl.ca.location=$RUN/ca.pem" "$@" > "$RUN/$name.properties"
    topic_create "$name" 1; topic_create "$name-replies" 1
    d produce "$name" 0 20
    spawn "$RUN/worker-$name.log" "$LORAMILL" worker -c "$RUN/$name.properties"
    W=$!
}
end() { kill -TERM "$W"; wait "$W"; check "$1 ends with status 0 (got $?)" [ $? -eq 0 ]; }
served() { check "$1 is served" d wait "$1-replies" 20 40; end "$1"; }
refused() {     # NAME REASON
    check "$1 is refused: $2" wait_until 20 grep -qiE "$2" "$RUN/worker-$1.log"
    d count "$1-replies" p- 0 && ok "$1 reads nothing" || not_ok "$1 reads nothing"
    end "$1"
}
MUTUAL=("kafka.security.protocol=SSL" "kafka.ssl.certificate.location=$RUN/worker.crt"
        "kafka.ssl.key.location=$RUN/worker.key")
SCRAM=(kafka.security.protocol=SASL_SSL kafka.sasl.mechanism=SCRAM-SHA-512
       kafka.sasl.username=worker)
worker tls 0 kafka.security.protocol=SSL; served tls
worker mtls 1 "${MUTUAL[@]}"; served mtls
worker scram 2 "${SCRAM[@]}" "kafka.sasl.password=$PASSWORD"; served scram
worker scram-eos 2 "${SCRAM[@]}" "kafka.sasl.password=$PASSWORD" delivery.mode=exactly-once
served scram-eos
worker oauth 3 kafka.security.protocol=SASL_SSL kafka.sasl.mechanism=OAUTHBEARER \
    kafka.enable.sasl.oauthbearer.unsecure.jwt=true "kafka.sasl.oauthbearer.config=principal=worker"
served oauth
worker wrong-ca 0 kafka.security.protocol=SSL "kafka.ssl.ca.location=$RUN/other.pem"
refused wrong-ca 'certificate verify failed'
HOST=localhost worker wrong-host 0 kafka.security.protocol=SSL
refused wrong-host 'certificate verify failed|hostname mismatch'
worker no-certificate 1 kafka.security.protocol=SSL
refused no-certificate 'certificate.required|handshake failed|Disconnected|alert'
worker wrong-password 2 "${SCRAM[@]}" kafka.sasl.password=wrong-pass-word
refused wrong-password 'authentication failed|invalid credentials'
no_secret() { ! grep -qE "$PASSWORD|wrong-pass-word|PRIVATE KEY" "$RUN"/worker-*.log; }
check "no secret is in a log" no_secret
