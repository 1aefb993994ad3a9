/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_watchdog.c - each way in which the watchdog ends a process: with which status, when,
 * and what it leaves in the journal. Each case is a child that plays a stuck main thread;
 * its engine is engine_stats() below. How a whole worker ends: tests/integration/test_shutdown.sh.
 */
#include <dirent.h>
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "folder.h"
#include "worker/journal.h"
#include "worker/signals.h"
#include "worker/watchdog.h"

enum engine_plays { AT_REST, STEPS, STUCK };

static enum engine_plays plays;

/* Stands before the library's. */
void engine_stats(engine *e, struct engine_stats *out)
{
    (void)e;
    static uint64_t steps;
    *out = (struct engine_stats){ .running = plays != AT_REST, .steps = steps };
    steps += plays == STEPS;
}

/* Likewise; so that no more of the worker is linked. */
void worker_fail(struct worker *w, lm_status status, const char *fmt, ...)
{
    (void)fmt;
    atomic_store(&w->failed, (int)status);
}

static bool no_threads;

int __real_pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*f)(void *), void *arg);
int __wrap_pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*f)(void *), void *arg);

int __wrap_pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*f)(void *), void *arg)
{
    return no_threads ? EAGAIN : __real_pthread_create(t, a, f, arg);
}

struct play {
    enum engine_plays engine;
    int64_t hang_ms;            /* engine.hang_timeout_ms */
    void (*act)(watchdog *d, struct worker *w);
    int signal_ms;              /* then a signal comes; 0: none */
};

static void starting(watchdog *d, struct worker *w)
{
    (void)w;
    watchdog_starting(d);
}

static void draining(watchdog *d, struct worker *w)
{
    (void)w;
    watchdog_draining(d, 1000);
}

static void draining_long(watchdog *d, struct worker *w)
{
    (void)w;
    watchdog_draining(d, 20000);
}

static atomic_bool waits;

static void *stranger(void *arg)
{
    pthread_sigmask(SIG_UNBLOCK, arg, NULL);
    atomic_store(&waits, true);
    while (pause())
        ;
    return NULL;
}

/* A library's thread, which blocks no signals, is handed the one that comes. */
static void give_to_a_stranger(void)
{
    pthread_t t;
    sigset_t ends;
    signals_begin(&ends);
    if (pthread_create(&t, NULL, stranger, &ends))
        _exit(92);
    while (!atomic_load(&waits))
        usleep(1000);
    usleep(50000);      /* ThreadSanitizer loses one that comes as it is unblocked; let it pause */
    pthread_kill(t, SIGTERM);
    pause();
}

static void starting_stranger(watchdog *d, struct worker *w)
{
    starting(d, w);
    give_to_a_stranger();
}

static void draining_stranger(watchdog *d, struct worker *w)
{
    draining_long(d, w);
    give_to_a_stranger();
}

/* Stops itself at work; its watchdog has looked before, and does after. */
static void sleeping(watchdog *d, struct worker *w)
{
    watchdog_draining(d, 20000);
    while (!atomic_load(&w->pulse_us))
        usleep(1000);
    raise(SIGSTOP);
    usleep(300000);
    kill(getpid(), SIGTERM);
}

static void ended_intake(watchdog *d, struct worker *w)
{
    atomic_store(&w->ending, true);
    watchdog_draining(d, 1000);
}

static void stuck_engine(watchdog *d, struct worker *w)
{
    atomic_store(&w->intake_beat_us, lm_now_us() + 60000000);
    watchdog_draining(d, 20000);
}

static void releasing(watchdog *d, struct worker *w)
{
    atomic_store(&w->ending, true);
    watchdog_draining(d, 20000);
    watchdog_releasing(d, 0, 300);
}

static void releasing_failed(watchdog *d, struct worker *w)
{
    atomic_store(&w->failed, LM_STATE);
    atomic_store(&w->ending, true);
    watchdog_draining(d, 20000);
    watchdog_releasing(d, 1, 300);
}

static void releasing_device(watchdog *d, struct worker *w)
{
    releasing_failed(d, w);
    atomic_store(&w->failed, LM_DEVICE);
}

