/* SPDX-License-Identifier: Apache-2.0 */
/*
 * avro_consume.c - a datum becomes a JSON tree: we walk it, Avro C reads each of its values; see
 * avro_codec.h.
 *
 * Avro C's reader/writer resolution has no defaults (its source says so), so a schema that gained
 * an optional field could not be read by an older producer's data and the other way round. We
 * therefore read by the writer's schema and take fields by name; what is missing gets the defaults
 * of json_prompt.c.
 *
 * A plan has a taker for each of its nodes. A schema is no circle, so a node is at one place of a
 * datum at a time, and its taker can hold what is being read there.
 *
 *   record, map, array   opens its container, takes what comes inside, closes it
 *   union                lets the branch take its place: same owner, same key
 *   the others           Avro C reads the value and calls back; the taker adds it to the tree
 *
 * Most fields of a prompt are null, and say no more than the number of a branch. Avro C would call
 * back three times for each; so where values lie is found here, in bytes that avro_scan() has
 * proved, and Avro C is shown one value's bytes at a time, no more.
 *
 * The tree is built as yyjson lays one out that it has read: depth first, each container ahead of
 * what it holds with the way to what follows, a member's name ahead of its value. The scan has
 * counted what may come, so it is one block, made once and never moved. It outlives what Avro C
 * reads a value into, so its strings lie in the datum itself, and are not terminated; names are.
 *
 * Ownership in Avro C: a string or bytes that a callback is given are the callback's to free, a
 * fixed is not. What Avro C allocates while it reads a value comes from the datum's scratch, where
 * there is room, and is gone with the next value.
 */
#include <avro.h>
#include <avro/consumer.h>
#include <errno.h>
#include <math.h>
#include <string.h>

#include "worker/codec/avro_codec.h"
#include "worker/codec/avro_path.h"
#include "worker/codec/message.h"
#include "worker/codec/shown.h"

struct taker {
    avro_consumer_t base;       /* first */
    const struct avro_node *node;
    struct taker **child;
    struct taker *owner;        /* the record, map or array around it; NULL: the whole datum */
    const char *key;            /* of a record's field */
    size_t key_len;
    const char *map_key;        /* a map's current one */
};

struct datum {
    const unsigned char *at, *end;      /* proved to hold what the plan says */
    struct json_scratch *scratch;
    avro_reader_t reader;       /* of one value at a time */
    yyjson_val *tree;           /* with room for all that the scan has counted */
    size_t n;
    char *keys;                 /* room for the text of those to come */
    struct lm_err err;
};

/* ---- errors --------------------------------------------------------------------------------- */

static const char *name_in_owner(const struct taker *t)
{
    if (t->owner->node->type == AVRO_ARRAY)
        return "[]";
    if (t->owner->node->type != AVRO_MAP)
        return t->key;
    return is_shown(t->owner->map_key, strlen(t->owner->map_key)) ? t->owner->map_key : "(a key)";
}

static int refuse(struct datum *d, const struct taker *t, lm_status code, const char *what)
{
    struct avro_path path = { .n = 0 };
    char text[256];
    for (const struct taker *at = t; at->owner; at = at->owner)
        path.n++;
    for (int i = path.n; t->owner; t = t->owner)
        path.at[--i] = name_in_owner(t);
    avro_path_text(&path, text, sizeof text);
    lm_err_set(&d->err, code, "%s %s", text, what);
    return EINVAL;
}

/* ---- values --------------------------------------------------------------------------------- */

static int take_boolean(avro_consumer_t *c, int v, void *ud)
{
    struct datum *d = ud;
    (void)c;
    unsafe_yyjson_set_bool(&d->tree[d->n++], v);
    return 0;
}

static int take_long(avro_consumer_t *c, int64_t v, void *ud)
{
    struct datum *d = ud;
    (void)c;
    unsafe_yyjson_set_sint(&d->tree[d->n++], v);
    return 0;
}

static int take_int(avro_consumer_t *c, int32_t v, void *ud)
{
    return take_long(c, v, ud);
}

