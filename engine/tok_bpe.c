/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_bpe.c - the BPE model: from one word to its ids (Sennrich et al. 2016).
 *
 * A word starts as its characters; the adjacent pair whose merge has the lowest rank is merged,
 * the leftmost one first, until no pair has a merge. A character that the vocabulary lacks becomes
 * its bytes (<0xHH>, byte_fallback) if all of them exist, else the unknown token, else nothing.
 *
 * Short words, nearly all of them, keep the ranks of their pairs in an array and scan it: with a
 * dozen symbols nothing is faster. Long words use a heap of candidates over a linked list, so that
 * a megabyte without a blank costs n log n. Both take pairs in the same order. A candidate in the
 * heap is stale when the ids it was made for are no longer there; it is dropped when it surfaces.
 *
 * The order of unknown and byte tokens copies the reference exactly: an unknown token is held back
 * (to fuse it with the next, fuse_unk) until a known character comes, and byte tokens that come in
 * between overtake it.
 */
#include "engine/tok_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SMALL_WORD 64           /* symbols */
#define NO_MERGE UINT64_MAX

/* ---- merging ----------------------------------------------------------------------------- */

static uint64_t merge_of(const struct tok_bpe *m, int32_t left, int32_t right)
{
    return tok_map_get(&m->merges, (uint64_t)(uint32_t)left << 32 | (uint32_t)right);
}

/* sym[0..n) becomes the merged word; returns its length. */
static int merge_small(const struct tok_bpe *m, struct tok_sym *sym, uint64_t *rank, int n)
{
    for (int i = 0; i + 1 < n; i++)
        rank[i] = merge_of(m, sym[i].id, sym[i + 1].id);
    while (n > 1) {
        int best = 0;
        for (int i = 1; i + 1 < n; i++)
            if (rank[i] < rank[best])           /* strict: the leftmost of equals */
                best = i;
        if (rank[best] == NO_MERGE)
            break;
        sym[best].id = (int32_t)(uint32_t)rank[best];
        size_t tail = (size_t)(n - best - 2);
        memmove(&sym[best + 1], &sym[best + 2], tail * sizeof *sym);
        if (tail)
            memmove(&rank[best], &rank[best + 1], tail * sizeof *rank);
        n--;
        if (best > 0)
            rank[best - 1] = merge_of(m, sym[best - 1].id, sym[best].id);
        if (best + 1 < n)
            rank[best] = merge_of(m, sym[best].id, sym[best + 1].id);
    }
    return n;
}

static void heap_down(struct tok_cand *h, size_t n, size_t i)
{
    struct tok_cand c = h[i];
    for (size_t k; (k = 2 * i + 1) < n; i = k) {
        k += k + 1 < n && h[k + 1].order < h[k].order;
        if (h[k].order >= c.order)
            break;
        h[i] = h[k];
    }
    h[i] = c;
}

/* There is always room: each of n - 1 first pairs and two per merge, at most n - 1 merges. */
static void heap_push(struct tok_bpework *w, struct tok_cand c)
{
    size_t i = w->n_heap++;
    for (; i > 0 && w->heap[(i - 1) / 2].order > c.order; i = (i - 1) / 2)
        w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = c;
}

static struct tok_cand heap_pop(struct tok_bpework *w)
{
    struct tok_cand top = w->heap[0];
    w->heap[0] = w->heap[--w->n_heap];
    heap_down(w->heap, w->n_heap, 0);
    return top;
}

static void offer(const struct tok_bpe *m, struct tok_bpework *w, int pos)
{
    if (pos < 0 || w->sym[pos].next < 0)
        return;
    int32_t left = w->sym[pos].id, right = w->sym[w->sym[pos].next].id;
    uint64_t merge = merge_of(m, left, right);
    if (merge != NO_MERGE)
        heap_push(w, (struct tok_cand){(merge & 0xFFFFFFFF00000000u) | (uint32_t)pos, left, right,
                                       (int32_t)(uint32_t)merge});
}

