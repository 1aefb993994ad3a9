/* SPDX-License-Identifier: Apache-2.0 */
/*
 * twin_sample.c - sampling against the CPU: the same logits, parameters and seeds must give the
 * same token, log-probabilities and alternatives.
 *
 * Both draw from weights e^(x - max), whose last bits differ, so a token may differ where u falls
 * within 2^-20 of a border between two tokens: one row in some thousands. MAY_DIFFER allows it.
 */
#include "tests/twin/twin.h"

#include <math.h>
#include <stdlib.h>

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
                                 .repetition_penalty = 1, .seed = tw_rnd(),
                                 .counter = tw_rnd() % 1000 };
    if (i % 3 == 1)
        r->top_p = 0.5f + 0.49f * (float)(tw_rnd() % 100) / 100;
    if (i % 4 == 2)
        r->top_k = tw_int(1, i % 8 == 2 ? 5 : vocab);
    if (i % 7 == 3)
        r->min_p = 0.2f * (float)(tw_rnd() % 100) / 100;
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
        r->forced = tw_int(0, vocab - 1);
    r->want_logprob = i % 2;
    r->top_logprobs = i % 5 == 2 ? tw_int(1, KN_MAX_TOP_LOGPROBS) : 0;
}

static void random_logits(float *x, int vocab, int kind)
{
    for (int i = 0; i < vocab; i++) {
        x[i] = 3 * (tw_value() + tw_value() + tw_value());
        if (kind == 1)
            x[i] = floorf(x[i]);        /* ties everywhere */
        if (kind == 2 && tw_rnd() % 4 == 0)
            x[i] = -INFINITY;
        if (kind == 3 && tw_rnd() % 50 == 0)
            x[i] = NAN;
    }
    if (kind == 4)
        x[tw_int(0, vocab - 1)] = 40;  /* nearly certain */
}

static void run_gpu(struct twin *c, const struct kn_sample *a, struct sampled *out)
{
    struct side *s = &c->gpu;
    struct kn_sample g = *a;
    g.logits = side_put(c, s, a->logits, (size_t)a->n * (size_t)a->ld * sizeof(float));
    g.rows = side_put(c, s, a->rows, (size_t)a->n * sizeof *a->rows);
    g.history = side_put(c, s, a->history, HISTORY * sizeof *a->history);
    struct sampled *d = side_put(c, s, out, sizeof *out);
    g.out_id = d->id;
    g.out_logprob = d->logprob;
    g.top_id = d->top_id;
    g.top_logprob = d->top_logprob;
    g.workspace = side_new(c, s, kn_sample_workspace(s->dev, a->n, a->vocab));
    twin_status(c, kn_op_sample(s->s, &g), LM_OK, "sample");
    side_get(c, s, d, out, sizeof *out);
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

static void compare_rows(struct twin *c, const struct kn_sample *a, const struct sampled *g,
                         const struct sampled *h, int *other)
{
    for (int i = 0; i < a->n; i++) {
        const struct kn_sample_row *p = &a->rows[i];
        bool same = g->id[i] == h->id[i];
        *other += !same;
        if (!same && *other > MAY_DIFFER)
            twin_fail(c, "row %d: token %d, not %d; T %g top_k %d top_p %g min_p %g", i, g->id[i],
                      h->id[i], (double)p->temperature, p->top_k, (double)p->top_p,
                      (double)p->min_p);
        if (same && !near_or_same(g->logprob[i], h->logprob[i]))
            twin_fail(c, "row %d: log-probability %g, not %g", i, (double)g->logprob[i],
                      (double)h->logprob[i]);
        if (!same_tops(g, h, i, p->top_logprobs))
            twin_fail(c, "row %d: alternatives differ", i);
    }
}

static void check_vocab(struct twin *c, int vocab, int n, int *other)
{
    struct kn_sample_row rows[ROWS];
    int32_t history[HISTORY];
    int64_t ld = vocab + 3;
    float *logits = malloc((size_t)(n * ld) * sizeof *logits);
    struct sampled *g = calloc(1, sizeof *g), *h = calloc(1, sizeof *h);
    twin_case(c, "%d rows of %d", n, vocab);
    for (int i = 0; i < HISTORY; i++)
        history[i] = tw_int(0, vocab - 1);
    for (int i = 0; i < n; i++) {
        random_row(&rows[i], i, vocab);
        random_logits(logits + i * ld, vocab, i % 6);
    }
    struct kn_sample a = { .logits = logits, .rows = rows, .history = history, .out_id = h->id,
                           .out_logprob = h->logprob, .top_id = h->top_id,
                           .top_logprob = h->top_logprob, .n = n, .vocab = vocab, .ld = ld };
    a.workspace = malloc(kn_sample_workspace(c->cpu.dev, n, vocab));
    twin_status(c, kn_op_sample(c->cpu.s, &a), LM_OK, "sample");
    run_gpu(c, &a, g);
    compare_rows(c, &a, g, h, other);
    free(a.workspace);
    free(logits);
    free(g);
    free(h);
}

bool twin_sample(struct twin *c)
{
    static const int vocabs[] = { 1, 7, 33, 1000, 4096, 32000, 128256 };
    int other = 0;
    for (size_t i = 0; i < LM_COUNT(vocabs) && !(c->slow && vocabs[i] > 4096); i++) {
        check_vocab(c, vocabs[i], 1, &other);
        check_vocab(c, vocabs[i], ROWS, &other);
    }
    return twin_end(c, "sample");
}
