/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine_random.c - correctness never depends on company: hundreds of random requests under
 * random pools, batch sizes and token budgets; each that ran to its end must say what it says
 * alone, and every one must end exactly once.
 *
 * Requests differ in adapter (two versions under one id among them), prompt (with shared
 * beginnings, so that the prefix cache is hit), length, choices, priority, scoring, deadline, and
 * some are cancelled at a random moment. Greedy, so that words can be compared; spm-tiny's top two
 * may be near, so a difference is allowed exactly where the reference run says that they are nearer
 * than 1e-4. Checking builds (sanitizers) also verify the pool's books after every step.
 */
#include "engine_fixture.h"

#include "engine/core.h"
#include "kernels/cpu/cpu_int.h"

#define ADAPTERS "tests/models/spm-tiny-adapters"
#define KINDS 60                /* distinct prompt + adapter + length */
#define ROUNDS 12
#define REQUESTS 60             /* a round */
#define MAX_PROMPT 120
#define MAX_OUT 40

struct kind {
    int32_t prompt[MAX_PROMPT];
    int n_prompt, max_tokens, adapter;          /* 0: base */
    struct engine_result *alone;
};

struct sent {
    const struct kind *kind;
    engine_handle handle;
    bool cut;                   /* may have been cancelled or expired */
    int ended;
};

static struct kind kinds[KINDS];
static uint64_t rng = 0x9e3779b97f4a7c15u;

static int rnd(int below)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (int)((rng >> 33) % (uint64_t)below);
}

static void make_kinds(void)
{
    for (int i = 0; i < KINDS; i++) {
        struct kind *k = &kinds[i];
        k->n_prompt = 1 + rnd(MAX_PROMPT);
        k->max_tokens = 1 + rnd(MAX_OUT);
        k->adapter = rnd(3);
        int shared = i > 0 ? rnd(k->n_prompt + 1) : 0;
        for (int t = 0; t < k->n_prompt; t++)
            k->prompt[t] = t < shared ? kinds[rnd(2) ? i - 1 : 0].prompt[t] : 5 + rnd(700);
        for (int t = 0; t < k->n_prompt; t++)
            if (k->prompt[t] == 0)
                k->prompt[t] = 9;
    }
}

static void load(engine *e, engine_adapter *a[3])
{
    a[0] = NULL;
    CHECK(engine_adapter_load(e, "voice", ADAPTERS "/captain-sal", &a[1], err));
    CHECK(engine_adapter_load(e, "voice", ADAPTERS "/nordwind-terse", &a[2], err));
}

static struct engine_request kind_request(const struct kind *k, engine_adapter *const a[3])
{
    struct engine_request r = fixture_request("random", k->prompt, k->n_prompt);
    r.adapter = a[k->adapter];
    r.params.max_tokens = k->max_tokens;
    r.params.ignore_eos = true;
    return r;
}

static size_t pool_row;         /* bytes of one block id */
static int most_blocks;         /* of any kind with its adapter */

static void run_alone(void)
{
    struct engine_config cfg = fixture_config(SPM_TINY);
    engine *e = fixture_engine(&cfg);
    engine_adapter *a[3];
    struct engine_info info;
    load(e, a);
    engine_info(e, &info);
    pool_row = info.block_bytes * (size_t)info.n_layers;
    for (int i = 0; i < KINDS; i++) {
        struct kind *k = &kinds[i];
        struct engine_request r = kind_request(k, a);
        r.params.logprobs = 2;
        k->alone = fixture_run(e, &r);
        size_t lora = a[k->adapter] ? engine_adapter_bytes(a[k->adapter]) : 0;
        int need = (int)LM_DIV_UP(lora, pool_row) +
                   LM_DIV_UP(k->n_prompt + k->max_tokens, info.block_tokens);
        most_blocks = LM_MAX(most_blocks, need);
    }
    engine_adapter_unref(a[1]);
    engine_adapter_unref(a[2]);
    engine_close(e);
}

