/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_submit.c - `loramill submit`: a JSONL file of prompts to the prompt topic.
 *
 * Each line is one prompt (docs/messages.md) and is sent byte for byte. Before that it is decoded
 * as a worker would, so that a typo is reported here, with its line number, instead of coming back
 * as a dead letter; --no-check sends whatever stands there. A bad line never stops the good ones.
 *
 * A broker refuses a batch that is larger than its topic's messages may be, and all lines of it. So
 * lines that are refused for their size go once more, each by itself, when nothing else is on its
 * way; what is refused then is too large.
 *
 * A prompt counts as sent when the broker has acknowledged it. Every line ends in exactly one of
 * three counts - delivered, refused, undelivered - and the exit status says whether the last two
 * are zero. An interrupt stops the reading; what is queued is still delivered, within seconds.
 */
#include <getopt.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "worker/codec/codec.h"
#include "worker/tools/cli.h"
#include "worker/tools/commands.h"
#include "worker/tools/progress.h"

#define REPORT_MAX 20           /* lines at fault that are named, of each kind */
#define BROKER_TIMEOUT_MS 15000
#define INTERRUPT_FLUSH_US 5000000
#define AGAIN_BYTES ((size_t)16 << 20)  /* of lines that wait to go by themselves, about */

struct again {
    struct again *next;
    uint64_t line;
    char *key;                  /* NULL: none */
    size_t len;
    char text[];
};

struct submit {
    struct cli_settings settings;
    const char *input, *summary;
    const char *key;            /* field path; "" sends no keys */
    bool check, quiet;

    struct config config;
    struct cli_kafka kafka;
    rd_kafka_topic_t *topic;
    struct cli_lines lines;
    progress *bar;
    uint64_t read;              /* at the end the sum of these */
    uint64_t delivered, refused, undelivered;
    struct again *again, **again_tail;
    size_t again_bytes;
    bool alone, told;           /* alone: what is on its way now is one line */
    int64_t interrupted_us;     /* when that was seen; 0: not yet */
};

static const char help[] =
    "usage: loramill submit -c FILE --input FILE.jsonl|- [OPTION]...\n"
    "\n"
    "Sends each line, one JSON prompt, to the prompt topic and waits until the broker has it.\n"
    "\n"
    "  -c, --config FILE     properties of the deployment (kafka.bootstrap.servers,\n"
    "                        topics.prompts)\n"
    "      --set KEY=VALUE   overrides a property; may be repeated\n"
    "  -i, --input FILE      prompts, one a line; - reads standard input\n"
    "  -k, --key FIELD       field that becomes the record key, dots descend (metadata.customer);\n"
    "                        '' sends no keys (default: id)\n"
    "      --no-check        sends lines as they are, valid prompts or not\n"
    "      --summary FILE    counts as one JSON object\n"
    "  -q, --quiet           no progress, only problems and the last line\n"
    "\n"
    "Exit status: 0 all delivered, 1 a line was refused or not delivered, 2 usage.\n";

/* ---- one line --------------------------------------------------------------------------- */

static void report(struct submit *s, uint64_t nth, uint64_t line, const char *what,
                   const char *why)
{
    if (nth <= REPORT_MAX)
        progress_say(s->bar, "%s:%llu: %s: %s", s->input, (unsigned long long)line, what, why);
    else if (nth == REPORT_MAX + 1)
        progress_say(s->bar, "%s: further lines %s are only counted", s->input, what);
}

static void refuse(struct submit *s, const struct lm_err *err)
{
    report(s, ++s->refused, s->lines.number, "refused", err->msg);
}

/* The field at a dotted path, or NULL. */
static const json_t *descend(const json_t *at, const char *path)
{
    while (at && *path) {
        size_t n = strcspn(path, ".");
        char name[256];
        if (n >= sizeof name)
            return NULL;
        memcpy(name, path, n);
        name[n] = '\0';
        at = json_object_get(at, name);
        path += n + (path[n] == '.');
    }
    return at;
}

