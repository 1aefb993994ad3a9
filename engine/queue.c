/* SPDX-License-Identifier: Apache-2.0 */
/*
 * queue.c - see queue.h. What the trees are ordered by (priority, arrival, since when it waits, the
 * deadline that binds) is fixed while a sequence waits.
 *
 * The cursor merges tenants without touching them. Those that have yielded something lie in a heap
 * with the counter they would have by then; the others stand in the tenants' own order. The next is
 * the lesser of both heads, so k sequences cost O(k log k) however many tenants and sequences wait.
 */
#include "engine/queue.h"

#include "engine/adapters.h"

bool seq_before(const struct seq *a, const struct seq *b)
{
    if (a->req->priority != b->req->priority)
        return a->req->priority > b->req->priority;
    if (a->req->order != b->req->order)
        return a->req->order < b->req->order;
    return a->index < b->index;
}

static bool by_arrival(const struct seq *a, const struct seq *b)
{
    return a->req->order != b->req->order ? a->req->order < b->req->order : a->index < b->index;
}

static bool turn_before(const struct tree_node *a, const struct tree_node *b)
{
    return seq_before(TREE_OF(a, struct seq, queued.turn), TREE_OF(b, struct seq, queued.turn));
}

static bool lane_before(const struct tree_node *a, const struct tree_node *b)
{
    return seq_before(TREE_OF(a, struct seq, queued.lane), TREE_OF(b, struct seq, queued.lane));
}

static bool older(const struct seq *a, const struct seq *b)
{
    return a->queued.since_us != b->queued.since_us ? a->queued.since_us < b->queued.since_us
                                                    : by_arrival(a, b);
}

static bool age_before(const struct tree_node *a, const struct tree_node *b)
{
    return older(TREE_OF(a, struct seq, queued.age), TREE_OF(b, struct seq, queued.age));
}

static bool due_before(const struct tree_node *a, const struct tree_node *b)
{
    return older(TREE_OF(a, struct seq, queued.due), TREE_OF(b, struct seq, queued.due));
}

static bool deadline_before(const struct tree_node *x, const struct tree_node *y)
{
    const struct seq *a = TREE_OF(x, struct seq, queued.deadline);
    const struct seq *b = TREE_OF(y, struct seq, queued.deadline);
    return a->queued.deadline_ms != b->queued.deadline_ms
               ? a->queued.deadline_ms < b->queued.deadline_ms
               : by_arrival(a, b);
}

lm_status queue_init(struct queue *q, int n_requests, bool fair, struct lm_err *err)
{
    *q = (struct queue){ 0 };
    tree_init(&q->base_lane, lane_before);
    tree_init(&q->by_age, age_before);
    tree_init(&q->by_deadline, deadline_before);
    tree_init(&q->due, due_before);
    return tenants_init(&q->tenants, n_requests, fair, turn_before, err);
}

void queue_release(struct queue *q)
{
    tenants_release(&q->tenants);
    *q = (struct queue){ 0 };
}

void queue_join(struct queue *q, struct request *r)
{
    r->account = tenants_join(&q->tenants, r->spare_account);
    r->spare_account = NULL;
}

void queue_leave(struct queue *q, struct request *r)
{
    if (r->account)
        tenants_leave(&q->tenants, r->account);
    r->account = NULL;
}

static struct tree *lane_of(struct queue *q, const struct seq *s)
{
    struct tree *lane = s->req->adapter ? &s->req->adapter->res.lane : &q->base_lane;
    if (!lane->before)
        tree_init(lane, lane_before);
    return lane;
}

const struct tree *queue_lane(const struct queue *q, const struct engine_adapter *a)
{
    return a ? &a->res.lane : &q->base_lane;
}

void queue_insert(struct queue *q, struct seq *s, int64_t now_us)
{
    struct seq_queued *k = &s->queued;
    k->since_us = now_us - k->waited_us;
    k->deadline_ms = request_deadline(s->req);
    tree_insert(&s->req->account->waiting, &k->turn);
    tree_insert(lane_of(q, s), &k->lane);
    tree_insert(&q->by_age, &k->age);
    if (k->deadline_ms)
        tree_insert(&q->by_deadline, &k->deadline);
    tenants_update(&q->tenants, s->req->account);
    q->n++;
    q->prompt_tokens += (uint64_t)s->n_prompt;
}

void queue_remove(struct queue *q, struct seq *s, int64_t now_us)
{
    struct seq_queued *k = &s->queued;
    tree_remove(&s->req->account->waiting, &k->turn);
    tree_remove(lane_of(q, s), &k->lane);
    tree_remove(&q->by_age, &k->age);
    if (tree_has(&k->deadline))
        tree_remove(&q->by_deadline, &k->deadline);
    if (tree_has(&k->due))
        tree_remove(&q->due, &k->due);
    tenants_update(&q->tenants, s->req->account);
    k->waited_us = LM_MAX(now_us - k->since_us, 0);
    k->overtaken = 0;
    q->n--;
    q->prompt_tokens -= (uint64_t)s->n_prompt;
}

