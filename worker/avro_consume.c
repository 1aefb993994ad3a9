/* SPDX-License-Identifier: Apache-2.0 */
/*
 * avro_consume.c - Avro C reads a datum and hands us its values one by one, which become a JSON
 * tree; see avro_codec.h.
 *
 * Avro C's reader/writer resolution has no defaults (its source says so), so a schema that gained
 * an optional field could not be read by an older producer's data and the other way round. We
 * therefore read by the writer's schema and take fields by name; what is missing gets the defaults
 * of json_prompt.c.
 *
 * Avro C walks the schema and calls back with each value: nothing is built in between. A plan has a
 * taker for each of its nodes. A schema is no circle, so a node is at one place of a datum at a
 * time, and its taker can hold what is being filled there.
 *
 *   record, map, array   makes its container and hands it to its owner, then is the owner of what
 *                        comes inside
 *   union                lets the branch take its place: same owner, same key
 *   the others           hand a value to their owner
 *
 * Ownership in Avro C: a string or bytes that a callback is given are the callback's to free, a
 * map's key and a fixed are not.
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
    const char *map_key;        /* a map's current one */
};

struct datum {
    yyjson_mut_doc *doc;
    yyjson_mut_val *root;
    struct lm_err err;
};

/* ---- errors --------------------------------------------------------------------------------- */

static const char *name_in_owner(const struct taker *t)
{
    if (t->owner->node->type == AVRO_ARRAY)
        return "[]";
    return t->owner->node->type == AVRO_MAP ? t->owner->map_key : t->key;
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

/* A copy, or NULL and an error: `what`, or no memory. */
static yyjson_mut_val *text_of(struct datum *d, const struct taker *t, const char *s, size_t n,
                               const char *what)
{
    bool good = json_is_utf8(s, n);
    yyjson_mut_val *v = good ? yyjson_mut_strncpy(d->doc, s, n) : NULL;
    if (!good)
        refuse(d, t, LM_FORMAT, what);
    else if (!v)
        no_memory(d);
    return v;
}

/* Of a key that comes twice the last one counts. */
static int give_to_map(struct datum *d, struct taker *t, yyjson_mut_val *v)
{
    const char *key = t->owner->map_key;
    yyjson_mut_val *name = text_of(d, t, key, strlen(key), "has a name that is not valid UTF-8");
    if (!name)
        return EINVAL;
    if (yyjson_mut_is_null(v)) {
        yyjson_mut_obj_remove_key(t->owner->now, key);
        return 0;
    }
    return yyjson_mut_obj_put(t->owner->now, name, v) ? 0 : no_memory(d);
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

static int take_null(avro_consumer_t *c, void *ud)
{
    struct datum *d = ud;
    return give(d, (struct taker *)c, yyjson_mut_null(d->doc));
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
    /* its size counts the NUL */
    yyjson_mut_val *v = text_of(d, t, s, size - 1, "is not valid UTF-8");
    avro_free((void *)(uintptr_t)s, size);
    return v ? give(d, t, v) : EINVAL;
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

/* ---- containers ----------------------------------------------------------------------------- */

/* Handed over when it begins; it is filled where it lies. */
static int open_container(struct datum *d, struct taker *t, yyjson_mut_val *v)
{
    t->now = v;
    return give(d, t, v);
}

static int take_record(avro_consumer_t *c, void *ud)
{
    struct datum *d = ud;
    return open_container(d, (struct taker *)c, yyjson_mut_obj(d->doc));
}

static int next_in(struct taker *t, unsigned int i, avro_consumer_t **out, void **out_ud, void *ud)
{
    *out = &t->child[i]->base;
    *out_ud = ud;
    return 0;
}

static int take_field(avro_consumer_t *c, unsigned int i, avro_consumer_t **out, void **out_ud,
                      void *ud)
{
    return next_in((struct taker *)c, i, out, out_ud, ud);
}

static int take_branch(avro_consumer_t *c, unsigned int i, avro_consumer_t **out, void **out_ud,
                       void *ud)
{
    return next_in((struct taker *)c, i, out, out_ud, ud);
}

static int take_array_block(avro_consumer_t *c, int first, unsigned int n, void *ud)
{
    struct datum *d = ud;
    (void)n;
    return first ? open_container(d, (struct taker *)c, yyjson_mut_arr(d->doc)) : 0;
}

static int take_item(avro_consumer_t *c, unsigned int i, avro_consumer_t **out, void **out_ud,
                     void *ud)
{
    (void)i;
    return next_in((struct taker *)c, 0, out, out_ud, ud);
}

static int take_map_block(avro_consumer_t *c, int first, unsigned int n, void *ud)
{
    struct datum *d = ud;
    (void)n;
    return first ? open_container(d, (struct taker *)c, yyjson_mut_obj(d->doc)) : 0;
}

static int take_entry(avro_consumer_t *c, unsigned int i, const char *key, avro_consumer_t **out,
                      void **out_ud, void *ud)
{
    struct taker *t = (struct taker *)c;
    (void)i;
    t->map_key = key;
    return next_in(t, 0, out, out_ud, ud);
}

/* ---- takers --------------------------------------------------------------------------------- */

static const avro_consumer_t callbacks = {
    .boolean_value = take_boolean, .bytes_value = take_bytes, .double_value = take_double,
    .float_value = take_float, .int_value = take_int, .long_value = take_long,
    .null_value = take_null, .string_value = take_string, .enum_value = take_enum,
    .fixed_value = take_fixed, .array_start_block = take_array_block, .array_element = take_item,
    .map_start_block = take_map_block, .map_element = take_entry, .record_start = take_record,
    .record_field = take_field, .union_branch = take_branch,
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

/* ---- the whole ------------------------------------------------------------------------------ */

/* The tree that was built becomes one that can be read: one block. */
static lm_status read_datum(struct taker *root, const void *data, size_t len,
                            struct json_scratch *scratch, yyjson_doc **out, struct lm_err *err)
{
    struct datum d = { .doc = yyjson_mut_doc_new(&scratch->alc) };
    avro_reader_t reader = avro_reader_memory(data, (int64_t)len);
    bool good = d.doc && reader && !avro_consume_binary(reader, &root->base, &d) && d.root &&
                (*out = yyjson_mut_val_imut_copy(d.root, &scratch->alc));
    if (reader)
        avro_reader_free(reader);
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
    st = *root ? read_datum(*root, data, len, scratch, out, err)
               : lm_err_set(err, LM_NOMEM, "out of memory");
    avro_unlock();
    return st;
}
