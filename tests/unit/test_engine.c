/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine.c - how requests behave on a real (tiny) model: ends of every kind, stop strings,
 * choices and seeds, scoring, refusals, versions, tight pools, threads.
 *
 * spm-tiny with its two adapters serves all of it; the numbers themselves are test_golden.c's.
 */
#include "engine_fixture.h"

#include "engine/core.h"

#include <pthread.h>
#include <stdatomic.h>

#define ADAPTERS "tests/models/spm-tiny-adapters"
#define SAL ADAPTERS "/captain-sal"
#define TERSE ADAPTERS "/nordwind-terse"
#define PROMPT "Order 1042 was shipped today to Anna"

static engine *open_with(void (*change)(struct engine_config *c))
{
    struct engine_config cfg = fixture_config(SPM_TINY);
    if (change)
        change(&cfg);
    return fixture_engine(&cfg);
}

static struct engine_request text_request(const char *id, const char *prompt, int max_tokens)
{
    struct engine_request r = fixture_request(id, NULL, 0);
    r.prompt = prompt;
    r.prompt_len = strlen(prompt);
    r.params.max_tokens = max_tokens;
    r.params.ignore_eos = true;
    return r;
}

static char *run_text(engine *e, const struct engine_request *r)
{
    struct engine_result *res = fixture_run(e, r);
    char *text = strdup(res->choices[0].text);
    engine_result_free(res);
    return text;
}

/* ---- stops ----------------------------------------------------------------------------- */

/* Any piece of the greedy text must stop it where it first occurs, whatever tokens it spans. */
static void stop_strings_anywhere(void **state)
{
    (void)state;
    engine *e = open_with(NULL);
    struct engine_request r = text_request("stop", PROMPT, 40);
    char *all = run_text(e, &r);
    int len = (int)strlen(all);
    assert_true(len > 30);
    for (int at = 0; at + 9 < len; at += 3) {
        char stop[16];
        int n = 1 + at % 9;
        while (at > 0 && ((unsigned char)all[at] & 0xc0) == 0x80)
            at++;               /* not inside a character */
        snprintf(stop, sizeof stop, "%.*s", n, all + at);
        r.params.stop[0] = "never in this text";
        r.params.stop[1] = stop;
        r.params.n_stop = 2;
        r.params.include_stop = at % 2;
        struct engine_result *res = fixture_run(e, &r);
        size_t want = (size_t)(strstr(all, stop) - all) + (at % 2 ? strlen(stop) : 0);
        assert_int_equal(res->choices[0].reason, ENGINE_STOP);
        assert_int_equal(res->choices[0].text_len, want);
        assert_memory_equal(res->choices[0].text, all, want);
        engine_result_free(res);
    }
    free(all);
    engine_close(e);
}

static void streamed_pieces_make_the_text(void **state)
{
    (void)state;
    engine *e = open_with(NULL);
    struct engine_request r = text_request("stream", PROMPT, 40);
    char *all = run_text(e, &r), stop[8], got[1024] = "";
    snprintf(stop, sizeof stop, "%.5s", all + strlen(all) / 2);
    r.stream = true;
    r.params.stop[0] = stop;
    r.params.n_stop = 1;
    fixture_submit(e, &r);
    struct engine_event ev = { 0 };
    int pieces = 0;
    while (engine_poll(e, &ev, 1, 5000, NULL) == 1 && ev.kind == ENGINE_TOKENS) {
        assert_int_equal(ev.text_len, strlen(ev.text));
        strncat(got, ev.text, sizeof got - strlen(got) - 1);
        free(ev.text);
        pieces++;
    }
    assert_int_equal(ev.kind, ENGINE_FINISHED);
    assert_true(pieces > 0);
    assert_string_equal(got, ev.result->choices[0].text);
    assert_null(strstr(got, stop));
    engine_result_free(ev.result);
    free(all);
    engine_close(e);
}

