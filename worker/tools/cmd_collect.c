/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_collect.c - `loramill collect`: the reply and dead-letter topics of a job into a JSONL file.
 *
 * All partitions of both topics are read from their beginning (or from --since) by a consumer that
 * joins no group and commits nothing: any number of collectors may read the same job, and a
 * collector that was killed is simply started again. Each prompt's first outcome becomes one
 * output line, in order of arrival: a reply as it stands, or for a dead letter
 *
 *   {"id", "error": {"code", "message"}, "dead_letter": {"topic", "partition", "offset",
 *    "attempt"}, "key", "prompt" (as sent; "value" when it is not JSON)}
 *
 * It ends when the job is complete (--job, --expect), at the topics' end when neither is given, at
 * --timeout, or when interrupted; what has come by then is in the file. What an earlier run left
 * there stays until Kafka is there to be read.
 *
 * What a record says is anyone's text: it reaches the terminal through cli_copy_text(), and where
 * the output is one through cli_print_json_text(); a file or a pipe gets the lines as they are.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "worker/tools/cli.h"
#include "worker/tools/cmd_collect_outcomes.h"
#include "worker/tools/cmd_collect_record.h"
#include "worker/tools/commands.h"
#include "worker/tools/progress.h"

#define REPORT_MAX 20           /* dead letters, and missing ids, that are named */
#define ID_SHOWN 320            /* bytes of an id, or of a place instead */
#define BROKER_TIMEOUT_MS 15000
#define OFFSETS_TIMEOUT_MS 15000
#define REGISTRY_TRIES 10
#define REGISTRY_PAUSE_MS 1000

struct collect {
    struct cli_settings settings;
    const char *output, *job_file, *summary;
    int64_t expect, timeout_s;  /* 0: not given */
    int64_t since_ms;           /* epoch; -1: from the beginning */
    bool quiet, brief;          /* brief: dead letters are counted, not named */
    bool terminal;              /* the output is one */

    struct config config;
    struct cli_kafka kafka;
    rd_kafka_topic_partition_list_t *parts;     /* with .opaque set once its end was seen */
    int ends_seen;
    codec *codec;
    outcomes *job;
    FILE *out;
    progress *bar;
    struct collected_sum *tally;
    uint64_t unreadable, named, complaints;
    int64_t started_us;
    bool denied;                /* nothing more can come */
};

static const char help[] =
    "usage: loramill collect -c FILE --output FILE.jsonl|- [OPTION]...\n"
    "\n"
    "Gathers replies and dead letters, one JSON line each in order of arrival, without repeats.\n"
    "\n"
    "  -c, --config FILE     properties of the deployment (kafka.bootstrap.servers,\n"
    "                        topics.replies, topics.dead_letters)\n"
    "      --set KEY=VALUE   overrides a property; may be repeated\n"
    "  -o, --output FILE     where the lines go; - is standard output\n"
    "  -j, --job FILE.jsonl  waits for every prompt of this file, ignores all others\n"
    "  -n, --expect N        waits for N outcomes\n"
    "                        (with neither: takes what is there now)\n"
    "  -t, --timeout S       gives up after S seconds\n"
    "  -s, --since TIME      skips older records: 90s, 10m, 2h, 1d ago, or epoch milliseconds\n"
    "      --summary FILE    counts as one JSON object\n"
    "  -b, --brief           counts dead letters without naming them\n"
    "  -q, --quiet           no progress, only problems and the last line\n"
    "\n"
    "Exit status: 0 every prompt was answered, 1 some were dead-lettered, missing or unreadable,\n"
    "or the collection could not finish, 2 usage.\n";

/* ---- records ---------------------------------------------------------------------------- */

static void write_line(struct collect *c, char *line)
{
    if (line && c->terminal)
        cli_print_json_text(line);
    else if (line)
        fputs(line, c->out);
    if (line)
        fputc('\n', c->out);
    free(line);
}

static void unreadable(struct collect *c, const rd_kafka_message_t *m, const struct lm_err *err)
{
    char why[sizeof err->msg];
    cli_copy_text(why, sizeof why, err->msg);
    if (++c->unreadable <= REPORT_MAX)
        progress_say(c->bar, "unreadable reply at %s[%d] offset %lld: %s",
                     rd_kafka_topic_name(m->rkt), m->partition, (long long)m->offset, why);
}

