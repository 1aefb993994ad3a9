/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_completion.h - a completion as a JSON tree; the Avro encoder writes the same tree, and
 * `loramill batch` uses the logprobs object.
 *
 * All functions return NULL when memory is exhausted, or when a text is not UTF-8. The tree borrows
 * its strings from what it describes.
 */
#ifndef LORAMILL_WORKER_JSON_COMPLETION_H
#define LORAMILL_WORKER_JSON_COMPLETION_H

#include <yyjson.h>
#include "worker/message.h"

/* finish_reason of a part's choices */
#define COMPLETION_PART "part"

/* The whole reply, as docs/messages.md describes it. */
yyjson_mut_val *completion_value(yyjson_mut_doc *d, const struct completion *done);

/* OpenAI's logprobs object of a completion:
 * {"tokens": [...], "token_logprobs": [...], "top_logprobs": [...], "text_offset": [...]}; JSON
 * null when the choice has none. NaN (a prompt's first token) is null, -inf is -9999; offsets count
 * characters (code points), not bytes; a piece that is not UTF-8 reads "bytes:\xe2\x80". */
yyjson_mut_val *completion_logprobs(yyjson_mut_doc *d, const struct engine_choice *choice);

/* A token's piece as a string value, in the form described above. */
yyjson_mut_val *completion_piece(yyjson_mut_doc *d, const char *piece, size_t len);

#endif
