/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_safetensors.c - any bytes as a safetensors file. Whatever the reader accepts must be
 * readable from end to end and found by name.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "engine/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile uint8_t sink;

static void touch(const struct st_tensor *t)
{
    const uint8_t *p = t->data;
    for (size_t i = 0; i < t->bytes; i++)
        sink ^= p[i];
    if (t->is_float && t->dtype == KN_F32 && t->bytes)
        sink ^= *(const float *)t->data > 0;    /* aligned, or UBSan tells */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    safetensors *st = NULL;
    struct lm_err err = { 0 };
    if (safetensors_open_memory(data, size, "fuzz", &st, &err)) {
        if (!err.msg[0])
            abort();
        return 0;
    }
    for (int i = 0; i < safetensors_count(st); i++) {
        const struct st_tensor *t = safetensors_at(st, i);
        if (safetensors_find(st, t->name) != t)
            abort();
        touch(t);
    }
    safetensors_close(st);
    return 0;
}
