/* SPDX-License-Identifier: Apache-2.0 */
/*
 * offset_map.c - see offset_map.h for the format.
 *
 * The encoder writes into a fixed buffer of the largest payload and stops at the range that would
 * not fit. The decoder walks with one cursor that every read checks against the end; sums are
 * checked before they are made, so that no map can name an offset beyond INT64_MAX.
 */
#include "worker/offset_map.h"

#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

static const char prefix[] = "lm1:";
enum { PREFIX = sizeof prefix - 1, CHECK = 4, PAYLOAD_MAX = OFFSET_MAP_MAX / 4 * 3, RUNS = 0,
       BITS = 1 };

/* ---- sizes ------------------------------------------------------------------------------ */

static size_t varint_len(uint64_t v)
{
    size_t n = 1;
    while (v >>= 7)
        n++;
    return n;
}

static size_t text_len(size_t payload)
{
    return PREFIX + (payload * 8 + 5) / 6;
}

/* Payload bytes that a text of `limit` holds. */
static size_t payload_room(size_t limit)
{
    return limit <= PREFIX ? 0 : (limit - PREFIX) * 6 / 8;
}

static size_t head_len(int64_t base)
{
    return 1 + varint_len((uint64_t)base) + CHECK;
}

/* Payload bytes of the first ranges as runs, and how many ranges stay within `room`. */
static size_t runs_len(int64_t base, const struct offset_range *r, size_t n, size_t room,
                       size_t *fit)
{
    size_t len = head_len(base);
    int64_t end = base;
    for (*fit = 0; *fit < n; ++*fit) {
        const struct offset_range *x = &r[*fit];
        size_t more = varint_len((uint64_t)(x->from - end)) +
                      varint_len((uint64_t)(x->to - x->from));
        if (len + more > room)
            break;
        len += more;
        end = x->to;
    }
    return len;
}

static size_t bits_len(int64_t base, const struct offset_range *r, size_t n, size_t room,
                       size_t *fit)
{
    size_t head = n ? head_len(base) + varint_len((uint64_t)(r[0].from - base)) : 0, len = head;
    for (*fit = 0; *fit < n; ++*fit) {
        size_t bytes = (size_t)(((uint64_t)(r[*fit].to - r[0].from) + 7) / 8);
        if (head + bytes > room)
            break;
        len = head + bytes;
    }
    return len;
}

size_t offset_map_size(int64_t base, const struct offset_range *r, size_t n)
{
    size_t all, bits_fit;
    if (!n)
        return 0;
    size_t runs = runs_len(base, r, n, SIZE_MAX, &all);
    size_t bits = bits_len(base, r, n, SIZE_MAX, &bits_fit);
    return text_len(LM_MIN(runs, bits));
}

size_t offset_map_bound(int64_t base, int64_t end, const struct offset_range *r, size_t n,
                        size_t more)
{
    size_t all, span = (size_t)(end - base);
    size_t runs = runs_len(base, r, n, SIZE_MAX, &all) - head_len(base) + more;
    size_t bits = varint_len(span) + (span + 7) / 8;
    return text_len(head_len(end) + LM_MIN(runs, bits));
}

/* ---- encoding --------------------------------------------------------------------------- */

static uint8_t *put_varint(uint8_t *at, uint64_t v)
{
    for (; v >= 0x80; v >>= 7)
        *at++ = (uint8_t)(v | 0x80);
    *at++ = (uint8_t)v;
    return at;
}

static uint8_t *put_runs(uint8_t *at, int64_t base, const struct offset_range *r, size_t n)
{
    int64_t end = base;
    for (size_t i = 0; i < n; i++) {
        at = put_varint(at, (uint64_t)(r[i].from - end));
        at = put_varint(at, (uint64_t)(r[i].to - r[i].from));
        end = r[i].to;
    }
    return at;
}

