/* SPDX-License-Identifier: Apache-2.0 */
/*
 * worker.h - what the worker's threads share. Private to worker.c, the parts that it starts, and
 * what these are made of:
 *
 *   consumer   consumer, admission, rebalance, commit, isolation, blocking, staging (of which the
 *              producer thread calls half, see staging.h)
 *   intake     intake
 *   outbox     outbox, stream; outcome, which is whoever's that has the job
 *   producer   producer, delivery, hold, leaders, batch_size; exactly-once transaction with its
 *              files, aside, withheld, blame, unanswered
 *   others     control, claim, spans, http, watchdog; cmd_worker, which starts it all
 *
 *   consumer thread --jobs--> [intake] --> intake thread --engine_submit--> engine
 *        ^                       ^ adapters (store), schemas (asker), retries   | events
 *        |                       +----------------------------------------+     v
 *        +----- [done] <-- producer thread (acknowledgements) <--produce-- outbox thread
 *
 * Each arrow is a job_queue or a thread-safe library call. Beside the arrows the threads share
 *
 *   - the atomics below, of metrics and client_stats too, and those of a job and its lease (job.h)
 *   - what has a lock of its own: cancels, journal, credentials, spans, the watchdog, the store,
 *     the codec and its asker, metrics' partition rows, the producer's client and what it holds
 *     back
 *   - staging: the producer thread asks, and sleeps until the consumer thread has answered
 *   - what is set once, at the start, before anybody uses it: the rest of struct worker
 *
 * Only the consumer thread touches the ledger, and polls, pauses and assigns with the consumer
 * handle; others only ask it for the group's offsets (rebalance.c, staging.c), hand it passwords
 * (credentials.c), and wake its poll.
 */
#ifndef LORAMILL_WORKER_WORKER_H
#define LORAMILL_WORKER_WORKER_H

#include "worker/client_stats.h"
#include "worker/config.h"
#include "worker/credentials.h"
#include "worker/job.h"
#include "worker/log.h"
#include "worker/metrics.h"
#include "worker/store/store.h"

typedef struct consumer consumer;
typedef struct intake intake;
typedef struct outbox outbox;
typedef struct producer producer;
typedef struct http http;
typedef struct control control;
typedef struct claims claims;
struct cancels;
struct codec;
struct journal;
struct spans;

/* replies.encoding, as it is asked for each reply. */
enum reply_as { REPLY_AS_PROMPT, REPLY_AS_JSON, REPLY_AS_AVRO };

struct worker {
    const struct config *cfg;
    credentials *credentials;   /* of the clients below */
    char name[256];
    struct header_names header_names;
    enum reply_as reply_as;     /* replies.encoding */
    struct metrics metrics;
    struct client_stats consumer_stats, producer_stats;

    engine *engine;
    store *store;               /* NULL: no adapters.url */
    struct codec *codec;
    struct engine_info info;

    consumer *consumer;
    intake *intake;
    outbox *outbox;
    producer *producer;
    http *http;
    control *control;           /* NULL: no topics.control */
    struct cancels *cancels;    /* likewise */
    struct journal *journal;    /* NULL: poison.max_attempts=0, or its folder can't be had */
    struct spans *spans;        /* NULL: no traces.otlp_url */
    claims *claims;             /* NULL: replies.too_large=refuse */

    struct job_queue to_intake, done;
    struct job_queue parts;     /* parts of streamed replies with their reports, to the outbox */
    atomic_bool started;        /* everything is up */
    atomic_bool stopping;       /* no new work; finish what runs */
    atomic_bool cancelling;     /* the budget is spent: unfinished work is handed back */
    atomic_llong drain_end_us;  /* while stopping: when drain.timeout_ms is over */
    atomic_bool ending;         /* threads end at once */
    atomic_int failed;          /* lm_status that ended the worker, LM_OK while it is well */
    atomic_bool sweep_intake;   /* of what waits there something was cancelled, or goes */
    atomic_bool alone;          /* one of those in the engine, which must be alone there */
    atomic_bool closed;         /* a suspect is to run alone: intake starts nothing else */
    atomic_bool intake_rests;   /* since `closed` intake has ended what it had begun */
    atomic_bool engine_full;    /* intake waits for room; outbox wakes it */
    atomic_int most_urgent;     /* priority of the most urgent of the assigned topics */
    /* What is changed for each message, apart from what is only looked at. */
    char apart0[CACHE_LINE];
    atomic_int in_engine;       /* prompts that the engine has */
    char apart1[CACHE_LINE];
    atomic_llong log_second;    /* dead letters shown in this second */
    atomic_int log_shown;
    struct log_seldom no_notice, trimmed;
    atomic_llong consumer_beat_us, outbox_beat_us, intake_beat_us;
    atomic_llong pulse_us, slept_us;    /* watchdog_slept()'s */
    atomic_llong closing_producer_us;   /* since when librdkafka destroys one; 0: it does not */
};

