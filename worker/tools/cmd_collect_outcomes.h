/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_collect_outcomes.h - what a collector waits for and what has come: sets of ids, no Kafka.
 *
 * A job is one of three things: the lines of a JSONL file (every id must come back), a number of
 * outcomes, or "whatever is there". An outcome is a reply, known by its id, or a dead letter, known
 * by the id in the prompt that it carries or, when that has none, by the prompt's very bytes: dead
 * letters keep them unchanged. At-least-once delivery repeats outcomes; repeats are dropped.
 */
#ifndef LORAMILL_WORKER_TOOLS_CMD_COLLECT_OUTCOMES_H
#define LORAMILL_WORKER_TOOLS_CMD_COLLECT_OUTCOMES_H

#include "kernels/base.h"

typedef struct outcomes outcomes;

outcomes *outcomes_new(void);
void outcomes_free(outcomes *j);

/* Awaits the prompt of this line; one that is not JSON, or has no id, is known by its bytes. */
lm_status outcomes_await_line(outcomes *j, const char *line, size_t len);
void outcomes_await_count(outcomes *j, uint64_t n);

enum outcome_news {
    NEWS_NEW,                /* the first of its prompt */
    NEWS_HEALED,             /* a reply after a dead letter: the reply counts */
    NEWS_REPEATED,           /* known already */
    NEWS_FOREIGN,            /* of another job */
};

enum outcome_news outcomes_reply(outcomes *j, const char *id, size_t len);
/* `source` names the prompt's place ("topic/3/17"): a job by count knows dead letters by it. */
enum outcome_news outcomes_dead_letter(outcomes *j, const void *value, size_t len,
                                       const char *source);

struct outcome_counts {
    uint64_t awaited;           /* distinct; 0: whatever is there */
    uint64_t replies, dead_letters;     /* distinct prompts that ended so */
    uint64_t missing, repeated, foreign;
};
void outcomes_counts(const outcomes *j, struct outcome_counts *out);
bool outcomes_complete(const outcomes *j);        /* never, for "whatever is there" */

/* Calls back for each awaited line that has no outcome; `id` is NULL for lines known by their
 * bytes. Only for jobs from lines. */
void outcomes_each_missing(const outcomes *j, void (*call)(void *user, const char *id, size_t len),
                      void *user);

#endif
