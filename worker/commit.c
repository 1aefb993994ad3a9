/* SPDX-License-Identifier: Apache-2.0 */
/*
 * commit.c - committing what the ledger says is finished.
 *
 * Commits are explicit, by the ledger's watermarks, and one at a time: rd_kafka_commit() would set
 * an offset back without complaint, so the order of commits is ours to keep. They run through a
 * queue of their own, because a rebalance callback must wait for one without polling the consumer.
 *
 * A rebalance refuses commits. The client sends one at once, with the generation that it has, but
 * on the connection on which it joins, and a broker answers one request of a connection after the
 * other. So in the classic protocol a commit that goes out between JoinGroup and its answer lies
 * there until the group has a new generation, and is refused for the old one; one that goes out
 * between JoinGroup and SyncGroup is refused because the group waits for its leader. With KIP-848
 * the member may not have heard of its new epoch yet. Nothing can be committed before that; but
 * what is refused goes again then, at once and not an interval later, for the next rebalance may
 * follow closely. Before a join that is ours to begin everything is committed (rebalance.c).
 *
 * Librdkafka below 2.10 forgets the generation that it has just joined when a commit is refused
 * for the one before, and loses all partitions (its issue 4059): it gets no more such commits.
 *
 * A topic of which the group takes no commits (it is no more, or not ours to read) must not hold up
 * the others. The brokers answer for each partition, but librdkafka (2.15.1) gives the error of one
 * to all of its request, also to those that the brokers have taken. So when a request of several
 * topics is refused like that, each of them is asked for again at once, in a request of its own,
 * and goes on so until one is taken.
 *
 * In exactly-once mode nothing is committed here: staging.c gives the same offsets to transactions.
 */
#include "worker/consumer_int.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum {
    COMMIT_WAIT_MS = 5000,
    COMMIT_LEAST_MS = 500,
    AGAIN_FIRST_MS = 20,        /* of a refused commit; then twice as long, */
    AGAIN_MOST_MS = 160,        /* up to here */
    SAFE_WHILE_JOINING = 0x020a0000,    /* librdkafka */
};
/* KIP-848's; older headers have no name for it. */
static const rd_kafka_resp_err_t STALE_MEMBER_EPOCH = (rd_kafka_resp_err_t)113;

/* The group has moved on without us; the rebalance that follows says what is ours. */
static bool is_stale_member(rd_kafka_resp_err_t e)
{
    return e == RD_KAFKA_RESP_ERR_ILLEGAL_GENERATION || e == RD_KAFKA_RESP_ERR_UNKNOWN_MEMBER_ID ||
           e == RD_KAFKA_RESP_ERR_REBALANCE_IN_PROGRESS ||
           e == RD_KAFKA_RESP_ERR_FENCED_INSTANCE_ID || e == STALE_MEMBER_EPOCH;
}

/* It is refused for its generation, and the member will have another one in a moment. One that the
 * group does not know any more has lost its partitions. */
static bool meets_rebalance(rd_kafka_resp_err_t e)
{
    return e == RD_KAFKA_RESP_ERR_ILLEGAL_GENERATION ||
           e == RD_KAFKA_RESP_ERR_REBALANCE_IN_PROGRESS || e == STALE_MEMBER_EPOCH;
}

static void go_again_soon(consumer *c)
{
    int64_t ms = c->again_ms ? LM_MIN(c->again_ms * 2, AGAIN_MOST_MS) : AGAIN_FIRST_MS;
    c->again_ms = LM_MIN(ms, c->w->cfg->commit_interval_ms);
    c->next_commit_us = LM_MIN(c->next_commit_us, lm_now_us() + c->again_ms * 1000);
}

