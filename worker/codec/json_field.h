/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_field.h - typed, strict reading of JSON objects, with errors that name the path.
 *
 * A json_reader says where we are ("params.") and where strings are copied to. Each reader function
 * refuses a wrong type or range as LM_INVALID: "params.top_p must be a number above 0 and at most
 * 1, not 1.5". JSON null means "not given" everywhere an optional field is read (json_given()).
 *
 * Errors end in the log, where no text of a prompt may be. So of what stands in text's place, or of
 * text in another's, they tell the kind and the size; only keys and parameters' values are shown,
 * and of these only what shown.h allows.
 *
 * Threads: no state; as safe as its arguments.
 */
#ifndef LORAMILL_WORKER_CODEC_JSON_FIELD_H
#define LORAMILL_WORKER_CODEC_JSON_FIELD_H

#include <yyjson.h>
#include "worker/codec/message.h"

/* Bytes that outlive what is read, and in which a long text may lie as it is; and an arena that the
 * rest may lie in, NULL: it has its own. */
struct json_source { const char *at; size_t len; struct arena *arena; };

struct json_reader {
    const char *prefix;         /* "" or "params." or "messages[3]." */
    struct arena *arena;        /* where strings go */
    struct lm_err *err;
    const struct json_source *source;   /* NULL: every string is copied */
};

/* The member, or NULL when it is absent or null. */
yyjson_val *json_given(yyjson_val *obj, const char *key);

/* "<prefix><key> <message>" */
lm_status json_refuse(const struct json_reader *r, lm_status code, const char *key,
                      const char *fmt, ...) LM_PRINTF(4, 5);

/* "<prefix><key> must be <what>, not <a number, a string of 7 bytes, ...>", or "is missing" for
 * NULL */
lm_status json_wrong(const struct json_reader *r, const char *key, const char *what,
                     yyjson_val *value);
/* The same for a parameter: "not <its value>", unless it may be text. */
lm_status json_wrong_value(const struct json_reader *r, const char *key, const char *what,
                           yyjson_val *value);

/* Unknown key: names it and the nearest of `known` (NULL-terminated) when one is near. */
lm_status json_unknown(const struct json_reader *r, const char *key, const char *const *known);

bool json_key_in(const char *const *list, const char *key);     /* NULL-terminated list */

/* A UTF-8 string of min..max bytes without NUL; the copy is in the arena. */
lm_status json_read_string(const struct json_reader *r, const char *key, yyjson_val *v,
                           size_t min, size_t max, const char **out);
lm_status json_read_int(const struct json_reader *r, const char *key, yyjson_val *v, int64_t lo,
                        int64_t hi, int64_t *out);
lm_status json_read_bool(const struct json_reader *r, const char *key, yyjson_val *v, bool *out);

/* An array of 0..INT32_MAX token ids; `min` and `max` bound its length. */
lm_status json_read_token_ids(const struct json_reader *r, const char *key, yyjson_val *v,
                              size_t min, size_t max, const int32_t **out, int *n);

#endif
