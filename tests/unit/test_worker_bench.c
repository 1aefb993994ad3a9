/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_bench.c - traces are read or refused by line; a replay in simulated time keeps its
 * books: every request has an outcome, times add up, the store's latency and the host budget act.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "worker/tools/cmd_bench.h"
#include "worker/tools/commands.h"

#define HEADER "id,arrival,adapter,rank,prompt_len,output_len\n"

static char path[] = "/tmp/test_worker_bench.XXXXXX";

static void write_trace(const char *text)
{
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0);
    assert_int_equal(fclose(f), 0);
}

/* bench_parse() of a command line; the arguments point into `line`. */
static int parse(char *line, struct bench_args *a)
{
    char *argv[48];
    int argc = 0;
    for (char *p = strtok(line, " "); p; p = strtok(NULL, " "))
        argv[argc++] = p;
    argv[argc] = NULL;
    optind = 0;
    return bench_parse(a, argc, argv);
}

static struct bench_args arguments(const char *extra)
{
    static char line[512];
    struct bench_args a;
    snprintf(line, sizeof line, "bench --sim ops/devices/h200.json --shape "
             "ops/shapes/llama-2-7b.json --json --trace %s %s", path, extra);
    assert_int_equal(parse(line, &a), 0);
    return a;
}

/* Replays what lies at `path`; the caller frees. */
static struct replay replay(const char *extra, struct trace *t)
{
    static struct bench_args args;
    struct replay r;
    struct lm_err err = { 0 };
    args = arguments(extra);
    if (trace_load(path, t, &err) != LM_OK || bench_replay(&args, t, &r, &err) != LM_OK)
        fail_msg("%s", err.msg);
    return r;
}

static void drop(struct replay *r, struct trace *t)
{
    free(r->outcome);
    trace_release(t);
}

/* ---- traces ---------------------------------------------------------------------------- */

static void traces_are_read(void **state)
{
    (void)state;
    struct trace t;
    write_trace(HEADER "0,0.5,-1,0,12,7\r\n1,0.75,41,64,3,500\n\n");
    assert_int_equal(trace_load(path, &t, NULL), LM_OK);
    assert_int_equal(t.n, 2);
    assert_int_equal(t.item[0].arrival_us, 500000);
    assert_int_equal(t.item[0].adapter, -1);
    assert_int_equal(t.item[1].rank, 64);
    assert_int_equal(t.max_prompt, 12);
    assert_int_equal(t.max_output, 500);
    assert_int_equal(t.n_adapters, 42);
    trace_release(&t);
}

static void bad_traces_are_refused(void **state)
{
    (void)state;
    static const struct { const char *text, *says; } bad[] = {
        { "", "no requests" }, { HEADER, "no requests" }, { "0,0,0,8,1,1\n", "first line" },
        { HEADER "0,0,0,8,1\n", ":2: output_len" }, { HEADER "0,0,0,8,1,1,1\n", ":2: output_len" },
        { HEADER "0,x,0,8,1,1\n", ":2: arrival" }, { HEADER "0,-1,0,8,1,1\n", ":2: arrival" },
        { HEADER "0,nan,0,8,1,1\n", ":2: arrival" }, { HEADER "0,0,-2,8,1,1\n", ":2: adapter" },
        { HEADER "0,0,0,0,1,1\n", ":2: rank" }, { HEADER "0,0,-1,8,1,1\n", ":2: rank" },
        { HEADER "0,0,0,99999,1,1\n", ":2: rank" }, { HEADER "0,0,0,8,0,1\n", ":2: prompt_len" },
        { HEADER "0,2,0,8,1,1\n1,1,0,8,1,1\n", ":3: arrival lies before" },
        { HEADER "0,0,4e9,8,1,1\n", ":2: adapter" },
    };
    for (size_t i = 0; i < LM_COUNT(bad); i++) {
        struct trace t;
        struct lm_err err = { 0 };
        write_trace(bad[i].text);
        assert_int_equal(trace_load(path, &t, &err), LM_FORMAT);
        if (!strstr(err.msg, bad[i].says) || !strstr(err.msg, path))
            fail_msg("'%s' does not say '%s'", err.msg, bad[i].says);
    }
    assert_int_equal(trace_load("/nonexistent.csv", &(struct trace){ 0 }, NULL), LM_NOT_FOUND);
}

