/* SPDX-License-Identifier: Apache-2.0 */
/*
 * safetensors.c - the reader behind safetensors.h.
 *
 * A set holds parts (one mapping, or one borrowed buffer, each) and one array of tensors sorted by
 * name, built in two passes: every part is parsed and checked by itself (parse_part), then the
 * array is sorted and duplicates are refused (finish). Sorting also serves the check that data
 * areas tile the file: tensors of a part are put in order of their offset first.
 *
 * Layout of a file: 8 bytes little-endian N, N bytes of JSON, data. Offsets count from the start of
 * the data. A valid file has neither hole nor overlap, which also bounds what a header can claim
 * to what the file really has.
 *
 * A base model's file must not shrink while it is mapped (the kernel answers with SIGBUS); adapters
 * come from stores that we don't trust, so adapter.c reads them into memory of its own.
 */
#include "engine/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/json_util.h"

#define MAX_SHARDS 4096
#define MAX_INDEX_BYTES (64u << 20)

struct part {
    const uint8_t *base;
    size_t size;
    bool mapped;
    int fd;                     /* if mapped */
    char *name;                 /* for messages */
    json_t *header;             /* tensor names live in it */
};

struct safetensors {
    struct part *parts;
    int n_parts;
    struct st_tensor *tensors;
    int n, cap;
    void **copies;              /* realigned tensors */
    int n_copies;
};

struct dtype_row {
    const char *name;
    int bits;
};

static const struct dtype_row dtypes[] = {
    { "BOOL", 8 }, { "U8", 8 }, { "I8", 8 }, { "U16", 16 }, { "I16", 16 }, { "U32", 32 },
    { "I32", 32 }, { "U64", 64 }, { "I64", 64 }, { "F16", 16 }, { "BF16", 16 }, { "F32", 32 },
    { "F64", 64 }, { "C64", 64 }, { "F8_E4M3", 8 }, { "F8_E5M2", 8 }, { "F8_E8M0", 8 },
    { "F8_E4M3FNUZ", 8 }, { "F8_E5M2FNUZ", 8 }, { "F6_E2M3", 6 }, { "F6_E3M2", 6 }, { "F4", 4 },
};

/* ---- one tensor ------------------------------------------------------------------------ */

static lm_status parse_dtype(const struct ju *j, struct st_tensor *t, int *bits)
{
    const char *name = NULL;
    lm_status s = ju_str(j, "dtype", &name);
    if (s)
        return s;
    if (!name)
        return ju_missing(j, "dtype");
    *bits = 0;
    for (size_t i = 0; i < LM_COUNT(dtypes); i++)
        if (strcmp(name, dtypes[i].name) == 0)
            *bits = dtypes[i].bits;
    if (*bits == 0)
        return lm_err_set(j->err, LM_FORMAT, "%s: %sdtype \"%.32s\" is unknown", j->file, j->path,
                          name);
    snprintf(t->dtype_name, sizeof t->dtype_name, "%s", name);
    t->is_float = true;
    if (strcmp(name, "F32") == 0)
        t->dtype = KN_F32;
    else if (strcmp(name, "F16") == 0)
        t->dtype = KN_F16;
    else if (strcmp(name, "BF16") == 0)
        t->dtype = KN_BF16;
    else
        t->is_float = false;
    return LM_OK;
}

/* Shape and, from it, the bytes that the tensor must have. */
static lm_status parse_shape(const struct ju *j, int bits, struct st_tensor *t)
{
    const json_t *shape = json_object_get(j->obj, "shape");
    if (!json_is_array(shape))
        return ju_bad_type(j, "shape", "a list of integers");
    size_t n = json_array_size(shape);
    if (n > ST_MAX_DIMS)
        return lm_err_set(j->err, LM_FORMAT, "%s: %sshape has %zu dimensions, the limit is %d",
                          j->file, j->path, n, ST_MAX_DIMS);
    int64_t count = 1;
    for (size_t i = 0; i < n; i++) {
        const json_t *d = json_array_get(shape, i);
        if (!json_is_integer(d) || json_integer_value(d) < 0)
            return ju_bad_type(j, "shape", "a list of integers of at least 0");
        t->shape[i] = json_integer_value(d);
        if (__builtin_mul_overflow(count, t->shape[i], &count))
            return lm_err_set(j->err, LM_FORMAT, "%s: %sshape overflows", j->file, j->path);
    }
    t->n_dims = (int)n;
    int64_t total;
    if (__builtin_mul_overflow(count, (int64_t)bits, &total))
        return lm_err_set(j->err, LM_FORMAT, "%s: %sshape overflows", j->file, j->path);
    if (total % 8)
        return lm_err_set(j->err, LM_FORMAT, "%s: %sshape does not fill whole bytes", j->file,
                          j->path);
    t->bytes = (size_t)(total / 8);
    return LM_OK;
}

