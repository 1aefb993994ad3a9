/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_json_prompt.c - JSON prompts: what is read, and what is refused with which words.
 *
 * `refusals` is the list of malformed messages; each row has its own error text, since a producer
 * has nothing else to find his mistake by.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/codec/codec.h"

struct refusal { const char *json; lm_status code; const char *says; };

#define P "\"id\": \"1\", \"prompt\": \"x\""
#define PARAMS(s) "{" P ", \"params\": {" s "}}"

static const struct refusal refusals[] = {
    /* form */
    { "", LM_FORMAT, "not valid JSON" },
    { "{", LM_FORMAT, "not valid JSON at line 1 column 2" },
    { "{" P "} trailing", LM_FORMAT, "unexpected content after document" },
    { "[1, 2]", LM_FORMAT, "must be a JSON object" },
    { "\"text\"", LM_FORMAT, "must be a JSON object" },
    { "null", LM_FORMAT, "must be a JSON object" },
    { "{" P ", \"id\": \"2\"}", LM_FORMAT, "duplicate object key 'id'" },
    { "{" P ", \"metadata\": {\"a\": \"1\", \"a\": \"2\"}}", LM_FORMAT,
      "duplicate object key 'a'" },
    { "{" P ", \"metadata\": {\"It hurts\": \"1\", \"It hurts\": \"2\"}}", LM_FORMAT,
      "duplicate object key of 8 bytes" },
    { "{\"id\": \"\xff\", \"prompt\": \"x\"}", LM_FORMAT, "column 9: invalid UTF-8" },
    { "{\"id\": \"\xed\xa0\x80\", \"prompt\": \"x\"}", LM_FORMAT, "column 9: invalid UTF-8" },
    { "{\"id\": \"\\ud800\", \"prompt\": \"x\"}", LM_FORMAT, "no low surrogate" },
    { "{" P ", \"priority\": 99999999999999999999}", LM_FORMAT,
      "too big number of 20 characters" },
    { PARAMS("\"top_p\": 1e999"), LM_FORMAT, "too big number of 5 characters" },
    { PARAMS("\"top_p\": NaN"), LM_FORMAT, "expected a valid JSON value" },
    { "{\"i\\u0000d\": \"1\"}", LM_FORMAT, "NUL byte in object key of 3 bytes" },
    /* names */
    { "{\"idd\": \"1\", \"prompt\": \"x\"}", LM_INVALID,
      "idd is not a known key; did you mean id?" },
    { "{" P ", \"adaptor\": \"a\"}", LM_INVALID,
      "adaptor is not a known key; did you mean adapter?" },
    { "{" P ", \"Adapter\": \"a\"}", LM_INVALID,
      "Adapter is not a known key; did you mean adapter?" },
    { "{" P ", \"zebra\": 1}", LM_INVALID, "zebra is not a known key (docs" },
    { "{" P ", \"zebra\": null}", LM_INVALID, "zebra is not a known key" },
    { "{" P ", \"\": 1}", LM_INVALID, "is not a known key" },
    { "{" P ", \"It hurts\": 1}", LM_INVALID, "a key of 8 bytes is not a known key (docs" },
    { "{" P ", \"id \": \"1\"}", LM_INVALID,
      "a key of 3 bytes is not a known key; did you mean id?" },
    { PARAMS("\"It hurts\": 1"), LM_INVALID, "params.a key of 8 bytes is not a known key" },
    { PARAMS("\"temprature\": 1"), LM_INVALID,
      "params.temprature is not a known key; did you mean params.temperature?" },
    { "{" P ", \"max_tokens\": 5}", LM_INVALID, "max_tokens is a sampling parameter" },
    { "{" P ", \"adapter_version\": \"3\"}", LM_UNSUPPORTED, "adapter_version is not served yet" },
    { "{" P ", \"adapter_digest\": \"sha256:00\"}", LM_UNSUPPORTED,
      "adapter_digest is not served yet" },
    { "{" P ", \"response_format\": {\"type\": \"json_object\"}}", LM_UNSUPPORTED,
      "response_format is not served yet" },
    { "{" P ", \"tools\": []}", LM_UNSUPPORTED, "tools is not served yet" },
    { "{" P ", \"stream\": \"It hurts\"}", LM_INVALID, "true or false, not a string of 8 bytes" },
    { "{" P ", \"adapter\": \"It hurts\"}", LM_INVALID,
      "adapter: adapter id of 8 bytes: byte 2 is not allowed" },
    { "{" P ", \"adapter\": \"acme//warm\"}", LM_INVALID,
      "adapter: adapter id 'acme//warm': byte 5 is not allowed" },
    { "{" P ", \"stream\": \"no\"}", LM_INVALID, "stream must be true or false, not \"no\"" },
    { PARAMS("\"logit_bias\": {\"5\": 1}"), LM_UNSUPPORTED, "params.logit_bias is not served yet" },
    { PARAMS("\"response_format\": {}"), LM_UNSUPPORTED, "params.response_format is not served" },
    { PARAMS("\"best_of\": 2"), LM_UNSUPPORTED, "params.best_of is not served yet" },
    /* id, adapter */
    { "{\"prompt\": \"x\"}", LM_INVALID, "id is missing" },
    { "{\"id\": null, \"prompt\": \"x\"}", LM_INVALID, "id is missing" },
    { "{\"id\": 7, \"prompt\": \"x\"}", LM_INVALID, "id must be a string, not a number" },
    { "{\"id\": \"\", \"prompt\": \"x\"}", LM_INVALID, "id must not be empty" },
    { "{\"id\": \"a\\u0000b\", \"prompt\": \"x\"}", LM_INVALID, "id must not contain U+0000" },
    { "{\"id\": \"a\\nb\", \"prompt\": \"x\"}", LM_INVALID, "id must not contain control" },
    { "{" P ", \"adapter\": \"\"}", LM_INVALID, "adapter must not be empty; leave it out" },
    { "{" P ", \"adapter\": 5}", LM_INVALID, "adapter must be a string, not a number" },
    { "{" P ", \"adapter\": [\"a\"]}", LM_INVALID, "adapter must be a string, not an array of 1" },
    { "{" P ", \"adapter\": \"../x\"}", LM_INVALID, "adapter: " },
    { "{" P ", \"adapter\": \"a\\u0000b\"}", LM_INVALID, "adapter must not contain U+0000" },
    /* input */
    { "{\"id\": \"1\"}", LM_INVALID, "one of prompt, prompt_token_ids and messages is needed" },
    { "{\"id\": \"1\", \"prompt\": null}", LM_INVALID, "one of prompt, prompt_token_ids and mess" },
    { "{" P ", \"prompt_token_ids\": [1]}", LM_INVALID, "not prompt and prompt_token_ids" },
    { "{" P ", \"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}", LM_INVALID,
      "not prompt and messages" },
    { "{\"id\": \"1\", \"prompt\": [\"x\"]}", LM_INVALID, "prompt must be a string, not an array" },
    { "{\"id\": \"1\", \"prompt_token_ids\": []}", LM_INVALID,
      "prompt_token_ids must not be empty" },
    { "{\"id\": \"1\", \"prompt_token_ids\": \"1\"}", LM_INVALID,
      "prompt_token_ids must be an array of token ids, not a string of 1 bytes" },
    { "{\"id\": \"1\", \"prompt_token_ids\": [1, \"text\"]}", LM_INVALID,
      "prompt_token_ids[1] must be a token id (an integer, at least 0), not a string of 4 bytes" },
    { "{\"id\": \"1\", \"prompt_token_ids\": [1, -2]}", LM_INVALID,
      "prompt_token_ids[1] must be a token id (an integer, at least 0), not -2" },
    { "{\"id\": \"1\", \"prompt_token_ids\": [1.5]}", LM_INVALID, "prompt_token_ids[0] must be a" },
    { "{\"id\": \"1\", \"prompt_token_ids\": [2147483648]}", LM_INVALID, "not 2147483648" },
    { "{\"id\": \"1\", \"messages\": []}", LM_INVALID, "messages must not be empty" },
    { "{\"id\": \"1\", \"messages\": {}}", LM_INVALID, "messages must be an array of messages" },
    { "{\"id\": \"1\", \"messages\": [\"hi\"]}", LM_INVALID,
      "messages[0] must be an object with role and content, not a string of 2 bytes" },
    { "{\"id\": \"1\", \"messages\": \"hi\"}", LM_INVALID,
      "messages must be an array of messages, not a string of 2 bytes" },
    { "{\"id\": \"1\", \"messages\": [{\"role\": \"it hurts\", \"content\": \"user\"}]}",
      LM_INVALID, "messages[0].role must be system, user or assistant, not a string of 8 bytes" },
    { "{\"id\": \"1\", \"prompt\": 4111111111111111}", LM_INVALID,
      "prompt must be a string, not a number" },
    { "{\"id\": \"1\", \"messages\": [{\"content\": \"x\"}]}", LM_INVALID,
      "messages[0].role is missing" },
    { "{\"id\": \"1\", \"messages\": [{\"role\": \"tool\", \"content\": \"x\"}]}", LM_INVALID,
      "messages[0].role must be system, user or assistant, not \"tool\"" },
    { "{\"id\": \"1\", \"messages\": [{\"role\": \"system\\u0000x\", \"content\": \"x\"}]}",
      LM_INVALID, "messages[0].role must be system, user or assistant, not a string of 8 bytes" },
    { "{\"id\": \"1\", \"messages\": [{\"role\": \"user\"}]}", LM_INVALID,
      "messages[0].content is missing" },
    { "{\"id\": \"1\", \"messages\": [{\"role\": \"user\", \"content\": [{}]}]}", LM_UNSUPPORTED,
      "messages[0].content as an array of parts" },
    { "{\"id\": \"1\", \"messages\": [{\"role\": \"user\", \"content\": \"a\\u0000\"}]}",
      LM_INVALID,
      "messages[0].content must not contain U+0000" },
    { "{\"id\": \"1\", \"messages\": [{\"role\": \"user\", \"text\": \"a\"}]}", LM_INVALID,
      "messages[0].text is not a known key" },
    { "{\"id\": \"1\", \"messages\": [{\"role\": \"user\", \"name\": \"a\"}]}", LM_UNSUPPORTED,
      "messages[0].name is not served yet" },
    { "{" P ", \"context\": \"doc\"}", LM_INVALID,
      "context must be an array of strings, not a string of 3 bytes" },
    { "{" P ", \"context\": [\"a\", 2]}", LM_INVALID, "context[1] must be a string, not a number" },
    { "{\"id\": \"1\", \"prompt_token_ids\": [1], \"context\": [\"a\"]}", LM_INVALID,
      "context can't be put ahead of prompt_token_ids" },
    /* params */
    { "{" P ", \"params\": []}", LM_INVALID, "params must be an object, not an array of 0" },
    { PARAMS("\"top_p\": \"0.9\""), LM_INVALID,
      "params.top_p must be a number above 0 and at most 1, not \"0.9\"" },
    { PARAMS("\"top_p\": 0"), LM_INVALID, "params.top_p must be a number above 0" },
    { PARAMS("\"top_p\": 1e-300"), LM_INVALID, "params.top_p must be a number above 0" },
    { PARAMS("\"top_p\": 1.01"), LM_INVALID, "not 1.01" },
    { PARAMS("\"temperature\": -0.1"), LM_INVALID,
      "params.temperature must be a number at least 0 and at most 100, not -0.1" },
    { PARAMS("\"temperature\": true"), LM_INVALID, "params.temperature must be a number" },
    { PARAMS("\"top_k\": -2"), LM_INVALID, "params.top_k must be an integer, at least -1, not -2" },
    { PARAMS("\"top_k\": 2.0"), LM_INVALID, "params.top_k must be an integer" },
    { PARAMS("\"min_p\": 2"), LM_INVALID, "params.min_p must be a number" },
    { PARAMS("\"max_tokens\": -1"), LM_INVALID,
      "params.max_tokens must be an integer, at least 0" },
    { PARAMS("\"max_tokens\": 4294967296"), LM_INVALID, "params.max_tokens must be an integer" },
    { PARAMS("\"max_tokens\": 0"), LM_INVALID, "params.max_tokens must be at least 1; 0 only" },
    { PARAMS("\"max_tokens\": 5, \"max_completion_tokens\": 5"), LM_INVALID,
      "params.max_completion_tokens means the same as max_tokens" },
    { PARAMS("\"min_tokens\": 17"), LM_INVALID, "params.min_tokens is 17, more than max_tokens" },
    { PARAMS("\"n\": 0"), LM_INVALID, "params.n must be an integer from 1 to 128, not 0" },
    { PARAMS("\"seed\": 1.5"), LM_INVALID, "params.seed must be an integer, not 1.5" },
    { PARAMS("\"stop\": \"\""), LM_INVALID, "params.stop must not be empty" },
    { PARAMS("\"stop\": [\"a\", \"\"]"), LM_INVALID, "params.stop[1] must not be empty" },
    { PARAMS("\"stop\": 5"), LM_INVALID, "params.stop must be a string or an array of strings" },
    { PARAMS("\"stop\": [1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]"), LM_TOO_LARGE,
      "params.stop has 17 entries, more than 16" },
    { PARAMS("\"stop_token_ids\": [\"a\"]"), LM_INVALID,
      "params.stop_token_ids[0] must be a token" },
    { PARAMS("\"logprobs\": 21"), LM_INVALID, "params.logprobs must be an integer from 0 to 20" },
    { PARAMS("\"logprobs\": \"3\""), LM_INVALID, "params.logprobs must be true, false or a count" },
    { PARAMS("\"top_logprobs\": 3"), LM_INVALID, "params.top_logprobs needs logprobs: true" },
    { PARAMS("\"logprobs\": 2, \"top_logprobs\": 3"), LM_INVALID,
      "params.top_logprobs goes with logprobs: true, not with a count" },
    { PARAMS("\"echo\": 1"), LM_INVALID, "params.echo must be true or false, not 1" },
    { PARAMS("\"repetition_penalty\": 0"), LM_INVALID, "params.repetition_penalty must be" },
    { PARAMS("\"presence_penalty\": 3"), LM_INVALID, "params.presence_penalty must be" },
    { PARAMS("\"frequency_penalty\": -3"), LM_INVALID, "params.frequency_penalty must be" },
    /* the rest */
    { "{" P ", \"priority\": \"high\"}", LM_INVALID,
      "priority must be an integer from -1000000 to 1000000, not \"high\"" },
    { "{" P ", \"priority\": \"It hurts in the left arm, at night even more so, and then\"}",
      LM_INVALID, "priority must be an integer from -1000000 to 1000000, not a string of 57" },
    { "{" P ", \"priority\": \"ItHurtsInTheLeftArmAtNightEvenMoreSoAndThenTheyCame\"}",
      LM_INVALID, "priority must be an integer from -1000000 to 1000000, not a string of 51" },
    { "{" P ", \"priority\": 1.0}", LM_INVALID, "priority must be an integer" },
    { "{" P ", \"deadline_ms\": -5}", LM_INVALID, "deadline_ms must be an integer, at least 0" },
    { "{" P ", \"deadline_ms\": \"2026-01-01\"}", LM_INVALID, "deadline_ms must be an integer" },
    { "{" P ", \"first_token_by_ms\": -1}", LM_INVALID,
      "first_token_by_ms must be an integer, at least 0" },
    { "{" P ", \"first_token_by_ms\": 1.5}", LM_INVALID, "first_token_by_ms must be an integer" },
    { "{" P ", \"first_token_ms\": 1}", LM_INVALID, "first_token_ms is not a known key" },
    { "{" P ", \"tenant\": \"\"}", LM_INVALID, "tenant must not be empty" },
    { "{" P ", \"reply_topic\": \"a/b\"}", LM_INVALID, "reply_topic must be a Kafka topic name" },
    { "{" P ", \"reply_topic\": \"It hurts\"}", LM_INVALID, ". _ -), not a string of 8 bytes" },
    { "{" P ", \"reply_topic\": \"..\"}", LM_INVALID, "reply_topic must be a Kafka topic name" },
    { "{" P ", \"correlation_id\": 5}", LM_INVALID,
      "correlation_id must be a string, not a number" },
    { "{" P ", \"model\": \"other\"}", LM_MISMATCH,
      "model is \"other\", but this worker serves \"tiny\"" },
    { "{" P ", \"model\": \"It hurts\"}", LM_MISMATCH,
      "model has 8 bytes, but this worker serves \"tiny\"" },
    { "{" P ", \"params\": \"text\"}", LM_INVALID, "must be an object, not a string of 4 bytes" },
    { "{" P ", \"metadata\": \"text\"}", LM_INVALID, "not a string of 4 bytes" },
    { "{" P ", \"metadata\": [1]}", LM_INVALID, "metadata must be an object of strings" },
    { "{" P ", \"metadata\": {\"n\": 5}}", LM_INVALID,
      "metadata.n must be a string, not a number" },
    { "{" P ", \"metadata\": {\"It hurts\": 5}}", LM_INVALID,
      "metadata.a key of 8 bytes must be a string, not a number" },
    { "{" P ", \"metadata\": {\"n\": \"\\u0000\"}}", LM_INVALID,
      "metadata.n must not contain U+0" },
};

