/* SPDX-License-Identifier: Apache-2.0 */
/*
 * convert.h - from a checkpoint's float32, float16 and bfloat16 to what the device keeps, on the
 * host: bf16 or float16, rounded once to nearest even; or E4M3 with a scale for a row.
 *
 * Loops without branches, so that a compiler makes vector code of them (the Makefile asks for it in
 * mat.c): bits are selected, not jumped around. No CUDA in here: tests/unit/test_convert.c compares
 * it with the CPU backend's conversions on any machine.
 */
#ifndef LORAMILL_KERNELS_CUDA_CONVERT_H
#define LORAMILL_KERNELS_CUDA_CONVERT_H

#include <float.h>
#include <string.h>

#include "kernels/kernels.h"

static inline uint32_t conv_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline float conv_float(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* a where the mask's bits are set, else b. */
static inline uint32_t conv_pick(uint32_t mask, uint32_t a, uint32_t b)
{
    return (a & mask) | (b & ~mask);
}

static inline uint16_t conv_bf16(float f)
{
    uint32_t u = conv_bits(f);
    const uint32_t nan = 0u - ((u & 0x7fffffff) > 0x7f800000);
    return (uint16_t)(conv_pick(nan, u | 0x400000, u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static inline float conv_from_f16(uint16_t h)
{
    const uint32_t all = 0u - ((h & 0x7c00) == 0x7c00);         /* infinity or a NaN */
    uint32_t mag = conv_bits(conv_float((uint32_t)(h & 0x7fff) << 13) * 0x1p112f);
    return conv_float(mag | (all & 0x7f800000) | (uint32_t)(h & 0x8000) << 16);
}

/* Infinity from 65520 on. */
static inline uint16_t conv_f16(float f)
{
    const uint32_t u = conv_bits(f), mag = u & 0x7fffffff;
    const uint32_t tiny = 0u - (mag < 0x38800000), large = 0u - (mag >= 0x47800000);
    const uint32_t nan = 0u - (mag > 0x7f800000);
    /* Subnormal: the adder rounds to 2^-24. */
    const uint32_t sub = conv_bits(conv_float(mag) + 0.5f) - conv_bits(0.5f);
    const uint32_t normal = (mag + 0xfff + (mag >> 13 & 1) - 0x38000000) >> 13;
    return (uint16_t)((u >> 16 & 0x8000) |
                      conv_pick(large, 0x7c00 | (nan & 0x200), conv_pick(tiny, sub, normal)));
}

/* n elements of `src` from the from-th on, to bf16. */
static inline void conv_row(uint16_t *restrict out, const void *src, size_t from, size_t n,
                            enum kn_dtype t)
{
    if (t == KN_BF16) {
        memcpy(out, (const uint16_t *)src + from, n * sizeof *out);
    } else if (t == KN_F16) {
        const uint16_t *in = (const uint16_t *)src + from;
        for (size_t i = 0; i < n; i++)
            out[i] = conv_bf16(conv_from_f16(in[i]));
    } else {
        const float *in = (const float *)src + from;
        for (size_t i = 0; i < n; i++)
            out[i] = conv_bf16(in[i]);
    }
}

/* The same to float16. */
static inline void conv_row_f16(uint16_t *restrict out, const void *src, size_t from, size_t n,
                                enum kn_dtype t)
{
    if (t == KN_F16) {
        memcpy(out, (const uint16_t *)src + from, n * sizeof *out);
    } else if (t == KN_BF16) {
        const uint16_t *in = (const uint16_t *)src + from;
        for (size_t i = 0; i < n; i++)
            out[i] = conv_f16(conv_float((uint32_t)in[i] << 16));
    } else {
        const float *in = (const float *)src + from;
        for (size_t i = 0; i < n; i++)
            out[i] = conv_f16(in[i]);
    }
}

/* Of a number that is at most 448. */
static inline uint8_t conv_e4m3(float f)
{
    const uint32_t u = conv_bits(f), mag = u & 0x7fffffff;
    const uint32_t tiny = 0u - (mag < 0x3c800000), most = 0u - (mag >= 0x43e00000);
    /* Subnormal: the adder rounds to 2^-9. */
    const uint32_t sub = conv_bits(conv_float(mag) + 0x1p14f) - conv_bits(0x1p14f);
    const uint32_t normal = (mag + 0x7ffff + (mag >> 20 & 1) - 0x3c000000) >> 20;
    return (uint8_t)((u >> 24 & 0x80) | conv_pick(most, 0x7e, conv_pick(tiny, sub, normal)));
}

static inline void conv_widen(float *restrict out, const void *src, size_t n, enum kn_dtype t)
{
    const uint16_t *half = src;
    if (t == KN_F32)
        memcpy(out, src, n * sizeof *out);
    else if (t == KN_F16)
        for (size_t i = 0; i < n; i++)
            out[i] = conv_from_f16(half[i]);
    else
        for (size_t i = 0; i < n; i++)
            out[i] = conv_float((uint32_t)half[i] << 16);
}

/* Twice as fast with AVX2, which not every host has; sanitizers don't bear the choice at start. */
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define CONV_CLONES __attribute__((target_clones("avx2", "default"), unused))
#else
#define CONV_CLONES __attribute__((unused))
#endif

#define CONV_TILE 1024          /* numbers widened at a time: they stay in the nearest cache */

/* A whole row, and its scale; false if it holds a number that is not finite. Magnitudes are
 * compared as integers, which are in the same order. */
CONV_CLONES
static bool conv_scaled_row(uint8_t *restrict out, float *scale, const void *src, size_t from,
                            size_t n, enum kn_dtype t)
{
    const char *in = (const char *)src + from * kn_dtype_size(t);
    float tile[CONV_TILE];
    int32_t most = 0;
    for (size_t i = 0; i < n; i += CONV_TILE) {
        const size_t k = LM_MIN(CONV_TILE, n - i);
        conv_widen(tile, in + i * kn_dtype_size(t), k, t);
        for (size_t j = 0; j < k; j++)
            most = LM_MAX(most, (int32_t)(conv_bits(tile[j]) & 0x7fffffff));
    }
    if (most >= 0x7f800000)
        return false;
    const float s = most > 0 ? LM_MAX(conv_float((uint32_t)most) / 448, FLT_MIN) : 1;
    for (size_t i = 0; i < n; i += CONV_TILE) {
        const size_t k = LM_MIN(CONV_TILE, n - i);
        conv_widen(tile, in + i * kn_dtype_size(t), k, t);
        for (size_t j = 0; j < k; j++)
            out[i + j] = conv_e4m3(tile[j] / s);
    }
    *scale = s;
    return true;
}

#endif
