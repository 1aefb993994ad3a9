/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_bench_report.c - the figures of a replay.
 *
 * Attainment is the share of all requests whose first token came within --slo-ttft; satisfaction
 * weighs them by 1 - (ttft / slo)^2, as S-LoRA does (arXiv 2311.03285). Latencies are of completed
 * requests. A token's latency is (last token - first token) / (tokens - 1) of its request.
 */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "worker/tools/cmd_bench.h"

/* Mean and percentiles of one quantity over the completed requests. */
struct spread {
    double mean, p50, p90, p99, max;
    int n;
};

struct figures {
    int done, late, failed, in_time;
    int64_t prompt_tokens, output_tokens;
    double seconds, satisfaction;
    struct spread ttft, token, latency, wait;   /* s, ms, s, s */
};

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The smallest value that is not below a share p of all. */
static double percentile(const double *v, int n, double p)
{
    int i = (int)ceil(p * n) - 1;
    return v[LM_MAX(i, 0)];
}

static struct spread spread_of(double *v, int n)
{
    struct spread s = { .n = n };
    if (n == 0)
        return s;
    for (int i = 0; i < n; i++)
        s.mean += v[i] / n;
    qsort(v, (size_t)n, sizeof *v, compare);
    s.p50 = percentile(v, n, 0.5);
    s.p90 = percentile(v, n, 0.9);
    s.p99 = percentile(v, n, 0.99);
    s.max = v[n - 1];
    return s;
}

enum quantity { TTFT, TOKEN, LATENCY, WAIT };

static bool quantity(const struct outcome *o, enum quantity q, double *out)
{
    if (o->state != REPLAY_DONE)
        return false;
    switch (q) {
    case TTFT: *out = (double)o->first_us / 1e6; return true;
    case LATENCY: *out = (double)o->end_us / 1e6; return true;
    case WAIT: *out = (double)o->admit_us / 1e6; return true;
    case TOKEN: break;
    }
    *out = o->tokens > 1 ? (double)(o->end_us - o->first_us) / 1e3 / (o->tokens - 1) : 0;
    return o->tokens > 1;
}

static struct spread gather(const struct replay *r, enum quantity q, double *scratch)
{
    int n = 0;
    for (int i = 0; i < r->trace->n; i++)
        n += quantity(&r->outcome[i], q, &scratch[n]);
    return spread_of(scratch, n);
}

static void count(const struct replay *r, struct figures *f)
{
    double slo = r->args->slo_s;
    for (int i = 0; i < r->trace->n; i++) {
        const struct outcome *o = &r->outcome[i];
        f->done += o->state == REPLAY_DONE;
        f->late += o->state == REPLAY_LATE;
        f->failed += o->state == REPLAY_FAILED;
        f->output_tokens += o->tokens;
        f->prompt_tokens += o->state == REPLAY_DONE ? r->trace->item[i].prompt : 0;
        double ttft = (double)o->first_us / 1e6;
        if (o->state == REPLAY_DONE && slo > 0 && ttft < slo) {
            f->in_time++;
            f->satisfaction += 1 - ttft / slo * (ttft / slo);
        }
    }
    f->satisfaction /= r->trace->n;
    f->seconds = (double)r->end_us / 1e6;
}

static double per(double a, double b)
{
    return b > 0 ? a / b : 0;
}

static json_t *spread_json(const struct spread *s)
{
    return json_pack("{s:f, s:f, s:f, s:f, s:f}", "mean", s->mean, "p50", s->p50, "p90", s->p90,
                     "p99", s->p99, "max", s->max);
}

static json_t *requests_json(const struct replay *r, const struct figures *f)
{
    const char *label = r->args->label ? r->args->label : "";
    json_t *o = json_pack(
        "{s:s, s:s, s:s, s:s, s:i, s:i, s:i, s:i, s:f, s:f, s:f, s:f}", "label", label, "model",
        r->info.model_name, "device", r->info.device, "trace", r->args->trace, "requests",
        r->trace->n, "completed", f->done, "late", f->late, "failed", f->failed, "seconds",
        f->seconds, "requests_per_s", per(f->done, f->seconds), "output_tokens_per_s",
        per((double)f->output_tokens, f->seconds), "prompt_tokens_per_s",
        per((double)f->prompt_tokens, f->seconds));
    json_object_set_new(o, "ttft_s", spread_json(&f->ttft));
    json_object_set_new(o, "token_ms", spread_json(&f->token));
    json_object_set_new(o, "latency_s", spread_json(&f->latency));
    json_object_set_new(o, "wait_s", spread_json(&f->wait));
    json_object_set_new(o, "attainment", json_real(per(f->in_time, r->trace->n)));
    json_object_set_new(o, "satisfaction", json_real(f->satisfaction));
    return o;
}

