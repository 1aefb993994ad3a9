/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_headers.c - reply routes, reply headers and dead letters, byte for byte against the
 * conventions of Spring for Apache Kafka and Kafka Connect.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "worker/dead_letter.h"

static const struct header_names names = {
    "kafka_correlationId", "kafka_replyTopic", "kafka_replyPartition",
};
static struct lm_err err;

#define H(name, text) { name, text, sizeof(text) - 1 }

static void has(const struct header_list *l, const char *name, const void *value, size_t n)
{
    const struct header *h = header_find(l->items, l->n, name);
    if (!h)
        fail_msg("no header %s", name);
    assert_int_equal(h->len, n);
    assert_memory_equal(h->value, value, n);
}

static void has_text(const struct header_list *l, const char *name, const char *text)
{
    has(l, name, text, strlen(text));
}

static int count(const struct header_list *l, const char *name)
{
    int n = 0;
    for (int i = 0; i < l->n; i++)
        n += !strcmp(l->items[i].name, name);
    return n;
}

/* ---- routes ----------------------------------------------------------------------------- */

static void test_allow_list(void **state)
{
    (void)state;
    assert_false(reply_topic_allowed("", "a"));
    assert_true(reply_topic_allowed("a", "a"));
    assert_false(reply_topic_allowed("a", "ab"));
    assert_false(reply_topic_allowed("ab", "a"));
    assert_true(reply_topic_allowed(" x , app-* ,y", "app-7"));
    assert_true(reply_topic_allowed("app-*", "app-"));
    assert_false(reply_topic_allowed("app-*", "app"));
    assert_true(reply_topic_allowed("x,y", "y"));
    assert_true(reply_topic_allowed("*", "anything"));
    assert_false(reply_topic_allowed(",,", "a"));
    assert_false(reply_topic_allowed("a*b", "axb"));    /* a star counts at the end only */
}

static lm_status route(const struct header *h, int n, const char *field, struct reply_route *out)
{
    memset(&err, 0, sizeof err);
    return reply_route(h, n, &names, field, "replies", "app-*", out, &err);
}

static void test_route(void **state)
{
    (void)state;
    struct reply_route r;
    assert_int_equal(route(NULL, 0, NULL, &r), LM_OK);
    assert_string_equal(r.topic, "replies");
    assert_int_equal(r.partition, -1);
    assert_false(r.asked);
    assert_int_equal(route(NULL, 0, "app-1", &r), LM_OK);
    assert_string_equal(r.topic, "app-1");
    assert_true(r.asked);
    const struct header h[] = { H("kafka_replyTopic", "app-0"), H("kafka_replyTopic", "app-2"),
                                H("kafka_replyPartition", "\0\0\1\2") };
    assert_int_equal(route(h, 3, "app-1", &r), LM_OK);
    assert_string_equal(r.topic, "app-2");              /* the header wins, the last one */
    assert_int_equal(r.partition, 258);
}

static void test_route_refusals(void **state)
{
    (void)state;
    struct reply_route r;
    char longer[300];
    memset(longer, 'a', sizeof longer);
    const struct header evil = H("kafka_replyTopic", "prompts"), empty = H("kafka_replyTopic", "");
    const struct header nul = H("kafka_replyTopic", "app-\0x"), null = { "kafka_replyTopic", 0, 0 };
    const struct header said = H("kafka_replyTopic", "It hurts");
    const struct header big = { "kafka_replyTopic", longer, sizeof longer };
    const struct header part3 = H("kafka_replyPartition", "\0\0\1");
    const struct header negative = H("kafka_replyPartition", "\xff\xff\xff\xff");
    const struct header text = H("kafka_replyPartition", "3");
    assert_int_equal(route(&evil, 1, NULL, &r), LM_DENIED);
    assert_non_null(strstr(err.msg, "topics.replies_allowed"));
    assert_int_equal(route(&empty, 1, NULL, &r), LM_INVALID);
    assert_int_equal(route(&null, 1, NULL, &r), LM_INVALID);
    assert_int_equal(route(&nul, 1, NULL, &r), LM_INVALID);
    assert_int_equal(route(&said, 1, NULL, &r), LM_INVALID);
    assert_null(strstr(err.msg, "hurts"));              /* it may be text: the log has this */
    assert_non_null(strstr(err.msg, "its 8 bytes can't be a topic's name: byte 2 is"));
    assert_int_equal(route(NULL, 0, "It hurts", &r), LM_INVALID);
    assert_null(strstr(err.msg, "hurts"));
    assert_int_equal(route(&big, 1, NULL, &r), LM_INVALID);
    assert_non_null(strstr(err.msg, "300"));
    assert_int_equal(route(&part3, 1, NULL, &r), LM_INVALID);
    assert_int_equal(route(&text, 1, NULL, &r), LM_INVALID);
    assert_int_equal(route(&negative, 1, NULL, &r), LM_INVALID);
    assert_int_equal(route(NULL, 0, "", &r), LM_INVALID);
    assert_int_equal(route(NULL, 0, "other", &r), LM_DENIED);
}

