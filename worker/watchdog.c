/* SPDX-License-Identifier: Apache-2.0 */
/*
 * watchdog.c - see watchdog.h. The lock is held while the engine is looked at and while the process
 * is ended, so that neither the engine nor the journal goes away under the watchdog's hands.
 */
#include "worker/watchdog.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "worker/journal.h"
#include "worker/signals.h"

enum { TICK_MS = 100, CLOSING_LEAST_MS = 2000, SLEPT_MS = 3000, SLEPT_MEMORY_MS = 60000 };

enum phase { NONE, STARTING, DRAINING, RELEASING, CLOSING };

struct watchdog {
    struct worker *w;
    sigset_t signals;
    pthread_t thread;
    bool started, said;
    atomic_bool done;
    atomic_int status;          /* to end with, from RELEASING on */
    pthread_mutex_t lock;       /* everything below */
    enum phase phase;
    int64_t end_us;             /* of this phase */
    int64_t last_us;            /* of all phases */
    uint64_t steps;             /* what the engine had made when it was last seen at work, */
    int64_t seen_us;            /* or at rest; 0: not looked at yet */
    int64_t slowest_us;         /* the longest of its steps */
    bool was_running;
};

/* ---- the engine ------------------------------------------------------------------------- */

/* For how long (microseconds) it has run prompts without a step. */
static int64_t engine_stuck_us(watchdog *d)
{
    struct engine_stats s;
    int64_t now = lm_now_us();
    engine_stats(d->w->engine, &s);
    if (!s.running || s.steps != d->steps || !d->seen_us) {
        if (d->was_running && s.steps != d->steps && d->seen_us)
            d->slowest_us = LM_MAX(d->slowest_us, now - d->seen_us);
        d->steps = s.steps;
        d->seen_us = now;
    }
    d->was_running = s.running > 0;
    return now - d->seen_us;
}

/* At the end, with a drain shorter than engine.hang_timeout_ms: is it a step, or a hang? */
static bool judged_hung(const watchdog *d, int64_t stuck_us)
{
    return d->w->cfg->hang_timeout_ms &&
           stuck_us >= LM_MAX((int64_t)WATCHDOG_HUNG_MS * 1000, 3 * d->slowest_us);
}

_Noreturn static void end_hung(watchdog *d, const char *what, int64_t ms)
{
    lm_log(LM_ERROR, "worker", "%s for %" PRId64 " ms: ending at once; prompts will be read again",
           what, ms);
    if (d->w->journal)
        journal_cause(d->w->journal, JOURNAL_HUNG);
    _exit(1);
}

/* In this order: who finds the pulse fresh finds the sleep noted. Nobody has hung for having slept:
 * the clocks of the engine and of intake start anew. */
static void take_pulse(watchdog *d)
{
    struct worker *w = d->w;
    int64_t now = lm_now_us(), before = atomic_load(&w->pulse_us);
    if (before && now - before > (int64_t)SLEPT_MS * 1000) {
        atomic_store(&w->slept_us, now);
        d->seen_us = 0;
    }
    atomic_store(&w->pulse_us, now);
}

static int64_t intake_stuck_us(const struct worker *w)
{
    return lm_now_us() - LM_MAX(atomic_load(&w->intake_beat_us), atomic_load(&w->slept_us));
}

bool watchdog_slept(struct worker *w)
{
    int64_t now = lm_now_us(), pulse = atomic_load(&w->pulse_us);
    int64_t slept = atomic_load(&w->slept_us);
    return (pulse && now - pulse > (int64_t)SLEPT_MS * 1000) ||
           (slept && now - slept < (int64_t)SLEPT_MEMORY_MS * 1000);
}

/* While the worker ends, the end's own clocks count. */
static void look_at_producer(watchdog *d)
{
    int64_t since = atomic_load(&d->w->closing_producer_us);
    if (d->phase != NONE || !since)
        return;
    since = LM_MAX(since, atomic_load(&d->w->slept_us));
    if (lm_now_us() - since >= (int64_t)WATCHDOG_CLOSE_PRODUCER_MS * 1000)
        worker_fail(d->w, LM_STATE, "the old producer can't be closed: librdkafka has not let go "
                    "of it for %d s; a new start of this worker fences what it left open",
                    WATCHDOG_CLOSE_PRODUCER_MS / 1000);
}

static void look(watchdog *d)
{
    int64_t limit = d->w->cfg->hang_timeout_ms;
    take_pulse(d);
    look_at_producer(d);
    if (!limit || d->phase == STARTING || d->phase == CLOSING || !d->w->engine)
        return;
    if (engine_stuck_us(d) >= limit * 1000)
        end_hung(d, "the engine hangs", limit);
    if (!atomic_load(&d->w->ending) && intake_stuck_us(d->w) >= limit * 1000)
        end_hung(d, "intake hangs", limit);
}

void watchdog_look(watchdog *d)
{
    pthread_mutex_lock(&d->lock);
    look(d);
    pthread_mutex_unlock(&d->lock);
}

/* ---- ends ------------------------------------------------------------------------------- */

