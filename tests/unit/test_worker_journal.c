/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_journal.c - processes that die with prompts in the engine, and what those who come
 * after make of it. Each death is a real one, of a forked process.
 */
#include <glob.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "folder.h"
#include "worker/journal.h"

enum { ATTEMPTS = 3 };          /* poison.max_attempts */

static journal *open_one(void)
{
    journal *j;
    struct lm_err err;
    if (journal_open(dir, "group", &j, &err))
        fail_msg("%s", err.msg);
    return j;
}

/* cmocka's own handlers would survive the signals that are meant to kill. */
static void default_signals(void)
{
    static const int all[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT };
    for (size_t i = 0; i < LM_COUNT(all); i++)
        signal(all[i], SIG_DFL);
}

/* A process that dies by `sig` with these keys in the engine. 0: of SIGKILL after a hang. */
static void die(int sig, bool alone, int n, const uint64_t *keys)
{
    pid_t pid = fork();
    if (pid == 0) {
        default_signals();
        journal *j = open_one();
        journal_watch_signals(j);
        for (int i = 0; i < n; i++)
            journal_enter(j, keys[i], alone);
        journal_leave(j, journal_enter(j, 999, alone));         /* this one was finished */
        if (!sig)
            journal_cause(j, JOURNAL_HUNG);
        raise(sig ? sig : SIGKILL);
        _exit(0);
    }
    int st;
    waitpid(pid, &st, 0);
    assert_true(WIFSIGNALED(st));
    assert_int_equal(WTERMSIG(st), sig ? sig : SIGKILL);
}

static void expect(uint64_t key, enum journal_verdict v, int deaths)
{
    journal *j = open_one();
    struct journal_count n = journal_counts(j, key);
    assert_int_equal(journal_verdict(n, ATTEMPTS), v);
    assert_int_equal(n.deaths, deaths);
    journal_close(j);
}

static void test_proof_needs_a_lonely_death(void **state)
{
    (void)state;
    const uint64_t many[] = { 1, 2, 3 }, one[] = { 1 };
    expect(1, JOURNAL_FINE, 0);
    die(SIGSEGV, false, 3, many);
    expect(1, JOURNAL_FINE, 1);
    expect(999, JOURNAL_FINE, 0);
    die(SIGABRT, false, 3, many);
    expect(1, JOURNAL_ALONE, 2);
    expect(3, JOURNAL_ALONE, 2);
    die(SIGSEGV, true, 1, one);
    expect(1, JOURNAL_POISON, 3);
    expect(2, JOURNAL_ALONE, 2);        /* its neighbours are not blamed */
}

static void test_one_sigkill_proves_nothing(void **state)
{
    (void)state;
    const uint64_t one[] = { 5 };
    for (int i = 0; i < 6; i++)
        die(SIGKILL, false, 1, one);
    expect(5, JOURNAL_ALONE, 6);
    die(SIGKILL, true, 1, one);
    expect(5, JOURNAL_ALONE, 7);
    die(SIGKILL, true, 1, one);
    expect(5, JOURNAL_POISON, 8);
}

static void test_a_hang_is_proof(void **state)
{
    (void)state;
    const uint64_t one[] = { 5 };
    for (int i = 0; i < 2; i++)
        die(0, true, 1, one);
    expect(5, JOURNAL_ALONE, 2);
    die(0, true, 1, one);
    expect(5, JOURNAL_POISON, 3);
}

static void test_decoding_is_alone(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            default_signals();
            journal *j = open_one();
            journal_watch_signals(j);
            journal_decoding(j, 8);
            raise(SIGBUS);
        }
        waitpid(pid, NULL, 0);
    }
    expect(8, JOURNAL_POISON, 3);
}

/* A living worker hears of its neighbour's death; the living are no suspects. */
static void test_neighbours_learn(void **state)
{
    (void)state;
    const uint64_t one[] = { 5 };
    journal *a = open_one(), *b = open_one();
    assert_int_equal(journal_enter(b, 6, false) >= 0, 1);
    die(SIGSEGV, false, 1, one);
    journal_refresh(a, lm_now_us());
    journal_refresh(b, lm_now_us());
    assert_int_equal(journal_counts(a, 5).deaths, 1);
    assert_int_equal(journal_counts(b, 5).deaths, 1);
    assert_int_equal(journal_counts(a, 6).deaths, 0);
    journal_close(b);                   /* in order: nobody died */
    journal_refresh(a, lm_now_us() + 2000000);
    assert_int_equal(journal_counts(a, 6).deaths, 0);
    journal_close(a);
}

static void test_a_failed_device_is_a_death(void **state)
{
    (void)state;
    journal *j = open_one();
    journal_enter(j, 4, true);
    journal_abandon(j, JOURNAL_DEVICE);
    expect(4, JOURNAL_FINE, 1);
}

