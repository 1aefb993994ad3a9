/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_dlq.c - `loramill dlq list|show|retry`: dead letters, looked at and sent back.
 *
 * A dead letter is named by its place, PARTITION:OFFSET in topics.dead_letters. All three read the
 * topic from end to end (or from --since), without a group, and pick by filters or by places.
 *
 * retry sends a letter back to the topic that it came from (or --to), key and value byte for byte,
 * with the prompt's own headers. Of ours it keeps loramill-attempt and the `original` headers, so
 * that a second failure counts on and still says where the prompt first was; what says why it
 * failed is left out. Without --yes it only says what it would send. The topic itself is never
 * changed: a letter that was sent back stays, and is known by its mark (dlq_marks.h), which goes
 * out with it in one transaction (cmd_dlq_retry.h). What has a mark is passed over, unless --again.
 *
 * Where a letter came from is what its headers say, and those may be the prompt's sender's own. So
 * it goes back by itself only to a topic of topics.prompts; anywhere else needs --to. For the same
 * reason nothing of a letter reaches the terminal but through cli_print_text() and its like.
 */
#include <getopt.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "worker/tools/cli_group.h"
#include "worker/tools/cmd_collect_record.h"
#include "worker/tools/cmd_dlq_retry.h"
#include "worker/tools/commands.h"

enum verb { VERB_LIST, VERB_SHOW, VERB_RETRY };

enum { BROKER_MS = 15000, TARGETS = 16 };

struct place { int64_t partition, offset; };

/* A topic that letters are for; `why` it takes none, or "". */
struct target { char topic[256], why[256]; };

struct dlq {
    enum verb verb;
    struct cli_settings settings;
    struct config config;
    const char *cause, *adapter, *id, *to;
    int64_t since_ms, until_ms, limit;          /* -1: none */
    struct place *places;
    int n_places;
    bool json, yes, again, open;

    struct cli_kafka kafka;
    codec *codec;
    struct dlq_retry *retry;                    /* with --yes */
    dlq_marks *marks;                           /* without a retry; NULL: not known */
    int64_t *next;                              /* of each partition, behind what was seen; or -1 */
    struct target targets[TARGETS];             /* the last ones that were asked about */
    size_t n_targets;                           /* of all */
    uint64_t seen, hits, picked, picked_sent, before, unfit;
    lm_status st;                               /* of the retry, from within the scan */
    struct lm_err err;
};

static const char help[] =
    "usage: loramill dlq list -c FILE [FILTER]... [--json]\n"
    "       loramill dlq show -c FILE PARTITION:OFFSET...\n"
    "       loramill dlq retry -c FILE [FILTER]... [PARTITION:OFFSET]... [--to TOPIC] [--yes]\n"
    "\n"
    "Dead letters: a line each; in full; or sent back to where they came from.\n"
    "\n"
    "  -c, --config FILE     properties of the deployment (topics.dead_letters)\n"
    "      --set KEY=VALUE   overrides a property; may be repeated\n"
    "      --cause CODE      only of this cause: not_found, invalid, poison, ...\n"
    "      --adapter ID      only of prompts for this adapter; '' is the base model\n"
    "      --id ID           only of the prompt with this id\n"
    "      --since TIME      only later ones: 90s, 10m, 2h, 1d ago, or epoch milliseconds\n"
    "      --until TIME      only earlier ones\n"
    "      --limit N         stops after N\n"
    "  -j, --json            list: one JSON object a line\n"
    "      --to TOPIC        retry: to this topic instead of the original ones\n"
    "      --open            only those that were not sent back\n"
    "      --again           retry: also those that were sent back before\n"
    "  -y, --yes             retry: does it; without it, it says what it would do\n"
    "\n"
    "Exit status: 0 done, 1 it could not be done (or not for every letter), 2 usage.\n";

/* ---- picking ---------------------------------------------------------------------------- */

