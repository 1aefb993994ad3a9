#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# `loramill dlq`, `status` and `reset` against a real broker and a real worker: what they show is
# what is there, and without --yes nothing changes.
. "$(dirname "$0")/../infra/lib.sh"
infra_begin tools
kafka_start 1 || die "the broker started"
nginx_start tests/models/storefront-adapters || die "nginx started"
topic_create prompts 3; topic_create replies 1; topic_create dead 2; topic_create elsewhere 1
PORT=$(free_ports 1)
cat > "$RUN/worker.properties" <<P
model.path=$PWD/tests/models/storefront
backend=cpu
threads=1
adapters.url=$STORE/{adapter}
adapters.cache_dir=$RUN/cache
journal.dir=$RUN/journal
topics.dead_letters=dead
group.id=tools
http.port=$PORT
commit.interval_ms=200
kafka.bootstrap.servers=$BOOTSTRAP
kafka.session.timeout.ms=6000
kafka.heartbeat.interval.ms=500
P
run() { "$LORAMILL" "$1" "${@:2:$SUB}" -c "$RUN/worker.properties" "${@:2+$SUB}" > "$RUN/out" 2> "$RUN/err"; }
dlq() { SUB=1 run dlq "$@"; }
status() { SUB=0 run status "$@"; }
reset() { SUB=0 run reset "$@"; }
start() {
    start_worker "worker-$1" "worker.name=$1"
    wait_until 60 curl -sf "http://127.0.0.1:$PORT/readyz" || die "worker $1 is ready"
}
quiet() { "$@" > /dev/null; }
lag_is() { status --json && quiet jq -e ".lag == $1" "$RUN/out"; }

# Before anything has run.
status --json
[ -s "$RUN/out" ] || cat "$RUN/err"
check "a group that never was: $(jq -c '[.state, .lag]' "$RUN/out")" [ "$(jq -c '[.state, .lag, (.workers | length)]' "$RUN/out")" = '["Dead",0,0]' ]

for i in $(seq 40); do echo '{"id": "good-'"$i"'", "prompt": "event ->", "params": {"max_tokens": 2}}'; done > "$RUN/job"
cat >> "$RUN/job" <<'P'
{"id": "lost", "prompt": "x", "adapter": "nobody"}
{"id": "lost2", "prompt": "x", "adapter": "nobody-either"}
{"id": "typo", "prompt": "x", "tpyo": 1}
not json
P
"$LORAMILL" submit -c "$RUN/worker.properties" --input "$RUN/job" --no-check -q 2> "$RUN/err" || die "submitted"
status --json
check "unfinished prompts are lag, with the age of the oldest" \
    quiet jq -e '.lag == 44 and ([.partitions[].lag] | add) == 44 and (now * 1000 - ([.partitions[].oldest_ms | values] | min)) < 60000' "$RUN/out"
start a
check "lag goes to 0 when all is done" wait_until 60 lag_is 0
status --json
check "the worker is there, with all partitions and nothing in flight" \
    quiet jq -e '.state == "Stable" and .workers[0].worker == "a" and .workers[0].partitions == 3 and .workers[0].in_flight == 0 and all(.partitions[]; .worker == "a")' "$RUN/out"
status
check "status for people" grep -qE '^group tools: Stable, 1 workers, lag 0' "$RUN/out"

