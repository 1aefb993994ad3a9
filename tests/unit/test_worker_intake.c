/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_worker_intake.c - a deadline and an order to cancel end a prompt wherever it waits in
 * intake: behind a full engine, to be tried again, for an adapter from a store that says nothing,
 * while a suspect runs alone, and for its own turn as a suspect. And a registry that says nothing
 * holds up only the prompts that ask it. What a prompt counts for against intake.max_tokens, and
 * that none which names an adapter goes without.
 *
 * Intake's thread, the store and the codec are real; of the engine there is only a submit that says
 * "busy" and an adapter that is none, of the reply how it would end, and of the journal what is
 * being decoded (all wrapped by the linker). What was read is decoded already, but where the
 * registry is at issue.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

#include <cmocka.h>

#include "consumer_world.h"
#include "silent_server.h"
#include "worker/codec/codec.h"
#include "worker/journal.h"
#include "worker/store/store_int.h"
#include "worker/worker.h"

enum { PROMPTS = 8, SOON_MS = 150, PATIENCE_MS = 10000, MUCH_LATER_MS = 600000,
       BUDGET = 4000000, CONTEXT = 4096 };      /* tokens that may be held; what the model takes */

static struct { atomic_int calls, reason; atomic_llong at_ms; } replies[PROMPTS];   /* reason + 1 */
static atomic_bool not_encodable;
static atomic_bool by_base_model;       /* a prompt that names an adapter was submitted without */

static engine_adapter *const some_adapter = (engine_adapter *)&by_base_model;

void __wrap_engine_adapter_unref(engine_adapter *a);
void __wrap_engine_adapter_unref(engine_adapter *a)
{
    assert_ptr_equal(a, some_adapter);
}

lm_status __wrap_engine_submit(engine *e, const struct engine_request *r, engine_handle *out,
                               struct lm_err *err);
lm_status __wrap_engine_submit(engine *e, const struct engine_request *r, engine_handle *out,
                               struct lm_err *err)
{
    const struct job *j = r->user;
    (void)e, (void)out;
    if (j->prompt->adapter && !r->adapter)
        atomic_store(&by_base_model, true);
    return lm_err_set(err, LM_BUSY, "full");
}

lm_status __wrap_outcome_reply(struct worker *w, struct job *j);
lm_status __wrap_outcome_reply(struct worker *w, struct job *j)
{
    atomic_store(&replies[j->record.offset].at_ms, lm_wall_ms());
    atomic_fetch_add(&replies[j->record.offset].calls, 1);
    if (atomic_load(&not_encodable))
        return LM_NET;
    atomic_store(&replies[j->record.offset].reason, j->result->choices[0].reason + 1);
    worker_end_job(w, j, OUTCOME_REPLY);
    return LM_OK;
}

static atomic_int decodings;            /* prompts that the journal was told of */
static _Atomic uint64_t decoding;       /* the key of the one that is decoded, 0: none */

void __wrap_journal_decoding(journal *j, uint64_t key);
void __wrap_journal_decoding(journal *j, uint64_t key)
{
    (void)j;
    atomic_fetch_add(&decodings, key != 0);
    atomic_store(&decoding, key);
}

static engine_adapter *find_nothing(engine *e, const char *id)
{
    (void)e, (void)id;
    return NULL;
}

/* ---- a test's surroundings -------------------------------------------------------------- */

struct fix {
    struct world *x;
    struct intake *in;
    int socket;
    char dir[64], url[64];
    struct job *jobs[PROMPTS];          /* each with a reference of the test */
};

