/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_dlq_retry.c - see cmd_dlq_retry.h.
 *
 * A batch is at most BATCH letters or BATCH_BYTES and one letter more. It is sent with a copy of
 * the marks to which its letters were added; the copy takes the place of the marks when the
 * transaction is committed, and is dropped when it was aborted.
 *
 * librdkafka says of each error whether to call again, to abort, or that the producer is of no use
 * any more. What answers nothing for GIVE_UP_MS, or after Ctrl-C for PATIENCE_MS, is left: the
 * letters may then have been sent or not, and the marks say which as soon as the brokers answer.
 */
#include "worker/tools/cmd_dlq_retry.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "worker/tools/cli_group.h"

enum { BATCH = 256, BATCH_BYTES = 4 << 20, BROKER_MS = 15000, GIVE_UP_MS = 60000,
       PATIENCE_MS = 5000, CALL_MS = 500, TRIES = 3, PAUSE_MS = 200, MARKS_FROM = 0x02020000,
       OFFSETS_MS = 5000 };     /* it asks for the coordinator and connects; it is tried but once */

struct back {
    int partition;
    int64_t offset, from;
    char *topic, *code, *id;
    void *key, *value;
    size_t key_len, value_len;
    rd_kafka_headers_t *headers;
    rd_kafka_resp_err_t refused;        /* of the last try */
    bool done;                          /* said what became of it */
};

/* What aborted the last transaction: something about its letters, perhaps; what passes; or what no
 * letter of this retry gets by. */
enum cause { LETTERS, PASSES, STAYS };

struct dlq_retry {
    struct cli_kafka kafka;
    const struct config *config;
    dlq_marks *marks;                   /* what is committed */
    bool keeps_marks, anyway, dead;
    rd_kafka_consumer_group_metadata_t *group;
    rd_kafka_topic_partition_list_t *offsets;   /* of the call under way */
    rd_kafka_resp_err_t code;           /* of the last call that failed */
    enum cause cause;
    struct back batch[BATCH];
    int n;
    size_t bytes;
    struct dlq_retry_counts counts;
};

/* ---- marks ------------------------------------------------------------------------------ */

/* The group whose commits are the marks; also the transactional id. */
static void group_of_marks(const struct config *c, char out[300])
{
    snprintf(out, 300, "%s-dlq-retry", c->group_id);
}

/* Marks beyond the end of a partition are those of a topic of the same name that is no more:
 * brokers forget a group's offsets with their topic, but a retry may commit some after that.
 * Letters would be taken for sent that never were. */
static lm_status drop_old_marks(struct cli_kafka *k, const char *topic, dlq_marks *m,
                                struct lm_err *err)
{
    int64_t *end = cli_topic_ends(k, topic, dlq_marks_partitions(m), err);
    if (!end)
        return err->code;
    for (int i = 0; i < dlq_marks_partitions(m); i++)
        if (dlq_marks_end(m, i) > end[i]) {
            fprintf(stderr, "loramill dlq: %s [%d] was made anew, or cut: all that is in it counts "
                    "as open\n", topic, i);
            dlq_marks_load(m, i, 0, NULL, 0);
        }
    free(end);
    return LM_OK;
}

lm_status dlq_retry_marks(struct cli_kafka *k, const struct config *c, dlq_marks **out,
                          struct lm_err *err)
{
    int n = 0;
    char group[300];
    rd_kafka_topic_partition_list_t *l = NULL;
    const char *topic = c->topics_dead_letters;
    group_of_marks(c, group);
    *out = NULL;
    lm_status st = cli_kafka_partitions(k, topic, BROKER_MS, &n, err);
    if (!st)
        st = cli_group_commits(k, group, topic, n, &l, err);
    if (!st && !(*out = dlq_marks_new(n, (size_t)c->commit_map_max_bytes)))
        st = lm_err_set(err, LM_NOMEM, "no memory");
    for (int i = 0; !st && i < l->cnt; i++) {
        const rd_kafka_topic_partition_t *t = &l->elems[i];
        if (t->partition < n)
            dlq_marks_load(*out, t->partition, t->offset, t->metadata,
                           t->metadata ? strnlen(t->metadata, t->metadata_size) : 0);
    }
    if (l)
        rd_kafka_topic_partition_list_destroy(l);
    if (!st)
        st = drop_old_marks(k, topic, *out, err);
    if (st) {
        dlq_marks_free(*out);
        *out = NULL;
    }
    return st;
}

