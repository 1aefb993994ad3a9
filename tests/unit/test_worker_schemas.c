/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_schemas.c - a worker's codec and a registry that is slow, silent or away: only what
 * needs its answer waits, each of those is told once, and an end waits for nobody.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdatomic.h>

#include "tests/unit/silent_server.h"
#include "tests/unit/worker_registry_server.h"
#include "worker/codec/codec.h"

enum { PATIENCE_MS = 20000 };

static int64_t ms_since(int64_t at)
{
    return (lm_now_us() - at) / 1000;
}

/* ---- who waits ----------------------------------------------------------------------------- */

struct waiter { atomic_int told; _Atomic(lm_status) trouble; };

static void answered(void *user, const struct lm_err *trouble)
{
    struct waiter *w = user;
    atomic_store(&w->trouble, trouble ? trouble->code : LM_OK);
    atomic_fetch_add(&w->told, 1);
}

static lm_status told(struct waiter *w)
{
    for (int i = 0; i < PATIENCE_MS && !atomic_load(&w->told); i++)
        usleep(1000);
    assert_int_equal(atomic_load(&w->told), 1);
    return atomic_load(&w->trouble);
}

static codec *open_codec(const char *url)
{
    codec *c = NULL;
    struct lm_err err = { 0 };
    struct codec_config cfg = { .registry.url = url, .reply_topic = "replies",
                                .auto_register = true, .answered = answered };
    if (codec_new(&cfg, &c, &err) != LM_OK)
        fail_msg("%s", err.msg);
    return c;
}

#define SCHEMA "{\"schema\": \"{\\\"type\\\":\\\"record\\\",\\\"name\\\":\\\"P\\\"," \
    "\\\"fields\\\":[" \
    "{\\\"name\\\":\\\"id\\\",\\\"type\\\":\\\"string\\\"}," \
    "{\\\"name\\\":\\\"prompt\\\",\\\"type\\\":\\\"string\\\"}]}\"}"

/* An Avro prompt of schema `id`. */
static const char *avro(int id)
{
    static char text[10];
    memcpy(text, "\0\0\0\0\0\x02" "1\x04" "hi", sizeof text);
    text[3] = (char)(id >> 8);
    text[4] = (char)id;
    return text;
}

static lm_status await(codec *c, int id, struct waiter *w)
{
    struct lm_err err = { 0 };
    return codec_await_schema(c, avro(id), 10, NULL, 0, w, &err);
}

static lm_status decode(codec *c, const char *value, size_t len)
{
    struct lm_err err = { 0 };
    struct prompt *p = NULL;
    lm_status st = codec_decode_prompt(c, value, len, NULL, 0, NULL, &p, &err);
    if (!st)
        prompt_free(p);
    return st;
}

static void answer(unsigned status, const char *body, int delay_ms)
{
    server_set(&server, status, body, strlen(body));
    pthread_mutex_lock(&server.lock);
    server.delay_ms = delay_ms;
    pthread_mutex_unlock(&server.lock);
}

/* ---- prompts ------------------------------------------------------------------------------- */

static void a_silent_registry_holds_nobody_up(void **state)
{
    (void)state;
    static const char json[] = "{\"id\": \"1\", \"prompt\": \"x\"}";
    char url[64];
    struct waiter w[3] = { 0 };
    int fd = listen_silently_at(url, sizeof url);
    codec *c = open_codec(url);
    int64_t at = lm_now_us();
    for (int i = 0; i < 3; i++)
        assert_int_equal(await(c, i < 2 ? 7 : 8, &w[i]), LM_BUSY);
    assert_int_equal(codec_await_schema(c, json, sizeof json - 1, NULL, 0, &w[0], NULL), LM_OK);
    assert_int_equal(decode(c, json, sizeof json - 1), LM_OK);
    usleep(100000);                     /* the first question is in the air */
    codec_ask_no_more(c);
    for (int i = 0; i < 3; i++)
        assert_int_equal(told(&w[i]), LM_CANCELLED);
    assert_true(ms_since(at) < 8000);   /* the registry is given up after ten seconds */
    assert_int_equal(await(c, 9, &w[0]), LM_CANCELLED);
    at = lm_now_us();
    codec_free(c);
    assert_true(ms_since(at) < 8000);   /* libcurl asks once a second whether to go on */
    for (int i = 0; i < 3; i++)
        assert_int_equal(atomic_load(&w[i].told), 1);
    close(fd);
}

