/* SPDX-License-Identifier: Apache-2.0 */
/*
 * evict.c - what is cheapest to lose, for each block that it frees, leaves first.
 *
 * What is idle costs nothing until someone needs its blocks, so nothing leaves early. When room is
 * needed, evicting item i of n blocks saves n blocks now and costs, later, what getting it back
 * takes, as often as it is wanted. So the policy evicts the item with the least
 *
 *     score = level + uses * cost / n                                     microseconds a block
 *
 *   cost   prefixes: computing a block's tokens again, at the measured speed of prefill (n = 1).
 *          adapters: the upload, a fixed part and one for each block, as measured. On a 7B model a
 *          block of 16 tokens takes 8 MiB: 3 ms to compute, 0.7 ms to copy; with grouped-query
 *          attention the copy shrinks with the block and the computation does not. Size enters
 *          through the fixed part only: bytes freed and bytes to reload grow alike.
 *   uses   how often it is expected to be wanted before it would leave anyhow. Adapters: how often
 *          they were used, up to 4, halved whenever they leave, so popularity outlives an eviction
 *          and fades. Prefixes, by class: 4 if found often, 1 if found a few times, and if never,
 *          the share of blocks that ever are, measured: each end of a sequence leaves blocks that
 *          mostly nobody asks for again, and those must not push out an adapter.
 *   level  recency. An item that becomes idle gets the current level, which is the largest score
 *          that has left so far; so what stays untouched sinks, relative to what comes, by what
 *          memory costs meanwhile (GreedyDual-Size-Frequency: Cao and Irani 1997, Cherkasova 1998).
 *          Within a level the longest idle goes first: equal costs and uses give LRU.
 *
 * Who waits: weights with a sequence in the queue, and prefixes of that version that were ever
 * found again, are `wanted`: they leave only when nothing unwanted is idle. A block that was
 * never found is not wanted, whoever waits: those that wait bring prompts of their own. Prefixes
 * of a version that is gone can never be found and leave when it goes (prefix_forget()).
 *
 * Children before parents, which prefix.c needs: a parent is found whenever its child is, so its
 * class is no lower; it becomes idle no earlier, so its level is no lower; in one queue it stands
 * behind. Hence its (wanted, score) is above its child's, or equal in the same queue.
 *
 * Why heaps of queues, not of blocks: within a queue uses and cost are the same and levels ascend,
 * so its head is its minimum, and a version that becomes wanted moves a few queues however many
 * blocks it has. Costs drift as they are measured; scores use values that are renewed, with both
 * heaps, when one is off by half.
 *
 * Measured (test_evict prints it; docs/engine.md has the table): on popular and rare adapters of
 * mixed rank with shared and single prompts, misses cost 0.53 to 0.74 of what they cost under
 * least recently used, the more the larger the pool. Neither 4 nor 64 for the cap on an
 * adapter's uses, nor 1/8 or 1/256 for the least share of found blocks, changes that by more
 * than a tenth.
 */
#include "engine/evict.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>

#include "engine/prefix.h"
#include "engine/residency.h"

#define USES_SOME 1.0
#define USES_MANY 4.0
#define FOUND_FIRST (1.0 / 8)
#define FOUND_LEAST (1.0 / 64)
#define FOUND_MOST (1.0 / 2)            /* below USES_SOME, always */
#define FOUND_WEIGHT (1.0 / 512)        /* of one sighting in the running mean */
#define COST_WEIGHT (1.0 / 32)          /* of one measurement */
#define DRIFT 1.5
#define COST_LEAST 1e-3

