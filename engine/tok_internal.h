/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_internal.h - what the tokenizer's own files share. Nothing outside engine/tok* and detok.c
 * may include it, except the tokenizer's tests and fuzz target (tok_parse).
 *
 * The road of a text through tokenizer_encode(), one file a station:
 *
 *   text -> added tokens in raw text (tok_added.c)
 *        -> normalizer               (tok_normalizer.c), on each stretch between added tokens
 *        -> added tokens in normalised text (tok_added.c)
 *        -> pre-tokenizer            (tok_pretok.c): stretches become words
 *        -> BPE                      (tok_bpe.c): words become ids
 *        -> post-processor           (tok_post.c): BOS and the like around the ids
 *
 * and back: ids -> token strings -> decoder stages (tok_decoder.c) -> text; detok.c drives the same
 * stages one id at a time.
 *
 * Each component is parsed from its JSON object by its own *_parse() and is immutable from then on.
 * All per-call state lives in buffers that the call owns, so any number of threads may encode and
 * decode with one tokenizer. Components are parts of `struct tokenizer`, zeroed before parsing; a
 * *_release() of a zeroed or half-parsed component is allowed.
 */
#ifndef LORAMILL_ENGINE_TOK_INTERNAL_H
#define LORAMILL_ENGINE_TOK_INTERNAL_H

#include <jansson.h>

#include "engine/tokenizer.h"

/* ---- limits of what a file may ask for --------------------------------------------------- */

#define TOK_MAX_ID (1 << 22)            /* ids are indices of tables */
#define TOK_MAX_FILE ((size_t)256 << 20)
#define TOK_MAX_TEXT ((size_t)1 << 28)  /* bytes of one text, before and after normalisation */
#define TOK_MAX_ADDED_LEN 1024          /* bytes of one added token: bounds the matching */
#define TOK_MAX_STAGES 32               /* of one component, after flattening Sequence */
#define TOK_MAX_DEPTH 8                 /* Sequence within Sequence */

/* ---- growing bytes (tok_util.c) ---------------------------------------------------------- */

/* Failure to grow is remembered in `oom` and tested once, at the end of a piece of work. */
struct tok_buf {
    char *p;
    size_t len, cap;
    bool oom;
};
void tok_buf_release(struct tok_buf *b);
void tok_buf_clear(struct tok_buf *b);          /* keeps the memory */
void tok_buf_add(struct tok_buf *b, const void *p, size_t n);
void tok_buf_add_cp(struct tok_buf *b, int32_t cp);
lm_status tok_buf_check(const struct tok_buf *b, struct lm_err *err);

lm_status tok_nomem(struct lm_err *err);
lm_status tok_ids_add(struct token_ids *t, int32_t id, struct lm_err *err);

/* ---- UTF-8 and character classes (tok_util.c, tok_unicode.c) ----------------------------- */

#define TOK_REPLACEMENT "\xEF\xBF\xBD"          /* U+FFFD */

/* Offset of the first byte that is not part of valid UTF-8, or n. */
size_t tok_utf8_check(const char *s, size_t n);
/* Decodes one character of valid UTF-8; returns its length. */
int tok_utf8_next(const char *s, int32_t *cp);
int tok_utf8_len(unsigned char lead);           /* of a valid lead byte */

/* One step over untrusted bytes: > 0: a character of so many bytes; 0: a valid beginning, more is
 * needed; < 0: -n bytes that make one U+FFFD (the maximal subpart, Unicode 3.9, as Rust does). */
int tok_utf8_step(const unsigned char *s, size_t n);

/* Rust's char::is_whitespace, char::is_numeric, and \w of its regex crate. */
bool tok_is_space(int32_t cp);
bool tok_is_numeric(int32_t cp);
bool tok_is_word(int32_t cp);

/* Code points that the reference's normalisation tables do not know: for it they are inert. */
bool tok_is_norm_inert(int32_t cp);
/* Lower-case form as Rust's char::to_lowercase: one or two code points. */
int tok_lower(int32_t cp, int32_t out[2]);
/* Appends what the reference's \p{NAME} has beyond an older PCRE2's, as ranges for a character
 * class. False: NAME is not a general category. */
bool tok_unicode_extra(const char *name, size_t len, struct tok_buf *out);

/* The GPT-2 alphabet: each byte as a printable character, and back (-1: not of the alphabet). */
int32_t tok_byte_to_char(unsigned char byte);
int tok_char_to_byte(int32_t cp);

