/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cpu.c - the CPU backend: device, memory, streams and events.
 *
 * A stream is in-order because its operations run to completion inside the call. Hence copies are
 * memcpy, an event has passed once it was recorded, and waiting never waits. Several streams of
 * one device may run at once on different host threads: they share nothing but the pool, which
 * serves one of them at a time (pool.c, invariant 2).
 */
#include <cblas.h>
#include "kernels/cpu/cpu_int.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

lm_status cpu_refuse(const char *op, const char *why)
{
    lm_log(LM_ERROR, "kernels", "%s: %s", op, why);
    return LM_INVALID;
}

/* ---- device ---------------------------------------------------------------------------- */

static lm_status cpu_probe(struct lm_err *err)
{
    (void)err;
    return LM_OK;
}

static lm_status cpu_open(const struct kn_open_params *p, kn_device **out, struct lm_err *err)
{
    int threads = p ? p->threads : 0;
    if (p && p->index != 0)
        return lm_err_set(err, LM_NOT_FOUND, "backend 'cpu' has one device, not number %d; use 0",
                          p->index);
    if (threads < 0 || threads > CPU_MAX_THREADS)
        return lm_err_set(err, LM_INVALID, "threads=%d: use 0 (all cores) to %d", threads,
                          CPU_MAX_THREADS);
    struct cpu_device *d = lm_calloc(1, sizeof *d);
    if (!d)
        return lm_err_set(err, LM_NOMEM, "out of memory opening the CPU backend");
    d->base.be = &kn_backend_cpu;
    d->v = cpu_vec_pick();
    openblas_set_num_threads(1);        /* the cores are shared out by our own pool */
    d->threads = threads ? threads : cpu_sys_threads();
    lm_status st = cpu_pool_new(d->threads, &d->pool, err);
    if (st != LM_OK) {
        free(d);
        return st;
    }
    *out = &d->base;
    return LM_OK;
}

static void cpu_close(kn_device *dev)
{
    struct cpu_device *d = (struct cpu_device *)dev;
    cpu_pool_free(d->pool);
    free(d);
}

static void cpu_props(kn_device *dev, struct kn_props *out)
{
    struct cpu_device *d = (struct cpu_device *)dev;
    *out = (struct kn_props){ .act = KN_F32, .kv = KN_F32, .lora = KN_F32,
                              .threads = d->threads, .in_call = true };
    snprintf(out->name, sizeof out->name, "cpu (%s, %d thread%s)", d->v->name, d->threads,
             d->threads == 1 ? "" : "s");
    snprintf(out->backend, sizeof out->backend, "cpu");
    cpu_sys_memory(&out->mem_total, &out->mem_free);
}

/* ---- memory ---------------------------------------------------------------------------- */

static lm_status cpu_alloc(kn_device *dev, size_t bytes, void **out, struct lm_err *err)
{
    (void)dev;
    *out = cpu_aligned_alloc(bytes);
    return *out ? LM_OK : lm_err_set(err, LM_NOMEM, "cannot allocate %zu bytes", bytes);
}

static void cpu_free(kn_device *dev, void *p)
{
    (void)dev;
    free(p);
}

static lm_status cpu_copy(kn_stream *s, void *dst, const void *src, size_t bytes)
{
    (void)s;
    if (bytes && (!dst || !src))
        return cpu_refuse("copy", "null pointer");
    if (bytes)
        memmove(dst, src, bytes);
    return LM_OK;
}

static lm_status cpu_zero(kn_stream *s, void *dst, size_t bytes)
{
    (void)s;
    if (bytes && !dst)
        return cpu_refuse("zero", "null pointer");
    if (bytes)
        memset(dst, 0, bytes);
    return LM_OK;
}

static lm_status cpu_scatter_cells(kn_stream *s, void *base, const int64_t *offsets, int n,
                                   size_t cell_bytes, const void *src)
{
    (void)s;
    if (n < 0 || (n && (!base || !offsets || !src)))
        return cpu_refuse("scatter_cells", "null pointer or negative count");
    for (int i = 0; i < n; i++)
        memcpy((char *)base + offsets[i], (const char *)src + (size_t)i * cell_bytes, cell_bytes);
    return LM_OK;
}

static lm_status cpu_gather_cells(kn_stream *s, void *dst, const void *base,
                                  const int64_t *offsets, int n, size_t cell_bytes)
{
    (void)s;
    if (n < 0 || (n && (!base || !offsets || !dst)))
        return cpu_refuse("gather_cells", "null pointer or negative count");
    for (int i = 0; i < n; i++)
        memcpy((char *)dst + (size_t)i * cell_bytes, (const char *)base + offsets[i], cell_bytes);
    return LM_OK;
}

