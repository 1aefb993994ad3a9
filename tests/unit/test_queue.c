/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_queue.c - the queue against a naive simulation: every order of it, tenants that come, go and
 * are charged, and what it costs when 100,000 wait.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "engine/adapters.h"
#include "engine/queue.h"
#include "cpu_clock.h"

#define RND_SEED 88172645463325252u
#include "rnd.h"

#define SEQS 200
#define NAMES 7
#define ADAPTERS 5

static struct lm_err err;

struct item {
    struct request req;
    struct seq seq;
    bool live, waits;
    int name;
};

/* What the queue should know, kept the slow way. */
struct model {
    struct queue q;
    struct item item[SEQS];
    struct engine_adapter adapter[ADAPTERS];
    uint64_t counter[NAMES];    /* as far as settled */
    uint64_t owed[NAMES];
    int64_t now;
    uint64_t order;
};

static const char *names[NAMES] = { "a", "b", "c", "d", "e", "f", "g" };

static void arrive(struct model *m, int i, bool fair)
{
    struct item *it = &m->item[i];
    *it = (struct item){ .live = true, .name = rnd(NAMES) };
    it->req = (struct request){ .priority = rnd(3), .order = m->order++, .seqs = &it->seq,
                                .n_seqs = 1, .id = (char *)"x" };
    it->req.deadline_ms = rnd(3) ? 0 : 1 + rnd(50);
    it->req.first_token_by_ms = rnd(3) ? 0 : 1 + rnd(50);
    it->req.first_token_us = rnd(4) == 0;
    it->req.adapter = rnd(4) ? &m->adapter[rnd(ADAPTERS)] : NULL;
    it->req.spare_account = tenant_new(names[it->name]);
    it->seq.req = &it->req;
    it->seq.n_prompt = it->seq.n_tokens = 1 + rnd(60);
    queue_join(&m->q, &it->req);
    assert_int_equal(it->req.account == &m->q.tenants.common, !fair);
}

static struct seq *waiting(struct model *m, int i)
{
    return m->item[i].live && m->item[i].waits ? &m->item[i].seq : NULL;
}

/* ---- the order of service, naively ----------------------------------------------------- */

/* Of one tenant's sequences not yet taken, the first in rank. */
static struct seq *first_of(struct model *m, const struct tenant *t, const bool *taken)
{
    struct seq *best = NULL;
    for (int i = 0; i < SEQS; i++) {
        struct seq *s = waiting(m, i);
        if (s && !taken[i] && s->req->account == t && (!best || seq_before(s, best)))
            best = s;
    }
    return best;
}

struct naive_tenant { const struct tenant *t; uint64_t counter; };

static bool naive_less(const struct seq *a, const struct naive_tenant *ta, const struct seq *b,
                       const struct naive_tenant *tb)
{
    if (a->req->priority != b->req->priority)
        return a->req->priority > b->req->priority;
    return ta->counter != tb->counter ? ta->counter < tb->counter : ta->t->id < tb->t->id;
}

static void compare_cursor(struct model *m)
{
    static struct queue_turn heap[SEQS];
    struct naive_tenant ts[NAMES];
    bool taken[SEQS] = { false };
    int n = 0;
    for (int i = 0; i < SEQS; i++) {
        const struct tenant *t = waiting(m, i) ? m->item[i].req.account : NULL;
        bool known = false;
        for (int k = 0; k < n; k++)
            known = known || ts[k].t == t;
        if (t && !known)
            ts[n++] = (struct naive_tenant){ t, t->counter };
    }
    struct queue_cursor c;
    queue_rewind(&m->q, &c, heap);
    for (;;) {
        struct seq *best = NULL;
        int who = -1;
        for (int k = 0; k < n; k++) {
            struct seq *s = first_of(m, ts[k].t, taken);
            if (s && (!best || naive_less(s, &ts[k], best, &ts[who]))) {
                best = s;
                who = k;
            }
        }
        assert_ptr_equal(queue_next(&c), best);
        if (!best)
            return;
        ts[who].counter += (uint64_t)best->n_prompt + 1;
        for (int i = 0; i < SEQS; i++)
            taken[i] = taken[i] || &m->item[i].seq == best;
    }
}

/* ---- the other orders ------------------------------------------------------------------ */

