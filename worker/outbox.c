/* SPDX-License-Identifier: Apache-2.0 */
/*
 * outbox.c - from the engine's events to replies: one thread that polls the engine, encodes, and
 * hands over to the producer.
 *
 * A finished request becomes, by its result,
 *
 *   stop, length, expired                a reply
 *   cancelled by us (revoked, stopping), dropped: the offset stays uncommitted
 *     any choice of it
 *   cancelled otherwise                  a reply with that finish reason
 *   error that can heal                  back to intake, up to retry.max_attempts times
 *   device failure                       dropped, and the worker ends: the prompt is not at fault
 *   any other error                      dead letter with the engine's reason
 *
 * A reply that can't be encoded because the registry is away waits in `later` like in intake.c.
 *
 * Whatever it becomes, a request that has finished is ANSWERING until that is known: it may wait
 * here for long, and the engine has it no more, so a suspect's turn to be alone there (isolation.c)
 * ends. One that goes back is READY again, and has another turn.
 *
 * Streamed replies. Text events gather in the job's stream (stream.h); `streams` holds the jobs
 * that have one, from their first text to their final record. One part of a job is on its way at a
 * time, so parts arrive in order and without gaps; the final record is sent when the last part is
 * acknowledged. A part that can't be made or delivered ends the parts, never the reply.
 */
#include "worker/worker.h"

#include <inttypes.h>
#include <stdlib.h>
#include <time.h>

#include "worker/outcome.h"
#include "worker/stream.h"

enum { BATCH = 128, POLL_MS = 100, STREAM_POLL_MS = 10, GATHER_US = 200 };

struct outbox {
    struct worker *w;
    pthread_t thread;
    struct job_list later;
    int64_t now_us;             /* when the events at hand were polled */
    struct job **streams;
    size_t n_streams, cap_streams;
    struct log_seldom not_encodable, failed;
};

static lm_status result_status(const struct engine_result *r)
{
    if (r->status)
        return r->status;
    for (int i = 0; i < r->n_choices; i++)
        if (r->choices[i].reason == ENGINE_ERROR)
            return LM_INTERNAL;
    return LM_OK;
}

/* Of several choices some may have ended before. */
static bool was_cancelled(const struct engine_result *r)
{
    for (int i = 0; i < r->n_choices; i++)
        if (r->choices[i].reason == ENGINE_CANCELLED)
            return true;
    return false;
}

static void answer(outbox *o, struct job *j)
{
    const struct config *cfg = o->w->cfg;
    lm_status st = outcome_reply(o->w, j);
    if (st == LM_OK)
        return;
    metric_add(&o->w->metrics.retries, 1);
    log_seldom(&o->not_encodable, "outbox", "%s [%d] @%" PRId64 ": the reply can't be encoded yet "
               "(%s); trying again", j->lease->topic, (int)j->lease->partition, j->record.offset,
               lm_status_text(st));
    job_list_add(&o->later, j, lm_now_us() + backoff_us(j->waits++, cfg->retry_backoff_ms,
                                                        cfg->retry_backoff_max_ms));
}

static void send_back(outbox *o, struct job *j)
{
    const struct config *cfg = o->w->cfg;
    log_seldom(&o->failed, "outbox", "prompt '%s': %s; attempt %d of %" PRId64, j->prompt->id,
               j->result->error, j->attempts + 1, cfg->retry_max_attempts);
    metric_add(&o->w->metrics.retries, 1);
    engine_result_free(j->result);
    j->result = NULL;
    j->due_us = lm_now_us() + backoff_us(j->attempts - 1, cfg->retry_backoff_ms,
                                         cfg->retry_backoff_max_ms);
    atomic_store(&j->handle, 0);
    if (j->stream)
        stream_restart(j->stream);
    if (j->route.follows) {     /* the parts to come have a first of their own */
        j->route.partition = -1;
        j->route.follows = false;
    }
    job_set_stage(j, JOB_READY);
    atomic_fetch_add(&o->w->metrics.backlog, 1);
    job_queue_push(&o->w->to_intake, j);
}