static codec *make_codec(void)
{
    codec *c = NULL;
    struct lm_err err;
    assert_int_equal(codec_new(&(struct codec_config){ .model_name = "tiny" }, &c, &err), LM_OK);
    return c;
}

static void each_malformed_message_has_its_own_error(void **state)
{
    (void)state;
    codec *c = make_codec();
    const struct header json = { "content-type", "application/json", 16 };
    for (size_t i = 0; i < LM_COUNT(refusals); i++) {
        const struct refusal *r = &refusals[i];
        size_t len = strlen(r->json);
        char *exact = malloc(len ? len : 1);    /* ASan sees an overread */
        memcpy(exact, r->json, len);
        struct prompt *p = NULL;
        struct lm_err err = { 0 };
        lm_status st = len ? codec_decode_prompt(c, exact, len, &json, 1, NULL, &p, &err)
                           : json_decode_prompt(exact, len, &p, &err);
        if (st != r->code || !strstr(err.msg, r->says))
            fail_msg("%s\n  expected %s: ...%s...\n  got %s: %s", r->json, lm_status_wire(r->code),
                     r->says, lm_status_wire(st), err.msg);
        assert_int_equal(err.code, st);
        assert_null(p);
        assert_int_equal(lm_status_disposition(st), LM_DO_REFUSE);
        free(exact);
    }
    codec_free(c);
}

