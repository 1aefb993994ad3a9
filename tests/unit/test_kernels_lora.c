/* SPDX-License-Identifier: Apache-2.0 */
/*
 * LoRA shrink and expand from pool cells. Axes (those of Punica's tests): adapter popularity
 * {identical, distinct, uniform, skewed}, base-only rows between, ranks 1 to 64 in one batch (not
 * multiples of anything), batch {1, 2, 3, 7, 33, 133}, modules that an adapter does not target, and
 * cells so small that a matrix spreads over many. The image is written here from the layout's
 * description in kernels.h, by a second, element-wise author.
 */
#include "tests/unit/test_kernels_util.h"

#define LAYERS 3
#define MAX_ADAPTERS 140

struct adapter {
    int rank[LAYERS][KN_MODULES];       /* 0: not targeted */
    int rank_max, n_cells, block0;
    float scale;
    float *a[LAYERS][KN_MODULES], *b[LAYERS][KN_MODULES];       /* [rank, in], [rank, out] */
    char *image;                        /* [n_cells, cell] */
};

struct bed {
    struct env *e;
    int in, out[3], n_parts, cell, width;
    struct kn_pool pool;
    int32_t *ids;
    int n_ids, n_adapters;
    struct adapter ad[MAX_ADAPTERS];
};

/* ---- writing an image ------------------------------------------------------------------ */

struct cursor {
    int cell, offset;           /* first free byte */
};

static char *image_cell(struct bed *t, struct adapter *ad, int cell)
{
    if (cell >= ad->n_cells) {
        ad->image = realloc(ad->image, (size_t)(cell + 1) * (size_t)t->cell);
        memset(ad->image + (size_t)ad->n_cells * (size_t)t->cell, 0xff,
               (size_t)(cell + 1 - ad->n_cells) * (size_t)t->cell);
        ad->n_cells = cell + 1;
    }
    return ad->image + (size_t)cell * (size_t)t->cell;
}

static struct kn_lora_matrix write_matrix(struct bed *t, struct adapter *ad, struct cursor *c,
                                          const float *w, int rank, int cols)
{
    struct kn_lora_matrix m = { .width = LM_MAX(1, LM_MIN(t->width, t->cell / 4 / rank)) };
    m.chunk_bytes = LM_DIV_UP(rank * m.width * 4, 16) * 16;
    if (m.chunk_bytes > t->cell) {
        m.width = LM_MAX(1, m.width - 4);
        m.chunk_bytes = LM_DIV_UP(rank * m.width * 4, 16) * 16;
    }
    assert_true(m.chunk_bytes <= t->cell);
    int n = LM_DIV_UP(cols, m.width);
    m.cell = c->cell, m.offset = c->offset;
    m.first_n = LM_MIN(n, (t->cell - c->offset) / m.chunk_bytes);
    m.per_cell = t->cell / m.chunk_bytes;
    for (int k = 0; k < n; k++) {
        int cell = k < m.first_n ? m.cell : m.cell + 1 + (k - m.first_n) / m.per_cell;
        int at = k < m.first_n ? m.offset + k * m.chunk_bytes
                               : (k - m.first_n) % m.per_cell * m.chunk_bytes;
        float *chunk = (float *)(image_cell(t, ad, cell) + at);
        for (int j = 0; j < rank; j++)
            for (int i = 0; i < m.width; i++) {
                int col = k * m.width + i;
                chunk[j * m.width + i] = col < cols ? w[j * cols + col] : 0.0f;
            }
        *c = (struct cursor){ cell, at + m.chunk_bytes };
    }
    return m;
}

static void write_image(struct bed *t, struct adapter *ad)
{
    const int per = t->cell / (int)sizeof(struct kn_lora_row);
    struct cursor c = { (LAYERS - 1) / per, 0 };
    c.offset = ((LAYERS - 1) % per + 1) * (int)sizeof(struct kn_lora_row);
    c.offset = LM_DIV_UP(c.offset, 16) * 16;
    if (c.offset > t->cell)
        c = (struct cursor){ c.cell + 1, 0 };
    for (int l = 0; l < LAYERS; l++) {
        struct kn_lora_row row = { 0 };
        for (int p = 0; p < t->n_parts; p++) {
            int r = ad->rank[l][p];
            if (!r)
                continue;
            row.module[p].rank = r;
            row.module[p].scale = ad->scale;
            row.module[p].a = write_matrix(t, ad, &c, ad->a[l][p], r, t->in);
            row.module[p].b = write_matrix(t, ad, &c, ad->b[l][p], r, t->out[p]);
        }
        memcpy(image_cell(t, ad, l / per) + l % per * (int)sizeof row, &row, sizeof row);
    }
}

