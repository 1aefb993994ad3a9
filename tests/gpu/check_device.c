/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check_device.c - memory, copies, cells, events, matrices, errors; and this card's ceilings.
 */
#include "check.h"

static struct lm_err err;

static void *pinned(struct gpu_check *c, size_t bytes)
{
    void *p = NULL;
    must(kn_host_alloc(c->cuda, bytes, &p, &err), "pinned memory");
    return p;
}

static void check_copies(struct gpu_check *c)
{
    enum { N = 1 << 20 };
    unsigned char *a = pinned(c, N), *b = pinned(c, N);
    char *x = dev_new(c, N), *y = dev_new(c, N);
    for (int i = 0; i < N; i++)
        a[i] = (unsigned char)rnd();
    bool ok = kn_copy_in(c->gs, x, a, N) == LM_OK && kn_copy(c->gs, y, x, N) == LM_OK &&
              kn_zero(c->gs, y + 100, 55) == LM_OK && kn_copy_out(c->gs, b, y, N) == LM_OK &&
              kn_stream_sync(c->gs, &err) == LM_OK;
    memset(a + 100, 0, 55);
    check_that(c, ok && !memcmp(a, b, N), "copies in, across, zeroed and out");
    dev_free(c, x);
    dev_free(c, y);
    kn_host_free(c->cuda, a);
    kn_host_free(c->cuda, b);
}

/* Words and 16 bytes go by a kernel, odd bytes and many by the copy engine: in, across and out, and
 * nothing beside them is touched. */
static void check_small_copies(struct gpu_check *c)
{
    enum { N = (256 << 10) + 64 };
    static const int sizes[] = { 1, 4, 12, 16, 1000, 1024, 2049, 37952, N - 80, N - 64, N - 32 };
    unsigned char *a = pinned(c, N), *b = pinned(c, N), *want = malloc(N);
    char *x = dev_new(c, N), *y = dev_new(c, N);
    bool ok = true;
    for (size_t i = 0; i < LM_COUNT(sizes) && ok; i++) {
        for (int at = 1; at <= 16 && ok; at *= 4) {
            for (int k = 0; k < N; k++)
                a[k] = (unsigned char)rnd();
            memset(b, 0x55, N);
            memset(want, 0x55, N);
            memcpy(want + at, a + at, (size_t)sizes[i]);
            size_t n = (size_t)sizes[i];
            ok = kn_zero(c->gs, x, N) == LM_OK && kn_copy_in(c->gs, x + at, a + at, n) == LM_OK &&
                 kn_copy(c->gs, y, x, N) == LM_OK &&
                 kn_copy_out(c->gs, b + at, y + at, n) == LM_OK &&
                 kn_stream_sync(c->gs, &err) == LM_OK && !memcmp(b, want, N);
            dev_get(c, b, x, N);
            memset(want, 0, (size_t)at);
            memset(want + at + n, 0, N - (size_t)at - n);
            ok = ok && !memcmp(b, want, N);
        }
    }
    check_that(c, ok, "small copies, of words and of odd sizes");
    dev_free(c, x);
    dev_free(c, y);
    kn_host_free(c->cuda, a);
    kn_host_free(c->cuda, b);
    free(want);
}

