/* SPDX-License-Identifier: Apache-2.0 */
/*
 * consumer.c - the thread that owns the consumer handle and the ledger: reads, admits, commits, and
 * answers rebalances.
 *
 * The loop never blocks for longer than 100 ms (a rebalance apart), whatever the engine does, so
 * max.poll.interval.ms guards only against this thread's own stalls and may be small.
 *
 *   take finished jobs -> ledger        admit or pause        commit when due        poll
 *
 * Admission. Partitions are paused while too much is on its way (intake.max_messages not yet in the
 * engine, intake.max_bytes or in_flight.max_messages altogether) and resumed at half of that. A
 * pause throws the client's prefetched records away, so before pausing the loop waits a moment for
 * the load to fall by itself. Pause state survives revocation inside librdkafka, so it is set anew
 * on each assignment.
 *
 * Commits are explicit, by the ledger's watermarks, and one at a time: rd_kafka_commit() would set
 * an offset back without complaint, so the order of commits is ours to keep. They run through a
 * queue of their own, because a rebalance callback must wait for one without polling the consumer.
 *
 * Rebalance.
 *   assigned   committed offsets are fetched, an epoch begins, the partition is resumed (or paused)
 *   revoked    its leases are revoked: intake drops what has not started; what runs may finish for
 *              revoke.drain_ms, then it is cancelled; the watermark is committed; the epoch ends
 *   lost       as revoked, but without waiting and without a commit: another worker owns it
 * Completions that come later carry a stale epoch and change nothing. A repeat is better than a
 * loss.
 */
#include "worker/worker.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "worker/kafka_conf.h"

enum {
    POLL_MS = 100,
    DRAIN_POLL_MS = 10,
    SETTLE_MS = 40,             /* how long a short burst may take before it costs a pause */
    COMMITTED_TIMEOUT_MS = 10000,
    COMMIT_WAIT_MS = 5000,
    CLOSE_WAIT_MS = 6000,       /* librdkafka gives LeaveGroup 5 s */
    SNAPSHOT_US = 1000000,
    COMPLAIN_EVERY_US = 10 * 1000000,
};

struct assigned {
    struct lease *lease;
    struct ledger_ref ref;
    int32_t partition;
    bool paused;
};

struct pending { struct ledger_ref ref; int64_t value; };

struct consumer {
    struct worker *w;
    rd_kafka_t *rk;
    rd_kafka_queue_t *commit_queue;
    pthread_t thread;
    ledger *ledger;
    struct assigned *parts;
    size_t n_parts, last_hit;
    bool paused;
    /* the one commit under way */
    struct pending *pending;
    size_t n_pending;
    bool committing;
    int64_t next_commit_us, next_snapshot_us, complained_us;
    long long held, held_bytes;
};

/* ---- finished jobs ------------------------------------------------------------------------ */

static void finish_job(consumer *c, struct job *j)
{
    void *held = NULL;
    c->held--;
    c->held_bytes -= (long long)j->bytes;
    if (j->outcome == OUTCOME_DROPPED)
        metric_add(&c->w->metrics.dropped, 1);
    else if (ledger_complete(c->ledger, j->lease->ref, j->record.offset, &held) == LM_OK)
        job_unref(held);
    job_unref(j);
}

static void take_finished(consumer *c, int timeout_ms)
{
    for (struct job *j = job_queue_take(&c->w->done, timeout_ms), *next; j; j = next) {
        next = j->next;
        finish_job(c, j);
    }
    atomic_store(&c->w->metrics.held, c->held);
    atomic_store(&c->w->metrics.held_bytes, c->held_bytes);
}

/* An entry left the ledger unfinished: its reference goes. */
static void on_ledger_drop(void *ctx, int64_t offset, void *user)
{
    (void)ctx;
    (void)offset;
    job_unref(user);
}

/* ---- partitions --------------------------------------------------------------------------- */

static struct assigned *find_part(consumer *c, const char *topic, int32_t partition)
{
    for (size_t n = 0; n < c->n_parts; n++) {
        size_t i = (c->last_hit + n) % c->n_parts;
        struct assigned *a = &c->parts[i];
        if (a->partition == partition && !strcmp(a->lease->topic, topic)) {
            c->last_hit = i;
            return a;
        }
    }
    return NULL;
}

static void remove_part(consumer *c, struct assigned *a)
{
    ledger_revoke(c->ledger, a->ref);
    lease_unref(a->lease);
    *a = c->parts[--c->n_parts];
    c->last_hit = 0;
}

