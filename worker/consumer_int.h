/* SPDX-License-Identifier: Apache-2.0 */
/*
 * consumer_int.h - what the files of the consumer thread share: consumer.c (the loop, records),
 * admission.c (pausing), rebalance.c (assignment, draining), commit.c (offsets), staging.c (offsets
 * in transactions), isolation.c (suspects) and blocking.c (what holds up others). Nobody else
 * includes it.
 *
 * Everything here belongs to the consumer thread, but for a staging's request, under its lock, and
 * the flags of `protocol`, which the client's threads set. What others do with `rk` and `queue` is
 * in worker.h; the client's threads end a poll by `queue` when a commit is answered.
 */
#ifndef LORAMILL_WORKER_CONSUMER_INT_H
#define LORAMILL_WORKER_CONSUMER_INT_H

#include "worker/group_protocol.h"
#include "worker/kafka_conf.h"
#include "worker/key_order.h"
#include "worker/quarantine.h"
#include "worker/staging.h"

enum { DRAIN_POLL_MS = 10, CONSUMER_RANKS = 2 };

struct assigned {
    struct lease *lease;
    struct ledger_ref ref;
    int32_t partition;
    bool paused;                /* as the client was told */
    bool crowded;               /* its offset map is near its limit */
    int64_t blocked_offset, blocked_said_us;    /* blocking.c */
    /* isolation.c */
    struct quarantine q;
    bool leaving;               /* handed back in order: its mark becomes idle */
    bool refused;               /* the group takes no commits of its topic */
    bool apart;                 /* its topic's commits are requests of their own; commit.c */
    int64_t retry_us;           /* a commit of it was refused: none for its mark until then */
    int64_t overdue_since_us;   /* ... since then, though it is to hear of the end of a turn, */
    bool overdue;               /* which no turn waits for any more */
    bool uncapped;              /* suspects may lie beyond the log's end */
    struct job_chain held;      /* delivered, beyond the fence */
};

/* See isolation.c. */
enum isolation_turn { TURN_OPEN, TURN_CLOSING, TURN_MARKING, TURN_RUNNING, TURN_OPENING };

struct isolation {
    int max;                    /* poison.max_attempts; 0: nothing is held, no marks */
    uint32_t self;
    bool active;                /* something is held, or suspected */
    bool busy;                  /* the loop's turns are to be short */
    bool wanted;                /* a commit, for its marks */
    enum isolation_turn turn;
    struct job *job;            /* has the turn; a reference */
    struct ledger_ref ref;
    int64_t offset, closed_us, since_us, next_us;
    uint64_t steps;             /* of the engine, when a hand-back began */
    int64_t leave_us, leave_end_us;
    bool leave_begun;
};

/* A request of the producer thread; see staging.c. */
enum staging_what { STAGING_STAGE, STAGING_COMMITTED, STAGING_ABORTED, STAGING_LOOK };

struct staging {
    pthread_mutex_t lock;
    pthread_cond_t served;
    struct stage *asked;
    enum staging_what what;
    bool closed;
    const struct stage *open;   /* with offsets, and its end is not known; the consumer thread's */
};

struct consumer {
    struct worker *w;
    rd_kafka_t *rk;
    rd_kafka_queue_t *queue, *commit_queue;
    bool new_protocol;          /* KIP-848 is asked for */
    struct group_protocol protocol;
    bool closing;               /* it leaves the group */
    bool exactly_once;          /* offsets are committed by transactions only */
    struct staging staging;
    pthread_t thread;
    ledger *ledger;
    size_t map_limit;           /* of a commit's metadata; 0: none */
    size_t longest;             /* of the commit under way; */
    size_t taken;               /* of all that the broker has accepted */
    bool said_small;
    struct assigned *parts;
    size_t n_parts, last_hit;
    struct isolation iso;
    key_order *order;           /* NULL: prompts of a key need no order */
    bool full[CONSUMER_RANKS], stopped, awaited;        /* admission.c */
    bool braked;                /* a partition is crowded, and the client has not been told */
    int64_t next_crowded_us;
    /* being taken away; NULL: nothing is. rebalance.c */
    rd_kafka_topic_partition_list_t *revoking;
    int64_t revoke_start_us;
    /* the one commit under way: what it is of, and its requests that are not answered yet */
    struct ledger_commit *pending;
    size_t n_pending, committing;
    bool unsure;                /* the last one was refused, of which topic is not known */
    bool overtaken;             /* a rebalance has refused a request of it, which goes again */
    int64_t commit_start_us;
    int64_t again_ms;           /* a rebalance has refused the last one: its pause; 0: none has */
    uint64_t refused;           /* for a rebalance, since one was taken: only the first is logged */
    int64_t next_commit_us, next_snapshot_us, complained_us;
    long long held, held_bytes;
    int64_t now_us, wall_ms;    /* when the records at hand were read; 0: to be stamped */
    bool gathers;               /* a burst is read: what may start goes to intake by the handful */
    struct job_chain ready;
    struct kafka_said said;
    struct log_seldom many_headers, not_assigned;
};

