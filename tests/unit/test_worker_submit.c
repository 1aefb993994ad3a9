/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_submit.c - `loramill submit` and `loramill collect` against the embedded broker.
 *
 * The commands are called as main() calls them; what they write to standard error is caught in a
 * file. Each test has topics of its own on one broker.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <endian.h>
#include <fcntl.h>
#include <jansson.h>
#include <librdkafka/rdkafka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "folder.h"
#include "hostile_http.h"
#include "worker/tools/cmd_collect_outcomes.h"
#include "worker/tools/commands.h"
#include "worker/tools/dev_broker.h"

#define WAIT_MS 15000

static dev_broker *broker;
static char dir[] = "/tmp/loramill-submit-XXXXXX";
static int n_tests;

/* ---- a test's surroundings -------------------------------------------------------------- */

struct fix {
    char prompts[32], replies[32], dead[32];
    char config[96], in[96], out[96], summary[96], said[96];
    rd_kafka_t *producer;
};

static char *read_file(const char *path)
{
    FILE *f = fopen(path, "r");
    char *text = NULL;
    size_t size = 0;
    if (!f)
        return strdup("");
    if (getdelim(&text, &size, '\0', f) < 0 && text)
        text[0] = '\0';
    fclose(f);
    return text ? text : strdup("");
}

static int setup(void **state)
{
    struct fix *f = calloc(1, sizeof *f);
    char text[512];
    int n = n_tests++;
    snprintf(f->prompts, sizeof f->prompts, "prompts-%d", n);
    snprintf(f->replies, sizeof f->replies, "replies-%d", n);
    snprintf(f->dead, sizeof f->dead, "dead-%d", n);
    snprintf(f->config, sizeof f->config, "%s/%d.properties", dir, n);
    snprintf(f->in, sizeof f->in, "%s/%d.in.jsonl", dir, n);
    snprintf(f->out, sizeof f->out, "%s/%d.out.jsonl", dir, n);
    snprintf(f->summary, sizeof f->summary, "%s/%d.summary", dir, n);
    snprintf(f->said, sizeof f->said, "%s/%d.said", dir, n);
    if (dev_broker_topic(broker, f->prompts, 4, NULL) ||
        dev_broker_topic(broker, f->dead, 2, NULL) ||
        dev_broker_topic(broker, f->replies, 4, NULL))
        return -1;
    snprintf(text, sizeof text, "kafka.bootstrap.servers=%s\ntopics.prompts=%s\n"
             "topics.replies=%s\ntopics.dead_letters=%s\n", dev_broker_address(broker), f->prompts,
             f->replies, f->dead);
    write_file(f->config, text);
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    rd_kafka_conf_set(conf, "bootstrap.servers", dev_broker_address(broker), NULL, 0);
    rd_kafka_conf_set(conf, "linger.ms", "0", NULL, 0);
    rd_kafka_conf_set(conf, "message.max.bytes", "100000000", NULL, 0);
    f->producer = rd_kafka_new(RD_KAFKA_PRODUCER, conf, NULL, 0);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fix *f = *state;
    rd_kafka_destroy(f->producer);
    free(f);
    return 0;
}