/* The record key as a string, or NULL: lines that are not JSON or lack the field have none. */
static char *key_of(const struct submit *s)
{
    if (!*s->key)
        return NULL;
    json_t *root = json_loadb(s->lines.text, s->lines.len, JSON_ALLOW_NUL, NULL);
    const json_t *field = descend(root, s->key);
    char *key = NULL;
    if (json_is_string(field) && !memchr(json_string_value(field), 0, json_string_length(field)))
        key = lm_strndup(json_string_value(field), json_string_length(field));
    else if (json_is_integer(field) && asprintf(&key, "%" JSON_INTEGER_FORMAT,
                                                json_integer_value(field)) < 0)
        key = NULL;
    json_decref(root);
    return key;
}

/* Takes a copy of a line that was refused with its batch. */
static bool keep(struct submit *s, const rd_kafka_message_t *m)
{
    struct again *a = lm_malloc(sizeof *a + m->len);
    if (!a)
        return false;
    *a = (struct again){ .line = (uint64_t)(uintptr_t)m->_private, .len = m->len,
                         .key = m->key ? lm_strndup(m->key, m->key_len) : NULL };
    if (m->key && !a->key) {
        free(a);
        return false;
    }
    memcpy(a->text, m->payload, m->len);
    *s->again_tail = a;
    s->again_tail = &a->next;
    s->again_bytes += m->len;
    return true;
}

static void on_delivered(void *user, const rd_kafka_message_t *m)
{
    struct submit *s = user;
    if (m->err == RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE && !s->alone && keep(s, m))
        return;
    if (!m->err)
        s->delivered++;
    else
        report(s, ++s->undelivered, (uint64_t)(uintptr_t)m->_private, "not delivered",
               rd_kafka_err2str(m->err));
    progress_set(s->bar, s->delivered + s->refused + s->undelivered);
}

static rd_kafka_resp_err_t produce(struct submit *s, uint64_t line, const char *key,
                                   const char *text, size_t len)
{
    rd_kafka_headers_t *h = rd_kafka_headers_new(1);
    rd_kafka_header_add(h, "content-type", -1, "application/json", -1);
    rd_kafka_resp_err_t e =
        rd_kafka_producev(s->kafka.rk, RD_KAFKA_V_RKT(s->topic),
                          RD_KAFKA_V_MSGFLAGS(RD_KAFKA_MSG_F_COPY),
                          RD_KAFKA_V_KEY(key, key ? strlen(key) : 0),
                          RD_KAFKA_V_VALUE((void *)(uintptr_t)text, len), RD_KAFKA_V_HEADERS(h),
                          RD_KAFKA_V_OPAQUE((void *)(uintptr_t)line), RD_KAFKA_V_END);
    if (e)
        rd_kafka_headers_destroy(h);    /* otherwise the message owns them */
    return e;
}

static void send_line(struct submit *s)
{
    struct lm_err err;
    struct prompt *p = NULL;
    if (s->check && json_decode_prompt(s->lines.text, s->lines.len, &p, &err) != LM_OK) {
        refuse(s, &err);
        return;
    }
    prompt_free(p);
    char *key = key_of(s);
    rd_kafka_resp_err_t e;
    bool empty;                         /* a queue that is full of nothing never takes this line */
    do {
        empty = !rd_kafka_outq_len(s->kafka.rk);
        e = produce(s, s->lines.number, key, s->lines.text, s->lines.len);
        if (e == RD_KAFKA_RESP_ERR__QUEUE_FULL)
            rd_kafka_poll(s->kafka.rk, 100);
    } while (e == RD_KAFKA_RESP_ERR__QUEUE_FULL && !empty && !cli_interrupted());
    free(key);
    if (e)
        report(s, ++s->undelivered, s->lines.number, "not delivered", rd_kafka_err2str(e));
}

/* ---- the whole -------------------------------------------------------------------------- */

