/* SPDX-License-Identifier: Apache-2.0 */
/*
 * request.c - makes and frees requests; see request.h for the life they lead.
 *
 * A failure half-way leaves a request that request_free() takes apart: every pointer is either NULL
 * or owned.
 */
#include "engine/request.h"

#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "engine/mailbox.h"
#include "engine/tenants.h"

/* vLLM and others decode the output behind the prompt's last tokens, so that a leading space or a
 * half character continues rightly; five reach over any multi-token character. */
#define DECODE_PRIMER 5

lm_status score_list_reserve(struct score_list *l, int n)
{
    if (n <= l->cap)
        return LM_OK;
    int cap = LM_MAX(n, LM_MAX(16, l->cap * 2));
    size_t tops = (size_t)cap * (size_t)LM_MAX(l->top_n, 1);
    void *p;
    if (!(p = lm_reallocarray(l->logprob, (size_t)cap, sizeof *l->logprob)))
        return LM_NOMEM;
    l->logprob = p;
    if (!(p = lm_reallocarray(l->text_offset, (size_t)cap, sizeof *l->text_offset)))
        return LM_NOMEM;
    l->text_offset = p;
    if (!(p = lm_reallocarray(l->top_id, tops, sizeof *l->top_id)))
        return LM_NOMEM;
    l->top_id = p;
    if (!(p = lm_reallocarray(l->top_logprob, tops, sizeof *l->top_logprob)))
        return LM_NOMEM;
    l->top_logprob = p;
    l->cap = cap;
    return LM_OK;
}

static void release_scores(struct score_list *l)
{
    free(l->logprob);
    free(l->text_offset);
    free(l->top_id);
    free(l->top_logprob);
    *l = (struct score_list){ 0 };
}

/* Distinct streams of one seed (splitmix64's finaliser over seed + index * golden ratio); the first
 * choice keeps the seed itself. */