static void on_delivered(void *user, const rd_kafka_message_t *m)
{
    struct back *b = m->_private;
    (void)user;
    b->refused = m->err;
}

/* ---- calls of a transaction ------------------------------------------------------------- */

/* ABORT: nothing of it was sent, the producer is fit for another. DEAD: no more with this one. */
enum fate { DONE, ABORT, DEAD };

typedef rd_kafka_error_t *call_fn(struct dlq_retry *r);

static rd_kafka_error_t *init(struct dlq_retry *r)
{
    return rd_kafka_init_transactions(r->kafka.rk, CALL_MS);
}

static rd_kafka_error_t *begin(struct dlq_retry *r)
{
    return rd_kafka_begin_transaction(r->kafka.rk);
}

static rd_kafka_error_t *send_offsets(struct dlq_retry *r)
{
    return rd_kafka_send_offsets_to_transaction(r->kafka.rk, r->offsets, r->group,
                                                OFFSETS_MS);
}

static rd_kafka_error_t *commit(struct dlq_retry *r)
{
    return rd_kafka_commit_transaction(r->kafka.rk, CALL_MS);
}

static rd_kafka_error_t *abort_it(struct dlq_retry *r)
{
    return rd_kafka_abort_transaction(r->kafka.rk, CALL_MS);
}

/* Calls until there is an answer, for GIVE_UP_MS at most; Ctrl-C brings the end closer. */
static enum fate ask(struct dlq_retry *r, call_fn *call, int patience_ms, struct lm_err *err)
{
    int64_t end = lm_now_us() + GIVE_UP_MS * (int64_t)1000;
    for (;;) {
        rd_kafka_error_t *e = call(r);
        if (!e)
            return DONE;
        bool again = rd_kafka_error_is_retriable(e);
        enum fate fate = rd_kafka_error_txn_requires_abort(e) ? ABORT : DEAD;
        r->code = rd_kafka_error_code(e);
        lm_err_set(err, LM_NET, "%s%s%s%s", r->code == RD_KAFKA_RESP_ERR__FENCED ?
                   "another retry has begun: " : "", rd_kafka_error_string(e),
                   again && r->kafka.why[0] ? "; " : "", again ? r->kafka.why : "");
        rd_kafka_error_destroy(e);
        if (cli_interrupted())
            end = LM_MIN(end, lm_now_us() + patience_ms * (int64_t)1000);
        if (!again || lm_now_us() >= end)
            return fate;
        nanosleep(&(struct timespec){ .tv_nsec = 20000000 }, NULL);
    }
}

/* ---- a transaction ---------------------------------------------------------------------- */

/* A queue that is full without anything in it never takes this letter. */
static rd_kafka_resp_err_t hand_over(struct dlq_retry *r, struct back *b)
{
    rd_kafka_resp_err_t e;
    bool empty;
    b->refused = RD_KAFKA_RESP_ERR_NO_ERROR;
    do {
        empty = !rd_kafka_outq_len(r->kafka.rk);
        rd_kafka_headers_t *h = rd_kafka_headers_copy(b->headers);
        e = rd_kafka_producev(r->kafka.rk, RD_KAFKA_V_TOPIC(b->topic),
                              RD_KAFKA_V_MSGFLAGS(RD_KAFKA_MSG_F_COPY),
                              RD_KAFKA_V_KEY(b->key, b->key_len),
                              RD_KAFKA_V_VALUE(b->value, b->value_len), RD_KAFKA_V_HEADERS(h),
                              RD_KAFKA_V_OPAQUE(b), RD_KAFKA_V_END);
        if (e)
            rd_kafka_headers_destroy(h);
        rd_kafka_poll(r->kafka.rk, e == RD_KAFKA_RESP_ERR__QUEUE_FULL ? 100 : 0);
    } while (e == RD_KAFKA_RESP_ERR__QUEUE_FULL && !empty && !cli_interrupted());
    return e;
}

/* Every letter has its report; message.timeout.ms bounds that. Marks go behind them: a doomed
 * transaction needs none, and a producer that still recovers from the last one refuses them. */
static enum fate await_reports(struct dlq_retry *r, const struct back *b, int n,
                               struct lm_err *err)
{
    int64_t end = INT64_MAX;
    while (rd_kafka_flush(r->kafka.rk, CALL_MS) && lm_now_us() < end)
        if (cli_interrupted())
            end = LM_MIN(end, lm_now_us() + PATIENCE_MS * (int64_t)1000);
    for (int i = 0; i < n; i++)
        if (b[i].refused) {
            lm_err_set(err, LM_NET, "%s", rd_kafka_err2str(b[i].refused));
            return ABORT;
        }
    return DONE;
}