static struct prompt *decode(const char *json)
{
    struct prompt *p = NULL;
    struct lm_err err = { 0 };
    if (json_decode_prompt(json, strlen(json), &p, &err) != LM_OK)
        fail_msg("%s: %s", json, err.msg);
    return p;
}

static void smallest_prompt_has_defaults(void **state)
{
    (void)state;
    struct prompt *p = decode("{\"id\": \"1\", \"prompt\": \"hello\"}");
    struct engine_params d;
    engine_params_default(&d);
    assert_string_equal(p->id, "1");
    assert_string_equal(p->prompt, "hello");
    assert_int_equal(p->prompt_len, 5);
    assert_null(p->adapter);
    assert_null(p->token_ids);
    assert_null(p->messages);
    assert_int_equal(p->params.max_tokens, 16);
    assert_int_equal(p->params.set, 0);
    assert_int_equal(p->params.logprobs, -1);
    assert_true(p->params.temperature == d.temperature);
    assert_int_equal(p->priority, 0);
    assert_int_equal(p->deadline_ms, 0);
    assert_int_equal(p->first_token_by_ms, 0);
    assert_null(p->tenant);
    assert_null(p->reply_topic);
    assert_null(p->correlation_id);
    assert_null(p->model);
    assert_int_equal(p->n_metadata, 0);
    assert_int_equal(p->encoding, ENCODING_JSON);
    prompt_free(p);
}

