/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_batch_job.c - whole jobs on a real engine: inputs that are no plain files, and more
 * adapters in flight than host memory is granted for.
 */
#include "folder.h"
#include "engine_fixture.h"

#include <fcntl.h>
#include <jansson.h>
#include <stdatomic.h>
#include <sys/stat.h>

#include "worker/tools/batch_job.h"

#define ADAPTERS "tests/models/spm-tiny-adapters"
#define LINE(id, model)                                                                        \
    "{\"custom_id\":\"" id "\",\"method\":\"POST\",\"url\":\"/v1/completions\","             \
    "\"body\":{\"model\":\"" model "\",\"prompt\":\"hello\",\"max_tokens\":4,\"temperature\":0}}"

static const atomic_int never;

static char *path_of(const char *name)
{
    static char path[2][256];
    static int next;
    char *p = path[next ^= 1];
    snprintf(p, sizeof path[0], "%s/%s", dir, name);
    return p;
}

static void put(const char *path, const char *text, size_t len)
{
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, len, f), len);
    fclose(f);
}

/* Runs a job with a fresh store on the engine, which is closed afterwards. */
static lm_status job_anew(engine *e, const char *adapters, const char *input, const char *output,
                          bool resume, struct batch_totals *totals, struct lm_err *err)
{
    store *s = NULL;
    const struct store_config sc = { .engine = e, .local_dir = adapters };
    CHECK(store_new(&sc, &s, err));
    const struct batch_config bc = { .engine = e, .store = s, .adapters = adapters,
                                     .input = input, .output = output, .resume = resume,
                                     .max_in_flight = 256, .stop = &never };
    lm_status st = batch_job_run(&bc, totals, err);
    engine_close(e);
    return st;
}

static lm_status job(engine *e, const char *adapters, const char *input, const char *output,
                     struct batch_totals *totals, struct lm_err *err)
{
    return job_anew(e, adapters, input, output, false, totals, err);
}

static engine *open_echo(void)
{
    const struct engine_config cfg = { .echo = true, .model_name = "echo" };
    return fixture_engine(&cfg);
}

static size_t biggest_adapter(const char *const *id, int n)
{
    struct engine_config cfg = fixture_config(SPM_TINY);
    engine *e = fixture_engine(&cfg);
    size_t most = 0;
    for (int i = 0; i < n; i++) {
        char path[256];
        engine_adapter *a = NULL;
        snprintf(path, sizeof path, ADAPTERS "/%s", id[i]);
        CHECK(engine_adapter_load(e, id[i], path, &a, err));
        most = LM_MAX(most, engine_adapter_bytes(a));
        engine_adapter_unref(a);
    }
    engine_close(e);
    return most;
}

/* Host memory for one adapter, and lines for two by turns, all in flight together. */
static void adapters_take_turns_in_host_memory(void **state)
{
    (void)state;
    static const char *const id[] = { "captain-sal", "nordwind-terse" };
    struct engine_config cfg = fixture_config(SPM_TINY);
    cfg.host_adapter_bytes = biggest_adapter(id, 2);
    FILE *f = fopen(path_of("turns"), "w");
    assert_non_null(f);
    for (int i = 0; i < 40; i++)
        fprintf(f, "%s\n", i % 2 ? LINE("a", "captain-sal") : LINE("b", "nordwind-terse"));
    fclose(f);
    struct batch_totals t;
    struct lm_err err = { 0 };
    alarm(120);                 /* it used to wait for ever */
    lm_status st = job(fixture_engine(&cfg), ADAPTERS, path_of("turns"), path_of("turns.out"), &t,
                       &err);
    alarm(0);
    assert_string_equal(err.msg, "");
    assert_int_equal(st, LM_OK);
    assert_int_equal(t.answered, 40);
}

/* A pipe can be read once only. */
static void a_pipe_is_an_input(void **state)
{
    (void)state;
    static const char lines[] = LINE("1", "echo") "\n" LINE("2", "echo") "\n";
    int fd[2];
    char name[32];
    assert_int_equal(pipe(fd), 0);
    assert_int_equal(write(fd[1], lines, sizeof lines - 1), sizeof lines - 1);
    close(fd[1]);
    snprintf(name, sizeof name, "/dev/fd/%d", fd[0]);
    struct batch_totals t;
    struct lm_err err = { 0 };
    assert_int_equal(job(open_echo(), NULL, name, path_of("pipe.out"), &t, &err), LM_OK);
    close(fd[0]);
    assert_int_equal(t.answered, 2);
}

