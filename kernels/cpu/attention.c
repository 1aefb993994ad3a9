/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attention.c - causal paged attention by online softmax (arXiv 2205.14135), grouped heads.
 *
 * A KV block of one layer holds, for each kv head in turn,
 *     K  [head_dim][lanes]          transposed; lanes = block_tokens rounded up to 16
 *     V  [block_tokens][head_dim]
 * as float32 or E4M3 (kn_pool.kv), of which 16 positions at a time are widened.
 * Transposed keys let one vector hold the scores of 16 positions. Lanes that were never written
 * may hold anything: their scores are overwritten with -inf before anyone looks, and their values
 * are never read.
 *
 * A task is one sequence, one kv head and up to TILE_ROWS rows (query tokens x heads of the group),
 * which share each load of K and V. Keys come in spans of SPAN: scores, maximum, exponentials,
 * then values, with the running output rescaled when the maximum grows. A row's spans start at
 * position 0 or its window's first block, so its result does not depend on its neighbours.
 *
 * When a step has fewer tasks than threads (one long sequence), decode tasks are split along the
 * keys: each part keeps (max, sum, output) and the parts are merged by the caller. In how many
 * follows from the number of sequences and the task's own length, not from how long others are, or
 * whether one of them is prefilled beside it.
 */
#include "kernels/cpu/cpu_int.h"

#include <math.h>
#include <string.h>

#define TILE_ROWS 16
#define SPAN 128                /* key lanes a pass: 16 rows of scores are 8 KB */
#define TASK_TOKENS 64          /* query tokens a work item covers */
#define SPLIT_MIN_KEYS 512      /* no split shorter than this */
#define SPLIT_FLOATS 16384      /* partial results of the splits, for each thread */

struct attn_job {
    const struct kn_attention *a;
    const struct cpu_vec *v;
    int group, q_items;
    int splits;                 /* of any task at most; see splits_of() */
    float *partial;
};

struct tile {
    const struct kn_attention *a;
    const struct cpu_vec *v;
    const int32_t *table;
    int kv_head, rows;
    float q[TILE_ROWS * CPU_MAX_HEAD_DIM];      /* [rows][head_dim], scaled */
    float o[TILE_ROWS * CPU_MAX_HEAD_DIM];
    float s[TILE_ROWS][SPAN];
    float wide[CPU_LANES * CPU_MAX_HEAD_DIM];   /* K or V of 16 positions, if stored as E4M3 */
    float max[TILE_ROWS], sum[TILE_ROWS];
    int first[TILE_ROWS], last[TILE_ROWS];      /* visible positions, last included */
};

size_t cpu_split_floats(void)
{
    return SPLIT_FLOATS;
}

size_t cpu_kv_block_bytes(kn_device *dev, enum kn_kv kv, int block_tokens, int kv_heads,
                          int head_dim)
{
    (void)dev;
    size_t n = (size_t)cpu_kv_head_elems(block_tokens, head_dim) * (size_t)kv_heads *
               (size_t)cpu_kv_elem(kv);
    return LM_DIV_UP(n, 64) * 64;
}

static const char *head_block(const struct tile *t, int block)
{
    const struct kn_attention *a = t->a;
    return cpu_pool_block(&a->pool, a->layer, t->table[block]) +
           t->kv_head * cpu_kv_head_elems(a->block_tokens, a->head_dim) * cpu_kv_elem(a->pool.kv);
}

/* s [rows][CPU_LANES] against the keys of one block from `lane` on. */
static void score_lanes(struct tile *t, float *s, int block, int lane)
{
    const int hd = t->a->head_dim;
    const int64_t lanes = cpu_kv_lanes(t->a->block_tokens);
    const char *head = head_block(t, block);
    if (t->a->pool.kv == KN_KV_E4M3) {
        t->v->widen_e4m3(t->wide, (const uint8_t *)head + lane, lanes, hd, CPU_LANES);
        t->v->scores(s, CPU_LANES, t->q, hd, t->rows, t->wide, CPU_LANES, hd);
    } else {
        t->v->scores(s, CPU_LANES, t->q, hd, t->rows, (const float *)head + lane, lanes, hd);
    }
}

/* The output grows by the values of `keys` positions of one block from `key` on, whose weights are
 * in column `at` of the span. */
