/* SPDX-License-Identifier: Apache-2.0 */
/*
 * credentials.h - SASL user names and passwords that change while the worker runs.
 *
 * A password that was rotated at the broker ends no connection: those that stand go on, the next
 * one that is made is refused, and a worker that can't be told the new password must be restarted
 * then. So the configuration is read again, from the same files and --set options, when SIGHUP
 * comes or a broker refuses the password (at most every REREAD_US), and kafka.sasl.username and
 * kafka.sasl.password, the consumer's and the producer's own included, go to the open clients.
 * Nothing else of the configuration changes. Files that can't be read, or hold errors, change
 * nothing and are logged.
 *
 * Ownership: borrows the configuration and the handles; a handle is detached before it is
 * destroyed. Threads: all but credentials_look(), the main thread's, may be called from any.
 */
#ifndef LORAMILL_WORKER_CREDENTIALS_H
#define LORAMILL_WORKER_CREDENTIALS_H

#include <librdkafka/rdkafka.h>

#include "worker/config.h"

typedef struct credentials credentials;

credentials *credentials_new(const struct config *cfg);         /* NULL: out of memory */
void credentials_free(credentials *c);

/* From now on this client has the newest ones; `scope` is CONFIG_CONSUMER or CONFIG_PRODUCER. */
void credentials_attach(credentials *c, rd_kafka_t *rk, enum config_scope scope);
void credentials_detach(credentials *c, rd_kafka_t *rk);

/* Looks at an error of a client: a password that was refused is looked for anew soon. */
void credentials_error(credentials *c, int err);

/* Reads the configuration again if that was asked for, or if a password was refused. */
void credentials_look(credentials *c, bool asked);

#endif
