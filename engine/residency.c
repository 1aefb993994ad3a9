/* SPDX-License-Identifier: Apache-2.0 */
/*
 * residency.c - see residency.h. Invariants:
 *  1. RES_HOST: no blocks, on no list. RES_LOADING: on `loading`. RES_RESIDENT: on `idle` exactly
 *     if users == 0.
 *  2. idle_blocks is the sum of n_blocks over `idle`; evict.c's order has the same adapters.
 *  3. users > 0 only while RESIDENT: sequences are admitted after the upload has passed.
 */
#include "engine/residency.h"

#include <assert.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define MAX_USES 4              /* counted, for evict.c */
#define MEASURE_BLOCKS 4
#define MEASURE_TIMES 3

static void list_append(struct adapter_list *l, struct engine_adapter *a)
{
    a->res.next = NULL;
    a->res.prev = l->tail;
    *(l->tail ? &l->tail->res.next : &l->head) = a;
    l->tail = a;
}

static void list_remove(struct adapter_list *l, struct engine_adapter *a)
{
    *(a->res.prev ? &a->res.prev->res.next : &l->head) = a->res.next;
    *(a->res.next ? &a->res.next->res.prev : &l->tail) = a->res.prev;
    a->res.prev = a->res.next = NULL;
}

lm_status residency_init(struct residency_tier *t, kn_device *dev, struct pool *pool,
                         struct evict *evict, const struct kn_pool *memory, struct lm_err *err)
{
    *t = (struct residency_tier){ .dev = dev, .pool = pool, .evict = evict, .memory = *memory };
    lm_status st = kn_stream_new(dev, &t->copy, err);
    if (st == LM_OK)
        st = kn_event_new(dev, &t->step_done, err);
    if (st != LM_OK)
        residency_release(t);
    return st;
}

void residency_release(struct residency_tier *t)
{
    if (t->step_done)
        kn_event_free(t->step_done);
    if (t->copy)
        kn_stream_free(t->copy);
    free(t->offsets);
    *t = (struct residency_tier){ 0 };
}

static lm_status reserve_offsets(struct residency_tier *t, int n, struct lm_err *err)
{
    if (n <= t->cap_offsets)
        return LM_OK;
    void *p = lm_reallocarray(t->offsets, (size_t)n, sizeof *t->offsets);
    if (!p)
        return lm_err_set(err, LM_NOMEM, "no memory to load an adapter of %d cells", n);
    t->offsets = p;
    t->cap_offsets = n;
    return LM_OK;
}

/* Cell c lies in block blocks[c / n_layers], layer c % n_layers (kernels.h, "LoRA in the pool"). */
static void cell_offsets(const struct residency_tier *t, const int32_t *blocks, int n_cells)
{
    const struct kn_pool *m = &t->memory;
    for (int c = 0; c < n_cells; c++) {
        int64_t layer = c % m->n_layers, block = blocks[c / m->n_layers];
        t->offsets[c] = (layer * m->num_blocks + block) * m->block_bytes;
    }
}

static lm_status upload(struct residency_tier *t, struct engine_adapter *a)
{
    lm_status st = kn_event_wait(t->copy, t->step_done);
    if (st == LM_OK)
        st = kn_scatter_cells(t->copy, t->memory.base, t->offsets, a->image.n_cells,
                              (size_t)a->image.cell_bytes, a->image.cells);
    return st == LM_OK ? kn_event_record(a->res.ready, t->copy) : st;
}

lm_status residency_load(struct residency_tier *t, struct engine_adapter *a, struct lm_err *err)
{
    assert(a->res.state == RES_HOST);
    lm_status st = reserve_offsets(t, a->image.n_cells, err);
    if (st == LM_OK && !a->res.ready)
        st = kn_event_new(t->dev, &a->res.ready, err);
    if (st == LM_OK && pool_take(t->pool, POOL_ADAPTER, a->n_blocks, a->res.blocks) != LM_OK)
        st = lm_err_set(err, LM_INTERNAL, "adapter '%s' was planned into %d blocks; %d are free",
                        a->id, a->n_blocks, t->pool->n_free);
    if (st != LM_OK)
        return st;
    cell_offsets(t, a->res.blocks, a->image.n_cells);
    a->res.state = RES_LOADING;
    a->res.users = 0;
    a->res.load_us = kn_now_us(t->dev);
    list_append(&t->loading, a);
    t->n_loading++;
    t->loads++;
    st = upload(t, a);
    return st == LM_OK ? LM_OK : lm_err_set(err, st, "adapter '%s': the upload failed", a->id);
}

static void make_idle(struct residency_tier *t, struct engine_adapter *a)
{
    list_append(&t->idle, a);
    t->idle_blocks += a->n_blocks;
    a->version.weights.worth = LM_MAX(a->res.uses, 1);
    evict_update(t->evict, &a->version.weights, a->n_blocks, evict_now(t->evict));
}

static void leave_idle(struct residency_tier *t, struct engine_adapter *a)
{
    list_remove(&t->idle, a);
    t->idle_blocks -= a->n_blocks;
    evict_update(t->evict, &a->version.weights, 0, (struct evict_age){ 0 });
}

