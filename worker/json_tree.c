/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_tree.c - text and trees; see json_tree.h.
 *
 * A parser builds its values before we see them: a 16 MiB message of "0,0,0,..." would become some
 * hundreds of MB. So a text that is long enough for too many values is scanned first: one pass
 * counts brackets and commas outside strings. It needs no grammar, since whatever it counts wrong
 * is refused by yyjson afterwards.
 *
 * yyjson works in a piece of our stack where that suffices: its blocks are too large for the
 * allocator's quick lists.
 */
#include "worker/json_tree.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>
#include <yyjson.h>

enum { MAX_DEPTH = 32, MAX_VALUES = 512 * 1024, STACK_BYTES = 32 * 1024 };

/* ---- strings ----------------------------------------------------------------------------- */

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

bool json_is_utf8(const char *s, size_t n)
{
    utf8proc_int32_t c;
    utf8proc_ssize_t used = 0;
    for (size_t i = 0; i < n; i += (size_t)used)
        if ((used = utf8proc_iterate((const utf8proc_uint8_t *)s + i, (utf8proc_ssize_t)(n - i),
                                     &c)) <= 0)
            return false;
    return true;
}

/* ---- text to tree ------------------------------------------------------------------------ */

static lm_status count_values(const char *text, size_t len, struct lm_err *err)
{
    size_t values = 1;
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
        } else if (c == '{' || c == '[' || c == ',') {
            values++;
        }
        if (values > MAX_VALUES)
            return lm_err_set(err, LM_TOO_LARGE, "JSON has more than %d values", MAX_VALUES);
    }
    return LM_OK;
}

static json_t *no_memory(struct lm_err *err)
{
    lm_err_set(err, LM_NOMEM, "out of memory reading JSON");
    return NULL;
}

static json_t *refuse(struct lm_err *err, const char *what, const char *shown)
{
    lm_err_set(err, LM_FORMAT, "not valid JSON: %s '%.64s'", what, shown);
    return NULL;
}

static json_t *tree_of(yyjson_val *v, int depth, struct lm_err *err);

static json_t *object_of(yyjson_val *v, int depth, struct lm_err *err)
{
    json_t *o = json_object();
    size_t i, n;
    yyjson_val *name, *value;
    yyjson_obj_foreach(v, i, n, name, value) {
        const char *key = yyjson_get_str(name);
        size_t len = yyjson_get_len(name);
        json_t *member = NULL;
        if (!o)
            return no_memory(err);
        if (memchr(key, 0, len))
            refuse(err, "NUL byte in object key", key);
        else if (json_object_getn(o, key, len))
            refuse(err, "duplicate object key", key);
        else if ((member = tree_of(value, depth + 1, err)) &&
                 json_object_setn_new_nocheck(o, key, len, member) != 0)
            member = no_memory(err);
        if (!member) {
            json_decref(o);
            return NULL;
        }
    }
    return o ? o : no_memory(err);
}

static json_t *array_of(yyjson_val *v, int depth, struct lm_err *err)
{
    json_t *a = json_array();
    size_t i, n;
    yyjson_val *value;
    yyjson_arr_foreach(v, i, n, value) {
        json_t *item = a ? tree_of(value, depth + 1, err) : no_memory(err);
        if (item && json_array_append_new(a, item) != 0)
            item = no_memory(err);
        if (!item) {
            json_decref(a);
            return NULL;
        }
    }
    return a ? a : no_memory(err);
}

/* The text of a number that neither an int64 nor a double holds was kept as it is. */
static json_t *number_of(yyjson_val *v, struct lm_err *err)
{
    if (yyjson_is_raw(v) || (yyjson_is_uint(v) && yyjson_get_uint(v) > INT64_MAX))
        return refuse(err, "too big number", yyjson_is_raw(v) ? yyjson_get_raw(v) : "");
    json_t *j = yyjson_is_int(v) ? json_integer(yyjson_get_sint(v)) : json_real(yyjson_get_real(v));
    return j ? j : no_memory(err);
}

static json_t *tree_of(yyjson_val *v, int depth, struct lm_err *err)
{
    json_t *s;
    if (depth > MAX_DEPTH && yyjson_is_ctn(v)) {
        lm_err_set(err, LM_TOO_LARGE, "JSON is nested deeper than %d levels", MAX_DEPTH);
        return NULL;
    }
    switch (yyjson_get_type(v)) {
    case YYJSON_TYPE_OBJ: return object_of(v, depth, err);
    case YYJSON_TYPE_ARR: return array_of(v, depth, err);
    case YYJSON_TYPE_NULL: return json_null();
    case YYJSON_TYPE_BOOL: return json_boolean(yyjson_get_bool(v));
    case YYJSON_TYPE_STR:
        s = json_stringn_nocheck(yyjson_get_str(v), yyjson_get_len(v));
        return s ? s : no_memory(err);
    default: return number_of(v, err);
    }
}

