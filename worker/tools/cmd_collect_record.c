/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_collect_record.c - records of replies and dead letters; see cmd_collect_record.h.
 */
#include "worker/tools/cmd_collect_record.h"

#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

lm_status collected_codec(const struct config *c, codec **out, struct lm_err *err)
{
    const struct codec_config cc = {
        .registry = config_registry(c), .reply_topic = c->topics_replies,
        .max_message_bytes = LM_MAX(CODEC_MAX_MESSAGE, (size_t)c->message_max_bytes),
    };
    return codec_new(&cc, out, err);
}

/* ---- replies ---------------------------------------------------------------------------- */

struct header *collected_headers(const rd_kafka_message_t *m, int *n)
{
    rd_kafka_headers_t *h;
    *n = 0;
    if (rd_kafka_message_headers(m, &h))
        return NULL;
    size_t count = rd_kafka_header_cnt(h);
    struct header *out = lm_calloc(count + 1, sizeof *out);
    while (out && (size_t)*n < count &&
           !rd_kafka_header_get_all(h, (size_t)*n, &out[*n].name, &out[*n].value, &out[*n].len))
        ++*n;
    return out;
}

static bool is_one_line(const rd_kafka_message_t *m)
{
    return !memchr(m->payload, '\n', m->len) && !memchr(m->payload, '\r', m->len);
}

lm_status collected_reply_read(codec *c, const rd_kafka_message_t *m, struct collected_reply *r,
                               struct lm_err *err)
{
    int n;
    struct header *h = collected_headers(m, &n);
    *r = (struct collected_reply){ 0 };
    lm_status st = codec_decode_tree(c, m->payload, m->len, h, n, &r->root, err);
    bool json = codec_detect(m->payload, m->len, h, n) == ENCODING_JSON;
    free(h);
    if (st != LM_OK)
        return st;
    const json_t *id = json_object_get(r->root, "id");
    if (!json_is_string(id)) {
        collected_reply_release(r);
        return lm_err_set(err, LM_FORMAT, "no string under \"id\"");
    }
    const json_t *stream = json_object_get(r->root, "stream");
    r->outcome = !json_is_false(json_object_get(stream, "final")) &&
                 !json_is_object(json_object_get(r->root, "error"));
    r->id = json_string_value(id);
    r->id_len = json_string_length(id);
    r->as_it_came = json && is_one_line(m);
    return LM_OK;
}

void collected_reply_release(struct collected_reply *r)
{
    json_decref(r->root);
    *r = (struct collected_reply){ 0 };
}

char *collected_reply_line(const struct collected_reply *r, const rd_kafka_message_t *m)
{
    if (r->as_it_came)
        return lm_strndup(m->payload, m->len);
    return json_dumps(r->root, JSON_COMPACT);
}

/* ---- headers ---------------------------------------------------------------------------- */

struct bytes { const void *at; size_t len; };

/* The last header of the first name that occurs. */
static struct bytes header(const rd_kafka_message_t *m, const char *const *names)
{
    struct bytes b = { 0 };
    rd_kafka_headers_t *h;
    if (rd_kafka_message_headers(m, &h) != RD_KAFKA_RESP_ERR_NO_ERROR)
        return b;
    for (; *names; names++)
        if (rd_kafka_header_get_last(h, *names, &b.at, &b.len) == RD_KAFKA_RESP_ERR_NO_ERROR &&
            b.at)
            return b;
    return (struct bytes){ 0 };
}