static void stop_token_ids_and_min_tokens(void **state)
{
    (void)state;
    engine *e = open_with(NULL);
    struct engine_request r = text_request("ids", PROMPT, 20);
    struct engine_result *all = fixture_run(e, &r);
    int32_t stop = all->choices[0].token_ids[6];
    int first = 0;
    while (all->choices[0].token_ids[first] != stop)
        first++;
    r.params.stop_token_ids = &stop;
    r.params.n_stop_token_ids = 1;
    struct engine_result *res = fixture_run(e, &r);
    assert_int_equal(res->choices[0].reason, ENGINE_STOP);
    assert_int_equal(res->choices[0].n_tokens, first + 1);
    assert_int_equal(res->completion_tokens, first + 1);
    assert_int_equal(res->choices[0].token_ids[first], stop);
    assert_true(res->choices[0].text_len < all->choices[0].text_len);
    engine_result_free(res);
    r.params.min_tokens = 15;           /* the id is banned until then */
    res = fixture_run(e, &r);
    assert_true(res->choices[0].n_tokens >= 15);
    for (int i = 0; i < 15 - 1; i++)
        assert_true(res->choices[0].token_ids[i] != stop);
    engine_result_free(res);
    engine_result_free(all);
    engine_close(e);
}

static void max_model_len_ends_with_length(void **state)
{
    (void)state;
    engine *e = open_with(NULL);
    struct engine_info info;
    engine_info(e, &info);
    int32_t ids[512];
    int n = info.max_model_len - 5;
    assert_true(n <= 512);
    for (int i = 0; i < n; i++)
        ids[i] = 5 + i % 300;
    struct engine_request r = fixture_request("edge", ids, n);
    r.params.max_tokens = 100;
    r.params.ignore_eos = true;
    struct engine_result *res = fixture_run(e, &r);
    assert_int_equal(res->choices[0].reason, ENGINE_LENGTH);
    assert_int_equal(res->choices[0].n_tokens, 5);
    engine_result_free(res);
    engine_close(e);
}

/* ---- choices and seeds ----------------------------------------------------------------- */

static void seeds_reproduce(void **state)
{
    (void)state;
    engine *e = open_with(NULL);
    struct engine_request r = text_request("seed-a", PROMPT, 24);
    r.params.temperature = 1.2f;
    char *a = run_text(e, &r), *b = run_text(e, &r);
    assert_string_equal(a, b);          /* the default seed comes from the id */
    free(b);
    r.id = "seed-b";
    b = run_text(e, &r);
    assert_string_not_equal(a, b);
    free(b);
    r.params.has_seed = true;
    r.params.seed = 7;
    r.params.n = 4;
    struct engine_result *four = fixture_run(e, &r);
    assert_int_equal(four->n_choices, 4);
    assert_int_equal(four->completion_tokens, 4 * 24);
    r.params.n = 1;
    r.id = "seed-c";
    b = run_text(e, &r);
    assert_string_equal(four->choices[0].text, b);      /* the seed alone decides */
    for (int i = 0; i < 4; i++) {
        assert_int_equal(four->choices[i].index, i);
        for (int k = 0; k < i; k++)
            assert_string_not_equal(four->choices[i].text, four->choices[k].text);
    }
    engine_result_free(four);
    free(a);
    free(b);
    engine_close(e);
}

/* Choices share the prompt's full blocks; what they say does not change by it. */
static void choices_share_the_prompt(void **state)
{
    (void)state;
    engine *e = open_with(NULL);
    int32_t ids[100];
    for (int i = 0; i < 100; i++)
        ids[i] = 10 + i * 7 % 500;
    struct engine_request r = fixture_request("share", ids, 100);
    r.params.n = 8;
    r.params.max_tokens = 12;
    r.params.ignore_eos = true;
    struct engine_result *res = fixture_run(e, &r);
    for (int i = 1; i < 8; i++)         /* greedy: all the same */
        assert_memory_equal(res->choices[i].token_ids, res->choices[0].token_ids,
                            12 * sizeof(int32_t));
    struct engine_stats st;
    engine_stats(e, &st);
    assert_int_equal(st.prefill_tokens, 100 + 7 * (100 - 96));
    engine_result_free(res);
    res = fixture_run(e, &r);
    assert_int_equal(res->cached_tokens, 96);
    engine_result_free(res);
    engine_close(e);
}

/* ---- scoring --------------------------------------------------------------------------- */

