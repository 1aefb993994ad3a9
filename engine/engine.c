/* SPDX-License-Identifier: Apache-2.0 */
/*
 * engine.c - the public face: opens and closes, checks and tokenises, hands to the engine thread.
 *
 *   caller threads                      engine thread (loop.c)
 *   --------------                      ----------------------
 *   engine_submit: check, tokenise  --> mailbox inbox --> waiting --> plan, apply, step
 *   engine_adapter_load: read, pack --> registry      --> pool blocks (copy stream)
 *   engine_poll                     <-- mailbox outbox <-- text, results
 *
 * States of an engine:  OPEN --engine_close--> closed
 *                         \--device failure--> FAILED: every live request ends with ENGINE_ERROR,
 *                             submit answers LM_DEVICE, poll tells once all was delivered.
 *
 * What is refused in engine_submit() never reaches the engine thread: parameters out of range, bad
 * UTF-8, unknown token ids, prompts longer than the model allows, and what could not run even in an
 * empty pool. What gets past it may wait, but will not fail for lack of room.
 *
 * Locks: the mailbox's and the registry's mutex, never one inside the other.
 */
#include "engine/engine.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/core.h"
#include "engine/echo.h"
#include "engine/params.h"
#include "engine/prompt.h"
#include "engine/safetensors.h"

#define DEFAULT_BLOCK_TOKENS 16
#define DEFAULT_MAX_SEQS 256
#define DEFAULT_MAX_WAITING 1024
#define DEFAULT_HOST_ADAPTER_BYTES ((size_t)1 << 30)
#define MAX_WAIT_MS ((int64_t)365 * 86400000)   /* so that microseconds fit */
#define DEFAULT_MAX_ADAPTER_BYTES ((size_t)4 << 30)
#define AHEAD_BYTES ((size_t)1 << 30)           /* of weights, read while the device is opened */

struct engine {
    struct engine_config cfg;           /* defaults filled; its strings are not ours */
    char *model_name;
    struct model_config model;
    tokenizer *tok;
    chat_template *chat;
    safetensors *files;                 /* of weights, until the core has them */
    kn_device *dev;
    struct kn_props props;
    struct core *core;
    struct echo_counters *echo;
    adapters *adapters;
    mailbox *mail;
    pthread_t thread;
    bool started;
};

/* ---- opening --------------------------------------------------------------------------- */

bool engine_weights_parse(const char *name, enum engine_weights *out)
{
    static const char *const names[] = {
        [ENGINE_WEIGHTS_AUTO] = "auto", [ENGINE_WEIGHTS_STORED] = "stored",
        [ENGINE_WEIGHTS_BF16] = "bf16",
        [ENGINE_WEIGHTS_FP8] = "fp8", [ENGINE_WEIGHTS_FP8_DYNAMIC] = "fp8-dynamic",
    };
    for (size_t i = 0; i < LM_COUNT(names); i++) {
        if (strcmp(name, names[i]))
            continue;
        *out = (enum engine_weights)i;
        return true;
    }
    return false;
}

void engine_policy_default(struct engine_policy *p)
{
    *p = (struct engine_policy){
        .group = true, .max_overtaken = 4000, .max_wait_ms = 600000, .fair = true,
        .early_abort = true, .preempt = ENGINE_PREEMPT_CHEAPER, .swap_bytes = (size_t)1 << 30,
        .prefetch = true, .prefix_cache = true, .pipeline = true, .graphs = true,
    };
}

static int or_default(int given, int fallback)
{
    return given > 0 ? given : fallback;
}