static lm_status parse_offsets(const struct ju *j, const uint8_t *data, size_t data_size,
                               struct st_tensor *t)
{
    const json_t *o = json_object_get(j->obj, "data_offsets");
    const json_t *b = json_array_get(o, 0), *e = json_array_get(o, 1);
    if (json_array_size(o) != 2 || !json_is_integer(b) || !json_is_integer(e))
        return ju_bad_type(j, "data_offsets", "two integers");
    int64_t begin = json_integer_value(b), end = json_integer_value(e);
    if (begin < 0 || end < begin || (uint64_t)end > data_size)
        return lm_err_set(j->err, LM_FORMAT,
                          "%s: %sdata_offsets [%" PRId64 ", %" PRId64 "] leave the file's %zu"
                          " bytes of data", j->file, j->path, begin, end, data_size);
    if ((uint64_t)(end - begin) != t->bytes)
        return lm_err_set(j->err, LM_FORMAT,
                          "%s: %sdata_offsets span %" PRId64 " bytes, dtype and shape need %zu",
                          j->file, j->path, end - begin, t->bytes);
    t->data = data + begin;
    return LM_OK;
}

static lm_status parse_tensor(const struct part *p, const char *name, const json_t *info,
                              const uint8_t *data, struct st_tensor *t, struct lm_err *err)
{
    char path[160];
    snprintf(path, sizeof path, "tensor %.140s: ", name);
    struct ju j = { .obj = info, .file = p->name, .path = path, .err = err };
    if (!json_is_object(info))
        return lm_err_set(err, LM_FORMAT, "%s: %sis not a JSON object", p->name, path);
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)info, key, v)
        if (strcmp(key, "dtype") && strcmp(key, "shape") && strcmp(key, "data_offsets"))
            return lm_err_set(err, LM_FORMAT, "%s: %sunknown key \"%.64s\"", p->name, path, key);
    memset(t, 0, sizeof *t);
    t->name = name;
    int bits;
    lm_status s = parse_dtype(&j, t, &bits);
    if (!s)
        s = parse_shape(&j, bits, t);
    if (!s)
        s = parse_offsets(&j, data, (size_t)(p->base + p->size - data), t);
    return s;
}

/* ---- one file -------------------------------------------------------------------------- */

static lm_status read_header(struct part *p, const uint8_t **data, struct lm_err *err)
{
    if (p->size < 8)
        return lm_err_set(err, LM_FORMAT, "%s: has %zu bytes, too short for a safetensors file",
                          p->name, p->size);
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--)
        n = n << 8 | p->base[i];
    if (n > ST_MAX_HEADER)
        return lm_err_set(err, LM_TOO_LARGE, "%s: claims a header of %" PRIu64
                          " bytes, the limit is %u; is it a safetensors file?", p->name, n,
                          ST_MAX_HEADER);
    if (n > p->size - 8)
        return lm_err_set(err, LM_FORMAT, "%s: claims a header of %" PRIu64
                          " bytes but has %zu bytes in all; the file is cut short", p->name, n,
                          p->size);
    if (n == 0 || p->base[8] != '{')
        return lm_err_set(err, LM_FORMAT, "%s: the header does not start with '{'", p->name);
    *data = p->base + 8 + n;
    return ju_parse((const char *)p->base + 8, (size_t)n, p->name, &p->header, err);
}

static lm_status check_metadata(const struct part *p, struct lm_err *err)
{
    json_t *m = json_object_get(p->header, "__metadata__");
    if (!m)
        return LM_OK;
    const char *key;
    json_t *v;
    if (!json_is_object(m))
        return lm_err_set(err, LM_FORMAT, "%s: __metadata__ is not a JSON object", p->name);
    json_object_foreach(m, key, v)
        if (!json_is_string(v))
            return lm_err_set(err, LM_FORMAT, "%s: __metadata__ \"%.64s\" is not a string",
                              p->name, key);
    return LM_OK;
}

static int by_data(const void *a, const void *b)
{
    const struct st_tensor *x = a, *y = b;
    if (x->data != y->data)
        return x->data < y->data ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);   /* empty ones first */
}

