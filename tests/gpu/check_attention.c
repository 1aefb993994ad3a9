/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check_attention.c - rope_kv and paged attention on the device: the twin's checks, and figures.
 *
 * Decode is judged by the bytes of K and V that it must read, prefill by the flops below the
 * diagonal. KV of one layer is larger than L2 or rotates through layers until it is, so nothing
 * is measured warm.
 */
#include "check.h"

#include "tests/twin/twin.h"

void check_attention(struct gpu_check *c)
{
    struct twin t;
    if (check_that(c, twin_open(&t, c->cuda, c->cpu), "attention: streams"))
        check_that(c, twin_attention(&t), "rope_kv and attention equal their CPU twins");
    twin_close(&t);
}

void check_prefill(struct gpu_check *c)
{
    struct twin t;
    if (check_that(c, twin_open(&t, c->cuda, c->cpu), "prefill: streams"))
        check_that(c, twin_prefill(&t), "prefill equals its CPU twin");
    twin_close(&t);
}

/* ---- speed ----------------------------------------------------------------------------- */

struct attn_run {
    struct kn_attention a;
    struct kn_rope_kv r;
    int layers;
    void *mem[8];
};

/* n sequences with kv positions each, of which the last n_q are queries. */
static void run_open(struct gpu_check *c, struct attn_run *r, enum kn_kv type, int n, int n_q,
                     int kv, int q_heads, int kv_heads, int hd)
{
    const int bt = 16, ld = LM_DIV_UP(kv, bt), width = (q_heads + 2 * kv_heads) * hd;
    size_t block = kn_kv_block_bytes(c->cuda, type, bt, kv_heads, hd);
    size_t layer = block * (size_t)(n * ld);
    int32_t *table = malloc((size_t)(n * ld) * sizeof *table);
    int32_t *start = malloc((size_t)(n + 1) * sizeof *start), *len = malloc((size_t)n * 4);
    int32_t *pos = malloc((size_t)(n * n_q) * sizeof *pos);
    int64_t *slot = malloc((size_t)(n * n_q) * sizeof *slot);
    float freq[256];
    /* Neighbours in a sequence are strangers in the pool. */
    for (int i = 0; i < n * ld; i++)
        table[i] = (int32_t)((int64_t)i * 7919 % (n * ld));
    for (int s = 0; s <= n; s++)
        start[s] = s * n_q;
    for (int s = 0; s < n; s++)
        len[s] = kv;
    for (int i = 0; i < n * n_q; i++) {
        pos[i] = kv - n_q + i % n_q;
        slot[i] = (int64_t)table[i / n_q * ld + pos[i] / bt] * bt + pos[i] % bt;
    }
    for (int i = 0; i < hd / 2; i++)
        freq[i] = powf(1e4f, -2.0f * (float)i / (float)hd);
    r->layers = layer > ((size_t)256 << 20) ? 1 : (int)(((size_t)256 << 20) / layer) + 1;
    r->layers = LM_MIN(r->layers, 64);
    struct kn_pool pool = { .num_blocks = n * ld, .n_layers = r->layers,
                            .block_bytes = (int64_t)block, .kv = type };
    r->mem[0] = pool.base = dev_new(c, layer * (size_t)r->layers);
    r->mem[1] = dev_new(c, (size_t)n * (size_t)n_q * (size_t)width * 2);
    r->mem[2] = dev_new(c, (size_t)n * (size_t)n_q * (size_t)(q_heads * hd) * 2);
    r->mem[3] = dev_put(c, table, (size_t)(n * ld) * sizeof *table);
    r->mem[4] = dev_put(c, start, (size_t)(n + 1) * sizeof *start);
    r->mem[5] = dev_put(c, len, (size_t)n * sizeof *len);
    r->mem[6] = dev_put(c, pos, (size_t)(n * n_q) * sizeof *pos);
    r->mem[7] = dev_put(c, slot, (size_t)(n * n_q) * sizeof *slot);
    r->a = (struct kn_attention){
        .out = r->mem[2], .qkv = r->mem[1], .ld = width, .q_start = r->mem[4], .kv_len = r->mem[5],
        .block_table = r->mem[3], .table_ld = ld, .n_seqs = n, .n_tok = n * n_q, .max_q = n_q,
        .max_kv = kv, .pool = pool, .block_tokens = bt, .q_heads = q_heads, .kv_heads = kv_heads,
        .head_dim = hd, .scale = 1.0f / sqrtf((float)hd),
    };
    r->r = (struct kn_rope_kv){
        .qkv = r->mem[1], .ld = width, .pos = r->mem[6], .slot = r->mem[7],
        .inv_freq = dev_put(c, freq, (size_t)hd / 2 * 4), .attention_factor = 1, .pool = pool,
        .block_tokens = bt, .n = n * n_q, .q_heads = q_heads, .kv_heads = kv_heads, .head_dim = hd,
    };
    free(table), free(start), free(len), free(pos), free(slot);
}

