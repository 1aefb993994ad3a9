/* SPDX-License-Identifier: Apache-2.0 */
/*
 * consumer.c - the thread that owns the consumer handle and the ledger: reads, admits, commits, and
 * answers rebalances.
 *
 * A turn of the loop waits for nothing that takes as long as a generation, whatever the engine
 * does: 100 ms for records; before it pauses, for the load to fall by itself, 250 ms (40 for topics
 * that others precede, before those); and once per spell 250 ms for the answer to a commit with
 * marks, see admission.c. A rebalance takes longer, by its own budgets (rebalance.c). So
 * max.poll.interval.ms guards only against this thread's own stalls and may be small.
 *
 *   take finished jobs -> ledger    admit or pause    commit when due    poll, up to a burst
 *
 * Offsets are committed in commit.c; partitions come and go in rebalance.c; admission.c pauses.
 */
#include "worker/consumer_int.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "worker/kafka_conf.h"

enum {
    POLL_MS = 100,
    CLOSE_WAIT_MS = 6000,       /* librdkafka gives LeaveGroup 5 s */
    SNAPSHOT_US = 1000000,
    STAMP_EVERY = 16,           /* records of a burst: microseconds */
    HANDFUL = 16,               /* of jobs for one lock and one wake of intake */
    COMPLAIN_EVERY_US = 10 * 1000000,
};

/* ---- finished jobs ------------------------------------------------------------------------ */

static void hand_over(consumer *c)
{
    atomic_fetch_add(&c->w->metrics.backlog, (long long)c->ready.length);
    job_queue_push_all(&c->w->to_intake, &c->ready);
}

void consumer_to_intake(consumer *c, struct job *j)
{
    job_chain_add(&c->ready, j);
    if (!c->gathers || c->ready.length == HANDFUL)
        hand_over(c);
}

/* What has gathered does not wait for what the thread does next. */
void consumer_hand_over(consumer *c)
{
    c->gathers = false;
    hand_over(c);
}

/* Let go by one who gives up what is not ours any more, or ends. Of what is ours that would be an
 * offset that waits for ever, with all behind it: a fault of ours, which the next run mends. */
static void note_dropped(consumer *c, const struct job *j)
{
    metric_move(&c->w->metrics.dropped, 1);
    if (!atomic_load(&c->w->stopping) && !lease_revoked(j->lease) && consumer_tracks(c, j))
        worker_fail(c->w, LM_INTERNAL, "%s [%d] @%" PRId64 " was let go without an outcome",
                    j->lease->topic, (int)j->lease->partition, j->record.offset);
}

static void finish_job(consumer *c, struct job *j)
{
    void *held = NULL;
    struct job *next = c->order ? key_order_leave(c->order, j) : NULL;
    if (next && !isolation_keeps(c, next))
        consumer_to_intake(c, next);
    c->held--;
    c->held_bytes -= (long long)j->bytes;
    worker_discount(c->w, j);
    if (j->outcome == OUTCOME_DROPPED)
        note_dropped(c, j);
    else if (consumer_tracks(c, j) &&
             ledger_complete(c->ledger, j->lease->ref, j->record.offset, &held) == LM_OK)
        job_unref(held);
    job_unref(j);
}

lm_status consumer_admit(consumer *c, struct job *j)
{
    bool go = true;
    if (c->order && key_order_enter(c->order, j, &go))
        return LM_NOMEM;        /* ends the worker */
    if (go)
        consumer_to_intake(c, j);
    return LM_OK;
}

void consumer_take_finished(consumer *c, int timeout_ms)
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

struct assigned *consumer_find(consumer *c, const char *topic, int32_t partition)
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

struct assigned *consumer_find_ref(consumer *c, struct ledger_ref ref)
{
    for (size_t i = 0; i < c->n_parts; i++)
        if (ledger_same(c->parts[i].ref, ref))
            return &c->parts[i];
    return NULL;
}

