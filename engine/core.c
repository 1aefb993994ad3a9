/* SPDX-License-Identifier: Apache-2.0 */
/*
 * core.c - opens and closes what the engine thread owns, and sizes the pool.
 *
 * Order matters: weights first (their matrices, that is, which threads fill while the rest is
 * made), then every buffer of the step path, and only then the pool, which takes what the device
 * says is left. On a GPU that is all of it but a reserve for what comes later without asking us:
 * kernels are loaded when first launched, libraries take workspaces, and an allocator rounds up. On
 * a CPU memory belongs to others too, so a quarter of what is free, at most 2 GiB. pool_bytes says
 * otherwise.
 */
#include "engine/core_int.h"

#include <stdlib.h>
#include <string.h>

#include "engine/safetensors.h"

#define CPU_POOL_SHARE 4                        /* a quarter */
#define CPU_POOL_MAX ((size_t)2 << 30)
#define RESERVE_SHARE 50                        /* 2 % of the device, */
#define RESERVE_BYTES ((size_t)256 << 20)       /* and this */
#define MAX_RANKED_SEQS 1024
#define MAX_POOL_BLOCKS ((size_t)1 << 26)

static atomic_bool forced_depth;

void core_force_pipeline(bool on)
{
    atomic_store(&forced_depth, on);
}

static atomic_bool forced_merge;

void core_force_merge(bool on)
{
    atomic_store(&forced_merge, on);
}

/* Bytes for the pool; with them goes how much of what is free is left alone. */
static size_t choose_pool_bytes(const struct core_params *p, const struct kn_props *props)
{
    if (p->pool_bytes)
        return p->pool_bytes;
    if (!strcmp(props->backend, "cpu"))
        return LM_MIN(props->mem_free / CPU_POOL_SHARE, CPU_POOL_MAX);
    size_t reserve = props->mem_total / RESERVE_SHARE + RESERVE_BYTES;
    return props->mem_free > reserve ? props->mem_free - reserve : 0;
}

static void log_pool(const struct core *c, const struct kn_props *props)
{
    size_t bytes = (size_t)c->memory.num_blocks * (size_t)c->memory.block_bytes *
                   (size_t)c->memory.n_layers;
    lm_log(LM_INFO, "engine",
           "pool: %d blocks of %d tokens in %s, %zu MiB (%s); %zu MiB were free on %s after "
           "weights of %zu MiB and buffers, and %zu MiB are left in reserve",
           c->memory.num_blocks, c->p.block_tokens,
           kn_dtype_name(c->p.kv == KN_KV_E4M3 ? KN_E4M3 : props->kv), bytes >> 20,
           c->p.pool_bytes ? "as configured" : "all that is left", props->mem_free >> 20,
           props->name, c->weights.bytes >> 20, c->reserve >> 20);
}

static lm_status open_pool(struct core *c, struct lm_err *err)
{
    const struct model_config *m = c->p.model;
    struct kn_props props;
    kn_props(c->p.dev, &props);
    size_t block = kn_kv_block_bytes(c->p.dev, c->p.kv, c->p.block_tokens, m->kv_heads,
                                     m->head_dim);
    size_t bytes = choose_pool_bytes(&c->p, &props), per_id = block * (size_t)m->n_layers;
    size_t n = LM_MIN(bytes / per_id, MAX_POOL_BLOCKS);
    if (n < 1)
        return lm_err_set(err, LM_TOO_LARGE,
                          "a pool of %zu bytes holds no block: one of %d tokens takes %zu bytes in "
                          "each of %d layers; of %zu bytes on %s, %zu are free after weights and "
                          "buffers", bytes, c->p.block_tokens, block, m->n_layers,
                          props.mem_total, props.name, props.mem_free);
    lm_status st = kn_alloc(c->p.dev, n * per_id, &c->pool_memory, err);
    if (st != LM_OK)
        return lm_err_prefix(err, "pool of %zu bytes (set a smaller pool size)", n * per_id);
    c->memory = (struct kn_pool){ .base = c->pool_memory, .num_blocks = (int32_t)n,
                                  .n_layers = m->n_layers, .block_bytes = (int64_t)block,
                                  .kv = c->p.kv };
    c->reserve = props.mem_free > n * per_id ? props.mem_free - n * per_id : 0;
    log_pool(c, &props);
    return pool_init(&c->pool, (int32_t)n, err);
}

