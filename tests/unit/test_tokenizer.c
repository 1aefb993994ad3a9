/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_tokenizer.c - the tokenizer against what Hugging Face tokenizers said of the same files.
 *
 * tests/fixtures/tokenizers/make.py trained one small tokenizer of each kind and recorded encode
 * and decode of more than 10,000 strings, of random id sequences, and checksums over nearly all of
 * Unicode; its head describes the files. Each comparison is exact. Run from the repository's root.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/stat.h>

#include <cmocka.h>
#include <pthread.h>

#include "engine/tok_internal.h"
#include "cpu_clock.h"

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
    if (want->n == got->n &&
        (want->n == 0 || memcmp(want->id, got->id, (size_t)want->n * sizeof *want->id) == 0))
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

/* ---- single tokens ----------------------------------------------------------------------- */

/* Of byte-level tokenizers the pieces, put together, are the text's bytes exactly. */
static void pieces_together_are_the_text(void **state)
{
    (void)state;
    static const char *const exact[] = {"gpt2", "llama3", "tekken"};
    struct reader r;
    size_t n, len;
    struct text *strings = all_strings(&r, &n);
    struct token_ids ids = {0};
    for (size_t k = 0; k < LM_COUNT(exact); k++) {
        tokenizer *t = load(exact[k]);
        for (size_t i = 0; i < n; i += 7) {
            struct tok_buf b = {0};
            ids.n = 0;
            assert_int_equal(tokenizer_encode(t, strings[i].s, strings[i].n, false, &ids, NULL),
                             LM_OK);
            for (int j = 0; j < ids.n; j++) {
                char *piece;
                assert_int_equal(tokenizer_piece(t, ids.id[j], &piece, &len, NULL), LM_OK);
                tok_buf_add(&b, piece, len);
                free(piece);
            }
            assert_int_equal(b.len, strings[i].n);
            if (b.len)
                assert_memory_equal(b.p, strings[i].s, b.len);
            tok_buf_release(&b);
        }
        tokenizer_free(t);
    }
    token_ids_release(&ids);
    free(strings);
    free(r.base);
}

static void expect_piece(const tokenizer *t, const char *token, const char *want, size_t n)
{
    char *piece = NULL;
    size_t len = 0;
    int32_t id = tokenizer_token_id(t, token);
    assert_true(id >= 0);
    assert_int_equal(tokenizer_piece(t, id, &piece, &len, NULL), LM_OK);
    assert_int_equal(len, n);
    assert_memory_equal(piece, want, n);
    free(piece);
}

static void a_piece_may_be_part_of_a_character(void **state)
{
    (void)state;
    char *piece = NULL;
    size_t len;
    tokenizer *t = load("llama2");
    expect_piece(t, "<0xE2>", "\xE2", 1);
    expect_piece(t, "\xE2\x96\x81the", " the", 4);
    expect_piece(t, "<s>", "<s>", 3);
    assert_int_equal(tokenizer_piece(t, tokenizer_vocab_size(t), &piece, &len, NULL), LM_NOT_FOUND);
    assert_int_equal(tokenizer_piece(t, -1, &piece, &len, NULL), LM_NOT_FOUND);
    tokenizer_free(t);
    t = load("gpt2");
    expect_piece(t, "\xC3\xA2", "\xE2", 1);      /* the byte alphabet's name of 0xE2 */
    expect_piece(t, "\xC4\xA0the", " the", 4);
    expect_piece(t, "<|endoftext|>", "<|endoftext|>", 13);
    tokenizer_free(t);
}

static void tokens_are_known_by_text_and_kind(void **state)
{
    (void)state;
    tokenizer *t = load("qwen2");
    int32_t start = tokenizer_token_id(t, "<|im_start|>"), think = tokenizer_token_id(t, "<think>");
    assert_int_equal(tokenizer_vocab_size(t), 1007);
    assert_true(start >= 0 && tokenizer_is_special(t, start));
    assert_true(think >= 0 && !tokenizer_is_special(t, think));
    assert_false(tokenizer_is_special(t, 0));
    assert_false(tokenizer_is_special(t, -1));
    assert_int_equal(tokenizer_token_id(t, "no such token"), -1);
    tokenizer_free(t);
}

/* ---- hostile text ------------------------------------------------------------------------ */

static void text_that_is_not_utf8_is_refused(void **state)
{
    (void)state;
    static const char *const bad[] = {"\xFF", "a\x80", "\xC3", "\xE2\x82", "\xED\xA0\x80",
                                      "\xC0\xAF", "\xF4\x90\x80\x80", "12345678\xF0\x9F\x98"};
    tokenizer *t = load("llama3");
    for (size_t i = 0; i < LM_COUNT(bad); i++) {
        struct token_ids ids = {0};
        struct lm_err err = {0};
        assert_int_equal(tokenizer_encode(t, bad[i], strlen(bad[i]), true, &ids, &err), LM_FORMAT);
        assert_non_null(strstr(err.msg, "not UTF-8"));
        assert_int_equal(ids.n, 0);
        token_ids_release(&ids);
    }
    tokenizer_free(t);
}

