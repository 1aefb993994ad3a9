/* SPDX-License-Identifier: Apache-2.0 */
/*
 * LoRA shrink and expand from pool cells against the CPU twin. Axes (those of Punica's tests):
 * adapter popularity (identical, distinct, uniform, skewed, Zipf), base-only rows between, ranks 1
 * to 300 in one batch, batch {1, 2, 3, 7, 33, 133}, modules that are not targeted, cells so small
 * that a matrix spreads over many, widths that are multiples of nothing, segments from one token to
 * hundreds.
 *
 * The image is written here from the layout's description in kernels.h, once for each side, whose
 * elements differ in size.
 *
 * Tolerance. h is a float32 sum of exact products on both sides: relative 2^-20 of the sum of the
 * magnitudes. Expand takes h as two bf16 (relative 2^-16), and rounds y to bf16 once (2^-8).
 */
#include "tests/twin/twin.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LAYERS 3
#define MAX_ADAPTERS 140
#define MAX_TOKENS 1600
#define H_TOL 0x1p-20
#define EXPAND_TOL (0x1p-16 + 2 * H_TOL)

struct adapter {
    int rank[LAYERS][KN_MODULES];       /* 0: not targeted */
    int rank_max, block0;
    float scale;
    float *a[LAYERS][KN_MODULES], *b[LAYERS][KN_MODULES];       /* [rank, in], [rank, out] */
};

struct bed {
    struct twin *c;
    int in, out[3], n_parts, cell, width;       /* cell: elements */
    struct kn_pool pool[2];     /* gpu, cpu */
    int32_t *ids[2];            /* host copies of the block tables */
    int n_ids[2], block0[2][MAX_ADAPTERS];
    int n_adapters;
    struct adapter ad[MAX_ADAPTERS];
};

/* ---- writing an image ------------------------------------------------------------------ */

struct image {
    char *cells;
    int n_cells, cell_bytes, elem;
    int cell, offset;           /* first free byte */
};

static char *image_cell(struct image *m, int cell)
{
    if (cell >= m->n_cells) {
        m->cells = realloc(m->cells, (size_t)(cell + 1) * (size_t)m->cell_bytes);
        memset(m->cells + (size_t)m->n_cells * (size_t)m->cell_bytes, 0xff,
               (size_t)(cell + 1 - m->n_cells) * (size_t)m->cell_bytes);
        m->n_cells = cell + 1;
    }
    return m->cells + (size_t)cell * (size_t)m->cell_bytes;
}

static void put_element(const struct image *m, char *chunk, int i, float v)
{
    if (m->elem == 4)
        memcpy(chunk + i * 4, &v, 4);
    else
        memcpy(chunk + i * 2, &(uint16_t){ tw_bits(v) }, 2);
}

static struct kn_lora_matrix write_matrix(struct image *m, int want_width, const float *w, int rank,
                                          int cols)
{
    struct kn_lora_matrix k = { .width = LM_MIN(want_width, m->cell_bytes / m->elem / rank) };
    if (k.width > 8)
        k.width &= ~7;          /* as an adapter's packer would */
    k.width = LM_MAX(1, k.width);
    k.chunk_bytes = LM_DIV_UP(rank * k.width * m->elem, 16) * 16;
    while (k.chunk_bytes > m->cell_bytes)
        k.chunk_bytes = LM_DIV_UP(rank * --k.width * m->elem, 16) * 16;
    int n = LM_DIV_UP(cols, k.width);
    k.cell = m->cell, k.offset = m->offset;
    k.first_n = LM_MIN(n, (m->cell_bytes - m->offset) / k.chunk_bytes);
    k.per_cell = m->cell_bytes / k.chunk_bytes;
    for (int c = 0; c < n; c++) {
        int cell = c < k.first_n ? k.cell : k.cell + 1 + (c - k.first_n) / k.per_cell;
        int at = c < k.first_n ? k.offset + c * k.chunk_bytes
                               : (c - k.first_n) % k.per_cell * k.chunk_bytes;
        char *chunk = image_cell(m, cell) + at;
        for (int j = 0; j < rank; j++)
            for (int i = 0; i < k.width; i++) {
                int col = c * k.width + i;
                put_element(m, chunk, j * k.width + i, col < cols ? w[j * cols + col] : 0);
            }
        m->cell = cell, m->offset = at + k.chunk_bytes;
    }
    return k;
}

