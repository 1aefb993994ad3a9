/* SPDX-License-Identifier: Apache-2.0 */
/*
 * message_out.c - JSON text and Avro data, written as they are described; see message_out.h.
 *
 * Avro: the specification's "Binary encoding". What other serializers made of the same data stands
 * in the fixtures that test_worker_avro holds it to.
 */
#include "worker/codec/message_out.h"

#include <endian.h>

#include "worker/codec/json_tree.h"

enum { LONG_BYTES = 10 };

static void init(struct message_out *o, const struct avro_node *root)
{
    bytes_init(&o->bytes);
    o->next = root;
    o->comma = false;
    o->level[0] = (struct out_level){ .kind = OUT_RECORD };
    o->in = o->level;
    o->fault = LM_OK;
}

void out_json(struct message_out *o)
{
    init(o, NULL);
}

void out_avro(struct message_out *o, const struct avro_plan *p, size_t lead)
{
    init(o, avro_plan_root(p));
    if (bytes_room(&o->bytes, lead))
        o->bytes.n = lead;
}

/* ---- errors --------------------------------------------------------------------------------- */

static void fail(struct message_out *o, lm_status code, const char *what)
{
    struct avro_path path = { .n = 0 };
    if (o->fault)
        return;
    for (const struct out_level *l = o->level + 1; l <= o->in; l++)
        path.at[path.n++] = l->kind == OUT_ARRAY ? "[]" : l->member;
    avro_path_text(&path, o->where, sizeof o->where);
    o->fault = code;
    o->what = what;
}

lm_status out_take(struct message_out *o, void **out, size_t *len, struct lm_err *err)
{
    if (o->fault) {
        bytes_drop(&o->bytes);
        return lm_err_set(err, o->fault, "%s %s", o->where, o->what);
    }
    *len = o->bytes.n;
    *out = bytes_take(&o->bytes);
    return *out ? LM_OK : lm_err_set(err, LM_NOMEM, "out of memory");
}

/* ---- Avro ----------------------------------------------------------------------------------- */

static char *write_long(char *to, int64_t l)
{
    uint64_t v = (uint64_t)l << 1 ^ (uint64_t)(l >> 63);
    for (; v >= 0x80; v >>= 7)
        *to++ = (char)(v | 0x80);
    *to++ = (char)v;
    return to;
}

static void put_long(struct message_out *o, int64_t l)
{
    char *to = bytes_room(&o->bytes, LONG_BYTES);
    if (to)
        o->bytes.n += (size_t)(write_long(to, l) - to);
}

/* Of a branch, or of few items: mostly one byte. */
static inline void put_count(struct message_out *o, size_t n)
{
    if (n < 64)
        bytes_byte(&o->bytes, (char)(n << 1));
    else
        put_long(o, (int64_t)n);
}

static void put_string(struct message_out *o, const char *s, size_t n)
{
    char *to = bytes_room(&o->bytes, LONG_BYTES + n);
    if (!to)
        return;
    char *text = write_long(to, (int64_t)n);
    if (n)
        memcpy(text, s, n);
    o->bytes.n += (size_t)(text - to) + n;
}

/* Least significant byte first, whatever the machine. */
static void put_bits(struct message_out *o, uint64_t bits, size_t n)
{
    char *to = bytes_room(&o->bytes, sizeof bits);
    bits = htole64(bits);
    if (to)
        memcpy(to, &bits, sizeof bits);         /* those behind n are written over */
    o->bytes.n += to ? n : 0;
}

static bool takes(const struct avro_node *n, unsigned types)
{
    return types >> n->type & 1;
}

static const struct avro_node *place_in_union(struct message_out *o, unsigned types)
{
    const struct avro_node *n = o->next;
    for (int i = 0; n->type == AVRO_UNION && i < n->n; i++)
        if (takes(n->child[i], types)) {
            put_count(o, (size_t)i);
            return n->child[i];
        }
    fail(o, LM_MISMATCH, n->type == AVRO_UNION ? "fits no branch of the schema's union" :
         "does not fit the schema");
    return NULL;
}

/* The node of the value that comes, whose type is one of `types`, behind the number of its branch.
 * NULL: none, which is kept as an error. */
static inline const struct avro_node *place(struct message_out *o, unsigned types)
{
    return takes(o->next, types) ? o->next : place_in_union(o, types);
}

/* A field that nobody gave. */
static void pass_over(struct message_out *o, struct out_level *l)
{
    const struct avro_node *n = l->field->node;
    l->member = l->field++->name;
    if (n->type == AVRO_NULL)
        return;
    for (int i = 0; n->type == AVRO_UNION && i < n->n; i++)
        if (n->child[i]->type == AVRO_NULL) {
            put_count(o, (size_t)i);
            return;
        }
    fail(o, LM_MISMATCH, n->type == AVRO_UNION ? "fits no branch of the schema's union" :
         "is missing");
}

/* ---- containers ----------------------------------------------------------------------------- */

/* JSON: before each value that is an item, and each key. */
static inline void comma(struct message_out *o)
{
    if (o->comma)
        bytes_byte(&o->bytes, ',');
    o->comma = true;
}

static struct out_level *push(struct message_out *o, enum out_kind kind,
                              const struct avro_node *node)
{
    if (o->in == o->level + AVRO_PATH_MAX) {
        fail(o, LM_MISMATCH, "is nested too deep");
        return NULL;
    }
    struct out_level *l = ++o->in;
    l->kind = kind;
    l->node = node;
    l->member = "";
    l->field = node && kind == OUT_RECORD ? node->field : NULL;
    l->end = l->field ? l->field + node->n : NULL;
    return l;
}