static enum cause cause_of(rd_kafka_resp_err_t e)
{
    switch (e) {
    case RD_KAFKA_RESP_ERR_GROUP_AUTHORIZATION_FAILED:
    case RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED:
    case RD_KAFKA_RESP_ERR_TRANSACTIONAL_ID_AUTHORIZATION_FAILED:
        return STAYS;
    case RD_KAFKA_RESP_ERR__TRANSPORT:
    case RD_KAFKA_RESP_ERR__ALL_BROKERS_DOWN:
    case RD_KAFKA_RESP_ERR__TIMED_OUT:
    case RD_KAFKA_RESP_ERR__TIMED_OUT_QUEUE:
    case RD_KAFKA_RESP_ERR__WAIT_COORD:
    case RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT:
    case RD_KAFKA_RESP_ERR_NETWORK_EXCEPTION:
    case RD_KAFKA_RESP_ERR_COORDINATOR_LOAD_IN_PROGRESS:
    case RD_KAFKA_RESP_ERR_COORDINATOR_NOT_AVAILABLE:
    case RD_KAFKA_RESP_ERR_NOT_COORDINATOR:
    case RD_KAFKA_RESP_ERR_CONCURRENT_TRANSACTIONS:
        return PASSES;
    default:
        return LETTERS;
    }
}

static enum fate send_marks(struct dlq_retry *r, const dlq_marks *marks, struct lm_err *err)
{
    char map[OFFSET_MAP_MAX + 1];
    int64_t offset;
    enum fate fate = DONE;
    r->offsets = rd_kafka_topic_partition_list_new(1);
    for (int i = 0; i < dlq_marks_partitions(marks); i++)
        if (dlq_marks_commit(marks, i, &offset, map)) {
            rd_kafka_topic_partition_t *t = rd_kafka_topic_partition_list_add(
                r->offsets, r->config->topics_dead_letters, i);
            t->offset = offset;
            t->metadata = *map ? lm_strdup(map) : NULL;         /* freed with the list */
            t->metadata_size = t->metadata ? strlen(map) : 0;
            if (*map && !t->metadata)
                fate = ABORT;
        }
    if (fate == ABORT)
        lm_err_set(err, LM_NOMEM, "no memory");
    else if (r->offsets->cnt && (fate = ask(r, send_offsets, PATIENCE_MS, err)) == ABORT)
        r->cause = cause_of(r->code);
    rd_kafka_topic_partition_list_destroy(r->offsets);
    r->offsets = NULL;
    return fate;
}

static enum fate transact(struct dlq_retry *r, struct back *b, int n, const dlq_marks *marks,
                          struct lm_err *err)
{
    enum fate fate = ask(r, begin, 0, err);
    r->cause = LETTERS;
    if (fate != DONE)
        return DEAD;
    for (int i = 0; i < n && fate == DONE; i++)
        if (!b[i].done && (b[i].refused = hand_over(r, &b[i]))) {
            lm_err_set(err, LM_NET, "%s", rd_kafka_err2str(b[i].refused));
            fate = ABORT;
        }
    if (fate == DONE)
        fate = await_reports(r, b, n, err);
    if (fate == DONE && r->keeps_marks)
        fate = send_marks(r, marks, err);
    bool committing = fate == DONE;
    if (committing)
        fate = ask(r, commit, PATIENCE_MS, err);
    if (fate == DEAD && committing)
        for (int i = 0; i < n; i++)
            r->counts.unknown += !b[i].done;
    if (fate != ABORT)
        return fate;
    struct lm_err why;
    fate = ask(r, abort_it, PATIENCE_MS, &why);
    if (fate != DONE)
        *err = why;
    return fate == DONE && !rd_kafka_flush(r->kafka.rk, PATIENCE_MS) ? ABORT : DEAD;
}

/* ---- a batch ---------------------------------------------------------------------------- */

void dlq_retry_print(int partition, int64_t offset, const char *topic, const char *code,
                     const char *id)
{
    printf("%d:%" PRId64 " -> ", partition, offset);
    cli_print_text(topic, strlen(topic));       /* a pattern may fit what is no topic's name */
    putchar('\t');
    cli_print_text(code, strlen(code));
    putchar('\t');
    cli_print_text(id, strlen(id));
    putchar('\n');
}

