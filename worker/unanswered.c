/* SPDX-License-Identifier: Apache-2.0 */
/*
 * unanswered.c - see unanswered.h.
 */
#include "worker/unanswered.h"

#include <stdint.h>

enum { PRODUCE = 0, ADD_PARTITIONS = 24, ADD_OFFSETS = 25, END_TXN = 26, TXN_OFFSETS = 28 };

static bool belongs_to_transactions(int16_t api)
{
    return api == PRODUCE || api == ADD_PARTITIONS || api == ADD_OFFSETS || api == END_TXN ||
           api == TXN_OFFSETS;
}

/* For each request when its answer is here (once or twice), or when it has failed for want of one.
 * That it was never sent is not told; then this is one alarm too many. */
static rd_kafka_resp_err_t on_answer(rd_kafka_t *rk, int fd, const char *broker, int32_t id,
                                     int16_t api, int16_t version, int32_t correlation, size_t size,
                                     int64_t rtt, rd_kafka_resp_err_t err, void *opaque)
{
    (void)rk, (void)fd, (void)broker, (void)id, (void)version, (void)correlation, (void)size;
    (void)rtt;
    struct unanswered *u = opaque;
    if (err && err != RD_KAFKA_RESP_ERR__DESTROY && belongs_to_transactions(api))
        atomic_store(&u->any, true);
    if (!err && api == END_TXN)
        atomic_fetch_add(&u->ends, 1);
    return RD_KAFKA_RESP_ERR_NO_ERROR;
}

static rd_kafka_resp_err_t on_new(rd_kafka_t *rk, const rd_kafka_conf_t *conf, void *opaque,
                                  char *why, size_t size)
{
    (void)conf, (void)why, (void)size;
    return rd_kafka_interceptor_add_on_response_received(rk, "loramill", on_answer, opaque);
}

void unanswered_watch(struct unanswered *u, rd_kafka_conf_t *conf)
{
    atomic_store(&u->any, false);
    rd_kafka_conf_interceptor_add_on_new(conf, "loramill", on_new, u);
}
