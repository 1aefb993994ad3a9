/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ledger.h - which offsets of which partitions are in flight, which are finished, and what may be
 * committed. A pure data structure: no Kafka, no clock, no thread, no I/O.
 *
 * Prompts finish out of order, so a partition's committable offset is the *watermark*: the first
 * delivered offset that is not finished. Everything below it has had its terminal outcome.
 *
 *    delivered   10   11   14   15   19        (12, 13, 16..18: compacted away, or markers)
 *    finished     x         x         x
 *    watermark       ^ 11: commit 11, meaning "read 11 next"
 *
 * Gaps are normal: "next" means the next *delivered* offset, never offset + 1. When nothing is in
 * flight the partition may be committed up to the consumer's position, which has passed trailing
 * transaction markers that last + 1 has not; else an idle group would show lag for ever.
 *
 * Assignment epochs. A partition gets a fresh epoch whenever it is assigned. A completion names its
 * epoch through a ledger_ref; one that is not current any more is answered LM_CANCELLED and changes
 * nothing, because the offset now belongs to another assignment, perhaps to another worker.
 *
 * Rewinds. A delivered offset at or below the last one means the log itself went back (a topic made
 * again, truncation, a seek) or the client delivers twice. The two can't be told apart, and a
 * repeat is better than a loss: after ledger_rewind() tracking starts again there in a new epoch,
 * and the commit may go back too.
 *
 * Room for the offset map: entries keep their finished mark beyond the watermark and ledger_each()
 * walks them in order; a map is a function of that walk.
 *
 * Ownership: `user` pointers are the caller's; ledger_revoke() and a rewind hand them back through
 * `drop`. Threads: none; the consumer thread owns the worker's ledger.
 */
#ifndef LORAMILL_WORKER_LEDGER_H
#define LORAMILL_WORKER_LEDGER_H

#include "kernels/base.h"

typedef struct ledger ledger;

/* Names one assignment of one partition. Safe to keep for ever: a stale one is recognised. */
struct ledger_ref {
    uint32_t slot;
    uint64_t epoch;             /* never 0 */
};

enum { LEDGER_NONE = -1 };      /* an offset that is not known */

/* Called for entries that leave the ledger unfinished. */
typedef void ledger_drop(void *ctx, int64_t offset, void *user);

ledger *ledger_new(ledger_drop *drop, void *ctx);       /* NULL: out of memory */
void ledger_free(ledger *l);                            /* drops everything */

/* Starts an epoch. `committed` is the group's offset or LEDGER_NONE. A partition that is tracked
 * already is revoked first. */
lm_status ledger_assign(ledger *l, const char *topic, int32_t partition, int64_t committed,
                        struct ledger_ref *out);
lm_status ledger_find(const ledger *l, const char *topic, int32_t partition,
                      struct ledger_ref *out);          /* LM_NOT_FOUND */
/* Forgets the partition; unfinished entries are dropped. LM_CANCELLED when stale. */
lm_status ledger_revoke(ledger *l, struct ledger_ref ref);

/* A record was delivered. LM_STATE: its offset is not above the last one, call ledger_rewind()
 * first; LM_CANCELLED: stale epoch. */
lm_status ledger_deliver(ledger *l, struct ledger_ref ref, int64_t offset, void *user);

/* The log went back: drops the unfinished entries and begins a new epoch, which *ref becomes. */
lm_status ledger_rewind(ledger *l, struct ledger_ref *ref);

/* The record had its terminal outcome, durably. *user (may be NULL) is what was delivered with it.
 * LM_CANCELLED: stale epoch; LM_NOT_FOUND: not in flight (finished already or never delivered). */
lm_status ledger_complete(ledger *l, struct ledger_ref ref, int64_t offset, void **user);

/* The consumer's position: it will next be given an offset >= position. */
void ledger_position(ledger *l, struct ledger_ref ref, int64_t position);

/* The offset to commit, or LEDGER_NONE when there is nothing new. Never below what was committed in
 * this epoch. */
int64_t ledger_commit_value(const ledger *l, struct ledger_ref ref);
/* The broker has accepted a commit of `value`. Stale refs and older values are ignored. */
void ledger_committed(ledger *l, struct ledger_ref ref, int64_t value);

struct ledger_info {
    struct ledger_ref ref;
    const char *topic;          /* lives until the partition is revoked */
    int32_t partition;
    int64_t committed, watermark, last_delivered;       /* LEDGER_NONE: none yet */
    size_t in_flight;           /* delivered, not finished */
    size_t beyond;              /* finished, beyond the watermark */
};

/* Tracked partitions: for (size_t i = 0; ledger_at(l, i, &info); i++). */
bool ledger_at(const ledger *l, size_t i, struct ledger_info *out);
bool ledger_get(const ledger *l, struct ledger_ref ref, struct ledger_info *out);
size_t ledger_in_flight(const ledger *l);               /* of all partitions */

/* Walks the entries from the watermark up, in offset order. */
typedef void ledger_visit(void *ctx, int64_t offset, bool finished, void *user);
void ledger_each(const ledger *l, struct ledger_ref ref, ledger_visit *visit, void *ctx);

#endif
