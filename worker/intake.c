/* SPDX-License-Identifier: Apache-2.0 */
/*
 * intake.c - from a record to a request in the engine: decode, validate, find the adapter, submit.
 *
 * One thread, because decoding is cheap beside generation and Avro's decoder wants one. Nothing may
 * hold it up for long: schemas and adapters are awaited by callback, failures that can heal wait in
 * a list with their due time, a full engine leaves prompts in `busy`, by priority, until the outbox
 * reports room.
 *
 *   QUEUED --schema--> FETCHING --decode--> FETCHING --adapter--> READY --submit--> RUNNING
 *                         ^ registry away      ^ store away         ^ engine full, or out of memory
 *                         +--- later ----------+--- later ----------+
 *
 * (A stage is left out where nothing is to be fetched. FETCHING without a prompt awaits a schema.)
 *
 * Outages (disposition RETRY) are waited out without a limit, so that an outage never drains the
 * topic into the dead letters; the prompt's deadline still counts meanwhile. Faults of the prompt
 * (REFUSE) are dead letters at once. What the engine fails for a reason that can heal has
 * retry.max_attempts tries within retry.deadline_ms.
 *
 * A prompt whose deadline has passed, or that an order from topics.control has cancelled, is
 * answered from here, without the engine, wherever it waits: in `busy`, in `later`, or in `awaited`
 * for its adapter, which the store then no longer owes us (store_let_go). For that those three are
 * swept when an order is new, or the earliest deadline in them has passed, at most every SWEEP_US;
 * the earliest is a lower bound, made exact by each sweep. What is not decoded yet has no deadline.
 * What is of a partition that goes is handed back by a sweep, too.
 *
 * Poison. Before the engine sees a prompt, the journal (journal.h) is asked whether workers died
 * with it: then it runs alone, with everything else waiting in `busy`, or is a dead letter. What
 * the pool knows of it (quarantine.h) comes with the job, as does its turn to run alone.
 *
 * The backlog counter says how many jobs are here; the consumer pauses by it.
 */
#include "worker/worker.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "worker/cancels.h"
#include "worker/codec/codec.h"
#include "worker/journal.h"
#include "worker/log.h"
#include "worker/outcome.h"
#include "worker/stream.h"

enum { IDLE_MS = 100, BUSY_MS = 20, PARK_US = 20000, SWEEP_US = 100000 };

struct intake {
    struct worker *w;
    pthread_t thread;
    struct job_list later;
    struct job *busy, **busy_tail;
    int busy_least;             /* priority of the last in `busy` */
    TAILQ_HEAD(, job) awaited;  /* the store's, with links of ours; in the order of asking */
    int64_t earliest_ms;        /* no deadline of who waits is before; INT64_MAX: none has any */
    int64_t next_sweep_us;
    struct log_seldom waits;
};

static void leave(intake *in)
{
    atomic_fetch_sub(&in->w->metrics.backlog, 1);
}

static void refuse(intake *in, struct job *j, const struct lm_err *why, const char *stage)
{
    leave(in);
    outcome_dead_letter(in->w, j, why, stage);
}

static void drop(intake *in, struct job *j)
{
    leave(in);
    worker_end_job(in->w, j, OUTCOME_DROPPED);
}

/* The earliest of its deadlines, INT64_MAX: none. Whoever is here has no first token yet. */
static int64_t deadline_of(const struct job *j)
{
    const struct prompt *p = j->prompt;
    int64_t whole = p && p->deadline_ms ? p->deadline_ms : INT64_MAX;
    int64_t first = p && p->first_token_by_ms ? p->first_token_by_ms : INT64_MAX;
    return LM_MIN(whole, first);
}

/* It waits here from now on: a sweep must not come too late for it. */
static void mind_deadline(intake *in, const struct job *j)
{
    if (!j->ends)
        in->earliest_ms = LM_MIN(in->earliest_ms, deadline_of(j));
}

static void wait_until(intake *in, struct job *j, int64_t due_us)
{
    mind_deadline(in, j);
    job_list_add(&in->later, j, due_us);
}