/* Rows of the LoRA workspace (12 bytes each). A token of every sequence at the highest rank there
 * can be, so that no mix of ranks holds a decode up; or rank 64 throughout the largest step. */
static int64_t choose_lora_rows(const struct core_params *p)
{
    int64_t decode = (int64_t)LM_MIN(p->max_seqs, MAX_RANKED_SEQS) * ADAPTER_MAX_RANK;
    return LM_MAX(decode, (int64_t)p->max_step_tokens * 64);
}

static lm_status open_steps(struct core *c, struct lm_err *err)
{
    const struct core_params *p = &c->p;
    c->lora_rows = choose_lora_rows(p);
    struct forward_params fp = {
        .model = p->model, .weights = &c->weights, .dev = p->dev, .shard = { 0, 1 },
        .max_tokens = p->max_step_tokens, .block_tokens = p->block_tokens,
        .lora_rows = c->lora_rows, .x_e4m3 = p->weights == ENGINE_WEIGHTS_FP8_DYNAMIC,
    };
    struct step_params sp = {
        .model = p->model, .dev = p->dev, .max_tokens = p->max_step_tokens,
        .max_seqs = p->max_seqs, .block_tokens = p->block_tokens,
        .lora_rows = c->lora_rows, .record = p->policy.graphs,
    };
    lm_status st = forward_new(&fp, &c->forward, err);
    if (st == LM_OK)
        st = step_new(&sp, &c->step, err);
    if (st == LM_OK)
        st = kn_stream_new(p->dev, &c->stream, err);
    if (st == LM_OK)
        st = forward_tune(c->forward, c->stream, err);
    if (st == LM_OK)
        st = plan_init(&c->plan, p->max_seqs, err);
    if (st == LM_OK && seq_list_reserve(&c->running, p->max_seqs) != LM_OK)
        st = lm_err_set(err, LM_NOMEM, "no memory for %d sequences", p->max_seqs);
    if (st == LM_OK)
        st = queue_init(&c->queue, p->max_waiting, p->policy.fair, err);
    return st;
}

/* Where the time to the first step goes: when each stage had ended. */
struct open_times {
    int64_t begun, matrices, buffers, pool;
};

static void log_times(const struct open_times *t, int64_t now)
{
    lm_log(LM_INFO, "engine", "opening: matrices %.2f s, buffers and tuning %.2f s, pool and host "
           "memory %.2f s, the rest of the weights %.2f s", (double)(t->matrices - t->begun) / 1e6,
           (double)(t->buffers - t->matrices) / 1e6, (double)(t->pool - t->buffers) / 1e6,
           (double)(now - t->pool) / 1e6);
}

/* Where activations are bf16, float16's three bits more buy next to no accuracy, and cost time
 * (docs/cuda.md). */
static enum weights_as weights_as(const struct core_params *p)
{
    struct kn_props props;
    switch (p->weights) {
    case ENGINE_WEIGHTS_AUTO:
        kn_props(p->dev, &props);
        return props.act == KN_BF16 ? WEIGHTS_BF16 : WEIGHTS_STORED;
    case ENGINE_WEIGHTS_STORED: return WEIGHTS_STORED;
    case ENGINE_WEIGHTS_BF16: return WEIGHTS_BF16;
    case ENGINE_WEIGHTS_FP8:
    case ENGINE_WEIGHTS_FP8_DYNAMIC: break;
    }
    return WEIGHTS_FP8;
}

