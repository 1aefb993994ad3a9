/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ledger.c - see ledger.h for what a ledger promises.
 *
 * A partition's entries stand in a ring buffer in delivery order, which is offset order. Delivery
 * appends at the tail; completion finds its entry by binary search, marks it, and drops finished
 * entries from the head. When the ring is full, neighbours that are finished are merged into one
 * entry, a run, before the ring grows: so every operation is O(log n), amortised, and memory
 * follows the unfinished entries and the runs between them.
 *
 * `known` holds the restored ranges. From `at_known` on they lie beyond the last delivered offset,
 * at least in part; those behind it are in the ring, entered by ledger_skip(), or gone.
 *
 * Invariants of a partition, checked by the property test:
 *  1. offsets in the ring ascend strictly, and first <= last in each entry;
 *  2. the head, when there is one, is unfinished: it *is* the watermark;
 *  3. in_flight = number of unfinished entries, staged = those of them that are staged;
 *  4. an entry of more than one offset is finished.
 */
#include "worker/ledger.h"

#include <stdlib.h>
#include <string.h>

enum state { IN_FLIGHT, STAGED, FINISHED };

struct entry {
    int64_t offset, last;       /* last > offset: a run */
    void *user;
    enum state state;
};

struct part {
    char *topic;                /* NULL: the slot is free */
    int32_t number;
    uint64_t epoch;
    struct entry *ring;         /* [cap], cap a power of two or 0 */
    size_t cap, head, count;
    size_t in_flight, staged;
    struct offset_range *known; /* [n_known], of which the first at_known are passed */
    size_t n_known, at_known;
    uint64_t version, committed_version;    /* of the map: completions so far */
    uint64_t cuts;
    size_t map_bytes;
    int64_t credit;             /* bytes that it may grow by unmeasured; see ledger_crowded() */
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
    size_t map_limit, restored_limit;
    struct offset_range *ranges;        /* scratch of the map's making */
    size_t ranges_cap;
    ledger_drop *drop;
    void *ctx;
};

/* What a delivery and a completion can add to a map, in bytes of its text, where offsets are dense:
 * one more run for two deliveries, a gap that is cut in three. */
enum { DELIVERY_ADDS = 4, COMPLETION_ADDS = 6, CREDIT_LEAST = 32 * DELIVERY_ADDS,
       BOUND_FROM = 1024 };

ledger *ledger_new(ledger_drop *drop, void *ctx, size_t map_limit)
{
    ledger *l = lm_calloc(1, sizeof *l);
    if (l) {
        l->next_epoch = 1;
        l->restored_limit = OFFSET_MAP_MAX;
        ledger_set_map_limit(l, map_limit);
        l->drop = drop;
        l->ctx = ctx;
    }
    return l;
}

void ledger_set_map_limit(ledger *l, size_t map_limit)
{
    l->map_limit = LM_MIN(map_limit, OFFSET_MAP_MAX);
    for (size_t i = 0; i < l->n_parts; i++)
        l->parts[i].credit = 0;
}

void ledger_set_restored_limit(ledger *l, size_t limit)
{
    l->restored_limit = LM_MIN(limit, OFFSET_MAP_MAX);
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
        if (e->state != FINISHED && l->drop)
            l->drop(l->ctx, e->offset, e->user);
    }
    l->in_flight -= p->in_flight;
    p->in_flight = p->staged = p->count = p->head = 0;
    p->n_known = p->at_known = 0;
}

