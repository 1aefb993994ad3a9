/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Device, memory, number formats, and the operations on single rows: GEMM, embed, rmsnorm,
 * silu_mul, gather_rows. Each against a double-precision reference, on every instruction set, with
 * one thread and several.
 */
#include "tests/unit/test_kernels_util.h"

#include <pthread.h>

/* ---- number formats -------------------------------------------------------------------- */

static void half_formats(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float b = cpu_bf16_to_f32((uint16_t)h), f = cpu_f16_to_f32((uint16_t)h);
        if (!isnan(b))
            assert_int_equal(cpu_f32_to_bf16(b), h);
        if (!isnan(f))
            assert_int_equal(cpu_f32_to_f16(f), h);
        assert_int_equal(isnan(f), (h & 0x7c00) == 0x7c00 && (h & 0x3ff));
    }
    assert_float_equal(cpu_f16_to_f32(0x0001), 0x1p-24f, 0);
    assert_float_equal(cpu_f16_to_f32(0x3555), 0.333251953125f, 0);
    assert_int_equal(cpu_f32_to_f16(65519.0f), 0x7bff);
    assert_int_equal(cpu_f32_to_f16(65520.0f), 0x7c00);
    assert_int_equal(cpu_f32_to_f16(0x1.002p0f), 0x3c00);      /* a tie goes to even */
    assert_int_equal(cpu_f32_to_f16(0x1.006p0f), 0x3c02);
    assert_int_equal(cpu_f32_to_bf16(0x1.01p0f), 0x3f80);
    assert_int_equal(cpu_f32_to_bf16(0x1.03p0f), 0x3f82);
    assert_true(isnan(cpu_bf16_to_f32(cpu_f32_to_bf16(NAN))));
}

/* ---- device and memory ----------------------------------------------------------------- */

static void device_props(void **state)
{
    (void)state;
    struct env e = env_open(CPU_ISA_COUNT, 2);
    struct kn_props p;
    kn_props(e.dev, &p);
    assert_string_equal(p.backend, "cpu");
    assert_int_equal(p.threads, 2);
    assert_int_equal(p.act, KN_F32);
    assert_true(p.mem_total > 0 && p.mem_free > 0 && p.mem_free <= p.mem_total);
    assert_non_null(strstr(p.name, "2 threads"));
    env_close(&e);

    kn_device *dev;
    struct lm_err err;
    assert_int_equal(kn_open("cpu", &(struct kn_open_params){ .index = 1 }, &dev, &err),
                     LM_NOT_FOUND);
    assert_int_equal(kn_open("cpu", &(struct kn_open_params){ .threads = -1 }, &dev, &err),
                     LM_INVALID);
    assert_int_equal(kn_open("tpu", NULL, &dev, &err), LM_INVALID);
}

static void copies_and_cells(void **state)
{
    (void)state;
    struct env e = env_open(CPU_ISA_COUNT, 1);
    char *a = dev_alloc(&e, 4096), *b = dev_alloc(&e, 8 << 20), host[96], back[4096];
    assert_int_equal((uintptr_t)a % 256, 0);
    assert_int_equal((uintptr_t)b % 256, 0);
    for (int i = 0; i < 96; i++)
        host[i] = (char)i;
    assert_int_equal(kn_zero(e.s, a, 4096), LM_OK);
    int64_t at[3] = { 64, 1024, 0 };
    assert_int_equal(kn_scatter_cells(e.s, a, at, 3, 32, host), LM_OK);
    assert_int_equal(kn_copy(e.s, b, a, 4096), LM_OK);
    assert_int_equal(kn_copy_out(e.s, back, b, 4096), LM_OK);
    assert_int_equal(kn_stream_sync(e.s, NULL), LM_OK);
    assert_memory_equal(back + 64, host, 32);
    assert_memory_equal(back + 1024, host + 32, 32);
    assert_memory_equal(back, host + 64, 32);
    assert_int_equal(back[32], 0);
    kn_event *ev;
    assert_int_equal(kn_event_new(e.dev, &ev, NULL), LM_OK);
    assert_int_equal(kn_event_record(ev, e.s), LM_OK);
    assert_int_equal(kn_event_wait(e.s, ev), LM_OK);
    assert_int_equal(kn_event_query(ev), LM_OK);
    assert_int_equal(kn_event_sync(ev, NULL), LM_OK);
    kn_event_free(ev);
    kn_free(e.dev, a);
    kn_free(e.dev, b);
    assert_int_equal(kn_copy(e.s, NULL, host, 1), LM_INVALID);
    env_close(&e);
}

