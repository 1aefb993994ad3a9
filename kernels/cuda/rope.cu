/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rope.cu - rotary embedding, optional per-head norm, and the write of K and V to the pool.
 *
 * A block is one token, or some of its heads where tokens are few: its first threads take the
 * sines, then each warp takes a few heads at a time, two neighbouring pairs a lane. The angle is
 * pos * inv_freq in float32, as the models' own code computes it. Everything is float32 between the
 * bf16 read and the bf16 write; K in E4M3 is rounded once, from float32. EB is the bytes of an
 * element in the pool.
 */
#include "kernels/cuda/attn.cuh"

#define WARPS 8
#define MAX_HALF 128
#define FEW 512                 /* tokens up to which a warp has HEADS heads, not a token's share */
#define HEADS 4                 /* that are on their way at once */

struct rope_launch {
    struct kn_rope_kv a;
    int32_t *fault;
    int bt_shift;
};

#ifdef KN_EMU
#define RARE
#else
#define RARE __noinline__       /* out of the way: what starts cold fetches its code, too */
#endif

/* Dynamic NTK: the base grows with the sequence's length, `times` its limit. */
__device__ RARE static float grown_frequency(float base0, float factor, double times, double d,
                                             int j)
{
    double grow = factor * times - (factor - 1.0);
    double base = base0 * pow(grow, d / (d - 2.0));
    return (float)(1.0 / pow(base, 2.0 * j / d));
}

__device__ static inline float frequency(const struct kn_rope_kv *a, int tok, int j)
{
    if (!a->dyn_len || a->dyn_len[tok] <= a->dyn_max)
        return a->inv_freq[j];
    return grown_frequency(a->dyn_base, a->dyn_factor, (double)a->dyn_len[tok] / a->dyn_max,
                           a->head_dim, j);
}

/* A head's numbers in a warp: lane l has pairs l, l + 32, ... of its lower and its upper half. */
template <int PAIRS> struct head {
    uint32_t lo[PAIRS], hi[PAIRS];
};

template <int PAIRS>
__device__ static inline void load_head(struct head<PAIRS> *r, const uint32_t *x, int half,
                                        int lane)
{
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
        const int i = lane + 32 * p;
        r->lo[p] = i < half / 2 ? x[i] : 0;
        r->hi[p] = i < half / 2 ? x[half / 2 + i] : 0;
    }
}

/* 1 / rms of the head, 1 without a norm. */
template <int PAIRS>
__device__ static inline float head_scale(const struct kn_rope_kv *a, const struct head<PAIRS> *r,
                                          const float *norm)
{
    if (!norm)
        return 1;
    float sq = 0;
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
        uint32_t u = r->lo[p], v = r->hi[p];
        sq += bf16_lo(u) * bf16_lo(u) + bf16_hi(u) * bf16_hi(u);
        sq += bf16_lo(v) * bf16_lo(v) + bf16_hi(v) * bf16_hi(v);
    }
    return 1.0f / sqrtf(warp_sum(sq) / (float)a->head_dim + a->norm_eps);
}

/* Rotates a head into `x` and, if kv is not NULL, writes it there too. */
template <int EB, int PAIRS>
__device__ static inline void rotate_head(const struct kn_rope_kv *a, const struct head<PAIRS> *r,
                                          uint32_t *x, const float *norm, const float *c,
                                          const float *s, char *kv, int lane)
{
    const int half = a->head_dim / 2;
    char *khi = kv + half * EB;
    const float f = head_scale(a, r, norm);
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
        const int i = lane + 32 * p, d = 2 * i;
        if (i >= half / 2)
            break;
        float x0 = bf16_lo(r->lo[p]) * f, x1 = bf16_hi(r->lo[p]) * f;
        float y0 = bf16_lo(r->hi[p]) * f, y1 = bf16_hi(r->hi[p]) * f;
        if (norm) {
            x0 *= norm[d], x1 *= norm[d + 1];
            y0 *= norm[half + d], y1 *= norm[half + d + 1];
        }
        float u0 = x0 * c[d] - y0 * s[d], u1 = x1 * c[d + 1] - y1 * s[d + 1];
        float v0 = y0 * c[d] + x0 * s[d], v1 = y1 * c[d + 1] + x1 * s[d + 1];
        uint32_t u = bf16_pack(u0, u1), v = bf16_pack(v0, v1);
        x[i] = u, x[half / 2 + i] = v;
        if (!kv)
            continue;
        if constexpr (EB == 2)
            ((uint32_t *)kv)[i] = u, ((uint32_t *)khi)[i] = v;
        else
            ((uint16_t *)kv)[i] = e4m3_pack(u0, u1), ((uint16_t *)khi)[i] = e4m3_pack(v0, v1);
    }
}

template <int EB, int PAIRS>
__device__ static inline void write_value(char *dst, const struct head<PAIRS> *r, int half,
                                          int lane)
{
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
        const int i = lane + 32 * p;
        if (i >= half / 2)
            break;
        if (EB == 2) {
            ((uint32_t *)dst)[i] = r->lo[p];
            ((uint32_t *)dst)[half / 2 + i] = r->hi[p];
        } else {
            ((uint16_t *)dst)[i] = e4m3_pack(bf16_lo(r->lo[p]), bf16_hi(r->lo[p]));
            ((uint16_t *)dst)[half / 2 + i] = e4m3_pack(bf16_lo(r->hi[p]), bf16_hi(r->hi[p]));
        }
    }
}

