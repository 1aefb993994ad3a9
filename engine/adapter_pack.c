/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_pack.c - writes the cell image that kernels.h (struct kn_lora_row) describes.
 *
 * Two passes. The first lays out: it walks layers and modules in order and gives every matrix its
 * place with a cursor (cell, offset) that only moves forward, starting behind the directory. The
 * second allocates the image once, zeroes it, and fills the chunks: A [rank, in] is copied row by
 * row, B [out, rank] is transposed on the way, both through a float32 tile where every element is
 * checked to be finite before and after it is rounded to the pool's dtype.
 *
 * The image holds no pointer and no block id, so it may be placed anywhere in the pool.
 */
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/adapter_internal.h"

#define ALIGN 16
#define WIDTH_MIN 16
#define WIDTH_MAX 512
#define LITTLE 64               /* padding of less than this share is let pass */

struct cursor {
    int64_t cell, offset, cell_bytes;
};

static int64_t align_up(int64_t x, int64_t a)
{
    return (x + a - 1) / a * a;
}

/* ---- layout ---------------------------------------------------------------------------- */

/* Bytes that a matrix of `n` columns takes beyond its own, from the start of a cell. */
static int64_t padding(int64_t column, int64_t n, int64_t width, int64_t cell_bytes)
{
    int64_t chunk = align_up(column * width, ALIGN), per_cell = cell_bytes / chunk;
    int64_t chunks = LM_DIV_UP(n, width), full = (chunks - 1) / per_cell;
    return chunks * chunk + full * (cell_bytes - per_cell * chunk) - n * column;
}

/* What a width costs: its padding, and half a chunk that the cell before may leave unused. */
static int64_t cost(int64_t column, int64_t n, int64_t width, int64_t cell_bytes)
{
    return padding(column, n, width, cell_bytes) + column * width / 2;
}

/* If this width pads by 1/64 or more, another one: the widest multiple of 32 that pads less than
 * that and of which eight chunks fit a cell; else, of the multiples of 16 bytes of which two fit,
 * the one that costs least. */
static int tighter(int64_t column, int64_t n, int width, int step, int64_t cell_bytes)
{
    int64_t little = n * column / LITTLE, least = cost(column, n, width, cell_bytes);
    if (padding(column, n, width, cell_bytes) <= little)
        return width;
    for (int64_t w = LM_MIN(cell_bytes / 8 / column, WIDTH_MAX) / 32 * 32; w >= 32; w -= 32)
        if (padding(column, n, w, cell_bytes) <= little)
            return (int)w;
    int64_t widest = LM_MIN(cell_bytes / 2 / column, WIDTH_MAX) / step * step;
    for (int64_t w = widest; w >= step; w -= step)
        if (cost(column, n, w, cell_bytes) < least) {
            least = cost(column, n, w, cell_bytes);
            width = (int)w;
        }
    return width;
}

/*
 * The policy. Wide chunks keep vector units and memory bursts busy, narrow ones waste less at the
 * end of a cell (up to one chunk) and at the end of a matrix (up to one chunk of padding). So: the
 * widest power of two up to 512 columns of which eight chunks fit a cell; at least 16 columns, one
 * vector of float32, while that fits a cell at all; then 8 and 4 for a rank that is large against
 * the cell. Where ranks like 24 or 100 don't fill cells with that, a width that does better. Never
 * wider than the matrix.
 */
int adapter_chunk_width(int rank, int64_t n, size_t elem_bytes, int64_t cell_bytes)
{
    int64_t column = (int64_t)rank * (int64_t)elem_bytes;
    int width = WIDTH_MAX;
    while (width > WIDTH_MIN && column * width > cell_bytes / 8)
        width /= 2;
    while (width > 4 && align_up(column * width, ALIGN) > cell_bytes)
        width /= 2;
    if (align_up(column * width, ALIGN) > cell_bytes)
        return 0;
    if (n > width)
        width = tighter(column, n, width, ALIGN / (int)elem_bytes, cell_bytes);
    return (int)LM_MIN(width, align_up(n, LM_MIN(width, WIDTH_MIN)));
}

