#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# ops/setup.sh PART...: installs what is missing on a Debian 12 machine, and says so. Parts:
#   build   compilers, libraries, librdkafka >= 2.12 (built from a pinned source package)
#   test    a Kafka broker, a schema registry, nginx, Python clients, clang for the fuzz targets
#   bench   PyTorch, transformers and PEFT (5.6 GB), to be measured beside us
#   cuda    CUDA 13's compiler and libraries (0.9 GB), unless a toolkit is there; needs no GPU
#
# What Debian packages comes from Debian; the rest goes below $DEPS, each in a folder of its own
# that appears by one rename when it is complete, so an interrupted run is simply run again.
# Nothing is downloaded twice, and a complete machine costs well under a second.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${DEPS:=${XDG_CACHE_HOME:-$HOME/.cache}/loramill}"

LIBRDKAFKA_MIN=2.12
LIBRDKAFKA_PACKAGE=@confluentinc/kafka-javascript@1.10.1      # holds librdkafka 2.15.1 in full
LIBRDKAFKA_SHA256=ada7d703bb1d3237e2292bfabf438d663b6160c9f1ac2a2406b5dc4257c81b66
# pthreads instead of C11 threads: gcc 12's ThreadSanitizer does not know thrd_create().
LIBRDKAFKA_FLAGS="--disable-gssapi --disable-c11threads --enable-ssl --enable-curl --enable-zstd
    --enable-lz4-ext --enable-zlib"
LIBRDKAFKA_BUILD="$LIBRDKAFKA_PACKAGE "$(echo $LIBRDKAFKA_FLAGS)
KAFKA=4.3.1
APICURIO=2.6.13.Final
PY_TEST="confluent-kafka[avro,schemaregistry]==2.12.2 xxhash==4.1.0"
PY_CUDA="cuda-toolkit[nvcc,cudart,cublas,cccl,crt,nvvm,nvtx]==13.0.2"
PY_BENCH="torch==2.15.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0 numpy==2.4.6"

