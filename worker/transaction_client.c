/* SPDX-License-Identifier: Apache-2.0 */
/*
 * transaction_client.c - exactly-once: what is called of librdkafka about a transaction, and the
 * client behind it.
 *
 * Calls are made again until the broker has answered. One that fails tells what may follow: an
 * abort, or a new producer that finds out what the old one has left ("unknown"), or the end
 * ("fenced"); see transaction.c.
 *
 * Threads: the producer thread's.
 */
#include "worker/transaction_int.h"

#include <time.h>

#include "worker/watchdog.h"

enum {
    STUCK_CALLS = 6,            /* such to begin, in vain, and another id begins; or to end, ... */
    CALL_MS = 5000,             /* of one call; it is made again until it has an answer. Not all
                                 * heed it: send_offsets() may take several times as long */
    FAILED_MS = 100,            /* for the other reports, once a record was not taken */
    REBUILD_MIN_MS = 1000,      /* between two rebuilds */
    PURGE_MS = 1000,
    QUESTION_MS = 1000,
    REPORTS_LATE_MS = 5000,     /* after the time that a record has */
};

/* ---- what is under way ------------------------------------------------------------------ */

bool transaction_last_call(const struct tx *t)
{
    return atomic_load(&t->w->cancelling);
}

int transaction_call_ms(const struct tx *t)
{
    if (!transaction_last_call(t))
        return CALL_MS;
    int64_t left = atomic_load(&t->w->drain_end_us) / 1000 + TRANSACTION_LAST_MS -
                   lm_now_us() / 1000;
    return (int)LM_MAX(0, LM_MIN(left, CALL_MS));
}

void transaction_flush(struct tx *t)
{
    int64_t end = lm_now_us() + CALL_MS * (int64_t)1000;
    while (transaction_call_ms(t) && rd_kafka_flush(t->p->rk, TRANSACTION_FLUSH_MS) &&
           lm_now_us() < end)
        if (t->p->failed)       /* what is queued in the library stays there */
            end = LM_MIN(end, lm_now_us() + FAILED_MS * 1000);
}

/* librdkafka (2.15.1) wakes its threads when records are queued, and not again when the coordinator
 * has taken their partition into the transaction, before which they may not go: they would lie for
 * up to a second. A flush wakes them, once. So while a transaction fills it is called again and
 * again, without time to wait for anything, and at the end in slices. Whether all records were
 * taken is the commit's to find out. */
void transaction_serve(struct tx *t)
{
    if (t->open)
        rd_kafka_flush(t->p->rk, 0);
    else
        rd_kafka_poll(t->p->rk, 0);
}

/* No portion goes in behind another, if that takes no longer than at-least-once would hold it
 * back. */
void transaction_let_arrive(struct tx *t)
{
    int64_t end = lm_now_us() + HOLD_US;
    while (t->p->under_way && !transaction_last_call(t) && lm_now_us() < end)
        rd_kafka_flush(t->p->rk, TRANSACTION_FLUSH_MS);
}

bool transaction_arrived(struct tx *t)
{
    int64_t end = lm_now_us() + aside_limit_us(t->trial, t->p->transaction_timeout_ms * 1000);
    while (t->p->under_way && !t->p->failed && transaction_call_ms(t) && lm_now_us() < end)
        rd_kafka_flush(t->p->rk, TRANSACTION_FLUSH_MS);
    t->overran = t->p->under_way && !t->p->failed && transaction_call_ms(t);
    return !t->p->under_way && !t->p->failed;
}

void transaction_purge(struct tx *t)
{
    if (!t->p->rk)
        return;
    rd_kafka_purge(t->p->rk, RD_KAFKA_PURGE_F_QUEUE | RD_KAFKA_PURGE_F_INFLIGHT);
    rd_kafka_flush(t->p->rk, PURGE_MS);
}

/* ---- calls that may take long ----------------------------------------------------------- */

static rd_kafka_error_t *init(struct tx *t)
{
    return rd_kafka_init_transactions(t->p->rk, transaction_call_ms(t));
}

rd_kafka_error_t *transaction_begin(struct tx *t)
{
    return rd_kafka_begin_transaction(t->p->rk);
}

rd_kafka_error_t *transaction_send_offsets(struct tx *t)
{
    return rd_kafka_send_offsets_to_transaction(t->p->rk, t->stage.offsets, t->stage.group,
                                                transaction_call_ms(t));
}

rd_kafka_error_t *transaction_commit(struct tx *t)
{
    return rd_kafka_commit_transaction(t->p->rk, transaction_call_ms(t));
}

rd_kafka_error_t *transaction_abort(struct tx *t)
{
    return rd_kafka_abort_transaction(t->p->rk, transaction_call_ms(t));
}

