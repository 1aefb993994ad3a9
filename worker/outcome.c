/* SPDX-License-Identifier: Apache-2.0 */
/*
 * outcome.c - the two ways a prompt can end, as records: a reply or a dead letter; and the records
 * that go with them: parts of a streamed reply, and the notice of a dead letter to its requester.
 *
 *   outcome_reply        j->result encoded; too large for the broker and claims are configured: to
 *                        the object store, and a reply that says where (claim.c)
 *   outcome_dead_letter  the record as it came, why in its headers; with errors.reply=true a notice
 *                        beside it, if somebody waits: the prompt had a correlation id or named a
 *                        reply topic. Both are sent together and make one outcome, the dead letter.
 *   outcome_part         new text of a prompt that asked for a stream
 *
 * A notice is a completion without choices and with `error`, in the prompt's encoding; the same is
 * in its headers loramill-error-code and -message, which Spring's replyErrorChecker can look at. It
 * never holds up the dead letter: what can't be encoded in Avro goes as JSON.
 *
 * Threads: whoever has the job.
 */
#include "worker/outcome.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "worker/codec/codec.h"
#include "worker/codec/json_tree.h"
#include "worker/dead_letter.h"
#include "worker/stream.h"

enum { LOG_DEAD_LETTERS = 10 };

/* ---- form and destination --------------------------------------------------------------- */

static enum encoding reply_encoding(const struct worker *w, enum encoding of_prompt)
{
    switch (w->reply_as) {
    case REPLY_AS_JSON:
        return ENCODING_JSON;
    case REPLY_AS_AVRO:
        return ENCODING_AVRO;
    default:
        return of_prompt;
    }
}

/* `to` lives as long as `o`. */
static void address(struct outgoing *o, const struct reply_route *to, const struct config *cfg)
{
    o->topic = to->asked ? to->topic : cfg->topics_replies;
    o->partition = to->partition;
    o->asked = to->asked;
    o->follows = to->follows;
}

/* ---- notices ---------------------------------------------------------------------------- */

/* Does anybody wait for a reply to this record? */
static bool has_requester(const struct worker *w, const struct job *j)
{
    const struct record *r = &j->record;
    const struct prompt *p = j->prompt;
    return header_find(r->headers, r->n_headers, w->header_names.correlation_id) ||
           header_find(r->headers, r->n_headers, "correlation-id") ||
           header_find(r->headers, r->n_headers, w->header_names.reply_topic) ||
           (p && (p->correlation_id || p->reply_topic));
}

/* The id of a prompt that was refused: whatever can be read of it. `root` keeps the string. */
static const char *refused_id(const struct job *j, json_t **root)
{
    *root = NULL;
    if (j->prompt)
        return j->prompt->id;
    if (j->record.value && json_parse_object(j->record.value, j->record.value_len, root, NULL))
        *root = NULL;
    const json_t *id = json_object_get(*root, "id");
    if (!json_is_string(id) || memchr(json_string_value(id), 0, json_string_length(id)))
        return "";              /* cut at U+0000 it could be another's */
    return json_string_value(id);
}

static lm_status encode_notice(struct worker *w, const struct job *j, const struct prompt *p,
                               const struct lm_err *why, struct outgoing *o, enum encoding enc,
                               struct lm_err *err)
{
    static const struct engine_result none = { 0 };
    struct completion done = { .prompt = p, .model = w->info.model_name, .worker = w->name,
                               .result = &none, .error = why };
    lm_status st = codec_encode_completion(w->codec, &done, enc, &o->value, &o->len, err);
    if (st && enc == ENCODING_AVRO)
        return encode_notice(w, j, p, why, o, ENCODING_JSON, err);
    o->value_owned = !st;
    if (st)
        return st;
    reply_headers(&o->headers, j->record.headers, j->record.n_headers, &w->header_names, p, enc);
    header_add_text(&o->headers, "loramill-error-code", lm_status_wire(why->code));
    header_add_text(&o->headers, "loramill-error-message", why->msg);
    return o->headers.failed ? lm_err_set(err, LM_NOMEM, "out of memory") : LM_OK;
}

