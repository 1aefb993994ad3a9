/* SPDX-License-Identifier: Apache-2.0 */
/*
 * device.c - devices, memory, copies, streams and events on CUDA's runtime.
 *
 * A stream owns what its operations need beyond their arguments (scratch, cuBLASLt's workspace and
 * plans), so operations allocate nothing. Streams are non-blocking: the legacy default stream
 * synchronises with nobody.
 *
 * Failure: the first CUDA call that fails marks the device (cuda_failed), and every later call on
 * it says LM_DEVICE. A kernel that met nonsense leaves its reason in a mapped word, which waits and
 * queries look at: by then the step's results must not be committed.
 *
 * Any thread may call: each entry point makes its device the thread's current one first, which
 * costs some nanoseconds when it is already.
 */
#include "kernels/cuda/cuda_int.h"

#include <cublasLt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- errors ---------------------------------------------------------------------------- */

lm_status cuda_refuse(const char *op, const char *why)
{
    lm_log(LM_ERROR, "kernels", "%s: %s", op, why);
    return LM_INVALID;
}

lm_status cuda_failed(struct cuda_device *d, const char *what, cudaError_t e)
{
    if (!__atomic_exchange_n(&d->failed, 1, __ATOMIC_ACQ_REL))
        lm_log(LM_ERROR, "kernels", "CUDA device %d: %s: %s (%s)", d->index, what,
               cudaGetErrorName(e), cudaGetErrorString(e));
    return LM_DEVICE;
}

lm_status cuda_check(struct cuda_device *d, const char *what, cudaError_t e)
{
    if (e != cudaSuccess)
        return cuda_failed(d, what, e);
    return __atomic_load_n(&d->failed, __ATOMIC_RELAXED) ? LM_DEVICE : LM_OK;
}

/* The same with a message for the caller's error. */
static lm_status check_err(struct cuda_device *d, const char *what, cudaError_t e,
                           struct lm_err *err)
{
    if (cuda_check(d, what, e) == LM_OK)
        return LM_OK;
    return lm_err_set(err, LM_DEVICE, "CUDA device %d: %s: %s", d->index, what,
                      e == cudaSuccess ? "the device failed before" : cudaGetErrorString(e));
}

static const char *fault_text(int32_t fault)
{
    static const char *const text[] = {
        [CUDA_FAULT_TOKEN] = "a token id outside of the vocabulary reached the embedding",
        [CUDA_FAULT_ADAPTER] = "an adapter's cells in the pool are damaged",
        [CUDA_FAULT_BLOCK] = "a block id or slot lies outside of the pool",
        [CUDA_FAULT_SAMPLE] = "sampling parameters make no sense",
    };
    return fault > 0 && (size_t)fault < LM_COUNT(text) ? text[fault] : "an unknown fault";
}

/* LM_DEVICE once any kernel has reported something. */
static lm_status check_fault(struct cuda_device *d, struct lm_err *err)
{
    int32_t fault = *(volatile int32_t *)d->fault_host;
    if (fault == CUDA_FAULT_NONE)
        return LM_OK;
    if (!__atomic_exchange_n(&d->failed, 1, __ATOMIC_ACQ_REL))
        lm_log(LM_ERROR, "kernels", "CUDA device %d: %s", d->index, fault_text(fault));
    return lm_err_set(err, LM_DEVICE, "CUDA device %d: %s", d->index, fault_text(fault));
}

/* ---- device ---------------------------------------------------------------------------- */

static lm_status cuda_probe(struct lm_err *err)
{
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    cudaGetLastError();         /* the runtime keeps it otherwise */
    if (e != cudaSuccess)
        return lm_err_set(err, LM_UNSUPPORTED, "no usable CUDA device: %s", cudaGetErrorString(e));
    if (n == 0)
        return lm_err_set(err, LM_UNSUPPORTED, "no CUDA device on this machine");
    return LM_OK;
}

