/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_field.c - typed, strict reading of JSON objects; see json_field.h.
 *
 * jansson is safe on hostile text, but it builds the whole tree before we see it: a 16 MiB message
 * of "0,0,0,..." would become some 400 MB. So a one-pass scan counts brackets and commas outside
 * strings first and refuses what is too deep or has too many values; it needs no grammar, since
 * whatever it counts wrong is refused by jansson afterwards.
 */
#include "worker/json_field.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { MAX_DEPTH = 32, MAX_VALUES = 512 * 1024, SHOWN_BYTES = 48, HINT_DISTANCE = 2 };

/* ---- parsing --------------------------------------------------------------------------- */

static lm_status scan_caps(const char *text, size_t len, struct lm_err *err)
{
    size_t depth = 0, values = 1;
    bool in_string = false;
    for (size_t i = 0; i < len; i++) {
        char c = text[i];
        if (in_string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                in_string = false;
        } else if (c == '"') {
            in_string = true;
        } else if (c == '{' || c == '[') {
            values++;
            if (++depth > MAX_DEPTH)
                return lm_err_set(err, LM_TOO_LARGE, "JSON is nested deeper than %d levels",
                                  MAX_DEPTH);
        } else if (c == '}' || c == ']') {
            depth -= depth > 0;
        } else if (c == ',') {
            values++;
        }
        if (values > MAX_VALUES)
            return lm_err_set(err, LM_TOO_LARGE, "JSON has more than %d values", MAX_VALUES);
    }
    return LM_OK;
}

/* Jansson ends with what it read last ("near 'some words'"), which may be a prompt's text: that
 * belongs in no log. Line and column say as much; a key that is there twice is named. */
static int before_excerpt(const json_error_t *je)
{
    const char *near = strstr(je->text, " near '");
    return near && json_error_code(je) != json_error_duplicate_key ? (int)(near - je->text)
                                                                   : (int)strlen(je->text);
}

lm_status json_parse_object(const char *text, size_t len, json_t **out, struct lm_err *err)
{
    lm_status st = scan_caps(text, len, err);
    if (st)
        return st;
    json_error_t je;
    json_t *root = json_loadb(text, len, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL |
                              JSON_DECODE_ANY, &je);
    if (!root) {
        if (json_error_code(&je) == json_error_out_of_memory)
            return lm_err_set(err, LM_NOMEM, "out of memory reading JSON of %zu bytes", len);
        return lm_err_set(err, LM_FORMAT, "not valid JSON at line %d column %d: %.*s", je.line,
                          je.column, before_excerpt(&je), je.text);
    }
    if (!json_is_object(root)) {
        json_decref(root);
        return lm_err_set(err, LM_FORMAT, "the message must be a JSON object {...}");
    }
    *out = root;
    return LM_OK;
}

static bool is_ascii(const char *s, size_t n)
{
    uint64_t any = 0, word;
    size_t i = 0;
    for (; i + sizeof word <= n; i += sizeof word) {
        memcpy(&word, s + i, sizeof word);
        any |= word;
    }
    for (; i < n; i++)
        any |= (unsigned char)s[i];
    return !(any & 0x8080808080808080u);
}

/* jansson checks UTF-8 a byte at a time, which is a sixth of the worker's work on an Avro message;
 * most text has nothing to check. */
json_t *json_text(const char *s, size_t n)
{
    return is_ascii(s, n) ? json_stringn_nocheck(s, n) : json_stringn(s, n);
}

json_t *json_given(const json_t *obj, const char *key)
{
    json_t *v = json_object_get(obj, key);
    return json_is_null(v) ? NULL : v;
}

/* ---- errors ---------------------------------------------------------------------------- */

/* The longest prefix of at most `max` bytes that doesn't cut a UTF-8 character. */
static int utf8_cut(const char *s, size_t len, size_t max)
{
    if (len <= max)
        return (int)len;
    size_t n = max;
    while (n > 0 && ((unsigned char)s[n] & 0xc0) == 0x80)
        n--;
    return (int)n;
}

lm_status json_refuse(const struct json_reader *r, lm_status code, const char *key,
                      const char *fmt, ...)
{
    char msg[384];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    return lm_err_set(r->err, code, "%s%.*s %s", r->prefix, utf8_cut(key, strlen(key), 64), key,
                      msg);
}

static void describe(const json_t *v, char *buf, size_t size)
{
    switch (json_typeof(v)) {
    case JSON_OBJECT: snprintf(buf, size, "an object"); break;
    case JSON_ARRAY: snprintf(buf, size, "an array of %zu", json_array_size(v)); break;
    case JSON_INTEGER: snprintf(buf, size, "%" JSON_INTEGER_FORMAT, json_integer_value(v)); break;
    case JSON_REAL: snprintf(buf, size, "%g", json_real_value(v)); break;
    case JSON_TRUE: snprintf(buf, size, "true"); break;
    case JSON_FALSE: snprintf(buf, size, "false"); break;
    case JSON_NULL: snprintf(buf, size, "null"); break;
    case JSON_STRING: {
        const char *s = json_string_value(v);
        size_t len = json_string_length(v);
        snprintf(buf, size, "\"%.*s%s\"", utf8_cut(s, len, SHOWN_BYTES), s,
                 len > SHOWN_BYTES ? "..." : "");
        break;
    }
    }
}

