/* SPDX-License-Identifier: Apache-2.0 */
/*
 * registry.c - a small Schema Registry client on libcurl; see registry.h for limits and failures.
 */
#include "worker/codec/registry.h"

#include <curl/curl.h>
#include <errno.h>
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "worker/resolver.h"
#include "worker/url.h"

enum {
    MAX_URLS = 8, MAX_REPLY = 1 << 20, HOLD_OFF_US = 500000,
    RACES = 3, RACE_PAUSE_MS = 100,     /* see registry_id_of() */
};

#define MEDIA_TYPE "application/vnd.schemaregistry.v1+json"

struct registry {
    CURL *curl;
    struct curl_slist *headers;
    char *urls[MAX_URLS];       /* without trailing slash */
    int n_urls, current;
    char *auth, *ca_file, *cert_file, *key_file;
    int connect_ms, total_ms;
    const atomic_bool *stop;
    long status;                /* HTTP status of the last reply */
    int64_t held_until;         /* lm_now_us(); `held` is the answer until then */
    struct lm_err held;
};

struct answer {
    char *body;
    size_t len;
    bool too_large;
    long status;
    json_t *json;               /* object or NULL */
};

/* ---- life ------------------------------------------------------------------------------------ */

static pthread_once_t curl_once = PTHREAD_ONCE_INIT;

static void curl_start(void)
{
    curl_global_init(CURL_GLOBAL_DEFAULT);
}

static lm_status add_url(registry *r, const char *s, size_t n, struct lm_err *err)
{
    while (n > 0 && (*s == ' ' || *s == '\t'))
        s++, n--;
    while (n > 0 && (s[n - 1] == ' ' || s[n - 1] == '\t' || s[n - 1] == '/'))
        n--;
    if (!url_is_http(s))
        return lm_err_set(err, LM_INVALID, "registry.url must be http:// or https:// URLs, "
                          "separated by commas");
    if (r->n_urls == MAX_URLS)
        return lm_err_set(err, LM_INVALID, "registry.url has more than %d URLs", MAX_URLS);
    r->urls[r->n_urls] = lm_strndup(s, n);
    if (!r->urls[r->n_urls])
        return lm_err_set(err, LM_NOMEM, "out of memory");
    r->n_urls++;
    return LM_OK;
}

static lm_status add_urls(registry *r, const char *list, struct lm_err *err)
{
    lm_status st = LM_OK;
    for (const char *s = list, *end; !st; s = end + 1) {
        end = s + strcspn(s, ",");
        st = add_url(r, s, (size_t)(end - s), err);
        if (!*end)
            break;
    }
    return st;
}

/* Unset options are NULL or "", as properties come. */
static bool copy_option(const char *s, char **out)
{
    if (!s || !*s)
        return true;
    *out = lm_strdup(s);
    return *out;
}

static lm_status check_file(const char *key, const char *path, struct lm_err *err)
{
    if (!path || !*path || !access(path, R_OK))
        return LM_OK;
    return lm_err_set(err, LM_INVALID, "%s=%s: %s", key, path, strerror(errno));
}

lm_status registry_check(const struct registry_config *cfg, struct lm_err *err)
{
    const char *h = cfg->auth_header;
    if (h && *h && (!strchr(h, ':') || strpbrk(h, "\r\n")))
        return lm_err_set(err, LM_INVALID, "registry.auth_header: must be one line, "
                          "\"Name: value\"");
    lm_status st = check_file("registry.cert_file", cfg->cert_file, err);
    return st ? st : check_file("registry.key_file", cfg->key_file, err);
}

static bool make_headers(registry *r, const char *auth_header)
{
    const char *const lines[] = { "Accept: " MEDIA_TYPE ", application/json",
                                  "Content-Type: " MEDIA_TYPE, auth_header };
    for (size_t i = 0; i < LM_COUNT(lines); i++) {
        if (!lines[i] || !*lines[i])
            continue;
        struct curl_slist *more = curl_slist_append(r->headers, lines[i]);
        if (!more)
            return false;
        r->headers = more;
    }
    return true;
}