static lm_status read_properties(struct cuda_device *d, struct lm_err *err)
{
    struct cudaDeviceProp p;
    lm_status st = check_err(d, "cannot be opened", cudaSetDevice(d->index), err);
    if (st == LM_OK)
        st = check_err(d, "reading its properties", cudaGetDeviceProperties(&p, d->index), err);
    if (st != LM_OK)
        return st;
    d->cc = p.major * 10 + p.minor;
    d->sms = p.multiProcessorCount;
    d->smem_block = p.sharedMemPerBlockOptin;
    d->l2_bytes = (size_t)p.l2CacheSize;
    snprintf(d->name, sizeof d->name, "%.*s", (int)sizeof d->name - 1, p.name);
    if (d->cc < 80)
        return lm_err_set(err, LM_UNSUPPORTED,
                          "CUDA device %d (%s) has compute capability %d.%d; 8.0 is the oldest",
                          d->index, d->name, p.major, p.minor);
    return LM_OK;
}

static lm_status make_fault_word(struct cuda_device *d, struct lm_err *err)
{
    void *host = NULL, *dev = NULL;
    cudaError_t e = cudaHostAlloc(&host, sizeof(int32_t), cudaHostAllocMapped);
    if (e == cudaSuccess) {
        memset(host, 0, sizeof(int32_t));
        d->fault_host = host;
        e = cudaHostGetDevicePointer(&dev, host, 0);
        d->fault = dev;
    }
    return check_err(d, "allocating mapped memory", e, err);
}

static void cuda_close(kn_device *dev)
{
    struct cuda_device *d = cuda_device_of(dev);
    cudaSetDevice(d->index);
    cuda_staging_free(d);
    cuda_blas_free(d);
    if (d->fault_host)
        cudaFreeHost(d->fault_host);
    free(d);
}

static lm_status cuda_open(const struct kn_open_params *p, kn_device **out, struct lm_err *err)
{
    int n = 0, index = p ? p->index : 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || index < 0 || index >= n)
        return lm_err_set(err, LM_NOT_FOUND, "CUDA device %d: this machine has %d; use 0 to %d",
                          index, n, n - 1);
    struct cuda_device *d = lm_calloc(1, sizeof *d);
    if (!d)
        return lm_err_set(err, LM_NOMEM, "out of memory opening CUDA device %d", index);
    d->base.be = &kn_backend_cuda;
    d->index = index;
    lm_status st = read_properties(d, err);
    if (st == LM_OK)
        st = make_fault_word(d, err);
    if (st == LM_OK)
        st = check_err(d, "preparing its kernels", cuda_attention_init(d), err);
    if (st == LM_OK)
        st = check_err(d, "preparing its kernels", cuda_lora_init(d), err);
    if (st == LM_OK)
        st = check_err(d, "preparing its kernels", cuda_gemm_init(d), err);
    cuda_tensor_map_init(d);
    if (st == LM_OK)
        st = cuda_blas_new(d, err);
    if (st == LM_OK)
        st = cuda_staging_new(d, err);
    if (st != LM_OK) {
        cuda_close(&d->base);
        return st;
    }
    *out = &d->base;
    return LM_OK;
}

static void cuda_props(kn_device *dev, struct kn_props *out)
{
    struct cuda_device *d = cuda_device_of(dev);
    *out = (struct kn_props){ .act = KN_BF16, .kv = KN_BF16, .lora = KN_BF16 };
    snprintf(out->name, sizeof out->name, "%s (cuda, sm_%d, %d SMs)", d->name, d->cc, d->sms);
    snprintf(out->backend, sizeof out->backend, "cuda");
    cudaSetDevice(d->index);
    if (cudaMemGetInfo(&out->mem_free, &out->mem_total) != cudaSuccess)
        out->mem_free = out->mem_total = 0;
}

/* ---- memory ---------------------------------------------------------------------------- */

/* Running out is the caller's business, not a failure of the device. */
static lm_status alloc_result(struct cuda_device *d, cudaError_t e, const char *kind,
                              size_t bytes, struct lm_err *err)
{
    if (e != cudaErrorMemoryAllocation)
        return check_err(d, kind, e, err);
    cudaGetLastError();
    return lm_err_set(err, LM_NOMEM, "CUDA device %d: cannot allocate %zu bytes of %s", d->index,
                      bytes, kind);
}