/* Runs a command with standard error in f->said. */
static int run(struct fix *f, int (*command)(int, char **), ...)
{
    char *argv[32] = { (char *)(uintptr_t)(command == cmd_submit ? "submit" : "collect") };
    int argc = 1;
    va_list ap;
    va_start(ap, command);
    while ((argv[argc] = va_arg(ap, char *)))
        argc++;
    va_end(ap);
    fflush(stderr);
    int kept = dup(2);
    int to = open(f->said, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    dup2(to, 2);
    int status = command(argc, argv);
    fflush(stderr);
    dup2(kept, 2);
    close(kept);
    close(to);
    return status;
}

static void expect_said(struct fix *f, const char *part)
{
    char *said = read_file(f->said);
    if (!strstr(said, part))
        fail_msg("\"%s\" is not in:\n%s", part, said);
    free(said);
}

static void expect_status(struct fix *f, int got, int wanted)
{
    if (got != wanted) {
        char *said = read_file(f->said);
        fail_msg("status %d, expected %d:\n%s", got, wanted, said);
    }
}

/* ---- what is on a topic ----------------------------------------------------------------- */

struct record { char *key, *value; char content_type[64]; };

/* Reads n records of a topic, in no order across partitions. */
static void read_topic(const char *topic, int partitions, struct record *out, int n)
{
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    rd_kafka_conf_set(conf, "bootstrap.servers", dev_broker_address(broker), NULL, 0);
    rd_kafka_conf_set(conf, "group.id", "test", NULL, 0);
    rd_kafka_t *rk = rd_kafka_new(RD_KAFKA_CONSUMER, conf, NULL, 0);
    rd_kafka_poll_set_consumer(rk);
    rd_kafka_topic_partition_list_t *parts = rd_kafka_topic_partition_list_new(4);
    for (int i = 0; i < partitions; i++)
        rd_kafka_topic_partition_list_add(parts, topic, i)->offset = RD_KAFKA_OFFSET_BEGINNING;
    assert_int_equal(rd_kafka_assign(rk, parts), 0);
    int64_t until = lm_now_us() + WAIT_MS * 1000;
    int got = 0;
    while (got < n && lm_now_us() < until) {
        rd_kafka_message_t *m = rd_kafka_consumer_poll(rk, 100);
        if (m && !m->err) {
            const void *v;
            size_t len;
            rd_kafka_headers_t *h;
            out[got].key = m->key ? strndup(m->key, m->key_len) : NULL;
            out[got].value = strndup(m->payload, m->len);
            if (!rd_kafka_message_headers(m, &h) &&
                !rd_kafka_header_get_last(h, "content-type", &v, &len))
                snprintf(out[got].content_type, sizeof out[got].content_type, "%.*s", (int)len,
                         (const char *)v);
            got++;
        }
        if (m)
            rd_kafka_message_destroy(m);
    }
    rd_kafka_topic_partition_list_destroy(parts);
    rd_kafka_consumer_close(rk);
    rd_kafka_destroy(rk);
    assert_int_equal(got, n);
}

static const struct record *find_value(const struct record *r, int n, const char *part)
{
    for (int i = 0; i < n; i++)
        if (strstr(r[i].value, part))
            return &r[i];
    fail_msg("no record holds %s", part);
    return NULL;
}

static void free_records(struct record *r, int n)
{
    for (int i = 0; i < n; i++) {
        free(r[i].key);
        free(r[i].value);
    }
}

static void produce(struct fix *f, const char *topic, const char *key, const char *value,
                    rd_kafka_headers_t *headers)
{
    rd_kafka_resp_err_t e =
        rd_kafka_producev(f->producer, RD_KAFKA_V_TOPIC(topic),
                          RD_KAFKA_V_MSGFLAGS(RD_KAFKA_MSG_F_COPY),
                          RD_KAFKA_V_KEY(key, key ? strlen(key) : 0),
                          RD_KAFKA_V_VALUE((void *)(uintptr_t)value, strlen(value)),
                          RD_KAFKA_V_HEADERS(headers), RD_KAFKA_V_END);
    assert_int_equal(e, 0);
    assert_int_equal(rd_kafka_flush(f->producer, WAIT_MS), 0);
}

static void reply(struct fix *f, const char *id, const char *adapter, const char *worker)
{
    char text[512];
    snprintf(text, sizeof text,
             "{\"id\":\"%s\",\"adapter\":\"%s\",\"choices\":[{\"index\":0,\"text\":\"hi\","
             "\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":3,"
             "\"completion_tokens\":5},\"worker\":\"%s\"}", id, adapter, worker);
    produce(f, f->replies, id, text, NULL);
}

static rd_kafka_headers_t *why(int64_t offset, const char *code, const char *message)
{
    rd_kafka_headers_t *h = rd_kafka_headers_new(8);
    uint32_t partition = htobe32(3);
    uint64_t at = htobe64((uint64_t)offset);
    rd_kafka_header_add(h, "kafka_dlt-original-topic", -1, "prompts", -1);
    rd_kafka_header_add(h, "kafka_dlt-original-partition", -1, &partition, 4);
    rd_kafka_header_add(h, "kafka_dlt-original-offset", -1, &at, 8);
    rd_kafka_header_add(h, "loramill-error-code", -1, code, -1);
    rd_kafka_header_add(h, "loramill-error-message", -1, message, -1);
    rd_kafka_header_add(h, "loramill-attempt", -1, "2", -1);
    return h;
}

/* The output's line with this id (or, for NULL, the n-th line), parsed. */
static json_t *line_of(struct fix *f, const char *id)
{
    char *text = read_file(f->out), *save = NULL;
    json_t *found = NULL;
    for (char *l = strtok_r(text, "\n", &save); l && !found; l = strtok_r(NULL, "\n", &save)) {
        json_t *o = json_loads(l, 0, NULL);
        assert_non_null(o);
        const json_t *oid = json_object_get(o, "id");
        bool same = id ? json_is_string(oid) && !strcmp(json_string_value(oid), id)
                       : json_is_null(oid);
        if (same)
            found = o;
        else
            json_decref(o);
    }
    free(text);
    if (!found)
        fail_msg("no line with id %s", id ? id : "null");
    return found;
}

static int count_lines(const char *path)
{
    char *text = read_file(path);
    int n = 0;
    for (char *c = text; *c; c++)
        n += *c == '\n';
    free(text);
    return n;
}

static const char *text_at(json_t *o, const char *a, const char *b)
{
    return json_string_value(json_object_get(json_object_get(o, a), b));
}

/* ---- submit ----------------------------------------------------------------------------- */

static void test_submit_sends_lines_as_they_are(void **state)
{
    struct fix *f = *state;
    struct record r[3] = { 0 };
    write_file(f->in, "{\"id\":\"a\",  \"prompt\":\"one\"}\n\n   \n"
                      "{\"id\":\"b\",\"prompt\":\"tw\\u00f6\",\"adapter\":\"x/y\"}\r\n"
                      "{\"id\":\"c\",\"prompt\":\"three\"}");
    expect_status(f, run(f, cmd_submit, "-c", f->config, "-i", f->in, "--summary", f->summary,
                         NULL), 0);
    expect_said(f, "submit: 3 lines: 3 delivered, 0 refused, 0 not delivered");
    read_topic(f->prompts, 4, r, 3);
    const struct record *a = find_value(r, 3, "\"a\"");
    assert_string_equal(a->value, "{\"id\":\"a\",  \"prompt\":\"one\"}");
    assert_string_equal(a->key, "a");
    assert_string_equal(a->content_type, "application/json");
    assert_string_equal(find_value(r, 3, "\"b\"")->value,
                        "{\"id\":\"b\",\"prompt\":\"tw\\u00f6\",\"adapter\":\"x/y\"}");
    find_value(r, 3, "\"c\"");
    free_records(r, 3);
    json_t *s = json_load_file(f->summary, 0, NULL);
    assert_int_equal(json_integer_value(json_object_get(s, "delivered")), 3);
    json_decref(s);
}

static void test_submit_names_bad_lines_and_goes_on(void **state)
{
    struct fix *f = *state;
    struct record r[2] = { 0 };
    char part[160];
    write_file(f->in, "{\"id\":\"a\",\"prompt\":\"one\"}\n"
                      "not json\n"
                      "\n"
                      "{\"prompt\":\"no id\"}\n"
                      "{\"id\":\"b\",\"prompt\":\"x\",\"adaptor\":\"y\"}\n"
                      "{\"id\":\"c\",\"prompt\":\"two\"}\n");
    expect_status(f, run(f, cmd_submit, "-c", f->config, "-i", f->in, NULL), 1);
    expect_said(f, "submit: 5 lines: 2 delivered, 3 refused, 0 not delivered");
    snprintf(part, sizeof part, "%s:2: refused: ", f->in);
    expect_said(f, part);
    snprintf(part, sizeof part, "%s:4: refused: id", f->in);
    expect_said(f, part);
    snprintf(part, sizeof part, "%s:5: refused: adaptor", f->in);
    expect_said(f, part);
    read_topic(f->prompts, 4, r, 2);
    find_value(r, 2, "\"c\"");
    free_records(r, 2);
}

static void test_submit_unchecked(void **state)
{
    struct fix *f = *state;
    struct record r[2] = { 0 };
    write_file(f->in, "not json\n{\"id\":7}\n");
    expect_status(f, run(f, cmd_submit, "-c", f->config, "-i", f->in, "--no-check", NULL), 0);
    read_topic(f->prompts, 4, r, 2);
    assert_null(find_value(r, 2, "not json")->key);
    assert_string_equal(find_value(r, 2, "{\"id\":7}")->key, "7");
    free_records(r, 2);
}

static void test_submit_keys(void **state)
{
    struct fix *f = *state;
    struct record r[4] = { 0 };
    write_file(f->in, "{\"id\":\"a\",\"prompt\":\"p\",\"metadata\":{\"customer\":\"anna\"}}\n"
                      "{\"id\":\"b\",\"prompt\":\"p\"}\n");
    expect_status(f, run(f, cmd_submit, "-c", f->config, "-i", f->in, "-k", "metadata.customer",
                         NULL), 0);
    expect_status(f, run(f, cmd_submit, "-c", f->config, "-i", f->in, "-k", "", NULL), 0);
    read_topic(f->prompts, 4, r, 4);
    int annas = 0, none = 0;
    for (int i = 0; i < 4; i++) {
        annas += r[i].key && !strcmp(r[i].key, "anna");
        none += !r[i].key;
    }
    assert_int_equal(annas, 1);
    assert_int_equal(none, 3);
    free_records(r, 4);
}

static void test_submit_many_reports_are_capped(void **state)
{
    struct fix *f = *state;
    FILE *in = fopen(f->in, "w");
    for (int i = 0; i < 500; i++)
        fprintf(in, "{\"id\":\"n%d\",\"prompt\":\"p\"}\nbad %d\n", i, i);
    fclose(in);
    expect_status(f, run(f, cmd_submit, "-c", f->config, "-i", f->in, "-q", NULL), 1);
    expect_said(f, "1,000 lines: 500 delivered, 500 refused");
    expect_said(f, "further lines refused are only counted");
    assert_int_equal(count_lines(f->said), 22);
}

static void test_submit_line_too_long(void **state)
{
    struct fix *f = *state;
    FILE *in = fopen(f->in, "w");
    for (int i = 0; i < 17 << 10; i++)
        fprintf(in, "%01024d", 0);
    fputs("\n{\"id\":\"a\",\"prompt\":\"p\"}\n", in);
    fclose(in);
    expect_status(f, run(f, cmd_submit, "-c", f->config, "-i", f->in, NULL), 1);
    expect_said(f, ":1: refused: longer than 16777216 bytes");
    expect_said(f, "1 delivered, 1 refused");
}

/* The client's own limit, a megabyte, is none. */
static void test_submit_a_large_prompt(void **state)
{
    struct fix *f = *state;
    struct record r[1] = { 0 };
    size_t n = 2 << 20;
    char *text = malloc(n + 64);
    int head = sprintf(text, "{\"id\":\"a\",\"prompt\":\"");
    memset(text + head, 'x', n);
    strcpy(text + (size_t)head + n, "\"}\n");
    write_file(f->in, text);
    expect_status(f, run(f, cmd_submit, "-c", f->config, "-i", f->in, NULL), 0);
    read_topic(f->prompts, 4, r, 1);
    assert_int_equal(strlen(r[0].value), strlen(text) - 1);
    free_records(r, 1);
    free(text);
}

/* The client never takes it; the others are sent. */
static void test_submit_a_line_larger_than_the_queue(void **state)
{
    struct fix *f = *state;
    FILE *in = fopen(f->in, "w");
    fprintf(in, "{\"id\":\"a\",\"prompt\":\"p\"}\n{\"id\":\"b\",\"prompt\":\"%08192d\"}\n"
            "{\"id\":\"c\",\"prompt\":\"p\"}\n", 0);
    fclose(in);
    expect_status(f, run(f, cmd_submit, "-c", f->config, "--set",
                         "kafka.queue.buffering.max.kbytes=4", "-i", f->in, NULL), 1);
    expect_said(f, ":2: not delivered: Local: Queue full");
    expect_said(f, "3 lines: 2 delivered, 0 refused, 1 not delivered");
}

static void test_usage_errors(void **state)
{
    struct fix *f = *state;
    write_file(f->in, "{\"id\":\"a\",\"prompt\":\"p\"}\n");
    expect_status(f, run(f, cmd_submit, "-c", f->config, NULL), 2);
    expect_said(f, "--input FILE is missing");
    expect_status(f, run(f, cmd_submit, "-c", f->config, "-i", f->in, "more", NULL), 2);
    expect_said(f, "unexpected argument 'more'");
    expect_status(f, run(f, cmd_submit, "-c", "/nonexistent", "-i", f->in, NULL), 2);
    expect_said(f, "/nonexistent");
    expect_status(f, run(f, cmd_submit, "-c", f->config, "-i", f->in, "--set", "topics.promts=x",
                         NULL), 2);
    expect_said(f, "topics.promts");
    expect_status(f, run(f, cmd_submit, "-c", f->config, "-i", f->in, "--frob", NULL), 2);
    expect_status(f, run(f, cmd_collect, "-c", f->config, NULL), 2);
    expect_said(f, "--output FILE is missing");
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "-n", "0", NULL), 2);
    expect_said(f, "--expect 0: must be a whole number from 1");
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "-n", "3x", NULL), 2);
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "-s", "soon", NULL), 2);
    expect_said(f, "--since soon");
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->in, "-j", f->in, NULL), 2);
    expect_said(f, "--job and --output are the same file");
    assert_int_equal(link(f->in, f->out), 0);
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "-j", f->in, "-t", "1",
                         NULL), 2);
    expect_said(f, "--job and --output are the same file");
    assert_int_equal(unlink(f->out), 0);
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "--summary", f->out, NULL),
                  2);
    expect_said(f, "--output and --summary are the same file");
    char other[128];                    /* another name of what is not there yet */
    snprintf(other, sizeof other, "%s/./%s", dir, f->out + strlen(dir) + 1);
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "--summary", other, NULL),
                  1);
    expect_said(f, "--output and --summary are the same file");
    assert_int_equal(unlink(f->out), 0);
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "-j", f->in, "--summary",
                         f->in, NULL), 2);
    expect_said(f, "--job and --summary are the same file");
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "-j", f->in, "-n", "1",
                         NULL), 2);
    expect_said(f, "exclude each other");
}

