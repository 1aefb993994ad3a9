/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_int.h - what the files of the CUDA backend share, for C11 and CUDA C++ alike.
 *
 * Host-only files (.c) own objects, copies and cuBLAS; .cu files hold kernels and the operations
 * that launch them. Operations are `cuda_op_<name>`, extern "C", and follow kernels.h: validate
 * what the host can see, enqueue on the stream, return. They never allocate and never synchronise,
 * so that any sequence of them can be captured into a CUDA graph; what they need beyond their
 * arguments is in their stream, allocated with it.
 *
 * Dtypes: activations, KV cache, base weights and adapters are bf16 (the KV cache E4M3 if the pool
 * says so, base weights float16 or E4M3 if they were made so); logits, norms' weights, biases and
 * LoRA intermediates float32; sums are float32 always.
 *
 * Errors: a CUDA call that fails goes through cuda_failed(), which logs it once with its name and
 * marks the device; from then on every call on the device gives LM_DEVICE. What only the device can
 * see (a token id outside of the table, a damaged adapter directory) is reported by a kernel with
 * cuda_report(): a flag in mapped host memory that kn_stream_sync(), kn_event_sync() and
 * kn_event_query() look at, at no cost to the step.
 *
 * Threads: as in kernels.h. A stream's scratch and GEMM plans belong to the thread that uses the
 * stream; the device's staging buffers have their own lock (mat.c).
 */
#ifndef LORAMILL_KERNELS_CUDA_INT_H
#define LORAMILL_KERNELS_CUDA_INT_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "kernels/backend.h"

/* ---- objects --------------------------------------------------------------------------- */

#define CUDA_SCRATCH_BYTES ((size_t)64 << 20)   /* a stream's, for split attention and the like */
/* Its first bytes are counters of blocks that have arrived: zero between operations. */
#define CUDA_COUNTER_BYTES ((size_t)1 << 20)
#define CUDA_GEMM_WS_BYTES ((size_t)32 << 20)   /* a stream's, for cuBLASLt */
#define CUDA_WIDE_BYTES ((size_t)64 << 20)      /* a stream's, for FP8 weights as bf16 */

struct cuda_staging;            /* pinned buffers for uploads (mat.c) */
struct cuda_plans;              /* cuBLASLt's choices, by shape (gemm.c) */
struct cuda_graphs;             /* recorded work, ready to run again (graph.c) */

struct cuda_device {
    struct kn_device base;
    int index, sms;
    int cc;                     /* compute capability, 90 for sm_90 */
    size_t smem_block;          /* bytes of shared memory a block may opt in to */
    size_t l2_bytes;
    char name[64];
    void *blas;                 /* cublasLtHandle_t */
    void *encode;               /* the driver's encoder of tensor maps, or NULL (tensor_map.c) */
    struct cuda_staging *staging;
    int32_t *fault_host;        /* mapped: what a kernel reported, 0 = nothing */
    int32_t *fault;             /* the same word, as kernels see it */
    int failed;                 /* atomic: a CUDA call failed; nothing here can be trusted */
    int fp8_weights;            /* atomic: streams made from now on need room to widen them */
};

/* What the copy engine of sm_90 must know of a tensor to fetch boxes of it (tensor_map.c). */
struct cuda_tensor_map {
    unsigned char opaque[128];
} __attribute__((aligned(64)));

struct cuda_stream {
    struct kn_stream base;
    struct cuda_device *dev;
    cudaStream_t s;
    void *scratch;              /* CUDA_SCRATCH_BYTES; in-order streams need no lock for it */
    void *gemm_ws;              /* CUDA_GEMM_WS_BYTES */
    void *wide;                 /* CUDA_WIDE_BYTES, or NULL: the device had no FP8 weights */
    bool copied;                /* by a kernel: what is launched next may not start early */
    struct cuda_plans *plans;
    struct cuda_graphs *graphs;
};

struct cuda_event {
    struct kn_event base;
    struct cuda_device *dev;
    cudaEvent_t e;
};

