/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_batch.c - OpenAI Batch lines in and out, the output file that can be resumed, and the
 * walk over a folder of adapters. No engine is needed.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "folder.h"
#include "worker/store/adapter_dirs.h"
#include "worker/tools/batch_output.h"
#include "worker/tools/openai.h"

static char *path_of(const char *name)
{
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

static void put(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static char *get(const char *path)
{
    static char text[4096];
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    size_t n = fread(text, 1, sizeof text - 1, f);
    text[n] = '\0';
    fclose(f);
    return text;
}

/* ---- requests -------------------------------------------------------------------------- */

#define COMPLETION(body) \
    "{\"custom_id\":\"c\",\"method\":\"POST\",\"url\":\"/v1/completions\",\"body\":" body "}"
#define CHAT(body) \
    "{\"custom_id\":\"c\",\"method\":\"POST\",\"url\":\"/v1/chat/completions\",\"body\":" body "}"
#define BODY(more) "{\"model\":\"base\",\"prompt\":\"x\"" more "}"

static void test_completion_is_read(void **state)
{
    (void)state;
    const char line[] = COMPLETION("{\"model\":\"brand/voice\",\"prompt\":\"a\\u0000b\","
                                   "\"max_tokens\":5,\"temperature\":0,\"stop\":[\"x\",\"y\"],"
                                   "\"user\":\"u\",\"stream\":false,\"n\":2,\"best_of\":2}");
    struct openai_request *q;
    struct lm_err err = { 0 };
    assert_int_equal(openai_parse(line, sizeof line - 1, "base", &q, &err), LM_OK);
    assert_string_equal(q->custom_id, "c");
    assert_string_equal(q->adapter, "brand/voice");
    assert_int_equal(q->prompt_len, 3);
    assert_memory_equal(q->prompt, "a\0b", 3);
    assert_int_equal(q->params.max_tokens, 5);
    assert_int_equal(q->params.n_stop, 2);
    assert_int_equal(q->params.n, 2);
    assert_true(q->params.set & ENGINE_SET_TEMPERATURE);
    openai_request_free(q);
}

static void test_base_model_is_no_adapter(void **state)
{
    (void)state;
    const char line[] = CHAT("{\"model\":\"base\",\"messages\":[{\"role\":\"user\",\"content\":"
                             "[{\"type\":\"text\",\"text\":\"a\"},"
                             "{\"type\":\"text\",\"text\":\"b\"}]}],"
                             "\"logprobs\":true,\"top_logprobs\":3,"
                             "\"response_format\":{\"type\":\"text\"},\"tools\":[]}");
    struct openai_request *q;
    struct lm_err err = { 0 };
    assert_int_equal(openai_parse(line, sizeof line - 1, "base", &q, &err), LM_OK);
    assert_null(q->adapter);
    assert_int_equal(q->n_messages, 1);
    assert_string_equal(q->messages[0].content, "ab");
    assert_int_equal(q->params.logprobs, 3);
    openai_request_free(q);
}

static const struct bad_line {
    const char *line, *says;
    lm_status status;
} bad_lines[] = {
    { "", "", LM_FORMAT },
    { "[1]", "object", LM_FORMAT },
    { "{\"custom_id\":\"c\"", "", LM_FORMAT },
    { "{\"method\":\"POST\"}", "custom_id", LM_INVALID },
    { "{\"custom_id\":\"\",\"method\":\"POST\"}", "custom_id", LM_INVALID },
    { "{\"custom_id\":7}", "custom_id", LM_INVALID },
    { "{\"custom_id\":\"c\",\"method\":\"GET\",\"url\":\"/v1/completions\",\"body\":{}}",
      "method must be POST", LM_INVALID },
    { "{\"custom_id\":\"c\",\"method\":\"POST\",\"url\":\"/v1/embeddings\",\"body\":{}}",
      "not \"/v1/embeddings\"", LM_INVALID },
    { "{\"custom_id\":\"c\",\"method\":\"POST\",\"url\":\"/v1/completions\"}", "body", LM_INVALID },
    { "{\"custom_id\":\"c\",\"method\":\"POST\",\"url\":\"/v1/completions\",\"body\":{},"
      "\"bodi\":1}",
      "bodi", LM_INVALID },
    { COMPLETION("{\"prompt\":\"x\"}"), "body.model", LM_INVALID },
    { COMPLETION("{\"model\":\"../x\",\"prompt\":\"x\"}"), "neither the base model", LM_INVALID },
    { COMPLETION("{\"model\":\"base\"}"), "body.prompt", LM_INVALID },
    { COMPLETION("{\"model\":\"base\",\"prompt\":[\"a\",\"b\"]}"), "line of its own",
      LM_UNSUPPORTED },
    { COMPLETION("{\"model\":\"base\",\"prompt\":[1,-2]}"), "body.prompt", LM_INVALID },
    { COMPLETION("{\"model\":\"base\",\"prompt\":[]}"), "body.prompt", LM_UNSUPPORTED },
    { COMPLETION(BODY(",\"max_token\":3")), "max_token", LM_INVALID },
    { COMPLETION(BODY(",\"max_tokens\":-3")), "body.max_tokens", LM_INVALID },
    { COMPLETION(BODY(",\"stream\":true")), "body.stream", LM_UNSUPPORTED },
    { COMPLETION(BODY(",\"best_of\":3")), "body.best_of", LM_UNSUPPORTED },
    { COMPLETION(BODY(",\"suffix\":\"s\"")), "body.suffix", LM_UNSUPPORTED },
    { COMPLETION(BODY(",\"logit_bias\":{\"5\":1}")), "body.logit_bias", LM_UNSUPPORTED },
    { COMPLETION(BODY(",\"response_format\":{\"type\":\"json_object\"}")),
      "body.response_format", LM_UNSUPPORTED },
    { COMPLETION(BODY(",\"response_format\":{\"type\":\"text\\u0000x\"}")),
      "body.response_format", LM_UNSUPPORTED },
    { CHAT("{\"model\":\"base\"}"), "body.messages", LM_INVALID },
    { CHAT("{\"model\":\"base\",\"messages\":[]}"), "body.messages", LM_INVALID },
    { CHAT("{\"model\":\"base\",\"messages\":[{\"role\":\"user\",\"content\":"
           "[{\"type\":\"image_url\"}]}]}"), "only text", LM_UNSUPPORTED },
    { CHAT("{\"model\":\"base\",\"messages\":[{\"role\":\"wizard\",\"content\":\"x\"}]}"), "role",
      LM_INVALID },
    { CHAT("{\"model\":\"base\",\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],"
           "\"tools\":[{}]}"), "body.tools", LM_UNSUPPORTED },
};

static void test_bad_lines_are_refused_by_name(void **state)
{
    (void)state;
    for (size_t i = 0; i < LM_COUNT(bad_lines); i++) {
        const struct bad_line *b = &bad_lines[i];
        struct openai_request *q;
        struct lm_err err = { 0 };
        lm_status st = openai_parse(b->line, strlen(b->line), "base", &q, &err);
        if (st != b->status || !strstr(err.msg, b->says))
            fail_msg("%s: got %s, \"%s\"", b->line, lm_status_wire(st), err.msg);
        openai_request_free(q);
    }
}

static void test_error_keeps_the_custom_id(void **state)
{
    (void)state;
    const char line[] = COMPLETION(BODY(",\"max_token\":3"));
    struct openai_request *q;
    struct lm_err err = { 0 };
    openai_parse(line, sizeof line - 1, "base", &q, &err);
    json_t *out = openai_error_line("batch_req_1", q->custom_id, &err);
    assert_non_null(out);
    assert_string_equal(json_string_value(json_object_get(out, "custom_id")), "c");
    const json_t *response = json_object_get(out, "response");
    assert_int_equal(json_integer_value(json_object_get(response, "status_code")), 400);
    json_decref(out);
    openai_request_free(q);
}

/* ---- results --------------------------------------------------------------------------- */

static const char *at(const json_t *root, const char *key)
{
    return json_string_value(json_object_get(root, key));
}

static void test_chat_result_line(void **state)
{
    (void)state;
    char piece[] = "\xe2\x80";  /* part of a character */
    struct engine_top top = { .id = 4, .logprob = -INFINITY, .text = piece };
    struct engine_token tok = { .id = 3, .logprob = NAN, .text = piece, .text_len = 2,
                                .top = &top, .n_top = 1 };
    char text[] = "hi";
    struct engine_choice choice = { .text = text, .text_len = 2, .reason = ENGINE_STOP,
                                    .logprobs = &tok, .n_logprobs = 1 };
    struct engine_result res = { .choices = &choice, .n_choices = 1, .prompt_tokens = 3,
                                 .completion_tokens = 1 };
    struct openai_request q = { .kind = OPENAI_CHAT, .custom_id = "c", .model = "voice" };
    json_t *line = openai_result_line("batch_req_7", &q, "sha256:00", &res);
    assert_non_null(line);
    const json_t *body = json_object_get(json_object_get(line, "response"), "body");
    assert_string_equal(at(body, "object"), "chat.completion");
    assert_string_equal(at(body, "adapter_digest"), "sha256:00");
    const json_t *c = json_array_get(json_object_get(body, "choices"), 0);
    assert_string_equal(at(json_object_get(c, "message"), "content"), "hi");
    assert_string_equal(at(c, "finish_reason"), "stop");
    const json_t *t = json_array_get(json_object_get(json_object_get(c, "logprobs"), "content"), 0);
    assert_true(json_is_null(json_object_get(t, "logprob")));
    assert_int_equal(json_array_size(json_object_get(t, "bytes")), 2);
    const json_t *alt = json_array_get(json_object_get(t, "top_logprobs"), 0);
    assert_true(json_real_value(json_object_get(alt, "logprob")) == -9999.0);
    json_decref(line);
}

/* ---- the output file ------------------------------------------------------------------- */

static void test_resume_cuts_a_torn_line(void **state)
{
    (void)state;
    char *p = path_of("torn");
    put(p, "{\"id\":\"batch_req_000002\",\"text\":\"\\u0000\"}\n"
           "{\"id\":\"batch_req_000900\"}\n{\"id\":\"batch_re");
    batch_output *o;
    struct lm_err err = { 0 };
    assert_int_equal(batch_output_open(p, true, &o, &err), LM_OK);
    assert_true(batch_output_has(o, 2));
    assert_true(batch_output_has(o, 900));
    assert_false(batch_output_has(o, 1));
    assert_false(batch_output_has(o, 901));
    assert_false(batch_output_has(o, UINT64_MAX));
    char id[BATCH_ID_CHARS];
    batch_id(id, 1);
    assert_int_equal(batch_output_write(o, json_pack("{s:s}", "id", id), &err), LM_OK);
    assert_int_equal(batch_output_close(o, &err), LM_OK);
    assert_string_equal(get(p), "{\"id\":\"batch_req_000002\",\"text\":\"\\u0000\"}\n"
                                "{\"id\":\"batch_req_000900\"}\n"
                                "{\"id\":\"batch_req_000001\"}\n");
}

static void test_resume_refuses_a_foreign_file(void **state)
{
    (void)state;
    char *p = path_of("foreign");
    put(p, "my letters to Milena\n");
    batch_output *o;
    struct lm_err err = { 0 };
    assert_int_equal(batch_output_open(p, true, &o, &err), LM_FORMAT);
    assert_non_null(strstr(err.msg, "--resume"));
    assert_string_equal(get(p), "my letters to Milena\n");
}

static void test_output_errors_have_a_reason(void **state)
{
    (void)state;
    batch_output *o;
    struct lm_err err = { 0 };
    assert_int_equal(batch_output_open("/no/such/folder/x", false, &o, &err), LM_IO);
    assert_non_null(strstr(err.msg, "/no/such/folder/x"));
    assert_int_equal(batch_output_open("/dev/full", false, &o, &err), LM_OK);
    assert_int_equal(batch_output_write(o, json_pack("{s:i}", "a", 1), &err), LM_IO);
    assert_non_null(strstr(err.msg, "No space left"));
    batch_output_close(o, NULL);
}

/* ---- adapter folders ------------------------------------------------------------------- */

static lm_status note(void *ctx, const char *id, const char *where, struct lm_err *err)
{
    (void)where;
    (void)err;
    char *all = ctx;
    strncat(all, id, 200);
    strncat(all, ";", 2);
    return LM_OK;
}

static void test_adapters_are_found(void **state)
{
    (void)state;
    static const char *const made[] = { "ads", "ads/b", "ads/a", "ads/brand", "ads/brand/voice",
                                        "ads/.hidden", "ads/empty" };
    static const char *const configs[] = { "ads/b", "ads/a", "ads/brand/voice", "ads/.hidden" };
    for (size_t i = 0; i < LM_COUNT(made); i++)
        assert_int_equal(mkdir(path_of(made[i]), 0777), 0);
    for (size_t i = 0; i < LM_COUNT(configs); i++) {
        char name[64];
        snprintf(name, sizeof name, "%s/adapter_config.json", configs[i]);
        put(path_of(name), "{}");
    }
    put(path_of("ads/notes.txt"), "");
    char all[256] = "";
    struct lm_err err = { 0 };
    assert_int_equal(adapter_dirs_each(path_of("ads"), note, all, &err), LM_OK);
    assert_string_equal(all, "a;b;brand/voice;");
    assert_int_equal(adapter_dirs_each(path_of("none"), note, all, &err), LM_NOT_FOUND);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_completion_is_read),
        cmocka_unit_test(test_base_model_is_no_adapter),
        cmocka_unit_test(test_bad_lines_are_refused_by_name),
        cmocka_unit_test(test_error_keeps_the_custom_id),
        cmocka_unit_test(test_chat_result_line),
        cmocka_unit_test(test_resume_cuts_a_torn_line),
        cmocka_unit_test(test_resume_refuses_a_foreign_file),
        cmocka_unit_test(test_output_errors_have_a_reason),
        cmocka_unit_test(test_adapters_are_found),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
