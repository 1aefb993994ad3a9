/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_tokenizer.c - the tokenizer against what Hugging Face tokenizers said of the same files.
 *
 * tests/fixtures/tokenizers/make.py trained one small tokenizer of each kind and recorded encode and
 * decode of more than 10,000 strings, of random id sequences, and checksums over nearly all of
 * Unicode; its head describes the files. Each comparison is exact. Run from the repository's root.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <pthread.h>

#include "engine/tok_internal.h"

#define ROOT "tests/fixtures/tokenizers/"

static const char *const KINDS[] = {"gpt2", "llama3", "qwen2", "tekken", "llama2", "mistral",
                                    "gemma", "added", "prefix", "whitespace"};

/* ---- reading fixtures -------------------------------------------------------------------- */

struct reader {
    char *base;
    const unsigned char *p, *end;
};

static struct reader open_file(const char *kind, const char *name)
{
    char path[256];
    struct reader r;
    size_t n;
    struct lm_err err = {0};
    snprintf(path, sizeof path, ROOT "%s%s%s", kind, *kind ? "/" : "", name);
    if (tok_read_file(path, &r.base, &n, &err))
        fail_msg("%s", err.msg);
    r.p = (const unsigned char *)r.base;
    r.end = r.p + n;
    return r;
}

static size_t varint(struct reader *r)
{
    size_t v = 0;
    for (int shift = 0;; shift += 7) {
        assert_true(r->p < r->end && shift < 35);
        v |= (size_t)(*r->p & 0x7F) << shift;
        if (!(*r->p++ & 0x80))
            return v;
    }
}

struct text {
    const char *s;
    size_t n;
};

static struct text bytes(struct reader *r, size_t n)
{
    assert_true(n <= (size_t)(r->end - r->p));
    struct text t = {(const char *)r->p, n};
    r->p += n;
    return t;
}

static struct text *all_strings(struct reader *r, size_t *n)
{
    *r = open_file("", "strings.bin");
    *n = varint(r);
    struct text *t = calloc(*n, sizeof *t);
    for (size_t i = 0; i < *n; i++) {
        size_t len = varint(r);
        t[i] = bytes(r, len);
    }
    return t;
}

static void read_ids(struct reader *r, struct token_ids *ids)
{
    ids->n = 0;
    for (size_t k = varint(r); k > 0; k--)
        assert_int_equal(tok_ids_add(ids, (int32_t)varint(r), NULL), LM_OK);
}

static struct text decoded_text(struct reader *r, struct text original, struct text first)
{
    size_t k = varint(r);
    return k == 0 ? original : k == 1 ? first : bytes(r, k - 2);
}

static tokenizer *load(const char *kind)
{
    char dir[128];
    tokenizer *t = NULL;
    struct lm_err err = {0};
    snprintf(dir, sizeof dir, ROOT "%s", kind);
    if (tokenizer_load(dir, &t, &err))
        fail_msg("%s", err.msg);
    return t;
}

/* ---- comparing --------------------------------------------------------------------------- */

static void print_ids(const char *what, const int32_t *id, int n)
{
    fprintf(stderr, "  %s:", what);
    for (int i = 0; i < n && i < 60; i++)
        fprintf(stderr, " %d", id[i]);
    fprintf(stderr, "\n");
}

/* Returns 1 on a difference, after showing the first few. */
static int differ_ids(const char *kind, size_t i, struct text s, const struct token_ids *want,
                      const struct token_ids *got, int shown)
{
    if (want->n == got->n && memcmp(want->id, got->id, (size_t)want->n * sizeof *want->id) == 0)
        return 0;
    if (shown < 5) {
        fprintf(stderr, "%s string %zu encodes differently: '%.*s'\n", kind, i,
                (int)LM_MIN(s.n, (size_t)200), s.s);
        print_ids("want", want->id, want->n);
        print_ids("got ", got->id, got->n);
    }
    return 1;
}

static int differ_text(const char *kind, size_t i, struct text want, const char *got, size_t n,
                       const char *what, int shown)
{
    if (want.n == n && memcmp(want.s, got, n) == 0)
        return 0;
    if (shown < 5)
        fprintf(stderr, "%s %s %zu: want '%.*s' got '%.*s'\n", kind, what, i,
                (int)LM_MIN(want.n, (size_t)200), want.s, (int)LM_MIN(n, (size_t)200), got);
    return 1;
}

