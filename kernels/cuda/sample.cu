/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sample.cu - one token from one row of logits, a block of threads a row; the semantics are those
 * of kernels/cpu/sample.c, step by step.
 *
 * Greedy rows read their logits once. The others turn them into weights e^((x - max) / T) <= 1 and
 * cut a prefix of the order (weight descending, id ascending) by radix selection: a key whose order
 * is that of the weights, in three digits, a histogram of counts and masses for each. Masses are
 * sums of integers, weight * 2^44 cut to a whole number: such sums do not depend on the order of
 * threads, so the same row gives the same token always. A mass that the CPU keeps in double differs
 * by less than 2^-26 of the total, which moves a token only where u falls within that of a border.
 *
 * Where the histogram's first digit says that few candidates can survive (top-k, or a model that is
 * sure of itself), those are gathered in shared memory and sorted, and the rest happens there.
 *
 * Else the draw, and ties at the cut, ask for the first id at which a running sum passes a bound:
 * 32 warps sum a 32nd each, the one where it happens is cut again, down to one warp's width.
 */
#include "kernels/cuda/cuda_int.h"

#include <math.h>

#define THREADS 1024
#define WARPS (THREADS / 32)
#define BINS 2048
#define NOBODY 0xffffffffu      /* the key of what is no candidate */
#define FULL_KEY (0xfffffffeu)
#define LIST 2048               /* candidates sorted in shared memory, a power of two */

struct hist {
    uint32_t count[BINS], lo[BINS], hi[BINS];
};

struct shared {
    struct hist h;
    uint64_t warp_mass[WARPS];
    uint32_t warp_count[WARPS];
    float warp_f[WARPS];
    int warp_i[WARPS];
    int found_bin;
    uint32_t found_count;
    uint64_t found_mass;
    uint64_t list[LIST];
    int list_n, top_n, top_id[KN_MAX_TOP_LOGPROBS];
    float top_x[KN_MAX_TOP_LOGPROBS];
};

/* One row's work; identical in all threads of the block. */
struct draw {
    struct kn_sample_row p;
    const int32_t *history;
    const float *raw;           /* [vocab] */
    float *w;                   /* [vocab] workspace */
    int32_t *count;             /* [vocab] workspace */
    int vocab;
    struct shared *s;
};

__device__ static inline int tid(void)
{
    return (int)threadIdx.x;
}

__device__ static inline bool is_candidate(float x)
{
    return x > -INFINITY;       /* false for NaN */
}

/* ---- over the whole block -------------------------------------------------------------- */

__device__ static float block_sum_f(struct shared *s, float v)
{
    for (int d = 16; d; d >>= 1)
        v += __shfl_xor_sync(~0u, v, d);
    __syncthreads();
    if (tid() % 32 == 0)
        s->warp_f[tid() / 32] = v;
    __syncthreads();
    v = s->warp_f[tid() % 32];
    for (int d = 16; d; d >>= 1)
        v += __shfl_xor_sync(~0u, v, d);
    return v;
}

/* The largest of all threads' v, and the lowest i that goes with it. */
__device__ static void block_best(struct shared *s, float *v, int *i)
{
    for (int round = 0; round < 2; round++) {
        for (int d = 16; d; d >>= 1) {
            float v2 = __shfl_xor_sync(~0u, *v, d);
            int i2 = __shfl_xor_sync(~0u, *i, d);
            if (v2 > *v || (v2 == *v && i2 < *i)) {
                *v = v2;
                *i = i2;
            }
        }
        if (round == 1)
            return;
        __syncthreads();
        if (tid() % 32 == 0) {
            s->warp_f[tid() / 32] = *v;
            s->warp_i[tid() / 32] = *i;
        }
        __syncthreads();
        *v = s->warp_f[tid() % 32];
        *i = s->warp_i[tid() % 32];
    }
}

__device__ static uint64_t block_sum_u(struct shared *s, uint64_t v)
{
    for (int d = 16; d; d >>= 1)
        v += __shfl_xor_sync(~0u, v, d);
    __syncthreads();
    if (tid() % 32 == 0)
        s->warp_mass[tid() / 32] = v;
    __syncthreads();
    v = s->warp_mass[tid() % 32];
    for (int d = 16; d; d >>= 1)
        v += __shfl_xor_sync(~0u, v, d);
    return v;
}

