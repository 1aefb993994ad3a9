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
 * Threads: a plan is immutable, but for the value that it lends. Avro C is not used outside
 * avro_lock(), because its error text is one static buffer for the whole process.
 */
#ifndef LORAMILL_WORKER_AVRO_PLAN_H
#define LORAMILL_WORKER_AVRO_PLAN_H

#include <avro.h>
#include "kernels/base.h"

struct avro_node {
    avro_type_t type;           /* never AVRO_LINK */
    int n;                      /* fields, branches; 1 for array and map; symbols of an enum */
    int64_t size;               /* bytes of a fixed */
    size_t min_bytes;           /* of its shortest encoding */
    const struct avro_node **child;     /* n of them, for record, union, array and map */
    const char **name;          /* field names of a record */
};

struct avro_plan;

/* Errors: LM_FORMAT, LM_UNSUPPORTED or LM_TOO_LARGE, saying what in the schema is at fault. */
lm_status avro_plan_new(const char *json, size_t len, struct avro_plan **out, struct lm_err *err);
void avro_plan_free(struct avro_plan *p);       /* NULL is allowed */

const struct avro_node *avro_plan_root(const struct avro_plan *p);

void avro_lock(void);
void avro_unlock(void);

/* An empty value of the schema, which belongs to the plan; both calls under avro_lock(). It keeps
 * its memory from one datum to the next, unless the last one, of `bytes`, was large (SIZE_MAX: or
 * its reading or writing failed). NULL: no memory. */
avro_value_t *avro_plan_borrow(struct avro_plan *p);
void avro_plan_give_back(struct avro_plan *p, size_t bytes);

#endif
