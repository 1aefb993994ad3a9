/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hostile_adapters.h - an adapter's two files, and every way of serving them badly; for
 * test_worker_store.c. `rules` names the behaviours.
 */
#ifndef LORAMILL_TESTS_HOSTILE_ADAPTERS_H
#define LORAMILL_TESTS_HOSTILE_ADAPTERS_H

#include "hostile_http.h"
#include "worker/store/cache.h"

#define DATA_BYTES 300000

/* ---- content ---------------------------------------------------------------------------- */

struct blob { char *bytes; size_t len; uint64_t hash; };

static struct blob weights, weights2;   /* two versions of the same file */
static const char config_text[] = "{\"peft_type\":\"LORA\",\"r\":8}";

static uint64_t hash_bytes(const char *p, size_t n)
{
    uint64_t h = 1469598103934665603ULL;
    for (size_t i = 0; i < n; i++)
        h = (h ^ (unsigned char)p[i]) * 1099511628211ULL;
    return h;
}

static struct blob make_weights(unsigned seed)
{
    char header[128];
    int n = snprintf(header, sizeof header,
                     "{\"w\":{\"dtype\":\"U8\",\"shape\":[%d],\"data_offsets\":[0,%d]}}",
                     DATA_BYTES, DATA_BYTES);
    struct blob b = { .len = 8 + (size_t)n + DATA_BYTES };
    b.bytes = calloc(1, b.len);
    b.bytes[0] = (char)n;       /* little-endian, and n < 256 */
    memcpy(b.bytes + 8, header, (size_t)n);
    for (size_t i = 8 + (size_t)n; i < b.len; i++)
        b.bytes[i] = (char)(seed = seed * 1103515245 + 12345, seed >> 16);
    b.hash = hash_bytes(b.bytes, b.len);
    return b;
}

/* ---- behaviours ------------------------------------------------------------------------- */

#define OK_HEAD "HTTP/1.1 200 OK\r\nConnection: close\r\n"
#define PART_HEAD "HTTP/1.1 206 Partial Content\r\nConnection: close\r\n"

static bool is_config(const struct request *r)
{
    return ends_with(r->path, "/" CACHE_CONFIG);
}

static void send_config(struct request *r)
{
    sendf(r, OK_HEAD "Content-Length: %zu\r\n\r\n%s", sizeof config_text - 1, config_text);
}

static void send_whole(struct request *r, const struct blob *b, const char *etag, size_t upto)
{
    sendf(r, OK_HEAD "Content-Length: %zu\r\n%s%s\r\n", b->len, etag ? "ETag: " : "",
          etag ? etag : "");
    if (etag)
        sendf(r, "\r\n");
    send_bytes(r, b->bytes, upto < b->len ? upto : b->len);
}

static void send_rest(struct request *r, const struct blob *b, const char *etag)
{
    size_t from = (size_t)r->from;
    sendf(r, PART_HEAD "Content-Length: %zu\r\nContent-Range: bytes %zu-%zu/%zu\r\n"
          "ETag: %s\r\n\r\n", b->len - from, from, b->len - 1, b->len, etag);
    send_bytes(r, b->bytes + from, b->len - from);
}

static void serve_good(struct request *r)
{
    if (is_config(r))
        send_config(r);
    else
        send_whole(r, &weights, "\"v1\"", SIZE_MAX);
}

static void serve_status(struct request *r, const char *status)
{
    sendf(r, "HTTP/1.1 %s\r\nContent-Length: 5\r\nConnection: close\r\n\r\nsorry", status);
}

static void serve_403(struct request *r) { serve_status(r, "403 Forbidden"); }
static void serve_410(struct request *r) { serve_status(r, "410 Gone"); }
static void serve_418(struct request *r) { serve_status(r, "418 I'm a teapot"); }
static void serve_500(struct request *r) { serve_status(r, "500 Oops"); }

static void serve_busy_once(struct request *r)
{
    if (r->nth == 0)
        sendf(r, "HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n");
    else
        serve_good(r);
}

static void serve_429_408(struct request *r)
{
    if (r->nth < 2)
        serve_status(r, r->nth ? "408 Request Timeout" : "429 Too Many Requests");
    else
        serve_good(r);
}

