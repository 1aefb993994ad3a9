/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_codec.c - the codec as the worker calls it: detection, wire formats, the reply in
 * both encodings, and which failures are retried.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <jansson.h>
#include <math.h>

#include "tests/unit/worker_registry_server.h"
#include "worker/codec/avro_codec.h"
#include "worker/codec/codec.h"
#include "worker/codec/json_completion.h"
#include "worker/codec/schema_text.h"

static codec *make_codec(bool auto_register)
{
    codec *c = NULL;
    struct lm_err err = { 0 };
    struct codec_config cfg = { .registry = { .url = server.url, .auth = "", .ca_file = "" },
                                .auto_register = auto_register, .reply_topic = "replies",
                                .model_name = "tiny" };
    if (codec_new(&cfg, &c, &err) != LM_OK)
        fail_msg("%s", err.msg);
    return c;
}

static void answer_schema(const char *schema)
{
    json_t *reply = json_pack("{s:s}", "schema", schema);
    char *text = json_dumps(reply, 0);
    server_set(&server, 200, text, strlen(text));
    free(text);
    json_decref(reply);
}

/* ---- detection ------------------------------------------------------------------------------ */

#define H(name, value) { name, value, sizeof(value) - 1 }

static void detection_follows_the_rule(void **state)
{
    (void)state;
    static const struct header rows[][2] = {
        { H("content-type", "application/json"), H("x", "") },
        { H("Content-Type", "Application/JSON; charset=utf-8"), H("__value_schema_id", "\1") },
        { H("content-type", "application/avro"), H("x", "") },
        { H("content-type", "application/avro ;x"), H("x", "") },
        { H("content-type", "text/plain"), H("__value_schema_id", "\1") },
        { H("content-type", "application/json"), H("content-type", "application/avro") },
        { H("content-type", "application/jsonx"), H("x", "") },
        { { "content-type", NULL, 0 }, H("__value_schema_id", "\1") },
    };
    static const enum encoding want[] = {
        ENCODING_JSON, ENCODING_JSON, ENCODING_AVRO, ENCODING_AVRO, ENCODING_AVRO, ENCODING_AVRO,
        ENCODING_JSON, ENCODING_AVRO,
    };
    for (size_t i = 0; i < LM_COUNT(rows); i++)
        assert_int_equal(codec_detect("{", 1, rows[i], 2), want[i]);
    assert_int_equal(codec_detect("\0", 1, NULL, 0), ENCODING_AVRO);
    assert_int_equal(codec_detect("\1", 1, NULL, 0), ENCODING_AVRO);
    assert_int_equal(codec_detect("\2", 1, NULL, 0), ENCODING_JSON);
    assert_int_equal(codec_detect("{", 1, NULL, 0), ENCODING_JSON);
    assert_int_equal(codec_detect("", 0, NULL, 0), ENCODING_JSON);
    assert_int_equal(codec_detect(NULL, 0, NULL, 0), ENCODING_JSON);
    /* the header wins over the first byte */
    assert_int_equal(codec_detect("\0", 1, rows[0], 1), ENCODING_JSON);
}

/* ---- wire formats --------------------------------------------------------------------------- */

#define LEAST "{\"type\":\"record\",\"name\":\"P\",\"fields\":[" \
              "{\"name\":\"id\",\"type\":\"string\"}," "{\"name\":\"prompt\",\"type\":\"string\"}]}"
#define BODY "\x02" "1\x04" "hi"
#define GUID "\x89\x79\x1a\xbe\xef\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\xff"

/* The text of a prompt may stay where it came from: until the next one comes. */
static lm_status decode(codec *c, const char *value, size_t len, const struct header *h,
                        struct prompt **p, struct lm_err *err)
{
    static char *exact;
    free(exact);
    exact = value ? malloc(len ? len : 1) : NULL;
    if (len)
        memcpy(exact, value, len);
    *p = NULL;
    return codec_decode_prompt(c, exact, len, h, h ? 1 : 0, NULL, p, err);
}

static void assert_text(const struct prompt *p, const char *want)
{
    assert_int_equal(p->prompt_len, strlen(want));
    assert_memory_equal(p->prompt, want, strlen(want));
}