static void test_failures_before_sending(void **state)
{
    struct fix *f = *state;
    write_file(f->in, "{\"id\":\"a\",\"prompt\":\"p\"}\n");
    expect_status(f, run(f, cmd_submit, "-c", f->config, "-i", "/nonexistent.jsonl", NULL), 1);
    expect_said(f, "/nonexistent.jsonl: No such file");
    expect_status(f, run(f, cmd_submit, "-c", f->config, "-i", f->in, "--set",
                         "topics.prompts=a,b", NULL), 1);
    expect_said(f, "does not name one topic");
    expect_status(f, run(f, cmd_submit, "--set", "topics.prompts=x", "-i", f->in, NULL), 1);
    expect_said(f, "kafka.bootstrap.servers is not set");
    expect_status(f, run(f, cmd_submit, "-c", f->config, "-i", f->in, "--set",
                         "kafka.no.such.property=1", NULL), 1);
    expect_said(f, "kafka.no.such.property");
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", "/nonexistent/out", NULL), 1);
    expect_said(f, "/nonexistent/out: No such file");
}

/* ---- collect ---------------------------------------------------------------------------- */

static void test_collect_a_job(void **state)
{
    struct fix *f = *state;
    write_file(f->in, "{\"id\":\"a\",\"prompt\":\"p\"}\n{\"id\":\"b\",\"prompt\":\"p\"}\n"
                      "{\"prompt\":\"no id\"}\nnot json\n{\"id\":\"a\",\"prompt\":\"again\"}\n");
    reply(f, "a", "x", "w1");
    reply(f, "a", "x", "w2");           /* at least once */
    reply(f, "other", "x", "w1");       /* of another job */
    produce(f, f->dead, "k", "{\"id\":\"b\",\"prompt\":\"p\"}", why(7, "not_found", "no \"b\""));
    produce(f, f->dead, NULL, "{\"prompt\":\"no id\"}", why(8, "invalid", "id is missing"));
    produce(f, f->dead, NULL, "not json", why(9, "malformed", "not JSON"));
    produce(f, f->dead, NULL, "not json either", why(10, "malformed", "not JSON"));
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "-j", f->in, "-t", "15",
                         "--summary", f->summary, NULL), 1);
    expect_said(f, "collect: 1 answered, 3 dead-lettered, 0 missing");
    expect_said(f, "dead letter: b: not_found: no \"b\"");
    assert_int_equal(count_lines(f->out), 4);
    json_t *b = line_of(f, "b"), *none = line_of(f, NULL);
    assert_string_equal(text_at(b, "error", "code"), "not_found");
    assert_string_equal(text_at(b, "error", "message"), "no \"b\"");
    assert_string_equal(text_at(b, "dead_letter", "topic"), "prompts");
    assert_string_equal(text_at(b, "prompt", "prompt"), "p");
    json_t *place = json_object_get(b, "dead_letter");
    assert_int_equal(json_integer_value(json_object_get(place, "partition")), 3);
    assert_int_equal(json_integer_value(json_object_get(place, "offset")), 7);
    assert_int_equal(json_integer_value(json_object_get(place, "attempt")), 2);
    json_decref(b);
    json_decref(none);
    json_t *s = json_load_file(f->summary, 0, NULL);
    assert_int_equal(json_integer_value(json_object_get(s, "completion_tokens")), 5);
    assert_int_equal(json_integer_value(json_object_get(json_object_get(s, "causes"),
                                                        "malformed")), 1);
    json_decref(s);
}

