/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_swap.c - swapped KV comes back as it was, wherever its blocks lie by then.
 *
 * Random sequences are swapped out, brought back (from some block on, as the prefix cache may have
 * the others), interrupted on the way and forgotten, on the CPU with events that pass late, against
 * a reference copy of every block's bytes. Slots fragment on purpose: chains of many runs are met.
 * A slab too small for all makes room short, and the books must agree after every operation.
 */
#include "engine_fixture.h"

#include "engine/swap.h"
#include "kernels/cpu/cpu_int.h"

#define RND_SEED 0x9e3779b97f4a7c15u
#include "rnd.h"

#define LAYERS 3
#define BLOCK_BYTES 64
#define BLOCKS 400
#define SLOTS 150
#define SEQS 24
#define MAX_BLOCKS 70           /* more than a copy takes at once */
#define OPERATIONS 60000
#define BT 4                    /* tokens a block */

struct bed {
    kn_device *dev;
    kn_stream *copy, *compute;
    kn_event *step;
    struct kn_pool pool;
    struct swap swap;
    struct seq seq[SEQS];
    int32_t blocks[SEQS][MAX_BLOCKS];
    uint8_t kept[SEQS][MAX_BLOCKS][LAYERS][BLOCK_BYTES];
    bool back[SEQS];            /* copied back, to be looked at when it has passed */
    bool used[BLOCKS];
    int outs, checked, interrupted, most_batches;
};

static struct bed bed;

static uint8_t *cell(int32_t block, int layer)
{
    return (uint8_t *)bed.pool.base + ((size_t)layer * BLOCKS + (size_t)block) * BLOCK_BYTES;
}

static void bed_open(int slots)
{
    struct kn_open_params p = { .threads = 1 };
    void *base = NULL;
    memset(&bed, 0, sizeof bed);
    CHECK(kn_open("cpu", &p, &bed.dev, err));
    CHECK(kn_stream_new(bed.dev, &bed.copy, err));
    CHECK(kn_stream_new(bed.dev, &bed.compute, err));
    CHECK(kn_event_new(bed.dev, &bed.step, err));
    CHECK(kn_alloc(bed.dev, (size_t)LAYERS * BLOCKS * BLOCK_BYTES, &base, err));
    bed.pool = (struct kn_pool){ base, BLOCKS, LAYERS, BLOCK_BYTES, KN_KV_NATIVE };
    CHECK(swap_init(&bed.swap, bed.dev, bed.copy, &bed.pool,
                    (size_t)slots * LAYERS * BLOCK_BYTES + 1, err));
    assert_int_equal(bed.swap.n_slots, slots);
    for (int i = 0; i < SEQS; i++)
        bed.seq[i].blocks = bed.blocks[i];
}

static void bed_close(void)
{
    swap_release(&bed.swap);
    kn_event_free(bed.step);
    kn_stream_free(bed.copy);
    kn_stream_free(bed.compute);
    kn_free(bed.dev, bed.pool.base);
    kn_close(bed.dev);
}

static void release_blocks(struct seq *s)
{
    for (int i = 0; i < s->n_blocks; i++)
        bed.used[s->blocks[i]] = false;
    s->n_blocks = 0;
}

/* False when the pool has no room. */
static bool take_blocks(struct seq *s, int n)
{
    int at = rnd(BLOCKS);
    release_blocks(s);
    for (int tries = 0; tries < BLOCKS && s->n_blocks < n; tries++, at = (at + 7) % BLOCKS) {
        if (bed.used[at])
            continue;
        bed.used[at] = true;
        s->blocks[s->n_blocks++] = at;
    }
    if (s->n_blocks < n)
        release_blocks(s);
    return s->n_blocks == n;
}

static void out(int i)
{
    struct seq *s = &bed.seq[i];
    int n = 1 + rnd(rnd(4) ? 12 : MAX_BLOCKS);
    if (!swap_fits(&bed.swap, n) || !take_blocks(s, n))
        return;
    s->n_computed = n * BT - rnd(BT);
    for (int b = 0; b < n; b++)
        for (int l = 0; l < LAYERS; l++)
            for (int k = 0; k < BLOCK_BYTES; k++)
                bed.kept[i][b][l][k] = cell(s->blocks[b], l)[k] = (uint8_t)rnd(256);
    assert_int_equal(swap_out(&bed.swap, s, BT, bed.step, bed.compute), LM_OK);
    bed.outs++;
    assert_int_equal(s->n_swapped, n);
    assert_int_equal(s->swapped_tokens, s->n_computed);
    for (int b = 0; b < n; b++)         /* others write there now */
        for (int l = 0; l < LAYERS; l++)
            memset(cell(s->blocks[b], l), 0xee, BLOCK_BYTES);
    release_blocks(s);
}

