/* SPDX-License-Identifier: Apache-2.0 */
/*
 * engine_fixture.h - what the engine's tests share: models and reference results from tests/, an
 * engine on them, requests, and waiting for their results.
 *
 * The families of tests/fixtures have no tokenizer; as every test there speaks in token ids, they
 * borrow spm-tiny's, so that the whole public road is taken. A model is opened from a temporary
 * folder of links.
 */
#ifndef LORAMILL_TESTS_ENGINE_FIXTURE_H
#define LORAMILL_TESTS_ENGINE_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <dirent.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/engine.h"

#define SPM_TINY "tests/models/spm-tiny"

#define CHECK(call)                                                                            \
    do {                                                                                       \
        struct lm_err e_ = { 0 };                                                              \
        struct lm_err *err = &e_;                                                              \
        if ((call) != LM_OK)                                                                   \
            fail_msg("%s:%d: %s: %s", __FILE__, __LINE__, #call, e_.msg);                      \
    } while (0)

struct fixture_dir {
    char path[64];
};

static inline void link_into(const struct fixture_dir *d, const char *from, const char *name)
{
    char real[PATH_MAX], target[PATH_MAX + 256], link[PATH_MAX];
    assert_non_null(realpath(from, real));
    snprintf(target, sizeof target, "%s/%s", real, name);
    snprintf(link, sizeof link, "%s/%s", d->path, name);
    if (access(target, R_OK) == 0 && access(link, F_OK) != 0)
        assert_int_equal(symlink(target, link), 0);
}

static inline void link_all(const struct fixture_dir *d, const char *from)
{
    DIR *dir = opendir(from);
    if (!dir)
        fail_msg("%s is missing; run the tests from the top of the tree", from);
    for (struct dirent *e; (e = readdir(dir));)
        if (e->d_name[0] != '.')
            link_into(d, from, e->d_name);
    closedir(dir);
}

/* A folder that looks like `model`, with spm-tiny's tokenizer if it has none. */
static inline struct fixture_dir fixture_open(const char *model)
{
    struct fixture_dir d = { "/tmp/loramill-test-XXXXXX" };
    assert_non_null(mkdtemp(d.path));
    link_all(&d, model);
    link_into(&d, SPM_TINY, "tokenizer.json");
    link_into(&d, SPM_TINY, "tokenizer_config.json");
    return d;
}

static inline void fixture_close(struct fixture_dir *d)
{
    DIR *dir = opendir(d->path);
    for (struct dirent *e; dir && (e = readdir(dir));)
        if (e->d_name[0] != '.')
            unlinkat(dirfd(dir), e->d_name, 0);
    if (dir)
        closedir(dir);
    rmdir(d->path);
}

static inline struct engine_config fixture_config(const char *dir)
{
    return (struct engine_config){ .model_dir = dir, .backend = "cpu", .threads = 1,
                                   .pool_bytes = (size_t)64 << 20 };
}

static inline engine *fixture_engine(const struct engine_config *cfg)
{
    engine *e = NULL;
    CHECK(engine_open(cfg, &e, err));
    return e;
}

/* Greedy, nothing left to generation_config.json. */
static inline struct engine_request fixture_request(const char *id, const int32_t *ids, int n)
{
    struct engine_request r = { .id = id, .token_ids = ids, .n_token_ids = n };
    engine_params_default(&r.params);
    r.params.temperature = 0;
    r.params.set = ~0u;
    return r;
}

static inline engine_handle fixture_submit(engine *e, const struct engine_request *r)
{
    engine_handle h = 0;
    CHECK(engine_submit(e, r, &h, err));
    return h;
}

/*
 * The next finished request. Fails the test after a minute without an event, counted in waits of a
 * second: the clock goes on while the program is stopped (SIGSTOP, a machine put to sleep), and a
 * request that was on its way then has not been given its minute.
 */
static inline struct engine_event fixture_finished(engine *e)
{
    struct engine_event ev;
    lm_status state = LM_OK;
    for (int quiet = 0; quiet < 60;) {
        if (engine_poll(e, &ev, 1, 1000, &state) == 1) {
            if (ev.kind == ENGINE_FINISHED)
                return ev;
            free(ev.text);
        } else {
            quiet++;
        }
        if (state != LM_OK)
            fail_msg("the engine failed: %s", lm_status_text(state));
    }
    fail_msg("no result within a minute");
    return ev;
}

static inline struct engine_result *fixture_run(engine *e, const struct engine_request *r)
{
    engine_handle h = fixture_submit(e, r);
    struct engine_event ev = fixture_finished(e);
    assert_true(ev.handle == h);
    if (ev.result->status != LM_OK)
        fail_msg("%s: %s", r->id, ev.result->error);
    return ev.result;
}

#endif