/* The schema registry is away: the reply is not at fault. */
static bool may_heal(lm_status st)
{
    return lm_status_disposition(st) == LM_DO_RETRY;
}

static void take_reply(struct collect *c, const rd_kafka_message_t *m)
{
    struct lm_err err;
    struct collected_reply r;
    lm_status st = collected_reply_read(c->codec, m, &r, &err);
    for (int i = 0; may_heal(st) && i < REGISTRY_TRIES && !cli_interrupted(); i++) {
        poll(NULL, 0, REGISTRY_PAUSE_MS);
        st = collected_reply_read(c->codec, m, &r, &err);
    }
    if (st != LM_OK) {
        unreadable(c, m, &err);
        return;
    }
    enum outcome_news news = r.outcome ? outcomes_reply(c->job, r.id, r.id_len) : NEWS_FOREIGN;
    if (news == NEWS_NEW || news == NEWS_HEALED) {
        collected_sum_reply(c->tally, &r, m);
        write_line(c, collected_reply_line(&r, m));
    }
    collected_reply_release(&r);
}

static void name_dead_letter(struct collect *c, const struct collected_letter *d)
{
    if (c->brief || ++c->named > REPORT_MAX + 1)
        return;
    char name[ID_SHOWN], code[sizeof d->code], message[sizeof d->message];
    cli_copy_text(name, sizeof name, d->id ? d->id : d->source);
    cli_copy_text(code, sizeof code, d->code);
    cli_copy_text(message, sizeof message, d->message);
    if (c->named <= REPORT_MAX)
        progress_say(c->bar, "dead letter: %s: %s: %s", name, code, message);
    else
        progress_say(c->bar, "dead letter: further ones are in the output");
}

static void take_dead_letter(struct collect *c, const rd_kafka_message_t *m)
{
    struct collected_letter d;
    collected_letter_read(m, &d);
    if (outcomes_dead_letter(c->job, m->payload, m->len, d.source) == NEWS_NEW) {
        collected_sum_dead_letter(c->tally, &d, m);
        name_dead_letter(c, &d);
        write_line(c, collected_letter_line(&d, m));
    }
    collected_letter_release(&d);
}

static void saw_end(struct collect *c, const rd_kafka_message_t *m)
{
    rd_kafka_topic_partition_t *p =
        rd_kafka_topic_partition_list_find(c->parts, rd_kafka_topic_name(m->rkt), m->partition);
    if (p && !p->opaque) {
        p->opaque = c;
        c->ends_seen++;
    }
}

/* The client says each once, and goes on trying. A right that is missing is no time to wait. */
static void complain(struct collect *c, const rd_kafka_message_t *m)
{
    c->denied |= m->err == RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
    if (++c->complaints <= REPORT_MAX && m->rkt)
        progress_say(c->bar, "collect: %s[%d]: %s", rd_kafka_topic_name(m->rkt), m->partition,
                     rd_kafka_err2str(m->err));
    else if (c->complaints <= REPORT_MAX)
        progress_say(c->bar, "collect: %s", rd_kafka_err2str(m->err));
}

static void take(struct collect *c, const rd_kafka_message_t *m)
{
    if (m->err == RD_KAFKA_RESP_ERR__PARTITION_EOF)
        saw_end(c, m);
    else if (m->err)
        complain(c, m);
    else if (!strcmp(rd_kafka_topic_name(m->rkt), c->config.topics_replies))
        take_reply(c, m);
    else
        take_dead_letter(c, m);
}

/* ---- opening ---------------------------------------------------------------------------- */

static lm_status add_topic(struct collect *c, const char *topic, struct lm_err *err)
{
    int n;
    int32_t *leaders = NULL;
    lm_status st = cli_kafka_leaders(&c->kafka, topic, BROKER_TIMEOUT_MS, &n, &leaders, err);
    for (int i = 0; st == LM_OK && i < n; i++) {
        rd_kafka_topic_partition_list_add(c->parts, topic, i)->offset = RD_KAFKA_OFFSET_BEGINNING;
        if (leaders[i] < 0)
            progress_say(c->bar, "collect: %s[%d]: no broker leads it now; waiting", topic, i);
    }
    free(leaders);
    return st;
}

