/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check_lora.c - shrink, expand and merge on the device: the twin's checks, and figures.
 *
 * A figure is for one launch over a step's adapters, cache-cold: the images rotate through up to 32
 * layers, which exceeds L2 for all but the single adapter (13 MB: what that takes is latency, and
 * L2 spares it little). Its goal is 70 % of the card's bandwidth where it touches 64 MB or more,
 * and bytes / bandwidth + 2.5 us below that; `goal` is the time allowed over the time taken, so 1
 * and more is good.
 */
#include "check.h"

#include "tests/twin/twin.h"

void check_lora(struct gpu_check *c)
{
    struct twin t;
    if (check_that(c, twin_open(&t, c->cuda, c->cpu), "lora: streams"))
        check_that(c, twin_lora(&t), "lora_shrink and lora_expand equal their CPU twins");
    twin_close(&t);
}

/* ---- speed ----------------------------------------------------------------------------- */

#define CELL (64 << 10)
#define MAX_SEGS 512

struct lora_run {
    struct kn_lora a;
    int layers;
    double bytes_a, bytes_b;    /* of the adapters' matrices, one layer */
    void *mem[8];
};

/* One adapter's image for modules 0 .. n_parts-1, all layers alike: the packer's layout for chunks
 * of 8 KB, weights zero (time does not depend on them). Returns cells. */
static int lay_out(struct kn_lora_row *rows, int layers, int n_parts, int rank, int in,
                   const int *out)
{
    int per = CELL / (int)sizeof *rows, cell = (layers - 1) / per + 1, at = 0;
    for (int l = 0; l < layers; l++)
        for (int m = 0; m < 2 * n_parts; m++) {
            struct kn_lora_entry *e = &rows[l].module[m / 2];
            struct kn_lora_matrix *k = m % 2 ? &e->b : &e->a;
            int n = m % 2 ? out[m / 2] : in, width = 512;
            while (width > 16 && rank * width * 2 > CELL / 8)
                width /= 2;
            *e = (struct kn_lora_entry){ rank, 1, e->a, e->b };
            k->width = width;
            k->chunk_bytes = rank * width * 2;
            k->per_cell = CELL / k->chunk_bytes;
            int chunks = LM_DIV_UP(n, width), room = (CELL - at) / k->chunk_bytes;
            if (room == 0)
                cell++, at = 0, room = k->per_cell;
            k->cell = cell, k->offset = at;
            k->first_n = LM_MIN(room, chunks);
            at += k->first_n * k->chunk_bytes;
            for (chunks -= k->first_n; chunks > 0; chunks -= k->per_cell) {
                cell++;
                at = LM_MIN(chunks, k->per_cell) * k->chunk_bytes;
            }
        }
    return cell + 1;
}

/* n_segs segments of seg_tok tokens, each of its own adapter, ranks taken in turn. */
static void run_open(struct gpu_check *c, struct lora_run *r, int n_segs, int seg_tok,
                     const int *ranks, int n_ranks, int in, const int *out, int n_parts)
{
    struct kn_lora_seg seg[MAX_SEGS];
    struct kn_lora_row *rows = calloc(64, sizeof *rows);
    double bytes = 0;
    *r = (struct lora_run){ 0 };
    int total_out = 0, n_tok = n_segs * seg_tok, max_rank = 0, blocks = 0, h0 = 0;
    for (int p = 0; p < n_parts; p++)
        total_out += out[p];
    for (int s = 0; s < n_segs; s++) {
        int rank = ranks[s % n_ranks];
        r->bytes_a += 2.0 * rank * in * n_parts;
        r->bytes_b += 2.0 * rank * total_out;
        max_rank = LM_MAX(max_rank, rank);
    }
    bytes = r->bytes_a + r->bytes_b;
    r->layers = (int)LM_MIN(32, LM_MAX(1, 400e6 / bytes));
    struct kn_pool pool = { .n_layers = r->layers, .block_bytes = CELL };
    int *cells = malloc((size_t)n_segs * sizeof *cells);
    for (int s = 0; s < n_segs; s++) {
        int rank = ranks[s % n_ranks];
        cells[s] = lay_out(rows, r->layers, n_parts, rank, in, out);
        seg[s] = (struct kn_lora_seg){ s * seg_tok, seg_tok, blocks, rank, h0 };
        h0 += seg_tok * rank;
        blocks += LM_DIV_UP(cells[s], r->layers);
    }
    pool.num_blocks = blocks;
    pool.base = r->mem[0] = dev_new(c, (size_t)blocks * (size_t)r->layers * CELL);
    int32_t *ids = malloc((size_t)blocks * sizeof *ids);
    for (int i = 0; i < blocks; i++)
        ids[i] = (int32_t)((int64_t)i * 7919 % blocks);
    void *pinned;
    struct lm_err err;
    must(kn_host_alloc(c->cuda, CELL, &pinned, &err), "pinned");
    for (int s = 0; s < n_segs; s++) {
        memset(rows, 0, 64 * sizeof *rows);
        lay_out(rows, r->layers, n_parts, ranks[s % n_ranks], in, out);
        memcpy(pinned, rows, (size_t)r->layers * sizeof *rows);
        must(kn_copy_in(c->gs, (char *)pool.base + (int64_t)ids[seg[s].block0] * CELL, pinned,
                        (size_t)r->layers * sizeof *rows), "copy");
        must(kn_stream_sync(c->gs, &err), "sync");
    }
    kn_host_free(c->cuda, pinned);
    r->a = (struct kn_lora){
        .h = r->mem[1] = dev_new(c, (size_t)h0 * (size_t)n_parts * 4),
        .x = r->mem[2] = dev_new(c, (size_t)n_tok * (size_t)in * 2),
        .y = r->mem[3] = dev_new(c, (size_t)n_tok * (size_t)total_out * 2),
        .ldx = in, .ldy = total_out, .in = in, .pool = pool, .n_parts = n_parts,
        .batch = { .segs = r->mem[4] = dev_put(c, seg, (size_t)n_segs * sizeof *seg),
                   .block_ids = r->mem[5] = dev_put(c, ids, (size_t)blocks * sizeof *ids),
                   .n_segs = n_segs, .n_tok = n_tok, .max_seg_tok = seg_tok, .max_rank = max_rank,
                   .h_rows = h0 },
    };
    for (int p = 0, col = 0; p < n_parts; col += out[p++]) {
        r->a.part[p] = (struct kn_lora_part){ (enum kn_module)p, col, out[p] };
        r->a.batch.load[p] = (struct kn_lora_load){ (int32_t)(r->bytes_a / 2 / in / n_parts), h0 };
    }
    free(ids), free(cells), free(rows);
}

