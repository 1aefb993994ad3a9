/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ledger.c - see ledger.h for what a ledger promises.
 *
 * A partition's entries stand in a ring buffer in delivery order, which is offset order. Delivery
 * appends at the tail; completion finds its entry by binary search, marks it, and drops finished
 * entries from the head. So every operation is O(log n), and memory follows the distance between
 * the watermark and the last delivered offset.
 *
 * Invariants of a partition, checked by the property test:
 *  1. offsets in the ring ascend strictly;
 *  2. the head, when there is one, is unfinished: it *is* the watermark;
 *  3. in_flight = number of unfinished entries.
 */
#include "worker/ledger.h"

#include <stdlib.h>
#include <string.h>

struct entry {
    int64_t offset;
    void *user;
    bool finished;
};

struct part {
    char *topic;                /* NULL: the slot is free */
    int32_t number;
    uint64_t epoch;
    struct entry *ring;         /* [cap], cap a power of two or 0 */
    size_t cap, head, count;
    size_t in_flight;
    int64_t last;               /* last delivered, or LEDGER_NONE */
    int64_t position;           /* or LEDGER_NONE */
    int64_t base;               /* the group's offset at assignment, or LEDGER_NONE */
    int64_t committed;          /* or LEDGER_NONE */
};

struct ledger {
    struct part *parts;
    size_t n_parts;
    uint64_t next_epoch;
    size_t in_flight;
    ledger_drop *drop;
    void *ctx;
};

ledger *ledger_new(ledger_drop *drop, void *ctx)
{
    ledger *l = lm_calloc(1, sizeof *l);
    if (l) {
        l->next_epoch = 1;
        l->drop = drop;
        l->ctx = ctx;
    }
    return l;
}

static struct entry *entry_at(const struct part *p, size_t i)
{
    return &p->ring[(p->head + i) & (p->cap - 1)];
}

/* Forgets the entries, telling the owner of each unfinished one. */
static void part_drop(ledger *l, struct part *p)
{
    for (size_t i = 0; i < p->count; i++) {
        struct entry *e = entry_at(p, i);
        if (!e->finished && l->drop)
            l->drop(l->ctx, e->offset, e->user);
    }
    l->in_flight -= p->in_flight;
    p->in_flight = p->count = p->head = 0;
}

static void part_release(ledger *l, struct part *p)
{
    part_drop(l, p);
    free(p->ring);
    free(p->topic);
    *p = (struct part){ 0 };
}

void ledger_free(ledger *l)
{
    if (!l)
        return;
    for (size_t i = 0; i < l->n_parts; i++)
        if (l->parts[i].topic)
            part_release(l, &l->parts[i]);
    free(l->parts);
    free(l);
}

static struct part *part_of(const ledger *l, struct ledger_ref ref)
{
    if (ref.slot >= l->n_parts)
        return NULL;
    struct part *p = &l->parts[ref.slot];
    return p->topic && p->epoch == ref.epoch ? p : NULL;
}

lm_status ledger_find(const ledger *l, const char *topic, int32_t partition,
                      struct ledger_ref *out)
{
    for (size_t i = 0; i < l->n_parts; i++) {
        const struct part *p = &l->parts[i];
        if (p->topic && p->number == partition && !strcmp(p->topic, topic)) {
            *out = (struct ledger_ref){ (uint32_t)i, p->epoch };
            return LM_OK;
        }
    }
    return LM_NOT_FOUND;
}

static struct part *free_slot(ledger *l)
{
    for (size_t i = 0; i < l->n_parts; i++)
        if (!l->parts[i].topic)
            return &l->parts[i];
    struct part *grown = lm_reallocarray(l->parts, l->n_parts + 1, sizeof *grown);
    if (!grown)
        return NULL;
    l->parts = grown;
    l->parts[l->n_parts] = (struct part){ 0 };
    return &l->parts[l->n_parts++];
}

lm_status ledger_assign(ledger *l, const char *topic, int32_t partition, int64_t committed,
                        struct ledger_ref *out)
{
    if (!ledger_find(l, topic, partition, out))
        ledger_revoke(l, *out);
    struct part *p = free_slot(l);
    char *name = p ? lm_strdup(topic) : NULL;
    if (!name)
        return LM_NOMEM;
    *p = (struct part){
        .topic = name, .number = partition, .epoch = l->next_epoch++, .last = LEDGER_NONE,
        .position = LEDGER_NONE, .base = committed, .committed = committed,
    };
    *out = (struct ledger_ref){ (uint32_t)(p - l->parts), p->epoch };
    return LM_OK;
}

lm_status ledger_revoke(ledger *l, struct ledger_ref ref)
{
    struct part *p = part_of(l, ref);
    if (!p)
        return LM_CANCELLED;
    part_release(l, p);
    return LM_OK;
}

/* ---- delivery --------------------------------------------------------------------------- */

