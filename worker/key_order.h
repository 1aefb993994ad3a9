/* SPDX-License-Identifier: Apache-2.0 */
/*
 * key_order.h - delivery.order=key: of the prompts of one key and partition one is at work at a
 * time, the others wait in the order in which they were read. A pure data structure.
 *
 *   enter(A1) -> go      enter(A2) -> waits      enter(B1) -> go
 *   leave(A1) -> A2 may go      leave(A2) -> nobody waits: the key is forgotten
 *
 * "Leaves" means that the outcome is durable, or that the job was dropped because its partition was
 * taken away; the next of the key then follows, is dropped in its turn, and so on. Records without
 * a key have no order and are never held.
 *
 * Cost: a hash table of the keys at work, one slot each; waiting jobs hang in a list through
 * job.next. Threads: the consumer thread's.
 */
#ifndef LORAMILL_WORKER_KEY_ORDER_H
#define LORAMILL_WORKER_KEY_ORDER_H

#include "worker/job.h"

typedef struct key_order key_order;

key_order *key_order_new(void);         /* NULL: out of memory */
void key_order_free(key_order *o);      /* unrefs what waits */

/* *go: the job may start; else it waits here, with its reference. LM_NOMEM: nothing has changed. */
lm_status key_order_enter(key_order *o, struct job *j, bool *go);
/* The job is over: the next one of its key, or NULL. */
struct job *key_order_leave(key_order *o, struct job *j);

size_t key_order_waiting(const key_order *o);

#endif
