/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_evict.c - the eviction policy: one test for each rule of evict.c's essay, and what it is
 * good for: on traffic with popular and rare adapters, shared and single prompts, its misses
 * cost less than those of least recently used, which is simulated beside it.
 */
#include "pool_world.h"
#include "rnd.h"

#include <math.h>

static struct engine_adapter a, b, c;

/* Cached blocks of one prompt, idle; returns how many. The prompt's tokens are all `token`. */
static int cache(struct world *w, struct evict_version *v, int32_t token, int n)
{
    int32_t tokens[64], blocks[16];
    for (int i = 0; i < n * WORLD_BT; i++)
        tokens[i] = token;
    int hit = prefix_acquire(&w->prefix, v, tokens, n, blocks);
    for (int i = hit; i < n; i++) {
        assert_int_equal(evict_until(&w->prefix, &w->tier, 1), LM_OK);
        assert_int_equal(pool_take(&w->pool, POOL_KV, 1, &blocks[i]), LM_OK);
        blocks[i] = prefix_offer(&w->prefix, v, i ? blocks[i - 1] : -1, tokens + i * WORLD_BT,
                                 blocks[i]);
    }
    for (int i = n - 1; i >= 0; i--)
        prefix_unref(&w->prefix, blocks[i]);
    return n;
}

static int cached(struct world *w, struct evict_version *v, int32_t token, int n)
{
    int32_t tokens[64];
    int idle;
    for (int i = 0; i < n * WORLD_BT; i++)
        tokens[i] = token;
    return prefix_match(&w->prefix, v, tokens, n, &idle);
}

static void use(struct world *w, struct engine_adapter *x, int times)
{
    for (int i = 0; i < times; i++) {
        residency_use(&w->tier, x);
        residency_unuse(&w->tier, x);
    }
}

static bool resident(const struct engine_adapter *x)
{
    return x->res.state == RES_RESIDENT;
}

static void evict_one(struct world *w)
{
    assert_int_equal(evict_until(&w->prefix, &w->tier, w->pool.n_free + 1), LM_OK);
    world_check(w);
}

/* Three adapters of 4 blocks, loaded in order. */
static struct world *three(void)
{
    struct world *w = world_new(32);
    world_costs(w, 100, 10, 0);
    struct engine_adapter *all[] = { &a, &b, &c };
    for (int i = 0; i < 3; i++) {
        world_adapter(w, all[i], 4, (uint64_t)i + 1);
        world_load(w, all[i]);
    }
    return w;
}

static void end(struct world *w)
{
    world_forget(w, &a);
    world_forget(w, &b);
    world_forget(w, &c);
    world_free(w);
}

static void what_was_used_longer_ago_leaves_first(void **state)
{
    (void)state;
    struct world *w = three();
    use(w, &a, 1);
    evict_one(w);
    assert_true(resident(&a) && !resident(&b));
    world_load(w, &b);
    residency_touch(&w->tier, &c);
    evict_one(w);
    assert_true(resident(&b) && resident(&c) && !resident(&a));
    evict_one(w);
    assert_true(resident(&c) && !resident(&b));
    end(w);
}

static void popularity_outlives_recency(void **state)
{
    (void)state;
    struct world *w = three();
    use(w, &a, 8);
    use(w, &b, 2);
    use(w, &c, 1);
    evict_one(w);
    assert_false(resident(&c));
    evict_one(w);
    assert_false(resident(&b));
    assert_true(resident(&a));
    end(w);
}

/* Each time that c returns it is younger; after some rounds a, which nobody uses, is the next. */
static void popularity_fades(void **state)
{
    (void)state;
    struct world *w = three();
    use(w, &a, 8);
    use(w, &b, 100);
    int rounds = 0;
    for (; resident(&a) && rounds < 100; rounds++) {
        use(w, &c, 1);
        c.res.uses = 1;
        use(w, &b, 1);
        evict_one(w);
        if (!resident(&c))
            world_load(w, &c);
    }
    assert_in_range(rounds, 3, 10);
    assert_true(resident(&b));
    end(w);
}