dlq list
check "four dead letters (got $?): $(tail -1 "$RUN/err")" [ "$(wc -l < "$RUN/out")" = 4 ]
check "a line has place, time, cause, attempt, adapter, id, reason" grep -qP '^\d:\d+\t20\d\d-.*Z\tnot_found\t1\tnobody\tlost\t' "$RUN/out"
dlq list --cause not_found; check "by cause" [ "$(wc -l < "$RUN/out")" = 2 ]
dlq list --adapter nobody; check "by adapter" [ "$(wc -l < "$RUN/out")" = 1 ]
dlq list --id typo; check "by id" [ "$(wc -l < "$RUN/out")" = 1 ]
dlq list --adapter ''; check "of the base model" [ "$(cut -f6 "$RUN/out")" = typo ]
dlq list --since 1h --until 30m; check "by time: not before" [ "$(wc -l < "$RUN/out")" = 0 ]
dlq list --since 10m; check "by time" [ "$(wc -l < "$RUN/out")" = 4 ]
ago=$((($(date +%s) - 600) * 1000))
dlq list --since "$ago" --cause not_found --adapter nobody; check "by all at once, and a time in milliseconds" [ "$(wc -l < "$RUN/out")" = 1 ]
dlq list --until "$ago"; check "until such a time" [ "$(wc -l < "$RUN/out")" = 0 ]
dlq list --limit 1; check "a limit" [ "$(wc -l < "$RUN/out")" = 1 ]
dlq list --json --id lost
check "as JSON" quiet jq -e '.error.code == "not_found" and .prompt.adapter == "nobody" and .adapter == "nobody" and .dead_letter.attempt == 1 and .at.offset >= 0' "$RUN/out"
place=$(jq -r '"\(.at.partition):\(.at.offset)"' "$RUN/out")
dlq show "$place"
check "show: value, headers, binary ones as hex" grep -qE 'header   kafka_dlt-original-offset: 0x0000' "$RUN/out"
check "show: the value as it was sent" grep -qF 'value    {"id": "lost", "prompt": "x", "adapter": "nobody"}' "$RUN/out"
dlq show 0:99999; check "a place where nothing is: status 1 (got $?)" [ $? -eq 1 ]
dlq show nonsense; check "a place that is none: status 2 (got $?)" [ $? -eq 2 ]

dlq retry --cause not_found
check "without --yes nothing is sent: $(tail -1 "$RUN/err")" grep -q 'nothing was sent; --yes sends 2' "$RUN/err"
sleep 1; dlq list; check "and nothing came back" [ "$(wc -l < "$RUN/out")" = 4 ]
# The adapter appears in the store; its prompt is sent back and answered.
stop "$W" "the worker"
cp -r tests/models/storefront-adapters "$RUN/adapters"
first=$(adapter_ids "$RUN/adapters" | head -1)
cp -r "$RUN/adapters/$first" "$RUN/adapters/nobody"
nginx_run nginx2 "$RUN/adapters" "$(free_ports 1)" ''
sed -i "s|^adapters.url=.*|adapters.url=$STORE/{adapter}|" "$RUN/worker.properties"
start b
dlq retry --cause not_found --yes
check "two are sent back (got $?): $(tail -1 "$RUN/err")" grep -q '2 sent back, 0 not' "$RUN/err"
check "and printed: $(cut -f3 "$RUN/out" | sort | tr '\n' ' ')" [ "$(cut -f3 "$RUN/out" | sort | tr '\n' ' ')" = 'lost lost2 ' ]
before=$(($(date +%s%N) / 1000000))
# A list waits for no transaction; the broker writes the end of one after it has said that it is committed.
were() { dlq list --json --until "$before"; jq -se '[.[] | select(.dead_letter.attempt == 1 and .sent_back) | .id] | sort == ["lost", "lost2"]' "$RUN/out"; }
check "the list tells which were" wait_until 60 were
dlq list --open; check "and those that are open" [ "$(grep -c -P '\topen$' "$RUN/out") $(grep -cP '\tlost\t' "$RUN/out")" = "$(wc -l < "$RUN/out") 0" ]
dlq show "$place"; check "show: the same" grep -q '^state    sent back$' "$RUN/out"
dlq retry "$place" --yes; st=$?
check "a second retry passes it over (got $st): $(tr '\n' ' ' < "$RUN/err")" \
    [ "$st $(grep -c '1 were sent back before' "$RUN/err") $(grep -c '0 sent back, 0 not' "$RUN/err")" = '0 1 1' ]
dlq retry "$place"; check "and says so before" grep -q '1 were sent back before' "$RUN/err"
answered() { "$LORAMILL" collect -c "$RUN/worker.properties" --output "$RUN/all" -q -b 2> /dev/null; jq -se 'map(select(.id == "lost" and (.choices | length) == 1)) | length == 1' "$RUN/all"; }
check "the healed one is answered" wait_until 60 answered
again() { dlq list --json --id lost2 && jq -se 'length == 2 and .[1].dead_letter.attempt == 2 and .[0].dead_letter.offset == .[1].dead_letter.offset' "$RUN/out"; }
check "the other one is back, as attempt 2, with its first origin" wait_until 60 again
dlq retry "$place" --to elsewhere --again --yes
check "one by its place, once more, to another topic" grep -q '1 sent back' "$RUN/err"
value() { "$PYTHON" tests/infra/kafka_admin.py "$BOOTSTRAP" dump elsewhere; }
value > "$RUN/elsewhere"
check "byte for byte, without the reasons" [ "$(jq -r '.value' "$RUN/elsewhere")" = '{"id": "lost", "prompt": "x", "adapter": "nobody"}' ]
check "headers: the prompt's own, attempt and origin" quiet jq -e '(.headers | keys) as $k | ($k | index("content-type")) and ($k | index("loramill-attempt")) and ($k | index("kafka_dlt-original-topic")) and ([$k[] | select(test("exception|__connect|error"))] == [])' "$RUN/elsewhere"

