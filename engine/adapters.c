/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapters.c - the registry: versions by id, references, the host-memory budget.
 *
 * Invariants (under the mutex)
 *  1. The table holds exactly the current versions, one for an id.
 *  2. A version is on an idle list exactly if it is current and has no references.
 *  3. `bytes` is the sum over all versions that are not condemned.
 *  4. A condemned version has no references and is in neither table nor idle list.
 *
 * The budget is kept by dropping unreferenced versions, by the idea of evict.c: what is cheapest to
 * lose, for each byte that it frees, goes first. The score of a version is
 *
 *     level + uses * time that reading it took / its size
 *
 * where `uses` is how often it was asked for, up to 16, and `level` is recency, the largest
 * score that has left so far. So of two that were used alike the larger goes, as reading has a
 * fixed part; of two of a size, the one less asked for, or idle for longer. Values are rounded
 * down to a power of two, so that idle versions stand in few lists, each in order of level, and
 * the least is found among their heads however many there are.
 *
 * What is referenced stays: if that alone fills the budget, loading answers LM_BUSY, and the caller
 * tries again when requests have ended. What was condemned counts as gone, although the engine
 * thread may need a step's time to free it.
 *
 * Stand-ins without files (adapters_dummy()) of one rank and the same modules share one image in
 * host memory, so that a thousand of them are made in no time; in the pool each has blocks of its
 * own, and the budget counts each as if it had its own bytes here too.
 *
 * Reading a folder happens outside the mutex; two threads that load the same content at once both
 * read it, and the second to finish takes the first one's version.
 */
#include "engine/adapters.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "engine/dummy.h"

#define FIRST_BUCKETS 256
#define IDLE_CLASSES 32
#define MAX_USES 16
#define VALUE_UNIT ((double)(1 << 30))  /* microseconds a GiB: at least 1 for whatever is read */

/* What stand-ins share; goes with the last of them. Under `stand_in_mu`. */
struct stand_in {
    struct stand_in *next;
    int rank, users;
    unsigned modules;
    struct adapter_image image;
};

struct adapters {
    struct adapters_config cfg;
    pthread_mutex_t stand_in_mu;        /* never inside `mu` */
    struct stand_in *stand_ins;
    pthread_mutex_t mu;
    struct engine_adapter **bucket;     /* [n_buckets], a power of two */
    size_t n_buckets;
    int n;                              /* current versions */
    size_t bytes;
    struct idle_list {
        struct engine_adapter *oldest, *newest;
    } idle[IDLE_CLASSES];               /* class c: a value of 2^c or more, below 2^(c + 1) */
    double level;
    struct engine_adapter *condemned;
    atomic_bool has_condemned;
    uint64_t serial;
};

lm_status adapters_new(const struct adapters_config *cfg, adapters **out, struct lm_err *err)
{
    adapters *a = lm_calloc(1, sizeof *a);
    struct engine_adapter **bucket = lm_calloc(FIRST_BUCKETS, sizeof *bucket);
    if (!a || !bucket) {
        free(a);
        free(bucket);
        return lm_err_set(err, LM_NOMEM, "no memory for the adapter registry");
    }
    a->cfg = *cfg;
    a->bucket = bucket;
    a->n_buckets = FIRST_BUCKETS;
    pthread_mutex_init(&a->mu, NULL);
    pthread_mutex_init(&a->stand_in_mu, NULL);
    *out = a;
    return LM_OK;
}

/* ---- image memory ---------------------------------------------------------------------- */

static void *pinned_alloc(void *ctx, size_t bytes)
{
    void *p = NULL;
    return kn_host_alloc(ctx, bytes, &p, NULL) == LM_OK ? p : NULL;
}

static void pinned_free(void *ctx, void *p)
{
    kn_host_free(ctx, p);
}

static struct adapter_alloc image_alloc(const adapters *a)
{
    return (struct adapter_alloc){ .ctx = a->cfg.dev, .alloc = pinned_alloc, .free = pinned_free };
}