static lm_status place(struct cursor *at, int rank, int64_t n, size_t elem_bytes,
                       const char *tensor, struct kn_lora_matrix *m, struct lm_err *err)
{
    int width = adapter_chunk_width(rank, n, elem_bytes, at->cell_bytes);
    if (width == 0)
        return lm_err_set(err, LM_TOO_LARGE, "%s: rank %d does not fit a pool block of %lld bytes;"
                          " raise the engine's block_tokens", tensor, rank,
                          (long long)at->cell_bytes);
    int64_t chunk = align_up((int64_t)rank * width * (int64_t)elem_bytes, ALIGN);
    int64_t per_cell = at->cell_bytes / chunk, chunks = LM_DIV_UP(n, width);
    if ((at->cell_bytes - at->offset) / chunk == 0) {
        at->cell++;
        at->offset = 0;
    }
    int64_t first = LM_MIN((at->cell_bytes - at->offset) / chunk, chunks);
    if (at->cell > INT_MAX / 2)
        return lm_err_set(err, LM_TOO_LARGE, "%s: the packed adapter has too many cells", tensor);
    *m = (struct kn_lora_matrix){ .width = width, .cell = (int32_t)at->cell,
        .offset = (int32_t)at->offset, .first_n = (int32_t)first, .per_cell = (int32_t)per_cell,
        .chunk_bytes = (int32_t)chunk };
    int64_t rest = chunks - first;
    if (rest == 0) {
        at->offset += first * chunk;
    } else {
        int64_t last = (rest - 1) / per_cell;       /* full cells before the last one */
        at->cell += 1 + last;
        at->offset = (rest - last * per_cell) * chunk;
    }
    return LM_OK;
}

static const char *slot_name(const struct st_tensor *t)
{
    return t ? t->name : "a matrix";
}

static lm_status lay_out(const struct adapter_plan *plan, const struct model_config *cfg,
                         size_t elem_bytes, struct cursor *at, struct kn_lora_row *rows,
                         struct lm_err *err)
{
    int64_t per_cell = at->cell_bytes / (int64_t)sizeof *rows;
    if (per_cell == 0 || at->cell_bytes > INT_MAX || at->cell_bytes % ALIGN)
        return lm_err_set(err, LM_INVALID, "pool blocks of %lld bytes cannot hold adapters: a"
                          " multiple of %d from %zu bytes is needed; raise the engine's"
                          " block_tokens", (long long)at->cell_bytes, ALIGN, sizeof *rows);
    at->cell = (plan->n_layers - 1) / per_cell;
    at->offset = align_up((plan->n_layers - at->cell * per_cell) * (int64_t)sizeof *rows, ALIGN);
    for (int l = 0; l < plan->n_layers; l++) {
        for (int m = 0; m < KN_MODULES; m++) {
            const struct adapter_slot *slot = &plan->slots[l][m];
            struct kn_lora_entry *e = &rows[l].module[m];
            if (slot->rank == 0)
                continue;
            int64_t in, out;
            adapter_module_shape(cfg, (enum kn_module)m, &in, &out);
            e->rank = slot->rank;
            e->scale = slot->scale;
            lm_status s = place(at, slot->rank, in, elem_bytes, slot_name(slot->a), &e->a, err);
            if (!s)
                s = place(at, slot->rank, out, elem_bytes, slot_name(slot->b), &e->b, err);
            if (s)
                return s;
        }
    }
    return LM_OK;
}

/* ---- numbers --------------------------------------------------------------------------- */

static float from_bits(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static uint32_t to_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00)
        return from_bits(sign | 0x7f800000 | magnitude << 13);
    /* The exponent's bias differs by 112; multiplying also puts subnormals right. */
    return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
}

/* Round to nearest, ties to even; overflow gives infinity, which the caller refuses. */
static uint16_t f32_to_f16(float f)
{
    uint32_t u = to_bits(f), sign = u >> 16 & 0x8000;
    float a = fabsf(f);
    if (a >= 65520.0f)
        return (uint16_t)(sign | 0x7c00);
    if (a < 0x1p-14f)           /* subnormal: the sum's last place is 2^-24 and rounds for us */
        return (uint16_t)(sign | (to_bits(a + 0.5f) - 0x3f000000));
    u = (u & 0x7fffffff) - (112u << 23);
    return (uint16_t)(sign | (u + 0xfff + (u >> 13 & 1)) >> 13);
}