static int merge_large(const struct tok_bpe *m, struct tok_bpework *w, int n)
{
    struct tok_sym *sym = w->sym;
    w->n_heap = 0;
    for (int i = 0; i < n; i++) {
        sym[i].prev = i - 1;
        sym[i].next = i + 1 < n ? i + 1 : -1;
    }
    for (int i = 0; i + 1 < n; i++)
        offer(m, w, i);
    while (w->n_heap) {
        struct tok_cand c = heap_pop(w);
        struct tok_sym *s = &sym[(uint32_t)c.order];
        if (s->id != c.left || s->next < 0 || sym[s->next].id != c.right)
            continue;                           /* stale */
        struct tok_sym *gone = &sym[s->next];
        s->id = c.merged;
        s->next = gone->next;
        gone->id = -1;                          /* no candidate names -1 */
        if (s->next >= 0)
            sym[s->next].prev = (int32_t)(s - sym);
        offer(m, w, s->prev);
        offer(m, w, (int)(s - sym));
    }
    int k = 0;
    for (int i = 0; i >= 0; i = sym[i].next)
        sym[k++].id = sym[i].id;                /* k <= i: next is read before it is overwritten */
    return k;
}

/* ---- the first symbols ------------------------------------------------------------------- */

static bool add_bytes(const struct tok_bpe *m, struct tok_sym *sym, int *k, const char *s, int len)
{
    for (int i = 0; i < len; i++)
        if (m->byte_id[(unsigned char)s[i]] < 0)
            return false;
    for (int i = 0; i < len; i++)
        sym[(*k)++].id = m->byte_id[(unsigned char)s[i]];
    return true;
}

static int32_t char_id(const struct tok_bpe *m, const char *s, int *len)
{
    int32_t cp;
    *len = tok_utf8_next(s, &cp);
    if (cp < (int32_t)LM_COUNT(m->char_id))
        return m->char_id[cp];
    return tok_vocab_get(&m->vocab, s, (size_t)*len);
}

/* Returns the number of symbols, or -1: an unknown token is needed and the vocabulary lacks it. */
static int first_symbols(const struct tok_bpe *m, struct tok_sym *sym, const char *s, size_t n)
{
    int k = 0, len;
    bool unk = false;
    for (const char *end = s + n; s < end; s += len) {
        int32_t id = char_id(m, s, &len);
        if (id >= 0) {
            if (unk)
                sym[k++].id = m->unk;
            unk = false;
            sym[k++].id = id;
        } else if (m->byte_fallback && add_bytes(m, sym, &k, s, len)) {
            continue;
        } else if (m->has_unk) {
            if (m->unk < 0)
                return -1;
            if (unk && !m->fuse_unk)
                sym[k++].id = m->unk;
            unk = true;
        }
    }
    if (unk)
        sym[k++].id = m->unk;
    return k;
}

/* ---- words ------------------------------------------------------------------------------- */

static lm_status bpework_reserve(struct tok_bpework *w, size_t n, struct lm_err *err)
{
    if (!w->rank && !(w->rank = lm_calloc(SMALL_WORD, sizeof *w->rank)))
        return tok_nomem(err);
    if (n > w->cap) {
        size_t cap = LM_MAX(n, LM_MAX(w->cap * 2, (size_t)2 * SMALL_WORD));
        void *p = lm_reallocarray(w->sym, cap, sizeof *w->sym);
        if (!p)
            return tok_nomem(err);
        w->sym = p;
        w->cap = cap;
    }
    return LM_OK;
}

static lm_status heap_reserve(struct tok_bpework *w, size_t n, struct lm_err *err)
{
    if (n <= w->cap_heap)
        return LM_OK;
    void *p = lm_reallocarray(w->heap, n, sizeof *w->heap);
    if (!p)
        return tok_nomem(err);
    w->heap = p;
    w->cap_heap = n;
    return LM_OK;
}

void tok_bpework_release(struct tok_bpework *w)
{
    free(w->sym);
    free(w->rank);
    free(w->heap);
    *w = (struct tok_bpework){0};
}