static void one_question_answers_all_who_wait(void **state)
{
    (void)state;
    struct waiter w[4] = { 0 };
    codec *c = open_codec(server.url);
    answer(200, SCHEMA, 100);
    for (int i = 0; i < 4; i++)
        assert_int_equal(await(c, i < 3 ? 7 : 263, &w[i]), LM_BUSY);
    for (int i = 0; i < 4; i++)
        assert_int_equal(told(&w[i]), LM_OK);
    assert_int_equal(server_seen(&server)->requests, 2);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(await(c, i < 3 ? 7 : 263, &w[i]), LM_OK);
        assert_int_equal(decode(c, avro(i < 3 ? 7 : 263), 10), LM_OK);
    }
    assert_int_equal(server_seen(&server)->requests, 2);
    codec_free(c);
}

static void trouble_is_told_and_asked_again(void **state)
{
    (void)state;
    struct waiter w[3] = { 0 };
    codec *c = open_codec(server.url);
    answer(503, "", 0);
    assert_int_equal(await(c, 7, &w[0]), LM_BUSY);
    assert_int_equal(told(&w[0]), LM_NET);
    assert_int_equal(decode(c, avro(7), 10), LM_NET);
    answer(200, SCHEMA, 0);
    usleep(600000);
    assert_int_equal(await(c, 7, &w[1]), LM_BUSY);
    assert_int_equal(told(&w[1]), LM_OK);
    assert_int_equal(decode(c, avro(7), 10), LM_OK);

    answer(404, "{\"error_code\": 40403, \"message\": \"none\"}", 0);
    assert_int_equal(await(c, 8, &w[2]), LM_BUSY);
    assert_int_equal(told(&w[2]), LM_OK);
    assert_int_equal(await(c, 8, &w[2]), LM_OK);
    assert_int_equal(decode(c, avro(8), 10), LM_NOT_FOUND);
    codec_free(c);
}

static void strangers_are_bounded(void **state)
{
    (void)state;
    enum { MOST = 1024 };
    static struct waiter w[MOST + 1];
    char url[64];
    int fd = listen_silently_at(url, sizeof url);
    codec *c = open_codec(url);
    for (int i = 0; i < MOST; i++)
        assert_int_equal(await(c, i, &w[i]), LM_BUSY);
    assert_int_equal(await(c, MOST, &w[MOST]), LM_NET);
    codec_ask_no_more(c);
    for (int i = 0; i < MOST; i++)
        assert_int_equal(told(&w[i]), LM_CANCELLED);
    assert_int_equal(atomic_load(&w[MOST].told), 0);
    codec_free(c);
    close(fd);
}

/* Answers that nobody takes make room for others. */
static void answers_are_bounded(void **state)
{
    (void)state;
    struct waiter w;
    codec *c = open_codec(server.url);
    answer(200, SCHEMA, 0);
    for (int i = 0; i < 1100; i++) {
        memset(&w, 0, sizeof w);
        assert_int_equal(await(c, i, &w), LM_BUSY);
        assert_int_equal(told(&w), LM_OK);
    }
    assert_int_equal(await(c, 1099, &w), LM_OK);
    memset(&w, 0, sizeof w);
    assert_int_equal(await(c, 0, &w), LM_BUSY);
    assert_int_equal(told(&w), LM_OK);
    codec_free(c);
}

