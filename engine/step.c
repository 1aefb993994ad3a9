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
 *
 * A step of decode alone can run as one that was recorded, if all that the host tells the device of
 * it is the same: counts, hints, and where arrays lie. So its counts are rounded up to one of few
 * sizes (repeat()), arrays whose length the sizes do not give come last and are found by index from
 * the buffer's start, and rows without a sequence fill it up: token 0, no slot, a sample that is
 * forced, and sequences without a query. They cost little: the device works in such sizes anyway.
 *
 * Two frames, one device buffer: a frame holds what the host must keep until its step has passed
 * (pinned metadata and results, who the rows belong to). On the device the stream's order protects
 * metadata and outputs: the next step's copy comes behind the last use of this one's.
 *
 *     frame:   free --launch--> in flight --finish--> being read, until the next launch --> free
 *
 * Invariant: seq.flight == frame.number exactly for sequences with an item in the newest frame, so
 * voiding one that ends is O(1). It may have rows in the frame that is being read as well; whoever
 * reads them knows that it has ended.
 */
#include "engine/step.h"

#include <assert.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define ALIGN 64
#define KV_STEP 256             /* keys of a recorded step come in steps of this, or of an eighth */

/* One array of the metadata buffer: its place is the same on host and device. */
struct span {
    size_t at;
};

struct layout {
    struct span ids, pos, slot, dyn_len, q_start, kv_len, row_idx, rows, segs, table;
    struct span lora_blocks, history, feed_dst, feed_src;       /* found by index */
    size_t bytes;
};

struct group {
    const struct engine_adapter *adapter;       /* NULL: base */
    int n_items, n_tok, first_item;
};

struct frame {
    uint64_t number;            /* of the step; counts from 1 */
    char *host;                 /* pinned metadata */
    size_t cap;
    kn_event *done;
    struct plan_item *item;     /* [max_seqs], grouped by adapter */
    struct step_row *row;       /* [max_tokens] */
    int n_items, n_rows;
    int n_prefill, n_decode;    /* tokens that are not void */
    bool want_tops, merged;
    int64_t launched_us;
    /* pinned results */
    int32_t *id, *top_id;
    float *logprob, *top_logprob;
};

struct step {
    struct step_params p;
    uint64_t number;
    uint64_t merged;            /* serial of the adapter in the weights */
    char *device;               /* metadata */
    size_t cap;
    struct frame frame[2];
    int oldest, n_flight;
    struct group *group;        /* [max_seqs + 1]; group 0 is base */
    int *item_group;            /* [max_seqs] */
    int n_groups;
    int64_t layout_us;
};

/* ---- making ---------------------------------------------------------------------------- */

static lm_status grow_host(struct step *s, struct frame *f, size_t bytes, struct lm_err *err)
{
    if (bytes <= f->cap)
        return LM_OK;
    size_t cap = LM_MAX(bytes, f->cap * 2);
    void *p = NULL;
    lm_status st = kn_host_alloc(s->p.dev, cap, &p, err);
    if (st != LM_OK)
        return lm_err_prefix(err, "step metadata of %zu bytes", cap);
    kn_host_free(s->p.dev, f->host);
    f->host = p;
    f->cap = cap;
    return LM_OK;
}

/* The step before may still read the buffer: then it is waited for. */
static lm_status grow_device(struct step *s, kn_stream *stream, size_t bytes, struct lm_err *err)
{
    if (bytes <= s->cap)
        return LM_OK;
    size_t cap = LM_MAX(bytes, s->cap * 2);
    void *p = NULL;
    lm_status st = kn_alloc(s->p.dev, cap, &p, err);
    if (st != LM_OK)
        return lm_err_prefix(err, "step metadata of %zu bytes", cap);
    if (s->n_flight > 0)
        st = kn_stream_sync(stream, err);
    kn_free(s->p.dev, s->device);
    s->device = p;
    s->cap = cap;
    return st;
}