void transaction_ask_again_soon(void)
{
    nanosleep(&(struct timespec){ .tv_nsec = 50000000 }, NULL);
}

/* Each record has its report when its time is over, which is a transaction's at most, and commit
 * and abort wait for that. In librdkafka (2.15.1) one has none if its partition went away while it
 * was on its way (its topic was deleted, or made again with fewer of them) and it was to be sent
 * again: it lies where nothing looks, neither a timeout nor a purge, as long as the transaction
 * holds the partition. Only the client's end frees it. */
static bool report_is_lost(const struct tx *t)
{
    int64_t wait = (t->p->transaction_timeout_ms + REPORTS_LATE_MS) * 1000;
    return t->p->under_way && lm_now_us() - t->sent_us > wait;
}

/* An abort is not over until the last transaction is, which may be about to end for as long as a
 * partition of it has no leader. The coordinator answers all the time that it is not, which the
 * client keeps to itself: what it does about brokers that are away looks the same. A new producer
 * is told, see take_other_id(). */
rd_kafka_error_t *transaction_persist(struct tx *t, transaction_call *make)
{
    for (int in_vain = 0;;) {
        unsigned before = atomic_load(&t->p->unanswered.ends);
        rd_kafka_error_t *e = make(t);
        in_vain += before != atomic_load(&t->p->unanswered.ends);
        if (!e || !rd_kafka_error_is_retriable(e) || !transaction_call_ms(t) ||
            report_is_lost(t) || in_vain >= STUCK_CALLS)
            return e;
        lm_log(LM_DEBUG, "producer", "transaction: %s; asking again", rd_kafka_error_string(e));
        rd_kafka_error_destroy(e);
        transaction_ask_again_soon();
    }
}

/* ---- a new producer --------------------------------------------------------------------- */

/* The last transaction of this id has been about to end for longer than leaders are elected. It is
 * decided, and nothing can be added to it, but a partition of it has no leader to take its marker,
 * and no other begins until it has one. That may be never, so another id goes on. A broker whose
 * ACLs don't allow it says so; then we wait. False: no client. */
static bool take_other_id(struct tx *t)
{
    struct lm_err err;
    t->p->other_id = t->no_other_id ? 0 : t->p->other_id + 1;
    if (t->no_other_id)
        lm_log(LM_WARN, "producer", "the brokers do not allow it: waiting for that partition");
    else
        lm_log(LM_WARN, "producer", "the last transaction can't end, as a partition of it has no "
               "leader: going on with another transactional.id, this one and '~%d'",
               t->p->other_id + 1);
    producer_close(t->p);
    if (!producer_open(t->p, &err))
        return true;
    worker_fail(t->w, LM_STATE, "%s", err.msg);
    return false;
}

static rd_kafka_error_t *init_any(struct tx *t)
{
    for (int calls = 0;;) {
        rd_kafka_error_t *e = init(t);
        rd_kafka_resp_err_t code = e ? rd_kafka_error_code(e) : 0;
        bool barred = code == RD_KAFKA_RESP_ERR_TRANSACTIONAL_ID_AUTHORIZATION_FAILED &&
                      t->p->other_id;
        bool stuck = code == RD_KAFKA_RESP_ERR_CONCURRENT_TRANSACTIONS &&
                     ++calls % STUCK_CALLS == 0 && !t->no_other_id;
        if (!e || !(barred || rd_kafka_error_is_retriable(e)) || !transaction_call_ms(t))
            return e;
        t->no_other_id |= barred;
        if ((barred || stuck) && !take_other_id(t))
            return e;
        rd_kafka_error_destroy(e);
        transaction_ask_again_soon();
    }
}

bool transaction_initialise(struct tx *t)
{
    rd_kafka_error_t *e = init_any(t);
    t->initialised = !e;
    if (e && !transaction_last_call(t))
        worker_fail(t->w, LM_STATE, "transactions can't be had: %s", rd_kafka_error_string(e));
    if (e)
        rd_kafka_error_destroy(e);
    return t->initialised;
}

bool transaction_rebuild(struct tx *t)
{
    struct lm_err err;
    int64_t wait = t->rebuilt_us + REBUILD_MIN_MS * 1000 - lm_now_us();
    if (t->rebuilt_us && wait > 0)
        nanosleep(&(struct timespec){ .tv_nsec = LM_MIN(wait, 999999) * 1000 }, NULL);
    t->rebuilt_us = lm_now_us();
    t->stale = t->unsure = false;
    metric_add(&t->w->metrics.producer_rebuilds, 1);
    rd_kafka_purge(t->p->rk, RD_KAFKA_PURGE_F_QUEUE | RD_KAFKA_PURGE_F_INFLIGHT);
    producer_close(t->p);
    t->p->under_way = 0;        /* no report comes any more */
    t->initialised = false;
    if (producer_open(t->p, &err)) {
        worker_fail(t->w, LM_STATE, "%s", err.msg);
        return false;
    }
    return transaction_initialise(t);
}

