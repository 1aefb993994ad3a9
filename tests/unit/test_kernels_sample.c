/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sampling against a reference that sorts the whole vocabulary, and the in-process communicator.
 */
#include "tests/unit/test_kernels_util.h"

#include <pthread.h>

/* ---- a plain reference ----------------------------------------------------------------- */

struct ref {
    double p[1 << 17];          /* probability left after the filters, by id */
    int kept;
};

struct rank {
    double v;
    int id;
};

static int by_rank(const void *a, const void *b)
{
    const struct rank *x = a, *y = b;
    return x->v > y->v ? -1 : x->v < y->v ? 1 : x->id - y->id;
}

static double *ref_adjust(const float *logits, int vocab, const struct kn_sample_row *r,
                          const int32_t *hist)
{
    double *x = malloc((size_t)vocab * sizeof *x);
    for (int i = 0; i < vocab; i++) {
        int prompt = 0, out = 0;
        for (int j = 0; j < r->n_prompt + r->n_output; j++)
            *(j < r->n_prompt ? &prompt : &out) += hist[r->hist0 + j] == i;
        x[i] = (double)logits[i];
        if (prompt + out)
            x[i] = x[i] > 0 ? x[i] / (double)r->repetition_penalty
                            : x[i] * (double)r->repetition_penalty;
        x[i] -= (double)r->frequency_penalty * out + (out ? (double)r->presence_penalty : 0);
        for (int j = 0; j < r->n_banned; j++)
            if (hist[r->banned0 + j] == i)
                x[i] = -INFINITY;
    }
    return x;
}

static void ref_filter(struct ref *f, const double *x, int vocab, const struct kn_sample_row *r)
{
    struct rank *o = malloc((size_t)vocab * sizeof *o);
    double total = 0, mass = 0;
    for (int i = 0; i < vocab; i++)
        o[i] = (struct rank){ x[i] / (double)r->temperature, i };
    qsort(o, (size_t)vocab, sizeof *o, by_rank);
    int n = r->top_k > 0 ? LM_MIN(r->top_k, vocab) : vocab;
    double top = o[0].v;
    for (int i = 0; i < n; i++) {
        o[i].v = exp(o[i].v - top);
        total += o[i].v;
    }
    f->kept = 0;
    memset(f->p, 0, (size_t)vocab * sizeof f->p[0]);
    for (int i = 0; i < n && (i == 0 || mass < (double)r->top_p * total || r->top_p >= 1); i++) {
        mass += o[i].v;
        if (o[i].v >= (double)r->min_p && o[i].v > 0) {
            f->p[o[i].id] = o[i].v;
            f->kept++;
        }
    }
    double sum = 0;
    for (int i = 0; i < vocab; i++)
        sum += f->p[i];
    for (int i = 0; i < vocab; i++)
        f->p[i] /= sum;
    free(o);
}

static uint64_t ref_mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static double ref_uniform(uint64_t seed, uint64_t counter)
{
    uint64_t z = ref_mix(ref_mix(seed) + (counter + 1) * 0x9e3779b97f4a7c15u);
    return (double)(z >> 11) / 9007199254740992.0;
}

/* The id where the distribution passes u, walking ids upwards; two ids when u is within rounding
 * of a boundary. */
static bool ref_draw_ok(const struct ref *f, int vocab, double u, int got)
{
    double sum = 0;
    for (int i = 0; i < vocab; i++) {
        if (f->p[i] > 0 && i == got)
            return u >= sum - 1e-6 && u <= sum + f->p[i] + 1e-6;
        sum += f->p[i];
    }
    return false;
}

/* ---- running --------------------------------------------------------------------------- */

static const struct kn_sample_row plain = { .temperature = 1, .top_p = 1, .forced = -1,
                                            .repetition_penalty = 1 };

struct result {
    int32_t id[256], top_id[256 * KN_MAX_TOP_LOGPROBS];
    float lp[256], top_lp[256 * KN_MAX_TOP_LOGPROBS];
};

static lm_status sample_rows(struct env *e, const float *logits, int n, int vocab, int64_t ld,
                             const struct kn_sample_row *rows, const int32_t *hist,
                             struct result *out)
{
    size_t bytes = kn_sample_workspace(e->dev, n, vocab);
    void *ws = dev_alloc(e, bytes);
    memset(ws, 0xff, bytes);
    struct kn_sample a = { .logits = logits, .rows = rows, .history = hist, .out_id = out->id,
                           .out_logprob = out->lp, .top_id = out->top_id,
                           .top_logprob = out->top_lp, .workspace = ws, .n = n, .vocab = vocab,
                           .ld = ld };
    lm_status st = kn_op_sample(e->s, &a);
    kn_free(e->dev, ws);
    return st;
}

