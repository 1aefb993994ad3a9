/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_transaction.c - which finished prompts exactly-once puts into one transaction, and
 * which next when one has failed or had no room. The real producer thread and the real staging, a
 * client library whose transactions end as the test says; the test plays the consumer thread.
 * What real brokers make of it: tests/integration/test_exactly_once.sh, test_commits.sh.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

#include <cmocka.h>

#include "consumer_world.h"
#include "worker/producer_int.h"
#include "worker/transaction.h"

enum { MOST_US = 20 * 1000000, WENT_TO = 3 };

/* ---- the client library ----------------------------------------------------------------- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char said[2048];         /* of each transaction: its prompts' offsets, and how it ended */
static char sizes[256];         /* ... and how many they were */
static int records, fail_next;
static bool fate_unknown;       /* of the transaction that fails next */
static bool none_begins;        /* the next one does not */
static struct outgoing *late;   /* a record that the transaction that fails next did not get in, */
static int late_error;          /* and why */
static int refuse_tenth;        /* so replies of each tenth prompt are refused on the spot */
static const char *_Atomic forbidden;   /* ... and all to that topic */
static const char *silent;      /* nothing comes back of what is sent to that topic */
static bool unfit_error;        /* has refused one of this transaction */
static bool loses;              /* ... nor when it is aborted: it is lost with this client */
static const char *_Atomic unfit;       /* the broker refuses records to that topic */
static const char *barred;      /* the coordinator says that we may not write to that topic */
static const char *_Atomic unread;      /* the group takes no offsets of topics that begin so, */
static rd_kafka_resp_err_t unread_error;        /* why, */
static int unread_us;           /* and how long that takes */
static int lead_at_refusal;     /* which brings leaders, counted down; 0: none does */
static bool acks;               /* others are acknowledged before it says so */
static bool dies, at_its_end;   /* the client, when it refuses a record */
static bool open_now, spoilt;   /* a transaction, and for such a record */
static atomic_int untold, told; /* why the group tells no offsets, and how often it was asked */
static int unending;            /* aborts that are answered, and are not over */
static int stuck;               /* ids whose last transaction does not end */
static atomic_bool led;         /* partitions have leaders */
static atomic_int sent, aborts;         /* records, of all transactions, and ends without commit */
static char wanted[256];        /* of each part of a stream: the partition that it was sent to */

/* A number, unless it is -1, and words. */
static void say(char *text, size_t size, long long n, const char *words)
{
    pthread_mutex_lock(&lock);
    size_t at = strlen(text);
    if (n >= 0)
        at += (size_t)snprintf(text + at, size - at, "%lld", n);
    if (at < size)
        snprintf(text + at, size - at, "%s ", words);
    pthread_mutex_unlock(&lock);
}

static struct producer p;
static atomic_long others;      /* records under way, beside those that are acknowledged at once */
static atomic_int looks;        /* at what is under way */
static atomic_int asked;        /* how often the producer thread wanted to stage */
static atomic_int arrive_once_asked;    /* so often, and the others are acknowledged; 0: not */
static bool behind_others;      /* one was sent while others were under way */

/* These win over the shared library's. */
rd_kafka_error_t *rd_kafka_init_transactions(rd_kafka_t *rk, int timeout_ms)
{
    (void)rk;
    (void)timeout_ms;
    open_now = spoilt = at_its_end = false;
    if (loses && atomic_exchange(&others, 0)) {
        silent = NULL;
        loses = false;
    }
    if (!stuck)
        return NULL;
    stuck--;
    return rd_kafka_error_new(RD_KAFKA_RESP_ERR_CONCURRENT_TRANSACTIONS, "as the test says");
}

int rd_kafka_error_is_retriable(const rd_kafka_error_t *e)
{
    return rd_kafka_error_code(e) == RD_KAFKA_RESP_ERR_CONCURRENT_TRANSACTIONS;
}

static rd_kafka_error_t *forbid(void)
{
    return rd_kafka_error_new(RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED, "as the test says");
}

int rd_kafka_error_is_fatal(const rd_kafka_error_t *e)
{
    return rd_kafka_error_code(e) == RD_KAFKA_RESP_ERR__FATAL;
}

rd_kafka_error_t *rd_kafka_begin_transaction(rd_kafka_t *rk)
{
    (void)rk;
    if (open_now)
        return spoilt ? forbid() : rd_kafka_error_new(RD_KAFKA_RESP_ERR__STATE, "in another");
    if (none_begins) {
        none_begins = false;
        return rd_kafka_error_new(RD_KAFKA_RESP_ERR__TIMED_OUT, "as the test says");
    }
    open_now = true;
    records = 0;
    return NULL;
}

rd_kafka_resp_err_t rd_kafka_producev(rd_kafka_t *rk, ...)
{
    struct outgoing *o = NULL;
    rd_kafka_headers_t *headers = NULL;
    int32_t partition = 0;
    va_list ap;
    va_start(ap, rk);
    for (int type; (type = va_arg(ap, int)) != RD_KAFKA_VTYPE_END;)
        if (type == RD_KAFKA_VTYPE_TOPIC || type == RD_KAFKA_VTYPE_RKT) {
            (void)va_arg(ap, const char *);
        } else if (type == RD_KAFKA_VTYPE_PARTITION) {
            partition = va_arg(ap, int32_t);
        } else if (type == RD_KAFKA_VTYPE_KEY || type == RD_KAFKA_VTYPE_VALUE) {
            (void)va_arg(ap, void *);
            (void)va_arg(ap, size_t);
        } else if (type == RD_KAFKA_VTYPE_HEADERS) {
            headers = va_arg(ap, rd_kafka_headers_t *);
        } else if (type == RD_KAFKA_VTYPE_OPAQUE) {
            o = va_arg(ap, void *);
        } else {
            abort();
        }
    va_end(ap);
    const char *topic = atomic_load(&forbidden);
    if (topic && !strcmp(o->topic, topic))
        return RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
    if (refuse_tenth && o->asked && o->job->record.offset % 10 == 0) {
        at_its_end = dies;
        dies = false;
        return (rd_kafka_resp_err_t)refuse_tenth;
    }
    if (headers)
        rd_kafka_headers_destroy(headers);
    behind_others |= atomic_load(&others) > 0;
    records++;
    atomic_fetch_add(&sent, 1);
    p.under_way--;              /* acknowledged at once */
    if (silent && !strcmp(o->topic, silent))
        atomic_fetch_add(&others, 1);
    topic = atomic_load(&unfit);
    if (topic && !strcmp(o->topic, topic)) {
        o->error = RD_KAFKA_RESP_ERR_POLICY_VIOLATION;
        unfit_error = true;
    }
    if (barred && !strcmp(o->topic, barred))
        spoilt = p.failed = true;       /* as all of it is purged */
    else if (!spoilt)
        o->acked = acks;
    say(said, sizeof said, o->job->record.offset, "");
    if (o->job->parent) {               /* its report says where it went */
        say(wanted, sizeof wanted, partition, partition == RD_KAFKA_PARTITION_UA ? "any" : "");
        o->partition = partition < 0 ? WENT_TO : partition;
    }
    return RD_KAFKA_RESP_ERR_NO_ERROR;
}

rd_kafka_error_t *rd_kafka_send_offsets_to_transaction(
    rd_kafka_t *rk, const rd_kafka_topic_partition_list_t *offsets,
    const rd_kafka_consumer_group_metadata_t *group, int timeout_ms)
{
    (void)rk;
    (void)group;
    (void)timeout_ms;
    const char *none_of = atomic_load(&unread);
    for (int i = 0; !spoilt && i < offsets->cnt; i++)
        if (none_of && !strncmp(offsets->elems[i].topic, none_of, strlen(none_of))) {
            spoilt = true;
            if (lead_at_refusal && !--lead_at_refusal)
                atomic_store(&led, true);
            nanosleep(&(struct timespec){ .tv_nsec = unread_us * 1000 }, NULL);
            return rd_kafka_error_new(unread_error, "as the test says");
        }
    return spoilt ? forbid() : NULL;
}

