/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vec_impl.h - the source of struct cpu_vec, compiled once for each instruction set.
 *
 * The including file defines VW (floats a register), VEC_TABLE, VEC_NAME and VEC_ISA. Code is
 * written with the compiler's vector types, so a*b + c becomes one fused instruction where the
 * flags allow; intrinsics stand only where the types have no word for it.
 *
 * Everything here is static: the same inline function compiled with different flags must never be
 * merged by the linker.
 */
#include "kernels/cpu/cpu_int.h"

#include <math.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) ||                     \
    __has_feature(undefined_behavior_sanitizer)
#define KN_NO_UNROLL
#endif
#endif
#if defined(KN_NO_UNROLL) || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define UNROLL                  /* see the Makefile */
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

typedef float vf __attribute__((vector_size(4 * VW)));
typedef int32_t vi __attribute__((vector_size(4 * VW)));
typedef double vd __attribute__((vector_size(4 * VW)));         /* VW / 2 doubles */
typedef int64_t vl __attribute__((vector_size(4 * VW)));
typedef float vh __attribute__((vector_size(2 * VW)));          /* VW / 2 floats */
/* The same, at any float's (or half's) address. */
typedef float vf_at __attribute__((vector_size(4 * VW), aligned(2), may_alias));
typedef int32_t vi_at __attribute__((vector_size(4 * VW), aligned(2), may_alias));
typedef float vh_at __attribute__((vector_size(2 * VW), aligned(2), may_alias));
typedef uint16_t vu16_at __attribute__((vector_size(2 * VW), aligned(2), may_alias));
typedef uint8_t vu8_at __attribute__((vector_size(VW), aligned(1), may_alias));

INLINE vf load(const float *p)
{
    return *(const vf_at *)p;
}

INLINE void store(float *p, vf v)
{
    *(vf_at *)p = v;
}

/* x - 0 is x for every x (x + 0 is not, for -0), so this is a plain broadcast. */
INLINE vf set1(float x)
{
    return x - (vf){ 0 };
}

/* The first n < VW lanes; the others are 0 and their memory is not touched. */
INLINE vf load_n(const float *p, int n)
{
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    vf v = { 0 };
    memcpy(&v, p, (size_t)n * sizeof(float));
    return v;
#endif
}

INLINE void store_n(float *p, vf v, int n)
{
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    memcpy(p, &v, (size_t)n * sizeof(float));
#endif
}

INLINE vf pick(vi mask, vf a, vf b)
{
    return (vf)((mask & (vi)a) | (~mask & (vi)b));
}

/* Where a is not a number, b. */
INLINE vf vmax(vf a, vf b)
{
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return pick(a > b, a, b);
#endif
}

/* Pairs are added first, so the sum's error grows with log2(VW). */
INLINE float hsum(vf v)
{
    float t[VW];
    store(t, v);
    UNROLL
    for (int w = VW / 2; w > 0; w /= 2)
        UNROLL
        for (int i = 0; i < w; i++)
            t[i] += t[i + w];
    return t[0];
}

INLINE float hmax(vf v)
{
    float t[VW], m;
    store(t, v);
    m = t[0];
    for (int i = 1; i < VW; i++)
        m = t[i] > m ? t[i] : m;
    return m;
}

/* e^x: x = n ln 2 + r with |r| <= ln 2 / 2, Taylor to r^7 (next term 5e-9), times 2^n. Relative
 * error below 2e-7. Under e^-87.3 the result is 0, above e^88.3 it stays there. */
