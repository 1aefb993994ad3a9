/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_reset.c - `loramill reset`: moves a group's offsets. Shows what it would do; with --yes it
 * does it. A broker moves a group only while it has no members.
 *
 * The new offsets carry no map of finished ones, and a map that lies in the old commit does not
 * survive it: everything behind the new offset runs (again).
 */
#include <getopt.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "worker/tools/cli_group.h"
#include "worker/tools/commands.h"

struct reset {
    struct cli_settings settings;
    struct config config;
    struct cli_kafka kafka;
    const char *to, *topic;
    int64_t partition;          /* -1: all */
    bool yes;
};

static const char help[] =
    "usage: loramill reset -c FILE --to WHERE [OPTION]...\n"
    "\n"
    "Moves the group's offsets in the prompt topics. Only shows them, unless --yes is given.\n"
    "The group's workers must have ended.\n"
    "\n"
    "  -c, --config FILE     properties of the deployment (group.id, topics.prompts)\n"
    "      --set KEY=VALUE   overrides a property; may be repeated\n"
    "      --to WHERE        earliest, latest, a time (90s, 10m, 2h, 1d ago, or epoch\n"
    "                        milliseconds after an @), or an offset\n"
    "  -t, --topic TOPIC     this one instead of topics.prompts\n"
    "  -p, --partition N     only this partition\n"
    "  -y, --yes             does it\n"
    "\n"
    "Exit status: 0 shown or moved, 1 it could not be done, 2 usage.\n";

static bool is_number(const char *s)
{
    return *s && s[strspn(s, "0123456789")] == '\0';
}

/* Where to, for each partition; offsets are kept within the log. */
static lm_status find_targets(struct reset *r, const struct group *g, int64_t *target,
                              struct lm_err *err)
{
    int64_t ms = 0;
    bool by_time = strcmp(r->to, "earliest") && strcmp(r->to, "latest") && !is_number(r->to);
    if (by_time) {
        const char *text = *r->to == '@' ? r->to + 1 : r->to;
        lm_status st = cli_parse_since("--to", text, &ms, err);
        if (st == LM_OK)
            st = cli_group_offsets_at(&r->kafka, g, ms, target, err);
        if (st != LM_OK)
            return st;
    }
    size_t chosen = 0;
    for (size_t i = 0; i < g->n_parts; i++) {
        const struct group_part *p = &g->parts[i];
        if (r->partition >= 0 && p->partition != r->partition) {
            target[i] = -1;
            continue;
        }
        chosen++;
        if (p->high < 0 || (by_time && target[i] < 0))
            return lm_err_set(err, LM_NET, "%s [%d]: its leader does not answer, so its offsets "
                              "are not known", p->topic, (int)p->partition);
        if (!strcmp(r->to, "earliest"))
            target[i] = p->low;
        else if (!strcmp(r->to, "latest"))
            target[i] = p->high;
        else if (!by_time)
            target[i] = strtoll(r->to, NULL, 10);
        target[i] = LM_MIN(LM_MAX(target[i], p->low), p->high);
    }
    return chosen ? LM_OK : lm_err_set(err, LM_NOT_FOUND, "no topic has a partition %" PRId64,
                                       r->partition);
}

static void show(const struct group *g, const int64_t *target)
{
    printf("%-24s %9s %12s %12s %12s\n", "TOPIC", "PARTITION", "COMMITTED", "TO", "CHANGE");
    for (size_t i = 0; i < g->n_parts; i++) {
        const struct group_part *p = &g->parts[i];
        if (target[i] < 0)
            continue;
        char now[24] = "-", change[24] = "-";
        if (p->committed >= 0) {
            snprintf(now, sizeof now, "%" PRId64, p->committed);
            snprintf(change, sizeof change, "%+" PRId64, target[i] - p->committed);
        }
        printf("%-24s %9d %12s %12" PRId64 " %12s\n", p->topic, (int)p->partition, now, target[i],
               change);
    }
}

