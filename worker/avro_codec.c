/* SPDX-License-Identifier: Apache-2.0 */
/*
 * avro_codec.c - Avro values to and from JSON trees; see avro_codec.h.
 *
 * Avro C's reader/writer resolution has no defaults (its source says so), so a schema that gained
 * an optional field could not be read by an older producer's data and the other way round. We
 * therefore read by the writer's schema into a generic value and take fields by name; what is
 * missing gets the defaults of json_prompt.c.
 *
 * Ownership in Avro C: a field or branch value is borrowed from its parent and never released; only
 * the top value is. Strings it hands out live as long as that.
 */
#include "worker/avro_codec.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/avro_path.h"
#include "worker/json_tree.h"

struct walk {
    struct avro_path path;
    struct lm_err *err;
};

void avro_path_text(const struct avro_path *p, char *buf, size_t size)
{
    size_t used = 0;
    snprintf(buf, size, "top");
    for (int i = 0; i < p->n && used < size; i++)
        used += (size_t)snprintf(buf + used, size - used, "%s%s",
                                 i > 0 && p->at[i][0] != '[' ? "." : "", p->at[i]);
}

static lm_status refuse(struct walk *w, lm_status code, const char *what)
{
    char path[256];
    avro_path_text(&w->path, path, sizeof path);
    return lm_err_set(w->err, code, "%s %s", path, what);
}

static lm_status no_memory(struct walk *w)
{
    return lm_err_set(w->err, LM_NOMEM, "out of memory");
}

/* jansson gave no string for this text: for what it is, or for want of memory? */
static lm_status no_text(struct walk *w, const char *s, size_t n, const char *what)
{
    return json_is_utf8(s, n) ? no_memory(w) : refuse(w, LM_FORMAT, what);
}

/* ---- decoding: Avro value to JSON ------------------------------------------------------------ */

static lm_status to_json(struct walk *w, const struct avro_node *n, avro_value_t *v, json_t **out);

static lm_status string_to_json(struct walk *w, avro_value_t *v, json_t **out)
{
    const char *s = NULL;
    size_t size = 0;            /* with the NUL */
    avro_value_get_string(v, &s, &size);
    *out = json_text(s, size - 1);
    return *out ? LM_OK : no_text(w, s, size - 1, "is not valid UTF-8");
}

static lm_status real_to_json(struct walk *w, double x, json_t **out)
{
    if (!isfinite(x))
        return refuse(w, LM_INVALID, "must be a finite number");
    *out = json_real(x);
    return *out ? LM_OK : no_memory(w);
}

static lm_status number_to_json(struct walk *w, const struct avro_node *n, avro_value_t *v,
                                json_t **out)
{
    int32_t i = 0;
    int64_t l = 0;
    float f = 0;
    double d = 0;
    switch (n->type) {
    case AVRO_FLOAT: avro_value_get_float(v, &f); return real_to_json(w, (double)f, out);
    case AVRO_DOUBLE: avro_value_get_double(v, &d); return real_to_json(w, d, out);
    case AVRO_INT32: avro_value_get_int(v, &i); l = i; break;
    default: avro_value_get_long(v, &l); break;
    }
    *out = json_integer(l);
    return *out ? LM_OK : no_memory(w);
}

static lm_status enum_to_json(struct walk *w, avro_value_t *v, json_t **out)
{
    int i = 0;
    avro_value_get_enum(v, &i);
    *out = json_string(avro_schema_enum_get(avro_value_get_schema(v), i));
    return *out ? LM_OK : no_memory(w);
}

/* Adds a member unless it is null; keeps the path while the member is read. A map's keys are data,
 * a record's names were vetted with the schema. */
static lm_status member_to_json(struct walk *w, const struct avro_node *n, avro_value_t *v,
                                const char *key, bool vetted, json_t *object)
{
    json_t *member = NULL;
    w->path.at[w->path.n++] = key;
    lm_status st = to_json(w, n, v, &member);
    if (!st && !json_is_null(member) &&
        (vetted ? json_object_set_nocheck : json_object_set)(object, key, member) != 0)
        st = no_text(w, key, strlen(key), "has a name that is not valid UTF-8");
    json_decref(member);
    w->path.n--;
    return st;
}

static lm_status fields_to_json(struct walk *w, const struct avro_node *n, avro_value_t *v,
                                json_t **out)
{
    size_t count = 0;
    lm_status st = LM_OK;
    bool record = n->type == AVRO_RECORD;
    *out = json_object();
    avro_value_get_size(v, &count);
    for (size_t i = 0; *out && !st && i < count; i++) {
        avro_value_t child;
        const char *name = NULL;
        avro_value_get_by_index(v, i, &child, &name);
        st = member_to_json(w, n->child[record ? i : 0], &child, name, record, *out);
    }
    return *out ? st : no_memory(w);
}

