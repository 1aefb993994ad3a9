/* SPDX-License-Identifier: Apache-2.0 */
/*
 * transaction.c - exactly-once: the producer thread's half; see staging.h. How librdkafka is
 * called, and what follows from a call that fails, is in transaction_client.c; what becomes of
 * topics that take nothing in transaction_aside.c, of those whose offsets are refused in
 * transaction_offsets.c.
 *
 * Finished jobs gather in `ready`. Every transaction.interval_ms, or when
 * transaction.max_messages are there, one transaction takes them:
 *
 *   stage --> begin --> produce --> stage --> offsets and maps --> commit --> settle
 *      ^___________________|
 *
 * With nothing to send there is one for offsets alone, every commit.interval_ms, when there is
 * something new to commit, or when the consumer thread needs one (isolation.c).
 *
 * Where many finish, it begins before it is due and takes them in portions: so their records travel
 * while others are generated, and its end waits only for the last of them. It begins once a chunk
 * is ready (CHUNK_SHARE); the next portion is what has gathered when the last one has its reports,
 * half of a transaction at most (portion_most()). Once it is due, or has all that it may hold, the
 * next portion is staged while the last one is on its way still, but sent behind nothing: so it
 * takes what is ready and not what comes meanwhile. Each portion is staged before it is sent, so
 * that there is room for it in the map, and the last one's staging computes the offsets of all.
 * Where few finish, there is one.
 *
 * What the client refuses on the spot (a partition or a topic that it knows not to be there) has
 * not entered the transaction, which goes on: the consumer thread takes such a job out of the stage
 * and computes the offsets anew, if it had, and then it is judged.
 *
 * A topic that takes nothing in the time of a transaction, or that we may not write to, is set
 * aside with all that is for it, and tried by itself (aside.h). A prompt topic whose offsets the
 * group refuses is withheld, with all that is of it (withheld.h).
 *
 * How a transaction may end:
 *
 *   committed    the jobs end
 *   aborted      confirmed by the broker: a record was refused, the group has moved on, or a map is
 *                too long for the broker (the consumer thread makes the next one shorter). Those
 *                refused are judged, see delivery.c (who is sent again travels alone from then on,
 *                so that it holds up no others); the rest go into the next transaction as they are.
 *                When that was the cause, or a topic that is set aside, the next one follows at
 *                once, as large, of them alone: who is new may be refused as well. After any other
 *                cause it waits, and is smaller
 *   unknown      a call failed in a way that leaves open what the broker did, or waits for a record
 *                that the client has lost (transaction_client.c). librdkafka speaks the
 *                first version of the transaction protocol, where a delayed commit may even land on
 *                a later transaction. So the producer is destroyed and a new one made: its
 *                init_transactions() ends whatever the old one had open and fences its requests.
 *                Then the group's committed offsets tell which it was, for each commit's offset and
 *                map are its own
 *                The same is done when all went well in the end but a request had no answer and was
 *                sent again: its first copy may come late, see unanswered.h. And when records were
 *                not taken in time: librdkafka (2.15.1) keeps to the leader of a topic that was
 *                deleted and made again, as the new one's leader epoch is lower
 *                The new producer may find the old one's transaction decided and yet not over, for
 *                a partition of it has no leader to take the marker of its end. No other begins
 *                until it has one. Then we go on with another transactional.id
 *   fenced       another producer has our transactional.id: the worker ends. Unless our transaction
 *                had outlived transaction.timeout.ms while this process was awake: then it was the
 *                coordinator that fenced us, for a broker was away, and a new producer is made. A
 *                process that has slept through that (SIGSTOP, a frozen machine) can't tell, may be
 *                replaced by now, and ends
 *
 * Threads: the producer thread's. transaction_client.c replaces the client, for these causes or for
 * another batch.size (producer_resize()), and nobody else uses it.
 */
#include "worker/transaction.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "worker/blame.h"
#include "worker/delivery.h"
#include "worker/transaction_int.h"

