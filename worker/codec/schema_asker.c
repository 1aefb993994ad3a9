/* SPDX-License-Identifier: Apache-2.0 */
/*
 * schema_asker.c - see schema_asker.h. Everything but the registry's handle is under the lock; the
 * handle is the thread's. A question that is ASKED stays in the list until its answer comes, so the
 * thread may point to it without the lock.
 */
#include "worker/codec/schema_asker.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

enum { MAX_QUESTIONS = 1024, REPLY_AGAIN_US = 1000000 };

enum state { WANTED, ASKED, ANSWERED };

struct waiters { void **at; size_t n, cap; };

struct question {
    struct question *next;
    struct schema_key key;
    enum state state;
    struct waiters waiters;
    char *text;                 /* ANSWERED: the schema, or NULL and `why` */
    struct lm_err why;
};

struct schema_asker {
    registry *registry;
    schema_asker_done *done;
    struct reply_schema replies;
    pthread_t thread;
    bool started;
    atomic_bool give_up;        /* what is in the air; the registry reads it */
    pthread_mutex_t lock;
    pthread_cond_t work, replied;
    bool stopped, ending;
    struct question *first, **tail;
    int n;
    bool asking_schema;         /* in the air is a question of the list */
    bool reply_wanted;
    int64_t wanted_us;          /* when the reply's id was; lm_now_us() */
    int64_t reply_until;        /* when it may be wanted again after a failure, reply_why */
    int32_t reply_id;           /* 0: not known */
    struct lm_err reply_why;
};

/* ---- questions: under the lock ------------------------------------------------------------ */

static struct question *find(schema_asker *a, const struct schema_key *key)
{
    struct question *q = a->first;
    while (q && !schema_key_equal(&q->key, key))
        q = q->next;
    return q;
}

static void question_free(struct question *q)
{
    free(q->waiters.at);
    free(q->text);
    free(q);
}

static void drop(schema_asker *a, struct question *q)
{
    struct question **at = &a->first;
    while (*at != q)
        at = &(*at)->next;
    *at = q->next;
    if (a->tail == &q->next)
        a->tail = at;
    a->n--;
    question_free(q);
}

/* Answers that nobody came for make room. */
static bool make_room(schema_asker *a)
{
    if (a->n < MAX_QUESTIONS)
        return true;
    for (struct question *q = a->first; q; q = q->next)
        if (q->state == ANSWERED) {
            drop(a, q);
            return true;
        }
    return false;
}

static struct question *add(schema_asker *a, const struct schema_key *key, struct lm_err *err)
{
    if (!make_room(a)) {
        lm_err_set(err, LM_NET, "%d schemas are being asked for, and more are not", MAX_QUESTIONS);
        return NULL;
    }
    struct question *q = lm_calloc(1, sizeof *q);
    if (!q) {
        lm_err_set(err, LM_NOMEM, "out of memory");
        return NULL;
    }
    q->key = *key;
    *a->tail = q;
    a->tail = &q->next;
    a->n++;
    return q;
}

static bool add_waiter(struct waiters *w, void *user)
{
    if (w->n == w->cap) {
        size_t cap = LM_MAX(w->cap * 2, 4);
        void **grown = lm_reallocarray(w->at, cap, sizeof *grown);
        if (!grown)
            return false;
        w->at = grown;
        w->cap = cap;
    }
    w->at[w->n++] = user;
    return true;
}

static lm_status want(schema_asker *a, const struct schema_key *key, void *user, struct lm_err *err)
{
    if (a->stopped)
        return lm_err_set(err, LM_CANCELLED, "no more schemas are asked for");
    struct question *q = find(a, key);
    if (q && q->state == ANSWERED)
        return LM_OK;
    if (!q && !(q = add(a, key, err)))
        return err->code;
    if (!add_waiter(&q->waiters, user))
        return lm_err_set(err, LM_NOMEM, "out of memory");
    pthread_cond_signal(&a->work);
    return LM_BUSY;
}

lm_status schema_asker_want(schema_asker *a, const struct schema_key *key, void *user,
                            struct lm_err *err)
{
    struct lm_err why = { LM_OK, "" };
    pthread_mutex_lock(&a->lock);
    lm_status st = want(a, key, user, &why);
    pthread_mutex_unlock(&a->lock);
    if (err)
        *err = why;
    return st;
}

bool schema_asker_take(schema_asker *a, const struct schema_key *key, char **text,
                       struct lm_err *why)
{
    pthread_mutex_lock(&a->lock);
    struct question *q = find(a, key);
    bool here = q && q->state == ANSWERED;
    if (here) {
        *text = q->text;
        *why = q->why;
        q->text = NULL;
        drop(a, q);
    }
    pthread_mutex_unlock(&a->lock);
    return here;
}

/* ---- the reply schema ---------------------------------------------------------------------- */

static struct timespec monotonic(int64_t us)
{
    return (struct timespec){ us / 1000000, us % 1000000 * 1000 };
}

/* Under the lock. */
static lm_status reply_id(schema_asker *a, int wait_ms, int32_t *id, struct lm_err *err)
{
    if (!a->reply_id && !a->reply_wanted && lm_now_us() >= a->reply_until) {
        a->reply_wanted = true;
        a->wanted_us = lm_now_us();
        pthread_cond_signal(&a->work);
    }
    const struct timespec end = monotonic(a->wanted_us + (int64_t)wait_ms * 1000);
    while (a->reply_wanted &&
           pthread_cond_timedwait(&a->replied, &a->lock, &end) != ETIMEDOUT)
        ;
    *id = a->reply_id;
    if (a->reply_id)
        return LM_OK;
    if (a->reply_wanted)
        return lm_err_set(err, LM_NET, "the schema registry has not answered yet for %.200s",
                          a->replies.subject);
    if (err)
        *err = a->reply_why;
    return a->reply_why.code;
}

