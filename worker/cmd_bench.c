/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_bench.c - `loramill bench`: the engine alone, measured through its public interface.
 *
 * Three runs on one model: prefill (a long prompt, one token), decode of one sequence, decode of
 * many sequences over many adapters. Decode rates leave out the first token of each sequence and
 * the time before the earliest of them, so the prefill of later sequences counts against us.
 * Prompts are token ids drawn by a fixed formula, so that a peer can be given the same;
 * end-of-sequence is ignored, sampling is greedy. One JSON line each:
 *     {"name", "value", "unit", "peer": null, "ratio": null}
 * tests/bench/run.sh runs a peer beside it and fills in the last two.
 *
 * Every figure is the best of --repeat runs: on a shared machine the others measure the neighbours.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/engine.h"
#include "worker/adapter_dirs.h"
#include "worker/commands.h"

struct bench {
    const char *model, *adapters, *backend;
    int threads, prompt_tokens, tokens, batch, repeat;
    engine *e;
    struct engine_info info;
    engine_adapter **adapter;
    int n_adapters;
    int64_t serial;             /* of the request: no two share a prompt, so no cached prefix */
};

/* What one run of a batch of requests took. */
struct run {
    double total_s;             /* submit of the first to end of the last */
    double decode_s;            /* earliest first token to end of the last */
    int64_t prompt_tokens, completion_tokens;
    struct engine_stats before, after;
};

static void figure(const char *name, double value, const char *unit)
{
    printf("{\"name\": \"%s\", \"value\": %.6g, \"unit\": \"%s\", \"peer\": null, "
           "\"ratio\": null}\n", name, value, unit);
    fflush(stdout);
}

/* The trace formula: token t of request i. Any engine that is compared uses the same. */
static int32_t bench_token(int64_t i, int64_t t, int vocab)
{
    return (int32_t)(10 + (i * 7919 + t * 104729 + (i ^ t) * 31) % (vocab - 20));
}

static lm_status submit_one(struct bench *b, int i, int prompt_tokens, int max_tokens, int distinct,
                            int32_t *ids, struct lm_err *err)
{
    char id[32];
    struct engine_request r = { .id = id, .token_ids = ids, .n_token_ids = prompt_tokens };
    snprintf(id, sizeof id, "bench-%d", i);
    for (int t = 0; t < prompt_tokens; t++)
        ids[t] = bench_token(b->serial, t, b->info.vocab_size);
    b->serial++;
    engine_params_default(&r.params);
    r.params.max_tokens = max_tokens;
    r.params.temperature = 0;
    r.params.set |= ENGINE_SET_TEMPERATURE | ENGINE_SET_MAX_TOKENS;
    r.params.ignore_eos = true;
    if (distinct > 0)
        r.adapter = b->adapter[i % distinct];
    engine_handle h;
    return engine_submit(b->e, &r, &h, err);
}

/* Takes results until `n` requests have ended. */
static lm_status await_all(struct bench *b, int n, struct run *out, int64_t start_us,
                           struct lm_err *err)
{
    int64_t first = INT64_MAX;
    for (int done = 0; done < n;) {
        struct engine_event ev[64];
        lm_status state = LM_OK;
        int k = engine_poll(b->e, ev, (int)LM_COUNT(ev), 1000, &state);
        for (int i = 0; i < k; i++) {
            if (ev[i].kind != ENGINE_FINISHED) {
                free(ev[i].text);
                continue;
            }
            const struct engine_result *r = ev[i].result;
            lm_status st = r->status;
            if (st != LM_OK)
                lm_err_set(err, st, "a request failed: %s", r->error);
            out->prompt_tokens += r->prompt_tokens;
            out->completion_tokens += r->completion_tokens;
            first = LM_MIN(first, r->first_token_us);
            engine_result_free(ev[i].result);
            if (st != LM_OK)
                return st;
            done++;
        }
        if (state != LM_OK)
            return lm_err_set(err, state, "the engine stopped: %s", lm_status_text(state));
    }
    int64_t end = lm_now_us() - start_us;
    out->total_s = (double)end / 1e6;
    out->decode_s = (double)LM_MAX(end - first, 1) / 1e6;
    return LM_OK;
}

