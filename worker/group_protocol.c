/* SPDX-License-Identifier: Apache-2.0 */
/*
 * group_protocol.c - see group_protocol.h.
 *
 * The interceptors run on librdkafka's broker threads, once a request: they compare two numbers and
 * set flags. Should a later librdkafka name its coordinator differently, nothing is found missing.
 */
#include "worker/group_protocol.h"

#include <string.h>

enum { API_VERSIONS = 18, CONSUMER_GROUP_HEARTBEAT = 68 };
enum { LOOK_US = 100000, LOOKS = 100 };

#define NAME "loramill-group-protocol"

static rd_kafka_resp_err_t on_request(rd_kafka_t *rk, int sock, const char *broker, int32_t id,
                                      int16_t key, int16_t version, int32_t corr, size_t size,
                                      void *opaque)
{
    struct group_protocol *g = opaque;
    (void)rk, (void)sock, (void)broker, (void)id, (void)version, (void)corr, (void)size;
    if (key == CONSUMER_GROUP_HEARTBEAT)
        atomic_store(&g->spoken, true);
    return RD_KAFKA_RESP_ERR_NO_ERROR;
}

static rd_kafka_resp_err_t on_response(rd_kafka_t *rk, int sock, const char *broker, int32_t id,
                                       int16_t key, int16_t version, int32_t corr, size_t size,
                                       int64_t rtt, rd_kafka_resp_err_t err, void *opaque)
{
    struct group_protocol *g = opaque;
    (void)rk, (void)sock, (void)id, (void)version, (void)corr, (void)size, (void)rtt;
    if (key == API_VERSIONS && !err && broker && strstr(broker, "GroupCoordinator"))
        atomic_store(&g->answered, true);
    return RD_KAFKA_RESP_ERR_NO_ERROR;
}

static rd_kafka_resp_err_t on_new(rd_kafka_t *rk, const rd_kafka_conf_t *conf, void *opaque,
                                  char *why, size_t size)
{
    (void)conf, (void)why, (void)size;
    rd_kafka_interceptor_add_on_request_sent(rk, NAME, on_request, opaque);
    return rd_kafka_interceptor_add_on_response_received(rk, NAME, on_response, opaque);
}

void group_protocol_watch(rd_kafka_conf_t *conf, struct group_protocol *g)
{
    rd_kafka_conf_interceptor_add_on_new(conf, NAME, on_new, g);
}

bool group_protocol_missing(struct group_protocol *g, int64_t now_us)
{
    if (atomic_load(&g->spoken) || !atomic_load(&g->answered) || now_us - g->looked_us < LOOK_US)
        return false;
    g->looked_us = now_us;
    return ++g->waited > LOOKS;
}