# Letters that somebody made to harm: a terminal's escape sequences, lines that are none, an origin
# that is not ours, bytes of any kind; and one that is too large for where it is sent.
topic_create payments 1; topic_create small 1 max.message.bytes=3000; topic_create dead2 1 max.message.bytes=8000000
topic_create large 1 max.message.bytes=8000000
"$PYTHON" - "$BOOTSTRAP" <<'P' || die "letters are there"
import sys
from confluent_kafka import Producer
p = Producer({"bootstrap.servers": sys.argv[1], "message.max.bytes": 8000000})
def letter(value, topic=b"prompts", key=b"k", *more):
    p.produce("dead2", value, key, headers=[("kafka_dlt-original-topic", topic),
              ("kafka_dlt-exception-fqcn", b"loramill.invalid"), ("kafka_dlt-exception-message", "\x1b[2J\x9b1m".encode()), *more])
letter(b'{"id": "a\\u001b[2J\\u009b1mb", "adapter": "x\\ty\\nz", "prompt": "p"}')
letter('{"id": "c1", "prompt": "\x9b31m"}'.encode())
letter(b"\xff\x00", b"prompts", b"\x00\x01", ("x\x1bname", b"1\nvalue    fake"), ("null", None))
letter(None)
letter(b'{"id": "steal", "prompt": "p"}', b"payments")
letter(b'{"id": "large", "prompt": "%s"}' % (b"x" * 6000))
letter(b'{"id": "nul", "prompt": "a\\u0000b"}')
letter(b'{"id": "huge", "prompt": "%s"}' % (b"x" * 3000000))
# How its value is encoded is said behind many other headers: not as JSON.
letter(b'{"id": "many", "prompt": "p"}', b"prompts", b"k", *[("x-%d" % i, b"y") for i in range(100)], ("content-type", b"application/avro"))
assert not p.flush(20)
P
dlq2() { dlq "$@" --set topics.dead_letters=dead2; }
calm() { LC_ALL=C grep -qP '[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]' "$RUN/out" && return 1; [ "$(wc -l < "$RUN/out")" = "$1" ]; }
dlq2 list; check "nothing of a letter drives the terminal, and a letter is a line" calm 9
dlq2 show 0:0 0:1 0:2 0:3; check "show: the same" calm "$(wc -l < "$RUN/out")"
check "show: no line but its own begins with a field's name" [ "$(grep -c '^value ' "$RUN/out")" = 4 ]
dlq2 list --json; check "as JSON: each is an object" [ "$(jq -s 'map(select(.at.offset >= 0)) | length' "$RUN/out")" = 9 ]
check "the same" calm 9
dlq2 list --id nul; check "by id, where the prompt holds U+0000" [ "$(wc -l < "$RUN/out")" = 1 ]
dlq2 list --id many; check "a header behind a hundred others is read" [ "$(wc -l < "$RUN/out")" = 0 ]
dlq2 retry 0:7 --to large --yes; st=$?
check "a letter of 3 MB goes where it may (got $st): $(tail -1 "$RUN/err")" grep -q '1 sent back, 0 not' "$RUN/err"
"$LORAMILL" submit -c "$RUN/worker.properties" --set topics.prompts=large --set message.max_bytes=4000000 -q \
    --input <(printf '{"id": "huge", "prompt": "%03000000d"}\n' 0) 2> "$RUN/err"; st=$?
check "and so does a prompt of 3 MB (got $st): $(cat "$RUN/err")" [ $st -eq 0 ]
dlq2 retry 0:7 --to small --again --yes; st=$?
check "a letter that its topic refuses is named, and counted once (got $st): $(tr '\n' ' ' < "$RUN/err")" \
    [ "$st $(grep -c '0:7 was not sent to small: ' "$RUN/err") $(grep -c 'may have been' "$RUN/err") $(grep -c '0 sent back, 1 not' "$RUN/err")" = '1 1 0 1' ]
