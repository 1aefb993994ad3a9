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

#include "sched_world.h"

#define RND_SEED 88172645463325252u
#include "rnd.h"

/* ---- one rule each --------------------------------------------------------------------- */

static void decodes_first_then_chunks(void **state)
{
    (void)state;
    struct world *w = world_new(64, 8, 20);
    struct seq *prefill = add_running(w, 5, 100, 0, 32);
    struct seq *d1 = add_decode(w, 0, 20), *d2 = add_decode(w, 0, 21);
    add_waiting(w, 0, 10, NULL);
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
    add_waiting(w, 0, 10, NULL);
    struct seq *b = add_waiting(w, 3, 10, NULL), *c = add_waiting(w, 3, 10, NULL);
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
    struct seq *big = add_waiting(w, 0, 9 * BT, NULL), *small = add_waiting(w, 0, BT, NULL);
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_admit, 1);
    assert_ptr_equal(p->admit[0], small);
    assert_int_equal(p->n_passed, 1);
    assert_ptr_equal(p->passed[0].seq, big);
    assert_int_equal(p->passed[0].by, 1);
    queue_overtaken(&w->queue, big, w->policy.max_overtaken, w->policy.max_overtaken);
    p = plan(w, 0);
    assert_int_equal(p->n_admit, 0);
    world_free(w);
}

static void fits_an_empty_pool_exactly(void **state)
{
    (void)state;
    struct world *w = world_new(10, 8, 1000);
    struct seq *s = add_waiting(w, 0, 10 * BT, NULL);
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
    add_waiting(w, 9, 1, NULL);
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_preempt, 2);                  /* young for urgent, then old itself */
    assert_ptr_equal(p->preempt[0], young);
    assert_ptr_equal(p->preempt[1], old);
    assert_int_equal(p->n_items, 1);
    assert_ptr_equal(p->item[0].seq, urgent);
    assert_int_equal(p->n_admit, 0);                    /* nobody comes while somebody goes */
    world_free(w);
}

static void who_yields_is_swapped_where_that_is_cheaper(void **state)
{
    (void)state;
    struct world *w = world_new(4, 8, 100);
    add_decode(w, 0, 2 * BT + 1);
    struct seq *young = add_decode(w, 0, 2 * BT + 1);   /* two blocks of KV */
    w->view.swap_blocks = 2;
    w->view.costs = (struct evict_costs){ .prefill_block = 1000, .copy_block = 100,
                                          .copy_fixed = 799 };
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_preempt, 1);
    assert_ptr_equal(p->preempt[0], young);
    assert_true(p->swap[0]);                    /* 2 * (799 + 200) against 2 * 1000 */
    w->view.costs.copy_fixed = 800;
    assert_false(plan(w, 0)->swap[0]);
    w->policy.preempt = ENGINE_PREEMPT_SWAP;
    assert_true(plan(w, 0)->swap[0]);
    w->view.swap_blocks = 1;                    /* no room */
    assert_false(plan(w, 0)->swap[0]);
    w->view.swap_blocks = 2;
    young->n_swapped = 2;                       /* it is there already */
    young->resuming = true;
    assert_false(plan(w, 0)->swap[0]);
    young->n_swapped = 0;
    young->resuming = false;
    w->policy.preempt = ENGINE_PREEMPT_RECOMPUTE;
    w->view.costs.copy_fixed = 0;
    assert_false(plan(w, 0)->swap[0]);
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
    struct seq *a = add_waiting(w, 0, BT, add_adapter(w, 0, RES_HOST, 5, 0));
    add_waiting(w, 0, BT, a->req->adapter);
    add_waiting(w, 0, BT, add_adapter(w, 1, RES_LOADING, 3, 0));
    struct seq *base = add_waiting(w, 0, BT, NULL);
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_load, 1);                     /* once, for both */
    assert_ptr_equal(p->load[0], a->req->adapter);
    assert_int_equal(p->n_admit, 1);
    assert_ptr_equal(p->admit[0], base);
    assert_int_equal(p->n_passed, 0);                   /* waiting for a copy is not starving */
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
    struct seq *a = add_waiting(w, 0, BT, add_adapter(w, 0, RES_RESIDENT, 6, 0));
    struct seq *b = add_waiting(w, 0, BT, NULL);
    /* One free block and six idle ones: with the adapter pinned, only the free one is left. */
    const struct plan *p = plan(w, 6);
    assert_int_equal(p->n_admit, 1);
    assert_ptr_equal(p->admit[0], a);
    w->adapter[0].res.users = 1;                        /* others use it: its blocks aren't idle */
    p = plan(w, 0);
    assert_int_equal(p->n_admit, 1);
    assert_ptr_equal(p->admit[0], a);
    assert_int_equal(p->n_passed, 0);                   /* those before it are not overtaken */
    (void)b;
    world_free(w);
}

