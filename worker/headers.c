/* SPDX-License-Identifier: Apache-2.0 */
/*
 * headers.c - see headers.h. Conventions: Spring for Apache Kafka's ReplyingKafkaTemplate (header
 * names, 4-byte big-endian partition), W3C Trace Context (traceparent, tracestate).
 */
#include "worker/headers.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char plain_correlation[] = "correlation-id";
static const char *const trace_names[] = {
    "traceparent", "tracestate", "ce_traceparent", "ce_tracestate",
};

const struct header *header_find(const struct header *h, int n, const char *name)
{
    for (int i = n - 1; i >= 0; i--)
        if (!strcmp(h[i].name, name))
            return &h[i];
    return NULL;
}

/* ---- list ------------------------------------------------------------------------------- */

struct header_block {
    struct header_block *next;
    char bytes[];
};

void header_list_release(struct header_list *l)
{
    for (struct header_block *b = l->blocks, *next; b; b = next) {
        next = b->next;
        free(b);
    }
    if (l->items != l->few)
        free(l->items);
    l->items = NULL;
    l->blocks = NULL;
    l->n = l->cap = 0;
    l->used = 0;
    l->failed = false;
}

static bool list_grow(struct header_list *l)
{
    if (!l->items) {
        l->items = l->few;
        l->cap = HEADERS_FEW;
        return true;
    }
    struct header *old = l->items == l->few ? NULL : l->items;
    struct header *grown = lm_reallocarray(old, (size_t)l->cap * 4, sizeof *grown);
    if (!grown)
        return false;
    if (!old)
        memcpy(grown, l->few, sizeof l->few);
    l->items = grown;
    l->cap *= 4;
    return true;
}

static char *list_room(struct header_list *l, size_t n)
{
    if (n <= sizeof l->bytes - l->used) {
        l->used += n;
        return l->bytes + l->used - n;
    }
    struct header_block *b = n < SIZE_MAX / 2 ? lm_malloc(sizeof *b + n) : NULL;
    if (!b)
        return NULL;
    b->next = l->blocks;
    l->blocks = b;
    return b->bytes;
}

/* Without a copy: name and value outlive the list. */
static void lend(struct header_list *l, const char *name, const void *value, size_t len)
{
    if (l->n == l->cap && !list_grow(l)) {
        l->failed = true;
        return;
    }
    l->items[l->n++] = (struct header){ name, value, value ? len : 0 };
}

/* A copy of the value, under a name that is lent. */
static void add_value(struct header_list *l, const char *name, const void *value, size_t len)
{
    char *copy = list_room(l, len);
    if (!copy) {
        l->failed = true;
        return;
    }
    memcpy(copy, value, len);
    lend(l, name, copy, len);
}

void header_add(struct header_list *l, const char *name, const void *value, size_t len)
{
    size_t name_size = strlen(name) + 1;
    len = value ? len : 0;
    char *copy = len < SIZE_MAX / 2 ? list_room(l, name_size + len) : NULL;
    if (!copy) {
        l->failed = true;
        return;
    }
    memcpy(copy, name, name_size);
    if (len)
        memcpy(copy + name_size, value, len);
    lend(l, copy, value ? copy + name_size : NULL, len);
}

void header_add_text(struct header_list *l, const char *name, const char *text)
{
    header_add(l, name, text, strlen(text));
}

void header_add_be64(struct header_list *l, const char *name, int64_t v)
{
    unsigned char b[8];
    for (int i = 0; i < 8; i++)
        b[i] = (unsigned char)((uint64_t)v >> (56 - 8 * i));
    header_add(l, name, b, sizeof b);
}

void header_add_be32(struct header_list *l, const char *name, int32_t v)
{
    unsigned char b[4];
    for (int i = 0; i < 4; i++)
        b[i] = (unsigned char)((uint32_t)v >> (24 - 8 * i));
    header_add(l, name, b, sizeof b);
}

void header_add_decimal(struct header_list *l, const char *name, int64_t v)
{
    char text[24];
    snprintf(text, sizeof text, "%" PRId64, v);
    header_add_text(l, name, text);
}

/* ---- routes ----------------------------------------------------------------------------- */

bool reply_topic_allowed(const char *allowed, const char *topic)
{
    while (*allowed) {
        while (*allowed == ',' || isspace((unsigned char)*allowed))
            allowed++;
        size_t n = strcspn(allowed, ",");
        size_t used = n;
        while (used && isspace((unsigned char)allowed[used - 1]))
            used--;
        if (used && allowed[used - 1] == '*') {
            if (!strncmp(topic, allowed, used - 1))
                return true;
        } else if (used && strlen(topic) == used && !strncmp(topic, allowed, used)) {
            return true;
        }
        allowed += n;
    }
    return false;
}