/* The store's silent server is the registry, too. */
static lm_status open_registry(struct fix *f)
{
    struct worker *w = &f->x->w;
    char dir[96];
    struct codec_config cfg = { .registry.url = f->url, .reply_topic = "replies",
                                .answered = intake_schema_answered };
    snprintf(dir, sizeof dir, "%s/journal", f->dir);
    f->x->cfg.poison_max_attempts = 3;
    f->x->cfg.intake_max_tokens = BUDGET;
    w->info.max_model_len = CONTEXT;
    f->x->cfg.topics_replies = f->x->cfg.topics_replies_allowed = (char *)"replies";
    atomic_store(&decodings, 0);
    lm_status st = journal_open(dir, "group", &w->journal, NULL);
    return st ? st : codec_new(&cfg, &w->codec, NULL);
}

static int set_up(void **state, bool registry)
{
    static const struct store_hooks hooks = { .find = find_nothing };
    struct fix *f = lm_calloc(1, sizeof *f);
    int port;
    memset(replies, 0, sizeof replies);
    not_encodable = false;
    f->x = world_open();
    f->x->cfg.retry_backoff_ms = f->x->cfg.retry_backoff_max_ms = 60000;
    f->socket = listen_silently(&port);
    snprintf(f->dir, sizeof f->dir, "/tmp/loramill-intake-XXXXXX");
    snprintf(f->url, sizeof f->url, "http://127.0.0.1:%d/{adapter}", port);
    struct store_config cfg = { .url = f->url, .cache_dir = mkdtemp(f->dir) };
    if (store_new_with(&cfg, &hooks, &f->x->w.store, NULL) || (registry && open_registry(f)) ||
        intake_new(&f->x->w, &f->in, NULL))
        return -1;
    *state = f;
    return 0;
}

static int setup(void **state)
{
    return set_up(state, false);
}

static int setup_registry(void **state)
{
    return set_up(state, true);
}

static int teardown(void **state)
{
    struct fix *f = *state;
    struct worker *w = &f->x->w;
    char command[128];
    atomic_store(&w->stopping, true);
    atomic_store(&w->ending, true);
    intake_free(f->in);
    store_free(w->store);
    for (int i = 0; i < PROMPTS; i++)
        job_unref(f->jobs[i]);
    world_close(f->x);
    close(f->socket);
    snprintf(command, sizeof command, "rm -rf %s", f->dir);
    int st = system(command);
    free(f);
    return st;
}

/* A decoded prompt, not yet on its way. deadline_ms: from now; 0: none. */
static struct job *make(struct fix *f, int offset, const char *adapter, int deadline_ms)
{
    struct job *j = world_deliver(f->x, offset, NULL);
    struct arena *a = job_arena(j);
    struct prompt *p = arena_alloc(a, sizeof *p);
    p->id = "id";
    p->arena = a;
    p->adapter = adapter;
    p->deadline_ms = deadline_ms ? lm_wall_ms() + deadline_ms : 0;
    j->prompt = p;
    j->worker = &f->x->w;
    f->jobs[offset] = job_ref(j);
    return j;
}

static void give(struct fix *f, int offset, const char *adapter, int deadline_ms)
{
    job_queue_push(&f->x->w.to_intake, make(f, offset, adapter, deadline_ms));
}

static void cancel(struct fix *f, int offset)
{
    atomic_store(&f->jobs[offset]->cancelled, true);
    atomic_store(&f->x->w.sweep_intake, true);
    job_queue_wake(&f->x->w.to_intake);
}

static int reason_of(int offset)
{
    return atomic_load(&replies[offset].reason) - 1;
}

static void expect(int offset, enum engine_reason reason)
{
    for (int i = 0; i < PATIENCE_MS && reason_of(offset) < 0; i++)
        usleep(1000);
    assert_int_equal(reason_of(offset), reason);
}

/* It has none, and gets none by what happens to the others. */
static void expect_waiting(int offset)
{
    assert_int_equal(atomic_load(&replies[offset].calls), 0);
}

/* Of 0 to 3: 1 has a deadline, 2 is cancelled; the others go on waiting. */
static void expect_ends(struct fix *f)
{
    expect(1, ENGINE_EXPIRED);
    assert_true(atomic_load(&replies[1].at_ms) > f->jobs[1]->prompt->deadline_ms);
    expect_waiting(2);
    cancel(f, 2);
    expect(2, ENGINE_CANCELLED);
    usleep(SOON_MS * 1000);
    expect_waiting(0);
    expect_waiting(3);
}

