/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool_world.h - pool, eviction order, prefix cache and residency together, on a CPU device with
 * blocks of a few bytes, and adapters made of nothing but a size: no model, no engine.
 */
#ifndef LORAMILL_TESTS_POOL_WORLD_H
#define LORAMILL_TESTS_POOL_WORLD_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/residency.h"
#include "engine/prefix.h"

#define WORLD_BT 4              /* tokens a block */
#define WORLD_CELL 16

struct world {
    kn_device *dev;
    void *memory;
    struct pool pool;
    struct evict evict;
    struct prefix prefix;
    struct residency_tier tier;
};

static inline void world_ok(lm_status st, const struct lm_err *err)
{
    if (st != LM_OK)
        fail_msg("%s", err->msg);
}

static inline struct world *world_new(int n_blocks)
{
    struct lm_err err = { 0 };
    struct world *w = calloc(1, sizeof *w);
    const struct kn_open_params one = { .threads = 1 };
    assert_non_null(w);
    world_ok(kn_open("cpu", &one, &w->dev, &err), &err);
    world_ok(kn_alloc(w->dev, (size_t)n_blocks * WORLD_CELL, &w->memory, &err), &err);
    struct kn_pool memory = { .base = w->memory, .num_blocks = n_blocks, .n_layers = 1,
                              .block_bytes = WORLD_CELL };
    world_ok(pool_init(&w->pool, n_blocks, &err), &err);
    world_ok(evict_init(&w->evict, n_blocks, &err), &err);
    world_ok(prefix_init(&w->prefix, &w->pool, &w->evict, WORLD_BT, true, &err), &err);
    world_ok(residency_init(&w->tier, w->dev, &w->pool, &w->evict, &memory, &err), &err);
    return w;
}

static inline void world_free(struct world *w)
{
    while (evict_kind(&w->prefix, &w->tier, EVICT_PREFIX)) {
    }
    while (evict_kind(&w->prefix, &w->tier, EVICT_ADAPTER)) {
    }
    assert_int_equal(w->pool.n_free, w->pool.n_blocks);
    residency_release(&w->tier);
    prefix_release(&w->prefix);
    evict_release(&w->evict);
    pool_release(&w->pool);
    kn_free(w->dev, w->memory);
    kn_close(w->dev);
    free(w);
}

static inline void world_check(const struct world *w)
{
    struct lm_err err = { 0 };
    world_ok(pool_check(&w->pool, &err), &err);
    world_ok(prefix_check(&w->prefix, &err), &err);
    world_ok(evict_check(&w->evict, &err), &err);
}

/* Every byte of its image is `serial`'s lowest. */
static inline void world_adapter(struct world *w, struct engine_adapter *a, int n_blocks,
                                 uint64_t serial)
{
    void *cells;
    struct lm_err err = { 0 };
    world_ok(kn_host_alloc(w->dev, (size_t)n_blocks * WORLD_CELL, &cells, &err), &err);
    memset(cells, (int)(serial & 0xff), (size_t)n_blocks * WORLD_CELL);
    *a = (struct engine_adapter){ .id = NULL, .n_blocks = n_blocks };
    a->image = (struct adapter_image){ .cells = cells, .n_cells = n_blocks,
                                       .cell_bytes = WORLD_CELL };
    a->res.blocks = calloc((size_t)n_blocks, sizeof *a->res.blocks);
    assert_non_null(a->res.blocks);
    evict_version_init(&a->version, serial);
}

/* It goes, with everything of it. */
static inline void world_forget(struct world *w, struct engine_adapter *a)
{
    residency_drop(&w->tier, a);
    prefix_forget(&w->prefix, &a->version);
    if (a->res.ready)
        kn_event_free(a->res.ready);
    kn_host_free(w->dev, a->image.cells);
    free(a->res.blocks);
    *a = (struct engine_adapter){ 0 };
}

/* Makes room and uploads; it is idle then. */
static inline void world_load(struct world *w, struct engine_adapter *a)
{
    struct lm_err err = { 0 };
    assert_int_equal(evict_until(&w->prefix, &w->tier, a->n_blocks), LM_OK);
    world_ok(residency_load(&w->tier, a, &err), &err);
    world_ok(residency_wait(&w->tier, &err), &err);
    world_ok(residency_poll(&w->tier, &err), &err);
    assert_int_equal(a->res.state, RES_RESIDENT);
}

/* Costs as measured, in force at once. */
static inline void world_costs(struct world *w, double prefill, double copy, double fixed)
{
    w->evict.measured = w->evict.used = (struct evict_costs){ prefill, copy, fixed };
}

#endif