static void run_close(struct gpu_check *c, struct attn_run *r)
{
    for (size_t i = 0; i < LM_COUNT(r->mem); i++)
        dev_free(c, r->mem[i]);
    dev_free(c, (void *)r->r.inv_freq);
}

static lm_status one_attention(struct gpu_check *c, void *ctx, int i)
{
    struct attn_run *r = ctx;
    r->a.layer = i % r->layers;
    return kn_op_attention(c->gs, &r->a);
}

static lm_status one_rope(struct gpu_check *c, void *ctx, int i)
{
    struct attn_run *r = ctx;
    r->r.layer = i % r->layers;
    return kn_op_rope_kv(c->gs, &r->r);
}

/* Lengths from `least` to max_kv, evenly, in an order of their own; returns their sum. */
static double spread_lengths(struct gpu_check *c, struct attn_run *r, int least)
{
    const int n = r->a.n_seqs;
    int32_t *len = malloc((size_t)n * sizeof *len);
    double sum = 0;
    for (int s = 0; s < n; s++) {
        len[s] = least + (int)((int64_t)(r->a.max_kv - least) * (s * 37 % n) / LM_MAX(1, n - 1));
        sum += len[s];
    }
    dev_free(c, r->mem[5]);
    r->a.kv_len = r->mem[5] = dev_put(c, len, (size_t)n * sizeof *len);
    free(len);
    return sum;
}

/* n sequences of kv keys, or of least .. kv. */
static void bench_spread(struct gpu_check *c, enum kn_kv type, int n, int least, int kv,
                         int q_heads, int kv_heads, int hd)
{
    struct attn_run r;
    char name[96], from[16] = "";
    const bool fp8 = type == KN_KV_E4M3;
    run_open(c, &r, type, n, 1, kv, q_heads, kv_heads, hd);
    const double keys = spread_lengths(c, &r, least);
    double us = time_op(c, one_attention, &r, LM_MAX(10, r.layers));
    double bytes = (fp8 ? 2.0 : 4.0) * keys * kv_heads * hd;
    if (least < kv)
        snprintf(from, sizeof from, "%d to ", least);
    snprintf(name, sizeof name, "attention decode%s, %d x kv %s%d, %d/%d heads of %d",
             fp8 ? " in E4M3" : "", n, from, kv, q_heads, kv_heads, hd);
    figure(c, name, us, "us", "\"mb\": %.1f, \"gbps\": %.0f, \"share\": %.4f", bytes / 1e6,
           bytes / us / 1e3, bytes / us / 1e3 / c->gbps);
    double rope = time_op(c, one_rope, &r, 20);
    snprintf(name, sizeof name, "rope_kv%s, %d tokens, %d/%d heads of %d", fp8 ? " in E4M3" : "", n,
             q_heads, kv_heads, hd);
    bytes = (2.0 * q_heads + (fp8 ? 4.0 : 5.0) * kv_heads) * 2 * n * hd;
    figure(c, name, rope, "us", "\"gbps\": %.0f, \"share\": %.2f", bytes / rope / 1e3,
           bytes / rope / 1e3 / c->gbps);
    run_close(c, &r);
}

static void bench_decode(struct gpu_check *c, enum kn_kv type, int n, int kv, int q_heads,
                         int kv_heads, int hd)
{
    bench_spread(c, type, n, kv, kv, q_heads, kv_heads, hd);
}

static void bench_prefill(struct gpu_check *c, enum kn_kv type, int n, int n_q, int kv, int q_heads,
                          int kv_heads, int hd)
{
    struct attn_run r;
    char name[96];
    run_open(c, &r, type, n, n_q, kv, q_heads, kv_heads, hd);
    fill_random(c, r.mem[1], n * n_q, (q_heads + 2 * kv_heads) * hd);
    if (type == KN_KV_NATIVE)
        fill_random(c, r.mem[0], (int)(r.layers * r.a.pool.num_blocks *
                                       (r.a.pool.block_bytes / 2048)), 1024);
    double us = time_op(c, one_attention, &r, 4);
    double pairs = (double)n * n_q * (kv - n_q + (n_q + 1) / 2.0);
    double flops = 4.0 * pairs * q_heads * hd;
    snprintf(name, sizeof name, "attention prefill%s, %d x %d of %d, %d/%d heads of %d",
             type == KN_KV_E4M3 ? " in E4M3" : "", n, n_q, kv, q_heads, kv_heads, hd);
    figure(c, name, us, "us", "\"tflops\": %.1f, \"share\": %.4f", flops / us / 1e6,
           flops / us / 1e6 / c->tflops);
    run_close(c, &r);
}