static int take_double(avro_consumer_t *c, double v, void *ud)
{
    struct datum *d = ud;
    if (!isfinite(v))
        return refuse(d, (struct taker *)c, LM_INVALID, "must be a finite number");
    unsafe_yyjson_set_real(&d->tree[d->n++], v);
    return 0;
}

static int take_float(avro_consumer_t *c, float v, void *ud)
{
    return take_double(c, (double)v, ud);
}

static int take_string(avro_consumer_t *c, const void *s, size_t size, void *ud)
{
    struct datum *d = ud;
    size_t n = size - 1;        /* its size counts the NUL */
    bool good = json_is_utf8(s, n);
    avro_free((void *)(uintptr_t)s, size);
    if (!good)
        return refuse(d, (struct taker *)c, LM_FORMAT, "is not valid UTF-8");
    unsafe_yyjson_set_strn(&d->tree[d->n++], (const char *)d->at - n, n);
    return 0;
}

static int take_enum(avro_consumer_t *c, int v, void *ud)
{
    struct datum *d = ud;
    const char *symbol = avro_schema_enum_get(c->schema, v);
    unsafe_yyjson_set_strn(&d->tree[d->n++], symbol, strlen(symbol));
    return 0;
}

static int take_fixed(avro_consumer_t *c, const void *bytes, size_t n, void *ud)
{
    (void)bytes;
    (void)n;
    return refuse(ud, (struct taker *)c, LM_INVALID, "must not be of Avro type bytes or fixed");
}

static int take_bytes(avro_consumer_t *c, const void *bytes, size_t n, void *ud)
{
    avro_free((void *)(uintptr_t)bytes, n + 1);
    return take_fixed(c, NULL, 0, ud);
}

/* ---- takers --------------------------------------------------------------------------------- */

static const avro_consumer_t callbacks = {
    .boolean_value = take_boolean, .bytes_value = take_bytes, .double_value = take_double,
    .float_value = take_float, .int_value = take_int, .long_value = take_long,
    .string_value = take_string, .enum_value = take_enum, .fixed_value = take_fixed,
};

/* For the node and all below it. NULL: no memory. */
static struct taker *make_taker(struct arena *a, const struct avro_node *n, struct taker *owner,
                                const char *key)
{
    struct taker *t = arena_alloc(a, sizeof *t);
    bool leaf = !n->child;
    if (!t || (!leaf && !(t->child = arena_alloc(a, (size_t)n->n * sizeof(struct taker *)))))
        return NULL;
    t->base = callbacks;
    t->base.schema = n->schema;
    t->node = n;
    t->owner = owner;
    t->key = key;
    t->key_len = key ? strlen(key) : 0;
    for (int i = 0; !leaf && i < n->n; i++) {
        bool in_union = n->type == AVRO_UNION;
        t->child[i] = make_taker(a, n->child[i], in_union ? owner : t, in_union ? key :
                                 n->type == AVRO_RECORD ? n->field[i].name : NULL);
        if (!t->child[i])
            return NULL;
    }
    return t;
}

/* ---- the walk ------------------------------------------------------------------------------- */

static int take(struct datum *d, struct taker *t);

static int64_t next_long(struct datum *d)
{
    uint64_t v = 0;
    for (int shift = 0;; shift += 7) {
        uint64_t byte = *d->at++;
        v |= (byte & 0x7f) << shift;
        if (byte < 0x80)
            return (int64_t)(v >> 1) ^ -(int64_t)(v & 1);
    }
}

/* All that came since then is its own. */
static void close_container(struct datum *d, size_t at, yyjson_type type, size_t members)
{
    yyjson_val *v = &d->tree[at];
    unsafe_yyjson_set_tag(v, type, YYJSON_SUBTYPE_NONE, members);
    v->uni.ofs = (d->n - at) * sizeof *v;
}

/* Fields from i on that are null, and left out. */
static int skip_nulls(struct datum *d, const struct avro_node *n, int i)
{
    int nulls = avro_nulls(n, i, d->at, d->end);
    d->at += nulls;
    return nulls;
}

static int take_field(struct datum *d, struct taker *t, size_t *members)
{
    size_t at = d->n++;
    unsafe_yyjson_set_strn(&d->tree[at], t->key, t->key_len);
    int bad = take(d, t);
    if (!bad && yyjson_is_null(&d->tree[at + 1]))
        d->n = at;              /* left out */
    else
        ++*members;
    return bad;
}