lm_status evict_init(struct evict *e, int32_t n_blocks, struct lm_err *err)
{
    static const struct evict_costs guess = { .prefill_block = 1000, .copy_block = 250,
                                              .copy_fixed = 50 };
    *e = (struct evict){ .measured = guess, .used = guess, .found = FOUND_FIRST,
                         .found_used = FOUND_FIRST };
    evict_version_init(&e->base, 0);
    for (int k = 0; k < EVICT_KINDS; k++) {
        e->heap[k].cap = n_blocks;
        e->heap[k].at = lm_calloc((size_t)n_blocks + 1, sizeof *e->heap[k].at);
    }
    if (e->heap[EVICT_PREFIX].at && e->heap[EVICT_ADAPTER].at)
        return LM_OK;
    evict_release(e);
    return lm_err_set(err, LM_NOMEM, "no memory for the eviction order of %d blocks", n_blocks);
}

void evict_release(struct evict *e)
{
    for (int k = 0; k < EVICT_KINDS; k++)
        free(e->heap[k].at);
    *e = (struct evict){ 0 };
}

void evict_version_init(struct evict_version *v, uint64_t serial)
{
    *v = (struct evict_version){ .serial = serial };
    for (int c = 0; c < EVICT_CLASSES; c++)
        v->prefix[c] = (struct evict_queue){ .kind = EVICT_PREFIX, .cls = (uint8_t)c, .head = -1,
                                             .tail = -1 };
    v->weights = (struct evict_queue){ .kind = EVICT_ADAPTER, .head = -1, .tail = -1 };
}

struct evict_version *evict_version_of(struct evict_queue *q)
{
    size_t at = q->kind == EVICT_ADAPTER ? offsetof(struct evict_version, weights)
                                         : offsetof(struct evict_version, prefix);
    return (struct evict_version *)((char *)(q - q->cls) - at);
}

/* ---- scores ---------------------------------------------------------------------------- */

static double score(const struct evict *e, const struct evict_queue *q)
{
    const double uses[EVICT_CLASSES] = { e->found_used, USES_SOME, USES_MANY };
    const struct evict_costs *c = &e->used;
    if (q->kind == EVICT_PREFIX)
        return q->age.level + uses[q->cls] * c->prefill_block;
    return q->age.level + q->worth * (c->copy_fixed / q->blocks + c->copy_block);
}

static bool is_wanted(struct evict_queue *q)
{
    return evict_version_of(q)->waiting > 0 && (q->kind == EVICT_ADAPTER || q->cls > 0);
}

static bool before(const struct evict_queue *a, const struct evict_queue *b)
{
    if (a->wanted != b->wanted)
        return b->wanted;
    return a->score != b->score ? a->score < b->score : a->age.tick < b->age.tick;
}

/* ---- heap ------------------------------------------------------------------------------ */

static void put(struct evict_heap *h, int i, struct evict_queue *q)
{
    h->at[i] = q;
    q->at = i;
}

static void sift_up(struct evict_heap *h, int i)
{
    struct evict_queue *q = h->at[i];
    for (; i > 1 && before(q, h->at[i / 2]); i /= 2)
        put(h, i, h->at[i / 2]);
    put(h, i, q);
}

static void sift_down(struct evict_heap *h, int i)
{
    struct evict_queue *q = h->at[i];
    for (int child = 2 * i; child <= h->n; child = 2 * i) {
        child += child < h->n && before(h->at[child + 1], h->at[child]);
        if (!before(h->at[child], q))
            break;
        put(h, i, h->at[child]);
        i = child;
    }
    put(h, i, q);
}

static void heap_remove(struct evict_heap *h, struct evict_queue *q)
{
    int i = q->at;
    struct evict_queue *last = h->at[h->n--];
    q->at = 0;
    if (last == q)
        return;
    put(h, i, last);
    sift_up(h, i);
    sift_down(h, last->at);
}

static void place(struct evict *e, struct evict_queue *q)
{
    struct evict_heap *h = &e->heap[q->kind];
    if (!q->at)
        put(h, ++h->n, q);
    sift_up(h, q->at);
    sift_down(h, q->at);
}