static void nulls_mean_not_given(void **state)
{
    (void)state;
    prompt_free(decode("{\"id\": \"1\", \"prompt\": \"x\", \"adapter\": null, \"context\": null,"
                       "\"params\": null, \"priority\": null, \"deadline_ms\": null,"
                       "\"first_token_by_ms\": null, \"tenant\": "
                       "null, \"reply_topic\": null, \"correlation_id\": null, \"model\": null,"
                       "\"stream\": null, \"metadata\": null, \"messages\": null, \"tools\": null,"
                       "\"response_format\": null}"));
    struct prompt *p = decode("{\"id\": \"1\", \"prompt\": \"x\", \"stream\": false, \"params\": "
                              "{\"top_p\": null, \"stop\": null, \"seed\": null,"
                              "\"logprobs\": null,"
                              "\"logit_bias\": null}}");
    assert_int_equal(p->params.set, 0);
    assert_int_equal(p->params.n_stop, 0);
    assert_false(p->params.has_seed);
    prompt_free(p);
}

static void every_field_arrives(void **state)
{
    (void)state;
    struct prompt *p = decode(
        "{\"id\": \"order-1\", \"adapter\": \"acme/warm-2\", \"messages\": [{\"role\": \"system\","
        "\"content\": \"\"}, {\"role\": \"user\", \"content\": \"h\\u00e9\"}], \"context\": [\"a\","
        "\"b\"], \"params\": {\"max_tokens\": 64, \"min_tokens\": 2, \"temperature\": 0,"
        "\"top_p\": 0.5, \"top_k\": 40, \"min_p\": 0.25, \"seed\": -1, \"stop\": [\"x\", \"yz\"],"
        "\"stop_token_ids\": [5, 6], \"logprobs\": true, \"top_logprobs\": 3, \"n\": 2,"
        "\"echo\": true,"
        "\"ignore_eos\": true, \"repetition_penalty\": 1.5, \"presence_penalty\": -1,"
        "\"frequency_penalty\": 0.5, \"skip_special_tokens\": false,"
        "\"include_stop_str_in_output\": true}, \"priority\": -3, \"deadline_ms\": 1700000000123,"
        "\"first_token_by_ms\": 1690000000123,"
        "\"tenant\": \"t\", \"reply_topic\": \"r.1\", \"correlation_id\": \"c\", \"model\": \"m\","
        "\"metadata\": {\"k\": \"v\", \"\": \"\"}}");
    assert_string_equal(p->adapter, "acme/warm-2");
    assert_int_equal(p->n_messages, 2);
    assert_string_equal(p->messages[0].role, "system");
    assert_string_equal(p->messages[1].content, "h\xc3\xa9");
    assert_int_equal(p->n_context, 2);
    assert_string_equal(p->context[1], "b");
    const struct engine_params *q = &p->params;
    assert_int_equal(q->max_tokens, 64);
    assert_int_equal(q->min_tokens, 2);
    assert_true(q->temperature == 0 && q->top_p == 0.5f && q->min_p == 0.25f);
    assert_int_equal(q->top_k, 40);
    assert_true(q->has_seed && q->seed == UINT64_MAX);
    assert_int_equal(q->n_stop, 2);
    assert_string_equal(q->stop[1], "yz");
    assert_int_equal(q->n_stop_token_ids, 2);
    assert_int_equal(q->stop_token_ids[1], 6);
    assert_int_equal(q->logprobs, 3);
    assert_int_equal(q->n, 2);
    assert_true(q->echo && q->ignore_eos && q->include_stop && !q->skip_special_tokens);
    assert_true(q->repetition_penalty == 1.5f && q->presence_penalty == -1 &&
                q->frequency_penalty == 0.5f);
    assert_int_equal(q->set, ENGINE_SET_TEMPERATURE | ENGINE_SET_TOP_K | ENGINE_SET_TOP_P |
                     ENGINE_SET_MIN_P | ENGINE_SET_REPETITION_PENALTY | ENGINE_SET_MAX_TOKENS);
    assert_int_equal(p->priority, -3);
    assert_int_equal(p->deadline_ms, 1700000000123);
    assert_int_equal(p->first_token_by_ms, 1690000000123);
    assert_string_equal(p->tenant, "t");
    assert_string_equal(p->reply_topic, "r.1");
    assert_string_equal(p->correlation_id, "c");
    assert_string_equal(p->model, "m");
    assert_int_equal(p->n_metadata, 2);
    assert_string_equal(p->metadata[0].key, "k");
    assert_string_equal(p->metadata[1].value, "");
    prompt_free(p);
}

