/* SPDX-License-Identifier: Apache-2.0 */
/*
 * output.h - from sampled ids to text, stop conditions, scores and the request's result.
 *
 * What a sequence and a request gather is theirs, and goes with them; the result is the caller's.
 * Threads: the engine thread's, but for output_result() and what it calls, which whoever polls runs
 * when the engine thread has let go of the request.
 */
#ifndef LORAMILL_ENGINE_OUTPUT_H
#define LORAMILL_ENGINE_OUTPUT_H

#include "engine/mailbox.h"
#include "engine/model_config.h"

/* One scored token as the device gave it. */
struct sampled {
    int32_t id;
    float logprob;
    const int32_t *top_id;      /* [KN_MAX_TOP_LOGPROBS] */
    const float *top_logprob;
};

/* Appends a generated token: text, stop strings, end conditions. *done: s->reason says why. */
lm_status output_push(struct seq *s, const struct sampled *t, const struct model_config *model,
                      bool *done);
/* Records the score of prompt token n + 1, n being the number recorded before. */
lm_status output_push_prompt_score(struct request *r, const struct sampled *t);

/* New text that no stop string can take back; *len may be 0. With `final`, all the rest. Advances
 * s->text_sent. */
void output_stream_text(struct seq *s, bool final, const char **text, size_t *len);

/* The whole text at once, of a sequence that is done and has not been decoded as it went. */
lm_status output_decode(struct seq *s);

/* Ends the text of a sequence that was cut off (cancelled, expired, failed). */
void output_flush(struct seq *s);

/* The numbers of the result of a request whose sequences are all done. */
void output_numbers(struct request *r, int64_t now_us);
/* The result itself, on whatever thread wants it: text that nobody needed before is decoded here.
 * r->result->status other than LM_OK makes it an error, with what was generated so far. Never NULL:
 * it was allocated with the request. */
struct engine_result *output_result(struct request *r);

#endif
