/* SPDX-License-Identifier: Apache-2.0 */
/*
 * params.c - ranges are those of the OpenAI API where it states one, else those of vLLM.
 */
#include "engine/params.h"

#include <math.h>
#include <string.h>

/* Below this, logits / temperature leaves float32's useful range; the draw is greedy anyway. */
#define GREEDY_BELOW 1e-5f

#define MAX_STOP_BYTES 1024
#define MAX_STOP_IDS 256

void engine_params_default(struct engine_params *p)
{
    *p = (struct engine_params){
        .max_tokens = 16, .temperature = 1, .top_p = 1, .repetition_penalty = 1, .n = 1,
        .logprobs = -1, .skip_special_tokens = true,
    };
}

static void model_defaults(struct engine_params *p, const struct model_config *m)
{
    if (!(p->set & ENGINE_SET_TEMPERATURE) && !isnan(m->gen_temperature))
        p->temperature = m->gen_temperature;
    if (!(p->set & ENGINE_SET_TOP_K) && m->gen_top_k >= 0)
        p->top_k = m->gen_top_k;
    if (!(p->set & ENGINE_SET_TOP_P) && !isnan(m->gen_top_p))
        p->top_p = m->gen_top_p;
    if (!(p->set & ENGINE_SET_MIN_P) && !isnan(m->gen_min_p))
        p->min_p = m->gen_min_p;
    if (!(p->set & ENGINE_SET_REPETITION_PENALTY) && !isnan(m->gen_repetition_penalty))
        p->repetition_penalty = m->gen_repetition_penalty;
}

struct float_range {
    const char *name;
    size_t offset;
    float lo, hi;
    bool lo_open;               /* lo itself is not allowed */
};

#define AT(field) offsetof(struct engine_params, field)

static const struct float_range float_ranges[] = {
    { "temperature", AT(temperature), 0, 100, false },
    { "top_p", AT(top_p), 0, 1, true },
    { "min_p", AT(min_p), 0, 1, false },
    { "repetition_penalty", AT(repetition_penalty), 0, 100, true },
    { "presence_penalty", AT(presence_penalty), -2, 2, false },
    { "frequency_penalty", AT(frequency_penalty), -2, 2, false },
};

static lm_status check_floats(const struct engine_params *p, struct lm_err *err)
{
    for (size_t i = 0; i < LM_COUNT(float_ranges); i++) {
        const struct float_range *r = &float_ranges[i];
        float value;
        memcpy(&value, (const char *)p + r->offset, sizeof value);
        bool ok = r->lo_open ? value > r->lo : value >= r->lo;
        if (!ok || !(value <= r->hi))
            return lm_err_set(err, LM_INVALID, "%s is %g; it must be %s %g and at most %g",
                              r->name, (double)value, r->lo_open ? "greater than" : "at least",
                              (double)r->lo, (double)r->hi);
    }
    return LM_OK;
}

static lm_status check_ints(const struct engine_params *p, struct lm_err *err)
{
    if (p->max_tokens < 0 || (p->max_tokens == 0 && !p->echo))
        return lm_err_set(err, LM_INVALID,
                          "max_tokens is %d; it must be at least 1, or 0 together with echo",
                          p->max_tokens);
    if (p->min_tokens < 0 || p->min_tokens > p->max_tokens)
        return lm_err_set(err, LM_INVALID, "min_tokens is %d; it must be 0..max_tokens (%d)",
                          p->min_tokens, p->max_tokens);
    if (p->top_k < -1)
        return lm_err_set(err, LM_INVALID, "top_k is %d; it must be at least 1, or 0 or -1 for all",
                          p->top_k);
    if (p->n < 1 || p->n > ENGINE_MAX_N)
        return lm_err_set(err, LM_INVALID, "n is %d; it must be 1..%d", p->n, ENGINE_MAX_N);
    if (p->logprobs < -1 || p->logprobs > ENGINE_MAX_LOGPROBS)
        return lm_err_set(err, LM_INVALID, "logprobs is %d; it must be 0..%d", p->logprobs,
                          ENGINE_MAX_LOGPROBS);
    return LM_OK;
}

static lm_status check_stops(const struct engine_params *p, int vocab, struct lm_err *err)
{
    if (p->n_stop < 0 || p->n_stop > ENGINE_MAX_STOP)
        return lm_err_set(err, LM_INVALID, "stop has %d strings; at most %d are allowed", p->n_stop,
                          ENGINE_MAX_STOP);
    for (int i = 0; i < p->n_stop; i++) {
        size_t len = p->stop[i] ? strlen(p->stop[i]) : 0;
        if (len == 0 || len > MAX_STOP_BYTES)
            return lm_err_set(err, LM_INVALID, "stop[%d] has %zu bytes; it must have 1..%d", i, len,
                              MAX_STOP_BYTES);
    }
    if (p->n_stop_token_ids < 0 || p->n_stop_token_ids > MAX_STOP_IDS)
        return lm_err_set(err, LM_INVALID, "stop_token_ids has %d ids; at most %d are allowed",
                          p->n_stop_token_ids, MAX_STOP_IDS);
    for (int i = 0; i < p->n_stop_token_ids; i++)
        if (p->stop_token_ids[i] < 0 || (vocab && p->stop_token_ids[i] >= vocab))
            return lm_err_set(err, LM_INVALID, "stop_token_ids[%d] is %d; the vocabulary has %d", i,
                              p->stop_token_ids[i], vocab);
    return LM_OK;
}

lm_status params_resolve(const struct engine_params *in, const struct model_config *model,
                         struct engine_params *out, struct lm_err *err)
{
    *out = *in;
    if (model)
        model_defaults(out, model);
    lm_status st = check_ints(out, err);
    if (st == LM_OK)
        st = check_floats(out, err);
    if (st == LM_OK)
        st = check_stops(out, model ? model->vocab : 0, err);
    if (st != LM_OK)
        return st;
    out->top_k = LM_MAX(out->top_k, 0);
    if (out->temperature < GREEDY_BELOW)
        out->temperature = 0;
    return LM_OK;
}
