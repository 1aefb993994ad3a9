/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_bench.c - `loramill bench`: the engine alone, measured through its public interface; with
 * --trace see cmd_bench_replay.c.
 *
 * Else three runs on one model: prefill (a long prompt, one token), decode of one sequence, decode
 * of many sequences over many adapters. Decode rates leave out the first token of each sequence and
 * the time before the earliest of them, so the prefill of later sequences counts against us. A
 * step's time leaves that out, too: it is the mean from the moment when every sequence has its
 * first token to the end of the last one, one token of that sequence a step. Where a sequence has
 * ended before that moment (few tokens, or --max-seqs below --batch) no step has them all, and
 * there is no such figure.
 * Prompts are token ids drawn by a fixed formula, so that a peer can be given the same;
 * end-of-sequence is ignored, sampling is greedy. One JSON line each:
 *     {"name", "value", "unit", "peer": null, "ratio": null}
 * With --start the only figure is the time from the start of the process to the first token of its
 * first request: program, libraries, device, weights, and all that is made before a step can run.
 *
 * With --idle it is what adapters cost steps that use none of them: two engines, one of which holds
 * --dummy adapters in its pool, decode the same batch of base-only requests in turns, --repeat
 * times. The figure is the median of the pairs' ratios, so that neither a clock that changes nor a
 * neighbour on the machine counts against one of the two. Both are pumped on this thread: the same
 * steps each time.
 *
 * tests/bench/run.sh runs a peer beside it and fills in the last two.
 *
 * Every other figure is the best of --repeat runs: on a shared machine the rest measure the
 * neighbours.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "worker/store/adapter_dirs.h"
#include "worker/tools/cmd_bench.h"
#include "worker/tools/commands.h"

struct bench {
    struct bench_args args;
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
    /* Latest first token to end of the last, steps of decode alone; 0: some had ended by then. */
    double steps_s;
    int64_t prompt_tokens, completion_tokens;
    struct engine_stats before, after;
};

static void figure(const char *name, double value, const char *unit)
{
    printf("{\"name\": \"%s\", \"value\": %.6g, \"unit\": \"%s\", \"peer\": null, "
           "\"ratio\": null}\n", name, value, unit);
    fflush(stdout);
}

static lm_status submit_one(struct bench *b, int i, int prompt_tokens, int max_tokens, int distinct,
                            int32_t *ids, struct lm_err *err)
{
    char id[32];
    struct engine_request r = { .id = id, .token_ids = ids, .n_token_ids = prompt_tokens };
    snprintf(id, sizeof id, "bench-%d", i);
    for (int t = 0; t < prompt_tokens; t++)
        ids[t] = trace_token(b->serial, t, b->info.vocab_size);
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
    int64_t first = INT64_MAX, latest = 0, earliest_end = INT64_MAX, finished = 0;
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
            latest = LM_MAX(latest, r->first_token_us);
            earliest_end = LM_MIN(earliest_end, r->finished_us);
            finished = LM_MAX(finished, r->finished_us);
            engine_result_free(ev[i].result);
            if (st != LM_OK)
                return st;
            done++;
        }
        if (state != LM_OK)
            return lm_err_set(err, state, "the engine stopped: %s", lm_status_text(state));
    }
    int64_t end = engine_now_us(b->e) - start_us;
    out->total_s = (double)end / 1e6;
    out->decode_s = (double)LM_MAX(end - first, 1) / 1e6;
    out->steps_s = earliest_end > latest ? (double)(finished - latest) / 1e6 : 0;
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
    int64_t start = engine_now_us(b->e);
    bool idle = false;
    lm_status st = LM_OK;
    for (int i = 0; i < n && st == LM_OK; i++)
        st = submit_one(b, i, prompt_tokens, max_tokens, distinct, ids, err);
    if (st == LM_OK && b->args.idle)
        st = engine_pump(b->e, INT64_MAX, &idle, err);
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
    for (int i = 0; i < b->args.repeat; i++) {
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
    double best = 0, host_us = 0, step_s = 0;
    for (int i = 0; i < b->args.repeat; i++) {
        struct run r;
        lm_status st = run_batch(b, n, b->args.prompt_tokens, b->args.tokens, distinct, &r, err);
        if (st != LM_OK)
            return st;
        double steps = (double)(r.after.steps - r.before.steps);
        double host = steps > 0 ? (double)(r.after.host_us - r.before.host_us) / steps : 0;
        best = LM_MAX(best, (double)(r.completion_tokens - n) / r.decode_s);
        host_us = i == 0 ? host : LM_MIN(host_us, host);
        if (r.steps_s > 0)
            step_s = step_s > 0 ? LM_MIN(step_s, r.steps_s) : r.steps_s;
    }
    char full[64];
    figure(name, best, "tokens/s");
    if (b->args.tokens > 1 && step_s > 0) {
        snprintf(full, sizeof full, "%s_step", name);
        figure(full, step_s * 1e3 / (b->args.tokens - 1), "ms/step");
    }
    snprintf(full, sizeof full, "%s_host", name);
    figure(full, host_us, "us/step");
    return LM_OK;
}

