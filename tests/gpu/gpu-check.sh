#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# tests/gpu/gpu-check.sh: proves and measures the CUDA backend on this machine's GPU.
#   PART=smoke     every operation against the CPU's, golden logits; memcheck    (at most 90 s)
#   PART=kernels   the same operations at all sizes, then their speed            (2 min)
#   PART=start     seconds to the first token; loading a checkpoint              (90 s)
#   PART=trace     decode steps, idle adapters, end-to-end traces                (8 min)
#   PART=full      all of them                                                   (9 min)
#   STEPS='a b'    only these steps of the part: checks golden memcheck memcheck-few speed
#                  first-token load decode idle traces more-traces
#   TRACES='a b'   only these traces, as patterns: 7b-* 7b-1000-mixed 8b-32 (see traces() below)
#   BUDGET=N       seconds; what would not be done by then is left out, and said to be
#   RESULTS=DIR    one JSON line a figure goes to DIR/gpu-check.jsonl (default: build)
#
# Runs the prebuilt build/gpu/gpu-check if it is there, else builds it. Each part prints its lines
# even if a later one fails; what matters most comes first. In the end tests/gpu/goals.py holds the
# figures of this run, how long the parts took among them, against their goals: a missed one neither
# stops nor hides anything. Exit status: 0 all that ran is well and every goal that can be judged here
# is reached, 1 a part failed, 2 no GPU or nothing to run, 3 nothing failed, but goals were missed.
set -u
export LC_ALL=C                 # numbers have a point
cd "$(dirname "$0")/../.."
: "${PART:=smoke}" "${RESULTS:=build}" "${STEPS:=}" "${TRACES:=*}"
bin=build/gpu/gpu-check
failed=0
left_out=()                     # names of what the budget had no time for
declare -A took                 # seconds, by a step's short name
matched=0
asked=0
picked=0
ran=0
sanitizer=                      # compute-sanitizer, once it is known to work here

say() { printf '== %s\n' "$*"; }
die() { printf 'gpu-check: %s\n' "$*" >&2; exit 2; }

case $PART in
smoke) : "${BUDGET:=90}" ;;
kernels) : "${BUDGET:=120}" ;;
start) : "${BUDGET:=90}" ;;
trace) : "${BUDGET:=480}" ;;
full) : "${BUDGET:=540}" ;;
*) die "no part '$PART'; use smoke, kernels, start, trace or full" ;;
esac
[ -e /dev/nvidiactl ] || [ -e /dev/dxg ] || command -v nvidia-smi > /dev/null ||
    die "this machine has no NVIDIA GPU (no /dev/nvidiactl, no nvidia-smi); nothing was checked"
mkdir -p "$RESULTS" || die "cannot make $RESULTS"
results=$RESULTS/gpu-check.jsonl
first=$(cat "$results" 2> /dev/null | wc -l)    # lines of runs before this one
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

SECONDS=0
# within LIMIT: that many seconds, or what is left of the budget; never 0, which is no limit at all.
within() {
    local left=$((BUDGET - SECONDS))
    [ $left -gt 0 ] || left=1
    echo $(($1 < left ? $1 : left))
}

# step SHORT NAME FUNCTION: a step's result does not depend on that of the one before.
step() {
    local start=$EPOCHREALTIME st
    [ -z "$STEPS" ] || [[ " $STEPS " == *" $1 "* ]] || return
    matched=1
    say "$2"
    if [ "$(within 10)" -lt 10 ]; then
        left_out+=("$2")
        printf '== %s: not run, the budget of %d s is spent\n' "$2" "$BUDGET"
        return
    fi
    "$3"
    st=$?
    [ $st -eq 124 ] && printf 'not ok - %s timed out\n' "$2"
    [ $st -eq 0 ] || failed=1
    took[$1]=$(awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }')
    printf '== %s: %s (%s s)\n' "$2" "$([ $st -eq 0 ] && echo passed || echo "failed, status $st")" \
        "${took[$1]}"
}

# took_in_all PART LIMIT SECONDS
took_in_all() {
    printf '{"run": "gpu-check", "name": "seconds_%s", "value": %s, "unit": "s", "goal": %s}\n' \
        "$1" "$3" "$2" | tee -a "$results"
}

# seconds PART LIMIT STEP...: how long these steps took, if all of them ran.
seconds() {
    local part=$1 limit=$2 sum=0 s
    shift 2
    for s; do
        [ -n "${took[$s]:-}" ] || return 0
        sum=$(awk -v a="$sum" -v b="${took[$s]}" 'BEGIN { printf "%.1f", a + b }')
    done
    took_in_all "$part" "$limit" "$sum"
}