static lm_status check_policy(const struct engine_policy *p, struct lm_err *err)
{
    if (p->max_overtaken < 1)
        return lm_err_set(err, LM_INVALID, "policy.max_overtaken is %d; it must be at least 1 (for "
                                           "first come, first served switch off group and fair)",
                          p->max_overtaken);
    if (p->max_wait_ms < 0 || p->max_wait_ms > MAX_WAIT_MS)
        return lm_err_set(err, LM_INVALID, "policy.max_wait_ms is %lld; it must be 0..%lld",
                          (long long)p->max_wait_ms, (long long)MAX_WAIT_MS);
    if ((unsigned)p->preempt > ENGINE_PREEMPT_SWAP)
        return lm_err_set(err, LM_INVALID, "policy.preempt is %d, which is no way to preempt",
                          (int)p->preempt);
    if (p->preempt == ENGINE_PREEMPT_SWAP && p->swap_bytes == 0)
        return lm_err_set(err, LM_INVALID, "policy.preempt is swap, and swap_bytes is 0");
    if (p->adapter_percent < 0 || p->adapter_percent > 99)
        return lm_err_set(err, LM_INVALID, "policy.adapter_percent is %d; it must be 0..99",
                          p->adapter_percent);
    if (p->adapter_slots < 0)
        return lm_err_set(err, LM_INVALID, "policy.adapter_slots is %d; it must not be negative",
                          p->adapter_slots);
    return LM_OK;
}

static lm_status check_config(struct engine_config *c, struct lm_err *err)
{
    if (c->policy && check_policy(c->policy, err) != LM_OK)
        return LM_INVALID;
    if (!c->echo && !c->model_dir && !c->shape)
        return lm_err_set(err, LM_INVALID, "model_dir is missing");
    if (c->model_dir && c->shape)
        return lm_err_set(err, LM_INVALID, "model_dir and shape are both given; a shape stands in "
                                           "for a model");
    if (c->sim && c->backend && strcmp(c->backend, "sim") != 0)
        return lm_err_set(err, LM_INVALID, "a device description is for backend 'sim', not '%s'",
                          c->backend);
    c->block_tokens = or_default(c->block_tokens, DEFAULT_BLOCK_TOKENS);
    c->max_seqs = or_default(c->max_seqs, DEFAULT_MAX_SEQS);
    c->max_waiting = or_default(c->max_waiting, DEFAULT_MAX_WAITING);
    if (!c->host_adapter_bytes)
        c->host_adapter_bytes = DEFAULT_HOST_ADAPTER_BYTES;
    if (!c->max_adapter_bytes)
        c->max_adapter_bytes = DEFAULT_MAX_ADAPTER_BYTES;
    if (c->block_tokens > 1024 || (c->block_tokens & (c->block_tokens - 1)))
        return lm_err_set(err, LM_INVALID, "block_tokens is %d; it must be a power of two up to "
                                           "1024", c->block_tokens);
    if ((unsigned)c->weights > ENGINE_WEIGHTS_FP8_DYNAMIC)
        return lm_err_set(err, LM_INVALID, "weights is %d; they are kept as stored, in bf16 or FP8",
                          (int)c->weights);
    if (c->weights >= ENGINE_WEIGHTS_FP8 && c->policy && c->policy->merge)
        return lm_err_set(err, LM_INVALID, "weights in FP8 can't take a merged adapter: it would "
                                           "be rounded to FP8 with them");
    if ((unsigned)c->kv > ENGINE_KV_FP8)
        return lm_err_set(err, LM_INVALID, "kv is %d; the KV cache is the device's own or FP8",
                          (int)c->kv);
    if (c->max_seqs > 65536 || c->max_waiting > 1 << 24 || c->max_step_tokens > 1 << 20)
        return lm_err_set(err, LM_INVALID, "max_seqs %d, max_waiting %d or max_step_tokens %d is "
                                           "too large", c->max_seqs, c->max_waiting,
                          c->max_step_tokens);
    if (c->echo && c->manual)
        return lm_err_set(err, LM_INVALID, "an echo engine has a thread of its own; it can't be "
                                           "manual");
    if (c->max_step_tokens > 0 && c->max_step_tokens < c->max_seqs)
        c->max_seqs = c->max_step_tokens;       /* every running sequence decodes in every step */
    return LM_OK;
}

/* The folder's name as its user wrote it: a link keeps its own. Only a path that ends in no name
 * ("/", ".", "..") is looked up. malloc'ed. */
