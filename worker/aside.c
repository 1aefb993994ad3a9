/* SPDX-License-Identifier: Apache-2.0 */
/* aside.c - topics that take no records for now; see aside.h. */
#include "worker/aside.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LOOK_MOST_MS = 1000, WAIT_US = 100000, BACKOFF_COUNTED = 20, REMEMBERED = 64 };

static struct aside_topic *find(const struct aside *a, const char *name)
{
    struct aside_topic *t = name ? a->topics : NULL;
    while (t && strcmp(t->name, name) != 0)
        t = t->next;
    return t;
}

static void join(struct aside_topic *t, struct job *j, int64_t now_us)
{
    if (t->remembered)
        t->due_us = now_us;
    t->remembered = false;
    job_chain_add(&t->jobs, j);
}

lm_status aside_add(struct aside *a, const char *topic, struct job *j, int64_t now_us)
{
    struct aside_topic *t = find(a, topic);
    if (!t) {
        if (!(t = lm_calloc(1, sizeof *t)))
            return LM_NOMEM;
        t->width = 1;
        t->due_us = now_us;
        t->next = a->topics;
        snprintf(t->name, sizeof t->name, "%s", topic);
        a->topics = t;
        lm_log(LM_WARN, "producer", "topic '%s' takes no records for now: what is for it waits; "
               "nothing else does, unless all that may be in flight is for it", topic);
    }
    join(t, j, now_us);
    return LM_OK;
}

bool aside_keep(struct aside *a, struct job *j, int64_t now_us)
{
    if (!a->topics)
        return false;
    struct aside_topic *t = find(a, j->out.topic);
    if (!t && j->notice)
        t = find(a, j->notice->topic);
    if (!t)
        return false;
    join(t, j, now_us);
    return true;
}

bool aside_spares(const struct aside *a, const struct job *j)
{
    const struct aside_topic *t = a->topics && j->notice ? find(a, j->notice->topic) : NULL;
    return t && (t->failures || t->looks || t->forbidden);
}

bool aside_is_for(const struct aside_topic *t, const struct job *j)
{
    return !strcmp(j->out.topic, t->name) || (j->notice && !strcmp(j->notice->topic, t->name));
}

static void forget(struct aside *a, struct aside_topic *t)
{
    struct aside_topic **at = &a->topics;
    while (*at != t)
        at = &(*at)->next;
    *at = t->next;
    lm_log(LM_INFO, "producer", "topic '%s': nothing waits for it any more", t->name);
    free(t);
}

struct aside_topic *aside_due(struct aside *a, int64_t now_us)
{
    struct aside_topic *due = NULL;
    for (struct aside_topic *t = a->topics, *next; t; t = next) {
        next = t->next;
        if (t->due_us > now_us)
            continue;
        if (!t->jobs.head)
            forget(a, t);
        else if (now_us >= a->rest_us && (!due || t->due_us < due->due_us))
            due = t;
    }
    return due;
}

int aside_wait_ms(const struct aside *a, int64_t now_us, int cap)
{
    int64_t ms = cap;
    for (const struct aside_topic *t = a->topics; t; t = t->next)
        if (t->jobs.head)
            ms = LM_MIN(ms, (LM_MAX(t->due_us, a->rest_us) - now_us + 999) / 1000);
    return (int)LM_MAX(ms, 0);
}

size_t aside_jobs(const struct aside *a)
{
    size_t n = 0;
    for (const struct aside_topic *t = a->topics; t; t = t->next)
        n += t->jobs.length;
    return n;
}

static bool all_led(const rd_kafka_metadata_t *md)
{
    for (int i = 0; i < md->topic_cnt; i++) {
        const rd_kafka_metadata_topic_t *topic = &md->topics[i];
        if (topic->err == RD_KAFKA_RESP_ERR_LEADER_NOT_AVAILABLE)
            return false;
        for (int k = 0; k < topic->partition_cnt; k++)
            if (topic->partitions[k].leader < 0)
                return false;
    }
    return true;
}