static void loaded(struct residency_tier *t, struct engine_adapter *a)
{
    list_remove(&t->loading, a);
    t->n_loading--;
    a->res.state = RES_RESIDENT;
    a->res.ready_us = kn_now_us(t->dev);
    t->n_resident++;
    make_idle(t, a);
}

lm_status residency_poll(struct residency_tier *t, struct lm_err *err)
{
    while (t->loading.head) {
        lm_status st = kn_event_query(t->loading.head->res.ready);
        if (st == LM_BUSY)
            return LM_OK;       /* one stream: later ones can't have passed either */
        if (st != LM_OK)
            return lm_err_set(err, st, "adapter '%s': the upload failed", t->loading.head->id);
        loaded(t, t->loading.head);
    }
    return LM_OK;
}

lm_status residency_wait(struct residency_tier *t, struct lm_err *err)
{
    return t->loading.head ? kn_event_sync(t->loading.head->res.ready, err) : LM_OK;
}

void residency_use(struct residency_tier *t, struct engine_adapter *a)
{
    assert(a->res.state == RES_RESIDENT);
    if (a->res.users++ == 0)
        leave_idle(t, a);
    a->res.uses += a->res.uses < MAX_USES;
}

void residency_unuse(struct residency_tier *t, struct engine_adapter *a)
{
    assert(a->res.users > 0);
    if (--a->res.users == 0)
        make_idle(t, a);
}

void residency_touch(struct residency_tier *t, struct engine_adapter *a)
{
    if (a->res.state != RES_RESIDENT || a->res.users > 0)
        return;
    leave_idle(t, a);
    make_idle(t, a);
}

void residency_drop(struct residency_tier *t, struct engine_adapter *a)
{
    assert(a->res.users == 0);
    if (a->res.state == RES_LOADING) {
        kn_event_sync(a->res.ready, NULL);      /* its blocks must not be written later */
        loaded(t, a);
    }
    if (a->res.state != RES_RESIDENT)
        return;
    leave_idle(t, a);
    t->n_resident--;
    for (int i = a->n_blocks - 1; i >= 0; i--)
        pool_unref(t->pool, a->res.blocks[i]);
    a->res.state = RES_HOST;
}

static void evict_adapter(struct residency_tier *t, struct engine_adapter *a)
{
    residency_drop(t, a);
    a->res.uses /= 2;
    t->evictions++;
}

void residency_evict_weights(struct residency_tier *t, struct evict_queue *weights)
{
    size_t at = offsetof(struct engine_adapter, version);
    evict_adapter(t, (struct engine_adapter *)((char *)evict_version_of(weights) - at));
}

bool residency_evict(struct residency_tier *t)
{
    if (!t->idle.head)
        return false;
    evict_adapter(t, t->idle.head);
    return true;
}

/* ---- measuring ------------------------------------------------------------------------- */

/* Microseconds of the fastest of a few uploads of `n` blocks; below 0: failed. */
static double time_upload(struct residency_tier *t, const int32_t *blocks, int n, const void *src)
{
    double best = -1;
    kn_event *done = NULL;
    lm_status st = kn_event_new(t->dev, &done, NULL);
    int cells = n * t->memory.n_layers;
    cell_offsets(t, blocks, cells);
    for (int i = 0; i < MEASURE_TIMES && st == LM_OK; i++) {
        int64_t t0 = kn_now_us(t->dev);
        st = kn_scatter_cells(t->copy, t->memory.base, t->offsets, cells,
                              (size_t)t->memory.block_bytes, src);
        if (st == LM_OK)
            st = kn_event_record(done, t->copy);
        if (st == LM_OK)
            st = kn_event_sync(done, NULL);
        double us = (double)(kn_now_us(t->dev) - t0);
        best = st != LM_OK ? -1 : best < 0 ? us : LM_MIN(best, us);
    }
    if (done)
        kn_event_free(done);
    return best;
}

lm_status residency_measure(struct residency_tier *t, struct lm_err *err)
{
    const struct kn_pool *m = &t->memory;
    int n = LM_MIN(MEASURE_BLOCKS, t->pool->n_free);
    size_t bytes = (size_t)n * (size_t)m->n_layers * (size_t)m->block_bytes;
    int32_t blocks[MEASURE_BLOCKS];
    void *src = NULL;
    lm_status st = reserve_offsets(t, n * m->n_layers, err);
    if (st == LM_OK)
        st = kn_host_alloc(t->dev, bytes, &src, err);
    if (st != LM_OK)
        return st;
    memset(src, 0, bytes);
    for (int i = 0; i < n; i++)
        blocks[i] = t->pool->free_ids[i];
    double one = time_upload(t, blocks, 1, src), all = time_upload(t, blocks, n, src);
    if (one >= 0 && all >= 0)
        evict_measured_copy(t->evict, one, all, n);
    else
        st = lm_err_set(err, LM_DEVICE, "a trial upload of %zu bytes failed", bytes);
    kn_host_free(t->dev, src);
    return st;
}
