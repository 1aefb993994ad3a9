/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_registry.c - the registry client against a registry on its bad days: what is final,
 * what is retried, and that neither hangs, leaks nor grows.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <jansson.h>
#include <stdatomic.h>

#include "tests/unit/silent_server.h"
#include "tests/unit/worker_registry_server.h"
#include "worker/codec/registry.h"
#include "worker/codec/schema_cache.h"

/* For a server that answers at once: only a machine that stands still is late. */
enum { PATIENCE_MS = 20000 };

static registry *open_url(const char *url, const char *auth, int total_ms)
{
    registry *r = NULL;
    struct lm_err err = { 0 };
    struct registry_config cfg = { .url = url, .auth = auth, .total_ms = total_ms };
    if (registry_new(&cfg, &r, &err) != LM_OK)
        fail_msg("%s", err.msg);
    return r;
}

static void answer(unsigned status, const char *body)
{
    server_set(&server, status, body, strlen(body));
}

/* ---- answers ------------------------------------------------------------------------------- */

static const struct { unsigned status; const char *body; lm_status code; const char *says; }
bad[] = {
    { 404, "{\"error_code\": 40403, \"message\": \"Schema 7 not found\"}", LM_NOT_FOUND,
      "does not know it: HTTP 404 Schema 7 not found, to /schemas/ids/7" },
    { 404, "{\"error_code\": 40401, \"message\": \"Subject not found\"}", LM_NOT_FOUND, "Subject" },
    { 404, "{\"error_code\": 404, \"message\": \"HTTP 404\"}", LM_NOT_FOUND, "does not know it" },
    { 404, "<html>nginx</html>", LM_NET, "does not answer like a schema registry" },
    { 404, "{\"message\": \"no Route matched\"}", LM_NET, "check registry.url" },
    { 404, "", LM_NET, "does not answer like a schema registry" },
    { 500, "{\"error_code\": 50001, \"message\": \"backend\"}", LM_NET, "HTTP 500 backend" },
    { 500, "oops", LM_NET, "answered HTTP 500" },
    { 503, "", LM_NET, "answered HTTP 503" },
    { 429, "", LM_NET, "answered HTTP 429" },
    { 408, "", LM_NET, "answered HTTP 408" },
    { 401, "{\"error_code\": 401, \"message\": \"Unauthorized\"}", LM_NET,
      "credentials (registry.auth, registry.auth_header): HTTP 401 Unauthorized" },
    { 403, "", LM_NET, "refuses the credentials" },
    { 302, "", LM_NET, "answered HTTP 302" },
    { 422, "{\"error_code\": 42201, \"message\": \"Invalid\"}", LM_INVALID, "it: HTTP 422" },
    { 200, "", LM_NET, "does not answer like a schema registry" },
    { 200, "hello", LM_NET, "does not answer like a schema registry" },
    { 200, "[]", LM_NET, "does not answer like a schema registry" },
    { 200, "{\"schema\": \"a\\u0000b\"}", LM_NET, "does not answer like a schema registry" },
    { 200, "{}", LM_NET, "no schema in it" },
    { 200, "{\"schema\": 5}", LM_NET, "no schema in it" },
    { 200, "{\"schema\": {\"type\": \"string\"}}", LM_NET, "no schema in it" },
    { 200, "{\"schema\": \"message X {}\", \"schemaType\": \"PROTOBUF\"}", LM_UNSUPPORTED,
      "schema id 7 is of type PROTOBUF, not AVRO" },
    { 200, "{\"schema\": \"{}\", \"schemaType\": \"JSON\"}", LM_UNSUPPORTED, "of type JSON" },
    { 200, "{\"schema\": \"\\\"X\\\"\", \"references\": [{\"name\": \"X\", \"subject\": \"s\", "
      "\"version\": 1}]}", LM_UNSUPPORTED,
      "refers to another schema, X; references are not served" },
    { 200, "{\"schema\": \"\\\"X\\\"\", \"references\": [5]}", LM_UNSUPPORTED, "schema, ?" },
};