static void refuse(struct dlq_retry *r, struct back *b, const char *what, const char *why)
{
    fprintf(stderr, "loramill dlq: %d:%" PRId64 " %s%s: %s\n", b->partition, b->offset, what,
            b->topic, why);
    r->counts.failed++;
    b->done = true;
}

/* The marks as they are once these letters are sent; the caller frees them. */
static dlq_marks *mark_all(struct dlq_retry *r, struct back *b, int n, int *left)
{
    dlq_marks *next = dlq_marks_copy(r->marks);
    *left = 0;
    for (int i = 0; next && i < n; i++) {
        if (!b[i].done && dlq_marks_add(next, b[i].partition, b[i].from, b[i].offset + 1) &&
            !r->anyway)
            refuse(r, &b[i], "was not sent to ", "too many letters lie open before it, so that it "
                   "could not be marked as sent; send those, or this with --again");
        *left += !b[i].done;
    }
    return next;
}

static enum fate send_once(struct dlq_retry *r, struct back *b, int n, struct lm_err *err)
{
    int left;
    dlq_marks *next = mark_all(r, b, n, &left);
    if (!next) {
        lm_err_set(err, LM_NOMEM, "no memory");
        return DEAD;
    }
    enum fate fate = left ? transact(r, b, n, next, err) : DONE;
    if (fate != DONE || !left) {
        dlq_marks_free(next);
        return fate;
    }
    dlq_marks_free(r->marks);
    r->marks = next;
    dlq_marks_committed(next);
    for (int i = 0; i < n; i++)
        if (!b[i].done) {
            dlq_retry_print(b[i].partition, b[i].offset, b[i].topic, b[i].code, b[i].id);
            b[i].done = true;
            r->counts.sent++;
        }
    fflush(stdout);
    return DONE;
}

static void pause_ms(int ms)
{
    nanosleep(&(struct timespec){ .tv_nsec = ms * 1000000L }, NULL);
}

/* The same again while only the marks' coordinator is away. What it refuses to all of this retry,
 * or for GIVE_UP_MS, ends it: nothing of this was sent. */
static enum fate send_batch(struct dlq_retry *r, struct back *b, int n, struct lm_err *err)
{
    int64_t end = lm_now_us() + GIVE_UP_MS * (int64_t)1000;
    enum fate fate = send_once(r, b, n, err);
    while (fate == ABORT && r->cause == PASSES && !cli_interrupted() && lm_now_us() < end) {
        pause_ms(PAUSE_MS);
        fate = send_once(r, b, n, err);
    }
    return fate == ABORT && r->cause != LETTERS && !cli_interrupted() ? DEAD : fate;
}

static bool says_nothing(rd_kafka_resp_err_t e)
{
    return !e || e == RD_KAFKA_RESP_ERR__PURGE_QUEUE || e == RD_KAFKA_RESP_ERR__PURGE_INFLIGHT;
}

/* What is not about the letter may pass. */
static enum fate send_alone(struct dlq_retry *r, struct back *b, struct lm_err *err)
{
    enum fate fate = send_batch(r, b, 1, err);
    for (int i = 1; fate == ABORT && says_nothing(b->refused) && i < TRIES; i++) {
        pause_ms(PAUSE_MS);
        fate = send_batch(r, b, 1, err);
    }
    if (fate == ABORT)
        refuse(r, b, "was not sent to ",
               says_nothing(b->refused) ? err->msg : rd_kafka_err2str(b->refused));
    return fate;
}

static void release(struct back *b)
{
    free(b->topic);
    free(b->code);
    free(b->id);
    free(b->key);
    free(b->value);
    if (b->headers)
        rd_kafka_headers_destroy(b->headers);
}

static void clear(struct dlq_retry *r)
{
    for (int i = 0; i < r->n; i++)
        release(&r->batch[i]);
    r->n = 0;
    r->bytes = 0;
}

lm_status dlq_retry_finish(struct dlq_retry *r, struct lm_err *err)
{
    enum fate fate = r->n && !r->dead ? send_batch(r, r->batch, r->n, err) : DONE;
    bool one_by_one = fate == ABORT;
    for (int i = 0; one_by_one && i < r->n && fate != DEAD; i++)
        if (!r->batch[i].done && !cli_interrupted())
            fate = send_alone(r, &r->batch[i], err);
    if (fate == DEAD) {
        r->dead = true;         /* its letters are the client's until it is closed */
        return err->code;
    }
    clear(r);
    return LM_OK;
}