dlq2 retry 0:4 --yes; check "a letter goes to topics.prompts or where --to says, nowhere else (got $?)" \
    grep -q "0:4 can't be sent back: it says that it came from a topic that is not in topics.prompts" "$RUN/err"
check "nothing came there" [ -z "$("$PYTHON" tests/infra/kafka_admin.py "$BOOTSTRAP" dump payments)" ]
dlq2 retry 0:5 0:6 --to small --yes; st=$?
check "of a retry that fails in part each failed place is named: $(tr '\n' ' ' < "$RUN/err")" \
    quiet grep -Pzo '0:5 was not sent to small: .*\n.*1 sent back, 1 not' "$RUN/err"
check "and the status says so (got $st)" [ $st -eq 1 ]
# A batch is refused with all its lines; they are not too large for that.
for i in $(seq 60); do
    printf '{"id": "s-%d", "prompt": "%0300d"}\n' "$i" 0
    [ "$i" = 30 ] && printf '{"id": "big", "prompt": "%06000d"}\n' 0
done > "$RUN/smalls"
"$LORAMILL" submit -c "$RUN/worker.properties" --set topics.prompts=small -q --input "$RUN/smalls" 2> "$RUN/err"; st=$?
check "of many lines one is refused by the broker (got $st): $(tr '\n' ' ' < "$RUN/err")" \
    [ "$st $(grep -c ':31: not delivered: ' "$RUN/err") $(grep -c '61 lines: 60 delivered, 0 refused, 1 not delivered' "$RUN/err")" = '1 1 1' ]
marked() { dlq2 list --json; [ "$(jq -sc '[.[] | select(.sent_back) | .at.offset]' "$RUN/out")" = '[6,7]' ]; }
check "of those only what was sent is marked" wait_until 60 marked
dlq2 retry 0:6 0:6 0:99 --to small --again --yes; check "a place where nothing is: status 1 (got $?)" grep -q '1 of 2 are there' "$RUN/err"
dlq2 retry 0:6 --to not-there --yes; st=$?; check "to a topic that is not there: status 1 (got $st)" [ $st -eq 1 ]

# A pattern names the topics that it matches; the group reads nothing of the others.
topic_create prompts-urgent 1
status --json --set 'topics.prompts=^prompts'
check "status of a pattern: $(jq -c '[.partitions[] | [.topic, .partition]]' "$RUN/out")" \
    [ "$(jq -c '[.partitions[] | [.topic, .partition]]' "$RUN/out")" = '[["prompts",0],["prompts",1],["prompts",2],["prompts-urgent",0]]' ]
status --json --set 'topics.prompts=prompts-urgent, ^prompts$'
check "of a name and a pattern" [ "$(jq -c '[.partitions[].topic]' "$RUN/out")" = '["prompts-urgent","prompts","prompts","prompts"]' ]
status --set 'topics.prompts=^nothing'; st=$?
check "of one that matches nothing (got $st): $(cat "$RUN/err")" grep -q 'no topic that topics.prompts=^nothing matches' "$RUN/err"
reset --to latest --set 'topics.prompts=^prompts'
check "reset knows patterns as well" grep -qE '^prompts-urgent +0 +- +0 ' "$RUN/out"

# All partitions at once: what a hundred that lag take is not a hundred times what one takes.
topic_create many 100
"$PYTHON" - "$BOOTSTRAP" <<'P' || die "records are there"
import sys
from confluent_kafka import Producer
p = Producer({"bootstrap.servers": sys.argv[1]})
for i in range(300): p.produce("many", b"x" * 1000, partition=i % 100)
assert not p.flush(20)
P
t=$(date +%s%N); status --json --no-metrics --topic many; t=$((($(date +%s%N) - t) / 1000000))
check "a hundred lagging partitions, each with its oldest record ($t ms)" quiet jq -e '[.partitions[] | select(.lag == 3 and .oldest_ms > 0)] | length == 100' "$RUN/out"
check "in less time than one after the other took (0.37 s each)" [ $t -lt 18500 ]
# Ctrl-C while no broker answers.
kill -STOP "$(cat "$RUN/kafka/n1/pid")"
spawn "$RUN/status.log" "$LORAMILL" status -c "$RUN/worker.properties" --topic many; S=$!
sleep 2; t=$(date +%s%N); kill -INT $S; wait $S; st=$?; t=$((($(date +%s%N) - t) / 1000000))
kill -CONT "$(cat "$RUN/kafka/n1/pid")"
check "Ctrl-C is heard at once ($t ms), with status 1 (got $st): $(cat "$RUN/status.log")" [ "$((t < 3000)) $st" = '1 1' ]

