/* SPDX-License-Identifier: Apache-2.0 */
/* withheld.c - prompt topics whose offsets the group refuses; see withheld.h. */
#include "worker/withheld.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/aside.h"

enum {
    BACKOFF_COUNTED = 20,
    LOOK_US = 100000,           /* many may wait: they are not looked through all the time */
};

static struct withheld_topic *find(const struct withheld *h, const char *name)
{
    struct withheld_topic *t = h->topics;
    while (t && strcmp(t->name, name) != 0)
        t = t->next;
    return t;
}

bool withheld_has(const struct withheld *h, const char *topic)
{
    return find(h, topic);
}

void withheld_again(struct withheld_topic *t, int64_t now_us, int64_t base_ms, int64_t max_ms)
{
    t->due_us = now_us + backoff_us(LM_MIN(t->failures, BACKOFF_COUNTED), base_ms, max_ms);
    t->failures++;
}

lm_status withheld_add(struct withheld *h, const char *topic, int64_t now_us, int64_t base_ms,
                       int64_t max_ms)
{
    struct withheld_topic *t = find(h, topic);
    if (!t) {
        if (!(t = lm_calloc(1, sizeof *t)))
            return LM_NOMEM;
        snprintf(t->name, sizeof t->name, "%s", topic);
        t->next = h->topics;
        h->topics = t;
        lm_log(LM_WARN, "producer", "the group takes no offsets of topic '%s' for now: what is of "
               "it waits; nothing else does, unless all that may be in flight is of it", topic);
    }
    withheld_again(t, now_us, base_ms, max_ms);
    return LM_OK;
}

bool withheld_keep(struct withheld *h, struct job *j)
{
    struct withheld_topic *t = h->topics && !j->parent ? find(h, j->lease->topic) : NULL;
    if (t)
        job_chain_add(&t->jobs, j);
    return t;
}

void withheld_rest(struct withheld *h, int64_t began_us, int64_t now_us)
{
    int64_t counts = LM_MIN(now_us - began_us, ASIDE_SHORT_US);
    h->rest_us = LM_MAX(h->rest_us, now_us + ASIDE_REST * counts);
}

static int64_t due_at(const struct withheld *h, const struct withheld_topic *t)
{
    return LM_MAX(t->due_us, h->rest_us);
}

/* A partition that is being taken away does not wait for long. */
static bool leaves(const struct withheld_topic *t)
{
    const struct job *j = t->jobs.head;
    while (j && !lease_revoked(j->lease))
        j = j->next;
    return j;
}

struct withheld_topic *withheld_due(struct withheld *h, int64_t now_us)
{
    struct withheld_topic *due = NULL;
    bool look = now_us >= h->look_us;
    if (look)
        h->look_us = now_us + LOOK_US;
    for (struct withheld_topic *t = h->topics; t; t = t->next)
        if ((due_at(h, t) <= now_us || (look && leaves(t))) && (!due || t->due_us < due->due_us))
            due = t;
    return due;
}

int withheld_wait_ms(const struct withheld *h, int64_t now_us, int cap)
{
    int64_t ms = cap;
    for (const struct withheld_topic *t = h->topics; t; t = t->next)
        ms = LM_MIN(ms, (due_at(h, t) - now_us + 999) / 1000);
    return (int)LM_MAX(ms, 0);
}

size_t withheld_jobs(const struct withheld *h)
{
    size_t n = 0;
    for (const struct withheld_topic *t = h->topics; t; t = t->next)
        n += t->jobs.length;
    return n;
}

struct job *withheld_take_revoked(struct withheld *h)
{
    struct job_chain revoked = { 0 };
    for (struct withheld_topic *t = h->topics; t; t = t->next) {
        struct job_chain all = t->jobs;
        t->jobs = (struct job_chain){ 0 };
        for (struct job *j; (j = job_chain_pop(&all));)
            job_chain_add(lease_revoked(j->lease) ? &revoked : &t->jobs, j);
    }
    return revoked.head;
}

static struct job_chain forget(struct withheld *h, struct withheld_topic *t)
{
    struct job_chain jobs = t->jobs;
    struct withheld_topic **at = &h->topics;
    while (*at != t)
        at = &(*at)->next;
    *at = t->next;
    free(t);
    return jobs;
}

struct job_chain withheld_let_go(struct withheld *h, struct withheld_topic *t)
{
    lm_log(LM_INFO, "producer", "topic '%s' waits for the group no more", t->name);
    return forget(h, t);
}

struct job *withheld_take_all(struct withheld *h)
{
    struct job_chain all = { 0 };
    while (h->topics) {
        struct job_chain some = forget(h, h->topics);
        for (struct job *j; (j = job_chain_pop(&some));)
            job_chain_add(&all, j);
    }
    return all.head;
}
