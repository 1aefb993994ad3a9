/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sched_admit.c - who joins the batch.
 *
 * Whoever fits is admitted, with all blocks of its prompt and a reserve for those that decode. Who
 * does not fit, or whose adapter is still on its way, is passed over and blocks nobody. Order:
 *
 *  A. by right: who was overtaken max_overtaken times; of the first priority, whose deadline is
 *     near. If such a one finds no room, nobody is admitted past it. One admission in
 *     SCHED_AGED_SHARE is of who has waited longest, once that is more than max_wait_ms, whatever
 *     its rank.
 *  B. under overload, of the first priority, those with deadlines, newest first: they still can be
 *     in time, and S-LoRA's theorem says that serving the latest serves the most (arXiv 2311.03285,
 *     appendix B).
 *  C. then by priority; at each, first the lanes of the batch: those who wait for an adapter that
 *     is in it already, by rank, unless their tenant is far ahead of others; then the next in the
 *     order of service, whose lane joins. Without grouping, the order of service alone.
 *
 * A wanted adapter that is not resident is loaded if it, and the first of those who want it, fit;
 * both are charged, so that the room is still there when the upload has passed. Once the batch is
 * full, the adapters of those next in line are loaded, as far as nothing leaves for it that someone
 * waits for.
 *
 * Being overtaken is counted: each of the first SCHED_LOOKAHEAD in the order of service gets one
 * for each later one that C admits before it. So nobody starves: who is due is admitted before
 * anyone else, and what runs comes to an end.
 */
#include "engine/sched_int.h"

/* Of each order, how many are looked at for rights and deadlines in one plan. */
#define MAX_LOOKS_BY_RIGHT 64
#define MAX_LOOKS_LATE 128
/* Lanes: so many in a row that can't be taken, and the lane is left. */
#define MAX_SKIPPED 16
/* Walks of the prefix cache in one plan, for those that don't fit without. */
#define MAX_MATCHES 16
#define NEAR_US 50000

struct round {
    const struct sched_view *v;
    struct plan *p;
    struct sched_scratch *x;
    int n_running;
    int expected;               /* seats that loading adapters' sequences will take */
    int looks, matches;         /* left */
    int next;                   /* in x->order */
    int since_aged;
    struct tree_node *aged;     /* the oldest not looked at */
    bool blocked;               /* someone by right found no room */
};

/* ---- time ------------------------------------------------------------------------------ */

static double load_us(const struct sched_view *v, const struct engine_adapter *a)
{
    if (!a || a->res.state != RES_HOST)
        return 0;
    return v->costs.copy_fixed + a->n_blocks * v->costs.copy_block;
}

/* Until its first (or next) token, if it is admitted now. */
static double first_us(const struct sched_view *v, const struct plan *p, const struct seq *s)
{
    return load_us(v, s->req->adapter) +
           estimate_prefill_us(v->estimate, p->prefill_ahead + s->n_tokens, v->max_step_tokens);
}

/* Output tokens that it still needs at least, or by experience, after the next one. */
static int rest_tokens(const struct sched_view *v, const struct seq *s, bool at_least)
{
    const struct engine_params *ep = &s->req->params;
    int most = s->cap_tokens - s->n_prompt, n = most;
    if (!ep->ignore_eos)
        n = at_least ? ep->min_tokens : (int)v->estimate->output;
    return LM_MIN(n, most) - seq_n_output(s) - 1;
}

static double left_us(const struct sched_view *v, int64_t deadline_ms)
{
    return (double)(deadline_ms - v->now_ms) * 1000;
}

/* It can't be in time any more, even if it is admitted now. */
static bool too_late(const struct sched_view *v, const struct plan *p, const struct seq *s)
{
    const struct request *r = s->req;
    double first = first_us(v, p, s);
    if (r->first_token_by_ms && !r->first_token_us && first > left_us(v, r->first_token_by_ms))
        return true;
    return r->deadline_ms && first + estimate_decode_us(v->estimate, rest_tokens(v, s, true)) >
                                 left_us(v, r->deadline_ms);
}