/* ---- hash tables (tok_hash.c) ------------------------------------------------------------ */

/* 64-bit keys to 64-bit values; UINT64_MAX is "absent". */
struct tok_map {
    struct tok_slot {
        uint64_t key, value;
    } *slot;
    size_t mask, n;
};
lm_status tok_map_init(struct tok_map *m, size_t expected, struct lm_err *err);
void tok_map_release(struct tok_map *m);
lm_status tok_map_put(struct tok_map *m, uint64_t key, uint64_t value, struct lm_err *err);
uint64_t tok_map_get(const struct tok_map *m, uint64_t key);

/* Token strings to ids and back. Ids may have holes. */
struct tok_vocab {
    struct tok_str {
        uint32_t off, len;
        bool used;
    } *str;                     /* by id */
    int size;                   /* largest id + 1 */
    int count;
    struct tok_buf bytes;
    int32_t *slot;              /* id or -1 */
    size_t mask;
};
lm_status tok_vocab_init(struct tok_vocab *v, size_t count, int size, struct lm_err *err);
void tok_vocab_release(struct tok_vocab *v);
lm_status tok_vocab_put(struct tok_vocab *v, const char *s, size_t n, int32_t id,
                        struct lm_err *err);
int32_t tok_vocab_get(const struct tok_vocab *v, const char *s, size_t n);
const char *tok_vocab_str(const struct tok_vocab *v, int32_t id, size_t *len); /* NULL: none */

/* ---- patterns (tok_regex.c) -------------------------------------------------------------- */

/* A `pattern` object of tokenizer.json: {"String": s} or {"Regex": r}. */
struct tok_pattern {
    char *literal;              /* or NULL */
    size_t literal_len;
    void *code;                 /* pcre2_code, or NULL */
};
lm_status tok_pattern_parse(struct tok_pattern *p, json_t *j, const char *where,
                            struct lm_err *err);
lm_status tok_pattern_regex(struct tok_pattern *p, const char *regex, const char *where,
                            struct lm_err *err);
void tok_pattern_release(struct tok_pattern *p);

/* Walks the matches of one pattern through one text. Zero it, then init; always release. */
struct tok_match_iter {
    const struct tok_pattern *pat;
    const char *s;
    size_t n, at;
    size_t last_end;            /* of the last match; SIZE_MAX: none yet */
    void *data;                 /* pcre2_match_data, this call's own */
    void *ctx;                  /* pcre2_match_context */
    void *jit_stack;            /* only after the default one was too small */
    lm_status status;
};
lm_status tok_match_init(struct tok_match_iter *it, const struct tok_pattern *p,
                         struct lm_err *err);
void tok_match_text(struct tok_match_iter *it, const char *s, size_t n);
/* True: *start and *end hold the next match; false: no more, or it->status is an error. */
bool tok_match_next(struct tok_match_iter *it, size_t *start, size_t *end, struct lm_err *err);
void tok_match_release(struct tok_match_iter *it);
/* Appends s with every match replaced. Nothing is replaced in empty text. */
lm_status tok_pattern_replace(const struct tok_pattern *p, const char *by, size_t by_len,
                              const char *s, size_t n, struct tok_buf *out, struct lm_err *err);

/* ---- JSON helpers (tok_util.c) ----------------------------------------------------------- */

/* A boolean member; `def` when absent or null; def < 0: required. */
lm_status tok_json_bool(json_t *j, const char *key, int def, const char *where, bool *out,
                        struct lm_err *err);
/* Calls fn(ctx, element) for each element of the array j[key]; depth-limited by the caller. */
lm_status tok_json_array(json_t *j, const char *key, const char *where, json_t **out,
                         struct lm_err *err);
lm_status tok_json_string(json_t *j, const char *key, const char *where, const char **s,
                          size_t *n, struct lm_err *err);
lm_status tok_unsupported(struct lm_err *err, const char *where, const char *type);

/* Calls `part` for the component j, and if it is a Sequence for each of its own below `key`,
 * however nested (to TOK_MAX_DEPTH). None, or null: LM_OK. */
typedef lm_status tok_part(void *ctx, json_t *j, const char *type, struct lm_err *err);
lm_status tok_json_parts(json_t *j, const char *key, const char *where, tok_part *part, void *ctx,
                         struct lm_err *err);

