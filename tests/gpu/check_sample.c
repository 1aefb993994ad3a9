/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check_sample.c - sampling against the CPU: the same logits, parameters and seeds must give the
 * same token, log-probabilities and alternatives.
 *
 * Both draw from weights e^(x - max), whose last bits differ, so a token may differ where u falls
 * within 2^-20 of a border between two tokens: one row in some thousands. MAY_DIFFER allows it.
 */
#include "check.h"

#define ROWS 40
#define HISTORY 64
#define MAY_DIFFER 1            /* of all rows checked together */
#define LOGPROB_TOL 2e-5        /* absolute: the float32 sum and logf of lse, at |lse| <= 32 */

struct sampled {
    int32_t id[ROWS], top_id[ROWS * KN_MAX_TOP_LOGPROBS];
    float logprob[ROWS], top_logprob[ROWS * KN_MAX_TOP_LOGPROBS];
};

static void random_row(struct kn_sample_row *r, int i, int vocab)
{
    static const float temps[] = { 0, 1, 0.3f, 0.7f, 2 };
    *r = (struct kn_sample_row){ .temperature = temps[i % 5], .top_p = 1, .forced = -1,
                                 .repetition_penalty = 1, .seed = rnd(), .counter = rnd() % 1000 };
    if (i % 3 == 1)
        r->top_p = 0.5f + 0.49f * (float)(rnd() % 100) / 100;
    if (i % 4 == 2)
        r->top_k = rnd_int(1, i % 8 == 2 ? 5 : vocab);
    if (i % 7 == 3)
        r->min_p = 0.2f * (float)(rnd() % 100) / 100;
    if (i % 6 == 4) {
        r->repetition_penalty = 1.3f;
        r->presence_penalty = 0.5f;
        r->frequency_penalty = 0.25f;
        r->hist0 = 3;
        r->n_prompt = 20;
        r->n_output = 30;
    }
    if (i % 9 == 5) {
        r->banned0 = 1;
        r->n_banned = 12;
    }
    if (i % 11 == 6)
        r->forced = rnd_int(0, vocab - 1);
    r->want_logprob = i % 2;
    r->top_logprobs = i % 5 == 2 ? rnd_int(1, KN_MAX_TOP_LOGPROBS) : 0;
}

static void random_logits(float *x, int vocab, int kind)
{
    for (int i = 0; i < vocab; i++) {
        x[i] = 3 * (rnd_float() + rnd_float() + rnd_float());
        if (kind == 1)
            x[i] = floorf(x[i]);        /* ties everywhere */
        if (kind == 2 && rnd() % 4 == 0)
            x[i] = -INFINITY;
        if (kind == 3 && rnd() % 50 == 0)
            x[i] = NAN;
    }
    if (kind == 4)
        x[rnd_int(0, vocab - 1)] = 40;  /* nearly certain */
}

static void run_gpu(struct gpu_check *c, const struct kn_sample *a, struct sampled *out)
{
    size_t logits = (size_t)a->n * (size_t)a->ld * sizeof(float);
    struct kn_sample g = *a;
    g.logits = dev_put(c, a->logits, logits);
    g.rows = dev_put(c, a->rows, (size_t)a->n * sizeof *a->rows);
    g.history = dev_put(c, a->history, HISTORY * sizeof *a->history);
    struct sampled *d = dev_put(c, out, sizeof *out);
    g.out_id = d->id;
    g.out_logprob = d->logprob;
    g.top_id = d->top_id;
    g.top_logprob = d->top_logprob;
    g.workspace = dev_new(c, kn_sample_workspace(c->cuda, a->n, a->vocab));
    must(kn_op_sample(c->gs, &g), "sample");
    dev_get(c, out, d, sizeof *out);
    void *const all[] = { (void *)(uintptr_t)g.logits, (void *)(uintptr_t)g.rows,
                          (void *)(uintptr_t)g.history, d, g.workspace };
    for (size_t i = 0; i < LM_COUNT(all); i++)
        dev_free(c, all[i]);
}

static bool near_or_same(float a, float b)
{
    return (isnan(a) && isnan(b)) || a == b || fabs((double)a - (double)b) <= LOGPROB_TOL;
}

/* Alternatives: same ids; log-probabilities within the tolerance. */
static bool same_tops(const struct sampled *g, const struct sampled *h, int row, int k)
{
    for (int i = row * KN_MAX_TOP_LOGPROBS; k > 0; i++, k--)
        if (g->top_id[i] != h->top_id[i] || !near_or_same(g->top_logprob[i], h->top_logprob[i]))
            return false;
    return true;
}

static int check_vocab(struct gpu_check *c, int vocab, int n)
{
    struct kn_sample_row rows[ROWS];
    int32_t history[HISTORY];
    int64_t ld = vocab + 3;
    float *logits = malloc((size_t)(n * ld) * sizeof *logits);
    struct sampled *g = calloc(1, sizeof *g), *h = calloc(1, sizeof *h);
    for (int i = 0; i < HISTORY; i++)
        history[i] = rnd_int(0, vocab - 1);
    for (int i = 0; i < n; i++) {
        random_row(&rows[i], i, vocab);
        random_logits(logits + i * ld, vocab, i % 6);
    }
    struct kn_sample a = { .logits = logits, .rows = rows, .history = history, .out_id = h->id,
                           .out_logprob = h->logprob, .top_id = h->top_id,
                           .top_logprob = h->top_logprob, .n = n, .vocab = vocab, .ld = ld };
    a.workspace = malloc(kn_sample_workspace(c->cpu, n, vocab));
    must(kn_op_sample(c->cs, &a), "sample");
    run_gpu(c, &a, g);
    int other = 0, wrong = 0;
    for (int i = 0; i < n; i++) {
        bool same = g->id[i] == h->id[i];
        other += !same;
        if ((same && !near_or_same(g->logprob[i], h->logprob[i])) ||
            !same_tops(g, h, i, rows[i].top_logprobs)) {
            printf("# row %d: token %d, %d; log-probability %g, %g\n", i, g->id[i], h->id[i],
                   (double)g->logprob[i], (double)h->logprob[i]);
            wrong++;
        }
        if (!same)
            printf("# row %d: token %d instead of %d; T %g top_k %d top_p %g min_p %g\n", i,
                   g->id[i], h->id[i], (double)rows[i].temperature, rows[i].top_k,
                   (double)rows[i].top_p, (double)rows[i].min_p);
    }
    check_that(c, wrong == 0, "log-probabilities of %d rows of %d", n, vocab);
    free(a.workspace);
    free(logits);
    free(g);
    free(h);
    return other;
}

void check_sample(struct gpu_check *c)
{
    static const int vocabs[] = { 1, 7, 33, 1000, 4096, 32000, 128256 };
    int other = 0, all = 0;
    for (size_t i = 0; i < LM_COUNT(vocabs); i++)
        for (int n = 1; n <= ROWS; n += ROWS - 1, all += n)
            other += check_vocab(c, vocabs[i], n);
    check_that(c, other <= MAY_DIFFER, "sampled tokens: %d of %d rows differ", other, all);
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
        figure(c, name, us, "us", "\"gbps\": %.0f", (double)n * vocab * 4 / us / 1e3);
        dev_free(c, (void *)(uintptr_t)a.logits);
        dev_free(c, (void *)(uintptr_t)a.rows);
        dev_free(c, a.out_id);
        dev_free(c, a.out_logprob);
        dev_free(c, a.workspace);
        free(rows);
        free(x);
    }
}
