/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fetch.c - attempts at fetching a file, on libcurl's multi interface; see fetch.h.
 *
 * Life of an attempt
 *
 *   fetch_start --> headers --> begin_body: what does this response mean for the file?
 *                      |             |  TAKE: pwrite at `have`      |  DISCARD: an error's page
 *                      |             v                              v
 *                      +-------> conclude: curl's result, then ours, then the status code
 *
 * A callback that refuses data sets the attempt's verdict first and then makes curl stop; that
 * verdict wins over curl's "write error". With redirects the headers of several responses pass by:
 * each status line starts them anew, so only the last response's count.
 */
#include "worker/store/fetch.h"

#include <curl/curl.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/queue.h>
#include <unistd.h>

#include "worker/resolver.h"
#include "worker/url.h"

#define MAX_REDIRECTS 5
#define MAX_HEADER_BYTES 65536
#define MAX_ERROR_BODY 65536    /* read to keep the connection; beyond that we hang up */

enum body_mode { BODY_UNDECIDED, BODY_TAKE, BODY_DISCARD };

struct fetch_attempt {
    fetcher *owner;
    struct fetch *file;
    CURL *easy;
    struct curl_slist *headers;
    bool ranged;                /* asked for a part */
    enum body_mode mode;
    bool judged;                /* file->status and err are set, by a callback */
    /* of the response that is passing by */
    size_t header_bytes;
    char etag[256], content_range[128], encoding[32];
    uint64_t body_bytes;
    int64_t mark_us;            /* start of the stall window, and body_bytes then */
    uint64_t mark_bytes;
    char why[CURL_ERROR_SIZE];
    LIST_ENTRY(fetch_attempt) link;
};

struct fetcher {
    CURLM *multi;
    char *ca_file, *auth_header;
    int connect_timeout_ms, stall_timeout_ms;
    LIST_HEAD(, fetch_attempt) running;
};

/* ---- verdicts --------------------------------------------------------------------------- */

/* Sets the outcome once: what went wrong first is what is told. */
static void LM_PRINTF(4, 5) judge(struct fetch_attempt *a, lm_status status, bool retry,
                                  const char *fmt, ...)
{
    struct fetch *file = a->file;
    char url[URL_SHOWN], text[300];
    if (a->judged)
        return;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    url_show(file->url, url, sizeof url);
    a->judged = true;
    file->status = lm_err_set(&file->err, status, "GET %s: %s", url, text);
    file->retry = retry;
}

/* What is on disk can't be built upon. */
static void forget_part(struct fetch *file)
{
    file->have = 0;
    file->total = FETCH_UNKNOWN;
    file->etag[0] = '\0';
}

static void judge_disk(struct fetch_attempt *a, const char *what)
{
    judge(a, LM_IO, false, "%s: %s", what, strerror(errno));
}

/* ---- headers ---------------------------------------------------------------------------- */

static bool header_is(const char *line, size_t len, const char *name)
{
    size_t n = strlen(name);
    return len > n && line[n] == ':' && !strncasecmp(line, name, n);
}

/* The value, trimmed; "" when it does not fit. */
static void header_value(const char *line, size_t len, char *out, size_t size)
{
    const char *v = memchr(line, ':', len);
    const char *end = line + len;
    out[0] = '\0';
    if (!v)
        return;
    for (v++; v < end && (*v == ' ' || *v == '\t'); v++)
        ;
    while (end > v && strchr(" \t\r\n", end[-1]))
        end--;
    if ((size_t)(end - v) < size && !memchr(v, '\0', (size_t)(end - v))) {
        memcpy(out, v, (size_t)(end - v));
        out[end - v] = '\0';
    }
}

static size_t on_header(char *line, size_t one, size_t len, void *user)
{
    struct fetch_attempt *a = user;
    (void)one;
    if (len >= 5 && !memcmp(line, "HTTP/", 5))
        a->etag[0] = a->content_range[0] = a->encoding[0] = '\0';
    a->header_bytes += len;
    if (a->header_bytes > MAX_HEADER_BYTES) {
        judge(a, LM_FORMAT, true, "more than %d bytes of headers", MAX_HEADER_BYTES);
        return 0;
    }
    if (header_is(line, len, "ETag"))
        header_value(line, len, a->etag, sizeof a->etag);
    else if (header_is(line, len, "Content-Range"))
        header_value(line, len, a->content_range, sizeof a->content_range);
    else if (header_is(line, len, "Content-Encoding"))
        header_value(line, len, a->encoding, sizeof a->encoding);
    return len;
}

