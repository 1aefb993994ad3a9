/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine_echo.c - the engine's public face without a model: queues, handles, back-pressure,
 * refusal of bad requests, several threads at once, closing with work in flight.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/engine.h"

static engine *open_echo(int max_waiting)
{
    struct engine_config cfg = { .echo = true, .max_waiting = max_waiting };
    engine *e = NULL;
    struct lm_err err;
    if (engine_open(&cfg, &e, &err) != LM_OK)
        fail_msg("%s", err.msg);
    return e;
}

static struct engine_request request(const char *id, const char *prompt)
{
    struct engine_request r = { .id = id, .prompt = prompt, .prompt_len = strlen(prompt) };
    engine_params_default(&r.params);
    return r;
}

/* The name is that of the folder as it was written; a path without one is looked up. */
static void a_model_is_named_after_its_folder(void **state)
{
    (void)state;
    char dir[] = "/tmp/loramill-name-XXXXXX", here[256], link[64];
    assert_non_null(mkdtemp(dir));
    assert_non_null(getcwd(here, sizeof here));
    snprintf(link, sizeof link, "%s/alias", dir);
    assert_int_equal(symlink(dir, link), 0);
    const char *own = dir + sizeof "/tmp/" - 1;
    const char *const paths[][2] = {
        { "tests/models/storefront", "storefront" }, { "tests/models/storefront/", "storefront" },
        { "tests/models/storefront//", "storefront" }, { "storefront", "storefront" },
        { "tests/models/storefront/.", "storefront" }, { "/storefront/", "storefront" },
        { ".", own }, { "./", own }, { "alias/..", "tmp" }, { link, "alias" },
        { "alias/", "alias" }, { "/", "/" },
    };
    assert_int_equal(chdir(dir), 0);
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        struct engine_config cfg = { .echo = true, .model_dir = paths[i][0] };
        struct engine_info info;
        engine *e = NULL;
        assert_int_equal(engine_open(&cfg, &e, NULL), LM_OK);
        engine_info(e, &info);
        assert_string_equal(info.model_name, paths[i][1]);
        engine_close(e);
    }
    assert_int_equal(chdir(here), 0);
    unlink(link);
    rmdir(dir);
}

static void answers_itself(void **state)
{
    (void)state;
    engine *e = open_echo(0);
    const char *docs[] = { "one", "two" };
    struct engine_request r = request("a", "hello");
    r.context = docs;
    r.n_context = 2;
    r.params.n = 2;
    r.user = &r;
    engine_handle h = 0;
    assert_int_equal(engine_submit(e, &r, &h, NULL), LM_OK);
    struct engine_event ev;
    lm_status st = LM_INTERNAL;
    assert_int_equal(engine_poll(e, &ev, 1, 5000, &st), 1);
    assert_int_equal(st, LM_OK);
    assert_int_equal(ev.kind, ENGINE_FINISHED);
    assert_true(ev.handle == h && h != 0 && ev.user == &r);
    assert_int_equal(ev.result->n_choices, 2);
    assert_string_equal(ev.result->choices[0].text, "one\n\ntwo\n\nhello");
    assert_string_equal(ev.result->choices[1].text, "one\n\ntwo\n\nhello");
    assert_int_equal(ev.result->choices[1].index, 1);
    assert_int_equal(engine_cancel(e, h), LM_NOT_FOUND);
    engine_result_free(ev.result);
    engine_close(e);
}

static void full_queue_is_busy(void **state)
{
    (void)state;
    engine *e = open_echo(3);
    struct engine_request r = request("a", "x");
    engine_handle h;
    struct engine_event ev;
    struct lm_err err;
    for (int i = 0; i < 3; i++)
        assert_int_equal(engine_submit(e, &r, &h, NULL), LM_OK);
    assert_int_equal(engine_submit(e, &r, &h, &err), LM_BUSY);
    assert_non_null(strstr(err.msg, "3 requests"));
    assert_int_equal(engine_poll(e, &ev, 1, 5000, NULL), 1);
    engine_result_free(ev.result);
    assert_int_equal(engine_submit(e, &r, &h, NULL), LM_OK);
    engine_close(e);
}

static void handles_are_never_reused(void **state)
{
    (void)state;
    engine *e = open_echo(1);
    struct engine_request r = request("a", "x");
    engine_handle last = 0, h;
    struct engine_event ev;
    for (int i = 0; i < 1000; i++) {
        assert_int_equal(engine_submit(e, &r, &h, NULL), LM_OK);
        assert_true(h != last && h != 0);
        last = h;
        assert_int_equal(engine_poll(e, &ev, 1, 5000, NULL), 1);
        engine_result_free(ev.result);
    }
    engine_close(e);
}

/* Each spoils a good request in one way and names a word that the message must contain. */
struct bad {
    const char *word;
    void (*spoil)(struct engine_request *r);
};

