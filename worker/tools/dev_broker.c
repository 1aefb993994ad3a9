/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dev_broker.c - librdkafka's mock cluster as a broker for development; see dev_broker.h.
 *
 * The cluster lives in a client handle of its own, which has no other use. A group's first
 * rebalance waits for late members for a moment, as real brokers do, but for 0.3 s, not 3: a
 * person is watching.
 */
#include "worker/tools/dev_broker.h"

#include <librdkafka/rdkafka.h>
#include <librdkafka/rdkafka_mock.h>
#include <stdlib.h>

#define REBALANCE_DELAY_MS 300

struct dev_broker {
    rd_kafka_t *rk;
    rd_kafka_mock_cluster_t *cluster;
};

static void on_log(const rd_kafka_t *rk, int level, const char *fac, const char *buf)
{
    (void)rk;
    (void)level;
    lm_log(LM_DEBUG, "broker", "%s: %s", fac, buf);
}

lm_status dev_broker_new(int brokers, dev_broker **out, struct lm_err *err)
{
    char why[256];
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    dev_broker *b = lm_calloc(1, sizeof *b);
    *out = NULL;
    rd_kafka_conf_set(conf, "client.id", "loramill-dev-broker", NULL, 0);
    rd_kafka_conf_set_log_cb(conf, on_log);
    if (b && !(b->rk = rd_kafka_new(RD_KAFKA_PRODUCER, conf, why, sizeof why))) {
        free(b);
        rd_kafka_conf_destroy(conf);
        return lm_err_set(err, LM_INTERNAL, "embedded broker: %s", why);
    }
    if (!b) {
        rd_kafka_conf_destroy(conf);
        return lm_err_set(err, LM_NOMEM, "embedded broker: no memory");
    }
    b->cluster = rd_kafka_mock_cluster_new(b->rk, brokers);
    if (!b->cluster) {
        dev_broker_free(b);
        return lm_err_set(err, LM_NET, "embedded broker: can't listen on 127.0.0.1");
    }
#if RD_KAFKA_VERSION >= 0x020b0000       /* older ones have no such delay to shorten */
    rd_kafka_mock_group_initial_rebalance_delay_ms(b->cluster, REBALANCE_DELAY_MS);
#endif
    *out = b;
    return LM_OK;
}

void dev_broker_free(dev_broker *b)
{
    if (!b)
        return;
    if (b->cluster)
        rd_kafka_mock_cluster_destroy(b->cluster);
    rd_kafka_destroy(b->rk);
    free(b);
}

const char *dev_broker_address(const dev_broker *b)
{
    return rd_kafka_mock_cluster_bootstraps(b->cluster);
}

lm_status dev_broker_topic(dev_broker *b, const char *name, int partitions, struct lm_err *err)
{
    rd_kafka_resp_err_t e = rd_kafka_mock_topic_create(b->cluster, name, partitions, 1);
    if (e)
        return lm_err_set(err, LM_INVALID, "embedded broker: topic '%s': %s", name,
                          rd_kafka_err2str(e));
    return LM_OK;
}
