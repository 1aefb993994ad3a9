/* SPDX-License-Identifier: Apache-2.0 */
/*
 * residency.h - adapters in pool blocks: upload, use, idle, eviction.
 *
 * An upload is one scatter of all the image's cells on a copy stream of its own, ordered by events
 * on both sides: it waits for the last step (whose blocks it may be given), and sequences of the
 * adapter are admitted once its event has passed, so compute never waits for a copy.
 *
 * Lists: LOADING adapters in order of upload; RESIDENT ones without users in order of last use. Who
 * of the latter leaves is evict.c's affair.
 *
 * Threads: belongs to the engine thread.
 */
#ifndef LORAMILL_ENGINE_RESIDENCY_H
#define LORAMILL_ENGINE_RESIDENCY_H

#include "engine/adapters.h"
#include "engine/pool.h"

struct adapter_list {
    struct engine_adapter *head, *tail;
};

struct residency_tier {
    kn_device *dev;
    struct pool *pool;
    struct evict *evict;
    struct kn_pool memory;
    kn_stream *copy;
    kn_event *step_done;        /* recorded on the compute stream after each step */
    int64_t *offsets;           /* scratch of the scatter, [cap_offsets] */
    int cap_offsets;
    struct adapter_list idle, loading;
    int n_resident, n_loading;
    int idle_blocks;            /* of adapters on the idle list */
    uint64_t loads, evictions;
};

lm_status residency_init(struct residency_tier *t, kn_device *dev, struct pool *pool,
                         struct evict *evict, const struct kn_pool *memory, struct lm_err *err);
/* Times a few uploads into blocks that nobody uses yet and tells evict.c what one costs. Blocks. */
lm_status residency_measure(struct residency_tier *t, struct lm_err *err);
/* Every adapter must have been dropped. */
void residency_release(struct residency_tier *t);

/* Starts the upload; the pool must have a->n_blocks free. */
lm_status residency_load(struct residency_tier *t, struct engine_adapter *a, struct lm_err *err);
/* Uploads that have passed become RESIDENT. LM_DEVICE when one failed. */
lm_status residency_poll(struct residency_tier *t, struct lm_err *err);
/* Blocks until the oldest upload has passed. */
lm_status residency_wait(struct residency_tier *t, struct lm_err *err);

void residency_use(struct residency_tier *t, struct engine_adapter *a);     /* a running sequence */
void residency_unuse(struct residency_tier *t, struct engine_adapter *a);
/* Someone will want it soon: an idle one counts as used now. */
void residency_touch(struct residency_tier *t, struct engine_adapter *a);

/* Gives the blocks back; the adapter has no users. Waits for an upload under way. */
void residency_drop(struct residency_tier *t, struct engine_adapter *a);
/* Drops the idle adapter of this queue. For evict.c. */
void residency_evict_weights(struct residency_tier *t, struct evict_queue *weights);
/* Drops the least recently used idle adapter; false when there is none. */
bool residency_evict(struct residency_tier *t);

#endif
