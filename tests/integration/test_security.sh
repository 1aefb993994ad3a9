#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# kafka.* reaches librdkafka: TLS, mutual TLS, SASL with SCRAM-SHA-512 and OAUTHBEARER over TLS, each at
# a listener of a real broker that demands it. The wrong authority, the wrong host name, no client
# certificate and the wrong password are refused, and no secret is in a log at level debug. Then what
# changes while a worker runs: the password at the broker, OAUTHBEARER tokens that last ten seconds, and
# an ACL that is taken away and given back.
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
read -ra P <<< "$(free_ports 6)"
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
listener.name.scram.connections.max.reauth.ms=3000
listener.name.oauth.connections.max.reauth.ms=60000
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
allow.everyone.if.no.acl.found=true
listener.name.oauth.oauthbearer.sasl.jaas.config=org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub=\"broker\";"
KAFKA_FORMAT="--add-scram SCRAM-SHA-512=[name=worker,password=$PASSWORD]"
kafka_start 1 || die "the broker started"
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
served() { check "$1 is served" d wait "$1-replies" 20 90; end "$1"; }
refused() {     # NAME REASON
    check "$1 is refused: $2" wait_until 60 grep -qiE "$2" "$RUN/worker-$1.log"
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

# A registry that asks for a certificate and a token. It refuses the schema of the replies, and tells what it saw.
TOKEN=t0ken-$RANDOM$RANDOM R=$(free_ports 1)
spawn "$RUN/registry.log" "$PYTHON" tests/infra/tls_registry.py "$R" "$RUN/broker.pem" "$RUN/ca.pem" "$TOKEN"
wait_until 60 bash -c ": < /dev/tcp/127.0.0.1/$R" 2> /dev/null
REGISTRY_TLS=(kafka.security.protocol=SSL replies.encoding=avro "registry.url=https://127.0.0.1:$R"
              "registry.ca_file=$RUN/ca.pem" "registry.auth_header=Authorization: Bearer $TOKEN")
worker registry 0 "${REGISTRY_TLS[@]}" "registry.cert_file=$RUN/worker.crt" "registry.key_file=$RUN/worker.key"
wait "$W"
check "the registry sees certificate and token" grep -q "worker's token is good" "$RUN/worker-registry.log"
worker one-file 0 "${REGISTRY_TLS[@]}" "registry.cert_file=$RUN/worker.pem"
wait "$W"
check "also with the key in the certificate's file" grep -q "worker's token is good" "$RUN/worker-one-file.log"
# In TLS 1.3 the refusal comes after the handshake, so who writes first meets a closed connection.
worker stranger 0 "${REGISTRY_TLS[@]}"
refused stranger 'schema registry https://127.0.0.1:.*(certificate|alert|SSL|not connected|reset|closed|broken pipe)'

# ---- while it runs ----
# A password that is altered: connections are asked for it again every three seconds here, as after
# any reconnection. The worker reads its files again by itself, finds the old password, says so and
# waits; with the new one in the file it goes on, without a restart. SIGHUP comes before anything is refused:
# the file is read again then, which it is not unasked (and not said at INFO when it holds nothing new). So when
# the password is altered the next time all connections have it, which they are asked for.
admin() { "$PYTHON" tests/infra/kafka_admin.py "$BOOTSTRAP" "$@"; }
for mode in at-least-once exactly-once; do
    worker "rotate-$mode" 2 "${SCRAM[@]}" "kafka.sasl.password=$PASSWORD" "delivery.mode=$mode" kafka.debug=security
    said() { grep -ci "$1" "$RUN/worker-rotate-$mode.log"; }
    has_said() { [ "$(said "$2")" -ge "$1" ]; }
    check "$mode: the first password serves" d wait "rotate-$mode-replies" 20 90
    NEXT=n3xt-$RANDOM$RANDOM
    admin scram worker "$NEXT"
    check "$mode: altered at the broker, it is refused" \
        wait_until 60 grep -qi 'authentication failed' "$RUN/worker-rotate-$mode.log"
    d produce "rotate-$mode" 20 20
    check "$mode: the worker waits" kill -0 "$W"
    sed -i "s/^kafka.sasl.password=.*/kafka.sasl.password=$NEXT/" "$RUN/rotate-$mode.properties"
    check "$mode: with the new one in its file it goes on by itself" d wait "rotate-$mode-replies" 40 90
    check "$mode: and says why" grep -q 'new SASL credentials' "$RUN/worker-rotate-$mode.log"
    PASSWORD=$NEXT NEXT=th1rd-$RANDOM$RANDOM
    kill -HUP "$W"
    check "$mode: SIGHUP: the file is read, as it was" wait_until 60 has_said 1 'INFO .*credentials are as they were'
    sed -i "s/^kafka.sasl.password=.*/kafka.sasl.password=$NEXT/" "$RUN/rotate-$mode.properties"
    kill -HUP "$W"
    check "$mode: SIGHUP: its new password is taken before the broker wants it" wait_until 60 has_said 2 'new SASL credentials'
    admin scram worker "$NEXT"
    # A connection that was asked for it in between was refused; from here on none is.
    taken=$(said 'session lifetime')
    check "$mode: altered at the broker, it is right" wait_until 60 has_said $((taken + 2)) 'session lifetime'
    refused=$(said 'authentication failed')
    d produce "rotate-$mode" 40 20
    check "$mode: SIGHUP in time: nothing stops" d wait "rotate-$mode-replies" 60 90
    check "$mode: all connections are asked for it again" wait_until 60 has_said $((taken + 10)) 'session lifetime'
    check "$mode: and none is refused" [ "$(said 'authentication failed')" = "$refused" ]
    d verify "rotate-$mode-replies" 0 60 0 || FAILED=1
    end "$mode"
    PASSWORD=$NEXT
done

# Tokens that last ten seconds, from an OIDC endpoint: asked for again in time, by both clients; and
# the client's own unsigned ones where the first call of all blocks until there is a token.
spawn "$RUN/tokens.log" "$PYTHON" tests/infra/token_server.py "${P[4]}" 10 "$RUN/tokens"
worker oidc 3 kafka.security.protocol=SASL_SSL kafka.sasl.mechanism=OAUTHBEARER \
    kafka.sasl.oauthbearer.method=oidc kafka.sasl.oauthbearer.client.id=worker \
    kafka.sasl.oauthbearer.client.secret=wrong-pass-word \
    "kafka.sasl.oauthbearer.token.endpoint.url=http://127.0.0.1:${P[4]}/token"
check "OIDC: served" d wait oidc-replies 20 90
asked() { [ "$(wc -l < "$RUN/tokens")" -ge 5 ]; }
check "OIDC: tokens are asked for again" wait_until 60 asked
d produce oidc 20 20
check "OIDC: and the worker goes on, past the first one's end" d wait oidc-replies 40 90
end oidc
worker oauth-eos 3 kafka.security.protocol=SASL_SSL kafka.sasl.mechanism=OAUTHBEARER \
    kafka.enable.sasl.oauthbearer.unsecure.jwt=true "kafka.sasl.oauthbearer.config=principal=worker" \
    delivery.mode=exactly-once
served oauth-eos

# An ACL that is taken away: outcomes and offsets wait, nothing becomes a dead letter, the log names the
# topic and a metric counts. Given back, all goes on.
livez() { curl -sf "http://127.0.0.1:${P[5]}/livez" > /dev/null; }
failures() { curl -sf "http://127.0.0.1:${P[5]}/metrics" |
             awk '$1 ~ "^loramill_(produce_failures|transaction_aborts)_total$" { n += $2 } END { print n }'; }
committed_is() { [ "$(d committed "$1" "$1" 0 | cut -d' ' -f1)" = "$2" ]; }
for mode in at-least-once exactly-once; do
    t=acl-$mode
    topic_create "$t-replies" 1
    admin acl grant nobody write "$t-replies"; admin acl grant worker write "$t-replies"
    worker "$t" 2 "${SCRAM[@]}" "kafka.sasl.password=$PASSWORD" "delivery.mode=$mode" "http.port=${P[5]}"
    check "$t: served" d wait "$t-replies" 20 90
    check "$t: committed" wait_until 60 committed_is "$t" 20
    admin acl revoke worker write "$t-replies"
    d produce "$t" 20 20
    check "$t: a forbidden reply topic is named in the log" \
        wait_until 60 grep -qiE "$t-replies.*authorization failed" "$RUN/worker-$t.log"
    failing() { [ "$(failures)" -gt 0 ]; }
    check "$t: and counted" wait_until 60 failing
    check "$t: the worker waits, alive" livez
    check "$t: no offset passes" committed_is "$t" 20
    check "$t: nothing is a dead letter" d count dead p- 0
    admin acl grant worker write "$t-replies"
    check "$t: allowed again, it goes on" d wait "$t-replies" 40 90
    d verify "$t-replies" 0 40 0 || FAILED=1
    if [ $mode = at-least-once ]; then
        admin acl grant nobody read "$t"
        d produce "$t" 40 20
        check "$t: a forbidden prompt topic is named in the log" \
            wait_until 60 grep -qiE "TOPIC_AUTHORIZATION_FAILED|$t.*authorization failed" "$RUN/worker-$t.log"
        check "$t: the worker waits, alive" livez
        admin acl grant worker read "$t"
        check "$t: allowed again, it reads on" d wait "$t-replies" 60 90
    fi
    end "$t"
done

# A prompt topic that may not be read any more while its prompts are at work: its offsets wait, in exactly-once its
# replies too, and the other topic's go on. Their replies are held back until it is taken away, or none would be at work.
consumed_is() { curl -sf "http://127.0.0.1:${P[5]}/metrics" | grep -q "^loramill_consumed_records_total $1\$"; }
for mode in at-least-once exactly-once; do
    t=unread-$mode
    topic_create "$t-other" 1; topic_create "$t-replies" 1
    admin acl grant nobody write "$t-replies"
    worker "$t" 2 "${SCRAM[@]}" "kafka.sasl.password=$PASSWORD" "delivery.mode=$mode" "http.port=${P[5]}" \
        "topics.prompts=$t,$t-other"
    d produce "$t-other" 20 20
    check "$t: prompts of both are read" wait_until 60 consumed_is 40
    admin acl grant worker describe "$t"; admin acl grant nobody read "$t"
    admin acl revoke nobody write "$t-replies"
    committed_other() { [ "$(d committed "$t" "$t-other" 0 | cut -d' ' -f1)" = 20 ]; }
    check "$t: the other topic's prompts commit" wait_until 60 committed_other
    d produce "$t-other" 40 600     # more than may start before the group has taken another mark
    committed_more() { [ "$(d committed "$t" "$t-other" 0 | cut -d' ' -f1)" = 620 ]; }
    check "$t: and go on" wait_until 60 committed_more
    nothing_passes() { [ "$(d committed "$t" "$t" 0 | cut -d' ' -f1)" -le 0 ]; }
    check "$t: those of the forbidden one do not" nothing_passes
    check "$t: nothing is a dead letter" d count dead p- 0
    admin acl grant worker read "$t"
    check "$t: allowed again, all are answered" d wait "$t-replies" 640 90
    check "$t: and committed" wait_until 60 committed_is "$t" 20
    d verify "$t-replies" 0 640 0 || FAILED=1
    end "$t"
done
no_secret() { ! grep -qE 's3cret-|n3xt-|th1rd-|t0ken-|wrong-pass-word|PRIVATE KEY|eyJ' "$RUN"/worker-*.log; }
check "no secret is in a log" no_secret
