/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tokenizer.h - tokenizer.json of Hugging Face tokenizers: byte-level BPE and SentencePiece BPE.
 *
 * Normalizers, pre-tokenizers (their own regexes through PCRE2), added tokens, BPE with merges,
 * byte fallback, post-processors (TemplateProcessing, ByteLevel, Sequence) and decoders. A
 * component that we do not implement is refused by name at load.
 *
 * A tokenizer is immutable after load and may be used from any thread at once.
 */
#ifndef LORAMILL_ENGINE_TOKENIZER_H
#define LORAMILL_ENGINE_TOKENIZER_H

#include "kernels/base.h"

typedef struct tokenizer tokenizer;

struct token_ids {              /* a growing array; zero it before first use */
    int32_t *id;
    int n, cap;
};
void token_ids_release(struct token_ids *t);

/* Reads dir/tokenizer.json (and tokenizer_config.json for special-token names). */
lm_status tokenizer_load(const char *dir, tokenizer **out, struct lm_err *err);
void tokenizer_free(tokenizer *t);

/* Tests only. */
int tokenizer_vocab_size(const tokenizer *t);           /* largest id + 1, added tokens included */
int32_t tokenizer_token_id(const tokenizer *t, const char *text);   /* -1: no such token */
bool tokenizer_is_special(const tokenizer *t, int32_t id);

/* Appends the ids of UTF-8 `text` (LM_FORMAT when it is not UTF-8). `add_special`: run the
 * post-processor (BOS and the like). Added tokens inside the text are recognised in both cases, as
 * Hugging Face does. Equal to tokenizers' encode(text, add_special_tokens=add_special).ids. */
lm_status tokenizer_encode(const tokenizer *t, const char *text, size_t len, bool add_special,
                           struct token_ids *out, struct lm_err *err);

/* Equal to tokenizers' decode(ids, skip_special_tokens=skip_special). Malloc'ed, NUL-terminated,
 * valid UTF-8 (invalid bytes become U+FFFD as Hugging Face does). Unknown ids are skipped. */
lm_status tokenizer_decode(const tokenizer *t, const int32_t *ids, int n, bool skip_special,
                           char **text, size_t *len, struct lm_err *err);

/* The token alone, as raw bytes (may be part of a character), for logprobs. Malloc'ed. */
lm_status tokenizer_piece(const tokenizer *t, int32_t id, char **bytes, size_t *len,
                          struct lm_err *err);

/* Streaming decode: push ids one by one, take text that can no longer change. What was taken is
 * always whole characters, and all pieces together equal tokenizer_decode() of all ids. */
typedef struct detok detok;
lm_status detok_new(const tokenizer *t, bool skip_special, detok **out, struct lm_err *err);
void detok_free(detok *d);
/* Appends newly final text to an internal buffer; *text and *len describe all final text so far. */
lm_status detok_push(detok *d, int32_t id, const char **text, size_t *len, struct lm_err *err);
/* Flushes what was held back. */
lm_status detok_finish(detok *d, const char **text, size_t *len, struct lm_err *err);

#endif