/* ---- tests ------------------------------------------------------------------------------ */

static void test_behind_a_full_engine(void **state)
{
    struct fix *f = *state;
    give(f, 0, NULL, MUCH_LATER_MS);
    give(f, 1, NULL, SOON_MS);
    give(f, 2, NULL, 0);
    give(f, 3, NULL, 0);
    expect_ends(f);
    give(f, 4, NULL, SOON_MS);          /* the list's last is still its last */
    expect(4, ENGINE_EXPIRED);
}

static void test_for_a_silent_store(void **state)
{
    struct fix *f = *state;
    struct store_stats st;
    give(f, 0, "a/b", MUCH_LATER_MS);
    give(f, 1, "a/b", SOON_MS);
    give(f, 2, "a/c", 0);
    give(f, 3, "a/b", 0);
    expect_ends(f);
    store_stats(f->x->w.store, &st);
    assert_int_equal(st.failures + st.retries, 0);      /* the store has not answered */
    for (int i = 0; i < 4; i += 3)
        assert_int_equal(atomic_load(&f->jobs[i]->stage), JOB_FETCHING);
}

/* Its deadline passes before the next try is due. */
static void test_to_be_tried_again(void **state)
{
    struct fix *f = *state;
    struct lm_err away = { LM_NET, "the store is away" };
    for (int i = 0; i < 4; i++) {
        struct job *j = make(f, i, "a/b", i == 1 ? SOON_MS : 0);
        job_set_stage(j, JOB_READY);
        job_fail(j, &away);
        job_queue_push(&f->x->w.to_intake, j);
    }
    expect_ends(f);
}

/* The engine failed it, and an order came before it was back here. */
static void test_sent_back_cancelled(void **state)
{
    struct fix *f = *state;
    for (int i = 0; i < 2; i++) {
        struct job *j = make(f, i, NULL, 0);
        job_set_stage(j, JOB_READY);
        j->due_us = lm_now_us() + MUCH_LATER_MS * INT64_C(1000);
        atomic_store(&j->cancelled, i == 1);
        job_queue_push(&f->x->w.to_intake, j);
    }
    expect(1, ENGINE_CANCELLED);
    expect_waiting(0);
}

static void test_while_a_suspect_runs(void **state)
{
    struct fix *f = *state;
    atomic_store(&f->x->w.closed, true);
    give(f, 0, NULL, MUCH_LATER_MS);
    give(f, 1, NULL, SOON_MS);
    give(f, 2, NULL, 0);
    give(f, 3, "a/b", 0);
    expect_ends(f);
}

static void test_a_suspect_before_its_turn(void **state)
{
    struct fix *f = *state;
    for (int i = 0; i < 4; i++) {
        struct job *j = make(f, i, NULL, i == 1 ? SOON_MS : 0);
        j->suspect = true;
        job_queue_push(&f->x->w.to_intake, j);
    }
    expect_ends(f);
}

static void test_no_first_token_in_time(void **state)
{
    struct fix *f = *state;
    give(f, 0, NULL, 0);
    struct job *j = make(f, 1, NULL, MUCH_LATER_MS);
    j->prompt->first_token_by_ms = lm_wall_ms() + SOON_MS;
    job_queue_push(&f->x->w.to_intake, j);
    expect(1, ENGINE_EXPIRED);
    expect_waiting(0);
}

/* A completion that can't be encoded (the registry is away) waits as long as everything else that
 * can heal, however often others are swept. */
static void test_an_end_that_must_wait_is_not_hurried(void **state)
{
    struct fix *f = *state;
    atomic_store(&not_encodable, true);
    for (int i = 0; i < 4; i++)
        give(f, i, NULL, SOON_MS * (i + 1));
    for (int i = 0; i < PATIENCE_MS && !atomic_load(&replies[3].calls); i++)
        usleep(1000);
    cancel(f, 0);
    usleep(SOON_MS * 2000);
    for (int i = 0; i < 4; i++)
        assert_int_equal(atomic_load(&replies[i].calls), 1);
}

