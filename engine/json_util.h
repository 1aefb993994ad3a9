/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_util.h - reading hostile files and JSON objects, with errors that name file and key.
 *
 * A `struct ju` is a cursor on one JSON object: where it stands ("config.json", "rope_scaling")
 * and where errors go. The getters treat an absent key and null alike, leave the output as it was
 * (so the caller's default stands), and refuse a wrong type or a value out of range by name.
 * Strings and children are borrowed from the JSON tree.
 */
#ifndef LORAMILL_ENGINE_JSON_UTIL_H
#define LORAMILL_ENGINE_JSON_UTIL_H

#include <jansson.h>

#include "kernels/base.h"

struct ju {
    const json_t *obj;
    const char *file;           /* "config.json" */
    const char *path;           /* "" or "rope_scaling." */
    struct lm_err *err;
};

/* Reads a regular file of at most `max` bytes into *out (malloc, NUL-terminated). LM_NOT_FOUND,
 * LM_TOO_LARGE with both numbers, LM_IO. */
lm_status ju_read_file(const char *path, size_t max, char **out, size_t *n, struct lm_err *err);

/* "dir/name" in malloc'd memory, NULL when out of memory. */
char *ju_join(const char *dir, const char *name);

/* Parses one JSON object; duplicate keys, trailing text and anything but an object are errors.
 * The caller owns *out. */
lm_status ju_parse(const char *text, size_t n, const char *file, json_t **out, struct lm_err *err);

bool ju_has(const struct ju *j, const char *key);       /* present and not null */
lm_status ju_int(const struct ju *j, const char *key, int64_t lo, int64_t hi, int64_t *io);
lm_status ju_int32(const struct ju *j, const char *key, int lo, int hi, int *io);
lm_status ju_num(const struct ju *j, const char *key, double lo, double hi, double *io);
lm_status ju_bool(const struct ju *j, const char *key, bool *io);
lm_status ju_str(const struct ju *j, const char *key, const char **io);
lm_status ju_missing(const struct ju *j, const char *key);      /* LM_FORMAT, "... is missing" */
lm_status ju_bad_type(const struct ju *j, const char *key, const char *wanted);

/* null, false, 0, "", [] and {}: what a switched-off feature looks like. */
bool ju_is_off(const json_t *v);

/* The value as short JSON text, cut to fit, for messages. */
const char *ju_brief(const json_t *v, char *buf, size_t n);

bool ju_name_in(const char *name, const char *const *list, size_t n);

#endif
