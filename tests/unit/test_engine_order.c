/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine_order.c - a device whose streams run when they like.
 *
 * The CPU does everything inside the call, so on it a copy that forgot to wait for a step, or a
 * step for a copy, does no harm. Here every asynchronous call of kernels.h is kept in its stream's
 * queue instead (the linker puts __wrap_kn_X before it; the Makefile has the list), and is carried
 * out only when it must be, or at a random moment before: no earlier than the events that its
 * stream waits for, in any order else. What the host hands over asynchronously is read that late,
 * too, so a buffer that is reused or freed too soon shows (the latter under AddressSanitizer).
 *
 * The same requests, in a tight pool with uploads, evictions, swaps, preemptions, shared prefixes
 * and cancellations, two steps in flight, must say what they say on a device that does all at once.
 */
#define RND_SEED 88172645463325252u
#include "rnd.h"
#include "engine_fixture.h"

#include "engine/core.h"
#include "kernels/kernels.h"

#define ADAPTERS "tests/models/spm-tiny-adapters"
#define REQUESTS 60
#define ROUNDS 120

/* ---- streams --------------------------------------------------------------------------- */

struct cmd;
typedef lm_status run_fn(kn_stream *s, const struct cmd *c);

struct cmd {
    struct cmd *next;
    run_fn *run;                /* NULL: an event is recorded, or waited for */
    struct event *event;
    uint64_t number;
    bool waits;
    void *to;
    const void *from;
    int64_t *offsets;
    int n;
    size_t bytes;
    _Alignas(16) char args[512];
};

struct stream {
    kn_stream *s;
    struct cmd *head, **tail;
};

struct event {
    kn_event *e;
    struct stream *stream;      /* of the last record */
    uint64_t recorded, passed;
    bool freed;                 /* and what is queued may still wait for it */
};

static struct stream streams[8];
static struct event events[1024];
static struct stream *quick;    /* runs ahead of the others */
static bool deferring;          /* false: everything at once, as ever */
static uint64_t n_late;

static struct stream *stream_of(kn_stream *s)
{
    struct stream *free = NULL;
    for (size_t i = 0; i < LM_COUNT(streams); i++) {
        if (streams[i].s == s)
            return &streams[i];
        free = !free && !streams[i].s ? &streams[i] : free;
    }
    assert_non_null(free);
    *free = (struct stream){ .s = s, .tail = &free->head };
    return free;
}

static struct event *event_of(kn_event *e)
{
    struct event *free = NULL;
    for (size_t i = 0; i < LM_COUNT(events); i++) {
        if (events[i].e == e)
            return &events[i];
        free = !free && !events[i].e && !events[i].freed ? &events[i] : free;
    }
    assert_non_null(free);
    *free = (struct event){ .e = e };
    return free;
}

static struct cmd *add(kn_stream *s, run_fn *run)
{
    struct stream *q = stream_of(s);
    struct cmd *c = calloc(1, sizeof *c);
    assert_non_null(c);
    c->run = run;
    *q->tail = c;
    q->tail = &c->next;
    return c;
}

static void run_to(struct event *e, uint64_t number);

static void run_first(struct stream *q)
{
    struct cmd *c = q->head;
    if (c->run)
        assert_int_equal(c->run(q->s, c), LM_OK);
    else if (c->waits)
        run_to(c->event, c->number);
    else
        c->event->passed = c->number;
    if (!(q->head = c->next))
        q->tail = &q->head;
    free(c->offsets);
    free(c);
}

static void run_all(struct stream *q)
{
    while (q->head)
        run_first(q);
}

static void run_to(struct event *e, uint64_t number)
{
    while (e->passed < number)
        run_first(e->stream);
}

/* Some streams are ahead, as far as they may be. */
static void run_others(const struct stream *but)
{
    for (size_t i = 0; i < LM_COUNT(streams); i++)
        if (&streams[i] != but && streams[i].s && rnd(2))
            run_all(&streams[i]);
}

/* ---- what is kept ---------------------------------------------------------------------- */