lm_status tok_bpe_word(const struct tok_bpe *m, struct tok_bpework *w, const char *s, size_t n,
                       struct token_ids *out, struct lm_err *err)
{
    if (m->ignore_merges) {
        int32_t id = tok_vocab_get(&m->vocab, s, n);
        if (id >= 0)
            return tok_ids_add(out, id, err);
    }
    lm_status st = bpework_reserve(w, n, err);  /* a byte makes at most one symbol */
    if (st)
        return st;
    int k = first_symbols(m, w->sym, s, n);
    if (k < 0)
        return lm_err_set(err, LM_UNSUPPORTED, "the text has a character outside the vocabulary, "
                          "which also lacks the file's own unk_token");
    if (k <= SMALL_WORD) {
        k = merge_small(m, w->sym, w->rank, k);
    } else {
        if ((st = heap_reserve(w, 3 * (size_t)k, err)))
            return st;
        k = merge_large(m, w, k);
    }
    for (int i = 0; i < k && !st; i++)
        st = tok_ids_add(out, w->sym[i].id, err);
    return st;
}

/* ---- parsing ----------------------------------------------------------------------------- */

static lm_status parse_id(const char *token, json_t *v, int32_t *id, struct lm_err *err)
{
    json_int_t i = json_integer_value(v);
    if (!json_is_integer(v) || i < 0 || i >= TOK_MAX_ID)
        return lm_err_set(err, LM_FORMAT, "model.vocab: id of \"%.64s\" must be an integer from 0 "
                          "to %d", token, TOK_MAX_ID - 1);
    *id = (int32_t)i;
    return LM_OK;
}

static lm_status parse_vocab(struct tok_bpe *m, json_t *j, struct lm_err *err)
{
    json_t *vocab = json_object_get(j, "vocab"), *v;
    if (!json_is_object(vocab))
        return lm_err_set(err, LM_FORMAT, "model.vocab must be an object of token: id");
    const char *token;
    int32_t id = 0, size = 0;
    lm_status st;
    json_object_foreach(vocab, token, v) {
        if ((st = parse_id(token, v, &id, err)))
            return st;
        size = LM_MAX(size, id + 1);
    }
    if ((st = tok_vocab_init(&m->vocab, json_object_size(vocab), size, err)))
        return st;
    json_object_foreach(vocab, token, v) {
        st = tok_vocab_put(&m->vocab, token, strlen(token), (int32_t)json_integer_value(v), err);
        if (st)
            return st;
    }
    return LM_OK;
}

/* A merge is ["a", "b"] or "a b". */
static lm_status split_merge(json_t *v, size_t i, const char **a, size_t *na, const char **b,
                             size_t *nb, struct lm_err *err)
{
    if (json_is_array(v) && json_array_size(v) == 2 && json_is_string(json_array_get(v, 0)) &&
        json_is_string(json_array_get(v, 1))) {
        *a = json_string_value(json_array_get(v, 0));
        *na = json_string_length(json_array_get(v, 0));
        *b = json_string_value(json_array_get(v, 1));
        *nb = json_string_length(json_array_get(v, 1));
        return LM_OK;
    }
    const char *s = json_string_value(v), *blank = s ? strchr(s, ' ') : NULL;
    if (!blank || strchr(blank + 1, ' '))
        return lm_err_set(err, LM_FORMAT, "model.merges[%zu] must be \"a b\" or [\"a\", \"b\"]",
                          i);
    *a = s;
    *na = (size_t)(blank - s);
    *b = blank + 1;
    *nb = json_string_length(v) - *na - 1;
    return LM_OK;
}

static lm_status parse_merge(struct tok_bpe *m, json_t *v, size_t i, uint32_t rank,
                             struct tok_buf *both, struct lm_err *err)
{
    const char *a = NULL, *b = NULL;
    size_t na = 0, nb = 0;
    lm_status st = split_merge(v, i, &a, &na, &b, &nb, err);
    if (st)
        return st;
    tok_buf_clear(both);
    tok_buf_add(both, a, na);
    tok_buf_add(both, b, nb);
    if (both->oom)
        return tok_nomem(err);
    int32_t left = tok_vocab_get(&m->vocab, a, na), right = tok_vocab_get(&m->vocab, b, nb);
    int32_t merged = tok_vocab_get(&m->vocab, both->p, both->len);
    if (left < 0 || right < 0 || merged < 0)
        return lm_err_set(err, LM_FORMAT, "model.merges[%zu]: \"%.64s\" is not in model.vocab", i,
                          left < 0 ? a : right < 0 ? b : both->p);
    return tok_map_put(&m->merges, (uint64_t)(uint32_t)left << 32 | (uint32_t)right,
                       (uint64_t)rank << 32 | (uint32_t)merged, err);
}