INLINE vf vexp(vf x)
{
    vi tiny = x < set1(-87.3f);
    x = vmax(x, set1(-87.3f));
    x = pick(x > set1(88.3f), set1(88.3f), x);
    vf n = (x * 1.44269504089f + 12582912.0f) - 12582912.0f;    /* to the nearest integer */
    vf r = x - n * 0.693359375f;                /* ln 2 in two pieces, the first exact */
    r = r + n * 2.12194440054690583e-4f;
    vf p = set1(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vi bits = (__builtin_convertvector(n, vi) + 127) << 23;
    return pick(tiny, (vf){ 0 }, p * (vf)bits);
}

/* ---- rows ------------------------------------------------------------------------------ */

static void row_add(float *y, const float *x, int n)
{
    int i = 0;
    for (; i + VW <= n; i += VW)
        store(y + i, load(y + i) + load(x + i));
    for (; i < n; i++)
        y[i] += x[i];
}

static float row_max(const float *x, int n)
{
    vf m = set1(-INFINITY), m2 = m;
    int i = 0;
    for (; i + 2 * VW <= n; i += 2 * VW) {
        m = vmax(load(x + i), m);
        m2 = vmax(load(x + i + VW), m2);
    }
    float best = hmax(vmax(m, m2));
    for (; i < n; i++)
        best = x[i] > best ? x[i] : best;
    return best;
}

/* Partial sums of 4096 terms go to a double: a vocabulary of 128k terms loses no digit. */
static float row_exp_sum(float *y, const float *x, int n, float sub)
{
    double total = 0;
    for (int i0 = 0; i0 < n; i0 += 4096) {
        int end = LM_MIN(n, i0 + 4096), i = i0;
        vf sum = { 0 };
        for (; i + VW <= end; i += VW) {
            vf e = vexp(load(x + i) - sub);
            if (y)
                store(y + i, e);
            sum += e;
        }
        if (i < end) {
            float t[VW];
            store(t, vexp(load_n(x + i, end - i) - sub));
            for (int j = 0; i + j < end; j++)
                total += t[j];
            if (y)
                memcpy(y + i, t, (size_t)(end - i) * sizeof(float));
        }
        total += hsum(sum);
    }
    return (float)total;
}

static void row_rmsnorm(float *out, const float *x, const float *w, int n, float eps)
{
    vf sum = { 0 }, sum2 = { 0 };
    int i = 0;
    for (; i + 2 * VW <= n; i += 2 * VW) {
        vf a = load(x + i), b = load(x + i + VW);
        sum += a * a;
        sum2 += b * b;
    }
    float total = hsum(sum + sum2);
    for (; i < n; i++)
        total += x[i] * x[i];
    float scale = 1.0f / sqrtf(total / (float)n + eps);
    for (i = 0; i + VW <= n; i += VW)
        store(out + i, load(x + i) * scale * load(w + i));
    for (; i < n; i++)
        out[i] = x[i] * scale * w[i];
}

INLINE vf silu_times(vf g, vf u)
{
    return g / (1.0f + vexp(-g)) * u;
}

static void row_silu_mul(float *out, const float *gate, const float *up, int n)
{
    int i = 0;
    for (; i + VW <= n; i += VW)
        store(out + i, silu_times(load(gate + i), load(up + i)));
    if (i < n)
        store_n(out + i, silu_times(load_n(gate + i, n - i), load_n(up + i, n - i)), n - i);
}

/* ---- rotary embedding ------------------------------------------------------------------ */

/* The angle is a float (as in the models' reference), but up to 1e5 turns of it are reduced in
 * double: a = q pi/2 + r, then Taylor on |r| <= pi/4 (next terms below 1e-11). */
INLINE void vsincos(vd a, vd *sin_out, vd *cos_out)
{
    const double magic = 6755399441055744.0;    /* 1.5 * 2^52: the sum's low bits are round(x) */
    vd t = a * 0.63661977236758134308 + magic;
    vl q = (vl)t;
    vd r = a - (t - magic) * 1.57079632679489661923;
    vd z = r * r;
    vd s = ((((z * (1.0 / 39916800) * -1.0 + 1.0 / 362880) * z - 1.0 / 5040) * z + 1.0 / 120) * z -
            1.0 / 6) * z * r + r;
    vd c = (((((z * (1.0 / 479001600) - 1.0 / 3628800) * z + 1.0 / 40320) * z - 1.0 / 720) * z +
             1.0 / 24) * z - 0.5) * z + 1.0;
    vl odd = (q & 1) == 1;
    vd sin_v = (vd)((odd & (vl)c) | (~odd & (vl)s));
    vd cos_v = (vd)((odd & (vl)s) | (~odd & (vl)c));
    *sin_out = (vd)((vl)sin_v ^ ((q & 2) << 62));
    *cos_out = (vd)((vl)cos_v ^ (((q + 1) & 2) << 62));
}

static void row_sincos(float *c, float *s, const float *freq, int n, float pos, float factor)
{
    enum { W = VW / 2 };
    for (int i = 0; i < n; i += W) {
        float a[W], cs[2][W];
        int m = LM_MIN((int)W, n - i);
        for (int j = 0; j < W; j++)
            a[j] = j < m ? freq[i + j] * pos : 0.0f;
        vd sv, cv;
        vsincos(__builtin_convertvector(*(const vh_at *)a, vd), &sv, &cv);
        *(vh_at *)cs[0] = __builtin_convertvector(cv, vh) * factor;
        *(vh_at *)cs[1] = __builtin_convertvector(sv, vh) * factor;
        memcpy(c + i, cs[0], (size_t)m * sizeof(float));
        memcpy(s + i, cs[1], (size_t)m * sizeof(float));
    }
}

static void row_rotate(float *x, const float *c, const float *s, int half)
{
    int i = 0;
    for (; i + VW <= half; i += VW) {
        vf a = load(x + i), b = load(x + half + i), cv = load(c + i), sv = load(s + i);
        store(x + i, a * cv - b * sv);
        store(x + half + i, b * cv + a * sv);
    }
    for (; i < half; i++) {
        float a = x[i], b = x[half + i];
        x[i] = a * c[i] - b * s[i];
        x[half + i] = b * c[i] + a * s[i];
    }
}

#include "kernels/cpu/vec_gemm.h"
#include "kernels/cpu/vec_lora.h"
#include "kernels/cpu/vec_attn.h"

const struct cpu_vec VEC_TABLE = {
    .name = VEC_NAME,
    .isa = VEC_ISA,
    .gemm = { [KN_F32] = gemm_f32, [KN_F16] = gemm_f16, [KN_BF16] = gemm_bf16,
              [KN_E4M3] = gemm_e4m3 },
    .add = row_add,
    .max = row_max,
    .exp_sum = row_exp_sum,
    .rmsnorm = row_rmsnorm,
    .silu_mul = row_silu_mul,
    .sincos = row_sincos,
    .rotate = row_rotate,
    .dot_acc = dot_acc,
    .rank_update = rank_update,
    .scores = attn_scores,
    .weigh = attn_weigh,
    .widen_e4m3 = attn_widen_e4m3,
};
