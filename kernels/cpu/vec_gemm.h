/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vec_gemm.h - part of vec_impl.h: one panel of W against the rows of x.
 *
 * The tile is MR rows of x by one panel of 32 weight rows, all accumulators in registers. For each
 * k it loads 32 weights, widens them once, and multiplies by MR broadcast elements of x: no
 * horizontal sums, no packing of x, and weights that lie one after the other in memory. Few rows
 * give too few independent sums to hide the latency of an FMA, so there k is split over SPLIT sets
 * of accumulators.
 */

#define NV (CPU_PANEL / VW)     /* vectors across a panel */
#if VW == 16
#define GEMM_MR 12              /* 24 accumulators of 32 registers */
#elif VW == 8
#define GEMM_MR 3               /* 12 of 16 */
#else
#define GEMM_MR 1
#endif

/* bf16 lanes hold weight i in the low half and weight 16 + i in the high half (mat.c). */
INLINE void widen_bf16(vf w[NV], const void *row)
{
    UNROLL
    for (int i = 0; i < NV / 2; i++) {
        vi u = *(const vi_at *)((const int32_t *)row + i * VW);
        w[i] = (vf)(u << 16);
        w[NV / 2 + i] = (vf)(u & (int32_t)0xffff0000);
    }
}

INLINE vf widen_half(const uint16_t *p)
{
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    vi h = __builtin_convertvector(*(const vu16_at *)p, vi);
    vf mag = (vf)((h & 0x7fff) << 13) * 0x1p112f;       /* rebias; subnormals come out right */
    vi special = (h & 0x7c00) == 0x7c00;
    return (vf)((vi)mag | (special & 0x7f800000) | ((h & 0x8000) << 16));
#endif
}

INLINE void widen_f16(vf w[NV], const void *row)
{
    UNROLL
    for (int i = 0; i < NV; i++)
        w[i] = widen_half((const uint16_t *)row + i * VW);
}

INLINE void widen_f32(vf w[NV], const void *row)
{
    UNROLL
    for (int i = 0; i < NV; i++)
        w[i] = load((const float *)row + i * VW);
}

/* The exponent's bias is 7 there and 127 here; of a subnormal (m * 2^-9) the implicit one of
 * 2^-6 (1 + m / 8) is taken away again. */
INLINE vf widen_bytes(const uint8_t *p)
{
    vi u = __builtin_convertvector(*(const vu8_at *)p, vi), mag = u & 0x7f;
    vf normal = (vf)((mag << 20) + 0x3c000000), small = (vf)((mag << 20) + 0x3c800000) - 0x1p-6f;
    vi r = (vi)pick(mag < 8, small, normal) | ((mag == 0x7f) & 0x7fc00000);
    return (vf)(r | (u & 0x80) << 24);
}

INLINE void widen_e4m3(vf w[NV], const void *row)
{
    UNROLL
    for (int i = 0; i < NV; i++)
        w[i] = widen_bytes((const uint8_t *)row + i * VW);
}

INLINE void widen(vf w[NV], const void *row, enum kn_dtype t)
{
    if (t == KN_BF16)
        widen_bf16(w, row);
    else if (t == KN_F16)
        widen_f16(w, row);
    else if (t == KN_E4M3)
        widen_e4m3(w, row);
    else
        widen_f32(w, row);
}

/* Writes one row of the tile: times scale, + bias, + y when accumulating. */
INLINE void store_row(const struct cpu_gemm_panel *g, float *y, const vf acc[NV])
{
    UNROLL
    for (int v = 0; v < NV; v++) {
        int left = g->cols - v * VW;
        if (left >= VW) {
            vf r = acc[v];
            if (g->scale)
                r *= load(g->scale + v * VW);
            if (g->bias)
                r += load(g->bias + v * VW);
            if (g->accumulate)
                r += load(y + v * VW);
            store(y + v * VW, r);
        } else if (left > 0) {
            vf r = acc[v];
            if (g->scale)
                r *= load(g->scale + v * VW);       /* padded */
            if (g->bias)
                r += load_n(g->bias + v * VW, left);
            if (g->accumulate)
                r += load_n(y + v * VW, left);
            store_n(y + v * VW, r, left);
        }
    }
}