/* A call that waits for reports. */
static rd_kafka_error_t *wait_longer(void)
{
    p.under_way = atomic_load(&others);
    return rd_kafka_error_new(RD_KAFKA_RESP_ERR_CONCURRENT_TRANSACTIONS, "as the test says");
}

rd_kafka_error_t *rd_kafka_commit_transaction(rd_kafka_t *rk, int timeout_ms)
{
    (void)rk;
    (void)timeout_ms;
    if (spoilt)
        return forbid();
    if (loses && atomic_load(&others))
        return wait_longer();
    if (unfit_error)
        return rd_kafka_error_new(RD_KAFKA_RESP_ERR__INCONSISTENT, "as the test says");
    open_now = false;
    bool fails = fail_next > 0;
    fail_next -= fails;
    if (fails && late)                  /* the report of a record of it */
        late->error = late_error;
    late = NULL;
    say(said, sizeof said, -1, fails ? "aborted," : "committed,");
    say(sizes, sizeof sizes, records, "");
    return fails ? rd_kafka_error_new(RD_KAFKA_RESP_ERR__TIMED_OUT, "as the test says") : NULL;
}

rd_kafka_error_t *rd_kafka_abort_transaction(rd_kafka_t *rk, int timeout_ms)
{
    (void)rk;
    (void)timeout_ms;
    atomic_fetch_add(&aborts, 1);
    if (at_its_end)
        return rd_kafka_error_new(RD_KAFKA_RESP_ERR__FATAL, "as the test says");
    if (loses && atomic_load(&others))
        return wait_longer();
    if (unending) {
        unending--;
        atomic_fetch_add(&p.unanswered.ends, 10);
        return wait_longer();
    }
    open_now = spoilt = unfit_error = false;
    atomic_store(&others, 0);   /* what is queued is purged */
    return NULL;
}

int rd_kafka_error_txn_requires_abort(const rd_kafka_error_t *e)
{
    if (rd_kafka_error_code(e) == RD_KAFKA_RESP_ERR__STATE)
        return false;
    bool known = !fate_unknown;
    fate_unknown = false;
    return known;
}

/* Nothing of a transaction that has failed. */
rd_kafka_resp_err_t rd_kafka_committed(rd_kafka_t *rk, rd_kafka_topic_partition_list_t *l,
                                       int timeout_ms)
{
    (void)rk;
    (void)timeout_ms;
    for (int i = 0; i < l->cnt; i++)
        l->elems[i].err = (rd_kafka_resp_err_t)atomic_load(&untold);
    atomic_fetch_add(&told, 1);
    return RD_KAFKA_RESP_ERR_NO_ERROR;
}

rd_kafka_topic_t *rd_kafka_topic_new(rd_kafka_t *rk, const char *name, rd_kafka_topic_conf_t *c)
{
    (void)rk;
    (void)name;
    (void)c;
    return (rd_kafka_topic_t *)&p;
}

void rd_kafka_topic_destroy(rd_kafka_topic_t *t)
{
    (void)t;
}

rd_kafka_resp_err_t rd_kafka_metadata(rd_kafka_t *rk, int all, rd_kafka_topic_t *only,
                                      const struct rd_kafka_metadata **out, int timeout_ms)
{
    (void)rk;
    (void)all;
    (void)only;
    (void)timeout_ms;
    static rd_kafka_metadata_partition_t part;
    static rd_kafka_metadata_topic_t topic = { .partition_cnt = 1, .partitions = &part };
    static rd_kafka_metadata_t md = { .topic_cnt = 1, .topics = &topic };
    part.leader = atomic_load(&led) ? 1 : -1;
    *out = &md;
    return RD_KAFKA_RESP_ERR_NO_ERROR;
}

void rd_kafka_metadata_destroy(const struct rd_kafka_metadata *md)
{
    (void)md;
}

rd_kafka_resp_err_t rd_kafka_fatal_error(rd_kafka_t *rk, char *why, size_t size)
{
    (void)rk;
    if (why && size)
        *why = '\0';
    return at_its_end ? RD_KAFKA_RESP_ERR__FATAL : RD_KAFKA_RESP_ERR_NO_ERROR;
}

int rd_kafka_poll(rd_kafka_t *rk, int timeout_ms)
{
    (void)rk;
    (void)timeout_ms;
    p.under_way = atomic_load(&others);
    atomic_fetch_add(&looks, 1);
    return 0;
}

rd_kafka_resp_err_t rd_kafka_flush(rd_kafka_t *rk, int timeout_ms)
{
    (void)rk;
    (void)timeout_ms;
    int often = atomic_load(&arrive_once_asked);
    if (often && atomic_load(&asked) >= often)
        atomic_store(&others, 0);
    p.under_way = atomic_load(&others);
    atomic_fetch_add(&looks, 1);
    return RD_KAFKA_RESP_ERR_NO_ERROR;
}

rd_kafka_resp_err_t rd_kafka_purge(rd_kafka_t *rk, int flags)
{
    (void)rk;
    (void)flags;
    return RD_KAFKA_RESP_ERR_NO_ERROR;
}

/* ---- the worker ------------------------------------------------------------------------- */

static struct world *x;

static int open_world(void **state)
{
    (void)state;
    x = world_open();
    x->cfg.commit_interval_ms = 3600000;
    x->cfg.retry_backoff_max_ms = 1;
    x->cfg.transaction_interval_ms = 1;
    x->c.exactly_once = true;
    x->w.consumer = &x->c;
    atomic_store(&x->w.started, true);
    p = (struct producer){ .w = &x->w, .exactly_once = true };
    job_queue_init(&p.inbox);
    said[0] = sizes[0] = wanted[0] = '\0';
    atomic_store(&asked, 0);
    atomic_store(&arrive_once_asked, 0);
    fail_next = refuse_tenth = stuck = unending = 0;
    behind_others = false;
    silent = barred = NULL;
    atomic_store(&forbidden, NULL);
    atomic_store(&unread, NULL);
    unread_us = lead_at_refusal = 0;
    unread_error = RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
    atomic_store(&unfit, NULL);
    open_now = spoilt = unfit_error = acks = loses = dies = at_its_end = none_begins = false;
    atomic_store(&led, true);
    x->w.producer = &p;
    atomic_store(&sent, 0);
    atomic_store(&untold, 0);
    atomic_store(&told, 0);
    atomic_store(&others, 0);
    atomic_store(&aborts, 0);
    return 0;
}

static void begin(void)
{
    assert_int_equal(pthread_create(&p.thread, NULL, transaction_main, &p), 0);
}

static int close_world(void **state)
{
    (void)state;
    atomic_store(&p.end, true);
    while (!atomic_load(&p.over))
        staging_serve(&x->c);
    pthread_join(p.thread, NULL);
    consumer_take_finished(&x->c, 0);
    job_queue_release(&p.inbox);
    world_close(x);
    return 0;
}

/* Reads prompts; `jobs` are theirs. */
static void read_prompts(struct job **jobs, int first, int n)
{
    for (int i = first; i < first + n; i++) {
        jobs[i] = world_deliver(x, i, NULL);
        jobs[i]->worker = &x->w;
        jobs[i]->outcome = OUTCOME_REPLY;
        x->c.held++;
    }
}

static void finish(struct job **jobs, int first, int n)
{
    for (int i = first; i < first + n; i++)
        producer_send(&p, jobs[i]);
}

/* What comes after it has looked is for the next turn, so that each request is counted. */
static void turn(void)
{
    pthread_mutex_lock(&x->c.staging.lock);
    bool any = x->c.staging.asked;
    asked += any && x->c.staging.what == STAGING_STAGE;
    pthread_mutex_unlock(&x->c.staging.lock);
    if (any)
        staging_serve(&x->c);
    consumer_take_finished(&x->c, 1);
}

