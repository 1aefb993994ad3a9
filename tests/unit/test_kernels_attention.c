/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rotary embedding with the write of K and V, then paged attention, against a reference that keeps
 * its own plain K and V and knows nothing of blocks. The pool starts full of NaN, so a read of
 * anything that was not written shows. With K and V in E4M3 the reference rounds what it keeps.
 */
#include "tests/unit/test_kernels_util.h"

struct shape {
    int q_heads, kv_heads, hd, bt, window;
    bool qk_norm;
};

#define MAX_SEQS 40

static enum kn_kv kv;           /* of the worlds that are opened */

/* A growing set of sequences and what the reference remembers of them. */
struct world {
    struct env *e;
    struct shape h;
    struct kn_pool pool;
    int layer, n_seqs, table_ld, width, max_len;
    int len[MAX_SEQS];
    int32_t *table;             /* [MAX_SEQS, table_ld] */
    float *k[MAX_SEQS], *v[MAX_SEQS];   /* [len, kv_heads * hd], after norm and rotation */
    float *inv_freq, *q_norm, *k_norm;
    float factor;
};

static void world_open(struct world *w, struct env *e, struct shape h, int n_seqs, int max_len)
{
    enum { LAYERS = 3 };
    *w = (struct world){ .e = e, .h = h, .n_seqs = n_seqs, .layer = 1, .factor = 1.125f };
    w->width = (h.q_heads + 2 * h.kv_heads) * h.hd;
    w->max_len = max_len;
    w->table_ld = LM_DIV_UP(max_len, h.bt) + 2;
    int blocks = n_seqs * w->table_ld + 5;
    w->pool = (struct kn_pool){ .num_blocks = blocks, .n_layers = LAYERS, .kv = kv };
    w->pool.block_bytes = (int64_t)kn_kv_block_bytes(e->dev, kv, h.bt, h.kv_heads, h.hd) + 64;
    size_t bytes = (size_t)(LAYERS * blocks * w->pool.block_bytes);
    w->pool.base = dev_alloc(e, bytes);
    memset(w->pool.base, 0xff, bytes);
    /* Block ids in a shuffled order: neighbours in a sequence are strangers in the pool. */
    int n = n_seqs * w->table_ld;
    w->table = malloc((size_t)n * sizeof *w->table);
    for (int i = 0; i < n; i++)
        w->table[i] = i + 3;
    for (int i = n - 1; i > 0; i--) {
        int j = rnd_int(0, i);
        int32_t t = w->table[i];
        w->table[i] = w->table[j], w->table[j] = t;
    }
    for (int s = 0; s < n_seqs; s++) {
        w->k[s] = calloc((size_t)(max_len * h.kv_heads * h.hd), sizeof(float));
        w->v[s] = calloc((size_t)(max_len * h.kv_heads * h.hd), sizeof(float));
    }
    w->inv_freq = malloc((size_t)h.hd / 2 * sizeof(float));
    for (int i = 0; i < h.hd / 2; i++)
        w->inv_freq[i] = (float)pow(10000.0, -2.0 * i / h.hd);
    w->q_norm = rnd_floats((size_t)h.hd);
    w->k_norm = rnd_floats((size_t)h.hd);
}

static void world_close(struct world *w)
{
    kn_free(w->e->dev, w->pool.base);
    for (int s = 0; s < w->n_seqs; s++)
        free(w->k[s]), free(w->v[s]);
    free(w->table), free(w->inv_freq), free(w->q_norm), free(w->k_norm);
}

/* ---- references ------------------------------------------------------------------------ */

/* The nearest number of the format, ties to the even one. */
static double ref_e4m3(double x)
{
    int e;
    (void)frexp(fabs(x), &e);
    double unit = ldexp(1, LM_MAX(e - 1, -6) - 3);
    return copysign(fmin(nearbyint(fabs(x) / unit) * unit, 448), x);
}