/* The largest element and its lowest index; NaN is nobody. */
__device__ static float block_max(const struct draw *d, const float *x, int *at)
{
    float best = -INFINITY;
    int where = INT32_MAX;
#pragma unroll 4
    for (int i = tid(); i < d->vocab; i += THREADS) {
        float v = x[i];
        if (v > best) {
            best = v;
            where = i;
        }
    }
    block_best(d->s, &best, &where);
    *at = where;
    return best;
}

/* The smallest i with value(0) + .. + value(i) > target; the sum of all must be. */
template <typename F>
__device__ static int find_prefix(struct shared *s, int n, uint64_t target, F value)
{
    int lo = 0, hi = n;
    const int warp = tid() / 32, lane = tid() % 32;
    while (hi - lo > 32) {
        int per = ((hi - lo + WARPS - 1) / WARPS + 31) / 32 * 32;
        int begin = min(hi, lo + warp * per), end = min(hi, begin + per);
        uint64_t sum = 0;
        for (int i = begin + lane; i < end; i += 32)
            sum += value(i);
        for (int d = 16; d; d >>= 1)
            sum += __shfl_xor_sync(~0u, sum, d);
        __syncthreads();
        if (lane == 0)
            s->warp_mass[warp] = sum;
        __syncthreads();
        int w = 0;
        for (; w < WARPS - 1 && s->warp_mass[w] <= target; w++)
            target -= s->warp_mass[w];
        lo = min(hi - 1, lo + w * per);
        hi = min(hi, lo + per);
    }
    uint64_t v = lo + lane < hi ? value(lo + lane) : 0;
    for (int d = 1; d < 32; d <<= 1) {
        uint64_t before = __shfl_up_sync(~0u, v, d);
        v += lane >= d ? before : 0;
    }
    unsigned past = __ballot_sync(~0u, v > target);
    return past ? lo + __ffs(past) - 1 : hi - 1;
}

/* ---- radix selection ------------------------------------------------------------------- */

__device__ static inline void add_mass(struct hist *h, int bin, uint64_t m)
{
    uint32_t lo = (uint32_t)m, hi = (uint32_t)(m >> 32);
    uint32_t old = atomicAdd(&h->lo[bin], lo);
    hi += old + lo < old;       /* the carry of this very addition */
    if (hi)
        atomicAdd(&h->hi[bin], hi);
}

/* Inclusive scan over the block's threads. */
__device__ static void block_scan(struct shared *s, uint32_t *count, uint64_t *mass)
{
    const int warp = tid() / 32, lane = tid() % 32;
    for (int d = 1; d < 32; d <<= 1) {
        uint32_t c = __shfl_up_sync(~0u, *count, d);
        uint64_t m = __shfl_up_sync(~0u, *mass, d);
        if (lane >= d) {
            *count += c;
            *mass += m;
        }
    }
    __syncthreads();
    if (lane == 31) {
        s->warp_count[warp] = *count;
        s->warp_mass[warp] = *mass;
    }
    __syncthreads();
    for (int w = 0; w < warp; w++) {
        *count += s->warp_count[w];
        *mass += s->warp_mass[w];
    }
}

/* Where a running (count, mass) over the bins first reaches count or mass. False when never. */
__device__ static bool find_bin(struct shared *s, uint32_t want_count, uint64_t want_mass,
                                uint32_t *count, uint64_t *mass, int *bin)
{
    uint32_t c[2], run = 0;
    uint64_t m[2], sum = 0;
    if (tid() == 0)
        s->found_bin = -1;
    for (int k = 0; k < 2; k++) {
        int b = tid() * 2 + k;
        c[k] = s->h.count[b];
        m[k] = (uint64_t)s->h.hi[b] << 32 | s->h.lo[b];
        run += c[k];
        sum += m[k];
    }
    block_scan(s, &run, &sum);
    uint32_t before = *count + run - c[0] - c[1];
    uint64_t below = *mass + sum - m[0] - m[1];
    for (int k = 0; k < 2; k++) {
        bool here = before < want_count && below < want_mass &&
                    (before + c[k] >= want_count || below + m[k] >= want_mass);
        if (here) {
            s->found_bin = tid() * 2 + k;
            s->found_count = before;
            s->found_mass = below;
        }
        before += c[k];
        below += m[k];
    }
    __syncthreads();
    *bin = s->found_bin;
    if (*bin < 0)
        return false;
    *count = s->found_count;
    *mass = s->found_mass;
    return true;
}

