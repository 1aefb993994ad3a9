/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_key_order.c - one prompt of a key at a time, in order, against a model with a plain
 * list for each key; many keys, so that the table grows, empties and closes its gaps.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "worker/key_order.h"

enum { KEYS = 3000, DEPTH = 16, OPERATIONS = 1000000 };

static uint64_t rng = 88172645463325252ull;

static uint32_t pick(uint32_t n)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (uint32_t)(rng >> 16) % n;
}

static struct job *make_job(struct lease *l, const char *key, int64_t offset)
{
    struct record r = { .key = key, .key_len = key ? strlen(key) : 0, .value = "",
                        .offset = offset };
    struct job *j;
    assert_int_equal(job_new(l, &r, &j), LM_OK);
    return j;
}

/* The first of each list is at work. */
struct model { struct job *jobs[DEPTH]; int n; };

static void test_against_model(void **state)
{
    (void)state;
    static struct model models[2][KEYS];
    struct lease *leases[2] = { lease_new("t", 0, (struct ledger_ref){ 0, 1 }),
                                lease_new("t", 1, (struct ledger_ref){ 1, 2 }) };
    key_order *o = key_order_new();
    size_t waiting = 0;
    for (int i = 0; i < OPERATIONS; i++) {
        int part = (int)pick(2), k = (int)pick(i % 200000 < 100000 ? KEYS : 20);
        struct model *m = &models[part][k];
        if (m->n < DEPTH && pick(2)) {
            char key[16];
            bool go;
            snprintf(key, sizeof key, "k%d", k);
            struct job *j = make_job(leases[part], key, i);
            assert_int_equal(key_order_enter(o, j, &go), LM_OK);
            assert_int_equal(go, m->n == 0);
            waiting += !go;
            m->jobs[m->n++] = j;
        } else if (m->n) {
            struct job *next = key_order_leave(o, m->jobs[0]);
            assert_ptr_equal(next, m->n > 1 ? m->jobs[1] : NULL);
            waiting -= next != NULL;
            job_unref(m->jobs[0]);
            memmove(m->jobs, m->jobs + 1, (size_t)--m->n * sizeof *m->jobs);
        }
        assert_int_equal(key_order_waiting(o), waiting);
    }
    for (int part = 0; part < 2; part++)
        for (int k = 0; k < KEYS; k++)
            if (models[part][k].n)
                job_unref(models[part][k].jobs[0]);     /* the others are the table's */
    key_order_free(o);
    lease_unref(leases[0]);
    lease_unref(leases[1]);
}

static void test_no_key_no_order(void **state)
{
    (void)state;
    struct lease *l = lease_new("t", 0, (struct ledger_ref){ 0, 1 });
    key_order *o = key_order_new();
    struct job *a = make_job(l, NULL, 0), *b = make_job(l, NULL, 1), *c = make_job(l, "", 2);
    bool go;
    assert_true(key_order_enter(o, a, &go) == LM_OK && go);
    assert_true(key_order_enter(o, b, &go) == LM_OK && go);
    assert_true(key_order_enter(o, c, &go) == LM_OK && go);     /* empty is a key */
    assert_null(key_order_leave(o, a));
    assert_null(key_order_leave(o, b));
    assert_null(key_order_leave(o, c));
    assert_null(key_order_leave(o, c));
    job_unref(a);
    job_unref(b);
    job_unref(c);
    key_order_free(o);
    lease_unref(l);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_model),
        cmocka_unit_test(test_no_key_no_order),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