static void params_come_one_by_one(void **state)
{
    (void)state;
    static const struct { const char *json; uint32_t set; } rows[] = {
        { "\"temperature\": 1", ENGINE_SET_TEMPERATURE }, { "\"top_k\": -1", ENGINE_SET_TOP_K },
        { "\"top_p\": 1", ENGINE_SET_TOP_P }, { "\"min_p\": 0", ENGINE_SET_MIN_P },
        { "\"repetition_penalty\": 1", ENGINE_SET_REPETITION_PENALTY },
        { "\"max_completion_tokens\": 3", ENGINE_SET_MAX_TOKENS }, { "\"n\": 1", 0 },
    };
    for (size_t i = 0; i < LM_COUNT(rows); i++) {
        char json[256];
        snprintf(json, sizeof json, PARAMS("%s"), rows[i].json);
        struct prompt *p = decode(json);
        assert_int_equal(p->params.set, rows[i].set);
        prompt_free(p);
    }
    struct prompt *p = decode(PARAMS("\"stop\": \"one\", \"logprobs\": 0"));
    assert_int_equal(p->params.n_stop, 1);
    assert_int_equal(p->params.logprobs, 0);
    prompt_free(p);
    p = decode(PARAMS("\"logprobs\": false, \"top_logprobs\": 0"));
    assert_int_equal(p->params.logprobs, -1);
    prompt_free(p);
    p = decode(PARAMS("\"max_tokens\": 0, \"echo\": true, \"logprobs\": 1"));
    assert_int_equal(p->params.max_tokens, 0);
    prompt_free(p);
}