/* Costs have changed: every score, and both heaps from the bottom. */
static void rebuild(struct evict *e)
{
    e->used = e->measured;
    e->found_used = e->found;
    e->rebuilds++;
    for (int k = 0; k < EVICT_KINDS; k++) {
        struct evict_heap *h = &e->heap[k];
        for (int i = 1; i <= h->n; i++)
            h->at[i]->score = score(e, h->at[i]);
        for (int i = h->n / 2; i > 0; i--)
            sift_down(h, i);
    }
}

static bool drifted(double now, double used)
{
    return now > used * DRIFT || now * DRIFT < used;
}

static void maybe_rebuild(struct evict *e)
{
    const struct evict_costs *m = &e->measured, *u = &e->used;
    if (drifted(m->prefill_block, u->prefill_block) || drifted(m->copy_block, u->copy_block) ||
        drifted(m->copy_fixed, u->copy_fixed) || drifted(e->found, e->found_used))
        rebuild(e);
}

/* ---- reports --------------------------------------------------------------------------- */

void evict_update(struct evict *e, struct evict_queue *q, int32_t blocks, struct evict_age age)
{
    e->blocks[q->wanted] -= q->blocks;
    q->blocks = blocks;
    if (blocks == 0) {
        if (q->at)
            heap_remove(&e->heap[q->kind], q);
        return;
    }
    q->age = age;
    q->wanted = is_wanted(q);
    q->score = score(e, q);
    e->blocks[q->wanted] += blocks;
    place(e, q);
}

static void renew(struct evict *e, struct evict_queue *q)
{
    if (q->blocks > 0)
        evict_update(e, q, q->blocks, q->age);
}

void evict_waiting(struct evict *e, struct evict_version *v, int by)
{
    if (!v)
        v = &e->base;
    bool was = v->waiting > 0;
    v->waiting += by;
    if (was == (v->waiting > 0))
        return;
    for (int c = 1; c < EVICT_CLASSES; c++)
        renew(e, &v->prefix[c]);
    renew(e, &v->weights);
}

void evict_saw(struct evict *e, bool found)
{
    e->found += (found - e->found) * FOUND_WEIGHT;
    e->found = LM_MIN(LM_MAX(e->found, FOUND_LEAST), FOUND_MOST);
    maybe_rebuild(e);
}

void evict_measured_prefill(struct evict *e, double us_per_block)
{
    double *m = &e->measured.prefill_block;
    *m += (us_per_block - *m) * COST_WEIGHT;
    *m = LM_MAX(*m, COST_LEAST);
    maybe_rebuild(e);
}

void evict_measured_copy(struct evict *e, double us_one, double us_n, int n)
{
    double each = n > 1 ? (us_n - us_one) / (n - 1) : us_one;
    each = LM_MIN(LM_MAX(each, us_n / n / 4), us_n / n);        /* against a disturbed timing */
    e->measured.copy_block = LM_MAX(each, COST_LEAST);
    e->measured.copy_fixed = LM_MAX(us_one - each, COST_LEAST);
    maybe_rebuild(e);
}

/* ---- choosing -------------------------------------------------------------------------- */

/* The next of either kind to leave. */
static struct evict_queue *next_of_all(const struct evict *e)
{
    struct evict_queue *p = evict_least(e, EVICT_PREFIX), *a = evict_least(e, EVICT_ADAPTER);
    return !a || (p && !before(a, p)) ? p : a;
}

int evict_reclaimable(const struct prefix *p, const struct residency_tier *t)
{
    (void)t;
    return p->pool->n_free + p->evict->blocks[false] + p->evict->blocks[true];
}

int evict_spare(const struct prefix *p, const struct residency_tier *t)
{
    (void)t;
    return p->pool->n_free + p->evict->blocks[false];
}

static bool evict_head(struct prefix *p, struct residency_tier *t, struct evict_queue *q)
{
    if (!q)
        return false;
    p->evict->now.level = LM_MAX(p->evict->now.level, q->score);
    if (q->kind == EVICT_PREFIX)
        prefix_evict_head(p, q);
    else
        residency_evict_weights(t, q);
    return true;
}