static char *folder_name(const char *path)
{
    size_t n = strlen(path);
    for (bool more = true; more;) {             /* "x/", "x/." */
        more = n > 1 && (path[n - 1] == '/' || (path[n - 1] == '.' && path[n - 2] == '/'));
        n -= more;
    }
    size_t at = n;
    while (at > 0 && path[at - 1] != '/')
        at--;
    size_t len = n - at;
    if (len > 0 && strncmp(path + at, "..", len) != 0)
        return lm_strndup(path + at, len);
    char *real = realpath(path, NULL), *slash = real ? strrchr(real, '/') : NULL;
    char *name = lm_strdup(slash && slash[1] ? slash + 1 : path);
    free(real);
    return name;
}

static lm_status set_model_name(engine *e, struct lm_err *err)
{
    const char *name = e->cfg.model_name;
    const char *dir = e->cfg.model_dir ? e->cfg.model_dir : e->cfg.shape;
    e->model_name = name ? lm_strdup(name) : dir ? folder_name(dir) : lm_strdup("echo");
    size_t n = e->model_name && !name && e->cfg.shape ? strlen(e->model_name) : 0;
    if (n > 5 && !strcmp(e->model_name + n - 5, ".json"))
        e->model_name[n - 5] = '\0';
    return e->model_name ? LM_OK : lm_err_set(err, LM_NOMEM, "no memory for the model's name");
}

static lm_status load_texts(engine *e, struct lm_err *err)
{
    const char *dir = e->cfg.model_dir;
    lm_status st = dir ? model_config_load(dir, &e->model, err)
                       : model_config_load_file(e->cfg.shape, &e->model, err);
    if (st == LM_OK && !dir && e->cfg.shape_layers > 0)
        e->model.n_layers = LM_MIN(e->model.n_layers, e->cfg.shape_layers);
    if (st == LM_OK && dir)
        st = tokenizer_load(dir, &e->tok, err);
    if (st == LM_OK && dir)
        st = chat_template_load(dir, &e->chat, err);
    if (st != LM_OK)
        return st;
    int limit = e->model.max_position;
    if (e->model.rope == ROPE_DYNAMIC)          /* made to go past it by this factor */
        limit = (int)LM_MIN((double)limit * (double)e->model.dyn_factor, 1 << 24);
    if (e->cfg.max_model_len > limit)
        return lm_err_set(err, LM_INVALID, "max_model_len is %d; the model's own limit is %d",
                          e->cfg.max_model_len, limit);
    e->cfg.max_model_len = or_default(e->cfg.max_model_len, limit);
    if (!dir)
        return LM_OK;
    st = safetensors_open_model(dir, &e->files, err);
    if (st == LM_OK)
        safetensors_ahead(e->files, AHEAD_BYTES);
    return st;
}

static lm_status open_device(engine *e, struct lm_err *err)
{
    struct kn_open_params p = { .index = e->cfg.device_index, .threads = e->cfg.threads,
                                .sim = e->cfg.sim };
    lm_status st = kn_open(e->cfg.sim ? "sim" : e->cfg.backend, &p, &e->dev, err);
    if (st != LM_OK)
        return st;
    kn_props(e->dev, &e->props);
    bool cpu = !strcmp(e->props.backend, "cpu");
    e->cfg.max_step_tokens = or_default(e->cfg.max_step_tokens, cpu ? 512 : 2048);
    e->cfg.max_seqs = LM_MIN(e->cfg.max_seqs, e->cfg.max_step_tokens);
    return LM_OK;
}

static lm_status open_core(engine *e, struct lm_err *err)
{
    const struct engine_config *c = &e->cfg;
    struct core_params p = {
        .files = e->files, .model = &e->model, .tok = e->tok, .dev = e->dev,
        .pool_bytes = c->pool_bytes, .block_tokens = c->block_tokens, .max_seqs = c->max_seqs,
        .max_step_tokens = c->max_step_tokens, .max_waiting = c->max_waiting,
        .max_model_len = c->max_model_len,
        .kv = c->kv == ENGINE_KV_FP8 ? KN_KV_E4M3 : KN_KV_NATIVE,
        .weights = c->weights,
    };
    engine_policy_default(&p.policy);
    if (c->policy)
        p.policy = *c->policy;
    e->files = NULL;
    return core_open(&p, &e->core, err);
}

static void rouse(void *ctx)
{
    mailbox_rouse(ctx);
}

