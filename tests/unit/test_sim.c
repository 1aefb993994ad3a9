/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The cost-model backend: each price against the same sum done by hand, time on streams, events and
 * lanes, memory, and the small things that really happen. The description has round numbers: 1 TB/s
 * everywhere, so a gigabyte is a millisecond.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "kernels/sim/sim_int.h"

#define DESC                                                                                   \
    "{\"name\": \"round\", \"act\": \"bfloat16\", \"kv\": \"bfloat16\", \"lora\": \"bfloat16\","   \
    "\"memory_gb\": 4, \"bandwidth_gbps\": 1000, \"element_share\": 0.5,"                         \
    "\"gemm_tflops\": [[1, 100], [101, 200]], \"gemm_gbps\": 1000, \"gemm_norm\": 1,"              \
    "\"decode_share\": 0.5, \"prefill_tflops\": 50, \"shrink_share\": 0.25,"                      \
    "\"expand_share\": 0.5, \"lora_tflops\": 10, \"lora_us\": 3, \"lora_token_gbps\": 0,"          \
    "\"gap_us\": 1, \"graph\": false, \"launch_us\": 2, \"step_us\": 100, \"seq_us\": 1,"   \
    "\"in_gbps\": 10, \"out_gbps\": 5, \"copy_us\": 7, \"cell_us\": 0,"                            \
    "\"tp_world\": 1, \"tp_us\": 0, \"tp_gbps\": 1}"

struct world {
    kn_device *dev;
    kn_stream *a, *b;
    char path[64];
};

