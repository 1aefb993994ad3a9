/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_util.c - growing buffers, UTF-8, and reading tokenizer.json's objects with clear errors.
 *
 * Buffers remember a failed allocation instead of reporting each one: writers stay readable and
 * tok_buf_check() is called once, before the result is used. Nothing here keeps state.
 */
#include "engine/tok_internal.h"

#include <stdlib.h>
#include <string.h>

/* ---- buffers ----------------------------------------------------------------------------- */

void tok_buf_release(struct tok_buf *b)
{
    free(b->p);
    *b = (struct tok_buf){0};
}

void tok_buf_clear(struct tok_buf *b)
{
    b->len = 0;
}

static bool buf_grow(struct tok_buf *b, size_t n)
{
    if (n > TOK_MAX_TEXT || b->len + n > 4 * TOK_MAX_TEXT)
        return false;
    size_t cap = b->cap ? b->cap : 64;
    while (cap < b->len + n + 1)
        cap *= 2;
    char *p = lm_reallocarray(b->p, cap, 1);
    if (!p)
        return false;
    b->p = p;
    b->cap = cap;
    return true;
}

/* One byte behind the contents is always there, for a NUL. */
void tok_buf_add(struct tok_buf *b, const void *p, size_t n)
{
    if (b->oom || ((b->len + n + 1 > b->cap) && !buf_grow(b, n))) {
        b->oom = true;
        return;
    }
    if (n)
        memcpy(b->p + b->len, p, n);
    b->len += n;
    b->p[b->len] = '\0';
}

void tok_buf_add_cp(struct tok_buf *b, int32_t cp)
{
    char c[4];
    int n;
    if (cp < 0x80) {
        c[0] = (char)cp;
        n = 1;
    } else if (cp < 0x800) {
        c[0] = (char)(0xC0 | cp >> 6);
        c[1] = (char)(0x80 | (cp & 0x3F));
        n = 2;
    } else if (cp < 0x10000) {
        c[0] = (char)(0xE0 | cp >> 12);
        c[1] = (char)(0x80 | (cp >> 6 & 0x3F));
        c[2] = (char)(0x80 | (cp & 0x3F));
        n = 3;
    } else {
        c[0] = (char)(0xF0 | cp >> 18);
        c[1] = (char)(0x80 | (cp >> 12 & 0x3F));
        c[2] = (char)(0x80 | (cp >> 6 & 0x3F));
        c[3] = (char)(0x80 | (cp & 0x3F));
        n = 4;
    }
    tok_buf_add(b, c, (size_t)n);
}

lm_status tok_nomem(struct lm_err *err)
{
    return lm_err_set(err, LM_NOMEM, "out of memory in the tokenizer");
}

lm_status tok_buf_check(const struct tok_buf *b, struct lm_err *err)
{
    return b->oom ? tok_nomem(err) : LM_OK;
}

/* ---- ids --------------------------------------------------------------------------------- */

lm_status tok_ids_add(struct token_ids *t, int32_t id, struct lm_err *err)
{
    if (t->n == t->cap) {
        int cap = t->cap ? t->cap : 64;
        if (cap > INT32_MAX / 2)
            return lm_err_set(err, LM_TOO_LARGE, "a text of more than %d tokens", t->n);
        cap = t->cap ? cap * 2 : cap;
        int32_t *p = lm_reallocarray(t->id, (size_t)cap, sizeof *p);
        if (!p)
            return tok_nomem(err);
        t->id = p;
        t->cap = cap;
    }
    t->id[t->n++] = id;
    return LM_OK;
}

void token_ids_release(struct token_ids *t)
{
    free(t->id);
    *t = (struct token_ids){0};
}

/* ---- UTF-8 ------------------------------------------------------------------------------- */

