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

# step NAME SECONDS COMMAND...: a part's result does not depend on that of the one before.
step() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    say "$name"
    timeout -k 5 "$limit" "$@"
    local st=$?
    [ $st -eq 124 ] && printf 'not ok - %s timed out after %d s\n' "$name" "$limit"
    [ $st -eq 0 ] || failed=1
    printf '== %s: %s (%d s)\n' "$name" "$([ $st -eq 0 ] && echo passed || echo "failed, status $st")" \
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
    out=$(timeout -k 5 60 "$tool" --tool memcheck --error-exitcode 99 "$bin" /dev/null device rows sample 2>&1)
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

smoke() {
    step "operations against the CPU" 80 "$bin" "$results" smoke
    step "golden logits" 60 "$bin" "$results" golden
}

case $PART in
smoke)
    smoke
    say "memcheck"; memcheck || failed=1
    ;;
kernels) step "operations against the CPU, and their speed" 130 "$bin" "$results" smoke bench ;;
trace) step "traces" 400 "$bin" "$results" trace ;;
full)
    smoke
    step "speed of operations" 130 "$bin" "$results" bench
    step "traces" 300 "$bin" "$results" trace
    ;;
esac
[ $failed -eq 0 ] && say "all passed" || say "something failed"
exit $failed
