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
 * Rewinds. A delivered offset at or below the last one, or below the committed one, means that the
 * log itself went back (a topic made again, truncation, a seek) or that the client delivers twice.
 * The two can't be told apart, and a repeat is better than a loss. What was delivered from there on
 * is forgotten: those records are others now, or come again. But what lies before is still the
 * log's and does not come again, so what is unfinished of it keeps the watermark: ledger_cut().
 * Where nothing is, ledger_rewind() starts again in a new epoch, and the commit may go back too.
 * After a cut an offset may be delivered anew while its job of before is still on its way:
 * ledger_user() says whose it is.
 *
 * The offset map. What is finished beyond the watermark travels in the commit's metadata (see
 * offset_map.h), so that after a crash or a rebalance only unfinished prompts run again:
 *
 *    ledger_due()      what to commit: the watermark, or the same one with a newer map
 *    ledger_map()      the text for that commit
 *    ledger_restore()  the next owner of the partition hands in the ranges it found
 *    ledger_skip()     a delivered record that those ranges hold counts as finished at once
 *
 * The text has a limit, so reading must slow down before it is reached: ledger_crowded() says when.
 * Between two finished neighbours nothing unfinished lies, so a run of finished offsets with gaps
 * is one range. A map that would not fit is cut at its far end: that costs repeats only.
 *
 * Staging, for exactly-once mode. There the outcome and the offset become durable in one
 * transaction, whose offsets must be known before it commits: ledger_stage() marks entries that the
 * transaction holds, ledger_due() and ledger_map() with `staged` count them as finished, and after
 * the commit they are completed, after an abort unstaged. Until then nothing is forgotten.
 *
 *    in flight --stage--> staged --complete--> finished
 *        ^------unstage-----+                     ^
 *        +----------------- complete -------------+
 *
 * Memory follows the number of unfinished entries and of finished runs, not the distance between
 * the watermark and the last delivered offset.
 *
 * Ownership: `user` pointers are the caller's; ledger_revoke() and a rewind hand them back through
 * `drop`. Threads: none; the consumer thread owns the worker's ledger.
 */
#ifndef LORAMILL_WORKER_LEDGER_H
#define LORAMILL_WORKER_LEDGER_H

#include "kernels/base.h"
#include "worker/offset_map.h"

typedef struct ledger ledger;

/* Names one assignment of one partition. Safe to keep for ever: a stale one is recognised. */
struct ledger_ref {
    uint32_t slot;
    uint64_t epoch;             /* never 0 */
};

/* The same assignment? */
static inline bool ledger_same(struct ledger_ref a, struct ledger_ref b)
{
    return a.slot == b.slot && a.epoch == b.epoch;
}

enum { LEDGER_NONE = -1 };      /* an offset that is not known */

/* Called for entries that leave the ledger unfinished. */
typedef void ledger_drop(void *ctx, int64_t offset, void *user);

/* `map_limit`: most bytes of an offset map, at most OFFSET_MAP_MAX; 0: no maps, but for what was
 * restored: a commit replaces the metadata of the one before, so until the watermark has passed
 * them those ranges are handed on. NULL: out of memory. */
ledger *ledger_new(ledger_drop *drop, void *ctx, size_t map_limit);
void ledger_set_map_limit(ledger *l, size_t map_limit);
void ledger_set_restored_limit(ledger *l, size_t limit);    /* of what is handed on so */
void ledger_free(ledger *l);                            /* drops everything */

/* Starts an epoch. `committed` is the group's offset or LEDGER_NONE. A partition that is tracked
 * already is revoked first. */
lm_status ledger_assign(ledger *l, const char *topic, int32_t partition, int64_t committed,
                        struct ledger_ref *out);
lm_status ledger_find(const ledger *l, const char *topic, int32_t partition,
                      struct ledger_ref *out);          /* LM_NOT_FOUND */
/* Offsets that an earlier owner finished beyond the committed one; copied. Call it before the first
 * delivery. */
lm_status ledger_restore(ledger *l, struct ledger_ref ref, const struct offset_range *r, size_t n);
/* Forgets the partition; unfinished entries are dropped. LM_CANCELLED when stale. */
lm_status ledger_revoke(ledger *l, struct ledger_ref ref);