static void bad_answers_have_their_errors(void **state)
{
    (void)state;
    for (size_t i = 0; i < LM_COUNT(bad); i++) {
        registry *r = open_url(server.url, NULL, PATIENCE_MS);
        char *text = NULL;
        struct lm_err err = { 0 };
        answer(bad[i].status, bad[i].body);
        lm_status st = registry_by_id(r, 7, &text, &err);
        if (st != bad[i].code || !strstr(err.msg, bad[i].says))
            fail_msg("HTTP %u %s\n  expected %s: %s\n  got %s: %s", bad[i].status, bad[i].body,
                     lm_status_wire(bad[i].code), bad[i].says, lm_status_wire(st), err.msg);
        assert_int_equal(err.code, st);
        assert_null(text);
        registry_free(r);
    }
}

static void a_header_of_ones_own_is_sent(void **state)
{
    (void)state;
    registry *r = NULL;
    char *text = NULL;
    struct lm_err err;
    const struct registry_config cfg = { .url = server.url, .total_ms = PATIENCE_MS,
                                         .auth_header = "Authorization: Bearer t0ken" };
    assert_int_equal(registry_new(&cfg, &r, &err), LM_OK);
    answer(200, "{\"schema\": \"\\\"string\\\"\"}");
    assert_int_equal(registry_by_id(r, 1, &text, &err), LM_OK);
    assert_string_equal(server_seen(&server)->authorization, "Bearer t0ken");
    assert_non_null(strstr(server_seen(&server)->accept, "application/vnd.schemaregistry.v1+json"));
    free(text);
    registry_free(r);
}

static void bad_options_are_refused_by_name(void **state)
{
    (void)state;
    static const struct { struct registry_config cfg; const char *says; } rows[] = {
        { { .auth_header = "Bearer t0ken" }, "registry.auth_header: must be one line" },
        { { .auth_header = "Authorization: a\r\nHost: b" }, "registry.auth_header: must be one" },
        { { .cert_file = "/nonexistent.pem" }, "registry.cert_file=/nonexistent.pem: No such" },
        { { .key_file = "/nonexistent.key" }, "registry.key_file=/nonexistent.key: No such" },
    };
    for (size_t i = 0; i < LM_COUNT(rows); i++) {
        registry *r = NULL;
        struct lm_err err = { 0 };
        struct registry_config cfg = rows[i].cfg;
        cfg.url = server.url;
        assert_int_equal(registry_check(&cfg, &err), LM_INVALID);
        assert_non_null(strstr(err.msg, rows[i].says));
        assert_int_equal(registry_new(&cfg, &r, &err), LM_INVALID);
        if (r || !strstr(err.msg, rows[i].says) || strstr(err.msg, "t0ken"))
            fail_msg("%s", err.msg);
    }
}

static void requests_are_what_a_registry_expects(void **state)
{
    (void)state;
    registry *r = open_url(server.url, "user:p:ss", PATIENCE_MS);
    char *text = NULL;
    struct lm_err err;
    answer(200, "{\"schema\": \"\\\"string\\\"\", \"schemaType\": \"AVRO\", \"references\": []}");
    assert_int_equal(registry_by_id(r, 123456, &text, &err), LM_OK);
    assert_string_equal(text, "\"string\"");
    free(text);
    assert_string_equal(server_seen(&server)->method, "GET");
    assert_string_equal(server_seen(&server)->path, "/schemas/ids/123456");
    assert_non_null(strstr(server_seen(&server)->accept, "application/vnd.schemaregistry.v1+json"));
    assert_string_equal(server_seen(&server)->authorization, "Basic dXNlcjpwOnNz");

    static const unsigned char guid[16] = { 0x89, 0x79, 0x1a, 0xbe, 0xef, 0, 1, 2, 3, 4, 5, 6, 7, 8,
                                            9, 0xff };
    assert_int_equal(registry_by_guid(r, guid, &text, &err), LM_OK);
    assert_string_equal(server_seen(&server)->path,
                        "/schemas/guids/89791abe-ef00-0102-0304-0506070809ff");
    free(text);

    int32_t id = 0;
    answer(200, "{\"id\": 41}");
    assert_int_equal(registry_id_of(r, "a/b value", "{\"type\": \"string\"}", true, &id, &err),
                     LM_OK);
    assert_int_equal(id, 41);
    assert_string_equal(server_seen(&server)->method, "POST");
    assert_string_equal(server_seen(&server)->path, "/subjects/a/b value/versions");
    assert_string_equal(server_seen(&server)->content_type,
                        "application/vnd.schemaregistry.v1+json");
    json_t *sent = json_loads(server_seen(&server)->upload, 0, NULL);
    assert_string_equal(json_string_value(json_object_get(sent, "schema")),
                        "{\"type\": \"string\"}");
    json_decref(sent);
    assert_int_equal(registry_id_of(r, "s", "\"string\"", false, &id, &err), LM_OK);
    assert_string_equal(server_seen(&server)->path, "/subjects/s");
    registry_free(r);
}

