/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sched_world.h - a scheduler's world without a device: requests of one sequence, a pool, adapters,
 * a queue. For tests of plans.
 */
#ifndef LORAMILL_TESTS_SCHED_WORLD_H
#define LORAMILL_TESTS_SCHED_WORLD_H

#include <stdlib.h>
#include <string.h>

#include "engine/sched.h"

#define MAX_BLOCKS 512
#define BT 16
#define MAX_ADAPTERS 512

struct world {
    struct pool pool;
    struct evict evict;
    struct prefix prefix;
    int cap, n;                 /* requests */
    struct request *req;
    struct seq *seq;
    int32_t *blocks;            /* [cap][MAX_BLOCKS] */
    int32_t tokens[8192];
    struct engine_adapter adapter[MAX_ADAPTERS];
    struct queue queue;
    struct estimate estimate;
    struct engine_policy policy;
    struct sched_view view;
    struct plan plan;
};

static struct world *world_sized(int cap, int n_blocks, int max_seqs, int max_step_tokens)
{
    struct world *w = calloc(1, sizeof *w);
    assert_non_null(w);
    w->cap = cap;
    w->req = calloc((size_t)cap, sizeof *w->req);
    w->seq = calloc((size_t)cap, sizeof *w->seq);
    w->blocks = calloc((size_t)cap * MAX_BLOCKS, sizeof *w->blocks);
    assert_true(w->req && w->seq && w->blocks);
    assert_int_equal(pool_init(&w->pool, n_blocks, NULL), LM_OK);
    assert_int_equal(evict_init(&w->evict, n_blocks, NULL), LM_OK);
    assert_int_equal(prefix_init(&w->prefix, &w->pool, &w->evict, BT, true, NULL), LM_OK);
    assert_int_equal(plan_init(&w->plan, max_seqs, NULL), LM_OK);
    assert_int_equal(queue_init(&w->queue, cap, true, NULL), LM_OK);
    engine_policy_default(&w->policy);
    w->view = (struct sched_view){
        .prefix = &w->prefix, .queue = &w->queue, .estimate = &w->estimate, .policy = &w->policy,
        .block_tokens = BT, .max_seqs = max_seqs, .max_step_tokens = max_step_tokens,
        .kv_room = SCHED_NO_LIMIT, .adapter_room = SCHED_NO_LIMIT, .lora_rows = INT64_MAX / 2,
    };
    assert_int_equal(seq_list_reserve(&w->view.running, max_seqs + 64), LM_OK);
    for (int i = 0; i < MAX_ADAPTERS; i++)
        w->adapter[i].image.rank_max = 8;
    return w;
}

static inline struct world *world_new(int n_blocks, int max_seqs, int max_step_tokens)
{
    return world_sized(128, n_blocks, max_seqs, max_step_tokens);
}

static void world_free(struct world *w)
{
    seq_list_release(&w->view.running);
    for (int i = 0; i < w->n; i++) {
        if (tree_has(&w->seq[i].queued.age))
            queue_remove(&w->queue, &w->seq[i], 0);
        queue_leave(&w->queue, &w->req[i]);
    }
    queue_release(&w->queue);
    plan_release(&w->plan);
    prefix_release(&w->prefix);
    evict_release(&w->evict);
    pool_release(&w->pool);
    free(w->req);
    free(w->seq);
    free(w->blocks);
    free(w);
}

/* What a request may be, beside its prompt. */
struct spec {
    int priority, max_tokens;
    struct engine_adapter *adapter;
    const char *tenant;
    int64_t deadline_ms, first_by_ms, since_us;
};

static struct seq *add(struct world *w, int n_prompt, const struct spec *x)
{
    int i = w->n++;
    struct request *r = &w->req[i];
    struct seq *s = &w->seq[i];
    assert_true(i < w->cap);
    *r = (struct request){ .priority = x->priority, .order = (uint64_t)i, .seqs = s, .n_seqs = 1,
                           .n_live = 1, .adapter = x->adapter, .deadline_ms = x->deadline_ms,
                           .first_token_by_ms = x->first_by_ms, .id = (char *)"x" };
    r->params.max_tokens = x->max_tokens ? x->max_tokens : 16;
    r->params.ignore_eos = true;
    if (x->tenant)
        r->spare_account = tenant_new(x->tenant);
    queue_join(&w->queue, r);
    *s = (struct seq){ .req = r, .n_prompt = n_prompt, .n_tokens = n_prompt,
                       .cap_tokens = n_prompt + r->params.max_tokens, .tokens = w->tokens,
                       .blocks = w->blocks + (size_t)i * MAX_BLOCKS, .prefix_tail = -1 };
    return s;
}

static struct seq *add_waiting_as(struct world *w, int n_prompt, const struct spec *x)
{
    struct seq *s = add(w, n_prompt, x);
    queue_insert(&w->queue, s, x->since_us);
    return s;
}

static inline struct seq *add_waiting(struct world *w, int priority, int n_prompt,
                               struct engine_adapter *a)
{
    return add_waiting_as(w, n_prompt, &(struct spec){ .priority = priority, .adapter = a });
}

/* n_computed KV positions are in blocks; n_out tokens were generated. */
static struct seq *add_running(struct world *w, int priority, int n_prompt, int n_out,
                               int n_computed)
{
    struct seq *s = add(w, n_prompt, &(struct spec){ .priority = priority });
    s->cap_tokens = n_prompt + n_out + 16;
    s->state = SEQ_RUNNING;
    s->n_tokens += n_out;
    s->n_computed = n_computed;
    /* A prefill got the blocks of all its tokens when it was admitted. */
    bool decode = n_out > 0 && n_computed == s->n_tokens - 1;
    s->n_blocks = blocks_for(decode ? n_computed : s->n_tokens, BT);
    assert_int_equal(pool_take(&w->pool, POOL_KV, s->n_blocks, s->blocks), LM_OK);
    seq_list_insert(&w->view.running, s, 1);
    return s;
}

static struct seq *add_decode(struct world *w, int priority, int n_tokens)
{
    return add_running(w, priority, n_tokens - 1, 1, n_tokens - 1);
}

static struct engine_adapter *add_adapter(struct world *w, int i, enum residency_state state,
                                          int n_blocks, int users)
{
    struct engine_adapter *a = &w->adapter[i];
    a->n_blocks = n_blocks;
    a->version.serial = (uint64_t)i + 1;
    a->res.state = state;
    a->res.users = users;
    return a;
}

/* `idle`: blocks of idle adapters, which are not in this world's pool. */
static const struct plan *plan(struct world *w, int idle)
{
    w->view.reclaimable = w->view.spare = w->pool.n_free + idle;
    queue_settle(&w->queue);
    sched_plan(&w->view, &w->plan);
    return &w->plan;
}

static bool in_list(struct seq *const *l, int n, const struct seq *s)
{
    for (int i = 0; i < n; i++)
        if (l[i] == s)
            return true;
    return false;
}

static inline bool in_items(const struct plan *p, const struct seq *s)
{
    for (int i = 0; i < p->n_items; i++)
        if (p->item[i].seq == s)
            return true;
    return false;
}

static inline bool is_admitted(const struct plan *p, const struct seq *s)
{
    return in_list(p->admit, p->n_admit, s);
}

#endif
