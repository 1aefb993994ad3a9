/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cli_group.c - see cli_group.h. Answers of the admin calls come as events on a queue of their own.
 */
#include "worker/tools/cli_group.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "worker/offset_map.h"

enum { ASK_MS = 15000, SLICE_MS = 1000, ONE_RECORD_MS = 10000, SCAN_IDLE_MS = 15000,
       COORDINATOR_TRIES = 30 };

/* ---- admin calls ------------------------------------------------------------------------ */

/* A group's coordinator that has just come to be, or moves, says so for a moment; so does one that
 * has offsets in a transaction that is not over. */
static lm_status kind_of(rd_kafka_resp_err_t e)
{
    return e == RD_KAFKA_RESP_ERR_UNSTABLE_OFFSET_COMMIT ||
           e == RD_KAFKA_RESP_ERR_COORDINATOR_LOAD_IN_PROGRESS ||
           e == RD_KAFKA_RESP_ERR_COORDINATOR_NOT_AVAILABLE ||
           e == RD_KAFKA_RESP_ERR_NOT_COORDINATOR ? LM_BUSY : LM_NET;
}

/* The answer, or NULL with *err. The caller destroys it. */
static rd_kafka_event_t *answer(rd_kafka_queue_t *q, const char *what, struct lm_err *err)
{
    rd_kafka_event_t *ev = NULL;
    int64_t end = lm_now_us() + (int64_t)ASK_MS * 1000;
    while (!ev && lm_now_us() < end && !cli_interrupted())
        ev = rd_kafka_queue_poll(q, 100);
    if (ev && !rd_kafka_event_error(ev))
        return ev;
    if (!ev && cli_interrupted()) {
        lm_err_set(err, LM_CANCELLED, "interrupted");
        return NULL;
    }
    lm_err_set(err, ev ? kind_of(rd_kafka_event_error(ev)) : LM_NET, "%s: %s", what,
               ev ? rd_kafka_event_error_string(ev) : "no answer from the brokers");
    if (ev)
        rd_kafka_event_destroy(ev);
    return NULL;
}