/* Where a notice goes: by the same rules as the reply. The prompt may be refused because of its
 * route, so that is found again. */
static lm_status notice_route(struct worker *w, const struct job *j, struct reply_route *out)
{
    struct lm_err err;
    return reply_route(j->record.headers, j->record.n_headers, &w->header_names,
                       j->prompt ? j->prompt->reply_topic : NULL, w->cfg->topics_replies,
                       w->cfg->topics_replies_allowed, out, &err);
}

/* Best effort by design: the dead letter is the outcome. */
static void add_notice(struct worker *w, struct job *j, const struct lm_err *why)
{
    struct reply_route to = { .partition = -1 };
    struct lm_err err = { LM_NOMEM, "out of memory" };
    json_t *root;
    if (!w->cfg->errors_reply || !has_requester(w, j) || notice_route(w, j, &to))
        return;
    enum encoding enc = reply_encoding(w, codec_detect(j->record.value, j->record.value_len,
                                                       j->record.headers, j->record.n_headers));
    struct prompt unread = { .id = refused_id(j, &root) };
    struct outgoing *o = lm_calloc(1, sizeof *o);
    if (!o || encode_notice(w, j, j->prompt ? j->prompt : &unread, why, o, enc, &err)) {
        if (o)
            outgoing_release(o);
        free(o);
        o = NULL;
        log_seldom(&w->no_notice, "worker", "%s [%d] @%" PRId64 ": no error reply: %s",
                   j->lease->topic, (int)j->lease->partition, j->record.offset, err.msg);
    } else {
        j->route = to;
        address(o, &j->route, w->cfg);
    }
    json_decref(root);
    j->notice = o;
}

/* ---- dead letters ----------------------------------------------------------------------- */

/* A flood of bad prompts must not become a flood of lines: some a second, then their number. */
static void log_dead_letter(struct worker *w, const struct job *j, const struct lm_err *why)
{
    int64_t second = lm_now_us() / 1000000, before = atomic_exchange(&w->log_second, second);
    int shown = before == second ? atomic_fetch_add(&w->log_shown, 1) + 1
                                 : atomic_exchange(&w->log_shown, 1);
    if (before != second && shown > LOG_DEAD_LETTERS)
        lm_log(LM_INFO, "worker", "and %d more dead letters", shown - LOG_DEAD_LETTERS);
    bool show = before != second || shown <= LOG_DEAD_LETTERS;
    lm_log(show ? LM_INFO : LM_DEBUG, "worker", "%s [%d] @%" PRId64 " to %s: %s: %s",
           j->lease->topic, (int)j->lease->partition, j->record.offset, j->out.topic,
           lm_status_wire(why->code), why->msg);
}

void outcome_dead_letter(struct worker *w, struct job *j, const struct lm_err *why,
                         const char *stage)
{
    const struct lm_err cause = *why;   /* may be the job's own */
    const struct dead_letter_from from = { w->name, w->cfg->group_id, stage };
    job_clear_out(j);
    job_fail(j, &cause);
    job_set_stage(j, JOB_ANSWERING);
    j->out.topic = w->cfg->topics_dead_letters;
    j->out.value = (void *)(uintptr_t)j->record.value;
    j->out.len = j->record.value_len;
    j->outcome = OUTCOME_DEAD_LETTER;
    if (dead_letter_headers(&j->out.headers, &j->record, j->lease->topic, j->lease->partition,
                            &cause, &from)) {
        worker_fail(w, LM_NOMEM, "out of memory for a dead letter");
        worker_end_job(w, j, OUTCOME_DROPPED);
        return;
    }
    add_notice(w, j, &cause);
    worker_generated(w, j);
    log_dead_letter(w, j, &cause);
    producer_send(w->producer, j);
}