static lm_status open_registry(engine *e, struct lm_err *err)
{
    struct adapters_config c = {
        .host_budget = e->cfg.host_adapter_bytes, .max_file_bytes = e->cfg.max_adapter_bytes,
        .rouse = rouse, .rouse_ctx = e->mail,
    };
    if (!e->cfg.echo) {
        c.model = &e->model;
        c.dev = e->dev;
        c.lora_dtype = e->props.lora;
        c.cell_bytes = core_block_bytes(e->core);
        c.n_layers = e->model.n_layers;
        c.pool_blocks = core_pool_blocks(e->core);
        c.no_payload = e->props.virtual_time;
    }
    return adapters_new(&c, &e->adapters, err);
}

static void *engine_thread(void *arg)
{
    engine *e = arg;
    pthread_setname_np(pthread_self(), "engine");
    if (e->cfg.echo)
        echo_run(e->mail, e->adapters);
    else
        core_run(e->core);
    return NULL;
}

static lm_status open_parts(engine *e, struct lm_err *err)
{
    lm_status st = check_config(&e->cfg, err);
    if (st == LM_OK)
        st = set_model_name(e, err);
    if (st == LM_OK)
        st = mailbox_new(e->cfg.max_waiting, &e->mail, err);
    if (st == LM_OK && e->cfg.echo)
        st = echo_new(&e->echo, err);
    if (st == LM_OK && !e->cfg.echo) {
        st = load_texts(e, err);
        int64_t t0 = lm_now_us();
        if (st == LM_OK)
            st = open_device(e, err);
        int64_t t1 = lm_now_us();
        if (st == LM_OK)
            st = open_core(e, err);
        if (st == LM_OK)
            lm_log(LM_INFO, "engine", "opened in %.2f s, %.2f s of it the device",
                   (double)(lm_now_us() - t0) / 1e6, (double)(t1 - t0) / 1e6);
    }
    if (st == LM_OK)
        st = open_registry(e, err);
    if (st == LM_OK && e->core)
        core_begin(e->core, e->mail, e->adapters);
    if (st == LM_OK && !e->cfg.manual && pthread_create(&e->thread, NULL, engine_thread, e))
        st = lm_err_set(err, LM_NOMEM, "can't start the engine thread");
    e->started = st == LM_OK;
    return st;
}

lm_status engine_open(const struct engine_config *cfg, engine **out, struct lm_err *err)
{
    engine *e = lm_calloc(1, sizeof *e);
    if (!e)
        return lm_err_set(err, LM_NOMEM, "no memory for an engine");
    e->cfg = *cfg;
    lm_status st = open_parts(e, err);
    if (st != LM_OK) {
        engine_close(e);
        return st;
    }
    e->cfg.model_dir = e->cfg.model_name = e->cfg.backend = NULL;   /* the caller's */
    e->cfg.shape = e->cfg.sim = NULL;
    e->cfg.policy = NULL;
    *out = e;
    return LM_OK;
}

void engine_close(engine *e)
{
    if (!e)
        return;
    if (e->started) {
        mailbox_stop(e->mail);
        if (e->cfg.manual)
            core_drop(e->core);
        else
            pthread_join(e->thread, NULL);
    }
    core_close(e->core);
    mailbox_free(e->mail);              /* its requests hold references on adapters */
    adapters_free(e->adapters);
    echo_free(e->echo);
    if (e->dev)
        kn_close(e->dev);
    safetensors_close(e->files);
    if (e->chat)
        chat_template_free(e->chat);
    if (e->tok)
        tokenizer_free(e->tok);
    if (!e->cfg.echo)
        model_config_release(&e->model);
    free(e->model_name);
    free(e);
}

void engine_info(const engine *e, struct engine_info *out)
{
    *out = (struct engine_info){ .model_name = e->model_name };
    if (e->cfg.echo) {
        out->architecture = "echo";
        out->device = "none";
        return;
    }
    out->architecture = e->model.architecture;
    out->device = e->props.name;
    out->chat_family = e->chat ? chat_template_family(e->chat) : NULL;
    out->vocab_size = e->model.vocab;
    out->max_model_len = e->cfg.max_model_len;
    out->n_layers = e->model.n_layers;
    out->hidden = e->model.hidden;
    out->block_tokens = e->cfg.block_tokens;
    out->pool_blocks = core_pool_blocks(e->core);
    out->block_bytes = (size_t)core_block_bytes(e->core);
    out->kv_dtype = kn_dtype_name(e->cfg.kv == ENGINE_KV_FP8 ? KN_E4M3 : e->props.kv);
    out->weight_bytes = core_weight_bytes(e->core);
    out->pool_reserve = core_pool_reserve(e->core);
}

