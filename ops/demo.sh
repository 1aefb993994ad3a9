#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# ops/demo.sh: loramill's main job on this machine, from an order to a message in a brand's voice.
#
# Starts `loramill dev` (broker and adapter store) and two workers in one consumer group, submits
# 1,000 orders over 24 voices of tests/models/storefront-adapters and some deliberately bad
# prompts, waits for every outcome, and shows what came. The closing line is counted from the
# topics, once the workers have ended. Everything is below $BUILD/demo; nothing outlives the demo.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${BUILD:=build}"
bin=$BUILD/loramill
dir=$BUILD/demo
models=tests/models
voices=$models/storefront-adapters.json
properties=$dir/loramill.properties
limit=150                       # seconds for the job; a machine that needs more has a problem

say() { printf '\n%s\n' "$*"; }
die() { printf 'demo: %s\n' "$*" >&2; exit 1; }
now_ms() { date +%s%3N; }

pids=()
declare -A log

# start NAME COMMAND...: in the background, with a log of its own.
start() {
    local name=$1
    shift
    "$@" > "$dir/$name.log" 2>&1 &
    log[$!]=$dir/$name.log
    pids+=($!)
    last=$!
}

finish() {                      # ends one process and waits for it
    kill "$1" 2> /dev/null || true
    wait "$1" 2> /dev/null || true
}

cleanup() {
    local status=$? pid
    trap - EXIT INT TERM
    for pid in "${pids[@]}"; do
        finish "$pid"
    done
    if [ $status -ne 0 ]; then
        for pid in "${pids[@]}"; do
            printf '\n---- end of %s\n' "${log[$pid]}" >&2
            tail -n 15 "${log[$pid]}" >&2
        done
        printf 'demo: failed; all logs are in %s\n' "$dir" >&2
    fi
    exit $status
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# await SECONDS WHAT COMMAND...: until the command succeeds; fails early when a process has died.
await() {
    local tries=$(($1 * 10)) what=$2 pid
    shift 2
    until "$@" > /dev/null 2>&1; do
        for pid in "${pids[@]}"; do
            kill -0 "$pid" 2> /dev/null || die "a process ended while waiting for $what"
        done
        [ $((tries--)) -gt 0 ] || die "timed out waiting for $what"
        sleep 0.1
    done
}

for tool in jq awk; do
    command -v $tool > /dev/null || die "$tool is missing; \`make setup\` installs it"
done
[ -x "$bin" ] || die "$bin is missing; \`make\` builds it"
rm -rf "$dir"
mkdir -p "$dir"

say "loramill demo: 1,000 orders, 24 brand voices, one small base model, two workers"

# ---- the stack ----------------------------------------------------------------------------

start dev "$bin" dev --dir "$dir" --model $models/storefront --adapters $models/storefront-adapters
dev=$last
await 20 "the broker" test -e "$properties"
cores=$(nproc)
for i in 1 2; do
    start worker-$i "$bin" worker -c "$properties" --set worker.name=worker-$i \
        --set threads=$((cores > 1 ? cores / 2 : 1))
    worker[i]=$last
done
for i in 1 2; do
    await 30 "worker-$i to get its share of the partitions" \
        grep -q 'assigned .*prompts' "$dir/worker-$i.log"
done
say "broker, adapter store and two workers run; sending the orders:"

# ---- the job ------------------------------------------------------------------------------

jq -nRr --slurpfile voices "$voices" -f ops/demo/orders.jq $models/orders.txt > "$dir/orders.jsonl"
began=$(now_ms)
"$bin" submit -c "$properties" --input "$dir/orders.jsonl" --no-check \
    --summary "$dir/submitted.json"
"$bin" collect -c "$properties" --job "$dir/orders.jsonl" --output "$dir/arriving.jsonl" \
    --brief --timeout $limit || true    # some are meant to fail; missing ones show below, as lost

# ---- counting -----------------------------------------------------------------------------

for i in 1 2; do
    finish "${worker[i]}"
done
"$bin" collect -c "$properties" --output "$dir/outcomes.jsonl" --quiet \
    --summary "$dir/summary.json" 2> "$dir/collect.log" || true
finish "$dev"
submitted=$(jq .delivered "$dir/submitted.json")
answered=$(jq .answered "$dir/summary.json")
dead=$(jq .dead_lettered "$dir/summary.json")
lost=$((submitted - answered - dead))

# ---- what a person wants to see -------------------------------------------------------------

say "What happened"
jq -r --argjson began "$began" '
    def thousands: tostring | if length > 3 then (.[:-3] | thousands) + "," + .[-3:] else . end;
    ([(.last_ms - $began) / 1000, 0.001] | max) as $s
    | "  \(.answered | thousands) messages written in \($s * 10 | round / 10) s: " +
      "\(.answered / $s | round) orders/s, " +
      "\(.completion_tokens / $s | round | thousands) tokens/s generated",
      "  \(.prompt_tokens | thousands) tokens read, \(.completion_tokens | thousands) written, " +
      "\(.adapters | length) voices mixed in the same batches",
      (.answered as $all | .workers | to_entries | sort_by(.key)[]
       | "  \(.key) wrote \(.value | thousands) (\(100 * .value / $all | round) %)")
' "$dir/summary.json"
sed -n 's/^loramill dev: ended; served \(.*\) adapters, \(.*\) bytes$/  adapters fetched over HTTP: \1 (\2 bytes), kept in one cache for both workers/p' \
    "$dir/dev.log"

grep '"shown":"yes"' "$dir/orders.jsonl" > "$dir/shown.jsonl"
event=$(head -n 1 "$dir/shown.jsonl" | jq -r .prompt)
say "One event, six voices"
printf '  %s\n' "${event% ->}"
jq -rn --slurpfile jobs "$dir/shown.jsonl" '
    ([inputs | select(.choices) | {key: .id, value: .choices[0].text}] | from_entries) as $text
    | $jobs[] | [.adapter, ($text[.id] // "(no answer)" | gsub("\\s+"; " "))] | @tsv
' "$dir/outcomes.jsonl" | LC_ALL=C awk -f ops/demo/table.awk

say "Prompts that were refused, each with its reason"
jq -r 'select(.error) | [(.id // "(no id)" | .[:16]), .error.code, .error.message] | @tsv' \
    "$dir/outcomes.jsonl" | sort | LC_ALL=C awk -f ops/demo/reasons.awk

printf '\ndemo: %d answered, %d dead-lettered, %d lost\n' "$answered" "$dead" "$lost"
[ "$lost" -eq 0 ] && [ "$answered" -eq "$(wc -l < $models/orders.txt)" ]