struct letter {
    const rd_kafka_message_t *m;
    struct collected_letter d;
    json_t *prompt;             /* as a tree, whatever the encoding; NULL: can't be read */
    int64_t ms, from;           /* from: there is nothing from here to the letter */
    bool sent_back;
};

/* NULL: not known. A retry's are others after each of its transactions. */
static dlq_marks *marks_of(const struct dlq *q)
{
    return q->retry ? dlq_retry_marked(q->retry) : q->marks;
}

static void letter_read(struct dlq *q, const rd_kafka_message_t *m, struct letter *l)
{
    int n;
    struct header *h = collected_headers(m, &n);
    *l = (struct letter){ .m = m, .ms = rd_kafka_message_timestamp(m, NULL) };
    l->sent_back = marks_of(q) && dlq_marks_has(marks_of(q), m->partition, m->offset);
    collected_letter_read(m, &l->d);
    codec_decode_tree(q->codec, m->payload, m->len, h, n, &l->prompt, NULL);
    free(h);
}

static void letter_release(struct letter *l)
{
    json_decref(l->prompt);
    collected_letter_release(&l->d);
}

static const char *field(const struct letter *l, const char *name)
{
    return json_string_value(json_object_get(l->prompt, name));
}

static bool at_place(const struct dlq *q, const rd_kafka_message_t *m)
{
    for (int i = 0; i < q->n_places; i++)
        if (q->places[i].partition == m->partition && q->places[i].offset == m->offset)
            return true;
    return q->n_places == 0;
}

static bool wanted(const struct dlq *q, const struct letter *l)
{
    const char *adapter = field(l, "adapter"), *id = field(l, "id");
    const char *code = l->d.code;
    if (!strncmp(code, "loramill.", 9))         /* a bare class name, of another family */
        code += 9;
    if ((q->cause && strcmp(q->cause, code)) || (q->open && l->sent_back))
        return false;
    if (q->adapter && (!l->prompt || strcmp(q->adapter, adapter ? adapter : "")))
        return false;
    if (q->id && (!id || strcmp(q->id, id)))
        return false;
    return (q->until_ms < 0 || l->ms < q->until_ms) && l->ms >= q->since_ms;
}

/* ---- list and show ---------------------------------------------------------------------- */

static void print_text(const char *s)
{
    cli_print_text(s ? s : "-", s ? strlen(s) : 1);
}

/* The state of a letter; "-": not known. */
static const char *state_of(const struct dlq *q, const struct letter *l)
{
    return !marks_of(q) ? "-" : l->sent_back ? "sent back" : "open";
}

static void print_line(const struct dlq *q, const struct letter *l)
{
    char when[32] = "-";
    time_t s = (time_t)(l->ms / 1000);
    struct tm tm;
    if (l->ms > 0 && gmtime_r(&s, &tm))
        strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", &tm);
    printf("%d:%" PRId64 "\t%s\t", (int)l->m->partition, l->m->offset, when);
    print_text(l->d.code);
    printf("\t%" PRId64 "\t", l->d.attempt < 0 ? 1 : l->d.attempt);
    print_text(field(l, "adapter"));
    putchar('\t');
    print_text(field(l, "id"));
    putchar('\t');
    print_text(l->d.message);
    printf("\t%s\n", state_of(q, l));
}

static void print_json(const struct dlq *q, const struct letter *l)
{
    json_t *o = collected_letter_json(&l->d, l->m);
    const char *adapter = field(l, "adapter");
    json_object_set_new(o, "at", json_pack("{s:i, s:I}", "partition", (int)l->m->partition,
                                           "offset", (json_int_t)l->m->offset));
    json_object_set_new(o, "time_ms", json_integer(l->ms));
    json_object_set_new(o, "adapter", adapter ? json_string(adapter) : json_null());
    json_object_set_new(o, "sent_back", marks_of(q) ? json_boolean(l->sent_back) : json_null());
    cli_print_json(o, JSON_COMPACT);
    json_decref(o);
}