/* Turns --since into offsets; a partition without later records is read from its end. */
static lm_status seek_since(struct collect *c, struct lm_err *err)
{
    if (c->since_ms < 0)
        return LM_OK;
    for (int i = 0; i < c->parts->cnt; i++)
        c->parts->elems[i].offset = c->since_ms;
    rd_kafka_resp_err_t e = rd_kafka_offsets_for_times(c->kafka.rk, c->parts, OFFSETS_TIMEOUT_MS);
    for (int i = 0; !e && i < c->parts->cnt; i++)
        e = c->parts->elems[i].err;
    if (e)
        return lm_err_set(err, LM_NET, "--since: looking up offsets: %s", rd_kafka_err2str(e));
    return LM_OK;
}

static lm_status open_kafka(struct collect *c, struct lm_err *err)
{
    const char *dead = c->config.topics_dead_letters;
    lm_status st = cli_kafka_open(&c->kafka, &c->config, RD_KAFKA_CONSUMER, err);
    if (st != LM_OK)
        return st;
    c->parts = rd_kafka_topic_partition_list_new(16);
    st = add_topic(c, c->config.topics_replies, err);
    if (st == LM_OK && *dead) {
        st = add_topic(c, dead, err);
        if (st == LM_NOT_FOUND) {
            progress_say(c->bar, "collect: %s; going on without dead letters", err->msg);
            st = LM_OK;
        }
    }
    if (st == LM_OK)
        st = seek_since(c, err);
    if (st != LM_OK)
        return st;
    rd_kafka_resp_err_t e = rd_kafka_assign(c->kafka.rk, c->parts);
    return e ? lm_err_set(err, LM_NET, "assigning partitions: %s", rd_kafka_err2str(e)) : LM_OK;
}

static lm_status read_job(struct collect *c, struct lm_err *err)
{
    struct cli_lines lines;
    lm_status st = cli_lines_open(&lines, c->job_file, err);
    if (st != LM_OK)
        return st;
    while ((st = cli_lines_next(&lines, err)) == LM_OK)
        if (outcomes_await_line(c->job, lines.text, lines.len) != LM_OK) {
            st = lm_err_set(err, LM_NOMEM, "no memory for its ids");
            break;
        }
    uint64_t number = lines.number;
    cli_lines_close(&lines);
    if (st != LM_NOT_FOUND)
        return lm_err_prefix(err, "%s:%llu", c->job_file, (unsigned long long)number);
    return LM_OK;
}

struct named_file { const char *option, *path; int standard; };

static bool look(const struct named_file *f, struct stat *s)
{
    return !(strcmp(f->path, "-") || f->standard < 0 ? stat(f->path, s) : fstat(f->standard, s));
}

