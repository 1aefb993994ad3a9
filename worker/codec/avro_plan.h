/* SPDX-License-Identifier: Apache-2.0 */
/*
 * avro_plan.h - a writer's schema, vetted, and ready to drive decoding and encoding.
 *
 * A plan is a tree of nodes, one for each place in the datum (named types that are used twice are
 * expanded), made from the schema that Avro C parsed, so that our scan and Avro C's reader can't
 * disagree on what comes next.
 *
 * Vetted means: at most 256 KiB of JSON nested at most 48 deep; no recursion; at most 4,096 nodes,
 * 16 levels; no array or map whose items take no bytes (5 bytes could claim 10^8 nulls); fixed
 * types of at most 1,024 bytes; names of Avro's form, no field or symbol twice.
 *
 * Threads: a plan is immutable, but for what decodes with it. Avro C is not used outside
 * avro_lock(), because its error text is one static buffer for the whole process, and so is its
 * allocator, which is another one while a datum is decoded.
 */
#ifndef LORAMILL_WORKER_CODEC_AVRO_PLAN_H
#define LORAMILL_WORKER_CODEC_AVRO_PLAN_H

#include <avro.h>
#include "kernels/base.h"

enum { AVRO_NO_NULL = 256 };

struct avro_field {
    const char *name;
    size_t len;                 /* of the name */
    const struct avro_node *node;
};

struct avro_node {
    avro_type_t type;           /* never AVRO_LINK */
    avro_schema_t schema;       /* borrowed from the plan's */
    int n;                      /* fields, branches; 1 for array and map; symbols of an enum */
    int64_t size;               /* bytes of a fixed */
    size_t min_bytes;           /* of its shortest encoding */
    const struct avro_node **child;     /* n of them, for record, union, array and map */
    /* of a record's fields */
    struct avro_field *field;
    int16_t *null_of;           /* the byte that is a whole null: of a union with such a branch,
                                 * among its first 64; else AVRO_NO_NULL, which is no byte */
    int16_t *null_run;          /* so many fields from this one on have that same byte; 0: none */
};

struct avro_plan;

/* Most fields of a message are null, and each such union is one byte. How many of the record's
 * fields from i on, of those whose null is the same byte, are null by the bytes from `at` to `end`.
 * The second is for when the first one is. */
int avro_count_nulls(const struct avro_node *n, int i, const unsigned char *at, size_t left);

static inline int avro_nulls(const struct avro_node *n, int i, const unsigned char *at,
                             const unsigned char *end)
{
    return i < n->n && at < end && *at == n->null_of[i]
           ? avro_count_nulls(n, i, at, (size_t)(end - at)) : 0;
}

/* Errors: LM_FORMAT, LM_UNSUPPORTED or LM_TOO_LARGE, saying what in the schema is at fault. */
lm_status avro_plan_new(const char *json, size_t len, struct avro_plan **out, struct lm_err *err);
void avro_plan_free(struct avro_plan *p);       /* NULL is allowed */

const struct avro_node *avro_plan_root(const struct avro_plan *p);

void avro_lock(void);
void avro_unlock(void);

/* What avro_consume.c decodes with: its to make, in the plan's memory, and to use under
 * avro_lock(). */
struct taker;
struct taker **avro_plan_takers(struct avro_plan *p);
/* Of memory, with nothing to read yet; made once, so not while Avro C's allocator is a datum's.
 * NULL: no memory. */
avro_reader_t avro_plan_reader(struct avro_plan *p);
struct arena *avro_plan_arena(struct avro_plan *p);

#endif