/* Keys below `key` are kept, and those equal to it up to `id`. */
struct cut {
    uint32_t key;
    int id;
    uint64_t mass;              /* of everything kept */
};

__device__ static inline bool kept(struct cut c, uint32_t key, int id)
{
    return key < c.key || (key == c.key && id <= c.id);
}

/* The shortest prefix in order (key, id) with `want_count` candidates or `want_mass`, whichever is
 * reached first; all of them when neither is. Both wants are above 0. */
template <typename K, typename M>
__device__ static struct cut select_prefix(struct shared *s, int n, uint32_t want_count,
                                           uint64_t want_mass, K key_of, M mass_of)
{
    uint32_t count = 0, prefix = 0;
    uint64_t mass = 0;
    int shift = 32;
    for (int level = 0; level < 3; level++) {
        int next = level == 0 ? 21 : level == 1 ? 10 : 0, bin;
        uint32_t mask = (1u << (shift - next)) - 1;
        __syncthreads();
        for (int b = tid(); b < BINS; b += THREADS)
            s->h.count[b] = s->h.lo[b] = s->h.hi[b] = 0;
        __syncthreads();
#pragma unroll 2
        for (int i = tid(); i < n; i += THREADS) {
            uint32_t key = key_of(i);
            if (key == NOBODY || (level > 0 && key >> shift != prefix))
                continue;
            int b = (int)(key >> next & mask);
            uint64_t m = mass_of(i);
            atomicAdd(&s->h.count[b], 1u);
            if (m)
                add_mass(&s->h, b, m);
        }
        __syncthreads();
        if (!find_bin(s, want_count, want_mass, &count, &mass, &bin))
            return { FULL_KEY, INT32_MAX, 0 };
        prefix = prefix << (shift - next) | (uint32_t)bin;
        shift = next;
    }
    uint32_t equal = s->h.count[prefix & 1023], take = want_count - count;
    uint64_t each = ((uint64_t)s->h.hi[prefix & 1023] << 32 | s->h.lo[prefix & 1023]) / equal;
    if (each)
        take = (uint32_t)min((uint64_t)take, (want_mass - mass - 1) / each + 1);
    struct cut c = { prefix, INT32_MAX, mass + (uint64_t)min(take, equal) * each };
    __syncthreads();
    if (take < equal)
        c.id = find_prefix(s, n, take - 1,
                           [&](int i) { return (uint64_t)(key_of(i) == prefix); });
    return c;
}

/* ---- penalties ------------------------------------------------------------------------- */

__device__ static inline bool has_penalties(const struct kn_sample_row *p)
{
    return p->repetition_penalty != 1.0f || p->presence_penalty != 0.0f ||
           p->frequency_penalty != 0.0f;
}

__device__ static inline bool in_vocab(const struct draw *d, int32_t id)
{
    return id >= 0 && id < d->vocab;
}

/* Each token of the history once: whoever takes its count applies it. */
__device__ static void penalize(const struct draw *d)
{
    const struct kn_sample_row *p = &d->p;
    const int32_t *h = d->history + p->hist0;
    const int n = p->n_prompt + p->n_output;
    for (int i = tid(); i < n; i += THREADS)
        if (in_vocab(d, h[i]))
            d->count[h[i]] = 0;
    __syncthreads();
    for (int i = p->n_prompt + tid(); i < n; i += THREADS)
        if (in_vocab(d, h[i]))
            atomicAdd(&d->count[h[i]], 1);
    __syncthreads();
    for (int i = tid(); i < n; i += THREADS) {
        if (!in_vocab(d, h[i]))
            continue;
        int seen = atomicExch(&d->count[h[i]], -1);
        if (seen < 0)
            continue;
        float w = d->w[h[i]];
        w = w > 0 ? __fdiv_rn(w, p->repetition_penalty) : w * p->repetition_penalty;
        w = __fsub_rn(w, __fmul_rn(p->frequency_penalty, (float)seen));
        w = __fsub_rn(w, seen > 0 ? p->presence_penalty : 0.0f);
        d->w[h[i]] = w;
    }
    __syncthreads();
}