static void each_wire_format_is_read(void **state)
{
    (void)state;
    static const struct { const char *value; size_t len; const char *id; size_t id_len;
                          const char *path; } rows[] = {
        { "\0\0\0\1\2" BODY, 5 + 5, NULL, 0, "/schemas/ids/258" },
        { "\1" GUID BODY, 17 + 5, NULL, 0, "/schemas/guids/89791abe-ef00-0102-0304-0506070809ff" },
        { BODY, 5, "\1" GUID, 17, "/schemas/guids/89791abe-ef00-0102-0304-0506070809ff" },
        { BODY, 5, "\0\0\0\0\7", 5, "/schemas/ids/7" },
    };
    for (size_t i = 0; i < LM_COUNT(rows); i++) {
        codec *c = make_codec(false);
        struct header h = { "__value_schema_id", rows[i].id, rows[i].id_len };
        struct prompt *p;
        struct lm_err err = { 0 };
        answer_schema(LEAST);
        if (decode(c, rows[i].value, rows[i].len, rows[i].id ? &h : NULL, &p, &err) != LM_OK)
            fail_msg("%zu: %s", i, err.msg);
        assert_string_equal(p->id, "1");
        assert_text(p, "hi");
        assert_int_equal(p->encoding, ENCODING_AVRO);
        assert_string_equal(server_seen(&server)->path, rows[i].path);
        prompt_free(p);
        codec_free(c);
    }
}

static void bad_framing_is_refused(void **state)
{
    (void)state;
    static const struct header avro = H("content-type", "application/avro");
    static const struct header short_id = H("__value_schema_id", "\1\2\3");
    static const struct header long_id = H("__value_schema_id", "\0\0\0\0\7\7");
    static const struct header text_id = H("__value_schema_id", "12");
    static const struct header no_id = H("__value_schema_id", "");
    static const struct { const char *value; size_t len; const struct header *h; const char *says; }
    rows[] = {
        { "\0", 1, NULL, "the value ends within the schema id" },
        { "\0\0\0\1", 4, NULL, "the value ends within the schema id" },
        { "\1" GUID, 16, NULL, "the value ends within the schema id" },
        { "\0\xff\xff\xff\xff", 5, NULL, "schema id 4294967295, which is none" },
        { "{}", 2, &avro, "the value starts with 0x7b instead of a schema id" },
        { BODY, 5, &short_id, "header __value_schema_id ends within the schema id" },
        { BODY, 5, &long_id, "header __value_schema_id has 6 bytes instead of 5" },
        { BODY, 5, &text_id, "header __value_schema_id starts with 0x31" },
        { BODY, 5, &no_id, "header __value_schema_id starts with 0x00 instead" },
        { NULL, 0, NULL, "no value (it is a tombstone)" },
        { "", 0, NULL, "the record's value is empty" },
        { "\0\0\0\0\7\2", 6, NULL, "id: a string of 1 bytes, but 0 are left" },
        { "\0\0\0\0\7" BODY "x", 11, NULL, "1 bytes behind its end" },
        { "\0\0\0\0\7\2\xff\4hi", 10, NULL, "id is not valid UTF-8" },
    };
    codec *c = make_codec(false);
    answer_schema(LEAST);
    for (size_t i = 0; i < LM_COUNT(rows); i++) {
        struct prompt *p;
        struct lm_err err = { 0 };
        lm_status st = decode(c, rows[i].value, rows[i].len, rows[i].h, &p, &err);
        if (st != LM_FORMAT || !strstr(err.msg, rows[i].says))
            fail_msg("%zu: %s: %s", i, lm_status_wire(st), err.msg);
        assert_null(p);
    }
    assert_int_equal(server_seen(&server)->requests, 1);
    codec_free(c);
}

static void an_outage_is_retried_an_unknown_id_is_not(void **state)
{
    (void)state;
    codec *c = make_codec(false);
    struct prompt *p;
    struct lm_err err = { 0 };
    server_set(&server, 503, "", 0);
    assert_int_equal(decode(c, "\0\0\0\0\7" BODY, 10, NULL, &p, &err), LM_NET);
    assert_int_equal(lm_status_disposition(err.code), LM_DO_RETRY);
    usleep(600000);
    static const char none[] = "{\"error_code\": 40403, \"message\": \"Schema 7 not found\"}";
    server_set(&server, 404, none, sizeof none - 1);
    assert_int_equal(decode(c, "\0\0\0\0\7" BODY, 10, NULL, &p, &err), LM_NOT_FOUND);
    assert_non_null(strstr(err.msg, "/schemas/ids/7"));
    codec_free(c);
}