/* consumer.c */
struct assigned *consumer_find(consumer *c, const char *topic, int32_t partition);
struct assigned *consumer_find_ref(consumer *c, struct ledger_ref ref);   /* NULL: not ours now */
/* Has the job an entry in the ledger, unfinished? Not once its partition or its record is gone. */
bool consumer_tracks(const consumer *c, const struct job *j);
/* Is the partition in `only`? NULL: every one is. */
bool consumer_selected(const rd_kafka_topic_partition_list_t *only, const struct assigned *a);
void consumer_take_finished(consumer *c, int timeout_ms);
/* Delivered, and allowed to start: to intake, or behind the others of its key. */
lm_status consumer_admit(consumer *c, struct job *j);
void consumer_to_intake(consumer *c, struct job *j);    /* whose turn in its key it is */
/* Ends the gathering of a burst: what is ready goes to intake, now and from now on. */
void consumer_hand_over(consumer *c);
int consumer_poll_ms(const consumer *c);        /* for how long the thread may wait for records */

/* admission.c */
void admission_control(consumer *c);    /* every turn of the loop */
void admission_apply(consumer *c);      /* something has changed */
/* Within a burst: what of each budget it may fill, and whether it has, or is to end for another
 * reason. */
struct admission_limits { int64_t backlog, messages, bytes, tokens; };
struct admission_limits admission_limits(const consumer *c);
bool admission_due(const consumer *c, const struct admission_limits *limits);
void admission_assigned(consumer *c, const rd_kafka_topic_partition_list_t *parts);

/* commit.c */
void commit_serve(consumer *c, int timeout_ms);         /* the answer of the one under way */
/* Starts a commit of what is new; nothing when one is under way. */
void commit_start(consumer *c);
/* When the interval is over, a mark is wanted, or a rebalance has refused the last one. */
void commit_tick(consumer *c);
void commit_now(consumer *c);           /* and waits until it is accepted, for some seconds */

/* Is there an offset, a map or a mark of this partition to commit? */
bool commit_due(consumer *c, struct assigned *a, bool staged, struct ledger_commit *due);
/* Adds a partition's commit with its map and its mark; false: there is no memory for these. */
bool commit_add_offset(consumer *c, struct assigned *a, const struct ledger_commit *due,
                       bool staged, rd_kafka_topic_partition_list_t *l);

/* The metadata of the commit under way was accepted, or was too long: shorter from now on. */
void commit_taken(consumer *c);
void commit_too_long(consumer *c);

/* isolation.c */
void isolation_init(consumer *c, size_t map_limit);
size_t isolation_map_room(const consumer *c, size_t map_limit);
void isolation_end(consumer *c);        /* marks have no room */
/* A partition comes with this mark; false: the text is none of ours. */
bool isolation_adopt(consumer *c, struct assigned *a, const char *text, size_t len, int64_t base);
/* May it not go on yet? Then it is kept here. */
bool isolation_hold(consumer *c, struct assigned *a, struct job *j);
/* It is the first of its key now. True: it waits for its turn to run alone, or was dropped. */
bool isolation_keeps(consumer *c, struct job *j);
/* How many are kept for the time of a commit: the intake's budget has them. */
int64_t isolation_waiting(const consumer *c);
bool isolation_crowded(const struct assigned *a, bool already);
void isolation_serve(consumer *c);      /* every turn of the loop */
/* Must the partition's mark be committed now? */
bool isolation_wants(consumer *c, struct assigned *a);
/* ... or with the next commit, for its answer: does the group take those of its topic again? */
bool isolation_probes(const consumer *c, const struct assigned *a);
/* The mark for that commit, NUL-terminated; returns its length. */
size_t isolation_text(consumer *c, struct assigned *a, const struct ledger_commit *due,
                      char out[QUARANTINE_TEXT_MAX + 1]);
void isolation_answered(consumer *c, struct ledger_ref ref, bool accepted);
void isolation_unsent(consumer *c, struct ledger_ref ref);      /* that commit is not made */
/* Partitions are handed back in order: first when it begins, then before their last commit. */
void isolation_before_leaving(consumer *c);
void isolation_leave(consumer *c, const rd_kafka_topic_partition_list_t *only);
/* The same without waiting; true: done, or it has taken long enough. */
bool isolation_left(consumer *c, const rd_kafka_topic_partition_list_t *only);
void isolation_drop(consumer *c, struct assigned *a);   /* before the partition's epoch ends */
/* The same for its prompts from `from` on only, before the ledger's cut. */
void isolation_cut(consumer *c, struct assigned *a, int64_t from);

/* staging.c */
void staging_init(struct staging *g);
void staging_serve(consumer *c);        /* the producer thread's request, if there is one */
/* Does the transaction under way hold offsets of any of these? It may yet be committed. */
bool staging_holds(const consumer *c, const rd_kafka_topic_partition_list_t *parts);
void staging_close(consumer *c);        /* refuses all later ones */
void staging_release(struct staging *g);

/* blocking.c: for how long (microseconds) the partition's first unfinished prompt has been here
 * while later ones are finished; 0: it blocks nothing. Says so when it lasts. */
int64_t blocking_look(consumer *c, struct assigned *a, const struct ledger_info *info,
                      int64_t now_us);

/* rebalance.c */
void rebalance_serve(consumer *c);      /* a revocation under way */
void rebalance_cb(rd_kafka_t *rk, rd_kafka_resp_err_t e, rd_kafka_topic_partition_list_t *parts,
                  void *opaque);
void rebalance_remove(consumer *c, struct assigned *a); /* ends the epoch */
/* Prompts of these partitions that the engine or the producer holds; optionally cancels them. */
size_t rebalance_active(consumer *c, const rd_kafka_topic_partition_list_t *only, bool cancel);
void rebalance_hand_back(consumer *c, const rd_kafka_topic_partition_list_t *only);

#endif
