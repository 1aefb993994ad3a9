/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_added.c - added tokens: finding them in text before anything else looks at it.
 *
 * Two rounds, as the reference does it. Tokens with normalized = false are looked for in the raw
 * text; what lies between is normalised, and tokens with normalized = true are looked for there, in
 * their own normalised form. At each place the longest token wins, the leftmost place first,
 * matches don't overlap. A match that single_word forbids is passed over as a whole: the search
 * goes on behind it, not inside it. lstrip and rstrip make a token swallow the white space beside
 * it.
 *
 * The search is a walk through a trie from every position whose byte begins a token; the length of
 * a token is bounded (TOK_MAX_ADDED_LEN), so the walk is too.
 */
#include "engine/tok_internal.h"

#include <stdlib.h>
#include <string.h>

#define WHERE "added_tokens"

/* ---- the trie ---------------------------------------------------------------------------- */

static lm_status trie_add(struct tok_trie *t, const char *s, size_t n, int index,
                          struct lm_err *err)
{
    lm_status st = LM_OK;
    uint64_t node = 0;
    for (size_t i = 0; i < n && !st; i++) {
        uint64_t key = node << 8 | (unsigned char)s[i];
        node = tok_map_get(&t->edge, key);
        if (node == UINT64_MAX) {
            node = ++t->n_nodes;
            st = tok_map_put(&t->edge, key, node, err);
        }
    }
    if (st)
        return st;
    if (tok_map_get(&t->leaf, node) != UINT64_MAX)
        return lm_err_set(err, LM_FORMAT, WHERE ": \"%.64s\" is there twice", s);
    t->first[(unsigned char)s[0]] = true;
    return tok_map_put(&t->leaf, node, (uint64_t)index, err);
}

/* The longest token at s, or -1. */
static int trie_longest(const struct tok_trie *t, const char *s, size_t n)
{
    uint64_t node = 0, hit = UINT64_MAX;
    for (size_t i = 0; i < n; i++) {
        node = tok_map_get(&t->edge, node << 8 | (unsigned char)s[i]);
        if (node == UINT64_MAX)
            break;
        uint64_t leaf = tok_map_get(&t->leaf, node);
        hit = leaf != UINT64_MAX ? leaf : hit;
    }
    return hit == UINT64_MAX ? -1 : (int)hit;
}

/* ---- splitting --------------------------------------------------------------------------- */

static size_t char_before(const char *s, size_t at, int32_t *cp)
{
    do
        at--;
    while (((unsigned char)s[at] & 0xC0) == 0x80);
    tok_utf8_next(s + at, cp);
    return at;
}

static bool stands_alone(const char *s, size_t n, size_t start, size_t stop)
{
    int32_t cp;
    if (start > 0) {
        char_before(s, start, &cp);
        if (tok_is_word(cp))
            return false;
    }
    if (stop < n) {
        tok_utf8_next(s + stop, &cp);
        if (tok_is_word(cp))
            return false;
    }
    return true;
}

static size_t strip_before(const char *s, size_t floor, size_t start)
{
    int32_t cp;
    while (start > floor) {
        size_t at = char_before(s, start, &cp);
        if (!tok_is_space(cp))
            break;
        start = at;
    }
    return start;
}

static size_t strip_behind(const char *s, size_t n, size_t stop)
{
    int32_t cp;
    while (stop < n) {
        size_t len = (size_t)tok_utf8_next(s + stop, &cp);
        if (!tok_is_space(cp))
            break;
        stop += len;
    }
    return stop;
}

/* A token's reach may grow by rstrip over the next match's start, which the reference searched for
 * in the text as it was; then that match's own start wins nothing back (start < done). */