/* It will be too late unless it is admitted soon. */
static bool is_near(const struct sched_view *v, const struct plan *p, const struct seq *s)
{
    const struct request *r = s->req;
    double first = first_us(v, p, s), margin = first / 2 + NEAR_US;
    if (r->first_token_by_ms && !r->first_token_us)
        return first + margin > left_us(v, r->first_token_by_ms);
    return first + margin + estimate_decode_us(v->estimate, rest_tokens(v, s, false)) >
           left_us(v, r->deadline_ms);
}

/* Ends with the request, so none of its sequences may run, and none is admitted in this plan. */
static void expire(struct plan *p, struct seq *s)
{
    const struct request *r = s->req;
    for (int i = 0; i < r->n_seqs; i++)
        if (r->seqs[i].state == SEQ_RUNNING)
            return;
    for (int i = 0; i < r->n_seqs; i++)
        known_get(&p->scratch->seqs, &r->seqs[i])->fate = FATE_EXPIRED;
    p->expire[p->n_expire++] = s;
}

void plan_expiries(const struct sched_view *v, struct plan *p)
{
    struct tree_node *n = tree_first(&v->queue->by_deadline);
    if (!v->policy->early_abort || !estimate_is_fresh(v->estimate, v->now_us))
        return;
    for (int i = 0, marked = 0; n && i < MAX_LOOKS_LATE; n = tree_next(n), i++) {
        struct seq *s = queue_by_deadline(n);
        bool seen = known_find(&p->scratch->seqs, s) != NULL;
        marked += s->req->n_seqs;
        if (marked > SCHED_LOOKAHEAD)           /* siblings take places in the table */
            return;
        if (!seen && too_late(v, p, s))
            expire(p, s);
    }
}

/* ---- one sequence ---------------------------------------------------------------------- */

static const void *lane_key(const struct round *c, const struct engine_adapter *a)
{
    return a ? (const void *)a : (const void *)c->x;
}

static bool is_full(const struct round *c)
{
    return c->n_running + c->p->n_admit >= c->v->max_seqs || c->p->tokens == 0;
}

/* Room that admission leaves to those that run: half a block each, which lasts them half a block's
 * tokens before anyone must be preempted. None when nothing runs, so that whatever fits an empty
 * pool is admitted to one. */
static int decode_reserve(const struct round *c)
{
    return LM_DIV_UP(c->n_running + c->p->n_admit, 2);
}

/* Choices after the first wait for its prompt, which they then find in the prefix cache. */
static bool waits_for_leader(const struct seq *s)
{
    const struct seq *leader = &s->req->seqs[0];
    return s->index > 0 && leader->state != SEQ_DONE && leader->n_computed < s->n_prompt &&
           s->n_tokens == s->n_prompt;
}

/* Blocks that relying on this adapter takes out of the budget: an idle one is no longer
 * reclaimable, one in host memory needs its own. */
static int adapter_cost(const struct engine_adapter *a, const struct known *k)
{
    if (!a || a->res.state == RES_LOADING || a->res.users > 0 || k->charged)
        return 0;
    return a->n_blocks;
}

static bool blocks_fit(const struct round *c, int kv, int adapter)
{
    const struct plan *p = c->p;
    return kv + adapter + decode_reserve(c) <= p->budget && kv <= p->kv_budget &&
           (adapter == 0 || (adapter <= p->adapter_budget && p->slots > 0));
}

/* Blocks that admitting `s` takes out of the budget, given what the prefix cache has: matched
 * blocks are not taken, but the idle ones among them are no longer reclaimable. */
static int admission_blocks(struct round *c, const struct seq *s, int cost)
{
    int bt = c->v->block_tokens, need = blocks_for(s->n_tokens, bt), idle;
    if (blocks_fit(c, need, cost) || c->matches == 0)
        return need;            /* fits even without: no need to look */
    c->matches--;
    int hit = prefix_match(c->v->prefix, seq_version(s), seq_tokens(s), seq_cacheable_blocks(s, bt),
                           &idle);
    return need - hit + idle;
}

