/* SPDX-License-Identifier: Apache-2.0 */
/*
 * transaction.h - exactly-once: the producer thread. What it has the consumer thread do is in
 * staging.h.
 */
#ifndef LORAMILL_WORKER_TRANSACTION_H
#define LORAMILL_WORKER_TRANSACTION_H

/* The producer thread's main function in exactly-once mode. */
void *transaction_main(void *producer_);

#endif
