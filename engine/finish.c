/* SPDX-License-Identifier: Apache-2.0 */
/*
 * finish.c - what becomes of a step's results, and the ends of sequences and requests.
 *
 * Whatever ends a sequence passes finish_seq(): blocks, adapter and list place are given up there,
 * what is in flight of it becomes void, and the last of a request posts the one result and frees
 * the request. So callers that walk lists or rows must not touch a sequence, its request or its
 * siblings after ending one.
 *
 * Blocks of a sequence that ends while the device still computes for it are free at once: whoever
 * gets them writes behind that, on the same stream, or on another that waits for it.
 *
 * Threads: the engine thread.
 */
#include "engine/core_int.h"

#include <stdio.h>

/* ---- ends of sequences and requests ---------------------------------------------------- */

static void release_blocks(struct core *c, struct seq *s)
{
    for (int i = s->n_blocks - 1; i >= 0; i--)
        prefix_unref(&c->prefix, s->blocks[i]);
    s->n_blocks = s->n_hashed = s->n_computed = 0;
    s->prefix_tail = -1;
}

/* RUNNING to anything else: blocks, adapter and place in the list. */
void finish_leave_running(struct core *c, struct seq *s)
{
    if (s->resuming)            /* a failing device says so at the next call again */
        (void)swap_interrupt(&c->swap, s, c->stream);
    seq_list_remove(&c->running, s);
    release_blocks(c, s);
    if (s->req->adapter)
        residency_unuse(&c->tier, s->req->adapter);
}

void finish_enter_waiting(struct core *c, struct seq *s)
{
    s->state = SEQ_WAITING;
    queue_insert(&c->queue, s, core_now_us(c));
    evict_waiting(&c->evict, seq_version(s), 1);
}

void finish_leave_waiting(struct core *c, struct seq *s)
{
    queue_remove(&c->queue, s, core_now_us(c));
    evict_waiting(&c->evict, seq_version(s), -1);
}

static void post_stream(struct core *c, struct seq *s, bool final)
{
    const char *text;
    size_t len;
    if (!s->eager || !s->req->stream)
        return;
    output_stream_text(s, final, &text, &len);
    if (len > 0 && mailbox_post_text(c->mail, s, text, len) != LM_OK)
        s->text_sent -= len;    /* no memory: it comes with the next piece, or with the result */
}

/* Of a request whose sequences are all DONE; frees it. */
static void post_result(struct core *c, struct request *r)
{
    output_numbers(r, core_now_us(c));
    COUNT(c, finished, r->result->status == LM_OK);
    COUNT(c, failed, r->result->status != LM_OK);
    queue_leave(&c->queue, r);
    mailbox_post_request(c->mail, r);
}

/* The first failure is what the result tells. */
static void note_failure(struct request *r, lm_status st, const char *why)
{
    if (st == LM_OK || r->result->status != LM_OK)
        return;
    r->result->status = st;
    snprintf(r->result->error, sizeof r->result->error, "%s", why);
}

/* Tenants are charged for so many tokens at a time, so that few steps look for them. */
#define CHARGE_EVERY 8

void finish_seq(struct core *c, struct seq *s, enum engine_reason reason)
{
    struct request *r = s->req;
    if (s->state == SEQ_RUNNING)
        finish_leave_running(c, s);
    else if (s->state == SEQ_WAITING)
        finish_leave_waiting(c, s);
    step_void(c->step, s);
    swap_forget(&c->swap, s);
    queue_charge(&c->queue, r, (uint64_t)(seq_n_output(s) % CHARGE_EVERY) * TENANTS_OUTPUT_WEIGHT);
    if (reason == ENGINE_STOP || reason == ENGINE_LENGTH)
        estimate_output(&c->estimate, seq_n_output(s));
    s->state = SEQ_DONE;
    s->reason = reason;
    post_stream(c, s, true);
    if (--r->n_live == 0)
        post_result(c, r);
}

/* Ends what is left of a request before its time. */
void finish_request(struct core *c, struct request *r, enum engine_reason reason,
                    lm_status status, const char *why)
{
    int n = r->n_seqs;
    note_failure(r, status, why);
    for (int i = 0; i < n; i++) {
        struct seq *s = &r->seqs[i];
        if (s->state == SEQ_DONE)
            continue;
        bool last = r->n_live == 1;
        output_flush(s);
        finish_seq(c, s, reason);
        if (last)               /* the request is gone */
            return;
    }
}

