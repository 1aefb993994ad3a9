/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_params.c - sampling parameters from a JSON object; see json_prompt.h.
 *
 * One table gives name, place, range and `set` bit of every plain parameter; stop, logprobs and
 * their kin have a function each. Names and meanings are OpenAI's, and vLLM's where OpenAI has
 * none. A parameter that others serve and we don't yet is refused by name, so that a client never
 * believes that it was obeyed.
 */
#include "worker/json_prompt.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_STOP_BYTES = 1024, MAX_STOP_TOKENS = 256 };

enum kind { INT, REAL, BOOL };

struct param_row {
    const char *name;
    enum kind kind;
    size_t offset;
    double lo, hi;
    bool above;                 /* lo itself is not allowed */
    uint32_t set;
};

#define AT(field) offsetof(struct engine_params, field)

static const struct param_row rows[] = {
    { "max_tokens", INT, AT(max_tokens), 0, INT32_MAX, false, ENGINE_SET_MAX_TOKENS },
    { "max_completion_tokens", INT, AT(max_tokens), 0, INT32_MAX, false, ENGINE_SET_MAX_TOKENS },
    { "min_tokens", INT, AT(min_tokens), 0, INT32_MAX, false, 0 },
    { "temperature", REAL, AT(temperature), 0, 100, false, ENGINE_SET_TEMPERATURE },
    { "top_p", REAL, AT(top_p), 0, 1, true, ENGINE_SET_TOP_P },
    { "top_k", INT, AT(top_k), -1, INT32_MAX, false, ENGINE_SET_TOP_K },
    { "min_p", REAL, AT(min_p), 0, 1, false, ENGINE_SET_MIN_P },
    { "repetition_penalty", REAL, AT(repetition_penalty), 0, 100, true,
      ENGINE_SET_REPETITION_PENALTY },
    { "presence_penalty", REAL, AT(presence_penalty), -2, 2, false, 0 },
    { "frequency_penalty", REAL, AT(frequency_penalty), -2, 2, false, 0 },
    { "n", INT, AT(n), 1, ENGINE_MAX_N, false, 0 },
    { "echo", BOOL, AT(echo), 0, 0, false, 0 },
    { "ignore_eos", BOOL, AT(ignore_eos), 0, 0, false, 0 },
    { "skip_special_tokens", BOOL, AT(skip_special_tokens), 0, 0, false, 0 },
    { "include_stop_str_in_output", BOOL, AT(include_stop), 0, 0, false, 0 },
};

/* Names for hints: those of the table and of the functions below. */
const char *const json_param_names[] = {
    "max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "n", "echo", "ignore_eos",
    "skip_special_tokens", "include_stop_str_in_output", "seed", "stop", "stop_token_ids",
    "logprobs", "top_logprobs", NULL
};

static const char *const not_served[] = {
    "allowed_token_ids", "audio", "bad_words", "best_of", "detokenize", "function_call",
    "functions", "guided_choice", "guided_decoding_backend", "guided_grammar", "guided_json",
    "guided_regex", "guided_whitespace_pattern", "length_penalty", "logit_bias",
    "logits_processors", "modalities", "parallel_tool_calls", "prediction", "prompt_logprobs",
    "reasoning_effort", "response_format", "spaces_between_special_tokens", "stream_options",
    "structured_outputs", "suffix", "tool_choice", "tools", "truncate_prompt_tokens", "typical_p",
    "use_beam_search", "verbosity", NULL
};

/* ---- plain parameters ------------------------------------------------------------------- */

static lm_status read_real(const struct json_reader *r, const struct param_row *row,
                           yyjson_val *v, float *out)
{
    double x = yyjson_get_num(v);
    if (yyjson_is_num(v) && (row->above ? x > row->lo : x >= row->lo) && x <= row->hi) {
        *out = (float)x;
        /* A tiny positive number must not round to the zero that its range excludes. */
        if (!row->above || *out > (float)row->lo)
            return LM_OK;
    }
    char what[96];
    snprintf(what, sizeof what, "a number %s %g and at most %g", row->above ? "above" : "at least",
             row->lo, row->hi);
    return json_wrong(r, row->name, what, v);
}

static lm_status read_row(const struct json_reader *r, const struct param_row *row,
                          yyjson_val *v, struct engine_params *p)
{
    char *at = (char *)p + row->offset;
    int64_t i = 0;
    lm_status st = LM_OK;
    switch (row->kind) {
    case REAL:
        st = read_real(r, row, v, (float *)(void *)at);
        break;
    case BOOL:
        st = json_read_bool(r, row->name, v, (bool *)(void *)at);
        break;
    case INT:
        st = json_read_int(r, row->name, v, (int64_t)row->lo, (int64_t)row->hi, &i);
        if (!st)
            *(int *)(void *)at = (int)i;
        break;
    }
    if (!st)
        p->set |= row->set;
    return st;
}

/* ---- the others ------------------------------------------------------------------------- */

static lm_status read_seed(const struct json_reader *r, yyjson_val *v, struct engine_params *p)
{
    if (!yyjson_is_int(v))
        return json_wrong(r, "seed", "an integer", v);
    p->has_seed = true;
    p->seed = (uint64_t)yyjson_get_sint(v);
    return LM_OK;
}