/* RFC 9110 section 8.8.3: only a strong validator makes two parts one file. */
static bool is_strong(const char *etag)
{
    size_t n = strlen(etag);
    return n > 2 && etag[0] == '"' && etag[n - 1] == '"';
}

/* "bytes 10-99/100" with a known total. */
static bool parse_content_range(const char *s, uint64_t *first, uint64_t *last, uint64_t *total)
{
    uint64_t *const field[] = { first, last, total };
    static const char behind[] = { '-', '/', '\0' };
    if (strncasecmp(s, "bytes ", 6) != 0)
        return false;
    s += 6;
    for (int i = 0; i < 3; i++) {
        char *end;
        if (*s < '0' || *s > '9')
            return false;
        errno = 0;
        *field[i] = strtoull(s, &end, 10);
        if (errno || *end != behind[i])
            return false;
        s = end + 1;
    }
    return *first <= *last && *last < *total;
}

/* ---- body ------------------------------------------------------------------------------- */

static long response_code(const struct fetch_attempt *a)
{
    long code = 0;
    curl_easy_getinfo(a->easy, CURLINFO_RESPONSE_CODE, &code);
    return code;
}

static void check_size(struct fetch_attempt *a, uint64_t bytes)
{
    if (bytes != FETCH_UNKNOWN && bytes > a->file->max_bytes)
        judge(a, LM_TOO_LARGE, false, "%llu bytes, more than the %llu allowed",
              (unsigned long long)bytes, (unsigned long long)a->file->max_bytes);
}

/* 200: the whole file, whatever we asked for. */
static void begin_whole(struct fetch_attempt *a)
{
    struct fetch *file = a->file;
    curl_off_t length = -1;
    curl_easy_getinfo(a->easy, CURLINFO_CONTENT_LENGTH_DOWNLOAD_T, &length);
    forget_part(file);
    if (ftruncate(file->fd, 0) != 0) {
        judge_disk(a, "truncating the file");
        return;
    }
    file->total = length >= 0 ? (uint64_t)length : FETCH_UNKNOWN;
    if (is_strong(a->etag))
        memcpy(file->etag, a->etag, sizeof file->etag);
    check_size(a, file->total);
}

/* 206: the rest of what we have, or nothing we can use. */
static void begin_rest(struct fetch_attempt *a)
{
    struct fetch *file = a->file;
    uint64_t first, last, total;
    const char *fault = NULL;
    if (!a->ranged)
        fault = "a part, though the whole was asked for";
    else if (!parse_content_range(a->content_range, &first, &last, &total))
        fault = "a part without a usable Content-Range";
    else if (first != file->have || last + 1 != total)
        fault = "another part than the one asked for";
    else if (file->total != FETCH_UNKNOWN && total != file->total)
        fault = "a part of a file of another size";
    else if (strcmp(a->etag, file->etag) != 0)
        fault = "a part of another version";
    if (fault) {
        forget_part(file);
        judge(a, LM_FORMAT, true, "the server sent %s", fault);
        return;
    }
    file->total = total;
    check_size(a, total);
}

static void begin_body(struct fetch_attempt *a)
{
    long code = response_code(a);
    a->mode = code == 200 || code == 206 ? BODY_TAKE : BODY_DISCARD;
    if (a->mode == BODY_DISCARD)
        return;
    if (a->encoding[0] && strcasecmp(a->encoding, "identity") != 0)
        judge(a, LM_UNSUPPORTED, false, "Content-Encoding %s was not asked for", a->encoding);
    else if (code == 200)
        begin_whole(a);
    else
        begin_rest(a);
}

static void take_body(struct fetch_attempt *a, const char *data, size_t len)
{
    struct fetch *file = a->file;
    if (len > file->max_bytes - file->have) {
        judge(a, LM_TOO_LARGE, false, "more than the %llu bytes allowed",
              (unsigned long long)file->max_bytes);
        return;
    }
    if (file->total != FETCH_UNKNOWN && len > file->total - file->have) {
        forget_part(file);
        judge(a, LM_FORMAT, true, "the server sent more than it had announced");
        return;
    }
    while (len > 0) {
        ssize_t n = pwrite(file->fd, data, len, (off_t)file->have);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            judge_disk(a, "writing the file");
            return;
        }
        data += n;
        len -= (size_t)n;
        file->have += (uint64_t)n;
        file->received += (uint64_t)n;
    }
}