static void a_fixed_cost_is_spread_over_the_blocks(void **state)
{
    (void)state;
    struct world *w = world_new(32);
    world_costs(w, 100, 10, 40);
    world_adapter(w, &a, 2, 1);         /* 10 + 20 a block */
    world_adapter(w, &b, 8, 2);         /* 10 + 5 */
    world_adapter(w, &c, 4, 3);         /* 10 + 10 */
    world_load(w, &a);
    world_load(w, &b);
    world_load(w, &c);
    evict_one(w);
    assert_false(resident(&b));
    evict_one(w);
    assert_false(resident(&c));
    end(w);
}

static void costs_decide_between_the_kinds(void **state)
{
    (void)state;
    struct world *w = three();
    cache(w, NULL, 7, 2);
    cache(w, NULL, 7, 2);               /* found once: 1 * 100 a block; the adapters 10 */
    for (int i = 0; i < 3; i++)
        evict_one(w);
    assert_int_equal(w->tier.n_resident, 0);
    assert_int_equal(cached(w, NULL, 7, 2), 2);
    world_load(w, &a);
    world_costs(w, 1, 100, 0);          /* now a block is cheap to compute */
    cache(w, NULL, 7, 2);
    residency_touch(&w->tier, &a);
    evict_one(w);
    evict_one(w);
    assert_true(resident(&a));
    assert_int_equal(cached(w, NULL, 7, 2), 0);
    end(w);
}

static void what_was_never_found_goes_before_what_was(void **state)
{
    (void)state;
    struct world *w = three();
    w->evict.found = w->evict.found_used = 1.0 / 32;
    cache(w, &a.version, 7, 3);
    cache(w, &a.version, 7, 3);
    cache(w, &a.version, 8, 3);         /* younger */
    cache(w, NULL, 9, 3);
    for (int i = 0; i < 6; i++)
        evict_one(w);
    assert_int_equal(cached(w, &a.version, 8, 3) + cached(w, NULL, 9, 3), 0);
    assert_int_equal(cached(w, &a.version, 7, 3), 3);
    assert_int_equal(w->tier.n_resident, 3);
    end(w);
}

static void children_leave_before_parents(void **state)
{
    (void)state;
    struct world *w = three();
    cache(w, &a.version, 7, 6);
    cache(w, &a.version, 7, 2);         /* the first two are found once more */
    evict_waiting(&w->evict, &a.version, 1);
    int left = cached(w, &a.version, 7, 6);
    while (left > 0) {
        evict_kind(&w->prefix, &w->tier, EVICT_PREFIX);
        assert_int_equal(cached(w, &a.version, 7, 6), --left);
    }
    evict_waiting(&w->evict, &a.version, -1);
    end(w);
}

static void what_is_waited_for_leaves_last(void **state)
{
    (void)state;
    struct world *w = three();
    cache(w, &a.version, 7, 2);
    cache(w, &a.version, 7, 2);
    cache(w, &a.version, 8, 2);
    use(w, &b, 16);
    evict_waiting(&w->evict, &a.version, 2);
    assert_int_equal(evict_reclaimable(&w->prefix, &w->tier), 32);
    assert_int_equal(evict_spare(&w->prefix, &w->tier), 32 - 4 - 2);
    assert_int_equal(evict_until(&w->prefix, &w->tier, 32 - 4 - 2), LM_OK);
    assert_true(resident(&a) && !resident(&b) && !resident(&c));
    assert_int_equal(cached(w, &a.version, 7, 2), 2);
    assert_int_equal(cached(w, &a.version, 8, 2), 0);
    evict_waiting(&w->evict, &a.version, -1);
    world_load(w, &b);
    evict_one(w);
    assert_true(resident(&a) && !resident(&b));
    evict_waiting(&w->evict, &a.version, -1);
    assert_int_equal(evict_spare(&w->prefix, &w->tier), 32);
    assert_int_equal(evict_until(&w->prefix, &w->tier, 32), LM_OK);     /* it does leave */
    assert_int_equal(evict_until(&w->prefix, &w->tier, 33), LM_BUSY);
    end(w);
}

static void what_is_used_does_not_leave(void **state)
{
    (void)state;
    struct world *w = three();
    residency_use(&w->tier, &a);
    assert_int_equal(evict_reclaimable(&w->prefix, &w->tier), 28);
    assert_int_equal(evict_until(&w->prefix, &w->tier, 28), LM_OK);
    assert_int_equal(evict_until(&w->prefix, &w->tier, 29), LM_BUSY);
    assert_true(resident(&a));
    residency_unuse(&w->tier, &a);
    end(w);
}

