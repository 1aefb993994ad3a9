/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dlq_marks.c - see dlq_marks.h. The ranges of a partition ascend, neither overlap nor touch, and
 * lie beyond its base; a first range that begins at the base becomes part of what is before it.
 */
#include "worker/tools/dlq_marks.h"

#include <stdlib.h>
#include <string.h>

/* A base that rises makes a map longer by so much at most: nine bytes for one. */
enum { SPARE = 16 };

struct part {
    int64_t base;
    struct offset_range *r;
    size_t n, cap;
    bool changed;
};

struct dlq_marks { int n; size_t most; struct part part[]; };

dlq_marks *dlq_marks_new(int n_partitions, size_t most)
{
    dlq_marks *m = lm_calloc(1, sizeof *m + (size_t)n_partitions * sizeof *m->part);
    if (m) {
        m->n = n_partitions;
        m->most = LM_MIN(most, OFFSET_MAP_MAX);
    }
    return m;
}

dlq_marks *dlq_marks_copy(const dlq_marks *m)
{
    dlq_marks *copy = dlq_marks_new(m->n, m->most);
    for (int i = 0; copy && i < m->n; i++) {
        struct part *to = &copy->part[i];
        *to = m->part[i];
        to->cap = to->n;
        to->r = to->n ? lm_reallocarray(NULL, to->n, sizeof *to->r) : NULL;
        if (to->n && !to->r) {
            dlq_marks_free(copy);
            return NULL;
        }
        if (to->n)
            memcpy(to->r, m->part[i].r, to->n * sizeof *to->r);
    }
    return copy;
}

void dlq_marks_free(dlq_marks *m)
{
    for (int i = 0; m && i < m->n; i++)
        free(m->part[i].r);
    free(m);
}

int dlq_marks_partitions(const dlq_marks *m)
{
    return m->n;
}

/* The first range that ends at `offset` or beyond. */
static size_t find(const struct part *p, int64_t offset)
{
    size_t low = 0, high = p->n;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (p->r[mid].to < offset)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

static void remove_ranges(struct part *p, size_t at, size_t n)
{
    if (n)                      /* without any there is no array */
        memmove(p->r + at, p->r + at + n, (p->n - at - n) * sizeof *p->r);
    p->n -= n;
}

/* Nothing before `base` is open. */
static void raise_base(struct part *p, int64_t base)
{
    size_t gone = 0;
    p->base = LM_MAX(p->base, base);
    for (; gone < p->n && p->r[gone].from <= p->base; gone++)
        p->base = LM_MAX(p->base, p->r[gone].to);
    remove_ranges(p, 0, gone);
}

void dlq_marks_load(dlq_marks *m, int partition, int64_t offset, const char *map, size_t len)
{
    struct part *p = &m->part[partition];
    free(p->r);
    *p = (struct part){ .base = LM_MAX(offset, 0), .changed = offset >= 0 };
    if (offset >= 0 && map && !offset_map_decode(map, len, offset, &p->r, &p->n, NULL))
        p->cap = p->n;
    /* Maps of another hand may hold ranges that touch. */
    for (size_t i = 1; i < p->n;)
        if (p->r[i].from <= p->r[i - 1].to) {
            p->r[i - 1].to = LM_MAX(p->r[i - 1].to, p->r[i].to);
            remove_ranges(p, i, 1);
        } else {
            i++;
        }
    raise_base(p, p->base);
}

int64_t dlq_marks_end(const dlq_marks *m, int partition)
{
    const struct part *p = &m->part[partition];
    return p->n ? p->r[p->n - 1].to : p->base;
}

void dlq_marks_begin(dlq_marks *m, int partition, int64_t offset)
{
    if (partition < m->n)
        raise_base(&m->part[partition], offset);
}

bool dlq_marks_has(const dlq_marks *m, int partition, int64_t offset)
{
    if (partition >= m->n)
        return false;
    const struct part *p = &m->part[partition];
    size_t i = find(p, offset + 1);
    return offset < p->base || (i < p->n && p->r[i].from <= offset);
}

static bool make_room(struct part *p)
{
    if (p->n < p->cap)
        return true;
    size_t cap = p->cap ? p->cap * 2 : 16;
    struct offset_range *grown = lm_reallocarray(p->r, cap, sizeof *grown);
    if (grown) {
        p->r = grown;
        p->cap = cap;
    }
    return grown != NULL;
}

/* With the ranges that it overlaps or touches. */
static bool insert(struct part *p, struct offset_range x)
{
    size_t at = find(p, x.from), end = at;
    for (; end < p->n && p->r[end].from <= x.to; end++) {
        x.from = LM_MIN(x.from, p->r[end].from);
        x.to = LM_MAX(x.to, p->r[end].to);
    }
    if (end == at) {
        if (!make_room(p))
            return false;
        memmove(p->r + at + 1, p->r + at, (p->n - at) * sizeof *p->r);
        p->n++;
    } else {
        remove_ranges(p, at + 1, end - at - 1);
    }
    p->r[at] = x;
    return true;
}

static bool with_range(struct part *p, struct offset_range x)
{
    if (x.from <= p->base) {
        raise_base(p, x.to);
        return true;
    }
    return insert(p, x);
}

lm_status dlq_marks_add(dlq_marks *m, int partition, int64_t from, int64_t to)
{
    if (partition >= m->n)
        return LM_TOO_LARGE;    /* it came while we were at work */
    struct part *p = &m->part[partition], next = *p;
    next.r = lm_reallocarray(NULL, p->n + 1, sizeof *next.r);
    if (!next.r)
        return LM_NOMEM;
    if (p->n)
        memcpy(next.r, p->r, p->n * sizeof *p->r);
    next.cap = p->n + 1;
    next.changed = true;
    bool good = with_range(&next, (struct offset_range){ from, to }) &&
                (!next.n || offset_map_size(next.base, next.r, next.n) + SPARE <= m->most);
    free(good ? p->r : next.r);
    if (good)
        *p = next;
    return good ? LM_OK : LM_TOO_LARGE;
}

bool dlq_marks_commit(const dlq_marks *m, int partition, int64_t *offset,
                      char map[OFFSET_MAP_MAX + 1])
{
    const struct part *p = &m->part[partition];
    size_t covered;
    *offset = p->base;
    map[0] = '\0';
    if (p->changed && p->n)
        offset_map_encode(p->base, p->r, p->n, OFFSET_MAP_MAX, map, &covered);
    return p->changed;
}

void dlq_marks_committed(dlq_marks *m)
{
    for (int i = 0; i < m->n; i++)
        m->part[i].changed = false;
}