static void a_full_batch_prefetches(void **state)
{
    (void)state;
    struct world *w = world_new(64, 1, 100);
    add_decode(w, 0, 20);
    add_waiting(w, 0, BT, add_adapter(w, 0, RES_HOST, 5, 0));
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_admit, 0);
    assert_int_equal(p->n_load, 1);
    world_free(w);
}

static void choices_wait_for_the_first(void **state)
{
    (void)state;
    struct world *w = world_new(64, 8, 1000);
    struct seq *a = add_waiting(w, 0, 40, NULL);
    struct seq *two = calloc(2, sizeof *two);
    assert_non_null(two);
    queue_remove(&w->queue, a, 0);
    two[0] = two[1] = *a;
    two[1].index = 1;
    a->req->seqs = two;
    a->req->n_seqs = 2;
    queue_insert(&w->queue, &two[0], 0);
    queue_insert(&w->queue, &two[1], 0);
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_admit, 1);
    assert_ptr_equal(p->admit[0], &two[0]);
    two[0].n_computed = 40;
    two[0].state = SEQ_RUNNING;
    queue_remove(&w->queue, &two[0], 0);
    p = plan(w, 0);
    assert_int_equal(p->n_admit, 1);
    assert_ptr_equal(p->admit[0], &two[1]);
    queue_remove(&w->queue, &two[1], 0);
    free(two);
    world_free(w);
}

/* Requests of many choices that wait for their first one's prompt don't fill the lookahead. */
static void choices_do_not_hide_those_behind(void **state)
{
    (void)state;
    enum { N = 1000 };
    struct world *w = world_new(64, 8, 1000);
    struct seq *a = add(w, 40, &(struct spec){ 0 });
    struct seq *many = calloc(N, sizeof *many);
    assert_non_null(many);
    for (int i = 0; i < N; i++) {
        many[i] = *a;
        many[i].index = i;
        if (i > 0)
            queue_insert(&w->queue, &many[i], 0);
    }
    a->req->seqs = many;                        /* the first runs, its prompt is not computed yet */
    many[0].state = SEQ_RUNNING;
    struct seq *behind = add_waiting(w, 0, 40, NULL);
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_admit, 1);
    assert_ptr_equal(p->admit[0], behind);
    for (int i = 1; i < N; i++)
        queue_remove(&w->queue, &many[i], 0);
    free(many);
    world_free(w);
}

/* ---- grouping, bounds, fairness -------------------------------------------------------- */

/* A batch with room for one more, in which adapter 0 runs. */
static struct world *one_seat(void)
{
    struct world *w = world_new(100, 2, 100);
    struct seq *s = add_decode(w, 0, 20);
    s->req->adapter = add_adapter(w, 0, RES_RESIDENT, 1, 1);
    add_adapter(w, 1, RES_RESIDENT, 1, 0);
    return w;
}

static void lanes_of_the_batch_go_first(void **state)
{
    (void)state;
    struct world *w = one_seat();
    struct seq *other = add_waiting(w, 0, BT, &w->adapter[1]);
    struct seq *same = add_waiting(w, 0, BT, &w->adapter[0]);
    const struct plan *p = plan(w, 1);
    assert_int_equal(p->n_admit, 1);
    assert_ptr_equal(p->admit[0], same);
    assert_int_equal(p->n_passed, 1);
    assert_ptr_equal(p->passed[0].seq, other);
    w->policy.group = false;
    p = plan(w, 1);
    assert_ptr_equal(p->admit[0], other);
    assert_int_equal(p->n_passed, 0);
    world_free(w);
}

static void a_new_lane_brings_its_others(void **state)
{
    (void)state;
    struct world *w = world_new(100, 2, 100);
    add_adapter(w, 0, RES_RESIDENT, 1, 0);
    add_adapter(w, 1, RES_RESIDENT, 1, 0);
    struct seq *a1 = add_waiting(w, 0, BT, &w->adapter[0]);
    struct seq *b1 = add_waiting(w, 0, BT, &w->adapter[1]);
    struct seq *a2 = add_waiting(w, 0, BT, &w->adapter[0]);
    const struct plan *p = plan(w, 2);
    assert_int_equal(p->n_admit, 2);
    assert_true(is_admitted(p, a1) && is_admitted(p, a2) && !is_admitted(p, b1));
    world_free(w);
}