/* Lines after the first are indented, so that none looks like another field. */
static void print_lines(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        putchar(s[i]);
        if (s[i] == '\n')
            fputs("         ", stdout);
    }
}

/* Text as it is, anything else as hex: headers and values are anyone's bytes. */
static void print_bytes(const void *at, size_t n)
{
    if (!at) {
        fputs("(none)", stdout);
    } else if (cli_is_text(at, n)) {
        print_lines(at, n);
    } else {
        fputs("0x", stdout);
        for (size_t i = 0; i < n; i++)
            printf("%02x", ((const unsigned char *)at)[i]);
    }
    putchar('\n');
}

static void show(const struct dlq *q, const struct letter *l)
{
    rd_kafka_headers_t *h;
    const char *name;
    const void *value;
    size_t n;
    const char *const lines[][2] = { { "cause    ", l->d.code }, { "reason   ", l->d.message },
                                     { "prompt   ", l->d.source } };
    printf("place    %d:%" PRId64 "\nstate    %s\n", (int)l->m->partition, l->m->offset,
           state_of(q, l));
    for (size_t i = 0; i < LM_COUNT(lines); i++) {
        fputs(lines[i][0], stdout);
        print_text(lines[i][1]);
        putchar('\n');
    }
    fputs("key      ", stdout);
    print_bytes(l->m->key, l->m->key_len);
    if (!rd_kafka_message_headers(l->m, &h))
        for (size_t i = 0; !rd_kafka_header_get_all(h, i, &name, &value, &n); i++) {
            fputs("header   ", stdout);
            print_text(name);
            fputs(": ", stdout);
            print_bytes(value, n);
        }
    fputs("value    ", stdout);
    print_bytes(l->m->payload, l->m->len);
    if (l->prompt && !cli_is_text(l->m->payload, l->m->len)) {
        fputs("decoded  ", stdout);
        cli_print_json(l->prompt, JSON_INDENT(1));
    }
    putchar('\n');
}

/* ---- retry ------------------------------------------------------------------------------ */

/* Asked of the producer: the consumer is in the middle of its topic. Without this a broker that
 * makes topics as they are named would make one. Once for all letters: a topic that is not there
 * costs seconds. */
static const struct target *target_of(struct dlq *q, const char *topic)
{
    struct lm_err err;
    int n;
    for (size_t i = 0; i < LM_MIN(q->n_targets, (size_t)TARGETS); i++)
        if (!strcmp(q->targets[i].topic, topic))
            return &q->targets[i];
    struct target *t = &q->targets[q->n_targets++ % TARGETS];
    *t = (struct target){ .why = "" };
    snprintf(t->topic, sizeof t->topic, "%s", topic);
    if (cli_kafka_partitions(dlq_retry_kafka(q->retry), topic, BROKER_MS, &n, &err))
        snprintf(t->why, sizeof t->why, "%.255s", err.msg);
    return t;
}

/* Why a letter can't be sent to `topic`; NULL: it can. */
static const char *obstacle(struct dlq *q, const struct letter *l, const char *topic)
{
    rd_kafka_headers_t *h;
    const void *value;
    size_t n;
    if (!*topic)
        return "its headers don't say where it came from; use --to";
    if (!q->to && !config_reads_topic(&q->config, topic))
        return "it says that it came from a topic that is not in topics.prompts; use --to";
    if (!l->m->payload && !rd_kafka_message_headers(l->m, &h) &&
        !rd_kafka_header_get_last(h, "loramill-omitted", &value, &n))
        return "its value was too large to keep; the prompt is where `show` says";
    const struct target *t = q->yes ? target_of(q, topic) : NULL;
    return t && *t->why ? t->why : NULL;
}