/* bf16 or float16 [rows][cols], row-major: W^T of y = x W^T as cuBLAS wants it. Rows are 16-byte
 * aligned when cols is a multiple of 8, which every model's are. KN_E4M3: bytes, cols a multiple of
 * 16, and the rows' scales behind them. */
struct cuda_mat {
    struct kn_mat base;
    struct cuda_device *dev;
    void *data;
    float *scale;               /* KN_E4M3: [rows], device memory within data; else NULL */
};

static inline struct cuda_device *cuda_device_of(kn_device *d)
{
    return (struct cuda_device *)d;
}

static inline struct cuda_stream *cuda_stream_of(kn_stream *s)
{
    return (struct cuda_stream *)s;
}

static inline const struct cuda_mat *cuda_mat_of(const kn_mat *m)
{
    return (const struct cuda_mat *)m;
}

/* The bucket that a number of rows belongs to: steps of 8 up to 64 (a tile's height), then eighths
 * of a power of two. What is computed how depends on this number only. */
static inline int cuda_bucket(int m)
{
    int step = 8;
    while (m > step * 8)
        step *= 2;
    return LM_DIV_UP(m, step) * step;
}

/* ---- errors ---------------------------------------------------------------------------- */

/* Logs "what: the error's name and text", marks the device failed, returns LM_DEVICE. */
lm_status cuda_failed(struct cuda_device *d, const char *what, cudaError_t e);

/* LM_OK, or LM_DEVICE through cuda_failed(); also LM_DEVICE when the device failed before. */
lm_status cuda_check(struct cuda_device *d, const char *what, cudaError_t e);

/* Logs why an operation was refused and returns LM_INVALID. */
lm_status cuda_refuse(const char *op, const char *why);

/* Faults that kernels report, see cuda_report(). */
enum cuda_fault {
    CUDA_FAULT_NONE,
    CUDA_FAULT_TOKEN,           /* token id outside of the embedding */
    CUDA_FAULT_ADAPTER,         /* an adapter's cells make no sense */
    CUDA_FAULT_BLOCK,           /* a block id or slot outside of the pool */
    CUDA_FAULT_SAMPLE,          /* sampling parameters that make no sense */
};

/* ---- pool ------------------------------------------------------------------------------ */

static inline bool cuda_pool_valid(const struct kn_pool *p, int layer)
{
    return p->base && p->num_blocks > 0 && p->n_layers > 0 && p->block_bytes > 0 &&
           p->block_bytes % 16 == 0 && (unsigned)p->kv <= KN_KV_E4M3 && layer >= 0 &&
           layer < p->n_layers;
}

/* ---- backend functions, one group a file ----------------------------------------------- */

/* mat.c */
lm_status cuda_staging_new(struct cuda_device *d, struct lm_err *err);
void cuda_staging_free(struct cuda_device *d);
lm_status cuda_mat_new(kn_device *dev, enum kn_dtype t, int rows, int cols, kn_mat **out,
                       struct lm_err *err);
void cuda_mat_free(kn_mat *m);
lm_status cuda_mat_upload(kn_mat *m, int row0, int col0, int rows, int cols, const void *src,
                          enum kn_dtype src_t, size_t src_ld, struct lm_err *err);
lm_status cuda_mat_fill(kn_mat *m, uint64_t seed, float scale, struct lm_err *err);
size_t cuda_mat_bytes(const kn_mat *m);
lm_status cuda_mat_save(kn_stream *s, void *dst, const kn_mat *m);
lm_status cuda_mat_restore(kn_stream *s, kn_mat *m, const void *src);

/* tensor_map.c */
void cuda_tensor_map_init(struct cuda_device *d);
/* A tensor of 2-byte elements, innermost dimension first, and the boxes that are fetched of it,
 * which are 64 elements wide and swizzled by 128 bytes. Strides come in any order, after 2. */