static void priority_stands_above_grouping(void **state)
{
    (void)state;
    struct world *w = one_seat();
    add_waiting(w, 0, BT, &w->adapter[0]);
    struct seq *high = add_waiting(w, 1, BT, &w->adapter[1]);
    assert_ptr_equal(plan(w, 1)->admit[0], high);
    world_free(w);
}

static void who_is_due_goes_first(void **state)
{
    (void)state;
    struct world *w = one_seat();
    struct seq *due = add_waiting(w, 0, BT, &w->adapter[1]);
    add_waiting(w, 5, BT, &w->adapter[0]);
    queue_overtaken(&w->queue, due, w->policy.max_overtaken - 1, w->policy.max_overtaken);
    assert_false(is_admitted(plan(w, 1), due));
    queue_overtaken(&w->queue, due, 1, w->policy.max_overtaken);
    const struct plan *p = plan(w, 1);
    assert_int_equal(p->n_admit, 1);
    assert_ptr_equal(p->admit[0], due);
    assert_int_equal(p->n_passed, 0);           /* by right, so it overtook nobody */
    world_free(w);
}

static void age_has_its_share(void **state)
{
    (void)state;
    struct world *w = one_seat();
    struct seq *old = add_waiting(w, 0, BT, &w->adapter[1]);
    struct seq *high = add_waiting_as(w, BT, &(struct spec){ .priority = 5, .since_us = 1000000 });
    w->policy.max_wait_ms = 1000;
    w->view.now_us = 1000000;
    for (int i = 0; i < SCHED_AGED_SHARE; i++)
        queue_admitted(&w->queue, false);
    assert_ptr_equal(plan(w, 1)->admit[0], high);       /* it has not waited longer than that yet */
    w->view.now_us++;
    assert_ptr_equal(plan(w, 1)->admit[0], old);
    queue_admitted(&w->queue, true);
    assert_ptr_equal(plan(w, 1)->admit[0], high);       /* the others' share */
    for (int i = 0; i < SCHED_AGED_SHARE - 1; i++)
        queue_admitted(&w->queue, false);
    assert_ptr_equal(plan(w, 1)->admit[0], old);
    w->policy.max_wait_ms = 0;
    assert_ptr_equal(plan(w, 1)->admit[0], high);
    world_free(w);
}

static void tenants_take_turns(void **state)
{
    (void)state;
    struct world *w = world_new(100, 3, 1000);
    struct seq *a1 = add_waiting_as(w, 40, &(struct spec){ .tenant = "a" });
    struct seq *a2 = add_waiting_as(w, 40, &(struct spec){ .tenant = "a" });
    struct seq *a3 = add_waiting_as(w, 40, &(struct spec){ .tenant = "a" });
    struct seq *b1 = add_waiting_as(w, 10, &(struct spec){ .tenant = "b" });
    w->policy.group = false;                    /* all are of the base model */
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_admit, 3);
    assert_ptr_equal(p->admit[0], a1);
    assert_ptr_equal(p->admit[1], b1);
    assert_ptr_equal(p->admit[2], a2);
    queue_charge(&w->queue, b1->req, 1000);
    p = plan(w, 0);
    assert_ptr_equal(p->admit[1], a2);
    assert_ptr_equal(p->admit[2], a3);
    world_free(w);
}

static void grouping_is_fair_within_a_slack(void **state)
{
    (void)state;
    struct world *w = one_seat();
    struct seq *light = add_waiting_as(w, BT, &(struct spec){ .tenant = "light",
                                                              .adapter = &w->adapter[1] });
    struct seq *heavy = add_waiting_as(w, BT, &(struct spec){ .tenant = "heavy",
                                                              .adapter = &w->adapter[0] });
    queue_charge(&w->queue, heavy->req, (uint64_t)w->view.max_step_tokens * SCHED_FAIR_STEPS);
    assert_ptr_equal(plan(w, 1)->admit[0], heavy);
    queue_charge(&w->queue, heavy->req, 1);
    assert_ptr_equal(plan(w, 1)->admit[0], light);
    world_free(w);
}

/* ---- deadlines ------------------------------------------------------------------------- */

