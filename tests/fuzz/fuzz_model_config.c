/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_model_config.c - any text as config.json and, after a NUL, generation_config.json. What is
 * accepted has sizes that can be multiplied and frequencies that are numbers.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "engine/model_config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const struct model_config *c)
{
    if (c->hidden < 1 || c->n_layers < 1 || c->q_heads < 1 || c->kv_heads < 1 ||
        c->q_heads % c->kv_heads || c->head_dim < 2 || c->head_dim % 2 || c->vocab < 1)
        abort();
    for (int i = 0; i < c->n_layers; i++)
        if (c->window[i] < 0)
            abort();
    for (int i = 0; i < c->head_dim / 2; i++)
        if (!isfinite(c->inv_freq[i]))
            abort();
    if (!isfinite(c->attention_factor) || !isfinite(c->rms_eps) || c->n_eos > 16)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    lm_log_set_level(LM_ERROR);
    const char *text = (const char *)data;
    const char *nul = size ? memchr(text, 0, size) : NULL;
    size_t n = nul ? (size_t)(nul - text) : size;
    struct model_config c;
    struct lm_err err = { 0 };
    if (model_config_parse(text, n, nul ? nul + 1 : NULL, nul ? size - n - 1 : 0, &c, &err)) {
        if (!err.msg[0] || c.window || c.inv_freq)
            abort();
        return 0;
    }
    check(&c);
    model_config_release(&c);
    return 0;
}