static void prefixes_go_with_their_version(void **state)
{
    (void)state;
    struct world *w = three();
    cache(w, &a.version, 7, 3);
    cache(w, &b.version, 7, 3);
    int before = w->pool.n_free;
    prefix_forget(&w->prefix, &a.version);
    assert_int_equal(w->pool.n_free, before + 3);
    assert_int_equal(cached(w, &a.version, 7, 3), 0);
    assert_int_equal(cached(w, &b.version, 7, 3), 3);
    end(w);
}

static void renewed_costs_keep_the_order(void **state)
{
    (void)state;
    struct world *w = three();
    for (int i = 0; i < 8; i++)
        cache(w, i % 2 ? &b.version : NULL, 7 + i / 4, 1 + i % 3);
    for (int i = 0; i < 2000; i++) {
        evict_measured_prefill(&w->evict, i < 1000 ? 1e5 : 1);
        evict_saw(&w->evict, i / 300 % 2);
    }
    assert_true(w->evict.rebuilds > 10 && w->evict.rebuilds < 100);
    world_check(w);
    end(w);
}

/* ---- against least recently used -------------------------------------------------------- */

#define N_ADAPTERS 64
#define TEMPLATE 8              /* blocks of an adapter's own system prompt */
#define OWN 8                   /* blocks of each request's own, prompt and output */
#define REQUESTS 6000
#define LIVE 6                  /* requests at once */
#define COPY 0.7                /* ms a block: 8 MiB, 12 GiB/s */
#define FIXED 0.2
#define PREFILL 3.2             /* ms a block: 16 tokens, 14 GFLOP each, 70 TFLOP/s */

/* Zipf of exponent 1 by its inverse: rank ~ n^u. */
static int pick_adapter(void)
{
    return (int)pow(N_ADAPTERS, rnd(1 << 20) / (double)(1 << 20)) - 1;
}

static int adapter_size(int i)
{
    return 1 << (i * 7 % 5);            /* ranks of 4 to 64, say */
}

struct request_sim {
    int adapter, n;                     /* -1: none */
    int32_t tokens[(TEMPLATE + OWN) * WORLD_BT];
    int32_t blocks[TEMPLATE + OWN];
};

static double ours(int pool_blocks)
{
    static struct engine_adapter ad[N_ADAPTERS];
    static struct request_sim live[LIVE];
    struct world *w = world_new(pool_blocks);
    double cost = 0;
    int32_t unique = 1 << 20;
    rng = 0x9e3779b97f4a7c15u;
    world_costs(w, PREFILL, COPY, FIXED);
    for (int i = 0; i < N_ADAPTERS; i++)
        world_adapter(w, &ad[i], adapter_size(i), (uint64_t)i + 1);
    for (int i = 0; i < REQUESTS + LIVE; i++) {
        struct request_sim *r = &live[i % LIVE];
        if (i >= LIVE) {
            while (r->n > 0)
                prefix_unref(&w->prefix, r->blocks[--r->n]);
            residency_unuse(&w->tier, &ad[r->adapter]);
        }
        if (i >= REQUESTS)
            continue;
        struct engine_adapter *x = &ad[r->adapter = pick_adapter()];
        for (int t = 0; t < (TEMPLATE + OWN) * WORLD_BT; t++)
            r->tokens[t] = t < TEMPLATE * WORLD_BT ? t : unique++;
        if (x->res.state == RES_HOST) {
            cost += FIXED + COPY * x->n_blocks;
            world_load(w, x);
        }
        residency_use(&w->tier, x);
        r->n = prefix_acquire(&w->prefix, &x->version, r->tokens, TEMPLATE + OWN, r->blocks);
        for (; r->n < TEMPLATE + OWN; r->n++) {
            int k = r->n;
            cost += PREFILL;
            assert_int_equal(evict_until(&w->prefix, &w->tier, 1), LM_OK);
            assert_int_equal(pool_take(&w->pool, POOL_KV, 1, &r->blocks[k]), LM_OK);
            r->blocks[k] = prefix_offer(&w->prefix, &x->version, k ? r->blocks[k - 1] : -1,
                                        r->tokens + k * WORLD_BT, r->blocks[k]);
        }
    }
    for (int i = 0; i < N_ADAPTERS; i++)
        world_forget(w, &ad[i]);
    world_free(w);
    return cost / REQUESTS;
}

