/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cli_group.h - what the tools `status`, `reset` and `dlq` ask of a broker: a group's offsets and
 * members, and a topic from end to end. Nothing here joins a group; only cli_group_move() writes.
 *
 * Threads: main thread only.
 */
#ifndef LORAMILL_WORKER_TOOLS_CLI_GROUP_H
#define LORAMILL_WORKER_TOOLS_CLI_GROUP_H

#include "worker/tools/cli.h"

/* ---- partitions of a group -------------------------------------------------------------- */

struct group_part {
    char topic[256];
    int32_t partition;
    int32_t leader;             /* a broker's id; -1: none */
    int64_t committed;          /* -1: nothing committed */
    int64_t low, high;          /* of the log; -1: no leader answers */
    int64_t done_beyond;        /* finished beyond `committed`, by the offset map */
    int64_t oldest_ms;          /* timestamp of the first unfinished record; -1: not looked for */
    char member[256];           /* client id of the owner; "" */
};

struct group_member {
    char client[256], host[256], consumer[256];
    int n_parts;
};

struct group {
    char state[32];             /* "Stable", "Empty", "Dead", ... */
    struct group_part *parts;
    size_t n_parts;
    struct group_member *members;
    size_t n_members;
};

/* The state and members of the group of `c`, and for each partition of `topic`, or if that is NULL
 * of each topic that topics.prompts names or matches, where it stands. `k` is a consumer.
 * LM_NOT_FOUND: no such topic; LM_NET; LM_CANCELLED: a signal came. */
lm_status cli_group_read(struct cli_kafka *k, const struct config *c, const char *topic,
                         struct group *out, struct lm_err *err);
void cli_group_release(struct group *g);

/* Fills oldest_ms where records are unfinished; reads one record a partition, all partitions at
 * once. Ends early when a signal comes. */
void cli_group_oldest(struct cli_kafka *k, struct group *g);

/* Sets offsets: target[i] for parts[i], -1 leaves it. LM_STATE: the group has members; LM_NET, also
 * when the broker refuses some: refused[i], NULL before, says why parts[i] is where it was. */
lm_status cli_group_move(struct cli_kafka *k, const char *group, const struct group *g,
                         const int64_t *target, const char **refused, struct lm_err *err);

/* The offset of the first record at or after `ms` for each partition, its end where there is none,
 * -1 where its leader does not answer; into offsets[n_parts]. */
lm_status cli_group_offsets_at(struct cli_kafka *k, const struct group *g, int64_t ms,
                               int64_t *offsets, struct lm_err *err);

/* What `group` has committed for partitions 0..n-1 of a topic, with the metadata; the caller
 * destroys it. */
lm_status cli_group_commits(struct cli_kafka *k, const char *group, const char *topic, int n,
                            rd_kafka_topic_partition_list_t **out, struct lm_err *err);

/* ---- topics ----------------------------------------------------------------------------- */

/* Where each of `n` partitions ends now, for this client's readers; the caller frees it. NULL: not
 * known of one. */
int64_t *cli_topic_ends(struct cli_kafka *k, const char *topic, int n, struct lm_err *err);

/* Calls back for each record of the topic from `since_ms` (-1: the beginning) to what is its end
 * now, partition by partition interleaved. `each` returns false to end early. Offsets of a
 * partition ascend: LM_STATE where they don't, as the topic was made anew. */
lm_status cli_scan(struct cli_kafka *k, const char *topic, int64_t since_ms,
                   bool (*each)(void *user, const rd_kafka_message_t *m), void *user,
                   struct lm_err *err);

#endif
