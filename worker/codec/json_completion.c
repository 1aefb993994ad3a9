/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_completion.c - a completion, written in either encoding; see json_completion.h.
 *
 * Members come in the order of schemas/completion.avsc, which message_out.h asks for. Keys of ours
 * need no escapes.
 */
#include "worker/codec/json_completion.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/codec/json_tree.h"

/* A log-probability of minus infinity has no JSON; vLLM sends this number, so clients know it. */
#define LOGPROB_FLOOR (-9999.0)

/* So that the length of a key is known where it is written. */
#define ALWAYS_INLINE static inline __attribute__((always_inline))

static void put_text(struct message_out *o, const char *s)
{
    out_text(o, s, strlen(s));
}

static void put_text_or_null(struct message_out *o, const char *s)
{
    if (s)
        put_text(o, s);
    else
        out_null(o);
}

/* ---- token pieces -------------------------------------------------------------------------- */

/* As it is written: the piece itself, or an escaped one in *memory, to be freed. NULL: no room. */
static const char *piece_text(const char *piece, size_t *len, char **memory)
{
    static const char lead[] = "bytes:";
    *memory = NULL;
    if (json_is_utf8(piece, *len))
        return piece;
    char *buf = lm_malloc(sizeof lead + *len * 4);
    if (!buf)
        return NULL;
    memcpy(buf, lead, sizeof lead);
    char *at = buf + sizeof lead - 1;
    for (size_t i = 0; i < *len; i++)
        at += snprintf(at, 5, "\\x%02x", (unsigned char)piece[i]);
    *len = (size_t)(at - buf);
    return *memory = buf;
}

void completion_piece(struct message_out *o, const char *piece, size_t len)
{
    char *memory;
    const char *text = piece_text(piece, &len, &memory);
    if (text)
        out_text(o, text, len);
    else
        o->bytes.failed = true;
    free(memory);
}

static void put_logprob(struct message_out *o, float lp)
{
    if (isnan(lp))
        out_null(o);
    else
        out_real(o, isinf(lp) ? LOGPROB_FLOOR : (double)lp);
}

struct top { const char *key; char *memory; float logprob; };

/* Adds a piece unless it is there. A NUL byte in a piece ends its key: readers have C strings. */
static bool add_top(struct top *all, int *n, const char *piece, size_t len, float logprob)
{
    struct top *t = &all[*n];
    t->key = piece_text(piece, &len, &t->memory);
    t->logprob = logprob;
    for (int i = 0; t->key && i < *n; i++)
        if (!strcmp(all[i].key, t->key)) {
            free(t->memory);
            return true;
        }
    *n += t->key ? 1 : 0;
    return t->key;
}

/* {piece: logprob}. Pieces of different ids can be equal; the likelier one, which comes first,
 * stays. The taken token is always there, as in OpenAI's replies. */
