/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_sched.c - plans without a device: each rule by itself, then many thousand random states
 * whose plans must keep every promise that loop.c relies on.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "engine/sched.h"

#define MAX_SEQS 64
#define MAX_BLOCKS 512
#define BT 16

/* A scheduler's world: up to MAX_SEQS requests of one sequence, a pool, a few adapters. */
struct world {
    struct pool pool;
    struct evict evict;
    struct prefix prefix;
    struct request req[MAX_SEQS];
    struct seq seq[MAX_SEQS];
    int32_t blocks[MAX_SEQS][MAX_BLOCKS];
    int32_t tokens[4096];
    int n;
    struct engine_adapter adapter[8];
    struct sched_view view;
    struct plan plan;
};

static struct world *world_new(int n_blocks, int max_seqs, int max_step_tokens)
{
    struct world *w = calloc(1, sizeof *w);
    assert_non_null(w);
    assert_int_equal(pool_init(&w->pool, n_blocks, NULL), LM_OK);
    assert_int_equal(evict_init(&w->evict, n_blocks, NULL), LM_OK);
    assert_int_equal(prefix_init(&w->prefix, &w->pool, &w->evict, BT, true, NULL), LM_OK);
    assert_int_equal(plan_init(&w->plan, max_seqs, NULL), LM_OK);
    w->view = (struct sched_view){ .prefix = &w->prefix, .block_tokens = BT,
                                   .max_seqs = max_seqs, .max_step_tokens = max_step_tokens };
    assert_int_equal(seq_list_reserve(&w->view.running, MAX_SEQS), LM_OK);
    assert_int_equal(seq_list_reserve(&w->view.waiting, MAX_SEQS), LM_OK);
    return w;
}

static void world_free(struct world *w)
{
    seq_list_release(&w->view.running);
    seq_list_release(&w->view.waiting);
    plan_release(&w->plan);
    prefix_release(&w->prefix);
    evict_release(&w->evict);
    pool_release(&w->pool);
    free(w);
}

static struct seq *add(struct world *w, int priority, int n_prompt)
{
    int i = w->n++;
    struct request *r = &w->req[i];
    struct seq *s = &w->seq[i];
    assert_true(i < MAX_SEQS);
    *r = (struct request){ .priority = priority, .order = (uint64_t)i, .seqs = s, .n_seqs = 1 };
    r->params.max_tokens = 16;
    *s = (struct seq){ .req = r, .n_prompt = n_prompt, .n_tokens = n_prompt,
                       .tokens = w->tokens, .blocks = w->blocks[i], .prefix_tail = -1 };
    return s;
}

static struct seq *add_waiting(struct world *w, int priority, int n_prompt)
{
    struct seq *s = add(w, priority, n_prompt);
    seq_list_insert(&w->view.waiting, s, 1);
    return s;
}

/* n_computed KV positions are in blocks; n_out tokens were generated. */
static struct seq *add_running(struct world *w, int priority, int n_prompt, int n_out,
                               int n_computed)
{
    struct seq *s = add(w, priority, n_prompt);
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
    evict_version_init(&a->version, (uint64_t)i + 1);
    a->res.state = state;
    a->res.users = users;
    return a;
}

/* `idle`: blocks of idle adapters, which are not in this world's pool. */
static const struct plan *plan(struct world *w, int idle)
{
    w->view.reclaimable = w->pool.n_free + w->prefix.n_idle + idle;
    sched_plan(&w->view, &w->plan);
    return &w->plan;
}

/* ---- one rule each --------------------------------------------------------------------- */

static void decodes_first_then_chunks(void **state)
{
    (void)state;
    struct world *w = world_new(64, 8, 20);
    struct seq *prefill = add_running(w, 5, 100, 0, 32);
    struct seq *d1 = add_decode(w, 0, 20), *d2 = add_decode(w, 0, 21);
    add_waiting(w, 0, 10);
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_items, 3);
    assert_ptr_equal(p->item[0].seq, d1);
    assert_ptr_equal(p->item[1].seq, d2);
    assert_ptr_equal(p->item[2].seq, prefill);
    assert_int_equal(p->item[2].n_tok, 18);
    assert_int_equal(p->n_tok, 20);
    assert_int_equal(p->n_admit, 0);
    world_free(w);
}