static void commit_refused(consumer *c, rd_kafka_resp_err_t e)
{
    metric_add(&c->w->metrics.commit_failures, 1);
    bool heals = is_stale_member(e) || e == RD_KAFKA_RESP_ERR_OFFSET_METADATA_TOO_LARGE;
    bool known = meets_rebalance(e) && c->refused++;
    lm_log(known ? LM_DEBUG : heals ? LM_INFO : LM_WARN, "consumer", "offset commit refused: %s",
           rd_kafka_err2str(e));
    if (e == RD_KAFKA_RESP_ERR_OFFSET_METADATA_TOO_LARGE)
        commit_too_long(c);
    c->overtaken |= meets_rebalance(e) && rd_kafka_version() >= SAFE_WHILE_JOINING;
}

void commit_taken(consumer *c)
{
    c->taken = LM_MAX(c->taken, c->longest);
}

/* Half of what was refused, but what the broker has accepted may be said again: a map that was
 * committed and is cut afterwards is work that a crash repeats. */
void commit_too_long(consumer *c)
{
    size_t limit = c->longest / 2;
    if (!c->longest)
        return;
    if (c->taken < c->longest)
        limit = LM_MAX(limit, c->taken);
    c->map_limit = LM_MIN(limit, c->map_limit);
    if (c->iso.max && c->map_limit < QUARANTINE_ROOM_MIN)
        isolation_end(c);
    ledger_set_map_limit(c->ledger, isolation_map_room(c, c->map_limit));
    ledger_set_restored_limit(c->ledger, limit);
    const char *cost = c->exactly_once ?
        "; finished prompts that find no room there wait for earlier ones of their partition" :
        "; a crash may repeat finished prompts that find no room there";
    lm_log(c->said_small ? LM_INFO : LM_WARN, "consumer", "the broker takes no commit metadata of "
           "%zu bytes (its offset.metadata.max.bytes): %zu at most from now on%s", c->longest,
           limit, c->said_small ? "" : cost);
    c->said_small = true;
}

/* What the answer to a request says of one partition. NULL: it is not in that request, or its ref
 * is stale: it does not matter any more. */
static const rd_kafka_topic_partition_t *verdict(const consumer *c, const struct ledger_commit *p,
                                                 rd_kafka_topic_partition_list_t *l)
{
    struct ledger_info info;
    return ledger_get(c->ledger, p->ref, &info) ?
        rd_kafka_topic_partition_list_find(l, info.topic, info.partition) : NULL;
}

static bool of_one_topic(const rd_kafka_topic_partition_list_t *l)
{
    for (int i = 1; i < l->cnt; i++)
        if (strcmp(l->elems[i].topic, l->elems[0].topic))
            return false;
    return true;
}

static size_t longest_of(const rd_kafka_topic_partition_list_t *l)
{
    size_t longest = 0;
    for (int i = 0; i < l->cnt; i++)
        longest = LM_MAX(longest, l->elems[i].metadata_size);
    return longest;
}

/* It may have been taken: its topic need not be the one that is refused. */
static void note_doubt(consumer *c, struct assigned *a)
{
    isolation_unsent(c, a->ref);
    a->apart = c->unsure = true;
}

static void note_answer(consumer *c, struct assigned *a, const struct ledger_commit *p,
                        rd_kafka_resp_err_t e)
{
    isolation_answered(c, p->ref, !e);
    a->refused = stage_refuses_topic(e);
    a->apart = a->apart && e;
    if (!e)
        ledger_committed(c->ledger, p);
}

static void commit_accepted(consumer *c)
{
    if (c->refused > 1)
        lm_log(LM_INFO, "consumer", "offsets are committed again, after %" PRIu64 " refusals",
               c->refused);
    c->refused = 0;
    commit_taken(c);
    metric_add(&c->w->metrics.commits, 1);
}

/* All its requests are answered. What a rebalance has refused goes again, whatever was said of a
 * topic that went apart: that one is refused at once, for itself, before the group is looked at. */
static void end_commit(consumer *c)
{
    if (c->overtaken)
        go_again_soon(c);
    else
        c->again_ms = 0;
}

