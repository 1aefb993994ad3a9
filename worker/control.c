/* SPDX-License-Identifier: Apache-2.0 */
/*
 * control.c - the thread that reads topics.control: orders to cancel a request, wherever it is.
 *
 * An order is a JSON record {"cancel": "<id of the prompt>"}. Any worker may hold the prompt, and
 * nobody knows which, so every worker reads all partitions of the topic: with a consumer that joins
 * no group and commits nothing, from the records of the last control.retention_ms on. What has not
 * come out of the prompt topic yet is thus cancelled too, by whoever reads it later. cancels.h says
 * how an order and its prompt find each other.
 *
 * A worker waits with its first prompt until it has read the orders that were there at its start,
 * for at most START_WAIT_MS; a topic that is missing or a broker that is away does not stop it.
 *
 * A record that is no order is logged and skipped: it came from no prompt, so it has no dead
 * letter. So is an order for an id that no prompt can have: ids are remembered by the thousand.
 */
#include "worker/worker.h"

#include <jansson.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "worker/cancels.h"
#include "worker/codec/json_prompt.h"
#include "worker/kafka_conf.h"
#include "worker/log.h"

enum { POLL_MS = 100, ASK_MS = 5000, RETRY_US = 2000000, LOOK_AGAIN_US = 60000000,
       START_WAIT_MS = 10000, UNTIMED = 1000 };

struct control {
    struct worker *w;
    rd_kafka_t *rk;
    pthread_t thread;
    atomic_bool end, caught_up;
    int n_parts;
    bool *ended;                /* [n_parts], whose end was reached once */
    int64_t look_us;            /* when to look for the topic's partitions */
    struct log_seldom ignored, later;   /* anyone may write to the topic */
    struct log_seldom unread;
};

/* ---- orders ----------------------------------------------------------------------------- */

static void cancel_running(void *ctx, uint64_t handle)
{
    struct worker *w = ctx;
    engine_cancel(w->engine, handle);
}

static void obey(control *c, const char *id, int64_t when_ms)
{
    struct worker *w = c->w;
    int64_t now = lm_wall_ms();
    struct cancels_met met = cancels_order(w->cancels, id, when_ms > 0 ? when_ms : now, now,
                                           cancel_running, w);
    metric_add(&w->metrics.cancel_orders, 1);
    if (met.later)
        log_seldom(&c->later, "control", "cancel '%s': not the prompt that is here, which is "
                   "stamped more than control.skew_ms (%" PRId64 ") later than the order", id,
                   w->cfg->control_skew_ms);
    if (!met.marked)
        return;
    lm_log(LM_DEBUG, "control", "cancel '%s': %d here", id, met.marked);
    atomic_store(&w->sweep_intake, true);
    job_queue_wake(&w->to_intake);
}

/* Of an earlier time than the worker is to remember; see assign(). */
static bool too_old(const control *c, const rd_kafka_message_t *m)
{
    int64_t when = rd_kafka_message_timestamp(m, NULL);
    return !atomic_load(&c->caught_up) && when > 0 &&
           when < lm_wall_ms() - c->w->cfg->control_retention_ms;
}

static void take_order(control *c, const rd_kafka_message_t *m)
{
    if (too_old(c, m))
        return;
    json_t *root = m->payload ? json_loadb(m->payload, m->len, 0, NULL) : NULL;
    const char *id = json_string_value(json_object_get(root, "cancel"));
    if (id && *id && strlen(id) <= PROMPT_MAX_ID && json_object_size(root) == 1)
        obey(c, id, rd_kafka_message_timestamp(m, NULL));
    else
        log_seldom(&c->ignored, "control", "%s [%d] @%" PRId64 " is no {\"cancel\": \"id\"}: "
                   "ignored", rd_kafka_topic_name(m->rkt), (int)m->partition, m->offset);
    json_decref(root);
}

/* ---- the topic -------------------------------------------------------------------------- */

static int count_partitions(control *c, const char *topic)
{
    const struct rd_kafka_metadata *md = NULL;
    rd_kafka_topic_t *rkt = rd_kafka_topic_new(c->rk, topic, NULL);
    int n = 0;
    if (rkt && !rd_kafka_metadata(c->rk, 0, rkt, &md, ASK_MS)) {
        n = md->topic_cnt == 1 && !md->topics[0].err ? md->topics[0].partition_cnt : 0;
        rd_kafka_metadata_destroy(md);
    }
    if (rkt)
        rd_kafka_topic_destroy(rkt);
    return n;
}

/* Reads all partitions from the retention on. A topic that has grown is read again: an order twice
 * is an order. "The end" is what a broker says that has nothing so young, and also one that can't
 * look for times, as the embedded one of `loramill dev`: the last few are read then, and those that
 * are too old passed over. */
