/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_outbox.c - a whole worker, with the echo engine, against librdkafka's mock cluster
 * that is told to misbehave: what a reply, a dead letter and a committed offset do under broker
 * errors.
 *
 * The mock knows no transactions, no size limits and no real log; it is used for the injection of
 * errors only. Delivery under crashes is proved on a real broker (tests/integration).
 *
 * Each test forks its worker before it makes a cluster, so that no thread of librdkafka lives
 * across a fork; the worker waits on a pipe for the broker's address.
 *
 * Mostly waits: for brokers that are silent or away, and for what a worker grants them.
 */
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include <librdkafka/rdkafka.h>
#include <librdkafka/rdkafka_mock.h>

#include "worker/quarantine.h"
#include "worker/worker.h"
#include "worker_registry_server.h"

enum { API_PRODUCE = 0, API_OFFSET_COMMIT = 8, API_END_TXN = 26, API_TXN_OFFSET_COMMIT = 28,
       WAIT_S = 60 };

struct fixture {
    pid_t worker;
    int start;                  /* write end: the worker's configuration lines */
    rd_kafka_t *rk;             /* owns the cluster; produces */
    rd_kafka_mock_cluster_t *mock;
    rd_kafka_t *reader;
};

static bool destroy_hangs;      /* in the child */

static void child_config(struct config *c, const char *assignment)
{
    struct lm_err err;
    if (config_set(c, assignment, &err)) {
        fprintf(stderr, "%s\n", err.msg);
        _exit(99);
    }
}

/* Wins over the shared library's. */
void rd_kafka_destroy(rd_kafka_t *rk)
{
    void (*real)(rd_kafka_t *) = (__typeof__(real))dlsym(RTLD_NEXT, "rd_kafka_destroy");
    while (destroy_hangs)
        pause();
    real(rk);
}

static atomic_int poll_hangs;       /* in the child, from SIGUSR1 to SIGUSR2 */

static void hang_poll(int signal)
{
    atomic_store(&poll_hangs, signal == SIGUSR1);
}

/* Wins over the shared library's. */
rd_kafka_message_t *rd_kafka_consumer_poll(rd_kafka_t *rk, int timeout_ms)
{
    rd_kafka_message_t *(*real)(rd_kafka_t *, int) =
        (__typeof__(real))dlsym(RTLD_NEXT, "rd_kafka_consumer_poll");
    while (atomic_load(&poll_hangs))
        usleep(10000);
    return real(rk, timeout_ms);
}

static void child(int fd)
{
    struct config c;
    struct lm_err err;
    char line[512];
    FILE *f = fdopen(fd, "r");
    if (config_init(&c, &err) || !f)
        _exit(98);
    signal(SIGUSR1, hang_poll);
    signal(SIGUSR2, hang_poll);
    child_config(&c, "engine.mode=echo");
    child_config(&c, "topics.dead_letters=dead");
    child_config(&c, "topics.replies_allowed=other");
    child_config(&c, "http.port=0");
    child_config(&c, "worker.name=w");
    child_config(&c, "group.id=g");
    child_config(&c, "commit.interval_ms=100");
    child_config(&c, "retry.backoff_ms=50");
    child_config(&c, "retry.backoff_max_ms=200");
    child_config(&c, "kafka.session.timeout.ms=6000");
    child_config(&c, "kafka.heartbeat.interval.ms=300");
    while (fgets(line, sizeof line, f) && strcmp(line, "go\n"))
        if (!strcmp(line, "destroy hangs\n"))
            destroy_hangs = true;
        else
            child_config(&c, line);
    fclose(f);
    int st = worker_run(&c);
    config_release(&c);
    _exit(st);
}

static int setup(void **state)
{
    int fds[2];
    struct fixture *f = calloc(1, sizeof *f);
    if (!f || pipe(fds))
        return -1;
    f->worker = fork();
    if (f->worker == 0) {
        close(fds[1]);
        child(fds[0]);
    }
    close(fds[0]);
    f->start = fds[1];
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    f->rk = rd_kafka_new(RD_KAFKA_PRODUCER, conf, NULL, 0);
    f->mock = rd_kafka_mock_cluster_new(f->rk, 1);
    rd_kafka_mock_topic_create(f->mock, "prompts", 1, 1);
    rd_kafka_mock_topic_create(f->mock, "replies", 1, 1);
    rd_kafka_mock_topic_create(f->mock, "dead", 1, 1);
#if RD_KAFKA_VERSION >= 0x020b0000
    rd_kafka_mock_group_initial_rebalance_delay_ms(f->mock, 100);
#endif
    *state = f;
    return 0;
}