static void stand_in_leave(adapters *a, struct stand_in *s)
{
    struct adapter_alloc alloc = image_alloc(a);
    pthread_mutex_lock(&a->stand_in_mu);
    bool last = --s->users == 0;
    for (struct stand_in **p = &a->stand_ins; last && *p; p = &(*p)->next)
        if (*p == s) {
            *p = s->next;
            break;
        }
    pthread_mutex_unlock(&a->stand_in_mu);
    if (last) {
        adapter_image_release(&s->image, &alloc);
        free(s);
    }
}

static lm_status stand_in_make(adapters *a, int rank, unsigned modules, struct stand_in **out,
                               struct lm_err *err)
{
    struct adapter_alloc alloc = image_alloc(a);
    struct stand_in *s = lm_calloc(1, sizeof *s);
    if (!s)
        return lm_err_set(err, LM_NOMEM, "no memory");
    s->rank = rank;
    s->modules = modules;
    lm_status st = dummy_image(a->cfg.model, rank, modules, a->cfg.lora_dtype, a->cfg.cell_bytes,
                               a->cfg.no_payload ? NULL : &alloc, &s->image, err);
    if (st != LM_OK)
        free(s);
    else
        *out = s;
    return st;
}

/* The image of this rank and these modules; whoever comes while it is being made waits. */
static lm_status stand_in_join(adapters *a, int rank, unsigned modules, struct stand_in **out,
                               struct lm_err *err)
{
    lm_status st = LM_OK;
    pthread_mutex_lock(&a->stand_in_mu);
    struct stand_in *s = a->stand_ins;
    while (s && (s->rank != rank || s->modules != modules))
        s = s->next;
    if (!s) {
        st = stand_in_make(a, rank, modules, &s, err);
        if (st == LM_OK) {
            s->next = a->stand_ins;
            a->stand_ins = s;
        }
    }
    if (st == LM_OK)
        s->users++;
    pthread_mutex_unlock(&a->stand_in_mu);
    *out = st == LM_OK ? s : NULL;
    return st;
}

static void version_free(struct engine_adapter *ad)
{
    if (!ad)
        return;
    struct adapter_alloc alloc = image_alloc(ad->home);
    if (ad->stand_in)
        stand_in_leave(ad->home, ad->stand_in);
    else if (ad->image.cells)
        adapter_image_release(&ad->image, &alloc);
    if (ad->res.ready)
        kn_event_free(ad->res.ready);
    free(ad->res.blocks);
    free(ad->id);
    free(ad);
}

static size_t version_bytes(const struct engine_adapter *ad)
{
    return (size_t)ad->image.n_cells * (size_t)ad->image.cell_bytes;
}

/* ---- table and lists, under the mutex -------------------------------------------------- */

static struct engine_adapter **table_slot(adapters *a, const char *id)
{
    uint64_t h = XXH3_64bits(id, strlen(id));
    struct engine_adapter **p = &a->bucket[h & (a->n_buckets - 1)];
    while (*p && strcmp((*p)->id, id) != 0)
        p = &(*p)->chain;
    return p;
}

/* A table that can't grow stays correct, only slower. */
static void table_grow(adapters *a)
{
    size_t old_n = a->n_buckets;
    struct engine_adapter **old = a->bucket, **bigger = lm_calloc(old_n * 2, sizeof *bigger);
    if (!bigger)
        return;
    a->bucket = bigger;
    a->n_buckets = old_n * 2;
    for (size_t i = 0; i < old_n; i++) {
        for (struct engine_adapter *ad = old[i], *next; ad; ad = next) {
            next = ad->chain;
            ad->chain = NULL;
            *table_slot(a, ad->id) = ad;
        }
    }
    free(old);
}