bool aside_may_take(rd_kafka_t *rk, const char *topic, int wait_ms)
{
    const rd_kafka_metadata_t *md;
    rd_kafka_topic_t *handle = rd_kafka_topic_new(rk, topic, NULL);
    if (!handle)
        return true;
    bool may = !rd_kafka_metadata(rk, 0, handle, &md, wait_ms);
    if (may) {
        may = all_led(md);
        rd_kafka_metadata_destroy(md);
    }
    rd_kafka_topic_destroy(handle);
    return may;
}

int64_t aside_limit_us(const struct aside_topic *t, int64_t most_us)
{
    return LM_MIN(t->limit_us ? t->limit_us : ASIDE_FIRST_US, most_us);
}

bool aside_stuck(const struct aside_topic *t)
{
    return t->failures >= 2 && !(t->failures & (t->failures - 1));
}

void aside_looked(struct aside_topic *t, int64_t now_us, int64_t base_ms, int64_t max_ms)
{
    t->width = 1;
    t->due_us = now_us + backoff_us(LM_MIN(t->looks, BACKOFF_COUNTED), base_ms,
                                    LM_MIN(max_ms, LOOK_MOST_MS));
    t->looks++;
}

static void remember(struct aside_topic *t, int64_t now_us)
{
    t->due_us = now_us + ASIDE_REMEMBER_US;
    t->remembered = true;
}

/* Prompts may name many a topic: not all are remembered. */
static void nobody_waits(struct aside *a, struct aside_topic *t, int64_t now_us)
{
    int idle = 0;
    for (const struct aside_topic *x = a->topics; x; x = x->next)
        idle += !x->jobs.head;
    if (!t->forbidden || idle > REMEMBERED)
        forget(a, t);
    else
        remember(t, now_us);
}

void aside_waits(struct aside *a, struct aside_topic *t, int64_t now_us)
{
    t->due_us = now_us + WAIT_US;
    t->whole = true;
    if (!t->jobs.head)
        nobody_waits(a, t, now_us);
}

void aside_all_due(struct aside *a, int64_t now_us)
{
    a->rest_us = 0;
    for (struct aside_topic *t = a->topics; t; t = t->next)
        if (t->jobs.head)
            t->due_us = LM_MIN(t->due_us, now_us);
}

static void after_failure(struct aside_topic *t, int64_t limit_us)
{
    if (t->width > 1)
        t->width /= 2;
    else if (t->failures % ASIDE_LONG == ASIDE_LONG - 1)
        t->limit_us = INT64_MAX;
    else
        t->limit_us = LM_MIN(2 * limit_us, ASIDE_SHORT_US);
}

void aside_tried(struct aside *a, struct aside_topic *t, bool progress, int64_t began_us,
                 int64_t limit_us, int64_t now_us, int64_t base_ms, int64_t max_ms)
{
    int64_t took = LM_MIN(now_us - began_us, limit_us);
    t->looks = 0;
    t->whole = false;
    t->failures = progress ? 0 : t->failures;
    if (!t->jobs.head) {
        nobody_waits(a, t, now_us);
    } else if (progress) {      /* others have their turn between two tries */
        t->width *= 2;
        t->due_us = now_us + took;
    } else {
        t->due_us = now_us + backoff_us(LM_MIN(t->failures, BACKOFF_COUNTED), base_ms, max_ms);
        a->rest_us = now_us + ASIDE_REST * took;
        t->failures++;
        after_failure(t, limit_us);
    }
}

struct job *aside_take_revoked(struct aside_topic *t)
{
    struct job_chain all = t->jobs, revoked = { 0 };
    t->jobs = (struct job_chain){ 0 };
    for (struct job *j; (j = job_chain_pop(&all));)
        job_chain_add(lease_revoked(j->lease) ? &revoked : &t->jobs, j);
    return revoked.head;
}

struct job *aside_take_all(struct aside *a)
{
    struct job_chain all = { 0 };
    for (struct aside_topic *t = a->topics, *next; t; t = next) {
        next = t->next;
        for (struct job *j; (j = job_chain_pop(&t->jobs));)
            job_chain_add(&all, j);
        free(t);
    }
    a->topics = NULL;
    return all.head;
}
