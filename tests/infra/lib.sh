# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# tests/infra/lib.sh - real services for the integration tests, without containers. Source it.
#
#   infra_begin NAME            a scratch folder $RUN, and everything stopped when the script ends
#   kafka_start NODES           a KRaft cluster on loopback; sets $BOOTSTRAP. With PROXIED=1 a second
#                               listener is advertised at proxies: $PROXY_BOOTSTRAP, and $PROXIES as
#                               LISTEN:TARGET, for whoever runs them. $KAFKA_LISTENERS and
#                               $KAFKA_MAP (each begins with a comma), $KAFKA_EXTRA (properties) and
#                               $KAFKA_FORMAT (arguments of the storage tool) add to it
#   group_properties            a worker's properties for joining its group, in $GROUP_PROTOCOL
#   registry_start              Apicurio with Confluent's API; sets $REGISTRY and $REGISTRY_PID. In the
#                               file $REGISTRY_DATA it outlives a SIGKILL: registry_again
#   nginx_start DIR [PORT]      serves DIR; sets $STORE
#   adapter_ids DIR             what a store of DIR has, an id a line
#   nginx_put DIR               a server that also takes PUT; sets $STORE
#   ok WHAT / not_ok WHAT / check WHAT COMMAND...       TAP lines
#   wait_until SECONDS COMMAND...
#   part NAME                   is this part of the test wanted? ($PARTS)
#   start_worker LOG [KEY=VALUE]...     "${PROGRAM[@]}" with $RUN/worker.properties and these; $W is its
#                               pid, $RUN/LOG.log has its words
#   worker NAME [KEY=VALUE]...  the same under that name, in worker-NAME.log; a script may have one of its own
#   has PATTERN LOG             has it said so?
#   metric NAME                 of the worker at the port $HTTP; without its labels the first of that name
#   stop PID WHAT               SIGTERM, and status 0
#   ended PID                   is it no more?
#   lag_is_zero GROUP TOPIC [PARTITIONS]
#   will_hold PID..., then hold     SIGSTOP for these workers while no transaction is between its end and its
#                               markers: Kafka 4.3.1, killed there, forgets the markers (docs/matrix.md)
#   d COMMAND ...               prompts and outcomes by number: tests/integration/delivery.py
#
# What `make test-matrix` varies; without it the newest of all:
#
#   KAFKA=VERSION               of the broker; before 3.0 with ZooKeeper
#   BUILD=DIR                   of the worker, and so its librdkafka
#   OFFSET_MAP=0                that librdkafka is older than 2.2
#   REBALANCES=0                and than 2.10: a rebalance may lose what a member keeps
#   GROUP_PROTOCOL=classic      or consumer (KIP-848)
#
# Services get free ports, listen on 127.0.0.1 only, and are children of the script: the EXIT trap
# ends what $RUN/pids names, and nothing else.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
: "${BUILD:=build}" "${DEPS:=${XDG_CACHE_HOME:-$HOME/.cache}/loramill}"
LORAMILL=$PWD/$BUILD/loramill
PYTHON=$DEPS/venv-test/bin/python
: "${OFFSET_MAP:=1}" "${REBALANCES:=1}" "${GROUP_PROTOCOL:=classic}"
: "${KAFKA:=$(cd "$DEPS" && printf '%s\n' kafka-*/libs | sort -V | tail -1 | sed 's|kafka-||; s|/libs||')}"
KAFKA_LIBS=$DEPS/kafka-$KAFKA/libs
FAILED=0

infra_begin() {
    RUN=$PWD/$BUILD/run/$1.$$
    rm -rf "$RUN"; mkdir -p "$RUN"; : > "$RUN/pids"
    trap infra_end EXIT
    trap 'exit 130' INT TERM
}

# spawn LOG COMMAND...: a background process of this test; $! is its pid. It leads its own process
# group so that its children go with it.
spawn() {
    local log=$1; shift
    setsid "$@" > "$log" 2>&1 < /dev/null &
    echo $! >> "$RUN/pids"
}

# What the test's workers wrote is held against schemas/ before the broker goes.
record_messages() {
    [ -n "${BOOTSTRAP:-}" ] || return 0
    timeout 120 "$PYTHON" tests/infra/record.py record "$BOOTSTRAP" "${REGISTRY:-}" "$(basename "$RUN")" \
        "$BUILD/messages-seen.jsonl" 2> "$RUN/record.err"
    check "every message that a worker wrote fits schemas/" [ $? -eq 0 ]
    cat "$RUN/record.err"
}