static int value_class(const struct engine_adapter *ad)
{
    double bytes = (double)LM_MAX(version_bytes(ad), 1);
    double value = ad->uses * (double)LM_MAX(ad->load_us, 1) / bytes * VALUE_UNIT;
    int c = 0;
    for (; value >= 2 && c < IDLE_CLASSES - 1; c++)
        value /= 2;
    return c;
}

static void idle_remove(adapters *a, struct engine_adapter *ad)
{
    if (ad->idle_class < 0)
        return;
    struct idle_list *l = &a->idle[ad->idle_class];
    *(ad->idle_prev ? &ad->idle_prev->idle_next : &l->oldest) = ad->idle_next;
    *(ad->idle_next ? &ad->idle_next->idle_prev : &l->newest) = ad->idle_prev;
    ad->idle_prev = ad->idle_next = NULL;
    ad->idle_class = -1;
}

static void idle_append(adapters *a, struct engine_adapter *ad)
{
    ad->idle_class = value_class(ad);
    ad->idle_level = a->level;
    struct idle_list *l = &a->idle[ad->idle_class];
    ad->idle_next = NULL;
    ad->idle_prev = l->newest;
    *(l->newest ? &l->newest->idle_next : &l->oldest) = ad;
    l->newest = ad;
}

static double idle_score(const struct engine_adapter *ad)
{
    return ad->idle_level + (double)(1u << ad->idle_class);
}

static struct engine_adapter *cheapest(const adapters *a)
{
    struct engine_adapter *best = NULL;
    for (int c = 0; c < IDLE_CLASSES; c++) {
        struct engine_adapter *ad = a->idle[c].oldest;
        if (ad && (!best || idle_score(ad) < idle_score(best)))
            best = ad;
    }
    return best;
}

static void condemn(adapters *a, struct engine_adapter *ad)
{
    a->bytes -= version_bytes(ad);
    ad->condemned_next = a->condemned;
    a->condemned = ad;
    atomic_store_explicit(&a->has_condemned, true, memory_order_release);
}

/* No longer the newest of its id. */
static void retire(adapters *a, struct engine_adapter *ad)
{
    struct engine_adapter **slot = table_slot(a, ad->id);
    *slot = ad->chain;
    ad->chain = NULL;
    ad->current = false;
    a->n--;
    idle_remove(a, ad);
    if (ad->refs == 0)
        condemn(a, ad);
}

static lm_status make_room(adapters *a, size_t bytes, const char *id, struct lm_err *err)
{
    size_t budget = a->cfg.host_budget;
    if (bytes > budget)
        return lm_err_set(err, LM_TOO_LARGE,
                          "adapter '%s' takes %zu bytes of host memory; the budget for all "
                          "adapters is %zu", id, bytes, budget);
    for (struct engine_adapter *ad; a->bytes + bytes > budget && (ad = cheapest(a));) {
        a->level = LM_MAX(a->level, idle_score(ad));
        retire(a, ad);
    }
    if (a->bytes + bytes > budget)
        return lm_err_set(err, LM_BUSY,
                          "adapter '%s' takes %zu bytes of host memory; %zu of the budget of %zu "
                          "are held by adapters in use", id, bytes, a->bytes, budget);
    return LM_OK;
}

static void insert(adapters *a, struct engine_adapter *ad)
{
    struct engine_adapter *old = *table_slot(a, ad->id);
    if (old)
        retire(a, old);
    if ((size_t)a->n >= a->n_buckets)
        table_grow(a);
    *table_slot(a, ad->id) = ad;
    ad->current = true;
    evict_version_init(&ad->version, ++a->serial);
    a->n++;
    a->bytes += version_bytes(ad);
}

static struct engine_adapter *ref_locked(struct engine_adapter *ad)
{
    if (ad->refs++ == 0)
        idle_remove(ad->home, ad);
    return ad;
}

/* Someone asked for it by id. */
static struct engine_adapter *asked_for(struct engine_adapter *ad)
{
    ad->uses += ad->uses < MAX_USES;
    return ref_locked(ad);
}