static int check_decode(const tokenizer *t, const char *kind, size_t i,
                        const struct token_ids *ids, bool skip, struct text want, int shown)
{
    char *text = NULL;
    size_t n = 0;
    assert_int_equal(tokenizer_decode(t, ids->id, ids->n, skip, &text, &n, NULL), LM_OK);
    assert_int_equal(text[n], 0);
    int bad = differ_text(kind, i, want, text, n, skip ? "decode(skip)" : "decode", shown);
    free(text);
    return bad;
}

/* Streaming shows whole characters only, never takes anything back, and ends at the same text. */
static int check_stream(const tokenizer *t, const char *kind, size_t i,
                        const struct token_ids *ids, bool skip, struct text want, int shown)
{
    detok *d = NULL;
    const char *text = "";
    size_t n = 0;
    int bad = 0;
    assert_int_equal(detok_new(t, skip, &d, NULL), LM_OK);
    for (int k = 0; k < ids->n && !bad; k++) {
        size_t before = n;
        assert_int_equal(detok_push(d, ids->id[k], &text, &n, NULL), LM_OK);
        assert_true(n >= before);
        bad = n > want.n || memcmp(text, want.s, n) != 0 || tok_utf8_check(text, n) != n;
    }
    assert_int_equal(detok_finish(d, &text, &n, NULL), LM_OK);
    bad = differ_text(kind, i, want, text, n, "stream", shown) || bad;
    detok_free(d);
    return bad;
}

/* ---- equality ---------------------------------------------------------------------------- */

static void encode_kind(const char *kind, const struct text *strings, size_t n)
{
    tokenizer *t = load(kind);
    struct reader r = open_file(kind, "encode.bin");
    struct token_ids want = {0}, got = {0};
    int bad = 0;
    for (size_t i = 0; i < n; i++) {
        read_ids(&r, &want);
        got.n = 0;
        struct lm_err err = {0};
        if (tokenizer_encode(t, strings[i].s, strings[i].n, true, &got, &err))
            fail_msg("%s string %zu: %s", kind, i, err.msg);
        bad += differ_ids(kind, i, strings[i], &want, &got, bad);
        struct text full = decoded_text(&r, strings[i], strings[i]);
        struct text skipped = decoded_text(&r, strings[i], full);
        bad += check_decode(t, kind, i, &want, false, full, bad);
        bad += check_decode(t, kind, i, &want, true, skipped, bad);
        bad += check_stream(t, kind, i, &want, true, skipped, bad);
    }
    assert_ptr_equal(r.p, r.end);
    token_ids_release(&want);
    token_ids_release(&got);
    tokenizer_free(t);
    free(r.base);
    if (bad)
        fail_msg("%s: %d differences over %zu strings", kind, bad, n);
}

static void encode_and_decode_equal_the_reference(void **state)
{
    (void)state;
    struct reader r;
    size_t n;
    struct text *strings = all_strings(&r, &n);
    assert_true(n >= 10000);
    for (size_t k = 0; k < LM_COUNT(KINDS); k++)
        encode_kind(KINDS[k], strings, n);
    free(strings);
    free(r.base);
}

static void decode_kind(const char *kind)
{
    tokenizer *t = load(kind);
    struct reader r = open_file(kind, "decode.bin");
    struct token_ids ids = {0};
    const struct text none = {"", 0};
    int bad = 0;
    size_t n = varint(&r);
    for (size_t i = 0; i < n; i++) {
        read_ids(&r, &ids);
        struct text full = decoded_text(&r, none, none);
        struct text skipped = decoded_text(&r, none, full);
        bad += check_decode(t, kind, i, &ids, false, full, bad);
        bad += check_decode(t, kind, i, &ids, true, skipped, bad);
        bad += check_stream(t, kind, i, &ids, false, full, bad);
        bad += check_stream(t, kind, i, &ids, true, skipped, bad);
    }
    assert_ptr_equal(r.p, r.end);
    token_ids_release(&ids);
    tokenizer_free(t);
    free(r.base);
    if (bad)
        fail_msg("%s: %d differences over %zu id sequences", kind, bad, n);
}

static void random_ids_decode_as_the_reference_does(void **state)
{
    (void)state;
    for (size_t k = 0; k < LM_COUNT(KINDS); k++)
        decode_kind(KINDS[k]);
}

/* ---- all of Unicode ---------------------------------------------------------------------- */

