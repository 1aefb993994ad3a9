/* SPDX-License-Identifier: Apache-2.0 */
/*
 * avro_plan.c - vets a writer's schema and compiles it; see avro_plan.h for the limits.
 *
 * Two passes. The first walks the schema's JSON before Avro C sees it, since Avro C 1.11 takes a
 * field name that is no string for granted, recurses without limit, and never gives back a
 * recursive schema (its links hold references in a circle). The second walks the parsed schema.
 *
 * Recursion in a schema is a reference to an enclosing named type, and nothing else: a reference to
 * a type that is already closed can't lead back. Enclosing names are compared by their last part,
 * which refuses two nested types of equal short name in different namespaces too; nobody has those.
 */
#include "worker/codec/avro_plan.h"

#include <endian.h>
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/codec/message.h"

enum {
    MAX_SCHEMA_BYTES = 256 * 1024,
    MAX_JSON_DEPTH = 48,
    MAX_NODES = 4096,
    MAX_DEPTH = 16,
    MAX_FIXED = 1024,
    MAX_NAME = 255,
    MAX_SYMBOLS = 1024,
};

struct avro_plan {
    avro_schema_t schema;
    struct taker *takers;       /* avro_consume.c's; NULL: none yet */
    avro_reader_t reader;       /* likewise */
    const struct avro_node *root;
    struct arena *arena;        /* nodes */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void avro_lock(void)
{
    pthread_mutex_lock(&lock);
}

void avro_unlock(void)
{
    pthread_mutex_unlock(&lock);
}

/* ---- first pass: the JSON ------------------------------------------------------------------- */

struct vet {
    const char *enclosing[MAX_DEPTH];   /* short names of the named types around here */
    int n_enclosing;
    const char *space;                  /* namespace around here, or NULL */
    json_t *defined;                    /* full names so far */
    int nodes;
    struct lm_err *err;
};

static lm_status vet_type(struct vet *v, const json_t *t, int depth);

static bool name_ok(const char *s, bool dots)
{
    size_t len = strlen(s);
    if (len == 0 || len > MAX_NAME || (*s >= '0' && *s <= '9'))
        return false;
    static const char legal[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_0123456789.";
    return s[strspn(s, legal)] == '\0' && (dots || !strchr(s, '.'));
}

static const char *short_name(const char *full)
{
    const char *dot = strrchr(full, '.');
    return dot ? dot + 1 : full;
}

static lm_status bad(struct vet *v, const char *what)
{
    return lm_err_set(v->err, LM_FORMAT, "the Avro schema is malformed: %s", what);
}

static lm_status vet_reference(struct vet *v, const char *type)
{
    if (strlen(type) > 2 * MAX_NAME)
        return bad(v, "a type name is too long");
    for (int i = 0; i < v->n_enclosing; i++)
        if (strcmp(v->enclosing[i], short_name(type)) == 0)
            return lm_err_set(v->err, LM_UNSUPPORTED,
                              "the Avro schema is recursive: %s refers to itself", type);
    return LM_OK;
}

/* Names of fields, or of symbols: strings of Avro's form, each once. */
static lm_status vet_names(struct vet *v, const json_t *list, const char *member)
{
    json_t *seen = json_object();
    lm_status st = seen ? LM_OK : lm_err_set(v->err, LM_NOMEM, "out of memory");
    for (size_t i = 0; !st && i < json_array_size(list); i++) {
        const json_t *item = json_array_get(list, i);
        const char *name = json_string_value(member ? json_object_get(item, member) : item);
        if (!name || !name_ok(name, false))
            st = bad(v, member ? "a field has no proper name" : "a symbol is no proper name");
        else if (json_object_get(seen, name))
            st = lm_err_set(v->err, LM_FORMAT, "the Avro schema has %s twice", name);
        else if (json_object_set_new(seen, name, json_true()))
            st = lm_err_set(v->err, LM_NOMEM, "out of memory");
    }
    json_decref(seen);
    return st;
}

static lm_status vet_fields(struct vet *v, const json_t *fields, int depth)
{
    if (!json_is_array(fields))
        return bad(v, "a record has no fields");
    lm_status st = vet_names(v, fields, "name");
    for (size_t i = 0; !st && i < json_array_size(fields); i++)
        st = vet_type(v, json_object_get(json_array_get(fields, i), "type"), depth + 1);
    return st;
}

/* The namespace of a named type: its name's, else its own, else the one around it. NULL: none. */
static lm_status vet_space(struct vet *v, const json_t *t, const char *name, char *buf,
                           size_t size, const char **out)
{
    const json_t *own = json_object_get(t, "namespace");
    if (own && (!json_is_string(own) || (json_string_length(own) > 0 &&
                                         !name_ok(json_string_value(own), true))))
        return bad(v, "a namespace is no proper name");
    const char *space = own ? json_string_value(own) : v->space;
    if (short_name(name) != name)
        snprintf(buf, size, "%.*s", (int)(short_name(name) - name - 1), name);
    else if (space)
        snprintf(buf, size, "%s", space);
    else
        buf = NULL;
    *out = buf;
    return LM_OK;
}

/* Avro C fails on a second definition, too, but loses memory by it. */
static lm_status vet_first(struct vet *v, const char *space, const char *name)
{
    char full[2 * MAX_NAME + 2];
    snprintf(full, sizeof full, "%s.%s", space ? space : "", short_name(name));
    if (json_object_get(v->defined, full))
        return lm_err_set(v->err, LM_FORMAT, "the Avro schema defines %s twice", name);
    return json_object_set_new(v->defined, full, json_true())
           ? lm_err_set(v->err, LM_NOMEM, "out of memory") : LM_OK;
}

static lm_status vet_record(struct vet *v, const json_t *t, const char *name, const char *space,
                            int depth)
{
    const char *outer = v->space;
    v->space = space;
    v->enclosing[v->n_enclosing++] = short_name(name);
    lm_status st = vet_fields(v, json_object_get(t, "fields"), depth);
    v->n_enclosing--;
    v->space = outer;
    return st;
}

static lm_status vet_named(struct vet *v, const json_t *t, const char *type, int depth)
{
    const char *name = json_string_value(json_object_get(t, "name")), *space = NULL;
    char buf[MAX_NAME + 1];
    if (!name || !name_ok(name, true) || !name_ok(short_name(name), false))
        return bad(v, "a named type has no proper name");
    lm_status st = vet_space(v, t, name, buf, sizeof buf, &space);
    if (!st)
        st = vet_first(v, space, name);
    if (st)
        return st;
    if (strcmp(type, "enum") == 0) {
        const json_t *symbols = json_object_get(t, "symbols");
        if (json_array_size(symbols) > MAX_SYMBOLS)
            return lm_err_set(v->err, LM_TOO_LARGE, "the Avro enum %s has more than %d symbols",
                              name, MAX_SYMBOLS);
        return vet_names(v, symbols, NULL);
    }
    if (strcmp(type, "fixed") == 0) {
        json_int_t size = json_integer_value(json_object_get(t, "size"));
        if (size < 1 || size > MAX_FIXED)
            return lm_err_set(v->err, LM_TOO_LARGE,
                              "the Avro fixed %s has %lld bytes; 1 to %d are allowed", name,
                              (long long)size, MAX_FIXED);
        return LM_OK;
    }
    return vet_record(v, t, name, space, depth);
}

static lm_status vet_type(struct vet *v, const json_t *t, int depth)
{
    if (depth >= MAX_DEPTH)
        return lm_err_set(v->err, LM_TOO_LARGE, "the Avro schema is nested deeper than %d levels",
                          MAX_DEPTH);
    if (++v->nodes > MAX_NODES)
        return lm_err_set(v->err, LM_TOO_LARGE, "the Avro schema has more than %d types",
                          MAX_NODES);
    if (json_is_string(t))
        return vet_reference(v, json_string_value(t));
    if (json_is_array(t)) {
        lm_status st = LM_OK;
        for (size_t i = 0; !st && i < json_array_size(t); i++)
            st = vet_type(v, json_array_get(t, i), depth + 1);
        return st;
    }
    const char *type = json_string_value(json_object_get(t, "type"));
    if (!type)
        return bad(v, "a type is neither a name, a union nor an object with a \"type\" name");
    if (strcmp(type, "array") == 0)
        return vet_type(v, json_object_get(t, "items"), depth + 1);
    if (strcmp(type, "map") == 0)
        return vet_type(v, json_object_get(t, "values"), depth + 1);
    if (!strcmp(type, "record") || !strcmp(type, "enum") || !strcmp(type, "fixed"))
        return vet_named(v, t, type, depth);
    return vet_reference(v, type);
}

/* Depth of brackets outside strings, so that jansson's recursion is bounded by us. */
static bool too_deep(const char *s, size_t len)
{
    int depth = 0;
    bool in_string = false;
    for (size_t i = 0; i < len; i++) {
        if (in_string && s[i] == '\\')
            i++;
        else if (s[i] == '"')
            in_string = !in_string;
        else if (!in_string && (s[i] == '{' || s[i] == '[') && ++depth > MAX_JSON_DEPTH)
            return true;
        else if (!in_string && (s[i] == '}' || s[i] == ']'))
            depth--;
    }
    return false;
}

static lm_status vet_json(const char *json, size_t len, struct lm_err *err)
{
    if (len > MAX_SCHEMA_BYTES)
        return lm_err_set(err, LM_TOO_LARGE, "the Avro schema has %zu bytes, more than %d", len,
                          MAX_SCHEMA_BYTES);
    if (too_deep(json, len))
        return lm_err_set(err, LM_TOO_LARGE, "the Avro schema's JSON is nested deeper than %d",
                          MAX_JSON_DEPTH);
    json_error_t je;
    json_t *root = json_loadb(json, len, JSON_DECODE_ANY, &je);     /* Avro C's own flags */
    if (!root)
        return lm_err_set(err, LM_FORMAT, "the Avro schema is not valid JSON: %s", je.text);
    struct vet v = { .err = err, .defined = json_object() };
    lm_status st = v.defined ? vet_type(&v, root, 0) : lm_err_set(err, LM_NOMEM, "out of memory");
    json_decref(v.defined);
    json_decref(root);
    return st;
}

/* ---- second pass: nodes --------------------------------------------------------------------- */

struct build {
    struct arena *arena;
    int nodes;
    struct lm_err *err;
};

static lm_status build_node(struct build *b, avro_schema_t s, int depth,
                            const struct avro_node **out);

static lm_status no_memory(struct build *b)
{
    return lm_err_set(b->err, LM_NOMEM, "out of memory compiling an Avro schema");
}

static int16_t null_byte(const struct avro_node *n)
{
    for (int i = 0; n->type == AVRO_UNION && i < LM_MIN(n->n, 64); i++)
        if (n->child[i]->type == AVRO_NULL)
            return (int16_t)(2 * i);
    return AVRO_NO_NULL;
}

static void count_runs(struct avro_node *n)
{
    for (int i = n->n - 1; i >= 0; i--) {
        bool more = i + 1 < n->n && n->null_of[i + 1] == n->null_of[i];
        if (n->null_of[i] != AVRO_NO_NULL)
            n->null_run[i] = (int16_t)(1 + (more ? n->null_run[i + 1] : 0));
    }
}

static lm_status build_record(struct build *b, avro_schema_t s, struct avro_node *n, int depth)
{
    n->field = arena_alloc(b->arena, (size_t)n->n * sizeof *n->field);
    n->null_of = arena_alloc(b->arena, (size_t)n->n * sizeof *n->null_of);
    n->null_run = arena_alloc(b->arena, (size_t)n->n * sizeof *n->null_run);
    if (!n->field || !n->null_of || !n->null_run)
        return no_memory(b);
    for (int i = 0; i < n->n; i++) {
        const char *name = avro_schema_record_field_name(s, i);
        struct avro_field *f = &n->field[i];
        f->len = strlen(name);
        f->name = arena_strndup(b->arena, name, f->len);
        if (!f->name)
            return no_memory(b);
        lm_status st = build_node(b, avro_schema_record_field_get_by_index(s, i), depth + 1,
                                  &n->child[i]);
        if (st)
            return st;
        f->node = n->child[i];
        n->min_bytes += f->node->min_bytes;
        n->null_of[i] = null_byte(n->child[i]);
    }
    count_runs(n);
    return LM_OK;
}

static lm_status build_union(struct build *b, avro_schema_t s, struct avro_node *n, int depth)
{
    size_t least = SIZE_MAX;
    for (int i = 0; i < n->n; i++) {
        lm_status st = build_node(b, avro_schema_union_branch(s, i), depth + 1, &n->child[i]);
        if (st)
            return st;
        least = LM_MIN(least, n->child[i]->min_bytes);
    }
    n->min_bytes = 1 + least;
    return LM_OK;
}

static lm_status build_items(struct build *b, avro_schema_t s, struct avro_node *n, int depth)
{
    bool array = n->type == AVRO_ARRAY;
    lm_status st = build_node(b, array ? avro_schema_array_items(s) : avro_schema_map_values(s),
                              depth + 1, &n->child[0]);
    if (!st && n->child[0]->min_bytes == 0)
        return lm_err_set(b->err, LM_UNSUPPORTED,
                          "the Avro schema has %s of items that take no bytes",
                          array ? "an array" : "a map");
    n->min_bytes = 1;
    return st;
}

/* Children and shortest encoding of a leaf or the count of children of the others. */
static void set_shape(struct avro_node *n, avro_schema_t s)
{
    switch (n->type) {
    case AVRO_NULL: break;
    case AVRO_FLOAT: n->min_bytes = 4; break;
    case AVRO_DOUBLE: n->min_bytes = 8; break;
    case AVRO_FIXED:
        n->size = avro_schema_fixed_size(s);
        n->min_bytes = (size_t)n->size;
        break;
    case AVRO_ENUM:
        n->n = avro_schema_enum_number_of_symbols(s);
        n->min_bytes = 1;
        break;
    case AVRO_RECORD: n->n = (int)avro_schema_record_size(s); break;
    case AVRO_UNION: n->n = (int)avro_schema_union_size(s); break;
    case AVRO_ARRAY:
    case AVRO_MAP: n->n = 1; break;
    default: n->min_bytes = 1; break;   /* boolean, int, long, string, bytes */
    }
}

static lm_status build_node(struct build *b, avro_schema_t s, int depth,
                            const struct avro_node **out)
{
    while (is_avro_link(s))
        s = avro_schema_link_target(s);
    if (depth >= MAX_DEPTH || ++b->nodes > MAX_NODES)
        return lm_err_set(b->err, LM_TOO_LARGE, "the Avro schema, named types expanded, has more "
                          "than %d levels or %d fields", MAX_DEPTH, MAX_NODES);
    struct avro_node *n = arena_alloc(b->arena, sizeof *n);
    if (!n)
        return no_memory(b);
    n->type = avro_typeof(s);
    n->schema = s;
    set_shape(n, s);
    *out = n;
    bool has_children = n->type == AVRO_RECORD || n->type == AVRO_UNION || n->type == AVRO_ARRAY ||
                        n->type == AVRO_MAP;
    if (!has_children)
        return LM_OK;
    n->child = arena_alloc(b->arena, (size_t)n->n * sizeof *n->child);
    if (!n->child)
        return no_memory(b);
    if (n->type == AVRO_RECORD)
        return build_record(b, s, n, depth);
    return n->type == AVRO_UNION ? build_union(b, s, n, depth) : build_items(b, s, n, depth);
}

/* ---- nulls ---------------------------------------------------------------------------------- */

/* Eight bytes at a time, while there are so many. */
int avro_count_nulls(const struct avro_node *n, int i, const unsigned char *at, size_t left)
{
    const uint64_t nulls = UINT64_MAX / 255 * (unsigned)n->null_of[i];
    int run = (int)LM_MIN((size_t)n->null_run[i], left), found = 0;
    for (uint64_t w; found < run && left - (size_t)found >= sizeof w; found += (int)sizeof w) {
        memcpy(&w, at + found, sizeof w);
        w = le64toh(w ^ nulls);
        if (w)
            return LM_MIN(found + __builtin_ctzll(w) / 8, run);
    }
    while (found < run && at[found] == n->null_of[i])
        found++;
    return LM_MIN(found, run);
}

/* ---- the whole ------------------------------------------------------------------------------ */

static lm_status compile(struct avro_plan *p, const char *json, size_t len, struct lm_err *err)
{
    if (avro_schema_from_json_length(json, len, &p->schema) != 0) {
        p->schema = NULL;
        return lm_err_set(err, LM_FORMAT, "Avro refuses the schema: %s", avro_strerror());
    }
    struct build b = { p->arena, 0, err };
    return build_node(&b, p->schema, 0, &p->root);
}

lm_status avro_plan_new(const char *json, size_t len, struct avro_plan **out, struct lm_err *err)
{
    lm_status st = vet_json(json, len, err);
    if (st)
        return st;
    struct avro_plan *p = lm_calloc(1, sizeof *p);
    if (!p || !(p->arena = arena_new())) {
        free(p);
        return lm_err_set(err, LM_NOMEM, "out of memory");
    }
    avro_lock();
    st = compile(p, json, len, err);
    avro_unlock();
    if (st)
        avro_plan_free(p);
    else
        *out = p;
    return st;
}

void avro_plan_free(struct avro_plan *p)
{
    if (!p)
        return;
    avro_lock();
    if (p->schema)
        avro_schema_decref(p->schema);
    if (p->reader)
        avro_reader_free(p->reader);
    avro_unlock();
    arena_free(p->arena);
    free(p);
}

const struct avro_node *avro_plan_root(const struct avro_plan *p)
{
    return p->root;
}

struct taker **avro_plan_takers(struct avro_plan *p)
{
    return &p->takers;
}

avro_reader_t avro_plan_reader(struct avro_plan *p)
{
    if (!p->reader)
        p->reader = avro_reader_memory("", 0);
    return p->reader;
}

struct arena *avro_plan_arena(struct avro_plan *p)
{
    return p->arena;
}
