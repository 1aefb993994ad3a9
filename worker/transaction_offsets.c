/* SPDX-License-Identifier: Apache-2.0 */
/*
 * transaction_offsets.c - exactly-once: which prompt topic's offsets does the group refuse?
 *
 * The call that hands over a transaction's offsets fails as a whole, with a code that names no
 * topic. In librdkafka (2.15.1) it may not even be about offsets: who may not write to a topic
 * learns that while records are on their way, and the next call, whichever it is, tells. So each
 * prompt topic is asked for by itself: in a transaction without records, with the offsets that the
 * group has already, which is aborted whatever the answer. Where one is refused, that was it, and
 * its topic is withheld (withheld.h); where none is, it was a record (blame.h).
 *
 * A topic that was deleted costs the time of a question: the client asks again and again whether
 * the group knows it now. So after each question that is not taken, and after those that find out
 * anything, there is none about any topic for four times as long: the others have four fifths of
 * the time, however many were deleted, as in aside.h. What is longer than a question takes, because
 * the brokers were away, or many topics had to be asked for in a row, does not count.
 *
 * Threads: the producer thread's.
 */
#include "worker/transaction_int.h"

#include <string.h>

enum answer { TAKEN, REFUSED, NOT_KNOWN };

/* A deleted topic's code is UNKNOWN_TOPIC_OR_PART also when librdkafka (2.15.1) has asked in vain
 * for its time; a later one may end that with __TIMED_OUT, which would leave open whose it is. */
static enum answer answer_of(struct tx *t, const struct stage *look)
{
    rd_kafka_resp_err_t code = look->offsets->cnt ? transaction_question(t, look) :
                               RD_KAFKA_RESP_ERR_NO_ERROR;
    if (stage_refuses_topic(code))
        metric_add(&t->w->metrics.transaction_aborts, 1);
    return stage_refuses_topic(code) ? REFUSED : code ? NOT_KNOWN : TAKEN;
}

/* What an earlier request may do yet is a new producer's to rule out. */
static enum answer ask(struct tx *t, const char *topic)
{
    struct stage look = { .topic = topic };
    if (transaction_last_call(t) || t->unsure || t->hopeless ||
        atomic_load(&t->p->unanswered.any) || staging_look(t->w->consumer, &look))
        return NOT_KNOWN;
    enum answer answer = answer_of(t, &look);
    stage_release(&look);
    return answer;
}

/* The first of its topic in the list? */
static bool is_new(const rd_kafka_topic_partition_list_t *l, int at)
{
    for (int i = 0; i < at; i++)
        if (!strcmp(l->elems[i].topic, l->elems[at].topic))
            return false;
    return true;
}

bool transaction_offsets_refused(struct tx *t)
{
    const struct config *cfg = t->w->cfg;
    const rd_kafka_topic_partition_list_t *l = t->stage.offsets;
    const rd_kafka_resp_err_t code = t->code;
    bool any = false, known = true;
    const int64_t began = lm_now_us();
    if (!t->of_offsets || !stage_refuses_topic(code))
        return false;
    for (int i = 0; i < l->cnt; i++) {
        enum answer answer = is_new(l, i) ? ask(t, l->elems[i].topic) : TAKEN;
        known &= answer != NOT_KNOWN;
        any |= answer == REFUSED &&
               !withheld_add(&t->p->withheld, l->elems[i].topic, lm_now_us(),
                             cfg->retry_backoff_ms, cfg->retry_backoff_max_ms);
    }
    if (any || !known)
        withheld_rest(&t->p->withheld, began, lm_now_us());
    t->code = any || !known ? RD_KAFKA_RESP_ERR_NO_ERROR : code;
    return any;
}

void transaction_ask_again(struct tx *t, struct withheld_topic *h)
{
    const struct config *cfg = t->w->cfg;
    int64_t began = lm_now_us();
    if (ask(t, h->name) == TAKEN) {
        struct job_chain jobs = withheld_let_go(&t->p->withheld, h);
        job_queue_push_all(&t->p->inbox, &jobs);
        return;
    }
    int64_t now = lm_now_us();
    withheld_again(h, now, cfg->retry_backoff_ms, cfg->retry_backoff_max_ms);
    withheld_rest(&t->p->withheld, began, now);
    /* Nothing of them was published, so the next owner may have them. Not one question a topic: a
     * rebalance waits for these. */
    worker_drop_all(t->w, withheld_take_revoked(&t->p->withheld));
}
