/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_adapter_config.c - any text as adapter_config.json. A plan that is accepted targets
 * something, with ranks in range and finite scales.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "engine/adapter_internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct model_config cfg = { .hidden = 64, .ffn = 128, .n_layers = 3, .q_heads = 4,
                                .kv_heads = 2, .head_dim = 16, .vocab = 32, .qk_norm = true };
    struct adapter_plan plan;
    struct lm_err err = { 0 };
    if (adapter_config_resolve((const char *)data, size, &cfg, &plan, &err)) {
        if (!err.msg[0] || plan.slots)
            abort();
        return 0;
    }
    int targeted = 0;
    for (int l = 0; l < plan.n_layers; l++) {
        for (int m = 0; m < KN_MODULES; m++) {
            const struct adapter_slot *s = &plan.slots[l][m];
            targeted += s->rank > 0;
            if (s->rank < 0 || s->rank > ADAPTER_MAX_RANK || !isfinite(s->scale))
                abort();
        }
    }
    if (!targeted)
        abort();
    adapter_plan_release(&plan);
    return 0;
}
