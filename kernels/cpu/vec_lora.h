/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vec_lora.h - part of vec_impl.h: the two halves of a LoRA update on one chunk of a cell.
 *
 * Shrink reduces along the chunk, so its sums stay lane by lane in memory from chunk to chunk and
 * are added up once, at the end (lora.c). Expand runs along the chunk and sums over the rank in
 * registers. Neither pads the rank: the work is the adapter's true rank.
 */

INLINE void dot_tile(float *acc, const float *w, int64_t ldw, int nr, const float *x, int64_t ldx,
                     int mt, int k)
{
    vf a[8][2];
    UNROLL
    for (int j = 0; j < nr; j++)
        UNROLL
        for (int t = 0; t < mt; t++)
            a[j][t] = load(acc + (j * mt + t) * CPU_LANES);
    int i = 0;
    for (; i + VW <= k; i += VW) {
        UNROLL
        for (int j = 0; j < nr; j++)
            UNROLL
            for (int t = 0; t < mt; t++)
                a[j][t] += load(w + j * ldw + i) * load(x + t * ldx + i);
    }
    if (i < k) {
        UNROLL
        for (int j = 0; j < nr; j++)
            UNROLL
            for (int t = 0; t < mt; t++)
                a[j][t] += load_n(w + j * ldw + i, k - i) * load_n(x + t * ldx + i, k - i);
    }
    UNROLL
    for (int j = 0; j < nr; j++)
        UNROLL
        for (int t = 0; t < mt; t++)
            store(acc + (j * mt + t) * CPU_LANES, a[j][t]);
}

static void dot_acc(float *acc, const float *w, int64_t ldw, int nr, const float *x, int64_t ldx,
                    int mt, int k)
{
    if (nr == 8)
        dot_tile(acc, w, ldw, 8, x, ldx, 1, k);
    else if (nr == 4 && mt == 2)
        dot_tile(acc, w, ldw, 4, x, ldx, 2, k);
    else if (nr == 4)
        dot_tile(acc, w, ldw, 4, x, ldx, 1, k);
    else if (mt == 2)
        dot_tile(acc, w, ldw, 1, x, ldx, 2, k);
    else
        dot_tile(acc, w, ldw, 1, x, ldx, 1, k);
}

/* nv vectors of y for mt tokens. */
INLINE void rank_tile(float *y, int64_t ldy, const float *h, int64_t ldh, int mt, const float *b,
                      int64_t ldb, int rank, int nv, float scale)
{
    vf a[2][4] = { 0 };
    for (int j = 0; j < rank; j++)
        UNROLL
        for (int v = 0; v < nv; v++) {
            vf bv = load(b + j * ldb + v * VW);
            UNROLL
            for (int t = 0; t < mt; t++)
                a[t][v] += h[t * ldh + j] * bv;
        }
    UNROLL
    for (int t = 0; t < mt; t++)
        UNROLL
        for (int v = 0; v < nv; v++) {
            float *p = y + t * ldy + v * VW;
            store(p, load(p) + scale * a[t][v]);
        }
}

INLINE void rank_tail(float *y, int64_t ldy, const float *h, int64_t ldh, int mt, const float *b,
                      int64_t ldb, int rank, int n, float scale)
{
    for (int t = 0; t < mt; t++) {
        vf a = { 0 };
        for (int j = 0; j < rank; j++)
            a += h[t * ldh + j] * load_n(b + j * ldb, n);
        store_n(y + t * ldy, load_n(y + t * ldy, n) + scale * a, n);
    }
}

INLINE void rank_cols(float *y, int64_t ldy, const float *h, int64_t ldh, int mt, const float *b,
                      int64_t ldb, int rank, int n, float scale)
{
    int i = 0;
    for (; i + 4 * VW <= n; i += 4 * VW)
        rank_tile(y + i, ldy, h, ldh, mt, b + i, ldb, rank, 4, scale);
    for (; i + VW <= n; i += VW)
        rank_tile(y + i, ldy, h, ldh, mt, b + i, ldb, rank, 1, scale);
    if (i < n)
        rank_tail(y + i, ldy, h, ldh, mt, b + i, ldb, rank, n - i, scale);
}

static void rank_update(float *y, int64_t ldy, const float *h, int64_t ldh, int mt, const float *b,
                        int64_t ldb, int rank, int n, float scale)
{
    int t = 0;
    for (; t + 2 <= mt; t += 2)
        rank_cols(y + t * ldy, ldy, h + t * ldh, ldh, 2, b, ldb, rank, n, scale);
    if (t < mt)
        rank_cols(y + t * ldy, ldy, h + t * ldh, ldh, 1, b, ldb, rank, n, scale);
}