static void header_text(const rd_kafka_message_t *m, const char *const *names, char *out,
                        size_t size, const char *fallback)
{
    struct bytes b = header(m, names);
    if (b.at)
        snprintf(out, size, "%.*s", (int)LM_MIN(b.len, size - 1), (const char *)b.at);
    else
        snprintf(out, size, "%s", fallback);
    for (char *c = out; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            *c = '?';
}

static int64_t text_number(struct bytes b)
{
    char text[24], *end;
    if (b.len == 0 || b.len >= sizeof text)
        return -1;
    memcpy(text, b.at, b.len);
    text[b.len] = '\0';
    errno = 0;
    long long v = strtoll(text, &end, 10);
    return *end || errno || v < 0 ? -1 : v;
}

/* `binary`: a big-endian int32 or int64; `text`: decimal digits. */
static int64_t header_number(const rd_kafka_message_t *m, const char *binary, const char *text)
{
    struct bytes b = header(m, (const char *const[]){ binary, NULL });
    if (b.at && b.len == 4) {
        uint32_t v;
        memcpy(&v, b.at, 4);
        return (int32_t)be32toh(v);
    }
    if (b.at && b.len == 8) {
        uint64_t v;
        memcpy(&v, b.at, 8);
        return (int64_t)be64toh(v);
    }
    return text_number(header(m, (const char *const[]){ text, NULL }));
}

/* ---- dead letters ----------------------------------------------------------------------- */

static const char *const names_topic[] = { "kafka_dlt-original-topic", "__connect.errors.topic",
                                           NULL };
static const char *const names_code[] = { "loramill-error-code", "kafka_dlt-exception-fqcn",
                                          "__connect.errors.exception.class.name", NULL };
static const char *const names_message[] = { "loramill-error-message",
                                             "kafka_dlt-exception-message",
                                             "__connect.errors.exception.message", NULL };

void collected_letter_read(const rd_kafka_message_t *m, struct collected_letter *d)
{
    *d = (struct collected_letter){ 0 };
    header_text(m, names_topic, d->topic, sizeof d->topic, "");
    header_text(m, names_code, d->code, sizeof d->code, "unknown");
    header_text(m, names_message, d->message, sizeof d->message, "the dead letter does not say");
    d->partition = header_number(m, "kafka_dlt-original-partition", "__connect.errors.partition");
    d->offset = header_number(m, "kafka_dlt-original-offset", "__connect.errors.offset");
    d->attempt = header_number(m, "kafka_deliveryAttempt", "loramill-attempt");
    if (d->topic[0] && d->partition >= 0 && d->offset >= 0)
        snprintf(d->source, sizeof d->source, "%s/%lld/%lld", d->topic, (long long)d->partition,
                 (long long)d->offset);
    else
        snprintf(d->source, sizeof d->source, "%s/%d/%lld", rd_kafka_topic_name(m->rkt),
                 m->partition, (long long)m->offset);
    d->prompt = m->payload ? json_loadb(m->payload, m->len, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL)
                           : NULL;
    const json_t *id = json_object_get(d->prompt, "id");
    if (json_is_string(id) && json_string_length(id) > 0 &&
        strlen(json_string_value(id)) == json_string_length(id))
        d->id = json_string_value(id);
}

void collected_letter_release(struct collected_letter *d)
{
    json_decref(d->prompt);
    *d = (struct collected_letter){ 0 };
}

/* Bytes as a JSON string where they are UTF-8, else as {"hex": "..."}. */
static json_t *json_bytes(const void *at, size_t len)
{
    if (!at)
        return json_null();
    json_t *text = json_stringn(at, len);
    if (text)
        return text;
    char *hex = lm_malloc(len * 2 + 1);
    if (!hex)
        return json_null();
    lm_hex(at, len, hex);
    json_t *o = json_pack("{s:s}", "hex", hex);
    free(hex);
    return o;
}

/* Header text is anyone's bytes and may have been cut inside a character. */
static json_t *json_text(const char *s)
{
    if (!s)
        return json_null();
    json_t *t = json_string(s);
    if (t)
        return t;
    char ascii[512];
    snprintf(ascii, sizeof ascii, "%s", s);
    for (char *c = ascii; *c; c++)
        if (*c & 0x80)
            *c = '?';
    return json_string(ascii);
}

static json_t *json_known(int64_t n)
{
    return n < 0 ? json_null() : json_integer(n);
}

json_t *collected_letter_json(const struct collected_letter *d, const rd_kafka_message_t *m)
{
    json_t *value = d->prompt ? json_incref(d->prompt) : json_bytes(m->payload, m->len);
    return json_pack("{s:o, s:{s:o, s:o}, s:{s:o, s:o, s:o, s:o}, s:o, s:o}",
                     "id", json_text(d->id),
                     "error", "code", json_text(d->code), "message", json_text(d->message),
                     "dead_letter", "topic", json_text(d->topic[0] ? d->topic : NULL),
                     "partition", json_known(d->partition), "offset", json_known(d->offset),
                     "attempt", json_known(d->attempt),
                     "key", json_bytes(m->key, m->key_len),
                     d->prompt ? "prompt" : "value", value);
}

char *collected_letter_line(const struct collected_letter *d, const rd_kafka_message_t *m)
{
    json_t *o = collected_letter_json(d, m);
    char *line = o ? json_dumps(o, JSON_COMPACT) : NULL;
    json_decref(o);
    return line;
}

/* ---- sums over a job -------------------------------------------------------------------- */

struct collected_sum {
    json_t *adapters, *workers, *reasons, *causes;      /* name -> count */
    uint64_t prompt_tokens, completion_tokens;
    int64_t first_ms, last_ms;                          /* record times; 0: none yet */
};

struct collected_sum *collected_sum_new(void)
{
    struct collected_sum *t = lm_calloc(1, sizeof *t);
    if (!t)
        return NULL;
    t->adapters = json_object();
    t->workers = json_object();
    t->reasons = json_object();
    t->causes = json_object();
    return t;
}

void collected_sum_free(struct collected_sum *t)
{
    if (!t)
        return;
    json_decref(t->adapters);
    json_decref(t->workers);
    json_decref(t->reasons);
    json_decref(t->causes);
    free(t);
}

static void count(json_t *table, const char *name)
{
    json_t *n = json_object_get(table, name);
    if (n)
        json_integer_set(n, json_integer_value(n) + 1);
    else
        json_object_set_new(table, name, json_integer(1));
}

static void note_time(struct collected_sum *t, const rd_kafka_message_t *m)
{
    int64_t ms = rd_kafka_message_timestamp(m, NULL);
    if (ms <= 0)
        return;
    if (t->first_ms == 0 || ms < t->first_ms)
        t->first_ms = ms;
    t->last_ms = LM_MAX(t->last_ms, ms);
}

static const char *string_or(const json_t *v, const char *fallback)
{
    return json_is_string(v) ? json_string_value(v) : fallback;
}

void collected_sum_reply(struct collected_sum *t, const struct collected_reply *r,
                         const rd_kafka_message_t *m)
{
    size_t i;
    json_t *choice;
    const json_t *usage = json_object_get(r->root, "usage");
    t->prompt_tokens += (uint64_t)json_integer_value(json_object_get(usage, "prompt_tokens"));
    t->completion_tokens +=
        (uint64_t)json_integer_value(json_object_get(usage, "completion_tokens"));
    count(t->adapters, string_or(json_object_get(r->root, "adapter"), "(base model)"));
    count(t->workers, string_or(json_object_get(r->root, "worker"), "(unnamed)"));
    json_array_foreach(json_object_get(r->root, "choices"), i, choice)
        count(t->reasons, string_or(json_object_get(choice, "finish_reason"), "(none)"));
    note_time(t, m);
}

void collected_sum_dead_letter(struct collected_sum *t, const struct collected_letter *d,
                               const rd_kafka_message_t *m)
{
    count(t->causes, d->code);
    note_time(t, m);
}

lm_status collected_sum_write(const struct collected_sum *t, const struct outcome_counts *n,
                              const char *path, struct lm_err *err)
{
    json_t *o = json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:O, s:O, s:O, s:O}",
                          "answered", (json_int_t)n->replies,
                          "dead_lettered", (json_int_t)n->dead_letters,
                          "missing", (json_int_t)n->missing, "repeated", (json_int_t)n->repeated,
                          "prompt_tokens", (json_int_t)t->prompt_tokens,
                          "completion_tokens", (json_int_t)t->completion_tokens,
                          "first_ms", (json_int_t)t->first_ms, "last_ms", (json_int_t)t->last_ms,
                          "adapters", t->adapters, "workers", t->workers,
                          "finish_reasons", t->reasons, "causes", t->causes);
    int failed = o ? json_dump_file(o, path, JSON_INDENT(2)) : -1;
    json_decref(o);
    return failed ? lm_err_set(err, LM_IO, "%s: can't write the summary: %s", path,
                               strerror(errno)) : LM_OK;
}
