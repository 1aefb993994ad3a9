/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cli_scrape.h - the /metrics of a group's workers, for `loramill status`.
 *
 * A member's client id is its worker's name. Where its metrics are is not written anywhere, so they
 * are looked for on the member's host, and recognised by the name in build_info: from http.port on,
 * as many ports as the host has members and a few more; where that leaves one of them without, on
 * the rest of CONFIG_HTTP_PORTS, as a worker takes the first that is free. But not where all of the
 * first said nothing, as a firewall has it: more of the same would be no better.
 *
 * All hosts are asked at once: however many say nothing, they take a second together, for each
 * SCRAPE_MOST ports that are asked. SIGINT and SIGTERM end it, see cli_catch_signals().
 *
 * Threads: one at a time.
 */
#ifndef LORAMILL_WORKER_TOOLS_CLI_SCRAPE_H
#define LORAMILL_WORKER_TOOLS_CLI_SCRAPE_H

#include "worker/tools/cli_group.h"

enum { SCRAPE_MS = 1000, SCRAPE_MOST = 400 };

/* Those that answered. The hosts are the group's strings. */
struct scrape_pages {
    struct scrape_page { char *text; const char *host; } *at;
    size_t n;
};

/* `out` begins as zeros. What can't be had, for want of memory too, is not there. */
void scrape_workers(const struct group *g, int http_port, struct scrape_pages *out);
/* The page of that worker, or NULL. */
const char *scrape_page_of(const struct scrape_pages *p, const struct group_member *m);
void scrape_release(struct scrape_pages *p);

#endif
