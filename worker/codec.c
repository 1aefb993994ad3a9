/* SPDX-License-Identifier: Apache-2.0 */
/*
 * codec.c - picks the encoding of a record, and the one road from bytes to prompt and from
 * completion to bytes. See codec.h for the contract.
 *
 * Both encodings meet in a JSON tree: Avro is decoded into one by field name, and written from one,
 * so that all rules live once, in json_prompt.c and json_completion.c.
 */
#include "worker/codec.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "worker/json_completion.h"
#include "worker/json_prompt.h"

#define DEFAULT_MAX_MESSAGE ((size_t)16 << 20)

struct codec {
    char *model_name;
    size_t max_message;
};

/* ---- life ---------------------------------------------------------------------------------- */

lm_status codec_new(const struct codec_config *cfg, codec **out, struct lm_err *err)
{
    codec *c = lm_calloc(1, sizeof *c);
    if (!c)
        return lm_err_set(err, LM_NOMEM, "out of memory");
    c->max_message = cfg->max_message_bytes ? cfg->max_message_bytes : DEFAULT_MAX_MESSAGE;
    if (cfg->model_name && !(c->model_name = lm_strdup(cfg->model_name))) {
        codec_free(c);
        return lm_err_set(err, LM_NOMEM, "out of memory");
    }
    *out = c;
    return LM_OK;
}

void codec_free(codec *c)
{
    if (!c)
        return;
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
    if (find_header(h, n_headers, "__value_schema_id"))
        return ENCODING_AVRO;
    const unsigned char *first = value;
    return len > 0 && first && *first <= 1 ? ENCODING_AVRO : ENCODING_JSON;
}

/* ---- decoding ------------------------------------------------------------------------------ */

static bool is_utf8(const char *s, size_t n)
{
    json_t *ok = json_stringn(s, n);
    json_decref(ok);
    return ok;
}

/* Messages quote hostile bytes, cut at some length, and end in UTF-8 headers: each byte that is
 * part of no character becomes '?'. */
static void make_utf8(struct lm_err *err)
{
    if (!err || is_utf8(err->msg, strlen(err->msg)))
        return;
    for (char *s = err->msg; *s;) {
        size_t left = strnlen(s, 4), n = 1;
        while (n <= left && !is_utf8(s, n))
            n++;
        if (n > left)
            *s = '?';
        s += n > left ? 1 : n;
    }
}

static lm_status decode_json(const char *text, size_t len, const char *model_name,
                             struct prompt **out, struct lm_err *err)
{
    json_t *root = NULL;
    lm_status st = json_parse_object(text, len, &root, err);
    if (!st)
        st = json_prompt_read(root, ENCODING_JSON, model_name, out, err);
    json_decref(root);
    if (st)
        make_utf8(err);
    return st;
}

lm_status json_decode_prompt(const char *text, size_t len, struct prompt **out,
                             struct lm_err *err)
{
    if (len > DEFAULT_MAX_MESSAGE)
        return lm_err_set(err, LM_TOO_LARGE, "the message has %zu bytes, more than %zu", len,
                          DEFAULT_MAX_MESSAGE);
    return decode_json(text, len, NULL, out, err);
}

lm_status codec_decode_prompt(codec *c, const void *value, size_t len, const struct header *h,
                              int n_headers, struct prompt **out, struct lm_err *err)
{
    if (!value || len == 0)
        return lm_err_set(err, LM_FORMAT, "the record has no value (a tombstone?)");
    if (len > c->max_message)
        return lm_err_set(err, LM_TOO_LARGE, "the message has %zu bytes, more than %zu", len,
                          c->max_message);
    if (codec_detect(value, len, h, n_headers) == ENCODING_AVRO)
        return lm_err_set(err, LM_UNSUPPORTED, "Avro needs registry.url");
    return decode_json(value, len, c->model_name, out, err);
}

/* ---- encoding ------------------------------------------------------------------------------ */

lm_status codec_encode_completion(codec *c, const struct completion *done, enum encoding enc,
                                  void **out, size_t *len, struct lm_err *err)
{
    (void)c;
    if (enc == ENCODING_AVRO)
        return lm_err_set(err, LM_UNSUPPORTED, "Avro needs registry.url");
    json_t *root = completion_json(done);
    char *text = root ? completion_dump(root) : NULL;
    json_decref(root);
    if (!text)
        return lm_err_set(err, LM_NOMEM, "out of memory writing the reply to %s", done->prompt->id);
    *out = text;
    *len = strlen(text);
    return LM_OK;
}