static void weigh_keys(struct tile *t, int block, int key, int keys, int at)
{
    const int hd = t->a->head_dim;
    const int64_t v0 = (cpu_kv_lanes(t->a->block_tokens) + key) * hd;
    const char *head = head_block(t, block);
    if (t->a->pool.kv != KN_KV_E4M3) {
        t->v->weigh(t->o, hd, t->s[0] + at, SPAN, t->rows, (const float *)head + v0, hd, keys);
        return;
    }
    for (int k = 0; k < keys; k += CPU_LANES) {
        int n = LM_MIN(CPU_LANES, keys - k);
        t->v->widen_e4m3(t->wide, (const uint8_t *)head + v0 + (int64_t)k * hd, hd, n, hd);
        t->v->weigh(t->o, hd, t->s[0] + at + k, SPAN, t->rows, t->wide, hd, n);
    }
}

/* Row r's scores s[0..n) belong to positions pos0..; hide those it may not see, then turn them
 * into weights and rescale what was summed so far. */
static void soften_row(struct tile *t, int r, int pos0, int n)
{
    float *s = t->s[r];
    int lo = LM_MAX(t->first[r] - pos0, 0), hi = LM_MIN(t->last[r] - pos0 + 1, n);
    for (int i = 0; i < LM_MIN(lo, n); i++)
        s[i] = 0;
    for (int i = LM_MAX(hi, 0); i < n; i++)
        s[i] = 0;
    if (lo >= hi)
        return;
    float m = LM_MAX(t->max[r], t->v->max(s + lo, hi - lo));
    if (m > t->max[r]) {
        float keep = t->sum[r] > 0 ? expf(t->max[r] - m) : 0;
        t->sum[r] *= keep;
        float *o = t->o + r * t->a->head_dim;
        for (int d = 0; d < t->a->head_dim; d++)
            o[d] *= keep;
        t->max[r] = m;
    }
    t->sum[r] += t->v->exp_sum(s + lo, s + lo, hi - lo, m);
}

/* Blocks [b0, b1) of the sequence, at most SPAN lanes: positions b0 * block_tokens onwards. Blocks
 * of more than SPAN lanes come in slices of SPAN starting at `lane0`. */
static void add_span(struct tile *t, int b0, int b1, int lane0, int keys_end)
{
    const struct kn_attention *a = t->a;
    const int bt = a->block_tokens, pos0 = b0 * bt + lane0;
    int n = 0;
    for (int b = b0; b < b1; b++) {
        int valid = LM_MIN(bt - lane0, SPAN);
        float lane_s[TILE_ROWS][CPU_LANES];
        for (int l = 0; l < valid; l += CPU_LANES) {
            score_lanes(t, lane_s[0], b, lane0 + l);
            int take = LM_MIN(CPU_LANES, valid - l);
            for (int r = 0; r < t->rows; r++)
                memcpy(t->s[r] + n + l, lane_s[r], (size_t)take * sizeof(float));
        }
        n += valid;
    }
    n = LM_MIN(n, keys_end - pos0);
    for (int r = 0; r < t->rows; r++)
        soften_row(t, r, pos0, n);
    for (int b = b0, at = 0; b < b1 && at < n; b++) {
        int valid = LM_MIN(LM_MIN(bt - lane0, SPAN), n - at);
        weigh_keys(t, b, lane0, valid, at);
        at += valid;
    }
}

/* All keys in [begin, end) for the tile; begin is a multiple of block_tokens. */
static void add_keys(struct tile *t, int begin, int end)
{
    const int bt = t->a->block_tokens;
    const int blocks = LM_DIV_UP(end, bt);
    if (bt > SPAN) {
        for (int b = begin / bt; b < blocks; b++)
            for (int lane = 0; lane < bt && b * bt + lane < end; lane += SPAN)
                add_span(t, b, b + 1, lane, end);
        return;
    }
    const int step = SPAN / bt;
    for (int b = begin / bt; b < blocks; b += step)
        add_span(t, b, LM_MIN(b + step, blocks), 0, end);
}

/* Rows r0.. of the group's query rows, counted token by token, heads innermost. */
static void load_rows(struct tile *t, int seq, int group, int row0)
{
    const struct kn_attention *a = t->a;
    const int q0 = a->q_start[seq], n_q = a->q_start[seq + 1] - q0;
    for (int r = 0; r < t->rows; r++) {
        int tok = (row0 + r) / group, head = t->kv_head * group + (row0 + r) % group;
        const float *q = (const float *)a->qkv + (q0 + tok) * a->ld + (int64_t)head * a->head_dim;
        for (int d = 0; d < a->head_dim; d++)
            t->q[r * a->head_dim + d] = q[d] * a->scale;
        memset(t->o + r * a->head_dim, 0, (size_t)a->head_dim * sizeof(float));
        t->max[r] = -INFINITY;
        t->sum[r] = 0;
        t->last[r] = a->kv_len[seq] - n_q + tok;
        t->first[r] = a->window > 0 ? LM_MAX(0, t->last[r] - a->window + 1) : 0;
    }
}

