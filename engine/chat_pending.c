/* SPDX-License-Identifier: Apache-2.0 */
/* chat_pending.c - stands in until chat.c lands. */
#include "engine/chat.h"
#define WEAK __attribute__((weak))
WEAK lm_status chat_template_load(const char *d, chat_template **o, struct lm_err *e) { (void)d; (void)e; *o = NULL; return LM_OK; }
WEAK void chat_template_free(chat_template *c) { (void)c; }
WEAK const char *chat_template_family(const chat_template *c) { (void)c; return NULL; }
WEAK lm_status chat_encode(const chat_template *c, const tokenizer *t, const struct engine_message *m, int n, struct token_ids *o, struct lm_err *e) { (void)c; (void)t; (void)m; (void)n; (void)o; return lm_err_set(e, LM_UNSUPPORTED, "chat input is not in this build"); }
