/* SPDX-License-Identifier: Apache-2.0 */
/*
 * step.h - from a plan's items to one step on the device, and its results back.
 *
 * All metadata of a step (token ids, positions, slots, block tables, LoRA segments, sampling rows)
 * is laid out in one pinned buffer and crosses in one asynchronous copy; sampled ids come back in
 * another. Buffers are made once; the metadata grows, rarely, when a step needs more than any
 * before it.
 */
#ifndef LORAMILL_ENGINE_STEP_H
#define LORAMILL_ENGINE_STEP_H

#include "engine/forward.h"
#include "engine/output.h"
#include "engine/sched.h"

/* A position whose logits were wanted, and what came of it. */
struct step_row {
    struct seq *seq;
    bool is_prompt;             /* a prompt token scored, not a token generated */
    struct sampled got;
};

struct step_params {
    const struct model_config *model;
    kn_device *dev;
    int max_tokens, max_seqs, block_tokens;
};

struct step;

lm_status step_new(const struct step_params *p, struct step **out, struct lm_err *err);
void step_free(struct step *s);

/* Lays out, uploads and enqueues; every item's blocks are there. Does not wait. */
lm_status step_launch(struct step *s, struct forward *f, kn_stream *stream,
                      const struct kn_pool *pool, const struct plan_item *item, int n_items,
                      struct lm_err *err);
/* Microseconds that the last launch spent on its layout, before the device was given anything. */
int64_t step_layout_us(const struct step *s);
/* Waits for the step; rows are valid until the next launch. A sequence's rows are consecutive, in
 * order of position. */
lm_status step_finish(struct step *s, kn_stream *stream, const struct step_row **rows, int *n_rows,
                      struct lm_err *err);

#endif
