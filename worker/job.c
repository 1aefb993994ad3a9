/* SPDX-License-Identifier: Apache-2.0 */
/*
 * job.c - records, leases, queues and backoff; see job.h for who owns a job when.
 */
#include "worker/job.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "worker/stream.h"

/* ---- leases ----------------------------------------------------------------------------- */

struct lease *lease_new(const char *topic, int32_t partition, struct ledger_ref ref)
{
    struct lease *l = lm_calloc(1, sizeof *l);
    if (!l)
        return NULL;
    atomic_init(&l->refs, 1);
    l->ref = ref;
    l->partition = partition;
    snprintf(l->topic, sizeof l->topic, "%s", topic);
    return l;
}

struct lease *lease_ref(struct lease *l)
{
    atomic_fetch_add_explicit(&l->refs, 1, memory_order_relaxed);
    return l;
}

void lease_unref(struct lease *l)
{
    if (l && atomic_fetch_sub_explicit(&l->refs, 1, memory_order_acq_rel) == 1)
        free(l);
}

bool lease_revoked(struct lease *l)
{
    return atomic_load(&l->revoked);
}

/* ---- records ---------------------------------------------------------------------------- */

static size_t record_bytes(const struct record *r)
{
    size_t n = r->key_len + r->value_len + (size_t)r->n_headers * sizeof *r->headers;
    for (int i = 0; i < r->n_headers; i++)
        n += strlen(r->headers[i].name) + 1 + r->headers[i].len;
    return n;
}

static const void *copy_bytes(char **at, const void *from, size_t n)
{
    if (!from)
        return NULL;
    void *to = *at;
    if (n)
        memcpy(to, from, n);
    *at += n;
    return to;
}

int64_t record_deadline_ms(const struct record *r, int64_t ms, int64_t now_ms)
{
    int64_t from = r->timestamp_ms >= 0 ? r->timestamp_ms : now_ms;
    return from > INT64_MAX - ms ? INT64_MAX : from + ms;
}

int64_t record_age_us(const struct record *r, int64_t now_ms)
{
    return r->timestamp_ms >= 0 && r->timestamp_ms < now_ms ? (now_ms - r->timestamp_ms) * 1000 : 0;
}

/* Lays a record out in `block`: the header array first, for its alignment, then the bytes. */
static void record_copy(struct record *to, const struct record *from, void *block)
{
    *to = *from;
    to->headers = block;
    char *at = (char *)block + (size_t)from->n_headers * sizeof *to->headers;
    to->key = copy_bytes(&at, from->key, from->key_len);
    to->value = copy_bytes(&at, from->value, from->value_len);
    for (int i = 0; i < from->n_headers; i++) {
        const struct header *h = &from->headers[i];
        const char *name = copy_bytes(&at, h->name, strlen(h->name) + 1);
        to->headers[i] = (struct header){ name, copy_bytes(&at, h->value, h->len), h->len };
    }
}

/* A job's block: the job, room for its prompt, its record. One more for the prompt would be made by
 * one thread and freed by another, which is dear. */
enum { PROMPT_AT = LM_DIV_UP(sizeof(struct job), ARENA_ALIGN) * ARENA_ALIGN, PROMPT_ROOM = 768,
       RECORD_AT = PROMPT_AT + PROMPT_ROOM };

struct arena *job_arena(struct job *j)
{
    return arena_in((char *)j + PROMPT_AT, PROMPT_ROOM);
}

lm_status job_new(struct lease *lease, const struct record *from, struct job **out)
{
    size_t bytes = RECORD_AT + record_bytes(from);
    struct job *j = lm_malloc(bytes);
    if (!j)
        return LM_NOMEM;
    memset(j, 0, offsetof(struct job, out.headers.few));
    memset(&j->route, 0, offsetof(struct reply_route, topic) + 1);
    atomic_init(&j->refs, 1);
    atomic_init(&j->stage, JOB_QUEUED);
    j->lease = lease_ref(lease);
    j->bytes = bytes;
    record_copy(&j->record, from, (char *)j + RECORD_AT);
    *out = j;
    return LM_OK;
}

