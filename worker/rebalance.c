/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rebalance.c - partitions come and go.
 *
 *   assigned   committed offsets and maps are fetched, an epoch begins, reading starts there
 *   revoked    its leases are revoked: intake drops what has not started; what runs may finish for
 *              revoke.drain_ms, then it is cancelled; the watermark is committed; the epoch ends
 *   lost       as revoked, but without waiting and without a commit: another worker owns it
 *
 * In a cooperative rebalance (and under KIP-848) the wait doesn't block this thread: the callback
 * pauses what goes and returns, the loop goes on with what it holds of what stays, and
 * rebalance_serve() gives the client its unassign() when the wait is over. The client starts no
 * other rebalance before, and fetches nothing, of what stays neither (librdkafka 2.15.1).
 *
 * Offsets of what is assigned are fetched in the callback, whatever the protocol: until they are
 * there nothing is read, of partitions that stay neither. What is held of those goes on; see
 * fetch_committed() for how long that may take.
 *
 * Completions that come later carry a stale epoch and change nothing. A repeat is better than a
 * loss.
 */
#include "worker/consumer_int.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* An open transaction of a worker that died ends within 20 s: its timeout, and the broker looks
 * every 10 s. */
enum {
    COMMITTED_FIRST_MS = 500,
    COMMITTED_MOST_MS = 10000,
    COMMITTED_PAUSE_MS = 100,   /* from one question to the next, at least */
    COMMITTED_BUDGET_MS = 60000,
    AWAIT_MS = 30000,           /* our own transaction */
};

/* ---- partitions --------------------------------------------------------------------------- */

void rebalance_remove(consumer *c, struct assigned *a)
{
    isolation_drop(c, a);
    ledger_revoke(c->ledger, a->ref);
    lease_unref(a->lease);
    *a = c->parts[--c->n_parts];
    c->last_hit = 0;
}

/* What an earlier owner finished beyond the committed offset. Without it prompts run again, nothing
 * is lost; so a map that can't be believed is ignored, with a word. */
static void restore_map(consumer *c, const struct assigned *a, const char *text, size_t len,
                        const rd_kafka_topic_partition_t *from)
{
    struct offset_range *ranges;
    struct lm_err err;
    size_t n;
    lm_status st = offset_map_decode(text, len, from->offset, &ranges, &n, &err);
    if (!st && (st = ledger_restore(c->ledger, a->ref, ranges, n)))
        lm_err_set(&err, st, "out of memory");
    if (st)
        lm_log(LM_WARN, "consumer", "%s [%d]: commit metadata is ignored: %s", from->topic,
               (int)from->partition, err.msg);
    free(ranges);
}

/* The metadata is MAP, MARK, or "MAP,MARK"; see offset_map.h and quarantine.h. It is read also
 * where none is to be written (commit.map_max_bytes=0): what it holds was answered, and commits
 * hand it on until the watermark has passed it (ledger.h). */
static void restore(consumer *c, struct assigned *a, const rd_kafka_topic_partition_t *from)
{
    const char *text = from->metadata, *mark = NULL;
    size_t len = kafka_has_offset_map() && from->offset >= 0 && from->metadata_size ?
        strnlen(text, from->metadata_size) : 0;         /* some tools send a NUL along */
    if (len)
        mark = memchr(text, OFFSET_MAP_SEPARATOR, len);
    mark = mark ? mark + 1 : text;
    size_t mark_len = len ? (size_t)(text + len - mark) : 0;
    bool marked = isolation_adopt(c, a, mark, mark_len, from->offset);
    size_t map_len = mark > text ? (size_t)(mark - 1 - text) : marked ? 0 : len;
    if (map_len)
        restore_map(c, a, text, map_len, from);
}

static lm_status add_part(consumer *c, const rd_kafka_topic_partition_t *from)
{
    struct assigned *old = consumer_find(c, from->topic, from->partition);
    if (old)
        rebalance_remove(c, old);
    struct assigned *grown = lm_reallocarray(c->parts, c->n_parts + 1, sizeof *grown);
    if (!grown)
        return LM_NOMEM;
    c->parts = grown;
    struct assigned a = { .partition = from->partition };
    if (ledger_assign(c->ledger, from->topic, from->partition, from->offset, &a.ref))
        return LM_NOMEM;
    if (!(a.lease = lease_new(from->topic, from->partition, a.ref))) {
        ledger_revoke(c->ledger, a.ref);
        return LM_NOMEM;
    }
    a.lease->priority = config_topic_priority(c->w->cfg, from->topic);
    restore(c, &a, from);
    c->parts[c->n_parts++] = a;
    return LM_OK;
}

/* ---- draining --------------------------------------------------------------------------- */

struct census { size_t active; bool cancel; struct worker *w; };