int tok_utf8_len(unsigned char lead)
{
    return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

int tok_utf8_next(const char *s, int32_t *cp)
{
    const unsigned char *u = (const unsigned char *)s;
    if (u[0] < 0x80) {
        *cp = u[0];
        return 1;
    }
    if (u[0] < 0xE0) {
        *cp = (u[0] & 0x1F) << 6 | (u[1] & 0x3F);
        return 2;
    }
    if (u[0] < 0xF0) {
        *cp = (u[0] & 0x0F) << 12 | (u[1] & 0x3F) << 6 | (u[2] & 0x3F);
        return 3;
    }
    *cp = (u[0] & 0x07) << 18 | (u[1] & 0x3F) << 12 | (u[2] & 0x3F) << 6 | (u[3] & 0x3F);
    return 4;
}

/* Table 3-7 of the Unicode standard: only the second byte's range depends on the first. */
int tok_utf8_step(const unsigned char *s, size_t n)
{
    unsigned char c = s[0];
    if (c < 0x80)
        return 1;
    if (c < 0xC2 || c > 0xF4)
        return -1;
    int len = c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
    unsigned char lo = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80;
    unsigned char hi = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
    for (int i = 1; i < len; i++) {
        if ((size_t)i == n)
            return 0;
        if (s[i] < lo || s[i] > hi)
            return -i;
        lo = 0x80;
        hi = 0xBF;
    }
    return len;
}

size_t tok_utf8_check(const char *s, size_t n)
{
    size_t i = 0;
    while (i < n) {
        uint64_t w;
        if (n - i >= 8 && (memcpy(&w, s + i, 8), !(w & 0x8080808080808080u))) {
            i += 8;
            continue;
        }
        int k = tok_utf8_step((const unsigned char *)s + i, n - i);
        if (k <= 0)
            return i;
        i += (size_t)k;
    }
    return n;
}

/* ---- the GPT-2 byte alphabet ------------------------------------------------------------- */

static bool byte_is_printable(int b)
{
    return (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
}

/* The others, 0..32, 127..160 and 173, become U+0100 and up, in order. */
int32_t tok_byte_to_char(unsigned char b)
{
    if (byte_is_printable(b))
        return b;
    return 0x100 + (b <= 0x20 ? b : b == 0xAD ? 67 : b - 0x7F + 33);
}

int tok_char_to_byte(int32_t cp)
{
    if (cp < 0x100)
        return byte_is_printable(cp) ? cp : -1;
    if (cp > 0x100 + 67)
        return -1;
    int k = cp - 0x100;
    return k <= 0x20 ? k : k == 67 ? 0xAD : k - 33 + 0x7F;
}

/* ---- JSON -------------------------------------------------------------------------------- */

/* The "type" of a component, or NULL after filling err. */
static const char *type_of(json_t *j, const char *where, struct lm_err *err)
{
    const char *type = json_string_value(json_object_get(j, "type"));
    if (!type)
        lm_err_set(err, LM_FORMAT, "%s: an object with a \"type\" is expected", where);
    return type;
}

lm_status tok_json_bool(json_t *j, const char *key, int def, const char *where, bool *out,
                        struct lm_err *err)
{
    json_t *v = json_object_get(j, key);
    if ((!v || json_is_null(v)) && def >= 0) {
        *out = def;
        return LM_OK;
    }
    if (!json_is_boolean(v))
        return lm_err_set(err, LM_FORMAT, "%s: \"%s\" must be true or false", where, key);
    *out = json_is_true(v);
    return LM_OK;
}

lm_status tok_json_array(json_t *j, const char *key, const char *where, json_t **out,
                         struct lm_err *err)
{
    *out = json_object_get(j, key);
    if (!json_is_array(*out))
        return lm_err_set(err, LM_FORMAT, "%s: \"%s\" must be an array", where, key);
    return LM_OK;
}

struct parts {
    const char *key, *where;
    tok_part *part;
    void *ctx;
};

static lm_status each_part(const struct parts *p, json_t *j, int depth, struct lm_err *err)
{
    const char *type = type_of(j, p->where, err);
    json_t *list, *v;
    size_t i;
    if (!type)
        return LM_FORMAT;
    if (strcmp(type, "Sequence") != 0)
        return p->part(p->ctx, j, type, err);
    if (depth == TOK_MAX_DEPTH)
        return lm_err_set(err, LM_UNSUPPORTED, "%s: Sequence nested too deeply", p->where);
    lm_status st = tok_json_array(j, p->key, p->where, &list, err);
    if (st)
        return st;
    json_array_foreach(list, i, v) {
        if ((st = each_part(p, v, depth + 1, err)))
            return st;
    }
    return LM_OK;
}

lm_status tok_json_parts(json_t *j, const char *key, const char *where, tok_part *part, void *ctx,
                         struct lm_err *err)
{
    const struct parts p = { key, where, part, ctx };
    return !j || json_is_null(j) ? LM_OK : each_part(&p, j, 0, err);
}

lm_status tok_json_string(json_t *j, const char *key, const char *where, const char **s,
                          size_t *n, struct lm_err *err)
{
    json_t *v = json_object_get(j, key);
    if (!json_is_string(v))
        return lm_err_set(err, LM_FORMAT, "%s: \"%s\" must be a string", where, key);
    *s = json_string_value(v);
    *n = json_string_length(v);
    return LM_OK;
}

lm_status tok_unsupported(struct lm_err *err, const char *where, const char *type)
{
    return lm_err_set(err, LM_UNSUPPORTED,
                      "%s: type \"%s\" is not supported; docs/tokenizers.md lists what is", where,
                      type);
}