static rd_kafka_t *client(struct fixture *f, rd_kafka_type_t type, const char *group)
{
    char why[256];
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    rd_kafka_conf_set(conf, "bootstrap.servers", rd_kafka_mock_cluster_bootstraps(f->mock), why,
                      sizeof why);
    rd_kafka_conf_set(conf, "reconnect.backoff.max.ms", "500", why, sizeof why);
    if (group)
        rd_kafka_conf_set(conf, "group.id", group, why, sizeof why);
    rd_kafka_t *rk = rd_kafka_new(type, conf, why, sizeof why);
    assert_non_null(rk);
    return rk;
}

/* Another member of the worker's group. */
static rd_kafka_t *member(struct fixture *f)
{
    char why[256];
    static const char *const set[][2] = {
        { "group.id", "g" }, { "session.timeout.ms", "6000" }, { "heartbeat.interval.ms", "300" },
        { "partition.assignment.strategy", "cooperative-sticky" },
        { "auto.offset.reset", "earliest" }, { "enable.auto.commit", "false" },
    };
    rd_kafka_conf_t *conf = rd_kafka_conf_new();
    rd_kafka_conf_set(conf, "bootstrap.servers", rd_kafka_mock_cluster_bootstraps(f->mock), why,
                      sizeof why);
    for (size_t i = 0; i < LM_COUNT(set); i++)
        assert_int_equal(rd_kafka_conf_set(conf, set[i][0], set[i][1], why, sizeof why), 0);
    rd_kafka_t *rk = rd_kafka_new(RD_KAFKA_CONSUMER, conf, why, sizeof why);
    assert_non_null(rk);
    rd_kafka_poll_set_consumer(rk);
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(1);
    rd_kafka_topic_partition_list_add(l, "prompts", RD_KAFKA_PARTITION_UA);
    assert_int_equal(rd_kafka_subscribe(rk, l), 0);
    rd_kafka_topic_partition_list_destroy(l);
    return rk;
}

static int end_worker(struct fixture *f)
{
    int st = -1;
    if (!f->worker)
        return 0;
    kill(f->worker, SIGTERM);
    waitpid(f->worker, &st, 0);
    f->worker = 0;
    return WIFEXITED(st) ? WEXITSTATUS(st) : 128 + WTERMSIG(st);
}

static void close_reader(struct fixture *f)
{
    if (f->reader) {
        rd_kafka_consumer_close(f->reader);
        rd_kafka_destroy(f->reader);
    }
    f->reader = NULL;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    if (f->worker) {
        kill(f->worker, SIGKILL);
        waitpid(f->worker, NULL, 0);
    }
    if (f->start >= 0)
        close(f->start);
    close_reader(f);
    rd_kafka_mock_cluster_destroy(f->mock);
    rd_kafka_destroy(f->rk);
    free(f);
    return 0;
}

static void start_worker(struct fixture *f, const char *lines)
{
    char text[1024];
    int n = snprintf(text, sizeof text, "kafka.bootstrap.servers=%s\n%sgo\n",
                     rd_kafka_mock_cluster_bootstraps(f->mock), lines);
    assert_int_equal(write(f->start, text, (size_t)n), n);
    close(f->start);
    f->start = -1;
}

static void send_record(struct fixture *f, const char *topic, const char *json)
{
    rd_kafka_t *p = client(f, RD_KAFKA_PRODUCER, NULL);
    rd_kafka_headers_t *h = rd_kafka_headers_new(1);
    rd_kafka_header_add(h, "kafka_correlationId", -1, "\0\1\xff", 3);
    assert_int_equal(rd_kafka_producev(p, RD_KAFKA_V_TOPIC(topic), RD_KAFKA_V_KEY("k", 1),
                                       RD_KAFKA_V_VALUE((void *)(uintptr_t)json, strlen(json)),
                                       RD_KAFKA_V_MSGFLAGS(RD_KAFKA_MSG_F_COPY),
                                       RD_KAFKA_V_HEADERS(h), RD_KAFKA_V_END), 0);
    assert_int_equal(rd_kafka_flush(p, 10000), 0);
    rd_kafka_destroy(p);
}

static void send_prompt(struct fixture *f, const char *json)
{
    send_record(f, "prompts", json);
}

/* The next record of a topic, or NULL after `seconds`. */
static rd_kafka_message_t *next_of(struct fixture *f, const char *topic, int seconds)
{
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(1);
    if (!f->reader)
        f->reader = client(f, RD_KAFKA_CONSUMER, "reader");
    rd_kafka_topic_partition_list_add(l, topic, 0)->offset = 0;
    rd_kafka_assign(f->reader, l);
    rd_kafka_topic_partition_list_destroy(l);
    for (int64_t end = lm_now_us() + seconds * 1000000ll; lm_now_us() < end;) {
        rd_kafka_message_t *m = rd_kafka_consumer_poll(f->reader, 100);
        if (m && !m->err)
            return m;
        if (m)
            rd_kafka_message_destroy(m);
    }
    return NULL;
}