static void test_collect_all_answered(void **state)
{
    struct fix *f = *state;
    char id[16];
    for (int i = 0; i < 50; i++) {
        snprintf(id, sizeof id, "r%d", i);
        reply(f, id, i % 2 ? "x" : "y", "w");
    }
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "-n", "50", "-t", "15",
                         NULL), 0);
    expect_said(f, "collect: 50 answered, 0 dead-lettered, 0 missing");
    assert_int_equal(count_lines(f->out), 50);
    json_t *one = line_of(f, "r49");
    assert_string_equal(json_string_value(json_object_get(one, "adapter")), "x");
    json_decref(one);
}

/* What an earlier run has left stays until there is something to put in its place. */
static void test_collect_again(void **state)
{
    struct fix *f = *state;
    char earlier[4096];
    memset(earlier, 'x', sizeof earlier - 1);
    earlier[sizeof earlier - 1] = '\0';
    reply(f, "a", "x", "w");
    write_file(f->out, earlier);
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "--set",
                         "topics.replies=replies-nowhere", NULL), 1);
    char *left = read_file(f->out);
    assert_string_equal(left, earlier);
    free(left);
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, NULL), 0);
    assert_int_equal(count_lines(f->out), 1);
    json_decref(line_of(f, "a"));
}

/* As large as message.max_bytes lets a worker's reply be. */
static void test_collect_a_large_reply(void **state)
{
    struct fix *f = *state;
    size_t n = 17 << 20;
    char *text = malloc(n + 64);
    int head = sprintf(text, "{\"id\":\"large\",\"text\":\"");
    memset(text + head, 'x', n);
    strcpy(text + (size_t)head + n, "\"}");
    produce(f, f->replies, NULL, text, NULL);
    free(text);
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, NULL), 1);
    expect_said(f, "bytes, more than 16777216");
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "--set",
                         "message.max_bytes=18M", NULL), 0);
    assert_int_equal(count_lines(f->out), 1);
}