/* Whatever is allowed: no broker lets anybody write there, and a transaction would wait for it. */
static void test_route_to_kafkas_own_topics(void **state)
{
    (void)state;
    struct reply_route r;
    static const char *const own[] = { "__consumer_offsets", "__transaction_state",
                                       "__share_group_state" };
    for (size_t i = 0; i < LM_COUNT(own); i++) {
        const struct header h = { "kafka_replyTopic", own[i], strlen(own[i]) };
        assert_int_equal(reply_route(&h, 1, &names, NULL, "replies", "*", &r, &err), LM_DENIED);
        assert_int_equal(reply_route(NULL, 0, &names, own[i], "replies", "*", &r, &err), LM_DENIED);
        assert_non_null(strstr(err.msg, own[i]));
    }
    assert_int_equal(reply_route(NULL, 0, &names, "__mine", "replies", "*", &r, &err), LM_OK);
}

/* ---- reply headers ----------------------------------------------------------------------- */

static void test_reply_echoes_bytes(void **state)
{
    (void)state;
    const struct prompt p = { .id = "r-1", .correlation_id = "field" };
    const struct header h[] = { H("kafka_correlationId", "\0\1\xff\0"), H("correlation-id", "c"),
                                H("traceparent", "00-a-b-01"), H("tracestate", "k=v"),
                                H("secret", "stays") };
    struct header_list out = { 0 };
    reply_headers(&out, h, LM_COUNT(h), &names, &p, ENCODING_AVRO);
    has(&out, "kafka_correlationId", "\0\1\xff\0", 4);
    has_text(&out, "correlation-id", "c");
    has_text(&out, "traceparent", "00-a-b-01");
    has_text(&out, "tracestate", "k=v");
    has_text(&out, "content-type", "application/avro");
    has_text(&out, "loramill-request-id", "r-1");
    assert_int_equal(out.n, 6);
    header_list_release(&out);
}

static void test_reply_uses_the_field(void **state)
{
    (void)state;
    const struct prompt p = { .id = "r-2", .correlation_id = "field" };
    struct header_list out = { 0 };
    reply_headers(&out, NULL, 0, &names, &p, ENCODING_JSON);
    has_text(&out, "kafka_correlationId", "field");
    has_text(&out, "correlation-id", "field");
    has_text(&out, "content-type", "application/json");
    header_list_release(&out);
}

/* ---- dead letters ------------------------------------------------------------------------ */

static const struct dead_letter_from from = { "w1", "g1", "VALUE_CONVERTER" };
static const struct lm_err why = { LM_NOT_FOUND, "no such adapter" };