static void without_a_registry_avro_is_refused(void **state)
{
    (void)state;
    codec *c = NULL;
    struct lm_err err = { 0 };
    struct prompt *p;
    assert_int_equal(codec_new(&(struct codec_config){ .registry.url = "" }, &c, &err), LM_OK);
    assert_int_equal(decode(c, "\0\0\0\0\7" BODY, 10, NULL, &p, &err), LM_UNSUPPORTED);
    assert_non_null(strstr(err.msg, "has no registry.url"));
    assert_int_equal(codec_prepare_replies(c, &err), LM_UNSUPPORTED);
    codec_free(c);
    c = NULL;
    assert_int_equal(codec_new(&(struct codec_config){ .registry.url = "ldap://x", .reply_topic =
                     "r" }, &c, &err), LM_INVALID);
    assert_int_equal(codec_new(&(struct codec_config){ .registry.url = server.url }, &c, &err),
                     LM_INVALID);
    assert_null(c);
}

static void messages_are_capped(void **state)
{
    (void)state;
    codec *c = NULL;
    struct lm_err err = { 0 };
    struct prompt *p;
    assert_int_equal(codec_new(&(struct codec_config){ .max_message_bytes = 10 }, &c, &err), LM_OK);
    assert_int_equal(decode(c, "{\"id\": \"1\"}", 11, NULL, &p, &err), LM_TOO_LARGE);
    assert_string_equal(err.msg, "the message has 11 bytes, more than 10");
    codec_free(c);
}

/* ---- replies -------------------------------------------------------------------------------- */

static char hello[] = "Gr\xc3\xbc\xc3\x9f" "e", gr[] = "Gr", ue[] = "\xc3\xbc", cut[] = "\xc3";
static struct engine_top tops[] = { { 5, -0.5f, ue }, { 6, -INFINITY, cut } };
static struct engine_token tokens[] = {
    { 1, NAN, gr, 2, 0, NULL, 0 },
    { 5, -0.5f, ue, 2, 2, tops, 2 },
    { 7, -1.25f, cut, 1, 4, NULL, 0 },
};
static struct engine_choice choices[] = {
    { .index = 0, .text = hello, .text_len = 7, .reason = ENGINE_STOP, .logprobs = tokens,
      .n_logprobs = 3 },
    { .index = 1, .text = hello + 7, .text_len = 0, .reason = ENGINE_LENGTH },
};
static struct engine_result result = {
    .choices = choices, .n_choices = 2, .prompt_tokens = 7, .cached_tokens = 4,
    .completion_tokens = 3, .queued_us = 1500, .adapter_us = 250, .first_token_us = 4000,
    .finished_us = 9000,
};

#define WANT "{\"id\": \"1\", \"adapter\": \"a\", \"adapter_digest\": \"sha256:00\", \"model\": " \
    "\"tiny\", \"choices\": [{\"index\": 0, \"text\": \"Gr\xc3\xbc\xc3\x9f" "e\", " \
    "\"finish_reason\": \"stop\", \"logprobs\": {\"tokens\": [\"Gr\", \"\xc3\xbc\", " \
    "\"bytes:\\\\xc3\"], \"token_logprobs\": [null, -0.5, -1.25], " \
    "\"top_logprobs\": [null, {\"\xc3\xbc\": -0.5, " \
    "\"bytes:\\\\xc3\": -9999.0}, {\"bytes:\\\\xc3\": -1.25}], \"text_offset\": [0, 2, 3]}}, " \
    "{\"index\": 1, \"text\": \"\", \"finish_reason\": \"length\", \"logprobs\": null}], " \
    "\"usage\": {\"prompt_tokens\": 7, \"cached_tokens\": 4, \"completion_tokens\": 3}, " \
    "\"timings\": {\"intake_ms\": 12.346, \"fetch_ms\": 10.0, \"queue_ms\": 1.5, " \
    "\"adapter_ms\": 0.25, \"prefill_ms\": 2.5, \"decode_ms\": 5.0, \"total_ms\": 21.346}, " \
    "\"worker\": \"w\", \"metadata\": {\"k\": \"v\"}}"

