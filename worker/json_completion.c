/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_completion.c - a completion as a JSON tree; see json_completion.h.
 *
 * Trees are built with the *_new() calls of jansson, which take the reference even when they fail,
 * and a NULL handed to them is a failure: so errors are counted in one flag and looked at once.
 * Keys are ours, or came out of a JSON tree, so nobody need check them again.
 */
#include "worker/json_completion.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/json_tree.h"

/* A log-probability of minus infinity has no JSON; vLLM sends this number, so clients know it. */
#define LOGPROB_FLOOR (-9999.0)

static int put(json_t *o, const char *key, json_t *v)
{
    return json_object_set_new_nocheck(o, key, v);
}

/* ---- token pieces -------------------------------------------------------------------------- */

json_t *completion_piece_json(const char *piece, size_t len)
{
    json_t *s = json_text(piece, len);
    if (s)
        return s;
    static const char lead[] = "bytes:";
    size_t size = sizeof lead + len * 4;
    char *buf = lm_malloc(size);
    if (!buf)
        return NULL;
    memcpy(buf, lead, sizeof lead);
    char *at = buf + sizeof lead - 1;
    for (size_t i = 0; i < len; i++)
        at += snprintf(at, 5, "\\x%02x", (unsigned char)piece[i]);
    s = json_stringn(buf, (size_t)(at - buf));
    free(buf);
    return s;
}

static json_t *logprob_json(float lp)
{
    if (isnan(lp))
        return json_null();
    return json_real(isinf(lp) ? LOGPROB_FLOOR : (double)lp);
}

/* {piece: logprob}. Pieces of different ids can be equal; the likelier one, which comes first,
 * stays. The taken token is always there, as in OpenAI's replies. */
static json_t *top_json(const struct engine_token *t)
{
    if (isnan(t->logprob))
        return json_null();
    json_t *map = json_object();
    int failed = !map;
    for (int i = 0; i <= t->n_top && !failed; i++) {
        bool taken = i == t->n_top;
        const char *text = taken ? t->text : t->top[i].text;
        json_t *piece = completion_piece_json(text, taken ? t->text_len : strlen(text));
        /* Keys are C strings to jansson: a NUL byte in a piece ends its key. */
        const char *key = piece ? json_string_value(piece) : "";
        failed = !piece;
        if (!failed && !json_object_get(map, key))
            failed = put(map, key, logprob_json(taken ? t->logprob : t->top[i].logprob));
        json_decref(piece);
    }
    if (failed) {
        json_decref(map);
        return NULL;
    }
    return map;
}

/* Code points in the first `end` bytes, counting on from the last call's place. */
struct counter { const char *text; size_t len, bytes, chars; };

static size_t count_chars(struct counter *c, size_t end)
{
    end = LM_MIN(end, c->len);
    if (end < c->bytes)
        c->bytes = c->chars = 0;
    for (; c->bytes < end; c->bytes++)
        c->chars += ((unsigned char)c->text[c->bytes] & 0xc0) != 0x80;
    return c->chars;
}

json_t *completion_logprobs_json(const struct engine_choice *choice)
{
    if (!choice->logprobs)
        return json_null();
    json_t *tokens = json_array(), *values = json_array(), *tops = json_array();
    json_t *offsets = json_array(), *out = json_object();
    struct counter at = { choice->text, choice->text_len, 0, 0 };
    int failed = 0;
    for (int i = 0; i < choice->n_logprobs; i++) {
        const struct engine_token *t = &choice->logprobs[i];
        failed |= json_array_append_new(tokens, completion_piece_json(t->text, t->text_len));
        failed |= json_array_append_new(values, logprob_json(t->logprob));
        failed |= json_array_append_new(tops, top_json(t));
        failed |= json_array_append_new(offsets,
                                        json_integer((json_int_t)count_chars(&at, t->text_offset)));
    }
    failed |= put(out, "tokens", tokens);
    failed |= put(out, "token_logprobs", values);
    failed |= put(out, "top_logprobs", tops);
    failed |= put(out, "text_offset", offsets);
    if (failed) {
        json_decref(out);
        return NULL;
    }
    return out;
}

/* ---- the reply ------------------------------------------------------------------------------ */

static json_t *string_or_null(const char *s)
{
    return s ? json_string(s) : json_null();
}

static json_t *ms_json(double ms)
{
    return json_real(isfinite(ms) ? round(ms * 1000) / 1000 : 0);
}

