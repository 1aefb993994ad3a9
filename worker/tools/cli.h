/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cli.h - what the command line tools share: settings, signals, lines of input, Kafka handles.
 *
 * Tools use the worker's own property file, so that one file describes one deployment; they need
 * fewer keys of it than a worker, hence they check what they need themselves.
 *
 * Threads: main thread only, except the handlers librdkafka calls from rd_kafka_poll().
 */
#ifndef LORAMILL_WORKER_TOOLS_CLI_H
#define LORAMILL_WORKER_TOOLS_CLI_H

#include <librdkafka/rdkafka.h>
#include "worker/config.h"

enum { CLI_OK = 0, CLI_FAILED = 1, CLI_USAGE = 2 };

/* ---- settings --------------------------------------------------------------------------- */

enum { CLI_MAX_FILES = 32, CLI_MAX_SET = 256 };

/* The options -c FILE and --set KEY=VALUE as given; borrowed from argv. */
struct cli_settings {
    const char *file[CLI_MAX_FILES];
    const char *set[CLI_MAX_SET];
    int n_files, n_set;
};

lm_status cli_settings_file(struct cli_settings *s, const char *path, struct lm_err *err);
lm_status cli_settings_add(struct cli_settings *s, const char *assignment, struct lm_err *err);
/* Defaults, then the files in their order, then --set, so that it wins wherever it stands. On
 * failure nothing is left to release. */
lm_status cli_settings_load(const struct cli_settings *s, struct config *c, struct lm_err *err);

/* A whole decimal number in [min, max], nothing before or behind it. */
lm_status cli_parse_number(const char *option, const char *text, int64_t min, int64_t max,
                           int64_t *out, struct lm_err *err);

/* A time, into epoch milliseconds: "10m" is ten minutes ago (s, m, h, d); a plain number is epoch
 * milliseconds. */
lm_status cli_parse_since(const char *option, const char *text, int64_t *out, struct lm_err *err);

/* ---- other people's text ------------------------------------------------------------------ */

struct json_t;

/* Bytes from a message or a broker, in one line: control characters, C1 and U+007F among them, and
 * what is not UTF-8 as \xNN, so that they can't drive a terminal or fake a line. */
void cli_print_text(const char *s, size_t len);
/* The same into a buffer, with a '?' for each such byte, cut between characters. NULL is "". */
void cli_copy_text(char *to, size_t size, const char *from);
/* Is it UTF-8 without control characters but tab and newline? */
bool cli_is_text(const void *s, size_t len);
/* To standard output, with json_dumps() flags; C1 and U+007F escaped. */
void cli_print_json(const struct json_t *o, size_t flags);
/* Valid JSON to standard output in the same way, without a newline. */
void cli_print_json_text(const char *text);

/* ---- signals ---------------------------------------------------------------------------- */

/* SIGINT and SIGTERM raise a flag (a second one kills as usual), SIGPIPE is ignored. */
void cli_catch_signals(void);
bool cli_interrupted(void);

/* ---- lines of input --------------------------------------------------------------------- */

#define CLI_MAX_LINE ((size_t)16 << 20)

/* Reads a file, or stdin for "-", line by line, with a limit on a line's length. */
struct cli_lines {
    FILE *in;
    char *text;                 /* the line without its end, NUL-terminated; ours */
    size_t len, size;
    uint64_t number;            /* from 1 */
};

lm_status cli_lines_open(struct cli_lines *l, const char *path, struct lm_err *err);
void cli_lines_close(struct cli_lines *l);
/* LM_OK: a line that is not blank. LM_NOT_FOUND: the end. LM_TOO_LARGE: this line is skipped, go
 * on. Anything else ends the reading. */
lm_status cli_lines_next(struct cli_lines *l, struct lm_err *err);
/* Lines that cli_lines_next() will give; 0 when `path` can't be read twice. */
uint64_t cli_lines_count(const char *path);

/* ---- Kafka ------------------------------------------------------------------------------ */

struct cli_kafka {
    rd_kafka_t *rk;
    char why[256];              /* the client's last complaint, for messages */
    const char *transactional_id;       /* set before opening a producer of transactions */
    bool one_each;              /* set before opening a consumer that reads one record a partition:
                                 * it fetches little more */
    void (*delivered)(void *user, const rd_kafka_message_t *m);
    void *user;
};

/* A producer (idempotent, all acks; `k->delivered` gets every report) or a consumer that never
 * commits, with the file's kafka.* properties. `k` must stay where it is. */
lm_status cli_kafka_open(struct cli_kafka *k, const struct config *c, rd_kafka_type_t type,
                         struct lm_err *err);
void cli_kafka_close(struct cli_kafka *k);

/* How many partitions `topic` has. LM_NOT_FOUND when the broker does not know it, LM_NET when no
 * broker answers in time. */
lm_status cli_kafka_partitions(struct cli_kafka *k, const char *topic, int timeout_ms,
                               int *n_partitions, struct lm_err *err);
/* The same, and which broker leads each, -1 for none: leaders[n_partitions], malloc'ed. */
lm_status cli_kafka_leaders(struct cli_kafka *k, const char *topic, int timeout_ms,
                            int *n_partitions, int32_t **leaders, struct lm_err *err);

#endif
