/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dummy.h - adapters without files, for measuring: the layout and the size of a real one of that
 * rank, with random values, or with no values at all where nobody would read them.
 */
#ifndef LORAMILL_ENGINE_DUMMY_H
#define LORAMILL_ENGINE_DUMMY_H

#include "engine/adapter.h"

/* `modules` has a bit for each enum kn_module, targeted in every layer with `rank`. `alloc` NULL:
 * sizes only, no cells. The digest is the caller's. Errors: LM_INVALID, LM_TOO_LARGE, LM_NOMEM. */
lm_status dummy_image(const struct model_config *cfg, int rank, unsigned modules,
                      enum kn_dtype dtype, int64_t cell_bytes, const struct adapter_alloc *alloc,
                      struct adapter_image *out, struct lm_err *err);

/* "dummy:" and what it was made from; never that of a file. */
void dummy_digest(const char *id, int rank, unsigned modules, char out[ENGINE_DIGEST_CHARS]);

#endif