static void wait_for_healing(intake *in, struct job *j, const struct lm_err *why)
{
    const struct config *cfg = in->w->cfg;
    int64_t pause = backoff_us(j->waits, cfg->retry_backoff_ms, cfg->retry_backoff_max_ms);
    metric_add(&in->w->metrics.retries, 1);
    log_seldom(&in->waits, "intake", "%s [%d] @%" PRId64 ": %s; again in %" PRId64 " ms",
               j->lease->topic, (int)j->lease->partition, j->record.offset, why->msg, pause / 1000);
    j->waits++;
    wait_until(in, j, lm_now_us() + pause);
}

/* ---- expiry without the engine ------------------------------------------------------------ */

static bool past_deadline(const struct job *j)
{
    int64_t deadline = deadline_of(j);
    return deadline != INT64_MAX && lm_wall_ms() > deadline;
}

/* A completion for a prompt that never reached the engine. */
static void end_early(intake *in, struct job *j, enum engine_reason reason)
{
    struct lm_err why = { LM_NOMEM, "the completion can't be encoded yet" };
    worker_discount(in->w, j);          /* it may wait long yet */
    j->submitted_us = j->answered_us = lm_now_us();
    j->result = outcome_empty_result(reason);
    if (!j->result || outcome_reply(in->w, j)) {
        if (j->result)
            engine_result_free(j->result);
        j->result = NULL;
        j->ends = true;
        wait_for_healing(in, j, &why);
        return;
    }
    leave(in);
}

/* ---- submit ----------------------------------------------------------------------------- */

static int priority_of(const struct job *j)
{
    return j->prompt->priority + j->lease->priority;
}

static void fill_request(const struct job *j, struct engine_request *r)
{
    const struct prompt *p = j->prompt;
    *r = (struct engine_request){
        .id = p->id, .adapter = j->adapter, .prompt = p->prompt, .prompt_len = p->prompt_len,
        .token_ids = p->token_ids, .n_token_ids = p->n_token_ids, .messages = p->messages,
        .n_messages = p->n_messages, .context = p->context, .n_context = p->n_context,
        .params = p->params, .priority = priority_of(j), .tenant = p->tenant,
        .deadline_ms = p->deadline_ms, .first_token_by_ms = p->first_token_by_ms,
        .stream = p->stream, .user = (void *)(uintptr_t)j,
    };
}

static void submitted(intake *in, struct job *j, engine_handle h)
{
    atomic_store(&j->handle, h);
    /* A revocation may have looked for the handle a moment before it was here. */
    if (atomic_load(&in->w->cancelling) || atomic_load(&j->cancelled) ||
        (lease_revoked(j->lease) && atomic_load(&j->stage) == JOB_RUNNING))
        engine_cancel(in->w->engine, h);
    histogram_observe(&in->w->metrics.queue_wait, j->submitted_us - j->received_us);
    lm_log(LM_DEBUG, "intake", "%s [%d] @%" PRId64 " runs", j->lease->topic,
           (int)j->lease->partition, j->record.offset);
}

/* ---- poison ----------------------------------------------------------------------------- */

/* Was this prompt in the engine when workers died? JOURNAL_POISON: it has been refused. */
static enum journal_verdict judge(intake *in, struct job *j)
{
    struct lm_err why;
    struct worker *w = in->w;
    struct journal_count n = { 0 };
    int max = (int)w->cfg->poison_max_attempts;
    if (!max)
        return JOURNAL_FINE;
    if (w->journal && !j->journal_key)
        j->journal_key = journal_key(w->journal, j);
    if (w->journal)
        n = journal_counts(w->journal, j->journal_key);
    n.deaths = LM_MAX(n.deaths, j->pool_deaths);
    n.evidence = LM_MAX(n.evidence, j->pool_alone);
    enum journal_verdict v = journal_verdict(n, max);
    if (v == JOURNAL_POISON) {
        lm_err_set(&why, LM_POISON, "%d workers died of this prompt", n.deaths);
        refuse(in, j, &why, "ENGINE");
    }
    return v;
}

/* A suspect waits for its turn, and while one has it everybody else waits (isolation.c). Fetching
 * a schema or an adapter is no danger to the engine. */
