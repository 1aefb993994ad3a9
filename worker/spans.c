/* SPDX-License-Identifier: Apache-2.0 */
/*
 * spans.c - see spans.h. The form is opentelemetry-proto's ExportTraceServiceRequest in its JSON
 * mapping: ids in hex, 64-bit numbers as text.
 */
#include "worker/spans.h"

#include <curl/curl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "worker/log.h"
#include "worker/resolver.h"
#include "worker/worker.h"

enum { SEND_EVERY_MS = 1000, CONNECT_MS = 2000, SEND_MS = 5000, LAST_MS = 1000 };
enum { KIND_INTERNAL = 1, KIND_PRODUCER = 4, KIND_CONSUMER = 5, STATUS_ERROR = 2 };

/* One prompt that has ended. Times as lm_now_us() tells them. */
struct ended {
    struct ended *next;
    struct span_context context;
    uint64_t id;                /* of its first span; the others' follow from it */
    struct lease *lease;        /* a reference: topic and partition */
    int64_t offset, received_us, submitted_us, answered_us, sent_us, ended_us;
    int64_t epoch_us;           /* added to those: since the Unix epoch, as it was known then */
    enum job_outcome outcome;
    struct reply_tally tally;
    lm_status error;            /* of a dead letter */
    char sent_to[256];
};

struct spans {
    struct worker *w;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t more;
    struct ended *head, **tail;
    size_t n;
    uint64_t seed, serial;
    bool stop;                  /* with `lock` */
    atomic_llong stop_us;       /* 0: it goes on */
    CURL *curl;
    struct curl_slist *headers;
    struct log_seldom refused;
};

/* ---- context ---------------------------------------------------------------------------- */

static int hex_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Lower case only, as the standard has it. False: not hex, or all zero. */
static bool read_hex(const char *at, uint8_t *out, size_t n)
{
    uint8_t any = 0;
    for (size_t i = 0; i < n; i++) {
        int high = hex_digit(at[2 * i]), low = hex_digit(at[2 * i + 1]);
        if (high < 0 || low < 0)
            return false;
        any |= out[i] = (uint8_t)(high << 4 | low);
    }
    return any;
}

/* "00-" trace "-" parent "-" flags; a later version may have more behind another "-". */
bool span_context_parse(const void *value, size_t len, struct span_context *out)
{
    enum { LEN = 55 };
    const char *s = value;
    if (!value || len < LEN || s[2] != '-' || s[35] != '-' || s[52] != '-')
        return false;
    int version[2] = { hex_digit(s[0]), hex_digit(s[1]) };
    int flags[2] = { hex_digit(s[53]), hex_digit(s[54]) };
    if (version[0] < 0 || version[1] < 0 || flags[0] < 0 || flags[1] < 0 ||
        (version[0] == 15 && version[1] == 15))
        return false;
    if (len > LEN && ((!version[0] && !version[1]) || s[LEN] != '-'))
        return false;
    out->sampled = flags[1] & 1;
    return read_hex(s + 3, out->trace, sizeof out->trace) &&
           read_hex(s + 36, out->parent, sizeof out->parent);
}

static bool find_context(const struct record *r, struct span_context *out)
{
    const struct header *h = header_find(r->headers, r->n_headers, "traceparent");
    if (!h)
        h = header_find(r->headers, r->n_headers, "ce_traceparent");
    return h && span_context_parse(h->value, h->len, out) && out->sampled;
}

/* ---- taking ----------------------------------------------------------------------------- */

static void release(struct ended *e)
{
    lease_unref(e->lease);
    free(e);
}

static struct ended *note(const struct job *j, const struct span_context *context,
                          enum job_outcome outcome)
{
    struct ended *e = lm_malloc(sizeof *e);
    struct timespec wall;
    if (!e)
        return NULL;
    clock_gettime(CLOCK_REALTIME, &wall);
    int64_t now = lm_now_us();
    *e = (struct ended){
        .context = *context, .lease = lease_ref(j->lease), .offset = j->record.offset,
        .received_us = j->received_us, .submitted_us = j->submitted_us,
        .answered_us = j->answered_us, .sent_us = j->out.handed_us, .ended_us = now,
        .epoch_us = (int64_t)wall.tv_sec * 1000000 + wall.tv_nsec / 1000 - now,
        .outcome = outcome, .tally = j->tally,
        .error = outcome != OUTCOME_DEAD_LETTER ? LM_OK : j->failure ? j->failure : LM_INTERNAL,
    };
    snprintf(e->sent_to, sizeof e->sent_to, "%s", j->out.topic ? j->out.topic : "");
    return e;
}

