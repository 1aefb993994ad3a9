/* SPDX-License-Identifier: Apache-2.0 */
/*
 * weights.h - base weights on the device, from safetensors, or made up.
 *
 * q, k and v become one matrix, gate and up another, so that a layer is four GEMMs. Matrices keep
 * the stored dtype as far as the backend wishes; norms and biases are float32 vectors.
 *
 * A shard is this device's part of a tensor-parallel group (Megatron's split, arXiv 1909.08053):
 * heads and feed-forward columns of qkv and gate_up by rows, o and down by columns, lm_head by
 * vocabulary rows; embeddings and norms whole. {0, 1} is the whole model, and all that an engine
 * asks for so far.
 *
 * Threads: made by whoever opens the engine, filled by those of upload.h until weights_wait(), then
 * the engine thread's.
 */
#ifndef LORAMILL_ENGINE_WEIGHTS_H
#define LORAMILL_ENGINE_WEIGHTS_H

#include "engine/model_config.h"

struct shard {
    int rank, world;
};

struct layer_weights {
    kn_mat *qkv;                /* [(q_heads + 2 kv_heads) * head_dim, hidden] */
    kn_mat *o;                  /* [hidden, q_heads * head_dim] */
    kn_mat *gate_up;            /* [2 ffn, hidden] */
    kn_mat *down;               /* [hidden, ffn] */
    float *qkv_bias;            /* [(q_heads + 2 kv_heads) * head_dim] or NULL */
    float *attn_norm, *ffn_norm;        /* [hidden] */
    float *q_norm, *k_norm;     /* [head_dim] or NULL */
};

struct safetensors;

struct weights {
    kn_device *dev;
    struct layer_weights *layer;        /* [n_layers] */
    int n_layers;
    kn_mat *embed;              /* [vocab, hidden] */
    kn_mat *lm_head;            /* [vocab, hidden]; the same matrix when tied */
    float *final_norm;          /* [hidden] */
    size_t bytes;               /* as stored, or as kept if that was asked for */
    struct upload *upload;      /* while matrices are being filled, */
    struct safetensors *files;  /* from these; else NULL */
};

/* What becomes of the checkpoint's numbers: as stored (float32 as bf16 on a GPU); all matrices
 * bf16; the layers' in KN_E4M3, embeddings and head bf16 where activations are, else as stored. */
enum weights_as { WEIGHTS_STORED, WEIGHTS_BF16, WEIGHTS_FP8 };

/* Reads a checkpoint's files, and closes them in any case. LM_MISMATCH names the tensor that is
 * missing, of the wrong shape or dtype, or not part of the architecture. On failure nothing is left
 * behind.
 *
 * When it returns, everything exists and the vectors are there, but matrices are still being filled
 * by threads: weights_wait() before their values count. */
lm_status weights_load(struct safetensors *files, const struct model_config *cfg, kn_device *dev,
                       struct shard shard, enum weights_as as, struct weights *out,
                       struct lm_err *err);
/* The same shapes with random values (none at all on a simulated device): for measuring. */
lm_status weights_fill(const struct model_config *cfg, kn_device *dev, struct shard shard,
                       enum weights_as as, struct weights *out, struct lm_err *err);
/* Until all is there. LM_IO (a file that can't be read), LM_INVALID, LM_DEVICE name the tensor;
 * then the caller releases. */
lm_status weights_wait(struct weights *w, struct lm_err *err);
void weights_release(struct weights *w);

#endif
