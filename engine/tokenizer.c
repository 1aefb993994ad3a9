/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tokenizer.c - loading a tokenizer.json and the two roads through it; tok_internal.h has the map.
 *
 * The reference for every result is Hugging Face's `tokenizers` library given the same file, not
 * the classes of transformers around it. The file's own "truncation" and "padding" are ignored:
 * transformers turns both off for a plain call, and a prompt must reach the engine whole.
 *
 * Errors at load name the component and what about it is not supported. Errors later are only: text
 * that is not UTF-8, text that is too large or makes a pattern run away, and memory.
 */
#include "engine/tok_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- loading ----------------------------------------------------------------------------- */

/* Metaspace "first" asks whether a piece begins where the text does. We know that from positions
 * alone unless an earlier step moved text about; then the reference's answer depends on its
 * bookkeeping of offsets, which we don't imitate. */
static lm_status check_first(const tokenizer *t, struct lm_err *err)
{
    bool moved = false;
    if (!tok_pretok_needs_start(&t->pretok))
        return LM_OK;
    for (int i = 0; i < t->norm.n; i++) {
        const struct tok_norm_op *op = &t->norm.op[i];
        const struct tok_pattern *p = &op->pat;
        moved |= op->kind == NORM_STRIP ||
            (op->kind == NORM_REPLACE && (!p->literal || op->text_len == 0 ||
             p->literal_len != (size_t)tok_utf8_len((unsigned char)p->literal[0])));
    }
    for (int i = 0; t->pretok.op[i].kind != PRE_METASPACE; i++)
        moved |= t->norm.n > 0 || t->pretok.op[i].kind != PRE_SPLIT;
    return !moved ? LM_OK :
        lm_err_set(err, LM_UNSUPPORTED, "pre_tokenizer: Metaspace with prepend_scheme \"first\" "
                   "behind steps that remove or insert text is not supported");
}

static int largest_id(const tokenizer *t)
{
    int n = t->bpe.vocab.size;
    for (int i = 0; i < t->added.n; i++)
        n = LM_MAX(n, t->added.tok[i].id + 1);
    return n;
}

static lm_status parse_parts(tokenizer *t, json_t *j, struct lm_err *err)
{
    const char *version = json_string_value(json_object_get(j, "version"));
    if (!json_is_object(j))
        return lm_err_set(err, LM_FORMAT, "the file must hold a JSON object");
    if (version && strcmp(version, "1.0") != 0)
        return lm_err_set(err, LM_UNSUPPORTED, "version \"%.32s\" is not supported; \"1.0\" is",
                          version);
    lm_status st = tok_bpe_parse(&t->bpe, json_object_get(j, "model"), err);
    if (!st)
        st = tok_normalizer_parse(&t->norm, json_object_get(j, "normalizer"), err);
    if (!st)
        st = tok_pretok_parse(&t->pretok, json_object_get(j, "pre_tokenizer"), err);
    if (!st)
        st = check_first(t, err);
    if (!st)
        st = tok_added_parse(&t->added, json_object_get(j, "added_tokens"), &t->bpe.vocab,
                             &t->norm, err);
    if (!st)
        st = tok_post_parse(&t->post, json_object_get(j, "post_processor"), err);
    if (!st)
        st = tok_decoder_parse(&t->dec, json_object_get(j, "decoder"), err);
    return st;
}

lm_status tok_parse(const char *json, size_t n, tokenizer **out, struct lm_err *err)
{
    json_error_t je;
    json_t *j = json_loadb(json, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &je);
    if (!j)
        return lm_err_set(err, LM_FORMAT, "not valid JSON: line %d: %s", je.line, je.text);
    tokenizer *t = lm_calloc(1, sizeof *t);
    lm_status st = t ? parse_parts(t, j, err) : tok_nomem(err);
    json_decref(j);
    if (st) {
        tokenizer_free(t);
        return st;
    }
    t->vocab_size = largest_id(t);
    *out = t;
    return LM_OK;
}

