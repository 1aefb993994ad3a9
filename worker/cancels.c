/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cancels.c - two chained hash tables over one lock; see cancels.h. Orders are also in a list by
 * age, for forgetting.
 */
#include "worker/cancels.h"

#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

enum { BUCKETS = 1 << 14 };

struct order {
    struct order *chain;
    struct order *younger;
    int64_t when_ms, until_ms;
    char id[];
};

struct cancels {
    pthread_mutex_t lock;
    int64_t retention_ms;
    struct order *oldest, **youngest;
    size_t n;
    struct order *orders[BUCKETS];
    struct job *jobs[BUCKETS];
};

cancels *cancels_new(int64_t retention_ms)
{
    cancels *c = lm_calloc(1, sizeof *c);
    if (!c)
        return NULL;
    pthread_mutex_init(&c->lock, NULL);
    c->retention_ms = retention_ms;
    c->youngest = &c->oldest;
    return c;
}

void cancels_free(cancels *c)
{
    if (!c)
        return;
    for (struct order *o = c->oldest, *next; o; o = next) {
        next = o->younger;
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
    struct order *o = c->oldest, **at = &c->orders[bucket(o->id)];
    while (*at != o)
        at = &(*at)->chain;
    *at = o->chain;
    c->oldest = o->younger;
    if (!c->oldest)
        c->youngest = &c->oldest;
    c->n--;
    free(o);
}

/* The latest order for this id, in wall-clock milliseconds; INT64_MIN: none. */
static int64_t order_time(const cancels *c, const char *id)
{
    int64_t when = INT64_MIN;
    for (const struct order *o = c->orders[bucket(id)]; o; o = o->chain)
        if (!strcmp(o->id, id))
            when = LM_MAX(when, o->when_ms);
    return when;
}

static bool concerns(int64_t when_ms, const struct job *j)
{
    return j->record.timestamp_ms < 0 || j->record.timestamp_ms <= when_ms;
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
    int64_t when = order_time(c, id);
    if (when != INT64_MIN && concerns(when, j))
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

static void remember(cancels *c, const char *id, int64_t when_ms, int64_t now_ms)
{
    size_t len = strlen(id);
    struct order *o = lm_malloc(sizeof *o + len + 1);
    if (!o)
        return;                 /* it still reaches the prompts that are here */
    unsigned b = bucket(id);
    *o = (struct order){ .chain = c->orders[b], .when_ms = when_ms,
                         .until_ms = now_ms + c->retention_ms };
    memcpy(o->id, id, len + 1);
    c->orders[b] = o;
    *c->youngest = o;
    c->youngest = &o->younger;
    c->n++;
}

int cancels_order(cancels *c, const char *id, int64_t when_ms, int64_t now_ms,
                  void (*running)(void *ctx, uint64_t handle), void *ctx)
{
    int n = 0;
    pthread_mutex_lock(&c->lock);
    while (c->oldest && (c->oldest->until_ms <= now_ms || c->n >= CANCELS_MAX))
        forget_oldest(c);
    remember(c, id, when_ms, now_ms);
    for (struct job *j = c->jobs[bucket(id)]; j; j = j->same_bucket) {
        if (strcmp(j->prompt->id, id) || !concerns(when_ms, j) ||
            atomic_exchange(&j->cancelled, true))
            continue;
        n++;
        uint64_t handle = atomic_load(&j->handle);
        if (handle)
            running(ctx, handle);
    }
    pthread_mutex_unlock(&c->lock);
    return n;
}

size_t cancels_count(cancels *c)
{
    pthread_mutex_lock(&c->lock);
    size_t n = c->n;
    pthread_mutex_unlock(&c->lock);
    return n;
}