static void write_image(const struct bed *t, const struct adapter *ad, struct image *m)
{
    const int per = m->cell_bytes / (int)sizeof(struct kn_lora_row);
    m->cell = (LAYERS - 1) / per;
    m->offset = LM_DIV_UP(((LAYERS - 1) % per + 1) * (int)sizeof(struct kn_lora_row), 16) * 16;
    if (m->offset > m->cell_bytes)
        m->cell++, m->offset = 0;
    for (int l = 0; l < LAYERS; l++) {
        struct kn_lora_row row = { 0 };
        for (int p = 0; p < t->n_parts; p++) {
            int r = ad->rank[l][p];
            if (!r)
                continue;
            row.module[p].rank = r;
            row.module[p].scale = ad->scale;
            row.module[p].a = write_matrix(m, t->width, ad->a[l][p], r, t->in);
            row.module[p].b = write_matrix(m, t->width, ad->b[l][p], r, t->out[p]);
        }
        memcpy(image_cell(m, l / per) + l % per * (int)sizeof row, &row, sizeof row);
    }
}

/* ---- the bed --------------------------------------------------------------------------- */

static void adapter_init(struct bed *t, struct adapter *ad, int rank)
{
    *ad = (struct adapter){ .scale = tw_value() + 1.5f };
    for (int l = 0; l < LAYERS; l++)
        for (int p = 0; p < t->n_parts; p++) {
            /* Patterns: other ranks on some layers, some modules not targeted at all. */
            int r = tw_int(0, 3) == 0 ? tw_int(0, rank) : rank;
            ad->rank[l][p] = r;
            ad->rank_max = LM_MAX(ad->rank_max, r);
            ad->a[l][p] = tw_floats((size_t)(r * t->in));
            ad->b[l][p] = tw_floats((size_t)(r * t->out[p]));
        }
}

/* One side's pool: images one after the other, their blocks backwards, block 0 unused. */
static void side_fill(struct bed *t, int which)
{
    struct side *s = which == 0 ? &t->c->gpu : &t->c->cpu;
    const int elem = (int)kn_dtype_size(s->props.lora);
    struct image *img = calloc((size_t)t->n_adapters, sizeof *img);
    int blocks = 0;
    for (int i = 0; i < t->n_adapters; i++) {
        img[i].elem = elem;
        img[i].cell_bytes = t->cell * elem;
        write_image(t, &t->ad[i], &img[i]);
        t->block0[which][i] = blocks;
        blocks += LM_DIV_UP(img[i].n_cells, LAYERS);
    }
    const int64_t cell = t->cell * elem;
    struct kn_pool *pool = &t->pool[which];
    *pool = (struct kn_pool){ .num_blocks = blocks + 1, .n_layers = LAYERS, .block_bytes = cell };
    char *all = malloc((size_t)(LAYERS * (blocks + 1) * cell));
    memset(all, 0xff, (size_t)(LAYERS * (blocks + 1) * cell));
    t->ids[which] = malloc((size_t)blocks * sizeof **t->ids);
    t->n_ids[which] = blocks;
    for (int i = 0; i < blocks; i++)
        t->ids[which][i] = blocks - i;
    for (int i = 0; i < t->n_adapters; i++) {
        for (int c = 0; c < img[i].n_cells; c++) {
            int64_t block = t->ids[which][t->block0[which][i] + c / LAYERS];
            memcpy(all + ((c % LAYERS) * (int64_t)(blocks + 1) + block) * cell,
                   img[i].cells + c * cell, (size_t)cell);
        }
        free(img[i].cells);
    }
    pool->base = side_put(t->c, s, all, (size_t)(LAYERS * (blocks + 1) * cell));
    free(all);
    free(img);
}