static uint16_t f32_to_bf16(float f)
{
    uint32_t u = to_bits(f);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

/* Elements at.. at + n - 1 of a tensor as float32. */
static void widen(const struct st_tensor *t, int64_t at, int64_t n, float *dst)
{
    const uint16_t *half = (const uint16_t *)t->data + (t->dtype == KN_F32 ? 0 : at);
    if (t->dtype == KN_F32)
        memcpy(dst, (const float *)t->data + at, (size_t)n * sizeof *dst);
    else if (t->dtype == KN_BF16)
        for (int64_t i = 0; i < n; i++)
            dst[i] = from_bits((uint32_t)half[i] << 16);
    else
        for (int64_t i = 0; i < n; i++)
            dst[i] = f16_to_f32(half[i]);
}

static bool all_finite(const float *src, int64_t n)
{
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++)
        bad |= (to_bits(src[i]) & 0x7f800000) == 0x7f800000;
    return !bad;
}

/* float32 to the pool's dtype; false if a value is too large for it. */
static bool narrow(const float *src, int64_t n, enum kn_dtype t, void *dst)
{
    uint16_t *half = dst, infinity = t == KN_F16 ? 0x7c00 : 0x7f80;
    bool bad = false;
    if (t == KN_F32) {
        memcpy(dst, src, (size_t)n * sizeof *src);
        return true;
    }
    if (t == KN_F16)
        for (int64_t i = 0; i < n; i++)
            half[i] = f32_to_f16(src[i]);
    else
        for (int64_t i = 0; i < n; i++)
            half[i] = f32_to_bf16(src[i]);
    for (int64_t i = 0; i < n; i++)
        bad |= (half[i] & 0x7fff) >= infinity;
    return !bad;
}

/* ---- filling --------------------------------------------------------------------------- */

struct filler {
    const struct st_tensor *t;
    bool transposed;            /* B: element (j, i) lies at [i][j] */
    int rank;
    int64_t n;                  /* long dimension */
    enum kn_dtype dtype;
    float *tile;                /* a chunk in float32 */
    float *row;                 /* [rank] */
    struct lm_err *err;
};

static uint8_t *chunk_at(const struct adapter_image *img, const struct kn_lora_matrix *m, int64_t k)
{
    int64_t cell = m->cell, offset = m->offset + k * m->chunk_bytes;
    if (k >= m->first_n) {
        k -= m->first_n;
        cell += 1 + k / m->per_cell;
        offset = k % m->per_cell * m->chunk_bytes;
    }
    return img->cells + cell * img->cell_bytes + offset;
}

/* Columns i0 .. i0 + cols - 1 of the matrix into the tile, rows `width` apart. */
static void load_tile(const struct filler *f, int64_t i0, int64_t cols, int width)
{
    if (cols < width)
        memset(f->tile, 0, (size_t)f->rank * (size_t)width * sizeof *f->tile);
    for (int j = 0; j < f->rank && !f->transposed; j++)
        widen(f->t, j * f->n + i0, cols, f->tile + (int64_t)j * width);
    for (int64_t i = 0; i < cols && f->transposed; i++) {
        widen(f->t, (i0 + i) * f->rank, f->rank, f->row);
        for (int j = 0; j < f->rank; j++)
            f->tile[(int64_t)j * width + i] = f->row[j];
    }
}

static lm_status fill_chunk(const struct filler *f, int64_t i0, int width, void *chunk)
{
    int64_t count = (int64_t)f->rank * width;
    load_tile(f, i0, LM_MIN(width, f->n - i0), width);
    if (!all_finite(f->tile, count))
        return lm_err_set(f->err, LM_INVALID, ADAPTER_WEIGHTS_FILE ": tensor %s has an element that"
                          " is not finite", f->t->name);
    if (!narrow(f->tile, count, f->dtype, chunk))
        return lm_err_set(f->err, LM_INVALID, ADAPTER_WEIGHTS_FILE ": tensor %s has an element too"
                          " large for %s", f->t->name, kn_dtype_name(f->dtype));
    return LM_OK;
}

static lm_status fill_matrix(const struct filler *f, const struct kn_lora_matrix *m,
                             struct adapter_image *img)
{
    lm_status s = LM_OK;
    for (int64_t k = 0; k * m->width < f->n && !s; k++)
        s = fill_chunk(f, k * m->width, m->width, chunk_at(img, m, k));
    return s;
}

static lm_status fill_slot(struct filler *f, const struct adapter_slot *slot, int64_t in,
                           int64_t out, const struct kn_lora_entry *e, struct adapter_image *img)
{
    f->rank = slot->rank;
    f->t = slot->a;
    f->n = in;
    f->transposed = false;
    lm_status s = fill_matrix(f, &e->a, img);
    f->t = slot->b;
    f->n = out;
    f->transposed = true;
    return s ? s : fill_matrix(f, &e->b, img);
}

