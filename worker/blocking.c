/* SPDX-License-Identifier: Apache-2.0 */
/*
 * blocking.c - head-of-line blocking: one prompt that does not end while later ones of its
 * partition have, so that the watermark stands still.
 *
 * It blocks nothing but the commit: later prompts are answered all the same, and the map of
 * finished offsets keeps them from being repeated. But lag grows, and once the map is three
 * quarters full the partition stops. So it is measured (loramill_partition_blocked_seconds), and
 * said when it lasts: which record, for how long, how many it holds up, and where it is - in the
 * engine, waiting for a store, or its outcome for the registry or for its acknowledgement.
 */
#include "worker/consumer_int.h"

#include <inttypes.h>

enum { SAY_AGAIN_US = 60 * 1000000 };

struct head { struct job *job; };

static void find_head(void *ctx, int64_t offset, void *user)
{
    struct head *h = ctx;
    (void)offset;
    if (!h->job)
        h->job = user;
}

static const char *where(enum job_stage stage)
{
    switch (stage) {
    case JOB_QUEUED:
        return "not decoded yet";
    case JOB_FETCHING:
        return "waiting for its adapter or its schema";
    case JOB_READY:
        return "waiting for the engine";
    case JOB_RUNNING:
        return "in the engine";
    case JOB_ANSWERING:
        return "its outcome is not durable yet";
    default:
        return "ending";
    }
}

int64_t blocking_look(consumer *c, struct assigned *a, const struct ledger_info *info, int64_t now)
{
    struct head h = { 0 };
    int64_t limit = c->w->cfg->blocked_warn_ms * 1000;
    if (info->beyond)
        ledger_each(c->ledger, a->ref, find_head, &h);
    if (!h.job)
        return 0;
    int64_t age = now - h.job->received_us;
    int64_t offset = h.job->record.offset;
    if (!limit || age < limit ||
        (offset == a->blocked_offset && now - a->blocked_said_us < SAY_AGAIN_US))
        return age;
    enum job_stage stage = atomic_load(&h.job->stage);
    a->blocked_offset = offset;
    a->blocked_said_us = now;
    /* Exact in a topic without gaps. */
    int64_t behind = info->last_delivered - offset + 1 - (int64_t)info->in_flight;
    lm_log(LM_WARN, "consumer", "%s [%d] @%" PRId64 " is unfinished for %.0f s (%s) and holds up "
           "%" PRId64 " finished ones behind it", a->lease->topic, (int)a->partition, offset,
           (double)age / 1e6, where(stage), behind);
    return age;
}
