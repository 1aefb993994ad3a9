/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_regex.c - the patterns of tokenizer.json, run by PCRE2 as the reference's Oniguruma runs
 * them.
 *
 * The two dialects agree on nearly all that tokenizers use, and differ silently on the rest. So a
 * regex is translated before it is compiled, and what we do not know to mean the same is refused:
 *
 *   \s \S      spelled out as Unicode White_Space (PCRE2 adds U+180E)
 *   \w \W      spelled out (PCRE2's has no combining marks)
 *   \p{L}      gets the code points that newer Unicode versions added (tok_unicode.c)
 *   \v, \uHHHH translated
 *   ^ $        match at lines in both (PCRE2_MULTILINE)
 *   refused    (?flags) except i, back references, \b \h \R \X \K \G ..., {n}+ {n}? {,n}, sets
 *              within sets, && and [:names:]
 *
 * A pattern is compiled once, with JIT where the machine allows it, and only read from then on.
 * Each call brings its own match data and context (tok_match_iter). Hostile text meets PCRE2's
 * match limit and a bounded JIT stack; both end in LM_TOO_LARGE, never in a hang or an overflow.
 */
#include "engine/tok_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#define MAX_REGEX 8192                  /* bytes */
#define MATCH_LIMIT 50000000            /* backtracking steps of one match */
#define HEAP_LIMIT_KIB (256 * 1024)
#define JIT_STACK_START (64 * 1024)
#define JIT_STACK_MAX (16 * 1024 * 1024)

#define SPACES "\\x{9}-\\x{D}\\x{20}\\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}"                  \
               "\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}"
#define NOT_SPACES "\\x{0}-\\x{8}\\x{E}-\\x{1F}\\x{21}-\\x{84}\\x{86}-\\x{9F}\\x{A1}-\\x{167F}" \
                   "\\x{1681}-\\x{1FFF}\\x{200B}-\\x{2027}\\x{202A}-\\x{202E}"                 \
                   "\\x{2030}-\\x{205E}\\x{2060}-\\x{2FFF}\\x{3001}-\\x{10FFFF}"
#define CIRCLED "\\x{24B6}-\\x{24E9}\\x{1F130}-\\x{1F149}\\x{1F150}-\\x{1F169}\\x{1F170}-\\x{1F189}"

/* ---- translation ------------------------------------------------------------------------- */

struct trans {
    const char *s, *end;        /* what is left of the regex */
    const char *where;
    struct tok_buf *out;
    bool in_class;
    struct lm_err *err;
};

static lm_status refuse(struct trans *t, const char *what)
{
    return lm_err_set(t->err, LM_UNSUPPORTED, "%s: %s in a regex is not supported", t->where, what);
}

static void put(struct trans *t, const char *s)
{
    tok_buf_add(t->out, s, strlen(s));
}

/* A set of characters, which brackets must surround unless they do already. */
static void open_set(struct trans *t, bool negated)
{
    if (!t->in_class)
        put(t, negated ? "[^" : "[");
}

static void close_set(struct trans *t)
{
    if (!t->in_class)
        put(t, "]");
}

/* A negated set can't be spelled within brackets. */
static lm_status put_categories(struct trans *t, const char *const *name, size_t n,
                                const char *more, bool negated)
{
    open_set(t, negated);
    for (size_t i = 0; i < n; i++) {
        put(t, "\\p{");
        put(t, name[i]);
        put(t, "}");
        tok_unicode_extra(name[i], strlen(name[i]), t->out);
    }
    put(t, more);
    close_set(t);
    return LM_OK;
}

/* s stands behind "\p" or "\P". */
static lm_status trans_property(struct trans *t, bool negated)
{
    char name[3] = "";
    const char *p = t->s, *names[] = {name};
    size_t n = 0;
    if (p < t->end && *p == '{' && ++p < t->end && *p == '^') {
        negated = !negated;
        p++;
    }
    while (p < t->end && n < 2 && *p != '}')
        name[n++] = *p++;
    struct tok_buf unused = {0};
    bool known = p < t->end && *p == '}' && tok_unicode_extra(name, n, &unused);
    tok_buf_release(&unused);
    if (!known)
        return refuse(t, "\\p of anything but a {general category}");
    if (negated && t->in_class)
        return refuse(t, "\\P within brackets");
    t->s = p + 1;
    return put_categories(t, names, 1, "", negated);
}

/* \xHH is a byte there and a code point here, so only ASCII is the same; \x{H...} is one. */
static lm_status trans_x(struct trans *t)
{
    const char *p = t->s;
    bool braced = p < t->end && *p == '{';
    p += braced;
    while (p < t->end && strchr("0123456789abcdefABCDEF", *p) && p - t->s < (braced ? 7 : 2))
        p++;
    if (braced ? p == t->end || *p != '}' || p == t->s + 1 : p != t->s + 2 || t->s[0] > '7')
        return refuse(t, "\\x other than \\x{H...} and \\x00 to \\x7F");
    p += braced;
    put(t, "\\x");
    tok_buf_add(t->out, t->s, (size_t)(p - t->s));
    t->s = p;
    return LM_OK;
}

static lm_status trans_hex(struct trans *t)
{
    char digits[8];
    size_t n = 0;
    while (n < 4 && t->s + n < t->end && strchr("0123456789abcdefABCDEF", t->s[n]))
        n++;
    if (n != 4)
        return refuse(t, "\\u without four digits");
    snprintf(digits, sizeof digits, "%.4s", t->s);
    put(t, "\\x{");
    put(t, digits);
    put(t, "}");
    t->s += 4;
    return LM_OK;
}

/* Oniguruma's \w: with marks, letter numbers and the circled letters, without the joiners. Outside
 * brackets it looks Latin-1 up in another table, which has the superscripts and fractions too. */
static lm_status trans_word(struct trans *t, bool negated)
{
    static const char *const names[] = {"L", "M", "Nd", "Nl", "Pc"};
    if (negated && t->in_class)
        return refuse(t, "\\W within brackets");
    return put_categories(t, names, LM_COUNT(names),
                          t->in_class ? CIRCLED : CIRCLED "\\xB2\\xB3\\xB9\\xBC-\\xBE", negated);
}

static lm_status trans_digit(struct trans *t, bool negated)
{
    static const char *const names[] = {"Nd"};
    if (negated && t->in_class)
        return refuse(t, "\\D within brackets");
    return put_categories(t, names, 1, "", negated);
}

static lm_status trans_space(struct trans *t, bool negated)
{
    open_set(t, false);
    put(t, negated ? NOT_SPACES : SPACES);
    close_set(t);
    return LM_OK;
}

static lm_status trans_escape(struct trans *t)
{
    if (t->s + 1 >= t->end)
        return lm_err_set(t->err, LM_FORMAT, "%s: the regex ends in a backslash", t->where);
    char c = t->s[1];
    t->s += 2;
    switch (c) {
    case 's': return trans_space(t, false);
    case 'S': return trans_space(t, true);
    case 'w': return trans_word(t, false);
    case 'W': return trans_word(t, true);
    case 'd': return trans_digit(t, false);
    case 'D': return trans_digit(t, true);
    case 'p': return trans_property(t, false);
    case 'P': return trans_property(t, true);
    case 'u': return trans_hex(t);
    case 'v': put(t, "\\x0B"); return LM_OK;
    case 'x': return trans_x(t);
    case 'n': case 'r': case 't': case 'f': case 'a': case 'e':
        break;
    case 'A': case 'z':
        if (!t->in_class)
            break;
        /* fallthrough */
    default:
        if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9')) {
            char what[] = "\\?";
            what[1] = c;
            return refuse(t, what);
        }
    }
    tok_buf_add(t->out, t->s - 2, 2);           /* a multi-byte character's rest follows as is */
    return LM_OK;
}

