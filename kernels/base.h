/* SPDX-License-Identifier: Apache-2.0 */
/*
 * base.h - the few things every room of the house shares.
 *
 * One status enum (0 is ok), one error object that carries a message made for a person, one
 * process-wide log, checked allocation, and the clocks. Nothing here knows about Kafka, models or
 * devices, so any folder may include it.
 *
 * Errors: a function that can fail returns lm_status and takes `struct lm_err *` last. On failure
 * it fills the error exactly once, at the place that knows the name of the thing that failed and
 * the remedy; callers pass it on, or prefix context with lm_err_prefix(). `err` may be NULL.
 *
 * Threads: everything is safe from any thread, except lm_log_set_sink() and lm_log_set_level(),
 * which belong to start-up.
 */
#ifndef LORAMILL_KERNELS_BASE_H
#define LORAMILL_KERNELS_BASE_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What the caller of the whole operation should do about a failure. */
enum lm_disposition {
    LM_DO_NOTHING,      /* not a failure */
    LM_DO_RETRY,        /* may heal by itself: back off and try again */
    LM_DO_REFUSE,       /* the input is at fault: dead letter, error line, usage error */
    LM_DO_RESTART,      /* this process can't be trusted any more */
};

/* X(name, wire code, default text, disposition); the wire code is what dead letters carry. */
#define LM_STATUS_LIST(X)                                                                      \
    X(OK,          "ok",            "ok",                                      LM_DO_NOTHING)  \
    X(INVALID,     "invalid",       "invalid value",                           LM_DO_REFUSE)   \
    X(FORMAT,      "malformed",     "malformed input",                         LM_DO_REFUSE)   \
    X(UNSUPPORTED, "unsupported",   "not supported",                           LM_DO_REFUSE)   \
    X(NOT_FOUND,   "not_found",     "not found",                               LM_DO_REFUSE)   \
    X(MISMATCH,    "mismatch",      "does not match",                          LM_DO_REFUSE)   \
    X(TOO_LARGE,   "too_large",     "too large",                               LM_DO_REFUSE)   \
    X(DENIED,      "denied",        "permission denied",                       LM_DO_REFUSE)   \
    X(EXPIRED,     "expired",       "deadline passed",                         LM_DO_REFUSE)   \
    X(POISON,      "poison",        "kills or hangs the engine",               LM_DO_REFUSE)   \
    X(CANCELLED,   "cancelled",     "cancelled",                               LM_DO_NOTHING)  \
    X(BUSY,        "busy",          "no room at present",                      LM_DO_RETRY)    \
    X(TIMEOUT,     "timeout",       "timed out",                               LM_DO_RETRY)    \
    X(NET,         "unreachable",   "network failure",                         LM_DO_RETRY)    \
    X(IO,          "io",            "input/output error",                      LM_DO_RETRY)    \
    X(NOMEM,       "out_of_memory", "out of memory",                           LM_DO_RETRY)    \
    X(STATE,       "state",         "not allowed in this state",               LM_DO_RESTART)  \
    X(DEVICE,      "device",        "device failure",                          LM_DO_RESTART)  \
    X(INTERNAL,    "internal",      "internal error, please report",           LM_DO_RESTART)

typedef enum lm_status {
#define X(name, wire, text, disp) LM_##name,
    LM_STATUS_LIST(X)
#undef X
    LM_STATUS_COUNT
} lm_status;

const char *lm_status_wire(lm_status s);                /* "not_found"; never NULL */
const char *lm_status_text(lm_status s);
enum lm_disposition lm_status_disposition(lm_status s);

/* An error with its message. Plain data, lives on the caller's stack. */
struct lm_err {
    lm_status code;
    char msg[512];
};

#define LM_PRINTF(f, a) __attribute__((format(printf, f, a)))

/* Fills `err` (if not NULL) and returns `code`, so that `return lm_err_set(...)` reads well.
 * Untrusted text in the arguments is made printable (control bytes and broken UTF-8 become '?'). */
lm_status lm_err_set(struct lm_err *err, lm_status code, const char *fmt, ...) LM_PRINTF(3, 4);

/* Puts "prefix: " before the message and returns err->code (LM_INTERNAL when err is NULL). */
lm_status lm_err_prefix(struct lm_err *err, const char *fmt, ...) LM_PRINTF(2, 3);

/* ---- log ------------------------------------------------------------------------------- */

enum lm_level { LM_ERROR, LM_WARN, LM_INFO, LM_DEBUG };

typedef void lm_log_sink(void *ctx, enum lm_level level, const char *component, const char *line);

void lm_log_set_sink(lm_log_sink *sink, void *ctx);     /* default: one line on stderr */
void lm_log_set_level(enum lm_level level);             /* default: LM_INFO */
bool lm_log_on(enum lm_level level);
void lm_log_write(enum lm_level level, const char *component, const char *fmt, ...)
    LM_PRINTF(3, 4);

/* The level is tested before anything is formatted. */
#define lm_log(level, component, ...)                                                          \
    do {                                                                                       \
        if (lm_log_on(level))                                                                  \
            lm_log_write(level, component, __VA_ARGS__);                                       \
    } while (0)

/* ---- memory ---------------------------------------------------------------------------- */

/* NULL on overflow or exhaustion; free with free(). `lm_calloc` zeroes. */
void *lm_malloc(size_t size);
void *lm_calloc(size_t n, size_t size);
void *lm_reallocarray(void *p, size_t n, size_t size);
char *lm_strdup(const char *s);
char *lm_strndup(const char *s, size_t n);
/* Each byte as two lower-case digits, and a NUL: 2n + 1 characters. */
void lm_hex(const void *bytes, size_t n, char *out);

/* ---- clocks ---------------------------------------------------------------------------- */

int64_t lm_now_us(void);        /* monotonic, microseconds */
int64_t lm_wall_ms(void);       /* milliseconds since the Unix epoch */

/* The next of a sequence that begins with any number but 0: xorshift64 (Marsaglia 2003), random
 * enough for jitter and fillers. */
static inline uint64_t lm_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

#define LM_MIN(a, b) ((a) < (b) ? (a) : (b))
#define LM_MAX(a, b) ((a) > (b) ? (a) : (b))
#define LM_COUNT(a) (sizeof(a) / sizeof((a)[0]))
#define LM_DIV_UP(a, b) (((a) + (b) - 1) / (b))

#endif
