/* SPDX-License-Identifier: Apache-2.0 */
/*
 * staging.c - the consumer thread's half of exactly-once; see staging.h.
 *
 * The producer thread leaves a request and sleeps; the consumer thread finds it between two polls,
 * or while it drains in a rebalance. Only one request exists at a time. After staging_close() every
 * request is refused, so the producer thread never waits for a consumer that is gone.
 *
 * The map must hold all that the transaction finishes: what it left out would be answered twice
 * after a crash. When it has no room (the brake on reading makes that rare), the highest offsets
 * wait for a later transaction, by which time the watermark has moved. A broker that takes less
 * than it did (commit.c) may leave no room for what was finished before; the watermark moves all
 * the same. And the watermark's own move may take the room from what earlier portions have sent, as
 * the map counts from there; then the transaction is lost, and the next one has one portion.
 */
#include "worker/consumer_int.h"

#include <stdlib.h>
#include <string.h>

enum { COMMITTED_MS = 5000 };

/* ---- consumer thread --------------------------------------------------------------------- */

static void unstage(consumer *c, const struct job *j)
{
    if (j && !j->parent && consumer_tracks(c, j))
        ledger_stage(c->ledger, j->lease->ref, j->record.offset, false);
}

/* No offset may pass them, nor a map hold them. */
static void unstage_refused(consumer *c, const struct stage *s)
{
    for (size_t i = 0; i < s->n; i++)
        if (s->verdicts[i] == STAGE_REFUSED)
            unstage(c, s->jobs[i]);
}

/* Is all that was sent still staged? A part of a stream has no offset to lose. */
static bool still_staged(consumer *c, const struct stage *s)
{
    for (size_t i = 0; i < s->from; i++) {
        const struct job *j = s->verdicts[i] == STAGE_IN ? s->jobs[i] : NULL;
        if (j && !j->parent && (!consumer_tracks(c, j) ||
            ledger_stage(c->ledger, j->lease->ref, j->record.offset, true) != LM_STATE))
            return false;
    }
    return true;
}

static bool is_withheld(const struct stage *s, const char *topic)
{
    return s->withheld && withheld_has(s->withheld, topic);
}

/* Its offset goes into none, so neither may its outcome. */
static enum stage_verdict stage_withheld(const consumer *c, const struct job *j)
{
    return consumer_tracks(c, j) ? STAGE_WAIT : STAGE_GONE;
}

static bool is_ours(const consumer *c, const struct job *j)
{
    struct ledger_info info;
    return ledger_get(c->ledger, j->lease->ref, &info);
}

/* A part goes while its final record may, which counts it: also while its partition leaves. */
static bool stage_one(consumer *c, const struct job *j)
{
    return j->parent ? is_ours(c, j) : consumer_tracks(c, j) &&
           ledger_stage(c->ledger, j->lease->ref, j->record.offset, true) == LM_OK;
}

static void stage_jobs(consumer *c, struct stage *s)
{
    for (size_t i = s->from; i < s->n; i++) {
        const struct job *j = s->jobs[i];
        if (!j->parent && is_withheld(s, j->lease->topic)) {
            s->verdicts[i] = stage_withheld(c, j);
            continue;
        }
        s->verdicts[i] = stage_one(c, j) ? STAGE_IN : STAGE_GONE;
    }
}

static bool of_part(const struct job *j, const struct assigned *a)
{
    return !j->parent && ledger_same(j->lease->ref, a->ref);
}

/* Of what the portion holds of the partition beyond the watermark the farther half, by offset, is
 * taken out again, so that thousands without room take a dozen looks at the map. What lies below
 * the watermark needs no room. False: nothing lies beyond. */
static bool unstage_far(consumer *c, struct stage *s, const struct assigned *a, int64_t watermark)
{
    int64_t last = -1;
    for (size_t i = s->from; i < s->n; i++)
        if (s->verdicts[i] == STAGE_IN && of_part(s->jobs[i], a))
            last = LM_MAX(last, s->jobs[i]->record.offset);
    if (last < 0 || last < watermark)
        return false;
    for (size_t i = s->from; i < s->n; i++) {
        int64_t offset = s->jobs[i]->record.offset;
        if (s->verdicts[i] == STAGE_IN && of_part(s->jobs[i], a) &&
            offset >= watermark + (last - watermark) / 2) {
            s->verdicts[i] = STAGE_WAIT;
            ledger_stage(c->ledger, a->ref, offset, false);
        }
    }
    return true;
}

/* False: there is none, for what is finished or was sent already. */
static bool make_room(consumer *c, struct stage *s, struct assigned *a)
{
    struct ledger_commit due = { .ref = a->ref };
    char map[OFFSET_MAP_MAX + 1];
    bool whole = false;
    /* Without maps nothing is due until the watermark moves, and yet some may be staged. */
    while (ledger_due(c->ledger, a->ref, true, &due) || !c->map_limit) {
        ledger_map(c->ledger, &due, true, map, &whole);
        if (whole || !unstage_far(c, s, a, due.offset))
            return whole;
    }
    return true;
}

