/* SPDX-License-Identifier: Apache-2.0 */
/*
 * codec.c - picks the encoding of a record, and the one road from bytes to prompt and from
 * completion to bytes. See codec.h for the contract.
 *
 * All rules live once: Avro is decoded into a JSON tree by field name, so that json_prompt.c reads
 * both encodings, and json_completion.c writes both through message_out.h.
 *
 * Framing is Confluent's: a schema id is 0x00 and four bytes, big-endian, or 0x01 and a 16-byte
 * GUID; it stands in the header __value_schema_id (then the value is bare), else before the value.
 *
 * Decoding and encoding share nothing that changes: each has a registry client, or both have the
 * asker. Encoders (the outbox; intake, for prompts that ended there; the claim thread; and whoever
 * refuses a prompt, the producer thread too, for its notice) take turns only to ask for the
 * schema's id.
 */
#include "worker/codec/codec.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "worker/codec/avro_codec.h"
#include "worker/codec/json_completion.h"
#include "worker/codec/json_prompt.h"
#include "worker/codec/json_tree.h"
#include "worker/codec/schema_asker.h"
#include "worker/codec/schema_cache.h"
#include "worker/codec/schema_text.h"

#define SCHEMA_ID_HEADER "__value_schema_id"

enum { MAGIC_ID = 0, MAGIC_GUID = 1, ID_BYTES = 5, GUID_BYTES = 17 };

/* For the id of the reply schema, with an asker: at start, and of a reply. A registry that is well
 * answers sooner; a reply that comes before its answer is tried again. */
enum { START_WAIT_MS = 11000, REPLY_WAIT_MS = 250 };

struct codec {
    char *model_name;
    size_t max_message;
    schema_asker *asker;        /* has the registry instead of the two below; NULL: they have it */
    /* decoding thread; NULL without a registry */
    registry *prompts;
    schema_cache *cache;
    /* encoding threads; only read, but for the two that say otherwise */
    pthread_mutex_t replies_lock;
    registry *replies;          /* under the lock */
    struct avro_plan *reply_plan;
    char *subject;
    bool auto_register;
    _Atomic int32_t reply_id;   /* 0: not known yet */
};

/* ---- life ---------------------------------------------------------------------------------- */

static lm_status open_registry(codec *c, const struct codec_config *cfg, struct lm_err *err)
{
    const struct registry_config *rc = &cfg->registry;
    if (!cfg->reply_topic || !cfg->reply_topic[0])
        return lm_err_set(err, LM_INVALID, "Avro needs a reply topic, to name its subject by");
    if (asprintf(&c->subject, "%s-value", cfg->reply_topic) < 0) {
        c->subject = NULL;
        return lm_err_set(err, LM_NOMEM, "out of memory");
    }
    c->auto_register = cfg->auto_register;
    const struct reply_schema replies = { c->subject, schema_completion_text, c->auto_register };
    lm_status st = cfg->answered
        ? schema_asker_new(rc, &replies, cfg->answered, &c->asker, err)
        : registry_new(rc, &c->prompts, err);
    if (!st && !c->asker)
        st = registry_new(rc, &c->replies, err);
    if (!st)
        st = avro_plan_new(schema_completion_text, strlen(schema_completion_text), &c->reply_plan,
                           err);
    if (!st && !(c->cache = schema_cache_new(c->prompts)))
        st = lm_err_set(err, LM_NOMEM, "out of memory");
    return st;
}

lm_status codec_new(const struct codec_config *cfg, codec **out, struct lm_err *err)
{
    codec *c = lm_calloc(1, sizeof *c);
    if (!c)
        return lm_err_set(err, LM_NOMEM, "out of memory");
    lm_status st = LM_OK;
    pthread_mutex_init(&c->replies_lock, NULL);
    c->max_message = cfg->max_message_bytes ? cfg->max_message_bytes : CODEC_MAX_MESSAGE;
    if (cfg->model_name && !(c->model_name = lm_strdup(cfg->model_name)))
        st = lm_err_set(err, LM_NOMEM, "out of memory");
    if (!st && cfg->registry.url && cfg->registry.url[0])
        st = open_registry(c, cfg, err);
    if (st)
        codec_free(c);
    else
        *out = c;
    return st;
}

