/* SPDX-License-Identifier: Apache-2.0 */
/*
 * metrics.c - counters into Prometheus text. Names follow prometheus.io/docs/practices/naming: one
 * prefix, base units, _total for counters. No adapter id is ever a label: there may be ten
 * thousand.
 */
#include "worker/metrics.h"

#include <stdlib.h>

#define P "loramill_"

/* Upper bounds in microseconds; prompts take from milliseconds (echo) to minutes. */
static const int64_t bounds[METRICS_BUCKETS] = {
    1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000, 500000, 1000000, 2500000, 5000000,
    10000000, 30000000, 120000000, 600000000,
};

void metrics_init(struct metrics *m)
{
    *m = (struct metrics){ 0 };
    pthread_mutex_init(&m->lock, NULL);
}

void metrics_release(struct metrics *m)
{
    free(m->parts);
    pthread_mutex_destroy(&m->lock);
}

void histogram_observe(struct histogram *h, int64_t us)
{
    int i = 0;
    us = LM_MAX(us, 0);
    while (i < METRICS_BUCKETS && us > bounds[i])
        i++;
    metric_move(&h->buckets[i], 1);
    metric_move(&h->sum_us, (uint64_t)us);
}

void metrics_set_partitions(struct metrics *m, struct metrics_partition *parts, size_t n)
{
    pthread_mutex_lock(&m->lock);
    free(m->parts);
    m->parts = parts;
    m->n_parts = n;
    pthread_mutex_unlock(&m->lock);
}