/* Steps of 100 ms, and 1 ms a prompt token. */
static struct world *timed(int max_seqs)
{
    struct world *w = world_new(200, max_seqs, 1000);
    for (int i = 0; i < 20; i++) {
        estimate_step(&w->estimate, 0, 100000, 0);
        estimate_step(&w->estimate, 100, 200000, 0);
    }
    w->view.now_ms = 1000000;
    return w;
}

static void the_hopeless_are_ended(void **state)
{
    (void)state;
    struct world *w = timed(8);
    int64_t now = w->view.now_ms;
    struct seq *ok = add_waiting_as(w, 100, &(struct spec){ .first_by_ms = now + 500 });
    struct seq *late = add_waiting_as(w, 100, &(struct spec){ .first_by_ms = now + 150 });
    struct seq *done = add_waiting_as(w, 100, &(struct spec){ .deadline_ms = now + 1900,
                                                              .max_tokens = 16 });
    struct seq *long_one = add_waiting_as(w, 100, &(struct spec){ .deadline_ms = now + 1600,
                                                                  .max_tokens = 16 });
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_expire, 2);
    assert_true(in_list(p->expire, 2, late) && in_list(p->expire, 2, long_one));
    assert_int_equal(p->n_admit, 2);
    assert_true(is_admitted(p, ok) && is_admitted(p, done));
    long_one->req->params.ignore_eos = false;   /* it may stop early */
    p = plan(w, 0);
    assert_int_equal(p->n_expire, 1);
    late->req->first_token_us = 1;              /* it had begun before it was preempted */
    assert_int_equal(plan(w, 0)->n_expire, 0);
    late->req->first_token_us = 0;
    w->policy.early_abort = false;
    assert_int_equal(plan(w, 0)->n_expire, 0);
    world_free(w);
}

static void nothing_is_refused_on_a_guess(void **state)
{
    (void)state;
    struct world *w = world_new(100, 8, 100);
    w->view.now_ms = 1000;
    add_waiting_as(w, 90, &(struct spec){ .first_by_ms = 1001 });
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_expire, 0);
    assert_int_equal(p->n_admit, 1);
    world_free(w);
}

static void siblings_that_run_are_left_alone(void **state)
{
    (void)state;
    struct world *w = timed(8);
    struct seq *s = add_waiting_as(w, 100, &(struct spec){ .deadline_ms = w->view.now_ms + 1 });
    struct seq two[2] = { { .state = SEQ_WAITING }, { .state = SEQ_RUNNING } };
    s->req->seqs = two;
    s->req->n_seqs = 2;
    assert_int_equal(plan(w, 0)->n_expire, 0);
    two[1].state = SEQ_DONE;
    assert_int_equal(plan(w, 0)->n_expire, 1);
    world_free(w);
}

static void a_near_deadline_goes_first(void **state)
{
    (void)state;
    struct world *w = timed(1);
    struct seq *first = add_waiting(w, 0, 100, NULL);
    struct seq *near = add_waiting_as(w, 100,
                                      &(struct spec){ .first_by_ms = w->view.now_ms + 400 });
    assert_ptr_equal(plan(w, 0)->admit[0], first);
    w->view.now_ms += 100;
    assert_ptr_equal(plan(w, 0)->admit[0], near);
    struct seq *high = add_waiting(w, 1, 100, NULL);
    assert_ptr_equal(plan(w, 0)->admit[0], high);
    world_free(w);
}

static void under_overload_the_newest_go_first(void **state)
{
    (void)state;
    struct world *w = timed(1);
    int64_t now = w->view.now_ms;
    struct seq *old = add_waiting_as(w, 100, &(struct spec){ .first_by_ms = now + 2000 });
    struct seq *new = add_waiting_as(w, 100, &(struct spec){ .first_by_ms = now + 5000 });
    assert_ptr_equal(plan(w, 0)->admit[0], old);
    estimate_left(&w->estimate, true, 0);       /* one is no overload */
    assert_ptr_equal(plan(w, 0)->admit[0], old);
    for (int i = 0; i < 4; i++)
        estimate_left(&w->estimate, true, 0);
    assert_ptr_equal(plan(w, 0)->admit[0], new);
    w->view.now_us = 11000000;                  /* long over */
    assert_ptr_equal(plan(w, 0)->admit[0], old);
    world_free(w);
}

/* ---- adapters and workspace ------------------------------------------------------------ */

