/* SPDX-License-Identifier: Apache-2.0 */
/*
 * progress.h - how far long work has come: a bar on a terminal, plain lines otherwise.
 *
 *   submit  [##########----------]  512/1,000   51%  134 prompts/s  ETA 0:04  3 refused
 *
 * On a terminal the line is redrawn in place at most ten times a second; elsewhere (a log, a pipe)
 * a line is written every five seconds and once at the end. The rate is smoothed over the last
 * seconds, the closing line's is the mean. Text goes to `out`, by default stderr, so that stdout
 * stays free for data.
 *
 * Threads: one at a time. Nothing here allocates after progress_new().
 */
#ifndef LORAMILL_WORKER_TOOLS_PROGRESS_H
#define LORAMILL_WORKER_TOOLS_PROGRESS_H

#include <stdio.h>
#include "kernels/base.h"

typedef struct progress progress;

enum progress_style { PROGRESS_AUTO, PROGRESS_BAR, PROGRESS_LINES, PROGRESS_SILENT };

struct progress_config {
    FILE *out;                  /* NULL: stderr */
    const char *label;          /* "submit" */
    const char *unit;           /* plural: "prompts" */
    uint64_t total;             /* 0: not known; no bar's end, no percentage, no ETA */
    enum progress_style style;  /* AUTO: a bar when `out` is a terminal */
    int columns;                /* 0: the terminal's width, else 80 */
    int64_t (*now_us)(void);    /* NULL: lm_now_us; tests have their own */
};

/* NULL when memory is exhausted; every function below accepts that and does nothing. */
progress *progress_new(const struct progress_config *cfg);
void progress_free(progress *p);        /* clears an unfinished bar */

void progress_set(progress *p, uint64_t done);          /* draws when it is time */
void progress_note(progress *p, const char *fmt, ...) LM_PRINTF(2, 3); /* after the ETA */

/* A whole line that stays, above the bar. */
void progress_say(progress *p, const char *fmt, ...) LM_PRINTF(2, 3);

/* Draws the final state with the mean rate and ends the line. */
void progress_finish(progress *p);

/* "1,234,567" and "0:07", "12:34", "3:04:05" into a caller's buffer of at least 32 bytes, which
 * they return. */
char *progress_count(char buf[32], uint64_t n);
char *progress_clock(char buf[32], double seconds);

#endif