static void count_active(void *ctx, int64_t offset, void *user)
{
    (void)offset;
    struct census *n = ctx;
    struct job *j = user;
    enum job_stage stage = atomic_load(&j->stage);
    n->active += stage == JOB_RUNNING || stage == JOB_ANSWERING;
    engine_handle h = atomic_load(&j->handle);
    if (n->cancel && stage == JOB_RUNNING && h)
        engine_cancel(n->w->engine, h);
}

size_t rebalance_active(consumer *c, const rd_kafka_topic_partition_list_t *only, bool cancel)
{
    struct census n = { .cancel = cancel, .w = c->w };
    for (size_t i = 0; i < c->n_parts; i++)
        if (consumer_selected(only, &c->parts[i]))
            ledger_each(c->ledger, c->parts[i].ref, count_active, &n);
    return n.active;
}

void rebalance_hand_back(consumer *c, const rd_kafka_topic_partition_list_t *only)
{
    size_t left = rebalance_active(c, only, true);
    if (left)
        lm_log(LM_INFO, "consumer", "%zu unfinished prompts are handed back", left);
}

/* ---- assigned --------------------------------------------------------------------------- */

struct question {
    rd_kafka_t *rk;
    rd_kafka_topic_partition_list_t *l;
    int timeout_ms;
    rd_kafka_resp_err_t error;
    bool told;                  /* of each partition, its offset or its refusal */
    struct job_queue *wake;
    atomic_bool answered;
};

static void *ask_group(void *arg)
{
    struct question *q = arg;
    q->error = rd_kafka_committed(q->rk, q->l, q->timeout_ms);
    q->told = !q->error;
    for (int i = 0; !q->error && i < q->l->cnt; i++)
        q->error = q->l->elems[i].err;
    atomic_store(&q->answered, true);
    job_queue_wake(q->wake);
    return NULL;
}

/* What the callback's wait leaves to do: all but reading. */
static void work_on(consumer *c)
{
    atomic_store(&c->w->consumer_beat_us, lm_now_us());
    consumer_take_finished(c, DRAIN_POLL_MS);
    staging_serve(c);
    isolation_serve(c);
    commit_serve(c, 0);
    commit_tick(c);
}

/* What the group has told of a partition: each question begins by forgetting all, and a later one,
 * for the sake of others, may find it silent, or have no time left. */
static void keep_told(rd_kafka_topic_partition_list_t *l, rd_kafka_topic_partition_list_t *answer)
{
    for (int i = 0; i < l->cnt; i++) {
        rd_kafka_topic_partition_t before = l->elems[i];
        if (answer->elems[i].err)
            continue;
        l->elems[i] = answer->elems[i];
        answer->elems[i] = before;      /* each list frees what it has then */
    }
}

/* One try. The group's answer takes as long as the transaction of an owner that died is open, so
 * another thread waits for it: this one commits what the partitions that stay have finished, as
 * ever. Should it die now, no more is done again than at any other time. */
static rd_kafka_resp_err_t ask_committed(consumer *c, rd_kafka_topic_partition_list_t *l,
                                         int timeout_ms)
{
    struct question q = { .rk = c->rk, .l = rd_kafka_topic_partition_list_copy(l),
                          .timeout_ms = timeout_ms, .wake = &c->w->done };
    pthread_t asking;
    bool apart = !pthread_create(&asking, NULL, ask_group, &q);
    if (!apart)
        ask_group(&q);
    while (!atomic_load(&q.answered))
        work_on(c);
    if (apart)
        pthread_join(asking, NULL);
    if (q.told)
        keep_told(l, q.l);
    rd_kafka_topic_partition_list_destroy(q.l);
    return q.error;
}

/* A partition that was lost and is ours again, while the transaction that holds its offsets is
 * under way: that may be committed yet, after the group has told us an offset from before it. The
 * group does not always refuse it: under KIP-848 we may be the member of the same epoch. */
static void await_transaction(consumer *c, const rd_kafka_topic_partition_list_t *l, int64_t ms)
{
    int64_t end = lm_now_us() + ms * 1000;
    while (staging_holds(c, l) && lm_now_us() < end && !atomic_load(&c->w->stopping))
        work_on(c);
}

/* The group's offsets with their maps. False: the broker doesn't answer, or not for all of them; of
 * the others we have them then. The client calls us within a poll, and the group throws out who
 * takes too long for one: both waits together take three quarters of the poll interval at most. */
