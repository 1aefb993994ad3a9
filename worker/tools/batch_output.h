/* SPDX-License-Identifier: Apache-2.0 */
/*
 * batch_output.h - the output file of a batch job: whole lines only, and which of them are there.
 */
#ifndef LORAMILL_WORKER_TOOLS_BATCH_OUTPUT_H
#define LORAMILL_WORKER_TOOLS_BATCH_OUTPUT_H

#include <jansson.h>

#include "kernels/base.h"

typedef struct batch_output batch_output;

/* Opens for writing: emptied, or with `resume` scanned and continued. */
lm_status batch_output_open(const char *path, bool resume, batch_output **out, struct lm_err *err);
/* Flushes to disk. */
lm_status batch_output_close(batch_output *o, struct lm_err *err);

bool batch_output_has(const batch_output *o, uint64_t line);
/* Of a line that is there: is it the result of a request with this custom_id, NULL: of none? */
bool batch_output_is_of(const batch_output *o, uint64_t line, const char *custom_id);

#define BATCH_ID_CHARS 40
void batch_id(char id[BATCH_ID_CHARS], uint64_t line);  /* "batch_req_000042" */

/* Takes the reference; NULL is the failure to have made it. One write, then flushed. */
lm_status batch_output_write(batch_output *o, json_t *line, struct lm_err *err);

#endif