/* Tensors must tile the data area. */
static lm_status check_tiling(const struct part *p, struct st_tensor *t, int n,
                              const uint8_t *data, struct lm_err *err)
{
    if (n > 0)
        qsort(t, (size_t)n, sizeof *t, by_data);
    const uint8_t *at = data;
    for (int i = 0; i < n; i++) {
        const uint8_t *d = t[i].data;
        if (d != at)
            return lm_err_set(err, LM_FORMAT, "%s: tensor %.140s: %s", p->name, t[i].name,
                              d < at ? "overlaps another tensor" : "leaves a hole before it");
        at += t[i].bytes;
    }
    if (at != p->base + p->size)
        return lm_err_set(err, LM_FORMAT, "%s: %zu bytes after the last tensor belong to none",
                          p->name, (size_t)(p->base + p->size - at));
    return LM_OK;
}

static lm_status reserve(safetensors *st, size_t more, struct lm_err *err)
{
    size_t want = (size_t)st->n + more;
    if (want > INT_MAX / 2)
        return lm_err_set(err, LM_TOO_LARGE, "too many tensors");
    if (want <= (size_t)st->cap)
        return LM_OK;
    void *t = lm_reallocarray(st->tensors, want, sizeof *st->tensors);
    if (!t)
        return lm_err_set(err, LM_NOMEM, "no memory for %zu tensors", want);
    st->tensors = t;
    st->cap = (int)want;
    return LM_OK;
}

static lm_status parse_part(safetensors *st, struct part *p, struct lm_err *err)
{
    const uint8_t *data = NULL;
    lm_status s = read_header(p, &data, err);
    if (!s)
        s = check_metadata(p, err);
    if (!s)
        s = reserve(st, json_object_size(p->header), err);
    if (s)
        return s;
    int first = st->n;
    const char *name;
    json_t *info;
    json_object_foreach(p->header, name, info) {
        if (strcmp(name, "__metadata__") == 0)
            continue;
        s = parse_tensor(p, name, info, data, &st->tensors[st->n], err);
        if (s)
            return s;
        struct st_tensor *t = &st->tensors[st->n++];
        t->part = (int)(p - st->parts);
        t->at = (size_t)((const uint8_t *)t->data - p->base);
    }
    struct st_tensor *mine = st->tensors ? st->tensors + first : NULL;     /* {} has none */
    return check_tiling(p, mine, st->n - first, data, err);
}

/* ---- sets ------------------------------------------------------------------------------ */

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct st_tensor *)a)->name, ((const struct st_tensor *)b)->name);
}

static lm_status realign(safetensors *st, struct st_tensor *t, struct lm_err *err)
{
    void **c = lm_reallocarray(st->copies, (size_t)st->n_copies + 1, sizeof *c);
    if (c)
        st->copies = c;
    void *copy = c ? lm_malloc(t->bytes) : NULL;
    if (!copy)
        return lm_err_set(err, LM_NOMEM, "tensor %.140s: no memory to align %zu bytes", t->name,
                          t->bytes);
    memcpy(copy, t->data, t->bytes);
    st->copies[st->n_copies++] = copy;
    t->data = copy;
    return LM_OK;
}

static lm_status finish(safetensors *st, struct lm_err *err)
{
    if (st->n > 0)
        qsort(st->tensors, (size_t)st->n, sizeof *st->tensors, by_name);
    for (int i = 0; i < st->n; i++) {
        struct st_tensor *t = &st->tensors[i];
        if (i > 0 && strcmp(t->name, t[-1].name) == 0)
            return lm_err_set(err, LM_FORMAT, "tensor %.140s: is in more than one shard", t->name);
        if (t->is_float && t->bytes && (uintptr_t)t->data % kn_dtype_size(t->dtype)) {
            lm_status s = realign(st, t, err);
            if (s)
                return s;
        }
    }
    return LM_OK;
}