#define X(op, type)                                                                            \
    lm_status __real_kn_op_##op(kn_stream *s, const struct kn_##type *a);                      \
    lm_status __wrap_kn_op_##op(kn_stream *s, const struct kn_##type *a);                      \
    static lm_status run_##op(kn_stream *s, const struct cmd *c)                               \
    {                                                                                          \
        return __real_kn_op_##op(s, (const void *)c->args);                                    \
    }                                                                                          \
    lm_status __wrap_kn_op_##op(kn_stream *s, const struct kn_##type *a)                       \
    {                                                                                          \
        _Static_assert(sizeof *a <= sizeof ((struct cmd *)0)->args, "larger arguments");       \
        if (!deferring)                                                                        \
            return __real_kn_op_##op(s, a);                                                    \
        memcpy(add(s, run_##op)->args, a, sizeof *a);                                          \
        return LM_OK;                                                                          \
    }
KN_OPS(X)
KN_FUSED_OPS(X)
#undef X

#define COPIES(name, to_type, from_type)                                                       \
    lm_status __real_kn_##name(kn_stream *s, to_type to, from_type from, size_t bytes);        \
    lm_status __wrap_kn_##name(kn_stream *s, to_type to, from_type from, size_t bytes);        \
    static lm_status run_##name(kn_stream *s, const struct cmd *c)                             \
    {                                                                                          \
        return __real_kn_##name(s, c->to, c->from, c->bytes);                                  \
    }                                                                                          \
    lm_status __wrap_kn_##name(kn_stream *s, to_type to, from_type from, size_t bytes)         \
    {                                                                                          \
        if (!deferring)                                                                        \
            return __real_kn_##name(s, to, from, bytes);                                       \
        struct cmd *c = add(s, run_##name);                                                    \
        c->to = to;                                                                            \
        c->from = from;                                                                        \
        c->bytes = bytes;                                                                      \
        return LM_OK;                                                                          \
    }
COPIES(copy_in, void *, const void *)
COPIES(copy_out, void *, const void *)
COPIES(copy, void *, const void *)

lm_status __real_kn_zero(kn_stream *s, void *p, size_t bytes);
lm_status __wrap_kn_zero(kn_stream *s, void *p, size_t bytes);

static lm_status run_zero(kn_stream *s, const struct cmd *c)
{
    return __real_kn_zero(s, c->to, c->bytes);
}

lm_status __wrap_kn_zero(kn_stream *s, void *p, size_t bytes)
{
    if (!deferring)
        return __real_kn_zero(s, p, bytes);
    struct cmd *c = add(s, run_zero);
    c->to = p;
    c->bytes = bytes;
    return LM_OK;
}

static void set_cells(struct cmd *c, void *to, const void *from, const int64_t *offsets, int n,
                      size_t bytes)
{
    c->to = to;
    c->from = from;
    c->n = n;
    c->bytes = bytes;
    c->offsets = malloc((size_t)n * sizeof *offsets);
    assert_non_null(c->offsets);
    memcpy(c->offsets, offsets, (size_t)n * sizeof *offsets);   /* these are read in the call */
}

lm_status __real_kn_scatter_cells(kn_stream *s, void *b, const int64_t *o, int n, size_t c,
                                  const void *f);
lm_status __wrap_kn_scatter_cells(kn_stream *s, void *b, const int64_t *o, int n, size_t c,
                                  const void *f);
lm_status __real_kn_gather_cells(kn_stream *s, void *d, const void *b, const int64_t *o, int n,
                                 size_t c);
lm_status __wrap_kn_gather_cells(kn_stream *s, void *d, const void *b, const int64_t *o, int n,
                                 size_t c);

static lm_status run_scatter(kn_stream *s, const struct cmd *c)
{
    return __real_kn_scatter_cells(s, c->to, c->offsets, c->n, c->bytes, c->from);
}

lm_status __wrap_kn_scatter_cells(kn_stream *s, void *b, const int64_t *o, int n, size_t bytes,
                                  const void *f)
{
    if (!deferring)
        return __real_kn_scatter_cells(s, b, o, n, bytes, f);
    set_cells(add(s, run_scatter), b, f, o, n, bytes);
    return LM_OK;
}

static lm_status run_gather(kn_stream *s, const struct cmd *c)
{
    return __real_kn_gather_cells(s, c->to, c->from, c->offsets, c->n, c->bytes);
}

lm_status __wrap_kn_gather_cells(kn_stream *s, void *d, const void *b, const int64_t *o, int n,
                                 size_t bytes)
{
    if (!deferring)
        return __real_kn_gather_cells(s, d, b, o, n, bytes);
    set_cells(add(s, run_gather), d, b, o, n, bytes);
    return LM_OK;
}

/* ---- events and waiting ---------------------------------------------------------------- */

lm_status __real_kn_event_record(kn_event *e, kn_stream *s);
lm_status __wrap_kn_event_record(kn_event *e, kn_stream *s);
lm_status __real_kn_event_wait(kn_stream *s, kn_event *e);
lm_status __wrap_kn_event_wait(kn_stream *s, kn_event *e);
lm_status __real_kn_event_query(kn_event *e);
lm_status __wrap_kn_event_query(kn_event *e);
lm_status __real_kn_event_sync(kn_event *e, struct lm_err *err);
lm_status __wrap_kn_event_sync(kn_event *e, struct lm_err *err);
lm_status __real_kn_stream_sync(kn_stream *s, struct lm_err *err);
lm_status __wrap_kn_stream_sync(kn_stream *s, struct lm_err *err);
void __real_kn_event_free(kn_event *e);
void __wrap_kn_event_free(kn_event *e);
void __real_kn_stream_free(kn_stream *s);
void __wrap_kn_stream_free(kn_stream *s);

lm_status __wrap_kn_event_record(kn_event *e, kn_stream *s)
{
    if (!deferring)
        return __real_kn_event_record(e, s);
    struct event *v = event_of(e);
    struct cmd *c = add(s, NULL);
    assert_true(!v->stream || v->stream == stream_of(s));
    v->stream = stream_of(s);
    c->event = v;
    c->number = ++v->recorded;
    if (v->stream == quick || rnd(8) == 0)
        run_all(v->stream);
    return LM_OK;
}

lm_status __wrap_kn_event_wait(kn_stream *s, kn_event *e)
{
    if (!deferring)
        return __real_kn_event_wait(s, e);
    struct event *v = event_of(e);
    struct cmd *c = add(s, NULL);
    c->event = v;
    c->number = v->recorded;
    c->waits = true;
    return LM_OK;
}

lm_status __wrap_kn_event_query(kn_event *e)
{
    if (!deferring)
        return __real_kn_event_query(e);
    struct event *v = event_of(e);
    if (v->passed < v->recorded && rnd(3) == 0)
        run_to(v, v->recorded);
    n_late += v->passed < v->recorded;
    return v->passed < v->recorded ? LM_BUSY : LM_OK;
}

lm_status __wrap_kn_event_sync(kn_event *e, struct lm_err *err)
{
    if (!deferring)
        return __real_kn_event_sync(e, err);
    struct event *v = event_of(e);
    if (v->passed < v->recorded && rnd(2))
        run_others(v->stream);
    run_to(v, v->recorded);
    return LM_OK;
}

lm_status __wrap_kn_stream_sync(kn_stream *s, struct lm_err *err)
{
    if (!deferring)
        return __real_kn_stream_sync(s, err);
    run_all(stream_of(s));
    return LM_OK;
}

void __wrap_kn_event_free(kn_event *e)
{
    struct event *v = event_of(e);
    v->e = NULL;
    v->freed = true;
    __real_kn_event_free(e);
}

void __wrap_kn_stream_free(kn_stream *s)
{
    struct stream *q = stream_of(s);
    run_all(q);
    q->s = NULL;
    __real_kn_stream_free(s);
}

/* ---- the same words -------------------------------------------------------------------- */

static int32_t prompt[96];
static struct engine_result *want[REQUESTS];

static engine *open_engine(int round, bool tight)
{
    struct engine_policy policy;
    struct engine_config cfg = fixture_config(SPM_TINY);
    struct engine_info info;
    engine_policy_default(&policy);
    policy.preempt = round % 3 == 0 ? ENGINE_PREEMPT_RECOMPUTE : ENGINE_PREEMPT_SWAP;
    policy.prefix_cache = round % 2;
    cfg.block_tokens = 8;
    cfg.max_seqs = 8;
    cfg.max_step_tokens = 24 + 8 * (round % 8);
    cfg.manual = true;
    cfg.policy = &policy;
    engine *e = fixture_engine(&cfg);
    if (!tight)
        return e;
    engine_info(e, &info);
    engine_close(e);
    cfg.pool_bytes = info.block_bytes * (size_t)info.n_layers * 24;
    return fixture_engine(&cfg);
}

static engine_handle submit(engine *e, int i)
{
    engine_adapter *a = NULL;
    int kind = i / 2;           /* neighbours are alike, so that they meet in the prefix cache */
    if (kind % 3)
        CHECK(engine_adapter_load(e, kind % 3 == 1 ? "sal" : "terse", kind % 3 == 1
                                  ? ADAPTERS "/captain-sal" : ADAPTERS "/nordwind-terse", &a,
                                  err));
    struct engine_request r = fixture_request("order", prompt + kind % 4, 5 + kind * 7 % 80);
    r.adapter = a;
    r.params.max_tokens = 4 + i * 5 % 29;
    r.params.ignore_eos = true;
    r.params.n = 1 + (i % 5 == 0);
    r.params.repetition_penalty = i % 7 == 0 ? 1.2f : 1;
    r.priority = i % 2;
    r.user = &want[i];
    engine_handle h = fixture_submit(e, &r);
    engine_adapter_unref(a);
    return h;
}

static void alone(void)
{
    engine *e = open_engine(1, false);
    for (int i = 0; i < REQUESTS; i++) {
        struct engine_event ev;
        bool idle;
        submit(e, i);
        CHECK(engine_pump(e, INT64_MAX, &idle, err));
        assert_int_equal(engine_poll(e, &ev, 1, 0, NULL), 1);
        want[i] = ev.result;
    }
    engine_close(e);
}

static void check(const struct engine_event *ev)
{
    const struct engine_result *got = ev->result, *w = *(struct engine_result **)ev->user;
    assert_int_equal(got->status, LM_OK);
    for (int i = 0; i < got->n_choices; i++) {
        const struct engine_choice *c = &got->choices[i];
        if (c->reason != ENGINE_CANCELLED)
            assert_int_equal(c->n_tokens, w->choices[i].n_tokens);
        for (int t = 0; t < c->n_tokens; t++)
            if (c->token_ids[t] != w->choices[i].token_ids[t])
                fail_msg("request %d, token %d is %d, not %d",
                         (int)((struct engine_result **)ev->user - want), t, c->token_ids[t],
                         w->choices[i].token_ids[t]);
    }
    engine_result_free(ev->result);
}

/* `cut`: the engine is closed with work under way. */
static void round_of(int round, bool cut)
{
    struct engine_event ev;
    struct engine_stats st;
    struct lm_err err = { 0 };
    engine *e = open_engine(round, true);
    int ended = 0;
    engine_handle h[REQUESTS];
    quick = &streams[rnd(3)];
    for (int i = 0; i < REQUESTS; i++) {
        bool idle;
        h[i] = submit(e, i);
        if (rnd(3) == 0)
            assert_int_equal(engine_pump(e, engine_now_us(e) + 1, &idle, &err), LM_OK);
        if (rnd(10) == 0)
            engine_cancel(e, h[rnd(i + 1)]);
    }
    for (bool idle = false; !idle && !cut;) {
        if (rnd(10) == 0)
            engine_cancel(e, h[rnd(REQUESTS)]);
        CHECK(engine_pump(e, engine_now_us(e) + 1, &idle, err));
    }
    for (; engine_poll(e, &ev, 1, 0, NULL) == 1; ended++)
        check(&ev);
    engine_stats(e, &st);
    if (!cut) {
        assert_int_equal(ended, REQUESTS);
        assert_true(st.preemptions > 0 && st.adapter_evictions > 0);
        assert_true(round % 3 == 0 || (st.swap_outs > 0 && st.swap_ins > 0));
    }
    engine_close(e);
    memset(events, 0, sizeof events);   /* all streams are gone, and nothing waits */
}

static void any_order_says_the_same(void **state)
{
    (void)state;
    alone();
    deferring = true;
    core_force_pipeline(true);
    for (int i = 0; i < ROUNDS; i++)
        round_of(i, i % 4 == 3);
    core_force_pipeline(false);
    deferring = false;
    print_message("%llu times something had not passed yet\n", (unsigned long long)n_late);
    assert_true(n_late > 100);
    for (int i = 0; i < REQUESTS; i++)
        engine_result_free(want[i]);
}

int main(void)
{
    lm_log_set_level(LM_WARN);
    for (size_t i = 0; i < LM_COUNT(prompt); i++)
        prompt[i] = 5 + (int32_t)(i * 7919 % 700);
    const struct CMUnitTest tests[] = { cmocka_unit_test(any_order_says_the_same) };
    return cmocka_run_group_tests_name("engine_order", tests, NULL, NULL);
}
