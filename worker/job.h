/* SPDX-License-Identifier: Apache-2.0 */
/*
 * job.h - one Kafka record on its way through the worker.
 *
 *   consumer            intake                         engine      outbox       producer
 *   QUEUED --decode--> FETCHING --adapter--> READY --> RUNNING --> ANSWERING --acked--> done
 *      |                  |                    |          |            |
 *      |                  +---- refused -------+----------+----> dead letter --acked--> done
 *      +---- partition taken away, or stopping: DROPPED ----------------------------> done
 *
 * A job may have two records to produce: its outcome and, with errors.reply=true, a notice to the
 * requester. It is done when both are acknowledged.
 *
 * A part of a streamed reply is a job of its own, a child: it has no entry in the ledger, holds a
 * reference to its parent, whose record it borrows, and goes back to the outbox instead of "done".
 *
 * "done" is a push to the consumer thread's queue: only it touches the ledger. A job that was
 * dropped is not completed there, so its offset stays uncommitted.
 *
 * Ownership: references. The ledger holds one until its entry ends, the pipeline holds the other
 * and passes it from thread to thread through queues; so a job belongs to one thread at a time.
 * Apart from that
 *
 *   the consumer thread    reads and sets the atomic ones of any job that it has an entry of, and
 *                          has some members to itself
 *   the control thread     finds a job by its prompt's id under the lock of cancels.h, reads its
 *                          record's time and handle, and sets `cancelled`
 *   the store              hands back whom intake has given to it, and touches nothing else
 *   the client library     has `out` and `notice` until their reports. The job's sender may work on
 *                          yet when they come: the last to lower `unreported` goes on with it
 *
 * which is how the members of struct job are grouped.
 *
 * The lease says whether this worker still owns the partition, in the epoch in which the record was
 * read. The consumer thread sets `revoked`; everyone else tests it before starting work.
 */
#ifndef LORAMILL_WORKER_JOB_H
#define LORAMILL_WORKER_JOB_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/queue.h>

#include "worker/headers.h"
#include "worker/ledger.h"

struct lease {
    atomic_int refs;
    atomic_bool revoked;
    struct ledger_ref ref;
    int32_t partition;
    int priority;               /* of its topic */
    char topic[256];
};

struct lease *lease_new(const char *topic, int32_t partition, struct ledger_ref ref);
struct lease *lease_ref(struct lease *l);
void lease_unref(struct lease *l);
bool lease_revoked(struct lease *l);

/* What was read, byte for byte, behind its job. value NULL: a tombstone. */
struct record {
    const void *key;            /* NULL: none */
    size_t key_len;
    const void *value;
    size_t value_len;
    struct header *headers;
    int n_headers;
    int64_t offset;
    int64_t timestamp_ms;       /* -1: none. The sender's word, mostly: anything up to INT64_MAX */
    bool log_append_time;
};

/* `ms` after the record's stamp, or after `now_ms` if it has none; INT64_MAX: beyond all times. */
int64_t record_deadline_ms(const struct record *r, int64_t ms, int64_t now_ms);
/* Microseconds since its stamp; 0 when it has none, or one of the future. */
int64_t record_age_us(const struct record *r, int64_t now_ms);

enum job_stage {
    JOB_QUEUED, JOB_FETCHING, JOB_READY, JOB_RUNNING, JOB_ANSWERING, JOB_DROPPED, JOB_ENDED
};

enum job_outcome {
    OUTCOME_NONE, OUTCOME_REPLY, OUTCOME_DEAD_LETTER, OUTCOME_DROPPED, OUTCOME_PART
};

/* What is produced for a job: a reply, its dead letter, a notice of that, or a part. */
struct outgoing {
    struct job *job;            /* set when it is sent */
    bool acked;                 /* the broker has it */
    int error;                  /* rd_kafka_resp_err_t of the last try */
    const char *topic;          /* the job's route's, or the configuration's */
    int32_t partition;          /* -1: by key */
    bool asked;                 /* the prompt chose the topic */
    bool follows;               /* the partition is that of the parts before it */
    int trim;                   /* of a dead letter: enum dead_letter_trim */
    void *value;                /* owned unless it is the record's */
    size_t len;
    bool value_owned;
    int attempts;
    int64_t handed_us;          /* to the producer */
    int road;                   /* hold.h's, and the flight on it */
    unsigned flight;
    struct header_list headers; /* last; lent what the record and the configuration have */
};

/* What is counted of a reply when it is acknowledged. */
struct reply_tally {
    enum engine_reason reason;
    bool chat;
    int prompt_tokens, cached_tokens, completion_tokens;
};

struct job {
    /* Set before intake has it; any thread reads them. */
    struct worker *worker;      /* whose it is; for callbacks */
    struct lease *lease;
    struct record record;
    size_t bytes;               /* counted against intake.max_bytes */
    struct job *parent;         /* of a part */
    int64_t received_us;
    /* isolation.c: worker deaths that the group knows of, and of them those while it was alone */
    int pool_deaths, pool_alone;
    bool suspect;               /* must run alone */

    /* Any thread's. */
    atomic_int refs;
    _Atomic(enum job_stage) stage;
    atomic_ullong handle;       /* engine_handle, 0: not known yet */
    atomic_int unreported;      /* records with the client library, plus one while sending */
    atomic_bool cancelled;      /* by an order from topics.control */
    atomic_bool alone_now;      /* its turn: nothing else is in the engine */
    bool entered;               /* in cancels.h's table, with same_bucket; under its lock */
    struct job *same_bucket;

