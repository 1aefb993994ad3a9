/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sim.c - a device that computes nothing and accounts for everything, on a clock of its own.
 *
 * Why: how thousands of adapters, 70B shapes and hours of traffic behave under the real scheduler,
 * pool and copy engine, in seconds and without a GPU. The engine above runs unchanged.
 *
 * The clock. The host has a time, and each stream has the time when it will be free. Enqueuing
 * costs the host what a launch costs (a graph costs it once a step), and the work begins when
 * stream and host are both there. An event is the time of the stream that recorded it; a stream
 * that waits for it is not free before; a host that waits for it moves its own clock. So copies
 * overlap with compute, and planning with the step before, exactly as far as the program above has
 * ordered them. Nothing else moves time, but kn_advance(): the caller has nothing to do until then.
 *
 * Copies. Each direction of PCIe is one lane that large copies take one after the other, whichever
 * streams they are on; small ones (a step's metadata, sampled ids) slip between.
 *
 * Memory is counted against the description's, so that the pool gets the size that it would have,
 * but it is mapped without being touched. Only small buffers have content: metadata goes up, the
 * operations read it (lengths, segments, rows), sampled ids come back. What lies in bulk memory
 * (the pool, logits) and in matrices does not exist; adapters' and swapped cells are never copied,
 * and their blobs may be NULL. Ids are a hash of seed and counter, so runs are reproducible.
 *
 * A group of tp_world devices appears as one device with their memory: it computes its share, and
 * reduces where forward.c would, before the norms that add a residual. LoRA adds a collective of
 * its intermediates.
 *
 * What it can't tell: anything about values. Contention for memory between streams; caches, clocks
 * that sink under heat, uneven tiles; launch latency beyond a constant; allocation of real memory
 * and its failures; NUMA and other processes on the host; the host's real work, which costs here
 * what the description says (`loramill bench` on a real backend tells that). Its figures are as
 * good as the description, so compare policies on one description rather than devices with it.
 *
 * Threads: a mutex over the device; but as time is simulated, one thread should drive it.
 */
#include "kernels/sim/sim_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define SMALL_COPY ((size_t)1 << 20)    /* and less slips between large ones */

lm_status sim_refuse(const char *op, const char *why)
{
    lm_log(LM_ERROR, "kernels", "sim: %s: %s", op, why);
    return LM_INVALID;
}

static struct sim_device *dev_of(kn_device *dev)
{
    return (struct sim_device *)dev;
}

static int64_t us_ns(double us)
{
    return (int64_t)(us * 1000 + 0.5);
}

/* ---- device ---------------------------------------------------------------------------- */

static lm_status sim_probe(struct lm_err *err)
{
    (void)err;
    return LM_OK;
}

static lm_status sim_open(const struct kn_open_params *p, kn_device **out, struct lm_err *err)
{
    struct sim_device *d = lm_calloc(1, sizeof *d);
    if (!d)
        return lm_err_set(err, LM_NOMEM, "out of memory opening a simulated device");
    lm_status st = sim_desc_load(p ? p->sim : NULL, &d->d, err);
    if (st != LM_OK) {
        free(d);
        return st;
    }
    d->base.be = &kn_backend_sim;
    d->mem_gen = 1;
    pthread_mutex_init(&d->mu, NULL);
    *out = &d->base;
    return LM_OK;
}

static void sim_close(kn_device *dev)
{
    pthread_mutex_destroy(&dev_of(dev)->mu);
    free(dev);
}

static size_t mem_total(const struct sim_device *d)
{
    return (size_t)(d->d.memory_gb * 1e9 * d->d.tp_world);
}

static void sim_props(kn_device *dev, struct kn_props *out)
{
    struct sim_device *d = dev_of(dev);
    *out = (struct kn_props){ .act = d->d.act, .kv = d->d.kv, .lora = d->d.lora,
                              .virtual_time = true };
    snprintf(out->name, sizeof out->name, "sim (%s%s)", d->d.name,
             d->d.tp_world > 1 ? ", a group" : "");
    snprintf(out->backend, sizeof out->backend, "sim");
    pthread_mutex_lock(&d->mu);
    out->mem_total = mem_total(d);
    out->mem_free = out->mem_total - d->count.mem_used;
    pthread_mutex_unlock(&d->mu);
}

static int64_t sim_now_us(kn_device *dev)
{
    struct sim_device *d = dev_of(dev);
    pthread_mutex_lock(&d->mu);
    int64_t now = d->host_ns / 1000;
    pthread_mutex_unlock(&d->mu);
    return now;
}

static lm_status sim_advance(kn_device *dev, int64_t until_us)
{
    struct sim_device *d = dev_of(dev);
    pthread_mutex_lock(&d->mu);
    d->host_ns = LM_MAX(d->host_ns, until_us * 1000);
    pthread_mutex_unlock(&d->mu);
    return LM_OK;
}

lm_status kn_sim_counters(kn_device *dev, struct sim_counters *out)
{
    if (dev->be != &kn_backend_sim)
        return LM_INVALID;
    struct sim_device *d = dev_of(dev);
    pthread_mutex_lock(&d->mu);
    *out = d->count;
    pthread_mutex_unlock(&d->mu);
    return LM_OK;
}

/* ---- memory ---------------------------------------------------------------------------- */

/* One page ahead of the caller's, for the size. */
struct header {
    size_t bytes;
};

static void *map(size_t bytes)
{
    if (bytes > SIZE_MAX / 4)
        return NULL;
    char *p = mmap(NULL, bytes + SIM_PAGE, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    ((struct header *)p)->bytes = bytes;
    return p + SIM_PAGE;
}

static size_t unmap(void *p)
{
    struct header *h = (struct header *)((char *)p - SIM_PAGE);
    size_t bytes = h->bytes;
    munmap(h, bytes + SIM_PAGE);
    return bytes;
}

/* Counts memory in; false when the device has no more. Locked. */
static bool take_memory(struct sim_device *d, size_t bytes)
{
    if (bytes > mem_total(d) - d->count.mem_used)
        return false;
    d->count.mem_used += bytes;
    d->count.mem_peak = LM_MAX(d->count.mem_peak, d->count.mem_used);
    return true;
}

static void add_bulk(struct sim_device *d, char *p, size_t n)
{
    if (n >= SIM_BULK_BYTES && d->n_bulk < SIM_BULK_MAX) {
        d->bulk[d->n_bulk].p = p;
        d->bulk[d->n_bulk++].n = n;
    }
}

static void drop_bulk(struct sim_device *d, const char *p)
{
    for (int i = 0; i < d->n_bulk; i++) {
        if (d->bulk[i].p == p) {
            d->bulk[i] = d->bulk[--d->n_bulk];
            return;
        }
    }
}

/* The pool and other large memory has no content. Locked. */
static bool is_bulk(const struct sim_device *d, const void *p)
{
    for (int i = 0; i < d->n_bulk; i++)
        if ((const char *)p >= d->bulk[i].p && (const char *)p < d->bulk[i].p + d->bulk[i].n)
            return true;
    return false;
}

static lm_status sim_alloc(kn_device *dev, size_t bytes, void **out, struct lm_err *err)
{
    struct sim_device *d = dev_of(dev);
    *out = NULL;
    pthread_mutex_lock(&d->mu);
    bool fits = take_memory(d, bytes);
    size_t left = mem_total(d) - d->count.mem_used;
    if (fits && !(*out = map(bytes))) {
        d->count.mem_used -= bytes;
        fits = false;
    }
    if (fits)
        add_bulk(d, *out, bytes);
    pthread_mutex_unlock(&d->mu);
    return fits ? LM_OK : lm_err_set(err, LM_NOMEM, "cannot allocate %zu bytes; %zu are left of "
                                                    "the simulated device's memory", bytes, left);
}

static void sim_free(kn_device *dev, void *p)
{
    struct sim_device *d = dev_of(dev);
    pthread_mutex_lock(&d->mu);
    drop_bulk(d, p);
    d->count.mem_used -= unmap(p);
    d->mem_gen++;
    pthread_mutex_unlock(&d->mu);
}

static lm_status sim_host_alloc(kn_device *dev, size_t bytes, void **out, struct lm_err *err)
{
    (void)dev;
    *out = map(bytes);
    return *out ? LM_OK : lm_err_set(err, LM_NOMEM, "cannot map %zu bytes", bytes);
}

static void sim_host_free(kn_device *dev, void *p)
{
    (void)dev;
    unmap(p);
}

/* ---- time ------------------------------------------------------------------------------ */

void sim_enqueue(struct sim_stream *s, enum sim_kind kind, int64_t ns)
{
    struct sim_device *d = s->dev;
    if (!d->d.graph)
        d->host_ns += us_ns(d->d.launch_us);
    ns += us_ns(d->d.gap_us);
    s->free_ns = LM_MAX(s->free_ns, d->host_ns) + ns;
    d->count.ns[kind] += ns;
    d->count.launches[kind]++;
}

enum copy_kind { BYTES_IN, BYTES_OUT, CELLS_IN, CELLS_OUT };

/* A copy over PCIe. Locked. */
static void cross(struct sim_stream *s, enum copy_kind kind, size_t bytes, int cells)
{
    struct sim_device *d = s->dev;
    bool in = kind == BYTES_IN || kind == CELLS_IN;
    int64_t *lane = &d->link_ns[!in], ns = sim_copy_ns(&d->d, in, (double)bytes, cells);
    int64_t *const total[] = { &d->count.bytes_in, &d->count.bytes_out, &d->count.cells_in,
                               &d->count.cells_out };
    d->host_ns += us_ns(d->d.launch_us);
    int64_t start = LM_MAX(s->free_ns, d->host_ns);
    if (bytes > SMALL_COPY) {
        start = LM_MAX(start, *lane);
        *lane = start + ns;
    }
    s->free_ns = start + ns;
    *total[kind] += (int64_t)bytes;
    d->count.copies++;
}

/* ---- copies ---------------------------------------------------------------------------- */

/* Real only where both sides have content. Locked. */
static void move(struct sim_device *d, void *dst, const void *src, size_t bytes)
{
    if (bytes == 0 || bytes > SIM_BULK_BYTES || is_bulk(d, dst) || is_bulk(d, src))
        return;
    memmove(dst, src, bytes);
    d->mem_gen++;
}

static lm_status sim_copy_in(kn_stream *st, void *dst, const void *src, size_t bytes)
{
    struct sim_stream *s = sim_stream_of(st);
    if (bytes && (!dst || !src))
        return sim_refuse("copy_in", "null pointer");
    pthread_mutex_lock(&s->dev->mu);
    move(s->dev, dst, src, bytes);
    cross(s, BYTES_IN, bytes, 0);
    pthread_mutex_unlock(&s->dev->mu);
    return LM_OK;
}

static lm_status sim_copy_out(kn_stream *st, void *dst, const void *src, size_t bytes)
{
    struct sim_stream *s = sim_stream_of(st);
    if (bytes && (!dst || !src))
        return sim_refuse("copy_out", "null pointer");
    pthread_mutex_lock(&s->dev->mu);
    move(s->dev, dst, src, bytes);
    cross(s, BYTES_OUT, bytes, 0);
    pthread_mutex_unlock(&s->dev->mu);
    return LM_OK;
}

static lm_status sim_copy(kn_stream *st, void *dst, const void *src, size_t bytes)
{
    struct sim_stream *s = sim_stream_of(st);
    if (bytes && (!dst || !src))
        return sim_refuse("copy", "null pointer");
    pthread_mutex_lock(&s->dev->mu);
    move(s->dev, dst, src, bytes);
    sim_enqueue(s, SIM_OTHER, sim_stream_ns(&s->dev->d, 2.0 * (double)bytes));
    pthread_mutex_unlock(&s->dev->mu);
    return LM_OK;
}

static lm_status sim_zero(kn_stream *st, void *dst, size_t bytes)
{
    struct sim_stream *s = sim_stream_of(st);
    if (bytes && !dst)
        return sim_refuse("zero", "null pointer");
    pthread_mutex_lock(&s->dev->mu);
    if (bytes && bytes <= SIM_BULK_BYTES && !is_bulk(s->dev, dst)) {
        memset(dst, 0, bytes);
        s->dev->mem_gen++;
    }
    sim_enqueue(s, SIM_OTHER, sim_stream_ns(&s->dev->d, (double)bytes));
    pthread_mutex_unlock(&s->dev->mu);
    return LM_OK;
}

/* The blob may be NULL: nobody reads it. */
static lm_status cells(kn_stream *st, enum copy_kind kind, const void *base,
                       const int64_t *offsets, int n, size_t cell_bytes)
{
    struct sim_stream *s = sim_stream_of(st);
    if (n < 0 || (n && (!base || !offsets)))
        return sim_refuse("cells", "null pointer or negative count");
    pthread_mutex_lock(&s->dev->mu);
    cross(s, kind, (size_t)n * cell_bytes, n);
    pthread_mutex_unlock(&s->dev->mu);
    return LM_OK;
}

static lm_status sim_scatter_cells(kn_stream *s, void *base, const int64_t *offsets, int n,
                                   size_t cell_bytes, const void *src)
{
    (void)src;
    return cells(s, CELLS_IN, base, offsets, n, cell_bytes);
}

static lm_status sim_gather_cells(kn_stream *s, void *dst, const void *base,
                                  const int64_t *offsets, int n, size_t cell_bytes)
{
    (void)dst;
    return cells(s, CELLS_OUT, base, offsets, n, cell_bytes);
}

/* ---- streams and events ---------------------------------------------------------------- */

static lm_status sim_stream_new(kn_device *dev, kn_stream **out, struct lm_err *err)
{
    struct sim_stream *s = lm_calloc(1, sizeof *s);
    if (!s)
        return lm_err_set(err, LM_NOMEM, "out of memory for a stream");
    s->base.be = &kn_backend_sim;
    s->dev = dev_of(dev);
    *out = &s->base;
    return LM_OK;
}

static void sim_stream_free(kn_stream *s)
{
    free(s);
}

static void wait_until(struct sim_device *d, int64_t ns)
{
    pthread_mutex_lock(&d->mu);
    d->host_ns = LM_MAX(d->host_ns, ns);
    pthread_mutex_unlock(&d->mu);
}

static lm_status sim_stream_sync(kn_stream *s, struct lm_err *err)
{
    (void)err;
    wait_until(sim_stream_of(s)->dev, sim_stream_of(s)->free_ns);
    return LM_OK;
}

static lm_status sim_event_new(kn_device *dev, kn_event **out, struct lm_err *err)
{
    struct sim_event *e = lm_calloc(1, sizeof *e);
    if (!e)
        return lm_err_set(err, LM_NOMEM, "out of memory for an event");
    e->base.be = &kn_backend_sim;
    e->dev = dev_of(dev);
    *out = &e->base;
    return LM_OK;
}

static void sim_event_free(kn_event *e)
{
    free(e);
}

static lm_status sim_event_record(kn_event *e, kn_stream *s)
{
    struct sim_event *ev = (struct sim_event *)e;
    pthread_mutex_lock(&ev->dev->mu);
    ev->at_ns = LM_MAX(sim_stream_of(s)->free_ns, ev->dev->host_ns);
    pthread_mutex_unlock(&ev->dev->mu);
    return LM_OK;
}

static lm_status sim_event_wait(kn_stream *s, kn_event *e)
{
    struct sim_event *ev = (struct sim_event *)e;
    pthread_mutex_lock(&ev->dev->mu);
    sim_stream_of(s)->free_ns = LM_MAX(sim_stream_of(s)->free_ns, ev->at_ns);
    pthread_mutex_unlock(&ev->dev->mu);
    return LM_OK;
}

static lm_status sim_event_query(kn_event *e)
{
    struct sim_event *ev = (struct sim_event *)e;
    pthread_mutex_lock(&ev->dev->mu);
    lm_status st = ev->at_ns <= ev->dev->host_ns ? LM_OK : LM_BUSY;
    pthread_mutex_unlock(&ev->dev->mu);
    return st;
}

static lm_status sim_event_sync(kn_event *e, struct lm_err *err)
{
    (void)err;
    wait_until(((struct sim_event *)e)->dev, ((struct sim_event *)e)->at_ns);
    return LM_OK;
}

/* ---- communicators --------------------------------------------------------------------- */

static lm_status sim_comm_id(kn_device *dev, uint8_t id[KN_COMM_ID_BYTES], struct lm_err *err)
{
    (void)dev, (void)err;
    memset(id, 0, KN_COMM_ID_BYTES);
    return LM_OK;
}

/* The group is inside the device (tp_world): several such devices can't speak to each other. */
static lm_status sim_comm_new(kn_device *dev, const uint8_t id[KN_COMM_ID_BYTES], int rank,
                              int world, kn_comm **out, struct lm_err *err)
{
    (void)dev, (void)id;
    if (world != 1 || rank != 0)
        return lm_err_set(err, LM_UNSUPPORTED, "backend 'sim' has groups inside its description "
                                               "(tp_world), not between devices");
    struct sim_comm *c = lm_calloc(1, sizeof *c);
    if (!c)
        return lm_err_set(err, LM_NOMEM, "out of memory for a communicator");
    c->base.be = &kn_backend_sim;
    c->world = world;
    *out = &c->base;
    return LM_OK;
}

static void sim_comm_free(kn_comm *c)
{
    free(c);
}

static lm_status sim_all_reduce_sum(kn_stream *s, kn_comm *c, void *buf, size_t n, enum kn_dtype t)
{
    (void)s, (void)n, (void)t;
    return c && buf ? LM_OK : sim_refuse("all_reduce_sum", "null pointer");
}

static lm_status sim_all_gather(kn_stream *s, kn_comm *c, void *dst, const void *src, size_t n,
                                enum kn_dtype t)
{
    return c ? sim_copy(s, dst, src, n * kn_dtype_size(t)) : sim_refuse("all_gather", "no group");
}

/* ---- matrices -------------------------------------------------------------------------- */

static size_t sim_mat_bytes(const kn_mat *m)
{
    return (size_t)m->rows * (size_t)m->cols * kn_dtype_size(m->dtype);
}

static lm_status sim_mat_new(kn_device *dev, enum kn_dtype t, int rows, int cols, kn_mat **out,
                             struct lm_err *err)
{
    struct sim_device *d = dev_of(dev);
    if (rows < 1 || cols < 1 || (unsigned)t > KN_E4M3)
        return lm_err_set(err, LM_INVALID, "a matrix of %d x %d", rows, cols);
    struct sim_mat *m = lm_calloc(1, sizeof *m);
    if (!m)
        return lm_err_set(err, LM_NOMEM, "out of memory for a matrix");
    m->base = (struct kn_mat){ &kn_backend_sim, t, rows, cols };
    m->dev = d;
    pthread_mutex_lock(&d->mu);
    bool fits = take_memory(d, sim_mat_bytes(&m->base));
    size_t left = mem_total(d) - d->count.mem_used;
    pthread_mutex_unlock(&d->mu);
    if (!fits) {
        free(m);
        return lm_err_set(err, LM_NOMEM, "a matrix of %d x %d %s does not fit: %zu bytes are left "
                                         "of the simulated device's memory", rows, cols,
                          kn_dtype_name(t), left);
    }
    *out = &m->base;
    return LM_OK;
}

static void sim_mat_free(kn_mat *m)
{
    struct sim_device *d = ((struct sim_mat *)m)->dev;
    pthread_mutex_lock(&d->mu);
    d->count.mem_used -= sim_mat_bytes(m);
    pthread_mutex_unlock(&d->mu);
    free(m);
}

static lm_status sim_mat_upload(kn_mat *m, int row0, int col0, int rows, int cols, const void *src,
                                enum kn_dtype src_t, size_t src_ld, struct lm_err *err)
{
    (void)src_t;
    if (row0 < 0 || col0 < 0 || rows < 0 || cols < 0 || rows > m->rows - row0 ||
        cols > m->cols - col0 || src_ld < (size_t)cols || !src)
        return lm_err_set(err, LM_INVALID, "upload of %d x %d at (%d, %d) does not fit a matrix of "
                                           "%d x %d", rows, cols, row0, col0, m->rows, m->cols);
    return LM_OK;
}

static lm_status sim_mat_fill(kn_mat *m, uint64_t seed, float scale, struct lm_err *err)
{
    (void)m, (void)seed, (void)scale, (void)err;
    return LM_OK;
}

static lm_status cross_mat(kn_stream *st, enum copy_kind kind, const kn_mat *m)
{
    struct sim_stream *s = sim_stream_of(st);
    pthread_mutex_lock(&s->dev->mu);
    cross(s, kind, sim_mat_bytes(m), 0);
    pthread_mutex_unlock(&s->dev->mu);
    return LM_OK;
}

static lm_status sim_mat_save(kn_stream *s, void *dst, const kn_mat *m)
{
    (void)dst;
    return cross_mat(s, BYTES_OUT, m);
}

static lm_status sim_mat_restore(kn_stream *s, kn_mat *m, const void *src)
{
    (void)src;
    return cross_mat(s, BYTES_IN, m);
}

/* ---- sizes ----------------------------------------------------------------------------- */

static size_t sim_kv_block_bytes(kn_device *dev, enum kn_kv kv, int block_tokens, int kv_heads,
                                 int head_dim)
{
    double b = sim_kv_token_bytes(&dev_of(dev)->d, kv, kv_heads, head_dim) * block_tokens;
    return LM_DIV_UP((size_t)b, 16) * 16;
}

static size_t sim_sample_workspace(kn_device *dev, int max_rows, int vocab)
{
    (void)dev, (void)vocab;
    return (size_t)LM_MAX(max_rows, 1) * 256;
}

const struct kn_backend kn_backend_sim = {
    .name = "sim",
    .probe = sim_probe,
    .open = sim_open,
    .close = sim_close,
    .props = sim_props,
    .now_us = sim_now_us,
    .advance = sim_advance,
    .alloc = sim_alloc,
    .free = sim_free,
    .host_alloc = sim_host_alloc,
    .host_free = sim_host_free,
    .copy_in = sim_copy_in,
    .copy_out = sim_copy_out,
    .copy = sim_copy,
    .zero = sim_zero,
    .scatter_cells = sim_scatter_cells,
    .gather_cells = sim_gather_cells,
    .stream_new = sim_stream_new,
    .stream_free = sim_stream_free,
    .stream_sync = sim_stream_sync,
    .event_new = sim_event_new,
    .event_free = sim_event_free,
    .event_record = sim_event_record,
    .event_wait = sim_event_wait,
    .event_query = sim_event_query,
    .event_sync = sim_event_sync,
    .comm_id = sim_comm_id,
    .comm_new = sim_comm_new,
    .comm_free = sim_comm_free,
    .all_reduce_sum = sim_all_reduce_sum,
    .all_gather = sim_all_gather,
    .mat_new = sim_mat_new,
    .mat_free = sim_mat_free,
    .mat_upload = sim_mat_upload,
    .mat_fill = sim_mat_fill,
    .mat_bytes = sim_mat_bytes,
    .mat_save = sim_mat_save,
    .mat_restore = sim_mat_restore,
    .kv_block_bytes = sim_kv_block_bytes,
    .sample_workspace = sim_sample_workspace,
#define X(op, args) .op = sim_op_##op,
    KN_OPS(X)
#undef X
};