static bool must_wait(const struct worker *w, struct job *j)
{
    bool turn = j->suspect && atomic_load(&j->alone_now);
    return !turn && (atomic_load(&w->closed) ||
                     (j->suspect && atomic_load(&j->stage) != JOB_FETCHING));
}

static void park(intake *in, struct job *j)
{
    wait_until(in, j, lm_now_us() + PARK_US);
}

/* Room in the engine, for one that must be alone there, or beside one that must be? */
static bool engine_open_to(const struct worker *w, enum journal_verdict v)
{
    return !atomic_load(&w->alone) &&
           (v != JOURNAL_ALONE || !atomic_load(&w->in_engine));
}

/* LM_BUSY: the caller keeps the job. Everything else has been dealt with. */
static lm_status submit(intake *in, struct job *j)
{
    struct engine_request r;
    struct lm_err err;
    engine_handle h;
    struct worker *w = in->w;
    /* The stage is set before the lease is read, and a revocation sets the lease before it reads
     * stages, so one of the two sees the other. */
    job_set_stage(j, JOB_RUNNING);
    if (worker_gives_up(w, j)) {
        drop(in, j);
        return LM_OK;
    }
    if (atomic_load(&j->cancelled) || past_deadline(j)) {
        job_set_stage(j, JOB_READY);
        end_early(in, j, atomic_load(&j->cancelled) ? ENGINE_CANCELLED : ENGINE_EXPIRED);
        return LM_OK;
    }
    enum journal_verdict v = judge(in, j);
    if (v == JOURNAL_POISON)
        return LM_OK;
    if (must_wait(w, j)) {
        job_set_stage(j, JOB_READY);
        park(in, j);
        return LM_OK;
    }
    if (!engine_open_to(w, v)) {
        job_set_stage(j, JOB_READY);
        return LM_BUSY;
    }
    if (j->prompt->stream && !j->stream && !(j->stream = stream_new(j->prompt->params.n))) {
        job_set_stage(j, JOB_READY);
        lm_err_set(&err, LM_NOMEM, "no memory for a streamed reply");
        wait_for_healing(in, j, &err);
        return LM_OK;
    }
    fill_request(j, &r);
    j->submitted_us = lm_now_us();
    job_ref(j);                 /* its end may overtake this thread */
    worker_enter_engine(w, j, v == JOURNAL_ALONE);
    lm_status st = engine_submit(w->engine, &r, &h, &err);
    if (st == LM_OK) {
        leave(in);
        submitted(in, j, h);
    } else {
        worker_left_engine(w, j);
        job_set_stage(j, JOB_READY);
        if (st == LM_DEVICE || st == LM_STATE) {
            worker_fail(w, st, "the engine can't go on: %s", err.msg);
            drop(in, j);
        } else if (st != LM_BUSY && lm_status_disposition(st) == LM_DO_RETRY &&
                   worker_may_retry(w, j)) {
            wait_for_healing(in, j, &err);
        } else if (st != LM_BUSY) {
            refuse(in, j, &err, "ENGINE");
        }
    }
    job_unref(j);
    return st == LM_BUSY ? LM_BUSY : LM_OK;
}

/* Most urgent first, and of equals who came first. */
static void keep_busy(intake *in, struct job *j)
{
    struct job **at = in->busy_tail;
    mind_deadline(in, j);
    if (in->busy && priority_of(j) > in->busy_least)
        for (at = &in->busy; *at && priority_of(*at) >= priority_of(j);)
            at = &(*at)->next;
    else
        in->busy_least = priority_of(j);
    j->next = *at;
    *at = j;
    if (!j->next)
        in->busy_tail = &j->next;
}

static long long own_tokens(const struct job *j)
{
    const struct prompt *p = j->prompt;
    return p->n_token_ids ? p->n_token_ids : (long long)(j->record.value_len / 3);
}

/* What it may generate counts from here on, where only the engine's pace is between it and its end:
 * while its adapter can't be had, for however long, all that it holds is its record. */
static void count_generation(intake *in, struct job *j)
{
    const struct engine_params *p = &j->prompt->params;
    int most = in->w->info.max_model_len ? in->w->info.max_model_len : INT32_MAX;   /* echo's */
    long long one = LM_MAX(LM_MIN(p->max_tokens, most), 0);
    worker_count_generation(in->w, j, own_tokens(j), one * LM_MAX(p->n, 1));
}

