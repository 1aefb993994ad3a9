/* SPDX-License-Identifier: Apache-2.0 */
/*
 * avro_codec.c - whole trees, which tools and tests want; see avro_codec.h. Messages are decoded in
 * avro_consume.c and written in message_out.c.
 */
#include "worker/avro_codec.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/avro_path.h"
#include "worker/json_tree.h"
#include "worker/message_out.h"

void avro_path_text(const struct avro_path *p, char *buf, size_t size)
{
    size_t used = 0;
    snprintf(buf, size, "top");
    for (int i = 0; i < p->n && used < size; i++)
        used += (size_t)snprintf(buf + used, size - used, "%s%s",
                                 i > 0 && p->at[i][0] != '[' ? "." : "", p->at[i]);
}

/* ---- decoding for tools ------------------------------------------------------------------ */

lm_status avro_decode(struct avro_plan *p, const void *data, size_t len, json_t **out,
                      struct lm_err *err)
{
    struct json_scratch scratch;
    yyjson_doc *doc = NULL;
    *out = NULL;
    json_scratch_init(&scratch);
    lm_status st = avro_decode_doc(p, data, len, &scratch, &doc, err);
    if (st)
        return st;
    *out = json_from_value(yyjson_doc_get_root(doc));
    yyjson_doc_free(doc);
    return *out ? LM_OK : lm_err_set(err, LM_NOMEM, "out of memory");
}

/* ---- encoding for tools ------------------------------------------------------------------ */

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

lm_status avro_encode(const struct avro_plan *p, const json_t *root, size_t lead, void **out,
                      size_t *len, struct lm_err *err)
{
    struct message_out o;
    out_avro(&o, p, lead);
    put_tree(&o, avro_plan_root(p), root);
    return out_take(&o, out, len, err);
}
