#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# What tests/run and .ci/run say of tests that fail: each fault by name just before the verdict, for
# whoever sees only the end, and with what is around it where it happened. And that a program which mostly
# waits takes nobody's place. On programs made up here.
. "$(dirname "$0")/../infra/lib.sh"
infra_begin runner
mkdir -p "$RUN"/{tests/integration,tests/unit,b/tests/unit,.ci}
cp tests/run "$RUN/tests/run"; cp .ci/run "$RUN/.ci/run"; : > "$RUN/tests/tsan.supp"

script() { { echo '#!/bin/bash'; cat; } > "$RUN/$1"; chmod +x "$RUN/$1"; }
script tests/integration/test_good.sh <<< 'seq -f "ok - %g" 3'
script tests/integration/test_early.sh <<'P'
echo "not ok - the third wheel (7)"
echo "# its detail"
seq -f "ok - %g" 200
exit 1
P
script tests/integration/test_raises.sh <<'P'
echo "ok - begun"
printf 'Traceback (most recent call last):\n  File "x.py", line 1\nKeyError: %s\n' "'soon'"
exit 1
P
script tests/integration/test_dies.sh <<< 'echo "ok - begun"; echo last words; kill -9 $$'
: > "$RUN/tests/unit/test_mocked.c"
script b/tests/unit/test_mocked <<'P'
echo '[==========] Running 2 test(s).'
echo '[       OK ] fine'
echo '[  ERROR   ] --- 0x1 != 0x2'
echo '[   LINE   ] --- tests/unit/test_mocked.c:7: error: Failure!'
echo '[  FAILED  ] broken'
echo '[  PASSED  ] 1 test(s).'
echo '[  FAILED  ] 1 test(s), listed below:'
echo '[  FAILED  ] broken'
echo ' 1 FAILED TEST(S)'
exit 1
P
names="unit integration/good integration/early integration/raises integration/dies"
(cd "$RUN" && BUILD=b JOBS=1 tests/run $names) > "$RUN/out"
check "a failed test is a failed run" [ $? = 1 ]
cat > "$RUN/expected" <<'P'
failed: unit/test_mocked: [   LINE   ] --- tests/unit/test_mocked.c:7: error: Failure!
failed: unit/test_mocked: [  FAILED  ] broken
failed: integration/early: not ok - the third wheel (7)
failed: integration/raises: KeyError: 'soon'
failed: integration/dies: status 137, after: last words
206 passed, 4 failed
P
check "its end names every fault" diff <(tail -n 6 "$RUN/out") "$RUN/expected"
check "a fault 200 lines before the end is shown with its detail" grep -q '| # its detail' "$RUN/out"
(cd "$RUN" && BUILD=b JOBS=1 tests/run integration/good) > "$RUN/out"
check "a good run ends with status 0 and no more than its verdict" [ "$?: $(tail -n 1 "$RUN/out")" = "0: 3 passed, 0 failed" ]

cat > "$RUN/Makefile" <<P
test: ; @BUILD=b JOBS=1 tests/run $names
unit: ; @BUILD=b JOBS=1 tests/run integration/good
gpu-build: ; @exit 1
P
(cd "$RUN" && .ci/run) > "$RUN/out" 2>&1
check "CI fails with it" [ $? = 1 ]
{ grep '^failed' "$RUN/expected" | sed 's/^failed/& in tests/'; echo "212 passed, 6 failed"; } > "$RUN/all"
check "and names every fault at the end of all that it did" diff <(tail -n 6 "$RUN/out") "$RUN/all"

# Three programs that end once all of them have begun; two may run at once, beside what waits.
rm "$RUN/tests/unit/test_mocked.c"
for t in one two waits; do
    echo "/* $t */" > "$RUN/tests/unit/test_$t.c"
    script "b/tests/unit/test_$t" <<P
touch began-$t
for i in \$(seq 100); do [ \$(ls began-* | wc -l) = 3 ] && echo "ok - $t" && exit; sleep 0.1; done
P
done
echo '/* Mostly waits: for the others. */' > "$RUN/tests/unit/test_waits.c"
(cd "$RUN" && BUILD=b JOBS=2 tests/run unit) > "$RUN/out"
check "what mostly waits takes nobody's place" [ "$?: $(tail -n 1 "$RUN/out")" = "0: 3 passed, 0 failed" ]

# lib.sh in a script that ends at the first fault, as tests/bench/run.sh does.
(trap - EXIT; set -e; infra_begin runner-strict; spawn "$RUN/log" true; wait)
check "a strict script whose children have ended ends with status 0" [ $? = 0 ]
