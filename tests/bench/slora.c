/* SPDX-License-Identifier: Apache-2.0 */
/*
 * slora.c - S-LoRA's own policy (Sheng et al., arXiv 2311.03285) on the simulated device, to
 * calibrate its description against the published results and to stand beside ours.
 *
 *   slora --sim FILE --shape FILE --trace FILE --cells N [--queue fcfs|lcfs|abort] [--slo S]
 *
 * What it reproduces, from the paper and the released code:
 *  - Admission by the worst case: with remaining outputs sorted downwards, max_i(left_i * i +
 *    sum of lengths so far) must stay below the cells that distinct adapters (4 * rank each) leave;
 *    the first request that does not fit ends the batch. A prefill batch is at most
 *    max(cells / 6, 3072) tokens, a running batch 1000 requests.
 *  - A batch of new requests is prefilled alone while all decodes stall; between two admissions lie
 *    10 decode steps (or fewer when nothing could be admitted before).
 *  - Adapters are loaded for a batch while it waits, each weight crossing PCIe twice, in 2 copies a
 *    layer, and dropped as soon as no running request uses them.
 *  - Early abort: those that wait 5.5 s of 6 are dropped; newest first while more arrive than are
 *    admitted (both smoothed), else oldest first. LCFS: newest first, nothing dropped.
 *
 * What it leaves out: MBGMM (prefill gathers weights token by token, as BGMV does; the released
 * gate for MBGMM is rarely met), separate launches for q, k and v (the fitted launch cost has it),
 * tokenisation and HTTP.
 *
 * Steps go through the engine's own forward.c, so both policies pay the same prices.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/forward.h"
#include "kernels/sim/sim.h"
#include "worker/tools/cmd_bench.h"

#define MAX_BATCH 1000
#define DECODES 10              /* between two admissions */
#define MAX_REQUEST 3072        /* tokens, input and output */
#define ABORT_MARGIN_S 0.5

enum queue { FCFS, LCFS, ABORT };

struct item {
    const struct trace_item *t;
    int done;                   /* tokens generated */
    double first_s, end_s;      /* since arrival; 0: never */
};

struct world {
    kn_device *dev;
    struct model_config model;
    struct weights weights;
    struct forward *forward;
    kn_stream *stream;
    struct kn_pool pool;
    void *pool_memory;
    char *host, *device;        /* a step's metadata */
    size_t meta_bytes;

    enum queue queue;
    int cells, batch_tokens;
    double slo_s;
    struct trace trace;
    struct item *item;
    int n_arrived;
    int *waiting, n_waiting;    /* oldest first */
    int running[MAX_BATCH], n_running;
    unsigned char *resident;    /* [n_adapters] */
    int *users;                 /* [n_adapters] running requests */
    int decodes;                /* since the last admission */
    int rate, batch, last_waiting;      /* of the abort queue, smoothed */
    int64_t loaded_bytes;
    int loads, aborted;
};

static void die(const char *what, const struct lm_err *err)
{
    fprintf(stderr, "slora: %s%s%s\n", what, err ? ": " : "", err ? err->msg : "");
    exit(1);
}

static double now_s(const struct world *w)
{
    return (double)kn_now_us(w->dev) / 1e6;
}

/* ---- a step ---------------------------------------------------------------------------- */

static int adapter_cells(const struct trace_item *t)
{
    return 4 * t->rank;
}

/* Query counts q [n] of requests req [n]. Weights are gathered for each token: its cost is in the
 * description (lora_token_gbps), so a request is a segment. */
