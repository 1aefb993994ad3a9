/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cancels.c - two chained hash tables over one lock; see cancels.h. Orders are also in a list by
 * age, for forgetting.
 */
#include "worker/cancels.h"

#include <stdlib.h>
#include <string.h>
#include <sys/queue.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

enum { BUCKETS = 1 << 14 };

struct order {
    struct order *chain;
    TAILQ_ENTRY(order) age;
    int64_t when_ms, until_ms;
    char id[];
};

struct cancels {
    pthread_mutex_t lock;
    int64_t retention_ms, skew_ms;
    TAILQ_HEAD(, order) by_age;         /* oldest first */
    size_t n;
    struct order *orders[BUCKETS];
    struct job *jobs[BUCKETS];
};

cancels *cancels_new(int64_t retention_ms, int64_t skew_ms)
{
    cancels *c = lm_calloc(1, sizeof *c);
    if (!c)
        return NULL;
    pthread_mutex_init(&c->lock, NULL);
    c->retention_ms = retention_ms;
    c->skew_ms = skew_ms;
    TAILQ_INIT(&c->by_age);
    return c;
}

void cancels_free(cancels *c)
{
    if (!c)
        return;
    for (struct order *o; (o = TAILQ_FIRST(&c->by_age));) {
        TAILQ_REMOVE(&c->by_age, o, age);
        free(o);
    }
    pthread_mutex_destroy(&c->lock);
    free(c);
}

static unsigned bucket(const char *id)
{
    return (unsigned)(XXH3_64bits(id, strlen(id)) % BUCKETS);
}

static void forget_oldest(cancels *c)
{
    struct order *o = TAILQ_FIRST(&c->by_age), **at = &c->orders[bucket(o->id)];
    while (*at != o)
        at = &(*at)->chain;
    *at = o->chain;
    TAILQ_REMOVE(&c->by_age, o, age);
    c->n--;
    free(o);
}

static struct order *find(const cancels *c, const char *id)
{
    struct order *o = c->orders[bucket(id)];
    while (o && strcmp(o->id, id))
        o = o->chain;
    return o;
}

static bool concerns(const cancels *c, int64_t when_ms, const struct job *j)
{
    int64_t stamp = j->record.timestamp_ms;
    return stamp < 0 || stamp - c->skew_ms <= when_ms;
}

bool cancels_enter(cancels *c, struct job *j)
{
    const char *id = j->prompt->id;
    unsigned b = bucket(id);
    pthread_mutex_lock(&c->lock);
    if (!j->entered) {
        j->entered = true;
        j->same_bucket = c->jobs[b];
        c->jobs[b] = j;
    }
    const struct order *o = find(c, id);
    if (o && concerns(c, o->when_ms, j))
        atomic_store(&j->cancelled, true);
    pthread_mutex_unlock(&c->lock);
    return atomic_load(&j->cancelled);
}

void cancels_leave(cancels *c, struct job *j)
{
    if (!j->entered)
        return;
    pthread_mutex_lock(&c->lock);
    struct job **at = &c->jobs[bucket(j->prompt->id)];
    while (*at != j)
        at = &(*at)->same_bucket;
    *at = j->same_bucket;
    j->entered = false;
    pthread_mutex_unlock(&c->lock);
}

static struct order *new_order(cancels *c, const char *id)
{
    size_t len = strlen(id);
    struct order *o = lm_malloc(sizeof *o + len + 1);
    if (!o)
        return NULL;
    unsigned b = bucket(id);
    *o = (struct order){ .chain = c->orders[b], .when_ms = INT64_MIN };
    memcpy(o->id, id, len + 1);
    c->orders[b] = o;
    c->n++;
    return o;
}

/* One entry an id, of its latest order: nobody makes a chain longer by saying the same again. */
static void remember(cancels *c, const char *id, int64_t when_ms, int64_t now_ms)
{
    struct order *o = find(c, id);
    if (o)
        TAILQ_REMOVE(&c->by_age, o, age);
    else if (!(o = new_order(c, id)))
        return;                 /* it still reaches the prompts that are here */
    o->when_ms = LM_MAX(o->when_ms, when_ms);
    o->until_ms = now_ms + c->retention_ms;
    TAILQ_INSERT_TAIL(&c->by_age, o, age);
}

struct cancels_met cancels_order(cancels *c, const char *id, int64_t when_ms, int64_t now_ms,
                                 void (*running)(void *ctx, uint64_t handle), void *ctx)
{
    struct cancels_met met = { 0 };
    pthread_mutex_lock(&c->lock);
    remember(c, id, when_ms, now_ms);
    for (const struct order *o; (o = TAILQ_FIRST(&c->by_age)) &&
                                (o->until_ms <= now_ms || c->n > CANCELS_MAX);)
        forget_oldest(c);
    for (struct job *j = c->jobs[bucket(id)]; j; j = j->same_bucket) {
        if (strcmp(j->prompt->id, id) || atomic_load(&j->cancelled))
            continue;
        if (!concerns(c, when_ms, j)) {
            met.later++;
            continue;
        }
        if (atomic_exchange(&j->cancelled, true))
            continue;
        met.marked++;
        uint64_t handle = atomic_load(&j->handle);
        if (handle)
            running(ctx, handle);
    }
    pthread_mutex_unlock(&c->lock);
    return met;
}

size_t cancels_count(cancels *c)
{
    pthread_mutex_lock(&c->lock);
    size_t n = c->n;
    pthread_mutex_unlock(&c->lock);
    return n;
}
