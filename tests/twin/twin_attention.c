/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rotary embedding and paged attention against the CPU twin.
 *
 * Keys and values are written by kn_op_rope_kv at position 0, where the rotation is the identity,
 * so both sides hold the same numbers. The pool starts full of NaN, and block ids are shuffled.
 *
 * Tolerance of attention. Inputs are equal; scores are float32 on both sides. Weights p are rounded
 * to bf16 (relative 2^-8) before they meet V, and the output is rounded once more: with |v| <= 1
 * that is 2^-8 * sum(p |v|) / sum(p) + 2^-8 |out| <= 2^-7. Float32 sums add 1e-5. With K and V in
 * E4M3 both sides round the same numbers to the same bytes, which bf16 holds exactly: the tolerance
 * is the same.
 */
#include "tests/twin/twin.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ATTN_TOL (0x1p-7 + 1e-5)

static enum kn_kv kv;           /* of the pools that are made */
static float gain = 1;          /* a power of two: queries are so much larger, scale smaller */
#define LAYERS 2

struct shape {
    int q_heads, kv_heads, hd, bt, window;
};

/* Sequence s has len[s] positions, of which the last n_q[s] are queries of this step. */
struct seqs {
    int n;
    int len[64], n_q[64];
};

struct input {
    struct shape h;
    struct seqs q;
    int width, table_ld, n_blocks, n_rows, n_tok, max_q, max_kv;
    int32_t *table, *q_start, *kv_len;
    int64_t *slot;
    float *kv;                  /* [n_rows, width]: every position of every sequence */
    float *step;                /* [n_tok, width]: the rows of this step */
};

static void input_free(struct input *in)
{
    free(in->table), free(in->q_start), free(in->kv_len), free(in->slot);
    free(in->kv), free(in->step);
}

static void input_make(struct input *in, struct shape h, const struct seqs *q)
{
    *in = (struct input){ .h = h, .q = *q, .width = (h.q_heads + 2 * h.kv_heads) * h.hd };
    in->q_start = calloc((size_t)q->n + 1, sizeof *in->q_start);
    in->kv_len = calloc((size_t)q->n, sizeof *in->kv_len);
    for (int s = 0; s < q->n; s++) {
        in->kv_len[s] = q->len[s];
        in->q_start[s + 1] = in->q_start[s] + q->n_q[s];
        in->n_rows += q->len[s];
        in->max_q = LM_MAX(in->max_q, q->n_q[s]);
        in->max_kv = LM_MAX(in->max_kv, q->len[s]);
    }
    in->n_tok = in->q_start[q->n];
    in->table_ld = LM_DIV_UP(in->max_kv, h.bt) + 1;
    int n = q->n * in->table_ld;
    in->n_blocks = n + 3;
    in->table = malloc((size_t)n * sizeof *in->table);
    for (int i = 0; i < n; i++)
        in->table[i] = i + 2;
    for (int i = n - 1; i > 0; i--) {
        int j = tw_int(0, i);
        int32_t t = in->table[i];
        in->table[i] = in->table[j], in->table[j] = t;
    }
    in->kv = tw_floats((size_t)in->n_rows * (size_t)in->width);
    in->step = malloc((size_t)in->n_tok * (size_t)in->width * sizeof(float) + 1);
    in->slot = malloc((size_t)in->n_rows * sizeof *in->slot + 1);
    for (int s = 0, r = 0, t = 0; s < q->n; s++)
        for (int p = 0; p < q->len[s]; p++, r++) {
            in->slot[r] = (int64_t)in->table[s * in->table_ld + p / h.bt] * h.bt + p % h.bt;
            if (p >= q->len[s] - q->n_q[s])
                memcpy(in->step + (size_t)t++ * (size_t)in->width,
                       in->kv + (size_t)r * (size_t)in->width,
                       (size_t)in->width * sizeof(float));
        }
}

static struct kn_pool make_pool(struct twin *c, struct side *s, const struct input *in)
{
    struct kn_pool pool = { .num_blocks = in->n_blocks, .n_layers = LAYERS, .kv = kv };
    pool.block_bytes = (int64_t)kn_kv_block_bytes(s->dev, kv, in->h.bt, in->h.kv_heads, in->h.hd) +
                       64;
    pool.base = side_new(c, s, (size_t)(LAYERS * pool.num_blocks * pool.block_bytes));
    return pool;
}