static void what_needs_no_registry_asks_none(void **state)
{
    (void)state;
    struct waiter w = { 0 };
    codec *c = open_codec(server.url);
    answer(200, SCHEMA, 0);
    assert_int_equal(codec_await_schema(c, "\0\0", 2, NULL, 0, &w, NULL), LM_OK);
    assert_int_equal(codec_await_schema(c, NULL, 0, NULL, 0, &w, NULL), LM_OK);
    assert_int_equal(codec_await_schema(c, "{", 1, NULL, 0, &w, NULL), LM_OK);
    codec_free(c);
    struct lm_err err = { 0 };
    assert_int_equal(codec_new(&(struct codec_config){ .answered = answered }, &c, &err), LM_OK);
    assert_int_equal(await(c, 7, &w), LM_OK);
    assert_int_equal(decode(c, avro(7), 10), LM_UNSUPPORTED);
    codec_ask_no_more(c);
    codec_free(c);
    assert_int_equal(server_seen(&server)->requests, 0);
    assert_int_equal(atomic_load(&w.told), 0);
}

/* ---- replies ------------------------------------------------------------------------------- */

static lm_status encode(codec *c)
{
    static const struct engine_result none = { 0 };
    static const struct lm_err why = { LM_POISON, "why" };
    struct prompt p = { .id = (char *)(uintptr_t)"1" };
    struct completion done = { .prompt = &p, .worker = "w", .result = &none, .error = &why };
    struct lm_err err = { 0 };
    void *out = NULL;
    size_t len;
    lm_status st = codec_encode_completion(c, &done, ENCODING_AVRO, &out, &len, &err);
    if (!st)
        free(out);
    return st;
}

static void a_reply_waits_for_a_moment_only(void **state)
{
    (void)state;
    char url[64];
    int fd = listen_silently_at(url, sizeof url);
    codec *c = open_codec(url);
    int64_t at = lm_now_us();
    for (int i = 0; i < 40; i++)
        assert_int_equal(encode(c), LM_NET);
    assert_true(ms_since(at) < 8000);   /* 250 ms, not for each: that is ten seconds */
    at = lm_now_us();
    codec_free(c);
    assert_true(ms_since(at) < 8000);
    close(fd);
}

static void a_reply_has_its_id_at_once(void **state)
{
    (void)state;
    struct waiter w = { 0 };
    codec *c = open_codec(server.url);
    answer(200, "{\"id\": 41}", 20);
    assert_int_equal(encode(c), LM_OK);
    assert_int_equal(encode(c), LM_OK);
    assert_int_equal(server_seen(&server)->requests, 1);
    assert_int_equal(await(c, 7, &w), LM_BUSY);         /* an answer without a schema */
    assert_int_equal(told(&w), LM_NET);
    codec_free(c);

    c = open_codec(server.url);
    answer(422, "{\"error_code\": 42201, \"message\": \"Invalid schema\"}", 0);
    assert_int_equal(encode(c), LM_INVALID);
    assert_int_equal(encode(c), LM_INVALID);
    assert_int_equal(server_seen(&server)->requests, 1);
    answer(200, "{\"id\": 41}", 0);
    usleep(1100000);
    codec_ask_no_more(c);               /* that is about prompts */
    assert_int_equal(encode(c), LM_OK);
    codec_free(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_silent_registry_holds_nobody_up),
        cmocka_unit_test(one_question_answers_all_who_wait),
        cmocka_unit_test(trouble_is_told_and_asked_again),
        cmocka_unit_test(strangers_are_bounded),
        cmocka_unit_test(answers_are_bounded),
        cmocka_unit_test(what_needs_no_registry_asks_none),
        cmocka_unit_test(a_reply_waits_for_a_moment_only),
        cmocka_unit_test(a_reply_has_its_id_at_once),
    };
    return cmocka_run_group_tests(tests, server_set_up, server_tear_down);
}
