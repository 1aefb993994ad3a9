/* SPDX-License-Identifier: Apache-2.0 */
/*
 * claim.c - replies that are too large for the broker, to the object store (claim check).
 *
 *   outcome_reply, or the broker's refusal --> [in] --> PUT --> a reply that says where
 *                                               |  ^ store away
 *                                               +--+ later
 *
 * The object is what the record's value would have been. Its name is the SHA-256 of its bytes, so a
 * repeated upload writes the same object, and one reply never overwrites another. The record that
 * follows is the completion without its texts (docs/messages.md).
 *
 * A store that is away, or refuses our credentials, is waited for without a limit, with backoff:
 * the offset waits, as for any reply. One that finds the object too large (413), or gives another
 * answer that no waiting changes (a redirect to the bucket's region, S3's word that there is no
 * such bucket), makes a dead letter with the status and S3's word for it.
 *
 * The object is there before its reply is produced, and a transaction that is aborted sends the
 * same reply again without another upload. What can be left over is an object that no reply names:
 * of a process that died in between, as the prompt's next run has other timings in its completion.
 *
 * A finished reply whose partition is being revoked is still tried, once: the revocation waits for
 * it as for others (revoke.drain_ms). When the worker ends, an upload under way is broken off, so
 * that a store that hangs can't hold up the shutdown.
 *
 * With replies.claim_s3_region each PUT is signed (AWS Signature Version 4, by libcurl); the name
 * of the object is the hash of the body that is signed with it.
 *
 * One thread with one connection: such replies are rare, and their order does not matter.
 */
#include "worker/worker.h"

#include <curl/curl.h>
#include <inttypes.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "worker/log.h"
#include "worker/outcome.h"
#include "worker/resolver.h"
#include "worker/url.h"
#include "worker/url_template.h"

enum { IDLE_MS = 100, CONNECT_MS = 5000, STALL_S = 30, STALL_BYTES = 4096, HEX = 65 };

struct claims {
    struct worker *w;
    CURL *curl;
    pthread_t thread;
    bool stopped;
    struct job_queue in;
    struct job_list later;
    struct log_seldom waits;
};

struct body { const char *at; size_t left; };

struct answer { char text[512]; size_t len; };          /* its beginning */

/* ---- one upload ------------------------------------------------------------------------- */

static size_t read_body(char *to, size_t size, size_t n, void *ctx)
{
    struct body *b = ctx;
    size_t take = LM_MIN(size * n, b->left);
    memcpy(to, b->at, take);
    b->at += take;
    b->left -= take;
    return take;
}

static int seek_body(void *ctx, curl_off_t offset, int origin)
{
    (void)ctx;
    (void)offset;
    (void)origin;
    return CURL_SEEKFUNC_FAIL;  /* the connection is tried anew by us, from the start */
}

static size_t keep_beginning(char *at, size_t size, size_t n, void *ctx)
{
    struct answer *a = ctx;
    size_t take = LM_MIN(size * n, sizeof a->text - 1 - a->len);
    memcpy(a->text + a->len, at, take);
    a->len += take;
    a->text[a->len] = '\0';
    return size * n;
}

/* False: no memory. */
static bool hex_digest(const void *at, size_t len, char out[HEX])
{
    unsigned char digest[EVP_MAX_MD_SIZE];
    if (!EVP_Digest(at, len, digest, NULL, EVP_sha256(), NULL))
        return false;
    lm_hex(digest, HEX / 2, out);
    return true;
}

/* Asked at least once a second: a silent store must not hold the worker's end up. */
static int on_progress(void *ctx, curl_off_t a, curl_off_t b, curl_off_t d, curl_off_t e)
{
    (void)a, (void)b, (void)d, (void)e;
    const claims *c = ctx;
    return atomic_load(&c->w->ending);
}

