/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cli_group.c - see cli_group.h. Answers of the admin calls come as events on a queue of their own.
 */
#include "worker/cli_group.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "worker/offset_map.h"

enum { ASK_MS = 15000, ONE_RECORD_MS = 10000, SCAN_IDLE_MS = 15000,
       COORDINATOR_TRIES = 30 };

/* ---- admin calls ------------------------------------------------------------------------ */

/* A group's coordinator that has just come to be, or moves, says so for a moment. */
static lm_status kind_of(rd_kafka_resp_err_t e)
{
    return e == RD_KAFKA_RESP_ERR_COORDINATOR_LOAD_IN_PROGRESS ||
           e == RD_KAFKA_RESP_ERR_COORDINATOR_NOT_AVAILABLE ||
           e == RD_KAFKA_RESP_ERR_NOT_COORDINATOR ? LM_BUSY : LM_NET;
}

/* The answer, or NULL with *err. The caller destroys it. */
static rd_kafka_event_t *answer(rd_kafka_queue_t *q, const char *what, struct lm_err *err)
{
    rd_kafka_event_t *ev = rd_kafka_queue_poll(q, ASK_MS);
    if (ev && !rd_kafka_event_error(ev))
        return ev;
    lm_err_set(err, ev ? kind_of(rd_kafka_event_error(ev)) : LM_NET, "%s: %s", what,
               ev ? rd_kafka_event_error_string(ev) : "no answer from the brokers");
    if (ev)
        rd_kafka_event_destroy(ev);
    return NULL;
}

static void add_member(struct group *g, const rd_kafka_MemberDescription_t *m)
{
    struct group_member *grown = lm_reallocarray(g->members, g->n_members + 1, sizeof *grown);
    if (!grown)
        return;
    g->members = grown;
    struct group_member *to = &g->members[g->n_members++];
    *to = (struct group_member){ 0 };
    const char *host = rd_kafka_MemberDescription_host(m);
    cli_copy_text(to->client, sizeof to->client, rd_kafka_MemberDescription_client_id(m));
    cli_copy_text(to->consumer, sizeof to->consumer, rd_kafka_MemberDescription_consumer_id(m));
    cli_copy_text(to->host, sizeof to->host, host && *host == '/' ? host + 1 : host);
    const rd_kafka_topic_partition_list_t *l =
        rd_kafka_MemberAssignment_partitions(rd_kafka_MemberDescription_assignment(m));
    for (int i = 0; l && i < l->cnt; i++)
        for (size_t k = 0; k < g->n_parts; k++)
            if (g->parts[k].partition == l->elems[i].partition &&
                !strcmp(g->parts[k].topic, l->elems[i].topic)) {
                snprintf(g->parts[k].member, sizeof g->parts[k].member, "%s", to->client);
                to->n_parts++;
            }
}

static lm_status describe(struct cli_kafka *k, const char *group, struct group *g,
                          struct lm_err *err)
{
    rd_kafka_queue_t *q = rd_kafka_queue_new(k->rk);
    rd_kafka_DescribeConsumerGroups(k->rk, &group, 1, NULL, q);
    rd_kafka_event_t *ev = answer(q, "describing the group", err);
    size_t n = 0;
    const rd_kafka_ConsumerGroupDescription_t **d = !ev ? NULL :
        rd_kafka_DescribeConsumerGroups_result_groups(
            rd_kafka_event_DescribeConsumerGroups_result(ev), &n);
    lm_status st = ev ? LM_OK : err->code;
    snprintf(g->state, sizeof g->state, "Unknown");
    if (n) {
        const rd_kafka_error_t *e = rd_kafka_ConsumerGroupDescription_error(d[0]);
        if (e && rd_kafka_error_code(e) == RD_KAFKA_RESP_ERR_GROUP_ID_NOT_FOUND)
            snprintf(g->state, sizeof g->state, "Dead");
        else if (e && rd_kafka_error_code(e) == RD_KAFKA_RESP_ERR__UNSUPPORTED_FEATURE)
            st = lm_err_set(err, LM_UNSUPPORTED, "this broker does not tell about groups (that of "
                            "`loramill dev` can't); a real one is needed");
        else if (e)
            st = lm_err_set(err, kind_of(rd_kafka_error_code(e)), "group '%s': %s", group,
                            rd_kafka_error_string(e));
        else
            snprintf(g->state, sizeof g->state, "%s", rd_kafka_consumer_group_state_name(
                rd_kafka_ConsumerGroupDescription_state(d[0])));
        for (size_t i = 0; !e && i < rd_kafka_ConsumerGroupDescription_member_count(d[0]); i++)
            add_member(g, rd_kafka_ConsumerGroupDescription_member(d[0], i));
    }
    if (ev)
        rd_kafka_event_destroy(ev);
    rd_kafka_queue_destroy(q);
    return st;
}

