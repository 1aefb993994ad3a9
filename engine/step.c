/* SPDX-License-Identifier: Apache-2.0 */
/*
 * step.c - lays a step out.
 *
 * Order of tokens: base-only sequences first, then adapter after adapter, so that each adapter's
 * tokens are one segment, whatever mix of prefill and decode they are. Grouping is a counting sort
 * over the adapters met in this step: its cost depends on the batch, not on how many adapters are
 * known.
 *
 * Rows (positions whose logits are wanted): the last known token of a sequence, unless nothing is
 * to be generated; and for a scored prompt every position but the last, each with the next prompt
 * token forced. Everything else of a prompt never reaches the head.
 *
 * Results are laid out structure by structure behind each other, so that copying back n rows is two
 * copies, four if alternatives were asked for.
 */
#include "engine/step.h"

#include <stdlib.h>
#include <string.h>

#define ALIGN 64

/* One array of the metadata buffer: its place is the same on host and device. */
struct span {
    size_t at;
};

struct layout {
    struct span ids, pos, slot, dyn_len, q_start, kv_len, table, segs, lora_blocks, row_idx, rows,
        history;
    size_t bytes;
};

struct group {
    const struct engine_adapter *adapter;       /* NULL: base */
    int n_items, n_tok, first_item;
};

struct step {
    struct step_params p;
    uint64_t number;
    /* pinned and device twins */
    char *host, *device;
    size_t cap;

    struct plan_item *order;    /* [max_seqs] items, grouped */
    struct group *group;        /* [max_seqs + 1]; group 0 is base */
    int *item_group;            /* [max_seqs] */
    int n_groups;
    struct step_row *row;       /* [max_tokens] */
    int n_rows;
    bool want_tops;
    int64_t layout_us;

    /* pinned results */
    int32_t *id, *top_id;
    float *logprob, *top_logprob;
};

/* ---- making ---------------------------------------------------------------------------- */

static lm_status grow_meta(struct step *s, size_t bytes, struct lm_err *err)
{
    if (bytes <= s->cap)
        return LM_OK;
    size_t cap = LM_MAX(bytes, s->cap * 2);
    void *host = NULL, *device = NULL;
    lm_status st = kn_host_alloc(s->p.dev, cap, &host, err);
    if (st == LM_OK)
        st = kn_alloc(s->p.dev, cap, &device, err);
    if (st != LM_OK) {
        kn_host_free(s->p.dev, host);
        return lm_err_prefix(err, "step metadata of %zu bytes", cap);
    }
    kn_host_free(s->p.dev, s->host);
    kn_free(s->p.dev, s->device);
    s->host = host;
    s->device = device;
    s->cap = cap;
    return LM_OK;
}

static lm_status alloc_results(struct step *s, struct lm_err *err)
{
    size_t n = (size_t)s->p.max_tokens, top = n * KN_MAX_TOP_LOGPROBS;
    void *id = NULL, *logprob = NULL, *top_id = NULL, *top_logprob = NULL;
    lm_status st = kn_host_alloc(s->p.dev, n * sizeof *s->id, &id, err);
    if (st == LM_OK)
        st = kn_host_alloc(s->p.dev, n * sizeof *s->logprob, &logprob, err);
    if (st == LM_OK)
        st = kn_host_alloc(s->p.dev, top * sizeof *s->top_id, &top_id, err);
    if (st == LM_OK)
        st = kn_host_alloc(s->p.dev, top * sizeof *s->top_logprob, &top_logprob, err);
    s->id = id;
    s->logprob = logprob;
    s->top_id = top_id;
    s->top_logprob = top_logprob;
    return st;
}