static void part_release(ledger *l, struct part *p)
{
    part_drop(l, p);
    free(p->ring);
    free(p->known);
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
    free(l->ranges);
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

lm_status ledger_restore(ledger *l, struct ledger_ref ref, const struct offset_range *r, size_t n)
{
    struct part *p = part_of(l, ref);
    if (!p)
        return LM_CANCELLED;
    if (p->last != LEDGER_NONE || p->n_known)
        return LM_STATE;
    if (!n)
        return LM_OK;
    if (!(p->known = lm_reallocarray(p->known, n, sizeof *r)))
        return LM_NOMEM;
    memcpy(p->known, r, n * sizeof *r);
    p->n_known = n;
    return LM_OK;
}

/* ---- delivery --------------------------------------------------------------------------- */

/* Merges neighbours that are finished. */
static void ring_merge(struct part *p)
{
    size_t kept = 0;
    for (size_t i = 0; i < p->count; i++) {
        struct entry e = *entry_at(p, i);
        struct entry *before = kept ? entry_at(p, kept - 1) : NULL;
        if (before && before->state == FINISHED && e.state == FINISHED)
            before->last = e.last;
        else
            *entry_at(p, kept++) = e;
    }
    p->count = kept;
}

static lm_status ring_grow(struct part *p)
{
    ring_merge(p);
    if (p->cap && p->count <= p->cap / 4 * 3)
        return LM_OK;
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
    p->version = p->committed_version = 0;
    p->credit = 0;
    return LM_OK;
}

static void drop_tail(ledger *l, struct part *p)
{
    struct entry *e = entry_at(p, --p->count);
    if (e->state == FINISHED)
        return;
    p->staged -= e->state == STAGED;
    p->in_flight--;
    l->in_flight--;
    if (l->drop)
        l->drop(l->ctx, e->offset, e->user);
}

/* Of the restored ranges what lies before `from`, where all is delivered. */
static void cut_known(struct part *p, int64_t from)
{
    while (p->n_known && p->known[p->n_known - 1].from >= from)
        p->n_known--;
    if (p->n_known)
        p->known[p->n_known - 1].to = LM_MIN(p->known[p->n_known - 1].to, from);
    p->at_known = p->n_known;
}

lm_status ledger_cut(ledger *l, struct ledger_ref ref, int64_t from)
{
    struct part *p = part_of(l, ref);
    if (!p)
        return LM_CANCELLED;
    if (!p->count || entry_at(p, 0)->offset >= from)
        return LM_NOT_FOUND;
    while (entry_at(p, p->count - 1)->offset >= from)
        drop_tail(l, p);
    struct entry *tail = entry_at(p, p->count - 1);
    tail->last = LM_MIN(tail->last, from - 1);
    cut_known(p, from);
    p->last = from - 1;
    p->position = LEDGER_NONE;
    p->cuts++;
    p->committed_version = p->version++;        /* the map is of what is no more */
    if (p->committed > from)    /* by a transaction whose jobs are on their way here */
        p->committed = LEDGER_NONE;
    p->credit = 0;
    return LM_OK;
}

/* Delivered up to here: ranges behind it are of no more use. */
static void passed(struct part *p, int64_t offset)
{
    p->credit -= DELIVERY_ADDS;
    for (int64_t gap = (offset - p->last) >> 7; gap; gap >>= 7)
        p->credit -= DELIVERY_ADDS;     /* a longer number */
    p->last = offset;
    while (p->at_known < p->n_known && p->known[p->at_known].to <= offset + 1)
        p->at_known++;
}

lm_status ledger_deliver(ledger *l, struct ledger_ref ref, int64_t offset, void *user)
{
    struct part *p = part_of(l, ref);
    if (!p)
        return LM_CANCELLED;
    if (offset < 0)
        return LM_INVALID;
    if (offset <= LM_MAX(p->last, LM_MAX(p->base, p->committed) - 1))
        return LM_STATE;
    if (p->count == p->cap && ring_grow(p))
        return LM_NOMEM;
    p->count++;
    *entry_at(p, p->count - 1) = (struct entry){ offset, offset, user, IN_FLIGHT };
    passed(p, offset);
    p->in_flight++;
    l->in_flight++;
    return LM_OK;
}

bool ledger_skip(ledger *l, struct ledger_ref ref, int64_t offset)
{
    struct part *p = part_of(l, ref);
    if (!p || offset < 0 || (p->last != LEDGER_NONE && offset <= p->last))
        return false;
    size_t k = p->at_known;
    while (k < p->n_known && p->known[k].to <= offset)
        k++;
    if (k == p->n_known || offset < p->known[k].from)
        return false;
    struct entry *tail = p->count ? entry_at(p, p->count - 1) : NULL;
    if (tail && tail->state == FINISHED) {
        tail->last = offset;
    } else if (tail) {
        if (p->count == p->cap && ring_grow(p))
            return false;       /* a repeat, then */
        p->count++;
        *entry_at(p, p->count - 1) = (struct entry){ offset, offset, NULL, FINISHED };
    }
    passed(p, offset);
    return true;
}

/* ---- completion ------------------------------------------------------------------------- */

/* The unfinished entry of that offset, or NULL. */
static struct entry *find_entry(const struct part *p, int64_t offset)
{
    size_t lo = 0, hi = p->count;
    int64_t dense = hi ? offset - entry_at(p, 0)->offset : 0;   /* where it is if none is missing */
    if (dense >= 0 && (uint64_t)dense < hi) {
        hi = (size_t)dense + 1;         /* else it is before that */
        lo = entry_at(p, hi - 1)->offset == offset ? hi - 1 : 0;
    }
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if (entry_at(p, mid)->offset < offset)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo == p->count || entry_at(p, lo)->offset != offset ||
        entry_at(p, lo)->state == FINISHED)
        return NULL;
    return entry_at(p, lo);
}

