/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attn_prefill.cu - paged attention for sequences with several query tokens (FlashAttention-2,
 * arXiv 2307.08691), by mma.sync: any device from sm_80 on.
 *
 * A work item is one kv head and ROWS rows of one sequence; a row is a query token and one of the
 * kv head's query heads, heads innermost, so that grouped heads share every load of K and V. Four
 * warps own 16 * MT rows each, and walk the keys together in tiles: scores, softmax, values.
 * K of the next tile is under way while scores are computed, V while the softmax is; masks (causal
 * edge, window, end) are applied only in the tiles that they touch.
 *
 * The host cannot see how a step's tokens fall to sequences, so the grid is a bound from n_tok and
 * n_seqs, and blocks find their items by scanning q_start (32 sequences a step). Items of one
 * sequence come last rows first: those have the most keys.
 */
#include "kernels/cuda/attn.cuh"

#define WARPS 4
#define THREADS (WARPS * 32)

template <int HD> struct prefill_shape {
    static constexpr int MT = HD > 128 ? 1 : 2;         /* 16-row tiles a warp */
    static constexpr int ROWS = WARPS * 16 * MT;
    static constexpr int KEYS = HD > 128 ? 32 : 64;     /* a tile */
    static constexpr int Q_BYTES = ROWS * HD * 2;
    static constexpr int TILE_BYTES = KEYS * HD * 2;
    static constexpr int SMEM = Q_BYTES + 4 * TILE_BYTES;       /* two tiles each of K and V */
};

struct prefill_item {
    int seq, row0, kv_head;
    int tok0, n_rows;           /* of the sequence: its first query token; tokens * group */
    int pos0;                   /* position of its first query token */
};

/* Finds item `index`; false beyond the last. All lanes of a warp together. */
__device__ static inline bool find_item(const struct kn_attention *a, int rows, int index,
                                        struct prefill_item *it)
{
    const int lane = (int)threadIdx.x % 32, group = a->q_heads / a->kv_heads;
    const int want = index / a->kv_heads;
    int before = 0;
    for (int s0 = 0; s0 < a->n_seqs; s0 += 32) {
        int s = s0 + lane, n_q = 0;
        if (s < a->n_seqs)
            n_q = a->q_start[s + 1] - a->q_start[s];
        int tiles = n_q > 1 ? (n_q * group + rows - 1) / rows : 0, sum = tiles;
        for (int d = 1; d < 32; d *= 2) {
            int up = __shfl_up_sync(FULL_MASK, sum, d);
            sum += lane >= d ? up : 0;
        }
        unsigned reached = __ballot_sync(FULL_MASK, before + sum > want);
        if (reached) {
            int src = __ffs((int)reached) - 1;
            int end = before + __shfl_sync(FULL_MASK, sum, src);
            it->seq = s0 + src;
            it->row0 = (end - 1 - want) * rows;
            it->kv_head = index % a->kv_heads;
            it->tok0 = a->q_start[it->seq];
            n_q = a->q_start[it->seq + 1] - it->tok0;
            it->n_rows = n_q * group;
            it->pos0 = a->kv_len[it->seq] - n_q;
            return true;
        }
        before += __shfl_sync(FULL_MASK, sum, 31);
    }
    return false;
}

/* ---- copies ---------------------------------------------------------------------------- */

template <int HD>
__device__ static inline void load_query(const struct kn_attention *a,
                                         const struct prefill_item *it, unsigned char *q)
{
    constexpr int P = HD / 8;
    typedef struct prefill_shape<HD> S;
    const int group = a->q_heads / a->kv_heads;
    for (int i = (int)threadIdx.x; i < S::ROWS * P; i += THREADS) {
        int r = i / P, piece = i % P, row = it->row0 + r;
        bool valid = row < it->n_rows;
        int64_t tok = it->tok0 + (valid ? row / group : 0);
        int head = it->kv_head * group + (valid ? row % group : 0);
        const uint16_t *src = (const uint16_t *)a->qkv + tok * a->ld + head * HD + piece * 8;
        cp_async16(q + tile_at<HD>(r, piece), src, valid);
    }
}

