/* SPDX-License-Identifier: Apache-2.0 */
/*
 * queue.h - the sequences that wait, in every order that the planner asks for.
 *
 *     cursor        the order of service: priority, the tenant that has had least, arrival
 *     lanes         the same adapter's, by rank: who else wants it
 *     by age        by how long they have waited
 *     by deadline   those that have one
 *     due           those that were overtaken as often as is allowed, by age
 *
 * Each is a tree of nodes embedded in the sequence, so joining and leaving take O(log n) and no
 * memory, and reading the front costs what is read, however many wait.
 *
 * Rank: priority (higher first), then arrival, then choice. A preempted sequence keeps its own.
 *
 * Ownership: none of the sequences. Lanes lie in their adapters (adapters.h), the base model's
 * here. Threads: the engine thread's.
 */
#ifndef LORAMILL_ENGINE_QUEUE_H
#define LORAMILL_ENGINE_QUEUE_H

#include "engine/request.h"
#include "engine/tenants.h"

struct queue {
    struct tenants tenants;
    struct tree base_lane;
    struct tree by_age, by_deadline, due;
    int n;
    int since_aged;             /* admissions since that of one that had waited too long */
    uint64_t prompt_tokens;     /* of all that wait */
};

/* `n_requests`: about so many at a time. `fair`: tenants share. */
lm_status queue_init(struct queue *q, int n_requests, bool fair, struct lm_err *err);
void queue_release(struct queue *q);

/* True when a goes before b in rank. */
bool seq_before(const struct seq *a, const struct seq *b);

/* A request arrives, before any of its sequences; it ends, after all of them. */
void queue_join(struct queue *q, struct request *r);
void queue_leave(struct queue *q, struct request *r);

void queue_insert(struct queue *q, struct seq *s, int64_t now_us);
void queue_remove(struct queue *q, struct seq *s, int64_t now_us);

/* It is about to leave, to run; `aged`: it has waited longer than is allowed. */
static inline void queue_admitted(struct queue *q, bool aged)
{
    q->since_aged = aged ? 0 : q->since_aged + 1;
}

/* The deadline that binds its request is another. */
void queue_redate(struct queue *q, struct seq *s);
/* `by` later ones were admitted before it; from `max` on it is due. */
void queue_overtaken(struct queue *q, struct seq *s, int by, int max);

/* The tenant of this request was served so many virtual tokens; from the next settle on. */
void queue_charge(struct queue *q, struct request *r, uint64_t tokens);
void queue_settle(struct queue *q);

/* The lane of an adapter, or of the base model (NULL): its sequences by rank. */
const struct tree *queue_lane(const struct queue *q, const struct engine_adapter *a);

/* Walks of the other orders; NULL at the end. */
static inline struct seq *queue_in_lane(struct tree_node *n)
{
    return TREE_OF(n, struct seq, queued.lane);
}

static inline struct seq *queue_by_age(struct tree_node *n)
{
    return TREE_OF(n, struct seq, queued.age);
}

static inline struct seq *queue_by_deadline(struct tree_node *n)
{
    return TREE_OF(n, struct seq, queued.deadline);
}

static inline struct seq *queue_by_due(struct tree_node *n)
{
    return TREE_OF(n, struct seq, queued.due);
}

/* ---- the order of service -------------------------------------------------------------- */

/* A tenant that has yielded something, and what it would have been served by then. */
struct queue_turn {
    const struct tenant *tenant;
    const struct tree_node *next;
    uint64_t counter;
    int priority;
};

/* Scratch of a walk; the queue must not change meanwhile. */
struct queue_cursor {
    const struct tree_node *untouched;  /* first tenant that has yielded nothing */
    struct queue_turn *heap;    /* [as many as are asked for] */
    int n;
};

void queue_rewind(const struct queue *q, struct queue_cursor *c, struct queue_turn *heap);
/* The next in the order of service, as if all before it had been served; NULL at the end. */
struct seq *queue_next(struct queue_cursor *c);

/* Every order holds the same; for checking builds, O(n log n). LM_INTERNAL names what is wrong. */
lm_status queue_check(const struct queue *q, struct lm_err *err);

#endif
