/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kafka_conf.c - see kafka_conf.h. Every default below that differs from librdkafka's is there for
 * a reason given beside it; docs/configuration.md lists them.
 */
#include "worker/kafka_conf.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <syslog.h>

/* cooperative-sticky and commits during a rebalance are sound from 2.10 on, commit metadata is kept
 * from 2.2 on; KIP-848 was released for use in 2.12, what went before is another protocol than that
 * of Kafka 4.0; 2.0 is what Debian 12 has, good enough to build and try with. */
enum {
    VERSION_OLDEST = 0x02000000,
    VERSION_METADATA = 0x02020000,
    VERSION_SOUND = 0x020a0000,
    VERSION_KIP_848 = 0x020c0000,
};

enum { SAY_AGAIN_US = 10 * 1000000, OTHER_ID_DIGITS = 16 };

struct setting { const char *key, *value; };

static const struct setting both_defaults[] = {
    { "socket.keepalive.enable", "true" },              /* load balancers drop idle connections */
    { "allow.auto.create.topics", "false" },            /* a typo must not make a topic */
};

static const struct setting consumer_defaults[] = {
    { "auto.offset.reset", "earliest" },                /* a new group must not skip prompts */
    { "max.poll.interval.ms", CONFIG_MAX_POLL_INTERVAL },       /* guards our stalls only */
    { "queued.max.messages.kbytes", "16384" },          /* prefetch that is outside our budget */
    { "queued.min.messages", "1000" },
    { "check.crcs", "true" },
    { "statistics.interval.ms", "10000" },              /* client_stats.h */
    /* How soon a new partition, or a new topic of a pattern, is read. Not the producer's: it would
     * keep a connection from being idle, see connections.max.idle.ms. */
    { "topic.metadata.refresh.interval.ms", "10000" },
};

/* What is prefetched lasts a fast engine for a tenth of a second; a client whose queue was full
 * when it looked would wait for a whole one before it fetches on. Unknown to librdkafka before
 * 2.2. */
static const struct setting consumer_defaults_2_2[] = {
    { "fetch.queue.backoff.ms", "10" },
};

/* Not accepted together with group.protocol=consumer (KIP-848). */
static const struct setting classic_defaults[] = {
    { "partition.assignment.strategy", "cooperative-sticky" },
};

static const struct setting producer_defaults[] = {
    { "partitioner", "murmur2_random" },                /* keys land where Java's land */
    { "compression.type", "lz4" },
    /* What waits for longer than that behind a batch on its way to the same partition makes
     * librdkafka's thread poll without a pause. So hold.c holds records back then, and what
     * it lets go at once is to be one batch. More than the library's default might be too large for
     * a broker with its own default, 1 MiB; see batch_size.h. */
    { "linger.ms", "5" },
    { "statistics.interval.ms", "10000" },
    { "batch.size", "1000000" },
    /* No limit of the client's own: replies are measured against message.max_bytes before they get
     * here, and a dead letter must go out however large its prompt was. */
    { "message.max.bytes", "1000000000" },
};

static const struct setting at_least_once_defaults[] = {
    { "delivery.timeout.ms", "120000" },
};

static const struct setting exactly_once_defaults[] = {
    /* What a dead worker's open transaction costs its readers; bounds delivery.timeout.ms too. */
    { "transaction.timeout.ms", "10000" },
    { "topic.metadata.propagation.max.ms", "5000" },    /* a missing topic holds a transaction up */
    /* When the group's coordinator goes, rd_kafka_send_offsets_to_transaction() may sleep, whatever
     * timeout it was given, until the connection to some broker opens or closes (librdkafka issues
     * 5456 and 5511). All of this client's are idle then; let one close soon, not in 4 minutes. */
    { "connections.max.idle.ms", "10000" },
};

/* A transaction that begins before the brokers have written the end of the last one is refused by
 * its coordinator, for some milliseconds, and the request for its offsets is made again after that
 * time (the one for its partitions after 20 ms, which are fixed). It doubles with each try, up to a
 * second; in librdkafka before 2.3 it would not. Where topic.metadata.refresh.fast.interval.ms is
 * not set, this sets it too: how soon a topic without a leader is asked for again. */
