/* SPDX-License-Identifier: Apache-2.0 */
/*
 * registry.h - the part of the Schema Registry's REST interface that a worker needs.
 *
 * Blocking, one request at a time, bounded: 3 s to connect, 10 s for all that one question takes,
 * 1 MiB a reply, http and https only, no redirects. Several base URLs, comma-separated, are tried
 * in turn, starting with the one that answered last; each may take an equal part of the time that
 * is left, so a silent one leaves some for the next.
 *
 * Failures come in two kinds, and telling them apart is this module's main work:
 *   final      LM_NOT_FOUND (the registry itself says 404xx), LM_UNSUPPORTED (not Avro, or made of
 *              references), LM_TOO_LARGE (with status 200), LM_MISMATCH (incompatible), LM_INVALID
 *              (422xx)
 *   retriable  LM_NET: no connection, timeout, 408, 429, 5xx, but also refused credentials and a
 *              404 or 200 that no registry wrote: an outage or a wrong URL must stop the intake,
 *              not send every prompt to the dead letters.
 * After a retriable failure the same answer is given for 500 ms without asking again. (Not when
 * `stop` has ended the question: then the next one is asked.)
 *
 * Threads: one at a time.
 */
#ifndef LORAMILL_WORKER_CODEC_REGISTRY_H
#define LORAMILL_WORKER_CODEC_REGISTRY_H

#include <stdatomic.h>

#include "kernels/base.h"

typedef struct registry registry;

struct registry_config {        /* what is not given: NULL or "" */
    const char *url;            /* "http://a:8081" or "http://a:8081,https://b/registry" */
    const char *auth;           /* "user:password" */
    const char *auth_header;    /* "Authorization: Bearer ...", or any other */
    const char *ca_file;        /* PEM */
    const char *cert_file;      /* PEM, our own; with its key where key_file is not given */
    const char *key_file;
    int connect_ms, total_ms;   /* 0: 3000, 10000 */
    const atomic_bool *stop;    /* true: gives up what it asks, within a second; NULL: never */
};

/* Whether the options are such as registry_new() takes; LM_INVALID with the property's name. */
lm_status registry_check(const struct registry_config *cfg, struct lm_err *err);
lm_status registry_new(const struct registry_config *cfg, registry **out, struct lm_err *err);
void registry_free(registry *r);        /* NULL is allowed */

/* The Avro schema's text, malloc'ed. */
lm_status registry_by_id(registry *r, int32_t id, char **text, struct lm_err *err);
lm_status registry_by_guid(registry *r, const unsigned char guid[16], char **text,
                           struct lm_err *err);

/* The id of `text` under `subject`: registered when `create`, else looked up. */
lm_status registry_id_of(registry *r, const char *subject, const char *text, bool create,
                         int32_t *id, struct lm_err *err);

#endif