void spans_end(spans *s, const struct job *j, enum job_outcome outcome)
{
    struct span_context context;
    if (!s || !find_context(&j->record, &context))
        return;
    struct ended *e = note(j, &context, outcome);
    pthread_mutex_lock(&s->lock);
    bool room = e && s->n < SPANS_MAX && !s->stop;
    if (room) {
        s->serial++;
        e->id = (XXH3_64bits_withSeed(&s->serial, sizeof s->serial, s->seed) & ~UINT64_C(3)) | 1;
        e->next = NULL;
        *s->tail = e;
        s->tail = &e->next;
        if (++s->n == SPANS_BATCH)
            pthread_cond_signal(&s->more);
    }
    pthread_mutex_unlock(&s->lock);
    if (!room)
        metric_add(&s->w->metrics.traces_dropped, 1);
    if (e && !room)
        release(e);
}

/* ---- form ------------------------------------------------------------------------------- */

static void add_text(json_t *attributes, const char *key, const char *value)
{
    json_array_append_new(attributes, json_pack("{s:s, s:{s:o}}", "key", key, "value",
        "stringValue", json_sprintf("%s", value)));
}

static void add_number(json_t *attributes, const char *key, int64_t value)
{
    json_array_append_new(attributes, json_pack("{s:s, s:{s:o}}", "key", key, "value", "intValue",
        json_sprintf("%" PRId64, value)));
}

static json_t *hex(const void *bytes, size_t n)
{
    char text[33];
    lm_hex(bytes, LM_MIN(n, 16), text);
    return json_string(text);
}

static json_t *span_id(uint64_t id)
{
    return json_sprintf("%016" PRIx64, id);
}

/* A time of our clock, in nanoseconds since the epoch. */
static json_t *nanoseconds(const struct ended *e, int64_t us)
{
    return json_sprintf("%" PRId64 "000", us + e->epoch_us);
}

static json_t *span(const struct ended *e, uint64_t id, json_t *parent, json_t *name, int kind,
                    json_t *start, json_t *end, json_t *attributes)
{
    return json_pack("{s:o, s:o, s:o, s:o, s:i, s:o, s:o, s:o}", "traceId",
                     hex(e->context.trace, sizeof e->context.trace), "spanId", span_id(id),
                     "parentSpanId", parent, "name", name, "kind", kind,
                     "startTimeUnixNano", start, "endTimeUnixNano", end,
                     "attributes", attributes);
}

static const char *outcome_name(const struct ended *e)
{
    switch (e->outcome) {
    case OUTCOME_DEAD_LETTER: return "dead_letter";
    case OUTCOME_REPLY:
        return e->tally.reason == ENGINE_EXPIRED ? "expired" :
               e->tally.reason == ENGINE_CANCELLED ? "cancelled" : "completed";
    default: return "handed_back";
    }
}

static json_t *messaging(const char *operation, const char *topic)
{
    json_t *a = json_array();
    add_text(a, "messaging.system", "kafka");
    add_text(a, "messaging.operation.name", operation);
    add_text(a, "messaging.operation.type", operation);
    add_text(a, "messaging.destination.name", topic);
    return a;
}

static json_t *process_span(const struct worker *w, const struct ended *e)
{
    char partition[16];
    json_t *a = messaging("process", e->lease->topic);
    snprintf(partition, sizeof partition, "%d", (int)e->lease->partition);
    add_text(a, "messaging.destination.partition.id", partition);
    add_number(a, "messaging.kafka.offset", e->offset);
    add_text(a, "messaging.consumer.group.name", w->cfg->group_id);
    add_text(a, "messaging.client.id", w->name);
    add_text(a, "loramill.outcome", outcome_name(e));
    if (e->error)
        add_text(a, "error.type", lm_status_wire(e->error));
    json_t *o = span(e, e->id, hex(e->context.parent, sizeof e->context.parent),
                     json_sprintf("process %s", e->lease->topic), KIND_CONSUMER,
                     nanoseconds(e, e->received_us), nanoseconds(e, e->ended_us), a);
    json_object_set_new(o, "links", json_pack("[{s:o, s:o}]", "traceId",
        hex(e->context.trace, sizeof e->context.trace), "spanId",
        hex(e->context.parent, sizeof e->context.parent)));
    if (e->error)
        json_object_set_new(o, "status", json_pack("{s:i}", "code", STATUS_ERROR));
    return o;
}

