/* SPDX-License-Identifier: Apache-2.0 */
/*
 * echo.c - answers at once; see echo.h.
 */
#include "engine/echo.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "engine/prompt.h"

struct echo_counters {
    atomic_uint_fast64_t finished;
    atomic_uint_fast64_t failed;
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

lm_status echo_text(const struct engine_request *r, char **text, size_t *len, struct lm_err *err)
{
    if (r->prompt)
        return prompt_text(r, text, len, err);
    const char *s = r->messages ? r->messages[r->n_messages - 1].content : "";
    *len = strlen(s);
    *text = lm_strdup(s);
    return *text ? LM_OK : lm_err_set(err, LM_NOMEM, "no memory for a prompt");
}

int echo_tokens(size_t len)
{
    return (int)LM_MIN(LM_DIV_UP(len, 4), (size_t)INT32_MAX);
}

static void fill_choices(const struct request *r, struct engine_result *res)
{
    for (int i = 0; i < r->n_seqs; i++) {
        struct engine_choice *c = &res->choices[i];
        c->index = i;
        c->reason = ENGINE_STOP;
        c->text = lm_strndup(r->prompt_text, r->prompt_text_len);
        c->text_len = r->prompt_text_len;
        if (!c->text)
            res->status = LM_NOMEM;
    }
    res->n_choices = r->n_seqs;
    res->prompt_tokens = r->prompt.n ? r->prompt.n : echo_tokens(r->prompt_text_len);
    res->completion_tokens = echo_tokens(r->prompt_text_len) * r->n_seqs;
}

static struct engine_result *answer(struct request *r)
{
    struct engine_result *res = r->result;
    r->result = NULL;
    res->choices = lm_calloc((size_t)r->n_seqs, sizeof *res->choices);
    if (res->choices)
        fill_choices(r, res);
    else
        res->status = LM_NOMEM;
    int64_t now = lm_wall_ms(), first = r->first_token_by_ms;
    if ((r->deadline_ms && now > r->deadline_ms) || (first && now > first))
        for (int i = 0; i < res->n_choices; i++)
            res->choices[i].reason = ENGINE_EXPIRED;
    res->finished_us = res->first_token_us = lm_now_us() - r->submit_us;
    res->queued_us = res->finished_us;
    res->steps = 1;
    return res;
}

void echo_run(struct echo_counters *c, mailbox *mail, adapters *reg)
{
    bool stop = false, cancels;
    while (!stop) {
        struct request *r = mailbox_take(mail, -1, &stop, &cancels);
        adapters_reap(reg, NULL, NULL);
        for (struct request *next; r; r = next) {
            next = r->next;
            struct engine_result *res = answer(r);
            bool ok = res->status == LM_OK;
            atomic_fetch_add_explicit(ok ? &c->finished : &c->failed, 1, memory_order_relaxed);
            mailbox_post_result(mail, r, res);
            request_free(r);
        }
    }
}

void echo_stats(struct echo_counters *c, struct engine_stats *out)
{
    out->finished = atomic_load_explicit(&c->finished, memory_order_relaxed);
    out->failed = atomic_load_explicit(&c->failed, memory_order_relaxed);
}