/* The rows of the step with their queries times `gain`; the caller frees them. */
static float *louder(const struct input *in)
{
    const int n = in->n_tok * in->width;
    float *step = malloc((size_t)n * sizeof *step + 1);
    for (int i = 0; i < n; i++)
        step[i] = in->step[i] * (i % in->width < in->h.q_heads * in->h.hd ? gain : 1);
    return step;
}

/* Writes all K and V, then attends; the caller frees the result [n_tok, q_heads * hd]. */
static float *run_side(struct twin *c, struct side *s, const struct input *in)
{
    const struct shape *h = &in->h;
    size_t rows = (size_t)in->n_rows, n_out = (size_t)in->n_tok * (size_t)(h->q_heads * h->hd);
    int32_t *zero = calloc(rows + 1, sizeof *zero);
    float *freq = calloc((size_t)h->hd / 2, sizeof *freq), *out = calloc(n_out + 1, sizeof *out);
    float *step = louder(in);
    struct kn_pool pool = make_pool(c, s, in);
    struct kn_rope_kv r = {
        .qkv = side_put_act(c, s, in->kv, rows * (size_t)in->width), .ld = in->width,
        .pos = side_put(c, s, zero, rows * sizeof *zero),
        .slot = side_put(c, s, in->slot, rows * sizeof *in->slot),
        .inv_freq = side_put(c, s, freq, (size_t)h->hd / 2 * sizeof *freq),
        .attention_factor = 1, .pool = pool, .layer = 1, .block_tokens = h->bt, .n = in->n_rows,
        .q_heads = h->q_heads, .kv_heads = h->kv_heads, .head_dim = h->hd,
    };
    twin_status(c, kn_op_rope_kv(s->s, &r), LM_OK, "rope_kv");
    struct kn_attention a = {
        .out = side_new(c, s, n_out * 4),
        .qkv = side_put_act(c, s, step, (size_t)in->n_tok * (size_t)in->width),
        .ld = in->width,
        .q_start = side_put(c, s, in->q_start, ((size_t)in->q.n + 1) * sizeof *in->q_start),
        .kv_len = side_put(c, s, in->kv_len, (size_t)in->q.n * sizeof *in->kv_len),
        .block_table = side_put(c, s, in->table,
                                (size_t)(in->q.n * in->table_ld) * sizeof *in->table),
        .table_ld = in->table_ld, .n_seqs = in->q.n, .n_tok = in->n_tok, .max_q = in->max_q,
        .max_kv = in->max_kv, .pool = pool, .layer = 1, .block_tokens = h->bt,
        .q_heads = h->q_heads, .kv_heads = h->kv_heads, .head_dim = h->hd, .window = h->window,
        .scale = 2.0f / sqrtf((float)h->hd) / gain,
    };
    twin_status(c, kn_op_attention(s->s, &a), LM_OK, "attention");
    side_get_act(c, s, a.out, out, n_out);
    free(zero), free(freq), free(step);
    return out;
}

static void compare(struct twin *c, struct shape h, const struct seqs *q, const char *name)
{
    struct input in;
    twin_case(c, "attention %s%s: %d/%d heads of %d, blocks of %d, window %d, %d sequences", name,
               kv == KN_KV_E4M3 ? " (E4M3)" : "",
               h.q_heads, h.kv_heads, h.hd, h.bt, h.window, q->n);
    input_make(&in, h, q);
    float *got = run_side(c, &c->gpu, &in), *want = run_side(c, &c->cpu, &in);
    const int64_t ld = h.q_heads * h.hd;
    for (int64_t i = 0; i < in.n_tok * ld; i++)
        twin_near(c, "row", i / ld, i % ld, got[i], want[i], ATTN_TOL);
    free(got), free(want);
    input_free(&in);
}

/* ---- axes ------------------------------------------------------------------------------ */

static struct seqs decode_of(int n, int max_len)
{
    struct seqs q = { .n = n };
    for (int s = 0; s < n; s++) {
        q.n_q[s] = 1;
        q.len[s] = s == 0 ? max_len : tw_int(1, max_len);
    }
    return q;
}