static struct result res;
static struct ref ref;

static void greedy_env(struct env *e)
{
    static const int vocabs[] = { 1, 7, 100, 1000, 5003 };
    for (size_t k = 0; k < LM_COUNT(vocabs); k++) {
        int v = vocabs[k], ld = v + 3, n = 33;
        float *x = rnd_floats((size_t)(n * ld));
        struct kn_sample_row rows[33];
        for (int i = 0; i < n; i++) {
            rows[i] = plain;
            rows[i].temperature = 0;
            rows[i].want_logprob = i % 2;
            rows[i].top_logprobs = i % (KN_MAX_TOP_LOGPROBS + 1);
            rows[i].forced = i % 5 == 4 ? rnd_int(0, v - 1) : -1;
            if (i % 3 == 0)             /* a tie: the lowest id wins */
                x[i * ld + rnd_int(0, v - 1)] = x[i * ld + rnd_int(0, v - 1)] = 2.0f;
            if (i % 4 == 1 && v > 50)
                x[i * ld + 9] = NAN;
        }
        assert_int_equal(sample_rows(e, x, n, v, ld, rows, NULL, &res), LM_OK);
        for (int i = 0; i < n; i++) {
            const float *row = x + i * ld;
            struct rank *o = malloc((size_t)v * sizeof *o);
            double sum = 0;
            bool nan = false;
            for (int j = 0; j < v; j++) {
                nan |= isnan(row[j]);
                o[j] = (struct rank){ isnan(row[j]) ? -INFINITY : (double)row[j], j };
                sum += isnan(row[j]) ? 0 : exp((double)row[j]);
            }
            qsort(o, (size_t)v, sizeof *o, by_rank);
            int want = rows[i].forced >= 0 ? rows[i].forced : o[0].id;
            assert_int_equal(res.id[i], want);
            if (!rows[i].want_logprob)
                assert_true(isnan(res.lp[i]));
            else if (!nan)
                near("logprob", i, want, res.lp[i], (double)row[want] - log(sum), 10, 2e-7);
            for (int j = 0; j < LM_MIN(rows[i].top_logprobs, v) && !nan; j++) {
                assert_int_equal(res.top_id[i * KN_MAX_TOP_LOGPROBS + j], o[j].id);
                near("top", i, j, res.top_lp[i * KN_MAX_TOP_LOGPROBS + j], o[j].v - log(sum), 10,
                     2e-7);
            }
            free(o);
        }
        free(x);
    }
}

static void greedy(void **state)
{
    (void)state;
    each_env(greedy_env);
}

static struct kn_sample_row random_row(int i, int vocab)
{
    struct kn_sample_row r = plain;
    r.temperature = 0.3f + (float)rnd_int(0, 10) * 0.15f;
    r.seed = rnd(), r.counter = (uint64_t)i;
    if (i % 2)
        r.top_k = i % 7 == 1 ? 1 : rnd_int(1, vocab + 3);
    if (i % 3)
        r.top_p = (float)rnd_int(1, 99) / 100;
    if (i % 5 == 0)
        r.min_p = (float)rnd_int(1, 50) / 100;
    if (i % 4 == 0) {
        r.repetition_penalty = 1.3f;
        r.presence_penalty = 0.4f;
        r.frequency_penalty = i % 8 ? 0.2f : -0.2f;
        r.hist0 = 5, r.n_prompt = 30, r.n_output = 60;
    }
    if (i % 6 == 0)
        r.banned0 = 2, r.n_banned = LM_MIN(3, vocab - 1);
    return r;
}

static void filters_env(struct env *e)
{
    static const int vocabs[] = { 2, 5, 64, 257, 4000 };
    for (size_t k = 0; k < LM_COUNT(vocabs); k++)
        for (int spread = 1; spread <= 12; spread += 11) {
            int v = vocabs[k], n = 120;
            float *x = rnd_floats((size_t)(n * v));
            int32_t hist[100];
            struct kn_sample_row rows[120];
            for (int i = 0; i < 100; i++)
                hist[i] = i < 5 ? i : rnd_int(-1, LM_MIN(v + 1, 50));
            for (int i = 0; i < n * v; i++)
                x[i] *= (float)spread;
            for (int i = 0; i < n; i++)
                rows[i] = random_row(i, v);
            assert_int_equal(sample_rows(e, x, n, v, v, rows, hist, &res), LM_OK);
            for (int i = 0; i < n; i++) {
                double *a = ref_adjust(x + i * v, v, &rows[i], hist);
                ref_filter(&ref, a, v, &rows[i]);
                double u = ref_uniform(rows[i].seed, rows[i].counter);
                if (!ref_draw_ok(&ref, v, u, res.id[i]))
                    fail_msg("vocab %d, row %d: token %d, u %g, kept %d, p %g, k %d, top_p %g", v,
                             i, res.id[i], u, ref.kept, ref.p[res.id[i]], rows[i].top_k,
                             (double)rows[i].top_p);
                free(a);
            }
            free(x);
        }
}

