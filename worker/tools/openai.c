/* SPDX-License-Identifier: Apache-2.0 */
/*
 * openai.c - see openai.h.
 *
 * A request body mixes what to answer (model, prompt, messages), how (sampling parameters, read by
 * the same function as a Kafka prompt's `params`, so both roads have one set of rules) and fields
 * that only matter to an HTTP service. Those are taken out first: harmless ones are dropped, ones
 * that would change the answer are refused unless they hold their neutral value.
 */
#include "worker/tools/openai.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/codec/json_completion.h"
#include "worker/codec/json_prompt.h"
#include "worker/codec/json_tree.h"

enum { MAX_CUSTOM_ID = 512, MAX_MODEL = 512 };

/* ---- reading --------------------------------------------------------------------------- */

/* Lines are trees of jansson's, since their bodies are taken apart; what reads prompts wants the
 * other kind. It lives as long as the request. NULL for NULL. */
static void *in_arena(void *ctx, size_t size)
{
    return arena_alloc(ctx, size);
}

static void *more_in_arena(void *ctx, void *p, size_t old, size_t size)
{
    void *to = arena_alloc(ctx, size);
    if (to)
        memcpy(to, p, LM_MIN(old, size));
    return to;
}

static void stays_in_arena(void *ctx, void *p)
{
    (void)ctx;
    (void)p;
}

static yyjson_val *value_of(const struct json_reader *r, const json_t *j)
{
    const yyjson_alc alc = { in_arena, more_in_arena, stays_in_arena, r->arena };
    yyjson_mut_doc *d = j ? yyjson_mut_doc_new(&alc) : NULL;
    yyjson_mut_val *v = d ? json_to_value(d, j) : NULL;
    return yyjson_doc_get_root(v ? yyjson_mut_val_imut_copy(v, &alc) : NULL);
}

static yyjson_val *member_of(const struct json_reader *r, const json_t *o, const char *key)
{
    return value_of(r, json_object_get(o, key));
}

static lm_status read_line_fields(const struct json_reader *r, const json_t *root,
                                  struct openai_request *q)
{
    static const char *const known[] = { "custom_id", "method", "url", "body", NULL };
    const char *key, *method = NULL, *url = NULL;
    json_t *v;
    lm_status st = json_read_string(r, "custom_id", member_of(r, root, "custom_id"), 1,
                                    MAX_CUSTOM_ID, &q->custom_id);
    json_object_foreach((json_t *)root, key, v)
        if (!st && !json_key_in(known, key))
            st = json_unknown(r, key, known);
    if (!st)
        st = json_read_string(r, "method", member_of(r, root, "method"), 1, 16, &method);
    if (!st && strcmp(method, "POST"))
        return json_wrong_value(r, "method", "POST", member_of(r, root, "method"));
    if (!st)
        st = json_read_string(r, "url", member_of(r, root, "url"), 1, 256, &url);
    if (st)
        return st;
    if (!strcmp(url, "/v1/completions"))
        q->kind = OPENAI_COMPLETION;
    else if (!strcmp(url, "/v1/chat/completions"))
        q->kind = OPENAI_CHAT;
    else
        return json_wrong_value(r, "url", "/v1/completions or /v1/chat/completions",
                                member_of(r, root, "url"));
    if (!json_is_object(json_object_get(root, "body")))
        return json_wrong(r, "body", "an object", member_of(r, root, "body"));
    return LM_OK;
}

static lm_status read_model(const struct json_reader *r, const json_t *body,
                            const char *base_model, struct openai_request *q)
{
    lm_status st = json_read_string(r, "model", member_of(r, body, "model"), 1, MAX_MODEL,
                                    &q->model);
    if (st || !strcmp(q->model, base_model))
        return st;
    q->adapter = q->model;
    struct lm_err why = { 0 };
    if (engine_adapter_id_check(q->adapter, strlen(q->adapter), &why) != LM_OK)
        return json_refuse(r, why.code, "model", "is neither the base model '%s' nor an adapter's "
                           "id: %s", base_model, why.msg);
    return LM_OK;
}

/* Its length counts: "text" with U+0000 and more behind it is another type. */
static bool is_text_type(const json_t *of)
{
    const json_t *type = json_object_get(of, "type");
    return json_string_length(type) == 4 && !memcmp(json_string_value(type), "text", 4);
}

/* Content given as parts becomes a string; parts other than text are refused. */
static lm_status flatten_content(const struct json_reader *r, json_t *message)
{
    json_t *parts = json_object_get(message, "content"), *part;
    if (!json_is_array(parts))
        return LM_OK;
    size_t i, total = 0;
    json_array_foreach(parts, i, part) {
        if (!is_text_type(part) || !json_is_string(json_object_get(part, "text")))
            return json_refuse(r, LM_UNSUPPORTED, "messages[].content", "has a part that is not "
                               "{\"type\": \"text\", \"text\": ...}; only text is served");
        total += json_string_length(json_object_get(part, "text"));
    }
    char *text = arena_alloc(r->arena, total + 1), *at = text;
    if (!text)
        return lm_err_set(r->err, LM_NOMEM, "no memory for a message of %zu bytes", total);
    json_array_foreach(parts, i, part) {
        const json_t *t = json_object_get(part, "text");
        memcpy(at, json_string_value(t), json_string_length(t));
        at += json_string_length(t);
    }
    if (json_object_set_new(message, "content", json_stringn(text, total)))
        return lm_err_set(r->err, LM_NOMEM, "no memory for a message of %zu bytes", total);
    return LM_OK;
}