static lm_status do_move(struct reset *r, const struct group *g, const int64_t *target,
                         struct lm_err *err)
{
    const char **refused = lm_calloc(g->n_parts, sizeof *refused);
    lm_status st = refused ? cli_group_move(&r->kafka, r->config.group_id, g, target, refused, err)
                           : lm_err_set(err, LM_NOMEM, "no memory");
    for (size_t i = 0; refused && i < g->n_parts; i++)
        if (refused[i])
            fprintf(stderr, "loramill reset: %s [%d] was not moved: %s\n", g->parts[i].topic,
                    (int)g->parts[i].partition, refused[i]);
    free(refused);
    return st;
}

static lm_status move(struct reset *r, struct group *g, struct lm_err *err)
{
    int64_t *target = lm_calloc(g->n_parts, sizeof *target);
    lm_status st = target ? find_targets(r, g, target, err) : lm_err_set(err, LM_NOMEM,
                                                                         "no memory");
    if (st == LM_OK)
        show(g, target);
    if (st == LM_OK && g->n_members)
        st = lm_err_set(err, LM_STATE, "group '%s' has %zu members: end its workers first",
                        r->config.group_id, g->n_members);
    if (st == LM_OK && r->yes)
        st = do_move(r, g, target, err);
    free(target);
    return st;
}

static int run(struct reset *r)
{
    struct lm_err err;
    struct group g = { 0 };
    lm_status st = cli_kafka_open(&r->kafka, &r->config, RD_KAFKA_CONSUMER, &err);
    if (st == LM_OK)
        st = cli_group_read(&r->kafka, &r->config, r->topic, &g, &err);
    if (st == LM_OK)
        st = move(r, &g, &err);
    cli_group_release(&g);
    if (st != LM_OK)
        fprintf(stderr, "loramill reset: %s\n", err.msg);
    else
        fprintf(stderr, r->yes ? "reset: group '%s' was moved\n"
                               : "reset: nothing was changed; --yes moves group '%s'\n",
                r->config.group_id);
    return st == LM_OK ? CLI_OK : CLI_FAILED;
}

static lm_status parse(struct reset *r, int argc, char **argv, struct lm_err *err)
{
    enum { SET = 256, TO };
    static const struct option options[] = {
        { "config", required_argument, NULL, 'c' }, { "set", required_argument, NULL, SET },
        { "to", required_argument, NULL, TO },      { "topic", required_argument, NULL, 't' },
        { "partition", required_argument, NULL, 'p' }, { "yes", no_argument, NULL, 'y' },
        { "help", no_argument, NULL, 'h' },         { NULL, 0, NULL, 0 },
    };
    int opt;
    lm_status st = LM_OK;
    optind = 0;
    while (st == LM_OK && (opt = getopt_long(argc, argv, "c:t:p:yh", options, NULL)) != -1) {
        switch (opt) {
        case 'c': st = cli_settings_file(&r->settings, optarg, err); break;
        case SET: st = cli_settings_add(&r->settings, optarg, err); break;
        case TO: r->to = optarg; break;
        case 't': r->topic = optarg; break;
        case 'p': st = cli_parse_number("--partition", optarg, 0, INT32_MAX, &r->partition, err);
            break;
        case 'y': r->yes = true; break;
        case 'h': fputs(help, stdout); return LM_CANCELLED;
        default: return lm_err_set(err, LM_INVALID, "try `loramill reset --help`");
        }
    }
    if (st == LM_OK && optind < argc)
        st = lm_err_set(err, LM_INVALID, "unexpected argument '%s'", argv[optind]);
    if (st == LM_OK && !r->to)
        st = lm_err_set(err, LM_INVALID, "--to WHERE is missing: earliest, latest, a time, an "
                        "offset");
    return st == LM_OK ? cli_settings_load(&r->settings, &r->config, err) : st;
}

int cmd_reset(int argc, char **argv)
{
    struct lm_err err;
    struct reset r = { .partition = -1 };
    int status = CLI_OK;
    lm_status st = parse(&r, argc, argv, &err);
    if (st == LM_OK) {
        cli_catch_signals();
        status = run(&r);
    } else if (st != LM_CANCELLED) {
        fprintf(stderr, "loramill reset: %s\n", err.msg);
        status = CLI_USAGE;
    }
    cli_kafka_close(&r.kafka);
    config_release(&r.config);
    return status;
}