/* s stands on '('. */
static lm_status trans_group(struct trans *t)
{
    static const char *const allowed[] = {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:",
                                          "(?-i:"};
    size_t left = (size_t)(t->end - t->s);
    if (left > 4 && memcmp(t->s, "(?i)", 4) == 0 && t->out->len == 0) {
        put(t, "(?i)");
        t->s += 4;
        return LM_OK;
    }
    if (left < 2 || t->s[1] != '?') {
        if (left > 1 && t->s[1] == '*')
            return refuse(t, "(*verb)");
        put(t, "(?:");                          /* groups are never referred to */
        t->s++;
        return LM_OK;
    }
    for (size_t i = 0; i < LM_COUNT(allowed); i++) {
        size_t n = strlen(allowed[i]);
        if (left >= n && memcmp(t->s, allowed[i], n) == 0) {
            put(t, allowed[i]);
            t->s += n;
            return LM_OK;
        }
    }
    return refuse(t, "a (?...) other than (?: (?= (?! (?<= (?<! (?> (?i:");
}

/* s stands on '{'. What is no quantifier stands for itself, in both dialects. */
static lm_status trans_brace(struct trans *t)
{
    const char *p = t->s + 1;
    while (p < t->end && ((*p >= '0' && *p <= '9') || *p == ','))
        p++;
    if (p == t->end || *p != '}' || p == t->s + 1)
        return refuse(t, "a '{' that opens no quantifier");
    if (t->s[1] == ',')
        return refuse(t, "{,n}");
    if (p + 1 < t->end && (p[1] == '+' || p[1] == '?'))
        return refuse(t, "{n} followed by + or ?");
    tok_buf_add(t->out, t->s, (size_t)(p + 1 - t->s));
    t->s = p + 1;
    return LM_OK;
}