struct cuda_tensor {
    const void *base;
    int64_t size[5], stride[5];         /* elements; bytes */
    int box[5];
};
/* False if the driver knows no tensor maps, or refuses this one. */
bool cuda_tensor_map_make(struct cuda_device *d, struct cuda_tensor_map *map,
                          const struct cuda_tensor *t);

/* graph.c */
struct cuda_graphs *cuda_graphs_new(void);
void cuda_graphs_free(struct cuda_graphs *g);
int cuda_graph_rows(kn_device *dev, int n);
lm_status cuda_graph_begin(kn_stream *s);
lm_status cuda_graph_end(kn_stream *s, const void *key, size_t n);
lm_status cuda_graph_run(kn_stream *s, const void *key, size_t n);

/* Of this process so far; evicted: those that gave way to a new one. For checks. */
struct cuda_graph_counts {
    uint64_t recorded, run_again, evicted;
};
void cuda_graph_count(struct cuda_graph_counts *out);

/* comm.c */
lm_status cuda_comm_id(kn_device *dev, uint8_t id[KN_COMM_ID_BYTES], struct lm_err *err);
lm_status cuda_comm_new(kn_device *dev, const uint8_t id[KN_COMM_ID_BYTES], int rank, int world,
                        kn_comm **out, struct lm_err *err);
void cuda_comm_free(kn_comm *c);
lm_status cuda_all_reduce_sum(kn_stream *s, kn_comm *c, void *buf, size_t n, enum kn_dtype t);
lm_status cuda_all_gather(kn_stream *s, kn_comm *c, void *dst, const void *src, size_t n,
                          enum kn_dtype t);

/* gemm.c */
lm_status cuda_blas_new(struct cuda_device *d, struct lm_err *err);
void cuda_blas_free(struct cuda_device *d);
struct cuda_plans *cuda_plans_new(void);
void cuda_plans_free(struct cuda_plans *p);
lm_status cuda_gemm_tune(kn_stream *s, const struct kn_gemm *a, const kn_mat *const *w, int n_w);

/* gemm_few.cu: what gemm.c keeps from cuBLAS */
bool cuda_gemm_few_fits(struct cuda_stream *st, const struct kn_gemm *a);
lm_status cuda_gemm_few(struct cuda_stream *st, const struct kn_gemm *a);
/* gemm_tma.cu: the same on Hopper; to `out`, which for gate_up has the activation. */
bool cuda_gemm_tma_fits(struct cuda_stream *st, const struct kn_gemm *a);
lm_status cuda_gemm_tma(struct cuda_stream *st, const struct kn_gemm *a, void *out, bool gate_up);
/* gemm_mixed.cu: the same for weights in float16 and E4M3 */
bool cuda_gemm_mixed_fits(const struct kn_gemm *a);
lm_status cuda_gemm_mixed(struct cuda_stream *st, const struct kn_gemm *a);
/* Rows of W in E4M3 as bf16. */
lm_status cuda_widen_rows(struct cuda_stream *st, const struct cuda_mat *w, int row0, int rows,
                          void *out);
/* out [m, ldo] = x / scales [m], of a->w's dtype (ldo even). `split` (E4M3): in two parts, [2 m] of
 * each, that add up to x. */
lm_status cuda_convert_x(struct cuda_stream *st, const struct kn_gemm *a, void *out, int64_t ldo,
                         float *scales, bool split);
/* y = product [m, n] * scale [m] (+ bias) (+ y if accumulate), rounded once. scale NULL: product is
 * [2 m, n], of x in two parts, which are added. */
lm_status cuda_unscale(struct cuda_stream *st, const struct kn_gemm *a, const float *product,
                       const float *scale);
/* gemm_few.cu: y (float32) = bias, or += bias when accumulating, in every row. */
lm_status cuda_bias_rows(struct cuda_stream *st, const struct kn_gemm *a);
/* y (bf16) = product [m, n] (+ bias) (+ y if accumulate), rounded once. */
lm_status cuda_add_product(struct cuda_stream *st, const struct kn_gemm *a, const float *product);

