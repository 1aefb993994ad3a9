/* SPDX-License-Identifier: Apache-2.0 */
/*
 * staging.h - exactly-once: what the producer thread and the consumer thread hand each other.
 *
 * A transaction makes outcomes and offsets durable together, so its offsets must be computed as if
 * its outcomes were finished, and only the consumer thread may touch the ledger. So the producer
 * thread asks:
 *
 *   producer thread                              consumer thread (staging.c)
 *   finished jobs --------- staging_stage() ---> marks their entries staged; offsets and maps
 *   begin, produce; refused on the spot:
 *      once more ---------- staging_stage() ---> unstages those, and computes again
 *   send offsets, commit
 *      committed ---------- staging_settle() -> notes what the broker holds; the jobs end as ever
 *      aborted ------------ staging_settle() -> unstages; the same jobs go into the next one
 *
 * Nothing is generated anew when a transaction aborts: finished completions stay in memory until
 * they are durable. A job whose partition has been taken away meanwhile is not staged and must be
 * dropped, unsent: its offset belongs to another worker now.
 *
 * Of prompt topics whose offsets the group refuses (withheld.h) nothing goes into a transaction;
 * staging_look() has what the group may be asked with.
 */
#ifndef LORAMILL_WORKER_STAGING_H
#define LORAMILL_WORKER_STAGING_H

#include <librdkafka/rdkafka.h>

#include "worker/withheld.h"
#include "worker/worker.h"

enum stage_verdict {
    STAGE_GONE,                 /* its partition is another's: drop it */
    STAGE_IN,
    STAGE_WAIT,                 /* not yet: the offset map has no room for it, or it is withheld */
    STAGE_REFUSED,              /* in: it was IN, but its record did not get in: take it out */
};

struct stage {
    struct job **jobs;          /* in; NULL: no longer in it */
    size_t n;
    size_t from;                /* in: those before are of earlier portions, and sent */
    bool more;                  /* in: not the last portion, so no offsets yet */
    const struct withheld *withheld;    /* in: of these prompt topics nothing; NULL: of all */
    const char *topic;          /* in, of staging_look(): of this one */
    enum stage_verdict *verdicts;       /* [n], out: of those that are new */
    bool lost;                  /* out: one that was sent is not ours any more, or there is no
                                 * memory for a map: abort */
    rd_kafka_topic_partition_list_t *offsets;   /* out, with the last portion: may be empty */
    rd_kafka_consumer_group_metadata_t *group;
    struct ledger_commit *commits;      /* [n_commits], one for each of `offsets` */
    size_t n_commits;
    bool too_long;              /* in: the broker finds a partition's metadata too long */
};

/* Producer thread. Blocks until the consumer thread has served it, at most some 100 ms outside of
 * rebalances. LM_CANCELLED: the consumer has ended, nothing can be committed any more. */
lm_status staging_stage(consumer *c, struct stage *s);
void staging_settle(consumer *c, struct stage *s, bool committed);
/* The offsets that the group has of partitions that are ours, of one prompt topic. The rest of the
 * stage is empty. LM_CANCELLED as above. */
lm_status staging_look(consumer *c, struct stage *s);
void stage_release(struct stage *s);    /* the outputs */

/* Is that answer to offsets a refusal of one topic's? What else fails is everybody's. */
bool stage_refuses_topic(rd_kafka_resp_err_t code);

/* Does the group hold one of the stage's offsets with its very map? That is how the fate of a
 * transaction is found whose commit was not answered. A status that can heal: not known. */
lm_status staging_committed(consumer *c, const struct stage *s, bool *holds);
/* Its judgement. Only partitions of which the stage finishes a prompt tell, if there is one: their
 * offset or map is new for certain. A mark (quarantine.h) may be the one that was committed before:
 * it does not tell of parts of streams, which rather come twice than not at all.
 * `group`: what the group holds; its order may change. */
bool stage_held(const struct stage *s, rd_kafka_topic_partition_list_t *group);

#endif