static lm_status run_batch(struct bench *b, int n, int prompt_tokens, int max_tokens, int distinct,
                           struct run *out, struct lm_err *err)
{
    memset(out, 0, sizeof *out);
    int32_t *ids = lm_calloc((size_t)prompt_tokens, sizeof *ids);
    if (!ids)
        return lm_err_set(err, LM_NOMEM, "no memory for %d prompt tokens", prompt_tokens);
    engine_stats(b->e, &out->before);
    int64_t start = lm_now_us();
    lm_status st = LM_OK;
    for (int i = 0; i < n && st == LM_OK; i++)
        st = submit_one(b, i, prompt_tokens, max_tokens, distinct, ids, err);
    if (st == LM_OK)
        st = await_all(b, n, out, start, err);
    engine_stats(b->e, &out->after);
    free(ids);
    return st;
}

/* ---- the figures ----------------------------------------------------------------------- */

static lm_status bench_prefill(struct bench *b, struct lm_err *err)
{
    double best = 0;
    int len = LM_MIN(b->info.max_model_len - 1, 512);
    for (int i = 0; i < b->repeat; i++) {
        struct run r;
        lm_status st = run_batch(b, 1, len, 1, 0, &r, err);
        if (st != LM_OK)
            return st;
        best = LM_MAX(best, (double)r.prompt_tokens / r.total_s);
    }
    figure("prefill", best, "tokens/s");
    return LM_OK;
}

static lm_status bench_decode(struct bench *b, const char *name, int n, int distinct,
                              struct lm_err *err)
{
    double best = 0, host_us = 0;
    for (int i = 0; i < b->repeat; i++) {
        struct run r;
        lm_status st = run_batch(b, n, b->prompt_tokens, b->tokens, distinct, &r, err);
        if (st != LM_OK)
            return st;
        double steps = (double)(r.after.steps - r.before.steps);
        double host = steps > 0 ? (double)(r.after.host_us - r.before.host_us) / steps : 0;
        best = LM_MAX(best, (double)(r.completion_tokens - n) / r.decode_s);
        host_us = i == 0 ? host : LM_MIN(host_us, host);
    }
    char full[64];
    figure(name, best, "tokens/s");
    snprintf(full, sizeof full, "%s_host", name);
    figure(full, host_us, "us/step");
    return LM_OK;
}

static lm_status bench_all(struct bench *b, struct lm_err *err)
{
    lm_status st = bench_prefill(b, err);
    if (st == LM_OK)
        st = bench_decode(b, "decode_batch1", 1, 0, err);
    if (st == LM_OK)
        st = bench_decode(b, "decode_base", b->batch, 0, err);
    if (st == LM_OK && b->n_adapters)
        st = bench_decode(b, "decode_adapters", b->batch, b->n_adapters, err);
    return st;
}

/* ---- set-up ---------------------------------------------------------------------------- */

static lm_status load_adapter(void *ctx, const char *id, const char *dir, struct lm_err *err)
{
    struct bench *b = ctx;
    engine_adapter *a, **grown;
    lm_status st = engine_adapter_load(b->e, id, dir, &a, err);
    if (st != LM_OK)
        return st;
    grown = lm_reallocarray(b->adapter, (size_t)b->n_adapters + 1, sizeof *grown);
    if (!grown) {
        engine_adapter_unref(a);
        return lm_err_set(err, LM_NOMEM, "no memory for the list of adapters");
    }
    b->adapter = grown;
    b->adapter[b->n_adapters++] = a;
    return LM_OK;
}

