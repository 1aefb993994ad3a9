/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mailbox.h - where callers and the engine thread meet: requests in, events out, nothing else.
 *
 * Bounded by slots: a request claims one when it is submitted and gives it back when its
 * ENGINE_FINISHED event is polled, so neither the inbox nor the outbox can grow past `capacity`,
 * whoever is slow. Token events of one sequence are merged while unpolled.
 *
 * A handle is a slot's index and its generation, so cancelling a finished request is found out
 * without a table that grows.
 *
 * Threads: one mutex, never held while anything is computed. The engine thread takes it once when
 * there is news (an atomic tells), for each request that was cancelled or ends, and for each new
 * text of a streamed one; never while a step is planned or launched.
 */
#ifndef LORAMILL_ENGINE_MAILBOX_H
#define LORAMILL_ENGINE_MAILBOX_H

#include "engine/request.h"

typedef struct mailbox mailbox;

struct event_node {
    struct event_node *next;
    struct event_node **owner;  /* the sequence's `unpolled`, cleared when polled */
    struct engine_event ev;
    struct request *done;       /* its result is still to be put together; ours */
    size_t text_cap;
};

lm_status mailbox_new(int capacity, mailbox **out, struct lm_err *err);
void mailbox_free(mailbox *m);          /* frees what is queued, requests and results too */

/* ---- callers --------------------------------------------------------------------------- */

/* LM_BUSY when full, LM_DEVICE or LM_STATE once the engine has failed or closes. */
lm_status mailbox_accepts(mailbox *m, struct lm_err *err);
/* Takes the request over on LM_OK. */
lm_status mailbox_submit(mailbox *m, struct request *r, engine_handle *out, struct lm_err *err);
/* For who can answer at once: the result, taken over whatever comes back, waits to be polled. */
lm_status mailbox_answer(mailbox *m, void *user, struct engine_result *result, engine_handle *out,
                         struct lm_err *err);
lm_status mailbox_cancel(mailbox *m, engine_handle h);
int mailbox_poll(mailbox *m, struct engine_event *out, int max, int timeout_ms, lm_status *state);
void mailbox_wake(mailbox *m);

/* ---- the engine thread ----------------------------------------------------------------- */

/* Takes all new requests, in order of arrival (linked by `next`); NULL when none. With `wait_ms`
 * other than 0 sleeps until there is news (-1: for ever). *stop: the engine is being closed;
 * *cancels: some were cancelled since the last call. Costs one atomic load if no news. */
struct request *mailbox_take(mailbox *m, int wait_ms, bool *stop, bool *cancels);
/* One of those, once each, NULL: no more. Never one that mailbox_take() has yet to hand over. */
struct request *mailbox_next_cancelled(mailbox *m);
/* Adds `text` to the sequence's token event. */
lm_status mailbox_post_text(mailbox *m, struct seq *s, const char *text, size_t len);
/* The request's end; its handle ends here. Whoever polls puts the result together. Takes the
 * request over. */
void mailbox_post_request(mailbox *m, struct request *r);
/* After a device failure: submit refuses and poll tells, once everything was delivered. */
void mailbox_fail(mailbox *m, lm_status state);
void mailbox_stop(mailbox *m);          /* any thread: the engine thread should end */
/* Rouses the engine thread: there is work that came by another way. */
void mailbox_rouse(mailbox *m);

#endif
