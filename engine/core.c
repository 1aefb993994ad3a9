/* SPDX-License-Identifier: Apache-2.0 */
/* core.c - placeholder until the model half lands: only echo mode opens. */
#include "engine/core.h"

lm_status core_open(const struct core_params *p, struct core **out, struct lm_err *err)
{
    (void)p;
    (void)out;
    return lm_err_set(err, LM_UNSUPPORTED, "this build serves echo mode only");
}
void core_close(struct core *c) { (void)c; }
int core_pool_blocks(const struct core *c) { (void)c; return 0; }
int64_t core_block_bytes(const struct core *c) { (void)c; return 0; }
size_t core_weight_bytes(const struct core *c) { (void)c; return 0; }
void core_run(struct core *c, mailbox *mail, adapters *reg) { (void)c; (void)mail; (void)reg; }
void core_stats(struct core *c, struct engine_stats *out) { (void)c; (void)out; }
