/* SPDX-License-Identifier: Apache-2.0 */
/*
 * http.c - /metrics for Prometheus and three probes, on libmicrohttpd's own thread.
 *
 *   /startupz   200 once the model is loaded and every thread runs
 *   /readyz     200 while started, well and not stopping
 *   /livez      200 unless a failure is latched or the heartbeat of consumer, intake or outbox is
 *               stale; never 503 because a broker is away, for a restart would not bring it back
 *
 * A busy port is no error: the next free one of CONFIG_HTTP_PORTS is taken, so that workers
 * of one host may share a configuration.
 */
#include "worker/worker.h"

#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <microhttpd.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { STALE_US = 60 * 1000000, TIMEOUT_S = 10, CONNECTIONS = 64 };

struct http {
    struct worker *w;
    struct MHD_Daemon *daemon;
};

/* ---- pages ------------------------------------------------------------------------------ */

static void write_counter(FILE *f, const char *name, const char *help, uint64_t v)
{
    metrics_help(f, name, "counter", help);
    fprintf(f, "%s %" PRIu64 "\n", name, v);
}

static void write_gauge(FILE *f, const char *name, const char *help, double v)
{
    metrics_help(f, name, "gauge", help);
    fprintf(f, "%s %.17g\n", name, v);
}

static void write_engine(struct worker *w, FILE *f)
{
    struct engine_stats s;
    engine_stats(w->engine, &s);
    write_gauge(f, "loramill_engine_waiting", "Requests that wait for a place.", s.waiting);
    write_gauge(f, "loramill_engine_running", "Requests in the batch.", s.running);
    write_gauge(f, "loramill_engine_loading", "Requests that wait for adapter weights.",
                s.loading);
    write_gauge(f, "loramill_engine_waiting_prompt_tokens", "Prompt tokens of waiting requests.",
                (double)s.waiting_prompt_tokens);
    write_gauge(f, "loramill_pool_blocks", "Blocks of the unified pool.", s.pool_blocks);
    write_gauge(f, "loramill_pool_free_blocks", "Of those, free.", s.free_blocks);
    write_gauge(f, "loramill_pool_kv_blocks", "Of those, KV cache.", s.kv_blocks);
    write_gauge(f, "loramill_pool_adapter_blocks", "Of those, adapter weights.",
                s.adapter_blocks);
    write_gauge(f, "loramill_adapters_host", "Adapters packed in host memory.", s.adapters_host);
    write_gauge(f, "loramill_adapters_resident", "Adapters on the device.", s.adapters_resident);
    write_gauge(f, "loramill_adapters_host_bytes", "Host memory of packed adapters.",
                (double)s.host_adapter_bytes);
    write_counter(f, "loramill_engine_steps_total", "Steps of the batch.", s.steps);
    write_counter(f, "loramill_engine_prefill_tokens_total", "Prompt tokens computed.",
                  s.prefill_tokens);
    write_counter(f, "loramill_engine_decode_tokens_total", "Tokens generated.",
                  s.decode_tokens);
    write_counter(f, "loramill_engine_preemptions_total", "Sequences put back for memory.",
                  s.preemptions);
    write_counter(f, "loramill_adapter_loads_total", "Adapters copied to the device.",
                  s.adapter_loads);
    write_counter(f, "loramill_adapter_evictions_total", "Adapters taken off the device.",
                  s.adapter_evictions);
    write_counter(f, "loramill_adapter_hits_total", "Admissions that found their adapter there.",
                  s.adapter_hits);
}