static lm_status cuda_alloc(kn_device *dev, size_t bytes, void **out, struct lm_err *err)
{
    struct cuda_device *d = cuda_device_of(dev);
    *out = NULL;
    cudaSetDevice(d->index);
    return alloc_result(d, cudaMalloc(out, LM_MAX(bytes, 1)), "device memory", bytes, err);
}

static void cuda_free(kn_device *dev, void *p)
{
    cudaSetDevice(cuda_device_of(dev)->index);
    cudaFree(p);
}

static lm_status cuda_host_alloc(kn_device *dev, size_t bytes, void **out, struct lm_err *err)
{
    struct cuda_device *d = cuda_device_of(dev);
    *out = NULL;
    cudaSetDevice(d->index);
    return alloc_result(d, cudaHostAlloc(out, LM_MAX(bytes, 1), cudaHostAllocPortable),
                        "pinned memory", bytes, err);
}

static void cuda_host_free(kn_device *dev, void *p)
{
    cudaSetDevice(cuda_device_of(dev)->index);
    cudaFreeHost(p);
}

static lm_status copy_async(kn_stream *s, const char *op, void *dst, const void *src, size_t bytes,
                            enum cudaMemcpyKind kind)
{
    struct cuda_stream *st = cuda_stream_of(s);
    if (!bytes)
        return LM_OK;
    if (!dst || !src)
        return cuda_refuse(op, "null pointer");
    lm_status rc = cuda_copy_small(st, op, dst, src, bytes);
    if (rc == LM_OK)
        st->copied = kind != cudaMemcpyDeviceToHost;
    if (rc != LM_UNSUPPORTED)
        return rc;
    return cuda_check(st->dev, op, cudaMemcpyAsync(dst, src, bytes, kind, st->s));
}

static lm_status cuda_copy_in(kn_stream *s, void *dst, const void *src, size_t bytes)
{
    return copy_async(s, "copy_in", dst, src, bytes, cudaMemcpyHostToDevice);
}

static lm_status cuda_copy_out(kn_stream *s, void *dst, const void *src, size_t bytes)
{
    return copy_async(s, "copy_out", dst, src, bytes, cudaMemcpyDeviceToHost);
}

static lm_status cuda_copy(kn_stream *s, void *dst, const void *src, size_t bytes)
{
    return copy_async(s, "copy", dst, src, bytes, cudaMemcpyDeviceToDevice);
}

static lm_status cuda_zero(kn_stream *s, void *dst, size_t bytes)
{
    struct cuda_stream *st = cuda_stream_of(s);
    if (!bytes)
        return LM_OK;
    if (!dst)
        return cuda_refuse("zero", "null pointer");
    return cuda_check(st->dev, "zero", cudaMemsetAsync(dst, 0, bytes, st->s));
}

/* ---- cells ----------------------------------------------------------------------------- */

#define CELLS_A_BATCH 256

/* One batch of the copy engine: it takes no SM from the step that runs beside it, and the arrays
 * of pointers are read inside the call. */
static lm_status copy_cells(struct cuda_stream *st, const char *op, void *const *dst,
                            void *const *src, int n, size_t bytes)
{
    size_t sizes[CELLS_A_BATCH], first = 0;
    for (int i = 0; i < n; i++)
        sizes[i] = bytes;
    struct cudaMemcpyAttributes attr = { .srcAccessOrder = cudaMemcpySrcAccessOrderStream };
    return cuda_check(st->dev, op,
                      cudaMemcpyBatchAsync(dst, (const void *const *)src, sizes,
                                           (size_t)n, &attr, &first, 1, st->s));
}

static lm_status cuda_scatter_cells(kn_stream *s, void *base, const int64_t *offsets, int n,
                                    size_t cell_bytes, const void *src)
{
    void *to[CELLS_A_BATCH], *from[CELLS_A_BATCH];
    if (n < 0 || (n && (!base || !offsets || !src)))
        return cuda_refuse("scatter_cells", "null pointer or negative count");
    lm_status st = LM_OK;
    for (int i0 = 0; i0 < n && st == LM_OK && cell_bytes; i0 += CELLS_A_BATCH) {
        int k = LM_MIN(CELLS_A_BATCH, n - i0);
        for (int i = 0; i < k; i++) {
            to[i] = (char *)base + offsets[i0 + i];
            from[i] = (char *)(uintptr_t)src + (size_t)(i0 + i) * cell_bytes;
        }
        st = copy_cells(cuda_stream_of(s), "scatter_cells", to, from, k, cell_bytes);
    }
    return st;
}