static void prompt_text_may_hold_nul(void **state)
{
    (void)state;
    struct prompt *p = decode("{\"id\": \"1\", \"prompt\": \"a\\u0000b\"}");
    assert_int_equal(p->prompt_len, 3);
    assert_memory_equal(p->prompt, "a\0b", 4);
    prompt_free(p);
}

/* A message of `n` times `unit` between head and tail. */
static void refuse_repeated(const char *head, const char *unit, size_t n, const char *tail,
                            lm_status code, const char *says)
{
    size_t u = strlen(unit), size = strlen(head) + n * u + strlen(tail);
    char *json = malloc(size + 1), *at = stpcpy(json, head);
    for (size_t i = 0; i < n; i++, at += u)
        memcpy(at, unit, u);
    strcpy(at, tail);
    struct prompt *p = NULL;
    struct lm_err err = { 0 };
    int64_t start = lm_now_us();
    assert_int_equal(json_decode_prompt(json, size, &p, &err), code);
    assert_non_null(strstr(err.msg, says));
    assert_true(lm_now_us() - start < 5000000);
    free(json);
}

static void caps_hold(void **state)
{
    (void)state;
    refuse_repeated("", "[", 10000000, "", LM_TOO_LARGE, "more than 524288 values");
    refuse_repeated("", "[", 1000000, "", LM_FORMAT, "unexpected end of data");
    refuse_repeated("{\"a\":", "{\"a\":", 32, "1}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}", LM_TOO_LARGE,
                    "nested deeper than 32 levels");
    refuse_repeated("{\"id\": \"1\", \"prompt_token_ids\": [0", ",0", 7000000, "]}", LM_TOO_LARGE,
                    "more than 524288 values");
    refuse_repeated("{\"id\": \"1\", \"prompt_token_ids\": [0", ",0", 400000, ",[1]]}", LM_INVALID,
                    "prompt_token_ids[400001] must be a token id");
    refuse_repeated("{\"id\": \"", "a", 513, "\", \"prompt\": \"x\"}", LM_TOO_LARGE,
                    "id has 513 bytes, more than 512");
    refuse_repeated("{" P ", \"adapter\": \"", "a", 257, "\"}", LM_TOO_LARGE,
                    "adapter has 257 bytes, more than 256");
    refuse_repeated("{" P ", \"reply_topic\": \"", "a", 250, "\"}", LM_TOO_LARGE,
                    "reply_topic has");
    refuse_repeated("{" P ", \"correlation_id\": \"", "a", 1025, "\"}", LM_TOO_LARGE,
                    "correlation_id has 1025 bytes");
    refuse_repeated("{" P ", \"context\": [\"\"", ",\"\"", 1024, "]}", LM_TOO_LARGE,
                    "context has 1025 entries");
    refuse_repeated("{\"id\": \"1\", \"messages\": [0", ",0", 4096, "]}", LM_TOO_LARGE,
                    "messages has 4097 entries");
    refuse_repeated("{" P ", \"metadata\": {\"", "k", 257, "\": \"\"}}", LM_TOO_LARGE,
                    "metadata has a key of 257 bytes");
    refuse_repeated("{" P ", \"metadata\": {\"k\": \"", "v", 8193, "\"}}", LM_TOO_LARGE,
                    "metadata.k has 8193 bytes");
    refuse_repeated("{" P ", \"", "\xc3\xa9", 300, "\": 1}", LM_INVALID, "is not a known key");
    refuse_repeated("{" P ", \"prompt", "x", (16 << 20), "\": 1}", LM_TOO_LARGE, "the message has");
}