static void write_store(struct worker *w, FILE *f)
{
    struct store_stats s;
    store_stats(w->store, &s);
    write_counter(f, "loramill_adapter_fetches_total", "Adapters fetched.", s.fetched);
    write_counter(f, "loramill_adapter_fetch_bytes_total", "Bytes of those.", s.fetched_bytes);
    write_counter(f, "loramill_adapter_fetch_failures_total", "Fetches that failed.", s.failures);
    write_counter(f, "loramill_adapter_fetch_retries_total", "Transfers tried again.", s.retries);
    write_counter(f, "loramill_adapter_disk_hits_total", "Adapters read from the disk cache.",
                  s.disk_hits);
    write_counter(f, "loramill_adapter_memory_hits_total", "Adapters the engine already held.",
                  s.memory_hits);
    write_counter(f, "loramill_adapter_negative_hits_total",
                  "Prompts refused by an answer of the store that is remembered.",
                  s.negative_hits);
    metrics_help(f, "loramill_adapter_fetch_seconds_total", "counter", "Time spent fetching.");
    fprintf(f, "loramill_adapter_fetch_seconds_total %.6f\n", (double)s.fetch_us / 1e6);
    write_gauge(f, "loramill_adapter_fetches_in_flight", "Fetches under way.", s.in_flight);
}

static enum MHD_Result reply(struct MHD_Connection *conn, unsigned status, const char *type,
                             void *body, size_t len, enum MHD_ResponseMemoryMode mode)
{
    struct MHD_Response *r = MHD_create_response_from_buffer(len, body, mode);
    if (!r)
        return MHD_NO;
    MHD_add_response_header(r, "Content-Type", type);
    enum MHD_Result done = MHD_queue_response(conn, status, r);
    MHD_destroy_response(r);
    return done;
}

static enum MHD_Result reply_text(struct MHD_Connection *conn, unsigned status, const char *text)
{
    return reply(conn, status, "text/plain; charset=utf-8", (void *)(uintptr_t)text,
                 strlen(text), MHD_RESPMEM_MUST_COPY);
}

static enum MHD_Result page_metrics(struct worker *w, struct MHD_Connection *conn)
{
    char *body = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&body, &len);
    if (!f)
        return MHD_NO;
    bool started = atomic_load(&w->started);
    struct metrics_labels labels = { w->name, w->cfg->group_id,
                                     started && w->info.model_name ? w->info.model_name : "" };
    metrics_write(&w->metrics, &labels, f);
    client_stats_write(&w->consumer_stats, &w->producer_stats, f);
    if (started)
        write_engine(w, f);
    if (started && w->store)
        write_store(w, f);
    if (fclose(f)) {
        free(body);
        return MHD_NO;
    }
    return reply(conn, MHD_HTTP_OK, "text/plain; version=0.0.4; charset=utf-8", body, len,
                 MHD_RESPMEM_MUST_FREE);
}

static enum MHD_Result probe(struct MHD_Connection *conn, const char *fault)
{
    return fault ? reply_text(conn, MHD_HTTP_SERVICE_UNAVAILABLE, fault)
                 : reply_text(conn, MHD_HTTP_OK, "ok\n");
}

static const char *not_started(struct worker *w)
{
    return atomic_load(&w->started) ? NULL : "starting\n";
}

static const char *not_ready(struct worker *w)
{
    if (atomic_load(&w->failed))
        return "failed\n";
    return atomic_load(&w->stopping) ? "stopping\n" : not_started(w);
}

static const char *not_live(struct worker *w)
{
    int64_t now = lm_now_us();
    if (atomic_load(&w->failed))
        return "failed\n";
    if (not_started(w) || atomic_load(&w->stopping))
        return NULL;
    if (now - atomic_load(&w->consumer_beat_us) > STALE_US)
        return "the consumer thread hangs\n";
    if (now - atomic_load(&w->intake_beat_us) > STALE_US)
        return "the intake thread hangs\n";
    if (now - atomic_load(&w->outbox_beat_us) > STALE_US)
        return "the outbox thread hangs\n";
    return NULL;
}