static struct seqs mixed_of(int n, int max_len)
{
    struct seqs q = decode_of(n, max_len);
    for (int s = 0; s < n; s++) {
        q.n_q[s] = s % 3 == 0 ? 1 : s % 5 == 4 ? 0 : tw_int(1, q.len[s]);
        if (s % 7 == 1)
            q.n_q[s] = q.len[s];        /* a whole prompt */
    }
    return q;
}

static void check_heads(struct twin *c)
{
    static const struct shape shapes[] = {
        { 4, 4, 128, 16, 0 }, { 8, 2, 128, 16, 0 }, { 4, 2, 64, 16, 0 }, { 3, 3, 96, 16, 0 },
        { 2, 1, 256, 16, 0 }, { 4, 2, 16, 16, 0 }, { 6, 2, 32, 16, 0 }, { 5, 1, 80, 16, 0 },
        { 7, 1, 128, 16, 0 }, { 2, 2, 112, 16, 0 }, { 2, 1, 192, 16, 0 }, { 40, 2, 64, 16, 0 },
        { 32, 8, 128, 16, 0 }, { 28, 4, 128, 16, 0 },
    };
    for (size_t i = 0; i < LM_COUNT(shapes); i++) {
        if (c->slow && shapes[i].q_heads > 8 && shapes[i].hd > 64)
            continue;
        struct seqs d = decode_of(3, c->slow ? 70 : 700), m = mixed_of(4, c->slow ? 70 : 700);
        compare(c, shapes[i], &d, "decode");
        compare(c, shapes[i], &m, "mixed");
    }
}

static void check_blocks(struct twin *c)
{
    for (int bt = 1; bt <= 1024; bt *= 2) {
        struct seqs d = decode_of(2, 45), m = mixed_of(3, c->slow ? 75 : 300);
        compare(c, (struct shape){ 4, 2, 64, bt, 0 }, &d, "decode");
        compare(c, (struct shape){ 4, 2, 64, bt, 0 }, &m, "mixed");
        compare(c, (struct shape){ 2, 1, 128, bt, 19 }, &m, "mixed");
    }
}

static void check_windows(struct twin *c)
{
    static const int windows[] = { 1, 2, 15, 16, 17, 64, 100, 1000 };
    for (size_t i = 0; i < LM_COUNT(windows); i++) {
        struct seqs d = decode_of(3, c->slow ? 150 : 900), m = mixed_of(5, c->slow ? 150 : 900);
        compare(c, (struct shape){ 4, 2, 64, 16, windows[i] }, &d, "decode");
        compare(c, (struct shape){ 4, 2, 64, 16, windows[i] }, &m, "mixed");
    }
}

/* Lengths around tile, split and block boundaries. */
static void check_lengths(struct twin *c)
{
    static const int lens[] = { 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257,
                                511, 512, 1023, 1025, 2049 };
    for (size_t i = 0; i < LM_COUNT(lens); i++) {
        if (c->slow && lens[i] > 300)
            continue;
        struct seqs d = { 1, { lens[i] }, { 1 } }, p = { 1, { lens[i] }, { lens[i] } };
        struct seqs tail = { 1, { lens[i] }, { LM_MIN(lens[i], 5) } };
        compare(c, (struct shape){ 4, 1, 128, 16, 0 }, &d, "decode");
        compare(c, (struct shape){ 2, 2, 64, 16, 0 }, &p, "prefill");
        compare(c, (struct shape){ 8, 2, 64, 16, 0 }, &tail, "chunk");
    }
}

/* Several tiles of keys and of rows: chunks behind a past, ends within a block (the
 * rest of which is NaN), windows that begin within a tile, blocks larger than a tile. */
static void check_tiles(struct twin *c)
{
    static const struct shape shapes[] = {
        { 2, 2, 128, 16, 0 }, { 6, 2, 128, 8, 0 }, { 2, 1, 128, 32, 170 }, { 2, 1, 128, 256, 0 },
        { 7, 1, 128, 16, 50 }, { 4, 2, 64, 16, 0 }, { 2, 1, 64, 8, 170 }, { 2, 2, 64, 256, 0 },
    };
    for (size_t i = 0; i < LM_COUNT(shapes); i++) {
        struct seqs q = { 4, { 411, 300, 1, 256 }, { 150, 300, 1, 2 } };
        compare(c, shapes[i], &q, "tiles");
    }
}

