/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dev_store.c - a folder of adapters over HTTP with libmicrohttpd; see dev_store.h.
 *
 * A request ends in one of: 200 the file, 206 a part of it, 304 not needed, 404, 405, 416. Bodies
 * are sent from the file's descriptor; a file that is replaced while it is being sent goes on from
 * the old inode, and the next request sees another ETag.
 */
#include "worker/tools/dev_store.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <arpa/inet.h>
#include <microhttpd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/engine.h"
#include "worker/store/adapter_dirs.h"

#define IDLE_TIMEOUT_S 60

static const char *const served[] = { "adapter_config.json", "adapter_model.safetensors" };

struct dev_store {
    int folder;                 /* descriptor */
    struct MHD_Daemon *daemon;
    _Atomic uint64_t requests, adapters, not_found, bytes;
};

/* ---- one request ------------------------------------------------------------------------ */

struct range { uint64_t first, last; };

enum range_kind { RANGE_NONE, RANGE_PART, RANGE_UNSATISFIABLE };

static bool parse_u64(const char **s, uint64_t *out)
{
    char *end;
    if (**s < '0' || **s > '9')
        return false;
    errno = 0;
    *out = strtoull(*s, &end, 10);
    *s = end;
    return errno == 0;
}

/* RFC 9110 section 14: one range, "a-b", "a-" or "-n"; anything else is ignored, as allowed. */
static enum range_kind parse_range(const char *h, uint64_t size, struct range *r)
{
    if (!h || strncmp(h, "bytes=", 6) != 0)
        return RANGE_NONE;
    h += 6;
    if (*h == '-') {
        uint64_t n;
        h++;
        if (!parse_u64(&h, &n) || *h)
            return RANGE_NONE;
        *r = (struct range){ n < size ? size - n : 0, size - 1 };
        return n > 0 && size > 0 ? RANGE_PART : RANGE_UNSATISFIABLE;
    }
    if (!parse_u64(&h, &r->first) || *h++ != '-')
        return RANGE_NONE;
    r->last = UINT64_MAX;
    if (*h && (!parse_u64(&h, &r->last) || *h || r->last < r->first))
        return RANGE_NONE;
    if (r->first >= size)
        return RANGE_UNSATISFIABLE;
    r->last = LM_MIN(r->last, size - 1);
    return RANGE_PART;
}