/* Keys [pos0, pos0 + KEYS) of K, or of V; zeros outside of [lo, end). */
template <int HD>
__device__ static inline void load_keys(const struct attn_launch *p, const struct prefill_item *it,
                                        unsigned char *dst, int pos0, int lo, int end, bool values)
{
    constexpr int P = HD / 8;
    typedef struct prefill_shape<HD> S;
    const struct kn_attention *a = &p->a;
    const int32_t *table = a->block_table + it->seq * a->table_ld;
    const char *base = cuda_pool_block(&a->pool, a->layer, 0) + kv_head_at(a, it->kv_head) +
                       (values ? (int64_t)a->block_tokens * (HD * 2) : 0);
#pragma unroll
    for (int j = 0; j < S::KEYS * P / THREADS; j++) {
        int i = j * THREADS + (int)threadIdx.x, key = i / P, piece = i % P, pos = pos0 + key;
        bool valid = pos >= lo && pos < end;
        int64_t id = valid ? block_of(p, table, pos) : 0;
        const char *src = base + id * a->pool.block_bytes +
                          (pos & (a->block_tokens - 1)) * (HD * 2) + piece * 16;
        cp_async16(dst + tile_at<HD>(key, piece), src, valid);
    }
}

/* ---- arithmetic ------------------------------------------------------------------------ */

template <int HD> struct prefill_acc {
    typedef struct prefill_shape<HD> S;
    float o[S::MT][HD / 8][4];
    float m[S::MT][2], l[S::MT][2];
    int first[S::MT][2], last[S::MT][2];        /* positions that the row sees */
};

template <int HD, int NT>
__device__ static inline void scores(float s[][NT][4], const unsigned char *q,
                                     const unsigned char *k, int warp, int lane)
{
    typedef struct prefill_shape<HD> S;
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
            s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
#pragma unroll
    for (int ks = 0; ks < HD / 16; ks++) {
        uint32_t a[S::MT][4];
#pragma unroll
        for (int m = 0; m < S::MT; m++)
            ldmatrix(a[m], q + tile_at<HD>((warp * S::MT + m) * 16 + (lane & 15),
                                           2 * ks + (lane >> 4)));
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            uint32_t b[4];
            ldmatrix(b, k + tile_at<HD>(n * 8 + (lane >> 4) * 8 + (lane & 7),
                                        2 * ks + (lane >> 3 & 1)));
#pragma unroll
            for (int m = 0; m < S::MT; m++) {
                mma_bf16(s[m][n], a[m], b);
                mma_bf16(s[m][n + 1], a[m], b + 2);
            }
        }
    }
}

/* Hides what the rows may not see of the keys from pos0 on. */
template <int HD, int NT>
__device__ static inline void mask(const struct prefill_acc<HD> *acc, float s[][NT][4], int pos0,
                                   int lane)
{
    typedef struct prefill_shape<HD> S;
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int pos = pos0 + n * 8 + (lane & 3) * 2 + (e & 1), r = e >> 1;
                if (pos < acc->first[m][r] || pos > acc->last[m][r])
                    s[m][n][e] = -INFINITY;
            }
}

/* Scores become weights. A row that has seen no key yet keeps a maximum of -inf. */
template <int HD, int NT>
__device__ static inline void soften(struct prefill_acc<HD> *acc, float s[][NT][4], float scale)
{
    typedef struct prefill_shape<HD> S;
#pragma unroll
    for (int mt = 0; mt < S::MT; mt++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float m = -INFINITY;
#pragma unroll
            for (int n = 0; n < NT; n++)
                m = fmaxf(m, fmaxf(s[mt][n][2 * r], s[mt][n][2 * r + 1]));
            m = fmaxf(acc->m[mt][r], quad_max(m) * scale);
            const float sub = m == -INFINITY ? 0 : m;
            float keep = exp2_fast(acc->m[mt][r] - sub), sum = 0;
            acc->m[mt][r] = m;
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; e++) {
                    s[mt][n][e] = exp2_fast(fmaf(s[mt][n][e], scale, -sub));
                    sum += s[mt][n][e];
                }
            acc->l[mt][r] = acc->l[mt][r] * keep + sum;
#pragma unroll
            for (int d = 0; d < HD / 8; d++)
                acc->o[mt][d][2 * r] *= keep, acc->o[mt][d][2 * r + 1] *= keep;
        }
}

