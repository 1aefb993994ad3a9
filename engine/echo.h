/* SPDX-License-Identifier: Apache-2.0 */
/*
 * echo.h - the engine's stand-in without a model: each prompt is its own answer.
 *
 * For measuring the road around the engine (Kafka, codecs, ledger, store) by itself. Requests take
 * the same mailbox and the same thread as real ones.
 */
#ifndef LORAMILL_ENGINE_ECHO_H
#define LORAMILL_ENGINE_ECHO_H

#include "engine/adapters.h"
#include "engine/mailbox.h"

struct echo_counters;
lm_status echo_new(struct echo_counters **out, struct lm_err *err);
void echo_free(struct echo_counters *c);

/* The text that a request gets back: prompt with its context, the last message, or "" for token
 * ids. Malloc'ed. */
lm_status echo_text(const struct engine_request *r, char **text, size_t *len, struct lm_err *err);
/* Tokens are estimated as a quarter of the bytes, rounded up. */
int echo_tokens(size_t len);

void echo_run(struct echo_counters *c, mailbox *mail, adapters *reg);
void echo_stats(struct echo_counters *c, struct engine_stats *out);

#endif