lm_status schema_asker_reply_id(schema_asker *a, int wait_ms, int32_t *id, struct lm_err *err)
{
    pthread_mutex_lock(&a->lock);
    lm_status st = reply_id(a, wait_ms, id, err);
    pthread_mutex_unlock(&a->lock);
    return st;
}

/* ---- thread: called with the lock, which is open while the registry is asked ---------------- */

static void ask_reply(schema_asker *a)
{
    int32_t id = 0;
    struct lm_err why = { LM_OK, "" };
    pthread_mutex_unlock(&a->lock);
    lm_status st = registry_id_of(a->registry, a->replies.subject, a->replies.text,
                                  a->replies.create, &id, &why);
    pthread_mutex_lock(&a->lock);
    a->reply_wanted = false;
    a->reply_id = st ? 0 : id;
    a->reply_why = why;
    a->reply_until = lm_now_us() + REPLY_AGAIN_US;
    pthread_cond_broadcast(&a->replied);
}

static void tell(schema_asker_done *done, struct waiters *w, const struct lm_err *trouble)
{
    for (size_t i = 0; i < w->n; i++)
        done(w->at[i], trouble);
    free(w->at);
    *w = (struct waiters){ 0 };
}

static void ask_schema(schema_asker *a, struct question *q)
{
    char *text = NULL;
    struct lm_err why = { LM_OK, "" };
    const struct schema_key key = q->key;
    q->state = ASKED;
    a->asking_schema = true;
    pthread_mutex_unlock(&a->lock);
    lm_status st = key.is_guid ? registry_by_guid(a->registry, key.guid, &text, &why)
                               : registry_by_id(a->registry, key.id, &text, &why);
    pthread_mutex_lock(&a->lock);
    a->asking_schema = false;
    bool trouble = st && lm_status_disposition(st) != LM_DO_REFUSE;
    struct waiters waiting = q->waiters;
    q->waiters = (struct waiters){ 0 };
    if (trouble) {
        drop(a, q);
    } else {
        q->state = ANSWERED;
        q->text = text;
        q->why = why;
    }
    pthread_mutex_unlock(&a->lock);
    tell(a->done, &waiting, trouble ? &why : NULL);
    pthread_mutex_lock(&a->lock);
}

static struct question *next_wanted(const schema_asker *a)
{
    struct question *q = a->stopped ? NULL : a->first;
    while (q && q->state != WANTED)
        q = q->next;
    return q;
}

static void *asker_main(void *arg)
{
    schema_asker *a = arg;
    struct question *q;
    pthread_mutex_lock(&a->lock);
    while (!a->ending) {
        atomic_store(&a->give_up, false);
        if (a->reply_wanted)
            ask_reply(a);
        else if ((q = next_wanted(a)))
            ask_schema(a, q);
        else
            pthread_cond_wait(&a->work, &a->lock);
    }
    pthread_mutex_unlock(&a->lock);
    return NULL;
}

/* ---- life ---------------------------------------------------------------------------------- */

void schema_asker_stop(schema_asker *a)
{
    const struct lm_err stopped = { LM_CANCELLED, "no more schemas are asked for" };
    pthread_mutex_lock(&a->lock);
    a->stopped = true;
    if (a->asking_schema)
        atomic_store(&a->give_up, true);
    for (struct question *q = a->first; q; q = q->next)
        tell(a->done, &q->waiters, &stopped);
    pthread_mutex_unlock(&a->lock);
}

static void init_locks(schema_asker *a)
{
    pthread_condattr_t attr;
    pthread_mutex_init(&a->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&a->work, &attr);
    pthread_cond_init(&a->replied, &attr);
    pthread_condattr_destroy(&attr);
}

lm_status schema_asker_new(const struct registry_config *cfg, const struct reply_schema *replies,
                           schema_asker_done *done, schema_asker **out, struct lm_err *err)
{
    schema_asker *a = lm_calloc(1, sizeof *a);
    if (!a)
        return lm_err_set(err, LM_NOMEM, "out of memory");
    struct registry_config rc = *cfg;
    rc.stop = &a->give_up;
    a->replies = *replies;
    a->done = done;
    a->tail = &a->first;
    init_locks(a);
    lm_status st = registry_new(&rc, &a->registry, err);
    if (!st && pthread_create(&a->thread, NULL, asker_main, a))
        st = lm_err_set(err, LM_NOMEM, "can't start the thread that asks the registry");
    a->started = !st;
    if (st)
        schema_asker_free(a);
    else
        *out = a;
    return st;
}

void schema_asker_free(schema_asker *a)
{
    if (!a)
        return;
    pthread_mutex_lock(&a->lock);
    a->ending = true;
    atomic_store(&a->give_up, true);
    pthread_cond_signal(&a->work);
    pthread_mutex_unlock(&a->lock);
    if (a->started)
        pthread_join(a->thread, NULL);
    for (struct question *q = a->first, *next; q; q = next) {
        next = q->next;
        question_free(q);
    }
    registry_free(a->registry);
    pthread_mutex_destroy(&a->lock);
    pthread_cond_destroy(&a->work);
    pthread_cond_destroy(&a->replied);
    free(a);
}