static lm_status open_all(struct core *c, struct lm_err *err)
{
    const struct core_params *p = &c->p;
    const struct shard whole = { 0, 1 };
    const enum weights_as as = weights_as(p);
    struct open_times t = { .begun = lm_now_us() };
    lm_status st = p->files
                       ? weights_load(p->files, p->model, p->dev, whole, as, &c->weights, err)
                       : weights_fill(p->model, p->dev, whole, as, &c->weights, err);
    t.matrices = lm_now_us();
    if (st == LM_OK)
        st = open_steps(c, err);
    t.buffers = lm_now_us();
    if (st == LM_OK)
        st = open_pool(c, err);
    if (st == LM_OK)
        st = evict_init(&c->evict, c->memory.num_blocks, err);
    if (st == LM_OK)
        evict_limit(&c->evict, c->memory.num_blocks, p->policy.adapter_percent,
                    p->policy.adapter_slots);
    /* Keys of dynamic NTK scaling depend on the whole prompt's length: no prefix is the same. */
    if (st == LM_OK)
        st = prefix_init(&c->prefix, &c->pool, &c->evict, p->block_tokens,
                         p->policy.prefix_cache && p->model->rope != ROPE_DYNAMIC, err);
    if (st == LM_OK)
        st = residency_init(&c->tier, p->dev, &c->pool, &c->evict, &c->memory, err);
    if (st == LM_OK)
        st = swap_init(&c->swap, p->dev, c->tier.copy, &c->memory,
                       p->policy.preempt == ENGINE_PREEMPT_RECOMPUTE ? 0 : p->policy.swap_bytes,
                       err);
    t.pool = lm_now_us();
    if (st == LM_OK)
        st = weights_wait(&c->weights, err);
    if (st == LM_OK)
        log_times(&t, lm_now_us());
    if (st == LM_OK)
        st = residency_measure(&c->tier, err);
    if (st == LM_OK && p->policy.merge)
        st = merge_init(&c->merge, p->model, &c->weights, p->dev, c->memory.num_blocks, err);
    if (st == LM_OK)
        GAUGE(c, free_blocks, c->pool.n_free);
    return st;
}

lm_status core_open(const struct core_params *p, struct core **out, struct lm_err *err)
{
    struct core *c = lm_calloc(1, sizeof *c);
    if (!c) {
        safetensors_close(p->files);
        return lm_err_set(err, LM_NOMEM, "no memory for the engine");
    }
    c->p = *p;
    c->next_deadline_ms = INT64_MAX;
    struct kn_props props;
    kn_props(p->dev, &props);
    c->virtual_time = props.virtual_time;
    c->depth = p->policy.pipeline && (!props.in_call || atomic_load(&forced_depth)) ? 2 : 1;
    lm_status st = open_all(c, err);
    if (atomic_load(&forced_merge))
        c->merge.judge.lim = (struct merge_limits){ .min_gain = -1e9 };
    if (st != LM_OK) {
        core_close(c);
        return st;
    }
    c->p.files = NULL;
    *out = c;
    return LM_OK;
}

void core_close(struct core *c)
{
    if (!c)
        return;
    if (c->tier.copy)           /* it may still write to what goes now */
        (void)kn_stream_sync(c->tier.copy, NULL);
    swap_release(&c->swap);
    merge_release(&c->merge);
    residency_release(&c->tier);
    prefix_release(&c->prefix);
    evict_release(&c->evict);
    pool_release(&c->pool);
    plan_release(&c->plan);
    seq_list_release(&c->running);
    queue_release(&c->queue);
    if (c->stream)
        kn_stream_free(c->stream);
    step_free(c->step);
    forward_free(c->forward);
    kn_free(c->p.dev, c->pool_memory);
    if (c->weights.dev)
        weights_release(&c->weights);
    free(c);
}

int core_pool_blocks(const struct core *c)
{
    return c->memory.num_blocks;
}

void core_limits(const struct core *c, int *kv, int *adapters)
{
    const int32_t *cap = c->evict.cap;
    *kv = cap[EVICT_PREFIX] ? cap[EVICT_PREFIX] : c->memory.num_blocks;
    *adapters = cap[EVICT_ADAPTER] ? cap[EVICT_ADAPTER] : c->memory.num_blocks;
}

size_t core_pool_reserve(const struct core *c)
{
    return c->reserve;
}

int64_t core_block_bytes(const struct core *c)
{
    return c->memory.block_bytes;
}

size_t core_weight_bytes(const struct core *c)
{
    return c->weights.bytes;
}

void core_stats(struct core *c, struct engine_stats *out)
{
    out->pool_blocks = c->memory.num_blocks;
#define X(name)                                                                                \
    out->name = (__typeof__(out->name))atomic_load_explicit(&c->counters.name,                 \
                                                            memory_order_relaxed);
    CORE_COUNTERS(X)
#undef X
}