/* Cells land at their offsets, nothing between them is touched, and they come back. */
static void check_cells(struct gpu_check *c, int n, size_t cell)
{
    size_t room = (size_t)n * 3 * cell, blob = (size_t)n * cell;
    unsigned char *in = pinned(c, blob), *out = pinned(c, blob), *all = malloc(room);
    unsigned char *want = calloc(1, room);
    int64_t *at = malloc((size_t)n * sizeof *at);
    char *base = dev_new(c, room);
    for (size_t i = 0; i < blob; i++)
        in[i] = (unsigned char)rnd();
    for (int i = 0; i < n; i++) {
        at[i] = (int64_t)cell * ((int64_t)(n - 1 - i) * 3 + (int64_t)(rnd() % 3));
        memcpy(want + at[i], in + (size_t)i * cell, cell);
    }
    int64_t *used = malloc((size_t)n * sizeof *used);
    memcpy(used, at, (size_t)n * sizeof *at);
    bool ok = kn_scatter_cells(c->gs, base, used, n, cell, in) == LM_OK;
    memset(used, 0x55, (size_t)n * sizeof *used);       /* may be reused as soon as it returns */
    memcpy(used, at, (size_t)n * sizeof *at);
    ok = ok && kn_gather_cells(c->gs, out, base, used, n, cell) == LM_OK;
    memset(used, 0x55, (size_t)n * sizeof *used);
    dev_get(c, all, base, room);
    check_that(c, ok && !memcmp(all, want, room) && !memcmp(in, out, blob),
               "%d cells of %zu bytes scattered and gathered", n, cell);
    dev_free(c, base);
    kn_host_free(c->cuda, in);
    kn_host_free(c->cuda, out);
    free(all);
    free(want);
    free(at);
    free(used);
}

static void check_events(struct gpu_check *c)
{
    kn_stream *other = NULL;
    kn_event *e = NULL;
    enum { N = 64 << 20 };
    must(kn_stream_new(c->cuda, &other, &err), "stream");
    must(kn_event_new(c->cuda, &e, &err), "event");
    unsigned char *a = pinned(c, N), *b = pinned(c, N);
    char *x = dev_new(c, N);
    memset(a, 7, N);
    memset(b, 0, N);
    bool ok = kn_event_query(e) == LM_OK && kn_copy_in(c->gs, x, a, N) == LM_OK &&
              kn_event_record(e, c->gs) == LM_OK && kn_event_wait(other, e) == LM_OK &&
              kn_copy_out(other, b, x, N) == LM_OK;
    lm_status early = kn_event_query(e);
    ok = ok && (early == LM_BUSY || early == LM_OK) && kn_stream_sync(other, &err) == LM_OK &&
         kn_event_query(e) == LM_OK && kn_event_sync(e, &err) == LM_OK;
    check_that(c, ok && !memcmp(a, b, N), "a stream waits for another's event (query was %s)",
               early == LM_BUSY ? "busy" : "ok");
    kn_event_free(e);
    kn_stream_free(other);
    dev_free(c, x);
    kn_host_free(c->cuda, a);
    kn_host_free(c->cuda, b);
}

/* Rows of the matrix as the embedding shows them. */
static void read_mat(struct gpu_check *c, kn_mat *m, int rows, int cols, uint16_t *out)
{
    int32_t *ids = malloc((size_t)rows * sizeof *ids);
    for (int i = 0; i < rows; i++)
        ids[i] = i;
    int32_t *dids = dev_put(c, ids, (size_t)rows * sizeof *ids);
    void *d = dev_new(c, (size_t)rows * (size_t)cols * 2);
    struct kn_embed a = { d, m, dids, rows, cols };
    must(kn_op_embed(c->gs, &a), "embed");
    dev_get(c, out, d, (size_t)rows * (size_t)cols * 2);
    dev_free(c, d);
    dev_free(c, dids);
    free(ids);
}

