/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stream.h - what a streamed reply has said so far and has still to say: a pure data structure.
 *
 * The engine's text comes in token by token; parts go out one at a time. While a part is on its way
 * to the broker, or the pause between two parts lasts, text gathers here and becomes the next part.
 * So a slow broker makes parts larger, not a queue longer, and parts can't overtake one another,
 * whatever the client library has to try again: the next one is not sent before the last one is
 * acknowledged.
 *
 *            text                take                     acked
 *   engine --------> gathered ----------> part on its way --------> next part, or the final record
 *
 * A generation names one run of the engine for this prompt. When the prompt has to run again (the
 * engine failed it, or another worker took over), parts begin again at 0 in another generation:
 * that is how a reader recognises the repeat and drops what it had.
 *
 * Threads: whoever has the job. Intake makes it. The outbox has it while the engine runs the prompt
 * and until its final record is made, which waits for the part on its way unless the partition
 * leaves. From then on it is only read: generation and number of parts, by whoever encodes the
 * final record, which may be the outbox, intake (a prompt that ends before it has run again) or the
 * claim thread. `listed` is the outbox's own: does it have the job?
 */
#ifndef LORAMILL_WORKER_STREAM_H
#define LORAMILL_WORKER_STREAM_H

#include "engine/engine.h"

struct stream_text { char *s; size_t len, cap; };

struct stream {
    char generation[17];        /* 16 hex digits */
    int seq;                    /* of the next part */
    bool sending;               /* a part is on its way */
    bool broken;                /* no more parts: one could not be delivered */
    bool listed;                /* the outbox's list has its job */
    bool ended;                 /* the engine has finished; the final record waits for the parts */
    int64_t due_us;             /* no part before */
    int n;                      /* choices */
    struct stream_text *text;   /* n of them, not yet sent */
};

struct stream *stream_new(int n_choices);       /* NULL: out of memory */
void stream_free(struct stream *s);             /* NULL is allowed */

/* Another run: a new generation, parts from 0, nothing gathered. */
void stream_restart(struct stream *s);

/* Takes the text over. Choices out of range are ignored. LM_NOMEM: the text is lost, and the
 * stream is broken; the final record has it all the same. */
lm_status stream_add(struct stream *s, int choice, char *text, size_t len);

bool stream_has_text(const struct stream *s);

/* The gathered text as a result with one choice for each that has text; the stream's is emptied.
 * Freed with engine_result_free(). NULL: out of memory, nothing was taken. */
struct engine_result *stream_take(struct stream *s);

/* Puts a taken text back, before what has gathered since; takes the result over. */
void stream_give_back(struct stream *s, struct engine_result *text);

#endif
