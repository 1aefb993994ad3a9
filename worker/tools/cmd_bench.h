/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_bench.h - what the files of `loramill bench` share.
 *
 *   cmd_bench.c         the command; fixed figures (prefill, decode) of an engine
 *   cmd_bench_args.c    its options
 *   cmd_bench_trace.c   reads a trace
 *   cmd_bench_replay.c  replays it: arrivals, the store's latency, results
 *   cmd_bench_report.c  what came of it, as one JSON line and a table
 *
 * A trace is CSV with the header `id,arrival,adapter,rank,prompt_len,output_len`, as
 * tests/bench/make_traces.py writes it: arrival in seconds, never sinking; adapter -1 is the base
 * model, and its rank is 0.
 */
#ifndef LORAMILL_WORKER_TOOLS_CMD_BENCH_H
#define LORAMILL_WORKER_TOOLS_CMD_BENCH_H

#include "engine/engine.h"

/* ---- options --------------------------------------------------------------------------- */

struct bench_args {
    const char *model, *shape, *sim, *trace, *adapters, *backend, *label, *outcomes;
    int threads, prompt_tokens, tokens, batch, repeat;
    int layers;                 /* of the shape; 0: all */
    int dummy, rank;            /* stand-ins for adapters in the fixed figures */
    unsigned modules;           /* of stand-ins */
    enum engine_kv kv;
    enum engine_weights weights;
    int pad_rank;               /* stand-ins of a trace have at least this rank */
    int max_seqs, max_step_tokens, block_tokens;
    size_t pool_bytes, host_adapter_bytes;
    double slo_s;               /* to the first token; 0: none */
    bool abort_late;            /* give the engine that deadline */
    double fetch_ms, fetch_gbps;        /* adapters come from a store; 0, 0: they are at hand */
    int fetches;                /* at once */
    int warm_up;                /* requests before a trace that don't count */
    bool start;                 /* only the time to the first token */
    bool idle;                  /* only what adapters that nobody asks for cost */
    bool json;                  /* no table */
    struct engine_policy policy;
};

/* 0: go on; negative: help was printed, all is well; else the exit status. */
int bench_parse(struct bench_args *a, int argc, char **argv);

/* ---- traces ---------------------------------------------------------------------------- */

struct trace_item {
    int64_t arrival_us;
    int32_t adapter, rank;      /* -1 and 0: base model */
    int32_t prompt, output;     /* tokens */
};

struct trace {
    struct trace_item *item;
    int n;
    int max_prompt, max_output;
    int n_adapters;             /* highest adapter + 1 */
};

/* Errors name file and line. */
lm_status trace_load(const char *path, struct trace *out, struct lm_err *err);
void trace_release(struct trace *t);

/* Token t of request i; whoever runs a trace on random weights uses the same. */
static inline int32_t trace_token(int64_t i, int64_t t, int vocab)
{
    return (int32_t)(10 + (i * 7919 + t * 104729 + (i ^ t) * 31) % (vocab - 20));
}

/* ---- outcomes -------------------------------------------------------------------------- */

enum outcome_state { REPLAY_OPEN, REPLAY_DONE, REPLAY_LATE, REPLAY_FAILED };

/* Of one request; microseconds since its arrival. */
struct outcome {
    enum outcome_state state;
    int32_t next;               /* of those who wait for the same adapter, -1: last */
    int32_t tokens;
    int64_t submit_us;          /* when the engine got it */
    int64_t admit_us, first_us, end_us;
};

/* Shares of the pool over time. */
struct occupancy {
    double seconds, kv, adapters, resident;     /* integrals */
    int max_kv, max_adapters, max_resident, max_waiting;
};

struct replay {
    const struct bench_args *args;
    const struct trace *trace;
    struct outcome *outcome;    /* [trace->n] */
    struct engine_info info;
    struct engine_stats stats;  /* at the end */
    struct occupancy pool;
    int64_t end_us;             /* of the last request, since the start */
    int64_t wall_us;            /* what the replay itself took */
    int fetched;                /* adapters from the store */
    char error[256];            /* of the first that failed */
};

/* Opens an engine, replays, closes it. The caller frees out->outcome. */
lm_status bench_replay(const struct bench_args *a, const struct trace *t, struct replay *out,
                       struct lm_err *err);
void bench_report(const struct replay *r);
/* One CSV line a request. */
lm_status bench_outcomes(const struct replay *r, const char *path, struct lm_err *err);

#endif
