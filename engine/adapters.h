/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapters.h - the tiers of an adapter inside the engine: host memory, then pool blocks.
 *
 *            adapter_parse()          residency_load()         event passed
 *   folder ------------------> HOST -----------------> LOADING ------------> RESIDENT
 *                               ^  ^                                            |
 *                               |  +------------- evicted (evict.c) -------------+
 *                               |
 *              evicted when unreferenced and the host budget is short: the handle goes
 *
 * A version is an id plus a digest of its files. Loading other content under a known id makes a new
 * version, which find() returns from then on; requests that hold the old one finish on it.
 *
 * Two halves with two owners. The registry half (refs, lists, budget) is under the registry's
 * mutex and used by any thread. The residency half belongs to the engine thread, so a version that
 * leaves the registry is `condemned`: it waits on a list until the engine thread, between steps,
 * gives back its blocks and frees it (adapters_reap()).
 */
#ifndef LORAMILL_ENGINE_ADAPTERS_H
#define LORAMILL_ENGINE_ADAPTERS_H

#include "engine/adapter.h"
#include "engine/evict.h"
#include "engine/tree.h"

typedef struct adapters adapters;

enum residency_state { RES_HOST, RES_LOADING, RES_RESIDENT };

/* In pool blocks, or not. Engine thread only. */
struct residency {
    enum residency_state state;
    int users;                  /* running sequences */
    int32_t *blocks;            /* [n_blocks], valid unless RES_HOST */
    kn_event *ready;            /* the upload has passed */
    int64_t load_us, ready_us;  /* when the last one began, and was seen to have passed */
    struct engine_adapter *prev, *next; /* idle (least recently used first) or loading list */
    int uses;                   /* sequences it was admitted for; halved when it leaves */
    struct tree lane;           /* sequences that wait for it (queue.h) */
    uint64_t seen_step;         /* the step that last grouped tokens by adapter, */
    int group;                  /* and this adapter's place in it */
};

struct engine_adapter {
    adapters *home;
    char *id;
    struct evict_version version;       /* its serial is never 0 and never reused. The engine
                                 * thread's, but for the serial: keys cached prefixes, and has its
                                 * place in the eviction order */
    struct adapter_image image;
    struct stand_in *stand_in;          /* whose cells are the image's; NULL: they are its own */
    int n_blocks;               /* pool blocks that the image takes */

    /* under the registry's mutex */
    int refs;
    bool current;               /* the newest of its id; others are not in the table */
    struct engine_adapter *chain;       /* same bucket */
    int64_t load_us;            /* what reading it took */
    int uses;                   /* times that it was asked for */
    int idle_class;             /* its list of unreferenced ones, -1: none */
    double idle_level;
    struct engine_adapter *idle_prev, *idle_next;
    struct engine_adapter *condemned_next;

    struct residency res;
};

struct adapters_config {
    const struct model_config *model;   /* NULL in echo mode: folders are digested, not read */
    kn_device *dev;             /* for pinned memory; NULL in echo mode */
    enum kn_dtype lora_dtype;
    int64_t cell_bytes;
    int n_layers;
    int pool_blocks;            /* larger adapters are refused */
    bool no_payload;            /* stand-ins get no cells: the device is simulated */
    size_t host_budget, max_file_bytes;
    void (*rouse)(void *ctx);   /* something was condemned */
    void *rouse_ctx;
};

lm_status adapters_new(const struct adapters_config *cfg, adapters **out, struct lm_err *err);
/* Frees every version, referenced or not; residency must have been dropped. */
void adapters_free(adapters *a);

lm_status adapters_load(adapters *a, const char *id, const char *dir, engine_adapter **out,
                        struct lm_err *err);
/* See engine_adapter_dummy(). */
lm_status adapters_dummy(adapters *a, const char *id, int rank, unsigned modules,
                         engine_adapter **out, struct lm_err *err);
engine_adapter *adapters_find(adapters *a, const char *id);

/* Engine thread: frees what was condemned; `drop` gives back a version's blocks first. */
void adapters_reap(adapters *a, void (*drop)(void *ctx, engine_adapter *ad), void *ctx);
void adapters_stats(adapters *a, int *n, size_t *bytes);

#endif
