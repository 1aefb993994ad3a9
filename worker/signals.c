/* SPDX-License-Identifier: Apache-2.0 */
/*
 * signals.c - see signals.h. A signal is a bit in `stray`, as it is one in the kernel's pending
 * set: two of a kind that nobody has taken are one.
 */
#include "worker/signals.h"

#include <stdatomic.h>

#include "kernels/base.h"

static const int ours[] = { SIGTERM, SIGINT, SIGHUP };

static atomic_uint stray;               /* bits by index into ours[] */
_Static_assert(ATOMIC_INT_LOCK_FREE == 2, "a handler sets it");

static void on_stray(int sig)
{
    for (size_t i = 0; i < LM_COUNT(ours); i++)
        if (ours[i] == sig)
            atomic_fetch_or(&stray, 1u << i);
}

void signals_begin(sigset_t *ends)
{
    struct sigaction sa = { .sa_handler = on_stray, .sa_flags = SA_RESTART };
    sigset_t all;
    sigemptyset(&sa.sa_mask);
    sigemptyset(&all);
    for (size_t i = 0; i < LM_COUNT(ours); i++)
        sigaddset(&all, ours[i]);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    for (size_t i = 0; i < LM_COUNT(ours); i++)
        sigaction(ours[i], &sa, NULL);
    signal(SIGPIPE, SIG_IGN);
    *ends = all;
    sigdelset(ends, SIGHUP);
}

static int take_stray(const sigset_t *set)
{
    for (size_t i = 0; i < LM_COUNT(ours); i++) {
        const unsigned bit = 1u << i;
        if (sigismember(set, ours[i]) && (atomic_fetch_and(&stray, ~bit) & bit))
            return ours[i];
    }
    return -1;
}

int signals_wait(const sigset_t *set, int ms)
{
    const struct timespec most = { ms / 1000, ms % 1000 * 1000000L };
    int got = take_stray(set);
    return got > 0 ? got : sigtimedwait(set, NULL, &most);
}
