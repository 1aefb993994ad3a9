/* SPDX-License-Identifier: Apache-2.0 */
/*
 * config.h - the worker's properties: one table drives the parser, --help, docs/configuration.md
 * and the sample file.
 *
 * A file holds `key=value` lines and # comments; --set key=value overrides it. Unknown keys are
 * errors that name the nearest known one. `kafka.*` (and `kafka.consumer.*`, `kafka.producer.*`)
 * go to librdkafka unchanged; those that the worker owns are refused by name.
 */
#ifndef LORAMILL_WORKER_CONFIG_H
#define LORAMILL_WORKER_CONFIG_H

#include <stdio.h>
#include "kernels/base.h"

struct config_pair { char *key, *value; };

struct config {
    /* Strings are owned, "" when unset. Filled from the table in config.c; see there for meaning. */
    char *model_path, *model_name, *backend, *engine_mode;
    int64_t device_index, threads, pool_bytes, max_seqs, max_step_tokens, max_waiting, max_model_len;
    char *adapters_url, *adapters_cache_dir, *adapters_ca_file, *adapters_auth_header;
    int64_t adapters_max_bytes, adapters_concurrency, adapters_max_attempts, adapters_negative_ttl_ms;
    int64_t adapters_host_bytes;
    char *topics_prompts, *topics_replies, *topics_dead_letters, *topics_replies_allowed;
    char *replies_encoding;
    char *registry_url, *registry_auth, *registry_ca_file;
    bool registry_auto_register;
    char *group_id, *worker_name;
    int64_t intake_max_messages, intake_max_bytes, commit_interval_ms, drain_timeout_ms;
    int64_t retry_max_attempts;
    char *http_address;
    int64_t http_port;          /* 0: off; when busy, the next free of the following 100 */
    char *log_level;
    struct config_pair *kafka;  /* passthrough, "kafka." removed */
    int n_kafka;
};

lm_status config_init(struct config *c, struct lm_err *err);    /* defaults */
void config_release(struct config *c);
lm_status config_read_file(struct config *c, const char *path, struct lm_err *err);
lm_status config_set(struct config *c, const char *assignment, struct lm_err *err);  /* "k=v" */
lm_status config_check(const struct config *c, struct lm_err *err); /* required keys, ranges */

void config_print_help(FILE *f);
void config_print_markdown(FILE *f);    /* docs/configuration.md */
void config_print_sample(FILE *f);      /* ops/loramill.properties */

#endif