static lm_status cuda_gather_cells(kn_stream *s, void *dst, const void *base,
                                   const int64_t *offsets, int n, size_t cell_bytes)
{
    void *to[CELLS_A_BATCH], *from[CELLS_A_BATCH];
    if (n < 0 || (n && (!base || !offsets || !dst)))
        return cuda_refuse("gather_cells", "null pointer or negative count");
    lm_status st = LM_OK;
    for (int i0 = 0; i0 < n && st == LM_OK && cell_bytes; i0 += CELLS_A_BATCH) {
        int k = LM_MIN(CELLS_A_BATCH, n - i0);
        for (int i = 0; i < k; i++) {
            to[i] = (char *)dst + (size_t)(i0 + i) * cell_bytes;
            from[i] = (char *)(uintptr_t)base + offsets[i0 + i];
        }
        st = copy_cells(cuda_stream_of(s), "gather_cells", to, from, k, cell_bytes);
    }
    return st;
}

/* ---- streams --------------------------------------------------------------------------- */

static void cuda_stream_free(kn_stream *s)
{
    struct cuda_stream *st = cuda_stream_of(s);
    cudaSetDevice(st->dev->index);
    if (st->s) {
        cudaStreamSynchronize(st->s);
        cudaStreamDestroy(st->s);
    }
    cudaFree(st->scratch);
    cudaFree(st->gemm_ws);
    cudaFree(st->wide);
    cuda_plans_free(st->plans);
    cuda_graphs_free(st->graphs);
    free(st);
}

static lm_status cuda_stream_new(kn_device *dev, kn_stream **out, struct lm_err *err)
{
    struct cuda_device *d = cuda_device_of(dev);
    struct cuda_stream *st = lm_calloc(1, sizeof *st);
    if (!st)
        return lm_err_set(err, LM_NOMEM, "out of memory for a stream");
    st->base.be = &kn_backend_cuda;
    st->dev = d;
    st->plans = cuda_plans_new();
    st->graphs = cuda_graphs_new();
    cudaSetDevice(d->index);
    lm_status rc = st->plans && st->graphs
                       ? LM_OK : lm_err_set(err, LM_NOMEM, "out of memory for a stream");
    if (rc == LM_OK)
        rc = check_err(d, "making a stream",
                       cudaStreamCreateWithFlags(&st->s, cudaStreamNonBlocking), err);
    if (rc == LM_OK)
        rc = cuda_alloc(dev, CUDA_SCRATCH_BYTES, &st->scratch, err);
    if (rc == LM_OK)
        rc = cuda_alloc(dev, CUDA_GEMM_WS_BYTES, &st->gemm_ws, err);
    if (rc == LM_OK && __atomic_load_n(&d->fp8_weights, __ATOMIC_RELAXED))
        rc = cuda_alloc(dev, CUDA_WIDE_BYTES, &st->wide, err);
    if (rc == LM_OK)
        rc = check_err(d, "clearing a stream's scratch",
                       cudaMemsetAsync(st->scratch, 0, CUDA_SCRATCH_BYTES, st->s), err);
    if (rc != LM_OK) {
        cuda_stream_free(&st->base);
        return rc;
    }
    *out = &st->base;
    return LM_OK;
}

static lm_status cuda_stream_sync(kn_stream *s, struct lm_err *err)
{
    struct cuda_stream *st = cuda_stream_of(s);
    lm_status rc = check_err(st->dev, "waiting for a stream", cudaStreamSynchronize(st->s), err);
    return rc == LM_OK ? check_fault(st->dev, err) : rc;
}

/* ---- events ---------------------------------------------------------------------------- */

