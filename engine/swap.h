/* SPDX-License-Identifier: Apache-2.0 */
/*
 * swap.h - KV of preempted sequences in host memory, instead of computing it again.
 *
 * One pinned slab, made at open, of slots; a slot holds one block of every layer. A sequence's
 * slots are a chain. Both ways run on the copy stream that uploads adapters:
 *
 *     RUNNING --swap_out--> WAITING, slots --swap_in--> RUNNING, resuming --swap_poll--> RUNNING
 *
 *   out  behind every step that was launched; the compute stream waits for it, so the blocks may
 *        be given away at once
 *   in   to blocks that the sequence was given; it is not planned (seq.resuming) until the copy
 *        has passed, and compute never waits
 *
 * Slots may be reused as soon as they are given back: whoever fills them does so behind, on the
 * same stream.
 *
 * Threads: belongs to the engine thread.
 */
#ifndef LORAMILL_ENGINE_SWAP_H
#define LORAMILL_ENGINE_SWAP_H

#include "engine/request.h"
#include "kernels/kernels.h"

#define SWAP_BATCHES 8

struct swap_batch {
    kn_event *done;
    int n;                      /* sequences that come back with it */
};

struct swap {
    kn_device *dev;
    struct kn_pool memory;
    kn_stream *copy;            /* not ours */
    size_t slot_bytes;
    int n_slots, n_free;
    char *slab;
    int32_t *next;              /* [n_slots] chains */
    uint64_t *taken;            /* [n_slots / 64 + 1] */
    int64_t *offsets;           /* scratch of one copy */
    kn_event *out_done;
    struct swap_batch batch[SWAP_BATCHES];      /* a ring */
    int first, n_batches;
    bool open;                  /* the newest batch takes more: its event is not recorded yet */
    struct seq *head, *tail;    /* resuming, in order of their copies */
    uint64_t bytes;             /* moved, both ways */
};

/* `bytes` of host memory at most, 0: no slots, so nothing is ever swapped. */
lm_status swap_init(struct swap *w, kn_device *dev, kn_stream *copy, const struct kn_pool *memory,
                    size_t bytes, struct lm_err *err);
/* No sequence may have slots. */
void swap_release(struct swap *w);

static inline bool swap_fits(const struct swap *w, int n_blocks)
{
    return n_blocks <= w->n_free;
}

/* Copies the first blocks of a running sequence, as far as they are computed; there must be room.
 * The blocks stay the sequence's. `after` has been recorded behind the last step, on `compute`. */
lm_status swap_out(struct swap *w, struct seq *s, int block_tokens, kn_event *after,
                   kn_stream *compute);
/* Copies back what its blocks [have, ..) lack, and makes it resuming until swap_poll() finds the
 * copy done. All blocks are there; swap_flush() must follow before anything waits. */
lm_status swap_in(struct swap *w, struct seq *s, int have, kn_event *after);
/* Ends the batch of swap_in()s. */
lm_status swap_flush(struct swap *w);
/* Those whose copy has passed are resuming no more. */
lm_status swap_poll(struct swap *w, struct lm_err *err);
/* Blocks until the oldest batch has passed. */
lm_status swap_wait(struct swap *w, struct lm_err *err);

/* A resuming sequence gives its blocks up before its copy has passed (it is preempted again, or
 * ends): `compute` waits for the copy. It keeps its slots. */
lm_status swap_interrupt(struct swap *w, struct seq *s, kn_stream *compute);
/* Gives its slots back. */
void swap_forget(struct swap *w, struct seq *s);

/* Slots in use, counted over their bitmap: for checks. */
int swap_count(const struct swap *w);

#endif
