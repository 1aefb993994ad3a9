/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dead_letter.c - names and encodings follow Spring's DeadLetterPublishingRecoverer and Kafka
 * Connect's DeadLetterQueueReporter, whose readers we want to serve; see dead_letter.h.
 */
#include "worker/dead_letter.h"

#include <stdio.h>

enum { ATTEMPT_MAX = 1000000 };

static bool has(const struct record *r, const char *name)
{
    return header_find(r->headers, r->n_headers, name);
}

/* How often this prompt has been dead-lettered, this time included. */
static int64_t attempt_number(const struct record *r)
{
    const struct header *h = header_find(r->headers, r->n_headers, "loramill-attempt");
    int64_t n = 0;
    if (h && h->value && h->len && h->len < 8)
        for (size_t i = 0; i < h->len; i++) {
            char c = ((const char *)h->value)[i];
            if (c < '0' || c > '9')
                return 1;
            n = n * 10 + (c - '0');
        }
    return LM_MIN(n, ATTEMPT_MAX) + 1;
}

static const char *timestamp_type(const struct record *r)
{
    if (r->timestamp_ms < 0)
        return "NoTimestampType";
    return r->log_append_time ? "LogAppendTime" : "CreateTime";
}

static void add_origin(struct header_list *out, const struct record *r, const char *topic,
                       int32_t partition)
{
    if (!has(r, "kafka_dlt-original-topic"))
        header_add_text(out, "kafka_dlt-original-topic", topic);
    if (!has(r, "kafka_dlt-original-partition"))
        header_add_be32(out, "kafka_dlt-original-partition", partition);
    if (!has(r, "kafka_dlt-original-offset"))
        header_add_be64(out, "kafka_dlt-original-offset", r->offset);
}

static void add_spring(struct header_list *out, const struct record *r, const char *topic,
                       int32_t partition, const char *class, const struct lm_err *why,
                       const struct dead_letter_from *from)
{
    add_origin(out, r, topic, partition);
    if (!has(r, "kafka_dlt-original-timestamp"))
        header_add_be64(out, "kafka_dlt-original-timestamp", r->timestamp_ms);
    if (!has(r, "kafka_dlt-original-timestamp-type"))
        header_add_text(out, "kafka_dlt-original-timestamp-type", timestamp_type(r));
    if (!has(r, "kafka_dlt-original-consumer-group"))
        header_add_text(out, "kafka_dlt-original-consumer-group", from->group);
    header_add_text(out, "kafka_dlt-exception-fqcn", class);
    header_add_text(out, "kafka_dlt-exception-cause-fqcn", class);
    header_add_text(out, "kafka_dlt-exception-message", why->msg);
    header_add_text(out, "kafka_dlt-exception-stacktrace", "");
}

static void add_connect(struct header_list *out, const struct record *r, const char *topic,
                        int32_t partition, const char *class, const struct lm_err *why,
                        const struct dead_letter_from *from)
{
    if (!has(r, "__connect.errors.topic"))
        header_add_text(out, "__connect.errors.topic", topic);
    if (!has(r, "__connect.errors.partition"))
        header_add_decimal(out, "__connect.errors.partition", partition);
    if (!has(r, "__connect.errors.offset"))
        header_add_decimal(out, "__connect.errors.offset", r->offset);
    header_add_text(out, "__connect.errors.connector.name", from->group);
    header_add_text(out, "__connect.errors.task.id", from->worker);
    header_add_text(out, "__connect.errors.stage", from->stage);
    header_add_text(out, "__connect.errors.class.name", "loramill.worker");
    header_add_text(out, "__connect.errors.exception.class.name", class);
    header_add_text(out, "__connect.errors.exception.message", why->msg);
    header_add_text(out, "__connect.errors.exception.stacktrace", "");
}

lm_status dead_letter_headers(struct header_list *out, const struct record *r, const char *topic,
                              int32_t partition, const struct lm_err *why,
                              const struct dead_letter_from *from)
{
    char class[64];
    snprintf(class, sizeof class, "loramill.%s", lm_status_wire(why->code));
    for (int i = 0; i < r->n_headers; i++)
        header_add(out, r->headers[i].name, r->headers[i].value, r->headers[i].len);
    add_spring(out, r, topic, partition, class, why, from);
    add_connect(out, r, topic, partition, class, why, from);
    header_add_text(out, "loramill-error-code", lm_status_wire(why->code));
    header_add_text(out, "loramill-error-message", why->msg);
    header_add_decimal(out, "loramill-attempt", attempt_number(r));
    header_add_text(out, "loramill-worker", from->worker);
    return out->failed ? LM_NOMEM : LM_OK;
}

lm_status dead_letter_trimmed(struct header_list *out, const struct record *r, const char *topic,
                              int32_t partition, const struct lm_err *why,
                              enum dead_letter_trim trim)
{
    static const struct record nothing = { .offset = LEDGER_NONE };
    char omitted[64];
    struct record kept = trim == DEAD_LETTER_BARE ? nothing : *r;
    kept.offset = r->offset;
    for (int i = 0; i < kept.n_headers; i++)
        header_add(out, kept.headers[i].name, kept.headers[i].value, kept.headers[i].len);
    add_origin(out, &kept, topic, partition);
    header_add_text(out, "loramill-error-code", lm_status_wire(why->code));
    header_add_text(out, "loramill-error-message", why->msg);
    header_add_decimal(out, "loramill-attempt", attempt_number(r));
    if (trim == DEAD_LETTER_BARE) {
        snprintf(omitted, sizeof omitted, "value of %zu bytes, %d headers", r->value_len,
                 r->n_headers);
        header_add_text(out, "loramill-omitted", omitted);
    }
    return out->failed ? LM_NOMEM : LM_OK;
}
