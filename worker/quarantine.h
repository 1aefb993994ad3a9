/* SPDX-License-Identifier: Apache-2.0 */
/*
 * quarantine.h - how a prompt that kills the engine is found by a whole pool: across hosts that
 * share no disk, and also when the node of a dead worker never comes back. A pure data structure,
 * one for each assigned partition; isolation.c is the consumer thread's use of it.
 *
 * The one thing that the pool shares is the group's committed offsets, so the knowledge travels
 * there: each commit carries, beside the offset map, a *mark*. It costs some fifty bytes in commits
 * that are made anyway, and one commit when a partition is taken over.
 *
 *   The promise of a mark: of the partition's unfinished prompts, those that a worker has touched
 *   lie below the mark's `fence`. Who wants to start one at or beyond it commits a higher fence
 *   first and waits for the acknowledgement.
 *
 * So whoever takes over a partition from a dead worker knows whom to suspect: what is unfinished
 * and lies below the fence. A worker that hands a partition back in order (a rebalance, SIGTERM, a
 * rolling restart) commits an *idle* mark: nobody died, nothing is counted. Without an idle mark
 * the owner died, or was thrown out of the group; and if suspects of an earlier death are still
 * unfinished then, they are suspected once more:
 *
 *   deaths   the last owners in a row that died while the suspects, [committed, until), were
 *            unfinished. The region only shrinks: to what both deaths have in common
 *
 *   FREE     deaths = 0            the fence is reserved ahead, by what recent commits have moved
 *   WINDOW   deaths < max - 1      a few prompts at a time, so that the next death has few suspects
 *   SOLO     deaths >= max - 1     suspects run one by one, alone in the engine, each named in a
 *                                  mark that is committed before it starts
 *
 * Only isolation proves guilt: a death in company never does. Of a death alone the cause is not
 * known here (it may have been the node), so it takes two of the same prompt:
 *
 *   poison   deaths >= max and died alone >= 2           (max: poison.max_attempts)
 *
 * A poison prompt costs the pool max + 1 workers; fewer where the worker's own journal (journal.h)
 * saw it die by its own hand. When the last suspect has ended, the partition is FREE again. A
 * suspicion is no outcome and holds up no commit; an innocent suspect is answered, only later.
 *
 * What is counted wrongly costs time, not outcomes: an owner that was thrown out while it lived
 * counts as dead, unless it takes the partition over again itself (`owner`), and an innocent that
 * was alone in the engine at two such ends in a row is dead-lettered.
 *
 *   text   "lq1:" base . fence . until . suspect . deaths . alone . owner . flags . check
 *
 * Lower-case hexadecimal; fence and until relative to base, the offset that the commit is for (a
 * group that was moved by hand is under no suspicion); suspect likewise, plus one, 0: none; flags:
 * 1 idle, 2 solo; check: XXH32 of all before. No mark says the same as an idle one that suspects
 * nobody, so a worker without marks (an older one, poison.max_attempts=0) counts nothing.
 */
#ifndef LORAMILL_WORKER_QUARANTINE_H
#define LORAMILL_WORKER_QUARANTINE_H

#include "kernels/base.h"

enum {
    QUARANTINE_TEXT_MAX = 112,
    QUARANTINE_ROOM_MIN = 2 * QUARANTINE_TEXT_MAX,      /* of the metadata that has marks */
    QUARANTINE_WINDOW = 32,             /* prompts at a time */
    QUARANTINE_RESERVE_MIN = 256, QUARANTINE_RESERVE_MAX = 1 << 20,     /* offsets */
};

enum quarantine_level { QUARANTINE_FREE, QUARANTINE_BY_WINDOW, QUARANTINE_SOLO };

struct quarantine_mark {
    int64_t fence, until;       /* -1: none */
    int64_t suspect;            /* the last one to run alone, -1: none */
    uint32_t owner;             /* which process has written it */
    int deaths, alone;          /* alone: of them, with the suspect alone in the engine */
    bool idle, solo;            /* solo: the suspect is alone in the engine now */
};

struct quarantine {
    int max;                    /* 0: off, everything may start */
    uint32_t self;
    int64_t until, suspect;
    int deaths, alone;
    struct quarantine_mark acked, asked;
    bool asking;
    int64_t reserved_at;        /* last delivered when a fence was last reserved */
};

void quarantine_init(struct quarantine *q, int max, uint32_t self);

/* The partition comes with this mark (NULL: none), committed at `base`. True: its owner died and
 * left suspects. */
bool quarantine_adopt(struct quarantine *q, const struct quarantine_mark *m, int64_t base);

/* Everything below the watermark has ended. */
void quarantine_progress(struct quarantine *q, int64_t watermark);

/* The log lost what lay from `from` on: what comes there now nobody has started. */
void quarantine_cut(struct quarantine *q, int64_t from);

enum quarantine_level quarantine_level(const struct quarantine *q);
bool quarantine_suspects(const struct quarantine *q, int64_t offset);  /* must it run alone? */
bool quarantine_condemns(const struct quarantine *q, int64_t offset);
bool quarantine_may_start(const struct quarantine *q, int64_t offset);

/* This suspect is the next to run alone. */
void quarantine_single_out(struct quarantine *q, int64_t offset);

/* No prompt at or beyond it may start, as things are; -1: none at all. */
int64_t quarantine_fence(const struct quarantine *q);
/* The fence that FREE asks for: far enough ahead for some commits to come. */
int64_t quarantine_reserve(struct quarantine *q, int64_t last_delivered);

/* The mark for the commit to be made; it counts from now on as far as it forbids, and as far as it
 * allows when it has been accepted. */
void quarantine_ask(struct quarantine *q, int64_t fence, bool idle, bool solo);
void quarantine_answer(struct quarantine *q, bool accepted);

/* NUL-terminated; returns the length, 0: there is nothing to say. */
size_t quarantine_text(const struct quarantine_mark *m, int64_t base,
                       char out[QUARANTINE_TEXT_MAX + 1]);
/* LM_NOT_FOUND: not a mark; LM_MISMATCH: for another offset; LM_FORMAT: damaged. */
lm_status quarantine_parse(const char *text, size_t len, int64_t base,
                           struct quarantine_mark *out);

#endif
