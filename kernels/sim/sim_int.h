/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sim_int.h - what the files of the cost-model backend share: the description of a device (desc.c),
 * the price of an operation (cost.c), the clock, memory and copies (sim.c), and the operations that
 * put prices on streams (ops.c).
 */
#ifndef LORAMILL_KERNELS_SIM_SIM_INT_H
#define LORAMILL_KERNELS_SIM_SIM_INT_H

#include <pthread.h>

#include "kernels/backend.h"
#include "kernels/sim/sim.h"

#define SIM_TABLE_MAX 16        /* points of one curve */
#define SIM_BULK_MAX 64         /* allocations of SIM_BULK_BYTES and more */
#define SIM_BULK_BYTES ((size_t)32 << 20)
#define SIM_PAGE 4096
#define SIM_QUERY_TILE 64       /* queries of a sequence that share a read of its keys and values */

/* A number, or a curve through points, straight between them and level outside. */
struct sim_curve {
    int n;
    double x[SIM_TABLE_MAX], y[SIM_TABLE_MAX];
};

/* A device, in the units of its file: microseconds, gigabytes (10^9) and teraflops a second. */
struct sim_desc {
    char name[64];
    enum kn_dtype act, kv, lora;
    double memory_gb, bandwidth_gbps;
    double element_share;               /* of the bandwidth, in element-wise operations */
    struct sim_curve gemm_tflops;       /* over rows of the batch (M) */
    struct sim_curve gemm_gbps;         /* over megabytes of the weight */
    double gemm_norm;                   /* how the two combine, see cost.c */
    double decode_share, prefill_tflops;        /* attention */
    double shrink_share, expand_share;          /* of the bandwidth, reading adapter weights */
    double lora_tflops, lora_us;                /* its multiplications; fixed cost of a launch */
    double lora_token_gbps;     /* 0: weights are read once a segment; else anew for each token,
                                 * at this rate (Punica's and S-LoRA's BGMV) */
    double gap_us;              /* device time from one launch of a stream to the next */
    bool graph;                 /* a step is one launch for the host */
    double launch_us, step_us, seq_us;         /* host time: a launch, a step, a sequence of it */
    double in_gbps, out_gbps, copy_us;          /* PCIe, and the latency of a copy */
    double cell_us;             /* more for each scattered or gathered cell; 0: one launch */
    double tp_world, tp_us, tp_gbps;    /* the device stands for a group; its all-reduce */
};

lm_status sim_desc_load(const char *path, struct sim_desc *out, struct lm_err *err);
lm_status sim_desc_parse(const char *text, size_t n, const char *path, struct sim_desc *out,
                         struct lm_err *err);
double sim_curve_at(const struct sim_curve *c, double x);

/* ---- prices, nanoseconds, without the gap between launches (cost.c) -------------------- */

int64_t sim_stream_ns(const struct sim_desc *d, double bytes);      /* element-wise traffic */
int64_t sim_gemm_ns(const struct sim_desc *d, double m, double n, double k, double weight_bytes);

/* What attention over one batch reads and multiplies, summed over its sequences. */
struct sim_attention_load {
    double decode_kv;           /* cached positions read by sequences with one query */
    double chunk_kv;            /* by those with more, counted once a tile of queries */
    double pairs;               /* query-key pairs of those with more */
};
int64_t sim_attention_ns(const struct sim_desc *d, const struct kn_attention *a,
                         const struct sim_attention_load *l);
double sim_kv_token_bytes(const struct sim_desc *d, enum kn_kv kv, int kv_heads, int head_dim);

struct sim_lora_load {
    double rank_sum, rank_tok;  /* summed over parts, each weighed by its width: element counts */
    double rows;                /* elements of x read, or of y read and written */
};
int64_t sim_lora_ns(const struct sim_desc *d, const struct sim_lora_load *l, double share);
int64_t sim_reduce_ns(const struct sim_desc *d, double bytes);      /* 0 for a group of one */
int64_t sim_copy_ns(const struct sim_desc *d, bool in, double bytes, int cells);

/* ---- objects --------------------------------------------------------------------------- */

/* Sums over a batch are the same in every layer: kept until device memory changes. */
struct sim_memo {
    uint64_t gen;               /* of the device's memory; 0: empty */
    const void *key[2];
    int n, window;
    struct sim_attention_load load;
    double seg_tok;
};

struct sim_device {
    struct kn_device base;
    struct sim_desc d;
    pthread_mutex_t mu;         /* over all below */
    int64_t host_ns;            /* the host's clock */
    int64_t link_ns[2];         /* when each direction of PCIe is free for large copies */
    uint64_t mem_gen;           /* counts writes to device memory that operations may read */
    struct { char *p; size_t n; } bulk[SIM_BULK_MAX];
    int n_bulk;
    struct sim_memo attn, segs;
    struct sim_counters count;
};

struct sim_stream {
    struct kn_stream base;
    struct sim_device *dev;
    int64_t free_ns;            /* when all that was enqueued is done */
};

struct sim_event {
    struct kn_event base;
    struct sim_device *dev;
    int64_t at_ns;
};

struct sim_mat {
    struct kn_mat base;
    struct sim_device *dev;
};

struct sim_comm {
    struct kn_comm base;
    int world;
};

static inline struct sim_stream *sim_stream_of(kn_stream *s)
{
    return (struct sim_stream *)s;
}

lm_status sim_refuse(const char *op, const char *why);
/* Puts `ns` of work on the stream, behind what is there and not before the host's now. Locked. */
void sim_enqueue(struct sim_stream *s, enum sim_kind kind, int64_t ns);

#define X(op, args) lm_status sim_op_##op(kn_stream *s, const struct kn_##args *a);
KN_OPS(X)
#undef X

#endif