void bench_prefills(struct gpu_check *c)
{
    bench_prefill(c, KN_KV_NATIVE, 1, 2048, 2048, 32, 32, 128);
    bench_prefill(c, KN_KV_NATIVE, 1, 2048, 2048, 32, 8, 128);
    bench_prefill(c, KN_KV_NATIVE, 4, 2048, 2048, 32, 32, 128);
    bench_prefill(c, KN_KV_NATIVE, 1, 8192, 8192, 32, 8, 128);
    bench_prefill(c, KN_KV_NATIVE, 32, 256, 256, 32, 32, 128);
    bench_prefill(c, KN_KV_NATIVE, 32, 256, 256, 32, 8, 128);
    bench_prefill(c, KN_KV_NATIVE, 1, 2048, 16384, 32, 8, 128);
    bench_prefill(c, KN_KV_NATIVE, 4, 2048, 2048, 32, 8, 64);
}

void bench_decodes(struct gpu_check *c)
{
    /* llama-2-7b, llama-3.1-8b, qwen2.5-7b and others; n x kv. */
    bench_decode(c, KN_KV_NATIVE, 1, 512, 32, 32, 128);
    bench_decode(c, KN_KV_NATIVE, 1, 8192, 32, 8, 128);
    bench_decode(c, KN_KV_NATIVE, 8, 1024, 32, 8, 128);
    bench_decode(c, KN_KV_NATIVE, 32, 512, 32, 8, 128);
    bench_decode(c, KN_KV_NATIVE, 32, 1024, 32, 32, 128);
    bench_decode(c, KN_KV_NATIVE, 256, 48, 32, 32, 128);
    bench_decode(c, KN_KV_NATIVE, 256, 96, 32, 32, 128);
    bench_decode(c, KN_KV_NATIVE, 256, 96, 32, 8, 128);
    bench_decode(c, KN_KV_NATIVE, 256, 160, 32, 32, 128);
    bench_decode(c, KN_KV_NATIVE, 256, 512, 32, 32, 128);
    bench_decode(c, KN_KV_NATIVE, 256, 512, 32, 8, 128);
    bench_decode(c, KN_KV_NATIVE, 64, 4096, 32, 8, 128);
    bench_decode(c, KN_KV_NATIVE, 2, 65536, 32, 8, 128);
    bench_decode(c, KN_KV_NATIVE, 128, 1024, 28, 4, 128);
    bench_decode(c, KN_KV_NATIVE, 128, 1024, 32, 8, 64);
    bench_spread(c, KN_KV_NATIVE, 256, 16, 240, 32, 32, 128);
    bench_spread(c, KN_KV_NATIVE, 256, 16, 624, 32, 32, 128);
    bench_spread(c, KN_KV_NATIVE, 256, 16, 624, 32, 8, 128);
    bench_decode(c, KN_KV_E4M3, 256, 96, 32, 32, 128);
    bench_decode(c, KN_KV_E4M3, 256, 512, 32, 32, 128);
    bench_decode(c, KN_KV_E4M3, 256, 512, 32, 8, 128);
    bench_decode(c, KN_KV_E4M3, 32, 512, 32, 8, 128);
    bench_decode(c, KN_KV_E4M3, 64, 4096, 32, 8, 128);
    bench_decode(c, KN_KV_E4M3, 128, 1024, 32, 8, 64);
    bench_spread(c, KN_KV_E4M3, 256, 16, 624, 32, 32, 128);
    bench_spread(c, KN_KV_E4M3, 256, 16, 624, 32, 8, 128);
    bench_spread(c, KN_KV_E4M3, 64, 64, 8192, 32, 8, 128);
}

void bench_attention(struct gpu_check *c)
{
    bench_decodes(c);
    bench_prefills(c);
    bench_prefill(c, KN_KV_E4M3, 1, 2048, 2048, 32, 8, 128);
    bench_prefill(c, KN_KV_E4M3, 4, 2048, 2048, 32, 8, 64);
}