static void admits_by_priority_then_arrival(void **state)
{
    (void)state;
    struct world *w = world_new(64, 2, 100);
    struct seq *a = add_waiting(w, 0, 10), *b = add_waiting(w, 3, 10), *c = add_waiting(w, 3, 10);
    (void)a;
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_admit, 2);
    assert_ptr_equal(p->admit[0], b);
    assert_ptr_equal(p->admit[1], c);
    world_free(w);
}

static void a_big_one_does_not_block(void **state)
{
    (void)state;
    struct world *w = world_new(10, 8, 1000);
    add_decode(w, 0, 20);
    struct seq *big = add_waiting(w, 0, 9 * BT), *small = add_waiting(w, 0, BT);
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_admit, 1);
    assert_ptr_equal(p->admit[0], small);
    assert_int_equal(p->n_overtaken, 1);
    assert_ptr_equal(p->overtaken[0], big);
    big->bypassed = SCHED_MAX_BYPASS;
    p = plan(w, 0);
    assert_int_equal(p->n_admit, 0);
    world_free(w);
}

static void fits_an_empty_pool_exactly(void **state)
{
    (void)state;
    struct world *w = world_new(10, 8, 1000);
    struct seq *s = add_waiting(w, 0, 10 * BT);
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_admit, 1);
    assert_ptr_equal(p->admit[0], s);
    world_free(w);
}

static void preempts_the_last_in_rank(void **state)
{
    (void)state;
    struct world *w = world_new(4, 8, 100);
    struct seq *old = add_decode(w, 0, BT + 1);         /* needs its second block */
    struct seq *young = add_decode(w, 0, BT + 1);
    struct seq *urgent = add_decode(w, 9, 2 * BT + 1);  /* needs its third */
    assert_int_equal(w->pool.n_free, 0);
    add_waiting(w, 9, 1);
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_preempt, 2);                  /* young for urgent, then old itself */
    assert_ptr_equal(p->preempt[0], young);
    assert_ptr_equal(p->preempt[1], old);
    assert_int_equal(p->n_items, 1);
    assert_ptr_equal(p->item[0].seq, urgent);
    assert_int_equal(p->n_admit, 0);                    /* nobody comes while somebody goes */
    world_free(w);
}

static void the_first_never_yields(void **state)
{
    (void)state;
    struct world *w = world_new(1, 8, 100);
    add_decode(w, 0, BT + 1);
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_preempt, 0);
    assert_int_equal(p->n_items, 0);
    p = plan(w, 1);                                     /* an idle adapter's block will do */
    assert_int_equal(p->n_items, 1);
    world_free(w);
}

static void adapters_are_loaded_and_waited_for(void **state)
{
    (void)state;
    struct world *w = world_new(20, 8, 1000);
    struct seq *a = add_waiting(w, 0, BT), *b = add_waiting(w, 0, BT), *c = add_waiting(w, 0, BT);
    a->req->adapter = add_adapter(w, 0, RES_HOST, 5, 0);
    b->req->adapter = a->req->adapter;
    c->req->adapter = add_adapter(w, 1, RES_LOADING, 3, 0);
    struct seq *base = add_waiting(w, 0, BT);
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_load, 1);                     /* once, for both */
    assert_ptr_equal(p->load[0], a->req->adapter);
    assert_int_equal(p->n_admit, 1);
    assert_ptr_equal(p->admit[0], base);
    assert_int_equal(p->n_overtaken, 0);                /* waiting for a copy is not starving */
    w->adapter[0].res.state = w->adapter[1].res.state = RES_RESIDENT;
    p = plan(w, 8);
    assert_int_equal(p->n_load, 0);
    assert_int_equal(p->n_admit, 4);
    world_free(w);
}