infra_end() {
    local st=$? p t
    set +e                              # a script may have set it; what has ended can't be killed
    [ $st -eq 0 ] && record_messages
    tac "$RUN/pids" > "$RUN/pids.rev"
    while read -r p; do kill -TERM -- "-$p" 2>/dev/null; done < "$RUN/pids.rev"
    for t in $(seq 50); do
        while read -r p; do kill -0 "$p" 2>/dev/null && break; done < "$RUN/pids.rev" || break
        sleep 0.1
    done
    while read -r p; do kill -KILL -- "-$p" 2>/dev/null; done < "$RUN/pids.rev"
    [ $st -eq 0 ] && [ $FAILED -eq 0 ] && [ -z "${KEEP:-}" ] && rm -rf "$RUN"
    [ $FAILED -eq 0 ] || st=1
    trap - EXIT
    exit $st
}

ok() { echo "ok - $*"; }
not_ok() { echo "not ok - $*"; FAILED=1; }
check() { local what=$1; shift; if "$@"; then ok "$what"; else not_ok "$what"; fi; }
# part NAME: is it wanted? PARTS="stream cancel ..." runs some parts of a test only.
part() { [ -z "${PARTS:-}" ] || [[ " $PARTS " == *" $1 "* ]]; }
# die WHAT: the test can't go on.
die() { not_ok "$*"; exit 1; }

wait_until() {
    local end=$((SECONDS + $1)); shift
    until "$@" > /dev/null 2>&1; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.2
    done
}

# ---- workers ----------------------------------------------------------------------------------

PROGRAM=("$LORAMILL" worker)

start_worker() {
    local log=$RUN/$1.log set=() s; shift
    for s in "$@"; do set+=(--set "$s"); done
    spawn "$log" "${PROGRAM[@]}" -c "$RUN/worker.properties" "${set[@]}"
    W=$!
}

worker() { start_worker "worker-$1" "worker.name=$1" "${@:2}"; }

has() { grep -q "$1" "$RUN/$2.log"; }
metric() {
    curl -sf "http://127.0.0.1:$HTTP/metrics" |
        awk -v m="loramill_$1" '!n && ($1 == m || index($1, m "{") == 1) { print int($2); n = 1 }'
}
stop() { kill -TERM "$1"; wait "$1"; check "$2 ends with status 0 (got $?)" [ $? -eq 0 ]; }
ended() { case $(ps -o stat= -p "$1") in ''|Z*) return 0 ;; *) return 1 ;; esac; }
# Has the group committed the end of each partition, PARTITIONS of them if that is said?
lag_is_zero() {
    "$PYTHON" tests/infra/kafka_admin.py "$BOOTSTRAP" lag "$1" "$2" | awk -v want="${3:-0}" \
        '{ n++; if ($2 != $4) bad = 1 } END { exit bad || !n || (want && n != want) }'
}
will_hold() {
    coproc HOLD { "$PYTHON" tests/infra/kafka_admin.py "$BOOTSTRAP" hold "$@"; }
    exec {HELD}<&"${HOLD[0]}" {HOLD_NOW}>&"${HOLD[1]}"
    read -r _ <&"$HELD"
}
hold() { local said; echo >&"$HOLD_NOW"; read -r said <&"$HELD"; [ "$said" = held ]; }
d() { local c=$1; shift; "$PYTHON" tests/integration/delivery.py "$c" "$BOOTSTRAP" "$@"; }

# ---- services ---------------------------------------------------------------------------------

# free_ports N: N ports that nobody listens on, from a range that no ephemeral port is taken from, and
# that no script beside this one was given: between the answer and the listening is time.
free_ports() {
    "$PYTHON" - "$1" "$BUILD/run/ports" $$ <<'P'
import fcntl, os, random, socket, sys
wanted, me = int(sys.argv[1]), sys.argv[3]
with open(sys.argv[2], "a+") as f:              # a line each: port, pid of the script
    fcntl.flock(f, fcntl.LOCK_EX)
    f.seek(0)
    given = [x.split() for x in f]
    given = [x for x in given if os.path.exists(f"/proc/{x[1]}")]
    found = []
    while len(found) < wanted:
        port = str(random.randint(20000, 31000))
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", int(port)))
            except OSError:
                continue
        if port not in [x[0] for x in given]:
            found.append(port)
            given.append((port, me))
    f.truncate(0)
    f.writelines(f"{port} {pid}\n" for port, pid in given)
print(*found)
P
}

