/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_params.c - sampling parameters from a JSON object; see json_prompt.h.
 *
 * One table gives place, range and `set` bit of every plain parameter; stop, logprobs and their kin
 * have a function each. Names and meanings are OpenAI's, and vLLM's where OpenAI has none. A
 * parameter that others serve and we don't yet is refused by name, so that a client never believes
 * that it was obeyed.
 */
#include "worker/codec/json_prompt.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_STOP_BYTES = 1024, MAX_STOP_TOKENS = 256 };

enum param {
    MAX_TOKENS, MAX_COMPLETION_TOKENS, MIN_TOKENS, TEMPERATURE, TOP_P, TOP_K, MIN_P,
    REPETITION_PENALTY, PRESENCE_PENALTY, FREQUENCY_PENALTY, N, ECHO, IGNORE_EOS,
    SKIP_SPECIAL_TOKENS, INCLUDE_STOP_STR, PLAIN, SEED = PLAIN, STOP, STOP_TOKEN_IDS, LOGPROBS,
    TOP_LOGPROBS, PARAMS
};

const char *const json_param_names[] = {
    [MAX_TOKENS] = "max_tokens", [MAX_COMPLETION_TOKENS] = "max_completion_tokens",
    [MIN_TOKENS] = "min_tokens", [TEMPERATURE] = "temperature", [TOP_P] = "top_p",
    [TOP_K] = "top_k", [MIN_P] = "min_p", [REPETITION_PENALTY] = "repetition_penalty",
    [PRESENCE_PENALTY] = "presence_penalty", [FREQUENCY_PENALTY] = "frequency_penalty", [N] = "n",
    [ECHO] = "echo", [IGNORE_EOS] = "ignore_eos", [SKIP_SPECIAL_TOKENS] = "skip_special_tokens",
    [INCLUDE_STOP_STR] = "include_stop_str_in_output", [SEED] = "seed", [STOP] = "stop",
    [STOP_TOKEN_IDS] = "stop_token_ids", [LOGPROBS] = "logprobs",
    [TOP_LOGPROBS] = "top_logprobs", [PARAMS] = NULL
};

/* An object's members by their names, found in one pass. NULL: absent, or null. */
struct param_members {
    yyjson_val *of[PARAMS];
    uint32_t given;             /* a bit for each that is not NULL */
};
_Static_assert(PARAMS <= 32, "a bit for each");

enum kind { INT, REAL, BOOL };

struct param_row {
    enum kind kind;
    size_t offset;
    double lo, hi;
    bool above;                 /* lo itself is not allowed */
    uint32_t set;
};

#define AT(field) offsetof(struct engine_params, field)

static const struct param_row rows[PLAIN] = {
    [MAX_TOKENS] = { INT, AT(max_tokens), 0, INT32_MAX, false, ENGINE_SET_MAX_TOKENS },
    [MAX_COMPLETION_TOKENS] = { INT, AT(max_tokens), 0, INT32_MAX, false, ENGINE_SET_MAX_TOKENS },
    [MIN_TOKENS] = { INT, AT(min_tokens), 0, INT32_MAX, false, 0 },
    [TEMPERATURE] = { REAL, AT(temperature), 0, 100, false, ENGINE_SET_TEMPERATURE },
    [TOP_P] = { REAL, AT(top_p), 0, 1, true, ENGINE_SET_TOP_P },
    [TOP_K] = { INT, AT(top_k), -1, INT32_MAX, false, ENGINE_SET_TOP_K },
    [MIN_P] = { REAL, AT(min_p), 0, 1, false, ENGINE_SET_MIN_P },
    [REPETITION_PENALTY] = { REAL, AT(repetition_penalty), 0, 100, true,
                             ENGINE_SET_REPETITION_PENALTY },
    [PRESENCE_PENALTY] = { REAL, AT(presence_penalty), -2, 2, false, 0 },
    [FREQUENCY_PENALTY] = { REAL, AT(frequency_penalty), -2, 2, false, 0 },
    [N] = { INT, AT(n), 1, ENGINE_MAX_N, false, 0 },
    [ECHO] = { BOOL, AT(echo), 0, 0, false, 0 },
    [IGNORE_EOS] = { BOOL, AT(ignore_eos), 0, 0, false, 0 },
    [SKIP_SPECIAL_TOKENS] = { BOOL, AT(skip_special_tokens), 0, 0, false, 0 },
    [INCLUDE_STOP_STR] = { BOOL, AT(include_stop), 0, 0, false, 0 },
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

static lm_status read_real(const struct json_reader *r, const char *name,
                           const struct param_row *row, yyjson_val *v, float *out)
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
    return json_wrong_value(r, name, what, v);
}