bool evict_kind(struct prefix *p, struct residency_tier *t, enum evict_kind kind)
{
    return evict_head(p, t, evict_least(p->evict, kind));
}

lm_status evict_until(struct prefix *p, struct residency_tier *t, int n)
{
    while (p->pool->n_free < n)
        if (!evict_head(p, t, next_of_all(p->evict)))
            return LM_BUSY;
    return LM_OK;
}

/* ---- a split pool ---------------------------------------------------------------------- */

void evict_limit(struct evict *e, int32_t n_blocks, int adapter_percent, int slots)
{
    e->slots = LM_MAX(slots, 0);
    if (adapter_percent <= 0 || adapter_percent >= 100)
        return;
    e->cap[EVICT_ADAPTER] = LM_MAX((int32_t)((int64_t)n_blocks * adapter_percent / 100), 1);
    e->cap[EVICT_PREFIX] = LM_MAX(n_blocks - e->cap[EVICT_ADAPTER], 1);
}

static int taken(const struct prefix *p, enum evict_kind kind)
{
    return p->pool->count[kind == EVICT_PREFIX ? POOL_KV : POOL_ADAPTER];
}

static bool slots_full(const struct prefix *p, const struct residency_tier *t)
{
    return p->evict->slots > 0 && t->n_resident + t->n_loading >= p->evict->slots;
}

lm_status evict_for(struct prefix *p, struct residency_tier *t, enum evict_kind kind, int n)
{
    int32_t cap = p->evict->cap[kind];
    while (cap > 0 && taken(p, kind) + n > cap)
        if (!evict_kind(p, t, kind))
            return LM_BUSY;
    while (kind == EVICT_ADAPTER && slots_full(p, t))
        if (!evict_kind(p, t, kind))
            return LM_BUSY;
    return evict_until(p, t, n);
}

int evict_room(const struct prefix *p, const struct residency_tier *t, enum evict_kind kind)
{
    const struct evict *e = p->evict;
    if (kind == EVICT_ADAPTER && slots_full(p, t) && !evict_least(e, kind))
        return 0;
    if (e->cap[kind] == 0)
        return evict_reclaimable(p, t);
    int idle = kind == EVICT_PREFIX ? p->n_idle : t->idle_blocks;
    return e->cap[kind] - taken(p, kind) + idle;
}

/* ---- checking -------------------------------------------------------------------------- */

static lm_status check_queue(const struct evict *e, const struct evict_heap *h, int i,
                             struct lm_err *err)
{
    struct evict_queue *q = h->at[i];
    double want = score(e, q);
    if (q->at != i || q->blocks <= 0 || (i > 1 && before(q, h->at[i / 2])))
        return lm_err_set(err, LM_INTERNAL, "eviction order: place %d, %d blocks, is out of order",
                          i, q->blocks);
    if (q->wanted != is_wanted(q) || fabs(q->score - want) > 1e-9 * fabs(want))
        return lm_err_set(err, LM_INTERNAL, "eviction order: version %llu has score %g, not %g",
                          (unsigned long long)evict_version_of(q)->serial, q->score, want);
    return LM_OK;
}

lm_status evict_check(const struct evict *e, struct lm_err *err)
{
    int32_t blocks[2] = { 0 };
    for (int k = 0; k < EVICT_KINDS; k++) {
        const struct evict_heap *h = &e->heap[k];
        for (int i = 1; i <= h->n; i++) {
            lm_status st = check_queue(e, h, i, err);
            if (st != LM_OK)
                return st;
            blocks[h->at[i]->wanted] += h->at[i]->blocks;
        }
    }
    if (blocks[0] != e->blocks[0] || blocks[1] != e->blocks[1])
        return lm_err_set(err, LM_INTERNAL,
                          "eviction order: %d + %d blocks are idle, the book says %d + %d",
                          blocks[0], blocks[1], e->blocks[0], e->blocks[1]);
    return LM_OK;
}