# Whatever happens to a retry, each letter goes back once: SIGKILL in the midst of it, and another one.
topic_create dead3 2; topic_create back 1
"$PYTHON" - "$BOOTSTRAP" <<'P' || die "many letters are there"
import sys
from confluent_kafka import Producer
p = Producer({"bootstrap.servers": sys.argv[1]})
for i in range(10000):
    p.produce("dead3", b'{"id": "k-%d"}' % i, partition=i % 2, headers=[("kafka_dlt-original-topic", b"prompts")])
    p.poll(0)
assert not p.flush(20)
P
dlq3() { dlq "$@" --set topics.dead_letters=dead3; }
back() { "$PYTHON" tests/infra/kafka_admin.py "$BOOTSTRAP" dump "$1" > "$RUN/back"; jq -r .value "$RUN/back" | sort | uniq -c | awk '{ n++; if ($1 > 1) r++ } END { print n + 0, r + 0 }'; }
# begun LOG TOPIC: a retry that has sent some letters; $R.
begun() {
    spawn "$1" "$LORAMILL" dlq retry -c "$RUN/worker.properties" --set topics.dead_letters=dead3 --to "$2" --yes; R=$!
    for _ in $(seq 1000); do [ -s "$1" ] && return; sleep 0.02; done
    die "a retry sends letters"
}
begun "$RUN/killed" back; kill -KILL $R; wait $R
printed=$(grep -c '^[01]:.* -> back' "$RUN/killed")
shown() { dlq3 list --open; open=$(wc -l < "$RUN/out"); [ "$printed" -le $((10000 - open)) ]; }
check "what it had sent is not open" wait_until 60 shown
dlq3 retry --to back --yes; st=$?; now=$(back back)
check "a retry was killed after $printed letters; the next sends the rest, $open (got $st): $(tail -1 "$RUN/err")" \
    [ "$st $(wc -l < "$RUN/out") $((open > 0))" = "0 $open 1" ]
check "each is there once ($now)" [ "$now" = '10000 0' ]
none_open() { dlq3 list --open; [ "$(wc -l < "$RUN/out")" = 0 ]; }
check "none is open" wait_until 60 none_open
reset --to earliest --set group.id=tools-dlq-retry --topic dead3 --yes; dlq3 list --open
check "reset of the retries' group opens them again" [ "$(wc -l < "$RUN/out")" = 10000 ]
topic_create twice 1
begun "$RUN/stopped" twice; kill -STOP $R
dlq3 retry --to twice --yes; st=$?; kill -CONT $R; wait $R; old=$?
check "a second retry beside one that hangs sends the rest (got $st): $(tail -1 "$RUN/err")" [ $st -eq 0 ]
check "and ends that (got $old): $(tail -1 "$RUN/stopped")" [ "$old $(grep -c 'another retry has begun' "$RUN/stopped")" = '1 1' ]
now=$(back twice); check "each is there once ($now)" [ "$now" = '10000 0' ]

