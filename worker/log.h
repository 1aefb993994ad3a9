/* SPDX-License-Identifier: Apache-2.0 */
/*
 * log.h - the worker's log sinks: text for people, JSON lines for collectors. Both write one line
 * an event to standard error, with the worker's name, so that several workers may share one stream.
 */
#ifndef LORAMILL_WORKER_LOG_H
#define LORAMILL_WORKER_LOG_H

#include "kernels/base.h"

/* `level` and `format` as in the configuration. `worker` is copied. Start-up only. */
void log_setup(const char *level, const char *format, const char *worker);

#endif