static int usage(FILE *f, int status)
{
    fprintf(f,
        "usage: loramill bench --model DIR [OPTION]...\n\n"
        "  --model DIR            Hugging Face model folder\n"
        "  --adapters DIR         PEFT folders to decode with, all of them\n"
        "  --backend cpu|cuda     default: cuda where a device works, else cpu\n"
        "  --threads N            CPU cores; default all\n"
        "  --prompt-tokens N      default 32\n"
        "  --tokens N             tokens to decode; default 64\n"
        "  --batch N              sequences at once; default 32\n"
        "  --repeat N             runs of each figure, the best counts; default 3\n\n"
        "Prints one JSON line a figure.\n");
    return status;
}

static int parse_positive(const char *text, int *out)
{
    char *end;
    long v = strtol(text, &end, 10);
    if (*end || v < 1 || v > 1 << 20)
        return -1;
    *out = (int)v;
    return 0;
}

static int parse(struct bench *b, int argc, char **argv)
{
    enum { MODEL = 1, ADAPTERS, BACKEND, THREADS, PROMPT, TOKENS, BATCH, REPEAT, HELP };
    static const struct option options[] = {
        { "model", required_argument, NULL, MODEL },
        { "adapters", required_argument, NULL, ADAPTERS },
        { "backend", required_argument, NULL, BACKEND },
        { "threads", required_argument, NULL, THREADS },
        { "prompt-tokens", required_argument, NULL, PROMPT },
        { "tokens", required_argument, NULL, TOKENS },
        { "batch", required_argument, NULL, BATCH },
        { "repeat", required_argument, NULL, REPEAT },
        { "help", no_argument, NULL, HELP },
        { NULL, 0, NULL, 0 },
    };
    int *number[] = { [THREADS] = &b->threads, [PROMPT] = &b->prompt_tokens,
                      [TOKENS] = &b->tokens, [BATCH] = &b->batch, [REPEAT] = &b->repeat };
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (c) {
        case MODEL: b->model = optarg; break;
        case ADAPTERS: b->adapters = optarg; break;
        case BACKEND: b->backend = optarg; break;
        case HELP: return usage(stdout, -1);
        case THREADS: case PROMPT: case TOKENS: case BATCH: case REPEAT:
            if (parse_positive(optarg, number[c]) == 0)
                break;
            fprintf(stderr, "loramill bench: '%s' is not a positive number\n", optarg);
            return 2;
        default: return usage(stderr, 2);
        }
    }
    if (b->model && optind == argc)
        return 0;
    if (b->model)
        fprintf(stderr, "loramill bench: unexpected argument '%s'\n", argv[optind]);
    else
        fprintf(stderr, "loramill bench: --model is missing\n");
    return usage(stderr, 2);
}

int cmd_bench(int argc, char **argv)
{
    struct bench b = { .prompt_tokens = 32, .tokens = 64, .batch = 32, .repeat = 3 };
    int status = parse(&b, argc, argv);
    if (status != 0)
        return status < 0 ? 0 : status;
    struct lm_err err = { 0 };
    struct engine_config cfg = { .model_dir = b.model, .backend = b.backend,
                                 .threads = b.threads, .max_seqs = LM_MAX(b.batch, 1),
                                 .max_waiting = b.batch + 1 };
    lm_status st = engine_open(&cfg, &b.e, &err);
    if (st == LM_OK) {
        engine_info(b.e, &b.info);
        if (b.adapters)
            st = adapter_dirs_each(b.adapters, load_adapter, &b, &err);
    }
    if (st == LM_OK)
        st = bench_all(&b, &err);
    for (int i = 0; i < b.n_adapters; i++)
        engine_adapter_unref(b.adapter[i]);
    free(b.adapter);
    if (b.e)
        engine_close(b.e);
    if (st != LM_OK)
        fprintf(stderr, "loramill bench: %s\n", err.msg);
    return st != LM_OK;
}