static void remember(const struct world *w, float *dst, const float *src)
{
    for (int i = 0; i < w->h.kv_heads * w->h.hd; i++)
        dst[i] = kv == KN_KV_E4M3 ? (float)ref_e4m3((double)src[i]) : src[i];
}

static void ref_rotate(const struct world *w, double *x, const float *src, int pos,
                       const float *norm)
{
    int hd = w->h.hd;
    double sq = 0;
    for (int d = 0; d < hd; d++)
        sq += (double)src[d] * (double)src[d];
    double s = w->h.qk_norm ? 1 / sqrt(sq / hd + 1e-6) : 1;
    for (int d = 0; d < hd; d++)
        x[d] = (double)src[d] * s * (w->h.qk_norm ? (double)norm[d] : 1);
    for (int d = 0; d < hd / 2; d++) {
        double a = (double)(w->inv_freq[d] * (float)pos), f = (double)w->factor;
        double u = x[d], v = x[d + hd / 2];
        x[d] = (u * cos(a) - v * sin(a)) * f;
        x[d + hd / 2] = (v * cos(a) + u * sin(a)) * f;
    }
}

static void ref_attend(const struct world *w, int seq, int pos, const double *q, int kv_head,
                       double scale, double *out)
{
    int hd = w->h.hd, ld = w->h.kv_heads * hd;
    int from = w->h.window > 0 ? LM_MAX(0, pos - w->h.window + 1) : 0;
    double *s = malloc((size_t)(pos + 1) * sizeof *s), m = -INFINITY, sum = 0;
    for (int p = from; p <= pos; p++) {
        s[p] = 0;
        for (int d = 0; d < hd; d++)
            s[p] += q[d] * (double)w->k[seq][p * ld + kv_head * hd + d] * scale;
        m = fmax(m, s[p]);
    }
    for (int d = 0; d < hd; d++)
        out[d] = 0;
    for (int p = from; p <= pos; p++) {
        double e = exp(s[p] - m);
        sum += e;
        for (int d = 0; d < hd; d++)
            out[d] += e * (double)w->v[seq][p * ld + kv_head * hd + d];
    }
    for (int d = 0; d < hd; d++)
        out[d] /= sum;
    free(s);
}

/* ---- one step: some new tokens of each sequence ---------------------------------------- */

struct step {
    float *qkv, *raw, *out;
    int32_t *pos, *q_start, *kv_len;
    int64_t *slot;
    int n;
};

static void step_build(struct world *w, const int *n_new, struct step *st)
{
    st->n = 0;
    for (int s = 0; s < w->n_seqs; s++)
        st->n += n_new[s];
    st->raw = rnd_floats((size_t)st->n * (size_t)w->width);
    st->qkv = malloc((size_t)st->n * (size_t)w->width * sizeof(float) + 4);
    memcpy(st->qkv, st->raw, (size_t)st->n * (size_t)w->width * sizeof(float));
    st->out = malloc((size_t)st->n * (size_t)(w->h.q_heads * w->h.hd) * sizeof(float) + 4);
    st->pos = malloc((size_t)(st->n + 1) * sizeof *st->pos);
    st->slot = malloc((size_t)(st->n + 1) * sizeof *st->slot);
    st->q_start = malloc((size_t)(w->n_seqs + 1) * sizeof *st->q_start);
    st->kv_len = malloc((size_t)w->n_seqs * sizeof *st->kv_len);
    int t = 0;
    for (int s = 0; s < w->n_seqs; s++) {
        st->q_start[s] = t;
        for (int i = 0; i < n_new[s]; i++, t++) {
            int pos = w->len[s] + i;
            st->pos[t] = pos;
            st->slot[t] = (int64_t)w->table[s * w->table_ld + pos / w->h.bt] * w->h.bt +
                          pos % w->h.bt;
        }
        st->kv_len[s] = w->len[s] + n_new[s];
    }
    st->q_start[w->n_seqs] = t;
}

static void step_free(struct step *st)
{
    free(st->qkv), free(st->raw), free(st->out), free(st->pos), free(st->slot);
    free(st->q_start), free(st->kv_len);
}