static void echo_scores_the_prompt(void **state)
{
    (void)state;
    engine *e = open_with(NULL);
    struct engine_request r = text_request("score", PROMPT, 8);
    r.params.echo = true;
    r.params.logprobs = 3;
    struct engine_result *with = fixture_run(e, &r);
    r.params.max_tokens = 0;
    r.params.n = 2;
    struct engine_result *only = fixture_run(e, &r);
    struct engine_choice *a = &with->choices[0], *b = &only->choices[0];
    assert_string_equal(b->text, PROMPT);
    assert_int_equal(b->reason, ENGINE_LENGTH);
    assert_int_equal(only->completion_tokens, 0);
    assert_int_equal(b->n_logprobs, only->prompt_tokens);
    assert_int_equal(only->choices[1].n_logprobs, only->prompt_tokens);
    assert_int_equal(a->n_logprobs, with->prompt_tokens + 8);
    assert_memory_equal(a->text, PROMPT, strlen(PROMPT));
    for (int i = 1; i < b->n_logprobs; i++) {
        assert_int_equal(a->logprobs[i].id, b->logprobs[i].id);
        assert_true(fabsf(a->logprobs[i].logprob - b->logprobs[i].logprob) < 1e-4f);
        assert_int_equal(b->logprobs[i].n_top, 3);
        assert_true(b->logprobs[i].text_offset >= b->logprobs[i - 1].text_offset);
        assert_true(b->logprobs[i].top[0].logprob >= b->logprobs[i].top[1].logprob);
    }
    engine_result_free(with);
    engine_result_free(only);
    r.params.logprobs = -1;             /* nothing to compute at all */
    only = fixture_run(e, &r);
    assert_string_equal(only->choices[1].text, PROMPT);
    assert_int_equal(only->steps, 0);
    engine_result_free(only);
    engine_close(e);
}

/* ---- early ends ------------------------------------------------------------------------ */

static void small_batch(struct engine_config *c)
{
    c->max_seqs = 1;
}

static void cancelled_and_expired(void **state)
{
    (void)state;
    engine *e = open_with(small_batch);
    struct engine_request r = text_request("long", PROMPT, 400);
    engine_handle run = fixture_submit(e, &r), wait = fixture_submit(e, &r);
    r.deadline_ms = lm_wall_ms() - 1;
    engine_handle late = fixture_submit(e, &r);
    assert_int_equal(engine_cancel(e, wait), LM_OK);
    assert_int_equal(engine_cancel(e, run), LM_OK);
    for (int i = 0; i < 3; i++) {
        struct engine_event ev = fixture_finished(e);
        assert_int_equal(ev.result->status, LM_OK);
        assert_int_equal(ev.result->choices[0].reason,
                         ev.handle == late ? ENGINE_EXPIRED : ENGINE_CANCELLED);
        assert_true(ev.result->choices[0].n_tokens < 400);
        engine_result_free(ev.result);
    }
    assert_int_equal(engine_cancel(e, run), LM_NOT_FOUND);
    assert_int_equal(engine_cancel(e, 12345), LM_NOT_FOUND);
    engine_close(e);
}

static void without_early_abort(struct engine_config *c)
{
    static struct engine_policy p;
    engine_policy_default(&p);
    p.early_abort = false;
    c->policy = &p;
}

/* A running request is cut off by its deadline and keeps what it has. With early abort it would
 * often be refused before it runs, when it is seen that it can't be in time. */
static void expires_while_running(void **state)
{
    (void)state;
    engine *e = open_with(without_early_abort);
    for (int ms = 2; ms < 2000; ms *= 2) {
        struct engine_request r = text_request("deadline", PROMPT, 400);
        r.params.n = 64;
        r.deadline_ms = lm_wall_ms() + ms;
        struct engine_result *res = fixture_run(e, &r);
        int some = 0, expired = 0;
        for (int i = 0; i < 64; i++) {
            expired += res->choices[i].reason == ENGINE_EXPIRED;
            some += res->choices[i].n_tokens > 0;
        }
        engine_result_free(res);
        if (expired && some) {
            engine_close(e);
            return;
        }
    }
    fail_msg("no deadline hit a running request");
}