static const struct setting exactly_once_defaults_2_10[] = {
    { "retry.backoff.ms", "10" },
};

static const struct setting consumer_forced[] = {
    { "enable.auto.commit", "false" },
    { "enable.auto.offset.store", "false" },
};

static const struct setting producer_forced[] = {
    { "enable.idempotence", "true" },
    { "acks", "all" },
};

static lm_status set_one(rd_kafka_conf_t *conf, const char *key, const char *value,
                         struct lm_err *err)
{
    char why[256];
    rd_kafka_conf_res_t res = rd_kafka_conf_set(conf, key, value, why, sizeof why);
    if (res == RD_KAFKA_CONF_OK)
        return LM_OK;
    if (res == RD_KAFKA_CONF_UNKNOWN)           /* a password's misspelt name is in no list */
        return lm_err_set(err, LM_INVALID, "kafka.%s: librdkafka has no such property", key);
    if (config_is_secret(key))
        return lm_err_set(err, LM_INVALID, "kafka.%s: librdkafka refuses its value", key);
    return lm_err_set(err, LM_INVALID, "kafka.%s=%s: %s", key, value, why);
}

static lm_status set_all(rd_kafka_conf_t *conf, const struct setting *s, size_t n,
                         struct lm_err *err)
{
    for (size_t i = 0; i < n; i++) {
        lm_status st = set_one(conf, s[i].key, s[i].value, err);
        if (st)
            return st;
    }
    return LM_OK;
}

static lm_status set_passthrough(rd_kafka_conf_t *conf, const struct config *c,
                                 enum config_scope scope, struct lm_err *err)
{
    for (int i = 0; i < c->n_kafka; i++) {
        const struct config_pair *p = &c->kafka[i];
        lm_status st = p->scope == CONFIG_BOTH || p->scope == scope ?
                       set_one(conf, p->key, p->value, err) : LM_OK;
        if (st)
            return st;
    }
    return LM_OK;
}

bool kafka_new_protocol(const struct config *c)
{
    const char *p = config_kafka(c, CONFIG_CONSUMER, "group.protocol");
    return p && !strcasecmp(p, "consumer");
}

static lm_status set_consumer(rd_kafka_conf_t *conf, const struct config *c, struct lm_err *err)
{
    lm_status st = set_all(conf, consumer_defaults, LM_COUNT(consumer_defaults), err);
    if (!st && rd_kafka_version() >= VERSION_METADATA)
        st = set_all(conf, consumer_defaults_2_2, LM_COUNT(consumer_defaults_2_2), err);
    if (!st && !kafka_new_protocol(c))
        st = set_all(conf, classic_defaults, LM_COUNT(classic_defaults), err);
    if (!st)
        st = set_passthrough(conf, c, CONFIG_CONSUMER, err);
    if (!st)
        st = set_all(conf, consumer_forced, LM_COUNT(consumer_forced), err);
    return st ? st : set_one(conf, "group.id", c->group_id, err);
}

static lm_status set_transactional(rd_kafka_conf_t *conf, const struct config *c,
                                   const char *client_id, struct lm_err *err)
{
    char id[512];
    snprintf(id, sizeof id, "%s-%s", c->group_id, client_id);
    return set_one(conf, "transactional.id", *c->transaction_id ? c->transaction_id : id, err);
}

lm_status kafka_conf_other_id(rd_kafka_conf_t *conf, int n, struct lm_err *err)
{
    size_t len = 0;
    if (rd_kafka_conf_get(conf, "transactional.id", NULL, &len) != RD_KAFKA_CONF_OK)
        return LM_OK;
    size_t size = len + OTHER_ID_DIGITS;
    char *id = lm_calloc(1, size);
    if (!id || rd_kafka_conf_get(conf, "transactional.id", id, &len) != RD_KAFKA_CONF_OK) {
        free(id);
        return lm_err_set(err, LM_NOMEM, "out of memory for a transactional.id");
    }
    size_t end = strlen(id);
    snprintf(id + end, size - end, "~%d", n + 1);
    lm_status st = set_one(conf, "transactional.id", id, err);
    free(id);
    return st;
}