void codec_free(codec *c)
{
    if (!c)
        return;
    schema_asker_free(c->asker);
    schema_cache_free(c->cache);
    registry_free(c->prompts);
    registry_free(c->replies);
    avro_plan_free(c->reply_plan);
    pthread_mutex_destroy(&c->replies_lock);
    free(c->subject);
    free(c->model_name);
    free(c);
}

/* ---- which encoding ------------------------------------------------------------------------ */

static const struct header *find_header(const struct header *h, int n, const char *name)
{
    for (int i = n - 1; i >= 0; i--)    /* Kafka's rule: the last one counts */
        if (h[i].value && strcasecmp(h[i].name, name) == 0)
            return &h[i];
    return NULL;
}

/* Is the media type `type`, whatever its case and parameters ("; charset=utf-8")? */
static bool media_type_is(const struct header *h, const char *type)
{
    const char *s = h->value;
    size_t n = 0;
    while (n < h->len && s[n] != ';')
        n++;
    while (n > 0 && (s[n - 1] == ' ' || s[n - 1] == '\t'))
        n--;
    return n == strlen(type) && strncasecmp(s, type, n) == 0;
}

enum encoding codec_detect(const void *value, size_t len, const struct header *h, int n_headers)
{
    const struct header *type = find_header(h, n_headers, "content-type");
    if (type && media_type_is(type, "application/json"))
        return ENCODING_JSON;
    if (type && media_type_is(type, "application/avro"))
        return ENCODING_AVRO;
    if (find_header(h, n_headers, SCHEMA_ID_HEADER))
        return ENCODING_AVRO;
    const unsigned char *first = value;
    return len > 0 && first && *first <= 1 ? ENCODING_AVRO : ENCODING_JSON;
}

/* ---- decoding ------------------------------------------------------------------------------ */

/* Messages quote hostile bytes, cut at some length, and end in UTF-8 headers: each byte that is
 * part of no character becomes '?'. */
static void make_utf8(struct lm_err *err)
{
    if (!err || json_is_utf8(err->msg, strlen(err->msg)))
        return;
    for (char *s = err->msg; *s;) {
        size_t left = strnlen(s, 4), n = 1;
        while (n <= left && !json_is_utf8(s, n))
            n++;
        if (n > left)
            *s = '?';
        s += n > left ? 1 : n;
    }
}

static lm_status read_prompt(yyjson_doc *doc, enum encoding enc, const char *model_name,
                             const struct json_source *source, struct prompt **out,
                             struct lm_err *err)
{
    lm_status st = json_prompt_read(yyjson_doc_get_root(doc), enc, model_name, source, out, err);
    yyjson_doc_free(doc);
    return st;
}

static lm_status decode_json(const char *text, size_t len, const char *model_name,
                             const struct json_source *source, struct prompt **out,
                             struct lm_err *err)
{
    struct json_scratch scratch;
    yyjson_doc *doc = NULL;
    json_scratch_init(&scratch);
    lm_status st = json_doc_read(text, len, &scratch, &doc, err);
    if (!st)
        st = read_prompt(doc, ENCODING_JSON, model_name, source, out, err);
    if (st)
        make_utf8(err);
    return st;
}

/* Reads a schema id or GUID at `at`; *used is the bytes it takes. */
static lm_status parse_key(const unsigned char *at, size_t len, const char *where,
                           struct schema_key *key, size_t *used, struct lm_err *err)
{
    if (len >= ID_BYTES && at[0] == MAGIC_ID) {
        uint32_t id = (uint32_t)at[1] << 24 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 8 | at[4];
        if (id > INT32_MAX)
            return lm_err_set(err, LM_FORMAT, "Avro: %s has schema id %u, which is none", where,
                              (unsigned)id);
        *key = (struct schema_key){ .id = (int32_t)id };
        *used = ID_BYTES;
        return LM_OK;
    }
    if (len >= GUID_BYTES && at[0] == MAGIC_GUID) {
        *key = (struct schema_key){ .is_guid = true };
        memcpy(key->guid, at + 1, sizeof key->guid);
        *used = GUID_BYTES;
        return LM_OK;
    }
    if (len > 0 && at[0] <= MAGIC_GUID)
        return lm_err_set(err, LM_FORMAT, "Avro: %s ends within the schema id", where);
    return lm_err_set(err, LM_FORMAT, "Avro: %s starts with 0x%02x instead of a schema id (0x00 "
                      "and 4 bytes, or 0x01 and 16)", where, len > 0 ? at[0] : 0);
}

