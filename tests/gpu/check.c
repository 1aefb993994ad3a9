/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check.c - gpu-check RESULTS.jsonl PART...: the CUDA backend against its CPU twin, and its speed.
 *
 *     smoke     every operation against the CPU, at ragged sizes and all block sizes; a single
 *               group of them by its name: device rows gemm sample attention lora
 *     few       a few cases of products, attention and LoRA, for tools that make a device slow
 *     bench     the table of achieved bandwidth and arithmetic
 *     golden    the whole engine on the small models against transformers + PEFT
 *     graph     decode steps as CUDA graphs against each operation by itself, bit by bit
 *     company   a request beside these and beside those, bit by bit
 *
 * gpu-check loramill bench ...: `loramill bench`, for machines without librdkafka and Avro.
 * gpu-check files ...: a checkpoint to load, see files.c.
 *
 * tests/gpu/gpu-check.sh runs this program and the parts that need the whole engine. Exit status: 0
 * all well, 1 something failed, 2 no device or bad usage.
 */
#include "check.h"

#include "tests/twin/twin.h"
#include "worker/tools/commands.h"

static lm_status open_both(struct gpu_check *c, struct lm_err *err)
{
    lm_status st = kn_open("cuda", NULL, &c->cuda, err);
    if (st == LM_OK)
        st = kn_open("cpu", NULL, &c->cpu, err);
    if (st == LM_OK)
        st = kn_stream_new(c->cuda, &c->gs, err);
    if (st == LM_OK)
        st = kn_stream_new(c->cpu, &c->cs, err);
    return st;
}

static void run_checks(struct gpu_check *c)
{
    check_device(c);
    check_rows(c);
    check_gemm(c);
    check_sample(c);
    check_attention(c);
    check_lora(c);
}

static void run_few(struct gpu_check *c)
{
    struct twin t;
    if (check_that(c, twin_open(&t, c->cuda, c->cpu), "few: streams")) {
        t.slow = true;
        check_that(c, twin_attention_few(&t), "a few of rope_kv and attention");
        check_that(c, twin_lora_few(&t), "a few of LoRA");
        check_that(c, twin_gate_up(&t), "a few products with their activation");
    }
    twin_close(&t);
}

static void run_bench(struct gpu_check *c)
{
    bench_ceilings(c);
    bench_gemm(c);
    bench_gemm_mixed(c);
    bench_rows(c);
    bench_sample(c);
    bench_attention(c);
    bench_lora(c);
}

static const struct {
    const char *name;
    void (*run)(struct gpu_check *c);
} parts[] = {
    { "smoke", run_checks },
    { "few", run_few },
    { "bench", run_bench },
    { "golden", check_golden },
    { "graph", check_graph },
    { "company", check_company },
    { "device", check_device },
    { "rows", check_rows },
    { "gemm", check_gemm },
    { "sample", check_sample },
    { "attention", check_attention },
    { "prefill", check_prefill },
    { "lora", check_lora },
    { "ceilings", bench_ceilings },
    { "bench-gemm", bench_gemm },
    { "bench-gemm-mixed", bench_gemm_mixed },
    { "bench-rows", bench_rows },
    { "bench-sample", bench_sample },
    { "bench-attention", bench_attention },
    { "bench-decode", bench_decodes },
    { "bench-prefill", bench_prefills },
    { "bench-lora", bench_lora },
};

static int usage(void)
{
    fprintf(stderr, "usage: gpu-check RESULTS.jsonl PART...\nparts:");
    for (size_t i = 0; i < LM_COUNT(parts); i++)
        fprintf(stderr, " %s", parts[i].name);
    fprintf(stderr, "\n");
    return 2;
}

static bool run_part(struct gpu_check *c, const char *name)
{
    for (size_t i = 0; i < LM_COUNT(parts); i++)
        if (!strcmp(parts[i].name, name)) {
            int64_t t0 = lm_now_us();
            parts[i].run(c);
            printf("# %s took %.1f s\n", name, (double)(lm_now_us() - t0) / 1e6);
            return true;
        }
    return false;
}

int main(int argc, char **argv)
{
    struct gpu_check c = { 0 };
    struct lm_err err = { 0 };
    struct kn_props p;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 2 && !strcmp(argv[1], "loramill") && !strcmp(argv[2], "bench"))
        return cmd_bench(argc - 2, argv + 2);
    if (argc > 1 && !strcmp(argv[1], "files"))
        return files_main(argc - 1, argv + 1);
    if (argc < 3)
        return usage();
    if (open_both(&c, &err) != LM_OK || !(c.json = fopen(argv[1], "a"))) {
        printf("gpu-check: %s\n", err.msg[0] ? err.msg : "cannot write the results file");
        return 2;
    }
    kn_props(c.cuda, &p);
    printf("# %s, %.1f of %.1f GB free\n", p.name, (double)p.mem_free / 1e9,
           (double)p.mem_total / 1e9);
    fprintf(c.json, "{\"run\": \"gpu-check\", \"name\": \"device\", \"device\": \"%s\"}\n", p.name);
    for (int i = 2; i < argc; i++)
        if (!run_part(&c, argv[i]))
            return usage();
    printf("%d passed, %d failed\n", c.passed, c.failed);
    fclose(c.json);
    kn_stream_free(c.gs);
    kn_stream_free(c.cs);
    kn_close(c.cuda);
    kn_close(c.cpu);
    return c.failed ? 1 : 0;
}