static lm_status ring_grow(struct part *p)
{
    size_t cap = p->cap ? p->cap * 2 : 64;
    struct entry *ring = lm_calloc(cap, sizeof *ring);
    if (!ring)
        return LM_NOMEM;
    for (size_t i = 0; i < p->count; i++)
        ring[i] = *entry_at(p, i);
    free(p->ring);
    p->ring = ring;
    p->cap = cap;
    p->head = 0;
    return LM_OK;
}

lm_status ledger_rewind(ledger *l, struct ledger_ref *ref)
{
    struct part *p = part_of(l, *ref);
    if (!p)
        return LM_CANCELLED;
    part_drop(l, p);
    p->epoch = ref->epoch = l->next_epoch++;
    p->last = p->position = p->base = p->committed = LEDGER_NONE;
    return LM_OK;
}

lm_status ledger_deliver(ledger *l, struct ledger_ref ref, int64_t offset, void *user)
{
    struct part *p = part_of(l, ref);
    if (!p)
        return LM_CANCELLED;
    if (offset < 0)
        return LM_INVALID;
    if (p->last != LEDGER_NONE && offset <= p->last)
        return LM_STATE;
    if (p->count == p->cap && ring_grow(p))
        return LM_NOMEM;
    p->count++;
    *entry_at(p, p->count - 1) = (struct entry){ offset, user, false };
    p->last = offset;
    p->in_flight++;
    l->in_flight++;
    return LM_OK;
}

/* ---- completion ------------------------------------------------------------------------- */

static struct entry *find_entry(const struct part *p, int64_t offset)
{
    size_t lo = 0, hi = p->count;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if (entry_at(p, mid)->offset < offset)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo == p->count || entry_at(p, lo)->offset != offset)
        return NULL;
    return entry_at(p, lo);
}

lm_status ledger_complete(ledger *l, struct ledger_ref ref, int64_t offset, void **user)
{
    struct part *p = part_of(l, ref);
    if (!p)
        return LM_CANCELLED;
    struct entry *e = find_entry(p, offset);
    if (!e || e->finished)
        return LM_NOT_FOUND;
    e->finished = true;
    if (user)
        *user = e->user;
    p->in_flight--;
    l->in_flight--;
    while (p->count && entry_at(p, 0)->finished) {
        p->head = (p->head + 1) & (p->cap - 1);
        p->count--;
    }
    return LM_OK;
}

/* ---- committing ------------------------------------------------------------------------- */

void ledger_position(ledger *l, struct ledger_ref ref, int64_t position)
{
    struct part *p = part_of(l, ref);
    if (p && position >= 0)
        p->position = position;
}

static int64_t part_watermark(const struct part *p)
{
    if (p->count)
        return entry_at(p, 0)->offset;
    int64_t next = p->last == LEDGER_NONE ? LEDGER_NONE : p->last + 1;
    /* Without a committed offset to compare with, a position that no delivery confirms is not
     * trusted: it may be the previous assignment's. */
    bool known = p->last != LEDGER_NONE || p->base != LEDGER_NONE;
    return known ? LM_MAX(next, p->position) : next;
}

int64_t ledger_commit_value(const ledger *l, struct ledger_ref ref)
{
    const struct part *p = part_of(l, ref);
    if (!p)
        return LEDGER_NONE;
    int64_t mark = part_watermark(p);
    return mark > p->committed ? mark : LEDGER_NONE;
}

void ledger_committed(ledger *l, struct ledger_ref ref, int64_t value)
{
    struct part *p = part_of(l, ref);
    if (p && value > p->committed)
        p->committed = value;
}

/* ---- looking ---------------------------------------------------------------------------- */

static void part_info(const ledger *l, const struct part *p, struct ledger_info *out)
{
    *out = (struct ledger_info){
        .ref = { (uint32_t)(p - l->parts), p->epoch }, .topic = p->topic, .partition = p->number,
        .committed = p->committed, .watermark = part_watermark(p), .last_delivered = p->last,
        .in_flight = p->in_flight, .beyond = p->count - p->in_flight,
    };
}

bool ledger_at(const ledger *l, size_t i, struct ledger_info *out)
{
    for (size_t s = 0; s < l->n_parts; s++)
        if (l->parts[s].topic && i-- == 0) {
            part_info(l, &l->parts[s], out);
            return true;
        }
    return false;
}

bool ledger_get(const ledger *l, struct ledger_ref ref, struct ledger_info *out)
{
    const struct part *p = part_of(l, ref);
    if (p)
        part_info(l, p, out);
    return p;
}

size_t ledger_in_flight(const ledger *l)
{
    return l->in_flight;
}

void ledger_each(const ledger *l, struct ledger_ref ref, ledger_visit *visit, void *ctx)
{
    const struct part *p = part_of(l, ref);
    for (size_t i = 0; p && i < p->count; i++) {
        const struct entry *e = entry_at(p, i);
        visit(ctx, e->offset, e->finished, e->user);
    }
}