/* ---- loading --------------------------------------------------------------------------- */

static engine_adapter *find_digest(adapters *a, const char *id, const char *digest)
{
    pthread_mutex_lock(&a->mu);
    struct engine_adapter *ad = *table_slot(a, id);
    if (ad && !strcmp(ad->image.digest, digest))
        asked_for(ad);
    else
        ad = NULL;
    pthread_mutex_unlock(&a->mu);
    return ad;
}

static lm_status check_pool_fit(const adapters *a, struct engine_adapter *ad, struct lm_err *err)
{
    ad->n_blocks = LM_DIV_UP(ad->image.n_cells, a->cfg.n_layers);
    if (ad->n_blocks > a->cfg.pool_blocks)
        return lm_err_set(err, LM_TOO_LARGE,
                          "adapter '%s' needs %d blocks of the pool, which has %d; enlarge the "
                          "pool", ad->id, ad->n_blocks, a->cfg.pool_blocks);
    ad->res.blocks = lm_reallocarray(NULL, (size_t)ad->n_blocks, sizeof *ad->res.blocks);
    return ad->res.blocks ? LM_OK : lm_err_set(err, LM_NOMEM, "adapter '%s': no memory", ad->id);
}

static lm_status version_new(adapters *a, const char *id, struct engine_adapter **out,
                             struct lm_err *err)
{
    struct engine_adapter *ad = lm_calloc(1, sizeof *ad);
    if (!ad || !(ad->id = lm_strdup(id))) {
        free(ad);
        return lm_err_set(err, LM_NOMEM, "adapter '%s': no memory", id);
    }
    ad->home = a;
    ad->idle_class = -1;
    *out = ad;
    return LM_OK;
}

static lm_status version_read(adapters *a, const char *id, const char *dir,
                              struct engine_adapter **out, struct lm_err *err)
{
    struct engine_adapter *ad = NULL;
    lm_status st = version_new(a, id, &ad, err);
    if (st != LM_OK)
        return st;
    if (a->cfg.model) {
        struct adapter_alloc alloc = image_alloc(a);
        st = adapter_parse(dir, a->cfg.model, a->cfg.lora_dtype, a->cfg.cell_bytes,
                           a->cfg.max_file_bytes, &alloc, &ad->image, err);
        if (st == LM_OK)
            st = check_pool_fit(a, ad, err);
    } else {
        st = adapter_digest(dir, ad->image.digest, err);
    }
    if (st != LM_OK)
        version_free(ad);
    else
        *out = ad;
    return st;
}

/* Makes a version public, or takes the one of the same content that came first. */
static lm_status publish(adapters *a, struct engine_adapter *ad, engine_adapter **out,
                         struct lm_err *err)
{
    if ((*out = find_digest(a, ad->id, ad->image.digest))) {
        version_free(ad);
        return LM_OK;
    }
    pthread_mutex_lock(&a->mu);
    lm_status st = make_room(a, version_bytes(ad), ad->id, err);
    if (st == LM_OK) {
        insert(a, ad);
        *out = asked_for(ad);
    }
    pthread_mutex_unlock(&a->mu);
    if (st != LM_OK)
        version_free(ad);
    if (atomic_load_explicit(&a->has_condemned, memory_order_acquire) && a->cfg.rouse)
        a->cfg.rouse(a->cfg.rouse_ctx);
    return st;
}

lm_status adapters_load(adapters *a, const char *id, const char *dir, engine_adapter **out,
                        struct lm_err *err)
{
    char digest[ENGINE_DIGEST_CHARS];
    lm_status st = adapter_digest(dir, digest, err);
    if (st != LM_OK)
        return st;
    if ((*out = find_digest(a, id, digest)))
        return LM_OK;
    struct engine_adapter *ad = NULL;
    int64_t t0 = lm_now_us();
    st = version_read(a, id, dir, &ad, err);
    if (st != LM_OK)
        return st;
    ad->load_us = lm_now_us() - t0;
    return publish(a, ad, out, err);
}

