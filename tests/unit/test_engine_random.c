/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine_random.c - correctness never depends on policy or company: the same 500 requests run
 * under random policies, pools, block sizes, batch sizes, chunk sizes and budgets, and each says
 * what it says alone.
 *
 * Requests differ in adapter, prompt (with shared beginnings, so that the prefix cache is hit),
 * length, choices, priority, tenant, scoring and deadlines; some only score their prompt, some are
 * cancelled at a random moment.
 * Adapters change under way: an id is loaded with other content again and again, so versions of one
 * id run side by side, and old ones go. Some rounds pipeline steps, some are pumped by hand.
 *
 * What is checked: every request ends exactly once and none fails; log-probabilities, of the prompt
 * where it is scored and of each generated token, are within 1e-4 of those computed alone; tokens
 * are equal, unless the reference says that its top two are nearer than that (then that choice is
 * compared no further). Greedy, so that words can be compared. Checking builds (sanitizers) also
 * verify all books after every turn.
 */
#include "engine_fixture.h"

#include "engine/core.h"

#define RND_SEED 0x9e3779b97f4a7c15u
#include "rnd.h"

#define ADAPTERS "tests/models/spm-tiny-adapters"
#define KINDS 80                /* distinct prompt + adapter + length */
#define REQUESTS 500
#define ROUNDS 10
#define MAX_PROMPT 120
#define MAX_OUT 40
#define NEAR 1e-4f

struct kind {
    int32_t prompt[MAX_PROMPT];
    int n_prompt, max_tokens, adapter;          /* 0: base */
    struct engine_result *alone;                /* scored, prompt and output */
};

/* What makes a request, the same in every round. */
struct sent {
    const struct kind *kind;
    int n, priority, tenant, id;
    bool stream, echo, cut;     /* cut: may be cancelled or expire */
    bool score;                 /* the prompt's scores are all that is wanted */
    int deadline_ms;            /* from submit, 0: none */
    engine_handle handle;       /* the round's */
    int ended;
};

static struct kind kinds[KINDS];
static struct sent sent[REQUESTS];
static uint64_t n_compared, n_near;

static int pick(int n, const int *from)
{
    return from[rnd(n)];
}
#define PICK(...) pick((int)(sizeof (int[]){ __VA_ARGS__ } / sizeof(int)), (int[]){ __VA_ARGS__ })

static void make_kinds(void)
{
    for (int i = 0; i < KINDS; i++) {
        struct kind *k = &kinds[i];
        k->n_prompt = 1 + rnd(MAX_PROMPT);
        k->max_tokens = 1 + rnd(MAX_OUT);
        k->adapter = rnd(3);
        int shared = i > 0 ? rnd(k->n_prompt + 1) : 0;
        const struct kind *like = &kinds[rnd(2) && i ? i - 1 : 0];
        for (int t = 0; t < k->n_prompt; t++)
            k->prompt[t] = t < LM_MIN(shared, like->n_prompt) ? like->prompt[t] : 5 + rnd(700);
    }
}

static void make_requests(void)
{
    for (int i = 0; i < REQUESTS; i++) {
        struct sent *s = &sent[i];
        *s = (struct sent){ .kind = &kinds[rnd(KINDS)], .n = rnd(4) ? 1 : 1 + rnd(4),
                            .priority = rnd(3), .tenant = rnd(5), .id = rnd(2),
                            .stream = rnd(4) == 0, .echo = rnd(5) == 0 };
        if (rnd(12) == 0) {
            s->score = s->echo = true;
            s->n = 1;
        }
        if (rnd(10) == 0)
            s->deadline_ms = rnd(40);
        else if (rnd(4) == 0)
            s->deadline_ms = 3600000;
        s->cut = rnd(8) == 0 || (s->deadline_ms > 0 && s->deadline_ms < 3600000);
    }
}

static struct engine_request kind_request(const struct kind *k, engine_adapter *a)
{
    struct engine_request r = fixture_request("random", k->prompt, k->n_prompt);
    r.adapter = a;
    r.params.max_tokens = k->max_tokens;
    r.params.ignore_eos = true;
    return r;
}

static const char *dir_of(int adapter)
{
    return adapter == 1 ? ADAPTERS "/captain-sal" : ADAPTERS "/nordwind-terse";
}

static void run_alone(void)
{
    struct engine_config cfg = fixture_config(SPM_TINY);
    engine *e = fixture_engine(&cfg);
    engine_adapter *a[3] = { NULL };
    for (int i = 1; i < 3; i++)
        CHECK(engine_adapter_load(e, i == 1 ? "one" : "two", dir_of(i), &a[i], err));
    for (int i = 0; i < KINDS; i++) {
        struct kind *k = &kinds[i];
        struct engine_request r = kind_request(k, a[k->adapter]);
        r.params.logprobs = 2;
        r.params.echo = true;
        k->alone = fixture_run(e, &r);
        assert_int_equal(k->alone->choices[0].n_logprobs, k->n_prompt + k->max_tokens);
    }
    engine_adapter_unref(a[1]);
    engine_adapter_unref(a[2]);
    engine_close(e);
}