static lm_status add_part(consumer *c, const char *topic, int32_t partition, int64_t committed)
{
    struct assigned *old = find_part(c, topic, partition);
    if (old)
        remove_part(c, old);
    struct assigned *grown = lm_reallocarray(c->parts, c->n_parts + 1, sizeof *grown);
    if (!grown)
        return LM_NOMEM;
    c->parts = grown;
    struct assigned a = { .partition = partition };
    if (ledger_assign(c->ledger, topic, partition, committed, &a.ref))
        return LM_NOMEM;
    if (!(a.lease = lease_new(topic, partition, a.ref))) {
        ledger_revoke(c->ledger, a.ref);
        return LM_NOMEM;
    }
    c->parts[c->n_parts++] = a;
    return LM_OK;
}

/* ---- commit ----------------------------------------------------------------------------- */

/* The group has moved on without us; the rebalance that follows says what is ours. */
static bool is_stale_member(rd_kafka_resp_err_t e)
{
    return e == RD_KAFKA_RESP_ERR_ILLEGAL_GENERATION || e == RD_KAFKA_RESP_ERR_UNKNOWN_MEMBER_ID ||
           e == RD_KAFKA_RESP_ERR_REBALANCE_IN_PROGRESS ||
           e == RD_KAFKA_RESP_ERR_FENCED_INSTANCE_ID;
}

static void commit_refused(consumer *c, rd_kafka_resp_err_t e)
{
    metric_add(&c->w->metrics.commit_failures, 1);
    lm_log(is_stale_member(e) ? LM_INFO : LM_WARN, "consumer", "offset commit refused: %s",
           rd_kafka_err2str(e));
}

/* The verdict on one partition; librdkafka may have sorted the list. A stale
 * ref has no verdict: it does not matter any more. */
static rd_kafka_resp_err_t verdict(consumer *c, const struct pending *p,
                                   rd_kafka_topic_partition_list_t *l)
{
    struct ledger_info info;
    if (!l || !ledger_get(c->ledger, p->ref, &info))
        return RD_KAFKA_RESP_ERR_NO_ERROR;
    rd_kafka_topic_partition_t *e = rd_kafka_topic_partition_list_find(l, info.topic,
                                                                      info.partition);
    return e ? e->err : RD_KAFKA_RESP_ERR_NO_ERROR;
}

static void on_commit(rd_kafka_t *rk, rd_kafka_resp_err_t e, rd_kafka_topic_partition_list_t *l,
                      void *opaque)
{
    (void)rk;
    consumer *c = opaque;
    rd_kafka_resp_err_t worst = e;
    for (size_t i = 0; i < c->n_pending; i++) {
        rd_kafka_resp_err_t own = e ? e : verdict(c, &c->pending[i], l);
        if (own)
            worst = own;
        else
            ledger_committed(c->ledger, c->pending[i].ref, c->pending[i].value);
    }
    c->committing = false;
    if (worst)
        commit_refused(c, worst);
    else
        metric_add(&c->w->metrics.commits, 1);
}

static void serve_commits(consumer *c, int timeout_ms)
{
    rd_kafka_queue_poll_callback(c->commit_queue, timeout_ms);
}

static void wait_for_commit(consumer *c)
{
    int64_t end = lm_now_us() + (int64_t)COMMIT_WAIT_MS * 1000;
    while (c->committing && lm_now_us() < end) {
        atomic_store(&c->w->consumer_beat_us, lm_now_us());
        serve_commits(c, 100);
    }
    if (c->committing)
        lm_log(LM_WARN, "consumer", "no answer to an offset commit for %d s",
               COMMIT_WAIT_MS / 1000);
}

/* Where the consumer stands in an idle partition: past trailing transaction markers. */
static void note_position(consumer *c, const struct assigned *a)
{
    struct ledger_info info;
    if (!ledger_get(c->ledger, a->ref, &info) || info.in_flight)
        return;
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(1);
    rd_kafka_topic_partition_list_add(l, a->lease->topic, a->partition);
    if (!rd_kafka_position(c->rk, l) && !l->elems[0].err)
        ledger_position(c->ledger, a->ref, l->elems[0].offset);
    rd_kafka_topic_partition_list_destroy(l);
}