static json_t *engine_json(const struct replay *r)
{
    const struct engine_stats *s = &r->stats;
    const struct occupancy *p = &r->pool;
    double blocks = r->info.pool_blocks, steps = (double)s->steps;
    return json_pack(
        "{s:I, s:f, s:f, s:f, s:I, s:I, s:I, s:i, s:f, s:f, s:I, s:I, s:I, s:I, s:I, s:I, s:i, s:f,"
        " s:f, s:f, s:f, s:f, s:i, s:i, s:f}",
        "steps", (json_int_t)s->steps, "adapters_per_step", per((double)s->step_adapters, steps),
        "seqs_per_step", per((double)s->step_seqs, steps), "host_us_per_step",
        per((double)s->host_us, steps), "adapter_loads",
        (json_int_t)s->adapter_loads, "adapter_evictions", (json_int_t)s->adapter_evictions,
        "adapter_hits", (json_int_t)s->adapter_hits, "fetched", r->fetched, "adapter_gb",
        (double)s->adapter_bytes / 1e9, "swap_gb", (double)s->swap_bytes / 1e9, "swap_outs",
        (json_int_t)s->swap_outs, "swap_ins", (json_int_t)s->swap_ins, "preemptions",
        (json_int_t)s->preemptions, "early_aborts", (json_int_t)s->early_aborts,
        "prefix_hit_tokens", (json_int_t)s->prefix_hit_tokens, "merges", (json_int_t)s->merges,
        "pool_blocks", r->info.pool_blocks, "kv_share", per(p->kv, p->seconds * blocks),
        "kv_share_max", per(p->max_kv, blocks), "adapter_share",
        per(p->adapters, p->seconds * blocks), "adapter_share_max", per(p->max_adapters, blocks),
        "resident", per(p->resident, p->seconds), "resident_max", p->max_resident, "waiting_max",
        p->max_waiting, "replay_s", (double)r->wall_us / 1e6);
}

static void table_spread(const char *name, const char *unit, const struct spread *s)
{
    fprintf(stderr, "  %-22s mean %9.3f   P50 %9.3f   P90 %9.3f   P99 %9.3f %s\n", name, s->mean,
            s->p50, s->p90, s->p99, unit);
}

static void table(const struct replay *r, const struct figures *f)
{
    const struct engine_stats *s = &r->stats;
    const struct occupancy *p = &r->pool;
    double blocks = r->info.pool_blocks, steps = (double)s->steps;
    fprintf(stderr, "%s on %s, %s\n", r->info.model_name, r->info.device, r->args->trace);
    fprintf(stderr, "  %d requests: %d completed, %d late, %d failed in %.1f s (replayed in "
                    "%.1f s)\n", r->trace->n, f->done, f->late, f->failed, f->seconds,
            (double)r->wall_us / 1e6);
    fprintf(stderr, "  %-22s %.3f requests/s, %.0f output tokens/s\n", "throughput",
            per(f->done, f->seconds), per((double)f->output_tokens, f->seconds));
    table_spread("first token", "s", &f->ttft);
    table_spread("a token", "ms", &f->token);
    table_spread("request", "s", &f->latency);
    table_spread("waiting", "s", &f->wait);
    if (r->args->slo_s > 0)
        fprintf(stderr, "  %-22s %.3f within %g s, satisfaction %.3f\n", "first token in time",
                per(f->in_time, r->trace->n), r->args->slo_s, f->satisfaction);
    fprintf(stderr, "  %-22s %llu steps of %.1f sequences with %.1f adapters\n", "batches",
            (unsigned long long)s->steps, per((double)s->step_seqs, steps),
            per((double)s->step_adapters, steps));
    fprintf(stderr, "  %-22s %llu loads (%.1f GB), %llu evictions, %d from the store\n", "adapters",
            (unsigned long long)s->adapter_loads, (double)s->adapter_bytes / 1e9,
            (unsigned long long)s->adapter_evictions, r->fetched);
    fprintf(stderr, "  %-22s KV %.0f %% (max %.0f %%), adapters %.0f %% (max %.0f %%, %d "
                    "resident)\n", "pool", 100 * per(p->kv, p->seconds * blocks),
            100 * per(p->max_kv, blocks),
            100 * per(p->adapters, p->seconds * blocks), 100 * per(p->max_adapters, blocks),
            p->max_resident);
    fprintf(stderr, "  %-22s %llu, %llu swapped out (%.1f GB)\n", "preemptions",
            (unsigned long long)s->preemptions, (unsigned long long)s->swap_outs,
            (double)s->swap_bytes / 1e9);
    if (r->error[0])
        fprintf(stderr, "  first failure: %s\n", r->error);
}

lm_status bench_outcomes(const struct replay *r, const char *path, struct lm_err *err)
{
    static const char *const state[] = { "open", "done", "late", "failed" };
    FILE *f = fopen(path, "we");
    if (!f)
        return lm_err_set(err, LM_IO, "'%s' can't be written", path);
    fprintf(f, "id,arrival,adapter,state,tokens,submit_s,admit_s,first_s,end_s\n");
    for (int i = 0; i < r->trace->n; i++) {
        const struct outcome *o = &r->outcome[i];
        fprintf(f, "%d,%.6f,%d,%s,%d,%.6f,%.6f,%.6f,%.6f\n", i,
                (double)r->trace->item[i].arrival_us / 1e6, r->trace->item[i].adapter,
                state[o->state], o->tokens, (double)o->submit_us / 1e6, (double)o->admit_us / 1e6,
                (double)o->first_us / 1e6, (double)o->end_us / 1e6);
    }
    return fclose(f) == 0 ? LM_OK : lm_err_set(err, LM_IO, "'%s' can't be written", path);
}

void bench_report(const struct replay *r)
{
    struct figures f = { 0 };
    double *scratch = lm_reallocarray(NULL, (size_t)r->trace->n, sizeof *scratch);
    count(r, &f);
    if (scratch) {
        f.ttft = gather(r, TTFT, scratch);
        f.token = gather(r, TOKEN, scratch);
        f.latency = gather(r, LATENCY, scratch);
        f.wait = gather(r, WAIT, scratch);
    }
    free(scratch);
    json_t *line = requests_json(r, &f), *more = engine_json(r);
    json_object_update(line, more);
    json_dumpf(line, stdout, JSON_REAL_PRECISION(6));
    printf("\n");
    fflush(stdout);
    json_decref(line);
    json_decref(more);
    if (!r->args->json)
        table(r, &f);
}