/* The row after penalties and bans; the raw logits themselves when there are none. */
__device__ static const float *adjusted(const struct draw *d)
{
    const struct kn_sample_row *p = &d->p;
    if (!has_penalties(p) && p->n_banned == 0)
        return d->raw;
    for (int i = tid(); i < d->vocab; i += THREADS)
        d->w[i] = d->raw[i];
    __syncthreads();
    if (has_penalties(p))
        penalize(d);
    for (int i = tid(); i < p->n_banned; i += THREADS)
        if (in_vocab(d, d->history[p->banned0 + i]))
            d->w[d->history[p->banned0 + i]] = -INFINITY;
    __syncthreads();
    return d->w;
}

/* ---- weights --------------------------------------------------------------------------- */

__device__ static inline uint64_t mass_of(float w)
{
    return __float2ull_rz(w * 0x1p44f);
}

/* 0 for the largest possible weight, 1. */
__device__ static inline uint32_t weight_key(float w)
{
    return w > 0 ? (0x3f800000u - __float_as_uint(w)) << 2 : NOBODY;
}

__device__ static inline float key_weight(uint32_t key)
{
    return __uint_as_float(0x3f800000u - (key >> 2));
}

__device__ static inline uint64_t mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

__device__ static inline double uniform(uint64_t seed, uint64_t counter)
{
    return (double)(mix(mix(seed) + (counter + 1) * 0x9e3779b97f4a7c15u) >> 11) * 0x1p-53;
}

/* ---- few candidates -------------------------------------------------------------------- */

/* Bitonic, ascending, of the first `room` entries, a power of two. */
__device__ static void sort_list(struct shared *s, int room)
{
    for (int size = 2; size <= room; size <<= 1)
        for (int step = size / 2; step; step >>= 1) {
            __syncthreads();
            for (int t = tid(); t < room / 2; t += THREADS) {
                int i = 2 * t - (t & (step - 1)), j = i + step;
                uint64_t a = s->list[i], b = s->list[j];
                if ((a > b) == ((i & size) == 0)) {
                    s->list[i] = b;
                    s->list[j] = a;
                }
            }
        }
    __syncthreads();
}

/* Gathers what lies in the first bins, as key and id, in order. Its number, or -1: too many. */
__device__ static int gather_list(const struct draw *d, int last_bin, uint32_t n)
{
    struct shared *s = d->s;
    if (n > LIST)
        return -1;
    if (tid() == 0)
        s->list_n = 0;
    int room = 2;
    while (room < (int)n)
        room *= 2;
    __syncthreads();
#pragma unroll 4
    for (int i = tid(); i < d->vocab; i += THREADS) {
        uint32_t key = weight_key(d->w[i]);
        if (key != NOBODY && (int)(key >> 21) <= last_bin)
            s->list[atomicAdd(&s->list_n, 1)] = (uint64_t)key << 32 | (uint32_t)i;
    }
    __syncthreads();
    for (int i = n + tid(); i < room; i += THREADS)
        s->list[i] = ~(uint64_t)0;
    sort_list(s, room);
    return (int)n;
}

/* Of the first n entries: the sum of masses up to and with this thread's two, and those two. */
__device__ static uint64_t scan_list(struct shared *s, int n, bool by_id, uint64_t m[2])
{
    uint32_t unused = 0;
    uint64_t sum = 0;
    for (int k = 0; k < 2; k++) {
        int i = tid() * 2 + k;
        uint64_t e = i < n ? s->list[i] : 0;
        m[k] = i < n ? mass_of(key_weight((uint32_t)(by_id ? e : e >> 32))) : 0;
        sum += m[k];
    }
    block_scan(s, &unused, &sum);
    return sum;
}

