/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cpu_int.h - what the files of the CPU backend share.
 *
 * A device owns a thread pool and the table of vector routines chosen for this processor. A stream
 * runs each operation inline, on the thread that calls it, and borrows the pool's helpers for the
 * length of that operation; completion at return is what makes events trivial. Objects are freed by
 * the backend function of the same name; nothing is allocated on the step path.
 */
#ifndef LORAMILL_KERNELS_CPU_INT_H
#define LORAMILL_KERNELS_CPU_INT_H

#include "kernels/backend.h"

#define CPU_PANEL 32            /* weight rows interleaved in one panel, see mat.c */
#define CPU_LANES 16            /* key positions interleaved in a KV block, see attention.c */
#define CPU_MAX_HEAD_DIM 512
#define CPU_MAX_THREADS 256
#define CPU_ALIGN 256           /* of every allocation */

/* ---- vector routines ------------------------------------------------------------------- */

enum cpu_isa { CPU_ISA_GENERIC, CPU_ISA_AVX2, CPU_ISA_AVX512, CPU_ISA_COUNT };

/* One panel of a GEMM: y[m, 32] = x[m, k] P, with P [k][32] in mat.c's order. */
struct cpu_gemm_panel {
    float *y;                   /* y + first column of the panel */
    const float *x;
    const void *panel;
    const float *bias;          /* at the panel's first column, or NULL */
    const float *scale;         /* [CPU_PANEL] what a row's sum is multiplied by, or NULL */
    int64_t ldx, ldy;
    int m, k, cols;             /* cols <= CPU_PANEL */
    bool accumulate;
};

/*
 * The routines that are worth a version for each instruction set. All come from one source,
 * vec_impl.h, compiled three times. No pointer needs more than float alignment.
 */
struct cpu_vec {
    const char *name;
    enum cpu_isa isa;

    void (*gemm[4])(const struct cpu_gemm_panel *g);    /* by enum kn_dtype of the weights */

    void (*add)(float *y, const float *x, int n);       /* y += x */
    float (*max)(const float *x, int n);                /* -inf when empty; NaN is skipped */
    float (*exp_sum)(float *y, const float *x, int n, float sub);   /* y = e^(x-sub), or NULL */
    void (*rmsnorm)(float *out, const float *x, const float *w, int n, float eps);
    void (*silu_mul)(float *out, const float *gate, const float *up, int n);
    /* c, s [n] = factor * cos, sin of (float)pos * freq[i], the product rounded to float. */
    void (*sincos)(float *c, float *s, const float *freq, int n, float pos, float factor);
    void (*rotate)(float *x, const float *c, const float *s, int half);     /* half-split pairs */

    /* acc [nr][mt][CPU_LANES] += w[j][i] x[t][i], lane by lane; nr is 8 (mt 1), 4 or 1. */
    void (*dot_acc)(float *acc, const float *w, int64_t ldw, int nr, const float *x, int64_t ldx,
                    int mt, int k);
    /* y[t][i] += scale * sum_j h[t][j] b[j][i]. */
    void (*rank_update)(float *y, int64_t ldy, const float *h, int64_t ldh, int mt, const float *b,
                        int64_t ldb, int rank, int n, float scale);

    /* s[r][0..16) = q[r] . K, K transposed [hd][ldk]. */
    void (*scores)(float *s, int64_t lds, const float *q, int64_t ldq, int rows, const float *k,
                   int64_t ldk, int hd);
    /* o[r] += sum_key p[r][key] v[key]. */
    void (*weigh)(float *o, int64_t ldo, const float *p, int64_t ldp, int rows, const float *v,
                  int hd, int keys);
    /* out [rows][n] = in [rows][n], E4M3, rows ldi bytes apart. */
    void (*widen_e4m3)(float *out, const uint8_t *in, int64_t ldi, int rows, int n);
};

extern const struct cpu_vec cpu_vec_generic, cpu_vec_avx2, cpu_vec_avx512;

/* The best table this processor runs, not above the limit that tests may have set. */
const struct cpu_vec *cpu_vec_pick(void);
bool cpu_isa_runs(enum cpu_isa isa);

/* Tests only: devices opened from now on use at most `isa`. CPU_ISA_COUNT takes the limit away. */
void kn_cpu_force_isa(enum cpu_isa isa);

/* Tests only: events recorded from now on answer LM_BUSY to so many queries before they have
 * passed, as those of a device that works by itself would. */
void kn_cpu_force_late_events(int queries);

/* ---- objects --------------------------------------------------------------------------- */

struct cpu_pool;

struct cpu_device {
    struct kn_device base;
    const struct cpu_vec *v;
    struct cpu_pool *pool;
    int threads;                /* the caller's included */
};

struct cpu_stream {
    struct kn_stream base;
    struct cpu_device *dev;
    float *partial;             /* attention's split sequences, cpu_split_floats() a thread */
    float *gemm_scratch;        /* cpu_gemm_scratch_floats() a thread */
};

struct cpu_event {
    struct kn_event base;
    int late;                   /* queries that still answer LM_BUSY: tests only */
};

struct cpu_mat {
    struct kn_mat base;
    uint8_t *data;              /* [panels][cols][CPU_PANEL] of the stored dtype */
    int panels;
    size_t panel_bytes;
    float *scale;               /* E4M3: [panels * CPU_PANEL], behind the panels; else NULL */
};