static void compare_lanes(struct model *m)
{
    for (int a = -1; a < ADAPTERS; a++) {
        const struct engine_adapter *ad = a < 0 ? NULL : &m->adapter[a];
        const struct seq *prev = NULL;
        int n = 0, want = 0;
        for (int i = 0; i < SEQS; i++)
            want += waiting(m, i) && m->item[i].req.adapter == ad;
        for (struct tree_node *x = tree_first(queue_lane(&m->q, ad)); x; x = tree_next(x), n++) {
            const struct seq *s = queue_in_lane(x);
            assert_ptr_equal(s->req->adapter, ad);
            assert_true(!prev || seq_before(prev, s));
            prev = s;
        }
        assert_int_equal(n, want);
    }
}

static void compare_others(struct model *m)
{
    int n = 0, deadlines = 0, due = 0;
    uint64_t tokens = 0;
    for (int i = 0; i < SEQS; i++) {
        const struct seq *s = waiting(m, i);
        if (!s)
            continue;
        const struct request *r = s->req;
        int64_t first = r->first_token_us ? 0 : r->first_token_by_ms, want = r->deadline_ms;
        if (first && (!want || first < want))
            want = first;
        assert_int_equal(s->queued.deadline_ms, want);
        n++;
        tokens += (uint64_t)s->n_prompt;
        deadlines += want != 0;
        due += s->queued.overtaken >= 10;
    }
    assert_int_equal(m->q.n, n);
    assert_int_equal(m->q.prompt_tokens, tokens);
    assert_int_equal(m->q.by_deadline.n, deadlines);
    assert_int_equal(m->q.due.n, due);
}

/* Counters are what was charged, lifted to the least of those that wait when one begins to. */
static void compare_counters(struct model *m)
{
    for (int i = 0; i < SEQS; i++) {
        struct item *it = &m->item[i];
        if (it->live && it->req.account != &m->q.tenants.common)
            assert_true(it->req.account->counter >= m->counter[it->name]);
    }
}

/* ---- random operations ----------------------------------------------------------------- */

static void change(struct model *m, int i, bool fair)
{
    struct item *it = &m->item[i];
    if (!it->live) {
        arrive(m, i, fair);
    } else if (!it->waits) {
        if (rnd(3) == 0) {
            queue_leave(&m->q, &it->req);
            it->live = false;
            return;
        }
        queue_insert(&m->q, &it->seq, m->now);
        it->waits = true;
    } else if (rnd(3) == 0) {
        int by = 1 + rnd(4);
        queue_overtaken(&m->q, &it->seq, by, 10);
    } else {
        queue_remove(&m->q, &it->seq, m->now);
        it->waits = false;
        int tokens = rnd(100);
        queue_charge(&m->q, &it->req, (uint64_t)tokens);
        m->owed[it->name] += (uint64_t)tokens;
    }
}

static void run_model(bool fair)
{
    struct model *m = calloc(1, sizeof *m);
    assert_non_null(m);
    assert_int_equal(queue_init(&m->q, SEQS, fair, &err), LM_OK);
    for (int step = 0; step < 60000; step++) {
        change(m, rnd(SEQS), fair);
        m->now += rnd(10);
        if (rnd(5) == 0)
            queue_settle(&m->q);
        if (step % 200 == 0) {
            if (queue_check(&m->q, &err) != LM_OK)
                fail_msg("%s", err.msg);
            compare_cursor(m);
            compare_lanes(m);
            compare_others(m);
            compare_counters(m);
        }
    }
    for (int i = 0; i < SEQS; i++) {
        if (!m->item[i].live)
            continue;
        if (m->item[i].waits)
            queue_remove(&m->q, &m->item[i].seq, m->now);
        queue_leave(&m->q, &m->item[i].req);
    }
    assert_int_equal(m->q.n, 0);
    assert_int_equal(m->q.by_age.n + m->q.by_deadline.n + m->q.due.n + m->q.tenants.turn.n, 0);
    queue_release(&m->q);
    free(m);
}

static void equals_a_naive_queue(void **state)
{
    (void)state;
    run_model(true);
    run_model(false);
}

/* ---- tenants --------------------------------------------------------------------------- */

static void join(struct queue *q, struct item *it, const char *name, uint64_t order)
{
    *it = (struct item){ 0 };
    it->req = (struct request){ .order = order, .seqs = &it->seq, .n_seqs = 1, .id = (char *)"x" };
    it->req.spare_account = tenant_new(name);
    it->seq.req = &it->req;
    it->seq.n_prompt = it->seq.n_tokens = 10;
    queue_join(q, &it->req);
}

