/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kernels.c - dispatch from the interface to a backend, and the choice of one. No policy.
 */
#include "kernels/backend.h"

#include <string.h>

static const struct kn_backend *const backends[] = {
#ifdef LORAMILL_CUDA
    &kn_backend_cuda,
#endif
    &kn_backend_cpu,            /* always works, so "auto" ends here */
    &kn_backend_sim,            /* by name only */
};

size_t kn_dtype_size(enum kn_dtype t)
{
    return t == KN_F32 ? 4 : t == KN_E4M3 ? 1 : 2;
}

const char *kn_dtype_name(enum kn_dtype t)
{
    static const char *const names[] = { "float32", "float16", "bfloat16", "float8_e4m3" };
    return (unsigned)t < LM_COUNT(names) ? names[t] : "?";
}

static lm_status find_backend(const char *name, const struct kn_backend **out, struct lm_err *err)
{
    for (size_t i = 0; i < LM_COUNT(backends); i++) {
        if (name ? !strcmp(backends[i]->name, name) : backends[i]->probe(NULL) == LM_OK) {
            *out = backends[i];
            return LM_OK;
        }
    }
    if (name && !strcmp(name, "cuda"))
        return lm_err_set(err, LM_UNSUPPORTED,
                          "backend 'cuda': this binary was built without CUDA; rebuild with "
                          "CUDA=1 or use backend 'cpu'");
    return lm_err_set(err, LM_INVALID, "backend '%s' is unknown; use cpu, cuda or sim",
                      name ? name : "");
}

lm_status kn_open(const char *backend, const struct kn_open_params *p, kn_device **dev,
                  struct lm_err *err)
{
    const struct kn_backend *be = NULL;
    lm_status st = find_backend(backend, &be, err);
    if (st == LM_OK)
        st = be->probe(err);
    return st == LM_OK ? be->open(p, dev, err) : st;
}

void kn_close(kn_device *dev)
{
    if (dev)
        dev->be->close(dev);
}

void kn_props(kn_device *dev, struct kn_props *out)
{
    dev->be->props(dev, out);
}

int64_t kn_now_us(kn_device *dev)
{
    return dev->be->now_us ? dev->be->now_us(dev) : lm_now_us();
}

lm_status kn_advance(kn_device *dev, int64_t until_us)
{
    return dev->be->advance ? dev->be->advance(dev, until_us) : LM_UNSUPPORTED;
}

/* ---- memory ---------------------------------------------------------------------------- */

lm_status kn_alloc(kn_device *dev, size_t bytes, void **out, struct lm_err *err)
{
    return dev->be->alloc(dev, bytes, out, err);
}

void kn_free(kn_device *dev, void *p)
{
    if (p)
        dev->be->free(dev, p);
}

lm_status kn_host_alloc(kn_device *dev, size_t bytes, void **out, struct lm_err *err)
{
    return dev->be->host_alloc(dev, bytes, out, err);
}

void kn_host_free(kn_device *dev, void *p)
{
    if (p)
        dev->be->host_free(dev, p);
}

lm_status kn_copy_in(kn_stream *s, void *dst, const void *src_host, size_t bytes)
{
    return s->be->copy_in(s, dst, src_host, bytes);
}

lm_status kn_copy_out(kn_stream *s, void *dst_host, const void *src, size_t bytes)
{
    return s->be->copy_out(s, dst_host, src, bytes);
}

lm_status kn_copy(kn_stream *s, void *dst, const void *src, size_t bytes)
{
    return s->be->copy(s, dst, src, bytes);
}

lm_status kn_zero(kn_stream *s, void *dst, size_t bytes)
{
    return s->be->zero(s, dst, bytes);
}

lm_status kn_scatter_cells(kn_stream *s, void *base, const int64_t *offsets_host, int n,
                           size_t cell_bytes, const void *src_host)
{
    return s->be->scatter_cells(s, base, offsets_host, n, cell_bytes, src_host);
}

lm_status kn_gather_cells(kn_stream *s, void *dst_host, const void *base,
                          const int64_t *offsets_host, int n, size_t cell_bytes)
{
    return s->be->gather_cells(s, dst_host, base, offsets_host, n, cell_bytes);
}

/* ---- streams and events ---------------------------------------------------------------- */

lm_status kn_stream_new(kn_device *dev, kn_stream **out, struct lm_err *err)
{
    return dev->be->stream_new(dev, out, err);
}

void kn_stream_free(kn_stream *s)
{
    if (s)
        s->be->stream_free(s);
}

lm_status kn_stream_sync(kn_stream *s, struct lm_err *err)
{
    return s->be->stream_sync(s, err);
}

lm_status kn_event_new(kn_device *dev, kn_event **out, struct lm_err *err)
{
    return dev->be->event_new(dev, out, err);
}

void kn_event_free(kn_event *e)
{
    if (e)
        e->be->event_free(e);
}

lm_status kn_event_record(kn_event *e, kn_stream *s)
{
    return e->be->event_record(e, s);
}

