/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_pretok.c - pre-tokenizers: ByteLevel, Split, Metaspace, Digits, Whitespace and Sequence.
 *
 * At load every pre-tokenizer is lowered to a list of four operations, so that the work has one
 * shape: PREFIX_SPACE, METASPACE and BYTES rewrite the text of each piece, SPLIT cuts pieces.
 *
 *   ByteLevel  = [PREFIX_SPACE] [SPLIT by GPT-2's regex] BYTES
 *   Metaspace  = METASPACE [SPLIT by its character, merged with next]
 *   Digits     = SPLIT by numeric characters       Whitespace = SPLIT by runs of \w, of neither
 *
 * A rewriting operation fills the other of two text buffers; a cutting one leaves the text and
 * fills the other of two piece lists. Empty pieces vanish, as in the reference.
 */
#include "engine/tok_internal.h"

#include <stdlib.h>
#include <string.h>

#define WHERE "pre_tokenizer"

static const char GPT2_REGEX[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

/* ---- pieces ------------------------------------------------------------------------------ */

static lm_status pieces_add(struct tok_pieces *p, size_t off, size_t len, bool flag,
                            struct lm_err *err)
{
    if (p->n == p->cap) {
        size_t cap = p->cap ? p->cap * 2 : 64;
        void *v = lm_reallocarray(p->v, cap, sizeof *p->v);
        if (!v)
            return tok_nomem(err);
        p->v = v;
        p->cap = cap;
    }
    p->v[p->n++] = (struct tok_piece){off, len, flag};
    return LM_OK;
}

void tok_prework_release(struct tok_prework *w)
{
    tok_buf_release(&w->text);
    tok_buf_release(&w->text2);
    free(w->pieces.v);
    free(w->pieces2.v);
    free(w->spans.v);
    for (int i = 0; i < TOK_MAX_STAGES; i++)
        tok_match_release(&w->it[i]);
    *w = (struct tok_prework){0};
}

/* ---- rewriting --------------------------------------------------------------------------- */

static void metaspace(const struct tok_pre_op *op, const char *s, size_t n, bool at_start,
                      struct tok_buf *out)
{
    const char *rep = op->pat.literal;
    size_t len = op->pat.literal_len;
    bool has = (n >= len && memcmp(s, rep, len) == 0) || (n && s[0] == ' ');
    if (!has && (op->scheme == META_ALWAYS || (op->scheme == META_FIRST && at_start)))
        tok_buf_add(out, rep, len);
    for (const char *end = s + n, *blank; s < end; s = blank + 1) {
        blank = memchr(s, ' ', (size_t)(end - s));
        tok_buf_add(out, s, (size_t)((blank ? blank : end) - s));
        if (!blank)
            break;
        tok_buf_add(out, rep, len);
    }
}

static void map_bytes(const char *s, size_t n, struct tok_buf *out)
{
    for (size_t i = 0; i < n; i++) {
        unsigned char b = (unsigned char)s[i];
        if (b > ' ' && b < 0x7F)
            tok_buf_add(out, s + i, 1);
        else
            tok_buf_add_cp(out, tok_byte_to_char(b));
    }
}

static lm_status rewrite(const struct tok_pre_op *op, struct tok_prework *w, struct lm_err *err)
{
    tok_buf_clear(&w->text2);
    for (size_t i = 0; i < w->pieces.n; i++) {
        struct tok_piece *p = &w->pieces.v[i];
        const char *s = w->text.p + p->off;
        size_t off = w->text2.len;
        if (op->kind == PRE_METASPACE) {
            metaspace(op, s, p->len, p->at_start, &w->text2);
        } else if (op->kind == PRE_BYTES) {
            map_bytes(s, p->len, &w->text2);
        } else {
            if (s[0] != ' ')
                tok_buf_add(&w->text2, " ", 1);
            tok_buf_add(&w->text2, s, p->len);
        }
        p->off = off;
        p->len = w->text2.len - off;
    }
    struct tok_buf swap = w->text;
    w->text = w->text2;
    w->text2 = swap;
    return tok_buf_check(&w->text, err);
}

/* ---- cutting ----------------------------------------------------------------------------- */

static lm_status span_add(struct tok_prework *w, size_t from, size_t to, bool match,
                          struct lm_err *err)
{
    return pieces_add(&w->spans, from, to - from, match, err);
}

/* Fills w->spans: the whole piece as matches (flag true) and what lies between them. */
static lm_status spans_pattern(struct tok_match_iter *it, struct tok_prework *w, const char *s,
                               size_t n, struct lm_err *err)
{
    size_t done = 0, start, end;
    lm_status st = LM_OK;
    tok_match_text(it, s, n);
    while (!st && tok_match_next(it, &start, &end, err)) {
        if (start > done)
            st = span_add(w, done, start, false, err);
        if (!st)
            st = span_add(w, start, end, true, err);
        done = end;
    }
    if (!st)
        st = it->status;
    return st || done == n ? st : span_add(w, done, n, false, err);
}

/* Each numeric character is a match of its own. */
static lm_status spans_numeric(struct tok_prework *w, const char *s, size_t n, struct lm_err *err)
{
    size_t done = 0;
    int32_t cp;
    lm_status st = LM_OK;
    for (size_t i = 0, len; i < n && !st; i += len) {
        len = (size_t)tok_utf8_next(s + i, &cp);
        if (!tok_is_numeric(cp))
            continue;
        if (i > done)
            st = span_add(w, done, i, false, err);
        if (!st)
            st = span_add(w, i, i + len, true, err);
        done = i + len;
    }
    return st || done == n ? st : span_add(w, done, n, false, err);
}

/* Runs of word characters and runs of what is neither word nor space are matches. */
static lm_status spans_word(struct tok_prework *w, const char *s, size_t n, struct lm_err *err)
{
    size_t from = 0;
    int kind = -1;
    lm_status st = LM_OK;
    for (size_t i = 0, len; i < n && !st; i += len) {
        int32_t cp;
        len = (size_t)tok_utf8_next(s + i, &cp);
        int k = tok_is_word(cp) ? 1 : tok_is_space(cp) ? 0 : 2;
        if (k != kind && i > from) {
            st = span_add(w, from, i, kind != 0, err);
            from = i;
        }
        kind = k;
    }
    return st || from == n ? st : span_add(w, from, n, kind != 0, err);
}

static lm_status keep(struct tok_prework *w, size_t base, bool base_start, size_t off, size_t len,
                      struct lm_err *err)
{
    return len ? pieces_add(&w->pieces2, base + off, len, base_start && off == 0, err) : LM_OK;
}

/* Joins spans into pieces. PREVIOUS: a match goes to what precedes it, unless that ended in a match
 * too. NEXT is the same seen from the end. CONTIGUOUS: neighbours of one kind are one piece. */
static lm_status join_spans(const struct tok_pre_op *op, struct tok_prework *w, size_t base,
                            bool start, struct lm_err *err)
{
    struct tok_piece *v = w->spans.v;
    size_t n = w->spans.n, from = 0;
    lm_status st = LM_OK;
    for (size_t i = 0; i < n && !st; i++) {
        bool cut = true;                        /* between span i and i + 1 */
        bool match = v[i].at_start, next = i + 1 < n && v[i + 1].at_start;
        if (op->behavior == SPLIT_REMOVED && match) {
            from = i + 1;
            continue;
        }
        if (i + 1 < n && op->behavior == SPLIT_CONTIGUOUS)
            cut = match != next;
        else if (i + 1 < n && op->behavior == SPLIT_PREVIOUS)
            cut = !(next && !match);
        else if (i + 1 < n && op->behavior == SPLIT_NEXT)
            cut = !(match && !next);
        if (!cut)
            continue;
        st = keep(w, base, start, v[from].off, v[i].off + v[i].len - v[from].off, err);
        from = i + 1;
    }
    return st;
}

static lm_status cut(const struct tok_pre_op *op, struct tok_match_iter *it, struct tok_prework *w,
                     struct lm_err *err)
{
    lm_status st = tok_match_init(it, &op->pat, err);
    w->pieces2.n = 0;
    for (size_t i = 0; i < w->pieces.n && !st; i++) {
        struct tok_piece p = w->pieces.v[i];
        const char *s = w->text.p + p.off;
        w->spans.n = 0;
        if (op->by == SPLIT_PATTERN)
            st = spans_pattern(it, w, s, p.len, err);
        else if (op->by == SPLIT_NUMERIC)
            st = spans_numeric(w, s, p.len, err);
        else
            st = spans_word(w, s, p.len, err);
        for (size_t k = 0; op->invert && k < w->spans.n; k++)
            w->spans.v[k].at_start = !w->spans.v[k].at_start;
        if (!st)
            st = join_spans(op, w, p.off, p.at_start, err);
    }
    struct tok_pieces swap = w->pieces;
    w->pieces = w->pieces2;
    w->pieces2 = swap;
    return st;
}

lm_status tok_pretokenize(const struct tok_pretok *pt, struct tok_prework *w, const char *s,
                          size_t n, bool at_start, struct lm_err *err)
{
    tok_buf_clear(&w->text);
    tok_buf_add(&w->text, s, n);
    w->pieces.n = 0;
    lm_status st = tok_buf_check(&w->text, err);
    if (!st && n)
        st = pieces_add(&w->pieces, 0, n, at_start, err);
    for (int i = 0; i < pt->n && !st; i++) {
        const struct tok_pre_op *op = &pt->op[i];
        st = op->kind == PRE_SPLIT ? cut(op, &w->it[i], w, err) : rewrite(op, w, err);
    }
    return st;
}

/* ---- parsing ----------------------------------------------------------------------------- */

static struct tok_pre_op *add_op(struct tok_pretok *pt, int kind, struct lm_err *err)
{
    if (pt->n == TOK_MAX_STAGES) {
        lm_err_set(err, LM_UNSUPPORTED, WHERE ": more than %d steps", TOK_MAX_STAGES);
        return NULL;
    }
    struct tok_pre_op *op = &pt->op[pt->n++];
    *op = (struct tok_pre_op){.kind = kind};
    return op;
}

static lm_status parse_bytelevel(struct tok_pretok *pt, json_t *j, struct lm_err *err)
{
    bool prefix, regex;
    lm_status st = tok_json_bool(j, "add_prefix_space", -1, WHERE, &prefix, err);
    if (!st)
        st = tok_json_bool(j, "use_regex", true, WHERE, &regex, err);
    if (st)
        return st;
    if (prefix && !add_op(pt, PRE_PREFIX_SPACE, err))
        return LM_UNSUPPORTED;
    if (regex) {
        struct tok_pre_op *op = add_op(pt, PRE_SPLIT, err);
        if (!op)
            return LM_UNSUPPORTED;
        op->behavior = SPLIT_ISOLATED;
        if ((st = tok_pattern_regex(&op->pat, GPT2_REGEX, WHERE, err)))
            return st;
    }
    return add_op(pt, PRE_BYTES, err) ? LM_OK : LM_UNSUPPORTED;
}

static lm_status parse_behavior(struct tok_pre_op *op, json_t *j, struct lm_err *err)
{
    static const char *const names[] = {"Removed", "Isolated", "MergedWithPrevious",
                                        "MergedWithNext", "Contiguous"};
    const char *s;
    size_t n;
    lm_status st = tok_json_string(j, "behavior", WHERE, &s, &n, err);
    if (st)
        return st;
    for (size_t i = 0; i < LM_COUNT(names); i++) {
        if (strcmp(s, names[i]) == 0) {
            op->behavior = (int)i;              /* in the order of the enum */
            return LM_OK;
        }
    }
    return lm_err_set(err, LM_UNSUPPORTED, WHERE ": Split behavior \"%.64s\" is not supported", s);
}

static lm_status parse_split(struct tok_pretok *pt, json_t *j, struct lm_err *err)
{
    struct tok_pre_op *op = add_op(pt, PRE_SPLIT, err);
    if (!op)
        return LM_UNSUPPORTED;
    lm_status st = tok_pattern_parse(&op->pat, json_object_get(j, "pattern"), WHERE, err);
    if (!st)
        st = parse_behavior(op, j, err);
    if (!st)
        st = tok_json_bool(j, "invert", -1, WHERE, &op->invert, err);
    return st;
}

/* `replacement` must be one character. */
static lm_status parse_replacement(struct tok_pattern *p, json_t *j, struct lm_err *err)
{
    const char *s;
    size_t n;
    lm_status st = tok_json_string(j, "replacement", WHERE, &s, &n, err);
    if (st)
        return st;
    if (n == 0 || n != (size_t)tok_utf8_len((unsigned char)s[0]))
        return lm_err_set(err, LM_FORMAT, WHERE ": Metaspace \"replacement\" must be one "
                          "character");
    p->literal = lm_strndup(s, n);
    p->literal_len = n;
    return p->literal ? LM_OK : tok_nomem(err);
}

/* "add_prefix_space": false is the old spelling of "never". */
static lm_status parse_scheme(json_t *j, int *scheme, struct lm_err *err)
{
    static const char *const names[] = {"always", "first", "never"};
    json_t *v = json_object_get(j, "prepend_scheme");
    const char *s = v ? json_string_value(v) : "always";
    bool prefix;
    lm_status st = tok_json_bool(j, "add_prefix_space", true, WHERE, &prefix, err);
    if (st)
        return st;
    for (size_t i = 0; s && i < LM_COUNT(names); i++) {
        if (strcmp(s, names[i]) == 0) {
            *scheme = (int)i;                   /* in the order of the enum */
            if (!prefix && i != META_NEVER)
                return lm_err_set(err, LM_FORMAT, WHERE ": Metaspace add_prefix_space = false and "
                                  "prepend_scheme = \"%s\" contradict each other", s);
            return LM_OK;
        }
    }
    return lm_err_set(err, LM_UNSUPPORTED, WHERE ": Metaspace prepend_scheme \"%.64s\" is not "
                      "supported", s ? s : "(not a string)");
}

static lm_status parse_metaspace(struct tok_pretok *pt, json_t *j, struct lm_err *err)
{
    bool split;
    int scheme = META_ALWAYS;
    struct tok_pre_op *op = add_op(pt, PRE_METASPACE, err);
    if (!op)
        return LM_UNSUPPORTED;
    lm_status st = parse_replacement(&op->pat, j, err);
    if (!st)
        st = parse_scheme(j, &scheme, err);
    op->scheme = scheme;
    if (!st)
        st = tok_json_bool(j, "split", true, WHERE, &split, err);
    if (st || !split)
        return st;
    if (!(op = add_op(pt, PRE_SPLIT, err)))
        return LM_UNSUPPORTED;
    op->behavior = SPLIT_NEXT;
    return parse_replacement(&op->pat, j, err);
}

static lm_status parse_digits(struct tok_pretok *pt, json_t *j, struct lm_err *err)
{
    bool individual;
    lm_status st = tok_json_bool(j, "individual_digits", -1, WHERE, &individual, err);
    if (st)
        return st;
    struct tok_pre_op *op = add_op(pt, PRE_SPLIT, err);
    if (!op)
        return LM_UNSUPPORTED;
    op->by = SPLIT_NUMERIC;
    op->behavior = individual ? SPLIT_ISOLATED : SPLIT_CONTIGUOUS;
    return LM_OK;
}

static lm_status parse_whitespace(struct tok_pretok *pt, struct lm_err *err)
{
    struct tok_pre_op *op = add_op(pt, PRE_SPLIT, err);
    if (!op)
        return LM_UNSUPPORTED;
    op->by = SPLIT_WORD;
    op->behavior = SPLIT_REMOVED;
    op->invert = true;
    return LM_OK;
}

static lm_status parse_one(void *ctx, json_t *j, const char *type, struct lm_err *err)
{
    struct tok_pretok *pt = ctx;
    if (strcmp(type, "ByteLevel") == 0)
        return parse_bytelevel(pt, j, err);
    if (strcmp(type, "Split") == 0)
        return parse_split(pt, j, err);
    if (strcmp(type, "Metaspace") == 0)
        return parse_metaspace(pt, j, err);
    if (strcmp(type, "Digits") == 0)
        return parse_digits(pt, j, err);
    if (strcmp(type, "Whitespace") == 0)
        return parse_whitespace(pt, err);
    return tok_unsupported(err, WHERE, type);
}

lm_status tok_pretok_parse(struct tok_pretok *pt, json_t *j, struct lm_err *err)
{
    return tok_json_parts(j, "pretokenizers", WHERE, parse_one, pt, err);
}

bool tok_pretok_needs_start(const struct tok_pretok *pt)
{
    for (int i = 0; i < pt->n; i++)
        if (pt->op[i].kind == PRE_METASPACE && pt->op[i].scheme == META_FIRST)
            return true;
    return false;
}

void tok_pretok_release(struct tok_pretok *pt)
{
    for (int i = 0; i < pt->n; i++)
        tok_pattern_release(&pt->op[i].pat);
    pt->n = 0;
}