/* ---- comparing ------------------------------------------------------------------------- */

static void compare_score(const struct kind *k, int i, float got)
{
    float want = k->alone->choices[0].logprobs[i].logprob;
    if (i > 0 && !(fabsf(got - want) <= NEAR))
        fail_msg("kind %d: log-probability %d is %.6f, alone it is %.6f", (int)(k - kinds), i,
                 got, want);
    n_compared++;
}

static void check_choice(const struct sent *s, const struct engine_choice *c)
{
    const struct kind *k = s->kind;
    const struct engine_choice *want = &k->alone->choices[0];
    int prompt = s->echo ? LM_MIN(k->n_prompt, c->n_logprobs) : 0;
    if (!s->cut) {
        assert_int_equal(c->reason, ENGINE_LENGTH);
        assert_int_equal(c->n_tokens, s->score ? 0 : k->max_tokens);
        assert_int_equal(c->n_logprobs, c->n_tokens + (s->echo ? k->n_prompt : 0));
    }
    for (int i = 0; i < prompt; i++)
        compare_score(k, i, c->logprobs[i].logprob);
    for (int i = 0; i < c->n_tokens; i++) {
        const struct engine_token *t = &want->logprobs[k->n_prompt + i];
        if (c->token_ids[i] == want->token_ids[i]) {
            compare_score(k, k->n_prompt + i, c->logprobs[prompt + i].logprob);
            continue;
        }
        n_near++;
        if (t->top[0].logprob - t->top[1].logprob > NEAR)
            fail_msg("kind %d, token %d is %d, alone it is %d", (int)(k - kinds), i,
                     c->token_ids[i], want->token_ids[i]);
        return;
    }
}

/* ---- rounds ---------------------------------------------------------------------------- */

static struct engine_policy random_policy(void)
{
    struct engine_policy p;
    engine_policy_default(&p);
    p.group = rnd(2);
    p.max_overtaken = PICK(1, 5, 1000);
    p.max_wait_ms = PICK(0, 5, 600000);
    p.fair = rnd(2);
    p.early_abort = rnd(2);
    p.preempt = (enum engine_preempt)rnd(3);
    p.swap_bytes = (size_t)PICK(0, 1 << 16, 1 << 20, 1 << 28);
    if (p.swap_bytes == 0)
        p.preempt = ENGINE_PREEMPT_RECOMPUTE;
    p.prefetch = rnd(2);
    p.prefix_cache = rnd(4) > 0;
    p.pipeline = rnd(2);
    p.adapter_percent = rnd(4) ? 0 : 30 + rnd(40);
    p.adapter_slots = rnd(4) ? 0 : 1 + rnd(3);
    return p;
}

static size_t row;              /* bytes of a block, all layers */

/* Blocks of the smallest pool that serves every request, adapters packed for its cells. */
static int least_pool(struct engine_config cfg)
{
    engine *e = fixture_engine(&cfg);
    struct engine_info info;
    int kv = 0, lora = 0, both = 0, percent = cfg.policy->adapter_percent;
    engine_info(e, &info);
    row = info.block_bytes * (size_t)info.n_layers;
    for (int i = 0; i < KINDS; i++) {
        engine_adapter *a = NULL;
        if (kinds[i].adapter)
            CHECK(engine_adapter_load(e, "one", dir_of(kinds[i].adapter), &a, err));
        int n_kv = LM_DIV_UP(kinds[i].n_prompt + kinds[i].max_tokens, info.block_tokens);
        int n_lora = a ? (int)LM_DIV_UP(engine_adapter_bytes(a), row) : 0;
        kv = LM_MAX(kv, n_kv);
        lora = LM_MAX(lora, n_lora);
        both = LM_MAX(both, n_kv + n_lora);
        engine_adapter_unref(a);
    }
    engine_close(e);
    if (percent == 0)
        return both;
    while (both * percent / 100 < lora || both - both * percent / 100 < kv)
        both++;
    return both;
}

static void collect(engine *e, bool manual, int *left)
{
    struct engine_event ev;
    bool idle;
    if (manual)
        CHECK(engine_pump(e, engine_now_us(e) + 1 + rnd(2000), &idle, err));
    while (engine_poll(e, &ev, 1, manual ? 0 : 10, NULL) == 1) {
        if (ev.kind == ENGINE_TOKENS) {
            free(ev.text);
            continue;
        }
        struct sent *s = ev.user;
        assert_true(s >= sent && s < sent + REQUESTS && s->handle == ev.handle);
        assert_int_equal(++s->ended, 1);
        if (ev.result->status != LM_OK)
            fail_msg("%s", ev.result->error);
        assert_int_equal(ev.result->n_choices, s->n);
        for (int i = 0; i < s->n; i++)
            check_choice(s, &ev.result->choices[i]);
        engine_result_free(ev.result);
        --*left;
        if (!manual)
            return;
    }
}

