/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_tree.c - text and trees; see json_tree.h.
 *
 * A parser builds its values before we see them: a 16 MiB message of "0,0,0,..." would become some
 * hundreds of MB. So a text that is long enough for too many values is scanned first: one pass
 * counts brackets and commas outside strings. It needs no grammar, since whatever it counts wrong
 * is refused by yyjson afterwards.
 *
 * What yyjson does not look at is checked in one walk over its tree, before anyone reads it.
 *
 * yyjson looks at each byte of a string. Most of a message is one long text, which mostly needs no
 * more than a look at sixteen bytes at a time; so that text is left out of the copy that yyjson
 * reads in place, an empty string stands there instead, and its value is put right afterwards.
 */
#include "worker/codec/json_tree.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "worker/codec/bytes.h"
#include "worker/codec/shown.h"

enum { MAX_DEPTH = 32, MAX_VALUES = 512 * 1024, FEW_KEYS = 24, INT_BYTES = 20 };

/* ---- scratch ----------------------------------------------------------------------------- */

static bool scratch_has(const struct json_scratch *s, const void *p)
{
    return (const char *)p >= s->bytes && (const char *)p < s->bytes + sizeof s->bytes;
}

static void *scratch_malloc(void *ctx, size_t size)
{
    struct json_scratch *s = ctx;
    if (size > sizeof s->bytes - s->used)
        return lm_malloc(size);
    void *p = s->bytes + s->used;
    s->used = LM_MIN(LM_DIV_UP(s->used + size, 16) * 16, sizeof s->bytes);
    return p;
}

static void scratch_free(void *ctx, void *p)
{
    if (!scratch_has(ctx, p))
        free(p);
}

static void *scratch_realloc(void *ctx, void *p, size_t old, size_t size)
{
    if (!scratch_has(ctx, p))
        return realloc(p, size);
    void *to = size > old ? scratch_malloc(ctx, size) : p;
    if (to && to != p)
        memcpy(to, p, old);
    return to;
}

void json_scratch_init(struct json_scratch *s)
{
    s->alc = (yyjson_alc){ scratch_malloc, scratch_realloc, scratch_free, s };
    s->used = 0;
}

/* ---- strings ----------------------------------------------------------------------------- */

#define ONES 0x0101010101010101u
#define HIGH_BITS 0x8080808080808080u

/* Sixteen bytes at a time, as GCC and Clang have them on any machine. */
typedef signed char v16 __attribute__((vector_size(16)));

static v16 load16(const char *s)
{
    v16 v;
    memcpy(&v, s, sizeof v);
    return v;
}

static bool any(v16 mask)
{
    uint64_t w[2];
    memcpy(w, &mask, sizeof w);
    return w[0] | w[1];
}

/* Two to fifteen bytes are two words, which overlap. A word of fewer than eight bytes has dots in
 * front, or some of them twice: no question below minds either. */
static uint64_t load_word(const char *s, size_t n)
{
    uint64_t w = 0;
    uint32_t a, b;
    if (n >= sizeof w) {
        memcpy(&w, s, sizeof w);
        return w;
    }
    if (n >= sizeof a) {
        memcpy(&a, s, sizeof a);
        memcpy(&b, s + n - sizeof b, sizeof b);
        return (uint64_t)a << 32 | b;
    }
    memset(&w, '.', sizeof w);
    for (size_t i = 0; i < n; i++)
        w = w << 8 | (unsigned char)s[i];
    return w;
}

/* The last eight, or fewer, of less than sixteen bytes. */
static uint64_t load_last(const char *s, size_t n)
{
    return n > 8 ? load_word(s + n - 8, 8) : load_word(s, n);
}

/* All of the text in words of sixteen bytes, the last of which overlaps the one before. */
static bool is_ascii(const char *s, size_t n)
{
    v16 or = { 0 };
    size_t i = 0;
    if (n < 16)
        return !((load_word(s, n) | load_last(s, n)) & HIGH_BITS);
    for (; i + 64 <= n; i += 64)
        or |= load16(s + i) | load16(s + i + 16) | load16(s + i + 32) | load16(s + i + 48);
    for (; i + 16 <= n; i += 16)
        or |= load16(s + i);
    or |= load16(s + n - 16);
    return !any(or < 0);
}

/* Where a byte must be looked at: a control character, a quote, a backslash, or one of UTF-8, which
 * is negative. */