static void test_collect_gives_up(void **state)
{
    struct fix *f = *state;
    write_file(f->in, "{\"id\":\"a\"}\n{\"id\":\"b\"}\nno id\n");
    reply(f, "a", "x", "w");
    for (int seconds = 1;; seconds *= 4) {      /* which is to be enough for what is there */
        char t[16], gave_up[128];
        snprintf(t, sizeof t, "%d", seconds);
        int64_t began = lm_now_us();
        expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "-j", f->in, "-t", t,
                             NULL), 1);
        assert_in_range((lm_now_us() - began) / 1000, seconds * 1000, seconds * 1000 + WAIT_MS);
        expect_said(f, "missing: b");
        expect_said(f, "missing: a line without an id");
        int n = count_lines(f->out);
        snprintf(gave_up, sizeof gave_up, "%d answered, 0 dead-lettered, %d missing; gave up after "
                 "%s s", n, 3 - n, t);
        expect_said(f, gave_up);
        if (n == 1 || seconds >= 16) {
            assert_int_equal(n, 1);
            return;
        }
    }
}

static void test_collect_what_is_there(void **state)
{
    struct fix *f = *state;
    reply(f, "a", "x", "w");
    produce(f, f->dead, NULL, "??", why(1, "malformed", "no"));
    produce(f, f->dead, NULL, "??", why(1, "malformed", "no"));     /* the same prompt, twice */
    produce(f, f->dead, NULL, "??", why(2, "malformed", "no"));     /* another one */
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, NULL), 1);
    expect_said(f, "1 answered, 2 dead-lettered, 0 missing, 1 repeats dropped");
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "--set",
                         "topics.dead_letters=replies-empty", "-q", NULL), 0);
}

