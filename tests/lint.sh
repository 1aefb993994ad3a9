#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# tests/lint.sh - the rules of the house that a compiler does not check. One TAP line a rule;
# exit 1 when one is broken. Sizes are budgets from measurement in well-kept C projects.
set -u
shopt -s lastpipe                       # rule() is the end of a pipe, and its status counts
cd "$(dirname "$0")/.."
status=0

# rule WHAT: reads offences from standard input; none is a pass.
rule() {
    local found
    found=$(cat)
    if [ -z "$found" ]; then
        echo "ok - $1"
    else
        echo "not ok - $1"
        printf '%s\n' "$found" | sed 's/^/    /'
        status=1
    fi
}

c_files() { git ls-files -co --exclude-standard -- "$@" | grep -E '\.(c|h|cu|cuh)$'; }
# Lines of code without comments, as FILE:LINE:TEXT, so that prose may name a banned thing.
code() {
    c_files "$@" | while read -r f; do
        [ -f "$f" ] || continue
        awk -v F="$f" '
        {
            line = $0; out = ""
            while (length(line)) {
                if (inside) {
                    e = index(line, "*/")
                    if (!e) { line = ""; break }
                    line = substr(line, e + 2); inside = 0
                } else {
                    s = index(line, "/*")
                    if (!s) { out = out line; break }
                    out = out substr(line, 1, s - 1); line = substr(line, s + 2); inside = 1
                }
            }
            if (out ~ /[^ \t]/) print F ":" NR ":" out
        }' "$f"
    done
}

code kernels | grep -E '#include "(engine|worker)/' | rule "kernels include nothing above them"
code engine | grep -E '#include "worker/' | rule "the engine does not include the worker"
code engine | grep -E '#include "kernels/' | grep -vE 'kernels/(kernels|base)\.h"' |
    rule "the engine sees kernels/kernels.h only"
code worker | grep -E '#include "(engine|kernels)/' |
    grep -vE '"(engine/engine|kernels/base)\.h"' | rule "the worker sees engine/engine.h only"
code kernels engine worker | grep -vE '^worker/(main\.c:|tools/)' | grep '#include "worker/tools/' |
    rule "only main.c includes worker/tools"
code worker/codec worker/store | grep -E '#include ("worker/|<librdkafka)' |
    grep -vE '^worker/(codec|store)/[^:]*:.*"worker/(\1/|(log|resolver|url|url_template)\.h")' |
    rule "codec and store know neither each other nor jobs, Kafka, configuration, tools"
code engine kernels | grep -E '#include <(librdkafka|avro|curl|microhttpd)' |
    rule "no Kafka, Avro or HTTP below the worker"
code engine worker | grep -E '#include [<"](cuda|cublas|nccl)' | rule "no CUDA above the kernels"
git ls-files -co --exclude-standard | grep -E '\.cu(h)?$' | grep -v '^kernels/cuda/' |
    rule "CUDA C++ only in kernels/cuda"
code kernels engine worker |
    grep -wE '(sprintf|vsprintf|strcpy|strcat|strtok|atoi|atol|atof|gmtime|localtime|alloca|gets)' |
    grep -E '(sprintf|vsprintf|strcpy|strcat|strtok|atoi|atol|atof|gmtime|localtime|alloca|gets)\(' |
    rule "no function that cannot be used safely"
code kernels engine worker | grep -v '^worker/main.c:' | grep -E '[^_a-z](exit|abort)\(' |
    grep -vE '_exit\(' | rule "no exit() or abort() outside main"
code kernels engine worker | grep -v '^worker/config\.c:' | grep -E 'getenv\(' |
    rule "no getenv() outside the configuration"
c_files kernels engine worker tests | xargs -r grep -L 'SPDX-License-Identifier: Apache-2.0' |
    rule "every source file has its licence line"
c_files kernels engine worker tests | xargs -r awk 'length($0) > 100 { print FILENAME ":" FNR }' |
    rule "at most 100 columns"
c_files kernels engine worker | xargs -r wc -l | awk '$1 > 1000 && $2 != "total"' |
    rule "at most 1,000 lines a file"
c_files kernels engine worker | grep '\.c$' | xargs -r awk '
    FNR == 1 { start = 0 }
    /^\{/ { start = FNR }
    /^\}/ { if (start && FNR - start > 120) print FILENAME ":" start ": " FNR - start " lines"; start = 0 }' |
    rule "at most 120 lines a function"
git ls-files -co --exclude-standard | grep -vE '^(LICENSE|shared/|tests/lint.sh)' |
    grep -E '\.(c|h|cu|sh|py|md|avsc|properties|json|yml|yaml)$|Makefile|run$' | grep -v '^tests/\(models\|fixtures\)/.*json$' |
    xargs -r grep -nE '/work/|registry\.npmjs|files\.pythonhosted|repo1?\.maven' /dev/null |
    rule "no machine paths and no registry hosts"

if [ -x "${BUILD:=build}/loramill" ]; then
    for kind in markdown:docs/configuration.md sample:ops/loramill.properties; do
        "$BUILD/loramill" worker "--help-${kind%%:*}" 2> /dev/null | diff -q - "${kind#*:}" 2>&1
    done | rule "docs/configuration.md and the sample file are what the property table says"
fi
exit $status