static lm_status read_topic(const struct header *h, char *out, size_t cap, struct lm_err *err)
{
    if (!h->value || h->len == 0 || h->len >= cap)
        return lm_err_set(err, LM_INVALID, "header %s: a topic's name has 1 to 249 bytes, this "
                          "has %zu", h->name, h->value ? h->len : 0);
    memcpy(out, h->value, h->len);
    out[h->len] = '\0';
    for (size_t i = 0; i < h->len; i++)
        if (!isalnum((unsigned char)out[i]) && !memchr("._-", out[i], 3))      /* may be text */
            return lm_err_set(err, LM_INVALID, "header %s: its %zu bytes can't be a topic's name: "
                              "byte %zu is not allowed", h->name, h->len, i);
    return LM_OK;
}

/* Brokers refuse these for good, to a transaction as a right that is missing: for which it would be
 * waited. */
static bool is_of_kafka(const char *topic)
{
    static const char *const names[] = { "__consumer_offsets", "__transaction_state",
                                         "__share_group_state" };
    for (size_t i = 0; i < LM_COUNT(names); i++)
        if (!strcmp(topic, names[i]))
            return true;
    return false;
}

static lm_status read_partition(const struct header *h, int32_t *out, struct lm_err *err)
{
    const unsigned char *b = h->value;
    if (!b || h->len != 4)
        return lm_err_set(err, LM_INVALID, "header %s: a partition is 4 bytes, big-endian; this "
                          "has %zu", h->name, b ? h->len : 0);
    uint32_t v = (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
    if (v > INT32_MAX)
        return lm_err_set(err, LM_INVALID, "header %s: %d is no partition", h->name, (int32_t)v);
    *out = (int32_t)v;
    return LM_OK;
}

static void copy_text(char *to, size_t cap, const char *from)
{
    size_t n = strnlen(from, cap - 1);
    memcpy(to, from, n);
    to[n] = '\0';
}

lm_status reply_route(const struct header *h, int n, const struct header_names *names,
                      const char *field, const char *dflt, const char *allowed,
                      struct reply_route *out, struct lm_err *err)
{
    const struct header *topic = header_find(h, n, names->reply_topic);
    const struct header *partition = header_find(h, n, names->reply_partition);
    lm_status st;
    out->partition = -1;
    out->follows = false;
    if (topic) {
        if ((st = read_topic(topic, out->topic, sizeof out->topic, err)))
            return st;
    } else {
        struct header given = { "reply_topic", field, field ? strlen(field) : 0 };
        if (!field)
            copy_text(out->topic, sizeof out->topic, dflt);
        else if ((st = read_topic(&given, out->topic, sizeof out->topic, err)))
            return st;
    }
    out->asked = strcmp(out->topic, dflt) != 0;
    if (out->asked && !reply_topic_allowed(allowed, out->topic))
        return lm_err_set(err, LM_DENIED, "reply topic '%s' is neither topics.replies nor in "
                          "topics.replies_allowed", out->topic);
    if (out->asked && is_of_kafka(out->topic))
        return lm_err_set(err, LM_DENIED, "reply topic '%s' is Kafka's own", out->topic);
    return partition ? read_partition(partition, &out->partition, err) : LM_OK;
}

/* ---- reply headers ----------------------------------------------------------------------- */

static bool repeat_header(struct header_list *out, const struct header *h, int n,
                          const char *name)
{
    const struct header *found = n ? header_find(h, n, name) : NULL;
    if (found)
        lend(out, name, found->value, found->len);
    return found;
}

static void add_correlation(struct header_list *out, const struct header *h, int n,
                            const struct header_names *names, const struct prompt *p)
{
    bool other = strcmp(names->correlation_id, plain_correlation) != 0;
    bool had = repeat_header(out, h, n, names->correlation_id);
    if (other)
        had |= repeat_header(out, h, n, plain_correlation);
    if (had || !p->correlation_id)
        return;
    size_t len = strlen(p->correlation_id);
    add_value(out, names->correlation_id, p->correlation_id, len);
    if (other)
        add_value(out, plain_correlation, p->correlation_id, len);
}

void reply_headers(struct header_list *out, const struct header *h, int n,
                   const struct header_names *names, const struct prompt *p, enum encoding enc)
{
    static const char json[] = "application/json", avro[] = "application/avro";
    _Static_assert(sizeof json == sizeof avro, "one length for both");
    lend(out, "content-type", enc == ENCODING_AVRO ? avro : json, sizeof json - 1);
    add_correlation(out, h, n, names, p);
    for (size_t i = 0; i < LM_COUNT(trace_names); i++)
        repeat_header(out, h, n, trace_names[i]);
    add_value(out, "loramill-request-id", p->id, strlen(p->id));
}