static lm_status map_file(struct part *p, struct lm_err *err)
{
    int fd = open(p->name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        lm_status s = errno == ENOENT || errno == ENOTDIR ? LM_NOT_FOUND
                    : errno == EACCES ? LM_DENIED : LM_IO;
        return lm_err_set(err, s, "%s: %s", p->name, strerror(errno));
    }
    lm_status s = LM_OK;
    struct stat sb;
    if (fstat(fd, &sb) != 0 || !S_ISREG(sb.st_mode)) {
        s = lm_err_set(err, LM_FORMAT, "%s: is not a regular file", p->name);
    } else if (sb.st_size == 0) {
        s = lm_err_set(err, LM_FORMAT, "%s: is empty", p->name);
    } else {
        void *m = mmap(NULL, (size_t)sb.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (m == MAP_FAILED) {
            s = lm_err_set(err, LM_IO, "%s: cannot be mapped: %s", p->name, strerror(errno));
        } else {
            p->base = m;
            p->size = (size_t)sb.st_size;
            p->mapped = true;
            p->fd = fd;
            return LM_OK;
        }
    }
    close(fd);
    return s;
}

static safetensors *set_new(int n_parts)
{
    safetensors *st = lm_calloc(1, sizeof *st);
    if (!st)
        return NULL;
    st->parts = lm_calloc((size_t)n_parts, sizeof *st->parts);
    if (!st->parts) {
        free(st);
        return NULL;
    }
    return st;
}

/* Adds one file to the set; takes `path`. */
static lm_status add_file(safetensors *st, char *path, struct lm_err *err)
{
    if (!path)
        return lm_err_set(err, LM_NOMEM, "no memory for a path");
    struct part *p = &st->parts[st->n_parts++];
    p->name = path;
    lm_status s = map_file(p, err);
    return s ? s : parse_part(st, p, err);
}

static lm_status set_done(safetensors *st, lm_status s, safetensors **out, struct lm_err *err)
{
    if (!s)
        s = finish(st, err);
    if (s)
        safetensors_close(st);
    else
        *out = st;
    return s;
}

lm_status safetensors_open(const char *path, safetensors **out, struct lm_err *err)
{
    safetensors *st = set_new(1);
    if (!st)
        return lm_err_set(err, LM_NOMEM, "%s: no memory", path);
    return set_done(st, add_file(st, lm_strdup(path), err), out, err);
}

lm_status safetensors_open_memory(const void *bytes, size_t n, const char *name,
                                  safetensors **out, struct lm_err *err)
{
    safetensors *st = set_new(1);
    struct part *p = st ? &st->parts[st->n_parts++] : NULL;
    if (p)
        p->name = lm_strdup(name);
    if (!p || !p->name) {
        safetensors_close(st);
        return lm_err_set(err, LM_NOMEM, "%s: no memory", name);
    }
    p->base = bytes;
    p->size = n;
    return set_done(st, parse_part(st, p, err), out, err);
}

/* ---- sharded models -------------------------------------------------------------------- */

static bool shard_name_ok(const char *s)
{
    return s[0] != '\0' && s[0] != '.' && !strchr(s, '/') && strlen(s) <= 255;
}

/* The distinct values of weight_map, in order of first appearance, as keys of *shards. */
static lm_status list_shards(const json_t *map, const char *file, json_t *shards,
                             struct lm_err *err)
{
    const char *name;
    json_t *v;
    json_object_foreach((json_t *)map, name, v) {
        const char *shard = json_string_value(v);
        if (!shard || !shard_name_ok(shard))
            return lm_err_set(err, LM_FORMAT, "%s: tensor %.140s: \"%.64s\" is not the name of a"
                              " file in this folder", file, name, shard ? shard : "?");
        if (json_object_set_new(shards, shard, json_true()) != 0)
            return lm_err_set(err, LM_NOMEM, "%s: no memory", file);
    }
    if (json_object_size(shards) == 0 || json_object_size(shards) > MAX_SHARDS)
        return lm_err_set(err, LM_FORMAT, "%s: names %zu shards, expected 1 to %d", file,
                          json_object_size(shards), MAX_SHARDS);
    return LM_OK;
}

static lm_status check_promises(const safetensors *st, const json_t *map, const char *file,
                                struct lm_err *err)
{
    const char *name;
    json_t *v;
    json_object_foreach((json_t *)map, name, v)
        if (!safetensors_find(st, name))
            return lm_err_set(err, LM_FORMAT, "%s: tensor %.140s is not in %.64s", file, name,
                              json_string_value(v));
    return LM_OK;
}

static lm_status open_shards(const char *dir, const json_t *map, const char *file,
                             safetensors **out, struct lm_err *err)
{
    json_t *shards = json_object();
    lm_status s = list_shards(map, file, shards, err);
    safetensors *st = s ? NULL : set_new((int)json_object_size(shards));
    if (!s && !st)
        s = lm_err_set(err, LM_NOMEM, "%s: no memory", file);
    const char *shard;
    json_t *v;
    json_object_foreach(shards, shard, v) {
        if (!s)
            s = add_file(st, ju_join(dir, shard), err);
    }
    json_decref(shards);
    if (!st)
        return s;
    if (!s)
        s = finish(st, err);
    if (!s)
        s = check_promises(st, map, file, err);
    if (s)
        safetensors_close(st);
    else
        *out = st;
    return s;
}

static lm_status open_index(const char *dir, const char *path, safetensors **out,
                            struct lm_err *err)
{
    char *text = NULL;
    size_t n = 0;
    json_t *index = NULL;
    lm_status s = ju_read_file(path, MAX_INDEX_BYTES, &text, &n, err);
    if (!s)
        s = ju_parse(text, n, path, &index, err);
    if (!s) {
        const json_t *map = json_object_get(index, "weight_map");
        if (!json_is_object(map))
            s = lm_err_set(err, LM_FORMAT, "%s: weight_map is missing or not an object", path);
        else
            s = open_shards(dir, map, path, out, err);
    }
    json_decref(index);
    free(text);
    return s;
}

lm_status safetensors_open_model(const char *dir, safetensors **out, struct lm_err *err)
{
    char *single = ju_join(dir, "model.safetensors");
    char *index = ju_join(dir, "model.safetensors.index.json");
    lm_status s;
    if (!single || !index)
        s = lm_err_set(err, LM_NOMEM, "%s: no memory", dir);
    else if (access(single, F_OK) == 0)
        s = safetensors_open(single, out, err);
    else if (access(index, F_OK) == 0)
        s = open_index(dir, index, out, err);
    else
        s = lm_err_set(err, LM_NOT_FOUND, "%s: has neither model.safetensors nor"
                       " model.safetensors.index.json (pickle weights are not read)", dir);
    free(single);
    free(index);
    return s;
}

void safetensors_close(safetensors *st)
{
    if (!st)
        return;
    for (int i = 0; i < st->n_parts; i++) {
        struct part *p = &st->parts[i];
        if (p->mapped) {
            munmap((void *)p->base, p->size);
            close(p->fd);
        }
        json_decref(p->header);
        free(p->name);
    }
    for (int i = 0; i < st->n_copies; i++)
        free(st->copies[i]);
    free(st->copies);
    free(st->tensors);
    free(st->parts);
    free(st);
}

int safetensors_count(const safetensors *st)
{
    return st->n;
}

const struct st_tensor *safetensors_at(const safetensors *st, int i)
{
    return i >= 0 && i < st->n ? &st->tensors[i] : NULL;
}

const struct st_tensor *safetensors_find(const safetensors *st, const char *name)
{
    struct st_tensor key = { .name = name };
    return st->n ? bsearch(&key, st->tensors, (size_t)st->n, sizeof key, by_name) : NULL;
}

lm_status safetensors_read(const safetensors *st, const struct st_tensor *t, size_t from, size_t n,
                           void *dst, struct lm_err *err)
{
    const struct part *p = &st->parts[t->part];
    if (from > t->bytes || n > t->bytes - from)
        return lm_err_set(err, LM_INVALID, "%s: tensor %.140s: bytes %zu to %zu of %zu", p->name,
                          t->name, from, from + n, t->bytes);
    if (!p->mapped) {
        memcpy(dst, p->base + t->at + from, n);
        return LM_OK;
    }
    for (size_t done = 0; done < n;) {
        ssize_t k = pread(p->fd, (char *)dst + done, n - done, (off_t)(t->at + from + done));
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return lm_err_set(err, LM_IO, "%s: tensor %.140s: %s", p->name, t->name,
                              k < 0 ? strerror(errno) : "the file has become shorter");
        done += (size_t)k;
    }
    return LM_OK;
}

#define AHEAD_STEP ((size_t)128 << 10)  /* the system may cut a longer request down to this */

void safetensors_ahead(const safetensors *st, size_t bytes)
{
    for (int i = 0; i < st->n_parts; i++) {
        const struct part *p = &st->parts[i];
        size_t n = p->mapped ? LM_MIN(p->size, bytes) : 0;
        for (size_t at = 0; at < n; at += AHEAD_STEP)
            (void)posix_fadvise(p->fd, (off_t)at, (off_t)LM_MIN(AHEAD_STEP, n - at),
                                POSIX_FADV_WILLNEED);
        bytes -= n;
    }
}
