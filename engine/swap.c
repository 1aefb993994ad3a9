/* SPDX-License-Identifier: Apache-2.0 */
/*
 * swap.c - see swap.h.
 *
 * A copy covers a run of neighbouring slots: cell i of the run is layer i % n_layers of its slot
 * i / n_layers, and lies in the pool where the sequence's block says. Slots are taken lowest first,
 * in one run where there is one, so a sequence is a few copies, usually one.
 *
 * Invariants
 *  1. A slot is on one sequence's chain exactly if its bit is set; n_free counts the others.
 *  2. A sequence with seq.n_swapped > 0 has that many slots from seq.swap_slot on.
 *  3. Resuming sequences are on the list in order of their batches; batch[i].n of them belong to
 *     each. They have slots.
 */
#include "engine/swap.h"

#include <assert.h>
#include <stdlib.h>

#define MAX_RUN 64              /* slots of one copy */

lm_status swap_init(struct swap *w, kn_device *dev, kn_stream *copy, const struct kn_pool *memory,
                    size_t bytes, struct lm_err *err)
{
    *w = (struct swap){ .dev = dev, .memory = *memory, .copy = copy };
    w->slot_bytes = (size_t)memory->n_layers * (size_t)memory->block_bytes;
    /* More than the pool holds at a time would rarely be of use. */
    w->n_slots = (int)LM_MIN(bytes / w->slot_bytes, (size_t)memory->num_blocks);
    w->n_free = w->n_slots;
    if (w->n_slots == 0)
        return LM_OK;
    void *slab = NULL;
    lm_status st = kn_host_alloc(dev, (size_t)w->n_slots * w->slot_bytes, &slab, err);
    if (st != LM_OK)
        return lm_err_prefix(err, "host memory for swapped KV (policy.swap_bytes)");
    w->slab = slab;
    w->next = lm_calloc((size_t)w->n_slots, sizeof *w->next);
    w->taken = lm_calloc((size_t)w->n_slots / 64 + 1, sizeof *w->taken);
    w->offsets = lm_calloc((size_t)memory->n_layers * MAX_RUN, sizeof *w->offsets);
    if (!w->next || !w->taken || !w->offsets)
        st = lm_err_set(err, LM_NOMEM, "no memory to keep %d blocks of swapped KV", w->n_slots);
    if (st == LM_OK)
        st = kn_event_new(dev, &w->out_done, err);
    for (int i = 0; st == LM_OK && i < SWAP_BATCHES; i++)
        st = kn_event_new(dev, &w->batch[i].done, err);
    if (st != LM_OK)
        swap_release(w);
    return st;
}

void swap_release(struct swap *w)
{
    if (!w->dev)
        return;
    for (int i = 0; i < SWAP_BATCHES; i++)
        if (w->batch[i].done)
            kn_event_free(w->batch[i].done);
    if (w->out_done)
        kn_event_free(w->out_done);
    kn_host_free(w->dev, w->slab);
    free(w->next);
    free(w->taken);
    free(w->offsets);
    *w = (struct swap){ 0 };
}

/* ---- slots ----------------------------------------------------------------------------- */

static bool is_taken(const struct swap *w, int slot)
{
    return w->taken[slot / 64] >> (slot % 64) & 1;
}

/* Start of the first run of `n` free slots; the first free slot if there is no such run. */
static int find_run(const struct swap *w, int n)
{
    int first = -1, run = 0;
    for (int i = 0; i < w->n_slots; i++) {
        if (i % 64 == 0 && w->taken[i / 64] == UINT64_MAX) {
            i += 63;
            run = 0;
            continue;
        }
        run = is_taken(w, i) ? 0 : run + 1;
        if (run == 1 && first < 0)
            first = i;
        if (run == n)
            return i - n + 1;
    }
    return first;
}

/* Chains `n` slots to the sequence, in ascending order. */
static void take_slots(struct swap *w, struct seq *s, int n)
{
    int32_t *link = &s->swap_slot;
    s->n_swapped = n;
    w->n_free -= n;
    for (int i = find_run(w, n); n > 0; i = (i + 1) % w->n_slots) {
        if (is_taken(w, i))
            continue;
        w->taken[i / 64] |= (uint64_t)1 << (i % 64);
        *link = i;
        link = &w->next[i];
        n--;
    }
}

void swap_forget(struct swap *w, struct seq *s)
{
    int32_t slot = s->swap_slot;
    for (int i = 0; i < s->n_swapped; i++, slot = w->next[slot])
        w->taken[slot / 64] &= ~((uint64_t)1 << (slot % 64));
    w->n_free += s->n_swapped;
    s->n_swapped = s->swapped_tokens = 0;
}

int swap_count(const struct swap *w)
{
    int n = 0;
    for (int i = 0; i < w->n_slots; i++)
        n += is_taken(w, i);
    return n;
}

/* ---- copies ---------------------------------------------------------------------------- */

