#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# ops/setup.sh PART...: installs what is missing on a Debian 12 machine, and says so. Parts:
#   build   compilers, libraries, librdkafka >= 2.12 (built from a pinned source package)
#   test    a Kafka broker, a schema registry, nginx, Python clients, clang for the fuzz targets
#   matrix  older librdkafkas and older brokers, for make test-matrix
#   bench   PyTorch, transformers and PEFT (5.6 GB), to be measured beside us
#   cuda    what engine and kernels need, and CUDA 13's compiler and libraries (0.9 GB), unless a
#           toolkit is there; needs no GPU
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
# Older ones, VERSION PACKAGE SHA256, each below $DEPS/librdkafka-VERSION. All hold the full source.
LIBRDKAFKA_OLD="
2.0.2 node-rdkafka@2.15.0 2766852839ffef5fcbc2cdedaa301a546e51928ef6f427709ddb4ed164b1afd5
2.6.1 @confluentinc/kafka-javascript@1.0.0 d939368fe4c745a7447c8970acbe85457c58c12e8aebccb7d0ac4c783d0fb052
2.12.1 @confluentinc/kafka-javascript@1.7.0 aad94f601f7457b99cc76ffcc123250f6fa92d7c2166dc65216a648a04590ca4"
YYJSON_MIN=0.10
YYJSON_PACKAGE=yyjson==4.0.6            # holds the two files of yyjson 0.10.0
YYJSON_SHA256=fcd4dc15c1e39a30bf9fa85d56903029111506860fc3080ab0d81c6c6dacaa8c
KAFKA=4.3.1
KAFKA_OLD="2.8.2 3.9.2"
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

# What a library of ours is made from and with; PREFIX/.built holds it.
recipe() { echo "$1" $LIBRDKAFKA_FLAGS; }

built() { [ "$(cat "$1/.built" 2>/dev/null)" = "$(recipe "$2")" ]; }     # PREFIX PACKAGE

# A library of ours must be this package built with these flags; a system's need only be new enough.
rdkafka_fine() {
    [ ! -d "$DEPS/librdkafka" ] || built "$DEPS/librdkafka" "$LIBRDKAFKA_PACKAGE" || return
    PKG_CONFIG_PATH=$DEPS/librdkafka/lib/pkgconfig:${PKG_CONFIG_PATH:-} \
        pkg-config --atleast-version=$LIBRDKAFKA_MIN rdkafka
}

