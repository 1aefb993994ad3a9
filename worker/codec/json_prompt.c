/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_prompt.c - a prompt from a JSON object; see json_prompt.h and docs/messages.md.
 *
 * The rule behind every check: what the producer wrote is either obeyed or refused with the key's
 * name. A misspelt `adapter` must never get an answer from the base model, so unknown keys are
 * errors, and so are known ones that we don't serve yet. Unknown keys are looked for first: a typo
 * in `id` should read "idd is not a known key", not "id is missing".
 *
 * The object comes from json_tree.h with U+0000 allowed in strings. Only `prompt` may have one (its
 * length travels with it); everywhere else the engine and Kafka clients take C strings.
 */
#include "worker/codec/json_prompt.h"

#include <stdio.h>
#include <string.h>

#include "worker/codec/shown.h"

enum {
    MAX_NAME = 256,             /* tenant, model */
    MAX_CORRELATION = 1024,
    MAX_TOPIC = 249,            /* Kafka's own limit */
    MAX_MESSAGES = 4096,
    MAX_CONTEXT = 1024,
    MAX_METADATA = 64,
    MAX_METADATA_VALUE = 8192,
};

#define ALL_KEYS(X) \
    X(ID, "id") X(ADAPTER, "adapter") X(PROMPT, "prompt") X(TOKEN_IDS, "prompt_token_ids") \
    X(MESSAGES, "messages") X(CONTEXT, "context") X(PARAMS, "params") X(PRIORITY, "priority") \
    X(DEADLINE, "deadline_ms") X(FIRST_TOKEN_BY, "first_token_by_ms") X(TENANT, "tenant") \
    X(REPLY_TOPIC, "reply_topic") X(CORRELATION_ID, "correlation_id") X(MODEL, "model") \
    X(STREAM, "stream") X(METADATA, "metadata")
#define KEY(key, text) key,
#define KEY_TEXT(key, text) text,
#define KEY_LENGTH(key, text) sizeof text - 1,

enum key { ALL_KEYS(KEY) KEYS };
static const char *const known[] = { ALL_KEYS(KEY_TEXT) NULL };
static const unsigned char known_length[KEYS] = { ALL_KEYS(KEY_LENGTH) };

/* A prompt's members by their keys, found in one pass. NULL: absent, or null. */
struct members { yyjson_val *of[KEYS]; };

static const char *const not_served[] = {
    "adapter_version", "adapter_digest", "response_format", "structured_outputs", "tools",
    "tool_choice", "functions", "function_call", "logit_bias", "prompt_url", "prompt_ref",
    "images", "audio", NULL
};

static lm_status no_memory(const struct json_reader *r)
{
    return lm_err_set(r->err, LM_NOMEM, "out of memory");
}

/* ---- parts shared with loramill batch ---------------------------------------------------- */

static bool lies_in(const struct json_source *source, const char *s)
{
    return source && s >= source->at && s < source->at + source->len;
}

lm_status json_text_read(const struct json_reader *r, const char *key, yyjson_val *v,
                         const char **out, size_t *len)
{
    if (!yyjson_is_str(v))
        return json_wrong(r, key, "a string", v);
    *len = yyjson_get_len(v);
    *out = yyjson_get_str(v);
    if (!lies_in(r->source, *out))
        *out = arena_strndup(r->arena, *out, *len);
    return *out ? LM_OK : no_memory(r);
}

/* A role is named only if somebody serves it: else it may be the content, in the wrong place. */
static bool is_others_role(yyjson_val *v)
{
    return yyjson_equals_str(v, "tool") || yyjson_equals_str(v, "developer") ||
           yyjson_equals_str(v, "function");
}

static lm_status read_role(const struct json_reader *r, yyjson_val *v, const char **out)
{
    static const char *const roles[] = { "system", "user", "assistant" };
    if (!v)
        return json_refuse(r, LM_INVALID, "role", "is missing");
    for (size_t i = 0; yyjson_is_str(v) && i < LM_COUNT(roles); i++) {
        if (yyjson_equals_str(v, roles[i])) {
            *out = roles[i];
            return LM_OK;
        }
    }
    return (is_others_role(v) ? json_wrong_value : json_wrong)
        (r, "role", "system, user or assistant", v);
}

