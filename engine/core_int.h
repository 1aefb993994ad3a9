/* SPDX-License-Identifier: Apache-2.0 */
/*
 * core_int.h - the engine thread's state, and what the files that work on it offer each other:
 * core.c opens and closes, loop.c turns, apply.c carries plans out, finish.c ends things.
 */
#ifndef LORAMILL_ENGINE_CORE_INT_H
#define LORAMILL_ENGINE_CORE_INT_H

#include <stdatomic.h>

#include "engine/core.h"
#include "engine/merge.h"
#include "engine/residency.h"
#include "engine/step.h"
#include "engine/swap.h"

/* X(name): one word each, written by the engine thread, read by core_stats(). */
#define CORE_COUNTERS(X)                                                                       \
    X(waiting) X(running) X(loading) X(free_blocks) X(kv_blocks) X(adapter_blocks)             \
    X(adapters_resident) X(steps) X(prefill_tokens) X(decode_tokens) X(finished) X(failed)     \
    X(preemptions) X(adapter_loads) X(adapter_evictions) X(adapter_hits) X(step_us) X(host_us) \
    X(waiting_prompt_tokens) X(step_adapters) X(step_seqs) X(early_aborts) X(swap_outs)       \
    X(swap_ins) X(swap_bytes) X(adapter_bytes) X(prefix_hit_tokens) X(merges) X(merged_steps)

struct core_counters {
#define X(name) atomic_uint_fast64_t name;
    CORE_COUNTERS(X)
#undef X
};

/* One writer, so a load and a store suffice. */
#define COUNT(c, name, by)                                                                     \
    atomic_store_explicit(&(c)->counters.name,                                                 \
                          atomic_load_explicit(&(c)->counters.name, memory_order_relaxed) +    \
                              (uint64_t)(by), memory_order_relaxed)
#define GAUGE(c, name, v)                                                                      \
    atomic_store_explicit(&(c)->counters.name, (uint64_t)(v), memory_order_relaxed)

struct core {
    struct core_params p;
    bool virtual_time;
    struct weights weights;
    struct forward *forward;
    struct step *step;
    kn_stream *stream;
    int64_t lora_rows;          /* of the LoRA workspace, sized once */
    void *pool_memory;
    size_t reserve;             /* device memory that was free and is left so */
    struct kn_pool memory;      /* the pool as kernels see it */
    struct pool pool;           /* its book */
    struct evict evict;
    struct prefix prefix;
    struct residency_tier tier;
    struct swap swap;
    struct merge merge;
    struct seq_list running;
    struct queue queue;         /* who waits */
    struct estimate estimate;
    struct plan plan;
    struct request *late;       /* of the step that is being read: their first token is too late */
    int64_t next_deadline_ms;   /* no later than the earliest of who runs, INT64_MAX: none */
    lm_status failed;
    int starved;                /* steps in a row that got no memory */
    int depth;                  /* steps in flight at most: 2 plans one while one runs */
    int64_t step_done_us;       /* when the last step was seen to have passed */
    struct core_counters counters;

    /* from core_begin() on */
    mailbox *mail;
    adapters *reg;
};

/* ---- apply.c --------------------------------------------------------------------------- */

/* Memory for those that the plan admits. False when one got none: its request has ended, and the
 * plan is void. */
bool apply_open_admitted(struct core *c, const struct plan *p);
/* Ends those that can't be in time any more. */
void apply_expire(struct core *c, const struct plan *p);
lm_status apply_plan(struct core *c, struct plan *p, struct lm_err *err);

/* ---- finish.c -------------------------------------------------------------------------- */

/* It joins those that wait. */
void finish_enter_waiting(struct core *c, struct seq *s);
/* Blocks, adapter and place in the list are given up; the caller sets the next state. */
void finish_leave_running(struct core *c, struct seq *s);
void finish_leave_waiting(struct core *c, struct seq *s);
/* Any state to DONE; the last one of a request posts its result and frees it. */
void finish_seq(struct core *c, struct seq *s, enum engine_reason reason);
/* Ends what is left of a request before its time, and frees it. */
void finish_request(struct core *c, struct request *r, enum engine_reason reason,
                    lm_status status, const char *why);
/* A step was launched: prompt blocks that it fills are offered to the prefix cache. */
void finish_launch(struct core *c, const struct plan *p);
/* A step has passed: tokens to text, ends, results. */
void finish_step(struct core *c, const struct step_results *res);

/* ---- core_check.c ---------------------------------------------------------------------- */

/* Every invariant of the books; LM_INTERNAL names the broken one. See core_check.c. */
lm_status core_check(const struct core *c, struct lm_err *err);

#if defined(LORAMILL_CHECKS) || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CORE_CHECKS 1
#else
#define CORE_CHECKS 0
#endif

#endif
