/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_dev.c - `loramill dev`: everything a worker needs around it, on this machine, in one process.
 *
 * An embedded broker (dev_broker.h) with the four topics, a local HTTP adapter store
 * (dev_store.h), and DIR/loramill.properties, which all other commands take as it is. The
 * file appears, by a rename, when everything is ready, and goes when this process ends: scripts
 * wait for it. Addresses are this machine's loopback; the broker's port is a new one each time.
 */
#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "worker/tools/cli.h"
#include "worker/tools/commands.h"
#include "worker/tools/dev_broker.h"
#include "worker/tools/dev_store.h"
#include "worker/tools/progress.h"

#define TOPIC_PROMPTS "prompts"
#define TOPIC_REPLIES "replies"
#define TOPIC_DEAD_LETTERS "dead-letters"
#define TOPIC_CONTROL "control"

struct dev {
    const char *dir, *adapters, *model;
    int64_t partitions, store_port;
    bool quiet;
    dev_broker *broker;
    dev_store *store;
    char *folder;               /* dir, absolute */
    char *properties;           /* path of the file once it is written */
};

static const char help[] =
    "usage: loramill dev [OPTION]...\n"
    "\n"
    "Runs a Kafka broker in memory and a local HTTP adapter store until interrupted, and writes\n"
    "DIR/loramill.properties for all other commands. For development only: the broker\n"
    "forgets everything at the end and keeps at most 5 MiB a partition.\n"
    "\n"
    "  -d, --dir DIR         for properties and the adapter cache (default: loramill-dev)\n"
    "  -a, --adapters DIR    PEFT adapters to serve, one folder an id\n"
    "  -m, --model DIR       model for the properties (else give the worker --set model.path)\n"
    "  -p, --partitions N    partitions of the prompt topic (default: 8)\n"
    "      --store-port N    port of the adapter store (default: any free one)\n"
    "  -q, --quiet           says nothing but problems\n"
    "\n"
    "Exit status: 0 after SIGINT or SIGTERM, 1 when something could not start, 2 usage.\n";

/* ---- the properties file ---------------------------------------------------------------- */

static void write_properties(const struct dev *d, FILE *f, const char *model)
{
    fprintf(f, "# Written by `loramill dev`; valid while it runs.\n"
               "kafka.bootstrap.servers=%s\n"
               "topics.prompts=%s\ntopics.replies=%s\ntopics.dead_letters=%s\n"
               "topics.control=%s\n",
            dev_broker_address(d->broker), TOPIC_PROMPTS, TOPIC_REPLIES, TOPIC_DEAD_LETTERS,
            TOPIC_CONTROL);
    /* The embedded broker waits for a group's members as long as their session, less a second, at
     * each rebalance after the first. */
    fprintf(f, "kafka.consumer.session.timeout.ms=4000\n"
               "kafka.consumer.heartbeat.interval.ms=500\n");
    if (d->store)
        fprintf(f, "adapters.url=http://127.0.0.1:%d/{adapter}\n", dev_store_port(d->store));
    fprintf(f, "adapters.cache_dir=%s/cache\n", d->folder);
    fprintf(f, "http.address=127.0.0.1\n");
    if (model)
        fprintf(f, "model.path=%s\n", model);
}

/* Written beside and renamed, so that whoever waits for the file sees it whole. */
static lm_status publish(struct dev *d, struct lm_err *err)
{
    char tmp[PATH_MAX], model[PATH_MAX];
    char *path = NULL;
    if (d->model && !realpath(d->model, model))
        return lm_err_set(err, LM_NOT_FOUND, "--model %s: %s", d->model, strerror(errno));
    if (asprintf(&path, "%s/loramill.properties", d->folder) < 0)
        return lm_err_set(err, LM_NOMEM, "no memory");
    snprintf(tmp, sizeof tmp, "%s/.loramill.properties.%d", d->folder, (int)getpid());
    FILE *f = fopen(tmp, "we");
    bool bad = !f;
    if (f) {
        write_properties(d, f, d->model ? model : NULL);
        bad = ferror(f) != 0;
        bad |= fclose(f) != 0;
        bad = bad || rename(tmp, path) != 0;
    }
    if (bad) {
        lm_err_set(err, LM_IO, "%s: %s", path, strerror(errno));
        unlink(tmp);
        free(path);
        return LM_IO;
    }
    d->properties = path;
    return LM_OK;
}

/* ---- start ------------------------------------------------------------------------------ */

static lm_status make_folder(struct dev *d, struct lm_err *err)
{
    char stale[PATH_MAX];
    if (mkdir(d->dir, 0777) != 0 && errno != EEXIST)
        return lm_err_set(err, LM_IO, "--dir %s: %s", d->dir, strerror(errno));
    d->folder = realpath(d->dir, NULL);
    if (!d->folder || strlen(d->folder) + 64 > PATH_MAX)
        return lm_err_set(err, LM_IO, "--dir %s: %s", d->dir,
                          d->folder ? "the path is too long" : strerror(errno));
    snprintf(stale, sizeof stale, "%s/loramill.properties", d->folder);
    unlink(stale);              /* of a run that was killed */
    return LM_OK;
}