static void closes_with_work_in_flight(void **state)
{
    (void)state;
    engine *e = open_with(NULL);
    engine_adapter *a = NULL;
    CHECK(engine_adapter_load(e, "sal", SAL, &a, err));
    for (int i = 0; i < 100; i++) {
        struct engine_request r = text_request("drop", PROMPT, 400);
        r.adapter = i % 2 ? a : NULL;
        r.stream = true;
        fixture_submit(e, &r);
    }
    usleep(20000);
    engine_adapter_unref(a);
    engine_close(e);
}

/* ---- refusals -------------------------------------------------------------------------- */

static void tiny_pool(struct engine_config *c)
{
    c->pool_bytes = 10 * 3 * 4096;      /* ten blocks of 16 tokens */
}

static void expect_refusal(engine *e, const struct engine_request *r, lm_status want,
                           const char *word)
{
    struct lm_err err = { 0 };
    engine_handle h;
    lm_status got = engine_submit(e, r, &h, &err);
    if (got != want || !strstr(err.msg, word))
        fail_msg("got %s, '%s'; want %s, '%s'", lm_status_wire(got), err.msg, lm_status_wire(want),
                 word);
}

static void refuses_with_reasons(void **state)
{
    (void)state;
    engine *e = open_with(tiny_pool);
    struct engine_info info;
    engine_info(e, &info);
    static int32_t ids[600];
    for (int i = 0; i < 600; i++)
        ids[i] = 7;
    struct engine_request r = fixture_request("r", ids, 600);
    expect_refusal(e, &r, LM_TOO_LARGE, "600 tokens");
    r.n_token_ids = 200;
    expect_refusal(e, &r, LM_TOO_LARGE, "blocks of KV cache");
    r.n_token_ids = 10;
    r.params.max_tokens = 300;
    expect_refusal(e, &r, LM_TOO_LARGE, "max_tokens 300");
    r.params.max_tokens = 10;
    ids[3] = info.vocab_size;
    expect_refusal(e, &r, LM_INVALID, "prompt token 3");
    ids[3] = -1;
    expect_refusal(e, &r, LM_INVALID, "prompt token 3 is -1");
    r.n_token_ids = 0;
    expect_refusal(e, &r, LM_INVALID, "empty");
    struct engine_request t = text_request("t", "caf\xe9 \xff", 4);
    expect_refusal(e, &t, LM_FORMAT, "UTF-8");
    engine_close(e);
}

/* Messages with documents ahead are what the documents in the system message are; a model without a
 * template takes no messages. */
static void chat_takes_context(void **state)
{
    (void)state;
    static const struct engine_message ask[] = { { "user", "Where is my order?" } };
    static const struct engine_message told[] = {
        { "system", "Order 7 is late.\n\nBe kind." }, { "user", "Where is my order?" },
    };
    static const char *const docs[] = { "Order 7 is late.", "Be kind." };
    engine *e = open_with(NULL);
    struct engine_info info;
    engine_info(e, &info);
    assert_non_null(info.chat_family);
    struct engine_request r = text_request("chat", "", 12);
    r.prompt = NULL;
    r.messages = told;
    r.n_messages = 2;
    char *want = run_text(e, &r);
    r.messages = ask;
    r.n_messages = 1;
    char *plain = run_text(e, &r);
    r.context = docs;
    r.n_context = 2;
    char *got = run_text(e, &r);
    assert_string_equal(got, want);
    assert_string_not_equal(plain, want);
    engine_close(e);

    struct fixture_dir d = fixture_open("tests/fixtures/families/llama2/model");
    char path[128];
    snprintf(path, sizeof path, "%s/tokenizer_config.json", d.path);
    unlink(path);
    struct engine_config cfg = fixture_config(d.path);
    e = fixture_engine(&cfg);
    expect_refusal(e, &r, LM_UNSUPPORTED, "chat");
    engine_close(e);
    fixture_close(&d);
    free(want);
    free(plain);
    free(got);
}