static void an_idle_adapter_leaves_the_budget_when_used(void **state)
{
    (void)state;
    struct world *w = world_new(1, 8, 1000);
    struct seq *a = add_waiting(w, 0, BT), *b = add_waiting(w, 0, BT);
    a->req->adapter = add_adapter(w, 0, RES_RESIDENT, 6, 0);
    /* One free block and six idle ones: with the adapter pinned, only the free one is left. */
    const struct plan *p = plan(w, 6);
    assert_int_equal(p->n_admit, 1);
    assert_ptr_equal(p->admit[0], a);
    w->adapter[0].res.users = 1;                        /* others use it: its blocks aren't idle */
    p = plan(w, 0);
    assert_int_equal(p->n_admit, 1);
    assert_ptr_equal(p->admit[0], a);
    assert_int_equal(p->n_overtaken, 0);
    (void)b;
    world_free(w);
}

static void a_full_batch_prefetches(void **state)
{
    (void)state;
    struct world *w = world_new(64, 1, 100);
    add_decode(w, 0, 20);
    struct seq *a = add_waiting(w, 0, BT);
    a->req->adapter = add_adapter(w, 0, RES_HOST, 5, 0);
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_admit, 0);
    assert_int_equal(p->n_load, 1);
    world_free(w);
}

static void choices_wait_for_the_first(void **state)
{
    (void)state;
    struct world *w = world_new(64, 8, 1000);
    struct seq *a = add_waiting(w, 0, 40), *b = add(w, 0, 40);
    static struct seq two[2];
    two[0] = *a;
    two[1] = *b;
    two[1].index = 1;
    two[1].req = a->req;
    a->req->seqs = two;
    a->req->n_seqs = 2;
    w->view.waiting.at[0] = &two[0];
    seq_list_insert(&w->view.waiting, &two[1], 1);
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_admit, 1);
    assert_ptr_equal(p->admit[0], &two[0]);
    two[0].n_computed = 40;
    two[0].state = SEQ_RUNNING;
    seq_list_remove(&w->view.waiting, &two[0]);
    p = plan(w, 0);
    assert_int_equal(p->n_admit, 1);
    assert_ptr_equal(p->admit[0], &two[1]);
    world_free(w);
}

/* ---- random states --------------------------------------------------------------------- */

static uint64_t rng = 88172645463325252u;

static int rnd(int below)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (int)((rng >> 33) % (uint64_t)below);
}

static bool in_items(const struct plan *p, const struct seq *s)
{
    for (int i = 0; i < p->n_items; i++)
        if (p->item[i].seq == s)
            return true;
    return false;
}

static bool in_list(struct seq *const *l, int n, const struct seq *s)
{
    for (int i = 0; i < n; i++)
        if (l[i] == s)
            return true;
    return false;
}

/* Applies the plan's block arithmetic to the real pool: what it relies on must be there. */
static void check_blocks(struct world *w, const struct plan *p, int idle)
{
    int have = w->pool.n_free + idle, need = 0;
    for (int i = 0; i < p->n_preempt; i++)
        have += p->preempt[i]->n_blocks;
    bool counted[8] = { false };
    for (int i = 0; i < p->n_items; i++) {
        const struct seq *s = p->item[i].seq;
        int upto = s->state == SEQ_RUNNING ? s->n_computed + p->item[i].n_tok : s->n_tokens;
        need += LM_MAX(0, blocks_for(upto, BT) - s->n_blocks);
    }
    for (int i = 0; i < p->n_admit; i++) {
        const struct engine_adapter *a = p->admit[i]->req->adapter;
        if (a && a->res.users == 0 && !counted[a - w->adapter]) {
            need += a->n_blocks;
            counted[a - w->adapter] = true;
        }
    }
    for (int i = 0; i < p->n_load; i++)
        need += p->load[i]->n_blocks;
    assert_true(need <= have);
}

