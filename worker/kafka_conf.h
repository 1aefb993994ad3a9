/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kafka_conf.h - librdkafka's configuration objects from ours: our defaults, then the passthrough
 * properties, then what the worker insists on. Also librdkafka's log, into ours.
 */
#ifndef LORAMILL_WORKER_KAFKA_CONF_H
#define LORAMILL_WORKER_KAFKA_CONF_H

#include <librdkafka/rdkafka.h>

#include "worker/config.h"

/* `scope` is CONFIG_CONSUMER or CONFIG_PRODUCER. The caller adds callbacks and gives the object to
 * rd_kafka_new(), or destroys it. LM_INVALID names the property; secret values are not shown. */
lm_status kafka_conf_new(const struct config *c, enum config_scope scope, const char *client_id,
                         rd_kafka_conf_t **out, struct lm_err *err);

/* Can this library do what the configuration asks for, and would kafka_conf_new() take it, for both
 * handles? LM_UNSUPPORTED names what needs a newer library, LM_INVALID also what does not go
 * together. */
lm_status kafka_conf_check(const struct config *c, struct lm_err *err);

/* rd_kafka_new() with our log and error text; consumes *conf on success, destroys it on failure. */
lm_status kafka_open(rd_kafka_type_t type, rd_kafka_conf_t *conf, rd_kafka_t **out,
                     struct lm_err *err);

/* Logs the library's version, by rd_kafka_version() at run time; refuses one that is too old for
 * this worker, or for the delivery mode that it is asked for. */
lm_status kafka_check_library(const struct config *c, struct lm_err *err);

/* What a handle has complained of last. One thread's. */
struct kafka_said { int err; int64_t at_us; unsigned more; };

/* A client's error that heals by itself, as a warning; the same one again within 10 s is counted
 * only, for a broker that is away is reported many times a second. */
void kafka_log_error(struct kafka_said *said, const char *component, int err, const char *reason);

/* Another transactional.id of the same worker's, the n-th: the one that is set, and "~2" for the
 * first. A hyphen would make that of the worker "gpu" the one of the worker "gpu-2". LM_NOMEM. */
lm_status kafka_conf_other_id(rd_kafka_conf_t *conf, int n, struct lm_err *err);

/* A number that the client goes by, whoever has set it; 0: it has no such property. */
int64_t kafka_conf_int(const rd_kafka_conf_t *conf, const char *key);

/* Is KIP-848 asked for, kafka.group.protocol=consumer? */
bool kafka_new_protocol(const struct config *c);

/* Does the library keep the metadata of commits, which holds the offset map? */
bool kafka_has_offset_map(void);

#endif