void *ledger_user(const ledger *l, struct ledger_ref ref, int64_t offset)
{
    const struct part *p = part_of(l, ref);
    const struct entry *e = p ? find_entry(p, offset) : NULL;
    return e ? e->user : NULL;
}

lm_status ledger_complete(ledger *l, struct ledger_ref ref, int64_t offset, void **user)
{
    struct part *p = part_of(l, ref);
    if (!p)
        return LM_CANCELLED;
    struct entry *e = find_entry(p, offset);
    if (!e)
        return LM_NOT_FOUND;
    p->staged -= e->state == STAGED;
    e->state = FINISHED;
    if (user)
        *user = e->user;
    p->version++;
    p->credit -= COMPLETION_ADDS;
    p->in_flight--;
    l->in_flight--;
    while (p->count && entry_at(p, 0)->state == FINISHED) {
        p->head = (p->head + 1) & (p->cap - 1);
        p->count--;
    }
    return LM_OK;
}

lm_status ledger_stage(ledger *l, struct ledger_ref ref, int64_t offset, bool staged)
{
    struct part *p = part_of(l, ref);
    if (!p)
        return LM_CANCELLED;
    struct entry *e = find_entry(p, offset);
    if (!e)
        return LM_NOT_FOUND;
    if ((e->state == STAGED) == staged)
        return LM_STATE;
    e->state = staged ? STAGED : IN_FLIGHT;
    if (staged)
        p->staged++;
    else
        p->staged--;
    return LM_OK;
}

/* ---- committing ------------------------------------------------------------------------- */

void ledger_position(ledger *l, struct ledger_ref ref, int64_t position)
{
    struct part *p = part_of(l, ref);
    if (p && position >= 0)
        p->position = position;
}

/* The first entry that is not finished; with `staged`, nor staged. count: none. */
static size_t first_unfinished(const struct part *p, bool staged)
{
    size_t i = 0;
    if (!staged || !p->staged)
        return p->count ? 0 : p->count;
    while (i < p->count && entry_at(p, i)->state != IN_FLIGHT)
        i++;
    return i;
}

static int64_t part_watermark(const struct part *p, bool staged)
{
    size_t first = first_unfinished(p, staged);
    if (first < p->count)
        return entry_at(p, first)->offset;
    int64_t next = p->last == LEDGER_NONE ? LEDGER_NONE : p->last + 1;
    /* Without a committed offset to compare with, a position that no delivery confirms is not
     * trusted: it may be the previous assignment's. */
    bool known = p->last != LEDGER_NONE || p->base != LEDGER_NONE;
    return known ? LM_MAX(next, p->position) : next;
}

static bool add_range(ledger *l, size_t *n, int64_t from, int64_t to)
{
    if (*n && l->ranges[*n - 1].to == from) {
        l->ranges[*n - 1].to = to;
        return true;
    }
    if (*n == l->ranges_cap) {
        size_t cap = l->ranges_cap ? l->ranges_cap * 2 : 256;
        struct offset_range *grown = lm_reallocarray(l->ranges, cap, sizeof *grown);
        if (!grown)
            return false;
        l->ranges = grown;
        l->ranges_cap = cap;
    }
    l->ranges[(*n)++] = (struct offset_range){ from, to };
    return true;
}

/* Finished offsets at or beyond `mark`, into l->ranges. When memory is short, fewer. */
static size_t collect(ledger *l, const struct part *p, int64_t mark, bool staged)
{
    size_t n = 0;
    int64_t open = LEDGER_NONE, last = LEDGER_NONE;
    for (size_t i = first_unfinished(p, staged); i < p->count; i++) {
        const struct entry *e = entry_at(p, i);
        if (e->state == FINISHED || (staged && e->state == STAGED)) {
            open = open == LEDGER_NONE ? e->offset : open;
            last = e->last;
        } else if (open != LEDGER_NONE) {
            if (!add_range(l, &n, open, last + 1))
                return n;
            open = LEDGER_NONE;
        }
    }
    if (open != LEDGER_NONE && !add_range(l, &n, open, last + 1))
        return n;
    for (size_t k = p->at_known; k < p->n_known; k++) {
        int64_t from = LM_MAX(p->known[k].from, LM_MAX(p->last + 1, mark));
        if (from < p->known[k].to && !add_range(l, &n, from, p->known[k].to))
            return n;
    }
    return n;
}

bool ledger_due(const ledger *l, struct ledger_ref ref, bool staged, struct ledger_commit *out)
{
    const struct part *p = part_of(l, ref);
    if (!p)
        return false;
    int64_t mark = part_watermark(p, staged);
    uint64_t version = p->version + (staged ? p->staged : 0);
    bool map = l->map_limit && version != p->committed_version && p->count > 0;
    *out = (struct ledger_commit){ ref, LM_MAX(mark, p->committed), version, p->cuts };
    return mark > p->committed || (map && mark != LEDGER_NONE);
}

