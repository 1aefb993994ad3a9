/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_avro.c - Avro under guard: schemas that are refused, data that lie, schema evolution,
 * and bytes that another implementation (fastavro) wrote.
 *
 * tests/fixtures/messages/make writes the fixtures.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "tests/unit/avro_encode.h"
#include "worker/codec/avro_codec.h"
#include "worker/codec/json_prompt.h"
#include "worker/codec/schema_text.h"

#define FIXTURES "tests/fixtures/messages/avro_cases.json"

static struct avro_plan *plan_of(const char *schema)
{
    struct avro_plan *p = NULL;
    struct lm_err err = { 0 };
    if (avro_plan_new(schema, strlen(schema), &p, &err) != LM_OK)
        fail_msg("%s: %s", schema, err.msg);
    return p;
}

/* ---- writers' schemas ------------------------------------------------------------------------ */

#define REC(fields) "{\"type\":\"record\",\"name\":\"R\",\"fields\":[" fields "]}"
#define FIELD(type) REC("{\"name\":\"f\",\"type\":" type "}")

static const struct { const char *schema; lm_status code; const char *says; } refused[] = {
    { "", LM_FORMAT, "not valid JSON" },
    { "{\"type\":", LM_FORMAT, "not valid JSON" },
    { "5", LM_FORMAT, "a type is neither" },
    { "{}", LM_FORMAT, "a type is neither" },
    { "{\"type\":7}", LM_FORMAT, "a type is neither" },
    { "\"nosuch\"", LM_FORMAT, "Avro refuses the schema" },
    { "{\"type\":\"record\",\"fields\":[]}", LM_FORMAT, "no proper name" },
    { "{\"type\":\"record\",\"name\":\"R\"}", LM_FORMAT, "a record has no fields" },
    { FIELD("{\"type\":\"array\",\"items\":{\"type\":\"record\",\"name\":\"N\",\"fields\":"
            "[]}}"), LM_UNSUPPORTED, "items that take no bytes" },
    { REC("{\"type\":\"int\"}"), LM_FORMAT, "a field has no proper name" },
    { REC("{\"name\":5,\"type\":\"int\"}"), LM_FORMAT, "a field has no proper name" },
    { REC("{\"name\":\"a b\",\"type\":\"int\"}"), LM_FORMAT, "a field has no proper name" },
    { REC("{\"name\":\"a\"}"), LM_FORMAT, "a type is neither" },
    { REC("{\"name\":\"a\",\"type\":\"int\"},{\"name\":\"a\",\"type\":\"int\"}"), LM_FORMAT,
      "has a twice" },
    { "{\"type\":\"record\",\"name\":\"R\",\"namespace\":3,\"fields\":[]}", LM_FORMAT,
      "a namespace is no proper name" },
    { FIELD("{\"type\":\"enum\",\"name\":\"R\",\"symbols\":[\"A\"]}"), LM_FORMAT, "R twice" },
    { REC("{\"name\":\"a\",\"type\":{\"type\":\"record\",\"name\":\"n.S\",\"fields\":[{\"name\":"
          "\"b\",\"type\":{\"type\":\"fixed\",\"name\":\"S\",\"size\":1}}]}}"), LM_FORMAT,
      "defines S twice" },
    { FIELD("\"R\""), LM_UNSUPPORTED, "recursive: R refers to itself" },
    { FIELD("[\"null\",\"R\"]"), LM_UNSUPPORTED, "recursive" },
    { FIELD("{\"type\":\"array\",\"items\":\"R\"}"), LM_UNSUPPORTED, "recursive" },
    { FIELD("{\"type\":\"map\",\"values\":[\"null\",{\"type\":\"R\"}]}"), LM_UNSUPPORTED, "recur" },
    { FIELD("{\"type\":\"record\",\"name\":\"S\",\"fields\":[{\"name\":\"g\",\"type\":\"R\"}]}"),
      LM_UNSUPPORTED, "recursive: R" },
    { FIELD("{\"type\":\"array\",\"items\":\"null\"}"), LM_UNSUPPORTED,
      "an array of items that take no bytes" },
    { FIELD("{\"type\":\"map\",\"values\":\"null\"}"), LM_UNSUPPORTED,
      "a map of items that take no bytes" },
    { FIELD("{\"type\":\"array\",\"items\":{\"type\":\"record\",\"name\":\"N\",\"fields\":"
            "[{\"name\":\"a\",\"type\":\"null\"}]}}"), LM_UNSUPPORTED, "items that take no bytes" },
    { FIELD("{\"type\":\"fixed\",\"name\":\"F\",\"size\":0}"), LM_TOO_LARGE, "F has 0 bytes" },
    { FIELD("{\"type\":\"fixed\",\"name\":\"F\",\"size\":-1}"), LM_TOO_LARGE, "F has -1 bytes" },
    { FIELD("{\"type\":\"fixed\",\"name\":\"F\",\"size\":1000000000}"), LM_TOO_LARGE, "fixed F" },
    { FIELD("{\"type\":\"fixed\",\"name\":\"F\"}"), LM_TOO_LARGE, "fixed F" },
    { FIELD("{\"type\":\"enum\",\"name\":\"E\",\"symbols\":[\"A\",\"A\"]}"), LM_FORMAT, "A twice" },
    { FIELD("{\"type\":\"enum\",\"name\":\"E\",\"symbols\":[5]}"), LM_FORMAT, "a symbol is no" },
    { FIELD("{\"type\":\"enum\",\"name\":\"E\",\"symbols\":[]}"), LM_FORMAT, "Avro refuses" },
    { FIELD("{\"type\":\"enum\",\"name\":\"E\"}"), LM_FORMAT, "Avro refuses" },
    { FIELD("{\"type\":\"array\"}"), LM_FORMAT, "a type is neither" },
    { FIELD("[]"), LM_FORMAT, "Avro refuses" },
    { FIELD("\"\""), LM_FORMAT, "Avro refuses" },
};

