/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vec_attn.h - part of vec_impl.h: scores against 16 keys, and the weighted sum of values.
 *
 * K is transposed inside a block, so 16 keys fill vectors and a score needs no horizontal sum; the
 * query heads of a group are rows that share each load of K and V.
 */

#define KV (CPU_LANES / VW)     /* vectors over 16 keys */

INLINE void scores_rows(float *s, int64_t lds, const float *q, int64_t ldq, int rows, int split,
                        const float *k, int64_t ldk, int hd)
{
    vf a[4][4][KV] = { 0 };
    int d = 0;
    for (; d + split <= hd; d += split)
        UNROLL
        for (int u = 0; u < split; u++)
            UNROLL
            for (int v = 0; v < KV; v++) {
                vf kv = load(k + (d + u) * ldk + v * VW);
                UNROLL
                for (int r = 0; r < rows; r++)
                    a[u][r][v] += q[r * ldq + d + u] * kv;
            }
    for (; d < hd; d++)
        UNROLL
        for (int v = 0; v < KV; v++) {
            vf kv = load(k + d * ldk + v * VW);
            UNROLL
            for (int r = 0; r < rows; r++)
                a[0][r][v] += q[r * ldq + d] * kv;
        }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < KV; v++) {
            UNROLL
            for (int u = 1; u < split; u++)
                a[0][r][v] += a[u][r][v];
            store(s + r * lds + v * VW, a[0][r][v]);
        }
}

static void attn_scores(float *s, int64_t lds, const float *q, int64_t ldq, int rows,
                        const float *k, int64_t ldk, int hd)
{
    int r = 0;
    for (; r + 4 <= rows; r += 4)
        scores_rows(s + r * lds, lds, q + r * ldq, ldq, 4, 1, k, ldk, hd);
    for (; r + 2 <= rows; r += 2)
        scores_rows(s + r * lds, lds, q + r * ldq, ldq, 2, 2, k, ldk, hd);
    if (r < rows)
        scores_rows(s + r * lds, lds, q + r * ldq, ldq, 1, 4, k, ldk, hd);
}

INLINE void weigh_tile(float *o, int64_t ldo, const float *p, int64_t ldp, int rows,
                       const float *v, int hd, int keys, int nv)
{
    vf a[4][4];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int i = 0; i < nv; i++)
            a[r][i] = load(o + r * ldo + i * VW);
    for (int j = 0; j < keys; j++)
        UNROLL
        for (int i = 0; i < nv; i++) {
            vf vv = load(v + (int64_t)j * hd + i * VW);
            UNROLL
            for (int r = 0; r < rows; r++)
                a[r][i] += p[r * ldp + j] * vv;
        }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int i = 0; i < nv; i++)
            store(o + r * ldo + i * VW, a[r][i]);
}

INLINE void weigh_rows(float *o, int64_t ldo, const float *p, int64_t ldp, int rows,
                       const float *v, int hd, int keys)
{
    enum { STEP = VW == 16 ? 4 : 2 };
    int d = 0;
    for (; d + STEP * VW <= hd; d += STEP * VW)
        weigh_tile(o + d, ldo, p, ldp, rows, v + d, hd, keys, STEP);
    for (; d + VW <= hd; d += VW)
        weigh_tile(o + d, ldo, p, ldp, rows, v + d, hd, keys, 1);
    for (; d < hd; d++)
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < keys; j++)
                o[r * ldo + d] += p[r * ldp + j] * v[(int64_t)j * hd + d];
}

static void attn_widen_e4m3(float *out, const uint8_t *in, int64_t ldi, int rows, int n)
{
    for (int r = 0; r < rows; r++, in += ldi, out += n) {
        int i = 0;
        for (; i + VW <= n; i += VW)
            store(out + i, widen_bytes(in + i));
        if (i < n) {
            uint8_t last[VW] = { 0 };
            memcpy(last, in + i, (size_t)(n - i));
            store_n(out + i, widen_bytes(last), n - i);
        }
    }
}

static void attn_weigh(float *o, int64_t ldo, const float *p, int64_t ldp, int rows,
                       const float *v, int hd, int keys)
{
    int r = 0;
    for (; r + 4 <= rows; r += 4)
        weigh_rows(o + r * ldo, ldo, p + r * ldp, ldp, 4, v, hd, keys);
    for (; r + 2 <= rows; r += 2)
        weigh_rows(o + r * ldo, ldo, p + r * ldp, ldp, 2, v, hd, keys);
    if (r < rows)
        weigh_rows(o + r * ldo, ldo, p + r * ldp, ldp, 1, v, hd, keys);
}