static lm_status grammar_error(const char *text, size_t len, const yyjson_read_err *e,
                               struct lm_err *err)
{
    size_t line = 1, column = 1, at = 0;
    if (e->code == YYJSON_READ_ERROR_MEMORY_ALLOCATION)
        return lm_err_set(err, LM_NOMEM, "out of memory reading JSON of %zu bytes", len);
    yyjson_locate_pos(text, len, e->pos, &line, &column, &at);
    return lm_err_set(err, LM_FORMAT, "not valid JSON at line %zu column %zu: %s", line, column,
                      e->msg);
}

/* The stack suffices for every text that is JSON. One that opens brackets only needs more before
 * yyjson finds it wrong, and must not look like memory that ran out: that is not its sender's. */
static yyjson_doc *read_doc(const char *text, size_t len, const yyjson_alc *stack, bool small,
                            yyjson_read_err *e)
{
    char *in = (char *)(uintptr_t)text;
    yyjson_doc *doc = NULL;
    if (small)
        doc = yyjson_read_opts(in, len, YYJSON_READ_BIGNUM_AS_RAW, stack, e);
    if (!small || (!doc && e->code == YYJSON_READ_ERROR_MEMORY_ALLOCATION))
        doc = yyjson_read_opts(in, len, YYJSON_READ_BIGNUM_AS_RAW, NULL, e);
    return doc;
}

lm_status json_parse_object(const char *text, size_t len, json_t **out, struct lm_err *err)
{
    char stack[STACK_BYTES];
    bool small = yyjson_read_max_memory_usage(len, YYJSON_READ_BIGNUM_AS_RAW) <= sizeof stack;
    yyjson_alc alc;
    struct lm_err own;
    yyjson_read_err e;
    lm_status st = len / 2 < MAX_VALUES ? LM_OK : count_values(text, len, err);
    if (st)
        return st;
    yyjson_alc_pool_init(&alc, stack, sizeof stack);
    yyjson_doc *doc = read_doc(text, len, &alc, small, &e);
    if (!doc)
        return grammar_error(text, len, &e, err);
    if (!err)
        err = &own;
    yyjson_val *root = yyjson_doc_get_root(doc);
    if (yyjson_is_obj(root))
        st = (*out = object_of(root, 1, err)) ? LM_OK : err->code;
    else
        st = lm_err_set(err, LM_FORMAT, "the message must be a JSON object {...}");
    yyjson_doc_free(doc);
    return st;
}

/* ---- tree to text ------------------------------------------------------------------------ */

static yyjson_mut_val *value_of(yyjson_mut_doc *d, const json_t *j);

static yyjson_mut_val *members_of(yyjson_mut_doc *d, const json_t *j)
{
    yyjson_mut_val *o = yyjson_mut_obj(d);
    for (void *it = json_object_iter((json_t *)(uintptr_t)j); it;
         it = json_object_iter_next((json_t *)(uintptr_t)j, it)) {
        yyjson_mut_val *key = yyjson_mut_strn(d, json_object_iter_key(it),
                                              json_object_iter_key_len(it));
        if (!yyjson_mut_obj_add(o, key, value_of(d, json_object_iter_value(it))))
            return NULL;
    }
    return o;
}

static yyjson_mut_val *items_of(yyjson_mut_doc *d, const json_t *j)
{
    yyjson_mut_val *a = yyjson_mut_arr(d);
    for (size_t i = 0; i < json_array_size(j); i++)
        if (!yyjson_mut_arr_append(a, value_of(d, json_array_get(j, i))))
            return NULL;
    return a;
}

static yyjson_mut_val *real_of(yyjson_mut_doc *d, double x)
{
    return (double)(float)x == x ? yyjson_mut_float(d, (float)x) : yyjson_mut_double(d, x);
}

/* Strings stay the tree's. NULL, a failure to whoever adds it to something: there is no memory. */
static yyjson_mut_val *value_of(yyjson_mut_doc *d, const json_t *j)
{
    switch (json_typeof(j)) {
    case JSON_OBJECT: return members_of(d, j);
    case JSON_ARRAY: return items_of(d, j);
    case JSON_STRING: return yyjson_mut_strn(d, json_string_value(j), json_string_length(j));
    case JSON_INTEGER: return yyjson_mut_sint(d, json_integer_value(j));
    case JSON_REAL: return real_of(d, json_real_value(j));
    case JSON_NULL: return yyjson_mut_null(d);
    default: return yyjson_mut_bool(d, json_is_true(j));
    }
}

/* yyjson makes room for six bytes a character, and replies wait for their brokers in what we
 * return: the rest goes back. */
static char *print(const json_t *root, const yyjson_alc *alc, size_t *len)
{
    yyjson_mut_doc *d = yyjson_mut_doc_new(alc);
    yyjson_mut_val *v = d ? value_of(d, root) : NULL;
    char *text = v ? yyjson_mut_val_write_opts(v, YYJSON_WRITE_NOFLAG, NULL, len, NULL) : NULL;
    yyjson_mut_doc_free(d);
    char *fitting = text ? realloc(text, *len + 1) : NULL;
    return fitting ? fitting : text;
}

char *json_print(const json_t *root, size_t *len)
{
    char stack[STACK_BYTES];
    yyjson_alc alc;
    yyjson_alc_pool_init(&alc, stack, sizeof stack);
    char *text = print(root, &alc, len);
    return text ? text : print(root, NULL, len);
}