static void failed(outbox *o, struct job *j, lm_status st)
{
    struct lm_err why;
    const char *text = j->result->error[0] ? j->result->error : lm_status_text(st);
    if (st == LM_DEVICE) {
        worker_fail(o->w, st, "the engine can't go on: %s", text);
        worker_end_job(o->w, j, OUTCOME_DROPPED);
        return;
    }
    if (lm_status_disposition(st) == LM_DO_RETRY &&
        worker_may_retry(o->w, j)) {
        send_back(o, j);
        return;
    }
    lm_err_set(&why, st, "%s", text);
    outcome_dead_letter(o->w, j, &why, "ENGINE");
}

/* The line is what the chaos suite counts: whatever is generated again has it twice. */
static void generated(outbox *o, struct job *j)
{
    lm_log(LM_DEBUG, "outbox", "%s [%d] @%" PRId64 " is generated", j->lease->topic,
           (int)j->lease->partition, j->record.offset);
    answer(o, j);
}

/* The engine is done with it, and so is its stream. */
static void conclude(outbox *o, struct job *j)
{
    const struct engine_result *r = j->result;
    lm_status st = result_status(r);
    if (was_cancelled(r) && (lease_revoked(j->lease) || atomic_load(&o->w->cancelling)))
        worker_end_job(o->w, j, OUTCOME_DROPPED);
    else if (st)
        failed(o, j, st);
    else
        generated(o, j);
}

/* ---- streamed replies ------------------------------------------------------------------- */

/* Is there a part to wait for before the final record may go? */
static bool stream_open(const struct job *j)
{
    return j->stream && (j->stream->sending || stream_has_text(j->stream));
}

static bool add_stream(outbox *o, struct job *j)
{
    if (o->n_streams == o->cap_streams) {
        size_t cap = LM_MAX(o->cap_streams * 2, 64);
        struct job **grown = lm_reallocarray(o->streams, cap, sizeof(*grown));
        if (!grown)
            return false;
        o->streams = grown;
        o->cap_streams = cap;
    }
    o->streams[o->n_streams++] = j;
    j->stream->listed = true;
    return true;
}

static void remove_stream(outbox *o, struct job *j)
{
    if (!j->stream || !j->stream->listed)
        return;
    j->stream->listed = false;
    for (size_t i = 0; i < o->n_streams; i++)
        if (o->streams[i] == j) {
            o->streams[i] = o->streams[--o->n_streams];
            return;
        }
}

/* The parts end here, the reply does not: its final record has all of the text, or is the dead
 * letter that says why there can be none. */
static void end_parts(struct stream *s)
{
    s->broken = true;
}

/* Sends what has gathered, if it may go now. */
static void send_part(outbox *o, struct job *j, int64_t now)
{
    struct stream *s = j->stream;
    if (s->sending || !stream_has_text(s) || (now < s->due_us && !s->ended) ||
        lease_revoked(j->lease))
        return;
    struct engine_result *text = stream_take(s);
    lm_status st = text ? outcome_part(o->w, j, text) : LM_NOMEM;
    if (text && lm_status_disposition(st) == LM_DO_RETRY) {
        stream_give_back(s, text);      /* the registry is away: it waits, before what comes */
        s->due_us = now + o->w->cfg->retry_backoff_ms * 1000;
        return;
    }
    if (text)
        engine_result_free(text);
    if (text && st)
        end_parts(s);
    s->sending = !st;
    s->seq += !st;
    s->due_us = now + o->w->cfg->stream_interval_ms * 1000;
}

static void maybe_conclude(outbox *o, struct job *j)
{
    if (!j->stream->ended || (stream_open(j) && !lease_revoked(j->lease) &&
                              !atomic_load(&o->w->cancelling)))
        return;
    remove_stream(o, j);
    conclude(o, j);
}

static void take_text(outbox *o, struct job *j, int choice, char *text, size_t len)
{
    if (!j->stream || (!j->stream->listed && !add_stream(o, j))) {
        if (j->stream)
            end_parts(j->stream);       /* what comes next would have a gap before it */
        free(text);
        return;
    }
    stream_add(j->stream, choice, text, len);
    send_part(o, j, lm_now_us());
}

static void take_report(outbox *o, struct job *j, const struct outgoing *part)
{
    struct stream *s = j->stream;
    s->sending = false;
    if (part->error) {
        end_parts(s);
        s->seq--;
    } else if (j->route.partition < 0 || j->route.follows) {
        /* Without a key the rest follows the first; should its partition be gone, a later one. */
        j->route.partition = part->partition;
        j->route.follows = j->route.partition >= 0;
    }
    send_part(o, j, lm_now_us());
    maybe_conclude(o, j);
}