enum {
    IDLE_MS = 100,
    GATHER_US = 2000,           /* between two looks at what has finished */
    CHUNK_SHARE = 8,            /* of a transaction, ready: worth to be sent before it is due */
    CHUNK_LEAST = 500,
    PORTIONS = 2,               /* at least, of a full transaction */
    FAILURES_COUNTED = 6,       /* by which a transaction becomes smaller */
};

/* ---- ready ------------------------------------------------------------------------------ */

void transaction_make_ready(struct tx *t, struct job *j)
{
    if (!t->ready.head)
        t->since_us = lm_now_us();
    job_chain_add(&t->ready, j);
}

/* Not in this one. */
static void keep(struct tx *t, struct job *j)
{
    if (t->trial && aside_is_for(t->trial, j))
        job_chain_add(&t->trial->jobs, j);
    else
        transaction_make_ready(t, j);
}

/* What an earlier attempt was refused for is judged: this one may end before it sends anything. */
void transaction_enter(struct tx *t, struct job *j)
{
    j->out.error = 0;
    if (j->notice)
        j->notice->error = 0;
    t->bytes += j->out.len;
    t->stage.verdicts[t->stage.n] = STAGE_GONE;
    t->stage.jobs[t->stage.n++] = j;
}

/* What is handed over at once should be one batch a partition: what is more waits behind it in the
 * client library, and costs as hold.h says. */
static size_t portion_most(const struct tx *t)
{
    return LM_MAX((size_t)t->w->cfg->transaction_max_messages / PORTIONS, CHUNK_LEAST);
}

/* The next portion. */
static void take_ready(struct tx *t)
{
    struct job_chain all = t->ready;
    if (!t->open) {
        t->stage.n = t->bytes = 0;
        t->open_since_us = t->since_us;
    }
    t->stage.from = t->stage.n;
    t->ready = (struct job_chain){ 0 };
    /* After each failure half as many: a full one may need more time than a transaction has, on a
     * slow way to the brokers, and would need it again. */
    int less = LM_MIN(t->failures, FAILURES_COUNTED);
    size_t most_bytes = TRANSACTION_MAX_BYTES >> less;
    size_t most = LM_MAX((size_t)t->w->cfg->transaction_max_messages >> less, 1);
    if (t->again)
        most = LM_MIN(most, t->again);
    size_t portion = t->stage.more ? t->stage.from + portion_most(t) : most;
    /* One that was refused before goes alone. */
    bool alone = all.head && all.head->out.attempts > 0;
    for (struct job *j; (j = job_chain_pop(&all));) {
        if (transaction_waits_aside(t, j))
            continue;
        bool fits = alone ? t->stage.n == 0 : j->out.attempts == 0 && t->stage.n < most &&
                                              t->stage.n < portion && t->bytes < most_bytes;
        if (!fits) {
            transaction_make_ready(t, j);
            continue;
        }
        transaction_enter(t, j);
    }
    t->full = t->ready.head && t->stage.n < portion;
}

static void keep_all(struct tx *t)
{
    for (size_t i = 0; i < t->stage.n; i++)
        if (t->stage.jobs[i]) {
            keep(t, t->stage.jobs[i]);
            t->stage.jobs[i] = NULL;
        }
}

/* Back to the front, in order. */
static void put_back(struct tx *t)
{
    struct job_chain later = t->ready;
    if (t->trial) {
        keep_all(t);
        return;
    }
    t->ready = (struct job_chain){ 0 };
    keep_all(t);
    t->again = t->ready.length;
    if (t->again)
        t->since_us = t->open_since_us;
    for (struct job *j; (j = job_chain_pop(&later));)
        transaction_make_ready(t, j);
}

/* What the map has no room for goes behind the others: the prompt that it waits for may be one of
 * these, and a transaction holds only so many. True: there is such. */
static bool put_behind(struct tx *t)
{
    bool any = false;
    for (size_t i = 0; i < t->stage.n; i++)
        if (t->stage.jobs[i] && t->stage.verdicts[i] == STAGE_WAIT) {
            keep(t, t->stage.jobs[i]);
            t->stage.jobs[i] = NULL;
            any = true;
        }
    return any;
}

/* ---- one transaction -------------------------------------------------------------------- */

/* Hands the portion's records to the client. What it refuses on the spot, as a partition is not
 * there for example, never enters the transaction. False: that can't end well any more. */
