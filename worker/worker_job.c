/* SPDX-License-Identifier: Apache-2.0 */
/*
 * worker_job.c - what the worker as a whole keeps of each job: whether the engine has it, what it
 * counts for in the budgets, how often it was tried, and that it has ended.
 *
 * A job ends once, with its outcome durable or dropped, and goes to the consumer thread, which
 * alone touches the ledger. A part of a streamed reply goes back to the outbox instead.
 *
 * Threads: whoever has the job.
 */
#include "worker/worker.h"

#include <inttypes.h>

#include "worker/cancels.h"
#include "worker/journal.h"
#include "worker/spans.h"

/* ---- the engine ------------------------------------------------------------------------- */

void worker_enter_engine(struct worker *w, struct job *j, bool alone)
{
    atomic_fetch_add(&w->in_engine, 1);
    if ((j->runs_alone = alone)) {
        atomic_store(&w->alone, true);
        lm_log(LM_INFO, "intake", "%s [%d] @%" PRId64 " runs alone: workers died while it ran",
               j->lease->topic, (int)j->lease->partition, j->record.offset);
    }
    if (w->journal)
        j->journaled = journal_enter(w->journal, j->journal_key, alone) + 1;
}

void worker_left_engine(struct worker *w, struct job *j)
{
    if (j->journaled)
        journal_leave(w->journal, j->journaled - 1);
    j->journaled = 0;
    if (j->runs_alone)          /* not who was the last: the next may be in, and be alone, by now */
        atomic_store(&w->alone, false);
    j->runs_alone = false;
    atomic_fetch_sub(&w->in_engine, 1);
}

bool worker_may_retry(struct worker *w, struct job *j)
{
    return ++j->attempts < w->cfg->retry_max_attempts &&
           lm_now_us() - j->received_us < w->cfg->retry_deadline_ms * 1000;
}

/* ---- budgets ---------------------------------------------------------------------------- */

/* One prompt that asks for millions is no reason to read nothing else until it has ended. */
void worker_count_tokens(struct worker *w, struct job *j, long long tokens)
{
    tokens = LM_MIN(tokens, LM_MAX(w->cfg->intake_max_tokens / 8, 1));
    if (tokens != j->tokens)
        atomic_fetch_add(&w->metrics.held_tokens, tokens - j->tokens);
    j->tokens = tokens;
}

void worker_count_generation(struct worker *w, struct job *j, long long own, long long more)
{
    if (j->lease->priority < atomic_load(&w->most_urgent)) {
        long long share = w->cfg->intake_max_tokens * LOWER_SHARE / 8;
        long long others = atomic_load(&w->metrics.held_tokens) - j->tokens;
        more = LM_MIN(more, LM_MAX(share - others - own, 0));
    }
    worker_count_tokens(w, j, own + more);
}

static void count(struct worker *w, struct job *j, size_t reply_bytes)
{
    worker_count_tokens(w, j, 0);
    if (reply_bytes != j->reply_bytes)
        atomic_fetch_add(&w->metrics.reply_bytes_held,
                         (long long)reply_bytes - (long long)j->reply_bytes);
    j->reply_bytes = reply_bytes;
}

static size_t bytes_of(const struct outgoing *o)
{
    size_t n = o->value_owned ? o->len : 0;
    for (int i = 0; i < o->headers.n; i++)
        n += sizeof o->headers.items[i] + o->headers.items[i].len;
    return n;
}

void worker_generated(struct worker *w, struct job *j)
{
    count(w, j, bytes_of(&j->out) + (j->notice ? bytes_of(j->notice) : 0));
}

void worker_discount(struct worker *w, struct job *j)
{
    count(w, j, 0);
}

/* ---- ends ------------------------------------------------------------------------------- */

bool worker_gives_up(struct worker *w, struct job *j)
{
    return atomic_load(&w->stopping) || lease_revoked(j->lease);
}

static void end_part(struct worker *w, struct job *j, enum job_outcome outcome)
{
    if (outcome == OUTCOME_DROPPED)
        j->out.error = j->out.error ? j->out.error : -1;
    job_queue_push(&w->parts, j);
    engine_wake(w->engine);
}

void worker_end_among(struct worker *w, struct job *j, enum job_outcome outcome,
                      struct job_chain *ended)
{
    if (j->parent) {            /* a part: no outcome of its own */
        end_part(w, j, outcome);
        return;
    }
    if (w->cancels)
        cancels_leave(w->cancels, j);
    spans_end(w->spans, j, outcome);
    j->outcome = outcome;
    job_set_stage(j, outcome == OUTCOME_DROPPED ? JOB_DROPPED : JOB_ENDED);
    job_chain_add(ended, j);
}

void worker_give_ended(struct worker *w, struct job_chain *ended)
{
    job_queue_push_all(&w->done, ended);
}

void worker_end_job(struct worker *w, struct job *j, enum job_outcome outcome)
{
    struct job_chain one = { 0 };
    worker_end_among(w, j, outcome, &one);
    worker_give_ended(w, &one);
}

void worker_drop_all(struct worker *w, struct job *chain)
{
    struct job_chain ended = { 0 };
    for (struct job *next; chain; chain = next) {
        next = chain->next;
        worker_end_among(w, chain, OUTCOME_DROPPED, &ended);
    }
    worker_give_ended(w, &ended);
}
