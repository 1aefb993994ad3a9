/* SPDX-License-Identifier: Apache-2.0 */
/*
 * comm.c - ranks of one model as threads of one process.
 *
 * A group is found by its id in a process-wide list; it lives while a rank holds it. A collective
 * is: publish my arguments, barrier, work, barrier. In all_reduce rank r adds up slice r of every
 * rank's buffer, in rank order, and writes it to every buffer; slices are disjoint, all ranks end
 * with the same bits, and no memory is needed.
 *
 * Failure: ranks that disagree on the arguments all get LM_INVALID. A rank that stays away for
 * WAIT_SECONDS breaks the group: every call on it fails from then on, with LM_TIMEOUT while
 * joining and LM_DEVICE later.
 *
 * LOCK ORDER: groups_lock -> group.lock.
 */
#include "kernels/cpu/cpu_int.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define WAIT_SECONDS 60
#define MAX_WORLD 64

struct call {
    const void *src;
    void *dst;
    size_t n;
    enum kn_dtype t;
};

struct group {
    struct group *next;         /* under groups_lock, as are refs and joined */
    uint8_t id[KN_COMM_ID_BYTES];
    int world, refs;
    uint64_t joined;            /* bit per rank */
    pthread_mutex_t lock;       /* the rest */
    pthread_cond_t turn;
    int arrived;
    unsigned generation;
    bool broken;
    struct call call[MAX_WORLD];        /* own element before a barrier, any after it */
};

struct cpu_comm {
    struct kn_comm base;
    struct group *g;
    int rank;
};

static pthread_mutex_t groups_lock = PTHREAD_MUTEX_INITIALIZER;
static struct group *groups;

lm_status cpu_comm_id(kn_device *dev, uint8_t id[KN_COMM_ID_BYTES], struct lm_err *err)
{
    static atomic_uint serial;
    int64_t words[3] = { getpid(), lm_wall_ms(), atomic_fetch_add(&serial, 1) };
    (void)dev, (void)err;
    memset(id, 0, KN_COMM_ID_BYTES);
    memcpy(id, "cpu", 3);
    memcpy(id + 8, words, sizeof words);
    return LM_OK;
}

/* ---- barrier --------------------------------------------------------------------------- */

static lm_status barrier(struct group *g)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += WAIT_SECONDS;
    pthread_mutex_lock(&g->lock);
    unsigned mine = g->generation;
    if (!g->broken && ++g->arrived == g->world) {
        g->arrived = 0;
        g->generation++;
        pthread_cond_broadcast(&g->turn);
    }
    while (!g->broken && g->generation == mine)
        if (pthread_cond_timedwait(&g->turn, &g->lock, &until) == ETIMEDOUT &&
            g->generation == mine) {
            g->broken = true;
            pthread_cond_broadcast(&g->turn);
        }
    lm_status st = g->generation == mine ? LM_DEVICE : LM_OK;
    pthread_mutex_unlock(&g->lock);
    return st;
}

/* ---- life ------------------------------------------------------------------------------ */

static struct group *group_new(const uint8_t id[KN_COMM_ID_BYTES], int world)
{
    struct group *g = lm_calloc(1, sizeof *g);
    if (!g)
        return NULL;
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&g->turn, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&g->lock, NULL);
    memcpy(g->id, id, KN_COMM_ID_BYTES);
    g->world = world;
    g->next = groups;
    groups = g;
    return g;
}

static void group_unref(struct group *g)
{
    pthread_mutex_lock(&groups_lock);
    bool last = --g->refs == 0;
    if (last) {
        struct group **at = &groups;
        while (*at != g)
            at = &(*at)->next;
        *at = g->next;
    }
    pthread_mutex_unlock(&groups_lock);
    if (!last)
        return;
    pthread_cond_destroy(&g->turn);
    pthread_mutex_destroy(&g->lock);
    free(g);
}

/* Takes the rank's seat; the first rank makes the group. */
static lm_status group_join(const uint8_t id[KN_COMM_ID_BYTES], int rank, int world,
                            struct group **out, struct lm_err *err)
{
    pthread_mutex_lock(&groups_lock);
    struct group *g = groups;
    while (g && memcmp(g->id, id, KN_COMM_ID_BYTES))
        g = g->next;
    lm_status st = LM_OK;
    if (!g && !(g = group_new(id, world)))
        st = lm_err_set(err, LM_NOMEM, "out of memory for a communicator");
    else if (g->world != world)
        st = lm_err_set(err, LM_INVALID, "rank %d: world of %d, others said %d", rank, world,
                        g->world);
    else if (g->joined & (uint64_t)1 << rank)
        st = lm_err_set(err, LM_INVALID, "rank %d joined twice", rank);
    if (st == LM_OK) {
        g->joined |= (uint64_t)1 << rank;
        g->refs++;
        *out = g;
    }
    pthread_mutex_unlock(&groups_lock);
    return st;
}