static lm_status alloc_results(struct step *s, struct frame *f, struct lm_err *err)
{
    size_t n = (size_t)s->p.max_tokens, top = n * KN_MAX_TOP_LOGPROBS;
    void *id = NULL, *logprob = NULL, *top_id = NULL, *top_logprob = NULL;
    lm_status st = kn_host_alloc(s->p.dev, n * sizeof *f->id, &id, err);
    if (st == LM_OK)
        st = kn_host_alloc(s->p.dev, n * sizeof *f->logprob, &logprob, err);
    if (st == LM_OK)
        st = kn_host_alloc(s->p.dev, top * sizeof *f->top_id, &top_id, err);
    if (st == LM_OK)
        st = kn_host_alloc(s->p.dev, top * sizeof *f->top_logprob, &top_logprob, err);
    f->id = id;
    f->logprob = logprob;
    f->top_id = top_id;
    f->top_logprob = top_logprob;
    return st;
}

static lm_status frame_init(struct step *s, struct frame *f, size_t meta, struct lm_err *err)
{
    f->item = lm_calloc((size_t)s->p.max_seqs, sizeof *f->item);
    f->row = lm_calloc((size_t)s->p.max_tokens, sizeof *f->row);
    if (!f->item || !f->row)
        return lm_err_set(err, LM_NOMEM, "no memory for the step");
    lm_status st = grow_host(s, f, meta, err);
    if (st == LM_OK)
        st = alloc_results(s, f, err);
    return st == LM_OK ? kn_event_new(s->p.dev, &f->done, err) : st;
}

static void frame_release(struct step *s, struct frame *f)
{
    void *const pinned[] = { f->host, f->id, f->logprob, f->top_id, f->top_logprob };
    for (size_t i = 0; i < LM_COUNT(pinned); i++)
        kn_host_free(s->p.dev, pinned[i]);
    if (f->done)
        kn_event_free(f->done);
    free(f->item);
    free(f->row);
}

lm_status step_new(const struct step_params *p, struct step **out, struct lm_err *err)
{
    struct step *s = lm_calloc(1, sizeof *s);
    if (!s)
        return lm_err_set(err, LM_NOMEM, "no memory for the step");
    /* Enough for full steps of moderate block tables; history and long tables may grow it. */
    size_t seqs = (size_t)p->max_seqs, meta = (size_t)p->max_tokens * 160 + seqs * 1024 + 65536;
    s->p = *p;
    s->group = lm_calloc(seqs + 1, sizeof *s->group);
    s->item_group = lm_calloc(seqs, sizeof *s->item_group);
    lm_status st = s->group && s->item_group
                       ? LM_OK : lm_err_set(err, LM_NOMEM, "no memory for the step");
    for (int i = 0; st == LM_OK && i < 2; i++)
        st = frame_init(s, &s->frame[i], meta, err);
    if (st == LM_OK)
        st = grow_device(s, NULL, meta, err);
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
    for (int i = 0; i < 2; i++)
        frame_release(s, &s->frame[i]);
    kn_free(s->p.dev, s->device);
    free(s->group);
    free(s->item_group);
    free(s);
}

/* ---- grouping by adapter --------------------------------------------------------------- */

static void prefetch_seq(const struct seq *q)
{
    for (size_t at = 0; at < offsetof(struct seq, index); at += 64)
        __builtin_prefetch((const char *)q + at, 1);
}

/* Where the sequence itself is there by now. */
static void prefetch_rest(const struct seq *q)
{
    __builtin_prefetch(q->tokens + q->n_computed);
    __builtin_prefetch(q->blocks);
    if (q->adapter) {
        __builtin_prefetch(&q->adapter->res.seen_step, 1);
        __builtin_prefetch(&q->adapter->image.rank_max);
    }
}

static int group_of(struct step *s, struct engine_adapter *a)
{
    if (!a || (s->merged && a->version.serial == s->merged))
        return 0;
    if (a->res.seen_step != s->number) {
        a->res.seen_step = s->number;
        a->res.group = s->n_groups;
        s->group[s->n_groups++] = (struct group){ .adapter = a };
    }
    return a->res.group;
}

