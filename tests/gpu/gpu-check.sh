#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# tests/gpu/gpu-check.sh: proves and measures the CUDA backend on this machine's GPU.
#   PART=smoke     every operation against the CPU's, golden logits; memcheck    (at most 90 s)
#   PART=kernels   the same operations at all sizes, then their speed            (2 min)
#   PART=trace     end-to-end traces                                             (6 min)
#   PART=full      all of them                                                   (9 min)
#   RESULTS=DIR    one JSON line a figure goes to DIR/gpu-check.jsonl (default: build)
#
# Runs the prebuilt build/gpu/gpu-check if it is there, else builds it. Each part prints its lines
# even if a later one fails. Exit status: 0 all well, 1 a part failed, 2 no GPU or nothing to run.
set -u
cd "$(dirname "$0")/../.."
: "${PART:=smoke}" "${RESULTS:=build}"
bin=build/gpu/gpu-check
failed=0

say() { printf '== %s\n' "$*"; }
die() { printf 'gpu-check: %s\n' "$*" >&2; exit 2; }

case $PART in smoke|kernels|trace|full) ;; *) die "no part '$PART'; use smoke, kernels, trace or full" ;; esac
[ -e /dev/nvidiactl ] || [ -e /dev/dxg ] || command -v nvidia-smi > /dev/null ||
    die "this machine has no NVIDIA GPU (no /dev/nvidiactl, no nvidia-smi); nothing was checked"
mkdir -p "$RESULTS" || die "cannot make $RESULTS"
results=$RESULTS/gpu-check.jsonl
if [ ! -x "$bin" ]; then
    say "no prebuilt $bin: building it"
    make --no-print-directory gpu-build || die "the build failed"
fi

# Where a toolkit or a Python environment keeps cuBLASLt, if the loader does not find it.
find_cublas() {
    ldd "$bin" | grep -q 'not found' || return
    local want dir
    want=$(ldd "$bin" | awk '/not found/ { print $1; exit }')
    for dir in /usr/local/cuda/lib64 $(python3 -c 'import site, sys
for d in site.getsitepackages() + [p for p in sys.path if p.endswith("-packages")]:
    print(d + "/nvidia/cu13/lib"); print(d + "/nvidia/cublas/lib")' 2> /dev/null); do
        if [ -e "$dir/$want" ]; then
            export LD_LIBRARY_PATH=$dir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
            return
        fi
    done
    die "$want was not found; install cuBLAS 13 (ops/setup.sh cuda) or set LD_LIBRARY_PATH"
}
find_cublas

# step NAME FUNCTION: a part's result does not depend on that of the one before.
step() {
    local start=$SECONDS st
    say "$1"
    "$2"
    st=$?
    [ $st -eq 124 ] && printf 'not ok - %s timed out\n' "$1"
    [ $st -eq 0 ] || failed=1
    printf '== %s: %s (%d s)\n' "$1" "$([ $st -eq 0 ] && echo passed || echo "failed, status $st")" \
        $((SECONDS - start))
}

memcheck() {
    local tool
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
    if [ -z "$tool" ]; then
        echo "memcheck was not run: no compute-sanitizer here"
        return
    fi
    local out
    out=$(timeout -k 5 60 "$tool" --tool memcheck --report-api-errors no \
        --error-exitcode 99 "$bin" /dev/null device rows sample 2>&1)
    local st=$?
    if printf '%s' "$out" | grep -qE 'Device not supported|No kernels were launched'; then
        echo "memcheck was not run: compute-sanitizer does not accept this device"
    elif [ $st -eq 124 ]; then
        echo "memcheck was not finished in 60 s"
    else
        printf '%s\n' "$out" | grep -E '^not ok|=========|passed' | tail -n 15
        return $st
    fi
}

# bench LIMIT LABEL ARGUMENTS...: `loramill bench` on the GPU; its JSON lines go to the results too.
bench() {
    local limit=$1 label=$2 out st
    shift 2
    out=$(timeout -k 5 "$limit" "$bin" loramill bench --backend cuda --load-format dummy "$@" \
        2> "$RESULTS/gpu-check.err")
    st=$?
    if [ $st -ne 0 ]; then
        printf 'not ok - %s: status %d: %s\n' "$label" $st "$(tail -n 1 "$RESULTS/gpu-check.err")"
        return 1
    fi
    printf '%s\n' "$out" | grep '^{' | sed "s/^{/{\"run\": \"$label\", /" | tee -a "$results"
}

decode() {
    local b st=0
    for b in 1 32 256; do
        bench 60 "decode llama-2-7b, batch $b" --shape ops/shapes/llama-2-7b.json \
            --prompt-tokens 32 --tokens 128 --batch $b --repeat 2 || st=1
    done
    for b in 1 32; do
        bench 60 "decode llama-2-7b, batch $b, weights in fp8" --shape ops/shapes/llama-2-7b.json \
            --prompt-tokens 32 --tokens 128 --batch $b --repeat 1 --weights-dtype fp8 || st=1
    done
    bench 60 "decode llama-3.1-8b, batch 32, 32 adapters" --shape ops/shapes/llama-3.1-8b.json \
        --prompt-tokens 32 --tokens 128 --batch 32 --dummy 32 --repeat 2 || st=1
    return $st
}

# trace SHAPE ADAPTERS RANKS [KV]: 1,000 requests at once, 256 running.
trace() {
    local file=$RESULTS/trace-$2-$3.csv
    python3 tests/gpu/make_trace.py "$2" "$3" > "$file" || return 1
    bench 120 "trace $1, $2 adapters of rank $3${4:+, KV cache in $4}" \
        --shape "ops/shapes/$1.json" --trace "$file" \
        --max-seqs 256 --max-step-tokens 4096 --no-prefix-cache --json \
        --host-adapter-bytes 30000000000 --kv-dtype "${4:-auto}"
}

traces() {
    local st=0
    trace llama-2-7b 0 8 || st=1
    trace llama-2-7b 32 8 || st=1
    trace llama-2-7b 100 8 || st=1
    trace llama-2-7b 100 8,16,32,64 || st=1
    trace llama-3.1-8b 0 8 || st=1
    trace llama-3.1-8b 32 8 || st=1
    trace llama-3.1-8b 100 8 || st=1
    trace llama-2-7b 0 8 fp8 || st=1
    return $st
}

speed() { timeout -k 5 130 "$bin" "$results" bench; }
checks() { timeout -k 5 80 "$bin" "$results" smoke; }
golden() { timeout -k 5 60 "$bin" "$results" golden; }

case $PART in
smoke)
    step "operations against the CPU" checks
    step "golden logits" golden
    step "memcheck" memcheck
    ;;
kernels)
    step "operations against the CPU" checks
    step "speed of operations" speed
    ;;
trace)
    step "decode" decode
    step "traces" traces
    ;;
full)
    step "operations against the CPU" checks
    step "golden logits" golden
    step "memcheck" memcheck
    step "speed of operations" speed
    step "decode" decode
    step "traces" traces
    ;;
esac
[ $failed -eq 0 ] && say "all passed" || say "something failed"
exit $failed