template <int HD, int NT>
__device__ static inline void add_values(struct prefill_acc<HD> *acc, const float s[][NT][4],
                                         const unsigned char *v, int lane)
{
    typedef struct prefill_shape<HD> S;
#pragma unroll
    for (int ks = 0; ks < NT / 2; ks++) {
        uint32_t p[S::MT][4];
#pragma unroll
        for (int m = 0; m < S::MT; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *x = s[m][2 * ks + (i >> 1)] + (i & 1) * 2;
                p[m][i] = bf16_pack(x[0], x[1]);
            }
#pragma unroll
        for (int d = 0; d < HD / 16; d++) {
            uint32_t b[4];
            ldmatrix_trans(b, v + tile_at<HD>(ks * 16 + (lane & 15), 2 * d + (lane >> 4)));
#pragma unroll
            for (int m = 0; m < S::MT; m++) {
                mma_bf16(acc->o[m][2 * d], p[m], b);
                mma_bf16(acc->o[m][2 * d + 1], p[m], b + 2);
            }
        }
    }
}

template <int HD>
__device__ static inline void start_rows(const struct kn_attention *a,
                                         const struct prefill_item *it,
                                         struct prefill_acc<HD> *acc, int warp, int lane)
{
    typedef struct prefill_shape<HD> S;
    const int group = a->q_heads / a->kv_heads;
#pragma unroll
    for (int m = 0; m < S::MT; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = it->row0 + (warp * S::MT + m) * 16 + r * 8 + lane / 4;
            acc->last[m][r] = it->pos0 + min(row, it->n_rows - 1) / group;
            acc->first[m][r] = first_visible(a, acc->last[m][r]);
            acc->m[m][r] = -INFINITY;
            acc->l[m][r] = 0;
        }
#pragma unroll
        for (int d = 0; d < HD / 8; d++)
            acc->o[m][d][0] = acc->o[m][d][1] = acc->o[m][d][2] = acc->o[m][d][3] = 0;
    }
}

template <int HD>
__device__ static inline void write_rows(const struct kn_attention *a,
                                         const struct prefill_item *it,
                                         const struct prefill_acc<HD> *acc, int warp, int lane)
{
    typedef struct prefill_shape<HD> S;
    const int group = a->q_heads / a->kv_heads;
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = it->row0 + (warp * S::MT + m) * 16 + r * 8 + lane / 4;
            float inv = 1.0f / quad_sum(acc->l[m][r]);
            if (row >= it->n_rows)
                continue;
            int64_t tok = it->tok0 + row / group;
            int head = it->kv_head * group + row % group;
            uint16_t *out = (uint16_t *)a->out + (tok * a->q_heads + head) * HD + lane % 4 * 2;
#pragma unroll
            for (int d = 0; d < HD / 8; d++)
                *(uint32_t *)(out + d * 8) = bf16_pack(acc->o[m][d][2 * r] * inv,
                                                       acc->o[m][d][2 * r + 1] * inv);
        }
}

/* ---- the kernel ------------------------------------------------------------------------ */

/* The item's keys, tile by tile. Two barriers a tile: before its K is read, which is also when
 * nobody reads the V before it any more, and before its V is read, likewise for K. */