static lm_status retry(struct dlq *q, const struct letter *l, struct lm_err *err)
{
    const char *topic = q->to ? q->to : l->d.topic, *why = obstacle(q, l, topic);
    const char *id = field(l, "id");
    id = id ? id : "-";
    if (why) {
        fprintf(stderr, "loramill dlq: %d:%" PRId64 " can't be sent back: %s\n",
                (int)l->m->partition, l->m->offset, why);
        q->unfit++;
        return LM_OK;
    }
    if (q->yes)
        return dlq_retry_add(q->retry, l->m, l->from, topic, l->d.code, id, err);
    dlq_retry_print(l->m->partition, l->m->offset, topic, l->d.code, id);
    return LM_OK;
}

/* ---- the whole -------------------------------------------------------------------------- */

/* The offsets from here to this letter hold nothing else. */
static int64_t follow(struct dlq *q, const rd_kafka_message_t *m)
{
    dlq_marks *marks = marks_of(q);
    if (!marks || m->partition >= dlq_marks_partitions(marks))
        return m->offset;
    int64_t from = q->next[m->partition];
    if (from < 0 && q->since_ms < 0)
        dlq_marks_begin(marks, m->partition, m->offset);
    q->next[m->partition] = m->offset + 1;
    return from < 0 ? m->offset : from;
}

static bool is_over(const struct dlq *q)
{
    return (q->limit >= 0 && q->picked >= (uint64_t)q->limit) || ferror(stdout) || q->st ||
           (q->n_places && q->hits >= (uint64_t)q->n_places);
}

static void take_letter(struct dlq *q, const struct letter *l)
{
    if (q->verb == VERB_RETRY && l->sent_back && !q->again) {
        q->before++;
        return;
    }
    q->picked++;
    q->picked_sent += l->sent_back;
    if (q->verb == VERB_RETRY)
        q->st = retry(q, l, &q->err);
    else if (q->verb == VERB_SHOW)
        show(q, l);
    else if (q->json)
        print_json(q, l);
    else
        print_line(q, l);
}

static bool take(void *user, const rd_kafka_message_t *m)
{
    struct dlq *q = user;
    struct letter l;
    int64_t from = follow(q, m);
    q->seen++;
    if (!at_place(q, m))
        return true;
    q->hits++;
    letter_read(q, m, &l);
    l.from = from;
    if (wanted(q, &l))
        take_letter(q, &l);
    letter_release(&l);
    return !is_over(q);
}

/* For those who only look it is a warning that marks can't be had: some brokers tell nothing about
 * groups, and some people may not ask. */
static lm_status open_marks(struct dlq *q, struct lm_err *err)
{
    if (q->verb == VERB_RETRY && q->yes)
        return dlq_retry_new(&q->config, &q->kafka, q->again, &q->retry, err);
    lm_status st = dlq_retry_marks(&q->kafka, &q->config, &q->marks, err);
    if (!st || st == LM_CANCELLED || st == LM_NOT_FOUND)
        return st;
    fprintf(stderr, "loramill dlq: which letters were sent back is not known: %s\n", err->msg);
    return LM_OK;
}

static lm_status open_all(struct dlq *q, struct lm_err *err)
{
    int n;
    lm_status st = collected_codec(&q->config, &q->codec, err);
    if (st == LM_OK)
        st = cli_kafka_open(&q->kafka, &q->config, RD_KAFKA_CONSUMER, err);
    if (st == LM_OK && q->to)
        st = cli_kafka_partitions(&q->kafka, q->to, BROKER_MS, &n, err);
    if (st == LM_OK)
        st = open_marks(q, err);
    n = st == LM_OK && marks_of(q) ? dlq_marks_partitions(marks_of(q)) : 0;
    if (n && !(q->next = lm_calloc((size_t)n, sizeof *q->next)))
        st = lm_err_set(err, LM_NOMEM, "no memory");
    for (int i = 0; st == LM_OK && i < n; i++)
        q->next[i] = -1;
    return st;
}