static void check_plan(struct world *w, const struct plan *p, int idle)
{
    int tokens = 0;
    for (int i = 0; i < p->n_items; i++) {
        const struct seq *s = p->item[i].seq;
        assert_true(p->item[i].n_tok >= 1);
        assert_true(s->n_computed + p->item[i].n_tok <= s->n_tokens);
        assert_false(in_list(p->preempt, p->n_preempt, s));
        assert_true(s->state == SEQ_RUNNING || in_list(p->admit, p->n_admit, s));
        tokens += p->item[i].n_tok;
    }
    assert_int_equal(tokens, p->n_tok);
    assert_true(tokens <= w->view.max_step_tokens);
    int running = w->view.running.n - p->n_preempt + p->n_admit;
    assert_true(p->n_admit == 0 || running <= w->view.max_seqs);
    for (int i = 0; i < p->n_admit; i++) {
        const struct engine_adapter *a = p->admit[i]->req->adapter;
        assert_true(!a || a->res.state == RES_RESIDENT);
        assert_true(in_items(p, p->admit[i]));
    }
    if (w->view.running.n > 0)
        assert_false(in_list(p->preempt, p->n_preempt, w->view.running.at[0]));
    /* Who is preempted stands behind everyone who is not. */
    for (int i = 0; i + 1 < w->view.running.n; i++)
        if (in_list(p->preempt, p->n_preempt, w->view.running.at[i]))
            assert_true(in_list(p->preempt, p->n_preempt, w->view.running.at[i + 1]));
    check_blocks(w, p, idle);
}

static struct world *random_world(int *idle)
{
    struct world *w = world_new(20 + rnd(200), 1 + rnd(40), 40 + rnd(100));
    int running = rnd(LM_MIN(w->view.max_seqs, 30) + 1), waiting = rnd(30);
    *idle = 0;
    for (int i = 0; i < 8; i++) {
        int users = rnd(2), state = rnd(3);
        struct engine_adapter *a = add_adapter(w, i, (enum residency_state)state, 1 + rnd(20),
                                               state == RES_RESIDENT ? users : 0);
        if (state == RES_RESIDENT && users == 0)
            *idle += a->n_blocks;
    }
    for (int i = 0; i < running; i++) {
        int prompt = 1 + rnd(90), out = rnd(3) ? 1 + rnd(60) : 0;
        int computed = out && rnd(4) ? prompt + out - 1 : rnd(prompt);
        if (blocks_for(prompt + out, BT) > w->pool.n_free)
            break;
        add_running(w, rnd(3), prompt, out, computed);
    }
    for (int i = 0; i < waiting; i++) {
        struct seq *s = add_waiting(w, rnd(3), 1 + rnd(120));
        s->req->adapter = rnd(3) ? &w->adapter[rnd(8)] : NULL;
        s->bypassed = rnd(50) ? 0 : SCHED_MAX_BYPASS;
    }
    return w;
}

static void random_plans(void **state)
{
    (void)state;
    for (int i = 0; i < 20000; i++) {
        int idle;
        struct world *w = random_world(&idle);
        static struct seq before[MAX_SEQS];
        memcpy(before, w->seq, sizeof before);
        const struct plan *p = plan(w, idle);
        check_plan(w, p, idle);
        assert_memory_equal(before, w->seq, sizeof before);     /* planning changes nothing */
        world_free(w);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(decodes_first_then_chunks),
        cmocka_unit_test(admits_by_priority_then_arrival),
        cmocka_unit_test(a_big_one_does_not_block),
        cmocka_unit_test(fits_an_empty_pool_exactly),
        cmocka_unit_test(preempts_the_last_in_rank),
        cmocka_unit_test(the_first_never_yields),
        cmocka_unit_test(adapters_are_loaded_and_waited_for),
        cmocka_unit_test(an_idle_adapter_leaves_the_budget_when_used),
        cmocka_unit_test(a_full_batch_prefetches),
        cmocka_unit_test(choices_wait_for_the_first),
        cmocka_unit_test(random_plans),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