static struct kn_rope_kv rope_args(const struct world *w, const struct step *st)
{
    return (struct kn_rope_kv){
        .qkv = st->qkv, .ld = w->width, .pos = st->pos, .slot = st->slot,
        .inv_freq = w->inv_freq, .attention_factor = w->factor,
        .q_norm = w->h.qk_norm ? w->q_norm : NULL, .k_norm = w->h.qk_norm ? w->k_norm : NULL,
        .norm_eps = 1e-6f, .pool = w->pool, .layer = w->layer, .block_tokens = w->h.bt,
        .n = st->n, .q_heads = w->h.q_heads, .kv_heads = w->h.kv_heads, .head_dim = w->h.hd,
    };
}

static struct kn_attention attn_args(const struct world *w, const struct step *st)
{
    struct kn_attention a = {
        .out = st->out, .qkv = st->qkv, .ld = w->width, .q_start = st->q_start,
        .kv_len = st->kv_len, .block_table = w->table, .table_ld = w->table_ld,
        .n_seqs = w->n_seqs, .n_tok = st->n, .pool = w->pool, .layer = w->layer,
        .block_tokens = w->h.bt, .q_heads = w->h.q_heads, .kv_heads = w->h.kv_heads,
        .head_dim = w->h.hd, .window = w->h.window, .scale = 1.0f / sqrtf((float)w->h.hd),
    };
    for (int s = 0; s < w->n_seqs; s++) {
        a.max_q = LM_MAX(a.max_q, st->q_start[s + 1] - st->q_start[s]);
        a.max_kv = LM_MAX(a.max_kv, st->kv_len[s]);
    }
    return a;
}

static void check_rope(struct world *w, const struct step *st)
{
    const int hd = w->h.hd, nq = w->h.q_heads, nk = w->h.kv_heads;
    double x[CPU_MAX_HEAD_DIM];
    for (int s = 0, t = 0; s < w->n_seqs; s++)
        for (; t < st->q_start[s + 1]; t++) {
            const float *raw = st->raw + (size_t)t * (size_t)w->width;
            const float *got = st->qkv + (size_t)t * (size_t)w->width;
            int pos = st->pos[t];
            for (int h = 0; h < nq + nk; h++) {
                ref_rotate(w, x, raw + h * hd, pos, h < nq ? w->q_norm : w->k_norm);
                for (int d = 0; d < hd; d++)
                    near(h < nq ? "rope q" : "rope k", t, h * hd + d, got[h * hd + d], x[d], 4,
                         1e-6);
            }
            remember(w, w->k[s] + pos * nk * hd, got + nq * hd);
            remember(w, w->v[s] + pos * nk * hd, raw + (nq + nk) * hd);
        }
}

static void check_attention(struct world *w, const struct step *st)
{
    const int hd = w->h.hd, nq = w->h.q_heads, group = nq / w->h.kv_heads;
    double q[CPU_MAX_HEAD_DIM], want[CPU_MAX_HEAD_DIM];
    for (int s = 0, t = 0; s < w->n_seqs; s++)
        for (; t < st->q_start[s + 1]; t++)
            for (int h = 0; h < nq; h++) {
                if (st->n > 400 && t % 37 && st->n - t > 4)
                    break;              /* of a long prefill, a sample and the end */
                for (int d = 0; d < hd; d++)
                    q[d] = (double)st->qkv[(size_t)t * (size_t)w->width + (size_t)(h * hd + d)];
                ref_attend(w, s, st->pos[t], q, h / group, 1 / sqrt((double)hd), want);
                for (int d = 0; d < hd; d++)
                    near("attention", t, h * hd + d,
                         st->out[((size_t)t * (size_t)nq + (size_t)h) * (size_t)hd + (size_t)d],
                         want[d], 1, 2e-6);
            }
}

