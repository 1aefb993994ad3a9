/* SPDX-License-Identifier: Apache-2.0 */
/*
 * request.h - a request and its sequences, from submit to result.
 *
 * A request is what the caller submitted; a sequence is one of its n choices and the unit that the
 * scheduler moves. Everything a sequence needs while it runs (tokens, block table, decoder) is
 * allocated before: the first choice's by request_new() on the caller's thread, those of further
 * ones when they are admitted, so that a queue full of large n holds each prompt once.
 *
 * Life of a sequence                                         who moves it
 *
 *      request_new                                           caller, engine_submit()
 *          |
 *          v            admit                                apply_plan()
 *      SEQ_WAITING ---------------> SEQ_RUNNING
 *          ^  |                      |     |
 *          |  |       preempt        |     |
 *          +--|----------------------+     |                 apply_plan()
 *             |                            |
 *             | cancel, deadline, error    | stop, length, cancel, deadline, error
 *             v                            v
 *          SEQ_DONE <----------------------+                 finish_seq()
 *
 *   WAITING  holds no blocks; n_computed = 0. `tokens` may be longer than the prompt: what was
 *            generated before a preemption is recomputed as if it were prompt, unless its KV was
 *            swapped to host memory (n_swapped).
 *   RUNNING  holds blocks for positions 0 .. n_blocks * block_tokens - 1; KV of the first
 *            n_computed positions is in them. n_computed < n_tokens - 1 means prefill.
 *            While a step is under way, n_computed counts its positions too (later steps run
 *            behind it), and `pending` its token, which is not in `tokens` yet.
 *   DONE     holds no blocks; text and tokens wait for the request's result.
 *
 * A request ends when its last sequence is DONE: exactly one result, built by result_build.c.
 *
 * Ownership: the mailbox hands a request to the engine thread, which hands it back when it has
 * ended; who polls puts the result together and frees it. Only the mailbox's list of cancelled ones
 * is shared meanwhile.
 */
#ifndef LORAMILL_ENGINE_REQUEST_H
#define LORAMILL_ENGINE_REQUEST_H

#include "engine/engine.h"
#include "engine/tokenizer.h"
#include "engine/tree.h"
#include "kernels/kernels.h"

enum seq_state { SEQ_WAITING, SEQ_RUNNING, SEQ_DONE };

/* Log-probabilities of scored tokens: entry i, alternatives at [i * top_n .. + top_n). */
struct score_list {
    int n, cap, top_n;
    float *logprob;
    int32_t *top_id;
    float *top_logprob;
    size_t *text_offset;        /* final text length before the token was pushed */
};

struct event_node;
struct tenant;

/* A sequence's places in the queue, while it waits (queue.h). */
struct seq_queued {
    struct tree_node turn, lane, age, deadline, due;
    int64_t since_us;           /* moved back by what it had waited before */
    int64_t waited_us;          /* in all, until it last left the queue */
    int64_t deadline_ms;        /* the one that binds, 0: none */
    int overtaken;              /* times that a later one was admitted before it */
    bool charged;               /* its prompt is in its tenant's counter */
};

/* What a step looks at comes first and together: 512 sequences are met in every one. */
struct seq {
    struct request *req;
    int32_t *tokens;            /* [cap_tokens] prompt, then output; NULL until seq_open() */
    int32_t *blocks;            /* [cap_blocks] */
    int n_prompt, n_tokens, cap_tokens;
    int n_computed;             /* positions whose KV is in the pool, or under way to it */
    int pending;                /* tokens that launched, unfinished steps will append */
    int n_blocks;
    int n_hashed;               /* leading full blocks already offered to the prefix cache */
    enum seq_state state;
    /* What the request asks of every step: */
    bool generates;             /* max_tokens > 0 */
    bool scores_prompt;         /* it is the choice that does */
    bool penalised;             /* some penalty is on, so the device wants its history */
    bool bans;                  /* min_tokens: ids may be banned */
    bool heeds_eos, has_stop_ids;
    bool eager;                 /* text is wanted token by token; else when it has ended */
    bool resuming;              /* RUNNING, but its KV is on the way back: not to be planned */

    bool flight_decode;         /* the last step's token was behind the prompt */
    int32_t prefix_tail;        /* prefix cache entry of block n_hashed - 1, or -1 */
    uint64_t flight;            /* number of the last step that it was part of, */
    int flight_item;            /* its item there, */
    int flight_row, flight_rows;        /* and its rows */
    int steps;
    struct engine_adapter *adapter;     /* the request's */
    struct kn_sample_row sample;        /* but for what changes from step to step */

