/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cache.h - adapters on disk, shared by any number of processes.
 *
 *   DIR/lock                         held while entries of tmp/ come to be or are swept
 *   DIR/claims                       empty; a lock on byte hash(entry) is a claim
 *   DIR/tmp/PID.RANDOM/N/            folders being written; PID.RANDOM is locked by its owner
 *   DIR/SOURCE/ENTRY/                a whole adapter: adapter_config.json,
 *                                    adapter_model.safetensors, SHA256SUMS
 *
 * SOURCE is a hash of the URL template: the same id from two stores is two adapters. ENTRY is the
 * id with '/' as '+', which no id contains, so that `brand` and `brand+voice` lie side by side and
 * no two ids share an entry; ids too long for a file name are cut and carry a hash behind '='.
 *
 * Invariants
 *  1. A folder at its place is whole: it gets there by one rename, after its files, its sums and
 *     itself are on disk (fsync).
 *  2. Nothing is ever changed in place. A damaged entry leaves by a rename into tmp/.
 *  3. Of two processes that install the same entry the first wins, the second uses it.
 *  4. tmp/ holds nothing of dead processes once a new one has started: an entry whose lock can be
 *     had has no owner. (Locks, not process ids, decide: workers in containers share caches, and
 *     all call themselves 1.)
 *
 * Threads: all functions may be called from any thread; they block on the disk.
 */
#ifndef LORAMILL_WORKER_STORE_CACHE_H
#define LORAMILL_WORKER_STORE_CACHE_H

#include "kernels/base.h"

#define CACHE_CONFIG "adapter_config.json"
#define CACHE_WEIGHTS "adapter_model.safetensors"
#define CACHE_SUMS "SHA256SUMS"

typedef struct cache cache;

/* Makes the folders where missing, and sweeps. */
lm_status cache_open(const char *dir, const char *source, cache **out, struct lm_err *err);
void cache_close(cache *c);             /* removes what is ours in tmp/ */

/* Where the adapter lies, or would; malloc'ed, NULL without memory. `id` was checked. */
char *cache_path(const cache *c, const char *id);
bool cache_has(const cache *c, const char *id);

/* Says to other processes that this one is fetching the adapter, so that one download serves a
 * host. False: another one is at it; look again later. A claim ends with its process, and is a
 * courtesy only: nothing breaks when two fetch the same. Claims of one process do not exclude each
 * other. */
bool cache_claim(cache *c, const char *id);
void cache_unclaim(cache *c, const char *id);

/* An empty folder in tmp/ for one adapter; malloc'ed path. */
lm_status cache_tmp(cache *c, char **path, struct lm_err *err);
void cache_discard(const char *tmp);    /* removes it; NULL is allowed */

/* Sums, syncs and renames; `tmp` is gone afterwards, whatever happened. *won is false when another
 * process had installed this id first. */
lm_status cache_install(cache *c, const char *id, const char *tmp, bool *won, struct lm_err *err);

/* LM_FORMAT names the file that is not what was installed. */
lm_status cache_verify(const cache *c, const char *id, struct lm_err *err);
void cache_remove(cache *c, const char *id);

#endif