static void options_are_checked(void **state)
{
    (void)state;
    static const char *const bad[] = {
        "--shape x --model y", "", "--shape x --tokens 0", "--shape x --modules q,x",
        "--shape x --split-pool 100", "--shape x --preempt never", "--shape x --pool-bytes 4Q",
        "--shape x extra", "--shape x --nothing", "--shape x --load-format real",
        "--shape x --kv-dtype fp4", "--shape x --weights-dtype int8", "--shape x --idle --dummy 4",
        "--shape x --idle --pool-bytes 1G", "--shape x --idle --dummy 4 --pool-bytes 1G --start",
    };
    for (size_t i = 0; i < LM_COUNT(bad); i++) {
        char line[128];
        struct bench_args a;
        snprintf(line, sizeof line, "bench %s", bad[i]);
        assert_int_equal(parse(line, &a), 2);
    }
    char idle[] = "bench --shape x --idle --dummy 4 --pool-bytes 1G";
    struct bench_args a;
    assert_true(parse(idle, &a) == 0 && a.idle && a.dummy == 4);
    a = arguments("--modules q,down --pool-bytes 2G --fcfs --slo-ttft 6 --no-early-abort "
                  "--kv-dtype fp8 --weights-dtype fp8");
    assert_int_equal(a.kv, ENGINE_KV_FP8);
    assert_int_equal(a.weights, ENGINE_WEIGHTS_FP8);
    assert_int_equal(arguments("--weights-dtype fp8-dynamic").weights, ENGINE_WEIGHTS_FP8_DYNAMIC);
    assert_string_equal(arguments("--shape llama-2-7b").shape, "ops/shapes/llama-2-7b.json");
    assert_int_equal(arguments("--layers 8").layers, 8);
    assert_string_equal(arguments("--shape a/b").shape, "a/b");
    assert_string_equal(arguments("--shape nosuch").shape, "nosuch");
    assert_int_equal(arguments("--weights-dtype bf16").weights, ENGINE_WEIGHTS_BF16);
    assert_int_equal(arguments("--weights-dtype stored").weights, ENGINE_WEIGHTS_STORED);
    assert_int_equal(a.modules, 0x41);
    assert_true(a.pool_bytes == (size_t)2 << 30 && !a.policy.group && !a.policy.fair);
    assert_true(a.slo_s == 6 && !a.abort_late && a.policy.prefetch);
}

/* ---- replays --------------------------------------------------------------------------- */

static void every_request_has_an_outcome(void **state)
{
    (void)state;
    char text[8192] = HEADER;
    for (int i = 0; i < 100; i++)
        snprintf(text + strlen(text), sizeof text - strlen(text), "%d,%.2f,%d,%d,%d,%d\n", i,
                 i * 0.05, i % 7 - 1, i % 7 ? 8 : 0, 10 + i, 5 + i % 11);
    write_trace(text);
    struct trace t;
    struct replay r = replay("", &t);
    for (int i = 0; i < t.n; i++) {
        const struct outcome *o = &r.outcome[i];
        assert_int_equal(o->state, REPLAY_DONE);
        assert_int_equal(o->tokens, t.item[i].output);
        assert_true(0 <= o->submit_us && o->submit_us <= o->admit_us);
        assert_true(o->admit_us < o->first_us && o->first_us <= o->end_us);
        assert_true(t.item[i].arrival_us + o->end_us <= r.end_us);
    }
    assert_true(r.end_us > t.item[99].arrival_us && r.end_us < 10000000);
    assert_int_equal(r.stats.finished, 100);
    drop(&r, &t);
}

static void warming_up_does_not_count(void **state)
{
    (void)state;
    struct trace t, again;
    write_trace(HEADER "0,0,0,8,10,5\n1,0.1,-1,0,10,5\n");
    struct replay cold = replay("", &t);
    assert_int_equal(cold.stats.adapter_loads, 1);
    struct replay warm = replay("--warm-up 40", &again);
    assert_int_equal(warm.stats.finished, 2);
    assert_int_equal(warm.stats.adapter_loads, 0);
    assert_int_equal(warm.stats.decode_tokens + warm.stats.prefill_tokens,
                     cold.stats.decode_tokens + cold.stats.prefill_tokens);
    assert_true(warm.outcome[0].first_us < cold.outcome[0].first_us);
    assert_true(warm.outcome[1].end_us == cold.outcome[1].end_us);
    drop(&cold, &t);
    drop(&warm, &again);
}

static void idle_time_is_skipped(void **state)
{
    (void)state;
    struct trace t;
    write_trace(HEADER "0,0,-1,0,10,5\n1,36000,-1,0,10,5\n");
    struct replay r = replay("", &t);
    assert_in_range(r.end_us, 36000000000, 36000200000);
    assert_in_range(r.outcome[1].end_us, 10000, 100000);
    assert_true(r.stats.steps < 20);
    drop(&r, &t);
}

/* 16.8 MB at 1 GB/s and 100 ms: some 117 ms; two wait for one fetch, one for its turn. */
static void the_store_takes_its_time(void **state)
{
    (void)state;
    struct trace t;
    write_trace(HEADER "0,0,3,8,10,5\n1,0.05,3,8,10,5\n2,0.06,4,8,10,5\n3,0.07,-1,0,10,5\n"
                "4,5,3,8,10,5\n");
    struct replay r = replay("--fetch-latency-ms 100 --fetch-gbps 1 --fetches 1", &t);
    assert_int_equal(r.fetched, 2);
    assert_in_range(r.outcome[0].submit_us, 116000, 150000);
    assert_in_range(r.outcome[1].submit_us, 66000, 100000);
    assert_in_range(r.outcome[2].submit_us, 2 * 116000 - 60000, 2 * 150000 - 60000);
    assert_in_range(r.outcome[3].submit_us, 0, 10000);
    assert_in_range(r.outcome[4].submit_us, 0, 1000);
    drop(&r, &t);
}