static void filters(void **state)
{
    (void)state;
    each_env(filters_env);
}

/* A real vocabulary's size, and ties across the cut: exactly k survive, lowest ids first. */
static void large_vocab(void **state)
{
    (void)state;
    enum { V = 128256 };
    struct env e = env_open(CPU_ISA_COUNT, 2);
    float *x = rnd_floats(V);
    struct kn_sample_row r = plain;
    for (int i = 0; i < V; i++)
        x[i] *= 8;
    for (int i = 0; i < 40; i++) {
        r.seed = rnd();
        r.top_k = (int[]){ 0, 1, 40, 64, 65, 1000 }[i % 6];
        r.top_p = i % 4 ? 0.2f * (float)(i % 4) : 1;
        assert_int_equal(sample_rows(&e, x, 1, V, V, &r, NULL, &res), LM_OK);
        double *a = ref_adjust(x, V, &r, NULL);
        ref_filter(&ref, a, V, &r);
        assert_true(ref_draw_ok(&ref, V, ref_uniform(r.seed, r.counter), res.id[0]));
        free(a);
    }
    for (int i = 0; i < V; i++)
        x[i] = 1;
    r.top_k = 3, r.top_p = 1;
    bool seen[3] = { false };
    for (int i = 0; i < 100; i++) {
        r.counter = (uint64_t)i;
        assert_int_equal(sample_rows(&e, x, 1, V, V, &r, NULL, &res), LM_OK);
        assert_in_range(res.id[0], 0, 2);
        seen[res.id[0]] = true;
    }
    assert_true(seen[0] && seen[1] && seen[2]);
    free(x);
    env_close(&e);
}

/* 20,000 draws follow the distribution (chi-square, 9 degrees of freedom, far tail). */
static void distribution(void **state)
{
    (void)state;
    enum { V = 10, N = 20000 };
    struct env e = env_open(CPU_ISA_COUNT, 1);
    float *x = rnd_floats(V);
    int count[V] = { 0 };
    struct kn_sample_row r = plain;
    r.seed = 42;
    for (int i = 0; i < N; i++) {
        r.counter = (uint64_t)i;
        assert_int_equal(sample_rows(&e, x, 1, V, V, &r, NULL, &res), LM_OK);
        count[res.id[0]]++;
    }
    double *a = ref_adjust(x, V, &r, NULL), chi = 0;
    ref_filter(&ref, a, V, &r);
    for (int i = 0; i < V; i++) {
        double want = ref.p[i] * N;
        chi += (count[i] - want) * (count[i] - want) / want;
    }
    assert_true(chi < 35);
    free(a), free(x);
    env_close(&e);
}

static void odd_rows(void **state)
{
    (void)state;
    struct env e = env_open(CPU_ISA_COUNT, 1);
    float x[8];
    int32_t hist[8] = { 0, 1, 2, 3, 4, 5, 6, 7 };
    struct kn_sample_row r = plain;
    for (int i = 0; i < 8; i++)
        x[i] = NAN;
    assert_int_equal(sample_rows(&e, x, 1, 8, 8, &r, hist, &res), LM_OK);
    assert_int_equal(res.id[0], -1);
    x[3] = INFINITY;
    assert_int_equal(sample_rows(&e, x, 1, 8, 8, &r, hist, &res), LM_OK);
    assert_int_equal(res.id[0], 3);
    r.n_banned = 8;
    assert_int_equal(sample_rows(&e, x, 1, 8, 8, &r, hist, &res), LM_OK);
    assert_int_equal(res.id[0], -1);
    for (int i = 0; i < 8; i++)
        x[i] = (float)i;
    r.n_banned = 0, r.top_p = 0;        /* the best alone */
    assert_int_equal(sample_rows(&e, x, 1, 8, 8, &r, hist, &res), LM_OK);
    assert_int_equal(res.id[0], 7);
    r.top_p = 1, r.temperature = 1e-9f;
    assert_int_equal(sample_rows(&e, x, 1, 8, 8, &r, hist, &res), LM_OK);
    assert_int_equal(res.id[0], 7);
#define REFUSED(field, value)                                                                  \
    do {                                                                                       \
        struct kn_sample_row bad = plain;                                                      \
        bad.field = value;                                                                     \
        assert_int_equal(sample_rows(&e, x, 1, 8, 8, &bad, NULL, &res), LM_INVALID);           \
    } while (0)
    REFUSED(forced, 8);
    REFUSED(top_logprobs, KN_MAX_TOP_LOGPROBS + 1);
    REFUSED(temperature, -1);
    REFUSED(temperature, NAN);
    REFUSED(repetition_penalty, 0);
    REFUSED(n_banned, 1);
    REFUSED(hist0, -1);
    env_close(&e);
}