static lm_status items_to_json(struct walk *w, const struct avro_node *n, avro_value_t *v,
                               json_t **out)
{
    size_t count = 0;
    lm_status st = LM_OK;
    *out = json_array();
    avro_value_get_size(v, &count);
    w->path.at[w->path.n++] = "[]";
    for (size_t i = 0; *out && !st && i < count; i++) {
        avro_value_t child;
        json_t *item = NULL;
        avro_value_get_by_index(v, i, &child, NULL);
        st = to_json(w, n->child[0], &child, &item);
        if (st)
            json_decref(item);
        else if (json_array_append_new(*out, item) != 0)
            st = no_memory(w);
    }
    w->path.n--;
    return *out ? st : no_memory(w);
}

static lm_status union_to_json(struct walk *w, const struct avro_node *n, avro_value_t *v,
                               json_t **out)
{
    avro_value_t branch;
    int i = 0;
    avro_value_get_discriminant(v, &i);
    avro_value_get_current_branch(v, &branch);
    return to_json(w, n->child[i], &branch, out);
}

/* On failure *out may hold a part, which the caller releases. */
static lm_status to_json(struct walk *w, const struct avro_node *n, avro_value_t *v, json_t **out)
{
    int yes = 0;
    switch (n->type) {
    case AVRO_NULL:
        *out = json_null();
        return LM_OK;
    case AVRO_BOOLEAN:
        avro_value_get_boolean(v, &yes);
        *out = json_boolean(yes);
        return LM_OK;
    case AVRO_INT32:
    case AVRO_INT64:
    case AVRO_FLOAT:
    case AVRO_DOUBLE: return number_to_json(w, n, v, out);
    case AVRO_STRING: return string_to_json(w, v, out);
    case AVRO_ENUM: return enum_to_json(w, v, out);
    case AVRO_UNION: return union_to_json(w, n, v, out);
    case AVRO_ARRAY: return items_to_json(w, n, v, out);
    case AVRO_RECORD:
    case AVRO_MAP: return fields_to_json(w, n, v, out);
    default: return refuse(w, LM_INVALID, "must not be of Avro type bytes or fixed");
    }
}

static lm_status decode_locked(struct avro_plan *p, const void *data, size_t len, json_t **out,
                               struct lm_err *err)
{
    struct walk w = { .err = err };
    avro_reader_t reader = avro_reader_memory(data, (int64_t)len);
    if (!reader)
        return no_memory(&w);
    avro_value_t *v = avro_plan_borrow(p);
    /* The scan leaves nothing to fail but memory. */
    lm_status st = !v || avro_value_read(reader, v) != 0 ? no_memory(&w)
                                                         : to_json(&w, avro_plan_root(p), v, out);
    if (v)
        avro_plan_give_back(p, st ? SIZE_MAX : len);
    avro_reader_free(reader);
    if (st) {
        json_decref(*out);
        *out = NULL;
    }
    return st;
}

lm_status avro_decode(struct avro_plan *p, const void *data, size_t len, json_t **out,
                      struct lm_err *err)
{
    lm_status st = avro_scan(p, data, len, err);
    if (st)
        return st;
    *out = NULL;
    avro_lock();
    st = decode_locked(p, data, len, out, err);
    avro_unlock();
    return st;
}

/* ---- encoding: JSON to Avro value ------------------------------------------------------------ */

static lm_status from_json(struct walk *w, const struct avro_node *n, const json_t *j,
                           avro_value_t *v);

static bool fits(const struct avro_node *n, const json_t *j)
{
    switch (n->type) {
    case AVRO_NULL: return !j || json_is_null(j);
    case AVRO_BOOLEAN: return json_is_boolean(j);
    case AVRO_INT32:
        return json_is_integer(j) && json_integer_value(j) >= INT32_MIN &&
               json_integer_value(j) <= INT32_MAX;
    case AVRO_INT64: return json_is_integer(j);
    case AVRO_FLOAT:
    case AVRO_DOUBLE: return json_is_number(j);
    case AVRO_STRING: return json_is_string(j);
    case AVRO_ARRAY: return json_is_array(j);
    case AVRO_RECORD:
    case AVRO_MAP: return json_is_object(j);
    default: return false;
    }
}

