/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kernels.h - the one interface between the engine and a device.
 *
 * Written for a GPU first: memory belongs to a device, work is enqueued on in-order streams and
 * ordered across streams by events, copies are asynchronous, and nothing synchronises unless its
 * name says so. The CPU backend implements the same contract (an enqueued operation may simply
 * have completed when the call returns), and is the oracle for every other backend.
 *
 * Rules of the contract
 *  1. An operation takes its stream and one argument struct; it validates, enqueues and returns.
 *     It never allocates, never synchronises, never touches host state later than the call: host
 *     memory named in an argument struct may be reused as soon as the call returns, device memory
 *     only when the stream has passed the operation.
 *  2. Pointers are device memory unless the name ends in `_host`. Arrays of indices are int32.
 *     Shapes stand in brackets; the last dimension is contiguous; `ld*` are row strides in
 *     elements.
 *  3. An unsupported value is a named error (LM_UNSUPPORTED), never a silent fallback.
 *  4. Failures on the device surface as LM_DEVICE at the next call on that device; after one,
 *     nothing that the device holds may be trusted.
 *  5. A row's result is the same to the last bit whatever the other rows are: it follows from what
 *     the row itself reads and from the operation's bucket. The bucket is a function of one count,
 *     of rows (gemm, gate_up, lora_*: its n_tok) or of sequences (attention of one query token: its
 *     n_seqs); for everything else there is but one. On the CPU each count is a bucket of its own
 *     (of rows, with the row's place among them: a last tile may be lower than the others); on CUDA
 *     they are 1, 2, 4, 8 (1 to 8 rows are one), multiples of 8 up to 64, and eighths of
 *     powers of two from there on. What a row reads is, in lora_*, its own adapter; in attention,
 *     its sequence: K and V so far, and all of its query tokens in this call. So where the caller
 *     cuts a prompt is seen in its bits; who else is in the step is not. `x`, `y` and strides are
 *     taken to be the same. kn_gemm_tune() may change what a bucket gives: do it before.
 *
 * Activations are `props.act` (float32 on the CPU, bf16 on a GPU); logits and LoRA intermediates
 * are always float32.
 *
 * Threads: a device and its memory calls may be used from any thread; one stream from one thread
 * at a time.
 */
#ifndef LORAMILL_KERNELS_KERNELS_H
#define LORAMILL_KERNELS_KERNELS_H

#include "kernels/base.h"

/* KN_E4M3 is OCP's 8-bit E4M3: 4 bits of exponent (bias 7), 3 of mantissa, subnormals, no infinity,
 * NaN is 0x7f, the largest number 448. Whoever writes it rounds to nearest even and saturates. */
enum kn_dtype { KN_F32, KN_F16, KN_BF16, KN_E4M3 };
size_t kn_dtype_size(enum kn_dtype t);
const char *kn_dtype_name(enum kn_dtype t);

typedef struct kn_device kn_device;     /* one accelerator, or the host's cores */
typedef struct kn_stream kn_stream;     /* an in-order queue of work */
typedef struct kn_event kn_event;       /* a point on a stream */
typedef struct kn_mat kn_mat;           /* a base weight matrix in the backend's own layout */
typedef struct kn_comm kn_comm;         /* a group of devices that compute one model */

struct kn_props {
    char name[96];              /* "cpu (avx512, 2 threads)" */
    char backend[16];           /* "cpu", "cuda", "sim" */
    enum kn_dtype act;          /* activations */
    enum kn_dtype kv;           /* KV cache in the pool, unless it is KN_KV_E4M3 */
    enum kn_dtype lora;         /* adapter weights in the pool */
    size_t mem_total, mem_free; /* bytes; free is what it was when asked */
    int threads;                /* CPU only */
    bool in_call;               /* operations complete inside the call: nothing runs behind it */
    bool virtual_time;          /* "sim": kn_now_us() is simulated, and kn_advance() moves it */
};

/* ---- devices --------------------------------------------------------------------------- */

struct kn_open_params {
    int index;          /* which device of the backend */
    int threads;        /* CPU: cores to use, 0 = all that this process may run on */
    const char *sim;    /* sim: the JSON file that describes the device */
};

/* `backend` is "cpu", "cuda", "sim" or NULL: CUDA where a device works, else the CPU. */
lm_status kn_open(const char *backend, const struct kn_open_params *p, kn_device **dev,
                  struct lm_err *err);
void kn_close(kn_device *dev);          /* every object of the device must be freed before */
void kn_props(kn_device *dev, struct kn_props *out);

/* Microseconds on the clock of this device's world: lm_now_us(), or simulated time that passes only
 * with what is enqueued and waited for. Whoever times or schedules work on a device asks it. */
int64_t kn_now_us(kn_device *dev);
/* Lets simulated time pass until `until_us` (nothing if that is past). LM_UNSUPPORTED elsewhere. */
lm_status kn_advance(kn_device *dev, int64_t until_us);

/* ---- memory ---------------------------------------------------------------------------- */

lm_status kn_alloc(kn_device *dev, size_t bytes, void **out, struct lm_err *err); /* 256-aligned */
void kn_free(kn_device *dev, void *p);
lm_status kn_host_alloc(kn_device *dev, size_t bytes, void **out, struct lm_err *err); /* pinned */
void kn_host_free(kn_device *dev, void *p);

/* Asynchronous copies; the host side must be pinned and stay untouched until the stream is past. */
lm_status kn_copy_in(kn_stream *s, void *dst, const void *src_host, size_t bytes);
lm_status kn_copy_out(kn_stream *s, void *dst_host, const void *src, size_t bytes);
lm_status kn_copy(kn_stream *s, void *dst, const void *src, size_t bytes);
lm_status kn_zero(kn_stream *s, void *dst, size_t bytes);

/* Scatters `n` cells of `cell_bytes` from one pinned host blob to base + offsets_host[i]: one
 * launch or copy batch for a whole adapter. */
lm_status kn_scatter_cells(kn_stream *s, void *base, const int64_t *offsets_host, int n,
                           size_t cell_bytes, const void *src_host);
/* The way back: cell i comes from base + offsets_host[i]; the blob must be pinned. Of both, the
 * offsets may be reused as soon as the call returns, the blob when the stream is past. */
lm_status kn_gather_cells(kn_stream *s, void *dst_host, const void *base,
                          const int64_t *offsets_host, int n, size_t cell_bytes);

/* ---- streams and events ---------------------------------------------------------------- */

lm_status kn_stream_new(kn_device *dev, kn_stream **out, struct lm_err *err);
void kn_stream_free(kn_stream *s);
lm_status kn_stream_sync(kn_stream *s, struct lm_err *err);     /* blocks the caller */

lm_status kn_event_new(kn_device *dev, kn_event **out, struct lm_err *err);
void kn_event_free(kn_event *e);
lm_status kn_event_record(kn_event *e, kn_stream *s);
lm_status kn_event_wait(kn_stream *s, kn_event *e);             /* the stream waits, not the host */
lm_status kn_event_query(kn_event *e);                          /* LM_OK passed, LM_BUSY not yet */
lm_status kn_event_sync(kn_event *e, struct lm_err *err);       /* blocks the caller */

/*
 * Recorded work (a CUDA graph): between kn_graph_begin() and kn_graph_end() what is enqueued on the
 * stream is recorded; kn_graph_end() hands all of it to the device at once, which starts it faster
 * than its parts, and keeps it under `key`, `n` bytes of the caller's choice. kn_graph_run() starts
 * it again as it is: same operations, same addresses and counts; only what lies in device memory
 * may differ. So the key must hold all that the operations were told. LM_NOT_FOUND: nothing is kept
 * under it (those used longest ago give way), record it. Operations and copies within device memory
 * may be recorded. After any was refused or failed, kn_graph_end(s, NULL, 0) ends the recording:
 * nothing is run, nothing is kept. LM_NOMEM of kn_graph_end(): there is no room to keep it; nothing
 * was run or kept, what was enqueued may be enqueued again by itself, and the device is well.
 *
 * kn_graph_rows() is how many rows a recorded step of n tokens should have, n or more: a few such
 * sizes serve all, and at each the device computes a row as it would among n, as each is of n's
 * bucket (rule 5). A caller who cuts rows into parts does it by this number, too, recorded or not.
 * 0: there is nothing to win by recording, and none of the others may be called.
 */
#define KN_GRAPH_KEY_BYTES 512          /* at most */
int kn_graph_rows(kn_device *dev, int n);
lm_status kn_graph_begin(kn_stream *s);
lm_status kn_graph_end(kn_stream *s, const void *key, size_t n);
lm_status kn_graph_run(kn_stream *s, const void *key, size_t n);

/* ---- tensor parallelism ---------------------------------------------------------------- */

#define KN_COMM_ID_BYTES 128
lm_status kn_comm_id(kn_device *dev, uint8_t id[KN_COMM_ID_BYTES], struct lm_err *err);
lm_status kn_comm_new(kn_device *dev, const uint8_t id[KN_COMM_ID_BYTES], int rank, int world,
                      kn_comm **out, struct lm_err *err);       /* blocks until all ranks joined */
void kn_comm_free(kn_comm *c);
lm_status kn_all_reduce_sum(kn_stream *s, kn_comm *c, void *buf, size_t n, enum kn_dtype t);
/* dst [world, n] from each rank's src [n]. */
lm_status kn_all_gather(kn_stream *s, kn_comm *c, void *dst, const void *src, size_t n,
                        enum kn_dtype t);

/* ---- base weights ---------------------------------------------------------------------- */

/* A weight [rows (out features), cols (in features)], stored as `t`. Filled in rectangles, so that
 * q, k and v become one matrix and a tensor-parallel shard takes its slice straight from the file:
 * the element (r, c) of the rectangle is src_host[r * src_ld + c]. kn_mat_upload blocks; rectangles
 * that don't overlap may come from several threads. The source need not be pinned; if it is, and in
 * the matrix's dtype, a GPU reads it where it lies.
 *
 * KN_E4M3: each row (output channel) has a float32 scale, its largest magnitude / 448 (1 for a row
 * of zeros), found when it is uploaded; its elements are the nearest KN_E4M3 to w / scale. Uploads
 * take whole rows, of another dtype, and only finite numbers. Rows of y are summed over the
 * elements in float32 and then multiplied by the scale. kn_op_lora_merge does not take it. */
lm_status kn_mat_new(kn_device *dev, enum kn_dtype t, int rows, int cols, kn_mat **out,
                     struct lm_err *err);
void kn_mat_free(kn_mat *m);
lm_status kn_mat_upload(kn_mat *m, int row0, int col0, int rows, int cols, const void *src_host,
                        enum kn_dtype src_t, size_t src_ld, struct lm_err *err);
/* Fills it with reproducible uniform values in [-scale, scale): for measuring without weights.
 * Blocks. */
lm_status kn_mat_fill(kn_mat *m, uint64_t seed, float scale, struct lm_err *err);
/* Bytes that it takes, and a copy of all of them, in the backend's own layout, to and from pinned
 * memory: what was saved comes back bit for bit. */
size_t kn_mat_bytes(const kn_mat *m);
lm_status kn_mat_save(kn_stream *s, void *dst_host, const kn_mat *m);
lm_status kn_mat_restore(kn_stream *s, kn_mat *m, const void *src_host);

struct kn_gemm;
/* Finds out how to compute products like `a` fastest, for every row count up to a->m, by measuring
 * on `n_w` weights of one shape (together larger than a cache, at best): kn_op_gemm on this stream
 * uses what was found. Blocks, and overwrites y. Does nothing where there is no choice. */
lm_status kn_gemm_tune(kn_stream *s, const struct kn_gemm *a, const kn_mat *const *w, int n_w);

/* ---- LoRA in the pool ------------------------------------------------------------------ */

/* The seven linear modules of a layer that an adapter may target. */
enum kn_module { KN_Q, KN_K, KN_V, KN_O, KN_GATE, KN_UP, KN_DOWN, KN_MODULES };

/*
 * An adapter is an image of `n_cells` cells of `cell_bytes` (= the pool's block_bytes), position
 * independent: logical cell c lies in block ids[c / n_layers], layer c % n_layers (see kn_pool).
 *
 * Cell 0 onwards holds the directory: one row of KN_MODULES entries for each layer, rows packed
 * floor(cell_bytes / sizeof(struct kn_lora_row)) to a cell. Then come the matrices.
 *
 * A matrix is A^T-like: `rank` rows along the long dimension (A: in features, B: out features),
 * cut into chunks of `width` columns; a chunk stores [rank][width] elements of props.lora, padded
 * with zeros to `width` columns at the end of the long dimension. Chunks are `chunk_bytes` apart
 * (16-byte aligned) and never straddle two cells: the first `first_n` chunks follow each other from
 * byte `offset` of cell `cell`; the rest fill the following cells from their start, `per_cell`
 * to a cell.
 *     A: h[j]  = sum_i A[j][i] x[i]          B: y[i] += scale * sum_j h[j] B[j][i]
 */
struct kn_lora_matrix {
    int32_t width;              /* columns a chunk; 0 when the module is not targeted */
    int32_t cell, offset;       /* where the first chunk starts */
    int32_t first_n, per_cell;
    int32_t chunk_bytes;
};

struct kn_lora_entry {
    int32_t rank;               /* 0: this module is not targeted */
    float scale;
    struct kn_lora_matrix a, b;
};

struct kn_lora_row {
    struct kn_lora_entry module[KN_MODULES];
};

/*
 * How K and V lie in a pool. KN_KV_NATIVE: as props.kv. KN_KV_E4M3: a byte an element, the nearest
 * KN_E4M3 to the number itself (scale 1), written by kn_op_rope_kv and widened again by
 * kn_op_attention; scores, weights and sums are as with native blocks. NaN is written as NaN; a
 * backend may read it as 480. Queries are not rounded.
 */
enum kn_kv { KN_KV_NATIVE, KN_KV_E4M3 };

/* The unified pool as kernels see it: block b of layer l starts at
 * base + (l * num_blocks + b) * block_bytes. */
struct kn_pool {
    void *base;
    int32_t num_blocks, n_layers;
    int64_t block_bytes;
    enum kn_kv kv;
};

/* Consecutive tokens of one step that use one adapter. Tokens in no segment are base-only. */
struct kn_lora_seg {
    int32_t tok0, n_tok;        /* rows of x and y */
    int32_t block0;             /* the adapter's block ids start at block_ids[block0] */
    int32_t rank_max;           /* largest rank over the adapter's modules */
    int32_t h0;                 /* row offset into h: sum of n_tok * rank_max of earlier segments */
};

/* What the step asks of one module, summed over segments with each adapter's largest rank of that
 * module over the layers. Both 0: no adapter of the step targets it, and nothing is launched. */
struct kn_lora_load {
    int32_t rank_sum;           /* sum of rank: what is read */
    int32_t rank_tok;           /* sum of n_tok * rank: what is computed */
};

/* The step's LoRA metadata, uploaded once a step and shared by every layer. */
struct kn_lora_batch {
    const struct kn_lora_seg *segs;     /* [n_segs] */
    const int32_t *block_ids;           /* adapters' block tables, one after the other */
    int n_segs;
    int n_tok;                          /* rows of x and y: the step's, in a segment or not */
    int max_seg_tok, max_rank;          /* host hints for launch geometry, or more */
    int64_t h_rows;                     /* sum over segments of n_tok * rank_max, or more */
    struct kn_lora_load load[KN_MODULES];       /* host hints too */
};

/* ---- operations ------------------------------------------------------------------------ */

/* out [n, hidden] = table[ids[i]]; ids are checked by the caller. */
struct kn_embed {
    void *out;
    const kn_mat *table;        /* [vocab, hidden] */
    const int32_t *ids;         /* [n] */
    int n, hidden;
};

/* If `residual`: residual += x, then out = norm(residual); else out = norm(x).
 * norm(v) = v / sqrt(mean(v^2) + eps) * weight (Zhang and Sennrich, arXiv 1910.07467). */
struct kn_rmsnorm {
    void *out;                  /* [n, hidden], may alias x */
    const void *x;              /* [n, hidden] */
    void *residual;             /* [n, hidden] or NULL */
    const float *weight;        /* [hidden] */
    int n, hidden;
    float eps;
};

/* y[m, n] = x[m, k] W^T (+ bias) (+ y if accumulate); y is act, or float32 if y_f32. x_e4m3: with W
 * in KN_E4M3, rows of x may be rounded to it as W's are, where that makes the product faster. */
struct kn_gemm {
    void *y;
    const void *x;
    const kn_mat *w;            /* [n, k] */
    const float *bias;          /* [n] or NULL */
    int m;
    int64_t ldx, ldy;
    bool accumulate, y_f32, x_e4m3;
};

/* Rotary position embedding (arXiv 2104.09864) in the half-split layout of the Llama family, with
 * optional per-head RMSNorm of q and k before it (Qwen3), and the write of K and V to the pool.
 * The token's slot is block * block_tokens + position in block; a negative slot writes nothing. */
struct kn_rope_kv {
    void *qkv;                  /* [n, (q_heads + 2 kv_heads) * head_dim], q rotated in place */
    int64_t ld;
    const int32_t *pos;         /* [n] */
    const int64_t *slot;        /* [n] */
    const float *inv_freq;      /* [head_dim / 2] */
    float attention_factor;     /* multiplies cos and sin (yarn), else 1 */
    /* Dynamic NTK: when dyn_len[i] > dyn_max the base grows with the token's sequence length,
     * base' = base * (factor * len / max - (factor - 1)) ^ (d / (d - 2)). NULL otherwise. */
    const int32_t *dyn_len;     /* [n] or NULL */
    float dyn_base, dyn_factor;
    int dyn_max;
    const float *q_norm, *k_norm;       /* [head_dim] or NULL */
    float norm_eps;
    struct kn_pool pool;
    int layer, block_tokens;
    int n, q_heads, kv_heads, head_dim;
};

/* Bytes of one KV block of one layer; its inner layout is the backend's own. */
size_t kn_kv_block_bytes(kn_device *dev, enum kn_kv kv, int block_tokens, int kv_heads,
                         int head_dim);

/* Causal paged attention. Sequence s owns query rows q_start[s] .. q_start[s+1]-1, which are the
 * last of its kv_len[s] positions. With a window w, a query at position p sees p-w+1 .. p. */
struct kn_attention {
    void *out;                  /* [n_tok, q_heads * head_dim] */
    const void *qkv;            /* as kn_rope_kv left it */
    int64_t ld;
    const int32_t *q_start;     /* [n_seqs + 1] */
    const int32_t *kv_len;      /* [n_seqs], after this step */
    const int32_t *block_table; /* [n_seqs, table_ld] */
    int64_t table_ld;
    int n_seqs, n_tok, max_q, max_kv;   /* host hints */
    struct kn_pool pool;
    int layer, block_tokens;
    int q_heads, kv_heads, head_dim;
    int window;                 /* 0: none */
    float scale;                /* usually 1 / sqrt(head_dim) */
};

/* out[n, f] = silu(gate) * up, from rows [gate | up] of gate_up [n, 2f]. */
struct kn_silu_mul {
    void *out;
    const void *gate_up;
    int n, f;
};

/* kn_op_gemm() with the weight [gate | up] of [2f, k], then kn_op_silu_mul(): out [m, f], to the
 * last bit. gemm.y has room for the product [m, 2f], f = w->rows / 2, whose rows lie close (ldy =
 * 2f), and holds anything afterwards. */
struct kn_gate_up {
    struct kn_gemm gemm;        /* y is act */
    void *out;
};

/* out[i] = x[idx[i]] for i < n. */
struct kn_gather_rows {
    void *out;                  /* [n, hidden] */
    const void *x;
    const int32_t *idx;         /* [n] */
    int n, hidden;
};

/* dst[dst_idx[i]] = src[src_idx[i]] for i < n; the destinations are distinct. Puts tokens that the
 * step before has sampled into the input of the next, which was laid out before they were known. */
struct kn_feed {
    int32_t *dst;
    const int32_t *dst_idx;     /* [n] */
    const int32_t *src;
    const int32_t *src_idx;     /* [n] */
    int n;
};

/* Merges one module of one layer of an adapter into a base weight, for a stream of its own:
 *     w[row0 + i][k] += scale * sum_j B[j][i] A[j][k],   i < out, k < in
 * summed in float32, rounded once to the weight's dtype. Undone with kn_mat_restore(). */
struct kn_lora_merge {
    kn_mat *w;
    int row0, in, out;
    enum kn_module module;
    int layer;
    struct kn_pool pool;
    const int32_t *block_ids;   /* the adapter's block table */
};

/* Up to three modules that read the same x and write side by side into y (q k v; gate up). */
struct kn_lora_part {
    enum kn_module module;
    int32_t y_col;              /* first column in y */
    int32_t out;                /* out features */
};

/* Shrink: h = x A^T for every part of every segment. The row of token t of segment s and part p is
 *     h + n_parts * (seg.h0 + (t - seg.tok0) * seg.rank_max) + p * seg.rank_max.
 * Expand: y += scale * h B. Two operations, so that a communicator can step between them. */
struct kn_lora {
    float *h;                   /* [batch.h_rows * n_parts], batch.h_rows being an upper bound */
    const void *x;              /* [n_tok, in], shrink only */
    void *y;                    /* [n_tok, ldy], expand only */
    int64_t ldx, ldy;
    int in;                     /* in features */
    struct kn_pool pool;
    int layer;
    int n_parts;
    struct kn_lora_part part[3];
    struct kn_lora_batch batch;
};

/* One row of logits to turn into a token. */
struct kn_sample_row {
    float temperature;          /* 0: greedy, ties to the lowest id */
    float top_p, min_p;         /* 1 and 0 switch them off */
    float repetition_penalty, presence_penalty, frequency_penalty;  /* 1, 0, 0: off */
    int32_t top_k;              /* 0: all */
    int32_t forced;             /* >= 0: take this token (scoring); -1: sample */
    int32_t top_logprobs;       /* 0..KN_MAX_TOP_LOGPROBS alternatives wanted */
    int32_t want_logprob;       /* the taken token's log-probability is wanted */
    int32_t hist0, n_prompt, n_output;  /* tokens so far: history[hist0 .. +n_prompt+n_output) */
    int32_t banned0, n_banned;  /* ids in history[] that may not be chosen now (min_tokens) */
    uint64_t seed, counter;     /* counter-based generator: u = f(seed, counter), same everywhere */
};

#define KN_MAX_TOP_LOGPROBS 20

/* Order (that of vLLM and Hugging Face): penalties, temperature, top-k, top-p, min-p, draw.
 * Repetition penalty (arXiv 1909.05858) counts prompt and output, presence and frequency output
 * only. Log-probabilities are of the raw model: log_softmax of the untouched logits. */
struct kn_sample {
    const float *logits;        /* [n, vocab] */
    const struct kn_sample_row *rows;   /* [n] */
    const int32_t *history;
    int32_t *out_id;            /* [n] */
    float *out_logprob;         /* [n]; NaN where not wanted */
    int32_t *top_id;            /* [n, KN_MAX_TOP_LOGPROBS], best first */
    float *top_logprob;         /* [n, KN_MAX_TOP_LOGPROBS] */
    void *workspace;            /* kn_sample_workspace() bytes */
    int n, vocab;
    int64_t ld;                 /* of logits */
};
size_t kn_sample_workspace(kn_device *dev, int max_rows, int vocab);

/* X(op): lm_status kn_op_<op>(kn_stream *, const struct kn_<struct> *) */
#define KN_OPS(X)                                                                              \
    X(embed, embed)                                                                            \
    X(rmsnorm, rmsnorm)                                                                        \
    X(gemm, gemm)                                                                              \
    X(rope_kv, rope_kv)                                                                        \
    X(attention, attention)                                                                    \
    X(silu_mul, silu_mul)                                                                      \
    X(gather_rows, gather_rows)                                                                \
    X(feed, feed)                                                                              \
    X(lora_shrink, lora)                                                                       \
    X(lora_expand, lora)                                                                       \
    X(lora_merge, lora_merge)                                                                  \
    X(sample, sample)

/* Two of those in one, for backends that have it cheaper so. */
#define KN_FUSED_OPS(X) X(gate_up, gate_up)

#define X(op, args) lm_status kn_op_##op(kn_stream *s, const struct kn_##args *a);
KN_OPS(X)
KN_FUSED_OPS(X)
#undef X

#endif
