/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_hash.c - the two hash tables of the tokenizer: 64-bit keys to 64-bit values (merges, trie
 * edges) and strings to ids (the vocabulary).
 *
 * Open addressing with linear probing, at most half full, filled once at load and only read from
 * then on, so lookups need no lock. The vocabulary keeps all strings in one block of bytes and
 * finds them by id through a table; ids may have holes.
 */
#include "engine/tok_internal.h"

#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

static size_t table_size(size_t expected)
{
    size_t n = 16;
    while (n < expected * 2)
        n *= 2;
    return n;
}

/* ---- numbers ----------------------------------------------------------------------------- */

static size_t mix(uint64_t key)
{
    key *= 0x9E3779B97F4A7C15u;         /* 2^64 over the golden ratio */
    return (size_t)(key ^ key >> 32);
}

lm_status tok_map_init(struct tok_map *m, size_t expected, struct lm_err *err)
{
    size_t n = table_size(expected);
    m->slot = lm_reallocarray(NULL, n, sizeof *m->slot);
    if (!m->slot)
        return tok_nomem(err);
    memset(m->slot, 0xFF, n * sizeof *m->slot);
    m->mask = n - 1;
    m->n = 0;
    return LM_OK;
}

void tok_map_release(struct tok_map *m)
{
    free(m->slot);
    *m = (struct tok_map){0};
}

static struct tok_slot *map_find(const struct tok_map *m, uint64_t key)
{
    size_t i = mix(key) & m->mask;
    while (m->slot[i].value != UINT64_MAX && m->slot[i].key != key)
        i = (i + 1) & m->mask;
    return &m->slot[i];
}

static lm_status map_grow(struct tok_map *m, struct lm_err *err)
{
    struct tok_map bigger = {0};
    lm_status st = tok_map_init(&bigger, m->mask + 1, err);
    if (st)
        return st;
    for (size_t i = 0; i <= m->mask; i++) {
        if (m->slot[i].value != UINT64_MAX) {
            *map_find(&bigger, m->slot[i].key) = m->slot[i];
            bigger.n++;
        }
    }
    tok_map_release(m);
    *m = bigger;
    return LM_OK;
}

lm_status tok_map_put(struct tok_map *m, uint64_t key, uint64_t value, struct lm_err *err)
{
    if (2 * (m->n + 1) > m->mask + 1) {
        lm_status st = map_grow(m, err);
        if (st)
            return st;
    }
    struct tok_slot *s = map_find(m, key);
    m->n += s->value == UINT64_MAX;
    *s = (struct tok_slot){key, value};
    return LM_OK;
}

uint64_t tok_map_get(const struct tok_map *m, uint64_t key)
{
    return m->slot ? map_find(m, key)->value : UINT64_MAX;
}

/* ---- strings ----------------------------------------------------------------------------- */

lm_status tok_vocab_init(struct tok_vocab *v, size_t count, int size, struct lm_err *err)
{
    size_t n = table_size(count);
    v->slot = lm_reallocarray(NULL, n, sizeof *v->slot);
    v->str = lm_calloc(size ? (size_t)size : 1, sizeof *v->str);
    if (!v->slot || !v->str)
        return tok_nomem(err);          /* the owner releases what there is */
    memset(v->slot, 0xFF, n * sizeof *v->slot);
    v->mask = n - 1;
    v->size = size;
    return LM_OK;
}

void tok_vocab_release(struct tok_vocab *v)
{
    free(v->slot);
    free(v->str);
    tok_buf_release(&v->bytes);
    *v = (struct tok_vocab){0};
}

static size_t vocab_find(const struct tok_vocab *v, const char *s, size_t n)
{
    size_t i = (size_t)XXH3_64bits(s, n) & v->mask;
    while (v->slot[i] >= 0) {
        const struct tok_str *t = &v->str[v->slot[i]];
        if (t->len == n && memcmp(v->bytes.p + t->off, s, n) == 0)
            break;
        i = (i + 1) & v->mask;
    }
    return i;
}

/* The caller has counted: at most `count` strings, each id below `size`. */
lm_status tok_vocab_put(struct tok_vocab *v, const char *s, size_t n, int32_t id,
                        struct lm_err *err)
{
    if (v->str[id].used)
        return lm_err_set(err, LM_FORMAT, "model.vocab: two tokens share id %d", id);
    size_t off = v->bytes.len;
    tok_buf_add(&v->bytes, s, n);
    if (v->bytes.oom)
        return tok_nomem(err);
    v->slot[vocab_find(v, s, n)] = id;
    v->str[id] = (struct tok_str){(uint32_t)off, (uint32_t)n, true};
    v->count++;
    return LM_OK;
}

int32_t tok_vocab_get(const struct tok_vocab *v, const char *s, size_t n)
{
    return v->slot ? v->slot[vocab_find(v, s, n)] : -1;
}

const char *tok_vocab_str(const struct tok_vocab *v, int32_t id, size_t *len)
{
    if (id < 0 || id >= v->size || !v->str[id].used)
        return NULL;
    *len = v->str[id].len;
    return v->bytes.p + v->str[id].off;
}
