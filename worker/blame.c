/* SPDX-License-Identifier: Apache-2.0 */
/* blame.c - who spoils a transaction; see blame.h. */
#include "worker/blame.h"

#include <string.h>

#include "worker/delivery.h"
#include "worker/producer_int.h"

static bool timed_out(const struct outgoing *o)
{
    return o && o->error == RD_KAFKA_RESP_ERR__MSG_TIMED_OUT;
}

/* What the brokers say of the producer or its transaction is everybody's, and what was purged as
 * that was spoilt has the client library's own codes. */
static bool of_its_own(int error)
{
    switch (error) {
    case RD_KAFKA_RESP_ERR__MSG_TIMED_OUT:
    case RD_KAFKA_RESP_ERR_UNKNOWN:
        return true;
    case RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED:
    case RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER:
    case RD_KAFKA_RESP_ERR_DUPLICATE_SEQUENCE_NUMBER:
    case RD_KAFKA_RESP_ERR_INVALID_PRODUCER_EPOCH:
    case RD_KAFKA_RESP_ERR_INVALID_TXN_STATE:
    case RD_KAFKA_RESP_ERR_INVALID_PRODUCER_ID_MAPPING:
    case RD_KAFKA_RESP_ERR_CONCURRENT_TRANSACTIONS:
    case RD_KAFKA_RESP_ERR_TRANSACTIONAL_ID_AUTHORIZATION_FAILED:
    case RD_KAFKA_RESP_ERR_UNKNOWN_PRODUCER_ID:
    case RD_KAFKA_RESP_ERR_PRODUCER_FENCED:
        return false;
    default:
        return error > 0;
    }
}

static bool not_taken(const struct outgoing *o)
{
    return o && of_its_own(o->error);
}

bool blame_timed_out(const struct stage *s)
{
    for (size_t i = 0; i < s->n; i++)
        if (s->jobs[i] && (timed_out(&s->jobs[i]->out) || timed_out(s->jobs[i]->notice)))
            return true;
    return false;
}

static bool took(const struct outgoing *o, const char *topic)
{
    return o && o->acked && !strcmp(o->topic, topic);
}

static bool topic_took(const struct stage *s, const char *topic)
{
    for (size_t i = 0; i < s->n; i++) {
        const struct job *j = s->jobs[i];
        if (j && (took(&j->out, topic) || took(j->notice, topic)))
            return true;
    }
    return false;
}

static bool may_be_barred(const struct stage *s, const struct outgoing *o)
{
    return o && !o->acked && !topic_took(s, o->topic);
}

/* A notice before its dead letter, for its try finds out more: see blame_of_try(). */
const struct outgoing *blame_held_up(const struct stage *s, rd_kafka_resp_err_t code,
                                     const struct job *j)
{
    bool barred = code == RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
    if (not_taken(&j->out))
        return &j->out;
    if (not_taken(j->notice) || (barred && may_be_barred(s, j->notice)))
        return j->notice;
    return barred && may_be_barred(s, &j->out) ? &j->out : NULL;
}

/* Where there is a notice it may be that, and that can be spared. */
void blame_of_try(producer *p, const char *topic, rd_kafka_resp_err_t code, struct job *j)
{
    struct outgoing *o = j->notice && !j->notice->acked ? j->notice : &j->out;
    if (code == RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED) {
        if (!o->acked && (o == j->notice || !strcmp(o->topic, topic)))
            o->error = code;
    } else if (!code && o == j->notice && j->out.acked) {
        delivery_leave_notice(p, j);
    }
}