/* Feeds n_new[s] tokens to each sequence and checks both operations. */
static void step_run(struct world *w, const int *n_new)
{
    struct step st;
    step_build(w, n_new, &st);
    struct kn_rope_kv r = rope_args(w, &st);
    assert_int_equal(kn_op_rope_kv(w->e->s, &r), LM_OK);
    check_rope(w, &st);
    struct kn_attention a = attn_args(w, &st);
    assert_int_equal(kn_op_attention(w->e->s, &a), LM_OK);
    check_attention(w, &st);
    for (int s = 0; s < w->n_seqs; s++)
        w->len[s] = st.kv_len[s];
    step_free(&st);
}

/* ---- tests ----------------------------------------------------------------------------- */

/* A prefill of ragged lengths, a chunk over a block boundary, then decode steps. */
static void life_case(struct env *e, struct shape h, int n_seqs, int prompt)
{
    struct world w;
    int n_new[MAX_SEQS];
    world_open(&w, e, h, n_seqs, prompt + 16);
    for (int s = 0; s < n_seqs; s++)
        n_new[s] = s % 4 == 3 ? 0 : s % 4 == 0 ? prompt : rnd_int(1, prompt);
    step_run(&w, n_new);
    for (int s = 0; s < n_seqs; s++)
        n_new[s] = s % 3 == 0 ? rnd_int(1, 8) : 1;
    step_run(&w, n_new);
    for (int s = 0; s < n_seqs; s++)
        n_new[s] = 1;
    for (int i = 0; i < 3; i++)
        step_run(&w, n_new);
    world_close(&w);
}

static void shapes_env(struct env *e)
{
    static const struct shape shapes[] = {
        { 4, 2, 32, 16, 0, false }, { 8, 1, 64, 16, 0, true }, { 3, 3, 8, 4, 0, false },
        { 6, 2, 48, 16, 17, false }, { 4, 4, 128, 32, 0, false }, { 10, 2, 20, 5, 7, true },
        { 2, 1, 6, 1, 3, false }, { 32, 2, 16, 16, 64, false }, { 2, 2, 64, 300, 0, false },
        { 40, 2, 24, 7, 0, false },
    };
    for (size_t i = 0; i < LM_COUNT(shapes); i++) {
        life_case(e, shapes[i], 1, 33);
        life_case(e, shapes[i], 7, 20);
    }
}

static void shapes(void **state)
{
    (void)state;
    each_env(shapes_env);
}

/* Lengths at, before and after block and span boundaries. */
static void boundaries_env(struct env *e)
{
    static const int prompts[] = { 1, 15, 16, 17, 31, 32, 127, 128, 129, 257 };
    for (size_t i = 0; i < LM_COUNT(prompts); i++) {
        life_case(e, (struct shape){ 4, 2, 32, 16, 0, false }, 3, prompts[i]);
        life_case(e, (struct shape){ 4, 2, 32, 16, 16, false }, 3, prompts[i]);
        life_case(e, (struct shape){ 4, 1, 16, 16, 100, false }, 1, prompts[i]);
    }
}

static void boundaries(void **state)
{
    (void)state;
    each_env(boundaries_env);
}

/* One long sequence and one kv head: decode splits the keys over the threads. */
static void long_decode_env(struct env *e)
{
    life_case(e, (struct shape){ 8, 1, 32, 16, 0, false }, 1, 1700);
    life_case(e, (struct shape){ 4, 1, 32, 16, 1200, false }, 2, 1600);
}

static void long_decode(void **state)
{
    (void)state;
    each_env(long_decode_env);
}

/* The second sequence's output in a step where the first has `len` positions before it and `n_q`
 * queries in it, and the second's query is `row`. */
static void second_of_two(struct world *w, int len, int n_q, const float *row, float *out)
{
    struct step st;
    w->len[0] = len;
    step_build(w, (int[]){ n_q, 1 }, &st);
    memcpy(st.qkv + (size_t)n_q * (size_t)w->width, row, (size_t)w->width * sizeof *row);
    struct kn_rope_kv r = rope_args(w, &st);
    struct kn_attention a = attn_args(w, &st);
    assert_int_equal(kn_op_rope_kv(w->e->s, &r), LM_OK);
    assert_int_equal(kn_op_attention(w->e->s, &a), LM_OK);
    const size_t n = (size_t)(w->h.q_heads * w->h.hd);
    memcpy(out, st.out + (size_t)n_q * n, n * sizeof *out);
    step_free(&st);
}