lm_status tok_added_split(const struct tok_added *a, bool normalized, const char *s, size_t n,
                          bool at_start, const struct tok_added_sink *sink, struct lm_err *err)
{
    const struct tok_trie *t = normalized ? &a->normalized : &a->raw;
    size_t done = 0;
    lm_status st = LM_OK;
    for (size_t i = 0; t->n_nodes && i < n && !st;) {
        int k = t->first[(unsigned char)s[i]] ? trie_longest(t, s + i, n - i) : -1;
        if (k < 0) {
            i++;
            continue;
        }
        const struct tok_added_token *tok = &a->tok[k];
        size_t start = i, stop = i + tok->match_len;
        i = stop;
        if (tok->single_word && !stands_alone(s, n, start, stop))
            continue;
        if (tok->lstrip)
            start = strip_before(s, LM_MIN(done, start), start);
        if (tok->rstrip)
            stop = strip_behind(s, n, stop);
        if (done < start)
            st = sink->on_text(sink->ctx, s + done, start - done, at_start && done == 0, err);
        if (!st)
            st = sink->on_id(sink->ctx, tok->id, err);
        done = stop;
    }
    if (!st && done < n)
        st = sink->on_text(sink->ctx, s + done, n - done, at_start && done == 0, err);
    return st;
}

/* ---- looking up -------------------------------------------------------------------------- */

const struct tok_added_token *tok_added_by_id(const struct tok_added *a, int32_t id)
{
    uint64_t k = id < 0 ? UINT64_MAX : tok_map_get(&a->by_id, (uint64_t)id);
    return k == UINT64_MAX ? NULL : &a->tok[k];
}

const struct tok_added_token *tok_added_by_text(const struct tok_added *a, const char *s,
                                                size_t n)
{
    for (int i = 0; i < a->n; i++)
        if (a->tok[i].len == n && memcmp(a->tok[i].content, s, n) == 0)
            return &a->tok[i];
    return NULL;
}

/* ---- parsing ----------------------------------------------------------------------------- */

static lm_status parse_flags(struct tok_added_token *tok, json_t *j, struct lm_err *err)
{
    lm_status st = tok_json_bool(j, "special", -1, WHERE, &tok->special, err);
    if (!st)
        st = tok_json_bool(j, "single_word", -1, WHERE, &tok->single_word, err);
    if (!st)
        st = tok_json_bool(j, "lstrip", -1, WHERE, &tok->lstrip, err);
    if (!st)
        st = tok_json_bool(j, "rstrip", -1, WHERE, &tok->rstrip, err);
    if (!st)
        st = tok_json_bool(j, "normalized", -1, WHERE, &tok->normalized, err);
    return st;
}

/* The reference derives ids, whatever the file lists: the model's own id of that text, else the
 * next free one. We refuse a file whose list says otherwise, rather than pick a side. */
static lm_status check_id(const struct tok_added_token *tok, json_t *j,
                          const struct tok_vocab *vocab, int32_t *next, struct lm_err *err)
{
    json_int_t listed = json_integer_value(json_object_get(j, "id"));
    int32_t id = tok_vocab_get(vocab, tok->content, tok->len);
    if (id < 0)
        id = (*next)++;
    if (!json_is_integer(json_object_get(j, "id")) || listed != id || id >= TOK_MAX_ID)
        return lm_err_set(err, LM_MISMATCH, WHERE ": \"%.64s\" is listed with id %lld but its "
                          "place in vocabulary and list makes it %d; renumber the list",
                          tok->content, (long long)listed, id);
    return LM_OK;
}

static lm_status set_match(struct tok_added_token *tok, const struct tok_normalizer *nz,
                           struct lm_err *err)
{
    struct tok_buf out = {0}, tmp = {0};
    const char *s = tok->content;
    size_t n = tok->len;
    lm_status st = LM_OK;
    if (tok->normalized) {
        st = tok_normalize(nz, s, n, &out, &tmp, err);
        s = out.p ? out.p : "";
        n = out.len;
    }
    if (!st && (n == 0 || n > TOK_MAX_ADDED_LEN))
        st = lm_err_set(err, LM_UNSUPPORTED, WHERE ": \"%.64s\" is %zu bytes long when normalised; "
                        "1 to %d are supported", tok->content, n, TOK_MAX_ADDED_LEN);
    if (!st && !(tok->match = lm_strndup(s, n)))
        st = tok_nomem(err);
    tok->match_len = n;
    tok_buf_release(&out);
    tok_buf_release(&tmp);
    return st;
}

