/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check.c - gpu-check PART [RESULTS.jsonl]: the CUDA backend against its CPU twin, and its speed.
 *
 *     smoke     every operation against the CPU, at ragged sizes
 *     kernels   the same, then the table of achieved bandwidth and arithmetic
 *
 * tests/gpu/gpu-check.sh runs this program and the parts that need the whole engine. Exit status: 0
 * all well, 1 something failed, 2 no device or bad usage.
 */
#include "check.h"

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

static void run_bench(struct gpu_check *c)
{
    bench_ceilings(c);
    bench_gemm(c);
    bench_rows(c);
    bench_sample(c);
    bench_attention(c);
    bench_lora(c);
}

int main(int argc, char **argv)
{
    struct gpu_check c = { 0 };
    struct lm_err err = { 0 };
    bool kernels = argc > 1 && !strcmp(argv[1], "kernels");
    bool bench = kernels || (argc > 1 && !strcmp(argv[1], "bench"));
    bool smoke = argc > 1 && !strcmp(argv[1], "smoke");
    if ((!bench && !smoke) || argc > 3) {
        fprintf(stderr, "usage: gpu-check smoke|kernels|bench [RESULTS.jsonl]\n");
        return 2;
    }
    if (open_both(&c, &err) != LM_OK) {
        printf("gpu-check: %s\n", err.msg);
        return 2;
    }
    if (argc == 3 && !(c.json = fopen(argv[2], "a"))) {
        printf("gpu-check: cannot write %s\n", argv[2]);
        return 2;
    }
    struct kn_props p;
    kn_props(c.cuda, &p);
    printf("# %s, %.1f of %.1f GB free; twin: ", p.name, (double)p.mem_free / 1e9,
           (double)p.mem_total / 1e9);
    kn_props(c.cpu, &p);
    printf("%s\n", p.name);
    if (smoke || kernels)
        run_checks(&c);
    if (bench)
        run_bench(&c);
    printf("%d passed, %d failed\n", c.passed, c.failed);
    if (c.json)
        fclose(c.json);
    kn_stream_free(c.gs);
    kn_stream_free(c.cs);
    kn_close(c.cuda);
    kn_close(c.cpu);
    return c.failed ? 1 : 0;
}