/* ---- gemm ------------------------------------------------------------------------------ */

static double round_to(float v, enum kn_dtype t)
{
    if (t == KN_F32 || t == KN_E4M3)
        return v;
    return t == KN_F16 ? cpu_f16_to_f32(cpu_f32_to_f16(v)) : cpu_bf16_to_f32(cpu_f32_to_bf16(v));
}

/* What E4M3 keeps of a row: the number nearest to w / scale, times scale. */
static void round_row(float *w, int k)
{
    float most = 0;
    for (int i = 0; i < k; i++)
        most = fmaxf(most, fabsf(w[i]));
    float scale = most > 0 ? most / 448 : 1;
    for (int i = 0; i < k; i++) {
        int e;
        double x = (double)(w[i] / scale);
        (void)frexp(fabs(x), &e);
        double unit = ldexp(1, LM_MAX(e - 1, -6) - 3);
        w[i] = (float)(copysign(fmin(nearbyint(fabs(x) / unit) * unit, 448), x) * (double)scale);
    }
}

/* In rectangles, as a shard does it: the upper part, then the lower in two halves. */
static void upload_parts(kn_mat *mat, const float *w, int n, int k)
{
    int n1 = n / 2, k1 = k / 3;
    if (mat->dtype == KN_E4M3)
        k1 = k;
    assert_int_equal(kn_mat_upload(mat, 0, 0, n1, k, w, KN_F32, (size_t)k, NULL), LM_OK);
    assert_int_equal(kn_mat_upload(mat, n1, 0, n - n1, k1, w + n1 * k, KN_F32, (size_t)k, NULL),
                     LM_OK);
    if (k1 < k)
        assert_int_equal(kn_mat_upload(mat, n1, k1, n - n1, k - k1, w + n1 * k + k1, KN_F32,
                                       (size_t)k, NULL), LM_OK);
}

static void gemm_case(struct env *e, enum kn_dtype t, int m, int n, int k, bool bias, bool acc)
{
    int64_t ldx = k + 3, ldy = n + 5;
    float *w = rnd_floats((size_t)n * (size_t)k), *x = rnd_floats((size_t)(m * ldx));
    float *y = rnd_floats((size_t)(m * ldy)), *b = rnd_floats((size_t)n);
    float *y0 = malloc((size_t)(m * ldy) * sizeof *y0);
    memcpy(y0, y, (size_t)(m * ldy) * sizeof *y0);
    kn_mat *mat;
    assert_int_equal(kn_mat_new(e->dev, t, n, k, &mat, NULL), LM_OK);
    upload_parts(mat, w, n, k);
    for (int j = 0; t == KN_E4M3 && j < n; j++)
        round_row(w + j * k, k);
    struct kn_gemm a = { .y = y, .x = x, .w = mat, .bias = bias ? b : NULL, .m = m, .ldx = ldx,
                         .ldy = ldy, .accumulate = acc };
    assert_int_equal(kn_op_gemm(e->s, &a), LM_OK);
    for (int i = 0; i < m; i++) {
        for (int j = 0; j < n; j++) {
            double sum = bias ? (double)b[j] : 0, mag = fabs(sum);
            if (acc) {          /* the float that is added to rounds as the products do */
                sum += y0[i * ldy + j];
                mag += fabs((double)y0[i * ldy + j]);
            }
            for (int l = 0; l < k; l++) {
                double p = (double)x[i * ldx + l] * round_to(w[j * k + l], t);
                sum += p;
                mag += fabs(p);
            }
            near("gemm", i, j, y[i * ldy + j], sum, mag, 1e-6);
        }
        for (int64_t j = n; j < ldy; j++)
            assert_true(y[i * ldy + j] == y0[i * ldy + j]);
    }
    kn_mat_free(mat);
    free(w), free(x), free(y), free(b), free(y0);
}

