/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_field.c - typed, strict reading of JSON objects; see json_field.h.
 */
#include "worker/codec/json_field.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "worker/codec/shown.h"

enum { HINT_DISTANCE = 2 };

yyjson_val *json_given(yyjson_val *obj, const char *key)
{
    yyjson_val *v = yyjson_obj_get(obj, key);
    return yyjson_is_null(v) ? NULL : v;
}

/* ---- errors ---------------------------------------------------------------------------- */

/* Of one place in an array, "stop[3]", the name counts. */
static bool is_shown_key(const char *key)
{
    size_t n = strlen(key), name = strcspn(key, "[");
    bool place = name < n && strspn(key + name + 1, "0123456789") + 2 == n - name &&
                 key[n - 1] == ']';
    return n == 0 || is_shown(key, place ? name : n);
}

lm_status json_refuse(const struct json_reader *r, lm_status code, const char *key,
                      const char *fmt, ...)
{
    char msg[384];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    if (is_shown_key(key))
        return lm_err_set(r->err, code, "%s%s %s", r->prefix, key, msg);
    return lm_err_set(r->err, code, "%sa key of %zu bytes %s", r->prefix, strlen(key), msg);
}

/* What it is, without what it says. */
static void describe(yyjson_val *v, char *buf, size_t size)
{
    if (yyjson_is_str(v))
        snprintf(buf, size, "a string of %zu bytes", yyjson_get_len(v));
    else if (yyjson_is_arr(v))
        snprintf(buf, size, "an array of %zu", yyjson_arr_size(v));
    else
        snprintf(buf, size, "%s", yyjson_is_num(v) ? "a number" : yyjson_is_obj(v) ? "an object" :
                 yyjson_is_null(v) ? "null" : yyjson_is_true(v) ? "true" : "false");
}

/* A string that is no name or number may be text in the wrong place. */
static void quote(yyjson_val *v, char *buf, size_t size)
{
    if (yyjson_is_str(v) && is_shown(yyjson_get_str(v), yyjson_get_len(v)))
        snprintf(buf, size, "\"%s\"", yyjson_get_str(v));
    else if (yyjson_is_int(v))
        snprintf(buf, size, "%" PRId64, yyjson_get_sint(v));
    else if (yyjson_is_real(v))
        snprintf(buf, size, "%g", yyjson_get_real(v));
    else
        describe(v, buf, size);
}

static lm_status wrong(const struct json_reader *r, const char *key, const char *what,
                       yyjson_val *value, void (*show)(yyjson_val *, char *, size_t))
{
    if (!value)
        return json_refuse(r, LM_INVALID, key, "is missing");
    char shown[SHOWN_NAME + 16];
    show(value, shown, sizeof shown);
    return json_refuse(r, LM_INVALID, key, "must be %s, not %s", what, shown);
}

lm_status json_wrong(const struct json_reader *r, const char *key, const char *what,
                     yyjson_val *value)
{
    return wrong(r, key, what, value, describe);
}

lm_status json_wrong_value(const struct json_reader *r, const char *key, const char *what,
                           yyjson_val *value)
{
    return wrong(r, key, what, value, quote);
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
        if (**list == *key && strcmp(*list, key) == 0)
            return true;
    return false;
}

/* ---- typed values ---------------------------------------------------------------------- */

lm_status json_read_string(const struct json_reader *r, const char *key, yyjson_val *v,
                           size_t min, size_t max, const char **out)
{
    if (!yyjson_is_str(v))
        return json_wrong(r, key, "a string", v);
    const char *s = yyjson_get_str(v);
    size_t len = yyjson_get_len(v);
    if (len < min)
        return json_refuse(r, LM_INVALID, key, "must not be empty");
    if (len > max)
        return json_refuse(r, LM_TOO_LARGE, key, "has %zu bytes, more than %zu", len, max);
    if (memchr(s, 0, len))
        return json_refuse(r, LM_INVALID, key, "must not contain U+0000");
    *out = arena_strndup(r->arena, s, len);
    return *out ? LM_OK : lm_err_set(r->err, LM_NOMEM, "out of memory");
}

lm_status json_read_int(const struct json_reader *r, const char *key, yyjson_val *v, int64_t lo,
                        int64_t hi, int64_t *out)
{
    if (yyjson_is_int(v) && yyjson_get_sint(v) >= lo && yyjson_get_sint(v) <= hi) {
        *out = yyjson_get_sint(v);
        return LM_OK;
    }
    char what[96];
    if (hi >= INT32_MAX)
        snprintf(what, sizeof what, "an integer, at least %" PRId64, lo);
    else
        snprintf(what, sizeof what, "an integer from %" PRId64 " to %" PRId64, lo, hi);
    return json_wrong_value(r, key, what, v);
}

lm_status json_read_bool(const struct json_reader *r, const char *key, yyjson_val *v, bool *out)
{
    if (!yyjson_is_bool(v))
        return json_wrong_value(r, key, "true or false", v);
    *out = yyjson_is_true(v);
    return LM_OK;
}

lm_status json_read_token_ids(const struct json_reader *r, const char *key, yyjson_val *v,
                              size_t min, size_t max, const int32_t **out, int *n)
{
    if (!yyjson_is_arr(v))
        return json_wrong(r, key, "an array of token ids", v);
    size_t count = yyjson_arr_size(v);
    if (count < min)
        return json_refuse(r, LM_INVALID, key, "must not be empty");
    if (count > max)
        return json_refuse(r, LM_TOO_LARGE, key, "has %zu entries, more than %zu", count, max);
    int32_t *ids = arena_alloc(r->arena, count * sizeof *ids);
    if (!ids)
        return lm_err_set(r->err, LM_NOMEM, "out of memory");
    yyjson_arr_iter it = yyjson_arr_iter_with(v);
    for (size_t i = 0; i < count; i++) {
        yyjson_val *item = yyjson_arr_iter_next(&it);
        if (!yyjson_is_int(item) || yyjson_get_sint(item) < 0 ||
            yyjson_get_sint(item) > INT32_MAX) {
            char name[64];
            snprintf(name, sizeof name, "%.32s[%zu]", key, i);
            return (yyjson_is_num(item) ? json_wrong_value : json_wrong)
                (r, name, "a token id (an integer, at least 0)", item);
        }
        ids[i] = (int32_t)yyjson_get_sint(item);
    }
    *out = ids;
    *n = (int)count;
    return LM_OK;
}
