/* SPDX-License-Identifier: Apache-2.0 */
/*
 * journal.h - which prompts were in the engine when a worker died: how a prompt that kills or hangs
 * the engine is told from those that were there with it, and is not tried for ever.
 *
 * A dead process can't count, and the next one to read the prompt knows nothing of it. So each
 * worker keeps a journal, a file mapped into memory: a prompt is entered before the engine sees it
 * and struck out when it ends. The page cache outlives any death of the process, so nothing is
 * synced, and an entry costs two stores, into blocks that the disk gave at the start. The file is
 * locked while its owner lives: whoever gets the lock of another's journal knows that its owner is
 * dead, and what it held are suspects. That is read by every worker that shares the folder
 * (journal.dir), at start and each second, so a partition that moves to a neighbour takes its
 * suspects along. (A process that ends in order removes its journal: it has handed back what it
 * held.)
 *
 *   DIR/PID.TIME.journal    of a living process; header, then slots
 *   DIR/PID.TIME.dead       what remained of a dead one: its entries only; forgotten after a day
 *
 * What a death says about an entry:
 *
 *   in company              it was one of many: a suspect, nothing more
 *   alone, by its own hand  (SIGSEGV, SIGABRT, ..., a hang, a device failure): evidence 2, proof
 *   alone, killed           (SIGKILL, power: maybe memory, maybe an operator): evidence 1
 *
 * With `max` attempts (poison.max_attempts):
 *
 *   deaths < max - 1                   runs as usual
 *   deaths >= max - 1                  runs alone: the next death is about it and nothing else
 *   deaths >= max and evidence >= 2    poison: a dead letter
 *
 * So a poison prompt costs at most max + 1 processes a journal folder; and nothing is dead-lettered
 * for having been in bad company, or for one unlucky SIGKILL. Hosts that share no folder count
 * together too, through the group's commit metadata (quarantine.h): of both counts the higher one
 * holds, and the journal adds what only it knows, by whose hand a worker died.
 *
 * Decoding is journaled too: one prompt at a time is decoded, so it is always alone.
 *
 * A prompt's key is a hash of group, topic, partition, offset, timestamp, and of the value's length
 * and first 240 bytes: a topic that was made again has other keys.
 *
 * Threads: any.
 */
#ifndef LORAMILL_WORKER_JOURNAL_H
#define LORAMILL_WORKER_JOURNAL_H

#include "worker/job.h"

typedef struct journal journal;

enum journal_verdict { JOURNAL_FINE, JOURNAL_ALONE, JOURNAL_POISON };

/* Causes of death besides signal numbers: a hang that we saw, a device that failed. */
enum { JOURNAL_HUNG = 1000, JOURNAL_DEVICE };

/* Makes the folder where missing, reads what the dead have left. */
lm_status journal_open(const char *dir, const char *group, journal **out, struct lm_err *err);
void journal_close(journal *j);         /* an orderly end: removes our file; NULL is allowed */
/* The same for a process that is about to end: the file only. Any thread. */
void journal_discard(const journal *j);
/* The engine failed: what is entered was there. The file stays, for the others. */
void journal_abandon(journal *j, int cause);

/* Reads what has appeared since; at most once a second. */
void journal_refresh(journal *j, int64_t now_us);

uint64_t journal_key(const journal *j, const struct job *job);

/* What is known of a prompt, by this journal or by the group (quarantine.h). */
struct journal_count { int deaths, evidence; };
struct journal_count journal_counts(journal *j, uint64_t key);
/* What to do with it. */
enum journal_verdict journal_verdict(struct journal_count n, int max_attempts);

/* Before the engine sees it. Returns a slot for journal_leave(), or -1 when all are taken. */
int journal_enter(journal *j, uint64_t key, bool alone);
void journal_leave(journal *j, int slot);       /* -1 is allowed */

void journal_decoding(journal *j, uint64_t key);        /* 0: none */

/* This process is about to die, by its own hand: a signal number or JOURNAL_HUNG. Safe in a signal
 * handler. */
void journal_cause(journal *j, int cause);

/* Marks SIGSEGV, SIGBUS, SIGILL, SIGFPE and SIGABRT in this journal, then lets them do what they
 * would have done. One journal a process. */
void journal_watch_signals(journal *j);

#endif