int64_t kafka_conf_int(const rd_kafka_conf_t *conf, const char *key)
{
    char text[32];
    size_t n = sizeof text;
    return rd_kafka_conf_get(conf, key, text, &n) == RD_KAFKA_CONF_OK ? strtoll(text, NULL, 10) : 0;
}

static lm_status set_producer(rd_kafka_conf_t *conf, const struct config *c, const char *client_id,
                              struct lm_err *err)
{
    bool eos = config_exactly_once(c);
    lm_status st = set_all(conf, producer_defaults, LM_COUNT(producer_defaults), err);
    if (!st)
        st = eos ? set_all(conf, exactly_once_defaults, LM_COUNT(exactly_once_defaults), err)
                 : set_all(conf, at_least_once_defaults, LM_COUNT(at_least_once_defaults), err);
    if (!st && eos && rd_kafka_version() >= VERSION_SOUND)
        st = set_all(conf, exactly_once_defaults_2_10, LM_COUNT(exactly_once_defaults_2_10), err);
    if (!st)
        st = set_passthrough(conf, c, CONFIG_PRODUCER, err);
    if (!st)
        st = set_all(conf, producer_forced, LM_COUNT(producer_forced), err);
    return st || !eos ? st : set_transactional(conf, c, client_id, err);
}

/* ---- log -------------------------------------------------------------------------------- */

/* librdkafka's "error" is mostly a broker that went away, which heals: a warning for us. */
static enum lm_level level_of(int syslog_level)
{
    if (syslog_level <= LOG_CRIT)
        return LM_ERROR;
    if (syslog_level <= LOG_WARNING)
        return LM_WARN;
    return syslog_level <= LOG_INFO ? LM_INFO : LM_DEBUG;
}

static void on_log(const rd_kafka_t *rk, int level, const char *facility, const char *text)
{
    (void)rk;
    /* One file serves both handles; a property of the other one is no news. */
    if (!strcmp(facility, "CONFWARN") && strstr(text, "will be ignored by this"))
        return;
    lm_log(level_of(level), "kafka", "%s: %s", facility, text);
}

void kafka_log_error(struct kafka_said *said, const char *component, int err, const char *reason)
{
    int64_t now = lm_now_us();
    if (said->err == err && now - said->at_us < SAY_AGAIN_US) {
        said->more++;
        return;
    }
    const char *name = rd_kafka_err2name((rd_kafka_resp_err_t)err);
    if (said->more)
        lm_log(LM_WARN, component, "%s, %u times more",
               rd_kafka_err2name((rd_kafka_resp_err_t)said->err), said->more);
    lm_log(LM_WARN, component, "%s: %s", name, reason);
    *said = (struct kafka_said){ err, now, 0 };
}

lm_status kafka_conf_new(const struct config *c, enum config_scope scope, const char *client_id,
                         rd_kafka_conf_t **out, struct lm_err *err)
{
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    lm_status st = set_all(conf, both_defaults, LM_COUNT(both_defaults), err);
    if (!st)
        st = set_one(conf, "client.id", client_id, err);
    if (!st)
        st = scope == CONFIG_CONSUMER ? set_consumer(conf, c, err)
                                      : set_producer(conf, c, client_id, err);
    if (st) {
        rd_kafka_conf_destroy(conf);
        return st;
    }
    rd_kafka_conf_set_log_cb(conf, on_log);
    *out = conf;
    return LM_OK;
}

/* What this library can't do; before it says so in its own words. */
static lm_status check_version(const struct config *c, struct lm_err *err)
{
    int version = rd_kafka_version();
    const char *name = rd_kafka_version_str();
    if (version < VERSION_OLDEST)
        return lm_err_set(err, LM_UNSUPPORTED, "librdkafka %s is too old; 2.12 or newer is "
                          "advised", name);
    if (!kafka_has_offset_map() && config_exactly_once(c))
        return lm_err_set(err, LM_UNSUPPORTED, "delivery.mode=exactly-once needs librdkafka 2.2 or "
                          "newer, this is %s; 2.12 or newer is advised", name);
    if (version < VERSION_KIP_848 && kafka_new_protocol(c))
        return lm_err_set(err, LM_UNSUPPORTED, "kafka.group.protocol=consumer needs librdkafka "
                          "2.12 or newer, this is %s", name);
    return LM_OK;
}

