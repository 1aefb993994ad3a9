/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_prompt.h - a prompt from a JSON object; the Avro decoder builds the same object, so that
 * both encodings have one set of rules and of error texts (docs/messages.md is the contract).
 *
 * The parts (params, messages, prompt) are public because `loramill batch` reads them from OpenAI
 * request bodies. All results point into the reader's arena.
 */
#ifndef LORAMILL_WORKER_CODEC_JSON_PROMPT_H
#define LORAMILL_WORKER_CODEC_JSON_PROMPT_H

#include "worker/codec/json_field.h"

/* The whole prompt. `model_name`, when not NULL, must equal the prompt's `model` if it has one.
 * `source`, or NULL: its text may stay there, then it is not terminated. */
lm_status json_prompt_read(yyjson_val *root, enum encoding encoding, const char *model_name,
                           const struct json_source *source, struct prompt **out,
                           struct lm_err *err);

/* Sampling parameters under OpenAI's names; `obj` NULL gives the defaults. Every member of obj must
 * be a parameter: take others (model, prompt, ...) out of a request body first. */
lm_status json_params_read(const struct json_reader *r, yyjson_val *obj,
                           struct engine_params *out);

/* All of those names, NULL-terminated. */
extern const char *const json_param_names[];

/* [{"role": "system"|"user"|"assistant", "content": string}, ...], at least one. */
lm_status json_messages_read(const struct json_reader *r, const char *key, yyjson_val *v,
                             const struct engine_message **out, int *n);

/* A prompt string, which may contain U+0000 (hence the length), and may stay in the source. */
lm_status json_text_read(const struct json_reader *r, const char *key, yyjson_val *v,
                         const char **out, size_t *len);

enum { PROMPT_MAX_TOKENS = 512 * 1024, PROMPT_MAX_ID = 512 };

#endif