/* Which schema has written it, and where the datum begins. */
static lm_status find_key(const unsigned char *value, size_t len, const struct header *id,
                          struct schema_key *key, size_t *used, struct lm_err *err)
{
    *used = 0;
    lm_status st = id ? parse_key(id->value, id->len, "header " SCHEMA_ID_HEADER, key, used, err)
                      : parse_key(value, len, "the value", key, used, err);
    if (!st && id && *used != id->len)
        st = lm_err_set(err, LM_FORMAT, "Avro: header " SCHEMA_ID_HEADER " has %zu bytes instead "
                        "of %zu", id->len, *used);
    if (id)
        *used = 0;
    return st;
}

/* With an asker: what is in the cache, or has come. */
static lm_status find_schema(codec *c, const struct schema_key *key, struct avro_plan **plan,
                             struct lm_err *err)
{
    char *text;
    struct lm_err why;
    lm_status st = schema_cache_find(c->cache, key, plan, err);
    if (st != LM_BUSY)
        return st;
    if (!schema_asker_take(c->asker, key, &text, &why))
        return lm_err_set(err, LM_NET, "the schema is to be asked for again");
    st = schema_cache_learn(c->cache, key, text, &why, plan, err);
    free(text);
    return st;
}

/* The plan of its schema, and where the datum begins. */
static lm_status find_plan(codec *c, const unsigned char *value, size_t len,
                           const struct header *id, struct avro_plan **plan, size_t *used,
                           struct lm_err *err)
{
    struct schema_key key;
    if (!c->cache)
        return lm_err_set(err, LM_UNSUPPORTED, "the message is Avro, but the configuration "
                          "has no registry.url");
    lm_status st = find_key(value, len, id, &key, used, err);
    if (st)
        return st;
    return c->asker ? find_schema(c, &key, plan, err) : schema_cache_get(c->cache, &key, plan, err);
}

lm_status codec_await_schema(codec *c, const void *value, size_t len, const struct header *h,
                             int n_headers, void *user, struct lm_err *err)
{
    struct schema_key key;
    struct avro_plan *plan;
    size_t used;
    if (!c->asker || !value || len > c->max_message ||
        codec_detect(value, len, h, n_headers) != ENCODING_AVRO ||
        find_key(value, len, find_header(h, n_headers, SCHEMA_ID_HEADER), &key, &used, NULL) ||
        schema_cache_find(c->cache, &key, &plan, NULL) != LM_BUSY)
        return LM_OK;           /* decoding says what is wrong, if anything is */
    return schema_asker_want(c->asker, &key, user, err);
}

void codec_ask_no_more(codec *c)
{
    if (c && c->asker)
        schema_asker_stop(c->asker);
}

static lm_status decode_avro(codec *c, const struct json_source *source, const struct header *id,
                             struct prompt **out, struct lm_err *err)
{
    const unsigned char *value = (const unsigned char *)source->at;
    const size_t len = source->len;
    struct json_scratch scratch;
    struct avro_plan *plan = NULL;
    yyjson_doc *doc = NULL;
    size_t used;
    json_scratch_init(&scratch);
    lm_status st = find_plan(c, value, len, id, &plan, &used, err);
    if (!st)
        st = avro_decode_doc(plan, value + used, len - used, &scratch, &doc, err);
    if (!st)
        st = read_prompt(doc, ENCODING_AVRO, c->model_name, source, out, err);
    if (st)
        make_utf8(err);
    return st;
}

lm_status json_decode_prompt(const char *text, size_t len, struct prompt **out,
                             struct lm_err *err)
{
    if (len > CODEC_MAX_MESSAGE)
        return lm_err_set(err, LM_TOO_LARGE, "the message has %zu bytes, more than %zu", len,
                          CODEC_MAX_MESSAGE);
    return decode_json(text, len, NULL, NULL, out, err);
}