lm_status registry_new(const struct registry_config *cfg, registry **out, struct lm_err *err)
{
    pthread_once(&curl_once, curl_start);
    registry *r = lm_calloc(1, sizeof *r);
    if (!r)
        return lm_err_set(err, LM_NOMEM, "out of memory");
    r->connect_ms = cfg->connect_ms ? cfg->connect_ms : 3000;
    r->total_ms = cfg->total_ms ? cfg->total_ms : 10000;
    r->stop = cfg->stop;
    lm_status st = registry_check(cfg, err);
    if (st || (st = add_urls(r, cfg->url, err))) {
        registry_free(r);
        return st;
    }
    r->curl = curl_easy_init();
    if (!r->curl || !make_headers(r, cfg->auth_header) || !copy_option(cfg->auth, &r->auth) ||
        !copy_option(cfg->ca_file, &r->ca_file) || !copy_option(cfg->cert_file, &r->cert_file) ||
        !copy_option(cfg->key_file, &r->key_file)) {
        registry_free(r);
        return lm_err_set(err, LM_NOMEM, "out of memory");
    }
    *out = r;
    return LM_OK;
}

void registry_free(registry *r)
{
    if (!r)
        return;
    curl_easy_cleanup(r->curl);
    curl_slist_free_all(r->headers);
    for (int i = 0; i < r->n_urls; i++)
        free(r->urls[i]);
    free(r->auth);
    free(r->ca_file);
    free(r->cert_file);
    free(r->key_file);
    free(r);
}

/* ---- one exchange ---------------------------------------------------------------------------- */

static size_t take_body(char *data, size_t size, size_t n, void *user)
{
    struct answer *rep = user;
    size_t add = size * n;
    if (add > MAX_REPLY - rep->len) {
        rep->too_large = true;
        return 0;
    }
    char *body = realloc(rep->body, rep->len + add + 1);
    if (!body)
        return 0;
    memcpy(body + rep->len, data, add);
    rep->body = body;
    rep->len += add;
    return add;
}

static void answer_release(struct answer *rep)
{
    free(rep->body);
    json_decref(rep->json);
    memset(rep, 0, sizeof *rep);
}

static bool stopped(const registry *r)
{
    return r->stop && atomic_load(r->stop);
}

/* Asked at least once a second: a silent registry must not hold the worker's end up. */
static int on_progress(void *ctx, curl_off_t a, curl_off_t b, curl_off_t d, curl_off_t e)
{
    (void)a, (void)b, (void)d, (void)e;
    return stopped(ctx);
}

