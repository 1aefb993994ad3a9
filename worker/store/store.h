/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store.h - adapters from an object store over HTTP(S), through a disk cache, into the engine.
 *
 * store_get() answers with an engine adapter: at once when the engine holds it, else after reading
 * it from the disk cache or fetching it (single-flight per id; at most `concurrency` transfers).
 * One store thread drives libcurl's multi interface; a loader thread reads, validates and packs.
 * Nothing here blocks the caller.
 *
 * Disk cache (shared by any number of workers on a host): files are written under tmp/, hashed,
 * validated for form, fsync'ed and installed by one rename of the adapter's folder, so that a
 * reader sees a whole adapter or none. Interrupted downloads leave only tmp/ entries, swept at
 * start when their process is gone.
 *
 * Failures: 404, 410 -> LM_NOT_FOUND; 401, 403 -> LM_DENIED; other 4xx -> LM_INVALID; a broken
 * adapter -> what its form, or engine_adapter_load(), says: all final, and remembered for
 * `negative_ttl_ms`. No connection, a cut body, 408, 429, 5xx -> retried with jittered backoff up
 * to `max_attempts`, then LM_NET.
 */
#ifndef LORAMILL_WORKER_STORE_STORE_H
#define LORAMILL_WORKER_STORE_STORE_H

#include "engine/engine.h"

typedef struct store store;

struct store_config {
    engine *engine;
    const char *url;            /* template with {adapter}; http, https or file (a local folder);
                                 * NULL: only what is in local_dir */
    const char *local_dir;      /* one PEFT folder per id (loramill batch), or NULL */
    const char *cache_dir;
    const char *ca_file;        /* PEM, or NULL */
    const char *auth_header;    /* "Authorization: ..." or NULL */
    size_t max_adapter_bytes;   /* 0: 4 GiB */
    int concurrency;            /* 0: 8 */
    int max_attempts;           /* 0: 5 */
    int connect_timeout_ms;     /* 0: 5000 */
    int stall_timeout_ms;       /* 0: 30000, no bytes for so long */
    int negative_ttl_ms;        /* 0: nothing is remembered */
};

lm_status store_new(const struct store_config *cfg, store **out, struct lm_err *err);
void store_free(store *s);      /* pending callbacks are called with LM_CANCELLED first */

/* Exactly one call, from a store thread (or from store_get itself when known at once): on LM_OK the
 * callee takes the reference `a`. Must not block. */
typedef void store_done(void *user, lm_status status, engine_adapter *a, const struct lm_err *err);
void store_get(store *s, const char *adapter_id, store_done *done, void *user);

/* The asker with this `user` does not wait any more. True: `done` is not called for it, now or
 * later. False: it has been, or is about to be. A fetch that nobody waits for is not tried again;
 * what comes of the attempt that runs is kept, unless another needs its slot. Any thread. Cost: the
 * askers of this adapter that came earlier and still wait. */
bool store_let_go(store *s, const char *adapter_id, const void *user);

struct store_stats {
    uint64_t fetched, fetched_bytes, disk_hits, memory_hits, failures, retries, negative_hits;
    uint64_t fetch_us;
    int in_flight;
};
void store_stats(store *s, struct store_stats *out);

#endif