lm_status codec_decode_prompt(codec *c, const void *value, size_t len, const struct header *h,
                              int n_headers, struct arena *arena, struct prompt **out,
                              struct lm_err *err)
{
    const struct json_source source = { value, len, arena };
    if (!value)
        return lm_err_set(err, LM_FORMAT, "the record has no value (it is a tombstone)");
    if (len == 0)
        return lm_err_set(err, LM_FORMAT, "the record's value is empty");
    if (len > c->max_message)
        return lm_err_set(err, LM_TOO_LARGE, "the message has %zu bytes, more than %zu", len,
                          c->max_message);
    if (codec_detect(value, len, h, n_headers) == ENCODING_AVRO)
        return decode_avro(c, &source, find_header(h, n_headers, SCHEMA_ID_HEADER), out, err);
    return decode_json(value, len, c->model_name, &source, out, err);
}

lm_status codec_decode_tree(codec *c, const void *value, size_t len, const struct header *h,
                            int n_headers, struct json_t **out, struct lm_err *err)
{
    json_error_t je;
    *out = NULL;
    if (!value || len == 0)
        return lm_err_set(err, LM_FORMAT, "no value");
    if (len > c->max_message)
        return lm_err_set(err, LM_TOO_LARGE, "%zu bytes, more than %zu", len, c->max_message);
    if (codec_detect(value, len, h, n_headers) == ENCODING_AVRO) {
        struct avro_plan *plan = NULL;
        size_t used;
        lm_status st = find_plan(c, value, len, find_header(h, n_headers, SCHEMA_ID_HEADER), &plan,
                                 &used, err);
        return st ? st : avro_decode(plan, (const char *)value + used, len - used, out, err);
    }
    *out = json_loadb(value, len, JSON_ALLOW_NUL, &je);
    return *out ? LM_OK : lm_err_set(err, LM_FORMAT, "not JSON: %s", je.text);
}

/* ---- encoding ------------------------------------------------------------------------------ */

/* Under the lock. */
static lm_status ask_reply_id(codec *c, int32_t *id, struct lm_err *err)
{
    if ((*id = atomic_load(&c->reply_id)))
        return LM_OK;
    lm_status st = registry_id_of(c->replies, c->subject, schema_completion_text,
                                  c->auto_register, id, err);
    if (!st)
        atomic_store(&c->reply_id, *id);        /* whoever waits for the lock need not ask */
    return st;
}

static lm_status prepare(codec *c, int wait_ms, struct lm_err *err)
{
    int32_t id = 0;
    lm_status st;
    if (!c->reply_plan)
        return lm_err_set(err, LM_UNSUPPORTED, "a reply in Avro needs registry.url");
    if (c->asker) {
        st = schema_asker_reply_id(c->asker, wait_ms, &id, err);
    } else {
        pthread_mutex_lock(&c->replies_lock);
        st = ask_reply_id(c, &id, err);
        pthread_mutex_unlock(&c->replies_lock);
    }
    if (!st)
        atomic_store(&c->reply_id, id);
    if (st == LM_NOT_FOUND)
        return lm_err_set(err, st, "subject %.200s lacks the reply schema: register "
                          "schemas/completion.avsc, or set registry.auto_register=true",
                          c->subject);
    return st;
}

lm_status codec_prepare_replies(codec *c, struct lm_err *err)
{
    return prepare(c, START_WAIT_MS, err);
}

/* The id is asked for once. */
static lm_status reply_id(codec *c, uint32_t *id, struct lm_err *err)
{
    lm_status st = atomic_load(&c->reply_id) ? LM_OK : prepare(c, REPLY_WAIT_MS, err);
    *id = (uint32_t)atomic_load(&c->reply_id);
    return st;
}

static void write_id(unsigned char *at, uint32_t id)
{
    at[0] = MAGIC_ID;
    for (int i = 0; i < 4; i++)
        at[1 + i] = (unsigned char)(id >> (24 - 8 * i));
}

lm_status codec_encode_completion(codec *c, const struct completion *done, enum encoding enc,
                                  void **out, size_t *len, struct lm_err *err)
{
    struct message_out o;
    uint32_t id = 0;
    lm_status st = enc == ENCODING_AVRO ? reply_id(c, &id, err) : LM_OK;
    if (st)
        return st;
    if (enc == ENCODING_AVRO)
        out_avro(&o, c->reply_plan, ID_BYTES);
    else
        out_json(&o);
    completion_write(&o, done);
    st = out_take(&o, out, len, err);
    if (st)
        return lm_err_prefix(err, "the reply to %s", done->prompt->id);
    if (enc == ENCODING_AVRO)
        write_id(*out, id);
    return LM_OK;
}
