/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_bench_args.c - the options of `loramill bench`, in one table: what is parsed is what --help
 * shows.
 */
#include <getopt.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "worker/tools/cmd_bench.h"

enum option_kind {
    TEXT, COUNT, AMOUNT, BYTES, ON, OFF, MODULES, PREEMPT, KV, WEIGHTS, FCFS, MILLIS, HELP
};

struct bench_option {
    const char *name;
    enum option_kind kind;
    size_t offset;
    const char *value, *help;   /* help NULL: a heading stands in `value` */
};

#define FIRST 256               /* of getopt's values: past every character */
#define AT(member) offsetof(struct bench_args, member)
#define POLICY(member) offsetof(struct bench_args, policy.member)

static const struct bench_option options[] = {
    { NULL, TEXT, 0, "What is measured", NULL },
    { "model", TEXT, AT(model), "DIR", "Hugging Face model folder" },
    { "shape", TEXT, AT(shape), "NAME", "instead: of ops/shapes, or config.json; made-up weights" },
    { "layers", COUNT, AT(layers), "N", "only so many layers of --shape (70B does not fit)" },
    { "load-format", TEXT, 0, "dummy", "accepted beside --shape, as others spell it" },
    { "backend", TEXT, AT(backend), "NAME", "cpu or cuda; default: cuda where a device works" },
    { "sim", TEXT, AT(sim), "FILE", "a device description: time is simulated" },
    { "threads", COUNT, AT(threads), "N", "CPU cores; default all" },
    { "adapters", TEXT, AT(adapters), "DIR", "PEFT folders to decode with, all of them" },
    { "dummy", COUNT, AT(dummy), "N", "so many stand-ins for adapters instead" },
    { "rank", COUNT, AT(rank), "R", "of stand-ins; default 8" },
    { "modules", MODULES, 0, "LIST", "of stand-ins: q,k,v,o,gate,up,down or all; default q,k,v,o" },
    { NULL, TEXT, 0, "Fixed figures (without --trace): one JSON line each", NULL },
    { "start", ON, AT(start), NULL, "only seconds from the process's start to a first token" },
    { "idle", ON, AT(idle), NULL, "only what the stand-ins cost those who don't use them" },
    { "prompt-tokens", COUNT, AT(prompt_tokens), "N", "default 32" },
    { "tokens", COUNT, AT(tokens), "N", "tokens to decode; default 64" },
    { "batch", COUNT, AT(batch), "N", "sequences at once; default 32" },
    { "repeat", COUNT, AT(repeat), "N", "runs of each figure, the best counts; default 3" },
    { NULL, TEXT, 0, "A trace: requests as they came, one JSON line and a table", NULL },
    { "trace", TEXT, AT(trace), "FILE", "id,arrival,adapter,rank,prompt_len,output_len" },
    { "label", TEXT, AT(label), "TEXT", "goes into the JSON line" },
    { "outcomes", TEXT, AT(outcomes), "FILE", "a CSV line for each request" },
    { "slo-ttft", AMOUNT, AT(slo_s), "S", "seconds to the first token that count as in time" },
    { "host-adapter-bytes", BYTES, AT(host_adapter_bytes), "N", "host memory for adapters" },
    { "fetch-latency-ms", AMOUNT, AT(fetch_ms), "MS", "adapters come from a store: its latency," },
    { "fetch-gbps", AMOUNT, AT(fetch_gbps), "N", "its rate (10^9 bytes a second), each," },
    { "fetches", COUNT, AT(fetches), "N", "and how many at once; default 16" },
    { "warm-up", COUNT, AT(warm_up), "N", "requests before it that don't count; default none" },
    { "json", ON, AT(json), NULL, "the JSON line only" },
    { NULL, TEXT, 0, "The engine", NULL },
    { "max-seqs", COUNT, AT(max_seqs), "N", "sequences in a step" },
    { "max-step-tokens", COUNT, AT(max_step_tokens), "N", "tokens in a step" },
    { "block-tokens", COUNT, AT(block_tokens), "N", "tokens of KV cache in a block" },
    { "kv-dtype", KV, 0, "TYPE", "of the KV cache: auto or fp8" },
    { "weights-dtype", WEIGHTS, 0, "TYPE", "of matrices: auto, stored, bf16, fp8 or fp8-dynamic" },
    { "pool-bytes", BYTES, AT(pool_bytes), "N", "KV cache and adapters together" },
    { "preempt", PREEMPT, 0, "HOW", "cheaper, recompute or swap" },
    { "swap-bytes", BYTES, POLICY(swap_bytes), "N", "host memory for swapped KV" },
    { "max-overtaken", COUNT, POLICY(max_overtaken), "N", "before a waiting one goes first" },
    { "max-wait-ms", MILLIS, POLICY(max_wait_ms), "MS", "then it goes first whatever its rank" },
    { "merge", ON, POLICY(merge), NULL, "merge an adapter that owns the stream" },
    { "no-group", OFF, POLICY(group), NULL, "admit without regard to adapters" },
    { "no-fair", OFF, POLICY(fair), NULL, "no shares between tenants" },
    { "fcfs", FCFS, 0, NULL, "both: first come, first served" },
    { "no-early-abort", OFF, POLICY(early_abort), NULL, "serve what is late all the same" },
    { "no-prefetch", OFF, POLICY(prefetch), NULL, "load adapters only when they are admitted" },
    { "no-prefix-cache", OFF, POLICY(prefix_cache), NULL, "compute every prompt" },
    { "no-pipeline", OFF, POLICY(pipeline), NULL, "plan a step when the one before has ended" },
    { "no-graphs", OFF, POLICY(graphs), NULL, "give the device each operation by itself" },
    { NULL, TEXT, 0, "What others do, to measure what the design buys", NULL },
    { "split-pool", COUNT, POLICY(adapter_percent), "P", "adapters get P % of the pool" },
    { "slots", COUNT, POLICY(adapter_slots), "N", "adapters resident at most" },
    { "pad-rank", COUNT, AT(pad_rank), "R", "stand-ins have at least this rank" },
    { "help", HELP, 0, NULL, "this" },
};

