/* SPDX-License-Identifier: Apache-2.0 */
/*
 * chat_parse.c - the statements of a Jinja chat template, in one spelling.
 *
 * Templates of one family differ in quotes, white space, comments, attribute syntax and trim marks.
 * All of that is ironed out here so that chat_family.c can compare statements as strings. White
 * space control follows transformers' environment (trim_blocks, lstrip_blocks); what text would
 * remain outside the braces is only noted, since no family that we know writes any.
 *
 * Nothing is evaluated, and no input can make this fail except by memory: a template that isn't
 * well formed ends up with statements that match no family.
 */
#include "engine/chat_internal.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

/* ---- normalising one statement ----------------------------------------------------------- */

static bool is_name(int c)
{
    return isalnum((unsigned char)c) || c == '_';
}

/* s stands behind the opening quote; returns behind the closing one. */
static const char *copy_literal(const char *s, const char *end, char quote, struct tok_buf *out)
{
    tok_buf_add(out, "'", 1);
    while (s < end && *s != quote) {
        char c = *s++;
        if (c == '\\' && s < end) {
            char e = *s++;
            c = e == 'n' ? '\n' : e == 't' ? '\t' : e == 'r' ? '\r' : e;
            if (e == '\n')
                continue;               /* a continued line */
        }
        if (c == '\'')
            c = '\x01';                 /* so that a quote always ends a literal */
        tok_buf_add(out, &c, 1);
    }
    tok_buf_add(out, "'", 1);
    return s < end ? s + 1 : s;
}

static bool ends_with(const struct tok_buf *b, const char *s)
{
    size_t n = strlen(s);
    return b->len >= n && memcmp(b->p + b->len - n, s, n) == 0;
}

static void respell(struct tok_buf *out)
{
    static const struct {
        const char *from, *to;
    } same[] = {
        {".role", "['role']"}, {".content", "['content']"}, {".strip()", "|trim"},
    };
    for (size_t i = 0; i < LM_COUNT(same); i++) {
        if (ends_with(out, same[i].from)) {
            out->len -= strlen(same[i].from);
            tok_buf_add(out, same[i].to, strlen(same[i].to));
            return;
        }
    }
}

static void normalise(const char *s, const char *end, struct tok_buf *out)
{
    while (s < end) {
        bool blank = false;
        while (s < end && isspace((unsigned char)*s)) {
            blank = true;
            s++;
        }
        if (s == end)
            break;
        if (*s == '\'' || *s == '"') {
            s = copy_literal(s + 1, end, *s, out);
            continue;
        }
        if (blank && out->len && is_name(out->p[out->len - 1]) && is_name(*s))
            tok_buf_add(out, " ", 1);
        tok_buf_add(out, s, 1);
        s++;
        if (s == end || !is_name(*s))
            respell(out);
    }
}

/* ---- cutting the template ---------------------------------------------------------------- */

/* The closing mark of a tag, not one within a literal. */
static const char *find_close(const char *s, const char *end, char a)
{
    char quote = 0;
    for (; s + 1 < end; s++) {
        if (quote) {
            if (*s == '\\')
                s++;
            else if (*s == quote)
                quote = 0;
        } else if (*s == '\'' || *s == '"') {
            quote = *s;
        } else if (s[0] == a && s[1] == '}') {
            return s;
        }
    }
    return NULL;
}

static lm_status add_statement(struct chat_source *src, int kind, const char *s, const char *end,
                               struct lm_err *err)
{
    struct tok_buf out = {0};
    if (src->n == CHAT_MAX_STATEMENTS) {
        src->stray_text = true;         /* too much for anything that we know */
        return LM_OK;
    }
    normalise(s, end, &out);
    tok_buf_add(&out, "", 0);
    if (out.oom) {
        tok_buf_release(&out);
        return tok_nomem(err);
    }
    src->stmt[src->n++] = (struct chat_statement){kind, out.p, out.len};
    return LM_OK;
}

/* Text between two tags, after white space control: is anything left of it? */
static bool leaves_text(const char *s, const char *end, bool after_block, bool strip_left,
                        bool strip_right, bool before_block)
{
    if (after_block && s < end && *s == '\n')
        s++;                            /* trim_blocks */
    if (before_block) {                 /* lstrip_blocks */
        const char *p = end;
        while (p > s && (p[-1] == ' ' || p[-1] == '\t'))
            p--;
        if (p == s || p[-1] == '\n')
            end = p;
    }
    bool blank = true;
    for (const char *p = s; p < end; p++)
        blank &= isspace((unsigned char)*p) != 0;
    return s < end && !(blank && (strip_left || strip_right));
}

struct cutter {
    struct chat_source *src;
    const char *s, *end;
    bool after_block, strip_left;
};

