/* SPDX-License-Identifier: Apache-2.0 */
/*
 * worker_registry_server.h - a schema registry for tests, which can be told to misbehave.
 *
 * One libmicrohttpd thread answers every request with what the test set, and counts. Real
 * registries are met by the integration tests; this one is for what a real one does on a bad day.
 */
#ifndef TESTS_UNIT_WORKER_REGISTRY_SERVER_H
#define TESTS_UNIT_WORKER_REGISTRY_SERVER_H

#include <microhttpd.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct server {
    struct MHD_Daemon *daemon;
    pthread_mutex_t lock;
    char url[64];
    /* what to answer */
    unsigned status;
    char *body;
    size_t body_len;
    int delay_ms;
    const char *types;          /* answered to /schemas/types, or NULL */
    int conflicts;              /* so many requests are answered 409 first */
    /* what was asked */
    int requests;
    char path[512], method[16], accept[128], content_type[128], authorization[128];
    char upload[65536];
    size_t upload_len;
};

static void copy_header(struct MHD_Connection *c, const char *name, char *out, size_t size)
{
    const char *v = MHD_lookup_connection_value(c, MHD_HEADER_KIND, name);
    snprintf(out, size, "%s", v ? v : "");
}

static enum MHD_Result server_answer(void *user, struct MHD_Connection *c, const char *url,
                                     const char *method, const char *version, const char *data,
                                     size_t *size, void **state)
{
    struct server *s = user;
    static int seen;
    (void)version;
    pthread_mutex_lock(&s->lock);
    if (!*state) {
        *state = &seen;
        s->upload_len = 0;
        pthread_mutex_unlock(&s->lock);
        return MHD_YES;
    }
    if (*size) {
        size_t n = *size < sizeof s->upload - s->upload_len - 1 ? *size
                   : sizeof s->upload - s->upload_len - 1;
        memcpy(s->upload + s->upload_len, data, n);
        s->upload[s->upload_len += n] = '\0';
        *size = 0;
        pthread_mutex_unlock(&s->lock);
        return MHD_YES;
    }
    s->requests++;
    snprintf(s->path, sizeof s->path, "%s", url);
    snprintf(s->method, sizeof s->method, "%s", method);
    copy_header(c, "Accept", s->accept, sizeof s->accept);
    copy_header(c, "Content-Type", s->content_type, sizeof s->content_type);
    copy_header(c, "Authorization", s->authorization, sizeof s->authorization);
    int delay = s->delay_ms;
    bool types = s->types && strcmp(url, "/schemas/types") == 0;
    unsigned status = types ? 200 : s->conflicts > 0 ? 409 : s->status;
    s->conflicts -= s->conflicts > 0;
    const char *body = types ? s->types : s->body;
    struct MHD_Response *r = MHD_create_response_from_buffer(types ? strlen(body) : s->body_len,
                                                             (void *)(uintptr_t)body,
                                                             MHD_RESPMEM_MUST_COPY);
    pthread_mutex_unlock(&s->lock);
    MHD_add_response_header(r, "Location", "http://127.0.0.1:9/elsewhere");
    if (delay)
        usleep((useconds_t)delay * 1000);
    enum MHD_Result ok = MHD_queue_response(c, status, r);
    MHD_destroy_response(r);
    return ok;
}

static void server_set(struct server *s, unsigned status, const char *body, size_t len)
{
    pthread_mutex_lock(&s->lock);
    free(s->body);
    s->body = malloc(len + 1);
    memcpy(s->body, body, len);
    s->body[len] = '\0';
    s->body_len = len;
    s->status = status;
    s->delay_ms = 0;
    s->requests = 0;
    pthread_mutex_unlock(&s->lock);
}

/* What was asked, safe to read between requests. */
static const struct server *server_seen(struct server *s)
{
    pthread_mutex_lock(&s->lock);
    pthread_mutex_unlock(&s->lock);
    return s;
}

static int server_start(struct server *s)
{
    memset(s, 0, sizeof *s);
    pthread_mutex_init(&s->lock, NULL);
    server_set(s, 500, "", 0);
    s->daemon = MHD_start_daemon(MHD_USE_INTERNAL_POLLING_THREAD, 0, NULL, NULL, server_answer, s,
                                 MHD_OPTION_END);
    if (!s->daemon)
        return -1;
    unsigned port = MHD_get_daemon_info(s->daemon, MHD_DAEMON_INFO_BIND_PORT)->port;
    snprintf(s->url, sizeof s->url, "http://127.0.0.1:%u", port);
    return 0;
}

static void server_stop(struct server *s)
{
    MHD_stop_daemon(s->daemon);
    pthread_mutex_destroy(&s->lock);
    free(s->body);
}

/* One for all tests of a program: its group's set-up and tear-down. */
static struct server server;

static inline int server_set_up(void **state)
{
    (void)state;
    return server_start(&server);
}

static inline int server_tear_down(void **state)
{
    (void)state;
    server_stop(&server);
    return 0;
}

#endif