/* The same traffic; items are weights, template blocks, and blocks that nobody asks for again. */
struct item {
    int size, users;
    int64_t used;                       /* 0: not in the pool */
};

struct lru {
    struct item weights[N_ADAPTERS], shared[N_ADAPTERS][TEMPLATE], own[4096];
    int free, next_own;
    int64_t now;
};

static void older(struct item *i, struct item **oldest)
{
    if (i->used && !i->users && (!*oldest || i->used < (*oldest)->used))
        *oldest = i;
}

static void lru_room(struct lru *l, int n)
{
    while (l->free < n) {
        struct item *oldest = NULL;
        for (int i = 0; i < N_ADAPTERS; i++) {
            older(&l->weights[i], &oldest);
            for (int k = 0; k < TEMPLATE; k++)
                older(&l->shared[i][k], &oldest);
        }
        for (int i = 0; i < 4096; i++)
            older(&l->own[i], &oldest);
        assert_non_null(oldest);
        oldest->used = 0;
        l->free += oldest->size;
    }
}

static double lru_take(struct lru *l, struct item *i, int size, double cost)
{
    i->users++;
    if (i->used)
        return 0;
    lru_room(l, size);
    i->used = ++l->now;
    i->size = size;
    l->free -= size;
    return cost;
}

static void lru_drop(struct lru *l, struct item *i)
{
    i->users--;
    i->used = ++l->now;
}

static double least_recently_used(int pool_blocks)
{
    static struct lru l;
    int adapter[LIVE], own[LIVE];
    double cost = 0;
    l = (struct lru){ .free = pool_blocks };
    rng = 0x9e3779b97f4a7c15u;
    for (int i = 0; i < REQUESTS + LIVE; i++) {
        int s = i % LIVE;
        for (int k = OWN - 1; i >= LIVE && k >= 0; k--)
            lru_drop(&l, &l.own[own[s] + k]);
        for (int k = TEMPLATE - 1; i >= LIVE && k >= 0; k--)
            lru_drop(&l, &l.shared[adapter[s]][k]);
        if (i >= LIVE)
            lru_drop(&l, &l.weights[adapter[s]]);
        if (i >= REQUESTS)
            continue;
        int x = adapter[s] = pick_adapter(), size = adapter_size(x);
        own[s] = l.next_own;
        l.next_own = (l.next_own + OWN) % 4096;
        cost += lru_take(&l, &l.weights[x], size, FIXED + COPY * size);
        for (int k = 0; k < TEMPLATE; k++)
            cost += lru_take(&l, &l.shared[x][k], 1, PREFILL);
        for (int k = 0; k < OWN; k++)
            cost += lru_take(&l, &l.own[own[s] + k], 1, PREFILL);
    }
    return cost / REQUESTS;
}

/* What must be computed whatever is kept is the own blocks; the rest is the policy's. */
static void misses_cost_less_than_lru(void **state)
{
    (void)state;
    static const int pools[] = { 250, 350, 500 };
    for (int i = 0; i < 3; i++) {
        double least = OWN * PREFILL;
        double o = ours(pools[i]) - least, l = least_recently_used(pools[i]) - least;
        print_message("pool of %d blocks: misses cost %.2f ms a request, with LRU %.2f (%.2f)\n",
                      pools[i], o, l, o / l);
        assert_true(o < 0.85 * l);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_was_used_longer_ago_leaves_first),
        cmocka_unit_test(popularity_outlives_recency),
        cmocka_unit_test(popularity_fades),
        cmocka_unit_test(a_fixed_cost_is_spread_over_the_blocks),
        cmocka_unit_test(costs_decide_between_the_kinds),
        cmocka_unit_test(what_was_never_found_goes_before_what_was),
        cmocka_unit_test(children_leave_before_parents),
        cmocka_unit_test(what_is_waited_for_leaves_last),
        cmocka_unit_test(what_is_used_does_not_leave),
        cmocka_unit_test(prefixes_go_with_their_version),
        cmocka_unit_test(renewed_costs_keep_the_order),
        cmocka_unit_test(misses_cost_less_than_lru),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