static void adapter_init(struct bed *t, struct adapter *ad, int rank)
{
    *ad = (struct adapter){ .scale = rnd_float() + 1.5f };
    for (int l = 0; l < LAYERS; l++)
        for (int p = 0; p < t->n_parts; p++) {
            /* Patterns: other ranks on some layers, some modules not targeted at all. */
            int r = rnd_int(0, 3) == 0 ? rnd_int(0, rank) : rank;
            ad->rank[l][p] = r;
            ad->rank_max = LM_MAX(ad->rank_max, r);
            ad->a[l][p] = rnd_floats((size_t)(r * t->in));
            ad->b[l][p] = rnd_floats((size_t)(r * t->out[p]));
        }
    write_image(t, ad);
}

/* ---- the bed --------------------------------------------------------------------------- */

static void bed_open(struct bed *t, struct env *e, int in, const int *out, int n_parts, int cell,
                     int width, int n_adapters, const int *ranks, int n_ranks)
{
    *t = (struct bed){ .e = e, .in = in, .n_parts = n_parts, .cell = cell, .width = width };
    memcpy(t->out, out, (size_t)n_parts * sizeof *out);
    t->n_adapters = n_adapters;
    int blocks = 0;
    for (int i = 0; i < n_adapters; i++) {
        adapter_init(t, &t->ad[i], ranks[i % n_ranks]);
        t->ad[i].block0 = blocks;
        blocks += LM_DIV_UP(t->ad[i].n_cells, LAYERS);
    }
    t->n_ids = blocks;
    t->ids = malloc((size_t)blocks * sizeof *t->ids);
    for (int i = 0; i < blocks; i++)
        t->ids[i] = blocks - i;         /* backwards, block 0 unused */
    t->pool = (struct kn_pool){ .num_blocks = blocks + 1, .n_layers = LAYERS,
                                .block_bytes = cell };
    size_t bytes = (size_t)LAYERS * (size_t)(blocks + 1) * (size_t)cell;
    t->pool.base = dev_alloc(e, bytes);
    memset(t->pool.base, 0xff, bytes);
    for (int i = 0; i < n_adapters; i++) {
        struct adapter *ad = &t->ad[i];
        int64_t *at = malloc((size_t)ad->n_cells * sizeof *at);
        for (int c = 0; c < ad->n_cells; c++)
            at[c] = ((int64_t)(c % LAYERS) * (blocks + 1) + t->ids[ad->block0 + c / LAYERS]) *
                    cell;
        assert_int_equal(kn_scatter_cells(e->s, t->pool.base, at, ad->n_cells, (size_t)cell,
                                          ad->image), LM_OK);
        free(at);
    }
}

static void bed_close(struct bed *t)
{
    for (int i = 0; i < t->n_adapters; i++) {
        for (int l = 0; l < LAYERS; l++)
            for (int p = 0; p < t->n_parts; p++)
                free(t->ad[i].a[l][p]), free(t->ad[i].b[l][p]);
        free(t->ad[i].image);
    }
    kn_free(t->e->dev, t->pool.base);
    free(t->ids);
}

/* ---- a batch --------------------------------------------------------------------------- */

struct batch {
    int n_tok, n_segs, ldx, ldy, layer;
    int who[256];               /* adapter of each token, -1: base only */
    struct kn_lora_seg segs[256];
    float *x, *y, *y0, *h;
    struct kn_lora a;
};

