/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kafka_loop.c - the least that consumes and produces through librdkafka: one thread, each record's
 * value produced as it came, offsets committed once a second after the acknowledgements. What the
 * worker's throughput is measured against; it has the worker's client settings, and none of its
 * work: no decoding, no ledger, no map.
 *
 *   kafka_loop BOOTSTRAP GROUP FROM TO      until SIGTERM
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <librdkafka/rdkafka.h>

static volatile sig_atomic_t end;
static long in_flight;

static void on_signal(int sig)
{
    (void)sig;
    end = 1;
}

static void on_delivery(rd_kafka_t *rk, const rd_kafka_message_t *m, void *opaque)
{
    (void)rk;
    (void)opaque;
    if (m->err)
        fprintf(stderr, "%s\n", rd_kafka_err2str(m->err));
    in_flight--;
}

static rd_kafka_t *client(rd_kafka_type_t type, const char *const settings[][2], const char *boot,
                          const char *group)
{
    char why[256];
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    rd_kafka_conf_set(conf, "bootstrap.servers", boot, why, sizeof why);
    if (type == RD_KAFKA_CONSUMER)
        rd_kafka_conf_set(conf, "group.id", group, why, sizeof why);
    else
        rd_kafka_conf_set_dr_msg_cb(conf, on_delivery);
    for (; (*settings)[0]; settings++)
        if (rd_kafka_conf_set(conf, (*settings)[0], (*settings)[1], why, sizeof why)) {
            fprintf(stderr, "%s\n", why);
            exit(2);
        }
    rd_kafka_t *rk = rd_kafka_new(type, conf, why, sizeof why);
    if (!rk) {
        fprintf(stderr, "%s\n", why);
        exit(2);
    }
    return rk;
}

static void pass_on(rd_kafka_t *p, const char *to, const rd_kafka_message_t *m)
{
    rd_kafka_headers_t *h = rd_kafka_headers_new(2);
    rd_kafka_header_add(h, "content-type", -1, "application/json", -1);
    rd_kafka_header_add(h, "loramill-request-id", -1, m->key, (ssize_t)m->key_len);
    while (rd_kafka_producev(p, RD_KAFKA_V_TOPIC(to), RD_KAFKA_V_KEY(m->key, m->key_len),
                             RD_KAFKA_V_VALUE(m->payload, m->len),
                             RD_KAFKA_V_MSGFLAGS(RD_KAFKA_MSG_F_COPY), RD_KAFKA_V_HEADERS(h),
                             RD_KAFKA_V_END) == RD_KAFKA_RESP_ERR__QUEUE_FULL)
        rd_kafka_poll(p, 10);
    in_flight++;
}

int main(int argc, char **argv)
{
    static const char *const consumer[][2] = {
        { "auto.offset.reset", "earliest" }, { "enable.auto.commit", "false" },
        { "queued.max.messages.kbytes", "16384" }, { "queued.min.messages", "1000" },
        { "check.crcs", "true" }, { "fetch.queue.backoff.ms", "10" }, { NULL, NULL },
    };
    static const char *const producer[][2] = {
        { "enable.idempotence", "true" }, { "acks", "all" }, { "linger.ms", "5" },
        { "partitioner", "murmur2_random" }, { "compression.type", "lz4" },
        { "batch.size", "1000000" }, { NULL, NULL },
    };
    if (argc != 5)
        return 2;
    signal(SIGTERM, on_signal);
    rd_kafka_t *c = client(RD_KAFKA_CONSUMER, consumer, argv[1], argv[2]);
    rd_kafka_t *p = client(RD_KAFKA_PRODUCER, producer, argv[1], NULL);
    rd_kafka_poll_set_consumer(c);
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(1);
    rd_kafka_topic_partition_list_add(l, argv[3], RD_KAFKA_PARTITION_UA);
    rd_kafka_subscribe(c, l);
    rd_kafka_topic_partition_list_destroy(l);
    time_t committed = time(NULL);
    while (!end) {
        rd_kafka_message_t *m = rd_kafka_consumer_poll(c, 100);
        if (m && !m->err)
            pass_on(p, argv[4], m);
        if (m)
            rd_kafka_message_destroy(m);
        rd_kafka_poll(p, 0);
        if (time(NULL) > committed && !rd_kafka_flush(p, 10000)) {
            rd_kafka_commit(c, NULL, 1);
            committed = time(NULL);
        }
    }
    rd_kafka_flush(p, 10000);
    rd_kafka_consumer_close(c);
    rd_kafka_destroy(c);
    rd_kafka_destroy(p);
    return in_flight != 0;
}