static void gemm_env(struct env *e)
{
    static const int ms[] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 33, 133 };
    for (size_t i = 0; i < LM_COUNT(ms); i++) {
        enum kn_dtype t = (enum kn_dtype)(i % 4);
        gemm_case(e, t, ms[i], rnd_int(1, 100), rnd_int(1, 70), i % 2, i % 5 == 0);
        gemm_case(e, (enum kn_dtype)((i + 1) % 4), ms[i], 64, 96, false, false);
        gemm_case(e, KN_E4M3, ms[i], rnd_int(1, 100), rnd_int(1, 300), i % 3, i % 4 == 0);
    }
    gemm_case(e, KN_BF16, 1, 500, 700, true, true);
    gemm_case(e, KN_F16, 2, 333, 257, false, false);
    gemm_case(e, KN_F32, 1, 1, 1, true, false);
    gemm_case(e, KN_BF16, 200, 130, 65, true, false);
    /* OpenBLAS: more than one strip of panels, more than one strip deep */
    gemm_case(e, KN_BF16, 130, 300, 1030, true, true);
    gemm_case(e, KN_F16, 128, 545, 513, false, true);
    gemm_case(e, KN_F32, 131, 33, 1025, true, false);
    gemm_case(e, KN_E4M3, 129, 290, 1031, true, true);
}

static void gemm(void **state)
{
    (void)state;
    each_env(gemm_env);
}

/* A row alone and the same row in company: equal up to the rounding of another summation order,
 * which grows with the products' magnitudes; what gemm_case() allows each of the two. */
static void gemm_rows_alone_env(struct env *e)
{
    enum { M = 33, N = 96, K = 192 };
    float *w = rnd_floats(N * K), *x = rnd_floats(M * K), all[M * N], one[N];
    kn_mat *mat;
    assert_int_equal(kn_mat_new(e->dev, KN_BF16, N, K, &mat, NULL), LM_OK);
    assert_int_equal(kn_mat_upload(mat, 0, 0, N, K, w, KN_F32, K, NULL), LM_OK);
    struct kn_gemm a = { .y = all, .x = x, .w = mat, .m = M, .ldx = K, .ldy = N };
    assert_int_equal(kn_op_gemm(e->s, &a), LM_OK);
    for (int i = 0; i < M; i++) {
        a.y = one, a.x = x + i * K, a.m = 1;
        assert_int_equal(kn_op_gemm(e->s, &a), LM_OK);
        for (int j = 0; j < N; j++) {
            double mag = 0;
            for (int l = 0; l < K; l++)
                mag += fabs((double)x[i * K + l] * round_to(w[j * K + l], KN_BF16));
            near("alone", i, j, one[j], all[i * N + j], mag, 1e-6);
        }
    }
    /* Within one bucket (the same m), not even the last bit depends on the neighbours. */
    float again[M * N];
    for (int i = 1; i < M * K; i++)
        x[i] = i < K ? x[i] : rnd_float();
    a = (struct kn_gemm){ .y = again, .x = x, .w = mat, .m = M, .ldx = K, .ldy = N };
    assert_int_equal(kn_op_gemm(e->s, &a), LM_OK);
    assert_memory_equal(again, all, N * sizeof(float));
    kn_mat_free(mat);
    free(w), free(x);
}

static void gemm_rows_alone(void **state)
{
    (void)state;
    each_env(gemm_rows_alone_env);
}

