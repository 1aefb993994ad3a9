/* SPDX-License-Identifier: Apache-2.0 */
/*
 * transaction_aside.c - exactly-once: the jobs of topics that take nothing are set aside, and tried
 * in transactions of their own; see aside.h, which says when.
 *
 * Threads: the producer thread's.
 */
#include "worker/transaction_int.h"

#include "worker/blame.h"
#include "worker/delivery.h"

enum { LOOK_MS = 500 };         /* to ask the brokers for leaders */

/* ---- who waits -------------------------------------------------------------------------- */

bool transaction_waits_aside(struct tx *t, struct job *j)
{
    if (withheld_keep(&t->p->withheld, j))
        return true;
    if (aside_spares(&t->p->aside, j))
        delivery_leave_notice(t->p, j);
    return aside_keep(&t->p->aside, j, lm_now_us());
}

/* False: it is not for such a topic. */
static bool put_aside(struct tx *t, struct job *j)
{
    if (delivery_refused(&j->out) || delivery_refused(j->notice))
        return false;
    if (transaction_waits_aside(t, j))
        return true;
    const struct outgoing *o = blame_held_up(&t->stage, t->code, j);
    return o && !aside_add(&t->p->aside, o->topic, j, lm_now_us());
}

bool transaction_set_aside(struct tx *t)
{
    bool any = false;
    for (size_t i = 0; i < t->stage.n; i++) {
        struct job *j = t->stage.jobs[i];
        if (j && t->trial) {
            blame_of_try(t->p, t->trial->name, t->code, j);
        } else if (j && put_aside(t, j)) {
            t->stage.jobs[i] = NULL;
            transaction_forget_attempt(t, j);
            any = true;
        }
    }
    return any;
}

/* ---- tries ------------------------------------------------------------------------------ */

/* What is withheld by now is not tried: it is sorted out here. */
void transaction_take_aside(struct tx *t)
{
    size_t most = (size_t)t->w->cfg->transaction_max_messages;
    most = t->trial->whole ? most : LM_MIN(t->trial->width, most);
    t->stage.n = t->stage.from = t->bytes = 0;
    for (struct job *j; t->stage.n < most && t->bytes < TRANSACTION_MAX_BYTES &&
                        (j = job_chain_pop(&t->trial->jobs));) {
        if (withheld_keep(&t->p->withheld, j))
            t->gone++;
        else
            transaction_enter(t, j);
    }
    t->full = false;
}

/* Of dead letters only the notices are for it: they go without, or wait for their own topic. */
static void spare_notices(struct tx *t, struct aside_topic *a)
{
    for (size_t n = a->jobs.length; n; n--) {
        struct job *j = job_chain_pop(&a->jobs);
        if (!transaction_waits_aside(t, j))
            transaction_make_ready(t, j);
    }
}

/* Nor need those of partitions that leave us be waited for. Else staging tells which can be
 * committed still. */
static void takes_nothing(struct tx *t, struct aside_topic *a)
{
    worker_drop_all(t->w, aside_take_revoked(a));
    spare_notices(t, a);
}

static bool make_try(struct tx *t, struct aside_topic *a)
{
    t->gone = 0;
    t->begun = t->overran = false;
    t->trial = a;
    bool going = transaction_run(t, true);
    t->trial = NULL;
    if (t->begun)
        a->forbidden = t->code == RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
    return going;
}

bool transaction_try(struct tx *t, struct aside_topic *a)
{
    const struct config *cfg = t->w->cfg;
    int64_t began = lm_now_us();
    int64_t limit = aside_limit_us(a, t->p->transaction_timeout_ms * 1000);
    size_t before = a->jobs.length;
    if (!aside_may_take(t->p->rk, a->name, LM_MIN(LOOK_MS, transaction_call_ms(t)))) {
        aside_looked(a, lm_now_us(), cfg->retry_backoff_ms, cfg->retry_backoff_max_ms);
        takes_nothing(t, a);
        return true;
    }
    bool going = make_try(t, a);
    size_t left = a->jobs.length + t->gone, taken = before - LM_MIN(before, left);
    bool any = a->jobs.head;
    if (taken >= ASIDE_TRUSTED && !a->forbidden)
        for (struct job *j; (j = job_chain_pop(&a->jobs));)
            transaction_make_ready(t, j);
    if (!t->begun)
        aside_waits(&t->p->aside, a, lm_now_us());
    else
        aside_tried(&t->p->aside, a, taken, began, limit, lm_now_us(), cfg->retry_backoff_ms,
                    cfg->retry_backoff_max_ms);
    if (t->begun && any && !taken) {
        takes_nothing(t, a);
        t->stale |= t->overran && aside_stuck(a);
    }
    return going;
}

struct aside_topic *transaction_to_try(struct tx *t, int64_t now, bool others)
{
    bool may = !t->open && !transaction_last_call(t) && now >= t->not_before_us &&
               !(others && t->tried);
    struct aside_topic *a = may ? aside_due(&t->p->aside, now) : NULL;
    t->tried = a;
    return a;
}