static void set_options(registry *r, const char *url, const char *body, int64_t limit_ms,
                        struct answer *rep)
{
    CURL *c = r->curl;
    curl_easy_reset(c);         /* keeps connections */
    curl_easy_setopt(c, CURLOPT_URL, url);
    curl_easy_setopt(c, CURLOPT_HTTPHEADER, r->headers);
    curl_easy_setopt(c, CURLOPT_NOSIGNAL, 1L);
    resolver_let_go(c);
    curl_easy_setopt(c, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(c, CURLOPT_FOLLOWLOCATION, 0L);
    curl_easy_setopt(c, CURLOPT_CONNECTTIMEOUT_MS, (long)r->connect_ms);
    curl_easy_setopt(c, CURLOPT_TIMEOUT_MS, (long)limit_ms);
    curl_easy_setopt(c, CURLOPT_NOPROGRESS, 0L);
    curl_easy_setopt(c, CURLOPT_XFERINFOFUNCTION, on_progress);
    curl_easy_setopt(c, CURLOPT_XFERINFODATA, r);
    curl_easy_setopt(c, CURLOPT_WRITEFUNCTION, take_body);
    curl_easy_setopt(c, CURLOPT_WRITEDATA, rep);
    curl_easy_setopt(c, CURLOPT_USERAGENT, "loramill/" LORAMILL_VERSION);
    if (r->auth) {
        curl_easy_setopt(c, CURLOPT_HTTPAUTH, CURLAUTH_BASIC);
        curl_easy_setopt(c, CURLOPT_USERPWD, r->auth);
    }
    if (r->ca_file)
        curl_easy_setopt(c, CURLOPT_CAINFO, r->ca_file);
    if (r->cert_file)
        curl_easy_setopt(c, CURLOPT_SSLCERT, r->cert_file);
    if (r->key_file)
        curl_easy_setopt(c, CURLOPT_SSLKEY, r->key_file);
    if (body)
        curl_easy_setopt(c, CURLOPT_COPYPOSTFIELDS, body);
}

/* LM_OK means that an HTTP reply came, whatever its status. */
static lm_status exchange(registry *r, const char *base, const char *path, const char *body,
                          int64_t limit_ms, struct answer *rep, struct lm_err *err)
{
    char *url = NULL, shown[URL_SHOWN], detail[CURL_ERROR_SIZE] = "";
    url_show(base, shown, sizeof shown);
    if (asprintf(&url, "%s%s", base, path) < 0)
        return lm_err_set(err, LM_NOMEM, "out of memory");
    set_options(r, url, body, limit_ms, rep);
    curl_easy_setopt(r->curl, CURLOPT_ERRORBUFFER, detail);
    CURLcode rc = curl_easy_perform(r->curl);
    curl_easy_setopt(r->curl, CURLOPT_ERRORBUFFER, NULL);
    curl_easy_getinfo(r->curl, CURLINFO_RESPONSE_CODE, &rep->status);
    r->status = rep->status;
    free(url);
    if (rep->too_large && rep->status == 200)
        return lm_err_set(err, LM_TOO_LARGE, "schema registry %s: the reply to %s has more than %d "
                          "bytes", shown, path, MAX_REPLY);
    if (rep->too_large)         /* what else is said at length, the status has said */
        return LM_OK;
    if (rc != CURLE_OK)
        return lm_err_set(err, LM_NET, "schema registry %s: %s", shown,
                          detail[0] ? detail : curl_easy_strerror(rc));
    rep->json = rep->len ? json_loadb(rep->body, rep->len, 0, NULL) : NULL;
    return LM_OK;
}

/* What an HTTP status means. The registry's own error_code tells its 404 from a proxy's. */
static lm_status judge(const char *base, const char *path, const struct answer *rep,
                       struct lm_err *err)
{
    if (rep->status == 200 && json_is_object(rep->json))
        return LM_OK;
    char shown[URL_SHOWN];
    url_show(base, shown, sizeof shown);
    json_int_t code = json_integer_value(json_object_get(rep->json, "error_code"));
    const char *message = json_string_value(json_object_get(rep->json, "message"));
    message = message ? message : "";
    lm_status st = LM_NET;
    const char *what = "answered";
    if (rep->status == 404 && (code == 404 || code / 100 == 404))
        st = LM_NOT_FOUND, what = "does not know it:";
    else if (rep->status == 409)
        st = LM_MISMATCH, what = "finds the schema incompatible:";
    else if (rep->status == 422)
        st = LM_INVALID, what = "refuses it:";
    else if (rep->status == 401 || rep->status == 403)
        what = "refuses the credentials (registry.auth, registry.auth_header):";
    else if (rep->status == 200 || rep->status == 404)
        what = "does not answer like a schema registry (check registry.url):";
    return lm_err_set(err, st, "schema registry %s %s HTTP %ld %.160s, to %s", shown, what,
                      rep->status, message, path);
}

/* The time that the i-th base URL may take: its part of what is left until `end_us`. */
static int64_t share_ms(const registry *r, int i, int64_t end_us)
{
    return LM_MAX((end_us - lm_now_us()) / 1000 / (r->n_urls - i), 1);
}

/* Tries each base URL until one gives a final answer. On LM_OK rep->json is an object. */
static lm_status ask(registry *r, const char *path, const char *body, struct answer *rep,
                     struct lm_err *err)
{
    struct lm_err e = { LM_NET, "" };
    if (lm_now_us() < r->held_until) {
        if (err)
            *err = r->held;
        return r->held.code;
    }
    int64_t end = lm_now_us() + (int64_t)r->total_ms * 1000;
    for (int i = 0; i < r->n_urls && !stopped(r); i++) {
        int at = (r->current + i) % r->n_urls;
        answer_release(rep);
        lm_status st = exchange(r, r->urls[at], path, body, share_ms(r, i, end), rep, &e);
        if (!st)
            st = judge(r->urls[at], path, rep, &e);
        if (lm_status_disposition(st) != LM_DO_RETRY) {
            r->current = at;
            if (st && err)
                *err = e;
            return st;
        }
    }
    if (stopped(r))
        return lm_err_set(err, LM_NET, "the question to the schema registry is given up");
    r->held = e;
    r->held_until = lm_now_us() + HOLD_OFF_US;
    if (err)
        *err = e;
    return e.code;
}

/* ---- the questions --------------------------------------------------------------------------- */

static lm_status take_schema(const struct answer *rep, const char *name, char **text,
                             struct lm_err *err)
{
    const json_t *schema = json_object_get(rep->json, "schema");
    const json_t *type = json_object_get(rep->json, "schemaType");
    const json_t *refs = json_object_get(rep->json, "references");
    if (json_is_string(type) && strcmp(json_string_value(type), "AVRO") != 0)
        return lm_err_set(err, LM_UNSUPPORTED, "schema %s is of type %.32s, not AVRO", name,
                          json_string_value(type));
    if (json_array_size(refs) > 0) {
        const char *first = json_string_value(json_object_get(json_array_get(refs, 0), "name"));
        return lm_err_set(err, LM_UNSUPPORTED, "schema %s refers to another schema, %.128s; "
                          "references are not served: register one self-contained schema",
                          name, first ? first : "?");
    }
    if (!json_is_string(schema))
        return lm_err_set(err, LM_NET, "the schema registry's reply for schema %s has no schema in "
                          "it", name);
    *text = lm_strdup(json_string_value(schema));
    return *text ? LM_OK : lm_err_set(err, LM_NOMEM, "out of memory");
}

static lm_status fetch(registry *r, const char *path, const char *name, char **text,
                       struct lm_err *err)
{
    struct answer rep = { 0 };
    lm_status st = ask(r, path, NULL, &rep, err);
    if (!st)
        st = take_schema(&rep, name, text, err);
    answer_release(&rep);
    return st;
}

lm_status registry_by_id(registry *r, int32_t id, char **text, struct lm_err *err)
{
    char path[64], name[32];
    snprintf(path, sizeof path, "/schemas/ids/%d", (int)id);
    snprintf(name, sizeof name, "id %d", (int)id);
    return fetch(r, path, name, text, err);
}

/* Is there a registry at all? Every one lists its schema types, in a short array. */
static bool is_registry(registry *r)
{
    bool yes = false;
    int64_t end = lm_now_us() + (int64_t)r->total_ms * 1000;
    for (int i = 0; i < r->n_urls && !yes && !stopped(r); i++) {
        struct answer rep = { 0 };
        yes = exchange(r, r->urls[i], "/schemas/types", NULL, share_ms(r, i, end), &rep, NULL) ==
              LM_OK && rep.status == 200 && json_is_array(rep.json);
        answer_release(&rep);
    }
    return yes;
}

/* Registries that are too old for GUIDs answer as for any wrong path. That would read as a wrong
 * URL, and the prompt would wait for ever. */
lm_status registry_by_guid(registry *r, const unsigned char guid[16], char **text,
                           struct lm_err *err)
{
    char name[48], path[80];
    int n = 0;
    for (int i = 0; i < 16; i++)
        n += snprintf(name + n, sizeof name - (size_t)n, "%s%02x",
                      i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", guid[i]);
    snprintf(path, sizeof path, "/schemas/guids/%s", name);
    r->status = 0;
    lm_status st = fetch(r, path, name, text, err);
    if (st == LM_NET && r->status == 404 && is_registry(r)) {
        r->held_until = 0;
        return lm_err_set(err, LM_NOT_FOUND, "the schema registry does not know schemas by GUID, "
                          "so %s can't be looked up: write schema ids instead", name);
    }
    return st;
}

static lm_status id_of(registry *r, const char *subject, const char *text, bool create, int32_t *id,
                       struct lm_err *err)
{
    struct answer rep = { 0 };
    json_t *question = json_pack("{s:s}", "schema", text);
    char *body = question ? json_dumps(question, JSON_COMPACT) : NULL;
    char *escaped = curl_easy_escape(r->curl, subject, 0), *path = NULL;
    lm_status st = LM_OK;
    if (!body || !escaped ||
        asprintf(&path, "/subjects/%s%s", escaped, create ? "/versions" : "") < 0) {
        path = NULL;
        st = lm_err_set(err, LM_NOMEM, "out of memory");
    }
    if (!st)
        st = ask(r, path, body, &rep, err);
    json_int_t n = json_integer_value(json_object_get(rep.json, "id"));
    if (!st && (n <= 0 || n > INT32_MAX))
        st = lm_err_set(err, LM_NET, "the schema registry's reply for subject %.200s has no id in "
                        "it", subject);
    if (!st)
        *id = (int32_t)n;
    answer_release(&rep);
    curl_free(escaped);
    free(path);
    free(body);
    json_decref(question);
    return st;
}

/* Workers that start together register the same schema at the same moment, and Apicurio tells all
 * but one 409, its word for an incompatible schema as well. Asked again it has the schema. */
lm_status registry_id_of(registry *r, const char *subject, const char *text, bool create,
                         int32_t *id, struct lm_err *err)
{
    const struct timespec pause = { 0, RACE_PAUSE_MS * 1000000 };
    for (int n = 0;; n++) {
        lm_status st = id_of(r, subject, text, create, id, err);
        if (st != LM_MISMATCH || !create || n == RACES)
            return st;
        nanosleep(&pause, NULL);
    }
}