/* ---- threads (pool.c) ------------------------------------------------------------------ */

/* Work on items [begin, end). Slot 0 is the calling thread, 1.. are helpers. */
typedef void cpu_range_fn(void *ctx, int slot, int begin, int end);

lm_status cpu_pool_new(int threads, struct cpu_pool **out, struct lm_err *err);
void cpu_pool_free(struct cpu_pool *p);

/* Runs fn over [0, n), `grain` items a claim, and returns when all is done. `work` is the whole
 * job's rough cost in nanoseconds on one thread; small jobs, and jobs posted while another stream
 * has the helpers, run on the calling thread alone. */
void cpu_parallel(struct cpu_stream *s, int n, int grain, int64_t work, cpu_range_fn *fn,
                  void *ctx);

/* ---- helpers --------------------------------------------------------------------------- */

static inline struct cpu_stream *cpu_stream_of(kn_stream *s)
{
    return (struct cpu_stream *)s;
}

static inline const struct cpu_mat *cpu_mat_of(const kn_mat *m)
{
    return (const struct cpu_mat *)m;
}

/* Logs why an operation was refused; operations return statuses only. */
lm_status cpu_refuse(const char *op, const char *why);

float cpu_bf16_to_f32(uint16_t h);
float cpu_f16_to_f32(uint16_t h);
uint16_t cpu_f32_to_bf16(float f);      /* nearest, ties to even */
uint16_t cpu_f32_to_f16(float f);
uint8_t cpu_f32_to_e4m3(float f);       /* nearest, ties to even, beyond 448 it is 448 */

/* Machine facts (sys.c): cores of the affinity mask and cgroup quota; bytes of memory. */
int cpu_sys_threads(void);
void cpu_sys_memory(size_t *total, size_t *avail);

void *cpu_aligned_alloc(size_t bytes);  /* CPU_ALIGN, huge pages for large sizes; free() */

void cpu_mat_row(const struct cpu_mat *m, int row, float *out);
/* Element (row, col0 + i) += scale * add[i] for i < n, rounded once. */
void cpu_mat_add(struct cpu_mat *m, int row, int col0, const float *add, float scale, int n);

/* A KV block: lanes of its transposed K, elements from one head to the next, bytes of one. */
static inline int64_t cpu_kv_lanes(int block_tokens)
{
    return LM_DIV_UP(block_tokens, CPU_LANES) * CPU_LANES;
}

static inline int64_t cpu_kv_head_elems(int block_tokens, int head_dim)
{
    return (cpu_kv_lanes(block_tokens) + block_tokens) * head_dim;
}

static inline int64_t cpu_kv_elem(enum kn_kv kv)
{
    return kv == KN_KV_E4M3 ? 1 : (int64_t)sizeof(float);
}

static inline char *cpu_pool_block(const struct kn_pool *p, int layer, int64_t block)
{
    return (char *)p->base + ((int64_t)layer * p->num_blocks + block) * p->block_bytes;
}

static inline bool cpu_pool_valid(const struct kn_pool *p, int layer)
{
    return p->base && p->num_blocks > 0 && p->n_layers > 0 && p->block_bytes > 0 &&
           p->block_bytes % 16 == 0 && (unsigned)p->kv <= KN_KV_E4M3 && layer >= 0 &&
           layer < p->n_layers;
}

size_t cpu_split_floats(void);

/* Floats that gemm.c wants a thread. */
size_t cpu_gemm_scratch_floats(void);

/* ---- backend functions, one group a file ----------------------------------------------- */

lm_status cpu_mat_new(kn_device *dev, enum kn_dtype t, int rows, int cols, kn_mat **out,
                      struct lm_err *err);
void cpu_mat_free(kn_mat *m);
lm_status cpu_mat_upload(kn_mat *m, int row0, int col0, int rows, int cols, const void *src,
                         enum kn_dtype src_t, size_t src_ld, struct lm_err *err);
lm_status cpu_mat_fill(kn_mat *m, uint64_t seed, float scale, struct lm_err *err);
size_t cpu_mat_bytes(const kn_mat *m);
lm_status cpu_mat_save(kn_stream *s, void *dst, const kn_mat *m);
lm_status cpu_mat_restore(kn_stream *s, kn_mat *m, const void *src);

lm_status cpu_comm_id(kn_device *dev, uint8_t id[KN_COMM_ID_BYTES], struct lm_err *err);
lm_status cpu_comm_new(kn_device *dev, const uint8_t id[KN_COMM_ID_BYTES], int rank, int world,
                       kn_comm **out, struct lm_err *err);
void cpu_comm_free(kn_comm *c);
lm_status cpu_all_reduce_sum(kn_stream *s, kn_comm *c, void *buf, size_t n, enum kn_dtype t);
lm_status cpu_all_gather(kn_stream *s, kn_comm *c, void *dst, const void *src, size_t n,
                         enum kn_dtype t);

size_t cpu_kv_block_bytes(kn_device *dev, enum kn_kv kv, int block_tokens, int kv_heads,
                          int head_dim);
size_t cpu_sample_workspace(kn_device *dev, int max_rows, int vocab);

#define X(op, args) lm_status cpu_op_##op(kn_stream *s, const struct kn_##args *a);
KN_OPS(X)
#undef X

#endif
