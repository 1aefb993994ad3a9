/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_wire.c - records as they come from Kafka: headers and value from any bytes.
 *
 * Input: two length-prefixed header values (content-type, __value_schema_id; length 255 means no
 * such header), then the value. The registry is a port where nobody listens, so Avro goes as far as
 * the schema id. A prompt that is decoded gets a reply, which must be JSON.
 */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "worker/codec/codec.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static size_t take_header(const char *name, const uint8_t **data, size_t *size, struct header *h)
{
    if (*size == 0)
        return 0;
    size_t len = **data, absent = len == 255;
    (*data)++, (*size)--;
    if (absent)
        return 0;
    len = LM_MIN(len, *size);
    *h = (struct header){ name, *data, len };
    *data += len, *size -= len;
    return 1;
}

static void reply(codec *c, const struct prompt *p)
{
    char text[] = "ok";
    struct engine_choice choice = { .text = text, .text_len = 2, .reason = ENGINE_STOP };
    struct engine_result result = { .choices = &choice, .n_choices = 1 };
    struct completion done = { .prompt = p, .model = "m", .worker = "w", .result = &result };
    void *out = NULL;
    size_t len = 0;
    if (codec_encode_completion(c, &done, ENCODING_JSON, &out, &len, NULL) != LM_OK)
        abort();
    json_t *back = json_loadb(out, len, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, NULL);
    if (strcmp(json_string_value(json_object_get(back, "id")), p->id) != 0)
        abort();
    json_decref(back);
    free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static codec *c;
    static const struct codec_config cfg = { .registry.url = "http://127.0.0.1:9",
                                             .reply_topic = "replies", .model_name = "m" };
    if (!c && codec_new(&cfg, &c, NULL) != LM_OK)
        abort();
    struct header h[2];
    size_t n = take_header("content-type", &data, &size, &h[0]);
    n += take_header("__value_schema_id", &data, &size, &h[n]);
    struct prompt *p = NULL;
    struct lm_err err = { 0 };
    lm_status st = codec_decode_prompt(c, data, size, h, (int)n, NULL, &p, &err);
    if (st ? p || !err.msg[0] : !p)
        abort();
    json_t *utf8 = json_string(err.msg);    /* messages end in UTF-8 headers */
    if (!utf8)
        abort();
    json_decref(utf8);
    if (p)
        reply(c, p);
    prompt_free(p);
    return 0;
}