static int64_t committed(struct fixture *f)
{
    rd_kafka_t *c = client(f, RD_KAFKA_CONSUMER, "g");
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(1);
    rd_kafka_topic_partition_list_add(l, "prompts", 0);
    rd_kafka_resp_err_t e = rd_kafka_committed(c, l, 10000);
    int64_t offset = e ? -2 : l->elems[0].offset;
    rd_kafka_topic_partition_list_destroy(l);
    rd_kafka_destroy(c);
    return offset;
}

static void wait_committed(struct fixture *f, int64_t offset)
{
    int64_t got = -3;
    for (int64_t end = lm_now_us() + 20 * 1000000ll; lm_now_us() < end; usleep(200000))
        if ((got = committed(f)) == offset)
            return;
    fail_msg("committed %lld, expected %lld", (long long)got, (long long)offset);
}

static void has_header(const rd_kafka_message_t *m, const char *name, const void *value, size_t n)
{
    rd_kafka_headers_t *h;
    const void *got;
    size_t len;
    assert_int_equal(rd_kafka_message_headers(m, &h), 0);
    if (rd_kafka_header_get_last(h, name, &got, &len))
        fail_msg("no header %s", name);
    if (len != n || memcmp(got, value, n))
        fail_msg("%s is '%.*s'", name, (int)len, (const char *)got);
}

static void expect(struct fixture *f, const char *topic, const char *code)
{
    rd_kafka_message_t *m = next_of(f, topic, WAIT_S);
    if (!m)
        fail_msg("nothing in %s", topic);
    assert_int_equal(m->key_len, 1);
    has_header(m, "kafka_correlationId", "\0\1\xff", 3);
    if (code)
        has_header(m, "loramill-error-code", code, strlen(code));
    rd_kafka_message_destroy(m);
}

static const char good[] = "{\"id\":\"a\",\"prompt\":\"hello\"}";

static void test_reply_then_commit(void **state)
{
    struct fixture *f = *state;
    send_prompt(f, good);
    start_worker(f, "");
    expect(f, "replies", NULL);
    wait_committed(f, 1);
    assert_int_equal(end_worker(f), 0);
}

static void test_produce_errors_heal(void **state)
{
    struct fixture *f = *state;
    send_prompt(f, good);
    rd_kafka_mock_push_request_errors(f->mock, API_PRODUCE, 4,
                                      RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
                                      RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT,
                                      RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION,
                                      RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED);
    start_worker(f, "");
    expect(f, "replies", NULL);
    wait_committed(f, 1);
    assert_null(next_of(f, "dead", 1));
    assert_int_equal(end_worker(f), 0);
}

/* A refusal for its size, of a reply that travels alone, is believed. */
static void test_broker_refuses_size(void **state)
{
    struct fixture *f = *state;
    send_prompt(f, good);
    rd_kafka_mock_push_request_errors(f->mock, API_PRODUCE, 1,
                                      RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE);
    start_worker(f, "kafka.producer.batch.size=1\n");
    expect(f, "dead", "too_large");
    wait_committed(f, 1);
    assert_null(next_of(f, "replies", 1));
    assert_int_equal(end_worker(f), 0);
}

/* ... and of a small one, which shares its batch with others, only when it repeats. */
static void test_small_reply_is_tried_again(void **state)
{
    struct fixture *f = *state;
    send_prompt(f, good);
    rd_kafka_mock_push_request_errors(f->mock, API_PRODUCE, 2,
                                      RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE,
                                      RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE);
    start_worker(f, "");
    expect(f, "replies", NULL);
    wait_committed(f, 1);
    assert_int_equal(end_worker(f), 0);
}

static void test_own_size_limit(void **state)
{
    struct fixture *f = *state;
    char json[2048], text[900];
    memset(text, '"', sizeof text);     /* each quote costs two bytes once escaped */
    for (size_t i = 0; i < sizeof text; i += 2)
        text[i] = '\\';
    snprintf(json, sizeof json,
             "{\"id\":\"a\",\"prompt\":\"%.*s\",\"params\":{\"max_tokens\":999}}",
             (int)sizeof text, text);
    send_prompt(f, json);
    start_worker(f, "message.max_bytes=1024\n");
    expect(f, "dead", "too_large");
    assert_int_equal(end_worker(f), 0);
}

