/* SPDX-License-Identifier: Apache-2.0 */
/*
 * base.c - statuses, errors, log, allocation and clocks; see base.h for the contract.
 *
 * The log keeps two words of process-wide state: the sink and the level. They are set at start-up
 * and read with relaxed atomics afterwards, so that a disabled log line costs one load.
 */
#include "kernels/base.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct status_row {
    const char *wire;
    const char *text;
    enum lm_disposition disposition;
};

static const struct status_row status_rows[LM_STATUS_COUNT] = {
#define X(name, wire, text, disp) { wire, text, disp },
    LM_STATUS_LIST(X)
#undef X
};

static const struct status_row *status_row(lm_status s)
{
    return &status_rows[(unsigned)s < LM_STATUS_COUNT ? s : LM_INTERNAL];
}

const char *lm_status_wire(lm_status s)
{
    return status_row(s)->wire;
}

const char *lm_status_text(lm_status s)
{
    return status_row(s)->text;
}

enum lm_disposition lm_status_disposition(lm_status s)
{
    return status_row(s)->disposition;
}

/* Bytes of the UTF-8 character (RFC 3629) at s, which a NUL ends; 0 if there is none. */
static size_t utf8_len(const unsigned char *s)
{
    if (s[0] < 0x80)
        return 1;
    if (s[0] < 0xc2 || s[0] > 0xf4)
        return 0;
    /* The second byte rules out overlong forms, surrogates and what lies beyond U+10FFFF. */
    unsigned char lo = s[0] == 0xe0 ? 0xa0 : s[0] == 0xf0 ? 0x90 : 0x80;
    unsigned char hi = s[0] == 0xed ? 0x9f : s[0] == 0xf4 ? 0x8f : 0xbf;
    if (s[1] < lo || s[1] > hi)
        return 0;
    size_t n = s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : 4;
    for (size_t i = 2; i < n; i++)
        if ((s[i] & 0xc0) != 0x80)
            return 0;
    return n;
}

/* Messages quote hostile input, cut at some length, and end in logs, JSON and headers: no control
 * bytes, and nothing that isn't UTF-8. */
static void make_printable(char *s)
{
    while (*s) {
        size_t n = utf8_len((const unsigned char *)s);
        if (n == 0 || (unsigned char)*s < 0x20 || *s == 0x7f) {
            *s = '?';
            n = 1;
        }
        s += n;
    }
}

lm_status lm_err_set(struct lm_err *err, lm_status code, const char *fmt, ...)
{
    if (!err)
        return code;
    err->code = code;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(err->msg, sizeof err->msg, fmt, ap);
    va_end(ap);
    make_printable(err->msg);
    return code;
}

lm_status lm_err_prefix(struct lm_err *err, const char *fmt, ...)
{
    if (!err)
        return LM_INTERNAL;
    char tail[sizeof err->msg];
    memcpy(tail, err->msg, sizeof tail);
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(err->msg, sizeof err->msg, fmt, ap);
    va_end(ap);
    if (n >= 0 && (size_t)n < sizeof err->msg)
        snprintf(err->msg + n, sizeof err->msg - (size_t)n, ": %.*s",
                 (int)(sizeof err->msg - (size_t)n), tail);
    make_printable(err->msg);
    return err->code;
}

/* ---- log ------------------------------------------------------------------------------- */

static const char *const level_names[] = { "ERROR", "WARN", "INFO", "DEBUG" };

static void sink_stderr(void *ctx, enum lm_level level, const char *component, const char *line)
{
    (void)ctx;
    struct timespec ts;
    struct tm tm;
    clock_gettime(CLOCK_REALTIME, &ts);
    gmtime_r(&ts.tv_sec, &tm);
    char when[32];
    strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%S", &tm);
    fprintf(stderr, "%s.%03dZ %-5s %s: %s\n", when, (int)(ts.tv_nsec / 1000000),
            level_names[level], component, line);
}

static _Atomic(lm_log_sink *) log_sink = sink_stderr;
static _Atomic(void *) log_ctx;
static atomic_int log_level = LM_INFO;

void lm_log_set_sink(lm_log_sink *sink, void *ctx)
{
    atomic_store(&log_ctx, ctx);
    atomic_store(&log_sink, sink ? sink : sink_stderr);
}

void lm_log_set_level(enum lm_level level)
{
    atomic_store_explicit(&log_level, (int)level, memory_order_relaxed);
}

bool lm_log_on(enum lm_level level)
{
    return (int)level <= atomic_load_explicit(&log_level, memory_order_relaxed);
}

void lm_log_write(enum lm_level level, const char *component, const char *fmt, ...)
{
    char line[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    make_printable(line);
    lm_log_sink *sink = atomic_load(&log_sink);
    sink(atomic_load(&log_ctx), level, component, line);
}

/* ---- memory ---------------------------------------------------------------------------- */

void *lm_malloc(size_t size)
{
    return malloc(size ? size : 1);
}

void *lm_calloc(size_t n, size_t size)
{
    return calloc(n ? n : 1, size ? size : 1);
}

void *lm_reallocarray(void *p, size_t n, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(n, size, &bytes))
        return NULL;
    return realloc(p, bytes ? bytes : 1);
}

char *lm_strndup(const char *s, size_t n)
{
    char *copy = lm_malloc(n + 1);
    if (copy) {
        memcpy(copy, s, n);
        copy[n] = '\0';
    }
    return copy;
}

char *lm_strdup(const char *s)
{
    return lm_strndup(s, strlen(s));
}

void lm_hex(const void *bytes, size_t n, char *out)
{
    static const char digits[] = "0123456789abcdef";
    const unsigned char *at = bytes;
    for (size_t i = 0; i < n; i++) {
        *out++ = digits[at[i] >> 4];
        *out++ = digits[at[i] & 15];
    }
    *out = '\0';
}

/* ---- clocks ---------------------------------------------------------------------------- */

int64_t lm_now_us(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

int64_t lm_wall_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}