static lm_status read_input(const struct json_reader *r, const json_t *body,
                            struct openai_request *q)
{
    if (q->kind == OPENAI_CHAT) {
        json_t *messages = json_object_get(body, "messages"), *m;
        size_t i;
        lm_status st = LM_OK;
        json_array_foreach(messages, i, m)
            if (!st && json_is_object(m))
                st = flatten_content(r, m);
        return st ? st : json_messages_read(r, "messages", value_of(r, messages), &q->messages,
                                            &q->n_messages);
    }
    const json_t *p = json_object_get(body, "prompt");
    if (json_is_string(p))
        return json_text_read(r, "prompt", value_of(r, p), &q->prompt, &q->prompt_len);
    if (json_is_array(p) && !json_is_integer(json_array_get(p, 0)))
        return json_refuse(r, LM_UNSUPPORTED, "prompt", "must be one string or one array of token "
                           "ids; give each prompt a line of its own");
    return json_read_token_ids(r, "prompt", value_of(r, p), 1, PROMPT_MAX_TOKENS, &q->token_ids,
                               &q->n_token_ids);
}

/* Is this the value that a field has when it asks for nothing? */
static bool is_neutral(const char *key, const json_t *v, const json_t *body)
{
    if (json_is_null(v) || (json_is_array(v) && json_array_size(v) == 0) ||
        (json_is_object(v) && json_object_size(v) == 0))
        return true;
    if (!strcmp(key, "stream"))
        return json_is_false(v);
    if (!strcmp(key, "suffix"))
        return json_is_string(v) && json_string_length(v) == 0;
    if (!strcmp(key, "best_of")) {
        const json_t *n = json_object_get(body, "n");
        return json_is_integer(v) && json_integer_value(v) == (n ? json_integer_value(n) : 1);
    }
    return !strcmp(key, "response_format") && is_text_type(v);
}

/* Removes from a copy of the body what is not a sampling parameter. */
static lm_status strip_body(const struct json_reader *r, json_t *body, enum openai_kind kind)
{
    static const char *const dropped[] = { "user", "metadata", "store", "service_tier",
                                           "prompt_cache_key", "safety_identifier", NULL };
    static const char *const neutral[] = { "stream", "stream_options", "suffix", "best_of",
                                           "response_format", "logit_bias", "tools", "tool_choice",
                                           "functions", "function_call", NULL };
    json_object_del(body, "model");
    json_object_del(body, kind == OPENAI_CHAT ? "messages" : "prompt");
    for (int i = 0; dropped[i]; i++)
        json_object_del(body, dropped[i]);
    for (int i = 0; neutral[i]; i++) {
        const json_t *v = json_object_get(body, neutral[i]);
        if (!v)
            continue;
        if (!is_neutral(neutral[i], v, body))
            return json_refuse(r, LM_UNSUPPORTED, neutral[i], "is not served; leave it out");
        json_object_del(body, neutral[i]);
    }
    return LM_OK;
}

static lm_status read_body(const json_t *root, const char *base_model, struct openai_request *q,
                           struct lm_err *err)
{
    const struct json_reader r = { "body.", q->arena, err, NULL };
    json_t *body = json_object_get(root, "body");
    lm_status st = read_model(&r, body, base_model, q);
    if (!st)
        st = read_input(&r, body, q);
    if (!st)
        st = strip_body(&r, body, q->kind);
    return st ? st : json_params_read(&r, value_of(&r, body), &q->params);
}

lm_status openai_parse(const char *line, size_t len, const char *base_model,
                       struct openai_request **out, struct lm_err *err)
{
    struct arena *arena = arena_new();
    struct openai_request *q = arena ? arena_alloc(arena, sizeof *q) : NULL;
    *out = q;
    if (!q) {
        arena_free(arena);
        return lm_err_set(err, LM_NOMEM, "no memory for a request");
    }
    q->arena = arena;
    json_t *root = NULL;
    lm_status st = json_parse_object(line, len, &root, err);
    if (!st) {
        const struct json_reader r = { "", arena, err, NULL };
        st = read_line_fields(&r, root, q);
    }
    if (!st)
        st = read_body(root, base_model, q, err);
    json_decref(root);
    return st;
}

void openai_request_free(struct openai_request *r)
{
    if (r)
        arena_free(r->arena);
}

/* ---- writing --------------------------------------------------------------------------- */

static json_t *bytes_json(const char *piece, size_t len)
{
    json_t *a = json_array();
    for (size_t i = 0; i < len; i++)
        json_array_append_new(a, json_integer((unsigned char)piece[i]));
    return a;
}

