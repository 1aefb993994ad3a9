/* SPDX-License-Identifier: Apache-2.0 */
/*
 * worker.c - life and death of a worker. How each job begins and ends is worker_job.c's, and what
 * is sent for it outcome.c's.
 *
 * Start, against the arrows of worker.h: log; the consumer's handle and the producer, so that a bad
 * property is known before weights load; HTTP, so that probes answer meanwhile; engine, codec and
 * store; outbox, then intake; and the consumer's thread last, so that nothing is read before it can
 * be served.
 *
 * End, on SIGTERM or SIGINT:  stopping -> the consumer pauses; intake drops what has not started;
 *   what runs may finish for drain.timeout_ms; then it is cancelled and handed back; the watermark
 *   is committed, the group is left -> ending -> the other threads end, along the arrows -> 0.
 * On a failure the same without the drain, which one in its middle cuts short, and the status is 1.
 * A second signal ends the process at once. A watchdog (watchdog.h) ends a shutdown that hangs.
 *
 * Silent brokers must not hold an end up. drain_end_us is the clock that all share: after it no
 * call to a broker is made again, and what is under way has a few seconds, each counted from there
 * and not from the one before. What was not committed by then is handed back: nothing is lost by
 * that, an open transaction is the broker's to time out or the next start's to fence. A call that
 * doesn't return in spite of its own timeout (rd_kafka_send_offsets_to_transaction() waits for
 * socket.timeout.ms) is left alone in its thread, and the process ends without it, in order.
 *
 * Signals are taken synchronously (signals.h) by the main thread, and by the watchdog at the start
 * and at the end.
 */
#include "worker/worker.h"

#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "worker/cancels.h"
#include "worker/codec/codec.h"
#include "worker/journal.h"
#include "worker/kafka_conf.h"
#include "worker/log.h"
#include "worker/signals.h"
#include "worker/spans.h"
#include "worker/url.h"
#include "worker/watchdog.h"

enum { SUPERVISE_MS = 100 };

/* ---- failure ---------------------------------------------------------------------------- */