/* `from` in the description becomes `to`. */
static void open_with(struct world *w, const char *from, const char *to)
{
    char text[2048] = DESC, *at = from ? strstr(text, from) : NULL;
    if (at) {
        char tail[2048];
        snprintf(tail, sizeof tail, "%s", at + strlen(from));
        snprintf(at, sizeof text - (size_t)(at - text), "%s%s", to, tail);
    }
    snprintf(w->path, sizeof w->path, "/tmp/test_sim.XXXXXX");
    int fd = mkstemp(w->path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
    struct kn_open_params p = { .sim = w->path };
    struct lm_err err = { 0 };
    lm_status st = kn_open("sim", &p, &w->dev, &err);
    if (st != LM_OK)
        fail_msg("%s", err.msg);
    assert_int_equal(kn_stream_new(w->dev, &w->a, NULL), LM_OK);
    assert_int_equal(kn_stream_new(w->dev, &w->b, NULL), LM_OK);
}

static void close_world(struct world *w)
{
    kn_stream_free(w->a);
    kn_stream_free(w->b);
    kn_close(w->dev);
    unlink(w->path);
}

static struct sim_counters counters(const struct world *w)
{
    struct sim_counters c;
    assert_int_equal(kn_sim_counters(w->dev, &c), LM_OK);
    return c;
}

static struct sim_desc round_desc(void)
{
    struct sim_desc d;
    struct lm_err err = { 0 };
    if (sim_desc_parse(DESC, strlen(DESC), "round.json", &d, &err) != LM_OK)
        fail_msg("%s", err.msg);
    return d;
}

/* Enqueues one norm of `mb` megabytes of traffic: mb / 500 ms + 1 us on the device. */
static void work(kn_stream *s, double mb)
{
    static float x[1];
    struct kn_rmsnorm a = { .out = x, .x = x, .weight = x, .n = 1,
                            .hidden = (int)(mb * 1e6 / 4) };
    assert_int_equal(kn_op_rmsnorm(s, &a), LM_OK);
}

/* ---- the description ------------------------------------------------------------------- */

static void test_desc_refusals(void **state)
{
    (void)state;
    static const struct { const char *from, *to, *says; } bad[] = {
        { "\"memory_gb\": 4,", "", "memory_gb is missing" },
        { "\"memory_gb\": 4", "\"memory_gb\": -1", "memory_gb must be a number" },
        { "\"memory_gb\": 4", "\"memory_gb\": \"4\"", "memory_gb must be a number" },
        { "\"gap_us\": 1", "\"gap\": 1, \"gap_us\": 1", "'gap' is not a property" },
        { "\"graph\": false", "\"graph\": 0", "graph must be true or false" },
        { "\"act\": \"bfloat16\"", "\"act\": \"fp8\"", "act must be" },
        { "[101, 200]", "[1, 200]", "don't rise" },
        { "[101, 200]", "[101]", "not a pair" },
        { "\"round\",", "\"round\"", "line 1" },
        { "\"name\": \"round\",", "", "name is missing" },
        { "\"gap_us\": 1", "\"gap_us\": 1, \"gap_us\": 2", "line 1" },
    };
    for (size_t i = 0; i < LM_COUNT(bad); i++) {
        char text[2048] = DESC, tail[2048], *at = strstr(text, bad[i].from);
        assert_non_null(at);
        snprintf(tail, sizeof tail, "%s", at + strlen(bad[i].from));
        snprintf(at, sizeof text - (size_t)(at - text), "%s%s", bad[i].to, tail);
        struct sim_desc d;
        struct lm_err err = { 0 };
        assert_int_not_equal(sim_desc_parse(text, strlen(text), "bad.json", &d, &err), LM_OK);
        if (!strstr(err.msg, bad[i].says) || !strstr(err.msg, "bad.json"))
            fail_msg("'%s' does not say '%s'", err.msg, bad[i].says);
    }
    struct lm_err err = { 0 };
    kn_device *dev;
    assert_int_equal(kn_open("sim", &(struct kn_open_params){ .sim = "/nonexistent.json" }, &dev,
                             &err), LM_NOT_FOUND);
    assert_int_equal(kn_open("sim", NULL, &dev, &err), LM_INVALID);
}

static void test_curve(void **state)
{
    (void)state;
    const struct sim_curve c = { 3, { 1, 11, 21 }, { 100, 200, 150 } };
    assert_true(sim_curve_at(&c, 0) == 100 && sim_curve_at(&c, 1) == 100);
    assert_true(sim_curve_at(&c, 6) == 150 && sim_curve_at(&c, 11) == 200);
    assert_true(sim_curve_at(&c, 16) == 175 && sim_curve_at(&c, 99) == 150);
}

/* ---- prices ---------------------------------------------------------------------------- */

static void test_gemm_price(void **state)
{
    (void)state;
    struct sim_desc d = round_desc();
    /* 2000 x 1000 bf16 is 4 MB: 4 us; 1 row: 4 Mflop at 100 Tflop/s: 40 ns; no overlap at p = 1. */
    assert_int_equal(sim_gemm_ns(&d, 1, 2000, 1000, 4e6), 4040);
    /* 51 rows: 204 Mflop at 150 Tflop/s: 1.36 us. */
    assert_int_equal(sim_gemm_ns(&d, 51, 2000, 1000, 4e6), 5360);
    d.gemm_norm = 2;            /* sqrt(4000^2 + 3000^2), 3 us being 150 rows at 200 Tflop/s */
    assert_int_equal(sim_gemm_ns(&d, 150, 2000, 1000, 4e6), 5000);
    d.gemm_norm = 1;
    d.tp_world = 2;             /* each has half */
    assert_int_equal(sim_gemm_ns(&d, 1, 2000, 1000, 4e6), 2020);
}

static void test_attention_price(void **state)
{
    (void)state;
    struct sim_desc d = round_desc();
    const struct kn_attention a = { .q_heads = 10, .kv_heads = 5, .head_dim = 100 };
    /* A cached token is 2 * 5 * 100 * 2 = 2000 bytes; 1000 of them at 500 GB/s: 4 us. */
    struct sim_attention_load l = { .decode_kv = 1000 };
    assert_int_equal(sim_attention_ns(&d, &a, &l), 4000);
    /* 1 M pairs * 4 * 10 * 100 = 4 Gflop at 50 Tflop/s: 80 us, longer than 5000 tokens' read. */
    l = (struct sim_attention_load){ .decode_kv = 1000, .chunk_kv = 4000, .pairs = 1e6 };
    assert_int_equal(sim_attention_ns(&d, &a, &l), 80000);
}

static void test_lora_price(void **state)
{
    (void)state;
    struct sim_desc d = round_desc();
    /* 1 M elements of 2 bytes and 0.25 M of x at 250 GB/s: 10 us, and 3 us for the launch. */
    struct sim_lora_load l = { .rank_sum = 1e6, .rank_tok = 1e6, .rows = 0.25e6 };
    assert_int_equal(sim_lora_ns(&d, &l, d.shrink_share), 13000);
    l.rank_tok = 1e8;           /* 200 Mflop at 10 Tflop/s: 20 us */
    assert_int_equal(sim_lora_ns(&d, &l, d.shrink_share), 23000);
    d.lora_token_gbps = 2000;   /* weights anew for each token: 200 MB at 2 TB/s: 100 us */
    assert_int_equal(sim_lora_ns(&d, &l, d.shrink_share), 103000);
}

static void test_group_price(void **state)
{
    (void)state;
    struct sim_desc d = round_desc();
    assert_int_equal(sim_reduce_ns(&d, 1e6), 0);
    d.tp_world = 4;
    d.tp_us = 5;
    d.tp_gbps = 100;            /* a ring moves 2 * 3/4 * 1 MB: 15 us */
    assert_int_equal(sim_reduce_ns(&d, 1e6), 20000);
}

static void test_copy_price(void **state)
{
    (void)state;
    struct sim_desc d = round_desc();
    assert_int_equal(sim_copy_ns(&d, true, 1e6, 0), 107000);    /* 10 GB/s and 7 us */
    assert_int_equal(sim_copy_ns(&d, false, 1e6, 0), 207000);
    d.cell_us = 2;
    assert_int_equal(sim_copy_ns(&d, true, 1e6, 50), 207000);
}

/* ---- streams and events ---------------------------------------------------------------- */

static void test_launches_cost_the_host(void **state)
{
    (void)state;
    struct world w;
    open_with(&w, NULL, NULL);
    for (int i = 0; i < 10; i++)
        work(w.a, 0.5);      /* 1 us + 1 us gap, launched every 2 us */
    assert_int_equal(kn_now_us(w.dev), 20);
    assert_int_equal(kn_stream_sync(w.a, NULL), LM_OK);
    assert_int_equal(kn_now_us(w.dev), 22);
    close_world(&w);

    open_with(&w, "\"graph\": false", "\"graph\": true");
    for (int i = 0; i < 10; i++)
        work(w.a, 0.5);
    assert_int_equal(kn_now_us(w.dev), 0);
    assert_int_equal(kn_stream_sync(w.a, NULL), LM_OK);
    assert_int_equal(kn_now_us(w.dev), 20);
    close_world(&w);
}

static void test_step_costs(void **state)
{
    (void)state;
    struct world w;
    kn_mat *table;
    static int32_t ids[8];
    open_with(&w, "\"graph\": false", "\"graph\": true");
    assert_int_equal(kn_mat_new(w.dev, KN_BF16, 100, 16, &table, NULL), LM_OK);
    struct kn_embed a = { .out = ids, .table = table, .ids = ids, .n = 8, .hidden = 16 };
    assert_int_equal(kn_op_embed(w.a, &a), LM_OK);
    assert_int_equal(kn_now_us(w.dev), 100 + 2);
    assert_int_equal(counters(&w).steps, 1);
    kn_mat_free(table);
    close_world(&w);
}

static void test_copies_overlap_with_compute(void **state)
{
    (void)state;
    struct world w;
    int64_t off[1] = { 0 };
    void *base;
    open_with(&w, "\"launch_us\": 2", "\"launch_us\": 0");
    assert_int_equal(kn_alloc(w.dev, 100 << 20, &base, NULL), LM_OK);
    work(w.a, 500);             /* 1000 us + 1 */
    assert_int_equal(kn_scatter_cells(w.b, base, off, 1, 5000000, NULL), LM_OK);  /* 507 us */
    kn_event *copied;
    assert_int_equal(kn_event_new(w.dev, &copied, NULL), LM_OK);
    assert_int_equal(kn_event_record(copied, w.b), LM_OK);
    assert_int_equal(kn_event_query(copied), LM_BUSY);
    assert_int_equal(kn_advance(w.dev, 506), LM_OK);
    assert_int_equal(kn_event_query(copied), LM_BUSY);
    assert_int_equal(kn_event_sync(copied, NULL), LM_OK);
    assert_int_equal(kn_now_us(w.dev), 507);
    assert_int_equal(kn_event_query(copied), LM_OK);
    assert_int_equal(kn_stream_sync(w.a, NULL), LM_OK);
    assert_int_equal(kn_now_us(w.dev), 1001);
    kn_event_free(copied);
    kn_free(w.dev, base);
    close_world(&w);
}

static void test_events_order_streams(void **state)
{
    (void)state;
    struct world w;
    kn_event *e;
    open_with(&w, "\"launch_us\": 2", "\"launch_us\": 0");
    assert_int_equal(kn_event_new(w.dev, &e, NULL), LM_OK);
    work(w.a, 500);
    assert_int_equal(kn_event_record(e, w.a), LM_OK);
    work(w.a, 500);             /* behind the record: not waited for */
    assert_int_equal(kn_event_wait(w.b, e), LM_OK);
    work(w.b, 50);
    assert_int_equal(kn_now_us(w.dev), 0);
    assert_int_equal(kn_stream_sync(w.b, NULL), LM_OK);
    assert_int_equal(kn_now_us(w.dev), 1001 + 101);
    kn_event_free(e);
    close_world(&w);
}

static void test_lanes(void **state)
{
    (void)state;
    struct world w;
    int64_t off[1] = { 0 };
    void *base, *small, *host;
    open_with(&w, "\"launch_us\": 2", "\"launch_us\": 0");
    assert_int_equal(kn_alloc(w.dev, 100 << 20, &base, NULL), LM_OK);
    assert_int_equal(kn_alloc(w.dev, 1000, &small, NULL), LM_OK);
    assert_int_equal(kn_host_alloc(w.dev, 1000, &host, NULL), LM_OK);
    assert_int_equal(kn_scatter_cells(w.a, base, off, 1, 5000000, NULL), LM_OK);
    assert_int_equal(kn_gather_cells(w.b, NULL, base, off, 1, 5000000), LM_OK);   /* other way */
    assert_int_equal(kn_stream_sync(w.b, NULL), LM_OK);
    assert_int_equal(kn_now_us(w.dev), 1007);
    assert_int_equal(kn_scatter_cells(w.a, base, off, 1, 5000000, NULL), LM_OK);  /* to 1514 */
    assert_int_equal(kn_copy_in(w.b, small, host, 1000), LM_OK);  /* slips between: 7.1 us */
    assert_int_equal(kn_stream_sync(w.b, NULL), LM_OK);
    assert_int_equal(kn_now_us(w.dev), 1014);
    assert_int_equal(kn_scatter_cells(w.b, base, off, 1, 5000000, NULL), LM_OK);  /* same lane */
    assert_int_equal(kn_stream_sync(w.b, NULL), LM_OK);
    assert_int_equal(kn_now_us(w.dev), 1514 + 507);
    struct sim_counters c = counters(&w);
    assert_int_equal(c.cells_in, 15000000);
    assert_int_equal(c.cells_out, 5000000);
    assert_int_equal(c.bytes_in, 1000);
    assert_int_equal(c.copies, 5);
    kn_host_free(w.dev, host);
    kn_free(w.dev, small);
    kn_free(w.dev, base);
    close_world(&w);
}

/* ---- memory ---------------------------------------------------------------------------- */

static void test_memory(void **state)
{
    (void)state;
    struct world w;
    struct kn_props p;
    struct lm_err err = { 0 };
    void *pool = NULL, *more;
    kn_mat *m, *n;
    open_with(&w, NULL, NULL);
    kn_props(w.dev, &p);
    assert_true(p.virtual_time && !p.in_call && p.mem_total == 4000000000u);
    assert_int_equal(p.mem_free, p.mem_total);
    assert_int_equal(kn_mat_new(w.dev, KN_BF16, 1000, 500000, &m, NULL), LM_OK);
    assert_int_equal(kn_mat_bytes(m), 1000000000);
    assert_int_equal(kn_alloc(w.dev, 2500000000u, &pool, NULL), LM_OK);
    kn_props(w.dev, &p);
    assert_int_equal(p.mem_free, 500000000);
    assert_int_equal(kn_alloc(w.dev, 500000001, &more, &err), LM_NOMEM);
    assert_non_null(strstr(err.msg, "500000000 are left"));
    assert_int_equal(kn_mat_new(w.dev, KN_F32, 1000, 500000, &n, &err), LM_NOMEM);
    kn_free(w.dev, pool);
    kn_mat_free(m);
    kn_props(w.dev, &p);
    assert_int_equal(p.mem_free, p.mem_total);
    assert_int_equal(counters(&w).mem_peak, 3500000000u);
    close_world(&w);
}

static void test_bulk_is_not_copied(void **state)
{
    (void)state;
    struct world w;
    void *pool, *small, *host;
    open_with(&w, NULL, NULL);
    assert_int_equal(kn_alloc(w.dev, SIM_BULK_BYTES, &pool, NULL), LM_OK);
    assert_int_equal(kn_alloc(w.dev, 64, &small, NULL), LM_OK);
    assert_int_equal(kn_host_alloc(w.dev, 64, &host, NULL), LM_OK);
    memset(host, 7, 64);
    assert_int_equal(kn_copy_in(w.a, (char *)pool + 4096, host, 64), LM_OK);
    assert_int_equal(((char *)pool)[4096], 0);
    assert_int_equal(kn_copy_in(w.a, small, host, 64), LM_OK);
    assert_memory_equal(small, host, 64);
    assert_int_equal(kn_zero(w.a, small, 64), LM_OK);
    assert_int_equal(kn_copy_out(w.a, host, small, 64), LM_OK);
    assert_int_equal(((char *)host)[63], 0);
    kn_host_free(w.dev, host);
    kn_free(w.dev, small);
    kn_free(w.dev, pool);
    close_world(&w);
}

/* ---- operations ------------------------------------------------------------------------ */

static void test_attention_reads_lengths(void **state)
{
    (void)state;
    struct world w;
    int32_t q_start[4] = { 0, 1, 2, 102 }, kv_len[3] = { 1000, 500, 100 };
    char mem[16];
    open_with(&w, NULL, NULL);
    struct kn_attention a = {
        .out = mem, .qkv = mem, .q_start = q_start, .kv_len = kv_len, .n_seqs = 3, .n_tok = 102,
        .pool = { .base = mem, .num_blocks = 1, .n_layers = 2, .block_bytes = 16 },
        .q_heads = 10, .kv_heads = 5, .head_dim = 100,
    };
    assert_int_equal(kn_op_attention(w.a, &a), LM_OK);
    /* 1500 for decodes, 100 twice for 100 queries in tiles of 64; 2000 bytes each. */
    assert_int_equal(counters(&w).kv_read_bytes, 1700 * 2000);
    assert_int_equal(counters(&w).ns[SIM_ATTENTION], 1000 + 6800);
    assert_int_equal(kn_now_us(w.dev), 3 + 2);  /* in the first layer, 1 us a sequence */
    a.layer = 1;
    a.window = 200;             /* the window hides what is further away */
    assert_int_equal(kn_op_attention(w.a, &a), LM_OK);
    assert_int_equal(counters(&w).kv_read_bytes, (1700 + 200 + 200 + 200) * 2000);
    a.layer = 0, a.window = 0, a.pool.kv = KN_KV_E4M3;
    uint64_t before = counters(&w).kv_read_bytes;
    assert_int_equal(kn_op_attention(w.a, &a), LM_OK);
    assert_int_equal(counters(&w).kv_read_bytes - before, 1700 * 1000);
    assert_int_equal(kn_kv_block_bytes(w.dev, KN_KV_NATIVE, 16, 5, 100), 16 * 2000);
    assert_int_equal(kn_kv_block_bytes(w.dev, KN_KV_E4M3, 16, 5, 100), 16 * 1000);
    a.layer = 2;
    assert_int_equal(kn_op_attention(w.a, &a), LM_INVALID);
    close_world(&w);
}

static void test_lora_reads_segments(void **state)
{
    (void)state;
    struct world w;
    struct kn_lora_seg seg[2] = { { 0, 10, 0, 8, 0 }, { 10, 30, 1, 64, 80 } };
    float h[1], x[1];
    open_with(&w, NULL, NULL);
    struct kn_lora a = {
        .h = h, .x = x, .y = x, .in = 1000, .n_parts = 2,
        .pool = { .base = x, .num_blocks = 1, .n_layers = 1, .block_bytes = 16 },
        .part = { { KN_GATE, 0, 3000 }, { KN_UP, 3000, 3000 } },
        .batch = { .segs = seg, .n_segs = 2, .n_tok = 40, .max_rank = 64 },
    };
    assert_int_equal(kn_op_lora_shrink(w.a, &a), LM_OK);
    assert_int_equal(counters(&w).lora_bytes, 2 * (8 + 64) * 1000 * 2);
    a.batch.load[KN_GATE] = (struct kn_lora_load){ .rank_sum = 8, .rank_tok = 80 };
    assert_int_equal(kn_op_lora_expand(w.a, &a), LM_OK);    /* the hints say: one module of one */
    assert_int_equal(counters(&w).lora_bytes, 288000 + 8 * 3000 * 2);
    int64_t launches = counters(&w).launches[SIM_LORA];
    a.part[0].module = KN_Q;
    a.part[1].module = KN_K;
    assert_int_equal(kn_op_lora_expand(w.a, &a), LM_OK);    /* not targeted: nothing is launched */
    assert_int_equal(counters(&w).launches[SIM_LORA], launches);
    close_world(&w);
}

static void test_group_reduces(void **state)
{
    (void)state;
    struct world w;
    float x[4];
    open_with(&w, "\"tp_world\": 1", "\"tp_world\": 2");
    struct kn_rmsnorm a = { .out = x, .x = x, .residual = x, .weight = x, .n = 10, .hidden = 100 };
    assert_int_equal(kn_op_rmsnorm(w.a, &a), LM_OK);
    assert_int_equal(counters(&w).launches[SIM_COMM], 1);
    assert_int_equal(counters(&w).comm_bytes, 2000);        /* 2 * 1/2 of 10 * 100 * 2 bytes */
    a.residual = NULL;
    assert_int_equal(kn_op_rmsnorm(w.a, &a), LM_OK);
    assert_int_equal(counters(&w).launches[SIM_COMM], 1);
    close_world(&w);
}

static void test_sampled_ids(void **state)
{
    (void)state;
    struct world w;
    int32_t id[2][2], top[2 * KN_MAX_TOP_LOGPROBS];
    float lp[2], top_lp[2 * KN_MAX_TOP_LOGPROBS];
    struct kn_sample_row row[2] = { { .forced = -1, .seed = 1, .counter = 5, .want_logprob = 1,
                                      .top_logprobs = 2 },
                                    { .forced = 42 } };
    open_with(&w, NULL, NULL);
    for (int i = 0; i < 2; i++) {
        struct kn_sample a = { .logits = lp, .rows = row, .out_id = id[i], .out_logprob = lp,
                               .top_id = top, .top_logprob = top_lp, .n = 2, .vocab = 100 };
        assert_int_equal(kn_op_sample(w.a, &a), LM_OK);
        row[0].seed += (uint64_t)i;
    }
    assert_int_equal(id[0][0], id[1][0]);
    assert_in_range(id[0][0], 0, 99);
    assert_int_equal(id[0][1], 42);
    assert_true(lp[0] < 0 && lp[1] != lp[1]);
    assert_int_equal(top[0], id[0][0]);
    int32_t dst[4] = { 0 }, dst_idx[2] = { 3, 1 }, src_idx[2] = { 1, 0 };
    struct kn_feed f = { dst, dst_idx, id[0], src_idx, 2 };
    assert_int_equal(kn_op_feed(w.a, &f), LM_OK);
    assert_true(dst[3] == 42 && dst[1] == id[0][0] && dst[0] == 0);
    close_world(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_desc_refusals),
        cmocka_unit_test(test_curve),
        cmocka_unit_test(test_gemm_price),
        cmocka_unit_test(test_attention_price),
        cmocka_unit_test(test_lora_price),
        cmocka_unit_test(test_group_price),
        cmocka_unit_test(test_copy_price),
        cmocka_unit_test(test_launches_cost_the_host),
        cmocka_unit_test(test_step_costs),
        cmocka_unit_test(test_copies_overlap_with_compute),
        cmocka_unit_test(test_events_order_streams),
        cmocka_unit_test(test_lanes),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_bulk_is_not_copied),
        cmocka_unit_test(test_attention_reads_lengths),
        cmocka_unit_test(test_lora_reads_segments),
        cmocka_unit_test(test_group_reduces),
        cmocka_unit_test(test_sampled_ids),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