/* Room for two adapters of three: the third is made when a request has ended. */
static void host_memory_is_waited_for(void **state)
{
    (void)state;
    struct trace t;
    write_trace(HEADER "0,0,0,8,10,50\n1,0,1,8,10,100\n2,0,2,8,10,5\n3,0,2,8,10,5\n");
    struct replay r = replay("--host-adapter-bytes 40M", &t);
    for (int i = 0; i < 4; i++)
        assert_int_equal(r.outcome[i].state, REPLAY_DONE);
    assert_true(r.outcome[2].submit_us >= r.outcome[0].end_us);
    assert_true(r.outcome[2].submit_us < r.outcome[1].end_us);
    drop(&r, &t);
}

static void what_never_fits_is_an_outcome(void **state)
{
    (void)state;
    struct trace t;
    write_trace(HEADER "0,0,-1,0,10,5\n1,0,-1,0,5000,5\n2,0,-1,0,10,5\n");
    struct replay r = replay("", &t);
    assert_int_equal(r.outcome[1].state, REPLAY_FAILED);
    assert_int_equal(r.outcome[2].state, REPLAY_DONE);
    assert_non_null(strstr(r.error, "5000 tokens"));
    drop(&r, &t);
}

static void replays_repeat_exactly(void **state)
{
    (void)state;
    char text[32768] = HEADER;
    for (int i = 0; i < 600; i++)
        snprintf(text + strlen(text), sizeof text - strlen(text), "%d,%.3f,%d,16,%d,%d\n", i,
                 i * 0.01, i * 7919 % 97, 8 + i * 31 % 500, 8 + i * 17 % 300);
    write_trace(text);
    struct trace t;
    struct replay a = replay("--pool-bytes 8G", &t);
    int64_t end = a.end_us, p99 = a.outcome[599].end_us;
    drop(&a, &t);
    a = replay("--pool-bytes 8G", &t);
    assert_int_equal(a.end_us, end);
    assert_int_equal(a.outcome[599].end_us, p99);
    drop(&a, &t);
}

/* ---- fixed figures --------------------------------------------------------------------- */

/* What `bench` prints with `extra`, at `path`; is there a figure of that name? */
static bool prints(const char *extra, const char *name)
{
    char line[512], text[4096], *argv[48];
    int argc = 0, out = dup(STDOUT_FILENO);
    snprintf(line, sizeof line, "bench --sim ops/devices/h200.json --shape "
             "ops/shapes/llama-2-7b.json --repeat 1 %s", extra);
    for (char *p = strtok(line, " "); p; p = strtok(NULL, " "))
        argv[argc++] = p;
    argv[argc] = NULL;
    optind = 0;
    write_trace("");
    fflush(stdout);
    FILE *f = fopen(path, "r+");
    assert_true(f && out >= 0 && dup2(fileno(f), STDOUT_FILENO) >= 0);
    int status = cmd_bench(argc, argv);
    fflush(stdout);
    assert_true(dup2(out, STDOUT_FILENO) >= 0 && close(out) == 0);
    assert_int_equal(status, 0);
    rewind(f);
    size_t n = fread(text, 1, sizeof text - 1, f);
    text[n] = '\0';
    assert_int_equal(fclose(f), 0);
    assert_non_null(strstr(text, "\"decode_base\""));
    return strstr(text, name) != NULL;
}

/* No step has all sequences where some end before the last one begins. */
static void a_step_of_all_or_no_figure(void **state)
{
    (void)state;
    assert_true(prints("--batch 8 --tokens 8", "\"decode_base_step\""));
    assert_false(prints("--batch 8 --tokens 8 --max-seqs 2", "\"decode_base_step\""));
    assert_true(prints("--batch 8 --tokens 8 --max-seqs 2", "\"decode_batch1_step\""));
}

static int setup(void **state)
{
    (void)state;
    int fd = mkstemp(path);
    lm_log_set_level(LM_WARN);
    return fd < 0 ? -1 : close(fd);
}

static int teardown(void **state)
{
    (void)state;
    return unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(traces_are_read),
        cmocka_unit_test(bad_traces_are_refused),
        cmocka_unit_test(options_are_checked),
        cmocka_unit_test(every_request_has_an_outcome),
        cmocka_unit_test(warming_up_does_not_count),
        cmocka_unit_test(idle_time_is_skipped),
        cmocka_unit_test(the_store_takes_its_time),
        cmocka_unit_test(host_memory_is_waited_for),
        cmocka_unit_test(what_never_fits_is_an_outcome),
        cmocka_unit_test(replays_repeat_exactly),
        cmocka_unit_test(a_step_of_all_or_no_figure),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
