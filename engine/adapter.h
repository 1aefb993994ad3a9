/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter.h - a PEFT LoRA folder, validated whole and packed into pool cells.
 *
 * adapter_parse() reads adapter_config.json and adapter_model.safetensors (never pickle), resolves
 * ranks and scales of every module (r, lora_alpha, use_rslora, rank_pattern, alpha_pattern,
 * target_modules as list, regex or "all-linear", exclude_modules, layers_to_transform,
 * layers_pattern, fan_in_fan_out), demands that config and tensors say the same, that every tensor
 * is used, has the right shape and is finite, and writes the position-independent image that
 * kernels.h (struct kn_lora_row) describes. What we don't serve is refused by name.
 */
#ifndef LORAMILL_ENGINE_ADAPTER_H
#define LORAMILL_ENGINE_ADAPTER_H

#include "engine/engine.h"
#include "engine/model_config.h"

#define ADAPTER_MAX_RANK 4096           /* beyond any sense, and int32 stays far away */

struct adapter_image {
    uint8_t *cells;             /* [n_cells * cell_bytes]; from the adapter_alloc, owned */
    int n_cells;
    int64_t cell_bytes;
    int rank_max;
    int32_t module_rank[KN_MODULES];    /* largest over the layers; 0: not targeted at all */
    char digest[ENGINE_DIGEST_CHARS];   /* over both files, see adapter_digest() */
};

/* Where the image lives: pinned memory in the engine. NULL in its place means malloc. */
struct adapter_alloc {
    void *ctx;
    void *(*alloc)(void *ctx, size_t bytes);
    void (*free)(void *ctx, void *p);
};

/* `max_bytes` bounds each of the two files. `cell_bytes` is the pool's block_bytes, a multiple of
 * 16. Errors name folder and file, key or tensor: LM_NOT_FOUND, LM_FORMAT, LM_INVALID,
 * LM_UNSUPPORTED, LM_MISMATCH (shapes, missing or leftover tensors), LM_TOO_LARGE, LM_NOMEM. */
lm_status adapter_parse(const char *dir, const struct model_config *cfg, enum kn_dtype lora_dtype,
                        int64_t cell_bytes, size_t max_bytes, const struct adapter_alloc *alloc,
                        struct adapter_image *out, struct lm_err *err);
void adapter_image_release(struct adapter_image *img, const struct adapter_alloc *alloc);

/* "sha256:" + hex of SHA-256 over, for adapter_config.json then adapter_model.safetensors: the
 * name, a NUL, the size as 8 bytes big-endian, the content. */
lm_status adapter_digest(const char *dir, char out[ENGINE_DIGEST_CHARS], struct lm_err *err);

#endif