static int usage(FILE *f, int status)
{
    fprintf(f, "usage: loramill bench (--model DIR | --shape NAME) [--trace FILE] [OPTION]...\n");
    for (size_t i = 0; i < LM_COUNT(options); i++) {
        const struct bench_option *o = &options[i];
        char left[48];
        if (!o->help) {
            fprintf(f, "\n%s:\n", o->value);
            continue;
        }
        snprintf(left, sizeof left, "--%s%s%s", o->name, o->value ? " " : "",
                 o->value ? o->value : "");
        fprintf(f, "  %-24s %s\n", left, o->help);
    }
    return status;
}

/* ---- values ---------------------------------------------------------------------------- */

static bool parse_count(const char *text, int *out)
{
    char *end;
    long v = strtol(text, &end, 10);
    if (end == text || *end || v < 1 || v > 1 << 24)
        return false;
    *out = (int)v;
    return true;
}

static bool parse_amount(const char *text, double *out)
{
    char *end;
    double v = strtod(text, &end);
    if (end == text || *end || !(v >= 0 && v <= 1e12))
        return false;
    *out = v;
    return true;
}

static bool parse_millis(const char *text, int64_t *out)
{
    double v;
    if (!parse_amount(text, &v))
        return false;
    *out = (int64_t)v;
    return true;
}

/* 4096, 64K, 512M, 80G, 1T: powers of 1024. */
static bool parse_bytes(const char *text, size_t *out)
{
    char *end;
    double v = strtod(text, &end);
    static const char units[] = "KMGT";
    const char *unit = *end ? strchr(units, *end) : NULL;
    if (end == text || (*end && (!unit || end[1])) || !(v >= 0 && v <= 1e15))
        return false;
    for (int i = 0; unit && i <= (int)(unit - units); i++)
        v *= 1024;
    *out = (size_t)v;
    return v < 1e18;
}

static bool parse_modules(const char *text, unsigned *out)
{
    static const char *const names[] = { "q", "k", "v", "o", "gate", "up", "down" };
    if (!strcmp(text, "all")) {
        *out = 0x7f;
        return true;
    }
    for (*out = 0; *text;) {
        size_t n = strcspn(text, ","), m = 0;
        while (m < LM_COUNT(names) && (strlen(names[m]) != n || strncmp(names[m], text, n) != 0))
            m++;
        if (m == LM_COUNT(names))
            return false;
        *out |= 1u << m;
        text += n + (text[n] == ',');
    }
    return *out != 0;
}

static bool parse_preempt(const char *text, enum engine_preempt *out)
{
    static const char *const names[] = { "cheaper", "recompute", "swap" };
    for (int i = 0; i < (int)LM_COUNT(names); i++) {
        if (!strcmp(text, names[i])) {
            *out = (enum engine_preempt)i;
            return true;
        }
    }
    return false;
}

