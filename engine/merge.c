/* SPDX-License-Identifier: Apache-2.0 */
/*
 * merge.c - see merge.h.
 *
 * Why measured: LoRA on a whole batch of one adapter costs little where steps are bound by reading
 * the base weights, and much where launches or a high rank weigh; which it is depends on device,
 * model and load. So steps that only decode are timed before and after, and compared at like
 * numbers of sequences. Contexts grow meanwhile, which makes merged steps look slower than they
 * are: the error is on the safe side.
 *
 * Why an adapter must own the stream first: merging and unmerging read or copy the weights once
 * each, so they pay only if nobody else comes for a while, and the best guess of how long that is,
 * is how long it has been.
 */
#include "engine/merge.h"

#include <stdlib.h>
#include <string.h>

/* A new value weighs this much. */
#define TIMES_WEIGHT 0.2

static const struct merge_limits usual = { .after_us = 2000000, .steps = 16, .min_gain = 0.03 };

/* ---- the judge ------------------------------------------------------------------------- */

static int size_class(int n)
{
    int i = 0;
    while (n > 1 && i < MERGE_SIZES - 1) {
        n >>= 1;
        i++;
    }
    return i;
}

void merge_judge_step(struct merge_judge *j, bool merged, int n, int64_t us)
{
    struct merge_times *t = merged ? &j->merged : &j->plain;
    int i = size_class(n);
    t->us[i] = t->n[i] ? t->us[i] + TIMES_WEIGHT * ((double)us - t->us[i]) : (double)us;
    t->n[i]++;
}

/* The share of a step's time that merging has won, over the sizes that were seen both ways; false:
 * too few were. */
static bool measured_gain(const struct merge_judge *j, double *gain)
{
    double plain = 0, merged = 0;
    for (int i = 0; i < MERGE_SIZES; i++) {
        if (j->plain.n[i] < j->lim.steps || j->merged.n[i] < j->lim.steps)
            continue;
        plain += j->plain.us[i];
        merged += j->merged.us[i];
    }
    *gain = plain > 0 ? 1 - merged / plain : 0;
    return plain > 0;
}

static bool has_measured_plain(const struct merge_judge *j)
{
    for (int i = 0; i < MERGE_SIZES; i++)
        if (j->plain.n[i] >= j->lim.steps)
            return true;
    return false;
}

static void watch(struct merge_judge *j, uint64_t owner, int64_t now_us)
{
    j->state = MERGE_OFF;
    j->owner = owner;
    j->since_us = now_us;
    memset(&j->plain, 0, sizeof j->plain);
    memset(&j->merged, 0, sizeof j->merged);
}

enum merge_act merge_judge(struct merge_judge *j, uint64_t sole, bool foreign, int64_t now_us)
{
    double gain;
    if (j->state == MERGE_OFF) {
        if (sole != j->owner)
            watch(j, sole, now_us);
        if (!sole || sole == j->rejected || now_us - j->since_us < j->lim.after_us ||
            !has_measured_plain(j))
            return MERGE_STAY;
        j->state = MERGE_TRIAL;
        return MERGE_DO;
    }
    if (foreign) {
        watch(j, sole, now_us);
        return MERGE_UNDO;
    }
    if (j->state == MERGE_TRIAL && measured_gain(j, &gain)) {
        if (gain < j->lim.min_gain) {
            j->rejected = j->owner;
            watch(j, sole, now_us);
            return MERGE_UNDO;
        }
        j->state = MERGE_ON;
    }
    return MERGE_STAY;
}

/* ---- the weights ----------------------------------------------------------------------- */

enum { KEPT_QKV, KEPT_O, KEPT_GATE_UP, KEPT_DOWN, KEPT };

static kn_mat *kept_mat(const struct merge *m, int i)
{
    const struct layer_weights *w = &m->weights->layer[i / KEPT];
    kn_mat *const mats[KEPT] = { w->qkv, w->o, w->gate_up, w->down };
    return mats[i % KEPT];
}

static lm_status keep_all(struct merge *m, struct lm_err *err)
{
    lm_status st = LM_OK;
    for (int i = 0; i < m->weights->n_layers * KEPT && st == LM_OK; i++) {
        const kn_mat *w = kept_mat(m, i);
        st = kn_host_alloc(m->dev, kn_mat_bytes(w), &m->kept[i], err);
        if (st != LM_OK)
            return lm_err_prefix(err, "a copy of the base weights (policy.merge)");
        st = kn_mat_save(m->side, m->kept[i], w);
    }
    return st == LM_OK ? kn_stream_sync(m->side, err)
                       : lm_err_set(err, st, "the base weights could not be copied (policy.merge)");
}

static lm_status alloc_table(struct merge *m, int pool_blocks, struct lm_err *err)
{
    size_t bytes = (size_t)pool_blocks * sizeof *m->table;
    void *host = NULL, *device = NULL;
    lm_status st = kn_host_alloc(m->dev, bytes, &host, err);
    if (st == LM_OK)
        st = kn_alloc(m->dev, bytes, &device, err);
    if (st == LM_OK)
        st = kn_event_new(m->dev, &m->table_read, err);
    if (st == LM_OK)
        st = kn_event_new(m->dev, &m->before, err);
    if (st == LM_OK)
        st = kn_event_new(m->dev, &m->after, err);
    m->table_host = host;
    m->table = device;
    return st;
}