static uint8_t *put_bits(uint8_t *at, int64_t base, const struct offset_range *r, size_t n)
{
    at = put_varint(at, (uint64_t)(r[0].from - base));
    size_t bytes = (size_t)(r[n - 1].to - r[0].from + 7) / 8;
    memset(at, 0, bytes);
    for (size_t i = 0; i < n; i++)
        for (int64_t o = r[i].from; o < r[i].to; o++) {
            size_t bit = (size_t)(o - r[0].from);
            at[bit / 8] |= (uint8_t)(1u << bit % 8);
        }
    return at + bytes;
}

static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

static size_t to_text(const uint8_t *p, size_t n, char *out)
{
    char *at = out;
    memcpy(at, prefix, PREFIX);
    at += PREFIX;
    for (size_t i = 0; i < n; i += 3) {
        uint32_t v = (uint32_t)p[i] << 16;
        v |= i + 1 < n ? (uint32_t)p[i + 1] << 8 : 0;
        v |= i + 2 < n ? p[i + 2] : 0;
        int digits = (int)LM_MIN(n - i, 3) + 1;
        for (int d = 0; d < digits; d++)
            *at++ = alphabet[v >> (18 - 6 * d) & 63];
    }
    *at = 0;
    return (size_t)(at - out);
}

static uint8_t *put_check(uint8_t *payload, uint8_t *at)
{
    uint32_t sum = XXH32(payload, (size_t)(at - payload), 0);
    for (int i = 0; i < CHECK; i++)
        *at++ = (uint8_t)(sum >> 8 * i);
    return at;
}

size_t offset_map_encode(int64_t base, const struct offset_range *r, size_t n, size_t limit,
                         char out[OFFSET_MAP_MAX + 1], size_t *covered)
{
    uint8_t payload[PAYLOAD_MAX], *at = payload;
    size_t room = payload_room(LM_MIN(limit, OFFSET_MAP_MAX)), in_runs, in_bits;
    size_t runs = runs_len(base, r, n, room, &in_runs);
    size_t bits = bits_len(base, r, n, room, &in_bits);
    bool as_runs = in_runs > in_bits || (in_runs == in_bits && runs <= bits);
    *covered = LM_MAX(in_runs, in_bits);
    out[0] = 0;
    if (!*covered)
        return 0;
    *at++ = as_runs ? RUNS : BITS;
    at = put_varint(at, (uint64_t)base);
    at = as_runs ? put_runs(at, base, r, *covered) : put_bits(at, base, r, *covered);
    at = put_check(payload, at);
    return to_text(payload, (size_t)(at - payload), out);
}

/* ---- decoding --------------------------------------------------------------------------- */

struct cursor { const uint8_t *at, *end; };

static bool get_varint(struct cursor *c, int64_t *out)
{
    uint64_t v = 0;
    for (int shift = 0; shift < 63 && c->at < c->end; shift += 7) {
        uint8_t b = *c->at++;
        v |= (uint64_t)(b & 0x7f) << shift;
        if (!(b & 0x80)) {
            *out = (int64_t)v;
            return true;
        }
    }
    return false;
}

static int digit_of(char ch)
{
    const char *at = ch ? strchr(alphabet, ch) : NULL;
    return at ? (int)(at - alphabet) : -1;
}

/* Payload length, or 0 when a character is none of ours or bits are left over. */
static size_t from_text(const char *text, size_t n, uint8_t payload[PAYLOAD_MAX])
{
    uint32_t v = 0;
    size_t len = 0;
    int bits = 0;
    for (size_t i = 0; i < n; i++) {
        int d = digit_of(text[i]);
        if (d < 0)
            return 0;
        v = (v << 6 | (uint32_t)d) & 0xfff;
        bits += 6;
        if (bits >= 8) {
            bits -= 8;
            payload[len++] = (uint8_t)(v >> bits);
        }
    }
    return bits >= 6 || (v & ((1u << bits) - 1)) ? 0 : len;
}

struct ranges { struct offset_range *items; size_t n, cap; };

static bool push(struct ranges *l, int64_t from, int64_t to)
{
    if (l->n == l->cap) {
        size_t cap = l->cap ? l->cap * 2 : 64;
        struct offset_range *grown = lm_reallocarray(l->items, cap, sizeof *grown);
        if (!grown)
            return false;
        l->items = grown;
        l->cap = cap;
    }
    l->items[l->n++] = (struct offset_range){ from, to };
    return true;
}