/* What waits for a store is handed back when the worker ends, without the store. */
static void test_stopping_lets_go(void **state)
{
    struct fix *f = *state;
    give(f, 0, "a/b", 0);
    for (int i = 0; i < PATIENCE_MS && atomic_load(&f->jobs[0]->stage) != JOB_FETCHING; i++)
        usleep(1000);
    atomic_store(&f->x->w.stopping, true);
    for (int i = 0; i < PATIENCE_MS && atomic_load(&f->jobs[0]->stage) != JOB_DROPPED; i++)
        usleep(1000);
    assert_int_equal(atomic_load(&f->jobs[0]->stage), JOB_DROPPED);
    expect_waiting(0);
}

/* ---- a registry that says nothing --------------------------------------------------------- */

static int teardown_registry(void **state)
{
    struct fix *f = *state;
    struct worker *w = &f->x->w;
    codec *c = w->codec;
    journal *j = w->journal;
    int st = teardown(state);
    codec_free(c);
    journal_close(j);
    return st;
}

static struct job *read_value(struct fix *f, int offset, const char *value, size_t len)
{
    struct world *x = f->x;
    struct record r = { .value = value, .value_len = len, .offset = offset, .timestamp_ms = 1 };
    struct job *j = NULL;
    job_new(x->part.lease, &r, &j);
    ledger_deliver(x->c.ledger, x->part.ref, offset, job_ref(j));
    j->worker = &x->w;
    f->jobs[offset] = job_ref(j);
    return j;
}

static void expect_stage(struct fix *f, int offset, enum job_stage stage)
{
    for (int i = 0; i < PATIENCE_MS && atomic_load(&f->jobs[offset]->stage) != stage; i++)
        usleep(1000);
    assert_int_equal(atomic_load(&f->jobs[offset]->stage), stage);
}

#define AVRO_7 "\0\0\0\0\7\2" "1\4hi"
#define JSON "{\"id\": \"1\", \"prompt\": \"x\"}"

/* Prompts behind them pass, intake's pulse goes on, the journal has nobody, and an end is one. */
static void test_for_a_silent_registry(void **state)
{
    struct fix *f = *state;
    struct worker *w = &f->x->w;
    for (int i = 0; i < 3; i++)
        job_queue_push(&w->to_intake, read_value(f, i, AVRO_7, sizeof AVRO_7 - 1));
    job_queue_push(&w->to_intake, read_value(f, 3, JSON, sizeof JSON - 1));
    expect_stage(f, 3, JOB_READY);
    for (int i = 0; i < 3; i++)
        expect_stage(f, i, JOB_FETCHING);
    usleep(1000 * 1000);
    assert_true(lm_now_us() - atomic_load(&w->intake_beat_us) < 700 * 1000);
    assert_int_equal(atomic_load(&decodings), 1);
    assert_true(atomic_load(&decoding) == 0);
    atomic_store(&w->stopping, true);
    for (int i = 0; i < 4; i++)
        expect_stage(f, i, JOB_DROPPED);
}

/* A suspect asks only when it has its turn, and is not put in the engine's way by the answer. */
static void test_a_suspect_asks_in_its_turn(void **state)
{
    struct fix *f = *state;
    struct worker *w = &f->x->w;
    struct job *j = read_value(f, 0, AVRO_7, sizeof AVRO_7 - 1);
    j->suspect = true;
    job_queue_push(&w->to_intake, j);
    usleep(100 * 1000);
    assert_int_equal(atomic_load(&f->jobs[0]->stage), JOB_QUEUED);
    atomic_store(&f->jobs[0]->alone_now, true);
    expect_stage(f, 0, JOB_FETCHING);
    atomic_store(&f->jobs[0]->alone_now, false);        /* it takes too long */
    atomic_store(&w->stopping, true);
    expect_stage(f, 0, JOB_DROPPED);
    assert_int_equal(atomic_load(&decodings), 0);
}

