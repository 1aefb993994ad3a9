/* SPDX-License-Identifier: Apache-2.0 */
/*
 * key_order.c - see key_order.h.
 *
 * Open addressing with linear probing over a power of two of slots, at most half full; a slot that
 * empties is closed by moving its followers up, so there are no tombstones. The key's bytes are the
 * record's of whichever job of that key is at work.
 */
#include "worker/key_order.h"

#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

struct slot {
    uint64_t hash;
    struct job *at_work;        /* NULL: the slot is free */
    struct job *head, **tail;   /* who waits */
};

struct key_order {
    struct slot *slots;
    size_t cap, used, waiting;
};

enum { FIRST_CAP = 64 };

key_order *key_order_new(void)
{
    key_order *o = lm_calloc(1, sizeof *o);
    if (o && !(o->slots = lm_calloc(FIRST_CAP, sizeof *o->slots))) {
        free(o);
        return NULL;
    }
    if (o)
        o->cap = FIRST_CAP;
    return o;
}

void key_order_free(key_order *o)
{
    if (!o)
        return;
    for (size_t i = 0; i < o->cap; i++)
        for (struct job *j = o->slots[i].at_work ? o->slots[i].head : NULL, *next; j; j = next) {
            next = j->next;
            job_unref(j);
        }
    free(o->slots);
    free(o);
}

static uint64_t hash_of(const struct job *j)
{
    uint64_t seed = XXH3_64bits(j->lease->topic, strlen(j->lease->topic)) +
                    (uint64_t)(uint32_t)j->lease->partition;
    return XXH3_64bits_withSeed(j->record.key, j->record.key_len, seed);
}

static bool same_key(const struct job *a, const struct job *b)
{
    return a->record.key_len == b->record.key_len && a->lease->partition == b->lease->partition &&
           !strcmp(a->lease->topic, b->lease->topic) &&
           (!a->record.key_len || !memcmp(a->record.key, b->record.key, a->record.key_len));
}

/* The key's slot, or the free one where it would go. */
static struct slot *find(const key_order *o, const struct job *j, uint64_t hash)
{
    for (size_t i = hash & (o->cap - 1);; i = (i + 1) & (o->cap - 1)) {
        struct slot *s = &o->slots[i];
        if (!s->at_work || (s->hash == hash && same_key(s->at_work, j)))
            return s;
    }
}

/* A slot with nobody waiting points to its own head, which moves along. */
static void place(struct slot *to, const struct slot *from)
{
    *to = *from;
    if (!to->head)
        to->tail = &to->head;
}

static lm_status grow(key_order *o)
{
    struct slot *old = o->slots;
    size_t old_cap = o->cap;
    struct slot *slots = lm_calloc(old_cap * 2, sizeof *slots);
    if (!slots)
        return LM_NOMEM;
    o->slots = slots;
    o->cap = old_cap * 2;
    for (size_t i = 0; i < old_cap; i++)
        if (old[i].at_work)
            place(find(o, old[i].at_work, old[i].hash), &old[i]);
    free(old);
    return LM_OK;
}

lm_status key_order_enter(key_order *o, struct job *j, bool *go)
{
    *go = true;
    if (!j->record.key)
        return LM_OK;
    if (o->used >= o->cap / 2 && grow(o))
        return LM_NOMEM;
    uint64_t hash = hash_of(j);
    struct slot *s = find(o, j, hash);
    j->ordered = true;
    if (!s->at_work) {
        *s = (struct slot){ .hash = hash, .at_work = j };
        s->tail = &s->head;
        o->used++;
        return LM_OK;
    }
    j->next = NULL;
    *s->tail = j;
    s->tail = &j->next;
    o->waiting++;
    *go = false;
    return LM_OK;
}

static void close_gap(key_order *o, size_t gap)
{
    size_t mask = o->cap - 1;
    for (size_t i = (gap + 1) & mask; o->slots[i].at_work; i = (i + 1) & mask) {
        size_t home = o->slots[i].hash & mask;
        /* May it move? Not past its home, going round. */
        if (((i - home) & mask) >= ((i - gap) & mask)) {
            place(&o->slots[gap], &o->slots[i]);
            gap = i;
        }
    }
    o->slots[gap] = (struct slot){ 0 };
    o->used--;
}

struct job *key_order_leave(key_order *o, struct job *j)
{
    if (!j->ordered)
        return NULL;
    struct slot *s = find(o, j, hash_of(j));
    j->ordered = false;
    if (s->at_work != j)
        return NULL;
    struct job *next = s->head;
    if (!next) {
        close_gap(o, (size_t)(s - o->slots));
        return NULL;
    }
    s->at_work = next;
    s->head = next->next;
    if (!s->head)
        s->tail = &s->head;
    next->next = NULL;
    o->waiting--;
    return next;
}

size_t key_order_waiting(const key_order *o)
{
    return o->waiting;
}
