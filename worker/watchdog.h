/* SPDX-License-Identifier: Apache-2.0 */
/*
 * watchdog.h - ends a process that doesn't end by itself, and an engine that has hung.
 *
 * A worker that neither works nor dies is worse than a crash: nobody starts it again. So one thread
 * watches the two times when the main thread can't wait for signals:
 *
 *   STARTING    a signal ends the process with status 0: nothing was accepted, loading may take
 *               minutes
 *   DRAINING    what runs finishes or is handed back, finished work is committed, the group is
 *               left, our threads end; WATCHDOG_CLOSE_MS beyond the drain, whatever is silent
 *   RELEASING   all of that is done: the end is orderly. Only librdkafka is left, whose destroy may
 *               wait for a silent broker, or for ever on one forgotten reference. After
 *               WATCHDOG_RELEASE_MS the process ends without it, with the status it has earned
 *   CLOSING     engine_close(), which waits for the step that is under way; WATCHDOG_HUNG_MS, then
 *               as above
 *
 * At work, the main thread sees to two that can't come back by themselves: an engine or an intake
 * that hangs (below), and a librdkafka producer that doesn't let itself be destroyed
 * (transaction_client.c makes a new one after an error of unknown outcome, producer.c when it keeps
 * to a leader of before; both for another batch.size). Without a producer nothing can be committed;
 * after WATCHDOG_CLOSE_PRODUCER_MS the worker fails, and ends as on any other failure.
 *
 * A second signal ends the process with status 1; so does a DRAINING that outlasts its time.
 *
 * The engine is watched all the while, at work by the main thread, later from here: one that runs
 * prompts and makes no step for engine.hang_timeout_ms has hung, and nothing in this process can
 * bring it back. A drain may be shorter than that time; then, at the end, one that has made no
 * step for WATCHDOG_HUNG_MS (and thrice its slowest step) although all its prompts are cancelled
 * counts as hung too. Both are noted in the journal, so that its prompts are suspects (journal.h),
 * and end the process with status 1. A process that ends in order removes its journal, whoever ends
 * it.
 *
 * It also knows whether this process was stopped (SIGSTOP, a frozen machine): the thread that looks
 * every 100 ms then looked late. No other thread can tell, for they wait for brokers. That time is
 * no hang: nobody could work.
 *
 * Threads: the functions are the main thread's, except watchdog_slept().
 */
#ifndef LORAMILL_WORKER_WATCHDOG_H
#define LORAMILL_WORKER_WATCHDOG_H

#include <signal.h>

#include "worker/worker.h"

enum {
    WATCHDOG_CLOSE_MS = 30000,  /* after the drain, for all that follows */
    WATCHDOG_FAILED_MS = 15000, /* the same, for a worker that has failed: it doesn't drain */
    WATCHDOG_RELEASE_MS = 5000,
    WATCHDOG_HUNG_MS = 10000,
    WATCHDOG_CLOSE_PRODUCER_MS = 15000,
};

typedef struct watchdog watchdog;

/* NULL: out of memory. `signals` are blocked in all threads. */
watchdog *watchdog_new(struct worker *w, const sigset_t *signals);
void watchdog_free(watchdog *d);                /* NULL is allowed */

void watchdog_starting(watchdog *d);            /* STARTING */
void watchdog_stop(watchdog *d);                /* no phase: the main thread takes signals */
void watchdog_draining(watchdog *d, int64_t budget_ms);
/* RELEASING: the process may end with `status` from now on, and does after `ms`. */
void watchdog_releasing(watchdog *d, int status, int64_t ms);
/* Nothing is left to do but to wait for the end of RELEASING, with a watchdog thread or without. */
_Noreturn void watchdog_await_end(watchdog *d);
void watchdog_closing(watchdog *d);             /* CLOSING: nothing looks at the engine any more */

/* Has the engine, or intake inside it, hung? Then this does not return. Has the producer? Then the
 * worker has failed when it does. */
void watchdog_look(watchdog *d);

/* Was this process stopped for some seconds, within the last minute? Any thread. */
bool watchdog_slept(struct worker *w);

#endif