/* So do those of a partition that goes: they would take room from those of others. */
static void test_a_revocation_lets_go(void **state)
{
    struct fix *f = *state;
    give(f, 0, "a/b", 0);
    give(f, 1, NULL, 0);
    for (int i = 0; i < PATIENCE_MS && atomic_load(&f->jobs[0]->stage) != JOB_FETCHING; i++)
        usleep(1000);
    atomic_store(&f->x->part.lease->revoked, true);
    atomic_store(&f->x->w.sweep_intake, true);          /* test_worker_consumer.c: it is */
    job_queue_wake(&f->x->w.to_intake);
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < PATIENCE_MS && atomic_load(&f->jobs[i]->stage) != JOB_DROPPED; k++)
            usleep(1000);
    for (int i = 0; i < 2; i++)
        assert_int_equal(atomic_load(&f->jobs[i]->stage), JOB_DROPPED);
    assert_int_equal(atomic_load(&f->x->w.metrics.backlog), -2);        /* the test gave them */
}

/* Somebody has lost what failed: no reason to answer in the wrong voice. */
static void test_never_without_its_adapter(void **state)
{
    struct fix *f = *state;
    struct job *j = make(f, 0, "a/b", 0);
    atomic_store(&by_base_model, false);
    job_set_stage(j, JOB_READY);
    job_queue_push(&f->x->w.to_intake, j);
    expect_stage(f, 0, JOB_FETCHING);
    assert_false(atomic_load(&by_base_model));
}

/* ---- tokens ----------------------------------------------------------------------------- */

static void expect_tokens(struct fix *f, long long n)
{
    struct metrics *m = &f->x->w.metrics;
    for (int i = 0; i < PATIENCE_MS && atomic_load(&m->held_tokens) != n; i++)
        usleep(1000);
    assert_int_equal(atomic_load(&m->held_tokens), n);
}

/* Prompts as they are read; their own tokens are a third of their bytes. */
static long long read_asking(struct fix *f, int offset, const char *more)
{
    char json[256];
    int n = snprintf(json, sizeof json, "{\"id\": \"%d\", \"prompt\": \"x\", %s}", offset, more);
    job_queue_push(&f->x->w.to_intake, read_value(f, offset, json, (size_t)n));
    return n / 3;
}

/* What it asks for counts as far as the engine would give it; none is most of the budget. */
static void test_tokens_of_a_greedy_prompt(void **state)
{
    struct fix *f = *state;
    long long own = read_asking(f, 0, "\"params\": {\"max_tokens\": 60}");
    expect_tokens(f, own + 60);
    own += read_asking(f, 1, "\"params\": {\"max_tokens\": 10000000, \"n\": 2}");
    expect_tokens(f, own + 60 + 2 * CONTEXT);
    read_asking(f, 2, "\"params\": {\"max_tokens\": 2147483647, \"n\": 128}");
    expect_tokens(f, own + 60 + 2 * CONTEXT + BUDGET / 8);
}

/* While it waits for an adapter, for as long as the store is away, only what it holds counts. */
static void test_tokens_while_a_store_is_away(void **state)
{
    struct fix *f = *state;
    long long own = read_asking(f, 0, "\"adapter\": \"a/b\", \"params\": "
                                "{\"max_tokens\": 10000000}");
    expect_stage(f, 0, JOB_FETCHING);
    expect_tokens(f, own);
}

/* What waited for an adapter, while it counted next to nothing, comes at once, and would fill the
 * budget whole: of lower topics it fills their share, and the urgent ones are read on. */
