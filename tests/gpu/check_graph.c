/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check_graph.c - decode steps as recorded (CUDA graphs) against each operation by itself.
 *
 * Two layers of llama-2-7b's shape with made-up weights. The same requests run once piece by piece,
 * then twice recorded, so that the last time everything runs as recorded before, at batches around
 * the sizes that steps are padded to. Tokens and log-probabilities must be the same to the last
 * bit: padding stays within the bucket that picks kernels, and a graph holds nothing that another
 * step would have had otherwise. Counts prove that graphs ran at all, and that more were recorded
 * than are kept: those that gave way were others by then, in the same executables.
 *
 * One engine, as two would measure and choose cuBLASLt's algorithms for themselves. It is pumped by
 * hand, so every run has the same steps. Some of each batch end early: the sizes below are met as
 * well.
 */
#include "check.h"

#include "engine/engine.h"
#include "engine/step.h"
#include "kernels/cuda/cuda_int.h"

#define SHAPE "ops/shapes/llama-2-7b.json"
#define LAYERS 2
#define MAX_BATCH 300
#define PROMPT 8
#define OUTPUT 12
#define KINDS 3                 /* of adapters: one rank each */
#define ADAPTERS 48

struct bed {
    struct gpu_check *c;
    engine *e;
    engine_adapter *adapter[ADAPTERS];
};

typedef struct engine_result *results[MAX_BATCH];

static bool open_engine(struct bed *b)
{
    static const int ranks[KINDS] = { 8, 16, 64 };
    struct engine_policy policy;
    struct lm_err err = { 0 };
    engine_policy_default(&policy);
    policy.prefix_cache = false;
    struct engine_config cfg = {
        .shape = SHAPE, .shape_layers = LAYERS, .backend = "cuda", .manual = true,
        .pool_bytes = (size_t)2 << 30, .max_seqs = MAX_BATCH, .max_step_tokens = 512,
        .max_waiting = MAX_BATCH, .policy = &policy,
    };
    lm_status st = engine_open(&cfg, &b->e, &err);
    for (int i = 0; i < ADAPTERS && st == LM_OK; i++) {
        char id[16];
        snprintf(id, sizeof id, "a%d", i);
        st = engine_adapter_dummy(b->e, id, ranks[i % KINDS], i % 2 ? 0xfu : 0x7fu,
                                  &b->adapter[i], &err);
    }
    return check_that(b->c, st == LM_OK, "an engine on %s%s", SHAPE, err.msg);
}

static lm_status submit(struct bed *b, int i, int n_adapters, struct lm_err *err)
{
    int32_t ids[PROMPT];
    struct engine_request q = { .id = "graph", .token_ids = ids, .n_token_ids = PROMPT - i % 4,
                                .user = (void *)(intptr_t)i };
    engine_handle h;
    engine_params_default(&q.params);
    for (int k = 0; k < PROMPT; k++)
        ids[k] = 5 + (i * 131 + k * 7919) % 30000;
    q.params.max_tokens = OUTPUT - i % 3;
    q.params.ignore_eos = true;
    q.params.temperature = i % 4 ? 0 : 0.7f;
    q.params.seed = (uint64_t)i;
    q.params.repetition_penalty = i % 8 == 1 ? 1.1f : 1;
    q.params.logprobs = 1;
    q.params.set = ~0u;
    if (n_adapters > 0 && i % 5)        /* a fifth of the rows is base-only */
        q.adapter = b->adapter[i % n_adapters];
    return engine_submit(b->e, &q, &h, err);
}

static bool run_batch(struct bed *b, int n, int n_adapters, bool single, results out)
{
    struct lm_err err = { 0 };
    struct engine_event ev;
    bool idle = false;
    lm_status st = LM_OK;
    int ended = 0;
    step_force_single(single);
    for (int i = 0; i < n && st == LM_OK; i++)
        st = submit(b, i, n_adapters, &err);
    if (st == LM_OK)
        st = engine_pump(b->e, INT64_MAX, &idle, &err);
    while (st == LM_OK && engine_poll(b->e, &ev, 1, 0, NULL) == 1) {
        out[(intptr_t)ev.user] = ev.result;
        ended += ev.result->status == LM_OK;
    }
    step_force_single(false);
    return st == LM_OK && ended == n;
}

