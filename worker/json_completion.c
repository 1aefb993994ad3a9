/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_completion.c - a completion as a JSON tree; see json_completion.h.
 *
 * A NULL that is added to a tree is a failure: so errors are counted in one flag and looked at
 * once. Keys are ours, or came out of a JSON tree, so nobody need check them again.
 */
#include "worker/json_completion.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/json_tree.h"

/* A log-probability of minus infinity has no JSON; vLLM sends this number, so clients know it. */
#define LOGPROB_FLOOR (-9999.0)

/* False: a failure. The key is borrowed. */
static bool put(yyjson_mut_doc *d, yyjson_mut_val *o, const char *key, yyjson_mut_val *v)
{
    return yyjson_mut_obj_add(o, yyjson_mut_str(d, key), v);
}

/* ---- token pieces -------------------------------------------------------------------------- */

yyjson_mut_val *completion_piece(yyjson_mut_doc *d, const char *piece, size_t len)
{
    yyjson_mut_val *s = json_text_value(d, piece, len);
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
    s = yyjson_mut_strncpy(d, buf, (size_t)(at - buf));
    free(buf);
    return s;
}

static yyjson_mut_val *logprob_value(yyjson_mut_doc *d, float lp)
{
    if (isnan(lp))
        return yyjson_mut_null(d);
    return json_real_value_of(d, isinf(lp) ? LOGPROB_FLOOR : (double)lp);
}

/* {piece: logprob}. Pieces of different ids can be equal; the likelier one, which comes first,
 * stays. The taken token is always there, as in OpenAI's replies. */