memcheck() {
    local tool
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
    if [ -z "$tool" ]; then
        echo "memcheck was not run: no compute-sanitizer here"
        return
    fi
    local out limit
    limit=$(within 60)
    out=$(timeout -k 5 "$limit" "$tool" --tool memcheck --report-api-errors no \
        --error-exitcode 99 "$bin" /dev/null device rows sample 2>&1)
    local st=$?
    if printf '%s' "$out" | grep -q 'Device not supported'; then
        echo "memcheck was not run: compute-sanitizer does not accept this device"
    elif [ $st -eq 124 ]; then
        printf '%s\n' "$out" | grep -E '^not ok|=========|^ok.*cases' | tail -n 15
        echo "memcheck was not finished in $limit s: what follows the lines above was not run"
        [ "$limit" -lt 60 ] || return 1
        left_out+=("memcheck, in part")
    else
        printf '%s\n' "$out" | grep -E '^not ok|=========|passed' | tail -n 15
        [ $st -ne 0 ] || sanitizer=$tool
        return $st
    fi
}

# Kernels that take the tool long: what it does in some seconds, and a line about the rest.
memcheck_few() {
    local out st limit
    if [ -z "$sanitizer" ]; then
        echo "memcheck of attention, LoRA and products was not run: nor was that before it"
        return
    fi
    limit=$(within 15)
    out=$(timeout -k 5 "$limit" "$sanitizer" --tool memcheck --report-api-errors no --error-exitcode 99 \
        "$bin" /dev/null few 2>&1)
    st=$?
    printf '%s\n' "$out" | grep -E '^not ok|^ok.*cases|=========|passed' | tail -n 15
    [ $st -eq 124 ] || return $st
    echo "memcheck was stopped after $limit s: of attention, LoRA and products only what stands above"
    ! printf '%s\n' "$out" | grep -qE '^not ok|========= Invalid'
}

# bench LIMIT LABEL ARGUMENTS...: `loramill bench` on the GPU; its JSON lines go to the results too.
# Sets `ran`: 0 where the budget has no time for it, which is no failure.
bench() {
    local limit label=$2 out st
    ran=0
    limit=$(within "$1")
    if [ "$limit" -lt $(($1 / 3)) ]; then
        left_out+=("$label")
        printf '# %s: not run, of the budget of %d s %d are left\n' "$label" "$BUDGET" "$limit"
        return 0
    fi
    shift 2
    ran=1
    out=$(timeout -k 5 "$limit" "$bin" loramill bench --backend cuda "$@" 2> "$RESULTS/gpu-check.err")
    st=$?
    if [ $st -ne 0 ]; then
        printf 'not ok - %s: status %d: %s\n' "$label" $st "$(tail -n 1 "$RESULTS/gpu-check.err")"
        return 1
    fi
    printf '%s\n' "$out" | grep '^{' | sed "s/^{/{\"run\": \"$label\", /" | tee -a "$results"
}

# What the engine says about its start.
opening() { grep -E 'engine: (opening|opened|weights):? ' "$RESULTS/gpu-check.err" | sed 's/^[^ ]* *INFO *engine: /# /'; }

# The second of two starts finds program and libraries in memory, as the first does where other steps
# have run.
first_token() {
    local st=0 shape again=llama-2-7b
    [ "$PART" != full ] || again=
    for shape in llama-2-7b $again llama-3.1-8b; do
        bench 30 "first token, $shape" --load-format dummy --shape ops/shapes/$shape.json --start \
            --max-step-tokens 4096 || st=1
        [ $ran -eq 0 ] || opening
    done
    return $st
}

# ratio LABEL SECONDS_READING BYTES: the last start beside the reading of its bytes.
ratio() {
    local token
    token=$(grep -F "\"run\": \"$1\"" "$results" | grep start_to_first_token | tail -n 1 |
        sed 's/.*"value": \([0-9.e+-]*\).*/\1/')
    [ -n "$token" ] || return 1
    awk -v l="$1" -v t="$token" -v r="$2" -v b="$3" 'BEGIN {
        printf "{\"run\": \"%s\", \"name\": \"first_token_over_reading\", \"value\": %.3f, ", l, t / r
        printf "\"unit\": \"x\", \"reading_s\": %.3f, \"reading_gb_per_s\": %.2f}\n", r, b / r / 1e9 }' |
        tee -a "$results"
}

# loading LABEL DIR SECONDS_READING BYTES
loading() {
    bench 60 "$1" --model "$2" --start --max-step-tokens 4096 || return 1
    [ $ran -eq 1 ] || return 0
    opening
    ratio "$1" "$3" "$4"
}

