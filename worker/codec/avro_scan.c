/* SPDX-License-Identifier: Apache-2.0 */
/*
 * avro_scan.c - a bounded walk over an Avro datum before Avro C decodes it; see avro_codec.h.
 *
 * Avro C 1.11 believes every length it reads: 5 bytes can ask for 381 MB, a truncated string leaks
 * what it claimed, a negative length is undefined behaviour. The scan makes those unreachable. Its
 * cost is one pass over the bytes; its depth is the schema's, which avro_plan.c has bounded.
 */
#include "worker/codec/avro_codec.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "worker/codec/avro_path.h"

/* Each value costs some 40 bytes, null items and fields included, so values are counted and not
 * only items. A map is small because avro_consume.c looks for each key among those before it: 256
 * cost some 0.2 ms, for their keys are short: keys of the same length are compared byte by byte.
 * Ours have 64 entries (metadata, keys of at most 256 bytes) or 21 (the logprobs of one token). */
enum { MAX_VALUES = 512 * 1024, MAX_MAP_ENTRIES = 256, MAX_MAP_KEY = 1024 };

struct scan {
    const unsigned char *at, *end;
    size_t values;
    size_t names;               /* of fields that are not null, and map keys */
    size_t key_bytes;
    size_t map_entries;         /* of the innermost map */
    struct avro_path path;
    struct lm_err *err;
};

static lm_status scan_node(struct scan *s, const struct avro_node *n);

static lm_status refuse(struct scan *s, lm_status code, const char *fmt, ...) LM_PRINTF(3, 4);

static lm_status refuse(struct scan *s, lm_status code, const char *fmt, ...)
{
    char path[256], msg[160];
    avro_path_text(&s->path, path, sizeof path);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    return lm_err_set(s->err, code, "Avro datum, %s: %s", path, msg);
}

static lm_status too_many(struct scan *s)
{
    return refuse(s, LM_TOO_LARGE, "more than %d values", MAX_VALUES);
}

static lm_status scan_long_number(struct scan *s, int64_t *out)
{
    uint64_t v = 0;
    for (int shift = 0; shift < 70; shift += 7) {
        if (s->at == s->end)
            return refuse(s, LM_FORMAT, "ends in the middle of a number");
        uint64_t byte = *s->at++;
        if (shift == 63 && byte > 1)
            break;
        v |= (byte & 0x7f) << shift;
        if (byte < 0x80) {
            *out = (int64_t)(v >> 1) ^ -(int64_t)(v & 1);
            return LM_OK;
        }
    }
    return refuse(s, LM_FORMAT, "a number has more than 64 bits");
}

/* Variable-length zig-zag, at most 10 bytes and 64 bits (Avro specification, "Binary encoding");
 * mostly one byte. */
static inline lm_status scan_long(struct scan *s, int64_t *out)
{
    if (s->at == s->end || *s->at >= 0x80)
        return scan_long_number(s, out);
    int64_t v = *s->at++;
    *out = v >> 1 ^ -(v & 1);
    return LM_OK;
}

static lm_status scan_bytes(struct scan *s, size_t n, const char *what)
{
    size_t left = (size_t)(s->end - s->at);
    if (n > left)
        return refuse(s, LM_FORMAT, "%s of %zu bytes, but %zu are left", what, n, left);
    s->at += n;
    return LM_OK;
}

static lm_status scan_sized(struct scan *s, const char *what)
{
    int64_t n = 0;
    lm_status st = scan_long(s, &n);
    if (!st && n < 0)
        return refuse(s, LM_FORMAT, "%s of %" PRId64 " bytes", what, n);
    return st ? st : scan_bytes(s, (size_t)n, what);
}

static lm_status scan_index(struct scan *s, int n, const char *what)
{
    int64_t i = 0;
    lm_status st = scan_long(s, &i);
    if (!st && (i < 0 || i >= n))
        return refuse(s, LM_FORMAT, "%s %" PRId64 " of %d", what, i, n);
    return st;
}

/* Keys are compared as C strings from here on, so a NUL in one would make two keys equal. */
static lm_status scan_key(struct scan *s)
{
    const unsigned char *before = s->at;
    if (++s->map_entries > MAX_MAP_ENTRIES)
        return refuse(s, LM_TOO_LARGE, "a map of more than %d entries", MAX_MAP_ENTRIES);
    lm_status st = scan_sized(s, "a map key");
    if (st)
        return st;
    while (*before & 0x80)
        before++;
    before++;
    if (s->at - before > MAX_MAP_KEY)
        return refuse(s, LM_TOO_LARGE, "a map key of %td bytes, more than %d", s->at - before,
                      MAX_MAP_KEY);
    if (memchr(before, 0, (size_t)(s->at - before)))
        return refuse(s, LM_FORMAT, "a map key contains U+0000");
    s->names++;
    s->key_bytes += (size_t)(s->at - before) + 1;
    return LM_OK;
}