static lm_status read_message(const struct json_reader *r, yyjson_val *v,
                              struct engine_message *out)
{
    static const char *const keys[] = { "role", "content", NULL };
    static const char *const later[] = { "name", "tool_calls", "tool_call_id", "function_call",
                                         "refusal", "audio", "reasoning_content", NULL };
    yyjson_obj_iter it = yyjson_obj_iter_with(v);
    for (yyjson_val *name; (name = yyjson_obj_iter_next(&it)) != NULL;) {
        const char *key = yyjson_get_str(name);
        yyjson_val *member = yyjson_obj_iter_get_val(name);
        if (json_key_in(later, key) && yyjson_is_null(member))
            continue;
        if (json_key_in(later, key))
            return json_refuse(r, LM_UNSUPPORTED, key, "is not served yet; leave it out");
        if (!json_key_in(keys, key))
            return json_unknown(r, key, keys);
    }
    lm_status st = read_role(r, json_given(v, "role"), &out->role);
    if (st)
        return st;
    yyjson_val *content = json_given(v, "content");
    if (!content)
        return json_refuse(r, LM_INVALID, "content", "is missing");
    if (yyjson_is_arr(content))
        return json_refuse(r, LM_UNSUPPORTED, "content", "as an array of parts is not served yet; "
                           "give one string");
    return json_read_string(r, "content", content, 0, SIZE_MAX, &out->content);
}

lm_status json_messages_read(const struct json_reader *r, const char *key, yyjson_val *v,
                             const struct engine_message **out, int *n)
{
    if (!yyjson_is_arr(v))
        return json_wrong(r, key, "an array of messages", v);
    size_t count = yyjson_arr_size(v);
    if (count == 0)
        return json_refuse(r, LM_INVALID, key, "must not be empty");
    if (count > MAX_MESSAGES)
        return json_refuse(r, LM_TOO_LARGE, key, "has %zu entries, more than %d", count,
                           MAX_MESSAGES);
    struct engine_message *list = arena_alloc(r->arena, count * sizeof *list);
    if (!list)
        return no_memory(r);
    yyjson_arr_iter it = yyjson_arr_iter_with(v);
    for (size_t i = 0; i < count; i++) {
        yyjson_val *item = yyjson_arr_iter_next(&it);
        char prefix[96];
        snprintf(prefix, sizeof prefix, "%.32s%.32s[%zu].", r->prefix, key, i);
        struct json_reader at = { prefix, r->arena, r->err, NULL };
        if (!yyjson_is_obj(item)) {
            prefix[strlen(prefix) - 1] = '\0';
            return json_wrong(&at, "", "an object with role and content", item);
        }
        lm_status st = read_message(&at, item, &list[i]);
        if (st)
            return st;
    }
    *out = list;
    *n = (int)count;
    return LM_OK;
}

/* ---- what is asked ----------------------------------------------------------------------- */

static bool is_key(enum key k, const char *name, size_t n)
{
    return known_length[k] == n && !memcmp(known[k], name, n);
}

/* Writers mostly keep to the schema's order, so the search goes round from `first`. */
static enum key key_of(const char *name, size_t n, enum key first)
{
    for (enum key k = first; k < KEYS; k++)
        if (is_key(k, name, n))
            return k;
    for (enum key k = 0; k < first; k++)
        if (is_key(k, name, n))
            return k;
    return KEYS;
}

static lm_status unknown_member(const struct json_reader *r, const char *key, yyjson_val *v)
{
    /* The likeliest mistake of all, since OpenAI's bodies have them at the top. */
    if (json_key_in(json_param_names, key))
        return json_refuse(r, LM_INVALID, key, "is a sampling parameter; it goes into \"params\"");
    if (!json_key_in(not_served, key))
        return json_unknown(r, key, known);
    return yyjson_is_null(v) ? LM_OK : json_refuse(r, LM_UNSUPPORTED, key, "is not served yet; "
                                                   "leave it out");
}

static lm_status find_members(const struct json_reader *r, yyjson_val *root, struct members *m)
{
    yyjson_obj_iter it = yyjson_obj_iter_with(root);
    enum key next = 0;
    *m = (struct members){ { NULL } };
    for (yyjson_val *name; (name = yyjson_obj_iter_next(&it)) != NULL;) {
        const char *text = yyjson_get_str(name);
        yyjson_val *v = yyjson_obj_iter_get_val(name);
        enum key k = key_of(text, yyjson_get_len(name), next);
        lm_status st = k == KEYS ? unknown_member(r, text, v) : LM_OK;
        if (st)
            return st;
        if (k == KEYS)
            continue;
        if (!yyjson_is_null(v))
            m->of[k] = v;
        next = k + 1;
    }
    return LM_OK;
}

