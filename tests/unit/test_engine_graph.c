/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine_graph.c - a device that records.
 *
 * The CPU has no graphs. Here the linker puts this program before kn_graph_* and every operation
 * (the Makefile has the list): between kn_graph_begin() and kn_graph_end() operations are kept with
 * their arguments, and carried out at the end; kn_graph_run() carries out what was kept under the
 * key, with the arguments of then, as a GPU does. So an argument that a later step would have given
 * otherwise, and that the key does not hold, gives other words; and so does a padded row that is
 * not left alone.
 *
 * Requests of all kinds, base-only and with adapters of two ranks, must say what they say where
 * each step is carried out with its own arguments, to the last bit of their log-probabilities; and
 * where steps are not padded either, up to what the CPU's sums owe to the number of rows. The same
 * where the device has no room for what was recorded. A step of which an operation is refused is
 * never kept.
 *
 * The same seat before the operations shows how logits are cut into slabs: equal ones, by how many
 * rows a recorded step would have.
 */
#include "engine_fixture.h"

#include "engine/core.h"
#include "kernels/kernels.h"

#define ADAPTERS "tests/models/spm-tiny-adapters"
#define REQUESTS 60
#define MAX_OPS 256
#define MAX_GRAPHS 256
#define SIZES 4                 /* recorded steps have multiples of so many rows */
#define SUMS 1e-5f              /* some ulp of a log-probability, from sums in another order */

/* ---- the device ------------------------------------------------------------------------ */

typedef lm_status run_fn(kn_stream *s, const void *args);

struct op {
    run_fn *run;
    _Alignas(16) char args[512];
};

struct graph {
    unsigned char key[512];
    size_t n_key;
    struct op op[MAX_OPS];
    int n;
    bool lora;
};

static enum { PLAIN, PADDED, RECORDED } mode;   /* PLAIN: nothing to win by recording */
static struct graph *now;       /* being recorded */
static struct graph graphs[MAX_GRAPHS];
static int n_graphs, n_run, n_run_lora, n_padded, n_abandoned, n_no_room;
static int room;                /* for so many graphs */
static int refuse_at;           /* of so many operations recorded the last is refused; 0: none */

int __wrap_kn_graph_rows(kn_device *dev, int n);
lm_status __wrap_kn_graph_begin(kn_stream *s);
lm_status __wrap_kn_graph_end(kn_stream *s, const void *key, size_t n);
lm_status __wrap_kn_graph_run(kn_stream *s, const void *key, size_t n);

int __wrap_kn_graph_rows(kn_device *dev, int n)
{
    (void)dev;
    int rows = LM_DIV_UP(n, SIZES) * SIZES;
    n_padded += rows > n;
    return mode == PLAIN ? 0 : rows;
}

static lm_status run_graph(kn_stream *s, const struct graph *g)
{
    lm_status st = LM_OK;
    for (int i = 0; i < g->n && st == LM_OK; i++)
        st = g->op[i].run(s, g->op[i].args);
    return st;
}

lm_status __wrap_kn_graph_begin(kn_stream *s)
{
    (void)s;
    assert_true(mode != PLAIN && !now && n_graphs < MAX_GRAPHS);
    if (mode == RECORDED)
        now = &graphs[n_graphs++];
    return LM_OK;
}

lm_status __wrap_kn_graph_end(kn_stream *s, const void *key, size_t n)
{
    struct graph *g = now;
    if (!g)
        return LM_OK;
    now = NULL;
    if (!key || n_graphs > room) {
        n_abandoned += !key;
        n_no_room += key != NULL;
        memset(g, 0, sizeof *g);
        n_graphs--;
        return key ? LM_NOMEM : LM_OK;
    }
    assert_true(n <= sizeof g->key && n <= KN_GRAPH_KEY_BYTES);
    g->n_key = n;
    memcpy(g->key, key, n);
    return run_graph(s, g);
}

lm_status __wrap_kn_graph_run(kn_stream *s, const void *key, size_t n)
{
    for (int i = 0; i < n_graphs; i++)
        if (graphs[i].n_key == n && !memcmp(graphs[i].key, key, n)) {
            n_run++;
            n_run_lora += graphs[i].lora;
            return run_graph(s, &graphs[i]);
        }
    return LM_NOT_FOUND;
}