/* What an earlier owner's map holds at or beyond `mark`, and nothing else. */
static size_t restored_map(ledger *l, const struct part *p, int64_t mark,
                           char out[OFFSET_MAP_MAX + 1])
{
    size_t n = 0, covered;
    for (size_t k = 0; k < p->n_known; k++) {
        int64_t from = LM_MAX(p->known[k].from, mark);
        if (from < p->known[k].to && !add_range(l, &n, from, p->known[k].to))
            break;
    }
    return n ? offset_map_encode(mark, l->ranges, n, l->restored_limit, out, &covered) : 0;
}

size_t ledger_map(ledger *l, const struct ledger_commit *c, bool staged,
                  char out[OFFSET_MAP_MAX + 1], bool *whole)
{
    struct part *p = part_of(l, c->ref);
    size_t n = p ? collect(l, p, c->offset, staged) : 0, covered = 0, len = 0;
    out[0] = 0;
    if (p && !l->map_limit)
        len = restored_map(l, p, c->offset, out);
    else if (n)
        len = offset_map_encode(c->offset, l->ranges, n, l->map_limit, out, &covered);
    if (p)
        p->map_bytes = len;
    if (whole)
        *whole = covered == n;
    return len;
}

void ledger_committed(ledger *l, const struct ledger_commit *c)
{
    struct part *p = part_of(l, c->ref);
    if (!p || c->cuts != p->cuts)
        return;
    p->committed = LM_MAX(p->committed, c->offset);
    p->committed_version = LM_MAX(p->committed_version, c->version);
}

/* Bytes of payload that a stretch of `k` unfinished neighbours can add as runs when some of them
 * end: every second one can become a run of its own, and numbers become longer. One between two
 * runs can only join them. */
static size_t stretch_adds(size_t k, int64_t width, bool at_tail)
{
    if (k < 2 && !(k && at_tail))
        return 0;
    return 2 * (at_tail ? k / 2 : (k - 1) / 2) + 2 + (size_t)(width / 64);
}

/* The longest map that what was delivered can come to, whatever ends and in which order. An end at
 * the head only moves the watermark, which makes it shorter. */
static size_t part_bound(ledger *l, const struct part *p)
{
    int64_t mark = part_watermark(p, false), from = mark;
    size_t k = 0, more = 0;
    for (size_t i = 0; i < p->count; i++) {
        const struct entry *e = entry_at(p, i);
        if (e->state != FINISHED) {
            k++;
            continue;
        }
        more += stretch_adds(k, e->offset - from, false);
        k = 0;
        from = e->last + 1;
    }
    more += stretch_adds(k, p->last + 1 - from, true);
    size_t n = collect(l, p, mark, false);
    return offset_map_bound(mark, p->last + 1, l->ranges, n, more);
}

/* Bytes that are left below both lines; negative: none. */
static int64_t measure(ledger *l, struct part *p, bool already)
{
    int64_t limit = (int64_t)l->map_limit, mark = part_watermark(p, true);
    size_t n = collect(l, p, mark, true);
    p->map_bytes = n ? offset_map_size(mark, l->ranges, n) : 0;
    int64_t left = limit / 4 * (already ? 2 : 3) - (int64_t)p->map_bytes;
    int64_t spare = (already ? 2 : 1) * (LEDGER_BURST * DELIVERY_ADDS + CREDIT_LEAST);
    if (limit < BOUND_FROM || left < 0)
        return left;
    return LM_MIN(left, limit - spare - (int64_t)part_bound(l, p));
}

bool ledger_crowded(ledger *l, struct ledger_ref ref, bool already)
{
    struct part *p = part_of(l, ref);
    if (!p || !l->map_limit || !p->in_flight || p->at_known < p->n_known)
        return false;
    if (p->credit > 0 && !already)
        return false;
    int64_t left = measure(l, p, already);
    p->credit = left < 0 ? 0 : LM_MAX(left, CREDIT_LEAST);
    return left < 0;
}

/* ---- looking ---------------------------------------------------------------------------- */

static void part_info(const ledger *l, const struct part *p, struct ledger_info *out)
{
    *out = (struct ledger_info){
        .ref = { (uint32_t)(p - l->parts), p->epoch }, .topic = p->topic, .partition = p->number,
        .committed = p->committed, .watermark = part_watermark(p, false),
        .last_delivered = p->last, .in_flight = p->in_flight, .beyond = p->count - p->in_flight,
        .map_bytes = p->map_bytes,
    };
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
        if (e->state != FINISHED)
            visit(ctx, e->offset, e->user);
    }
}