static lm_status read_plain(const struct json_reader *r, enum param k, yyjson_val *v,
                            struct engine_params *p)
{
    const struct param_row *row = &rows[k];
    const char *name = json_param_names[k];
    char *at = (char *)p + row->offset;
    int64_t i = 0;
    lm_status st = LM_OK;
    switch (row->kind) {
    case REAL:
        st = read_real(r, name, row, v, (float *)(void *)at);
        break;
    case BOOL:
        st = json_read_bool(r, name, v, (bool *)(void *)at);
        break;
    case INT:
        st = json_read_int(r, name, v, (int64_t)row->lo, (int64_t)row->hi, &i);
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
        return json_wrong_value(r, "seed", "an integer", v);
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
        return json_wrong_value(r, "logprobs", "true, false or a count", v);
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

static enum param param_of(const char *name)
{
    enum param k = 0;
    while (k < PARAMS && (*json_param_names[k] != *name || strcmp(json_param_names[k], name)))
        k++;
    return k;
}

static lm_status find_params(const struct json_reader *r, yyjson_val *obj,
                             struct param_members *m)
{
    yyjson_obj_iter it = yyjson_obj_iter_with(obj);
    *m = (struct param_members){ .given = 0 };
    for (yyjson_val *name; (name = yyjson_obj_iter_next(&it)) != NULL;) {
        const char *key = yyjson_get_str(name);
        yyjson_val *v = yyjson_obj_iter_get_val(name);
        enum param k = param_of(key);
        if (k == PARAMS && !json_key_in(not_served, key))
            return json_unknown(r, key, json_param_names);
        if (yyjson_is_null(v))
            continue;
        if (k == PARAMS)
            return json_refuse(r, LM_UNSUPPORTED, key, "is not served yet; leave it out");
        m->of[k] = v;
        m->given |= UINT32_C(1) << k;
    }
    return LM_OK;
}

static lm_status check_together(const struct json_reader *r, const struct param_members *m,
                                const struct engine_params *p)
{
    bool chat_name = m->of[MAX_COMPLETION_TOKENS];
    const char *max = json_param_names[chat_name ? MAX_COMPLETION_TOKENS : MAX_TOKENS];
    if (chat_name && m->of[MAX_TOKENS])
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

static lm_status read_members(const struct json_reader *r, const struct param_members *m,
                              struct engine_params *out)
{
    lm_status st = LM_OK;
    uint32_t plain = m->given & ((UINT32_C(1) << PLAIN) - 1);
    for (; !st && plain; plain &= plain - 1) {
        enum param k = (enum param)__builtin_ctz(plain);
        st = read_plain(r, k, m->of[k], out);
    }
    if (!st && m->of[SEED])
        st = read_seed(r, m->of[SEED], out);
    if (!st && m->of[STOP])
        st = read_stop(r, m->of[STOP], out);
    if (!st && m->of[STOP_TOKEN_IDS])
        st = json_read_token_ids(r, "stop_token_ids", m->of[STOP_TOKEN_IDS], 0, MAX_STOP_TOKENS,
                                 &out->stop_token_ids, &out->n_stop_token_ids);
    if (!st && (m->of[LOGPROBS] || m->of[TOP_LOGPROBS]))
        st = read_logprobs(r, m->of[LOGPROBS], m->of[TOP_LOGPROBS], out);
    return st ? st : check_together(r, m, out);
}

lm_status json_params_read(const struct json_reader *r, yyjson_val *obj,
                           struct engine_params *out)
{
    struct param_members m;
    engine_params_default(out);
    if (!obj)
        return LM_OK;
    lm_status st = find_params(r, obj, &m);
    return st ? st : read_members(r, &m, out);
}