/* A dead letter that can't be produced blocks the offset: nothing may be lost. */
static void test_dead_letter_blocks_offset(void **state)
{
    struct fixture *f = *state;
    send_prompt(f, "{\"id\":\"a\"}");
    send_prompt(f, good);
    rd_kafka_mock_topic_set_error(f->mock, "dead", RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED);
    start_worker(f, "");
    expect(f, "replies", NULL);
    sleep(2);
    assert_true(committed(f) <= 0);          /* 0 says "read 0 next" */
    rd_kafka_mock_topic_set_error(f->mock, "dead", RD_KAFKA_RESP_ERR_NO_ERROR);
    expect(f, "dead", "invalid");
    wait_committed(f, 2);
    assert_int_equal(end_worker(f), 0);
}

static bool lacks_header(const rd_kafka_message_t *m, const char *name)
{
    rd_kafka_headers_t *h;
    const void *got;
    size_t len;
    return rd_kafka_message_headers(m, &h) || rd_kafka_header_get_last(h, name, &got, &len);
}

/* One that its own headers make too large for the topic goes with fewer of them ... */
static void test_large_dead_letter_is_trimmed(void **state)
{
    struct fixture *f = *state;
    send_prompt(f, "{\"id\":\"a\"}");
    rd_kafka_mock_push_request_errors(f->mock, API_PRODUCE, 1,
                                      RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE);
    start_worker(f, "kafka.producer.batch.size=1\n");
    rd_kafka_message_t *m = next_of(f, "dead", WAIT_S);
    assert_non_null(m);
    assert_int_equal(m->len, 10);
    assert_memory_equal(m->payload, "{\"id\":\"a\"}", 10);
    has_header(m, "kafka_correlationId", "\0\1\xff", 3);
    has_header(m, "loramill-error-code", "invalid", 7);
    has_header(m, "kafka_dlt-original-offset", "\0\0\0\0\0\0\0", 8);
    assert_true(lacks_header(m, "__connect.errors.topic"));
    assert_true(lacks_header(m, "loramill-omitted"));
    rd_kafka_message_destroy(m);
    wait_committed(f, 1);
    assert_int_equal(end_worker(f), 0);
}

/* ... and in the end without its value, so that no prompt blocks a partition for ever. */
static void test_huge_dead_letter_goes_bare(void **state)
{
    struct fixture *f = *state;
    send_prompt(f, "{\"id\":\"a\"}");
    rd_kafka_mock_push_request_errors(f->mock, API_PRODUCE, 3,
                                      RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE,
                                      RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE,
                                      RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE);
    start_worker(f, "kafka.producer.batch.size=1\n");
    rd_kafka_message_t *m = next_of(f, "dead", WAIT_S);
    assert_non_null(m);
    assert_null(m->payload);
    assert_int_equal(m->key_len, 1);
    has_header(m, "loramill-error-code", "invalid", 7);
    has_header(m, "kafka_dlt-original-topic", "prompts", 7);
    has_header(m, "loramill-omitted", "value of 10 bytes, 1 headers", 28);
    assert_true(lacks_header(m, "kafka_correlationId"));
    rd_kafka_message_destroy(m);
    wait_committed(f, 1);
    assert_int_equal(end_worker(f), 0);
}

static void test_commit_errors_heal(void **state)
{
    struct fixture *f = *state;
    send_prompt(f, good);
    rd_kafka_mock_push_request_errors(f->mock, API_OFFSET_COMMIT, 2,
                                      RD_KAFKA_RESP_ERR_NOT_COORDINATOR,
                                      RD_KAFKA_RESP_ERR_OFFSET_METADATA_TOO_LARGE);
    start_worker(f, "");
    expect(f, "replies", NULL);
    wait_committed(f, 1);
    assert_int_equal(end_worker(f), 0);
}

/* A group that has moved on takes no commit of an old generation: nothing is lost, nobody ends. */
static void test_commit_of_an_old_generation(void **state)
{
    struct fixture *f = *state;
    send_prompt(f, good);
    rd_kafka_mock_push_request_errors(f->mock, API_OFFSET_COMMIT, 1,
                                      RD_KAFKA_RESP_ERR_ILLEGAL_GENERATION);
    start_worker(f, "");
    expect(f, "replies", NULL);
    wait_committed(f, 1);
    assert_int_equal(end_worker(f), 0);
}

/* Polls until there is a record of the topic. */
static int64_t read_one(rd_kafka_t *rk)
{
    for (int64_t end = lm_now_us() + WAIT_S * 1000000ll; lm_now_us() < end;) {
        rd_kafka_message_t *m = rd_kafka_consumer_poll(rk, 100);
        int64_t offset = m && !m->err ? m->offset : -1;
        if (m)
            rd_kafka_message_destroy(m);
        if (offset >= 0)
            return offset;
    }
    return -1;
}

/* A thread that does not poll for longer than max.poll.interval.ms loses its partitions to another
 * member. When it wakes, what it had finished and not committed is not its to commit any more. */
