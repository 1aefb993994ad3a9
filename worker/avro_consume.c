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
 * datum at a time, and its taker can hold what is being filled there.
 *
 *   record, map, array   makes its container and hands it to its owner, then is the owner of what
 *                        comes inside
 *   union                lets the branch take its place: same owner, same key
 *   the others           Avro C reads the value and calls back; the taker hands it to its owner
 *
 * Most fields of a prompt are null, and say no more than the number of a branch. Avro C would call
 * back three times for each; so where values lie is found here, in bytes that avro_scan() has
 * proved, and Avro C is shown one value's bytes at a time, no more.
 *
 * Ownership in Avro C: a string or bytes that a callback is given are the callback's to free, a
 * fixed is not. What Avro C allocates while it reads a datum comes from the datum's scratch, where
 * there is room, so that a string is where the tree wants it.
 */
#include <avro.h>
#include <avro/consumer.h>
#include <errno.h>
#include <math.h>
#include <string.h>

#include "worker/avro_codec.h"
#include "worker/avro_path.h"
#include "worker/message.h"

struct taker {
    avro_consumer_t base;       /* first */
    const struct avro_node *node;
    struct taker **child;
    struct taker *owner;        /* the record, map or array around it; NULL: the whole datum */
    const char *key;            /* of a record's field */
    yyjson_mut_val *now;        /* a record's, map's or array's container */
    yyjson_mut_val *map_key;    /* a map's current one */
};

struct datum {
    const unsigned char *at;    /* proved to hold what the plan says */
    struct json_scratch *scratch;
    avro_reader_t reader;       /* of one value at a time */
    yyjson_mut_doc *doc;
    yyjson_mut_val *root;
    struct lm_err err;
};

/* ---- errors --------------------------------------------------------------------------------- */

