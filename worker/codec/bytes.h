/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bytes.h - a text or datum that is being written: on the writer's stack while it is small, and of
 * its exact size when it is done. Messages wait for their brokers, so what they hold counts.
 *
 * Threads: no state.
 */
#ifndef LORAMILL_WORKER_CODEC_BYTES_H
#define LORAMILL_WORKER_CODEC_BYTES_H

#include <stdlib.h>
#include <string.h>

#include "kernels/base.h"

struct bytes {
    char *at;                   /* `first`, or the heap's */
    size_t n, cap;
    bool failed;                /* no memory; test once, at the end */
    char first[8 * 1024];
};

static inline void bytes_init(struct bytes *b)
{
    b->at = b->first;
    b->n = 0;
    b->cap = sizeof b->first;
    b->failed = false;
}

/* Out of line and rarely run, so that what is inlined is short. False: no memory. */
static __attribute__((noinline, cold, unused)) bool bytes_grow(struct bytes *b, size_t n)
{
    size_t cap = LM_MAX(b->cap * 2, b->n + n);
    char *grown = b->failed ? NULL : b->at == b->first ? lm_malloc(cap) : realloc(b->at, cap);
    if (!grown) {
        b->failed = true;
        return false;
    }
    if (b->at == b->first)
        memcpy(grown, b->first, b->n);
    b->at = grown;
    b->cap = cap;
    return true;
}

/* Room for n more, to be written at once and added to b->n. NULL: none. (Less may find room after
 * that; bytes_take() gives nothing all the same.) */
static inline char *bytes_room(struct bytes *b, size_t n)
{
    if (__builtin_expect(n > b->cap - b->n, 0) && !bytes_grow(b, n))
        return NULL;
    return b->at + b->n;
}

static inline void bytes_put(struct bytes *b, const void *from, size_t n)
{
    char *to = bytes_room(b, n);
    if (to && n)
        memcpy(to, from, n);
    b->n += to ? n : 0;
}

static inline void bytes_byte(struct bytes *b, char c)
{
    char *to = bytes_room(b, 1);
    if (to)
        *to = c;
    b->n += to ? 1 : 0;
}

static inline void bytes_drop(struct bytes *b)
{
    if (b->at != b->first)
        free(b->at);
}

/* All of it as a block of that size and a NUL behind, the caller's; NULL: there was no memory. */
static inline char *bytes_take(struct bytes *b)
{
    char *to = b->failed ? NULL : lm_malloc(b->n + 1);
    if (to) {
        memcpy(to, b->at, b->n);
        to[b->n] = '\0';
    }
    bytes_drop(b);
    return to;
}

#endif
