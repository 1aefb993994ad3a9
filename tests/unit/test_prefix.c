/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_prefix.c - the prefix cache against the truth: every block carries, beside the cache, the
 * chain of tokens that its KV stands for. Random sequences of a few versions and a small
 * alphabet (so that beginnings are often shared) come, grow and go, versions are waited for and
 * replaced, and blocks are evicted in between; whatever the cache hands out must stand for
 * exactly the tokens asked for, and the books must agree.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <string.h>

#include "engine/prefix.h"
#include "rnd.h"

#define BLOCKS 60
#define BT 4
#define SEQS 12
#define VERSIONS 3
#define MAX_LEN 40
#define OPS 400000

struct truth {                  /* what a block's KV stands for */
    int version;
    int n;
    int32_t tokens[MAX_LEN];
};

struct user {
    bool live;
    int version;
    int32_t tokens[MAX_LEN];
    int n, n_blocks, n_offered;
    int32_t blocks[MAX_LEN / BT];
};

static struct truth truth[BLOCKS];
static struct user user[SEQS];
static struct evict evict;
static struct evict_version versions[VERSIONS];
static int hits;

static void check_block(const struct user *u, int i)
{
    const struct truth *t = &truth[u->blocks[i]];
    assert_int_equal(t->version, u->version);
    assert_int_equal(t->n, (i + 1) * BT);
    assert_memory_equal(t->tokens, u->tokens, (size_t)t->n * sizeof(int32_t));
}

static void compute_block(struct user *u, int i)
{
    struct truth *t = &truth[u->blocks[i]];
    t->version = u->version;
    t->n = (i + 1) * BT;
    memcpy(t->tokens, u->tokens, (size_t)t->n * sizeof(int32_t));
}

static void come(struct prefix *p, struct user *u)
{
    int idle, want;
    u->version = rnd(VERSIONS);
    u->n = 1 + rnd(MAX_LEN);
    for (int i = 0; i < u->n; i++)
        u->tokens[i] = rnd(20) ? 1 : rnd(3);
    int max = (u->n - 1) / BT;
    want = prefix_match(p, &versions[u->version], u->tokens, max, &idle);
    int before = p->n_idle;
    u->n_blocks = prefix_acquire(p, &versions[u->version], u->tokens, max, u->blocks);
    assert_int_equal(u->n_blocks, want);
    assert_int_equal(before - p->n_idle, idle);
    for (int i = 0; i < u->n_blocks; i++)
        check_block(u, i);
    hits += u->n_blocks;
    u->n_offered = u->n_blocks;
    u->live = true;
}

/* One more block: computed, then offered. */
static void advance(struct prefix *p, struct user *u)
{
    if ((u->n_blocks + 1) * BT > u->n)
        return;
    while (p->pool->n_free == 0)
        if (!evict_kind(p, NULL, EVICT_PREFIX))
            return;
    int i = u->n_blocks++;
    assert_int_equal(pool_take(p->pool, POOL_KV, 1, &u->blocks[i]), LM_OK);
    compute_block(u, i);
    u->blocks[i] = prefix_offer(p, &versions[u->version], i ? u->blocks[i - 1] : -1,
                                u->tokens + (size_t)i * BT, u->blocks[i]);
    check_block(u, i);
}

static void go(struct prefix *p, struct user *u)
{
    while (u->n_blocks > 0)
        prefix_unref(p, u->blocks[--u->n_blocks]);
    u->live = false;
}

static void books_agree(const struct prefix *p)
{
    struct lm_err err;
    if (pool_check(p->pool, &err) != LM_OK || prefix_check(p, &err) != LM_OK ||
        evict_check(p->evict, &err) != LM_OK)
        fail_msg("%s", err.msg);
    for (int b = 0; b < BLOCKS; b++) {
        int held = p->entry[b].cached;
        for (int i = 0; i < SEQS; i++)
            for (int k = 0; k < user[i].n_blocks; k++)
                held += user[i].blocks[k] == b;
        assert_int_equal(held, pool_refs(p->pool, b));
    }
}

static void wait_no_more(void)
{
    for (int i = 0; i < VERSIONS; i++)
        if (versions[i].waiting > 0)
            evict_waiting(&evict, &versions[i], -versions[i].waiting);
}

/* The version goes with all who use it; another takes its place in memory. */
static void replace(struct prefix *p, int version)
{
    for (int i = 0; i < SEQS; i++)
        if (user[i].live && user[i].version == version)
            go(p, &user[i]);
    prefix_forget(p, &versions[version]);
    evict_version_init(&versions[version], versions[version].serial + VERSIONS);
    for (int b = 0; b < BLOCKS; b++)
        if (truth[b].version == version)
            truth[b].n = 0;     /* whoever finds it fails */
}

static void random_sequences(void **state)
{
    (void)state;
    struct pool pool;
    struct prefix p;
    assert_int_equal(pool_init(&pool, BLOCKS, NULL), LM_OK);
    assert_int_equal(evict_init(&evict, BLOCKS, NULL), LM_OK);
    assert_int_equal(prefix_init(&p, &pool, &evict, BT, true, NULL), LM_OK);
    for (int i = 0; i < VERSIONS; i++)
        evict_version_init(&versions[i], (uint64_t)i + 1);
    for (int i = 0; i < OPS; i++) {
        struct user *u = &user[rnd(SEQS)];
        if (!u->live)
            come(&p, u);
        else if (rnd(12) == 0)
            go(&p, u);
        else
            advance(&p, u);
        if (rnd(200) == 0)
            evict_kind(&p, NULL, EVICT_PREFIX);
        if (rnd(300) == 0)
            evict_waiting(&evict, &versions[rnd(VERSIONS)], 1);
        if (rnd(300) == 0)
            wait_no_more();
        if (rnd(2000) == 0)
            replace(&p, rnd(VERSIONS));
        if (i % 50 == 0)
            books_agree(&p);
    }
    print_message("%d blocks found in the cache\n", hits);
    assert_true(hits > 10000);
    for (int i = 0; i < SEQS; i++)
        go(&p, &user[i]);
    while (evict_kind(&p, NULL, EVICT_PREFIX)) {
    }
    assert_int_equal(pool.n_free, BLOCKS);
    prefix_release(&p);
    evict_release(&evict);
    pool_release(&pool);
}

static void switched_off_it_finds_nothing(void **state)
{
    (void)state;
    struct pool pool;
    struct prefix p;
    int32_t tokens[BT] = { 1, 2, 3, 4 }, block, got;
    int idle;
    assert_int_equal(pool_init(&pool, 4, NULL), LM_OK);
    assert_int_equal(evict_init(&evict, 4, NULL), LM_OK);
    assert_int_equal(prefix_init(&p, &pool, &evict, BT, false, NULL), LM_OK);
    assert_int_equal(pool_take(&pool, POOL_KV, 1, &block), LM_OK);
    assert_int_equal(prefix_offer(&p, NULL, -1, tokens, block), block);
    assert_int_equal(prefix_match(&p, NULL, tokens, 1, &idle), 0);
    assert_int_equal(prefix_acquire(&p, NULL, tokens, 1, &got), 0);
    assert_true(prefix_frees(&p, block));
    prefix_unref(&p, block);
    assert_int_equal(pool.n_free, 4);
    prefix_release(&p);
    evict_release(&evict);
    pool_release(&pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_sequences),
        cmocka_unit_test(switched_off_it_finds_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
