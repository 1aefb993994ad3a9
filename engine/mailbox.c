/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mailbox.c - slots, an inbox list, an outbox list, one mutex, two condition variables.
 *
 * Life of a slot:   FREE --submit--> LIVE --post_request--> ENDED --poll--> FREE (generation + 1)
 *
 * `news` is the only word that the engine thread reads without the lock: it is set (under the lock)
 * whenever the inbox, the list of cancelled requests or `stop` changes, and cleared (under the
 * lock) by mailbox_take().
 *
 * Cancelled requests are listed, so that a cancellation costs the same however many wait. With the
 * inbox, mailbox_take() moves that list to `taken`: who is on it has been handed over. Whoever ends
 * by another way leaves either list in mailbox_post_request().
 */
#include "engine/mailbox.h"

#include "engine/output.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum slot_state { SLOT_FREE, SLOT_LIVE, SLOT_ENDED };

struct slot {
    uint32_t generation;
    uint8_t state;
    struct request *live;       /* while LIVE */
};

struct mailbox {
    pthread_mutex_t mu;
    pthread_cond_t work;        /* for the engine thread */
    pthread_cond_t events;      /* for pollers */
    atomic_bool news;

    /* under mu */
    struct slot *slots;
    int32_t *free_slots;
    int n_slots, n_free;
    struct request *in_head, **in_tail;
    struct request *cancelled, *taken;  /* linked by `cancel_next` */
    struct event_node *out_head, **out_tail;
    bool stop, roused;
    unsigned wakes, seen;       /* mailbox_wake() calls: all, and those before a poll's end */
    uint64_t order;
    lm_status failed;
};

lm_status mailbox_new(int capacity, mailbox **out, struct lm_err *err)
{
    mailbox *m = lm_calloc(1, sizeof *m);
    if (!m)
        return lm_err_set(err, LM_NOMEM, "no memory for the request queue");
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&m->mu, NULL);
    pthread_cond_init(&m->work, &attr);
    pthread_cond_init(&m->events, &attr);
    pthread_condattr_destroy(&attr);
    m->in_tail = &m->in_head;
    m->out_tail = &m->out_head;
    m->slots = lm_calloc((size_t)capacity, sizeof *m->slots);
    m->free_slots = lm_calloc((size_t)capacity, sizeof *m->free_slots);
    if (!m->slots || !m->free_slots) {
        mailbox_free(m);
        return lm_err_set(err, LM_NOMEM, "no memory for %d request slots", capacity);
    }
    m->n_slots = m->n_free = capacity;
    for (int i = 0; i < capacity; i++) {
        m->slots[i].generation = 1;
        m->free_slots[i] = capacity - 1 - i;
    }
    *out = m;
    return LM_OK;
}

static void node_free(struct event_node *n)
{
    if (!n)
        return;
    engine_result_free(n->ev.result);
    request_free(n->done);
    free(n->ev.text);
    free(n);
}

void mailbox_free(mailbox *m)
{
    if (!m)
        return;
    for (struct request *r = m->in_head, *next; r; r = next) {
        next = r->next;
        request_free(r);
    }
    for (struct event_node *n = m->out_head, *next; n; n = next) {
        next = n->next;
        node_free(n);
    }
    pthread_mutex_destroy(&m->mu);
    pthread_cond_destroy(&m->work);
    pthread_cond_destroy(&m->events);
    free(m->slots);
    free(m->free_slots);
    free(m);
}

/* ---- handles --------------------------------------------------------------------------- */

static engine_handle handle_make(const mailbox *m, int slot)
{
    return (uint64_t)m->slots[slot].generation << 32 | (uint32_t)(slot + 1);
}

static struct slot *handle_slot(mailbox *m, engine_handle h)
{
    uint32_t i = (uint32_t)h;
    if (i == 0 || i > (uint32_t)m->n_slots)
        return NULL;
    return m->slots[i - 1].generation == (uint32_t)(h >> 32) ? &m->slots[i - 1] : NULL;
}

static void slot_give_back(mailbox *m, engine_handle h)
{
    struct slot *s = handle_slot(m, h);
    if (!s)
        return;
    s->state = SLOT_FREE;
    if (++s->generation == 0)
        s->generation = 1;
    m->free_slots[m->n_free++] = (int32_t)(s - m->slots);
}

static void tell_engine(mailbox *m)
{
    atomic_store_explicit(&m->news, true, memory_order_release);
    pthread_cond_signal(&m->work);
}

/* ---- callers --------------------------------------------------------------------------- */

static lm_status accepts_locked(const mailbox *m, struct lm_err *err)
{
    if (m->failed)
        return lm_err_set(err, m->failed, "the engine has failed (%s); restart the process",
                          lm_status_text(m->failed));
    if (m->stop)
        return lm_err_set(err, LM_STATE, "the engine is closing");
    if (m->n_free == 0)
        return lm_err_set(err, LM_BUSY,
                          "%d requests are submitted and not yet polled; poll, then try again",
                          m->n_slots);
    return LM_OK;
}