/* ---- letters ---------------------------------------------------------------------------- */

/* Headers that say why it failed; a new failure will say it anew. */
static bool says_why(const char *name)
{
    static const char *const prefixes[] = { "kafka_dlt-exception-", "__connect.errors.",
                                            "loramill-error-", "loramill-worker" };
    for (size_t i = 0; i < LM_COUNT(prefixes); i++)
        if (!strncmp(name, prefixes[i], strlen(prefixes[i])))
            return true;
    return false;
}

static rd_kafka_headers_t *own_headers(const rd_kafka_message_t *m)
{
    rd_kafka_headers_t *h, *out = rd_kafka_headers_new(8);
    const char *name;
    const void *value;
    size_t n;
    if (!rd_kafka_message_headers(m, &h))
        for (size_t i = 0; !rd_kafka_header_get_all(h, i, &name, &value, &n); i++)
            if (!says_why(name))
                rd_kafka_header_add(out, name, -1, value, (ssize_t)n);
    return out;
}

/* No bytes are NULL, or empty: that is told apart. */
static bool copy_bytes(void **to, const void *from, size_t n)
{
    *to = from ? lm_malloc(n + 1) : NULL;
    if (*to)
        memcpy(*to, from, n);
    return *to || !from;
}

lm_status dlq_retry_add(struct dlq_retry *r, const rd_kafka_message_t *m, int64_t from,
                        const char *topic, const char *code, const char *id, struct lm_err *err)
{
    struct back *b = &r->batch[r->n++];
    *b = (struct back){ .partition = m->partition, .offset = m->offset, .from = from,
                        .key_len = m->key_len, .value_len = m->len, .headers = own_headers(m),
                        .topic = lm_strdup(topic), .code = lm_strdup(code), .id = lm_strdup(id) };
    bool good = copy_bytes(&b->key, m->key, m->key_len);
    good = copy_bytes(&b->value, m->payload, m->len) && good;
    if (!good || !b->topic || !b->code || !b->id) {
        release(b);
        r->n--;
        return lm_err_set(err, LM_NOMEM, "no memory");
    }
    r->bytes += m->key_len + m->len;
    return r->n == BATCH || r->bytes >= BATCH_BYTES ? dlq_retry_finish(r, err) : LM_OK;
}

/* ---- opening and closing ---------------------------------------------------------------- */

lm_status dlq_retry_new(const struct config *c, struct cli_kafka *reader, bool anyway,
                        struct dlq_retry **out, struct lm_err *err)
{
    char group[300];
    struct dlq_retry *r = *out = lm_calloc(1, sizeof *r);
    if (!r)
        return lm_err_set(err, LM_NOMEM, "no memory");
    group_of_marks(c, group);
    r->config = c;
    r->anyway = anyway;
    r->keeps_marks = rd_kafka_version() >= MARKS_FROM;
    r->group = rd_kafka_consumer_group_metadata_new(group);
    r->kafka.delivered = on_delivered;
    r->kafka.transactional_id = group;
    lm_status st = cli_kafka_open(&r->kafka, c, RD_KAFKA_PRODUCER, err);
    r->kafka.transactional_id = NULL;
    if (!st && ask(r, init, 0, err) != DONE)
        st = cli_interrupted() ? lm_err_set(err, LM_CANCELLED, "interrupted") : err->code;
    if (!st)
        st = dlq_retry_marks(reader, c, &r->marks, err);
    if (!st && !r->keeps_marks)
        fprintf(stderr, "loramill dlq: librdkafka %s can't remember what was sent back; 2.2 can\n",
                rd_kafka_version_str());
    if (st) {
        dlq_retry_free(r);
        *out = NULL;
    }
    return st;
}

void dlq_retry_free(struct dlq_retry *r)
{
    if (!r)
        return;
    cli_kafka_close(&r->kafka);         /* before what its reports point to */
    clear(r);
    dlq_marks_free(r->marks);
    rd_kafka_consumer_group_metadata_destroy(r->group);
    free(r);
}

struct cli_kafka *dlq_retry_kafka(struct dlq_retry *r)
{
    return &r->kafka;
}

dlq_marks *dlq_retry_marked(struct dlq_retry *r)
{
    return r->marks;
}

struct dlq_retry_counts dlq_retry_counts(const struct dlq_retry *r)
{
    return r->counts;
}