static void note_committed(struct group_part *p, const rd_kafka_topic_partition_t *e)
{
    struct offset_range *r = NULL;
    size_t n = 0;
    p->done_beyond = 0;
    p->committed = e->offset >= 0 ? e->offset : -1;
    if (p->committed < 0 || !e->metadata)
        return;
    const char *text = e->metadata;
    size_t len = strnlen(text, e->metadata_size);
    const char *end = memchr(text, OFFSET_MAP_SEPARATOR, len);
    if (offset_map_decode(text, end ? (size_t)(end - text) : len, e->offset, &r, &n, NULL))
        return;
    for (size_t i = 0; i < n; i++)
        p->done_beyond += r[i].to - r[i].from;
    free(r);
}

static lm_status read_committed(struct cli_kafka *k, const char *group, struct group *g,
                                struct lm_err *err)
{
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new((int)g->n_parts);
    for (size_t i = 0; i < g->n_parts; i++)
        rd_kafka_topic_partition_list_add(l, g->parts[i].topic, g->parts[i].partition);
    rd_kafka_ListConsumerGroupOffsets_t *ask = rd_kafka_ListConsumerGroupOffsets_new(group, l);
    rd_kafka_queue_t *q = rd_kafka_queue_new(k->rk);
    rd_kafka_ListConsumerGroupOffsets(k->rk, &ask, 1, NULL, q);
    rd_kafka_event_t *ev = answer(q, "the group's offsets", err);
    size_t n = 0;
    const rd_kafka_group_result_t **res = !ev ? NULL :
        rd_kafka_ListConsumerGroupOffsets_result_groups(
            rd_kafka_event_ListConsumerGroupOffsets_result(ev), &n);
    lm_status st = ev ? LM_OK : err->code;
    const rd_kafka_error_t *e = n ? rd_kafka_group_result_error(res[0]) : NULL;
    if (e && rd_kafka_error_code(e) != RD_KAFKA_RESP_ERR_GROUP_ID_NOT_FOUND)
        st = lm_err_set(err, kind_of(rd_kafka_error_code(e)), "group '%s': %s", group,
                        rd_kafka_error_string(e));
    const rd_kafka_topic_partition_list_t *got = n && !e ? rd_kafka_group_result_partitions(res[0])
                                                         : NULL;
    for (size_t i = 0; i < g->n_parts; i++) {
        struct group_part *p = &g->parts[i];
        const rd_kafka_topic_partition_t *t = !got ? NULL : rd_kafka_topic_partition_list_find(
            (rd_kafka_topic_partition_list_t *)(uintptr_t)got, p->topic, p->partition);
        if (t)
            note_committed(p, t);
    }
    if (ev)
        rd_kafka_event_destroy(ev);
    rd_kafka_queue_destroy(q);
    rd_kafka_ListConsumerGroupOffsets_destroy(ask);
    rd_kafka_topic_partition_list_destroy(l);
    return st;
}

/* ---- reading a group -------------------------------------------------------------------- */

static lm_status add_topic(struct cli_kafka *k, const char *topic, struct group *g,
                           struct lm_err *err)
{
    int n;
    lm_status st = cli_kafka_partitions(k, topic, ASK_MS, &n, err);
    if (st != LM_OK)
        return st;
    struct group_part *grown = lm_reallocarray(g->parts, g->n_parts + (size_t)n, sizeof *grown);
    if (!grown)
        return lm_err_set(err, LM_NOMEM, "no memory");
    g->parts = grown;
    for (int i = 0; i < n; i++) {
        struct group_part *p = &g->parts[g->n_parts++];
        *p = (struct group_part){ .partition = i, .committed = -1, .low = -1, .high = -1,
                                  .oldest_ms = -1 };
        snprintf(p->topic, sizeof p->topic, "%s", topic);
        if (rd_kafka_query_watermark_offsets(k->rk, topic, i, &p->low, &p->high, ASK_MS))
            p->low = p->high = -1;
    }
    return LM_OK;
}