static struct completion make_completion(const char *json, struct prompt **p)
{
    struct lm_err err = { 0 };
    if (json_decode_prompt(json, strlen(json), p, &err) != LM_OK)
        fail_msg("%s", err.msg);
    return (struct completion){ .prompt = *p, .adapter_digest = "sha256:00", .model = "tiny",
                                .worker = "w", .result = &result, .fetch_us = 10000,
                                .received_to_submit_us = 12346 };
}

#define PROMPT \
    "{\"id\": \"1\", \"prompt\": \"x\", \"adapter\": \"a\", \"metadata\": {\"k\": \"v\"}}"

static void json_reply_has_every_field(void **state)
{
    (void)state;
    codec *c = make_codec(false);
    struct prompt *p;
    struct completion done = make_completion(PROMPT, &p);
    void *out = NULL;
    size_t len = 0;
    struct lm_err err = { 0 };
    assert_int_equal(codec_encode_completion(c, &done, ENCODING_JSON, &out, &len, &err), LM_OK);
    json_t *got = json_loadb(out, len, JSON_REJECT_DUPLICATES, NULL);
    json_t *want = json_loads(WANT, 0, NULL);
    assert_non_null(want);
    if (!json_equal(got, want))
        fail_msg("%.*s", (int)len, (char *)out);
    assert_memory_equal(out, "{\"id\":\"1\",\"adapter\":\"a\",", 24);
    json_decref(got);
    json_decref(want);
    free(out);
    prompt_free(p);
    codec_free(c);
}

static void base_model_reply_has_nulls(void **state)
{
    (void)state;
    struct prompt *p;
    struct completion done = make_completion("{\"id\": \"1\", \"prompt\": \"x\"}", &p);
    struct engine_result empty = { .prompt_tokens = 1 };
    done.adapter_digest = NULL;
    done.model = NULL;
    done.result = &empty;
    void *text = NULL;
    size_t len = 0;
    assert_int_equal(codec_encode_completion(NULL, &done, ENCODING_JSON, &text, &len, NULL), LM_OK);
    json_t *j = json_loadb(text, len, 0, NULL);
    free(text);
    assert_true(json_is_null(json_object_get(j, "adapter")));
    assert_true(json_is_null(json_object_get(j, "adapter_digest")));
    assert_string_equal(json_string_value(json_object_get(j, "model")), "");
    assert_int_equal(json_object_size(json_object_get(j, "metadata")), 0);
    assert_int_equal(json_array_size(json_object_get(j, "choices")), 0);
    json_t *timings = json_object_get(j, "timings");
    assert_true(json_real_value(json_object_get(timings, "decode_ms")) == 0);
    json_decref(j);
    prompt_free(p);
}

static void avro_reply_equals_the_json_one(void **state)
{
    (void)state;
    codec *c = make_codec(true);
    struct prompt *p;
    struct completion done = make_completion(PROMPT, &p);
    struct avro_plan *plan = NULL;
    struct lm_err err = { 0 };
    server_set(&server, 200, "{\"id\": 66051}", 13);
    for (int i = 0; i < 3; i++) {
        void *out = NULL;
        size_t len = 0;
        if (codec_encode_completion(c, &done, ENCODING_AVRO, &out, &len, &err) != LM_OK)
            fail_msg("%s", err.msg);
        assert_memory_equal(out, "\0\0\1\2\3", 5);
        assert_int_equal(avro_plan_new(schema_completion_text, strlen(schema_completion_text),
                                       &plan, &err), LM_OK);
        json_t *got = NULL, *want = json_loads(WANT, 0, NULL);
        assert_int_equal(avro_decode(plan, (char *)out + 5, len - 5, &got, &err), LM_OK);
        /* the decoder leaves null members out */
        json_object_del(json_array_get(json_object_get(want, "choices"), 1), "logprobs");
        if (!json_equal(got, want))
            fail_msg("%s", json_dumps(got, 0));
        json_decref(got);
        json_decref(want);
        avro_plan_free(plan);
        free(out);
    }
    assert_int_equal(server_seen(&server)->requests, 1);
    assert_string_equal(server_seen(&server)->path, "/subjects/replies-value/versions");
    json_t *sent = json_loads(server_seen(&server)->upload, 0, NULL);
    assert_string_equal(json_string_value(json_object_get(sent, "schema")), schema_completion_text);
    json_decref(sent);
    prompt_free(p);
    codec_free(c);
}