/* Is the partition in `only` (NULL: every one is)? */
static bool selected(const rd_kafka_topic_partition_list_t *only, const struct assigned *a)
{
    return !only || rd_kafka_topic_partition_list_find(
        (rd_kafka_topic_partition_list_t *)(uintptr_t)only, a->lease->topic, a->partition);
}

static bool grow_pending(consumer *c)
{
    struct pending *p = lm_reallocarray(c->pending, LM_MAX(c->n_parts, 1), sizeof *p);
    if (p)
        c->pending = p;
    return p;
}

/* Starts a commit of what is new; nothing when one is under way. */
static void start_commit(consumer *c, const rd_kafka_topic_partition_list_t *only)
{
    if (c->committing || !grow_pending(c))
        return;
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new((int)c->n_parts);
    c->n_pending = 0;
    for (size_t i = 0; i < c->n_parts; i++) {
        const struct assigned *a = &c->parts[i];
        if (!selected(only, a))
            continue;
        note_position(c, a);
        int64_t value = ledger_commit_value(c->ledger, a->ref);
        if (value == LEDGER_NONE)
            continue;
        rd_kafka_topic_partition_list_add(l, a->lease->topic, a->partition)->offset = value;
        c->pending[c->n_pending++] = (struct pending){ a->ref, value };
    }
    if (c->n_pending) {
        rd_kafka_resp_err_t e = rd_kafka_commit_queue(c->rk, l, c->commit_queue, on_commit, c);
        c->committing = !e;
        if (e)
            commit_refused(c, e);
    }
    rd_kafka_topic_partition_list_destroy(l);
}

static void commit_now(consumer *c, const rd_kafka_topic_partition_list_t *only)
{
    wait_for_commit(c);
    if (c->committing)          /* the broker is silent; one such wait is enough */
        return;
    start_commit(c, only);
    wait_for_commit(c);
}

/* ---- draining --------------------------------------------------------------------------- */

struct census { size_t active; bool cancel; struct worker *w; };

static void count_active(void *ctx, int64_t offset, bool finished, void *user)
{
    (void)offset;
    struct census *n = ctx;
    struct job *j = user;
    if (finished)
        return;
    enum job_stage stage = atomic_load(&j->stage);
    n->active += stage == JOB_RUNNING || stage == JOB_ANSWERING;
    engine_handle h = atomic_load(&j->handle);
    if (n->cancel && stage == JOB_RUNNING && h)
        engine_cancel(n->w->engine, h);
}

/* Prompts of these partitions that the engine or the producer holds; optionally cancels them. */
static size_t active_jobs(consumer *c, const rd_kafka_topic_partition_list_t *only, bool cancel)
{
    struct census n = { .cancel = cancel, .w = c->w };
    for (size_t i = 0; i < c->n_parts; i++)
        if (selected(only, &c->parts[i]))
            ledger_each(c->ledger, c->parts[i].ref, count_active, &n);
    return n.active;
}

static void hand_back(consumer *c, const rd_kafka_topic_partition_list_t *only)
{
    size_t left = active_jobs(c, only, true);
    if (left)
        lm_log(LM_INFO, "consumer", "%zu unfinished prompts are handed back", left);
}

/* Lets running prompts finish for a while, then cancels the rest. */
static void drain(consumer *c, const rd_kafka_topic_partition_list_t *only, int64_t budget_ms)
{
    int64_t end = lm_now_us() + budget_ms * 1000;
    while (active_jobs(c, only, false) && lm_now_us() < end &&
           !atomic_load(&c->w->cancelling)) {
        atomic_store(&c->w->consumer_beat_us, lm_now_us());
        take_finished(c, DRAIN_POLL_MS);
    }
    hand_back(c, only);
}

/* ---- rebalance -------------------------------------------------------------------------- */

static bool set_paused(consumer *c, rd_kafka_topic_partition_list_t *l, bool pause)
{
    rd_kafka_resp_err_t e = pause ? rd_kafka_pause_partitions(c->rk, l)
                                  : rd_kafka_resume_partitions(c->rk, l);
    for (int i = 0; i < l->cnt; i++) {
        struct assigned *a = find_part(c, l->elems[i].topic, l->elems[i].partition);
        if (a && !l->elems[i].err)
            a->paused = pause;
    }
    return !e;
}