static lm_status fill(const struct adapter_plan *plan, const struct model_config *cfg,
                      struct filler *f, const struct kn_lora_row *rows, struct adapter_image *img)
{
    int64_t per_cell = img->cell_bytes / (int64_t)sizeof *rows;
    lm_status s = LM_OK;
    for (int l = 0; l < plan->n_layers; l++) {
        memcpy(img->cells + l / per_cell * img->cell_bytes +
               l % per_cell * (int64_t)sizeof *rows, &rows[l], sizeof *rows);
        for (int m = 0; m < KN_MODULES && !s; m++) {
            const struct adapter_slot *slot = &plan->slots[l][m];
            int64_t in, out;
            if (slot->rank == 0)
                continue;
            adapter_module_shape(cfg, (enum kn_module)m, &in, &out);
            s = fill_slot(f, slot, in, out, &rows[l].module[m], img);
        }
    }
    return s;
}

/* All of an image but its cells and digest. */
static void set_sizes(const struct adapter_plan *plan, const struct cursor *end,
                      struct adapter_image *img)
{
    img->cells = NULL;
    img->n_cells = (int)end->cell + 1;
    img->cell_bytes = end->cell_bytes;
    img->rank_max = 0;
    memset(img->module_rank, 0, sizeof img->module_rank);
    for (int l = 0; l < plan->n_layers; l++) {
        for (int m = 0; m < KN_MODULES; m++) {
            int rank = plan->slots[l][m].rank;
            img->module_rank[m] = LM_MAX(img->module_rank[m], rank);
            img->rank_max = LM_MAX(img->rank_max, rank);
        }
    }
}

lm_status adapter_pack_size(const struct adapter_plan *plan, const struct model_config *cfg,
                            enum kn_dtype dtype, int64_t cell_bytes, struct adapter_image *out,
                            struct lm_err *err)
{
    struct cursor at = { .cell_bytes = cell_bytes };
    struct kn_lora_row *rows = lm_calloc((size_t)plan->n_layers, sizeof *rows);
    if (!rows)
        return lm_err_set(err, LM_NOMEM, "no memory for the adapter's directory");
    lm_status s = lay_out(plan, cfg, kn_dtype_size(dtype), &at, rows, err);
    if (!s)
        set_sizes(plan, &at, out);
    free(rows);
    return s;
}

static void *image_alloc(const struct adapter_alloc *a, size_t bytes)
{
    return a ? a->alloc(a->ctx, bytes) : lm_malloc(bytes);
}

lm_status adapter_pack(const struct adapter_plan *plan, const struct model_config *cfg,
                       enum kn_dtype dtype, int64_t cell_bytes, const struct adapter_alloc *alloc,
                       struct adapter_image *out, struct lm_err *err)
{
    struct cursor at = { .cell_bytes = cell_bytes };
    struct filler f = { .dtype = dtype, .err = err };
    struct kn_lora_row *rows = lm_calloc((size_t)plan->n_layers, sizeof *rows);
    out->cells = NULL;
    if (!rows)
        return lm_err_set(err, LM_NOMEM, "no memory for the adapter's directory");
    lm_status s = lay_out(plan, cfg, kn_dtype_size(dtype), &at, rows, err);
    if (s)
        goto out;
    size_t bytes, tile = (size_t)cell_bytes / kn_dtype_size(dtype);     /* a chunk fits a cell */
    f.tile = lm_calloc(tile + ADAPTER_MAX_RANK, sizeof *f.tile);
    f.row = f.tile ? f.tile + tile : NULL;
    set_sizes(plan, &at, out);
    if (!f.tile || __builtin_mul_overflow((size_t)out->n_cells, (size_t)cell_bytes, &bytes) ||
        !(out->cells = image_alloc(alloc, bytes))) {
        s = lm_err_set(err, LM_NOMEM, "no memory for an adapter of %d cells of %lld bytes",
                       out->n_cells, (long long)cell_bytes);
        goto out;
    }
    memset(out->cells, 0, bytes);
    s = fill(plan, cfg, &f, rows, out);
    if (s)
        adapter_image_release(out, alloc);
out:
    free(f.tile);
    free(rows);
    return s;
}

void adapter_image_release(struct adapter_image *img, const struct adapter_alloc *alloc)
{
    if (img->cells && alloc)
        alloc->free(alloc->ctx, img->cells);
    else
        free(img->cells);
    img->cells = NULL;
    img->n_cells = 0;
}
