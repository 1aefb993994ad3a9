/* SPDX-License-Identifier: Apache-2.0 */
/*
 * avro_path.h - where in a datum we are, for error texts; internal to worker/codec/avro_*.c.
 */
#ifndef LORAMILL_WORKER_CODEC_AVRO_PATH_H
#define LORAMILL_WORKER_CODEC_AVRO_PATH_H

#include <stddef.h>

enum { AVRO_PATH_MAX = 20 };    /* above the depth of any plan */

struct avro_path {
    const char *at[AVRO_PATH_MAX];      /* field names and map keys; "[]" for items */
    int n;
};

/* "params.stop[]", or "top" */
void avro_path_text(const struct avro_path *p, char *buf, size_t size);

#endif
