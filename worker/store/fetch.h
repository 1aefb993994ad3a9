/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fetch.h - one file over HTTP(S) onto disk, over as many attempts as its owner allows.
 *
 * An attempt asks for what is still missing: from the start, or, when a strong ETag is known, from
 * where the last attempt stopped (Range with If-Range, RFC 9110 sections 13.1.5 and 14). Nothing a
 * server says is believed without a check:
 *
 *   200 after a range request      the file starts again from its first byte
 *   206                            must be asked for, start where we stopped, and carry our ETag
 *   Content-Length, body           must agree; nothing may exceed max_bytes, chunked or not
 *   redirects                      few, and to http or https only (https stays https)
 *   silence                        fewer than FETCH_STALL_BYTES in stall_timeout_ms end the attempt
 *
 * The owner decides about retries: an ended attempt says whether another one makes sense, and
 * what the server asked for by Retry-After.
 *
 * Threads: a fetcher and its fetches belong to one thread; fetcher_wake() is for the others.
 */
#ifndef LORAMILL_WORKER_STORE_FETCH_H
#define LORAMILL_WORKER_STORE_FETCH_H

#include "kernels/base.h"

#define FETCH_STALL_BYTES 4096
#define FETCH_UNKNOWN UINT64_MAX

typedef struct fetcher fetcher;

struct fetcher_config {
    const char *ca_file;        /* PEM, or NULL for the system's */
    const char *auth_header;    /* "Authorization: ...", or NULL */
    int connect_timeout_ms, stall_timeout_ms;
};

/* LM_INVALID for a header that is not one Authorization line; NULL is none. */
lm_status fetcher_check_auth(const char *header, struct lm_err *err);
/* The strings are copied. LM_INVALID as above. */
lm_status fetcher_new(const struct fetcher_config *cfg, fetcher **out, struct lm_err *err);
void fetcher_free(fetcher *f);          /* ends running attempts without a word */

/* One file. Plain data in its owner's hands; fill the first group, zero the rest. */
struct fetch {
    const char *url;            /* lives as long as the fetch */
    int fd;                     /* open for writing, empty; stays the owner's */
    uint64_t max_bytes;
    void *user;

    uint64_t have;              /* bytes on disk that count */
    uint64_t total;             /* once known; set FETCH_UNKNOWN at first */
    uint64_t received;          /* over all attempts, for statistics */
    char etag[256];             /* strong, or "" */

    lm_status status;           /* of the attempt that ended last; LM_OK: the file is whole */
    struct lm_err err;
    bool retry;                 /* another attempt may succeed */
    int64_t retry_after_ms;     /* the server's wish; 0: none */

    struct fetch_attempt *attempt;      /* private, NULL between attempts */
};

/* LM_OK: fetcher_run() will report the end. */
lm_status fetch_start(fetcher *f, struct fetch *file, struct lm_err *err);
/* Ends a running attempt (file->attempt) without a word. Not from within fetcher_run(). */
void fetch_abort(struct fetch *file);

/* Moves all attempts on, waiting up to timeout_ms for something to do; calls `ended` for each
 * attempt that ended. The callback may start others. */
void fetcher_run(fetcher *f, int timeout_ms, void (*ended)(void *ctx, struct fetch *file),
                 void *ctx);
void fetcher_wake(fetcher *f);  /* any thread: a waiting fetcher_run() returns */

#endif