static lm_status keep(run_fn *run, const void *args, size_t bytes, bool lora)
{
    assert_true(now->n < MAX_OPS && bytes <= sizeof now->op[0].args);
    if (refuse_at > 0 && --refuse_at == 0)
        return LM_INVALID;
    now->op[now->n].run = run;
    memcpy(now->op[now->n++].args, args, bytes);
    now->lora |= lora;
    return LM_OK;
}

/* Products to float32, which are logits, and the rows that were sampled, of a step. */
static struct {
    int n, m[16], sampled;
} heads;

static void note_gemm(const struct kn_gemm *a)
{
    if (a->y_f32 && heads.n < (int)LM_COUNT(heads.m))
        heads.m[heads.n++] = a->m;
}

static void note(const char *op, const void *args)
{
    if (!strcmp(op, "gemm"))
        note_gemm(args);
    else if (!strcmp(op, "sample"))
        heads.sampled += ((const struct kn_sample *)args)->n;
}

#define X(name, type)                                                                          \
    lm_status __real_kn_op_##name(kn_stream *s, const struct kn_##type *a);                    \
    lm_status __wrap_kn_op_##name(kn_stream *s, const struct kn_##type *a);                    \
    static lm_status run_##name(kn_stream *s, const void *args)                                \
    {                                                                                          \
        return __real_kn_op_##name(s, args);                                                   \
    }                                                                                          \
    lm_status __wrap_kn_op_##name(kn_stream *s, const struct kn_##type *a)                     \
    {                                                                                          \
        note(#name, a);                                                                        \
        return now ? keep(run_##name, a, sizeof *a, !strcmp(#type, "lora"))                    \
                   : __real_kn_op_##name(s, a);                                                \
    }
KN_OPS(X)
KN_FUSED_OPS(X)
#undef X

/* ---- the same words -------------------------------------------------------------------- */

static int32_t prompt[320];

static engine *open_engine(bool prefix_cache)
{
    struct engine_policy policy;
    struct engine_config cfg = fixture_config(SPM_TINY);
    engine_policy_default(&policy);
    policy.prefix_cache = prefix_cache;
    cfg.block_tokens = 8;
    cfg.max_seqs = 10;          /* no multiple of SIZES, and below max_step_tokens */
    cfg.max_step_tokens = 96;
    cfg.manual = true;
    cfg.policy = &policy;
    return fixture_engine(&cfg);
}

static void submit(engine *e, int i)
{
    static const char *const folders[] = { ADAPTERS "/captain-sal", ADAPTERS "/nordwind-terse" };
    static const char *const ids[] = { "sal", "terse" };
    engine_adapter *a = NULL;
    if (i >= REQUESTS / 3 && i % 3)     /* the first ones meet no adapter */
        CHECK(engine_adapter_load(e, ids[i % 3 - 1], folders[i % 3 - 1], &a, err));
    struct engine_request r = fixture_request("graph", prompt + i % 4,
                                              5 + i * 7 % 60 + (i % 15 == 14 ? 230 : 0));
    r.adapter = a;
    r.params.max_tokens = 4 + i * 5 % 29;
    r.params.ignore_eos = i % 4 != 0;
    r.params.min_tokens = i % 6 == 0 ? 3 : 0;
    r.params.repetition_penalty = i % 7 == 0 ? 1.2f : 1;
    r.params.temperature = i % 5 == 0 ? 0.8f : 0;
    r.params.seed = (uint64_t)i;
    r.params.logprobs = i % 3;
    r.user = (void *)(intptr_t)i;
    fixture_submit(e, &r);
    engine_adapter_unref(a);
}

static void run_all(int as, bool prefix_cache, struct engine_result **out)
{
    struct engine_event ev;
    bool idle = false;
    mode = as;
    n_graphs = n_run = n_run_lora = n_padded = n_no_room = 0;
    memset(graphs, 0, sizeof graphs);
    engine *e = open_engine(prefix_cache);
    for (int i = 0; i < REQUESTS; i++)
        submit(e, i);
    CHECK(engine_pump(e, INT64_MAX, &idle, err));
    assert_true(idle);
    for (int n = 0; n < REQUESTS; n++) {
        assert_int_equal(engine_poll(e, &ev, 1, 0, NULL), 1);
        assert_int_equal(ev.result->status, LM_OK);
        out[(intptr_t)ev.user] = ev.result;
    }
    engine_close(e);
}

static void same(int request, const struct engine_result *ra, const struct engine_result *rb,
                 float tolerance)
{
    const struct engine_choice *a = &ra->choices[0], *b = &rb->choices[0];
    assert_int_equal(a->n_tokens, b->n_tokens);
    assert_int_equal(a->n_logprobs, b->n_logprobs);
    for (int t = 0; t < a->n_tokens; t++)
        if (a->token_ids[t] != b->token_ids[t])
            fail_msg("request %d: token %d is %d, not %d", request, t, b->token_ids[t],
                     a->token_ids[t]);
    for (int t = 0; t < a->n_logprobs; t++) {
        float want = a->logprobs[t].logprob, got = b->logprobs[t].logprob;
        if (!(fabsf(want - got) <= tolerance * (1 + fabsf(want))))
            fail_msg("request %d: the log-probability of token %d is %.9g, not %.9g", request, t,
                     (double)got, (double)want);
    }
}

static void recorded_steps_say_the_same(void **state)
{
    static struct engine_result *plain[REQUESTS], *padded[REQUESTS], *recorded[REQUESTS];
    (void)state;
    for (int pipelined = 0; pipelined < 2; pipelined++) {
        core_force_pipeline(pipelined);
        run_all(PLAIN, pipelined, plain);
        run_all(PADDED, pipelined, padded);
        run_all(RECORDED, pipelined, recorded);
        print_message("%d recorded, run %d times again, %d of them with adapters\n", n_graphs,
                      n_run, n_run_lora);
        assert_true(n_run > 2 * n_graphs && n_padded > 0);
        assert_true(n_run_lora > n_run / 4 && n_run_lora < n_run);
        for (int i = 0; i < REQUESTS; i++) {
            same(i, plain[i], padded[i], SUMS);
            same(i, padded[i], recorded[i], 0);
            engine_result_free(plain[i]);
            engine_result_free(padded[i]);
            engine_result_free(recorded[i]);
        }
    }
    core_force_pipeline(false);
}

static void no_room_is_no_failure(void **state)
{
    static struct engine_result *padded[REQUESTS], *recorded[REQUESTS];
    (void)state;
    run_all(PADDED, false, padded);
    for (room = 0; room < 8; room += 3) {
        run_all(RECORDED, false, recorded);
        print_message("room for %d: %d refused, %d run again\n", room, n_no_room, n_run);
        assert_int_equal(n_graphs, room);
        assert_true(n_no_room > 0 && n_no_room < 10 && (n_run > 0) == (room > 0));
        for (int i = 0; i < REQUESTS; i++) {
            same(i, padded[i], recorded[i], 0);
            engine_result_free(recorded[i]);
        }
    }
    for (int i = 0; i < REQUESTS; i++)
        engine_result_free(padded[i]);
    room = MAX_GRAPHS;
}

static void half_a_step_is_never_kept(void **state)
{
    struct lm_err err = { 0 };
    bool idle = false;
    (void)state;
    mode = RECORDED;
    n_graphs = n_abandoned = 0;
    memset(graphs, 0, sizeof graphs);
    engine *e = open_engine(false);
    for (int i = 0; i < REQUESTS; i++)
        submit(e, i);
    refuse_at = 7;
    assert_int_not_equal(engine_pump(e, INT64_MAX, &idle, &err), LM_OK);
    assert_true(refuse_at == 0 && !now && n_abandoned == 1 && n_graphs == 0);
    engine_close(e);
}

/* ---- slabs of logits ------------------------------------------------------------------- */

#define MOST 300                /* rows of a step */

/* So wide that 130 rows are the slab of 64 MiB that the CPU has. */
static const char wide_shape[] =
    "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", "
    "\"hidden_size\": 64, \"intermediate_size\": 96, \"num_hidden_layers\": 1, "
    "\"num_attention_heads\": 2, \"num_key_value_heads\": 1, \"vocab_size\": 128256, "
    "\"max_position_embeddings\": 512, \"rms_norm_eps\": 1e-5, \"hidden_act\": \"silu\", "
    "\"tie_word_embeddings\": false, \"torch_dtype\": \"bfloat16\"}";

static engine *open_wide(void)
{
    char path[] = "/tmp/loramill-shape-XXXXXX";
    struct engine_config cfg = fixture_config(NULL);
    int fd = mkstemp(path);
    assert_true(fd >= 0 && write(fd, wide_shape, sizeof wide_shape - 1) == sizeof wide_shape - 1);
    close(fd);
    cfg.shape = path;
    cfg.max_seqs = cfg.max_waiting = MOST;
    cfg.max_step_tokens = 2 * MOST;
    cfg.manual = true;
    engine *e = fixture_engine(&cfg);
    unlink(path);
    return e;
}

/* One step of n prompts, one token each after it. Those from `company` on are others than they are
 * with another `shift`. */
static void one_step(engine *e, int as, int n, int company, int shift, struct engine_result **out)
{
    struct engine_event ev;
    bool idle = false;
    mode = as;
    memset(&heads, 0, sizeof heads);
    for (int i = 0; i < n; i++) {
        const int32_t ids[] = { 5 + i * 17, 9000 + i * 31 + (i < company ? 0 : shift) };
        struct engine_request r = fixture_request("slabs", ids, 2);
        r.params.max_tokens = 1;
        r.params.logprobs = 1;
        r.user = (void *)(intptr_t)i;
        fixture_submit(e, &r);
    }
    CHECK(engine_pump(e, INT64_MAX, &idle, err));
    for (int i = 0; i < n; i++) {
        assert_int_equal(engine_poll(e, &ev, 1, 0, NULL), 1);
        assert_int_equal(ev.result->status, LM_OK);
        out[(intptr_t)ev.user] = ev.result;
    }
}

/* So many slabs of so many rows, and no row was left out or sampled twice. */
static void expect_slabs(int n, int slabs, int rows)
{
    if (heads.n != slabs || heads.m[0] != rows || heads.sampled != n)
        fail_msg("%d rows: %d slabs of %d, %d rows sampled", n, heads.n, heads.m[0],
                 heads.sampled);
    for (int i = 0; i < heads.n; i++)
        assert_int_equal(heads.m[i], rows);
}

/* Whatever the rows of one padded size, they come in slabs of one height, and say what they say
 * in other slabs, or in a step so small that it needs none. */
static void slabs_are_equal(void **state)
{
    static const struct {
        int as, n, slabs, rows;
    } cases[] = {
        { PLAIN, 130, 1, 130 },  { PLAIN, 131, 2, 66 },  { PADDED, 128, 1, 128 },
        { PADDED, 129, 2, 66 },  { PADDED, 132, 2, 66 }, { PADDED, 257, 2, 130 },
        { PADDED, 260, 2, 130 },
    };
    static struct engine_result *alone[MOST], *most[MOST], *one[MOST], *other[MOST];
    const int few = 100;
    (void)state;
    engine *e = open_wide();
    one_step(e, PLAIN, few, few, 0, alone);
    expect_slabs(few, 1, few);
    one_step(e, PLAIN, MOST, few, 0, most);
    expect_slabs(MOST, 3, MOST / 3);
    for (size_t k = 0; k < LM_COUNT(cases); k++) {
        const int n = cases[k].n;
        one_step(e, cases[k].as, n, few, 0, one);
        expect_slabs(n, cases[k].slabs, cases[k].rows);
        one_step(e, cases[k].as, n, few, 7, other);
        for (int i = 0; i < n; i++) {
            same(i, most[i], one[i], SUMS);
            if (i < few)
                same(i, one[i], other[i], 0);
            engine_result_free(one[i]);
            engine_result_free(other[i]);
        }
    }
    for (int i = 0; i < MOST; i++) {
        if (i < few)
            same(i, alone[i], most[i], SUMS);
        engine_result_free(alone[i]);
        engine_result_free(most[i]);
    }
    engine_close(e);
}

int main(void)
{
    lm_log_set_level(LM_WARN);
    for (size_t i = 0; i < LM_COUNT(prompt); i++)
        prompt[i] = 5 + (int32_t)(i * 7919 % 700);
    room = MAX_GRAPHS;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(recorded_steps_say_the_same),
        cmocka_unit_test(no_room_is_no_failure),
        cmocka_unit_test(half_a_step_is_never_kept),
        cmocka_unit_test(slabs_are_equal),
    };
    return cmocka_run_group_tests_name("engine_graph", tests, NULL, NULL);
}