template <int HD>
__device__ static inline void run_item(const struct attn_launch *p, const struct prefill_item *it,
                                       unsigned char *smem, int warp, int lane)
{
    typedef struct prefill_shape<HD> S;
    constexpr int NT = S::KEYS / 8;
    const int group = p->a.q_heads / p->a.kv_heads;
    unsigned char *q = smem, *k = smem + S::Q_BYTES, *v = k + 2 * S::TILE_BYTES;
    struct prefill_acc<HD> acc;
    start_rows<HD>(&p->a, it, &acc, warp, lane);
    const int low = it->pos0 + it->row0 / group;        /* position of the item's first row */
    const int high = it->pos0 + (min(it->row0 + S::ROWS, it->n_rows) - 1) / group;
    const int lo = first_visible(&p->a, low), lo_high = first_visible(&p->a, high);
    const int start = lo & ~(S::KEYS - 1), end = high + 1;
    const int n = (end - start + S::KEYS - 1) / S::KEYS;
    load_query<HD>(&p->a, it, q);
    load_keys<HD>(p, it, k, start, lo, end, false);
    cp_async_commit();
    load_keys<HD>(p, it, v, start, lo, end, true);
    cp_async_commit();
    for (int i = 0; i < n; i++) {
        const int pos0 = start + i * S::KEYS, next = ((i + 1) & 1) * S::TILE_BYTES;
        float s[S::MT][NT][4];
        cp_async_wait<1>();
        __syncthreads();
        if (i + 1 < n)
            load_keys<HD>(p, it, k + next, pos0 + S::KEYS, lo, end, false);
        cp_async_commit();
        scores<HD, NT>(s, q, k + (i & 1) * S::TILE_BYTES, warp, lane);
        if (pos0 + S::KEYS - 1 > low || pos0 < lo_high)
            mask<HD, NT>(&acc, s, pos0, lane);
        soften<HD, NT>(&acc, s, p->scale_log2);
        cp_async_wait<1>();
        __syncthreads();
        if (i + 1 < n)
            load_keys<HD>(p, it, v + next, pos0 + S::KEYS, lo, end, true);
        cp_async_commit();
        add_values<HD, NT>(&acc, s, v + (i & 1) * S::TILE_BYTES, lane);
    }
    cp_async_wait<0>();
    write_rows<HD>(&p->a, it, &acc, warp, lane);
    __syncthreads();            /* the next item's copies overwrite q, k and v */
}

template <int HD>
__global__ static void __launch_bounds__(THREADS) prefill_kernel(
    const __grid_constant__ struct attn_launch p)
{
    DYNAMIC_SMEM(smem);
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    struct prefill_item it;
    cuda_allow_next();
    bool more = find_item(&p.a, prefill_shape<HD>::ROWS, (int)blockIdx.x, &it);
    cuda_wait_prior();
    for (int i = (int)blockIdx.x; more;) {
        if ((it.pos0 + it.n_rows / (p.a.q_heads / p.a.kv_heads) - 1) >> p.bt_shift >=
            p.a.table_ld || it.pos0 < 0)
            cuda_report(p.fault, CUDA_FAULT_BLOCK);
        else
            run_item<HD>(&p, &it, smem, warp, lane);
        i += (int)gridDim.x;
        more = find_item(&p.a, prefill_shape<HD>::ROWS, i, &it);
    }
}

template <int HD> static lm_status launch(struct cuda_stream *st, const struct attn_launch *p)
{
    typedef struct prefill_shape<HD> S;
    const struct kn_attention *a = &p->a;
    int64_t rows = (int64_t)a->n_tok * (a->q_heads / a->kv_heads);
    int64_t tiles = rows / S::ROWS + LM_MIN(a->n_seqs, LM_MAX(1, a->n_tok / 2));
    int64_t grid = LM_MIN(tiles * a->kv_heads, (int64_t)st->dev->sms * 64);
    return cuda_launch(st, "attention (prefill)", prefill_kernel<HD>, dim3((unsigned)grid),
                       dim3(THREADS), S::SMEM, *p);
}

cudaError_t cuda_attn_prefill_init(void)
{
    cudaError_t e = cudaSuccess;
#define X(hd)                                                                                  \
    if (e == cudaSuccess)                                                                      \
        e = cudaFuncSetAttribute(prefill_kernel<hd>, cudaFuncAttributeMaxDynamicSharedMemorySize, \
                                 prefill_shape<hd>::SMEM);
    CUDA_HEAD_DIMS(X)
#undef X
    return e;
}

lm_status cuda_attn_prefill(struct cuda_stream *st, const struct attn_launch *p)
{
    switch (p->a.head_dim) {
#define X(hd)                                                                                  \
    case hd:                                                                                   \
        return launch<hd>(st, p);
        CUDA_HEAD_DIMS(X)
#undef X
    }
    return LM_UNSUPPORTED;
}