static v16 to_look_at(v16 v)
{
    return ((v ^ ('"' ^ ' ')) < '!') | (v == '\\');     /* '"' and ' ' change places */
}

/* The same of a word, but a byte behind one that it is true of may have it too. */
static uint64_t to_escape(uint64_t w)
{
    uint64_t quote = w ^ ONES * '"', slash = w ^ ONES * '\\';
    return ((w - ONES * 0x20) | (quote - ONES) | (slash - ONES) | w) & HIGH_BITS;
}

/* Nothing but printable ASCII, and no quote or backslash? */
static bool is_plain(const char *s, size_t n)
{
    v16 bad = { 0 };
    size_t i = 0;
    if (n < 16)
        return !(to_escape(load_word(s, n)) | to_escape(load_last(s, n)));
    for (; i + 32 <= n; i += 32)
        bad |= to_look_at(load16(s + i)) | to_look_at(load16(s + i + 16));
    if (i + 16 <= n)
        bad |= to_look_at(load16(s + i));
    bad |= to_look_at(load16(s + n - 16));
    return !any(bad);
}

/* Out of line, so that what most text needs is short. */
static __attribute__((noinline)) bool has_good_characters(const char *s, size_t n)
{
    utf8proc_int32_t c;
    utf8proc_ssize_t used = 0;
    for (size_t i = 0; i < n; i += (size_t)used)
        if ((used = utf8proc_iterate((const utf8proc_uint8_t *)s + i, (utf8proc_ssize_t)(n - i),
                                     &c)) <= 0)
            return false;
    return true;
}