void queue_redate(struct queue *q, struct seq *s)
{
    struct seq_queued *k = &s->queued;
    if (tree_has(&k->deadline))
        tree_remove(&q->by_deadline, &k->deadline);
    k->deadline_ms = request_deadline(s->req);
    if (k->deadline_ms)
        tree_insert(&q->by_deadline, &k->deadline);
}

void queue_overtaken(struct queue *q, struct seq *s, int by, int max)
{
    s->queued.overtaken += by;
    if (s->queued.overtaken >= max && !tree_has(&s->queued.due))
        tree_insert(&q->due, &s->queued.due);
}

void queue_charge(struct queue *q, struct request *r, uint64_t tokens)
{
    tenants_charge(&q->tenants, r->account, tokens);
}

void queue_settle(struct queue *q)
{
    tenants_settle(&q->tenants);
}

/* ---- the order of service -------------------------------------------------------------- */

static bool turn_less(const struct queue_turn *a, const struct queue_turn *b)
{
    if (a->priority != b->priority)
        return a->priority > b->priority;
    return a->counter != b->counter ? a->counter < b->counter : a->tenant->id < b->tenant->id;
}

static void sift_down(struct queue_turn *h, int n)
{
    for (int i = 0, c; (c = 2 * i + 1) < n; i = c) {
        c += c + 1 < n && turn_less(&h[c + 1], &h[c]);
        if (!turn_less(&h[c], &h[i]))
            return;
        struct queue_turn t = h[i];
        h[i] = h[c];
        h[c] = t;
    }
}

static void push(struct queue_cursor *c, const struct queue_turn *turn)
{
    struct queue_turn *h = c->heap;
    int i = c->n++;
    for (; i > 0 && turn_less(turn, &h[(i - 1) / 2]); i = (i - 1) / 2)
        h[i] = h[(i - 1) / 2];
    h[i] = *turn;
}

void queue_rewind(const struct queue *q, struct queue_cursor *c, struct queue_turn *heap)
{
    *c = (struct queue_cursor){ .untouched = tree_first(&q->tenants.turn), .heap = heap };
}

/* The tenant's next sequence, and its turn after that; false: it has no more. */
static bool yield(struct queue_turn *t, struct seq **s)
{
    *s = TREE_OF((struct tree_node *)(uintptr_t)t->next, struct seq, queued.turn);
    t->counter += (uint64_t)(*s)->n_prompt + 1;
    t->next = tree_next(t->next);
    const struct seq *after = TREE_OF((struct tree_node *)(uintptr_t)t->next, struct seq,
                                      queued.turn);
    t->priority = after ? after->req->priority : 0;
    return after != NULL;
}

struct seq *queue_next(struct queue_cursor *c)
{
    struct seq *s;
    const struct tenant *t = TREE_OF(c->untouched, struct tenant, turn);
    struct queue_turn fresh = { 0 };
    if (t)
        fresh = (struct queue_turn){ t, tree_first(&t->waiting), t->counter, t->priority };
    if (t && (c->n == 0 || turn_less(&fresh, &c->heap[0]))) {
        c->untouched = tree_next(c->untouched);
        if (yield(&fresh, &s))
            push(c, &fresh);
        return s;
    }
    if (c->n == 0)
        return NULL;
    if (!yield(&c->heap[0], &s))
        c->heap[0] = c->heap[--c->n];
    sift_down(c->heap, c->n);
    return s;
}

/* ---- checks ---------------------------------------------------------------------------- */

lm_status queue_check(const struct queue *q, struct lm_err *err)
{
    const struct tenants *ts = &q->tenants;
    int n = 0;
    if (!tree_ok(&ts->turn) || !tree_ok(&ts->level) || !tree_ok(&ts->idle) ||
        !tree_ok(&q->by_age) || !tree_ok(&q->by_deadline) || !tree_ok(&q->due))
        return lm_err_set(err, LM_INTERNAL, "an order of the queue is broken");
    for (const struct tree_node *a = tree_first(&ts->turn); a; a = tree_next(a)) {
        const struct tenant *t = TREE_OF(a, struct tenant, turn);
        n += t->waiting.n;
        if (!t->waiting.n || !tree_ok(&t->waiting))
            return lm_err_set(err, LM_INTERNAL, "a tenant's order is broken");
    }
    if (n != q->n || q->by_age.n != q->n || ts->turn.n != ts->level.n)
        return lm_err_set(err, LM_INTERNAL, "%d sequences wait, %d by turn, %d by age", q->n, n,
                          q->by_age.n);
    for (struct tree_node *a = tree_first(&q->by_age); a; a = tree_next(a)) {
        const struct seq *s = queue_by_age(a);
        if (!tree_has(&s->queued.turn) || !tree_has(&s->queued.lane) ||
            tree_has(&s->queued.deadline) != (s->queued.deadline_ms != 0))
            return lm_err_set(err, LM_INTERNAL, "a sequence of request '%s' waits in part",
                              s->req->id);
    }
    return LM_OK;
}
