/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_status.c - `loramill status`: where a group stands. Reads only: the group's state, offsets
 * and members from the brokers, the first unfinished record of each partition from the log, and
 * from each worker its /metrics.
 *
 * A worker whose metrics can't be had (cli_scrape.h) shows dashes.
 *
 * Lag counts records that are not finished: the log's end less the committed offset, less what is
 * finished beyond it by the offset map.
 */
#include <getopt.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "worker/tools/cli_group.h"
#include "worker/tools/cli_scrape.h"
#include "worker/tools/commands.h"

struct status {
    struct cli_settings settings;
    struct config config;
    struct cli_kafka kafka;
    const char *topic;
    bool json, metrics;
    struct group group;
    struct scrape_pages pages;
};

static const char help[] =
    "usage: loramill status -c FILE [OPTION]...\n"
    "\n"
    "Shows the group: state, lag and oldest unfinished prompt of each partition, and what each\n"
    "worker has in flight. Changes nothing.\n"
    "\n"
    "  -c, --config FILE     properties of the deployment (group.id, topics.prompts)\n"
    "      --set KEY=VALUE   overrides a property; may be repeated\n"
    "  -t, --topic TOPIC     this one instead of topics.prompts\n"
    "      --no-metrics      does not ask the workers\n"
    "  -j, --json            one JSON object\n"
    "\n"
    "Exit status: 0 shown, 1 no answer, 2 usage.\n";

/* ---- showing ---------------------------------------------------------------------------- */

/* The value of a metric without labels; -1: not there. */
static int64_t value_of(const char *page, const char *name)
{
    char want[128];
    if (!page)
        return -1;
    int n = snprintf(want, sizeof want, "\n%s ", name);
    const char *at = strstr(page, want);
    return at ? (int64_t)strtod(at + n, NULL) : -1;
}

static int64_t lag_of(const struct group_part *p)
{
    if (p->high < 0)
        return -1;
    return LM_MAX(p->high - LM_MAX(p->committed, p->low) - p->done_beyond, 0);
}

static const char *number(char buf[32], int64_t n)
{
    snprintf(buf, 32, n < 0 ? "-" : "%" PRId64, n);
    return buf;
}

static const char *age(char buf[32], int64_t ms)
{
    double s = (double)(lm_wall_ms() - ms) / 1e3;
    snprintf(buf, 32, ms < 0 ? "-" : s < 120 ? "%.0fs" : s < 7200 ? "%.0fm" : "%.1fh",
             s < 120 ? s : s < 7200 ? s / 60 : s / 3600);
    return buf;
}

static int64_t total_lag(const struct group *g)
{
    int64_t n = 0;
    for (size_t i = 0; i < g->n_parts; i++)
        n += LM_MAX(lag_of(&g->parts[i]), 0);
    return n;
}

static void print_text(const struct status *s)
{
    char a[32], b[32], c[32], d[32], e[32];
    const struct group *g = &s->group;
    printf("group %s: %s, %zu workers, lag %" PRId64 "\n\n", s->config.group_id, g->state,
           g->n_members, total_lag(g));
    printf("%-24s %9s %12s %12s %9s %9s %8s  %s\n", "TOPIC", "PARTITION", "COMMITTED", "END",
           "FINISHED", "LAG", "OLDEST", "WORKER");
    for (size_t i = 0; i < g->n_parts; i++) {
        const struct group_part *p = &g->parts[i];
        printf("%-24s %9d %12s %12s %9s %9s %8s  %s\n", p->topic, (int)p->partition,
               number(a, p->committed), number(b, p->high), number(c, p->done_beyond),
               number(d, lag_of(p)), age(e, p->oldest_ms), *p->member ? p->member : "-");
    }
    printf("\n%-24s %-16s %10s %9s %8s %8s %7s\n", "WORKER", "HOST", "PARTITIONS", "IN FLIGHT",
           "WAITING", "RUNNING", "PAUSED");
    for (size_t i = 0; i < g->n_members; i++) {
        const struct group_member *m = &g->members[i];
        const char *p = scrape_page_of(&s->pages, m);
        int64_t paused = value_of(p, "loramill_intake_paused");
        printf("%-24s %-16s %10d %9s %8s %8s %7s\n", m->client, m->host, m->n_parts,
               number(a, value_of(p, "loramill_in_flight_records")),
               number(b, value_of(p, "loramill_intake_backlog_records")),
               number(c, value_of(p, "loramill_engine_running")),
               paused < 0 ? "-" : paused ? "yes" : "no");
    }
}

static json_t *known(int64_t n)
{
    return n < 0 ? json_null() : json_integer(n);
}