/* message.timeout.ms bounds this: after it every message has its report. */
static void await_reports(struct submit *s)
{
    while (rd_kafka_outq_len(s->kafka.rk) > 0) {
        rd_kafka_flush(s->kafka.rk, 100);
        progress_set(s->bar, s->delivered + s->refused + s->undelivered);
        if (!cli_interrupted())
            continue;
        s->interrupted_us = s->interrupted_us ? s->interrupted_us : lm_now_us();
        if (lm_now_us() - s->interrupted_us > INTERRUPT_FLUSH_US)
            rd_kafka_purge(s->kafka.rk, RD_KAFKA_PURGE_F_QUEUE | RD_KAFKA_PURGE_F_INFLIGHT);
    }
}

static void send_alone(struct submit *s, const struct again *a)
{
    rd_kafka_resp_err_t e = produce(s, a->line, a->key, a->text, a->len);
    if (e)
        report(s, ++s->undelivered, a->line, "not delivered", rd_kafka_err2str(e));
    await_reports(s);
}

static void send_again(struct submit *s)
{
    await_reports(s);
    if (s->again && !s->told)
        progress_say(s->bar, "submit: the broker finds some batches too large: their lines go one "
                     "by one; a smaller kafka.producer.batch.size is faster");
    s->told |= s->again != NULL;
    s->alone = true;
    for (struct again *a = s->again, *next; a; a = next) {
        next = a->next;
        send_alone(s, a);
        free(a->key);
        free(a);
    }
    s->alone = false;
    s->again = NULL;
    s->again_tail = &s->again;
    s->again_bytes = 0;
}

/* Returns LM_OK at the end of the input, or when interrupted. */
static lm_status send_all(struct submit *s, struct lm_err *err)
{
    while (!cli_interrupted()) {
        lm_status st = cli_lines_next(&s->lines, err);
        if (st == LM_NOT_FOUND)
            return LM_OK;
        if (st != LM_OK && st != LM_TOO_LARGE)
            return st;
        s->read++;
        if (st == LM_OK)
            send_line(s);
        else
            refuse(s, err);
        rd_kafka_poll(s->kafka.rk, 0);
        if (s->again_bytes > AGAIN_BYTES)
            send_again(s);
        progress_set(s->bar, s->delivered + s->refused + s->undelivered);
    }
    return LM_OK;
}

static lm_status open_all(struct submit *s, struct lm_err *err)
{
    int partitions;
    const char *topic = s->config.topics_prompts;
    if (*topic == '^' || strchr(topic, ',') || !*topic)
        return lm_err_set(err, LM_INVALID, "topics.prompts=%s does not name one topic; add --set "
                          "topics.prompts=NAME", topic);
    lm_status st = cli_lines_open(&s->lines, s->input, err);
    if (st != LM_OK)
        return st;
    s->kafka.delivered = on_delivered;
    s->kafka.user = s;
    s->again_tail = &s->again;
    st = cli_kafka_open(&s->kafka, &s->config, RD_KAFKA_PRODUCER, err);
    if (st == LM_OK)
        st = cli_kafka_partitions(&s->kafka, topic, BROKER_TIMEOUT_MS, &partitions, err);
    if (st != LM_OK)
        return st;
    s->topic = rd_kafka_topic_new(s->kafka.rk, topic, NULL);
    if (!s->topic)
        return lm_err_set(err, LM_NOMEM, "topic '%s': no memory", topic);
    struct progress_config pc = { .label = "submit", .unit = "prompts",
                                  .total = cli_lines_count(s->input),
                                  .style = s->quiet ? PROGRESS_SILENT : PROGRESS_AUTO };
    s->bar = progress_new(&pc);
    return LM_OK;
}

static void close_all(struct submit *s)
{
    progress_free(s->bar);
    if (s->topic)
        rd_kafka_topic_destroy(s->topic);
    cli_kafka_close(&s->kafka);
    cli_lines_close(&s->lines);
    config_release(&s->config);
}