static void bad_schemas_are_refused(void **state)
{
    (void)state;
    for (size_t i = 0; i < LM_COUNT(refused); i++) {
        struct avro_plan *p = NULL;
        struct lm_err err = { 0 };
        lm_status st = avro_plan_new(refused[i].schema, strlen(refused[i].schema), &p, &err);
        if (st != refused[i].code || !strstr(err.msg, refused[i].says))
            fail_msg("%s\n  expected %s: %s\n  got %s: %s", refused[i].schema,
                     lm_status_wire(refused[i].code), refused[i].says, lm_status_wire(st), err.msg);
        assert_null(p);
    }
}

/* Avro C has one error text for the process, and counts its references without atomics. Each thread
 * has a schema that is refused by a name of its own, and data of its own that are read then. */
static void *refuse_own_name(void *arg)
{
    int me = *(int *)arg;
    char schema[256], name[32];
    struct avro_plan *good = NULL, *p;
    struct lm_err err = { 0 };
    const char *fine = FIELD("\"int\"");
    const unsigned char data[] = { (unsigned char)(me * 2) };
    snprintf(name, sizeof name, "nobody_%d_", me);
    snprintf(schema, sizeof schema, FIELD("\"%s\""), name);
    if (avro_plan_new(fine, strlen(fine), &good, &err))
        return (void *)(uintptr_t)"the good schema is refused";
    const char *wrong = NULL;
    for (int i = 0; !wrong && i < 3000; i++) {
        json_t *tree = NULL;
        lm_status st = avro_plan_new(schema, strlen(schema), &p, &err);
        if (st != LM_FORMAT || !strstr(err.msg, name))
            wrong = "another thread's error";
        else if (avro_decode(good, data, sizeof data, &tree, &err) ||
                 json_integer_value(json_object_get(tree, "f")) != me)
            wrong = "another thread's data";
        json_decref(tree);
    }
    avro_plan_free(good);
    return (void *)(uintptr_t)wrong;
}