static void open_avro(struct message_out *o, enum out_kind kind, size_t n)
{
    static const unsigned types[] = { [OUT_RECORD] = 1u << AVRO_RECORD, [OUT_MAP] = 1u << AVRO_MAP,
                                      [OUT_ARRAY] = 1u << AVRO_ARRAY };
    const struct avro_node *node = place(o, types[kind]);
    if (!node || !push(o, kind, node) || kind == OUT_RECORD)
        return;
    o->next = node->child[0];
    if (n)
        put_count(o, n);
}

void out_open(struct message_out *o, enum out_kind kind, size_t n)
{
    if (o->fault)
        return;
    if (o->next) {
        open_avro(o, kind, n);
        return;
    }
    if (!push(o, kind, NULL))
        return;
    comma(o);
    bytes_byte(&o->bytes, kind == OUT_ARRAY ? '[' : '{');
    o->comma = false;
}

static void close_avro(struct message_out *o)
{
    struct out_level *l = o->in;
    if (l->kind != OUT_RECORD)
        put_count(o, 0);
    while (l->field != l->end && !o->fault)
        pass_over(o, l);
    o->in--;
    if (l[-1].kind != OUT_RECORD)
        o->next = l[-1].node->child[0];
}

void out_close(struct message_out *o)
{
    if (o->fault)
        return;
    if (o->next) {
        close_avro(o);
        return;
    }
    bytes_byte(&o->bytes, (o->in--)->kind == OUT_ARRAY ? ']' : '}');
    o->comma = true;
}

void out_find_field(struct message_out *o, const char *key)
{
    struct out_level *l = o->in;
    while (!o->fault && l->field != l->end && strcmp(l->field->name, key))
        pass_over(o, l);
    l->member = key;
    if (l->field != l->end)
        o->next = l->field++->node;
    else
        fail(o, LM_MISMATCH, "is no field of the schema, or not in its order");
}

void out_entry(struct message_out *o, const char *key, size_t n)
{
    if (o->fault)
        return;
    struct out_level *l = o->in;
    l->member = key;
    if (l->node) {
        if (json_is_utf8(key, n))
            put_string(o, key, n);
        else
            fail(o, LM_FORMAT, "has a name that is not valid UTF-8");
        return;
    }
    comma(o);
    if (!json_put_text(&o->bytes, key, n))
        fail(o, LM_FORMAT, "has a name that is not valid UTF-8");
    bytes_byte(&o->bytes, ':');
    o->comma = false;
}

/* ---- values --------------------------------------------------------------------------------- */

void out_null(struct message_out *o)
{
    if (o->fault)
        return;
    if (o->next) {
        place(o, 1u << AVRO_NULL);
        return;
    }
    comma(o);
    bytes_put(&o->bytes, "null", 4);
}

void out_bool(struct message_out *o, bool v)
{
    if (o->fault)
        return;
    if (o->next) {
        if (place(o, 1u << AVRO_BOOLEAN))
            bytes_byte(&o->bytes, v ? 1 : 0);
        return;
    }
    comma(o);
    bytes_put(&o->bytes, v ? "true" : "false", v ? 4 : 5);
}

static void put_number(struct message_out *o, const struct avro_node *n, double d)
{
    float f = (float)d;
    uint64_t bits = 0;
    uint32_t half = 0;
    memcpy(&bits, &d, sizeof bits);
    memcpy(&half, &f, sizeof half);
    put_bits(o, n->type == AVRO_DOUBLE ? bits : half, n->type == AVRO_DOUBLE ? 8 : 4);
}

void out_int(struct message_out *o, int64_t v)
{
    if (o->fault)
        return;
    if (!o->next) {
        comma(o);
        json_put_int(&o->bytes, v);
        return;
    }
    bool small = v >= INT32_MIN && v <= INT32_MAX;
    const struct avro_node *n = place(o, (small ? 1u << AVRO_INT32 : 0) | 1u << AVRO_INT64 |
                                      1u << AVRO_FLOAT | 1u << AVRO_DOUBLE);
    if (n && takes(n, 1u << AVRO_INT32 | 1u << AVRO_INT64))
        put_long(o, v);
    else if (n)
        put_number(o, n, (double)v);
}

void out_real(struct message_out *o, double v)
{
    if (o->fault)
        return;
    if (!o->next) {
        comma(o);
        json_put_real(&o->bytes, v);
        return;
    }
    const struct avro_node *n = place(o, 1u << AVRO_FLOAT | 1u << AVRO_DOUBLE);
    if (n)
        put_number(o, n, v);
}

void out_thousandths(struct message_out *o, int64_t n)
{
    if (o->fault)
        return;
    if (!o->next) {
        comma(o);
        json_put_thousandths(&o->bytes, n);
        return;
    }
    const struct avro_node *to = place(o, 1u << AVRO_FLOAT | 1u << AVRO_DOUBLE);
    if (to)
        put_number(o, to, (double)n / 1000);
}

void out_text(struct message_out *o, const char *s, size_t n)
{
    if (o->fault)
        return;
    if (o->next) {
        if (!json_is_utf8(s, n))
            fail(o, LM_FORMAT, "is not valid UTF-8");
        else if (place(o, 1u << AVRO_STRING))
            put_string(o, s, n);
        return;
    }
    comma(o);
    if (!json_put_text(&o->bytes, s, n))
        fail(o, LM_FORMAT, "is not valid UTF-8");
}
