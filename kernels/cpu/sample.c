/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sample.c - one token from one row of logits.
 *
 * Penalties -> temperature -> top-k -> top-p -> min-p -> draw, the order of vLLM and Hugging Face.
 * Candidates are ordered by (weight descending, id ascending), a strict order: each filter keeps a
 * prefix of it, found by selection instead of a sort. The draw walks the kept ids in ascending
 * order until their mass passes u * total, so the token depends on seed, counter and logits only.
 *
 * u = (mix(mix(seed) + (counter + 1) * 0x9e3779b97f4a7c15) >> 11) / 2^53, with the finaliser of
 * SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) as mix: any backend computes the same one.
 *
 * A logit that is not a number is never chosen. If no logit is left, the token is -1.
 *
 * Workspace: for each thread, [vocab] weights and [vocab] candidates; counts of the history share
 * the candidates' place, before there are any.
 */
#include "kernels/cpu/cpu_int.h"

#include <math.h>
#include <string.h>

struct cand {
    float w;
    int32_t id;
};

struct sample_job {
    const struct kn_sample *a;
    const struct cpu_vec *v;
    size_t slot_bytes;
};

/* What one row works with. */
struct draw {
    const struct kn_sample_row *p;
    const struct cpu_vec *v;
    const int32_t *history;
    const float *raw;           /* [vocab] */
    float *w;                   /* [vocab] */
    struct cand *c;             /* [vocab] */
    int vocab;
};

static size_t slot_bytes(int vocab)
{
    size_t n = LM_DIV_UP((size_t)vocab, 64) * 64;
    return n * (sizeof(float) + sizeof(struct cand));
}

size_t cpu_sample_workspace(kn_device *dev, int max_rows, int vocab)
{
    const struct cpu_device *d = (const struct cpu_device *)dev;
    return (size_t)LM_MAX(1, LM_MIN(d->threads, LM_MAX(max_rows, 1))) * slot_bytes(vocab);
}

static uint64_t mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static double uniform(uint64_t seed, uint64_t counter)
{
    return (double)(mix(mix(seed) + (counter + 1) * 0x9e3779b97f4a7c15u) >> 11) * 0x1p-53;
}

/* ---- log-probabilities ----------------------------------------------------------------- */

static int first_equal(const float *x, int n, float v)
{
    for (int i = 0; i < n; i++)
        if (x[i] == v)
            return i;
    return -1;
}

/* The k largest, best first, ties to the lowest id: an insertion list behind a threshold. */
static void top_alternatives(const float *x, int n, int k, int32_t *id, float *val)
{
    int have = 0;
    for (int i = 0; i < n; i++) {
        if (!(x[i] > -INFINITY) || (have == k && !(x[i] > val[k - 1])))
            continue;
        int at = have < k ? have++ : k - 1;
        for (; at > 0 && val[at - 1] < x[i]; at--) {
            val[at] = val[at - 1];
            id[at] = id[at - 1];
        }
        val[at] = x[i];
        id[at] = i;
    }
    for (; have < k; have++) {
        id[have] = -1;
        val[have] = -INFINITY;
    }
}

static void report(const struct kn_sample *a, int row, const struct draw *d, int32_t id)
{
    const struct kn_sample_row *p = d->p;
    if (a->out_logprob)
        a->out_logprob[row] = NAN;
    if (!p->want_logprob && p->top_logprobs == 0)
        return;
    float m = d->v->max(d->raw, d->vocab);
    float lse = m + logf(d->v->exp_sum(NULL, d->raw, d->vocab, m));
    if (p->want_logprob && a->out_logprob && id >= 0)
        a->out_logprob[row] = d->raw[id] - lse;
    if (p->top_logprobs == 0)
        return;
    int32_t *ids = a->top_id + (int64_t)row * KN_MAX_TOP_LOGPROBS;
    float *vals = a->top_logprob + (int64_t)row * KN_MAX_TOP_LOGPROBS;
    top_alternatives(d->raw, d->vocab, p->top_logprobs, ids, vals);
    for (int i = 0; i < p->top_logprobs; i++)
        vals[i] -= lse;
}

/* ---- penalties ------------------------------------------------------------------------- */

static bool has_penalties(const struct kn_sample_row *p)
{
    return p->repetition_penalty != 1.0f || p->presence_penalty != 0.0f ||
           p->frequency_penalty != 0.0f;
}

static bool in_vocab(const struct draw *d, int32_t id)
{
    return id >= 0 && id < d->vocab;
}

/* Each token of the history once: its count in the output decides two of the three. */
static void penalize(const struct draw *d)
{
    const struct kn_sample_row *p = d->p;
    const int32_t *h = d->history + p->hist0;
    const int n = p->n_prompt + p->n_output;
    int32_t *count = (int32_t *)d->c;           /* -1: done */
    for (int i = 0; i < n; i++)
        if (in_vocab(d, h[i]))
            count[h[i]] = 0;
    for (int i = p->n_prompt; i < n; i++)
        if (in_vocab(d, h[i]))
            count[h[i]]++;
    for (int i = 0; i < n; i++) {
        if (!in_vocab(d, h[i]) || count[h[i]] < 0)
            continue;
        float *w = &d->w[h[i]];
        *w = *w > 0 ? *w / p->repetition_penalty : *w * p->repetition_penalty;
        *w -= p->frequency_penalty * (float)count[h[i]];
        *w -= count[h[i]] > 0 ? p->presence_penalty : 0.0f;
        count[h[i]] = -1;
    }
}

