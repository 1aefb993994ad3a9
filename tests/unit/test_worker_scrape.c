/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_scrape.c - `loramill status` looks for its workers' metrics: where they are found,
 * and how long hosts that say nothing take. Hosts are addresses of the loopback.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "worker/config.h"
#include "worker/tools/cli.h"
#include "worker/tools/cli_scrape.h"

enum { HOSTS = 8, NEAR = 5, FAR = 60, FIRST_PORT = 21000, LAST_PORT = 31000 };

static int sockets[HOSTS * NEAR + 2], n_sockets, base;
static struct group_member members[HOSTS + 3];
static struct group group = { .members = members };

/* ---- the hosts -------------------------------------------------------------------------- */

static bool listen_at(const char *host, int port)
{
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                              .sin_addr.s_addr = inet_addr(host) };
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockets[n_sockets++] = fd;
    return !bind(fd, (struct sockaddr *)&at, sizeof at) && !listen(fd, 16);
}

static void close_all(void)
{
    while (n_sockets)
        close(sockets[--n_sockets]);
}

static void add(const char *host, const char *name)
{
    struct group_member *m = &members[group.n_members++];
    snprintf(m->host, sizeof m->host, "%s", host);
    snprintf(m->client, sizeof m->client, "%s", name);
}

/* A member each, whose ports take connections and say nothing. */
static bool add_silent_hosts(void)
{
    char host[32], name[32];
    for (int i = 0; i < HOSTS; i++) {
        snprintf(host, sizeof host, "127.0.0.%d", i + 2);
        snprintf(name, sizeof name, "silent-%d", i);
        add(host, name);
        for (int port = base; port < base + NEAR; port++)
            if (!listen_at(host, port))
                return false;
    }
    return true;
}

/* The last two sockets are the workers' on 127.0.0.1: at http.port, and far from it. */
static int begin(void **state)
{
    (void)state;
    for (base = FIRST_PORT; base < LAST_PORT; base += CONFIG_HTTP_PORTS) {
        group.n_members = 0;
        if (add_silent_hosts() && listen_at("127.0.0.1", base) &&
            listen_at("127.0.0.1", base + FAR))
            return 0;
        close_all();
    }
    return -1;
}

static int end(void **state)
{
    (void)state;
    close_all();
    return 0;
}

struct server { int fd; const char *name; pthread_t thread; };

static void *serve(void *arg)
{
    const struct server *s = arg;
    char text[256], question[512];
    int fd = accept(s->fd, NULL, NULL);
    snprintf(text, sizeof text, "HTTP/1.0 200 OK\r\n\r\n"
             "loramill_build_info{version=\"1\",worker=\"%s\"} 1\n", s->name);
    ssize_t n = fd < 0 ? 0 : read(fd, question, sizeof question);
    if (n > 0 && write(fd, text, strlen(text)) < 0)
        perror("write");
    close(fd);
    return NULL;
}

/* ---- tests ------------------------------------------------------------------------------ */

/* One after the other they would take a second each, and another for their other ports. */
static void test_hosts_that_say_nothing(void **state)
{
    (void)state;
    struct scrape_pages pages = { 0 };
    int64_t start = lm_now_us();
    scrape_workers(&group, base, &pages);
    int64_t ms = (lm_now_us() - start) / 1000;
    assert_in_range(ms, SCRAPE_MS / 2, HOSTS * SCRAPE_MS / 2);
    assert_int_equal(pages.n, 0);
    scrape_release(&pages);
}

static void test_workers_near_and_far(void **state)
{
    (void)state;
    struct scrape_pages pages = { 0 };
    struct server s[] = { { .fd = sockets[n_sockets - 2], .name = "near" },
                          { .fd = sockets[n_sockets - 1], .name = "far" } };
    for (int i = 0; i < 2; i++) {
        add("127.0.0.1", s[i].name);
        assert_int_equal(pthread_create(&s[i].thread, NULL, serve, &s[i]), 0);
    }
    add("127.0.0.1", "away");
    scrape_workers(&group, base, &pages);
    for (int i = 0; i < 2; i++)
        pthread_join(s[i].thread, NULL);
    const struct group_member *m = &members[HOSTS];
    for (int i = 0; i < 2; i++) {
        const char *page = scrape_page_of(&pages, &m[i]);
        assert_non_null(page);
        assert_non_null(strstr(page, i ? "worker=\"far\"" : "worker=\"near\""));
    }
    assert_null(scrape_page_of(&pages, &m[2]));
    assert_null(scrape_page_of(&pages, &members[0]));
    assert_int_equal(pages.n, 2);
    scrape_release(&pages);
}

static void *interrupt_soon(void *arg)
{
    const struct timespec soon = { 0, SCRAPE_MS / 10 * 1000000 };
    nanosleep(&soon, NULL);
    kill(getpid(), SIGINT);
    return arg;
}

static void test_interrupted(void **state)
{
    (void)state;
    struct scrape_pages pages = { 0 };
    pthread_t thread;
    bool at_once = false;
    for (int i = 0; i < 5 && !at_once; i++) {           /* the machine may stand still */
        cli_catch_signals();
        int64_t start = lm_now_us();
        assert_int_equal(pthread_create(&thread, NULL, interrupt_soon, NULL), 0);
        scrape_workers(&group, base, &pages);
        pthread_join(thread, NULL);
        at_once = lm_now_us() - start < SCRAPE_MS * 1000;
        assert_int_equal(pages.n, 0);
        scrape_release(&pages);
    }
    assert_true(at_once);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, begin, end)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_hosts_that_say_nothing), TEST(test_workers_near_and_far),
        TEST(test_interrupted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
