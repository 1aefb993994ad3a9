/* SPDX-License-Identifier: Apache-2.0 */
/*
 * producer.c - replies and dead letters to the broker, until they are acknowledged.
 *
 * A successful rd_kafka_producev() only means "queued": whether a job is finished its delivery
 * reports say, which delivery.c judges. A record that is not acknowledged is sent again with
 * backoff, as long as it takes.
 *
 * A repeat after a timeout may be a duplicate in the topic. Replies carry loramill-request-id and
 * their body's id, which are the same each time.
 *
 * When brokers refuse batches, a new client makes smaller ones (batch_size.h).
 *
 * In exactly-once mode transaction.c drives the sending. A job is finished when its transaction has
 * committed; what was refused goes to delivery.c when the transaction has ended without it.
 *
 * At-least-once: a client that keeps to a leader which a partition has no more (leaders.h) is
 * replaced, see renew().
 *
 * At-least-once: while records are on their way to a topic, the next ones to it are held back for a
 * moment and leave together, see hold.h.
 *
 * Threads: producer_send() may be called from any thread. At-least-once that thread itself hands
 * the record to the client library, under `swap`, for the client may be replaced meanwhile; or it
 * is held back. Exactly-once it only queues. Either way it waits for no broker. Delivery reports,
 * retries and everything else happen on the producer thread. The value is not copied by the
 * library: it belongs to the job, which nobody frees before its report.
 */
#include "worker/producer_int.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "worker/dead_letter.h"
#include "worker/delivery.h"
#include "worker/kafka_conf.h"
#include "worker/transaction.h"

enum {
    POLL_MS = 100,
    STOP_WAIT_MS = 2000,
    STOP_SPARE_MS = 500,
    SEND_AT_ONCE = 64,          /* while other threads that have something to send wait */
    RENEW_DRAIN_MS = 2000,
    RENEW_PURGE_MS = 5000,
};

/* ---- sending ---------------------------------------------------------------------------- */

static rd_kafka_headers_t *to_kafka_headers(const struct header_list *l)
{
    rd_kafka_headers_t *h = rd_kafka_headers_new((size_t)l->n);
    for (int i = 0; i < l->n; i++)
        rd_kafka_header_add(h, l->items[i].name, -1, l->items[i].value,
                            (ssize_t)l->items[i].len);
    return h;
}

/* A bare dead letter has room for a reasonable key only. */
static bool sends_key(const struct job *j, const struct outgoing *o)
{
    return o->trim < DEAD_LETTER_BARE || j->record.key_len <= DEAD_LETTER_KEY_MAX;
}

size_t producer_record_bytes(const struct job *j, const struct outgoing *o)
{
    size_t n = o->len + (sends_key(j, o) ? j->record.key_len : 0);
    for (int i = 0; i < o->headers.n; i++)
        n += strlen(o->headers.items[i].name) + o->headers.items[i].len;
    return n;
}

/* Most records go to topics.replies: by its handle, which needs no search, once it is known. */
static rd_kafka_resp_err_t produce(producer *p, struct job *j, struct outgoing *o,
                                   rd_kafka_headers_t *h)
{
    const bool key = sends_key(j, o), usual = o->topic == p->w->cfg->topics_replies;
#define RECORD \
    RD_KAFKA_V_PARTITION(o->partition < 0 ? RD_KAFKA_PARTITION_UA : o->partition), \
    RD_KAFKA_V_KEY(key ? j->record.key : NULL, key ? j->record.key_len : 0), \
    RD_KAFKA_V_VALUE(o->value, o->len), RD_KAFKA_V_HEADERS(h), RD_KAFKA_V_OPAQUE(o), RD_KAFKA_V_END
    if (usual && p->replies)
        return rd_kafka_producev(p->rk, RD_KAFKA_V_RKT(p->replies), RECORD);
    rd_kafka_resp_err_t e = rd_kafka_producev(p->rk, RD_KAFKA_V_TOPIC(o->topic), RECORD);
#undef RECORD
    if (!e && usual)
        p->replies = rd_kafka_topic_new(p->rk, o->topic, NULL);
    return e;
}

