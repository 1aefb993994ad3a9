/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_worker.c - `loramill worker`: options, then worker_run(). Exit status: 0 ended as asked,
 * 1 failed, 2 usage or configuration error.
 *
 * SIGTERM and SIGINT end it with status 0 from the first line on: by a handler until worker_run()
 * takes them in turn (signals.h). Without one they would kill the process, or be lost where it is
 * the first of its container, which no signal without a handler reaches. SIGHUP has nothing to do
 * before. What only checks or prints is killed by them, as any tool.
 */
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

#include "worker/codec/registry.h"
#include "worker/kafka_conf.h"
#include "worker/store/fetch.h"
#include "worker/tools/cli.h"
#include "worker/tools/commands.h"
#include "worker/worker.h"

static const char usage_text[] =
    "usage: loramill worker -c FILE [--set KEY=VALUE]...\n"
    "\n"
    "Reads prompts from Kafka, answers them with the base model and the LoRA adapter that each\n"
    "names, and publishes completions.\n"
    "\n"
    "  -c, --config FILE     properties, one KEY=VALUE a line; may be given more than once\n"
    "  --set KEY=VALUE       overrides the files; may be given more than once\n"
    "  --check               check the configuration and end\n"
    "  --help                this text\n"
    "  --help-markdown       the properties as docs/configuration.md\n"
    "  --help-sample         the properties as a sample file\n"
    "\n"
    "SIGTERM drains and ends with status 0; a second one ends at once. SIGHUP reads the SASL\n"
    "credentials again. Status 2 means a usage or configuration error, 1 any other failure.\n";

enum action { RUN, CHECK, HELP, MARKDOWN, SAMPLE };

struct options {
    struct cli_settings settings;
    enum action action;
};

static lm_status parse(struct options *o, int argc, char **argv, struct lm_err *err)
{
    enum { SET = 256, ACTION };
    static const struct option options[] = {
        { "config", required_argument, NULL, 'c' },
        { "set", required_argument, NULL, SET },
        { "check", no_argument, NULL, ACTION + CHECK },
        { "help", no_argument, NULL, 'h' },
        { "help-markdown", no_argument, NULL, ACTION + MARKDOWN },
        { "help-sample", no_argument, NULL, ACTION + SAMPLE },
        { NULL, 0, NULL, 0 },
    };
    int opt;
    lm_status st = LM_OK;
    optind = 0;
    while (st == LM_OK && (opt = getopt_long(argc, argv, "c:h", options, NULL)) != -1) {
        switch (opt) {
        case 'c': st = cli_settings_file(&o->settings, optarg, err); break;
        case SET: st = cli_settings_add(&o->settings, optarg, err); break;
        case 'h': o->action = HELP; return LM_OK;
        case ACTION + CHECK: o->action = CHECK; break;
        case ACTION + MARKDOWN: o->action = MARKDOWN; return LM_OK;
        case ACTION + SAMPLE: o->action = SAMPLE; return LM_OK;
        default: return lm_err_set(err, LM_INVALID, "try `loramill worker --help`");
        }
    }
    if (st == LM_OK && optind < argc)
        st = lm_err_set(err, LM_INVALID, "unexpected argument '%s'", argv[optind]);
    if (st == LM_OK && !o->settings.n_files)
        st = lm_err_set(err, LM_INVALID, "-c FILE is missing");
    return st;
}

static int print_help(enum action what)
{
    if (what == MARKDOWN) {
        config_print_markdown(stdout);
    } else if (what == SAMPLE) {
        config_print_sample(stdout);
    } else {
        fputs(usage_text, stdout);
        config_print_help(stdout);
    }
    return fflush(stdout) ? CLI_FAILED : CLI_OK;
}

static int fail(const struct lm_err *err)
{
    fprintf(stderr, "loramill worker: %s\n", err->msg);
    return CLI_USAGE;
}

/* What is wrong with it is said before anything begins, by --check as well. */
static lm_status check(const struct config *c, struct lm_err *err)
{
    const struct registry_config registry = config_registry(c);
    lm_status st = config_check(c, err);
    if (!st)
        st = kafka_conf_check(c, err);
    if (!st && *c->registry_url)
        st = registry_check(&registry, err);
    return st || !*c->adapters_auth_header ? st : fetcher_check_auth(c->adapters_auth_header, err);
}

static int run(const struct options *o)
{
    struct config c;
    struct lm_err err;
    int status = CLI_OK;
    if (cli_settings_load(&o->settings, &c, &err))
        return fail(&err);
    if (check(&c, &err))
        status = fail(&err);
    else if (o->action == RUN)
        status = worker_run(&c);
    else
        puts("configuration ok");
    config_release(&c);
    return status;
}

/* Nothing was begun. */
static void on_early_signal(int sig)
{
    (void)sig;
    _exit(0);
}

int cmd_worker(int argc, char **argv)
{
    struct options o = { .action = RUN };
    struct lm_err err;
    signal(SIGTERM, on_early_signal);
    signal(SIGINT, on_early_signal);
    signal(SIGHUP, SIG_IGN);
    lm_status st = parse(&o, argc, argv, &err);
    if (st || o.action != RUN) {        /* a check that was broken off has checked nothing */
        signal(SIGTERM, SIG_DFL);
        signal(SIGINT, SIG_DFL);
    }
    if (st)
        return fail(&err);
    return o.action == RUN || o.action == CHECK ? run(&o) : print_help(o.action);
}