static void mat_refusals(void **state)
{
    (void)state;
    struct env e = env_open(CPU_ISA_COUNT, 1);
    kn_mat *m;
    struct lm_err err;
    float src[64] = { 0 }, y[64];
    assert_int_equal(kn_mat_new(e.dev, KN_F32, 0, 4, &m, &err), LM_INVALID);
    assert_int_equal(kn_mat_new(e.dev, KN_F32, 8, 8, &m, &err), LM_OK);
    assert_int_equal(kn_mat_upload(m, 1, 0, 8, 8, src, KN_F32, 8, &err), LM_INVALID);
    assert_int_equal(kn_mat_upload(m, 0, 7, 1, 2, src, KN_F32, 8, &err), LM_INVALID);
    assert_int_equal(kn_mat_upload(m, -1, 0, 1, 1, src, KN_F32, 8, &err), LM_INVALID);
    assert_int_equal(kn_mat_upload(m, 0, 0, 8, 8, src, KN_F32, 7, &err), LM_INVALID);
    struct kn_gemm a = { .y = y, .x = src, .w = m, .m = 2, .ldx = 7, .ldy = 8 };
    assert_int_equal(kn_op_gemm(e.s, &a), LM_INVALID);
    a.m = -1;
    assert_int_equal(kn_op_gemm(e.s, &a), LM_INVALID);
    int32_t ids[2] = { 0, 8 };
    struct kn_embed em = { .out = y, .table = m, .ids = ids, .n = 2, .hidden = 8 };
    assert_int_equal(kn_op_embed(e.s, &em), LM_INVALID);
    ids[1] = -1;
    assert_int_equal(kn_op_embed(e.s, &em), LM_INVALID);
    kn_mat_free(m);
    assert_int_equal(kn_mat_new(e.dev, KN_E4M3, 8, 8, &m, &err), LM_OK);
    assert_int_equal(kn_mat_upload(m, 0, 0, 8, 4, src, KN_F32, 8, &err), LM_UNSUPPORTED);
    src[9] = INFINITY;
    assert_int_equal(kn_mat_upload(m, 0, 0, 8, 8, src, KN_F32, 8, &err), LM_INVALID);
    assert_non_null(strstr(err.msg, "row 1"));
    assert_int_equal(kn_mat_upload(m, 0, 0, 8, 8, src, KN_E4M3, 8, &err), LM_INVALID);
    kn_mat_free(m);
    env_close(&e);
}

/* ---- rows ------------------------------------------------------------------------------ */

static void embed_env(struct env *e)
{
    for (int t = KN_F32; t <= KN_BF16; t++) {
        enum { V = 77, H = 45, N = 66 };
        float *w = rnd_floats(V * H), out[N * H];
        int32_t ids[N];
        kn_mat *mat;
        assert_int_equal(kn_mat_new(e->dev, (enum kn_dtype)t, V, H, &mat, NULL), LM_OK);
        assert_int_equal(kn_mat_upload(mat, 0, 0, V, H, w, KN_F32, H, NULL), LM_OK);
        for (int i = 0; i < N; i++)
            ids[i] = i < V ? i : rnd_int(0, V - 1);
        struct kn_embed a = { .out = out, .table = mat, .ids = ids, .n = N, .hidden = H };
        assert_int_equal(kn_op_embed(e->s, &a), LM_OK);
        for (int i = 0; i < N; i++)
            for (int j = 0; j < H; j++)
                near("embed", i, j, out[i * H + j], round_to(w[ids[i] * H + j], (enum kn_dtype)t),
                     0, 0);
        kn_mat_free(mat);
        free(w);
    }
}

static void embed(void **state)
{
    (void)state;
    each_env(embed_env);
}

static void rmsnorm_case(struct env *e, int n, int h, bool residual, bool alias)
{
    size_t size = (size_t)n * (size_t)h;
    float *x = rnd_floats(size), *r = rnd_floats(size), *w = rnd_floats((size_t)h);
    float *x0 = malloc(size * 4), *r0 = malloc(size * 4), *out = alias ? x : malloc(size * 4);
    memcpy(x0, x, size * 4);
    memcpy(r0, r, size * 4);
    struct kn_rmsnorm a = { .out = out, .x = x, .residual = residual ? r : NULL, .weight = w,
                            .n = n, .hidden = h, .eps = 1e-5f };
    assert_int_equal(kn_op_rmsnorm(e->s, &a), LM_OK);
    for (int i = 0; i < n; i++) {
        double sq = 0;
        for (int j = 0; j < h; j++) {
            double v = (double)x0[i * h + j] + (residual ? (double)r0[i * h + j] : 0);
            sq += v * v;
            if (residual)
                near("residual", i, j, r[i * h + j], v, 1, 1e-7);
        }
        double s = 1 / sqrt(sq / h + 1e-5);
        for (int j = 0; j < h; j++) {
            double v = (double)x0[i * h + j] + (residual ? (double)r0[i * h + j] : 0);
            near("rmsnorm", i, j, out[i * h + j], v * s * (double)w[j], 2, 1e-6);
        }
    }
    if (!alias)
        free(out);
    free(x), free(r), free(w), free(x0), free(r0);
}