static void test_tokens_when_the_store_is_back(void **state)
{
    struct fix *f = *state;
    struct worker *w = &f->x->w;
    long long own = 0;
    atomic_store(&w->most_urgent, 1);
    for (int i = 0; i < PROMPTS; i++)
        own += read_asking(f, i, "\"adapter\": \"a/b\", \"params\": "
                           "{\"max_tokens\": 10000000, \"n\": 128}");
    for (int i = 0; i < PROMPTS; i++)
        expect_stage(f, i, JOB_FETCHING);
    expect_tokens(f, own);
    for (int i = 0; i < PROMPTS; i++) {
        struct job *j = f->jobs[i];
        assert_true(store_let_go(w->store, "a/b", j));  /* as if it had answered */
        j->adapter = some_adapter;
        job_set_stage(j, JOB_READY);
        job_queue_push(&w->to_intake, j);
    }
    expect_tokens(f, BUDGET / 8 * 6);
    for (int i = 0; i < PROMPTS; i++)
        cancel(f, i);
    expect_tokens(f, 0);
}

/* One that has ended counts nothing, even if its completion has to wait for the registry. */
static void test_tokens_of_an_end_that_waits(void **state)
{
    struct fix *f = *state;
    long long own = read_asking(f, 0, "\"params\": {\"max_tokens\": 10000000}");
    atomic_store(&not_encodable, true);
    expect_tokens(f, own + CONTEXT);
    cancel(f, 0);
    for (int i = 0; i < PATIENCE_MS && !atomic_load(&replies[0].calls); i++)
        usleep(1000);
    expect_tokens(f, 0);
    assert_int_equal(reason_of(0), -1);
}

/* Whoever sends a record stamps it. */
static void test_stamps_of_any_size(void **state)
{
    (void)state;
    enum { NOW = 1000000, MS = 500 };
    static const struct { int64_t stamp, deadline, age_us; } rows[] = {
        { -1, NOW + MS, 0 }, { INT64_MIN, NOW + MS, 0 }, { 0, MS, NOW * 1000LL },
        { NOW - 1, NOW - 1 + MS, 1000 }, { NOW, NOW + MS, 0 }, { NOW + 1, NOW + 1 + MS, 0 },
        { INT64_MAX - MS, INT64_MAX, 0 }, { INT64_MAX - MS + 1, INT64_MAX, 0 },
        { INT64_MAX, INT64_MAX, 0 },
    };
    for (size_t i = 0; i < LM_COUNT(rows); i++) {
        struct record r = { .timestamp_ms = rows[i].stamp };
        assert_int_equal(record_deadline_ms(&r, MS, NOW), rows[i].deadline);
        assert_int_equal(record_age_us(&r, NOW), rows[i].age_us);
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_behind_a_full_engine), TEST(test_for_a_silent_store),
        TEST(test_to_be_tried_again), TEST(test_sent_back_cancelled),
        TEST(test_while_a_suspect_runs), TEST(test_a_suspect_before_its_turn),
        TEST(test_no_first_token_in_time),
        TEST(test_an_end_that_must_wait_is_not_hurried), TEST(test_stopping_lets_go),
        TEST(test_a_revocation_lets_go), cmocka_unit_test(test_stamps_of_any_size),
        cmocka_unit_test_setup_teardown(test_for_a_silent_registry, setup_registry,
                                        teardown_registry),
        cmocka_unit_test_setup_teardown(test_a_suspect_asks_in_its_turn, setup_registry,
                                        teardown_registry),
        TEST(test_never_without_its_adapter),
        cmocka_unit_test_setup_teardown(test_tokens_of_a_greedy_prompt, setup_registry,
                                        teardown_registry),
        cmocka_unit_test_setup_teardown(test_tokens_while_a_store_is_away, setup_registry,
                                        teardown_registry),
        cmocka_unit_test_setup_teardown(test_tokens_when_the_store_is_back, setup_registry,
                                        teardown_registry),
        cmocka_unit_test_setup_teardown(test_tokens_of_an_end_that_waits, setup_registry,
                                        teardown_registry),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