/* Has an earlier portion sent what lies beyond the watermark? */
static bool sent_beyond(consumer *c, const struct stage *s, const struct assigned *a)
{
    struct ledger_commit due = { .ref = a->ref };
    ledger_due(c->ledger, a->ref, true, &due);
    for (size_t i = 0; i < s->from; i++)
        if (s->jobs[i] && s->verdicts[i] == STAGE_IN && of_part(s->jobs[i], a) &&
            s->jobs[i]->record.offset >= due.offset)
            return true;
    return false;
}

static void stage_offset(consumer *c, struct stage *s, struct assigned *a)
{
    struct ledger_commit due = { .ref = a->ref };
    a->refused = is_withheld(s, a->lease->topic);
    if (a->refused || !commit_due(c, a, true, &due))
        return;
    if (commit_add_offset(c, a, &due, true, s->offsets))
        s->commits[s->n_commits++] = due;
    else
        s->lost = true;         /* its outcomes would be there, and the map not know of them */
}

/* What was computed before is not sent: other marks may be asked for. */
static void withdraw(consumer *c, struct stage *s)
{
    for (size_t i = 0; i < s->n_commits; i++)
        isolation_unsent(c, s->commits[i].ref);
    stage_release(s);
}

static void serve_stage(consumer *c, struct stage *s)
{
    withdraw(c, s);
    unstage_refused(c, s);
    s->lost = !still_staged(c, s);
    if (s->more) {
        stage_jobs(c, s);
        for (size_t i = 0; i < c->n_parts; i++)
            make_room(c, s, &c->parts[i]);
        return;
    }
    c->longest = 0;
    s->offsets = rd_kafka_topic_partition_list_new((int)c->n_parts);
    s->commits = lm_calloc(LM_MAX(c->n_parts, 1), sizeof *s->commits);
    s->group = rd_kafka_consumer_group_metadata(c->rk);
    if (!s->commits)            /* nothing is staged then, so nothing is counted as finished */
        return;
    stage_jobs(c, s);
    for (size_t i = 0; i < c->n_parts; i++) {
        s->lost |= !make_room(c, s, &c->parts[i]) && sent_beyond(c, s, &c->parts[i]);
        stage_offset(c, s, &c->parts[i]);
    }
    c->staging.open = s->n_commits ? s : NULL;
}

/* In exactly-once what is finished is committed: they say nothing that is new. */
static void serve_look(consumer *c, struct stage *s)
{
    char map[OFFSET_MAP_MAX + 1];
    s->offsets = rd_kafka_topic_partition_list_new((int)c->n_parts);
    s->group = rd_kafka_consumer_group_metadata(c->rk);
    for (size_t i = 0; i < c->n_parts; i++) {
        const struct assigned *a = &c->parts[i];
        struct ledger_commit due = { .ref = a->ref };
        ledger_due(c->ledger, a->ref, false, &due);
        if (due.offset < 0 || strcmp(a->lease->topic, s->topic))
            continue;
        rd_kafka_topic_partition_t *p = rd_kafka_topic_partition_list_add(
            s->offsets, a->lease->topic, a->partition);
        p->offset = due.offset;
        p->metadata_size = ledger_map(c->ledger, &due, false, map, NULL);
        p->metadata = p->metadata_size ? lm_strdup(map) : NULL;
        if (!p->metadata)
            p->metadata_size = 0;
    }
}

static void serve_settle(consumer *c, struct stage *s, bool committed)
{
    c->staging.open = NULL;
    for (size_t i = 0; i < s->n_commits; i++) {
        isolation_answered(c, s->commits[i].ref, committed);
        if (committed)
            ledger_committed(c->ledger, &s->commits[i]);
    }
    unstage_refused(c, s);
    for (size_t i = 0; !committed && i < s->n; i++)
        if (s->verdicts[i] == STAGE_IN)
            unstage(c, s->jobs[i]);
    if (committed && s->n_commits)
        metric_add(&c->w->metrics.commits, 1);
    if (committed)
        commit_taken(c);
    else if (s->too_long)
        commit_too_long(c);
}

void staging_serve(consumer *c)
{
    struct staging *g = &c->staging;
    pthread_mutex_lock(&g->lock);
    if (g->asked) {
        if (g->what == STAGING_STAGE)
            serve_stage(c, g->asked);
        else if (g->what == STAGING_LOOK)
            serve_look(c, g->asked);
        else
            serve_settle(c, g->asked, g->what == STAGING_COMMITTED);
        g->asked = NULL;
        pthread_cond_signal(&g->served);
    }
    pthread_mutex_unlock(&g->lock);
}

bool staging_holds(const consumer *c, const rd_kafka_topic_partition_list_t *parts)
{
    const struct stage *s = c->staging.open;
    for (int i = 0; s && i < parts->cnt; i++)
        for (int k = 0; k < s->offsets->cnt; k++)
            if (s->offsets->elems[k].partition == parts->elems[i].partition &&
                !strcmp(s->offsets->elems[k].topic, parts->elems[i].topic))
                return true;
    return false;
}