static uint32_t crc32_add(uint32_t crc, const void *p, size_t n)
{
    const unsigned char *s = p;
    crc = ~crc;
    for (size_t i = 0; i < n; i++) {
        crc ^= s[i];
        for (int k = 0; k < 8; k++)
            crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    return ~crc;
}

static void plane_string(int32_t first, struct tok_buf *b)
{
    tok_buf_clear(b);
    for (int32_t c = first; c < first + 16; c++) {
        tok_buf_add(b, "a", 1);
        tok_buf_add_cp(b, c);
        tok_buf_add(b, " ", 1);
        tok_buf_add_cp(b, c);
        tok_buf_add(b, "1", 1);
    }
}

static void planes_kind(const char *kind)
{
    static const int32_t range[][2] = {{0, 0xD800}, {0xE000, 0x32400}, {0xE0000, 0xE1000}};
    tokenizer *t = load(kind);
    struct reader r = open_file(kind, "planes.bin");
    struct token_ids ids = {0};
    struct tok_buf b = {0};
    int bad = 0;
    for (size_t k = 0; k < LM_COUNT(range); k++) {
        for (int32_t block = range[k][0]; block < range[k][1]; block += 256) {
            ids.n = 0;
            for (int32_t c = block; c < block + 256; c += 16) {
                plane_string(c, &b);
                assert_int_equal(tokenizer_encode(t, b.p, b.len, false, &ids, NULL), LM_OK);
            }
            uint32_t crc = crc32_add(0, ids.id, (size_t)ids.n * sizeof *ids.id), want;
            memcpy(&want, bytes(&r, 4).s, 4);
            if (crc != want && bad++ < 20)
                fprintf(stderr, "%s: U+%04X..%04X differ\n", kind, (unsigned)block,
                        (unsigned)block + 255);
        }
    }
    assert_ptr_equal(r.p, r.end);
    tok_buf_release(&b);
    token_ids_release(&ids);
    tokenizer_free(t);
    free(r.base);
    if (bad)
        fail_msg("%s: %d blocks of 256 code points differ", kind, bad);
}

static void every_assigned_code_point_encodes_as_in_the_reference(void **state)
{
    (void)state;
    for (size_t k = 0; k < LM_COUNT(KINDS); k++)
        planes_kind(KINDS[k]);
}

/* ---- Split ------------------------------------------------------------------------------- */

static bool same_pieces(const struct tok_prework *w, json_t *want)
{
    if (w->pieces.n != json_array_size(want))
        return false;
    for (size_t i = 0; i < w->pieces.n; i++) {
        json_t *v = json_array_get(want, i);
        if (w->pieces.v[i].len != json_string_length(v) ||
            memcmp(w->text.p + w->pieces.v[i].off, json_string_value(v), json_string_length(v)))
            return false;
    }
    return true;
}

static int split_case(json_t *split, json_t *texts, json_t *pieces)
{
    static struct tok_pretok pt;
    struct tok_prework w = {0};
    struct lm_err err = {0};
    size_t i;
    json_t *text;
    int bad = 0;
    memset(&pt, 0, sizeof pt);
    if (tok_pretok_parse(&pt, split, &err)) {
        fprintf(stderr, "%s\n", err.msg);
        bad++;
    } else {
        json_array_foreach(texts, i, text) {
            assert_int_equal(tok_pretokenize(&pt, &w, json_string_value(text),
                                             json_string_length(text), true, &err), LM_OK);
            if (!same_pieces(&w, json_array_get(pieces, i))) {
                char *show = json_dumps(split, 0);
                fprintf(stderr, "%s splits '%s' differently\n", show, json_string_value(text));
                free(show);
                bad++;
            }
        }
    }
    tok_prework_release(&w);
    tok_pretok_release(&pt);
    return bad;
}

static void split_agrees_in_behaviour_and_regex_dialect(void **state)
{
    (void)state;
    json_t *all = json_load_file(ROOT "splits.json", 0, NULL), *c;
    size_t i;
    int bad = 0;
    assert_non_null(all);
    assert_true(json_array_size(json_object_get(all, "cases")) > 50);
    json_array_foreach(json_object_get(all, "cases"), i, c) {
        bad += split_case(json_object_get(c, "split"), json_object_get(all, "texts"),
                          json_object_get(c, "pieces"));
    }
    json_decref(all);
    assert_int_equal(bad, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(encode_and_decode_equal_the_reference),
        cmocka_unit_test(random_ids_decode_as_the_reference_does),
        cmocka_unit_test(every_assigned_code_point_encodes_as_in_the_reference),
        cmocka_unit_test(split_agrees_in_behaviour_and_regex_dialect),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