static void test_thread_that_does_not_poll(void **state)
{
    struct fixture *f = *state;
    send_prompt(f, good);
    start_worker(f, "kafka.max.poll.interval.ms=3000\nkafka.session.timeout.ms=3000\n"
                 "commit.interval_ms=3600000\npoison.max_attempts=0\n"
                 "kafka.auto.offset.reset=earliest\n");
    expect(f, "replies", NULL);
    send_prompt(f, good);
    send_prompt(f, good);
    kill(f->worker, SIGUSR1);
    int64_t start = lm_now_us();
    rd_kafka_t *other = member(f);
    assert_int_equal(read_one(other), 0);       /* for nothing was committed */
    assert_in_range(lm_now_us() - start, 2500000, WAIT_S * 1000000ll);
    while (read_one(other) < 2)
        ;
    assert_int_equal(rd_kafka_commit(other, NULL, 0), 0);
    wait_committed(f, 3);
    kill(f->worker, SIGUSR2);
    for (int64_t end = lm_now_us() + 3 * 1000000ll; lm_now_us() < end; usleep(200000)) {
        rd_kafka_message_t *m = rd_kafka_consumer_poll(other, 0);
        if (m)
            rd_kafka_message_destroy(m);
        assert_int_equal(committed(f), 3);      /* the worker is awake */
    }
    rd_kafka_consumer_close(other);
    rd_kafka_destroy(other);
    send_prompt(f, "no json");
    expect(f, "dead", "malformed");
    assert_int_equal(end_worker(f), 0);
    assert_in_range(committed(f), 3, 4);        /* 3 if it was no member again yet */
}

/* After an error that leaves open what became of a transaction the producer is made anew, and
 * librdkafka does not let go of the old one: the worker must not stand there for ever. */
static void test_producer_that_stays(void **state)
{
    struct fixture *f = *state;
    int st;
    send_prompt(f, good);
    rd_kafka_mock_push_request_errors(f->mock, API_END_TXN, 1,
                                      RD_KAFKA_RESP_ERR_INVALID_TXN_STATE);
    start_worker(f, "delivery.mode=exactly-once\ndestroy hangs\n");
    int64_t start = lm_now_us();
    waitpid(f->worker, &st, 0);
    f->worker = 0;
    assert_true(WIFEXITED(st) && WEXITSTATUS(st) == 1);
    assert_in_range(lm_now_us() - start, 14 * 1000000, 2 * WAIT_S * 1000000);
}

/* The broker goes away under a running worker, and the prompts behind it are answered after. */
/* Records wait for those on their way, to travel together, but not for long: one that is not
 * acknowledged holds up no other. */
static void test_reply_behind_one_without_an_answer(void **state)
{
    enum { SILENT_MS = 8000 };
    struct fixture *f = *state;
    int64_t low, high = 0;
    send_prompt(f, good);
    rd_kafka_mock_broker_push_request_error_rtts(f->mock, 1, API_PRODUCE, 1,
                                                 RD_KAFKA_RESP_ERR_NO_ERROR, SILENT_MS);
    start_worker(f, "");
    expect(f, "replies", NULL);
    int64_t silent_us = lm_now_us();
    send_prompt(f, good);
    while (high < 2 && lm_now_us() - silent_us < SILENT_MS * 1000) {
        usleep(50000);
        rd_kafka_query_watermark_offsets(f->reader, "replies", 0, &low, &high, 1000);
    }
    assert_true(lm_now_us() - silent_us < SILENT_MS * 1000 / 2);
    assert_true(committed(f) <= 0);
    wait_committed(f, 2);
    assert_int_equal(end_worker(f), 0);
}

static void test_broker_outage(void **state)
{
    struct fixture *f = *state;
    send_prompt(f, good);
    start_worker(f, "kafka.reconnect.backoff.max.ms=500\n");
    expect(f, "replies", NULL);
    wait_committed(f, 1);
    rd_kafka_mock_broker_set_down(f->mock, 1);
    sleep(2);
    rd_kafka_mock_broker_set_up(f->mock, 1);
    send_prompt(f, "no json");
    expect(f, "dead", "malformed");
    wait_committed(f, 2);
    assert_int_equal(end_worker(f), 0);
}

/* A broker that takes requests and never answers: librdkafka's own close would wait for ever. */
static void test_silent_broker(void **state)
{
    struct fixture *f = *state;
    send_prompt(f, good);
    start_worker(f, "commit.interval_ms=10\ndrain.timeout_ms=1000\n");
    expect(f, "replies", NULL);
    wait_committed(f, 1);
    close_reader(f);                    /* it would hang as well */
    rd_kafka_mock_broker_set_rtt(f->mock, 1, 300000);
    sleep(1);
    int64_t start = lm_now_us();
    assert_int_equal(end_worker(f), 0);
    assert_true(lm_now_us() - start < 25 * 1000000ll);
}