/* Runs of one adapter become segments. */
static void batch_open(struct batch *b, struct bed *t, const int *who, int n, int layer)
{
    int ldy = 3;
    *b = (struct batch){ .n_tok = n, .layer = layer, .ldx = t->in + 1 };
    for (int p = 0; p < t->n_parts; p++)
        ldy += t->out[p] + 2;
    b->ldy = ldy;
    memcpy(b->who, who, (size_t)n * sizeof *who);
    int64_t rows = 0;
    int max_seg = 0, max_rank = 0;
    for (int i = 0; i < n; i++) {
        if (who[i] < 0)
            continue;
        const struct adapter *ad = &t->ad[who[i]];
        if (i == 0 || who[i] != who[i - 1])
            b->segs[b->n_segs++] = (struct kn_lora_seg){ .tok0 = i, .block0 = ad->block0,
                                                         .rank_max = ad->rank_max,
                                                         .h0 = (int32_t)rows };
        struct kn_lora_seg *seg = &b->segs[b->n_segs - 1];
        seg->n_tok++;
        max_seg = LM_MAX(max_seg, seg->n_tok);
        max_rank = LM_MAX(max_rank, ad->rank_max);
        rows += ad->rank_max;
    }
    b->x = rnd_floats((size_t)n * (size_t)b->ldx);
    b->y = rnd_floats((size_t)n * (size_t)ldy);
    b->y0 = malloc((size_t)n * (size_t)ldy * sizeof(float));
    memcpy(b->y0, b->y, (size_t)n * (size_t)ldy * sizeof(float));
    b->h = malloc(((size_t)rows * (size_t)t->n_parts + 1) * sizeof(float));
    for (int64_t i = 0; i < rows * t->n_parts; i++)
        b->h[i] = NAN;
    b->a = (struct kn_lora){
        .h = b->h, .x = b->x, .y = b->y, .ldx = b->ldx, .ldy = ldy, .in = t->in,
        .pool = t->pool, .layer = layer, .n_parts = t->n_parts,
        .batch = { .segs = b->segs, .block_ids = t->ids, .n_segs = b->n_segs, .n_tok = n,
                   .max_seg_tok = max_seg, .max_rank = max_rank, .h_rows = rows },
    };
    for (int p = 0, col = 1; p < t->n_parts; col += t->out[p++] + 2)
        b->a.part[p] = (struct kn_lora_part){ (enum kn_module)p, col, t->out[p] };
}

static void batch_close(struct batch *b)
{
    free(b->x), free(b->y), free(b->y0), free(b->h);
}

static void expect_row(const struct batch *b, const struct bed *t, int tok, double *want,
                       double *mag)
{
    for (int i = 0; i < b->ldy; i++) {
        want[i] = (double)b->y0[tok * b->ldy + i];
        mag[i] = fabs(want[i]);
    }
    if (b->who[tok] < 0)
        return;
    const struct adapter *ad = &t->ad[b->who[tok]];
    for (int p = 0; p < t->n_parts; p++)
        for (int j = 0; j < ad->rank[b->layer][p]; j++) {
            double h = 0, hm = 0;
            for (int i = 0; i < t->in; i++) {
                double v = (double)ad->a[b->layer][p][j * t->in + i] *
                           (double)b->x[tok * b->ldx + i];
                h += v, hm += fabs(v);
            }
            for (int i = 0; i < t->out[p]; i++) {
                double w = (double)ad->b[b->layer][p][j * t->out[p] + i] * (double)ad->scale;
                want[b->a.part[p].y_col + i] += h * w;
                mag[b->a.part[p].y_col + i] += hm * fabs(w);
            }
        }
}

static void check_batch(struct batch *b, struct bed *t)
{
    double *want = malloc((size_t)b->ldy * 2 * sizeof *want);
    assert_int_equal(kn_op_lora_shrink(t->e->s, &b->a), LM_OK);
    for (int64_t i = 0; i < b->a.batch.h_rows * t->n_parts; i++)
        assert_false(isnan(b->h[i]));
    assert_int_equal(kn_op_lora_expand(t->e->s, &b->a), LM_OK);
    for (int tok = 0; tok < b->n_tok; tok++) {
        expect_row(b, t, tok, want, want + b->ldy);
        for (int i = 0; i < b->ldy; i++) {
            float got = b->y[tok * b->ldy + i];
            if (b->who[tok] < 0)
                assert_true(got == b->y0[tok * b->ldy + i]);
            near("lora", tok, i, got, want[i], want[b->ldy + i], 1e-6);
        }
    }
    free(want);
}