/* How many of the sorted list survive top-k, top-p and min-p. */
__device__ static int keep_of_list(const struct draw *d, int n, uint64_t total)
{
    const struct kn_sample_row *p = &d->p;
    struct shared *s = d->s;
    uint64_t m[2];
    if (p->top_k > 0 && p->top_k < d->vocab) {
        n = min(n, p->top_k);
        scan_list(s, n, false, m);
        total = block_sum_u(s, m[0] + m[1]);
    }
    if (p->top_p < 1.0f) {
        double want = ceil((double)total * (double)p->top_p);
        uint64_t goal = want >= 1 ? (uint64_t)want : 1, sum = scan_list(s, n, false, m);
        uint64_t before[2] = { sum - m[0] - m[1], sum - m[1] }, taken = 0;
        for (int k = 0; k < 2; k++)
            taken += tid() * 2 + k < n && before[k] < goal;
        n = (int)block_sum_u(s, taken);
    }
    if (p->min_p > 0) {
        uint32_t limit = p->min_p <= 1 ? weight_key(p->min_p) : 0;
        uint64_t taken = 0;
        for (int i = tid(); i < n; i += THREADS)
            taken += p->min_p <= 1 && (uint32_t)(s->list[i] >> 32) <= limit;
        n = (int)block_sum_u(s, taken);
    }
    return n;
}

/* Draws from the sorted list's first n, in order of ids. */
__device__ static int32_t draw_from_list(const struct draw *d, int n)
{
    struct shared *s = d->s;
    int room = 2;
    while (room < n)
        room *= 2;
    __syncthreads();
    for (int i = tid(); i < room; i += THREADS)
        s->list[i] = i < n ? s->list[i] << 32 | s->list[i] >> 32 : ~(uint64_t)0;
    sort_list(s, room);
    uint64_t m[2], sum = scan_list(s, n, true, m), all = block_sum_u(s, m[0] + m[1]);
    if (all == 0)
        return -1;
    uint64_t want = min((uint64_t)(uniform(d->p.seed, d->p.counter) * (double)all), all - 1);
    uint64_t before = sum - m[0] - m[1];
    __syncthreads();
    for (int k = 0; k < 2; k++) {
        if (before <= want && want < before + m[k])
            s->list_n = (int)(s->list[tid() * 2 + k] >> 32);
        before += m[k];
    }
    __syncthreads();
    return s->list_n;
}

/* The token, where few candidates can survive; -2 where they are many. The histogram of the first
 * digit is full. */
__device__ static int32_t draw_among_few(const struct draw *d, uint64_t total)
{
    const struct kn_sample_row *p = &d->p;
    const bool top_k = p->top_k > 0 && p->top_k < d->vocab;
    uint32_t count = 0;
    uint64_t mass = 0, want_mass = ~(uint64_t)0;
    int bin;
    if (!top_k && p->top_p < 1.0f) {
        double want = ceil((double)total * (double)p->top_p);
        want_mass = want >= 1 ? (uint64_t)want : 1;
    }
    if (!top_k && p->top_p >= 1.0f)
        return -2;
    __syncthreads();
    if (!find_bin(d->s, top_k ? (uint32_t)p->top_k : ~0u, want_mass, &count, &mass, &bin))
        return -2;
    int n = gather_list(d, bin, count + d->s->h.count[bin]);
    return n < 0 ? -2 : draw_from_list(d, keep_of_list(d, n, total));
}

/* ---- many candidates ------------------------------------------------------------------- */

/* The last candidate that survives top-k, top-p and min-p. */
__device__ static struct cut find_cut(const struct draw *d, uint64_t total)
{
    const struct kn_sample_row *p = &d->p;
    const float *w = d->w;
    struct cut c = { FULL_KEY, INT32_MAX, total };
    auto mass = [&](int i) { return mass_of(w[i]); };
    if (p->top_k > 0 && p->top_k < d->vocab) {
        c = select_prefix(d->s, d->vocab, (uint32_t)p->top_k, ~(uint64_t)0,
                          [&](int i) { return weight_key(w[i]); }, mass);
        if (c.key == FULL_KEY)
            c.mass = total;     /* fewer candidates than asked for */
    }
    if (p->top_p < 1.0f) {
        double want = ceil((double)c.mass * (double)p->top_p);
        struct cut limit = c;
        c = select_prefix(d->s, d->vocab, ~0u, want >= 1 ? (uint64_t)want : 1,
                          [&](int i) {
                              uint32_t key = weight_key(w[i]);
                              return key != NOBODY && kept(limit, key, i) ? key : NOBODY;
                          }, mass);
        if (c.key == FULL_KEY)
            c = limit;
    }
    if (p->min_p > 0) {
        uint32_t key = p->min_p <= 1 ? weight_key(p->min_p) : 0;
        if (key < c.key || p->min_p > 1)
            c = { key, p->min_p > 1 ? -1 : INT32_MAX, 0 };
    }
    return c;
}