static void refuses_bad_openings(void **state)
{
    (void)state;
    struct lm_err err = { 0 };
    engine *e = NULL;
    struct engine_config cfg = fixture_config("/nonexistent/model");
    assert_int_not_equal(engine_open(&cfg, &e, &err), LM_OK);
    assert_non_null(strstr(err.msg, "/nonexistent/model"));
    cfg = fixture_config(NULL);
    assert_int_equal(engine_open(&cfg, &e, &err), LM_INVALID);
    cfg = fixture_config(SPM_TINY);
    cfg.backend = "abacus";
    assert_int_equal(engine_open(&cfg, &e, &err), LM_INVALID);
    assert_non_null(strstr(err.msg, "abacus"));
    cfg = fixture_config(SPM_TINY);
    cfg.pool_bytes = 100;
    assert_int_equal(engine_open(&cfg, &e, &err), LM_TOO_LARGE);
    cfg = fixture_config(SPM_TINY);
    cfg.max_model_len = 1 << 20;
    assert_int_equal(engine_open(&cfg, &e, &err), LM_INVALID);
    cfg = fixture_config(SPM_TINY);
    cfg.block_tokens = 12;
    assert_int_equal(engine_open(&cfg, &e, &err), LM_INVALID);
    cfg = fixture_config(SPM_TINY);
    cfg.kv = (enum engine_kv)2;
    assert_int_equal(engine_open(&cfg, &e, &err), LM_INVALID);
    struct engine_policy merge;
    engine_policy_default(&merge);
    merge.merge = true;
    cfg = fixture_config(SPM_TINY);
    cfg.policy = &merge;
    for (int w = ENGINE_WEIGHTS_FP8; w <= ENGINE_WEIGHTS_FP8_DYNAMIC; w++) {
        cfg.weights = (enum engine_weights)w;
        assert_int_equal(engine_open(&cfg, &e, &err), LM_INVALID);
        assert_non_null(strstr(err.msg, "merged"));
    }
    cfg.weights = (enum engine_weights)(ENGINE_WEIGHTS_FP8_DYNAMIC + 1);
    assert_int_equal(engine_open(&cfg, &e, &err), LM_INVALID);
}

static void refuse_policy(const struct engine_policy *p, const char *words)
{
    struct lm_err err = { 0 };
    engine *e = NULL;
    struct engine_config cfg = fixture_config(SPM_TINY);
    cfg.policy = p;
    assert_int_equal(engine_open(&cfg, &e, &err), LM_INVALID);
    if (!strstr(err.msg, words))
        fail_msg("expected '%s' in: %s", words, err.msg);
}

static void refuses_bad_policies(void **state)
{
    (void)state;
    struct engine_policy good, p;
    engine_policy_default(&good);
    p = good;
    p.max_overtaken = 0;
    refuse_policy(&p, "policy.max_overtaken is 0");
    p = good;
    p.max_wait_ms = -1;
    refuse_policy(&p, "policy.max_wait_ms is -1");
    p.max_wait_ms = INT64_MAX;
    refuse_policy(&p, "policy.max_wait_ms is 9223372036854775807");
    p = good;
    p.preempt = (enum engine_preempt)7;
    refuse_policy(&p, "policy.preempt is 7");
    p.preempt = ENGINE_PREEMPT_SWAP;
    p.swap_bytes = 0;
    refuse_policy(&p, "swap_bytes is 0");
    p = good;
    p.adapter_percent = 100;
    refuse_policy(&p, "policy.adapter_percent is 100");
    p = good;
    p.adapter_slots = -1;
    refuse_policy(&p, "policy.adapter_slots is -1");
}

/* ---- adapters -------------------------------------------------------------------------- */

/* The same id with other content: a new version; who holds the old one is served by it. */
static void versions_live_side_by_side(void **state)
{
    (void)state;
    engine *e = open_with(NULL);
    engine_adapter *a = NULL, *b = NULL, *c = NULL;
    CHECK(engine_adapter_load(e, "voice", SAL, &a, err));
    struct engine_request r = text_request("v", PROMPT, 24);
    char *base = run_text(e, &r);
    r.adapter = a;
    char *sal = run_text(e, &r);
    CHECK(engine_adapter_load(e, "voice", TERSE, &b, err));
    assert_string_not_equal(engine_adapter_digest(a), engine_adapter_digest(b));
    c = engine_adapter_find(e, "voice");
    assert_ptr_equal(b, c);
    engine_adapter_unref(c);
    CHECK(engine_adapter_load(e, "voice", TERSE, &c, err));
    assert_ptr_equal(b, c);             /* same content: the version already held */
    engine_adapter_unref(c);
    r.adapter = b;
    char *terse = run_text(e, &r);
    r.adapter = a;
    char *again = run_text(e, &r);      /* the prefix cache must not mix versions */
    assert_string_equal(sal, again);
    assert_string_not_equal(sal, terse);
    assert_string_not_equal(sal, base);
    engine_adapter_unref(a);            /* the old version goes for good */
    engine_adapter_unref(b);
    struct engine_stats st = { .adapters_resident = 2 };
    for (int i = 0; i < 200 && st.adapters_resident > 1; i++) {
        usleep(5000);
        engine_stats(e, &st);
    }
    assert_int_equal(st.adapters_host, 1);
    assert_int_equal(st.adapters_resident, 1);
    free(base);
    free(sal);
    free(terse);
    free(again);
    engine_close(e);
}

