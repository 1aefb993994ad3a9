/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_group_protocol.c - a coordinator with and without KIP-848, on librdkafka's mock
 * cluster. There ConsumerGroupHeartbeat can be taken away: brokers before Kafka 4.0 don't have it.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <librdkafka/rdkafka.h>
#include <librdkafka/rdkafka_mock.h>

#include "worker/group_protocol.h"

enum { CONSUMER_GROUP_HEARTBEAT = 68, PATIENCE_US = 120 * 1000000 };

#ifdef __SANITIZE_ADDRESS__
/*
 * LeakSanitizer asks for this. librdkafka, up to 2.15.1 at least, drops a heartbeat that the
 * coordinator does not know and keeps the heartbeat's reference on the group's queue
 * (rd_kafka_ConsumerGroupHeartbeatRequest returns without rd_kafka_replyq_destroy): two bare queues
 * outlive rd_kafka_destroy, whatever the caller does. That is how a consumer without KIP-848 ends,
 * and what is tested here. No queue is of our making in this program, so no missing
 * rd_kafka_queue_destroy hides behind it, and no other allocation is let off.
 */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void)
{
    return "leak:^rd_kafka_q_new0$";
}
#endif

struct rig {
    rd_kafka_t *broker, *consumer;
    rd_kafka_mock_cluster_t *cluster;
    struct group_protocol protocol;
};

static void set(rd_kafka_conf_t *conf, const char *key, const char *value)
{
    char why[256];
    assert_int_equal(rd_kafka_conf_set(conf, key, value, why, sizeof why), RD_KAFKA_CONF_OK);
}

static void quiet(const rd_kafka_t *rk, int level, const char *facility, const char *text)
{
    (void)rk, (void)level, (void)facility, (void)text;
}

static void subscribe(rd_kafka_t *rk)
{
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(1);
    rd_kafka_topic_partition_list_add(l, "t", RD_KAFKA_PARTITION_UA);
    assert_int_equal(rd_kafka_subscribe(rk, l), 0);
    rd_kafka_topic_partition_list_destroy(l);
}

static void start(struct rig *r, bool old)
{
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    *r = (struct rig){ 0 };
    rd_kafka_conf_set_log_cb(conf, quiet);
    r->broker = rd_kafka_new(RD_KAFKA_PRODUCER, conf, NULL, 0);
    r->cluster = rd_kafka_mock_cluster_new(r->broker, 1);
    rd_kafka_mock_topic_create(r->cluster, "t", 1, 1);
    if (old)
        rd_kafka_mock_set_apiversion(r->cluster, CONSUMER_GROUP_HEARTBEAT, -1, -1);
    conf = rd_kafka_conf_new();
    rd_kafka_conf_set_log_cb(conf, quiet);
    set(conf, "bootstrap.servers", rd_kafka_mock_cluster_bootstraps(r->cluster));
    set(conf, "group.id", "g");
    set(conf, "group.protocol", "consumer");
    group_protocol_watch(conf, &r->protocol);
    r->consumer = rd_kafka_new(RD_KAFKA_CONSUMER, conf, NULL, 0);
    rd_kafka_poll_set_consumer(r->consumer);
    subscribe(r->consumer);
}

static void stop(struct rig *r)
{
    rd_kafka_destroy(r->consumer);
    rd_kafka_mock_cluster_destroy(r->cluster);
    rd_kafka_destroy(r->broker);
}

static bool serve(struct rig *r)
{
    rd_kafka_message_t *m = rd_kafka_consumer_poll(r->consumer, 20);
    if (m)
        rd_kafka_message_destroy(m);
    return group_protocol_missing(&r->protocol, lm_now_us());
}

static void test_old_coordinator(void **state)
{
    (void)state;
    struct rig r;
    start(&r, true);
    int64_t begin = lm_now_us();
    bool missing = false;
    while (!missing && lm_now_us() - begin < PATIENCE_US)
        missing = serve(&r);
    assert_true(missing);
    assert_true(lm_now_us() - begin >= 10 * 1000000);
    stop(&r);
}

static void test_new_coordinator(void **state)
{
    (void)state;
    struct rig r;
    start(&r, false);
    int64_t begin = lm_now_us();
    while (!atomic_load(&r.protocol.spoken) && lm_now_us() - begin < PATIENCE_US)
        assert_false(serve(&r));
    assert_true(atomic_load(&r.protocol.answered));
    assert_true(atomic_load(&r.protocol.spoken));
    stop(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_old_coordinator), cmocka_unit_test(test_new_coordinator),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
