/* SPDX-License-Identifier: Apache-2.0 */
/*
 * estimate.h - what the scheduler believes about time, learnt from the steps that were run.
 *
 * A step takes about base + slope * prompt tokens in it: the base is what the batch's decodes take,
 * whatever is prefilled beside them. Both come from a least-squares line over recent steps, which
 * older ones leave exponentially. Until something was measured every estimate is 0: nothing is
 * refused on a guess. Nor is anything on an old measurement: a device that hung once, and then
 * refused all it was given, would never be found to be quick again.
 *
 * Overload is seen, not predicted: of those that lately left the queue, a share were too late.
 *
 * Threads: the engine thread's.
 */
#ifndef LORAMILL_ENGINE_ESTIMATE_H
#define LORAMILL_ENGINE_ESTIMATE_H

#include "kernels/base.h"

struct estimate {
    double n, x, y, xx, xy;     /* decayed sums over steps: prompt tokens, microseconds */
    double base_us, token_us;
    int64_t step_us;            /* when the last step was measured */
    double output;              /* tokens that a sequence generates, lately */
    double late;                /* share of those that left the queue too late */
    int64_t late_us;            /* when the last one did */
};

void estimate_step(struct estimate *e, int prompt_tokens, int64_t us, int64_t now_us);
/* A sequence left the queue: served, or too late to be. */
void estimate_left(struct estimate *e, bool too_late, int64_t now_us);
void estimate_output(struct estimate *e, int tokens);

/* Microseconds until `tokens` of prompt are computed, at most `per_step` in one step. */
double estimate_prefill_us(const struct estimate *e, int64_t tokens, int per_step);
double estimate_decode_us(const struct estimate *e, int tokens);
/* Steps were measured lately, so something may be refused for what they took. */
bool estimate_is_fresh(const struct estimate *e, int64_t now_us);
bool estimate_overloaded(const struct estimate *e, int64_t now_us);

#endif