# Sessions are short, for a killed worker's partitions to move soon. KIP-848's are the broker's.
group_properties() {
    if [ "$GROUP_PROTOCOL" = consumer ]; then
        echo kafka.consumer.group.protocol=consumer
    else
        printf '%s\n' kafka.session.timeout.ms=6000 kafka.heartbeat.interval.ms=500
    fi
}

with_zookeeper() { case $KAFKA in [12].*) return 0 ;; *) return 1 ;; esac; }

# What comes first in a broker's properties: who leads it. Arguments as below.
kafka_role() {
    local listeners=PLAINTEXT://127.0.0.1:$2 map=PLAINTEXT:PLAINTEXT
    if with_zookeeper; then
        # A broker that was killed can't come back before its session is over; 18 s if nothing is said.
        printf '%s\n' "broker.id=$1" "zookeeper.connect=127.0.0.1:${4##*:}" zookeeper.session.timeout.ms=6000
    else
        printf '%s\n' process.roles=broker,controller "node.id=$1" "controller.quorum.voters=$4" \
            controller.listener.names=CONTROLLER
        listeners+=,CONTROLLER://127.0.0.1:$3 map+=,CONTROLLER:PLAINTEXT
    fi
    echo "listeners=$listeners${6:+,PROXIED://127.0.0.1:$6}${KAFKA_LISTENERS:-}"
    echo "listener.security.protocol.map=$map${6:+,PROXIED:PLAINTEXT}${KAFKA_MAP:-}"
}

kafka_properties() {    # ID CLIENT-PORT CONTROLLER-PORT VOTERS NODES [PROXIED-PORT PROXY-PORT]
    local isr=1 rf=$5
    [ "$rf" -gt 3 ] && rf=3
    [ "$rf" -ge 3 ] && isr=2
    kafka_role "$@"
    cat <<P
advertised.listeners=PLAINTEXT://127.0.0.1:$2${7:+,PROXIED://127.0.0.1:$7}${KAFKA_LISTENERS:-}
inter.broker.listener.name=PLAINTEXT
log.dirs=$RUN/kafka/n$1/log
num.partitions=1
default.replication.factor=$rf
min.insync.replicas=$isr
offsets.topic.num.partitions=4
offsets.topic.replication.factor=$rf
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor=$rf
transaction.state.log.min.isr=$isr
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=2000
group.consumer.session.timeout.ms=6000
group.consumer.min.session.timeout.ms=6000
group.consumer.heartbeat.interval.ms=500
group.consumer.min.heartbeat.interval.ms=500
auto.create.topics.enable=false
log.cleaner.dedupe.buffer.size=4194304
${KAFKA_EXTRA:-}
P
}

kafka_log4j() {
    cat <<'P'
status=warn
appender.c.type=Console
appender.c.name=C
appender.c.layout.type=PatternLayout
appender.c.layout.pattern=%d %p %c{1} %m%n
rootLogger.level=WARN
rootLogger.appenderRef.c.ref=C
P
}

# Before 4.0.
kafka_log4j1() {
    cat <<'P'
log4j.rootLogger=WARN, A
log4j.appender.A=org.apache.log4j.ConsoleAppender
log4j.appender.A.layout=org.apache.log4j.PatternLayout
log4j.appender.A.layout.ConversionPattern=%d %p %c{1} %m%n
P
}

JAVA=(java -XX:+UseSerialGC -XX:TieredStopAtLevel=1)

zookeeper_start() {     # PORT
    local d=$RUN/kafka/zookeeper
    mkdir -p "$d"
    printf '%s\n' "dataDir=$d" "clientPort=$1" clientPortAddress=127.0.0.1 admin.enableServer=false \
        > "$d/zoo.cfg"
    spawn "$d/out.log" "${JAVA[@]}" -Xmx128m "-Dlog4j.configuration=file:$RUN/kafka/log4j.properties" \
        -cp "$KAFKA_LIBS/*" org.apache.zookeeper.server.quorum.QuorumPeerMain "$d/zoo.cfg"
}

