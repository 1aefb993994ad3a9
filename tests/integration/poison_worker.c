/* SPDX-License-Identifier: Apache-2.0 */
/*
 * poison_worker.c - `loramill worker` with an engine that some prompts kill or hang, or that fails
 * them, for test_trouble.sh, test_shutdown.sh, test_partitions.sh and test_flow.sh. Linked with
 * --wrap, so that the worker itself is the shipped one.
 *
 *   a prompt with POISON-KILL    the process dies of SIGSEGV a moment after it was submitted, with
 *                                whatever else is in the engine
 *   a prompt with POISON-HANG    the engine runs it, makes no step any more, and can't be closed
 *   a prompt with FAIL-n         the engine is out of memory for it, n (0 to 99) times
 *   a prompt with BREAKS         the same at the end of its first generation, its text being out
 *   a prompt with HELD-n         is generated until the file $HELD_UNTIL-n is there, n of one digit
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/engine.h"
#include "worker/job.h"
#include "worker/tools/commands.h"

lm_status __real_engine_submit(engine *e, const struct engine_request *r, engine_handle *out,
                               struct lm_err *err);
lm_status __wrap_engine_submit(engine *e, const struct engine_request *r, engine_handle *out,
                               struct lm_err *err);
int __real_engine_poll(engine *e, struct engine_event *out, int max, int timeout_ms,
                       lm_status *state);
int __wrap_engine_poll(engine *e, struct engine_event *out, int max, int timeout_ms,
                       lm_status *state);
void __real_engine_stats(engine *e, struct engine_stats *out);
void __wrap_engine_stats(engine *e, struct engine_stats *out);
void __real_engine_close(engine *e);
void __wrap_engine_close(engine *e);

static atomic_bool hung;

static void *kill_soon(void *arg)
{
    (void)arg;
    usleep(100000);
    raise(SIGSEGV);
    return NULL;
}

/* One prompt for each n. */
static bool fails(const char *prompt)
{
    static int failed[100];     /* the intake thread's */
    const char *at = prompt ? strstr(prompt, "FAIL-") : NULL;
    long n = at ? strtol(at + 5, NULL, 10) : 0;
    return n > 0 && n < 100 && failed[n]++ < n;
}

lm_status __wrap_engine_submit(engine *e, const struct engine_request *r, engine_handle *out,
                               struct lm_err *err)
{
    pthread_t t;
    if (fails(r->prompt))
        return lm_err_set(err, LM_NOMEM, "no room for this prompt");
    bool kills = r->prompt && strstr(r->prompt, "POISON-KILL");
    bool hangs = r->prompt && strstr(r->prompt, "POISON-HANG");
    if (!kills && !hangs && !atomic_load(&hung))
        return __real_engine_submit(e, r, out, err);
    if (kills)
        pthread_create(&t, NULL, kill_soon, NULL);
    if (hangs)
        atomic_store(&hung, true);
    *out = UINT64_MAX;
    return LM_OK;
}

static bool is_held(const struct engine_event *e)
{
    char file[4096];
    const struct job *j = e->user;
    const char *at = e->kind == ENGINE_FINISHED && j->prompt->prompt ?
        strstr(j->prompt->prompt, "HELD-") : NULL;
    const char *until = getenv("HELD_UNTIL");
    if (!at || !until)
        return false;
    snprintf(file, sizeof file, "%s-%c", until, at[5]);
    return access(file, F_OK);
}

/* The ends of prompts that are held are kept back. */
static int hold(struct engine_event *out, int n, int max)
{
    static struct engine_event held[16];        /* the outbox's thread */
    static int n_held;
    int left = 0, still = 0;
    for (int i = 0; i < n; i++)
        if (n_held < (int)LM_COUNT(held) && is_held(&out[i]))
            held[n_held++] = out[i];
        else
            out[left++] = out[i];
    for (int i = 0; i < n_held; i++)
        if (left < max && !is_held(&held[i]))
            out[left++] = held[i];
        else
            held[still++] = held[i];
    n_held = still;
    return left;
}

int __wrap_engine_poll(engine *e, struct engine_event *out, int max, int timeout_ms,
                       lm_status *state)
{
    int n = hold(out, __real_engine_poll(e, out, max, timeout_ms, state), max);
    for (int i = 0; i < n; i++) {
        const struct job *j = out[i].user;
        if (out[i].kind == ENGINE_FINISHED && !j->attempts && j->prompt->prompt &&
            strstr(j->prompt->prompt, "BREAKS")) {
            out[i].result->status = LM_NOMEM;
            snprintf(out[i].result->error, sizeof out[i].result->error, "no room for more");
        }
    }
    return n;
}

void __wrap_engine_stats(engine *e, struct engine_stats *out)
{
    __real_engine_stats(e, out);
    if (atomic_load(&hung)) {
        out->running = 1;
        out->steps = 1;
    }
}

void __wrap_engine_close(engine *e)
{
    while (atomic_load(&hung))
        pause();
    __real_engine_close(e);
}

int main(int argc, char **argv)
{
    return cmd_worker(argc, argv);
}
