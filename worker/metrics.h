/* SPDX-License-Identifier: Apache-2.0 */
/*
 * metrics.h - the worker's own numbers, and their Prometheus text (exposition format 0.0.4).
 * docs/operations.md documents each as an API: name, unit, when it moves.
 *
 * Threads: counters are relaxed atomics, any thread may add. Those that move with each message
 * stand by who moves them, each thread's apart from the others' cache lines, and are moved by that
 * thread alone, as histograms are: without a locked instruction. Partition rows are written by the
 * consumer thread and read by the scraper under a lock.
 */
#ifndef LORAMILL_WORKER_METRICS_H
#define LORAMILL_WORKER_METRICS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>

#include "kernels/base.h"

enum { METRICS_BUCKETS = 16 };

struct histogram {
    atomic_ullong buckets[METRICS_BUCKETS + 1];
    atomic_ullong sum_us;
};

struct metrics_partition {
    char topic[256];
    int partition;
    long long lag, watermark, committed;        /* -1: not known */
    size_t in_flight, map_bytes;
    int64_t blocked_us;         /* 0: not blocked */
};

enum { CACHE_LINE = 64 };

struct metrics {
    /* the consumer thread */
    atomic_ullong consumed, consumed_bytes, skipped, dropped;
    atomic_llong held, held_bytes;
    struct histogram record_age;
    char apart0[CACHE_LINE];
    /* intake */
    struct histogram queue_wait, adapter_wait;
    char apart1[CACHE_LINE];
    /* the outbox */
    struct histogram processing;
    char apart2[CACHE_LINE];
    /* the producer thread */
    struct histogram reply_produce;
    atomic_ullong completed, expired, cancelled, reply_bytes;
    atomic_ullong prompt_tokens, cached_tokens, completion_tokens;
    char apart3[CACHE_LINE];
    /* several */
    atomic_llong backlog, aside;
    char apart4[CACHE_LINE];
    atomic_llong held_tokens, reply_bytes_held;
    char apart5[CACHE_LINE];
    /* seldom */
    atomic_ullong dead_letters[LM_STATUS_COUNT];        /* by cause */
    atomic_ullong retries, produce_failures, stream_parts;
    atomic_ullong cancel_orders, claims, claim_bytes, traces, traces_dropped;
    atomic_ullong commits, commit_failures;
    atomic_ullong transactions, transaction_aborts, producer_rebuilds;
    atomic_ullong assigned, revoked, lost, pauses;
    atomic_bool paused;
    struct histogram rebalance_drain;
    pthread_mutex_t lock;
    struct metrics_partition *parts;
    size_t n_parts;
};

void metrics_init(struct metrics *m);
void metrics_release(struct metrics *m);

static inline void metric_add(atomic_ullong *c, uint64_t n)
{
    atomic_fetch_add_explicit(c, n, memory_order_relaxed);
}

/* Of a counter that no other thread adds to. */
static inline void metric_move(atomic_ullong *c, uint64_t n)
{
    uint64_t now = atomic_load_explicit(c, memory_order_relaxed) + n;
    atomic_store_explicit(c, now, memory_order_relaxed);
}

void histogram_observe(struct histogram *h, int64_t us);

/* Takes ownership of `parts`. */
void metrics_set_partitions(struct metrics *m, struct metrics_partition *parts, size_t n);

struct metrics_labels { const char *worker, *group, *model; };
void metrics_write(struct metrics *m, const struct metrics_labels *labels, FILE *f);

/* For other modules' numbers on the same page. */
void metrics_help(FILE *f, const char *name, const char *type, const char *help);

#endif