static lm_status record_from_json(struct walk *w, const struct avro_node *n, const json_t *j,
                                  avro_value_t *v)
{
    lm_status st = LM_OK;
    for (int i = 0; !st && i < n->n; i++) {
        avro_value_t child;
        w->path.at[w->path.n++] = n->name[i];
        avro_value_get_by_index(v, (size_t)i, &child, NULL);
        st = from_json(w, n->child[i], json_object_get(j, n->name[i]), &child);
        w->path.n--;
    }
    return st;
}

static lm_status map_from_json(struct walk *w, const struct avro_node *n, const json_t *j,
                               avro_value_t *v)
{
    const char *key;
    json_t *member;
    json_object_foreach((json_t *)j, key, member) {
        avro_value_t child;
        if (avro_value_add(v, key, &child, NULL, NULL) != 0)
            return no_memory(w);
        w->path.at[w->path.n++] = key;
        lm_status st = from_json(w, n->child[0], member, &child);
        w->path.n--;
        if (st)
            return st;
    }
    return LM_OK;
}

static lm_status array_from_json(struct walk *w, const struct avro_node *n, const json_t *j,
                                 avro_value_t *v)
{
    w->path.at[w->path.n++] = "[]";
    lm_status st = LM_OK;
    for (size_t i = 0; !st && i < json_array_size(j); i++) {
        avro_value_t child;
        st = avro_value_append(v, &child, NULL) != 0 ? no_memory(w)
             : from_json(w, n->child[0], json_array_get(j, i), &child);
    }
    w->path.n--;
    return st;
}

static lm_status union_from_json(struct walk *w, const struct avro_node *n, const json_t *j,
                                 avro_value_t *v)
{
    for (int i = 0; i < n->n; i++) {
        avro_value_t branch;
        if (!fits(n->child[i], j))
            continue;
        if (avro_value_set_branch(v, i, &branch) != 0)
            return no_memory(w);
        return from_json(w, n->child[i], j, &branch);
    }
    return refuse(w, LM_MISMATCH, "fits no branch of the schema's union");
}

static lm_status from_json(struct walk *w, const struct avro_node *n, const json_t *j,
                           avro_value_t *v)
{
    if (n->type == AVRO_UNION)
        return union_from_json(w, n, j, v);
    if (!fits(n, j))
        return refuse(w, LM_MISMATCH, j ? "does not fit the schema" : "is missing");
    int rc = 0;
    switch (n->type) {
    case AVRO_NULL: rc = avro_value_set_null(v); break;
    case AVRO_BOOLEAN: rc = avro_value_set_boolean(v, json_is_true(j)); break;
    case AVRO_INT32: rc = avro_value_set_int(v, (int32_t)json_integer_value(j)); break;
    case AVRO_INT64: rc = avro_value_set_long(v, json_integer_value(j)); break;
    case AVRO_FLOAT: rc = avro_value_set_float(v, (float)json_number_value(j)); break;
    case AVRO_DOUBLE: rc = avro_value_set_double(v, json_number_value(j)); break;
    case AVRO_STRING:
        rc = avro_value_set_string_len(v, (char *)json_string_value(j),
                                       json_string_length(j) + 1);
        break;
    case AVRO_ARRAY: return array_from_json(w, n, j, v);
    case AVRO_MAP: return map_from_json(w, n, j, v);
    default: return record_from_json(w, n, j, v);
    }
    return rc == 0 ? LM_OK : no_memory(w);
}

static lm_status write_value(struct walk *w, avro_value_t *v, size_t lead, void **out, size_t *len)
{
    size_t size = 0;
    if (avro_value_sizeof(v, &size) != 0)
        return no_memory(w);
    char *buf = lm_malloc(lead + size + 1);
    avro_writer_t writer = buf ? avro_writer_memory(buf + lead, (int64_t)size) : NULL;
    int rc = writer ? avro_value_write(writer, v) : -1;
    if (writer)
        avro_writer_free(writer);
    if (rc != 0) {
        free(buf);
        return no_memory(w);
    }
    *out = buf;
    *len = lead + size;
    return LM_OK;
}

lm_status avro_encode(struct avro_plan *p, const json_t *root, size_t lead, void **out,
                      size_t *len, struct lm_err *err)
{
    struct walk w = { .err = err };
    size_t size = SIZE_MAX;     /* of a value that can't be written, nobody knows */
    avro_lock();
    avro_value_t *v = avro_plan_borrow(p);
    lm_status st = v ? from_json(&w, avro_plan_root(p), root, v) : no_memory(&w);
    if (!st)
        st = write_value(&w, v, lead, out, len);
    if (!st)
        size = *len;
    if (v)
        avro_plan_give_back(p, size);
    avro_unlock();
    return st;
}