static void step(struct world *w, const int *req, int n, bool prefill)
{
    int n_tok = 0, n_segs = 0;
    int32_t *q_start = (int32_t *)w->host, *kv_len = q_start + MAX_BATCH + 1;
    struct kn_sample_row *rows = (struct kn_sample_row *)(kv_len + MAX_BATCH + 63);
    struct kn_lora_seg *segs = (struct kn_lora_seg *)(rows + MAX_BATCH);
    struct kn_lora_batch lora = { 0 };
    int max_q = 0, max_kv = 0;
    q_start[0] = 0;
    for (int i = 0; i < n; i++) {
        const struct item *it = &w->item[req[i]];
        int q = prefill ? it->t->prompt : 1;
        kv_len[i] = it->t->prompt + it->done;
        rows[i] = (struct kn_sample_row){ .forced = 0, .repetition_penalty = 1, .top_p = 1 };
        if (it->t->adapter >= 0) {
            segs[n_segs++] = (struct kn_lora_seg){ n_tok, q, 0, it->t->rank,
                                                   (int32_t)lora.h_rows };
            lora.h_rows += q * it->t->rank;
            for (int m = KN_Q; m <= KN_O; m++) {
                lora.load[m].rank_sum += it->t->rank;
                lora.load[m].rank_tok += it->t->rank * q;
            }
        }
        n_tok += q;
        q_start[i + 1] = n_tok;
        max_q = LM_MAX(max_q, q);
        max_kv = LM_MAX(max_kv, kv_len[i]);
    }
    lora.segs = (struct kn_lora_seg *)(w->device + ((char *)segs - w->host));
    lora.n_segs = n_segs;
    lora.n_tok = n_tok;
    const int32_t *dev_ids = (int32_t *)w->device;
    struct step_batch b = {
        .n_tok = n_tok, .n_seqs = n, .n_rows = n, .max_q = max_q, .max_kv = max_kv,
        .ids = dev_ids, .pos = dev_ids, .slot = (int64_t *)w->device, .q_start = dev_ids,
        .kv_len = (int32_t *)(w->device + ((char *)kv_len - w->host)), .block_table = dev_ids,
        .lora = lora, .row_idx = dev_ids, .history = dev_ids,
        .rows = (struct kn_sample_row *)(w->device + ((char *)rows - w->host)),
    };
    struct lm_err err = { 0 };
    if (kn_copy_in(w->stream, w->device, w->host, w->meta_bytes) != LM_OK ||
        forward_run(w->forward, w->stream, &w->pool, &b) != LM_OK ||
        kn_copy_out(w->stream, w->host, forward_output(w->forward)->id, (size_t)n * 4) != LM_OK ||
        kn_stream_sync(w->stream, &err) != LM_OK)
        die("a step failed", &err);
}

/* ---- adapters -------------------------------------------------------------------------- */

static void load(struct world *w, const struct trace_item *t)
{
    int layers = w->model.n_layers;
    /* A and B of four square matrices, each copied whole to keep one half. */
    size_t bytes = (size_t)8 * (size_t)w->model.hidden * (size_t)t->rank * 2 * (size_t)layers;
    size_t piece = bytes / (size_t)layers;
    if (t->adapter < 0 || w->resident[t->adapter])
        return;
    w->resident[t->adapter] = 1;
    for (int i = 0; i < 2 * layers; i++)        /* a copy, and a scatter of the half it keeps */
        if (kn_copy_in(w->stream, w->pool_memory, w->pool_memory, piece) != LM_OK ||
            kn_copy(w->stream, w->pool_memory, w->pool_memory, piece / 2) != LM_OK)
            die("a load failed", NULL);
    w->loads++;
    w->loaded_bytes += 2 * (int64_t)bytes;
}

static void drop_unused(struct world *w)
{
    for (int i = 0; i < w->trace.n_adapters; i++)
        if (w->users[i] == 0)
            w->resident[i] = 0;
}

/* ---- admission ------------------------------------------------------------------------- */

struct admission {
    int has[MAX_BATCH + 1], left[MAX_BATCH + 1], n;     /* by falling `left` */
    int adapter_cells;
    int met[MAX_BATCH + 1], n_met;
};