/* The next transaction fails, for this record did not get in. */
static void fail_with(struct outgoing *o, int error)
{
    fail_next = 1;
    late = o;
    late_error = error;
}

static void until_in_flight(int n)
{
    for (int64_t end = lm_now_us() + MOST_US; (int)ledger_in_flight(x->c.ledger) > n; turn())
        if (lm_now_us() > end)
            fail_msg("%d are not committed: %s", (int)ledger_in_flight(x->c.ledger), said);
}

/* The producer thread counts them each time around. */
static void until_aside(int n)
{
    for (int64_t end = lm_now_us() + MOST_US; atomic_load(&x->w.metrics.aside) != n; turn())
        assert_true(lm_now_us() < end);
}

/* A transaction for offsets alone may be on its way when the last ones come, and want another. */
static void until_wanted_offsets_are_all(void)
{
    for (int64_t end = lm_now_us() + MOST_US; ledger_in_flight(x->c.ledger); turn()) {
        assert_true(lm_now_us() < end);
        producer_want_offsets(&p);
    }
}

static void turn_for_ms(int ms)
{
    for (int64_t end = lm_now_us() + ms * 1000; lm_now_us() < end;)
        turn();
}

static void have_no_map(void)
{
    x->c.map_limit = 0;
    ledger_set_map_limit(x->c.ledger, 0);
}

/* ---- tests ------------------------------------------------------------------------------ */

enum { WAITED_FOR = 5, FULL = 4, BOTH = WAITED_FOR + FULL };

/* There is no map, and a transaction's worth of prompts waits for earlier ones. */
static void wait_without_room(struct job **jobs)
{
    have_no_map();
    x->cfg.transaction_max_messages = FULL;
    read_prompts(jobs, 0, BOTH);
    finish(jobs, WAITED_FOR, FULL);
    begin();
}

/* It is the earlier ones, which end later. */
static void what_has_no_room_lets_others_pass(void **state)
{
    (void)state;
    struct job *jobs[BOTH];
    wait_without_room(jobs);
    while (asked < 3)
        turn();
    assert_string_equal(said, "");
    finish(jobs, 0, WAITED_FOR);
    until_in_flight(0);
}

/* ... and while nothing else is there they are looked at every 100 ms, not all the time. */
static void what_has_no_room_is_looked_at_now_and_then(void **state)
{
    (void)state;
    struct job *jobs[BOTH];
    wait_without_room(jobs);
    int64_t start = lm_now_us();
    while (lm_now_us() - start < 700000)
        turn();
    assert_in_range(asked, 1, 2 + (lm_now_us() - start) / 100000);
    assert_string_equal(said, "");
    finish(jobs, 0, WAITED_FOR);
    until_in_flight(0);
}

/* Each failure in a row halves the next one, by number ... */
static void a_transaction_that_failed_is_followed_by_a_smaller_one(void **state)
{
    (void)state;
    struct job *jobs[65];
    x->cfg.transaction_max_messages = 64;
    x->cfg.transaction_interval_ms = 3600000;       /* only full ones */
    fail_next = 8;
    read_prompts(jobs, 0, 65);
    finish(jobs, 0, 64);
    begin();
    until_in_flight(64);
    assert_string_equal(sizes, "64 32 16 8 4 2 1 1 1 ");
    finish(jobs, 64, 1);
    until_in_flight(0);                             /* and after one that is committed it is over */
    assert_string_equal(sizes, "64 32 16 8 4 2 1 1 1 64 ");
}

/* ... and by bytes. */
static void a_transaction_that_failed_is_followed_by_a_shorter_one(void **state)
{
    (void)state;
    struct job *jobs[64];
    x->cfg.transaction_max_messages = 64;
    fail_next = 7;
    read_prompts(jobs, 0, 64);
    for (int i = 0; i < 64; i++)
        jobs[i]->out.len = 1 << 20;
    finish(jobs, 0, 64);
    begin();
    until_in_flight(0);
    assert_string_equal(sizes, "32 16 8 4 2 1 1 1 32 31 ");
}

/* ---- portions --------------------------------------------------------------------------- */

enum { MANY = 2000, PORTION = 500 };    /* transaction.c: an eighth, and that at least */

static void fill_slowly(struct job **jobs)
{
    x->cfg.transaction_max_messages = MANY;
    x->cfg.transaction_interval_ms = 600000;        /* only full ones */
    p.transaction_timeout_ms = 4 * 600000;
    read_prompts(jobs, 0, MANY);
}

static void until_sent(int n)
{
    for (int64_t end = lm_now_us() + MOST_US; atomic_load(&sent) < n; turn())
        if (lm_now_us() > end)
            fail_msg("%d records are sent, not %d", atomic_load(&sent), n);
}

/* A transaction has begun, and its first portion is on its way. */
static void send_a_portion(struct job **jobs)
{
    fill_slowly(jobs);
    finish(jobs, 0, PORTION);
    begin();
    until_sent(PORTION);
}

/* Records travel while their transaction fills, and all of them are of one. */
static void what_finishes_early_is_sent_early(void **state)
{
    (void)state;
    struct job *jobs[MANY];
    send_a_portion(jobs);
    finish(jobs, PORTION, PORTION - 1);             /* no portion yet */
    turn_for_ms(50);
    assert_int_equal(atomic_load(&sent), PORTION);
    assert_string_equal(sizes, "");
    assert_int_equal(ledger_in_flight(x->c.ledger), MANY);
    finish(jobs, 2 * PORTION - 1, MANY - 2 * PORTION + 1);
    until_in_flight(0);
    assert_string_equal(sizes, "2000 ");
    assert_int_equal(atomic_load(&aborts), 0);
}

/* ... but not behind others: the client library would poll without a pause. */
static void a_portion_waits_for_what_is_under_way(void **state)
{
    (void)state;
    struct job *jobs[MANY];
    fill_slowly(jobs);
    atomic_store(&others, 1);
    finish(jobs, 0, PORTION);
    begin();
    turn_for_ms(50);
    assert_int_equal(atomic_load(&sent), 0);
    atomic_store(&others, 0);
    until_sent(PORTION);
    atomic_store(&others, 1);
    finish(jobs, PORTION, MANY - PORTION);          /* full: its end waits for nobody */
    until_in_flight(0);
    assert_string_equal(sizes, "2000 ");
}

/* The producer thread knows: a look that has begun may not have seen them, the next one has. */
static void others_are_under_way(void)
{
    atomic_store(&others, 1);
    int before = atomic_load(&looks);
    for (int64_t end = lm_now_us() + MOST_US; atomic_load(&looks) < before + 2; turn())
        if (lm_now_us() > end)
            fail_msg("the producer thread does not look at what is under way");
}

/* Once it is full, the next portion is staged while the one before is on its way. */
static void a_portion_is_staged_behind_what_is_under_way(void **state)
{
    (void)state;
    struct job *jobs[MANY];
    send_a_portion(jobs);
    atomic_store(&arrive_once_asked, 2);
    others_are_under_way();
    finish(jobs, PORTION, MANY - PORTION);
    until_in_flight(0);
    assert_false(behind_others);
    assert_string_equal(sizes, "2000 ");
}

/* However many are ready, what is handed over at once is half of a transaction. */
static void a_portion_has_a_limit(void **state)
{
    (void)state;
    struct job *jobs[MANY];
    fill_slowly(jobs);
    finish(jobs, 0, MANY);
    begin();
    until_in_flight(0);
    assert_int_equal(asked, 2);
    assert_string_equal(sizes, "2000 ");
}

/* ... nor where it would be open for long. */
static void nothing_is_sent_early_into_a_long_transaction(void **state)
{
    (void)state;
    struct job *jobs[MANY];
    fill_slowly(jobs);
    p.transaction_timeout_ms--;
    finish(jobs, 0, MANY - 1);
    begin();
    turn_for_ms(100);
    assert_int_equal(atomic_load(&sent), 0);
    finish(jobs, MANY - 1, 1);
    until_in_flight(0);
    assert_string_equal(sizes, "2000 ");
}

