/* SPDX-License-Identifier: Apache-2.0 */
/*
 * message.c - the life of a prompt; its decoding lives in json_prompt.c and codec.c.
 */
#include "worker/codec/message.h"

/* The prompt itself lies in its arena, so the arena is taken out before it goes. */
void prompt_free(struct prompt *p)
{
    if (p)
        arena_free(p->arena);
}