static void group_items(struct step *s, struct frame *f, const struct plan_item *item, int n)
{
    f->number = ++s->number;
    f->n_items = n;
    f->merged = s->merged != 0;
    s->n_groups = 1;
    s->group[0] = (struct group){ 0 };
    for (int i = 0; i < n; i++) {
        if (i + 2 * STEP_AHEAD < n)
            prefetch_seq(item[i + 2 * STEP_AHEAD].seq);
        if (i + STEP_AHEAD < n)
            prefetch_rest(item[i + STEP_AHEAD].seq);
        int g = group_of(s, item[i].seq->adapter);
        s->item_group[i] = g;
        s->group[g].n_items++;
        s->group[g].n_tok += item[i].n_tok;
    }
    for (int g = 1; g < s->n_groups; g++)
        s->group[g].first_item = s->group[g - 1].first_item + s->group[g - 1].n_items;
    for (int i = 0; i < n; i++)
        f->item[s->group[s->item_group[i]].first_item++] = item[i];
}

/* ---- layout ---------------------------------------------------------------------------- */

/* What a step needs, counted before anything is placed. */
struct sizes {
    int n_tok, n_seqs, n_rows, n_segs, n_lora_blocks, table_ld, max_q, max_kv;
    size_t n_history, n_feed;
    bool repeats;               /* rounded: see repeat() */
};

/* Prompt positions of this item that are scored: [first, end). Position p scores token p + 1. */
static void scored_range(const struct plan_item *it, int *first, int *end)
{
    const struct seq *s = it->seq;
    int from = s->n_computed, to = from + it->n_tok;
    *first = *end = 0;
    if (!s->scores_prompt)
        return;
    *first = LM_MAX(from, s->req->prompt_scores.n);
    *end = LM_MAX(*first, LM_MIN(to, s->n_prompt - 1));
}

static bool generates(const struct plan_item *it)
{
    const struct seq *s = it->seq;
    return s->generates && s->n_computed + it->n_tok == seq_length(s);
}

/* Its token is one that the step before will sample. */
static bool is_fed(const struct plan_item *it)
{
    return it->seq->n_computed + it->n_tok > it->seq->n_tokens;
}

static int n_banned(const struct step *s, const struct seq *q)
{
    const struct engine_params *p = &q->req->params;
    if (!q->bans || seq_n_output(q) + q->pending >= p->min_tokens)
        return 0;
    return p->n_stop_token_ids + s->p.model->n_eos;
}

static struct sizes measure(const struct step *s, const struct frame *f)
{
    struct sizes z = { .n_seqs = f->n_items, .n_segs = s->n_groups - 1 };
    for (int i = 0; i < f->n_items; i++) {
        const struct plan_item *it = &f->item[i];
        const struct seq *q = it->seq;
        int first, end, kv = q->n_computed + it->n_tok;
        scored_range(it, &first, &end);
        z.n_tok += it->n_tok;
        z.n_rows += end - first + generates(it);
        z.max_q = LM_MAX(z.max_q, it->n_tok);
        z.max_kv = LM_MAX(z.max_kv, kv);
        if (generates(it)) {
            z.n_history += (size_t)n_banned(s, q);
            z.n_history += q->penalised ? (size_t)seq_length(q) : 0;
        }
        z.n_feed += is_fed(it) ? 1 + q->penalised : 0;
    }
    z.table_ld = blocks_for(z.max_kv, s->p.block_tokens);
    for (int g = 1; g < s->n_groups; g++) {
        __builtin_prefetch(s->group[g].adapter->res.blocks);
        z.n_lora_blocks += s->group[g].adapter->n_blocks;
    }
    return z;
}

static atomic_bool forced_single;

void step_force_single(bool on)
{
    atomic_store(&forced_single, on);
}

/* Eighths of a power of two, KV_STEP at least: where splits of attention change, too. */
static int rounded_kv(int kv)
{
    int step = KV_STEP;
    while (kv > step * 8)
        step *= 2;
    return LM_DIV_UP(kv, step) * step;
}

static int power_of_two(int n)
{
    int p = 1;
    while (p < n)
        p *= 2;
    return p;
}

