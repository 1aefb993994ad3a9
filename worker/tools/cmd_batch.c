/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_batch.c - `loramill batch`: a file of OpenAI Batch requests, without Kafka. Options and
 * set-up only; the work is in batch_job.c.
 *
 * Exit status: 0 every line has its output line (refusals are lines too), 1 the job could not
 * finish and can be resumed, 2 usage.
 */
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "worker/config.h"
#include "worker/tools/batch_job.h"
#include "worker/tools/commands.h"
#include "worker/tools/progress.h"
#include "worker/url_template.h"

struct options {
    const char *model, *adapters, *backend, *input, *output, *cache_dir;
    int threads, max_seqs, max_in_flight;
    bool resume, verbose;
};

static atomic_int stop_requested;

static void on_signal(int sig)
{
    (void)sig;
    atomic_store(&stop_requested, 1);
}

static int usage(FILE *f, int status)
{
    fprintf(f,
        "usage: loramill batch --model DIR [--adapters DIR|URL] --input FILE --output FILE\n\n"
        "Answers a file of OpenAI Batch requests (/v1/completions, /v1/chat/completions), each\n"
        "for the base model or for an adapter, and writes one result line for each.\n\n"
        "  --model DIR            Hugging Face model folder; its name is the base model's name\n"
        "  --adapters DIR|URL     one PEFT folder per adapter id, or a URL with {adapter}\n"
        "  --input FILE           JSON lines; - reads standard input\n"
        "  --output FILE          JSON lines, written as each request ends\n"
        "  --resume               go on with a job that was killed: keeps what --output holds\n"
        "  --backend cpu|cuda     default: cuda where a device works, else cpu\n"
        "  --threads N            CPU cores; default all\n"
        "  --max-seqs N           sequences in one step; default 256\n"
        "  --max-in-flight N      requests read ahead; default 1024\n"
        "  --cache-dir DIR        where fetched adapters are kept\n"
        "  --verbose              log what the engine does\n\n"
        "Exit status: 0 every line has its output line, 1 the job could not finish (resume it),\n"
        "2 usage error.\n");
    return status;
}

static int number(const char *name, const char *text, int *out)
{
    char *end;
    long v = strtol(text, &end, 10);
    if (*text && !*end && v >= 1 && v <= 1000000) {
        *out = (int)v;
        return 0;
    }
    fprintf(stderr, "loramill batch: --%s must be 1..1000000, not '%s'\n", name, text);
    return 2;
}

static int require(const char *name, const char *value)
{
    if (value)
        return 0;
    fprintf(stderr, "loramill batch: --%s is missing\n", name);
    return 2;
}

static int check_backend(const char *name)
{
    if (!name || !strcmp(name, "cpu") || !strcmp(name, "cuda"))
        return 0;
    fprintf(stderr, "loramill batch: --backend must be cpu or cuda, not '%s'\n", name);
    return 2;
}

/* 0 go on, 2 usage error, -1 help was shown. */
static int parse(struct options *o, int argc, char **argv)
{
    enum { MODEL = 1, ADAPTERS, BACKEND, INPUT, OUTPUT, CACHE, THREADS, SEQS, FLIGHT, RESUME,
           VERBOSE, HELP };
    static const struct option options[] = {
        { "model", required_argument, NULL, MODEL },
        { "adapters", required_argument, NULL, ADAPTERS },
        { "backend", required_argument, NULL, BACKEND },
        { "input", required_argument, NULL, INPUT },
        { "output", required_argument, NULL, OUTPUT },
        { "cache-dir", required_argument, NULL, CACHE },
        { "threads", required_argument, NULL, THREADS },
        { "max-seqs", required_argument, NULL, SEQS },
        { "max-in-flight", required_argument, NULL, FLIGHT },
        { "resume", no_argument, NULL, RESUME },
        { "verbose", no_argument, NULL, VERBOSE },
        { "help", no_argument, NULL, HELP },
        { NULL, 0, NULL, 0 },
    };
    const char **text[] = { [MODEL] = &o->model, [ADAPTERS] = &o->adapters,
                            [BACKEND] = &o->backend, [INPUT] = &o->input,
                            [OUTPUT] = &o->output, [CACHE] = &o->cache_dir };
    int *count[] = { [THREADS] = &o->threads, [SEQS] = &o->max_seqs, [FLIGHT] = &o->max_in_flight };
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (c == HELP)
            return usage(stdout, -1);
        if (c == RESUME)
            o->resume = true;
        else if (c == VERBOSE)
            o->verbose = true;
        else if (c >= MODEL && c <= CACHE)
            *text[c] = optarg;
        else if (c < THREADS || c > FLIGHT)
            return usage(stderr, 2);
        else if (number(options[c - 1].name, optarg, count[c]))
            return 2;
    }
    if (optind < argc) {
        fprintf(stderr, "loramill batch: unexpected argument '%s'\n", argv[optind]);
        return 2;
    }
    if (require("model", o->model) || require("input", o->input) || require("output", o->output))
        return 2;
    return check_backend(o->backend);
}