static const char *name_in_owner(const struct taker *t)
{
    if (t->owner->node->type == AVRO_ARRAY)
        return "[]";
    return t->owner->node->type == AVRO_MAP ? yyjson_mut_get_str(t->owner->map_key) : t->key;
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

static int no_memory(struct datum *d)
{
    lm_err_set(&d->err, LM_NOMEM, "out of memory");
    return ENOMEM;
}

/* ---- values --------------------------------------------------------------------------------- */

/* Of a key that comes twice the last one counts. */
static int give_to_map(struct datum *d, struct taker *t, yyjson_mut_val *v)
{
    yyjson_mut_val *key = t->owner->map_key;
    if (yyjson_mut_is_null(v)) {
        yyjson_mut_obj_remove(t->owner->now, key);
        return 0;
    }
    return yyjson_mut_obj_put(t->owner->now, key, v) ? 0 : no_memory(d);
}

/* A null member is left out. */
static int give(struct datum *d, struct taker *t, yyjson_mut_val *v)
{
    bool good = v;
    if (good && !t->owner)
        d->root = v;
    else if (good && t->owner->node->type == AVRO_MAP)
        return give_to_map(d, t, v);
    else if (good && t->owner->node->type == AVRO_ARRAY)
        good = yyjson_mut_arr_append(t->owner->now, v);
    else if (good && !yyjson_mut_is_null(v))
        good = yyjson_mut_obj_add(t->owner->now, yyjson_mut_str(d->doc, t->key), v);
    return good ? 0 : no_memory(d);
}

static int take_boolean(avro_consumer_t *c, int v, void *ud)
{
    struct datum *d = ud;
    return give(d, (struct taker *)c, yyjson_mut_bool(d->doc, v));
}

static int take_int(avro_consumer_t *c, int32_t v, void *ud)
{
    struct datum *d = ud;
    return give(d, (struct taker *)c, yyjson_mut_sint(d->doc, v));
}

static int take_long(avro_consumer_t *c, int64_t v, void *ud)
{
    struct datum *d = ud;
    return give(d, (struct taker *)c, yyjson_mut_sint(d->doc, v));
}

static int take_double(avro_consumer_t *c, double v, void *ud)
{
    struct datum *d = ud;
    struct taker *t = (struct taker *)c;
    if (!isfinite(v))
        return refuse(d, t, LM_INVALID, "must be a finite number");
    return give(d, t, yyjson_mut_real(d->doc, v));
}

static int take_float(avro_consumer_t *c, float v, void *ud)
{
    return take_double(c, (double)v, ud);
}

static int take_string(avro_consumer_t *c, const void *s, size_t size, void *ud)
{
    struct datum *d = ud;
    struct taker *t = (struct taker *)c;
    bool good = json_is_utf8(s, size - 1);      /* its size counts the NUL */
    bool stays = json_scratch_has(d->scratch, s);
    yyjson_mut_val *v = !good ? NULL : stays ? yyjson_mut_strn(d->doc, s, size - 1) :
                        yyjson_mut_strncpy(d->doc, s, size - 1);
    if (!stays)
        avro_free((void *)(uintptr_t)s, size);
    return good ? give(d, t, v) : refuse(d, t, LM_FORMAT, "is not valid UTF-8");
}

static int take_enum(avro_consumer_t *c, int v, void *ud)
{
    struct datum *d = ud;
    return give(d, (struct taker *)c, yyjson_mut_str(d->doc, avro_schema_enum_get(c->schema, v)));
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
    for (int i = 0; !leaf && i < n->n; i++) {
        bool in_union = n->type == AVRO_UNION;
        t->child[i] = make_taker(a, n->child[i], in_union ? owner : t, in_union ? key :
                                 n->type == AVRO_RECORD ? n->name[i] : NULL);
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

/* Handed over when it begins; it is filled where it lies. */
static int open_container(struct datum *d, struct taker *t, yyjson_mut_val *v)
{
    t->now = v;
    return give(d, t, v);
}

static bool is_null(const struct datum *d, const struct avro_node *n)
{
    return n->type == AVRO_UNION && !(*d->at & 0x81) && n->child[*d->at >> 1]->type == AVRO_NULL;
}

static int take_record(struct datum *d, struct taker *t)
{
    int bad = open_container(d, t, yyjson_mut_obj(d->doc));
    for (int i = 0; !bad && i < t->node->n; i++) {
        if (is_null(d, t->node->child[i]))
            d->at++;            /* left out */
        else
            bad = take(d, t->child[i]);
    }
    return bad;
}

static int take_key(struct datum *d, struct taker *t)
{
    size_t n = (size_t)next_long(d);
    const char *key = (const char *)d->at;
    d->at += n;
    t->map_key = yyjson_mut_strncpy(d->doc, key, n);
    if (!t->map_key)
        return no_memory(d);
    return json_is_utf8(key, n) ? 0 : refuse(d, t->child[0], LM_FORMAT,
                                             "has a name that is not valid UTF-8");
}

static int take_items(struct datum *d, struct taker *t)
{
    bool map = t->node->type == AVRO_MAP;
    int bad = open_container(d, t, map ? yyjson_mut_obj(d->doc) : yyjson_mut_arr(d->doc));
    for (int64_t n; !bad && (n = next_long(d)) != 0;) {
        if (n < 0)
            next_long(d);       /* the block's bytes */
        for (n = n < 0 ? -n : n; !bad && n > 0; n--) {
            bad = map ? take_key(d, t) : 0;
            if (!bad)
                bad = take(d, t->child[0]);
        }
    }
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
    size_t n = value_bytes(d, t->node);
    avro_reader_memory_set_source(d->reader, value, (int64_t)n);
    return avro_consume_binary(d->reader, &t->base, d);
}

static int take(struct datum *d, struct taker *t)
{
    while (t->node->type == AVRO_UNION)
        t = t->child[next_long(d)];
    switch (t->node->type) {
    case AVRO_NULL: return give(d, t, yyjson_mut_null(d->doc));
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

/* The tree that was built becomes one that can be read: one block. */
static lm_status read_datum(struct taker *root, const void *data, struct json_scratch *scratch,
                            yyjson_doc **out, struct lm_err *err)
{
    struct datum d;
    d.scratch = scratch;
    d.at = data;
    d.root = NULL;
    d.err.code = LM_OK;
    d.doc = yyjson_mut_doc_new(&scratch->alc);
    d.reader = avro_reader_memory("", 0);
    bool good = d.doc && d.reader && !take(&d, root) && d.root &&
                (*out = yyjson_mut_val_imut_copy(d.root, &scratch->alc));
    if (d.reader)
        avro_reader_free(d.reader);
    yyjson_mut_doc_free(d.doc);
    if (good)
        return LM_OK;
    if (!d.err.code)            /* the scan leaves nothing else to fail */
        no_memory(&d);
    return lm_err_set(err, d.err.code, "%s", d.err.msg);
}

lm_status avro_decode_doc(struct avro_plan *p, const void *data, size_t len,
                          struct json_scratch *scratch, yyjson_doc **out, struct lm_err *err)
{
    lm_status st = avro_scan(p, data, len, err);
    if (st)
        return st;
    avro_lock();
    struct taker **root = avro_plan_takers(p);
    if (!*root)
        *root = make_taker(avro_plan_arena(p), avro_plan_root(p), NULL, NULL);
    const struct avro_allocator_state heap = AVRO_CURRENT_ALLOCATOR;
    avro_set_allocator(from_scratch, &scratch->alc);
    st = *root ? read_datum(*root, data, scratch, out, err)
               : lm_err_set(err, LM_NOMEM, "out of memory");
    avro_set_allocator(heap.alloc, heap.user_data);
    avro_unlock();
    return st;
}
