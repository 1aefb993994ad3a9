/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bench_kernels.c - times the CPU backend's operations on the shapes of two models: the small one
 * that ships with loramill and llama-3.2-1b. GEMM is compared with OpenBLAS in the same run.
 *
 *     bench_kernels [THREADS [ISA]]    default: all cores, the best of generic, avx2, avx512
 *
 * Each line: operation, shape, microseconds (best of several batches), GFLOP/s or GB/s, and where
 * there is a peer, peer time / our time. "Cold" weights rotate over copies larger than the caches.
 */
#include <cblas.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/cpu/cpu_int.h"

void openblas_set_num_threads(int n);

static kn_device *dev;
static kn_stream *stream;
static bool one_thread;

static float *floats(size_t n)
{
    static uint32_t x = 1;
    void *p = NULL;
    if (kn_alloc(dev, n * sizeof(float), &p, NULL)) {
        fprintf(stderr, "out of memory\n");
        return NULL;
    }
    for (size_t i = 0; i < n; i++) {
        x = x * 1664525 + 1013904223;
        ((float *)p)[i] = (float)(x >> 8) * 0x1p-23f - 1;
    }
    return p;
}

typedef void body_fn(void *ctx, int i);

/* With one thread the clock is CPU time, so that a busy machine disturbs less. */
static int64_t now_us(void)
{
    struct timespec ts;
    if (!one_thread)
        return lm_now_us();
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

/* Best time of one call in microseconds, over batches that last about 30 ms. */
static double best_us(body_fn *fn, void *ctx)
{
    int64_t t0 = now_us();
    int n = 0, at = 0;
    do
        fn(ctx, at++), n++;
    while (now_us() - t0 < 30000);
    double best = 1e30;
    for (int r = 0; r < 9; r++) {
        t0 = now_us();
        for (int i = 0; i < n; i++)
            fn(ctx, at++);
        best = fmin(best, (double)(now_us() - t0) / n);
    }
    return best;
}

/* ---- gemm ------------------------------------------------------------------------------ */

struct gemm_bench {
    struct kn_gemm a;
    kn_mat *w[64];
    int copies;
    float *wf;                  /* float32 copy for the peer */
};

static void run_gemm(void *ctx, int i)
{
    struct gemm_bench *b = ctx;
    b->a.w = b->w[i % b->copies];
    kn_op_gemm(stream, &b->a);
}

static void run_blas(void *ctx, int i)
{
    struct gemm_bench *b = ctx;
    const struct kn_gemm *a = &b->a;
    int n = a->w->rows, k = a->w->cols;
    const float *w = b->wf + (size_t)(i % b->copies) * (size_t)n * (size_t)k;
    if (a->m == 1)
        cblas_sgemv(CblasRowMajor, CblasNoTrans, n, k, 1, w, k, a->x, 1, 0, a->y, 1);
    else
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, a->m, n, k, 1, a->x, (int)a->ldx, w,
                    k, 0, a->y, (int)a->ldy);
}

static void bench_gemm(enum kn_dtype t, int m, int n, int k, bool cold, bool peer)
{
    struct gemm_bench b = { .copies = 1 };
    size_t bytes = (size_t)n * (size_t)k * kn_dtype_size(t);
    if (cold)
        b.copies = (int)LM_MAX(1, LM_MIN(64, (96u << 20) / bytes + 1));
    b.wf = floats((size_t)(peer ? b.copies : 1) * (size_t)n * (size_t)k);
    for (int i = 0; i < b.copies; i++) {
        kn_mat_new(dev, t, n, k, &b.w[i], NULL);
        kn_mat_upload(b.w[i], 0, 0, n, k, b.wf, KN_F32, (size_t)k, NULL);
    }
    b.a = (struct kn_gemm){ .y = floats((size_t)m * (size_t)n), .x = floats((size_t)m * (size_t)k),
                            .w = b.w[0], .m = m, .ldx = k, .ldy = n };
    double us = best_us(run_gemm, &b), blas = peer ? best_us(run_blas, &b) : 0;
    printf("gemm %-8s m=%-4d %5d x %-5d %s %9.1f us %7.1f GFLOP/s %6.1f GB/s", kn_dtype_name(t),
           m, n, k, cold ? "cold" : "warm", us, 2e-3 * m * n * k / us, (double)bytes / us * 1e-3);
    printf(peer ? "  openblas/ours %.2f\n" : "\n", blas / us);
    fflush(stdout);
    for (int i = 0; i < b.copies; i++)
        kn_mat_free(b.w[i]);
    kn_free(dev, b.wf), kn_free(dev, b.a.y), kn_free(dev, (void *)b.a.x);
}

