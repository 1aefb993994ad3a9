/* SPDX-License-Identifier: Apache-2.0 */
/*
 * upload.c - see upload.h.
 *
 * Pieces are immutable once the threads run. What threads share: the number of the next piece, the
 * word that stops them, and the error, which is under the mutex. A thread that fails stores its
 * error if no earlier piece has failed, and stops the others; pieces that were begun are finished.
 */
#include "engine/upload.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#define PIECE_BYTES ((size_t)8 << 20)
#define MAX_THREADS 16
#define THREAD_BYTES ((size_t)32 << 20)         /* less than this for each is not worth a thread */

struct upload {
    const safetensors *files;
    kn_device *dev;
    struct upload_rect *piece;
    int n, cap;
    size_t bytes, largest;      /* of all pieces together, and of the largest */
    pthread_t thread[MAX_THREADS];
    int n_threads;              /* running */
    int64_t begun_us;
    _Atomic(int64_t) ended_us;  /* of the last thread so far */
    atomic_int next;
    atomic_bool stop;
    pthread_mutex_t mu;
    int failed_at;              /* piece, n: none */
    lm_status status;
    struct lm_err err;
};

static atomic_int forced_threads;
static atomic_size_t forced_piece;

void upload_force(int threads, size_t piece_bytes)
{
    atomic_store(&forced_threads, threads);
    atomic_store(&forced_piece, piece_bytes);
}

/* ---- what is to be done ---------------------------------------------------------------- */

lm_status upload_new(const safetensors *files, kn_device *dev, upload **out, struct lm_err *err)
{
    upload *u = lm_calloc(1, sizeof *u);
    if (!u)
        return lm_err_set(err, LM_NOMEM, "no memory to load weights");
    u->files = files;
    u->dev = dev;
    pthread_mutex_init(&u->mu, NULL);
    *out = u;
    return LM_OK;
}

static size_t row_bytes(const struct upload_rect *r)
{
    return (size_t)r->from->shape[1] * kn_dtype_size(r->from->dtype);
}

static lm_status append(upload *u, const struct upload_rect *r, struct lm_err *err)
{
    if (u->n == u->cap) {
        int cap = LM_MAX(256, u->cap * 2);
        void *p = lm_reallocarray(u->piece, (size_t)cap, sizeof *u->piece);
        if (!p)
            return lm_err_set(err, LM_NOMEM, "no memory for the list of what is to be loaded");
        u->piece = p;
        u->cap = cap;
    }
    size_t bytes = (size_t)r->rows * row_bytes(r);
    u->piece[u->n++] = *r;
    u->bytes += bytes;
    u->largest = LM_MAX(u->largest, bytes);
    return LM_OK;
}

/* A piece is whole rows: a shard's columns are cut out of them later. */
lm_status upload_add(upload *u, const struct upload_rect *r, struct lm_err *err)
{
    size_t want = atomic_load(&forced_piece);
    size_t fit = (want ? want : PIECE_BYTES) / LM_MAX(row_bytes(r), 1);
    int rows_a_go = (int)LM_MIN(LM_MAX(fit, 1), (size_t)LM_MAX(r->rows, 1));
    lm_status st = LM_OK;
    for (int i = 0; i < r->rows && st == LM_OK; i += rows_a_go) {
        struct upload_rect piece = *r;
        piece.row0 += i;
        piece.row += i;
        piece.rows = LM_MIN(rows_a_go, r->rows - i);
        st = append(u, &piece, err);
    }
    return st;
}

/* ---- the threads ----------------------------------------------------------------------- */

static lm_status carry(const upload *u, const struct upload_rect *r, void *buffer,
                       struct lm_err *err)
{
    const struct st_tensor *t = r->from;
    size_t row = row_bytes(r), elem = kn_dtype_size(t->dtype);
    lm_status st = safetensors_read(u->files, t, (size_t)r->row * row, (size_t)r->rows * row,
                                    buffer, err);
    if (st != LM_OK)
        return st;
    st = kn_mat_upload(r->to, r->row0, 0, r->rows, r->cols,
                       (const char *)buffer + (size_t)r->col * elem, t->dtype,
                       (size_t)t->shape[1], err);
    if (st != LM_OK)
        lm_err_prefix(err, "tensor '%s'", t->name);
    return st;
}