static lm_status start(struct dev *d, struct lm_err *err)
{
    static const char *const small[] = { TOPIC_REPLIES, TOPIC_DEAD_LETTERS };
    lm_status st = make_folder(d, err);
    if (st == LM_OK)
        st = dev_broker_new(1, &d->broker, err);
    if (st == LM_OK)
        st = dev_broker_topic(d->broker, TOPIC_PROMPTS, (int)d->partitions, err);
    for (size_t i = 0; st == LM_OK && i < LM_COUNT(small); i++)
        st = dev_broker_topic(d->broker, small[i], 4, err);
    if (st == LM_OK)
        st = dev_broker_topic(d->broker, TOPIC_CONTROL, 1, err);
    if (st == LM_OK && d->adapters)
        st = dev_store_new(d->adapters, (int)d->store_port, &d->store, err);
    return st == LM_OK ? publish(d, err) : st;
}

static void stop(struct dev *d)
{
    if (d->properties)
        unlink(d->properties);
    free(d->properties);
    free(d->folder);
    dev_store_free(d->store);
    dev_broker_free(d->broker);
}

/* ---- talk ------------------------------------------------------------------------------- */

static void greet(const struct dev *d)
{
    printf("loramill dev: ready; Ctrl-C ends it\n\n");
    printf("  broker    %s  (in memory, forgets everything at the end)\n",
           dev_broker_address(d->broker));
    printf("  topics    %s (%d partitions), %s, %s, %s\n", TOPIC_PROMPTS, (int)d->partitions,
           TOPIC_REPLIES, TOPIC_DEAD_LETTERS, TOPIC_CONTROL);
    if (d->store)
        printf("  adapters  http://127.0.0.1:%d/{adapter}  (%d from %s)\n",
               dev_store_port(d->store), dev_store_count(d->adapters), d->adapters);
    else
        printf("  adapters  none; --adapters DIR serves a folder of them\n");
    printf("  settings  %s\n\n", d->properties);
    printf("In other terminals:\n\n");
    printf("  loramill worker -c %s%s\n", d->properties, d->model ? "" : " --set model.path=DIR");
    printf("  loramill submit -c %s --input prompts.jsonl\n", d->properties);
    printf("  loramill collect -c %s --job prompts.jsonl --output replies.jsonl\n",
           d->properties);
    printf("  loramill cancel -c %s ID...\n\n", d->properties);
    fflush(stdout);
}

static void say_goodbye(const struct dev *d)
{
    struct dev_store_stats st = { 0 };
    char a[32], b[32];
    if (d->store)
        dev_store_stats(d->store, &st);
    printf("\nloramill dev: ended; served %s adapters, %s bytes\n", progress_count(a, st.adapters),
           progress_count(b, st.bytes));
}

static int run(struct dev *d)
{
    struct lm_err err;
    if (start(d, &err) != LM_OK) {
        fprintf(stderr, "loramill dev: %s\n", err.msg);
        return CLI_FAILED;
    }
    if (!d->quiet)
        greet(d);
    while (!cli_interrupted())
        poll(NULL, 0, 200);     /* a signal between test and sleep waits this long at most */
    if (!d->quiet)
        say_goodbye(d);
    return CLI_OK;
}

static lm_status parse(struct dev *d, int argc, char **argv, struct lm_err *err)
{
    enum { STORE_PORT = 256 };
    static const struct option options[] = {
        { "dir", required_argument, NULL, 'd' },
        { "adapters", required_argument, NULL, 'a' },
        { "model", required_argument, NULL, 'm' },
        { "partitions", required_argument, NULL, 'p' },
        { "store-port", required_argument, NULL, STORE_PORT },
        { "quiet", no_argument, NULL, 'q' },
        { "help", no_argument, NULL, 'h' },
        { NULL, 0, NULL, 0 },
    };
    int opt;
    lm_status st = LM_OK;
    optind = 0;
    while (st == LM_OK && (opt = getopt_long(argc, argv, "d:a:m:p:qh", options, NULL)) != -1) {
        switch (opt) {
        case 'd': d->dir = optarg; break;
        case 'a': d->adapters = optarg; break;
        case 'm': d->model = optarg; break;
        case 'p': st = cli_parse_number("--partitions", optarg, 1, 1000, &d->partitions, err);
            break;
        case STORE_PORT:
            st = cli_parse_number("--store-port", optarg, 0, 65535, &d->store_port, err);
            break;
        case 'q': d->quiet = true; break;
        case 'h': fputs(help, stdout); return LM_CANCELLED;
        default: return lm_err_set(err, LM_INVALID, "try `loramill dev --help`");
        }
    }
    if (st == LM_OK && optind < argc)
        st = lm_err_set(err, LM_INVALID, "unexpected argument '%s'", argv[optind]);
    return st;
}

int cmd_dev(int argc, char **argv)
{
    struct lm_err err;
    struct dev d = { .dir = "loramill-dev", .partitions = 8 };
    lm_status st = parse(&d, argc, argv, &err);
    if (st == LM_CANCELLED)
        return CLI_OK;
    if (st != LM_OK) {
        fprintf(stderr, "loramill dev: %s\n", err.msg);
        return CLI_USAGE;
    }
    cli_catch_signals();
    int status = run(&d);
    stop(&d);
    return status;
}