static void submit_or_keep(intake *in, struct job *j)
{
    count_generation(in, j);
    if (j->suspect) {           /* not behind those who wait for it */
        if (submit(in, j) == LM_BUSY)
            park(in, j);
    } else if (in->busy || submit(in, j) == LM_BUSY) {
        keep_busy(in, j);
    }
}

static void submit_busy(intake *in)
{
    if (atomic_load(&in->w->closed))
        return;
    while (in->busy) {
        struct job *j = in->busy, *next = j->next;
        atomic_store(&in->w->engine_full, true);
        if (submit(in, j) == LM_BUSY) {
            j->next = next;
            return;
        }
        in->busy = next;
        if (!next)
            in->busy_tail = &in->busy;
    }
    atomic_store(&in->w->engine_full, false);
}

/* ---- adapter ---------------------------------------------------------------------------- */

/* From a store thread, or from store_get() itself: hand over, nothing else. */
static void on_adapter(void *user, lm_status status, engine_adapter *a, const struct lm_err *err)
{
    struct job *j = user;
    j->adapter = status == LM_OK ? a : NULL;
    struct lm_err unknown = { status, "the adapter could not be had" };
    job_fail(j, status == LM_OK ? NULL : err ? err : &unknown);
    job_set_stage(j, JOB_READY);
    job_queue_push(&j->worker->to_intake, j);
}

static void fetch(intake *in, struct job *j)
{
    struct lm_err err;
    const char *id = j->prompt->adapter;
    if (!in->w->store) {
        lm_err_set(&err, LM_NOT_FOUND, "adapter '%s': adapters.url is not set", id);
        refuse(in, j, &err, "ADAPTER");
        return;
    }
    job_set_stage(j, JOB_FETCHING);
    if (!j->decoded_us)
        j->decoded_us = lm_now_us();
    mind_deadline(in, j);
    j->awaited = true;
    TAILQ_INSERT_TAIL(&in->awaited, j, await);
    store_get(in->w->store, id, on_adapter, j);
}

static void have_adapter(intake *in, struct job *j)
{
    struct lm_err why;
    int64_t now = lm_now_us();
    lm_status st = job_failure(j, &why);
    if (!st && j->prompt->adapter && !j->adapter)       /* never the base model instead */
        st = lm_err_set(&why, LM_NOMEM, "adapter '%s' is not here", j->prompt->adapter);
    if (!st) {
        if (!j->fetch_us && j->decoded_us) {
            j->fetch_us = now - j->decoded_us;
            histogram_observe(&in->w->metrics.adapter_wait, j->fetch_us);
        }
        j->waits = 0;
        submit_or_keep(in, j);
    } else if (st == LM_CANCELLED) {
        drop(in, j);
    } else if (lm_status_disposition(st) == LM_DO_RETRY) {
        job_fail(j, NULL);
        job_set_stage(j, JOB_FETCHING);
        wait_for_healing(in, j, &why);
    } else {
        refuse(in, j, &why, "ADAPTER");
    }
}

/* ---- decode ----------------------------------------------------------------------------- */

static lm_status check_prompt(intake *in, struct job *j, struct lm_err *err)
{
    const struct config *cfg = in->w->cfg;
    const struct record *r = &j->record;
    lm_status st = reply_route(r->headers, r->n_headers, &in->w->header_names,
                               j->prompt->reply_topic, cfg->topics_replies,
                               cfg->topics_replies_allowed, &j->route, err);
    if (!j->prompt->deadline_ms && cfg->deadline_default_ms)
        j->prompt->deadline_ms = record_deadline_ms(r, cfg->deadline_default_ms, lm_wall_ms());
    if (!st && j->prompt->adapter)
        st = engine_adapter_id_check(j->prompt->adapter, strlen(j->prompt->adapter), err);
    return st;
}

/* Where a decoded prompt goes. */
static void dispatch(intake *in, struct job *j)
{
    if (in->w->cancels && cancels_enter(in->w->cancels, j)) {
        end_early(in, j, ENGINE_CANCELLED);
    } else if (past_deadline(j)) {
        end_early(in, j, ENGINE_EXPIRED);
    } else if (j->prompt->adapter) {
        fetch(in, j);
    } else {
        job_set_stage(j, JOB_READY);
        submit_or_keep(in, j);
    }
}