/* A record was delivered. LM_STATE: its offset is not above the last one, or below the committed
 * one: call ledger_rewind() first; LM_CANCELLED: stale epoch. */
lm_status ledger_deliver(ledger *l, struct ledger_ref ref, int64_t offset, void *user);

/* Was this delivered record finished by an earlier owner? Then it is entered as finished and must
 * not be processed. False: nothing has changed, deliver it. */
bool ledger_skip(ledger *l, struct ledger_ref ref, int64_t offset);

/* The log went back: drops the unfinished entries and begins a new epoch, which *ref becomes. */
lm_status ledger_rewind(ledger *l, struct ledger_ref *ref);
/* The log went back to `from`: drops what was delivered from there on, and what an earlier owner
 * finished there, and that it was committed, if it was. LM_NOT_FOUND: nothing unfinished lies
 * before; LM_CANCELLED: stale epoch. */
lm_status ledger_cut(ledger *l, struct ledger_ref ref, int64_t from);
/* What an unfinished entry was delivered with; NULL: there is none, or the ref is stale. */
void *ledger_user(const ledger *l, struct ledger_ref ref, int64_t offset);

/* The record had its terminal outcome, durably. *user (may be NULL) is what was delivered with it.
 * LM_CANCELLED: stale epoch; LM_NOT_FOUND: not in flight (finished already or never delivered). */
lm_status ledger_complete(ledger *l, struct ledger_ref ref, int64_t offset, void **user);

/* The consumer's position: it will next be given an offset >= position. */
void ledger_position(ledger *l, struct ledger_ref ref, int64_t position);

/* Marks an entry as held by the transaction under way, or no longer. LM_CANCELLED: stale epoch;
 * LM_NOT_FOUND: not in flight; LM_STATE: it is (not) staged already. */
lm_status ledger_stage(ledger *l, struct ledger_ref ref, int64_t offset, bool staged);

struct ledger_commit {
    struct ledger_ref ref;
    int64_t offset;             /* "read this next" */
    uint64_t version;           /* of the map */
    uint64_t cuts;              /* of the partition by then */
};

/* Is there something new to commit? With `staged`, as if the staged entries were finished. The
 * offset is never below what was committed in this epoch. */
bool ledger_due(const ledger *l, struct ledger_ref ref, bool staged, struct ledger_commit *out);
/* The map for it, NUL-terminated; returns its length, 0: none. *whole (may be NULL): all finished
 * offsets are in it; never of one that hands on what was restored. */
size_t ledger_map(ledger *l, const struct ledger_commit *c, bool staged,
                  char out[OFFSET_MAP_MAX + 1], bool *whole);
/* The broker has accepted that commit. Stale refs and older ones are ignored, and what a cut has
 * overtaken: a transaction's may lie beyond it. */
void ledger_committed(ledger *l, const struct ledger_commit *c);

/* Read no further for now? While something is in flight, which can still make the map smaller,
 *   - when the map is past three quarters of its limit (half, if `already`), or
 *   - when it could pass the limit: whatever of what is in flight ends first, and after
 *     LEDGER_BURST more deliveries that are on their way already. Limits below 1,024 bytes have no
 *     room for that rule.
 * Asked after each delivery it keeps the map whole. O(1), but for a look at the entries each time
 * the map may have grown by what was left. */
enum { LEDGER_BURST = 128 };
bool ledger_crowded(ledger *l, struct ledger_ref ref, bool already);

struct ledger_info {
    struct ledger_ref ref;
    const char *topic;          /* lives until the partition is revoked */
    int32_t partition;
    int64_t committed, watermark, last_delivered;       /* LEDGER_NONE: none yet */
    size_t in_flight;           /* delivered, not finished */
    size_t beyond;              /* runs of finished offsets beyond the watermark */
    size_t map_bytes;           /* of the map last made or measured */
};

bool ledger_get(const ledger *l, struct ledger_ref ref, struct ledger_info *out);
size_t ledger_in_flight(const ledger *l);               /* of all partitions; tests only */

/* Walks the unfinished entries from the watermark up, in offset order. */
typedef void ledger_visit(void *ctx, int64_t offset, void *user);
void ledger_each(const ledger *l, struct ledger_ref ref, ledger_visit *visit, void *ctx);

#endif