static size_t image_bytes[2];

static void two_images(struct engine_config *c)
{
    c->host_adapter_bytes = image_bytes[0] + image_bytes[1];
}

static void host_budget_evicts_the_unused(void **state)
{
    (void)state;
    engine *e = open_with(NULL);
    engine_adapter *a = NULL, *b = NULL, *c = NULL;
    struct lm_err err;
    CHECK(engine_adapter_load(e, "a", SAL, &a, err));
    CHECK(engine_adapter_load(e, "b", TERSE, &b, err));
    image_bytes[0] = engine_adapter_bytes(a);
    image_bytes[1] = engine_adapter_bytes(b);
    engine_adapter_unref(a);
    engine_adapter_unref(b);
    engine_close(e);

    e = open_with(two_images);
    CHECK(engine_adapter_load(e, "a", SAL, &a, err));
    CHECK(engine_adapter_load(e, "b", TERSE, &b, err));
    assert_int_equal(engine_adapter_load(e, "c", SAL, &c, &err), LM_BUSY);
    engine_adapter_unref(a);
    CHECK(engine_adapter_load(e, "c", SAL, &c, err));
    assert_null(engine_adapter_find(e, "a"));
    a = engine_adapter_find(e, "c");
    assert_ptr_equal(a, c);
    engine_adapter_unref(a);
    engine_adapter_unref(b);
    engine_adapter_unref(c);
    engine_close(e);
}

static int one_adapter_blocks, one_request_blocks;

static void room_for_one(struct engine_config *c)
{
    c->pool_bytes = (size_t)(one_adapter_blocks + one_request_blocks) * 3 * 4096;
}

/* A pool that holds one adapter and one request of it still serves two, by turns. */
static void a_tight_pool_swaps_adapters(void **state)
{
    (void)state;
    engine *e = open_with(NULL);
    engine_adapter *a[2] = { NULL, NULL };
    struct engine_info info;
    engine_info(e, &info);
    assert_int_equal(info.block_bytes, 4096);
    CHECK(engine_adapter_load(e, "a", SAL, &a[0], err));
    CHECK(engine_adapter_load(e, "b", TERSE, &a[1], err));
    size_t row = info.block_bytes * (size_t)info.n_layers, most = 0;
    char *want[3];
    for (int i = 0; i < 3; i++) {
        struct engine_request r = text_request("w", PROMPT, 24);
        r.adapter = i < 2 ? a[i] : NULL;
        struct engine_result *res = fixture_run(e, &r);
        want[i] = strdup(res->choices[0].text);
        one_request_blocks = LM_DIV_UP(res->prompt_tokens + 24 - 1, info.block_tokens);
        engine_result_free(res);
        if (i < 2)
            most = LM_MAX(most, LM_DIV_UP(engine_adapter_bytes(a[i]), row));
    }
    engine_adapter_unref(a[0]);
    engine_adapter_unref(a[1]);
    engine_close(e);

    one_adapter_blocks = (int)most;
    e = open_with(room_for_one);
    CHECK(engine_adapter_load(e, "a", SAL, &a[0], err));
    CHECK(engine_adapter_load(e, "b", TERSE, &a[1], err));
    for (intptr_t i = 0; i < 60; i++) {
        struct engine_request r = text_request("t", PROMPT, 24);
        r.adapter = i % 3 < 2 ? a[i % 3] : NULL;
        r.user = (void *)(i % 3);
        fixture_submit(e, &r);
    }
    for (int i = 0; i < 60; i++) {
        struct engine_event ev = fixture_finished(e);
        assert_string_equal(ev.result->choices[0].text, want[(intptr_t)ev.user]);
        engine_result_free(ev.result);
    }
    for (int i = 0; i < 4; i++) {       /* one after the other: each must push the other out */
        struct engine_request r = text_request("t", PROMPT, 24);
        r.adapter = a[i % 2];
        char *got = run_text(e, &r);
        assert_string_equal(got, want[i % 2]);
        free(got);
    }
    struct engine_stats st;
    engine_stats(e, &st);
    assert_true(st.adapter_evictions >= 3);
    assert_true(st.adapter_loads >= 4);
    assert_int_equal(st.finished, 64);
    for (int i = 0; i < 3; i++)
        free(want[i]);
    engine_adapter_unref(a[0]);
    engine_adapter_unref(a[1]);
    engine_close(e);
}