static void check_long(struct twin *c)
{
    struct seqs d = { 2, { c->slow ? 900 : 33000, 700 }, { 1, 1 } };
    compare(c, (struct shape){ 4, 1, 64, 16, 0 }, &d, "long decode");
    if (c->slow || kv == KN_KV_E4M3)    /* the CPU twin takes seconds for the rest */
        return;
    struct seqs p = { 2, { 9000, 3000 }, { 300, 3000 } }, many = decode_of(64, 1500);
    compare(c, (struct shape){ 8, 2, 128, 16, 0 }, &p, "long prefill");
    compare(c, (struct shape){ 32, 8, 128, 16, 0 }, &many, "batch");
    compare(c, (struct shape){ 32, 32, 128, 16, 0 }, &many, "batch");
    struct seqs m = mixed_of(64, 400);
    compare(c, (struct shape){ 32, 8, 128, 16, 0 }, &m, "mixed batch");
}

/* Heads enough for a backend to give each of them less: rows of a few keys, and longer ones. */
static void check_many_heads(struct twin *c)
{
    static const struct seqs all[] = {
        { 2, { 33, 8 }, { 1, 1 } }, { 3, { 100, 1, 256 }, { 1, 1, 1 } },
        { 4, { 16, 257, 17, 90 }, { 1, 1, 1, 9 } },
    };
    for (size_t i = 0; i < LM_COUNT(all); i++)
        compare(c, (struct shape){ 129, 129, 16, i == 2 ? 4 : 16, i == 1 ? 75 : 0 }, &all[i],
                "many heads");
    compare(c, (struct shape){ 256, 128, 32, 16, 0 }, &all[0], "many heads");
    compare(c, (struct shape){ 1088, 64, 16, 16, 0 }, &all[0], "many heads");
    if (c->slow)
        return;
    struct seqs d = decode_of(32, 250), m = mixed_of(64, 300);
    compare(c, (struct shape){ 32, 32, 128, 16, 0 }, &d, "many heads");
    compare(c, (struct shape){ 64, 32, 256, 16, 0 }, &d, "many heads");
    compare(c, (struct shape){ 32, 16, 128, 16, 0 }, &m, "many heads");
}

/* Queries beyond the numbers that float16 has, above and below. */
static void check_gains(struct twin *c)
{
    static const float gains[] = { 0x1p40f, 0x1p-40f };
    struct seqs d = decode_of(3, 70);
    for (size_t i = 0; i < LM_COUNT(gains); i++) {
        gain = gains[i];
        compare(c, (struct shape){ 8, 2, 128, 16, 0 }, &d, "loud");
        compare(c, (struct shape){ 18, 2, 64, 16, 0 }, &d, "loud");
    }
    gain = 1;
}

/* A sequence's rows are the same to the last bit whatever its neighbours do, and if one of them is
 * gone. */
static void company_of(struct twin *c, struct shape h, int row, int n)
{
    struct input a, b;
    struct seqs qa = { 4, { row, 40, 77, 5 }, { 1, 40, 1, 1 } }, qb = qa;
    qb.len[1] = 150, qb.n_q[1] = 1, qb.len[2] = c->slow ? 300 : 3000, qb.n_q[3] = 2;
    qb.n = n;
    twin_case(c, "attention: a row of %d keys in company of %d", row, n);
    input_make(&a, h, &qa);
    input_make(&b, h, &qb);
    memcpy(b.kv, a.kv, (size_t)qa.len[0] * (size_t)a.width * sizeof(float));
    memcpy(b.step, a.step, (size_t)a.width * sizeof(float));
    float *ra = run_side(c, &c->gpu, &a), *rb = run_side(c, &c->gpu, &b);
    if (memcmp(ra, rb, (size_t)(h.q_heads * h.hd) * sizeof(float)))
        twin_fail(c, "neighbours changed a decode row");
    free(ra), free(rb);
    input_free(&a), input_free(&b);
}

static void check_company(struct twin *c)
{
    company_of(c, (struct shape){ 8, 2, 64, 16, 0 }, 230, 4);
    company_of(c, (struct shape){ 128, 128, 16, 16, 0 }, 90, 4);
    company_of(c, (struct shape){ 32, 32, 64, 16, 0 }, 700, 3);
}

/* ---- rope ------------------------------------------------------------------------------ */

#define ROPE_ROWS 9

struct rope_case {
    struct shape h;
    bool norm, dynamic;
    int max_pos;
};