static void put_top(struct message_out *o, const struct engine_token *t)
{
    struct top all[ENGINE_MAX_LOGPROBS + 1];
    int n = 0;
    bool good = true;
    if (isnan(t->logprob)) {
        out_null(o);
        return;
    }
    for (int i = 0; good && i < LM_MIN(t->n_top, ENGINE_MAX_LOGPROBS); i++)
        good = add_top(all, &n, t->top[i].text, strlen(t->top[i].text), t->top[i].logprob);
    if (!good || !add_top(all, &n, t->text, t->text_len, t->logprob))
        o->bytes.failed = true;
    out_open(o, OUT_MAP, (size_t)n);
    for (int i = 0; i < n; i++) {
        out_entry(o, all[i].key, strlen(all[i].key));
        put_logprob(o, all[i].logprob);
        free(all[i].memory);
    }
    out_close(o);
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

ALWAYS_INLINE void open_list(struct message_out *o, const char *key, int n)
{
    out_key(o, key);
    out_open(o, OUT_ARRAY, (size_t)n);
}

void completion_logprobs(struct message_out *o, const struct engine_choice *choice)
{
    const struct engine_token *t = choice->logprobs;
    int n = choice->n_logprobs;
    struct counter at = { choice->text, choice->text_len, 0, 0 };
    if (!t) {
        out_null(o);
        return;
    }
    out_open(o, OUT_RECORD, 0);
    open_list(o, "tokens", n);
    for (int i = 0; i < n; i++)
        completion_piece(o, t[i].text, t[i].text_len);
    out_close(o);
    open_list(o, "token_logprobs", n);
    for (int i = 0; i < n; i++)
        put_logprob(o, t[i].logprob);
    out_close(o);
    open_list(o, "top_logprobs", n);
    for (int i = 0; i < n; i++)
        put_top(o, &t[i]);
    out_close(o);
    open_list(o, "text_offset", n);
    for (int i = 0; i < n; i++)
        out_int(o, (int64_t)count_chars(&at, t[i].text_offset));
    out_close(o);
    out_close(o);
}

/* ---- the reply ------------------------------------------------------------------------------ */

ALWAYS_INLINE void put_member(struct message_out *o, const char *key, const char *text)
{
    out_key(o, key);
    put_text(o, text);
}

ALWAYS_INLINE void put_count(struct message_out *o, const char *key, int64_t n)
{
    out_key(o, key);
    out_int(o, n);
}

ALWAYS_INLINE void put_ms(struct message_out *o, const char *key, int64_t us)
{
    out_key(o, key);
    out_thousandths(o, us);
}

/* Choices of a part have no reason to end yet; those of a claim have their text elsewhere. */
static void put_choices(struct message_out *o, const struct completion *done)
{
    const struct engine_result *result = done->result;
    bool part = done->stream && !done->stream->final;
    open_list(o, "choices", result->n_choices);
    for (int i = 0; i < result->n_choices; i++) {
        const struct engine_choice *c = &result->choices[i];
        out_open(o, OUT_RECORD, 0);
        put_count(o, "index", c->index);
        out_key(o, "text");
        out_text(o, done->claim ? "" : c->text, done->claim ? 0 : c->text_len);
        put_member(o, "finish_reason", part ? COMPLETION_PART : engine_reason_name(c->reason));
        out_key(o, "logprobs");
        if (done->claim)
            out_null(o);
        else
            completion_logprobs(o, c);
        out_close(o);
    }
    out_close(o);
}

static void put_usage(struct message_out *o, const struct engine_result *r)
{
    out_key(o, "usage");
    out_open(o, OUT_RECORD, 0);
    put_count(o, "prompt_tokens", r->prompt_tokens);
    put_count(o, "cached_tokens", r->cached_tokens);
    put_count(o, "completion_tokens", r->completion_tokens);
    out_close(o);
}

/* Stages follow one another from receipt to result; fetch_ms is part of intake_ms, adapter_ms of
 * queue_ms. A stage that was never reached has 0 in the engine's result. */
static void put_timings(struct message_out *o, const struct completion *done)
{
    const struct engine_result *r = done->result;
    int64_t prefill = r->first_token_us - r->queued_us;
    int64_t decode = r->first_token_us > 0 ? r->finished_us - r->first_token_us : 0;
    out_key(o, "timings");
    out_open(o, OUT_RECORD, 0);
    put_ms(o, "intake_ms", done->received_to_submit_us);
    put_ms(o, "fetch_ms", done->fetch_us);
    put_ms(o, "queue_ms", r->queued_us);
    put_ms(o, "adapter_ms", r->adapter_us);
    put_ms(o, "prefill_ms", LM_MAX(prefill, 0));
    put_ms(o, "decode_ms", LM_MAX(decode, 0));
    put_ms(o, "total_ms", done->received_to_submit_us + r->finished_us);
    out_close(o);
}

static void put_metadata(struct message_out *o, const struct prompt *p)
{
    out_key(o, "metadata");
    out_open(o, OUT_MAP, (size_t)p->n_metadata);
    for (int i = 0; i < p->n_metadata; i++) {
        out_entry(o, p->metadata[i].key, strlen(p->metadata[i].key));
        put_text(o, p->metadata[i].value);
    }
    out_close(o);
}

static void put_stream(struct message_out *o, const struct completion_stream *s)
{
    out_key(o, "stream");
    out_open(o, OUT_RECORD, 0);
    put_member(o, "generation", s->generation);
    put_count(o, "seq", s->seq);
    out_key(o, "final");
    out_bool(o, s->final);
    out_close(o);
}

static void put_claim(struct message_out *o, const struct completion_claim *c)
{
    out_key(o, "claim");
    out_open(o, OUT_RECORD, 0);
    put_member(o, "url", c->url);
    put_count(o, "bytes", c->bytes);
    put_member(o, "sha256", c->sha256);
    put_member(o, "content_type", c->content_type);
    out_close(o);
}

static void put_error(struct message_out *o, const struct lm_err *e)
{
    out_key(o, "error");
    out_open(o, OUT_RECORD, 0);
    put_member(o, "code", lm_status_wire(e->code));
    put_member(o, "message", e->msg);
    out_close(o);
}

/* What only some replies have; the rest don't even have the key. */
static void put_extras(struct message_out *o, const struct completion *done)
{
    if (done->stream)
        put_stream(o, done->stream);
    if (done->claim)
        put_claim(o, done->claim);
    if (done->error)
        put_error(o, done->error);
}

void completion_write(struct message_out *o, const struct completion *done)
{
    const struct prompt *p = done->prompt;
    out_open(o, OUT_RECORD, 0);
    put_member(o, "id", p->id);
    out_key(o, "adapter");
    put_text_or_null(o, p->adapter);
    out_key(o, "adapter_digest");
    put_text_or_null(o, done->adapter_digest);
    put_member(o, "model", done->model ? done->model : "");
    put_choices(o, done);
    put_usage(o, done->result);
    put_timings(o, done);
    put_member(o, "worker", done->worker ? done->worker : "");
    put_metadata(o, p);
    put_extras(o, done);
    out_close(o);
}