/* The sizes of a decode step as the device is told them. Others stay what they are. */
static struct sizes repeat(const struct step *s, const struct sizes *z)
{
    struct sizes t = *z;
    if (!s->p.record || atomic_load(&forced_single) || z->max_q != 1 || z->n_rows != z->n_tok)
        return t;
    int rows = kn_graph_rows(s->p.dev, z->n_tok);
    if (rows == 0)
        return t;
    t.repeats = true;
    t.n_tok = t.n_seqs = t.n_rows = LM_MIN(rows, s->p.max_tokens);
    t.max_kv = rounded_kv(z->max_kv);
    t.table_ld = blocks_for(t.max_kv, s->p.block_tokens);
    if (z->n_segs > 0)
        t.n_segs = LM_MIN(kn_graph_rows(s->p.dev, z->n_segs), t.n_tok);
    return t;
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
    l.row_idx = place(&l, rows, sizeof(int32_t));
    l.rows = place(&l, rows, sizeof(struct kn_sample_row));
    l.segs = place(&l, (size_t)z->n_segs, sizeof(struct kn_lora_seg));
    l.table = place(&l, seqs * (size_t)z->table_ld, sizeof(int32_t));
    l.lora_blocks = place(&l, (size_t)z->n_lora_blocks, sizeof(int32_t));
    l.history = place(&l, z->n_history, sizeof(int32_t));
    l.feed_dst = place(&l, z->n_feed, sizeof(int32_t));
    l.feed_src = place(&l, z->n_feed, sizeof(int32_t));
    return l;
}

/* ---- filling --------------------------------------------------------------------------- */

static void *on_host(const struct frame *f, struct span at)
{
    return f->host + at.at;
}

static void *on_device(const struct step *s, struct span at)
{
    return s->device + at.at;
}

/* Of the span's first element in the buffer as an array of int32. */
static int32_t index_of(struct span at)
{
    return (int32_t)(at.at / sizeof(int32_t));
}

static void fill_tokens(const struct step *s, const struct frame *f, const struct layout *l,
                        bool dynamic)
{
    int32_t *ids = on_host(f, l->ids), *pos = on_host(f, l->pos);
    int32_t *dyn = on_host(f, l->dyn_len);
    int64_t *slot = on_host(f, l->slot);
    int t = 0, bt = s->p.block_tokens;
    for (int i = 0; i < f->n_items; i++) {
        const struct seq *q = f->item[i].seq;
        for (int k = 0; k < f->item[i].n_tok; k++, t++) {
            int p = q->n_computed + k;
            ids[t] = p < q->n_tokens ? q->tokens[p] : 0;        /* 0: to be fed */
            pos[t] = p;
            slot[t] = (int64_t)q->blocks[p / bt] * bt + p % bt;
            if (dynamic)        /* a prompt is one forward for the reference, whatever our chunks */
                dyn[t] = LM_MAX(q->n_prompt, p + 1);
        }
    }
}

/* `z` as the device is told them. */
static void fill_sequences(const struct step *s, const struct frame *f, const struct layout *l,
                           const struct sizes *z)
{
    int32_t *q_start = on_host(f, l->q_start), *kv_len = on_host(f, l->kv_len);
    int32_t *table = on_host(f, l->table);
    q_start[0] = 0;
    for (int i = 0; i < f->n_items; i++) {
        const struct seq *q = f->item[i].seq;
        int n = q->n_computed + f->item[i].n_tok, blocks = blocks_for(n, s->p.block_tokens);
        q_start[i + 1] = q_start[i] + f->item[i].n_tok;
        kv_len[i] = n;
        memcpy(table, q->blocks, (size_t)blocks * sizeof *table);
        /* Behind its end: never read; a valid id all the same. */
        memset(table + blocks, 0, (size_t)(z->table_ld - blocks) * sizeof *table);
        table += z->table_ld;
    }
}

/* Rows behind the step's n tokens, up to what the device is told; one segment or none of them. */
static void fill_rest(const struct frame *f, const struct layout *l, const struct sizes *z, int n,
                      bool dynamic)
{
    static const struct kn_sample_row forced_0 = { .repetition_penalty = 1, .top_p = 1 };
    int32_t *ids = on_host(f, l->ids), *pos = on_host(f, l->pos), *idx = on_host(f, l->row_idx);
    int32_t *dyn = on_host(f, l->dyn_len), *table = on_host(f, l->table);
    int32_t *q_start = on_host(f, l->q_start), *kv_len = on_host(f, l->kv_len);
    int64_t *slot = on_host(f, l->slot);
    struct kn_sample_row *row = on_host(f, l->rows);
    for (int i = n; i < z->n_tok; i++) {
        ids[i] = pos[i] = kv_len[i] = 0;
        slot[i] = -1;
        q_start[i + 1] = q_start[i];
        idx[i] = i;
        row[i] = forced_0;
        if (dynamic)
            dyn[i] = 1;
    }
    memset(table + (size_t)n * (size_t)z->table_ld, 0,
           (size_t)(z->n_tok - n) * (size_t)z->table_ld * sizeof *table);
}

