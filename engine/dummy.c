/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dummy.c - see dummy.h.
 *
 * With contents: one buffer of random numbers serves as every A and every B, each at its own place
 * in it, and the packing is that of a real adapter. So a stand-in costs one pass over its bytes.
 */
#include "engine/dummy.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "engine/adapter_internal.h"

#define SCALE 1.0f              /* lora_alpha = rank */
#define SPREAD 64               /* elements from the start of one tensor to the next */

struct stand_ins {
    float *values;
    struct st_tensor *tensor;   /* [n_layers * KN_MODULES * 2] */
};

static int64_t widest(const struct model_config *cfg)
{
    int64_t n = 0, in, out;
    for (int m = 0; m < KN_MODULES; m++) {
        adapter_module_shape(cfg, (enum kn_module)m, &in, &out);
        n = LM_MAX(n, LM_MAX(in, out));
    }
    return n;
}

/* Small numbers in [-0.01, 0.01), so that an answer with an adapter is finite. */
static void fill_random(float *v, size_t n, uint64_t seed)
{
    uint64_t x = seed | 1;
    for (size_t i = 0; i < n; i++) {
        v[i] = ((float)(lm_random(&x) >> 40) * 0x1p-23f - 1.0f) * 0.01f;
    }
}

static void point(struct st_tensor *t, const float *values, int64_t rows, int64_t cols)
{
    *t = (struct st_tensor){ .name = "made up", .dtype_name = "F32", .dtype = KN_F32,
                             .is_float = true, .n_dims = 2, .shape = { rows, cols },
                             .data = values, .bytes = (size_t)(rows * cols) * sizeof *values };
}

static lm_status make_tensors(struct adapter_plan *plan, const struct model_config *cfg, int rank,
                              struct stand_ins *s, struct lm_err *err)
{
    size_t n = (size_t)plan->n_layers * KN_MODULES * 2;
    size_t values = (size_t)widest(cfg) * (size_t)rank + n * SPREAD;
    s->values = lm_reallocarray(NULL, values, sizeof *s->values);
    s->tensor = lm_calloc(n, sizeof *s->tensor);
    if (!s->values || !s->tensor)
        return lm_err_set(err, LM_NOMEM, "no memory for an adapter of rank %d", rank);
    fill_random(s->values, values, (uint64_t)rank * 0x9e3779b97f4a7c15u);
    size_t at = 0;
    for (int l = 0; l < plan->n_layers; l++) {
        for (int m = 0; m < KN_MODULES; m++) {
            struct adapter_slot *slot = &plan->slots[l][m];
            int64_t in, out;
            adapter_module_shape(cfg, (enum kn_module)m, &in, &out);
            point(&s->tensor[at], s->values + at * SPREAD, rank, in);
            slot->a = &s->tensor[at++];
            point(&s->tensor[at], s->values + at * SPREAD, out, rank);
            slot->b = &s->tensor[at++];
        }
    }
    return LM_OK;
}

static lm_status make_plan(const struct model_config *cfg, int rank, unsigned modules,
                           struct adapter_plan *plan, struct lm_err *err)
{
    if (rank < 1 || rank > ADAPTER_MAX_RANK)
        return lm_err_set(err, LM_INVALID, "rank %d; it must be 1..%d", rank, ADAPTER_MAX_RANK);
    if (modules == 0 || modules >> KN_MODULES)
        return lm_err_set(err, LM_INVALID, "modules 0x%x; bits 0..%d name them", modules,
                          KN_MODULES - 1);
    plan->slots = lm_calloc((size_t)cfg->n_layers, sizeof *plan->slots);
    if (!plan->slots)
        return lm_err_set(err, LM_NOMEM, "no memory for an adapter's plan");
    plan->n_layers = cfg->n_layers;
    for (int l = 0; l < cfg->n_layers; l++)
        for (int m = 0; m < KN_MODULES; m++)
            if (modules >> m & 1)
                plan->slots[l][m] = (struct adapter_slot){ .rank = rank, .scale = SCALE };
    return LM_OK;
}

lm_status dummy_image(const struct model_config *cfg, int rank, unsigned modules,
                      enum kn_dtype dtype, int64_t cell_bytes, const struct adapter_alloc *alloc,
                      struct adapter_image *out, struct lm_err *err)
{
    struct adapter_plan plan = { 0 };
    struct stand_ins s = { 0 };
    lm_status st = make_plan(cfg, rank, modules, &plan, err);
    if (st == LM_OK && alloc)
        st = make_tensors(&plan, cfg, rank, &s, err);
    if (st == LM_OK)
        st = alloc ? adapter_pack(&plan, cfg, dtype, cell_bytes, alloc, out, err)
                   : adapter_pack_size(&plan, cfg, dtype, cell_bytes, out, err);
    free(s.values);
    free(s.tensor);
    adapter_plan_release(&plan);
    return st;
}

void dummy_digest(const char *id, int rank, unsigned modules, char out[ENGINE_DIGEST_CHARS])
{
    snprintf(out, ENGINE_DIGEST_CHARS, "dummy:%016llx:%d:%x",
             (unsigned long long)XXH3_64bits(id, strlen(id)), rank, modules);
}