#ifdef __SANITIZE_THREAD__
#define LONG_RUN_SECONDS 60             /* each access to memory costs a call */
#else
#define LONG_RUN_SECONDS 5
#endif

/* A quarter of a megabyte of one kind of character: linear or n log n, no runaway, no deep
 * stack. */
static void long_runs_take_little_time(void **state)
{
    (void)state;
    static const char *const unit[] = {"a", " ", "\n", "A", "1", "!", "\xE2\x80\x83",
                                       "\xF0\x9F\x98\x80", "e\xCC\x81", "ab", " \n", "<|",
                                       "\xE2\x96\x81"};
    const size_t size = 1 << 18;
    char *text = malloc(size);
    for (size_t k = 0; k < LM_COUNT(KINDS); k++) {
        tokenizer *t = load(KINDS[k]);
        for (size_t u = 0; u < LM_COUNT(unit); u++) {
            size_t len = strlen(unit[u]), n = size / len * len;
            for (size_t i = 0; i < n; i += len)
                memcpy(text + i, unit[u], len);
            struct token_ids ids = {0};
            int64_t start = cpu_ns();
            struct lm_err err = {0};
            if (tokenizer_encode(t, text, n, true, &ids, &err))
                fail_msg("%s: %s", KINDS[k], err.msg);
            double took = (double)(cpu_ns() - start) * 1e-9;
            if (took > LONG_RUN_SECONDS)
                fail_msg("%s: a quarter megabyte of '%s' took %.1f s", KINDS[k], unit[u], took);
            token_ids_release(&ids);
        }
        tokenizer_free(t);
    }
    free(text);
}

/* ---- threads ----------------------------------------------------------------------------- */

struct worker {
    const tokenizer *t;
    const struct text *strings;
    size_t n;
    uint32_t crc;
};

static void *encode_all(void *arg)
{
    struct worker *w = arg;
    struct token_ids ids = {0};
    for (size_t i = 0; i < w->n; i++) {
        char *text = NULL;
        size_t len = 0;
        ids.n = 0;
        if (tokenizer_encode(w->t, w->strings[i].s, w->strings[i].n, true, &ids, NULL) ||
            tokenizer_decode(w->t, ids.id, ids.n, false, &text, &len, NULL))
            break;
        w->crc = crc32_add(w->crc, ids.id, (size_t)ids.n * sizeof *ids.id);
        w->crc = crc32_add(w->crc, text, len);
        free(text);
    }
    token_ids_release(&ids);
    return NULL;
}

static void one_tokenizer_serves_many_threads(void **state)
{
    (void)state;
    struct reader r;
    size_t n;
    struct text *strings = all_strings(&r, &n);
    static const char *const kinds[] = {"qwen2", "added", "llama2"};
    for (size_t k = 0; k < LM_COUNT(kinds); k++) {
        tokenizer *t = load(kinds[k]);
        struct worker w[4];
        pthread_t id[4];
        for (int i = 0; i < 4; i++) {
            w[i] = (struct worker){t, strings, LM_MIN(n, (size_t)1500), 0};
            assert_int_equal(pthread_create(&id[i], NULL, encode_all, &w[i]), 0);
        }
        for (int i = 0; i < 4; i++)
            pthread_join(id[i], NULL);
        for (int i = 1; i < 4; i++)
            assert_int_equal(w[i].crc, w[0].crc);
        tokenizer_free(t);
    }
    free(strings);
    free(r.base);
}

/* ---- files that are refused -------------------------------------------------------------- */

/* In these, ' stands for ". */
#define MODEL "'model':{'type':'BPE','vocab':{'a':0,'b':1,'ab':2},'merges':['a b']}"
#define FLAGS "'special':true,'single_word':false,'lstrip':false,'rstrip':false," \
              "'normalized':false"