bool transaction_fence(struct tx *t)
{
    if (producer_resize(t->p) || t->unsure)
        return transaction_rebuild(t);
    if (!t->stale && !atomic_load(&t->p->unanswered.any))
        return true;
    lm_log(LM_INFO, "producer", "%s", t->stale ?
           "records are not taken in time: a new producer asks anew who leads their topics" :
           "a request was not answered: a new producer fences what may come late");
    return transaction_rebuild(t);
}

/* ---- what became of it ------------------------------------------------------------------- */

/* The client has ended the transaction: why? No call has told, if none was made since. In
 * librdkafka (2.15.1) one that does not fit the transaction's state fails: with the cause, if that
 * state is that it must be aborted, else with __STATE; and nothing has changed. */
void transaction_learn_cause(struct tx *t)
{
    rd_kafka_error_t *e = rd_kafka_begin_transaction(t->p->rk);
    if (e && rd_kafka_error_txn_requires_abort(e))
        t->code = rd_kafka_error_code(e);
    if (e)
        rd_kafka_error_destroy(e);
}

bool transaction_client_is_dead(const struct tx *t)
{
    return rd_kafka_fatal_error(t->p->rk, NULL, 0);
}

static bool is_fenced(rd_kafka_resp_err_t e)
{
    return e == RD_KAFKA_RESP_ERR__FENCED || e == RD_KAFKA_RESP_ERR_PRODUCER_FENCED ||
           e == RD_KAFKA_RESP_ERR_INVALID_PRODUCER_EPOCH;
}

/* The client is at its end: may a new one go on? */
static enum fate fatal_fate(struct tx *t, const char *text)
{
    char why[512];
    rd_kafka_resp_err_t e = rd_kafka_fatal_error(t->p->rk, why, sizeof why);
    int64_t now = lm_now_us();
    bool overdue = now - t->begun_us >= t->p->transaction_timeout_ms * 1000;
    bool slept = watchdog_slept(t->w);
    if (!is_fenced(e) || (overdue && !slept)) {
        lm_log(LM_WARN, "producer", "transaction: %s; a new producer finds out", text);
        return UNKNOWN;
    }
    worker_fail(t->w, LM_STATE, "another worker has this one's transactional.id%s: %s",
                slept ? ", or this process was stopped for too long" : "", why);
    return HOPELESS;
}

enum fate transaction_undo(struct tx *t, rd_kafka_error_t *e)
{
    enum fate fate = UNKNOWN;
    const char *text = rd_kafka_error_string(e);
    t->code = rd_kafka_error_code(e);
    t->stage.too_long |= rd_kafka_error_code(e) == RD_KAFKA_RESP_ERR_OFFSET_METADATA_TOO_LARGE;
    if (rd_kafka_error_is_fatal(e)) {
        fate = fatal_fate(t, text);
    } else if (rd_kafka_error_txn_requires_abort(e)) {
        rd_kafka_error_t *e2 = transaction_persist(t, transaction_abort);
        lm_log(LM_INFO, "producer", "transaction aborted: %s", text);
        if (!e2)
            fate = ABORTED;
        else if (rd_kafka_error_is_fatal(e2))
            fate = fatal_fate(t, rd_kafka_error_string(e2));
        if (e2)
            rd_kafka_error_destroy(e2);
    } else {
        lm_log(LM_WARN, "producer", "transaction: %s; a new producer finds out", text);
    }
    rd_kafka_error_destroy(e);
    return fate;
}

rd_kafka_resp_err_t transaction_question(struct tx *t, const struct stage *look)
{
    t->begun_us = lm_now_us();
    rd_kafka_error_t *e = transaction_begin(t);
    if (!e)
        e = rd_kafka_send_offsets_to_transaction(t->p->rk, look->offsets, look->group,
                                                 LM_MIN(QUESTION_MS, transaction_call_ms(t)));
    rd_kafka_resp_err_t code = e ? rd_kafka_error_code(e) : RD_KAFKA_RESP_ERR_NO_ERROR;
    if (!e)
        e = transaction_persist(t, transaction_abort);
    enum fate fate = e ? transaction_undo(t, e) : ABORTED;
    t->unsure |= fate == UNKNOWN;
    t->hopeless |= fate == HOPELESS;
    return code;
}