/* From the asker's thread, or from codec_ask_no_more(): hand over, nothing else. */
void intake_schema_answered(void *user, const struct lm_err *trouble)
{
    struct job *j = user;
    job_fail(j, trouble);
    job_queue_push(&j->worker->to_intake, j);
}

/* Can it be decoded now? If not, somebody else has it, or a list. */
static bool have_schema(intake *in, struct job *j)
{
    struct lm_err err;
    const struct record *r = &j->record;
    lm_status st = job_failure(j, &err);
    if (st)
        job_fail(j, NULL);
    else
        st = codec_await_schema(in->w->codec, r->value, r->value_len, r->headers, r->n_headers, j,
                                &err);
    if (!st && atomic_load(&j->stage) == JOB_QUEUED)
        return true;
    /* The answer may be in the queue already: only this thread takes it from there. */
    job_set_stage(j, st ? JOB_FETCHING : JOB_QUEUED);
    if (st && st != LM_BUSY)
        wait_for_healing(in, j, &err);
    if (!st && must_wait(in->w, j)) {
        park(in, j);
        return false;
    }
    return !st;
}

static void decode(intake *in, struct job *j)
{
    struct lm_err err;
    const struct record *r = &j->record;
    if (!r->value) {
        lm_err_set(&err, LM_FORMAT, "the record has no value");
        refuse(in, j, &err, "VALUE_CONVERTER");
        return;
    }
    if (judge(in, j) == JOURNAL_POISON || !have_schema(in, j))
        return;
    if (in->w->journal)
        journal_decoding(in->w->journal, j->journal_key);
    lm_status st = codec_decode_prompt(in->w->codec, r->value, r->value_len, r->headers,
                                       r->n_headers, job_arena(j), &j->prompt, &err);
    if (in->w->journal)
        journal_decoding(in->w->journal, 0);
    if (st && lm_status_disposition(st) == LM_DO_RETRY) {
        wait_for_healing(in, j, &err);
        return;
    }
    if (!st)
        st = check_prompt(in, j, &err);
    if (st) {
        refuse(in, j, &err, "VALUE_CONVERTER");
        return;
    }
    j->waits = 0;
    worker_count_tokens(in->w, j, own_tokens(j));
    dispatch(in, j);
}

/* ---- thread ----------------------------------------------------------------------------- */

static void await_no_more(intake *in, struct job *j)
{
    if (j->awaited)
        TAILQ_REMOVE(&in->awaited, j, await);
    j->awaited = false;
}

static void step(intake *in, struct job *j)
{
    await_no_more(in, j);
    if (worker_gives_up(in->w, j)) {
        drop(in, j);
        return;
    }
    bool cancelled = atomic_load(&j->cancelled);
    /* Sent back by the outbox. An order that came meanwhile has been looked for here already. */
    if (j->due_us && j->due_us > lm_now_us() && !cancelled) {
        wait_until(in, j, j->due_us);
        return;
    }
    if (cancelled || past_deadline(j)) {
        job_fail(j, NULL);
        end_early(in, j, cancelled ? ENGINE_CANCELLED : ENGINE_EXPIRED);
        return;
    }
    if (must_wait(in->w, j)) {
        park(in, j);
        return;
    }
    switch (atomic_load(&j->stage)) {
    case JOB_QUEUED:
        if (j->prompt)
            dispatch(in, j);
        else
            decode(in, j);
        break;
    case JOB_FETCHING:
        if (j->prompt)
            fetch(in, j);
        else
            decode(in, j);
        break;
    default:
        have_adapter(in, j);
    }
}

static void step_chain(intake *in, struct job *j)
{
    for (struct job *next; j; j = next) {
        next = j->next;
        atomic_store(&in->w->intake_beat_us, lm_now_us());
        step(in, j);
    }
}

/* ---- sweep ------------------------------------------------------------------------------ */

/* Is there no reason to wait any longer? */
static bool is_over(const intake *in, struct job *j, int64_t now_ms)
{
    return worker_gives_up(in->w, j) ||
           (!j->ends && (atomic_load(&j->cancelled) || now_ms > deadline_of(j)));
}

