/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_dirs.h - the adapters in a local folder: one PEFT folder per id, ids may have segments
 * (brand/voice lies in DIR/brand/voice).
 */
#ifndef LORAMILL_WORKER_STORE_ADAPTER_DIRS_H
#define LORAMILL_WORKER_STORE_ADAPTER_DIRS_H

#include "kernels/base.h"

typedef lm_status adapter_dirs_fn(void *ctx, const char *id, const char *dir, struct lm_err *err);

/* Calls fn for every folder below `root` that holds adapter_config.json, in order of ids; stops at
 * the first failure. LM_NOT_FOUND when root cannot be read. */
lm_status adapter_dirs_each(const char *root, adapter_dirs_fn *fn, void *ctx, struct lm_err *err);

#endif