static void test_collect_hostile_records(void **state)
{
    struct fix *f = *state;
    rd_kafka_headers_t *h = rd_kafka_headers_new(4);
    rd_kafka_header_add(h, "kafka_dlt-original-partition", -1, "xyz", 3);
    rd_kafka_header_add(h, "__connect.errors.topic", -1, "t\x01\xff", 3);
    rd_kafka_header_add(h, "__connect.errors.offset", -1, "12x", 3);
    rd_kafka_header_add(h, "__connect.errors.exception.message", -1, "caf\xc3", 4);
    produce(f, f->replies, NULL, "{\"id\":7}", NULL);
    produce(f, f->replies, NULL, "[1,2", NULL);
    produce(f, f->replies, NULL, "", NULL);
    produce(f, f->replies, NULL, "\x01""abcdefgh", NULL);
    produce(f, f->replies, NULL,
            "{\"id\":\"ok\",\n \"choices\":7,\"usage\":[],\"worker\":{}}", NULL);
    produce(f, f->dead, "\xff\xfe", "\xff\xfe", h);
    produce(f, f->dead, NULL, "[]", NULL);
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "--summary", f->summary,
                         NULL), 1);
    expect_said(f, "1 answered, 2 dead-lettered, 0 missing, 4 unreadable");
    expect_said(f, "has no registry.url");
    assert_int_equal(count_lines(f->out), 3);   /* the reply's own newline is gone */
    json_decref(line_of(f, "ok"));
    char *text = read_file(f->out);
    assert_non_null(strstr(text, "\"value\":{\"hex\":\"fffe\"}"));
    assert_non_null(strstr(text, "\"message\":\"caf?\""));
    free(text);
}

static bool drives_a_terminal(const char *text)
{
    for (const unsigned char *c = (const unsigned char *)text; *c; c++)
        if ((*c < 0x20 && *c != '\n') || *c == 0x7f || (*c == 0xc2 && c[1] < 0xa0))
            return true;
    return false;
}

