/* SPDX-License-Identifier: Apache-2.0 */
/*
 * result_build.c - the result of a finished request. Runs once a request, on the thread that polls
 * for it, so it may allocate; when memory is short the result says so instead of not existing.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/output.h"

struct builder {
    struct request *r;
    const tokenizer *tok;
    char *echo;                 /* prompt text, with echo */
    size_t echo_len;
    lm_status status;           /* first failure */
};

static void fail(struct builder *b, lm_status st)
{
    if (b->status == LM_OK)
        b->status = st;
}

static void echo_text(struct builder *b)
{
    struct request *r = b->r;
    if (!r->params.echo)
        return;
    struct lm_err err;
    lm_status st = LM_OK;
    if (r->prompt_text) {
        b->echo = r->prompt_text;
        b->echo_len = r->prompt_text_len;
        r->prompt_text = NULL;
    } else {
        st = tokenizer_decode(b->tok, r->prompt.id, r->prompt.n, r->params.skip_special_tokens,
                              &b->echo, &b->echo_len, &err);
    }
    if (st != LM_OK)
        fail(b, st);
}

static void piece(struct builder *b, int32_t id, char **text, size_t *len)
{
    struct lm_err err;
    size_t n = 0;
    lm_status st = b->tok ? tokenizer_piece(b->tok, id, text, &n, &err) : LM_UNSUPPORTED;
    if (st != LM_OK) {          /* no tokenizer, or an id that the vocabulary leaves out: no text */
        *text = lm_strdup("");
        n = 0;
    }
    if (!*text)
        fail(b, LM_NOMEM);
    if (len)
        *len = *text ? n : 0;
}

/* `l` NULL: the prompt's first token, which nothing predicts. */
static void fill_token(struct builder *b, struct engine_token *t, int32_t id,
                       const struct score_list *l, int i, size_t offset)
{
    t->id = id;
    t->logprob = l ? l->logprob[i] : NAN;
    t->text_offset = offset;
    piece(b, id, &t->text, &t->text_len);
    if (!l || l->top_n == 0)
        return;
    t->top = lm_calloc((size_t)l->top_n, sizeof *t->top);
    if (!t->top) {
        fail(b, LM_NOMEM);
        return;
    }
    t->n_top = l->top_n;
    for (int k = 0; k < l->top_n; k++) {
        size_t at = (size_t)i * (size_t)l->top_n + (size_t)k;
        t->top[k].id = l->top_id[at];
        t->top[k].logprob = l->top_logprob[at];
        if (t->top[k].id < 0)   /* the vocabulary has fewer than were asked for */
            t->n_top = LM_MIN(t->n_top, k);
        else
            piece(b, t->top[k].id, &t->top[k].text, NULL);
    }
}

/* Offsets of prompt tokens in the echoed text, by decoding it as a stream. */
static void prompt_tokens(struct builder *b, struct engine_choice *c)
{
    struct request *r = b->r;
    struct lm_err err;
    detok *d = NULL;
    size_t at = 0;
    const char *text;
    if (detok_new(b->tok, r->params.skip_special_tokens, &d, &err) != LM_OK) {
        fail(b, LM_NOMEM);
        return;
    }
    for (int i = 0; i < r->prompt.n; i++) {
        if (i > 0 && i > r->prompt_scores.n)    /* cancelled before it was scored */
            break;
        fill_token(b, &c->logprobs[c->n_logprobs++], r->prompt.id[i],
                   i ? &r->prompt_scores : NULL, i - 1, LM_MIN(at, b->echo_len));
        if (detok_push(d, r->prompt.id[i], &text, &at, &err) != LM_OK)
            fail(b, LM_NOMEM);
    }
    detok_free(d);
}

static void fill_scores(struct builder *b, const struct seq *s, struct engine_choice *c)
{
    const struct request *r = b->r;
    int n = s->out_scores.n + (r->score_prompt ? r->prompt.n : 0);
    if (r->params.logprobs < 0)
        return;
    c->logprobs = lm_calloc((size_t)n, sizeof *c->logprobs);
    if (!c->logprobs) {
        fail(b, LM_NOMEM);
        return;
    }
    if (r->score_prompt)
        prompt_tokens(b, c);
    for (int i = 0; i < s->out_scores.n; i++) {
        size_t offset = b->echo_len + LM_MIN(s->out_scores.text_offset[i], s->text_len);
        fill_token(b, &c->logprobs[c->n_logprobs++], s->tokens[s->n_prompt + i], &s->out_scores, i,
                   offset);
    }
}

static void fill_choice(struct builder *b, struct seq *s, struct engine_choice *c)
{
    int n = seq_n_output(s);
    lm_status st = output_decode(s);
    if (st != LM_OK)
        fail(b, st);
    c->index = s->index;
    c->reason = s->reason;
    c->text = lm_malloc(b->echo_len + s->text_len + 1);
    c->token_ids = lm_reallocarray(NULL, (size_t)n, sizeof *c->token_ids);
    if (!c->text || !c->token_ids) {
        fail(b, LM_NOMEM);
        return;
    }
    if (b->echo_len)
        memcpy(c->text, b->echo, b->echo_len);
    memcpy(c->text + b->echo_len, s->text + s->text_base, s->text_len);
    c->text_len = b->echo_len + s->text_len;
    c->text[c->text_len] = '\0';
    if (n > 0)                  /* a choice that never ran has no tokens of its own */
        memcpy(c->token_ids, s->tokens + s->n_prompt, (size_t)n * sizeof *c->token_ids);
    c->n_tokens = n;
    fill_scores(b, s, c);
}

void output_numbers(struct request *r, int64_t now_us)
{
    struct engine_result *res = r->result;
    int64_t now = now_us - r->submit_us;
    res->prompt_tokens = r->prompt.n;
    res->cached_tokens = r->cached_tokens;
    for (int i = 0; i < r->n_seqs; i++) {
        res->completion_tokens += seq_n_output(&r->seqs[i]);
        res->steps += r->seqs[i].steps;
    }
    res->queued_us = r->admit_us ? r->admit_us - r->submit_us : now;
    res->adapter_us = r->adapter_wait_us;
    res->first_token_us = r->first_token_us ? r->first_token_us - r->submit_us : 0;
    res->finished_us = now;
    res->preemptions = r->preemptions;
}

struct engine_result *output_result(struct request *r)
{
    struct builder b = { .r = r, .tok = r->tok };
    struct engine_result *res = r->result;
    r->result = NULL;
    echo_text(&b);
    res->n_choices = r->n_seqs;
    for (int i = 0; i < res->n_choices; i++)
        fill_choice(&b, &r->seqs[i], &res->choices[i]);
    free(b.echo);
    if (res->status == LM_OK && b.status != LM_OK) {
        res->status = b.status;
        snprintf(res->error, sizeof res->error, "the result could not be put together: %s",
                 lm_status_text(b.status));
        for (int i = 0; i < res->n_choices; i++)
            res->choices[i].reason = ENGINE_ERROR;
    }
    return res;
}
