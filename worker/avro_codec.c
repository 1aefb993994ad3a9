/* SPDX-License-Identifier: Apache-2.0 */
/*
 * avro_codec.c - from JSON trees to Avro data, and what tools need; see avro_codec.h. Decoding is
 * in avro_consume.c.
 */
#include "worker/avro_codec.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/avro_path.h"
#include "worker/bytes.h"
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

/* ---- encoding: JSON to bytes ----------------------------------------------------------------- */

/*
 * By the plan, straight into bytes: the specification's "Binary encoding". What other serializers
 * made of the same data stands in the fixtures that test_worker_avro holds it to.
 */
struct writer {
    struct walk walk;
    struct bytes out;
};

static lm_status put_json(struct writer *w, const struct avro_node *n, yyjson_mut_val *j);

static lm_status put_bytes(struct writer *w, const void *from, size_t len)
{
    bytes_put(&w->out, from, len);
    return w->out.failed ? no_memory(&w->walk) : LM_OK;
}

static lm_status put_long(struct writer *w, int64_t l)
{
    unsigned char b[10];
    size_t n = 0;
    uint64_t v = (uint64_t)l << 1 ^ (uint64_t)(l >> 63);
    for (; v >= 0x80; v >>= 7)
        b[n++] = (unsigned char)(v | 0x80);
    b[n++] = (unsigned char)v;
    return put_bytes(w, b, n);
}

/* Least significant byte first, whatever the machine. */
static lm_status put_real(struct writer *w, uint64_t bits, size_t n)
{
    unsigned char b[8];
    for (size_t i = 0; i < n; i++)
        b[i] = (unsigned char)(bits >> 8 * i);
    return put_bytes(w, b, n);
}

static lm_status put_number(struct writer *w, const struct avro_node *n, yyjson_mut_val *j)
{
    double d = yyjson_mut_get_num(j);
    float f = (float)d;
    uint64_t bits = 0;
    uint32_t half = 0;
    if (n->type == AVRO_DOUBLE) {
        memcpy(&bits, &d, sizeof bits);
        return put_real(w, bits, sizeof bits);
    }
    memcpy(&half, &f, sizeof half);
    return put_real(w, half, sizeof half);
}

static lm_status put_string(struct writer *w, const char *s, size_t n)
{
    lm_status st = put_long(w, (int64_t)n);
    return st ? st : put_bytes(w, s, n);
}

static bool fits(const struct avro_node *n, yyjson_mut_val *j)
{
    switch (n->type) {
    case AVRO_NULL: return !j || yyjson_mut_is_null(j);
    case AVRO_BOOLEAN: return yyjson_mut_is_bool(j);
    case AVRO_INT32:
        return yyjson_mut_is_int(j) && yyjson_mut_get_sint(j) >= INT32_MIN &&
               yyjson_mut_get_sint(j) <= INT32_MAX;
    case AVRO_INT64: return yyjson_mut_is_int(j);
    case AVRO_FLOAT:
    case AVRO_DOUBLE: return yyjson_mut_is_num(j);
    case AVRO_STRING: return yyjson_mut_is_str(j);
    case AVRO_ARRAY: return yyjson_mut_is_arr(j);
    case AVRO_RECORD:
    case AVRO_MAP: return yyjson_mut_is_obj(j);
    default: return false;
    }
}

/* Members mostly stand in the order of the schema, which is the order that the iterator is quick
 * in. */
static lm_status put_record(struct writer *w, const struct avro_node *n, yyjson_mut_val *j)
{
    lm_status st = LM_OK;
    yyjson_mut_obj_iter it = yyjson_mut_obj_iter_with(j);
    for (int i = 0; !st && i < n->n; i++) {
        w->walk.path.at[w->walk.path.n++] = n->name[i];
        st = put_json(w, n->child[i], yyjson_mut_obj_iter_get(&it, n->name[i]));
        w->walk.path.n--;
    }
    return st;
}

