/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tenants.h - who has had how much: fair share by virtual token counters (Sheng et al., "Fairness
 * in Serving Large Language Models", arXiv 2401.00588).
 *
 * Each tenant has a counter of tokens served: a prompt token weighs 1, a generated one 2. Of those
 * that wait at one priority, whoever has the least is served next. A tenant that comes back to the
 * queue is lifted to the least counter there, so that nobody saves up service while away.
 *
 * Life of a tenant: made with its first request, on the caller's thread (tenant_new), so that the
 * engine thread allocates nothing; found by name by all later ones; kept while it has requests, and
 * after them while its counter is above what a newcomer would be lifted to. What can't matter any
 * more goes at once, so tenants that were ever seen cost nothing.
 *
 * Charges are gathered (tenants_charge) and take effect together (tenants_settle), once a turn:
 * counters are keys of the trees below.
 *
 * Threads: tenant_new and tenant_free any; the rest the engine thread's.
 */
#ifndef LORAMILL_ENGINE_TENANTS_H
#define LORAMILL_ENGINE_TENANTS_H

#include "engine/tree.h"

struct seq;

/* Virtual tokens for one that was generated; one of a prompt is one. */
#define TENANTS_OUTPUT_WEIGHT 2

/* Tenants without requests that are remembered for their counters. */
#define TENANTS_MAX_IDLE 4096

struct tenant {
    char *name;
    uint64_t hash, id;          /* id: order of arrival; decides between equals */
    uint64_t counter;
    uint64_t owed;              /* charged, not yet in the counter */
    struct tenant *chain;       /* same bucket */
    struct tenant *owed_next;
    bool owes;                  /* on that list */
    int n_requests;             /* live ones */
    int priority;               /* of the first in `waiting`; a key of the trees */
    struct tree waiting;        /* its sequences in rank order (queue.c) */
    struct tree_node turn;      /* among those that wait: priority, counter, id */
    struct tree_node level;     /* the same, by counter alone */
    struct tree_node idle;      /* without requests, by counter */
};

struct tenants {
    struct tenant **bucket;     /* [n_buckets], a power of two */
    uint32_t n_buckets;
    int n;                      /* in the table */
    struct tree turn, level, idle;
    struct tenant *owing;
    struct tenant *last;        /* the last that stopped waiting */
    uint64_t floor;             /* what a newcomer is lifted to at least */
    uint64_t next_id;
    bool fair;
    struct tenant common;       /* everyone's when not fair, and who names none */
};

/* About so many tenants at a time are found quickly. */
lm_status tenants_init(struct tenants *ts, int n, bool fair, tree_before *rank, struct lm_err *err);
void tenants_release(struct tenants *ts);

struct tenant *tenant_new(const char *name);    /* NULL: no memory */
void tenant_free(struct tenant *t);

/* The tenant of a request that arrives. `spare` (or NULL: nameless) is taken over or freed. */
struct tenant *tenants_join(struct tenants *ts, struct tenant *spare);
/* One of its requests has ended; the tenant may be gone afterwards. */
void tenants_leave(struct tenants *ts, struct tenant *t);

/* Its `waiting` has changed: it takes, keeps, moves or loses its place. */
void tenants_update(struct tenants *ts, struct tenant *t);

void tenants_charge(struct tenants *ts, struct tenant *t, uint64_t tokens);
void tenants_settle(struct tenants *ts);

#endif
