/* SPDX-License-Identifier: Apache-2.0 */
/*
 * config.h - the worker's properties: one table drives the parser, --help, docs/configuration.md
 * and the sample file.
 *
 * A file holds `key=value` lines and # comments; --set key=value overrides it. Unknown keys are
 * errors that name the nearest known one. `kafka.*` (and `kafka.consumer.*`, `kafka.producer.*`)
 * go to librdkafka unchanged; those that the worker owns are refused by name.
 *
 * Ownership: a config owns its strings. Threads: filled at start-up by one thread, read-only after.
 */
#ifndef LORAMILL_WORKER_CONFIG_H
#define LORAMILL_WORKER_CONFIG_H

#include <stdio.h>
#include "kernels/base.h"

/* kafka.max.poll.interval.ms unless it is set. */
#define CONFIG_MAX_POLL_INTERVAL "120000"

/* http.port and the ports behind it: a worker takes the first that is free. */
enum { CONFIG_HTTP_PORTS = 100 };

/* Which librdkafka handle a passthrough property is for. */
enum config_scope { CONFIG_BOTH, CONFIG_CONSUMER, CONFIG_PRODUCER };

struct config_pair {
    char *key, *value;          /* key as librdkafka spells it */
    enum config_scope scope;
};

/* A file that was read, or an assignment that was made. */
struct config_source { bool is_file; char *text; };

struct config {
    /* Strings are owned, "" when unset. Filled from the table in config_table.c. */
    char *model_path, *model_name, *backend, *engine_mode;
    int64_t device_index, threads, pool_bytes;
    int64_t max_seqs, max_step_tokens, max_waiting, max_model_len;
    bool engine_group, engine_fair, engine_early_abort, engine_prefetch, engine_prefix_cache;
    bool engine_merge, engine_pipeline;
    int64_t engine_max_overtaken, engine_max_wait_ms, engine_swap_bytes;
    char *engine_preempt, *kv_dtype, *weights_dtype;
    char *adapters_url, *adapters_cache_dir, *adapters_ca_file, *adapters_auth_header;
    int64_t adapters_max_bytes, adapters_concurrency, adapters_max_attempts;
    int64_t adapters_negative_ttl_ms;
    int64_t adapters_host_bytes;
    char *topics_prompts, *topics_replies, *topics_dead_letters, *topics_replies_allowed;
    char *replies_encoding;
    bool errors_reply;
    char *topics_control, *replies_too_large, *claim_url, *claim_auth_header;
    char *claim_s3_region, *claim_s3_key, *claim_s3_secret;
    char *journal_dir;
    int64_t blocked_warn_ms, poison_max_attempts, hang_timeout_ms;
    int64_t claim_above, control_retention_ms, deadline_default_ms, retry_deadline_ms;
    int64_t control_skew_ms, stream_interval_ms;
    char *headers_correlation_id, *headers_reply_topic, *headers_reply_partition;
    char *registry_url, *registry_auth, *registry_auth_header;
    char *registry_ca_file, *registry_cert_file, *registry_key_file;
    bool registry_auto_register;
    char *group_id, *worker_name;
    char *delivery_mode, *delivery_order, *transaction_id, *topics_priorities;
    int64_t transaction_interval_ms, transaction_max_messages;
    int64_t message_max_bytes;
    int64_t intake_max_messages, intake_max_bytes, in_flight_max_messages, intake_max_tokens;
    bool in_flight_by_default;  /* nobody has set in_flight.max_messages */
    int64_t commit_interval_ms, commit_map_max_bytes, drain_timeout_ms, revoke_drain_ms;
    int64_t retry_max_attempts, retry_backoff_ms, retry_backoff_max_ms;
    char *traces_otlp_url, *traces_auth_header, *traces_ca_file;
    char *http_address;
    int64_t http_port;          /* 0: off; when busy, the next of CONFIG_HTTP_PORTS */
    char *log_level, *log_format;
    struct config_pair *kafka;  /* passthrough, "kafka." removed */
    int n_kafka;
    struct config_source *sources;      /* in their order */
    int n_sources;
};

lm_status config_init(struct config *c, struct lm_err *err);    /* defaults */
void config_release(struct config *c);
/* Errors carry FILE:LINE. Both refuse unknown keys, bad values and the kafka.* that we own. */
lm_status config_read_file(struct config *c, const char *path, struct lm_err *err);
lm_status config_set(struct config *c, const char *assignment, struct lm_err *err);  /* "k=v" */
/* in_flight.max_messages; while nobody sets that, not below intake.max_messages nor, exactly-once,
 * one and a half transactions. */
int64_t config_in_flight(const struct config *c);
lm_status config_check(const struct config *c, struct lm_err *err); /* required keys, ranges */
/* The same files and assignments, as they are now, into *out, which is released in any case. */
lm_status config_read_again(const struct config *c, struct config *out, struct lm_err *err);

bool config_exactly_once(const struct config *c);
/* Takes the next name or pattern, which begins with '^', off a copy of topics.prompts, and ends it.
 * Commas part them; blanks around one are not its own, those within are. NULL: no more. */
char *config_next_topic(char **rest);
/* Is it one of topics.prompts, by name or by pattern? */
bool config_reads_topic(const struct config *c, const char *topic);
/* From topics.priorities; 0 for a topic that it does not name. */
int config_topic_priority(const struct config *c, const char *topic);

/* The last value given for a passthrough property in that scope, or NULL. */
const char *config_kafka(const struct config *c, enum config_scope scope, const char *key);

/* As the properties registry.* say; borrowed. For who includes registry.h. */
struct registry_config;
struct registry_config config_registry(const struct config *c);

/* adapters.cache_dir or the user's default; malloc'ed, NULL when memory is exhausted. */
char *config_cache_dir(const struct config *c);
/* journal.dir or the user's default; likewise. */
char *config_journal_dir(const struct config *c);

/* Must this key's value stay out of logs? Accepts our keys and librdkafka's. */
bool config_is_secret(const char *key);
/* One DEBUG line a property, secrets as "[set]". */
void config_log(const struct config *c);

void config_print_help(FILE *f);
void config_print_markdown(FILE *f);    /* docs/configuration.md */
void config_print_sample(FILE *f);      /* ops/loramill.properties */

/* ---- the table, for config.c and config_doc.c ------------------------------------------- */

enum config_type { CONFIG_STRING, CONFIG_CHOICE, CONFIG_INT, CONFIG_BYTES, CONFIG_BOOL };

struct config_property {
    const char *name;
    enum config_type type;
    size_t offset;              /* in struct config */
    const char *dflt;           /* as written in a file */
    int64_t min, max;           /* CONFIG_INT, CONFIG_BYTES */
    const char *choices;        /* CONFIG_CHOICE: "a|b|c" */
    unsigned flags;
    const char *help;
};

/* URL, URLS: shown without passwords, see url.h. */
enum { CONFIG_SECRET = 1, CONFIG_REQUIRED = 2, CONFIG_URL = 4, CONFIG_URLS = 8 };

struct config_section { const char *title; const struct config_property *rows; int n; };

const struct config_section *config_sections(int *n);

struct config_owned { const char *key, *why; };
const struct config_owned *config_owned(int *n);        /* librdkafka's, refused by name */

#endif
