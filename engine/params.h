/* SPDX-License-Identifier: Apache-2.0 */
/*
 * params.h - sampling parameters: checked ranges, and defaults of generation_config.json.
 */
#ifndef LORAMILL_ENGINE_PARAMS_H
#define LORAMILL_ENGINE_PARAMS_H

#include "engine/engine.h"
#include "engine/model_config.h"

/* `out` = `in` with the model's defaults where the request is silent (engine_params.set), top_k -1
 * written as 0, and near-zero temperatures as 0. LM_INVALID names the parameter and its range.
 * `model` may be NULL (echo mode): no defaults, token ids unchecked. */
lm_status params_resolve(const struct engine_params *in, const struct model_config *model,
                         struct engine_params *out, struct lm_err *err);

#endif
