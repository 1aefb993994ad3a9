/* SPDX-License-Identifier: Apache-2.0 */
/*
 * delivery.c - what the reports of a job's records mean; see delivery.h.
 *
 * A job is finished when its records are durable, and not before: at-least-once when their reports
 * say NO_ERROR, exactly-once when their transaction has committed, which counts more than reports.
 * What happens to a failed delivery:
 *
 *   a dead letter that is too large       trimmed, see dead_letter.h
 *   any other dead letter                 tried again for ever, with backoff: its offset is
 *                                         blocked, lag grows and the log says why. Dropping it
 *                                         would be a loss.
 *   a reply that can never fit            to the object store (claim.c), or dead letter that names
 *                                         the sizes
 *   a reply that the broker or a topic's  dead letter that says so
 *     own rules find malformed
 *   a reply to a topic or partition that  dead letter (the prompt is at fault)
 *     the prompt chose and that isn't there or isn't ours to write
 *   any other reply                       tried again for ever, with backoff; one that follows the
 *                                         parts of its stream, whose partition is gone, elsewhere
 *   a notice that can never be delivered  left out and logged: the dead letter is the outcome.
 *                                         Exactly-once: also one whose topic takes none for now
 *   a part that can never be delivered    goes back to the outbox, which sends no more of them
 *   a fatal client error                  the worker ends; nothing was committed for these jobs
 *
 * A job's two records (a dead letter and its notice) are sent together and judged together, when
 * the last report is in; what was acknowledged is not sent again.
 */
#include "worker/delivery.h"

#include <inttypes.h>
#include <stdlib.h>

#include "worker/outcome.h"
#include "worker/producer_int.h"

enum { COMPLAIN_EVERY_US = 10 * 1000000 };

static bool is_dead_letter(const struct job *j)
{
    return j->outcome == OUTCOME_DEAD_LETTER;
}

static const char *kind(const struct job *j)
{
    return is_dead_letter(j) ? "dead letter" : j->parent ? "part of a reply" : "reply";
}

static void complain(producer *p, const struct job *j, const char *what)
{
    int64_t now = lm_now_us();
    metric_add(&p->w->metrics.produce_failures, 1);
    if (now - p->complained_us < COMPLAIN_EVERY_US && p->complained_us)
        return;
    p->complained_us = now;
    lm_log(LM_WARN, "producer", "%s [%d] @%" PRId64 ": %s to %s (%zu bytes) is not acknowledged: "
           "%s; trying again, its offset waits", j->lease->topic, (int)j->lease->partition,
           j->record.offset, kind(j), j->out.topic, j->out.len, what);
}

/* What a refusal is about. */
enum refusal { SHARED, ROOM, SIZE, FORM, PARTITION, TOPIC };

static enum refusal refusal_of(int error)
{
    switch (error) {
    case RD_KAFKA_RESP_ERR__QUEUE_FULL:
        return ROOM;
    case RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE:
    case RD_KAFKA_RESP_ERR_RECORD_LIST_TOO_LARGE:       /* for a segment of its log */
        return SIZE;
    case RD_KAFKA_RESP_ERR_INVALID_MSG:
    case RD_KAFKA_RESP_ERR_INVALID_RECORD:
        return FORM;
    case RD_KAFKA_RESP_ERR__UNKNOWN_PARTITION:
        return PARTITION;
    case RD_KAFKA_RESP_ERR__UNKNOWN_TOPIC:
    case RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART:
    case RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED:
    case RD_KAFKA_RESP_ERR_TOPIC_EXCEPTION:
    case RD_KAFKA_RESP_ERR_UNSUPPORTED_FOR_MESSAGE_FORMAT:
        return TOPIC;
    default:
        return SHARED;          /* the fate of its transaction, or of a broker */
    }
}

bool delivery_refused(const struct outgoing *o)
{
    return o && refusal_of(o->error) != SHARED;
}