static lm_status trans_class_open(struct trans *t)
{
    t->in_class = true;
    put(t, "[");
    t->s++;
    if (t->s < t->end && *t->s == '^') {
        put(t, "^");
        t->s++;
    }
    if (t->s < t->end && *t->s == ']')
        return refuse(t, "']' as first character of a set");
    return LM_OK;
}

static lm_status trans_class_char(struct trans *t)
{
    char c = *t->s;
    if (c == '[')
        return refuse(t, "'[' within brackets");
    if (c == '&' && t->s + 1 < t->end && t->s[1] == '&')
        return refuse(t, "&& within brackets");
    if (c == ']')
        t->in_class = false;
    tok_buf_add(t->out, t->s++, 1);
    return LM_OK;
}

static lm_status translate(struct trans *t)
{
    lm_status st = LM_OK;
    while (!st && t->s < t->end) {
        if (*t->s == '\\')
            st = trans_escape(t);
        else if (t->in_class)
            st = trans_class_char(t);
        else if (*t->s == '[')
            st = trans_class_open(t);
        else if (*t->s == '(')
            st = trans_group(t);
        else if (*t->s == '{')
            st = trans_brace(t);
        else
            tok_buf_add(t->out, t->s++, 1);
    }
    return st ? st : tok_buf_check(t->out, t->err);
}

/* ---- compiling --------------------------------------------------------------------------- */

static lm_status compile(const struct tok_buf *regex, const char *where, void **code,
                         struct lm_err *err)
{
    int number;
    PCRE2_SIZE at;
    pcre2_compile_context *ctx = pcre2_compile_context_create(NULL);
    if (!ctx)
        return tok_nomem(err);
    pcre2_set_newline(ctx, PCRE2_NEWLINE_LF);
    pcre2_code *c = pcre2_compile((PCRE2_SPTR)regex->p, regex->len,
                                  PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                                  &number, &at, ctx);
    pcre2_compile_context_free(ctx);
    if (!c) {
        PCRE2_UCHAR text[128];
        pcre2_get_error_message(number, text, sizeof text);
        return lm_err_set(err, LM_FORMAT, "%s: the regex does not compile: %s", where,
                          (char *)text);
    }
    pcre2_jit_compile(c, PCRE2_JIT_COMPLETE);   /* without it matching is slower, not wrong */
    *code = c;
    return LM_OK;
}

lm_status tok_pattern_regex(struct tok_pattern *p, const char *regex, const char *where,
                            struct lm_err *err)
{
    struct tok_buf out = {0};
    size_t n = strlen(regex);
    if (n == 0 || n > MAX_REGEX)
        return lm_err_set(err, LM_UNSUPPORTED, "%s: a regex of %zu bytes; 1 to %d are supported",
                          where, n, MAX_REGEX);
    struct trans t = {regex, regex + n, where, &out, false, err};
    lm_status st = translate(&t);
    if (!st)
        st = compile(&out, where, &p->code, err);
    tok_buf_release(&out);
    return st;
}

lm_status tok_pattern_parse(struct tok_pattern *p, json_t *j, const char *where,
                            struct lm_err *err)
{
    json_t *literal = json_object_get(j, "String"), *regex = json_object_get(j, "Regex");
    if (json_is_string(literal) && !regex) {
        p->literal_len = json_string_length(literal);
        if (p->literal_len == 0)
            return lm_err_set(err, LM_UNSUPPORTED, "%s: an empty pattern is not supported", where);
        p->literal = lm_strndup(json_string_value(literal), p->literal_len);
        return p->literal ? LM_OK : tok_nomem(err);
    }
    if (json_is_string(regex) && !literal)
        return tok_pattern_regex(p, json_string_value(regex), where, err);
    return lm_err_set(err, LM_FORMAT, "%s: \"pattern\" must be {\"String\": ...} or "
                      "{\"Regex\": ...}", where);
}