/* ---- threads --------------------------------------------------------------------------- */

#define THREADS 3
#define EACH 20

struct crowd {
    engine *e;
    atomic_int submitted;
};

static void *submitter(void *arg)
{
    struct crowd *c = arg;
    static const char *const dirs[] = { SAL, TERSE };
    for (int i = 0; i < EACH; i++) {
        struct engine_request r = text_request("crowd", PROMPT, 3 + i % 7);
        engine_adapter *a = NULL;
        engine_handle h;
        if (i % 3) {                    /* versions come and go under the same id */
            if (engine_adapter_load(c->e, "shared", dirs[i % 2], &a, NULL) != LM_OK)
                return NULL;
            r.adapter = a;
        }
        while (engine_submit(c->e, &r, &h, NULL) == LM_BUSY)
            usleep(500);
        engine_adapter_unref(a);
        if (i % 5 == 0)
            engine_cancel(c->e, h);
        atomic_fetch_add(&c->submitted, 1);
        struct engine_stats st;
        engine_stats(c->e, &st);
    }
    return NULL;
}

static void few_slots(struct engine_config *c)
{
    c->max_waiting = 8;
}

static void many_threads(void **state)
{
    (void)state;
    struct crowd c = { .e = open_with(few_slots) };
    pthread_t t[THREADS];
    for (int i = 0; i < THREADS; i++)
        pthread_create(&t[i], NULL, submitter, &c);
    for (int i = 0; i < THREADS * EACH; i++) {
        struct engine_event ev = fixture_finished(c.e);
        assert_int_equal(ev.result->status, LM_OK);
        engine_result_free(ev.result);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(t[i], NULL);
    assert_int_equal(atomic_load(&c.submitted), THREADS * EACH);
    engine_close(c.e);
}

static void by_hand(struct engine_config *c)
{
    c->manual = true;
}

/* A manual engine does nothing until it is pumped, stops when the clock says so, and closes with
 * work in flight. */
static void pumped_by_hand(void **state)
{
    (void)state;
    static const int32_t ids[4] = { 40, 41, 42, 43 };
    engine *e = open_with(by_hand), *other = open_with(NULL);
    struct engine_request r = fixture_request("hand", ids, 4);
    r.params.max_tokens = 20;
    r.params.ignore_eos = true;
    struct engine_result *want = fixture_run(other, &r);
    struct engine_event ev;
    bool idle = true;
    CHECK(engine_pump(e, INT64_MAX, &idle, err));
    assert_true(idle);
    fixture_submit(e, &r);
    assert_int_equal(engine_poll(e, &ev, 1, 0, NULL), 0);
    CHECK(engine_pump(e, engine_now_us(e), &idle, err));        /* no time: no turn */
    assert_false(idle);
    CHECK(engine_pump(e, INT64_MAX, &idle, err));
    assert_true(idle);
    assert_int_equal(engine_poll(e, &ev, 1, 0, NULL), 1);
    assert_int_equal(ev.result->choices[0].n_tokens, 20);
    assert_memory_equal(ev.result->choices[0].token_ids, want->choices[0].token_ids, 80);
    assert_int_equal(engine_pump(other, INT64_MAX, &idle, NULL), LM_STATE);
    assert_int_equal(engine_advance(e, INT64_MAX), LM_UNSUPPORTED);
    engine_result_free(ev.result);
    engine_result_free(want);
    fixture_submit(e, &r);
    CHECK(engine_pump(e, engine_now_us(e) + 1, &idle, err));
    engine_close(e);
    engine_close(other);
}

#define AHEAD 12

/* Everything that a step takes from tokens not known when it is laid out: ids, penalties, seeds,
 * stop ids banned by min_tokens. */
static void submit_demanding(engine *e)
{
    static const int32_t ids[6] = { 40, 41, 42, 43, 44, 45 };
    static const int32_t stops[40] = { 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20 };
    for (intptr_t i = 0; i < AHEAD; i++) {
        struct engine_request r = fixture_request("ahead", ids, 3 + (int)i % 4);
        r.user = (void *)i;
        r.params.max_tokens = 30;
        r.params.temperature = i % 2 ? 1.0f : 0;
        r.params.repetition_penalty = i % 3 ? 1.0f : 1.5f;
        r.params.presence_penalty = i % 4 ? 0 : 0.7f;
        r.params.frequency_penalty = i % 5 ? 0 : 0.9f;
        r.params.min_tokens = i % 6 ? 0 : 12;
        r.params.stop_token_ids = stops;
        r.params.n_stop_token_ids = i % 2 ? 40 : 0;
        r.params.n = i % 4 == 1 ? 3 : 1;
        r.params.logprobs = i % 3 ? -1 : 2;
        fixture_submit(e, &r);
    }
}

static void collect_all(engine *e, struct engine_result *res[AHEAD])
{
    submit_demanding(e);
    for (int i = 0; i < AHEAD; i++) {
        struct engine_event ev = fixture_finished(e);
        assert_int_equal(ev.result->status, LM_OK);
        res[(intptr_t)ev.user] = ev.result;
    }
}

static void planned_ahead_is_the_same(void **state)
{
    (void)state;
    struct engine_result *one[AHEAD], *two[AHEAD];
    core_force_pipeline(false);
    engine *e = open_with(NULL);
    core_force_pipeline(true);
    engine *ahead = open_with(NULL);
    core_force_pipeline(false);
    collect_all(e, one);
    collect_all(ahead, two);
    for (int i = 0; i < AHEAD; i++) {
        for (int k = 0; k < one[i]->n_choices; k++) {
            const struct engine_choice *a = &one[i]->choices[k], *b = &two[i]->choices[k];
            assert_int_equal(a->n_tokens, b->n_tokens);
            assert_int_equal(a->reason, b->reason);
            assert_memory_equal(a->token_ids, b->token_ids, (size_t)a->n_tokens * sizeof(int32_t));
        }
        engine_result_free(one[i]);
        engine_result_free(two[i]);
    }
    engine_close(e);
    engine_close(ahead);
}

static int pipelined(void **state)
{
    (void)state;
    core_force_pipeline(true);
    return 0;
}

int main(void)
{
    lm_log_set_level(LM_WARN);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(stop_strings_anywhere),
        cmocka_unit_test(streamed_pieces_make_the_text),
        cmocka_unit_test(stop_token_ids_and_min_tokens),
        cmocka_unit_test(max_model_len_ends_with_length),
        cmocka_unit_test(seeds_reproduce),
        cmocka_unit_test(choices_share_the_prompt),
        cmocka_unit_test(echo_scores_the_prompt),
        cmocka_unit_test(cancelled_and_expired),
        cmocka_unit_test(expires_while_running),
        cmocka_unit_test(closes_with_work_in_flight),
        cmocka_unit_test(refuses_with_reasons),
        cmocka_unit_test(chat_takes_context),
        cmocka_unit_test(refuses_bad_openings),
        cmocka_unit_test(refuses_bad_policies),
        cmocka_unit_test(versions_live_side_by_side),
        cmocka_unit_test(host_budget_evicts_the_unused),
        cmocka_unit_test(a_tight_pool_swaps_adapters),
        cmocka_unit_test(many_threads),
        cmocka_unit_test(pumped_by_hand),
        cmocka_unit_test(planned_ahead_is_the_same),
    };
    /* All of it holds while steps are planned ahead, too. */
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    return failed + cmocka_run_group_tests_name("pipelined", tests, pipelined, NULL);
}