say() { printf '== %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# Runs a long command with its output in a log; shows a dot every few seconds and the end on failure.
quietly() {
    local what=$1 log=$DEPS/log/${1//[^A-Za-z0-9]/-}.log start=$SECONDS
    shift
    mkdir -p "$DEPS/log"
    printf '   %s ' "$what"
    "$@" > "$log" 2>&1 &
    local pid=$!
    while kill -0 $pid 2>/dev/null; do printf '.'; sleep 2; done
    if wait $pid; then
        printf ' done (%d s)\n' $((SECONDS - start))
    else
        printf ' FAILED\n'; tail -n 25 "$log" >&2; die "$what failed; the whole log is $log"
    fi
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else
        command -v sudo > /dev/null || die "not root and no sudo: run as root: $*"
        sudo "$@"
    fi
}

# apt PACKAGE...: installs those that are missing.
apt() {
    local p missing=()
    for p in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
    done
    [ ${#missing[@]} -eq 0 ] && return
    command -v apt-get > /dev/null || die "not a Debian system; please install: ${missing[*]}"
    say "Debian packages: ${missing[*]}"
    quietly "package lists" as_root apt-get update -q
    quietly "packages" as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -q -y --no-install-recommends "${missing[@]}"
}

# have COMMAND PACKAGE: the command if it is there (from wherever), else Debian's package.
have() { command -v "$1" > /dev/null || apt "$2"; }

# A library of ours must be this package built with these flags; a system's need only be new enough.
rdkafka_fine() {
    local mark=$DEPS/librdkafka/.built
    [ ! -d "$DEPS/librdkafka" ] || [ "$(cat "$mark" 2>/dev/null)" = "$LIBRDKAFKA_BUILD" ] || return
    PKG_CONFIG_PATH=$DEPS/librdkafka/lib/pkgconfig:${PKG_CONFIG_PATH:-} \
        pkg-config --atleast-version=$LIBRDKAFKA_MIN rdkafka
}

build_librdkafka() {
    local work=$DEPS/tmp/librdkafka.$$ prefix=$DEPS/librdkafka
    rm -rf "$work"; mkdir -p "$work"; cd "$work"
    npm pack --silent "$LIBRDKAFKA_PACKAGE"
    echo "$LIBRDKAFKA_SHA256  $(ls ./*.tgz)" | sha256sum -c -
    tar xzf ./*.tgz package/deps/librdkafka
    cd package/deps/librdkafka
    # shellcheck disable=SC2086
    ./configure --prefix="$prefix" $LIBRDKAFKA_FLAGS
    make -C src -j"$(nproc)"
    make -C src DESTDIR="$work/stage" install
    cp LICENSES.txt "$work/stage$prefix/"
    echo "$LIBRDKAFKA_BUILD" > "$work/stage$prefix/.built"
    rm -rf "$prefix"
    mv "$work/stage$prefix" "$prefix"
    rm -rf "$work"
}

part_build() {
    apt ca-certificates gcc libc6-dev make pkg-config libavro-dev libcurl4-openssl-dev \
        libjansson-dev libpcre2-dev libopenblas-dev libutf8proc-dev libmicrohttpd-dev \
        libxxhash-dev libssl-dev liblz4-dev libzstd-dev zlib1g-dev jq
    rdkafka_fine && return
    have npm npm
    have g++ g++
    have python3 python3
    say "librdkafka: the system has $(pkg-config --modversion rdkafka 2>/dev/null || echo none)," \
        "$LIBRDKAFKA_MIN or newer is needed; building it below $DEPS"
    quietly "librdkafka" build_librdkafka
    rdkafka_fine || die "librdkafka was built but pkg-config does not find it in $DEPS/librdkafka"
}

mvn_get() { mvn -q -B "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:$1" "${@:2}"; }

get_kafka() {
    local work=$DEPS/tmp/kafka.$$
    rm -rf "$work"; mkdir -p "$work"; cd "$work"
    cat > pom.xml <<P
<project><modelVersion>4.0.0</modelVersion><groupId>test</groupId><artifactId>kafka-broker</artifactId>
<version>1</version><packaging>pom</packaging><dependencies>
<dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>$KAFKA</version></dependency>
<dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId><version>2.25.4</version></dependency>
</dependencies></project>
P
    mvn_get copy-dependencies -DoutputDirectory=libs -DincludeScope=runtime
    ls libs/kafka_2.13-$KAFKA.jar
    rm -rf "$DEPS/kafka-$KAFKA"; mv "$work" "$DEPS/kafka-$KAFKA"
}

get_apicurio() {
    local work=$DEPS/tmp/apicurio.$$
    rm -rf "$work"; mkdir -p "$work/app"; cd "$work"
    mvn_get copy "-Dartifact=io.apicurio:apicurio-registry-app:$APICURIO:tar.gz:all" -DoutputDirectory=dl
    tar xzf dl/*.tar.gz -C app
    rm -rf dl
    ls app/apicurio-registry-app-$APICURIO-runner.jar
    rm -rf "$DEPS/apicurio-$APICURIO"; mv "$work" "$DEPS/apicurio-$APICURIO"
}

# venv NAME PACKAGES: a virtual environment, remade when its list of packages changes.
venv() {
    local dir=$DEPS/venv-$1
    [ "$(cat "$dir/.packages" 2>/dev/null)" = "$2" ] && return
    rm -rf "$dir"
    python3 -m venv "$dir"
    # shellcheck disable=SC2086
    "$dir/bin/pip" install -q --disable-pip-version-check $2
    echo "$2" > "$dir/.packages"
}

part_test() {
    apt libcmocka-dev nginx-light curl kcat clang-14 libclang-rt-14-dev
    have java openjdk-17-jre-headless
    have mvn maven
    have python3 python3
    python3 -c 'import ensurepip' 2> /dev/null || apt python3-venv
    [ -d "$DEPS/kafka-$KAFKA" ] || { say "Apache Kafka $KAFKA"; quietly "kafka" get_kafka; }
    [ -d "$DEPS/apicurio-$APICURIO" ] || { say "schema registry"; quietly "apicurio" get_apicurio; }
    if [ "$(cat "$DEPS/venv-test/.packages" 2>/dev/null)" != "$PY_TEST" ]; then
        say "Python clients: $PY_TEST"
        quietly "python-clients" venv test "$PY_TEST"
    fi
}

part_bench() {
    have python3 python3
    python3 -c 'import ensurepip' 2> /dev/null || apt python3-venv
    if [ "$(cat "$DEPS/venv-bench/.packages" 2>/dev/null)" != "$PY_BENCH" ]; then
        say "the peer to measure against (5.6 GB): $PY_BENCH"
        quietly "python-peers" venv bench "$PY_BENCH"
    fi
}

part_cuda() {
    have g++ g++
    [ -x /usr/local/cuda/bin/nvcc ] && return
    command -v nvcc > /dev/null && return
    have python3 python3
    python3 -c 'import ensurepip' 2> /dev/null || apt python3-venv
    if [ "$(cat "$DEPS/venv-cuda/.packages" 2>/dev/null)" != "$PY_CUDA" ]; then
        say "CUDA's compiler and libraries (0.9 GB): $PY_CUDA"
        quietly "cuda" venv cuda "$PY_CUDA"
    fi
}

[ $# -gt 0 ] || die "say which parts: build, test, bench, cuda"
mkdir -p "$DEPS/tmp" 
exec 9> "$DEPS/lock"
flock -n 9 || { say "another setup is running; waiting for it"; flock 9; }
for part in "$@"; do
    case $part in
    build|test|bench|cuda) "part_$part" ;;
    *) die "no part '$part'; use build, test, bench or cuda" ;;
    esac
done