struct rope_rows {
    int n;
    float *qkv;                 /* [n, width] */
    int32_t pos[ROPE_ROWS], len[ROPE_ROWS];
    int64_t slot[ROPE_ROWS];
    float *freq, *norm, factor;
};

/* q, k and v rows after rotation, [n, width]; `stored`, if not NULL, gets the pool's bytes. */
static float *rope_side(struct twin *c, struct side *s, const struct rope_case *rc,
                        const struct rope_rows *d, char **stored, size_t *bytes)
{
    const struct shape *h = &rc->h;
    size_t width = (size_t)((h->q_heads + 2 * h->kv_heads) * h->hd), rows = (size_t)d->n;
    struct input in = { .h = *h, .n_blocks = ROPE_ROWS + 2 };
    float *out = calloc(rows * width, sizeof *out);
    const float *dev_norm = rc->norm ? side_put(c, s, d->norm, (size_t)h->hd * 4) : NULL;
    struct kn_rope_kv r = {
        .qkv = side_put_act(c, s, d->qkv, rows * width), .ld = (int64_t)width,
        .pos = side_put(c, s, d->pos, rows * sizeof *d->pos),
        .slot = side_put(c, s, d->slot, rows * sizeof *d->slot),
        .inv_freq = side_put(c, s, d->freq, (size_t)h->hd / 2 * sizeof *d->freq),
        .attention_factor = d->factor, .q_norm = dev_norm, .k_norm = dev_norm, .norm_eps = 1e-6f,
        .dyn_len = rc->dynamic ? side_put(c, s, d->len, rows * sizeof *d->len) : NULL,
        .dyn_base = 1e4f, .dyn_factor = 2, .dyn_max = 64, .pool = make_pool(c, s, &in), .layer = 1,
        .block_tokens = h->bt, .n = d->n, .q_heads = h->q_heads,
        .kv_heads = h->kv_heads, .head_dim = h->hd,
    };
    twin_status(c, kn_op_rope_kv(s->s, &r), LM_OK, "rope_kv");
    side_get_act(c, s, r.qkv, out, rows * width);
    if (stored) {
        *bytes = (size_t)(LAYERS * r.pool.num_blocks * r.pool.block_bytes);
        *stored = malloc(*bytes);
        side_get(c, s, r.pool.base, *stored, *bytes);
    }
    return out;
}

#define NO_SLOT 4               /* the row of a rope_case whose slot is -1 */

/* The pool holds the rotated K and V, and nothing else: its bytes are those that the rotated rows
 * leave when they are written as they are, without the row that has no slot. */
static void rope_stored(struct twin *c, const struct rope_case *rc, const struct rope_rows *d,
                        const float *rotated, const char *stored, size_t bytes)
{
    const struct rope_case plain = { .h = rc->h };
    const size_t width = (size_t)((rc->h.q_heads + 2 * rc->h.kv_heads) * rc->h.hd);
    struct rope_rows e = { .factor = 1, .freq = calloc((size_t)rc->h.hd / 2, sizeof(float)),
                           .qkv = malloc((size_t)d->n * width * sizeof(float)) };
    for (int i = 0; i < d->n; i++)
        if (d->slot[i] >= 0) {
            memcpy(e.qkv + (size_t)e.n * width, rotated + (size_t)i * width,
                   width * sizeof(float));
            e.slot[e.n++] = d->slot[i];
        }
    char *want = NULL;
    free(rope_side(c, &c->gpu, &plain, &e, &want, &bytes));
    if (memcmp(stored, want, bytes))
        twin_fail(c, "the pool holds something else than rotated keys and values");
    free(want), free(e.qkv), free(e.freq);
}

/* Tolerance: one rounding to bf16 of a rotated pair, 2^-8 of the pair's length; the angle's sine
 * adds 1e-6 on either side, and as much again from the product's rounding at large positions. */