/* What has been done, also when it ended early. */
static void sum_up(const struct dlq *q, const struct dlq_retry_counts *n)
{
    if (q->verb == VERB_LIST)
        fprintf(stderr, "dlq: %" PRIu64 " of %" PRIu64 " dead letters, %" PRIu64 " of them "
                "sent back\n", q->picked, q->seen, q->picked_sent);
    if (q->verb == VERB_RETRY && q->before)
        fprintf(stderr, "dlq: %" PRIu64 " were sent back before; --again sends them once more\n",
                q->before);
    if (q->verb == VERB_RETRY && q->yes)
        fprintf(stderr, "dlq: %" PRIu64 " sent back, %" PRIu64 " not\n", n->sent,
                n->failed + q->unfit);
    else if (q->verb == VERB_RETRY)
        fprintf(stderr, "dlq: nothing was sent; --yes sends %" PRIu64 "\n", q->picked - q->unfit);
    if (n->unknown)
        fprintf(stderr, "loramill dlq: of %" PRIu64 " more it is not known; `dlq list` will tell\n",
                n->unknown);
}

static int conclude(const struct dlq *q, const struct dlq_retry_counts *n)
{
    bool missing = q->n_places && q->limit < 0 && q->hits < (uint64_t)q->n_places;
    if (missing)
        fprintf(stderr, "loramill dlq: %" PRIu64 " of %d are there\n", q->hits, q->n_places);
    return missing || n->failed + q->unfit || n->unknown ? CLI_FAILED : CLI_OK;
}

static int run(struct dlq *q)
{
    struct lm_err err;
    struct dlq_retry_counts counts = { 0 };
    lm_status st = open_all(q, &err);
    if (st == LM_OK)
        st = cli_scan(&q->kafka, q->config.topics_dead_letters, q->since_ms, take, q, &err);
    if (q->st) {
        st = q->st;
        err = q->err;
    }
    if (st == LM_OK && q->retry && !cli_interrupted())
        st = dlq_retry_finish(q->retry, &err);
    if (st == LM_OK && (fflush(stdout) || cli_interrupted()))
        st = lm_err_set(&err, LM_IO, cli_interrupted() ? "interrupted" : "standard output");
    if (q->retry)
        counts = dlq_retry_counts(q->retry);
    sum_up(q, &counts);
    if (st == LM_OK)
        return conclude(q, &counts);
    fprintf(stderr, "loramill dlq: %s\n", err.msg);
    return CLI_FAILED;
}

static lm_status parse_place(struct dlq *q, const char *text, struct lm_err *err)
{
    char *end;
    struct place p = { .partition = strtoll(text, &end, 10) };
    bool good = end != text && *end == ':' && end[1] >= '0' && end[1] <= '9';
    if (good)
        p.offset = strtoll(end + 1, &end, 10);
    if (!good || *end || p.partition < 0)
        return lm_err_set(err, LM_INVALID, "'%s' is no place: PARTITION:OFFSET, as list shows it",
                          text);
    for (int i = 0; i < q->n_places; i++)
        if (q->places[i].partition == p.partition && q->places[i].offset == p.offset)
            return LM_OK;
    struct place *grown = lm_reallocarray(q->places, (size_t)q->n_places + 1, sizeof *grown);
    if (!grown)
        return lm_err_set(err, LM_NOMEM, "no memory");
    q->places = grown;
    q->places[q->n_places++] = p;
    return LM_OK;
}

static lm_status parse_verb(struct dlq *q, const char *text, struct lm_err *err)
{
    static const char *const verbs[] = { "list", "show", "retry" };
    for (size_t i = 0; text && i < LM_COUNT(verbs); i++)
        if (!strcmp(text, verbs[i])) {
            q->verb = (enum verb)i;
            return LM_OK;
        }
    if (text && (!strcmp(text, "--help") || !strcmp(text, "-h"))) {
        fputs(help, stdout);
        return LM_CANCELLED;
    }
    return lm_err_set(err, LM_INVALID, "say what: loramill dlq list, show or retry");
}

