/* SPDX-License-Identifier: Apache-2.0 */
/*
 * log.c - see log.h. A line is formatted into one buffer and written with one write(2), so lines of
 * threads, and of processes that share a pipe, don't mix.
 */
#include "worker/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { LINE_MAX_BYTES = 4096 };

static char worker_name[256];
static const char *const names[] = { "ERROR", "WARN", "INFO", "DEBUG" };
static const char *const json_names[] = { "error", "warn", "info", "debug" };

static void stamp(char out[32])
{
    struct timespec ts;
    struct tm tm;
    char when[24];
    clock_gettime(CLOCK_REALTIME, &ts);
    gmtime_r(&ts.tv_sec, &tm);
    strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%S", &tm);
    snprintf(out, 32, "%.20s.%03dZ", when, (int)(ts.tv_nsec / 1000000));
}

static void put(const char *line, int n)
{
    if (n >= LINE_MAX_BYTES)
        n = LINE_MAX_BYTES - 1;
    /* Nobody is left to be told that the log can't be written. */
    ssize_t ignored = n > 0 ? write(STDERR_FILENO, line, (size_t)n) : 0;
    (void)ignored;
}

static void sink_text(void *ctx, enum lm_level level, const char *component, const char *line)
{
    (void)ctx;
    char when[32], out[LINE_MAX_BYTES];
    stamp(when);
    put(out, snprintf(out, sizeof out, "%s %-5s [%s] %s: %s\n", when, names[level], worker_name,
                      component, line));
}

/* JSON's escapes; lines hold no control bytes. Bytes that are not UTF-8 are quoted from hostile
 * input and become '?'. */
static void escape(char *out, size_t cap, const char *s)
{
    size_t n = 0;
    for (; *s && n + 3 < cap; s++) {
        unsigned char b = (unsigned char)*s;
        if (b == '"' || b == '\\')
            out[n++] = '\\';
        out[n++] = b < 0x20 || b >= 0x7f ? '?' : (char)b;
    }
    out[n] = '\0';
}

static void sink_json(void *ctx, enum lm_level level, const char *component, const char *line)
{
    (void)ctx;
    char when[32], text[2048 + 512], name[520], out[LINE_MAX_BYTES];
    stamp(when);
    escape(text, sizeof text, line);
    escape(name, sizeof name, worker_name);
    put(out, snprintf(out, sizeof out, "{\"time\":\"%s\",\"level\":\"%s\",\"worker\":\"%s\","
                      "\"component\":\"%s\",\"message\":\"%s\"}\n", when, json_names[level], name,
                      component, text));
}

void log_setup(const char *level, const char *format, const char *worker)
{
    snprintf(worker_name, sizeof worker_name, "%s", worker);
    for (size_t i = 0; i < LM_COUNT(json_names); i++)
        if (!strcmp(level, json_names[i]))
            lm_log_set_level((enum lm_level)i);
    lm_log_set_sink(strcmp(format, "json") ? sink_text : sink_json, NULL);
}

void log_seldom(struct log_seldom *s, const char *component, const char *fmt, ...)
{
    char text[1024];
    long long now = lm_now_us(), next = atomic_load(&s->next_us);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (now < next ||
        !atomic_compare_exchange_strong(&s->next_us, &next, now + LOG_SELDOM_S * 1000000ll)) {
        atomic_fetch_add(&s->left_out, 1);
        lm_log(LM_DEBUG, component, "%s", text);
        return;
    }
    unsigned more = atomic_exchange(&s->left_out, 0);
    if (more)
        lm_log(LM_WARN, component, "%s (and %u more such since the last)", text, more);
    else
        lm_log(LM_WARN, component, "%s", text);
}