static void on_its_way(producer *p, struct outgoing *o, int64_t now_us)
{
    if (p->exactly_once)
        p->under_way++;
    else
        hold_sent(&p->hold, o, now_us);
}

static void has_arrived(producer *p, struct outgoing *o)
{
    if (p->exactly_once)
        p->under_way--;
    else
        hold_reported(&p->hold, o);
}

/* On success the record is the library's until its delivery report; else it counts no more as
 * unreported. */
static void send_record(producer *p, struct job *j, struct outgoing *o, int64_t now_us)
{
    rd_kafka_headers_t *h = to_kafka_headers(&o->headers);
    o->job = j;
    o->error = 0;
    on_its_way(p, o, now_us);
    rd_kafka_resp_err_t e = produce(p, j, o, h);
    if (e) {
        rd_kafka_headers_destroy(h);
        o->error = e;
        atomic_fetch_sub(&j->unreported, 1);
        has_arrived(p, o);
    }
}

bool producer_send_records(producer *p, struct job *j, int64_t now_us)
{
    bool out = !j->out.acked, notice = j->notice && !j->notice->acked;
    /* One is ours: reports may come while we are still here. */
    atomic_store_explicit(&j->unreported, 1 + out + notice, memory_order_relaxed);
    if (out)
        send_record(p, j, &j->out, now_us);
    if (notice && out && p->exactly_once && j->out.error)
        atomic_fetch_sub(&j->unreported, 1);
    else if (notice)
        send_record(p, j, j->notice, now_us);
    return atomic_fetch_sub(&j->unreported, 1) == 1;
}

/* At-least-once: the same, from any thread. */
static bool send_now(producer *p, struct job *j, int64_t now_us)
{
    pthread_mutex_lock(&p->swap);
    bool judge = producer_send_records(p, j, now_us);
    pthread_mutex_unlock(&p->swap);
    return judge;
}

/* At-least-once, from any thread: the producer thread is to come out of its poll. */
static void wake_thread(producer *p)
{
    pthread_mutex_lock(&p->swap);
    rd_kafka_queue_yield(p->queue);
    pthread_mutex_unlock(&p->swap);
}

/* At-least-once, from any thread. True: it is to be judged. */
static bool send_or_hold(producer *p, struct job *j)
{
    bool wake;
    int64_t now = j->out.handed_us;
    if (!hold_back(&p->hold, j, now, &wake))
        return send_now(p, j, now);
    if (wake)
        wake_thread(p);
    return false;
}

void producer_send(producer *p, struct job *j)
{
    j->out.handed_us = lm_now_us();
    if (p->exactly_once || send_or_hold(p, j))
        job_queue_push(&p->inbox, j);   /* sent, or judged, on its thread */
}

void producer_want_offsets(producer *p)
{
    if (!atomic_exchange(&p->want_offsets, true))
        job_queue_wake(&p->inbox);
}

/* ---- reports ----------------------------------------------------------------------------- */

static void on_delivery(rd_kafka_t *rk, const rd_kafka_message_t *m, void *opaque)
{
    (void)rk;
    producer *p = opaque;
    struct outgoing *o = m->_private;
    struct job *j = o->job;
    o->error = m->err;
    o->acked = !m->err;
    p->failed |= m->err != 0;
    has_arrived(p, o);
    if (o->acked && j->parent)
        o->partition = m->partition;
    if (atomic_fetch_sub(&j->unreported, 1) == 1 && !p->exactly_once)
        delivery_judge(p, j);
}