lm_status kn_event_wait(kn_stream *s, kn_event *e)
{
    return s->be->event_wait(s, e);
}

lm_status kn_event_query(kn_event *e)
{
    return e->be->event_query(e);
}

lm_status kn_event_sync(kn_event *e, struct lm_err *err)
{
    return e->be->event_sync(e, err);
}

int kn_graph_rows(kn_device *dev, int n)
{
    return dev->be->graph_rows ? dev->be->graph_rows(dev, n) : 0;
}

lm_status kn_graph_begin(kn_stream *s)
{
    return s->be->graph_begin ? s->be->graph_begin(s) : LM_UNSUPPORTED;
}

lm_status kn_graph_end(kn_stream *s, const void *key, size_t n)
{
    return s->be->graph_end ? s->be->graph_end(s, key, n) : LM_UNSUPPORTED;
}

lm_status kn_graph_run(kn_stream *s, const void *key, size_t n)
{
    return s->be->graph_run ? s->be->graph_run(s, key, n) : LM_NOT_FOUND;
}

/* ---- tensor parallelism ---------------------------------------------------------------- */

lm_status kn_comm_id(kn_device *dev, uint8_t id[KN_COMM_ID_BYTES], struct lm_err *err)
{
    return dev->be->comm_id(dev, id, err);
}

lm_status kn_comm_new(kn_device *dev, const uint8_t id[KN_COMM_ID_BYTES], int rank, int world,
                      kn_comm **out, struct lm_err *err)
{
    return dev->be->comm_new(dev, id, rank, world, out, err);
}

void kn_comm_free(kn_comm *c)
{
    if (c)
        c->be->comm_free(c);
}

lm_status kn_all_reduce_sum(kn_stream *s, kn_comm *c, void *buf, size_t n, enum kn_dtype t)
{
    return s->be->all_reduce_sum(s, c, buf, n, t);
}

lm_status kn_all_gather(kn_stream *s, kn_comm *c, void *dst, const void *src, size_t n,
                        enum kn_dtype t)
{
    return s->be->all_gather(s, c, dst, src, n, t);
}

/* ---- base weights ---------------------------------------------------------------------- */

lm_status kn_mat_new(kn_device *dev, enum kn_dtype t, int rows, int cols, kn_mat **out,
                     struct lm_err *err)
{
    return dev->be->mat_new(dev, t, rows, cols, out, err);
}

void kn_mat_free(kn_mat *m)
{
    if (m)
        m->be->mat_free(m);
}

lm_status kn_mat_upload(kn_mat *m, int row0, int col0, int rows, int cols, const void *src_host,
                        enum kn_dtype src_t, size_t src_ld, struct lm_err *err)
{
    return m->be->mat_upload(m, row0, col0, rows, cols, src_host, src_t, src_ld, err);
}

lm_status kn_mat_fill(kn_mat *m, uint64_t seed, float scale, struct lm_err *err)
{
    return m->be->mat_fill(m, seed, scale, err);
}

size_t kn_mat_bytes(const kn_mat *m)
{
    return m->be->mat_bytes(m);
}

lm_status kn_mat_save(kn_stream *s, void *dst_host, const kn_mat *m)
{
    return s->be->mat_save(s, dst_host, m);
}

lm_status kn_mat_restore(kn_stream *s, kn_mat *m, const void *src_host)
{
    return s->be->mat_restore(s, m, src_host);
}

lm_status kn_gemm_tune(kn_stream *s, const struct kn_gemm *a, const kn_mat *const *w, int n_w)
{
    return s->be->gemm_tune ? s->be->gemm_tune(s, a, w, n_w) : LM_OK;
}

/* ---- operations ------------------------------------------------------------------------ */

size_t kn_kv_block_bytes(kn_device *dev, enum kn_kv kv, int block_tokens, int kv_heads,
                         int head_dim)
{
    return dev->be->kv_block_bytes(dev, kv, block_tokens, kv_heads, head_dim);
}

size_t kn_sample_workspace(kn_device *dev, int max_rows, int vocab)
{
    return dev->be->sample_workspace(dev, max_rows, vocab);
}

#define X(op, args)                                                                            \
    lm_status kn_op_##op(kn_stream *s, const struct kn_##args *a)                              \
    {                                                                                          \
        return s->be->op(s, a);                                                                \
    }
KN_OPS(X)
#undef X

lm_status kn_op_gate_up(kn_stream *s, const struct kn_gate_up *a)
{
    lm_status st = s->be->gate_up ? s->be->gate_up(s, a) : LM_UNSUPPORTED;
    if (st != LM_UNSUPPORTED)
        return st;
    const struct kn_silu_mul silu = { a->out, a->gemm.y, a->gemm.m, a->gemm.w->rows / 2 };
    st = kn_op_gemm(s, &a->gemm);
    return st == LM_OK ? kn_op_silu_mul(s, &silu) : st;
}