static bool assign(control *c, const char *topic, int n)
{
    int64_t since = LM_MAX(lm_wall_ms() - c->w->cfg->control_retention_ms, 0);
    rd_kafka_topic_partition_list_t *l = rd_kafka_topic_partition_list_new(n);
    for (int i = 0; i < n; i++)
        rd_kafka_topic_partition_list_add(l, topic, i)->offset = since;
    rd_kafka_resp_err_t e = rd_kafka_offsets_for_times(c->rk, l, ASK_MS);
    for (int i = 0; !e && i < l->cnt; i++) {
        e = l->elems[i].err;
        if (l->elems[i].offset == RD_KAFKA_OFFSET_END)
            l->elems[i].offset = RD_KAFKA_OFFSET_TAIL(UNTIMED);
    }
    if (!e)
        e = rd_kafka_assign(c->rk, l);
    rd_kafka_topic_partition_list_destroy(l);
    if (e)
        lm_log(LM_WARN, "control", "topics.control=%s: %s", topic, rd_kafka_err2str(e));
    return !e;
}

static void look(control *c, int64_t now)
{
    const char *topic = c->w->cfg->topics_control;
    int n = count_partitions(c, topic);
    c->look_us = now + (n ? LOOK_AGAIN_US : RETRY_US);
    if (!n && !c->n_parts)
        lm_log(LM_WARN, "control", "topics.control=%s: no such topic yet, or no broker", topic);
    if (n <= c->n_parts)
        return;
    bool *ended = lm_calloc((size_t)n, sizeof *ended);
    if (ended && assign(c, topic, n)) {
        free(c->ended);
        c->ended = ended;
        c->n_parts = n;
    } else {
        free(ended);
        c->look_us = now + RETRY_US;
    }
}

/* One that has got an order meanwhile says so again. */
static void note_end(control *c, int32_t partition)
{
    int ended = 0;
    if (partition >= 0 && partition < c->n_parts)
        c->ended[partition] = true;
    for (int i = 0; i < c->n_parts; i++)
        ended += c->ended[i];
    if (ended == c->n_parts)
        atomic_store(&c->caught_up, true);
}

static void take(control *c, const rd_kafka_message_t *m)
{
    if (!m->err)
        take_order(c, m);
    else if (m->err == RD_KAFKA_RESP_ERR__PARTITION_EOF)
        note_end(c, m->partition);
    else                        /* of the topic; a broker that is away is on_error()'s */
        log_seldom(&c->unread, "control", "topics.control=%s: %s: its orders are not obeyed "
                   "meanwhile", c->w->cfg->topics_control, rd_kafka_message_errstr(m));
}

static void *control_main(void *arg)
{
    control *c = arg;
    while (!atomic_load(&c->end)) {
        int64_t now = lm_now_us();
        if (now >= c->look_us)
            look(c, now);
        rd_kafka_message_t *m = rd_kafka_consumer_poll(c->rk, POLL_MS);
        if (m) {
            take(c, m);
            rd_kafka_message_destroy(m);
        }
    }
    return NULL;
}

/* ---- life ------------------------------------------------------------------------------- */

static void on_error(rd_kafka_t *rk, int err, const char *reason, void *opaque)
{
    (void)rk;
    control *c = opaque;
    credentials_error(c->w->credentials, err);
    lm_log(LM_DEBUG, "control", "%s: %s", rd_kafka_err2name((rd_kafka_resp_err_t)err), reason);
}

static lm_status open_consumer(control *c, struct lm_err *err)
{
    rd_kafka_conf_t *conf;
    lm_status st = kafka_conf_new(c->w->cfg, CONFIG_CONSUMER, c->w->name, &conf, err);
    if (st)
        return st;
    rd_kafka_conf_set(conf, "enable.partition.eof", "true", NULL, 0);
    rd_kafka_conf_set(conf, "auto.offset.reset", "earliest", NULL, 0);
    rd_kafka_conf_set_opaque(conf, c);
    rd_kafka_conf_set_error_cb(conf, on_error);
    st = kafka_open(RD_KAFKA_CONSUMER, conf, &c->rk, err);
    if (!st) {
        credentials_attach(c->w->credentials, c->rk, CONFIG_CONSUMER);
        rd_kafka_poll_set_consumer(c->rk);
    }
    return st;
}

lm_status control_new(struct worker *w, control **out, struct lm_err *err)
{
    control *c = lm_calloc(1, sizeof *c);
    if (!c)
        return lm_err_set(err, LM_NOMEM, "out of memory");
    c->w = w;
    lm_status st = open_consumer(c, err);
    if (!st && pthread_create(&c->thread, NULL, control_main, c)) {
        credentials_detach(w->credentials, c->rk);
        rd_kafka_destroy(c->rk);
        st = lm_err_set(err, LM_NOMEM, "can't start the control thread");
    }
    if (st) {
        free(c);
        return st;
    }
    *out = c;
    return LM_OK;
}

void control_wait(control *c)
{
    int64_t end = lm_now_us() + (int64_t)START_WAIT_MS * 1000;
    const struct timespec tick = { 0, 20 * 1000000 };
    while (!atomic_load(&c->caught_up) && lm_now_us() < end)
        nanosleep(&tick, NULL);
}

void control_stop(control *c)
{
    if (!c || atomic_exchange(&c->end, true))
        return;
    pthread_join(c->thread, NULL);
}

void control_free(control *c)
{
    if (!c)
        return;
    control_stop(c);
    credentials_detach(c->w->credentials, c->rk);
    rd_kafka_destroy_flags(c->rk, RD_KAFKA_DESTROY_F_NO_CONSUMER_CLOSE);
    free(c->ended);
    free(c);
}