/* Weights, and the histogram of their keys' first digit where something is to be cut. Returns this
 * thread's part of the whole mass. */
__device__ static uint64_t make_weights(const struct draw *d, const float *x, float m)
{
    const struct kn_sample_row *p = &d->p;
    const float inv_t = __fdiv_rn(1.0f, p->temperature);
    const bool cuts = (p->top_k > 0 && p->top_k < d->vocab) || p->top_p < 1.0f;
    struct hist *h = &d->s->h;
    uint64_t total = 0;
    __syncthreads();
    for (int b = tid(); b < BINS; b += THREADS)
        h->count[b] = h->lo[b] = h->hi[b] = 0;
    __syncthreads();
#pragma unroll 2
    for (int i = tid(); i < d->vocab; i += THREADS) {
        float v = x[i], w = is_candidate(v) ? expf(__fmul_rn(__fsub_rn(v, m), inv_t)) : 0.0f;
        uint64_t mass = mass_of(w);
        d->w[i] = w;
        total += mass;
        if (cuts && w > 0) {
            int b = (int)(weight_key(w) >> 21);
            atomicAdd(&h->count[b], 1u);
            if (mass)
                add_mass(h, b, mass);
        }
    }
    return total;
}

__device__ static int32_t draw_token(const struct draw *d)
{
    const struct kn_sample_row *p = &d->p;
    const float *x = adjusted(d);
    int best;
    float m = block_max(d, x, &best);
    if (!(m > -INFINITY))
        return -1;
    if (p->temperature <= 0 || m == INFINITY)
        return best;
    uint64_t total = block_sum_u(d->s, make_weights(d, x, m));
    int32_t id = draw_among_few(d, total);
    if (id != -2)
        return id;
    struct cut c = find_cut(d, total);
    const float *w = d->w;
    auto mass = [&](int i) {
        float v = w[i];
        return v > 0 && kept(c, weight_key(v), i) ? mass_of(v) : (uint64_t)0;
    };
    uint64_t sum = 0;
    __syncthreads();
    for (int i = tid(); i < d->vocab; i += THREADS)
        sum += mass(i);
    sum = block_sum_u(d->s, sum);
    if (sum == 0)
        return -1;
    uint64_t want = (uint64_t)(uniform(p->seed, p->counter) * (double)sum);
    return find_prefix(d->s, d->vocab, min(want, sum - 1), mass);
}

/* ---- log-probabilities ----------------------------------------------------------------- */

/* 0 upwards from the largest float; -0 counts as 0. */
__device__ static inline uint32_t logit_key(float x)
{
    if (!is_candidate(x))
        return NOBODY;
    uint32_t b = __float_as_uint(x + 0.0f);
    return ~(b & 0x80000000u ? ~b : b | 0x80000000u);
}

__device__ static void sort_top(struct shared *s, int k)
{
    for (int i = 1; i < s->top_n; i++)
        for (int j = i; j > 0; j--) {
            float a = s->top_x[j - 1], b = s->top_x[j];
            int ia = s->top_id[j - 1], ib = s->top_id[j];
            if (a > b || (a == b && ia < ib))
                break;
            s->top_x[j - 1] = b, s->top_x[j] = a;
            s->top_id[j - 1] = ib, s->top_id[j] = ia;
        }
    for (int i = s->top_n; i < k; i++) {
        s->top_x[i] = -INFINITY;
        s->top_id[i] = -1;
    }
}

/* The k best of the raw logits into shared memory, best first, ties to the lowest id. */
__device__ static void top_alternatives(const struct draw *d, int k)
{
    struct shared *s = d->s;
    const float *raw = d->raw;
    struct cut c = select_prefix(s, d->vocab, (uint32_t)k, ~(uint64_t)0,
                                 [&](int i) { return logit_key(raw[i]); },
                                 [](int) { return (uint64_t)0; });
    __syncthreads();
    if (tid() == 0)
        s->top_n = 0;
    __syncthreads();
    for (int i = tid(); i < d->vocab; i += THREADS) {
        uint32_t key = logit_key(raw[i]);
        if (key == NOBODY || !kept(c, key, i))
            continue;
        int at = atomicAdd(&s->top_n, 1);
        s->top_id[at] = i;
        s->top_x[at] = raw[i];
    }
    __syncthreads();
    if (tid() == 0)
        sort_top(s, k);
    __syncthreads();
}

