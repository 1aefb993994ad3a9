/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mat.c - base weights in the layout that the GEMM streams.
 *
 * A matrix keeps the dtype it was stored in (a CPU at batch 1 is bound by memory, so half the bytes
 * are twice the speed) and is cut into panels of 32 rows. A panel is [cols][32]: for each column,
 * the 32 rows' weights side by side, which is one cache line of bf16. The last panel is padded
 * with zero rows.
 *
 *     float32, float16   row i of the panel at place i
 *     E4M3               the same; a scale for each row lies behind all panels
 *     bfloat16           row i at place 2i, row 16 + i at place 2i + 1: a 32-bit lane holds both,
 *                        and a shift or a mask makes each a float32 (little-endian)
 *
 * An upload writes elements one by one into that order; nothing reads a matrix while it is being
 * filled. Rectangles may be uploaded from several threads if they do not overlap.
 */
#include "kernels/cpu/cpu_int.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- number formats -------------------------------------------------------------------- */

static uint32_t bits_of(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static float float_of(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

float cpu_bf16_to_f32(uint16_t h)
{
    return float_of((uint32_t)h << 16);
}

uint16_t cpu_f32_to_bf16(float f)
{
    uint32_t u = bits_of(f);
    if ((u & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(u >> 16 | 0x40);      /* stay a NaN */
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float cpu_f16_to_f32(uint16_t h)
{
    uint32_t mag = bits_of(float_of((uint32_t)(h & 0x7fff) << 13) * 0x1p112f);
    if ((h & 0x7c00) == 0x7c00)
        mag |= 0x7f800000;
    return float_of(mag | (uint32_t)(h & 0x8000) << 16);
}

uint16_t cpu_f32_to_f16(float f)
{
    uint32_t u = bits_of(f), sign = u >> 16 & 0x8000, mag = u & 0x7fffffff;
    if (mag > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (mag >= 0x477ff000)                      /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7c00);
    if (mag < 0x38800000)                       /* subnormal: let the adder round to 2^-24 */
        return (uint16_t)(sign | (bits_of(float_of(mag) + 0.5f) - bits_of(0.5f)));
    mag += 0xfff + (mag >> 13 & 1);
    return (uint16_t)(sign | ((mag - 0x38000000) >> 13));
}

static float e4m3_to_f32(uint8_t b)
{
    uint32_t mag = b & 0x7f;
    float f = mag == 0x7f ? float_of(0x7fc00000)
              : mag < 8   ? (float)mag * 0x1p-9f : float_of((mag << 20) + 0x3c000000);
    return b & 0x80 ? -f : f;
}

uint8_t cpu_f32_to_e4m3(float f)
{
    uint32_t u = bits_of(f), sign = u >> 24 & 0x80, mag = u & 0x7fffffff;
    if (mag > 0x7f800000)
        return (uint8_t)(sign | 0x7f);
    if (mag >= 0x43e00000)                      /* 448 */
        return (uint8_t)(sign | 0x7e);
    if (mag < 0x3c800000)                       /* subnormal: let the adder round to 2^-9 */
        return (uint8_t)(sign | (bits_of(float_of(mag) + 0x1p14f) - bits_of(0x1p14f)));
    mag += 0x7ffff + (mag >> 20 & 1);
    return (uint8_t)(sign | ((mag - 0x3c000000) >> 20));
}

static float read_elem(const void *src, size_t i, enum kn_dtype t)
{
    if (t == KN_F32)
        return ((const float *)src)[i];
    if (t == KN_E4M3)
        return e4m3_to_f32(((const uint8_t *)src)[i]);
    uint16_t h = ((const uint16_t *)src)[i];
    return t == KN_F16 ? cpu_f16_to_f32(h) : cpu_bf16_to_f32(h);
}

/* ---- layout ---------------------------------------------------------------------------- */

static int place_of(int row_in_panel, enum kn_dtype t)
{
    if (t != KN_BF16)
        return row_in_panel;
    return row_in_panel < 16 ? 2 * row_in_panel : 2 * (row_in_panel - 16) + 1;
}

/* Index of element (row, 0) in units of the dtype; the next column is CPU_PANEL further. */
static size_t first_index(const struct cpu_mat *m, int row)
{
    return (size_t)(row / CPU_PANEL) * (size_t)m->base.cols * CPU_PANEL +
           (size_t)place_of(row % CPU_PANEL, m->base.dtype);
}

lm_status cpu_mat_new(kn_device *dev, enum kn_dtype t, int rows, int cols, kn_mat **out,
                      struct lm_err *err)
{
    (void)dev;
    if (rows <= 0 || cols <= 0 || (unsigned)t > KN_E4M3)
        return lm_err_set(err, LM_INVALID, "matrix of %d x %d, dtype %d: not a shape", rows, cols,
                          (int)t);
    struct cpu_mat *m = lm_calloc(1, sizeof *m);
    if (!m)
        return lm_err_set(err, LM_NOMEM, "out of memory for a matrix");
    m->base = (struct kn_mat){ .be = &kn_backend_cpu, .dtype = t, .rows = rows, .cols = cols };
    m->panels = LM_DIV_UP(rows, CPU_PANEL);
    m->panel_bytes = (size_t)cols * CPU_PANEL * kn_dtype_size(t);
    m->data = cpu_aligned_alloc(cpu_mat_bytes(&m->base));
    if (!m->data) {
        free(m);
        return lm_err_set(err, LM_NOMEM, "cannot allocate a matrix of %d x %d %s", rows, cols,
                          kn_dtype_name(t));
    }
    memset(m->data, 0, cpu_mat_bytes(&m->base));
    if (t == KN_E4M3)
        m->scale = (float *)(void *)(m->data + (size_t)m->panels * m->panel_bytes);
    *out = &m->base;
    return LM_OK;
}

void cpu_mat_free(kn_mat *m)
{
    free(((struct cpu_mat *)m)->data);
    free(m);
}

static void put_row_same(struct cpu_mat *m, size_t at, const void *src, size_t from, int cols)
{
    if (m->base.dtype == KN_F32) {
        for (int c = 0; c < cols; c++)
            ((float *)m->data)[at + (size_t)c * CPU_PANEL] = ((const float *)src)[from + (size_t)c];
        return;
    }
    for (int c = 0; c < cols; c++)
        ((uint16_t *)m->data)[at + (size_t)c * CPU_PANEL] =
            ((const uint16_t *)src)[from + (size_t)c];
}

static void put_row_converted(struct cpu_mat *m, size_t at, const void *src, size_t from, int cols,
                              enum kn_dtype t)
{
    for (int c = 0; c < cols; c++) {
        float v = read_elem(src, from + (size_t)c, t);
        size_t i = at + (size_t)c * CPU_PANEL;
        if (m->base.dtype == KN_F32)
            ((float *)m->data)[i] = v;
        else
            ((uint16_t *)m->data)[i] =
                m->base.dtype == KN_F16 ? cpu_f32_to_f16(v) : cpu_f32_to_bf16(v);
    }
}

/* A whole row; false if it holds a number that is not finite. */
static bool put_row_scaled(struct cpu_mat *m, int row, const void *src, size_t from,
                           enum kn_dtype t)
{
    const size_t at = first_index(m, row), cols = (size_t)m->base.cols;
    float most = 0;
    for (size_t c = 0; c < cols; c++) {
        float v = fabsf(read_elem(src, from + c, t));
        if (!isfinite(v))
            return false;
        most = LM_MAX(most, v);
    }
    /* Of subnormal numbers the division would make too many. */
    const float scale = most > 0 ? LM_MAX(most / 448, FLT_MIN) : 1;
    for (size_t c = 0; c < cols; c++)
        m->data[at + c * CPU_PANEL] = cpu_f32_to_e4m3(read_elem(src, from + c, t) / scale);
    m->scale[row] = scale;
    return true;
}

static lm_status upload_scaled(struct cpu_mat *m, int row0, int rows, const void *src,
                               enum kn_dtype t, size_t ld, struct lm_err *err)
{
    for (int r = 0; r < rows; r++)
        if (!put_row_scaled(m, row0 + r, src, (size_t)r * ld, t))
            return lm_err_set(err, LM_INVALID, "row %d of a matrix of %d x %d holds a number that "
                                               "is not finite", row0 + r, m->base.rows,
                              m->base.cols);
    return LM_OK;
}

lm_status cpu_mat_upload(kn_mat *base, int row0, int col0, int rows, int cols, const void *src,
                         enum kn_dtype src_t, size_t src_ld, struct lm_err *err)
{
    struct cpu_mat *m = (struct cpu_mat *)base;
    if (row0 < 0 || col0 < 0 || rows < 0 || cols < 0 || rows > base->rows - row0 ||
        cols > base->cols - col0 || src_ld < (size_t)cols || (unsigned)src_t > KN_BF16 || !src)
        return lm_err_set(err, LM_INVALID,
                          "upload of %d x %d at (%d, %d) does not fit a matrix of %d x %d", rows,
                          cols, row0, col0, base->rows, base->cols);
    if (base->dtype == KN_E4M3 && (col0 || cols != base->cols))
        return lm_err_set(err, LM_UNSUPPORTED, "a matrix in E4M3 is uploaded by whole rows: its "
                                               "scales are theirs");
    if (base->dtype == KN_E4M3)
        return upload_scaled(m, row0, rows, src, src_t, src_ld, err);
    /* A strip of columns that stays in cache, so that a panel's lines are filled while hot. */
    for (int c0 = 0; c0 < cols; c0 += 512)
        for (int r = 0; r < rows; r++) {
            size_t at = first_index(m, row0 + r) + (size_t)(col0 + c0) * CPU_PANEL;
            size_t from = (size_t)r * src_ld + (size_t)c0;
            int n = LM_MIN(512, cols - c0);
            if (src_t == base->dtype)
                put_row_same(m, at, src, from, n);
            else
                put_row_converted(m, at, src, from, n, src_t);
        }
    return LM_OK;
}

void cpu_mat_row(const struct cpu_mat *m, int row, float *out)
{
    size_t at = first_index(m, row);
    for (int c = 0; c < m->base.cols; c++)
        out[c] = read_elem(m->data, at + (size_t)c * CPU_PANEL, m->base.dtype);
    for (int c = 0; m->scale && c < m->base.cols; c++)
        out[c] *= m->scale[row];
}

void cpu_mat_add(struct cpu_mat *m, int row, int col0, const float *add, float scale, int n)
{
    size_t at = first_index(m, row) + (size_t)col0 * CPU_PANEL;
    for (int i = 0; i < n; i++) {
        size_t k = at + (size_t)i * CPU_PANEL;
        float v = read_elem(m->data, k, m->base.dtype) + scale * add[i];
        if (m->base.dtype == KN_F32)
            ((float *)m->data)[k] = v;
        else
            ((uint16_t *)m->data)[k] =
                m->base.dtype == KN_F16 ? cpu_f32_to_f16(v) : cpu_f32_to_bf16(v);
    }
}

/* ---- whole matrices -------------------------------------------------------------------- */

static uint64_t mix64(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Element (r, c) is a function of the seed and its place alone, whatever the layout. */
lm_status cpu_mat_fill(kn_mat *base, uint64_t seed, float scale, struct lm_err *err)
{
    struct cpu_mat *m = (struct cpu_mat *)base;
    float *row = lm_reallocarray(NULL, (size_t)base->cols, sizeof *row);
    if (!row)
        return lm_err_set(err, LM_NOMEM, "out of memory for a row of %d", base->cols);
    for (int r = 0; r < base->rows; r++) {
        for (int c = 0; c < base->cols; c++) {
            uint64_t z = mix64(seed + ((uint64_t)r << 32 | (uint32_t)c) * 0x9e3779b97f4a7c15u);
            row[c] = ((float)(z >> 40) * 0x1p-23f - 1.0f) * scale;
        }
        if (m->scale)
            put_row_scaled(m, r, row, 0, KN_F32);
        else
            put_row_converted(m, first_index(m, r), row, 0, base->cols, KN_F32);
    }
    free(row);
    return LM_OK;
}

size_t cpu_mat_bytes(const kn_mat *base)
{
    const struct cpu_mat *m = (const struct cpu_mat *)base;
    size_t scales = base->dtype == KN_E4M3 ? (size_t)m->panels * CPU_PANEL * sizeof(float) : 0;
    return (size_t)m->panels * m->panel_bytes + scales;
}

lm_status cpu_mat_save(kn_stream *s, void *dst, const kn_mat *base)
{
    (void)s;
    if (!dst)
        return cpu_refuse("mat_save", "null pointer");
    memcpy(dst, ((const struct cpu_mat *)base)->data, cpu_mat_bytes(base));
    return LM_OK;
}

lm_status cpu_mat_restore(kn_stream *s, kn_mat *base, const void *src)
{
    (void)s;
    if (!src)
        return cpu_refuse("mat_restore", "null pointer");
    memcpy(((struct cpu_mat *)base)->data, src, cpu_mat_bytes(base));
    return LM_OK;
}