static void prefetch_takes_only_what_is_spare(void **state)
{
    (void)state;
    struct world *w = world_new(64, 1, 100);
    add_decode(w, 0, 20);
    add_waiting(w, 0, BT, add_adapter(w, 0, RES_HOST, 5, 0));
    assert_int_equal(plan(w, 0)->n_load, 1);
    w->view.reclaimable = w->pool.n_free;
    w->view.spare = 4;                          /* the rest is wanted */
    sched_plan(&w->view, &w->plan);
    assert_int_equal(w->plan.n_load, 0);
    w->policy.prefetch = false;
    assert_int_equal(plan(w, 0)->n_load, 0);
    world_free(w);
}

static void loads_no_more_than_there_are_seats(void **state)
{
    (void)state;
    struct world *w = world_new(400, 4, 1000);
    for (int i = 0; i < 10; i++)
        add_adapter(w, i, RES_HOST, 1, 0);
    for (int i = 0; i < 20; i++)
        add_waiting(w, 0, BT, &w->adapter[i / 2]);
    assert_int_equal(plan(w, 0)->n_load, 2);    /* two of each will fill the batch */
    w->policy.group = false;
    assert_int_equal(plan(w, 0)->n_load, 4);
    world_free(w);
}

static void slots_and_halves_bound_adapters(void **state)
{
    (void)state;
    struct world *w = world_new(100, 8, 1000);
    for (int i = 0; i < 4; i++)
        add_waiting(w, 0, BT, add_adapter(w, i, RES_HOST, 5, 0));
    assert_int_equal(plan(w, 0)->n_load, 4);
    w->policy.adapter_slots = 3;
    w->view.n_loading = 1;
    assert_int_equal(plan(w, 0)->n_load, 2);
    w->policy.adapter_slots = 0;
    w->view.adapter_room = 15;
    assert_int_equal(plan(w, 0)->n_load, 3);
    w->view.kv_room = 2;
    assert_int_equal(plan(w, 0)->n_load, 2);
    world_free(w);
}

static void workspace_bounds_tokens(void **state)
{
    (void)state;
    struct world *w = world_new(100, 8, 1000);
    struct engine_adapter *a = add_adapter(w, 0, RES_RESIDENT, 1, 0);
    a->image.rank_max = 16;
    struct seq *s = add_waiting(w, 0, 100, a);
    w->view.lora_rows = 16 * 40 + 7;
    const struct plan *p = plan(w, 1);
    assert_int_equal(p->n_items, 1);
    assert_ptr_equal(p->item[0].seq, s);
    assert_int_equal(p->item[0].n_tok, 40);
    world_free(w);
}

/* ---- projected state ------------------------------------------------------------------- */

static void plans_on_what_is_under_way(void **state)
{
    (void)state;
    struct world *w = world_new(64, 8, 100);
    struct seq *s = add_running(w, 0, 2 * BT, 0, 2 * BT);       /* its prompt was launched */
    s->pending = 1;
    const struct plan *p = plan(w, 0);
    assert_int_equal(p->n_items, 1);            /* the token is not known, its place is */
    assert_int_equal(p->item[0].n_tok, 1);
    s->cap_tokens = s->n_tokens + 1;            /* it will be the last */
    assert_int_equal(plan(w, 0)->n_items, 0);
    world_free(w);
}

static void swapped_ones_come_back_first(void **state)
{
    (void)state;
    struct world *w = world_new(64, 8, 100);
    struct seq *s = add_waiting(w, 0, 2 * BT, NULL);
    s->n_swapped = 2;
    const struct plan *p = plan(w, 0);
    assert_true(is_admitted(p, s));
    assert_int_equal(p->n_items, 0);
    struct seq *r = add_decode(w, 0, 20);
    r->resuming = true;
    assert_false(in_items(plan(w, 0), r));
    world_free(w);
}

/* ---- random states --------------------------------------------------------------------- */

#define ADAPTERS 8

