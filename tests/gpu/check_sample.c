/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check_sample.c - sampling on the device: the twin's check, and its speed.
 */
#include "check.h"

#include "tests/twin/twin.h"

void check_sample(struct gpu_check *c)
{
    struct twin t;
    if (check_that(c, twin_open(&t, c->cuda, c->cpu), "sample: streams"))
        check_that(c, twin_sample(&t), "sampling equals its CPU twin");
    twin_close(&t);
}

/* ---- speed ----------------------------------------------------------------------------- */

static lm_status one_sample(struct gpu_check *c, void *ctx, int i)
{
    (void)i;
    return kn_op_sample(c->gs, ctx);
}

void bench_sample(struct gpu_check *c)
{
    static const struct { int n, vocab; float t, top_p; int top_k; } cases[] = {
        { 1, 32000, 0, 1, 0 }, { 256, 32000, 0, 1, 0 }, { 1, 128256, 0, 1, 0 },
        { 128, 128256, 0, 1, 0 }, { 1, 128256, 0.8f, 0.95f, 50 }, { 128, 128256, 0.8f, 0.95f, 50 },
        { 128, 32000, 0.8f, 0.95f, 0 },
    };
    for (size_t i = 0; i < LM_COUNT(cases); i++) {
        int n = cases[i].n, vocab = cases[i].vocab;
        struct kn_sample_row *rows = calloc((size_t)n, sizeof *rows);
        float *x = malloc((size_t)n * (size_t)vocab * sizeof *x);
        for (int r = 0; r < n; r++)
            rows[r] = (struct kn_sample_row){ .temperature = cases[i].t, .top_p = cases[i].top_p,
                                              .top_k = cases[i].top_k, .forced = -1,
                                              .repetition_penalty = 1, .seed = rnd() };
        for (int k = 0; k < n * vocab; k++)
            x[k] = 3 * (rnd_float() + rnd_float() + rnd_float());
        struct kn_sample a = { .n = n, .vocab = vocab, .ld = vocab };
        a.logits = dev_put(c, x, (size_t)n * (size_t)vocab * sizeof *x);
        a.rows = dev_put(c, rows, (size_t)n * sizeof *rows);
        a.out_id = dev_new(c, (size_t)n * 4);
        a.out_logprob = dev_new(c, (size_t)n * 4);
        a.workspace = dev_new(c, kn_sample_workspace(c->cuda, n, vocab));
        char name[80];
        snprintf(name, sizeof name, "sample %d x %d, T %g top_p %g top_k %d", n, vocab,
                 (double)cases[i].t, (double)cases[i].top_p, cases[i].top_k);
        double us = time_op(c, one_sample, &a, 10);
        const double gbps = (double)n * vocab * 4 / us / 1e3;
        figure(c, name, us, "us", "\"gbps\": %.0f, \"share\": %.3f", gbps, gbps / c->gbps);
        dev_free(c, (void *)(uintptr_t)a.logits);
        dev_free(c, (void *)(uintptr_t)a.rows);
        dev_free(c, a.out_id);
        dev_free(c, a.out_logprob);
        dev_free(c, a.workspace);
        free(rows);
        free(x);
    }
}
