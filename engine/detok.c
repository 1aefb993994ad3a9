/* SPDX-License-Identifier: Apache-2.0 */
/*
 * detok.c - streaming decode.
 *
 * tokenizer_decode() pushes ids through the decoder's stages; this does the same, one id a call,
 * and shows what has come out so far. What the stages hold back is what later ids may still change,
 * so everything shown is final, and all of it together is the whole decode by construction.
 *
 * A detok belongs to one thread at a time and to one sequence of ids; the tokenizer must outlive
 * it. After detok_finish() nothing more may be pushed.
 */
#include "engine/tok_internal.h"

#include <stdlib.h>

struct detok {
    const tokenizer *t;
    bool skip_special;
    bool finished;
    struct tok_decrun run;
};

lm_status detok_new(const tokenizer *t, bool skip_special, detok **out, struct lm_err *err)
{
    detok *d = lm_calloc(1, sizeof *d);
    if (!d)
        return tok_nomem(err);
    d->t = t;
    d->skip_special = skip_special;
    tok_decrun_init(&d->run, &t->dec);
    *out = d;
    return LM_OK;
}

void detok_free(detok *d)
{
    if (!d)
        return;
    tok_decrun_release(&d->run);
    free(d);
}

static void show(const detok *d, const char **text, size_t *len)
{
    *text = d->run.out.p ? d->run.out.p : "";
    *len = d->run.out.len;
}

lm_status detok_push(detok *d, int32_t id, const char **text, size_t *len, struct lm_err *err)
{
    size_t n;
    if (d->finished)
        return lm_err_set(err, LM_STATE, "detok_push() after detok_finish()");
    const char *s = tok_decode_string(d->t, id, d->skip_special, &n);
    lm_status st = s ? tok_decrun_token(&d->run, s, n, err) : LM_OK;
    show(d, text, len);
    return st;
}

lm_status detok_finish(detok *d, const char **text, size_t *len, struct lm_err *err)
{
    lm_status st = d->finished ? LM_OK : tok_decrun_finish(&d->run, err);
    d->finished = true;
    show(d, text, len);
    return st;
}
