/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_adapters.c - what leaves host memory when its budget is short: one test for each rule of
 * adapters.c's essay, and the registry against a naive reference under random traffic.
 *
 * Stand-ins of a 7B shape without contents have the size of real ones; what reading one took is set
 * by hand, so nothing depends on a clock.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <string.h>

#include "engine/adapters.h"
#include "rnd.h"

#define ALL 0x7fu
#define MS 1000

static struct model_config model;
static size_t unit;             /* bytes of a rank-8 adapter */

static adapters *open_registry(int units)
{
    adapters *a = NULL;
    struct adapters_config cfg = {
        .model = &model, .lora_dtype = KN_BF16, .cell_bytes = 262144, .n_layers = model.n_layers,
        .pool_blocks = 1 << 20, .no_payload = true, .host_budget = (size_t)units * unit,
    };
    assert_int_equal(adapters_new(&cfg, &a, NULL), LM_OK);
    return a;
}

static engine_adapter *load(adapters *a, const char *id, int rank, int64_t load_us)
{
    engine_adapter *ad = NULL;
    struct lm_err err = { 0 };
    if (adapters_dummy(a, id, rank, ALL, &ad, &err) != LM_OK)
        fail_msg("%s", err.msg);
    ad->load_us = load_us;
    return ad;
}

static void pass(adapters *a, const char *id, int rank, int64_t load_us)
{
    engine_adapter_unref(load(a, id, rank, load_us));
}

/* Without counting as a use. */
static bool held(adapters *a, const char *id)
{
    engine_adapter *ad = adapters_find(a, id);
    if (!ad)
        return false;
    ad->uses--;
    engine_adapter_unref(ad);
    return true;
}

static void touch(adapters *a, const char *id, int times)
{
    for (int i = 0; i < times; i++)
        engine_adapter_unref(adapters_find(a, id));
}

static void end(adapters *a)
{
    adapters_reap(a, NULL, NULL);
    adapters_free(a);
}

static void idle_longest_leaves_first(void **state)
{
    (void)state;
    adapters *a = open_registry(3);
    pass(a, "a", 8, MS);
    pass(a, "b", 8, MS);
    pass(a, "c", 8, MS);
    touch(a, "a", 1);           /* asked for twice, as the other two then are */
    touch(a, "b", 1);
    touch(a, "c", 1);
    pass(a, "d", 8, 2 * MS);
    assert_null(adapters_find(a, "a"));
    assert_true(held(a, "d"));
    end(a);
}

static void large_leaves_before_small(void **state)
{
    (void)state;
    adapters *a = open_registry(10);
    pass(a, "large", 64, 3 * MS);       /* eight units; reading has a fixed part */
    pass(a, "small", 8, 2 * MS);
    pass(a, "new", 16, 2 * MS);
    assert_false(held(a, "large"));
    assert_true(held(a, "small") && held(a, "new"));
    end(a);
}

static void asked_for_often_stays(void **state)
{
    (void)state;
    adapters *a = open_registry(3);
    pass(a, "popular", 8, MS);
    touch(a, "popular", 10);
    pass(a, "b", 8, MS);
    for (int i = 0; i < 5; i++) {
        char id[16];
        snprintf(id, sizeof id, "once/%d", i);
        pass(a, id, 8, MS);
    }
    assert_true(held(a, "popular"));
    assert_false(held(a, "b"));
    for (int i = 0; i < 100; i++) {     /* but not for ever */
        char id[16];
        snprintf(id, sizeof id, "twice/%d", i);
        pass(a, id, 8, MS);
    }
    assert_null(adapters_find(a, "popular"));
    end(a);
}

static void slow_to_read_stays(void **state)
{
    (void)state;
    adapters *a = open_registry(2);
    pass(a, "slow", 8, 40 * MS);
    pass(a, "b", 8, MS);
    pass(a, "c", 8, MS);
    assert_true(held(a, "slow") && held(a, "c"));
    end(a);
}