static void threads_share_no_error(void **state)
{
    (void)state;
    pthread_t t[4];
    int me[4];
    for (int i = 0; i < 4; i++) {
        me[i] = i;
        assert_int_equal(pthread_create(&t[i], NULL, refuse_own_name, &me[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        void *wrong;
        pthread_join(t[i], &wrong);
        if (wrong)
            fail_msg("thread %d: %s", i, (const char *)wrong);
    }
}

/* head, then unit n times, then tail n times. */
static char *nest(const char *unit, const char *middle, const char *tail, int n)
{
    char *s = calloc(1, (strlen(unit) + strlen(tail)) * (size_t)n + strlen(middle) + 1), *at = s;
    for (int i = 0; i < n; i++)
        at = stpcpy(at, unit);
    at = stpcpy(at, middle);
    for (int i = 0; i < n; i++)
        at = stpcpy(at, tail);
    return s;
}

static void refuse_plan(char *schema, lm_status code, const char *says)
{
    struct avro_plan *p = NULL;
    struct lm_err err = { 0 };
    lm_status st = avro_plan_new(schema, strlen(schema), &p, &err);
    if (st != code || !strstr(err.msg, says))
        fail_msg("%.60s...: %s: %s", schema, lm_status_wire(st), err.msg);
    free(schema);
}

static void large_schemas_are_refused(void **state)
{
    (void)state;
    refuse_plan(nest("{\"type\":\"array\",\"items\":", "\"int\"", "}", 17), LM_TOO_LARGE,
                "nested deeper than 16 levels");
    refuse_plan(nest("[", "", "", 100000), LM_TOO_LARGE, "JSON is nested deeper than 48");
    refuse_plan(nest("\"", "x", "", 300000), LM_TOO_LARGE, "300001 bytes, more than 262144");
    char *wide = nest("", "", "", 0), *at = wide = realloc(wide, 1 << 18);
    at = stpcpy(at, "{\"type\":\"record\",\"name\":\"R\",\"fields\":[");
    for (int i = 0; i < 4200; i++)
        at += sprintf(at, "%s{\"name\":\"f%d\",\"type\":\"int\"}", i ? "," : "", i);
    strcpy(at, "]}");
    refuse_plan(wide, LM_TOO_LARGE, "more than 4096 types");
    /* Each type holds the one before twice: 2^14 places from a page of text. */
    char *twice = malloc(1 << 14);
    at = stpcpy(twice, "[{\"type\":\"record\",\"name\":\"T0\",\"fields\":[{\"name\":\"a\",\"type\":"
                "\"int\"}]}");
    for (int i = 1; i < 15; i++)
        at += sprintf(at, ",{\"type\":\"record\",\"name\":\"T%d\",\"fields\":[{\"name\":\"a\","
                      "\"type\":\"T%d\"},{\"name\":\"b\",\"type\":\"T%d\"}]}", i, i - 1, i - 1);
    strcpy(at, "]");
    refuse_plan(twice, LM_TOO_LARGE, "named types expanded");
}

/* ---- data that lie --------------------------------------------------------------------------- */

static const struct { const char *type, *hex; lm_status code; const char *says; } lies[] = {
    { "\"int\"", "", LM_FORMAT, "f: ends in the middle of a number" },
    { "\"int\"", "80", LM_FORMAT, "f: ends in the middle of a number" },
    { "\"int\"", "8080808010", LM_FORMAT, "f: 2147483648 is no 32-bit int" },
    { "\"long\"", "ffffffffffffffffff02", LM_FORMAT, "f: a number has more than 64 bits" },
    { "\"long\"", "80808080808080808080808000", LM_FORMAT, "more than 64 bits" },
    { "\"boolean\"", "02", LM_FORMAT, "f: a boolean of 2" },
    { "\"boolean\"", "", LM_FORMAT, "f: a boolean of 1 bytes, but 0 are left" },
    { "\"float\"", "000000", LM_FORMAT, "f: a float of 4 bytes, but 3 are left" },
    { "\"double\"", "00000000000000", LM_FORMAT, "f: a double of 8 bytes, but 7 are left" },
    { "\"string\"", "0a6161", LM_FORMAT, "f: a string of 5 bytes, but 2 are left" },
    { "\"string\"", "feffffff0f", LM_FORMAT, "f: a string of 2147483647 bytes, but 0 are left" },
    { "\"string\"", "feffffffffffffffff01", LM_FORMAT, "f: a string of 9223372036854775807 bytes" },
    { "\"string\"", "01", LM_FORMAT, "f: a string of -1 bytes" },
    { "\"string\"", "0261ff", LM_FORMAT, "top: 1 bytes behind its end" },
    { "\"string\"", "02ff", LM_FORMAT, "f is not valid UTF-8" },
    { "\"bytes\"", "8080808008", LM_FORMAT, "f: bytes of 1073741824 bytes, but 0 are left" },
    { "{\"type\":\"fixed\",\"name\":\"F\",\"size\":4}", "0000", LM_FORMAT,
      "f: a fixed of 4 bytes" },
    { "{\"type\":\"enum\",\"name\":\"E\",\"symbols\":[\"A\",\"B\"]}", "04", LM_FORMAT,
      "f: enum symbol 2 of 2" },
    { "{\"type\":\"enum\",\"name\":\"E\",\"symbols\":[\"A\",\"B\"]}", "01", LM_FORMAT,
      "f: enum symbol -1 of 2" },
    { "[\"null\",\"int\"]", "04", LM_FORMAT, "f: union branch 2 of 2" },
    { "[\"null\",\"int\"]", "01", LM_FORMAT, "f: union branch -1 of 2" },
    { "[\"null\",\"int\"]", "8080808080808001", LM_FORMAT, "f: union branch 281474976710656 of 2" },
    { "{\"type\":\"array\",\"items\":\"int\"}", "80c2d72f", LM_FORMAT,
      "f[]: a block of 50000000 items, but 0 bytes are left" },
    { "{\"type\":\"array\",\"items\":\"int\"}", "0402", LM_FORMAT,
      "f[]: a block of 2 items, but 1" },
    { "{\"type\":\"array\",\"items\":\"int\"}", "0202", LM_FORMAT, "f[]: ends in the middle of a" },
    { "{\"type\":\"array\",\"items\":\"int\"}", "ffffffffffffffffff01", LM_FORMAT,
      "f[]: a block count of -9223372036854775808" },
    { "{\"type\":\"array\",\"items\":\"int\"}", "0102", LM_FORMAT,
      "f[]: a block of 1 bytes, but 0 are left" },
    { "{\"type\":\"array\",\"items\":\"int\"}", "0101", LM_FORMAT, "f[]: a block of -1 bytes" },
    { "{\"type\":\"array\",\"items\":\"int\"}", "0104020200", LM_FORMAT,
      "f[]: a block says 2 bytes and has 1" },
    { "{\"type\":\"map\",\"values\":\"int\"}", "020261", LM_FORMAT, "f[]: ends in the middle" },
    { "{\"type\":\"map\",\"values\":\"int\"}", "0400", LM_FORMAT, "f[]: a block of 2 items" },
    { "{\"type\":\"map\",\"values\":\"int\"}", "0204006102 00", LM_FORMAT,
      "f[]: a map key contains U+0000" },
    { "{\"type\":\"map\",\"values\":\"int\"}", "0203000000", LM_FORMAT,
      "f[]: a map key of -2 bytes" },
    { "{\"type\":\"map\",\"values\":\"int\"}", "0202ff0200", LM_FORMAT, "not valid UTF-8" },
    { "{\"type\":\"map\",\"values\":\"double\"}", "02086e6f7465000000000000f87f00", LM_INVALID,
      "f.note must be a finite number" },
    { "{\"type\":\"map\",\"values\":\"double\"}", "02104974206875727473000000000000f87f00",
      LM_INVALID, "f.(a key) must be a finite number" },    /* "It hurts" may be text */
};

static size_t from_hex(const char *hex, unsigned char *out)
{
    size_t n = 0;
    for (unsigned byte; *hex; hex += hex[1] ? 2 : 1) {
        if (*hex == ' ')
            hex++;
        if (hex[1] && sscanf(hex, "%2x", &byte) == 1)
            out[n++] = (unsigned char)byte;
    }
    return n;
}

static lm_status decode_exact(struct avro_plan *p, const unsigned char *data, size_t n,
                              json_t **out, struct lm_err *err)
{
    unsigned char *exact = malloc(n ? n : 1);       /* ASan sees an overread */
    memcpy(exact, data, n);
    *out = NULL;
    lm_status st = avro_decode(p, exact, n, out, err);
    free(exact);
    return st;
}

static void lying_data_are_refused(void **state)
{
    (void)state;
    for (size_t i = 0; i < LM_COUNT(lies); i++) {
        char schema[512];
        unsigned char data[64];
        snprintf(schema, sizeof schema, FIELD("%s"), lies[i].type);
        struct avro_plan *p = plan_of(schema);
        json_t *tree;
        struct lm_err err = { 0 };
        lm_status st = decode_exact(p, data, from_hex(lies[i].hex, data), &tree, &err);
        if (st != lies[i].code || !strstr(err.msg, lies[i].says))
            fail_msg("%s %s\n  expected %s\n  got %s: %s", lies[i].type, lies[i].hex, lies[i].says,
                     lm_status_wire(st), err.msg);
        assert_null(tree);
        avro_plan_free(p);
    }
}

/* Jansson's allocations, of which one fails. */
static int fails_at;

static void *allocate(size_t n)
{
    return --fails_at ? malloc(n) : NULL;
}

/* Text that is fine and finds no memory must not be taken for malformed: a retry would read it. */
static void want_of_memory_is_no_fault_of_the_text(void **state)
{
    (void)state;
    struct avro_plan *p = plan_of(FIELD("{\"type\":\"map\",\"values\":\"string\"}"));
    static const unsigned char data[] = "\2\4\xc3\xa9\4\xc3\xa9";    /* and the end, a 0 */
    struct lm_err err = { 0 };
    lm_status st = LM_NOMEM;
    int n = 0;
    for (json_t *tree = NULL; st; json_decref(tree)) {
        fails_at = ++n;
        json_set_alloc_funcs(allocate, free);
        st = decode_exact(p, data, sizeof data, &tree, &err);
        json_set_alloc_funcs(malloc, free);
        if (st != LM_OK && st != LM_NOMEM)
            fail_msg("allocation %d: %s", n, err.msg);
    }
    assert_true(n > 5);
    avro_plan_free(p);
}

static void blocks_with_sizes_are_read(void **state)
{
    (void)state;
    struct avro_plan *p = plan_of(FIELD("{\"type\":\"array\",\"items\":\"int\"}"));
    /* blocks of -2 (1 2), 1 (3) and -1 (4) */
    static const unsigned char data[] = { 3, 4, 2, 4, 2, 6, 1, 2, 8, 0 };
    json_t *tree;
    struct lm_err err = { 0 };
    assert_int_equal(decode_exact(p, data, sizeof data, &tree, &err), LM_OK);
    json_t *want = json_pack("{s:[iiii]}", "f", 1, 2, 3, 4);
    assert_true(json_equal(tree, want));
    json_decref(tree);
    json_decref(want);
    avro_plan_free(p);
}

/* Of a key that comes twice the last one counts, null says that there is none; what lies around it,
 * and in it, stays whole. */
static void the_last_of_equal_keys_counts(void **state)
{
    (void)state;
    struct avro_plan *p = plan_of("{\"type\":\"record\",\"name\":\"R\",\"fields\":["
        "{\"name\":\"f\",\"type\":{\"type\":\"map\",\"values\":[\"null\","
        "{\"type\":\"map\",\"values\":\"int\"}]}},{\"name\":\"g\",\"type\":\"int\"}]}");
    static const struct { const char *hex, *want; } rows[] = {
        /* a: {x: 1}, b: {x: 1, y: 2, x: 3}, a: null, b: {}, c: null, a: {z: 4} */
        { "0c 0261 02 02 0278 02 00 0262 02 06 0278 02 0279 04 0278 06 00 0261 00"
          "0262 02 00 0263 00 0261 02 02 027a 08 00 00 0a",
          "{\"f\":{\"b\":{},\"a\":{\"z\":4}},\"g\":5}" },
        /* b: {x: 1, y: 2, x: 3} */
        { "02 0262 02 06 0278 02 0279 04 0278 06 00 00 0a",
          "{\"f\":{\"b\":{\"y\":2,\"x\":3}},\"g\":5}" },
        /* a: null; and two blocks: a: {x: 1} and a: {} */
        { "02 0261 00 00 0a", "{\"f\":{},\"g\":5}" },
        { "02 0261 02 02 0278 02 00 02 0261 02 00 00 0a", "{\"f\":{\"a\":{}},\"g\":5}" },
    };
    for (size_t i = 0; i < LM_COUNT(rows); i++) {
        unsigned char data[128];
        json_t *tree, *want = json_loads(rows[i].want, 0, NULL);
        struct lm_err err = { 0 };
        if (decode_exact(p, data, from_hex(rows[i].hex, data), &tree, &err))
            fail_msg("%zu: %s", i, err.msg);
        assert_true(json_equal(tree, want));
        json_decref(tree);
        json_decref(want);
    }
    avro_plan_free(p);
}

/* Such fields take no bytes: nothing may be read for them behind the end. */
static void fields_without_bytes_end_a_datum(void **state)
{
    (void)state;
    struct avro_plan *p = plan_of("{\"type\":\"record\",\"name\":\"R\",\"fields\":["
        "{\"name\":\"f\",\"type\":[\"int\",\"null\"]},{\"name\":\"g\",\"type\":\"null\"}]}");
    static const struct { const char *hex, *want; } rows[] = {
        { "02", "{}" }, { "82 00", "{}" }, { "00 0a", "{\"f\":5}" },
    };
    for (size_t i = 0; i < LM_COUNT(rows); i++) {
        unsigned char data[8];
        json_t *tree, *want = json_loads(rows[i].want, 0, NULL);
        struct lm_err err = { 0 };
        if (decode_exact(p, data, from_hex(rows[i].hex, data), &tree, &err))
            fail_msg("%zu: %s", i, err.msg);
        assert_true(json_equal(tree, want));
        json_decref(tree);
        json_decref(want);
    }
    avro_plan_free(p);
}

enum { MANY_FIELDS = 40 };

/* So many fields, the types of which, and which of them are null, follow from the seed. */
static size_t draw_record(unsigned seed, int n, char *schema, unsigned char *data, json_t *want)
{
    static const char *const types[] = { "[\"null\",\"int\"]", "[\"null\",\"int\"]",
                                         "[\"null\",\"int\"]", "[\"int\",\"null\"]", "\"int\"" };
    size_t used = 0;
    char *at = schema + sprintf(schema, "{\"type\":\"record\",\"name\":\"R\",\"fields\":[");
    for (int i = 0; i < n; i++) {
        seed = seed * 1103515245 + 12345;
        unsigned kind = (seed >> 16) % LM_COUNT(types), null_branch = kind == 3;
        bool null = kind < 4 && (seed >> 24) % 8;
        char name[8];
        snprintf(name, sizeof name, "f%d", i);
        at += sprintf(at, "%s{\"name\":\"%s\",\"type\":%s}", i ? "," : "", name, types[kind]);
        if (kind < 4)
            data[used++] = (unsigned char)((null ? null_branch : !null_branch) << 1);
        if (null)
            continue;
        data[used++] = (unsigned char)(seed >> 28 & 1);     /* 0, as a null may look, or -1 */
        json_object_set_new(want, name, json_integer(-(json_int_t)(seed >> 28 & 1)));
    }
    sprintf(at, "]}");
    return used;
}

/* Nulls are passed several at a time: each number of fields, at each place, cut at each byte. */
static void runs_of_nulls_are_counted(void **state)
{
    (void)state;
    for (unsigned seed = 0; seed < 20 * MANY_FIELDS; seed++) {
        char schema[64 + MANY_FIELDS * 48];
        unsigned char data[2 * MANY_FIELDS + 1];
        json_t *want = json_object(), *tree;
        struct lm_err err = { 0 };
        size_t n = draw_record(seed, 1 + (int)seed % MANY_FIELDS, schema, data, want);
        struct avro_plan *p = plan_of(schema);
        if (decode_exact(p, data, n, &tree, &err) || !json_equal(tree, want))
            fail_msg("%s: %s", schema, err.msg);
        json_decref(tree);
        for (size_t cut = 0; cut < n; cut++)
            assert_int_equal(decode_exact(p, data, cut, &tree, &err), LM_FORMAT);
        data[n] = 0;
        assert_int_equal(decode_exact(p, data, n + 1, &tree, &err), LM_FORMAT);
        avro_plan_free(p);
        json_decref(want);
    }
}

static void goes_there_and_back(struct avro_plan *p, json_t *tree)
{
    struct lm_err err = { 0 };
    json_t *back = NULL;
    void *data = NULL;
    size_t n = 0;
    assert_int_equal(avro_encode(p, tree, 0, &data, &n, &err), LM_OK);
    assert_int_equal(decode_exact(p, data, n, &back, &err), LM_OK);
    assert_true(json_equal(tree, back));
    json_decref(back);
    free(data);
}

/* A plan lends one value again and again: what was in it, large, small or failed, is forgotten. */
static void a_plan_forgets_the_last_datum(void **state)
{
    (void)state;
    struct avro_plan *p = plan_of(
        REC("{\"name\":\"s\",\"type\":[\"null\",\"string\","
            "{\"type\":\"array\",\"items\":\"string\"}]},"
            "{\"name\":\"m\",\"type\":{\"type\":\"map\",\"values\":"
            "[\"null\",\"string\",\"long\"]}}"));
    static char large[100000];
    memset(large, 'x', sizeof large - 1);
    json_t *all[] = {
        json_pack("{s:s, s:{s:s, s:i, s:s}}", "s", "a", "m", "k", "v", "l", 7, "n", "w"),
        json_pack("{s:{s:i}}", "m", "k", 8),
        json_pack("{s:[sss], s:{}}", "s", "x", "", "z", "m"),
        json_pack("{s:s, s:{s:s}}", "s", large, "m", "k", large),
        json_pack("{s:[s], s:{s:s}}", "s", "\xc3\xbc", "m", "\xe2\x82\xac",
                  "\xf0\x9f\x98\x80 end"),
    };
    json_t *wrong = json_pack("{s:s, s:{s:s, s:f}}", "s", "left", "m", "k", "over", "bad",
                              1.5);
    static const unsigned char bad_text[] = { 2, 4, 0xc3, 'x', 0 };
    for (size_t i = 0; i < LM_COUNT(all) * LM_COUNT(all); i++) {
        struct lm_err err = { 0 };
        json_t *tree = NULL;
        void *data = NULL;
        size_t n = 0;
        goes_there_and_back(p, all[i % LM_COUNT(all)]);
        if (i % 3 == 0)
            assert_int_equal(avro_encode(p, wrong, 0, &data, &n, &err), LM_MISMATCH);
        if (i % 4 == 0)
            assert_int_equal(decode_exact(p, bad_text, sizeof bad_text, &tree, &err), LM_FORMAT);
        goes_there_and_back(p, all[i / LM_COUNT(all)]);
    }
    for (size_t i = 0; i < LM_COUNT(all); i++)
        json_decref(all[i]);
    json_decref(wrong);
    avro_plan_free(p);
}

/* Whatever its length and wherever the fault lies in a word. */
static void text_that_is_not_utf8_is_refused(void **state)
{
    (void)state;
    struct avro_plan *p = plan_of(FIELD("\"string\""));
    for (unsigned char n = 1; n < 40; n++)
        for (int at = 0; at < n; at++) {
            unsigned char data[64];
            json_t *tree = NULL;
            struct lm_err err = { 0 };
            data[0] = (unsigned char)(2 * n);
            memset(data + 1, 'a', n);
            assert_int_equal(decode_exact(p, data, n + 1u, &tree, &err), LM_OK);
            json_decref(tree);
            data[1 + at] = 0x80;
            assert_int_equal(decode_exact(p, data, n + 1u, &tree, &err), LM_FORMAT);
        }
    avro_plan_free(p);
}

static long peak_kb(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return u.ru_maxrss;
}

/* 1,000 truncated strings, each claiming 1 GB; array and map bombs; all within time and memory. */
static void bombs_cost_nothing(void **state)
{
    (void)state;
    static const struct { const char *type, *hex; } bombs[] = {
        { "\"string\"", "8094ebdc0361" }, { "\"bytes\"", "8094ebdc0361" },
        { "{\"type\":\"array\",\"items\":\"int\"}", "8084af5f" },
        { "{\"type\":\"array\",\"items\":[\"null\",\"int\"]}", "8084af5f00" },
        { "{\"type\":\"map\",\"values\":\"int\"}", "8084af5f00" },
    };
    long before = peak_kb();
    int64_t start = lm_now_us();
    for (size_t i = 0; i < LM_COUNT(bombs); i++) {
        char schema[256];
        unsigned char data[64];
        snprintf(schema, sizeof schema, FIELD("%s"), bombs[i].type);
        struct avro_plan *p = plan_of(schema);
        size_t n = from_hex(bombs[i].hex, data);
        for (int k = 0; k < 1000; k++) {
            json_t *tree;
            struct lm_err err = { 0 };
            assert_int_equal(decode_exact(p, data, n, &tree, &err), LM_FORMAT);
        }
        avro_plan_free(p);
    }
    assert_true(lm_now_us() - start < 5000000);
    assert_true(peak_kb() - before < 16 * 1024);
}

static void refuse_many(const char *type, unsigned char fill, size_t n, const char *says)
{
    char schema[1024];
    snprintf(schema, sizeof schema, FIELD("%s"), type);
    struct avro_plan *p = plan_of(schema);
    unsigned char *data = calloc(1, n + 8);
    uint64_t count = (uint64_t)n << 1;
    size_t at = 0;
    for (; count > 0x7f; count >>= 7)
        data[at++] = (unsigned char)(count | 0x80);
    data[at++] = (unsigned char)count;
    memset(data + at, fill, n);
    json_t *tree = NULL;
    struct lm_err err = { 0 };
    assert_int_equal(avro_decode(p, data, at + n + 1, &tree, &err), LM_TOO_LARGE);
    if (!strstr(err.msg, says))
        fail_msg("%s", err.msg);
    free(data);
    avro_plan_free(p);
}

static void counts_are_capped(void **state)
{
    (void)state;
    long before = peak_kb();
    refuse_many("{\"type\":\"array\",\"items\":\"int\"}", 2, 1 << 20, "more than 524288 values");
    /* One byte an item, but 20 null fields each: values are counted, not items. */
    char wide[1024] = "{\"type\":\"array\",\"items\":{\"type\":\"record\",\"name\":\"W\","
                      "\"fields\":[{\"name\":\"a\",\"type\":\"int\"}";
    for (int i = 0; i < 20; i++)
        sprintf(wide + strlen(wide), ",{\"name\":\"n%d\",\"type\":\"null\"}", i);
    strcat(wide, "]}}");
    refuse_many(wide, 2, 100000, "more than 524288 values");
    assert_true(peak_kb() - before < 16 * 1024);

    struct avro_plan *p = plan_of(FIELD("{\"type\":\"map\",\"values\":\"boolean\"}"));
    unsigned char *data = calloc(1, 5000 * 2 + 8);
    memcpy(data, "\x90\x4e", 2);        /* 5,000 pairs of "" and false */
    json_t *tree = NULL;
    struct lm_err err = { 0 };
    assert_int_equal(avro_decode(p, data, 5000 * 2 + 3, &tree, &err), LM_TOO_LARGE);
    assert_non_null(strstr(err.msg, "a map of more than 256 entries"));

    /* One entry: a key of 1,024 bytes is read, one of a byte more is not. */
    memset(data, 'k', 2000);
    memcpy(data, "\x02\x80\x10", 3);
    memcpy(data + 3 + 1024, "\1\0", 2);
    assert_int_equal(avro_decode(p, data, 3 + 1024 + 2, &tree, &err), LM_OK);
    json_decref(tree);
    memset(data + 3, 'k', 1025);
    memcpy(data, "\x02\x82\x10", 3);
    memcpy(data + 3 + 1025, "\1\0", 2);
    assert_int_equal(avro_decode(p, data, 3 + 1025 + 2, &tree, &err), LM_TOO_LARGE);
    assert_non_null(strstr(err.msg, "f[]: a map key of 1025 bytes, more than 1024"));
    free(data);
    avro_plan_free(p);
}

/* As a reply of 1,000 tokens with 20 log-probabilities each has them. */
static void many_small_maps_are_read(void **state)
{
    enum { MAPS = 1000, BYTES = 1 + 2 * 21 + 1 };
    (void)state;
    struct avro_plan *p = plan_of(FIELD("{\"type\":\"array\",\"items\":{\"type\":\"map\","
                                        "\"values\":\"boolean\"}}"));
    unsigned char *data = calloc(MAPS, BYTES + 1);
    memcpy(data, "\xd0\x0f", 2);
    for (size_t i = 0; i < MAPS; i++)
        data[2 + i * BYTES] = 2 * 21;   /* pairs of "" and false */
    json_t *tree = NULL;
    struct lm_err err = { 0 };
    assert_int_equal(avro_decode(p, data, 2 + MAPS * BYTES + 1, &tree, &err), LM_OK);
    json_decref(tree);
    free(data);
    avro_plan_free(p);
}

/* ---- what another implementation wrote ------------------------------------------------------- */

static json_t *load(const char *path)
{
    json_error_t je;
    json_t *root = json_load_file(path, 0, &je);
    if (!root)
        fail_msg("%s: %s (run from the repository's root)", path, je.text);
    return root;
}

static json_t *fixtures(void)
{
    return load(FIXTURES);
}

static size_t fixture_bytes(const json_t *c, unsigned char **out)
{
    const char *hex = json_string_value(json_object_get(c, "hex"));
    *out = malloc(strlen(hex) / 2 + 1);
    return from_hex(hex, *out);
}

static lm_status read_prompt(const json_t *tree, struct prompt **out, struct lm_err *err)
{
    yyjson_mut_doc *d = yyjson_mut_doc_new(NULL);
    yyjson_doc *doc = yyjson_mut_val_imut_copy(json_to_value(d, tree), NULL);
    lm_status st = json_prompt_read(yyjson_doc_get_root(doc), ENCODING_AVRO, NULL, NULL, out, err);
    yyjson_doc_free(doc);
    yyjson_mut_doc_free(d);
    return st;
}

static void check_case(const json_t *c)
{
    const char *name = json_string_value(json_object_get(c, "name"));
    struct avro_plan *p = plan_of(json_string_value(json_object_get(c, "schema")));
    unsigned char *data;
    size_t n = fixture_bytes(c, &data);
    json_t *tree;
    struct prompt *prompt = NULL;
    struct lm_err err = { 0 };
    lm_status st = decode_exact(p, data, n, &tree, &err);
    if (!st)
        st = read_prompt(tree, &prompt, &err);
    const char *error = json_string_value(json_object_get(c, "error"));
    if (error ? !strstr(err.msg, error) : !json_equal(tree, json_object_get(c, "json")))
        fail_msg("%s: %s: %s", name, err.msg, json_dumps(tree, JSON_ENCODE_ANY));
    /* "a map of params" carries a double for max_tokens, which is refused later, by name */
    if (!error && st && !strstr(err.msg, "params.max_tokens must be an integer"))
        fail_msg("%s: %s", name, err.msg);
    prompt_free(prompt);
    json_decref(tree);

    /* Every cut is refused, and without a leak; each flipped byte is survived. */
    for (size_t cut = 0; cut < n; cut++) {
        assert_int_not_equal(decode_exact(p, data, cut, &tree, &err), LM_OK);
        data[cut] ^= 0x55;
        decode_exact(p, data, n, &tree, &err);
        json_decref(tree);
        data[cut] ^= 0x55;
    }
    free(data);
    avro_plan_free(p);
}

static void prompts_of_fastavro_are_read(void **state)
{
    (void)state;
    json_t *root = fixtures(), *cases = json_object_get(root, "prompts");
    assert_true(json_array_size(cases) >= 20);
    for (size_t i = 0; i < json_array_size(cases); i++)
        check_case(json_array_get(cases, i));
    json_decref(root);
}

static void prompts_of_java_are_read(void **state)
{
    (void)state;
    json_t *root = load("tests/fixtures/java/java_cases.json");
    json_t *cases = json_object_get(root, "prompts");
    assert_int_equal(json_array_size(cases), 5);
    for (size_t i = 0; i < json_array_size(cases); i++)
        check_case(json_array_get(cases, i));
    json_decref(root);
}

static void completions_equal_fastavros(void **state)
{
    (void)state;
    json_t *root = fixtures(), *c = json_object_get(root, "completion"), *back;
    unsigned char *want;
    size_t n = fixture_bytes(c, &want), len = 0;
    struct avro_plan *p = plan_of(schema_completion_text);
    void *got = NULL;
    struct lm_err err = { 0 };
    if (avro_encode(p, json_object_get(c, "json"), 5, &got, &len, &err) != LM_OK)
        fail_msg("%s", err.msg);
    assert_int_equal(len, n + 5);
    assert_memory_equal((char *)got + 5, want, n);
    assert_int_equal(decode_exact(p, want, n, &back, &err), LM_OK);
    json_decref(back);
    free(got);
    free(want);
    avro_plan_free(p);
    json_decref(root);
}

static void encoding_names_what_does_not_fit(void **state)
{
    (void)state;
    static const struct { const char *type, *json, *says; } rows[] = {
        { "\"int\"", "{\"f\": \"x\"}", "f does not fit the schema" },
        { "\"int\"", "{\"f\": 2147483648}", "f does not fit the schema" },
        { "\"int\"", "{}", "f is missing" },
        { "[\"null\",\"int\"]", "{\"f\": \"x\"}", "f fits no branch of the schema's union" },
        { "{\"type\":\"array\",\"items\":\"int\"}", "{\"f\": [1, null]}", "f[] does not fit" },
        { "{\"type\":\"map\",\"values\":\"int\"}", "{\"f\": {\"k\": []}}", "f.k does not fit" },
    };
    for (size_t i = 0; i < LM_COUNT(rows); i++) {
        char schema[256];
        snprintf(schema, sizeof schema, FIELD("%s"), rows[i].type);
        struct avro_plan *p = plan_of(schema);
        json_t *j = json_loads(rows[i].json, 0, NULL);
        void *out = NULL;
        size_t len = 0;
        struct lm_err err = { 0 };
        assert_int_equal(avro_encode(p, j, 0, &out, &len, &err), LM_MISMATCH);
        if (!strstr(err.msg, rows[i].says))
            fail_msg("%s: %s", rows[i].json, err.msg);
        json_decref(j);
        avro_plan_free(p);
    }
}

/* ---- the shipped schemas -------------------------------------------------------------------- */

static void check_text(const char *path, const char *text)
{
    char buf[32768];
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    size_t n = fread(buf, 1, sizeof buf - 1, f);
    fclose(f);
    buf[n] = '\0';
    if (strcmp(buf, text) != 0)
        fail_msg("%s differs from worker/codec/schema_text.c: run schemas/embed", path);
}

static void embedded_text_is_the_files(void **state)
{
    (void)state;
    check_text("schemas/prompt.avsc", schema_prompt_text);
    check_text("schemas/completion.avsc", schema_completion_text);
}

static const struct avro_node *field_of(const struct avro_node *n, const char *name)
{
    for (int i = 0; i < n->n; i++)
        if (strcmp(n->field[i].name, name) == 0)
            return n->child[i];
    return NULL;
}

/* Every parameter that JSON knows has its field, and no other: and so for the prompt itself. */
static void prompt_schema_mirrors_json(void **state)
{
    (void)state;
    static const char *const top[] = { "id", "adapter", "prompt", "prompt_token_ids", "messages",
        "context", "params", "priority", "deadline_ms", "first_token_by_ms", "tenant",
        "reply_topic", "correlation_id", "model", "stream", "metadata" };
    struct avro_plan *p = plan_of(schema_prompt_text);
    const struct avro_node *root = avro_plan_root(p);
    assert_int_equal(root->n, LM_COUNT(top));
    for (size_t i = 0; i < LM_COUNT(top); i++)
        assert_non_null(field_of(root, top[i]));
    const struct avro_node *params = field_of(root, "params")->child[1];
    int missing = 0, known = 0;
    for (const char *const *name = json_param_names; *name; name++, known++)
        missing += !field_of(params, *name);
    assert_int_equal(missing, 1);       /* max_completion_tokens, a second name for max_tokens */
    assert_int_equal(params->n, known - 1);
    avro_plan_free(p);
}

static void documented(const struct avro_node *n, const char *doc)
{
    for (int i = 0; i < n->n && n->type != AVRO_ENUM; i++) {
        char quoted[300], member[300];
        const char *name = n->type == AVRO_RECORD ? n->field[i].name : NULL;
        if (name) {
            snprintf(quoted, sizeof quoted, "`%s`", name);
            snprintf(member, sizeof member, ".%s`", name);
            if (!strstr(doc, quoted) && !strstr(doc, member) && strcmp(name, "role") != 0 &&
                strcmp(name, "content") != 0)
                fail_msg("docs/messages.md doesn't explain %s", name);
        }
        documented(n->child[i], doc);
    }
}

static void every_field_is_documented(void **state)
{
    (void)state;
    static char doc[1 << 16];
    FILE *f = fopen("docs/messages.md", "rb");
    assert_non_null(f);
    doc[fread(doc, 1, sizeof doc - 1, f)] = '\0';
    fclose(f);
    struct avro_plan *prompt = plan_of(schema_prompt_text);
    struct avro_plan *completion = plan_of(schema_completion_text);
    documented(avro_plan_root(prompt), doc);
    documented(avro_plan_root(completion), doc);
    avro_plan_free(prompt);
    avro_plan_free(completion);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_schemas_are_refused),
        cmocka_unit_test(threads_share_no_error),
        cmocka_unit_test(large_schemas_are_refused),
        cmocka_unit_test(lying_data_are_refused),
        cmocka_unit_test(want_of_memory_is_no_fault_of_the_text),
        cmocka_unit_test(blocks_with_sizes_are_read),
        cmocka_unit_test(the_last_of_equal_keys_counts),
        cmocka_unit_test(fields_without_bytes_end_a_datum),
        cmocka_unit_test(runs_of_nulls_are_counted),
        cmocka_unit_test(a_plan_forgets_the_last_datum),
        cmocka_unit_test(text_that_is_not_utf8_is_refused),
        cmocka_unit_test(bombs_cost_nothing),
        cmocka_unit_test(counts_are_capped),
        cmocka_unit_test(many_small_maps_are_read),
        cmocka_unit_test(prompts_of_fastavro_are_read),
        cmocka_unit_test(prompts_of_java_are_read),
        cmocka_unit_test(completions_equal_fastavros),
        cmocka_unit_test(encoding_names_what_does_not_fit),
        cmocka_unit_test(embedded_text_is_the_files),
        cmocka_unit_test(prompt_schema_mirrors_json),
        cmocka_unit_test(every_field_is_documented),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