static bool produce(struct tx *t)
{
    int64_t now = t->sent_us = lm_now_us();
    for (size_t i = t->stage.from; i < t->stage.n; i++) {
        struct job *j = t->stage.jobs[i];
        if (!j || t->stage.verdicts[i] != STAGE_IN)
            continue;
        producer_send_records(t->p, j, now);
        if (delivery_refused(&j->out)) {
            t->stage.verdicts[i] = STAGE_REFUSED;
            t->any_refused = true;
        } else if (j->out.error || (j->notice && j->notice->error &&
                                    !delivery_spare_notice(t->p, j))) {
            return false;
        }
    }
    return true;
}

static void judge(struct tx *t, size_t i)
{
    struct job *j = t->stage.jobs[i];
    t->stage.jobs[i] = NULL;
    delivery_judge(t->p, j);
}

/* The offsets, if they were computed, are again, without them. Then they are judged: what becomes
 * of them, a dead letter as a rule, may be in the next portion. False: as produce(). */
static bool take_out_refused(struct tx *t)
{
    if (!t->any_refused)
        return true;
    t->stage.from = t->stage.n;
    if (staging_stage(t->w->consumer, &t->stage) ||
        transaction_client_is_dead(t))  /* that is not theirs to be judged by */
        return false;
    for (size_t i = 0; i < t->stage.n; i++)
        if (t->stage.verdicts[i] == STAGE_REFUSED && t->stage.jobs[i])
            judge(t, i);
    delivery_give(t->p);
    t->any_refused = false;
    return !t->stage.lost;
}

/* Its end without a commit: nobody has asked for one, so its fate is known. */
static enum fate take_back(struct tx *t)
{
    transaction_learn_cause(t);
    rd_kafka_error_t *e = transaction_persist(t, transaction_abort);
    t->stage.more = true;
    return e ? transaction_undo(t, e) : ABORTED;
}

/* A portion goes into the transaction, which begins with the first one. */
static enum fate extend(struct tx *t)
{
    rd_kafka_error_t *e = NULL;
    if (!t->open) {
        t->begun_us = lm_now_us();
        t->begun = true;
        t->p->failed = t->any_refused = t->of_offsets = false;
        t->code = RD_KAFKA_RESP_ERR_NO_ERROR;
        if ((e = transaction_begin(t)))
            return transaction_undo(t, e);
        t->open = true;
    }
    transaction_let_arrive(t);
    bool well = !t->stage.lost && !t->p->failed && produce(t) && take_out_refused(t);
    return well ? OPEN : take_back(t);
}

static enum fate conclude(struct tx *t)
{
    rd_kafka_error_t *e = NULL;
    if (t->trial && !transaction_arrived(t))
        return take_back(t);
    if (t->stage.offsets->cnt && (e = transaction_persist(t, transaction_send_offsets))) {
        t->of_offsets = true;
        return transaction_undo(t, e);
    }
    transaction_flush(t);
    e = transaction_persist(t, transaction_commit);
    return e ? transaction_undo(t, e) : COMMITTED;
}

/* After a rebuild: what became of it? When the worker ends, that is the next one's to find out: the
 * group's offsets tell it what is left to do, and its init_transactions() ends what is open.
 * Without its last portion it was not committed for certain: nobody has asked for that. */
static enum fate find_out(struct tx *t)
{
    bool holds = false;
    lm_status st;
    if (transaction_last_call(t) || !transaction_rebuild(t)) {
        lm_log(LM_WARN, "producer", "the end of a transaction is left to the brokers");
        return HOPELESS;
    }
    aside_all_due(&t->p->aside, lm_now_us());
    t->p->withheld.rest_us = 0;
    if (t->stage.more)
        return ABORTED;
    while ((st = staging_committed(t->w->consumer, &t->stage, &holds)) &&
           !transaction_last_call(t)) {
        log_seldom(&t->unknown, "producer", "the group does not tell if a transaction was "
                   "committed; asking again");
        transaction_ask_again_soon();
    }
    lm_log(LM_INFO, "producer", "the transaction was %s", st ? "not found" :
           holds ? "committed" : "not committed");
    return st ? HOPELESS : holds ? COMMITTED : ABORTED;
}