static json_t *engine_span(const struct worker *w, const struct ended *e)
{
    const char *operation = e->tally.chat ? "chat" : "text_completion";
    const char *model = w->info.model_name ? w->info.model_name : "";
    json_t *a = json_array();
    add_text(a, "gen_ai.operation.name", operation);
    add_text(a, "gen_ai.provider.name", "loramill");
    add_text(a, "gen_ai.request.model", model);
    add_number(a, "gen_ai.usage.input_tokens", e->tally.prompt_tokens);
    add_number(a, "gen_ai.usage.cache_read.input_tokens", e->tally.cached_tokens);
    add_number(a, "gen_ai.usage.output_tokens", e->tally.completion_tokens);
    return span(e, e->id + 1, span_id(e->id), json_sprintf("%s %s", operation, model),
                KIND_INTERNAL, nanoseconds(e, e->submitted_us),
                nanoseconds(e, e->answered_us), a);
}

static json_t *send_span(const struct ended *e)
{
    return span(e, e->id + 2, span_id(e->id), json_sprintf("send %s", e->sent_to), KIND_PRODUCER,
                nanoseconds(e, e->sent_us), nanoseconds(e, e->ended_us),
                messaging("send", e->sent_to));
}

static void add_spans(const struct worker *w, const struct ended *e, json_t *to)
{
    bool sent = e->outcome == OUTCOME_REPLY || e->outcome == OUTCOME_DEAD_LETTER;
    json_array_append_new(to, process_span(w, e));
    if (e->outcome == OUTCOME_REPLY && e->answered_us > e->submitted_us)
        json_array_append_new(to, engine_span(w, e));
    if (sent && e->sent_us)
        json_array_append_new(to, send_span(e));
}

json_t *spans_take(spans *s, size_t *n)
{
    pthread_mutex_lock(&s->lock);
    struct ended *all = s->head, **cut = &s->head;
    for (*n = 0; *cut && *n < SPANS_BATCH; ++*n)
        cut = &(*cut)->next;
    struct ended *rest = *cut;
    *cut = NULL;
    s->head = rest;
    s->n -= *n;
    if (!rest)
        s->tail = &s->head;
    pthread_mutex_unlock(&s->lock);
    if (!*n)
        return NULL;
    json_t *list = json_array(), *resource = json_array();
    for (struct ended *e = all, *next; e; e = next) {
        next = e->next;
        add_spans(s->w, e, list);
        release(e);
    }
    add_text(resource, "service.name", "loramill");
    add_text(resource, "service.version", LORAMILL_VERSION);
    add_text(resource, "service.instance.id", s->w->name);
    return json_pack("{s:[{s:{s:o}, s:[{s:{s:s, s:s}, s:o}]}]}", "resourceSpans", "resource",
                     "attributes", resource, "scopeSpans", "scope", "name", "loramill", "version",
                     LORAMILL_VERSION, "spans", list);
}

/* ---- sending ---------------------------------------------------------------------------- */

static size_t drop_body(char *at, size_t size, size_t n, void *ctx)
{
    (void)at;
    (void)ctx;
    return size * n;
}

/* A silent collector must not hold the worker's end up. */
static int on_progress(void *ctx, curl_off_t a, curl_off_t b, curl_off_t d, curl_off_t e)
{
    (void)a, (void)b, (void)d, (void)e;
    const spans *s = ctx;
    int64_t stop = atomic_load(&s->stop_us);
    return stop && lm_now_us() - stop > LAST_MS * 1000;
}

static bool post(spans *s, const char *text, size_t len)
{
    long status = 0;
    curl_easy_setopt(s->curl, CURLOPT_POSTFIELDS, text);
    curl_easy_setopt(s->curl, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)len);
    CURLcode e = curl_easy_perform(s->curl);
    curl_easy_getinfo(s->curl, CURLINFO_RESPONSE_CODE, &status);
    if (!e && status >= 200 && status < 300)
        return true;
    if (e)
        log_seldom(&s->refused, "spans", "traces.otlp_url: %s; spans are dropped",
                   curl_easy_strerror(e));
    else
        log_seldom(&s->refused, "spans", "traces.otlp_url: HTTP %ld; spans are dropped", status);
    return false;
}

