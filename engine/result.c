/* SPDX-License-Identifier: Apache-2.0 */
/*
 * result.c - names, making and freeing of what engine_poll() hands out.
 */
#include "engine/engine.h"

#include <stdlib.h>

const char *engine_reason_name(enum engine_reason r)
{
    static const char *const names[] = { "stop", "length", "expired", "cancelled", "error" };
    return (unsigned)r < LM_COUNT(names) ? names[r] : "error";
}

static void token_release(struct engine_token *t)
{
    free(t->text);
    for (int i = 0; i < t->n_top; i++)
        free(t->top[i].text);
    free(t->top);
}

static void choice_release(struct engine_choice *c)
{
    free(c->text);
    free(c->token_ids);
    for (int i = 0; i < c->n_logprobs; i++)
        token_release(&c->logprobs[i]);
    free(c->logprobs);
}

struct engine_result *engine_result_new(int n)
{
    struct engine_result *r = lm_calloc(1, sizeof *r + (size_t)n * sizeof *r->choices);
    if (r)
        r->choices = (struct engine_choice *)(r + 1);
    return r;
}

void engine_result_free(struct engine_result *r)
{
    if (!r)
        return;
    for (int i = 0; i < r->n_choices; i++)
        choice_release(&r->choices[i]);
    if (r->choices != (struct engine_choice *)(r + 1))
        free(r->choices);
    free(r);
}