static enum MHD_Result on_request(void *ctx, struct MHD_Connection *conn, const char *url,
                                  const char *method, const char *version, const char *upload,
                                  size_t *upload_size, void **state)
{
    (void)version;
    (void)upload;
    struct http *h = ctx;
    static int seen;
    if (!*state) {              /* headers only; wait for the end of the request */
        *state = &seen;
        return MHD_YES;
    }
    if (*upload_size) {
        *upload_size = 0;
        return MHD_YES;
    }
    if (strcmp(method, "GET") && strcmp(method, "HEAD"))
        return reply_text(conn, MHD_HTTP_METHOD_NOT_ALLOWED, "only GET\n");
    if (!strcmp(url, "/metrics"))
        return page_metrics(h->w, conn);
    if (!strcmp(url, "/livez"))
        return probe(conn, not_live(h->w));
    if (!strcmp(url, "/readyz"))
        return probe(conn, not_ready(h->w));
    if (!strcmp(url, "/startupz"))
        return probe(conn, not_started(h->w));
    return reply_text(conn, MHD_HTTP_NOT_FOUND, "/metrics, /livez, /readyz or /startupz\n");
}

/* ---- listening -------------------------------------------------------------------------- */

static bool make_address(const char *text, uint16_t port, struct sockaddr_storage *out,
                         socklen_t *len)
{
    struct sockaddr_in *v4 = (struct sockaddr_in *)out;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)out;
    memset(out, 0, sizeof *out);
    if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
        v4->sin_family = AF_INET;
        v4->sin_port = htons(port);
        *len = sizeof *v4;
        return true;
    }
    if (inet_pton(AF_INET6, text, &v6->sin6_addr) == 1) {
        v6->sin6_family = AF_INET6;
        v6->sin6_port = htons(port);
        *len = sizeof *v6;
        return true;
    }
    return false;
}

/* A listening socket, or -errno. No SO_REUSEPORT: two workers must not share a port. */
static int listen_on(const struct sockaddr_storage *at, socklen_t len)
{
    int fd = socket(at->ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){ 1 }, sizeof(int));
    if (bind(fd, (const struct sockaddr *)at, len) || listen(fd, 32)) {
        int e = errno;
        close(fd);
        return -e;
    }
    return fd;
}

static lm_status listen_near(const struct config *cfg, int *fd, int *port, struct lm_err *err)
{
    struct sockaddr_storage at;
    socklen_t len;
    for (int i = 0; i < CONFIG_HTTP_PORTS; i++) {
        int64_t p = cfg->http_port + i;
        if (p > UINT16_MAX)
            break;
        if (!make_address(cfg->http_address, (uint16_t)p, &at, &len))
            return lm_err_set(err, LM_INVALID, "http.address=%s: not an IPv4 or IPv6 address",
                              cfg->http_address);
        *fd = listen_on(&at, len);
        *port = (int)p;
        if (*fd >= 0)
            return LM_OK;
        if (*fd != -EADDRINUSE)
            return lm_err_set(err, LM_IO, "http.address=%s, http.port=%d: %s", cfg->http_address,
                              *port, strerror(-*fd));
    }
    return lm_err_set(err, LM_BUSY, "http.port=%" PRId64 ": it and the following %d are all busy",
                      cfg->http_port, CONFIG_HTTP_PORTS - 1);
}

lm_status http_new(struct worker *w, http **out, struct lm_err *err)
{
    int fd = -1, port = 0;
    lm_status st = listen_near(w->cfg, &fd, &port, err);
    if (st)
        return st;
    struct http *h = lm_calloc(1, sizeof *h);
    if (h) {
        h->w = w;
        h->daemon = MHD_start_daemon(MHD_USE_INTERNAL_POLLING_THREAD | MHD_USE_POLL, 0, NULL,
                                     NULL, on_request, h, MHD_OPTION_LISTEN_SOCKET, fd,
                                     MHD_OPTION_CONNECTION_LIMIT, (unsigned)CONNECTIONS,
                                     MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)TIMEOUT_S,
                                     MHD_OPTION_END);
    }
    if (!h || !h->daemon) {
        close(fd);
        free(h);
        return lm_err_set(err, LM_IO, "can't start the HTTP thread on port %d", port);
    }
    lm_log(LM_INFO, "http", "metrics and probes on http://%s:%d/", w->cfg->http_address, port);
    *out = h;
    return LM_OK;
}

void http_free(http *h)
{
    if (!h)
        return;
    MHD_stop_daemon(h->daemon);
    free(h);
}