reset --to earliest --partition 99; check "a partition that is not there" grep -q 'no topic has a partition 99' "$RUN/err"
reset --to earliest --yes
check "a group with workers is not moved (got $?)" grep -q 'end its workers first' "$RUN/err"
stop "$W" "the worker"
status --json
check "it has left its group, at once" [ "$(jq -c '[.state, (.workers | length)]' "$RUN/out")" = '["Empty",0]' ]
check "lag is 0" lag_is 0
reset --to earliest
check "without --yes it only shows: $(tail -1 "$RUN/err")" grep -q 'nothing was changed' "$RUN/err"
check "it shows where from and where to" grep -qE '^prompts +0 +[0-9]+ +0 +-[0-9]+' "$RUN/out"
check "and lag is still 0" lag_is 0
reset --to earliest --yes
check "the group is moved (got $?)" [ $? -eq 0 ]
status --json
check "all is lag again" quiet jq -e 'all(.partitions[]; .committed == .low and .lag == .end - .low) and .lag >= 46' "$RUN/out"
ALL=$(jq .lag "$RUN/out")       # with the ends of the retries' transactions
reset --to latest --partition 1 --yes; reset --to 2 --partition 0 --yes
status --json
check "one partition to its end, one to an offset" quiet jq -e '[.partitions[] | [.lag == 0, .committed == 2]] | .[1][0] and .[0][1]' "$RUN/out"
reset --to 1h --yes; check "by time" lag_is "$ALL"
reset --to latest --yes
start c
"$LORAMILL" submit -c "$RUN/worker.properties" --input <(echo '{"id": "after", "prompt": "x", "params": {"max_tokens": 1}}') -q 2> /dev/null
after() { "$LORAMILL" collect -c "$RUN/worker.properties" --output "$RUN/all" -q -b 2> /dev/null; jq -se 'any(.id == "after")' "$RUN/all"; }
check "a worker goes on from there" wait_until 60 after
check "and has read nothing twice" [ "$(curl -sf "http://127.0.0.1:$PORT/metrics" | awk '$1 == "loramill_consumed_records_total" { print $2 }')" = 1 ]
stop "$W" "the worker"

# Prompts in flight: those that wait for an adapter which nobody serves, at the head of partition 0
# and at the end of partition 1; the good ones behind and before them end. Two workers share the group.
sed -i -E '/^(group\.id|adapters\.url)=/d' "$RUN/worker.properties"
cat >> "$RUN/worker.properties" <<P
group.id=flight
engine.mode=echo
adapters.url=http://127.0.0.1:$(free_ports 1)/{adapter}
drain.timeout_ms=500
P
reset --to latest --yes
SENT=$(($(date +%s) * 1000 - 3 * 3600000))
"$PYTHON" - "$BOOTSTRAP" "$SENT" <<'P' || die "prompts are there"
import json, sys
from confluent_kafka import Producer
p = Producer({"bootstrap.servers": sys.argv[1]})
def send(partition, n, **more):
    p.produce("prompts", json.dumps({"id": f"f-{partition}-{n}", "prompt": "x", **more}),
              partition=partition, timestamp=int(sys.argv[2]) + 1000 * partition + n)
send(0, 0, adapter="away")
for n in range(1, 6): send(0, n)
for n in range(3): send(1, n)
send(1, 3, adapter="away")
for n in range(2): send(2, n)
assert not p.flush(20)
P
start p; P1=$W
# Far from the first: the ports behind p's are somebody else's, who does not answer.
spawn "$RUN/ports.log" "$PYTHON" -c '
import socket, sys, time
held = []
for port in range(int(sys.argv[1]) + 1, int(sys.argv[1]) + 13):
    s = socket.socket()
    try: s.bind(("0.0.0.0", port)); s.listen(1); held.append(s)
    except OSError: pass
print("held", flush=True); time.sleep(600)' "$PORT"
wait_until 60 grep -q held "$RUN/ports.log" || die "the next ports are taken"
start q; P2=$W
in_flight() {
    status --json && quiet jq -e --argjson t "$SENT" '
        def at(n): .partitions[n];
        .state == "Stable" and .lag == 2 and ([.workers[].worker] | sort) == ["p", "q"]
        and (at(0) | [.lag, .finished_beyond, .oldest_ms, .end - .committed]) == [1, 5, $t, 6]
        and (at(1) | [.lag, .finished_beyond, .oldest_ms, .end - .committed]) == [1, 0, $t + 1003, 1]
        and (at(2) | [.lag, .finished_beyond, .oldest_ms, .end - .committed]) == [0, 0, null, 0]
        and (. as $s | all(.workers[]; . as $w | .partitions > 0 and .running == 0 and .paused == 0
            and .in_flight == .waiting and .in_flight
                == ([$s.partitions[] | select(.worker == $w.worker and .lag > 0)] | length)))' "$RUN/out"
}
check "prompts in flight: lag, what is finished beyond, the oldest one's time, and whose they are" wait_until 60 in_flight
status
check "the same for people: $(head -1 "$RUN/out")" quiet grep -Pzo \
    '(?s)^group flight: Stable, 2 workers, lag 2\n.*\nprompts +0 +\d+ +\d+ +5 +1 +3\.0h  [pq]\n.*\nprompts +2 +\d+ +\d+ +0 +0 +-  [pq]\n' "$RUN/out"
stop "$P1" "worker p"; stop "$P2" "worker q"
status --json
check "what they handed back is lag" quiet jq -e '.state == "Empty" and .lag == 2 and (.workers | length) == 0 and .partitions[0].finished_beyond == 5' "$RUN/out"
