/* SPDX-License-Identifier: Apache-2.0 */
/*
 * headers.h - record headers: finding them, building lists of them, and the conventions of request
 * and reply. (A dead letter's are dead_letter.h's.) Knows no Kafka handle, so it is testable alone.
 *
 * Kafka allows a name more than once; as everywhere in its ecosystem, the last one counts. Values
 * are bytes: a correlation id may hold anything and is repeated byte for byte.
 *
 * Ownership: a list owns what it has copied; what is lent to it outlives it. Threads: none; a job's
 * lists are whoever's that has the job.
 */
#ifndef LORAMILL_WORKER_HEADERS_H
#define LORAMILL_WORKER_HEADERS_H

#include "worker/codec/message.h"

/* The last header of that name, or NULL. */
const struct header *header_find(const struct header *h, int n, const char *name);

/* ---- a list ------------------------------------------------------------------------------ */

enum { HEADERS_FEW = 6, HEADERS_FEW_BYTES = 120 };

/* Those of a reply mostly lie in the list itself, so it must not be moved. Begins as zeros. */
struct header_list {
    struct header *items;       /* `few`, or a block */
    int n, cap;
    bool failed;                /* an add ran out of memory; test once, at the end */
    struct header_block *blocks;        /* copies that have no room in `bytes` */
    size_t used;                /* of `bytes` */
    /* Written before they are read, and need not begin as zeros; last, see struct job. */
    struct header few[HEADERS_FEW];
    char bytes[HEADERS_FEW_BYTES];
};
void header_list_release(struct header_list *l);        /* it may be used again */
void header_add(struct header_list *l, const char *name, const void *value, size_t len);
void header_add_text(struct header_list *l, const char *name, const char *text);
void header_add_be32(struct header_list *l, const char *name, int32_t v);
void header_add_be64(struct header_list *l, const char *name, int64_t v);
void header_add_decimal(struct header_list *l, const char *name, int64_t v);

/* ---- request and reply ------------------------------------------------------------------- */

/* Names that the configuration may change. */
struct header_names { const char *correlation_id, *reply_topic, *reply_partition; };

struct reply_route {
    int32_t partition;          /* -1: by key */
    bool asked;                 /* the prompt named the topic, not the configuration */
    bool follows;               /* the partition is where the parts went, nobody has named it */
    char topic[256];            /* last, see struct job */
};

/* `allowed`: comma-separated exact names or "prefix*". */
bool reply_topic_allowed(const char *allowed, const char *topic);

/* Where a prompt's reply goes: the header, else the prompt's field, else `dflt`. LM_DENIED for a
 * topic that is not allowed, LM_INVALID for a header that can't be read. */
lm_status reply_route(const struct header *h, int n, const struct header_names *names,
                      const char *field, const char *dflt, const char *allowed,
                      struct reply_route *out, struct lm_err *err);

/* content-type, correlation ids as they came (else the prompt's field), trace context and
 * loramill-request-id. What came is lent, and so are the names; what is the prompt's is copied. */
void reply_headers(struct header_list *out, const struct header *h, int n,
                   const struct header_names *names, const struct prompt *p, enum encoding enc);

#endif
