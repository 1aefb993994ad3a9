/* SPDX-License-Identifier: Apache-2.0 */
/*
 * aside.h - exactly-once: topics that take no records for now, and the jobs that wait for them.
 *
 * A transaction commits when all of its records are taken, so one to a topic whose only replica is
 * away, or that the worker may not write to, or whose broker refuses it for whatever reason of its
 * own, would hold up all others. The jobs of such a topic are set aside, and so are those that come
 * for it meanwhile. What they finish waits, as their offsets do; they count as in flight, which
 * bounds them. The others commit.
 *
 *   a record is not taken --> its topic rests --> due: do all of its partitions have a leader?
 *                               ^    ^   no, a look again soon  |  yes
 *                               |    +--------------------------+
 *                               |                               v
 *                               +--- no ---  a try: some of its jobs in a transaction of their own
 *                                               | yes: at once twice as many, until none is left;
 *                                               v      then the topic is as any other
 *
 * A try begins with one job. It has ASIDE_FIRST_US, after failures up to ASIDE_SHORT_US, and each
 * ASIDE_LONG-th time a transaction's time, for a record may need that on a slow way; what was
 * enough is kept. One of more jobs that fails is followed by one of half as many. After a failure
 * its topic rests for its backoff at least, and all topics that are set aside for four times as
 * long as the try took: so the others have four fifths of the time, however many fail. Once
 * ASIDE_TRUSTED are taken together, all that wait go with the others. What the brokers take to come
 * back from an outage in its middle counts for no more than the try's own time. A job that the
 * brokers' answer makes a dead letter is progress like one that is taken; one that is another
 * worker's by now is neither.
 *
 * The notice of a dead letter is best effort: its dead letter waits for its topic only until that
 * is known to take nothing, and then goes without it.
 *
 * A topic that we may not write to is remembered for ASIDE_REMEMBER_US after its last job: one more
 * for it would abort a transaction with all its others again.
 *
 * Threads: the producer thread's.
 */
#ifndef LORAMILL_WORKER_ASIDE_H
#define LORAMILL_WORKER_ASIDE_H

#include <librdkafka/rdkafka.h>

#include "worker/job.h"

enum {
    ASIDE_FIRST_US = 1000000, ASIDE_SHORT_US = 2000000, ASIDE_LONG = 8,
    ASIDE_REST = 4,
    ASIDE_TRUSTED = 64,
    ASIDE_REMEMBER_US = 60 * 1000000,
};

struct aside_topic {
    struct aside_topic *next;
    struct job_chain jobs;
    size_t width;               /* jobs of the next try */
    int failures, looks;        /* tries, and looks, in vain; in a row */
    int64_t limit_us;           /* of the next try; 0: ASIDE_FIRST_US */
    bool forbidden;             /* by the last try */
    bool remembered;            /* without jobs, until it is due */
    bool whole;                 /* the next try is of all that a transaction holds */
    int64_t due_us;
    char name[256];
};

/* Begins as zeros. */
struct aside {
    struct aside_topic *topics;
    int64_t rest_us;            /* no try until then */
};

/* Sets the job aside; a topic that is new here is due at once. LM_NOMEM. */
lm_status aside_add(struct aside *a, const char *topic, struct job *j, int64_t now_us);
/* Of a job that comes: true if one of its records is for such a topic, and it is set aside. */
bool aside_keep(struct aside *a, struct job *j, int64_t now_us);
/* Is its notice for one that is known to take nothing? Then it is to be left out. */
bool aside_spares(const struct aside *a, const struct job *j);
/* Is one of its records for this topic? */
bool aside_is_for(const struct aside_topic *t, const struct job *j);
/* One with jobs that is due, longest first; NULL: none. Forgets those whose time is over. */
struct aside_topic *aside_due(struct aside *a, int64_t now_us);
/* Milliseconds until one is, at most `cap`. */
int aside_wait_ms(const struct aside *a, int64_t now_us, int cap);
/* Do all partitions of the topic have a leader? True also if the topic itself is refused, for then
 * a try is to tell; false if the brokers do not answer. Blocks for `wait_ms` at most. */
bool aside_may_take(rd_kafka_t *rk, const char *topic, int wait_ms);
/* How many wait. */
size_t aside_jobs(const struct aside *a);
/* What a try of it may take, with `most_us` in all. */
int64_t aside_limit_us(const struct aside_topic *t, int64_t most_us);
/* The second failure, the fourth, and so on: leaders are there, but perhaps the client keeps to
 * others. */
bool aside_stuck(const struct aside_topic *t);
/* They have none. */
void aside_looked(struct aside_topic *t, int64_t now_us, int64_t base_ms, int64_t max_ms);
/* After a try that had `limit_us`. A topic that nobody waits for is forgotten, and freed. */
void aside_tried(struct aside *a, struct aside_topic *t, bool progress, int64_t began_us,
                 int64_t limit_us, int64_t now_us, int64_t base_ms, int64_t max_ms);
/* After a try in which none of its jobs could be sent: the map has no room for them before that
 * moves on, by another of them perhaps. */
void aside_waits(struct aside *a, struct aside_topic *t, int64_t now_us);
/* The client is a new one: what the old one found need not be so any more. */
void aside_all_due(struct aside *a, int64_t now_us);
/* Those of partitions that are being taken away, in a chain. */
struct job *aside_take_revoked(struct aside_topic *t);
/* All jobs, in a chain; the topics are forgotten. */
struct job *aside_take_all(struct aside *a);

#endif
