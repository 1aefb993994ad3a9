/* SPDX-License-Identifier: Apache-2.0 */
/*
 * model_config_internal.h - what model_config.c shares with its neighbours model_config_rope.c and
 * model_config_fields.c. Not for others.
 */
#ifndef LORAMILL_ENGINE_MODEL_CONFIG_INTERNAL_H
#define LORAMILL_ENGINE_MODEL_CONFIG_INTERNAL_H

#include "engine/json_util.h"
#include "engine/model_config.h"

/* Refuses, by name, fields that change the maths and are switched on; logs unknown ones. */
lm_status model_config_check_fields(const struct ju *j);

/* rope_theta, rope_scaling or rope_parameters into c->rope*, inv_freq, attention_factor, dyn_*.
 * Needs head_dim and max_position. */
lm_status model_config_rope(const struct ju *j, struct model_config *c);

#endif
