#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# The demo that newcomers run: its closing line is counted from the topics, and nothing outlives it.
. "$(dirname "$0")/../infra/lib.sh"
infra_begin demo
ops/demo.sh > "$RUN/out" 2>&1
check "the demo ends with status 0 (got $?)" [ $? -eq 0 ]
last=$(tail -n 1 "$RUN/out")
check "every order answered, every bad prompt dead-lettered: '$last'" \
    [ "$last" = "demo: 1000 answered, 6 dead-lettered, 0 lost" ]
voices() { [ "$(grep -cE '^  \| ' "$RUN/out")" -gt 8 ] && grep -q 'CAPTAIN-SAL' "$RUN/out"; }
check "six voices stand side by side" voices
check "no process of the demo is left" [ -z "$(pgrep -f "$BUILD/demo/loramill.properties")" ]
[ $FAILED -eq 0 ] || cat "$RUN/out"