/* The group's offsets, or LEDGER_NONE where there is none or the broker doesn't answer in time. */
static void fetch_committed(consumer *c, rd_kafka_topic_partition_list_t *l)
{
    rd_kafka_resp_err_t e = rd_kafka_committed(c->rk, l, COMMITTED_TIMEOUT_MS);
    if (e)
        lm_log(LM_WARN, "consumer", "committed offsets: %s", rd_kafka_err2str(e));
    for (int i = 0; i < l->cnt; i++)
        if (e || l->elems[i].err || l->elems[i].offset < 0)
            l->elems[i].offset = LEDGER_NONE;
}

static void on_assign(consumer *c, rd_kafka_topic_partition_list_t *parts)
{
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_copy(parts);
    if (l->cnt)
        fetch_committed(c, l);
    for (int i = 0; i < l->cnt; i++) {
        const rd_kafka_topic_partition_t *p = &l->elems[i];
        if (add_part(c, p->topic, p->partition, p->offset))
            worker_fail(c->w, LM_NOMEM, "out of memory for partition %s [%d]", p->topic,
                        (int)p->partition);
        lm_log(LM_INFO, "consumer", "assigned %s [%d] at %" PRId64, p->topic, (int)p->partition,
               p->offset);
    }
    metric_add(&c->w->metrics.assigned, 1);
    rd_kafka_topic_partition_list_destroy(l);
}