/* The row after penalties and bans; the raw logits themselves when there are none. */
static const float *adjusted(const struct draw *d)
{
    const struct kn_sample_row *p = d->p;
    if (!has_penalties(p) && p->n_banned == 0)
        return d->raw;
    memcpy(d->w, d->raw, (size_t)d->vocab * sizeof(float));
    if (has_penalties(p))
        penalize(d);
    for (int i = 0; i < p->n_banned; i++)
        if (in_vocab(d, d->history[p->banned0 + i]))
            d->w[d->history[p->banned0 + i]] = -INFINITY;
    return d->w;
}

/* ---- filters --------------------------------------------------------------------------- */

static bool before(struct cand a, struct cand b)
{
    return a.w > b.w || (a.w == b.w && a.id < b.id);
}

static void swap(struct cand *a, struct cand *b)
{
    struct cand t = *a;
    *a = *b;
    *b = t;
}

/* Puts c[0..n) around a pivot and returns its final place. */
static int partition(struct cand *c, int n)
{
    int mid = n / 2;
    if (before(c[mid], c[0]))
        swap(&c[mid], &c[0]);
    if (before(c[n - 1], c[0]))
        swap(&c[n - 1], &c[0]);
    if (before(c[n - 1], c[mid]))
        swap(&c[n - 1], &c[mid]);
    swap(&c[mid], &c[n - 1]);
    int at = 0;
    for (int i = 0; i < n - 1; i++)
        if (before(c[i], c[n - 1]))
            swap(&c[i], &c[at++]);
    swap(&c[at], &c[n - 1]);
    return at;
}

/* Length of the shortest prefix, in order, that has `count` candidates or a mass of at least
 * `mass`, whichever is reached first. On return c[0..result) is that prefix, unordered, with its
 * last candidate at the end. */
static int select_prefix(struct cand *c, int n, int count, double mass)
{
    int lo = 0, hi = n;                 /* the prefix ends inside (lo, hi] */
    double below = 0;                   /* mass of c[0..lo) */
    while (hi - lo > 1) {
        int at = lo + partition(c + lo, hi - lo);
        double m = below;
        for (int i = lo; i <= at; i++)
            m += c[i].w;
        if (at + 1 >= count || m >= mass) {
            hi = at + 1;
            if (at == lo)
                break;                  /* the pivot is the first of the rest: it is the end */
            /* without the pivot, is it still enough? */
            if (at >= count || m - c[at].w >= mass)
                hi = at;
            else
                return at + 1;
        } else {
            lo = at + 1;
            below = m;
        }
    }
    return hi;
}

/* Weights by size, 8 bins an octave: bin 0 holds the largest, the last all below 2^-31. Filters
 * walk the bins and select inside one of them, so the whole vocabulary is read but never sorted. */
#define BINS 256

struct bins {
    double mass[BINS];
    int32_t count[BINS];
};

static int bin_of(float w)
{
    uint32_t bits;
    memcpy(&bits, &w, sizeof bits);
    return (int)LM_MIN((0x3f800000u - bits) >> 20, (uint32_t)BINS - 1);
}

static void bins_fill(struct bins *b, const float *w, int n)
{
    memset(b, 0, sizeof *b);
    for (int i = 0; i < n; i++) {
        int at = bin_of(w[i]);
        b->mass[at] += (double)w[i];
        b->count[at] += w[i] > 0;
    }
}

static int gather_bin(const struct draw *d, int bin)
{
    int n = 0;
    for (int i = 0; i < d->vocab; i++)
        if (d->w[i] > 0 && bin_of(d->w[i]) == bin)
            d->c[n++] = (struct cand){ d->w[i], i };
    return n;
}

/* What is kept: candidates up to `cut` in order; it lies in `bin`, whose part that is kept lies in
 * c[0..n). `mass` is that of everything kept. */
struct kept {
    struct cand cut;
    int bin, n;
    double mass;
};

/* Keeps the shortest prefix with `count` candidates or `mass`, whichever is less, of what `k`
 * keeps; bins after k->bin are gone already. */
static void keep_prefix(const struct draw *d, const struct bins *b, struct kept *k, int64_t count,
                        double mass)
{
    double above = 0;
    int64_t before_bin = 0;
    int i = 0;
    for (; i < k->bin; i++) {
        if (before_bin + b->count[i] >= count || above + b->mass[i] >= mass)
            break;
        before_bin += b->count[i];
        above += b->mass[i];
    }
    if (i != k->bin || k->n < 0) {
        k->n = gather_bin(d, i);
        k->bin = i;
    }
    if (k->n == 0)
        return;                 /* an empty last bin: nothing to cut */
    int64_t want = LM_MIN(count - before_bin, INT32_MAX);
    k->n = select_prefix(d->c, k->n, (int)want, mass - above);
    k->cut = d->c[k->n - 1];
    k->mass = above;
    for (int j = 0; j < k->n; j++)
        k->mass += (double)d->c[j].w;
}