/* False: there was nothing, or nobody to take it. */
static bool send_batch(spans *s)
{
    size_t n;
    json_t *o = spans_take(s, &n);
    char *text = o ? json_dumps(o, JSON_COMPACT) : NULL;
    bool taken = text && post(s, text, strlen(text));
    if (n)
        metric_add(taken ? &s->w->metrics.traces : &s->w->metrics.traces_dropped, n);
    free(text);
    json_decref(o);
    return taken;
}

/* A second, or until there is a batch. False: the end. */
static bool await(spans *s)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    at.tv_sec += SEND_EVERY_MS / 1000;
    pthread_mutex_lock(&s->lock);
    while (!s->stop && s->n < SPANS_BATCH && !pthread_cond_timedwait(&s->more, &s->lock, &at))
        ;
    bool go = !s->stop;
    pthread_mutex_unlock(&s->lock);
    return go;
}

static void *spans_main(void *arg)
{
    spans *s = arg;
    bool go;
    do {
        go = await(s);
        while (send_batch(s))
            ;
    } while (go);
    return NULL;
}

/* ---- life ------------------------------------------------------------------------------- */

static void set_transfer(spans *s)
{
    const struct config *cfg = s->w->cfg;
    s->headers = curl_slist_append(s->headers, "Content-Type: application/json");
    s->headers = curl_slist_append(s->headers, "Expect:");
    if (*cfg->traces_ca_file)
        curl_easy_setopt(s->curl, CURLOPT_CAINFO, cfg->traces_ca_file);
    if (*cfg->traces_auth_header)
        s->headers = curl_slist_append(s->headers, cfg->traces_auth_header);
    curl_easy_setopt(s->curl, CURLOPT_URL, cfg->traces_otlp_url);
    curl_easy_setopt(s->curl, CURLOPT_HTTPHEADER, s->headers);
    curl_easy_setopt(s->curl, CURLOPT_WRITEFUNCTION, drop_body);
    curl_easy_setopt(s->curl, CURLOPT_NOSIGNAL, 1L);
    resolver_let_go(s->curl);
    curl_easy_setopt(s->curl, CURLOPT_NOPROGRESS, 0L);
    curl_easy_setopt(s->curl, CURLOPT_XFERINFOFUNCTION, on_progress);
    curl_easy_setopt(s->curl, CURLOPT_XFERINFODATA, s);
    curl_easy_setopt(s->curl, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(s->curl, CURLOPT_CONNECTTIMEOUT_MS, (long)CONNECT_MS);
    curl_easy_setopt(s->curl, CURLOPT_TIMEOUT_MS, (long)SEND_MS);
}

lm_status spans_new(struct worker *w, spans **out, struct lm_err *err)
{
    pthread_condattr_t attr;
    spans *s = lm_calloc(1, sizeof *s);
    if (!s)
        return lm_err_set(err, LM_NOMEM, "out of memory");
    s->w = w;
    s->tail = &s->head;
    if (getrandom(&s->seed, sizeof s->seed, 0) != sizeof s->seed)
        s->seed = (uint64_t)lm_wall_ms() << 20 ^ (uint64_t)lm_now_us();
    pthread_mutex_init(&s->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&s->more, &attr);
    pthread_condattr_destroy(&attr);
    curl_global_init(CURL_GLOBAL_DEFAULT);
    if ((s->curl = curl_easy_init()))
        set_transfer(s);
    if (!s->curl || pthread_create(&s->thread, NULL, spans_main, s)) {
        s->stop = true;         /* there is no thread to end */
        spans_free(s);
        return lm_err_set(err, LM_NOMEM, "can't start the thread that sends spans");
    }
    *out = s;
    return LM_OK;
}

void spans_stop(spans *s)
{
    if (!s || s->stop)
        return;
    atomic_store(&s->stop_us, lm_now_us());
    pthread_mutex_lock(&s->lock);
    s->stop = true;
    pthread_cond_signal(&s->more);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, NULL);
    metric_add(&s->w->metrics.traces_dropped, s->n);
}

void spans_free(spans *s)
{
    if (!s)
        return;
    spans_stop(s);
    for (struct ended *e = s->head, *next; e; e = next) {
        next = e->next;
        release(e);
    }
    curl_easy_cleanup(s->curl);
    curl_slist_free_all(s->headers);
    pthread_cond_destroy(&s->more);
    pthread_mutex_destroy(&s->lock);
    free(s);
}