static int take_record(struct datum *d, struct taker *t)
{
    const struct avro_node *n = t->node;
    size_t at = d->n++, members = 0;
    int bad = 0;
    for (int i = 0; !bad && (i += skip_nulls(d, n, i)) < n->n; i++)
        bad = take_field(d, t->child[i], &members);
    close_container(d, at, YYJSON_TYPE_OBJ, members);
    return bad;
}

/* Its text is terminated. */
static int take_key(struct datum *d, struct taker *t)
{
    size_t n = (size_t)next_long(d);
    t->map_key = d->keys;
    memcpy(d->keys, d->at, n);
    d->keys[n] = '\0';
    d->keys += n + 1;
    d->at += n;
    unsafe_yyjson_set_strn(&d->tree[d->n++], t->map_key, n);
    return json_is_utf8(t->map_key, n) ? 0 : refuse(d, t->child[0], LM_FORMAT,
                                                    "has a name that is not valid UTF-8");
}

/* The entry behind this one, which is complete. */
static yyjson_val *next_entry(yyjson_val *key)
{
    return unsafe_yyjson_get_next(key + 1);
}

/* Strikes out the entry of that key, of those from `first`; the map has few. */
static bool strike_earlier(yyjson_val *first, const yyjson_val *key)
{
    size_t n = unsafe_yyjson_get_len((void *)(uintptr_t)key);
    for (yyjson_val *at = first; at < key; at = next_entry(at)) {
        if (yyjson_is_str(at) && unsafe_yyjson_equals_strn(at, key->uni.str, n)) {
            unsafe_yyjson_set_null(at);
            return true;
        }
    }
    return false;
}

/* Of a key that comes twice the last one counts, and a null says that there is none. */
static int take_entry(struct datum *d, struct taker *t, size_t first, size_t *entries, bool *gaps)
{
    size_t at = d->n;
    int bad = take_key(d, t);
    if (!bad)
        bad = take(d, t->child[0]);
    if (bad)
        return bad;
    if (strike_earlier(&d->tree[first], &d->tree[at])) {
        *gaps = true;
        --*entries;
    }
    if (yyjson_is_null(&d->tree[at + 1]))
        d->n = at;
    else
        ++*entries;
    return 0;
}

/* Once a map: so it costs a pass, however many keys came twice. */
static void close_gaps(struct datum *d, size_t first)
{
    yyjson_val *to = &d->tree[first], *end = &d->tree[d->n];
    for (yyjson_val *at = to, *next; at < end; at = next) {
        next = next_entry(at);
        if (yyjson_is_str(at)) {
            memmove(to, at, (size_t)(next - at) * sizeof *to);
            to += next - at;
        }
    }
    d->n = (size_t)(to - d->tree);
}

static int take_items(struct datum *d, struct taker *t)
{
    bool map = t->node->type == AVRO_MAP, gaps = false;
    size_t at = d->n++, items = 0;
    int bad = 0;
    for (int64_t n; !bad && (n = next_long(d)) != 0;) {
        if (n < 0)
            next_long(d);       /* the block's bytes */
        for (n = n < 0 ? -n : n; !bad && n > 0; n--) {
            bad = map ? take_entry(d, t, at + 1, &items, &gaps) : take(d, t->child[0]);
            items += !map;
        }
    }
    if (gaps && !bad)
        close_gaps(d, at + 1);
    close_container(d, at, map ? YYJSON_TYPE_OBJ : YYJSON_TYPE_ARR, items);
    return bad;
}

/* Moves over a value that is no container, and returns its bytes. */
static size_t value_bytes(struct datum *d, const struct avro_node *n)
{
    const unsigned char *start = d->at;
    switch (n->type) {
    case AVRO_BOOLEAN: d->at += 1; break;
    case AVRO_FLOAT: d->at += 4; break;
    case AVRO_DOUBLE: d->at += 8; break;
    case AVRO_FIXED: d->at += n->size; break;
    case AVRO_STRING:
    case AVRO_BYTES: {
        int64_t len = next_long(d);
        d->at += len;
        break;
    }
    default: next_long(d);      /* int, long, the index of an enum's symbol */
    }
    return (size_t)(d->at - start);
}