static void rmsnorm_env(struct env *e)
{
    static const int hs[] = { 1, 3, 15, 16, 17, 31, 33, 64, 192, 257, 2048 };
    for (size_t i = 0; i < LM_COUNT(hs); i++) {
        rmsnorm_case(e, 1, hs[i], i % 2, i % 3 == 0);
        rmsnorm_case(e, 133, hs[i], i % 2 == 0, i % 3 == 1);
    }
}

static void rmsnorm(void **state)
{
    (void)state;
    each_env(rmsnorm_env);
}

static void silu_case(struct env *e, int n, int f, float span)
{
    float *x = rnd_floats((size_t)n * (size_t)f * 2);
    float *out = malloc((size_t)n * (size_t)f * sizeof *out);
    for (int i = 0; i < n * 2 * f; i++)
        x[i] *= i / f % 2 ? 1.0f : span;
    struct kn_silu_mul a = { .out = out, .gate_up = x, .n = n, .f = f };
    assert_int_equal(kn_op_silu_mul(e->s, &a), LM_OK);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < f; j++) {
            double g = x[i * 2 * f + j], u = x[i * 2 * f + f + j], want = g / (1 + exp(-g)) * u;
            /* relative, but for results that a float can't hold: e^88 is the end of its range */
            if (!(fabs((double)out[i * f + j] - want) <= 1e-6 * fabs(want) + 1e-35))
                near("silu", i, j, out[i * f + j], want, fabs(want), 1e-6);
        }
    free(x), free(out);
}

static void silu_env(struct env *e)
{
    static const int fs[] = { 1, 5, 15, 16, 17, 64, 100, 512 };
    for (size_t i = 0; i < LM_COUNT(fs); i++) {
        silu_case(e, 1, fs[i], 4);
        silu_case(e, 33, fs[i], 30);
        silu_case(e, 133, fs[i], 120);
    }
}

static void silu_mul(void **state)
{
    (void)state;
    each_env(silu_env);
}

static void gather_env(struct env *e)
{
    enum { ROWS = 20, H = 37, N = 33 };
    float *x = rnd_floats(ROWS * H), out[N * H];
    int32_t idx[N];
    for (int i = 0; i < N; i++)
        idx[i] = rnd_int(0, ROWS - 1);
    struct kn_gather_rows a = { .out = out, .x = x, .idx = idx, .n = N, .hidden = H };
    assert_int_equal(kn_op_gather_rows(e->s, &a), LM_OK);
    for (int i = 0; i < N; i++)
        assert_memory_equal(out + i * H, x + idx[i] * H, H * sizeof(float));
    idx[3] = -1;
    assert_int_equal(kn_op_gather_rows(e->s, &a), LM_INVALID);
    free(x);
}

static void gather_rows(void **state)
{
    (void)state;
    each_env(gather_env);
}

/* ---- accuracy of the elementary functions ---------------------------------------------- */

static void exp_accuracy(void **state)
{
    (void)state;
    for (int isa = 0; isa < CPU_ISA_COUNT; isa++) {
        if (!cpu_isa_runs((enum cpu_isa)isa))
            continue;
        kn_cpu_force_isa((enum cpu_isa)isa);
        const struct cpu_vec *v = cpu_vec_pick();
        kn_cpu_force_isa(CPU_ISA_COUNT);
        float x[1000], y[1000];
        double worst = 0;
        for (int round = 0; round < 200; round++) {
            double sum = 0;
            for (int i = 0; i < 1000; i++)
                x[i] = rnd_float() * 81.0f - 6.0f;   /* sums stay finite */
            x[0] = 0, x[1] = -87.2f, x[2] = 80.0f;
            float got = v->exp_sum(y, x, 999, 0);
            for (int i = 0; i < 999; i++) {
                worst = fmax(worst, fabs((double)y[i] / exp((double)x[i]) - 1));
                sum += (double)y[i];
            }
            near("sum", round, 0, got, sum, sum, 1e-6);
        }
        assert_true(worst < 5e-7);
        x[0] = -200, x[1] = -INFINITY, x[2] = -88;
        v->exp_sum(y, x, 3, 0);
        assert_true(y[0] == 0 && y[1] == 0 && y[2] < 1e-37f);
        x[5] = NAN, x[700] = 1000;
        assert_true(v->max(x, 1000) == 1000);
        assert_true(v->max(x, 0) == -INFINITY);
    }
}

