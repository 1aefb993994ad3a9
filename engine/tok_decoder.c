/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_decoder.c - decoders: ByteLevel, ByteFallback, Fuse, Replace, Strip, Metaspace and Sequence.
 *
 * The reference runs each decoder over the whole list of token strings. Here the same decoders form
 * a pipeline that tokens flow through one at a time, so that decoding as a whole and streaming are
 * the same code and can't disagree. A stage passes on what can no longer change and holds the rest:
 *
 *   ByteLevel     an unfinished UTF-8 sequence (at most 3 bytes)
 *   ByteFallback  the run of byte tokens: one bad byte spoils the whole run
 *   Strip         trailing characters that would be cut if the token ended here
 *
 * Between stages a token may travel in fragments (behind Fuse and ByteLevel, which make one token
 * of all); BEGIN and END mark its first and last one. A fragment is always whole characters. Stages
 * that need whole tokens collect them first; behind Fuse that means until the end.
 */
#include "engine/tok_internal.h"

#include <stdlib.h>
#include <string.h>

#define WHERE "decoder"

enum { BEGIN = 1, END = 2, WHOLE = BEGIN | END };

static lm_status push(struct tok_decrun *r, int i, const char *s, size_t n, int flags,
                      struct lm_err *err);

/* The first fragment of a stage that makes one token of everything says BEGIN. */
static lm_status push_one(struct tok_decrun *r, int i, const char *s, size_t n, int end,
                          struct lm_err *err)
{
    struct tok_decstate *st = &r->st[i];
    int flags = (st->began ? 0 : BEGIN) | end;
    st->began = true;
    return push(r, i + 1, s, n, flags, err);
}

/* ---- stages ------------------------------------------------------------------------------ */

/* Passes on what is decided of st->held: characters, and U+FFFD for what can't become one. */
static lm_status lossy(struct tok_decrun *r, int i, bool last, struct lm_err *err)
{
    struct tok_buf *b = &r->st[i].held;
    size_t from = 0, at = 0;
    lm_status st = LM_OK;
    while (at < b->len && !st) {
        int k = tok_utf8_step((unsigned char *)b->p + at, b->len - at);
        if (k > 0) {
            at += (size_t)k;
            continue;
        }
        if (k == 0 && !last)
            break;
        if (at > from)
            st = push_one(r, i, b->p + from, at - from, 0, err);
        if (!st)
            st = push_one(r, i, TOK_REPLACEMENT, 3, 0, err);
        at = from = k ? at + (size_t)-k : b->len;
    }
    if (!st && at > from)
        st = push_one(r, i, b->p + from, at - from, 0, err);
    memmove(b->p, b->p + at, b->len - at);
    b->len -= at;
    return st;
}

/* A token that isn't all of the byte alphabet stands for its own bytes. */
static void bytelevel_bytes(const char *s, size_t n, struct tok_buf *out)
{
    size_t before = out->len;
    for (size_t at = 0; at < n;) {
        int32_t cp;
        at += (size_t)tok_utf8_next(s + at, &cp);
        int b = tok_char_to_byte(cp);
        if (b < 0) {
            out->len = before;
            tok_buf_add(out, s, n);
            return;
        }
        char c = (char)b;
        tok_buf_add(out, &c, 1);
    }
}

static lm_status bytelevel(struct tok_decrun *r, int i, const char *s, size_t n,
                           struct lm_err *err)
{
    struct tok_buf *held = &r->st[i].held;
    bytelevel_bytes(s, n, held);
    lm_status st = tok_buf_check(held, err);
    return st || held->len == 0 ? st : lossy(r, i, false, err);
}