static void bed_open(struct bed *t, struct twin *c, int in, const int *out, int n_parts, int cell,
                     int width, int n_adapters, const int *ranks, int n_ranks)
{
    *t = (struct bed){ .c = c, .in = in, .n_parts = n_parts, .cell = cell, .width = width,
                       .n_adapters = n_adapters };
    memcpy(t->out, out, (size_t)n_parts * sizeof *out);
    for (int i = 0; i < n_adapters; i++)
        adapter_init(t, &t->ad[i], ranks[i % n_ranks]);
    side_fill(t, 0);
    side_fill(t, 1);
}

static void bed_close(struct bed *t)
{
    for (int i = 0; i < t->n_adapters; i++)
        for (int l = 0; l < LAYERS; l++)
            for (int p = 0; p < t->n_parts; p++)
                free(t->ad[i].a[l][p]), free(t->ad[i].b[l][p]);
    free(t->ids[0]), free(t->ids[1]);
}

/* ---- a batch --------------------------------------------------------------------------- */

struct batch {
    int n, layer, ldx, ldy, n_segs, max_seg, max_rank;
    int64_t h_rows;
    int who[MAX_TOKENS];        /* adapter of each token, -1: base only */
    struct kn_lora_seg segs[MAX_TOKENS];
    struct kn_lora_load load[KN_MODULES];
    float *x, *y;               /* inputs */
    float *h[2], *got[2];       /* results: gpu, cpu */
};

static void batch_segments(struct batch *b, const struct bed *t)
{
    b->n_segs = 0;
    for (int i = 0; i < b->n; i++) {
        if (b->who[i] < 0)
            continue;
        const struct adapter *ad = &t->ad[b->who[i]];
        if (i == 0 || b->who[i] != b->who[i - 1])
            b->segs[b->n_segs++] = (struct kn_lora_seg){ .tok0 = i, .rank_max = ad->rank_max,
                                                         .h0 = (int32_t)b->h_rows };
        struct kn_lora_seg *seg = &b->segs[b->n_segs - 1];
        seg->n_tok++;
        b->max_seg = LM_MAX(b->max_seg, seg->n_tok);
        b->max_rank = LM_MAX(b->max_rank, ad->rank_max);
        b->h_rows += ad->rank_max;
        for (int p = 0; p < t->n_parts; p++) {
            int rank = 0;
            for (int l = 0; l < LAYERS; l++)
                rank = LM_MAX(rank, ad->rank[l][p]);
            b->load[p].rank_tok += rank;
            b->load[p].rank_sum += seg->n_tok == 1 ? rank : 0;
        }
    }
}

static void run_side(struct batch *b, struct bed *t, int which)
{
    struct twin *c = t->c;
    struct side *s = which == 0 ? &c->gpu : &c->cpu;
    struct kn_lora_seg *segs = malloc((size_t)(b->n_segs + 1) * sizeof *segs);
    memcpy(segs, b->segs, (size_t)b->n_segs * sizeof *segs);
    for (int i = 0; i < b->n_segs; i++)
        segs[i].block0 = t->block0[which][b->who[segs[i].tok0]];
    size_t n_y = (size_t)b->n * (size_t)b->ldy, n_h = (size_t)(b->h_rows * t->n_parts);
    struct kn_lora a = {
        .h = side_new(c, s, n_h * sizeof(float)),
        .x = side_put_act(c, s, b->x, (size_t)b->n * (size_t)b->ldx),
        .y = side_put_act(c, s, b->y, n_y), .ldx = b->ldx, .ldy = b->ldy, .in = t->in,
        .pool = t->pool[which], .layer = b->layer, .n_parts = t->n_parts,
        .batch = { .segs = side_put(c, s, segs, (size_t)b->n_segs * sizeof *segs),
                   .block_ids = side_put(c, s, t->ids[which],
                                         (size_t)t->n_ids[which] * sizeof(int32_t)),
                   .n_segs = b->n_segs, .n_tok = b->n, .max_seg_tok = b->max_seg,
                   .max_rank = b->max_rank, .h_rows = b->h_rows },
    };
    memcpy(a.batch.load, b->load, sizeof b->load);
    for (int p = 0, col = 2; p < t->n_parts; col += t->out[p++] + 2)
        a.part[p] = (struct kn_lora_part){ (enum kn_module)p, col, t->out[p] };
    twin_status(c, kn_op_lora_shrink(s->s, &a), LM_OK, "lora_shrink");
    twin_status(c, kn_op_lora_expand(s->s, &a), LM_OK, "lora_expand");
    b->h[which] = malloc((n_h + 1) * sizeof(float));
    b->got[which] = malloc((n_y + 1) * sizeof(float));
    side_get(c, s, a.h, b->h[which], n_h * sizeof(float));
    side_get_act(c, s, a.y, b->got[which], n_y);
    free(segs);
}