static bool topic_refused(const struct outgoing *o)
{
    enum refusal r = refusal_of(o->error);
    return r == PARTITION || r == TOPIC;
}

/* Exactly-once: does it wait with all that is for the same topic? */
static bool set_aside(producer *p, struct job *j)
{
    return p->exactly_once && topic_refused(&j->out) &&
           !aside_add(&p->aside, j->out.topic, j, lm_now_us());
}

static void try_later(producer *p, struct job *j, const char *what)
{
    const struct config *cfg = p->w->cfg;
    complain(p, j, what);
    if (!set_aside(p, j))
        job_list_add(&p->later, j, lm_now_us() + backoff_us(j->out.attempts++,
                                                            cfg->retry_backoff_ms,
                                                            cfg->retry_backoff_max_ms));
}

/* Is the reply's own destination at fault, as the prompt named it? A partition that it did not name
 * was the client's choice, from before the topic was deleted, or made again with fewer of them: the
 * next try learns which. */
static bool destination_fault(const struct outgoing *o)
{
    enum refusal r = refusal_of(o->error);
    return r == TOPIC ? o->asked : r == PARTITION && !o->follows && o->partition >= 0;
}

static bool too_large(producer *p, const struct job *j, const struct outgoing *o)
{
    if (refusal_of(o->error) != SIZE)
        return false;
    bool believed = batch_size_believe(&p->batch, producer_record_bytes(j, o), j->out.attempts,
                                       p->renewing);
    if (!believed && p->batch.shrink)
        snprintf(p->batch.topic, sizeof p->batch.topic, "%s", o->topic);
    return believed;
}

/* Why this reply can never be delivered; LM_OK: it may be. */
static lm_status final_reason(producer *p, const struct job *j, const struct outgoing *o,
                              struct lm_err *why)
{
    const char *text = rd_kafka_err2str((rd_kafka_resp_err_t)o->error);
    if (too_large(p, j, o))
        return lm_err_set(why, LM_TOO_LARGE, "the reply has %zu bytes, %zu with its key and "
                          "headers, more than the broker takes for topic '%s' (its "
                          "max.message.bytes or segment.bytes) or the client allows "
                          "(message.max_bytes=%" PRId64 ")",
                          o->len, producer_record_bytes(j, o), o->topic,
                          p->w->cfg->message_max_bytes);
    if (destination_fault(o) && o->partition >= 0)
        return lm_err_set(why, LM_NOT_FOUND, "reply topic '%s' partition %d: %s", o->topic,
                          (int)o->partition, text);
    if (destination_fault(o))
        return lm_err_set(why, LM_NOT_FOUND, "reply topic '%s': %s", o->topic, text);
    if (refusal_of(o->error) == FORM)
        return lm_err_set(why, LM_INVALID, "topic '%s' refuses the reply: %s", o->topic, text);
    return LM_OK;
}

/* Did we take it back? */
static bool purged(int e)
{
    return e == RD_KAFKA_RESP_ERR__PURGE_QUEUE || e == RD_KAFKA_RESP_ERR__PURGE_INFLIGHT;
}

/* Has its partition gone away, as far as the client knows? It says so in two ways: a record that
 * was on its way when its topic was made again, with fewer partitions, ends with what is left of
 * the partition (librdkafka 2.15.1, rd_kafka_toppar_destroy_final()). */
static bool partition_gone(int e)
{
    return e == RD_KAFKA_RESP_ERR__UNKNOWN_PARTITION || e == RD_KAFKA_RESP_ERR__DESTROY;
}