size_t job_record_bytes(const struct job *j)
{
    return j->bytes - RECORD_AT - (size_t)j->record.n_headers * (sizeof *j->record.headers + 1);
}

long long job_tokens_guess(const struct job *j)
{
    return (long long)(j->record.value_len / 3) + 16;
}

struct job *job_ref(struct job *j)
{
    atomic_fetch_add_explicit(&j->refs, 1, memory_order_relaxed);
    return j;
}

struct job *job_child(struct job *parent)
{
    struct job *j = lm_calloc(1, sizeof *j);
    if (!j)
        return NULL;
    atomic_init(&j->refs, 1);
    atomic_init(&j->stage, JOB_ANSWERING);
    j->worker = parent->worker;
    j->lease = lease_ref(parent->lease);
    j->record = parent->record;         /* its bytes live as long as the parent */
    j->route = parent->route;
    j->outcome = OUTCOME_PART;
    j->parent = job_ref(parent);
    return j;
}

void outgoing_release(struct outgoing *o)
{
    if (o->value_owned)
        free(o->value);
    header_list_release(&o->headers);
    memset(o, 0, offsetof(struct outgoing, headers));
    o->partition = -1;
}

void job_clear_out(struct job *j)
{
    outgoing_release(&j->out);
    if (j->notice)
        outgoing_release(j->notice);
    free(j->notice);
    j->notice = NULL;
}

static void job_free(struct job *j)
{
    job_clear_out(j);
    stream_free(j->stream);
    job_unref(j->parent);
    prompt_free(j->prompt);
    if (j->adapter)
        engine_adapter_unref(j->adapter);
    if (j->result)
        engine_result_free(j->result);
    free(j->err);
    lease_unref(j->lease);
    free(j);
}

void job_unref(struct job *j)
{
    if (j && atomic_fetch_sub_explicit(&j->refs, 1, memory_order_acq_rel) == 1)
        job_free(j);
}

void job_set_stage(struct job *j, enum job_stage stage)
{
    atomic_store(&j->stage, stage);
}

void job_fail(struct job *j, const struct lm_err *err)
{
    j->failure = err ? err->code : LM_OK;
    if (!j->failure) {
        free(j->err);
        j->err = NULL;
    } else if (j->err || (j->err = lm_malloc(sizeof *j->err))) {
        *j->err = *err;
    }
}

lm_status job_failure(const struct job *j, struct lm_err *why)
{
    if (j->failure && j->err)
        *why = *j->err;
    else if (j->failure)
        lm_err_set(why, j->failure, "%s", lm_status_text(j->failure));
    return j->failure;
}

/* ---- queue ------------------------------------------------------------------------------ */

void job_queue_init(struct job_queue *q)
{
    pthread_condattr_t attr;
    *q = (struct job_queue){ 0 };
    pthread_mutex_init(&q->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&q->cond, &attr);
    pthread_condattr_destroy(&attr);
    q->tail = &q->head;
}

void job_queue_release(struct job_queue *q)
{
    for (struct job *j = q->head, *next; j; j = next) {
        next = j->next;
        job_unref(j);
    }
    pthread_cond_destroy(&q->cond);
    pthread_mutex_destroy(&q->lock);
}

void job_chain_add(struct job_chain *c, struct job *j)
{
    j->next = NULL;
    if (c->last)
        c->last->next = j;
    else
        c->head = j;
    c->last = j;
    c->length++;
}

struct job *job_chain_pop(struct job_chain *c)
{
    struct job *j = c->head;
    if (!j)
        return NULL;
    c->head = j->next;
    if (!c->head)
        c->last = NULL;
    c->length--;
    return j;
}

void job_queue_push_all(struct job_queue *q, struct job_chain *c)
{
    if (!c->head)
        return;
    pthread_mutex_lock(&q->lock);
    bool was_empty = !q->head;
    *q->tail = c->head;
    q->tail = &c->last->next;
    q->length += c->length;
    if (was_empty)
        pthread_cond_signal(&q->cond);
    pthread_mutex_unlock(&q->lock);
    *c = (struct job_chain){ 0 };
}