/* How a row's keys are split, and so its bits, follows from its own length: not from a neighbour
 * that is shorter, longer, or in its prefill. */
static void company_env(struct env *e)
{
    static const int beside[][2] = { { 1700, 1 }, { 3300, 1 }, { 1700, 2 }, { 20, 70 } };
    struct world w;
    float one[32 * 8], other[32 * 8];
    world_open(&w, e, (struct shape){ 8, 1, 32, 16, 0, false }, 2, 3400);
    step_run(&w, (int[]){ 3300, 1600 });
    float *row = rnd_floats((size_t)w.width);
    second_of_two(&w, 40, 1, row, one);
    for (size_t i = 0; i < LM_COUNT(beside); i++) {
        second_of_two(&w, beside[i][0], beside[i][1], row, other);
        assert_memory_equal(one, other, sizeof one);
    }
    free(row);
    world_close(&w);
}

static void company(void **state)
{
    (void)state;
    each_env(company_env);
}

static void fp8(void **state)
{
    (void)state;
    kv = KN_KV_E4M3;
    each_env(shapes_env);
    each_env(boundaries_env);
    each_env(long_decode_env);
    kv = KN_KV_NATIVE;
}

/* Every code of E4M3 both ways, what lies between two of them, and what is too large. */
static void e4m3(void **state)
{
    (void)state;
    for (int isa = 0; isa < CPU_ISA_COUNT; isa++) {
        if (!cpu_isa_runs((enum cpu_isa)isa))
            continue;
        const struct cpu_vec *const all[] = { &cpu_vec_generic, &cpu_vec_avx2, &cpu_vec_avx512 };
        uint8_t code[2 * 131];
        float got[256];
        for (int i = 0; i < 256; i++)
            code[i % 128 + i / 128 * 131] = (uint8_t)i;
        for (int n = 1; n <= 128; n++) {
            all[isa]->widen_e4m3(got, code, 131, 2, n);
            for (int r = 0; r < 2; r++)
                for (int i = 0; i < n; i++) {
                    int m = i % 8, e = i / 8;
                    double want = e ? ldexp(8 + m, e - 10) : ldexp(m, -9);
                    if (i == 127)
                        assert_true(isnan(got[r * n + i]));
                    else
                        assert_true((double)got[r * n + i] == (r ? -want : want));
                }
        }
    }
    for (int i = 0; i < 126; i++) {
        double a = i / 8 ? ldexp(8 + i % 8, i / 8 - 10) : ldexp(i % 8, -9);
        double b = (i + 1) / 8 ? ldexp(8 + (i + 1) % 8, (i + 1) / 8 - 10) : ldexp(i + 1, -9);
        float mid = (float)((a + b) / 2);
        assert_int_equal(cpu_f32_to_e4m3((float)a), i);
        assert_int_equal(cpu_f32_to_e4m3((float)-a), i | 0x80);
        assert_int_equal(cpu_f32_to_e4m3(nextafterf(mid, 0)), i);
        assert_int_equal(cpu_f32_to_e4m3(mid), i + (i & 1));
        assert_int_equal(cpu_f32_to_e4m3(nextafterf(mid, 500)), i + 1);
    }
    static const float large[] = { 448, 449, 463.9f, 464, 480, 1e9f, INFINITY };
    for (size_t i = 0; i < LM_COUNT(large); i++) {
        assert_int_equal(cpu_f32_to_e4m3(large[i]), 0x7e);
        assert_int_equal(cpu_f32_to_e4m3(-large[i]), 0xfe);
    }
    assert_int_equal(cpu_f32_to_e4m3(NAN) & 0x7f, 0x7f);
}