/* ---- after a step ---------------------------------------------------------------------- */

/* Offers full blocks to the prefix cache, as far as their tokens are known. They may be on their
 * way still: whoever finds them reads behind the step that writes them. */
static void offer_blocks(struct core *c, struct seq *s)
{
    int bt = c->p.block_tokens, full = LM_MIN(s->n_computed, s->n_tokens) / bt;
    while (s->n_hashed < full) {
        int i = s->n_hashed++;
        s->blocks[i] = prefix_offer(&c->prefix, seq_version(s), s->prefix_tail,
                                    s->tokens + (size_t)i * (size_t)bt, s->blocks[i]);
        s->prefix_tail = s->blocks[i];
    }
}

void finish_launch(struct core *c, const struct plan *p)
{
    for (int i = 0; i < p->n_items; i++) {
        struct seq *s = p->item[i].seq;
        s->steps++;
        offer_blocks(c, s);
    }
    COUNT(c, step_seqs, p->n_items);
    COUNT(c, step_adapters, step_adapters(c->step));
}

static bool scoring_done(const struct seq *s)
{
    const struct request *r = s->req;
    return r->params.max_tokens == 0 && r->prompt_scores.n >= s->n_prompt - 1;
}

/* Its first token is there. True: too late to be of use. */
static bool began_late(struct core *c, struct request *r)
{
    if (r->first_token_us)
        return false;
    r->first_token_us = core_now_us(c);
    if (!r->first_token_by_ms)
        return false;
    for (int i = 0; i < r->n_seqs; i++)         /* choices that wait are no longer held to it */
        if (r->seqs[i].state == SEQ_WAITING)
            queue_redate(&c->queue, &r->seqs[i]);
    return core_wall_ms(c) > r->first_token_by_ms;
}

/* One row's outcome. True when the sequence ended; it may be freed then. */
static bool take_row(struct core *c, const struct step_row *row)
{
    struct seq *s = row->seq;
    struct request *r = s->req;
    bool done = false;
    lm_status st;
    s->pending -= !row->is_prompt;
    if (row->is_prompt) {
        st = output_push_prompt_score(r, &row->got);
        if (st == LM_OK && scoring_done(s)) {
            s->reason = ENGINE_LENGTH;
            done = true;
        }
    } else {
        st = output_push(s, &row->got, c->p.model, &done);
        if (seq_n_output(s) % CHARGE_EVERY == 0)
            queue_charge(&c->queue, r, CHARGE_EVERY * TENANTS_OUTPUT_WEIGHT);
        if (seq_n_output(s) == 1 && began_late(c, r) && st == LM_OK && !done) {
            /* Ended behind the walk over the rows, as it may have others. Until then this one
             * keeps it alive. */
            r->next = c->late;
            c->late = r;
            return true;
        }
        if (st == LM_OK && !done)
            post_stream(c, s, false);
    }
    if (st != LM_OK)
        note_failure(r, st, "no memory for the output");
    if (st != LM_OK || done)
        finish_seq(c, s, st == LM_OK ? s->reason : ENGINE_ERROR);
    return st != LM_OK || done;
}

/* Rows of one sequence stand together; once it has ended, what is left of them is void. */
void finish_step(struct core *c, const struct step_results *res)
{
    COUNT(c, prefill_tokens, res->n_prefill);
    COUNT(c, decode_tokens, res->n_decode);
    for (int i = 0; i < res->n_rows;) {
        struct seq *s = res->row[i].seq;
        if (i + STEP_AHEAD < res->n_rows)
            __builtin_prefetch(res->row[i + STEP_AHEAD].seq, 1);
        bool ended = !s;
        if (ended)
            i++;
        for (; s && i < res->n_rows && res->row[i].seq == s; i++)
            ended = ended || take_row(c, &res->row[i]);
        if (!ended && s->state == SEQ_RUNNING)
            offer_blocks(c, s);
    }
    while (c->late) {
        struct request *r = c->late;
        c->late = r->next;
        finish_request(c, r, ENGINE_EXPIRED, LM_OK, "");
    }
}