static void on_commit(rd_kafka_t *rk, rd_kafka_resp_err_t e, rd_kafka_topic_partition_list_t *l,
                      void *opaque)
{
    (void)rk;
    consumer *c = opaque;
    rd_kafka_resp_err_t worst = e;
    bool doubtful = stage_refuses_topic(e) && !of_one_topic(l);
    for (size_t i = 0; i < c->n_pending; i++) {
        const struct ledger_commit *p = &c->pending[i];
        const rd_kafka_topic_partition_t *v = verdict(c, p, l);
        struct assigned *a = v ? consumer_find_ref(c, p->ref) : NULL;
        rd_kafka_resp_err_t own = v && v->err ? v->err : e;
        if (!a)
            continue;
        worst = worst ? worst : own;
        if (doubtful && own == e)
            note_doubt(c, a);
        else
            note_answer(c, a, p, own);
    }
    c->committing--;
    c->longest = longest_of(l);
    lm_log(LM_DEBUG, "consumer", "offset commit answered after %" PRId64 " ms",
           (lm_now_us() - c->commit_start_us) / 1000);
    if (!worst)
        commit_accepted(c);
    else if (doubtful && worst == e)
        lm_log(LM_DEBUG, "consumer", "offset commit refused for some topic: %s",
               rd_kafka_err2str(e));
    else
        commit_refused(c, worst);
    if (!c->committing)
        end_commit(c);
}

void commit_serve(consumer *c, int timeout_ms)
{
    rd_kafka_queue_poll_callback(c->commit_queue, timeout_ms);
}

/* When the worker ends, all commits together have COMMIT_WAIT_MS after the drain, and one that
 * comes late, because this thread was held up, still a moment. */
static int64_t wait_end(const consumer *c)
{
    int64_t now = lm_now_us(), from = now;
    if (atomic_load(&c->w->cancelling))
        from = LM_MIN(from, atomic_load(&c->w->drain_end_us));
    return LM_MAX(from + (int64_t)COMMIT_WAIT_MS * 1000, now + (int64_t)COMMIT_LEAST_MS * 1000);
}

static void wait_for_commit(consumer *c)
{
    int64_t end = wait_end(c);
    while (c->committing && lm_now_us() < end) {
        atomic_store(&c->w->consumer_beat_us, lm_now_us());
        commit_serve(c, 100);
    }
    if (c->committing)
        lm_log(LM_WARN, "consumer", "no answer to an offset commit for %d s",
               COMMIT_WAIT_MS / 1000);
}

/* Where the consumer stands in an idle partition: past trailing transaction markers. */
static void note_position(consumer *c, const struct assigned *a)
{
    struct ledger_info info;
    /* Of a partition that is being taken away records are read and ignored. */
    if (!ledger_get(c->ledger, a->ref, &info) || info.in_flight || lease_revoked(a->lease))
        return;
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(1);
    rd_kafka_topic_partition_list_add(l, a->lease->topic, a->partition);
    if (!rd_kafka_position(c->rk, l) && !l->elems[0].err)
        ledger_position(c->ledger, a->ref, l->elems[0].offset);
    rd_kafka_topic_partition_list_destroy(l);
}

bool commit_due(consumer *c, struct assigned *a, bool staged, struct ledger_commit *due)
{
    note_position(c, a);
    return ledger_due(c->ledger, a->ref, staged, due) ||
           (due->offset >= 0 && (isolation_wants(c, a) || isolation_probes(c, a)));
}

static bool grow_pending(consumer *c)
{
    struct ledger_commit *p = lm_reallocarray(c->pending, LM_MAX(c->n_parts, 1), sizeof *p);
    if (p)
        c->pending = p;
    return p;
}

/* Its metadata is MAP, MARK, or "MAP,MARK". Without them an offset says that nothing beyond it is
 * finished, and that nobody is at work: so without memory it isn't said now. */