/* What failed as a whole is made again as it is, in smaller ones. */
static void a_failure_takes_all_portions_back(void **state)
{
    (void)state;
    struct job *jobs[MANY];
    send_a_portion(jobs);
    fail_next = 1;
    finish(jobs, PORTION, MANY - PORTION);
    until_in_flight(MANY / 2);
    assert_string_equal(sizes, "2000 1000 ");
    producer_want_offsets(&p);
    until_in_flight(0);
    assert_int_equal(atomic_load(&sent), 2 * MANY);
}

/* Its partition is another's now: the open transaction can't tell where it stands, and must not
 * become visible. */
static void what_was_sent_of_a_lost_partition_is_taken_back(void **state)
{
    (void)state;
    struct job *jobs[MANY];
    send_a_portion(jobs);
    ledger_revoke(x->c.ledger, x->part.ref);
    finish(jobs, PORTION, MANY - PORTION);
    for (int64_t end = lm_now_us() + MOST_US; x->c.held; turn()) {
        if (atomic_load(&aborts))
            producer_want_offsets(&p);      /* the next one, in which they would be */
        if (lm_now_us() > end)
            fail_msg("%lld are held still", x->c.held);
    }
    assert_string_equal(sizes, "");
    assert_int_equal(atomic_load(&aborts), 1);
    assert_int_equal(atomic_load(&sent), PORTION);
    assert_int_equal(atomic_load(&x->w.metrics.dropped), MANY);
}

/* There is no map: a portion that waits for a prompt which is still at work is not sent, nor looked
 * at without a pause; the transaction ends without it. */
static void a_portion_without_room_ends_the_transaction(void **state)
{
    (void)state;
    struct job *jobs[MANY];
    have_no_map();
    send_a_portion(jobs);
    finish(jobs, PORTION + 1, PORTION);
    until_in_flight(MANY - PORTION);
    assert_string_equal(sizes, "500 ");
    int before = asked;
    int64_t start = lm_now_us();
    turn_for_ms(500);
    assert_in_range(asked - before, 0, 2 + (lm_now_us() - start) / 100000);
    assert_int_equal(atomic_load(&sent), PORTION);
    finish(jobs, PORTION, 1);
    finish(jobs, 2 * PORTION + 1, MANY - 2 * PORTION - 1);
    producer_want_offsets(&p);
    until_in_flight(0);
    assert_int_equal(atomic_load(&aborts), 0);
}

/* The consumer has ended while a transaction fills: its readers wait for the brokers' timeout
 * otherwise. */
static void an_open_transaction_is_aborted_at_the_end(void **state)
{
    (void)state;
    struct job *jobs[MANY];
    send_a_portion(jobs);
    atomic_store(&x->w.drain_end_us, lm_now_us());
    atomic_store(&x->w.stopping, true);
    atomic_store(&x->w.cancelling, true);
    staging_close(&x->c);
    turn_for_ms(300);
    atomic_store(&p.end, true);
    for (int64_t end = lm_now_us() + MOST_US; !atomic_load(&p.over) && lm_now_us() < end;)
        turn();
    assert_string_equal(sizes, "");
    assert_int_equal(atomic_load(&aborts), 1);
    for (int i = PORTION; i < MANY; i++)
        worker_end_job(&x->w, jobs[i], OUTCOME_DROPPED);
}

/* ---- records that are not taken -------------------------------------------------------------- */

static char gone[] = "gone", dead[] = "dead", group[] = "g";

static void begin_with_clients(void)
{
    static char mode[] = "at-least-once";   /* theirs; they are not to be told of transactions */
    x->cfg.delivery_mode = mode;
    x->w.credentials = credentials_new(&x->cfg);
    snprintf(x->w.name, sizeof x->w.name, "w");
    begin();
}

static void end_with_clients(void)
{
    atomic_store(&p.end, true);
    while (!atomic_load(&p.over))
        turn();
    turn();                             /* what it has dropped at last */
    producer_close(&p);
    credentials_free(x->w.credentials);
}

static void ask_for(struct outgoing *o)
{
    o->topic = gone;
    o->partition = 7;
    o->asked = true;
}

/* Each prompt has chosen a partition. */
static void choose(struct job **jobs, int first, int n)
{
    x->cfg.topics_dead_letters = dead;
    x->cfg.group_id = group;
    for (int i = first; i < first + n; i++)
        ask_for(&jobs[i]->out);
}

/* The client may keep to brokers of before: one transaction's time is enough to find out. */
static void what_is_not_taken_in_time_brings_a_new_producer(void **state)
{
    (void)state;
    struct job *jobs[2];
    x->cfg.transaction_max_messages = 1;
    read_prompts(jobs, 0, 2);
    choose(jobs, 0, 2);
    fail_next = 1;
    finish(jobs, 0, 1);
    begin_with_clients();
    until_in_flight(1);                 /* aborted as the group went on, for example: no reason */
    assert_int_equal(atomic_load(&x->w.metrics.producer_rebuilds), 0);
    fail_with(&jobs[1]->out, RD_KAFKA_RESP_ERR__MSG_TIMED_OUT);
    finish(jobs, 1, 1);
    until_in_flight(0);
    assert_int_equal(atomic_load(&x->w.metrics.producer_rebuilds), 1);
    assert_string_equal(sizes, "1 1 1 1 ");
    end_with_clients();
}

/* ... but not another one where a new one was made to find out what became of it. */
static void one_new_producer_is_enough(void **state)
{
    (void)state;
    struct job *jobs[1];
    x->cfg.transaction_max_messages = 1;
    read_prompts(jobs, 0, 1);
    choose(jobs, 0, 1);
    fate_unknown = true;
    fail_with(&jobs[0]->out, RD_KAFKA_RESP_ERR__MSG_TIMED_OUT);
    finish(jobs, 0, 1);
    begin_with_clients();
    until_in_flight(0);
    assert_int_equal(atomic_load(&x->w.metrics.producer_rebuilds), 1);
    assert_string_equal(sizes, "1 1 ");
    end_with_clients();
}

/* Nobody knows what became of it while we may not read its prompts' topic: it is not sent again. */
static void what_the_group_does_not_tell_is_asked_again(void **state)
{
    (void)state;
    struct job *jobs[1];
    x->cfg.transaction_max_messages = 1;
    read_prompts(jobs, 0, 1);
    fate_unknown = true;
    fail_next = 1;
    atomic_store(&untold, RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED);
    finish(jobs, 0, 1);
    begin_with_clients();
    for (int64_t end = lm_now_us() + MOST_US; atomic_load(&told) < 3; turn())
        assert_true(lm_now_us() < end);
    assert_int_equal(atomic_load(&sent), 1);
    atomic_store(&untold, RD_KAFKA_RESP_ERR_NO_ERROR);
    until_in_flight(0);
    assert_int_equal(atomic_load(&sent), 2);
    end_with_clients();
}

/* Neither does a record come whose partition went away under it, nor the end of its transaction,
 * until there is a new client: while it is committed, ... */
static void a_report_that_does_not_come_brings_a_new_producer(void **state)
{
    (void)state;
    struct job *jobs[2];
    x->cfg.transaction_max_messages = 2;
    read_prompts(jobs, 0, 2);
    jobs[0]->out.topic = "kept";
    jobs[1]->out.topic = silent = gone;
    loses = true;
    finish(jobs, 0, 2);
    begin_with_clients();
    until_in_flight(0);
    assert_int_equal(atomic_load(&x->w.metrics.producer_rebuilds), 1);
    assert_string_equal(sizes, "1 1 ");         /* what failed as a whole is smaller */
    end_with_clients();
}

/* ... and while it is aborted. */
static void a_report_that_does_not_come_holds_up_no_abort(void **state)
{
    (void)state;
    struct job *jobs[2];
    x->cfg.transaction_max_messages = 2;
    read_prompts(jobs, 0, 2);
    jobs[0]->out.topic = silent = gone;
    jobs[1]->out.topic = barred = "barred";
    loses = true;
    finish(jobs, 0, 2);
    begin_with_clients();
    until_in_flight(1);                 /* who is barred waits */
    assert_int_equal(atomic_load(&x->w.metrics.producer_rebuilds), 1);
    end_with_clients();
}