/* ---- attention ------------------------------------------------------------------------- */

static void run_attention(void *ctx, int i)
{
    (void)i;
    kn_op_attention(stream, ctx);
}

static void run_rope(void *ctx, int i)
{
    (void)i;
    kn_op_rope_kv(stream, ctx);
}

static void bench_attention(int seqs, int q, int len, int nq, int nk, int hd)
{
    enum { BT = 16 };
    int per = LM_DIV_UP(len, BT), width = (nq + 2 * nk) * hd, n = seqs * q;
    struct kn_pool pool = { .num_blocks = seqs * per, .n_layers = 1,
                            .block_bytes = (int64_t)kn_kv_block_bytes(dev, KN_KV_NATIVE, BT,
                                                                   nk, hd) };
    pool.base = floats((size_t)(pool.num_blocks * pool.block_bytes) / 4);
    int32_t *start = malloc((size_t)(seqs + 1) * 4), *lens = malloc((size_t)seqs * 4);
    int32_t *table = malloc((size_t)(seqs * per) * 4), *pos = malloc((size_t)n * 4);
    int64_t *slot = malloc((size_t)n * 8);
    for (int i = 0; i < seqs * per; i++)
        table[i] = i;
    for (int s = 0; s <= seqs; s++)
        start[s] = s * q;
    for (int s = 0; s < seqs; s++)
        lens[s] = len;
    for (int i = 0; i < n; i++) {
        pos[i] = len - q + i % q;
        slot[i] = (int64_t)(i / q * per + pos[i] / BT) * BT + pos[i] % BT;
    }
    struct kn_attention a = {
        .out = floats((size_t)n * (size_t)(nq * hd)), .qkv = floats((size_t)n * (size_t)width),
        .ld = width, .q_start = start, .kv_len = lens, .block_table = table, .table_ld = per,
        .n_seqs = seqs, .n_tok = n, .max_q = q, .max_kv = len, .pool = pool, .block_tokens = BT,
        .q_heads = nq, .kv_heads = nk, .head_dim = hd, .scale = 0.1f };
    float *freq = floats((size_t)hd);
    struct kn_rope_kv r = { .qkv = floats((size_t)n * (size_t)width), .ld = width, .pos = pos,
                            .slot = slot, .inv_freq = freq, .attention_factor = 1, .pool = pool,
                            .block_tokens = BT, .n = n, .q_heads = nq, .kv_heads = nk,
                            .head_dim = hd };
    double keys = (double)seqs * q * (len - (q - 1) / 2.0);
    double us = best_us(run_attention, &a);
    printf("attention %3d seqs q=%-4d kv=%-5d heads %d/%d hd %d "
           "%9.1f us %7.1f GFLOP/s %6.1f GB/s\n",
           seqs, q, len, nq, nk, hd, us, 4e-3 * keys * nq * hd / us,
           8e-3 * seqs * (double)len * nk * hd / us);
    us = best_us(run_rope, &r);
    printf("rope_kv   %3d tokens heads %d/%d hd %d %9.1f us %6.1f ns/token\n", n, nq, nk, hd, us,
           us * 1e3 / n);
    fflush(stdout);
    kn_free(dev, pool.base), kn_free(dev, a.out), kn_free(dev, (void *)a.qkv), kn_free(dev, r.qkv);
    kn_free(dev, freq);
    free(start), free(lens), free(table), free(pos), free(slot);
}

/* ---- lora ------------------------------------------------------------------------------ */

static struct kn_lora_matrix place(int rank, int cols, int cell, int *next)
{
    struct kn_lora_matrix m = { .width = LM_MAX(16, LM_MIN(cols, cell / 4 / rank) / 16 * 16) };
    m.chunk_bytes = rank * m.width * 4;
    m.per_cell = cell / m.chunk_bytes;
    m.first_n = LM_MIN(m.per_cell, LM_DIV_UP(cols, m.width));
    m.cell = *next;
    *next += LM_DIV_UP(LM_DIV_UP(cols, m.width), m.per_cell);
    return m;
}