/* No control character is written as it is, of ASCII or of C1 (U+009B is ESC [ in one). */
static void test_collect_hostile_text(void **state)
{
    struct fix *f = *state;
    rd_kafka_headers_t *h = rd_kafka_headers_new(2);
    rd_kafka_header_add(h, "kafka_dlt-original-topic", -1, "t\xc2\x9b""2J", -1);
    rd_kafka_header_add(h, "kafka_dlt-original-partition", -1, "\0\0\0\0", 4);
    rd_kafka_header_add(h, "kafka_dlt-original-offset", -1, "\0\0\0\0", 4);
    produce(f, f->dead, NULL, "{\"id\":\"a\\u001b[2J\\u009b1mz\\nb\",\"prompt\":\"p\"}",
            why(1, "bad\xc2\x9b""1m", "no\xc2\x9b""2J\x1b[2J"));
    produce(f, f->dead, NULL, "no id", h);
    produce(f, f->replies, NULL, "{\"\x7f\xc2\x9b""2J", NULL);
    write_file(f->in, "{\"id\":\"gone\\u001b[2J\\u009b\"}\n");
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, NULL), 1);
    expect_said(f, "dead letter: a?[2J??1mz?b: bad??1m: no??2J?[2J\n");
    expect_said(f, "dead letter: t??2J/0/0: unknown: ");
    expect_said(f, "unreadable reply at ");
    char *said = read_file(f->said);
    assert_false(drives_a_terminal(said));
    free(said);
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "-j", f->in, "-t", "1",
                         NULL), 1);
    expect_said(f, "missing: gone?[2J??\n");
}

/* A terminal for an output gets the same JSON without what would drive it. */
static void test_collect_to_a_terminal(void **state)
{
    struct fix *f = *state;
    char got[1024];
    size_t n = 0;
    produce(f, f->replies, NULL, "{\"id\":\"a\",\"x\":\"\x7f\xc2\x9b""2J\"}", NULL);
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    assert_int_equal(grantpt(master) | unlockpt(master), 0);
    int slave = open(ptsname(master), O_RDWR | O_NOCTTY | O_CLOEXEC);
    assert_true(slave >= 0);
    fflush(stdout);
    int kept = dup(1);
    dup2(slave, 1);
    int status = run(f, cmd_collect, "-c", f->config, "-o", "-", "-q", NULL);
    dup2(kept, 1);
    expect_status(f, status, 0);
    while (n < sizeof got - 1 && (n == 0 || got[n - 1] != '\n')) {
        ssize_t more = read(master, got + n, sizeof got - 1 - n);
        assert_true(more > 0);
        n += (size_t)more;
    }
    got[n] = '\0';
    assert_string_equal(got, "{\"id\":\"a\",\"x\":\"\\u007f\\u009b2J\"}\r\n");   /* its own CR */
    close(kept);
    close(slave);
    close(master);
}

static void serve_schema(struct request *r)
{
    const char body[] = "{\"schema\":\"{\\\"type\\\":\\\"record\\\",\\\"name\\\":\\\"c\\\","
                        "\\\"fields\\\":[{\\\"name\\\":\\\"id\\\",\\\"type\\\":\\\"string\\\"},"
                        "{\\\"name\\\":\\\"worker\\\",\\\"type\\\":\\\"string\\\"}]}\"}";
    if (r->nth == 0)            /* it has a bad moment first */
        sendf(r, "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n");
    else
        sendf(r, "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.schemaregistry.v1+json\r\n"
              "Content-Length: %zu\r\n\r\n%s", sizeof body - 1, body);
}

static void test_collect_avro(void **state)
{
    struct fix *f = *state;
    static const struct rule rules[] = { { "schemas", serve_schema }, { NULL, NULL } };
    static const char record[] = "\0\0\0\0\7" "\x0a" "avro1" "\x04" "w9";
    struct site *site = site_open(rules);
    char url[64];
    rd_kafka_producev(f->producer, RD_KAFKA_V_TOPIC(f->replies),
                      RD_KAFKA_V_MSGFLAGS(RD_KAFKA_MSG_F_COPY),
                      RD_KAFKA_V_VALUE((void *)(uintptr_t)record, sizeof record - 1),
                      RD_KAFKA_V_END);
    assert_int_equal(rd_kafka_flush(f->producer, WAIT_MS), 0);
    snprintf(url, sizeof url, "registry.url=http://127.0.0.1:%d", site->port);
    expect_status(f, run(f, cmd_collect, "-c", f->config, "-o", f->out, "--set", url, NULL), 0);
    json_t *o = line_of(f, "avro1");
    assert_string_equal(json_string_value(json_object_get(o, "worker")), "w9");
    json_decref(o);
    site_close(site);
}

static void test_collect_since(void **state)
{
    struct fix *f = *state;
    char ms[32];
    reply(f, "old", "x", "w");
    snprintf(ms, sizeof ms, "%lld", (long long)lm_wall_ms() + 3600000);
    /* The embedded broker does not look up times: it answers with an end, never with an error. */
    int status = run(f, cmd_collect, "-c", f->config, "-o", f->out, "-s", ms, "-t", "10", NULL);
    assert_true(status == 0 || status == 1);
    expect_said(f, "collect: ");
}

/* ---- outcomes --------------------------------------------------------------------------- */