void staging_init(struct staging *g)
{
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->served, NULL);
}

void staging_close(consumer *c)
{
    staging_serve(c);
    pthread_mutex_lock(&c->staging.lock);
    c->staging.closed = true;
    c->staging.open = NULL;
    pthread_cond_signal(&c->staging.served);
    pthread_mutex_unlock(&c->staging.lock);
}

void staging_release(struct staging *g)
{
    pthread_cond_destroy(&g->served);
    pthread_mutex_destroy(&g->lock);
}

/* ---- producer thread --------------------------------------------------------------------- */

static lm_status ask(consumer *c, struct stage *s, enum staging_what what)
{
    struct staging *g = &c->staging;
    pthread_mutex_lock(&g->lock);
    g->asked = s;
    g->what = what;
    rd_kafka_queue_yield(c->queue);     /* out of its poll, */
    job_queue_wake(&c->w->done);        /* or out of its wait while it drains */
    while (g->asked && !g->closed)
        pthread_cond_wait(&g->served, &g->lock);
    lm_status st = g->asked ? LM_CANCELLED : LM_OK;
    g->asked = NULL;
    pthread_mutex_unlock(&g->lock);
    return st;
}

lm_status staging_stage(consumer *c, struct stage *s)
{
    lm_status st = ask(c, s, STAGING_STAGE);
    return st ? st : s->commits || s->more ? LM_OK : LM_NOMEM;
}

void staging_settle(consumer *c, struct stage *s, bool committed)
{
    ask(c, s, committed ? STAGING_COMMITTED : STAGING_ABORTED);
}

lm_status staging_look(consumer *c, struct stage *s)
{
    return ask(c, s, STAGING_LOOK);
}

void stage_release(struct stage *s)
{
    if (s->offsets)
        rd_kafka_topic_partition_list_destroy(s->offsets);
    if (s->group)
        rd_kafka_consumer_group_metadata_destroy(s->group);
    free(s->commits);
    s->offsets = NULL;
    s->group = NULL;
    s->commits = NULL;
    s->n_commits = 0;
    s->too_long = false;
}

bool stage_refuses_topic(rd_kafka_resp_err_t code)
{
    return code == RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED ||
           code == RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
}

static bool same_commit(const rd_kafka_topic_partition_t *a, const rd_kafka_topic_partition_t *b)
{
    return !a->err && a->offset == b->offset && a->metadata_size == b->metadata_size &&
           (!a->metadata_size || !memcmp(a->metadata, b->metadata, a->metadata_size));
}

static bool finishes_one_of(const struct stage *s, const rd_kafka_topic_partition_t *p)
{
    for (size_t i = 0; i < s->n; i++) {
        const struct job *j = s->verdicts[i] == STAGE_IN ? s->jobs[i] : NULL;
        if (j && !j->parent && j->lease->partition == p->partition &&
            !strcmp(j->lease->topic, p->topic))
            return true;
    }
    return false;
}

static bool has_parts(const struct stage *s)
{
    for (size_t i = 0; i < s->n; i++)
        if (s->verdicts[i] == STAGE_IN && s->jobs[i] && s->jobs[i]->parent)
            return true;
    return false;
}

bool stage_held(const struct stage *s, rd_kafka_topic_partition_list_t *group)
{
    bool held[2] = { false, false }, telling = false;
    for (int i = 0; i < s->offsets->cnt; i++) {
        const rd_kafka_topic_partition_t *sent = &s->offsets->elems[i];
        const rd_kafka_topic_partition_t *got = rd_kafka_topic_partition_list_find(
            group, sent->topic, sent->partition);
        bool tells = finishes_one_of(s, sent);
        telling |= tells;
        held[tells] |= got && same_commit(got, sent);
    }
    return telling ? held[true] : held[false] && !has_parts(s);
}

lm_status staging_committed(consumer *c, const struct stage *s, bool *holds)
{
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(s->offsets->cnt);
    for (int i = 0; i < s->offsets->cnt; i++)
        rd_kafka_topic_partition_list_add(l, s->offsets->elems[i].topic,
                                          s->offsets->elems[i].partition);
    rd_kafka_resp_err_t e = l->cnt ? rd_kafka_committed(c->rk, l, COMMITTED_MS) : 0;
    for (int i = 0; !e && i < l->cnt; i++)      /* the transaction's end is on its way there */
        if (l->elems[i].err == RD_KAFKA_RESP_ERR_UNSTABLE_OFFSET_COMMIT)
            e = l->elems[i].err;
    *holds = !e && stage_held(s, l);
    for (int i = 0; !e && !*holds && i < l->cnt; i++)   /* who may not read it is told nothing */
        if (l->elems[i].err != RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART)
            e = l->elems[i].err;
    rd_kafka_topic_partition_list_destroy(l);
    return e ? LM_NET : LM_OK;
}