void metrics_help(FILE *f, const char *name, const char *type, const char *help)
{
    fprintf(f, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void counter(FILE *f, const char *name, const char *help, atomic_ullong *c)
{
    metrics_help(f, name, "counter", help);
    fprintf(f, "%s %llu\n", name, atomic_load_explicit(c, memory_order_relaxed));
}

static void gauge(FILE *f, const char *name, const char *help, long long v)
{
    metrics_help(f, name, "gauge", help);
    fprintf(f, "%s %lld\n", name, v);
}

static void histogram(FILE *f, const char *name, const char *help, struct histogram *h)
{
    unsigned long long sum = 0;
    metrics_help(f, name, "histogram", help);
    for (int i = 0; i < METRICS_BUCKETS; i++) {
        sum += atomic_load_explicit(&h->buckets[i], memory_order_relaxed);
        fprintf(f, "%s_bucket{le=\"%g\"} %llu\n", name, (double)bounds[i] / 1e6,
                sum);
    }
    sum += atomic_load_explicit(&h->buckets[METRICS_BUCKETS], memory_order_relaxed);
    fprintf(f, "%s_bucket{le=\"+Inf\"} %llu\n%s_sum %.6f\n%s_count %llu\n", name, sum, name,
            (double)atomic_load_explicit(&h->sum_us, memory_order_relaxed) / 1e6, name, sum);
}

/* A label's value: backslash and quote escaped; a newline, which no name of ours holds, a space. */
static void label(FILE *f, const char *s)
{
    for (; *s; s++) {
        if (*s == '\\' || *s == '"')
            fputc('\\', f);
        fputc(*s == '\n' ? ' ' : *s, f);
    }
}

static void write_outcomes(struct metrics *m, FILE *f)
{
    const struct { const char *name; atomic_ullong *c; } rows[] = {
        { "completed", &m->completed }, { "expired", &m->expired },
        { "cancelled", &m->cancelled }, { "handed_back", &m->dropped },
    };
    unsigned long long dead = 0;
    metrics_help(f, P "records_total", "counter", "Prompts by how they ended; handed_back ones "
                 "are uncommitted and will be read again.");
    for (size_t i = 0; i < LM_COUNT(rows); i++)
        fprintf(f, P "records_total{outcome=\"%s\"} %llu\n", rows[i].name,
                atomic_load_explicit(rows[i].c, memory_order_relaxed));
    for (int i = 0; i < LM_STATUS_COUNT; i++)
        dead += atomic_load_explicit(&m->dead_letters[i], memory_order_relaxed);
    fprintf(f, P "records_total{outcome=\"dead_letter\"} %llu\n", dead);
    metrics_help(f, P "dlq_total", "counter", "Dead letters by cause.");
    for (int i = 1; i < LM_STATUS_COUNT; i++)
        fprintf(f, P "dlq_total{reason=\"%s\"} %llu\n", lm_status_wire((lm_status)i),
                atomic_load_explicit(&m->dead_letters[i], memory_order_relaxed));
}

static void partition_rows(FILE *f, const struct metrics *m, const char *name, const char *help,
                           long long (*value)(const struct metrics_partition *))
{
    metrics_help(f, name, "gauge", help);
    for (size_t i = 0; i < m->n_parts; i++) {
        long long v = value(&m->parts[i]);
        if (v < 0)
            continue;
        fprintf(f, "%s{topic=\"", name);
        label(f, m->parts[i].topic);
        fprintf(f, "\",partition=\"%d\"} %lld\n", m->parts[i].partition, v);
    }
}

static long long part_lag(const struct metrics_partition *p) { return p->lag; }
static long long part_watermark(const struct metrics_partition *p) { return p->watermark; }
static long long part_committed(const struct metrics_partition *p) { return p->committed; }
static long long part_incomplete(const struct metrics_partition *p)
{
    return (long long)p->in_flight;
}
static long long part_map_bytes(const struct metrics_partition *p)
{
    return (long long)p->map_bytes;
}

static void write_partitions(struct metrics *m, FILE *f)
{
    pthread_mutex_lock(&m->lock);
    gauge(f, P "partitions_assigned", "Partitions this worker owns.", (long long)m->n_parts);
    partition_rows(f, m, P "partition_lag", "Records from the watermark to the end of the log.",
                   part_lag);
    partition_rows(f, m, P "partition_offset_watermark", "First offset that is not finished.",
                   part_watermark);
    partition_rows(f, m, P "partition_offset_committed", "Offset last committed.",
                   part_committed);
    partition_rows(f, m, P "partition_incomplete_records", "Read and not finished.",
                   part_incomplete);
    partition_rows(f, m, P "partition_offset_metadata_bytes", "The offset map last committed.",
                   part_map_bytes);
    metrics_help(f, P "partition_blocked_seconds", "gauge", "Age of the first unfinished prompt "
                 "while later ones are finished; 0: it blocks nothing.");
    for (size_t i = 0; i < m->n_parts; i++) {
        fputs(P "partition_blocked_seconds{topic=\"", f);
        label(f, m->parts[i].topic);
        fprintf(f, "\",partition=\"%d\"} %.3f\n", m->parts[i].partition,
                (double)m->parts[i].blocked_us / 1e6);
    }
    pthread_mutex_unlock(&m->lock);
}

static void write_flow(struct metrics *m, FILE *f)
{
    counter(f, P "consumed_records_total", "Records read from prompt topics.", &m->consumed);
    counter(f, P "consumed_bytes_total", "Bytes of those, keys and headers included.",
            &m->consumed_bytes);
    counter(f, P "skipped_records_total", "Records read that an earlier owner of the partition had "
            "finished.", &m->skipped);
    counter(f, P "reply_bytes_total", "Bytes of acknowledged replies.", &m->reply_bytes);
    counter(f, P "stream_parts_total", "Parts of streamed replies produced.", &m->stream_parts);
    counter(f, P "cancel_orders_total", "Orders read from topics.control.", &m->cancel_orders);
    counter(f, P "claims_total", "Replies put into the object store.", &m->claims);
    counter(f, P "claim_bytes_total", "Bytes of those.", &m->claim_bytes);
    counter(f, P "traces_exported_total", "Prompts whose spans the collector took.", &m->traces);
    counter(f, P "traces_dropped_total", "Prompts whose spans were dropped: the collector is away, "
            "slow, or refuses them.", &m->traces_dropped);
    counter(f, P "prompt_tokens_total", "Tokens of answered prompts.", &m->prompt_tokens);
    counter(f, P "cached_tokens_total", "Of those, found in the prefix cache.",
            &m->cached_tokens);
    counter(f, P "completion_tokens_total", "Tokens generated.", &m->completion_tokens);
    counter(f, P "retries_total", "Tries again after something that can heal: registry, "
            "stores, engine, memory.",
            &m->retries);
    counter(f, P "produce_failures_total", "Replies or dead letters that were not acknowledged "
            "and were tried again.", &m->produce_failures);
    gauge(f, P "intake_backlog_records", "Read and not yet in the engine.",
          atomic_load(&m->backlog));
    gauge(f, P "in_flight_records", "Read and not yet ended.", atomic_load(&m->held));
    gauge(f, P "set_aside_records", "Of those: finished, but their topic takes none for now "
          "(exactly-once).", atomic_load(&m->aside));
    gauge(f, P "in_flight_bytes", "Bytes of those and of their replies.",
          atomic_load(&m->held_bytes) + atomic_load(&m->reply_bytes_held));
    gauge(f, P "in_flight_tokens", "Estimated tokens of those that are not generated yet: "
          "prompt and, with its adapter here, max_tokens.",
          atomic_load(&m->held_tokens));
    gauge(f, P "intake_paused", "1 while partitions are paused.", atomic_load(&m->paused));
    counter(f, P "intake_pauses_total", "Times that intake was paused.", &m->pauses);
}

static void write_group(struct metrics *m, FILE *f)
{
    const struct { const char *name; atomic_ullong *c; } rows[] = {
        { "assign", &m->assigned }, { "revoke", &m->revoked }, { "lost", &m->lost },
    };
    metrics_help(f, P "rebalances_total", "counter", "Rebalance events.");
    for (size_t i = 0; i < LM_COUNT(rows); i++)
        fprintf(f, P "rebalances_total{event=\"%s\"} %llu\n", rows[i].name,
                atomic_load_explicit(rows[i].c, memory_order_relaxed));
    counter(f, P "commits_total", "Accepted offset commits.", &m->commits);
    counter(f, P "commit_failures_total", "Refused offset commits.", &m->commit_failures);
    counter(f, P "transactions_total", "Committed transactions.", &m->transactions);
    counter(f, P "transaction_aborts_total", "Aborted transactions; what they held is sent again.",
            &m->transaction_aborts);
    counter(f, P "producer_rebuilds_total", "Producers replaced: the fate of a transaction or "
            "request was unknown, they kept to old leaders, or batches change size.",
            &m->producer_rebuilds);
}

void metrics_write(struct metrics *m, const struct metrics_labels *l, FILE *f)
{
    metrics_help(f, P "build_info", "gauge", "Always 1.");
    fputs(P "build_info{version=\"" LORAMILL_VERSION "\",worker=\"", f);
    label(f, l->worker);
    fputs("\",group=\"", f);
    label(f, l->group);
    fputs("\",model=\"", f);
    label(f, l->model);
    fputs("\"} 1\n", f);
    write_outcomes(m, f);
    write_flow(m, f);
    write_group(m, f);
    write_partitions(m, f);
    histogram(f, P "record_age_seconds", "From a record's timestamp to its being read.",
              &m->record_age);
    histogram(f, P "queue_wait_seconds", "From read to submitted to the engine.",
              &m->queue_wait);
    histogram(f, P "adapter_wait_seconds", "Of that, waiting for the adapter.",
              &m->adapter_wait);
    histogram(f, P "processing_seconds", "From submitted to finished by the engine.",
              &m->processing);
    histogram(f, P "reply_produce_seconds", "From answered to acknowledged.", &m->reply_produce);
    histogram(f, P "rebalance_drain_seconds", "How long revocations waited for running prompts.",
              &m->rebalance_drain);
}
