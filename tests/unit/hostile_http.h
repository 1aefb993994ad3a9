/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hostile_http.h - an HTTP server for tests that can misbehave in every way we could think of.
 *
 * It is written on bare sockets, since a good library refuses to be this bad. One thread accepts,
 * one thread a connection serves one request and closes. A test registers behaviours by the first
 * segment of the path; each gets the request and the number of requests that path has had before,
 * so that "bad once, then good" is easy to say.
 */
#ifndef LORAMILL_TESTS_HOSTILE_HTTP_H
#define LORAMILL_TESTS_HOSTILE_HTTP_H

#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

struct site;

struct request {
    struct site *site;
    int fd;
    int nth;                    /* requests for this very path before this one */
    char path[1024];
    char range[128], if_range[128], authorization[128];
    long from;                  /* of Range: bytes=N-, else -1 */
};

typedef void behaviour(struct request *r);

struct rule { const char *name; behaviour *serve; };

struct hits { char path[1024]; int n; };

struct site {
    int listener, port;
    const struct rule *rules;   /* ended by a NULL name */
    pthread_t thread;
    pthread_mutex_t lock;
    struct hits hits[256];
    int n_hits;
    atomic_int total, open;
    atomic_bool stopping;
};

/* ---- talking ---------------------------------------------------------------------------- */

static inline bool send_bytes(struct request *r, const void *data, size_t len)
{
    const char *p = data;
    while (len > 0) {
        ssize_t n = send(r->fd, p, len, MSG_NOSIGNAL);
        if (n <= 0)
            return false;
        p += n;
        len -= (size_t)n;
    }
    return true;
}

__attribute__((format(printf, 2, 3)))
static inline bool sendf(struct request *r, const char *fmt, ...)
{
    char text[4096];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    return send_bytes(r, text, (size_t)n);
}

static inline bool ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), m = strlen(end);
    return n >= m && !strcmp(s + n - m, end);
}

/* ---- listening -------------------------------------------------------------------------- */

static inline void copy_header(const char *head, const char *name, char *out, size_t size)
{
    const char *at = strcasestr(head, name);
    out[0] = '\0';
    if (at)
        snprintf(out, size, "%.*s", (int)strcspn(at + strlen(name), "\r\n"), at + strlen(name));
}

static inline bool read_request(struct request *r)
{
    char head[8192];
    size_t n = 0;
    while (n < sizeof head - 1) {
        ssize_t got = recv(r->fd, head + n, sizeof head - 1 - n, 0);
        if (got <= 0)
            return false;
        n += (size_t)got;
        head[n] = '\0';
        if (strstr(head, "\r\n\r\n"))
            break;
    }
    if (sscanf(head, "GET %1023s", r->path) != 1 && sscanf(head, "PUT %1023s", r->path) != 1)
        return false;
    copy_header(head, "\r\nRange: ", r->range, sizeof r->range);
    copy_header(head, "\r\nIf-Range: ", r->if_range, sizeof r->if_range);
    copy_header(head, "\r\nAuthorization: ", r->authorization, sizeof r->authorization);
    if (sscanf(r->range, "bytes=%ld-", &r->from) != 1)
        r->from = -1;
    return true;
}

static inline int site_count(struct site *s, const char *path, int add)
{
    int n = 0;
    pthread_mutex_lock(&s->lock);
    int i = 0;
    while (i < s->n_hits && strcmp(s->hits[i].path, path) != 0)
        i++;
    if (i == s->n_hits && add && s->n_hits < 256)
        snprintf(s->hits[s->n_hits++].path, sizeof s->hits[0].path, "%s", path);
    if (i < s->n_hits) {
        n = s->hits[i].n;
        s->hits[i].n += add;
    }
    pthread_mutex_unlock(&s->lock);
    return n;
}

static inline void *serve_one(void *arg)
{
    struct request *r = arg;
    struct site *s = r->site;
    if (read_request(r)) {
        r->nth = site_count(s, r->path, 1);
        s->total++;
        const struct rule *rule = s->rules;
        size_t len = strcspn(r->path + 1, "/");
        while (rule->name && (strlen(rule->name) != len || strncmp(rule->name, r->path + 1, len)))
            rule++;
        if (rule->name)
            rule->serve(r);
        else
            sendf(r, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    shutdown(r->fd, SHUT_WR);
    char drain[256];
    struct timeval tv = { .tv_usec = 200000 };
    setsockopt(r->fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
    while (recv(r->fd, drain, sizeof drain, 0) > 0)
        ;
    close(r->fd);
    free(r);
    s->open--;
    return NULL;
}

static inline void *accept_all(void *arg)
{
    struct site *s = arg;
    while (!s->stopping) {
        int fd = accept(s->listener, NULL, NULL);
        if (fd < 0)
            continue;
        if (s->stopping) {
            close(fd);
            break;
        }
        struct request *r = calloc(1, sizeof *r);
        pthread_t t;
        r->site = s;
        r->fd = fd;
        s->open++;
        if (pthread_create(&t, NULL, serve_one, r) == 0)
            pthread_detach(t);
        else
            abort();
    }
    return NULL;
}

static inline struct site *site_open(const struct rule *rules)
{
    struct site *s = calloc(1, sizeof *s);
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t len = sizeof at;
    s->rules = rules;
    pthread_mutex_init(&s->lock, NULL);
    s->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(s->listener, (struct sockaddr *)&at, sizeof at) || listen(s->listener, 64) ||
        getsockname(s->listener, (struct sockaddr *)&at, &len) ||
        pthread_create(&s->thread, NULL, accept_all, s))
        abort();
    s->port = ntohs(at.sin_port);
    return s;
}

/* Waits for connections that are still served: their threads use the site. */
static inline void site_close(struct site *s)
{
    s->stopping = true;
    shutdown(s->listener, SHUT_RDWR);
    close(s->listener);
    pthread_join(s->thread, NULL);
    while (s->open > 0)
        usleep(1000);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

#endif
