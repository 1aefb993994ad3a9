/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_json_prompt.c - a JSON prompt from any bytes: decoded or refused with words, never both, and
 * never put off: inputs are far too small to exhaust memory.
 */
#include <stdlib.h>
#include <string.h>

#include "worker/codec/codec.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct prompt *p = NULL;
    struct lm_err err = { 0 };
    lm_status st = json_decode_prompt((const char *)data, size, &p, &err);
    if (st ? p || !err.msg[0] || err.code != st : !p || !p->id[0])
        abort();
    if (lm_status_disposition(st) == LM_DO_RETRY)
        abort();
    if (p && !!p->prompt + !!p->token_ids + !!p->messages != 1)
        abort();
    prompt_free(p);
    return 0;
}
