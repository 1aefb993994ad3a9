/* SPDX-License-Identifier: Apache-2.0 */
/*
 * prompt.h - from what the caller gave (text, token ids, chat messages, context documents) to ids.
 */
#ifndef LORAMILL_ENGINE_PROMPT_H
#define LORAMILL_ENGINE_PROMPT_H

#include "engine/chat.h"

/* LM_INVALID unless the request has an id, exactly one of prompt, token_ids and messages, and no
 * context with token ids. */
lm_status prompt_check(const struct engine_request *r, struct lm_err *err);

/* The documents and the prompt, joined by blank lines; malloc'ed. */
lm_status prompt_text(const struct engine_request *r, char **text, size_t *len,
                      struct lm_err *err);

/* Fills ids, each below `vocab`. *text: the prompt as text for echo, malloc'ed, NULL where the ids
 * are to be decoded (token ids, chat). */
lm_status prompt_encode(const struct engine_request *r, const tokenizer *tok,
                        const chat_template *chat, int vocab, struct token_ids *ids, char **text,
                        size_t *len, struct lm_err *err);

#endif