/* `from_pinned`: what is sent lies in pinned memory, which goes off without another copy. */
static void check_upload(struct gpu_check *c, int rows, int cols, enum kn_dtype t, bool from_pinned)
{
    kn_mat *m = NULL;
    size_t n = (size_t)rows * (size_t)cols, ld = (size_t)cols + 5;
    float *f = malloc(((size_t)rows * ld + 1) * sizeof *f);
    uint16_t *h = malloc(((size_t)rows * ld + 1) * sizeof *h), *got = malloc(n * sizeof *got);
    bool ok = true;
    for (size_t i = 0; i < (size_t)rows * ld; i++) {
        f[i] = rnd_float();
        h[i] = bf16_bits(f[i]);
    }
    must(kn_mat_new(c->cuda, KN_BF16, rows, cols, &m, &err), "mat_new");
    const void *src = t == KN_F32 ? (const void *)f : (const void *)h;
    size_t size = kn_dtype_size(t), src_bytes = (size_t)rows * ld * size;
    void *locked = from_pinned ? pinned(c, src_bytes) : NULL;
    if (locked)
        src = memcpy(locked, src, src_bytes);
    int half = rows / 2, left = cols / 3;       /* four rectangles */
    for (int q = 0; q < 4; q++) {
        int r0 = q & 2 ? half : 0, nr = q & 2 ? rows - half : half;
        int c0 = q & 1 ? left : 0, nc = q & 1 ? cols - left : left;
        const char *from = (const char *)src + ((size_t)r0 * ld + (size_t)c0) * size;
        ok = ok && kn_mat_upload(m, r0, c0, nr, nc, from, t, ld, &err) == LM_OK;
    }
    read_mat(c, m, rows, cols, got);
    for (int r = 0; r < rows; r++)
        ok = ok && !memcmp(got + (size_t)r * (size_t)cols, h + (size_t)r * ld, (size_t)cols * 2);
    size_t bytes = kn_mat_bytes(m);
    void *saved = pinned(c, bytes);
    ok = ok && kn_mat_save(c->gs, saved, m) == LM_OK && kn_stream_sync(c->gs, &err) == LM_OK &&
         kn_mat_fill(m, 1, 1, &err) == LM_OK && kn_mat_restore(c->gs, m, saved) == LM_OK;
    uint16_t *again = malloc(n * sizeof *again);
    read_mat(c, m, rows, cols, again);
    check_that(c, ok && !memcmp(got, again, n * 2),
               "a matrix of %d x %d from %s%s, saved, restored", rows, cols,
               from_pinned ? "pinned " : "", kn_dtype_name(t));
    kn_host_free(c->cuda, saved);
    kn_host_free(c->cuda, locked);
    kn_mat_free(m);
    free(again);
    free(got);
    free(h);
    free(f);
}

static void check_refusals(struct gpu_check *c)
{
    void *p = NULL;
    kn_mat *m = NULL;
    check_that(c, kn_alloc(c->cuda, (size_t)1 << 50, &p, &err) == LM_NOMEM,
               "a petabyte is refused: %s", err.msg);
    check_that(c, kn_mat_new(c->cuda, KN_BF16, 0, 5, &m, &err) == LM_INVALID,
               "an empty matrix is refused");
    struct kn_open_params open = { .index = 99 };
    kn_device *d = NULL;
    check_that(c, kn_open("cuda", &open, &d, &err) == LM_NOT_FOUND, "device 99: %s", err.msg);
}

void check_device(struct gpu_check *c)
{
    check_copies(c);
    check_small_copies(c);
    check_cells(c, 1, 256);
    check_cells(c, 300, 4096);
    check_cells(c, 7, 1 << 20);
    check_events(c);
    for (int pin = 0; pin < 2; pin++) {
        check_upload(c, 37, 41, KN_BF16, pin);
        check_upload(c, 1000, 5000, KN_BF16, pin);
        check_upload(c, 129, 77, KN_F32, pin);
    }
    check_refusals(c);
}

/* ---- ceilings -------------------------------------------------------------------------- */

struct copying {
    char *a, *b;
    size_t bytes;
};

static lm_status one_copy(struct gpu_check *c, void *ctx, int i)
{
    struct copying *x = ctx;
    return i & 1 ? kn_copy(c->gs, x->a, x->b, x->bytes) : kn_copy(c->gs, x->b, x->a, x->bytes);
}

struct product {
    struct kn_gemm a;
};

static lm_status one_gemm(struct gpu_check *c, void *ctx, int i)
{
    (void)i;
    return kn_op_gemm(c->gs, &((struct product *)ctx)->a);
}