    /* The consumer thread's. */
    bool ordered;               /* in key_order.h's table */
    bool held;                  /* it has it, until its turn */
    bool behind;                /* held: an earlier one of its key is not settled yet */

    /* Whose turn it is. */
    struct job *next;           /* in at most one queue or list */
    size_t reply_bytes;         /* counted against intake.max_bytes, of what is to be sent */
    long long tokens;           /* counted against intake.max_tokens: a guess, once decoded its
                                 * own, and what it may generate from READY until it is */
    struct prompt *prompt;      /* an order to cancel finds it by its id while it is `entered` */
    engine_adapter *adapter;
    struct engine_result *result;       /* gone, as the prompt may be, when the reply is sent */
    struct reply_tally tally;
    lm_status failure;          /* LM_OK: none. What is to be said of it is in `err`, for which */
    struct lm_err *err;         /* there may have been no memory: see job_failure() */
    enum job_outcome outcome;
    struct outgoing *notice;    /* error reply that goes with a dead letter; NULL: none */
    struct stream *stream;      /* of a prompt that asked for parts; stream.h */
    uint64_t journal_key;       /* 0: not known yet */
    int journaled;              /* its slot in the journal, plus 1; 0: none */
    bool runs_alone;            /* the engine has it, and nothing else; worker_enter_engine() */
    bool claimed;               /* its reply is in the object store */
    int attempts;               /* failures that can heal, by the engine */
    int waits;                  /* consecutive waits for something to heal */
    int64_t due_us;             /* when to try again */
    struct job *below;          /* in a job_list */
    bool ends;                  /* its end without the engine waits for something to heal */
    bool awaited;               /* in intake's list of those whose adapters are fetched */
    TAILQ_ENTRY(job) await;     /* there; intake's alone, while the store has the job */
    int64_t decoded_us, fetch_us, submitted_us, answered_us;
    /* Last, as most of both is not touched before it is written, nor is it zeroed: thousands of
     * jobs are more than caches hold. */
    struct outgoing out;
    struct reply_route route;   /* of its reply; of the notice, once it is a dead letter */
};

/* Copies everything out of the arguments. */
lm_status job_new(struct lease *lease, const struct record *from, struct job **out);
/* An empty arena for its prompt, in its own block. Not of a part. */
struct arena *job_arena(struct job *j);
/* A part of a streamed reply: same lease, record and route as the parent. NULL: out of memory. */
struct job *job_child(struct job *parent);
/* Of its record, as it came: key, value, names and values of its headers. Not of a part. */
size_t job_record_bytes(const struct job *j);
/* Tokens of a prompt that is not decoded yet: some three bytes each, and the default max_tokens. */
long long job_tokens_guess(const struct job *j);
struct job *job_ref(struct job *j);
void job_unref(struct job *j);
void job_set_stage(struct job *j, enum job_stage stage);
/* Keeps an error with the job; NULL or LM_OK clears it. Without memory only its text is lost. */
void job_fail(struct job *j, const struct lm_err *err);
/* That error; LM_OK: none, and `why` stays as it is. */
lm_status job_failure(const struct job *j, struct lm_err *why);
void job_clear_out(struct job *j);      /* forgets what was to be produced */
void outgoing_release(struct outgoing *o);

/* ---- queue ------------------------------------------------------------------------------ */

/*
 * FIFO between two threads. Its length is bounded by the admission of jobs (intake.max_messages,
 * in_flight.max_messages), not by itself, so that a push never blocks and never fails.
 */
struct job_queue {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    struct job *head, **tail;
    size_t length;
    bool woken;
};

/* Jobs that gather, to be pushed together; one thread's own. Begins as zeros. */
struct job_chain { struct job *head, *last; size_t length; };

void job_queue_init(struct job_queue *q);
void job_queue_release(struct job_queue *q);            /* drops what is left */
void job_queue_push(struct job_queue *q, struct job *j);
void job_chain_add(struct job_chain *c, struct job *j);
struct job *job_chain_pop(struct job_chain *c);         /* the first; NULL: none */
void job_queue_push_all(struct job_queue *q, struct job_chain *c);      /* and empties it */
/* Everything that is there, in order, after waiting up to timeout_ms for the first; NULL: none. */
struct job *job_queue_take(struct job_queue *q, int timeout_ms);
void job_queue_wake(struct job_queue *q);               /* makes a waiting take return */

/* ---- backoff ---------------------------------------------------------------------------- */

/* Jobs that wait for `due_us`; one thread's own. Begins as zeros. What is looked at for one that is
 * due does not grow with those that are not: in an outage thousands wait, for seconds each. */
struct job_list { struct job *first; };

void job_list_add(struct job_list *l, struct job *j, int64_t due_us);
/* A chain, who is due first at its head; NULL: nobody is. */
struct job *job_list_take_due(struct job_list *l, int64_t now_us);
struct job *job_list_take_all(struct job_list *l);      /* a chain in no order */
/* Milliseconds until something is due, at most `cap`. */
int job_list_wait_ms(const struct job_list *l, int64_t now_us, int cap);

/* Exponential with full jitter over the upper half: base * 2^n, at most max, times 0.5..1. */
int64_t backoff_us(int n, int64_t base_ms, int64_t max_ms);

#endif