static void meet_adapter(struct admission *a, const struct trace_item *t)
{
    for (int i = 0; i < a->n_met; i++)
        if (a->met[i] == t->adapter)
            return;
    if (t->adapter >= 0) {
        a->met[a->n_met++] = t->adapter;
        a->adapter_cells += adapter_cells(t);
    }
}

static void add(struct admission *a, int has, int left)
{
    int i = a->n++;
    for (; i > 0 && a->left[i - 1] < left; i--) {
        a->left[i] = a->left[i - 1];
        a->has[i] = a->has[i - 1];
    }
    a->left[i] = left;
    a->has[i] = has;
}

static bool can_add(const struct world *w, struct admission *a, const struct trace_item *t)
{
    if (a->n >= MAX_BATCH)
        return false;
    meet_adapter(a, t);
    add(a, t->prompt + 1, t->output - 1);
    int64_t run = 0, need = 0;
    for (int i = 0; i < a->n; i++) {
        run += a->has[i];
        need = LM_MAX(need, (int64_t)a->left[i] * (i + 1) + run);
    }
    return need < w->cells - a->adapter_cells;
}

static void take_out(struct world *w, int at)
{
    memmove(&w->waiting[at], &w->waiting[at + 1],
            (size_t)(--w->n_waiting - at) * sizeof *w->waiting);
}

static void abort_late(struct world *w)
{
    int n = 0;
    for (int i = 0; i < w->n_waiting; i++) {
        const struct item *it = &w->item[w->waiting[i]];
        if (now_s(w) - (double)it->t->arrival_us / 1e6 + ABORT_MARGIN_S >= w->slo_s)
            w->aborted++;
        else
            w->waiting[n++] = w->waiting[i];
    }
    w->n_waiting = n;
}

/* Fills `out` with those admitted now. */
static int new_batch(struct world *w, int *out)
{
    static struct admission a;
    int n = 0, tokens = 0;
    bool newest = w->queue == LCFS;
    if (w->n_running >= MAX_BATCH)
        return 0;
    if (w->queue == ABORT) {
        abort_late(w);
        w->rate = (int)(0.7 * (w->n_waiting - w->last_waiting) + 0.3 * w->rate);
        newest = w->rate >= w->batch;
    }
    a.n = a.adapter_cells = a.n_met = 0;
    for (int i = 0; i < w->n_running; i++) {
        const struct item *it = &w->item[w->running[i]];
        meet_adapter(&a, it->t);
        add(&a, it->t->prompt + it->done, it->t->output - it->done - 1);
    }
    while (w->n_waiting > 0) {
        int at = newest ? w->n_waiting - 1 : 0;
        const struct trace_item *t = w->item[w->waiting[at]].t;
        if (!can_add(w, &a, t) || tokens + t->prompt > w->batch_tokens)
            break;
        tokens += t->prompt;
        out[n++] = w->waiting[at];
        take_out(w, at);
    }
    if (w->queue == ABORT) {
        w->batch = LM_MAX((int)(0.7 * n + 0.3 * w->batch), 1);
        w->last_waiting = w->n_waiting;
    }
    return n;
}

/* ---- the loop -------------------------------------------------------------------------- */

static void take_arrivals(struct world *w)
{
    while (w->n_arrived < w->trace.n &&
           w->trace.item[w->n_arrived].arrival_us <= kn_now_us(w->dev))
        w->waiting[w->n_waiting++] = w->n_arrived++;
}

/* Each request of the step has one more token; those at their end leave. */
static void count_tokens(struct world *w, const int *req, int n)
{
    for (int i = 0; i < n; i++) {
        struct item *it = &w->item[req[i]];
        double since = now_s(w) - (double)it->t->arrival_us / 1e6;
        if (it->done++ == 0)
            it->first_s = since;
        if (it->done == it->t->output)
            it->end_s = since;
    }
}

