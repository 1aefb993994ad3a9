/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check_company.c - a request's log-probabilities in any company, bit by bit (rule 5 of kernels.h).
 *
 * Layers of llama-3.1-8b's shape with made-up weights, for its vocabulary of 128,256. Three
 * requests are watched: without an adapter, and with adapters of rank 8 and 300. Each comparison
 * runs them beside others of one kind and then of another: other tokens, other adapters of up to
 * rank 512, other numbers of them and lengths, but every step's counts in the same buckets. What
 * the watched say must not change in a bit. One of the steps is longer than 512 tokens, where LoRA
 * has other kernels; one needs more rows of logits than a slab has.
 *
 * One engine, as two would measure and choose cuBLASLt's algorithms for themselves, pumped by hand.
 */
#include "check.h"

#include "engine/engine.h"

#ifndef SHAPE                   /* as a build for another machine may have it */
#define SHAPE "ops/shapes/llama-3.1-8b.json"
#define BACKEND "cuda"
#endif
#define LAYERS 2
#define WATCHED 3
#define MOST 416                /* requests of a run */
#define OUTPUT 6
#define MAX_PROMPT 160

static const int ranks[] = { 8, 300, 16, 64, 256, 384, 512 };

struct bed {
    struct gpu_check *c;
    engine *e;
    engine_adapter *adapter[LM_COUNT(ranks)];
};

/* Who is beside the watched: `n` requests of `prompt` tokens, which are others for another seed.
 * Their adapters are those from `first` on, in turn; 0: none. */
struct company {
    int n, prompt, seed, first;
};

struct comparison {
    const char *what;
    int prompt;                 /* tokens of a watched request */
    struct company one, other;
};

typedef struct engine_result *results[WATCHED];

static bool open_engine(struct bed *b)
{
    struct engine_policy policy;
    struct lm_err err = { 0 };
    engine_policy_default(&policy);
    policy.prefix_cache = false;
    policy.swap_bytes = 0;
    struct engine_config cfg = {
        .shape = SHAPE, .shape_layers = LAYERS, .backend = BACKEND, .manual = true,
        .pool_bytes = (size_t)4 << 30, .max_seqs = MOST, .max_step_tokens = 2048,
        .max_waiting = MOST, .policy = &policy,
    };
    lm_status st = engine_open(&cfg, &b->e, &err);
    for (size_t i = 0; i < LM_COUNT(ranks) && st == LM_OK; i++) {
        char id[16];
        snprintf(id, sizeof id, "rank%d", ranks[i]);
        st = engine_adapter_dummy(b->e, id, ranks[i], 0x7f, &b->adapter[i], &err);
    }
    return check_that(b->c, st == LM_OK, "an engine on %s%s", SHAPE, err.msg);
}

/* `who` of the watched, or WATCHED for one of the others. */
static lm_status submit(struct bed *b, int who, int prompt, int seed, engine_adapter *adapter)
{
    int32_t ids[MAX_PROMPT];
    struct lm_err err = { 0 };
    struct engine_request q = { .id = "company", .token_ids = ids, .n_token_ids = prompt,
                                .adapter = adapter, .user = (void *)(intptr_t)who };
    engine_handle h;
    engine_params_default(&q.params);
    for (int k = 0; k < prompt; k++)
        ids[k] = 5 + (seed * 131 + k * 7919) % 30000;
    q.params.max_tokens = OUTPUT;
    q.params.ignore_eos = true;
    q.params.temperature = 0;
    q.params.logprobs = 1;
    q.params.set = ~0u;
    return engine_submit(b->e, &q, &h, &err);
}

static lm_status submit_all(struct bed *b, int prompt, const struct company *m)
{
    const int kinds = (int)LM_COUNT(ranks) - m->first;
    lm_status st = LM_OK;
    for (int i = 0; i < m->n && st == LM_OK; i++)
        st = submit(b, WATCHED, m->prompt, m->seed + i,
                    m->first ? b->adapter[m->first + i % kinds] : NULL);
    for (int i = 0; i < WATCHED && st == LM_OK; i++)
        st = submit(b, i, prompt, 7 + i, i ? b->adapter[i - 1] : NULL);
    return st;
}

