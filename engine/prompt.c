/* SPDX-License-Identifier: Apache-2.0 */
/*
 * prompt.c - in-context documents go ahead of the prompt, then the tokenizer has the word.
 *
 * Where documents go: before a string prompt, separated by blank lines; with chat messages, before
 * the content of the first system message, or in a system message of their own when there is none.
 * Token ids are used verbatim and can't be combined with documents.
 */
#include "engine/prompt.h"

#include <stdlib.h>
#include <string.h>

/* Every piece is bounded by the caller's message limit; these bound the arrays. */
#define MAX_MESSAGES 4096
#define MAX_CONTEXT 4096

static const char blank_line[] = "\n\n";

lm_status prompt_check(const struct engine_request *r, struct lm_err *err)
{
    if (!r->id)
        return lm_err_set(err, LM_INVALID, "the request has no id");
    int given = (r->prompt != NULL) + (r->token_ids != NULL) + (r->messages != NULL);
    if (given != 1)
        return lm_err_set(err, LM_INVALID,
                          "%d of prompt, token ids and messages are given; exactly one is needed",
                          given);
    if (r->n_messages < 0 || r->n_messages > MAX_MESSAGES)
        return lm_err_set(err, LM_INVALID, "messages has %d entries; at most %d are allowed",
                          r->n_messages, MAX_MESSAGES);
    if (r->n_context < 0 || r->n_context > MAX_CONTEXT)
        return lm_err_set(err, LM_INVALID, "context has %d documents; at most %d are allowed",
                          r->n_context, MAX_CONTEXT);
    if (r->n_context > 0 && r->token_ids)
        return lm_err_set(err, LM_INVALID, "context can't be combined with token ids; put its "
                                           "tokens ahead of the prompt's");
    if (r->messages && r->n_messages == 0)
        return lm_err_set(err, LM_INVALID, "messages is empty");
    return LM_OK;
}

/* context[0] \n\n context[1] ... \n\n tail */
static lm_status join(const struct engine_request *r, const char *tail, size_t tail_len,
                      char **text, size_t *len, struct lm_err *err)
{
    size_t total = tail_len + 1, sep = sizeof blank_line - 1;
    for (int i = 0; i < r->n_context; i++)
        total += strlen(r->context[i]) + sep;
    char *p = lm_malloc(total);
    if (!p)
        return lm_err_set(err, LM_NOMEM, "no memory for a prompt of %zu bytes", total);
    *text = p;
    for (int i = 0; i < r->n_context; i++) {
        size_t n = strlen(r->context[i]);
        memcpy(p, r->context[i], n);
        memcpy(p + n, blank_line, sep);
        p += n + sep;
    }
    if (tail_len)
        memcpy(p, tail, tail_len);
    p[tail_len] = '\0';
    *len = total - 1;
    return LM_OK;
}

lm_status prompt_text(const struct engine_request *r, char **text, size_t *len,
                      struct lm_err *err)
{
    return join(r, r->prompt, r->prompt_len, text, len, err);
}

static lm_status encode_messages(const struct engine_request *r, const tokenizer *tok,
                                 const chat_template *chat, struct token_ids *ids,
                                 struct lm_err *err)
{
    if (r->n_context == 0)
        return chat_encode(chat, tok, r->messages, r->n_messages, ids, err);
    struct engine_message *m = lm_reallocarray(NULL, (size_t)r->n_messages + 1, sizeof *m);
    if (!m)
        return lm_err_set(err, LM_NOMEM, "no memory for %d messages", r->n_messages);
    memcpy(m + 1, r->messages, (size_t)r->n_messages * sizeof *m);
    int sys = 0;
    while (sys < r->n_messages && strcmp(r->messages[sys].role, "system") != 0)
        sys++;
    bool has = sys < r->n_messages;
    const char *old = has ? r->messages[sys].content : "";
    char *text = NULL;
    size_t len = 0;
    lm_status st = join(r, old, strlen(old), &text, &len, err);
    if (st == LM_OK) {
        if (!has)       /* the documents alone: drop the blank line behind the last */
            text[len - (sizeof blank_line - 1)] = '\0';
        m[has ? sys + 1 : 0] = (struct engine_message){ "system", text };
        st = chat_encode(chat, tok, has ? m + 1 : m, r->n_messages + !has, ids, err);
    }
    free(text);
    free(m);
    return st;
}

static lm_status copy_ids(const struct engine_request *r, struct token_ids *ids,
                          struct lm_err *err)
{
    if (r->n_token_ids < 0)
        return lm_err_set(err, LM_INVALID, "%d token ids", r->n_token_ids);
    ids->id = lm_reallocarray(NULL, (size_t)r->n_token_ids, sizeof *ids->id);
    if (!ids->id)
        return lm_err_set(err, LM_NOMEM, "no memory for %d token ids", r->n_token_ids);
    memcpy(ids->id, r->token_ids, (size_t)r->n_token_ids * sizeof *ids->id);
    ids->n = ids->cap = r->n_token_ids;
    return LM_OK;
}

lm_status prompt_encode(const struct engine_request *r, const tokenizer *tok,
                        const chat_template *chat, int vocab, struct token_ids *ids, char **text,
                        size_t *len, struct lm_err *err)
{
    lm_status st;
    *text = NULL;
    *len = 0;
    if (r->token_ids) {
        st = copy_ids(r, ids, err);
    } else if (r->messages) {
        st = encode_messages(r, tok, chat, ids, err);
    } else {
        st = prompt_text(r, text, len, err);
        if (st == LM_OK)
            st = tokenizer_encode(tok, *text, *len, true, ids, err);
    }
    if (st == LM_OK && ids->n == 0)
        st = lm_err_set(err, LM_INVALID, "the prompt is empty: it has no tokens");
    for (int i = 0; st == LM_OK && i < ids->n; i++)
        if (ids->id[i] < 0 || ids->id[i] >= vocab)
            st = lm_err_set(err, LM_INVALID,
                            "prompt token %d is %d; the model's vocabulary has %d", i, ids->id[i],
                            vocab);
    if (st != LM_OK) {
        token_ids_release(ids);
        free(*text);
        *text = NULL;
    }
    return st;
}