static void on_error(rd_kafka_t *rk, int err, const char *reason, void *opaque)
{
    producer *p = opaque;
    char text[512];
    if (rk != p->rk)
        return;                 /* it is being replaced */
    credentials_error(p->w->credentials, err);
    if (err == RD_KAFKA_RESP_ERR__FATAL && p->exactly_once) {
        lm_log(LM_WARN, "producer", "%s", reason);      /* transaction_client.c decides */
    } else if (err == RD_KAFKA_RESP_ERR__FATAL) {
        rd_kafka_fatal_error(rk, text, sizeof text);
        worker_fail(p->w, LM_STATE, "the producer can't go on: %s", text);
    } else {
        kafka_log_error(&p->said, "producer", err, reason);
    }
}

static int on_stats(rd_kafka_t *rk, char *json, size_t len, void *opaque)
{
    producer *p = opaque;
    json_t *root = json_loadb(json, len, 0, NULL);
    if (rk == p->rk) {
        client_stats_read(&p->w->producer_stats, root);
        if (!p->exactly_once)
            p->n_stuck = leaders_stuck(&p->leaders, root, p->stuck, LEADERS_STUCK_MOST);
    }
    json_decref(root);
    return 0;                   /* the library's to free */
}

bool producer_resize(producer *p)
{
    return batch_size_pending(&p->batch) &&
           batch_size_change(&p->batch, !rd_kafka_outq_len(p->rk), lm_now_us());
}

/* ---- clients ---------------------------------------------------------------------------- */

static lm_status open_client(producer *p, rd_kafka_t **out, struct lm_err *err)
{
    rd_kafka_conf_t *conf;
    lm_status st = kafka_conf_new(p->w->cfg, CONFIG_PRODUCER, p->w->name, &conf, err);
    if (st)
        return st;
    p->batch.full = kafka_conf_int(conf, "batch.size");
    char most[24];
    snprintf(most, sizeof most, "%" PRId64, p->batch.most);
    if (p->batch.most)
        rd_kafka_conf_set(conf, "batch.size", most, NULL, 0);
    if (p->other_id && (st = kafka_conf_other_id(conf, p->other_id, err))) {
        rd_kafka_conf_destroy(conf);
        return st;
    }
    int64_t batch_bytes = kafka_conf_int(conf, "batch.size");
    p->transaction_timeout_ms = kafka_conf_int(conf, "transaction.timeout.ms");
    rd_kafka_conf_set_opaque(conf, p);
    rd_kafka_conf_set_dr_msg_cb(conf, on_delivery);
    rd_kafka_conf_set_error_cb(conf, on_error);
    rd_kafka_conf_set_stats_cb(conf, on_stats);
    if (p->exactly_once)
        unanswered_watch(&p->unanswered, conf);
    if ((st = kafka_open(RD_KAFKA_PRODUCER, conf, out, err)))
        return st;
    p->batch.bytes = batch_bytes;       /* else what the client of before has */
    credentials_attach(p->w->credentials, *out, CONFIG_PRODUCER);
    return LM_OK;
}

static void close_client(producer *p, rd_kafka_t *rk, rd_kafka_queue_t *queue,
                         rd_kafka_topic_t *replies)
{
    credentials_detach(p->w->credentials, rk);
    rd_kafka_queue_destroy(queue);
    if (replies)
        rd_kafka_topic_destroy(replies);
    atomic_store(&p->w->closing_producer_us, lm_now_us());      /* the watchdog's to see */
    rd_kafka_destroy(rk);
    atomic_store(&p->w->closing_producer_us, 0);
}

lm_status producer_open(producer *p, struct lm_err *err)
{
    lm_status st = open_client(p, &p->rk, err);
    if (!st)
        p->queue = rd_kafka_queue_get_main(p->rk);
    return st;
}

void producer_close(producer *p)
{
    if (p->rk)
        close_client(p, p->rk, p->queue, p->replies);
    p->rk = NULL;
    p->queue = NULL;
    p->replies = NULL;
}

/* ---- thread ----------------------------------------------------------------------------- */

