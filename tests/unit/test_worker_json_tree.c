/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_json_tree.c - messages' JSON against jansson's own reader and writer, as the oracle,
 * over random trees; and what only we refuse.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <malloc.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rnd.h"
#include "worker/codec/json_tree.h"

static json_t *random_string(void)
{
    static const char *const parts[] = { "a", "\"", "\\", "/", "\n", "\x01", "\x7f", "\xc3\xbc",
                                         "\xe2\x82\xac", "\xf0\x9f\x98\x80", "ascii text", "" };
    char text[1024] = "";
    int n = rnd(12), long_at = rnd(12);    /* long: see find_long_text() in json_tree.c */
    for (int i = 0; i < n; i++) {
        strncat(text, parts[rnd(LM_COUNT(parts))], sizeof text - strlen(text) - 1);
        if (i == long_at)
            snprintf(text + strlen(text), 512, "%0*d", 1 + rnd(400), rnd(100));
    }
    json_t *s = json_stringn(text, strlen(text));
    assert_non_null(s);
    return s;
}

/* No float of more digits than it prints with: floats_have_their_own_digits has those. */
static json_t *random_real(void)
{
    switch (rnd(4)) {
    case 0: return json_real(rnd(8000) / 8.0);
    case 1: return json_real(rnd(1000000) / 1000.0);
    case 2: return json_real(-ldexp(1.1 + (rnd(1000) + 1 / 3.0) / 10000, rnd(2000) - 1000));
    default: return json_real(rnd(100));
    }
}

static json_t *random_tree(int depth)
{
    json_t *t;
    switch (rnd(depth > 0 ? 8 : 6)) {
    case 0: return json_null();
    case 1: return json_boolean(rnd(2));
    case 2: return json_integer(((json_int_t)rnd(INT32_MAX) << 32 | rnd(INT32_MAX)) *
                                (rnd(2) ? 1 : -1));
    case 3: return random_real();
    case 4: case 5: return random_string();
    case 6:
        t = json_array();
        for (int i = 0, n = rnd(6); i < n; i++)
            json_array_append_new(t, random_tree(depth - 1));
        return t;
    default:
        t = json_object();
        for (int i = 0, n = rnd(6); i < n; i++) {
            json_t *key = random_string();
            json_object_set_new(t, json_string_value(key), random_tree(depth - 1));
            json_decref(key);
        }
        return t;
    }
}

static void both_ways_agree_with_jansson(void **state)
{
    (void)state;
    for (int i = 0; i < 20000; i++) {
        json_t *root = json_pack("{s:o}", "t", random_tree(4)), *back = NULL;
        struct lm_err err = { 0 };
        size_t len = 0;
        char *text = json_print(root, &len);
        assert_non_null(text);
        assert_int_equal(strlen(text), len);
        json_t *theirs = json_loadb(text, len, JSON_REJECT_DUPLICATES, NULL);
        assert_true(json_equal(theirs, root));
        json_decref(theirs);
        free(text);
        text = json_dumps(root, rnd(2) ? JSON_ENSURE_ASCII | JSON_INDENT(1) : JSON_ESCAPE_SLASH);
        assert_int_equal(json_parse_object(text, strlen(text), &back, &err), LM_OK);
        assert_true(json_equal(back, root));
        json_decref(back);
        json_decref(root);
        free(text);
    }
}

/* The place that yyjson finds by itself. */
static void assert_place_named(const char *text, size_t len, const struct lm_err *err)
{
    yyjson_read_err e;
    size_t line, column, at;
    yyjson_doc *doc = yyjson_read_opts((char *)(uintptr_t)text, len, YYJSON_READ_BIGNUM_AS_RAW,
                                       NULL, &e);
    yyjson_doc_free(doc);
    if (doc)
        return;
    char want[256];
    yyjson_locate_pos(text, len, e.pos, &line, &column, &at);
    snprintf(want, sizeof want, "not valid JSON at line %zu column %zu: %s", line, column, e.msg);
    assert_string_equal(err->msg, want);
}

