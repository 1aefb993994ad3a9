/* SPDX-License-Identifier: Apache-2.0 */
/*
 * core.h - everything that the engine thread owns: weights, pool, scheduler, step buffers.
 *
 * engine.c opens a core, gives it the mailbox and the adapter registry, and runs core_run() on a
 * thread of its own (or core_pump() on the caller's). From then on nobody else touches a core,
 * except core_stats(), which reads relaxed atomics, and the clocks.
 */
#ifndef LORAMILL_ENGINE_CORE_H
#define LORAMILL_ENGINE_CORE_H

#include "engine/adapters.h"
#include "engine/mailbox.h"

struct core;

struct core_params {
    struct safetensors *files;  /* of weights, core_open()'s from now on; NULL: they are made up */
    const struct model_config *model;
    const tokenizer *tok;
    kn_device *dev;
    size_t pool_bytes;          /* 0: choose */
    int block_tokens, max_seqs, max_step_tokens, max_waiting, max_model_len;
    enum kn_kv kv;
    enum engine_weights weights;
    struct engine_policy policy;
};

/* Loads the weights and makes the pool and every buffer of the step path. */
lm_status core_open(const struct core_params *p, struct core **out, struct lm_err *err);
/* After core_run() has returned or core_drop() was called (or neither was begun), before
 * adapters_free(). */
void core_close(struct core *c);

int core_pool_blocks(const struct core *c);
/* Blocks that KV, and adapters, may take: all of them, unless the pool is split. */
void core_limits(const struct core *c, int *kv, int *adapters);
size_t core_pool_reserve(const struct core *c);  /* free when the pool was made, and left so */
int64_t core_block_bytes(const struct core *c);
size_t core_weight_bytes(const struct core *c);

/* Joins the core to its mailbox and registry, once, before its first turn. */
void core_begin(struct core *c, mailbox *mail, adapters *reg);

/* The engine thread's life: turns until the mailbox says stop, then core_drop(). */
void core_run(struct core *c);
/* Turns until one is idle, or the clock has reached `until_us`. */
lm_status core_pump(struct core *c, int64_t until_us, bool *idle, struct lm_err *err);
/* Ends every request and gives back every adapter; core_close() may follow. */
void core_drop(struct core *c);

/* Tests only: cores opened from now on pipeline even where work completes inside the call. */
void core_force_pipeline(bool on);

/* Tests only: cores opened from now on with policy.merge merge whenever one adapter is alone,
 * whatever it gains. */
void core_force_merge(bool on);

/* Any thread. The clock of the device's world, and what deadlines are held against. */
int64_t core_now_us(const struct core *c);
int64_t core_wall_ms(const struct core *c);

/* Fills what the core knows; any thread. */
void core_stats(struct core *c, struct engine_stats *out);

#endif