lm_status cli_group_read(struct cli_kafka *k, const char *group, const char *topics,
                         struct group *out, struct lm_err *err)
{
    char *copy = lm_strdup(topics), *save = NULL;
    lm_status st = copy ? LM_OK : lm_err_set(err, LM_NOMEM, "no memory");
    *out = (struct group){ 0 };
    if (*topics == '^')
        st = lm_err_set(err, LM_INVALID, "topics.prompts=%s is a pattern; name topics with --topic",
                        topics);
    for (char *t = !st ? strtok_r(copy, ", ", &save) : NULL; !st && t;
         t = strtok_r(NULL, ", ", &save))
        st = add_topic(k, t, out, err);
    free(copy);
    for (int i = 0; !st && i < COORDINATOR_TRIES; i++) {
        lm_status now = read_committed(k, group, out, err);
        if (!now)
            now = describe(k, group, out, err);
        if (now != LM_BUSY || i + 1 == COORDINATOR_TRIES || cli_interrupted()) {
            st = now;
            break;
        }
        out->n_members = 0;
        nanosleep(&(struct timespec){ .tv_nsec = 500000000 }, NULL);
    }
    if (st)
        cli_group_release(out);
    return st;
}

void cli_group_release(struct group *g)
{
    free(g->parts);
    free(g->members);
    *g = (struct group){ 0 };
}

static void look_at(struct cli_kafka *k, struct group_part *p)
{
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(1);
    rd_kafka_topic_partition_list_add(l, p->topic, p->partition)->offset =
        LM_MAX(p->committed, p->low);
    rd_kafka_resp_err_t e = rd_kafka_assign(k->rk, l);
    rd_kafka_topic_partition_list_destroy(l);
    int64_t end = lm_now_us() + (int64_t)ONE_RECORD_MS * 1000;
    for (bool done = e; !done && lm_now_us() < end;) {
        rd_kafka_message_t *m = rd_kafka_consumer_poll(k->rk, 100);
        if (!m)
            continue;
        bool ours = m->rkt && m->partition == p->partition &&
                    !strcmp(rd_kafka_topic_name(m->rkt), p->topic);
        if (ours && !m->err)
            p->oldest_ms = rd_kafka_message_timestamp(m, NULL);
        done = ours && (!m->err || m->err == RD_KAFKA_RESP_ERR__PARTITION_EOF);
        rd_kafka_message_destroy(m);
    }
    rd_kafka_assign(k->rk, NULL);
}

void cli_group_oldest(struct cli_kafka *k, struct group *g)
{
    for (size_t i = 0; i < g->n_parts; i++)
        if (g->parts[i].high > LM_MAX(g->parts[i].committed, g->parts[i].low))
            look_at(k, &g->parts[i]);
}

/* ---- moving a group --------------------------------------------------------------------- */

lm_status cli_group_offsets_at(struct cli_kafka *k, const struct group *g, int64_t ms,
                               int64_t *offsets, struct lm_err *err)
{
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new((int)g->n_parts);
    for (size_t i = 0; i < g->n_parts; i++)
        rd_kafka_topic_partition_list_add(l, g->parts[i].topic, g->parts[i].partition)->offset =
            ms;
    rd_kafka_resp_err_t e = rd_kafka_offsets_for_times(k->rk, l, ASK_MS);
    for (size_t i = 0; !e && i < g->n_parts; i++) {
        const rd_kafka_topic_partition_t *t = rd_kafka_topic_partition_list_find(
            l, g->parts[i].topic, g->parts[i].partition);
        e = t->err;
        offsets[i] = t->offset >= 0 ? t->offset : g->parts[i].high;
    }
    rd_kafka_topic_partition_list_destroy(l);
    return e ? lm_err_set(err, LM_NET, "looking up offsets by time: %s", rd_kafka_err2str(e))
             : LM_OK;
}

static lm_status check_move(const rd_kafka_group_result_t *r, struct lm_err *err)
{
    const rd_kafka_error_t *e = rd_kafka_group_result_error(r);
    const rd_kafka_topic_partition_list_t *l = rd_kafka_group_result_partitions(r);
    rd_kafka_resp_err_t code = e ? rd_kafka_error_code(e) : RD_KAFKA_RESP_ERR_NO_ERROR;
    for (int i = 0; !code && l && i < l->cnt; i++)
        code = l->elems[i].err;
    if (!code)
        return LM_OK;
    if (code == RD_KAFKA_RESP_ERR_UNKNOWN_MEMBER_ID || code == RD_KAFKA_RESP_ERR_NON_EMPTY_GROUP)
        return lm_err_set(err, LM_STATE, "the group has members: end its workers first");
    return lm_err_set(err, LM_NET, "moving the group: %s", rd_kafka_err2str(code));
}

