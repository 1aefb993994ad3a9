/* SPDX-License-Identifier: Apache-2.0 */
/*
 * producer_int.h - what the files of the producer thread share: producer.c, delivery.c, blame.c,
 * and those of transaction_int.h. Members of struct producer are grouped by whose they are: most
 * are the producer thread's alone.
 */
#ifndef LORAMILL_WORKER_PRODUCER_INT_H
#define LORAMILL_WORKER_PRODUCER_INT_H

#include <librdkafka/rdkafka.h>

#include "worker/aside.h"
#include "worker/batch_size.h"
#include "worker/hold.h"
#include "worker/kafka_conf.h"
#include "worker/leaders.h"
#include "worker/unanswered.h"
#include "worker/withheld.h"
#include "worker/worker.h"

enum {
    TRANSACTION_LAST_MS = 5000,         /* after the drain, for the one that is under way */
};

struct producer {
    struct worker *w;           /* as `exactly_once`: set before the thread starts */
    bool exactly_once;

    /* The main thread's, which starts and joins. */
    pthread_t thread;
    bool started;
    atomic_bool end;            /* set by it */
    atomic_bool over;           /* set by the producer thread, at its end */

    /* Any thread's. */
    struct job_queue inbox;     /* exactly-once: all to send; at-least-once: to be judged, as no
                                 * report will come */
    struct hold hold;           /* at-least-once: what waits behind others */
    atomic_bool want_offsets;   /* a transaction now, if only for these; the consumer thread asks */
    struct unanswered unanswered;       /* exactly-once; written by the library's threads */

    /* The client. Replaced by the producer thread: when a transaction's fate is unknown, for a
     * leader, or for another batch.size. At-least-once any thread produces, with `swap` held. */
    pthread_mutex_t swap;
    rd_kafka_t *rk;
    rd_kafka_queue_t *queue;    /* its main one, to be woken by */
    rd_kafka_topic_t *replies;  /* its handle of topics.replies, from the first one on */

    /* The producer thread's, in which reports and statistics are served, too. */
    struct job_list later;
    struct aside aside;         /* exactly-once */
    struct withheld withheld;   /* likewise */
    int other_id;               /* ... of transactions, made of the configured one; 0: that one */
    struct job_chain ended;     /* acknowledged; to the consumer thread, see delivery_give() */
    int64_t reported_us;        /* when they were; 0: the clock was not read yet */
    long under_way;             /* exactly-once: records that have no report yet */
    bool failed;                /* ... and one of the transaction was not taken */
    int64_t transaction_timeout_ms;     /* as the client has it */
    struct batch_size batch;
    struct leaders leaders;     /* at-least-once */
    struct stuck stuck[LEADERS_STUCK_MOST];
    size_t n_stuck;
    int64_t looked_us;          /* at what the brokers say of them */
    bool renewing;              /* the client before `rk` is being let go */
    struct job_list taken_back; /* ... what it had not delivered */
    int64_t complained_us;
    struct kafka_said said;
    struct log_seldom no_more_parts, no_notice;
};

/* Opens p->rk with its callbacks. */
lm_status producer_open(producer *p, struct lm_err *err);
void producer_close(producer *p);       /* fine when it is not open */
/* Sends what is not acknowledged yet. True: no report will come. Exactly-once: where the outcome is
 * refused on the spot, nothing of the job is sent. */
bool producer_send_records(producer *p, struct job *j, int64_t now_us);
/* Its value, key and headers: what the client library measures against batch.size is somewhat more,
 * never less. */
size_t producer_record_bytes(const struct job *j, const struct outgoing *o);
/* The next client gets another batch.size. True: it is to be made. */
bool producer_resize(producer *p);

#endif