static void batch_open(struct batch *b, const struct bed *t, const int *who, int n, int layer,
                       int odd)
{
    *b = (struct batch){ .n = n, .layer = layer, .ldx = t->in + odd, .ldy = 4 + odd };
    for (int p = 0; p < t->n_parts; p++)
        b->ldy += t->out[p] + 2;
    memcpy(b->who, who, (size_t)n * sizeof *who);
    batch_segments(b, t);
    b->x = tw_floats((size_t)n * (size_t)b->ldx);
    b->y = tw_floats((size_t)n * (size_t)b->ldy);
}

static void batch_close(struct batch *b)
{
    free(b->x), free(b->y);
    for (int i = 0; i < 2; i++)
        free(b->h[i]), free(b->got[i]);
}

/* ---- comparison ------------------------------------------------------------------------ */

static void compare_rows(const struct batch *b, const struct bed *t, const struct kn_lora_seg *seg,
                         int tok)
{
    const struct adapter *ad = &t->ad[b->who[tok]];
    double *hm = malloc((size_t)ad->rank_max * sizeof *hm);
    for (int p = 0, col = 2; p < t->n_parts; col += t->out[p++] + 2) {
        const int rank = ad->rank[b->layer][p];
        const float *a = ad->a[b->layer][p], *w = ad->b[b->layer][p];
        int64_t h0 = t->n_parts * (seg->h0 + (int64_t)(tok - seg->tok0) * seg->rank_max) +
                     (int64_t)p * seg->rank_max;
        /* A module that no adapter of the step targets is not launched, and its h is nobody's. */
        for (int j = 0; j < seg->rank_max && b->load[p].rank_sum; j++) {
            double m = 0;
            for (int i = 0; j < rank && i < t->in; i++)
                m += fabs((double)a[j * t->in + i] * (double)b->x[tok * b->ldx + i]);
            twin_near(t->c, "h", tok, j, b->h[0][h0 + j], b->h[1][h0 + j], m * H_TOL);
            if (j < rank)
                hm[j] = m;
        }
        for (int i = 0; i < t->out[p]; i++) {
            double m = 0;
            for (int j = 0; j < rank; j++)
                m += hm[j] * fabs((double)w[j * t->out[p] + i]);
            float want = b->got[1][tok * b->ldy + col + i];
            twin_near(t->c, "y", tok, col + i, b->got[0][tok * b->ldy + col + i], want,
                      fabs((double)want) * 0x1p-8 + m * fabs((double)ad->scale) * EXPAND_TOL);
        }
    }
    free(hm);
}

/* Rows of no segment, and columns of no part, must be what they were, to the last bit. */
static void compare_rest(const struct batch *b, const struct bed *t, int tok)
{
    for (int i = 0; i < b->ldy; i++) {
        bool mine = false;
        for (int p = 0, col = 2; p < t->n_parts; col += t->out[p++] + 2)
            mine = mine || (b->who[tok] >= 0 && i >= col && i < col + t->out[p]);
        if (!mine && b->got[0][tok * b->ldy + i] != b->y[tok * b->ldy + i])
            twin_fail(t->c, "y [%d, %d] was not ours to change", tok, i);
    }
}

