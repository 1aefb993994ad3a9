/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_tokenizer.c - hostile tokenizer files, texts, ids and chat templates.
 *
 * An input that begins like a Jinja tag goes through chat template recognition. Any other is a
 * tokenizer.json, optionally followed by a NUL and a text. If the file loads, the text is encoded
 * and decoded, and so are ids taken from the text's bytes; streaming must agree with the whole
 * decode.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "engine/chat_internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void decode_both_ways(const tokenizer *t, const struct token_ids *ids, bool skip)
{
    char *whole = NULL;
    const char *shown = "";
    size_t n = 0, seen = 0;
    detok *d = NULL;
    if (tokenizer_decode(t, ids->id, ids->n, skip, &whole, &n, NULL))
        return;
    if (tok_utf8_check(whole, n) != n || detok_new(t, skip, &d, NULL))
        abort();
    for (int i = 0; i < ids->n; i++)
        if (detok_push(d, ids->id[i], &shown, &seen, NULL) || seen > n ||
            memcmp(shown, whole, seen))
            abort();
    if (detok_finish(d, &shown, &seen, NULL) || seen != n || memcmp(shown, whole, n))
        abort();
    detok_free(d);
    free(whole);
}

static void use(const tokenizer *t, const char *text, size_t n)
{
    struct token_ids ids = {0}, bytes = {0};
    struct lm_err err;
    char *piece = NULL;
    size_t len;
    if (tokenizer_encode(t, text, n, true, &ids, &err) == LM_OK) {
        for (int i = 0; i < ids.n; i++)
            if (ids.id[i] < 0 || ids.id[i] >= TOK_MAX_ID)
                abort();
        decode_both_ways(t, &ids, false);
        decode_both_ways(t, &ids, true);
    } else if (err.msg[0] == '\0') {
        abort();
    }
    for (size_t i = 0; i < n && i < 256; i++) {
        tok_ids_add(&bytes, (unsigned char)text[i], NULL);
        if (tokenizer_piece(t, (unsigned char)text[i], &piece, &len, NULL) == LM_OK)
            free(piece);
    }
    decode_both_ways(t, &bytes, true);
    token_ids_release(&ids);
    token_ids_release(&bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *s = (const char *)data, *nul = memchr(s, 0, size);
    struct lm_err err = {0};
    tokenizer *t = NULL;
    if (size > 1 && s[0] == '{' && strchr("{%#", s[1]) && s[1]) {
        struct chat_form form;
        if (chat_recognise(s, size, &form, &err) == LM_OK)
            chat_form_release(&form);
        return 0;
    }
    size_t n = nul ? (size_t)(nul - s) : size;
    if (tok_parse(s, n, &t, &err)) {
        if (err.msg[0] == '\0')
            abort();
        return 0;
    }
    const char *text = nul ? nul + 1 : "Hello, w\xC3\xB6rld 123!";
    use(t, text, nul ? size - n - 1 : strlen(text));
    tokenizer_free(t);
    return 0;
}
