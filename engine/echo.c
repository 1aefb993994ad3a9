/* SPDX-License-Identifier: Apache-2.0 */
/*
 * echo.c - answers at once; see echo.h.
 */
#include "engine/echo.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "engine/params.h"
#include "engine/prompt.h"

struct echo_counters {
    atomic_uint_fast64_t finished;
};

lm_status echo_new(struct echo_counters **out, struct lm_err *err)
{
    *out = lm_calloc(1, sizeof **out);
    return *out ? LM_OK : lm_err_set(err, LM_NOMEM, "no memory for the echo engine");
}

void echo_free(struct echo_counters *c)
{
    free(c);
}

static lm_status text_of(const struct engine_request *r, char **text, size_t *len,
                         struct lm_err *err)
{
    if (r->prompt)
        return prompt_text(r, text, len, err);
    const char *s = r->messages ? r->messages[r->n_messages - 1].content : "";
    *len = strlen(s);
    *text = lm_strdup(s);
    return *text ? LM_OK : lm_err_set(err, LM_NOMEM, "no memory for a prompt");
}

static int tokens_of(size_t len)
{
    return (int)LM_MIN(LM_DIV_UP(len, 4), (size_t)INT32_MAX);
}

static enum engine_reason reason_of(const struct engine_request *r)
{
    if (!r->deadline_ms && !r->first_token_by_ms)
        return ENGINE_STOP;
    int64_t now = lm_wall_ms();
    bool late = (r->deadline_ms && now > r->deadline_ms) ||
                (r->first_token_by_ms && now > r->first_token_by_ms);
    return late ? ENGINE_EXPIRED : ENGINE_STOP;
}

/* The first choice takes the text over, the others have copies. False: no memory. */
static bool fill_choices(struct engine_result *res, int n, enum engine_reason reason, char *text,
                         size_t len)
{
    bool good = true;
    for (int i = 0; i < n; i++)
        res->choices[i] = (struct engine_choice){
            .index = i, .reason = reason, .text_len = len,
            .text = i ? lm_strndup(text, len) : text,
        };
    res->n_choices = n;
    for (int i = 0; i < n; i++)
        good &= res->choices[i].text != NULL;
    return good;
}

static struct engine_result *answer(const struct engine_request *r, int n, char *text, size_t len)
{
    struct engine_result *res = engine_result_new(n);
    if (!res) {
        free(text);
        return NULL;
    }
    res->prompt_tokens = r->token_ids ? r->n_token_ids : tokens_of(len);
    res->completion_tokens = tokens_of(len) * n;
    res->steps = 1;
    if (fill_choices(res, n, reason_of(r), text, len))
        return res;
    engine_result_free(res);
    return NULL;
}

lm_status echo_submit(struct echo_counters *c, mailbox *mail, const struct engine_request *r,
                      engine_handle *out, struct lm_err *err)
{
    struct engine_params p;
    char *text = NULL;
    size_t len = 0;
    lm_status st = prompt_check(r, err);
    if (st == LM_OK)
        st = params_resolve(&r->params, NULL, &p, err);
    if (st == LM_OK && r->token_ids && r->n_token_ids < 0)
        st = lm_err_set(err, LM_INVALID, "%d token ids", r->n_token_ids);
    if (st == LM_OK)
        st = text_of(r, &text, &len, err);
    if (st != LM_OK)
        return st;
    struct engine_result *res = answer(r, p.n, text, len);
    if (!res)
        return lm_err_set(err, LM_NOMEM, "no memory for an answer of %zu bytes", len);
    st = mailbox_answer(mail, r->user, res, out, err);
    if (st == LM_OK)
        atomic_fetch_add_explicit(&c->finished, 1, memory_order_relaxed);
    return st;
}

void echo_run(mailbox *mail, adapters *reg)
{
    bool stop = false, cancels;
    while (!stop) {
        mailbox_take(mail, -1, &stop, &cancels);
        adapters_reap(reg, NULL, NULL);
    }
}

void echo_stats(struct echo_counters *c, struct engine_stats *out)
{
    out->finished = atomic_load_explicit(&c->finished, memory_order_relaxed);
}