bool consumer_tracks(const consumer *c, const struct job *j)
{
    return ledger_user(c->ledger, j->lease->ref, j->record.offset) == j;
}

bool consumer_selected(const rd_kafka_topic_partition_list_t *only, const struct assigned *a)
{
    return !only || rd_kafka_topic_partition_list_find(
        (rd_kafka_topic_partition_list_t *)(uintptr_t)only, a->lease->topic, a->partition);
}

/* ---- records ---------------------------------------------------------------------------- */

enum { HEADERS_MANY = 1024 };

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

static lm_status make_job(consumer *c, struct assigned *a, const rd_kafka_message_t *m,
                          struct job **out)
{
    struct record r;
    lm_status st = borrow_record(m, &r);
    if (r.n_headers > HEADERS_MANY)
        log_seldom(&c->many_headers, "consumer", "%s [%d] @%" PRId64 " has %d headers",
                   a->lease->topic, (int)a->partition, m->offset, r.n_headers);
    if (!st)
        st = job_new(a->lease, &r, out);
    free(r.headers);
    return st;
}

/* The log went back to before all that is unfinished: a new epoch, and so a new lease. Jobs of the
 * old one go on, for their replies, but commit nothing. */
static lm_status begin_epoch(consumer *c, struct assigned *a)
{
    isolation_drop(c, a);
    lm_status st = ledger_rewind(c->ledger, &a->ref);
    struct lease *l = st ? NULL : lease_new(a->lease->topic, a->partition, a->ref);
    if (!l)
        return LM_NOMEM;
    l->priority = a->lease->priority;
    lm_log(LM_WARN, "consumer", "%s [%d] went back; tracking starts anew", l->topic,
           (int)a->partition);
    lease_unref(a->lease);
    a->lease = l;
    return LM_OK;
}

/* A log that lost its end (unclean leader election): the client reads on where it was cut off
 * (KIP-320). What is unfinished before that does not come again, so no commit may pass it; jobs of
 * what lay behind go on, for their replies, but commit nothing. */
static lm_status go_back(consumer *c, struct assigned *a, int64_t offset)
{
    struct ledger_info info;
    if (!ledger_get(c->ledger, a->ref, &info) || !info.in_flight || info.watermark >= offset)
        return begin_epoch(c, a);
    lm_log(LM_WARN, "consumer", "%s [%d] went back to %" PRId64 "; what is unfinished from %" PRId64
           " on goes on", a->lease->topic, (int)a->partition, offset, info.watermark);
    isolation_cut(c, a, offset);
    c->next_commit_us = 0;      /* the map tells of what was cut off */
    return ledger_cut(c->ledger, a->ref, offset);
}

static lm_status enter_ledger(consumer *c, struct assigned *a, const rd_kafka_message_t *m,
                              struct job **out)
{
    struct job *j = NULL;
    lm_status st = make_job(c, a, m, &j);
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
    if (ledger_skip(c->ledger, a->ref, m->offset)) {
        metric_move(&c->w->metrics.skipped, 1);
        return LM_OK;
    }
    lm_status st = enter_ledger(c, a, m, &j);
    if (st == LM_STATE && !(st = go_back(c, a, m->offset)))
        st = enter_ledger(c, a, m, &j);
    if (st)
        return st;
    job_ref(j);                 /* one for the ledger, one for the road */
    j->worker = c->w;
    j->received_us = c->now_us;
    c->held++;
    c->held_bytes += (long long)j->bytes;
    worker_count_tokens(c->w, j, job_tokens_guess(j));
    metric_move(&c->w->metrics.consumed, 1);
    metric_move(&c->w->metrics.consumed_bytes, job_record_bytes(j));
    if (!a->crowded && ledger_crowded(c->ledger, a->ref, false))
        a->crowded = c->braked = true;
    if (j->record.timestamp_ms >= 0)
        histogram_observe(&c->w->metrics.record_age, record_age_us(&j->record, c->wall_ms));
    return isolation_hold(c, a, j) ? LM_OK : consumer_admit(c, j);
}

