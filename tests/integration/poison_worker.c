/* SPDX-License-Identifier: Apache-2.0 */
/*
 * poison_worker.c - `loramill worker` with an engine that some prompts kill or hang, for
 * test_trouble.sh and test_shutdown.sh. Linked with --wrap, so that the worker itself is the
 * shipped one.
 *
 *   a prompt with POISON-KILL    the process dies of SIGSEGV a moment after it was submitted, with
 *                                whatever else is in the engine
 *   a prompt with POISON-HANG    the engine runs it, makes no step any more, and can't be closed
 *   a prompt with FAIL-n         the engine is out of memory for it, n (0 to 99) times
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/engine.h"
#include "worker/commands.h"

lm_status __real_engine_submit(engine *e, const struct engine_request *r, engine_handle *out,
                               struct lm_err *err);
lm_status __wrap_engine_submit(engine *e, const struct engine_request *r, engine_handle *out,
                               struct lm_err *err);
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
