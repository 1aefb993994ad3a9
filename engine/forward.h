/* SPDX-License-Identifier: Apache-2.0 */
/*
 * forward.h - the transformer itself: one step's tokens through every layer, to sampled ids.
 *
 * Owns the activation buffers, sized once for the largest step. Knows nothing of requests: a step
 * arrives as a struct of device pointers (step.c makes it), and leaves as ids and
 * log-probabilities in device memory.
 *
 * Threads: belongs to the engine thread.
 */
#ifndef LORAMILL_ENGINE_FORWARD_H
#define LORAMILL_ENGINE_FORWARD_H

#include "engine/weights.h"

/* One step, on the device. Shapes as in kernels.h. */
struct step_batch {
    int n_tok, n_seqs, n_rows;          /* n_rows: positions whose logits are needed */
    int max_q, max_kv;
    const int32_t *ids, *pos;           /* [n_tok] */
    const int64_t *slot;                /* [n_tok] */
    const int32_t *dyn_len;             /* [n_tok] or NULL */
    const int32_t *q_start, *kv_len;    /* [n_seqs + 1], [n_seqs] */
    const int32_t *block_table;         /* [n_seqs, table_ld] */
    int64_t table_ld;
    struct kn_lora_batch lora;
    const int32_t *row_idx;             /* [n_rows] token of each row */
    const struct kn_sample_row *rows;   /* [n_rows] */
    const int32_t *history;
    bool repeats;               /* what stands here is that of other steps, too: worth recording */
};

/* What a step leaves behind, on the device. */
struct step_output {
    int32_t *id;                /* [max_tokens] */
    float *logprob;             /* [max_tokens] */
    int32_t *top_id;            /* [max_tokens, KN_MAX_TOP_LOGPROBS] */
    float *top_logprob;
};

struct forward_params {
    const struct model_config *model;
    const struct weights *weights;
    kn_device *dev;
    kn_comm *comm;              /* NULL: one device, as in every engine so far */
    struct shard shard;
    int max_tokens;             /* of one step */
    int64_t lora_rows;          /* of one step: sum over segments of n_tok * rank_max */
    int block_tokens;
    bool x_e4m3;                /* of the layers' products, where it makes them faster */
};

struct forward;

lm_status forward_new(const struct forward_params *p, struct forward **out, struct lm_err *err);
void forward_free(struct forward *f);

/* Before the first step: lets the device measure how to multiply by these weights. Blocks, for less
 * than a second on a GPU and not at all on the CPU. */
lm_status forward_tune(struct forward *f, kn_stream *s, struct lm_err *err);

/* Where every step leaves its results. */
const struct step_output *forward_output(const struct forward *f);

/* Enqueues the whole step on `s`: never allocates, never waits. */
lm_status forward_run(struct forward *f, kn_stream *s, const struct kn_pool *pool,
                      const struct step_batch *b);

#endif