lm_status adapters_dummy(adapters *a, const char *id, int rank, unsigned modules,
                         engine_adapter **out, struct lm_err *err)
{
    struct engine_adapter *ad = NULL;
    char digest[ENGINE_DIGEST_CHARS];
    dummy_digest(id, rank, modules, digest);
    if ((*out = find_digest(a, id, digest)))
        return LM_OK;
    lm_status st = version_new(a, id, &ad, err);
    if (st != LM_OK)
        return st;
    st = stand_in_join(a, rank, modules, &ad->stand_in, err);
    if (st == LM_OK)
        ad->image = ad->stand_in->image;
    memcpy(ad->image.digest, digest, sizeof digest);
    if (st == LM_OK)
        st = check_pool_fit(a, ad, err);
    if (st != LM_OK) {
        version_free(ad);
        return lm_err_prefix(err, "stand-in '%s'", id);
    }
    return publish(a, ad, out, err);
}

engine_adapter *adapters_find(adapters *a, const char *id)
{
    pthread_mutex_lock(&a->mu);
    struct engine_adapter *ad = *table_slot(a, id);
    if (ad)
        asked_for(ad);
    pthread_mutex_unlock(&a->mu);
    return ad;
}

/* ---- references ------------------------------------------------------------------------ */

engine_adapter *engine_adapter_ref(engine_adapter *ad)
{
    pthread_mutex_lock(&ad->home->mu);
    ref_locked(ad);
    pthread_mutex_unlock(&ad->home->mu);
    return ad;
}

void engine_adapter_unref(engine_adapter *ad)
{
    if (!ad)
        return;
    adapters *a = ad->home;
    bool rouse = false;
    pthread_mutex_lock(&a->mu);
    if (--ad->refs == 0) {
        if (ad->current) {
            idle_append(a, ad);
        } else {
            condemn(a, ad);
            rouse = true;
        }
    }
    pthread_mutex_unlock(&a->mu);
    if (rouse && a->cfg.rouse)
        a->cfg.rouse(a->cfg.rouse_ctx);
}

const char *engine_adapter_digest(const engine_adapter *ad)
{
    return ad->image.digest;
}

size_t engine_adapter_bytes(const engine_adapter *ad)
{
    return version_bytes(ad);
}

/* ---- the engine thread ----------------------------------------------------------------- */

void adapters_reap(adapters *a, void (*drop)(void *ctx, engine_adapter *ad), void *ctx)
{
    if (!atomic_load_explicit(&a->has_condemned, memory_order_acquire))
        return;
    pthread_mutex_lock(&a->mu);
    struct engine_adapter *list = a->condemned;
    a->condemned = NULL;
    atomic_store_explicit(&a->has_condemned, false, memory_order_release);
    pthread_mutex_unlock(&a->mu);
    for (struct engine_adapter *next; list; list = next) {
        next = list->condemned_next;
        if (drop)
            drop(ctx, list);
        version_free(list);
    }
}

void adapters_stats(adapters *a, int *n, size_t *bytes)
{
    pthread_mutex_lock(&a->mu);
    *n = a->n;
    *bytes = a->bytes;
    pthread_mutex_unlock(&a->mu);
}

void adapters_free(adapters *a)
{
    if (!a)
        return;
    adapters_reap(a, NULL, NULL);
    for (size_t i = 0; i < a->n_buckets; i++) {
        for (struct engine_adapter *ad = a->bucket[i], *next; ad; ad = next) {
            next = ad->chain;
            version_free(ad);
        }
    }
    pthread_mutex_destroy(&a->mu);
    pthread_mutex_destroy(&a->stand_in_mu);
    free(a->bucket);
    free(a);
}