/* A byte order mark, CRLF, an empty line, no newline at the end. */
static void lines_of_other_editors(void **state)
{
    (void)state;
    static const char lines[] = "\xef\xbb\xbf" LINE("1", "echo") "\r\n\r\n" LINE("2", "echo");
    put(path_of("crlf"), lines, sizeof lines - 1);
    struct batch_totals t;
    struct lm_err err = { 0 };
    assert_int_equal(job(open_echo(), NULL, path_of("crlf"), path_of("crlf.out"), &t, &err), LM_OK);
    assert_int_equal(t.answered, 2);
    assert_int_equal(t.refused, 0);
}

static void an_adapter_needs_a_place_to_come_from(void **state)
{
    (void)state;
    static const char lines[] = LINE("1", "voice") "\n";
    put(path_of("voice"), lines, sizeof lines - 1);
    struct batch_totals t;
    struct lm_err err = { 0 };
    assert_int_equal(job(open_echo(), NULL, path_of("voice"), path_of("voice.out"), &t, &err),
                     LM_OK);
    assert_int_equal(t.refused, 1);
    json_t *root = json_load_file(path_of("voice.out"), 0, NULL);
    const char *why = json_string_value(json_object_get(json_object_get(root, "error"), "message"));
    assert_non_null(why);
    assert_non_null(strstr(why, "--adapters"));
    json_decref(root);
}

static off_t size_of(const char *path)
{
    struct stat sb;
    return stat(path, &sb) ? -1 : sb.st_size;
}

/* The output of an earlier job must survive a job that can't start. */
static void a_bad_input_leaves_the_output_alone(void **state)
{
    (void)state;
    static const char lines[] = LINE("1", "echo") "\n";
    struct batch_totals t;
    struct lm_err err = { 0 };
    put(path_of("kept"), lines, sizeof lines - 1);
    assert_int_equal(job(open_echo(), NULL, dir, path_of("kept"), &t, &err), LM_INVALID);
    assert_int_equal(job(open_echo(), NULL, path_of("none"), path_of("kept"), &t, &err),
                     LM_NOT_FOUND);
    assert_int_equal(job(open_echo(), NULL, path_of("kept"), path_of("kept"), &t, &err),
                     LM_INVALID);
    int was = dup(STDIN_FILENO), fd = open(path_of("kept"), O_RDONLY);
    assert_true(was >= 0 && fd >= 0 && dup2(fd, STDIN_FILENO) >= 0);
    assert_int_equal(job(open_echo(), NULL, "-", path_of("kept"), &t, &err), LM_INVALID);
    dup2(was, STDIN_FILENO);
    close(was);
    close(fd);
    assert_int_equal(size_of(path_of("kept")), sizeof lines - 1);
}

/* Bad lines have no custom_id; that is no other request's. Under the numbers of an input that was
 * changed stand other requests: they have no results, and the job is not done. */
static void a_job_is_resumed_with_its_input(void **state)
{
    (void)state;
    static const char lines[] = LINE("1", "echo") "\n[]\n" LINE("3", "echo") "\n";
    static const char more[] = LINE("1", "echo") "\n[]\n" LINE("3", "echo") "\n"
                               LINE("4", "echo") "\n";
    static const char changed[] = LINE("0", "echo") "\n" LINE("1", "echo") "\n[]\n"
                                  LINE("3", "echo") "\n";
    struct batch_totals t;
    struct lm_err err = { 0 };
    put(path_of("job"), lines, sizeof lines - 1);
    assert_int_equal(job(open_echo(), NULL, path_of("job"), path_of("done"), &t, &err), LM_OK);
    assert_int_equal(t.answered + t.refused, 3);
    off_t size = size_of(path_of("done"));
    put(path_of("job"), changed, sizeof changed - 1);
    assert_int_equal(job_anew(open_echo(), NULL, path_of("job"), path_of("done"), true, &t, &err),
                     LM_STATE);
    assert_non_null(strstr(err.msg, "line 1: "));
    assert_int_equal(size_of(path_of("done")), size);
    put(path_of("job"), more, sizeof more - 1);
    assert_int_equal(job_anew(open_echo(), NULL, path_of("job"), path_of("done"), true, &t, &err),
                     LM_OK);
    assert_int_equal(t.skipped, 3);
    assert_int_equal(t.answered, 1);
}

int main(void)
{
    lm_log_set_level(LM_ERROR);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(adapters_take_turns_in_host_memory),
        cmocka_unit_test(a_pipe_is_an_input),
        cmocka_unit_test(lines_of_other_editors),
        cmocka_unit_test(an_adapter_needs_a_place_to_come_from),
        cmocka_unit_test(a_bad_input_leaves_the_output_alone),
        cmocka_unit_test(a_job_is_resumed_with_its_input),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
