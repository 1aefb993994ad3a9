/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cli_kafka.c - Kafka handles of the command line tools; see cli.h.
 *
 * The client's own log lines go to our log at debug level: a person who runs a tool wants one
 * sentence about what is wrong, not the client's reconnect story. That sentence is kept in `why`,
 * from the client's error callback, and ends up in the message of whatever fails because of it.
 */
#include "worker/tools/cli.h"

#include <string.h>

/* Properties that these tools own; what the file says about them concerns workers. */
static const char *const owned[] = {
    "group.id", "group.instance.id", "enable.auto.commit", "enable.auto.offset.store",
    "enable.partition.eof", "auto.offset.reset", "transactional.id", "statistics.interval.ms",
};

static bool is_owned(const char *key)
{
    for (size_t i = 0; i < LM_COUNT(owned); i++)
        if (!strcmp(key, owned[i]))
            return true;
    return false;
}

static lm_status set(rd_kafka_conf_t *conf, const char *key, const char *value,
                     struct lm_err *err)
{
    char why[256];
    if (rd_kafka_conf_set(conf, key, value, why, sizeof why) != RD_KAFKA_CONF_OK)
        return lm_err_set(err, LM_INVALID, "kafka.%s: %s", key, why);
    return LM_OK;
}

static lm_status set_defaults(rd_kafka_conf_t *conf, rd_kafka_type_t type, struct lm_err *err)
{
    static const char *const common[][2] = {
        { "client.id", "loramill" }, { "client.software.name", "loramill" },
        { "client.software.version", LORAMILL_VERSION },
    };
    static const char *const producer[][2] = {
        { "enable.idempotence", "true" }, { "acks", "all" }, { "linger.ms", "5" },
        { "message.timeout.ms", "60000" }, { "partitioner", "murmur2_random" },
        /* No limit of the client's own, as for workers: topics have theirs. */
        { "message.max.bytes", "1000000000" },
    };
    static const char *const consumer[][2] = {
        { "group.id", "loramill-collect" }, { "enable.auto.commit", "false" },
        { "enable.auto.offset.store", "false" }, { "enable.partition.eof", "true" },
        { "auto.offset.reset", "earliest" },
    };
    lm_status st = LM_OK;
    for (size_t i = 0; st == LM_OK && i < LM_COUNT(common); i++)
        st = set(conf, common[i][0], common[i][1], err);
    if (type == RD_KAFKA_PRODUCER)
        for (size_t i = 0; st == LM_OK && i < LM_COUNT(producer); i++)
            st = set(conf, producer[i][0], producer[i][1], err);
    else
        for (size_t i = 0; st == LM_OK && i < LM_COUNT(consumer); i++)
            st = set(conf, consumer[i][0], consumer[i][1], err);
    return st;
}

/* Before what the file sets, which holds. */
static lm_status set_one_each(rd_kafka_conf_t *conf, struct lm_err *err)
{
    lm_status st = set(conf, "queued.min.messages", "1", err);
    return st == LM_OK ? set(conf, "fetch.message.max.bytes", "65536", err) : st;
}

static lm_status set_passthrough(rd_kafka_conf_t *conf, const struct config *c,
                                 rd_kafka_type_t type, struct lm_err *err)
{
    enum config_scope other = type == RD_KAFKA_PRODUCER ? CONFIG_CONSUMER : CONFIG_PRODUCER;
    for (int i = 0; i < c->n_kafka; i++) {
        const struct config_pair *p = &c->kafka[i];
        if (p->scope == other || is_owned(p->key))
            continue;
        lm_status st = set(conf, p->key, p->value, err);
        if (st != LM_OK)
            return st;
    }
    return LM_OK;
}

/* Over what the file sets, which is for workers. A transaction that its process leaves open holds
 * up readers for this long; a record in it, and a request, have no longer. */