static yyjson_mut_val *top_value(yyjson_mut_doc *d, const struct engine_token *t)
{
    if (isnan(t->logprob))
        return yyjson_mut_null(d);
    yyjson_mut_val *map = yyjson_mut_obj(d);
    bool good = map;
    for (int i = 0; i <= t->n_top && good; i++) {
        bool taken = i == t->n_top;
        const char *text = taken ? t->text : t->top[i].text;
        yyjson_mut_val *piece = completion_piece(d, text, taken ? t->text_len : strlen(text));
        /* A NUL byte in a piece ends its key: readers have C strings. */
        const char *key = piece ? yyjson_mut_get_str(piece) : "";
        good = piece;
        if (good && !yyjson_mut_obj_getn(map, key, strlen(key)))
            good = put(d, map, key, logprob_value(d, taken ? t->logprob : t->top[i].logprob));
    }
    return good ? map : NULL;
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

yyjson_mut_val *completion_logprobs(yyjson_mut_doc *d, const struct engine_choice *choice)
{
    if (!choice->logprobs)
        return yyjson_mut_null(d);
    yyjson_mut_val *tokens = yyjson_mut_arr(d), *values = yyjson_mut_arr(d);
    yyjson_mut_val *tops = yyjson_mut_arr(d), *offsets = yyjson_mut_arr(d);
    yyjson_mut_val *out = yyjson_mut_obj(d);
    struct counter at = { choice->text, choice->text_len, 0, 0 };
    bool good = true;
    for (int i = 0; i < choice->n_logprobs; i++) {
        const struct engine_token *t = &choice->logprobs[i];
        good &= yyjson_mut_arr_append(tokens, completion_piece(d, t->text, t->text_len));
        good &= yyjson_mut_arr_append(values, logprob_value(d, t->logprob));
        good &= yyjson_mut_arr_append(tops, top_value(d, t));
        good &= yyjson_mut_arr_append(offsets, yyjson_mut_sint(
            d, (int64_t)count_chars(&at, t->text_offset)));
    }
    good &= put(d, out, "tokens", tokens);
    good &= put(d, out, "token_logprobs", values);
    good &= put(d, out, "top_logprobs", tops);
    good &= put(d, out, "text_offset", offsets);
    return good ? out : NULL;
}

/* ---- the reply ------------------------------------------------------------------------------ */

static yyjson_mut_val *text_of(yyjson_mut_doc *d, const char *s)
{
    return json_text_value(d, s, strlen(s));
}

static yyjson_mut_val *text_or_null(yyjson_mut_doc *d, const char *s)
{
    return s ? text_of(d, s) : yyjson_mut_null(d);
}

static yyjson_mut_val *ms_value(yyjson_mut_doc *d, double ms)
{
    return json_real_value_of(d, isfinite(ms) ? round(ms * 1000) / 1000 : 0);
}

/* Choices of a part have no reason to end yet; those of a claim have their text elsewhere. */
static yyjson_mut_val *choices_value(yyjson_mut_doc *d, const struct completion *done)
{
    const struct engine_result *result = done->result;
    bool part = done->stream && !done->stream->final, good = true;
    yyjson_mut_val *list = yyjson_mut_arr(d);
    for (int i = 0; i < result->n_choices && good; i++) {
        const struct engine_choice *c = &result->choices[i];
        yyjson_mut_val *o = yyjson_mut_obj(d);
        good &= put(d, o, "index", yyjson_mut_sint(d, c->index));
        good &= put(d, o, "text", done->claim ? yyjson_mut_str(d, "") :
                    json_text_value(d, c->text, c->text_len));
        good &= put(d, o, "finish_reason", yyjson_mut_str(
            d, part ? COMPLETION_PART : engine_reason_name(c->reason)));
        good &= put(d, o, "logprobs", done->claim ? yyjson_mut_null(d) : completion_logprobs(d, c));
        good &= yyjson_mut_arr_append(list, o);
    }
    return good ? list : NULL;
}

static yyjson_mut_val *usage_value(yyjson_mut_doc *d, const struct engine_result *r)
{
    yyjson_mut_val *o = yyjson_mut_obj(d);
    bool good = put(d, o, "prompt_tokens", yyjson_mut_sint(d, r->prompt_tokens));
    good &= put(d, o, "cached_tokens", yyjson_mut_sint(d, r->cached_tokens));
    good &= put(d, o, "completion_tokens", yyjson_mut_sint(d, r->completion_tokens));
    return good ? o : NULL;
}

/* Stages follow one another from receipt to result; fetch_ms is part of intake_ms, adapter_ms of
 * queue_ms. A stage that was never reached has 0 in the engine's result. */
static yyjson_mut_val *timings_value(yyjson_mut_doc *d, const struct completion *done)
{
    const struct engine_result *r = done->result;
    int64_t prefill = r->first_token_us - r->queued_us;
    int64_t decode = r->first_token_us > 0 ? r->finished_us - r->first_token_us : 0;
    yyjson_mut_val *o = yyjson_mut_obj(d);
    bool good = put(d, o, "intake_ms", ms_value(d, done->received_to_submit_ms));
    good &= put(d, o, "fetch_ms", ms_value(d, done->fetch_ms));
    good &= put(d, o, "queue_ms", ms_value(d, (double)r->queued_us / 1e3));
    good &= put(d, o, "adapter_ms", ms_value(d, (double)r->adapter_us / 1e3));
    good &= put(d, o, "prefill_ms", ms_value(d, (double)LM_MAX(prefill, 0) / 1e3));
    good &= put(d, o, "decode_ms", ms_value(d, (double)LM_MAX(decode, 0) / 1e3));
    good &= put(d, o, "total_ms", ms_value(d, done->received_to_submit_ms +
                                           (double)r->finished_us / 1e3));
    return good ? o : NULL;
}

static yyjson_mut_val *metadata_value(yyjson_mut_doc *d, const struct prompt *p)
{
    yyjson_mut_val *o = yyjson_mut_obj(d);
    bool good = o;
    for (int i = 0; i < p->n_metadata; i++)
        good &= put(d, o, p->metadata[i].key, text_of(d, p->metadata[i].value));
    return good ? o : NULL;
}

static yyjson_mut_val *error_value(yyjson_mut_doc *d, const struct lm_err *e)
{
    yyjson_mut_val *o = yyjson_mut_obj(d);
    bool good = put(d, o, "code", yyjson_mut_str(d, lm_status_wire(e->code)));
    good &= put(d, o, "message", text_of(d, e->msg));
    return good ? o : NULL;
}

static yyjson_mut_val *stream_value(yyjson_mut_doc *d, const struct completion_stream *s)
{
    yyjson_mut_val *o = yyjson_mut_obj(d);
    bool good = put(d, o, "generation", text_of(d, s->generation));
    good &= put(d, o, "seq", yyjson_mut_sint(d, s->seq));
    good &= put(d, o, "final", yyjson_mut_bool(d, s->final));
    return good ? o : NULL;
}

static yyjson_mut_val *claim_value(yyjson_mut_doc *d, const struct completion_claim *c)
{
    yyjson_mut_val *o = yyjson_mut_obj(d);
    bool good = put(d, o, "url", text_of(d, c->url));
    good &= put(d, o, "bytes", yyjson_mut_sint(d, (int64_t)c->bytes));
    good &= put(d, o, "sha256", text_of(d, c->sha256));
    good &= put(d, o, "content_type", text_of(d, c->content_type));
    return good ? o : NULL;
}

/* What only some replies have; the rest don't even have the key. */
static bool add_extras(yyjson_mut_doc *d, yyjson_mut_val *o, const struct completion *done)
{
    bool good = true;
    if (done->error)
        good &= put(d, o, "error", error_value(d, done->error));
    if (done->stream)
        good &= put(d, o, "stream", stream_value(d, done->stream));
    if (done->claim)
        good &= put(d, o, "claim", claim_value(d, done->claim));
    return good;
}

yyjson_mut_val *completion_value(yyjson_mut_doc *d, const struct completion *done)
{
    const struct prompt *p = done->prompt;
    yyjson_mut_val *o = yyjson_mut_obj(d);
    bool good = put(d, o, "id", text_of(d, p->id));
    good &= put(d, o, "adapter", text_or_null(d, p->adapter));
    good &= put(d, o, "adapter_digest", text_or_null(d, done->adapter_digest));
    good &= put(d, o, "model", text_of(d, done->model ? done->model : ""));
    good &= put(d, o, "choices", choices_value(d, done));
    good &= put(d, o, "usage", usage_value(d, done->result));
    good &= put(d, o, "timings", timings_value(d, done));
    good &= put(d, o, "worker", text_of(d, done->worker ? done->worker : ""));
    good &= put(d, o, "metadata", metadata_value(d, p));
    good &= add_extras(d, o, done);
    return good ? o : NULL;
}