static long long dead_letters(void)
{
    return (long long)atomic_load(&x->w.metrics.dead_letters[LM_NOT_FOUND]);
}

/* What the client refuses on the spot never enters the transaction, which passes it by: neither is
 * it finished by that, nor do the others wait. */
static void what_is_refused_on_the_spot_costs_the_others_nothing(void **state)
{
    (void)state;
    struct job *jobs[100];
    x->cfg.transaction_max_messages = 100;
    x->cfg.transaction_interval_ms = 3600000;       /* only full ones */
    read_prompts(jobs, 0, 100);
    choose(jobs, 0, 100);
    refuse_tenth = RD_KAFKA_RESP_ERR__UNKNOWN_PARTITION;
    finish(jobs, 0, 100);
    begin();
    until_in_flight(10);
    assert_string_equal(sizes, "90 ");
    struct ledger_commit due = { .ref = x->part.ref };
    ledger_due(x->c.ledger, x->part.ref, true, &due);
    assert_int_equal(due.offset, 0);
    producer_want_offsets(&p);
    until_in_flight(0);
    assert_string_equal(sizes, "90 10 ");
    assert_int_equal(atomic_load(&aborts), 0);
    assert_int_equal(dead_letters(), 10);
}

/* ... in a portion that is sent early as well, and their dead letters go in the same one. */
static void what_is_refused_early_is_a_dead_letter_at_once(void **state)
{
    (void)state;
    struct job *jobs[MANY];
    fill_slowly(jobs);
    choose(jobs, 0, PORTION);
    refuse_tenth = RD_KAFKA_RESP_ERR__UNKNOWN_TOPIC;
    finish(jobs, 0, PORTION);
    begin();
    until_sent(PORTION - PORTION / 10);
    finish(jobs, PORTION, MANY - PORTION - PORTION / 10);
    until_in_flight(PORTION / 10);
    assert_string_equal(sizes, "1950 ");
    assert_int_equal(atomic_load(&aborts), 0);
    assert_int_equal(dead_letters(), PORTION / 10);
    finish(jobs, MANY - PORTION / 10, PORTION / 10);
    until_wanted_offsets_are_all();
}

/* The client comes to its end meanwhile: they are judged when there is a new one. */
static void what_is_refused_by_a_client_at_its_end_is_judged_by_the_next(void **state)
{
    (void)state;
    struct job *jobs[10];
    x->cfg.transaction_max_messages = 10;
    x->cfg.transaction_interval_ms = 3600000;
    read_prompts(jobs, 0, 10);
    choose(jobs, 0, 10);
    refuse_tenth = RD_KAFKA_RESP_ERR__UNKNOWN_TOPIC;
    dies = true;
    finish(jobs, 0, 10);
    begin_with_clients();
    for (int64_t end = lm_now_us() + MOST_US; lm_now_us() < end && !dead_letters(); turn())
        producer_want_offsets(&p);
    assert_int_equal(atomic_load(&x->w.metrics.producer_rebuilds), 1);
    assert_int_equal(atomic_load(&x->w.metrics.dropped), 0);
    until_in_flight(0);
    end_with_clients();
}

/* A report costs an abort, and nobody else a smaller transaction; the next one is of them alone,
 * for who comes new may be refused again. */
static void who_is_refused_later_goes_and_the_others_commit(void **state)
{
    (void)state;
    struct job *jobs[64];
    x->cfg.transaction_max_messages = 64;
    x->cfg.transaction_interval_ms = 3600000;
    x->cfg.retry_backoff_max_ms = 3600000;          /* of which there is none */
    read_prompts(jobs, 0, 64);
    choose(jobs, 0, 64);
    fail_with(&jobs[5]->out, RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART);
    finish(jobs, 0, 64);
    begin();
    producer_want_offsets(&p);
    until_in_flight(1);
    assert_string_equal(sizes, "64 63 ");
    producer_want_offsets(&p);
    until_in_flight(0);
    assert_string_equal(sizes, "64 63 1 ");
    assert_int_equal(dead_letters(), 1);
}

/* It goes again, and before anything of it is sent that fails: the refusal was of the last time. */
static void a_refusal_is_judged_once(void **state)
{
    (void)state;
    struct job *jobs[1];
    x->cfg.transaction_max_messages = 1;
    read_prompts(jobs, 0, 1);
    choose(jobs, 0, 1);
    jobs[0]->out.error = RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
    none_begins = true;
    finish(jobs, 0, 1);
    begin();
    until_in_flight(0);
    assert_string_equal(sizes, "1 ");
    assert_int_equal(dead_letters(), 0);
}

/* A dead letter whose requester is to be told. */
static struct job *with_notice(struct job **jobs)
{
    read_prompts(jobs, 0, 1);
    x->cfg.topics_dead_letters = dead;
    x->cfg.group_id = group;
    jobs[0]->outcome = OUTCOME_DEAD_LETTER;
    jobs[0]->out.topic = dead;
    jobs[0]->notice = lm_calloc(1, sizeof *jobs[0]->notice);
    ask_for(jobs[0]->notice);
    return jobs[0];
}

/* The notice is left out; the dead letter was aborted with it, and goes again. */
static void a_notice_that_is_refused_later_is_left_out(void **state)
{
    (void)state;
    struct job *jobs[1];
    fail_with(with_notice(jobs)->notice, RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART);
    finish(jobs, 0, 1);
    begin();
    until_in_flight(0);
    assert_string_equal(sizes, "2 1 ");
}

static void a_notice_that_is_refused_on_the_spot_is_left_out(void **state)
{
    (void)state;
    struct job *jobs[1];
    with_notice(jobs);
    refuse_tenth = RD_KAFKA_RESP_ERR__UNKNOWN_PARTITION;
    finish(jobs, 0, 1);
    begin();
    until_in_flight(0);
    assert_string_equal(sizes, "1 ");
    assert_int_equal(atomic_load(&aborts), 0);
}

/* ---- topics that take nothing -------------------------------------------------------------- */

enum { SOME = 20, OF_TOPIC = 5 };

/* The first five are to a topic whose leader is away: one transaction finds out. */
static void lose_a_leader(struct job **jobs)
{
    if (!x->cfg.transaction_max_messages)
        x->cfg.transaction_max_messages = 64;
    x->cfg.retry_backoff_ms = 1;
    read_prompts(jobs, 0, SOME);
    choose(jobs, 0, OF_TOPIC);
    for (int i = OF_TOPIC; i < SOME; i++)
        jobs[i]->out.topic = dead;
    atomic_store(&led, false);
    fail_with(&jobs[0]->out, RD_KAFKA_RESP_ERR__MSG_TIMED_OUT);
    finish(jobs, 0, SOME - 1);
    begin_with_clients();
    until_in_flight(OF_TOPIC + 1);
}

/* All that is for it waits, and nothing else. Then they go one by one at first. */
static void a_topic_that_takes_nothing_holds_up_no_other(void **state)
{
    (void)state;
    struct job *jobs[SOME];
    lose_a_leader(jobs);
    assert_string_equal(sizes, "19 14 ");
    ask_for(&jobs[SOME - 1]->out);                  /* one more for it */
    finish(jobs, SOME - 1, 1);
    turn_for_ms(200);
    assert_string_equal(sizes, "19 14 ");
    assert_int_equal(ledger_in_flight(x->c.ledger), OF_TOPIC + 1);
    until_aside(OF_TOPIC + 1);
    atomic_store(&led, true);
    until_in_flight(0);
    assert_string_equal(sizes, "19 14 1 2 3 ");
    end_with_clients();
}