void job_queue_push(struct job_queue *q, struct job *j)
{
    struct job_chain one = { 0 };
    job_chain_add(&one, j);
    job_queue_push_all(q, &one);
}

static void queue_wait(struct job_queue *q, int timeout_ms)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    at.tv_sec += timeout_ms / 1000;
    at.tv_nsec += timeout_ms % 1000 * 1000000L;
    if (at.tv_nsec >= 1000000000L) {
        at.tv_sec++;
        at.tv_nsec -= 1000000000L;
    }
    while (!q->head && !q->woken)
        if (pthread_cond_timedwait(&q->cond, &q->lock, &at) == ETIMEDOUT)
            break;
}

struct job *job_queue_take(struct job_queue *q, int timeout_ms)
{
    pthread_mutex_lock(&q->lock);
    if (!q->head && timeout_ms > 0)
        queue_wait(q, timeout_ms);
    struct job *all = q->head;
    q->head = NULL;
    q->tail = &q->head;
    q->length = 0;
    q->woken = false;
    pthread_mutex_unlock(&q->lock);
    return all;
}

void job_queue_wake(struct job_queue *q)
{
    pthread_mutex_lock(&q->lock);
    q->woken = true;
    pthread_cond_signal(&q->cond);
    pthread_mutex_unlock(&q->lock);
}

/* ---- backoff ---------------------------------------------------------------------------- */

/* A pairing heap (Fredman, Sedgewick, Sleator, Tarjan 1986): who is due first is the root, `below`
 * of a job is the first of its children, `next` the next of their siblings. */

/* Of two roots the later one becomes a child of the other. */
static struct job *meld(struct job *a, struct job *b)
{
    struct job *first = b->due_us < a->due_us ? b : a, *later = first == a ? b : a;
    later->next = first->below;
    first->below = later;
    return first;
}

/* What is left of a heap without its root: two by two, then all with the last pair, so that it
 * stays flat. */
static struct job *meld_all(struct job *j)
{
    struct job *pairs = NULL, *next;
    for (; j; j = next) {
        struct job *other = j->next;
        next = other ? other->next : NULL;
        if (other)
            j = meld(j, other);
        j->next = pairs;
        pairs = j;
    }
    struct job *root = pairs;
    for (j = root ? root->next : NULL; j; j = next) {
        next = j->next;
        root = meld(root, j);
    }
    return root;
}

void job_list_add(struct job_list *l, struct job *j, int64_t due_us)
{
    j->due_us = due_us;
    j->below = NULL;
    l->first = l->first ? meld(l->first, j) : j;
}

struct job *job_list_take_all(struct job_list *l)
{
    struct job *all = l->first, *last = all;
    l->first = NULL;
    if (all)
        all->next = NULL;
    for (struct job *j = all; j; j = j->next) {
        last->next = j->below;
        while (last->next)
            last = last->next;
    }
    return all;
}

struct job *job_list_take_due(struct job_list *l, int64_t now_us)
{
    struct job *due = NULL, **tail = &due;
    for (struct job *j; (j = l->first) && j->due_us <= now_us; tail = &j->next) {
        l->first = meld_all(j->below);
        *tail = j;
    }
    *tail = NULL;
    return due;
}

int job_list_wait_ms(const struct job_list *l, int64_t now_us, int cap)
{
    if (!l->first)
        return cap;
    int64_t ms = (l->first->due_us - now_us + 999) / 1000;
    return (int)LM_MAX(0, LM_MIN(ms, cap));
}

int64_t backoff_us(int n, int64_t base_ms, int64_t max_ms)
{
    static _Thread_local uint64_t seed;
    if (!seed)
        seed = (uint64_t)lm_now_us() ^ (uint64_t)(uintptr_t)&seed ^ 0x9e3779b97f4a7c15u;
    int64_t ms = base_ms;
    for (int i = 0; i < n && ms < max_ms; i++)
        ms *= 2;
    ms = LM_MIN(ms, max_ms);
    return ms * 500 + (int64_t)(lm_random(&seed) % (uint64_t)(ms * 500 + 1));
}