/* No thread could be started: the main thread sees to the end itself. */
static void releasing_alone(watchdog *d, struct worker *w)
{
    no_threads = true;
    releasing(d, w);
    watchdog_await_end(d);
}

static void closing(watchdog *d, struct worker *w)
{
    releasing(d, w);
    watchdog_draining(d, 1000);         /* little is left of the budget */
    watchdog_closing(d);
}

static void ended(watchdog *d, struct worker *w)
{
    releasing(d, w);
    watchdog_closing(d);
    watchdog_stop(d);
}

_Noreturn static void child(const struct play *p)
{
    static struct config cfg;
    static struct worker w;
    struct lm_err err;
    sigset_t signals;
    cfg.hang_timeout_ms = p->hang_ms;
    plays = p->engine;
    w.cfg = &cfg;
    w.engine = (engine *)&w;            /* only ever handed to engine_stats() */
    atomic_store(&w.intake_beat_us, lm_now_us());
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    if (journal_open(dir, "g", &w.journal, &err))
        _exit(90);
    journal_enter(w.journal, 7, true);
    watchdog *d = watchdog_new(&w, &signals);
    p->act(d, &w);
    if (p->act == ended)
        _exit(0);
    if (p->signal_ms) {
        usleep((useconds_t)p->signal_ms * 1000);
        kill(getpid(), SIGTERM);
    }
    pause();
    _exit(91);
}

/* Returns the status, and how long it took. */
static int play(const struct play *p, int64_t *ms)
{
    int st;
    int64_t start = lm_now_us();
    pid_t pid = fork();
    if (pid == 0)
        child(p);
    waitpid(pid, &st, 0);
    *ms = (lm_now_us() - start) / 1000;
    return WIFEXITED(st) ? WEXITSTATUS(st) : 128 + WTERMSIG(st);
}

enum left { NOTHING, KILLED, HUNG };

/* ms; a slow machine's, and well before the 20 s of the drains that are cut short. */
enum { SOON = 12000 };

/* What the dead one's journal says of its prompt, which was alone: with one attempt, a death by the
 * process's own hand is proof, another is none. */
static enum left what_is_left(void)
{
    journal *j;
    struct lm_err err;
    assert_int_equal(journal_open(dir, "g", &j, &err), LM_OK);
    struct journal_count n = journal_counts(j, 7);
    journal_close(j);
    char command[128];
    snprintf(command, sizeof command, "rm -f %s/*", dir);
    assert_int_equal(system(command), 0);
    return journal_verdict(n, 1) == JOURNAL_POISON ? HUNG : n.deaths ? KILLED : NOTHING;
}

static void expect(const struct play *p, int status, int least_ms, int most_ms, enum left left)
{
    int64_t ms;
    assert_int_equal(play(p, &ms), status);
    assert_in_range(ms, least_ms, most_ms);
    assert_int_equal(what_is_left(), left);
}

static void test_signals(void **state)
{
    (void)state;
    expect(&(struct play){ AT_REST, 0, starting, 300 }, 0, 300, SOON, KILLED);
    expect(&(struct play){ AT_REST, 0, draining_long, 300 }, 1, 300, SOON, KILLED);
    expect(&(struct play){ AT_REST, 0, closing, 300 }, 1, 300, SOON, KILLED);
    expect(&(struct play){ AT_REST, 0, starting_stranger, 0 }, 0, 0, SOON, KILLED);
    expect(&(struct play){ AT_REST, 0, draining_stranger, 0 }, 1, 0, SOON, KILLED);
}

static void test_budget(void **state)
{
    (void)state;
    expect(&(struct play){ AT_REST, 0, draining, 0 }, 1, 1000, SOON, KILLED);
    expect(&(struct play){ STEPS, 60000, draining, 0 }, 1, 1000, SOON, KILLED);
}