static void judge_inbox(producer *p)
{
    for (struct job *j = job_queue_take(&p->inbox, 0), *next; j; j = next) {
        next = j->next;
        delivery_judge(p, j);
    }
    delivery_give(p);
}

/* Delivery reports, and whatever else the library has for us. */
static void poll_client(producer *p, rd_kafka_t *rk, int timeout_ms)
{
    rd_kafka_poll(rk, timeout_ms);
    delivery_give(p);
}

static void serve_again(producer *p)
{
    judge_inbox(p);
    int64_t now = lm_now_us();
    for (struct job *j = job_list_take_due(&p->later, now), *next; j; j = next) {
        next = j->next;
        if (send_now(p, j, now))
            delivery_judge(p, j);
    }
    delivery_give(p);
}

/* The first of them under one lock. Returns the rest; who has no report to wait for is judged. */
static struct job *send_some(producer *p, struct job *j, int64_t now_us)
{
    struct job_chain judge = { 0 };
    pthread_mutex_lock(&p->swap);
    for (int i = 0; j && i < SEND_AT_ONCE; i++) {
        struct job *this = j;
        j = j->next;
        if (producer_send_records(p, this, now_us))
            job_chain_add(&judge, this);
    }
    pthread_mutex_unlock(&p->swap);
    for (struct job *failed = judge.head, *next; failed; failed = next) {
        next = failed->next;
        delivery_judge(p, failed);
    }
    if (judge.head)
        delivery_give(p);
    return j;
}

static void serve_held(producer *p)
{
    int64_t now = lm_now_us();
    for (struct job *j = hold_take(&p->hold, now, false); j;)
        j = send_some(p, j, now);
}

/* ---- a new client (at-least-once) ------------------------------------------------------- */

/* Reports of the old one, until it has none to give: what the brokers take they may take yet, the
 * rest is taken back. While it drains the new one is served as ever. */
static bool drain_old(producer *p, rd_kafka_t *old)
{
    int64_t end = lm_now_us() + RENEW_DRAIN_MS * 1000;
    while (rd_kafka_outq_len(old) > 0 && lm_now_us() < end && !atomic_load(&p->end)) {
        poll_client(p, old, 10);
        poll_client(p, p->rk, 0);
        serve_again(p);
        serve_held(p);
    }
    rd_kafka_purge(old, RD_KAFKA_PURGE_F_QUEUE | RD_KAFKA_PURGE_F_INFLIGHT);
    end = lm_now_us() + RENEW_PURGE_MS * 1000;
    bool whole;                 /* once is enough: what comes then are errors and statistics */
    do
        poll_client(p, old, 10);
    while (!(whole = rd_kafka_outq_len(old) == 0) && lm_now_us() < end);
    return whole;
}

/* Other threads send with the new client from here on. What the old one had not delivered is sent
 * again when it is gone, and no sooner: until then it may read the records. Some of that may be in
 * the topic already, under the same id. */
static void renew(producer *p)
{
    struct lm_err err;
    rd_kafka_t *old = p->rk, *fresh;
    if (open_client(p, &fresh, &err)) {
        lm_log(LM_WARN, "producer", "no new producer: %s", err.msg);
        return;
    }
    metric_add(&p->w->metrics.producer_rebuilds, 1);
    pthread_mutex_lock(&p->swap);
    rd_kafka_topic_t *replies = p->replies;
    rd_kafka_queue_t *queue = p->queue;
    p->rk = fresh;
    p->queue = rd_kafka_queue_get_main(fresh);
    p->replies = NULL;
    pthread_mutex_unlock(&p->swap);
    leaders_release(&p->leaders);
    p->renewing = true;
    bool whole = drain_old(p, old);
    close_client(p, old, queue, replies);
    p->renewing = false;
    if (!whole)
        worker_fail(p->w, LM_STATE, "the old producer does not give its records back");
    for (struct job *j = job_list_take_all(&p->taken_back), *next; j; j = next) {
        next = j->next;
        job_list_add(&p->later, j, 0);
    }
}