static void filter(struct world *w)
{
    int n = 0;
    for (int i = 0; i < w->n_running; i++) {
        const struct item *it = &w->item[w->running[i]];
        if (it->end_s == 0)
            w->running[n++] = w->running[i];
        else if (it->t->adapter >= 0)
            w->users[it->t->adapter]--;
    }
    if (n < w->n_running) {
        w->n_running = n;
        drop_unused(w);
    }
}

static bool admit(struct world *w)
{
    int batch[MAX_BATCH], n = new_batch(w, batch);
    if (n == 0)
        return false;
    for (int i = 0; i < n; i++) {
        const struct trace_item *t = w->item[batch[i]].t;
        load(w, t);
        if (t->adapter >= 0)
            w->users[t->adapter]++;
    }
    step(w, batch, n, true);
    count_tokens(w, batch, n);
    memcpy(w->running + w->n_running, batch, (size_t)n * sizeof *batch);
    w->n_running += n;
    w->decodes = 0;
    filter(w);
    return true;
}

static void decode(struct world *w)
{
    int batch[MAX_BATCH], n = w->n_running;
    memcpy(batch, w->running, (size_t)n * sizeof *batch);
    step(w, batch, n, false);
    count_tokens(w, batch, n);
    filter(w);
    w->decodes++;
}

static void run(struct world *w)
{
    for (;;) {
        take_arrivals(w);
        if (w->n_running == 0) {
            if (admit(w))
                continue;
            if (w->n_arrived == w->trace.n && w->n_waiting == 0)
                return;
            int64_t poll = kn_now_us(w->dev) + 10000;   /* the router's idle rhythm */
            if (w->n_waiting == 0 && w->n_arrived < w->trace.n)
                poll = LM_MAX(poll, w->trace.item[w->n_arrived].arrival_us);
            kn_advance(w->dev, poll);
        } else if (w->decodes < DECODES || !admit(w)) {
            decode(w);
        }
    }
}

/* ---- set-up and report ----------------------------------------------------------------- */

static void open_world(struct world *w, const char *sim, const char *shape, const char *trace)
{
    struct lm_err err = { 0 };
    struct kn_open_params p = { .sim = sim };
    if (trace_load(trace, &w->trace, &err) != LM_OK ||
        model_config_load_file(shape, &w->model, &err) != LM_OK ||
        kn_open("sim", &p, &w->dev, &err) != LM_OK ||
        weights_fill(&w->model, w->dev, (struct shard){ 0, 1 }, WEIGHTS_STORED, &w->weights,
                     &err) != LM_OK)
        die("opening", &err);
    w->batch_tokens = LM_MAX(w->cells / 6, MAX_REQUEST);
    w->meta_bytes = 1 << 20;
    struct forward_params fp = {
        .model = &w->model, .weights = &w->weights, .dev = w->dev, .shard = { 0, 1 },
        .max_tokens = w->batch_tokens, .lora_rows = w->batch_tokens, .block_tokens = 1,
    };
    void *host, *device;
    size_t pool = (size_t)w->cells * (size_t)w->model.n_layers * (size_t)w->model.kv_heads *
                  (size_t)w->model.head_dim * 4;
    if (forward_new(&fp, &w->forward, &err) != LM_OK ||
        kn_stream_new(w->dev, &w->stream, &err) != LM_OK ||
        kn_alloc(w->dev, pool, &w->pool_memory, &err) != LM_OK ||
        kn_host_alloc(w->dev, w->meta_bytes, &host, &err) != LM_OK ||
        kn_alloc(w->dev, w->meta_bytes, &device, &err) != LM_OK)
        die("opening", &err);
    w->host = host;
    w->device = device;
    w->pool = (struct kn_pool){ w->pool_memory, w->cells, w->model.n_layers, 16,
                                 KN_KV_NATIVE };
    w->item = lm_calloc((size_t)w->trace.n, sizeof *w->item);
    w->waiting = lm_calloc((size_t)w->trace.n, sizeof *w->waiting);
    w->resident = lm_calloc((size_t)w->trace.n_adapters + 1, 1);
    w->users = lm_calloc((size_t)w->trace.n_adapters + 1, sizeof *w->users);
    if (!w->item || !w->waiting || !w->resident || !w->users)
        die("no memory", NULL);
    for (int i = 0; i < w->trace.n; i++)
        w->item[i].t = &w->trace.item[i];
}