/* Fenced by another group.instance.id of ours, mostly. The one cause that is the configuration's is
 * told with its remedy. */
static void give_up(consumer *c, const char *reason)
{
    char why[512];
    rd_kafka_resp_err_t e = rd_kafka_fatal_error(c->rk, why, sizeof why);
    bool old_brokers = c->new_protocol && (!e || e == RD_KAFKA_RESP_ERR_UNSUPPORTED_VERSION ||
                                           e == RD_KAFKA_RESP_ERR__UNSUPPORTED_FEATURE);
    worker_fail(c->w, LM_STATE, "the consumer can't go on: %s%s", e ? why : reason, old_brokers ?
                "; kafka.group.protocol=consumer needs brokers of Kafka 4.0 or newer" : "");
}

static void complain(consumer *c, const rd_kafka_message_t *m)
{
    int64_t now = lm_now_us();
    if (m->err == RD_KAFKA_RESP_ERR__FATAL) {
        give_up(c, rd_kafka_message_errstr(m));
    } else if (m->err == RD_KAFKA_RESP_ERR__AUTO_OFFSET_RESET) {
        worker_fail(c->w, LM_STATE, "no offset to start from: %s", rd_kafka_message_errstr(m));
    } else if (now - c->complained_us > COMPLAIN_EVERY_US || !c->complained_us) {
        c->complained_us = now;
        lm_log(LM_WARN, "consumer", "%s: %s", rd_kafka_err2name(m->err),
               rd_kafka_message_errstr(m));
    }
}

/* Its next run reads it again; so until this one has ended, nothing may be read behind it, nor the
 * position be taken for the watermark: the commit would pass it. */
static void out_of_memory(consumer *c, struct assigned *a, const rd_kafka_message_t *m)
{
    atomic_store(&a->lease->revoked, true);
    worker_fail(c->w, LM_NOMEM, "out of memory for a record of %zu bytes", m->len);
}

static void take_message(consumer *c, const rd_kafka_message_t *m)
{
    if (m->err) {
        complain(c, m);
        return;
    }
    struct assigned *a = consumer_find(c, rd_kafka_topic_name(m->rkt), m->partition);
    if (!a)
        log_seldom(&c->not_assigned, "consumer", "record of %s [%d], which is not assigned",
                   rd_kafka_topic_name(m->rkt), (int)m->partition);
    else if (!lease_revoked(a->lease) && deliver(c, a, m))      /* else its next owner reads it */
        out_of_memory(c, a, m);
}

/* ---- loop ------------------------------------------------------------------------------- */

