/* SPDX-License-Identifier: Apache-2.0 */
/*
 * backend.h - what a backend implements; seen only inside kernels/.
 *
 * Every object begins with a pointer to its backend's table, so kernels.c dispatches without
 * knowing any backend, and several backends live in one process (CPU as oracle beside CUDA).
 */
#ifndef LORAMILL_KERNELS_BACKEND_H
#define LORAMILL_KERNELS_BACKEND_H

#include "kernels/kernels.h"

struct kn_backend {
    const char *name;
    /* LM_OK when a device of this kind works here; else the reason, for "auto" and for people. */
    lm_status (*probe)(struct lm_err *err);
    lm_status (*open)(const struct kn_open_params *p, kn_device **dev, struct lm_err *err);
    void (*close)(kn_device *dev);
    void (*props)(kn_device *dev, struct kn_props *out);
    /* Both NULL where time is the host's. */
    int64_t (*now_us)(kn_device *dev);
    lm_status (*advance)(kn_device *dev, int64_t until_us);

    lm_status (*alloc)(kn_device *dev, size_t bytes, void **out, struct lm_err *err);
    void (*free)(kn_device *dev, void *p);
    lm_status (*host_alloc)(kn_device *dev, size_t bytes, void **out, struct lm_err *err);
    void (*host_free)(kn_device *dev, void *p);
    lm_status (*copy_in)(kn_stream *s, void *dst, const void *src, size_t bytes);
    lm_status (*copy_out)(kn_stream *s, void *dst, const void *src, size_t bytes);
    lm_status (*copy)(kn_stream *s, void *dst, const void *src, size_t bytes);
    lm_status (*zero)(kn_stream *s, void *dst, size_t bytes);
    lm_status (*scatter_cells)(kn_stream *s, void *base, const int64_t *offsets, int n,
                               size_t cell_bytes, const void *src);
    lm_status (*gather_cells)(kn_stream *s, void *dst, const void *base, const int64_t *offsets,
                              int n, size_t cell_bytes);

    lm_status (*stream_new)(kn_device *dev, kn_stream **out, struct lm_err *err);
    void (*stream_free)(kn_stream *s);
    lm_status (*stream_sync)(kn_stream *s, struct lm_err *err);
    lm_status (*event_new)(kn_device *dev, kn_event **out, struct lm_err *err);
    void (*event_free)(kn_event *e);
    lm_status (*event_record)(kn_event *e, kn_stream *s);
    lm_status (*event_wait)(kn_stream *s, kn_event *e);
    lm_status (*event_query)(kn_event *e);
    lm_status (*event_sync)(kn_event *e, struct lm_err *err);
    /* All NULL where recording wins nothing. */
    int (*graph_rows)(kn_device *dev, int n);
    lm_status (*graph_begin)(kn_stream *s);
    lm_status (*graph_end)(kn_stream *s, const void *key, size_t n);
    lm_status (*graph_run)(kn_stream *s, const void *key, size_t n);

    lm_status (*comm_id)(kn_device *dev, uint8_t id[KN_COMM_ID_BYTES], struct lm_err *err);
    lm_status (*comm_new)(kn_device *dev, const uint8_t id[KN_COMM_ID_BYTES], int rank, int world,
                          kn_comm **out, struct lm_err *err);
    void (*comm_free)(kn_comm *c);
    lm_status (*all_reduce_sum)(kn_stream *s, kn_comm *c, void *buf, size_t n, enum kn_dtype t);
    lm_status (*all_gather)(kn_stream *s, kn_comm *c, void *dst, const void *src, size_t n,
                            enum kn_dtype t);

    lm_status (*mat_new)(kn_device *dev, enum kn_dtype t, int rows, int cols, kn_mat **out,
                         struct lm_err *err);
    void (*mat_free)(kn_mat *m);
    lm_status (*mat_upload)(kn_mat *m, int row0, int col0, int rows, int cols, const void *src,
                            enum kn_dtype src_t, size_t src_ld, struct lm_err *err);
    lm_status (*mat_fill)(kn_mat *m, uint64_t seed, float scale, struct lm_err *err);
    size_t (*mat_bytes)(const kn_mat *m);
    lm_status (*mat_save)(kn_stream *s, void *dst, const kn_mat *m);
    lm_status (*mat_restore)(kn_stream *s, kn_mat *m, const void *src);

    lm_status (*gemm_tune)(kn_stream *s, const struct kn_gemm *a, const kn_mat *const *w,
                           int n_w);    /* NULL: no choice */

    size_t (*kv_block_bytes)(kn_device *dev, enum kn_kv kv, int block_tokens, int kv_heads,
                             int head_dim);
    size_t (*sample_workspace)(kn_device *dev, int max_rows, int vocab);

#define X(op, args) lm_status (*op)(kn_stream *s, const struct kn_##args *a);
    KN_OPS(X)
    KN_FUSED_OPS(X)             /* NULL, or LM_UNSUPPORTED: as two operations */
#undef X
};

/* Each backend's objects embed these as their first member. */
struct kn_device { const struct kn_backend *be; };
struct kn_stream { const struct kn_backend *be; };
struct kn_event { const struct kn_backend *be; };
struct kn_mat { const struct kn_backend *be; enum kn_dtype dtype; int rows, cols; };
struct kn_comm { const struct kn_backend *be; };

extern const struct kn_backend kn_backend_cpu;
extern const struct kn_backend kn_backend_sim;
#ifdef LORAMILL_CUDA
extern const struct kn_backend kn_backend_cuda;
#endif

#endif