/* However often statistics come, the brokers are asked, or the client replaced, once in 10 s. */
static void look_at_leaders(producer *p)
{
    size_t n = p->n_stuck, i;
    int64_t now = lm_now_us();
    p->n_stuck = 0;
    if (!n || (p->looked_us && now - p->looked_us < LEADERS_STUCK_US))
        return;
    p->looked_us = now;
    if ((i = leaders_moved(p->rk, p->stuck, n)) == n)
        return;
    lm_log(LM_WARN, "producer", "%s [%d]: records wait for broker %d, which does not lead it any "
           "more; a new producer asks anew", p->stuck[i].topic, (int)p->stuck[i].partition,
           (int)p->stuck[i].leader);
    renew(p);
}

static void *producer_main(void *arg)
{
    producer *p = arg;
    while (!atomic_load(&p->end)) {
        int64_t now = lm_now_us();
        poll_client(p, p->rk, hold_wait_ms(&p->hold, now,
                                           job_list_wait_ms(&p->later, now, POLL_MS)));
        serve_again(p);
        if (producer_resize(p))         /* before what was held back leaves */
            renew(p);
        serve_held(p);
        look_at_leaders(p);
    }
    /* Everything that is not acknowledged by now is dropped; its offsets stay uncommitted. */
    rd_kafka_purge(p->rk, RD_KAFKA_PURGE_F_QUEUE | RD_KAFKA_PURGE_F_INFLIGHT);
    rd_kafka_flush(p->rk, STOP_WAIT_MS);
    judge_inbox(p);
    worker_drop_all(p->w, job_list_take_all(&p->later));
    worker_drop_all(p->w, hold_take(&p->hold, 0, true));
    atomic_store(&p->over, true);
    return NULL;
}

/* ---- life ------------------------------------------------------------------------------- */

lm_status producer_new(struct worker *w, producer **out, struct lm_err *err)
{
    producer *p = lm_calloc(1, sizeof *p);
    if (!p)
        return lm_err_set(err, LM_NOMEM, "out of memory");
    p->w = w;
    p->exactly_once = config_exactly_once(w->cfg);
    job_queue_init(&p->inbox);
    pthread_mutex_init(&p->swap, NULL);
    hold_init(&p->hold, w->cfg->topics_replies);
    lm_status st = producer_open(p, err);
    p->started = !st && !pthread_create(&p->thread, NULL, p->exactly_once ? transaction_main :
                                        producer_main, p);
    if (!st && !p->started)
        st = lm_err_set(err, LM_NOMEM, "can't start the producer thread");
    if (st) {
        producer_free(p);
        return st;
    }
    *out = p;
    return LM_OK;
}

bool producer_stop(producer *p)
{
    if (!p || !p->started)
        return true;
    const struct timespec tick = { 0, 5 * 1000000 };
    int64_t end = LM_MAX(lm_now_us() + (int64_t)(STOP_WAIT_MS + STOP_SPARE_MS) * 1000,
                         atomic_load(&p->w->drain_end_us) + (TRANSACTION_LAST_MS + STOP_SPARE_MS) *
                         INT64_C(1000));
    atomic_store(&p->end, true);
    job_queue_wake(&p->inbox);
    while (!atomic_load(&p->over) && lm_now_us() < end)
        nanosleep(&tick, NULL);
    if (!atomic_load(&p->over))
        return false;
    pthread_join(p->thread, NULL);
    p->started = false;
    return true;
}

void producer_free(producer *p)
{
    if (!p)
        return;
    producer_close(p);
    job_queue_release(&p->inbox);
    leaders_release(&p->leaders);
    pthread_mutex_destroy(&p->swap);
    hold_release(&p->hold);
    free(p);
}