enum popularity { IDENTICAL, DISTINCT, UNIFORM, SKEWED, POPULARITIES };

static void draw_owners(int *who, int n, int n_adapters, enum popularity pop, bool base_rows)
{
    for (int i = 0; i < n; i++) {
        int a = 0;
        if (pop == DISTINCT)
            a = i % n_adapters;
        else if (pop == UNIFORM)
            a = rnd_int(0, n_adapters - 1);
        else if (pop == SKEWED)
            a = rnd_int(0, rnd_int(0, rnd_int(0, n_adapters - 1)));
        who[i] = base_rows && rnd_int(0, 3) == 0 ? -1 : a;
    }
}

/* ---- tests ----------------------------------------------------------------------------- */

static const int mixed_ranks[] = { 8, 1, 16, 3, 64, 5, 2, 33, 12, 7, 31 };

static void axes_env(struct env *e)
{
    static const int batches[] = { 1, 2, 3, 7, 33, 133 };
    struct bed t;
    bed_open(&t, e, 50, (int[]){ 40, 24, 24 }, 3, 4096, 48, 133, mixed_ranks,
             LM_COUNT(mixed_ranks));
    for (size_t i = 0; i < LM_COUNT(batches); i++)
        for (int pop = 0; pop < POPULARITIES; pop++)
            for (int base = 0; base < 2; base++) {
                int who[256];
                struct batch b;
                draw_owners(who, batches[i], t.n_adapters, (enum popularity)pop, base);
                batch_open(&b, &t, who, batches[i], rnd_int(0, LAYERS - 1));
                check_batch(&b, &t);
                batch_close(&b);
            }
    bed_close(&t);
}

static void axes(void **state)
{
    (void)state;
    each_env(axes_env);
}

/* Widths from 1 up, cells from one directory row up, features that are multiples of nothing. */
static void layouts_env(struct env *e)
{
    static const int widths[] = { 1, 2, 7, 16, 17, 32, 64, 200 };
    static const int cells[] = { 400, 512, 1024, 8192 };
    static const int small[] = { 1, 4, 9, 20 };
    for (size_t w = 0; w < LM_COUNT(widths); w++)
        for (size_t c = 0; c < LM_COUNT(cells); c++) {
            struct bed t;
            struct batch b;
            int who[20];
            bed_open(&t, e, rnd_int(1, 130), (int[]){ rnd_int(1, 90), 33 }, 2, cells[c],
                     widths[w], 4, small, LM_COUNT(small));
            for (int i = 0; i < 20; i++)
                who[i] = i < 9 ? i % 4 : i / 5 % 4;
            batch_open(&b, &t, who, 20, rnd_int(0, LAYERS - 1));
            check_batch(&b, &t);
            batch_close(&b);
            bed_close(&t);
        }
}

static void layouts(void **state)
{
    (void)state;
    each_env(layouts_env);
}

/* One long segment, as a prefill makes it; sizes like a real model's. */
static void prefill_env(struct env *e)
{
    struct bed t;
    struct batch b;
    int who[250];
    bed_open(&t, e, 192, (int[]){ 512, 512 }, 2, 8192, 128, 2, (int[]){ 16, 6 }, 2);
    for (int i = 0; i < 250; i++)
        who[i] = i < 201 ? 0 : i < 203 ? -1 : 1;
    batch_open(&b, &t, who, 250, 2);
    check_batch(&b, &t);
    batch_close(&b);
    bed_close(&t);
}

static void prefill(void **state)
{
    (void)state;
    each_env(prefill_env);
}

