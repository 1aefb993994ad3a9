/* SPDX-License-Identifier: Apache-2.0 */
/*
 * echo.h - the engine's stand-in without a model: each prompt is its own answer.
 *
 * For measuring the road around the engine (Kafka, codecs, ledger, store) by itself. A request is
 * answered where it is submitted; its result waits in the mailbox like any other, and takes a slot
 * until it is polled. The engine's thread only lets go of adapters.
 */
#ifndef LORAMILL_ENGINE_ECHO_H
#define LORAMILL_ENGINE_ECHO_H

#include "engine/adapters.h"
#include "engine/mailbox.h"

struct echo_counters;
lm_status echo_new(struct echo_counters **out, struct lm_err *err);
void echo_free(struct echo_counters *c);

/* Checks the request and answers it. The text that it gets back: prompt with its context, the last
 * message, or "" for token ids. Tokens are estimated as a quarter of the bytes, rounded up. */
lm_status echo_submit(struct echo_counters *c, mailbox *mail, const struct engine_request *r,
                      engine_handle *out, struct lm_err *err);

void echo_run(mailbox *mail, adapters *reg);
void echo_stats(struct echo_counters *c, struct engine_stats *out);

#endif