static void snapshot(consumer *c)
{
    struct metrics_partition *rows = lm_calloc(c->n_parts, sizeof *rows);
    if (!rows)
        return;
    for (size_t i = 0; i < c->n_parts; i++) {
        struct assigned *a = &c->parts[i];
        struct ledger_info info;
        int64_t low, high;
        if (!ledger_get(c->ledger, a->ref, &info))
            continue;
        rows[i].partition = (int)a->partition;
        snprintf(rows[i].topic, sizeof rows[i].topic, "%s", a->lease->topic);
        rows[i].watermark = info.watermark;
        rows[i].committed = info.committed;
        rows[i].in_flight = info.in_flight;
        rows[i].map_bytes = info.map_bytes;
        rows[i].blocked_us = blocking_look(c, a, &info, lm_now_us());
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
    consumer_take_finished(c, 0);
    staging_serve(c);
    rebalance_serve(c);
    admission_control(c);
    commit_serve(c, 0);
    isolation_serve(c);
    commit_tick(c);
    if (c->new_protocol && group_protocol_missing(&c->protocol, now))
        give_up(c, "the group's coordinator has no ConsumerGroupHeartbeat");
    if (now >= c->next_snapshot_us) {
        c->next_snapshot_us = now + SNAPSHOT_US;
        snapshot(c);
    }
}

/* `first`: of what came together, which is stamped with one time. */
static bool poll_once(consumer *c, int timeout_ms, bool first)
{
    rd_kafka_message_t *m = rd_kafka_consumer_poll(c->rk, timeout_ms);
    if (!m)
        return false;
    if (first || !c->now_us) {
        c->now_us = lm_now_us();
        c->wall_ms = lm_wall_ms();
    }
    take_message(c, m);
    rd_kafka_message_destroy(m);
    return true;
}

/* What is there already comes in one go, until something else is due. */
static void poll_burst(consumer *c, int timeout_ms)
{
    const struct admission_limits limits = admission_limits(c);
    bool due = false;
    c->gathers = true;
    for (int n = 0; n < LEDGER_BURST && !due; n++) {
        if (!poll_once(c, n ? 0 : timeout_ms, n % STAMP_EVERY == 0))
            break;
        due = c->iso.busy || c->iso.wanted || admission_due(c, &limits);
    }
    consumer_hand_over(c);
}

/* Polls on while what runs finishes, so that the group keeps us. */
static void drain_all(consumer *c)
{
    isolation_before_leaving(c);
    admission_apply(c);
    while (rebalance_active(c, NULL, false) && lm_now_us() < atomic_load(&c->w->drain_end_us) &&
           !atomic_load(&c->w->cancelling)) {
        housekeeping(c);
        poll_once(c, DRAIN_POLL_MS, true);
    }
    isolation_leave(c, NULL);   /* a last transaction, perhaps */
    worker_cancel(c->w);
    rebalance_hand_back(c, NULL);
    rebalance_serve(c);
    staging_close(c);
}

/* Leaves the group. rd_kafka_consumer_close() would wait for ever for a commit that a silent broker
 * doesn't answer, so the close is driven from here, within a budget. A partition that came a moment
 * ago may still bring messages: rd_kafka_queue_poll_callback() would abort the process on one. */
static void close_consumer(consumer *c)
{
    rd_kafka_queue_t *q = rd_kafka_queue_new(c->rk);
    c->closing = true;
    rd_kafka_error_t *error = rd_kafka_consumer_close_queue(c->rk, q);
    int64_t end = lm_now_us() + (int64_t)CLOSE_WAIT_MS * 1000;
    if (error)
        lm_log(LM_WARN, "consumer", "close: %s", rd_kafka_error_string(error));
    while (!error && !rd_kafka_consumer_closed(c->rk) && lm_now_us() < end) {
        rd_kafka_message_t *m = rd_kafka_consume_queue(q, DRAIN_POLL_MS);
        if (m)
            rd_kafka_message_destroy(m);
        commit_serve(c, 0);
    }
    if (!error && !rd_kafka_consumer_closed(c->rk))
        lm_log(LM_WARN, "consumer", "the brokers are silent: ending without leaving the group");
    if (error)
        rd_kafka_error_destroy(error);
    rd_kafka_queue_destroy(q);
}

/* Whose turn it is, of suspects or of a key's prompts, waits no longer than this for the thread,
 * nor does a commit that goes again. */
int consumer_poll_ms(const consumer *c)
{
    bool soon = c->iso.busy || c->again_ms || (c->order && key_order_waiting(c->order));
    return soon ? DRAIN_POLL_MS : POLL_MS;
}

static void *consumer_main(void *arg)
{
    consumer *c = arg;
    while (!atomic_load(&c->w->stopping)) {
        housekeeping(c);
        poll_burst(c, consumer_poll_ms(c));
    }
    drain_all(c);
    consumer_take_finished(c, 0);
    commit_now(c);
    close_consumer(c);
    return NULL;
}

/* ---- life ------------------------------------------------------------------------------- */

static void on_error(rd_kafka_t *rk, int err, const char *reason, void *opaque)
{
    consumer *c = opaque;
    (void)rk;
    credentials_error(c->w->credentials, err);
    if (err == RD_KAFKA_RESP_ERR__FATAL)
        give_up(c, reason);
    else
        kafka_log_error(&c->said, "consumer", err, reason);
}

static int on_stats(rd_kafka_t *rk, char *json, size_t len, void *opaque)
{
    (void)rk;
    consumer *c = opaque;
    client_stats_take(&c->w->consumer_stats, json, len);
    return 0;                   /* the library's to free */
}

/* Of the client's thread: an answer to a commit is there, and ends the wait for records. */
static void on_commit_answer(rd_kafka_t *rk, void *opaque)
{
    (void)rk;
    rd_kafka_queue_yield(((consumer *)opaque)->queue);
}

static lm_status subscribe(consumer *c, struct lm_err *err)
{
    char *copy = lm_strdup(c->w->cfg->topics_prompts), *rest = copy;
    if (!copy)
        return lm_err_set(err, LM_NOMEM, "out of memory");
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(4);
    for (char *t; (t = config_next_topic(&rest));)
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
    size_t map_limit = kafka_has_offset_map() ? (size_t)w->cfg->commit_map_max_bytes : 0;
    bool ordered = !strcmp(w->cfg->delivery_order, "key");
    key_order *order = ordered ? key_order_new() : NULL;
    if (!c || (ordered && !order) ||
        !(c->ledger = ledger_new(on_ledger_drop, NULL, 0))) {
        rd_kafka_conf_destroy(conf);
        key_order_free(order);
        free(c);
        return lm_err_set(err, LM_NOMEM, "out of memory");
    }
    c->w = w;
    c->map_limit = map_limit;
    isolation_init(c, map_limit);
    ledger_set_map_limit(c->ledger, isolation_map_room(c, map_limit));
    rd_kafka_conf_set_opaque(conf, c);
    rd_kafka_conf_set_rebalance_cb(conf, rebalance_cb);
    rd_kafka_conf_set_error_cb(conf, on_error);
    rd_kafka_conf_set_stats_cb(conf, on_stats);
    if ((c->new_protocol = kafka_new_protocol(w->cfg)))
        group_protocol_watch(conf, &c->protocol);
    st = kafka_open(RD_KAFKA_CONSUMER, conf, &c->rk, err);
    if (st) {
        ledger_free(c->ledger);
        key_order_free(order);
        free(c);
        return st;
    }
    credentials_attach(w->credentials, c->rk, CONFIG_CONSUMER);
    rd_kafka_poll_set_consumer(c->rk);
    c->queue = rd_kafka_queue_get_consumer(c->rk);
    c->commit_queue = rd_kafka_queue_new(c->rk);
    rd_kafka_queue_cb_event_enable(c->commit_queue, on_commit_answer, c);
    c->exactly_once = config_exactly_once(w->cfg);
    c->order = order;
    staging_init(&c->staging);
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

void consumer_count_rest(consumer *c)
{
    if (c)
        consumer_take_finished(c, 0);
}

void consumer_free(consumer *c)
{
    if (!c)
        return;
    while (c->n_parts)
        rebalance_remove(c, &c->parts[0]);
    credentials_detach(c->w->credentials, c->rk);
    rd_kafka_queue_cb_event_enable(c->commit_queue, NULL, NULL);
    rd_kafka_queue_destroy(c->queue);
    rd_kafka_queue_destroy(c->commit_queue);
    staging_release(&c->staging);
    rd_kafka_destroy_flags(c->rk, RD_KAFKA_DESTROY_F_NO_CONSUMER_CLOSE);
    key_order_free(c->order);
    ledger_free(c->ledger);
    job_unref(c->iso.job);
    free(c->parts);
    free(c->pending);
    free(c);
}