#define SPOIL(name, ...) static void spoil_##name(struct engine_request *r) { __VA_ARGS__; }
static const int32_t some_ids[300] = { -1 };
static const struct engine_message one_message[] = { { "user", "hi" } };
static const char *const one_doc[] = { "doc" };
SPOIL(id, r->id = NULL)
SPOIL(none, r->prompt = NULL)
SPOIL(both, r->token_ids = some_ids; r->n_token_ids = 1)
SPOIL(three, r->messages = one_message; r->n_messages = 1)
SPOIL(no_messages, r->prompt = NULL; r->messages = one_message)
SPOIL(ctx_ids, r->prompt = NULL; r->token_ids = some_ids; r->n_token_ids = 1;
      r->context = one_doc; r->n_context = 1)
SPOIL(max_tokens, r->params.max_tokens = 0)
SPOIL(max_tokens_neg, r->params.max_tokens = -5)
SPOIL(min_tokens, r->params.min_tokens = 17)
SPOIL(temperature, r->params.temperature = -0.5f)
SPOIL(temperature_nan, r->params.temperature = __builtin_nanf(""))
SPOIL(temperature_inf, r->params.temperature = __builtin_inff())
SPOIL(top_p, r->params.top_p = 0)
SPOIL(top_p_high, r->params.top_p = 1.5f)
SPOIL(min_p, r->params.min_p = -0.1f)
SPOIL(top_k, r->params.top_k = -2)
SPOIL(repetition, r->params.repetition_penalty = 0)
SPOIL(presence, r->params.presence_penalty = 2.5f)
SPOIL(frequency, r->params.frequency_penalty = -3)
SPOIL(n, r->params.n = 0)
SPOIL(n_high, r->params.n = ENGINE_MAX_N + 1)
SPOIL(logprobs, r->params.logprobs = 21)
SPOIL(stop, r->params.n_stop = 17)
SPOIL(stop_empty, r->params.n_stop = 1; r->params.stop[0] = "")
SPOIL(stop_ids, r->params.n_stop_token_ids = 1; r->params.stop_token_ids = some_ids)
SPOIL(stop_ids_many, r->params.n_stop_token_ids = 300; r->params.stop_token_ids = some_ids)

static const struct bad bads[] = {
    { "id", spoil_id }, { "exactly one", spoil_none }, { "2 of", spoil_both },
    { "exactly one", spoil_three }, { "messages", spoil_no_messages },
    { "context", spoil_ctx_ids }, { "max_tokens", spoil_max_tokens },
    { "max_tokens is -5", spoil_max_tokens_neg }, { "min_tokens", spoil_min_tokens },
    { "temperature", spoil_temperature }, { "temperature", spoil_temperature_nan },
    { "temperature", spoil_temperature_inf }, { "top_p", spoil_top_p },
    { "top_p is 1.5", spoil_top_p_high }, { "min_p", spoil_min_p }, { "top_k", spoil_top_k },
    { "repetition_penalty", spoil_repetition }, { "presence_penalty", spoil_presence },
    { "frequency_penalty", spoil_frequency }, { "n is 0", spoil_n }, { "n is 129", spoil_n_high },
    { "logprobs", spoil_logprobs }, { "stop", spoil_stop }, { "stop[0]", spoil_stop_empty },
    { "stop_token_ids[0]", spoil_stop_ids }, { "300 ids", spoil_stop_ids_many },
};

static void bad_requests_are_refused_by_name(void **state)
{
    (void)state;
    engine *e = open_echo(4);
    for (size_t i = 0; i < LM_COUNT(bads); i++) {
        struct engine_request r = request("bad", "x");
        struct lm_err err = { 0 };
        engine_handle h;
        bads[i].spoil(&r);
        assert_int_equal(engine_submit(e, &r, &h, &err), LM_INVALID);
        if (!strstr(err.msg, bads[i].word))
            fail_msg("case %zu: '%s' does not name '%s'", i, err.msg, bads[i].word);
    }
    struct engine_stats s;
    engine_stats(e, &s);
    assert_int_equal(s.finished, 0);
    engine_close(e);
}

static void adapter_ids(void **state)
{
    (void)state;
    static const char *const good[] = { "a", "acme-warm", "acme/warm.v2", "0/1/2_x" };
    static const char *const bad[] = { "", "/a", "a/", "a//b", ".a", "a/.b", "-a", "a b", "a\n",
                                       "\xc3\xa9", "a/../b" };
    for (size_t i = 0; i < LM_COUNT(good); i++)
        assert_int_equal(engine_adapter_id_check(good[i], strlen(good[i]), NULL), LM_OK);
    for (size_t i = 0; i < LM_COUNT(bad); i++)
        assert_int_equal(engine_adapter_id_check(bad[i], strlen(bad[i]), NULL), LM_INVALID);
    char longest[ENGINE_ADAPTER_ID_MAX + 2];
    memset(longest, 'a', sizeof longest);
    assert_int_equal(engine_adapter_id_check(longest, ENGINE_ADAPTER_ID_MAX, NULL), LM_OK);
    assert_int_equal(engine_adapter_id_check(longest, ENGINE_ADAPTER_ID_MAX + 1, NULL),
                     LM_INVALID);
}