/* ---- components -------------------------------------------------------------------------- */

struct tok_norm_op {
    enum { NORM_NFC, NORM_NFD, NORM_NFKC, NORM_NFKD, NORM_LOWER, NORM_PREPEND, NORM_REPLACE,
           NORM_STRIP } kind;
    char *text;                 /* PREPEND, REPLACE */
    size_t text_len;
    struct tok_pattern pat;     /* REPLACE */
    bool left, right;           /* STRIP */
};
struct tok_normalizer {
    struct tok_norm_op op[TOK_MAX_STAGES];
    int n;
};
lm_status tok_normalizer_parse(struct tok_normalizer *nz, json_t *j, struct lm_err *err);
void tok_normalizer_release(struct tok_normalizer *nz);
/* out = normalised s; `tmp` is scratch. Both are the caller's and may be reused. */
lm_status tok_normalize(const struct tok_normalizer *nz, const char *s, size_t n,
                        struct tok_buf *out, struct tok_buf *tmp, struct lm_err *err);

struct tok_pre_op {
    enum { PRE_PREFIX_SPACE, PRE_METASPACE, PRE_BYTES, PRE_SPLIT } kind;
    enum { SPLIT_PATTERN, SPLIT_NUMERIC, SPLIT_WORD } by;
    enum { SPLIT_REMOVED, SPLIT_ISOLATED, SPLIT_PREVIOUS, SPLIT_NEXT, SPLIT_CONTIGUOUS } behavior;
    bool invert;
    enum { META_ALWAYS, META_FIRST, META_NEVER } scheme;
    struct tok_pattern pat;     /* SPLIT_PATTERN; of METASPACE: the replacement */
};
struct tok_pretok {
    struct tok_pre_op op[TOK_MAX_STAGES];
    int n;
};
lm_status tok_pretok_parse(struct tok_pretok *pt, json_t *j, struct lm_err *err);
void tok_pretok_release(struct tok_pretok *pt);
bool tok_pretok_needs_start(const struct tok_pretok *pt);       /* has a Metaspace "first" */

struct tok_piece {
    size_t off, len;
    bool at_start;              /* begins where the whole text begins */
};
struct tok_pieces {
    struct tok_piece *v;
    size_t n, cap;
};
struct tok_prework {            /* one call's scratch; zero it first */
    struct tok_buf text, text2;
    struct tok_pieces pieces, pieces2, spans;
    struct tok_match_iter it[TOK_MAX_STAGES];
};
void tok_prework_release(struct tok_prework *w);
/* Splits s into words: w->pieces over w->text. */
lm_status tok_pretokenize(const struct tok_pretok *pt, struct tok_prework *w, const char *s,
                          size_t n, bool at_start, struct lm_err *err);

struct tok_bpe {
    struct tok_vocab vocab;
    struct tok_map merges;      /* left << 32 | right -> rank << 32 | merged */
    int32_t char_id[0x300];     /* ids of the first characters, -1: none */
    int32_t byte_id[256];       /* <0xHH>, -1: none */
    bool byte_fallback, fuse_unk, ignore_merges;
    bool has_unk;
    int32_t unk;                /* -1 with has_unk: not in the vocabulary */
};
lm_status tok_bpe_parse(struct tok_bpe *m, json_t *j, struct lm_err *err);
void tok_bpe_release(struct tok_bpe *m);

struct tok_bpework {            /* one call's scratch; zero it first */
    struct tok_sym {
        int32_t id, prev, next;
    } *sym;
    uint64_t *rank;             /* of small words: merge of symbol i with the next */
    struct tok_cand {
        uint64_t order;         /* rank << 32 | position: smallest first */
        int32_t left, right, merged;
    } *heap;
    size_t cap, n_heap, cap_heap;
};
void tok_bpework_release(struct tok_bpework *w);
lm_status tok_bpe_word(const struct tok_bpe *m, struct tok_bpework *w, const char *s, size_t n,
                       struct token_ids *out, struct lm_err *err);