static lm_status read_input(const struct json_reader *r, const struct members *m,
                            struct prompt *p)
{
    yyjson_val *text = m->of[PROMPT], *ids = m->of[TOKEN_IDS], *messages = m->of[MESSAGES];
    int given = !!text + !!ids + !!messages;
    if (given == 0)
        return lm_err_set(r->err, LM_INVALID,
                          "one of prompt, prompt_token_ids and messages is needed");
    if (given > 1)
        return lm_err_set(r->err, LM_INVALID, "only one of prompt, prompt_token_ids and messages "
                          "may be given, not %s and %s", text ? "prompt" : "prompt_token_ids",
                          messages ? "messages" : "prompt_token_ids");
    if (text)
        return json_text_read(r, "prompt", text, &p->prompt, &p->prompt_len);
    if (ids)
        return json_read_token_ids(r, "prompt_token_ids", ids, 1, PROMPT_MAX_TOKENS, &p->token_ids,
                                   &p->n_token_ids);
    return json_messages_read(r, "messages", messages, &p->messages, &p->n_messages);
}

static lm_status read_context(const struct json_reader *r, yyjson_val *v, struct prompt *p)
{
    if (!v)
        return LM_OK;
    if (!yyjson_is_arr(v))
        return json_wrong(r, "context", "an array of strings", v);
    size_t n = yyjson_arr_size(v);
    if (n > MAX_CONTEXT)
        return json_refuse(r, LM_TOO_LARGE, "context", "has %zu entries, more than %d", n,
                           MAX_CONTEXT);
    if (n > 0 && p->token_ids)
        return json_refuse(r, LM_INVALID, "context", "can't be put ahead of prompt_token_ids, "
                           "which are used verbatim");
    const char **list = arena_alloc(r->arena, n * sizeof *list);
    if (!list)
        return no_memory(r);
    yyjson_arr_iter it = yyjson_arr_iter_with(v);
    for (size_t i = 0; i < n; i++) {
        char name[32];
        snprintf(name, sizeof name, "context[%zu]", i);
        lm_status st = json_read_string(r, name, yyjson_arr_iter_next(&it), 0, SIZE_MAX, &list[i]);
        if (st)
            return st;
    }
    p->context = list;
    p->n_context = (int)n;
    return LM_OK;
}

static lm_status read_params(const struct json_reader *r, yyjson_val *v, struct prompt *p)
{
    if (v && !yyjson_is_obj(v))
        return json_wrong(r, "params", "an object", v);
    struct json_reader at = { "params.", r->arena, r->err, NULL };
    return json_params_read(&at, v, &p->params);
}

/* ---- who asks, for whom, when ------------------------------------------------------------ */

static lm_status read_id(const struct json_reader *r, yyjson_val *v, const char **out)
{
    if (!v)
        return lm_err_set(r->err, LM_INVALID, "id is missing");
    lm_status st = json_read_string(r, "id", v, 1, PROMPT_MAX_ID, out);
    for (const unsigned char *s = (const unsigned char *)*out; !st && *s; s++)
        if (*s < 0x20 || *s == 0x7f)
            return json_refuse(r, LM_INVALID, "id", "must not contain control characters");
    return st;
}

static lm_status read_adapter(const struct json_reader *r, yyjson_val *v, const char **out)
{
    if (!v)
        return LM_OK;
    if (yyjson_is_str(v) && yyjson_get_len(v) == 0)
        return json_refuse(r, LM_INVALID, "adapter", "must not be empty; leave it out (or null) "
                           "for the base model");
    lm_status st = json_read_string(r, "adapter", v, 1, ENGINE_ADAPTER_ID_MAX, out);
    if (st)
        return st;
    st = engine_adapter_id_check(*out, strlen(*out), r->err);
    return st ? lm_err_prefix(r->err, "%sadapter", r->prefix) : LM_OK;
}

