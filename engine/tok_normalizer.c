/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_normalizer.c - normalizers: NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace, Strip and
 * Sequence of these.
 *
 * A Sequence is flattened at load. The Unicode forms come from utf8proc; code points that are newer
 * than the reference's tables are passed through untouched (tok_is_norm_inert), which is what the
 * reference does with what it does not know.
 */
#include "engine/tok_internal.h"

#include <stdlib.h>
#include <string.h>

#include <utf8proc.h>

#define WHERE "normalizer"

/* ---- Unicode forms ----------------------------------------------------------------------- */

static utf8proc_option_t form_options(int kind)
{
    switch (kind) {
    case NORM_NFC: return UTF8PROC_STABLE | UTF8PROC_COMPOSE;
    case NORM_NFD: return UTF8PROC_STABLE | UTF8PROC_DECOMPOSE;
    case NORM_NFKC: return UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT;
    default: return UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT;
    }
}

/* A stretch without inert characters. */
static lm_status form_run(int kind, const char *s, size_t n, struct tok_buf *out,
                          struct lm_err *err)
{
    if (n == 0)
        return LM_OK;
    utf8proc_uint8_t *r = NULL;
    utf8proc_ssize_t len = utf8proc_map((const utf8proc_uint8_t *)s, (utf8proc_ssize_t)n, &r,
                                        form_options(kind));
    if (len == UTF8PROC_ERROR_NOMEM)
        return tok_nomem(err);
    if (len < 0)
        return lm_err_set(err, LM_INTERNAL, WHERE ": %s", utf8proc_errmsg(len));
    tok_buf_add(out, r, (size_t)len);
    free(r);
    return LM_OK;
}

static bool is_ascii(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)s[i] >= 0x80)
            return false;
    return true;
}

static lm_status unicode_form(int kind, const char *s, size_t n, struct tok_buf *out,
                              struct lm_err *err)
{
    if (is_ascii(s, n)) {
        tok_buf_add(out, s, n);
        return LM_OK;
    }
    size_t from = 0;
    for (size_t i = 0; i < n;) {
        int32_t cp;
        size_t len = (size_t)tok_utf8_next(s + i, &cp);
        if (cp >= 0x80 && tok_is_norm_inert(cp)) {
            lm_status st = form_run(kind, s + from, i - from, out, err);
            if (st)
                return st;
            tok_buf_add(out, s + i, len);
            from = i + len;
        }
        i += len;
    }
    return form_run(kind, s + from, n - from, out, err);
}

/* ---- the others -------------------------------------------------------------------------- */

static void lowercase(const char *s, size_t n, struct tok_buf *out)
{
    for (size_t i = 0; i < n;) {
        int32_t cp, low[2];
        i += (size_t)tok_utf8_next(s + i, &cp);
        int k = tok_lower(cp, low);
        for (int l = 0; l < k; l++)
            tok_buf_add_cp(out, low[l]);
    }
}

static void strip(const struct tok_norm_op *op, const char *s, size_t n, struct tok_buf *out)
{
    size_t from = 0, to = n;
    int32_t cp;
    while (op->left && from < n) {
        size_t len = (size_t)tok_utf8_next(s + from, &cp);
        if (!tok_is_space(cp))
            break;
        from += len;
    }
    while (op->right && to > from) {
        size_t at = to - 1;
        while (((unsigned char)s[at] & 0xC0) == 0x80)
            at--;
        tok_utf8_next(s + at, &cp);
        if (!tok_is_space(cp))
            break;
        to = at;
    }
    tok_buf_add(out, s + from, to - from);
}