static lm_status set_transactional(rd_kafka_conf_t *conf, const char *id, struct lm_err *err)
{
    static const char *const over[][2] = {
        { "transaction.timeout.ms", "15000" }, { "message.timeout.ms", "15000" },
        { "socket.timeout.ms", "10000" }, { "enable.idempotence", "true" }, { "acks", "all" },
    };
    lm_status st = set(conf, "transactional.id", id, err);
    for (size_t i = 0; st == LM_OK && i < LM_COUNT(over); i++)
        st = set(conf, over[i][0], over[i][1], err);
    return st;
}

static void on_log(const rd_kafka_t *rk, int level, const char *fac, const char *buf)
{
    (void)rk;
    lm_log(level <= 2 ? LM_WARN : LM_DEBUG, "kafka", "%s: %s", fac, buf);
}

static void on_error(rd_kafka_t *rk, int code, const char *reason, void *opaque)
{
    (void)rk;
    struct cli_kafka *k = opaque;
    if (code == RD_KAFKA_RESP_ERR__ALL_BROKERS_DOWN && k->why[0])
        return;                 /* the broker's own error said more */
    snprintf(k->why, sizeof k->why, "%s", reason);
}

static void on_delivery(rd_kafka_t *rk, const rd_kafka_message_t *m, void *opaque)
{
    (void)rk;
    struct cli_kafka *k = opaque;
    if (k->delivered)
        k->delivered(k->user, m);
}

static bool has_brokers(rd_kafka_conf_t *conf)
{
    char value[8];
    size_t size = sizeof value;
    return rd_kafka_conf_get(conf, "bootstrap.servers", NULL, &size) == RD_KAFKA_CONF_OK &&
           size > 1;
}

lm_status cli_kafka_open(struct cli_kafka *k, const struct config *c, rd_kafka_type_t type,
                         struct lm_err *err)
{
    char why[256];
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    lm_status st = set_defaults(conf, type, err);
    if (st == LM_OK && k->one_each && type == RD_KAFKA_CONSUMER)
        st = set_one_each(conf, err);
    if (st == LM_OK)
        st = set_passthrough(conf, c, type, err);
    if (st == LM_OK && k->transactional_id && type == RD_KAFKA_PRODUCER)
        st = set_transactional(conf, k->transactional_id, err);
    if (st == LM_OK && !has_brokers(conf))
        st = lm_err_set(err, LM_INVALID, "kafka.bootstrap.servers is not set: name a broker, as "
                        "kafka.bootstrap.servers=host:9092");
    if (st != LM_OK) {
        rd_kafka_conf_destroy(conf);
        return st;
    }
    rd_kafka_conf_set_opaque(conf, k);
    rd_kafka_conf_set_log_cb(conf, on_log);
    rd_kafka_conf_set_error_cb(conf, on_error);
    if (type == RD_KAFKA_PRODUCER)
        rd_kafka_conf_set_dr_msg_cb(conf, on_delivery);
    k->rk = rd_kafka_new(type, conf, why, sizeof why);
    if (!k->rk) {
        rd_kafka_conf_destroy(conf);
        return lm_err_set(err, LM_INVALID, "Kafka client: %s", why);
    }
    if (type == RD_KAFKA_CONSUMER)
        rd_kafka_poll_set_consumer(k->rk);
    return LM_OK;
}

void cli_kafka_close(struct cli_kafka *k)
{
    if (!k->rk)
        return;
    if (rd_kafka_type(k->rk) == RD_KAFKA_CONSUMER)
        rd_kafka_consumer_close(k->rk);
    rd_kafka_destroy(k->rk);
    k->rk = NULL;
}

/* ---- topics ----------------------------------------------------------------------------- */

static void serve(struct cli_kafka *k, int timeout_ms)
{
    if (rd_kafka_type(k->rk) == RD_KAFKA_PRODUCER) {
        rd_kafka_poll(k->rk, timeout_ms);
        return;
    }
    rd_kafka_message_t *m = rd_kafka_consumer_poll(k->rk, timeout_ms);
    if (m)
        rd_kafka_message_destroy(m);    /* nothing is assigned yet: only errors come */
}