lm_status merge_init(struct merge *m, const struct model_config *model, const struct weights *w,
                     kn_device *dev, int pool_blocks, struct lm_err *err)
{
    *m = (struct merge){ .model = model, .weights = w, .dev = dev, .judge.lim = usual };
    m->kept = lm_calloc((size_t)w->n_layers * KEPT, sizeof *m->kept);
    lm_status st = m->kept ? kn_stream_new(dev, &m->side, err)
                           : lm_err_set(err, LM_NOMEM, "no memory to merge adapters");
    if (st == LM_OK)
        st = alloc_table(m, pool_blocks, err);
    if (st == LM_OK)
        st = keep_all(m, err);
    if (st != LM_OK)
        merge_release(m);
    return st;
}

void merge_release(struct merge *m)
{
    if (!m->dev)
        return;
    for (int i = 0; m->kept && i < m->weights->n_layers * KEPT; i++)
        kn_host_free(m->dev, m->kept[i]);
    kn_event *const events[] = { m->table_read, m->before, m->after };
    for (size_t i = 0; i < LM_COUNT(events); i++)
        if (events[i])
            kn_event_free(events[i]);
    if (m->side)
        kn_stream_free(m->side);
    kn_host_free(m->dev, m->table_host);
    kn_free(m->dev, m->table);
    free(m->kept);
    *m = (struct merge){ 0 };
}

/* Where a module lies in its layer's weights. */
static struct kn_lora_merge module_place(const struct merge *m, int layer, enum kn_module module)
{
    const struct model_config *c = m->model;
    const struct layer_weights *w = &m->weights->layer[layer];
    int q = c->q_heads * c->head_dim, kv = c->kv_heads * c->head_dim, h = c->hidden, f = c->ffn;
    const struct kn_lora_merge place[KN_MODULES] = {
        [KN_Q] = { w->qkv, 0, h, q }, [KN_K] = { w->qkv, q, h, kv },
        [KN_V] = { w->qkv, q + kv, h, kv }, [KN_O] = { w->o, 0, q, h },
        [KN_GATE] = { w->gate_up, 0, h, f }, [KN_UP] = { w->gate_up, f, h, f },
        [KN_DOWN] = { w->down, 0, f, h },
    };
    struct kn_lora_merge a = place[module];
    a.module = module;
    a.layer = layer;
    return a;
}

/* The side stream takes over where the compute stream is, and gives back. */
static lm_status take_over(struct merge *m, kn_stream *compute)
{
    lm_status st = kn_event_record(m->before, compute);
    return st == LM_OK ? kn_event_wait(m->side, m->before) : st;
}

static lm_status give_back(struct merge *m, kn_stream *compute)
{
    lm_status st = kn_event_record(m->after, m->side);
    return st == LM_OK ? kn_event_wait(compute, m->after) : st;
}

/* The table of the merge before was read long ago; to be sure, the event is waited for. */
static lm_status upload_table(struct merge *m, const struct engine_adapter *a)
{
    size_t bytes = (size_t)a->n_blocks * sizeof *m->table;
    lm_status st = m->merges ? kn_event_sync(m->table_read, NULL) : LM_OK;
    if (st != LM_OK)
        return st;
    memcpy(m->table_host, a->res.blocks, bytes);
    st = kn_copy_in(m->side, m->table, m->table_host, bytes);
    return st == LM_OK ? kn_event_record(m->table_read, m->side) : st;
}

static lm_status merge_all(struct merge *m, const struct kn_pool *pool,
                           const struct engine_adapter *a)
{
    lm_status st = LM_OK;
    for (int i = 0; i < m->weights->n_layers * KN_MODULES && st == LM_OK; i++) {
        enum kn_module module = (enum kn_module)(i % KN_MODULES);
        if (a->image.module_rank[module] == 0)
            continue;
        struct kn_lora_merge op = module_place(m, i / KN_MODULES, module);
        op.pool = *pool;
        op.block_ids = m->table;
        st = kn_op_lora_merge(m->side, &op);
    }
    return st;
}

lm_status merge_do(struct merge *m, kn_stream *compute, const struct kn_pool *pool,
                   const struct engine_adapter *a)
{
    lm_status st = take_over(m, compute);
    if (st == LM_OK)
        st = upload_table(m, a);
    m->serial = a->version.serial;
    m->merges++;
    if (st == LM_OK)
        st = merge_all(m, pool, a);
    return st == LM_OK ? give_back(m, compute) : st;
}

lm_status merge_undo(struct merge *m, kn_stream *compute)
{
    lm_status st = take_over(m, compute);
    m->serial = 0;
    for (int i = 0; i < m->weights->n_layers * KEPT && st == LM_OK; i++)
        st = kn_mat_restore(m->side, kept_mat(m, i), m->kept[i]);
    return st == LM_OK ? give_back(m, compute) : st;
}