static void run_close(struct gpu_check *c, struct lora_run *r)
{
    for (size_t i = 0; i < LM_COUNT(r->mem); i++)
        if (r->mem[i])
            dev_free(c, r->mem[i]);
}

static lm_status one_shrink(struct gpu_check *c, void *ctx, int i)
{
    struct lora_run *r = ctx;
    r->a.layer = i % r->layers;
    return kn_op_lora_shrink(c->gs, &r->a);
}

static lm_status one_expand(struct gpu_check *c, void *ctx, int i)
{
    struct lora_run *r = ctx;
    r->a.layer = i % r->layers;
    return kn_op_lora_expand(c->gs, &r->a);
}

static lm_status one_both(struct gpu_check *c, void *ctx, int i)
{
    lm_status st = one_shrink(c, ctx, i);
    return st == LM_OK ? one_expand(c, ctx, i) : st;
}

static void report(struct gpu_check *c, const char *what, const char *shape, double us,
                   double bytes)
{
    char name[128];
    double ideal = bytes / c->gbps / 1e3, allowed = bytes >= 64e6 ? ideal / 0.7 : ideal + 2.5;
    snprintf(name, sizeof name, "%s %s", what, shape);
    figure(c, name, us, "us", "\"mb\": %.1f, \"gbps\": %.0f, \"share\": %.4f, \"goal\": %.4f",
           bytes / 1e6, bytes / us / 1e3, ideal / us, allowed / us);
}

static void bench_one(struct gpu_check *c, const char *shape, int n_segs, int seg_tok,
                      const int *ranks, int n_ranks, int in, const int *out, int n_parts)
{
    struct lora_run r;
    double y = 0, n_tok = n_segs * seg_tok;
    for (int p = 0; p < n_parts; p++)
        y += out[p];
    run_open(c, &r, n_segs, seg_tok, ranks, n_ranks, in, out, n_parts);
    int n = LM_MAX(16, r.layers);
    report(c, "lora_shrink", shape, time_op(c, one_shrink, &r, n), r.bytes_a + 2 * n_tok * in);
    report(c, "lora_expand", shape, time_op(c, one_expand, &r, n), r.bytes_b + 4 * n_tok * y);
    double ideal = (r.bytes_a + r.bytes_b + 2 * n_tok * in + 4 * n_tok * y) / c->gbps / 1e3;
    char name[128];
    snprintf(name, sizeof name, "lora both %s", shape);
    double us = time_op(c, one_both, &r, n);
    figure(c, name, us, "us", "\"ideal_us\": %.2f, \"share\": %.3f", ideal, ideal / us);
    run_close(c, &r);
}

void bench_lora(struct gpu_check *c)
{
    static const int r8[] = { 8 }, mixed[] = { 8, 16, 32, 64 };
    static const int qkv7[] = { 4096, 4096, 4096 }, qkv8[] = { 4096, 1024, 1024 };
    static const int o[] = { 4096 }, gu[] = { 14336, 14336 };
    bench_one(c, "qkv 7b, 1 x rank 8", 1, 1, r8, 1, 4096, qkv7, 3);
    bench_one(c, "qkv 7b, 32 x rank 8", 32, 1, r8, 1, 4096, qkv7, 3);
    bench_one(c, "o 7b, 32 x rank 8", 32, 1, r8, 1, 4096, o, 1);
    bench_one(c, "qkv 7b, 100 x rank 8", 100, 1, r8, 1, 4096, qkv7, 3);
    bench_one(c, "qkv 7b, 100 x 2 tokens, rank 8", 100, 2, r8, 1, 4096, qkv7, 3);
    bench_one(c, "qkv 7b, 100 mixed 8-64", 100, 1, mixed, 4, 4096, qkv7, 3);
    bench_one(c, "qkv 7b, 256 mixed 8-64", 256, 1, mixed, 4, 4096, qkv7, 3);
    bench_one(c, "qkv 8b, 32 x rank 8", 32, 1, r8, 1, 4096, qkv8, 3);
    bench_one(c, "o 8b, 32 x rank 8", 32, 1, r8, 1, 4096, o, 1);
    bench_one(c, "gate/up 8b, 32 x rank 8", 32, 1, r8, 1, 4096, gu, 2);
    bench_one(c, "down 8b, 32 x rank 8", 32, 1, r8, 1, 14336, o, 1);
    bench_one(c, "qkv 7b, prefill 32 x 256, rank 8", 32, 256, r8, 1, 4096, qkv7, 3);
    bench_one(c, "qkv 7b, prefill 32 x 256, mixed", 32, 256, mixed, 4, 4096, qkv7, 3);
    bench_one(c, "qkv 7b, prefill 1 x 4096, rank 64", 1, 4096, &mixed[3], 1, 4096, qkv7, 3);
}