/* Applies the plan's block arithmetic to the real pool: what it relies on must be there. */
static void check_blocks(struct world *w, const struct plan *p, int idle)
{
    int have = w->pool.n_free + idle, kv = 0, lora = 0;
    int swapped = 0;
    for (int i = 0; i < p->n_preempt; i++) {
        have += p->preempt[i]->n_blocks;
        swapped += p->swap[i] ? blocks_for(p->preempt[i]->n_computed, BT) : 0;
    }
    assert_true(swapped <= w->view.swap_blocks);
    bool counted[ADAPTERS] = { false };
    for (int i = 0; i < p->n_items; i++) {
        const struct seq *s = p->item[i].seq;
        int upto = s->state == SEQ_RUNNING ? s->n_computed + p->item[i].n_tok : s->n_tokens;
        kv += LM_MAX(0, blocks_for(upto, BT) - s->n_blocks);
    }
    for (int i = 0; i < p->n_admit; i++) {
        const struct engine_adapter *a = p->admit[i]->req->adapter;
        kv += p->admit[i]->n_swapped ? blocks_for(p->admit[i]->n_tokens, BT) : 0;
        if (a && a->res.users == 0 && !counted[a - w->adapter]) {
            lora += a->n_blocks;
            counted[a - w->adapter] = true;
        }
    }
    for (int i = 0; i < p->n_load; i++)
        lora += p->load[i]->n_blocks;
    assert_true(kv + lora <= have);
    assert_true(p->n_admit == 0 || kv <= w->view.kv_room);
    assert_true(lora <= w->view.adapter_room);
}

/* Slots in use, idle adapters that are needed, and those to be loaded. */
static void check_slots(struct world *w, const struct plan *p)
{
    int used = w->view.n_loading + p->n_load;
    for (int i = 0; i < ADAPTERS; i++) {
        const struct engine_adapter *a = &w->adapter[i];
        bool needed = false;
        for (int k = 0; k < p->n_admit; k++)
            needed = needed || p->admit[k]->req->adapter == a;
        for (int k = 0; k < w->view.running.n - p->n_preempt; k++)
            needed = needed || w->view.running.at[k]->req->adapter == a;
        used += needed;
    }
    if (w->policy.adapter_slots > 0 && p->n_load > 0)
        assert_true(used <= w->policy.adapter_slots);
}

static void check_items(struct world *w, const struct plan *p)
{
    int tokens = 0;
    int64_t rows = 0;
    for (int i = 0; i < p->n_items; i++) {
        const struct seq *s = p->item[i].seq;
        assert_true(p->item[i].n_tok >= 1);
        assert_true(s->n_computed + p->item[i].n_tok <= s->n_tokens);
        assert_false(in_list(p->preempt, p->n_preempt, s));
        assert_true(s->state == SEQ_RUNNING || is_admitted(p, s));
        tokens += p->item[i].n_tok;
        if (s->req->adapter)
            rows += (int64_t)p->item[i].n_tok * s->req->adapter->image.rank_max;
    }
    assert_int_equal(tokens, p->n_tok);
    assert_true(tokens <= w->view.max_step_tokens);
    assert_true(rows <= w->view.lora_rows);
}

static void check_admissions(struct world *w, const struct plan *p)
{
    int running = w->view.running.n - p->n_preempt + p->n_admit;
    assert_true(p->n_admit == 0 || (running <= w->view.max_seqs && p->n_preempt == 0));
    for (int i = 0; i < p->n_admit; i++) {
        const struct engine_adapter *a = p->admit[i]->req->adapter;
        assert_true(!a || a->res.state == RES_RESIDENT);
        assert_true(in_items(p, p->admit[i]) == !p->admit[i]->n_swapped);
        assert_false(in_list(p->admit, i, p->admit[i]));
        assert_false(in_list(p->expire, p->n_expire, p->admit[i]));
    }
    for (int i = 0; i < p->n_load; i++)
        for (int k = 0; k < i; k++)
            assert_ptr_not_equal(p->load[i], p->load[k]);
    for (int i = 0; i < p->n_passed; i++)
        assert_true(p->passed[i].by >= 1 && !is_admitted(p, p->passed[i].seq));
    /* Nobody is admitted past one who is due and finds no room: then all admitted are due. */
    const struct seq *due = queue_by_due(tree_first(&w->queue.due));
    if (due && p->n_admit > 0 && !is_admitted(p, due) && !due->req->adapter &&
        !in_list(p->expire, p->n_expire, due))
        fail_msg("someone was admitted past one who is due");
}

static void check_plan(struct world *w, const struct plan *p, int idle)
{
    check_items(w, p);
    check_admissions(w, p);
    check_slots(w, p);
    if (w->view.running.n > 0)
        assert_false(in_list(p->preempt, p->n_preempt, w->view.running.at[0]));
    /* Who is preempted stands behind everyone who is not. */
    for (int i = 0; i + 1 < w->view.running.n; i++)
        if (in_list(p->preempt, p->n_preempt, w->view.running.at[i]))
            assert_true(in_list(p->preempt, p->n_preempt, w->view.running.at[i + 1]));
    check_blocks(w, p, idle);
}

