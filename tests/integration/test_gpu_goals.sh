#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# tests/gpu/goals.py, which judges what a run on a GPU measured: reached, missed, not for this card,
# incomplete, left out; and that lines of an earlier run do not count. Needs no GPU and no broker.
set -u
cd "$(dirname "$0")/../.."
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
file=$dir/gpu-check.jsonl

# figures CARD SHARE COMPLETED RATE: a run's lines
figures() {
    cat << END
{"run": "gpu-check", "name": "device", "device": "NVIDIA $1"}
{"name": "ceiling: reads", "value": 4000, "unit": "GB/s"}
{"name": "attention decode, 256 x kv 512", "value": 1, "unit": "us", "mb": 134.2, "share": $2}
{"name": "attention decode, 1 x kv 512", "value": 1, "unit": "us", "mb": 8.4, "share": 0.2}
{"run": "decode llama-2-7b, batch 32", "name": "decode_batch1_step", "value": 3.7, "unit": "ms/step"}
{"run": "trace llama-2-7b, 0 adapters of rank 8", "requests": 1000, "completed": $3, "late": 0, "failed": 0, "seconds": 27.0, "requests_per_s": $4, "steps": 1316, "adapters_per_step": 0.0}
{"run": "trace llama-2-7b, 100 adapters of rank 8", "requests": 1000, "completed": 1000, "late": 0, "failed": 0, "seconds": 29.0, "requests_per_s": 35.0, "steps": 1346, "adapters_per_step": 34.5}
{"run": "gpu-check", "name": "seconds_smoke", "value": 56.6, "unit": "s", "goal": 90}
END
}

# judged WHAT STATUS PATTERN [ARGUMENT...]: of $file
judged() {
    local what=$1 want=$2 pattern=$3 out st
    shift 3
    out=$(python3 tests/gpu/goals.py "$file" "${@:-0}" 2>&1)
    st=$?
    if [ $st -eq "$want" ] && grep -qE "$pattern" <<< "$out"; then
        echo "ok - $what"
    else
        echo "not ok - $what: status $st, expected $want and '$pattern'"
        sed 's/^/# /' <<< "$out"
    fi
}

figures 'H200' 0.9 1000 37.0 > "$file"
judged "all reached" 0 '^ok - decode llama-2-7b, batch 1, .*: 1\.12 \(at-most 1\.2\)'
judged "a floor with the adapters' bytes" 0 'of the floor: .* floor_with_adapters_s 23\.89'
figures 'H200' 0.84 1000 37.0 > "$file"
judged "a share missed" 3 '^MISSED attention decode, 256 x kv 512, share 0\.84 0\.85'
figures 'H200' 0.9 1000 35.9 > "$file"
judged "a rate missed on an H200" 3 '^MISSED trace llama-2-7b, 0 adapters .* 35\.9 requests/s 36'
judged "a goal without a figure, of a whole run" 3 '^MISSED .*1000 adapters.* \(no figure\) 27' 0 full
figures 'H100 80GB HBM3' 0.9 1000 35.9 > "$file"
judged "a rate is not judged on another card" 0 '^# trace .* 35\.9 .*goal of an H200: 36, not judged'
figures 'H100 80GB HBM3' 0.9 1000 40.0 > "$file"
judged "a tax is judged on any card" 3 '^MISSED trace .*100 adapters of rank 8, of its base 0\.875 0\.92'
figures 'H100 80GB HBM3' 0.84 999 35.9 > "$file"
judged "an incomplete trace is a failure, whatever was missed" 1 '^not ok - trace .* 999 of 1000'
lines=$(wc -l < "$file")
figures 'H100 80GB HBM3' 0.9 1000 35.9 >> "$file"
judged "an earlier run does not count" 0 ' 0 missed, 0 traces incomplete' "$lines"
figures 'H200' 0.9 1000 37.0 > "$file"
echo '{"run": "gpu-check", "name": "left_out", "what": "a trace"}' >> "$file"
judged "left out on an H200" 3 '^MISSED left out for want of time: a trace'