/* A client that reads what is not committed also takes the group's offsets while a transaction is
 * about to replace them (librdkafka asks for stable ones by the same property): then the replies of
 * an owner that has just died, or a commit whose fate is asked for, would come twice. */
static lm_status check_isolation(const struct config *c, const rd_kafka_conf_t *conf,
                                 struct lm_err *err)
{
    char level[32] = "";
    size_t size = sizeof level;
    if (!config_exactly_once(c) ||
        rd_kafka_conf_get(conf, "isolation.level", level, &size) != RD_KAFKA_CONF_OK ||
        !strcmp(level, "read_committed"))
        return LM_OK;
    return lm_err_set(err, LM_INVALID, "delivery.mode=exactly-once needs kafka.isolation.level="
                      "read_committed, not %s: else it may take offsets that a transaction is "
                      "about to replace, and answer twice", level);
}

lm_status kafka_conf_check(const struct config *c, struct lm_err *err)
{
    static const enum config_scope scopes[] = { CONFIG_CONSUMER, CONFIG_PRODUCER };
    lm_status st = check_version(c, err);
    for (size_t i = 0; !st && i < LM_COUNT(scopes); i++) {
        rd_kafka_conf_t *conf;
        st = kafka_conf_new(c, scopes[i], "check", &conf, err);
        if (st)
            return st;
        if (scopes[i] == CONFIG_CONSUMER)
            st = check_isolation(c, conf, err);
        rd_kafka_conf_destroy(conf);
    }
    return st;
}

/* A token is asked for by callback, and some of our calls block before the first poll, or between
 * two, for as long as there is none: init_transactions() for example. */
static bool needs_token(const rd_kafka_conf_t *conf)
{
    char text[64];
    size_t n = sizeof text;
    return rd_kafka_conf_get(conf, "sasl.mechanisms", text, &n) == RD_KAFKA_CONF_OK &&
           !strcasecmp(text, "OAUTHBEARER");
}

lm_status kafka_open(rd_kafka_type_t type, rd_kafka_conf_t *conf, rd_kafka_t **out,
                     struct lm_err *err)
{
    char why[512];
    bool token = needs_token(conf);
    if (token)
        rd_kafka_conf_enable_sasl_queue(conf, 1);
    *out = rd_kafka_new(type, conf, why, sizeof why);
    rd_kafka_error_t *e = *out && token ? rd_kafka_sasl_background_callbacks_enable(*out) : NULL;
    if (e) {
        lm_log(LM_WARN, "kafka", "OAUTHBEARER: %s", rd_kafka_error_string(e));
        rd_kafka_error_destroy(e);
    }
    if (*out)
        return LM_OK;
    rd_kafka_conf_destroy(conf);
    return lm_err_set(err, LM_INVALID, "librdkafka can't start a %s: %s",
                      type == RD_KAFKA_CONSUMER ? "consumer" : "producer", why);
}

bool kafka_has_offset_map(void)
{
    return rd_kafka_version() >= VERSION_METADATA;
}

lm_status kafka_check_library(const struct config *c, struct lm_err *err)
{
    const char *name = rd_kafka_version_str();
    lm_status st = check_version(c, err);
    if (st)
        return st;
    if (!kafka_has_offset_map())
        lm_log(LM_WARN, "kafka", "librdkafka %s can't keep offset metadata: at-least-once without "
               "the offset map, so a crash repeats finished prompts too; 2.12 or newer is advised",
               name);
    else if (rd_kafka_version() < VERSION_SOUND)
        lm_log(LM_WARN, "kafka", "librdkafka %s has known faults in rebalances; 2.12 or newer is "
               "advised", name);
    else
        lm_log(LM_DEBUG, "kafka", "librdkafka %s", name);
    return LM_OK;
}