static void test_outcomes_of_a_job(void **state)
{
    (void)state;
    struct outcome_counts n;
    outcomes *j = outcomes_new();
    assert_int_equal(outcomes_await_line(j, "{\"id\":\"a\"}", 10), LM_OK);
    assert_int_equal(outcomes_await_line(j, "{\"id\":\"a\"}", 10), LM_OK);
    assert_int_equal(outcomes_await_line(j, "xx", 2), LM_OK);
    assert_int_equal(outcomes_await_line(j, "x\0y", 3), LM_OK);
    assert_int_equal(outcomes_reply(j, "xx", 2), NEWS_FOREIGN);  /* an id, not the line */
    assert_int_equal(outcomes_dead_letter(j, "x\0z", 3, "t/0/1"), NEWS_FOREIGN);
    assert_int_equal(outcomes_dead_letter(j, "{\"x\":1,\"id\":\"a\"}", 16, "t/0/2"), NEWS_NEW);
    assert_int_equal(outcomes_dead_letter(j, "{\"id\":\"a\"}", 10, "t/0/3"), NEWS_REPEATED);
    assert_int_equal(outcomes_reply(j, "a", 1), NEWS_HEALED);
    assert_int_equal(outcomes_dead_letter(j, "{\"id\":\"a\"}", 10, "t/0/3"), NEWS_REPEATED);
    assert_int_equal(outcomes_dead_letter(j, "x\0y", 3, "t/0/4"), NEWS_NEW);
    outcomes_counts(j, &n);
    assert_int_equal(n.awaited, 3);
    assert_int_equal(n.replies, 1);
    assert_int_equal(n.dead_letters, 1);
    assert_int_equal(n.missing, 1);
    assert_false(outcomes_complete(j));
    assert_int_equal(outcomes_dead_letter(j, "xx", 2, "t/0/5"), NEWS_NEW);
    assert_true(outcomes_complete(j));
    outcomes_free(j);
}

/* A prompt's text may have U+0000, its id and its reply's are the same all the same. */
static void test_outcomes_of_text_with_nul(void **state)
{
    (void)state;
    static const char line[] = "{\"id\":\"a\",\"prompt\":\"\\u0000\"}";
    outcomes *j = outcomes_new();
    assert_int_equal(outcomes_await_line(j, line, sizeof line - 1), LM_OK);
    assert_int_equal(outcomes_dead_letter(j, line, sizeof line - 1, "t/0/1"), NEWS_NEW);
    assert_int_equal(outcomes_reply(j, "a", 1), NEWS_HEALED);
    assert_true(outcomes_complete(j));
    outcomes_free(j);
}

static void test_outcomes_by_count(void **state)
{
    (void)state;
    outcomes *j = outcomes_new();
    outcomes_await_count(j, 3);
    assert_int_equal(outcomes_reply(j, "a", 1), NEWS_NEW);
    assert_int_equal(outcomes_reply(j, "a", 1), NEWS_REPEATED);
    assert_int_equal(outcomes_dead_letter(j, "?", 1, "t/0/1"), NEWS_NEW);
    assert_int_equal(outcomes_dead_letter(j, "?", 1, "t/0/1"), NEWS_REPEATED);
    assert_false(outcomes_complete(j));
    assert_int_equal(outcomes_dead_letter(j, "?", 1, "t/0/2"), NEWS_NEW);
    assert_true(outcomes_complete(j));
    outcomes_free(j);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    struct lm_err err;
    if (!mkdtemp(dir) || dev_broker_new(1, &broker, &err) != LM_OK) {
        fprintf(stderr, "no broker: %s\n", err.msg);
        return 1;
    }
    const struct CMUnitTest tests[] = {
        TEST(test_submit_sends_lines_as_they_are), TEST(test_submit_names_bad_lines_and_goes_on),
        TEST(test_submit_unchecked), TEST(test_submit_keys),
        TEST(test_submit_many_reports_are_capped), TEST(test_submit_line_too_long),
        TEST(test_submit_a_large_prompt), TEST(test_submit_a_line_larger_than_the_queue),
        TEST(test_usage_errors), TEST(test_failures_before_sending), TEST(test_collect_a_job),
        TEST(test_collect_all_answered), TEST(test_collect_gives_up),
        TEST(test_collect_what_is_there), TEST(test_collect_hostile_records),
        TEST(test_collect_hostile_text),
        TEST(test_collect_to_a_terminal), TEST(test_collect_again),
        TEST(test_collect_a_large_reply),
        TEST(test_collect_avro), TEST(test_collect_since), cmocka_unit_test(test_outcomes_of_a_job),
        cmocka_unit_test(test_outcomes_of_text_with_nul), cmocka_unit_test(test_outcomes_by_count),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    dev_broker_free(broker);
    char cmd[96];
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    return system(cmd) ? 1 : failed;
}
