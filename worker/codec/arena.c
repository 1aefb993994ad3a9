/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arena.c - all memory of one prompt, freed at once; see message.h for the interface.
 *
 * A list of chunks, newest first; allocation bumps the newest one and never moves what was handed
 * out. The first one, which suffices for most prompts, is the arena's own, or lent. Memory is made
 * zero when it is handed out, but for strings. Something larger than half a kilobyte that has no
 * room there gets a chunk of its own, put behind the newest, so that a long text doesn't waste the
 * room left in it.
 *
 * Threads: an arena belongs to whoever owns its prompt; nothing here locks.
 */
#include "worker/codec/message.h"

#include <stdlib.h>
#include <string.h>

enum { BLOCK_BYTES = 1024, CHUNK_BYTES = 4096, LARGE = 512, ALIGN = ARENA_ALIGN };

struct chunk {
    struct chunk *next;
    size_t size, used;
    _Alignas(ALIGN) unsigned char data[];
};

struct arena {
    struct chunk *chunks;
    size_t bytes;               /* asked of malloc, headers included */
    bool lent;                  /* its memory is somebody else's */
    uint32_t first_size, first_used;
    _Alignas(ALIGN) unsigned char first[];
};

/* One block, as large as mimalloc has it at hand. */
struct arena *arena_new(void)
{
    struct arena *a = lm_malloc(BLOCK_BYTES);
    if (a)
        *a = (struct arena){ .bytes = BLOCK_BYTES, .first_size = BLOCK_BYTES - sizeof *a };
    return a;
}

struct arena *arena_in(void *room, size_t size)
{
    struct arena *a = room;
    *a = (struct arena){ .lent = true, .first_size = (uint32_t)(size - sizeof *a) };
    return a;
}

void arena_free(struct arena *a)
{
    if (!a)
        return;
    for (struct chunk *c = a->chunks, *next; c; c = next) {
        next = c->next;
        free(c);
    }
    if (!a->lent)
        free(a);
}

static struct chunk *add_chunk(struct arena *a, size_t size, bool behind)
{
    struct chunk *c = lm_malloc(sizeof *c + size);
    if (!c)
        return NULL;
    c->size = size;
    c->used = 0;
    if (behind && a->chunks) {
        c->next = a->chunks->next;
        a->chunks->next = c;
    } else {
        c->next = a->chunks;
        a->chunks = c;
    }
    a->bytes += sizeof *c + size;
    return c;
}

static void *take(struct arena *a, size_t bytes)
{
    if (bytes > SIZE_MAX / 2)
        return NULL;
    size_t need = LM_DIV_UP(LM_MAX(bytes, 1), ALIGN) * ALIGN;
    struct chunk *c = a->chunks;
    if (need <= a->first_size - a->first_used) {
        void *p = a->first + a->first_used;
        a->first_used += (uint32_t)need;
        return p;
    }
    if (!c || c->size - c->used < need) {
        bool large = need > LARGE;
        c = add_chunk(a, large ? need : CHUNK_BYTES, large);
        if (!c)
            return NULL;
    }
    void *p = c->data + c->used;
    c->used += need;
    return p;
}

void *arena_alloc(struct arena *a, size_t bytes)
{
    void *p = take(a, bytes);
    return p ? memset(p, 0, bytes) : NULL;
}

char *arena_strndup(struct arena *a, const char *s, size_t n)
{
    char *p = n < SIZE_MAX / 2 ? take(a, n + 1) : NULL;
    if (!p)
        return NULL;
    memcpy(p, s, n);
    p[n] = '\0';
    return p;
}

size_t arena_bytes(const struct arena *a)
{
    return a->bytes;
}
