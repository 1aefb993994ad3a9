/* SPDX-License-Identifier: Apache-2.0 */
/*
 * residency.c - see residency.h. Invariants:
 *  1. RES_HOST: no blocks, on no list. RES_LOADING: on `loading`. RES_RESIDENT: on `idle` exactly
 *     if users == 0.
 *  2. idle_blocks is the sum of n_blocks over `idle`.
 *  3. users > 0 only while RESIDENT: sequences are admitted after the upload has passed.
 */
#include "engine/residency.h"

#include <assert.h>
#include <stdlib.h>

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
                         const struct kn_pool *memory, struct lm_err *err)
{
    *t = (struct residency_tier){ .dev = dev, .pool = pool, .memory = *memory };
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
static void cell_offsets(const struct residency_tier *t, const struct engine_adapter *a)
{
    const struct kn_pool *m = &t->memory;
    for (int c = 0; c < a->image.n_cells; c++) {
        int64_t layer = c % m->n_layers, block = a->res.blocks[c / m->n_layers];
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
    cell_offsets(t, a);
    a->res.state = RES_LOADING;
    a->res.users = 0;
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
    a->res.idle_since = t->clock;
}

static void loaded(struct residency_tier *t, struct engine_adapter *a)
{
    list_remove(&t->loading, a);
    t->n_loading--;
    a->res.state = RES_RESIDENT;
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
    if (a->res.users++ == 0) {
        list_remove(&t->idle, a);
        t->idle_blocks -= a->n_blocks;
    }
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
    list_remove(&t->idle, a);
    list_append(&t->idle, a);
    a->res.idle_since = t->clock;
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
    list_remove(&t->idle, a);
    t->idle_blocks -= a->n_blocks;
    t->n_resident--;
    for (int i = a->n_blocks - 1; i >= 0; i--)
        pool_unref(t->pool, a->res.blocks[i]);
    a->res.state = RES_HOST;
}

bool residency_evict(struct residency_tier *t)
{
    if (!t->idle.head)
        return false;
    residency_drop(t, t->idle.head);
    t->evictions++;
    return true;
}