bool outcome_trim(struct worker *w, struct job *j)
{
    struct lm_err why = { LM_INTERNAL, "unknown" };
    job_failure(j, &why);
    int trim = j->out.trim + 1;
    if (trim > DEAD_LETTER_BARE)
        return false;
    outgoing_release(&j->out);          /* the notice stays */
    j->out.topic = w->cfg->topics_dead_letters;
    j->out.trim = trim;
    if (trim < DEAD_LETTER_BARE) {
        j->out.value = (void *)(uintptr_t)j->record.value;
        j->out.len = j->record.value_len;
    }
    log_seldom(&w->trimmed, "worker", "%s [%d] @%" PRId64 ": its dead letter is too large for %s: "
               "sent %s", j->lease->topic, (int)j->lease->partition, j->record.offset, j->out.topic,
               trim < DEAD_LETTER_BARE ? "with fewer headers of ours" : "without its value");
    if (dead_letter_trimmed(&j->out.headers, &j->record, j->lease->topic, j->lease->partition, &why,
                            (enum dead_letter_trim)trim)) {
        worker_fail(w, LM_NOMEM, "out of memory for a dead letter");
        worker_end_job(w, j, OUTCOME_DROPPED);
        return true;
    }
    producer_send(w->producer, j);
    return true;
}

/* ---- replies ------------------------------------------------------------------------------ */

/* What every record of a reply says about its prompt. */
static struct completion describe(const struct worker *w, const struct job *j)
{
    return (struct completion){
        .prompt = j->prompt, .model = w->info.model_name, .worker = w->name, .result = j->result,
        .adapter_digest = j->adapter ? engine_adapter_digest(j->adapter) : NULL,
        .fetch_us = j->fetch_us, .received_to_submit_us = j->submitted_us - j->received_us,
    };
}

/* On LM_TOO_LARGE the value is there all the same. */
static lm_status encode_reply(struct worker *w, struct job *j, enum encoding enc,
                              const struct completion_claim *claim, struct lm_err *err)
{
    struct completion done = describe(w, j);
    done.claim = claim;
    struct completion_stream final = { .final = true };
    if (j->stream) {
        final.generation = j->stream->generation;
        final.seq = j->stream->seq;
        done.stream = &final;
    }
    lm_status st = codec_encode_completion(w->codec, &done, enc, &j->out.value, &j->out.len, err);
    j->out.value_owned = !st;
    if (!st && j->out.len > (size_t)w->cfg->message_max_bytes)
        st = lm_err_set(err, LM_TOO_LARGE, "the reply has %zu bytes, message.max_bytes=%" PRId64,
                        j->out.len, w->cfg->message_max_bytes);
    return st;
}

void outcome_count(struct worker *w, const struct reply_tally *t)
{
    struct metrics *m = &w->metrics;
    metric_move(t->reason == ENGINE_EXPIRED ? &m->expired :
                t->reason == ENGINE_CANCELLED ? &m->cancelled : &m->completed, 1);
    metric_move(&m->prompt_tokens, (uint64_t)t->prompt_tokens);
    metric_move(&m->cached_tokens, (uint64_t)t->cached_tokens);
    metric_move(&m->completion_tokens, (uint64_t)t->completion_tokens);
}

static void tally(struct job *j)
{
    const struct engine_result *r = j->result;
    j->tally = (struct reply_tally){
        .reason = r->n_choices ? r->choices[0].reason : ENGINE_STOP,
        .chat = j->prompt->n_messages > 0,
        .prompt_tokens = r->prompt_tokens, .cached_tokens = r->cached_tokens,
        .completion_tokens = r->completion_tokens,
    };
}

/* A reply may wait for its broker for long, among thousands. What it was made of is let go, unless
 * it may be needed again: for a claim, for a notice, or to be found by an order to cancel. */
static void forget_sources(const struct worker *w, struct job *j)
{
    if (w->claims || w->cancels || w->cfg->errors_reply)
        return;
    engine_result_free(j->result);
    prompt_free(j->prompt);
    j->result = NULL;
    j->prompt = NULL;
}