lm_status mailbox_accepts(mailbox *m, struct lm_err *err)
{
    pthread_mutex_lock(&m->mu);
    lm_status st = accepts_locked(m, err);
    pthread_mutex_unlock(&m->mu);
    return st;
}

static engine_handle slot_claim(mailbox *m, enum slot_state state, struct request *live)
{
    int slot = m->free_slots[--m->n_free];
    m->slots[slot].state = (uint8_t)state;
    m->slots[slot].live = live;
    return handle_make(m, slot);
}

lm_status mailbox_submit(mailbox *m, struct request *r, engine_handle *out, struct lm_err *err)
{
    pthread_mutex_lock(&m->mu);
    lm_status st = accepts_locked(m, err);
    if (st == LM_OK) {
        *out = r->handle = slot_claim(m, SLOT_LIVE, r);
        r->order = m->order++;
        r->next = NULL;
        *m->in_tail = r;
        m->in_tail = &r->next;
        tell_engine(m);
    }
    pthread_mutex_unlock(&m->mu);
    return st;
}

static void append(mailbox *m, struct event_node *n)
{
    n->next = NULL;
    *m->out_tail = n;
    m->out_tail = &n->next;
    pthread_cond_signal(&m->events);
}

lm_status mailbox_answer(mailbox *m, void *user, struct engine_result *result, engine_handle *out,
                         struct lm_err *err)
{
    struct event_node *n = lm_calloc(1, sizeof *n);
    if (!n) {
        engine_result_free(result);
        return lm_err_set(err, LM_NOMEM, "no memory for an answer");
    }
    pthread_mutex_lock(&m->mu);
    lm_status st = accepts_locked(m, err);
    if (st == LM_OK) {
        *out = slot_claim(m, SLOT_ENDED, NULL);
        n->ev = (struct engine_event){ .kind = ENGINE_FINISHED, .handle = *out, .user = user,
                                       .result = result };
        append(m, n);
    }
    pthread_mutex_unlock(&m->mu);
    if (st != LM_OK) {
        engine_result_free(result);
        free(n);
    }
    return st;
}

static void list_cancelled(struct request **list, struct request *r)
{
    r->cancel_next = *list;
    if (*list)
        (*list)->cancel_at = &r->cancel_next;
    r->cancel_at = list;
    *list = r;
}

static void unlist_cancelled(struct request *r)
{
    if (!r->cancel_at)
        return;
    *r->cancel_at = r->cancel_next;
    if (r->cancel_next)
        r->cancel_next->cancel_at = r->cancel_at;
    r->cancel_at = NULL;
}

lm_status mailbox_cancel(mailbox *m, engine_handle h)
{
    lm_status st = LM_NOT_FOUND;
    pthread_mutex_lock(&m->mu);
    struct slot *s = handle_slot(m, h);
    if (s && s->state == SLOT_LIVE) {
        if (!s->live->cancel_at)
            list_cancelled(&m->cancelled, s->live);
        tell_engine(m);
        st = LM_OK;
    }
    pthread_mutex_unlock(&m->mu);
    return st;
}

static struct timespec after_ms(int ms)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    ts.tv_sec += ms / 1000;
    ts.tv_nsec += (long)(ms % 1000) * 1000000;
    if (ts.tv_nsec >= 1000000000) {
        ts.tv_sec++;
        ts.tv_nsec -= 1000000000;
    }
    return ts;
}

static void wait_on(pthread_cond_t *c, pthread_mutex_t *mu, int ms, const struct timespec *until,
                    bool *late)
{
    if (ms < 0)
        pthread_cond_wait(c, mu);
    else
        *late = pthread_cond_timedwait(c, mu, until) == ETIMEDOUT;
}

/* Unlinks the first event, under the lock. */
static struct event_node *take_event(mailbox *m)
{
    struct event_node *n = m->out_head;
    m->out_head = n->next;
    if (!m->out_head)
        m->out_tail = &m->out_head;
    if (n->owner)
        *n->owner = NULL;
    if (n->ev.kind == ENGINE_FINISHED)
        slot_give_back(m, n->ev.handle);
    return n;
}

/* Gives it to the caller, without the lock: here results are put together. */
static void hand_over(struct event_node *n, struct engine_event *out)
{
    *out = n->ev;
    if (n->done) {
        out->result = output_result(n->done);
        request_free(n->done);
    }
    free(n);
}

int mailbox_poll(mailbox *m, struct engine_event *out, int max, int timeout_ms, lm_status *state)
{
    struct timespec until = after_ms(LM_MAX(timeout_ms, 0));
    bool late = timeout_ms == 0;
    struct event_node *list = NULL, **end = &list;
    int n = 0;
    pthread_mutex_lock(&m->mu);
    unsigned wakes = m->seen;           /* a wake since the last poll counts too */
    while (!m->out_head && !late && wakes == m->wakes && !m->failed)
        wait_on(&m->events, &m->mu, timeout_ms, &until, &late);
    m->seen = m->wakes;
    for (; n < max && m->out_head; n++, end = &(*end)->next)
        *end = take_event(m);
    *end = NULL;
    if (state)
        *state = m->out_head ? LM_OK : m->failed;
    pthread_mutex_unlock(&m->mu);
    for (struct event_node *node = list, *next; node; node = next) {
        next = node->next;
        hand_over(node, out++);
    }
    return n;
}