static void add_load(struct kn_lora_batch *b, const struct group *g)
{
    for (int m = 0; m < KN_MODULES; m++) {
        int rank = g->adapter->image.module_rank[m];
        b->load[m].rank_sum += rank;
        b->load[m].rank_tok += rank * g->n_tok;
    }
}

/* Segments without a token up to what the device is told, and hints that other steps have, too. */
static void repeat_lora(const struct step *s, const struct sizes *z, struct kn_lora_seg *seg,
                        struct kn_lora_batch *b)
{
    for (int g = b->n_segs; g < z->n_segs; g++)
        seg[g] = (struct kn_lora_seg){ .tok0 = z->n_tok, .block0 = seg[0].block0 };
    b->n_segs = z->n_segs;
    b->max_seg_tok = LM_MIN(power_of_two(b->max_seg_tok), z->n_tok);
    b->max_rank = power_of_two(b->max_rank);
    b->h_rows = LM_MIN((int64_t)z->n_tok * b->max_rank, s->p.lora_rows);    /* all there are */
    for (int m = 0; m < KN_MODULES; m++)
        b->load[m].rank_sum = b->load[m].rank_tok = b->load[m].rank_sum > 0;
}

static struct kn_lora_batch fill_lora(const struct step *s, const struct frame *f,
                                      const struct layout *l, const struct sizes *z)
{
    struct kn_lora_seg *seg = on_host(f, l->segs);
    int32_t *blocks = (int32_t *)(void *)f->host;
    struct kn_lora_batch b = {
        .segs = on_device(s, l->segs), .block_ids = (const int32_t *)(const void *)s->device,
        .n_segs = s->n_groups - 1, .n_tok = z->n_tok,
    };
    int tok0 = s->group[0].n_tok, block0 = index_of(l->lora_blocks);
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
    if (z->repeats && b.n_segs > 0)
        repeat_lora(s, z, seg, &b);
    return b;
}

struct row_filler {
    const struct step *s;
    struct frame *f;
    const struct layout *l;
    int32_t *idx;
    struct kn_sample_row *row;
    int32_t *history;           /* the buffer's start */
    int32_t n_history;          /* index of the next one there */
    int32_t *feed_dst, *feed_src, n_feed;
};

static void fill_row(struct row_filler *f, struct seq *q, int token, bool is_prompt,
                     struct kn_sample_row row)
{
    int n = f->f->n_rows++;
    row.want_logprob = q->sample.want_logprob;
    row.top_logprobs = q->sample.top_logprobs;
    f->f->want_tops |= row.top_logprobs > 0;
    f->idx[n] = token;
    f->row[n] = row;
    f->f->row[n] = (struct step_row){ .seq = q, .is_prompt = is_prompt };
}

/* The token that the step before samples for q comes to element `i` of the array at `at`. */
static void add_feed(struct row_filler *f, const struct seq *q, struct span at, int i)
{
    f->feed_dst[f->n_feed] = index_of(at) + i;
    f->feed_src[f->n_feed++] = q->flight_row + q->flight_rows - 1;
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
    struct kn_sample_row row = q->sample;
    int n_output = seq_n_output(q) + q->pending;
    row.counter = (uint64_t)n_output;
    row.hist0 = f->n_history;
    if (q->penalised) {
        row.n_prompt = q->n_prompt;
        row.n_output = n_output;
        add_history(f, q->tokens, q->n_tokens);
        if (q->pending)
            add_feed(f, q, (struct span){ 0 }, f->n_history++);
    }
    row.banned0 = f->n_history;
    row.n_banned = n_banned(f->s, q);
    if (row.n_banned > 0) {
        const struct engine_params *p = &q->req->params;
        const struct model_config *m = f->s->p.model;
        add_history(f, p->stop_token_ids, p->n_stop_token_ids);
        add_history(f, m->eos_ids, m->n_eos);
    }
    fill_row(f, q, tok0 + it->n_tok - 1, false, row);
}