/* librdkafka holds the end up: the status is the one that was earned, and nobody is suspected. */
static void test_release(void **state)
{
    (void)state;
    expect(&(struct play){ AT_REST, 60000, releasing, 0 }, 0, 300, SOON, NOTHING);
    expect(&(struct play){ STEPS, 60000, releasing, 0 }, 0, 300, SOON, NOTHING);
    expect(&(struct play){ AT_REST, 60000, releasing_failed, 0 }, 1, 300, SOON, NOTHING);
    expect(&(struct play){ AT_REST, 60000, releasing_device, 0 }, 1, 300, SOON, HUNG);
}

static void test_without_a_thread(void **state)
{
    (void)state;
    expect(&(struct play){ AT_REST, 60000, releasing_alone, 0 }, 0, 300, SOON, NOTHING);
}

static lm_status after_closing_for(int64_t ms, bool draining_too, int64_t slept_ago_ms)
{
    static struct config cfg;
    static struct worker w;
    sigset_t none;
    sigemptyset(&none);
    w = (struct worker){ .cfg = &cfg };
    atomic_store(&w.slept_us, lm_now_us() - slept_ago_ms * 1000);
    watchdog *d = watchdog_new(&w, &none);
    if (draining_too)
        watchdog_draining(d, 20000);
    watchdog_look(d);
    assert_int_equal(atomic_load(&w.failed), LM_OK);
    atomic_store(&w.closing_producer_us, lm_now_us() - ms * 1000);
    watchdog_look(d);
    watchdog_free(d);
    return (lm_status)atomic_load(&w.failed);
}

/* librdkafka does not let go of an old producer: the worker fails, unless it ends already. */
static void test_producer(void **state)
{
    (void)state;
    enum { LONG = WATCHDOG_CLOSE_PRODUCER_MS + 100, AGES = 3600000 };
    assert_int_equal(after_closing_for(LONG, false, AGES), LM_STATE);
    assert_int_equal(after_closing_for(LONG, false, 1000), LM_OK);      /* it slept meanwhile */
    assert_int_equal(after_closing_for(1000, false, AGES), LM_OK);
    assert_int_equal(after_closing_for(LONG, true, AGES), LM_OK);
}

/* The engine's last step is longer than what is left: no hang yet, and no fault of the prompts'. */
static void test_long_step(void **state)
{
    (void)state;
    expect(&(struct play){ STUCK, 60000, closing, 0 }, 0, 1500, 8000, NOTHING);
}

static void test_hang(void **state)
{
    (void)state;
    expect(&(struct play){ STUCK, 500, stuck_engine, 0 }, 1, 500, SOON, HUNG);
    expect(&(struct play){ AT_REST, 500, draining_long, 0 }, 1, 500, SOON, HUNG);   /* intake */
    expect(&(struct play){ STUCK, 500, releasing, 0 }, 1, 500, SOON, HUNG);
    expect(&(struct play){ STEPS, 500, ended_intake, 0 }, 1, 1000, SOON, KILLED);
    expect(&(struct play){ AT_REST, 500, releasing, 0 }, 0, 300, SOON, NOTHING);
}

/* Stopped for longer than a hang may last: not a hang, for neither could do anything. */
static void test_sleep(void **state)
{
    (void)state;
    int st;
    pid_t pid = fork();
    if (pid == 0)
        child(&(struct play){ STUCK, 3200, sleeping, 0 });
    waitpid(pid, &st, WUNTRACED);
    assert_true(WIFSTOPPED(st));
    usleep(3300000);
    kill(pid, SIGCONT);
    waitpid(pid, &st, 0);
    assert_true(WIFEXITED(st) && WEXITSTATUS(st) == 1);
    assert_int_equal(what_is_left(), KILLED);
}

static void test_end(void **state)
{
    (void)state;
    expect(&(struct play){ AT_REST, 500, ended, 0 }, 0, 0, SOON, KILLED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_signals), cmocka_unit_test(test_budget),
        cmocka_unit_test(test_release), cmocka_unit_test(test_long_step),
        cmocka_unit_test(test_without_a_thread), cmocka_unit_test(test_producer),
        cmocka_unit_test(test_hang), cmocka_unit_test(test_sleep),
        cmocka_unit_test(test_end),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