static void run_shrink(void *ctx, int i)
{
    (void)i;
    kn_op_lora_shrink(stream, ctx);
}

static void run_expand(void *ctx, int i)
{
    (void)i;
    kn_op_lora_expand(stream, ctx);
}

/* `segs` adapters, each with `tok` tokens; one part. */
static void bench_lora(int segs, int tok, int rank, int in, int out, int cell)
{
    int cells = 1;
    struct kn_lora_row row = { 0 };
    row.module[0] = (struct kn_lora_entry){ .rank = rank, .scale = 0.5f };
    row.module[0].a = place(rank, in, cell, &cells);
    row.module[0].b = place(rank, out, cell, &cells);
    struct kn_pool pool = { .num_blocks = segs * cells, .n_layers = 1, .block_bytes = cell };
    pool.base = floats((size_t)segs * (size_t)cells * (size_t)cell / 4);
    int32_t *ids = malloc((size_t)(segs * cells) * 4);
    struct kn_lora_seg *seg = calloc((size_t)segs, sizeof *seg);
    for (int s = 0; s < segs; s++) {
        for (int c = 0; c < cells; c++)
            ids[s * cells + c] = s * cells + c;
        memcpy((char *)pool.base + (size_t)(s * cells) * (size_t)cell, &row, sizeof row);
        seg[s] = (struct kn_lora_seg){ s * tok, tok, s * cells, rank, s * tok * rank };
    }
    int n = segs * tok;
    struct kn_lora a = { .h = floats((size_t)n * (size_t)rank), .x = floats((size_t)n * (size_t)in),
                         .y = floats((size_t)n * (size_t)out), .ldx = in, .ldy = out, .in = in,
                         .pool = pool, .n_parts = 1, .part = { { KN_Q, 0, out } } };
    a.batch = (struct kn_lora_batch){ .segs = seg, .block_ids = ids, .n_segs = segs, .n_tok = n,
                                      .max_seg_tok = tok, .max_rank = rank,
                                      .h_rows = (int64_t)n * rank };
    a.batch.load[KN_Q] = (struct kn_lora_load){ .rank_sum = segs * rank, .rank_tok = n * rank };
    double s = best_us(run_shrink, &a), e = best_us(run_expand, &a);
    double fs = 2e-3 * n * rank * in, fe = 2e-3 * n * rank * out;
    printf("lora %3d adapters x %3d tok, rank %2d, %d -> %d: shrink %8.1f us %6.1f GFLOP/s, "
           "expand %8.1f us %6.1f GFLOP/s\n", segs, tok, rank, in, out, s, fs / s, e, fe / e);
    fflush(stdout);
    kn_free(dev, pool.base), kn_free(dev, a.h), kn_free(dev, (void *)a.x), kn_free(dev, a.y);
    free(ids), free(seg);
}

/* ---- rows ------------------------------------------------------------------------------ */

static void run_norm(void *ctx, int i)
{
    (void)i;
    kn_op_rmsnorm(stream, ctx);
}

static void run_silu(void *ctx, int i)
{
    (void)i;
    kn_op_silu_mul(stream, ctx);
}

static void bench_rows(int n, int hidden, int f)
{
    struct kn_rmsnorm a = { .out = floats((size_t)n * (size_t)hidden),
                            .x = floats((size_t)n * (size_t)hidden),
                            .weight = floats((size_t)hidden), .n = n, .hidden = hidden,
                            .eps = 1e-5f };
    struct kn_silu_mul s = { .out = floats((size_t)n * (size_t)f),
                             .gate_up = floats((size_t)n * (size_t)f * 2), .n = n, .f = f };
    printf("rmsnorm n=%-4d %5d %9.2f us;  silu_mul %5d %9.2f us\n", n, hidden,
           best_us(run_norm, &a), f, best_us(run_silu, &s));
    fflush(stdout);
    kn_free(dev, a.out), kn_free(dev, (void *)a.x), kn_free(dev, (void *)a.weight);
    kn_free(dev, s.out), kn_free(dev, (void *)s.gate_up);
}

static void run_sample(void *ctx, int i)
{
    (void)i;
    kn_op_sample(stream, ctx);
}