/* A text that is cut or has a wrong byte is read as jansson reads it, or refused as it refuses. Not
 * with a NUL byte: behind a number, jansson 2.14 takes it for white space. */
static void damaged_text_is_judged_as_jansson_does(void **state)
{
    (void)state;
    enum { FLAGS = JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL };
    int refused = 0;
    for (int i = 0; i < 20000; i++) {
        json_t *root = json_pack("{s:o}", "t", random_tree(3)), *ours = NULL;
        char *text = json_dumps(root, JSON_COMPACT);
        size_t len = strlen(text);
        if (rnd(2))
            len = rnd((int)len);
        else
            text[rnd((int)len)] = (char)(1 + rnd(255));
        struct lm_err err = { 0 };
        json_t *theirs = json_loadb(text, len, FLAGS, NULL);
        lm_status st = json_parse_object(text, len, &ours, &err);
        if (!json_is_object(theirs)) {
            json_decref(theirs);
            theirs = NULL;
        }
        if (!st != !!theirs || (theirs && !json_equal(ours, theirs)))
            fail_msg("%.*s: %s", (int)len, text, err.msg);
        assert_place_named(text, len, &err);
        refused += st != LM_OK;
        json_decref(ours);
        json_decref(theirs);
        json_decref(root);
        free(text);
    }
    assert_in_range(refused, 5000, 19999);
}

/* Of few keys each is compared with each, of many the sorted neighbours are. */
static void a_key_twice_is_found_among_any_number(void **state)
{
    (void)state;
    for (int n = 2; n < 2000; n = n * 3 / 2 + 1) {
        char text[32 * 2000], *at = text;
        for (int i = 0; i < n; i++)
            at += sprintf(at, "%s\"k%d\":%d", i ? "," : "{\"o\":{", i * 7919 % n, i);
        strcpy(at, "}}");
        json_t *root = NULL;
        struct lm_err err = { 0 };
        assert_int_equal(json_parse_object(text, strlen(text), &root, &err), LM_OK);
        json_decref(root);
        sprintf(at, ",\"k%d\":0}}", rnd((int)n));
        assert_int_equal(json_parse_object(text, strlen(text), &root, &err), LM_FORMAT);
        assert_non_null(strstr(err.msg, "duplicate object key"));
    }
}

static void floats_have_their_own_digits(void **state)
{
    (void)state;
    json_t *root = json_pack("{s:f, s:f, s:f, s:f}", "a", (double)-0.1f, "b", 0.1, "c", 12.345,
                             "d", -9999.0);
    size_t len = 0;
    char *text = json_print(root, &len);
    assert_string_equal(text, "{\"a\":-0.1,\"b\":0.1,\"c\":12.345,\"d\":-9999.0}");
    free(text);
    json_decref(root);
}

/* A reply may wait for its broker for long, among many. */
static void a_text_holds_no_more_memory_than_it_has(void **state)
{
    (void)state;
    static char prose[1000001];
    for (size_t n = 100; n < sizeof prose; n *= 10) {
        memset(prose, 'a', n);
        json_t *root = json_pack("{s:s}", "text", prose);
        size_t len = 0;
        char *text = json_print(root, &len);
        assert_non_null(text);
        assert_int_equal(strlen(text), len);
        assert_in_range(malloc_usable_size(text), len + 1, len + 8192);
        if (len < 2000)
            assert_in_range(malloc_usable_size(text), len + 1, len + 64);
        free(text);
        json_decref(root);
    }
}

static void is_refused(const char *text, size_t len, lm_status code, const char *says)
{
    json_t *root = NULL;
    struct lm_err err = { 0 };
    lm_status st = json_parse_object(text, len, &root, &err);
    if (st != code || !strstr(err.msg, says))
        fail_msg("%.*s\n  expected %s\n  got %s", (int)len, text, says, err.msg);
    assert_int_equal(json_parse_object(text, len, &root, NULL), code);
}