void worker_fail(struct worker *w, lm_status status, const char *fmt, ...)
{
    int well = LM_OK;
    char text[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (!atomic_compare_exchange_strong(&w->failed, &well, (int)(status ? status : LM_INTERNAL)))
        return;
    lm_log(LM_ERROR, "worker", "%s", text);
    if (atomic_load(&w->stopping))      /* else supervise() sees it */
        worker_cancel(w);
}

/* ---- start ------------------------------------------------------------------------------ */

static const char *or_null(const char *s)
{
    return *s ? s : NULL;
}

static void engine_policy(const struct config *c, struct engine_policy *p)
{
    engine_policy_default(p);
    p->group = c->engine_group;
    p->max_overtaken = (int)c->engine_max_overtaken;
    p->max_wait_ms = c->engine_max_wait_ms;
    p->fair = c->engine_fair;
    p->early_abort = c->engine_early_abort;
    p->preempt = !strcmp(c->engine_preempt, "swap") ? ENGINE_PREEMPT_SWAP
                 : !strcmp(c->engine_preempt, "recompute") ? ENGINE_PREEMPT_RECOMPUTE
                                                           : ENGINE_PREEMPT_CHEAPER;
    p->swap_bytes = (size_t)c->engine_swap_bytes;
    p->prefetch = c->engine_prefetch;
    p->prefix_cache = c->engine_prefix_cache;
    p->merge = c->engine_merge;
    p->pipeline = c->engine_pipeline;
}

static lm_status open_engine(struct worker *w, struct lm_err *err)
{
    const struct config *c = w->cfg;
    struct engine_policy policy;
    engine_policy(c, &policy);
    struct engine_config e = {
        .model_dir = or_null(c->model_path), .model_name = or_null(c->model_name),
        .backend = strcmp(c->backend, "auto") ? c->backend : NULL,
        .device_index = (int)c->device_index, .threads = (int)c->threads,
        .pool_bytes = (size_t)c->pool_bytes, .max_seqs = (int)c->max_seqs,
        .max_step_tokens = (int)c->max_step_tokens, .max_waiting = (int)c->max_waiting,
        .max_model_len = (int)c->max_model_len,
        .host_adapter_bytes = (size_t)c->adapters_host_bytes,
        .max_adapter_bytes = (size_t)c->adapters_max_bytes,
        .kv = !strcmp(c->kv_dtype, "fp8") ? ENGINE_KV_FP8 : ENGINE_KV_AUTO,
        .policy = &policy, .echo = !strcmp(c->engine_mode, "echo"),
    };
    (void)engine_weights_parse(c->weights_dtype, &e.weights);   /* the table has its names only */
    int64_t start = lm_now_us();
    lm_status st = engine_open(&e, &w->engine, err);
    if (st)
        return st;
    engine_info(w->engine, &w->info);
    lm_log(LM_INFO, "worker", "model %s on %s, ready after %.1f s",
           w->info.model_name ? w->info.model_name : "(echo)",
           w->info.device ? w->info.device : "no device", (double)(lm_now_us() - start) / 1e6);
    return LM_OK;
}

static lm_status open_codec(struct worker *w, struct lm_err *err)
{
    const struct config *c = w->cfg;
    struct codec_config cc = {
        .registry = config_registry(c), .auto_register = c->registry_auto_register,
        .reply_topic = c->topics_replies, .max_message_bytes = (size_t)c->message_max_bytes,
        .model_name = w->info.model_name, .answered = intake_schema_answered,
    };
    lm_status st = codec_new(&cc, &w->codec, err);
    if (st || w->reply_as != REPLY_AS_AVRO)
        return st;
    /* Every reply would fail without its schema: said now. A registry that is away is waited for by
     * the first reply. This may take seconds, so who is waited for is said before. */
    char shown[URL_SHOWN];
    url_show_list(c->registry_url, shown, sizeof shown);
    lm_log(LM_INFO, "worker", "replies.encoding=avro: asking the schema registry %s for the "
           "replies' schema", shown);
    st = codec_prepare_replies(w->codec, err);
    if (lm_status_disposition(st) != LM_DO_RETRY)
        return st ? lm_err_prefix(err, "replies.encoding=avro") : LM_OK;
    lm_log(LM_WARN, "worker", "%s; the first reply asks again", err->msg);
    return LM_OK;
}

static lm_status open_store(struct worker *w, struct lm_err *err)
{
    const struct config *c = w->cfg;
    if (!*c->adapters_url)
        return LM_OK;
    char *cache = config_cache_dir(c);
    struct store_config sc = {
        .engine = w->engine, .url = c->adapters_url, .cache_dir = cache,
        .ca_file = or_null(c->adapters_ca_file), .auth_header = or_null(c->adapters_auth_header),
        .max_adapter_bytes = (size_t)c->adapters_max_bytes,
        .concurrency = (int)c->adapters_concurrency,
        .max_attempts = (int)c->adapters_max_attempts,
        .negative_ttl_ms = (int)c->adapters_negative_ttl_ms,
    };
    lm_status st = store_new(&sc, &w->store, err);
    free(cache);
    return st;
}

/* Containers may share a host's name, and each has a process 1. Two of one name would fence each
 * other for ever, for it is in the transactional id: hence the random bits. */
void worker_set_name(struct worker *w)
{
    char host[128] = "worker";
    uint32_t random;
    if (*w->cfg->worker_name) {
        snprintf(w->name, sizeof w->name, "%s", w->cfg->worker_name);
        return;
    }
    gethostname(host, sizeof host - 1);
    if (getrandom(&random, sizeof random, 0) != sizeof random)
        random = (uint32_t)(lm_wall_ms() ^ lm_now_us());
    snprintf(w->name, sizeof w->name, "%s-%d-%08" PRIx32, host, (int)getpid(), random);
}

static void worker_init(struct worker *w, const struct config *cfg)
{
    *w = (struct worker){ .cfg = cfg };
    w->header_names = (struct header_names){ cfg->headers_correlation_id,
                                             cfg->headers_reply_topic,
                                             cfg->headers_reply_partition };
    w->reply_as = !strcmp(cfg->replies_encoding, "avro") ? REPLY_AS_AVRO :
                  !strcmp(cfg->replies_encoding, "json") ? REPLY_AS_JSON : REPLY_AS_PROMPT;
    worker_set_name(w);
    metrics_init(&w->metrics);
    job_queue_init(&w->to_intake);
    job_queue_init(&w->done);
    job_queue_init(&w->parts);
    w->credentials = credentials_new(cfg);
    atomic_store(&w->consumer_beat_us, lm_now_us());
    atomic_store(&w->outbox_beat_us, lm_now_us());
    atomic_store(&w->intake_beat_us, lm_now_us());
}

/* Without a journal the worker works, only less safely: said, and gone on. */
static void open_journal(struct worker *w)
{
    struct lm_err err;
    if (!w->cfg->poison_max_attempts)
        return;
    char *dir = config_journal_dir(w->cfg);
    if (!dir || journal_open(dir, w->cfg->group_id, &w->journal, &err))
        lm_log(LM_WARN, "worker", "no journal, so a prompt that kills the engine is tried for "
               "ever: %s", dir ? err.msg : "out of memory");
    else
        journal_watch_signals(w->journal);
    free(dir);
}

static lm_status open_control(struct worker *w, struct lm_err *err)
{
    if (!*w->cfg->topics_control)
        return LM_OK;
    if (!(w->cancels = cancels_new(w->cfg->control_retention_ms, w->cfg->control_skew_ms)))
        return lm_err_set(err, LM_NOMEM, "out of memory");
    lm_status st = control_new(w, &w->control, err);
    if (!st)
        control_wait(w->control);
    return st;
}

static lm_status start(struct worker *w, struct lm_err *err)
{
    lm_status st = w->credentials ? kafka_check_library(w->cfg, err)
                                  : lm_err_set(err, LM_NOMEM, "out of memory");
    /* The consumer's handle is made early, so that a bad property is known before a model loads;
     * it joins the group only in consumer_start(). */
    if (!st)
        st = consumer_new(w, &w->consumer, err);
    if (!st)
        st = producer_new(w, &w->producer, err);
    if (!st && *w->cfg->traces_otlp_url)
        st = spans_new(w, &w->spans, err);
    if (!st && w->cfg->http_port)
        st = http_new(w, &w->http, err);
    if (!st)
        st = open_engine(w, err);
    if (!st)
        st = open_codec(w, err);
    if (!st)
        st = open_store(w, err);
    if (!st && !strcmp(w->cfg->replies_too_large, "claim"))
        st = claims_new(w, &w->claims, err);
    if (!st)
        open_journal(w);
    if (!st)
        st = open_control(w, err);
    if (!st)
        st = outbox_new(w, &w->outbox, err);
    if (!st)
        st = intake_new(w, &w->intake, err);
    return st;
}

/* ---- end -------------------------------------------------------------------------------- */

static void log_summary(struct worker *w)
{
    struct metrics *m = &w->metrics;
    unsigned long long dead = 0;
    for (int i = 0; i < LM_STATUS_COUNT; i++)
        dead += atomic_load(&m->dead_letters[i]);
    lm_log(LM_INFO, "worker", "read %llu, completed %llu, expired %llu, cancelled %llu, "
           "dead-lettered %llu, handed back %llu", atomic_load(&m->consumed),
           atomic_load(&m->completed), atomic_load(&m->expired), atomic_load(&m->cancelled), dead,
           atomic_load(&m->dropped) + (unsigned long long)atomic_load(&m->held));
}

/* The order matters: a job may hold an adapter of the engine, and a delivery report a job. */
static void end_threads(struct worker *w, watchdog *dog, int status)
{
    control_stop(w->control);
    atomic_store(&w->ending, true);
    intake_free(w->intake);             /* asks the store to the last */
    http_free(w->http);                 /* its pages look at store, engine and metrics */
    store_free(w->store);
    outbox_free(w->outbox);
    claims_stop(w->claims);
    bool stopped = producer_stop(w->producer);
    consumer_count_rest(w->consumer);
    spans_stop(w->spans);
    log_summary(w);
    watchdog_releasing(dog, status, stopped ? WATCHDOG_RELEASE_MS : 0);
    if (!stopped)               /* its thread is inside librdkafka, with all that it holds */
        watchdog_await_end(dog);
    consumer_free(w->consumer);         /* drops the ledger's references */
    producer_free(w->producer);
    claims_free(w->claims);
    control_free(w->control);
    credentials_free(w->credentials);
    codec_free(w->codec);               /* whom its asker has told is in the first of these */
    job_queue_release(&w->to_intake);
    job_queue_release(&w->done);
    job_queue_release(&w->parts);
    cancels_free(w->cancels);
    spans_free(w->spans);
    watchdog_closing(dog);
    if (w->engine)
        engine_close(w->engine);
    watchdog_stop(dog);                 /* it would write to the journal */
    if (atomic_load(&w->failed) == LM_DEVICE)
        journal_abandon(w->journal, JOURNAL_DEVICE);
    else
        journal_close(w->journal);
    metrics_release(&w->metrics);
}

void worker_cancel(struct worker *w)
{
    int64_t now = lm_now_us();
    if (now < atomic_load(&w->drain_end_us))
        atomic_store(&w->drain_end_us, now);
    atomic_store(&w->cancelling, true);
}

/* Waits for a signal or a failure, then for the consumer to drain, commit and leave. */
static void supervise(struct worker *w, watchdog *dog, const sigset_t *signals)
{
    int got = -1;
    sigset_t all = *signals;
    sigaddset(&all, SIGHUP);
    while ((got < 0 || got == SIGHUP) && !atomic_load(&w->failed)) {
        watchdog_look(dog);
        credentials_look(w->credentials, got == SIGHUP);
        got = signals_wait(&all, SUPERVISE_MS);
    }
    bool failed = atomic_load(&w->failed);
    int64_t drain_ms = failed ? 0 : w->cfg->drain_timeout_ms;
    if (!failed)
        lm_log(LM_INFO, "worker", "%s: finishing what runs, for at most %" PRId64 " ms",
               strsignal(got), drain_ms);
    watchdog_draining(dog, drain_ms + (failed ? WATCHDOG_FAILED_MS : WATCHDOG_CLOSE_MS));
    atomic_store(&w->drain_end_us, lm_now_us() + drain_ms * 1000);
    atomic_store(&w->stopping, true);
    if (atomic_load(&w->failed))        /* by now; worker_fail() sees `stopping` from here on */
        worker_cancel(w);
    job_queue_wake(&w->to_intake);
    consumer_join(w->consumer);
}

/* From the first thread to the last. */
static lm_status live(struct worker *w, watchdog *dog, const sigset_t *signals)
{
    struct lm_err err = { LM_OK, "" };
    watchdog_starting(dog);
    lm_status st = start(w, &err);
    watchdog_stop(dog);
    if (!st)
        st = consumer_start(w->consumer, &err);
    if (st) {
        lm_log(LM_ERROR, "worker", "%s", err.msg);
    } else {
        atomic_store(&w->started, true);
        lm_log(LM_INFO, "worker", "reading %s as group %s", w->cfg->topics_prompts,
               w->cfg->group_id);
        supervise(w, dog, signals);
        st = (lm_status)atomic_load(&w->failed);
    }
    end_threads(w, dog, st ? 1 : 0);
    return st;
}

int worker_run(const struct config *cfg)
{
    struct worker w;
    sigset_t signals;                   /* which end it; supervise() waits for SIGHUP as well */
    signals_begin(&signals);
    worker_init(&w, cfg);
    log_setup(cfg->log_level, cfg->log_format, w.name);
    config_log(cfg);
    watchdog *dog = watchdog_new(&w, &signals);
    if (!dog) {
        lm_log(LM_ERROR, "worker", "out of memory");
        return 1;
    }
    lm_status st = live(&w, dog, &signals);
    watchdog_free(dog);
    return st ? 1 : 0;
}