lm_status step_new(const struct step_params *p, struct step **out, struct lm_err *err)
{
    struct step *s = lm_calloc(1, sizeof *s);
    if (!s)
        return lm_err_set(err, LM_NOMEM, "no memory for the step");
    size_t seqs = (size_t)p->max_seqs, tokens = (size_t)p->max_tokens;
    s->p = *p;
    s->order = lm_calloc(seqs, sizeof *s->order);
    s->group = lm_calloc(seqs + 1, sizeof *s->group);
    s->item_group = lm_calloc(seqs, sizeof *s->item_group);
    s->row = lm_calloc(tokens, sizeof *s->row);
    lm_status st = s->order && s->group && s->item_group && s->row
                       ? LM_OK : lm_err_set(err, LM_NOMEM, "no memory for the step");
    /* Enough for full steps of moderate block tables; history and long tables may grow it. */
    if (st == LM_OK)
        st = grow_meta(s, tokens * 160 + seqs * 1024 + 65536, err);
    if (st == LM_OK)
        st = alloc_results(s, err);
    if (st != LM_OK) {
        step_free(s);
        return st;
    }
    *out = s;
    return LM_OK;
}

void step_free(struct step *s)
{
    if (!s)
        return;
    void *const pinned[] = { s->host, s->id, s->logprob, s->top_id, s->top_logprob };
    for (size_t i = 0; i < LM_COUNT(pinned); i++)
        kn_host_free(s->p.dev, pinned[i]);
    kn_free(s->p.dev, s->device);
    free(s->order);
    free(s->group);
    free(s->item_group);
    free(s->row);
    free(s);
}

/* ---- grouping by adapter --------------------------------------------------------------- */

static int group_of(struct step *s, struct engine_adapter *a)
{
    if (!a)
        return 0;
    if (a->res.seen_step != s->number) {
        a->res.seen_step = s->number;
        a->res.group = s->n_groups;
        s->group[s->n_groups++] = (struct group){ .adapter = a };
    }
    return a->res.group;
}

static void group_items(struct step *s, const struct plan_item *item, int n)
{
    s->number++;
    s->n_groups = 1;
    s->group[0] = (struct group){ 0 };
    for (int i = 0; i < n; i++) {
        int g = group_of(s, item[i].seq->req->adapter);
        s->item_group[i] = g;
        s->group[g].n_items++;
        s->group[g].n_tok += item[i].n_tok;
    }
    for (int g = 1; g < s->n_groups; g++)
        s->group[g].first_item = s->group[g - 1].first_item + s->group[g - 1].n_items;
    for (int i = 0; i < n; i++)
        s->order[s->group[s->item_group[i]].first_item++] = item[i];
}

/* ---- layout ---------------------------------------------------------------------------- */

/* What a step needs, counted before anything is placed. */
struct sizes {
    int n_tok, n_seqs, n_rows, n_segs, n_lora_blocks, table_ld, max_q, max_kv;
    size_t n_history;
};

static bool scores_prompt(const struct seq *s)
{
    return s->req->score_prompt && s->index == 0;
}

/* Prompt positions of this item that are scored: [first, end). Position p scores token p + 1. */
static void scored_range(const struct plan_item *it, int *first, int *end)
{
    const struct seq *s = it->seq;
    int from = s->n_computed, to = from + it->n_tok;
    *first = *end = 0;
    if (!scores_prompt(s))
        return;
    *first = LM_MAX(from, s->req->prompt_scores.n);
    *end = LM_MAX(*first, LM_MIN(to, s->n_prompt - 1));
}

static bool generates(const struct plan_item *it)
{
    const struct seq *s = it->seq;
    return s->n_computed + it->n_tok == s->n_tokens && s->req->params.max_tokens > 0;
}

static bool has_penalties(const struct engine_params *p)
{
    return p->repetition_penalty != 1 || p->presence_penalty != 0 || p->frequency_penalty != 0;
}

static int n_banned(const struct step *s, const struct seq *q)
{
    const struct engine_params *p = &q->req->params;
    if (seq_n_output(q) >= p->min_tokens)
        return 0;
    return p->n_stop_token_ids + s->p.model->n_eos;
}

