/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_status.c - `loramill status`: where a group stands. Reads only: the group's state, offsets
 * and members from the brokers, the first unfinished record of each partition from the log, and
 * from each worker its /metrics.
 *
 * A member's client id is its worker's name. Where its metrics are is not written anywhere, so they
 * are looked for on the member's host, from http.port up (workers of one host take the next free
 * of CONFIG_HTTP_PORTS), and recognised by the name in build_info. A worker that can't be reached
 * shows dashes.
 *
 * Lag counts records that are not finished: the log's end less the committed offset, less what is
 * finished beyond it by the offset map.
 */
#include <curl/curl.h>
#include <getopt.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "worker/cli_group.h"
#include "worker/commands.h"

enum { SCRAPE_MS = 1000, MORE_PORTS = 4 };

struct status {
    struct cli_settings settings;
    struct config config;
    struct cli_kafka kafka;
    const char *topic;
    bool json, metrics;
    struct group group;
    struct page { char *text; const char *host; } *pages;    /* those that answered */
    size_t n_pages;
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

/* ---- workers' metrics ------------------------------------------------------------------- */

struct scrape { CURL *curl; FILE *f; char *text; size_t len; bool done; };

static void scrape_begin(struct scrape *q, CURLM *all, const char *host, int64_t port)
{
    char url[384];
    q->curl = curl_easy_init();
    q->f = open_memstream(&q->text, &q->len);
    if (!q->curl || !q->f)
        return;
    snprintf(url, sizeof url, strchr(host, ':') ? "http://[%s]:%" PRId64 "/metrics"
                                                : "http://%s:%" PRId64 "/metrics", host, port);
    curl_easy_setopt(q->curl, CURLOPT_URL, url);
    curl_easy_setopt(q->curl, CURLOPT_WRITEDATA, q->f);
    curl_easy_setopt(q->curl, CURLOPT_PRIVATE, q);
    curl_easy_setopt(q->curl, CURLOPT_TIMEOUT_MS, (long)SCRAPE_MS);
    curl_easy_setopt(q->curl, CURLOPT_MAXFILESIZE, 8L << 20);
    curl_easy_setopt(q->curl, CURLOPT_NOSIGNAL, 1L);
    curl_multi_add_handle(all, q->curl);
}

/* All at once: a host that drops what it does not know costs one time out, not one a port. */
static void scrape_run(CURLM *all)
{
    int running = 0, left;
    CURLMcode e;
    do {
        e = curl_multi_perform(all, &running);
        if (!e && running)
            e = curl_multi_poll(all, NULL, 0, SCRAPE_MS, NULL);
    } while (!e && running);
    for (CURLMsg *m; (m = curl_multi_info_read(all, &left));) {
        struct scrape *q = NULL;
        curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, (char **)&q);
        q->done = m->msg == CURLMSG_DONE && !m->data.result;
    }
}

/* The page, malloc'ed, or NULL. */
static char *scrape_end(struct scrape *q, CURLM *all)
{
    long code = 0;
    if (q->curl) {
        curl_easy_getinfo(q->curl, CURLINFO_RESPONSE_CODE, &code);
        curl_multi_remove_handle(all, q->curl);
        curl_easy_cleanup(q->curl);
    }
    if (q->f)
        fclose(q->f);
    if (q->done && code == 200)
        return q->text;
    free(q->text);
    return NULL;
}

/* Does this page belong to the worker of that name? */
static bool is_of(const char *page, const char *worker)
{
    char want[300];
    snprintf(want, sizeof want, "worker=\"%s\"", worker);
    const char *at = strstr(page, "loramill_build_info{");
    const char *end = at ? strchr(at, '\n') : NULL;
    const char *found = at ? strstr(at, want) : NULL;
    return found && (!end || found < end);
}

static const struct page *page_of(const struct status *s, const struct group_member *m)
{
    for (size_t i = 0; i < s->n_pages; i++)
        if (!strcmp(s->pages[i].host, m->host) &&
            is_of(s->pages[i].text, m->client))
            return &s->pages[i];
    return NULL;
}

static void keep_page(struct status *s, struct page p)
{
    struct page *grown = p.text ? lm_reallocarray(s->pages, s->n_pages + 1, sizeof *grown) : NULL;
    if (grown) {
        s->pages = grown;
        s->pages[s->n_pages++] = p;
    } else {
        free(p.text);
    }
}

static void scrape_ports(struct status *s, const char *host, int from, int to)
{
    struct scrape q[CONFIG_HTTP_PORTS] = { 0 };
    CURLM *all = curl_multi_init();
    if (!all)
        return;
    for (int i = from; i < to; i++)
        scrape_begin(&q[i], all, host, s->config.http_port + i);
    scrape_run(all);
    for (int i = from; i < to; i++)
        keep_page(s, (struct page){ scrape_end(&q[i], all), host });
    curl_multi_cleanup(all);
}

/* The pages of one host: from http.port on, as many as it has members and a few more; where that
 * leaves one of them without, wherever else a worker looks for a free port. */
static void scrape_host(struct status *s, size_t member)
{
    const struct group_member *m = s->group.members;
    const char *host = m[member].host;
    int most = (int)LM_MIN(CONFIG_HTTP_PORTS, UINT16_MAX + 1 - s->config.http_port), here = 0;
    bool missing = false;
    for (size_t i = 0; i < s->group.n_members; i++) {
        bool same = !strcmp(m[i].host, host);
        if (same && i < member)
            return;             /* has been asked */
        here += same;
    }
    int first = LM_MIN(here + MORE_PORTS, most);
    scrape_ports(s, host, 0, first);
    for (size_t i = member; i < s->group.n_members; i++)
        missing |= !strcmp(m[i].host, host) && !page_of(s, &m[i]);
    if (missing)
        scrape_ports(s, host, first, most);
}

/* The value of a metric without labels; -1: not there. */
static int64_t value_of(const struct page *p, const char *name)
{
    char want[128];
    if (!p)
        return -1;
    int n = snprintf(want, sizeof want, "\n%s ", name);
    const char *at = strstr(p->text, want);
    return at ? (int64_t)strtod(at + n, NULL) : -1;
}

/* ---- showing ---------------------------------------------------------------------------- */

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
        const struct page *p = page_of(s, m);
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
        const struct page *p = page_of(s, m);
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
    lm_status st = cli_kafka_open(&s->kafka, &s->config, RD_KAFKA_CONSUMER, &err);
    if (st == LM_OK)
        st = cli_group_read(&s->kafka, s->config.group_id,
                            s->topic ? s->topic : s->config.topics_prompts, &s->group, &err);
    if (st != LM_OK) {
        fprintf(stderr, "loramill status: %s\n", err.msg);
        return CLI_FAILED;
    }
    cli_group_oldest(&s->kafka, &s->group);
    curl_global_init(CURL_GLOBAL_DEFAULT);
    for (size_t i = 0; s->metrics && s->config.http_port && i < s->group.n_members; i++)
        scrape_host(s, i);
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
        case 'c': s->settings.file = optarg; break;
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
    for (size_t i = 0; i < s.n_pages; i++)
        free(s.pages[i].text);
    free(s.pages);
    cli_group_release(&s.group);
    cli_kafka_close(&s.kafka);
    config_release(&s.config);
    return status;
}