static size_t on_body(char *data, size_t one, size_t len, void *user)
{
    struct fetch_attempt *a = user;
    (void)one;
    if (a->mode == BODY_UNDECIDED)
        begin_body(a);
    a->body_bytes += len;
    if (!a->judged && a->mode == BODY_TAKE)
        take_body(a, data, len);
    /* Anything but `len` makes curl stop. */
    bool stop = a->judged || (a->mode == BODY_DISCARD && a->body_bytes > MAX_ERROR_BODY);
    return stop ? CURL_WRITEFUNC_ERROR : len;
}

/* ---- the end of an attempt -------------------------------------------------------------- */

static void judge_code(struct fetch_attempt *a, long code)
{
    curl_off_t after = 0;
    curl_easy_getinfo(a->easy, CURLINFO_RETRY_AFTER, &after);
    if (code == 416)
        forget_part(a->file);
    if (code == 404 || code == 410)
        judge(a, LM_NOT_FOUND, false, "HTTP %ld", code);
    else if (code == 401 || code == 403)
        judge(a, LM_DENIED, false, "HTTP %ld", code);
    else if (code == 408 || code == 416 || code == 429 || (code >= 500 && code <= 599))
        judge(a, LM_NET, true, "HTTP %ld", code);
    else
        judge(a, LM_INVALID, false, "HTTP %ld, which is no answer to this", code);
    if (after > 0)
        a->file->retry_after_ms = LM_MIN(after, 86400) * 1000;
}

static void judge_curl(struct fetch_attempt *a, CURLcode rc)
{
    const char *why = a->why[0] ? a->why : curl_easy_strerror(rc);
    switch (rc) {
    case CURLE_UNSUPPORTED_PROTOCOL:
        if (response_code(a) / 100 == 3)
            judge(a, LM_DENIED, false, "redirected to another protocol: %s", why);
        else
            judge(a, LM_NET, true, "%s", why);  /* not HTTP at all */
        break;
    case CURLE_TOO_MANY_REDIRECTS:
        judge(a, LM_INVALID, false, "redirected more than %d times", MAX_REDIRECTS);
        break;
    case CURLE_URL_MALFORMAT:
        judge(a, LM_INVALID, false, "%s", why);
        break;
    case CURLE_PEER_FAILED_VERIFICATION:
    case CURLE_SSL_CACERT_BADFILE:
    case CURLE_SSL_CERTPROBLEM:
        /* Someone's configuration: retrying at once is no use, giving up on the adapter neither. */
        judge(a, LM_NET, false, "%s", why);
        break;
    case CURLE_OPERATION_TIMEDOUT:
        judge(a, LM_TIMEOUT, true, "%s", why);
        break;
    case CURLE_OUT_OF_MEMORY:
        judge(a, LM_NOMEM, false, "%s", why);
        break;
    default:
        judge(a, LM_NET, true, "%s", why);
    }
}

static void judge_whole(struct fetch_attempt *a)
{
    struct fetch *file = a->file;
    if (file->total != FETCH_UNKNOWN && file->have != file->total)
        judge(a, LM_NET, true, "%llu bytes of %llu came", (unsigned long long)file->have,
              (unsigned long long)file->total);
    if (a->judged)
        return;
    file->total = file->have;
    file->status = LM_OK;
    file->retry = false;
}

static void conclude(struct fetch_attempt *a, CURLcode rc)
{
    long code = response_code(a);
    /* No body came by, be it empty or lost: its headers still count. */
    if (!a->judged && a->mode == BODY_UNDECIDED && (code == 200 || code == 206))
        begin_body(a);
    if (a->judged)
        return;
    if (a->mode == BODY_DISCARD || (rc == CURLE_OK && code != 200 && code != 206))
        judge_code(a, code);
    else if (rc != CURLE_OK)
        judge_curl(a, rc);
    else
        judge_whole(a);
}

static void attempt_free(struct fetch_attempt *a)
{
    if (a->easy) {
        curl_multi_remove_handle(a->owner->multi, a->easy);
        curl_easy_cleanup(a->easy);
    }
    curl_slist_free_all(a->headers);
    a->file->attempt = NULL;
    free(a);
}

/* ---- starting --------------------------------------------------------------------------- */

