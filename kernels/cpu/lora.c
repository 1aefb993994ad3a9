/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lora.c - y += scale * (x A^T) B for each segment's own adapter, straight from the pool's cells;
 * and the same product added to a base weight.
 *
 * The step's tokens come in segments of one adapter each (Punica's grouping, arXiv 2310.18547);
 * ranks differ between segments and no one is padded. A job item is one segment, one part and one
 * slice: of tokens when the segment is long, of rank rows (shrink) or chunks (expand) when there
 * are fewer segments than threads. Each slice writes its own elements, in an order that depends on
 * the adapter alone, so neighbours in the batch change nothing.
 *
 * Block ids, directory rows and matrix shapes are checked against the pool before use: a damaged
 * image gives LM_INVALID and leaves memory alone. Shrink writes h up to rank_max (zeros past the
 * adapter's rank), so that a communicator may add up whole buffers.
 */
#include "kernels/cpu/cpu_int.h"

#include <stdatomic.h>
#include <string.h>

#define TOKEN_BLOCK 32          /* tokens a slice of a long segment takes, at least */

struct lora_job {
    const struct kn_lora *a;
    const struct cpu_vec *v;
    int token_slices, slice_tokens;
    int work_slices;            /* of rank rows or chunks */
    atomic_int fault;           /* an adapter's image made no sense */
};

/* One module of one adapter, found. */
struct target {
    const struct kn_lora *a;
    const struct kn_lora_seg *seg;
    const struct kn_lora_entry *entry;  /* NULL: not targeted */
};

/* Where a chunk lies; the walk is in order, so it keeps its place. */
struct chunks {
    const struct target *t;
    const struct kn_lora_matrix *m;
    int cell, in_cell, room;
    const char *base;
};

/* ---- finding things in the pool -------------------------------------------------------- */

static const char *cell_at(const struct kn_lora *a, const struct kn_lora_seg *seg, int cell)
{
    int32_t block = a->batch.block_ids[seg->block0 + cell / a->pool.n_layers];
    if (block < 0 || block >= a->pool.num_blocks)
        return NULL;
    return cpu_pool_block(&a->pool, cell % a->pool.n_layers, block);
}

static bool matrix_valid(const struct kn_lora_matrix *m, int rank, int64_t cell_bytes)
{
    int64_t need = (int64_t)rank * m->width * (int64_t)sizeof(float);
    if (m->width <= 0 || m->cell < 0 || m->offset < 0 || m->first_n < 0 || m->per_cell < 0 ||
        m->chunk_bytes < need || m->chunk_bytes % 4 || m->offset % 4)
        return false;
    return m->offset + (int64_t)m->first_n * m->chunk_bytes <= cell_bytes &&
           (int64_t)m->per_cell * m->chunk_bytes <= cell_bytes;
}

static lm_status find_target(const struct kn_lora *a, int seg, int part, struct target *t)
{
    const int per_cell = (int)(a->pool.block_bytes / (int64_t)sizeof(struct kn_lora_row));
    t->a = a;
    t->seg = &a->batch.segs[seg];
    t->entry = NULL;
    if (per_cell == 0)
        return LM_INVALID;
    const char *cell = cell_at(a, t->seg, a->layer / per_cell);
    if (!cell)
        return LM_INVALID;
    const struct kn_lora_row *row = (const struct kn_lora_row *)cell + a->layer % per_cell;
    const struct kn_lora_entry *e = &row->module[a->part[part].module];
    if (e->rank == 0)
        return LM_OK;
    if (e->rank < 0 || e->rank > t->seg->rank_max ||
        !matrix_valid(&e->a, e->rank, a->pool.block_bytes) ||
        !matrix_valid(&e->b, e->rank, a->pool.block_bytes))
        return LM_INVALID;
    t->entry = e;
    return LM_OK;
}

/* Moves to the cell that holds chunk c. False when the directory leads nowhere. */
static bool chunks_seek(struct chunks *w, const struct target *t, const struct kn_lora_matrix *m,
                        int c)
{
    *w = (struct chunks){ .t = t, .m = m, .cell = m->cell };
    int64_t offset = m->offset;
    if (c < m->first_n) {
        w->in_cell = c;
        w->room = m->first_n;
    } else {
        if (m->per_cell == 0)
            return false;
        c -= m->first_n;
        w->cell += 1 + c / m->per_cell;
        w->in_cell = c % m->per_cell;
        w->room = m->per_cell;
        offset = 0;
    }
    const char *cell = cell_at(t->a, t->seg, w->cell);
    w->base = cell ? cell + offset : NULL;
    return cell != NULL;
}

/* The next chunk's [rank][width] elements, or NULL. */
static const float *chunks_next(struct chunks *w)
{
    if (w->in_cell == w->room) {
        w->base = w->m->per_cell > 0 ? cell_at(w->t->a, w->t->seg, w->cell + 1) : NULL;
        w->cell++;
        w->in_cell = 0;
        w->room = w->m->per_cell;
    }
    if (!w->base)
        return NULL;
    return (const float *)(w->base + (int64_t)w->in_cell++ * w->m->chunk_bytes);
}

static float *h_row(const struct kn_lora *a, const struct kn_lora_seg *seg, int part, int tok)
{
    int64_t row = seg->h0 + (int64_t)(tok - seg->tok0) * seg->rank_max;
    return a->h + a->n_parts * row + (int64_t)part * seg->rank_max;
}

static int64_t h_stride(const struct kn_lora *a, const struct kn_lora_seg *seg)
{
    return (int64_t)a->n_parts * seg->rank_max;
}

/* ---- shrink ---------------------------------------------------------------------------- */

static float lane_sum(const float *lanes)
{
    float s[CPU_LANES / 2];
    for (int i = 0; i < CPU_LANES / 2; i++)
        s[i] = lanes[i] + lanes[i + CPU_LANES / 2];
    for (int w = CPU_LANES / 4; w > 0; w /= 2)
        for (int i = 0; i < w; i++)
            s[i] += s[i + w];
    return s[0];
}

/* nr rank rows from j0 for mt tokens from tok, over all chunks. */
static bool shrink_tile(const struct lora_job *j, const struct target *t, int part, int j0, int nr,
                        int tok, int mt)
{
    const struct kn_lora *a = j->a;
    const struct kn_lora_matrix *m = &t->entry->a;
    _Alignas(64) float acc[8 * CPU_LANES] = { 0 };
    const float *x = (const float *)a->x + tok * a->ldx;
    struct chunks walk;
    if (!chunks_seek(&walk, t, m, 0))
        return false;
    for (int i = 0; i < a->in; i += m->width) {
        const float *c = chunks_next(&walk);
        if (!c)
            return false;
        j->v->dot_acc(acc, c + (int64_t)j0 * m->width, m->width, nr, x + i, a->ldx, mt,
                      LM_MIN(m->width, a->in - i));
    }
    for (int r = 0; r < nr; r++)
        for (int k = 0; k < mt; k++)
            h_row(a, t->seg, part, tok + k)[j0 + r] = lane_sum(acc + (r * mt + k) * CPU_LANES);
    return true;
}

static bool shrink_rows(const struct lora_job *j, const struct target *t, int part, int j0, int j1,
                        int tok, int mt)
{
    while (j0 < j1) {
        int nr = mt == 1 && j1 - j0 >= 8 ? 8 : j1 - j0 >= 4 ? 4 : 1;
        if (!shrink_tile(j, t, part, j0, nr, tok, mt))
            return false;
        j0 += nr;
    }
    return true;
}

static void clear_tail(const struct lora_job *j, const struct target *t, int part, int tok0,
                       int tok1)
{
    int rank = t->entry ? t->entry->rank : 0;
    for (int tok = tok0; tok < tok1; tok++)
        memset(h_row(j->a, t->seg, part, tok) + rank, 0,
               (size_t)(t->seg->rank_max - rank) * sizeof(float));
}

static bool shrink_slice(const struct lora_job *j, const struct target *t, int part, int slice,
                         int tok0, int tok1)
{
    if (slice == 0)
        clear_tail(j, t, part, tok0, tok1);
    if (!t->entry)
        return true;
    int per = LM_DIV_UP(LM_DIV_UP(t->entry->rank, j->work_slices), 4) * 4;
    int j0 = slice * per, j1 = LM_MIN(t->entry->rank, j0 + per);
    for (int tok = tok0; tok < tok1; tok += 2)
        if (!shrink_rows(j, t, part, j0, j1, tok, LM_MIN(2, tok1 - tok)))
            return false;
    return true;
}

/* ---- expand ---------------------------------------------------------------------------- */

static bool expand_slice(const struct lora_job *j, const struct target *t, int part, int slice,
                         int tok0, int tok1)
{
    if (!t->entry)
        return true;
    const struct kn_lora *a = j->a;
    const struct kn_lora_matrix *m = &t->entry->b;
    int out = a->part[part].out, n = LM_DIV_UP(out, m->width);
    int per = LM_DIV_UP(n, j->work_slices);
    int c0 = slice * per, c1 = LM_MIN(n, c0 + per);
    struct chunks walk;
    if (c0 >= c1)
        return true;
    if (!chunks_seek(&walk, t, m, c0))
        return false;
    const float *h = h_row(a, t->seg, part, tok0);
    float *y = (float *)a->y + tok0 * a->ldy + a->part[part].y_col;
    for (int c = c0; c < c1; c++) {
        const float *b = chunks_next(&walk);
        if (!b)
            return false;
        int i = c * m->width;
        j->v->rank_update(y + i, a->ldy, h, h_stride(a, t->seg), tok1 - tok0, b, m->width,
                          t->entry->rank, LM_MIN(m->width, out - i), t->entry->scale);
    }
    return true;
}

/* ---- jobs ------------------------------------------------------------------------------ */

typedef bool slice_fn(const struct lora_job *j, const struct target *t, int part, int slice,
                      int tok0, int tok1);

static inline void lora_range(struct lora_job *j, int begin, int end, slice_fn *fn)
{
    const struct kn_lora *a = j->a;
    for (int i = begin; i < end; i++) {
        int slice = i % j->work_slices, rest = i / j->work_slices;
        int tokens = rest % j->token_slices, part = rest / j->token_slices % a->n_parts;
        int seg = rest / j->token_slices / a->n_parts;
        const struct kn_lora_seg *g = &a->batch.segs[seg];
        int tok0 = tokens * j->slice_tokens, tok1 = LM_MIN(g->n_tok, tok0 + j->slice_tokens);
        struct target t;
        if (tok0 >= tok1)
            continue;
        if (find_target(a, seg, part, &t) != LM_OK ||
            !fn(j, &t, part, slice, g->tok0 + tok0, g->tok0 + tok1))
            atomic_store_explicit(&j->fault, 1, memory_order_relaxed);
    }
}

static void shrink_range(void *ctx, int slot, int begin, int end)
{
    (void)slot;
    lora_range(ctx, begin, end, shrink_slice);
}

static void expand_range(void *ctx, int slot, int begin, int end)
{
    (void)slot;
    lora_range(ctx, begin, end, expand_slice);
}

static const char *lora_fault(const struct kn_lora *a)
{
    const struct kn_lora_batch *b = &a->batch;
    if (!a->h || !b->segs || !b->block_ids || a->in < 0 || a->n_parts < 1 || a->n_parts > 3)
        return "null pointer or bad part count";
    if (!cpu_pool_valid(&a->pool, a->layer))
        return "bad pool, or the layer is outside of it";
    for (int p = 0; p < a->n_parts; p++)
        if ((unsigned)a->part[p].module >= KN_MODULES || a->part[p].out <= 0 ||
            a->part[p].y_col < 0)
            return "bad part";
    for (int i = 0; i < b->n_segs; i++) {
        const struct kn_lora_seg *s = &b->segs[i];
        if (s->tok0 < 0 || s->n_tok < 0 || s->n_tok > b->n_tok - s->tok0 || s->block0 < 0 ||
            s->rank_max < 0 || s->h0 < 0 ||
            s->h0 + (int64_t)s->n_tok * s->rank_max > b->h_rows)
            return "a segment is out of range";
    }
    return NULL;
}

static lm_status run_job(kn_stream *s, const struct kn_lora *a, const char *name, int64_t width,
                         cpu_range_fn *fn)
{
    if (a->batch.n_segs <= 0)
        return a->batch.n_segs == 0 ? LM_OK : cpu_refuse(name, "negative segment count");
    const char *fault = lora_fault(a);
    if (fault)
        return cpu_refuse(name, fault);
    struct cpu_stream *st = cpu_stream_of(s);
    const int threads = st->dev->threads;
    struct lora_job j = { .a = a, .v = st->dev->v };
    int longest = 1;
    for (int i = 0; i < a->batch.n_segs; i++)
        longest = LM_MAX(longest, a->batch.segs[i].n_tok);
    j.slice_tokens = LM_MAX(TOKEN_BLOCK, LM_DIV_UP(longest, 4 * threads));
    j.token_slices = LM_DIV_UP(longest, j.slice_tokens);
    int items = a->batch.n_segs * a->n_parts * j.token_slices;
    j.work_slices = items < 2 * threads ? LM_DIV_UP(2 * threads, items) : 1;
    items *= j.work_slices;
    int64_t work = a->batch.h_rows * a->n_parts * width / 16;
    cpu_parallel(st, items, LM_MAX(1, items / (threads * 8)), work, fn, &j);
    return atomic_load(&j.fault) ? cpu_refuse(name, "an adapter's cells are damaged") : LM_OK;
}

lm_status cpu_op_lora_shrink(kn_stream *s, const struct kn_lora *a)
{
    if (a->batch.n_segs > 0 && (!a->x || (a->batch.n_tok > 1 && a->ldx < a->in)))
        return cpu_refuse("lora_shrink", "no x, or a row stride shorter than a row");
    return run_job(s, a, "lora_shrink", a->in, shrink_range);
}

lm_status cpu_op_lora_expand(kn_stream *s, const struct kn_lora *a)
{
    if (a->batch.n_segs > 0 && !a->y)
        return cpu_refuse("lora_expand", "no y");
    int64_t out = 0;
    for (int p = 0; p < a->n_parts && p < 3; p++)
        out += a->part[p].out;
    return run_job(s, a, "lora_expand", out / LM_MAX(a->n_parts, 1), expand_range);
}

/* ---- merge ----------------------------------------------------------------------------- */

#define MERGE_TILE 256          /* columns summed at a time */

struct merge_job {
    const struct kn_lora_merge *m;
    struct kn_lora a;           /* what finds the module in the pool */
    struct kn_lora_seg seg;
    struct target t;
    atomic_int fault;
};

/* One row of the weight: acc[k] = sum over j of B[j][row] A[j][k], in tiles of columns. */
static bool merge_row(const struct merge_job *j, int row)
{
    const struct kn_lora_entry *e = j->t.entry;
    struct cpu_mat *w = (struct cpu_mat *)j->m->w;
    struct chunks walk_a, walk_b;
    if (!chunks_seek(&walk_b, &j->t, &e->b, row / e->b.width) ||
        !chunks_seek(&walk_a, &j->t, &e->a, 0))
        return false;
    const float *b = chunks_next(&walk_b);
    for (int i = 0; i < j->m->in; i += e->a.width) {
        const float *chunk = chunks_next(&walk_a);
        int cols = LM_MIN(e->a.width, j->m->in - i);
        if (!b || !chunk)
            return false;
        for (int k0 = 0; k0 < cols; k0 += MERGE_TILE) {
            float acc[MERGE_TILE] = { 0 };
            int n = LM_MIN(MERGE_TILE, cols - k0);
            for (int r = 0; r < e->rank; r++) {
                float f = b[r * e->b.width + row % e->b.width];
                const float *x = chunk + (int64_t)r * e->a.width + k0;
                for (int k = 0; k < n; k++)
                    acc[k] += f * x[k];
            }
            cpu_mat_add(w, j->m->row0 + row, i + k0, acc, e->scale, n);
        }
    }
    return true;
}

static void merge_range(void *ctx, int slot, int begin, int end)
{
    struct merge_job *j = ctx;
    (void)slot;
    for (int i = begin; i < end; i++)
        if (!merge_row(j, i))
            atomic_store_explicit(&j->fault, 1, memory_order_relaxed);
}

static const char *merge_fault(const struct kn_lora_merge *a)
{
    if (!a->w || !a->block_ids)
        return "null pointer";
    if (!cpu_pool_valid(&a->pool, a->layer))
        return "bad pool, or the layer is outside of it";
    if ((unsigned)a->module >= KN_MODULES || a->row0 < 0 || a->out <= 0 || a->in <= 0 ||
        a->out > a->w->rows - a->row0 || a->in > a->w->cols)
        return "the module does not fit the weight";
    return NULL;
}

lm_status cpu_op_lora_merge(kn_stream *s, const struct kn_lora_merge *a)
{
    const char *fault = merge_fault(a);
    if (fault)
        return cpu_refuse("lora_merge", fault);
    if (a->w->dtype == KN_E4M3)
        return LM_UNSUPPORTED;
    struct merge_job j = {
        .m = a, .seg = { .n_tok = 1, .rank_max = INT32_MAX },
        .a = { .in = a->in, .pool = a->pool, .layer = a->layer, .n_parts = 1,
               .part = { { a->module, 0, a->out } }, .batch = { .block_ids = a->block_ids } },
    };
    j.a.batch.segs = &j.seg;
    if (find_target(&j.a, 0, 0, &j.t) != LM_OK)
        return cpu_refuse("lora_merge", "an adapter's cells are damaged");
    if (!j.t.entry)
        return LM_OK;
    int64_t work = (int64_t)a->out * a->in * j.t.entry->rank / 8;
    cpu_parallel(cpu_stream_of(s), a->out, CPU_PANEL, work, merge_range, &j);
    return atomic_load(&j.fault) ? cpu_refuse("lora_merge", "an adapter's cells are damaged")
                                 : LM_OK;
}
