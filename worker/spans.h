/* SPDX-License-Identifier: Apache-2.0 */
/*
 * spans.h - what a worker did with a prompt, as spans of the trace that the prompt came with, to an
 * OpenTelemetry collector (OTLP over HTTP, as JSON). Off unless traces.otlp_url is set.
 *
 *   (who sent the prompt)                        its header traceparent
 *     process TOPIC        CONSUMER              from read until the outcome is durable
 *       text_completion MODEL, chat MODEL        INTERNAL: in the engine
 *       send TOPIC         PRODUCER              the reply or dead letter, until acknowledged
 *
 * Names and attributes are those of OpenTelemetry's conventions for Kafka and for generative AI;
 * docs/operations.md lists them. A prompt is followed if its traceparent says "sampled"; whether
 * that is one in a thousand is decided by who sends it. No text, key, header or id of a prompt is
 * in a span: where its record lies says which one it is.
 *
 * Spans are told of an outcome, never asked: they wait in a list of at most SPANS_MAX prompts for a
 * thread that sends them once in a second. What does not fit, or what the collector does not take,
 * is dropped and counted. A prompt that is not followed costs a look at its headers.
 *
 * Threads: spans_end() may be called by any; the rest by the one that starts and ends the worker.
 */
#ifndef LORAMILL_WORKER_SPANS_H
#define LORAMILL_WORKER_SPANS_H

#include <jansson.h>

#include "worker/job.h"

enum { SPANS_MAX = 4096, SPANS_BATCH = 512 };

struct span_context {
    uint8_t trace[16], parent[8];
    bool sampled;
};

/* W3C Trace Context, any version of its first form. False: none, or a damaged one, which is as
 * good as none. */
bool span_context_parse(const void *value, size_t len, struct span_context *out);

typedef struct spans spans;
struct worker;

lm_status spans_new(struct worker *w, spans **out, struct lm_err *err);
/* The job has ended so. NULL is allowed. */
void spans_end(spans *s, const struct job *j, enum job_outcome outcome);
/* Sends what is left, if the collector takes it within a second. */
void spans_stop(spans *s);
void spans_free(spans *s);

/* What is sent for the prompts that wait, at most SPANS_BATCH of them, which are forgotten; NULL:
 * there are none. */
json_t *spans_take(spans *s, size_t *n);

#endif