static lm_status check(const struct dlq *q, struct lm_err *err)
{
    if (q->verb == VERB_SHOW && !q->n_places)
        return lm_err_set(err, LM_INVALID, "show needs a place, PARTITION:OFFSET, as list has it");
    if (q->verb == VERB_LIST && q->n_places)
        return lm_err_set(err, LM_INVALID, "list takes filters; show takes places");
    if (q->verb != VERB_RETRY && (q->yes || q->to))
        return lm_err_set(err, LM_INVALID, "--yes and --to are retry's");
    if (q->verb != VERB_RETRY && q->again)
        return lm_err_set(err, LM_INVALID, "--again is retry's");
    if (q->verb != VERB_LIST && q->json)
        return lm_err_set(err, LM_INVALID, "--json is list's");
    return LM_OK;
}

static lm_status parse(struct dlq *q, int argc, char **argv, struct lm_err *err)
{
    enum { SET = 256, CAUSE, ADAPTER, ID, SINCE, UNTIL, LIMIT, TO, AGAIN, OPEN };
    static const struct option options[] = {
        { "config", required_argument, NULL, 'c' }, { "set", required_argument, NULL, SET },
        { "cause", required_argument, NULL, CAUSE },
        { "adapter", required_argument, NULL, ADAPTER },
        { "id", required_argument, NULL, ID },      { "since", required_argument, NULL, SINCE },
        { "until", required_argument, NULL, UNTIL }, { "limit", required_argument, NULL, LIMIT },
        { "json", no_argument, NULL, 'j' },         { "to", required_argument, NULL, TO },
        { "again", no_argument, NULL, AGAIN },      { "open", no_argument, NULL, OPEN },
        { "yes", no_argument, NULL, 'y' },          { "help", no_argument, NULL, 'h' },
        { NULL, 0, NULL, 0 },
    };
    int opt;
    lm_status st = parse_verb(q, argc > 1 ? argv[1] : NULL, err);
    optind = 0;
    while (st == LM_OK && (opt = getopt_long(argc - 1, argv + 1, "c:jyh", options, NULL)) != -1) {
        switch (opt) {
        case 'c': st = cli_settings_file(&q->settings, optarg, err); break;
        case SET: st = cli_settings_add(&q->settings, optarg, err); break;
        case CAUSE: q->cause = optarg; break;
        case ADAPTER: q->adapter = optarg; break;
        case ID: q->id = optarg; break;
        case SINCE: st = cli_parse_since("--since", optarg, &q->since_ms, err); break;
        case UNTIL: st = cli_parse_since("--until", optarg, &q->until_ms, err); break;
        case LIMIT: st = cli_parse_number("--limit", optarg, 1, INT64_MAX, &q->limit, err); break;
        case 'j': q->json = true; break;
        case TO: q->to = optarg; break;
        case AGAIN: q->again = true; break;
        case OPEN: q->open = true; break;
        case 'y': q->yes = true; break;
        case 'h': fputs(help, stdout); return LM_CANCELLED;
        default: return lm_err_set(err, LM_INVALID, "try `loramill dlq --help`");
        }
    }
    for (int i = optind; st == LM_OK && i < argc - 1; i++)
        st = parse_place(q, argv[1 + i], err);
    if (st == LM_OK)
        st = check(q, err);
    return st == LM_OK ? cli_settings_load(&q->settings, &q->config, err) : st;
}

int cmd_dlq(int argc, char **argv)
{
    struct lm_err err;
    struct dlq q = { .since_ms = -1, .until_ms = -1, .limit = -1 };
    int status = CLI_OK;
    lm_status st = parse(&q, argc, argv, &err);
    if (st == LM_OK) {
        cli_catch_signals();
        status = run(&q);
    } else if (st != LM_CANCELLED) {
        fprintf(stderr, "loramill dlq: %s\n", err.msg);
        status = CLI_USAGE;
    }
    dlq_retry_free(q.retry);
    cli_kafka_close(&q.kafka);
    dlq_marks_free(q.marks);
    free(q.next);
    codec_free(q.codec);
    free(q.places);
    config_release(&q.config);
    return status;
}
