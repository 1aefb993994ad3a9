/* SPDX-License-Identifier: Apache-2.0 */
/*
 * safetensors.h - read-only access to one safetensors file, or to a sharded set with its index.
 *
 * The file is mapped; the header is validated whole before anything is handed out (length, JSON
 * depth and size, dtype, shape product without overflow, offsets inside the file, ascending, no
 * overlap, no hole). A tensor's data pointer lives as long as the set.
 * Format: https://github.com/huggingface/safetensors (README, "Format").
 */
#ifndef LORAMILL_ENGINE_SAFETENSORS_H
#define LORAMILL_ENGINE_SAFETENSORS_H

#include "kernels/kernels.h"

#define ST_MAX_DIMS 8

struct st_tensor {
    const char *name;
    char dtype_name[8];         /* "BF16"; any dtype of the format is accepted here */
    enum kn_dtype dtype;        /* valid if is_float */
    bool is_float;              /* F32, F16 or BF16 */
    int n_dims;
    int64_t shape[ST_MAX_DIMS];
    const void *data;
    size_t bytes;
};

typedef struct safetensors safetensors;

/* One file. */
lm_status safetensors_open(const char *path, safetensors **out, struct lm_err *err);
/* dir/model.safetensors, or dir/model.safetensors.index.json and its shards (names may not leave
 * the folder; a tensor that the index promises and a shard lacks is an error). */
lm_status safetensors_open_model(const char *dir, safetensors **out, struct lm_err *err);
void safetensors_close(safetensors *st);

int safetensors_count(const safetensors *st);
const struct st_tensor *safetensors_at(const safetensors *st, int i);
const struct st_tensor *safetensors_find(const safetensors *st, const char *name);  /* hashed */

#endif
