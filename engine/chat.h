/* SPDX-License-Identifier: Apache-2.0 */
/*
 * chat.h - chat messages to a prompt, for the template families that we know.
 *
 * The model's chat_template (tokenizer_config.json, chat_template.jinja) is recognised by its own
 * text, not executed: llama2, llama3, mistral, chatml (Qwen). An unknown one is remembered by what
 * it begins with, and chat input is refused with that name; raw prompts still work.
 */
#ifndef LORAMILL_ENGINE_CHAT_H
#define LORAMILL_ENGINE_CHAT_H

#include "engine/engine.h"
#include "engine/tokenizer.h"

typedef struct chat_template chat_template;

/* Never fails for an unknown or missing template; only for unreadable files. */
lm_status chat_template_load(const char *dir, chat_template **out, struct lm_err *err);
void chat_template_free(chat_template *c);
const char *chat_template_family(const chat_template *c);       /* NULL: unknown or none */

/* Renders with the generation prompt and encodes (special tokens of the template included, none
 * added twice). Text equals apply_chat_template(messages, add_generation_prompt=True). */
lm_status chat_encode(const chat_template *c, const tokenizer *t,
                      const struct engine_message *messages, int n, struct token_ids *out,
                      struct lm_err *err);
/* The rendered text, malloc'ed; for tests. */
lm_status chat_render(const chat_template *c, const struct engine_message *messages, int n,
                      char **text, struct lm_err *err);

#endif
