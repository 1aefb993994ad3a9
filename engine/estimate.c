/* SPDX-License-Identifier: Apache-2.0 */
/*
 * estimate.c - see estimate.h.
 */
#include "engine/estimate.h"

#define KEEP 0.98               /* of each sum, a step: the last fifty count for most */
#define FRESH_US 500000         /* a busy device ends steps all the time; this one has been idle */
#define LATE_WEIGHT (1.0 / 32)
#define LATE_SHARE 0.1          /* four in a row begin an overload; a single one does not */
#define LATE_LASTS_US 10000000
#define OUTPUT_WEIGHT (1.0 / 64)

/* The line through the sums. With no spread in x the slope is not known and all is base; a negative
 * slope or base is noise. */
static void fit(struct estimate *e)
{
    double mean_x = e->x / e->n, mean_y = e->y / e->n;
    double spread = e->xx / e->n - mean_x * mean_x;
    double with = e->xy / e->n - mean_x * mean_y;
    if (spread > 1)
        e->token_us = LM_MAX(with / spread, 0);
    else if (e->token_us == 0 && mean_x > 0)
        e->token_us = mean_y / mean_x;
    e->base_us = LM_MAX(mean_y - e->token_us * mean_x, 0);
}

void estimate_step(struct estimate *e, int prompt_tokens, int64_t us, int64_t now_us)
{
    if (us <= 0)
        return;
    e->step_us = now_us;
    double x = prompt_tokens, y = (double)us;
    e->n = e->n * KEEP + 1;
    e->x = e->x * KEEP + x;
    e->y = e->y * KEEP + y;
    e->xx = e->xx * KEEP + x * x;
    e->xy = e->xy * KEEP + x * y;
    fit(e);
}

void estimate_left(struct estimate *e, bool too_late, int64_t now_us)
{
    e->late += (too_late - e->late) * LATE_WEIGHT;
    if (too_late)
        e->late_us = now_us;
}

void estimate_output(struct estimate *e, int tokens)
{
    e->output += e->output > 0 ? (tokens - e->output) * OUTPUT_WEIGHT : tokens;
}

double estimate_prefill_us(const struct estimate *e, int64_t tokens, int per_step)
{
    if (tokens <= 0)
        return 0;
    return (double)LM_DIV_UP(tokens, per_step) * e->base_us + (double)tokens * e->token_us;
}

double estimate_decode_us(const struct estimate *e, int tokens)
{
    return LM_MAX(tokens, 0) * e->base_us;
}

bool estimate_is_fresh(const struct estimate *e, int64_t now_us)
{
    return now_us - e->step_us < FRESH_US;
}

bool estimate_overloaded(const struct estimate *e, int64_t now_us)
{
    return e->late > LATE_SHARE && now_us - e->late_us < LATE_LASTS_US;
}