INLINE void gemm_tile(const struct cpu_gemm_panel *g, int m0, int mr, int split, enum kn_dtype t)
{
    const size_t row_bytes = CPU_PANEL * (t == KN_F32 ? 4 : t == KN_E4M3 ? 1 : 2);
    const float *x = g->x + m0 * g->ldx;
    const char *p = g->panel;
    const int64_t ldx = g->ldx;
    vf acc[4][GEMM_MR][NV] = { 0 };
    int k = 0;
    for (; k + split <= g->k; k += split, p += (size_t)split * row_bytes) {
        UNROLL
        for (int s = 0; s < split; s++) {
            vf w[NV];
            widen(w, p + (size_t)s * row_bytes, t);
            UNROLL
            for (int r = 0; r < mr; r++)
                UNROLL
                for (int v = 0; v < NV; v++)
                    acc[s][r][v] += x[r * ldx + k + s] * w[v];
        }
    }
    for (; k < g->k; k++, p += row_bytes) {
        vf w[NV];
        widen(w, p, t);
        UNROLL
        for (int r = 0; r < mr; r++)
            UNROLL
            for (int v = 0; v < NV; v++)
                acc[0][r][v] += x[r * ldx + k] * w[v];
    }
    UNROLL
    for (int r = 0; r < mr; r++) {
        UNROLL
        for (int s = 1; s < split; s++)
            UNROLL
            for (int v = 0; v < NV; v++)
                acc[0][r][v] += acc[s][r][v];
        store_row(g, g->y + (m0 + r) * g->ldy, acc[0][r]);
    }
}

#define TILE_CASE(n, split)                                                                    \
    case n:                                                                                    \
        gemm_tile(g, m0, n, split, t);                                                         \
        break;

INLINE void gemm_rows(const struct cpu_gemm_panel *g, int m0, int mr, enum kn_dtype t)
{
    switch (mr) {
#if VW == 16
    TILE_CASE(1, 4)
    TILE_CASE(2, 4)
    TILE_CASE(3, 2)
    TILE_CASE(4, 2)
    TILE_CASE(5, 2)
    TILE_CASE(6, 2)
    TILE_CASE(7, 1)
    TILE_CASE(8, 1)
    TILE_CASE(9, 1)
    TILE_CASE(10, 1)
    TILE_CASE(11, 1)
    TILE_CASE(12, 1)
#elif VW == 8
    TILE_CASE(1, 2)
    TILE_CASE(2, 1)
    TILE_CASE(3, 1)
#else
    TILE_CASE(1, 1)
#endif
    default:
        break;
    }
}

/* Tiles of nearly equal height: 13 rows are 7 + 6, not 12 + 1. */
INLINE void gemm_tiles(const struct cpu_gemm_panel *g, enum kn_dtype t)
{
    int tiles = LM_DIV_UP(g->m, GEMM_MR);
    for (int i = 0, m0 = 0; i < tiles; i++) {
        int mr = (g->m - m0) / (tiles - i) + ((g->m - m0) % (tiles - i) != 0);
        gemm_rows(g, m0, mr, t);
        m0 += mr;
    }
}

/* Where tiles are low, widening the weights anew for each tile would cost as much as the FMAs: so
 * a strip of the panel is widened once, into 16 KB on the stack, and all tiles read that. */
#define STRIP 128

INLINE void gemm_strips(const struct cpu_gemm_panel *g, enum kn_dtype t)
{
    float wide[STRIP * CPU_PANEL];
    const char *p = g->panel;
    for (int k0 = 0; k0 < g->k; k0 += STRIP) {
        struct cpu_gemm_panel strip = *g;
        strip.k = LM_MIN(STRIP, g->k - k0);
        for (int k = 0; k < strip.k; k++, p += CPU_PANEL * (t == KN_E4M3 ? 1 : 2)) {
            vf w[NV];
            widen(w, p, t);
            UNROLL
            for (int v = 0; v < NV; v++)
                store(wide + k * CPU_PANEL + v * VW, w[v]);
        }
        strip.panel = wide;
        strip.x = g->x + k0;
        strip.bias = k0 == 0 ? g->bias : NULL;
        strip.accumulate = g->accumulate || k0 > 0;
        gemm_tiles(&strip, KN_F32);
    }
}

INLINE void gemm_panel(const struct cpu_gemm_panel *g, enum kn_dtype t)
{
    if (t != KN_F32 && VW < 16 && g->m > 2 * GEMM_MR)
        gemm_strips(g, t);
    else
        gemm_tiles(g, t);
}

static void gemm_f32(const struct cpu_gemm_panel *g)
{
    gemm_panel(g, KN_F32);
}

static void gemm_f16(const struct cpu_gemm_panel *g)
{
    gemm_panel(g, KN_F16);
}

static void gemm_bf16(const struct cpu_gemm_panel *g)
{
    gemm_panel(g, KN_BF16);
}

static void gemm_e4m3(const struct cpu_gemm_panel *g)
{
    gemm_panel(g, KN_E4M3);
}