/* ---- communicator ---------------------------------------------------------------------- */

#define WORLD 3
#define COUNT 1001

struct peer {
    kn_device *dev;
    const uint8_t *id;
    int rank, failed;
    float sum[COUNT], all[WORLD * 7];
};

static float peer_value(int rank, int i)
{
    return (float)((rank + 1) * (i % 17)) * 0.25f;
}

static void *peer_main(void *arg)
{
    struct peer *p = arg;
    kn_stream *s = NULL;
    kn_comm *c = NULL;
    float mine[7];
    uint16_t half[5];
    p->failed = kn_stream_new(p->dev, &s, NULL) != LM_OK;
    p->failed |= kn_comm_new(p->dev, p->id, p->rank, WORLD, &c, NULL) != LM_OK;
    for (int round = 0; round < 50 && !p->failed; round++) {
        for (int i = 0; i < COUNT; i++)
            p->sum[i] = peer_value(p->rank, i + round);
        p->failed |= kn_all_reduce_sum(s, c, p->sum, COUNT, KN_F32) != LM_OK;
        for (int i = 0; i < COUNT; i++)
            p->failed |= p->sum[i] != peer_value(5, i + round);         /* 1 + 2 + 3 */
        for (int i = 0; i < 7; i++)
            mine[i] = peer_value(p->rank, i);
        p->failed |= kn_all_gather(s, c, p->all, mine, 7, KN_F32) != LM_OK;
        for (int i = 0; i < 7 * WORLD; i++)
            p->failed |= p->all[i] != peer_value(i / 7, i % 7);
        for (int i = 0; i < 5; i++)
            half[i] = cpu_f32_to_bf16(peer_value(p->rank, i));
        p->failed |= kn_all_reduce_sum(s, c, half, 5, KN_BF16) != LM_OK;
        for (int i = 0; i < 5; i++)
            p->failed |= cpu_bf16_to_f32(half[i]) != peer_value(5, i);
    }
    /* Ranks that disagree all hear of it, and the group still works afterwards. */
    p->failed |= kn_all_reduce_sum(s, c, p->sum, (size_t)p->rank, KN_F32) != LM_INVALID;
    p->failed |= kn_all_reduce_sum(s, c, p->sum, 0, KN_F32) != LM_OK;
    kn_comm_free(c);
    kn_stream_free(s);
    return NULL;
}

static void communicator(void **state)
{
    (void)state;
    struct env e = env_open(CPU_ISA_COUNT, 1);
    uint8_t id[KN_COMM_ID_BYTES], other[KN_COMM_ID_BYTES];
    assert_int_equal(kn_comm_id(e.dev, id, NULL), LM_OK);
    assert_int_equal(kn_comm_id(e.dev, other, NULL), LM_OK);
    assert_memory_not_equal(id, other, sizeof id);
    static struct peer peers[WORLD];
    pthread_t t[WORLD];
    for (int r = 0; r < WORLD; r++) {
        peers[r] = (struct peer){ .dev = e.dev, .id = id, .rank = r };
        assert_int_equal(pthread_create(&t[r], NULL, peer_main, &peers[r]), 0);
    }
    for (int r = 0; r < WORLD; r++) {
        pthread_join(t[r], NULL);
        assert_int_equal(peers[r].failed, 0);
    }
    kn_comm *c;
    struct lm_err err;
    assert_int_equal(kn_comm_new(e.dev, other, 1, 1, &c, &err), LM_INVALID);
    assert_int_equal(kn_comm_new(e.dev, other, 0, 1, &c, &err), LM_OK);
    float x = 3;
    assert_int_equal(kn_all_reduce_sum(e.s, c, &x, 1, KN_F32), LM_OK);
    assert_true(x == 3);
    kn_comm *twice;
    assert_int_equal(kn_comm_new(e.dev, other, 0, 1, &twice, &err), LM_INVALID);
    kn_comm_free(c);
    env_close(&e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(greedy),
        cmocka_unit_test(filters),
        cmocka_unit_test(large_vocab),
        cmocka_unit_test(distribution),
        cmocka_unit_test(odd_rows),
        cmocka_unit_test(communicator),
    };
    return cmocka_run_group_tests_name("kernels: sample", tests, NULL, NULL);
}
