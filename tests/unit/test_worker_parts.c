/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_parts.c - a part of a streamed reply that fails, or can't be made: what becomes of
 * the final record, and that what waits for a part is in the engine no more; and what a worker that
 * ends has cut off.
 * The outbox and its thread are real; the engine's events, and what is encoded and sent, are the
 * test's.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include "consumer_world.h"
#include "worker/outcome.h"
#include "worker/stream.h"

/* Under the lock. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct engine_event event;       /* the next one, if there is one */
static bool there, woken;
static int polls;                       /* begun */
static struct job *part;                /* the last one sent */
static int final_seq;                   /* of the final record; -1: there is none yet */
static lm_status part_status;           /* what becomes of the next part */
static bool no_memory;                  /* for the next array that grows */

/* ---- the engine, and what is sent ------------------------------------------------------------ */

int __wrap_engine_poll(engine *e, struct engine_event *out, int max, int ms, lm_status *state);
int __wrap_engine_poll(engine *e, struct engine_event *out, int max, int ms, lm_status *state)
{
    (void)e, (void)max, (void)ms, (void)state;
    pthread_mutex_lock(&lock);
    polls++;
    pthread_cond_broadcast(&changed);
    while (!there && !woken)
        pthread_cond_wait(&changed, &lock);
    int n = there;
    *out = event;
    there = woken = false;
    pthread_mutex_unlock(&lock);
    return n;
}

