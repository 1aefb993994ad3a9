/* SPDX-License-Identifier: Apache-2.0 */
/*
 * message_out.h - a message that is being written, in JSON or in Avro, from its first member to its
 * last. Whoever describes it says the same for both, once; no tree is built.
 *
 *   out_open(o, OUT_RECORD, 0);
 *   out_key(o, "id");       out_text(o, id, strlen(id));
 *   out_key(o, "ids");      out_open(o, OUT_ARRAY, 2);
 *   out_int(o, 7);          out_int(o, 8);
 *   out_close(o);
 *   out_close(o);
 *
 * Avro is written by a plan: a record's members come in the order of its fields; a field that is
 * passed over, or null, needs a union with null; of a union the first branch that fits is taken.
 *
 * Errors are kept, the first one counts, and are looked at once, by out_take().
 *
 * Threads: no state.
 */
#ifndef LORAMILL_WORKER_CODEC_MESSAGE_OUT_H
#define LORAMILL_WORKER_CODEC_MESSAGE_OUT_H

#include "worker/codec/avro_path.h"
#include "worker/codec/avro_plan.h"
#include "worker/codec/bytes.h"

enum out_kind { OUT_RECORD, OUT_MAP, OUT_ARRAY };

struct message_out {
    struct bytes bytes;
    const struct avro_node *next;       /* Avro: what a value is now; NULL: JSON */
    bool comma;                 /* JSON: something stands before */
    struct out_level {
        enum out_kind kind;
        const struct avro_node *node;           /* Avro */
        const struct avro_field *field, *end;   /* Avro: of a record, to come */
        const char *member;     /* for errors */
    } level[1 + AVRO_PATH_MAX], *in;            /* the first is around all */
    lm_status fault;
    char where[256];
    const char *what;
};

void out_json(struct message_out *o);
/* The first `lead` bytes are left for the caller to fill. */
void out_avro(struct message_out *o, const struct avro_plan *p, size_t lead);

/* Of a map or an array, `n` is how many entries come before out_close(). */
void out_open(struct message_out *o, enum out_kind kind, size_t n);
void out_close(struct message_out *o);
/* Avro: the field of that name, which is not the next; those before it are passed over. */
void out_find_field(struct message_out *o, const char *key);

/* Of a record; nothing in the key has to be escaped. Inlined, because the lengths of most are known
 * where it is called. */
static inline __attribute__((always_inline)) void out_key(struct message_out *o, const char *key)
{
    size_t n = strlen(key);
    if (o->fault)
        return;
    struct out_level *l = o->in;
    if (o->next) {
        const struct avro_field *f = l->field;
        if (f == l->end || f->len != n || memcmp(f->name, key, n)) {
            out_find_field(o, key);
            return;
        }
        l->member = key;
        l->field = f + 1;
        o->next = f->node;
        return;
    }
    char *at = bytes_room(&o->bytes, n + 4);
    if (!at)
        return;
    l->member = key;
    *at = ',';                  /* overwritten where there is none */
    at += o->comma;
    *at++ = '"';
    memcpy(at, key, n);
    at[n] = '"';
    at[n + 1] = ':';
    o->bytes.n += n + 3 + o->comma;
    o->comma = false;
}
void out_entry(struct message_out *o, const char *key, size_t n);       /* of a map; any UTF-8 */

void out_null(struct message_out *o);
void out_bool(struct message_out *o, bool v);
void out_int(struct message_out *o, int64_t v);
void out_thousandths(struct message_out *o, int64_t n); /* a real, n / 1000 */
void out_real(struct message_out *o, double v);
void out_text(struct message_out *o, const char *s, size_t n);

/* malloc'ed, with a NUL behind that *len does not count. Errors: LM_NOMEM; LM_MISMATCH with the
 * path of what the schema has no place for; LM_FORMAT for a text that is not UTF-8. */
lm_status out_take(struct message_out *o, void **out, size_t *len, struct lm_err *err);

#endif
