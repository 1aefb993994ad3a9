/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_match.c - regular expressions of adapter_config.json, through PCRE2.
 *
 * PEFT's patterns are Python's. For what people write there (character classes, groups,
 * alternatives, repetition, named groups, lookaround) PCRE2 agrees with Python's re module. The
 * pattern comes from strangers: its length, the matcher's steps, its depth and its memory are
 * bounded, and no construct that leaves the subject (callouts, \C) is allowed.
 *
 * A pattern and its match data belong to one thread, the one that resolves the adapter.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/adapter_internal.h"

#define MAX_PATTERN (64u << 10)
#define MAX_STEPS 20000
#define MAX_DEPTH 2000
#define MAX_HEAP_KIB 4096

struct adapter_regex {
    pcre2_code *code;
    pcre2_match_data *data;
    pcre2_match_context *ctx;
    char what[64];
    const char *subject;        /* of the last hit */
};

static lm_status compile(adapter_regex *r, const char *text, struct lm_err *err)
{
    int code = 0;
    PCRE2_SIZE at = 0;
    r->code = pcre2_compile((PCRE2_SPTR)text, PCRE2_ZERO_TERMINATED,
                            PCRE2_UTF | PCRE2_NEVER_BACKSLASH_C,
                            &code, &at, NULL);
    if (!r->code) {
        char why[128];
        pcre2_get_error_message(code, (PCRE2_UCHAR *)why, sizeof why);
        return lm_err_set(err, LM_FORMAT, "%s: \"%.96s\" is not a regular expression: %s", r->what,
                          text, why);
    }
    r->data = pcre2_match_data_create_from_pattern(r->code, NULL);
    r->ctx = pcre2_match_context_create(NULL);
    if (!r->data || !r->ctx)
        return lm_err_set(err, LM_NOMEM, "%s: no memory", r->what);
    pcre2_set_match_limit(r->ctx, MAX_STEPS);
    pcre2_set_depth_limit(r->ctx, MAX_DEPTH);
    pcre2_set_heap_limit(r->ctx, MAX_HEAP_KIB);
    return LM_OK;
}

lm_status adapter_regex_new(const char *prefix, const char *pattern, const char *suffix,
                            const char *what, adapter_regex **out, struct lm_err *err)
{
    size_t n = strlen(prefix) + strlen(pattern) + strlen(suffix) + 1;
    if (n > MAX_PATTERN)
        return lm_err_set(err, LM_TOO_LARGE, "%s: a pattern of %zu bytes, the limit is %u", what,
                          strlen(pattern), MAX_PATTERN);
    adapter_regex *r = lm_calloc(1, sizeof *r);
    char *text = lm_malloc(n);
    lm_status s;
    if (r && text) {
        snprintf(r->what, sizeof r->what, "%s", what);
        snprintf(text, n, "%s%s%s", prefix, pattern, suffix);
        s = compile(r, text, err);
    } else {
        s = lm_err_set(err, LM_NOMEM, "%s: no memory", what);
    }
    free(text);
    if (s)
        adapter_regex_free(r);
    else
        *out = r;
    return s;
}

void adapter_regex_free(adapter_regex *r)
{
    if (!r)
        return;
    pcre2_match_context_free(r->ctx);
    pcre2_match_data_free(r->data);
    pcre2_code_free(r->code);
    free(r);
}

lm_status adapter_regex_match(const adapter_regex *r, const char *s, bool full, bool *hit,
                              struct lm_err *err)
{
    uint32_t opt = PCRE2_ANCHORED | (full ? PCRE2_ENDANCHORED : 0);
    int rc = pcre2_match(r->code, (PCRE2_SPTR)s, strlen(s), 0, opt, r->data, r->ctx);
    *hit = rc >= 0;
    if (rc >= 0) {
        ((adapter_regex *)r)->subject = s;
        return LM_OK;
    }
    if (rc == PCRE2_ERROR_NOMATCH)
        return LM_OK;
    char why[128];
    pcre2_get_error_message(rc, (PCRE2_UCHAR *)why, sizeof why);
    return lm_err_set(err, LM_INVALID, "%s: the regular expression fails on \"%s\": %s", r->what, s,
                      why);
}

int adapter_regex_group_int(const adapter_regex *r, const char *group)
{
    int n = pcre2_substring_number_from_name(r->code, (PCRE2_SPTR)group);
    if (n < 0)
        return -1;
    const PCRE2_SIZE *ov = pcre2_get_ovector_pointer(r->data);
    if (ov[2 * n] == PCRE2_UNSET)
        return -1;
    return (int)strtol(r->subject + ov[2 * n], NULL, 10);
}