/* ---- before and after ------------------------------------------------------------------- */

bool transaction_forget_attempt(struct tx *t, struct job *j)
{
    if (j->parent && j->route.partition < 0)
        j->out.partition = -1;          /* where it went is where nobody sees it */
    struct outgoing *both[] = { &j->out, j->notice };
    for (size_t i = 0; i < LM_COUNT(both); i++) {
        if (!both[i])
            continue;
        both[i]->acked = false;
        if (!delivery_refused(both[i]))
            both[i]->error = 0;
    }
    return delivery_refused(&j->out) ||
           (delivery_refused(j->notice) && !delivery_spare_notice(t->p, j));
}

/* Its topic takes records again: the others that wait for it need not go alone any more. */
static void trust(struct tx *t, const char *topic)
{
    for (struct job *j = t->ready.head; j; j = j->next)
        if (topic && j->out.topic && !strcmp(j->out.topic, topic))
            j->out.attempts = 0;
}

static void after_commit(struct tx *t)
{
    if (t->stage.n == 1 && t->stage.jobs[0] && t->stage.jobs[0]->out.attempts)
        trust(t, t->stage.jobs[0]->out.topic);
    metric_add(&t->w->metrics.transactions, 1);
    t->stale = false;
    for (size_t i = 0; i < t->stage.n; i++) {
        struct job *j = t->stage.jobs[i];
        if (!j || t->stage.verdicts[i] != STAGE_IN)
            continue;
        t->stage.jobs[i] = NULL;
        delivery_done(t->p, j);
    }
    delivery_give(t->p);
}

/* Each dead letter has a line of its own. */
static void say_refused(struct tx *t, const struct outgoing *o)
{
    log_seldom(&t->refused, "producer", "a transaction was aborted, for a record to '%s' was "
               "refused: %s; the others go again", o->topic,
               rd_kafka_err2str((rd_kafka_resp_err_t)o->error));
}

/* Whoever was refused is judged, and in the next one no more. True: there was such. */
static bool judge_refused(struct tx *t)
{
    bool any = false;
    for (size_t i = 0; i < t->stage.n; i++) {
        struct job *j = t->stage.jobs[i];
        if (!j)
            continue;
        const struct outgoing *o = delivery_refused(&j->out) ? &j->out : j->notice;
        if (delivery_refused(o) && !any)
            say_refused(t, o);
        any |= delivery_refused(o);
        if (transaction_forget_attempt(t, j))
            judge(t, i);
    }
    return any;
}

/* A producer that was made to find out has asked anew already. True: the cause is gone. */
static bool after_abort(struct tx *t, bool going)
{
    metric_add(&t->w->metrics.transaction_aborts, 1);
    t->stale |= t->rebuilt_us < t->begun_us && blame_timed_out(&t->stage);
    bool mended = going && transaction_offsets_refused(t);
    t->begun &= !mended;        /* a topic that is tried has not failed */
    mended |= going && transaction_set_aside(t);
    mended |= going && judge_refused(t);
    delivery_give(t->p);
    put_back(t);
    return mended;
}

/* What failed because of some of its records is no larger than it should be, and its next try, of
 * the others, need not wait. New ones wait for that: among them may be such records again. */
static void finish(struct tx *t, enum fate fate)
{
    const struct config *cfg = t->w->cfg;
    bool well = fate == COMMITTED;
    staging_settle(t->w->consumer, &t->stage, well);
    if (well)
        after_commit(t);
    else
        well = after_abort(t, fate != HOPELESS);
    t->open = t->full = false;
    if (t->trial)
        return;                 /* all else is its topic's */
    t->again = fate != COMMITTED && well ? t->again : 0;
    t->failures = fate == COMMITTED ? 0 : t->failures + !well;
    t->not_before_us = well ? 0 : lm_now_us() + backoff_us(LM_MIN(t->failures - 1, 20), 50,
                                                           cfg->retry_backoff_max_ms);
}