static struct sizes measure(const struct step *s, int n_items)
{
    struct sizes z = { .n_seqs = n_items, .n_segs = s->n_groups - 1 };
    for (int i = 0; i < n_items; i++) {
        const struct plan_item *it = &s->order[i];
        const struct seq *q = it->seq;
        int first, end, kv = q->n_computed + it->n_tok;
        scored_range(it, &first, &end);
        z.n_tok += it->n_tok;
        z.n_rows += end - first + generates(it);
        z.max_q = LM_MAX(z.max_q, it->n_tok);
        z.max_kv = LM_MAX(z.max_kv, kv);
        if (generates(it)) {
            z.n_history += (size_t)n_banned(s, q);
            z.n_history += has_penalties(&q->req->params) ? (size_t)q->n_tokens : 0;
        }
    }
    z.table_ld = blocks_for(z.max_kv, s->p.block_tokens);
    for (int g = 1; g < s->n_groups; g++)
        z.n_lora_blocks += s->group[g].adapter->n_blocks;
    return z;
}

static struct span place(struct layout *l, size_t n, size_t size)
{
    struct span at = { l->bytes };
    l->bytes += LM_DIV_UP(n * size, ALIGN) * ALIGN;
    return at;
}

static struct layout lay_out(const struct sizes *z, bool dynamic)
{
    struct layout l = { 0 };
    size_t tok = (size_t)z->n_tok, seqs = (size_t)z->n_seqs, rows = (size_t)z->n_rows;
    l.ids = place(&l, tok, sizeof(int32_t));
    l.pos = place(&l, tok, sizeof(int32_t));
    l.slot = place(&l, tok, sizeof(int64_t));
    l.dyn_len = place(&l, dynamic ? tok : 0, sizeof(int32_t));
    l.q_start = place(&l, seqs + 1, sizeof(int32_t));
    l.kv_len = place(&l, seqs, sizeof(int32_t));
    l.table = place(&l, seqs * (size_t)z->table_ld, sizeof(int32_t));
    l.segs = place(&l, (size_t)z->n_segs, sizeof(struct kn_lora_seg));
    l.lora_blocks = place(&l, (size_t)z->n_lora_blocks, sizeof(int32_t));
    l.row_idx = place(&l, rows, sizeof(int32_t));
    l.rows = place(&l, rows, sizeof(struct kn_sample_row));
    l.history = place(&l, z->n_history, sizeof(int32_t));
    return l;
}

/* ---- filling --------------------------------------------------------------------------- */

static void *on_host(const struct step *s, struct span at)
{
    return s->host + at.at;
}

static void *on_device(const struct step *s, struct span at)
{
    return s->device + at.at;
}

static void fill_tokens(const struct step *s, const struct layout *l, bool dynamic, int n_items)
{
    int32_t *ids = on_host(s, l->ids), *pos = on_host(s, l->pos);
    int32_t *dyn = on_host(s, l->dyn_len);
    int64_t *slot = on_host(s, l->slot);
    int t = 0, bt = s->p.block_tokens;
    for (int i = 0; i < n_items; i++) {
        const struct seq *q = s->order[i].seq;
        for (int k = 0; k < s->order[i].n_tok; k++, t++) {
            int p = q->n_computed + k;
            ids[t] = q->tokens[p];
            pos[t] = p;
            slot[t] = (int64_t)q->blocks[p / bt] * bt + p % bt;
            if (dynamic)        /* a prompt is one forward for the reference, whatever our chunks */
                dyn[t] = LM_MAX(q->n_prompt, p + 1);
        }
    }
}

static void fill_sequences(const struct step *s, const struct layout *l, const struct sizes *z)
{
    int32_t *q_start = on_host(s, l->q_start), *kv_len = on_host(s, l->kv_len);
    int32_t *table = on_host(s, l->table);
    q_start[0] = 0;
    for (int i = 0; i < z->n_seqs; i++) {
        const struct seq *q = s->order[i].seq;
        int n = q->n_computed + s->order[i].n_tok, blocks = blocks_for(n, s->p.block_tokens);
        q_start[i + 1] = q_start[i] + s->order[i].n_tok;
        kv_len[i] = n;
        memcpy(table + (size_t)i * (size_t)z->table_ld, q->blocks,
               (size_t)blocks * sizeof *table);
        for (int k = blocks; k < z->table_ld; k++)      /* never read; a valid id all the same */
            table[(size_t)i * (size_t)z->table_ld + (size_t)k] = 0;
    }
}

