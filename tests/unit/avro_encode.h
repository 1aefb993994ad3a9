/* SPDX-License-Identifier: Apache-2.0 */
/*
 * avro_encode.h - any JSON tree as Avro, by message_out.h, which the worker uses for completions
 * alone: each field takes its member; an absent or null member needs a union with null; of a union
 * the first branch that fits the member's type is taken.
 */
#ifndef LORAMILL_TESTS_AVRO_ENCODE_H
#define LORAMILL_TESTS_AVRO_ENCODE_H

#include <string.h>

#include "worker/codec/avro_plan.h"
#include "worker/codec/json_tree.h"
#include "worker/codec/message_out.h"

static void put_tree(struct message_out *o, const struct avro_node *n, const json_t *j);

/* Where a tree's container goes: the node, or the first branch of that type. */
static const struct avro_node *container(const struct avro_node *n, avro_type_t a, avro_type_t b)
{
    for (int i = 0; n->type == AVRO_UNION && i < n->n; i++)
        if (n->child[i]->type == a || n->child[i]->type == b)
            return n->child[i];
    return n->type == a || n->type == b ? n : NULL;
}

static void put_record(struct message_out *o, const struct avro_node *n, const json_t *j)
{
    out_open(o, OUT_RECORD, 0);
    for (int i = 0; i < n->n; i++) {
        const json_t *v = json_object_get(j, n->field[i].name);
        if (!v || json_is_null(v))
            continue;
        out_key(o, n->field[i].name);
        put_tree(o, n->child[i], v);
    }
    out_close(o);
}

static void put_map(struct message_out *o, const struct avro_node *n, const json_t *j)
{
    const char *key;
    json_t *v;
    out_open(o, OUT_MAP, n ? json_object_size(j) : 0);
    json_object_foreach((json_t *)(uintptr_t)j, key, v) {
        if (!n)
            break;
        out_entry(o, key, strlen(key));
        put_tree(o, n->child[0], v);
    }
    out_close(o);
}

static void put_array(struct message_out *o, const struct avro_node *n, const json_t *j)
{
    size_t i;
    json_t *v;
    out_open(o, OUT_ARRAY, n ? json_array_size(j) : 0);
    json_array_foreach(j, i, v)
        if (n)
            put_tree(o, n->child[0], v);
    out_close(o);
}

static void put_tree(struct message_out *o, const struct avro_node *n, const json_t *j)
{
    const struct avro_node *in;
    switch (json_typeof(j)) {
    case JSON_OBJECT:
        in = container(n, AVRO_RECORD, AVRO_MAP);
        if (in && in->type == AVRO_RECORD)
            put_record(o, in, j);
        else
            put_map(o, in, j);
        break;
    case JSON_ARRAY: put_array(o, container(n, AVRO_ARRAY, AVRO_ARRAY), j); break;
    case JSON_STRING: out_text(o, json_string_value(j), json_string_length(j)); break;
    case JSON_INTEGER: out_int(o, json_integer_value(j)); break;
    case JSON_REAL: out_real(o, json_real_value(j)); break;
    case JSON_NULL: out_null(o); break;
    default: out_bool(o, json_is_true(j));
    }
}

/* malloc'ed bytes, of which the first `lead` are left for the caller to fill. */
static lm_status avro_encode(const struct avro_plan *p, const json_t *root, size_t lead, void **out,
                             size_t *len, struct lm_err *err)
{
    struct message_out o;
    out_avro(&o, p, lead);
    put_tree(&o, avro_plan_root(p), root);
    return out_take(&o, out, len, err);
}

#endif