static void run_offsets(const struct swap *w, const int32_t *blocks, int n)
{
    const struct kn_pool *m = &w->memory;
    for (int c = 0; c < n * m->n_layers; c++)
        w->offsets[c] = ((int64_t)(c % m->n_layers) * m->num_blocks + blocks[c / m->n_layers]) *
                        m->block_bytes;
}

/* Slots [have, n_swapped) of the chain, run by run, to or from the sequence's blocks. */
static lm_status copy_chain(struct swap *w, const struct seq *s, int have, bool out)
{
    int32_t slot = s->swap_slot;
    lm_status st = LM_OK;
    for (int i = 0; i < have; i++)
        slot = w->next[slot];
    for (int i = have; i < s->n_swapped && st == LM_OK;) {
        int32_t first = slot, n = 1;
        for (slot = w->next[slot]; i + n < s->n_swapped && n < MAX_RUN && slot == first + n; n++)
            slot = w->next[slot];
        void *host = w->slab + (size_t)first * w->slot_bytes;
        int cells = n * w->memory.n_layers;
        size_t bytes = (size_t)w->memory.block_bytes;
        run_offsets(w, s->blocks + i, n);
        st = out ? kn_gather_cells(w->copy, host, w->memory.base, w->offsets, cells, bytes)
                 : kn_scatter_cells(w->copy, w->memory.base, w->offsets, cells, bytes, host);
        i += n;
    }
    w->bytes += (uint64_t)LM_MAX(s->n_swapped - have, 0) * w->slot_bytes;
    return st;
}

lm_status swap_out(struct swap *w, struct seq *s, int block_tokens, kn_event *after,
                   kn_stream *compute)
{
    int n = LM_DIV_UP(s->n_computed, block_tokens);
    assert(s->n_swapped == 0 && n > 0 && n <= w->n_free);
    take_slots(w, s, n);
    s->swapped_tokens = s->n_computed;
    lm_status st = kn_event_wait(w->copy, after);
    if (st == LM_OK)
        st = copy_chain(w, s, 0, true);
    if (st == LM_OK)
        st = kn_event_record(w->out_done, w->copy);
    return st == LM_OK ? kn_event_wait(compute, w->out_done) : st;
}

static struct swap_batch *nth_batch(struct swap *w, int i)
{
    return &w->batch[(w->first + i) % SWAP_BATCHES];
}

lm_status swap_in(struct swap *w, struct seq *s, int have, kn_event *after)
{
    assert(s->n_swapped > 0 && !s->resuming);
    lm_status st = w->open ? LM_OK : kn_event_wait(w->copy, after);
    if (st == LM_OK)
        st = copy_chain(w, s, have, false);
    if (st != LM_OK)
        return st;
    /* With the ring full, the newest batch is recorded again, later. */
    if (!w->open && w->n_batches < SWAP_BATCHES)
        nth_batch(w, w->n_batches++)->n = 0;
    nth_batch(w, w->n_batches - 1)->n++;
    w->open = true;
    s->resuming = true;
    s->swap_next = NULL;
    s->swap_prev = w->tail;
    *(w->tail ? &w->tail->swap_next : &w->head) = s;
    w->tail = s;
    return LM_OK;
}

lm_status swap_flush(struct swap *w)
{
    if (!w->open)
        return LM_OK;
    w->open = false;
    return kn_event_record(nth_batch(w, w->n_batches - 1)->done, w->copy);
}

static void unlink_seq(struct swap *w, struct seq *s)
{
    *(s->swap_prev ? &s->swap_prev->swap_next : &w->head) = s->swap_next;
    *(s->swap_next ? &s->swap_next->swap_prev : &w->tail) = s->swap_prev;
    s->resuming = false;
}

lm_status swap_poll(struct swap *w, struct lm_err *err)
{
    while (w->n_batches > 0) {
        struct swap_batch *b = nth_batch(w, 0);
        lm_status st = kn_event_query(b->done);
        if (st == LM_BUSY)
            return LM_OK;
        if (st != LM_OK)
            return lm_err_set(err, st, "copying KV back from host memory failed");
        for (; b->n > 0; b->n--) {
            struct seq *s = w->head;
            unlink_seq(w, s);
            swap_forget(w, s);
        }
        w->first = (w->first + 1) % SWAP_BATCHES;
        w->n_batches--;
    }
    return LM_OK;
}

lm_status swap_wait(struct swap *w, struct lm_err *err)
{
    return w->n_batches > 0 ? kn_event_sync(nth_batch(w, 0)->done, err) : LM_OK;
}

lm_status swap_interrupt(struct swap *w, struct seq *s, kn_stream *compute)
{
    int before = 0, i = 0;
    for (const struct seq *q = w->head; q != s; q = q->swap_next)
        before++;
    while (before >= nth_batch(w, i)->n)
        before -= nth_batch(w, i++)->n;
    nth_batch(w, i)->n--;
    unlink_seq(w, s);
    return kn_event_wait(compute, nth_batch(w, i)->done);
}