static int fill_rows(const struct step *s, struct frame *fr, const struct layout *l)
{
    struct row_filler f = {
        .s = s, .f = fr, .l = l, .idx = on_host(fr, l->row_idx), .row = on_host(fr, l->rows),
        .history = (int32_t *)(void *)fr->host, .n_history = index_of(l->history),
        .feed_dst = on_host(fr, l->feed_dst), .feed_src = on_host(fr, l->feed_src),
    };
    fr->n_rows = 0;
    fr->want_tops = false;
    for (int i = 0, tok0 = 0; i < fr->n_items; i++) {
        const struct plan_item *it = &fr->item[i];
        fill_scored(&f, it, tok0);
        if (is_fed(it))
            add_feed(&f, it->seq, l->ids, tok0 + it->n_tok - 1);
        if (generates(it))
            fill_generated(&f, it, tok0);
        tok0 += it->n_tok;
    }
    return f.n_feed;
}

/* ---- running --------------------------------------------------------------------------- */

static lm_status copy_back(const struct frame *f, const struct step_output *out, kn_stream *stream)
{
    size_t n = (size_t)f->n_rows, top = n * KN_MAX_TOP_LOGPROBS;
    lm_status st = kn_copy_out(stream, f->id, out->id, n * sizeof *f->id);
    if (st == LM_OK)
        st = kn_copy_out(stream, f->logprob, out->logprob, n * sizeof *f->logprob);
    if (st == LM_OK && f->want_tops)
        st = kn_copy_out(stream, f->top_id, out->top_id, top * sizeof *f->top_id);
    if (st == LM_OK && f->want_tops)
        st = kn_copy_out(stream, f->top_logprob, out->top_logprob, top * sizeof *f->top_logprob);
    return st;
}

/* Filled member by member: what lies between them is zero, as they are compared (forward_run()). */
static void make_batch(const struct step *s, const struct frame *f, const struct layout *l,
                       const struct sizes *z, bool dynamic, struct step_batch *b)
{
    memset(b, 0, sizeof *b);
    b->n_tok = z->n_tok;
    b->n_seqs = z->n_seqs;
    b->n_rows = z->n_rows;
    b->max_q = z->max_q;
    b->max_kv = z->max_kv;
    b->ids = on_device(s, l->ids);
    b->pos = on_device(s, l->pos);
    b->slot = on_device(s, l->slot);
    b->dyn_len = dynamic ? on_device(s, l->dyn_len) : NULL;
    b->q_start = on_device(s, l->q_start);
    b->kv_len = on_device(s, l->kv_len);
    b->block_table = on_device(s, l->table);
    b->table_ld = z->table_ld;
    b->lora = fill_lora(s, f, l, z);
    b->row_idx = on_device(s, l->row_idx);
    b->rows = on_device(s, l->rows);
    b->history = (const int32_t *)(const void *)s->device;
    b->repeats = z->repeats;
}

static lm_status enqueue(struct step *s, struct frame *f, struct forward *fw, kn_stream *stream,
                         const struct kn_pool *pool, const struct layout *l,
                         const struct step_batch *b, int n_feed)
{
    const struct step_output *out = forward_output(fw);
    struct kn_feed feed = { (int32_t *)s->device, on_device(s, l->feed_dst), out->id,
                            on_device(s, l->feed_src), n_feed };
    lm_status st = kn_copy_in(stream, s->device, f->host, l->bytes);
    if (st == LM_OK && n_feed > 0)
        st = kn_op_feed(stream, &feed);
    if (st == LM_OK)
        st = forward_run(fw, stream, pool, b);
    if (st == LM_OK && f->n_rows > 0)
        st = copy_back(f, out, stream);
    return st == LM_OK ? kn_event_record(f->done, stream) : st;
}

