/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_safetensors.c - right files are read exactly, wrong ones are refused, each with its message.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <sys/stat.h>
#include <unistd.h>

#include "folder.h"
#include "engine/safetensors.h"
#include "tests/unit/safetensors_build.h"

#define T(dtype, shape, a, b) \
    "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #a "," #b "]}"

struct bad {
    const char *header;
    size_t data_n;
    lm_status status;
    const char *says;
};

static const struct bad bad_headers[] = {
    { "[]", 0, LM_FORMAT, "does not start with '{'" },
    { " {}", 0, LM_FORMAT, "does not start with '{'" },
    { "{", 0, LM_FORMAT, "line 1" },
    { "{} x", 0, LM_FORMAT, "end of file expected" },
    { "{\"a\":1}", 0, LM_FORMAT, "tensor a: is not a JSON object" },
    { "{\"a\":" T("F32", "[1]", 0, 4) ",\"a\":" T("F32", "[1]", 4, 8) "}", 8, LM_FORMAT,
      "duplicate" },
    { "{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, LM_FORMAT, "dtype is missing" },
    { "{\"a\":{\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, LM_FORMAT,
      "dtype is 7, expected a string" },
    { "{\"a\":" T("F31", "[1]", 0, 4) "}", 4, LM_FORMAT, "dtype \"F31\" is unknown" },
    { "{\"a\":" T("F32", "4", 0, 4) "}", 4, LM_FORMAT, "shape is 4, expected a list" },
    { "{\"a\":" T("F32", "[-1]", 0, 4) "}", 4, LM_FORMAT, "shape is [-1]" },
    { "{\"a\":" T("F32", "[1.0]", 0, 4) "}", 4, LM_FORMAT, "shape is [1.0]" },
    { "{\"a\":" T("F32", "[1,1,1,1,1,1,1,1,1]", 0, 4) "}", 4, LM_FORMAT, "9 dimensions" },
    { "{\"a\":" T("F32", "[4611686018427387904,4]", 0, 4) "}", 4, LM_FORMAT, "shape overflows" },
    { "{\"a\":" T("F32", "[576460752303423488]", 0, 4) "}", 4, LM_FORMAT, "shape overflows" },
    { "{\"a\":" T("F32", "[99999999999999999999]", 0, 4) "}", 4, LM_FORMAT, "too big" },
    { "{\"a\":" T("F4", "[3]", 0, 1) "}", 1, LM_FORMAT, "whole bytes" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, LM_FORMAT, "data_offsets is missing" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", 4, LM_FORMAT,
      "expected two integers" },
    { "{\"a\":" T("F32", "[1]", 0, 8) "}", 4, LM_FORMAT, "leave the file's 4 bytes" },
    { "{\"a\":" T("F32", "[1]", 4, 0) "}", 4, LM_FORMAT, "leave the file's" },
    { "{\"a\":" T("F32", "[1]", -4, 0) "}", 4, LM_FORMAT, "leave the file's" },
    { "{\"a\":" T("F32", "[2]", 0, 4) "}", 4, LM_FORMAT, "span 4 bytes, dtype and shape need 8" },
    { "{\"a\":" T("F32", "[1]", 0, 4) ",\"b\":" T("F32", "[1]", 2, 6) "}", 6, LM_FORMAT,
      "tensor b: overlaps" },
    { "{\"a\":" T("F32", "[1]", 0, 4) ",\"b\":" T("F32", "[1]", 0, 4) "}", 4, LM_FORMAT,
      "overlaps" },
    { "{\"a\":" T("F32", "[1]", 4, 8) "}", 8, LM_FORMAT, "tensor a: leaves a hole before it" },
    { "{\"a\":" T("F32", "[1]", 0, 4) "}", 9, LM_FORMAT, "5 bytes after the last tensor" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"scale\":2}}", 4, LM_FORMAT,
      "unknown key \"scale\"" },
    { "{\"__metadata__\":[]}", 0, LM_FORMAT, "__metadata__ is not a JSON object" },
    { "{\"__metadata__\":{\"a\":1}}", 0, LM_FORMAT, "__metadata__ \"a\" is not a string" },
};

static void refuses_bad_headers(void **state)
{
    (void)state;
    for (size_t i = 0; i < LM_COUNT(bad_headers); i++) {
        const struct bad *b = &bad_headers[i];
        size_t n;
        uint8_t *p = st_image(b->header, b->data_n, &n);
        safetensors *st = NULL;
        struct lm_err err = { 0 };
        lm_status s = safetensors_open_memory(p, n, "x.safetensors", &st, &err);
        if (s != b->status || !strstr(err.msg, b->says) || !strstr(err.msg, "x.safetensors"))
            fail_msg("%s: status %d, \"%s\"", b->header, s, err.msg);
        free(p);
    }
}

static void open_raw(const void *bytes, size_t n, lm_status want, const char *says)
{
    safetensors *st = NULL;
    struct lm_err err = { 0 };
    void *p = malloc(n ? n : 1);
    memcpy(p, bytes, n);
    assert_int_equal(safetensors_open_memory(p, n, "x", &st, &err), want);
    assert_non_null(strstr(err.msg, says));
    free(p);
}

static void refuses_bad_lengths(void **state)
{
    (void)state;
    open_raw("", 0, LM_FORMAT, "too short");
    open_raw("\2\0\0\0\0\0\0", 7, LM_FORMAT, "too short");
    open_raw("\0\0\0\0\0\0\0\0", 8, LM_FORMAT, "does not start");
    open_raw("\3\0\0\0\0\0\0\0{}", 10, LM_FORMAT, "cut short");
    open_raw("\377\377\377\377\377\377\377\377{}", 10, LM_TOO_LARGE, "the limit is");
    open_raw("\2\0\0\0\0\0\0\1{}", 10, LM_TOO_LARGE, "the limit is");
}

/* Every prefix of a good file is refused, none crashes. */
static void refuses_every_prefix(void **state)
{
    (void)state;
    size_t n;
    uint8_t *p = st_image("{\"a\":" T("F32", "[2]", 0, 8) ",\"b\":" T("U8", "[3]", 8, 11) "}", 11,
                          &n);
    for (size_t k = 0; k < n; k++) {
        uint8_t *part = malloc(k ? k : 1);
        memcpy(part, p, k);
        safetensors *st = NULL;
        assert_int_not_equal(safetensors_open_memory(part, k, "x", &st, NULL), LM_OK);
        free(part);
    }
    free(p);
}

static void reads_tensors(void **state)
{
    (void)state;
    size_t n;
    uint8_t *p = st_image("{\"__metadata__\":{\"format\":\"pt\"},\"z\":" T("BF16", "[2,1,3]", 0, 12)
                          ",\"scalar\":" T("F16", "[]", 12, 14)
                          ",\"none\":" T("F32", "[0,5]", 14, 14)
                          ",\"six\":" T("F6_E2M3", "[4]", 14, 17) "}   ", 17, &n);
    safetensors *st = NULL;
    struct lm_err err = { 0 };
    assert_int_equal(safetensors_open_memory(p, n, "x", &st, &err), LM_OK);
    assert_int_equal(safetensors_count(st), 4);
    const struct st_tensor *t = safetensors_find(st, "z");
    assert_non_null(t);
    assert_true(t->is_float);
    assert_int_equal(t->dtype, KN_BF16);
    assert_int_equal(t->n_dims, 3);
    assert_int_equal(t->shape[2], 3);
    assert_int_equal(t->bytes, 12);
    assert_memory_equal(t->data, p + n - 17, 12);
    assert_int_equal(safetensors_find(st, "scalar")->n_dims, 0);
    assert_int_equal(safetensors_find(st, "none")->bytes, 0);
    assert_false(safetensors_find(st, "six")->is_float);
    assert_string_equal(safetensors_find(st, "six")->dtype_name, "F6_E2M3");
    assert_null(safetensors_find(st, "zz"));
    assert_null(safetensors_find(st, "__metadata__"));
    assert_null(safetensors_at(st, 4));
    assert_string_equal(safetensors_at(st, 0)->name, "none");       /* by name */
    safetensors_close(st);
    free(p);
}

/* The format does not promise alignment; the reader does. */
static void aligns_tensors(void **state)
{
    (void)state;
    for (int pad = 0; pad < 8; pad++) {
        char header[160];
        snprintf(header, sizeof header, "{\"a\":" T("U8", "[1]", 0, 1) ",\"b\":"
                 T("F32", "[1]", 1, 5) "}%*s", pad, "");
        size_t n;
        uint8_t *p = st_image(header, 5, &n);
        safetensors *st = NULL;
        assert_int_equal(safetensors_open_memory(p, n, "x", &st, NULL), LM_OK);
        const struct st_tensor *t = safetensors_find(st, "b");
        assert_int_equal((uintptr_t)t->data % sizeof(float), 0);
        assert_memory_equal(t->data, "\1\2\3\4", 4);
        safetensors_close(st);
        free(p);
    }
}

/* ---- folders --------------------------------------------------------------------------- */

static const char *in_dir(const char *name)
{
    static char path[2][160];
    static int turn;
    turn = !turn;
    snprintf(path[turn], sizeof path[turn], "%s/%s", dir, name);
    return path[turn];
}

static void write_shards(void)
{
    struct st_writer w = { 0 };
    st_writer_add(&w, "one", "F32", 2, 3, 1);
    st_writer_save(&w, in_dir("a.safetensors"));
    st_writer_add(&w, "two", "F32", 1, 3, 2);
    st_writer_add(&w, "extra", "F32", 1, 1, 5);
    st_writer_save(&w, in_dir("b.safetensors"));
}

static void index_case(const char *index, lm_status want, const char *says)
{
    write_text(in_dir("model.safetensors.index.json"), index);
    safetensors *st = NULL;
    struct lm_err err = { 0 };
    lm_status s = safetensors_open_model(dir, &st, &err);
    if (s != want || !strstr(err.msg, says))
        fail_msg("%s: status %d, \"%s\"", index, s, err.msg);
    safetensors_close(st);
}

static void reads_shards(void **state)
{
    (void)state;
    write_shards();
    write_text(in_dir("model.safetensors.index.json"), "{\"metadata\":{\"total_size\":1},"
               "\"weight_map\":{\"one\":\"a.safetensors\",\"two\":\"b.safetensors\"}}");
    safetensors *st = NULL;
    assert_int_equal(safetensors_open_model(dir, &st, NULL), LM_OK);
    assert_int_equal(safetensors_count(st), 3);
    const float *two = safetensors_find(st, "two")->data;
    assert_true(two[0] == 2.0f && two[2] == 2.25f);
    safetensors_close(st);
}

static void refuses_bad_indexes(void **state)
{
    (void)state;
    struct lm_err err;
    safetensors *st = NULL;
    assert_int_equal(safetensors_open_model(dir, &st, &err), LM_NOT_FOUND);
    assert_non_null(strstr(err.msg, "pickle"));
    write_shards();
    index_case("{}", LM_FORMAT, "weight_map is missing");
    index_case("{\"weight_map\":{}}", LM_FORMAT, "0 shards");
    index_case("{\"weight_map\":{\"one\":\"../a.safetensors\"}}", LM_FORMAT, "tensor one");
    index_case("{\"weight_map\":{\"one\":\"/etc/passwd\"}}", LM_FORMAT, "tensor one");
    index_case("{\"weight_map\":{\"one\":\"..\"}}", LM_FORMAT, "tensor one");
    index_case("{\"weight_map\":{\"one\":\"\"}}", LM_FORMAT, "tensor one");
    index_case("{\"weight_map\":{\"one\":3}}", LM_FORMAT, "tensor one");
    index_case("{\"weight_map\":{\"one\":\"c.safetensors\"}}", LM_NOT_FOUND, "c.safetensors");
    index_case("{\"weight_map\":{\"nine\":\"a.safetensors\"}}", LM_FORMAT,
               "tensor nine is not in a.safetensors");
    struct st_writer w = { 0 };
    st_writer_add(&w, "one", "F32", 2, 3, 1);
    st_writer_save(&w, in_dir("b.safetensors"));
    index_case("{\"weight_map\":{\"one\":\"a.safetensors\",\"x\":\"b.safetensors\"}}", LM_FORMAT,
               "tensor one: is in more than one shard");
}

static void refuses_what_is_no_file(void **state)
{
    (void)state;
    safetensors *st = NULL;
    struct lm_err err;
    assert_int_equal(safetensors_open(dir, &st, &err), LM_FORMAT);
    assert_non_null(strstr(err.msg, "not a regular file"));
    assert_int_equal(mkfifo(in_dir("fifo"), 0600), 0);
    assert_int_equal(safetensors_open(in_dir("fifo"), &st, &err), LM_FORMAT);
    write_text(in_dir("a.safetensors"), "");
    assert_int_equal(safetensors_open(in_dir("a.safetensors"), &st, &err), LM_FORMAT);
    assert_non_null(strstr(err.msg, "is empty"));
    assert_int_equal(safetensors_open(in_dir("none"), &st, &err), LM_NOT_FOUND);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refuses_bad_headers),
        cmocka_unit_test(refuses_bad_lengths),
        cmocka_unit_test(refuses_every_prefix),
        cmocka_unit_test(reads_tensors),
        cmocka_unit_test(aligns_tensors),
        cmocka_unit_test_setup_teardown(reads_shards, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(refuses_bad_indexes, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(refuses_what_is_no_file, make_dir, remove_dir),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