static int hex(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 :
           c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* <0xHH> -> the byte, else -1. "<0x+A>" counts, since Rust's from_str_radix takes a sign. */
static int byte_token(const char *s, size_t n)
{
    if (n != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>')
        return -1;
    int hi = s[3] == '+' ? 0 : hex(s[3]), lo = hex(s[4]);
    return hi < 0 || lo < 0 ? -1 : hi << 4 | lo;
}

static lm_status flush_bytes(struct tok_decrun *r, int i, struct lm_err *err)
{
    struct tok_buf *b = &r->st[i].held;
    lm_status st = LM_OK;
    if (b->len && tok_utf8_check(b->p, b->len) == b->len) {
        st = push(r, i + 1, b->p, b->len, WHOLE, err);
    } else {
        for (size_t k = 0; k < b->len && !st; k++)
            st = push(r, i + 1, TOK_REPLACEMENT, 3, WHOLE, err);
    }
    tok_buf_clear(b);
    return st;
}

static lm_status bytefallback(struct tok_decrun *r, int i, const char *s, size_t n,
                              struct lm_err *err)
{
    int b = byte_token(s, n);
    if (b >= 0) {
        char c = (char)b;
        tok_buf_add(&r->st[i].held, &c, 1);
        return tok_buf_check(&r->st[i].held, err);
    }
    lm_status st = flush_bytes(r, i, err);
    return st ? st : push(r, i + 1, s, n, WHOLE, err);
}

static lm_status replace(struct tok_decrun *r, int i, const char *s, size_t n, struct lm_err *err)
{
    const struct tok_dec_op *op = &r->d->op[i];
    struct tok_buf *out = &r->st[i].scratch;
    tok_buf_clear(out);
    lm_status st = tok_pattern_replace(&op->pat, op->text, op->text_len, s, n, out, err);
    return st ? st : push(r, i + 1, out->p ? out->p : "", out->len, WHOLE, err);
}

/* held: up to `stop` trailing copies of the character, dropped if the token ends behind them. */
static lm_status strip(struct tok_decrun *r, int i, const char *s, size_t n, int flags,
                       struct lm_err *err)
{
    const struct tok_dec_op *op = &r->d->op[i];
    struct tok_decstate *st = &r->st[i];
    struct tok_buf *out = &r->st[i].scratch;
    tok_buf_clear(out);
    if (flags & BEGIN) {
        st->cut = 0;
        st->cutting = op->start > 0;
        tok_buf_clear(&st->held);
    }
    for (size_t at = 0, len; at < n; at += len) {
        len = (size_t)tok_utf8_len((unsigned char)s[at]);
        bool same = len == op->text_len && memcmp(s + at, op->text, len) == 0;
        if (st->cutting && same && st->cut < op->start) {
            st->cut++;
            continue;
        }
        st->cutting = false;
        if (!same) {
            tok_buf_add(out, st->held.p, st->held.len);
            tok_buf_clear(&st->held);
            tok_buf_add(out, s + at, len);
        } else if (st->held.len < (size_t)op->stop * len) {
            tok_buf_add(&st->held, op->text, len);
        } else {
            tok_buf_add(out, op->text, len);
        }
    }
    lm_status rc = tok_buf_check(out, err);
    if (!rc)
        rc = tok_buf_check(&st->held, err);
    if (!rc)
        rc = push(r, i + 1, out->p ? out->p : "", out->len, flags, err);
    return rc;
}

/* The first token loses the character; in all others it is a blank. */
static lm_status metaspace(struct tok_decrun *r, int i, const char *s, size_t n, int flags,
                           struct lm_err *err)
{
    const struct tok_dec_op *op = &r->d->op[i];
    struct tok_buf *out = &r->st[i].scratch;
    bool eat = op->eat_first && r->st[i].first;
    tok_buf_clear(out);
    for (size_t at = 0, len; at < n; at += len) {
        len = (size_t)tok_utf8_len((unsigned char)s[at]);
        if (len != op->pat.literal_len || memcmp(s + at, op->pat.literal, len) != 0)
            tok_buf_add(out, s + at, len);
        else if (!eat)
            tok_buf_add(out, " ", 1);
    }
    if (flags & END)
        r->st[i].first = false;
    lm_status st = tok_buf_check(out, err);
    if (!st)
        st = push(r, i + 1, out->p ? out->p : "", out->len, flags, err);
    return st;
}

/* ---- the pipeline ------------------------------------------------------------------------ */

static lm_status push_whole(struct tok_decrun *r, int i, const char *s, size_t n,
                            struct lm_err *err)
{
    switch (r->d->op[i].kind) {
    case DEC_BYTELEVEL: return bytelevel(r, i, s, n, err);
    case DEC_BYTEFALLBACK: return bytefallback(r, i, s, n, err);
    default: return replace(r, i, s, n, err);
    }
}

/* Collects the fragments of a token for a stage that wants it whole. */
static lm_status collect(struct tok_decrun *r, int i, const char *s, size_t n, int flags,
                         struct lm_err *err)
{
    struct tok_buf *part = &r->st[i].part;
    if (flags == WHOLE)
        return push_whole(r, i, s, n, err);
    tok_buf_add(part, s, n);
    lm_status st = tok_buf_check(part, err);
    if (st || !(flags & END))
        return st;
    st = push_whole(r, i, part->p ? part->p : "", part->len, err);
    tok_buf_clear(part);
    return st;
}

static lm_status push(struct tok_decrun *r, int i, const char *s, size_t n, int flags,
                      struct lm_err *err)
{
    lm_status st;
    if (i == r->d->n) {
        tok_buf_add(&r->out, s, n);
        return tok_buf_check(&r->out, err);
    }
    switch (r->d->op[i].kind) {
    case DEC_FUSE:
        return push_one(r, i, s, n, 0, err);
    case DEC_STRIP:
        return strip(r, i, s, n, flags, err);
    case DEC_METASPACE:
        return metaspace(r, i, s, n, flags, err);
    case DEC_SPACES:
        st = (flags & BEGIN) && !r->st[i].first ? push(r, i + 1, " ", 1, BEGIN, err) : LM_OK;
        r->st[i].first = false;
        return st ? st : push(r, i + 1, s, n, flags, err);
    default:
        return collect(r, i, s, n, flags, err);
    }
}

void tok_decrun_init(struct tok_decrun *r, const struct tok_decoder *d)
{
    *r = (struct tok_decrun){.d = d};
    for (int i = 0; i < d->n; i++)
        r->st[i].first = true;
}

void tok_decrun_release(struct tok_decrun *r)
{
    for (int i = 0; r->d && i < r->d->n; i++) {
        tok_buf_release(&r->st[i].held);
        tok_buf_release(&r->st[i].part);
        tok_buf_release(&r->st[i].scratch);
    }
    tok_buf_release(&r->out);
}

lm_status tok_decrun_token(struct tok_decrun *r, const char *s, size_t n, struct lm_err *err)
{
    return push(r, 0, s, n, WHOLE, err);
}

/* Front to back: what a stage lets go at the end still passes through those behind it. */
lm_status tok_decrun_finish(struct tok_decrun *r, struct lm_err *err)
{
    lm_status st = LM_OK;
    for (int i = 0; i < r->d->n && !st; i++) {
        int kind = r->d->op[i].kind;
        if (kind == DEC_BYTEFALLBACK)
            st = flush_bytes(r, i, err);
        if (kind == DEC_BYTELEVEL && r->st[i].held.len)
            st = lossy(r, i, true, err);
        if (!st && (kind == DEC_BYTELEVEL || kind == DEC_FUSE))
            st = push_one(r, i, "", 0, END, err);
    }
    return st;
}

/* ---- one token --------------------------------------------------------------------------- */

static lm_status piece_step(const struct tok_dec_op *op, const char *s, size_t n,
                            struct tok_buf *out, struct lm_err *err)
{
    int b;
    switch (op->kind) {
    case DEC_BYTELEVEL:
        bytelevel_bytes(s, n, out);
        return tok_buf_check(out, err);
    case DEC_REPLACE:
        return tok_pattern_replace(&op->pat, op->text, op->text_len, s, n, out, err);
    case DEC_METASPACE:
        return tok_pattern_replace(&op->pat, " ", 1, s, n, out, err);
    case DEC_BYTEFALLBACK:
        if ((b = byte_token(s, n)) >= 0) {
            char c = (char)b;
            tok_buf_add(out, &c, 1);
            return tok_buf_check(out, err);
        }
        break;
    default:
        break;
    }
    tok_buf_add(out, s, n);
    return tok_buf_check(out, err);
}

/* Strip and the like, which depend on the token's neighbours, are left out. Once a step has made
 * raw bytes of the token, what follows could only misread them. */
lm_status tok_decoder_piece(const struct tok_decoder *d, const char *s, size_t n,
                            struct tok_buf *out, struct lm_err *err)
{
    struct tok_buf tmp = {0};
    lm_status st = LM_OK;
    tok_buf_add(out, s, n);
    for (int i = 0; i < d->n && !st; i++) {
        const struct tok_dec_op *op = &d->op[i];
        if (tok_utf8_check(out->p, out->len) < out->len)
            break;
        tok_buf_clear(&tmp);
        st = piece_step(op, out->p, out->len, &tmp, err);
        struct tok_buf swap = *out;
        *out = tmp;
        tmp = swap;
        if (op->kind == DEC_BYTELEVEL)
            break;
    }
    tok_buf_release(&tmp);
    return st ? st : tok_buf_check(out, err);
}

/* ---- parsing ----------------------------------------------------------------------------- */

static lm_status copy_char(json_t *j, const char *key, char **out, size_t *len, struct lm_err *err)
{
    const char *s;
    size_t n;
    lm_status st = tok_json_string(j, key, WHERE, &s, &n, err);
    if (st)
        return st;
    if (n == 0 || n != (size_t)tok_utf8_len((unsigned char)s[0]))
        return lm_err_set(err, LM_FORMAT, WHERE ": \"%s\" must be one character", key);
    *out = lm_strndup(s, n);
    *len = n;
    return *out ? LM_OK : tok_nomem(err);
}

static lm_status parse_count(json_t *j, const char *key, int *out, struct lm_err *err)
{
    json_t *v = json_object_get(j, key);
    json_int_t n = json_integer_value(v);
    if (!json_is_integer(v) || n < 0 || n > 1024)
        return lm_err_set(err, LM_FORMAT, WHERE ": Strip \"%s\" must be from 0 to 1024", key);
    *out = (int)n;
    return LM_OK;
}

static lm_status parse_strip(struct tok_dec_op *op, json_t *j, struct lm_err *err)
{
    lm_status st = copy_char(j, "content", &op->text, &op->text_len, err);
    if (!st)
        st = parse_count(j, "start", &op->start, err);
    return st ? st : parse_count(j, "stop", &op->stop, err);
}

static lm_status parse_replace(struct tok_dec_op *op, json_t *j, struct lm_err *err)
{
    const char *s;
    lm_status st = tok_json_string(j, "content", WHERE, &s, &op->text_len, err);
    if (st)
        return st;
    if (!(op->text = lm_strndup(s, op->text_len)))
        return tok_nomem(err);
    return tok_pattern_parse(&op->pat, json_object_get(j, "pattern"), WHERE, err);
}

static lm_status parse_metaspace(struct tok_dec_op *op, json_t *j, struct lm_err *err)
{
    json_t *v = json_object_get(j, "prepend_scheme");
    const char *scheme = v ? json_string_value(v) : "always";
    bool prefix;
    lm_status st = tok_json_bool(j, "add_prefix_space", true, WHERE, &prefix, err);
    if (!st && (!scheme || (strcmp(scheme, "always") != 0 && strcmp(scheme, "first") != 0 &&
                            strcmp(scheme, "never") != 0)))
        st = lm_err_set(err, LM_UNSUPPORTED, WHERE ": Metaspace prepend_scheme \"%.64s\" is not "
                        "supported", scheme ? scheme : "(not a string)");
    if (st)
        return st;
    op->eat_first = prefix && strcmp(scheme, "never") != 0;
    return copy_char(j, "replacement", &op->pat.literal, &op->pat.literal_len, err);
}

static lm_status parse_one(void *ctx, json_t *j, const char *type, struct lm_err *err)
{
    struct tok_decoder *d = ctx;
    static const char *const known[] = {"ByteLevel", "ByteFallback", "Fuse", "Replace", "Strip",
                                        "Metaspace"};
    size_t i = 0;
    while (i < LM_COUNT(known) && strcmp(type, known[i]) != 0)
        i++;
    if (i == LM_COUNT(known))
        return tok_unsupported(err, WHERE, type);
    if (d->n == TOK_MAX_STAGES)
        return lm_err_set(err, LM_UNSUPPORTED, WHERE ": more than %d steps", TOK_MAX_STAGES);
    struct tok_dec_op *op = &d->op[d->n++];
    op->kind = (int)i;                          /* in the order of the enum */
    switch (op->kind) {
    case DEC_REPLACE: return parse_replace(op, j, err);
    case DEC_STRIP: return parse_strip(op, j, err);
    case DEC_METASPACE: return parse_metaspace(op, j, err);
    default: return LM_OK;
    }
}

lm_status tok_decoder_parse(struct tok_decoder *d, json_t *j, struct lm_err *err)
{
    if (j && !json_is_null(j))
        return tok_json_parts(j, "decoders", WHERE, parse_one, d, err);
    d->op[d->n++].kind = DEC_SPACES;
    return LM_OK;
}

void tok_decoder_release(struct tok_decoder *d)
{
    for (int i = 0; i < d->n; i++) {
        free(d->op[i].text);
        tok_pattern_release(&d->op[i].pat);
    }
    d->n = 0;
}