static void limits(void **state)
{
    (void)state;
    static char deep[200000], many[1200000];
    for (int n = 32; n <= 33; n++) {            /* {"":[[...0...]]}, n deep */
        json_t *root = NULL;
        struct lm_err err = { 0 };
        int len = snprintf(deep, sizeof deep, "{\"\":%.*s0%.*s}", n - 1,
                           "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", n - 1,
                           "]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]");
        assert_int_equal(json_parse_object(deep, (size_t)len, &root, &err),
                         n == 32 ? LM_OK : LM_TOO_LARGE);
        json_decref(root);
    }
    memset(deep, '[', sizeof deep);
    is_refused(deep, sizeof deep, LM_FORMAT, "not valid JSON");
    memcpy(deep, "{\"a\":", 5);
    for (size_t len = 6; len < 4096; len++) {   /* where reading works on the stack, too */
        is_refused(deep, len, LM_FORMAT, "not valid JSON");
        is_refused(deep + 5, len, LM_FORMAT, "not valid JSON");
    }
    for (size_t i = 0; i < sizeof many; i++)
        many[i] = i % 2 ? ',' : '0';
    is_refused(many, sizeof many, LM_TOO_LARGE, "more than 524288 values");
    is_refused("{\"p\":9223372036854775808}", 25, LM_FORMAT, "too big number");
    is_refused("{\"p\":-9223372036854775809}", 26, LM_FORMAT, "too big number");
    is_refused("{\n\"a\":\n  tru}", 13, LM_FORMAT, "line 3 column 3");
    is_refused("{\"p\":1\0}", 8, LM_FORMAT, "column 7");
    is_refused("{}\0", 3, LM_FORMAT, "after document");
    is_refused("\xef\xbb\xbf{}", 5, LM_FORMAT, "byte order mark");
}

/* Bytes are looked at in words that overlap: every byte, at every place of every length. */
static void every_byte_counts_wherever_it_is(void **state)
{
    enum { LONGEST = 70 };
    (void)state;
    struct bytes b;
    for (size_t n = 1; n <= LONGEST; n++) {
        for (size_t at = 0; at < n; at++) {
            for (int c = 0; c < 256; c++) {
                char *text = lm_malloc(n);      /* of its own size, for a sanitizer to see */
                memset(text, 'x', n);
                text[at] = (char)c;
                bool brief = c && strchr("\b\f\n\r\t\"\\", c);
                size_t want = n + 2 + (brief ? 1 : c < 0x20 ? 5 : 0);
                bytes_init(&b);
                assert_int_equal(json_is_utf8(text, n), c < 0x80);
                assert_int_equal(json_put_text(&b, text, n), c < 0x80);
                if (c < 0x80)
                    assert_int_equal(b.n, want);
                bytes_drop(&b);
                free(text);
            }
        }
    }
    bytes_init(&b);
    assert_true(json_is_utf8("", 0) && json_put_text(&b, "", 0));
    assert_memory_equal(b.at, "\"\"", 2);
}

static void thousandths_have_no_digits_to_spare(void **state)
{
    static const struct { int64_t n; const char *text; } cases[] = {
        { 0, "0.0" }, { 1, "0.001" }, { 10, "0.01" }, { 100, "0.1" }, { 1000, "1.0" },
        { 1010, "1.01" }, { 12346, "12.346" }, { 8192125, "8192.125" }, { -5, "-0.005" },
        { -1500, "-1.5" }, { INT64_MAX, "9223372036854775.807" },
        { INT64_MIN, "-9223372036854775.808" },
    };
    (void)state;
    for (size_t i = 0; i < LM_COUNT(cases); i++) {
        struct bytes b;
        bytes_init(&b);
        json_put_thousandths(&b, cases[i].n);
        bytes_byte(&b, '\0');
        assert_string_equal(b.at, cases[i].text);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(both_ways_agree_with_jansson),
        cmocka_unit_test(damaged_text_is_judged_as_jansson_does),
        cmocka_unit_test(a_key_twice_is_found_among_any_number),
        cmocka_unit_test(floats_have_their_own_digits),
        cmocka_unit_test(a_text_holds_no_more_memory_than_it_has),
        cmocka_unit_test(limits),
        cmocka_unit_test(every_byte_counts_wherever_it_is),
        cmocka_unit_test(thousandths_have_no_digits_to_spare),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