static void dynamic_ntk_env(struct env *e)
{
    enum { HD = 32, N = 3 };
    struct world w;
    world_open(&w, e, (struct shape){ 2, 1, HD, 16, 0, false }, 1, 64);
    w.factor = 1;
    struct step st;
    step_build(&w, (int[]){ N }, &st);
    int32_t len[N] = { 50, 64, 200 }, pos[N] = { 11, 63, 190 };
    memcpy(st.pos, pos, sizeof pos);
    struct kn_rope_kv r = rope_args(&w, &st);
    r.dyn_len = len, r.dyn_max = 64, r.dyn_base = 10000, r.dyn_factor = 2;
    st.slot[1] = -1;            /* writes nothing */
    assert_int_equal(kn_op_rope_kv(e->s, &r), LM_OK);
    for (int t = 0; t < N; t++)
        for (int d = 0; d < HD / 2; d++) {
            double base = len[t] <= 64 ? 1e4 : 1e4 * pow(2.0 * len[t] / 64 - 1, 32.0 / 30);
            double a = (double)((float)pow(base, -2.0 * d / HD) * (float)pos[t]);
            double u = (double)st.raw[t * w.width + d], v = (double)st.raw[t * w.width + d + 16];
            near("ntk", t, d, st.qkv[t * w.width + d], u * cos(a) - v * sin(a), 1, 2e-5);
        }
    step_free(&st);
    world_close(&w);
}

static void dynamic_ntk(void **state)
{
    (void)state;
    each_env(dynamic_ntk_env);
}

static void refusals(void **state)
{
    (void)state;
    struct env e = env_open(CPU_ISA_COUNT, 1);
    struct world w;
    world_open(&w, &e, (struct shape){ 4, 2, 32, 16, 0, false }, 2, 40);
    struct step st;
    step_build(&w, (int[]){ 20, 3 }, &st);
    struct kn_rope_kv r = rope_args(&w, &st);
    struct kn_attention a = attn_args(&w, &st);
#define REFUSED(op, obj, field, value)                                                         \
    do {                                                                                       \
        __typeof__(obj) bad = obj;                                                             \
        bad.field = value;                                                                     \
        assert_int_equal(kn_op_##op(e.s, &bad), LM_INVALID);                                   \
    } while (0)
    REFUSED(rope_kv, r, head_dim, 31);
    REFUSED(rope_kv, r, q_heads, 3);
    REFUSED(rope_kv, r, layer, 3);
    REFUSED(rope_kv, r, block_tokens, 64);
    REFUSED(rope_kv, r, ld, 100);
    REFUSED(rope_kv, r, inv_freq, NULL);
    REFUSED(attention, a, max_q, 19);
    REFUSED(attention, a, max_kv, 19);
    REFUSED(attention, a, table_ld, 1);
    REFUSED(attention, a, layer, -1);
    REFUSED(attention, a, out, NULL);
    int64_t keep = st.slot[0];
    st.slot[0] = (int64_t)w.pool.num_blocks * 16;
    assert_int_equal(kn_op_rope_kv(e.s, &r), LM_INVALID);
    st.slot[0] = keep;
    w.table[1] = w.pool.num_blocks;
    assert_int_equal(kn_op_attention(e.s, &a), LM_INVALID);
    r.head_dim = 1024, r.q_heads = r.kv_heads = 1, r.block_tokens = 1, r.ld = 4096, r.n = 0;
    r.pool.block_bytes = 1 << 20;
    assert_int_equal(kn_op_rope_kv(e.s, &r), LM_UNSUPPORTED);
    step_free(&st);
    world_close(&w);
    env_close(&e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shapes),
        cmocka_unit_test(boundaries),
        cmocka_unit_test(long_decode),
        cmocka_unit_test(company),
        cmocka_unit_test(fp8),
        cmocka_unit_test(e4m3),
        cmocka_unit_test(dynamic_ntk),
        cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests_name("kernels: attention", tests, NULL, NULL);
}