/* A part has its report. Its parent is still ours, unless it did not wait for it (its partition
 * leaves, or the worker ends): then it is another thread's by now, and its stream with it. */
static void part_reported(outbox *o, struct job *part)
{
    if (part->parent->stream->listed)
        take_report(o, part->parent, &part->out);
    job_unref(part);
}

static void serve_streams(outbox *o)
{
    int64_t now = lm_now_us();
    for (struct job *p = job_queue_take(&o->w->parts, 0), *next; p; p = next) {
        next = p->next;
        part_reported(o, p);
    }
    for (size_t i = o->n_streams; i-- > 0;) {
        struct job *j = o->streams[i];
        send_part(o, j, now);
        maybe_conclude(o, j);
    }
}

/* ---- events ----------------------------------------------------------------------------- */

static void finished(outbox *o, struct job *j, struct engine_result *r)
{
    j->result = r;
    if (r->status != LM_DEVICE) {       /* else it is a suspect */
        worker_left_engine(o->w, j);
        job_set_stage(j, JOB_ANSWERING);
    }
    j->answered_us = o->now_us;
    histogram_observe(&o->w->metrics.processing, j->answered_us - j->submitted_us);
    if (j->stream && j->stream->listed) {
        j->stream->ended = true;
        send_part(o, j, j->answered_us);
        maybe_conclude(o, j);
    } else {
        conclude(o, j);
    }
}

static void take_event(outbox *o, struct engine_event *e)
{
    if (e->kind == ENGINE_FINISHED)
        finished(o, e->user, e->result);
    else
        take_text(o, e->user, e->choice, e->text, e->text_len);
}

static void serve_later(outbox *o)
{
    for (struct job *j = job_list_take_due(&o->later, lm_now_us()), *next; j; j = next) {
        next = j->next;
        answer(o, j);
    }
}

/* A wake for each result would cost as much as the result, so while more are to come we let some
 * gather: for less than replies wait for company anyway, in the client library (linger.ms) or for
 * their transaction. */
static void let_gather(const outbox *o, int n)
{
    const struct timespec pause = { 0, GATHER_US * 1000 };
    if (n > 0 && n < BATCH / 2 && atomic_load(&o->w->in_engine))
        nanosleep(&pause, NULL);
}

static void *outbox_main(void *arg)
{
    outbox *o = arg;
    struct worker *w = o->w;
    struct engine_event events[BATCH];
    while (!atomic_load(&w->ending)) {
        lm_status state = LM_OK;
        int wait = job_list_wait_ms(&o->later, lm_now_us(),
                                    o->n_streams ? STREAM_POLL_MS : POLL_MS);
        int n = engine_poll(w->engine, events, BATCH, wait, &state);
        o->now_us = lm_now_us();
        atomic_store(&w->outbox_beat_us, o->now_us);
        for (int i = 0; i < n; i++)
            take_event(o, &events[i]);
        if (n && atomic_load(&w->engine_full))
            job_queue_wake(&w->to_intake);
        serve_streams(o);
        serve_later(o);
        if (state && n == 0) {
            worker_fail(w, state, "the engine can't go on: %s", lm_status_text(state));
            break;
        }
        let_gather(o, n);
    }
    worker_drop_all(w, job_list_take_all(&o->later));
    while (o->n_streams) {
        struct job *j = o->streams[--o->n_streams];
        if (j->stream->ended)           /* else the engine still has it */
            worker_end_job(w, j, OUTCOME_DROPPED);
    }
    return NULL;
}

lm_status outbox_new(struct worker *w, outbox **out, struct lm_err *err)
{
    outbox *o = lm_calloc(1, sizeof *o);
    if (!o)
        return lm_err_set(err, LM_NOMEM, "out of memory");
    o->w = w;
    if (pthread_create(&o->thread, NULL, outbox_main, o)) {
        free(o);
        return lm_err_set(err, LM_NOMEM, "can't start the outbox thread");
    }
    *out = o;
    return LM_OK;
}

void outbox_free(outbox *o)
{
    if (!o)
        return;
    engine_wake(o->w->engine);
    pthread_join(o->thread, NULL);
    free(o->streams);
    free(o);
}