/* leaders[partition], -1 for none; NULL without memory. */
static int32_t *leaders_of(const struct rd_kafka_metadata_topic *t)
{
    int32_t *leaders = lm_calloc((size_t)t->partition_cnt, sizeof *leaders);
    for (int i = 0; leaders && i < t->partition_cnt; i++)
        if (t->partitions[i].id >= 0 && t->partitions[i].id < t->partition_cnt)
            leaders[t->partitions[i].id] = t->partitions[i].leader;
    return leaders;
}

static rd_kafka_resp_err_t ask(struct cli_kafka *k, const char *topic, int timeout_ms, int *n,
                               int32_t **leaders)
{
    const struct rd_kafka_metadata *md = NULL;
    rd_kafka_topic_t *rkt = rd_kafka_topic_new(k->rk, topic, NULL);
    if (!rkt)
        return rd_kafka_last_error();
    rd_kafka_resp_err_t e = rd_kafka_metadata(k->rk, 0, rkt, &md, timeout_ms);
    if (!e) {
        e = md->topic_cnt == 1 ? md->topics[0].err : RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
        *n = e ? 0 : md->topics[0].partition_cnt;
        if (!e && *n == 0)
            e = RD_KAFKA_RESP_ERR_LEADER_NOT_AVAILABLE;
        if (!e && leaders && !(*leaders = leaders_of(&md->topics[0])))
            e = RD_KAFKA_RESP_ERR__CRIT_SYS_RESOURCE;
        rd_kafka_metadata_destroy(md);
    }
    rd_kafka_topic_destroy(rkt);
    return e;
}

/* A topic that was created a moment ago may be unknown or leaderless for a moment. */
static bool may_heal(rd_kafka_resp_err_t e)
{
    return e == RD_KAFKA_RESP_ERR_LEADER_NOT_AVAILABLE || e == RD_KAFKA_RESP_ERR__TRANSPORT ||
           e == RD_KAFKA_RESP_ERR__TIMED_OUT || e == RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT ||
           e == RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
}

lm_status cli_kafka_leaders(struct cli_kafka *k, const char *topic, int timeout_ms,
                            int *n_partitions, int32_t **leaders, struct lm_err *err)
{
    int64_t until = lm_now_us() + (int64_t)timeout_ms * 1000;
    int64_t unknown_until = lm_now_us() + LM_MIN(timeout_ms, 2000) * (int64_t)1000;
    rd_kafka_resp_err_t e;
    for (;;) {
        int64_t left_ms = (until - lm_now_us()) / 1000;
        e = ask(k, topic, (int)LM_MIN(LM_MAX(left_ms, 1), 1000), n_partitions,
                leaders);
        if (!e)
            return LM_OK;
        int64_t now = lm_now_us();
        bool unknown = e == RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
        if (!may_heal(e) || now >= (unknown ? unknown_until : until) || cli_interrupted())
            break;
        serve(k, 100);
    }
    if (cli_interrupted())
        return lm_err_set(err, LM_CANCELLED, "interrupted");
    if (e == RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART)
        return lm_err_set(err, LM_NOT_FOUND, "the broker has no topic '%s': create it, or set the "
                          "topics.* keys", topic);
    if (!may_heal(e))
        return lm_err_set(err, LM_NET, "topic '%s': %s", topic, rd_kafka_err2str(e));
    return lm_err_set(err, LM_NET, "topic '%s': no answer from the brokers: %s%s%s", topic,
                      rd_kafka_err2str(e), k->why[0] ? "; " : "", k->why);
}

lm_status cli_kafka_partitions(struct cli_kafka *k, const char *topic, int timeout_ms,
                               int *n_partitions, struct lm_err *err)
{
    return cli_kafka_leaders(k, topic, timeout_ms, n_partitions, NULL, err);
}