static void batch_run(struct batch *b, struct bed *t)
{
    run_side(b, t, 0);
    run_side(b, t, 1);
    /* Of a long segment, its ends and a sample: magnitudes cost the host a matrix product. */
    for (int s = 0; s < b->n_segs; s++)
        for (int i = 0; i < b->segs[s].n_tok; i++)
            if (i < 3 || b->segs[s].n_tok - i < 3 || i % 31 == 0)
                compare_rows(b, t, &b->segs[s], b->segs[s].tok0 + i);
    for (int tok = 0; tok < b->n; tok++)
        compare_rest(b, t, tok);
}

/* ---- axes ------------------------------------------------------------------------------ */

enum popularity { IDENTICAL, DISTINCT, UNIFORM, SKEWED, ZIPF, POPULARITIES };

/* Of n, the first with twice the second's chance, three times the third's, and so on. */
static int draw_zipf(int n)
{
    double all = 0;
    int i = 0;
    for (int k = 1; k <= n; k++)
        all += 1.0 / k;
    double left = (double)tw_int(0, 1 << 30) * 0x1p-30 * all - 1;
    while (left > 0 && i < n - 1)
        left -= 1.0 / (++i + 1);
    return i;
}

static void draw_owners(int *who, int n, int n_adapters, enum popularity pop, bool base_rows)
{
    for (int i = 0; i < n; i++) {
        int a = 0;
        if (pop == DISTINCT)
            a = i % n_adapters;
        else if (pop == UNIFORM)
            a = tw_int(0, n_adapters - 1);
        else if (pop == SKEWED)
            a = tw_int(0, tw_int(0, tw_int(0, n_adapters - 1)));
        else if (pop == ZIPF)
            a = draw_zipf(n_adapters);
        who[i] = base_rows && tw_int(0, 3) == 0 ? -1 : a;
    }
}

static const int mixed_ranks[] = { 8, 1, 16, 3, 64, 5, 2, 33, 12, 7, 31 };

static void check_axes(struct twin *c)
{
    static const int batches[] = { 1, 2, 3, 7, 33, 133 };
    static struct bed t;
    static struct batch b;
    int who[MAX_TOKENS];
    for (size_t i = 0; i < LM_COUNT(batches); i++)
        for (int pop = 0; pop < POPULARITIES; pop++) {
            if (c->slow && batches[i] > 33)
                continue;
            twin_case(c, "lora: %d tokens, popularity %d", batches[i], pop);
            bed_open(&t, c, 96, (int[]){ 72, 40, 40 }, 3, 2048, 64, c->slow ? 33 : 133,
                     mixed_ranks, LM_COUNT(mixed_ranks));
            for (int base = 0; base < 2; base++) {
                draw_owners(who, batches[i], t.n_adapters, (enum popularity)pop, base);
                batch_open(&b, &t, who, batches[i], tw_int(0, LAYERS - 1), 0);
                batch_run(&b, &t);
                batch_close(&b);
            }
            bed_close(&t);
        }
}

/* Widths from 1 up, cells from one directory row up, features that are multiples of nothing. */
static void check_layouts(struct twin *c)
{
    static const int widths[] = { 1, 2, 4, 7, 16, 24, 32, 64, 112, 200, 512 };
    static const int cells[] = { 400, 512, 1024, 8192 };
    static const int small[] = { 1, 4, 9, 20 };
    static struct bed t;
    static struct batch b;
    int who[20];
    for (size_t w = 0; w < LM_COUNT(widths); w++)
        for (size_t k = 0; k < LM_COUNT(cells); k++) {
            int in = k % 2 ? tw_int(1, 130) : tw_int(1, 40) * 8;
            twin_case(c, "lora: %d features, chunks of %d columns, cells of %d", in, widths[w],
                      cells[k]);
            bed_open(&t, c, in, (int[]){ tw_int(1, 90), 33 }, 2, cells[k], widths[w], 4, small,
                     LM_COUNT(small));
            for (int i = 0; i < 20; i++)
                who[i] = i < 9 ? i % 4 : i / 5 % 4;
            batch_open(&b, &t, who, 20, tw_int(0, LAYERS - 1), (int)(k % 2));
            batch_run(&b, &t);
            batch_close(&b);
            bed_close(&t);
        }
}

