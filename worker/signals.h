/* SPDX-License-Identifier: Apache-2.0 */
/*
 * signals.h - the signals of a worker, taken in turn by whichever thread waits for them.
 *
 * SIGTERM, SIGINT and SIGHUP are blocked in all threads of ours, so that they wait for the one
 * that asks. Some threads are not ours: a library may have started its own before main(), as
 * OpenBLAS does, one a core, and those block nothing. Whenever no thread asks at that very moment,
 * the kernel hands the signal to one of them, where it would kill the process. So a handler notes
 * it there, and who asks next is told.
 */
#ifndef LORAMILL_WORKER_SIGNALS_H
#define LORAMILL_WORKER_SIGNALS_H

#include <signal.h>

/* Blocks them in this thread and those that it starts, with the handler for the others; *ends gets
 * SIGTERM and SIGINT. SIGPIPE is ignored. */
void signals_begin(sigset_t *ends);

/* Takes one of `set`, after waiting up to `ms` for it; -1: none has come. Any thread that blocks
 * them. What a stranger's thread was handed meanwhile is found by the next call. */
int signals_wait(const sigset_t *set, int ms);

#endif
