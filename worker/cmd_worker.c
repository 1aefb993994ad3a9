/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_worker.c - `loramill worker`: options, then worker_run(). Exit status: 0 ended as asked,
 * 1 failed, 2 usage or configuration error.
 *
 * SIGTERM and SIGINT end it with status 0 from the first line on: by a handler until worker_run()
 * takes them in turn (signals.h). Without one they would kill the process, or be lost where it is
 * the first of its container, which no signal without a handler reaches. SIGHUP has nothing to do
 * before.
 */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "worker/commands.h"
#include "worker/kafka_conf.h"
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

static int fail(const char *text)
{
    fprintf(stderr, "loramill worker: %s\n", text);
    return 2;
}

static int fail_usage(const char *what, const char *arg)
{
    fprintf(stderr, "loramill worker: %s%s\n`loramill worker --help` explains the options.\n",
            what, arg);
    return 2;
}

struct options { bool check, help, markdown, sample, any; };

/* The value of an option that needs one: "-c FILE", "--config=FILE". NULL: not this option. */
static const char *value_of(int argc, char **argv, int *i, const char *name, bool *missing)
{
    size_t n = strlen(name);
    if (strncmp(argv[*i], name, n))
        return NULL;
    if (argv[*i][n] == '=' && n > 2)
        return argv[*i] + n + 1;
    if (argv[*i][n])
        return NULL;
    if (*i + 1 >= argc) {
        *missing = true;
        return "";
    }
    return argv[++*i];
}

static int read_options(int argc, char **argv, struct config *c, bool sets, struct options *o)
{
    struct lm_err err;
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i], *v;
        bool missing = false;
        if ((v = value_of(argc, argv, &i, "-c", &missing)) ||
            (v = value_of(argc, argv, &i, "--config", &missing))) {
            o->any = true;
            if (!missing && !sets && config_read_file(c, v, &err))
                return fail(err.msg);
        } else if ((v = value_of(argc, argv, &i, "--set", &missing))) {
            if (!missing && sets && config_set(c, v, &err)) {
                lm_err_prefix(&err, "--set");
                return fail(err.msg);
            }
        } else if (!strcmp(arg, "--check")) {
            o->check = true;
        } else if (!strcmp(arg, "--help") || !strcmp(arg, "-h")) {
            o->help = true;
        } else if (!strcmp(arg, "--help-markdown")) {
            o->markdown = true;
        } else if (!strcmp(arg, "--help-sample")) {
            o->sample = true;
        } else {
            return fail_usage("unknown argument ", arg);
        }
        if (missing)
            return fail_usage("a value is missing after ", arg);
    }
    return 0;
}

static int print_help(const struct options *o)
{
    if (o->markdown) {
        config_print_markdown(stdout);
    } else if (o->sample) {
        config_print_sample(stdout);
    } else {
        fputs(usage_text, stdout);
        config_print_help(stdout);
    }
    return fflush(stdout) ? 1 : 0;
}

static int run(int argc, char **argv, struct config *c)
{
    struct options o = { 0 };
    struct lm_err err;
    /* Files first, whatever the order, so that --set always wins. */
    int st = read_options(argc, argv, c, false, &o);
    if (o.help || o.markdown || o.sample)
        return st ? st : print_help(&o);
    if (!st)
        st = read_options(argc, argv, c, true, &o);
    if (st)
        return st;
    if (!o.any)
        return fail_usage("-c FILE is missing", "");
    if (config_check(c, &err) || kafka_conf_check(c, &err))
        return fail(err.msg);
    if (o.check) {
        puts("configuration ok");
        return 0;
    }
    return worker_run(c);
}

/* Nothing was begun. */
static void on_early_signal(int sig)
{
    (void)sig;
    _exit(0);
}

int cmd_worker(int argc, char **argv)
{
    struct config c;
    struct lm_err err;
    signal(SIGTERM, on_early_signal);
    signal(SIGINT, on_early_signal);
    signal(SIGHUP, SIG_IGN);
    if (config_init(&c, &err))
        return fail(err.msg);
    int st = run(argc, argv, &c);
    config_release(&c);
    return st;
}