/* ---- HTTP ------------------------------------------------------------------------------- */

static int local_socket(struct sockaddr_in *at, int port)
{
    *at = (struct sockaddr_in){ .sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    return socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
}

/* A port that is taken, so that the worker must find the next one. */
static int take_port(int *fd)
{
    struct sockaddr_in at;
    for (int port = 21000 + (int)getpid() % 8000; port < 31000; port += 7) {
        *fd = local_socket(&at, port);
        if (!bind(*fd, (struct sockaddr *)&at, sizeof at) && !listen(*fd, 1))
            return port;
        close(*fd);
    }
    return -1;
}

/* The whole response, NUL-terminated; "" when nobody answers, or somebody who says nothing. */
static const char *get(int port, const char *path)
{
    static char text[65536];
    struct sockaddr_in at;
    char request[128];
    size_t n = 0;
    int fd = local_socket(&at, port);
    text[0] = '\0';
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &(struct timeval){ .tv_sec = 10 },
               sizeof(struct timeval));
    if (!connect(fd, (struct sockaddr *)&at, sizeof at)) {
        int len = snprintf(request, sizeof request, "GET %s HTTP/1.0\r\n\r\n", path);
        assert_int_equal(write(fd, request, (size_t)len), len);
        for (ssize_t r; n < sizeof text - 1 && (r = read(fd, text + n, sizeof text - 1 - n)) > 0;)
            n += (size_t)r;
        text[n] = '\0';
    }
    close(fd);
    return text;
}

static bool is_sample(const char *line)
{
    char *end;
    const char *value = strrchr(line, ' ');
    if (strncmp(line, "loramill_", 9) || !value)
        return false;
    strtod(value + 1, &end);
    return end != value + 1 && !*end;
}

