/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bench_host.c - host work of a step: planning, applying, laying out, and what becomes of results.
 *
 *     build/tests/bench/bench_host [SEQUENCES [ADAPTERS [STEPS]]]          (512 256 400)
 *
 * spm-tiny on the CPU backend, so that text is real and steps are short; every sequence decodes,
 * adapters in turn, no two neighbours with the same. Steps are planned ahead as they are on a
 * device that works by itself. The engine's own count (engine_stats.host_us) leaves the forward
 * pass out. Prints quantiles over steps: on a shared machine many are interrupted, the lower ones
 * are not.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/core.h"
#include "engine/engine.h"

#define MODEL "tests/models/spm-tiny"
#define ADAPTER "tests/models/spm-tiny-adapters/captain-sal"
#define PROMPT 40

static void must(lm_status st, const struct lm_err *err)
{
    if (st == LM_OK)
        return;
    fprintf(stderr, "%s\n", err->msg);
    exit(1);
}

static engine *open_engine(int seqs)
{
    struct engine_config cfg = {
        .model_dir = MODEL, .backend = "cpu", .threads = 1, .pool_bytes = (size_t)768 << 20,
        .max_seqs = seqs, .max_step_tokens = LM_MAX(seqs, 1024), .max_waiting = seqs,
        .manual = true,
    };
    struct lm_err err;
    engine *e = NULL;
    core_force_pipeline(true);
    must(engine_open(&cfg, &e, &err), &err);
    return e;
}

static void submit(engine *e, engine_adapter *a, int i, int max_tokens)
{
    int32_t ids[PROMPT];
    struct engine_request r = { .id = "host", .adapter = a, .token_ids = ids,
                                .n_token_ids = PROMPT };
    struct lm_err err;
    engine_handle h;
    for (int k = 0; k < PROMPT; k++)
        ids[k] = 5 + (i * 31 + k * 7) % 700;
    engine_params_default(&r.params);
    r.params.set = ~0u;
    r.params.temperature = i % 2 ? 0.8f : 0;
    r.params.max_tokens = max_tokens;
    r.params.ignore_eos = true;
    must(engine_submit(e, &r, &h, &err), &err);
}

/* Turns until `steps` have been launched, or, with steps 0, until all `seqs` decode. */
static struct engine_stats run(engine *e, uint64_t steps, int seqs)
{
    struct engine_stats st;
    struct lm_err err;
    bool idle = false;
    for (;;) {
        engine_stats(e, &st);
        bool all = st.running == seqs && st.prefill_tokens == (uint64_t)seqs * PROMPT;
        if (idle || (steps ? st.steps >= steps : all && st.decode_tokens > (uint64_t)seqs * 8))
            return st;
        must(engine_pump(e, engine_now_us(e) + 1, &idle, &err), &err);
    }
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

int main(int argc, char **argv)
{
    int seqs = argc > 1 ? atoi(argv[1]) : 512, n = argc > 2 ? atoi(argv[2]) : 256;
    int steps = argc > 3 ? atoi(argv[3]) : 400;
    engine_adapter **a = calloc((size_t)n, sizeof *a);
    struct lm_err err;
    lm_log_set_level(LM_WARN);
    engine *e = open_engine(seqs);
    for (int i = 0; i < n; i++) {
        char id[32];
        snprintf(id, sizeof id, "adapter-%d", i);
        must(engine_adapter_load(e, id, ADAPTER, &a[i], &err), &err);
    }
    for (int i = 0; i < seqs; i++)
        submit(e, n ? a[i % n] : NULL, i, steps + 40);
    struct engine_stats st = run(e, 0, seqs);
    double *us = calloc((size_t)steps, sizeof *us), adapters = 0;
    for (int i = 0; i < steps; i++) {
        struct engine_stats to = run(e, st.steps + 1, seqs);
        us[i] = (double)(to.host_us - st.host_us) / (double)(to.steps - st.steps);
        adapters += (double)(to.step_adapters - st.step_adapters) / steps;
        if (to.running != seqs)
            fprintf(stderr, "%d of %d sequences run\n", to.running, seqs);
        st = to;
    }
    qsort(us, (size_t)steps, sizeof *us, ascending);
    printf("{\"name\": \"host_work_of_a_step\", \"sequences\": %d, \"adapters\": %.0f, "
           "\"p10_us\": %.0f, \"p50_us\": %.0f, \"p90_us\": %.0f}\n", seqs, adapters,
           us[steps / 10], us[steps / 2], us[steps * 9 / 10]);
    free(us);
    for (int i = 0; i < n; i++)
        engine_adapter_unref(a[i]);
    engine_close(e);
    free(a);
    return 0;
}