static bool parse_fp8(const char *text, bool *fp8)
{
    *fp8 = !strcmp(text, "fp8");
    return *fp8 || !strcmp(text, "auto");
}

/* A name is looked up in ops/shapes, here or beside the program's folder; the rest is a file. */
static const char *find_shape(const char *name)
{
    static char path[512];
    char exe[256];
    if (strchr(name, '/') || strstr(name, ".json"))
        return name;
    snprintf(path, sizeof path, "ops/shapes/%.100s.json", name);
    if (!access(path, R_OK))
        return path;
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    exe[n > 0 ? n : 0] = '\0';
    char *end = strrchr(exe, '/');
    snprintf(path, sizeof path, "%.*s/../ops/shapes/%.100s.json", end ? (int)(end - exe) : 0, exe,
             name);
    return access(path, R_OK) ? name : path;
}

static bool take(struct bench_args *a, const struct bench_option *o, const char *text)
{
    void *at = (char *)a + o->offset;
    bool fp8, good;
    switch (o->kind) {
    case COUNT: return parse_count(text, at);
    case AMOUNT: return parse_amount(text, at);
    case BYTES: return parse_bytes(text, at);
    case MILLIS: return parse_millis(text, at);
    case MODULES: return parse_modules(text, &a->modules);
    case KV:
        good = parse_fp8(text, &fp8);
        a->kv = fp8 ? ENGINE_KV_FP8 : ENGINE_KV_AUTO;
        return good;
    case WEIGHTS: return engine_weights_parse(text, &a->weights);
    case PREEMPT: return parse_preempt(text, &a->policy.preempt);
    case ON: *(bool *)at = true; return true;
    case OFF: *(bool *)at = false; return true;
    case FCFS: a->policy.group = a->policy.fair = false; return true;
    case TEXT: break;
    case HELP: return true;
    }
    if (!strcmp(o->name, "load-format"))
        return !strcmp(text, "dummy");
    *(const char **)at = strcmp(o->name, "shape") ? text : find_shape(text);
    return true;
}

/* ---- the command line ------------------------------------------------------------------ */

static int complain(const char *what)
{
    fprintf(stderr, "loramill bench: %s\n", what);
    return usage(stderr, 2);
}

static int check(const struct bench_args *a)
{
    if (!a->model && !a->shape)
        return complain("--model or --shape is missing");
    if (a->model && a->shape)
        return complain("--model and --shape are both given");
    if (a->adapters && (a->dummy || a->trace))
        return complain("--adapters is for fixed figures without --dummy");
    if (a->idle && (!a->dummy || !a->pool_bytes || a->trace || a->start))
        return complain("--idle is for fixed figures with --dummy, and two engines: --pool-bytes");
    if (a->policy.adapter_percent >= 100)
        return complain("--split-pool is a percentage from 1 to 99");
    return 0;
}

int bench_parse(struct bench_args *a, int argc, char **argv)
{
    struct option longs[LM_COUNT(options) + 1] = { 0 };
    const struct bench_option *of[LM_COUNT(options)];
    int n = 0;
    for (size_t i = 0; i < LM_COUNT(options); i++) {
        const struct bench_option *o = &options[i];
        if (!o->help)
            continue;
        of[n] = o;
        longs[n] = (struct option){ o->name, o->value ? required_argument : no_argument, NULL,
                                    FIRST + n };
        n++;
    }
    *a = (struct bench_args){ .prompt_tokens = 32, .tokens = 64, .batch = 32, .repeat = 3,
                              .rank = 8, .modules = 0xf, .fetches = 16 };
    engine_policy_default(&a->policy);
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        const struct bench_option *o = c >= FIRST && c < FIRST + n ? of[c - FIRST] : NULL;
        if (!o)
            return usage(stderr, 2);
        if (o->kind == HELP)
            return usage(stdout, -1);
        if (!take(a, o, optarg)) {
            fprintf(stderr, "loramill bench: '%s' is no value for --%s\n", optarg, o->name);
            return 2;
        }
    }
    if (optind < argc) {
        fprintf(stderr, "loramill bench: unexpected argument '%s'\n", argv[optind]);
        return usage(stderr, 2);
    }
    a->abort_late = a->slo_s > 0 && a->policy.early_abort;
    return check(a);
}
