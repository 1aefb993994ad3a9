/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_fatal.c - a client that says it is at its end: the worker latches that, says so at
 * /livez, and ends with status 1; it never goes on with a dead client, ready and idle.
 *
 * A whole worker runs in a forked child against librdkafka's mock cluster. This program defines
 * rd_kafka_new() and rd_kafka_consumer_close_queue(), which win over the shared library's: the
 * first remembers the handles, so that SIGUSR1 (the producer's) and SIGUSR2 (the consumer's) can
 * raise a fatal error there; the second asks the probes at the very moment when the worker leaves
 * the group, and stays there until the test lets it go on, if it has a gate.
 *
 * And an orderly end, whenever the signal comes and whichever thread the kernel hands it to; who
 * asks for pages meanwhile gets them whole, or is refused, and never reads what is gone.
 */
#include <arpa/inet.h>
#include <dirent.h>
#include <dlfcn.h>
#include <netinet/in.h>
#include <pthread.h>
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
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include <librdkafka/rdkafka.h>

#include "worker/tools/commands.h"
#include "worker/worker.h"

static rd_kafka_t *_Atomic handles[2];          /* by rd_kafka_type_t: producer, consumer */
static int port, report = -1;
static int gate[2] = { -1, -1 };        /* a byte from the parent opens it */

/* ---- HTTP ------------------------------------------------------------------------------- */

/* A connection that has asked for the page, or -1. */
static int asked(const char *path)
{
    char text[64];
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                              .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int len = snprintf(text, sizeof text, "GET %s HTTP/1.0\r\n\r\n", path);
    if (!connect(fd, (struct sockaddr *)&at, sizeof at) &&
        send(fd, text, (size_t)len, MSG_NOSIGNAL) == len)
        return fd;
    close(fd);
    return -1;
}

/* The status, or 0 when nobody answers. */
static int get(const char *path)
{
    char text[512] = "";
    int status = 0, fd = asked(path);
    ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
    text[n > 0 ? n : 0] = '\0';
    sscanf(text, "HTTP/%*s %d", &status);
    if (fd >= 0)
        close(fd);
    return status;
}

static void find_port(void)
{
    for (port = 22000 + (int)getpid() % 8000; port < 31000; port += 7) {
        struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        bool is_free = !bind(fd, (struct sockaddr *)&at, sizeof at);
        close(fd);
        if (is_free)
            return;
    }
    fail_msg("no free port");
}

/* ---- in the child ----------------------------------------------------------------------- */

rd_kafka_t *rd_kafka_new(rd_kafka_type_t type, rd_kafka_conf_t *conf, char *why, size_t n)
{
    rd_kafka_t *(*real)(rd_kafka_type_t, rd_kafka_conf_t *, char *, size_t) =
        (__typeof__(real))dlsym(RTLD_NEXT, "rd_kafka_new");
    rd_kafka_t *rk = real(type, conf, why, n);
    atomic_store(&handles[type], rk);
    return rk;
}

static bool told_early;

/* The first that the command asks of the library, before it begins anything. */
rd_kafka_conf_t *rd_kafka_conf_new(void)
{
    rd_kafka_conf_t *(*real)(void) = (__typeof__(real))dlsym(RTLD_NEXT, "rd_kafka_conf_new");
    if (told_early) {
        raise(SIGHUP);
        raise(SIGTERM);
        _exit(97);
    }
    return real();
}

rd_kafka_error_t *rd_kafka_consumer_close_queue(rd_kafka_t *rk, rd_kafka_queue_t *q)
{
    rd_kafka_error_t *(*real)(rd_kafka_t *, rd_kafka_queue_t *) =
        (__typeof__(real))dlsym(RTLD_NEXT, "rd_kafka_consumer_close_queue");
    int statuses[2] = { get("/livez"), get("/readyz") };
    char open;
    if (write(report, statuses, sizeof statuses) != sizeof statuses)
        abort();
    if (gate[0] >= 0 && read(gate[0], &open, 1) < 0)
        abort();
    return real(rk, q);
}