static lm_status scan_block(struct scan *s, const struct avro_node *n, int64_t count)
{
    size_t least = n->child[0]->min_bytes + (n->type == AVRO_MAP);
    size_t left = (size_t)(s->end - s->at);
    if ((uint64_t)count > left / least)
        return refuse(s, LM_FORMAT, "a block of %" PRId64 " items, but %zu bytes are left", count,
                      left);
    for (int64_t i = 0; i < count; i++) {
        lm_status st = n->type == AVRO_MAP ? scan_key(s) : LM_OK;
        if (!st)
            st = scan_node(s, n->child[0]);
        if (st)
            return st;
    }
    return LM_OK;
}

/* Blocks of items until one of 0; a negative count is followed by the block's size in bytes. */
static lm_status scan_blocks(struct scan *s, const struct avro_node *n)
{
    for (;;) {
        int64_t count = 0, size = -1;
        lm_status st = scan_long(s, &count);
        if (st || count == 0)
            return st;
        if (count < 0) {
            if (count == INT64_MIN)
                return refuse(s, LM_FORMAT, "a block count of %" PRId64, count);
            count = -count;
            st = scan_long(s, &size);
            if (!st && (size < 0 || size > s->end - s->at))
                return refuse(s, LM_FORMAT, "a block of %" PRId64 " bytes, but %td are left", size,
                              s->end - s->at);
        }
        const unsigned char *start = s->at;
        if (!st)
            st = scan_block(s, n, count);
        if (!st && size >= 0 && s->at - start != size)
            return refuse(s, LM_FORMAT, "a block says %" PRId64 " bytes and has %td", size,
                          s->at - start);
        if (st)
            return st;
    }
}

static lm_status scan_items(struct scan *s, const struct avro_node *n)
{
    size_t around = s->map_entries;
    s->map_entries = 0;
    s->path.at[s->path.n++] = "[]";
    lm_status st = scan_blocks(s, n);
    s->path.n--;
    s->map_entries = around;
    return st;
}

/* Fields from i on that are null, a union and its branch each. */
static int scan_nulls(struct scan *s, const struct avro_node *n, int i)
{
    int nulls = avro_nulls(n, i, s->at, s->end);
    s->at += nulls;
    s->values += 2 * (size_t)nulls;
    return nulls;
}

static lm_status scan_record(struct scan *s, const struct avro_node *n)
{
    lm_status st = LM_OK;
    s->path.n++;
    for (int i = 0; !st && (i += scan_nulls(s, n, i)) < n->n; i++) {
        s->names++;
        s->path.at[s->path.n - 1] = n->field[i].name;
        st = scan_node(s, n->child[i]);
    }
    s->path.n--;
    if (!st && s->values > MAX_VALUES)
        return too_many(s);
    return st;
}

static lm_status scan_union(struct scan *s, const struct avro_node *n)
{
    int64_t i = 0;
    lm_status st = scan_long(s, &i);
    if (!st && (i < 0 || i >= n->n))
        return refuse(s, LM_FORMAT, "union branch %" PRId64 " of %d", i, n->n);
    return st ? st : scan_node(s, n->child[i]);
}

static lm_status scan_int(struct scan *s)
{
    int64_t v = 0;
    lm_status st = scan_long(s, &v);
    if (!st && (v < INT32_MIN || v > INT32_MAX))
        return refuse(s, LM_FORMAT, "%" PRId64 " is no 32-bit int", v);
    return st;
}

static lm_status scan_boolean(struct scan *s)
{
    lm_status st = scan_bytes(s, 1, "a boolean");
    if (!st && s->at[-1] > 1)
        return refuse(s, LM_FORMAT, "a boolean of %d", s->at[-1]);
    return st;
}

static lm_status scan_node(struct scan *s, const struct avro_node *n)
{
    int64_t ignored;
    if (++s->values > MAX_VALUES)
        return too_many(s);
    switch (n->type) {
    case AVRO_NULL: return LM_OK;
    case AVRO_BOOLEAN: return scan_boolean(s);
    case AVRO_INT32: return scan_int(s);
    case AVRO_INT64: return scan_long(s, &ignored);
    case AVRO_FLOAT: return scan_bytes(s, 4, "a float");
    case AVRO_DOUBLE: return scan_bytes(s, 8, "a double");
    case AVRO_STRING: return scan_sized(s, "a string");
    case AVRO_BYTES: return scan_sized(s, "bytes");
    case AVRO_FIXED: return scan_bytes(s, (size_t)n->size, "a fixed");
    case AVRO_ENUM: return scan_index(s, n->n, "enum symbol");
    case AVRO_UNION: return scan_union(s, n);
    case AVRO_RECORD: return scan_record(s, n);
    case AVRO_ARRAY:
    case AVRO_MAP: return scan_items(s, n);
    default: return refuse(s, LM_UNSUPPORTED, "Avro type %d", (int)n->type);
    }
}

lm_status avro_scan(const struct avro_plan *p, const void *data, size_t len,
                    struct avro_size *size, struct lm_err *err)
{
    struct scan s = { .at = data, .end = (const unsigned char *)data + len, .err = err };
    lm_status st = scan_node(&s, avro_plan_root(p));
    if (!st && s.at != s.end)
        return refuse(&s, LM_FORMAT, "%td bytes behind its end", s.end - s.at);
    *size = (struct avro_size){ s.values + s.names, s.key_bytes };
    return st;
}