struct tok_added_token {
    char *content, *match;      /* match: what to look for; differs when normalised */
    size_t len, match_len;
    int32_t id;
    bool special, single_word, lstrip, rstrip, normalized;
    bool skip;                  /* decode(skip_special) leaves it out */
};
struct tok_trie {
    struct tok_map edge;        /* node << 8 | byte -> node */
    struct tok_map leaf;        /* node -> index of added token */
    uint32_t n_nodes;
    bool first[256];            /* a token begins with this byte */
};
struct tok_added {
    struct tok_added_token *tok;
    int n;
    struct tok_trie raw, normalized;
    struct tok_map by_id;       /* id -> index */
};
lm_status tok_added_parse(struct tok_added *a, json_t *j, const struct tok_vocab *vocab,
                          const struct tok_normalizer *nz, struct lm_err *err);
void tok_added_release(struct tok_added *a);
const struct tok_added_token *tok_added_by_id(const struct tok_added *a, int32_t id);
const struct tok_added_token *tok_added_by_text(const struct tok_added *a, const char *s,
                                                size_t n);
/* Cuts s: calls on_text for stretches without added tokens, on_id for the tokens, in order. */
struct tok_added_sink {
    void *ctx;
    lm_status (*on_text)(void *ctx, const char *s, size_t n, bool at_start, struct lm_err *err);
    lm_status (*on_id)(void *ctx, int32_t id, struct lm_err *err);
};
lm_status tok_added_split(const struct tok_added *a, bool normalized, const char *s, size_t n,
                          bool at_start, const struct tok_added_sink *sink, struct lm_err *err);

struct tok_post {
    int32_t *before, *after;    /* ids around the text's; see repeat */
    int n_before, n_after;
    int repeat;                 /* how often the text itself stands in the template: 0 or 1 */
};
lm_status tok_post_parse(struct tok_post *p, json_t *j, struct lm_err *err);
void tok_post_release(struct tok_post *p);

struct tok_dec_op {
    enum { DEC_BYTELEVEL, DEC_BYTEFALLBACK, DEC_FUSE, DEC_REPLACE, DEC_STRIP, DEC_METASPACE,
           DEC_SPACES } kind;   /* SPACES: no decoder at all; tokens are joined by blanks */
    struct tok_pattern pat;     /* REPLACE; of METASPACE: the replacement */
    char *text;                 /* REPLACE; of STRIP: the character */
    size_t text_len;
    int start, stop;            /* STRIP */
    bool eat_first;             /* METASPACE */
};
struct tok_decoder {
    struct tok_dec_op op[TOK_MAX_STAGES];
    int n;
};
lm_status tok_decoder_parse(struct tok_decoder *d, json_t *j, struct lm_err *err);
void tok_decoder_release(struct tok_decoder *d);

struct tok_decrun {             /* one decoding; zero it first */
    const struct tok_decoder *d;
    struct tok_decstate {
        struct tok_buf held;    /* what waits for what follows */
        struct tok_buf part;    /* fragments of a token that is wanted whole */
        struct tok_buf scratch; /* this stage's output; kept, so that a warm stream allocates not */
        bool began;             /* this stage makes one token of all, and has begun it */
        bool first;             /* no token has gone through yet */
        int cut;                /* STRIP: characters cut at this token's start */
        bool cutting;
    } st[TOK_MAX_STAGES];
    struct tok_buf out;
};
void tok_decrun_init(struct tok_decrun *r, const struct tok_decoder *d);
void tok_decrun_release(struct tok_decrun *r);
lm_status tok_decrun_token(struct tok_decrun *r, const char *s, size_t n, struct lm_err *err);
lm_status tok_decrun_finish(struct tok_decrun *r, struct lm_err *err);
/* The bytes of one token, out of context. */
lm_status tok_decoder_piece(const struct tok_decoder *d, const char *s, size_t n,
                            struct tok_buf *out, struct lm_err *err);

/* ---- the whole --------------------------------------------------------------------------- */

struct tokenizer {
    struct tok_normalizer norm;
    struct tok_pretok pretok;
    struct tok_bpe bpe;
    struct tok_added added;
    struct tok_post post;
    struct tok_decoder dec;
    int vocab_size;
};

/* Parses the text of a tokenizer.json. */
lm_status tok_parse(const char *json, size_t n, tokenizer **out, struct lm_err *err);
/* Reads a regular file of at most TOK_MAX_FILE bytes; *text is malloc'ed and NUL-terminated. */
lm_status tok_read_file(const char *path, char **text, size_t *n, struct lm_err *err);
/* What decoding feeds to the decoder for this id, or NULL: nothing (unknown, or special). */
const char *tok_decode_string(const tokenizer *t, int32_t id, bool skip_special, size_t *len);

#endif