struct encoder { codec *c; const struct completion *done; int failed; };

static void *encode_many(void *user)
{
    struct encoder *e = user;
    for (int i = 0; i < 300; i++) {
        void *out = NULL;
        size_t len = 0;
        e->failed |= codec_encode_completion(e->c, e->done, i % 3 ? ENCODING_AVRO : ENCODING_JSON,
                                             &out, &len, NULL);
        free(out);
    }
    return NULL;
}

/* One decodes, good and bad, while the other encodes: for ThreadSanitizer. */
static void two_threads_share_a_codec(void **state)
{
    (void)state;
    codec *c = make_codec(true);
    struct prompt *p, *got;
    struct completion done = make_completion(PROMPT, &p);
    struct lm_err err = { 0 };
    server_set(&server, 200, "{\"id\": 1}", 9);
    assert_int_equal(codec_prepare_replies(c, &err), LM_OK);
    answer_schema(LEAST);
    struct encoder e = { c, &done, 0 };
    pthread_t t;
    assert_int_equal(pthread_create(&t, NULL, encode_many, &e), 0);
    for (int i = 0; i < 300; i++) {
        assert_int_equal(decode(c, "\0\0\0\0\7" BODY, 10, NULL, &got, &err), LM_OK);
        prompt_free(got);
        assert_int_equal(decode(c, "\0\0\0\0\7" BODY, 9, NULL, &got, &err), LM_FORMAT);
    }
    pthread_join(t, NULL);
    assert_int_equal(e.failed, 0);
    prompt_free(p);
    codec_free(c);
}

/* Prompts that expired are answered from another thread than the others: one question does. */
static void encoders_take_turns(void **state)
{
    (void)state;
    codec *c = make_codec(true);
    struct prompt *p;
    struct completion done = make_completion(PROMPT, &p);
    struct encoder e[2] = { { c, &done, 0 }, { c, &done, 0 } };
    pthread_t t[2];
    server_set(&server, 200, "{\"id\": 1}", 9);
    server.delay_ms = 100;
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&t[i], NULL, encode_many, &e[i]), 0);
    for (int i = 0; i < 2; i++)
        pthread_join(t[i], NULL);
    server.delay_ms = 0;
    assert_int_equal(e[0].failed | e[1].failed, 0);
    assert_int_equal(server_seen(&server)->requests, 1);
    prompt_free(p);
    codec_free(c);
}

static void reply_schema_must_be_there(void **state)
{
    (void)state;
    codec *c = make_codec(false);
    struct lm_err err = { 0 };
    static const char none[] = "{\"error_code\": 40401, \"message\": \"Subject not found.\"}";
    server_set(&server, 404, none, sizeof none - 1);
    assert_int_equal(codec_prepare_replies(c, &err), LM_NOT_FOUND);
    assert_non_null(strstr(err.msg, "subject replies-value lacks the reply schema: register "
                           "schemas/completion.avsc, or set registry.auto_register=true"));
    assert_string_equal(server_seen(&server)->path, "/subjects/replies-value");
    server_set(&server, 200, "{\"id\": 3, \"version\": 1}", 23);
    assert_int_equal(codec_prepare_replies(c, &err), LM_OK);
    assert_int_equal(codec_prepare_replies(c, &err), LM_OK);
    assert_int_equal(server_seen(&server)->requests, 1);
    codec_free(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(detection_follows_the_rule),
        cmocka_unit_test(each_wire_format_is_read),
        cmocka_unit_test(bad_framing_is_refused),
        cmocka_unit_test(an_outage_is_retried_an_unknown_id_is_not),
        cmocka_unit_test(without_a_registry_avro_is_refused),
        cmocka_unit_test(messages_are_capped),
        cmocka_unit_test(json_reply_has_every_field),
        cmocka_unit_test(base_model_reply_has_nulls),
        cmocka_unit_test(avro_reply_equals_the_json_one),
        cmocka_unit_test(two_threads_share_a_codec),
        cmocka_unit_test(encoders_take_turns),
        cmocka_unit_test(reply_schema_must_be_there),
    };
    return cmocka_run_group_tests(tests, server_set_up, server_tear_down);
}