# A checkpoint of llama-2-7b's size: from the page cache, and from the disk if there is time.
load() {
    local dir threads st=0 one many bytes s0=$SECONDS
    threads=$(nproc)
    threads=$((threads < 16 ? threads : 16))
    dir=$(mktemp -d "${TMPDIR:-/tmp}/gpu-check.XXXXXX") || return 1
    # shellcheck disable=SC2064
    trap "rm -rf '$dir'" EXIT
    cp tests/models/spm-tiny/tokenizer*.json "$dir"
    if ! timeout "$(within 60)" "$bin" files make ops/shapes/llama-2-7b.json "$dir"; then
        rm -rf "$dir"
        return 1
    fi
    echo "# written in $((SECONDS - s0)) s"
    timeout "$(within 60)" "$bin" files read "$dir" "$threads" > /dev/null
    read -r one bytes < <(timeout "$(within 60)" "$bin" files read "$dir" 1)
    read -r many bytes < <(timeout "$(within 60)" "$bin" files read "$dir" "$threads")
    if [ -n "${many:-}" ]; then
        echo "# read from the page cache in $one s by one thread, $many s by $threads"
        loading "load llama-2-7b from the page cache" "$dir" "$many" "$bytes" || st=1
        [ "$PART" = full ] ||
            loading "load llama-2-7b from the page cache, again" "$dir" "$many" "$bytes" || st=1
    else
        st=1
    fi
    s0=$SECONDS
    if timeout "$(within 20)" "$bin" files drop "$dir"; then
        read -r many bytes < <(timeout "$(within 30)" "$bin" files read "$dir" "$threads")
        if [ -n "${many:-}" ] && "$bin" files drop "$dir" && [ "$(within 60)" -gt 30 ]; then
            echo "# read from the disk in $many s"
            loading "load llama-2-7b from the disk" "$dir" "$many" "$bytes" || st=1
        else
            echo "# not measured from the disk: reading alone took more than there was time for"
        fi
    else
        echo "# not measured from the disk: writing takes too long"
    fi
    rm -rf "$dir"
    return $st
}

# Each run has a batch of 1 among its figures, too. Of 129 tokens the first comes with the prompt, so
# a step's figure is the mean of 128; steps have room for 256 prompts of 32, so all start together.
# shellcheck disable=SC2086
decode() {
    local b st=0 shape=llama-2-7b
    local ask='--prompt-tokens 32 --tokens 129 --max-step-tokens 8192'
    for b in 32 256; do
        bench 60 "decode $shape, batch $b" --load-format dummy --shape ops/shapes/$shape.json \
            $ask --batch $b --repeat 2 || st=1
    done
    bench 60 "decode $shape, batch 256, weights in float16" --load-format dummy \
        --shape ops/shapes/$shape.json $ask --batch 256 --repeat 1 \
        --weights-dtype stored || st=1
    for b in 32 256; do
        bench 60 "decode $shape, batch $b, weights in fp8" --load-format dummy \
            --shape ops/shapes/$shape.json $ask --batch $b --repeat 1 \
            --weights-dtype fp8 || st=1
    done
    bench 60 "decode $shape, batch 256, weights in fp8-dynamic" --load-format dummy \
        --shape ops/shapes/$shape.json $ask --batch 256 --repeat 1 \
        --weights-dtype fp8-dynamic || st=1
    shape=llama-3.1-8b
    bench 60 "decode $shape, batch 32, 32 adapters" --load-format dummy \
        --shape ops/shapes/$shape.json $ask --batch 32 --dummy 32 \
        --repeat 2 || st=1
    return $st
}

# What 100 adapters in the pool cost a batch that uses none of them. At 32 rows Hopper has no product
# that is tuned, so two engines have the same kernels.
idle() {
    bench 45 'idle adapters, llama-2-7b' --load-format dummy --shape ops/shapes/llama-2-7b.json \
        --idle --dummy 100 --batch 32 --prompt-tokens 32 --tokens 64 --repeat 8 --pool-bytes 8G \
        --swap-bytes 0 --no-prefix-cache --host-adapter-bytes 16G --max-step-tokens 2048
}