void tok_pattern_release(struct tok_pattern *p)
{
    free(p->literal);
    pcre2_code_free(p->code);
    *p = (struct tok_pattern){0};
}

/* ---- matching ---------------------------------------------------------------------------- */

lm_status tok_match_init(struct tok_match_iter *it, const struct tok_pattern *p,
                         struct lm_err *err)
{
    it->pat = p;
    if (!p->code || it->data)
        return LM_OK;
    it->data = pcre2_match_data_create(1, NULL);
    it->ctx = pcre2_match_context_create(NULL);
    if (!it->data || !it->ctx)
        return tok_nomem(err);
    pcre2_set_match_limit(it->ctx, MATCH_LIMIT);
    pcre2_set_heap_limit(it->ctx, HEAP_LIMIT_KIB);
    return LM_OK;
}

void tok_match_release(struct tok_match_iter *it)
{
    pcre2_match_data_free(it->data);
    pcre2_match_context_free(it->ctx);
    pcre2_jit_stack_free(it->jit_stack);
    *it = (struct tok_match_iter){0};
}

void tok_match_text(struct tok_match_iter *it, const char *s, size_t n)
{
    it->s = s;
    it->n = n;
    it->at = 0;
    it->last_end = SIZE_MAX;
}

static int run_pcre(struct tok_match_iter *it)
{
    return pcre2_match(it->pat->code, (PCRE2_SPTR)it->s, it->n, it->at, PCRE2_NO_UTF_CHECK,
                       it->data, it->ctx);
}

/* JIT code starts on the machine stack; a deep match gets a larger one of its own. */
static int run_regex(struct tok_match_iter *it)
{
    int rc = run_pcre(it);
    if (rc != PCRE2_ERROR_JIT_STACKLIMIT || it->jit_stack)
        return rc;
    it->jit_stack = pcre2_jit_stack_create(JIT_STACK_START, JIT_STACK_MAX, NULL);
    if (!it->jit_stack)
        return PCRE2_ERROR_NOMEMORY;
    pcre2_jit_stack_assign(it->ctx, NULL, it->jit_stack);
    return run_pcre(it);
}

static lm_status regex_error(int rc, struct lm_err *err)
{
    PCRE2_UCHAR text[128];
    if (rc == PCRE2_ERROR_NOMEMORY)
        return tok_nomem(err);
    pcre2_get_error_message(rc, text, sizeof text);
    return lm_err_set(err, LM_TOO_LARGE, "the text makes the tokenizer's pattern run away (%s); "
                      "send it in smaller parts", (char *)text);
}

static bool next_literal(struct tok_match_iter *it, size_t *start, size_t *end)
{
    const char *hit = it->n > it->at ?
        memmem(it->s + it->at, it->n - it->at, it->pat->literal, it->pat->literal_len) : NULL;
    if (!hit)
        return false;
    *start = (size_t)(hit - it->s);
    it->at = *end = *start + it->pat->literal_len;
    return true;
}

/* An empty match right behind the last match is passed over, as Rust's and Oniguruma's find_iter
 * do; all others count. */
bool tok_match_next(struct tok_match_iter *it, size_t *start, size_t *end, struct lm_err *err)
{
    if (it->pat->literal)
        return next_literal(it, start, end);
    while (it->at <= it->n) {
        int rc = run_regex(it);
        if (rc == PCRE2_ERROR_NOMATCH)
            return false;
        if (rc < 0) {
            it->status = regex_error(rc, err);
            return false;
        }
        const PCRE2_SIZE *o = pcre2_get_ovector_pointer(it->data);
        if (o[0] == o[1] && it->last_end == o[1]) {
            it->at += it->at < it->n ? (size_t)tok_utf8_len((unsigned char)it->s[it->at]) : 1;
            continue;
        }
        it->at = it->last_end = *end = o[1];
        *start = o[0];
        return true;
    }
    return false;
}

lm_status tok_pattern_replace(const struct tok_pattern *p, const char *by, size_t by_len,
                              const char *s, size_t n, struct tok_buf *out, struct lm_err *err)
{
    struct tok_match_iter it = {0};
    size_t from = 0, start, end;
    lm_status st = tok_match_init(&it, p, err);
    tok_match_text(&it, s, n);
    while (!st && n && tok_match_next(&it, &start, &end, err)) {
        tok_buf_add(out, s + from, start - from);
        tok_buf_add(out, by, by_len);
        from = end;
    }
    tok_buf_add(out, s + from, n - from);
    if (!st)
        st = it.status;
    tok_match_release(&it);
    return st ? st : tok_buf_check(out, err);
}
