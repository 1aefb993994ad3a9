/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_completion.h - a completion, written as JSON or Avro; `loramill batch` uses the logprobs
 * object.
 *
 * Errors, a text that is not UTF-8 for example, come with out_take().
 */
#ifndef LORAMILL_WORKER_CODEC_JSON_COMPLETION_H
#define LORAMILL_WORKER_CODEC_JSON_COMPLETION_H

#include "worker/codec/message.h"
#include "worker/codec/message_out.h"

/* finish_reason of a part's choices */
#define COMPLETION_PART "part"

/* The whole reply, as docs/messages.md describes it. */
void completion_write(struct message_out *o, const struct completion *done);

/* OpenAI's logprobs object of a completion:
 * {"tokens": [...], "token_logprobs": [...], "top_logprobs": [...], "text_offset": [...]}; JSON
 * null when the choice has none. NaN (a prompt's first token) is null, -inf is -9999; offsets count
 * characters (code points), not bytes; a piece that is not UTF-8 reads "bytes:\xe2\x80". */
void completion_logprobs(struct message_out *o, const struct engine_choice *choice);

/* A token's piece as a string, in the form described above. */
void completion_piece(struct message_out *o, const char *piece, size_t len);

#endif
