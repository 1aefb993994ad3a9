/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cpu_clock.h - what a thread has computed, for tests of cost: on a busy machine a wall clock also
 * measures the others.
 */
#ifndef CPU_CLOCK_H
#define CPU_CLOCK_H

#include <stdint.h>
#include <time.h>

/* Nanoseconds that the calling thread has run. */
static inline int64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

#endif