static void charge(struct plan *p, struct engine_adapter *a, struct known *k, int cost, int blocks)
{
    p->budget -= cost + blocks;
    p->spare -= cost + blocks;
    p->kv_budget -= blocks;
    p->adapter_budget -= cost;
    if (cost == 0)
        return;
    k->charged = true;
    p->slots--;
    p->charged[p->n_charged++] = a;
}

/* Its weights are on their way, or will be: others of the lane need not be looked at. */
static void expect(struct round *c, struct engine_adapter *a, struct known *k)
{
    k->expected = true;
    c->expected += c->v->policy->group ? queue_lane(c->v->queue, a)->n : 1;
    if (a->res.state == RES_HOST)
        c->p->load[c->p->n_load++] = a;
}

static enum fate consider(struct round *c, struct seq *s, bool by_right)
{
    struct plan *p = c->p;
    struct engine_adapter *a = s->req->adapter;
    bool ready = !a || a->res.state == RES_RESIDENT;
    p->n_unready += !ready;
    if (waits_for_leader(s) || s->pending)
        return FATE_COPY;
    struct known *k = known_get(&c->x->adapters, lane_key(c, a));
    if (k->expected)
        return FATE_COPY;
    if (!ready && a->res.state == RES_HOST && !by_right &&
        c->n_running + p->n_admit + c->expected >= c->v->max_seqs)
        return FATE_NO_ROOM;    /* the seats are taken by those whose weights come first */
    int cost = adapter_cost(a, k), blocks = admission_blocks(c, s, cost);
    if (!blocks_fit(c, blocks, cost) || (ready && plan_fit_tokens(p, s, 1) == 0))
        return FATE_NO_ROOM;
    charge(p, a, k, cost, blocks);
    if (ready)
        return FATE_ADMITTED;
    expect(c, a, k);
    return FATE_COPY;
}

/* ---- lanes of the batch ---------------------------------------------------------------- */

static void sift(struct lane *h, int n, int i)
{
    for (int k; (k = 2 * i + 1) < n; i = k) {
        k += k + 1 < n && seq_before(h[k + 1].head, h[k].head);
        if (!seq_before(h[k].head, h[i].head))
            return;
        struct lane t = h[i];
        h[i] = h[k];
        h[k] = t;
    }
}

static void lane_push(struct sched_scratch *x, struct lane lane)
{
    int i = x->n_lanes++;
    for (; i > 0 && seq_before(lane.head, x->lane[(i - 1) / 2].head); i = (i - 1) / 2)
        x->lane[i] = x->lane[(i - 1) / 2];
    x->lane[i] = lane;
}

/* This adapter is in the batch. */
static void lane_join(struct round *c, const struct engine_adapter *a)
{
    struct known *k = known_get(&c->x->adapters, lane_key(c, a));
    if (k->lane)
        return;
    k->lane = true;
    struct seq *head = queue_in_lane(tree_first(queue_lane(c->v->queue, a)));
    if (c->v->policy->group && head && c->x->n_lanes < c->x->cap_lanes)
        lane_push(c->x, (struct lane){ head, 0 });
}

/* The first lane goes on to its next, or ends. */
static void lane_advance(struct round *c, bool taken)
{
    struct sched_scratch *x = c->x;
    struct lane *l = &x->lane[0];
    l->skipped = taken ? 0 : l->skipped + 1;
    l->head = queue_in_lane(tree_next(&l->head->queued.lane));
    if (!l->head || l->skipped == MAX_SKIPPED)
        *l = x->lane[--x->n_lanes];
    sift(x->lane, x->n_lanes, 0);
}

/* Its tenant has not had much more than whoever has had least. */
static bool is_fair(const struct round *c, const struct seq *s)
{
    const struct tenant *least = TREE_OF(tree_first(&c->v->queue->tenants.level), struct tenant,
                                         level);
    uint64_t slack = (uint64_t)c->v->max_step_tokens * SCHED_FAIR_STEPS;
    return s->req->account->counter <= least->counter + slack;
}

/* ---- taking ---------------------------------------------------------------------------- */