/* Choices of a part have no reason to end yet; those of a claim have their text elsewhere. */
static json_t *choices_json(const struct completion *done)
{
    const struct engine_result *result = done->result;
    bool part = done->stream && !done->stream->final;
    json_t *list = json_array();
    int failed = !list;
    for (int i = 0; i < result->n_choices && !failed; i++) {
        const struct engine_choice *c = &result->choices[i];
        json_t *o = json_object();
        failed |= put(o, "index", json_integer(c->index));
        failed |= put(o, "text", done->claim ? json_string("") :
              json_text(c->text, c->text_len));
        failed |= put(o, "finish_reason", json_string(
            part ? COMPLETION_PART : engine_reason_name(c->reason)));
        failed |= put(o, "logprobs", done->claim ? json_null() :
                                      completion_logprobs_json(c));
        failed |= json_array_append_new(list, o);
    }
    if (failed) {
        json_decref(list);
        return NULL;
    }
    return list;
}

static json_t *usage_json(const struct engine_result *r)
{
    return json_pack("{s:i, s:i, s:i}", "prompt_tokens", r->prompt_tokens, "cached_tokens",
                     r->cached_tokens, "completion_tokens", r->completion_tokens);
}

/* Stages follow one another from receipt to result; fetch_ms is part of intake_ms, adapter_ms of
 * queue_ms. A stage that was never reached has 0 in the engine's result. */
static json_t *timings_json(const struct completion *done)
{
    const struct engine_result *r = done->result;
    int64_t prefill = r->first_token_us - r->queued_us;
    int64_t decode = r->first_token_us > 0 ? r->finished_us - r->first_token_us : 0;
    json_t *o = json_object();
    int failed = 0;
    failed |= put(o, "intake_ms", ms_json(done->received_to_submit_ms));
    failed |= put(o, "fetch_ms", ms_json(done->fetch_ms));
    failed |= put(o, "queue_ms", ms_json((double)r->queued_us / 1e3));
    failed |= put(o, "adapter_ms", ms_json((double)r->adapter_us / 1e3));
    failed |= put(o, "prefill_ms", ms_json((double)LM_MAX(prefill, 0) / 1e3));
    failed |= put(o, "decode_ms", ms_json((double)LM_MAX(decode, 0) / 1e3));
    failed |= put(o, "total_ms", ms_json(done->received_to_submit_ms +
                                                         (double)r->finished_us / 1e3));
    if (failed) {
        json_decref(o);
        return NULL;
    }
    return o;
}

static json_t *metadata_json(const struct prompt *p)
{
    json_t *o = json_object();
    int failed = !o;
    for (int i = 0; i < p->n_metadata; i++)
        failed |= put(o, p->metadata[i].key, json_text(p->metadata[i].value,
                                                       strlen(p->metadata[i].value)));
    if (failed) {
        json_decref(o);
        return NULL;
    }
    return o;
}

/* What only some replies have; the rest don't even have the key. */
static int add_extras(json_t *o, const struct completion *done)
{
    int failed = 0;
    if (done->error)
        failed |= put(o, "error", json_pack(
            "{s:s, s:s}", "code", lm_status_wire(done->error->code), "message", done->error->msg));
    if (done->stream)
        failed |= put(o, "stream", json_pack(
            "{s:s, s:i, s:b}", "generation", done->stream->generation, "seq", done->stream->seq,
            "final", done->stream->final));
    if (done->claim)
        failed |= put(o, "claim", json_pack(
            "{s:s, s:I, s:s, s:s}", "url", done->claim->url, "bytes",
            (json_int_t)done->claim->bytes, "sha256", done->claim->sha256, "content_type",
            done->claim->content_type));
    return failed;
}

json_t *completion_json(const struct completion *done)
{
    const struct prompt *p = done->prompt;
    json_t *o = json_object();
    int failed = 0;
    failed |= put(o, "id", json_string(p->id));
    failed |= put(o, "adapter", string_or_null(p->adapter));
    failed |= put(o, "adapter_digest", string_or_null(done->adapter_digest));
    failed |= put(o, "model", json_string(done->model ? done->model : ""));
    failed |= put(o, "choices", choices_json(done));
    failed |= put(o, "usage", usage_json(done->result));
    failed |= put(o, "timings", timings_json(done));
    failed |= put(o, "worker", json_string(done->worker ? done->worker : ""));
    failed |= put(o, "metadata", metadata_json(p));
    failed |= add_extras(o, done);
    if (failed) {
        json_decref(o);
        return NULL;
    }
    return o;
}
