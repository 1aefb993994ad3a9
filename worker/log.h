/* SPDX-License-Identifier: Apache-2.0 */
/*
 * log.h - the worker's log sinks: text for people, JSON lines for collectors. Both write one line
 * an event to standard error, with the worker's name, so that several workers may share one stream.
 */
#ifndef LORAMILL_WORKER_LOG_H
#define LORAMILL_WORKER_LOG_H

#include <stdatomic.h>

#include "kernels/base.h"

/* `level` and `format` as in the configuration. `worker` is copied. Start-up only. */
void log_setup(const char *level, const char *format, const char *worker);

/* For what every one of many records may say while something is away: one line in LOG_SELDOM_S
 * seconds is a warning, with the number of those before it that were not (they are for debugging).
 * Any thread. */
enum { LOG_SELDOM_S = 10 };

struct log_seldom {             /* all zero at first */
    atomic_llong next_us;
    atomic_uint left_out;
};

void log_seldom(struct log_seldom *s, const char *component, const char *fmt, ...) LM_PRINTF(3, 4);

#endif