static lm_status parse_one(struct tok_added *a, json_t *j, const struct tok_vocab *vocab,
                           const struct tok_normalizer *nz, int32_t *next, struct lm_err *err)
{
    const char *content;
    struct tok_added_token *tok = &a->tok[a->n];
    lm_status st = tok_json_string(j, "content", WHERE, &content, &tok->len, err);
    if (st || tok->len == 0)            /* an empty token is ignored, as the reference does */
        return st;
    a->n++;
    if (!(tok->content = lm_strndup(content, tok->len)))
        return tok_nomem(err);
    st = parse_flags(tok, j, err);
    if (!st)
        st = check_id(tok, j, vocab, next, err);
    if (!st)
        st = set_match(tok, nz, err);
    if (st)
        return st;
    tok->id = (int32_t)json_integer_value(json_object_get(j, "id"));
    st = trie_add(tok->normalized ? &a->normalized : &a->raw, tok->match, tok->match_len, a->n - 1,
                  err);
    return st ? st : tok_map_put(&a->by_id, (uint64_t)tok->id, (uint64_t)(a->n - 1), err);
}

/* The reference decodes a token in the form it matches, and leaves it out if that text is a special
 * token's: so a special token that normalisation changes is never left out. */
static void set_skip(struct tok_added *a)
{
    for (int i = 0; i < a->n; i++) {
        struct tok_added_token *tok = &a->tok[i];
        const struct tok_added_token *same = tok;
        if (!tok->match)
            continue;           /* parsing stopped here */
        if (tok->match_len != tok->len || memcmp(tok->match, tok->content, tok->len) != 0)
            same = tok_added_by_text(a, tok->match, tok->match_len);
        tok->skip = same && same->special;
    }
}

lm_status tok_added_parse(struct tok_added *a, json_t *j, const struct tok_vocab *vocab,
                          const struct tok_normalizer *nz, struct lm_err *err)
{
    if (!j || json_is_null(j))
        return LM_OK;
    if (!json_is_array(j))
        return lm_err_set(err, LM_FORMAT, WHERE " must be an array");
    size_t i, n = json_array_size(j);
    if (n > TOK_MAX_ID)
        return lm_err_set(err, LM_TOO_LARGE, WHERE " has %zu entries", n);
    int32_t next = vocab->count;
    json_t *v;
    lm_status st = LM_OK;
    struct tok_map *maps[] = {&a->by_id, &a->raw.edge, &a->raw.leaf, &a->normalized.edge,
                              &a->normalized.leaf};
    for (i = 0; i < LM_COUNT(maps) && !st; i++)
        st = tok_map_init(maps[i], n, err);
    if (!st && !(a->tok = lm_calloc(n + 1, sizeof *a->tok)))
        st = tok_nomem(err);
    for (i = 0; i < n && !st; i++) {
        v = json_array_get(j, i);
        st = parse_one(a, v, vocab, nz, &next, err);
    }
    set_skip(a);
    return st;
}

static void trie_release(struct tok_trie *t)
{
    tok_map_release(&t->edge);
    tok_map_release(&t->leaf);
}

void tok_added_release(struct tok_added *a)
{
    for (int i = 0; i < a->n; i++) {
        free(a->tok[i].content);
        free(a->tok[i].match);
    }
    free(a->tok);
    trie_release(&a->raw);
    trie_release(&a->normalized);
    tok_map_release(&a->by_id);
    *a = (struct tok_added){0};
}