static lm_status read_reply_topic(const struct json_reader *r, yyjson_val *v, const char **out)
{
    static const char legal[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                "0123456789._-";
    if (!v)
        return LM_OK;
    lm_status st = json_read_string(r, "reply_topic", v, 1, MAX_TOPIC, out);
    if (!st && ((*out)[strspn(*out, legal)] || !strcmp(*out, ".") || !strcmp(*out, "..")))
        return json_wrong_value(r, "reply_topic", "a Kafka topic name (letters, digits, . _ -)",
                                v);
    return st;
}

static lm_status read_optional(const struct json_reader *r, const struct members *m, enum key k,
                               size_t max, const char **out)
{
    return m->of[k] ? json_read_string(r, known[k], m->of[k], 1, max, out) : LM_OK;
}

static lm_status read_numbers(const struct json_reader *r, const struct members *m,
                              struct prompt *p)
{
    yyjson_val *priority = m->of[PRIORITY], *deadline = m->of[DEADLINE];
    yyjson_val *first = m->of[FIRST_TOKEN_BY];
    int64_t n = 0;
    lm_status st = priority ? json_read_int(r, "priority", priority, -1000000, 1000000, &n) : LM_OK;
    p->priority = (int)n;
    if (!st && deadline)
        st = json_read_int(r, "deadline_ms", deadline, 0, INT64_MAX, &p->deadline_ms);
    if (!st && first)
        st = json_read_int(r, "first_token_by_ms", first, 0, INT64_MAX, &p->first_token_by_ms);
    return st;
}

static lm_status read_stream(const struct json_reader *r, yyjson_val *v, bool *out)
{
    return v ? json_read_bool(r, "stream", v, out) : LM_OK;
}

static lm_status read_metadata(const struct json_reader *r, yyjson_val *v, struct prompt *p)
{
    if (!v)
        return LM_OK;
    if (!yyjson_is_obj(v))
        return json_wrong(r, "metadata", "an object of strings", v);
    size_t n = yyjson_obj_size(v);
    if (n > MAX_METADATA)
        return json_refuse(r, LM_TOO_LARGE, "metadata", "has %zu entries, more than %d", n,
                           MAX_METADATA);
    struct metadata_entry *list = arena_alloc(r->arena, n * sizeof *list);
    if (!list)
        return no_memory(r);
    struct json_reader at = { "metadata.", r->arena, r->err, NULL };
    yyjson_obj_iter it = yyjson_obj_iter_with(v);
    for (yyjson_val *name; (name = yyjson_obj_iter_next(&it)) != NULL;) {
        const char *key = yyjson_get_str(name);
        yyjson_val *value = yyjson_obj_iter_get_val(name);
        if (strlen(key) > MAX_NAME)
            return json_refuse(r, LM_TOO_LARGE, "metadata", "has a key of %zu bytes, more than %d",
                               strlen(key), MAX_NAME);
        struct metadata_entry *e = &list[p->n_metadata++];
        lm_status st = json_read_string(&at, key, value, 0, MAX_METADATA_VALUE, &e->value);
        if (st)
            return st;
        e->key = arena_strndup(r->arena, key, strlen(key));
        if (!e->key)
            return no_memory(r);
    }
    p->metadata = list;
    return LM_OK;
}

static lm_status check_model(const struct json_reader *r, const struct prompt *p,
                             const char *model_name)
{
    if (!p->model || !model_name || strcmp(p->model, model_name) == 0)
        return LM_OK;
    size_t n = strlen(p->model);
    if (is_shown(p->model, n))
        return json_refuse(r, LM_MISMATCH, "model", "is \"%s\", but this worker serves \"%.128s\"",
                           p->model, model_name);
    return json_refuse(r, LM_MISMATCH, "model", "has %zu bytes, but this worker serves \"%.128s\"",
                       n, model_name);
}

/* ---- the whole ---------------------------------------------------------------------------- */

static lm_status read_all(const struct json_reader *r, yyjson_val *root, const char *model_name,
                          struct prompt *p)
{
    struct members m;
    lm_status st;
    if ((st = find_members(r, root, &m)) ||
        (st = read_id(r, m.of[ID], &p->id)) ||
        (st = read_adapter(r, m.of[ADAPTER], &p->adapter)) ||
        (st = read_input(r, &m, p)) ||
        (st = read_context(r, m.of[CONTEXT], p)) ||
        (st = read_params(r, m.of[PARAMS], p)) ||
        (st = read_numbers(r, &m, p)) ||
        (st = read_optional(r, &m, TENANT, MAX_NAME, &p->tenant)) ||
        (st = read_reply_topic(r, m.of[REPLY_TOPIC], &p->reply_topic)) ||
        (st = read_optional(r, &m, CORRELATION_ID, MAX_CORRELATION, &p->correlation_id)) ||
        (st = read_optional(r, &m, MODEL, MAX_NAME, &p->model)) ||
        (st = read_stream(r, m.of[STREAM], &p->stream)) ||
        (st = read_metadata(r, m.of[METADATA], p)))
        return st;
    return check_model(r, p, model_name);
}

lm_status json_prompt_read(yyjson_val *root, enum encoding encoding, const char *model_name,
                           const struct json_source *source, struct prompt **out,
                           struct lm_err *err)
{
    if (!yyjson_is_obj(root))
        return lm_err_set(err, LM_FORMAT, "a prompt must be a record (object) of named fields");
    struct arena *arena = source && source->arena ? source->arena : arena_new();
    struct prompt *p = arena ? arena_alloc(arena, sizeof *p) : NULL;
    if (!p) {
        arena_free(arena);
        return lm_err_set(err, LM_NOMEM, "out of memory");
    }
    p->arena = arena;
    p->encoding = encoding;
    struct json_reader r = { "", arena, err, source };
    lm_status st = read_all(&r, root, model_name, p);
    if (st) {
        prompt_free(p);
        return st;
    }
    *out = p;
    return LM_OK;
}