static void rope_compare(struct twin *c, const struct rope_case *rc)
{
    enum { N = ROPE_ROWS };
    const struct shape *h = &rc->h;
    const int width = (h->q_heads + 2 * h->kv_heads) * h->hd, half = h->hd / 2;
    twin_case(c, "rope: %d/%d heads of %d, positions to %d%s%s", h->q_heads, h->kv_heads, h->hd,
               rc->max_pos, rc->norm ? ", norm" : "", rc->dynamic ? ", dynamic" : "");
    struct rope_rows d = { .n = N, .qkv = tw_floats((size_t)(N * width)), .factor = 1.125f,
                           .norm = tw_floats((size_t)h->hd) };
    d.freq = malloc((size_t)half * sizeof *d.freq);
    for (int i = 0; i < N; i++) {
        d.pos[i] = tw_int(0, rc->max_pos), d.len[i] = d.pos[i] + tw_int(1, 100);
        d.slot[i] = i == NO_SLOT ? -1 : i * h->bt + tw_int(0, h->bt - 1);
    }
    for (int i = 0; i < half; i++)
        d.freq[i] = (float)pow(1e4, -2.0 * i / h->hd);
    char *stored = NULL;
    size_t bytes = 0;
    float *got = rope_side(c, &c->gpu, rc, &d, &stored, &bytes);
    float *want = rope_side(c, &c->cpu, rc, &d, NULL, NULL);
    const int rotated = (h->q_heads + h->kv_heads) * h->hd;
    for (int t = 0; t < N; t++)
        for (int i = 0; i < width; i++) {
            const float *w = want + t * width;
            int d = i % h->hd, other = d < half ? i + half : i - half;
            double len2 = i < rotated ? hypot((double)w[i], (double)w[other]) : 0;
            twin_near(c, "rope", t, i, got[t * width + i], w[i], len2 * (0x1p-8 + 2e-5) + 1e-6);
        }
    rope_stored(c, rc, &d, got, stored, bytes);
    free(stored);
    free(d.qkv), free(d.norm), free(d.freq), free(got), free(want);
}

static void check_rope(struct twin *c)
{
    static const struct rope_case cases[] = {
        { { 4, 2, 128, 16, 0 }, false, false, 4000 }, { { 4, 2, 128, 16, 0 }, true, false, 4000 },
        { { 3, 3, 64, 1, 0 }, false, false, 130000 }, { { 2, 1, 96, 4, 0 }, true, false, 100 },
        { { 2, 1, 256, 64, 0 }, false, false, 100 }, { { 4, 2, 16, 16, 0 }, true, false, 100 },
        { { 4, 2, 32, 16, 0 }, false, true, 300 }, { { 5, 1, 80, 16, 0 }, true, true, 300 },
    };
    for (size_t i = 0; i < LM_COUNT(cases); i++)
        rope_compare(c, &cases[i]);
}

static bool check_all(struct twin *c)
{
    static const struct {
        void (*check)(struct twin *c);
        const char *name, *fp8;
    } all[] = {
        { check_heads, "attention, head shapes", "attention in E4M3, head shapes" },
        { check_blocks, "attention, block sizes", "attention in E4M3, block sizes" },
        { check_windows, "attention, windows", "attention in E4M3, windows" },
        { check_lengths, "attention, lengths", "attention in E4M3, lengths" },
        { check_tiles, "attention, tiles", "attention in E4M3, tiles" },
        { check_long, "attention, long", "attention in E4M3, long" },
        { check_many_heads, "attention, many heads", "attention in E4M3, many heads" },
        { check_gains, "attention, large and small queries",
          "attention in E4M3, large and small queries" },
        { check_company, "attention, company", "attention in E4M3, company" },
    };
    bool good = true;
    for (size_t i = 0; i < LM_COUNT(all); i++) {
        all[i].check(c);
        good &= twin_end(c, kv == KN_KV_E4M3 ? all[i].fp8 : all[i].name);
    }
    return good;
}

bool twin_attention(struct twin *c)
{
    check_rope(c);
    bool good = twin_end(c, "rope_kv");
    good &= check_all(c);
    kv = KN_KV_E4M3;
    good &= check_all(c);
    kv = KN_KV_NATIVE;
    return good;
}

bool twin_attention_few(struct twin *c)
{
    check_rope(c);
    check_tiles(c);
    check_company(c);
    return twin_end(c, "rope_kv and attention, a few");
}

bool twin_prefill(struct twin *c)
{
    check_tiles(c);
    bool good = twin_end(c, "attention, tiles");
    struct seqs p = { 3, { 2900, 2100, 700 }, { 300, 2100, 2 } };
    if (!c->slow)
        compare(c, (struct shape){ 8, 2, 128, 16, 0 }, &p, "long prefill");
    return good & twin_end(c, "attention, long prefill");
}
