/* SPDX-License-Identifier: Apache-2.0 */
/*
 * withheld.h - exactly-once: prompt topics whose offsets the group refuses, and the jobs that wait
 * for them.
 *
 * A transaction's offsets go to the group in one call, and one partition that is refused fails it
 * for all: a topic that we may not read any more, or that was deleted, while its partitions are
 * ours still. Nothing of such a topic is in a transaction: its outcomes wait here, its offsets are
 * left out (staging.c), and so are its marks (isolation.c). The others commit. Now and then the
 * group is asked again, see transaction_offsets.c.
 *
 * Parts of streamed replies have no offsets, and don't wait.
 *
 * Threads: the producer thread's. The consumer thread looks while that waits for it.
 */
#ifndef LORAMILL_WORKER_WITHHELD_H
#define LORAMILL_WORKER_WITHHELD_H

#include "worker/job.h"

struct withheld_topic {
    struct withheld_topic *next;
    struct job_chain jobs;
    int failures;               /* in a row */
    int64_t due_us;             /* to be asked for again */
    char name[256];
};

/* Begins as zeros. */
struct withheld {
    struct withheld_topic *topics;
    int64_t rest_us;            /* no question until then */
    int64_t look_us;            /* for partitions that are being taken away, again then */
};

/* A topic that was refused, to be asked for after its backoff. LM_NOMEM. */
lm_status withheld_add(struct withheld *h, const char *topic, int64_t now_us, int64_t base_ms,
                       int64_t max_ms);
bool withheld_has(const struct withheld *h, const char *topic);
/* Keeps the job, if it is of such a topic. */
bool withheld_keep(struct withheld *h, struct job *j);
/* No question for a while after one, or some, that began then and were not taken. However long they
 * took: an outage in their middle counts for no more than a question. */
void withheld_rest(struct withheld *h, int64_t began_us, int64_t now_us);
/* The one that is due first, or has jobs of a partition that is being taken away, which does not
 * wait for the rest to be over; NULL: none. */
struct withheld_topic *withheld_due(struct withheld *h, int64_t now_us);
/* Milliseconds until one is, at most `cap`. */
int withheld_wait_ms(const struct withheld *h, int64_t now_us, int cap);
size_t withheld_jobs(const struct withheld *h);         /* how many wait */
/* It was refused again. */
void withheld_again(struct withheld_topic *t, int64_t now_us, int64_t base_ms, int64_t max_ms);
/* Those of partitions that are being taken away, of all topics, in a chain. */
struct job *withheld_take_revoked(struct withheld *h);
/* It is as any other from now on: forgets it, and hands out its jobs. */
struct job_chain withheld_let_go(struct withheld *h, struct withheld_topic *t);
/* All jobs, in a chain; the topics are forgotten. */
struct job *withheld_take_all(struct withheld *h);

#endif
