/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_evict_model.c - pool, prefix cache, residency and eviction order together against a naive
 * reference: three million random operations, every answer compared.
 *
 * The reference knows no lists, no hashes and no heap. It keeps every cached block in an array with
 * the whole chain of tokens that it stands for, every adapter with its state, and answers by
 * scanning: what a prompt finds, what is idle, and which item must leave next (the least by wanted,
 * score, age; the formula is evict.c's, the search is not). Sequences of a few versions come, grow
 * and go as loop.c moves them; adapters are loaded, used, waited for and replaced by new versions.
 * Uploaded bytes are read back: an adapter's blocks must hold its own image.
 */
#include "pool_world.h"
#include "rnd.h"

#define BLOCKS 72
#define SEQS 10
#define ADAPTERS 6
#define MAX_BLOCKS 9            /* of a sequence */
#define MAX_LEN (MAX_BLOCKS * WORLD_BT + 3)
#define OPS 3000000

struct chain {
    int version, n;             /* 0: base model; tokens */
    int32_t tokens[MAX_LEN];
};

struct ref_block {
    bool cached, idle;
    struct chain chain;
    int hits;
    double level;
    uint64_t tick;
};

struct ref_adapter {
    int users, uses, waiting;
    bool resident;
    double level;
    uint64_t tick;
};

struct seq_sim {
    bool live;
    struct chain want;          /* all its tokens */
    int n_blocks;
    int32_t blocks[MAX_BLOCKS];
};

static struct world *w;
static struct engine_adapter adapter[ADAPTERS + 1];     /* [0] unused */
static struct ref_block block[BLOCKS];
static struct ref_adapter ref[ADAPTERS + 1];
static struct seq_sim seq[SEQS];
static double level;
static uint64_t tick, serial, evictions[2], found, wanted_left;

static struct evict_version *version_of(int v)
{
    return v ? &adapter[v].version : NULL;
}

/* ---- the reference's answers ----------------------------------------------------------- */

static int find_chain(const struct chain *c, int n)
{
    for (int b = 0; b < BLOCKS; b++) {
        const struct ref_block *r = &block[b];
        if (r->cached && r->chain.version == c->version && r->chain.n == n &&
            !memcmp(r->chain.tokens, c->tokens, (size_t)n * sizeof(int32_t)))
            return b;
    }
    return -1;
}

struct item {
    int block, adapter;         /* one of them, the other -1; both: nothing is idle */
    bool wanted;
    double score;
    uint64_t tick;
};

static bool goes_before(const struct item *a, const struct item *b)
{
    if (a->wanted != b->wanted)
        return b->wanted;
    return a->score != b->score ? a->score < b->score : a->tick < b->tick;
}

static struct item block_item(int b)
{
    const struct ref_block *r = &block[b];
    const double uses[3] = { w->evict.found_used, 1, 4 };
    int cls = r->hits == 0 ? 0 : r->hits < 4 ? 1 : 2;
    return (struct item){ b, -1, cls > 0 && ref[r->chain.version].waiting > 0,
                          r->level + uses[cls] * w->evict.used.prefill_block, r->tick };
}

static struct item adapter_item(int i)
{
    const struct evict_costs *c = &w->evict.used;
    double worth = LM_MAX(ref[i].uses, 1);
    return (struct item){ -1, i, ref[i].waiting > 0,
                          ref[i].level + worth * (c->copy_fixed / adapter[i].n_blocks +
                                                  c->copy_block), ref[i].tick };
}

static struct item next_to_leave(void)
{
    struct item best = { -1, -1, true, 1e300, 0 };
    for (int b = 0; b < BLOCKS; b++) {
        struct item it = block_item(b);
        if (block[b].idle && goes_before(&it, &best))
            best = it;
    }
    for (int i = 1; i <= ADAPTERS; i++) {
        struct item it = adapter_item(i);
        if (ref[i].resident && ref[i].users == 0 && goes_before(&it, &best))
            best = it;
    }
    return best;
}

static int idle_blocks(bool spare)
{
    int n = 0;
    for (int b = 0; b < BLOCKS; b++)
        n += block[b].idle && !(spare && block_item(b).wanted);
    for (int i = 1; i <= ADAPTERS; i++)
        n += ref[i].resident && !ref[i].users && !(spare && ref[i].waiting) ? adapter[i].n_blocks
                                                                            : 0;
    return n;
}

/* ---- operations on both ---------------------------------------------------------------- */

/* One eviction; what the reference chose must be what left. False: nothing is idle. */
static bool evict_one(void)
{
    struct item it = next_to_leave();
    int free_before = w->pool.n_free;
    lm_status st = evict_until(&w->prefix, &w->tier, free_before + 1);
    if (it.block < 0 && it.adapter < 0) {
        assert_int_equal(st, LM_BUSY);
        return false;
    }
    assert_int_equal(st, LM_OK);
    level = LM_MAX(level, it.score);
    wanted_left += it.wanted;
    evictions[it.adapter >= 0]++;
    if (it.adapter >= 0) {
        assert_int_equal(adapter[it.adapter].res.state, RES_HOST);
        assert_int_equal(w->pool.n_free, free_before + adapter[it.adapter].n_blocks);
        ref[it.adapter].resident = false;
        ref[it.adapter].uses /= 2;
    } else {
        assert_int_equal(w->pool.n_free, free_before + 1);
        assert_int_equal(pool_refs(&w->pool, it.block), 0);
        block[it.block].cached = block[it.block].idle = false;
    }
    return true;
}

/* loop.c plans first; here whoever finds no room does nothing. */
static bool make_room(int n)
{
    if (w->pool.n_free + idle_blocks(false) < n)
        return false;
    while (w->pool.n_free < n)
        assert_true(evict_one());
    return true;
}

static void check_image(int i)
{
    const uint8_t *base = w->memory;
    for (int k = 0; k < adapter[i].n_blocks; k++)
        for (int byte = 0; byte < WORLD_CELL; byte++)
            assert_int_equal(base[(size_t)adapter[i].res.blocks[k] * WORLD_CELL + (size_t)byte],
                             adapter[i].version.serial & 0xff);
}

static void op_load(int i)
{
    if (ref[i].resident || !make_room(adapter[i].n_blocks))
        return;
    struct lm_err err;
    world_ok(residency_load(&w->tier, &adapter[i], &err), &err);
    world_ok(residency_poll(&w->tier, &err), &err);
    ref[i].resident = true;
    ref[i].level = level;
    ref[i].tick = ++tick;
}

static void unuse(int i)
{
    if (i == 0)
        return;
    residency_unuse(&w->tier, &adapter[i]);
    if (--ref[i].users == 0) {
        ref[i].level = level;
        ref[i].tick = ++tick;
    }
}

static int32_t token(void)
{
    return rnd(16) ? 1 : rnd(3);
}

static void op_come(struct seq_sim *s)
{
    int v = rnd(ADAPTERS + 1), idle, n = 0;
    if (v && !ref[v].resident)
        op_load(v);
    if (v && !ref[v].resident)
        return;
    *s = (struct seq_sim){ .live = true, .want = { .version = v, .n = 1 + rnd(MAX_LEN) } };
    for (int t = 0; t < s->want.n; t++)
        s->want.tokens[t] = token();
    int max = (s->want.n - 1) / WORLD_BT, was_idle = 0;
    while (n < max) {
        int b = find_chain(&s->want, (n + 1) * WORLD_BT);
        if (b < 0)
            break;
        was_idle += block[b].idle;
        n++;
    }
    assert_int_equal(prefix_match(&w->prefix, version_of(v), s->want.tokens, max, &idle), n);
    assert_int_equal(idle, was_idle);
    s->n_blocks = prefix_acquire(&w->prefix, version_of(v), s->want.tokens, max, s->blocks);
    assert_int_equal(s->n_blocks, n);
    for (int k = 0; k < n; k++) {
        int b = find_chain(&s->want, (k + 1) * WORLD_BT);
        assert_int_equal(s->blocks[k], b);
        block[b].idle = false;
        block[b].hits++;
    }
    found += (uint64_t)n;
    if (v) {
        residency_use(&w->tier, &adapter[v]);
        ref[v].users++;
        ref[v].uses += ref[v].uses < 4;
    }
}

/* A further block: taken, computed, offered if it is full. */
static void op_grow(struct seq_sim *s)
{
    int k = s->n_blocks, n = (k + 1) * WORLD_BT;
    if (k * WORLD_BT >= s->want.n || k == MAX_BLOCKS || !make_room(1))
        return;
    if (k > 0 && !block[s->blocks[k - 1]].cached)
        return;                 /* its last block is not full yet */
    int32_t fresh;
    assert_int_equal(pool_take(&w->pool, POOL_KV, 1, &fresh), LM_OK);
    s->blocks[s->n_blocks++] = fresh;
    if (n > s->want.n)
        return;
    int twin = find_chain(&s->want, n);
    int32_t got = prefix_offer(&w->prefix, version_of(s->want.version), k ? s->blocks[k - 1] : -1,
                               s->want.tokens + (size_t)k * WORLD_BT, fresh);
    assert_int_equal(got, twin >= 0 ? twin : fresh);
    if (twin < 0)
        block[got] = (struct ref_block){ .cached = true, .chain = s->want };
    block[got].chain.n = n;
    block[got].idle = false;
    s->blocks[k] = got;
}

static int holders(int b)
{
    int n = 0;
    for (int i = 0; i < SEQS; i++)
        for (int k = 0; seq[i].live && k < seq[i].n_blocks; k++)
            n += seq[i].blocks[k] == b;
    return n;
}

static void op_go(struct seq_sim *s)
{
    while (s->n_blocks > 0) {
        int b = s->blocks[--s->n_blocks];
        prefix_unref(&w->prefix, b);
        if (block[b].cached && holders(b) == 0) {
            block[b].idle = true;
            block[b].level = level;
            block[b].tick = ++tick;
        }
    }
    s->live = false;
    unuse(s->want.version);
}

static void op_wait(int i)
{
    int by = ref[i].waiting == 0 || rnd(2) ? 1 : -ref[i].waiting;
    if (ref[i].waiting + by > 3)
        by = -1;
    evict_waiting(&w->evict, version_of(i), by);
    ref[i].waiting += by;
}

/* Other content under its id: who ran on the old version has gone. */
static void op_replace(int i)
{
    for (int k = 0; k < SEQS; k++)
        if (seq[k].live && seq[k].want.version == i)
            op_go(&seq[k]);
    int n_blocks = 1 + rnd(12);
    if (adapter[i].n_blocks)
        world_forget(w, &adapter[i]);
    world_adapter(w, &adapter[i], n_blocks, ++serial);
    ref[i] = (struct ref_adapter){ 0 };
    for (int b = 0; b < BLOCKS; b++)
        if (block[b].cached && block[b].chain.version == i)
            block[b].cached = block[b].idle = false;
}

static void op_touch(int i)
{
    residency_touch(&w->tier, &adapter[i]);
    if (ref[i].resident && ref[i].users == 0) {
        ref[i].level = level;
        ref[i].tick = ++tick;
    }
}

/* ---- comparing ------------------------------------------------------------------------- */

static void compare(void)
{
    int kv = 0, lora = 0;
    world_check(w);
    for (int b = 0; b < BLOCKS; b++) {
        int refs = holders(b) + block[b].cached;
        bool is_adapter = w->pool.owner[b] == POOL_ADAPTER;
        assert_int_equal(pool_refs(&w->pool, b), is_adapter ? 1 : refs);
        assert_int_equal(w->prefix.entry[b].cached, block[b].cached);
        assert_int_equal(w->prefix.entry[b].idle, block[b].idle);
        kv += refs > 0;
    }
    for (int i = 1; i <= ADAPTERS; i++) {
        assert_int_equal(adapter[i].res.state, ref[i].resident ? RES_RESIDENT : RES_HOST);
        assert_int_equal(adapter[i].res.users, ref[i].users);
        lora += ref[i].resident ? adapter[i].n_blocks : 0;
        if (ref[i].resident)
            check_image(i);
    }
    assert_int_equal(w->pool.count[POOL_KV], kv);
    assert_int_equal(w->pool.count[POOL_ADAPTER], lora);
    assert_int_equal(w->pool.n_free, BLOCKS - kv - lora);
    assert_int_equal(evict_reclaimable(&w->prefix, &w->tier), w->pool.n_free + idle_blocks(false));
    assert_int_equal(evict_spare(&w->prefix, &w->tier), w->pool.n_free + idle_blocks(true));
}

static void one_operation(void)
{
    struct seq_sim *s = &seq[rnd(SEQS)];
    int pick = rnd(1000), i = 1 + rnd(ADAPTERS);
    if (pick < 30)
        op_load(i);
    else if (pick < 70)
        op_wait(rnd(ADAPTERS + 1));
    else if (pick < 80)
        op_touch(i);
    else if (pick < 83)
        op_replace(i);
    else if (pick < 100)
        evict_one();
    else if (pick < 110)
        evict_measured_prefill(&w->evict, 1 + rnd(2000));
    else if (pick < 112)
        evict_measured_copy(&w->evict, 20 + rnd(200), 100 + rnd(900), 4);
    else if (!s->live)
        op_come(s);
    else if (rnd(14) == 0)
        op_go(s);
    else
        op_grow(s);
}

static void random_operations(void **state)
{
    (void)state;
    w = world_new(BLOCKS);
    for (int i = 1; i <= ADAPTERS; i++)
        op_replace(i);
    for (int i = 0; i < OPS; i++) {
        one_operation();
        if (i % 64 == 0)
            compare();
    }
    print_message("%llu blocks and %llu adapters evicted, %llu of them wanted; %llu blocks found, "
                  "%lld times new costs\n", (unsigned long long)evictions[0],
                  (unsigned long long)evictions[1], (unsigned long long)wanted_left,
                  (unsigned long long)found, (long long)w->evict.rebuilds);
    assert_true(evictions[0] > 100000 && evictions[1] > 10000 && wanted_left > 1000);
    assert_true(found > 100000 && w->evict.rebuilds > 100);
    for (int i = 0; i < SEQS; i++)
        if (seq[i].live)
            op_go(&seq[i]);
    compare();
    for (int i = 1; i <= ADAPTERS; i++)
        world_forget(w, &adapter[i]);
    world_free(w);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(random_operations) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