/* Tokens of which any bit of the log-probability differs, or themselves. */
static int differences(results x, results y, int n, int *tokens)
{
    int bad = 0;
    for (int i = 0; i < n; i++) {
        const struct engine_choice *a = &x[i]->choices[0], *b = &y[i]->choices[0];
        *tokens += a->n_tokens;
        if (a->n_tokens != b->n_tokens || a->n_logprobs != b->n_logprobs) {
            bad++;
            continue;
        }
        for (int t = 0; t < a->n_logprobs; t++)
            bad += a->logprobs[t].id != b->logprobs[t].id ||
                   memcmp(&a->logprobs[t].logprob, &b->logprobs[t].logprob, sizeof(float)) != 0;
    }
    return bad;
}

static void free_results(results r)
{
    for (int i = 0; i < MAX_BATCH; i++)
        engine_result_free(r[i]);
}

static void compare(struct bed *b, int n, int n_adapters)
{
    results single = { 0 }, first = { 0 }, again = { 0 };
    int bad = 0, tokens = 0;
    struct cuda_graph_counts c0, c1, c2, c3;
    cuda_graph_count(&c0);
    bool ran = run_batch(b, n, n_adapters, true, single);
    cuda_graph_count(&c1);
    ran = ran && run_batch(b, n, n_adapters, false, first);
    cuda_graph_count(&c2);
    ran = ran && run_batch(b, n, n_adapters, false, again);
    cuda_graph_count(&c3);
    check_that(b->c, c1.recorded == c0.recorded && c1.run_again == c0.run_again &&
                     c3.run_again > c2.run_again,
               "batch %d, %d adapters: no graph runs piece by piece; then %d are recorded, %d "
               "runs of them", n, n_adapters, (int)(c3.recorded - c1.recorded),
               (int)(c3.run_again - c1.run_again));
    if (ran)
        bad = differences(single, first, n, &tokens) + differences(single, again, n, &tokens);
    check_that(b->c, ran && bad == 0 && tokens > n,
               "batch %d, %d adapters: %d of %d tokens differ between recorded steps and single "
               "operations%s", n, n_adapters, bad, tokens, ran ? "" : " (a run failed)");
    free_results(single);
    free_results(first);
    free_results(again);
}

/* When a request's adapter has come decides which step takes it: let all have come. */
static bool all_resident(struct bed *b)
{
    results r = { 0 };
    bool ran = run_batch(b, MAX_BATCH, ADAPTERS, true, r);
    free_results(r);
    return check_that(b->c, ran, "%d adapters are loaded", ADAPTERS);
}

void check_graph(struct gpu_check *c)
{
    static const int batch[] = { 1, 2, 3, 5, 6, 9, 17, 33, 41, 57, 64, 65, 81, 113, 256,
                                 MAX_BATCH };
    struct cuda_graph_counts n;
    struct bed b = { .c = c };
    if (open_engine(&b) && all_resident(&b))
        for (size_t i = 0; i < LM_COUNT(batch); i++)
            for (int adapters = 0; adapters <= ADAPTERS; adapters += ADAPTERS / 2)
                compare(&b, batch[i], adapters);
    cuda_graph_count(&n);
    check_that(c, n.evicted > 0 && n.recorded > n.evicted && n.run_again > n.recorded,
               "graphs: %d recorded, %d gave way, %d runs", (int)n.recorded, (int)n.evicted,
               (int)n.run_again);
    for (int i = 0; i < ADAPTERS; i++)
        engine_adapter_unref(b.adapter[i]);
    engine_close(b.e);
}