static void random_policy(struct world *w)
{
    struct engine_policy *p = &w->policy;
    p->group = rnd(3) > 0;
    p->max_wait_ms = rnd(3) ? 1000 : 0;
    p->early_abort = rnd(2);
    p->prefetch = rnd(2);
    p->adapter_slots = rnd(4) ? 0 : 1 + rnd(ADAPTERS);
    if (rnd(4) == 0) {
        w->view.kv_room = rnd(100);
        w->view.adapter_room = rnd(60);
    }
    if (rnd(4) == 0)
        w->view.lora_rows = 200 + rnd(400);
    w->view.now_us = rnd(3000000);
    w->view.now_ms = 1000;
    w->queue.since_aged = rnd(5);
    w->view.swap_blocks = rnd(20);
    w->view.costs = (struct evict_costs){ .prefill_block = rnd(100), .copy_block = rnd(50) };
    for (int i = rnd(30); i > 0; i--)
        estimate_step(&w->estimate, rnd(100), 1000 + rnd(30000), w->view.now_us);
    for (int i = rnd(10); i > 0; i--)
        estimate_left(&w->estimate, rnd(2), 0);
}

static void random_adapters(struct world *w)
{
    for (int i = 0; i < ADAPTERS; i++) {
        int state = rnd(2) ? RES_RESIDENT : rnd(3);
        add_adapter(w, i, (enum residency_state)state, 1 + rnd(20), 0);
        w->view.n_loading += state == RES_LOADING;
    }
}

static void add_random_waiting(struct world *w)
{
    static const char *tenants[] = { NULL, "a", "b", "c" };
    struct spec x = {
        .priority = rnd(3), .adapter = rnd(3) ? &w->adapter[rnd(ADAPTERS)] : NULL,
        .tenant = tenants[rnd(4)], .since_us = rnd(3000000),
        .deadline_ms = rnd(4) ? 0 : 990 + rnd(3000), .first_by_ms = rnd(4) ? 0 : 990 + rnd(3000),
    };
    struct seq *s = add_waiting_as(w, 1 + rnd(120), &x);
    s->n_swapped = rnd(20) == 0;
    if (rnd(50) == 0)
        queue_overtaken(&w->queue, s, w->policy.max_overtaken, w->policy.max_overtaken);
    if (rnd(4) == 0)
        queue_charge(&w->queue, s->req, (uint64_t)rnd(2000));
}

static struct world *random_world(int *idle)
{
    struct world *w = world_new(20 + rnd(200), 1 + rnd(40), 40 + rnd(100));
    int running = rnd(LM_MIN(w->view.max_seqs, 30) + 1);
    random_policy(w);
    random_adapters(w);
    for (int i = 0; i < running; i++) {
        int prompt = 1 + rnd(90), out = rnd(3) ? 1 + rnd(60) : 0;
        if (out && rnd(3) == 0)                 /* its next token begins a block */
            prompt += (BT - (prompt + out - 1) % BT) % BT;
        int computed = out && rnd(4) ? prompt + out - 1 : rnd(prompt);
        if (blocks_for(prompt + out, BT) > w->pool.n_free)
            break;
        struct seq *s = add_running(w, rnd(3), prompt, out, computed);
        struct engine_adapter *a = &w->adapter[rnd(ADAPTERS)];
        if (a->res.state == RES_RESIDENT && rnd(2)) {
            s->req->adapter = a;
            a->res.users++;
        }
    }
    static int32_t taken[256];
    if (rnd(2))                 /* what is left of the pool is little */
        pool_take(&w->pool, POOL_KV, w->pool.n_free - rnd(LM_MIN(w->pool.n_free, 1) + 1), taken);
    *idle = 0;
    for (int i = 0; i < ADAPTERS; i++)
        if (w->adapter[i].res.state == RES_RESIDENT && w->adapter[i].res.users == 0)
            *idle += w->adapter[i].n_blocks;
    for (int i = rnd(60); i > 0; i--)
        add_random_waiting(w);
    return w;
}

/* Everything that sched_plan() may read and must not touch. */
struct snapshot {
    struct seq seq[128];
    struct request req[128];
    struct engine_adapter adapter[ADAPTERS];
    struct queue queue;
    struct estimate estimate;
};