    int index, cap_blocks;
    enum engine_reason reason;
    struct seq_queued queued;

    int n_swapped;              /* blocks of KV in host memory, 0: none; see swap.h */
    int32_t swap_slot;          /* the first of them */
    int swapped_tokens;         /* computed positions in them */
    struct seq *swap_prev, *swap_next;

    detok *dec;                 /* of the output; primed with the prompt's end. NULL: no text now */
    const char *text;           /* the decoder's final text, primer included; until its next push */
    size_t text_base;           /* bytes of the primer in it */
    size_t text_len;            /* final generated text behind it, cut at a stop string */
    size_t text_sent;           /* already in ENGINE_TOKENS events */
    struct event_node *unpolled;        /* an ENGINE_TOKENS event of ours; mailbox's lock */
    struct score_list out_scores;
};

struct request {
    struct request *next;       /* in the mailbox's inbox */
    struct request *cancel_next, **cancel_at;   /* cancelled: who is next and who points here, in
                                                 * the mailbox's list; its lock */
    engine_handle handle;
    char *id;
    void *user;
    struct engine_adapter *adapter;     /* our reference, or NULL */
    struct engine_params params;        /* stop strings and ids are our copies */
    struct token_ids prompt;
    char *prompt_text;          /* for echo; NULL: decode the ids */
    size_t prompt_text_len;
    int priority;
    bool stream;
    int64_t deadline_ms, first_token_by_ms;
    struct tenant *account;     /* from queue_join() to queue_leave() */
    struct tenant *spare_account;       /* ours, for the first of its name; NULL: nameless */
    uint64_t order;             /* arrival */

    const tokenizer *tok;       /* NULL: no text (a model of which only the shape is there) */
    struct seq *seqs;           /* [params.n] */
    int n_seqs, n_live;

    bool score_prompt;          /* echo with logprobs */
    struct score_list prompt_scores;    /* entry i is of prompt token i + 1 */

    int64_t submit_us, admit_us, adapter_wait_us, first_token_us;
    int cached_tokens, preemptions;
    /* Allocated at submit, so that ending can't fail. */
    struct event_node *finish;
    struct engine_result *result;
};

/* What request_new() needs to know of the engine. */
struct request_limits {
    int max_model_len;          /* at least the prompt's length */
    int block_tokens;
    int64_t now_us;             /* on the engine's clock */
};

/* Takes over `prompt` (cleared) and the fields of `r` by copy; a reference on r->adapter is taken.
 * `tok` may be NULL: no decoder, no text. Parameters must have been checked. */
lm_status request_new(const struct engine_request *r, const struct engine_params *params,
                      struct token_ids *prompt, const tokenizer *tok,
                      const struct request_limits *lim, struct request **out, struct lm_err *err);
void request_free(struct request *r);

/* Allocates what a sequence runs with; nothing if that was done. LM_NOMEM otherwise. */
lm_status seq_open(struct seq *s);
/* Makes its decoder, where there is a tokenizer. */
lm_status seq_prime_decoder(struct seq *s);

/* Its tokens so far, opened or not. */
static inline const int32_t *seq_tokens(const struct seq *s)
{
    return s->tokens ? s->tokens : s->req->prompt.id;
}

/* Its length once what was launched has finished: what the next step is planned on. */
static inline int seq_length(const struct seq *s)
{
    return s->n_tokens + s->pending;
}

/* The token under way is certainly its last: nothing is left to compute. */
static inline bool seq_is_ending(const struct seq *s)
{
    return s->pending > 0 && seq_length(s) >= s->cap_tokens;
}

/* The nearest moment that would make it useless, epoch milliseconds; 0: none. */
static inline int64_t request_deadline(const struct request *r)
{
    int64_t first = r->first_token_us ? 0 : r->first_token_by_ms;
    return r->deadline_ms && first ? LM_MIN(r->deadline_ms, first) : r->deadline_ms + first;
}

/* Positions that may be computed at most: all of a prompt that is only scored; of what generates,
 * the last token's KV is never read. */
static inline int seq_max_kv(const struct seq *s)
{
    return LM_MAX(s->cap_tokens - s->generates, 1);
}

static inline int seq_n_output(const struct seq *s)
{
    return s->n_tokens - s->n_prompt;
}

/* Makes room for one more entry. Grows by doubling, so appending is rarely an allocation. */
lm_status score_list_reserve(struct score_list *l, int n);

#endif