static void registering_fails_by_name(void **state)
{
    (void)state;
    static const struct { unsigned status; const char *body; lm_status code; const char *says; }
    rows[] = {
        { 409, "{\"error_code\": 409, \"message\": \"reader lost a field\"}", LM_MISMATCH,
          "finds the schema incompatible: HTTP 409 reader lost a field" },
        { 422, "{\"error_code\": 42201, \"message\": \"Invalid schema\"}", LM_INVALID, "Invalid" },
        { 200, "{\"id\": \"41\"}", LM_NET, "has no id in it" },
        { 200, "{\"id\": 0}", LM_NET, "has no id in it" },
        { 200, "{\"id\": 4294967296}", LM_NET, "has no id in it" },
    };
    for (size_t i = 0; i < LM_COUNT(rows); i++) {
        registry *r = open_url(server.url, NULL, PATIENCE_MS);
        int32_t id = 0;
        struct lm_err err = { 0 };
        answer(rows[i].status, rows[i].body);
        assert_int_equal(registry_id_of(r, "s", "\"int\"", true, &id, &err), rows[i].code);
        assert_non_null(strstr(err.msg, rows[i].says));
        registry_free(r);
    }
}

/* The others of those who register it at the same moment are told 409 once. */
static void registering_at_once_is_asked_again(void **state)
{
    (void)state;
    registry *r = open_url(server.url, NULL, PATIENCE_MS);
    int32_t id = 0;
    struct lm_err err = { 0 };
    answer(200, "{\"id\": 41}");
    server.conflicts = 1;
    assert_int_equal(registry_id_of(r, "s", "\"int\"", true, &id, &err), LM_OK);
    assert_int_equal(id, 41);
    assert_int_equal(server_seen(&server)->requests, 2);
    registry_free(r);
}

/* A registry without GUIDs answers like a wrong URL; a wrong URL has no schema types. */
static void a_registry_without_guids_is_told_from_a_wrong_url(void **state)
{
    (void)state;
    static const unsigned char guid[16] = { 1 };
    char *text = NULL;
    struct lm_err err = { 0 };
    answer(404, "{\"message\": \"RESTEASY003210: Could not find resource\"}");
    registry *r = open_url(server.url, NULL, PATIENCE_MS);
    assert_int_equal(registry_by_guid(r, guid, &text, &err), LM_NET);
    registry_free(r);

    pthread_mutex_lock(&server.lock);
    server.types = "[\"AVRO\"]";
    pthread_mutex_unlock(&server.lock);
    r = open_url(server.url, NULL, PATIENCE_MS);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(registry_by_guid(r, guid, &text, &err), LM_NOT_FOUND);
        assert_non_null(strstr(err.msg, "does not know schemas by GUID, so 01000000-0000-0000-0000"
                               "-000000000000 can't be looked up"));
    }
    assert_int_equal(registry_by_id(r, 7, &text, &err), LM_NET);
    pthread_mutex_lock(&server.lock);
    server.types = NULL;
    pthread_mutex_unlock(&server.lock);
    registry_free(r);
}

/* ---- limits ---------------------------------------------------------------------------------- */

static void slow_and_huge_are_bounded(void **state)
{
    (void)state;
    char url[64], *text = NULL;
    struct lm_err err = { 0 };
    int fd = listen_silently_at(url, sizeof url);
    registry *r = open_url(url, NULL, 300);
    int64_t at = lm_now_us();
    assert_int_equal(registry_by_id(r, 7, &text, &err), LM_NET);
    assert_true(lm_now_us() - at < 8000000);            /* of itself it takes ten seconds */
    assert_non_null(strstr(err.msg, "timed out"));
    registry_free(r);
    close(fd);

    r = open_url(server.url, NULL, PATIENCE_MS);
    size_t n = (1 << 20) + 1;
    char *huge = malloc(n);
    memset(huge, ' ', n);
    server_set(&server, 200, huge, n);
    assert_int_equal(registry_by_id(r, 7, &text, &err), LM_TOO_LARGE);
    assert_non_null(strstr(err.msg, "more than 1048576 bytes"));
    /* A proxy's page, of whatever size, is no answer of the registry. */
    server_set(&server, 502, huge, n);
    assert_int_equal(registry_by_id(r, 7, &text, &err), LM_NET);
    assert_non_null(strstr(err.msg, "answered HTTP 502"));
    free(huge);
    registry_free(r);
}