/* A token's update is the same to the last bit whoever else is in the batch. */
static void company_env(struct env *e)
{
    struct bed t;
    struct batch all, one;
    int who[33];
    bed_open(&t, e, 77, (int[]){ 50 }, 1, 1024, 16, 11, mixed_ranks, LM_COUNT(mixed_ranks));
    draw_owners(who, 33, 11, DISTINCT, false);
    batch_open(&all, &t, who, 33, 0);
    check_batch(&all, &t);
    for (int i = 0; i < 33; i++) {
        batch_open(&one, &t, &who[i], 1, 0);
        memcpy(one.x, all.x + i * all.ldx, (size_t)all.ldx * sizeof(float));
        memcpy(one.y, all.y0 + i * all.ldy, (size_t)all.ldy * sizeof(float));
        memcpy(one.y0, one.y, (size_t)all.ldy * sizeof(float));
        check_batch(&one, &t);
        assert_memory_equal(one.y, all.y + i * all.ldy, (size_t)all.ldy * sizeof(float));
        batch_close(&one);
    }
    batch_close(&all);
    bed_close(&t);
}

static void company(void **state)
{
    (void)state;
    each_env(company_env);
}

/* ---- merging into a base weight -------------------------------------------------------- */

#define MERGE_IN 61
#define MERGE_OUT 45
#define MERGE_ROW0 7
#define MERGE_ROWS (MERGE_ROW0 + MERGE_OUT + 5)

/* Half a unit in the last place, relative: 24, 11 and 8 bits of significand. */
static const double unit_roundoff[] = { 0x1p-24, 0x1p-11, 0x1p-8 };

static void check_merged(struct bed *t, const struct adapter *ad, int layer, const kn_mat *w,
                         const float *before, double unit)
{
    for (int r = 0; r < MERGE_ROWS; r++) {
        float got[MERGE_IN];
        int i = r - MERGE_ROW0;
        cpu_mat_row((const struct cpu_mat *)w, r, got);
        for (int k = 0; k < MERGE_IN; k++) {
            double want = (double)before[r * MERGE_IN + k], mag = fabs(want);
            if (i < 0 || i >= MERGE_OUT) {
                assert_true((double)got[k] == want);
                continue;
            }
            for (int j = 0; j < ad->rank[layer][0]; j++) {
                double d = (double)ad->scale * (double)ad->b[layer][0][j * t->out[0] + i] *
                           (double)ad->a[layer][0][j * t->in + k];
                want += d, mag += fabs(d);
            }
            /* One rounding of the result, and float32 sums before it. */
            near("merge", r, k, got[k], want, mag, unit + 2e-6);
        }
    }
}

static void merge_one(struct env *e, struct bed *t, const struct adapter *ad, int layer,
                      enum kn_dtype type)
{
    kn_mat *w = NULL;
    float *src = rnd_floats(MERGE_ROWS * MERGE_IN), *before = rnd_floats(MERGE_ROWS * MERGE_IN);
    void *kept = NULL;
    assert_int_equal(kn_mat_new(e->dev, type, MERGE_ROWS, MERGE_IN, &w, NULL), LM_OK);
    assert_int_equal(kn_mat_upload(w, 0, 0, MERGE_ROWS, MERGE_IN, src, KN_F32, MERGE_IN, NULL),
                     LM_OK);
    for (int r = 0; r < MERGE_ROWS; r++)
        cpu_mat_row((const struct cpu_mat *)w, r, before + r * MERGE_IN);
    assert_int_equal(kn_host_alloc(e->dev, kn_mat_bytes(w), &kept, NULL), LM_OK);
    assert_int_equal(kn_mat_save(e->s, kept, w), LM_OK);
    struct kn_lora_merge a = { .w = w, .row0 = MERGE_ROW0, .in = MERGE_IN, .out = MERGE_OUT,
                               .module = (enum kn_module)0, .layer = layer, .pool = t->pool,
                               .block_ids = t->ids + ad->block0 };
    assert_int_equal(kn_op_lora_merge(e->s, &a), LM_OK);
    check_merged(t, ad, layer, w, before, unit_roundoff[type]);
    assert_int_equal(kn_mat_restore(e->s, w, kept), LM_OK);
    assert_memory_equal(((struct cpu_mat *)w)->data, kept, kn_mat_bytes(w));
    a.row0 = MERGE_ROWS - MERGE_OUT + 1;
    assert_int_equal(kn_op_lora_merge(e->s, &a), LM_INVALID);
    a.row0 = 0, a.layer = LAYERS;
    assert_int_equal(kn_op_lora_merge(e->s, &a), LM_INVALID);
    kn_host_free(e->dev, kept);
    kn_mat_free(w);
    free(src), free(before);
}