/* The token's K rows start here, one kv_head_at() apart; NULL when it writes nothing. */
template <int EB>
__device__ static inline char *token_rows(const struct rope_launch *p, int64_t slot)
{
    const struct kn_rope_kv *a = &p->a;
    if (slot < 0)
        return NULL;
    int64_t block = slot >> p->bt_shift;
    if (block >= a->pool.num_blocks) {
        cuda_report(p->fault, CUDA_FAULT_BLOCK);
        return NULL;
    }
    return cuda_pool_block(&a->pool, a->layer, block) +
           (slot & (a->block_tokens - 1)) * a->head_dim * EB;
}

template <int EB, int PAIRS>
__global__ static void __launch_bounds__(WARPS * 32) rope_kernel(
    const __grid_constant__ struct rope_launch p)
{
    __shared__ float c[MAX_HALF], s[MAX_HALF];
    const struct kn_rope_kv *a = &p.a;
    const int tok = (int)blockIdx.x, lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int hd = a->head_dim, half = hd / 2;
    cuda_allow_next();
    for (int j = (int)threadIdx.x; j < half; j += WARPS * 32) {
        float angle = frequency(a, tok, j) * (float)a->pos[tok], sine, cosine;
        sincosf(angle, &sine, &cosine);
        c[j] = cosine * a->attention_factor;
        s[j] = sine * a->attention_factor;
    }
    __syncthreads();
    char *rows = token_rows<EB>(&p, a->slot[tok]);
    uint16_t *qkv = (uint16_t *)a->qkv + tok * a->ld;
    const int64_t head_bytes = (int64_t)2 * a->block_tokens * hd * EB;
    cuda_wait_prior();
    const int heads = a->q_heads + 2 * a->kv_heads, stride = WARPS * (int)gridDim.y;
    for (int h0 = (int)blockIdx.y * WARPS + warp; h0 < heads; h0 += HEADS * stride) {
        struct head<PAIRS> r[HEADS];
#pragma unroll
        for (int k = 0; k < HEADS; k++)
            if (h0 + k * stride < heads)
                load_head(&r[k], (const uint32_t *)(qkv + (h0 + k * stride) * hd), half, lane);
#pragma unroll
        for (int k = 0; k < HEADS; k++) {
            const int h = h0 + k * stride, kh = h - a->q_heads;
            if (h >= heads)
                break;
            if (kh < a->kv_heads)
                rotate_head<EB>(a, &r[k], (uint32_t *)(qkv + h * hd),
                                kh < 0 ? a->q_norm : a->k_norm, c, s,
                                kh >= 0 && rows ? rows + kh * head_bytes : NULL, lane);
            else if (rows)
                write_value<EB>(rows + (kh - a->kv_heads) * head_bytes + head_bytes / 2, &r[k],
                                half, lane);
        }
    }
}

static const char *fault_of(const struct kn_rope_kv *a)
{
    if (a->n < 0 || (a->n && (!a->qkv || !a->pos || !a->slot || !a->inv_freq)))
        return "null pointer or negative count";
    if (a->q_heads <= 0 || a->kv_heads <= 0 || a->q_heads % a->kv_heads || a->head_dim <= 0 ||
        a->head_dim % 2 || a->block_tokens <= 0)
        return "bad head shape";
    if (a->n > 1 && a->ld < (int64_t)(a->q_heads + 2 * a->kv_heads) * a->head_dim)
        return "row stride is shorter than a row";
    if (!cuda_pool_valid(&a->pool, a->layer) ||
        (int64_t)cuda_kv_block_bytes(NULL, a->pool.kv, a->block_tokens, a->kv_heads,
                                     a->head_dim) > a->pool.block_bytes)
        return "the pool's blocks are too small, or the layer is outside of it";
    if (a->dyn_len && (a->dyn_max <= 0 || a->head_dim <= 2))
        return "dynamic scaling without a limit";
    if (a->ld % 2 || (uintptr_t)a->qkv % 4)
        return "rows that are not 4-byte aligned";
    return NULL;
}

extern "C" lm_status cuda_op_rope_kv(kn_stream *s, const struct kn_rope_kv *a)
{
    struct cuda_stream *st = cuda_stream_of(s);
    const char *fault = fault_of(a);
    if (fault)
        return cuda_refuse("rope_kv", fault);
    if (a->head_dim % 4 || a->head_dim > 2 * MAX_HALF || a->block_tokens & (a->block_tokens - 1))
        return LM_UNSUPPORTED;
    if (a->n == 0)
        return LM_OK;
    struct rope_launch p = {};
    p.a = *a;
    p.fault = st->dev->fault;
    while (1 << p.bt_shift < a->block_tokens)
        p.bt_shift++;
    int heads = a->q_heads + 2 * a->kv_heads;
    dim3 grid((unsigned)a->n, a->n > FEW ? 1 : (unsigned)LM_DIV_UP(heads, WARPS * HEADS));
    const bool e4m3 = a->pool.kv == KN_KV_E4M3;
    auto *kernel = a->head_dim <= 128 ? (e4m3 ? rope_kernel<1, 1> : rope_kernel<2, 1>)
                                      : (e4m3 ? rope_kernel<1, 2> : rope_kernel<2, 2>);
    return cuda_launch(st, "rope_kv", kernel, grid, dim3(WARPS * 32), 0, p);
}
