#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# `make bench`: CPU figures beside transformers + PEFT on the same machine in the same run, engine
# overhead a step with 256 sequences, and messages a second through a real broker with the model's
# work replaced by an echo, beside a minimal client loop. One JSON line a figure on standard output,
# progress on standard error.
#   BENCH=storefront,shape,host,kafka   which parts (default: these). Also `cost`: the CPU of a worker a
#                                       message, or with COST=instructions its instructions
#   KAFKA_N=50000 KAFKA_ROUNDS=5        prompts a round and rounds (odd) of the last part
#   TEXT=x                              its prompts, and those of `cost`, are one letter 920 times, not words
set -euo pipefail
. "$(dirname "$0")/../infra/lib.sh"
: "${BENCH:=storefront,shape,host,kafka}"
infra_begin bench
PEER=$DEPS/venv-bench/bin/python

part() { [[ ,$BENCH, == *",$1,"* ]]; }
say() { echo "== $*" >&2; }

# compare PREFIX MODEL ADAPTERS BATCH PROMPT TOKENS REPEAT DTYPE
compare() {
    say "$1: loramill"
    "$LORAMILL" bench --backend cpu --model "$2" --adapters "$3" --batch "$4" --prompt-tokens "$5" \
        --tokens "$6" --repeat "$7" > "$RUN/ours" 2> "$RUN/ours.log" || { cat "$RUN/ours.log" >&2; exit 1; }
    say "$1: transformers + PEFT ($8)"
    HF_HUB_OFFLINE=1 "$PEER" tests/bench/peer.py "$2" "$3" "$4" "$5" "$6" "$7" "$8" \
        > "$RUN/peer" 2> "$RUN/peer.log" || { tail -5 "$RUN/peer.log" >&2; exit 1; }
    "$PYTHON" tests/bench/ratios.py "$1" "$RUN/ours" "$RUN/peer"
}

if part storefront; then
    compare storefront tests/models/storefront tests/models/storefront-adapters 32 32 64 3 float32
fi
if part shape; then
    shape=$DEPS/bench/llama-3.2-1b
    "$PEER" tests/bench/make_shape.py llama-3.2-1b "$shape" "$shape-adapters" 32
    compare llama-3.2-1b "$shape" "$shape-adapters" 32 32 16 2 bfloat16
fi
if part host; then
    say "engine overhead with 256 sequences"
    "$LORAMILL" bench --backend cpu --model tests/models/storefront \
        --adapters tests/models/storefront-adapters --batch 256 --prompt-tokens 8 --tokens 32 \
        --repeat 3 2> /dev/null | jq -c 'select(.name == "decode_adapters_host") |
        .name = "engine_overhead_256_sequences"'
fi
if part kafka; then
    say "messages a second through Kafka, beside a minimal client loop; echo instead of a model"
    make -s BUILD="$BUILD" "$BUILD/tests/bench/kafka_loop" >&2
    kafka_start 1
    registry_start
    "$PYTHON" tests/bench/kafka_ratio.py "$BOOTSTRAP" "$REGISTRY" "$LORAMILL" \
        "$BUILD/tests/bench/kafka_loop" "$RUN" "${KAFKA_N:-50000}"
    BOOTSTRAP=          # figures, not messages to be held against schemas/
fi
if part cost; then
    say "what a message costs a worker, beside a minimal client loop; embedded broker, echo"
    make -s BUILD="$BUILD" "$BUILD/tests/bench/kafka_loop" >&2
    "$PYTHON" tests/bench/worker_cost.py "$LORAMILL" "$BUILD/tests/bench/kafka_loop" "$RUN/cost" \
        "${KAFKA_N:-20000}"
fi