/* Every other id changes its content with each request of the other kind. */
static engine_adapter *adapter_for(engine *e, const struct sent *s, bool manual, int *left)
{
    engine_adapter *a = NULL;
    struct lm_err err = { 0 };
    lm_status st = LM_BUSY;
    if (s->kind->adapter == 0)
        return NULL;
    const char *id = s->id ? "changing" : s->kind->adapter == 1 ? "one" : "two";
    while (st == LM_BUSY) {
        st = engine_adapter_load(e, id, dir_of(s->kind->adapter), &a, &err);
        if (st == LM_BUSY)
            collect(e, manual, left);
    }
    if (st != LM_OK)
        fail_msg("%s", err.msg);
    return a;
}

static void submit(engine *e, struct sent *s, bool manual, int *left)
{
    static const char *const tenants[] = { NULL, "a", "b", "c", "d" };
    struct lm_err err = { 0 };
    lm_status st = LM_BUSY;
    engine_adapter *a = adapter_for(e, s, manual, left);
    struct engine_request r = kind_request(s->kind, a);
    r.priority = s->priority;
    r.tenant = tenants[s->tenant];
    r.stream = s->stream;
    r.params.n = s->n;
    r.params.max_tokens = s->score ? 0 : r.params.max_tokens;
    r.params.echo = s->echo;
    r.params.logprobs = 0;
    r.user = s;
    s->ended = 0;
    while (st == LM_BUSY) {
        r.deadline_ms = s->deadline_ms ? engine_wall_ms(e) + s->deadline_ms : 0;
        if (s->deadline_ms && s->id)
            r.first_token_by_ms = r.deadline_ms;
        if (s->id && s->tenant % 2)
            r.deadline_ms = 0;
        st = engine_submit(e, &r, &s->handle, &err);
        if (st == LM_BUSY)
            collect(e, manual, left);
    }
    if (st != LM_OK)
        fail_msg("%s", err.msg);
    ++*left;
    engine_adapter_unref(a);
}

static void round_of(int number)
{
    rng = 0x9e3779b97f4a7c15u * (uint64_t)(number + 1);         /* its setting is repeatable */
    struct engine_policy policy = random_policy();
    struct engine_config cfg = fixture_config(SPM_TINY);
    struct engine_stats st;
    int left = 0;
    cfg.block_tokens = PICK(8, 16, 16, 32);
    cfg.max_step_tokens = 8 + rnd(120);
    cfg.max_seqs = 1 + rnd(24);
    cfg.max_waiting = 1 + rnd(100);
    cfg.host_adapter_bytes = rnd(3) ? 0 : (size_t)1 << 18;
    cfg.policy = &policy;
    int least = least_pool(cfg);
    cfg.pool_bytes = row * (size_t)(least + (number % 3 ? rnd(least) : 0));
    cfg.manual = rnd(3) == 0;
#ifdef __SANITIZE_THREAD__
    if (cfg.manual)             /* one thread: no other could race with it */
        return;
#endif
    core_force_pipeline(policy.pipeline);
    engine *e = fixture_engine(&cfg);
    for (int i = 0; i < REQUESTS; i++) {
        submit(e, &sent[i], cfg.manual, &left);
        int victim = rnd(i + 1);
        if (rnd(4) == 0 && sent[victim].cut)
            engine_cancel(e, sent[victim].handle);
        if (rnd(6) == 0)
            collect(e, cfg.manual, &left);
    }
    while (left > 0)
        collect(e, cfg.manual, &left);
    for (int i = 0; i < REQUESTS; i++)
        assert_int_equal(sent[i].ended, 1);
    for (int tries = 0; tries < 1000; tries++) {    /* gauges follow at the end of the turn */
        engine_stats(e, &st);
        if (st.running + st.waiting == 0)
            break;
        usleep(1000);
    }
    assert_int_equal(st.failed, 0);
    assert_int_equal(st.running + st.waiting, 0);
    assert_int_equal(st.finished, REQUESTS);
    print_message("round %d: %d blocks of %d tokens, %d x %d: %llu steps, %llu preemptions, %llu "
                  "swapped, %llu evictions, %llu tokens found\n", number, st.pool_blocks,
                  cfg.block_tokens, cfg.max_seqs, cfg.max_step_tokens,
                  (unsigned long long)st.steps, (unsigned long long)st.preemptions,
                  (unsigned long long)st.swap_outs, (unsigned long long)st.adapter_evictions,
                  (unsigned long long)st.prefix_hit_tokens);
    engine_close(e);
}

static void policy_changes_nothing(void **state)
{
    (void)state;
    make_kinds();
    make_requests();
    run_alone();
    for (int i = 0; i < ROUNDS; i++)
        round_of(i);
    print_message("%llu log-probabilities compared, %llu choices left at a near tie\n",
                  (unsigned long long)n_compared, (unsigned long long)n_near);
    for (int i = 0; i < KINDS; i++)
        engine_result_free(kinds[i].alone);
}

int main(void)
{
    lm_log_set_level(LM_WARN);
    const struct CMUnitTest tests[] = { cmocka_unit_test(policy_changes_nothing) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