static void check_ranks(struct twin *c)
{
    static const int ranks[] = { 1, 7, 8, 9, 15, 16, 17, 48, 63, 64, 65, 100, 128, 129, 256, 300 };
    static struct bed t;
    static struct batch b;
    int who[40];
    for (size_t i = 0; i < LM_COUNT(ranks); i++) {
        twin_case(c, "lora: rank %d", ranks[i]);
        bed_open(&t, c, 256, (int[]){ 192, 64 }, 2, 8192, 512, 3, &ranks[i], 1);
        for (int k = 0; k < 40; k++)
            who[k] = k < 1 ? 0 : k < 3 ? 1 : k < 6 ? -1 : 2;
        batch_open(&b, &t, who, 40, 1, 0);
        batch_run(&b, &t);
        batch_close(&b);
        bed_close(&t);
    }
}

/* Long segments, as prefill makes them, and a real model's widths. */
static void check_prefill(struct twin *c)
{
    static const int ranks[] = { 16, 6, 64 };
    static struct bed t;
    static struct batch b;
    int who[MAX_TOKENS], n = c->slow ? 520 : MAX_TOKENS;
    for (int odd = 0; odd < 2; odd++) {
        twin_case(c, "lora: prefill of %d tokens", n);
        bed_open(&t, c, c->slow ? 64 : 1024, (int[]){ c->slow ? 64 : 1024, 96 }, 2, 16384, 512, 3,
                 ranks, odd ? 1 : 3);
        for (int i = 0; i < n; i++)
            who[i] = i < 201 ? 0 : i < 203 ? -1 : i < 204 ? 2 : 1;
        batch_open(&b, &t, who, n, 2, odd * 8);
        batch_run(&b, &t);
        batch_close(&b);
        bed_close(&t);
    }
}

/* A token's update is the same to the last bit whoever else is in the batch, within the bucket of
 * few tokens and within that of many. */
static void check_company(struct twin *c)
{
    static const int ranks[] = { 24, 8 }, sizes[][2] = { { 400, 2 }, { 1000, 600 } };
    static struct bed t;
    static struct batch many, few;
    int who[MAX_TOKENS];
    for (int k = 0; k < 2; k++) {
        const int n = sizes[k][0], same = sizes[k][1] / 2;
        twin_case(c, "lora: a row in other company, %d tokens and %d", n, 2 * same);
        bed_open(&t, c, 200, (int[]){ 96 }, 1, 4096, 64, 2, ranks, 2);
        for (int i = 0; i < n; i++)
            who[i] = i < n / 2 ? 0 : 1;
        batch_open(&many, &t, who, n, 0, 0);
        run_side(&many, &t, 0);
        for (int i = 0; i < n; i++)
            who[i] = i < same ? 0 : 1;
        batch_open(&few, &t, who, 2 * same, 0, 0);
        memcpy(few.x, many.x, (size_t)(same * few.ldx) * sizeof(float));
        memcpy(few.y, many.y, (size_t)(same * few.ldy) * sizeof(float));
        run_side(&few, &t, 0);
        if (memcmp(few.got[0], many.got[0], (size_t)(same * few.ldy) * sizeof(float)))
            twin_fail(c, "neighbours changed a row");
        batch_close(&many), batch_close(&few);
        bed_close(&t);
    }
}

/* Runs the tokens from `at` on in a step of their own, the rest of it base-only, and holds them
 * against the same step with everybody. */
