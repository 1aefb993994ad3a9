/* SPDX-License-Identifier: Apache-2.0 */
/*
 * output.c - text, stop conditions and scores of running sequences.
 *
 * Text comes from the streaming decoder, which shows only what later tokens can't change. A stop
 * string is searched in what is new plus the last (longest stop - 1) bytes before it, so a string
 * that spans tokens is found, and each byte is looked at a bounded number of times. At a match the
 * text ends before the string (behind it with include_stop) and nothing after it is ever shown.
 *
 * When streaming, text that may be the beginning of a stop string is held back until it is clear.
 *
 * All this costs a step time only for those who need it: a sequence that is not streamed, has no
 * stop strings and no scores is not decoded until it has ended, on the thread that polls.
 *
 * An end-of-sequence or stop token counts as generated (it is in token_ids and in the count) but is
 * not part of the text, unless include_stop asks for it.
 */
#include "engine/output.h"

#include <string.h>

static bool in_list(const int32_t *ids, int n, int32_t id)
{
    for (int i = 0; i < n; i++)
        if (ids[i] == id)
            return true;
    return false;
}

/* ---- scores ---------------------------------------------------------------------------- */

static lm_status score_push(struct score_list *l, const struct sampled *t, size_t text_offset)
{
    lm_status st = score_list_reserve(l, l->n + 1);
    if (st != LM_OK)
        return st;
    size_t top = (size_t)l->n * (size_t)l->top_n, bytes = (size_t)l->top_n * 4;
    l->logprob[l->n] = t->logprob;
    l->text_offset[l->n] = text_offset;
    if (bytes) {
        memcpy(l->top_id + top, t->top_id, bytes);
        memcpy(l->top_logprob + top, t->top_logprob, bytes);
    }
    l->n++;
    return LM_OK;
}

lm_status output_push_prompt_score(struct request *r, const struct sampled *t)
{
    return score_push(&r->prompt_scores, t, 0);
}

/* ---- stop strings ---------------------------------------------------------------------- */

/* The earliest match of any stop string that ends behind `from`; false: none. */
static bool find_stop(const struct engine_params *p, const char *text, size_t from, size_t len,
                      size_t *begin, size_t *end)
{
    bool found = false;
    for (int i = 0; i < p->n_stop; i++) {
        size_t n = strlen(p->stop[i]);
        size_t start = from >= n ? from - n + 1 : 0;
        const char *hit = start < len ? memmem(text + start, len - start, p->stop[i], n) : NULL;
        if (hit && (!found || (size_t)(hit - text) < *begin)) {
            *begin = (size_t)(hit - text);
            *end = *begin + n;
            found = true;
        }
    }
    return found;
}

/* Longest end of the text that a stop string begins with: it may still become one. */
static size_t held_back(const struct engine_params *p, const char *text, size_t len)
{
    size_t most = 0;
    for (int i = 0; i < p->n_stop; i++) {
        size_t n = LM_MIN(strlen(p->stop[i]) - 1, len);
        for (; n > most; n--) {
            if (!memcmp(text + len - n, p->stop[i], n)) {
                most = n;
                break;
            }
        }
    }
    return most;
}

/* ---- tokens ---------------------------------------------------------------------------- */

/* Takes over what the decoder shows; true when a stop string ended the text. */
static bool take_text(struct seq *s, size_t total)
{
    const struct engine_params *p = &s->req->params;
    size_t before = s->text_len, begin = 0, end = 0;
    s->text_len = total - s->text_base;
    if (seq_n_output(s) < p->min_tokens ||
        !find_stop(p, s->text + s->text_base, before, s->text_len, &begin, &end))
        return false;
    s->text_len = p->include_stop ? end : begin;
    return true;
}

static lm_status push_text(struct seq *s, int32_t id, bool *stopped)
{
    size_t total;
    if (!s->dec)                /* no tokenizer: ids are all there is */
        return LM_OK;
    lm_status st = detok_push(s->dec, id, &s->text, &total, NULL);
    if (st == LM_OK)
        *stopped = take_text(s, total);
    return st;
}

static lm_status finish_text(struct seq *s, bool *stopped)
{
    size_t total;
    if (!s->dec)
        return LM_OK;
    lm_status st = detok_finish(s->dec, &s->text, &total, NULL);
    if (st == LM_OK)
        *stopped = take_text(s, total);
    return st;
}

void output_flush(struct seq *s)
{
    bool stopped;
    if (s->dec && seq_n_output(s) > 0)
        finish_text(s, &stopped);
}

lm_status output_decode(struct seq *s)
{
    bool stopped;
    int end = s->n_tokens;
    if (s->eager || seq_n_output(s) == 0)
        return LM_OK;
    if (s->reason == ENGINE_STOP && !s->req->params.include_stop)
        end--;                  /* without stop strings, a stop token ended it */
    lm_status st = seq_prime_decoder(s);
    for (int i = s->n_prompt; i < end && st == LM_OK; i++)
        st = push_text(s, s->tokens[i], &stopped);
    return st == LM_OK ? finish_text(s, &stopped) : st;
}

static bool is_stop_token(const struct seq *s, const struct model_config *m, int32_t id)
{
    if (s->has_stop_ids &&
        in_list(s->req->params.stop_token_ids, s->req->params.n_stop_token_ids, id))
        return true;
    return s->heeds_eos && in_list(m->eos_ids, m->n_eos, id);
}

lm_status output_push(struct seq *s, const struct sampled *t, const struct model_config *model,
                      bool *done)
{
    bool stopped = false, stop_token = is_stop_token(s, model, t->id);
    lm_status st = LM_OK;
    if (s->eager && s->sample.want_logprob)
        st = score_push(&s->out_scores, t, s->text_len);
    s->tokens[s->n_tokens++] = t->id;
    if (st == LM_OK && s->eager && (!stop_token || s->req->params.include_stop))
        st = push_text(s, t->id, &stopped);
    *done = stopped || stop_token || s->n_tokens == s->cap_tokens;
    s->reason = stopped || stop_token ? ENGINE_STOP : ENGINE_LENGTH;
    if (st == LM_OK && *done && s->eager && !stopped) {
        st = finish_text(s, &stopped);      /* half characters come out now; they may end a stop */
        if (stopped)
            s->reason = ENGINE_STOP;
    }
    return st;
}

void output_stream_text(struct seq *s, bool final, const char **text, size_t *len)
{
    const char *all = s->text + s->text_base;
    size_t upto = s->text_len;
    if (!final)
        upto -= held_back(&s->req->params, all, upto);
    *text = all + s->text_sent;
    *len = upto > s->text_sent ? upto - s->text_sent : 0;
    s->text_sent += *len;
}