static bool is_aged(const struct sched_view *v, const struct seq *s)
{
    return v->policy->max_wait_ms > 0 &&
           v->now_us - s->queued.since_us > v->policy->max_wait_ms * 1000;
}

static enum fate take(struct round *c, struct seq *s, bool by_right)
{
    struct plan *p = c->p;
    enum fate fate = consider(c, s, by_right);
    c->looks--;
    if (fate == FATE_ADMITTED) {
        int n = s->n_swapped ? 0 : plan_fit_tokens(p, s, s->n_tokens);
        p->admit[p->n_admit++] = s;
        if (n > 0)
            plan_add_item(p, s, n);
        lane_join(c, s->req->adapter);
        c->since_aged = is_aged(c->v, s) ? 0 : c->since_aged + 1;
        fate = by_right ? FATE_FIRST : FATE_ADMITTED;
    }
    c->blocked = c->blocked || (by_right && fate == FATE_NO_ROOM);
    known_get(&c->x->seqs, s)->fate = (uint8_t)fate;
    return fate;
}

static bool is_seen(const struct round *c, const struct seq *s)
{
    return known_find(&c->x->seqs, s) != NULL;
}

/* With no block left beside the reserve nobody fits, whatever the prefix cache has of it: at least
 * one token is always computed. */
static bool may_go_on(const struct round *c)
{
    return !c->blocked && c->looks > 0 && !is_full(c) && c->p->budget > decode_reserve(c);
}

/* ---- A: by right ----------------------------------------------------------------------- */

static void take_due(struct round *c)
{
    struct tree_node *n = tree_first(&c->v->queue->due);
    for (int i = 0; n && i < MAX_LOOKS_BY_RIGHT && may_go_on(c); n = tree_next(n), i++)
        if (!is_seen(c, queue_by_due(n)))
            take(c, queue_by_due(n), true);
}

/* The oldest that has waited too long and was not looked at, when it is its turn. */
static struct seq *aged_turn(struct round *c)
{
    if (c->since_aged < SCHED_AGED_SHARE - 1)
        return NULL;
    while (c->aged && is_seen(c, queue_by_age(c->aged)))
        c->aged = tree_next(c->aged);
    struct seq *s = queue_by_age(c->aged);
    return s && is_aged(c->v, s) ? s : NULL;
}

/* ---- the order of service -------------------------------------------------------------- */

/* The i-th in it, read as far as needed; NULL at its end, or the lookahead's. */
static struct seq *in_order(struct round *c, int i)
{
    struct sched_scratch *x = c->x;
    while (x->n_order <= i && x->n_order < SCHED_LOOKAHEAD && x->reads > 0) {
        struct seq *s = queue_next(&x->cursor);
        x->reads--;
        if (!s)
            return NULL;
        if (!waits_for_leader(s))
            x->order[x->n_order++] = s;
    }
    return i < x->n_order ? x->order[i] : NULL;
}

static struct seq *next_in_order(struct round *c)
{
    struct seq *s;
    while ((s = in_order(c, c->next)) != NULL && is_seen(c, s))
        c->next++;
    return s;
}

/* ---- A and B: deadlines --------------------------------------------------------------- */

static void take_near(struct round *c)
{
    const struct seq *first = next_in_order(c);
    struct tree_node *n = tree_first(&c->v->queue->by_deadline);
    for (int i = 0; first && n && i < MAX_LOOKS_BY_RIGHT && may_go_on(c); n = tree_next(n), i++) {
        struct seq *s = queue_by_deadline(n);
        if (s->req->priority >= first->req->priority && !is_seen(c, s) && is_near(c->v, c->p, s))
            take(c, s, true);
    }
}

static void take_newest(struct round *c)
{
    const struct seq *first = next_in_order(c);
    struct tree_node *n = tree_last(&c->v->queue->by_deadline);
    for (int i = 0; first && n && i < SCHED_LOOKAHEAD && may_go_on(c); n = tree_prev(n), i++) {
        struct seq *s = queue_by_deadline(n);
        if (s->req->priority >= first->req->priority && !is_seen(c, s) && is_fair(c, s))
            take(c, s, false);
    }
}

/* ---- C: by priority, the batch's lanes first ------------------------------------------- */