/* ---- threads --------------------------------------------------------------------------- */

#define THREADS 4
#define EACH 2000

struct crowd {
    engine *e;
    atomic_int polled;
    atomic_int mismatched;
};

static void *submitter(void *arg)
{
    struct crowd *c = arg;
    char text[32];
    for (int i = 0; i < EACH; i++) {
        snprintf(text, sizeof text, "%d", i);
        struct engine_request r = request("t", text);
        r.user = (void *)(intptr_t)i;
        engine_handle h;
        while (engine_submit(c->e, &r, &h, NULL) == LM_BUSY)
            sched_yield();
        if (i % 7 == 0)
            engine_cancel(c->e, h);     /* may be too late; must do no harm */
    }
    return NULL;
}

static void *poller(void *arg)
{
    struct crowd *c = arg;
    struct engine_event ev[16];
    while (atomic_load(&c->polled) < THREADS * EACH) {
        int n = engine_poll(c->e, ev, 16, 20, NULL);
        for (int i = 0; i < n; i++) {
            char text[32];
            snprintf(text, sizeof text, "%d", (int)(intptr_t)ev[i].user);
            if (strcmp(text, ev[i].result->choices[0].text) != 0)
                atomic_fetch_add(&c->mismatched, 1);
            engine_result_free(ev[i].result);
        }
        atomic_fetch_add(&c->polled, n);
    }
    return NULL;
}

static void many_threads(void **state)
{
    (void)state;
    struct crowd c = { .e = open_echo(64) };
    pthread_t in[THREADS], out[2];
    for (int i = 0; i < 2; i++)
        pthread_create(&out[i], NULL, poller, &c);
    for (int i = 0; i < THREADS; i++)
        pthread_create(&in[i], NULL, submitter, &c);
    for (int i = 0; i < THREADS; i++)
        pthread_join(in[i], NULL);
    for (int i = 0; i < 2; i++)
        pthread_join(out[i], NULL);
    assert_int_equal(atomic_load(&c.polled), THREADS * EACH);
    assert_int_equal(atomic_load(&c.mismatched), 0);
    struct engine_stats s;
    engine_stats(c.e, &s);
    assert_int_equal(s.finished, THREADS * EACH);
    engine_close(c.e);
}

static void *waker(void *arg)
{
    usleep(50000);
    engine_wake(arg);
    return NULL;
}

static void wake_ends_a_poll(void **state)
{
    (void)state;
    engine *e = open_echo(4);
    struct engine_event ev;
    pthread_t t;
    int64_t from = lm_now_us();
    assert_int_equal(engine_poll(e, &ev, 1, 30, NULL), 0);      /* by itself it ends in time */
    assert_in_range(lm_now_us() - from, 20000, 20000000);
    pthread_create(&t, NULL, waker, e);
    from = lm_now_us();
    assert_int_equal(engine_poll(e, &ev, 1, 60000, NULL), 0);
    assert_in_range(lm_now_us() - from, 0, 30000000);
    pthread_join(t, NULL);
    engine_wake(e);             /* between two polls: kept for the next, and for no other */
    from = lm_now_us();
    assert_int_equal(engine_poll(e, &ev, 1, 60000, NULL), 0);
    assert_in_range(lm_now_us() - from, 0, 30000000);
    from = lm_now_us();
    assert_int_equal(engine_poll(e, &ev, 1, 30, NULL), 0);
    assert_in_range(lm_now_us() - from, 20000, 20000000);
    engine_close(e);
}

static void expired_deadline(void **state)
{
    (void)state;
    engine *e = open_echo(4);
    struct engine_request r = request("late", "x");
    engine_handle h;
    struct engine_event ev;
    for (int first = 0; first < 2; first++) {
        r.deadline_ms = !first;
        r.first_token_by_ms = first;
        assert_int_equal(engine_submit(e, &r, &h, NULL), LM_OK);
        assert_int_equal(engine_poll(e, &ev, 1, 5000, NULL), 1);
        assert_int_equal(ev.result->choices[0].reason, ENGINE_EXPIRED);
        engine_result_free(ev.result);
    }
    engine_close(e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_model_is_named_after_its_folder),
        cmocka_unit_test(answers_itself),
        cmocka_unit_test(full_queue_is_busy),
        cmocka_unit_test(handles_are_never_reused),
        cmocka_unit_test(bad_requests_are_refused_by_name),
        cmocka_unit_test(adapter_ids),
        cmocka_unit_test(many_threads),
        cmocka_unit_test(wake_ends_a_poll),
        cmocka_unit_test(expired_deadline),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