static lm_status get_runs(struct cursor *c, int64_t base, struct ranges *l)
{
    int64_t end = base, skip, length;
    while (c->at < c->end) {
        if (!get_varint(c, &skip) || !get_varint(c, &length) || length < 1 ||
            skip > INT64_MAX - end || length > INT64_MAX - end - skip)
            return LM_FORMAT;
        if (!push(l, end + skip, end + skip + length))
            return LM_NOMEM;
        end += skip + length;
    }
    return l->n ? LM_OK : LM_FORMAT;
}

static lm_status get_bits(struct cursor *c, int64_t base, struct ranges *l)
{
    int64_t skip;
    if (!get_varint(c, &skip) || c->at == c->end ||
        skip > INT64_MAX - base - 8 * (int64_t)PAYLOAD_MAX)
        return LM_FORMAT;
    int64_t first = base + skip, open = -1, bits = 8 * (int64_t)(c->end - c->at);
    for (int64_t i = 0; i <= bits; i++) {
        bool set = i < bits && c->at[i / 8] >> i % 8 & 1;
        if (set && open < 0)
            open = first + i;
        if (!set && open >= 0) {
            if (!push(l, open, first + i))
                return LM_NOMEM;
            open = -1;
        }
    }
    return l->n ? LM_OK : LM_FORMAT;
}

/* The checksum holds: cuts it off. */
static bool checked(struct cursor *c)
{
    size_t n = (size_t)(c->end - c->at);
    if (n < 1 + CHECK)
        return false;
    uint32_t sum = XXH32(c->at, n - CHECK, 0);
    for (int i = 0; i < CHECK; i++)
        if (c->at[n - CHECK + (size_t)i] != (uint8_t)(sum >> 8 * i))
            return false;
    c->end -= CHECK;
    return true;
}

static lm_status check_prefix(const char *text, size_t len, struct lm_err *err)
{
    if (len < PREFIX || memcmp(text, prefix, 2) || text[3] != ':')
        return lm_err_set(err, LM_NOT_FOUND, "not an offset map");
    if (memcmp(text, prefix, PREFIX))
        return lm_err_set(err, LM_UNSUPPORTED, "an offset map of version '%c', this worker knows "
                          "'%c'", text[2], prefix[2]);
    if (len > OFFSET_MAP_MAX)
        return lm_err_set(err, LM_FORMAT, "an offset map of %zu bytes, at most %d are written", len,
                          OFFSET_MAP_MAX);
    return LM_OK;
}

static lm_status get_ranges(struct cursor *c, int64_t base, struct ranges *l, struct lm_err *err)
{
    int64_t kind, written_for;
    if (!checked(c))
        return lm_err_set(err, LM_FORMAT, "the offset map is damaged");
    if (!get_varint(c, &kind) || kind > BITS || !get_varint(c, &written_for))
        return lm_err_set(err, LM_FORMAT, "the offset map is malformed");
    if (written_for != base)
        return lm_err_set(err, LM_MISMATCH, "the offset map is for offset %lld, the group is at "
                          "%lld", (long long)written_for, (long long)base);
    lm_status st = kind == RUNS ? get_runs(c, base, l) : get_bits(c, base, l);
    return st ? lm_err_set(err, st, st == LM_NOMEM ? "out of memory for the offset map" :
                           "the offset map is malformed") : LM_OK;
}

lm_status offset_map_decode(const char *text, size_t len, int64_t base, struct offset_range **out,
                            size_t *n, struct lm_err *err)
{
    uint8_t payload[PAYLOAD_MAX];
    struct ranges l = { 0 };
    *out = NULL;
    *n = 0;
    lm_status st = check_prefix(text, len, err);
    if (st)
        return st;
    size_t bytes = from_text(text + PREFIX, len - PREFIX, payload);
    struct cursor c = { payload, payload + bytes };
    if ((st = get_ranges(&c, base, &l, err))) {
        free(l.items);
        return st;
    }
    *out = l.items;
    *n = l.n;
    return LM_OK;
}