static void print_json(const struct status *s)
{
    const struct group *g = &s->group;
    json_t *parts = json_array(), *workers = json_array();
    for (size_t i = 0; i < g->n_parts; i++) {
        const struct group_part *p = &g->parts[i];
        json_array_append_new(parts, json_pack(
            "{s:s, s:i, s:o, s:o, s:o, s:I, s:o, s:o, s:o}", "topic", p->topic, "partition",
            (int)p->partition, "committed", known(p->committed), "low", known(p->low), "end",
            known(p->high), "finished_beyond", (json_int_t)p->done_beyond, "lag",
            known(lag_of(p)), "oldest_ms", known(p->oldest_ms), "worker",
            *p->member ? json_string(p->member) : json_null()));
    }
    for (size_t i = 0; i < g->n_members; i++) {
        const struct group_member *m = &g->members[i];
        const char *p = scrape_page_of(&s->pages, m);
        json_array_append_new(workers, json_pack(
            "{s:s, s:s, s:i, s:o, s:o, s:o, s:o}", "worker", m->client, "host", m->host,
            "partitions", m->n_parts,
            "in_flight", known(value_of(p, "loramill_in_flight_records")),
            "waiting", known(value_of(p, "loramill_intake_backlog_records")),
            "running", known(value_of(p, "loramill_engine_running")),
            "paused", known(value_of(p, "loramill_intake_paused"))));
    }
    json_t *o = json_pack("{s:s, s:s, s:I, s:o, s:o}", "group", s->config.group_id, "state",
                          g->state, "lag", (json_int_t)total_lag(g), "partitions", parts,
                          "workers", workers);
    cli_print_json(o, JSON_INDENT(1));
    json_decref(o);
}

/* ---- the whole -------------------------------------------------------------------------- */

static int run(struct status *s)
{
    struct lm_err err;
    s->kafka.one_each = true;
    lm_status st = cli_kafka_open(&s->kafka, &s->config, RD_KAFKA_CONSUMER, &err);
    if (st == LM_OK)
        st = cli_group_read(&s->kafka, &s->config, s->topic, &s->group, &err);
    if (st == LM_OK)
        cli_group_oldest(&s->kafka, &s->group);
    if (st == LM_OK && s->metrics && s->config.http_port)
        scrape_workers(&s->group, (int)s->config.http_port, &s->pages);
    if (st == LM_OK && cli_interrupted())
        st = lm_err_set(&err, LM_CANCELLED, "interrupted");
    if (st != LM_OK) {
        fprintf(stderr, "loramill status: %s\n", err.msg);
        return CLI_FAILED;
    }
    if (s->json)
        print_json(s);
    else
        print_text(s);
    return fflush(stdout) ? CLI_FAILED : CLI_OK;
}

static lm_status parse(struct status *s, int argc, char **argv, struct lm_err *err)
{
    enum { SET = 256, NO_METRICS };
    static const struct option options[] = {
        { "config", required_argument, NULL, 'c' }, { "set", required_argument, NULL, SET },
        { "topic", required_argument, NULL, 't' },  { "json", no_argument, NULL, 'j' },
        { "no-metrics", no_argument, NULL, NO_METRICS },
        { "help", no_argument, NULL, 'h' },         { NULL, 0, NULL, 0 },
    };
    int opt;
    lm_status st = LM_OK;
    optind = 0;
    while (st == LM_OK && (opt = getopt_long(argc, argv, "c:t:jh", options, NULL)) != -1) {
        switch (opt) {
        case 'c': st = cli_settings_file(&s->settings, optarg, err); break;
        case SET: st = cli_settings_add(&s->settings, optarg, err); break;
        case 't': s->topic = optarg; break;
        case 'j': s->json = true; break;
        case NO_METRICS: s->metrics = false; break;
        case 'h': fputs(help, stdout); return LM_CANCELLED;
        default: return lm_err_set(err, LM_INVALID, "try `loramill status --help`");
        }
    }
    if (st == LM_OK && optind < argc)
        st = lm_err_set(err, LM_INVALID, "unexpected argument '%s'", argv[optind]);
    return st == LM_OK ? cli_settings_load(&s->settings, &s->config, err) : st;
}

int cmd_status(int argc, char **argv)
{
    struct lm_err err;
    struct status s = { .metrics = true };
    int status = CLI_OK;
    lm_status st = parse(&s, argc, argv, &err);
    if (st == LM_OK) {
        cli_catch_signals();
        status = run(&s);
    } else if (st != LM_CANCELLED) {
        fprintf(stderr, "loramill status: %s\n", err.msg);
        status = CLI_USAGE;
    }
    scrape_release(&s.pages);
    cli_group_release(&s.group);
    cli_kafka_close(&s.kafka);
    config_release(&s.config);
    return status;
}
