/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store.c - from an adapter's id to an engine adapter; see store.h for the promises.
 *
 * One lookup per id that is wanted, however many wait for it:
 *
 *   store_get --> INBOX --admit--> LOADING  (a local folder, or in the disk cache)
 *                   ^      |           |  \
 *                   |      v           |   `--> done
 *                   |    READY <---+   |
 *                   |      | slot  |   |
 *                   |      v       |   |
 *                   |   FETCHING --'   |     config, then weights; retries go through BACKOFF
 *                   |      |           |
 *                   |      `---------->+     files whole: form check, install, load
 *                   `------------------'     a damaged cache entry: removed, fetched once more
 *
 * A lookup that would fetch what another process on this host is fetching waits in BACKOFF, without
 * a claim, and is admitted anew: as a rule it then finds the cache filled.
 *
 * The store thread has INBOX to READY, BACKOFF and FETCHING; the loader thread has LOADING. A
 * lookup belongs to one of them at a time and changes hands through a queue under the lock, so only
 * the queues, the tables and the waiters need it. Order of locks: there is just one, and no
 * callback, system call or engine call happens under it.
 *
 * Who waits may let go (store_let_go). A lookup that nobody waits for goes on until its next
 * attempt would begin, or its slot is wanted for another, and is then forgotten; one that is loaded
 * meanwhile stays in the engine's cache.
 *
 * A lookup that ended is out of the table before its waiters hear of it: whoever asks again starts
 * afresh, and finds the engine's copy, or the negative entry.
 */
#include "worker/store/store_int.h"

#include <curl/curl.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <search.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/queue.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "worker/log.h"
#include "worker/store/cache.h"
#include "worker/store/fetch.h"
#include "worker/store/store_form.h"
#include "worker/url.h"
#include "worker/url_template.h"

#define BACKOFF_MAX_MS 10000
#define RETRY_AFTER_MAX_MS 30000
#define NEGATIVES_MAX 10000
#define IDLE_WAIT_MS 1000
#define CLAIM_LOOK_MS 50
#define CLAIM_WAIT_MS 120000    /* another process that takes longer is helped by a second try */

struct waiter {
    store_done *done;
    void *user;
    STAILQ_ENTRY(waiter) link;
};
STAILQ_HEAD(waiters, waiter);

struct lookup {
    char *id;                   /* first: lookups and negatives are compared by it */
    struct waiters waiters;
    TAILQ_ENTRY(lookup) all;
    STAILQ_ENTRY(lookup) queue; /* INBOX, READY, BACKOFF or LOADING */
    LIST_ENTRY(lookup) slot;    /* FETCHING, while file.attempt is set */
    bool fresh;                 /* its files came just now: a fault is not the disk's */
    bool refetch;               /* the cache's copy was bad: fetch, once */
    char *local;                /* a folder outside the cache, or NULL */
    /* fetching */
    char *tmp, *url;
    int which;                  /* index into files[] */
    struct fetch file;
    int attempts;
    bool claimed;               /* other processes are told that we fetch it */
    int64_t due_us, began_us;   /* began: to fetch, or to wait for another process */
};
STAILQ_HEAD(lookups, lookup);

struct negative {
    char *id;
    struct lm_err err;
    int64_t until_us;
    TAILQ_ENTRY(negative) link;
};

struct store {
    struct store_config cfg;    /* its strings are ours */
    struct store_hooks hooks;
    char *local_template;       /* of a file: URL */
    cache *cache;
    fetcher *fetcher;
    uint64_t random;
    pthread_t store_thread, loader_thread;
    bool threads;

    pthread_mutex_t lock;
    pthread_cond_t work;        /* for the loader */
    bool stopping;
    void *lookup_table, *negative_table;           /* tsearch trees by id */
    TAILQ_HEAD(, lookup) all;
    TAILQ_HEAD(, negative) negatives;           /* oldest first: all live equally long */
    int n_negatives;
    struct lookups inbox, loading;
    struct store_stats stats;
    struct log_seldom away, refused, no_room;      /* adapters are many, and come again */

    struct lookups ready, backoff;                 /* the store thread's own */
    LIST_HEAD(, lookup) fetching;
    int n_fetching;
};

static const char *const files[] = { CACHE_CONFIG, CACHE_WEIGHTS };

/* ---- tables ----------------------------------------------------------------------------- */

static int by_id(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static void *table_find(void *const *table, const char *id)
{
    void *node = tfind(&id, table, by_id);
    return node ? *(void **)node : NULL;
}

static void negative_drop(store *s, struct negative *n)
{
    tdelete(n, &s->negative_table, by_id);
    TAILQ_REMOVE(&s->negatives, n, link);
    s->n_negatives--;
    free(n->id);
    free(n);
}

/* Under the lock. The entry's error, or NULL. */
static const struct lm_err *negative_find(store *s, const char *id)
{
    int64_t now = lm_now_us();
    struct negative *n;
    while ((n = TAILQ_FIRST(&s->negatives)) && n->until_us <= now)
        negative_drop(s, n);
    n = table_find(&s->negative_table, id);
    return n ? &n->err : NULL;
}

/* Under the lock. Without memory it is not remembered, which only costs time. */
static void negative_add(store *s, const char *id, const struct lm_err *err)
{
    struct negative *n = lm_calloc(1, sizeof *n);
    if (s->cfg.negative_ttl_ms == 0 || !n || !(n->id = lm_strdup(id)) ||
        table_find(&s->negative_table, id) || !tsearch(n, &s->negative_table, by_id)) {
        free(n ? n->id : NULL);
        free(n);
        return;
    }
    n->err = *err;
    n->until_us = lm_now_us() + (int64_t)s->cfg.negative_ttl_ms * 1000;
    TAILQ_INSERT_TAIL(&s->negatives, n, link);
    if (++s->n_negatives > NEGATIVES_MAX)
        negative_drop(s, TAILQ_FIRST(&s->negatives));
}

/* ---- lookups ---------------------------------------------------------------------------- */

static void lookup_close_file(struct lookup *l)
{
    if (l->file.fd >= 0)
        close(l->file.fd);
    l->file.fd = -1;
    free(l->url);
    l->url = NULL;
}

static void lookup_drop_files(struct lookup *l)
{
    lookup_close_file(l);
    cache_discard(l->tmp);
    free(l->tmp);
    l->tmp = NULL;
    l->which = 0;
}

/* Under the lock: whoever asks from now on starts another lookup. */
static void lookup_unlist(store *s, struct lookup *l)
{
    tdelete(l, &s->lookup_table, by_id);
    TAILQ_REMOVE(&s->all, l, all);
    s->stats.in_flight--;
}

static void lookup_free(store *s, struct lookup *l)
{
    lookup_drop_files(l);
    if (l->claimed)
        cache_unclaim(s->cache, l->id);
    free(l->local);
    free(l->id);
    free(l);
}

/* Ends a lookup: `a` (a reference) on LM_OK, `err` otherwise. Any thread that has it. */
static void finish(store *s, struct lookup *l, lm_status status, engine_adapter *a,
                   const struct lm_err *err)
{
    struct waiter *w;
    bool final = lm_status_disposition(status) == LM_DO_REFUSE;
    pthread_mutex_lock(&s->lock);
    lookup_unlist(s, l);
    s->stats.failures += status != LM_OK && status != LM_CANCELLED;
    if (final)
        negative_add(s, l->id, err);
    pthread_mutex_unlock(&s->lock);
    if (status == LM_BUSY)
        log_seldom(&s->no_room, "store", "%s", err->msg);
    else if (final)
        log_seldom(&s->refused, "store", "%s", err->msg);       /* anybody can think of ids */
    else if (status != LM_OK && status != LM_CANCELLED)
        log_seldom(&s->away, "store", "%s", err->msg);
    bool nobody = STAILQ_EMPTY(&l->waiters);            /* any more */
    while ((w = STAILQ_FIRST(&l->waiters))) {
        STAILQ_REMOVE_HEAD(&l->waiters, link);
        bool last = STAILQ_EMPTY(&l->waiters);
        w->done(w->user, status, !a ? NULL : last ? a : s->hooks.ref(a), status ? err : NULL);
        free(w);
    }
    if (a && nobody)
        s->hooks.unref(a);
    lookup_free(s, l);
}

static void free_slot(store *s, struct lookup *l)
{
    LIST_REMOVE(l, slot);
    s->n_fetching--;
}

/* Everybody who waited for it has let it go: it ends, without a word. The store thread's. */
static bool end_unwanted(store *s, struct lookup *l)
{
    pthread_mutex_lock(&s->lock);
    bool unwanted = STAILQ_EMPTY(&l->waiters);
    if (unwanted)
        lookup_unlist(s, l);
    pthread_mutex_unlock(&s->lock);
    if (!unwanted)
        return false;
    lm_log(LM_DEBUG, "store", "adapter '%s': nobody waits for it any more", l->id);
    if (l->file.attempt) {
        fetch_abort(&l->file);
        free_slot(s, l);
    }
    lookup_free(s, l);
    return true;
}

static void fail(store *s, struct lookup *l, struct lm_err *err)
{
    lm_err_prefix(err, "adapter '%s'", l->id);
    finish(s, l, err->code, NULL, err);
}

static void to_loader(store *s, struct lookup *l)
{
    pthread_mutex_lock(&s->lock);
    STAILQ_INSERT_TAIL(&s->loading, l, queue);
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
}

/* ---- asking ----------------------------------------------------------------------------- */

static struct lookup *lookup_new(store *s, const char *id)
{
    struct lookup *l = lm_calloc(1, sizeof *l);
    if (!l || !(l->id = lm_strdup(id)) || !tsearch(l, &s->lookup_table, by_id)) {
        free(l ? l->id : NULL);
        free(l);
        return NULL;
    }
    l->file.fd = -1;
    STAILQ_INIT(&l->waiters);
    TAILQ_INSERT_TAIL(&s->all, l, all);
    STAILQ_INSERT_TAIL(&s->inbox, l, queue);
    s->stats.in_flight++;
    return l;
}

/* Under the lock: waits with the id's lookup, starts it if need be, or says at once why not. */
static lm_status join_lookup(store *s, const char *id, store_done *done, void *user,
                          struct lm_err *err)
{
    const struct lm_err *known = negative_find(s, id);
    if (known) {
        s->stats.negative_hits++;
        *err = *known;
        return err->code;
    }
    if (s->stopping)
        return lm_err_set(err, LM_CANCELLED, "shutting down");
    struct waiter *w = lm_calloc(1, sizeof *w);
    struct lookup *l = table_find(&s->lookup_table, id);
    if (w && !l)
        l = lookup_new(s, id);
    if (!w || !l) {
        free(w);
        return lm_err_set(err, LM_NOMEM, "adapter '%s': no memory", id);
    }
    w->done = done;
    w->user = user;
    STAILQ_INSERT_TAIL(&l->waiters, w, link);
    return LM_OK;
}

void store_get(store *s, const char *id, store_done *done, void *user)
{
    struct lm_err err;
    lm_status st = engine_adapter_id_check(id, strlen(id), &err);
    engine_adapter *a = st == LM_OK ? s->hooks.find(s->cfg.engine, id) : NULL;
    pthread_mutex_lock(&s->lock);
    if (a)
        s->stats.memory_hits++;
    else if (st == LM_OK)
        st = join_lookup(s, id, done, user, &err);
    pthread_mutex_unlock(&s->lock);
    if (a)
        done(user, LM_OK, a, NULL);
    else if (st != LM_OK)
        done(user, st, NULL, &err);
    else
        fetcher_wake(s->fetcher);
}

bool store_let_go(store *s, const char *id, const void *user)
{
    struct waiter *w = NULL;
    pthread_mutex_lock(&s->lock);
    struct lookup *l = table_find(&s->lookup_table, id);
    if (l)
        for (w = STAILQ_FIRST(&l->waiters); w && w->user != user;)
            w = STAILQ_NEXT(w, link);
    if (w)
        STAILQ_REMOVE(&l->waiters, w, waiter, link);
    bool unwanted = w && STAILQ_EMPTY(&l->waiters);
    pthread_mutex_unlock(&s->lock);
    bool found = w != NULL;
    free(w);
    if (unwanted)
        fetcher_wake(s->fetcher);       /* its slot may be wanted */
    return found;
}

void store_stats(store *s, struct store_stats *out)
{
    pthread_mutex_lock(&s->lock);
    *out = s->stats;
    pthread_mutex_unlock(&s->lock);
}

/* ---- places ----------------------------------------------------------------------------- */

static bool is_folder(const char *path)
{
    struct stat sb;
    return path && stat(path, &sb) == 0 && S_ISDIR(sb.st_mode);
}

/* The adapter's folder on this machine, outside the cache, or NULL; malloc'ed. */
static char *local_folder(const store *s, const char *id)
{
    char *path = NULL;
    if (s->cfg.local_dir && asprintf(&path, "%s/%s", s->cfg.local_dir, id) < 0)
        path = NULL;
    if (!is_folder(path) && s->local_template) {
        free(path);
        path = url_template_fill(s->local_template, URL_HOLE_ADAPTER, id, NULL);
    }
    if (is_folder(path))
        return path;
    free(path);
    return NULL;
}

/* ---- store thread: fetching ------------------------------------------------------------- */

static lm_status open_path(struct lookup *l, int flags, struct lm_err *err)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", l->tmp, files[l->which]);
    l->file.fd = open(path, O_RDWR | O_CLOEXEC | flags, 0666);
    return l->file.fd >= 0 ? LM_OK : lm_err_set(err, LM_IO, "%s: %s", path, strerror(errno));
}

static lm_status open_file(store *s, struct lookup *l, struct lm_err *err)
{
    if (!l->tmp && cache_tmp(s->cache, &l->tmp, err) != LM_OK)
        return err->code;
    uint64_t before = l->which > 0 ? l->file.have : 0;
    l->url = url_template_fill(s->cfg.url, URL_HOLE_ADAPTER, l->id, files[l->which]);
    l->file = (struct fetch){ .url = l->url, .user = l, .total = FETCH_UNKNOWN, .fd = -1,
                              .max_bytes = s->cfg.max_adapter_bytes - before };
    if (l->which == 0)
        l->file.max_bytes = LM_MIN(STORE_CONFIG_MAX, s->cfg.max_adapter_bytes);
    if (!l->url)
        return lm_err_set(err, LM_NOMEM, "no memory for a URL");
    return open_path(l, O_CREAT | O_EXCL, err);
}

/* One more attempt at the lookup's present file. */
static void start_attempt(store *s, struct lookup *l)
{
    struct lm_err err;
    if (end_unwanted(s, l))
        return;
    lm_status st = l->url ? open_path(l, 0, &err) : open_file(s, l, &err);
    if (st == LM_OK)
        st = fetch_start(s->fetcher, &l->file, &err);
    if (st != LM_OK) {
        fail(s, l, &err);
        return;
    }
    l->attempts++;
    LIST_INSERT_HEAD(&s->fetching, l, slot);
    s->n_fetching++;
}

/* Full jitter: any delay up to a bound that doubles. */
static int64_t backoff_ms(store *s, const struct lookup *l)
{
    int64_t bound = s->hooks.retry_base_ms;
    for (int i = 1; i < l->attempts && bound < BACKOFF_MAX_MS; i++)
        bound *= 2;
    bound = LM_MIN(bound, BACKOFF_MAX_MS);
    int64_t delay = (int64_t)(lm_random(&s->random) % (uint64_t)(bound + 1));
    return LM_MAX(delay, LM_MIN(l->file.retry_after_ms, RETRY_AFTER_MAX_MS));
}

static void retry_later(store *s, struct lookup *l)
{
    int64_t delay = backoff_ms(s, l);
    log_seldom(&s->away, "store", "adapter '%s': %s; attempt %d of %d failed, next in %lld ms",
               l->id, l->file.err.msg, l->attempts, s->cfg.max_attempts, (long long)delay);
    l->due_us = lm_now_us() + delay * 1000;
    close(l->file.fd);          /* while the server is away there may be thousands */
    l->file.fd = -1;
    STAILQ_INSERT_TAIL(&s->backoff, l, queue);
    pthread_mutex_lock(&s->lock);
    s->stats.retries++;
    pthread_mutex_unlock(&s->lock);
}

static void file_failed(store *s, struct lookup *l)
{
    struct lm_err *err = &l->file.err;
    if (!l->file.retry) {
        fail(s, l, err);
    } else if (l->attempts < s->cfg.max_attempts) {
        retry_later(s, l);
    } else {
        struct lm_err last = *err;
        lm_err_set(err, LM_NET, "%s (gave up after %d attempts)", last.msg, l->attempts);
        fail(s, l, err);
    }
}

static void on_ended(void *ctx, struct fetch *file)
{
    store *s = ctx;
    struct lookup *l = file->user;
    free_slot(s, l);
    if (file->status != LM_OK) {
        file_failed(s, l);
        return;
    }
    pthread_mutex_lock(&s->lock);
    s->stats.fetched_bytes += file->received;
    pthread_mutex_unlock(&s->lock);
    lookup_close_file(l);
    l->attempts = 0;
    if (++l->which < (int)LM_COUNT(files)) {
        start_attempt(s, l);    /* the lookup keeps its slot */
        return;
    }
    pthread_mutex_lock(&s->lock);
    s->stats.fetched++;
    s->stats.fetch_us += (uint64_t)(lm_now_us() - l->began_us);
    pthread_mutex_unlock(&s->lock);
    l->fresh = true;
    to_loader(s, l);
}

/* ---- store thread: the rest ------------------------------------------------------------- */

static void to_fetch(store *s, struct lookup *l)
{
    struct lm_err err;
    if (!s->cfg.url) {
        lm_err_set(&err, LM_NOT_FOUND, s->cfg.local_dir || s->local_template
                       ? "not in the folder of adapters"
                       : "not to be had: adapters.url is not set");
        fail(s, l, &err);
        return;
    }
    int64_t now = lm_now_us();
    if (l->began_us == 0)
        l->began_us = now;
    if (!l->claimed && !cache_claim(s->cache, l->id) &&
        now - l->began_us < CLAIM_WAIT_MS * INT64_C(1000)) {
        l->due_us = now + CLAIM_LOOK_MS * 1000;
        STAILQ_INSERT_TAIL(&s->backoff, l, queue);
        return;
    }
    l->claimed = true;
    l->began_us = now;
    l->attempts = 0;
    STAILQ_INSERT_TAIL(&s->ready, l, queue);
}

static void admit(store *s, struct lookup *l)
{
    engine_adapter *a = l->refetch ? NULL : s->hooks.find(s->cfg.engine, l->id);
    if (a)
        finish(s, l, LM_OK, a, NULL);   /* another lookup ended between the question and now */
    else if (!l->refetch && (l->local = local_folder(s, l->id)))
        to_loader(s, l);
    else if (!l->refetch && s->cache && cache_has(s->cache, l->id))
        to_loader(s, l);
    else
        to_fetch(s, l);
}

/* Moves on what is due; returns the milliseconds until the next one. */
static int serve_backoff(store *s)
{
    struct lookups later = STAILQ_HEAD_INITIALIZER(later), look = STAILQ_HEAD_INITIALIZER(look);
    struct lookup *l;
    int64_t now = lm_now_us(), next = now + IDLE_WAIT_MS * 1000;
    while ((l = STAILQ_FIRST(&s->backoff))) {
        STAILQ_REMOVE_HEAD(&s->backoff, queue);
        if (l->due_us <= now && l->claimed) {
            STAILQ_INSERT_TAIL(&s->ready, l, queue);
        } else if (l->due_us <= now) {
            STAILQ_INSERT_TAIL(&look, l, queue);
        } else {
            STAILQ_INSERT_TAIL(&later, l, queue);
            next = LM_MIN(next, l->due_us);
        }
    }
    STAILQ_CONCAT(&s->backoff, &later);
    while ((l = STAILQ_FIRST(&look))) {
        STAILQ_REMOVE_HEAD(&look, queue);
        admit(s, l);
        next = LM_MIN(next, now + CLAIM_LOOK_MS * 1000);
    }
    return (int)((next - now + 999) / 1000);
}

/* What nobody waits for any more, from a server that may be silent, gives up its slot. */
static bool has_slot(store *s)
{
    struct lookup *l;
    if (s->n_fetching < s->cfg.concurrency)
        return true;
    LIST_FOREACH(l, &s->fetching, slot)
        if (end_unwanted(s, l))
            return true;
    return false;
}

static void *store_main(void *arg)
{
    store *s = arg;
    for (;;) {
        struct lookups inbox = STAILQ_HEAD_INITIALIZER(inbox);
        struct lookup *l;
        pthread_mutex_lock(&s->lock);
        bool stopping = s->stopping;
        STAILQ_CONCAT(&inbox, &s->inbox);
        pthread_mutex_unlock(&s->lock);
        if (stopping)
            return NULL;        /* store_free() ends the lookups, wherever they are */
        while ((l = STAILQ_FIRST(&inbox))) {
            STAILQ_REMOVE_HEAD(&inbox, queue);
            admit(s, l);
        }
        int wait_ms = serve_backoff(s);
        while ((l = STAILQ_FIRST(&s->ready)) && has_slot(s)) {
            STAILQ_REMOVE_HEAD(&s->ready, queue);
            start_attempt(s, l);
        }
        fetcher_run(s->fetcher, wait_ms, on_ended, s);
    }
}

/* ---- loader thread ---------------------------------------------------------------------- */

/* Brings freshly fetched files into the cache. Afterwards the entry under this id is whole, be it
 * ours or that of a process that was faster, which is then as suspect as any old entry. */
static lm_status install(store *s, struct lookup *l, struct lm_err *err)
{
    bool won;
    lm_status st = store_form_check(l->tmp, err);
    if (st != LM_OK)
        return st;
    st = cache_install(s->cache, l->id, l->tmp, &won, err);
    free(l->tmp);
    l->tmp = NULL;
    l->which = 0;
    l->fresh = won;
    return st;
}

static lm_status load_cached(store *s, struct lookup *l, engine_adapter **a, struct lm_err *err)
{
    lm_status st = l->fresh ? LM_OK : cache_verify(s->cache, l->id, err);
    char *path = cache_path(s->cache, l->id);
    if (st == LM_OK && !path)
        st = lm_err_set(err, LM_NOMEM, "no memory");
    if (st == LM_OK)
        st = s->hooks.load(s->cfg.engine, l->id, path, a, err);
    free(path);
    return st;
}

/* The cache's copy is no good: out with it, and once more from the store. */
static void refetch(store *s, struct lookup *l, const struct lm_err *err)
{
    lm_log(LM_WARN, "store", "adapter '%s': removing it from the cache: %s", l->id, err->msg);
    cache_remove(s->cache, l->id);
    l->refetch = true;
    pthread_mutex_lock(&s->lock);
    STAILQ_INSERT_TAIL(&s->inbox, l, queue);
    pthread_mutex_unlock(&s->lock);
    fetcher_wake(s->fetcher);
}

static void load(store *s, struct lookup *l)
{
    struct lm_err err = { 0 };
    engine_adapter *a = NULL;
    lm_status st = LM_OK;
    bool from_disk = !l->local && !l->fresh;
    if (l->local) {
        st = s->hooks.load(s->cfg.engine, l->id, l->local, &a, &err);
    } else {
        if (l->fresh)
            st = install(s, l, &err);
        if (st == LM_OK)
            st = load_cached(s, l, &a, &err);
    }
    bool bad = lm_status_disposition(st) == LM_DO_REFUSE;
    bool installed = !l->local && !l->tmp;
    if (bad && installed && !l->fresh && !l->refetch) {
        refetch(s, l, &err);
        return;
    }
    if (bad && installed)
        cache_remove(s->cache, l->id);  /* so that a repaired adapter is seen, later */
    if (st == LM_OK && from_disk) {
        pthread_mutex_lock(&s->lock);
        s->stats.disk_hits++;
        pthread_mutex_unlock(&s->lock);
    }
    if (st == LM_OK)
        finish(s, l, LM_OK, a, NULL);
    else
        fail(s, l, &err);
}

static void *loader_main(void *arg)
{
    store *s = arg;
    for (;;) {
        pthread_mutex_lock(&s->lock);
        while (!s->stopping && STAILQ_EMPTY(&s->loading))
            pthread_cond_wait(&s->work, &s->lock);
        bool stopping = s->stopping;
        struct lookup *l = STAILQ_FIRST(&s->loading);
        if (!stopping)
            STAILQ_REMOVE_HEAD(&s->loading, queue);
        pthread_mutex_unlock(&s->lock);
        if (stopping)
            return NULL;
        load(s, l);
    }
}

/* ---- life ------------------------------------------------------------------------------- */

/* file:///folder/{adapter}: the path, with its percent-encoding undone. */
static lm_status take_file_url(store *s, const char *url, const char *shown, struct lm_err *err)
{
    const char *path = url + strlen("file://");
    if (url_has_scheme(path, "localhost/"))
        path += strlen("localhost");
    if (*path != '/')
        return lm_err_set(err, LM_INVALID, "adapters.url=%s: a file URL names this machine, as "
                          "file:///folder/" URL_HOLE_ADAPTER, shown);
    char *plain = curl_easy_unescape(NULL, path, 0, NULL);
    s->local_template = plain ? lm_strdup(plain) : NULL;
    curl_free(plain);
    return s->local_template ? LM_OK : lm_err_set(err, LM_NOMEM, "no memory");
}

static lm_status check_url(store *s, const char *url, struct lm_err *err)
{
    char shown[URL_SHOWN];
    if (!url || !*url)
        return LM_OK;
    lm_status st = url_template_check("adapters.url", url, URL_HOLE_ADAPTER, true, err);
    if (st)
        return st;
    url_show(url, shown, sizeof shown);
    if (url_has_scheme(url, "file://"))
        return take_file_url(s, url, shown, err);
    s->cfg.url = lm_strdup(url);
    return s->cfg.url ? LM_OK : lm_err_set(err, LM_NOMEM, "no memory");
}

static int or_default(int value, int fallback)
{
    return value > 0 ? value : fallback;
}

static lm_status take_config(store *s, const struct store_config *cfg, struct lm_err *err)
{
    s->cfg = (struct store_config){
        .engine = cfg->engine,
        .max_adapter_bytes = cfg->max_adapter_bytes ? cfg->max_adapter_bytes : (size_t)4 << 30,
        .concurrency = or_default(cfg->concurrency, 8),
        .max_attempts = or_default(cfg->max_attempts, 5),
        .connect_timeout_ms = or_default(cfg->connect_timeout_ms, 5000),
        .stall_timeout_ms = or_default(cfg->stall_timeout_ms, 30000),
        .negative_ttl_ms = LM_MAX(cfg->negative_ttl_ms, 0),
    };
    if (cfg->local_dir && *cfg->local_dir && !(s->cfg.local_dir = lm_strdup(cfg->local_dir)))
        return lm_err_set(err, LM_NOMEM, "no memory");
    return check_url(s, cfg->url, err);
}

static const char *given(const char *s)
{
    return s && *s ? s : NULL;
}

static lm_status open_parts(store *s, const struct store_config *cfg, struct lm_err *err)
{
    struct fetcher_config fc = { .ca_file = given(cfg->ca_file),
                                 .auth_header = given(cfg->auth_header),
                                 .connect_timeout_ms = s->cfg.connect_timeout_ms,
                                 .stall_timeout_ms = s->cfg.stall_timeout_ms };
    lm_status st = fetcher_new(&fc, &s->fetcher, err);
    if (st == LM_OK && s->cfg.url)
        st = cache_open(cfg->cache_dir, s->cfg.url, &s->cache, err);
    return st;
}

static lm_status start_threads(store *s, struct lm_err *err)
{
    if (pthread_create(&s->store_thread, NULL, store_main, s) != 0)
        return lm_err_set(err, LM_NOMEM, "can't start the store thread");
    if (pthread_create(&s->loader_thread, NULL, loader_main, s) != 0) {
        pthread_mutex_lock(&s->lock);
        s->stopping = true;
        pthread_mutex_unlock(&s->lock);
        fetcher_wake(s->fetcher);
        pthread_join(s->store_thread, NULL);
        return lm_err_set(err, LM_NOMEM, "can't start the loader thread");
    }
    s->threads = true;
    return LM_OK;
}

lm_status store_new_with(const struct store_config *cfg, const struct store_hooks *hooks,
                         store **out, struct lm_err *err)
{
    store *s = lm_calloc(1, sizeof *s);
    *out = NULL;
    if (!s)
        return lm_err_set(err, LM_NOMEM, "no memory for the adapter store");
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->work, NULL);
    TAILQ_INIT(&s->all);
    TAILQ_INIT(&s->negatives);
    STAILQ_INIT(&s->inbox);
    STAILQ_INIT(&s->loading);
    STAILQ_INIT(&s->ready);
    STAILQ_INIT(&s->backoff);
    LIST_INIT(&s->fetching);
    s->hooks = *hooks;
    s->hooks.retry_base_ms = or_default(hooks->retry_base_ms, 200);
    if (getrandom(&s->random, sizeof s->random, 0) < 0 || s->random == 0)
        s->random = (uint64_t)lm_now_us() | 1;
    lm_status st = take_config(s, cfg, err);
    if (st == LM_OK)
        st = open_parts(s, cfg, err);
    if (st == LM_OK)
        st = start_threads(s, err);
    if (st != LM_OK) {
        store_free(s);
        return st;
    }
    *out = s;
    return LM_OK;
}

lm_status store_new(const struct store_config *cfg, store **out, struct lm_err *err)
{
    static const struct store_hooks hooks = {
        .find = engine_adapter_find, .load = engine_adapter_load,
        .ref = engine_adapter_ref, .unref = engine_adapter_unref,
    };
    return store_new_with(cfg, &hooks, out, err);
}

static void stop_threads(store *s)
{
    if (!s->threads)
        return;
    pthread_mutex_lock(&s->lock);
    s->stopping = true;
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
    fetcher_wake(s->fetcher);
    pthread_join(s->store_thread, NULL);
    pthread_join(s->loader_thread, NULL);
}

void store_free(store *s)
{
    struct lm_err err;
    struct lookup *l;
    struct negative *n;
    if (!s)
        return;
    stop_threads(s);
    lm_err_set(&err, LM_CANCELLED, "shutting down");
    fetcher_free(s->fetcher);   /* before the lookups, whose files its attempts point at */
    while ((l = TAILQ_FIRST(&s->all)))
        finish(s, l, LM_CANCELLED, NULL, &err);
    while ((n = TAILQ_FIRST(&s->negatives)))
        negative_drop(s, n);
    cache_close(s->cache);
    pthread_cond_destroy(&s->work);
    pthread_mutex_destroy(&s->lock);
    free(s->local_template);
    free((char *)s->cfg.url);
    free((char *)s->cfg.local_dir);
    free(s);
}