/* The parts that `which` picks, NULL for all, each with this offset. The caller destroys it. */
static rd_kafka_topic_partition_list_t *parts_of(const struct group *g,
                                                 bool (*which)(const struct group_part *p),
                                                 int64_t offset)
{
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new((int)g->n_parts);
    for (size_t i = 0; i < g->n_parts; i++)
        if (!which || which(&g->parts[i]))
            rd_kafka_topic_partition_list_add(l, g->parts[i].topic, g->parts[i].partition)
                ->offset = offset;
    return l;
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

static lm_status take_commits(const rd_kafka_event_t *ev, const char *group,
                              rd_kafka_topic_partition_list_t **out, struct lm_err *err)
{
    size_t n = 0;
    const rd_kafka_group_result_t **res = rd_kafka_ListConsumerGroupOffsets_result_groups(
        rd_kafka_event_ListConsumerGroupOffsets_result((rd_kafka_event_t *)(uintptr_t)ev), &n);
    const rd_kafka_error_t *e = n ? rd_kafka_group_result_error(res[0]) : NULL;
    if (e && rd_kafka_error_code(e) != RD_KAFKA_RESP_ERR_GROUP_ID_NOT_FOUND)
        return lm_err_set(err, kind_of(rd_kafka_error_code(e)), "group '%s': %s", group,
                          rd_kafka_error_string(e));
    const rd_kafka_topic_partition_list_t *got = n && !e ? rd_kafka_group_result_partitions(res[0])
                                                         : NULL;
    for (int i = 0; got && i < got->cnt; i++)
        if (got->elems[i].err && kind_of(got->elems[i].err) == LM_BUSY)
            return lm_err_set(err, LM_BUSY, "group '%s': %s", group,
                              rd_kafka_err2str(got->elems[i].err));
    *out = got ? rd_kafka_topic_partition_list_copy(got) : rd_kafka_topic_partition_list_new(0);
    return LM_OK;
}

/* What the group has committed for the partitions of `l`, once. `stable`: LM_BUSY while a
 * transaction is about to change it. */
static lm_status ask_commits(struct cli_kafka *k, const char *group, bool stable,
                             const rd_kafka_topic_partition_list_t *l,
                             rd_kafka_topic_partition_list_t **out, struct lm_err *err)
{
    rd_kafka_AdminOptions_t *o =
        rd_kafka_AdminOptions_new(k->rk, RD_KAFKA_ADMIN_OP_LISTCONSUMERGROUPOFFSETS);
    rd_kafka_error_destroy(rd_kafka_AdminOptions_set_require_stable_offsets(o, stable));
    rd_kafka_ListConsumerGroupOffsets_t *ask = rd_kafka_ListConsumerGroupOffsets_new(group, l);
    rd_kafka_queue_t *q = rd_kafka_queue_new(k->rk);
    rd_kafka_ListConsumerGroupOffsets(k->rk, &ask, 1, o, q);
    rd_kafka_event_t *ev = answer(q, "the group's offsets", err);
    lm_status st = ev ? take_commits(ev, group, out, err) : err->code;
    if (ev)
        rd_kafka_event_destroy(ev);
    rd_kafka_queue_destroy(q);
    rd_kafka_ListConsumerGroupOffsets_destroy(ask);
    rd_kafka_AdminOptions_destroy(o);
    return st;
}

static lm_status wait_again(struct lm_err *err)
{
    nanosleep(&(struct timespec){ .tv_nsec = 500000000 }, NULL);
    return cli_interrupted() ? lm_err_set(err, LM_CANCELLED, "interrupted") : LM_OK;
}

lm_status cli_group_commits(struct cli_kafka *k, const char *group, const char *topic, int n,
                            rd_kafka_topic_partition_list_t **out, struct lm_err *err)
{
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(n);
    rd_kafka_topic_partition_list_add_range(l, topic, 0, n - 1);
    *out = NULL;
    lm_status st = ask_commits(k, group, true, l, out, err);
    for (int i = 1; st == LM_BUSY && i < COORDINATOR_TRIES; i++)
        if (!(st = wait_again(err)))
            st = ask_commits(k, group, true, l, out, err);
    rd_kafka_topic_partition_list_destroy(l);
    for (int i = 0; !st && i < (*out)->cnt; i++)
        if ((*out)->elems[i].err)
            st = lm_err_set(err, LM_NET, "group '%s': %s [%d]: %s", group, topic,
                            (int)(*out)->elems[i].partition,
                            rd_kafka_err2str((*out)->elems[i].err));
    if (st && *out)
        rd_kafka_topic_partition_list_destroy(*out);
    *out = st ? NULL : *out;
    return st;
}

static lm_status read_committed(struct cli_kafka *k, const char *group, struct group *g,
                                struct lm_err *err)
{
    rd_kafka_topic_partition_list_t *l = parts_of(g, NULL, RD_KAFKA_OFFSET_INVALID), *got = NULL;
    lm_status st = ask_commits(k, group, false, l, &got, err);
    for (size_t i = 0; !st && i < g->n_parts; i++) {
        const rd_kafka_topic_partition_t *t = rd_kafka_topic_partition_list_find(
            got, g->parts[i].topic, g->parts[i].partition);
        if (t)
            note_committed(&g->parts[i], t);
    }
    if (got)
        rd_kafka_topic_partition_list_destroy(got);
    rd_kafka_topic_partition_list_destroy(l);
    return st;
}

/* ---- offsets of a log ------------------------------------------------------------------- */

#if RD_KAFKA_VERSION >= 0x02030000
/* What a reader may see ends where this client's readers' does: before open transactions. */
static rd_kafka_IsolationLevel_t isolation_of(rd_kafka_t *rk)
{
    char level[32] = "";
    size_t size = sizeof level;
    rd_kafka_conf_get(rd_kafka_conf(rk), "isolation.level", level, &size);
    return !strcmp(level, "read_uncommitted") ? RD_KAFKA_ISOLATION_LEVEL_READ_UNCOMMITTED
                                              : RD_KAFKA_ISOLATION_LEVEL_READ_COMMITTED;
}

static void take_offsets(const rd_kafka_event_t *ev, rd_kafka_topic_partition_list_t *l)
{
    size_t n;
    const rd_kafka_ListOffsetsResultInfo_t **info = rd_kafka_ListOffsets_result_infos(
        rd_kafka_event_ListOffsets_result((rd_kafka_event_t *)(uintptr_t)ev), &n);
    for (size_t i = 0; i < n; i++) {
        const rd_kafka_topic_partition_t *got =
            rd_kafka_ListOffsetsResultInfo_topic_partition(info[i]);
        rd_kafka_topic_partition_t *to = rd_kafka_topic_partition_list_find(l, got->topic,
                                                                            got->partition);
        if (!to)
            continue;
        to->offset = got->offset;       /* RD_KAFKA_OFFSET_INVALID: its broker did not answer */
        to->err = got->err ? got->err : got->offset == RD_KAFKA_OFFSET_INVALID ?
                  RD_KAFKA_RESP_ERR__TIMED_OUT : RD_KAFKA_RESP_ERR_NO_ERROR;
    }
}
#endif

/* Looks up what l's offsets ask for, a time in ms, or the log's _BEGINNING or _END, into them, all
 * at once; -1 behind the last record, err where there is no answer. Each must have a leader, for
 * one without holds up all. */
static lm_status list_offsets(struct cli_kafka *k, rd_kafka_topic_partition_list_t *l,
                              struct lm_err *err)
{
    lm_status st = LM_OK;
    if (!l->cnt)
        return LM_OK;
#if RD_KAFKA_VERSION >= 0x02030000
    rd_kafka_queue_t *q = rd_kafka_queue_new(k->rk);
    rd_kafka_AdminOptions_t *o = rd_kafka_AdminOptions_new(k->rk, RD_KAFKA_ADMIN_OP_LISTOFFSETS);
    rd_kafka_AdminOptions_set_request_timeout(o, ASK_MS * 2 / 3, NULL, 0);
    rd_kafka_error_destroy(rd_kafka_AdminOptions_set_isolation_level(o, isolation_of(k->rk)));
    rd_kafka_ListOffsets(k->rk, l, o, q);
    rd_kafka_event_t *ev = answer(q, "the offsets of the logs", err);
    if (ev) {
        take_offsets(ev, l);
        rd_kafka_event_destroy(ev);
    } else {
        st = err->code;
    }
    rd_kafka_AdminOptions_destroy(o);
    rd_kafka_queue_destroy(q);
#else                           /* the same request, but nothing hears a Ctrl-C meanwhile */
    rd_kafka_resp_err_t e = rd_kafka_offsets_for_times(k->rk, l, ASK_MS);
    if (e)
        st = lm_err_set(err, LM_NET, "the offsets of the logs: %s", rd_kafka_err2str(e));
#endif
    return st;
}

static bool led(const struct group_part *p)
{
    return p->leader >= 0;
}

/* One of the edges of each log that has a leader; -1 where that does not answer. */
static lm_status find_edge(struct cli_kafka *k, struct group *g, int64_t which, struct lm_err *err)
{
    rd_kafka_topic_partition_list_t *l = parts_of(g, led, which);
    lm_status st = list_offsets(k, l, err);
    for (size_t i = 0; !st && i < g->n_parts; i++) {
        struct group_part *p = &g->parts[i];
        const rd_kafka_topic_partition_t *t = rd_kafka_topic_partition_list_find(l, p->topic,
                                                                                 p->partition);
        *(which == RD_KAFKA_OFFSET_END ? &p->high : &p->low) = t && !t->err ? t->offset : -1;
    }
    rd_kafka_topic_partition_list_destroy(l);
    return st;
}

static lm_status find_edges(struct cli_kafka *k, struct group *g, struct lm_err *err)
{
    lm_status st = find_edge(k, g, RD_KAFKA_OFFSET_BEGINNING, err);
    if (!st)
        st = find_edge(k, g, RD_KAFKA_OFFSET_END, err);
    for (size_t i = 0; !st && i < g->n_parts; i++)
        if (g->parts[i].low < 0 || g->parts[i].high < 0)
            g->parts[i].low = g->parts[i].high = -1;
    return st;
}

/* ---- reading a group -------------------------------------------------------------------- */

static bool has_topic(const struct group *g, const char *topic)
{
    for (size_t i = 0; i < g->n_parts; i++)
        if (!strcmp(g->parts[i].topic, topic))
            return true;
    return false;
}

static lm_status add_topic(struct cli_kafka *k, const char *topic, struct group *g,
                           struct lm_err *err)
{
    int n;
    int32_t *leaders = NULL;
    if (has_topic(g, topic))
        return LM_OK;
    lm_status st = cli_kafka_leaders(k, topic, ASK_MS, &n, &leaders, err);
    if (st != LM_OK)
        return st;
    struct group_part *grown = lm_reallocarray(g->parts, g->n_parts + (size_t)n, sizeof *grown);
    if (grown)
        g->parts = grown;
    for (int i = 0; grown && i < n; i++) {
        struct group_part *p = &g->parts[g->n_parts++];
        *p = (struct group_part){ .partition = i, .leader = leaders[i], .committed = -1,
                                  .low = -1, .high = -1, .oldest_ms = -1 };
        snprintf(p->topic, sizeof p->topic, "%s", topic);
    }
    free(leaders);
    return grown ? LM_OK : lm_err_set(err, LM_NOMEM, "no memory");
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* The topics that patterns of topics.prompts match now, as the group's workers see them. */
static lm_status add_matching(struct cli_kafka *k, const struct config *c, struct group *g,
                              struct lm_err *err)
{
    const struct rd_kafka_metadata *md;
    int64_t end = lm_now_us() + (int64_t)ASK_MS * 1000;
    rd_kafka_resp_err_t e;
    do {                        /* in slices, for nothing hears a Ctrl-C meanwhile */
        e = rd_kafka_metadata(k->rk, 1, NULL, &md, SLICE_MS);
    } while ((e == RD_KAFKA_RESP_ERR__TRANSPORT || e == RD_KAFKA_RESP_ERR__TIMED_OUT) &&
             lm_now_us() < end && !cli_interrupted());
    if (e && cli_interrupted())
        return lm_err_set(err, LM_CANCELLED, "interrupted");
    if (e)
        return lm_err_set(err, LM_NET, "the list of topics: %s%s%s", rd_kafka_err2str(e),
                          k->why[0] ? "; " : "", k->why);
    const char **names = lm_calloc((size_t)md->topic_cnt + 1, sizeof *names);
    size_t n = 0;
    for (int i = 0; names && i < md->topic_cnt; i++)
        if (config_reads_topic(c, md->topics[i].topic))
            names[n++] = md->topics[i].topic;
    lm_status st = names ? LM_OK : lm_err_set(err, LM_NOMEM, "no memory");
    if (names)
        qsort(names, n, sizeof *names, by_name);
    for (size_t i = 0; !st && i < n; i++)
        st = add_topic(k, names[i], g, err);
    free(names);
    rd_kafka_metadata_destroy(md);
    return st;
}

static lm_status add_topics(struct cli_kafka *k, const struct config *c, struct group *g,
                            struct lm_err *err)
{
    char *copy = lm_strdup(c->topics_prompts), *rest = copy, *t;
    lm_status st = copy ? LM_OK : lm_err_set(err, LM_NOMEM, "no memory");
    bool pattern = false;
    while (!st && (t = config_next_topic(&rest))) {
        if (*t != '^')
            st = add_topic(k, t, g, err);
        pattern = pattern || *t == '^';
    }
    free(copy);
    if (!st && pattern)
        st = add_matching(k, c, g, err);
    if (!st && !g->n_parts)
        st = lm_err_set(err, LM_NOT_FOUND, "the broker has no topic that topics.prompts=%s matches",
                        c->topics_prompts);
    return st;
}

static lm_status read_group(struct cli_kafka *k, const char *group, struct group *g,
                            struct lm_err *err)
{
    for (int i = 1;; i++) {
        lm_status st = read_committed(k, group, g, err);
        if (!st)
            st = describe(k, group, g, err);
        if (st != LM_BUSY || i == COORDINATOR_TRIES || (st = wait_again(err)))
            return st;
        g->n_members = 0;
    }
}

lm_status cli_group_read(struct cli_kafka *k, const struct config *c, const char *topic,
                         struct group *out, struct lm_err *err)
{
    *out = (struct group){ 0 };
    lm_status st = topic ? add_topic(k, topic, out, err) : add_topics(k, c, out, err);
    if (!st)
        st = find_edges(k, out, err);
    if (!st)
        st = read_group(k, c->group_id, out, err);
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

/* ---- the oldest unfinished records ------------------------------------------------------ */

static bool lags(const struct group_part *p)
{
    return p->high > LM_MAX(p->committed, p->low);
}

/* The part that a record, or an end of partition, is of and that has had none yet. */
static struct group_part *waiting_part(struct group *g, const bool *seen,
                                       const rd_kafka_message_t *m)
{
    if (!m->rkt || (m->err && m->err != RD_KAFKA_RESP_ERR__PARTITION_EOF))
        return NULL;
    for (size_t i = 0; i < g->n_parts; i++)
        if (g->parts[i].partition == m->partition && !seen[i] && lags(&g->parts[i]) &&
            !strcmp(g->parts[i].topic, rd_kafka_topic_name(m->rkt)))
            return &g->parts[i];
    return NULL;
}

/* It has said what there was to say: no more of it is read. */
static void pause_part(struct cli_kafka *k, const struct group_part *p)
{
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(1);
    rd_kafka_topic_partition_list_add(l, p->topic, p->partition);
    rd_kafka_pause_partitions(k->rk, l);
    rd_kafka_topic_partition_list_destroy(l);
}

/* One record from each of `left` partitions. */
static void read_oldest(struct cli_kafka *k, struct group *g, bool *seen, int left)
{
    int64_t heard = lm_now_us();
    while (left > 0 && !cli_interrupted() &&
           lm_now_us() - heard < (int64_t)ONE_RECORD_MS * 1000) {
        rd_kafka_message_t *m = rd_kafka_consumer_poll(k->rk, 100);
        struct group_part *p = m ? waiting_part(g, seen, m) : NULL;
        if (p) {
            if (!m->err)
                p->oldest_ms = rd_kafka_message_timestamp(m, NULL);
            seen[p - g->parts] = true;
            pause_part(k, p);
            heard = lm_now_us();
            left--;
        }
        if (m)
            rd_kafka_message_destroy(m);
    }
}

void cli_group_oldest(struct cli_kafka *k, struct group *g)
{
    rd_kafka_topic_partition_list_t *l = parts_of(g, lags, 0);
    bool *seen = lm_calloc(g->n_parts + 1, sizeof *seen);
    for (size_t i = 0; i < g->n_parts; i++) {
        struct group_part *p = &g->parts[i];
        rd_kafka_topic_partition_t *t = rd_kafka_topic_partition_list_find(l, p->topic,
                                                                           p->partition);
        if (t)
            t->offset = LM_MAX(p->committed, p->low);
    }
    if (seen && l->cnt && !rd_kafka_assign(k->rk, l)) {
        read_oldest(k, g, seen, l->cnt);
        rd_kafka_assign(k->rk, NULL);
    }
    free(seen);
    rd_kafka_topic_partition_list_destroy(l);
}

/* ---- moving a group --------------------------------------------------------------------- */

lm_status cli_group_offsets_at(struct cli_kafka *k, const struct group *g, int64_t ms,
                               int64_t *offsets, struct lm_err *err)
{
    rd_kafka_topic_partition_list_t *l = parts_of(g, led, ms);
    lm_status st = list_offsets(k, l, err);
    for (size_t i = 0; !st && i < g->n_parts; i++) {
        const struct group_part *p = &g->parts[i];
        const rd_kafka_topic_partition_t *t = rd_kafka_topic_partition_list_find(l, p->topic,
                                                                                 p->partition);
        offsets[i] = t && t->err ? -1 : t && t->offset >= 0 ? t->offset : p->high;
    }
    rd_kafka_topic_partition_list_destroy(l);
    return st;
}

static bool has_members(rd_kafka_resp_err_t e)
{
    return e == RD_KAFKA_RESP_ERR_UNKNOWN_MEMBER_ID || e == RD_KAFKA_RESP_ERR_NON_EMPTY_GROUP;
}

/* Each part's own answer. A refusal of all comes as an error, or once for each of them. */
static lm_status check_move(const rd_kafka_group_result_t *r, const struct group *g,
                            const int64_t *target, const char **refused, struct lm_err *err)
{
    const rd_kafka_error_t *e = rd_kafka_group_result_error(r);
    const rd_kafka_topic_partition_list_t *l = rd_kafka_group_result_partitions(r);
    rd_kafka_resp_err_t code = e ? rd_kafka_error_code(e) : RD_KAFKA_RESP_ERR_NO_ERROR;
    size_t n = 0, n_refused = 0;
    for (size_t i = 0; !code && i < g->n_parts; i++) {
        const rd_kafka_topic_partition_t *t = target[i] < 0 || !l ? NULL :
            rd_kafka_topic_partition_list_find((rd_kafka_topic_partition_list_t *)(uintptr_t)l,
                                               g->parts[i].topic, g->parts[i].partition);
        n += target[i] >= 0;
        n_refused += t && t->err;
        if (t && has_members(t->err))
            code = t->err;
        else if (t && t->err)
            refused[i] = rd_kafka_err2str(t->err);
    }
    if (has_members(code))
        return lm_err_set(err, LM_STATE, "the group has members: end its workers first");
    if (code)
        return lm_err_set(err, LM_NET, "moving the group: %s", rd_kafka_err2str(code));
    return !n_refused ? LM_OK : lm_err_set(err, LM_NET, "%zu of %zu partitions were moved",
                                           n - n_refused, n);
}

lm_status cli_group_move(struct cli_kafka *k, const char *group, const struct group *g,
                         const int64_t *target, const char **refused, struct lm_err *err)
{
    if (cli_interrupted())
        return lm_err_set(err, LM_CANCELLED, "interrupted");
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
    lm_status st = !ev ? err->code : n ? check_move(res[0], g, target, refused, err) : LM_OK;
    if (st == LM_CANCELLED)
        lm_err_set(err, st, "interrupted: the group was moved, or it was not");
    if (ev)
        rd_kafka_event_destroy(ev);
    rd_kafka_queue_destroy(q);
    rd_kafka_AlterConsumerGroupOffsets_destroy(ask);
    rd_kafka_topic_partition_list_destroy(l);
    return st;
}

/* ---- topics ----------------------------------------------------------------------------- */

/* Looks up an offset of each partition, as list_offsets() does; NULL with *err where one can't be
 * had. The caller destroys it. */
static rd_kafka_topic_partition_list_t *look_up(struct cli_kafka *k, const char *topic, int n,
                                                int64_t what, struct lm_err *err)
{
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(n);
    for (int i = 0; i < n; i++)
        rd_kafka_topic_partition_list_add(l, topic, i)->offset = what;
    lm_status st = list_offsets(k, l, err);
    for (int i = 0; !st && i < n; i++)
        if (l->elems[i].err)
            st = lm_err_set(err, LM_NET, "topic '%s' [%d]: %s", topic, (int)l->elems[i].partition,
                            rd_kafka_err2str(l->elems[i].err));
    if (!st)
        return l;
    rd_kafka_topic_partition_list_destroy(l);
    return NULL;
}

static lm_status assign_all(struct cli_kafka *k, const char *topic, int n, int64_t since_ms,
                            struct lm_err *err)
{
    rd_kafka_topic_partition_list_t *l =
        look_up(k, topic, n, since_ms < 0 ? RD_KAFKA_OFFSET_BEGINNING : since_ms, err);
    if (!l)
        return err->code;
    rd_kafka_resp_err_t e = rd_kafka_assign(k->rk, l);
    rd_kafka_topic_partition_list_destroy(l);
    return e ? lm_err_set(err, LM_NET, "topic '%s': %s", topic, rd_kafka_err2str(e)) : LM_OK;
}

int64_t *cli_topic_ends(struct cli_kafka *k, const char *topic, int n, struct lm_err *err)
{
    int64_t *end = lm_calloc((size_t)n, sizeof *end);
    rd_kafka_topic_partition_list_t *l = !end ? NULL :
        look_up(k, topic, n, RD_KAFKA_OFFSET_END, err);
    if (!end)
        lm_err_set(err, LM_NOMEM, "no memory");
    for (int i = 0; l && i < n; i++)
        end[l->elems[i].partition] = l->elems[i].offset;
    if (l)
        rd_kafka_topic_partition_list_destroy(l);
    else
        free(end);
    return l ? end : NULL;
}

/* Every partition has a leader; `n` is how many there are. */
static lm_status find_partitions(struct cli_kafka *k, const char *topic, int *n,
                                 struct lm_err *err)
{
    int32_t *leaders = NULL;
    lm_status st = cli_kafka_leaders(k, topic, ASK_MS, n, &leaders, err);
    for (int i = 0; !st && i < *n; i++)
        if (leaders[i] < 0)
            st = lm_err_set(err, LM_NET, "topic '%s' [%d]: no broker leads it now", topic, i);
    free(leaders);
    return st;
}

/* How far a partition was read, and where it ended when that began: what is written meanwhile,
 * perhaps because of us, is not ours. -1: it has been read. */
struct scanned { int64_t next, end; };

static struct scanned *scan_begin(struct cli_kafka *k, const char *topic, int *n,
                                  struct lm_err *err)
{
    if (find_partitions(k, topic, n, err))
        return NULL;
    int64_t *ends = cli_topic_ends(k, topic, *n, err);
    struct scanned *s = ends ? lm_calloc((size_t)*n, sizeof *s) : NULL;
    if (ends && !s)
        lm_err_set(err, LM_NOMEM, "no memory");
    for (int i = 0; s && i < *n; i++)
        s[i].end = ends[i];
    free(ends);
    return s;
}

/* A client whose place a log has no more begins anew with what is there. */
static bool goes_back(const struct scanned *s, const rd_kafka_message_t *m)
{
    return !m->err && m->offset < s[m->partition].next;
}

/* Is this record, or end of partition, at or behind the end that was there? Counts it once. */
static bool at_end(struct scanned *s, const rd_kafka_message_t *m)
{
    struct scanned *p = &s[m->partition];
    if (!m->err)
        p->next = m->offset + 1;
    if (p->end < 0 || (!m->err && m->offset + 1 < p->end))
        return false;
    p->end = -1;
    return true;
}

/* The client goes on trying after all but a right that is missing; it says each error once. */
static lm_status scan_error(struct cli_kafka *k, const char *topic, const rd_kafka_message_t *m,
                            struct lm_err *err)
{
    snprintf(k->why, sizeof k->why, "[%d] %s", (int)m->partition, rd_kafka_err2str(m->err));
    return m->err != RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED ? LM_OK :
        lm_err_set(err, LM_DENIED, "topic '%s' %s", topic, k->why);
}

lm_status cli_scan(struct cli_kafka *k, const char *topic, int64_t since_ms,
                   bool (*each)(void *user, const rd_kafka_message_t *m), void *user,
                   struct lm_err *err)
{
    int n = 0;
    struct scanned *s = scan_begin(k, topic, &n, err);
    lm_status st = s ? assign_all(k, topic, n, since_ms, err) : err->code;
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
        bool failed = m->err && m->err != RD_KAFKA_RESP_ERR__PARTITION_EOF;
        bool here = !m->err && m->offset < s[m->partition].end;
        if (failed)
            st = scan_error(k, topic, m, err);
        else if (goes_back(s, m))
            st = lm_err_set(err, LM_STATE, "topic '%s' [%d] was made anew, or cut, while it was "
                            "read: try again", topic, (int)m->partition);
        else if (here && !each(user, m))
            left = 0;
        else if (at_end(s, m))
            left--;
        heard = failed ? heard : lm_now_us();   /* behind each(), which may take long */
        rd_kafka_message_destroy(m);
    }
    free(s);
    rd_kafka_assign(k->rk, NULL);
    return st;
}