static lm_status read_stop(const struct json_reader *r, yyjson_val *v, struct engine_params *p)
{
    if (yyjson_is_str(v)) {
        p->n_stop = 1;
        return json_read_string(r, "stop", v, 1, MAX_STOP_BYTES, &p->stop[0]);
    }
    if (!yyjson_is_arr(v))
        return json_wrong(r, "stop", "a string or an array of strings", v);
    size_t n = yyjson_arr_size(v);
    if (n > ENGINE_MAX_STOP)
        return json_refuse(r, LM_TOO_LARGE, "stop", "has %zu entries, more than %d", n,
                           ENGINE_MAX_STOP);
    yyjson_arr_iter it = yyjson_arr_iter_with(v);
    for (size_t i = 0; i < n; i++) {
        char name[32];
        snprintf(name, sizeof name, "stop[%zu]", i);
        lm_status st = json_read_string(r, name, yyjson_arr_iter_next(&it), 1, MAX_STOP_BYTES,
                                        &p->stop[i]);
        if (st)
            return st;
    }
    p->n_stop = (int)n;
    return LM_OK;
}

/* Completions say `logprobs: 3`; chat says `logprobs: true` with `top_logprobs: 3`. */
static lm_status read_logprobs(const struct json_reader *r, yyjson_val *v, yyjson_val *top,
                               struct engine_params *p)
{
    int64_t n = 0;
    lm_status st = LM_OK;
    if (yyjson_is_int(v) && top)
        return json_refuse(r, LM_INVALID, "top_logprobs", "goes with logprobs: true, not with a "
                           "count");
    if (yyjson_is_int(v))
        st = json_read_int(r, "logprobs", v, 0, ENGINE_MAX_LOGPROBS, &n);
    else if (v && !yyjson_is_bool(v))
        return json_wrong(r, "logprobs", "true, false or a count", v);
    if (!st && top)
        st = json_read_int(r, "top_logprobs", top, 0, ENGINE_MAX_LOGPROBS, &n);
    if (st)
        return st;
    bool wanted = yyjson_is_true(v) || yyjson_is_int(v);
    if (!wanted && n > 0)
        return json_refuse(r, LM_INVALID, "top_logprobs", "needs logprobs: true");
    p->logprobs = wanted ? (int)n : -1;
    return LM_OK;
}

static lm_status check_names(const struct json_reader *r, yyjson_val *obj)
{
    yyjson_obj_iter it = yyjson_obj_iter_with(obj);
    for (yyjson_val *name; (name = yyjson_obj_iter_next(&it)) != NULL;) {
        const char *key = yyjson_get_str(name);
        yyjson_val *v = yyjson_obj_iter_get_val(name);
        if (json_key_in(json_param_names, key))
            continue;
        if (!json_key_in(not_served, key))
            return json_unknown(r, key, json_param_names);
        if (!yyjson_is_null(v))
            return json_refuse(r, LM_UNSUPPORTED, key, "is not served yet; leave it out");
    }
    return LM_OK;
}

static lm_status check_together(const struct json_reader *r, yyjson_val *obj,
                                const struct engine_params *p)
{
    bool chat_name = json_given(obj, "max_completion_tokens");
    const char *max = chat_name ? "max_completion_tokens" : "max_tokens";
    if (chat_name && json_given(obj, "max_tokens"))
        return json_refuse(r, LM_INVALID, "max_completion_tokens",
                           "means the same as max_tokens; give one of them");
    if (p->max_tokens == 0 && !p->echo)
        return json_refuse(r, LM_INVALID, max, "must be at least 1; 0 only scores a prompt, with "
                           "echo: true");
    if (p->min_tokens > p->max_tokens)
        return json_refuse(r, LM_INVALID, "min_tokens", "is %d, more than %s, which is %d",
                           p->min_tokens, max, p->max_tokens);
    return LM_OK;
}

lm_status json_params_read(const struct json_reader *r, yyjson_val *obj,
                           struct engine_params *out)
{
    engine_params_default(out);
    if (!obj)
        return LM_OK;
    lm_status st = check_names(r, obj);
    size_t left = yyjson_obj_size(obj);        /* most have a few of them */
    for (size_t i = 0; !st && left > 0 && i < LM_COUNT(rows); i++) {
        yyjson_val *v = yyjson_obj_get(obj, rows[i].name);
        left -= v != NULL;
        if (v && !yyjson_is_null(v))
            st = read_row(r, &rows[i], v, out);
    }
    yyjson_val *seed = json_given(obj, "seed"), *stop = json_given(obj, "stop");
    yyjson_val *ids = json_given(obj, "stop_token_ids");
    yyjson_val *logprobs = json_given(obj, "logprobs"), *top = json_given(obj, "top_logprobs");
    if (!st && seed)
        st = read_seed(r, seed, out);
    if (!st && stop)
        st = read_stop(r, stop, out);
    if (!st && ids)
        st = json_read_token_ids(r, "stop_token_ids", ids, 0, MAX_STOP_TOKENS,
                                 &out->stop_token_ids, &out->n_stop_token_ids);
    if (!st && (logprobs || top))
        st = read_logprobs(r, logprobs, top, out);
    return st ? st : check_together(r, obj, out);
}