static void check_alone(struct bed *t, const struct batch *all, int at, int n)
{
    static struct batch one;
    int who[MAX_TOKENS];
    for (int i = 0; i < all->n; i++)
        who[i] = i >= at && i < at + n ? all->who[i] : -1;
    batch_open(&one, t, who, all->n, all->layer, 0);
    memcpy(one.x, all->x, (size_t)(all->n * all->ldx) * sizeof(float));
    memcpy(one.y, all->y, (size_t)(all->n * all->ldy) * sizeof(float));
    run_side(&one, t, 0);
    const size_t from = (size_t)(at * all->ldy), len = (size_t)(n * all->ldy) * sizeof(float);
    if (memcmp(one.got[0] + from, all->got[0] + from, len))
        twin_fail(t->c, "others of other ranks changed rows of rank %d",
                  t->ad[all->who[at]].rank_max);
    batch_close(&one);
}

/* Ranks from 8 to 512 in one step: right, and each adapter's rows as without the others, on either
 * side of the ranks and of the sizes of a step at which the way through the kernels changes. */
static void check_ranks_apart(struct twin *c)
{
    static const int ranks[] = { 8, 512, 16, 300, 64, 384, 400, 1 }, sizes[] = { 512, 513 };
    static struct bed t;
    static struct batch b;
    int who[MAX_TOKENS];
    const int n_ranks = LM_COUNT(ranks);
    for (size_t k = 0; k < LM_COUNT(sizes); k++) {
        const int n = sizes[k], each = n / n_ranks;
        twin_case(c, "lora: ranks 1 to 512 in a step of %d tokens", n);
        bed_open(&t, c, 72, (int[]){ 72, 40 }, 2, 8192, 64, n_ranks, ranks, n_ranks);
        for (int i = 0; i < n; i++)
            who[i] = i / each < n_ranks ? i / each : -1;
        batch_open(&b, &t, who, n, 1, 0);
        batch_run(&b, &t);
        for (int i = 0; i < n_ranks; i++)
            check_alone(&t, &b, i * each, each);
        batch_close(&b);
        bed_close(&t);
    }
}

/* As many segments as make the device choose smaller blocks for a step of few tokens: right, and
 * the same bits as in a step of four segments. */
static void check_full(struct twin *c, int tokens, int n_segs)
{
    static struct bed t;
    static struct batch full, four;
    int who[MAX_TOKENS];
    twin_case(c, "lora: %d segments of %d tokens fill the device", n_segs, tokens);
    bed_open(&t, c, 2104, (int[]){ 96, 2048 }, 2, 40000, 512, 3, (int[]){ 8 }, 1);
    for (int i = 0; i < n_segs * tokens; i++)
        who[i] = i / tokens % 3;
    batch_open(&full, &t, who, n_segs * tokens, 0, 0);
    batch_run(&full, &t);
    batch_open(&four, &t, who, 4 * tokens, 0, 0);
    memcpy(four.x, full.x, (size_t)(four.n * four.ldx) * sizeof(float));
    memcpy(four.y, full.y, (size_t)(four.n * four.ldy) * sizeof(float));
    run_side(&four, &t, 0);
    if (memcmp(four.got[0], full.got[0], (size_t)(four.n * four.ldy) * sizeof(float)))
        twin_fail(c, "the number of segments changed a row");
    batch_close(&full), batch_close(&four);
    bed_close(&t);
}

/* Nobody targets part 0: it is left out of the launch. */
static void check_untargeted(struct twin *c)
{
    static struct bed t;
    static struct batch b;
    int who[5] = { 0, 1, -1, 1, 1 };
    twin_case(c, "lora: a module that nobody targets");
    bed_open(&t, c, 64, (int[]){ 64, 64 }, 2, 2048, 64, 2, (int[]){ 8, 16 }, 2);
    for (int i = 0; i < 2; i++)
        for (int l = 0; l < LAYERS; l++)
            t.ad[i].rank[l][0] = 0;
    free(t.ids[0]), free(t.ids[1]);     /* made anew, with the image */
    side_fill(&t, 0);
    side_fill(&t, 1);
    batch_open(&b, &t, who, 5, 0, 0);
    batch_run(&b, &t);
    batch_close(&b);
    bed_close(&t);
}

/* ---- merge ----------------------------------------------------------------------------- */