kafka_start() {
    local n=$1 i d ports voters=''
    read -ra ports <<< "$(free_ports $((4 * n)))"
    BOOTSTRAP= PROXY_BOOTSTRAP= PROXIES=()
    for i in $(seq "$n"); do
        voters+="$i@127.0.0.1:${ports[$((n + i - 1))]},"
        BOOTSTRAP+="127.0.0.1:${ports[$((i - 1))]},"
        PROXY_BOOTSTRAP+="127.0.0.1:${ports[$((3 * n + i - 1))]},"
        PROXIES+=("${ports[$((3 * n + i - 1))]}:${ports[$((2 * n + i - 1))]}")
    done
    voters=${voters%,} BOOTSTRAP=${BOOTSTRAP%,} PROXY_BOOTSTRAP=${PROXY_BOOTSTRAP%,}
    mkdir -p "$RUN/kafka"; kafka_log4j > "$RUN/kafka/log4j2.properties"
    kafka_log4j1 > "$RUN/kafka/log4j.properties"
    with_zookeeper && zookeeper_start "${voters##*:}"
    local cid; cid=A$(head -c 15 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=' | cut -c1-21)
    for i in $(seq "$n"); do
        d=$RUN/kafka/n$i; mkdir -p "$d"
        kafka_properties "$i" "${ports[$((i - 1))]}" "${ports[$((n + i - 1))]}" "$voters" "$n" \
            ${PROXIED:+"${ports[$((2 * n + i - 1))]}" "${ports[$((3 * n + i - 1))]}"} \
            > "$d/server.properties"
        with_zookeeper || "${JAVA[@]}" -Xmx128m -cp "$KAFKA_LIBS/*" kafka.tools.StorageTool format \
            -t "$cid" -c "$d/server.properties" ${KAFKA_FORMAT:-} > "$d/format.out" 2>&1 || { cat "$d/format.out"; return 1; }
        kafka_node "$i"
    done
    wait_until 180 kafka_ready "$n"
}

kafka_node() {          # ID: (re)starts one node; its pid is in n$ID/pid
    local d=$RUN/kafka/n$1
    spawn "$d/out.log" "${JAVA[@]}" -Xms256m -Xmx256m \
        "-Dlog4j2.configurationFile=$RUN/kafka/log4j2.properties" \
        "-Dlog4j.configuration=file:$RUN/kafka/log4j.properties" \
        -cp "$KAFKA_LIBS/*" kafka.Kafka "$d/server.properties"
    echo $! > "$d/pid"
}

kafka_ready() {
    "$PYTHON" tests/infra/kafka_admin.py "$BOOTSTRAP" brokers "$1"
}

# topic_create NAME PARTITIONS [KEY=VALUE]...
topic_create() { "$PYTHON" tests/infra/kafka_admin.py "$BOOTSTRAP" create "$@"; }

registry_start() {
    REGISTRY_PORT=$(free_ports 1)
    registry_again
    REGISTRY=http://127.0.0.1:$REGISTRY_PORT/apis/ccompat/v7
    wait_until 180 curl -sf -o /dev/null "$REGISTRY/subjects"
}

registry_again() {      # at the same port
    local app env=(QUARKUS_HTTP_HOST=127.0.0.1 QUARKUS_HTTP_PORT="$REGISTRY_PORT" QUARKUS_LOG_LEVEL=WARN)
    app=$(ls -d "$DEPS"/apicurio-*/app | tail -1)
    [ -z "${REGISTRY_DATA:-}" ] ||
        env+=("REGISTRY_DATASOURCE_URL=jdbc:h2:file:$REGISTRY_DATA;DB_CLOSE_ON_EXIT=FALSE;WRITE_DELAY=0")
    spawn "$RUN/registry.log" env "${env[@]}" java -Xmx384m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 \
        -jar "$app"/apicurio-registry-app-*-runner.jar
    REGISTRY_PID=$!
}

# nginx_run NAME DIR PORT DIRECTIVES: sets $STORE
nginx_run() {
    local n=$RUN/$1
    mkdir -p "$n"
    cat > "$n/nginx.conf" <<P
daemon off;
master_process off;
pid $n/pid;
error_log $n/error.log;
events { worker_connections 64; }
http {
    access_log $n/access.log;
    client_max_body_size 1g;
    client_body_temp_path $n/tmp; proxy_temp_path $n/tmp;
    fastcgi_temp_path $n/tmp; uwsgi_temp_path $n/tmp; scgi_temp_path $n/tmp;
    server { listen 127.0.0.1:$3; root $(realpath "$2"); location / { $4 } }
}
P
    spawn "$n/out.log" nginx -p "$n" -c "$n/nginx.conf" -e "$n/error.log"
    STORE=http://127.0.0.1:$3
    wait_until 60 curl -s -o /dev/null "$STORE/"
}
nginx_start() { nginx_run nginx "$1" "${2:-$(free_ports 1)}" ''; }
nginx_put() { nginx_run nginx-put "$1" "${2:-$(free_ports 1)}" 'dav_methods PUT;'; }
adapter_ids() { (cd "$1" && find . -name adapter_config.json | sort | sed 's|^\./||; s|/adapter_config.json||'); }
