/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_dev.c - `loramill dev`: its adapter store over HTTP, its broker, its property file,
 * and the way through them of a prompt that is cancelled.
 *
 * The worker is a process of its own, forked before there is any thread; it waits on a pipe until
 * it is wanted.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <arpa/inet.h>
#include <jansson.h>
#include <librdkafka/rdkafka.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "worker/config.h"
#include "worker/tools/commands.h"
#include "worker/tools/dev_broker.h"
#include "worker/tools/dev_store.h"

static char dir[] = "/tmp/loramill-dev-XXXXXX";
static dev_store *store;
static pid_t worker;
static int worker_start;            /* write end: one byte starts it */

/* ---- a folder of adapters, and a client without opinions -------------------------------- */

static void put(const char *id, const char *name, const char *text)
{
    char path[256], cmd[320];
    snprintf(cmd, sizeof cmd, "mkdir -p %s/adapters/%s", dir, id);
    assert_int_equal(system(cmd), 0);
    snprintf(path, sizeof path, "%s/adapters/%s/%s", dir, id, name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

/* Sends `request` as it stands and returns all that comes back. */
static const char *talk(const char *request)
{
    static char answer[65536];
    size_t n = 0;
    ssize_t got;
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                              .sin_port = htons((uint16_t)dev_store_port(store)) };
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct timeval tv = { .tv_sec = 2 };
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
    assert_int_equal(connect(fd, (struct sockaddr *)&at, sizeof at), 0);
    assert_int_equal(send(fd, request, strlen(request), MSG_NOSIGNAL), strlen(request));
    while ((got = recv(fd, answer + n, sizeof answer - 1 - n, 0)) > 0)
        n += (size_t)got;
    close(fd);
    answer[n] = '\0';
    return answer;
}

static const char *ask(const char *method, const char *path, const char *headers)
{
    char request[4096];
    snprintf(request, sizeof request, "%s %s HTTP/1.1\r\nHost: h\r\nConnection: close\r\n%s\r\n",
             method, path, headers);
    return talk(request);
}

static int code_of(const char *answer)
{
    int code = 0;
    sscanf(answer, "HTTP/1.1 %d", &code);
    return code;
}

static const char *body_of(const char *answer)
{
    const char *end = strstr(answer, "\r\n\r\n");
    return end ? end + 4 : "";
}

static void etag_of(const char *answer, char out[128])
{
    const char *at = strstr(answer, "ETag: ");
    assert_non_null(at);
    snprintf(out, 128, "%.*s", (int)strcspn(at + 6, "\r\n"), at + 6);
}

/* ---- the store -------------------------------------------------------------------------- */

#define WEIGHTS "/x/adapter_model.safetensors"

static void test_serves_the_two_files(void **state)
{
    (void)state;
    const char *a = ask("GET", "/brand/voice/adapter_config.json", "");
    assert_int_equal(code_of(a), 200);
    assert_string_equal(body_of(a), "{\"nested\":1}");
    assert_string_equal(body_of(ask("GET", "/brand/adapter_config.json", "")), "{\"outer\":1}");
    a = ask("HEAD", WEIGHTS, "");
    assert_int_equal(code_of(a), 200);
    assert_non_null(strstr(a, "Content-Length: 10\r\n"));
    assert_string_equal(body_of(a), "");
}

static void test_nothing_else_is_visible(void **state)
{
    (void)state;
    static const char *const paths[] = {
        "/", "/x", "/x/", "/x/secret.txt", "/secret.txt", "/../secret.txt", "/x/../secret.txt",
        "/x/../../secret.txt", "/%2e%2e/adapter_config.json", "/..%2fadapter_config.json",
        "//x/adapter_config.json", "/x//adapter_config.json", "/./x/adapter_config.json",
        "/.hidden/adapter_config.json", "/x/adapter_config.json/", "/x/ADAPTER_CONFIG.JSON",
        "/adapter_config.json", "/missing/adapter_config.json", "/folder/adapter_config.json",
        "/x%5c..%5cadapter_config.json",
    };
    for (size_t i = 0; i < LM_COUNT(paths); i++)
        if (code_of(ask("GET", paths[i], "")) != 404)
            fail_msg("%s: %d", paths[i], code_of(ask("GET", paths[i], "")));
    assert_int_equal(code_of(ask("DELETE", WEIGHTS, "")), 405);
    assert_int_equal(code_of(ask("POST", WEIGHTS, "Content-Length: 0\r\n")), 405);
}

static void test_ranges(void **state)
{
    (void)state;
    static const struct { const char *range; int code; const char *body; } t[] = {
        { "bytes=0-", 206, "0123456789" }, { "bytes=3-", 206, "3456789" },
        { "bytes=3-5", 206, "345" }, { "bytes=9-9", 206, "9" }, { "bytes=3-99", 206, "3456789" },
        { "bytes=-4", 206, "6789" }, { "bytes=-99", 206, "0123456789" },
        { "bytes=10-", 416, NULL }, { "bytes=-0", 416, NULL },
        { "bytes=5-3", 200, "0123456789" }, { "bytes=a-b", 200, "0123456789" },
        { "lines=1-2", 200, "0123456789" }, { "bytes=0-1,3-4", 200, "0123456789" },
        { "bytes=99999999999999999999-", 200, "0123456789" }, { "bytes=", 200, "0123456789" },
    };
    for (size_t i = 0; i < LM_COUNT(t); i++) {
        char header[96];
        snprintf(header, sizeof header, "Range: %s\r\n", t[i].range);
        const char *a = ask("GET", WEIGHTS, header);
        if (code_of(a) != t[i].code || (t[i].body && strcmp(body_of(a), t[i].body) != 0))
            fail_msg("%s: %s", t[i].range, a);
    }
    assert_non_null(strstr(ask("GET", WEIGHTS, "Range: bytes=3-5\r\n"),
                           "Content-Range: bytes 3-5/10\r\n"));
    assert_non_null(strstr(ask("GET", WEIGHTS, "Range: bytes=10-\r\n"),
                           "Content-Range: bytes */10\r\n"));
}

static void test_validators(void **state)
{
    (void)state;
    char etag[128], header[256];
    etag_of(ask("GET", WEIGHTS, ""), etag);
    assert_int_equal(etag[0], '"');
    snprintf(header, sizeof header, "If-None-Match: %s\r\n", etag);
    assert_int_equal(code_of(ask("GET", WEIGHTS, header)), 304);
    snprintf(header, sizeof header, "Range: bytes=3-\r\nIf-Range: %s\r\n", etag);
    assert_string_equal(body_of(ask("GET", WEIGHTS, header)), "3456789");
    assert_string_equal(body_of(ask("GET", WEIGHTS, "Range: bytes=3-\r\nIf-Range: \"old\"\r\n")),
                        "0123456789");
}

static void test_nonsense_requests(void **state)
{
    (void)state;
    char longest[3000];
    memset(longest, 'a', sizeof longest - 1);
    longest[0] = '/';
    longest[sizeof longest - 1] = '\0';
    assert_true(code_of(ask("GET", longest, "")) >= 400);
    talk("\r\n\r\n");
    talk("GET\r\n\r\n");
    assert_int_equal(code_of(ask("GET", WEIGHTS, "")), 200);
}

static void test_store_errors(void **state)
{
    (void)state;
    struct lm_err err = { 0 };
    dev_store *s;
    assert_int_equal(dev_store_new("/nonexistent", 0, &s, &err), LM_NOT_FOUND);
    assert_non_null(strstr(err.msg, "/nonexistent"));
    assert_int_equal(dev_store_new(dir, dev_store_port(store), &s, &err), LM_NET);
    assert_non_null(strstr(err.msg, "can't listen"));
    assert_null(s);
}

/* ---- the broker ------------------------------------------------------------------------- */

static void test_broker_topics(void **state)
{
    (void)state;
    dev_broker *b;
    struct lm_err err = { 0 };
    assert_int_equal(dev_broker_new(1, &b, &err), LM_OK);
    assert_non_null(strstr(dev_broker_address(b), "127.0.0.1:"));
    assert_int_equal(dev_broker_topic(b, "p", 5, &err), LM_OK);
    assert_int_equal(dev_broker_topic(b, "p", 5, &err), LM_INVALID);    /* there already */
    assert_non_null(strstr(err.msg, "'p'"));
    dev_broker_free(b);
}

/* ---- the command ------------------------------------------------------------------------ */

static char properties[256];

static void *run_dev(void *arg)
{
    char folder[128], adapters[128];
    snprintf(folder, sizeof folder, "%s/dev", dir);
    snprintf(adapters, sizeof adapters, "%s/adapters", dir);
    const char *argv[] = { "dev", "-q", "--dir", folder, "--adapters", adapters, "--model", dir,
                           "--partitions", "3", NULL };
    *(int *)arg = cmd_dev(10, (char **)(uintptr_t)argv);
    return NULL;
}

static void run_worker(int fd)
{
    const char *argv[] = { "worker", "-c", properties, "--set", "engine.mode=echo",
                           "--set", "http.port=0", "--set", "log.level=warn", NULL };
    char go;
    if (read(fd, &go, 1) != 1)
        _exit(0);                   /* the test ended without it */
    _exit(cmd_worker(9, (char **)(uintptr_t)argv));
}

static int call(int (*command)(int, char **), const char *a, const char *b, const char *c,
                const char *d, const char *e)
{
    const char *argv[] = { "loramill", "-c", properties, a, b, c, d, e, NULL };
    int argc = 3;
    while (argv[argc])
        argc++;
    return command(argc, (char **)(uintptr_t)argv);
}

/* id -> finish reason, of what `collect` wrote */
static void expect_finish(const char *path, const char *id, const char *wanted)
{
    char line[4096];
    const char *found = NULL;
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    json_t *root = NULL;
    while (!found && fgets(line, sizeof line, f)) {
        json_decref(root);
        root = json_loads(line, 0, NULL);
        const char *got = json_string_value(json_object_get(root, "id"));
        if (got && !strcmp(got, id))
            found = json_string_value(json_object_get(json_array_get(
                json_object_get(root, "choices"), 0), "finish_reason"));
    }
    fclose(f);
    if (!found || strcmp(found, wanted) != 0)
        fail_msg("%s: %s, not %s", id, found ? found : "no outcome", wanted);
    json_decref(root);
}

/* Prompts and an order are there before the worker is: as hard as it gets for an embedded broker,
 * which can't look for times. */
static void cancel_one_of_two(void)
{
    char job[256], out[256], id[600];
    int st;
    snprintf(job, sizeof job, "%s/job.jsonl", dir);
    snprintf(out, sizeof out, "%s/out.jsonl", dir);
    FILE *f = fopen(job, "w");
    assert_non_null(f);
    fputs("{\"id\":\"stays\",\"prompt\":\"x\"}\n{\"id\":\"goes\",\"prompt\":\"x\"}\n", f);
    fclose(f);
    assert_int_equal(call(cmd_submit, "--input", job, "--quiet", NULL, NULL), 0);
    usleep(20000);                  /* an order concerns what was there before it */
    assert_int_equal(call(cmd_cancel, "goes", "nobody", NULL, NULL, NULL), 0);
    snprintf(id, sizeof id, "%0*d", 513, 0);        /* no prompt has such a one */
    assert_int_equal(call(cmd_cancel, "stays", id, NULL, NULL, NULL), 2);
    assert_int_equal(write(worker_start, "x", 1), 1);
    assert_int_equal(call(cmd_collect, "--job", job, "--output", out, "--quiet"), 0);
    expect_finish(out, "stays", "stop");
    expect_finish(out, "goes", "cancelled");
    kill(worker, SIGTERM);
    assert_int_equal(waitpid(worker, &st, 0), worker);
    worker = 0;
    assert_true(WIFEXITED(st));
    assert_int_equal(WEXITSTATUS(st), 0);
}

static void test_dev_writes_properties_and_ends(void **state)
{
    (void)state;
    pthread_t t;
    struct config c;
    struct lm_err err = { 0 };
    int status = -1;
    assert_int_equal(pthread_create(&t, NULL, run_dev, &status), 0);
    for (int i = 0; i < 15000 && access(properties, R_OK) != 0; i++)
        usleep(1000);
    assert_int_equal(config_init(&c, &err), LM_OK);
    if (config_read_file(&c, properties, &err) != LM_OK || config_check(&c, &err) != LM_OK)
        fail_msg("%s", err.msg);
    assert_string_equal(c.topics_prompts, "prompts");
    assert_string_equal(c.topics_control, "control");
    assert_string_equal(c.model_path, dir);
    assert_non_null(strstr(c.adapters_url, "/{adapter}"));
    assert_non_null(config_kafka(&c, CONFIG_BOTH, "bootstrap.servers"));
    config_release(&c);
    cancel_one_of_two();
    kill(getpid(), SIGTERM);
    pthread_join(t, NULL);
    assert_int_equal(status, 0);
    assert_int_not_equal(access(properties, F_OK), 0);
}

static int try_dev(const char *a, const char *b)
{
    const char *argv[] = { "dev", a, b, NULL };
    return cmd_dev(b ? 3 : 2, (char **)(uintptr_t)argv);
}

static void test_dev_usage(void **state)
{
    (void)state;
    assert_int_equal(try_dev("--partitions", "0"), 2);
    assert_int_equal(try_dev("--store-port", "70000"), 2);
    assert_int_equal(try_dev("extra", NULL), 2);
    assert_int_equal(try_dev("--nonsense", NULL), 2);
    assert_int_equal(try_dev("--dir", "/proc/nothing/here"), 1);
}

static bool fork_worker(void)
{
    int fds[2];
    if (pipe(fds) != 0 || (worker = fork()) < 0)
        return false;
    if (worker == 0) {
        close(fds[1]);
        run_worker(fds[0]);
    }
    close(fds[0]);
    worker_start = fds[1];
    return true;
}

int main(void)
{
    struct lm_err err = { 0 };
    char adapters[128], cmd[128];
    if (!mkdtemp(dir))
        return 1;
    snprintf(properties, sizeof properties, "%s/dev/loramill.properties", dir);
    if (!fork_worker())
        return 1;
    put("x", "adapter_config.json", "{}");
    put("x", "adapter_model.safetensors", "0123456789");
    put("x", "secret.txt", "hush");
    put(".", "secret.txt", "hush");
    put(".hidden", "adapter_config.json", "{}");
    put("brand", "adapter_config.json", "{\"outer\":1}");
    put("brand/voice", "adapter_config.json", "{\"nested\":1}");
    put("folder/adapter_config.json", "x", "a folder of that name");
    snprintf(adapters, sizeof adapters, "%s/adapters", dir);
    if (dev_store_new(adapters, 0, &store, &err) != LM_OK) {
        fprintf(stderr, "%s\n", err.msg);
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_serves_the_two_files),
        cmocka_unit_test(test_nothing_else_is_visible),
        cmocka_unit_test(test_ranges),
        cmocka_unit_test(test_validators),
        cmocka_unit_test(test_nonsense_requests),
        cmocka_unit_test(test_store_errors),
        cmocka_unit_test(test_broker_topics),
        cmocka_unit_test(test_dev_writes_properties_and_ends),
        cmocka_unit_test(test_dev_usage),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    dev_store_free(store);
    close(worker_start);            /* ends a worker that was never wanted */
    if (worker > 0)
        kill(worker, SIGKILL);
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    return system(cmd) ? 1 : failed;
}