static void set_transfer(claims *c, const char *url, struct body *b, struct answer *a,
                         struct curl_slist *headers)
{
    const struct config *cfg = c->w->cfg;
    curl_easy_reset(c->curl);
    curl_easy_setopt(c->curl, CURLOPT_URL, url);
    curl_easy_setopt(c->curl, CURLOPT_UPLOAD, 1L);
    curl_easy_setopt(c->curl, CURLOPT_READFUNCTION, read_body);
    curl_easy_setopt(c->curl, CURLOPT_READDATA, b);
    curl_easy_setopt(c->curl, CURLOPT_SEEKFUNCTION, seek_body);
    curl_easy_setopt(c->curl, CURLOPT_INFILESIZE_LARGE, (curl_off_t)b->left);
    curl_easy_setopt(c->curl, CURLOPT_WRITEFUNCTION, keep_beginning);
    curl_easy_setopt(c->curl, CURLOPT_WRITEDATA, a);
    curl_easy_setopt(c->curl, CURLOPT_HTTPHEADER, headers);
    curl_easy_setopt(c->curl, CURLOPT_NOSIGNAL, 1L);
    resolver_let_go(c->curl);
    curl_easy_setopt(c->curl, CURLOPT_NOPROGRESS, 0L);
    curl_easy_setopt(c->curl, CURLOPT_XFERINFOFUNCTION, on_progress);
    curl_easy_setopt(c->curl, CURLOPT_XFERINFODATA, c);
    curl_easy_setopt(c->curl, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(c->curl, CURLOPT_CONNECTTIMEOUT_MS, (long)CONNECT_MS);
    curl_easy_setopt(c->curl, CURLOPT_LOW_SPEED_LIMIT, (long)STALL_BYTES);
    curl_easy_setopt(c->curl, CURLOPT_LOW_SPEED_TIME, (long)STALL_S);
    if (*cfg->adapters_ca_file)
        curl_easy_setopt(c->curl, CURLOPT_CAINFO, cfg->adapters_ca_file);
}

static void sign(claims *c)
{
    const struct config *cfg = c->w->cfg;
    char how[128];
    snprintf(how, sizeof how, "aws:amz:%s:s3", cfg->claim_s3_region);
    curl_easy_setopt(c->curl, CURLOPT_AWS_SIGV4, how);
    curl_easy_setopt(c->curl, CURLOPT_USERNAME, cfg->claim_s3_key);
    curl_easy_setopt(c->curl, CURLOPT_PASSWORD, cfg->claim_s3_secret);
}

static struct curl_slist *put_headers(const struct config *cfg, const struct completion_claim *o)
{
    char line[128];
    struct curl_slist *l = NULL;
    snprintf(line, sizeof line, "Content-Type: %s", o->content_type);
    l = curl_slist_append(l, line);
    if (*cfg->claim_auth_header)
        l = curl_slist_append(l, cfg->claim_auth_header);
    /* libcurl signs what is in this list, also a header that is there to be left out. */
    if (!*cfg->claim_s3_region)
        return curl_slist_append(l, "Expect:");
    snprintf(line, sizeof line, "x-amz-content-sha256: %s", o->sha256);
    return curl_slist_append(l, line);
}

/* S3's word for what went wrong, `<Error><Code>NoSuchBucket</Code>...`; "": none. */
static void find_code(const struct answer *a, char out[48])
{
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    const char *at = strstr(a->text, "<Code>");
    size_t n = at ? strspn(at += strlen("<Code>"), letters) : 0;
    snprintf(out, 48, "%.*s", (int)LM_MIN(n, 47), at ? at : "");
}

/* A 400 that S3 gives for what heals: a connection that stalled, credentials that have expired. */
static bool heals_by_name(const char *code)
{
    static const char *const names[] = { "RequestTimeout", "ExpiredToken", "InvalidToken",
                                         "TokenRefreshRequired" };
    for (size_t i = 0; i < LM_COUNT(names); i++)
        if (!strcmp(code, names[i]))
            return true;
    return false;
}

static bool may_heal(long status, const char *code)
{
    switch (status) {
    case 401: case 403: case 407: case 408: case 409: case 425: case 429:
        return true;
    case 400:
        return heals_by_name(code);
    case 404:
        return !*code;          /* not S3's: a proxy's, perhaps, whose store starts anew */
    default:
        return status < 300 || status > 499;
    }
}

static lm_status judge(long status, const struct answer *a, const char *shown, size_t bytes,
                       struct lm_err *err)
{
    char code[48];
    if (status >= 200 && status <= 299)
        return LM_OK;
    if (status == 413)
        return lm_err_set(err, LM_TOO_LARGE, "the reply has %zu bytes, more than the object store "
                          "takes: PUT %s: HTTP 413", bytes, shown);
    find_code(a, code);
    const char *gap = *code ? " " : "";
    if (may_heal(status, code))
        return lm_err_set(err, LM_NET, "PUT %s: HTTP %ld%s%s", shown, status, gap, code);
    return lm_err_set(err, LM_INVALID, "the object store refuses the reply: PUT %s: HTTP %ld%s%s, "
                      "see replies.claim_url and replies.claim_s3_region", shown, status, gap,
                      code);
}

static lm_status put(claims *c, const struct job *j, const struct completion_claim *o,
                     struct lm_err *err)
{
    const char *url = o->url;
    char shown[URL_SHOWN];
    long status = 0;
    struct body b = { j->out.value, j->out.len };
    struct answer a = { .len = 0 };
    struct curl_slist *headers = put_headers(c->w->cfg, o);
    url_show(url, shown, sizeof shown);
    set_transfer(c, url, &b, &a, headers);
    if (*c->w->cfg->claim_s3_region)
        sign(c);
    CURLcode e = curl_easy_perform(c->curl);
    curl_easy_getinfo(c->curl, CURLINFO_RESPONSE_CODE, &status);
    curl_slist_free_all(headers);
    if (e)
        return lm_err_set(err, LM_NET, "PUT %s: %s", shown, curl_easy_strerror(e));
    return judge(status, &a, shown, j->out.len, err);
}

/* ---- jobs ------------------------------------------------------------------------------- */

static void try_later(claims *c, struct job *j, const char *why)
{
    const struct config *cfg = c->w->cfg;
    if (atomic_load(&c->w->ending) || lease_revoked(j->lease)) {
        worker_end_job(c->w, j, OUTCOME_DROPPED);   /* it runs again, here or elsewhere */
        return;
    }
    metric_add(&c->w->metrics.retries, 1);
    log_seldom(&c->waits, "claim", "%s [%d] @%" PRId64 ": %s; trying again, its offset waits",
               j->lease->topic, (int)j->lease->partition, j->record.offset, why);
    job_list_add(&c->later, j, lm_now_us() + backoff_us(j->waits++, cfg->retry_backoff_ms,
                                                        cfg->retry_backoff_max_ms));
}

static void upload_to(claims *c, struct job *j, const char *url, const char *digest)
{
    struct lm_err err;
    const struct header *type = header_find(j->out.headers.items, j->out.headers.n,
                                            "content-type");
    char content[32] = "application/json";
    if (type)
        snprintf(content, sizeof content, "%.*s", (int)type->len, (const char *)type->value);
    const struct completion_claim claim = { url, digest, content, (int64_t)j->out.len };
    lm_status st = put(c, j, &claim, &err);
    if (st && lm_status_disposition(st) == LM_DO_RETRY) {
        try_later(c, j, err.msg);
        return;
    }
    if (st) {
        outcome_dead_letter(c->w, j, &err, "CLAIM");
        return;
    }
    metric_add(&c->w->metrics.claims, 1);
    metric_add(&c->w->metrics.claim_bytes, j->out.len);
    if (outcome_claimed(c->w, j, &claim))
        try_later(c, j, "the claim can't be encoded yet");
}

static void upload(claims *c, struct job *j)
{
    char digest[HEX];
    bool named = hex_digest(j->out.value, j->out.len, digest);
    char *url = named ? url_template_fill(c->w->cfg->claim_url, URL_HOLE_OBJECT, digest, NULL)
                      : NULL;
    if (url)
        upload_to(c, j, url, digest);
    else
        try_later(c, j, "out of memory");
    free(url);
}

static void serve(claims *c, struct job *j)
{
    for (struct job *next; j; j = next) {
        next = j->next;
        if (atomic_load(&c->w->ending))
            worker_end_job(c->w, j, OUTCOME_DROPPED);
        else
            upload(c, j);
    }
}

static void *claims_main(void *arg)
{
    claims *c = arg;
    while (!atomic_load(&c->w->ending)) {
        serve(c, job_queue_take(&c->in, job_list_wait_ms(&c->later, lm_now_us(), IDLE_MS)));
        serve(c, job_list_take_due(&c->later, lm_now_us()));
    }
    serve(c, job_queue_take(&c->in, 0));
    serve(c, job_list_take_all(&c->later));
    return NULL;
}

/* ---- life ------------------------------------------------------------------------------- */

lm_status claims_new(struct worker *w, claims **out, struct lm_err *err)
{
    claims *c = lm_calloc(1, sizeof *c);
    if (!c)
        return lm_err_set(err, LM_NOMEM, "out of memory");
    c->w = w;
    job_queue_init(&c->in);
    curl_global_init(CURL_GLOBAL_DEFAULT);
    c->curl = curl_easy_init();
    if (!c->curl || pthread_create(&c->thread, NULL, claims_main, c)) {
        curl_easy_cleanup(c->curl);
        job_queue_release(&c->in);
        free(c);
        return lm_err_set(err, LM_NOMEM, "can't start the claim thread");
    }
    *out = c;
    return LM_OK;
}

void claims_put(claims *c, struct job *j)
{
    j->waits = 0;
    job_queue_push(&c->in, j);
}

void claims_stop(claims *c)
{
    if (!c || c->stopped)
        return;
    c->stopped = true;
    job_queue_wake(&c->in);
    pthread_join(c->thread, NULL);
}

void claims_free(claims *c)
{
    if (!c)
        return;
    claims_stop(c);
    serve(c, job_queue_take(&c->in, 0));        /* what the producer's last reports put here */
    job_queue_release(&c->in);
    curl_easy_cleanup(c->curl);
    free(c);
}
