/* SPDX-License-Identifier: Apache-2.0 */
/*
 * batch_job.h - a file of OpenAI Batch requests through the engine, without Kafka.
 *
 * One output line for each input line that is not blank, written whole as each request ends, in the
 * order of ending. A result's id is batch_req_<line number>, so that a job that was killed can be
 * resumed from its own output: lines that are there are not done again, a torn last line is
 * cut off.
 *
 * Threads: batch_job_run() uses the caller's thread, the engine's and the store's.
 */
#ifndef LORAMILL_WORKER_TOOLS_BATCH_JOB_H
#define LORAMILL_WORKER_TOOLS_BATCH_JOB_H

#include <stdatomic.h>

#include "engine/engine.h"
#include "worker/store/store.h"

struct batch_config {
    engine *engine;
    store *store;               /* taken: freed before batch_job_run() returns */
    const char *adapters;       /* where they come from; NULL: only the base model is served */
    const char *input;          /* path, or "-" for standard input */
    const char *output;
    bool resume;
    int max_in_flight;          /* requests read and not yet written */
    const atomic_int *stop;     /* becomes non-zero when the user has had enough */
};

struct batch_totals {
    uint64_t lines, skipped;    /* skipped: done by the run that is being resumed */
    uint64_t answered, refused;
    uint64_t prompt_tokens, completion_tokens;
    double seconds;
};

/* LM_OK: every line has its output line. LM_CANCELLED: stopped by `stop`. Else why it can't go on;
 * what was written stays and can be resumed. */
lm_status batch_job_run(const struct batch_config *cfg, struct batch_totals *out,
                        struct lm_err *err);

#endif