static void check_choice(const struct kind *k, const struct engine_choice *c, bool cut)
{
    const struct engine_choice *want = &k->alone->choices[0];
    if (!cut) {
        assert_int_equal(c->reason, ENGINE_LENGTH);
        assert_int_equal(c->n_tokens, k->max_tokens);
    }
    for (int i = 0; i < c->n_tokens; i++) {
        const struct engine_top *top = want->logprobs[i].top;
        if (c->token_ids[i] == want->token_ids[i])
            continue;
        if (top[0].logprob - top[1].logprob > 1e-4f)
            fail_msg("kind %d, token %d is %d, alone it is %d", (int)(k - kinds), i,
                     c->token_ids[i], want->token_ids[i]);
        return;
    }
}

static void collect(engine *e, struct sent *sent, int *left)
{
    struct engine_event ev = fixture_finished(e);
    struct sent *s = ev.user;
    assert_true(s >= sent && s < sent + REQUESTS && s->handle == ev.handle);
    assert_int_equal(++s->ended, 1);
    if (ev.result->status != LM_OK)
        fail_msg("%s", ev.result->error);
    for (int i = 0; i < ev.result->n_choices; i++)
        check_choice(s->kind, &ev.result->choices[i], s->cut);
    engine_result_free(ev.result);
    --*left;
}

static void vary(struct engine_request *r, struct sent *s)
{
    r->priority = rnd(3);
    r->stream = rnd(4) == 0;
    if (rnd(4) == 0)
        r->params.n = 1 + rnd(4);
    if (rnd(4) == 0) {
        r->params.logprobs = rnd(3);
        r->params.echo = rnd(2);
    }
    if (rnd(10) == 0) {
        r->deadline_ms = lm_wall_ms() + rnd(40);
        s->cut = true;
    }
}

static void round_of(int number)
{
    struct engine_config cfg = fixture_config(SPM_TINY);
    cfg.pool_bytes = (size_t)(most_blocks + (number % 3 ? rnd(most_blocks) : 0)) * pool_row;
    cfg.max_step_tokens = 8 + rnd(120);
    cfg.max_seqs = 1 + rnd(24);
    cfg.max_waiting = REQUESTS;
    struct engine_policy policy;
    engine_policy_default(&policy);
    policy.preempt = (enum engine_preempt)(number / 2 % 3);
    cfg.policy = &policy;
    core_force_pipeline(number % 2);
    kn_cpu_force_late_events(number % 5);
    engine *e = fixture_engine(&cfg);
    engine_adapter *a[3];
    struct sent sent[REQUESTS] = { { 0 } };
    int left = 0;
    load(e, a);
    for (int i = 0; i < REQUESTS; i++) {
        sent[i].kind = &kinds[rnd(KINDS)];
        struct engine_request r = kind_request(sent[i].kind, a);
        vary(&r, &sent[i]);
        r.user = &sent[i];
        sent[i].cut |= rnd(8) == 0;
        sent[i].handle = fixture_submit(e, &r);
        left++;
        int victim = rnd(i + 1);
        if (rnd(4) == 0 && sent[victim].cut)
            engine_cancel(e, sent[victim].handle);
        if (rnd(6) == 0)
            collect(e, sent, &left);
    }
    while (left > 0)
        collect(e, sent, &left);
    struct engine_stats st;
    engine_stats(e, &st);
    assert_int_equal(st.failed, 0);
    print_message("round %d: pool %d, %llu steps, %llu preemptions, %llu swapped, %llu evictions\n",
                  number, st.pool_blocks, (unsigned long long)st.steps,
                  (unsigned long long)st.preemptions, (unsigned long long)st.swap_outs,
                  (unsigned long long)st.adapter_evictions);
    engine_adapter_unref(a[1]);
    engine_adapter_unref(a[2]);
    engine_close(e);
}

static void company_changes_nothing(void **state)
{
    (void)state;
    make_kinds();
    run_alone();
    for (int i = 0; i < ROUNDS; i++)
        round_of(i);
    for (int i = 0; i < KINDS; i++)
        engine_result_free(kinds[i].alone);
}

int main(void)
{
    lm_log_set_level(LM_WARN);
    const struct CMUnitTest tests[] = { cmocka_unit_test(company_changes_nothing) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