/* Two that are silent leave time for the third, and three take no longer than one. */
static void urls_share_the_time(void **state)
{
    (void)state;
    char a[64], b[64], urls[256];
    char *text = NULL;
    struct lm_err err = { 0 };
    int fa = listen_silently_at(a, sizeof a), fb = listen_silently_at(b, sizeof b);
    answer(200, "{\"schema\": \"\\\"string\\\"\"}");
    snprintf(urls, sizeof urls, "%s,%s,%s", a, b, server.url);
    registry *r = open_url(urls, NULL, 4500);
    assert_int_equal(registry_by_id(r, 7, &text, &err), LM_OK);
    free(text);
    registry_free(r);

    snprintf(urls, sizeof urls, "%s,%s,%s,%s", a, b, a, b);
    r = open_url(urls, NULL, 1600);
    int64_t at = lm_now_us();
    assert_int_equal(registry_by_id(r, 7, &text, &err), LM_NET);
    assert_true(lm_now_us() - at < 5000000);            /* 6.4 s, if each had it all */
    registry_free(r);
    close(fa);
    close(fb);
}

static void *give_up_soon(void *stop)
{
    usleep(200000);
    atomic_store((atomic_bool *)stop, true);
    return NULL;
}

static void a_question_is_given_up(void **state)
{
    (void)state;
    char url[64];
    char *text = NULL;
    atomic_bool stop = false;
    pthread_t t;
    registry *r = NULL;
    struct lm_err err = { 0 };
    int fd = listen_silently_at(url, sizeof url);
    struct registry_config cfg = { .url = url, .total_ms = 60000, .connect_ms = 60000,
                                   .stop = &stop };
    assert_int_equal(registry_new(&cfg, &r, &err), LM_OK);
    assert_int_equal(pthread_create(&t, NULL, give_up_soon, &stop), 0);
    int64_t at = lm_now_us();
    assert_int_equal(registry_by_id(r, 7, &text, &err), LM_NET);
    assert_true(lm_now_us() - at < 30000000);
    pthread_join(t, NULL);
    registry_free(r);
    close(fd);
}

static void nobody_there(void **state)
{
    (void)state;
    registry *r = open_url("http://user:secret@127.0.0.1:9", NULL, 1000);
    char *text = NULL;
    struct lm_err err = { 0 };
    assert_int_equal(registry_by_id(r, 7, &text, &err), LM_NET);
    assert_non_null(strstr(err.msg, "schema registry http://127.0.0.1:9"));
    assert_null(strstr(err.msg, "secret"));
    registry_free(r);
}

static void urls_are_tried_in_turn(void **state)
{
    (void)state;
    char urls[256];
    snprintf(urls, sizeof urls, "http://127.0.0.1:9 , %s/", server.url);
    registry *r = open_url(urls, NULL, PATIENCE_MS);
    char *text = NULL;
    struct lm_err err = { 0 };
    answer(200, "{\"schema\": \"\\\"string\\\"\"}");
    for (int i = 0; i < 2; i++) {
        assert_int_equal(registry_by_id(r, 7, &text, &err), LM_OK);
        free(text);
    }
    assert_string_equal(server_seen(&server)->path, "/schemas/ids/7");
    registry_free(r);
}

static void bad_urls_are_refused(void **state)
{
    (void)state;
    static const char *const urls[] = { "file:///etc/passwd", "ftp://x", "registry:8081", "",
                                        "http://a,,http://b", "http://a,gopher://b" };
    for (size_t i = 0; i < LM_COUNT(urls); i++) {
        registry *r = NULL;
        struct lm_err err = { 0 };
        assert_int_equal(registry_new(&(struct registry_config){ .url = urls[i] }, &r, &err),
                         LM_INVALID);
        assert_non_null(strstr(err.msg, "registry.url must be"));
    }
}

static void an_outage_is_not_hammered(void **state)
{
    (void)state;
    registry *r = open_url(server.url, NULL, PATIENCE_MS);
    char *text = NULL;
    struct lm_err err = { 0 };
    answer(500, "");
    int64_t at = lm_now_us();
    for (int i = 0; i < 100; i++)
        assert_int_equal(registry_by_id(r, i, &text, &err), LM_NET);
    assert_in_range(server_seen(&server)->requests, 1, 1 + (lm_now_us() - at) / 500000);
    answer(200, "{\"schema\": \"\\\"string\\\"\"}");
    usleep(600000);
    assert_int_equal(registry_by_id(r, 7, &text, &err), LM_OK);
    free(text);
    registry_free(r);
}