static void sweep_busy(intake *in, int64_t now_ms, struct job_chain *over)
{
    struct job **at = &in->busy;
    for (struct job *j; (j = *at);) {
        if (is_over(in, j, now_ms)) {
            *at = j->next;
            job_chain_add(over, j);
        } else {
            mind_deadline(in, j);
            at = &j->next;
        }
    }
    in->busy_tail = at;
}

static void sweep_later(intake *in, int64_t now_ms, struct job_chain *over)
{
    for (struct job *j = job_list_take_all(&in->later), *next; j; j = next) {
        next = j->next;
        if (is_over(in, j, now_ms))
            job_chain_add(over, j);
        else
            wait_until(in, j, j->due_us);
    }
}

/* What the store has answered already is on its way here, and ends in step(). */
static void sweep_awaited(intake *in, int64_t now_ms, struct job_chain *over)
{
    for (struct job *j = TAILQ_FIRST(&in->awaited), *next; j; j = next) {
        next = TAILQ_NEXT(j, await);
        if (!is_over(in, j, now_ms)) {
            mind_deadline(in, j);
        } else if (store_let_go(in->w->store, j->prompt->adapter, j)) {
            await_no_more(in, j);
            job_chain_add(over, j);
        }
    }
}

static void sweep(intake *in)
{
    struct job_chain over = { 0 };
    int64_t now_ms = lm_wall_ms();
    in->earliest_ms = INT64_MAX;
    sweep_busy(in, now_ms, &over);
    sweep_later(in, now_ms, &over);
    sweep_awaited(in, now_ms, &over);
    for (struct job *j = over.head, *next; j; j = next) {
        next = j->next;
        j->due_us = 0;
        atomic_store(&in->w->intake_beat_us, lm_now_us());  /* each may wait for a schema's id */
        step(in, j);
    }
    in->next_sweep_us = lm_now_us() + SWEEP_US;
}

static bool sweep_is_due(const intake *in)
{
    return in->earliest_ms != INT64_MAX && lm_now_us() >= in->next_sweep_us &&
           lm_wall_ms() > in->earliest_ms;
}

static void *intake_main(void *arg)
{
    intake *in = arg;
    struct worker *w = in->w;
    bool swept = false;
    while (!atomic_load(&w->ending)) {
        int64_t now = lm_now_us();
        atomic_store(&w->intake_beat_us, now);
        atomic_store(&w->intake_rests, atomic_load(&w->closed));
        if (w->journal)
            journal_refresh(w->journal, now);
        int wait = in->busy ? BUSY_MS : job_list_wait_ms(&in->later, now, IDLE_MS);
        step_chain(in, job_queue_take(&w->to_intake, wait));
        step_chain(in, job_list_take_due(&in->later, lm_now_us()));
        submit_busy(in);
        if (atomic_exchange(&w->sweep_intake, false) || sweep_is_due(in))
            sweep(in);
        if (atomic_load(&w->stopping) && !swept) {
            codec_ask_no_more(w->codec);
            sweep(in);
            swept = true;
        }
    }
    codec_ask_no_more(w->codec);
    step_chain(in, job_queue_take(&w->to_intake, 0));
    sweep(in);
    return NULL;
}

lm_status intake_new(struct worker *w, intake **out, struct lm_err *err)
{
    intake *in = lm_calloc(1, sizeof *in);
    if (!in)
        return lm_err_set(err, LM_NOMEM, "out of memory");
    in->w = w;
    in->busy_tail = &in->busy;
    TAILQ_INIT(&in->awaited);
    in->earliest_ms = INT64_MAX;
    atomic_store(&w->intake_beat_us, lm_now_us());      /* loading may have taken minutes */
    if (pthread_create(&in->thread, NULL, intake_main, in)) {
        free(in);
        return lm_err_set(err, LM_NOMEM, "can't start the intake thread");
    }
    *out = in;
    return LM_OK;
}

void intake_free(intake *in)
{
    if (!in)
        return;
    job_queue_wake(&in->w->to_intake);
    pthread_join(in->thread, NULL);
    free(in);
}
