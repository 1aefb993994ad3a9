/* SPDX-License-Identifier: Apache-2.0 */
/*
 * openai.h - lines of OpenAI's Batch API: requests in, results out.
 *
 * A request line is {"custom_id", "method": "POST", "url": "/v1/completions" or
 * "/v1/chat/completions", "body"}; body.model is an adapter's id, or the base model's name. A
 * result line is {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}.
 * Format: https://platform.openai.com/docs/api-reference/batch ("request input object", "request
 * output object").
 */
#ifndef LORAMILL_WORKER_TOOLS_OPENAI_H
#define LORAMILL_WORKER_TOOLS_OPENAI_H

#include <jansson.h>

#include "worker/codec/message.h"

enum openai_kind { OPENAI_COMPLETION, OPENAI_CHAT };

/* All pointers live in the arena. */
struct openai_request {
    enum openai_kind kind;
    const char *custom_id;      /* NULL when the line was bad before it could be read */
    const char *model;          /* as given; NULL when the line was bad */
    const char *adapter;        /* NULL: base model */
    const char *prompt;         /* exactly one of prompt, token_ids, messages */
    size_t prompt_len;
    const int32_t *token_ids;
    int n_token_ids;
    const struct engine_message *messages;
    int n_messages;
    struct engine_params params;
    struct arena *arena;
};

/* Reads one line. *out is set even on failure (NULL only on LM_NOMEM), with custom_id if the line
 * had one, so that the error can be told to whom it belongs. */
lm_status openai_parse(const char *line, size_t len, const char *base_model,
                       struct openai_request **out, struct lm_err *err);
void openai_request_free(struct openai_request *r);

/* Result lines; a new reference, or NULL when memory is exhausted. `id` names the line. */
json_t *openai_result_line(const char *id, const struct openai_request *r,
                           const char *adapter_digest, const struct engine_result *result);
json_t *openai_error_line(const char *id, const char *custom_id, const struct lm_err *err);

#endif