/* Fills all of j->out but the value. */
static lm_status address_reply(struct worker *w, struct job *j, enum encoding enc)
{
    reply_headers(&j->out.headers, j->record.headers, j->record.n_headers, &w->header_names,
                  j->prompt, enc);
    if (j->out.headers.failed) {
        job_clear_out(j);
        return LM_NOMEM;
    }
    address(&j->out, &j->route, w->cfg);
    j->outcome = OUTCOME_REPLY;
    job_set_stage(j, JOB_ANSWERING);
    return LM_OK;
}

lm_status outcome_reply(struct worker *w, struct job *j)
{
    struct lm_err err;
    enum encoding enc = reply_encoding(w, j->prompt->encoding);
    job_clear_out(j);
    lm_status st = encode_reply(w, j, enc, NULL, &err);
    bool claim = w->claims && (st == LM_TOO_LARGE ||
                               (!st && j->out.len > (size_t)w->cfg->claim_above));
    if (st && lm_status_disposition(st) == LM_DO_RETRY)
        return st;
    if (st && !claim) {
        outcome_dead_letter(w, j, &err, "ENCODE");
        return LM_OK;
    }
    if ((st = address_reply(w, j, enc)))
        return st;
    worker_generated(w, j);
    tally(j);
    if (claim) {
        claims_put(w->claims, j);
        return LM_OK;
    }
    forget_sources(w, j);
    producer_send(w->producer, j);
    return LM_OK;
}

/* Headers and destination stay those of the whole reply. */
lm_status outcome_claimed(struct worker *w, struct job *j, const struct completion_claim *claim)
{
    struct lm_err err;
    struct outgoing *o = &j->out;
    void *whole = o->value;             /* kept until its successor is there */
    size_t len = o->len;
    lm_status st = encode_reply(w, j, reply_encoding(w, j->prompt->encoding), claim, &err);
    if (st && lm_status_disposition(st) == LM_DO_RETRY) {
        o->value = whole;
        o->len = len;
        o->value_owned = true;
        return st;
    }
    free(whole);
    j->claimed = true;
    if (st) {
        outcome_dead_letter(w, j, &err, "ENCODE");
        return LM_OK;
    }
    o->attempts = 0;
    worker_generated(w, j);
    producer_send(w->producer, j);
    return LM_OK;
}

/* ---- parts of a streamed reply ------------------------------------------------------------ */

lm_status outcome_part(struct worker *w, struct job *j, const struct engine_result *text)
{
    struct lm_err err;
    enum encoding enc = reply_encoding(w, j->prompt->encoding);
    struct completion done = describe(w, j);
    struct completion_stream part = { j->stream->generation, j->stream->seq, false };
    done.stream = &part;
    done.result = text;
    struct job *child = job_child(j);
    if (!child)
        return LM_NOMEM;
    struct outgoing *o = &child->out;
    lm_status st = codec_encode_completion(w->codec, &done, enc, &o->value, &o->len, &err);
    o->value_owned = !st;
    if (!st) {
        reply_headers(&o->headers, j->record.headers, j->record.n_headers, &w->header_names,
                      j->prompt, enc);
        header_add_decimal(&o->headers, "loramill-part", part.seq);
        st = o->headers.failed ? LM_NOMEM : LM_OK;
    }
    if (st) {
        job_unref(child);
        return st;
    }
    address(o, &child->route, w->cfg);
    metric_add(&w->metrics.stream_parts, 1);
    producer_send(w->producer, child);
    return LM_OK;
}

/* ---- completions without the engine -------------------------------------------------------- */

struct engine_result *outcome_empty_result(enum engine_reason reason)
{
    struct engine_result *r = engine_result_new(1);
    char *text = lm_strdup("");
    if (!r || !text) {
        engine_result_free(r);
        free(text);
        return NULL;
    }
    r->choices[0] = (struct engine_choice){ .text = text, .reason = reason };
    r->n_choices = 1;
    return r;
}