/* The last candidate that survives top-k, top-p and min-p. Weights are e^(logit - max), so the
 * largest is 1 and min-p is a bound on the weight itself. */
static struct cand find_cut(const struct draw *d)
{
    const struct kn_sample_row *p = d->p;
    const bool top_k = p->top_k > 0 && p->top_k < d->vocab;
    struct kept k = { .cut = { 0, INT32_MAX }, .bin = BINS - 1, .n = -1 };
    struct bins b;
    if (top_k || p->top_p < 1.0f) {
        bins_fill(&b, d->w, d->vocab);
        for (int i = 0; i < BINS; i++)
            k.mass += b.mass[i];
    }
    if (top_k)
        keep_prefix(d, &b, &k, p->top_k, INFINITY);
    if (p->top_p < 1.0f)
        keep_prefix(d, &b, &k, INT64_MAX, k.mass * (double)p->top_p);
    return p->min_p > k.cut.w ? (struct cand){ p->min_p, INT32_MAX } : k.cut;
}

static int32_t draw_token(const struct draw *d)
{
    const struct kn_sample_row *p = d->p;
    const float *x = adjusted(d);
    float m = d->v->max(x, d->vocab);
    if (!(m > -INFINITY))
        return -1;
    if (p->temperature <= 0 || m == INFINITY)
        return first_equal(x, d->vocab, m);
    const float inv_t = 1.0f / p->temperature;
    for (int i = 0; i < d->vocab; i++)
        d->w[i] = (x[i] - m) * inv_t;
    d->v->exp_sum(d->w, d->w, d->vocab, 0);
    struct cand cut = find_cut(d);
    double kept = 0;
    for (int i = 0; i < d->vocab; i++) {
        bool keep = d->w[i] > cut.w || (d->w[i] == cut.w && i <= cut.id);
        d->w[i] = keep ? d->w[i] : 0;
        kept += d->w[i];
    }
    double want = uniform(p->seed, p->counter) * kept, sum = 0;
    int32_t last = -1;
    for (int i = 0; i < d->vocab; i++) {
        if (!(d->w[i] > 0))
            continue;
        sum += d->w[i];
        last = i;
        if (sum > want)
            break;
    }
    return last;
}

/* ---- the operation --------------------------------------------------------------------- */

static void sample_range(void *ctx, int slot, int begin, int end)
{
    const struct sample_job *j = ctx;
    const struct kn_sample *a = j->a;
    char *mine = (char *)a->workspace + (size_t)slot * j->slot_bytes;
    for (int i = begin; i < end; i++) {
        struct draw d = { .p = &a->rows[i], .v = j->v, .history = a->history,
                          .raw = a->logits + i * a->ld, .vocab = a->vocab };
        d.w = (float *)mine;
        d.c = (struct cand *)(mine + j->slot_bytes / 3);
        int32_t id = d.p->forced >= 0 ? d.p->forced : draw_token(&d);
        a->out_id[i] = id;
        report(a, i, &d, id);
    }
}

static const char *row_fault(const struct kn_sample *a, const struct kn_sample_row *p)
{
    if (p->forced >= a->vocab)
        return "forced token outside of the vocabulary";
    if (p->top_logprobs < 0 || p->top_logprobs > KN_MAX_TOP_LOGPROBS)
        return "top_logprobs out of range";
    if (p->top_logprobs > 0 && (!a->top_id || !a->top_logprob))
        return "alternatives wanted, but no place for them";
    if (!(p->temperature >= 0) || !(p->repetition_penalty > 0))
        return "temperature below 0 or repetition penalty not above 0";
    if (p->hist0 < 0 || p->n_prompt < 0 || p->n_output < 0 || p->banned0 < 0 || p->n_banned < 0)
        return "negative count";
    if (!a->history && ((has_penalties(p) && p->n_prompt + p->n_output > 0) || p->n_banned > 0))
        return "penalties without history";
    return NULL;
}

lm_status cpu_op_sample(kn_stream *s, const struct kn_sample *a)
{
    if (a->n < 0 || a->vocab <= 0 || (a->n > 1 && a->ld < a->vocab) ||
        (a->n && (!a->logits || !a->rows || !a->out_id || !a->workspace)))
        return cpu_refuse("sample", "null pointer or bad shape");
    int64_t work = 0;
    for (int i = 0; i < a->n; i++) {
        const char *fault = row_fault(a, &a->rows[i]);
        if (fault)
            return cpu_refuse("sample", fault);
        work += a->rows[i].temperature > 0 ? 4 * a->vocab : a->vocab / 4;
    }
    struct cpu_stream *st = cpu_stream_of(s);
    struct sample_job j = { a, st->dev->v, slot_bytes(a->vocab) };
    cpu_parallel(st, a->n, 1, work, sample_range, &j);
    return LM_OK;
}
