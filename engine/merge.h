/* SPDX-License-Identifier: Apache-2.0 */
/*
 * merge.h - one adapter in the base weights, while nobody else wants service.
 *
 *            sole owner for long enough            faster by min_gain
 *       OFF -------------------------> TRIAL -------------------------> ON
 *        ^                              |                                |
 *        |   not faster: not again      |   an item of anyone else       |
 *        +------------------------------+--------------------------------+
 *
 * Merged steps launch no LoRA at all. Merging adds scale * B A to each targeted weight, rounded to
 * its dtype, so results agree within that dtype's tolerance; unmerging copies the kept original
 * back, bit for bit. Both run between two steps and the host waits for neither: on a stream of
 * their own, behind the one step and ahead of the other by events, because kernels may read weights
 * ahead of their turn within a stream. The kept copy, of every weight that an adapter may target,
 * is pinned host memory and is made when the engine opens with policy.merge; without it none of
 * this exists.
 *
 * The judge is pure: it sees who owns the stream, what steps took, and the time.
 *
 * Cached prefixes need no other keys: a version's KV is the same within tolerance either way.
 *
 * Threads: belongs to the engine thread.
 */
#ifndef LORAMILL_ENGINE_MERGE_H
#define LORAMILL_ENGINE_MERGE_H

#include "engine/adapters.h"
#include "engine/weights.h"

/* ---- the judge ------------------------------------------------------------------------- */

enum merge_state { MERGE_OFF, MERGE_TRIAL, MERGE_ON };
enum merge_act { MERGE_STAY, MERGE_DO, MERGE_UNDO };

struct merge_limits {
    int64_t after_us;           /* an adapter must have owned the stream for so long */
    int steps;                  /* comparable steps wanted, of each kind, before it is judged */
    double min_gain;            /* of a step's time, as a share */
};

#define MERGE_SIZES 17          /* steps are compared with those of the same power of two */

struct merge_times {            /* of steps that only decode, by how many sequences they have */
    double us[MERGE_SIZES];     /* moving average */
    int n[MERGE_SIZES];
};

struct merge_judge {
    struct merge_limits lim;
    enum merge_state state;
    uint64_t owner;             /* serial of the only one who wants service, or the merged one */
    int64_t since_us;
    uint64_t rejected;          /* tried, and not faster */
    struct merge_times plain, merged;
};

/* Before each step. `sole`: the one adapter of all that runs and waits, or 0; `foreign`: the step
 * has an item that is not the owner's. */
enum merge_act merge_judge(struct merge_judge *j, uint64_t sole, bool foreign, int64_t now_us);
/* After each: it took `us`, for `n` sequences that all decode. */
void merge_judge_step(struct merge_judge *j, bool merged, int n, int64_t us);

/* ---- the weights ----------------------------------------------------------------------- */

struct merge {
    struct merge_judge judge;
    const struct model_config *model;
    const struct weights *weights;
    kn_device *dev;
    void **kept;                /* [4 n_layers]: qkv, o, gate_up, down of each */
    int32_t *table, *table_host;        /* the adapter's block table on the device, and pinned */
    kn_event *table_read;
    kn_stream *side;            /* where weights are changed */
    kn_event *before, *after;
    uint64_t serial;            /* of the adapter that is in the weights; 0: none */
    uint64_t merges;
};

/* Keeps copies of all weights that an adapter may target. Blocks. */
lm_status merge_init(struct merge *m, const struct model_config *model, const struct weights *w,
                     kn_device *dev, int pool_blocks, struct lm_err *err);
void merge_release(struct merge *m);

static inline bool merge_enabled(const struct merge *m)
{
    return m->kept != NULL;
}

/* Enqueues, between what was and what will be enqueued on `compute`; the adapter is resident and
 * nothing is merged. */
lm_status merge_do(struct merge *m, kn_stream *compute, const struct kn_pool *pool,
                   const struct engine_adapter *a);
lm_status merge_undo(struct merge *m, kn_stream *compute);

#endif
