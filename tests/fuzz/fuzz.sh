#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# tests/fuzz/fuzz.sh TARGET SECONDS: coverage-guided fuzzing of tests/fuzz/fuzz_TARGET.c with
# clang's libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer, on one core.
#
# Starts from tests/fuzz/corpus/TARGET and collects what it finds in $BUILD/fuzz/corpus/TARGET. With
# KEEP=1 the inputs that add coverage are merged into the stored corpus afterwards, which `make
# test` replays. A crash leaves its input in $BUILD/fuzz and ends with status 1.
set -eu
cd "$(dirname "$0")/../.."
target=${1:-} seconds=${2:-60}
if [ ! -f "tests/fuzz/fuzz_$target.c" ]; then
    echo "make fuzz TARGET=NAME SECONDS=N, with NAME one of:" >&2
    ls tests/fuzz/fuzz_*.c | sed 's,.*/fuzz_\(.*\)\.c,    \1,' >&2
    exit 2
fi
: "${CLANG:=$(command -v clang || command -v clang-14 || true)}"
[ -n "$CLANG" ] || { echo "fuzz.sh: clang is needed (Debian: clang, libclang-rt-14-dev)" >&2; exit 1; }

# make's variables (CI, DEPS, V) reach the builds below through MAKEFLAGS or the environment; what they
# set for themselves is what fuzzing needs, and folders of their own, so that the caller's build stays.
: "${BUILD:=build}"
out=$BUILD/fuzz
san='-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer'
pc="rdkafka avro-c libcurl libmicrohttpd yyjson jansson libpcre2-8 openblas libcrypto"
: "${DEPS:=${XDG_CACHE_HOME:-$HOME/.cache}/loramill}"
PKG_CONFIG_PATH=$DEPS/librdkafka/lib/pkgconfig:$DEPS/yyjson/lib/pkgconfig:${PKG_CONFIG_PATH:-}
export PKG_CONFIG_PATH

# The CPU's kernels are built plainly: no hostile byte reaches them, and clang takes minutes to
# instrument them.
in_folder() { sed "s,^\(.*\)\.c$,$1/\1.o,"; }
objects=$(ls kernels/base.c engine/*.c worker/*.c worker/*/*.c | grep -v '^worker/main\.c$' |
    in_folder "$out")
kernels=$(ls kernels/*.c kernels/cpu/*.c kernels/sim/*.c | grep -v '^kernels/base\.c$' |
    in_folder "$out/plain")
# shellcheck disable=SC2086
make --no-print-directory CUDA=0 BUILD="$out/plain" SANITIZE= $kernels
# What clang warns of besides is not held against it.
# shellcheck disable=SC2086
make --no-print-directory CC="$CLANG" CUDA=0 BUILD="$out" SANITIZE= WERROR= OPT='-O1 -g' \
    SANFLAGS="$san -fsanitize=fuzzer-no-link" $objects "$out/tests/fuzz/fuzz_$target.o"
# shellcheck disable=SC2046,SC2086
"$CLANG" $san -fsanitize=fuzzer "$out/tests/fuzz/fuzz_$target.o" $objects $kernels \
    -Wl,-rpath,"$DEPS/librdkafka/lib" $(pkg-config --libs $pc) -l:libutf8proc.a -lm -ldl -pthread \
    -o "$out/$target"

found=$out/corpus/$target stored=tests/fuzz/corpus/$target
mkdir -p "$found" "$stored"
export OPENBLAS_NUM_THREADS=1
"$out/$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=8192 \
    -print_final_stats=1 -artifact_prefix="$out/$target-" "$found" "$stored"
if [ "${KEEP:-0}" = 1 ]; then
    "$out/$target" -merge=1 "$stored" "$found"
    du -sh "$stored"
fi