/* The weight after the merge, [in, out] transposed, read through a product with the identity. */
static float *merge_side(struct bed *t, int which, enum kn_dtype type, const float *w, int rows,
                         int layer)
{
    struct twin *c = t->c;
    struct side *s = which == 0 ? &c->gpu : &c->cpu;
    struct lm_err err = { 0 };
    const size_t in = (size_t)t->in;
    kn_mat *m = NULL;
    float *eye = calloc(in * in, sizeof *eye), *out = malloc(in * (size_t)rows * sizeof *out);
    for (size_t i = 0; i < in; i++)
        eye[i * in + i] = 1;
    twin_status(c, kn_mat_new(s->dev, type, rows, t->in, &m, &err), LM_OK, "mat_new");
    twin_status(c, kn_mat_upload(m, 0, 0, rows, t->in, w, KN_F32, in, &err), LM_OK, "mat_upload");
    struct kn_lora_merge a = {
        .w = m, .row0 = rows - t->out[0], .in = t->in, .out = t->out[0],
        .module = (enum kn_module)0, .layer = layer, .pool = t->pool[which],
        .block_ids = side_put(c, s, t->ids[which] + t->block0[which][0],
                              (size_t)(t->n_ids[which] - t->block0[which][0]) * sizeof(int32_t)),
    };
    twin_status(c, kn_op_lora_merge(s->s, &a), LM_OK, "lora_merge");
    struct kn_gemm g = { .y = side_new(c, s, in * (size_t)rows * sizeof *out),
                         .x = side_put_act(c, s, eye, in * in), .w = m, .m = t->in, .ldx = t->in,
                         .ldy = rows, .y_f32 = true };
    twin_status(c, kn_op_gemm(s->s, &g), LM_OK, "gemm");
    side_get(c, s, g.y, out, in * (size_t)rows * sizeof *out);
    kn_mat_free(m);
    free(eye);
    return out;
}

/* Both sides round float32 sums to the weight's type once: where the sums straddle a border they
 * are one unit apart, 2^-7 of the value in bf16 and 2^-10 in float16. */
static void check_merge(struct twin *c, enum kn_dtype type)
{
    static const int ranks[] = { 1, 16, 33 };
    static struct bed t;
    const double unit = type == KN_F16 ? 0x1p-10 : 0x1p-7;
    for (size_t i = 0; i < LM_COUNT(ranks); i++) {
        const int rows = 72 + 16;
        twin_case(c, "lora: merge of rank %d in %s", ranks[i], kn_dtype_name(type));
        bed_open(&t, c, 96, (int[]){ 72 }, 1, 4096, 64, 1, &ranks[i], 1);
        float *w = tw_floats((size_t)(rows * t.in));
        float *got = merge_side(&t, 0, type, w, rows, 1);
        float *want = merge_side(&t, 1, type, w, rows, 1);
        for (int k = 0; k < t.in * rows; k++)
            twin_near(c, "w", k / rows, k % rows, got[k], want[k],
                      fabs((double)want[k]) * unit + 1e-5);
        free(w), free(got), free(want);
        bed_close(&t);
    }
}

bool twin_lora_few(struct twin *c)
{
    check_untargeted(c);
    check_prefill(c);
    check_full(c, 1, 18);
    return twin_end(c, "lora, a few");
}

bool twin_lora(struct twin *c)
{
    bool good = true;
    if (!c->slow)               /* the emulated device multiplies few rows in bf16 */
        check_merge(c, KN_BF16);
    check_merge(c, KN_F16);
    good &= twin_end(c, "lora, merge");
    check_axes(c);
    good &= twin_end(c, "lora, axes");
    check_layouts(c);
    good &= twin_end(c, "lora, layouts");
    check_ranks(c);
    good &= twin_end(c, "lora, ranks");
    check_prefill(c);
    good &= twin_end(c, "lora, prefill");
    check_company(c);
    check_ranks_apart(c);
    check_untargeted(c);
    check_full(c, 2, c->slow ? 10 : 150);       /* 20 or 300 of shrink's blocks */
    check_full(c, 1, c->slow ? 18 : 300);       /* 54 or 900 of expand's */
    good &= twin_end(c, "lora, company");
    return good;
}