static void drop_gone(struct tx *t)
{
    for (size_t i = t->stage.from; i < t->stage.n; i++)
        if (t->stage.verdicts[i] == STAGE_GONE) {
            worker_end_job(t->w, t->stage.jobs[i], OUTCOME_DROPPED);
            t->stage.jobs[i] = NULL;
            t->gone++;
        }
}

static bool anything_in(const struct stage *s)
{
    for (size_t i = s->from; i < s->n; i++)
        if (s->verdicts[i] == STAGE_IN)
            return true;
    return s->offsets && s->offsets->cnt > 0;
}

static enum fate run_staged(struct tx *t)
{
    drop_gone(t);
    bool wait = put_behind(t);
    if (!t->open && !anything_in(&t->stage)) {
        if (wait)               /* however many are ready, what they wait for takes a moment */
            t->not_before_us = lm_now_us() + IDLE_MS * 1000;
        return COMMITTED;
    }
    enum fate fate = extend(t);
    if (fate == OPEN && t->stage.more) {
        t->full |= wait;        /* what they wait for may be in this one, so it ends */
        return OPEN;
    }
    if (fate == OPEN)
        fate = conclude(t);
    if (fate == UNKNOWN)
        fate = find_out(t);
    finish(t, fate);
    return fate;
}

/* The open one ends here: readers (read_committed) need not wait for its timeout. The client may
 * hold its records yet: the jobs are for end() to drop. */
static void give_up(struct tx *t)
{
    rd_kafka_error_t *e = transaction_persist(t, transaction_abort);
    if (e) {
        lm_log(LM_WARN, "producer", "the end of a transaction is left to the brokers: %s",
               rd_kafka_error_string(e));
        rd_kafka_error_destroy(e);
    }
    put_back(t);
}

bool transaction_run(struct tx *t, bool last)
{
    enum fate fate = ABORTED;
    if (last && !t->trial)
        atomic_store(&t->p->want_offsets, false);
    t->stage.more = !last;
    t->stage.withheld = &t->p->withheld;
    if (t->trial)
        transaction_take_aside(t);
    else
        take_ready(t);
    lm_status st = staging_stage(t->w->consumer, &t->stage);
    if (st == LM_OK)
        fate = run_staged(t);
    else
        drop_gone(t);           /* the consumer has ended, or the worker does */
    if (st == LM_NOMEM)
        worker_fail(t->w, st, "out of memory for the offsets of a transaction");
    if (st && t->open) {
        give_up(t);
        fate = HOPELESS;
    }
    stage_release(&t->stage);
    return fate != HOPELESS && st != LM_NOMEM && !t->hopeless;
}

/* ---- thread ----------------------------------------------------------------------------- */

static void gather(struct tx *t, int wait_ms)
{
    for (struct job *j = job_queue_take(&t->p->inbox, wait_ms), *next; j; j = next) {
        next = j->next;
        transaction_make_ready(t, j);
    }
    for (struct job *j = job_list_take_due(&t->p->later, lm_now_us()), *next; j; j = next) {
        next = j->next;
        transaction_make_ready(t, j);
    }
}

static int64_t interval_us(const struct tx *t)
{
    return t->w->cfg->transaction_interval_ms * 1000;
}

/* Microseconds from `now` until a transaction is due, or the end of the open one. */
static int64_t until_due(const struct tx *t, int64_t now)
{
    int64_t at = t->next_idle_us;
    size_t n = t->ready.length + (t->open ? t->stage.n : 0);
    if (t->open || t->ready.head)
        at = (t->open ? t->open_since_us : t->since_us) + interval_us(t);
    if (n >= (size_t)t->w->cfg->transaction_max_messages || (t->open && t->full) ||
        atomic_load(&t->p->want_offsets))
        at = LM_MIN(at, now);
    return LM_MAX(at, t->not_before_us) - now;
}

/* Are so many ready that they may travel before their transaction is due? Not after a failure, nor
 * where it would be open for much of the time that it has. */
static bool enough(const struct tx *t, int64_t now)
{
    size_t chunk = LM_MAX((size_t)t->w->cfg->transaction_max_messages / CHUNK_SHARE, CHUNK_LEAST);
    return t->ready.length >= chunk && !t->failures && !t->full &&
           !t->ready.head->out.attempts && now >= t->not_before_us &&
           interval_us(t) / 1000 * 4 <= t->p->transaction_timeout_ms;
}