/* ... and all at once when many have been taken. */
static void a_topic_that_has_taken_many_is_as_any_other(void **state)
{
    (void)state;
    struct job *jobs[600];
    x->cfg.transaction_max_messages = 1000;
    lose_a_leader(jobs);
    finish(jobs, SOME - 1, 1);
    until_in_flight(OF_TOPIC);
    read_prompts(jobs, SOME, 600 - SOME);
    choose(jobs, SOME, 600 - SOME);
    finish(jobs, SOME, 600 - SOME);
    turn_for_ms(100);
    sizes[0] = '\0';
    atomic_store(&led, true);
    until_in_flight(0);
    assert_string_equal(sizes, "1 2 4 8 16 32 64 458 ");
    end_with_clients();
}

/* It has a leader, which takes nothing. */
static void a_try_in_vain_holds_up_no_other(void **state)
{
    (void)state;
    struct job *jobs[SOME];
    silent = gone;
    lose_a_leader(jobs);
    atomic_store(&led, true);
    for (int64_t end = lm_now_us() + MOST_US; atomic_load(&aborts) < 2; turn())
        assert_true(lm_now_us() < end);
    finish(jobs, SOME - 1, 1);
    until_in_flight(OF_TOPIC);
    assert_int_equal(atomic_load(&x->w.metrics.dropped), 0);
    end_with_clients();
    assert_int_equal(atomic_load(&x->w.metrics.dropped), OF_TOPIC);
}

/* The usual one, so these are no dead letters: they wait, and nothing is aborted for them. */
static void a_forbidden_topic_holds_up_no_other(void **state)
{
    (void)state;
    struct job *jobs[SOME];
    x->cfg.transaction_max_messages = 64;
    x->cfg.retry_backoff_ms = 1;
    read_prompts(jobs, 0, SOME);
    for (int i = 0; i < SOME; i++)
        jobs[i]->out.topic = i < OF_TOPIC ? gone : dead;
    atomic_store(&forbidden, gone);
    finish(jobs, 0, SOME);
    begin();
    until_in_flight(OF_TOPIC);
    turn_for_ms(50);
    assert_int_equal(ledger_in_flight(x->c.ledger), OF_TOPIC);
    assert_int_equal(atomic_load(&sent), SOME - OF_TOPIC);
    assert_int_equal(atomic_load(&aborts), 0);
    atomic_store(&forbidden, NULL);
    until_in_flight(0);
    assert_int_equal(atomic_load(&sent), SOME);
}

/* Nor does one that the broker refuses for a reason of its own, whichever. */
static void a_topic_whose_broker_refuses_holds_up_no_other(void **state)
{
    (void)state;
    struct job *jobs[SOME];
    x->cfg.transaction_max_messages = 64;
    x->cfg.retry_backoff_ms = 1;
    read_prompts(jobs, 0, SOME);
    for (int i = 0; i < SOME; i++)
        jobs[i]->out.topic = i < OF_TOPIC ? gone : dead;
    atomic_store(&unfit, gone);
    finish(jobs, 0, SOME);
    begin();
    until_in_flight(OF_TOPIC);
    atomic_store(&unfit, NULL);
    until_in_flight(0);
}

/* A dead letter with a notice, among replies to another topic. */
static void lead_with_notice(struct job **jobs)
{
    with_notice(jobs);
    x->cfg.transaction_max_messages = 64;
    x->cfg.retry_backoff_ms = 1;
    read_prompts(jobs, 1, SOME - 1);
    for (int i = 1; i < SOME; i++)
        jobs[i]->out.topic = group;
}

/* The coordinator does not say which topic it is: the notice is left out first, and that was it. */
static void a_notice_to_a_forbidden_topic_is_left_out(void **state)
{
    (void)state;
    struct job *jobs[SOME];
    lead_with_notice(jobs);
    barred = gone;
    finish(jobs, 0, SOME);
    begin();
    until_in_flight(0);
    assert_true(said[0] && strstr(sizes, "1 "));
    assert_int_equal(atomic_load(&x->w.metrics.dead_letters[LM_INTERNAL]), 1);
}

/* Where its topic is the usual one, too, which waits if it is a reply's. */
static void a_notice_to_the_usual_topic_is_left_out(void **state)
{
    (void)state;
    struct job *jobs[SOME];
    lead_with_notice(jobs);
    jobs[0]->notice->asked = false;
    jobs[0]->notice->partition = -1;
    barred = gone;
    finish(jobs, 0, SOME);
    begin();
    until_in_flight(0);
}

/* Nor does a dead letter wait for a leader of its notice's topic. */
static void a_notice_without_a_leader_is_left_out(void **state)
{
    (void)state;
    struct job *jobs[SOME];
    lead_with_notice(jobs);
    atomic_store(&led, false);
    fail_with(jobs[0]->notice, RD_KAFKA_RESP_ERR__MSG_TIMED_OUT);
    finish(jobs, 0, SOME);
    begin_with_clients();
    until_in_flight(0);
    end_with_clients();
}

/* ... also when its own topic was tried, and has a leader again. */
static void a_notice_that_does_not_arrive_is_left_out(void **state)
{
    (void)state;
    struct job *jobs[SOME];
    lead_with_notice(jobs);
    acks = true;
    silent = gone;
    fail_with(&jobs[0]->out, RD_KAFKA_RESP_ERR__MSG_TIMED_OUT);
    finish(jobs, 0, SOME);
    begin_with_clients();
    until_in_flight(0);
    end_with_clients();
}

/* One prompt has found out that its topic is forbidden: the next ones cost nobody an abort. */
static void a_forbidden_topic_is_found_out_once(void **state)
{
    (void)state;
    struct job *jobs[SOME];
    x->cfg.transaction_max_messages = 64;
    x->cfg.retry_backoff_ms = 1;
    read_prompts(jobs, 0, SOME);
    choose(jobs, 0, OF_TOPIC);
    for (int i = OF_TOPIC; i < SOME; i++)
        jobs[i]->out.topic = group;
    barred = gone;
    finish(jobs, 0, 1);
    finish(jobs, OF_TOPIC, 5);
    begin();
    until_in_flight(SOME - 6);
    assert_int_equal(dead_letters(), 1);
    assert_in_range(atomic_load(&aborts), 2, 3);        /* all; its own; */
    int before = atomic_load(&aborts);
    finish(jobs, 1, OF_TOPIC - 1);
    finish(jobs, OF_TOPIC + 5, SOME - OF_TOPIC - 5);
    until_in_flight(0);
    assert_int_equal(dead_letters(), OF_TOPIC);
    assert_in_range(atomic_load(&aborts) - before, 1, OF_TOPIC - 1);   /* tries of it */
}

/* ---- prompt topics whose offsets are refused ----------------------------------------------- */

static struct assigned both[2];

/* Every second prompt is of another topic. */
static void read_of_two_topics(struct job **jobs)
{
    both[0] = x->part;
    both[1] = (struct assigned){ .partition = 0 };
    assert_int_equal(ledger_assign(x->c.ledger, "u", 0, 0, &both[1].ref), LM_OK);
    both[1].lease = lease_new("u", 0, both[1].ref);
    x->c.parts = both;
    x->c.n_parts = 2;
    x->cfg.transaction_max_messages = 64;
    x->cfg.retry_backoff_ms = 1;
    for (int i = 0; i < SOME; i++) {
        x->part = both[i % 2];
        read_prompts(jobs, i, 1);
        jobs[i]->out.topic = i % 4 < 2 ? group : dead;
    }
    x->part = both[0];
}

static void forget_the_second(void)
{
    ledger_revoke(x->c.ledger, both[1].ref);
    lease_unref(both[1].lease);
    x->c.n_parts = 1;
}

static int64_t committed(const struct assigned *a)
{
    struct ledger_info info;
    assert_true(ledger_get(x->c.ledger, a->ref, &info));
    return info.committed;
}

/* We may not read it any more, or it was deleted. The others' prompts commit, and no topic of
 * replies is held to be at fault. */