static void sincos_accuracy(void **state)
{
    (void)state;
    for (int isa = 0; isa < CPU_ISA_COUNT; isa++) {
        if (!cpu_isa_runs((enum cpu_isa)isa))
            continue;
        kn_cpu_force_isa((enum cpu_isa)isa);
        const struct cpu_vec *v = cpu_vec_pick();
        kn_cpu_force_isa(CPU_ISA_COUNT);
        for (int pos = 0; pos < 200000; pos += pos < 100 ? 1 : 4999) {
            float f[37], c[37], s[37];
            for (int i = 0; i < 37; i++)
                f[i] = i ? fabsf(rnd_float()) : 1.0f;
            v->sincos(c, s, f, 37, (float)pos, 1.25f);
            for (int i = 0; i < 37; i++) {
                double a = (double)(f[i] * (float)pos);
                near("cos", pos, i, c[i], 1.25 * cos(a), 1, 2e-7);
                near("sin", pos, i, s[i], 1.25 * sin(a), 1, 2e-7);
            }
        }
    }
}

/* ---- several streams ------------------------------------------------------------------- */

struct racer {
    struct env *e;
    int failed;
};

static void *race(void *arg)
{
    enum { M = 24, N = 256, K = 128 };
    struct racer *r = arg;
    kn_stream *s;
    kn_mat *mat;
    float *w = malloc(N * K * sizeof *w), *x = malloc(M * K * sizeof *x);
    float *y = malloc(M * N * sizeof *y);
    r->failed = kn_stream_new(r->e->dev, &s, NULL) ||
                kn_mat_new(r->e->dev, KN_F32, N, K, &mat, NULL);
    for (int i = 0; i < N * K; i++)
        w[i] = (float)(i % 7);
    for (int i = 0; i < M * K; i++)
        x[i] = 1;
    r->failed |= kn_mat_upload(mat, 0, 0, N, K, w, KN_F32, K, NULL);
    struct kn_gemm a = { .y = y, .x = x, .w = mat, .m = M, .ldx = K, .ldy = N };
    for (int round = 0; round < 200 && !r->failed; round++) {
        r->failed |= kn_op_gemm(s, &a);
        for (int j = 0; j < N && !r->failed; j++) {
            float want = 0;
            for (int k = 0; k < K; k++)
                want += w[j * K + k];
            r->failed |= y[(M - 1) * N + j] != want;
        }
    }
    kn_mat_free(mat);
    kn_stream_free(s);
    free(w), free(x), free(y);
    return NULL;
}

static void streams_from_threads(void **state)
{
    (void)state;
    struct env e = env_open(CPU_ISA_COUNT, 3);
    pthread_t t[3];
    struct racer r[3];
    for (int i = 0; i < 3; i++) {
        r[i] = (struct racer){ .e = &e };
        assert_int_equal(pthread_create(&t[i], NULL, race, &r[i]), 0);
    }
    for (int i = 0; i < 3; i++) {
        pthread_join(t[i], NULL);
        assert_int_equal(r[i].failed, 0);
    }
    env_close(&e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(half_formats),
        cmocka_unit_test(device_props),
        cmocka_unit_test(copies_and_cells),
        cmocka_unit_test(gemm),
        cmocka_unit_test(gemm_rows_alone),
        cmocka_unit_test(mat_refusals),
        cmocka_unit_test(embed),
        cmocka_unit_test(rmsnorm),
        cmocka_unit_test(silu_mul),
        cmocka_unit_test(gather_rows),
        cmocka_unit_test(exp_accuracy),
        cmocka_unit_test(sincos_accuracy),
        cmocka_unit_test(streams_from_threads),
    };
    return cmocka_run_group_tests_name("kernels: rows", tests, NULL, NULL);
}