static lm_status read_open_file(FILE *f, char **text, size_t *n, struct lm_err *err)
{
    struct stat sb;
    if (fstat(fileno(f), &sb) != 0 || !S_ISREG(sb.st_mode))
        return lm_err_set(err, LM_FORMAT, "not a regular file");
    if (sb.st_size < 0 || (size_t)sb.st_size > TOK_MAX_FILE)
        return lm_err_set(err, LM_TOO_LARGE, "%lld bytes; %zu are allowed", (long long)sb.st_size,
                          TOK_MAX_FILE);
    *n = (size_t)sb.st_size;
    *text = lm_malloc(*n + 1);
    if (!*text)
        return tok_nomem(err);
    if (fread(*text, 1, *n, f) != *n)
        return lm_err_set(err, LM_IO, "reading failed");
    (*text)[*n] = '\0';
    return LM_OK;
}

lm_status tok_read_file(const char *path, char **text, size_t *n, struct lm_err *err)
{
    *text = NULL;
    /* O_NONBLOCK: a FIFO in place of the file must not hang the caller. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    FILE *f = fd < 0 ? NULL : fdopen(fd, "rb");
    if (!f) {
        lm_status why = errno == ENOENT ? LM_NOT_FOUND : LM_IO;
        lm_err_set(err, why, "%s: %s", path, strerror(errno));
        if (fd >= 0)
            close(fd);
        return why;
    }
    lm_status st = read_open_file(f, text, n, err);
    fclose(f);
    if (st) {
        free(*text);
        *text = NULL;
        lm_err_prefix(err, "%s", path);
    }
    return st;
}

lm_status tokenizer_load(const char *dir, tokenizer **out, struct lm_err *err)
{
    char path[4096], *text;
    size_t n;
    if ((size_t)snprintf(path, sizeof path, "%s/tokenizer.json", dir) >= sizeof path)
        return lm_err_set(err, LM_INVALID, "the model folder's name is too long");
    lm_status st = tok_read_file(path, &text, &n, err);
    if (st)
        return st;
    st = tok_parse(text, n, out, err);
    free(text);
    if (st)
        lm_err_prefix(err, "%s", path);
    return st;
}

void tokenizer_free(tokenizer *t)
{
    if (!t)
        return;
    tok_normalizer_release(&t->norm);
    tok_pretok_release(&t->pretok);
    tok_bpe_release(&t->bpe);
    tok_added_release(&t->added);
    tok_post_release(&t->post);
    tok_decoder_release(&t->dec);
    free(t);
}

/* ---- facts ------------------------------------------------------------------------------- */

int tokenizer_vocab_size(const tokenizer *t)
{
    return t->vocab_size;
}

int32_t tokenizer_token_id(const tokenizer *t, const char *text)
{
    size_t n = strlen(text);
    const struct tok_added_token *a = tok_added_by_text(&t->added, text, n);
    return a ? a->id : tok_vocab_get(&t->bpe.vocab, text, n);
}

bool tokenizer_is_special(const tokenizer *t, int32_t id)
{
    const struct tok_added_token *a = tok_added_by_id(&t->added, id);
    return a && a->special;
}

/* ---- encoding ---------------------------------------------------------------------------- */

struct encoding {               /* one call's everything */
    const tokenizer *t;
    struct token_ids *out;
    struct tok_buf norm, tmp;
    struct tok_prework pre;
    struct tok_bpework bpe;
};

static lm_status encode_id(void *ctx, int32_t id, struct lm_err *err)
{
    struct encoding *e = ctx;
    return tok_ids_add(e->out, id, err);
}

/* Normalised text without added tokens. */
static lm_status encode_text(void *ctx, const char *s, size_t n, bool at_start, struct lm_err *err)
{
    struct encoding *e = ctx;
    lm_status st = tok_pretokenize(&e->t->pretok, &e->pre, s, n, at_start, err);
    for (size_t i = 0; i < e->pre.pieces.n && !st; i++) {
        const struct tok_piece *p = &e->pre.pieces.v[i];
        st = tok_bpe_word(&e->t->bpe, &e->bpe, e->pre.text.p + p->off, p->len, e->out, err);
    }
    return st;
}

/* Raw text without those added tokens that are matched raw. */
static lm_status encode_raw(void *ctx, const char *s, size_t n, bool at_start, struct lm_err *err)
{
    struct encoding *e = ctx;
    const struct tok_added_sink sink = {e, encode_text, encode_id};
    lm_status st = tok_normalize(&e->t->norm, s, n, &e->norm, &e->tmp, err);
    if (st)
        return st;
    return tok_added_split(&e->t->added, true, e->norm.p ? e->norm.p : "", e->norm.len, at_start,
                           &sink, err);
}

static lm_status add_ids(struct token_ids *out, const int32_t *ids, int n, struct lm_err *err)
{
    lm_status st = LM_OK;
    for (int i = 0; i < n && !st; i++)
        st = tok_ids_add(out, ids[i], err);
    return st;
}

lm_status tokenizer_encode(const tokenizer *t, const char *text, size_t len, bool add_special,
                           struct token_ids *out, struct lm_err *err)
{
    const struct tok_post *post = &t->post;
    int before = out->n;
    if (len > TOK_MAX_TEXT)
        return lm_err_set(err, LM_TOO_LARGE, "a text of %zu bytes; %zu are allowed", len,
                          TOK_MAX_TEXT);
    size_t bad = tok_utf8_check(text, len);
    if (bad < len)
        return lm_err_set(err, LM_FORMAT, "the text is not UTF-8: byte %zu is 0x%02x", bad,
                          (unsigned char)text[bad]);
    struct encoding e = {.t = t, .out = out};
    const struct tok_added_sink sink = {&e, encode_raw, encode_id};
    lm_status st = add_special ? add_ids(out, post->before, post->n_before, err) : LM_OK;
    if (!st && post->repeat)
        st = tok_added_split(&t->added, false, text, len, true, &sink, err);
    if (!st && add_special)
        st = add_ids(out, post->after, post->n_after, err);
    tok_buf_release(&e.norm);
    tok_buf_release(&e.tmp);
    tok_prework_release(&e.pre);
    tok_bpework_release(&e.bpe);
    if (st)
        out->n = before;
    return st;
}

/* ---- decoding ---------------------------------------------------------------------------- */

const char *tok_decode_string(const tokenizer *t, int32_t id, bool skip_special, size_t *len)
{
    const struct tok_added_token *a = tok_added_by_id(&t->added, id);
    if (!a)
        return tok_vocab_str(&t->bpe.vocab, id, len);
    if (skip_special && a->skip)
        return NULL;
    *len = a->match_len;
    return a->match;
}

lm_status tokenizer_decode(const tokenizer *t, const int32_t *ids, int n, bool skip_special,
                           char **text, size_t *len, struct lm_err *err)
{
    struct tok_decrun run;
    lm_status st = LM_OK;
    tok_decrun_init(&run, &t->dec);
    for (int i = 0; i < n && !st; i++) {
        size_t k;
        const char *s = tok_decode_string(t, ids[i], skip_special, &k);
        if (s)
            st = tok_decrun_token(&run, s, k, err);
    }
    if (!st)
        st = tok_decrun_finish(&run, err);
    if (!st)
        tok_buf_add(&run.out, "", 0);           /* so that even nothing is a string */
    if (!st && !(st = tok_buf_check(&run.out, err))) {
        *text = run.out.p;
        *len = run.out.len;
        run.out = (struct tok_buf){0};
    }
    tok_decrun_release(&run);
    return st;
}

lm_status tokenizer_piece(const tokenizer *t, int32_t id, char **bytes, size_t *len,
                          struct lm_err *err)
{
    struct tok_buf out = {0};
    size_t n;
    const char *s = tok_decode_string(t, id, false, &n);
    if (!s)
        return lm_err_set(err, LM_NOT_FOUND, "token id %d is not in the vocabulary", id);
    lm_status st = LM_OK;
    if (tok_added_by_id(&t->added, id))
        tok_buf_add(&out, s, n);
    else
        st = tok_decoder_piece(&t->dec, s, n, &out, err);
    if (!st)
        st = tok_buf_check(&out, err);
    if (st) {
        tok_buf_release(&out);
        return st;
    }
    *bytes = out.p;
    *len = out.len;
    return LM_OK;
}
