/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tenants.c - see tenants.h. Invariants:
 *  1. On `turn` and `level` exactly if `waiting` is not empty; on `idle` exactly if it has no
 *     requests and is in the table.
 *  2. Keys in those trees are `priority` and `counter`; both change only while out of them.
 *  3. Nobody on `level` is below the floor that it was lifted to when it began to wait.
 */
#include "engine/tenants.h"

#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "engine/request.h"

static bool turn_before(const struct tree_node *x, const struct tree_node *y)
{
    const struct tenant *a = TREE_OF(x, struct tenant, turn), *b = TREE_OF(y, struct tenant, turn);
    if (a->priority != b->priority)
        return a->priority > b->priority;
    return a->counter != b->counter ? a->counter < b->counter : a->id < b->id;
}

static bool level_before(const struct tree_node *x, const struct tree_node *y)
{
    const struct tenant *a = TREE_OF(x, struct tenant, level);
    const struct tenant *b = TREE_OF(y, struct tenant, level);
    return a->counter != b->counter ? a->counter < b->counter : a->id < b->id;
}

static bool idle_before(const struct tree_node *x, const struct tree_node *y)
{
    const struct tenant *a = TREE_OF(x, struct tenant, idle), *b = TREE_OF(y, struct tenant, idle);
    return a->counter != b->counter ? a->counter < b->counter : a->id < b->id;
}

lm_status tenants_init(struct tenants *ts, int n, bool fair, tree_before *rank, struct lm_err *err)
{
    *ts = (struct tenants){ .n_buckets = 64, .fair = fair, .next_id = 1 };
    while (ts->n_buckets < (uint32_t)n && ts->n_buckets < 1u << 16)
        ts->n_buckets *= 2;
    tree_init(&ts->turn, turn_before);
    tree_init(&ts->level, level_before);
    tree_init(&ts->idle, idle_before);
    tree_init(&ts->common.waiting, rank);
    ts->bucket = lm_calloc(ts->n_buckets, sizeof(struct tenant *));
    return ts->bucket ? LM_OK : lm_err_set(err, LM_NOMEM, "no memory for a table of tenants");
}

void tenants_release(struct tenants *ts)
{
    for (uint32_t b = 0; ts->bucket && b < ts->n_buckets; b++) {
        for (struct tenant *t = ts->bucket[b], *next; t; t = next) {
            next = t->chain;
            tenant_free(t);
        }
    }
    free(ts->bucket);
    *ts = (struct tenants){ 0 };
}

struct tenant *tenant_new(const char *name)
{
    struct tenant *t = lm_calloc(1, sizeof *t);
    if (!t)
        return NULL;
    t->name = lm_strdup(name);
    if (!t->name) {
        free(t);
        return NULL;
    }
    t->hash = XXH3_64bits(name, strlen(name));
    return t;
}

void tenant_free(struct tenant *t)
{
    if (!t)
        return;
    free(t->name);
    free(t);
}

/* Where the table points, or would point, at this name. */
static struct tenant **find(const struct tenants *ts, const struct tenant *like)
{
    struct tenant **at = &ts->bucket[like->hash & (ts->n_buckets - 1)];
    while (*at && ((*at)->hash != like->hash || strcmp((*at)->name, like->name) != 0))
        at = &(*at)->chain;
    return at;
}

/* Forgets one that has no requests. */
static void forget(struct tenants *ts, struct tenant *t)
{
    *find(ts, t) = t->chain;
    ts->n--;
    if (ts->last == t) {
        ts->last = NULL;
        if (ts->level.n == 0)   /* else whoever waits decides */
            ts->floor = LM_MAX(ts->floor, t->counter);
    }
    tenant_free(t);
}

/* Of those without requests, whoever stands no higher than a newcomer would is one. */
static void forget_idle(struct tenants *ts)
{
    struct tree_node *n;
    while ((n = tree_first(&ts->idle)) != NULL) {
        struct tenant *t = TREE_OF(n, struct tenant, idle);
        if (t->counter > ts->floor && ts->idle.n <= TENANTS_MAX_IDLE)
            return;
        tree_remove(&ts->idle, n);
        forget(ts, t);
    }
}

struct tenant *tenants_join(struct tenants *ts, struct tenant *spare)
{
    struct tenant *t = &ts->common;
    if (ts->fair && spare) {
        struct tenant **at = find(ts, spare);
        if (!*at) {
            *at = spare;
            spare->id = ts->next_id++;
            tree_init(&spare->waiting, ts->common.waiting.before);
            ts->n++;
            spare = NULL;
        }
        t = *at;
        if (tree_has(&t->idle))
            tree_remove(&ts->idle, &t->idle);
    }
    tenant_free(spare);
    t->n_requests++;
    return t;
}

void tenants_leave(struct tenants *ts, struct tenant *t)
{
    if (--t->n_requests > 0 || t == &ts->common)
        return;
    if (t->owes)                /* or the list would keep a pointer to it */
        tenants_settle(ts);
    tree_insert(&ts->idle, &t->idle);
    forget_idle(ts);
}

static void leave_trees(struct tenants *ts, struct tenant *t)
{
    tree_remove(&ts->turn, &t->turn);
    tree_remove(&ts->level, &t->level);
}

static void enter_trees(struct tenants *ts, struct tenant *t)
{
    tree_insert(&ts->turn, &t->turn);
    tree_insert(&ts->level, &t->level);
}

static void raise_floor(struct tenants *ts)
{
    const struct tenant *least = TREE_OF(tree_first(&ts->level), struct tenant, level);
    if (!least)
        least = ts->last;
    if (least)
        ts->floor = LM_MAX(ts->floor, least->counter);
}

void tenants_update(struct tenants *ts, struct tenant *t)
{
    const struct seq *first = TREE_OF(tree_first(&t->waiting), struct seq, queued.turn);
    bool was = tree_has(&t->turn);
    if (first && was && t->priority == first->req->priority)
        return;
    if (was)
        leave_trees(ts, t);
    if (!first) {
        if (was)
            ts->last = t;
        return;
    }
    if (!was) {
        raise_floor(ts);
        t->counter = LM_MAX(t->counter, ts->floor);
    }
    t->priority = first->req->priority;
    enter_trees(ts, t);
}

void tenants_charge(struct tenants *ts, struct tenant *t, uint64_t tokens)
{
    t->owed += tokens;
    if (t->owes)
        return;
    t->owes = true;
    t->owed_next = ts->owing;
    ts->owing = t;
}

void tenants_settle(struct tenants *ts)
{
    while (ts->owing) {
        struct tenant *t = ts->owing;
        bool waits = tree_has(&t->turn), idle = tree_has(&t->idle);
        ts->owing = t->owed_next;
        t->owes = false;
        if (waits)
            leave_trees(ts, t);
        if (idle)
            tree_remove(&ts->idle, &t->idle);
        t->counter += t->owed;
        t->owed = 0;
        if (waits)
            enter_trees(ts, t);
        if (idle)
            tree_insert(&ts->idle, &t->idle);
    }
    raise_floor(ts);
    forget_idle(ts);
}