/* rows.cu: a copy by a kernel, between device memory and pinned memory of this process.
 * LM_UNSUPPORTED: not so many bytes, or not words. */
#define CUDA_COPY_SMALL ((size_t)256 << 10)
lm_status cuda_copy_small(struct cuda_stream *st, const char *op, void *dst, const void *src,
                          size_t bytes);

/* Once a device: kernels that use more than 48 KiB of shared memory ask for it, as far as blocks of
 * this device may have it (227 KiB on sm_90, 163 on sm_80, 99 on the rest of 8.x); what would need
 * more is not launched there. */
cudaError_t cuda_attention_init(const struct cuda_device *d);
cudaError_t cuda_lora_init(const struct cuda_device *d);
cudaError_t cuda_gemm_init(const struct cuda_device *d);

/* attention.cu, sample.cu */
size_t cuda_kv_block_bytes(kn_device *dev, enum kn_kv kv, int block_tokens, int kv_heads,
                           int head_dim);
size_t cuda_sample_workspace(kn_device *dev, int max_rows, int vocab);

/*
 * The operations:
 *     gemm.c          gemm
 *     rows.cu         embed rmsnorm silu_mul gather_rows feed
 *     rope.cu         rope_kv
 *     attention.cu    attention
 *     gemm_few.cu     gate_up
 *     lora.cu         lora_shrink lora_expand
 *     lora_merge.cu   lora_merge
 *     sample.cu       sample
 */
#define X(op, args) lm_status cuda_op_##op(kn_stream *s, const struct kn_##args *a);
KN_OPS(X)
KN_FUSED_OPS(X)
#undef X

#ifdef __cplusplus
}
#endif

/* ---- CUDA C++ -------------------------------------------------------------------------- */

#ifdef __CUDACC__
#include <cuda_bf16.h>

typedef __nv_bfloat16 bf16;
typedef __nv_bfloat162 bf16x2;

__host__ __device__ static inline char *cuda_pool_block(const struct kn_pool *p, int layer,
                                                        int64_t block)
{
    return (char *)p->base + ((int64_t)layer * p->num_blocks + block) * p->block_bytes;
}

/* Reports a fault; the first one stays. Never in the way of a kernel that has none. */
__device__ static inline void cuda_report(int32_t *fault, enum cuda_fault what)
{
    if (*(volatile int32_t *)fault == CUDA_FAULT_NONE)
        *(volatile int32_t *)fault = what;
}

/* First statement of a kernel launched with cuda_launch(): waits until the kernel before it on the
 * stream has finished and its writes are visible. What comes before it (index arithmetic, reading
 * base weights into registers or L2) overlaps that kernel's tail. */
__device__ static inline void cuda_wait_prior(void)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Optional, best at the start: once all blocks have said so, the next kernel's blocks may take the
 * room that is left and run their preamble (never their work: they wait for this one's end). */
__device__ static inline void cuda_allow_next(void)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/*
 * Launches kernel(args...) on the stream, chained to its predecessor by programmatic dependent
 * launch where the device has it: EVERY kernel launched with this must call cuda_wait_prior()
 * before it touches memory that an earlier operation writes, or writes memory that one reads. What
 * a copy wrote may be read before that: no kernel starts before a copy in front of it has ended.
 * More than 48 KiB of `smem` needs cudaFuncSetAttribute() once before.
 */
template <typename... P, typename... A>
static lm_status cuda_launch(struct cuda_stream *st, const char *op, void (*kernel)(P...),
                             dim3 grid, dim3 block, size_t smem, A... args)
{
    cudaLaunchAttribute attr = {};
    attr.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t cfg = {};
    cfg.gridDim = grid;
    cfg.blockDim = block;
    cfg.dynamicSmemBytes = smem;
    cfg.stream = st->s;
    cfg.attrs = &attr;
    cfg.numAttrs = st->dev->cc >= 90 && !st->copied ? 1 : 0;
    st->copied = false;
    return cuda_check(st->dev, op, cudaLaunchKernelEx(&cfg, kernel, P(args)...));
}
#endif

#endif