static void bench_cells(struct gpu_check *c)
{
    enum { N = 80 };
    const size_t cell = 262144;
    int64_t at[N];
    char *base = dev_new(c, N * 2 * cell);
    void *blob = pinned(c, N * cell);
    memset(blob, 1, N * cell);
    for (int i = 0; i < N; i++)
        at[i] = (int64_t)cell * 2 * i;
    int64_t best = INT64_MAX, call = 0;
    for (int round = 0; round < 5; round++) {
        int64_t t0 = lm_now_us();
        must(kn_scatter_cells(c->gs, base, at, N, cell, blob), "scatter");
        int64_t t1 = lm_now_us();
        must(kn_stream_sync(c->gs, &err), "sync");
        int64_t t = lm_now_us() - t0;
        call = t < best ? t1 - t0 : call;
        best = t < best ? t : best;
    }
    figure(c, "scatter_cells, 80 x 256 KiB", (double)(N * cell) / (double)best / 1e3, "GB/s",
           "\"us\": %ld, \"host_us\": %ld", (long)best, (long)call);
    kn_host_free(c->cuda, blob);
    dev_free(c, base);
}

static void bench_upload(struct gpu_check *c)
{
    kn_mat *m = NULL;
    const int rows = 16384, cols = 4096;
    const size_t bytes = (size_t)rows * (size_t)cols * 2;
    void *src[] = { malloc(bytes), pinned(c, bytes) };
    must(kn_mat_new(c->cuda, KN_BF16, rows, cols, &m, &err), "mat_new");
    for (int i = 0; i < 4; i++) {       /* the first of each warms up */
        memset(src[i / 2], 1, bytes);
        int64_t t0 = lm_now_us();
        must(kn_mat_upload(m, 0, 0, rows, cols, src[i / 2], KN_BF16, (size_t)cols, &err), "upload");
        double us = (double)(lm_now_us() - t0);
        if (i % 2)
            figure(c, "mat_upload, one thread", (double)bytes / us / 1e3, "GB/s",
                   "\"from\": \"%s\"", i / 2 ? "pinned memory" : "pageable memory");
    }
    kn_mat_free(m);
    free(src[0]);
    kn_host_free(c->cuda, src[1]);
}

/* Reads alone go faster than copies: a gigabyte of weights against one row is nothing but reads.
 * The better of the two is this card's bandwidth. */
static void bench_reads(struct gpu_check *c, const struct copying *x)
{
    kn_mat *w = NULL;
    const int n = 131072, k = 4096;
    must(kn_mat_new(c->cuda, KN_BF16, n, k, &w, &err), "mat_new");
    struct product p = { { .y = x->a, .x = x->b, .w = w, .m = 1, .ldx = k, .ldy = n } };
    double us = time_op(c, one_gemm, &p, 4), gbps = 2.0 * n * k / us / 1e3;
    figure(c, "ceiling: reads (gemm m=1 of 131072 x 4096)", gbps, "GB/s", "%s", "");
    c->gbps = fmax(c->gbps, gbps);
    kn_mat_free(w);
}

void bench_ceilings(struct gpu_check *c)
{
    struct copying x = { .bytes = (size_t)1 << 30 };
    x.a = dev_new(c, x.bytes);
    x.b = dev_new(c, x.bytes);
    double us = time_op(c, one_copy, &x, 4);
    c->gbps = 2.0 * (double)x.bytes / us / 1e3;
    figure(c, "ceiling: copy, read + written", c->gbps, "GB/s", "%s", "");
    bench_reads(c, &x);
    kn_mat *w = NULL;
    const int n = 8192;
    must(kn_mat_new(c->cuda, KN_BF16, n, n, &w, &err), "mat_new");
    must(kn_mat_fill(w, 1, 1, &err), "mat_fill");
    struct product p = { { .y = x.a, .x = x.b, .w = w, .m = n, .ldx = n, .ldy = n } };
    fill_random(c, x.b, n, n);
    us = time_op(c, one_gemm, &p, 4);
    c->tflops = 2.0 * n * n * (double)n / us / 1e6;
    figure(c, "ceiling: bf16 GEMM of 8192 cubed", c->tflops, "TFLOP/s", "%s", "");
    kn_mat_free(w);
    dev_free(c, x.a);
    dev_free(c, x.b);
    bench_cells(c);
    bench_upload(c);
}