static void only_prompts_of_a_refused_topic_wait(rd_kafka_resp_err_t why)
{
    struct job *jobs[SOME];
    read_of_two_topics(jobs);
    atomic_store(&unread, "u");
    unread_error = why;
    finish(jobs, 0, SOME);
    begin();
    until_in_flight(SOME / 2);
    assert_int_equal(committed(&both[0]), SOME - 1);
    assert_int_equal(committed(&both[1]), 0);
    assert_null(p.aside.topics);
    turn_for_ms(50);
    assert_int_equal(ledger_in_flight(x->c.ledger), SOME / 2);
    until_aside(SOME / 2);
    atomic_store(&unread, NULL);
    until_in_flight(0);
    assert_int_equal(committed(&both[1]), SOME);
    forget_the_second();
}

static void a_topic_that_may_not_be_read_holds_up_no_other(void **state)
{
    (void)state;
    only_prompts_of_a_refused_topic_wait(RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED);
}

static void a_topic_that_is_no_more_holds_up_no_other(void **state)
{
    (void)state;
    only_prompts_of_a_refused_topic_wait(RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART);
}

/* A reply topic has no leader, and then a prompt topic is withheld: what was set aside and is of it
 * waits for its own topic, as it would if it came now. It is not tried in vain with the reply's. */
static void what_is_set_aside_waits_for_its_own_topic_first(void **state)
{
    (void)state;
    struct job *jobs[SOME];
    read_of_two_topics(jobs);
    atomic_store(&led, false);
    fail_with(&jobs[2]->out, RD_KAFKA_RESP_ERR__MSG_TIMED_OUT);
    finish(jobs, 0, SOME - 1);
    begin_with_clients();
    until_in_flight(10);                /* nine are for `dead`, and one comes now */
    lead_at_refusal = 2;                /* a transaction's, and a question's: it is withheld next */
    atomic_store(&unread, "u");
    jobs[SOME - 1]->out.topic = group;
    finish(jobs, SOME - 1, 1);
    until_in_flight(5);                 /* of "u" */
    int before = atomic_load(&asked);
    turn_for_ms(500);
    assert_int_equal(atomic_load(&asked), before);
    atomic_store(&unread, NULL);
    until_in_flight(0);
    forget_the_second();
    end_with_clients();
}

/* Of a withheld topic's partitions one is taken away, and what is of it is not the first that
 * waits: the topic is asked about, long before it is due, and then that is dropped. */
static void a_withheld_partition_that_leaves_waits_no_more(void **state)
{
    (void)state;
    struct job *jobs[2];
    both[0] = x->part;
    both[1] = (struct assigned){ .partition = 1 };
    assert_int_equal(ledger_assign(x->c.ledger, "t", 1, 0, &both[1].ref), LM_OK);
    both[1].lease = lease_new("t", 1, both[1].ref);
    x->c.parts = both;
    x->c.n_parts = 2;
    x->cfg.transaction_max_messages = 64;
    x->cfg.retry_backoff_ms = x->cfg.retry_backoff_max_ms = 3600000;
    for (int i = 0; i < 2; i++) {
        x->part = both[i];
        read_prompts(jobs, i, 1);
        jobs[i]->out.topic = group;
    }
    x->part = both[0];
    atomic_store(&unread, "t");
    finish(jobs, 0, 2);
    begin();
    until_aside(2);
    atomic_store(&both[1].lease->revoked, true);
    until_aside(1);
    for (int64_t end = lm_now_us() + MOST_US; !atomic_load(&x->w.metrics.dropped); turn())
        assert_true(lm_now_us() < end);
    assert_int_equal(atomic_load(&x->w.metrics.dropped), 1);
    forget_the_second();
}

enum { GONE = 9, OF_ALL = GONE + 1 };

/* One prompt of each of many topics; the first one's offsets are taken. */
static void read_of_many_topics(struct job **jobs, struct assigned *parts)
{
    parts[0] = x->part;
    for (int i = 1; i < OF_ALL; i++) {
        char name[] = { 'u', (char)('0' + i), '\0' };
        parts[i] = (struct assigned){ .partition = 0 };
        assert_int_equal(ledger_assign(x->c.ledger, name, 0, 0, &parts[i].ref), LM_OK);
        parts[i].lease = lease_new(name, 0, parts[i].ref);
    }
    x->c.parts = parts;
    x->c.n_parts = OF_ALL;
    x->cfg.transaction_max_messages = 64;
    x->cfg.retry_backoff_ms = 1;
    for (int i = 0; i < OF_ALL; i++) {
        x->part = parts[i];
        read_prompts(jobs, i, 1);
        jobs[i]->out.topic = group;
    }
    x->part = parts[0];
}

static void forget_many_topics(struct assigned *parts)
{
    for (int i = 1; i < OF_ALL; i++) {
        ledger_revoke(x->c.ledger, parts[i].ref);
        lease_unref(parts[i].lease);
    }
    x->c.n_parts = 1;
}

/* Many were deleted at once, and each question about one takes its time: so many that there is
 * always one whose backoff is over. */
static void many_topics_that_are_no_more_hold_up_no_other(void **state)
{
    (void)state;
    struct job *jobs[OF_ALL + 1];
    static struct assigned parts[OF_ALL];       /* close_world() looks at them */
    read_of_many_topics(jobs, parts);
    atomic_store(&unread, "u");
    unread_error = RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
    unread_us = 10000;
    finish(jobs, 0, OF_ALL);
    begin();
    until_in_flight(GONE);
    int before = atomic_load(&aborts);
    for (int64_t end = lm_now_us() + MOST_US; atomic_load(&aborts) < before + GONE; turn())
        assert_true(lm_now_us() < end);         /* all were asked again */
    read_prompts(jobs, OF_ALL, 1);
    jobs[OF_ALL]->out.topic = group;
    finish(jobs, OF_ALL, 1);
    until_in_flight(GONE);
    assert_int_equal(committed(&parts[0]), OF_ALL + 1);
    atomic_store(&unread, NULL);
    until_in_flight(0);
    forget_many_topics(parts);
}

/* They are taken away while the group is asked about them: what waits is let go after one answer,
 * not after as many as there are topics. */
static void many_topics_that_leave_wait_for_one_question(void **state)
{
    (void)state;
    struct job *jobs[OF_ALL];
    static struct assigned parts[OF_ALL];
    read_of_many_topics(jobs, parts);
    x->cfg.retry_backoff_ms = x->cfg.retry_backoff_max_ms = 3600000;
    atomic_store(&unread, "u");
    unread_error = RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
    finish(jobs, 0, OF_ALL);
    begin();
    until_aside(GONE);
    int before = atomic_load(&aborts);
    for (int i = GONE; i > 0; i--)
        atomic_store(&parts[i].lease->revoked, true);
    until_aside(0);
    assert_in_range(atomic_load(&aborts) - before, 1, 2);   /* it may have looked amid these */
    for (int64_t end = lm_now_us() + MOST_US; atomic_load(&x->w.metrics.dropped) < GONE; turn())
        assert_true(lm_now_us() < end);
    forget_many_topics(parts);
}

/* The brokers were away for ten minutes while the group was asked about a topic: that is no reason
 * not to ask about any for forty. */
static void an_outage_is_no_long_rest(void **state)
{
    (void)state;
    enum { BACK = 600 * 1000000, MOST_MS = ASIDE_REST * ASIDE_SHORT_US / 1000 };
    struct withheld h = { 0 };
    assert_int_equal(withheld_add(&h, "u", 0, 1, 1), LM_OK);
    withheld_rest(&h, 0, BACK);
    assert_int_equal(withheld_wait_ms(&h, BACK, 3600000), MOST_MS);
    assert_null(withheld_due(&h, BACK));
    assert_non_null(withheld_due(&h, BACK + MOST_MS * 1000));
    assert_null(withheld_take_all(&h));
}