static struct cuda_event *event_of(kn_event *e)
{
    return (struct cuda_event *)e;
}

static lm_status cuda_event_new(kn_device *dev, kn_event **out, struct lm_err *err)
{
    struct cuda_event *e = lm_calloc(1, sizeof *e);
    if (!e)
        return lm_err_set(err, LM_NOMEM, "out of memory for an event");
    e->base.be = &kn_backend_cuda;
    e->dev = cuda_device_of(dev);
    cudaSetDevice(e->dev->index);
    lm_status st = check_err(e->dev, "making an event",
                             cudaEventCreateWithFlags(&e->e, cudaEventDisableTiming), err);
    if (st != LM_OK) {
        free(e);
        return st;
    }
    *out = &e->base;
    return LM_OK;
}

static void cuda_event_free(kn_event *e)
{
    cudaSetDevice(event_of(e)->dev->index);
    cudaEventDestroy(event_of(e)->e);
    free(e);
}

static lm_status cuda_event_record(kn_event *e, kn_stream *s)
{
    return cuda_check(event_of(e)->dev, "event_record",
                      cudaEventRecord(event_of(e)->e, cuda_stream_of(s)->s));
}

static lm_status cuda_event_wait(kn_stream *s, kn_event *e)
{
    return cuda_check(event_of(e)->dev, "event_wait",
                      cudaStreamWaitEvent(cuda_stream_of(s)->s, event_of(e)->e, 0));
}

static lm_status cuda_event_query(kn_event *e)
{
    struct cuda_device *d = event_of(e)->dev;
    cudaError_t rc = cudaEventQuery(event_of(e)->e);
    if (rc == cudaErrorNotReady)
        return LM_BUSY;
    lm_status st = cuda_check(d, "event_query", rc);
    return st == LM_OK ? check_fault(d, NULL) : st;
}

static lm_status cuda_event_sync(kn_event *e, struct lm_err *err)
{
    struct cuda_device *d = event_of(e)->dev;
    lm_status st = check_err(d, "waiting for an event", cudaEventSynchronize(event_of(e)->e), err);
    return st == LM_OK ? check_fault(d, err) : st;
}

const struct kn_backend kn_backend_cuda = {
    .name = "cuda",
    .probe = cuda_probe,
    .open = cuda_open,
    .close = cuda_close,
    .props = cuda_props,
    .alloc = cuda_alloc,
    .free = cuda_free,
    .host_alloc = cuda_host_alloc,
    .host_free = cuda_host_free,
    .copy_in = cuda_copy_in,
    .copy_out = cuda_copy_out,
    .copy = cuda_copy,
    .zero = cuda_zero,
    .scatter_cells = cuda_scatter_cells,
    .gather_cells = cuda_gather_cells,
    .stream_new = cuda_stream_new,
    .stream_free = cuda_stream_free,
    .stream_sync = cuda_stream_sync,
    .event_new = cuda_event_new,
    .event_free = cuda_event_free,
    .event_record = cuda_event_record,
    .event_wait = cuda_event_wait,
    .event_query = cuda_event_query,
    .event_sync = cuda_event_sync,
    .graph_rows = cuda_graph_rows,
    .graph_begin = cuda_graph_begin,
    .graph_end = cuda_graph_end,
    .graph_run = cuda_graph_run,
    .comm_id = cuda_comm_id,
    .comm_new = cuda_comm_new,
    .comm_free = cuda_comm_free,
    .all_reduce_sum = cuda_all_reduce_sum,
    .all_gather = cuda_all_gather,
    .mat_new = cuda_mat_new,
    .mat_free = cuda_mat_free,
    .mat_upload = cuda_mat_upload,
    .mat_fill = cuda_mat_fill,
    .mat_bytes = cuda_mat_bytes,
    .mat_save = cuda_mat_save,
    .mat_restore = cuda_mat_restore,
    .gemm_tune = cuda_gemm_tune,
    .kv_block_bytes = cuda_kv_block_bytes,
    .sample_workspace = cuda_sample_workspace,
#define X(op, args) .op = cuda_op_##op,
    KN_OPS(X)
    KN_FUSED_OPS(X)
#undef X
};
