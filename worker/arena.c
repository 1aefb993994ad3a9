/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arena.c - all memory of one prompt, freed at once; see message.h for the interface.
 *
 * A list of chunks, newest first; allocation bumps the newest one and never moves what was handed
 * out. Chunks come from calloc(), so that memory is zero without a pass of ours. Something larger
 * than a quarter of a chunk gets a chunk of its own, put behind the newest, so that one long prompt
 * doesn't waste the room left in it.
 *
 * Threads: an arena belongs to whoever owns its prompt; nothing here locks.
 */
#include "worker/message.h"

#include <stdlib.h>
#include <string.h>

enum { CHUNK_BYTES = 4096, ALIGN = 16 };

struct chunk {
    struct chunk *next;
    size_t size, used;
    _Alignas(ALIGN) unsigned char data[];
};

struct arena {
    struct chunk *chunks;
    size_t bytes;               /* asked of malloc, headers included */
};

struct arena *arena_new(void)
{
    return lm_calloc(1, sizeof(struct arena));
}

void arena_free(struct arena *a)
{
    if (!a)
        return;
    for (struct chunk *c = a->chunks, *next; c; c = next) {
        next = c->next;
        free(c);
    }
    free(a);
}

static struct chunk *add_chunk(struct arena *a, size_t size, bool behind)
{
    struct chunk *c = lm_calloc(1, sizeof *c + size);
    if (!c)
        return NULL;
    c->size = size;
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

void *arena_alloc(struct arena *a, size_t bytes)
{
    if (bytes > SIZE_MAX / 2)
        return NULL;
    size_t need = LM_DIV_UP(LM_MAX(bytes, 1), ALIGN) * ALIGN;
    struct chunk *c = a->chunks;
    if (!c || c->size - c->used < need) {
        bool large = need > CHUNK_BYTES / 4;
        c = add_chunk(a, large ? need : CHUNK_BYTES, large);
        if (!c)
            return NULL;
    }
    void *p = c->data + c->used;
    c->used += need;
    return p;
}

char *arena_strndup(struct arena *a, const char *s, size_t n)
{
    char *p = n < SIZE_MAX / 2 ? arena_alloc(a, n + 1) : NULL;
    if (p)
        memcpy(p, s, n);
    return p;
}

size_t arena_bytes(const struct arena *a)
{
    return a->bytes;
}