bool commit_add_offset(consumer *c, struct assigned *a, const struct ledger_commit *due,
                       bool staged, rd_kafka_topic_partition_list_t *l)
{
    char text[OFFSET_MAP_MAX + QUARANTINE_TEXT_MAX + 2], mark[QUARANTINE_TEXT_MAX + 1];
    size_t len = ledger_map(c->ledger, due, staged, text, NULL);
    size_t more = isolation_text(c, a, due, mark);
    if (more) {
        if (len)
            text[len++] = OFFSET_MAP_SEPARATOR;
        memcpy(text + len, mark, more + 1);
    }
    char *metadata = len + more ? lm_strdup(text) : NULL;       /* freed with the list */
    if (len + more && !metadata) {
        isolation_unsent(c, a->ref);
        return false;
    }
    rd_kafka_topic_partition_t *p = rd_kafka_topic_partition_list_add(l, a->lease->topic,
                                                                     a->partition);
    p->offset = due->offset;
    p->metadata = metadata;
    p->metadata_size = len + more;
    c->longest = LM_MAX(c->longest, p->metadata_size);
    return true;
}

/* The request that a partition's commit goes with: that of all, or one of its topic's own. */
static rd_kafka_topic_partition_list_t *request_of(rd_kafka_topic_partition_list_t **l,
                                                   const struct assigned *a)
{
    size_t i = a->apart;
    while (a->apart && l[i] && l[i]->cnt && strcmp(l[i]->elems[0].topic, a->lease->topic))
        i++;
    if (!l[i])
        l[i] = rd_kafka_topic_partition_list_new(1);
    return l[i];
}

static void send_request(consumer *c, rd_kafka_topic_partition_list_t *l)
{
    lm_log(LM_DEBUG, "consumer", "offset commit of %d partitions", l->cnt);
    c->committing++;
    rd_kafka_resp_err_t e = rd_kafka_commit_queue(c->rk, l, c->commit_queue, on_commit, c);
    if (e)
        on_commit(c->rk, e, l, c);
    rd_kafka_topic_partition_list_destroy(l);
}

void commit_start(consumer *c)
{
    rd_kafka_topic_partition_list_t **requests;
    /* Of what is lost another worker commits. The group would refuse it, but not once it is empty:
     * then it takes commits of anybody. */
    if (c->exactly_once || c->committing || rd_kafka_assignment_lost(c->rk) || !grow_pending(c) ||
        !(requests = lm_calloc(c->n_parts + 2, sizeof *requests)))
        return;
    c->n_pending = 0;
    c->longest = 0;
    c->unsure = c->overtaken = false;
    for (size_t i = 0; i < c->n_parts; i++) {
        struct assigned *a = &c->parts[i];
        struct ledger_commit *due = &c->pending[c->n_pending];
        if (commit_due(c, a, false, due) &&
            commit_add_offset(c, a, due, false, request_of(requests, a)))
            c->n_pending++;
    }
    if (!c->n_pending) {
        c->again_ms = 0;
        c->refused = 0;
    }
    c->commit_start_us = lm_now_us();
    for (size_t i = 0; i < c->n_parts + 1; i++)
        if (requests[i] && requests[i]->cnt)
            send_request(c, requests[i]);
        else if (requests[i])
            rd_kafka_topic_partition_list_destroy(requests[i]);
    free(requests);
}

void commit_tick(consumer *c)
{
    int64_t now = lm_now_us();
    if (now < c->next_commit_us && !c->iso.wanted && !c->unsure)
        return;
    c->next_commit_us = now + c->w->cfg->commit_interval_ms * 1000;
    commit_start(c);
}

/* A pause before what was refused goes again; false: it does not. */
static bool goes_again(consumer *c, int64_t end_us)
{
    if (c->unsure)              /* once: then each topic has a request of its own */
        return !rd_kafka_assignment_lost(c->rk) && lm_now_us() < end_us;
    if (!c->again_ms || rd_kafka_assignment_lost(c->rk) ||
        lm_now_us() + c->again_ms * 1000 >= end_us)
        return false;
    atomic_store(&c->w->consumer_beat_us, lm_now_us());
    commit_serve(c, (int)c->again_ms);
    return true;
}

void commit_now(consumer *c)
{
    int64_t end = wait_end(c);
    do {
        wait_for_commit(c);
        if (c->committing)      /* the broker is silent; one such wait is enough */
            return;
        commit_start(c);
        wait_for_commit(c);
    } while (!c->committing && goes_again(c, end));
}
