/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_avro_prompt.c - a writer's schema and a datum from any bytes.
 *
 * Input: the schema's JSON, a NUL, the datum. Without a NUL, all is a datum of the shipped prompt
 * schema. Besides the sanitizers' checks: what our scan lets pass, Avro C must be able to read, so
 * LM_NOMEM, which stands for its failures, is a bug (inputs are far too small to exhaust memory).
 */
#include <stdlib.h>
#include <string.h>

#include "tests/unit/avro_encode.h"
#include "worker/codec/avro_codec.h"
#include "worker/codec/json_prompt.h"
#include "worker/codec/schema_text.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(lm_status st, const struct lm_err *err)
{
    if (st == LM_NOMEM || (st && !err->msg[0]))
        abort();
}

static void try_datum(struct avro_plan *plan, const uint8_t *data, size_t size)
{
    struct json_scratch scratch;
    yyjson_doc *doc = NULL;
    json_t *tree = NULL;
    struct prompt *p = NULL;
    void *back = NULL;
    size_t len = 0;
    struct lm_err err = { 0 };
    json_scratch_init(&scratch);
    lm_status st = avro_decode_doc(plan, data, size, &scratch, &doc, &err);
    check(st, &err);
    if (!st) {
        tree = json_from_value(yyjson_doc_get_root(doc));
        check(avro_encode(plan, tree, 0, &back, &len, &err), &err);
        check(json_prompt_read(yyjson_doc_get_root(doc), ENCODING_AVRO, NULL, NULL, &p, &err),
              &err);
    }
    yyjson_doc_free(doc);
    free(back);
    prompt_free(p);
    json_decref(tree);
}

/* Freed at the end: what its lent value keeps, Avro C holds in ways that LeakSanitizer loses. */
static struct avro_plan *shipped;

static void free_shipped(void)
{
    avro_plan_free(shipped);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct avro_plan *plan = NULL;
    struct lm_err err = { 0 };
    if (!shipped) {
        check(avro_plan_new(schema_prompt_text, strlen(schema_prompt_text), &shipped, &err), &err);
        atexit(free_shipped);
    }
    const uint8_t *nul = size ? memchr(data, 0, size) : NULL;
    if (!nul || data[0] < 0x20) {
        try_datum(shipped, data, size);
        return 0;
    }
    size_t n = (size_t)(nul - data);
    lm_status st = avro_plan_new((const char *)data, n, &plan, &err);
    check(st, &err);
    if (!st)
        try_datum(plan, nul + 1, size - n - 1);
    avro_plan_free(plan);
    return 0;
}