build_librdkafka() {            # PREFIX PACKAGE SHA256
    local work=$DEPS/tmp/librdkafka.$$ prefix=$1
    rm -rf "$work"; mkdir -p "$work"; cd "$work"
    npm pack --silent "$2"
    echo "$3  $(ls ./*.tgz)" | sha256sum -c -
    tar xzf ./*.tgz package/deps/librdkafka
    cd package/deps/librdkafka
    # shellcheck disable=SC2086
    ./configure --prefix="$prefix" $LIBRDKAFKA_FLAGS
    make -C src -j"$(nproc)"
    make -C src DESTDIR="$work/stage" install
    cp LICENSES.txt "$work/stage$prefix/"
    recipe "$2" > "$work/stage$prefix/.built"
    rm -rf "$prefix"
    mv "$work/stage$prefix" "$prefix"
    rm -rf "$work"
}

# What npm packages need to become a library.
have_build_tools() { have npm npm; have g++ g++; have python3 python3; }

yyjson_fine() {
    PKG_CONFIG_PATH=$DEPS/yyjson/lib/pkgconfig:${PKG_CONFIG_PATH:-} \
        pkg-config --atleast-version=$YYJSON_MIN yyjson
}

build_yyjson() {
    local work=$DEPS/tmp/yyjson.$$ prefix=$DEPS/yyjson
    rm -rf "$work"; mkdir -p "$work/stage/include" "$work/stage/lib/pkgconfig"; cd "$work"
    python3 -m venv pip
    pip/bin/pip download -q --disable-pip-version-check --no-deps --no-binary yyjson "$YYJSON_PACKAGE"
    echo "$YYJSON_SHA256  $(ls ./*.tar.gz)" | sha256sum -c -
    tar xzf ./*.tar.gz --strip-components=1
    gcc -O2 -fPIC -c yyjson/yyjson.c
    ar rcs stage/lib/libyyjson.a yyjson.o
    cp yyjson/yyjson.h stage/include/       # the licence stands atop
    cat > stage/lib/pkgconfig/yyjson.pc <<P
Name: yyjson
Description: JSON
Version: 0.10.0
Cflags: -I$prefix/include
Libs: -L$prefix/lib -lyyjson
P
    rm -rf "$prefix"; mv stage "$prefix"
    rm -rf "$work"
}

# Engine and kernels need these, the worker some more.
ENGINE_PACKAGES="ca-certificates gcc libc6-dev make pkg-config libjansson-dev libpcre2-dev
    libopenblas-dev libutf8proc-dev libxxhash-dev libssl-dev"

part_build() {
    # shellcheck disable=SC2086
    apt $ENGINE_PACKAGES libavro-dev libcurl4-openssl-dev libmicrohttpd-dev libmimalloc-dev \
        liblz4-dev libzstd-dev zlib1g-dev jq
    if ! yyjson_fine; then
        python3 -c 'import ensurepip' 2> /dev/null || apt python3-venv
        say "yyjson: $YYJSON_MIN or newer is needed; building it below $DEPS"
        quietly "yyjson" build_yyjson
    fi
    rdkafka_fine && return
    have_build_tools
    say "librdkafka: the system has $(pkg-config --modversion rdkafka 2>/dev/null || echo none)," \
        "$LIBRDKAFKA_MIN or newer is needed; building it below $DEPS"
    quietly "librdkafka" build_librdkafka "$DEPS/librdkafka" "$LIBRDKAFKA_PACKAGE" "$LIBRDKAFKA_SHA256"
    rdkafka_fine || die "librdkafka was built but pkg-config does not find it in $DEPS/librdkafka"
}

mvn_get() { mvn -q -B "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:$1" "${@:2}"; }

dependency() { echo "<dependency><groupId>$1</groupId><artifactId>$2</artifactId><version>$3</version></dependency>"; }

# The broker and what lets it write a log: Log4j 2 since 4.0, Log4j 1 (as reload4j) before.
get_kafka() {           # VERSION
    local work=$DEPS/tmp/kafka.$$ v=$1
    rm -rf "$work"; mkdir -p "$work"; cd "$work"
    {
        echo '<project><modelVersion>4.0.0</modelVersion><groupId>test</groupId>'
        echo '<artifactId>kafka-broker</artifactId><version>1</version><packaging>pom</packaging><dependencies>'
        dependency org.apache.kafka kafka_2.13 "$v"
        case $v in
        [23].*) dependency org.slf4j slf4j-reload4j 1.7.36 ;;
        *) dependency org.apache.logging.log4j log4j-slf4j-impl 2.25.4 ;;
        esac
        echo '</dependencies></project>'
    } > pom.xml
    mvn_get copy-dependencies -DoutputDirectory=libs -DincludeScope=runtime
    ls "libs/kafka_2.13-$v.jar"
    rm -rf "$DEPS/kafka-$v"; mv "$work" "$DEPS/kafka-$v"
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
    have g++ g++
    have java openjdk-17-jre-headless
    have mvn maven
    have python3 python3
    python3 -c 'import ensurepip' 2> /dev/null || apt python3-venv
    [ -d "$DEPS/kafka-$KAFKA" ] || { say "Apache Kafka $KAFKA"; quietly "kafka" get_kafka $KAFKA; }
    [ -d "$DEPS/apicurio-$APICURIO" ] || { say "schema registry"; quietly "apicurio" get_apicurio; }
    if [ "$(cat "$DEPS/venv-test/.packages" 2>/dev/null)" != "$PY_TEST" ]; then
        say "Python clients: $PY_TEST"
        quietly "python-clients" venv test "$PY_TEST"
    fi
}

part_matrix() {
    local version package sha prefix
    have java openjdk-17-jre-headless
    have mvn maven
    while read -r version package sha; do
        prefix=$DEPS/librdkafka-$version
        [ -n "$version" ] && ! built "$prefix" "$package" || continue
        have_build_tools
        say "librdkafka $version"
        quietly "librdkafka $version" build_librdkafka "$prefix" "$package" "$sha"
    done <<< "$LIBRDKAFKA_OLD"
    for version in $KAFKA_OLD; do
        [ -d "$DEPS/kafka-$version" ] && continue
        say "Apache Kafka $version"
        quietly "kafka $version" get_kafka "$version"
    done
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
    # shellcheck disable=SC2086
    apt $ENGINE_PACKAGES
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

[ $# -gt 0 ] || die "say which parts: build, test, matrix, bench, cuda"
mkdir -p "$DEPS/tmp" 
exec 9> "$DEPS/lock"
flock -n 9 || { say "another setup is running; waiting for it"; flock 9; }
for part in "$@"; do
    case $part in
    build|test|matrix|bench|cuda) "part_$part" ;;
    *) die "no part '$part'; use build, test, matrix, bench or cuda" ;;
    esac
done