lm_status cli_group_move(struct cli_kafka *k, const char *group, const struct group *g,
                         const int64_t *target, struct lm_err *err)
{
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new((int)g->n_parts);
    for (size_t i = 0; i < g->n_parts; i++)
        if (target[i] >= 0)
            rd_kafka_topic_partition_list_add(l, g->parts[i].topic, g->parts[i].partition)
                ->offset = target[i];
    rd_kafka_AlterConsumerGroupOffsets_t *ask = rd_kafka_AlterConsumerGroupOffsets_new(group, l);
    rd_kafka_queue_t *q = rd_kafka_queue_new(k->rk);
    rd_kafka_AlterConsumerGroupOffsets(k->rk, &ask, 1, NULL, q);
    rd_kafka_event_t *ev = answer(q, "moving the group", err);
    size_t n = 0;
    const rd_kafka_group_result_t **res = !ev ? NULL :
        rd_kafka_AlterConsumerGroupOffsets_result_groups(
            rd_kafka_event_AlterConsumerGroupOffsets_result(ev), &n);
    lm_status st = !ev ? LM_NET : n ? check_move(res[0], err) : LM_OK;
    if (ev)
        rd_kafka_event_destroy(ev);
    rd_kafka_queue_destroy(q);
    rd_kafka_AlterConsumerGroupOffsets_destroy(ask);
    rd_kafka_topic_partition_list_destroy(l);
    return st;
}

/* ---- topics ----------------------------------------------------------------------------- */

static lm_status assign_all(struct cli_kafka *k, const char *topic, int n, int64_t since_ms,
                            struct lm_err *err)
{
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(n);
    for (int i = 0; i < n; i++)
        rd_kafka_topic_partition_list_add(l, topic, i)->offset =
            since_ms < 0 ? RD_KAFKA_OFFSET_BEGINNING : since_ms;
    rd_kafka_resp_err_t e = since_ms < 0 ? 0 : rd_kafka_offsets_for_times(k->rk, l, ASK_MS);
    if (!e)
        e = rd_kafka_assign(k->rk, l);
    rd_kafka_topic_partition_list_destroy(l);
    return e ? lm_err_set(err, LM_NET, "topic '%s': %s", topic, rd_kafka_err2str(e)) : LM_OK;
}

/* Where each partition ends now: what is written while we read, perhaps because of us, is not
 * ours. */
static int64_t *find_ends(struct cli_kafka *k, const char *topic, int n, struct lm_err *err)
{
    int64_t *end = lm_calloc((size_t)n, sizeof *end), low;
    for (int i = 0; end && i < n; i++) {
        rd_kafka_resp_err_t e = rd_kafka_query_watermark_offsets(k->rk, topic, i, &low, &end[i],
                                                                 ASK_MS);
        if (e) {
            lm_err_set(err, LM_NET, "topic '%s' [%d]: %s", topic, i, rd_kafka_err2str(e));
            free(end);
            return NULL;
        }
    }
    return end;
}

/* Is this record, or end of partition, at or behind the end that was there? Counts it once. */
static bool at_end(int64_t *end, const rd_kafka_message_t *m)
{
    if (end[m->partition] < 0 || (!m->err && m->offset + 1 < end[m->partition]))
        return false;
    end[m->partition] = -1;
    return true;
}

lm_status cli_scan(struct cli_kafka *k, const char *topic, int64_t since_ms,
                   bool (*each)(void *user, const rd_kafka_message_t *m), void *user,
                   struct lm_err *err)
{
    int n = 0;
    int64_t *end = NULL;
    lm_status st = cli_kafka_partitions(k, topic, ASK_MS, &n, err);
    if (st == LM_OK && !(end = find_ends(k, topic, n, err)))
        st = LM_NET;
    if (st == LM_OK)
        st = assign_all(k, topic, n, since_ms, err);
    int left = n;
    int64_t heard = lm_now_us();
    while (st == LM_OK && left > 0 && !cli_interrupted()) {
        rd_kafka_message_t *m = rd_kafka_consumer_poll(k->rk, 100);
        if (!m && lm_now_us() - heard > (int64_t)SCAN_IDLE_MS * 1000) {
            st = lm_err_set(err, LM_NET, "topic '%s': no answer from the brokers%s%s", topic,
                            k->why[0] ? ": " : "", k->why);
            break;
        }
        if (!m)
            continue;
        heard = m->err && m->err != RD_KAFKA_RESP_ERR__PARTITION_EOF ? heard : lm_now_us();
        bool here = !m->err && end[m->partition] >= 0 && m->offset < end[m->partition];
        if (here && !each(user, m))
            left = 0;
        else if ((!m->err || m->err == RD_KAFKA_RESP_ERR__PARTITION_EOF) && at_end(end, m))
            left--;
        rd_kafka_message_destroy(m);
    }
    free(end);
    rd_kafka_assign(k->rk, NULL);
    return st;
}