/* Seconds since this process was started, to a hundredth: /proc counts in ticks. */
static double process_age_s(void)
{
    char line[1024];
    FILE *f = fopen("/proc/self/stat", "re");
    size_t n = f ? fread(line, 1, sizeof line - 1, f) : 0;
    struct timespec now;
    unsigned long long ticks = 0;
    if (f)
        fclose(f);
    line[n] = '\0';
    char *at = strrchr(line, ')');      /* fields 3 to 21 follow; 22 is the start */
    if (!at || sscanf(at, ") %*c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s "
                          "%*s %*s %llu", &ticks) != 1)
        return -1;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9 -
           (double)ticks / (double)sysconf(_SC_CLK_TCK);
}

static lm_status bench_start(struct bench *b, double opened_s, struct lm_err *err)
{
    struct run r;
    int len = LM_MIN(b->args.prompt_tokens, b->info.max_model_len - 1);
    lm_status st = run_batch(b, 1, len, 1, 0, &r, err);
    double s = process_age_s();
    if (st == LM_OK && s < 0)
        st = lm_err_set(err, LM_UNSUPPORTED, "/proc/self/stat doesn't say when the process began");
    if (st != LM_OK)
        return st;
    figure("start_to_open", opened_s, "s");
    figure("start_to_first_token", s, "s");
    return LM_OK;
}

/* ---- adapters that nobody uses --------------------------------------------------------- */