void __wrap_engine_wake(engine *e);
void __wrap_engine_wake(engine *e)
{
    (void)e;
    pthread_mutex_lock(&lock);
    woken = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

lm_status __wrap_outcome_part(struct worker *w, struct job *j, const struct engine_result *text);
lm_status __wrap_outcome_part(struct worker *w, struct job *j, const struct engine_result *text)
{
    (void)w, (void)text;
    pthread_mutex_lock(&lock);
    lm_status st = part_status;
    part = st ? NULL : job_child(j);
    pthread_mutex_unlock(&lock);
    return st;
}

void *__real_lm_reallocarray(void *p, size_t n, size_t size);
void *__wrap_lm_reallocarray(void *p, size_t n, size_t size);
void *__wrap_lm_reallocarray(void *p, size_t n, size_t size)
{
    pthread_mutex_lock(&lock);
    bool fails = no_memory;
    no_memory = false;
    pthread_mutex_unlock(&lock);
    return fails ? NULL : __real_lm_reallocarray(p, n, size);
}

lm_status __wrap_outcome_reply(struct worker *w, struct job *j);
lm_status __wrap_outcome_reply(struct worker *w, struct job *j)
{
    (void)w;
    pthread_mutex_lock(&lock);
    final_seq = j->stream->seq;
    pthread_mutex_unlock(&lock);
    return LM_OK;
}

/* ---- the world ------------------------------------------------------------------------------- */

/* Until the outbox has dealt with what it was told last, and waits again. */
static void until_done(int before)
{
    pthread_mutex_lock(&lock);
    while (polls < before + 1)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

/* The outbox waits for it; returns when it has dealt with it. */
static void happens(struct engine_event e)
{
    pthread_mutex_lock(&lock);
    while (polls == 0)
        pthread_cond_wait(&changed, &lock);
    int before = polls;
    event = e;
    there = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    until_done(before);
}

static void says(struct job *j, const char *text)
{
    happens((struct engine_event){ .kind = ENGINE_TOKENS, .user = j, .text = lm_strdup(text),
                                   .text_len = strlen(text) });
}

/* With two choices, which ended so. */
static void finishes_both(struct job *j, enum engine_reason first, enum engine_reason second)
{
    struct engine_result *r = engine_result_new(2);
    r->n_choices = 2;
    r->choices[0].reason = first;
    r->choices[1].reason = second;
    happens((struct engine_event){ .kind = ENGINE_FINISHED, .user = j, .result = r });
}

static void finishes(struct job *j)
{
    finishes_both(j, ENGINE_STOP, ENGINE_STOP);
}

static void part_fails(struct worker *w)
{
    pthread_mutex_lock(&lock);
    int before = polls;
    pthread_mutex_unlock(&lock);
    worker_end_job(w, part, OUTCOME_DROPPED);
    until_done(before);
}

struct scene { struct world *x; outbox *o; struct job *j; };

/* A prompt that has said nothing yet. */
static void begin_silent(struct scene *s)
{
    s->x = world_open();
    job_queue_init(&s->x->w.parts);
    polls = 0;
    there = woken = no_memory = false;
    part = NULL;
    part_status = LM_OK;
    final_seq = -1;
    s->j = world_deliver(s->x, 0, NULL);
    s->j->stream = stream_new(1);
    atomic_store(&s->x->w.in_engine, 1);
    assert_int_equal(outbox_new(&s->x->w, &s->o, NULL), LM_OK);
}

/* One part is on its way. */
static void begin(struct scene *s)
{
    begin_silent(s);
    says(s->j, "once upon");
    assert_int_equal(s->j->stream->seq, 1);
}

static void end(struct scene *s)
{
    atomic_store(&s->x->w.ending, true);
    outbox_free(s->o);
    job_unref(s->j);
    job_queue_release(&s->x->w.parts);
    world_close(s->x);
}

/* ---- tests ----------------------------------------------------------------------------------- */

static void the_final_record_counts_the_parts_that_arrived(void **state)
{
    struct scene s;
    (void)state;
    begin(&s);
    finishes(s.j);
    assert_int_equal(final_seq, -1);    /* it waits for the part */
    part_fails(&s.x->w);
    assert_int_equal(final_seq, 0);
    end(&s);
}

/* Its partition leaves, so nobody waits for the part any more: the final record is on its way, and
 * the claim thread may encode it anew at any time (claim.c). */
static void a_part_that_fails_late_changes_nothing(void **state)
{
    struct scene s;
    (void)state;
    begin(&s);
    atomic_store(&s.j->lease->revoked, true);
    finishes(s.j);
    assert_int_equal(final_seq, 1);
    part_fails(&s.x->w);
    assert_int_equal(s.j->stream->seq, 1);
    assert_false(s.j->stream->broken);
    end(&s);
}

/* A suspect keeps the engine closed to all others no longer than it is in there (isolation.c). */
static void what_waits_for_a_part_has_left_the_engine(void **state)
{
    struct scene s;
    (void)state;
    begin(&s);
    job_set_stage(s.j, JOB_RUNNING);
    finishes(s.j);
    assert_int_equal(final_seq, -1);
    assert_int_equal(atomic_load(&s.x->w.in_engine), 0);
    assert_int_equal(atomic_load(&s.j->stage), JOB_ANSWERING);
    part_fails(&s.x->w);
    assert_int_equal(final_seq, 0);
    end(&s);
}

/* The registry refuses the replies' schema, say: the final record becomes a dead letter that says
 * so. A part that waited for better days would be waited for by it. */
static void a_part_that_can_never_be_made_is_not_waited_for(void **state)
{
    struct scene s;
    (void)state;
    begin_silent(&s);
    part_status = LM_NOT_FOUND;
    says(s.j, "once upon");
    part_status = LM_OK;
    says(s.j, "a time");
    assert_null(part);                  /* the text between would be missing */
    finishes(s.j);
    assert_int_equal(final_seq, 0);
    end(&s);
}

static void a_part_that_can_be_made_later_is_waited_for(void **state)
{
    struct scene s;
    (void)state;
    begin_silent(&s);
    part_status = LM_NET;
    says(s.j, "once upon");
    finishes(s.j);
    assert_int_equal(final_seq, -1);
    assert_true(stream_has_text(s.j->stream));
    job_ref(s.j);                       /* the outbox, at its end, hands it back to the consumer */
    end(&s);
}

static void after_text_is_lost_there_are_no_parts(void **state)
{
    struct scene s;
    (void)state;
    begin_silent(&s);
    no_memory = true;
    says(s.j, "once upon");
    assert_false(no_memory);
    says(s.j, "a time");
    assert_null(part);
    finishes(s.j);
    assert_int_equal(final_seq, 0);
    end(&s);
}

/* A choice that is over stays so when the rest is cancelled. Of n choices any may be cut off. */
static void what_is_cut_off_in_part_is_no_reply(void **state)
{
    static const enum engine_reason cut[][2] = { { ENGINE_STOP, ENGINE_CANCELLED },
                                                 { ENGINE_CANCELLED, ENGINE_STOP } };
    (void)state;
    for (size_t i = 0; i < LM_COUNT(cut); i++) {
        struct scene s;
        begin(&s);
        atomic_store(&s.x->w.cancelling, true);
        finishes_both(job_ref(s.j), cut[i][0], cut[i][1]);
        assert_int_equal(final_seq, -1);
        assert_ptr_equal(job_queue_take(&s.x->w.done, 0), s.j);
        assert_int_equal(s.j->outcome, OUTCOME_DROPPED);
        job_unref(s.j);
        part_fails(&s.x->w);
        end(&s);
    }
}

/* It was cancelled by an order: that is its answer. */
static void what_an_order_cuts_off_in_part_is_a_reply(void **state)
{
    struct scene s;
    (void)state;
    begin(&s);
    finishes_both(s.j, ENGINE_STOP, ENGINE_CANCELLED);
    part_fails(&s.x->w);
    assert_int_equal(final_seq, 0);
    end(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_final_record_counts_the_parts_that_arrived),
        cmocka_unit_test(a_part_that_fails_late_changes_nothing),
        cmocka_unit_test(what_waits_for_a_part_has_left_the_engine),
        cmocka_unit_test(a_part_that_can_never_be_made_is_not_waited_for),
        cmocka_unit_test(a_part_that_can_be_made_later_is_waited_for),
        cmocka_unit_test(after_text_is_lost_there_are_no_parts),
        cmocka_unit_test(what_is_cut_off_in_part_is_no_reply),
        cmocka_unit_test(what_an_order_cuts_off_in_part_is_a_reply),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
