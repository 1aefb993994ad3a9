/* SPDX-License-Identifier: Apache-2.0 */
/*
 * transaction_int.h - what transaction.c and transaction_client.c share; the producer thread's
 * alone. The one knows what a transaction holds, the other how to call librdkafka about it.
 */
#ifndef LORAMILL_WORKER_TRANSACTION_INT_H
#define LORAMILL_WORKER_TRANSACTION_INT_H

#include "worker/producer_int.h"
#include "worker/staging.h"

enum {
    TRANSACTION_FLUSH_MS = 10,          /* of one look at what is under way */
};

enum fate { OPEN, COMMITTED, ABORTED, UNKNOWN, HOPELESS };

struct tx {
    producer *p;
    struct worker *w;
    struct job_chain ready;
    struct stage stage;
    bool open;                  /* begun, with all of the stage that is before its `from` */
    bool full;                  /* what is ready has no room in the open one */
    size_t bytes;               /* of the stage */
    bool initialised;
    int failures;               /* in a row */
    size_t again;               /* an abort has left so many, which go before all that is new */
    bool any_refused;           /* of the portion: STAGE_REFUSED, to be taken out */
    struct aside_topic *trial;  /* the transaction is a try of it, with its jobs; NULL: it is not */
    rd_kafka_resp_err_t code;   /* for which it was aborted; 0: not known */
    size_t gone;                /* of its jobs: they are not ours any more */
    bool begun, overran;        /* it had any to send; its time was not enough */
    bool tried;                 /* one, last time */
    bool no_other_id;           /* the brokers don't allow one */
    bool stale;                 /* records were not taken in time, since the producer is this one */
    int64_t since_us;           /* the oldest in `ready` ... */
    int64_t open_since_us;      /* ... and in the open one */
    int64_t not_before_us, next_idle_us, begun_us, rebuilt_us;
    struct log_seldom refused;
};

/* The drain is over: no transaction begins any more, the one under way may end. */
bool transaction_last_call(const struct tx *t);
/* What a call may take: when the worker ends, all of them together have TRANSACTION_LAST_MS. */
int transaction_call_ms(const struct tx *t);

/* A call about the open transaction. Its error, or NULL; the caller frees it. */
typedef rd_kafka_error_t *transaction_call(struct tx *t);
transaction_call transaction_send_offsets, transaction_commit, transaction_abort;
/* The call, again until there is an answer, or the worker's end leaves no time for one. */
rd_kafka_error_t *transaction_persist(struct tx *t, transaction_call *make);
void transaction_ask_again_soon(void);

/* Waits until what is under way has its reports, for as long as a call may take. */
void transaction_flush(struct tx *t);

/* Once, before the first transaction. False: the worker ends. */
bool transaction_initialise(struct tx *t);
/* A new producer. Whatever the old one had open is over when this returns true. */
bool transaction_rebuild(struct tx *t);
/* Between transactions: what the last one has left on its way must not end the next one. */
bool transaction_fence(struct tx *t);

/* A call has failed: aborts if that is enough. Consumes the error. */
enum fate transaction_undo(struct tx *t, rd_kafka_error_t *e);

#endif