static bool fetch_committed(consumer *c, rd_kafka_topic_partition_list_t *l)
{
    rd_kafka_resp_err_t e = RD_KAFKA_RESP_ERR__TIMED_OUT, said = RD_KAFKA_RESP_ERR_NO_ERROR;
    int64_t interval = kafka_conf_int(rd_kafka_conf(c->rk), "max.poll.interval.ms");
    int64_t left = LM_MIN(COMMITTED_BUDGET_MS, interval / 2);
    for (int i = 0; i < l->cnt; i++)
        l->elems[i].offset = RD_KAFKA_OFFSET_INVALID;   /* nothing is told yet */
    await_transaction(c, l, LM_MIN(AWAIT_MS, interval / 4));
    int64_t end = lm_now_us() + left * 1000;
    for (int64_t ms = COMMITTED_FIRST_MS; e && left > 0 && !atomic_load(&c->w->stopping);
         ms = LM_MIN(ms * 2, COMMITTED_MOST_MS), left = (end - lm_now_us()) / 1000) {
        int64_t next = lm_now_us() + (int64_t)COMMITTED_PAUSE_MS * 1000;
        e = ask_committed(c, l, (int)LM_MIN(ms, left));
        if (e && (e != said || lm_now_us() >= next))    /* a refusal comes at once, each time */
            lm_log(LM_WARN, "consumer", "committed offsets: %s", rd_kafka_err2str(said = e));
        while (e && lm_now_us() < next && !atomic_load(&c->w->stopping))
            work_on(c);
    }
    for (int i = 0; i < l->cnt; i++)
        if (l->elems[i].offset < 0)
            l->elems[i].offset = LEDGER_NONE;
    return !e;
}

/* The client starts at the offset whose map we have read, not at one that it asks for later. */
static void start_at(rd_kafka_topic_partition_list_t *parts, const rd_kafka_topic_partition_t *p)
{
    rd_kafka_topic_partition_t *to = rd_kafka_topic_partition_list_find(parts, p->topic,
                                                                       p->partition);
    if (to && p->offset >= 0)
        to->offset = p->offset;
}

static void on_assign(consumer *c, rd_kafka_topic_partition_list_t *parts)
{
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_copy(parts);
    if (l->cnt && !fetch_committed(c, l) && c->exactly_once && !atomic_load(&c->w->stopping))
        worker_fail(c->w, LM_NET, "the committed offsets can't be had: no answer, or a "
                    "transaction with them does not end; without them finished prompts would run "
                    "again");
    commit_start(c);            /* who has revoked something joins again after this */
    for (int i = 0; i < l->cnt; i++) {
        const rd_kafka_topic_partition_t *p = &l->elems[i];
        start_at(parts, p);
        if (add_part(c, p))
            worker_fail(c->w, LM_NOMEM, "out of memory for partition %s [%d]", p->topic,
                        (int)p->partition);
        lm_log(LM_INFO, "consumer", "assigned %s [%d] at %" PRId64, p->topic, (int)p->partition,
               p->offset);
    }
    metric_add(&c->w->metrics.assigned, 1);
    rd_kafka_topic_partition_list_destroy(l);
}

/* ---- revoked ---------------------------------------------------------------------------- */

static void revoke_leases(consumer *c, const rd_kafka_topic_partition_list_t *parts, bool lost)
{
    isolation_before_leaving(c);
    for (int i = 0; i < parts->cnt; i++) {
        struct assigned *a = consumer_find(c, parts->elems[i].topic, parts->elems[i].partition);
        if (a)
            atomic_store(&a->lease->revoked, true);
        lm_log(LM_INFO, "consumer", "%s %s [%d]", lost ? "lost" : "revoked",
               parts->elems[i].topic, (int)parts->elems[i].partition);
    }
    atomic_store(&c->w->sweep_intake, true);    /* or they keep its room until their turns */
    job_queue_wake(&c->w->to_intake);
}

static void end_epochs(consumer *c, const rd_kafka_topic_partition_list_t *parts, bool lost)
{
    for (int i = 0; i < parts->cnt; i++) {
        struct assigned *a = consumer_find(c, parts->elems[i].topic, parts->elems[i].partition);
        if (a)
            rebalance_remove(c, a);
    }
    metric_add(lost ? &c->w->metrics.lost : &c->w->metrics.revoked, 1);
}

/* What still runs is handed back, what is finished is committed, of partitions that stay as well:
 * the client may join again right after this, and nothing can be committed until the group has
 * answered that, which it does when the session of every member that died has ended. */
static void let_go(consumer *c, const rd_kafka_topic_partition_list_t *parts, int64_t start_us,
                   bool lost)
{
    if (!lost)
        isolation_leave(c, parts);
    rebalance_hand_back(c, parts);
    consumer_take_finished(c, 0);
    if (!lost)
        commit_now(c);
    end_epochs(c, parts, lost);
    histogram_observe(&c->w->metrics.rebalance_drain, lm_now_us() - start_us);
}

static bool drained(consumer *c, const rd_kafka_topic_partition_list_t *parts, int64_t start_us)
{
    return !rebalance_active(c, parts, false) || atomic_load(&c->w->cancelling) ||
           lm_now_us() - start_us > c->w->cfg->revoke_drain_ms * 1000;
}