/* Steps it took, or -1. */
static int run(struct bed *b, int prompt, const struct company *m, results out)
{
    struct engine_stats before, after;
    struct engine_event ev;
    struct lm_err err = { 0 };
    bool idle = false;
    int ended = 0;
    engine_stats(b->e, &before);
    lm_status st = submit_all(b, prompt, m);
    if (st == LM_OK)
        st = engine_pump(b->e, INT64_MAX, &idle, &err);
    while (st == LM_OK && engine_poll(b->e, &ev, 1, 0, NULL) == 1) {
        const int who = (int)(intptr_t)ev.user;
        ended += ev.result->status == LM_OK;
        if (who < WATCHED)
            out[who] = ev.result;
        else
            engine_result_free(ev.result);
    }
    engine_stats(b->e, &after);
    return st == LM_OK && ended == m->n + WATCHED ? (int)(after.steps - before.steps) : -1;
}

static void free_results(results r)
{
    for (int i = 0; i < WATCHED; i++) {
        engine_result_free(r[i]);
        r[i] = NULL;
    }
}

/* Tokens that are others, or of which any bit of the log-probability is. */
static int differences(const struct engine_choice *a, const struct engine_choice *b)
{
    int bad = a->n_logprobs != OUTPUT || b->n_logprobs != OUTPUT;
    for (int t = 0; t < OUTPUT && !bad; t++)
        bad += a->logprobs[t].id != b->logprobs[t].id ||
               memcmp(&a->logprobs[t].logprob, &b->logprobs[t].logprob, sizeof(float)) != 0;
    return bad;
}

static void compare(struct bed *b, const struct comparison *m)
{
    static const char *const names[WATCHED] = { "base-only", "of rank 8", "of rank 300" };
    results one = { 0 }, other = { 0 };
    const int s1 = run(b, m->prompt, &m->one, one), s2 = run(b, m->prompt, &m->other, other);
    bool ran = check_that(b->c, s1 > 0 && s1 == s2, "%s: %d and %d steps", m->what, s1, s2);
    for (int i = 0; i < WATCHED && ran; i++)
        check_that(b->c, differences(&one[i]->choices[0], &other[i]->choices[0]) == 0,
                   "%s: a request %s says the same to the last bit", m->what, names[i]);
    free_results(one);
    free_results(other);
}

/* When a request's adapter has come decides which step takes it: let all have come. */
static bool all_resident(struct bed *b)
{
    const struct company all = { 2 * (int)LM_COUNT(ranks), 4, 1, 1 };
    results r = { 0 };
    bool ran = run(b, 4, &all, r) > 0;
    free_results(r);
    return check_that(b->c, ran, "adapters of rank 8 to 512 are loaded");
}

void check_company(struct gpu_check *c)
{
    /* Tokens and sequences of the prefill step; its rows and the decode steps' are the latter. */
    static const struct comparison all[] = {
        { "4 sequences", 20, { 1, 18, 100, 0 }, { 1, 20, 200, 6 } },        /* 78, 80; 4, 4 */
        { "300 tokens", 60, { 6, 20, 100, 0 }, { 6, 22, 200, 3 } },         /* 300, 312; 9, 9 */
        { "960 tokens", 150, { 20, 25, 100, 0 }, { 20, 28, 200, 4 } },      /* 950, 1010; 23 */
        { "960 tokens of rank 16 beside rank 512", 150, { 20, 25, 1, 2 }, { 18, 30, 9, 6 } },
        { "1,600 tokens in slabs of logits", 4, { 397, 4, 100, 0 }, { 387, 4, 200, 3 } },
        { "1,200 tokens in one slab", 4, { 297, 4, 100, 3 }, { 310, 4, 200, 0 } },
    };
    struct bed b = { .c = c };
    if (open_engine(&b) && all_resident(&b))
        for (size_t i = 0; i < LM_COUNT(all); i++)
            compare(&b, &all[i]);
    for (size_t i = 0; i < LM_COUNT(ranks); i++)
        engine_adapter_unref(b.adapter[i]);
    engine_close(b.e);
}
