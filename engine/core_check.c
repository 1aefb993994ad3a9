/* SPDX-License-Identifier: Apache-2.0 */
/*
 * core_check.c - the engine's books against each other, after every turn of a checking build (any
 * sanitizer, or -DLORAMILL_CHECKS). O(blocks) a step, so not in others.
 *
 * The one question is whether every reference has a holder: a block's count must equal the running
 * sequences that list it, plus one if the prefix cache has it, plus one if a resident adapter lies
 * in it. A leak and a double release both show here, in the step that made them.
 */
#include "engine/core_int.h"

#include <stdlib.h>

static void add_blocks(int32_t *held, const int32_t *blocks, int n)
{
    for (int i = 0; i < n; i++)
        held[blocks[i]]++;
}

static void add_list(int32_t *held, const struct adapter_list *l, int *idle_blocks)
{
    for (const struct engine_adapter *a = l->head; a; a = a->res.next) {
        add_blocks(held, a->res.blocks, a->n_blocks);
        *idle_blocks += a->n_blocks;
    }
}

static lm_status check_swap(const struct core *c, struct lm_err *err)
{
    int n = 0;
    for (struct tree_node *a = tree_first(&c->queue.by_age); a; a = tree_next(a))
        n += queue_by_age(a)->n_swapped;
    for (int i = 0; i < c->running.n; i++) {
        const struct seq *s = c->running.at[i];
        n += s->n_swapped;
        if (s->resuming != (s->n_swapped > 0))
            return lm_err_set(err, LM_INTERNAL, "request '%s' has %d blocks swapped and %s",
                              s->req->id, s->n_swapped, s->resuming ? "resumes" : "runs");
    }
    if (n != swap_count(&c->swap) || n != c->swap.n_slots - c->swap.n_free)
        return lm_err_set(err, LM_INTERNAL, "%d blocks are swapped, %d of %d slots are taken", n,
                          swap_count(&c->swap), c->swap.n_slots);
    return LM_OK;
}

/* An adapter in use is on no list: it is met through its running sequences, the first of which adds
 * its blocks. */
static lm_status add_running(const struct core *c, int32_t *held, struct lm_err *err)
{
    for (int i = 0; i < c->running.n; i++) {
        const struct seq *s = c->running.at[i];
        const struct engine_adapter *a = s->req->adapter;
        int users = 0, earlier = 0;
        add_blocks(held, s->blocks, s->n_blocks);
        for (int k = 0; a && k < c->running.n; k++) {
            users += c->running.at[k]->req->adapter == a;
            earlier += k < i && c->running.at[k]->req->adapter == a;
        }
        if (a && (users != a->res.users || a->res.state != RES_RESIDENT))
            return lm_err_set(err, LM_INTERNAL, "adapter '%s' has %d users and state %d; %d "
                                                "sequences use it", a->id, a->res.users,
                              a->res.state, users);
        if (a && earlier == 0)
            add_blocks(held, a->res.blocks, a->n_blocks);
        if (s->state != SEQ_RUNNING || s->n_computed > s->n_blocks * c->p.block_tokens ||
            s->n_computed > seq_length(s))
            return lm_err_set(err, LM_INTERNAL, "request '%s': %d of %d tokens computed in %d "
                                                "blocks", s->req->id, s->n_computed, s->n_tokens,
                              s->n_blocks);
    }
    return LM_OK;
}

/* The eviction order counts who waits for a version; the queue knows. */
static lm_status check_lane(const struct core *c, const struct engine_adapter *a,
                            struct lm_err *err)
{
    const struct evict_version *v = a ? &a->version : &c->evict.base;
    int n = 0;
    for (struct tree_node *s = tree_first(queue_lane(&c->queue, a)); s; s = tree_next(s))
        n++;
    return n == v->waiting ? LM_OK
                           : lm_err_set(err, LM_INTERNAL, "%d sequences wait for adapter '%s'; the "
                                                          "eviction order counts %d", n,
                                        a ? a->id : "", v->waiting);
}

static lm_status check_waiting(const struct core *c, struct lm_err *err)
{
    lm_status st = check_lane(c, NULL, err);
    if (st != LM_OK)
        return st;
    for (struct tree_node *n = tree_first(&c->queue.by_age); n; n = tree_next(n)) {
        const struct seq *s = queue_by_age(n);
        if (s->state != SEQ_WAITING || s->n_blocks || s->n_computed || s->pending)
            return lm_err_set(err, LM_INTERNAL, "request '%s' waits in state %d with %d blocks",
                              s->req->id, s->state, s->n_blocks);
        if (s->queued.deadline_ms != request_deadline(s->req))
            return lm_err_set(err, LM_INTERNAL, "request '%s' waits by another deadline than binds "
                                                "it", s->req->id);
        const struct engine_adapter *a = s->req->adapter;
        if (a && tree_first(queue_lane(&c->queue, a)) == &s->queued.lane &&
            (st = check_lane(c, a, err)) != LM_OK)
            return st;
    }
    return queue_check(&c->queue, err);
}

lm_status core_check(const struct core *c, struct lm_err *err)
{
    int idle = 0, loading = 0;
    lm_status st = pool_check(&c->pool, err);
    if (st == LM_OK)
        st = prefix_check(&c->prefix, err);
    if (st == LM_OK)
        st = evict_check(&c->evict, err);
    if (st == LM_OK)
        st = check_waiting(c, err);
    if (st == LM_OK)
        st = check_swap(c, err);
    int32_t *held = lm_calloc((size_t)c->pool.n_blocks, sizeof *held);
    if (st != LM_OK || !held) {
        free(held);
        return st;
    }
    st = add_running(c, held, err);
    add_list(held, &c->tier.idle, &idle);
    add_list(held, &c->tier.loading, &loading);
    if (st == LM_OK && idle != c->tier.idle_blocks)
        st = lm_err_set(err, LM_INTERNAL, "idle adapters have %d blocks, the book says %d", idle,
                        c->tier.idle_blocks);
    for (int32_t b = 0; st == LM_OK && b < c->pool.n_blocks; b++)
        if (held[b] + c->prefix.entry[b].cached != c->pool.refs[b])
            st = lm_err_set(err, LM_INTERNAL, "block %d has %d references and %d holders", b,
                            c->pool.refs[b], held[b] + c->prefix.entry[b].cached);
    free(held);
    return st;
}