static void bench_sample(int n, int vocab)
{
    struct kn_sample_row *rows = calloc((size_t)n, sizeof *rows);
    int32_t *id = malloc((size_t)n * 4);
    void *ws = floats(kn_sample_workspace(dev, n, vocab) / 4);
    float *x = floats((size_t)n * (size_t)vocab), *lp = floats((size_t)n);
    struct kn_sample a = { .logits = x, .rows = rows, .out_id = id, .out_logprob = lp,
                           .workspace = ws, .n = n, .vocab = vocab, .ld = vocab };
    for (int i = 0; i < n * vocab; i++)
        x[i] *= 10;
    const char *what[] = { "greedy", "greedy+logprob", "temperature", "top_k 50", "top_p 0.9" };
    for (int k = 0; k < 5; k++) {
        for (int i = 0; i < n; i++)
            rows[i] = (struct kn_sample_row){ .forced = -1, .repetition_penalty = 1,
                                              .temperature = k > 1, .top_p = k == 4 ? 0.9f : 1,
                                              .top_k = k == 3 ? 50 : 0, .want_logprob = k == 1,
                                              .seed = (uint64_t)i };
        printf("sample n=%-3d vocab %6d %-15s %9.1f us\n", n, vocab, what[k],
               best_us(run_sample, &a));
    }
    fflush(stdout);
    kn_free(dev, ws), kn_free(dev, x), kn_free(dev, lp);
    free(rows), free(id);
}

/* ---- models ---------------------------------------------------------------------------- */

static void bench_small(void)
{
    static const int ms[] = { 1, 4, 8, 32, 128 };
    for (size_t i = 0; i < LM_COUNT(ms); i++) {
        bench_gemm(KN_BF16, ms[i], 320, 192, false, true);
        bench_gemm(KN_BF16, ms[i], 1024, 192, false, true);
        bench_gemm(KN_BF16, ms[i], 192, 512, false, true);
        bench_gemm(KN_F32, ms[i], 1024, 192, false, true);
    }
    bench_attention(1, 1, 128, 6, 2, 32);
    bench_attention(32, 1, 128, 6, 2, 32);
    bench_attention(1, 128, 128, 6, 2, 32);
    bench_lora(1, 1, 8, 192, 192, 8192);
    bench_lora(32, 1, 8, 192, 192, 8192);
    bench_lora(1, 128, 8, 192, 192, 8192);
    bench_rows(1, 192, 512);
    bench_rows(32, 192, 512);
    bench_sample(32, 4096);
}

static void bench_1b(void)
{
    static const int ms[] = { 1, 4, 8, 16, 32, 128, 512 };
    for (size_t i = 0; i < LM_COUNT(ms); i++) {
        bench_gemm(KN_BF16, ms[i], 2048, 2048, true, ms[i] != 4);
        bench_gemm(KN_BF16, ms[i], 16384, 2048, true, false);
        bench_gemm(KN_BF16, ms[i], 2048, 8192, true, false);
    }
    bench_attention(1, 1, 1024, 32, 8, 64);
    bench_attention(32, 1, 512, 32, 8, 64);
    bench_attention(1, 512, 512, 32, 8, 64);
    bench_lora(1, 1, 16, 2048, 2048, 65536);
    bench_lora(32, 1, 16, 2048, 8192, 65536);
    bench_lora(1, 512, 16, 2048, 2048, 65536);
    bench_rows(1, 2048, 8192);
    bench_rows(32, 2048, 8192);
    bench_sample(32, 128256);
}

int main(int argc, char **argv)
{
    struct lm_err err;
    struct kn_open_params p = { .threads = argc > 1 ? atoi(argv[1]) : 0 };
    for (int i = 0; argc > 2 && i < CPU_ISA_COUNT; i++)
        if (!strcmp(argv[2], (const char *[]){ "generic", "avx2", "avx512" }[i]))
            kn_cpu_force_isa((enum cpu_isa)i);
    if (kn_open("cpu", &p, &dev, &err) || kn_stream_new(dev, &stream, &err)) {
        fprintf(stderr, "%s\n", err.msg);
        return 1;
    }
    struct kn_props props;
    kn_props(dev, &props);
    printf("%s\n", props.name);
    openblas_set_num_threads(props.threads);
    one_thread = props.threads == 1;
    bench_small();
    bench_1b();
    kn_stream_free(stream);
    kn_close(dev);
    return 0;
}