static void metadata_entries_are_capped(void **state)
{
    (void)state;
    char json[4096] = "{\"id\": \"1\", \"prompt\": \"x\", \"metadata\": {\"k\": \"\"";
    for (int i = 0; i < 64; i++)
        sprintf(json + strlen(json), ", \"k%d\": \"\"", i);
    strcat(json, "}}");
    struct prompt *p = NULL;
    struct lm_err err = { 0 };
    assert_int_equal(json_decode_prompt(json, strlen(json), &p, &err), LM_TOO_LARGE);
    assert_non_null(strstr(err.msg, "metadata has 65 entries, more than 64"));
}

static void brackets_in_strings_do_not_count(void **state)
{
    (void)state;
    struct prompt *p = decode("{\"id\": \"1\", \"prompt\": \"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["
                              "\\\"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\\\\\"}");
    assert_int_equal(p->prompt[p->prompt_len - 1], '\\');
    prompt_free(p);
}

static void every_truncation_is_refused(void **state)
{
    (void)state;
    static const char json[] = "{\"id\": \"1\", \"messages\": [{\"role\": \"user\", \"content\": "
        "\"\\u00e9\xc3\xa9\"}], \"params\": {\"stop\": [\"a\"], \"top_p\": 0.5}, \"metadata\": "
        "{\"a\": \"b\"}}";
    for (size_t n = 0; n < sizeof json - 1; n++) {
        char *cut = malloc(n ? n : 1);
        memcpy(cut, json, n);
        struct prompt *p = NULL;
        struct lm_err err = { 0 };
        assert_int_equal(json_decode_prompt(cut, n, &p, &err), LM_FORMAT);
        assert_non_null(strstr(err.msg, "not valid JSON"));
        free(cut);
    }
    prompt_free(decode(json));
}