void mailbox_wake(mailbox *m)
{
    pthread_mutex_lock(&m->mu);
    m->wakes++;
    pthread_cond_broadcast(&m->events);
    pthread_mutex_unlock(&m->mu);
}

/* ---- the engine thread ----------------------------------------------------------------- */

struct request *mailbox_take(mailbox *m, int wait_ms, bool *stop, bool *cancels)
{
    *stop = *cancels = false;
    if (wait_ms == 0 && !atomic_load_explicit(&m->news, memory_order_acquire))
        return NULL;
    struct timespec until = after_ms(LM_MAX(wait_ms, 0));
    bool late = wait_ms == 0;
    pthread_mutex_lock(&m->mu);
    while (!m->in_head && !m->stop && !m->cancelled && !m->roused && !late)
        wait_on(&m->work, &m->mu, wait_ms, &until, &late);
    struct request *list = m->in_head;
    m->in_head = NULL;
    m->in_tail = &m->in_head;
    *stop = m->stop;
    for (struct request *r; (r = m->cancelled) != NULL;) {
        unlist_cancelled(r);
        list_cancelled(&m->taken, r);
    }
    *cancels = m->taken != NULL;
    m->roused = false;
    /* `stop` stays news for ever, so that no later call can miss it. */
    atomic_store_explicit(&m->news, m->stop, memory_order_release);
    pthread_mutex_unlock(&m->mu);
    return list;
}

struct request *mailbox_next_cancelled(mailbox *m)
{
    pthread_mutex_lock(&m->mu);
    struct request *r = m->taken;
    if (r)
        unlist_cancelled(r);
    pthread_mutex_unlock(&m->mu);
    return r;
}

static lm_status node_add_text(struct event_node *n, const char *text, size_t len)
{
    if (n->ev.text_len + len + 1 > n->text_cap) {
        size_t cap = (n->ev.text_len + len + 1) * 2;
        char *p = lm_reallocarray(n->ev.text, cap, 1);
        if (!p)
            return LM_NOMEM;
        n->ev.text = p;
        n->text_cap = cap;
    }
    memcpy(n->ev.text + n->ev.text_len, text, len);
    n->ev.text_len += len;
    n->ev.text[n->ev.text_len] = '\0';
    return LM_OK;
}

lm_status mailbox_post_text(mailbox *m, struct seq *s, const char *text, size_t len)
{
    lm_status st = LM_OK;
    pthread_mutex_lock(&m->mu);
    struct event_node *n = s->unpolled;
    if (n) {
        st = node_add_text(n, text, len);
    } else {
        n = lm_calloc(1, sizeof *n);
        st = n ? node_add_text(n, text, len) : LM_NOMEM;
        if (st == LM_OK) {
            n->ev.kind = ENGINE_TOKENS;
            n->ev.handle = s->req->handle;
            n->ev.user = s->req->user;
            n->ev.choice = s->index;
            n->owner = &s->unpolled;
            s->unpolled = n;
            append(m, n);
        } else {
            node_free(n);
        }
    }
    pthread_mutex_unlock(&m->mu);
    return st;
}

void mailbox_post_request(mailbox *m, struct request *r)
{
    pthread_mutex_lock(&m->mu);
    for (int i = 0; i < r->n_seqs; i++) {
        if (r->seqs[i].unpolled)
            r->seqs[i].unpolled->owner = NULL;
        r->seqs[i].unpolled = NULL;
    }
    struct event_node *n = r->finish;
    r->finish = NULL;
    n->ev = (struct engine_event){ .kind = ENGINE_FINISHED, .handle = r->handle, .user = r->user };
    n->done = r;
    struct slot *s = handle_slot(m, r->handle);
    if (s) {
        s->state = SLOT_ENDED;
        s->live = NULL;
    }
    unlist_cancelled(r);
    append(m, n);
    pthread_mutex_unlock(&m->mu);
}

void mailbox_fail(mailbox *m, lm_status state)
{
    pthread_mutex_lock(&m->mu);
    m->failed = state;
    pthread_cond_broadcast(&m->events);
    pthread_mutex_unlock(&m->mu);
}

void mailbox_stop(mailbox *m)
{
    pthread_mutex_lock(&m->mu);
    m->stop = true;
    tell_engine(m);
    pthread_mutex_unlock(&m->mu);
}

void mailbox_rouse(mailbox *m)
{
    pthread_mutex_lock(&m->mu);
    m->roused = true;
    tell_engine(m);
    pthread_mutex_unlock(&m->mu);
}