static const struct {
    const char *json;
    lm_status code;
    const char *says;
} REFUSED[] = {
    {"", LM_FORMAT, "not valid JSON"},
    {"{'model':", LM_FORMAT, "not valid JSON"},
    {"[]", LM_FORMAT, "must hold a JSON object"},
    {"{}", LM_FORMAT, "'model' must be an object"},
    {"{'version':'2.0'," MODEL "}", LM_UNSUPPORTED, "version '2.0'"},
    {"{'model':{'type':'Unigram'}}", LM_UNSUPPORTED, "model: type 'Unigram'"},
    {"{'model':{'type':'BPE','merges':[]}}", LM_FORMAT, "model.vocab"},
    {"{'model':{'type':'BPE','vocab':{'a':-1},'merges':[]}}", LM_FORMAT, "id of 'a'"},
    {"{'model':{'type':'BPE','vocab':{'a':99999999},'merges':[]}}", LM_FORMAT, "id of"},
    {"{'model':{'type':'BPE','vocab':{'a':0,'b':0},'merges':[]}}", LM_FORMAT, "share id 0"},
    {"{'model':{'type':'BPE','vocab':{'a':0,'a':1},'merges':[]}}", LM_FORMAT, "duplicate"},
    {"{'model':{'type':'BPE','vocab':{'a':0}}}", LM_FORMAT, "'merges' must be an array"},
    {"{'model':{'type':'BPE','vocab':{'a':0},'merges':['a']}}", LM_FORMAT, "merges[0]"},
    {"{'model':{'type':'BPE','vocab':{'a':0},'merges':['a a']}}", LM_FORMAT, "'aa' is not in"},
    {"{'model':{'type':'BPE','dropout':0.1,'vocab':{},'merges':[]}}", LM_UNSUPPORTED, "dropout"},
    {"{'model':{'type':'BPE','end_of_word_suffix':'</w>','vocab':{},'merges':[]}}",
     LM_UNSUPPORTED, "end_of_word_suffix"},
    {"{'model':{'type':'BPE','continuing_subword_prefix':'##','vocab':{},'merges':[]}}",
     LM_UNSUPPORTED, "continuing_subword_prefix"},
    {"{'normalizer':{'type':'Precompiled'}," MODEL "}",
     LM_UNSUPPORTED, "normalizer: type 'Precompiled'"},
    {"{'normalizer':{'type':'BertNormalizer'}," MODEL "}", LM_UNSUPPORTED, "BertNormalizer"},
    {"{'normalizer':[]," MODEL "}", LM_FORMAT, "normalizer: an object with a 'type'"},
    {"{'pre_tokenizer':{'type':'Punctuation'}," MODEL "}", LM_UNSUPPORTED, "pre_tokenizer: type"},
    {"{'pre_tokenizer':{'type':'Split','pattern':{'Regex':'(a'},'behavior':'Isolated',"
     "'invert':false}," MODEL "}", LM_FORMAT, "does not compile"},
    {"{'pre_tokenizer':{'type':'Split','pattern':{'Regex':'\\\\bx'},'behavior':'Isolated',"
     "'invert':false}," MODEL "}", LM_UNSUPPORTED, "\\b in a regex"},
    {"{'pre_tokenizer':{'type':'Split','pattern':{'Regex':'(a)\\\\1'},'behavior':'Isolated',"
     "'invert':false}," MODEL "}", LM_UNSUPPORTED, "\\1 in a regex"},
    {"{'pre_tokenizer':{'type':'Split','pattern':{'Regex':'(?m:a)'},'behavior':'Isolated',"
     "'invert':false}," MODEL "}", LM_UNSUPPORTED, "(?...)"},
    {"{'pre_tokenizer':{'type':'Split','pattern':{'Regex':'[a&&b]'},'behavior':'Isolated',"
     "'invert':false}," MODEL "}", LM_UNSUPPORTED, "&&"},
    {"{'pre_tokenizer':{'type':'Split','pattern':{'String':''},'behavior':'Isolated',"
     "'invert':false}," MODEL "}", LM_UNSUPPORTED, "empty pattern"},
    {"{'pre_tokenizer':{'type':'Split','pattern':{'String':'x'},'behavior':'Sideways',"
     "'invert':false}," MODEL "}", LM_UNSUPPORTED, "'Sideways'"},
    {"{'pre_tokenizer':{'type':'Metaspace','replacement':'ab'}," MODEL "}",
     LM_FORMAT, "one character"},
    {"{'pre_tokenizer':{'type':'Metaspace','replacement':'_','prepend_scheme':'last'}," MODEL "}",
     LM_UNSUPPORTED, "'last'"},
    {"{'normalizer':{'type':'Strip','strip_left':true,'strip_right':true},'pre_tokenizer':"
     "{'type':'Metaspace','replacement':'_','prepend_scheme':'first'}," MODEL "}",
     LM_UNSUPPORTED, "prepend_scheme 'first'"},
    {"{'post_processor':{'type':'RobertaProcessing'}," MODEL "}",
     LM_UNSUPPORTED, "RobertaProcessing"},
    {"{'post_processor':{'type':'TemplateProcessing','single':[{'Sequence':{'id':'B'}}]}," MODEL
     "}", LM_UNSUPPORTED, "Sequence A"},
    {"{'post_processor':{'type':'TemplateProcessing',"
     "'single':[{'SpecialToken':{'id':'<s>'}}]}," MODEL "}", LM_FORMAT, "not in special_tokens"},
    {"{'decoder':{'type':'WordPiece'}," MODEL "}", LM_UNSUPPORTED, "decoder: type 'WordPiece'"},
    {"{'decoder':{'type':'Strip','content':' ','start':-1,'stop':0}," MODEL "}",
     LM_FORMAT, "'start'"},
    {"{'added_tokens':{}," MODEL "}", LM_FORMAT, "added_tokens must be an array"},
    {"{'added_tokens':[{'id':7,'content':'<s>'," FLAGS "}]," MODEL "}", LM_MISMATCH, "makes it 3"},
    {"{'added_tokens':[{'id':3,'content':'<s>'}]," MODEL "}", LM_FORMAT, "'special' must be"},
    {"{'added_tokens':[{'id':3,'content':'x'," FLAGS "},{'id':4,'content':'x'," FLAGS "}]," MODEL
     "}", LM_FORMAT, "'x' is there twice"},
};