/* Most text has nothing to check. */
bool json_is_utf8(const char *s, size_t n)
{
    return is_ascii(s, n) || has_good_characters(s, n);
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

static lm_status refuse_key(struct lm_err *err, const char *what, yyjson_val *key)
{
    const char *text = yyjson_get_str(key);
    size_t n = yyjson_get_len(key);
    if (is_shown(text, n))
        return lm_err_set(err, LM_FORMAT, "not valid JSON: %s '%s'", what, text);
    return lm_err_set(err, LM_FORMAT, "not valid JSON: %s of %zu bytes", what, n);
}

static bool same_key(yyjson_val *a, yyjson_val *b)
{
    size_t n = yyjson_get_len(a);
    return n == yyjson_get_len(b) && !memcmp(yyjson_get_str(a), yyjson_get_str(b), n);
}

static int key_order(const void *pa, const void *pb)
{
    yyjson_val *a = *(yyjson_val *const *)pa, *b = *(yyjson_val *const *)pb;
    size_t la = yyjson_get_len(a), lb = yyjson_get_len(b);
    return la != lb ? (la < lb ? -1 : 1) : memcmp(yyjson_get_str(a), yyjson_get_str(b), la);
}

/* Of many keys; sorts them. */
static lm_status check_keys_sorted(yyjson_val **keys, size_t n, struct lm_err *err)
{
    qsort(keys, n, sizeof(yyjson_val *), key_order);
    for (size_t i = 1; i < n; i++)
        if (same_key(keys[i - 1], keys[i]))
            return refuse_key(err, "duplicate object key", keys[i]);
    return LM_OK;
}

/* Of 64 marks one for each key; two that are equal have the same. A key is terminated. */
static uint64_t mark_of(const char *key, size_t n)
{
    return 1ull << (n * 5 + (unsigned char)key[0] * 3 + (unsigned char)key[n / 2]) % 64;
}

static lm_status check_keys(yyjson_val *object, struct lm_err *err)
{
    yyjson_val *few[FEW_KEYS], **keys = few;
    size_t n = unsafe_yyjson_get_len(object), at = 0;
    uint64_t marks = 0;
    lm_status st = LM_OK;
    if (n > FEW_KEYS && !(keys = lm_calloc(n, sizeof(yyjson_val *))))
        return lm_err_set(err, LM_NOMEM, "out of memory reading JSON");
    yyjson_val *name = object + 1;
    for (; !st && at < n; name = unsafe_yyjson_get_next(name + 1)) {
        const char *text = name->uni.str;
        uint64_t mark = mark_of(text, unsafe_yyjson_get_len(name));
        if (memchr(text, 0, unsafe_yyjson_get_len(name)))
            st = refuse_key(err, "NUL byte in object key", name);
        for (size_t i = 0; n <= FEW_KEYS && !st && marks & mark && i < at; i++)
            if (same_key(keys[i], name))
                st = refuse_key(err, "duplicate object key", name);
        marks |= mark;
        keys[at++] = name;
    }
    if (!st && n > FEW_KEYS)
        st = check_keys_sorted(keys, n, err);
    if (keys != few)
        free(keys);
    return st;
}

/* The text of a number that neither an int64 nor a double holds was kept as it is. */
static lm_status check_number(yyjson_val *v, struct lm_err *err)
{
    if (yyjson_is_raw(v))
        return lm_err_set(err, LM_FORMAT, "not valid JSON: too big number of %zu characters",
                          yyjson_get_len(v));
    if (yyjson_is_uint(v) && yyjson_get_uint(v) > INT64_MAX)
        return lm_err_set(err, LM_FORMAT, "not valid JSON: too big number");
    return LM_OK;
}

/* All values stand in one row, each container ahead of what it holds. */
static lm_status check_values(yyjson_doc *doc, struct lm_err *err)
{
    yyjson_val *v = yyjson_doc_get_root(doc), *end = v + yyjson_doc_get_val_count(doc);
    yyjson_val *around[MAX_DEPTH];      /* where the containers around v end */
    lm_status st = LM_OK;
    for (int depth = 0; !st && v < end; v++) {
        while (depth > 0 && v == around[depth - 1])
            depth--;
        if (yyjson_is_str(v))
            continue;
        if (!yyjson_is_ctn(v)) {
            st = check_number(v, err);
        } else if (depth == MAX_DEPTH) {
            st = lm_err_set(err, LM_TOO_LARGE, "JSON is nested deeper than %d levels", MAX_DEPTH);
        } else {
            around[depth++] = unsafe_yyjson_get_next(v);
            st = yyjson_is_obj(v) ? check_keys(v, err) : LM_OK;
        }
    }
    return st;
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

enum { LONG_TEXT = 128 };

/* The inside of a literal. */
struct inside { size_t at, len; };

static v16 look4(const char *s)
{
    return to_look_at(load16(s)) | to_look_at(load16(s + 16)) | to_look_at(load16(s + 32)) |
           to_look_at(load16(s + 48));
}

/* How many of the first bytes are plain; fifteen less at most. */
static size_t plain_run(const char *s, size_t n)
{
    size_t i = 0;
    while (i + 64 <= n && !any(look4(s + i)))
        i += 64;
    while (i + 16 <= n && !any(to_look_at(load16(s + i))))
        i += 16;
    return i;
}

/* The quote that ends the literal that `at` lies in, or `len`. */
static size_t literal_end(const char *text, size_t at, size_t len)
{
    for (const char *quote; at < len && (quote = memchr(text + at, '"', len - at)) != NULL; at++) {
        size_t slashes = 0;
        at = (size_t)(quote - text);
        while (text[at - 1 - slashes] == '\\')       /* in front of them all is its first quote */
            slashes++;
        if (slashes % 2 == 0)
            return at;
    }
    return len;
}

/* Is it the name of a member? Names are to be terminated. */
static bool colon_follows(const char *text, size_t at, size_t len)
{
    while (at < len && (text[at] == ' ' || (text[at] >= '\t' && text[at] <= '\r')))
        at++;
    return at < len && text[at] == ':';
}

/* The first long text that stands there as it is meant. Where the grammar is not kept it may be
 * anything, but yyjson is stopped ahead of it then. */
static struct inside find_long_text(const char *text, size_t len)
{
    for (size_t at = 0, end; at < len; at = end + 1) {
        const char *quote = memchr(text + at, '"', len - at);
        if (!quote)
            break;
        at = (size_t)(quote + 1 - text);
        size_t run = plain_run(text + at, len - at);
        end = literal_end(text, at + run, len);
        if (end < len && end - at >= LONG_TEXT && is_plain(text + at + run, end - at - run) &&
            !colon_follows(text, end + 1, len))
            return (struct inside){ at, end - at };
    }
    return (struct inside){ len, 0 };
}

/* The value that stands for it is the only one whose text is there. */
static void put_right(yyjson_doc *doc, const char *there, const char *text, size_t len)
{
    yyjson_val *v = yyjson_doc_get_root(doc);
    while (!yyjson_is_str(v) || v->uni.str != there)
        v++;
    unsafe_yyjson_set_strn(v, text, len);
}

/* The document owns the copy, as it does one of yyjson's own. */
static yyjson_doc *parse(const char *text, size_t len, const yyjson_alc *alc, yyjson_read_err *e)
{
    const struct inside cut = find_long_text(text, len);
    size_t rest = cut.at + cut.len, n = len - cut.len;
    char *copy = alc->malloc(alc->ctx, n + YYJSON_PADDING_SIZE);
    if (!copy) {
        e->code = YYJSON_READ_ERROR_MEMORY_ALLOCATION;
        return NULL;
    }
    memcpy(copy, text, cut.at);
    memcpy(copy + cut.at, text + rest, len - rest);
    memset(copy + n, 0, YYJSON_PADDING_SIZE);
    yyjson_doc *doc = yyjson_read_opts(copy, n, YYJSON_READ_BIGNUM_AS_RAW | YYJSON_READ_INSITU,
                                       alc, e);
    if (!doc) {
        e->pos += e->pos > cut.at ? cut.len : 0;
        alc->free(alc->ctx, copy);
        return NULL;
    }
    doc->str_pool = copy;
    if (cut.len)
        put_right(doc, copy + cut.at, text + cut.at, cut.len);
    return doc;
}

lm_status json_doc_read(const char *text, size_t len, struct json_scratch *s, yyjson_doc **out,
                        struct lm_err *err)
{
    yyjson_read_err e;
    lm_status st = len / 2 < MAX_VALUES ? LM_OK : count_values(text, len, err);
    if (st)
        return st;
    yyjson_doc *doc = parse(text, len, &s->alc, &e);
    if (!doc)
        return grammar_error(text, len, &e, err);
    st = yyjson_is_obj(yyjson_doc_get_root(doc)) ? check_values(doc, err) :
         lm_err_set(err, LM_FORMAT, "the message must be a JSON object {...}");
    if (st)
        yyjson_doc_free(doc);
    else
        *out = doc;
    return st;
}

lm_status json_parse_object(const char *text, size_t len, json_t **out, struct lm_err *err)
{
    struct json_scratch scratch;
    yyjson_doc *doc = NULL;
    json_scratch_init(&scratch);
    lm_status st = json_doc_read(text, len, &scratch, &doc, err);
    if (st)
        return st;
    *out = json_from_value(yyjson_doc_get_root(doc));
    yyjson_doc_free(doc);
    return *out ? LM_OK : lm_err_set(err, LM_NOMEM, "out of memory reading JSON");
}

/* ---- from one kind to the other ---------------------------------------------------------- */

static json_t *object_of(yyjson_val *v)
{
    json_t *o = json_object();
    size_t i, n;
    yyjson_val *name, *value;
    yyjson_obj_foreach(v, i, n, name, value)
        if (json_object_setn_new_nocheck(o, yyjson_get_str(name), yyjson_get_len(name),
                                         json_from_value(value)) != 0) {
            json_decref(o);
            return NULL;
        }
    return o;
}

static json_t *array_of(yyjson_val *v)
{
    json_t *a = json_array();
    size_t i, n;
    yyjson_val *value;
    yyjson_arr_foreach(v, i, n, value)
        if (json_array_append_new(a, json_from_value(value)) != 0) {
            json_decref(a);
            return NULL;
        }
    return a;
}

json_t *json_from_value(yyjson_val *v)
{
    switch (yyjson_get_type(v)) {
    case YYJSON_TYPE_OBJ: return object_of(v);
    case YYJSON_TYPE_ARR: return array_of(v);
    case YYJSON_TYPE_NULL: return json_null();
    case YYJSON_TYPE_BOOL: return json_boolean(yyjson_get_bool(v));
    case YYJSON_TYPE_STR: return json_stringn_nocheck(yyjson_get_str(v), yyjson_get_len(v));
    default: return yyjson_is_int(v) ? json_integer(yyjson_get_sint(v))
                                     : json_real(yyjson_get_real(v));
    }
}

static yyjson_mut_val *members_of(yyjson_mut_doc *d, const json_t *j)
{
    yyjson_mut_val *o = yyjson_mut_obj(d);
    for (void *it = json_object_iter((json_t *)(uintptr_t)j); it;
         it = json_object_iter_next((json_t *)(uintptr_t)j, it)) {
        yyjson_mut_val *key = yyjson_mut_strn(d, json_object_iter_key(it),
                                              json_object_iter_key_len(it));
        if (!yyjson_mut_obj_add(o, key, json_to_value(d, json_object_iter_value(it))))
            return NULL;
    }
    return o;
}

static yyjson_mut_val *items_of(yyjson_mut_doc *d, const json_t *j)
{
    yyjson_mut_val *a = yyjson_mut_arr(d);
    for (size_t i = 0; i < json_array_size(j); i++)
        if (!yyjson_mut_arr_append(a, json_to_value(d, json_array_get(j, i))))
            return NULL;
    return a;
}

/* Strings stay the tree's. NULL, a failure to whoever adds it to something: there is no memory. */
yyjson_mut_val *json_to_value(yyjson_mut_doc *d, const json_t *j)
{
    switch (json_typeof(j)) {
    case JSON_OBJECT: return members_of(d, j);
    case JSON_ARRAY: return items_of(d, j);
    case JSON_STRING: return yyjson_mut_strn(d, json_string_value(j), json_string_length(j));
    case JSON_INTEGER: return yyjson_mut_sint(d, json_integer_value(j));
    case JSON_REAL: return yyjson_mut_double(d, json_real_value(j));
    case JSON_NULL: return yyjson_mut_null(d);
    default: return yyjson_mut_bool(d, json_is_true(j));
    }
}

/* ---- tree to text ------------------------------------------------------------------------ */

/* How many of the first bytes need no escape. */
static size_t plain_len(const char *s, size_t n)
{
    size_t i = 0;
    for (uint64_t w; i + sizeof w <= n; i += sizeof w) {
        memcpy(&w, s + i, sizeof w);
        if (to_escape(w))
            break;
    }
    while (i < n && (unsigned char)s[i] >= 0x20 && s[i] != '"' && s[i] != '\\')
        i++;
    return i;
}

static void print_escaped(struct bytes *b, unsigned char c)
{
    static const char hex[] = "0123456789ABCDEF";
    static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
    const char *known = c ? strchr(from, c) : NULL;
    if (known)
        bytes_put(b, (char[]){ '\\', to[known - from] }, 2);
    else
        bytes_put(b, (char[]){ '\\', 'u', '0', '0', hex[c >> 4], hex[c & 15] }, 6);
}

static void put_escaped(struct bytes *b, const char *s, size_t n)
{
    bytes_byte(b, '"');
    for (size_t i = 0; i < n;) {
        size_t plain = plain_len(s + i, n - i);
        bytes_put(b, s + i, plain);
        i += plain;
        if (i < n)
            print_escaped(b, (unsigned char)s[i++]);
    }
    bytes_byte(b, '"');
}

/* False: something in it must be looked at. */
static bool put_plain(struct bytes *b, const char *s, size_t n)
{
    char *to = is_plain(s, n) ? bytes_room(b, n + 2) : NULL;
    if (!to)
        return b->failed;
    to[0] = '"';
    memcpy(to + 1, s, n);
    to[n + 1] = '"';
    b->n += n + 2;
    return true;
}

/* Its UTF-8 was checked when it became a value. */
static void print_string(struct bytes *b, const char *s, size_t n)
{
    if (!put_plain(b, s, n))
        put_escaped(b, s, n);
}

bool json_put_text(struct bytes *b, const char *s, size_t n)
{
    if (put_plain(b, s, n))
        return true;
    if (!json_is_utf8(s, n))
        return false;
    put_escaped(b, s, n);
    return true;
}

static char *write_digits(char *to, uint64_t u)
{
    int n = 1;
    for (uint64_t rest = u; rest >= 10; rest /= 10)
        n++;
    for (char *at = to + n; at > to; u /= 10)
        *--at = (char)('0' + u % 10);
    return to + n;
}

void json_put_int(struct bytes *b, int64_t v)
{
    char *to = bytes_room(b, INT_BYTES), *at = to;
    if (!to)
        return;
    if (v >= 0 && v < 10) {     /* many are */
        *to = (char)('0' + v);
        b->n++;
        return;
    }
    if (v < 0)
        *at++ = '-';
    at = write_digits(at, v < 0 ? -(uint64_t)v : (uint64_t)v);
    b->n += (size_t)(at - to);
}

void json_put_thousandths(struct bytes *b, int64_t all)
{
    if (!all) {                 /* a stage that took no time */
        bytes_put(b, "0.0", 3);
        return;
    }
    char *to = bytes_room(b, INT_BYTES + 2), *at = to;
    uint64_t u = all < 0 ? -(uint64_t)all : (uint64_t)all;
    unsigned rest = (unsigned)(u % 1000);
    if (!to)
        return;
    if (all < 0)
        *at++ = '-';
    at = write_digits(at, u / 1000);
    *at++ = '.';
    *at++ = (char)('0' + rest / 100);
    if (rest % 100)
        *at++ = (char)('0' + rest / 10 % 10);
    if (rest % 10)
        *at++ = (char)('0' + rest % 10);
    b->n += (size_t)(at - to);
}

/* Thousandths, as all times are: at most 15 digits of a double, 7 of a float, so that no fewer read
 * back as the same. */
static bool put_thousandths(struct bytes *b, double x)
{
    int64_t all = x < 1e12 ? llround(x * 1000) : 0;
    if (!(x < 1e12) || (double)all / 1000 != x || (x >= 8192 && (double)(float)x == x))
        return false;
    json_put_thousandths(b, all);
    return true;
}

void json_put_real(struct bytes *b, double x)
{
    char room[1024];
    yyjson_mut_val v = { 0 };
    yyjson_alc alc;
    size_t n = 0;
    if (x == 0 && !signbit(x)) {
        bytes_put(b, "0.0", 3);
        return;
    }
    if (x > 0 && put_thousandths(b, x))
        return;
    if ((double)(float)x == x)
        yyjson_mut_set_float(&v, (float)x);
    else
        yyjson_mut_set_double(&v, x);
    yyjson_alc_pool_init(&alc, room, sizeof room);
    const char *text = yyjson_mut_val_write_opts(&v, YYJSON_WRITE_NOFLAG, &alc, &n, NULL);
    if (text)
        bytes_put(b, text, n);
    else
        b->failed = true;
}

static void print_value(struct bytes *b, yyjson_mut_val *v);

static void print_object(struct bytes *b, yyjson_mut_val *o)
{
    const char *before = "{";
    yyjson_mut_obj_iter it = yyjson_mut_obj_iter_with(o);
    for (yyjson_mut_val *key; (key = yyjson_mut_obj_iter_next(&it)) != NULL; before = ",") {
        bytes_put(b, before, 1);
        print_string(b, yyjson_mut_get_str(key), yyjson_mut_get_len(key));
        bytes_put(b, ":", 1);
        print_value(b, yyjson_mut_obj_iter_get_val(key));
    }
    bytes_put(b, "{}", *before == '{' ? 2 : 0);
    bytes_put(b, "}", *before == '{' ? 0 : 1);
}

static void print_array(struct bytes *b, yyjson_mut_val *a)
{
    const char *before = "[";
    yyjson_mut_arr_iter it = yyjson_mut_arr_iter_with(a);
    for (yyjson_mut_val *item; (item = yyjson_mut_arr_iter_next(&it)) != NULL; before = ",") {
        bytes_put(b, before, 1);
        print_value(b, item);
    }
    bytes_put(b, "[]", *before == '[' ? 2 : 0);
    bytes_put(b, "]", *before == '[' ? 0 : 1);
}

/* As deep as we build them. */
static void print_value(struct bytes *b, yyjson_mut_val *v)
{
    switch (yyjson_mut_get_type(v)) {
    case YYJSON_TYPE_OBJ: print_object(b, v); break;
    case YYJSON_TYPE_ARR: print_array(b, v); break;
    case YYJSON_TYPE_STR: print_string(b, yyjson_mut_get_str(v), yyjson_mut_get_len(v)); break;
    case YYJSON_TYPE_NULL: bytes_put(b, "null", 4); break;
    case YYJSON_TYPE_BOOL:
        bytes_put(b, yyjson_mut_is_true(v) ? "true" : "false", yyjson_mut_is_true(v) ? 4 : 5);
        break;
    default:
        if (yyjson_mut_is_int(v))
            json_put_int(b, yyjson_mut_get_sint(v));
        else
            json_put_real(b, yyjson_mut_get_real(v));
    }
}

static char *print_to_text(yyjson_mut_val *root, size_t *len)
{
    struct bytes b;
    bytes_init(&b);
    print_value(&b, root);
    *len = b.n;
    return bytes_take(&b);
}

char *json_print(const json_t *root, size_t *len)
{
    struct json_scratch scratch;
    json_scratch_init(&scratch);
    yyjson_mut_doc *d = yyjson_mut_doc_new(&scratch.alc);
    yyjson_mut_val *v = d ? json_to_value(d, root) : NULL;
    char *text = v ? print_to_text(v, len) : NULL;
    yyjson_mut_doc_free(d);
    return text;
}