static void report(const struct world *w, const char *label)
{
    double end = 0, latency = 0, ttft = 0, token = 0, satisfaction = 0, tokens = 0;
    int done = 0, in_time = 0;
    for (int i = 0; i < w->trace.n; i++) {
        const struct item *it = &w->item[i];
        if (it->end_s == 0)
            continue;
        done++;
        tokens += it->done;
        latency += it->end_s;
        ttft += it->first_s;
        token += (it->end_s - it->first_s) / LM_MAX(it->done - 1, 1);
        end = end > it->end_s + (double)it->t->arrival_us / 1e6
                  ? end : it->end_s + (double)it->t->arrival_us / 1e6;
        if (it->first_s < w->slo_s) {
            in_time++;
            satisfaction += 1 - it->first_s * it->first_s / (w->slo_s * w->slo_s);
        }
    }
    struct sim_counters c;
    kn_sim_counters(w->dev, &c);
    printf("{\"label\": \"%s\", \"requests\": %d, \"completed\": %d, \"aborted\": %d, "
           "\"seconds\": %.3f, \"requests_per_s\": %.4f, \"output_tokens_per_s\": %.1f, "
           "\"latency_s\": %.3f, \"ttft_s\": %.4f, \"token_ms\": %.3f, \"attainment\": %.4f, "
           "\"satisfaction\": %.4f, \"steps\": %lld, \"loads\": %d, \"pcie_gb\": %.2f}\n", label,
           w->trace.n, done, w->aborted, end, done / end, tokens / end, latency / done,
           ttft / done, 1000 * token / done, (double)in_time / w->trace.n,
           satisfaction / w->trace.n, (long long)c.steps, w->loads,
           (double)w->loaded_bytes / 1e9);
}

static void close_world(struct world *w)
{
    free(w->item);
    free(w->waiting);
    free(w->resident);
    free(w->users);
    kn_free(w->dev, w->device);
    kn_free(w->dev, w->pool_memory);
    kn_host_free(w->dev, w->host);
    kn_stream_free(w->stream);
    forward_free(w->forward);
    weights_release(&w->weights);
    kn_close(w->dev);
    model_config_release(&w->model);
    trace_release(&w->trace);
}

int main(int argc, char **argv)
{
    static struct world w = { .slo_s = 6, .decodes = DECODES };
    static const struct option options[] = {
        { "sim", 1, NULL, 's' }, { "shape", 1, NULL, 'm' }, { "trace", 1, NULL, 't' },
        { "cells", 1, NULL, 'c' }, { "queue", 1, NULL, 'q' }, { "slo", 1, NULL, 'o' },
        { "label", 1, NULL, 'l' }, { NULL, 0, NULL, 0 },
    };
    const char *sim = NULL, *shape = NULL, *trace = NULL, *label = "";
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (c) {
        case 's': sim = optarg; break;
        case 'm': shape = optarg; break;
        case 't': trace = optarg; break;
        case 'l': label = optarg; break;
        case 'c': w.cells = (int)strtol(optarg, NULL, 10); break;
        case 'o': w.slo_s = strtod(optarg, NULL); break;
        case 'q':
            w.queue = !strcmp(optarg, "abort") ? ABORT : !strcmp(optarg, "lcfs") ? LCFS : FCFS;
            break;
        default: return 2;
        }
    }
    if (!sim || !shape || !trace || w.cells < MAX_REQUEST)
        die("--sim, --shape, --trace and --cells are needed", NULL);
    open_world(&w, sim, shape, trace);
    kn_advance(w.dev, 0);
    run(&w);
    report(&w, label);
    close_world(&w);
    return 0;
}