static void take_snapshot(const struct world *w, struct snapshot *s)
{
    memcpy(s->seq, w->seq, sizeof s->seq);
    memcpy(s->req, w->req, sizeof s->req);
    memcpy(s->adapter, w->adapter, sizeof s->adapter);
    memcpy(&s->queue, &w->queue, sizeof s->queue);
    memcpy(&s->estimate, &w->estimate, sizeof s->estimate);
}

/* The same state gives the same plan, in another plan's memory too, and is left as it was. */
static void check_pure(struct world *w, const struct plan *p)
{
    static struct snapshot before, after;
    static struct plan other;
    take_snapshot(w, &before);
    if (!other.item)
        assert_int_equal(plan_init(&other, 64, NULL), LM_OK);
    sched_plan(&w->view, &other);
    take_snapshot(w, &after);
    assert_memory_equal(&before, &after, sizeof before);
    assert_int_equal(p->n_items, other.n_items);
    assert_int_equal(p->n_preempt, other.n_preempt);
    assert_int_equal(p->n_admit, other.n_admit);
    assert_int_equal(p->n_expire, other.n_expire);
    assert_int_equal(p->n_load, other.n_load);
    assert_int_equal(p->n_passed, other.n_passed);
    for (int i = 0; i < p->n_items; i++)
        assert_true(p->item[i].seq == other.item[i].seq && p->item[i].n_tok == other.item[i].n_tok);
    assert_memory_equal(p->admit, other.admit, (size_t)p->n_admit * sizeof *p->admit);
    assert_memory_equal(p->swap, other.swap, (size_t)p->n_preempt * sizeof *p->swap);
    assert_memory_equal(p->load, other.load, (size_t)p->n_load * sizeof *p->load);
}

static void random_plans(void **state)
{
    (void)state;
    int admitted = 0, expired = 0, loaded = 0, preempted = 0, passed = 0;
    for (int i = 0; i < 20000; i++) {
        int idle;
        struct world *w = random_world(&idle);
        const struct plan *p = plan(w, idle);
        check_plan(w, p, idle);
        check_pure(w, p);
        admitted += p->n_admit;
        expired += p->n_expire;
        loaded += p->n_load;
        preempted += p->n_preempt;
        passed += p->n_passed;
        world_free(w);
    }
    /* The states are such that each of a plan's parts is met often. */
    print_message("%d admitted, %d expired, %d loads, %d preempted, %d passed\n", admitted, expired,
                  loaded, preempted, passed);
    assert_true(admitted > 10000 && expired > 1000 && loaded > 1000 && preempted > 500 &&
                passed > 1000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(decodes_first_then_chunks),
        cmocka_unit_test(admits_by_priority_then_arrival),
        cmocka_unit_test(a_big_one_does_not_block),
        cmocka_unit_test(fits_an_empty_pool_exactly),
        cmocka_unit_test(preempts_the_last_in_rank),
        cmocka_unit_test(who_yields_is_swapped_where_that_is_cheaper),
        cmocka_unit_test(the_first_never_yields),
        cmocka_unit_test(adapters_are_loaded_and_waited_for),
        cmocka_unit_test(an_idle_adapter_leaves_the_budget_when_used),
        cmocka_unit_test(a_full_batch_prefetches),
        cmocka_unit_test(choices_wait_for_the_first),
        cmocka_unit_test(choices_do_not_hide_those_behind),
        cmocka_unit_test(lanes_of_the_batch_go_first),
        cmocka_unit_test(a_new_lane_brings_its_others),
        cmocka_unit_test(priority_stands_above_grouping),
        cmocka_unit_test(who_is_due_goes_first),
        cmocka_unit_test(age_has_its_share),
        cmocka_unit_test(tenants_take_turns),
        cmocka_unit_test(grouping_is_fair_within_a_slack),
        cmocka_unit_test(the_hopeless_are_ended),
        cmocka_unit_test(nothing_is_refused_on_a_guess),
        cmocka_unit_test(siblings_that_run_are_left_alone),
        cmocka_unit_test(a_near_deadline_goes_first),
        cmocka_unit_test(under_overload_the_newest_go_first),
        cmocka_unit_test(prefetch_takes_only_what_is_spare),
        cmocka_unit_test(loads_no_more_than_there_are_seats),
        cmocka_unit_test(slots_and_halves_bound_adapters),
        cmocka_unit_test(workspace_bounds_tokens),
        cmocka_unit_test(plans_on_what_is_under_way),
        cmocka_unit_test(swapped_ones_come_back_first),
        cmocka_unit_test(random_plans),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