static void fail(upload *u, int at, lm_status st, const struct lm_err *err)
{
    pthread_mutex_lock(&u->mu);
    if (u->status == LM_OK || at < u->failed_at) {
        u->failed_at = at;
        u->status = st;
        u->err = *err;
    }
    pthread_mutex_unlock(&u->mu);
    atomic_store(&u->stop, true);
}

static void work(upload *u)
{
    struct lm_err err = { 0 };
    void *buffer = NULL;
    int i = 0;
    lm_status st = kn_host_alloc(u->dev, u->largest, &buffer, &err);
    if (st != LM_OK)
        fail(u, u->n, st, &err);
    while (st == LM_OK && !atomic_load(&u->stop) && (i = atomic_fetch_add(&u->next, 1)) < u->n) {
        st = carry(u, &u->piece[i], buffer, &err);
        if (st != LM_OK)
            fail(u, i, st, &err);
    }
    kn_host_free(u->dev, buffer);
    int64_t now = lm_now_us(), last = atomic_load(&u->ended_us);
    while (now > last && !atomic_compare_exchange_weak(&u->ended_us, &last, now))
        ;
}

static void *thread_main(void *arg)
{
    pthread_setname_np(pthread_self(), "upload");
    work(arg);
    return NULL;
}

static int by_place(const void *a, const void *b)
{
    const struct upload_rect *x = a, *y = b;
    if (x->from->part != y->from->part)
        return x->from->part < y->from->part ? -1 : 1;
    if (x->from->at != y->from->at)
        return x->from->at < y->from->at ? -1 : 1;
    return (x->row > y->row) - (x->row < y->row);
}

static int choose_threads(const upload *u)
{
    struct kn_props props;
    cpu_set_t set;
    if (atomic_load(&forced_threads))
        return LM_MIN(atomic_load(&forced_threads), MAX_THREADS);
    kn_props(u->dev, &props);
    int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    if (props.threads > 0)
        cores = LM_MIN(cores, props.threads);
    return (int)LM_MIN((size_t)LM_MIN(cores, MAX_THREADS), u->bytes / THREAD_BYTES);
}

void upload_start(upload *u)
{
    if (u->n > 0)
        qsort(u->piece, (size_t)u->n, sizeof *u->piece, by_place);
    u->failed_at = u->n;
    u->begun_us = lm_now_us();
    int n = choose_threads(u);
    while (u->n_threads < n && n > 1 &&
           pthread_create(&u->thread[u->n_threads], NULL, thread_main, u) == 0)
        u->n_threads++;
}

static void log_speed(const upload *u, int threads)
{
    double s = (double)(atomic_load(&u->ended_us) - u->begun_us) / 1e6;
    lm_log(LM_INFO, "engine", "weights: %.2f GB in %.2f s (%.1f GB/s) by %d thread%s",
           (double)u->bytes / 1e9, s, s > 0 ? (double)u->bytes / 1e9 / s : 0, threads,
           threads == 1 ? "" : "s");
}

static void join(upload *u)
{
    while (u->n_threads > 0)
        pthread_join(u->thread[--u->n_threads], NULL);
}

lm_status upload_wait(upload *u, struct lm_err *err)
{
    const int threads = LM_MAX(u->n_threads, 1);
    if (u->n_threads == 0 && u->n > 0) {
        u->begun_us = lm_now_us();
        work(u);
    }
    join(u);
    if (u->status == LM_OK && u->n > 0)
        log_speed(u, threads);
    if (u->status != LM_OK && err)
        *err = u->err;
    return u->status;
}

void upload_free(upload *u)
{
    if (!u)
        return;
    atomic_store(&u->stop, true);
    join(u);
    pthread_mutex_destroy(&u->mu);
    free(u->piece);
    free(u);
}