/* ---- cache ----------------------------------------------------------------------------------- */

static void schemas_are_asked_for_once(void **state)
{
    (void)state;
    registry *r = open_url(server.url, NULL, PATIENCE_MS);
    schema_cache *c = schema_cache_new(r);
    struct avro_plan *p = NULL, *again = NULL;
    struct lm_err err = { 0 };
    struct schema_key key = { .id = 7 };
    answer(200, "{\"schema\": \"\\\"string\\\"\"}");
    assert_int_equal(schema_cache_get(c, &key, &p, &err), LM_OK);
    assert_int_equal(schema_cache_get(c, &key, &again, &err), LM_OK);
    assert_ptr_equal(p, again);
    assert_int_equal(server_seen(&server)->requests, 1);

    /* What we refuse, and what is unknown, is remembered too. */
    answer(200, "{\"schema\": \"{\\\"type\\\": \\\"array\\\", \\\"items\\\": \\\"null\\\"}\"}");
    key.id = 8;
    for (int i = 0; i < 3; i++)
        assert_int_equal(schema_cache_get(c, &key, &p, &err), LM_UNSUPPORTED);
    assert_non_null(strstr(err.msg, "take no bytes"));
    assert_int_equal(server_seen(&server)->requests, 1);
    answer(404, "{\"error_code\": 40403, \"message\": \"none\"}");
    key.id = 9;
    for (int i = 0; i < 3; i++)
        assert_int_equal(schema_cache_get(c, &key, &p, &err), LM_NOT_FOUND);
    assert_int_equal(server_seen(&server)->requests, 1);

    /* An outage is not. */
    answer(500, "");
    key.id = 10;
    assert_int_equal(schema_cache_get(c, &key, &p, &err), LM_NET);
    usleep(600000);
    answer(200, "{\"schema\": \"\\\"int\\\"\"}");
    assert_int_equal(schema_cache_get(c, &key, &p, &err), LM_OK);
    schema_cache_free(c);
    registry_free(r);
}

static void strangers_do_not_push_out_friends(void **state)
{
    (void)state;
    registry *r = open_url(server.url, NULL, PATIENCE_MS);
    schema_cache *c = schema_cache_new(r);
    struct avro_plan *p = NULL;
    struct lm_err err = { 0 };
    struct schema_key key = { .id = 1 };
    answer(200, "{\"schema\": \"\\\"string\\\"\"}");
    assert_int_equal(schema_cache_get(c, &key, &p, &err), LM_OK);
    answer(404, "{\"error_code\": 40403, \"message\": \"none\"}");
    for (int i = 2; i < 1500; i++) {
        key.id = i;
        assert_int_equal(schema_cache_get(c, &key, &p, &err), LM_NOT_FOUND);
    }
    int asked = server_seen(&server)->requests;
    key.id = 1;
    assert_int_equal(schema_cache_get(c, &key, &p, &err), LM_OK);
    assert_int_equal(server_seen(&server)->requests, asked);
    schema_cache_free(c);
    registry_free(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_answers_have_their_errors),
        cmocka_unit_test(requests_are_what_a_registry_expects),
        cmocka_unit_test(a_header_of_ones_own_is_sent),
        cmocka_unit_test(bad_options_are_refused_by_name),
        cmocka_unit_test(registering_fails_by_name),
        cmocka_unit_test(registering_at_once_is_asked_again),
        cmocka_unit_test(a_registry_without_guids_is_told_from_a_wrong_url),
        cmocka_unit_test(slow_and_huge_are_bounded),
        cmocka_unit_test(urls_share_the_time),
        cmocka_unit_test(a_question_is_given_up),
        cmocka_unit_test(nobody_there),
        cmocka_unit_test(urls_are_tried_in_turn),
        cmocka_unit_test(bad_urls_are_refused),
        cmocka_unit_test(an_outage_is_not_hammered),
        cmocka_unit_test(schemas_are_asked_for_once),
        cmocka_unit_test(strangers_do_not_push_out_friends),
    };
    return cmocka_run_group_tests(tests, server_set_up, server_tear_down);
}