/* ---- turns and time -------------------------------------------------------------------- */

lm_status engine_pump(engine *e, int64_t until_us, bool *idle, struct lm_err *err)
{
    if (!e->cfg.manual)
        return lm_err_set(err, LM_STATE, "only a manual engine is pumped; this one has a thread");
    return core_pump(e->core, until_us, idle, err);
}

int64_t engine_now_us(engine *e)
{
    return e->core ? core_now_us(e->core) : lm_now_us();
}

int64_t engine_wall_ms(engine *e)
{
    return e->core ? core_wall_ms(e->core) : lm_wall_ms();
}

lm_status engine_advance(engine *e, int64_t until_us)
{
    return e->dev ? kn_advance(e->dev, until_us) : LM_UNSUPPORTED;
}

/* ---- adapters -------------------------------------------------------------------------- */

static bool id_char(unsigned char c, bool first)
{
    if ((c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'))
        return true;
    return !first && (c == '.' || c == '_' || c == '-');
}

enum { SHOWN_ID = 48 };

/* A slip in an id is repeated; what else stands there may be text, which errors don't tell. */
static lm_status bad_id(const char *id, size_t len, size_t at, struct lm_err *err)
{
    char which[SHOWN_ID + 3];
    bool shown = len <= SHOWN_ID;
    for (size_t i = 0; shown && i < len; i++)
        shown = id[i] == '/' || id_char((unsigned char)id[i], false);
    if (shown)
        snprintf(which, sizeof which, "'%.*s'", (int)len, id);
    else
        snprintf(which, sizeof which, "of %zu bytes", len);
    return lm_err_set(err, LM_INVALID, "adapter id %s: byte %zu is not allowed; segments are "
                      "[A-Za-z0-9][A-Za-z0-9._-]* joined by '/'", which, at);
}

lm_status engine_adapter_id_check(const char *id, size_t len, struct lm_err *err)
{
    if (len == 0 || len > ENGINE_ADAPTER_ID_MAX)
        return lm_err_set(err, LM_INVALID, "adapter id has %zu bytes; it must have 1..%d", len,
                          ENGINE_ADAPTER_ID_MAX);
    bool first = true;
    for (size_t i = 0; i < len; i++) {
        bool slash = id[i] == '/';
        if (slash ? first || i + 1 == len : !id_char((unsigned char)id[i], first))
            return bad_id(id, len, i, err);
        first = slash;
    }
    return LM_OK;
}

lm_status engine_adapter_load(engine *e, const char *id, const char *dir, engine_adapter **out,
                              struct lm_err *err)
{
    lm_status st = engine_adapter_id_check(id, strlen(id), err);
    return st == LM_OK ? adapters_load(e->adapters, id, dir, out, err) : st;
}

lm_status engine_adapter_dummy(engine *e, const char *id, int rank, unsigned modules,
                               engine_adapter **out, struct lm_err *err)
{
    lm_status st = engine_adapter_id_check(id, strlen(id), err);
    if (st == LM_OK && e->cfg.echo)
        st = lm_err_set(err, LM_UNSUPPORTED, "an echo engine has no model to adapt");
    return st == LM_OK ? adapters_dummy(e->adapters, id, rank, modules, out, err) : st;
}

engine_adapter *engine_adapter_find(engine *e, const char *id)
{
    return adapters_find(e->adapters, id);
}

/* ---- requests -------------------------------------------------------------------------- */

static lm_status check_length(const engine *e, const struct engine_params *p, int n_prompt,
                              struct lm_err *err)
{
    int limit = e->cfg.max_model_len, room = p->max_tokens > 0 ? 1 : 0;
    if (n_prompt > limit - room)
        return lm_err_set(err, LM_TOO_LARGE,
                          "the prompt has %d tokens; the model takes %d, generated ones included",
                          n_prompt, limit);
    return LM_OK;
}

static lm_status check_room(const engine *e, const struct request *r, struct lm_err *err)
{
    int pool = core_pool_blocks(e->core);
    int kv = r->seqs[0].cap_blocks, lora = r->adapter ? r->adapter->n_blocks : 0;
    if (kv + lora > pool)
        return lm_err_set(err, LM_TOO_LARGE,
                          "%d prompt tokens and max_tokens %d need %d blocks of KV cache and the "
                          "adapter %d; the pool has %d", r->prompt.n, r->params.max_tokens, kv,
                          lora, pool);
    int kv_limit, lora_limit;
    core_limits(e->core, &kv_limit, &lora_limit);
    if (kv > kv_limit || lora > lora_limit)
        return lm_err_set(err, LM_TOO_LARGE,
                          "%d prompt tokens and max_tokens %d need %d blocks of KV cache and the "
                          "adapter %d; in the split pool they may take %d and %d", r->prompt.n,
                          r->params.max_tokens, kv, lora, kv_limit, lora_limit);
    return LM_OK;
}

/* An engine of a mere shape has no tokenizer. */
static lm_status check_no_text(const struct engine_request *in, struct lm_err *err)
{
    if (!in->token_ids)
        return lm_err_set(err, LM_UNSUPPORTED, "this engine has no tokenizer; give token ids");
    if (in->params.n_stop > 0 || in->params.echo)
        return lm_err_set(err, LM_UNSUPPORTED, "this engine has no tokenizer; %s needs one",
                          in->params.echo ? "echo" : "stop");
    return LM_OK;
}

static lm_status make_request(engine *e, const struct engine_request *in, struct request **out,
                              struct lm_err *err)
{
    struct engine_params p;
    struct token_ids ids = { 0 };
    char *text = NULL;
    size_t len = 0;
    struct request_limits lim = { e->cfg.max_model_len, e->cfg.block_tokens, engine_now_us(e) };
    lm_status st = prompt_check(in, err);
    if (st == LM_OK && !e->tok)
        st = check_no_text(in, err);
    if (st == LM_OK)
        st = params_resolve(&in->params, &e->model, &p, err);
    if (st != LM_OK)
        return st;
    st = prompt_encode(in, e->tok, e->chat, e->model.vocab, &ids, &text, &len, err);
    if (st == LM_OK)
        st = check_length(e, &p, ids.n, err);
    if (st == LM_OK)
        st = request_new(in, &p, &ids, e->tok, &lim, out, err);
    if (st != LM_OK) {
        token_ids_release(&ids);
        free(text);
        return st;
    }
    (*out)->prompt_text = text;
    (*out)->prompt_text_len = len;
    return LM_OK;
}

lm_status engine_submit(engine *e, const struct engine_request *in, engine_handle *out,
                        struct lm_err *err)
{
    struct request *r = NULL;
    if (e->cfg.echo)
        return echo_submit(e->echo, e->mail, in, out, err);
    lm_status st = mailbox_accepts(e->mail, err);       /* before the work of tokenising */
    if (st == LM_OK)
        st = make_request(e, in, &r, err);
    if (st == LM_OK)
        st = check_room(e, r, err);
    if (st == LM_OK)
        st = mailbox_submit(e->mail, r, out, err);
    if (st != LM_OK)
        request_free(r);
    return st;
}

lm_status engine_cancel(engine *e, engine_handle h)
{
    return mailbox_cancel(e->mail, h);
}

int engine_poll(engine *e, struct engine_event *out, int max, int timeout_ms, lm_status *state)
{
    return mailbox_poll(e->mail, out, max, timeout_ms, state);
}

void engine_wake(engine *e)
{
    mailbox_wake(e->mail);
}

void engine_stats(engine *e, struct engine_stats *out)
{
    *out = (struct engine_stats){ 0 };
    adapters_stats(e->adapters, &out->adapters_host, &out->host_adapter_bytes);
    if (e->cfg.echo)
        echo_stats(e->echo, out);
    else
        core_stats(e->core, out);
}