static uint64_t sub_seed(uint64_t seed, int index)
{
    if (index == 0)
        return seed;
    uint64_t z = seed + (uint64_t)index * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

lm_status seq_prime_decoder(struct seq *s)
{
    const struct request *r = s->req;
    struct lm_err err;
    if (!r->tok)
        return LM_OK;
    lm_status st = detok_new(r->tok, r->params.skip_special_tokens, &s->dec, &err);
    for (int i = LM_MAX(0, s->n_prompt - DECODE_PRIMER); st == LM_OK && i < s->n_prompt; i++)
        st = detok_push(s->dec, s->tokens[i], &s->text, &s->text_base, &err);
    return st;
}

lm_status seq_open(struct seq *s)
{
    bool decodes = s->eager && s->req->tok;
    if (s->tokens && s->blocks && (s->dec || !decodes))
        return LM_OK;
    if (!s->tokens)
        s->tokens = lm_reallocarray(NULL, (size_t)s->cap_tokens, sizeof *s->tokens);
    if (!s->blocks)
        s->blocks = lm_reallocarray(NULL, (size_t)s->cap_blocks, sizeof *s->blocks);
    if (!s->tokens || !s->blocks)
        return LM_NOMEM;
    memcpy(s->tokens, s->req->prompt.id, (size_t)s->n_prompt * sizeof *s->tokens);
    return decodes ? seq_prime_decoder(s) : LM_OK;
}

/* What every step of it has in common, so that none needs to look at the request. */
static void init_hot(struct seq *s, const struct request *r, int index)
{
    const struct engine_params *p = &r->params;
    s->adapter = r->adapter;
    s->generates = p->max_tokens > 0;
    s->scores_prompt = r->score_prompt && index == 0;
    s->penalised = p->repetition_penalty != 1 || p->presence_penalty != 0 ||
                   p->frequency_penalty != 0;
    s->bans = p->min_tokens > 0;
    s->heeds_eos = !p->ignore_eos;
    s->has_stop_ids = p->n_stop_token_ids > 0;
    s->eager = r->stream || p->n_stop > 0 || p->logprobs >= 0;
    s->sample = (struct kn_sample_row){
        .temperature = p->temperature, .top_p = p->top_p, .min_p = p->min_p,
        .repetition_penalty = p->repetition_penalty, .presence_penalty = p->presence_penalty,
        .frequency_penalty = p->frequency_penalty, .top_k = p->top_k, .forced = -1,
        .top_logprobs = LM_MAX(p->logprobs, 0), .want_logprob = p->logprobs >= 0,
        .seed = sub_seed(p->seed, index),
    };
}

static void seq_init(struct seq *s, struct request *r, int index, const struct request_limits *lim)
{
    int n_prompt = r->prompt.n;
    init_hot(s, r, index);
    s->req = r;
    s->index = index;
    s->state = SEQ_WAITING;
    s->prefix_tail = -1;
    s->text = "";
    s->n_prompt = s->n_tokens = n_prompt;
    s->cap_tokens = n_prompt + LM_MIN(r->params.max_tokens, lim->max_model_len - n_prompt);
    s->cap_blocks = LM_DIV_UP(seq_max_kv(s), lim->block_tokens);
    s->out_scores.top_n = LM_MAX(r->params.logprobs, 0);
}

static lm_status copy_params(struct request *r, const struct engine_params *p)
{
    int n_stop = p->n_stop, n_ids = p->n_stop_token_ids;
    r->params = *p;
    r->params.n_stop = r->params.n_stop_token_ids = 0;
    r->params.stop_token_ids = NULL;
    for (int i = 0; i < n_stop; i++) {
        if (!(r->params.stop[i] = lm_strdup(p->stop[i])))
            return LM_NOMEM;
        r->params.n_stop++;
    }
    if (n_ids > 0) {
        int32_t *ids = lm_reallocarray(NULL, (size_t)n_ids, sizeof *ids);
        if (!ids)
            return LM_NOMEM;
        memcpy(ids, p->stop_token_ids, (size_t)n_ids * sizeof *ids);
        r->params.stop_token_ids = ids;
        r->params.n_stop_token_ids = n_ids;
    }
    if (!p->has_seed)
        r->params.seed = XXH3_64bits(r->id, strlen(r->id));
    return LM_OK;
}

static lm_status fill(struct request *r, const struct engine_request *in,
                      const struct engine_params *params, const tokenizer *tok,
                      const struct request_limits *lim)
{
    r->user = in->user;
    r->priority = in->priority;
    r->stream = in->stream;
    r->deadline_ms = in->deadline_ms;
    r->first_token_by_ms = in->first_token_by_ms;
    r->submit_us = lim->now_us;
    r->adapter = in->adapter ? engine_adapter_ref(in->adapter) : NULL;
    r->id = lm_strdup(in->id);
    r->spare_account = in->tenant ? tenant_new(in->tenant) : NULL;
    r->finish = lm_calloc(1, sizeof *r->finish);
    r->result = engine_result_new(params->n);
    if (!r->id || (in->tenant && !r->spare_account) || !r->finish || !r->result)
        return LM_NOMEM;
    lm_status st = copy_params(r, params);
    if (st != LM_OK)
        return st;
    r->score_prompt = params->echo && params->logprobs >= 0;
    r->prompt_scores.top_n = LM_MAX(params->logprobs, 0);
    r->seqs = lm_calloc((size_t)params->n, sizeof *r->seqs);
    if (!r->seqs)
        return LM_NOMEM;
    r->n_seqs = r->n_live = params->n;
    for (int i = 0; i < params->n; i++)
        seq_init(&r->seqs[i], r, i, lim);
    r->tok = tok;
    return seq_open(&r->seqs[0]);
}

lm_status request_new(const struct engine_request *in, const struct engine_params *params,
                      struct token_ids *prompt, const tokenizer *tok,
                      const struct request_limits *lim, struct request **out, struct lm_err *err)
{
    struct request *r = lm_calloc(1, sizeof *r);
    if (!r)
        return lm_err_set(err, LM_NOMEM, "no memory for a request");
    r->prompt = *prompt;
    *prompt = (struct token_ids){ 0 };
    lm_status st = fill(r, in, params, tok, lim);
    if (st != LM_OK) {
        lm_err_set(err, st, "no memory for a request of %d tokens, n %d", r->prompt.n, params->n);
        request_free(r);
        return st;
    }
    *out = r;
    return LM_OK;
}

static void seq_release(struct seq *s)
{
    free(s->tokens);
    free(s->blocks);
    if (s->dec)
        detok_free(s->dec);
    release_scores(&s->out_scores);
}

void request_free(struct request *r)
{
    if (!r)
        return;
    for (int i = 0; i < r->n_seqs; i++)
        seq_release(&r->seqs[i]);
    free(r->seqs);
    for (int i = 0; i < r->params.n_stop; i++)
        free((char *)r->params.stop[i]);
    free((int32_t *)r->params.stop_token_ids);
    release_scores(&r->prompt_scores);
    token_ids_release(&r->prompt);
    free(r->prompt_text);
    engine_adapter_unref(r->adapter);
    free(r->finish);
    engine_result_free(r->result);
    tenant_free(r->spare_account);
    free(r->id);
    free(r);
}