lm_status cpu_comm_new(kn_device *dev, const uint8_t id[KN_COMM_ID_BYTES], int rank, int world,
                       kn_comm **out, struct lm_err *err)
{
    (void)dev;
    if (world < 1 || world > MAX_WORLD || rank < 0 || rank >= world)
        return lm_err_set(err, LM_INVALID, "rank %d of %d: use a world of 1 to %d", rank, world,
                          MAX_WORLD);
    struct cpu_comm *c = lm_calloc(1, sizeof *c);
    if (!c)
        return lm_err_set(err, LM_NOMEM, "out of memory for a communicator");
    lm_status st = group_join(id, rank, world, &c->g, err);
    if (st != LM_OK) {
        free(c);
        return st;
    }
    c->base.be = &kn_backend_cpu;
    c->rank = rank;
    if (barrier(c->g) != LM_OK) {
        cpu_comm_free(&c->base);
        return lm_err_set(err, LM_TIMEOUT, "rank %d of %d: the others did not join within %d s",
                          rank, world, WAIT_SECONDS);
    }
    *out = &c->base;
    return LM_OK;
}

void cpu_comm_free(kn_comm *c)
{
    group_unref(((struct cpu_comm *)c)->g);
    free(c);
}

/* ---- collectives ----------------------------------------------------------------------- */

/* Publishes my call and checks that all agree; every rank sees the same answer. */
static lm_status meet(struct cpu_comm *c, struct call mine)
{
    struct group *g = c->g;
    g->call[c->rank] = mine;
    lm_status st = barrier(g);
    bool same = true;
    for (int r = 0; st == LM_OK && r < g->world; r++)
        same &= g->call[r].n == g->call[0].n && g->call[r].t == g->call[0].t &&
                (mine.n == 0 || (g->call[r].src && g->call[r].dst));
    if (st == LM_OK && !same) {
        barrier(g);             /* nobody may publish anew before all have looked */
        return cpu_refuse("communicator", "ranks disagree on count or dtype, or a null buffer");
    }
    return st;
}

static float get(const void *p, size_t i, enum kn_dtype t)
{
    if (t == KN_F32)
        return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    return t == KN_F16 ? cpu_f16_to_f32(h) : cpu_bf16_to_f32(h);
}

static void put(void *p, size_t i, enum kn_dtype t, float v)
{
    if (t == KN_F32)
        ((float *)p)[i] = v;
    else
        ((uint16_t *)p)[i] = t == KN_F16 ? cpu_f32_to_f16(v) : cpu_f32_to_bf16(v);
}

lm_status cpu_all_reduce_sum(kn_stream *s, kn_comm *comm, void *buf, size_t n, enum kn_dtype t)
{
    struct cpu_comm *c = (struct cpu_comm *)comm;
    struct group *g = c->g;
    (void)s;
    lm_status st = meet(c, (struct call){ buf, buf, n, t });
    if (st != LM_OK)
        return st;
    size_t per = n / (size_t)g->world, extra = n % (size_t)g->world, r = (size_t)c->rank;
    size_t begin = r * per + LM_MIN(r, extra), end = begin + per + (r < extra);
    for (size_t i = begin; i < end; i++) {
        float sum = 0;
        for (int k = 0; k < g->world; k++)
            sum += get(g->call[k].src, i, t);
        for (int k = 0; k < g->world; k++)
            put(g->call[k].dst, i, t, sum);
    }
    return barrier(g);
}

lm_status cpu_all_gather(kn_stream *s, kn_comm *comm, void *dst, const void *src, size_t n,
                         enum kn_dtype t)
{
    struct cpu_comm *c = (struct cpu_comm *)comm;
    struct group *g = c->g;
    (void)s;
    lm_status st = meet(c, (struct call){ src, dst, n, t });
    if (st != LM_OK)
        return st;
    size_t bytes = n * kn_dtype_size(t);
    for (int k = 0; k < g->world; k++)
        if (bytes)
            memmove((char *)dst + (size_t)k * bytes, g->call[k].src, bytes);
    return barrier(g);
}