/* The outcome itself was refused. */
static void outcome_failed(producer *p, struct job *j)
{
    struct lm_err why;
    if (j->out.follows && partition_gone(j->out.error)) {
        j->out.partition = -1;          /* its topic was made again, with fewer of them */
        j->out.follows = false;
        try_later(p, j, "the partition of its parts is no more");
    } else if (j->parent && final_reason(p, j, &j->out, &why)) {
        log_seldom(&p->no_more_parts, "producer", "%s; no more parts", why.msg);
        worker_end_job(p->w, j, OUTCOME_PART);
    } else if (!is_dead_letter(j) && final_reason(p, j, &j->out, &why)) {
        if (why.code == LM_TOO_LARGE && p->w->claims && !j->claimed) {
            claims_put(p->w->claims, j);
            return;
        }
        outcome_dead_letter(p->w, j, &why, "PRODUCE");
    } else if (!(is_dead_letter(j) && too_large(p, j, &j->out) &&
                 outcome_trim(p->w, j))) {
        try_later(p, j, rd_kafka_err2str((rd_kafka_resp_err_t)j->out.error));
    }
}

/* A requester can't be told; its dead letter says why all the same. */
static void drop_notice(producer *p, struct job *j, const struct lm_err *why)
{
    log_seldom(&p->no_notice, "producer", "%s [%d] @%" PRId64 ": no error reply: %s",
               j->lease->topic, (int)j->lease->partition, j->record.offset, why->msg);
    outgoing_release(j->notice);
    free(j->notice);
    j->notice = NULL;
}

bool delivery_spare_notice(producer *p, struct job *j)
{
    struct lm_err why;
    int e = j->notice ? j->notice->error : 0;
    if (!e || purged(e))
        return false;
    if (!final_reason(p, j, j->notice, &why)) {
        if (!p->exactly_once || !topic_refused(j->notice))
            return false;
        lm_err_set(&why, LM_NOT_FOUND, "reply topic '%s': %s", j->notice->topic,
                   rd_kafka_err2str((rd_kafka_resp_err_t)e));
    }
    drop_notice(p, j, &why);
    return true;
}

void delivery_leave_notice(producer *p, struct job *j)
{
    struct lm_err why;
    lm_err_set(&why, LM_NET, "topic '%s' takes no records for now", j->notice->topic);
    drop_notice(p, j, &why);
}

void delivery_done(producer *p, struct job *j)
{
    struct metrics *m = &p->w->metrics;
    j->out.error = 0;           /* a part's is looked at in outbox.c */
    if (!p->reported_us)
        p->reported_us = lm_now_us();
    histogram_observe(&m->reply_produce, p->reported_us - j->out.handed_us);
    if (is_dead_letter(j))
        metric_add(&m->dead_letters[j->failure ? j->failure : LM_INTERNAL], 1);
    else
        metric_move(&m->reply_bytes, j->out.len);
    if (j->outcome == OUTCOME_REPLY)
        outcome_count(p->w, &j->tally);
    worker_end_among(p->w, j, j->outcome, &p->ended);
}

void delivery_give(producer *p)
{
    worker_give_ended(p->w, &p->ended);
    p->reported_us = 0;
}

void delivery_judge(producer *p, struct job *j)
{
    char text[256];
    delivery_spare_notice(p, j);
    int worst = j->out.error || !j->notice ? j->out.error : j->notice->error;
    if (!worst) {
        delivery_done(p, j);
    } else if (purged(worst) && p->renewing) {
        job_list_add(&p->taken_back, j, 0);
    } else if (purged(worst) || atomic_load(&p->end)) {
        worker_end_job(p->w, j, OUTCOME_DROPPED);
    } else if (worst == RD_KAFKA_RESP_ERR__QUEUE_FULL) {
        job_list_add(&p->later, j, lm_now_us() + 10000);
    } else if (rd_kafka_fatal_error(p->rk, text, sizeof text)) {
        worker_fail(p->w, LM_STATE, "the producer can't go on: %s", text);
        worker_end_job(p->w, j, OUTCOME_DROPPED);
    } else if (j->out.error) {
        outcome_failed(p, j);
    } else {
        try_later(p, j, rd_kafka_err2str((rd_kafka_resp_err_t)worst));
    }
}