static int by_size(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Milliseconds of a step in which `batch` base-only requests decode. */
static lm_status base_step(struct bench *b, double *ms, struct lm_err *err)
{
    struct run r;
    lm_status st = run_batch(b, b->args.batch, b->args.prompt_tokens, b->args.tokens, 0, &r, err);
    if (st == LM_OK && r.steps_s <= 0)
        st = lm_err_set(err, LM_INVALID, "no step has all %d sequences: more --tokens are needed",
                        b->args.batch);
    if (st == LM_OK)
        *ms = r.steps_s * 1e3 / (b->args.tokens - 1);
    return st;
}

/* Each engine first in every second pair. Sorts what it leaves. */
static lm_status idle_pairs(struct bench *none, struct bench *held, int n, double *ratio,
                            double least[2], struct lm_err *err)
{
    lm_status st = LM_OK;
    for (int i = -1; i < n && st == LM_OK; i++) {       /* the first pair warms up */
        double ms[2];
        st = base_step(i % 2 ? none : held, &ms[i % 2 == 0], err);
        if (st == LM_OK)
            st = base_step(i % 2 ? held : none, &ms[i % 2 != 0], err);
        if (st != LM_OK || i < 0)
            continue;
        ratio[i] = ms[0] / ms[1];
        for (int k = 0; k < 2; k++)
            least[k] = i == 0 ? ms[k] : LM_MIN(least[k], ms[k]);
    }
    qsort(ratio, (size_t)n, sizeof *ratio, by_size);
    return st;
}

static lm_status compare_idle(struct bench *none, struct bench *held, struct lm_err *err)
{
    const int n = held->args.repeat;
    double least[2] = { 0 }, *ratio = lm_calloc((size_t)n, sizeof *ratio);
    struct run r;
    struct engine_stats s;
    if (!ratio)
        return lm_err_set(err, LM_NOMEM, "no memory for %d figures", n);
    lm_status st = run_batch(held, held->n_adapters, 4, 1, held->n_adapters, &r, err);
    if (st == LM_OK)
        st = idle_pairs(none, held, n, ratio, least, err);
    engine_stats(held->e, &s);
    if (st == LM_OK)
        printf("{\"name\": \"idle_adapters\", \"value\": %.5g, \"unit\": \"x\", \"peer\": null, "
               "\"ratio\": null, \"adapters\": %d, \"resident\": %d, \"pairs\": %d, "
               "\"lowest\": %.5g, \"highest\": %.5g, \"step_ms\": %.5g, "
               "\"step_ms_held\": %.5g}\n", (ratio[(n - 1) / 2] + ratio[n / 2]) / 2,
               held->n_adapters, s.adapters_resident, n, ratio[0], ratio[n - 1], least[0],
               least[1]);
    free(ratio);
    return st;
}

/* `held` has its adapters in host memory already. */
static lm_status bench_idle(struct bench *held, const struct engine_config *cfg,
                            struct lm_err *err)
{
    struct bench none = { .args = held->args, .info = held->info };
    lm_status st = engine_open(cfg, &none.e, err);
    if (st != LM_OK)
        return st;
    st = compare_idle(&none, held, err);
    engine_close(none.e);
    return st;
}

/* ---- all of them ----------------------------------------------------------------------- */

static lm_status bench_all(struct bench *b, struct lm_err *err)
{
    lm_status st = bench_prefill(b, err);
    if (st == LM_OK)
        st = bench_decode(b, "decode_batch1", 1, 0, err);
    if (st == LM_OK)
        st = bench_decode(b, "decode_base", b->args.batch, 0, err);
    if (st == LM_OK && b->n_adapters)
        st = bench_decode(b, "decode_adapters", b->args.batch, b->n_adapters, err);
    return st;
}

/* ---- set-up ---------------------------------------------------------------------------- */

static lm_status keep_adapter(struct bench *b, engine_adapter *a, struct lm_err *err)
{
    engine_adapter **grown = lm_reallocarray(b->adapter, (size_t)b->n_adapters + 1, sizeof *grown);
    if (!grown) {
        engine_adapter_unref(a);
        return lm_err_set(err, LM_NOMEM, "no memory for the list of adapters");
    }
    b->adapter = grown;
    b->adapter[b->n_adapters++] = a;
    return LM_OK;
}

static lm_status load_adapter(void *ctx, const char *id, const char *dir, struct lm_err *err)
{
    struct bench *b = ctx;
    engine_adapter *a;
    lm_status st = engine_adapter_load(b->e, id, dir, &a, err);
    return st == LM_OK ? keep_adapter(b, a, err) : st;
}

static lm_status make_adapters(struct bench *b, struct lm_err *err)
{
    lm_status st = LM_OK;
    for (int i = 0; i < b->args.dummy && st == LM_OK; i++) {
        char id[32];
        engine_adapter *a;
        snprintf(id, sizeof id, "dummy-%d", i);
        st = engine_adapter_dummy(b->e, id, b->args.rank, b->args.modules, &a, err);
        if (st == LM_OK)
            st = keep_adapter(b, a, err);
    }
    return st;
}

static lm_status fixed_figures(struct bench *b, struct lm_err *err)
{
    const struct bench_args *a = &b->args;
    struct engine_config cfg = {
        .model_dir = a->model, .shape = a->shape, .backend = a->backend, .sim = a->sim,
        .threads = a->threads, .pool_bytes = a->pool_bytes, .block_tokens = a->block_tokens,
        .kv = a->kv, .weights = a->weights, .shape_layers = a->layers,
        .max_seqs = a->max_seqs ? a->max_seqs : a->batch, .max_step_tokens = a->max_step_tokens,
        .max_waiting = LM_MAX(a->batch, a->idle ? a->dummy : 0) + 1,
        .host_adapter_bytes = a->host_adapter_bytes, .policy = &a->policy, .manual = a->idle,
    };
    lm_status st = engine_open(&cfg, &b->e, err);
    if (st != LM_OK)
        return st;
    double opened_s = process_age_s();
    engine_info(b->e, &b->info);
    if (a->adapters)
        st = adapter_dirs_each(a->adapters, load_adapter, b, err);
    else
        st = make_adapters(b, err);
    if (st == LM_OK)
        st = a->start ? bench_start(b, opened_s, err)
                      : a->idle ? bench_idle(b, &cfg, err) : bench_all(b, err);
    for (int i = 0; i < b->n_adapters; i++)
        engine_adapter_unref(b->adapter[i]);
    free(b->adapter);
    engine_close(b->e);
    return st;
}

static lm_status replay_trace(const struct bench_args *a, struct lm_err *err)
{
    struct trace t;
    struct replay r = { 0 };
    lm_status st = trace_load(a->trace, &t, err);
    if (st != LM_OK)
        return st;
    st = bench_replay(a, &t, &r, err);
    free(r.outcome);
    trace_release(&t);
    return st;
}

int cmd_bench(int argc, char **argv)
{
    struct bench b = { 0 };
    struct lm_err err = { 0 };
    int status = bench_parse(&b.args, argc, argv);
    if (status != 0)
        return status < 0 ? 0 : status;
    lm_status st = b.args.trace ? replay_trace(&b.args, &err) : fixed_figures(&b, &err);
    if (st != LM_OK)
        fprintf(stderr, "loramill bench: %s\n", err.msg);
    return st != LM_OK;
}