static void a_newcomer_is_lifted(void **state)
{
    (void)state;
    struct queue q;
    static struct item a, b, c;
    assert_int_equal(queue_init(&q, 16, true, &err), LM_OK);
    join(&q, &a, "old", 0);
    queue_insert(&q, &a.seq, 0);
    queue_charge(&q, &a.req, 1000);
    assert_int_equal(a.req.account->counter, 0);        /* charges take effect together */
    queue_settle(&q);
    assert_int_equal(a.req.account->counter, 1000);
    join(&q, &b, "new", 1);
    queue_insert(&q, &b.seq, 0);
    assert_int_equal(b.req.account->counter, 1000);
    queue_remove(&q, &a.seq, 0);
    queue_remove(&q, &b.seq, 0);
    queue_charge(&q, &b.req, 50);
    queue_settle(&q);
    join(&q, &c, "third", 2);                           /* nobody waits: after the last that did */
    queue_insert(&q, &c.seq, 0);
    assert_int_equal(c.req.account->counter, 1050);
    queue_remove(&q, &c.seq, 0);
    queue_leave(&q, &a.req);
    queue_leave(&q, &b.req);
    queue_leave(&q, &c.req);
    queue_release(&q);
}

static void tenants_that_cannot_matter_go(void **state)
{
    (void)state;
    struct queue q;
    static struct item stays;
    assert_int_equal(queue_init(&q, 16, true, &err), LM_OK);
    join(&q, &stays, "stays", 0);
    queue_insert(&q, &stays.seq, 0);
    for (int i = 0; i < 20000; i++) {
        struct item it;
        char name[32];
        snprintf(name, sizeof name, "t%d", i);
        join(&q, &it, name, (uint64_t)i + 1);
        queue_insert(&q, &it.seq, 0);
        queue_remove(&q, &it.seq, 0);
        queue_charge(&q, &it.req, 1 + (uint64_t)rnd(1000));
        queue_settle(&q);
        queue_leave(&q, &it.req);
        assert_true(q.tenants.n <= TENANTS_MAX_IDLE + 2);
    }
    queue_charge(&q, &stays.req, 2000);                 /* the least counter passes all others */
    queue_settle(&q);
    assert_int_equal(q.tenants.n, 1);
    queue_remove(&q, &stays.seq, 0);
    queue_leave(&q, &stays.req);
    queue_release(&q);
}

/* ---- cost ------------------------------------------------------------------------------ */

/* Nanoseconds to take one out, put it back and read 64 of the order of service. */
static double cost(int n)
{
    struct item *it = calloc((size_t)n, sizeof *it);
    struct queue q;
    static struct queue_turn heap[64];
    assert_non_null(it);
    assert_int_equal(queue_init(&q, n, true, &err), LM_OK);
    for (int i = 0; i < n; i++) {
        join(&q, &it[i], names[rnd(NAMES)], (uint64_t)i);
        it[i].req.priority = rnd(3);
        it[i].req.deadline_ms = 1 + rnd(100000);
        queue_insert(&q, &it[i].seq, rnd(100000));
    }
    int64_t t0 = cpu_ns();
    for (int k = 0; k < 20000; k++) {
        struct seq *s = &it[rnd(n)].seq;
        struct queue_cursor c;
        queue_remove(&q, s, 0);
        queue_insert(&q, s, rnd(100000));
        queue_rewind(&q, &c, heap);
        for (int i = 0; i < 64; i++)
            assert_non_null(queue_next(&c));
    }
    double ns = (double)(cpu_ns() - t0) / 20000;
    for (int i = 0; i < n; i++) {
        queue_remove(&q, &it[i].seq, 0);
        queue_leave(&q, &it[i].req);
    }
    queue_release(&q);
    free(it);
    return ns;
}

/* log2 grows by 1.7 from 1,000 to 100,000, memory is slower than caches, and a linear queue would
 * take a hundred times as long. */
static void a_hundred_thousand_may_wait(void **state)
{
    (void)state;
    double small = cost(1000), large = cost(100000);
    print_message("remove, insert, read 64: %.0f ns of 1,000, %.0f ns of 100,000\n", small, large);
    assert_true(large < 20 * small);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(equals_a_naive_queue),
        cmocka_unit_test(a_newcomer_is_lifted),
        cmocka_unit_test(tenants_that_cannot_matter_go),
        cmocka_unit_test(a_hundred_thousand_may_wait),
    };
    return cmocka_run_group_tests_name("queue", tests, NULL, NULL);
}