/* Opens what a URL names, or returns -1. "/brand/voice/adapter_config.json": id "brand/voice". */
static int open_named(const dev_store *s, const char *url, struct stat *sb, bool *is_weights)
{
    char path[PATH_MAX];
    const char *slash = strrchr(url, '/');
    if (url[0] != '/' || slash == url)
        return -1;
    *is_weights = !strcmp(slash + 1, served[1]);
    if (!*is_weights && strcmp(slash + 1, served[0]) != 0)
        return -1;
    size_t id_len = (size_t)(slash - url) - 1;
    if (engine_adapter_id_check(url + 1, id_len, NULL) != LM_OK)
        return -1;
    snprintf(path, sizeof path, "%.*s/%s", (int)id_len, url + 1, slash + 1);
    int fd = openat(s->folder, path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd >= 0 && (fstat(fd, sb) != 0 || !S_ISREG(sb->st_mode))) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static enum MHD_Result say(struct MHD_Connection *c, unsigned code, const char *text,
                           const char *header, const char *value)
{
    struct MHD_Response *r = MHD_create_response_from_buffer(strlen(text), (void *)(uintptr_t)text,
                                                             MHD_RESPMEM_PERSISTENT);
    if (!r)
        return MHD_NO;
    MHD_add_response_header(r, "Content-Type", "text/plain");
    if (header)
        MHD_add_response_header(r, header, value);
    enum MHD_Result ok = MHD_queue_response(c, code, r);
    MHD_destroy_response(r);
    return ok;
}

static const char *request_header(struct MHD_Connection *c, const char *name)
{
    return MHD_lookup_connection_value(c, MHD_HEADER_KIND, name);
}

/* Sends a part of `fd`, which it takes over. */
static enum MHD_Result send_part(dev_store *s, struct MHD_Connection *c, int fd, unsigned code,
                                 struct range r, uint64_t size, const char *etag)
{
    char content_range[96];
    uint64_t len = size ? r.last - r.first + 1 : 0;
    struct MHD_Response *resp = MHD_create_response_from_fd_at_offset64(len, fd, r.first);
    if (!resp) {
        close(fd);
        return MHD_NO;
    }
    MHD_add_response_header(resp, "Content-Type", "application/octet-stream");
    MHD_add_response_header(resp, "Accept-Ranges", "bytes");
    MHD_add_response_header(resp, "ETag", etag);
    if (code == MHD_HTTP_PARTIAL_CONTENT) {
        snprintf(content_range, sizeof content_range, "bytes %llu-%llu/%llu",
                 (unsigned long long)r.first, (unsigned long long)r.last,
                 (unsigned long long)size);
        MHD_add_response_header(resp, "Content-Range", content_range);
    }
    s->bytes += len;
    enum MHD_Result ok = MHD_queue_response(c, code, resp);
    MHD_destroy_response(resp);
    return ok;
}

static enum MHD_Result send_file(dev_store *s, struct MHD_Connection *c, int fd,
                                 const struct stat *sb)
{
    char etag[80], content_range[48];
    uint64_t size = (uint64_t)sb->st_size;
    struct range r;
    snprintf(etag, sizeof etag, "\"%llx-%llx-%llx\"", (unsigned long long)sb->st_ino,
             (unsigned long long)size,
             (unsigned long long)sb->st_mtim.tv_sec * 1000000000ULL +
                 (unsigned long long)sb->st_mtim.tv_nsec);
    const char *none_match = request_header(c, "If-None-Match");
    if (none_match && !strcmp(none_match, etag)) {
        close(fd);
        return say(c, MHD_HTTP_NOT_MODIFIED, "", "ETag", etag);
    }
    const char *if_range = request_header(c, "If-Range");
    bool honour = !if_range || !strcmp(if_range, etag);
    enum range_kind kind = honour ? parse_range(request_header(c, "Range"), size, &r) : RANGE_NONE;
    if (kind == RANGE_UNSATISFIABLE) {
        close(fd);
        snprintf(content_range, sizeof content_range, "bytes */%llu", (unsigned long long)size);
        return say(c, MHD_HTTP_RANGE_NOT_SATISFIABLE, "no such range\n", "Content-Range",
                   content_range);
    }
    if (kind == RANGE_NONE)
        r = (struct range){ 0, size ? size - 1 : 0 };
    return send_part(s, c, fd, kind == RANGE_PART ? MHD_HTTP_PARTIAL_CONTENT : MHD_HTTP_OK, r,
                     size, etag);
}

static enum MHD_Result on_request(void *cls, struct MHD_Connection *c, const char *url,
                                  const char *method, const char *version, const char *body,
                                  size_t *body_size, void **state)
{
    dev_store *s = cls;
    struct stat sb;
    bool is_weights;
    (void)version;
    (void)body;
    /* The first call comes before the request was read whole: answering then would cost the
     * connection. */
    if (!*state) {
        *state = s;
        return MHD_YES;
    }
    if (*body_size > 0 || (strcmp(method, "GET") != 0 && strcmp(method, "HEAD") != 0)) {
        *body_size = 0;
        return say(c, MHD_HTTP_METHOD_NOT_ALLOWED, "only GET and HEAD\n", "Allow", "GET, HEAD");
    }
    s->requests++;
    int fd = open_named(s, url, &sb, &is_weights);
    lm_log(LM_DEBUG, "store", "%s %s: %s", method, url, fd >= 0 ? "found" : "not found");
    if (fd < 0) {
        s->not_found++;
        return say(c, MHD_HTTP_NOT_FOUND, "no such adapter file\n", NULL, NULL);
    }
    if (is_weights)
        s->adapters++;
    return send_file(s, c, fd, &sb);
}

/* ---- life ------------------------------------------------------------------------------- */

lm_status dev_store_new(const char *folder, int port, dev_store **out, struct lm_err *err)
{
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                              .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    dev_store *s = lm_calloc(1, sizeof *s);
    *out = NULL;
    if (!s)
        return lm_err_set(err, LM_NOMEM, "adapter store: no memory");
    s->folder = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (s->folder < 0) {
        lm_err_set(err, LM_NOT_FOUND, "adapter folder %s: %s", folder, strerror(errno));
        free(s);
        return LM_NOT_FOUND;
    }
    s->daemon = MHD_start_daemon(MHD_USE_EPOLL_INTERNAL_THREAD, 0, NULL, NULL, on_request, s,
                                 MHD_OPTION_SOCK_ADDR, (struct sockaddr *)&at,
                                 MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)IDLE_TIMEOUT_S,
                                 MHD_OPTION_END);
    if (!s->daemon) {
        dev_store_free(s);
        return lm_err_set(err, LM_NET, "adapter store: can't listen on 127.0.0.1:%d%s%s", port,
                          errno ? ": " : "", errno ? strerror(errno) : "");
    }
    *out = s;
    return LM_OK;
}

void dev_store_free(dev_store *s)
{
    if (!s)
        return;
    if (s->daemon)
        MHD_stop_daemon(s->daemon);
    close(s->folder);
    free(s);
}

int dev_store_port(const dev_store *s)
{
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(s->daemon, MHD_DAEMON_INFO_BIND_PORT);
    return info ? info->port : 0;
}

void dev_store_stats(const dev_store *s, struct dev_store_stats *out)
{
    *out = (struct dev_store_stats){ s->requests, s->adapters, s->not_found, s->bytes };
}

static lm_status count_one(void *ctx, const char *id, const char *dir, struct lm_err *err)
{
    int *n = ctx;
    (void)id;
    (void)dir;
    (void)err;
    ++*n;
    return LM_OK;
}

int dev_store_count(const char *folder)
{
    int n = 0;
    (void)adapter_dirs_each(folder, count_one, &n, NULL);
    return n;
}