static void add_load(struct kn_lora_batch *b, const struct group *g)
{
    for (int m = 0; m < KN_MODULES; m++) {
        int rank = g->adapter->image.module_rank[m];
        b->load[m].rank_sum += rank;
        b->load[m].rank_tok += rank * g->n_tok;
    }
}

static struct kn_lora_batch fill_lora(const struct step *s, const struct layout *l, int n_tok)
{
    struct kn_lora_seg *seg = on_host(s, l->segs);
    int32_t *blocks = on_host(s, l->lora_blocks);
    struct kn_lora_batch b = {
        .segs = on_device(s, l->segs), .block_ids = on_device(s, l->lora_blocks),
        .n_segs = s->n_groups - 1, .n_tok = n_tok,
    };
    int tok0 = s->group[0].n_tok, block0 = 0;
    for (int g = 1; g < s->n_groups; g++) {
        const struct group *gr = &s->group[g];
        int rank = gr->adapter->image.rank_max;
        seg[g - 1] = (struct kn_lora_seg){ tok0, gr->n_tok, block0, rank, (int32_t)b.h_rows };
        memcpy(blocks + block0, gr->adapter->res.blocks,
               (size_t)gr->adapter->n_blocks * sizeof *blocks);
        tok0 += gr->n_tok;
        block0 += gr->adapter->n_blocks;
        b.max_seg_tok = LM_MAX(b.max_seg_tok, gr->n_tok);
        b.max_rank = LM_MAX(b.max_rank, rank);
        b.h_rows += (int64_t)gr->n_tok * rank;
        add_load(&b, gr);
    }
    return b;
}

struct row_filler {
    struct step *s;
    int32_t *idx;
    struct kn_sample_row *row;
    int32_t *history;
    int32_t n_history;
};

static void fill_row(struct row_filler *f, struct seq *q, int token, bool is_prompt,
                     struct kn_sample_row row)
{
    const struct engine_params *p = &q->req->params;
    int n = f->s->n_rows++;
    row.want_logprob = p->logprobs >= 0;
    row.top_logprobs = LM_MAX(p->logprobs, 0);
    f->s->want_tops |= row.top_logprobs > 0;
    f->idx[n] = token;
    f->row[n] = row;
    f->s->row[n] = (struct step_row){ .seq = q, .is_prompt = is_prompt };
}

static const struct kn_sample_row forced_row = { .repetition_penalty = 1, .top_p = 1 };

static void fill_scored(struct row_filler *f, const struct plan_item *it, int tok0)
{
    int first, end;
    scored_range(it, &first, &end);
    for (int p = first; p < end; p++) {
        struct kn_sample_row row = forced_row;
        row.forced = it->seq->tokens[p + 1];
        fill_row(f, it->seq, tok0 + p - it->seq->n_computed, true, row);
    }
}

static void add_history(struct row_filler *f, const int32_t *ids, int n)
{
    if (n > 0)
        memcpy(f->history + f->n_history, ids, (size_t)n * sizeof *ids);
    f->n_history += n;
}

static void fill_generated(struct row_filler *f, const struct plan_item *it, int tok0)
{
    struct seq *q = it->seq;
    const struct engine_params *p = &q->req->params;
    const struct model_config *m = f->s->p.model;
    struct kn_sample_row row = {
        .temperature = p->temperature, .top_p = p->top_p, .min_p = p->min_p,
        .repetition_penalty = p->repetition_penalty, .presence_penalty = p->presence_penalty,
        .frequency_penalty = p->frequency_penalty, .top_k = p->top_k, .forced = -1,
        .seed = q->seed, .counter = (uint64_t)seq_n_output(q),
    };
    row.hist0 = f->n_history;
    if (has_penalties(p)) {
        row.n_prompt = q->n_prompt;
        row.n_output = seq_n_output(q);
        add_history(f, q->tokens, q->n_tokens);
    }
    row.banned0 = f->n_history;
    row.n_banned = n_banned(f->s, q);
    if (row.n_banned > 0) {
        add_history(f, p->stop_token_ids, p->n_stop_token_ids);
        add_history(f, m->eos_ids, m->n_eos);
    }
    fill_row(f, q, tok0 + it->n_tok - 1, false, row);
}

