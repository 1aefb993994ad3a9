/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rnd.h - numbers for random tests, the same in every run (xorshift64). A test may set `rng`
 * itself, or begin elsewhere with RND_SEED.
 */
#ifndef LORAMILL_TESTS_UNIT_RND_H
#define LORAMILL_TESTS_UNIT_RND_H

#include <stdint.h>

#ifndef RND_SEED
#define RND_SEED 0x2545f4914f6cdd1du
#endif

static uint64_t rng = RND_SEED;

/* From 0 to below - 1. */
static inline int rnd(int below)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (int)((rng >> 33) % (uint64_t)below);
}

#endif
