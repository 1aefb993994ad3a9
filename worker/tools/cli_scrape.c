/* SPDX-License-Identifier: Apache-2.0 */
/* cli_scrape.c - see cli_scrape.h. */
#include "worker/tools/cli_scrape.h"

#include <curl/curl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/config.h"
#include "worker/tools/cli.h"

enum { MORE_PORTS = 4, LOOK_MS = 100 };

/* A host, at the index of its first member; of the others nothing is set. */
struct host { int members; bool heard; };

struct scrape {
    CURL *curl;
    FILE *f;
    char *text;
    size_t len;
    const char *name;
    struct host *host;
    bool done;
};

struct scraper {
    const struct group *group;
    struct scrape_pages *pages;
    struct host *hosts;
    CURLM *all;
    struct scrape at[SCRAPE_MOST];
    size_t n;
};

/* ---- pages ------------------------------------------------------------------------------ */

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

const char *scrape_page_of(const struct scrape_pages *p, const struct group_member *m)
{
    for (size_t i = 0; i < p->n; i++)
        if (!strcmp(p->at[i].host, m->host) && is_of(p->at[i].text, m->client))
            return p->at[i].text;
    return NULL;
}

/* Takes the text. */
static void keep_page(struct scrape_pages *p, char *text, const char *host)
{
    struct scrape_page *grown = text ? lm_reallocarray(p->at, p->n + 1, sizeof *grown) : NULL;
    if (!grown) {
        free(text);
        return;
    }
    p->at = grown;
    p->at[p->n++] = (struct scrape_page){ text, host };
}

void scrape_release(struct scrape_pages *p)
{
    for (size_t i = 0; i < p->n; i++)
        free(p->at[i].text);
    free(p->at);
    *p = (struct scrape_pages){ 0 };
}

/* ---- transfers -------------------------------------------------------------------------- */

static void begin(struct scrape *q, CURLM *all, int port)
{
    char url[384];
    q->curl = curl_easy_init();
    q->f = open_memstream(&q->text, &q->len);
    if (!q->curl || !q->f)
        return;
    snprintf(url, sizeof url, strchr(q->name, ':') ? "http://[%s]:%d/metrics"
                                                   : "http://%s:%d/metrics", q->name, port);
    curl_easy_setopt(q->curl, CURLOPT_URL, url);
    curl_easy_setopt(q->curl, CURLOPT_WRITEDATA, q->f);
    curl_easy_setopt(q->curl, CURLOPT_PRIVATE, q);
    curl_easy_setopt(q->curl, CURLOPT_TIMEOUT_MS, (long)SCRAPE_MS);
    curl_easy_setopt(q->curl, CURLOPT_MAXFILESIZE, 8L << 20);
    curl_easy_setopt(q->curl, CURLOPT_NOSIGNAL, 1L);
    curl_multi_add_handle(all, q->curl);
}

static void transfer(CURLM *all)
{
    int running = 0, left;
    CURLMcode e;
    do {
        e = curl_multi_perform(all, &running);
        if (!e && running)
            e = curl_multi_poll(all, NULL, 0, LOOK_MS, NULL);
    } while (!e && running && !cli_interrupted());
    for (CURLMsg *m; (m = curl_multi_info_read(all, &left));) {
        struct scrape *q = NULL;
        long code = 0;
        curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, (char **)&q);
        curl_easy_getinfo(m->easy_handle, CURLINFO_RESPONSE_CODE, &code);
        q->done = !m->data.result && code == 200;
        q->host->heard |= m->data.result != CURLE_OPERATION_TIMEDOUT;
    }
}

static void end(struct scraper *s, struct scrape *q)
{
    if (q->curl) {
        curl_multi_remove_handle(s->all, q->curl);
        curl_easy_cleanup(q->curl);
    }
    if (q->f)
        fclose(q->f);
    if (!q->done) {
        free(q->text);
        q->text = NULL;
    }
    keep_page(s->pages, q->text, q->name);
}

static void run(struct scraper *s)
{
    if (!cli_interrupted())
        transfer(s->all);
    for (size_t i = 0; i < s->n; i++)
        end(s, &s->at[i]);
    s->n = 0;
}

/* ---- hosts ------------------------------------------------------------------------------ */

static void count_members(struct scraper *s)
{
    const struct group_member *m = s->group->members;
    for (size_t i = 0; i < s->group->n_members; i++) {
        size_t first = 0;
        while (strcmp(m[first].host, m[i].host))
            first++;
        s->hosts[first].members++;
    }
}

static void ask(struct scraper *s, size_t host, int from, int to)
{
    for (int port = from; port < to && !cli_interrupted(); port++) {
        if (s->n == SCRAPE_MOST)
            run(s);
        struct scrape *q = &s->at[s->n++];
        *q = (struct scrape){ .name = s->group->members[host].host, .host = &s->hosts[host] };
        begin(q, s->all, port);
    }
}

static bool misses_one(const struct scraper *s, size_t host)
{
    const struct group_member *m = s->group->members;
    for (size_t i = host; i < s->group->n_members; i++)
        if (!strcmp(m[i].host, m[host].host) && !scrape_page_of(s->pages, &m[i]))
            return true;
    return false;
}

static void ask_all(struct scraper *s, int http_port)
{
    const int past = LM_MIN(http_port + CONFIG_HTTP_PORTS, UINT16_MAX + 1);
    const struct host *h = s->hosts;
    count_members(s);
    for (size_t i = 0; i < s->group->n_members; i++)
        if (h[i].members)
            ask(s, i, http_port, LM_MIN(http_port + h[i].members + MORE_PORTS, past));
    run(s);
    for (size_t i = 0; i < s->group->n_members; i++)
        if (h[i].members && h[i].heard && misses_one(s, i))
            ask(s, i, LM_MIN(http_port + h[i].members + MORE_PORTS, past), past);
    run(s);
}

void scrape_workers(const struct group *g, int http_port, struct scrape_pages *out)
{
    if (!g->n_members)
        return;
    curl_global_init(CURL_GLOBAL_DEFAULT);
    struct scraper *s = lm_calloc(1, sizeof *s);
    struct host *hosts = lm_calloc(g->n_members, sizeof *hosts);
    CURLM *all = curl_multi_init();
    if (s && hosts && all) {
        s->group = g;
        s->pages = out;
        s->hosts = hosts;
        s->all = all;
        ask_all(s, http_port);
    }
    curl_multi_cleanup(all);
    free(hosts);
    free(s);
}