static void fill_rows(struct step *s, const struct layout *l, int n_items)
{
    struct row_filler f = { .s = s, .idx = on_host(s, l->row_idx), .row = on_host(s, l->rows),
                            .history = on_host(s, l->history) };
    s->n_rows = 0;
    s->want_tops = false;
    for (int i = 0, tok0 = 0; i < n_items; i++) {
        fill_scored(&f, &s->order[i], tok0);
        if (generates(&s->order[i]))
            fill_generated(&f, &s->order[i], tok0);
        tok0 += s->order[i].n_tok;
    }
}

/* ---- running --------------------------------------------------------------------------- */

static lm_status copy_back(const struct step *s, const struct step_output *out, kn_stream *stream)
{
    size_t n = (size_t)s->n_rows, top = n * KN_MAX_TOP_LOGPROBS;
    lm_status st = kn_copy_out(stream, s->id, out->id, n * sizeof *s->id);
    if (st == LM_OK)
        st = kn_copy_out(stream, s->logprob, out->logprob, n * sizeof *s->logprob);
    if (st == LM_OK && s->want_tops)
        st = kn_copy_out(stream, s->top_id, out->top_id, top * sizeof *s->top_id);
    if (st == LM_OK && s->want_tops)
        st = kn_copy_out(stream, s->top_logprob, out->top_logprob, top * sizeof *s->top_logprob);
    return st;
}

lm_status step_launch(struct step *s, struct forward *f, kn_stream *stream,
                      const struct kn_pool *pool, const struct plan_item *item, int n_items,
                      struct lm_err *err)
{
    bool dynamic = s->p.model->rope == ROPE_DYNAMIC;
    int64_t t0 = kn_now_us(s->p.dev);
    group_items(s, item, n_items);
    struct sizes z = measure(s, n_items);
    struct layout l = lay_out(&z, dynamic);
    lm_status st = grow_meta(s, l.bytes, err);
    if (st != LM_OK)
        return st;
    fill_tokens(s, &l, dynamic, n_items);
    fill_sequences(s, &l, &z);
    fill_rows(s, &l, n_items);
    struct step_batch b = {
        .n_tok = z.n_tok, .n_seqs = z.n_seqs, .n_rows = s->n_rows, .max_q = z.max_q,
        .max_kv = z.max_kv, .ids = on_device(s, l.ids), .pos = on_device(s, l.pos),
        .slot = on_device(s, l.slot), .dyn_len = dynamic ? on_device(s, l.dyn_len) : NULL,
        .q_start = on_device(s, l.q_start), .kv_len = on_device(s, l.kv_len),
        .block_table = on_device(s, l.table), .table_ld = z.table_ld,
        .lora = fill_lora(s, &l, z.n_tok),
        .row_idx = on_device(s, l.row_idx), .rows = on_device(s, l.rows),
        .history = on_device(s, l.history),
    };
    s->layout_us = kn_now_us(s->p.dev) - t0;
    st = kn_copy_in(stream, s->device, s->host, l.bytes);
    if (st == LM_OK)
        st = forward_run(f, stream, pool, &b);
    if (st == LM_OK && s->n_rows > 0)
        st = copy_back(s, forward_output(f), stream);
    return st == LM_OK ? LM_OK : lm_err_set(err, st, "a step of %d tokens failed: %s", z.n_tok,
                                            lm_status_text(st));
}

int64_t step_layout_us(const struct step *s)
{
    return s->layout_us;
}

lm_status step_finish(struct step *s, kn_stream *stream, const struct step_row **rows, int *n_rows,
                      struct lm_err *err)
{
    lm_status st = kn_stream_sync(stream, err);
    if (st != LM_OK)
        return st;
    for (int i = 0; i < s->n_rows; i++)
        s->row[i].got = (struct sampled){
            .id = s->id[i], .logprob = s->logprob[i],
            .top_id = s->top_id + (size_t)i * KN_MAX_TOP_LOGPROBS,
            .top_logprob = s->top_logprob + (size_t)i * KN_MAX_TOP_LOGPROBS,
        };
    *rows = s->row;
    *n_rows = s->n_rows;
    return LM_OK;
}