# trace NAME SHAPE ADAPTERS RANKS [OPTION...]: 1,000 requests at once, 256 running unless an option
# says otherwise; weights in bf16 likewise. The name is what TRACES picks by.
trace() {
    local name=$1 shape=$2 adapters=$3 ranks=$4 file pattern mine=
    shift 4
    asked=1
    set -f
    for pattern in $TRACES; do
        # shellcheck disable=SC2254
        case $name in $pattern) mine=1 ;; esac
    done
    set +f
    [ -n "$mine" ] || return 0
    picked=1
    file=$RESULTS/trace-$adapters-$ranks.csv
    python3 tests/gpu/make_trace.py "$adapters" "$ranks" > "$file" || return 1
    local what="trace $shape, $adapters adapters of rank $ranks${*:+, $*}"
    bench 120 "$what" --load-format dummy \
        --shape "ops/shapes/$shape.json" --trace "$file" --max-seqs 256 --max-step-tokens 4096 \
        --no-prefix-cache --json --host-adapter-bytes 200000000000 "$@"
}

traces() {
    local st=0
    trace 7b-0 llama-2-7b 0 8 || st=1
    trace 7b-100-mixed llama-2-7b 100 8,16,32,64 || st=1
    trace 7b-1000-mixed llama-2-7b 1000 8,16,32,64 || st=1
    trace 7b-32 llama-2-7b 32 8 || st=1
    trace 7b-100 llama-2-7b 100 8 || st=1
    trace 8b-0 llama-3.1-8b 0 8 || st=1
    trace 8b-32 llama-3.1-8b 32 8 || st=1
    trace 8b-100 llama-3.1-8b 100 8 || st=1
    return $st
}

# Without the limit of 256 running, and with FP8.
more_traces() {
    local st=0
    trace 7b-0-kv8 llama-2-7b 0 8 --kv-dtype fp8 || st=1
    trace 7b-0-all llama-2-7b 0 8 --max-seqs 1000 || st=1
    trace 7b-0-kv8-all llama-2-7b 0 8 --kv-dtype fp8 --max-seqs 1000 || st=1
    trace 7b-0-w8x8 llama-2-7b 0 8 --weights-dtype fp8-dynamic || st=1
    trace 7b-0-w8 llama-2-7b 0 8 --weights-dtype fp8 || st=1
    return $st
}

speed() { timeout -k 5 "$(within 130)" "$bin" "$results" bench; }
checks() { timeout -k 5 "$(within 80)" "$bin" "$results" smoke; }
golden() { timeout -k 5 "$(within 70)" "$bin" "$results" golden graph company; }

part_checks() { step checks "operations against the CPU" checks; }
part_golden() { step golden "golden logits" golden; }
part_memcheck() { step memcheck "memcheck" memcheck; }
part_few() { step memcheck-few "memcheck of attention, LoRA and products" memcheck_few; }
part_speed() { step speed "speed of operations" speed; }
part_first() { step first-token "first token" first_token; }
part_load() { step load "loading" load; }
part_decode() { step decode "decode" decode; }
part_idle() { step idle "idle adapters" idle; }
part_traces() { step traces "traces" traces; }
part_more() { step more-traces "traces without the limit of 256, and with FP8" more_traces; }

case $PART in
smoke) order="checks golden memcheck few" ;;
kernels) order="checks speed" ;;
start) order="first load" ;;
trace) order="traces decode idle more" ;;
full) order="checks golden first traces decode idle load speed memcheck more few" ;;
esac
for part in $order; do
    "part_$part"
done
case $PART in
smoke | full)
    # shellcheck disable=SC2086
    seconds smoke 90 checks golden memcheck ${took[memcheck-few]:+memcheck-few} ;;&
kernels | full) seconds kernels 120 checks speed ;;&
full) [ -n "$STEPS" ] || took_in_all full 540 $SECONDS ;;
esac
[ $matched -eq 1 ] || die "part $PART has none of the steps '$STEPS'; nothing was checked"
[ $asked -eq $picked ] || die "no trace is called '$TRACES'"
if [ ${#left_out[@]} -gt 0 ]; then
    printf '{"run": "gpu-check", "name": "left_out", "what": "%s"}\n' \
        "$(printf '%s; ' "${left_out[@]}" | sed 's/; $//')" >> "$results"
fi

say "goals"
whole=
[ "$PART" != full ] || [ -n "$STEPS" ] || [ "$TRACES" != '*' ] || whole=full
python3 tests/gpu/goals.py "$results" "$first" $whole
goals=$?
[ ${#left_out[@]} -eq 0 ] || say "some was left out: the budget of $BUDGET s was too short for it"
if [ $failed -ne 0 ] || { [ $goals -ne 0 ] && [ $goals -ne 3 ]; }; then
    say "something failed"
    exit 1
elif [ $goals -eq 3 ]; then
    say "nothing failed, but goals were missed"
else
    say "all passed"
fi
exit $goals