static void on_revoke(consumer *c, const rd_kafka_topic_partition_list_t *parts, bool lost)
{
    int64_t start = lm_now_us();
    for (int i = 0; i < parts->cnt; i++) {
        struct assigned *a = find_part(c, parts->elems[i].topic, parts->elems[i].partition);
        if (a)
            atomic_store(&a->lease->revoked, true);
        lm_log(LM_INFO, "consumer", "%s %s [%d]", lost ? "lost" : "revoked",
               parts->elems[i].topic, (int)parts->elems[i].partition);
    }
    if (lost) {
        active_jobs(c, parts, true);
    } else if (parts->cnt) {
        if (!atomic_load(&c->w->cancelling))
            drain(c, parts, c->w->cfg->revoke_drain_ms);
        take_finished(c, 0);
        commit_now(c, parts);
        histogram_observe(&c->w->metrics.rebalance_drain, lm_now_us() - start);
    }
    for (int i = 0; i < parts->cnt; i++) {
        struct assigned *a = find_part(c, parts->elems[i].topic, parts->elems[i].partition);
        if (a)
            remove_part(c, a);
    }
    metric_add(lost ? &c->w->metrics.lost : &c->w->metrics.revoked, 1);
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

static void on_rebalance(rd_kafka_t *rk, rd_kafka_resp_err_t e,
                         rd_kafka_topic_partition_list_t *parts, void *opaque)
{
    consumer *c = opaque;
    bool cooperative = !strcmp(rd_kafka_rebalance_protocol(rk), "COOPERATIVE");
    switch (e) {
    case RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS:
        on_assign(c, parts);
        if (cooperative)
            check_rebalance(c, "assign", rd_kafka_incremental_assign(rk, parts), 0);
        else
            check_rebalance(c, "assign", NULL, rd_kafka_assign(rk, parts));
        set_paused(c, parts, c->paused);
        break;
    case RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS:
        on_revoke(c, parts, rd_kafka_assignment_lost(rk));
        if (cooperative)
            check_rebalance(c, "unassign", rd_kafka_incremental_unassign(rk, parts), 0);
        else
            check_rebalance(c, "unassign", NULL, rd_kafka_assign(rk, NULL));
        break;
    default:
        lm_log(LM_WARN, "consumer", "rebalance: %s", rd_kafka_err2str(e));
        rd_kafka_assign(rk, NULL);
    }
}

/* ---- admission -------------------------------------------------------------------------- */

static bool overloaded(const consumer *c, int64_t divisor)
{
    const struct config *cfg = c->w->cfg;
    return atomic_load(&c->w->metrics.backlog) >= LM_MAX(cfg->intake_max_messages / divisor, 1) ||
           c->held_bytes >= cfg->intake_max_bytes / divisor ||
           c->held >= LM_MAX(cfg->in_flight_max_messages / divisor, 1);
}

static void switch_all(consumer *c, bool pause)
{
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new((int)c->n_parts);
    for (size_t i = 0; i < c->n_parts; i++)
        if (c->parts[i].paused != pause)
            rd_kafka_topic_partition_list_add(l, c->parts[i].lease->topic,
                                              c->parts[i].partition);
    if (l->cnt)
        set_paused(c, l, pause);
    rd_kafka_topic_partition_list_destroy(l);
    c->paused = pause;
    atomic_store(&c->w->metrics.paused, pause);
    if (pause)
        metric_add(&c->w->metrics.pauses, 1);
}

static void settle(consumer *c)
{
    for (int waited = 0; waited < SETTLE_MS && overloaded(c, 1); waited += 2) {
        nanosleep(&(struct timespec){ .tv_nsec = 2000000 }, NULL);
        take_finished(c, 0);
    }
}

static void control_flow(consumer *c)
{
    bool stopping = atomic_load(&c->w->stopping);
    if (!c->paused && (stopping || overloaded(c, 1))) {
        if (!stopping)
            settle(c);
        if (stopping || overloaded(c, 1))
            switch_all(c, true);
    } else if (c->paused && !stopping && !overloaded(c, 2)) {
        switch_all(c, false);
    }
}

/* ---- records ---------------------------------------------------------------------------- */

enum { HEADERS_MAX = 1024 };

/* Borrows everything from the message. The array is the caller's to free. */
static lm_status borrow_record(const rd_kafka_message_t *m, struct record *r)
{
    rd_kafka_timestamp_type_t type;
    int64_t when = rd_kafka_message_timestamp(m, &type);
    *r = (struct record){
        .key = m->key, .key_len = m->key ? m->key_len : 0, .value = m->payload,
        .value_len = m->payload ? m->len : 0, .offset = m->offset,
        .timestamp_ms = type == RD_KAFKA_TIMESTAMP_NOT_AVAILABLE ? -1 : when,
        .log_append_time = type == RD_KAFKA_TIMESTAMP_LOG_APPEND_TIME,
    };
    rd_kafka_headers_t *h;
    if (rd_kafka_message_headers(m, &h))
        return LM_OK;
    size_t n = rd_kafka_header_cnt(h);
    if (n > HEADERS_MAX)
        lm_log(LM_WARN, "consumer", "%s [%d] @%" PRId64 ": %zu headers",
               rd_kafka_topic_name(m->rkt), (int)m->partition, m->offset, n);
    if (!(r->headers = lm_calloc(n, sizeof *r->headers)))
        return LM_NOMEM;
    for (size_t i = 0; i < n; i++) {
        struct header *out = &r->headers[i];
        if (rd_kafka_header_get_all(h, i, &out->name, &out->value, &out->len))
            break;
        r->n_headers++;
    }
    return LM_OK;
}

static lm_status make_job(struct assigned *a, const rd_kafka_message_t *m, struct job **out)
{
    struct record r;
    lm_status st = borrow_record(m, &r);
    if (!st)
        st = job_new(a->lease, &r, out);
    free(r.headers);
    return st;
}

/* The log went back: a new epoch, and so a new lease. Jobs of the old one go on, for their replies,
 * but commit nothing. */
static lm_status begin_epoch(consumer *c, struct assigned *a)
{
    lm_status st = ledger_rewind(c->ledger, &a->ref);
    struct lease *l = st ? NULL : lease_new(a->lease->topic, a->partition, a->ref);
    if (!l)
        return LM_NOMEM;
    lm_log(LM_WARN, "consumer", "%s [%d] went back; tracking starts anew", l->topic,
           (int)a->partition);
    lease_unref(a->lease);
    a->lease = l;
    return LM_OK;
}

static lm_status enter_ledger(consumer *c, struct assigned *a, const rd_kafka_message_t *m,
                              struct job **out)
{
    struct job *j = NULL;
    lm_status st = make_job(a, m, &j);
    if (!st)
        st = ledger_deliver(c->ledger, a->ref, m->offset, j);
    if (st)
        job_unref(j);
    else
        *out = j;
    return st;
}

static lm_status deliver(consumer *c, struct assigned *a, const rd_kafka_message_t *m)
{
    struct job *j = NULL;
    lm_status st = enter_ledger(c, a, m, &j);
    if (st == LM_STATE && !(st = begin_epoch(c, a)))
        st = enter_ledger(c, a, m, &j);
    if (st)
        return st;
    job_ref(j);                 /* one for the ledger, one for the road */
    j->worker = c->w;
    c->held++;
    c->held_bytes += (long long)j->bytes;
    metric_add(&c->w->metrics.consumed, 1);
    metric_add(&c->w->metrics.consumed_bytes, j->bytes);
    if (j->record.timestamp_ms >= 0)
        histogram_observe(&c->w->metrics.record_age,
                          (lm_wall_ms() - j->record.timestamp_ms) * 1000);
    atomic_fetch_add(&c->w->metrics.backlog, 1);
    job_queue_push(&c->w->to_intake, j);
    return LM_OK;
}

static void complain(consumer *c, const rd_kafka_message_t *m)
{
    int64_t now = lm_now_us();
    if (m->err == RD_KAFKA_RESP_ERR__AUTO_OFFSET_RESET) {
        worker_fail(c->w, LM_STATE, "no offset to start from: %s", rd_kafka_message_errstr(m));
    } else if (now - c->complained_us > COMPLAIN_EVERY_US || !c->complained_us) {
        c->complained_us = now;
        lm_log(LM_WARN, "consumer", "%s: %s", rd_kafka_err2name(m->err),
               rd_kafka_message_errstr(m));
    }
}

static void take_message(consumer *c, const rd_kafka_message_t *m)
{
    if (m->err) {
        complain(c, m);
        return;
    }
    struct assigned *a = find_part(c, rd_kafka_topic_name(m->rkt), m->partition);
    if (!a)
        lm_log(LM_WARN, "consumer", "record of %s [%d], which is not assigned",
               rd_kafka_topic_name(m->rkt), (int)m->partition);
    else if (deliver(c, a, m))
        /* Skipping it would lose it; the next run reads it again. */
        worker_fail(c->w, LM_NOMEM, "out of memory for a record of %zu bytes", m->len);
}

/* ---- loop ------------------------------------------------------------------------------- */

static void snapshot(consumer *c)
{
    struct metrics_partition *rows = lm_calloc(c->n_parts, sizeof *rows);
    if (!rows)
        return;
    for (size_t i = 0; i < c->n_parts; i++) {
        const struct assigned *a = &c->parts[i];
        struct ledger_info info;
        int64_t low, high;
        if (!ledger_get(c->ledger, a->ref, &info))
            continue;
        rows[i].partition = (int)a->partition;
        snprintf(rows[i].topic, sizeof rows[i].topic, "%s", a->lease->topic);
        rows[i].watermark = info.watermark;
        rows[i].committed = info.committed;
        rows[i].in_flight = info.in_flight;
        rows[i].lag = -1;
        int64_t at = LM_MAX(info.watermark, info.committed);
        if (!rd_kafka_get_watermark_offsets(c->rk, a->lease->topic, a->partition, &low, &high) &&
            high >= 0 && at >= 0)
            rows[i].lag = LM_MAX(high - at, 0);
    }
    metrics_set_partitions(&c->w->metrics, rows, c->n_parts);
}

static void housekeeping(consumer *c)
{
    int64_t now = lm_now_us();
    atomic_store(&c->w->consumer_beat_us, now);
    take_finished(c, 0);
    control_flow(c);
    serve_commits(c, 0);
    if (now >= c->next_commit_us) {
        c->next_commit_us = now + c->w->cfg->commit_interval_ms * 1000;
        start_commit(c, NULL);
    }
    if (now >= c->next_snapshot_us) {
        c->next_snapshot_us = now + SNAPSHOT_US;
        snapshot(c);
    }
}

static void poll_once(consumer *c, int timeout_ms)
{
    rd_kafka_message_t *m = rd_kafka_consumer_poll(c->rk, timeout_ms);
    if (m) {
        take_message(c, m);
        rd_kafka_message_destroy(m);
    }
}

/* Polls on while what runs finishes, so that the group keeps us. */
static void drain_all(consumer *c)
{
    int64_t end = lm_now_us() + c->w->cfg->drain_timeout_ms * 1000;
    switch_all(c, true);
    while (active_jobs(c, NULL, false) && lm_now_us() < end &&
           !atomic_load(&c->w->cancelling)) {
        housekeeping(c);
        poll_once(c, DRAIN_POLL_MS);
    }
    atomic_store(&c->w->cancelling, true);
    hand_back(c, NULL);
}

/* Leaves the group. rd_kafka_consumer_close() would wait for ever for a commit that a silent broker
 * doesn't answer, so the close is driven from here, within a budget. */
static void close_consumer(consumer *c)
{
    rd_kafka_queue_t *q = rd_kafka_queue_new(c->rk);
    rd_kafka_error_t *error = rd_kafka_consumer_close_queue(c->rk, q);
    int64_t end = lm_now_us() + (int64_t)CLOSE_WAIT_MS * 1000;
    if (error) {
        lm_log(LM_WARN, "consumer", "close: %s", rd_kafka_error_string(error));
        rd_kafka_error_destroy(error);
    }
    while (!error && !rd_kafka_consumer_closed(c->rk) && lm_now_us() < end) {
        rd_kafka_queue_poll_callback(q, DRAIN_POLL_MS);
        serve_commits(c, 0);
    }
    if (!rd_kafka_consumer_closed(c->rk))
        lm_log(LM_WARN, "consumer", "the brokers are silent: ending without leaving the group");
    rd_kafka_queue_destroy(q);
}

static void *consumer_main(void *arg)
{
    consumer *c = arg;
    while (!atomic_load(&c->w->stopping)) {
        housekeeping(c);
        poll_once(c, POLL_MS);
    }
    drain_all(c);
    take_finished(c, 0);
    commit_now(c, NULL);
    close_consumer(c);
    return NULL;
}

/* ---- life ------------------------------------------------------------------------------- */

static void on_error(rd_kafka_t *rk, int err, const char *reason, void *opaque)
{
    consumer *c = opaque;
    char text[512];
    if (err == RD_KAFKA_RESP_ERR__FATAL) {
        rd_kafka_fatal_error(rk, text, sizeof text);
        worker_fail(c->w, LM_STATE, "the consumer can't go on: %s", text);
    } else {
        lm_log(LM_WARN, "consumer", "%s: %s", rd_kafka_err2name((rd_kafka_resp_err_t)err), reason);
    }
}

static lm_status subscribe(consumer *c, struct lm_err *err)
{
    char *copy = lm_strdup(c->w->cfg->topics_prompts), *save = NULL;
    if (!copy)
        return lm_err_set(err, LM_NOMEM, "out of memory");
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(4);
    for (char *t = strtok_r(copy, ", ", &save); t; t = strtok_r(NULL, ", ", &save))
        rd_kafka_topic_partition_list_add(l, t, RD_KAFKA_PARTITION_UA);
    rd_kafka_resp_err_t e = rd_kafka_subscribe(c->rk, l);
    rd_kafka_topic_partition_list_destroy(l);
    free(copy);
    return e ? lm_err_set(err, LM_INVALID, "topics.prompts=%s: %s", c->w->cfg->topics_prompts,
                          rd_kafka_err2str(e)) : LM_OK;
}

lm_status consumer_new(struct worker *w, consumer **out, struct lm_err *err)
{
    rd_kafka_conf_t *conf;
    lm_status st = kafka_conf_new(w->cfg, CONFIG_CONSUMER, w->name, &conf, err);
    if (st)
        return st;
    consumer *c = lm_calloc(1, sizeof *c);
    if (!c || !(c->ledger = ledger_new(on_ledger_drop, NULL))) {
        rd_kafka_conf_destroy(conf);
        free(c);
        return lm_err_set(err, LM_NOMEM, "out of memory");
    }
    c->w = w;
    rd_kafka_conf_set_opaque(conf, c);
    rd_kafka_conf_set_rebalance_cb(conf, on_rebalance);
    rd_kafka_conf_set_error_cb(conf, on_error);
    st = kafka_open(RD_KAFKA_CONSUMER, conf, &c->rk, err);
    if (st) {
        ledger_free(c->ledger);
        free(c);
        return st;
    }
    rd_kafka_poll_set_consumer(c->rk);
    c->commit_queue = rd_kafka_queue_new(c->rk);
    *out = c;
    return LM_OK;
}

lm_status consumer_start(consumer *c, struct lm_err *err)
{
    lm_status st = subscribe(c, err);
    if (!st && pthread_create(&c->thread, NULL, consumer_main, c))
        st = lm_err_set(err, LM_NOMEM, "can't start the consumer thread");
    return st;
}

void consumer_join(consumer *c)
{
    pthread_join(c->thread, NULL);
}

void consumer_free(consumer *c)
{
    if (!c)
        return;
    while (c->n_parts)
        remove_part(c, &c->parts[0]);
    rd_kafka_queue_destroy(c->commit_queue);
    rd_kafka_destroy_flags(c->rk, RD_KAFKA_DESTROY_F_NO_CONSUMER_CLOSE);
    ledger_free(c->ledger);
    free(c->parts);
    free(c->pending);
    free(c);
}