/* Now? Not behind others, see hold.h: more gather meanwhile. */
static bool worth_sending(const struct tx *t, int64_t now)
{
    return !t->p->under_way && enough(t, now);
}

/* Where jobs finish all the time, a look at each would cost two threads more than the job: they
 * gather for a moment. */
static void wait_and_gather(struct tx *t, int64_t now, int64_t due_us)
{
    int64_t pause = LM_MIN(due_us, GATHER_US);
    if (t->ready.head && pause > 0)
        nanosleep(&(struct timespec){ .tv_nsec = pause * 1000 }, NULL);
    int most = job_list_wait_ms(&t->p->later, now, t->open ? TRANSACTION_FLUSH_MS : IDLE_MS);
    if (!t->open && !transaction_last_call(t) && now >= t->not_before_us)
        most = withheld_wait_ms(&t->p->withheld, now, aside_wait_ms(&t->p->aside, now, most));
    gather(t, (int)LM_MAX(0, LM_MIN((due_us + 999) / 1000, most)));
}

/* What was sent and has no report yet is the library's until it is purged: then jobs may go. */
static void end(struct tx *t)
{
    gather(t, 0);
    transaction_purge(t);
    worker_drop_all(t->w, t->ready.head);
    worker_drop_all(t->w, job_list_take_all(&t->p->later));
    worker_drop_all(t->w, aside_take_all(&t->p->aside));
    worker_drop_all(t->w, withheld_take_all(&t->p->withheld));
    free(t->stage.jobs);
    free(t->stage.verdicts);
}

static bool begin(struct tx *t)
{
    size_t most = (size_t)t->w->cfg->transaction_max_messages;
    t->stage.jobs = lm_calloc(most, sizeof(*t->stage.jobs));
    t->stage.verdicts = lm_calloc(most, sizeof(*t->stage.verdicts));
    if (t->stage.jobs && t->stage.verdicts)
        return true;
    worker_fail(t->w, LM_NOMEM, "out of memory for transactions of %zu messages", most);
    return false;
}

void *transaction_main(void *arg)
{
    producer *p = arg;
    struct tx t = { .p = p, .w = p->w };
    bool going = begin(&t);
    while (going && !atomic_load(&p->end)) {
        bool working = atomic_load(&t.w->started) && !transaction_last_call(&t);
        int64_t now = lm_now_us(), due = working ? until_due(&t, now) : IDLE_MS * 1000;
        transaction_serve(&t);
        atomic_store(&t.w->metrics.aside,
                     (long long)(aside_jobs(&p->aside) + withheld_jobs(&p->withheld)));
        wait_and_gather(&t, now, due);
        now = lm_now_us();
        bool last = transaction_last_call(&t) || until_due(&t, now) <= 0;
        if ((!working || transaction_last_call(&t)) && !t.open)
            continue;
        struct withheld_topic *h =
            t.open || t.questioned ? NULL : withheld_due(&p->withheld, now);
        t.questioned = h;       /* the next turn is another's, if any is due */
        struct aside_topic *a =
            h ? NULL : transaction_to_try(&t, now, last || worth_sending(&t, now));
        if (!h && !a && !last && !worth_sending(&t, now))
            continue;
        if (!t.open && !(t.initialised ? transaction_fence(&t) : transaction_initialise(&t)))
            break;
        if (h) {
            transaction_ask_again(&t, h);
            going = !t.hopeless;
            continue;
        }
        if (a) {
            going = transaction_try(&t, a);
            continue;
        }
        if (last) {
            t.next_idle_us = now + t.w->cfg->commit_interval_ms * 1000;
            last = transaction_last_call(&t) || t.ready.length <= portion_most(&t) ||
                   !enough(&t, now);
        }
        going = transaction_run(&t, last);
    }
    while (!atomic_load(&p->end))
        gather(&t, IDLE_MS);
    end(&t);
    atomic_store(&p->over, true);
    return NULL;
}