lm_status json_wrong(const struct json_reader *r, const char *key, const char *what,
                     const json_t *value)
{
    if (!value)
        return json_refuse(r, LM_INVALID, key, "is missing");
    char shown[SHOWN_BYTES + 16];
    describe(value, shown, sizeof shown);
    return json_refuse(r, LM_INVALID, key, "must be %s, not %s", what, shown);
}

/* Optimal string alignment distance (Levenshtein with swaps of neighbours), for short keys. */
static int key_distance(const char *a, const char *b)
{
    enum { MAX = 40 };
    int la = (int)strlen(a), lb = (int)strlen(b), d[3][MAX + 1];
    if (la > MAX || lb > MAX)
        return MAX;
    for (int j = 0; j <= lb; j++)
        d[0][j] = j;
    for (int i = 1; i <= la; i++) {
        int *row = d[i % 3], *up = d[(i + 2) % 3], *up2 = d[(i + 1) % 3];
        row[0] = i;
        for (int j = 1; j <= lb; j++) {
            int best = up[j - 1] + (a[i - 1] != b[j - 1]);
            best = LM_MIN(best, LM_MIN(up[j], row[j - 1]) + 1);
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
                best = LM_MIN(best, up2[j - 2] + 1);
            row[j] = best;
        }
    }
    return d[la % 3][lb];
}

lm_status json_unknown(const struct json_reader *r, const char *key, const char *const *known)
{
    const char *nearest = NULL;
    int best = HINT_DISTANCE + 1;
    for (; *known; known++) {
        int d = key_distance(key, *known);
        if (d < best && d < (int)strlen(*known)) {
            best = d;
            nearest = *known;
        }
    }
    if (nearest)
        return json_refuse(r, LM_INVALID, key, "is not a known key; did you mean %s%s?",
                           r->prefix, nearest);
    return json_refuse(r, LM_INVALID, key, "is not a known key (docs/messages.md lists them)");
}

bool json_key_in(const char *const *list, const char *key)
{
    for (; *list; list++)
        if (strcmp(*list, key) == 0)
            return true;
    return false;
}

/* ---- typed values ---------------------------------------------------------------------- */

lm_status json_read_string(const struct json_reader *r, const char *key, const json_t *v,
                           size_t min, size_t max, const char **out)
{
    if (!json_is_string(v))
        return json_wrong(r, key, "a string", v);
    const char *s = json_string_value(v);
    size_t len = json_string_length(v);
    if (len < min)
        return json_refuse(r, LM_INVALID, key, "must not be empty");
    if (len > max)
        return json_refuse(r, LM_TOO_LARGE, key, "has %zu bytes, more than %zu", len, max);
    if (memchr(s, 0, len))
        return json_refuse(r, LM_INVALID, key, "must not contain U+0000");
    *out = arena_strndup(r->arena, s, len);
    return *out ? LM_OK : lm_err_set(r->err, LM_NOMEM, "out of memory");
}

lm_status json_read_int(const struct json_reader *r, const char *key, const json_t *v, int64_t lo,
                        int64_t hi, int64_t *out)
{
    if (json_is_integer(v) && json_integer_value(v) >= lo && json_integer_value(v) <= hi) {
        *out = json_integer_value(v);
        return LM_OK;
    }
    char what[96];
    if (hi >= INT32_MAX)
        snprintf(what, sizeof what, "an integer, at least %" PRId64, lo);
    else
        snprintf(what, sizeof what, "an integer from %" PRId64 " to %" PRId64, lo, hi);
    return json_wrong(r, key, what, v);
}

lm_status json_read_bool(const struct json_reader *r, const char *key, const json_t *v, bool *out)
{
    if (!json_is_boolean(v))
        return json_wrong(r, key, "true or false", v);
    *out = json_is_true(v);
    return LM_OK;
}

lm_status json_read_token_ids(const struct json_reader *r, const char *key, const json_t *v,
                              size_t min, size_t max, const int32_t **out, int *n)
{
    if (!json_is_array(v))
        return json_wrong(r, key, "an array of token ids", v);
    size_t count = json_array_size(v);
    if (count < min)
        return json_refuse(r, LM_INVALID, key, "must not be empty");
    if (count > max)
        return json_refuse(r, LM_TOO_LARGE, key, "has %zu entries, more than %zu", count, max);
    int32_t *ids = arena_alloc(r->arena, count * sizeof *ids);
    if (!ids)
        return lm_err_set(r->err, LM_NOMEM, "out of memory");
    for (size_t i = 0; i < count; i++) {
        const json_t *item = json_array_get(v, i);
        if (!json_is_integer(item) || json_integer_value(item) < 0 ||
            json_integer_value(item) > INT32_MAX) {
            char name[64];
            snprintf(name, sizeof name, "%.32s[%zu]", key, i);
            return json_wrong(r, name, "a token id (an integer, at least 0)", item);
        }
        ids[i] = (int32_t)json_integer_value(item);
    }
    *out = ids;
    *n = (int)count;
    return LM_OK;
}
