/* SPDX-License-Identifier: Apache-2.0 */
/* batch_size.c - see batch_size.h. */
#include "worker/batch_size.h"

#include <inttypes.h>

enum { BELIEVE_TOO_LARGE_AFTER = 5, BATCH_LEAST = 16384 };

#define GROW_FIRST_US (600 * INT64_C(1000000))
#define GROW_MOST_US (144 * GROW_FIRST_US)

bool batch_size_believe(struct batch_size *b, size_t len, int attempts, bool old)
{
    if ((int64_t)len > b->bytes)
        return true;
    if (b->bytes > BATCH_LEAST) {
        b->shrink |= !old;
        return false;
    }
    return attempts >= BELIEVE_TOO_LARGE_AFTER;
}

static void shrink(struct batch_size *b, int64_t now_us)
{
    b->shrink = false;
    if (b->grown && now_us < b->grow_at_us)
        b->grow_wait_us = LM_MIN(2 * b->grow_wait_us, GROW_MOST_US);
    else if (b->grown || !b->grow_wait_us)
        b->grow_wait_us = GROW_FIRST_US;
    b->grown = false;
    b->most = LM_MAX(b->bytes / 4, BATCH_LEAST);
    lm_log(LM_WARN, "producer", "brokers refuse batches of %" PRId64 " bytes (max.message.bytes of "
           "topic '%s'): smaller ones, for all topics, for the next %" PRId64 " minutes, see "
           "kafka.producer.batch.size", b->bytes, b->topic, b->grow_wait_us / (60 * 1000000));
}

static void grow(struct batch_size *b)
{
    b->grown = true;
    b->most = b->most < b->full / 4 ? b->most * 4 : 0;
    lm_log(LM_INFO, "producer", "batches of %" PRId64 " bytes are tried again",
           b->most ? b->most : b->full);
}

bool batch_size_change(struct batch_size *b, bool idle, int64_t now_us)
{
    if (b->shrink)
        shrink(b, now_us);
    else if (b->most && idle && now_us >= b->grow_at_us)
        grow(b);
    else
        return false;
    b->grow_at_us = now_us + b->grow_wait_us;
    return true;
}