/* JSON has no NaN or infinity; a prompt's first token has no log-probability. */
static json_t *number_json(float lp)
{
    if (isnan(lp))
        return json_null();
    return json_real(isinf(lp) ? -9999.0 : (double)lp);
}

/* What the completions' functions write, as a tree of jansson's. */
static json_t *tree_of(struct message_out *o)
{
    struct lm_err ignored;
    void *text = NULL;
    size_t n = 0;
    json_t *j = out_take(o, &text, &n, &ignored) ? NULL :
                json_loadb(text, n, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
    free(text);
    return j;
}

static json_t *piece_json(const char *piece, size_t len)
{
    struct message_out o;
    out_json(&o);
    completion_piece(&o, piece, len);
    return tree_of(&o);
}

static json_t *logprobs_json(const struct engine_choice *c)
{
    struct message_out o;
    out_json(&o);
    completion_logprobs(&o, c);
    return tree_of(&o);
}

static json_t *chat_token_json(const char *piece, size_t len, float logprob)
{
    return json_pack("{s:o, s:o, s:o}", "token", piece_json(piece, len), "logprob",
                     number_json(logprob), "bytes", bytes_json(piece, len));
}

/* Chat's logprobs: {"content": [{"token", "logprob", "bytes", "top_logprobs": [...]}]}. */
static json_t *chat_logprobs_json(const struct engine_choice *c)
{
    if (!c->logprobs)
        return json_null();
    json_t *content = json_array();
    for (int i = 0; i < c->n_logprobs; i++) {
        const struct engine_token *t = &c->logprobs[i];
        json_t *top = json_array();
        for (int k = 0; k < t->n_top; k++)
            json_array_append_new(top, chat_token_json(t->top[k].text, strlen(t->top[k].text),
                                                       t->top[k].logprob));
        json_t *one = chat_token_json(t->text, t->text_len, t->logprob);
        json_object_set_new(one, "top_logprobs", top);
        json_array_append_new(content, one);
    }
    return json_pack("{s:o}", "content", content);
}

static json_t *choice_json(enum openai_kind kind, const struct engine_choice *c)
{
    json_t *text = json_stringn(c->text, c->text_len);
    if (kind == OPENAI_COMPLETION)
        return json_pack("{s:i, s:o, s:o, s:s}", "index", c->index, "text", text, "logprobs",
                         logprobs_json(c), "finish_reason",
                         engine_reason_name(c->reason));
    return json_pack("{s:i, s:{s:s, s:o}, s:o, s:s}", "index", c->index, "message", "role",
                     "assistant", "content", text, "logprobs", chat_logprobs_json(c),
                     "finish_reason", engine_reason_name(c->reason));
}

static json_t *body_json(const char *id, const struct openai_request *r,
                         const char *adapter_digest, const struct engine_result *res)
{
    json_t *choices = json_array();
    for (int i = 0; i < res->n_choices; i++)
        json_array_append_new(choices, choice_json(r->kind, &res->choices[i]));
    char name[64];
    bool chat = r->kind == OPENAI_CHAT;
    snprintf(name, sizeof name, "%s-%.48s", chat ? "chatcmpl" : "cmpl", id);
    return json_pack("{s:s, s:s, s:I, s:s, s:s?, s:o, s:{s:i, s:i, s:i, s:{s:i}}}", "id", name,
                     "object", chat ? "chat.completion" : "text_completion", "created",
                     (json_int_t)(lm_wall_ms() / 1000), "model", r->model, "adapter_digest",
                     adapter_digest, "choices", choices, "usage", "prompt_tokens",
                     res->prompt_tokens, "completion_tokens", res->completion_tokens,
                     "total_tokens", res->prompt_tokens + res->completion_tokens,
                     "prompt_tokens_details", "cached_tokens", res->cached_tokens);
}

json_t *openai_result_line(const char *id, const struct openai_request *r,
                           const char *adapter_digest, const struct engine_result *result)
{
    return json_pack("{s:s, s:s, s:{s:i, s:s, s:o}, s:n}", "id", id, "custom_id", r->custom_id,
                     "response", "status_code", 200, "request_id", id, "body",
                     body_json(id, r, adapter_digest, result), "error");
}

static int http_status(lm_status st)
{
    if (st == LM_NOT_FOUND)
        return 404;
    if (st == LM_DENIED)
        return 403;
    return lm_status_disposition(st) == LM_DO_REFUSE ? 400 : 500;
}

json_t *openai_error_line(const char *id, const char *custom_id, const struct lm_err *err)
{
    int status = http_status(err->code);
    const char *type = status == 500 ? "server_error" : "invalid_request_error";
    const char *code = lm_status_wire(err->code);
    return json_pack("{s:s, s:s?, s:{s:i, s:s, s:{s:{s:s, s:s, s:n, s:s}}}, s:{s:s, s:s}}", "id",
                     id, "custom_id", custom_id, "response", "status_code", status, "request_id",
                     id, "body", "error", "message", err->msg, "type", type, "param", "code", code,
                     "error", "code", code, "message", err->msg);
}