/* All partitions go at once (the eager protocol, the end): nothing else is worth polling for. */
static void revoke_now(consumer *c, const rd_kafka_topic_partition_list_t *parts)
{
    int64_t start = lm_now_us();
    revoke_leases(c, parts, false);
    while (parts->cnt && !drained(c, parts, start)) {
        atomic_store(&c->w->consumer_beat_us, lm_now_us());
        consumer_take_finished(c, DRAIN_POLL_MS);
        staging_serve(c);
        commit_serve(c, 0);
        commit_tick(c);
    }
    if (parts->cnt)
        let_go(c, parts, start, false);
}

static void lose(consumer *c, const rd_kafka_topic_partition_list_t *parts)
{
    revoke_leases(c, parts, true);
    rebalance_active(c, parts, true);
    end_epochs(c, parts, true);
}

static void check_rebalance(consumer *c, const char *what, rd_kafka_error_t *error,
                            rd_kafka_resp_err_t e)
{
    const char *text = error ? rd_kafka_error_string(error) : rd_kafka_err2str(e);
    if ((error && rd_kafka_error_is_fatal(error)) || e == RD_KAFKA_RESP_ERR__FATAL)
        worker_fail(c->w, LM_STATE, "%s: %s", what, text);
    else if (error || e)
        lm_log(LM_WARN, "consumer", "%s: %s", what, text);
    if (error)
        rd_kafka_error_destroy(error);
}

/* A client that has left its group has no protocol. */
static bool is_cooperative(rd_kafka_t *rk)
{
    const char *protocol = rd_kafka_rebalance_protocol(rk);
    return protocol && !strcmp(protocol, "COOPERATIVE");
}

static void unassign(consumer *c, const rd_kafka_topic_partition_list_t *parts)
{
    if (is_cooperative(c->rk))
        check_rebalance(c, "unassign", rd_kafka_incremental_unassign(c->rk, parts), 0);
    else
        check_rebalance(c, "unassign", NULL, rd_kafka_assign(c->rk, NULL));
}

static void finish_revocation(consumer *c)
{
    rd_kafka_topic_partition_list_t *parts = c->revoking;
    c->revoking = NULL;
    let_go(c, parts, c->revoke_start_us, rd_kafka_assignment_lost(c->rk));
    unassign(c, parts);
    rd_kafka_topic_partition_list_destroy(parts);
    admission_apply(c);
}

/* The client waits for our unassign(), and we poll on meanwhile. */
static void begin_revocation(consumer *c, const rd_kafka_topic_partition_list_t *parts)
{
    c->revoking = rd_kafka_topic_partition_list_copy(parts);
    c->revoke_start_us = lm_now_us();
    revoke_leases(c, parts, false);
    admission_apply(c);         /* pauses them */
}

void rebalance_serve(consumer *c)
{
    if (c->revoking && (rd_kafka_assignment_lost(c->rk) ||
                        (drained(c, c->revoking, c->revoke_start_us) &&
                         isolation_left(c, c->revoking))))
        finish_revocation(c);
}

static void on_revoke(consumer *c, const rd_kafka_topic_partition_list_t *parts, bool cooperative)
{
    if (c->revoking)
        finish_revocation(c);
    if (rd_kafka_assignment_lost(c->rk)) {
        lose(c, parts);
    } else if (cooperative && parts->cnt && !atomic_load(&c->w->stopping)) {
        begin_revocation(c, parts);
        return;
    } else {
        revoke_now(c, parts);
    }
    unassign(c, parts);
}

void rebalance_cb(rd_kafka_t *rk, rd_kafka_resp_err_t e, rd_kafka_topic_partition_list_t *parts,
                  void *opaque)
{
    consumer *c = opaque;
    bool cooperative = is_cooperative(rk);
    /* It may take its time: the burst around it needs a new stamp, and what the burst has read is
     * intake's already, as is what the waits below let go. */
    consumer_hand_over(c);
    c->now_us = 0;
    switch (e) {
    case RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS:
        /* It came just before we began to leave, and the revocation of all that is ours is behind
         * it. The client would take an answer to this for one to that, leave, and may never answer
         * the call that we make when that comes. */
        if (c->closing && (parts->cnt || c->n_parts))
            break;
        on_assign(c, parts);
        if (cooperative)
            check_rebalance(c, "assign", rd_kafka_incremental_assign(rk, parts), 0);
        else
            check_rebalance(c, "assign", NULL, rd_kafka_assign(rk, parts));
        admission_assigned(c, parts);
        break;
    case RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS:
        on_revoke(c, parts, cooperative);
        break;
    default:
        lm_log(LM_WARN, "consumer", "rebalance: %s", rd_kafka_err2str(e));
        rd_kafka_assign(rk, NULL);
    }
}