/* Every dtype of weights; rows beside the module stay; a kept copy undoes it bit for bit. */
static void merge_env(struct env *e)
{
    static const int widths[] = { 7, 16, 300 };
    for (size_t i = 0; i < LM_COUNT(widths); i++) {
        struct bed t;
        bed_open(&t, e, MERGE_IN, (int[]){ MERGE_OUT }, 1, 2048, widths[i], 4, mixed_ranks, 4);
        for (int ad = 0; ad < 4; ad++)
            for (int type = KN_F32; type <= KN_BF16; type++)
                merge_one(e, &t, &t.ad[ad], ad % LAYERS, (enum kn_dtype)type);
        bed_close(&t);
    }
}

static void merge(void **state)
{
    (void)state;
    each_env(merge_env);
}

/* Damaged directories and metadata are refused; memory outside is never touched (ASan watches). */
static void damaged(void **state)
{
    (void)state;
    struct env e = env_open(CPU_ISA_COUNT, 2);
    struct bed t;
    struct batch b;
    bed_open(&t, &e, 64, (int[]){ 48 }, 1, 2048, 16, 1, (int[]){ 8 }, 1);
    t.ad[0].rank_max = 8;
    batch_open(&b, &t, (int[]){ 0, 0 }, 2, 0);
    assert_int_equal(kn_op_lora_shrink(e.s, &b.a), LM_OK);
    struct kn_lora_row *row =
        (struct kn_lora_row *)((char *)t.pool.base + (int64_t)t.ids[t.ad[0].block0] * t.cell);
    struct kn_lora_row good = *row;
    good.module[0].rank = LM_MAX(good.module[0].rank, 1);
    kn_mat *w = NULL;
    assert_int_equal(kn_mat_new(e.dev, KN_F32, 48, 64, &w, NULL), LM_OK);
    struct kn_lora_merge m = { .w = w, .in = 64, .out = 48, .pool = t.pool,
                               .block_ids = t.ids + t.ad[0].block0 };
#define DAMAGED(field, value)                                                                  \
    do {                                                                                       \
        *row = good;                                                                           \
        row->module[0].field = value;                                                          \
        assert_int_equal(kn_op_lora_shrink(e.s, &b.a), LM_INVALID);                            \
        assert_int_equal(kn_op_lora_expand(e.s, &b.a), LM_INVALID);                            \
        assert_int_equal(kn_op_lora_merge(e.s, &m), LM_INVALID);                               \
    } while (0)
    DAMAGED(rank, -1);
    DAMAGED(rank, 9);
    DAMAGED(a.width, 0);
    DAMAGED(a.width, 1 << 30);
    DAMAGED(a.first_n, 1 << 20);
    DAMAGED(a.offset, -16);
    DAMAGED(a.cell, -1);
    DAMAGED(b.per_cell, 1 << 20);
    DAMAGED(b.chunk_bytes, 4);
    *row = good;
    int32_t keep = t.ids[0];
    t.ids[0] = t.pool.num_blocks;
    assert_int_equal(kn_op_lora_shrink(e.s, &b.a), LM_INVALID);
    t.ids[0] = keep;
    b.segs[0].n_tok = 3;
    assert_int_equal(kn_op_lora_shrink(e.s, &b.a), LM_INVALID);
    b.segs[0].n_tok = 2, b.segs[0].h0 = 1;
    assert_int_equal(kn_op_lora_expand(e.s, &b.a), LM_INVALID);
    b.segs[0].h0 = 0, b.a.n_parts = 4;
    assert_int_equal(kn_op_lora_expand(e.s, &b.a), LM_INVALID);
    b.a.n_parts = 1, b.a.batch.n_segs = 0;
    assert_int_equal(kn_op_lora_expand(e.s, &b.a), LM_OK);
    kn_mat_free(w);
    batch_close(&b);
    bed_close(&t);
    env_close(&e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(axes),
        cmocka_unit_test(layouts),
        cmocka_unit_test(prefill),
        cmocka_unit_test(company),
        cmocka_unit_test(merge),
        cmocka_unit_test(damaged),
    };
    return cmocka_run_group_tests_name("kernels: lora", tests, NULL, NULL);
}