/* Where there is only one prompt topic, too, the same code may be about either. */
static void offsets_that_are_refused_blame_no_record(void **state)
{
    (void)state;
    struct job *jobs[SOME];
    x->cfg.transaction_max_messages = 64;
    x->cfg.retry_backoff_ms = 1;
    lead_with_notice(jobs);
    atomic_store(&unread, "t");
    finish(jobs, 0, SOME);
    begin();
    turn_for_ms(100);
    assert_int_equal(ledger_in_flight(x->c.ledger), SOME);
    assert_null(p.aside.topics);
    atomic_store(&unread, NULL);
    until_in_flight(0);
    assert_non_null(strstr(sizes, "21 "));          /* with its notice */
}

/* While a partition leaves us, what can be committed is; what is another's by then is dropped. */
static void what_was_set_aside_is_committed_while_its_partition_leaves(void **state)
{
    (void)state;
    struct job *jobs[SOME];
    lose_a_leader(jobs);
    finish(jobs, SOME - 1, 1);
    until_in_flight(OF_TOPIC);
    atomic_store(&led, true);
    atomic_store(&x->part.lease->revoked, true);
    until_in_flight(0);
    assert_int_equal(atomic_load(&x->w.metrics.dropped), 0);
    end_with_clients();
}

/* An abort that comes behind a transaction which can't end is as little over as that. */
static void an_abort_that_does_not_end_brings_a_new_producer(void **state)
{
    (void)state;
    struct job *jobs[1];
    x->cfg.transaction_max_messages = 1;
    read_prompts(jobs, 0, 1);
    unending = 1000000;
    fail_next = 1;
    finish(jobs, 0, 1);
    begin_with_clients();
    for (int64_t end = lm_now_us() + MOST_US; !atomic_load(&x->w.metrics.producer_rebuilds); turn())
        assert_true(lm_now_us() < end);
    until_in_flight(0);
    assert_string_equal(sizes, "1 1 ");
    end_with_clients();
}

/* Neither does a transaction that can't end, for a partition of it has no leader. */
static void another_id_goes_on(void **state)
{
    (void)state;
    struct job *jobs[1];
    read_prompts(jobs, 0, 1);
    stuck = 12;                         /* six times 5 s each */
    finish(jobs, 0, 1);
    begin_with_clients();
    until_in_flight(0);
    assert_int_equal(p.other_id, 2);
    end_with_clients();
}

/* ---- parts of a stream ------------------------------------------------------------------- */

/* A transaction with one part is aborted and made again. */
static void send_part_twice(int32_t partition, bool follows)
{
    struct engine_config cfg = { .echo = true };
    assert_int_equal(engine_open(&cfg, &x->w.engine, NULL), LM_OK);
    job_queue_init(&x->w.parts);
    struct job *parent = world_deliver(x, 0, NULL);
    parent->route = (struct reply_route){ .partition = partition, .follows = follows };
    struct job *part = job_child(parent);
    part->out.partition = partition;
    fail_next = 1;
    producer_send(&p, part);
    begin();
    struct job *back = NULL;
    for (int64_t end = lm_now_us() + MOST_US; !back && lm_now_us() < end; turn())
        back = job_queue_take(&x->w.parts, 0);
    assert_ptr_equal(back, part);
    assert_int_equal(part->out.error, 0);
    assert_string_equal(sizes, "1 1 ");
    job_unref(part);
    job_unref(parent);
    job_queue_release(&x->w.parts);
    engine_close(x->w.engine);
}

/* A part has no offset, so no call for offsets tells why its transaction is spoilt. */
static void a_part_for_a_forbidden_topic_is_the_last(void **state)
{
    (void)state;
    struct engine_config cfg = { .echo = true };
    assert_int_equal(engine_open(&cfg, &x->w.engine, NULL), LM_OK);
    job_queue_init(&x->w.parts);
    struct job *parent = world_deliver(x, 0, NULL);
    struct job *part = job_child(parent);
    x->cfg.transaction_max_messages = 1;
    ask_for(&part->out);
    part->out.partition = -1;
    barred = gone;
    producer_send(&p, part);
    begin();
    struct job *back = NULL;
    for (int64_t end = lm_now_us() + MOST_US; !back && lm_now_us() < end; turn())
        back = job_queue_take(&x->w.parts, 0);
    assert_ptr_equal(back, part);
    assert_int_equal(part->out.error, RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED);
    job_unref(part);
    job_unref(parent);
    job_queue_release(&x->w.parts);
    engine_close(x->w.engine);
}

/* Where the first part of a stream went decides where the rest goes; of an aborted transaction
 * nobody has seen it go anywhere. */
static void a_first_part_that_was_aborted_goes_anywhere_again(void **state)
{
    (void)state;
    send_part_twice(-1, false);
    assert_string_equal(wanted, "any any ");
}

static void a_later_part_goes_where_the_first_one_went(void **state)
{
    (void)state;
    send_part_twice(2, true);
    assert_string_equal(wanted, "2 2 ");
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, open_world, close_world)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(what_has_no_room_lets_others_pass), TEST(what_has_no_room_is_looked_at_now_and_then),
        TEST(a_transaction_that_failed_is_followed_by_a_smaller_one),
        TEST(a_transaction_that_failed_is_followed_by_a_shorter_one),
        TEST(what_finishes_early_is_sent_early),
        TEST(nothing_is_sent_early_into_a_long_transaction),
        TEST(a_portion_waits_for_what_is_under_way),
        TEST(a_portion_is_staged_behind_what_is_under_way), TEST(a_portion_has_a_limit),
        TEST(a_failure_takes_all_portions_back),
        TEST(what_was_sent_of_a_lost_partition_is_taken_back),
        TEST(a_portion_without_room_ends_the_transaction),
        TEST(an_open_transaction_is_aborted_at_the_end),
        TEST(what_is_not_taken_in_time_brings_a_new_producer), TEST(one_new_producer_is_enough),
        TEST(what_the_group_does_not_tell_is_asked_again),
        TEST(a_report_that_does_not_come_brings_a_new_producer),
        TEST(a_report_that_does_not_come_holds_up_no_abort),
        TEST(what_is_refused_on_the_spot_costs_the_others_nothing),
        TEST(what_is_refused_early_is_a_dead_letter_at_once),
        TEST(what_is_refused_by_a_client_at_its_end_is_judged_by_the_next),
        TEST(who_is_refused_later_goes_and_the_others_commit),
        TEST(a_refusal_is_judged_once), TEST(a_notice_that_is_refused_later_is_left_out),
        TEST(a_notice_that_is_refused_on_the_spot_is_left_out),
        TEST(a_topic_that_takes_nothing_holds_up_no_other),
        TEST(a_topic_that_has_taken_many_is_as_any_other), TEST(a_try_in_vain_holds_up_no_other),
        TEST(a_topic_whose_broker_refuses_holds_up_no_other),
        TEST(a_forbidden_topic_holds_up_no_other), TEST(a_notice_to_a_forbidden_topic_is_left_out),
        TEST(a_notice_to_the_usual_topic_is_left_out), TEST(a_notice_without_a_leader_is_left_out),
        TEST(a_notice_that_does_not_arrive_is_left_out), TEST(a_forbidden_topic_is_found_out_once),
        TEST(what_was_set_aside_is_committed_while_its_partition_leaves),
        TEST(a_topic_that_may_not_be_read_holds_up_no_other),
        TEST(a_topic_that_is_no_more_holds_up_no_other),
        TEST(what_is_set_aside_waits_for_its_own_topic_first),
        TEST(a_withheld_partition_that_leaves_waits_no_more),
        TEST(many_topics_that_are_no_more_hold_up_no_other),
        TEST(many_topics_that_leave_wait_for_one_question),
        cmocka_unit_test(an_outage_is_no_long_rest),
        TEST(offsets_that_are_refused_blame_no_record),
        TEST(a_part_for_a_forbidden_topic_is_the_last), TEST(another_id_goes_on),
        TEST(an_abort_that_does_not_end_brings_a_new_producer),
        TEST(a_first_part_that_was_aborted_goes_anywhere_again),
        TEST(a_later_part_goes_where_the_first_one_went),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