/* Cuts every answer after a quarter; a client that resumes gets there. */
static void serve_cut(struct request *r)
{
    if (is_config(r)) {
        send_config(r);
    } else if (r->from < 0) {
        send_whole(r, &weights, "\"v1\"", weights.len / 4);
    } else if (strcmp(r->if_range, "\"v1\"") == 0) {
        size_t from = (size_t)r->from, n = weights.len - from;
        sendf(r, PART_HEAD "Content-Length: %zu\r\nContent-Range: bytes %zu-%zu/%zu\r\n"
              "ETag: \"v1\"\r\n\r\n", n, from, weights.len - 1, weights.len);
        send_bytes(r, weights.bytes + from, n < weights.len / 4 + 1 ? n : weights.len / 4);
    }
}

/* Cut once, without a validator, or with a weak one: nothing to resume by. */
static void serve_cut_bare(struct request *r)
{
    if (is_config(r))
        send_config(r);
    else if (r->from >= 0)
        serve_status(r, "500 a range was asked for without a strong validator");
    else
        send_whole(r, &weights, NULL, r->nth == 0 ? 1000 : SIZE_MAX);
}

static void serve_cut_weak(struct request *r)
{
    if (is_config(r))
        send_config(r);
    else if (r->from >= 0)
        serve_status(r, "500 a range was asked for without a strong validator");
    else
        send_whole(r, &weights, "W/\"v1\"", r->nth == 0 ? 1000 : SIZE_MAX);
}

/* The file changes between the attempts; an honest server sends the new one whole. */
static void serve_changed(struct request *r)
{
    if (is_config(r))
        send_config(r);
    else if (r->nth == 0)
        send_whole(r, &weights, "\"v1\"", 100000);
    else
        send_whole(r, &weights2, "\"v2\"", SIZE_MAX);
}

/* The same with a server that ignores If-Range and sends the rest of the new file. */
static void serve_spliced(struct request *r)
{
    if (is_config(r))
        send_config(r);
    else if (r->nth == 0)
        send_whole(r, &weights, "\"v1\"", 100000);
    else if (r->from >= 0)
        send_rest(r, &weights2, "\"v2\"");
    else
        send_whole(r, &weights2, "\"v2\"", SIZE_MAX);
}

/* Lies about where the part starts, how long the file is, or says nothing. */
static void serve_lying_range(struct request *r)
{
    static const char *const lies[] = {
        "Content-Range: bytes 0-299999/300000\r\n", "Content-Range: bytes 7-8/9\r\n",
        "Content-Range: bytes */300000\r\n", "Content-Range: rubbish\r\n", "",
        "Content-Range: bytes 99999999999999999999-1/2\r\n",
    };
    int lie = r->path[strlen("/lying/")] - '0';
    if (is_config(r)) {
        send_config(r);
    } else if (r->nth == 0) {
        send_whole(r, &weights, "\"v1\"", 100000);
    } else if (r->from >= 0) {
        sendf(r, PART_HEAD "ETag: \"v1\"\r\nContent-Length: 6\r\n%s\r\nwrong!", lies[lie]);
    } else {
        send_whole(r, &weights, "\"v1\"", SIZE_MAX);
    }
}

static void serve_416(struct request *r)
{
    if (!is_config(r) && r->nth == 0)
        send_whole(r, &weights, "\"v1\"", 100000);
    else if (!is_config(r) && r->from >= 0)
        serve_status(r, "416 Range Not Satisfiable");
    else
        serve_good(r);
}

static void serve_unasked_part(struct request *r)
{
    if (is_config(r))
        send_config(r);
    else
        sendf(r, PART_HEAD "Content-Length: 3\r\nContent-Range: bytes 0-2/3\r\n\r\nabc");
}

static void serve_short(struct request *r)
{
    if (is_config(r))
        send_config(r);
    else
        send_whole(r, &weights, NULL, 1000);
}

static void serve_chunked(struct request *r)
{
    if (is_config(r)) {
        send_config(r);
        return;
    }
    sendf(r, OK_HEAD "Transfer-Encoding: chunked\r\n\r\n");
    while (sendf(r, "3e8\r\n%01000d\r\n", 0))
        ;
}

static void serve_huge(struct request *r)
{
    if (is_config(r))
        send_config(r);
    else
        sendf(r, OK_HEAD "Content-Length: 99999999999\r\n\r\n");
}

static void serve_huge_config(struct request *r)
{
    sendf(r, OK_HEAD "Content-Length: 2000000\r\n\r\n");
}

/* Until the client hangs up. */
static void serve_silent(struct request *r)
{
    char c;
    while (read(r->fd, &c, 1) > 0)
        ;
}

