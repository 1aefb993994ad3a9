/* SPDX-License-Identifier: Apache-2.0 */
/*
 * transaction_int.h - what the files about transactions share; the producer thread's alone.
 * transaction.c knows what a transaction holds, and when it begins and ends; transaction_client.c
 * how librdkafka is called about it; transaction_aside.c what becomes of topics that take nothing,
 * transaction_offsets.c of those whose offsets are refused.
 */
#ifndef LORAMILL_WORKER_TRANSACTION_INT_H
#define LORAMILL_WORKER_TRANSACTION_INT_H

#include "worker/producer_int.h"
#include "worker/staging.h"

enum {
    TRANSACTION_FLUSH_MS = 10,          /* of one look at what is under way */
    TRANSACTION_MAX_BYTES = 32 << 20,
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
    rd_kafka_resp_err_t code;   /* for which it was aborted; 0: not known, or not for a record */
    bool of_offsets;            /* ... as the call for its offsets has told */
    size_t gone;                /* of its jobs: not ours any more, or withheld */
    bool begun, overran;        /* it had any to send; its time was not enough */
    bool tried;                 /* one, last time */
    bool questioned;            /* the group was, last time */
    bool no_other_id;           /* the brokers don't allow one */
    bool stale;                 /* records were not taken in time, since the producer is this one */
    bool unsure;                /* a question has left open what the brokers did */
    bool hopeless;              /* ... or was the client's last */
    int64_t since_us;           /* the oldest in `ready` ... */
    int64_t open_since_us;      /* ... and in the open one */
    int64_t not_before_us, next_idle_us, begun_us, rebuilt_us;
    int64_t sent_us;            /* its last portion */
    struct log_seldom refused, unknown;
};

/* ---- transaction.c ---------------------------------------------------------------------- */

/* To be sent with the next portion. */
void transaction_make_ready(struct tx *t, struct job *j);
/* Into the portion that is being put together; the caller sees to the room for it. */
void transaction_enter(struct tx *t, struct job *j);
/* The next portion, and with the last one the end of the transaction. False: the worker ends, and
 * of what was sent nothing may be sent again. */
bool transaction_run(struct tx *t, bool last);
/* What an abort has left behind in a job; true: a record of its own was refused, which is to be
 * judged. Its outcome, that is: without a notice it goes on. */
bool transaction_forget_attempt(struct tx *t, struct job *j);

/* ---- transaction_aside.c ---------------------------------------------------------------- */

/* Does it wait for a topic that is set aside, or for its own, which is withheld? Not for its
 * notice's, once that is known to take none: then it goes without. */
bool transaction_waits_aside(struct tx *t, struct job *j);
/* After an abort: the jobs of topics that took nothing wait, so that the others need not. True:
 * there are such. Of a try: who is at fault is noted. */
bool transaction_set_aside(struct tx *t);
/* A topic to be tried now, NULL: none. Where others are due, too, they have every second turn. */
struct aside_topic *transaction_to_try(struct tx *t, int64_t now, bool others);
/* Tries it. As transaction_run(). */
bool transaction_try(struct tx *t, struct aside_topic *a);
/* The portion of a try. */
void transaction_take_aside(struct tx *t);

/* ---- transaction_client.c --------------------------------------------------------------- */

/* The drain is over: no transaction begins any more, the one under way may end. */
bool transaction_last_call(const struct tx *t);
/* What a call may take: when the worker ends, all of them together have TRANSACTION_LAST_MS. */
int transaction_call_ms(const struct tx *t);

/* A call about the open transaction. Its error, or NULL; the caller frees it. */
typedef rd_kafka_error_t *transaction_call(struct tx *t);
transaction_call transaction_begin, transaction_send_offsets, transaction_commit, transaction_abort;
/* The call, again until there is an answer, or the worker's end leaves no time for one, or it waits
 * for a report that does not come, or for an end that does not. */
rd_kafka_error_t *transaction_persist(struct tx *t, transaction_call *make);
void transaction_ask_again_soon(void);

/* Reports and whatever else the library has for us; waits for nothing. */
void transaction_serve(struct tx *t);
/* Waits until what is under way has its reports, for as long as a call may take. */
void transaction_flush(struct tx *t);
/* The same before a portion, for no longer than at-least-once would hold it back (hold.h). */
void transaction_let_arrive(struct tx *t);
/* The same of a try, which has its time, and ends at once if a record is refused. True: all that it
 * has sent is taken. */
bool transaction_arrived(struct tx *t);
/* What was sent and has no report yet is the library's until then. */
void transaction_purge(struct tx *t);

/* Once, before the first transaction. False: the worker ends. */
bool transaction_initialise(struct tx *t);
/* A new producer. Whatever the old one had open is over when this returns true. */
bool transaction_rebuild(struct tx *t);
/* Between transactions: what the last one has left on its way must not end the next one. */
bool transaction_fence(struct tx *t);

/* The client has ended the transaction before any call could tell: why? Sets the code, if it can be
 * had. */
void transaction_learn_cause(struct tx *t);
/* Has the client failed for good? */
bool transaction_client_is_dead(const struct tx *t);
/* A call has failed: aborts if that is enough. Consumes the error. */
enum fate transaction_undo(struct tx *t, rd_kafka_error_t *e);
/* Would the group take these offsets? In a transaction without records, which is aborted whatever
 * the answer. */
rd_kafka_resp_err_t transaction_question(struct tx *t, const struct stage *look);

/* ---- transaction_offsets.c -------------------------------------------------------------- */

/* After an abort whose code may be about offsets: true, and the prompt topics are withheld, if it
 * is. Then, or if that can't be found out now, it is no more taken for a record's. */
bool transaction_offsets_refused(struct tx *t);
/* One of them is due: does the group still refuse it? If so, none is for a while. */
void transaction_ask_again(struct tx *t, struct withheld_topic *h);

#endif
