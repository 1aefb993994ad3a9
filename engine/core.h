/* SPDX-License-Identifier: Apache-2.0 */
/*
 * core.h - everything that the engine thread owns: weights, pool, scheduler, step buffers.
 *
 * engine.c opens a core, gives it the mailbox and the adapter registry, and runs core_run() on a
 * thread of its own. From then on nobody else touches a core, except core_stats(), which reads
 * relaxed atomics.
 */
#ifndef LORAMILL_ENGINE_CORE_H
#define LORAMILL_ENGINE_CORE_H

#include "engine/adapters.h"
#include "engine/mailbox.h"

struct core;

struct core_params {
    const char *model_dir;
    const struct model_config *model;
    const tokenizer *tok;
    kn_device *dev;
    size_t pool_bytes;          /* 0: choose */
    int block_tokens, max_seqs, max_step_tokens, max_waiting, max_model_len;
};

/* Loads the weights and makes the pool and every buffer of the step path. */
lm_status core_open(const struct core_params *p, struct core **out, struct lm_err *err);
/* After core_run() has returned (or instead of it), before adapters_free(). */
void core_close(struct core *c);

int core_pool_blocks(const struct core *c);
int64_t core_block_bytes(const struct core *c);
size_t core_weight_bytes(const struct core *c);

/* The engine thread's life; returns when the mailbox says stop, with no request and no adapter left
 * in its hands. */
void core_run(struct core *c, mailbox *mail, adapters *reg);

/* Fills what the core knows; any thread. */
void core_stats(struct core *c, struct engine_stats *out);

#endif
