/* SPDX-License-Identifier: Apache-2.0 */
/*
 * shown.h - what of a message an error may repeat.
 *
 * Errors end in the log, where no text of a prompt may be, and text may stand anywhere: in a key,
 * in a model's name, in a number's place. A name is what people need to find a mistake: so what has
 * the form of one is repeated, and of all else the size is told.
 */
#ifndef LORAMILL_WORKER_CODEC_SHOWN_H
#define LORAMILL_WORKER_CODEC_SHOWN_H

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

enum { SHOWN_NAME = 48 };

/* Has it the form of a name (or of a number), and its length? */
static inline bool is_shown(const char *s, size_t len)
{
    static const char form[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                               "0123456789._/-";
    if (len == 0 || len > SHOWN_NAME)
        return false;
    for (size_t i = 0; i < len; i++)
        if (!memchr(form, s[i], sizeof form - 1))
            return false;
    return true;
}

#endif