static bool is_same_file(const struct named_file *a, const struct named_file *b)
{
    struct stat x, y;
    if (!a->path || !b->path)
        return false;
    if (!look(a, &x) || !look(b, &y))
        return !strcmp(a->path, b->path);
    return S_ISREG(x.st_mode) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

/* What is written would end what is read, or what was written before it, under whatever name. */
static lm_status check_files(const struct collect *c, struct lm_err *err)
{
    const struct named_file f[] = { { "--job", c->job_file, STDIN_FILENO },
                                    { "--output", c->output, STDOUT_FILENO },
                                    { "--summary", c->summary, -1 } };
    for (size_t i = 0; i < LM_COUNT(f); i++)
        for (size_t j = i + 1; j < LM_COUNT(f); j++)
            if (is_same_file(&f[i], &f[j]))
                return lm_err_set(err, LM_INVALID, "%s and %s are the same file, %s", f[i].option,
                                  f[j].option, f[j].path);
    return LM_OK;
}

/* With what it holds: see begin_output(). */
static lm_status open_output(struct collect *c, struct lm_err *err)
{
    bool plain = !strcmp(c->output, "-");
    int fd = plain ? -1 : open(c->output, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    c->out = plain ? stdout : fd >= 0 ? fdopen(fd, "w") : NULL;
    c->terminal = plain && isatty(STDOUT_FILENO);
    if (c->out)
        return check_files(c, err);     /* now it exists, under whatever name */
    lm_err_set(err, LM_IO, "%s: %s", c->output, strerror(errno));
    if (fd >= 0)
        close(fd);
    return LM_IO;
}

static lm_status begin_output(struct collect *c, struct lm_err *err)
{
    struct stat s;
    int fd = fileno(c->out);
    if (c->out == stdout || (!fstat(fd, &s) && (!S_ISREG(s.st_mode) || !ftruncate(fd, 0))))
        return LM_OK;
    return lm_err_set(err, LM_IO, "%s: %s", c->output, strerror(errno));
}

static lm_status open_all(struct collect *c, struct lm_err *err)
{
    struct outcome_counts counts;
    c->started_us = lm_now_us();
    if (!(c->job = outcomes_new()) || !(c->tally = collected_sum_new()))
        return lm_err_set(err, LM_NOMEM, "no memory");
    lm_status st = collected_codec(&c->config, &c->codec, err);
    if (st == LM_OK && c->job_file)
        st = read_job(c, err);
    if (st != LM_OK)
        return st;
    if (c->expect > 0)
        outcomes_await_count(c->job, (uint64_t)c->expect);
    outcomes_counts(c->job, &counts);
    if (c->job_file && counts.awaited == 0)
        return lm_err_set(err, LM_INVALID, "%s: no lines, nothing to wait for", c->job_file);
    st = open_output(c, err);
    if (st != LM_OK)
        return st;
    struct progress_config pc = { .label = "collect", .unit = "replies", .total = counts.awaited,
                                  .style = c->quiet ? PROGRESS_SILENT : PROGRESS_AUTO };
    c->bar = progress_new(&pc);
    st = open_kafka(c, err);
    return st == LM_OK ? begin_output(c, err) : st;
}

/* Flushes and closes the output: a full disk shows here at the latest. */
static lm_status close_output(struct collect *c, struct lm_err *err)
{
    bool bad = fflush(c->out) != 0 || ferror(c->out);
    int e = errno;
    if (c->out != stdout)
        bad |= fclose(c->out) != 0;
    c->out = NULL;
    return bad ? lm_err_set(err, LM_IO, "%s: %s", c->output, strerror(e)) : LM_OK;
}

static void close_all(struct collect *c)
{
    progress_free(c->bar);
    if (c->out && c->out != stdout)
        fclose(c->out);
    if (c->parts)
        rd_kafka_topic_partition_list_destroy(c->parts);
    cli_kafka_close(&c->kafka);
    collected_sum_free(c->tally);
    outcomes_free(c->job);
    codec_free(c->codec);
    config_release(&c->config);
}

/* ---- running ---------------------------------------------------------------------------- */

static bool finished(const struct collect *c)
{
    if (c->job_file || c->expect > 0)
        return outcomes_complete(c->job);
    return c->ends_seen == c->parts->cnt;
}

static bool timed_out(const struct collect *c)
{
    return c->timeout_s > 0 && lm_now_us() - c->started_us > c->timeout_s * 1000000;
}

static void show(struct collect *c)
{
    struct outcome_counts n;
    outcomes_counts(c->job, &n);
    if (n.dead_letters > 0)
        progress_note(c->bar, "%llu dead-lettered", (unsigned long long)n.dead_letters);
    progress_set(c->bar, n.replies + n.dead_letters);
}

static lm_status gather(struct collect *c, struct lm_err *err)
{
    while (!finished(c) && !timed_out(c) && !c->denied && !cli_interrupted()) {
        rd_kafka_message_t *m = rd_kafka_consumer_poll(c->kafka.rk, 100);
        if (m) {
            take(c, m);
            rd_kafka_message_destroy(m);
        } else {
            fflush(c->out);
        }
        if (ferror(c->out))
            break;
        show(c);
    }
    return close_output(c, err);
}

static void name_missing(void *user, const char *id, size_t len)
{
    struct collect *c = user;
    char cut[ID_SHOWN], shown[ID_SHOWN];
    snprintf(cut, sizeof cut, "%.*s", (int)LM_MIN(len, sizeof cut - 1), id ? id : "");
    cli_copy_text(shown, sizeof shown, cut);
    if (++c->named <= REPORT_MAX && id)
        fprintf(stderr, "missing: %s\n", shown);
    else if (c->named <= REPORT_MAX)
        fprintf(stderr, "missing: a line without an id\n");
    else if (c->named == REPORT_MAX + 1)
        fprintf(stderr, "missing: and more\n");
}

static int conclude(struct collect *c)
{
    char a[32], b[32], d[32];
    struct outcome_counts n;
    outcomes_counts(c->job, &n);
    c->named = 0;
    outcomes_each_missing(c->job, name_missing, c);
    fprintf(stderr, "collect: %s answered, %s dead-lettered, %s missing",
            progress_count(a, n.replies), progress_count(b, n.dead_letters),
            progress_count(d, n.missing));
    if (n.repeated > 0)
        fprintf(stderr, ", %s repeats dropped", progress_count(a, n.repeated));
    if (c->unreadable > 0)
        fprintf(stderr, ", %s unreadable", progress_count(a, c->unreadable));
    if (timed_out(c) && n.missing > 0)
        fprintf(stderr, "; gave up after %lld s", (long long)c->timeout_s);
    fputc('\n', stderr);
    bool good = n.dead_letters == 0 && n.missing == 0 && c->unreadable == 0 && finished(c);
    return good ? CLI_OK : CLI_FAILED;
}

static int run(struct collect *c)
{
    struct lm_err err;
    lm_status st = open_all(c, &err);
    if (st == LM_OK)
        st = gather(c, &err);
    if (st != LM_OK) {
        progress_say(c->bar, "loramill collect: %s", err.msg);
        return CLI_FAILED;
    }
    progress_finish(c->bar);
    int status = conclude(c);
    struct outcome_counts n;
    outcomes_counts(c->job, &n);
    if (c->summary && collected_sum_write(c->tally, &n, c->summary, &err) != LM_OK) {
        fprintf(stderr, "loramill collect: %s\n", err.msg);
        status = CLI_FAILED;
    }
    return status;
}

/* ---- options ---------------------------------------------------------------------------- */

static lm_status check_options(struct collect *c, int argc, char **argv, struct lm_err *err)
{
    if (optind < argc)
        return lm_err_set(err, LM_INVALID, "unexpected argument '%s'", argv[optind]);
    if (!c->output)
        return lm_err_set(err, LM_INVALID, "--output FILE is missing (- is standard output)");
    if (c->job_file && c->expect > 0)
        return lm_err_set(err, LM_INVALID, "--job and --expect exclude each other");
    lm_status st = check_files(c, err);
    return st == LM_OK ? cli_settings_load(&c->settings, &c->config, err) : st;
}

static lm_status parse(struct collect *c, int argc, char **argv, struct lm_err *err)
{
    enum { SET = 256, SUMMARY };
    static const struct option options[] = {
        { "config", required_argument, NULL, 'c' },  { "set", required_argument, NULL, SET },
        { "output", required_argument, NULL, 'o' },  { "job", required_argument, NULL, 'j' },
        { "expect", required_argument, NULL, 'n' },  { "timeout", required_argument, NULL, 't' },
        { "since", required_argument, NULL, 's' },   { "quiet", no_argument, NULL, 'q' },
        { "summary", required_argument, NULL, SUMMARY },
        { "brief", no_argument, NULL, 'b' },
        { "help", no_argument, NULL, 'h' },          { NULL, 0, NULL, 0 },
    };
    int opt;
    lm_status st = LM_OK;
    optind = 0;
    while (st == LM_OK && (opt = getopt_long(argc, argv, "c:o:j:n:t:s:bqh", options, NULL)) != -1) {
        switch (opt) {
        case 'c': st = cli_settings_file(&c->settings, optarg, err); break;
        case 'o': c->output = optarg; break;
        case 'j': c->job_file = optarg; break;
        case 'n': st = cli_parse_number("--expect", optarg, 1, INT64_MAX, &c->expect, err); break;
        case 't': st = cli_parse_number("--timeout", optarg, 1, 1000000000, &c->timeout_s, err);
            break;
        case 's': st = cli_parse_since("--since", optarg, &c->since_ms, err); break;
        case 'b': c->brief = true; break;
        case 'q': c->quiet = true; break;
        case SET: st = cli_settings_add(&c->settings, optarg, err); break;
        case SUMMARY: c->summary = optarg; break;
        case 'h': fputs(help, stdout); return LM_CANCELLED;
        default: return lm_err_set(err, LM_INVALID, "try `loramill collect --help`");
        }
    }
    return st == LM_OK ? check_options(c, argc, argv, err) : st;
}

int cmd_collect(int argc, char **argv)
{
    struct lm_err err;
    struct collect c = { .since_ms = -1 };
    lm_status st = parse(&c, argc, argv, &err);
    int status = CLI_OK;
    if (st == LM_OK) {
        cli_catch_signals();
        status = run(&c);
    } else if (st != LM_CANCELLED) {
        fprintf(stderr, "loramill collect: %s\n", err.msg);
        status = CLI_USAGE;
    }
    close_all(&c);
    return status;
}
