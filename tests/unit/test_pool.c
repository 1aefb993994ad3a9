/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_pool.c - the pool against a naive reference: two million random operations, every answer
 * compared, the invariants checked as it goes.
 *
 * The reference keeps one reference count and one owner for each block and counts by scanning. Ids
 * are the pool's choice; the reference only demands that what it hands out was free.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "rnd.h"
#include "engine/pool.h"

#define BLOCKS 97
#define OPS 2000000

struct model {
    int refs[BLOCKS];
    int owner[BLOCKS];
};

static int model_count(const struct model *m, int owner)
{
    int n = 0;
    for (int i = 0; i < BLOCKS; i++)
        n += m->owner[i] == owner;
    return n;
}

static void op_take(struct pool *p, struct model *m)
{
    int32_t ids[BLOCKS + 8];
    int n = rnd(12), owner = rnd(2) ? POOL_KV : POOL_ADAPTER;
    bool fits = n <= model_count(m, POOL_FREE);
    lm_status st = pool_take(p, (enum pool_owner)owner, n, ids);
    assert_int_equal(st, fits ? LM_OK : LM_BUSY);
    for (int i = 0; fits && i < n; i++) {
        assert_in_range(ids[i], 0, BLOCKS - 1);
        assert_int_equal(m->refs[ids[i]], 0);
        m->refs[ids[i]] = 1;
        m->owner[ids[i]] = owner;
    }
}

static void op_ref(struct pool *p, struct model *m)
{
    int id = rnd(BLOCKS);
    if (m->refs[id] == 0 || m->refs[id] > 5)
        return;
    pool_ref(p, id);
    m->refs[id]++;
}

static void op_unref(struct pool *p, struct model *m)
{
    int id = rnd(BLOCKS);
    if (m->refs[id] == 0)
        return;
    bool freed = pool_unref(p, id);
    assert_int_equal(freed, --m->refs[id] == 0);
    if (freed)
        m->owner[id] = POOL_FREE;
}

static void compare(const struct pool *p, const struct model *m)
{
    struct lm_err err;
    if (pool_check(p, &err) != LM_OK)
        fail_msg("%s", err.msg);
    for (int i = 0; i < BLOCKS; i++) {
        assert_int_equal(pool_refs(p, i), m->refs[i]);
        assert_int_equal(p->owner[i], m->owner[i]);
    }
    for (int o = 0; o < POOL_OWNERS; o++)
        assert_int_equal(p->count[o], model_count(m, o));
}

static void random_operations(void **state)
{
    (void)state;
    struct pool p;
    struct model m = { 0 };
    assert_int_equal(pool_init(&p, BLOCKS, NULL), LM_OK);
    for (int i = 0; i < OPS; i++) {
        /* Weights that swing between a nearly full and a nearly empty pool. */
        int pick = rnd(100), takes = i / 5000 % 2 ? 30 : 12;
        if (pick < takes)
            op_take(&p, &m);
        else if (pick < takes + 10)
            op_ref(&p, &m);
        else
            op_unref(&p, &m);
        if (i % 128 == 0)
            compare(&p, &m);
    }
    compare(&p, &m);
    pool_release(&p);
}

static void all_or_nothing(void **state)
{
    (void)state;
    struct pool p;
    int32_t ids[10];
    assert_int_equal(pool_init(&p, 10, NULL), LM_OK);
    assert_int_equal(pool_take(&p, POOL_KV, 7, ids), LM_OK);
    assert_int_equal(pool_take(&p, POOL_ADAPTER, 4, ids + 7), LM_BUSY);
    assert_int_equal(p.n_free, 3);
    assert_int_equal(pool_take(&p, POOL_ADAPTER, 3, ids + 7), LM_OK);
    assert_int_equal(p.count[POOL_KV], 7);
    assert_int_equal(p.count[POOL_ADAPTER], 3);
    for (int i = 0; i < 10; i++)
        assert_true(pool_unref(&p, ids[i]));
    assert_int_equal(p.n_free, 10);
    pool_release(&p);
}

static void corruption_is_seen(void **state)
{
    (void)state;
    struct pool p;
    int32_t ids[4];
    struct lm_err err;
    assert_int_equal(pool_init(&p, 8, NULL), LM_OK);
    assert_int_equal(pool_take(&p, POOL_KV, 4, ids), LM_OK);
    int32_t keep = p.free_ids[0];
    p.free_ids[0] = ids[1];
    assert_int_equal(pool_check(&p, &err), LM_INTERNAL);
    p.free_ids[0] = keep;
    p.refs[ids[2]] = 0;
    assert_int_equal(pool_check(&p, &err), LM_INTERNAL);
    p.refs[ids[2]] = 1;
    p.count[POOL_KV]++;
    assert_int_equal(pool_check(&p, &err), LM_INTERNAL);
    p.count[POOL_KV]--;
    assert_int_equal(pool_check(&p, &err), LM_OK);
    pool_release(&p);
}

static void refuses_an_empty_pool(void **state)
{
    (void)state;
    struct pool p;
    struct lm_err err;
    assert_int_equal(pool_init(&p, 0, &err), LM_INVALID);
    pool_release(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_operations),
        cmocka_unit_test(all_or_nothing),
        cmocka_unit_test(corruption_is_seen),
        cmocka_unit_test(refuses_an_empty_pool),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