static bool is_url(const char *adapters)
{
    return adapters && strstr(adapters, "://");
}

/* A mistyped folder would make an error line of every request for an adapter. */
static lm_status check_adapters(const char *adapters, struct lm_err *err)
{
    struct stat sb;
    if (!adapters || is_url(adapters))
        return LM_OK;
    if (stat(adapters, &sb))
        return lm_err_set(err, LM_NOT_FOUND, "--adapters %s: %s", adapters, strerror(errno));
    if (!S_ISDIR(sb.st_mode) || access(adapters, R_OK | X_OK))
        return lm_err_set(err, LM_INVALID, "--adapters %s: is not a folder that can be read",
                          adapters);
    return LM_OK;
}

/* A folder, or a URL to which "/{adapter}" is added unless it says where the id goes. */
static lm_status open_store(const struct options *o, engine *e, store **out, struct lm_err *err)
{
    char url[4096];
    struct config defaults;
    struct store_config cfg = { .engine = e };
    bool remote = is_url(o->adapters);
    lm_status st = config_init(&defaults, err);
    if (st)
        return st;
    char *cache = config_cache_dir(&defaults);
    cfg.cache_dir = o->cache_dir ? o->cache_dir : cache;
    cfg.negative_ttl_ms = (int)defaults.adapters_negative_ttl_ms;
    if (remote) {
        int n = snprintf(url, sizeof url, "%s%s", o->adapters,
                         strstr(o->adapters, URL_HOLE_ADAPTER) ? "" : "/" URL_HOLE_ADAPTER);
        if (n < 0 || (size_t)n >= sizeof url)
            st = lm_err_set(err, LM_TOO_LARGE, "--adapters: the URL is too long");
        cfg.url = url;
    } else {
        cfg.local_dir = o->adapters;
    }
    if (!st)
        st = store_new(&cfg, out, err);
    free(cache);
    config_release(&defaults);
    return st;
}

static void print_totals(const struct batch_totals *t)
{
    char a[32], b[32], c[32];
    double s = t->seconds > 0 ? t->seconds : 1e-9;
    fprintf(stderr, "batch: %s answered, %s refused", progress_count(a, t->answered),
            progress_count(b, t->refused));
    if (t->skipped)
        fprintf(stderr, ", %s already there", progress_count(c, t->skipped));
    fprintf(stderr, "; %s prompt and %s completion tokens in %.1f s (%.0f requests/s)\n",
            progress_count(a, t->prompt_tokens), progress_count(b, t->completion_tokens),
            t->seconds, (double)(t->answered + t->refused) / s);
}

static lm_status run(const struct options *o, struct batch_totals *totals, struct lm_err *err)
{
    engine *e;
    store *s;
    const struct engine_config cfg = {
        .model_dir = o->model, .backend = o->backend, .threads = o->threads,
        .max_seqs = o->max_seqs, .max_waiting = o->max_in_flight,
    };
    lm_status st = check_adapters(o->adapters, err);
    if (!st)
        st = engine_open(&cfg, &e, err);
    if (st)
        return st;
    st = open_store(o, e, &s, err);
    if (!st)
        st = batch_job_run(&(struct batch_config){
            .engine = e, .store = s, .adapters = o->adapters, .input = o->input,
            .output = o->output, .resume = o->resume,
            .max_in_flight = o->max_in_flight, .stop = &stop_requested }, totals, err);
    engine_close(e);
    return st;
}

int cmd_batch(int argc, char **argv)
{
    struct options o = { .max_in_flight = 1024 };
    int status = parse(&o, argc, argv);
    if (status)
        return status < 0 ? 0 : status;
    lm_log_set_level(o.verbose ? LM_INFO : LM_WARN);
    struct sigaction sa = { .sa_handler = on_signal, .sa_flags = SA_RESETHAND };
    sigaction(SIGINT, &sa, NULL);
    sigaction(SIGTERM, &sa, NULL);
    signal(SIGPIPE, SIG_IGN);
    struct batch_totals totals = { 0 };
    struct lm_err err = { 0 };
    lm_status st = run(&o, &totals, &err);
    if (totals.lines)
        print_totals(&totals);
    if (st)
        fprintf(stderr, "loramill batch: %s\n", err.msg);
    return st != LM_OK;
}