static void in(int i)
{
    struct seq *s = &bed.seq[i];
    int have = rnd(3) ? 0 : rnd(s->n_swapped + 1);
    if (!take_blocks(s, s->n_swapped))
        return;
    for (int b = 0; b < have; b++)
        for (int l = 0; l < LAYERS; l++)
            memcpy(cell(s->blocks[b], l), bed.kept[i][b][l], BLOCK_BYTES);
    assert_int_equal(swap_in(&bed.swap, s, have, bed.step), LM_OK);
    bed.back[i] = true;
}

static void look_at_those_back(void)
{
    for (int i = 0; i < SEQS; i++) {
        struct seq *s = &bed.seq[i];
        if (!bed.back[i] || s->resuming)
            continue;
        bed.back[i] = false;
        bed.checked++;
        assert_int_equal(s->n_swapped, 0);
        for (int b = 0; b < s->n_blocks; b++)
            for (int l = 0; l < LAYERS; l++)
                assert_memory_equal(cell(s->blocks[b], l), bed.kept[i][b][l], BLOCK_BYTES);
        release_blocks(s);
    }
}

static void interrupt(int i)
{
    struct seq *s = &bed.seq[i];
    assert_int_equal(swap_interrupt(&bed.swap, s, bed.compute), LM_OK);
    assert_false(s->resuming);
    bed.interrupted++;
    bed.back[i] = false;
    release_blocks(s);
    if (rnd(2))
        swap_forget(&bed.swap, s);      /* it has ended; else it waits again, with its slots */
}

static void check_books(void)
{
    int slots = 0, resuming = 0, batched = 0;
    for (int i = 0; i < SEQS; i++) {
        slots += bed.seq[i].n_swapped;
        resuming += bed.seq[i].resuming;
    }
    bed.most_batches = LM_MAX(bed.most_batches, bed.swap.n_batches);
    for (int i = 0; i < bed.swap.n_batches; i++)
        batched += bed.swap.batch[(bed.swap.first + i) % SWAP_BATCHES].n;
    assert_int_equal(swap_count(&bed.swap), slots);
    assert_int_equal(bed.swap.n_free, bed.swap.n_slots - slots);
    assert_int_equal(resuming, batched);
}

static void one_operation(void)
{
    int i = rnd(SEQS);
    struct seq *s = &bed.seq[i];
    if (s->resuming) {
        if (rnd(3) == 0)
            interrupt(i);
    } else if (s->n_swapped == 0) {
        out(i);
    } else if (rnd(8) == 0) {
        swap_forget(&bed.swap, s);
    } else {
        in(i);
    }
    /* As a plan does: what was started together passes together. */
    if (rnd(3) == 0 || bed.swap.open)
        assert_int_equal(swap_flush(&bed.swap), LM_OK);
    if (rnd(3) == 0)
        CHECK(swap_poll(&bed.swap, err));
}

static void what_went_out_comes_back(void **state)
{
    (void)state;
    bed_open(SLOTS);
    for (int n = 0; n < OPERATIONS; n++) {
        kn_cpu_force_late_events(n / 1000 % 6 * 3);     /* enough to fill the ring of batches */
        one_operation();
        look_at_those_back();
        check_books();
    }
    print_message("%d went out, %d came back, %d were interrupted, at most %d batches\n", bed.outs,
                  bed.checked, bed.interrupted, bed.most_batches);
    assert_true(bed.outs > OPERATIONS / 20 && bed.checked > OPERATIONS / 40);
    assert_true(bed.interrupted > OPERATIONS / 100 && bed.most_batches == SWAP_BATCHES);
    kn_cpu_force_late_events(0);
    bed_close();
}

static void no_memory_no_swapping(void **state)
{
    (void)state;
    bed_open(0);
    assert_false(swap_fits(&bed.swap, 1));
    CHECK(swap_poll(&bed.swap, err));
    CHECK(swap_wait(&bed.swap, err));
    bed_close();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_went_out_comes_back),
        cmocka_unit_test(no_memory_no_swapping),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