_Noreturn static void end_by_signal(const watchdog *d, int sig)
{
    if (d->phase == STARTING) {
        lm_log(LM_INFO, "worker", "%s while starting", strsignal(sig));
        _exit(0);
    }
    lm_log(LM_ERROR, "worker", "second signal: ending at once; unfinished prompts will be read "
           "again");
    _exit(1);
}

/* The engine may need a moment longer for the step that it is in. */
static bool engine_at_rest(watchdog *d)
{
    return !d->w->engine || engine_stuck_us(d) == 0;
}

_Noreturn static void end_orderly(const watchdog *d)
{
    lm_log(LM_WARN, "worker", "%s: ended without it", d->phase == CLOSING ?
           "the engine takes long to close" : "librdkafka waits for a silent broker");
    if (d->w->journal && atomic_load(&d->w->failed) == LM_DEVICE)
        journal_cause(d->w->journal, JOURNAL_DEVICE);
    else if (d->w->journal)
        journal_discard(d->w->journal);
    _exit(atomic_load(&d->status));
}

/* An engine that was at rest and is slow to give its memory back runs nothing, and has not hung. */
static int64_t stuck_at_end_us(watchdog *d)
{
    if (d->phase == CLOSING)
        return d->was_running && d->seen_us ? lm_now_us() - d->seen_us : 0;
    return d->w->engine ? engine_stuck_us(d) : 0;
}

_Noreturn static void end_late(watchdog *d)
{
    int64_t stuck = stuck_at_end_us(d);
    if (judged_hung(d, stuck))
        end_hung(d, "the engine hangs", stuck / 1000);
    if (d->phase != DRAINING)
        end_orderly(d);
    lm_log(LM_ERROR, "worker", "the shutdown hangs: ending at once; unfinished prompts will be "
           "read again");
    _exit(1);
}

/* Under the lock. */
static void tick(watchdog *d)
{
    int64_t now = lm_now_us();
    look(d);
    if (d->phase == RELEASING && now >= d->end_us && engine_at_rest(d))
        end_orderly(d);
    if (now >= (d->phase == RELEASING ? d->last_us : d->end_us))
        end_late(d);
}

/* ---- thread ----------------------------------------------------------------------------- */

static void *watchdog_main(void *arg)
{
    watchdog *d = arg;
    while (!atomic_load(&d->done)) {
        int got = signals_wait(&d->signals, TICK_MS);
        pthread_mutex_lock(&d->lock);
        if (got > 0)
            end_by_signal(d, got);
        tick(d);
        pthread_mutex_unlock(&d->lock);
    }
    return NULL;
}

static void enter(watchdog *d, enum phase phase, int64_t end_us)
{
    pthread_mutex_lock(&d->lock);
    d->phase = phase;
    d->end_us = end_us;
    pthread_mutex_unlock(&d->lock);
    if (d->started)
        return;
    atomic_store(&d->done, false);
    d->started = !pthread_create(&d->thread, NULL, watchdog_main, d);
    if (!d->started && !d->said)
        lm_log(LM_WARN, "worker", "can't start the watchdog's thread: an end that hangs may last");
    d->said = !d->started;
}

void watchdog_starting(watchdog *d)
{
    d->last_us = INT64_MAX;
    enter(d, STARTING, d->last_us);
}

void watchdog_draining(watchdog *d, int64_t budget_ms)
{
    d->last_us = lm_now_us() + budget_ms * 1000;        /* the thread does not run yet */
    enter(d, DRAINING, d->last_us);
}

void watchdog_releasing(watchdog *d, int status, int64_t ms)
{
    if (!d->started)            /* failed while starting */
        watchdog_draining(d, WATCHDOG_FAILED_MS);
    atomic_store(&d->status, status);
    enter(d, RELEASING, LM_MIN(d->last_us, lm_now_us() + ms * 1000));
}

void watchdog_await_end(watchdog *d)
{
    for (;;) {
        nanosleep(&(struct timespec){ .tv_nsec = TICK_MS * 1000000 }, NULL);
        pthread_mutex_lock(&d->lock);
        tick(d);
        pthread_mutex_unlock(&d->lock);
    }
}

void watchdog_closing(watchdog *d)
{
    int64_t now = lm_now_us();
    int64_t end = LM_MIN(d->last_us, now + (int64_t)WATCHDOG_HUNG_MS * 1000);
    enter(d, CLOSING, LM_MAX(end, now + (int64_t)CLOSING_LEAST_MS * 1000));
}

void watchdog_stop(watchdog *d)
{
    atomic_store(&d->done, true);
    if (d->started)
        pthread_join(d->thread, NULL);
    d->started = false;
    d->phase = NONE;
}

watchdog *watchdog_new(struct worker *w, const sigset_t *signals)
{
    watchdog *d = lm_calloc(1, sizeof *d);
    if (!d)
        return NULL;
    d->w = w;
    d->signals = *signals;
    pthread_mutex_init(&d->lock, NULL);
    return d;
}

void watchdog_free(watchdog *d)
{
    if (!d)
        return;
    watchdog_stop(d);
    pthread_mutex_destroy(&d->lock);
    free(d);
}