/* Runs until a signal or a failure. Returns the process's exit status. */
int worker_run(const struct config *cfg);

/* The configured name, or one that no other process has. */
void worker_set_name(struct worker *w);

/* This process can't go on: latches the status (the first one wins) and asks for an end. */
void worker_fail(struct worker *w, lm_status status, const char *fmt, ...) LM_PRINTF(3, 4);

/* The drain is over, now if not before: unfinished work is handed back. Any thread. */
void worker_cancel(struct worker *w);

/* ---- of one job: worker_job.c ----------------------------------------------------------- */

/* The terminal outcome of a job is durable, or it was dropped: gives it to the consumer thread. */
void worker_end_job(struct worker *w, struct job *j, enum job_outcome outcome);
/* The same of many: they gather in `ended`, and are given together. */
void worker_end_among(struct worker *w, struct job *j, enum job_outcome outcome,
                      struct job_chain *ended);
void worker_give_ended(struct worker *w, struct job_chain *ended);
/* A chain, linked by `next`, to be handed back. */
void worker_drop_all(struct worker *w, struct job *chain);

/* Should unfinished work of this job be given up? */
bool worker_gives_up(struct worker *w, struct job *j);

/* The engine is about to have it, alone if workers died while it ran: notes it in the journal. */
void worker_enter_engine(struct worker *w, struct job *j, bool alone);
/* The engine has it no more: strikes it out of the journal. */
void worker_left_engine(struct worker *w, struct job *j);

/* Eighths of the budgets that all but the most urgent of the assigned topics may fill; admission.c
 * sees to it when they are read. */
enum { LOWER_SHARE = 6 };
/* What it is to count against intake.max_tokens from now on, an eighth of that at most. */
void worker_count_tokens(struct worker *w, struct job *j, long long tokens);
/* The same of `own` and of what it may generate. That is known long after it was read: of a lower
 * topic it counts as far as the share of those has room. Intake's thread. */
void worker_count_generation(struct worker *w, struct job *j, long long own, long long more);
/* Its generation is over, and what is to be sent is there: its tokens count no more, and the bytes
 * of its reply do. Whoever has the job. */
void worker_generated(struct worker *w, struct job *j);
void worker_discount(struct worker *w, struct job *j);  /* neither counts any more */
/* The engine has failed this prompt for a reason that can heal: is there another attempt, by
 * retry.max_attempts and retry.deadline_ms? Counts it. */
bool worker_may_retry(struct worker *w, struct job *j);

/* ---- the parts -------------------------------------------------------------------------- */

lm_status consumer_new(struct worker *w, consumer **out, struct lm_err *err);
lm_status consumer_start(consumer *c, struct lm_err *err);
void consumer_join(consumer *c);                /* after stopping: drained, committed, closed */
void consumer_count_rest(consumer *c);          /* jobs that ended after that */
void consumer_free(consumer *c);

lm_status intake_new(struct worker *w, intake **out, struct lm_err *err);
void intake_free(intake *in);                   /* ends its thread; needs `ending` */
/* A job's schema is here, or why not; codec_config's `answered`. */
void intake_schema_answered(void *user, const struct lm_err *trouble);

lm_status outbox_new(struct worker *w, outbox **out, struct lm_err *err);
void outbox_free(outbox *o);

lm_status producer_new(struct worker *w, producer **out, struct lm_err *err);
/* Takes the job with its `out` filled. Any thread; waits for no broker. */
void producer_send(producer *p, struct job *j);
void producer_want_offsets(producer *p);        /* exactly-once: a transaction soon */
/* Drops what is unacknowledged, ends its thread. False: it is inside a call to silent brokers, and
 * everything that it uses must stay. */
bool producer_stop(producer *p);
void producer_free(producer *p);

lm_status control_new(struct worker *w, control **out, struct lm_err *err);
void control_wait(control *c);                  /* until the orders that were there are known */
void control_stop(control *c);                  /* no more orders: the engine may go */
void control_free(control *c);

lm_status claims_new(struct worker *w, claims **out, struct lm_err *err);
/* Takes a job whose `out` holds the reply that is too large. Any thread. */
void claims_put(claims *c, struct job *j);
void claims_stop(claims *c);                    /* needs `ending` */
void claims_free(claims *c);

lm_status http_new(struct worker *w, http **out, struct lm_err *err);
void http_free(http *h);

#endif