static lm_status apply(const struct tok_norm_op *op, const char *s, size_t n, struct tok_buf *out,
                       struct lm_err *err)
{
    switch (op->kind) {
    case NORM_NFC: case NORM_NFD: case NORM_NFKC: case NORM_NFKD:
        return unicode_form(op->kind, s, n, out, err);
    case NORM_LOWER:
        lowercase(s, n, out);
        return LM_OK;
    case NORM_PREPEND:
        if (n)
            tok_buf_add(out, op->text, op->text_len);
        tok_buf_add(out, s, n);
        return LM_OK;
    case NORM_REPLACE:
        return tok_pattern_replace(&op->pat, op->text, op->text_len, s, n, out, err);
    case NORM_STRIP:
        strip(op, s, n, out);
        return LM_OK;
    }
    return lm_err_set(err, LM_INTERNAL, WHERE ": unknown operation");
}

lm_status tok_normalize(const struct tok_normalizer *nz, const char *s, size_t n,
                        struct tok_buf *out, struct tok_buf *tmp, struct lm_err *err)
{
    tok_buf_clear(out);
    if (nz->n == 0)
        tok_buf_add(out, s, n);
    for (int i = 0; i < nz->n; i++) {
        tok_buf_clear(out);
        lm_status st = apply(&nz->op[i], s, n, out, err);
        if (!st)
            st = tok_buf_check(out, err);
        if (st)
            return st;
        if (i + 1 < nz->n) {            /* the result is the next one's input */
            struct tok_buf swap = *out;
            *out = *tmp;
            *tmp = swap;
            s = tmp->p ? tmp->p : "";
            n = tmp->len;
        }
    }
    return tok_buf_check(out, err);
}

/* ---- parsing ----------------------------------------------------------------------------- */

static lm_status copy_text(struct tok_norm_op *op, json_t *j, const char *key, struct lm_err *err)
{
    const char *s;
    lm_status st = tok_json_string(j, key, WHERE, &s, &op->text_len, err);
    if (st)
        return st;
    op->text = lm_strndup(s, op->text_len);
    return op->text ? LM_OK : tok_nomem(err);
}

static lm_status parse_strip(struct tok_norm_op *op, json_t *j, struct lm_err *err)
{
    lm_status st = tok_json_bool(j, "strip_left", -1, WHERE, &op->left, err);
    return st ? st : tok_json_bool(j, "strip_right", -1, WHERE, &op->right, err);
}

static lm_status parse_one(void *ctx, json_t *j, const char *type, struct lm_err *err)
{
    struct tok_normalizer *nz = ctx;
    static const struct {
        const char *type;
        int kind;
    } known[] = {
        {"NFC", NORM_NFC}, {"NFD", NORM_NFD}, {"NFKC", NORM_NFKC}, {"NFKD", NORM_NFKD},
        {"Lowercase", NORM_LOWER}, {"Prepend", NORM_PREPEND}, {"Replace", NORM_REPLACE},
        {"Strip", NORM_STRIP},
    };
    size_t i = 0;
    while (i < LM_COUNT(known) && strcmp(type, known[i].type) != 0)
        i++;
    if (i == LM_COUNT(known))
        return tok_unsupported(err, WHERE, type);
    if (nz->n == TOK_MAX_STAGES)
        return lm_err_set(err, LM_UNSUPPORTED, WHERE ": more than %d steps", TOK_MAX_STAGES);
    struct tok_norm_op *op = &nz->op[nz->n++];
    op->kind = known[i].kind;
    if (op->kind == NORM_PREPEND)
        return copy_text(op, j, "prepend", err);
    if (op->kind == NORM_STRIP)
        return parse_strip(op, j, err);
    if (op->kind != NORM_REPLACE)
        return LM_OK;
    lm_status st = copy_text(op, j, "content", err);
    return st ? st : tok_pattern_parse(&op->pat, json_object_get(j, "pattern"), WHERE, err);
}

lm_status tok_normalizer_parse(struct tok_normalizer *nz, json_t *j, struct lm_err *err)
{
    return tok_json_parts(j, "normalizers", WHERE, parse_one, nz, err);
}

void tok_normalizer_release(struct tok_normalizer *nz)
{
    for (int i = 0; i < nz->n; i++) {
        free(nz->op[i].text);
        tok_pattern_release(&nz->op[i].pat);
    }
    nz->n = 0;
}