static lm_status write_summary(const struct submit *s, struct lm_err *err)
{
    json_t *o = json_pack("{s:I, s:I, s:I, s:I}", "lines", (json_int_t)s->read,
                          "delivered", (json_int_t)s->delivered,
                          "refused", (json_int_t)s->refused,
                          "undelivered", (json_int_t)s->undelivered);
    int failed = o ? json_dump_file(o, s->summary, JSON_INDENT(2)) : -1;
    json_decref(o);
    return failed ? lm_err_set(err, LM_IO, "%s: can't write the summary", s->summary) : LM_OK;
}

static int run(struct submit *s)
{
    char a[32], b[32], c[32], d[32];
    struct lm_err err;
    lm_status st = open_all(s, &err);
    if (st != LM_OK) {
        fprintf(stderr, "loramill submit: %s\n", err.msg);
        return CLI_FAILED;
    }
    st = send_all(s, &err);
    if (st != LM_OK)
        progress_say(s->bar, "loramill submit: %s: %s", s->input, err.msg);
    send_again(s);
    progress_finish(s->bar);
    fprintf(stderr, "submit: %s lines: %s delivered, %s refused, %s not delivered%s\n",
            progress_count(a, s->read), progress_count(b, s->delivered),
            progress_count(c, s->refused), progress_count(d, s->undelivered),
            cli_interrupted() ? "; interrupted, later lines were not read" : "");
    bool complete = st == LM_OK && !cli_interrupted() && s->delivered == s->read;
    if (s->summary && write_summary(s, &err) != LM_OK) {
        fprintf(stderr, "loramill submit: %s\n", err.msg);
        complete = false;
    }
    return complete ? CLI_OK : CLI_FAILED;
}

static lm_status parse(struct submit *s, int argc, char **argv, struct lm_err *err)
{
    enum { SET = 256, NO_CHECK, SUMMARY };
    static const struct option options[] = {
        { "config", required_argument, NULL, 'c' }, { "set", required_argument, NULL, SET },
        { "input", required_argument, NULL, 'i' },  { "key", required_argument, NULL, 'k' },
        { "no-check", no_argument, NULL, NO_CHECK }, { "quiet", no_argument, NULL, 'q' },
        { "summary", required_argument, NULL, SUMMARY },
        { "help", no_argument, NULL, 'h' },         { NULL, 0, NULL, 0 },
    };
    int opt;
    optind = 0;
    while ((opt = getopt_long(argc, argv, "c:i:k:qh", options, NULL)) != -1) {
        switch (opt) {
        case 'c':
            if (cli_settings_file(&s->settings, optarg, err) != LM_OK)
                return err->code;
            break;
        case 'i': s->input = optarg; break;
        case 'k': s->key = optarg; break;
        case 'q': s->quiet = true; break;
        case NO_CHECK: s->check = false; break;
        case SUMMARY: s->summary = optarg; break;
        case SET:
            if (cli_settings_add(&s->settings, optarg, err) != LM_OK)
                return err->code;
            break;
        case 'h': fputs(help, stdout); return LM_CANCELLED;
        default: return lm_err_set(err, LM_INVALID, "try `loramill submit --help`");
        }
    }
    if (optind < argc)
        return lm_err_set(err, LM_INVALID, "unexpected argument '%s'; the file goes behind --input",
                          argv[optind]);
    if (!s->input)
        return lm_err_set(err, LM_INVALID, "--input FILE is missing (- reads standard input)");
    return cli_settings_load(&s->settings, &s->config, err);
}

int cmd_submit(int argc, char **argv)
{
    struct lm_err err;
    struct submit s = { .key = "id", .check = true };
    lm_status st = parse(&s, argc, argv, &err);
    int status = CLI_OK;
    if (st == LM_OK) {
        cli_catch_signals();
        status = run(&s);
    } else if (st != LM_CANCELLED) {
        fprintf(stderr, "loramill submit: %s\n", err.msg);
        status = CLI_USAGE;
    }
    close_all(&s);
    return status;
}