static void check_exposition(const char *body)
{
    char *copy = strdup(body), *save = NULL;
    int samples = 0;
    for (char *line = strtok_r(copy, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        if (!strncmp(line, "# HELP loramill_", 16) || !strncmp(line, "# TYPE loramill_", 16))
            continue;
        if (!is_sample(line))
            fail_msg("not a sample: %s", line);
        samples++;
    }
    free(copy);
    assert_true(samples > 100);
}

/* The first port after `from` at which a worker of this name serves; others may have taken some. */
static int serves_at(int from, const char *name)
{
    char label[64];
    snprintf(label, sizeof label, "worker=\"%s\"", name);
    for (int port = from + 1; port < from + 100; port++)
        if (strstr(get(port, "/metrics"), label))
            return port;
    return -1;
}

/* The page, once `row` is in it: rows of partitions come with librdkafka's next statistics. */
static const char *wait_row(int port, const char *row)
{
    const char *page = get(port, "/metrics");
    for (int i = 0; !strstr(page, row) && i < WAIT_S * 10; i++) {
        usleep(100000);
        page = get(port, "/metrics");
    }
    assert_non_null(strstr(page, row));
    return page;
}

static void test_http(void **state)
{
    struct fixture *f = *state;
    char lines[128], name[32];
    int taken, busy = take_port(&taken);
    assert_true(busy > 0);
    snprintf(name, sizeof name, "http-%d", (int)getpid());
    snprintf(lines, sizeof lines, "http.address=127.0.0.1\nhttp.port=%d\nworker.name=%s\n", busy,
             name);
    send_prompt(f, good);
    start_worker(f, lines);
    expect(f, "replies", NULL);
    wait_committed(f, 1);
    int port = serves_at(busy, name);
    assert_true(port > busy);
    assert_non_null(strstr(get(port, "/startupz"), " 200 "));
    assert_non_null(strstr(get(port, "/readyz"), " 200 "));
    assert_non_null(strstr(get(port, "/livez"), " 200 "));
    assert_non_null(strstr(get(port, "/"), " 404 "));
    const char *page = wait_row(port, "offset_committed{topic=\"prompts\",partition=\"0\"} 1\n");
    assert_non_null(strstr(page, "\nloramill_records_total{outcome=\"completed\"} 1\n"));
    assert_non_null(strstr(page, "\nloramill_consumed_records_total 1\n"));
    check_exposition(strstr(page, "\r\n\r\n") + 4);
    assert_int_equal(end_worker(f), 0);
    close(taken);
}

static long long gauge_of(const char *page, const char *name)
{
    const char *at = strstr(page, name);
    assert_non_null(at);
    return strtoll(at + strlen(name), NULL, 10);
}

/* Starts a worker that serves HTTP; its port. */
static int start_serving(struct fixture *f, const char *config)
{
    char lines[512], name[32];
    int taken, busy = take_port(&taken), port = -1;
    assert_true(busy > 0);
    snprintf(name, sizeof name, "serves-%d", (int)getpid());
    snprintf(lines, sizeof lines, "http.address=127.0.0.1\nhttp.port=%d\nworker.name=%s\n%s", busy,
             name, config);
    start_worker(f, lines);
    for (int i = 0; port < 0 && i < WAIT_S * 10; usleep(100000), i++)
        port = serves_at(busy, name);
    close(taken);
    assert_true(port > busy);
    return port;
}

/* A reply that is not acknowledged: its tokens are spent, its bytes count beside the record's. */
static void test_what_counts_against_budgets(void **state)
{
    struct fixture *f = *state;
    rd_kafka_mock_topic_set_error(f->mock, "replies", RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS);
    send_prompt(f, good);
    int port = start_serving(f, "");
    wait_row(port, "\nloramill_in_flight_records 1\n");
    const char *page = wait_row(port, "\nloramill_in_flight_tokens 0\n");
    long long record = (long long)strlen(good) + (long long)sizeof(struct job);
    assert_int_equal(gauge_of(page, "\nloramill_in_flight_records "), 1);
    assert_true(gauge_of(page, "\nloramill_in_flight_bytes ") > record + 100);
    rd_kafka_mock_topic_set_error(f->mock, "replies", RD_KAFKA_RESP_ERR_NO_ERROR);
    expect(f, "replies", NULL);
    page = wait_row(port, "\nloramill_in_flight_records 0\n");
    assert_int_equal(gauge_of(page, "\nloramill_in_flight_bytes "), 0);
    assert_int_equal(gauge_of(page, "\nloramill_in_flight_tokens "), 0);
    assert_int_equal(end_worker(f), 0);
}

/* Orders are remembered: those for an id that no prompt can have are none. */
static void test_orders_for_impossible_ids(void **state)
{
    struct fixture *f = *state;
    static const int lengths[] = { 513, 5000, 512, 100000 };
    static char json[100100];
    rd_kafka_mock_topic_create(f->mock, "control", 1, 1);
    for (size_t i = 0; i < LM_COUNT(lengths); i++) {
        int n = snprintf(json, sizeof json, "{\"cancel\":\"%0*d\"}", lengths[i], 7);
        assert_int_equal(n, lengths[i] + 13);
        send_record(f, "control", json);
    }
    int port = start_serving(f, "topics.control=control\n");
    for (int i = 0; !strstr(get(port, "/startupz"), " 200 ") && i < WAIT_S * 10; i++)
        usleep(100000);                 /* it has read them all by then */
    assert_int_equal(gauge_of(get(port, "/metrics"), "\nloramill_cancel_orders_total "), 1);
    assert_int_equal(end_worker(f), 0);
}

/* Two owners in a row have died while the first prompt was unfinished: it runs alone. */
static void suspect_the_first(struct fixture *f)
{
    const struct quarantine_mark m = { .fence = 1, .until = 1, .suspect = -1, .owner = 1,
                                       .deaths = 1 };
    char text[QUARANTINE_TEXT_MAX + 1];
    rd_kafka_t *c = client(f, RD_KAFKA_CONSUMER, "g");
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(1);
    rd_kafka_topic_partition_t *p = rd_kafka_topic_partition_list_add(l, "prompts", 0);
    p->offset = 0;
    p->metadata_size = quarantine_text(&m, 0, text);
    p->metadata = strdup(text);
    assert_int_equal(rd_kafka_commit(c, l, 0), 0);
    rd_kafka_topic_partition_list_destroy(l);
    rd_kafka_destroy(c);
}

/* It has left the engine, but its reply can't be encoded, for the registry is away: others need not
 * wait for that. */
static void test_reply_of_a_suspect_waits(void **state)
{
    struct fixture *f = *state;
    suspect_the_first(f);
    send_prompt(f, good);
    send_prompt(f, good);
    int port = start_serving(f, "replies.encoding=avro\nregistry.url=http://127.0.0.1:1\n"
                             "drain.timeout_ms=1000\n");
    wait_row(port, "\nloramill_processing_seconds_count 2\n");
    assert_int_equal(end_worker(f), 0);
    assert_true(committed(f) <= 0);
}

/* A worker with one prompt, whose reply is refused again and again. */
static void start_unacknowledged(struct fixture *f, const char *config)
{
    send_prompt(f, good);
    rd_kafka_mock_topic_set_error(f->mock, "replies",
                                  RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED);
    int port = start_serving(f, config);
    wait_row(port, "\nloramill_in_flight_records 1\n");
    wait_row(port, "\nloramill_in_flight_tokens 0\n");       /* it has left the engine */
}

/* SIGTERM while a reply can't be delivered: the worker ends in its budget and commits nothing. */
static void test_sigterm_with_unacknowledged(void **state)
{
    struct fixture *f = *state;
    start_unacknowledged(f, "drain.timeout_ms=1000\n");
    int64_t start = lm_now_us();
    assert_int_equal(end_worker(f), 0);
    assert_true(lm_now_us() - start < 10 * 1000000ll);
    assert_true(committed(f) <= 0);          /* 0 says "read 0 next" */
}

/* A second signal doesn't wait for the drain. */
static void test_second_signal(void **state)
{
    struct fixture *f = *state;
    start_unacknowledged(f, "drain.timeout_ms=60000\n");
    int64_t start = lm_now_us();
    kill(f->worker, SIGTERM);
    sleep(1);
    assert_int_equal(waitpid(f->worker, &(int){ 0 }, WNOHANG), 0);
    assert_int_equal(end_worker(f), 1);
    assert_true(lm_now_us() - start < 20 * 1000000ll);      /* at once, if slowly */
}

/* A transaction whose offsets are refused is aborted and done again: after a rebalance, and for a
 * broker with a small offset.metadata.max.bytes, with a map that fits. */
static void test_transaction_errors_heal(void **state)
{
    struct fixture *f = *state;
    send_prompt(f, good);
    rd_kafka_mock_push_request_errors(f->mock, API_TXN_OFFSET_COMMIT, 3,
                                      RD_KAFKA_RESP_ERR_OFFSET_METADATA_TOO_LARGE,
                                      RD_KAFKA_RESP_ERR_ILLEGAL_GENERATION,
                                      RD_KAFKA_RESP_ERR_OFFSET_METADATA_TOO_LARGE);
    int port = start_serving(f, "delivery.mode=exactly-once\n");
    expect(f, "replies", NULL);
    const char *page = wait_row(port, "\nloramill_records_total{outcome=\"completed\"} 1\n");
    assert_non_null(strstr(page, "\nloramill_transaction_aborts_total 3\n"));
    assert_int_equal(end_worker(f), 0);
}

static void test_bad_property_fails_at_once(void **state)
{
    struct fixture *f = *state;
    int st;
    start_worker(f, "kafka.no.such=1\n");
    waitpid(f->worker, &st, 0);
    f->worker = 0;
    assert_true(WIFEXITED(st) && WEXITSTATUS(st) == 1);
}

/* replies.encoding=avro and no schema: the end, before a prompt is read. */
static void test_missing_reply_schema_fails_at_once(void **state)
{
    struct fixture *f = *state;
    static const char none[] = "{\"error_code\": 40401, \"message\": \"Subject not found.\"}";
    struct server s = { 0 };
    char lines[256];
    int st;
    server_start(&s);
    server_set(&s, 404, none, sizeof none - 1);
    send_prompt(f, good);
    snprintf(lines, sizeof lines, "replies.encoding=avro\nregistry.url=%s\n"
             "registry.auto_register=false\n", s.url);
    start_worker(f, lines);
    waitpid(f->worker, &st, 0);
    f->worker = 0;
    assert_true(server_seen(&s)->requests > 0);
    server_stop(&s);
    assert_true(WIFEXITED(st) && WEXITSTATUS(st) == 1);
    assert_true(committed(f) < 0);
}

/* ... but a registry that is away is waited for. */
static void test_registry_outage_at_start(void **state)
{
    struct fixture *f = *state;
    send_prompt(f, "{\"id\":\"a\"}");      /* needs no registry */
    start_worker(f, "replies.encoding=avro\nregistry.url=http://127.0.0.1:1\n");
    expect(f, "dead", "invalid");
    wait_committed(f, 1);
    assert_int_equal(end_worker(f), 0);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_reply_then_commit), TEST(test_produce_errors_heal),
        TEST(test_broker_refuses_size), TEST(test_small_reply_is_tried_again),
        TEST(test_own_size_limit), TEST(test_dead_letter_blocks_offset),
        TEST(test_large_dead_letter_is_trimmed), TEST(test_huge_dead_letter_goes_bare),
        TEST(test_commit_errors_heal), TEST(test_broker_outage),
        TEST(test_reply_behind_one_without_an_answer),
        TEST(test_commit_of_an_old_generation), TEST(test_transaction_errors_heal),
        TEST(test_thread_that_does_not_poll), TEST(test_producer_that_stays),
        TEST(test_sigterm_with_unacknowledged), TEST(test_second_signal), TEST(test_silent_broker),
        TEST(test_http), TEST(test_what_counts_against_budgets),
        TEST(test_orders_for_impossible_ids), TEST(test_reply_of_a_suspect_waits),
        TEST(test_bad_property_fails_at_once),
        TEST(test_missing_reply_schema_fails_at_once), TEST(test_registry_outage_at_start),
    };
    signal(SIGPIPE, SIG_IGN);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