void __real_store_free(store *s);
void __wrap_store_free(store *s);
void __wrap_store_free(store *s)
{
    __real_store_free(s);
    int status = s ? get("/metrics") : 0;
    if (s && write(report, &status, sizeof status) != sizeof status)
        abort();
}

/* Older than worker_run(), it blocks none of its signals: for these it is a library's thread. */
static void *raise_errors(void *arg)
{
    int sig;
    pthread_setname_np(pthread_self(), "stranger");
    while (sigwait(arg, &sig) == 0)
        rd_kafka_test_fatal_error(atomic_load(&handles[sig == SIGUSR1 ? RD_KAFKA_PRODUCER :
                                                       RD_KAFKA_CONSUMER]),
                                  sig == SIGUSR1 ? RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER :
                                                   RD_KAFKA_RESP_ERR_FENCED_INSTANCE_ID,
                                  "the test says so");
    return NULL;
}

static void set(struct config *c, const char *assignment)
{
    struct lm_err err;
    if (config_set(c, assignment, &err)) {
        fprintf(stderr, "%s\n", err.msg);
        _exit(99);
    }
}

static const char *cache;       /* adapters.cache_dir=, of a worker that has a store */

static void child(const char *mode)
{
    struct config c;
    struct lm_err err;
    char line[64];
    pthread_t thread;
    static sigset_t signals;
    static const char *const lines[] = {
        "engine.mode=echo", "topics.dead_letters=dead", "group.id=g", "worker.name=w",
        "http.address=127.0.0.1", "poison.max_attempts=0", "kafka.test.mock.num.brokers=1",
        "kafka.bootstrap.servers=127.0.0.1:1",
    };
    sigemptyset(&signals);
    sigaddset(&signals, SIGUSR1);
    sigaddset(&signals, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    if (config_init(&c, &err) || pthread_create(&thread, NULL, raise_errors, &signals))
        _exit(98);
    for (size_t i = 0; i < LM_COUNT(lines); i++)
        set(&c, lines[i]);
    set(&c, mode);
    if (cache) {
        set(&c, cache);
        set(&c, "adapters.url=http://127.0.0.1:1/{adapter}");
    }
    snprintf(line, sizeof line, "http.port=%d", port);
    set(&c, line);
    _exit(worker_run(&c));
}

/* ---- in the parent ---------------------------------------------------------------------- */

static pid_t start(const char *mode, int *statuses)
{
    int fds[2];
    find_port();
    assert_int_equal(pipe(fds), 0);
    pid_t pid = fork();
    if (pid == 0) {
        close(fds[0]);
        close(gate[1]);         /* or who is left behind waits for itself */
        report = fds[1];
        child(mode);
    }
    close(fds[1]);
    *statuses = fds[0];
    for (int64_t end = lm_now_us() + 60 * 1000000ll; get("/readyz") != 200; usleep(50000))
        assert_true(lm_now_us() < end);
    assert_int_equal(get("/livez"), 200);
    return pid;
}

static int wait_end(pid_t pid, int seconds)
{
    int st;
    for (int64_t end = lm_now_us() + seconds * 1000000ll; lm_now_us() < end; usleep(20000))
        if (waitpid(pid, &st, WNOHANG) == pid)
            return WIFEXITED(st) ? WEXITSTATUS(st) : 128 + WTERMSIG(st);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    return -1;
}

/* `livez`: what it says at the end. */
static void expect_end(const char *mode, int sig, int status, int livez)
{
    int fd, statuses[2] = { 0 };
    pid_t pid = start(mode, &fd);
    kill(pid, sig);
    assert_int_equal(wait_end(pid, 30), status);
    assert_int_equal(read(fd, statuses, sizeof statuses), sizeof statuses);
    close(fd);
    assert_int_equal(statuses[0], livez);
    assert_int_equal(statuses[1], 503);
}

static void test_fatal_producer(void **state)
{
    (void)state;
    expect_end("delivery.mode=at-least-once", SIGUSR1, 1, 503);
}

static void test_fatal_consumer(void **state)
{
    (void)state;
    expect_end("delivery.mode=at-least-once", SIGUSR2, 1, 503);
    expect_end("delivery.mode=exactly-once", SIGUSR2, 1, 503);
}

/* A transactional producer can be made anew, unless another has its id: the worker goes on. */
static void test_fatal_transactional(void **state)
{
    (void)state;
    int fd;
    pid_t pid = start("delivery.mode=exactly-once", &fd);
    kill(pid, SIGUSR1);
    sleep(2);
    assert_int_equal(get("/livez"), 200);
    kill(pid, SIGTERM);
    assert_int_equal(wait_end(pid, 30), 0);
    close(fd);
}

/* What runs may never end then: its engine may be at its end, or its group. */
static void test_failure_in_the_drain(void **state)
{
    (void)state;
    struct worker w = { 0 };
    int64_t end = lm_now_us() + 3600 * INT64_C(1000000);
    atomic_store(&w.drain_end_us, end);
    atomic_store(&w.stopping, true);
    worker_fail(&w, LM_DEVICE, "the engine can't go on");
    assert_true(atomic_load(&w.cancelling));
    assert_true(atomic_load(&w.drain_end_us) < end);
    assert_int_equal(atomic_load(&w.failed), LM_DEVICE);
}

/* Each of the three threads that a prompt passes is missed. */
static void test_silent_thread(void **state)
{
    (void)state;
    struct config c;
    struct lm_err err;
    struct worker w = { .cfg = &c };
    atomic_llong *beats[] = { &w.consumer_beat_us, &w.intake_beat_us, &w.outbox_beat_us };
    char line[64];
    http *h;
    find_port();
    snprintf(line, sizeof line, "http.port=%d", port);
    assert_int_equal(config_init(&c, &err), LM_OK);
    set(&c, "http.address=127.0.0.1");
    set(&c, line);
    assert_int_equal(http_new(&w, &h, &err), LM_OK);
    atomic_store(&w.started, true);
    for (size_t silent = 0; silent <= LM_COUNT(beats); silent++) {
        for (size_t i = 0; i < LM_COUNT(beats); i++)
            atomic_store(beats[i], lm_now_us() - (i == silent ? 61 : 1) * INT64_C(1000000));
        assert_int_equal(get("/livez"), silent == LM_COUNT(beats) ? 200 : 503);
    }
    http_free(h);
    config_release(&c);
}

/* The kernel hands a thread that blocks no signals those that nobody waits for at that moment. */
static void kill_stranger(pid_t pid, int sig)
{
    char path[300], name[32] = "";
    snprintf(path, sizeof path, "/proc/%d/task", (int)pid);
    DIR *d = opendir(path);
    assert_non_null(d);
    for (struct dirent *e; strcmp(name, "stranger\n") != 0 && (e = readdir(d));) {
        snprintf(path, sizeof path, "/proc/%d/task/%s/comm", (int)pid, e->d_name);
        FILE *f = e->d_name[0] == '.' ? NULL : fopen(path, "r");
        if (f && fgets(name, sizeof name, f) && !strcmp(name, "stranger\n"))
            assert_int_equal(syscall(SYS_tgkill, pid, atoi(e->d_name), sig), 0);
        if (f)
            fclose(f);
    }
    closedir(d);
    assert_string_equal(name, "stranger\n");
}

static void test_signal_to_a_stranger(void **state)
{
    (void)state;
    int fd, statuses[2] = { 0 };
    pid_t pid = start("delivery.mode=at-least-once", &fd);
    kill_stranger(pid, SIGHUP);         /* no end: credentials are read again */
    usleep(300000);
    assert_int_equal(get("/readyz"), 200);
    kill_stranger(pid, SIGTERM);
    assert_int_equal(wait_end(pid, 30), 0);
    assert_int_equal(read(fd, statuses, sizeof statuses), sizeof statuses);
    close(fd);
    assert_int_equal(statuses[0], 200);
}

/* Told to end while it reads its configuration; SIGHUP, which means something only later, is no end
 * at all. */
static void test_signal_before_the_start(void **state)
{
    (void)state;
    pid_t pid = fork();
    if (pid == 0) {
        const char *argv[] = { "worker", "-c", "/dev/null", "--set", "topics.prompts=p",
                               "--set", "topics.replies=r", "--set", "topics.dead_letters=d",
                               "--set", "engine.mode=echo", "--set", "kafka.bootstrap.servers=x:1",
                               NULL };
        told_early = true;
        _exit(cmd_worker((int)LM_COUNT(argv) - 1, (char **)(uintptr_t)argv));
    }
    assert_int_equal(wait_end(pid, 30), 0);
}

/* An orderly end is none: livez says 200 to the end. */
static void test_no_failure(void **state)
{
    (void)state;
    expect_end("delivery.mode=at-least-once", SIGTERM, 0, 200);
}

/* Is there a whole page? Else it was refused, or cut, which its length tells. */
static bool scraped(void)
{
    static char text[256 * 1024];
    size_t n = 0;
    int fd = asked("/metrics"), status = 0;
    for (ssize_t got; fd >= 0 && (got = read(fd, text + n, sizeof text - 1 - n)) > 0;)
        n += (size_t)got;
    if (fd >= 0)
        close(fd);
    text[n] = '\0';
    const char *length = strstr(text, "Content-Length: "), *body = strstr(text, "\r\n\r\n");
    return sscanf(text, "HTTP/%*s %d", &status) == 1 && status == 200 && length && body &&
           strtoul(length + 16, NULL, 10) == strlen(body + 4);
}

/* Pages are asked for without a pause until there is nobody, and once the store is gone by whoever
 * has just freed it. The worker does not leave its group before the first is here, however long
 * the kernel runs nobody but the worker. */
static void test_scraped_to_the_end(void **state)
{
    (void)state;
    char dir[] = "/tmp/loramill-fatal-XXXXXX", line[64], command[64];
    int fd, got[3] = { 0 }, whole = 0;
    snprintf(line, sizeof line, "adapters.cache_dir=%s", mkdtemp(dir));
    cache = line;
    assert_int_equal(pipe(gate), 0);
    pid_t pid = start("delivery.mode=at-least-once", &fd);
    cache = NULL;
    assert_true(scraped());
    kill(pid, SIGTERM);
    for (int64_t end = lm_now_us() + 30 * 1000000ll; scraped(); whole++) {
        assert_true(lm_now_us() < end);
        if (!whole)
            assert_int_equal(write(gate[1], "", 1), 1);
    }
    for (int i = 0; i < 2; i++) {
        close(gate[i]);
        gate[i] = -1;
    }
    assert_true(whole > 0);             /* while it drains, leaves the group, ... */
    assert_int_equal(wait_end(pid, 30), 0);
    assert_int_equal(read(fd, got, sizeof got), sizeof got);
    close(fd);
    assert_int_equal(got[0], 200);
    assert_int_equal(got[2], 0);        /* the store is gone */
    snprintf(command, sizeof command, "rm -rf %s", dir);
    assert_int_equal(system(command), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fatal_producer),
        cmocka_unit_test(test_fatal_consumer),
        cmocka_unit_test(test_fatal_transactional),
        cmocka_unit_test(test_failure_in_the_drain),
        cmocka_unit_test(test_no_failure),
        cmocka_unit_test(test_silent_thread),
        cmocka_unit_test(test_scraped_to_the_end),
        cmocka_unit_test(test_signal_to_a_stranger),
        cmocka_unit_test(test_signal_before_the_start),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
