/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hold.c - see hold.h. A flight's number and its count are one word, so that a report which comes
 * after its flight was forgotten is told from one of the next, without a lock. Who takes a flight's
 * last report looks at what is held afterwards, under the lock under which who comes looks at the
 * flight: nobody is held behind a flight that is over.
 */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "worker/hold.h"

#include <string.h>

static unsigned in_flight(unsigned long long flight)
{
    return (unsigned)flight;
}

static unsigned number(unsigned long long flight)
{
    return (unsigned)(flight >> 32);
}

static struct hold_road *road_of(struct hold *h, const struct outgoing *o)
{
    if (o->topic == h->usual)
        return &h->roads[0];
    return &h->roads[1 + XXH3_64bits(o->topic, strlen(o->topic)) % (HOLD_ROADS - 1)];
}

/* A record that is being sent meanwhile is of the one or of the other. Under the lock. */
static void new_flight(struct hold_road *r)
{
    atomic_store(&r->flight, (unsigned long long)(number(atomic_load(&r->flight)) + 1) << 32);
}

void hold_init(struct hold *h, const char *usual)
{
    *h = (struct hold){ .usual = usual };
    pthread_mutex_init(&h->lock, NULL);
}

void hold_release(struct hold *h)
{
    pthread_mutex_destroy(&h->lock);
}

bool hold_back(struct hold *h, struct job *j, int64_t now_us, bool *wake)
{
    struct hold_road *r = road_of(h, &j->out);
    pthread_mutex_lock(&h->lock);
    bool first = !r->held.head, hold = !first;
    if (first && in_flight(atomic_load(&r->flight))) {
        r->until_us = atomic_load(&r->sent_us) + HOLD_US;
        hold = now_us < r->until_us;
        if (!hold)
            new_flight(r);
    }
    if (hold)
        job_chain_add(&r->held, j);
    *wake = hold && first && r->until_us < h->awake_us;
    pthread_mutex_unlock(&h->lock);
    return hold;
}

void hold_sent(struct hold *h, struct outgoing *o, int64_t now_us)
{
    struct hold_road *r = road_of(h, o);
    o->road = (int)(r - h->roads);
    atomic_store_explicit(&r->sent_us, now_us, memory_order_relaxed);
    o->flight = number(atomic_fetch_add(&r->flight, 1));
}

void hold_reported(struct hold *h, struct outgoing *o)
{
    struct hold_road *r = &h->roads[o->road];
    unsigned long long now = atomic_load(&r->flight);
    while (number(now) == o->flight && !atomic_compare_exchange_weak(&r->flight, &now, now - 1))
        ;
}

static void append(struct job_chain *to, const struct job_chain *from)
{
    if (to->head)
        to->last->next = from->head;
    else
        to->head = from->head;
    to->last = from->last;
}

struct job *hold_take(struct hold *h, int64_t now_us, bool all)
{
    struct job_chain out = { 0 };
    pthread_mutex_lock(&h->lock);
    for (struct hold_road *r = h->roads; r < h->roads + HOLD_ROADS; r++) {
        bool over = !in_flight(atomic_load(&r->flight));
        if (!r->held.head || !(all || over || now_us >= r->until_us))
            continue;
        append(&out, &r->held);
        r->held = (struct job_chain){ 0 };
        if (!over)
            new_flight(r);
    }
    pthread_mutex_unlock(&h->lock);
    return out.head;
}

int hold_wait_ms(struct hold *h, int64_t now_us, int cap)
{
    int64_t at = now_us + cap * INT64_C(1000);
    pthread_mutex_lock(&h->lock);
    for (struct hold_road *r = h->roads; r < h->roads + HOLD_ROADS; r++) {
        int64_t until = atomic_load(&r->sent_us) + HOLD_US;
        if (r->held.head)
            at = LM_MIN(at, r->until_us);
        else if (in_flight(atomic_load(&r->flight)) && until > now_us)
            at = LM_MIN(at, until);     /* if there is one to be held by then */
    }
    h->awake_us = at;
    pthread_mutex_unlock(&h->lock);
    return (int)LM_MAX((at - now_us + 999) / 1000, 0);
}
