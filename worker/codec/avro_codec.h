/* SPDX-License-Identifier: Apache-2.0 */
/*
 * avro_codec.h - Avro data to JSON trees, by field name, under a plan. (Writing: message_out.h.)
 *
 * Records and maps become objects, enums strings; a null field is left out, so that an
 * optional field that was dropped, added or not set looks the same. bytes and fixed have no place
 * in our messages and are refused by path, unless null.
 *
 * Threads: any; where Avro C reads the values it runs under avro_lock().
 */
#ifndef LORAMILL_WORKER_CODEC_AVRO_CODEC_H
#define LORAMILL_WORKER_CODEC_AVRO_CODEC_H

#include "worker/codec/avro_plan.h"
#include "worker/codec/json_tree.h"

/* What the tree of a datum needs at most: its values, names counted, and the text of map keys, each
 * with a NUL. */
struct avro_size { size_t values, key_bytes; };

/* Walks the datum without allocating: every length and count lies within the bytes that are left,
 * at most 524,288 values in all, 256 entries a map and 1,024 bytes a map key, every index in range,
 * nothing behind the end. What passes is decoded in bounded time and memory; only a value that has
 * no place in JSON (bytes, text that is not UTF-8, a number that is not finite) is refused then.
 * Errors: LM_FORMAT or LM_TOO_LARGE with the path ("params.stop[]"). */
lm_status avro_scan(const struct avro_plan *p, const void *data, size_t len,
                    struct avro_size *size, struct lm_err *err);

/* Scans, then decodes. Strings lie in `data`, and are not terminated, names are; the rest is in the
 * scratch, where there is room: yyjson_doc_free() it before either goes. */
lm_status avro_decode_doc(struct avro_plan *p, const void *data, size_t len,
                          struct json_scratch *scratch, yyjson_doc **out, struct lm_err *err);
/* The same as a tree of jansson's; the caller json_decref()s. */
lm_status avro_decode(struct avro_plan *p, const void *data, size_t len, json_t **out,
                      struct lm_err *err);

#endif