static void what_is_referenced_stays(void **state)
{
    (void)state;
    adapters *a = open_registry(2);
    engine_adapter *x = load(a, "x", 8, MS), *y = load(a, "y", 8, MS), *z = NULL;
    struct lm_err err = { 0 };
    assert_int_equal(adapters_dummy(a, "z", 8, ALL, &z, &err), LM_BUSY);
    assert_non_null(strstr(err.msg, "held by adapters in use"));
    assert_int_equal(adapters_dummy(a, "huge", 64, ALL, &z, &err), LM_TOO_LARGE);
    engine_adapter_unref(x);
    z = load(a, "z", 8, MS);
    assert_null(adapters_find(a, "x"));
    assert_true(held(a, "y"));
    engine_adapter_unref(y);
    engine_adapter_unref(z);
    end(a);
}

/* ---- random ---------------------------------------------------------------------------- */

#define IDS 40
#define OPS 200000
#define BUDGET 60

struct ref_version {
    engine_adapter *held[4];
    int refs, rank;             /* rank 0: not there */
};

/* The budget is kept, what is referenced is there, bytes and count are what a scan finds. */
static void random_traffic(void **state)
{
    (void)state;
    adapters *a = open_registry(BUDGET);
    static struct ref_version v[IDS];
    int busy = 0, gone = 0;
    for (int i = 0; i < OPS; i++) {
        char id[16];
        int k = rnd(rnd(IDS) + 1), n = 0;
        struct ref_version *r = &v[k];
        snprintf(id, sizeof id, "id/%d", k);
        if (r->refs > 0 && rnd(2)) {
            engine_adapter_unref(r->held[--r->refs]);
        } else if (r->refs < 4) {
            engine_adapter *ad = adapters_find(a, id);
            assert_true(ad || r->refs == 0);
            gone += !ad && r->rank;
            r->rank = 8 << k % 4;
            lm_status st = ad ? LM_OK : adapters_dummy(a, id, r->rank, ALL, &ad, NULL);
            assert_true(st == LM_OK || st == LM_BUSY);
            busy += st == LM_BUSY;
            if (st == LM_OK) {
                ad->load_us = 1 + rnd(100000);
                r->held[r->refs++] = ad;
            }
        }
        if (i % 16 == 0)
            adapters_reap(a, NULL, NULL);
        if (i % 64)
            continue;
        size_t bytes, sum = 0;
        int found = 0;
        adapters_stats(a, &n, &bytes);
        for (int x = 0; x < IDS; x++) {
            snprintf(id, sizeof id, "id/%d", x);
            engine_adapter *ad = adapters_find(a, id);
            assert_true(ad || v[x].refs == 0);
            if (!ad)
                continue;
            found++;
            sum += engine_adapter_bytes(ad);
            engine_adapter_unref(ad);
        }
        assert_int_equal(found, n);
        assert_int_equal(sum, bytes);
        assert_true(bytes <= (size_t)BUDGET * unit);
    }
    print_message("%d versions came again, %d loads found no room\n", gone, busy);
    assert_true(gone > 1000 && busy > 100);
    for (int k = 0; k < IDS; k++)
        while (v[k].refs > 0)
            engine_adapter_unref(v[k].held[--v[k].refs]);
    end(a);
}

static int set_up(void **state)
{
    (void)state;
    struct lm_err err = { 0 };
    if (model_config_load_file("ops/shapes/llama-2-7b.json", &model, &err) != LM_OK)
        fail_msg("%s", err.msg);
    unit = (size_t)1 << 40;
    adapters *a = open_registry(1);
    engine_adapter *ad = load(a, "unit", 8, MS);
    unit = engine_adapter_bytes(ad) + engine_adapter_bytes(ad) / 16;    /* directories differ */
    engine_adapter_unref(ad);
    end(a);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    model_config_release(&model);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(idle_longest_leaves_first),
        cmocka_unit_test(large_leaves_before_small),
        cmocka_unit_test(asked_for_often_stays),
        cmocka_unit_test(slow_to_read_stays),
        cmocka_unit_test(what_is_referenced_stays),
        cmocka_unit_test(random_traffic),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