static void test_dead_letter(void **state)
{
    (void)state;
    struct header h[] = { H("x", "1"), { "null", NULL, 0 }, H("x", "2"), H("empty", "") };
    const struct record r = { .headers = h, .n_headers = LM_COUNT(h), .offset = 0x0102030405,
                              .timestamp_ms = 0x0a0b };
    struct header_list out = { 0 };
    assert_int_equal(dead_letter_headers(&out, &r, "prompts", 258, &why, &from), LM_OK);
    for (size_t i = 0; i < LM_COUNT(h); i++) {
        assert_string_equal(out.items[i].name, h[i].name);
        assert_int_equal(out.items[i].len, h[i].len);
        assert_int_equal(!out.items[i].value, !h[i].value);
    }
    assert_memory_equal(out.items[2].value, "2", 1);
    has_text(&out, "kafka_dlt-original-topic", "prompts");
    has(&out, "kafka_dlt-original-partition", "\0\0\1\2", 4);
    has(&out, "kafka_dlt-original-offset", "\0\0\0\1\2\3\4\5", 8);
    has(&out, "kafka_dlt-original-timestamp", "\0\0\0\0\0\0\x0a\x0b", 8);
    has_text(&out, "kafka_dlt-original-timestamp-type", "CreateTime");
    has_text(&out, "kafka_dlt-original-consumer-group", "g1");
    has_text(&out, "kafka_dlt-exception-fqcn", "loramill.not_found");
    has_text(&out, "kafka_dlt-exception-cause-fqcn", "loramill.not_found");
    has_text(&out, "kafka_dlt-exception-message", "no such adapter");
    has_text(&out, "__connect.errors.topic", "prompts");
    has_text(&out, "__connect.errors.partition", "258");
    has_text(&out, "__connect.errors.offset", "4328719365");
    has_text(&out, "__connect.errors.stage", "VALUE_CONVERTER");
    has_text(&out, "__connect.errors.exception.message", "no such adapter");
    has_text(&out, "loramill-error-code", "not_found");
    has_text(&out, "loramill-error-message", "no such adapter");
    has_text(&out, "loramill-attempt", "1");
    has_text(&out, "loramill-worker", "w1");
    header_list_release(&out);
}

static void test_dead_letter_again(void **state)
{
    (void)state;
    struct header h[] = {
        H("kafka_dlt-original-topic", "first"), H("kafka_dlt-original-offset", "\0\0\0\0\0\0\0\7"),
        H("__connect.errors.topic", "first"), H("loramill-attempt", "9"),
        H("loramill-error-code", "busy"),
    };
    const struct record r = { .headers = h, .n_headers = LM_COUNT(h), .offset = 99,
                              .timestamp_ms = -1 };
    struct header_list out = { 0 };
    assert_int_equal(dead_letter_headers(&out, &r, "second", 0, &why, &from), LM_OK);
    assert_int_equal(count(&out, "kafka_dlt-original-topic"), 1);
    has_text(&out, "kafka_dlt-original-topic", "first");
    has(&out, "kafka_dlt-original-offset", "\0\0\0\0\0\0\0\7", 8);
    has_text(&out, "__connect.errors.topic", "first");
    has_text(&out, "loramill-attempt", "10");
    has_text(&out, "loramill-error-code", "not_found");
    has_text(&out, "kafka_dlt-original-timestamp-type", "NoTimestampType");
    header_list_release(&out);
}

static void test_attempt_survives_nonsense(void **state)
{
    (void)state;
    static const char *const values[] = { "-1", "x", "", "99999999999999999999" };
    for (size_t i = 0; i < LM_COUNT(values); i++) {
        struct header h = { "loramill-attempt", values[i], strlen(values[i]) };
        const struct record r = { .headers = &h, .n_headers = 1 };
        struct header_list out = { 0 };
        assert_int_equal(dead_letter_headers(&out, &r, "t", 0, &why, &from), LM_OK);
        has_text(&out, "loramill-attempt", "1");
        header_list_release(&out);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_allow_list),
        cmocka_unit_test(test_route_to_kafkas_own_topics),
        cmocka_unit_test(test_route),
        cmocka_unit_test(test_route_refusals),
        cmocka_unit_test(test_reply_echoes_bytes),
        cmocka_unit_test(test_reply_uses_the_field),
        cmocka_unit_test(test_dead_letter),
        cmocka_unit_test(test_dead_letter_again),
        cmocka_unit_test(test_attempt_survives_nonsense),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