__device__ static void report(const struct kn_sample *a, int row, const struct draw *d, int32_t id)
{
    const struct kn_sample_row *p = &d->p;
    float logprob = nanf("");
    if (p->want_logprob || p->top_logprobs > 0) {
        int at;
        float m = block_max(d, d->raw, &at), sum = 0;
#pragma unroll 4
        for (int i = tid(); i < d->vocab; i += THREADS) {
            float x = d->raw[i];
            sum += is_candidate(x) ? expf(x - m) : 0.0f;
        }
        float lse = m + logf(block_sum_f(d->s, sum));
        if (p->want_logprob && id >= 0)
            logprob = d->raw[id] - lse;
        if (p->top_logprobs > 0)
            top_alternatives(d, p->top_logprobs);
        int64_t to = (int64_t)row * KN_MAX_TOP_LOGPROBS + tid();
        if (tid() < p->top_logprobs) {
            a->top_id[to] = d->s->top_id[tid()];
            a->top_logprob[to] = d->s->top_x[tid()] - lse;
        }
    }
    if (tid() == 0 && a->out_logprob)
        a->out_logprob[row] = logprob;
}

/* ---- the operation --------------------------------------------------------------------- */

__device__ static bool row_valid(const struct kn_sample *a, const struct kn_sample_row *p)
{
    if (p->forced >= a->vocab || p->top_logprobs < 0 || p->top_logprobs > KN_MAX_TOP_LOGPROBS ||
        (p->top_logprobs > 0 && (!a->top_id || !a->top_logprob)))
        return false;
    if (!(p->temperature >= 0) || !(p->repetition_penalty > 0) || p->hist0 < 0 ||
        p->n_prompt < 0 || p->n_output < 0 || p->banned0 < 0 || p->n_banned < 0)
        return false;
    return a->history ||
           !((has_penalties(p) && p->n_prompt + p->n_output > 0) || p->n_banned > 0);
}

__host__ __device__ static inline size_t padded(int vocab)
{
    return ((size_t)vocab + 63) / 64 * 64;
}

__global__ static void __launch_bounds__(THREADS) sample_rows(struct kn_sample a, int32_t *fault)
{
    __shared__ struct shared s;
    cuda_allow_next();
    cuda_wait_prior();
    const int row = blockIdx.x;
    struct draw d;
    d.p = a.rows[row];
    d.history = a.history;
    d.raw = a.logits + row * a.ld;
    d.w = (float *)a.workspace + (size_t)row * 2 * padded(a.vocab);
    d.count = (int32_t *)(d.w + padded(a.vocab));
    d.vocab = a.vocab;
    d.s = &s;
    if (!row_valid(&a, &d.p)) {
        if (tid() == 0) {
            cuda_report(fault, CUDA_FAULT_SAMPLE);
            a.out_id[row] = -1;
        }
        return;
    }
    int32_t id = d.p.forced >= 0 ? d.p.forced : draw_token(&d);
    if (tid() == 0)
        a.out_id[row] = id;
    report(&a, row, &d, id);
}

extern "C" size_t cuda_sample_workspace(kn_device *dev, int max_rows, int vocab)
{
    (void)dev;
    return (size_t)LM_MAX(max_rows, 1) * 2 * padded(vocab) * sizeof(float);
}

extern "C" lm_status cuda_op_sample(kn_stream *s, const struct kn_sample *a)
{
    struct cuda_stream *st = cuda_stream_of(s);
    if (a->n < 0 || a->vocab <= 0 || (a->n > 1 && a->ld < a->vocab) ||
        (a->n && (!a->logits || !a->rows || !a->out_id || !a->workspace)))
        return cuda_refuse("sample", "null pointer or bad shape");
    if (a->n == 0)
        return LM_OK;
    return cuda_launch(st, "sample", sample_rows, dim3(a->n), dim3(THREADS), 0, *a,
                       st->dev->fault);
}