static void serve_first_silent(struct request *r)
{
    if (r->site->total == 1)
        serve_silent(r);
    else
        serve_good(r);
}

static void serve_trickle(struct request *r)
{
    if (is_config(r)) {
        send_config(r);
        return;
    }
    sendf(r, OK_HEAD "Content-Length: %zu\r\n\r\n", weights.len);
    for (size_t i = 0; i < weights.len && send_bytes(r, weights.bytes + i, 1); i++)
        usleep(20000);                  /* until the client hangs up */
}

static void serve_html(struct request *r)
{
    const char page[] = "<html>please log in</html>";
    sendf(r, OK_HEAD "Content-Length: %zu\r\n\r\n%s", sizeof page - 1, page);
}

static void serve_html_weights(struct request *r)
{
    if (is_config(r))
        send_config(r);
    else
        serve_html(r);
}

/* No length, just an end, and too early. */
static void serve_closing(struct request *r)
{
    if (is_config(r)) {
        send_config(r);
        return;
    }
    sendf(r, OK_HEAD "\r\n");
    send_bytes(r, weights.bytes, weights.len / 2);
}

static void serve_gzip(struct request *r)
{
    sendf(r, OK_HEAD "Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc");
}

static void serve_headers(struct request *r)
{
    sendf(r, "HTTP/1.1 200 OK\r\n");
    for (int i = 0; i < 40; i++)
        sendf(r, "X-%d: %04000d\r\n", i, 0);
    sendf(r, "Content-Length: 0\r\n\r\n");
}

static void serve_garbage(struct request *r)
{
    sendf(r, "SMTP 220 hello\r\n\r\n");
}

static void serve_to_file(struct request *r)
{
    sendf(r, "HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n");
}

static void serve_loop(struct request *r)
{
    sendf(r, "HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n", r->path);
}

/* To the same port under another host name. */
static void serve_moved(struct request *r)
{
    sendf(r, "HTTP/1.1 302 Found\r\nLocation: http://localhost:%d/good%s\r\n"
          "Content-Length: 0\r\n\r\n", r->site->port, r->path + strlen("/moved"));
}

static char seen_authorization[2][128];     /* at /auth, at /stranger */

static void serve_auth(struct request *r)
{
    memcpy(seen_authorization[0], r->authorization, sizeof r->authorization);
    sendf(r, "HTTP/1.1 302 Found\r\nLocation: http://localhost:%d/stranger%s\r\n"
          "Content-Length: 0\r\n\r\n", r->site->port, r->path + strlen("/auth"));
}

static void serve_stranger(struct request *r)
{
    memcpy(seen_authorization[1], r->authorization, sizeof r->authorization);
    serve_good(r);
}

static void serve_slow(struct request *r)
{
    usleep(150000);
    serve_good(r);
}

static void serve_signed(struct request *r)
{
    if (!strstr(r->path, ".json?sig=1") && !strstr(r->path, ".safetensors?sig=1"))
        serve_status(r, "404 no signature");
    else if (strstr(r->path, CACHE_CONFIG))
        send_config(r);
    else
        send_whole(r, &weights, "\"v1\"", SIZE_MAX);
}

static const struct rule rules[] = {
    { "good", serve_good }, { "brand", serve_good }, { "forbidden", serve_403 },
    { "gone", serve_410 }, { "teapot", serve_418 }, { "broken", serve_500 },
    { "busy", serve_busy_once }, { "hasty", serve_429_408 }, { "cut", serve_cut },
    { "bare", serve_cut_bare }, { "weak", serve_cut_weak }, { "changed", serve_changed },
    { "spliced", serve_spliced }, { "lying", serve_lying_range }, { "r416", serve_416 },
    { "unasked", serve_unasked_part }, { "short", serve_short }, { "chunked", serve_chunked },
    { "huge", serve_huge }, { "huge-config", serve_huge_config }, { "silent", serve_silent },
    { "trickle", serve_trickle }, { "html", serve_html }, { "page", serve_html_weights },
    { "closing", serve_closing }, { "gzip", serve_gzip }, { "headers", serve_headers },
    { "garbage", serve_garbage }, { "to-file", serve_to_file }, { "loop", serve_loop },
    { "moved", serve_moved }, { "auth", serve_auth }, { "stranger", serve_stranger },
    { "slow", serve_slow }, { "first-silent", serve_first_silent }, { "signed", serve_signed },
    { NULL, NULL },
};

#endif