/* c->s stands on a tag's opening brace. */
static lm_status cut_tag(struct cutter *c, struct lm_err *err)
{
    char kind = c->s[1];
    const char *from = c->s + 2;
    const char *close = kind == '#' ? memmem(from, (size_t)(c->end - from), "#}", 2)
                                    : find_close(from, c->end, kind == '{' ? '}' : '%');
    if (!close) {
        c->src->stray_text = true;
        c->s = c->end;
        return LM_OK;
    }
    const char *to = close;
    from += from < to && (*from == '-' || *from == '+');
    c->strip_left = to > from && to[-1] == '-';
    to -= c->strip_left;
    c->after_block = kind != '{';
    c->s = close + 2;
    return kind == '#' ? LM_OK
                       : add_statement(c->src, kind == '{' ? STMT_EMIT : STMT_CODE, from, to, err);
}

lm_status chat_source_parse(struct chat_source *src, const char *s, size_t n, struct lm_err *err)
{
    struct cutter c = {src, s, s + n, true, true};
    lm_status st = LM_OK;
    *src = (struct chat_source){0};
    if (n > CHAT_MAX_TEMPLATE)
        n = 0;
    src->stray_text = n == 0;
    c.end = s + n;
    src->stmt = lm_calloc(CHAT_MAX_STATEMENTS, sizeof *src->stmt);
    if (!src->stmt)
        return tok_nomem(err);
    while (c.end > c.s && c.end[-1] == '\n')
        c.end--;                        /* Jinja drops a last newline; more would be stripped */
    while (!st && c.s < c.end) {
        const char *tag = c.s;
        while (tag < c.end && !(tag + 1 < c.end && tag[0] == '{' && strchr("{%#", tag[1])))
            tag++;
        bool right = tag + 2 < c.end && tag[2] == '-';
        bool block = tag + 1 < c.end && tag[1] != '{';
        src->stray_text |= leaves_text(c.s, tag, c.after_block, c.strip_left, right, block);
        c.s = tag;
        if (tag < c.end)
            st = cut_tag(&c, err);
    }
    return st;
}

void chat_source_release(struct chat_source *src)
{
    for (int i = 0; i < src->n; i++)
        free(src->stmt[i].s);
    free(src->stmt);
    *src = (struct chat_source){0};
}

bool chat_source_has(const struct chat_source *src, const char *code)
{
    for (int i = 0; i < src->n; i++)
        if (memmem(src->stmt[i].s, src->stmt[i].n, code, strlen(code)))
            return true;
    return false;
}

/* ---- concatenations ---------------------------------------------------------------------- */

void chat_concat_release(struct chat_concat *c)
{
    for (int i = 0; i < c->n; i++)
        free(c->term[i].text);
    c->n = 0;
}

/* Neighbouring literals become one, so that '<|im_end|>' + '\n' is '<|im_end|>\n'. */
static bool add_text(struct chat_concat *c, const char *s, size_t n)
{
    struct chat_term *t = c->n ? &c->term[c->n - 1] : NULL;
    if (!t || t->kind != TERM_TEXT) {
        if (c->n == CHAT_MAX_TERMS)
            return false;
        t = &c->term[c->n++];
        *t = (struct chat_term){.kind = TERM_TEXT};
    }
    char *p = lm_reallocarray(t->text, t->len + n + 1, 1);
    if (!p)
        return false;
    t->text = p;
    memcpy(p + t->len, s, n);
    t->len += n;
    p[t->len] = '\0';
    for (size_t i = 0; i < t->len; i++)
        p[i] = p[i] == '\x01' ? '\'' : p[i];
    return true;
}

static bool add_name(struct chat_concat *c, const char *s, size_t n)
{
    static const struct {
        const char *name;
        int kind;
    } names[] = {
        {"bos_token", TERM_BOS}, {"eos_token", TERM_EOS}, {"message['role']", TERM_ROLE},
        {"message['content']", TERM_CONTENT}, {"content", TERM_CONTENT},
        {"system_message", TERM_SYSTEM}, {"messages[0]['content']", TERM_SYSTEM},
        {"date_string", TERM_DATE}, {"today", TERM_DATE},
    };
    bool trim = n > 5 && memcmp(s + n - 5, "|trim", 5) == 0;
    n -= trim ? 5 : 0;
    for (size_t i = 0; i < LM_COUNT(names) && c->n < CHAT_MAX_TERMS; i++) {
        if (strlen(names[i].name) == n && memcmp(names[i].name, s, n) == 0) {
            c->term[c->n++] = (struct chat_term){.kind = names[i].kind, .trim = trim};
            return true;
        }
    }
    return false;
}

bool chat_concat_parse(struct chat_concat *out, const char *s, size_t n)
{
    const char *end = s + n;
    *out = (struct chat_concat){.n = 0};
    while (s < end) {
        const char *to = s;
        if (*s == '\'') {
            to = memchr(s + 1, '\'', (size_t)(end - s - 1));
            if (!to || !add_text(out, s + 1, (size_t)(to - s - 1)))
                return false;
            to++;
        } else {
            while (to < end && *to != '+' && *to != '~')
                to++;
            if (!add_name(out, s, (size_t)(to - s)))
                return false;
        }
        if (to == end)
            return true;
        if (*to != '+' && *to != '~')
            return false;
        s = to + 1;
    }
    return false;
}