static void take_from_lane(struct round *c)
{
    struct seq *s = c->x->lane[0].head;
    bool may = !is_seen(c, s) && is_fair(c, s);
    lane_advance(c, may && take(c, s, false) == FATE_ADMITTED);
}

static void take_in_order(struct round *c)
{
    while (may_go_on(c)) {
        struct seq *s = aged_turn(c);
        if (s) {
            if (take(c, s, true) == FATE_COPY)
                c->since_aged = 0;      /* its weights come; others go on meanwhile */
            continue;
        }
        s = next_in_order(c);
        const struct seq *lane = c->x->n_lanes > 0 ? c->x->lane[0].head : NULL;
        if (lane && (!s || lane->req->priority >= s->req->priority))
            take_from_lane(c);
        else if (s)
            take(c, s, false);
        else
            return;
    }
}

/* ---- D: those next in line ------------------------------------------------------------- */

/* The batch is full. An idle adapter of one of those stays, one in host memory is loaded. */
static void prefetch(struct round *c)
{
    struct plan *p = c->p;
    for (int i = 0; i < SCHED_PREFETCH; i++) {
        const struct seq *s = in_order(c, c->next + i);
        if (!s)
            return;
        struct engine_adapter *a = s->req->adapter;
        if (!a || is_seen(c, s))
            continue;
        struct known *k = known_get(&c->x->adapters, a);
        int cost = adapter_cost(a, k), blocks = blocks_for(s->n_tokens, c->v->block_tokens);
        p->n_unready += a->res.state != RES_RESIDENT;
        if (cost == 0 || k->expected || !blocks_fit(c, blocks, cost) ||
            (a->res.state == RES_HOST && cost > p->spare))
            continue;
        charge(p, a, k, cost, blocks);
        if (a->res.state == RES_HOST)
            expect(c, a, k);
    }
}

/* ---- being overtaken ------------------------------------------------------------------- */

static void count_passed(struct round *c)
{
    struct plan *p = c->p;
    int later = 0;
    for (int i = 0; i < p->n_admit; i++)
        later += known_find(&c->x->seqs, p->admit[i])->fate == FATE_ADMITTED;
    if (later == 0)
        return;
    in_order(c, SCHED_LOOKAHEAD - 1);
    for (int i = 0; i < c->x->n_order && later > 0; i++) {
        const struct known *k = known_find(&c->x->seqs, c->x->order[i]);
        enum fate fate = k ? (enum fate)k->fate : FATE_UNSEEN;
        if (fate == FATE_ADMITTED)
            later--;
        else if (fate == FATE_UNSEEN || fate == FATE_NO_ROOM)
            p->passed[p->n_passed++] = (struct plan_passed){ c->x->order[i], later };
    }
}

/* Adapters of those that run. */
static void join_lanes(struct round *c)
{
    for (int i = 0; i < c->n_running; i++) {
        const struct engine_adapter *a = c->v->running.at[i]->req->adapter;
        c->p->slots -= a && !known_get(&c->x->adapters, a)->lane;
        lane_join(c, a);
    }
}

void plan_admissions(const struct sched_view *v, struct plan *p, int n_running)
{
    struct sched_scratch *x = p->scratch;
    struct round c = {
        .v = v, .p = p, .x = x, .n_running = n_running, .looks = SCHED_LOOKAHEAD,
        .matches = MAX_MATCHES, .since_aged = v->queue->since_aged,
        .aged = tree_first(&v->queue->by_age),
    };
    x->n_order = x->n_lanes = 0;
    x->reads = MAX_READS;
    queue_rewind(v->queue, &x->cursor, x->turn);
    if ((!is_full(&c) && v->policy->group) || v->policy->adapter_slots > 0)
        join_lanes(&c);
    take_due(&c);
    if (v->policy->early_abort && estimate_overloaded(v->estimate, v->now_us))
        take_newest(&c);
    else
        take_near(&c);
    take_in_order(&c);
    if (is_full(&c) && v->policy->prefetch && !c.blocked)
        prefetch(&c);
    count_passed(&c);
}