static void write_rows(const struct tile *t, int seq, int group, int row0)
{
    const struct kn_attention *a = t->a;
    for (int r = 0; r < t->rows; r++) {
        int tok = a->q_start[seq] + (row0 + r) / group;
        int head = t->kv_head * group + (row0 + r) % group;
        float *out = (float *)a->out + ((int64_t)tok * a->q_heads + head) * a->head_dim;
        float inv = 1.0f / t->sum[r];
        for (int d = 0; d < a->head_dim; d++)
            out[d] = t->o[r * a->head_dim + d] * inv;
    }
}

/* Of a sequence's tasks. 1: write out, else partials. */
static int splits_of(const struct attn_job *j, int seq)
{
    const struct kn_attention *a = j->a;
    if (a->q_start[seq + 1] - a->q_start[seq] != 1)
        return 1;
    return LM_MAX(1, LM_MIN(j->splits, a->kv_len[seq] / SPLIT_MIN_KEYS));
}

/* [group][head_dim + 2] of a part of a decode task. */
static float *partial_at(const struct attn_job *j, int seq, int kv_head, int split)
{
    const int64_t at = ((int64_t)seq * j->a->kv_heads + kv_head) * j->splits + split;
    return j->partial + at * j->group * (j->a->head_dim + 2);
}

static void save_partial(const struct attn_job *j, const struct tile *t, int seq, int split)
{
    const int hd = j->a->head_dim;
    float *p = partial_at(j, seq, t->kv_head, split);
    for (int r = 0; r < t->rows; r++, p += hd + 2) {
        p[0] = t->max[r];
        p[1] = t->sum[r];
        memcpy(p + 2, t->o + r * hd, (size_t)hd * sizeof(float));
    }
}

static void run_tile(const struct attn_job *j, struct tile *t, int seq, int row0, int split)
{
    const int splits = splits_of(j, seq);
    if (split >= splits)
        return;
    load_rows(t, seq, j->group, row0);
    const int bt = j->a->block_tokens;
    int begin = t->first[0] / bt * bt, end = t->last[t->rows - 1] + 1;
    if (splits == 1) {
        add_keys(t, begin, end);
        write_rows(t, seq, j->group, row0);
        return;
    }
    int per = LM_DIV_UP(LM_DIV_UP(end - begin, splits), bt) * bt;
    int from = begin + split * per;
    if (from < end)
        add_keys(t, from, LM_MIN(end, from + per));
    save_partial(j, t, seq, split);
}

static void attn_range(void *ctx, int slot, int begin, int end)
{
    const struct attn_job *j = ctx;
    const struct kn_attention *a = j->a;
    struct tile t;
    t.a = a;
    t.v = j->v;
    (void)slot;
    for (int i = begin; i < end; i++) {
        int split = i % j->splits, rest = i / j->splits;
        int part = rest % j->q_items, seq = rest / j->q_items / a->kv_heads;
        t.kv_head = rest / j->q_items % a->kv_heads;
        t.table = a->block_table + seq * a->table_ld;
        int n_q = a->q_start[seq + 1] - a->q_start[seq];
        int row = part * TASK_TOKENS * j->group;
        int row_end = LM_MIN(n_q, (part + 1) * TASK_TOKENS) * j->group;
        for (; row < row_end; row += TILE_ROWS) {
            t.rows = LM_MIN(TILE_ROWS, row_end - row);
            run_tile(j, &t, seq, row, split);
        }
    }
}