static bool add_header(struct fetch_attempt *a, const char *line)
{
    struct curl_slist *longer = curl_slist_append(a->headers, line);
    if (longer)
        a->headers = longer;
    return longer != NULL;
}

/* Asks for the rest when the part on disk can be continued, else for all. */
static bool ask_range(struct fetch_attempt *a)
{
    struct fetch *file = a->file;
    char range[32], line[300];
    a->ranged = file->have > 0 && file->etag[0];
    if (!a->ranged) {
        forget_part(file);
        return true;
    }
    snprintf(range, sizeof range, "%llu-", (unsigned long long)file->have);
    snprintf(line, sizeof line, "If-Range: %s", file->etag);
    return curl_easy_setopt(a->easy, CURLOPT_RANGE, range) == CURLE_OK && add_header(a, line);
}

static CURLcode set_options(struct fetch_attempt *a)
{
    const fetcher *f = a->owner;
    bool tls = !strncasecmp(a->file->url, "https:", 6);
    CURL *e = a->easy;
    CURLcode bad = CURLE_OK;
#define SET(option, value)                                                                     \
    do {                                                                                       \
        if (bad == CURLE_OK)                                                                   \
            bad = curl_easy_setopt(e, option, value);                                          \
    } while (0)
    SET(CURLOPT_URL, a->file->url);
    SET(CURLOPT_PRIVATE, a);
    SET(CURLOPT_ERRORBUFFER, a->why);
    SET(CURLOPT_NOSIGNAL, 1L);
    SET(CURLOPT_PROTOCOLS_STR, "http,https");
    SET(CURLOPT_REDIR_PROTOCOLS_STR, tls ? "https" : "http,https");
    SET(CURLOPT_FOLLOWLOCATION, 1L);
    SET(CURLOPT_MAXREDIRS, (long)MAX_REDIRECTS);
    SET(CURLOPT_CONNECTTIMEOUT_MS, (long)f->connect_timeout_ms);
    SET(CURLOPT_TCP_KEEPALIVE, 1L);
    SET(CURLOPT_BUFFERSIZE, 262144L);
    SET(CURLOPT_USERAGENT, "loramill/" LORAMILL_VERSION);
    SET(CURLOPT_HEADERFUNCTION, on_header);
    SET(CURLOPT_HEADERDATA, a);
    SET(CURLOPT_WRITEFUNCTION, on_body);
    SET(CURLOPT_WRITEDATA, a);
    SET(CURLOPT_HTTPHEADER, a->headers);
    if (f->ca_file)
        SET(CURLOPT_CAINFO, f->ca_file);
#undef SET
    return bad == CURLE_OK ? resolver_let_go(e) : bad;
}

lm_status fetch_start(fetcher *f, struct fetch *file, struct lm_err *err)
{
    struct fetch_attempt *a = lm_calloc(1, sizeof *a);
    if (!a)
        return lm_err_set(err, LM_NOMEM, "no memory for a transfer");
    a->owner = f;
    a->file = file;
    a->mark_us = lm_now_us();
    a->easy = curl_easy_init();
    bool ok = a->easy && ask_range(a) && (!f->auth_header || add_header(a, f->auth_header)) &&
              set_options(a) == CURLE_OK && curl_multi_add_handle(f->multi, a->easy) == CURLM_OK;
    if (!ok) {
        attempt_free(a);
        return lm_err_set(err, LM_NOMEM, "can't start a transfer");
    }
    file->attempt = a;
    file->status = LM_OK;
    file->retry_after_ms = 0;
    LIST_INSERT_HEAD(&f->running, a, link);
    return LM_OK;
}

void fetch_abort(struct fetch *file)
{
    LIST_REMOVE(file->attempt, link);
    attempt_free(file->attempt);
}

/* ---- the fetcher ------------------------------------------------------------------------ */

static pthread_once_t curl_once = PTHREAD_ONCE_INIT;

static void init_curl(void)
{
    curl_global_init(CURL_GLOBAL_DEFAULT);
}

/* curl keeps an Authorization header from other hosts when it follows a redirect; it would not
 * keep others. */
lm_status fetcher_check_auth(const char *h, struct lm_err *err)
{
    static const char name[] = "Authorization:";
    if (h && (strncasecmp(h, name, sizeof name - 1) != 0 || strpbrk(h, "\r\n")))
        return lm_err_set(err, LM_INVALID,
                          "adapters.auth_header: must be one line \"Authorization: ...\"");
    return LM_OK;
}