static lm_status put_map(struct writer *w, const struct avro_node *n, yyjson_mut_val *j)
{
    size_t count = yyjson_mut_obj_size(j);
    lm_status st = count ? put_long(w, (int64_t)count) : LM_OK;
    yyjson_mut_obj_iter it = yyjson_mut_obj_iter_with(j);
    for (yyjson_mut_val *key; !st && (key = yyjson_mut_obj_iter_next(&it)) != NULL;) {
        const char *name = yyjson_mut_get_str(key);
        w->walk.path.at[w->walk.path.n++] = name;
        st = put_string(w, name, yyjson_mut_get_len(key));
        if (!st)
            st = put_json(w, n->child[0], yyjson_mut_obj_iter_get_val(key));
        w->walk.path.n--;
    }
    return st ? st : put_long(w, 0);
}

static lm_status put_array(struct writer *w, const struct avro_node *n, yyjson_mut_val *j)
{
    size_t count = yyjson_mut_arr_size(j);
    lm_status st = count ? put_long(w, (int64_t)count) : LM_OK;
    yyjson_mut_arr_iter it = yyjson_mut_arr_iter_with(j);
    w->walk.path.at[w->walk.path.n++] = "[]";
    for (yyjson_mut_val *item; !st && (item = yyjson_mut_arr_iter_next(&it)) != NULL;)
        st = put_json(w, n->child[0], item);
    w->walk.path.n--;
    return st ? st : put_long(w, 0);
}

static lm_status put_union(struct writer *w, const struct avro_node *n, yyjson_mut_val *j)
{
    for (int i = 0; i < n->n; i++) {
        if (!fits(n->child[i], j))
            continue;
        lm_status st = put_long(w, i);
        return st ? st : put_json(w, n->child[i], j);
    }
    return refuse(&w->walk, LM_MISMATCH, "fits no branch of the schema's union");
}

static lm_status put_json(struct writer *w, const struct avro_node *n, yyjson_mut_val *j)
{
    if (n->type == AVRO_UNION)
        return put_union(w, n, j);
    if (!fits(n, j))
        return refuse(&w->walk, LM_MISMATCH, j ? "does not fit the schema" : "is missing");
    switch (n->type) {
    case AVRO_NULL: return LM_OK;
    case AVRO_BOOLEAN: return put_bytes(w, yyjson_mut_is_true(j) ? "\1" : "\0", 1);
    case AVRO_INT32:
    case AVRO_INT64: return put_long(w, yyjson_mut_get_sint(j));
    case AVRO_FLOAT:
    case AVRO_DOUBLE: return put_number(w, n, j);
    case AVRO_STRING: return put_string(w, yyjson_mut_get_str(j), yyjson_mut_get_len(j));
    case AVRO_ARRAY: return put_array(w, n, j);
    case AVRO_MAP: return put_map(w, n, j);
    default: return put_record(w, n, j);
    }
}

lm_status avro_encode_value(const struct avro_plan *p, yyjson_mut_val *root, size_t lead,
                            void **out, size_t *len, struct lm_err *err)
{
    struct writer w;
    w.walk = (struct walk){ .err = err };
    bytes_init(&w.out);
    if (bytes_room(&w.out, lead))
        w.out.n = lead;
    lm_status st = put_json(&w, avro_plan_root(p), root);
    if (st) {
        bytes_drop(&w.out);
        return st;
    }
    *len = w.out.n;
    *out = bytes_take(&w.out);
    return *out ? LM_OK : no_memory(&w.walk);
}

lm_status avro_encode(const struct avro_plan *p, const json_t *root, size_t lead, void **out,
                      size_t *len, struct lm_err *err)
{
    struct json_scratch scratch;
    struct walk w = { .err = err };
    json_scratch_init(&scratch);
    yyjson_mut_doc *d = yyjson_mut_doc_new(&scratch.alc);
    yyjson_mut_val *v = d ? json_to_value(d, root) : NULL;
    lm_status st = v ? avro_encode_value(p, v, lead, out, len, err) : no_memory(&w);
    yyjson_mut_doc_free(d);
    return st;
}