static int take_value(struct datum *d, struct taker *t)
{
    const char *value = (const char *)d->at;
    size_t n = value_bytes(d, t->node), used = d->scratch->used;
    avro_reader_memory_set_source(d->reader, value, (int64_t)n);
    int bad = avro_consume_binary(d->reader, &t->base, d);
    d->scratch->used = used;    /* what it was read into has been freed */
    return bad;
}

static int take(struct datum *d, struct taker *t)
{
    while (t->node->type == AVRO_UNION)
        t = t->child[next_long(d)];
    switch (t->node->type) {
    case AVRO_NULL:
        unsafe_yyjson_set_null(&d->tree[d->n++]);
        return 0;
    case AVRO_RECORD: return take_record(d, t);
    case AVRO_ARRAY:
    case AVRO_MAP: return take_items(d, t);
    default: return take_value(d, t);
    }
}

/* ---- the whole ------------------------------------------------------------------------------ */

/* Avro C's allocator for one datum; it keeps nothing longer. size 0: frees. */
static void *from_scratch(void *user, void *p, size_t old, size_t size)
{
    const yyjson_alc *alc = user;
    if (size)
        return p ? alc->realloc(alc->ctx, p, old, size) : alc->malloc(alc->ctx, size);
    if (p)
        alc->free(alc->ctx, p);
    return NULL;
}

/* The document, room for its values, then for the text of its maps' keys. */
static yyjson_doc *new_doc(const struct avro_size *size, const yyjson_alc *alc)
{
    enum { HEAD = LM_DIV_UP(sizeof(yyjson_doc), sizeof(yyjson_val)) };
    yyjson_val *block = alc->malloc(alc->ctx, (HEAD + size->values) * sizeof *block +
                                              size->key_bytes);
    yyjson_doc *doc = (yyjson_doc *)block;
    if (doc)
        *doc = (yyjson_doc){ .root = block + HEAD, .alc = *alc };
    return doc;
}

static lm_status read_datum(struct taker *root, avro_reader_t reader, const void *data,
                            size_t len, const struct avro_size *size,
                            struct json_scratch *scratch, yyjson_doc **out, struct lm_err *err)
{
    yyjson_doc *doc = new_doc(size, &scratch->alc);
    struct datum d;
    d.at = data;
    d.end = d.at + len;
    d.scratch = scratch;
    d.n = 0;
    d.err.code = LM_OK;
    d.reader = reader;
    bool good = doc;
    if (good) {
        d.tree = doc->root;
        d.keys = (char *)(doc->root + size->values);
        good = !take(&d, root);
        doc->val_read = d.n;
        doc->dat_read = (size_t)(d.at - (const unsigned char *)data);
    }
    if (good) {
        *out = doc;
        return LM_OK;
    }
    yyjson_doc_free(doc);
    if (!d.err.code)            /* the scan leaves nothing else to fail */
        return lm_err_set(err, LM_NOMEM, "out of memory");
    return lm_err_set(err, d.err.code, "%s", d.err.msg);
}

lm_status avro_decode_doc(struct avro_plan *p, const void *data, size_t len,
                          struct json_scratch *scratch, yyjson_doc **out, struct lm_err *err)
{
    struct avro_size size;
    lm_status st = avro_scan(p, data, len, &size, err);
    if (st)
        return st;
    avro_lock();
    struct taker **root = avro_plan_takers(p);
    if (!*root)
        *root = make_taker(avro_plan_arena(p), avro_plan_root(p), NULL, NULL);
    avro_reader_t reader = avro_plan_reader(p);
    const struct avro_allocator_state heap = AVRO_CURRENT_ALLOCATOR;
    avro_set_allocator(from_scratch, &scratch->alc);
    st = *root && reader ? read_datum(*root, reader, data, len, &size, scratch, out, err)
                         : lm_err_set(err, LM_NOMEM, "out of memory");
    avro_set_allocator(heap.alloc, heap.user_data);
    avro_unlock();
    return st;
}