/* ---- streams and events ---------------------------------------------------------------- */

static void cpu_stream_free(kn_stream *s)
{
    free(cpu_stream_of(s)->partial);
    free(cpu_stream_of(s)->gemm_scratch);
    free(s);
}

static lm_status cpu_stream_new(kn_device *dev, kn_stream **out, struct lm_err *err)
{
    struct cpu_device *d = (struct cpu_device *)dev;
    struct cpu_stream *s = lm_calloc(1, sizeof *s);
    if (!s)
        return lm_err_set(err, LM_NOMEM, "out of memory for a stream");
    size_t floats = (size_t)d->threads * sizeof(float);
    s->partial = cpu_aligned_alloc(floats * cpu_split_floats());
    s->gemm_scratch = cpu_aligned_alloc(floats * cpu_gemm_scratch_floats());
    if (!s->partial || !s->gemm_scratch) {
        cpu_stream_free(&s->base);
        return lm_err_set(err, LM_NOMEM, "out of memory for a stream");
    }
    s->base.be = &kn_backend_cpu;
    s->dev = d;
    *out = &s->base;
    return LM_OK;
}

static lm_status cpu_stream_sync(kn_stream *s, struct lm_err *err)
{
    (void)s, (void)err;
    return LM_OK;
}

static lm_status cpu_event_new(kn_device *dev, kn_event **out, struct lm_err *err)
{
    (void)dev;
    struct cpu_event *e = lm_calloc(1, sizeof *e);
    if (!e)
        return lm_err_set(err, LM_NOMEM, "out of memory for an event");
    e->base.be = &kn_backend_cpu;
    *out = &e->base;
    return LM_OK;
}

static void cpu_event_free(kn_event *e)
{
    free(e);
}

static atomic_int late_events;

void kn_cpu_force_late_events(int queries)
{
    atomic_store(&late_events, queries);
}

static lm_status cpu_event_record(kn_event *e, kn_stream *s)
{
    (void)s;
    ((struct cpu_event *)e)->late = atomic_load_explicit(&late_events, memory_order_relaxed);
    return LM_OK;
}

static lm_status cpu_event_wait(kn_stream *s, kn_event *e)
{
    (void)e, (void)s;
    return LM_OK;
}

static lm_status cpu_event_query(kn_event *e)
{
    struct cpu_event *ce = (struct cpu_event *)e;
    if (ce->late == 0)
        return LM_OK;
    ce->late--;
    return LM_BUSY;
}

static lm_status cpu_event_sync(kn_event *e, struct lm_err *err)
{
    (void)err;
    ((struct cpu_event *)e)->late = 0;
    return LM_OK;
}

const struct kn_backend kn_backend_cpu = {
    .name = "cpu",
    .probe = cpu_probe,
    .open = cpu_open,
    .close = cpu_close,
    .props = cpu_props,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .host_alloc = cpu_alloc,
    .host_free = cpu_free,
    .copy_in = cpu_copy,
    .copy_out = cpu_copy,
    .copy = cpu_copy,
    .zero = cpu_zero,
    .scatter_cells = cpu_scatter_cells,
    .gather_cells = cpu_gather_cells,
    .stream_new = cpu_stream_new,
    .stream_free = cpu_stream_free,
    .stream_sync = cpu_stream_sync,
    .event_new = cpu_event_new,
    .event_free = cpu_event_free,
    .event_record = cpu_event_record,
    .event_wait = cpu_event_wait,
    .event_query = cpu_event_query,
    .event_sync = cpu_event_sync,
    .comm_id = cpu_comm_id,
    .comm_new = cpu_comm_new,
    .comm_free = cpu_comm_free,
    .all_reduce_sum = cpu_all_reduce_sum,
    .all_gather = cpu_all_gather,
    .mat_new = cpu_mat_new,
    .mat_free = cpu_mat_free,
    .mat_upload = cpu_mat_upload,
    .mat_fill = cpu_mat_fill,
    .mat_bytes = cpu_mat_bytes,
    .mat_save = cpu_mat_save,
    .mat_restore = cpu_mat_restore,
    .kv_block_bytes = cpu_kv_block_bytes,
    .sample_workspace = cpu_sample_workspace,
#define X(op, args) .op = cpu_op_##op,
    KN_OPS(X)
#undef X
};