lm_status fetcher_new(const struct fetcher_config *cfg, fetcher **out, struct lm_err *err)
{
    *out = NULL;
    if (fetcher_check_auth(cfg->auth_header, err) != LM_OK)
        return LM_INVALID;
    if (cfg->ca_file && access(cfg->ca_file, R_OK) != 0)
        return lm_err_set(err, LM_INVALID, "adapters.ca_file %s: %s", cfg->ca_file,
                          strerror(errno));
    pthread_once(&curl_once, init_curl);
    fetcher *f = lm_calloc(1, sizeof *f);
    bool ok = f != NULL;
    if (ok) {
        LIST_INIT(&f->running);
        f->multi = curl_multi_init();
        f->ca_file = cfg->ca_file ? lm_strdup(cfg->ca_file) : NULL;
        f->auth_header = cfg->auth_header ? lm_strdup(cfg->auth_header) : NULL;
        f->connect_timeout_ms = cfg->connect_timeout_ms;
        f->stall_timeout_ms = cfg->stall_timeout_ms;
        ok = f->multi && !f->ca_file == !cfg->ca_file && !f->auth_header == !cfg->auth_header;
    }
    if (!ok) {
        fetcher_free(f);
        return lm_err_set(err, LM_NOMEM, "no memory for transfers");
    }
    *out = f;
    return LM_OK;
}

void fetcher_free(fetcher *f)
{
    struct fetch_attempt *a;
    if (!f)
        return;
    while ((a = LIST_FIRST(&f->running)))
        fetch_abort(a->file);
    if (f->multi)
        curl_multi_cleanup(f->multi);
    free(f->ca_file);
    free(f->auth_header);
    free(f);
}

void fetcher_wake(fetcher *f)
{
    curl_multi_wakeup(f->multi);
}

typedef void ended_fn(void *ctx, struct fetch *file);

static void end(fetcher *f, struct fetch_attempt *a, ended_fn *ended, void *ctx)
{
    struct fetch *file = a->file;
    (void)f;
    LIST_REMOVE(a, link);
    attempt_free(a);
    ended(ctx, file);
}

static void end_finished(fetcher *f, ended_fn *ended, void *ctx)
{
    CURLMsg *msg;
    int left;
    while ((msg = curl_multi_info_read(f->multi, &left))) {
        struct fetch_attempt *a = NULL;
        CURLcode rc = msg->data.result;
        if (msg->msg != CURLMSG_DONE)
            continue;
        curl_easy_getinfo(msg->easy_handle, CURLINFO_PRIVATE, &a);
        conclude(a, rc);
        end(f, a, ended, ctx);
    }
}

/* Silence, and the trickle that only wants to hold the connection. */
static void end_stalled(fetcher *f, ended_fn *ended, void *ctx)
{
    int64_t now = lm_now_us();
    struct fetch_attempt *a = LIST_FIRST(&f->running);
    while (a) {
        struct fetch_attempt *next = LIST_NEXT(a, link);
        if (now - a->mark_us >= (int64_t)f->stall_timeout_ms * 1000) {
            bool stalled = a->body_bytes - a->mark_bytes < FETCH_STALL_BYTES;
            a->mark_us = now;
            a->mark_bytes = a->body_bytes;
            if (stalled) {
                judge(a, LM_TIMEOUT, true, "fewer than %d bytes in %d ms", FETCH_STALL_BYTES,
                      f->stall_timeout_ms);
                end(f, a, ended, ctx);
            }
        }
        a = next;
    }
}

/* Until the next stall window ends. */
static int stall_wait_ms(const fetcher *f, int timeout_ms)
{
    int64_t now = lm_now_us();
    const struct fetch_attempt *a;
    LIST_FOREACH(a, &f->running, link) {
        int64_t left = a->mark_us / 1000 + f->stall_timeout_ms - now / 1000 + 1;
        timeout_ms = (int)LM_MIN((int64_t)timeout_ms, LM_MAX(left, 0));
    }
    return timeout_ms;
}

void fetcher_run(fetcher *f, int timeout_ms, ended_fn *ended, void *ctx)
{
    int running;
    curl_multi_poll(f->multi, NULL, 0, stall_wait_ms(f, timeout_ms), NULL);
    curl_multi_perform(f->multi, &running);
    end_finished(f, ended, ctx);
    end_stalled(f, ended, ctx);
}
