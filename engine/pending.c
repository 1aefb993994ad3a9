/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pending.c - stands in for modules that have not landed, so that echo mode links. Each goes when
 * its module lands.
 */
#include "engine/chat.h"
#include "engine/adapter.h"
#include "kernels/kernels.h"
#define WEAK __attribute__((weak))

static lm_status pending(struct lm_err *err)
{
    return lm_err_set(err, LM_UNSUPPORTED, "not in this build");
}
WEAK lm_status tokenizer_load(const char *d, tokenizer **o, struct lm_err *e) { (void)d; (void)o; return pending(e); }
WEAK void tokenizer_free(tokenizer *t) { (void)t; }
WEAK void token_ids_release(struct token_ids *t) { (void)t; }
WEAK lm_status tokenizer_encode(const tokenizer *t, const char *x, size_t l, bool a, struct token_ids *o, struct lm_err *e) { (void)t; (void)x; (void)l; (void)a; (void)o; return pending(e); }
WEAK lm_status detok_new(const tokenizer *t, bool s, detok **o, struct lm_err *e) { (void)t; (void)s; (void)o; return pending(e); }
WEAK void detok_free(detok *d) { (void)d; }
WEAK lm_status detok_push(detok *d, int32_t i, const char **x, size_t *l, struct lm_err *e) { (void)d; (void)i; (void)x; (void)l; return pending(e); }
WEAK lm_status chat_template_load(const char *d, chat_template **o, struct lm_err *e) { (void)d; (void)o; return pending(e); }
WEAK void chat_template_free(chat_template *c) { (void)c; }
WEAK const char *chat_template_family(const chat_template *c) { (void)c; return NULL; }
WEAK lm_status chat_encode(const chat_template *c, const tokenizer *t, const struct engine_message *m, int n, struct token_ids *o, struct lm_err *e) { (void)c; (void)t; (void)m; (void)n; (void)o; return pending(e); }
WEAK lm_status model_config_load(const char *d, struct model_config *o, struct lm_err *e) { (void)d; (void)o; return pending(e); }
WEAK void model_config_release(struct model_config *c) { (void)c; }
WEAK lm_status adapter_parse(const char *d, const struct model_config *c, enum kn_dtype t, int64_t b, size_t m, const struct adapter_alloc *a, struct adapter_image *o, struct lm_err *e) { (void)d; (void)c; (void)t; (void)b; (void)m; (void)a; (void)o; return pending(e); }
WEAK void adapter_image_release(struct adapter_image *i, const struct adapter_alloc *a) { (void)i; (void)a; }
WEAK lm_status adapter_digest(const char *d, char o[ENGINE_DIGEST_CHARS], struct lm_err *e) { (void)d; (void)o; return pending(e); }
extern const char kn_backend_cpu[2048];
WEAK const char kn_backend_cpu[2048] = { 0 };
