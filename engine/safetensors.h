/* SPDX-License-Identifier: Apache-2.0 */
/*
 * safetensors.h - read-only access to one safetensors file, or to a sharded set with its index.
 *
 * The file is mapped; the header is validated whole before anything is handed out (length, JSON
 * depth and size, dtype, shape product without overflow, offsets inside the file, ascending, no
 * overlap, no hole). A tensor's data pointer lives as long as the set, and is aligned to its
 * element: the format does not promise that, so what a file leaves misaligned is copied. Whoever
 * wants much of it reads with safetensors_read() instead, by pread into a buffer of its own: no
 * page fault for every 4 KiB, and a file that shrinks is an error rather than a signal. Format:
 * https://github.com/huggingface/safetensors (README, "Format").
 *
 * Threads: a set is immutable once open; everything but safetensors_close() may be called from any
 * thread at a time.
 */
#ifndef LORAMILL_ENGINE_SAFETENSORS_H
#define LORAMILL_ENGINE_SAFETENSORS_H

#include "kernels/kernels.h"

#define ST_MAX_DIMS 8
#define ST_MAX_HEADER (16u << 20)       /* bytes of JSON; real ones stay far below one MiB */

struct st_tensor {
    const char *name;
    char dtype_name[16];        /* "BF16"; any dtype of the format is accepted here */
    enum kn_dtype dtype;        /* valid if is_float */
    bool is_float;              /* F32, F16 or BF16 */
    int n_dims;
    int64_t shape[ST_MAX_DIMS];
    const void *data;
    size_t bytes;
    int part;                   /* which of the set's files it is in, and from which byte */
    size_t at;
};

typedef struct safetensors safetensors;

/* One file. Errors: LM_NOT_FOUND, LM_FORMAT, LM_TOO_LARGE, LM_IO, LM_NOMEM; all name the file. */
lm_status safetensors_open(const char *path, safetensors **out, struct lm_err *err);
/* The same over bytes that the caller keeps alive; `name` stands for the file in messages. */
lm_status safetensors_open_memory(const void *bytes, size_t n, const char *name,
                                  safetensors **out, struct lm_err *err);
/* dir/model.safetensors, or dir/model.safetensors.index.json and its shards (names may not leave
 * the folder; a tensor that the index promises and a shard lacks is an error). */
lm_status safetensors_open_model(const char *dir, safetensors **out, struct lm_err *err);
void safetensors_close(safetensors *st);        /* NULL is allowed */

/* Tensors are in the order of their names. */
int safetensors_count(const safetensors *st);
const struct st_tensor *safetensors_at(const safetensors *st, int i);
/* NULL when there is none. Binary search: no input can make it slow. */
const struct st_tensor *safetensors_find(const safetensors *st, const char *name);
/* Bytes [from, from + n) of a tensor of this set to `dst`, from the file itself. LM_IO names file
 * and tensor. */
lm_status safetensors_read(const safetensors *st, const struct st_tensor *t, size_t from,
                           size_t n, void *dst, struct lm_err *err);
/* Has the system begin to read the first `bytes` of the files, in their order; doesn't wait. */
void safetensors_ahead(const safetensors *st, size_t bytes);

#endif