static char *quoted(const char *s)
{
    char *t = lm_strdup(s);
    for (char *p = t; *p; p++)
        *p = *p == '\'' ? '"' : *p;
    return t;
}

static void files_that_are_refused_name_the_reason(void **state)
{
    (void)state;
    for (size_t i = 0; i < LM_COUNT(REFUSED); i++) {
        struct lm_err err = {0};
        tokenizer *t = NULL;
        char *json = quoted(REFUSED[i].json), *says = quoted(REFUSED[i].says);
        lm_status st = tok_parse(json, strlen(json), &t, &err);
        if (st != REFUSED[i].code || !strstr(err.msg, says))
            fail_msg("case %zu: status %s, message '%s', expected '%s'", i, lm_status_wire(st),
                     err.msg, says);
        assert_null(t);
        free(json);
        free(says);
    }
    struct lm_err err = {0};
    tokenizer *t = NULL;
    assert_int_equal(tokenizer_load("tests/no-such-model", &t, &err), LM_NOT_FOUND);
    assert_non_null(strstr(err.msg, "tests/no-such-model/tokenizer.json"));
    char dir[] = "/tmp/loramill-fifo-XXXXXX", fifo[64];
    assert_non_null(mkdtemp(dir));
    snprintf(fifo, sizeof fifo, "%s/tokenizer.json", dir);
    assert_int_equal(mkfifo(fifo, 0600), 0);
    alarm(30);                  /* opening it used to wait for a writer */
    assert_int_equal(tokenizer_load(dir, &t, &err), LM_FORMAT);
    alarm(0);
    unlink(fifo);
    rmdir(dir);
}

/* ---- speed (tests/fixtures/tokenizers/speed.py) ------------------------------------------ */

/* The next 2,000 characters. */
static size_t part(const char *s, size_t n)
{
    size_t at = 0;
    for (int i = 0; i < 2000 && at < n; i++)
        at += (size_t)tok_utf8_len((unsigned char)s[at]);
    return LM_MIN(at, n);
}

static int speed(const char *kind, const char *path)
{
    char *text;
    size_t n, len;
    double best = 1e9;
    struct lm_err err = {0};
    if (tok_read_file(path, &text, &n, &err)) {
        fprintf(stderr, "%s\n", err.msg);
        return 1;
    }
    tokenizer *t = load(kind);
    for (int round = 0; round < 3; round++) {
        int64_t start = cpu_ns();
        for (size_t at = 0; at < n; at += len) {
            struct token_ids ids = {0};
            len = part(text + at, n - at);
            tokenizer_encode(t, text + at, len, true, &ids, NULL);
            token_ids_release(&ids);
        }
        best = LM_MIN(best, (double)(cpu_ns() - start) * 1e-9);
    }
    printf("%.2f\n", (double)n / best / 1e6);
    tokenizer_free(t);
    free(text);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 4 && strcmp(argv[1], "--speed") == 0)
        return speed(argv[2], argv[3]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(encode_and_decode_equal_the_reference),
        cmocka_unit_test(random_ids_decode_as_the_reference_does),
        cmocka_unit_test(every_assigned_code_point_encodes_as_in_the_reference),
        cmocka_unit_test(split_agrees_in_behaviour_and_regex_dialect),
        cmocka_unit_test(pieces_together_are_the_text),
        cmocka_unit_test(a_piece_may_be_part_of_a_character),
        cmocka_unit_test(tokens_are_known_by_text_and_kind),
        cmocka_unit_test(text_that_is_not_utf8_is_refused),
        cmocka_unit_test(long_runs_take_little_time),
        cmocka_unit_test(one_tokenizer_serves_many_threads),
        cmocka_unit_test(files_that_are_refused_name_the_reason),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