static lm_status parse_merges(struct tok_bpe *m, json_t *j, struct lm_err *err)
{
    json_t *merges = NULL, *v;
    size_t i;
    uint32_t rank = 0;
    struct tok_buf both = {0};
    lm_status st = tok_json_array(j, "merges", "model", &merges, err);
    if (!st && json_array_size(merges) > INT32_MAX)
        st = lm_err_set(err, LM_TOO_LARGE, "model.merges has %zu entries", json_array_size(merges));
    if (!st)
        st = tok_map_init(&m->merges, json_array_size(merges), err);
    for (i = 0; !st && i < json_array_size(merges); i++) {
        v = json_array_get(merges, i);
        const char *s = json_string_value(v);
        if (s && strncmp(s, "#version", 8) == 0)
            continue;                           /* a line of merges.txt that was carried over */
        st = parse_merge(m, v, i, rank++, &both, err);
    }
    tok_buf_release(&both);
    return st;
}

static lm_status refuse_set(json_t *j, const char *key, struct lm_err *err)
{
    json_t *v = json_object_get(j, key);
    if (!v || json_is_null(v) || (json_is_string(v) && json_string_length(v) == 0) ||
        (json_is_number(v) && json_number_value(v) == 0))
        return LM_OK;
    return lm_err_set(err, LM_UNSUPPORTED, "model.%s is set, which is not supported; only null is",
                      key);
}

static void fill_tables(struct tok_bpe *m)
{
    for (int i = 0; i < (int)LM_COUNT(m->char_id); i++) {
        char c[4] = {0};
        int n = i < 0x80 ? 1 : 2;
        c[0] = (char)(i < 0x80 ? i : 0xC0 | i >> 6);
        c[1] = (char)(0x80 | (i & 0x3F));
        m->char_id[i] = tok_vocab_get(&m->vocab, c, (size_t)n);
    }
    for (int i = 0; i < 256; i++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", (unsigned)i);
        m->byte_id[i] = tok_vocab_get(&m->vocab, name, 6);
    }
}

static lm_status parse_unk(struct tok_bpe *m, json_t *j, struct lm_err *err)
{
    json_t *unk = json_object_get(j, "unk_token");
    m->unk = -1;
    if (!unk || json_is_null(unk))
        return LM_OK;
    if (!json_is_string(unk))
        return lm_err_set(err, LM_FORMAT, "model.unk_token must be a string or null");
    m->has_unk = true;
    m->unk = tok_vocab_get(&m->vocab, json_string_value(unk), json_string_length(unk));
    return LM_OK;
}

lm_status tok_bpe_parse(struct tok_bpe *m, json_t *j, struct lm_err *err)
{
    if (!json_is_object(j))
        return lm_err_set(err, LM_FORMAT, "\"model\" must be an object");
    const char *type = json_string_value(json_object_get(j, "type"));
    if (type && strcmp(type, "BPE") != 0)       /* old files leave it out */
        return tok_unsupported(err, "model", type);
    lm_status st = refuse_set(j, "dropout", err);
    if (!st)
        st = refuse_set(j, "continuing_subword_prefix", err);
    if (!st)
        st = refuse_set(j, "end_of_word_suffix", err);
    if (!st)
        st = tok_json_bool(j, "fuse_unk", false, "model", &m->fuse_unk, err);
    if (!st)
        st = tok_json_bool(j, "byte_fallback", false, "model", &m->byte_fallback, err);
    if (!st)
        st = tok_json_bool(j, "ignore_merges", false, "model", &m->ignore_merges, err);
    if (!st)
        st = parse_vocab(m, j, err);
    if (!st)
        st = parse_merges(m, j, err);
    if (!st)
        st = parse_unk(m, j, err);
    if (!st)
        fill_tables(m);
    return st;
}

void tok_bpe_release(struct tok_bpe *m)
{
    tok_vocab_release(&m->vocab);
    tok_map_release(&m->merges);
}
