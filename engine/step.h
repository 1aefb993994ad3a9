/* SPDX-License-Identifier: Apache-2.0 */
/*
 * step.h - from a plan's items to one step on the device, and its results back.
 *
 * All metadata of a step (token ids, positions, slots, block tables, LoRA segments, sampling rows)
 * is laid out in one pinned buffer and crosses in one asynchronous copy; sampled ids come back in
 * another. Buffers are made once; the metadata grows, rarely, when a step needs more than any
 * before it.
 *
 * Up to two steps are in flight: the second is laid out and enqueued while the device runs the
 * first. Tokens that the first will sample are not known then; the second takes them from the
 * first's output on the device (kn_op_feed).
 *
 * Threads: belongs to the engine thread.
 */
#ifndef LORAMILL_ENGINE_STEP_H
#define LORAMILL_ENGINE_STEP_H

#include "engine/forward.h"
#include "engine/output.h"
#include "engine/sched.h"

/* A position whose logits were wanted, and what came of it. */
struct step_row {
    struct seq *seq;            /* NULL: it has ended since */
    bool is_prompt;             /* a prompt token scored, not a token generated */
    struct sampled got;
};

struct step_params {
    const struct model_config *model;
    kn_device *dev;
    int max_tokens, max_seqs, block_tokens;
    int64_t lora_rows;          /* of one step, as in forward_params */
    bool record;                /* lay decode steps out so that a recorded one can run again */
};

struct step;

lm_status step_new(const struct step_params *p, struct step **out, struct lm_err *err);
void step_free(struct step *s);

/* Lays out, uploads and enqueues; every item's blocks are there. Does not wait. At most two steps
 * may be in flight. Afterwards the items' positions count as computed (seq.n_computed), and the
 * tokens that will come of them as pending. */
lm_status step_launch(struct step *s, struct forward *f, kn_stream *stream,
                      const struct kn_pool *pool, const struct plan_item *item, int n_items,
                      struct lm_err *err);
int step_in_flight(const struct step *s);
/* From the next launch on this adapter's tokens are laid out as the base model's, as it is merged
 * into the weights; 0: none. */
void step_set_merged(struct step *s, uint64_t serial);
/* Of the last launch: microseconds spent on its layout, before the device was given anything, and
 * distinct adapters. */
int64_t step_layout_us(const struct step *s);
int step_adapters(const struct step *s);

/* Sequences are scattered over memory, and a batch is too large for the first cache: who walks over
 * one asks for those ahead. */
#define STEP_AHEAD 6

/* What came of a step; valid until the next launch. A sequence's rows are consecutive, in order of
 * position. Items are the plan's in another order; `seq` is NULL where one has ended since. */
struct step_results {
    const struct plan_item *item;
    const struct step_row *row;
    int n_items, n_rows;
    int n_prefill, n_decode;    /* tokens, void ones not counted */
    bool merged;
    int64_t launched_us;
};
/* Waits for the oldest step in flight. */
lm_status step_finish(struct step *s, struct step_results *out, struct lm_err *err);
/* The sequence ends: whatever is in flight of it is void, and it may be freed. */
void step_void(struct step *s, const struct seq *q);
/* Tests only: from now on no step is laid out to be recorded, in any engine. */
void step_force_single(bool on);
/* Waits for what is in flight, and forgets it. */
void step_abandon(struct step *s);

#endif
