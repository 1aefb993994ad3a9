/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_internal.h - what the adapter_*.c files share. Not for others.
 *
 * The road of an adapter: adapter_config.json -> plan (which module of which layer, with what rank
 * and scale) -> sources (the tensors that the plan demands, checked) -> image (packed cells).
 */
#ifndef LORAMILL_ENGINE_ADAPTER_INTERNAL_H
#define LORAMILL_ENGINE_ADAPTER_INTERNAL_H

#include "engine/adapter.h"
#include "engine/json_util.h"
#include "engine/safetensors.h"

#define ADAPTER_CONFIG_FILE "adapter_config.json"
#define ADAPTER_WEIGHTS_FILE "adapter_model.safetensors"

struct adapter_slot {
    int rank;                   /* 0: not targeted */
    float scale;
    const struct st_tensor *a, *b;      /* [rank, in], [out, rank]; filled by adapter.c */
};

struct adapter_plan {
    int n_layers;
    struct adapter_slot (*slots)[KN_MODULES];   /* [n_layers], owned */
};

/* Path of a module below its layer: "self_attn.q_proj". */
extern const char *const adapter_module_path[KN_MODULES];
/* In and out features of a module. */
void adapter_module_shape(const struct model_config *cfg, enum kn_module m, int64_t *in,
                          int64_t *out);

/* Reads the text of adapter_config.json and resolves it against the model's module names. */
lm_status adapter_config_resolve(const char *text, size_t n, const struct model_config *cfg,
                                 struct adapter_plan *out, struct lm_err *err);
void adapter_plan_release(struct adapter_plan *p);

/* ---- patterns (adapter_match.c) -------------------------------------------------------- */

/* A compiled Python-style regular expression. */
typedef struct adapter_regex adapter_regex;

/* Compiles prefix + pattern + suffix; `what` names the key in errors. */
lm_status adapter_regex_new(const char *prefix, const char *pattern, const char *suffix,
                            const char *what, adapter_regex **out, struct lm_err *err);
void adapter_regex_free(adapter_regex *r);
/* Python's re.match and, if `full`, re.fullmatch. A pattern that runs away is an error. */
lm_status adapter_regex_match(const adapter_regex *r, const char *s, bool full, bool *hit,
                              struct lm_err *err);
/* After a hit: the named group as a number, -1 if it did not take part. */
int adapter_regex_group_int(const adapter_regex *r, const char *group);

/* ---- packing (adapter_pack.c) ---------------------------------------------------------- */

/* Columns of a chunk for a matrix of `rank` rows of `n` elements; 0 when not even the narrowest
 * chunk fits a cell. */
int adapter_chunk_width(int rank, int64_t n, size_t elem_bytes, int64_t cell_bytes);

/* The image's sizes and ranks alone; out->cells stays NULL. Tensors are not looked at. */
lm_status adapter_pack_size(const struct adapter_plan *plan, const struct model_config *cfg,
                            enum kn_dtype dtype, int64_t cell_bytes, struct adapter_image *out,
                            struct lm_err *err);
/* Lays the plan's matrices out and writes the image; out->digest is the caller's. */
lm_status adapter_pack(const struct adapter_plan *plan, const struct model_config *cfg,
                       enum kn_dtype dtype, int64_t cell_bytes, const struct adapter_alloc *alloc,
                       struct adapter_image *out, struct lm_err *err);

#endif