/* Positions count as computed from now on: later steps run behind this one. */
static void mark_launched(struct frame *f)
{
    int row = 0;
    f->n_prefill = f->n_decode = 0;
    for (int i = 0; i < f->n_items; i++) {
        const struct plan_item *it = &f->item[i];
        struct seq *q = it->seq;
        q->flight = f->number;
        q->flight_item = i;
        q->flight_row = row;
        while (row < f->n_rows && f->row[row].seq == q)
            row++;
        q->flight_rows = row - q->flight_row;
        q->flight_decode = q->n_computed >= q->n_prompt;
        *(q->flight_decode ? &f->n_decode : &f->n_prefill) += it->n_tok;
        q->pending += generates(it);
        q->n_computed += it->n_tok;
    }
}

lm_status step_launch(struct step *s, struct forward *fw, kn_stream *stream,
                      const struct kn_pool *pool, const struct plan_item *item, int n_items,
                      struct lm_err *err)
{
    assert(s->n_flight < 2);
    struct frame *f = &s->frame[(s->oldest + s->n_flight) % 2];
    bool dynamic = s->p.model->rope == ROPE_DYNAMIC;
    int64_t t0 = kn_now_us(s->p.dev);
    group_items(s, f, item, n_items);
    struct sizes own = measure(s, f), z = repeat(s, &own);
    struct layout l = lay_out(&z, dynamic);
    struct step_batch b;
    lm_status st = grow_host(s, f, l.bytes, err);
    if (st == LM_OK)
        st = grow_device(s, stream, l.bytes, err);
    if (st != LM_OK)
        return st;
    fill_tokens(s, f, &l, dynamic);
    fill_sequences(s, f, &l, &z);
    int n_feed = fill_rows(s, f, &l);
    if (z.repeats)
        fill_rest(f, &l, &z, own.n_tok, dynamic);
    make_batch(s, f, &l, &z, dynamic, &b);
    f->launched_us = kn_now_us(s->p.dev);
    s->layout_us = f->launched_us - t0;
    st = enqueue(s, f, fw, stream, pool, &l, &b, n_feed);
    if (st != LM_OK)
        return lm_err_set(err, st, "a step of %d tokens failed: %s", own.n_tok, lm_status_text(st));
    mark_launched(f);
    s->n_flight++;
    return LM_OK;
}

int step_in_flight(const struct step *s)
{
    return s->n_flight;
}

void step_set_merged(struct step *s, uint64_t serial)
{
    s->merged = serial;
}

int64_t step_layout_us(const struct step *s)
{
    return s->layout_us;
}

int step_adapters(const struct step *s)
{
    return s->n_groups - 1 + (s->merged != 0);
}

lm_status step_finish(struct step *s, struct step_results *out, struct lm_err *err)
{
    struct frame *f = &s->frame[s->oldest];
    lm_status st = kn_event_sync(f->done, err);
    if (st != LM_OK)
        return st;
    s->oldest = (s->oldest + 1) % 2;
    s->n_flight--;
    for (int i = 0; i < f->n_rows; i++)
        f->row[i].got = (struct sampled){
            .id = f->id[i], .logprob = f->logprob[i],
            .top_id = f->top_id + (size_t)i * KN_MAX_TOP_LOGPROBS,
            .top_logprob = f->top_logprob + (size_t)i * KN_MAX_TOP_LOGPROBS,
        };
    *out = (struct step_results){ f->item, f->row, f->n_items, f->n_rows,
                                   f->n_prefill, f->n_decode, f->merged, f->launched_us };
    return LM_OK;
}

void step_void(struct step *s, const struct seq *q)
{
    if (s->n_flight == 0)
        return;
    struct frame *f = &s->frame[(s->oldest + s->n_flight - 1) % 2];
    if (q->flight != f->number)
        return;
    struct plan_item *it = &f->item[q->flight_item];
    *(q->flight_decode ? &f->n_decode : &f->n_prefill) -= it->n_tok;
    it->seq = NULL;
    for (int i = 0; i < q->flight_rows; i++)
        f->row[q->flight_row + i].seq = NULL;
}

void step_abandon(struct step *s)
{
    while (s->n_flight > 0) {
        kn_event_sync(s->frame[s->oldest].done, NULL);
        s->oldest = (s->oldest + 1) % 2;
        s->n_flight--;
    }
}