/* Garbage under our names, and a torn journal. */
static void test_foreign_files(void **state)
{
    (void)state;
    static const char *const names[] = { "x.journal", "y.dead", ".journal", "z.journal.new" };
    char path[512];
    for (size_t i = 0; i < LM_COUNT(names); i++) {
        snprintf(path, sizeof path, "%s/%s", dir, names[i]);
        FILE *f = fopen(path, "w");
        fputs("not ours", f);
        fclose(f);
    }
    expect(1, JOURNAL_FINE, 0);
}

/* Its keys may be made by another formula. */
static void test_another_format_is_left_out(void **state)
{
    (void)state;
    char pattern[512];
    glob_t found;
    journal *j = open_one();
    journal_enter(j, 4, true);
    journal_abandon(j, JOURNAL_DEVICE);
    snprintf(pattern, sizeof pattern, "%s/*.journal", dir);
    assert_int_equal(glob(pattern, 0, NULL, &found), 0);
    FILE *f = fopen(found.gl_pathv[0], "r+");
    assert_non_null(f);
    fputs("MLLMJ1", f);
    fclose(f);
    expect(4, JOURNAL_FINE, 0);
    assert_int_equal(access(found.gl_pathv[0], F_OK), -1);
    globfree(&found);
}

static void test_keys(void **state)
{
    (void)state;
    struct lease l = { .partition = 1 };
    struct job a = { .lease = &l, .record = { .offset = 7, .timestamp_ms = 5, .value = "v",
                                              .value_len = 1 } };
    strcpy(l.topic, "t");
    journal *j = open_one();
    uint64_t key = journal_key(j, &a);
    assert_int_equal(key == journal_key(j, &a), 1);
    a.record.offset = 8;
    assert_int_not_equal(key, journal_key(j, &a));
    a.record.offset = 7;
    a.record.value = "w";
    assert_int_not_equal(key, journal_key(j, &a));
    a.record.value = "v";
    l.partition = 2;
    assert_int_not_equal(key, journal_key(j, &a));
    char text[300];
    memset(text, 'a', sizeof text);
    a.record.value = text;
    a.record.value_len = 299;
    key = journal_key(j, &a);
    text[240] = 'b';            /* what lies behind the first 240 bytes isn't read */
    assert_true(key == journal_key(j, &a));
    text[239] = 'b';
    assert_int_not_equal(key, journal_key(j, &a));
    text[239] = 'a';
    a.record.value_len = 300;   /* but counted */
    assert_int_not_equal(key, journal_key(j, &a));
    a.record.value = NULL;
    a.record.value_len = 0;
    assert_int_not_equal(journal_key(j, &a), 0);
    journal_close(j);
    journal_close(NULL);
}

/* One of ours, living or dead, by the pattern's end. NULL: there is none. */
static char *find_file(const char *end)
{
    char pattern[512];
    glob_t found;
    snprintf(pattern, sizeof pattern, "%s/*%s", dir, end);
    char *path = glob(pattern, 0, NULL, &found) ? NULL : strdup(found.gl_pathv[0]);
    globfree(&found);
    return path;
}

/* A store into a hole of the file would be a SIGBUS there, and the prompts suspects of that. */
static void test_a_disk_that_fills_up_later_kills_nobody(void **state)
{
    (void)state;
    struct stat sb;
    journal *j = open_one();
    char *path = find_file(".journal");
    assert_non_null(path);
    assert_int_equal(stat(path, &sb), 0);
    assert_true(sb.st_size > 0);
    assert_true((int64_t)sb.st_blocks * 512 >= (int64_t)sb.st_size);
    free(path);
    journal_close(j);
}

static int try_to_open(void)
{
    journal *j;
    struct lm_err err;
    setrlimit(RLIMIT_FSIZE, &(struct rlimit){ 4096, 4096 });
    signal(SIGXFSZ, SIG_IGN);
    return (int)journal_open(dir, "group", &j, &err);
}

static void test_without_room_there_is_no_journal(void **state)
{
    (void)state;
    pid_t pid = fork();
    if (pid == 0)
        _exit(try_to_open());
    int st;
    waitpid(pid, &st, 0);
    assert_true(WIFEXITED(st));
    assert_int_equal(WEXITSTATUS(st), LM_IO);
    assert_null(find_file(""));         /* nor its beginnings, one for each start */
}

#define T(f) cmocka_unit_test_setup_teardown(f, make_dir, remove_dir)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_proof_needs_a_lonely_death), T(test_one_sigkill_proves_nothing),
        T(test_a_hang_is_proof), T(test_decoding_is_alone), T(test_neighbours_learn),
        T(test_a_failed_device_is_a_death), T(test_foreign_files), T(test_keys),
        T(test_another_format_is_left_out), T(test_a_disk_that_fills_up_later_kills_nobody),
        T(test_without_room_there_is_no_journal),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