/* Softmax of the whole from the parts: rescale each to the common maximum, add, divide. */
static void merge_splits(const struct attn_job *j)
{
    const struct kn_attention *a = j->a;
    const int hd = a->head_dim;
    const int64_t stride = (int64_t)j->group * (hd + 2);
    for (int i = 0; i < a->n_seqs * a->kv_heads; i++) {
        const int splits = splits_of(j, i / a->kv_heads);
        for (int r = 0; r < j->group && splits > 1; r++) {
            const float *p = partial_at(j, i / a->kv_heads, i % a->kv_heads, 0) + r * (hd + 2);
            float m = -INFINITY, sum = 0;
            int head = i % a->kv_heads * j->group + r, tok = a->q_start[i / a->kv_heads];
            float *out = (float *)a->out + ((int64_t)tok * a->q_heads + head) * hd;
            for (int k = 0; k < splits; k++)
                m = LM_MAX(m, p[k * stride]);
            memset(out, 0, (size_t)hd * sizeof(float));
            for (int k = 0; k < splits; k++) {
                const float *part = p + k * stride;
                float w = part[1] > 0 ? expf(part[0] - m) : 0;
                sum += w * part[1];
                for (int d = 0; d < hd; d++)
                    out[d] += w * part[2 + d];
            }
            for (int d = 0; d < hd; d++)
                out[d] /= sum;
        }
    }
}

/* The most that any task may have. */
static int most_splits(const struct kn_attention *a, int group, int threads)
{
    int tasks = a->n_seqs * a->kv_heads;
    if (tasks >= threads || group > TILE_ROWS)
        return 1;
    int by_keys = LM_MAX(1, a->max_kv / SPLIT_MIN_KEYS);
    int by_room = SPLIT_FLOATS * threads / (tasks * group * (a->head_dim + 2));
    return LM_MAX(1, LM_MIN(LM_MIN(threads, by_keys), by_room));
}

static const char *seq_fault(const struct kn_attention *a, int s)
{
    int n_q = a->q_start[s + 1] - a->q_start[s], len = a->kv_len[s];
    if (a->q_start[s] < 0 || n_q < 0 || n_q > a->max_q || a->q_start[s + 1] > a->n_tok)
        return "query rows out of range";
    if (len < n_q || len > a->max_kv || (int64_t)LM_DIV_UP(len, a->block_tokens) > a->table_ld)
        return "kv_len out of range";
    int from = a->window > 0 ? LM_MAX(0, len - n_q - a->window + 1) : 0;
    for (int b = from / a->block_tokens; n_q && b < LM_DIV_UP(len, a->block_tokens); b++) {
        int32_t id = a->block_table[s * a->table_ld + b];
        if (id < 0 || id >= a->pool.num_blocks)
            return "block outside of the pool";
    }
    return NULL;
}

static const char *attn_fault(const struct kn_attention *a)
{
    if (a->n_seqs < 0 || !a->q_start || !a->kv_len || !a->block_table || !a->out || !a->qkv)
        return "null pointer or negative count";
    if (a->q_heads <= 0 || a->kv_heads <= 0 || a->q_heads % a->kv_heads || a->head_dim <= 0 ||
        a->block_tokens <= 0 || a->max_q < 0)
        return "bad head shape";
    if (!cpu_pool_valid(&a->pool, a->layer) ||
        (int64_t)cpu_kv_block_bytes(NULL, a->pool.kv, a->block_tokens, a->kv_heads, a->head_dim) >
            a->pool.block_bytes)
        return "the pool's blocks are too small, or the layer is outside of it";
    const char *fault = NULL;
    for (int s = 0; s < a->n_seqs && !fault; s++)
        fault = seq_fault(a, s);
    return fault;
}

lm_status cpu_op_attention(kn_stream *s, const struct kn_attention *a)
{
    if (a->n_seqs == 0 || a->n_tok == 0)
        return LM_OK;
    const char *fault = attn_fault(a);
    if (fault)
        return cpu_refuse("attention", fault);
    if (a->head_dim > CPU_MAX_HEAD_DIM)
        return LM_UNSUPPORTED;
    struct cpu_stream *st = cpu_stream_of(s);
    struct attn_job j = { .a = a, .v = st->dev->v, .partial = st->partial };
    j.group = a->q_heads / a->kv_heads;
    j.q_items = LM_MAX(1, LM_DIV_UP(a->max_q, TASK_TOKENS));
    j.splits = most_splits(a, j.group, st->dev->threads);
    int n = a->n_seqs * a->kv_heads * j.q_items * j.splits;
    int64_t keys = 0;
    for (int i = 0; i < a->n_seqs; i++)
        keys += (int64_t)(a->q_start[i + 1] - a->q_start[i]) * a->kv_len[i];
    int64_t work = keys * a->q_heads * a->head_dim / 10;
    cpu_parallel(st, n, LM_MAX(1, n / (st->dev->threads * 8)), work, attn_range, &j);
    if (j.splits > 1)
        merge_splits(&j);
    return LM_OK;
}
