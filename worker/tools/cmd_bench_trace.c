/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_bench_trace.c - reads a trace; see cmd_bench.h.
 */
#include "worker/tools/cmd_bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEADER "id,arrival,adapter,rank,prompt_len,output_len"
#define MAX_LINE 256
#define MAX_REQUESTS 100000000
#define MAX_TOKENS (1 << 24)
#define MAX_ADAPTERS 100000000
#define MAX_SECONDS 1e9

static lm_status append(struct trace *t, int *cap, const struct trace_item *item)
{
    if (t->n == *cap) {
        int n = *cap ? *cap * 2 : 1024;
        void *p = lm_reallocarray(t->item, (size_t)n, sizeof *t->item);
        if (!p)
            return LM_NOMEM;
        t->item = p;
        *cap = n;
    }
    t->item[t->n++] = *item;
    t->max_prompt = LM_MAX(t->max_prompt, item->prompt);
    t->max_output = LM_MAX(t->max_output, item->output);
    t->n_adapters = LM_MAX(t->n_adapters, item->adapter + 1);
    return LM_OK;
}

/* The next field as a number; moves behind its comma. False when it is none. */
static bool number(const char **at, double lo, double hi, double *out)
{
    char *end;
    *out = strtod(*at, &end);
    if (end == *at || !(*out >= lo && *out <= hi) || (*end && *end != ','))
        return false;
    *at = *end ? end + 1 : end;
    return true;
}

static const char *parse_line(const char *line, struct trace_item *item)
{
    double id, arrival, adapter, rank, prompt, output;
    const char *at = line;
    if (!number(&at, 0, 1e15, &id))
        return "id";
    if (!number(&at, 0, MAX_SECONDS, &arrival))
        return "arrival";
    if (!number(&at, -1, MAX_ADAPTERS, &adapter))
        return "adapter";
    if (!number(&at, 0, 4096, &rank) || (adapter >= 0) != (rank > 0))
        return "rank";
    if (!number(&at, 1, MAX_TOKENS, &prompt))
        return "prompt_len";
    if (!number(&at, 1, MAX_TOKENS, &output) || *at)
        return "output_len";
    *item = (struct trace_item){ (int64_t)(arrival * 1e6), (int32_t)adapter, (int32_t)rank,
                                 (int32_t)prompt, (int32_t)output };
    return NULL;
}

static lm_status read_lines(FILE *f, const char *path, struct trace *t, struct lm_err *err)
{
    char line[MAX_LINE];
    int cap = 0, n = 0;
    while (fgets(line, sizeof line, f)) {
        struct trace_item item;
        line[strcspn(line, "\r\n")] = '\0';
        if (++n == 1) {
            if (strcmp(line, HEADER) != 0)
                return lm_err_set(err, LM_FORMAT, "%s: the first line is not '%s'", path, HEADER);
            continue;
        }
        if (!*line)
            continue;
        const char *bad = parse_line(line, &item);
        if (bad)
            return lm_err_set(err, LM_FORMAT, "%s:%d: %s is missing or out of range", path, n, bad);
        if (t->n > 0 && item.arrival_us < t->item[t->n - 1].arrival_us)
            return lm_err_set(err, LM_FORMAT, "%s:%d: arrival lies before the line above", path, n);
        if (t->n == MAX_REQUESTS || append(t, &cap, &item) != LM_OK)
            return lm_err_set(err, LM_NOMEM, "%s: no memory for more than %d requests", path, t->n);
    }
    if (ferror(f))
        return lm_err_set(err, LM_IO, "%s: can't be read", path);
    return t->n > 0 ? LM_OK : lm_err_set(err, LM_FORMAT, "%s: no requests", path);
}

lm_status trace_load(const char *path, struct trace *out, struct lm_err *err)
{
    *out = (struct trace){ 0 };
    FILE *f = fopen(path, "rbe");
    if (!f)
        return lm_err_set(err, LM_NOT_FOUND, "trace '%s' can't be read", path);
    lm_status st = read_lines(f, path, out, err);
    fclose(f);
    if (st != LM_OK)
        trace_release(out);
    return st;
}

void trace_release(struct trace *t)
{
    free(t->item);
    *t = (struct trace){ 0 };
}