static void no_error_object_is_fine(void **state)
{
    (void)state;
    struct prompt *p = NULL;
    assert_int_equal(json_decode_prompt("{", 1, &p, NULL), LM_FORMAT);
    assert_int_equal(json_decode_prompt("{\"id\": 1}", 9, &p, NULL), LM_INVALID);
    prompt_free(NULL);
    codec_free(NULL);
}

static void keeps_what_it_gave(struct arena *a)
{
    char *small[100], *big = NULL;
    for (int i = 0; i < 100; i++) {
        small[i] = arena_strndup(a, "0123456789", (size_t)i % 11);
        if (i == 50)
            big = arena_alloc(a, 100000);
        assert_int_equal((uintptr_t)small[i] % 16, 0);
    }
    for (int i = 0; i < 100000; i++)
        assert_int_equal(big[i], 0);
    for (int i = 0; i < 100; i++)
        assert_int_equal(strlen(small[i]), i % 11);
    assert_in_range(arena_bytes(a), 100000 + 1600, 120000);
    assert_null(arena_alloc(a, SIZE_MAX - 3));
    assert_null(arena_strndup(a, "", SIZE_MAX));
    arena_free(a);
}

static void arena_keeps_what_it_gave(void **state)
{
    (void)state;
    keeps_what_it_gave(arena_new());
    for (size_t size = 64; size < 2048; size = size * 2 + 16) {
        void *room = malloc(size);      /* ASan sees a write behind it */
        keeps_what_it_gave(arena_in(room, size));
        free(room);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_malformed_message_has_its_own_error),
        cmocka_unit_test(smallest_prompt_has_defaults),
        cmocka_unit_test(nulls_mean_not_given),
        cmocka_unit_test(every_field_arrives),
        cmocka_unit_test(params_come_one_by_one),
        cmocka_unit_test(prompt_text_may_hold_nul),
        cmocka_unit_test(caps_hold),
        cmocka_unit_test(metadata_entries_are_capped),
        cmocka_unit_test(brackets_in_strings_do_not_count),
        cmocka_unit_test(every_truncation_is_refused),
        cmocka_unit_test(no_error_object_is_fine),
        cmocka_unit_test(arena_keeps_what_it_gave),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
