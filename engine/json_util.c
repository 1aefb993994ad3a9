/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_util.c - see json_util.h.
 *
 * Parsing limits are jansson's own (2048 levels of nesting, int64 integers, valid UTF-8, no NUL in
 * strings); the size limit is the caller's, applied before the text is read. Nothing here keeps
 * state, so every function is safe from any thread.
 */
#include "engine/json_util.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static lm_status errno_status(int e)
{
    if (e == ENOENT || e == ENOTDIR)
        return LM_NOT_FOUND;
    return e == EACCES ? LM_DENIED : LM_IO;
}

static lm_status read_all(int fd, const char *path, size_t size, char *buf, struct lm_err *err)
{
    for (size_t got = 0; got < size;) {
        ssize_t k = read(fd, buf + got, size - got);
        if (k < 0 && errno == EINTR)
            continue;
        if (k < 0)
            return lm_err_set(err, LM_IO, "%s: %s", path, strerror(errno));
        if (k == 0)
            return lm_err_set(err, LM_IO, "%s: shrank while it was read", path);
        got += (size_t)k;
    }
    return LM_OK;
}

lm_status ju_read_file(const char *path, size_t max, char **out, size_t *n, struct lm_err *err)
{
    /* O_NONBLOCK: a FIFO in place of the file must not hang the caller. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return lm_err_set(err, errno_status(errno), "%s: %s", path, strerror(errno));
    lm_status s = LM_OK;
    char *buf = NULL;
    struct stat sb;
    if (fstat(fd, &sb) != 0 || !S_ISREG(sb.st_mode)) {
        s = lm_err_set(err, LM_FORMAT, "%s: is not a regular file", path);
        goto out;
    }
    if ((uint64_t)sb.st_size > max) {
        s = lm_err_set(err, LM_TOO_LARGE, "%s: has %lld bytes, the limit is %zu", path,
                       (long long)sb.st_size, max);
        goto out;
    }
    size_t size = (size_t)sb.st_size;
    buf = lm_malloc(size + 1);
    if (!buf) {
        s = lm_err_set(err, LM_NOMEM, "%s: no memory for %zu bytes", path, size);
        goto out;
    }
    s = read_all(fd, path, size, buf, err);
    if (s)
        goto out;
    buf[size] = '\0';
    *out = buf;
    *n = size;
    buf = NULL;
out:
    free(buf);
    close(fd);
    return s;
}

char *ju_join(const char *dir, const char *name)
{
    size_t a = strlen(dir), b = strlen(name);
    char *p = lm_malloc(a + b + 2);
    if (!p)
        return NULL;
    memcpy(p, dir, a);
    p[a] = '/';
    memcpy(p + a + 1, name, b + 1);
    return p;
}

lm_status ju_parse(const char *text, size_t n, const char *file, json_t **out, struct lm_err *err)
{
    json_error_t je;
    json_t *v = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &je);
    if (!v)
        return lm_err_set(err, LM_FORMAT, "%s: line %d, column %d: %s", file, je.line, je.column,
                          je.text);
    if (!json_is_object(v)) {
        json_decref(v);
        return lm_err_set(err, LM_FORMAT, "%s: a JSON object is expected", file);
    }
    *out = v;
    return LM_OK;
}

static const json_t *get(const struct ju *j, const char *key)
{
    const json_t *v = json_object_get(j->obj, key);
    return json_is_null(v) ? NULL : v;
}

bool ju_has(const struct ju *j, const char *key)
{
    return get(j, key) != NULL;
}

lm_status ju_missing(const struct ju *j, const char *key)
{
    return lm_err_set(j->err, LM_FORMAT, "%s: %s%s is missing", j->file, j->path, key);
}

lm_status ju_bad_type(const struct ju *j, const char *key, const char *wanted)
{
    char b[64];
    return lm_err_set(j->err, LM_FORMAT, "%s: %s%s is %s, expected %s", j->file, j->path, key,
                      ju_brief(json_object_get(j->obj, key), b, sizeof b), wanted);
}

lm_status ju_int(const struct ju *j, const char *key, int64_t lo, int64_t hi, int64_t *io)
{
    const json_t *v = get(j, key);
    if (!v)
        return LM_OK;
    if (!json_is_integer(v))
        return ju_bad_type(j, key, "an integer");
    int64_t x = json_integer_value(v);
    if (x < lo || x > hi)
        return lm_err_set(j->err, LM_INVALID, "%s: %s%s is %lld, expected %lld to %lld", j->file,
                          j->path, key, (long long)x, (long long)lo, (long long)hi);
    *io = x;
    return LM_OK;
}

lm_status ju_int32(const struct ju *j, const char *key, int lo, int hi, int *io)
{
    int64_t x = *io;
    lm_status s = ju_int(j, key, lo, hi, &x);
    if (!s)
        *io = (int)x;
    return s;
}

lm_status ju_num(const struct ju *j, const char *key, double lo, double hi, double *io)
{
    const json_t *v = get(j, key);
    if (!v)
        return LM_OK;
    if (!json_is_number(v))
        return ju_bad_type(j, key, "a number");
    double x = json_number_value(v);
    if (!(x >= lo && x <= hi))
        return lm_err_set(j->err, LM_INVALID, "%s: %s%s is %g, expected %g to %g", j->file,
                          j->path, key, x, lo, hi);
    *io = x;
    return LM_OK;
}

lm_status ju_bool(const struct ju *j, const char *key, bool *io)
{
    const json_t *v = get(j, key);
    if (!v)
        return LM_OK;
    if (!json_is_boolean(v))
        return ju_bad_type(j, key, "true or false");
    *io = json_is_true(v);
    return LM_OK;
}

lm_status ju_str(const struct ju *j, const char *key, const char **io)
{
    const json_t *v = get(j, key);
    if (!v)
        return LM_OK;
    if (!json_is_string(v))
        return ju_bad_type(j, key, "a string");
    *io = json_string_value(v);
    return LM_OK;
}

bool ju_is_off(const json_t *v)
{
    switch (v ? json_typeof(v) : JSON_NULL) {
    case JSON_NULL:
    case JSON_FALSE:
        return true;
    case JSON_INTEGER:
    case JSON_REAL:
        return json_number_value(v) == 0;
    case JSON_STRING:
        return json_string_length(v) == 0;
    case JSON_ARRAY:
        return json_array_size(v) == 0;
    case JSON_OBJECT:
        return json_object_size(v) == 0;
    default:
        return false;
    }
}

const char *ju_brief(const json_t *v, char *buf, size_t n)
{
    if (!v)
        return "missing";
    memset(buf, 0, n);          /* json_dumpb leaves out the pieces that don't fit */
    size_t k = json_dumpb(v, buf, n - 1, JSON_ENCODE_ANY | JSON_COMPACT | JSON_ENSURE_ASCII);
    if (k > n - 1) {
        size_t used = LM_MIN(strlen(buf), n - 4);
        memcpy(buf + used, "...", 4);
    }
    return buf;
}

bool ju_name_in(const char *name, const char *const *list, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(name, list[i]) == 0)
            return true;
    return false;
}
